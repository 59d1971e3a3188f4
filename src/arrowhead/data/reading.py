"""Read one file, from a disk or an object store; what cannot be read is a fault, not an error."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from arrowhead.data import object_store, path_text
from arrowhead.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


def read_file(
    root: str, path: str, max_bytes: int, size: int | None = None, stamp: int | None = None
) -> tuple[bytes, str | None]:
    """Read a file.

    Never blocks on pipes and devices. Thread-safe.

    Args:
        root: The root (see `path_text.resolve`).
        path: Escaped path below it.
        max_bytes: A larger file is a fault.
        size: Size as listed; another size is a fault.
        stamp: Stamp as listed; another stamp is a fault.

    Returns:
        The bytes and None, or no bytes and the fault, as a sentence.
    """

    def check(size_now: int, stamp_now: int) -> str | None:
        if fault := _changed_fault(size_now, stamp_now, size, stamp):
            return fault
        return too_large_fault(size_now, max_bytes) if size_now > max_bytes else None

    return read_part(root, path, check)


def read_part(
    root: str, path: str, check: object_store.ObjectCheck, part: tuple[int, int] | None = None
) -> tuple[bytes, str | None]:
    """Read a file or a part of it; otherwise as `read_file`.

    Args:
        root: The root (see `path_text.resolve`).
        path: Escaped path below it.
        check: Called with the size and the stamp of the file; returns a fault if it is not to be
            read.
        part: Only the bytes from the first number up to the second; fewer if the file ends before.
            `check` must refuse a part that begins at or after the end.
    """
    if path_text.is_store_uri(root):
        try:
            return object_store.read_object(
                path_text.store_uri(root), path_text.unescape_path(path).decode(), check, part
            )
        except FileNotFoundError:
            return b"", "unreadable: No such file or directory"
        except PermissionError:
            return b"", "unreadable: Permission denied"
        except Exception as error:  # each store raises its own exceptions
            return b"", f"unreadable: {object_store.error_summary(error)}"
    file = os.path.join(path_text.unescape_path(root), path_text.unescape_path(path))
    try:
        handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            before = os.fstat(handle)
            if not stat.S_ISREG(before.st_mode):
                return b"", "not a file: a folder, pipe, socket or device"
            if fault := check(before.st_size, before.st_mtime_ns):
                return b"", fault
            start, stop = (0, before.st_size) if part is None else part
            stop = min(stop, before.st_size)  # what a tar claims may be more than memory holds
            with os.fdopen(handle, "rb", closefd=False) as stream:
                stream.seek(start)
                data = stream.read(stop - start + (part is None))
            after = os.fstat(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket, or a device without a driver
            return b"", "not a file: a folder, pipe, socket or device"
        return b"", f"unreadable: {error.strerror}"
    except ValueError:  # the path contains NUL
        return b"", "unreadable: no file can have this name"
    if len(data) != stop - start or after.st_mtime_ns != before.st_mtime_ns:
        return b"", "changed: it was written to while it was read"
    return data, None


def _changed_fault(
    size: int, stamp: int, old_size: int | None, old_stamp: int | None
) -> str | None:
    """The fault of a file that has changed since it was listed; a size or stamp of None matches."""
    if old_size == -1:
        return f"changed: it could not be looked at when it was listed, now it has {size} bytes"
    if old_size is not None and size != old_size:
        return f"changed: it had {old_size} bytes when it was listed, now it has {size}"
    if old_stamp is not None and stamp != old_stamp:
        return "changed: it was written again after it was listed"
    return None


def too_large_fault(size: int, max_bytes: int) -> str:
    """The fault of a file or member that is larger than allowed."""
    return f"too large: {size} bytes, more than {max_bytes}"


def download_file(root: str, path: str, target: Path) -> None:
    """Copy a file from an object store to the disk.

    Raises:
        FileNotFoundError: There is no such object.
        ConfigError: The store does not allow the download.
    """
    try:
        object_store.download(
            path_text.store_uri(root), path_text.unescape_path(path).decode(), target
        )
    except (ConfigError, FileNotFoundError):
        raise
    except Exception as error:  # each store raises its own exceptions
        raise ConfigError(
            f"{root}/{path} cannot be fetched: {object_store.error_summary(error)}.",
            "an address that exists and that these credentials may read.",
            "check its spelling, the credentials (AWS_*, GOOGLE_*) and, for your own store,"
            " AWS_ENDPOINT_URL.",
        ) from error
