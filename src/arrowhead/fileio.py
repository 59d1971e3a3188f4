"""Files and folders that are whole or absent, and what vouches for them.

draft            a file gets its own name only when it is whole
write_sealed     JSON with a hash of its content inside
must_hash_to     a file's bytes against the sha256 that somebody else keeps
locked           one writer of a folder at a time
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import hashlib
import json
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

LOCK = ".lock"
DRAFT = re.compile(r"\..+\.[0-9a-f]{8}\.draft")
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
# ---------------------------------------------------------------- whole files and folders


@contextmanager
def draft(path: Path) -> Iterator[Path]:
    """A path to write to; what is there becomes `path` at the end, or nothing does.

    The file is there already, empty and locked, so that nobody takes it for a left-over draft.
    Raises ConfigError when the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with room_for(path):
        temporary, handle = _draft_of(path, folder=False)
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            os.close(handle)
            temporary.unlink(missing_ok=True)


@contextmanager
def draft_folder(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """An empty folder to fill; it becomes `path` at the end, or nothing does.

    At every moment there is a whole folder at `path`, if there was one before: the two are
    exchanged. The one before is removed, or becomes `previous`, in place of what is there.
    Folders that a killed writer of `path` left are removed. Raises ConfigError when the disk is
    full, or if `path` is a mount point.
    """
    path = Path(os.path.realpath(path))  # a link stays a link
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path)
    sweep(path.parent, path.name)
    with room_for(path):
        folder, handle = _draft_of(path, folder=True)
        try:
            yield folder
            sync_tree(folder)
            put_in_place(folder, path, previous)
        finally:
            os.close(handle)
            shutil.rmtree(folder, ignore_errors=True)


def put_in_place(folder: Path, path: Path, previous: Path | None = None) -> None:
    """Give a finished folder the name `path`, on the disk too; what had the name is removed
    afterwards, or becomes `previous`.
    """
    if not path.exists():
        folder.rename(path)
        _sync(path.parent)
        return
    if is_here(path):
        _fill(folder, path)
        return
    with _held(path):  # also under its new name: nobody sweeps it before it is `previous`
        try:
            _exchange(folder, path)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.EXDEV):
                raise
            raise ConfigError(
                f"{path} cannot be replaced: {os.strerror(error.errno)}.",
                "a folder that can be renamed; a mount point cannot.",
                "give a folder inside it.",
            ) from error
        _sync(path.parent)
        if previous is not None:
            put_in_place(folder, previous)
            return
        shutil.rmtree(folder, ignore_errors=True)


def is_here(path: Path) -> bool:
    """Whether a folder is the one that this process stands in. Whoever started it stands there,
    too, and would be left in a removed folder if another took its name.
    """
    return path.is_dir() and path.samefile(os.curdir)


def _fill(folder: Path, path: Path) -> None:
    """Move what is in a finished folder into one that is there: the JSON file that was written
    last, which says that all is there, as the last. What is called so there stays: FileExistsError.
    """

    def turn(one: Path) -> tuple[bool, bool, int]:
        return one.is_file(), one.suffix == ".json", one.stat().st_mtime_ns

    inside = sorted(folder.iterdir(), key=turn)
    for one in inside:
        if os.path.lexists(path / one.name):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path / one.name))
    for one in inside:
        one.rename(path / one.name)
    _sync(path)


def recover(path: Path) -> None:
    """Bring back the folder `path` after a kill between the two renames of `put_in_place`, which
    stands for an exchange where the disk cannot do one.
    """
    for aside in path.parent.glob(f".{glob.escape(path.name)}.*.aside"):
        with suppress(OSError), _held(aside, now=True):  # else it is being exchanged just now
            if path.exists():
                shutil.rmtree(aside)
            else:
                aside.rename(path)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove drafts in a folder that killed writers left: those that nobody holds locked.

    name: only the drafts of that file or folder.
    """
    pattern = DRAFT if name is None else re.compile(rf"\.{re.escape(name)}\.[0-9a-f]{{8}}\.draft")
    for one in list(folder.iterdir()):
        if pattern.fullmatch(one.name):
            with suppress(OSError), _held(one, now=True):  # else it is somebody's, or gone
                remove(one)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@contextmanager
def _held(path: Path, *, now: bool = False) -> Iterator[None]:
    """A file or folder, locked. now: OSError if it is locked already, or cannot be."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with nullcontext() if now else suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | (fcntl.LOCK_NB if now else 0))
        yield
    finally:
        os.close(handle)


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """A full disk, while `path` is written, is a ConfigError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise ConfigError(
            f"{path} cannot be written: {os.strerror(error.errno)}.",
            "room on the disk; what was written before is whole and stays.",
            "free some space and run the same command again: it continues where it stopped.",
        ) from error


def draft_path(path: Path) -> Path:
    """A name beside `path` that is not taken for it. Drawn: process ids repeat on machines that
    share a disk.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.draft")


def _draft_of(path: Path, *, folder: bool) -> tuple[Path, int]:
    """A new draft, and a handle that holds its lock until it is closed."""
    while True:
        temporary = draft_path(path)
        if folder:
            temporary.mkdir()
            try:
                handle = os.open(temporary, os.O_RDONLY)
            except FileNotFoundError:  # swept before it was locked
                continue
        else:
            handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with suppress(OSError):  # where there are no locks, nothing is swept either
            fcntl.flock(handle, fcntl.LOCK_EX)
        if _is_open_at(temporary, handle):  # as above
            return temporary, handle
        os.close(handle)


def _exchange(one: Path, other: Path) -> None:
    """Two folders get each other's names at once; by two renames where that cannot be."""
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


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, and itself, to the disk."""
    for here, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(Path(here, name))
        _sync(Path(here))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -------------------------------------------------------------------------------- JSON


def write_json(path: Path, content: Any) -> None:
    """One JSON file, whole or absent."""
    with draft(path) as draft_file:
        draft_file.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file; DataError if it is missing or torn."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        words = "it nests too deeply" if isinstance(error, RecursionError) else error
        raise DataError(
            f"{path} cannot be read: {words}.",
            "a JSON file written by Arrowhead.",
            "check the path; if the folder was copied, copy it again.",
        ) from error


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """One JSON file, whole or absent, with a hash of its content inside."""
    write_json(path, {**content, "seal": _seal(content)})


def read_sealed(
    path: Path, number: int, *, upgrade: str, repair: str, name: str | None = None
) -> dict[str, Any]:
    """What `write_sealed` wrote; DataError if it is missing, changed, or not of format `number`.

    upgrade, repair: what to do about another format and about a change. name: what a person knows
    the file as, if not by its path.
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
            f"{name} has changed since it was written: its seal does not fit.",
            "the bytes that Arrowhead wrote.",
            repair,
        )
    return content


def must_fit(content: Any, shape: Any, name: str, repair: str) -> None:
    """DataError if a document that was read is not of this shape, where a shape is

    a type               a value of it (float: also a whole number; int: no bool)
    a compiled pattern   text that it matches from end to end
    a function           a value for which it is true
    {"key": shape}       an object with these keys; "key?" may be absent, others may be there
    {str: shape}         an object with any keys
    [shape]              a list
    (shape, shape)       one or the other; None stands for itself

    name: what a person knows the document as. repair: what to do about it.
    """
    if found := _misfit(content, shape, ""):
        raise DataError(
            f"{name} is not what Arrowhead writes: {found}.",
            "the document that Arrowhead wrote, with all its keys.",
            repair,
        )


def _misfit(value: Any, shape: Any, where: str) -> str | None:
    """Where and how a value differs from a shape."""
    at = where.lstrip(".") or "all of it"
    if isinstance(shape, tuple):
        either = [_misfit(value, one, where) for one in shape]
        return None if None in either else either[0]
    if isinstance(shape, list) and isinstance(value, list):
        inside = (_misfit(one, shape[0], f"{where}[{i}]") for i, one in enumerate(value))
        return next(filter(None, inside), None)
    if isinstance(shape, dict) and isinstance(value, dict):
        if str in shape:
            shape = dict.fromkeys(value, shape[str])
        for key, one in shape.items():
            name = key.removesuffix("?") if key not in value else key
            if name in value and (found := _misfit(value[name], one, f"{where}.{name}")):
                return found
            if name not in value and name == key:
                return f"it lacks {f'{where}.{key}'.lstrip('.')!r}"
        return None
    if isinstance(shape, re.Pattern):
        fits = isinstance(value, str) and shape.fullmatch(value) is not None
    elif isinstance(shape, type):
        kinds = (int, float) if shape is float else shape
        fits = isinstance(value, kinds) and (shape is bool or not isinstance(value, bool))
    else:
        fits = value is None if shape is None else callable(shape) and bool(shape(value))
    return None if fits else f"{at!r} is {repr(value)[:80]}"


def _seal(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# ------------------------------------------------------------------------------ hashes


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def must_hash_to(
    path: Path, digest: str, *, witness: str, repair: str, name: str | None = None
) -> None:
    """DataError if a file is missing or its bytes are not those of this sha256.

    witness: what names the digest, such as "the manifest". repair: what to do. name: what a person
    knows the file as, if not by its path.
    """
    name = name or str(path)
    wanted = f"the bytes whose sha256 is {digest}."
    if not path.is_file():
        raise DataError(f"{name} is missing, but {witness} names it.", wanted, repair)
    if sha256(path) != digest:
        raise DataError(
            f"{name} differs from {witness}: its bytes have changed since they were written.",
            wanted,
            repair,
        )


# ------------------------------------------------------------------------------- locks


def warn_of_locks(words: str) -> None:
    """Where nobody is given to say it: Python's own warnings."""
    warnings.warn(words, stacklevel=4)


@contextmanager
def locked(folder: Path, say: Callable[[str], None] = warn_of_locks) -> Iterator[None]:
    """One writer of a folder at a time; ConfigError if another process is writing there.

    say: gets a sentence where the disk has no locks.
    """
    handle = _acquire(folder, say, folder)
    try:
        yield
    finally:
        os.close(handle)


@contextmanager
def occupied(
    folder: Path, say: Callable[[str], None] = warn_of_locks, shown: Path | None = None
) -> Iterator[None]:
    """A folder that is made if need be, and locked; if nothing was put into it, it goes again, and
    so do the folders above it that were made for it. Drafts left by killed writers go at once.
    shown: what a refusal calls it.
    """
    made: list[Path] = []
    while True:
        made += [one for one in (folder, *folder.parents) if not one.exists() and one not in made]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = _acquire(folder, say, shown or folder)
        except (FileNotFoundError, FileExistsError):
            if _is_no_folder(folder):
                raise
            continue  # the one before has just removed it
        break
    try:
        sweep(folder)
        yield
    finally:
        with suppress(OSError):  # not empty: something else was written there
            if [one.name for one in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()  # ours: the lock is held until the handle is closed
                folder.rmdir()
                for one in sorted(made, key=lambda one: len(one.parts), reverse=True)[1:]:
                    one.rmdir()
        os.close(handle)


def _is_no_folder(path: Path) -> bool:
    """Whether something else is there. Asked once: it may go, and come back, between two looks."""
    try:
        return not stat.S_ISDIR(path.stat().st_mode)
    except OSError:
        return False


def _acquire(folder: Path, say: Callable[[str], None], shown: Path) -> int:
    """The handle of a folder's lock file, locked until it is closed."""
    while True:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise ConfigError(
                f"{shown} is being written by another Arrowhead command.",
                "one writer at a time.",
                "wait for it to end, or stop it; then run this again.",
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(handle)
                raise
            say(
                f"The disk of {folder} has no file locks ({os.strerror(error.errno)}): make sure"
                " yourself that no other command writes there at the same time."
            )
        if _is_open_at(folder / LOCK, handle):
            return handle
        os.close(handle)  # removed between opening and locking: that lock keeps nobody out


def _is_open_at(path: Path, handle: int) -> bool:
    """Whether the file that is open under this handle still has this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False
