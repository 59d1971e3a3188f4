"""Files that hold many images: tar, Parquet and Arrow files, on a disk or in an object store.

    a tar             an image is at an offset in bytes and has a size
    Parquet, Arrow    an image is the value of a row; its offset is the number of the row

A row of a catalog knows its container and its offset there, and has the stamp of the container: if
that changes, every row in it has changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from arrowhead.data import object_store, path_text, reading

TAR_SUFFIXES = (".tar",)
PARQUET_SUFFIXES = (".parquet", ".pq")
ARROW_SUFFIXES = (".arrow",)
SUFFIXES = (*TAR_SUFFIXES, *PARQUET_SUFFIXES, *ARROW_SUFFIXES)
# A tar that is compressed as a whole cannot be read from its middle.
COMPRESSED_SUFFIXES = (
    *(".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4"),
    *(".tgz", ".tbz2", ".txz", ".tzst"),
)
COMPRESSED_SIGNATURES = (
    *(b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0"),
    *(b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18"),  # Zstandard, LZ4
)
MAX_SPAN_BYTES = 8 * 2**20  # of neighbouring images in a tar that are read together
MAX_SPAN_ROWS = 32
MAX_GAP_BYTES = 64 * 2**10  # headers, labels and captions between two of them
# Bytes per request: a tar is indexed by jumping from header to header. In an object store a request
# takes as long as some megabytes, so images that are smaller are read with the headers.
LOCAL_BLOCK, STORE_BLOCK, STORE_BLOCK_AFTER_JUMP = 16 * 2**10, 4 * 2**20, 64 * 2**10


@dataclass(frozen=True, kw_only=True, slots=True)
class Container:
    """A container as it was listed: its escaped path below a root, size in bytes and stamp."""

    root: str
    path: str
    size: int
    stamp: int

    @property
    def row_stamp(self) -> int:
        """The stamp of all rows in it: it changes with the size or the stamp of the container."""
        return row_stamp(self.size, self.stamp)

    @property
    def location(self) -> str:
        """Its escaped path or URI, for messages."""
        return f"{self.root.rstrip('/')}/{self.path}"


class ContainerError(Exception):
    """A container cannot be read, or has changed; the message is the fault, as a sentence."""


def kind_of(path: str) -> str:
    """tar, parquet or arrow by the name of a file; "" for other names."""
    lower = path.lower()
    for kind, suffixes in (
        ("tar", TAR_SUFFIXES),
        ("parquet", PARQUET_SUFFIXES),
        ("arrow", ARROW_SUFFIXES),
    ):
        if lower.endswith(suffixes):
            return kind
    return ""


def row_stamp(size: int, stamp: int) -> int:
    """The stamp of the rows of a container of this size and stamp: 63 bits of a hash."""
    digest = hashlib.blake2b(f"{size} {stamp}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def stat_container(root: str, path: str) -> Container:
    """A container that was given by name.

    Raises:
        ContainerError: It does not exist, or cannot be looked at.
    """
    if path_text.is_store_uri(root):
        try:
            size, stamp = object_store.stat_object(
                path_text.store_uri(root), path_text.unescape_path(path).decode()
            )
        except FileNotFoundError as error:
            raise ContainerError("unreadable: No such file or directory") from error
        except Exception as error:  # each store raises its own exceptions
            raise ContainerError(f"unreadable: {object_store.error_summary(error)}") from error
        return Container(root=root, path=path, size=size, stamp=stamp)
    seen = [(-1, 0)]

    def look(size: int, stamp: int) -> str:
        seen[0] = size, stamp
        return "seen"

    _, fault = reading.read_part(root, path, look)
    if seen[0][0] < 0:
        raise ContainerError(fault)
    return Container(root=root, path=path, size=seen[0][0], stamp=seen[0][1])


# -------------------------------------------------------------------------------- reading


def _check(path: str, stamp: int, start: int) -> object_store.ObjectCheck:
    """A check of a container before its bytes from `start` on are read (see `read_part`)."""
    name = path.rpartition("/")[2]

    def check(size_now: int, stamp_now: int) -> str | None:
        if row_stamp(size_now, stamp_now) != stamp:
            return f"changed: {name} was written again after it was listed"
        if start >= size_now:
            return f"truncated: {name} is cut off before it"
        return None

    return check


def read_members(
    root: str, path: str, stamp: int, spans: Sequence[tuple[int, int]], max_bytes: int
) -> list[tuple[bytes, str | None]]:
    """Read neighbouring members of a tar in one go. Thread-safe.

    Args:
        root: The root (see `path_text.resolve`).
        path: Escaped path of the tar below it.
        stamp: Stamp of its rows as listed; another stamp is a fault.
        spans: Offset and size of each member, in the order of their offsets.
        max_bytes: A larger member is a fault.

    Returns:
        As `reading.read_file`, for each member.
    """
    small = [(offset, size) for offset, size in spans if 0 < size <= max_bytes]
    data, fault, start = b"", None, 0
    if small:
        start, stop = small[0][0], max(offset + size for offset, size in small)
        data, fault = reading.read_part(root, path, _check(path, stamp, start), (start, stop))
    name = path.rpartition("/")[2]
    out: list[tuple[bytes, str | None]] = []
    for offset, size in spans:
        if size > max_bytes:
            out.append((b"", reading.too_large_fault(size, max_bytes)))
        elif size == 0 or fault:
            out.append((b"", fault if size else None))
        elif len(part := data[offset - start : offset - start + size]) < size:
            out.append((b"", f"truncated: {name} is cut off in it, after {len(part)} bytes"))
        else:
            out.append((part, None))
    return out


class BlockReader:
    """Reads small pieces of a container in rising order, some blocks at a time.

    Attributes:
        size: Of the container, in bytes.
    """

    def __init__(self, container: Container) -> None:
        self.size = container.size
        self._container, self._start, self._block = container, 0, b""
        self._in_store = path_text.is_store_uri(container.root)

    def read_at(self, offset: int, length: int) -> bytes:
        """The bytes from an offset on; fewer where the container ends.

        Raises:
            ContainerError: It cannot be read, or has changed.
        """
        stop = min(offset + length, self.size)
        if offset >= stop:
            return b""
        if not self._start <= offset or stop > self._start + len(self._block):
            jump = abs(offset - self._start - len(self._block))
            block = LOCAL_BLOCK
            if self._in_store:
                block = STORE_BLOCK if jump < STORE_BLOCK // 4 else STORE_BLOCK_AFTER_JUMP
            one = self._container
            check = _check(one.path, one.row_stamp, offset)
            end = min(max(stop, offset + block), self.size)
            self._block, fault = reading.read_part(one.root, one.path, check, (offset, end))
            self._start = offset
            if fault:
                raise ContainerError(fault)
        return self._block[offset - self._start : stop - self._start]
