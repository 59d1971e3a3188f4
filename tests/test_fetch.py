"""fetch: downloads survive every interruption, archives write nothing outside their folder."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from web_server import Page, WebServer, web_server

from arrowhead.commands import fetch as commands_fetch
from arrowhead.data import download as downloads
from arrowhead.data import known_datasets, sources
from arrowhead.data.archives import ArchiveLimits, NotAnArchive, Unpacker, checked_path
from arrowhead.data.download import DownloadConfig, Downloaded, RemoteFile
from arrowhead.data.known_datasets import DATASETS, KnownArchive, KnownDataset
from arrowhead.data.source_config import SourceConfig
from arrowhead.errors import ConfigError, DataError, Refusal

DATA = bytes(range(256)) * 2048  # 512 KiB
LIMITS = ArchiveLimits(max_bytes=10**8, max_files=1000)


@pytest.fixture
def server() -> Iterator[WebServer]:
    with web_server() as running:
        yield running


# ------------------------------------------------------------------------------- downloads


class Client:
    """Downloads one address into a folder, and keeps what was said."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.path = url, folder / "file"
        self.lines: list[str] = []
        self.progress: list[tuple[int, int]] = []

    def __call__(self, *digests: str, max_bytes: int = 10**8) -> Downloaded:
        return downloads.download(
            RemoteFile(url=self.url, shown="the file", digests=digests),
            self.path,
            DownloadConfig(max_bytes=max_bytes, retry_seconds=0.001),
            lambda done, total: self.progress.append((done, total)),
            self.lines.append,
        )

    @property
    def partial(self) -> Path:
        return downloads.partial_path(self.path)


@pytest.fixture
def client(server, tmp_path) -> Callable[..., tuple[Client, Page]]:
    def begin(**behaviour: Any) -> tuple[Client, Page]:
        page = server.pages["/file"] = Page(**{"data": DATA} | behaviour)
        return Client(server.url("/file"), tmp_path), page

    return begin


def asked_ranges(page: Page) -> list[str | None]:
    return [request.get("Range") for request in page.requests]


def test_a_download_is_complete_and_hashed(client):
    get, page = client()
    found = get()
    assert get.path.read_bytes() == DATA
    assert found.sha256 == hashlib.sha256(DATA).hexdigest() and found.size == len(DATA)
    assert get.progress[-1] == (len(DATA), len(DATA))
    assert page.requests[0]["Accept-Encoding"] == "identity"
    assert not get.partial.exists() and len(list(get.path.parent.iterdir())) == 1


def test_a_cut_connection_is_continued_where_it_ended(client):
    get, page = client(cuts=[100_000, 1, 200_000])
    assert get().size == len(DATA)
    assert get.path.read_bytes() == DATA
    assert asked_ranges(page) == [None, "bytes=100000-", "bytes=100001-", "bytes=300001-"]
    assert [request.get("If-Range") for request in page.requests[1:]] == ['"v1"'] * 3
    assert any("100,000 of 524,288 bytes have come" in line for line in get.lines)


def test_a_server_that_ignores_range_sends_the_file_from_the_start(client):
    get, page = client(cuts=[100_000], ignores_range=True)
    assert get().size == len(DATA)
    assert get.path.read_bytes() == DATA
    assert len(page.requests) == 2
    assert any("cannot continue a download" in line for line in get.lines)


def test_a_server_that_always_cuts_at_the_same_byte_is_given_up(client):
    get, page = client(cuts=[1000] * 50, ignores_range=True)
    with pytest.raises(ConfigError, match="1,000 of 524,288 bytes have come and are kept"):
        get()
    assert len(page.requests) == DownloadConfig(max_bytes=1).tries
    assert get.partial.read_bytes() == DATA[:1000]


@pytest.mark.parametrize("ignores_if_range", [False, True])
def test_two_versions_of_a_file_are_never_spliced(client, ignores_if_range):
    get, page = client(cuts=[100_000] * 6, ignores_range=True)
    with pytest.raises(ConfigError):
        get()
    new = DATA[::-1]
    page.data, page.etag, page.cuts = new, '"v2"', []
    page.ignores_range, page.ignores_if_range = False, ignores_if_range
    get()
    assert get.path.read_bytes() == new
    assert any("changed" in line for line in get.lines)


def test_a_date_is_enough_to_continue_and_a_weak_etag_is_not_sent(client):
    date = "Wed, 21 Oct 2026 07:28:00 GMT"
    get, page = client(cuts=[100_000], etag='W/"v1"', modified=date)
    get()
    assert get.path.read_bytes() == DATA
    assert page.requests[1]["If-Range"] == date


def test_without_version_and_hash_an_earlier_part_is_not_used(client):
    get, page = client(cuts=[100_000] * 6, etag="", ignores_range=True)
    with pytest.raises(ConfigError):
        get()
    page.cuts, page.ignores_range, page.requests[:] = [], False, []
    assert get().resumed_at == 0
    assert asked_ranges(page) == [None]


def test_with_a_hash_an_earlier_part_without_version_is_used(client):
    get, page = client(cuts=[100_000] * 6, etag="", ignores_range=True)
    digest = f"md5:{hashlib.md5(DATA).hexdigest()}"
    with pytest.raises(ConfigError):
        get(digest)
    page.cuts, page.ignores_range, page.requests[:] = [], False, []
    found = get(digest)
    assert found.resumed_at == 100_000 and found.checked == digest
    assert asked_ranges(page) == ["bytes=100000-"]


def test_a_part_of_another_file_is_not_used(client, server):
    get, _ = client(cuts=[100_000] * 6, ignores_range=True)
    with pytest.raises(ConfigError):
        get()
    server.pages["/other"] = Page(data=DATA[::-1])
    get.url = server.url("/other")
    get()
    assert get.path.read_bytes() == DATA[::-1]


def test_a_partial_file_that_is_complete_needs_no_request(client):
    get, page = client()
    get()
    state = {"version": {"ETag": '"v1"'}, "total": len(DATA)}
    key = RemoteFile(url=get.url, shown="").key
    get.path.rename(get.partial)
    (get.path.parent / "file.partial.json").write_text(json.dumps(state | {"key": key}))
    page.requests.clear()
    assert get().resumed_at == len(DATA) and page.requests == []


def test_a_partial_file_that_is_too_long_is_replaced(client):
    get, _ = client()
    key = RemoteFile(url=get.url, shown="").key
    get.partial.write_bytes(DATA + b"more")
    state = {"version": {"ETag": '"v1"'}, "total": 0, "key": key}
    (get.path.parent / "file.partial.json").write_text(json.dumps(state))
    get()
    assert get.path.read_bytes() == DATA
    assert any("longer than the file on the server" in line for line in get.lines)


@pytest.mark.parametrize("declared", [len(DATA) + 5, len(DATA) * 2])
def test_a_file_shorter_than_announced_is_refused(client, declared):
    get, _ = client(declared=declared, ignores_range=True)
    with pytest.raises(ConfigError, match="could not be downloaded"):
        get()
    assert not get.path.exists()


def test_a_file_of_unknown_length_is_downloaded(client):
    get, _ = client(declared=-1)
    assert get().size == len(DATA)
    assert get.progress[-1] == (len(DATA), 0)


def test_a_busy_server_is_asked_again(client):
    get, _ = client(statuses=[503, 429, 500], retry_after="0")
    assert get().size == len(DATA)
    assert any("503 Service Unavailable" in line for line in get.lines)


@pytest.mark.parametrize("status", [401, 403, 404, 410, 418])
def test_a_refusal_of_the_server_is_told_at_once(client, status):
    get, page = client(statuses=[status] * 9)
    with pytest.raises(ConfigError, match=str(status)):
        get()
    assert len(page.requests) == 1


def test_a_file_that_is_labelled_as_gzip_is_stored_as_it_is(client):
    data = gzip.compress(DATA)
    get, _ = client(data=data, encoding="gzip")
    get()
    assert get.path.read_bytes() == data


def test_another_hash_is_refused_and_the_file_is_fetched_again_next_time(client):
    get, page = client()
    wrong = f"sha256:{'0' * 64}"
    with pytest.raises(DataError, match=hashlib.sha256(DATA).hexdigest()):
        get(wrong)
    right = f"sha256:{hashlib.sha256(DATA).hexdigest()}"
    assert get(wrong, right).checked == right  # kept, so a right hash needs no request
    assert len(page.requests) == 1
    with pytest.raises(DataError):
        get(wrong)
    assert len(page.requests) == 2


@pytest.mark.parametrize("declared", [None, -1])
def test_a_file_over_the_limit_is_refused(client, declared):
    get, _ = client(declared=declared)
    with pytest.raises(ConfigError, match=r"--max-bytes|sends more"):
        get(max_bytes=300_000)
    assert not get.path.exists()


def test_redirects_are_followed_but_not_without_end(client, server):
    get, _ = client()
    server.pages["/one"] = Page(location="/two?signature=abc")
    server.pages["/two"] = Page(location=server.url("/file"))
    get.url = server.url("/one")
    assert get().size == len(DATA)
    get.path.unlink()
    server.pages["/two"].location = "/one"
    with pytest.raises(ConfigError, match="redirected more than 10 times"):
        get()


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "ftp://127.0.0.1/x", "javascript:1", "http://[::1"]
)
def test_a_redirect_to_another_kind_of_address_is_refused(client, server, location):
    get, _ = client()
    server.pages["/one"] = Page(location=location)
    get.url = server.url("/one")
    with pytest.raises(ConfigError, match="redirect"):
        get()


def test_a_redirect_from_https_to_http_is_refused(client):
    get, _ = client()
    remote = RemoteFile(url="https://host/file", shown="the file")
    config = DownloadConfig(max_bytes=1)
    transfer = downloads._Transfer(remote, get.path, config, lambda *_: None, print)
    assert transfer._redirected("https://host/file", "/other") == "https://host/other"
    with pytest.raises(ConfigError, match="not encrypted"):
        transfer._redirected("https://host/file", "http://host/file")


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("http://127.0.0.1:1/file", "connection refused"),
        ("http://nowhere.invalid/file", "no machine of this name"),
        ("http:///file", "not a valid address"),
        ("http://[::1/file", "not a valid address"),
        (f"http://{'a' * 70}.example/", "not a valid address|no machine of this name"),
    ],
)
def test_a_wrong_address_is_told_at_once_and_without_secrets(tmp_path, url, match):
    get = Client(f"{url}?token=hush", tmp_path)
    with pytest.raises(ConfigError, match=match) as refusal:
        get()
    assert "hush" not in str(refusal.value) and get.lines == []


def test_a_full_disk_is_told_and_the_partial_file_stays(client, tmp_path):
    get, page = client()
    script = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from arrowhead.data.download import *\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "remote = RemoteFile(url=sys.argv[1], shown='it')\n"
        "config = DownloadConfig(max_bytes=10**8)\n"
        "download(remote, Path(sys.argv[2]), config, lambda *_: None, print)\n"
    )
    words = [sys.executable, "-c", script, get.url, get.path]
    done = subprocess.run(words, capture_output=True, text=True)
    assert "ConfigError" in done.stderr and "free some space" in done.stderr
    page.requests.clear()
    assert get().resumed_at > 0
    assert get.path.read_bytes() == DATA


def test_a_killed_command_is_continued_by_the_next(server, tmp_path, image_folder, command):
    archive = shutil.make_archive(str(tmp_path / "photos"), "zip", image_folder)
    data = Path(archive).read_bytes()
    page = server.pages["/photos.zip"] = Page(data=data, slow_bytes=len(data) // 100)
    out = tmp_path / "photos"
    words = [sys.executable, "-m", "arrowhead", "fetch", server.url("/photos.zip"), str(out)]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    partial = tmp_path / "photos.download" / "photos.zip.partial"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (partial.exists() and partial.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    page.slow_bytes = 0
    result = command("fetch", server.url("/photos.zip"), out)
    [one] = result["archives"]
    assert 0 < one["resumed_at"] < len(data)
    assert one["sha256"] == hashlib.sha256(data).hexdigest()
    assert same_files(out, image_folder)
    assert not (tmp_path / "photos.download").exists()


def test_ctrl_c_keeps_the_partial_file_and_says_so(server, tmp_path):
    page = server.pages["/photos.zip"] = Page(data=DATA, slow_bytes=5000)
    words = [sys.executable, "-m", "arrowhead", "fetch", server.url("/photos.zip"), "photos"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=tmp_path, stderr=-2)
    partial = tmp_path / "photos.download" / "photos.zip.partial"
    while not (partial.exists() and partial.stat().st_size) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "kept: photos.download/photos.zip.partial" in output
    assert "Run the same command again to continue" in output
    assert 0 < partial.stat().st_size < len(DATA) and len(page.requests) == 1


# ---------------------------------------------------------------------------------- archives


def tar_of(*entries: tuple[tarfile.TarInfo, bytes], kind: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=kind) as archive:
        for entry, data in entries:
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return file.getvalue()


def tar_entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", mode: int = 0o644) -> Any:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname, entry.mode = kind, link, mode
    return entry


def zip_of(*entries: tuple[str | zipfile.ZipInfo, bytes], method: int = 0) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", method) as archive:
        warnings.simplefilter("ignore")  # duplicate names are meant
        for entry, data in entries:
            archive.writestr(entry, data)
    return file.getvalue()


def zip_entry(name: str, mode: int) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.external_attr, entry.create_system = mode << 16, 3
    return entry


def named(name: str) -> zipfile.ZipInfo:
    """An entry with exactly this name; ZipInfo itself cuts names at a zero byte."""
    entry = zipfile.ZipInfo("x")
    entry.filename = entry.orig_filename = name
    return entry


def unpack(data: bytes, folder: Path, limits: ArchiveLimits = LIMITS) -> dict[str, bytes]:
    """Unpack an archive below `folder`; the files that came out."""
    archive, out = folder / "archive", folder / "out"
    archive.write_bytes(data)
    out.mkdir()
    unpacker = Unpacker(out, limits)
    unpacker.unpack(archive, lambda done, total: None)
    unpacker.finish()
    for path in out.rglob("*"):
        assert not path.is_symlink() and (path.is_dir() or path.stat().st_nlink == 1)
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(p.relative_to(folder)): (p.lstat().st_mode, p.lstat().st_size)
        for p in folder.rglob("*")
        if "out" not in p.relative_to(folder).parts
    }


def same_files(one: Path, other: Path) -> bool:
    def files(folder: Path) -> dict[str, bytes]:
        return {
            str(p.relative_to(folder)): p.read_bytes()
            for p in folder.rglob("*")
            if p.is_file() and not p.name.startswith("fetched.")
        }

    return files(one) == files(other)


PLAIN = {"a/1.jpg": b"one", "a/ü.jpg": b"two", "b/c/3.jpg": b"", "b/" + "x" * 150 + ".jpg": b"4"}


def plain_tar(kind: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as archive:
        for name, data in PLAIN.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return file.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        plain_tar(),
        plain_tar(tarfile.GNU_FORMAT),
        gzip.compress(plain_tar()),
        bz2.compress(plain_tar()),
        lzma.compress(plain_tar()),
        lzma.compress(plain_tar()[:1000]) + bytes(8) + lzma.compress(plain_tar()[1000:]),
        zip_of(*PLAIN.items()),
        zip_of(*PLAIN.items(), method=zipfile.ZIP_DEFLATED),
        zip_of(*PLAIN.items(), method=zipfile.ZIP_LZMA),
    ],
    ids=["pax", "gnu", "gz", "bz2", "xz", "two xz", "zip", "deflated", "lzma"],
)
def test_every_kind_of_archive_is_unpacked_with_its_names(data, tmp_path):
    assert unpack(data, tmp_path) == PLAIN


LINK, HARD = tarfile.SYMTYPE, tarfile.LNKTYPE
HOSTILE = {
    "parent": zip_of(("../evil", b"x")),
    "parent inside": zip_of(("a/../../evil", b"x")),
    "parent that stays inside": zip_of(("a/../b", b"x")),
    "absolute": zip_of(("/tmp/evil", b"x")),
    "drive": zip_of(("C:/evil", b"x")),
    "backslash": zip_of(("..\\evil", b"x")),
    "control character": zip_of(("a\nb", b"x")),
    "name of 300 bytes": zip_of(("x" * 300, b"x")),
    "100 folders": zip_of(("x/" * 100 + "x", b"x")),
    "twice": zip_of(("a", b"x"), ("a", b"y")),
    "one letter's case": zip_of(("a/B", b"x"), ("a/b", b"y")),
    "a folder's case": zip_of(("a/1", b"x"), ("A/2", b"y")),
    "composed and decomposed": zip_of(("\u00e9", b"x"), ("e\u0301", b"y")),
    "file and folder": zip_of(("a", b"x"), ("a/b", b"y")),
    "folder and file": zip_of(("a/b", b"y"), ("a", b"x")),
    "our record": zip_of(("fetched.json", b"{}")),
    "our record in capitals": zip_of(("FETCHED.SHA256", b"")),
    "zip with a link out": zip_of((zip_entry("l", stat.S_IFLNK | 0o777), b"../../etc/passwd")),
    "zip with an absolute link": zip_of((zip_entry("l", stat.S_IFLNK | 0o777), b"/etc/passwd")),
    "zip with a device": zip_of((zip_entry("d", stat.S_IFCHR | 0o666), b"")),
    "zip with a pipe": zip_of((zip_entry("d", stat.S_IFIFO | 0o666), b"")),
    "tar parent": tar_of((tar_entry("../evil"), b"x")),
    "tar absolute": tar_of((tar_entry("/tmp/evil"), b"x")),
    "tar backslash": tar_of((tar_entry("a\\..\\evil"), b"x")),
    "tar twice": tar_of((tar_entry("a"), b"x"), (tar_entry("a"), b"y")),
    "tar name that is not UTF-8": tar_of((tar_entry("\udcff\udcfe"), b"x")),
    "tar link out": tar_of((tar_entry("l", LINK, "../out2"), b"")),
    "tar absolute link": tar_of((tar_entry("l", LINK, "/etc/passwd"), b"")),
    "tar hard link out": tar_of((tar_entry("l", HARD, "../archive"), b"")),
    "tar absolute hard link": tar_of((tar_entry("l", HARD, "/etc/passwd"), b"")),
    "tar write through a link": tar_of(
        (tar_entry("l", LINK, ".."), b""), (tar_entry("l/evil"), b"x")
    ),
    "tar link chain": tar_of((tar_entry("a", LINK, "."), b""), (tar_entry("a/b", LINK, ".."), b"")),
    "tar file over a link": tar_of((tar_entry("l", LINK, "x"), b""), (tar_entry("l"), b"x")),
    "tar character device": tar_of((tar_entry("d", tarfile.CHRTYPE), b"")),
    "tar block device": tar_of((tar_entry("d", tarfile.BLKTYPE), b"")),
    "tar pipe": tar_of((tar_entry("d", tarfile.FIFOTYPE), b"")),
    "tar unknown type": tar_of((tar_entry("d", b"Z"), b"")),
    "tar empty name": tar_of((tar_entry(""), b"x")),
    "empty name": zip_of((named(""), b"x")),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused_and_leaves_nothing(name, tmp_path, command):
    (tmp_path / "archive").write_bytes(HOSTILE[name])
    before = snapshot(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        main("fetch", tmp_path / "archive", tmp_path / "out")
    assert exit_info.value.code == 4
    assert snapshot(tmp_path) == before and not (tmp_path / "out").exists()


def main(*words: object) -> None:
    from arrowhead.cli.main import main as command_line

    command_line([str(word) for word in words])


def test_an_encrypted_zip_is_refused(tmp_path):
    data = bytearray(zip_of(("a.jpg", b"x")))
    data[6] |= 1  # the flag in the local header and in the directory
    data[data.index(b"PK\1\2") + 8] |= 1
    with pytest.raises(DataError, match="is encrypted"):
        unpack(bytes(data), tmp_path)


def test_zip_names_without_the_utf8_flag_are_read_as_utf8_or_refused(tmp_path):
    written = zip_of(("aaaa.jpg", b"x"))
    (tmp_path / "1").mkdir()
    assert unpack(written.replace(b"aaaa", "éé".encode()), tmp_path / "1") == {"éé.jpg": b"x"}
    (tmp_path / "2").mkdir()
    with pytest.raises(DataError, match="not UTF-8"):
        unpack(written.replace(b"aaaa", "éééé".encode("latin-1")), tmp_path / "2")


def test_a_zip_bomb_is_stopped_by_the_bytes_that_come_out(tmp_path):
    data = zip_of(("a.jpg", bytes(10**7)), method=zipfile.ZIP_DEFLATED)
    assert len(data) < 20_000
    with pytest.raises(ConfigError, match="--max-bytes"):
        unpack(data, tmp_path, ArchiveLimits(max_bytes=10**6, max_files=10))
    written = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert written <= 2 * 10**6


def test_a_zip_with_a_false_size_is_damaged(tmp_path):
    data = bytearray(zip_of(("a.jpg", bytes(10**5)), method=zipfile.ZIP_DEFLATED))
    at = data.index(b"PK\1\2") + 24
    data[at : at + 4] = (10).to_bytes(4, "little")
    with pytest.raises(DataError, match="damaged"):
        unpack(bytes(data), tmp_path)


@pytest.mark.parametrize("size", [2 * 10**6, 10**12])
def test_a_tar_bomb_is_stopped(tmp_path, size):
    entry = tar_entry("a.jpg")
    entry.size = size
    data = gzip.compress(entry.tobuf() + bytes(2 * 10**6))
    with pytest.raises(Refusal, match=r"--max-bytes|damaged"):
        unpack(data, tmp_path, ArchiveLimits(max_bytes=10**6, max_files=10))


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_header_that_claims_a_gigabyte_is_not_read_into_memory(tmp_path, kind):
    entry = tar_entry("././@LongLink", kind)
    entry.size = 2**30
    with pytest.raises(DataError, match="header is too large"):
        unpack(gzip.compress(entry.tobuf() + bytes(10**6)), tmp_path)


def test_too_many_files_are_stopped(tmp_path):
    data = zip_of(*((f"{i}.jpg", b"") for i in range(11)))
    with pytest.raises(ConfigError, match="--max-files"):
        unpack(data, tmp_path, ArchiveLimits(max_bytes=10, max_files=10))


def test_a_nested_archive_is_not_opened(tmp_path):
    inner = zip_of(("../evil", b"x"))
    assert unpack(zip_of(("inner.zip", inner)), tmp_path) == {"inner.zip": inner}


def test_permissions_of_an_archive_are_not_taken_over(tmp_path):
    data = tar_of(
        (tar_entry("a", mode=0o6777), b"x"), (tar_entry("d", tarfile.DIRTYPE, mode=0), b"")
    )
    unpack(data, tmp_path)
    (tmp_path / "plain").write_bytes(b"")
    plain = (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "out" / "a").stat().st_mode == plain
    assert os.access(tmp_path / "out" / "d", os.R_OK | os.W_OK | os.X_OK)


def test_links_to_files_become_copies_and_other_links_are_left_out(tmp_path):
    data = tar_of(
        (tar_entry("b/soft", LINK, "../a/file"), b""),
        (tar_entry("a/file"), b"x"),
        (tar_entry("b/hard", HARD, "a/file"), b""),
        (tar_entry("chain", LINK, "b/soft"), b""),
        (tar_entry("folder", LINK, "a"), b""),
        (tar_entry("loop", LINK, "loop"), b""),
        (tar_entry("nothing", LINK, "nowhere"), b""),
    )
    names = ["a/file", "b/soft", "b/hard", "chain"]
    assert unpack(data, tmp_path) == dict.fromkeys(names, b"x")


def test_copies_of_links_count_as_bytes(tmp_path):
    links = [(tar_entry(f"{i}", LINK, "a"), b"") for i in range(100)]
    data = tar_of((tar_entry("a"), bytes(1000)), *links)
    with pytest.raises(ConfigError, match="--max-bytes"):
        unpack(data, tmp_path, ArchiveLimits(max_bytes=50_000, max_files=1000))


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_a_truncated_tar_is_damaged(tmp_path, pack):
    whole = tar_of(*((tar_entry(f"{i}.jpg"), bytes(1000)) for i in range(20)))
    data = pack(whole)
    for number, end in enumerate((len(data) // 2, len(data) * 9 // 10)):
        folder = tmp_path / str(number)
        folder.mkdir()
        if pack is bytes:
            end = end // 2 // 512 * 512  # between two blocks, before the end mark
        with pytest.raises(DataError, match="damaged"):
            unpack(data[:end], folder)


def test_a_tar_with_a_damaged_header_is_damaged(tmp_path):
    data = bytearray(tar_of((tar_entry("a"), b"x"), (tar_entry("b"), b"y")))
    data[1024:1030] = b"\xff" * 6
    with pytest.raises(DataError, match="damaged"):
        unpack(bytes(data), tmp_path)


def test_a_flipped_bit_in_a_zip_is_damaged(tmp_path):
    data = bytearray(zip_of(("a.jpg", b"content")))
    data[data.index(b"content")] ^= 1
    with pytest.raises(DataError, match="damaged"):
        unpack(bytes(data), tmp_path)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><title>Sign in</title>", "web page"),
        (b"7z\xbc\xaf'\x1c" + bytes(100), "7z"),
        (b"Rar!\x1a\7", "RAR"),
        (b"\x28\xb5\x2f\xfd" + bytes(100), "Zstandard"),
        (b"\xff\xd8\xff" + bytes(1000), "neither a zip nor a tar"),
        (gzip.compress(b"a single file" * 99), "neither a zip nor a tar"),
        (bytes(2048), "neither a zip nor a tar"),
    ],
)
def test_what_is_no_archive_is_refused_for_what_it_is(tmp_path, data, match):
    with pytest.raises(NotAnArchive, match=match):
        unpack(data, tmp_path)


NAME = st.text(st.sampled_from("a.B/\\:~ \n\0ü\udcff\u202e"), max_size=12) | st.text(max_size=8)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(names=st.lists(NAME, min_size=1, max_size=4), in_tar=st.booleans(), links=st.booleans())
def test_no_entry_name_leads_out_of_the_folder(names, in_tar, links, tmp_path_factory):
    folder = tmp_path_factory.mktemp("names")
    if in_tar:
        kinds = [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE]
        entries = [
            (tar_entry(name, kinds[n % 3] if links else kinds[0], names[0]), b"")
            for n, name in enumerate(names)
        ]
        data = tar_of(*entries)
    else:
        try:
            data = zip_of(*((named(name), b"x") for name in names))
        except UnicodeEncodeError:
            return
    (folder / "archive").write_bytes(data)
    before = snapshot(folder)
    try:
        unpack(data, folder)
    except Refusal as refusal:
        assert refusal.found
    assert snapshot(folder) == before


@given(name=NAME)
def test_a_checked_path_stays_below_any_folder(name):
    try:
        path = checked_path(name)
    except ValueError:
        return
    assert os.path.normpath(os.path.join("/root", path)) == f"/root/{path}".rstrip("/")


# --------------------------------------------------------------------------------- command


@pytest.fixture(scope="module")
def packed(image_folder, tmp_path_factory) -> Path:
    """photos.zip with the folder `photos` of synthetic images."""
    folder = tmp_path_factory.mktemp("packed")
    shutil.copytree(image_folder, folder / "photos")
    return Path(shutil.make_archive(str(folder / "photos"), "gztar", folder, "photos"))


def test_a_local_archive_becomes_a_folder_that_fit_reads(packed, tmp_path, command, image_folder):
    result = command("fetch", packed, tmp_path / "data")
    assert result["data"] == str(tmp_path / "data" / "photos")
    assert same_files(tmp_path / "data" / "photos", image_folder)
    catalog = sources.labelled_catalog(result["data"], SourceConfig())
    assert catalog.classes == ["baskets", "beads", "leaves"]
    assert result["images"] == result["files"] == sum(p.is_file() for p in image_folder.rglob("*"))
    assert packed.is_file() and f"fit {result['data']} out" in command.stderr
    done = subprocess.run(["sha256sum", "--quiet", "-c", "fetched.sha256"], cwd=tmp_path / "data")
    assert done.returncode == 0


def test_a_file_address_works_like_a_path(packed, tmp_path, command):
    assert command("fetch", packed.as_uri(), tmp_path / "data")["files"] > 0


def test_a_second_run_downloads_nothing_and_checks_on_request(server, packed, tmp_path, command):
    page = server.pages["/photos.tgz"] = Page(data=packed.read_bytes())
    words = "fetch", server.url("/photos.tgz"), tmp_path / "data"
    first = command(*words)
    assert not first["already_there"] and not (tmp_path / "data.download").exists()
    second = command(*words)
    assert second["already_there"] and "already there" in command.stderr
    assert second["data"] == first["data"] and len(page.requests) == 1
    command(*words, "--check")
    photo = next((tmp_path / "data").rglob("*.jpg"))
    photo.write_bytes(photo.read_bytes() + b"x")
    assert command(*words)["already_there"]
    with pytest.raises(SystemExit) as exit_info:
        main(*words, "--check")
    assert exit_info.value.code == 4


def test_a_hash_is_checked_and_its_absence_said(server, packed, tmp_path, command, capsys):
    data = packed.read_bytes()
    server.pages["/photos.tgz"] = Page(data=data)
    sha256 = hashlib.sha256(data).hexdigest()
    url = server.url("/photos.tgz")
    result = command("fetch", url, tmp_path / "1", "--sha256", sha256.upper())
    assert result["archives"][0]["checked"] == f"sha256:{sha256}"
    command("fetch", url, tmp_path / "2")
    assert f"not checked: --sha256 is not given; sha256 {sha256}" in command.stderr
    with pytest.raises(SystemExit) as exit_info:
        main("fetch", url, tmp_path / "3", "--sha256", "0" * 64)
    assert exit_info.value.code == 4 and not (tmp_path / "3").exists()
    assert command("fetch", url, tmp_path / "3", "--sha256", sha256)["files"]


def test_keep_archive_keeps_it(server, packed, tmp_path, command):
    server.pages["/photos.tgz"] = Page(data=packed.read_bytes())
    command("fetch", server.url("/photos.tgz"), tmp_path / "data", "--keep-archive")
    kept = tmp_path / "data.download" / "photos.tgz"
    assert kept.read_bytes() == packed.read_bytes() and str(kept) in command.stderr


def test_secrets_of_an_address_are_neither_shown_nor_stored(server, packed, tmp_path, command):
    page = server.pages["/photos.tgz"] = Page(data=packed.read_bytes(), cuts=[1000])
    url = server.url("/photos.tgz?signature=hushhush").replace("//", "//bob:topsecret@")
    command("fetch", url, tmp_path / "data")
    assert page.requests[0]["Authorization"].startswith("Basic ")
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    for secret in ("topsecret", "hushhush"):
        assert secret not in command.stderr
        assert not any(secret.encode() in data for data in written)


def test_a_web_page_is_refused_and_asked_for_again_next_time(server, packed, tmp_path, command):
    page = server.pages["/photos.tgz"] = Page(data=b"<html>Sign in</html>")
    words = "fetch", server.url("/photos.tgz"), tmp_path / "data"
    with pytest.raises(SystemExit) as exit_info:
        main(*words)
    assert exit_info.value.code == 2 and list(tmp_path.iterdir()) == []
    page.data = packed.read_bytes()
    assert command(*words)["files"] > 0


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["fetch", "nothing", "out"], "neither a known data set nor a file"),
        (["fetch", "oxford-pet", "out"], "neither a known data set nor a file"),
        (["fetch", "ftp://host/a.zip", "out"], "an address that `fetch` cannot read"),
        (["fetch", "http://[::1/a.zip", "out"], "is not a valid address"),
        (["fetch", "folder", "out"], "is a folder"),
        (["fetch", "imagenette-160"], "No folder is given"),
        (["fetch", "a.zip", "full"], "such as mine.txt"),
        (["fetch", "a.zip", "."], "working directory|holds files"),
        (["fetch", "a.zip", "mine"], "is a file"),
        (["fetch", "a.zip", "out", "--sha256", "abc"], "--sha256 is 'abc'"),
        (["fetch", "a.zip", "out", "--max-bytes", "0"], "--max-bytes is 0"),
        (["fetch", "oxford-pets", "out", "--sha256", "0" * 64], "consists of 2 archives"),
        (["fetch", "beans", "out", "--list"], "--list"),
        (["fetch", "empty.zip", "out"], "holds no file"),
    ],
)
def test_a_request_that_cannot_be_carried_out_is_refused(
    words, found, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "a.zip").write_bytes(zip_of(("a.jpg", b"x")))
    (tmp_path / "empty.zip").write_bytes(zip_of())
    with pytest.raises(SystemExit) as exit_info:
        main(*words)
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    assert any(one in message for one in found.split("|")), message
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.download").exists()


def test_a_folder_of_another_source_is_refused(packed, tmp_path, command, capsys):
    command("fetch", packed, tmp_path / "data")
    copy = shutil.copy(packed, tmp_path / "other.tgz")
    with pytest.raises(SystemExit) as exit_info:
        main("fetch", copy, tmp_path / "data")
    assert exit_info.value.code == 2 and f"holds {packed}" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["fetch"], ["fetch", "--list"]])
def test_the_list_has_size_and_terms_of_every_data_set(words, command):
    result = command(*words)
    assert [one["name"] for one in result["datasets"]] == list(DATASETS)
    for one in result["datasets"]:
        assert one["name"] in command.stderr and one["terms"] in command.stderr
        assert one["bytes"] > 10**7 and one["page"].startswith("https://")


# ------------------------------------------------------------------------ known data sets


def test_every_known_archive_has_an_encrypted_address_and_well_formed_hashes():
    for dataset in DATASETS.values():
        names = [commands_fetch._file_name(one.url) for one in dataset.archives]
        assert len(set(names)) == len(names)
        for archive in dataset.archives:
            assert archive.url.startswith("https://")
            for digest in archive.digests:
                kind, _, value = digest.partition(":")
                assert len(value) == {"sha256": 64, "md5": 32}[kind] and int(value, 16)


def test_hashes_are_those_of_torchvision():
    spec = importlib.util.find_spec("torchvision")  # read, as its import takes seconds
    assert spec is not None and spec.origin is not None
    recorded = {}
    for name in ("imagenette", "oxford_iiit_pet", "dtd"):
        text = (Path(spec.origin).parent / "datasets" / f"{name}.py").read_text()
        pairs = re.findall(r'"(https://[^"]+gz)",?\s+(?:_MD5 = )?"([0-9a-f]{32})"', text)
        recorded |= dict(pairs)
    assert len(recorded) == 6
    ours = {one.url: one.digests for dataset in DATASETS.values() for one in dataset.archives}
    assert recorded.keys() <= ours.keys()
    for url, md5 in recorded.items():
        assert f"md5:{md5}" in ours[url]


# The folders in the archives, as their publishers and users describe them.
LAYOUTS = {
    "dogs-vs-cats": [
        "dogscats/train/cats/cat.%d.jpg",
        "dogscats/train/dogs/dog.%d.jpg",
        "dogscats/valid/cats/cat.1%d.jpg",
        "dogscats/valid/dogs/dog.1%d.jpg",
        "dogscats/test1/%d.jpg",
        "dogscats/sample/train/cats/cat.2%d.jpg",
    ],
    "cats-and-dogs-microsoft": ["PetImages/Cat/%d.jpg", "PetImages/Dog/%d.jpg"],
    "imagenette-160": [
        "imagenette2-160/train/n01440764/ILSVRC2012_val_%d.JPEG",
        "imagenette2-160/train/n03888257/ILSVRC2012_val_%d.JPEG",
        "imagenette2-160/val/n01440764/n01440764_%d.JPEG",
        "imagenette2-160/val/n03888257/n03888257_%d.JPEG",
    ],
    "flowers": ["flower_photos/daisy/%d.jpg", "flower_photos/roses/%d.jpg"],
    "eurosat": ["EuroSAT_RGB/Forest/Forest_%d.jpg", "EuroSAT_RGB/River/River_%d.jpg"],
    "textures": ["dtd/images/banded/banded_%d.jpg", "dtd/images/woven/woven_%d.jpg"],
}
EXTRA = {
    "flowers": {"flower_photos/LICENSE.txt": b"CC-BY"},
    "cats-and-dogs-microsoft": {
        "readme[1].txt": b"",
        "MSR-LA - 3467.docx": b"",
        "PetImages/Cat/Thumbs.db": b"",
    },
    "textures": {"dtd/labels/train1.txt": b""},
}


@pytest.fixture
def publish(server, monkeypatch) -> Callable[..., None]:
    """A function that serves archives as those of a data set, with their true hashes."""

    def serve(name: str, *archives: bytes) -> None:
        known, served = DATASETS[name], []
        for one, data in zip(known.archives, archives, strict=True):
            path = "/" + one.url.rpartition("/")[2]
            server.pages[path] = Page(data=data)
            digest = f"md5:{hashlib.md5(data).hexdigest()}"
            url = server.url(path)
            served.append(
                KnownArchive(url=url, size=len(data), digests=("md5:" + "0" * 32, digest))
            )
        fields = {field: getattr(known, field) for field in KnownDataset.__slots__}
        changed = KnownDataset(**fields | {"archives": tuple(served)})
        monkeypatch.setitem(known_datasets.DATASETS, name, changed)

    return serve


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_of_a_known_data_set_is_read_by_fit(
    name, image_folder, publish, tmp_path, command
):
    photos = [path.read_bytes() for path in sorted(image_folder.rglob("*.jpg"))]
    files = {
        pattern % number: photos[10 * at + number] if at < 6 else photos[number]
        for at, pattern in enumerate(LAYOUTS[name])
        for number in range(10)
    } | EXTRA.get(name, {})
    if DATASETS[name].archives[0].url.endswith("zip"):
        archive = zip_of(*files.items())
    else:
        archive = gzip.compress(tar_of(*((tar_entry(n), data) for n, data in files.items())))
    publish(name, archive)
    result = command("fetch", name, tmp_path / "data")
    assert result["archives"][0]["checked"].startswith("md5:")
    assert DATASETS[name].terms in command.stderr
    catalog = sources.labelled_catalog(result["data"], SourceConfig())
    assert len(catalog.classes) == 2
    assert len(catalog) == (20 if name in ("flowers", "eurosat", "textures") else len(catalog))
    assert len(catalog) in (20, 40)


def test_the_three_archives_of_beans_become_three_splits(image_folder, publish, tmp_path, command):
    photos = iter([path.read_bytes() for path in sorted(image_folder.rglob("*.jpg"))])

    def part(split: str) -> bytes:
        names = (f"{split}/{label}/{n}.jpg" for label in ("bean_rust", "healthy") for n in range(5))
        return zip_of((f"{split}/", b""), *((name, next(photos)) for name in names))

    publish("beans", part("train"), part("validation"), part("test"))
    result = command("fetch", "beans", tmp_path / "data")
    assert len(result["archives"]) == 3
    catalog = sources.labelled_catalog(result["data"], SourceConfig())
    assert catalog.classes == ["bean_rust", "healthy"]
    assert sorted(set(catalog.splits)) == ["test", "train", "valid"]


def pets_archives(photos: list[bytes]) -> tuple[bytes, bytes]:
    images, lists = {}, {"trainval.txt": "", "test.txt": "", "list.txt": "#Image CLASS-ID\n"}
    for number, photo in enumerate(photos[:40]):
        breed, species = (("Abyssinian", 1), ("american_bulldog", 2))[number % 2]
        images[f"images/{breed}_{number}.jpg"] = photo
        line = f"{breed}_{number} {number % 2 + 1} {species} 1\n"
        lists["trainval.txt" if number < 30 else "test.txt"] += line
    images["images/Abyssinian_100.mat"] = b"MATLAB 5.0"
    entries = [(tar_entry(name), data) for name, data in images.items()]
    texts = [(tar_entry(f"annotations/{n}"), text.encode()) for n, text in lists.items()]
    return gzip.compress(tar_of(*entries)), gzip.compress(tar_of(*texts))


def test_oxford_pets_get_a_table_of_breed_species_and_split(
    image_folder, publish, tmp_path, command
):
    photos = [path.read_bytes() for path in sorted(image_folder.rglob("*.jpg"))]
    publish("oxford-pets", *pets_archives(photos))
    result = command("fetch", "oxford-pets", tmp_path / "pets")
    table = tmp_path / "pets" / "labels.csv"
    assert result["data"] == str(table)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40 and rows == sorted(rows, key=lambda row: row["path"])
    assert rows[0] == {
        "path": "images/Abyssinian_0.jpg",
        "label": "Abyssinian",
        "species": "cat",
        "split": "train",
    }
    catalog = sources.labelled_catalog(str(table), SourceConfig())
    assert catalog.classes == ["Abyssinian", "american_bulldog"] and len(catalog) == 40
    by_species = sources.labelled_catalog(str(table), SourceConfig(label_column="species"))
    assert by_species.classes == ["cat", "dog"]
    command("fetch", "oxford-pets", tmp_path / "pets", "--check")


def test_oxford_pets_with_other_lists_are_refused(image_folder, publish, tmp_path, capsys):
    images, _ = pets_archives([b"x"] * 40)
    lists = gzip.compress(tar_of((tar_entry("annotations/trainval.txt"), b"Abyssinian_1 1\n")))
    publish("oxford-pets", images, lists)
    with pytest.raises(SystemExit) as exit_info:
        main("fetch", "oxford-pets", tmp_path / "pets")
    assert exit_info.value.code == 4 and "trainval.txt" in capsys.readouterr().err
    assert not (tmp_path / "pets").exists()


def test_a_data_set_with_another_hash_is_refused(publish, server, tmp_path, capsys):
    publish("flowers", zip_of(("flower_photos/daisy/1.jpg", b"x")))
    server.pages["/flower_photos.tgz"].data = zip_of(("evil.jpg", b"x"))
    with pytest.raises(SystemExit) as exit_info:
        main("fetch", "flowers", tmp_path / "flowers")
    assert (
        exit_info.value.code == 4 and "does not have the expected hash" in capsys.readouterr().err
    )
    assert not (tmp_path / "flowers").exists()
