"""Keeps the mirrors of addresses below a number of bytes: those not used for longest go first.

A mirror that a process uses is never touched: the process holds a shared lock on its mark, a file
in `.in-use` beside the mirrors. So the limit holds between commands; a store that is being read is
on this disk as a whole.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from arrowhead.data import mirrors
from arrowhead.errors import ConfigError

LIMIT_VARIABLE = "ARROWHEAD_MIRROR_GB"
DEFAULT_LIMIT_GB = 50.0
MARKS = ".in-use"
_held: dict[tuple[int, Path], int] = {}


def hold(folder: Path) -> None:
    """Keep a mirror from being removed while this process runs, and note that it was used."""
    if (os.getpid(), folder) in _held:
        return
    mark = mark_of(folder)
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(mark, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ConfigError(
            f"{mirrors.root().parent} cannot be written: {error.strerror}.",
            "a folder for the files of addresses.",
            f"set {mirrors.CACHE_VARIABLE} to a folder on a disk of this machine.",
        ) from error
    with suppress(OSError):  # no locks on this disk: then nothing is removed, either
        fcntl.flock(handle, fcntl.LOCK_SH)
        os.utime(mark)
    _held[os.getpid(), folder] = handle


def mark_of(folder: Path) -> Path:
    """The mark of a mirror."""
    return mirrors.beside(folder, MARKS) / "mark"


def limit_bytes() -> float:
    """How many bytes all mirrors may have together."""
    given = os.environ.get(LIMIT_VARIABLE, "")
    try:
        limit = float(given or DEFAULT_LIMIT_GB)
    except ValueError:
        limit = -1
    if not limit >= 0:
        raise ConfigError(
            f"{LIMIT_VARIABLE} is {given}.",
            "how many gigabytes files of addresses may take on this disk, such as 50.",
            "correct it, or leave it out.",
        )
    return limit * 1e9


def make_room() -> None:
    """Remove the files of mirrors that were not used for longest, until the others fit."""
    top, limit = mirrors.root(), limit_bytes()
    marks = sorted((top / MARKS).rglob("mark"), key=lambda mark: mark.stat().st_mtime)
    folders = [top / mark.parent.relative_to(top / MARKS) for mark in marks]
    sizes = [sum(file.stat().st_size for file in _own_files(folder)) for folder in folders]
    total = sum(sizes)
    for mark, folder, size in zip(marks, folders, sizes, strict=True):
        if total <= limit:
            return
        handle = os.open(mark, os.O_RDWR)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for file in _own_files(folder):
                file.unlink(missing_ok=True)
            total -= size
        except OSError:  # in use
            continue
        finally:
            os.close(handle)


def _own_files(folder: Path) -> Iterator[Path]:
    """The files of a mirror, without those of another mirror inside, and without checkpoints."""
    for at, folders, names in os.walk(folder):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and not mark_of(Path(at, name)).exists()
        ]
        yield from (Path(at, name) for name in names if not name.startswith("."))
