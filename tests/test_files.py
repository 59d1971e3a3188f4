"""Listing and reading: names survive, no file is lost or counted twice, changes are detected."""

from __future__ import annotations

import os
import random
import socket
import stat
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arrowhead import ConfigError
from arrowhead.data import exclusions, listing, path_text, reading, walk
from arrowhead.data.walk import Listing

NAMES = st.binary(min_size=1, max_size=40).filter(lambda name: not set(name) & {0, ord("/")})
NOT_A_FILE_FAULT = "not a file: a folder, pipe, socket or device"


@pytest.fixture(params=("one thread", "parts", "many threads"))
def listing_mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """List in each of the ways that a large folder is divided among threads."""
    if request.param != "one thread":
        monkeypatch.setattr(walk, "NAMES_PER_TASK", 7)
    if request.param == "many threads":  # as if the process had waited for every file
        ticks = iter(range(0, 10**9, 10**6))
        monkeypatch.setattr(walk, "getrusage", lambda who: SimpleNamespace(ru_nvcsw=next(ticks)))
    return str(request.param)


@pytest.fixture
def open_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder for tests of permissions, which run without root's privileges."""
    for folder in (tmp_path, *tmp_path.parents[:3]):  # parallel test processes have one more level
        folder.chmod(folder.stat().st_mode | 0o055)
    user = os.geteuid()
    if user == 0:
        os.chown(tmp_path, 65534, 65534)
        os.seteuid(65534)
    try:
        yield tmp_path
    finally:
        os.seteuid(user)


def _write_files(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def _list(root: Path) -> Listing:
    return listing.list_files(path_text.resolve(root))


def _random_tree(root: Path, seed: int) -> Path:
    """Create a random tree with hidden files, system files, links, cycles, odd names and pipes."""
    rng = random.Random(seed)
    folders = [root]
    names = (
        "a",
        "B",
        "caf\u00e9",
        "x y",
        "back\\slash",
        "new\nline",
        "\udcff\udcfe",
        "0",
        "-",
        ".h",
    )
    system_files = ("Thumbs.db", "desktop.ini", "__MACOSX", "._a", ".DS_Store", "...")
    for number in range(60):
        folder = rng.choice(folders)
        name = f"{rng.choice(names)}{number}"
        target = folder / (rng.choice(system_files) if rng.random() < 0.2 else name)
        if target.is_symlink() or target.exists():
            continue
        kind = rng.random()
        if kind < 0.3:
            target.mkdir()
            folders.append(target)
        elif kind < 0.4:
            target.symlink_to(rng.choice([root, folder, *folders, root / "nowhere", target]))
        elif kind < 0.45:
            os.mkfifo(target)
        else:
            target.write_bytes(bytes(rng.randrange(50)))
            os.utime(target, ns=(1, rng.randrange(10**18)))
    for number in range(40):  # one folder large enough to be divided
        (folders[-1] / f"many{number}").touch()
    return root


def _plain_walk(folder: bytes, ancestors: tuple[tuple[int, int], ...] = ()) -> Iterator[bytes]:
    """Yield every file path by a simple walk that follows links and stops at cycles."""
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity not in ancestors:
        for name in os.listdir(folder):
            path = folder + b"/" + name
            if Path(os.fsdecode(path)).is_dir():
                yield from _plain_walk(path, (*ancestors, identity))
            else:
                yield path


# ------------------------------------------------------------------------------- names


@given(NAMES)
@settings(max_examples=500, deadline=None)
def test_a_file_name_survives_escaping_and_unescaping(name: bytes) -> None:
    text = path_text.escape_path(name)
    assert path_text.unescape_path(text) == name
    assert text.isprintable()
    text.encode("utf-8")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (b"caf\xc3\xa9.jpg", "café.jpg"),
        (b"caf\xe9.jpg", r"caf\xe9.jpg"),
        (rb"a\x41.jpg", r"a\\x41.jpg"),
        ("ab\u202egpj.exe".encode(), r"ab\xe2\x80\xaegpj.exe"),
        (b"one\ntwo\t.jpg", r"one\x0atwo\x09.jpg"),
    ],
)
def test_only_unprintable_parts_of_names_are_escaped(name: bytes, text: str) -> None:
    assert path_text.escape_path(name) == text


@given(names=st.lists(NAMES, min_size=1, max_size=8, unique=True))
@settings(max_examples=50, deadline=None)
def test_files_with_any_name_are_listed_and_read(names: list[bytes]) -> None:
    ignored_names = exclusions.SYSTEM_FILES | exclusions.OWN_NAMES
    listed_names = [name for name in names if name[:1] != b"." and name not in ignored_names]
    listed_names = [name for name in listed_names if not exclusions.sidecar_kind(name)]
    with tempfile.TemporaryDirectory() as root:
        for name in listed_names:
            handle = os.open(os.fsencode(root) + b"/" + name, os.O_WRONLY | os.O_CREAT)
            os.write(handle, name)
            os.close(handle)
        result = _list(Path(root))
        assert [path_text.unescape_path(path) for path in result.paths] == sorted(
            listed_names, key=path_text.escape_path
        )
        for path, size, mtime_ns in zip(result.paths, result.sizes, result.stamps, strict=True):
            name = path_text.unescape_path(path)
            assert reading.read_file(path_text.resolve(root), path, 99, size, mtime_ns) == (
                name,
                None,
            )


# ----------------------------------------------------------------------------- listing


@pytest.mark.parametrize("seed", range(12))
def test_a_listing_has_every_file_exactly_once_in_every_mode(
    tmp_path: Path, listing_mode: str, seed: int
) -> None:
    result = _list(_random_tree(tmp_path, seed))
    top = os.fsencode(tmp_path.resolve())
    all_paths = sorted(path[len(top) + 1 :] for path in _plain_walk(top))
    visible = [
        path
        for path in all_paths
        if not any(p[:1] == b"." or p in exclusions.SYSTEM_FILES for p in path.split(b"/"))
    ]
    assert result.paths == sorted(map(path_text.escape_path, visible))
    assert len(result.paths) + result.ignored == len(all_paths)
    for path, size, mtime_ns in zip(result.paths, result.sizes, result.stamps, strict=True):
        try:
            status = os.stat(top + b"/" + path_text.unescape_path(path))
        except OSError:
            assert (size, mtime_ns) == (-1, 0)
        else:
            is_regular = stat.S_ISREG(status.st_mode)
            assert (size, mtime_ns) == (status.st_size if is_regular else -1, status.st_mtime_ns)


def test_files_and_folders_are_listed_in_the_order_of_their_paths(
    tmp_path: Path, listing_mode: str
) -> None:
    _write_files(tmp_path, "m/1", "a", "z", "m-", "m0", "n/1", "m/o/1", "m/a", "m/z")
    paths = _list(tmp_path).paths
    assert paths == ["a", "m-", "m/1", "m/a", "m/o/1", "m/z", "m0", "n/1", "z"]


def test_a_folder_named_like_an_image_is_listed_as_a_folder(tmp_path: Path) -> None:
    assert _list(_write_files(tmp_path, "dog.jpg/1.jpg")).paths == ["dog.jpg/1.jpg"]


def test_symlink_cycles_end_and_dangling_links_are_rows(tmp_path: Path) -> None:
    _write_files(tmp_path, "cat/1.jpg")
    (tmp_path / "cat" / "up").symlink_to(tmp_path)
    (tmp_path / "cat" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "cat" / "ring").symlink_to(tmp_path / "cat" / "ring")
    result = _list(tmp_path)
    assert dict(zip(result.paths, result.sizes.tolist(), strict=True)) == {
        "cat/1.jpg": 9,
        "cat/gone.jpg": -1,
        "cat/ring": -1,
    }
    root = path_text.resolve(tmp_path)
    assert reading.read_file(root, "cat/gone.jpg", 9) == (
        b"",
        "unreadable: No such file or directory",
    )
    assert (
        reading.read_file(root, "cat/ring", 9)[1] == "unreadable: Too many levels of symbolic links"
    )


def test_a_folder_without_read_permission_is_a_row_with_a_fault(
    open_folder: Path, listing_mode: str
) -> None:
    root = _write_files(
        open_folder / "tree", "cat/1.jpg", "shut/2.jpg", "shut/deep/3.jpg", ".shut/4.jpg"
    )
    (root / "shut").chmod(0)
    (root / ".shut").chmod(0)
    try:
        result = _list(root)
        assert result.paths == ["cat/1.jpg", "shut"]
        assert result.sizes.tolist() == [9, -1]
        assert result.ignored == 1
        assert reading.read_file(str(root), "shut", 9) == (b"", "unreadable: Permission denied")
        with pytest.raises(ConfigError, match="Permission denied"):
            _list(root / "shut")
    finally:
        (root / "shut").chmod(0o755)
        (root / ".shut").chmod(0o755)


def test_folders_without_files_are_reported(tmp_path: Path, listing_mode: str) -> None:
    _write_files(
        tmp_path, "train/cat/1.jpg", "train/dog/.hidden", "train/emu/deep/1.jpg", ".git/a/b"
    )
    _write_files(tmp_path, *(f"train/cat/{name}/1.jpg" for name in "abcdefghijk"))
    (tmp_path / "train/fox/deep").mkdir(parents=True)
    result = set(_list(tmp_path).folders)
    assert {"train/dog", "train/emu", "train/fox", "train/fox/deep"} <= result
    assert "train/cat" not in result


def test_a_missing_folder_or_a_file_is_refused(tmp_path: Path) -> None:
    _write_files(tmp_path, "file.jpg")
    for name, message in (("nowhere", "not there"), ("file.jpg", "is a file")):
        with pytest.raises(ConfigError, match=message):
            _list(tmp_path / name)


def test_a_file_uri_is_resolved_to_its_folder(tmp_path: Path) -> None:
    root = tmp_path / "a b%c\u00e9"
    _write_files(root, "1.jpg")
    assert path_text.resolve(root.as_uri()) == path_text.resolve(root)
    assert listing.list_files(path_text.resolve(root.as_uri())).paths == ["1.jpg"]


def test_stat_files_gives_the_same_sizes_and_times_as_a_listing(
    tmp_path: Path, listing_mode: str
) -> None:
    result, root = _list(_random_tree(tmp_path, 3)), path_text.resolve(tmp_path)
    sizes, stamps = listing.stat_files(root, result.paths)
    np.testing.assert_array_equal(sizes, result.sizes)
    np.testing.assert_array_equal(stamps, result.stamps)
    _write_files(tmp_path, "file")
    missing = ["no", "no/such/file", path_text.escape_path(b"file\0b")]
    paths = sorted([*missing, *result.paths[:3]])
    sizes, _ = listing.stat_files(root, paths)
    assert [sizes[paths.index(path)] for path in missing] == [-1, -1, -1]


def test_stat_files_works_in_a_folder_without_read_permission(open_folder: Path) -> None:
    root = _write_files(open_folder / "tree", "blind/1.jpg")
    (root / "blind").chmod(0o100)
    try:
        assert listing.stat_files(path_text.resolve(root), ["blind/1.jpg"])[0].tolist() == [11]
    finally:
        (root / "blind").chmod(0o755)


# ------------------------------------------------------------------------------ reading


def test_a_file_is_read_completely_or_not_at_all(tmp_path: Path) -> None:
    root = path_text.resolve(_write_files(tmp_path, "four"))
    assert reading.read_file(root, "four", 4) == (b"four", None)
    assert reading.read_file(root, "four", 3) == (b"", "too large: 4 bytes, more than 3")
    assert reading.read_file(root, "gone", 3) == (b"", "unreadable: No such file or directory")
    assert (
        reading.read_file(root, path_text.escape_path(b"a\0b"), 3)[1]
        == "unreadable: no file can have this name"
    )


def test_pipes_sockets_devices_and_folders_are_faults_and_never_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "device").symlink_to("/dev/zero")
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for name in ("pipe", "folder", "device", "socket"):
            assert reading.read_file(path_text.resolve(tmp_path), name, 99) == (
                b"",
                NOT_A_FILE_FAULT,
            ), name


def test_a_file_that_changed_after_it_was_listed_is_a_fault(tmp_path: Path) -> None:
    root, result = path_text.resolve(_write_files(tmp_path, "1.jpg")), _list(tmp_path)
    size, mtime_ns = int(result.sizes[0]), int(result.stamps[0])
    assert reading.read_file(root, "1.jpg", 99, size, mtime_ns) == (b"1.jpg", None)
    os.utime(tmp_path / "1.jpg", ns=(0, mtime_ns + 1))
    assert reading.read_file(root, "1.jpg", 99, size, mtime_ns)[1] == (
        "changed: it was written again after it was listed"
    )
    (tmp_path / "1.jpg").write_bytes(b"longer than it was")
    data, fault = reading.read_file(root, "1.jpg", 99, size, mtime_ns)
    assert (data, fault) == (b"", "changed: it had 5 bytes when it was listed, now it has 18")
    data, fault = reading.read_file(root, "1.jpg", 99, -1, 0)
    assert data == b""
    assert fault
    assert fault.startswith("changed: it could not be looked at")


@pytest.mark.parametrize("new_content", [b"longer than it was", b"1", b"2.jpg"])
def test_a_file_that_changes_while_it_is_read_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_content: bytes
) -> None:
    file = _write_files(tmp_path, "1.jpg") / "1.jpg"
    mtime_ns, fdopen = file.stat().st_mtime_ns, os.fdopen

    def change_then_open(*args: Any, **kwargs: Any) -> Any:
        file.write_bytes(new_content)
        if len(new_content) != 5:  # same time: only the size differs
            os.utime(file, ns=(mtime_ns, mtime_ns))
        else:
            os.utime(file, ns=(mtime_ns, mtime_ns + 1))
        return fdopen(*args, **kwargs)

    monkeypatch.setattr(os, "fdopen", change_then_open)
    fault = "changed: it was written to while it was read"
    assert reading.read_file(path_text.resolve(tmp_path), "1.jpg", 99) == (b"", fault)


def test_reading_is_thread_safe(tmp_path: Path) -> None:
    root = path_text.resolve(_write_files(tmp_path, *(f"{n}.jpg" for n in range(100))))
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda n: reading.read_file(root, f"{n % 100}.jpg", 99), range(2000)))
    assert read == [(f"{n % 100}.jpg".encode(), None) for n in range(2000)]


def test_an_empty_folder_named_like_an_image_is_a_row_with_a_fault(tmp_path: Path) -> None:
    (tmp_path / "cat" / "dog.JPG").mkdir(parents=True)
    (tmp_path / "cat" / "full.png").mkdir()
    (tmp_path / "cat" / "full.png" / "1.jpg").write_bytes(b"1")
    result = listing.list_files(path_text.resolve(str(tmp_path)))
    assert result.paths == ["cat/dog.JPG", "cat/full.png/1.jpg"]
    assert result.sizes.tolist() == [-1, 1]
    data, fault = reading.read_file(path_text.resolve(str(tmp_path)), result.paths[0], 100, -1, 0)
    assert (data, fault) == (b"", "not a file: a folder, pipe, socket or device")


# --------------------------------------------------------------------------- exclusions

JPEG = b"\xff\xd8\xff\xe0\0\x10JFIF"


def test_files_that_are_not_images_by_name_and_content_are_counted_by_extension(
    tmp_path: Path, listing_mode: str
) -> None:
    for number in range(12):
        _write_files(tmp_path, f"cat/{number}.jpg", f"cat/{number}.txt", f"dog/{number}.JSON")
    _write_files(tmp_path, "dog/notes.md", "only/labels.csv", "BMW.txt")
    (tmp_path / "cat" / "empty.xml").touch()
    result = _list(tmp_path)
    assert result.paths == sorted(f"cat/{number}.jpg" for number in range(12))
    counts = {".txt": 13, ".json": 12, ".md": 1, ".csv": 1, ".xml": 1}
    assert (result.sidecars, result.ignored) == (counts, 28)
    assert "only" in result.folders


@pytest.mark.parametrize(
    "head",
    [
        JPEG,
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"RIFF\x10\0\0\0WEBPVP8 ",
        b"BM\x10\0\0\0\0\0\0\0\x36\0",
        b"II*\0\x08\0",
        b"\0\0\0\x1cftypheic",
    ],
)
def test_a_file_is_a_row_if_its_name_or_its_content_is_that_of_an_image(
    tmp_path: Path, head: bytes
) -> None:
    (tmp_path / "photo.txt").write_bytes(head)
    (tmp_path / "page.jpg").write_bytes(b"<html>")
    (tmp_path / "IMG_0001").write_bytes(b"no ending says nothing")
    (tmp_path / "csv").write_bytes(b"nor does a word that is an ending elsewhere")
    result = _list(tmp_path)
    assert (result.paths, result.ignored) == (["IMG_0001", "csv", "page.jpg", "photo.txt"], 0)


def test_a_readme_without_an_extension_is_ignored_and_counted_by_its_name(
    tmp_path: Path, listing_mode: str
) -> None:
    _write_files(tmp_path, "cat/1.jpg", "README", "cat/LICENSE", "cat/readme", "notes.md")
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "README").write_bytes(JPEG)
    result = _list(tmp_path)
    assert result.paths == ["cat/1.jpg", "dog/README"]
    assert result.sidecars == {"README": 1, "LICENSE": 1, "readme": 1, ".md": 1}


def test_a_sidecar_that_cannot_be_read_is_a_row(open_folder: Path) -> None:
    _write_files(open_folder / "tree", "1.jpg", "shut.txt")
    (open_folder / "tree" / "shut.txt").chmod(0)
    assert _list(open_folder / "tree").paths == ["1.jpg", "shut.txt"]


def test_output_of_arrowhead_and_mlflow_is_excluded_and_reported(
    tmp_path: Path, listing_mode: str
) -> None:
    _write_files(
        tmp_path, "cat/1.jpg", "dog/2.jpg", "mlruns/1/a/artifacts/x.png", "mlflow.db", "thumbs.db"
    )
    _write_files(
        tmp_path, "out/lr_finder.png", "out/.bundle.training/run.json", ".arrowhead/unsent/1"
    )
    _write_files(
        tmp_path, "out/bundle-confusion.png", "out/bundle/golden/0.img", "deep/s/golden/1.jpg"
    )
    for name, content in {
        "out/store/store.json": '{"seal": "0"}',
        "out/bundle/bundle.json": '{"seal": "0"}',
        "cat/scores/score.json": '{"bundle_fingerprint": "0"}',
        "begun/request.json": '{"runs": []}',
        "cat/theirs/score.json": '{"goals": 3}',
    }.items():
        _write_files(tmp_path, name)
        (tmp_path / name).write_text(content)
    _write_files(tmp_path, "cat/theirs/3.jpg", "cat/scores/4.jpg")
    result = _list(tmp_path)
    assert result.paths == ["cat/1.jpg", "cat/theirs/3.jpg", "deep/s/golden/1.jpg", "dog/2.jpg"]
    assert (result.ignored, result.sidecars) == (2, {".json": 1})
    assert set(result.own) == {
        ".arrowhead",
        "begun",
        "cat/scores",
        "mlflow.db",
        "mlruns",
        "out/.bundle.training",
        "out/bundle",
        "out/bundle-confusion.png",
        "out/lr_finder.png",
        "out/store",
    }
    assert "out" not in result.folders
    assert _list(tmp_path / "cat" / "scores").paths == ["4.jpg"]  # listed if it is the root itself
