"""The bytes of one file, on a disk or in an object store, or why there are none."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from arrowhead.data import object_store, path_text
from arrowhead.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


def read(
    root: str, path: str, max_bytes: int, size: int | None = None, stamp: int | None = None
) -> tuple[bytes, str | None]:
    """A file's bytes and None, or no bytes and the fault, in words.

    size, stamp: as listed; a file that differs from them is a fault. Pipes and devices are never
    waited on. May be called from many threads at once.
    """

    def judge(size_now: int, stamp_now: int) -> str | None:
        if fault := _changed(size_now, stamp_now, size, stamp):
            return fault
        return _too_large(size_now, max_bytes) if size_now > max_bytes else None

    if path_text.in_store(root):
        try:
            return object_store.read(
                path_text.uri(root), path_text.unescape_path(path).decode(), judge
            )
        except FileNotFoundError:
            return b"", "unreadable: No such file or directory"
        except PermissionError:
            return b"", "unreadable: Permission denied"
        except Exception as error:  # stores raise what they like
            return b"", f"unreadable: {object_store.words(error)}"
    file = os.path.join(path_text.unescape_path(root), path_text.unescape_path(path))
    try:
        handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            before = os.fstat(handle)
            if not stat.S_ISREG(before.st_mode):
                return b"", "not a file: a folder, pipe, socket or device"
            if fault := judge(before.st_size, before.st_mtime_ns):
                return b"", fault
            with os.fdopen(handle, "rb", closefd=False) as stream:
                data = stream.read(before.st_size + 1)
            after = os.fstat(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno == errno.ENXIO:  # how a socket, or a device without a driver, answers
            return b"", "not a file: a folder, pipe, socket or device"
        return b"", f"unreadable: {error.strerror}"
    except ValueError:  # a NUL in it
        return b"", "unreadable: no file can have this name"
    if len(data) != before.st_size or after.st_mtime_ns != before.st_mtime_ns:
        return b"", "changed: it was written to while it was read"
    return data, None


def _changed(size: int, stamp: int, old_size: int | None, old_stamp: int | None) -> str | None:
    """The fault of a file that differs from what was listed; None of sizes and stamps fit all."""
    if old_size == -1:
        return f"changed: it could not be looked at when it was listed, now it has {size} bytes"
    if old_size is not None and size != old_size:
        return f"changed: it had {old_size} bytes when it was listed, now it has {size}"
    if old_stamp is not None and stamp != old_stamp:
        return "changed: it was written again after it was listed"
    return None


def _too_large(size: int, max_bytes: int) -> str:
    return f"too large: {size} bytes, more than {max_bytes}"


def fetch(root: str, path: str, target: Path) -> None:
    """Copy a file below a root in a store to the disk. Raises FileNotFoundError if it is not there,
    ConfigError if the store does not give it.
    """
    try:
        object_store.fetch(path_text.uri(root), path_text.unescape_path(path).decode(), target)
    except (ConfigError, FileNotFoundError):
        raise
    except Exception as error:  # stores raise what they like
        raise ConfigError(
            f"{root}/{path} cannot be fetched: {object_store.words(error)}.",
            "an address that exists and that these credentials may read.",
            "check its spelling, the credentials (AWS_*, GOOGLE_*) and, for a store of your own,"
            " AWS_ENDPOINT_URL.",
        ) from error
