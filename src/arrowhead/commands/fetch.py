"""The command fetch: download a data set and unpack it safely.

DIR.download/     archives that are being downloaded; removed at the end
DIR/              what was in them, complete or not there
DIR/fetched.json  where it came from, and the hashes of the archives
DIR/fetched.sha256  the hash of every file
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from arrowhead import fileio
from arrowhead.data import download
from arrowhead.data.archives import (
    LISTING,
    RECORD,
    ArchiveLimits,
    NotAnArchive,
    Unpacked,
    Unpacker,
)
from arrowhead.data.download import DownloadConfig, Downloaded, RemoteFile
from arrowhead.data.known_datasets import DATASETS, KnownDataset
from arrowhead.errors import ConfigError, DataError
from arrowhead.output_paths import expand_user
from arrowhead.tracking.address import register_secrets, without_secrets
from arrowhead.wording import pluralize

FORMAT = 1
MAX_NESTED_FOLDERS = 5  # folders that hold nothing but one folder
RECORD_SCHEMA = {"format": int, "source": str, "key": str, "listing": str, "files": int}


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchConfig:
    """What is accepted, and what is kept."""

    sha256: str | None = None
    """The sha256 that the archive must have, in hex; instead of a known one."""
    max_bytes: int = 50 * 10**9
    """Bytes that an archive may have, and that may come out of all archives."""
    max_files: int = 1_000_000
    """Files and folders that may come out of the archives."""
    keep_archive: bool = False
    """Keep the downloaded archives, in DIR.download."""
    check: bool = False
    """If the data set is there already, compare every file with its hash."""

    def __post_init__(self) -> None:
        if self.sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", self.sha256):
            raise ConfigError(
                f"--sha256 is {self.sha256!r}.",
                "64 hexadecimal digits.",
                "copy the sha256 from the page of the publisher.",
            )
        for flag, value in (("max-bytes", self.max_bytes), ("max-files", self.max_files)):
            if value < 1:
                raise ConfigError(f"--{flag} is {value}.", "1 or more.", "give a larger number.")


class FetchScreen(Protocol):
    """Where messages and progress are shown."""

    def print(self, line: str) -> None:
        """Show a line."""

    def byte_bar(self, title: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """Show a progress bar; see `cli.screen.Screen.byte_bar`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What is to be fetched.

    Attributes:
        shown: How messages call it, without secrets.
        key: A hash that tells it from other sources.
        remotes: Files to download, by the name that they get.
        local: An archive on this machine, instead.
        digests: What the local archive must have; see `RemoteFile.digests`.
        dataset: The data set, if it is a known one.
    """

    shown: str
    key: str
    remotes: dict[str, RemoteFile]
    local: Path | None = None
    digests: tuple[str, ...] = ()
    dataset: KnownDataset | None = None


def fetch(source: str, path: Path, config: FetchConfig, screen: FetchScreen) -> dict[str, Any]:
    """Download a data set, check its hash, and unpack it into a folder.

    Args:
        source: A name of DATASETS, an address (http, https, file), or the path of an archive.
        path: The folder, new or empty, or one that this function wrote.
        config: What is accepted, and what is kept.
        screen: Where to show progress.

    Returns:
        source, directory, data (what `fit` reads), already_there, files, images, bytes,
        links_left_out, and archives with name, bytes, sha256, checked and resumed_at.

    Raises:
        ConfigError: The source cannot be fetched, or exceeds the limits.
        DataError: An archive is damaged or hostile, or has another hash.
    """
    what = _source(source, config)
    folder = path.with_name(f"{path.name}.download")
    with fileio.locked_output_folder(folder, screen.print, display_path=path):
        if (path / RECORD).is_file():
            return _already_there(what, path, config, screen)
        if what.dataset:
            screen.print(f"{what.shown}: {what.dataset.description}")
            screen.print(f"terms: {what.dataset.terms} ({what.dataset.page})")
        found = _obtain(what, folder, config, screen)
        try:
            result = _unpack(what, found, path, config, screen)
        except (DataError, NotAnArchive):
            # The next call should not find a file that cannot be used. One with the expected hash
            # would come again as it is.
            for one in found if what.local is None else []:
                if not one.checked:
                    one.path.unlink()
            raise
        if what.local is None and not config.keep_archive:
            for one in found:
                one.path.unlink()
        elif what.local is None:
            screen.print(f"kept: {', '.join(str(one.path) for one in found)}")
    return result


def _source(source: str, config: FetchConfig) -> Source:
    """What the user named."""
    digests = (f"sha256:{config.sha256.lower()}",) if config.sha256 else ()
    if (dataset := DATASETS.get(source)) is not None:
        if digests and len(dataset.archives) > 1:
            raise ConfigError(
                f"{source} consists of {len(dataset.archives)} archives.",
                "--sha256 with one archive only.",
                "leave out --sha256: the hashes of these archives are known.",
            )
        remotes = {
            _file_name(one.url): RemoteFile(
                url=one.url, shown=one.url, digests=digests or one.digests
            )
            for one in dataset.archives
        }
        return Source(shown=source, key=_key(source), remotes=remotes, dataset=dataset)
    scheme = source.partition("://")[0].lower() if "://" in source else ""
    if scheme in ("http", "https"):
        register_secrets(source.partition("?")[0])
        shown = without_secrets(source)
        try:
            urlsplit(source)
        except ValueError as error:
            raise ConfigError(
                f"{shown} is not a valid address: {error}.",
                "http:// or https://, a host, and a path.",
                "check the spelling.",
            ) from error
        remote = RemoteFile(url=source, shown=shown, digests=digests)
        return Source(shown=shown, key=_key(source), remotes={_file_name(source): remote})
    if scheme not in ("", "file"):
        raise ConfigError(
            f"{without_secrets(source)} is an address that `fetch` cannot read.",
            "http://…, https://…, file://…, the path of an archive, or the name of a data set.",
            "download it with the tool for that address, and give the path of the archive; images"
            " in s3:// and gs:// need no download, `fit` reads them there.",
        )
    local = expand_user(Path(url2pathname(urlsplit(source).path) if scheme else source))
    _check_local(source, local)
    key = _key(str(local.resolve()))
    return Source(shown=str(local), key=key, remotes={}, local=local, digests=digests)


def _check_local(source: str, path: Path) -> None:
    """Raise ConfigError unless there is a file."""
    if path.is_file():
        return
    if path.is_dir():
        raise ConfigError(
            f"{source} is a folder.",
            "an archive, an address, or the name of a data set.",
            f"give the folder to `fit`: arrowhead fit {source} out",
        )
    near = difflib.get_close_matches(source, DATASETS, n=1)
    raise ConfigError(
        f"{source} is neither a known data set nor a file.",
        f"one of {', '.join(DATASETS)}; or an address or the path of an archive.",
        f"did you mean {near[0]}?" if near else "run `arrowhead fetch` for a list.",
    )


def _key(text: str) -> str:
    """A hash of a source, without a user and password in its address."""
    return hashlib.sha256(re.sub(r"//[^/?#]*@", "//", text).encode()).hexdigest()


def _file_name(url: str) -> str:
    """The name under which a download is kept."""
    name = unquote(urlsplit(url).path).rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip("._")[-100:] or "archive"


def _obtain(
    what: Source, folder: Path, config: FetchConfig, screen: FetchScreen
) -> list[Downloaded]:
    """The archives on disk, with their hashes checked."""
    if what.local is not None:
        found = [download.check_file(what.local, what.digests, what.shown)]
        names = [what.shown]
    else:
        found, names = [], list(what.remotes)
        limits = DownloadConfig(max_bytes=config.max_bytes)
        for name, remote in what.remotes.items():
            try:
                with screen.byte_bar(f"download {name}") as show:
                    found.append(
                        download.download(remote, folder / name, limits, show, screen.print)
                    )
            except KeyboardInterrupt:
                partial = download.partial_path(folder / name)
                if partial.is_file():
                    screen.print(f"kept: {partial} ({partial.stat().st_size:,} bytes)")
                raise
    for name, one in zip(names, found, strict=True):
        if one.checked:
            kind, _, value = one.checked.partition(":")
            screen.print(f"{name}: {one.size:,} bytes, {kind} {value} is the expected one")
        else:
            why = "no hash is published" if what.dataset else "--sha256 is not given"
            screen.print(f"{name}: {one.size:,} bytes, not checked: {why}; sha256 {one.sha256}")
    return found


def _unpack(
    what: Source,
    found: list[Downloaded],
    path: Path,
    config: FetchConfig,
    screen: FetchScreen,
) -> dict[str, Any]:
    """Unpack the archives into the folder and write the record; the result of the command."""
    limits = ArchiveLimits(max_bytes=config.max_bytes, max_files=config.max_files)
    archives = [
        {
            "name": one.path.name,
            "bytes": one.size,
            "sha256": one.sha256,
            "checked": one.checked or None,
        }
        for one in found
    ]
    with fileio.atomic_folder(path) as folder:
        unpacker = Unpacker(folder, limits)
        for one in found:
            with screen.byte_bar(f"unpack {one.path.name}") as show:
                unpacker.unpack(one.path, show)
        unpacked = unpacker.finish()
        if not unpacked.files:
            raise ConfigError(
                f"{what.shown} holds no file.", "an archive with images.", "give another one."
            )
        if what.dataset and what.dataset.prepare:
            for name in what.dataset.prepare(folder):
                unpacker.add(name)
        unpacker.write_listing()
        record = {
            "format": FORMAT,
            "source": what.shown,
            "key": what.key,
            "archives": archives,
            "files": unpacked.files,
            "images": unpacked.images,
            "bytes": unpacked.size,
            "listing": fileio.sha256(folder / LISTING),
        }
        fileio.write_json(folder / RECORD, record)
    _show_unpacked(unpacked, path, screen)
    resumed = {one.path.name: one.resumed_at for one in found}
    shown = [one | {"resumed_at": resumed[str(one["name"])]} for one in archives]
    result = _result(what, path, record) | {"archives": shown}
    return result | {"already_there": False, "links_left_out": unpacked.links_left_out}


def _show_unpacked(unpacked: Unpacked, path: Path, screen: FetchScreen) -> None:
    files = pluralize(unpacked.files, "file")
    images = pluralize(unpacked.images, "image")
    screen.print(f"{path}: {files}, {images}, {unpacked.size / 1e6:,.1f} MB")
    if unpacked.links_left_out:
        links = pluralize(unpacked.links_left_out, "link")
        screen.print(f"left out: {links} to folders or to nothing in the archive")
    if not unpacked.images:
        screen.print("no file has the name of an image, such as cat.jpg")


def _result(what: Source, path: Path, record: dict[str, Any]) -> dict[str, Any]:
    names = "files", "images", "bytes", "archives"
    counts = {name: record.get(name) for name in names}
    data = str(_data_path(what, path))
    return {"source": what.shown, "directory": str(path), "data": data} | counts


def _data_path(what: Source, path: Path) -> Path:
    """What `fit` should read: the folder that holds more than one folder, or a table."""
    if what.dataset and (path / what.dataset.data).exists():
        return path / what.dataset.data
    for _ in range(MAX_NESTED_FOLDERS):
        entries = [one for one in path.iterdir() if one.name not in (LISTING, RECORD)]
        if len(entries) != 1 or not entries[0].is_dir():
            break
        path = entries[0]
    return path


def _already_there(
    what: Source, path: Path, config: FetchConfig, screen: FetchScreen
) -> dict[str, Any]:
    """The result for a folder that an earlier call wrote."""
    record = fileio.read_json(path / RECORD)
    repair = f"remove {path} and fetch it again."
    fileio.check_schema(record, RECORD_SCHEMA, str(path / RECORD), repair)
    if record["key"] != what.key:
        raise ConfigError(
            f"{path} holds {record['source']}, not {what.shown}.",
            "a new or empty folder.",
            "give another folder.",
        )
    if config.sha256 and not _has_archive(record, config.sha256.lower()):
        raise ConfigError(
            f"{path} was fetched from an archive with another sha256 than --sha256.",
            "the sha256 of the archive that it was fetched from.",
            repair,
        )
    if config.check:
        _check_files(path, record, repair)
        screen.print(f"{path}: all {pluralize(record['files'], 'file')} are as they were fetched")
    else:
        screen.print(f"{path} is already there: nothing is downloaded or checked (--check checks)")
    return _result(what, path, record) | {"already_there": True, "links_left_out": 0}


def _has_archive(record: dict[str, Any], sha256: str) -> bool:
    return any(one.get("sha256") == sha256 for one in record.get("archives", []))


def _check_files(path: Path, record: dict[str, Any], repair: str) -> None:
    """Raise DataError if a file has changed since it was fetched."""
    fileio.check_sha256(
        path / LISTING, record["listing"], recorded_in=str(path / RECORD), repair=repair
    )
    for line in (path / LISTING).read_text("utf-8").splitlines():
        digest, _, name = line.partition("  ")
        fileio.check_sha256(path / name, digest, recorded_in=str(path / LISTING), repair=repair)
