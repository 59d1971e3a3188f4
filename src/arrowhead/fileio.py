"""Atomic writes of files and folders, integrity checks, and folder locks.

    atomic_write, atomic_folder    a file or folder is complete, or it is not there
    write_sealed, read_sealed      JSON that contains a hash of its content
    check_sha256                   a file's bytes against a hash that is recorded elsewhere
    folder_lock                    one writer of a folder at a time

No library exchanges two whole folders atomically, syncs them to disk and cleans up after killed
writers.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from arrowhead.errors import ConfigError, DataError

LOCK_NAME = ".lock"
DRAFT_PATTERN = re.compile(r"\..+\.[0-9a-f]{8}\.draft")
NO_LOCKS_ERRNOS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h

# --------------------------------------------------------------- atomic files and folders


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a draft to write to; it becomes `path` if the block succeeds, and is removed otherwise.

    The draft exists already, empty and locked, so that no other process removes it as stale.

    Raises:
        ConfigError: The disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with refuse_full_disk(path):
        draft, handle = _create_draft(path, folder=False)
        try:
            yield draft
            _fsync(draft)
            os.replace(draft, path)
            _fsync(path.parent)
        finally:
            os.close(handle)
            draft.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes `path` if the block succeeds.

    If there was a complete folder at `path`, there is one at every moment: the two are exchanged.
    Drafts that a killed writer of `path` left are removed.

    Args:
        path: The folder to create or replace.
        previous: Where to keep the replaced folder; None removes it.

    Raises:
        ConfigError: The disk is full, or `path` is a mount point.
    """
    path = Path(os.path.realpath(path))  # replace the target of a link, not the link
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(path)
    remove_stale_drafts(path.parent, path.name)
    with refuse_full_disk(path):
        folder, handle = _create_draft(path, folder=True)
        try:
            yield folder
            fsync_tree(folder)
            replace_folder(folder, path, previous)
        finally:
            os.close(handle)
            shutil.rmtree(folder, ignore_errors=True)


def replace_folder(folder: Path, path: Path, previous: Path | None = None) -> None:
    """Rename a finished folder to `path` and sync; a folder at `path` is removed, or renamed to
    `previous`.
    """
    if not path.exists():
        folder.rename(path)
        _fsync(path.parent)
        return
    if is_working_directory(path):
        _move_contents(folder, path)
        return
    with _flock(path):  # the lock also prevents its removal as a stale draft after the exchange
        try:
            _exchange_folders(folder, path)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.EXDEV):
                raise
            raise ConfigError(
                f"{path} cannot be replaced: {os.strerror(error.errno)}.",
                "a folder that can be renamed; a mount point cannot.",
                "give a folder inside it.",
            ) from error
        _fsync(path.parent)
        if previous is not None:
            replace_folder(folder, previous)
            return
        shutil.rmtree(folder, ignore_errors=True)


def is_working_directory(path: Path) -> bool:
    """Whether a folder is the working directory. It must not be replaced: the shell that started
    this process would be left in a deleted folder.
    """
    return path.is_dir() and path.samefile(os.curdir)


def _move_contents(folder: Path, path: Path) -> None:
    """Move the entries of a finished folder into an existing one.

    The newest JSON file, which marks the folder as complete, is moved last.

    Raises:
        FileExistsError: An entry of that name exists; nothing is moved.
    """

    def sort_key(entry: Path) -> tuple[bool, bool, int]:
        return entry.is_file(), entry.suffix == ".json", entry.stat().st_mtime_ns

    entries = sorted(folder.iterdir(), key=sort_key)
    for entry in entries:
        if os.path.lexists(path / entry.name):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path / entry.name))
    for entry in entries:
        entry.rename(path / entry.name)
    _fsync(path)


def recover_folder(path: Path) -> None:
    """Restore `path` after a process was killed in `_exchange_folders`, between the renames that
    replace an atomic exchange on file systems without one.
    """
    for aside in path.parent.glob(f".{glob.escape(path.name)}.*.aside"):
        # A lock that is taken means that another process is exchanging it right now.
        with suppress(OSError), _flock(aside, nonblocking=True):
            if path.exists():
                shutil.rmtree(aside)
            else:
                aside.rename(path)


def remove_stale_drafts(folder: Path, name: str | None = None) -> None:
    """Remove the drafts in a folder that killed writers left: those that no process has locked.

    Args:
        folder: The folder that holds the drafts.
        name: Remove only the drafts of this file or folder.
    """
    pattern = DRAFT_PATTERN
    if name is not None:
        pattern = re.compile(rf"\.{re.escape(name)}\.[0-9a-f]{{8}}\.draft")
    for entry in list(folder.iterdir()):
        if pattern.fullmatch(entry.name):
            # OSError: another process is writing it, or has just removed it.
            with suppress(OSError), _flock(entry, nonblocking=True):
                remove_path(entry)


def remove_path(path: Path) -> None:
    """Remove a file, a link, or a folder with its contents."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@contextmanager
def _flock(path: Path, *, nonblocking: bool = False) -> Iterator[None]:
    """Lock a file or folder if possible. nonblocking: OSError if it is or cannot be locked."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with nullcontext() if nonblocking else suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | (fcntl.LOCK_NB if nonblocking else 0))
        yield
    finally:
        os.close(handle)


@contextmanager
def refuse_full_disk(path: Path) -> Iterator[None]:
    """Turn the error of a full disk, while `path` is written, into a ConfigError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise ConfigError(
            f"{path} cannot be written: {os.strerror(error.errno)}.",
            "free space on the disk; what was written before is complete and stays.",
            "free some space and run the same command again: it continues where it stopped.",
        ) from error


def draft_path(path: Path) -> Path:
    """A name for a draft of `path`, beside it. It is random, since machines that share a disk may
    reuse each other's process ids.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.draft")


def _create_draft(path: Path, *, folder: bool) -> tuple[Path, int]:
    """Create a draft; also return a handle that keeps it locked until it is closed."""
    while True:
        draft = draft_path(path)
        if folder:
            draft.mkdir()
            try:
                handle = os.open(draft, os.O_RDONLY)
            except FileNotFoundError:  # removed as stale before it was locked
                continue
        else:
            handle = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with suppress(OSError):  # without file locks no draft is removed as stale, either
            fcntl.flock(handle, fcntl.LOCK_EX)
        if _is_same_file(draft, handle):  # not removed as stale before it was locked
            return draft, handle
        os.close(handle)


def _exchange_folders(one: Path, other: Path) -> None:
    """Swap the names of two folders atomically; by renames where the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        names = os.fsencode(one), os.fsencode(other)
        if libc.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
            raise OSError(number, os.strerror(number), str(other))
    aside = draft_path(other).with_suffix(".aside")
    other.rename(aside)
    one.rename(other)
    aside.rename(one)


def fsync_tree(folder: Path) -> None:
    """Flush a folder and everything below it to the disk."""
    for directory, _, names in os.walk(folder, topdown=False):
        for name in names:
            _fsync(Path(directory, name))
        _fsync(Path(directory))


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -------------------------------------------------------------------------------- JSON


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    with atomic_write(path) as draft_file:
        draft_file.write_text(_json_text(content))


def _json_text(content: Any) -> str:
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def jsonable(value: Any) -> Any:
    """A value as JSON can hold it: Python's own types, and None for numbers that are not finite."""
    if isinstance(value, dict):
        return {str(name): jsonable(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(one) for one in value]
    if hasattr(value, "tolist"):  # of NumPy
        return jsonable(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """The content of a JSON file; DataError if it is missing or corrupt."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        reason = "it nests too deeply" if isinstance(error, RecursionError) else error
        raise DataError(
            f"{path} cannot be read: {reason}.",
            "a JSON file written by Arrowhead.",
            "check the path; if the folder was copied, copy it again.",
        ) from error


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically, with a hash of its content under the key "seal"."""
    with atomic_write(path) as draft_file:
        draft_file.write_text(sealed(content))


def sealed(content: Mapping[str, Any]) -> str:
    """The text that `write_sealed` writes."""
    return _json_text({**content, "seal": _seal(content)})


def read_sealed(
    path: Path, number: int, *, upgrade: str, repair: str, name: str | None = None
) -> dict[str, Any]:
    """Read and verify a file that `write_sealed` wrote.

    Args:
        path: The file.
        number: The expected value of its key "format".
        upgrade: What the user can do about another format.
        repair: What the user can do about changed content.
        name: How messages call the file; its path by default.

    Raises:
        DataError: The file is missing, changed, or of another format.
    """
    content, name = read_json(path), name or str(path)
    if not isinstance(content, dict) or content.get("format") != number:
        found = content.get("format") if isinstance(content, dict) else None
        raise DataError(
            f"{name} is of format {found}.",
            f"format {number}, which this version writes.",
            f"use the Arrowhead version that wrote it, or {upgrade}.",
        )
    if content.pop("seal", None) != _seal(content):
        raise DataError(
            f"{name} has changed since it was written: its seal does not match.",
            "the bytes that Arrowhead wrote.",
            repair,
        )
    return content


def check_schema(content: Any, schema: Any, name: str, repair: str) -> None:
    """Raise DataError if a JSON document does not match a schema.

    Schemas are plain Python values, since a JSON Schema cannot call a function. A schema is one of

        a type               a value of that type (float: also an int; int: no bool)
        a compiled pattern   text that matches it completely
        a function           a value for which it returns true
        {"key": schema}      an object with these keys; "key?" is optional, other keys are allowed
        {str: schema}        an object with any keys
        [schema]             a list
        (schema, schema)     either one; None matches null

    Args:
        content: The parsed document.
        schema: What it has to match.
        name: How messages call the document.
        repair: What the user can do about it.
    """
    if mismatch := _schema_mismatch(content, schema, ""):
        raise DataError(
            f"{name} is not what Arrowhead writes: {mismatch}.",
            "the document that Arrowhead wrote, with all its keys.",
            repair,
        )


def _schema_mismatch(value: Any, schema: Any, path: str) -> str | None:
    """Where and how a value differs from a schema; None if it matches."""
    shown_path = path.lstrip(".") or "all of it"
    if isinstance(schema, tuple):
        mismatches = [_schema_mismatch(value, option, path) for option in schema]
        return None if None in mismatches else mismatches[0]
    if isinstance(schema, list) and isinstance(value, list):
        item_mismatches = (
            _schema_mismatch(item, schema[0], f"{path}[{i}]") for i, item in enumerate(value)
        )
        return next(filter(None, item_mismatches), None)
    if isinstance(schema, dict) and isinstance(value, dict):
        if str in schema:
            schema = dict.fromkeys(value, schema[str])
        for key, inner in schema.items():
            name = key.removesuffix("?") if key not in value else key
            if name in value and (
                mismatch := _schema_mismatch(value[name], inner, f"{path}.{name}")
            ):
                return mismatch
            if name not in value and name == key:
                return f"it lacks {f'{path}.{key}'.lstrip('.')!r}"
        return None
    if isinstance(schema, re.Pattern):
        matches = isinstance(value, str) and schema.fullmatch(value) is not None
    elif isinstance(schema, type):
        kinds = (int, float) if schema is float else schema
        matches = isinstance(value, kinds) and (schema is bool or not isinstance(value, bool))
    else:
        matches = value is None if schema is None else callable(schema) and bool(schema(value))
    return None if matches else f"{shown_path!r} is {repr(value)[:80]}"


def _seal(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# ------------------------------------------------------------------------------ hashes


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(
    path: Path, digest: str, *, recorded_in: str, repair: str, name: str | None = None
) -> None:
    """Raise DataError if a file is missing or its bytes do not have this sha256.

    Args:
        path: The file.
        digest: The expected sha256, in hex.
        recorded_in: Where the digest is recorded, such as "the manifest".
        repair: What the user can do about it.
        name: How messages call the file; its path by default.
    """
    name = name or str(path)
    wanted = f"the bytes whose sha256 is {digest}."
    if not path.is_file():
        raise DataError(f"{name} is missing, but {recorded_in} names it.", wanted, repair)
    if sha256(path) != digest:
        raise DataError(
            f"{name} differs from {recorded_in}: its bytes have changed since they were written.",
            wanted,
            repair,
        )


# ------------------------------------------------------------------------------- locks


def warn_no_locks(message: str) -> None:
    """Default of `warn`: a Python warning."""
    warnings.warn(message, stacklevel=4)


@contextmanager
def folder_lock(folder: Path, warn: Callable[[str], None] = warn_no_locks) -> Iterator[None]:
    """Lock a folder for one writer; ConfigError if another process is writing there.

    warn: called with a message if the file system has no locks.
    """
    handle = _acquire_lock(folder, warn, folder)
    try:
        yield
    finally:
        os.close(handle)


@contextmanager
def locked_output_folder(
    folder: Path, warn: Callable[[str], None] = warn_no_locks, display_path: Path | None = None
) -> Iterator[None]:
    """Create a folder if necessary and lock it; remove stale drafts in it.

    If the folder is empty at the end, it is removed, with the parent folders that were created.

    Args:
        folder: The folder to write to.
        warn: Called with a message if the file system has no locks.
        display_path: How a refusal calls the folder; its path by default.
    """
    created: list[Path] = []
    while True:
        missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        created += [parent for parent in missing if parent not in created]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = _acquire_lock(folder, warn, display_path or folder)
        except (FileNotFoundError, FileExistsError):
            if _is_not_folder(folder):
                raise
            continue  # the previous writer has just removed it
        break
    try:
        remove_stale_drafts(folder)
        yield
    finally:
        with suppress(OSError):  # not empty: something else was written there
            if [entry.name for entry in folder.iterdir()] == [LOCK_NAME]:
                (folder / LOCK_NAME).unlink()  # safe: we hold the lock until the handle is closed
                folder.rmdir()
                for parent in sorted(created, key=lambda path: len(path.parts), reverse=True)[1:]:
                    parent.rmdir()
        os.close(handle)


def _is_not_folder(path: Path) -> bool:
    """Whether something other than a folder exists there, with one stat: others may change it."""
    try:
        return not stat.S_ISDIR(path.stat().st_mode)
    except OSError:
        return False


def _acquire_lock(folder: Path, warn: Callable[[str], None], display_path: Path) -> int:
    """The handle of a folder's lock file, locked until it is closed."""
    while True:
        handle = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise ConfigError(
                f"{display_path} is being written by another Arrowhead command.",
                "one writer at a time.",
                "wait for it to end, or stop it; then run this again.",
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS_ERRNOS:
                os.close(handle)
                raise
            warn(
                f"The disk of {folder} has no file locks ({os.strerror(error.errno)}): make sure"
                " yourself that no other command writes there at the same time."
            )
        if _is_same_file(folder / LOCK_NAME, handle):
            return handle
        os.close(handle)  # removed between opening and locking: that lock has no effect


def _is_same_file(path: Path, handle: int) -> bool:
    """Whether the open file still has this path."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False
