"""A folder in an object store and its mirror on this disk.

    folder = remote_folder.of(path)        path: of a mirror, or any other
    folder.refresh()                       the small files as they are in the store now
    folder.fetch(paths)                    files that are needed, if they are not here
    folder.atomic_write(path)              a draft; uploaded, then renamed
    folder.upload(path)                    a file that was written here
    folder.lock()                          one writer at a time, on any machine

For a path on a disk all of these exist too: they write there and carry nothing. The store is right
in every doubt. Which version of an object a file here is, is kept beside the mirrors (`.etags`).
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from arrowhead import fileio, output_paths
from arrowhead.data import mirror_space, mirrors, object_writes
from arrowhead.data.object_writes import ABSENT, ConditionFailedError
from arrowhead.errors import ConfigError

LOCK_NAME = ".lock"
NOTED_NAME = ".noted"
LAZY_NAMES = ("catalog",)  # of large files that are fetched when they are read
THREADS = 16
RENEW_SECONDS = 30.0
STALE_SECONDS = 120.0  # a lock that was not renewed for so long belongs to a killed command


class LocalFolder:
    """A folder on a disk: nothing is carried."""

    is_remote = False

    def __init__(self, path: Path) -> None:
        self.path = path

    def refresh(self, folder: str = "") -> None:
        """Fetch the files directly in a folder that are new or changed, but not LAZY_NAMES; remove
        those that the store does not have any more.
        """

    def fetch(self, paths: Iterable[Path]) -> None:
        """Download those of these files that are not here; those not in the store are left out."""

    def fetch_changed(self, path: Path) -> None:
        """Download a file if the store has another version of it than is here."""

    def check_sha256(self, path: Path, digest: str, *, recorded_in: str, repair: str) -> None:
        """As `fileio.check_sha256`. A file that is missing or damaged here is fetched first."""
        fileio.check_sha256(path, digest, recorded_in=recorded_in, repair=repair)

    def fetch_all(self, *, again: bool = False) -> None:
        """Fetch every file of the store, and remove all others here.

        again: also those that are here, which tells whether the objects are intact.
        """

    def names(self, folder: str) -> set[str]:
        """The names of the files in a folder below this one."""
        with suppress(FileNotFoundError):
            return set(os.listdir(self.path / folder))
        return set()

    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    @contextmanager
    def atomic_write(self, path: Path, *, guarded: bool = False) -> Iterator[Path]:
        """As `fileio.atomic_write`; the object is written before the file gets its name.

        guarded: only over the version that was here when the folder was locked.
        """
        with fileio.atomic_write(path) as draft:
            yield draft

    def upload(self, path: Path) -> None:
        """Write a file that is complete here as an object."""

    def lock_objects(self) -> AbstractContextManager[None]:
        """As `lock`, for a folder that is locked on this disk already."""
        return nullcontext()

    def publish(self, marker: str = "", hashes: Mapping[str, str] = {}) -> None:
        """Make the store equal to this folder, which is complete here.

        The marker, the file that says what the folder is, is written after the files that it needs,
        and only over the version that `note_version` saw. So readers find the folder as it was
        before or as it is now.

        Args:
            marker: The name of that file; "" if the folder is not complete yet.
            hashes: sha256 by name of the files that the marker names. Where there is a marker
                already, new versions of these are first written as `staged_key`, where readers look
                for a file that does not have the hash that they expect.
        """

    def note_version(self, marker: str) -> bool:
        """Note which version of the marker `publish` will replace. Returns whether there is one."""
        return (self.path / marker).is_file()

    def remove(self, path: Path) -> None:
        """Remove a file here and in the store."""
        path.unlink(missing_ok=True)

    @contextmanager
    def lock(self, warn: Callable[[str], None] = fileio.warn_no_locks) -> Iterator[None]:
        """Lock the folder for one writer; ConfigError if another command is writing there."""
        with fileio.folder_lock(self.path, warn):
            yield


class RemoteFolder(LocalFolder):
    """A folder in an object store, as its mirror."""

    is_remote = True

    def __init__(self, path: Path, uri: str) -> None:
        super().__init__(path)
        self.uri = uri
        self._lock: _Lock | None = None
        self._guarded = self._noted()
        mirror_space.hold(path)

    def refresh(self, folder: str = "") -> None:
        """As `LocalFolder.refresh`."""
        listed = object_writes.list_folder(f"{self.uri}/{folder}".rstrip("/"), first=True)
        here = self.path / folder
        here.mkdir(parents=True, exist_ok=True)
        changed = [
            here / name
            for name, (_, etag) in listed.items()
            if not name.startswith((".", *LAZY_NAMES)) and not name.endswith("/")
            if self._etag_of(here / name) != etag
        ]
        self._download(changed)
        for file in here.iterdir():
            if file.name not in listed and file.is_file() and _etag_path(file).is_file():
                file.unlink(missing_ok=True)
                _etag_path(file).unlink(missing_ok=True)

    def fetch(self, paths: Iterable[Path]) -> None:
        """As `LocalFolder.fetch`."""
        self._download([path for path in paths if not path.is_file()])

    def fetch_changed(self, path: Path) -> None:
        """As `LocalFolder.fetch_changed`."""
        etag = object_writes.etag(self.uri, self._key(path))
        if etag == ABSENT:
            path.unlink(missing_ok=True)
        elif etag != self._etag_of(path):
            self._download([path])

    def check_sha256(self, path: Path, digest: str, *, recorded_in: str, repair: str) -> None:
        """As `LocalFolder.check_sha256`."""
        if not path.is_file() or fileio.sha256(path) != digest:
            path.unlink(missing_ok=True)
            self._download([path])
        fileio.check_sha256(path, digest, recorded_in=recorded_in, repair=repair)

    def fetch_all(self, *, again: bool = False) -> None:
        """As `LocalFolder.fetch_all`."""
        listed = object_writes.list_folder(self.uri, recursive=True, first=True)
        keys = {key: etag for key, (_, etag) in listed.items() if not _is_hidden(key)}
        for file in self.path.rglob("*"):
            if file.is_dir():
                fileio.remove_stale_drafts(file)
            elif not _is_hidden(self._key(file)) and self._key(file) not in keys:
                file.unlink(missing_ok=True)
        paths = [self.path / key for key, etag in keys.items()]
        etags = [] if again else [self._etag_of(path) for path in paths]
        same = {p for p, e in zip(paths, etags, strict=False) if e == keys[self._key(p)]}
        self._download([path for path in paths if path not in same])

    def names(self, folder: str) -> set[str]:
        """As `LocalFolder.names`: those in the store."""
        found = object_writes.list_folder(f"{self.uri}/{folder}".rstrip("/"))
        return {name for name in found if not name.endswith("/")}

    def size(self) -> int:
        """As `LocalFolder.size`: of the objects."""
        return sum(size for size, _ in object_writes.list_folder(self.uri, recursive=True).values())

    @contextmanager
    def atomic_write(self, path: Path, *, guarded: bool = False) -> Iterator[Path]:
        """As `LocalFolder.atomic_write`.

        Raises:
            ConfigError: The object was written by another command meanwhile.
        """
        with fileio.atomic_write(path) as draft:
            yield draft
            key = self._key(path)
            if self._lock:
                self._lock.check()
            try:
                replaces = self._guarded.get(key, ABSENT) if guarded else None
                etag = object_writes.write(self.uri, key, draft, replaces)
            except ConditionFailedError as error:
                raise _changed_error(f"{self.uri}/{key}") from error
        self._record(path, etag)
        self._guarded[key] = etag

    def upload(self, path: Path) -> None:
        """As `LocalFolder.upload`. ConfigError if another command has taken the lock."""
        if self._lock:
            self._lock.check()
        self._record(path, object_writes.write(self.uri, self._key(path), path))

    def publish(self, marker: str = "", hashes: Mapping[str, str] = {}) -> None:
        """As `LocalFolder.publish`."""
        listed = object_writes.list_folder(self.uri, recursive=True)
        files = [file for file in self.path.rglob("*") if file.is_file()]
        files = [file for file in files if not _is_hidden(self._key(file))]
        changed = [
            file
            for file in files
            if listed.get(self._key(file)) != (file.stat().st_size, object_writes.md5_etag(file))
        ]
        changed = [file for file in changed if self._key(file) != marker]
        staged = [file for file in changed if self._key(file) in hashes and marker in listed]
        with ThreadPoolExecutor(THREADS, "upload") as pool:
            for file in staged:
                object_writes.write(self.uri, staged_key(hashes[self._key(file)]), file)
            list(pool.map(self.upload, [file for file in changed if file not in staged]))
            if marker:
                self._write_marker(marker)
            for file in staged:
                object_writes.copy(self.uri, staged_key(hashes[self._key(file)]), self._key(file))
                self._record(file, object_writes.etag(self.uri, self._key(file)))
            kept = {self._key(file) for file in files}
            unneeded = [key for key in listed if key not in kept and not key.startswith(".lock")]
            unneeded += [staged_key(hashes[self._key(file)]) for file in staged]
            list(pool.map(partial(object_writes.delete, self.uri), unneeded))

    def _write_marker(self, marker: str) -> None:
        try:
            etag = object_writes.write(
                self.uri, marker, self.path / marker, self._guarded.get(marker, ABSENT)
            )
        except ConditionFailedError as error:
            raise _changed_error(f"{self.uri}/{marker}") from error
        self._guarded[marker] = etag
        self._record(self.path / marker, etag)
        self._note(marker, etag)

    def note_version(self, marker: str) -> bool:
        """As `LocalFolder.note_version`."""
        etag = object_writes.etag(self.uri, marker)
        self._note(marker, etag)
        self._guarded[marker] = etag
        return etag != ABSENT

    def remove(self, path: Path) -> None:
        """As `LocalFolder.remove`."""
        object_writes.delete(self.uri, self._key(path))
        path.unlink(missing_ok=True)
        _etag_path(path).unlink(missing_ok=True)

    @contextmanager
    def lock(self, warn: Callable[[str], None] = fileio.warn_no_locks) -> Iterator[None]:
        """As `LocalFolder.lock`, also against commands on other machines."""
        self.path.mkdir(parents=True, exist_ok=True)
        with fileio.folder_lock(self.path, warn), self.lock_objects():
            yield

    @contextmanager
    def lock_objects(self) -> Iterator[None]:
        """As `LocalFolder.lock_objects`."""
        with _Lock(self.uri) as lock:
            self._lock = lock
            try:
                self.refresh()
                files = [file for file in self.path.iterdir() if file.is_file()]
                etags = {file.name: self._etag_of(file) for file in files}
                self._guarded = {name: etag for name, etag in etags.items() if etag}
                yield
            finally:
                self._lock = None

    # ----------------------------------------------------------------------------- inside

    def _key(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix()

    def _noted(self) -> dict[str, str]:
        """The versions that `note_version` saw, by name."""
        try:
            noted: dict[str, str] = json.loads(_etag_path(self.path / NOTED_NAME).read_text())
        except (OSError, ValueError):
            return {}
        return noted

    def _note(self, marker: str, etag: str) -> None:
        file = _etag_path(self.path / NOTED_NAME)
        file.parent.mkdir(parents=True, exist_ok=True)
        fileio.write_json(file, self._noted() | {marker: etag})

    def _download(self, paths: list[Path]) -> None:
        """Download files in parallel; those that the store does not have are left out."""
        if len(paths) < 2:
            for path in paths:
                self._download_one(path)
            return
        with ThreadPoolExecutor(THREADS, "download") as pool:
            list(pool.map(self._download_one, paths))

    def _download_one(self, path: Path) -> None:
        try:
            with fileio.atomic_write(path) as draft:
                etag = object_writes.read(self.uri, self._key(path), draft)
        except FileNotFoundError:
            return
        self._record(path, etag)

    def _record(self, path: Path, etag: str) -> None:
        """Keep which version of the object a file here is."""
        status = path.stat()
        file = _etag_path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = fileio.draft_path(file)
        draft.write_text(f"{status.st_size} {status.st_mtime_ns} {etag}")
        os.replace(draft, file)

    def _etag_of(self, path: Path) -> str | None:
        """The etag of the version that a file here is; None if it is missing or changed here."""
        try:
            status = path.stat()
            size, modified, etag = _etag_path(path).read_text().split(" ", 2)
        except (OSError, ValueError):
            return None
        is_same = (int(size), int(modified)) == (status.st_size, status.st_mtime_ns)
        return etag if is_same else None


def of(path: Path) -> LocalFolder:
    """The folder at a path: of a mirror, or on a disk."""
    uri = mirrors.uri_of(path)
    return LocalFolder(path) if uri is None else RemoteFolder(path, uri)


def staged_key(sha256: str) -> str:
    """Where `publish` writes a new version of a file until it has its own name."""
    return f".files/{sha256}"


def _is_hidden(key: str) -> bool:
    return any(part.startswith(".") for part in key.split("/"))


def _etag_path(path: Path) -> Path:
    """Where the etag of a file in a mirror is kept."""
    return mirrors.beside(path, ".etags")


def _changed_error(uri: str) -> ConfigError:
    return ConfigError(
        f"{uri} was written by another command while this one worked.",
        "one writer at a time; nothing of the other was replaced.",
        "run the same command again: it continues from what is there now.",
    )


class _Lock:
    """A lock as an object: made if there is none, renewed, deleted at the end."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._token, self._etag = secrets.token_hex(8), ABSENT
        self._stop, self._lost = threading.Event(), False

    def __enter__(self) -> _Lock:
        try:
            self._etag = self._write(ABSENT)
        except ConditionFailedError:
            self._take_over()
        self._thread = threading.Thread(target=self._renew, name="lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(ConfigError):  # it is stale soon
            # A command that stood still may have lost it since it was renewed last.
            if not self._lost and object_writes.etag(self._uri, LOCK_NAME) == self._etag:
                object_writes.delete(self._uri, LOCK_NAME)

    def check(self) -> None:
        """Raise ConfigError if another command has taken the lock."""
        if self._lost:
            raise _changed_error(self._uri)

    def _write(self, replaces: str) -> str:
        content = {
            "token": self._token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        with _scratch_file(json.dumps(content)) as file:
            return object_writes.write(self._uri, LOCK_NAME, file, replaces)

    def _take_over(self) -> None:
        """Take a lock that a killed command left; ConfigError if its command may be working."""
        try:
            with _scratch_file("") as file:
                etag = object_writes.read(self._uri, LOCK_NAME, file)
                content = json.loads(file.read_text() or "{}")
            age = object_writes.age_seconds(self._uri, LOCK_NAME)
        except (FileNotFoundError, ValueError):
            etag, content, age = object_writes.etag(self._uri, LOCK_NAME), {}, STALE_SECONDS
        host, pid = content.get("host"), content.get("pid")
        is_dead = host == socket.gethostname() and not _is_running(pid)
        if age < STALE_SECONDS and not is_dead:
            raise ConfigError(
                f"{self._uri} is being written by another Arrowhead command (process {pid} on"
                f" {host}, last sign of it {age:.0f} seconds ago).",
                "one writer at a time.",
                "wait for it to end, or stop it; then run this again. If it was killed, its lock"
                f" ends {STALE_SECONDS:.0f} seconds after the last sign.",
            )
        try:
            self._etag = self._write(etag)
        except ConditionFailedError as error:
            raise _changed_error(self._uri) from error

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_SECONDS):
            try:
                self._etag = self._write(self._etag)
            except ConditionFailedError:
                self._lost = True
                return
            except ConfigError:  # the store does not answer; the next attempt may
                continue


def _is_running(pid: object) -> bool:
    if not isinstance(pid, int):
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def _scratch_file(text: str) -> Iterator[Path]:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="arrowhead-") as folder:
        file = Path(folder, "object")
        file.write_text(text)
        yield file


# ------------------------------------------------------------------------------ for commands


def local(path: Path) -> Path:
    """The folder for a path or address that a user gave, to read from."""
    if not mirrors.is_address(path):
        return output_paths.expand_user(path)
    folder = mirrors.mirror_of(path)
    if mirrors.uri_of(folder) is not None:
        mirror_space.hold(folder)
        mirror_space.make_room()
    return folder


def check_output_file(path: Path) -> Path:
    """As `output_paths.check_output_file`, also for an address: then its place in the mirror.

    A file that is there already is fetched. `send_files` sends what was written there.

    Raises:
        ConfigError: Also if the address cannot be written.
    """
    file = mirrors.mirror_of(path)
    if mirrors.uri_of(file) is None:
        return output_paths.check_output_file(file)
    files = of(file.parent)
    file.parent.mkdir(parents=True, exist_ok=True)
    _try_to_write(f"{mirrors.uri_of(file.parent)}")
    mirror_space.make_room()
    files.fetch_changed(file)
    return file


def send_files(paths: Iterable[Path]) -> None:
    """Upload files that were written in a mirror; of others nothing."""
    for path in paths:
        if path.is_file():
            of(path.parent).upload(path)


def check_output(path: Path, kind: str) -> Path:
    """As `output_paths.check_output_folder`, also for an address: then of its mirror.

    Raises:
        ConfigError: Also if the address cannot be written, or holds something else.
    """
    folder = mirrors.mirror_of(path)
    if (uri := mirrors.uri_of(folder)) is None:
        return output_paths.check_output_folder(folder, kind)
    output_kind = output_paths.OUTPUT_KINDS[kind]
    entries = {name.rstrip("/") for name in object_writes.list_folder(uri, first=True)}
    foreign = sorted(name for name in entries if not output_paths.is_ignored_entry(name))
    if output_kind.markers and foreign and not entries.intersection(output_kind.markers):
        description = output_kind.description
        raise ConfigError(
            f"{uri} holds objects that are not of {description}, such as {foreign[0]}.",
            f"a prefix that holds nothing, or {description} that Arrowhead wrote.",
            "give another address.",
        )
    _try_to_write(uri)
    mirror_space.hold(folder)
    mirror_space.make_room()
    if output_kind.is_replaced:
        of(folder).note_version(output_kind.markers[0])
    else:
        of(folder).refresh()
    return folder


def _try_to_write(uri: str) -> None:
    """Write and delete an object below a URI; ConfigError if that cannot be done."""
    with _scratch_file("") as file:
        trial = f".{secrets.token_hex(4)}.draft"
        object_writes.write(uri, trial, file)
        object_writes.delete(uri, trial)
