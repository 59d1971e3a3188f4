"""Read the headers of a tar: which members it has, and where their bytes are.

Only headers are read (POSIX.1-1988 ustar, POSIX.1-2001 pax, GNU), and nothing is unpacked. The
module `tarfile` reads them, too, but takes a damaged archive for one that ends there.

    long names        of GNU and pax
    sizes             octal, or base 256 above 8 GiB
    links             a link to a member has the bytes of that member
    left out          folders, devices, sparse files, links to elsewhere, names with ".."
    the same name     the last one counts, as when the tar is unpacked
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

BLOCK = 512
MAX_EXTENSION_BYTES = 2**20  # of a long name or of pax records, which are held in memory
MAX_SIZE = 2**62  # of a member
MAX_ZERO_BLOCKS = 2048  # after the end of a tar, before another one that is appended to it
# The letters of the kinds of entries.
FILE_KINDS = (bytes(1), b"0", b"7")
LINK_KINDS, SPARSE_KIND, FOLDER_KIND = (b"1", b"2"), b"S", b"5"
DATALESS_KINDS = (b"1", b"2", b"3", b"4", b"5", b"6")
EXTENSION_KINDS = (b"x", b"g", b"L", b"K")
# Reads so many bytes at an offset; fewer where the tar ends.
ReadAt = Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar: where its bytes are."""

    offset: int
    size: int


@dataclass(slots=True)
class TarContent:
    """The files of a tar.

    Attributes:
        members: By name, in the order of their headers. Names are relative and normalized.
        texts: The bytes of those members that `read_tar` was to read.
        damage: Where and why reading stopped before the end, as the end of a sentence; "" for a
            complete tar.
        unmarked: Whether the tar ends after a member, without an end mark.
        left_out: Number of other entries, by kind.
    """

    members: dict[bytes, Member] = field(default_factory=dict)
    texts: dict[bytes, bytes] = field(default_factory=dict)
    damage: str = ""
    unmarked: bool = False
    left_out: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class _Extension:
    """What long names and pax records say about the next member."""

    name: bytes | None = None
    link: bytes | None = None
    size: int | None = None
    sparse: bool = False


class _DamagedTar(Exception):
    pass


def read_tar(
    read_at: ReadAt, size: int, is_text: Callable[[bytes, int], bool] = lambda name, size: False
) -> TarContent:
    """Read the headers of a tar.

    Never raises for damaged content: the members before the damage are returned. A member whose
    bytes are cut off is among them.

    Args:
        read_at: Reads the tar.
        size: Of the tar in bytes.
        is_text: Whether to read a member of this name and size, too.
    """
    content = TarContent()
    links: list[tuple[bytes, bytes]] = []
    offset, extension = 0, _Extension()
    try:
        while True:
            header_at, header = _next_header(read_at, offset, size)
            if not header:
                content.unmarked = header_at == offset and offset > 0
                break
            offset = header_at
            kind, data_size, name, link = _parse_header(header)
            offset += BLOCK
            if kind in EXTENSION_KINDS:
                if data_size > MAX_EXTENSION_BYTES:
                    raise _DamagedTar(f"an extended header claims {data_size} bytes")
                data = read_at(offset, data_size)
                if len(data) < data_size:
                    raise _DamagedTar("it ends within a header")
                _extend(extension, kind, data)
                offset += _padded(data_size)
                continue
            if kind == SPARSE_KIND:  # GNU sparse: more blocks of its map may follow
                offset = _skip_sparse_map(read_at, header, offset)
            if extension.size is not None:
                data_size = extension.size
            data_size = 0 if kind in DATALESS_KINDS else data_size
            name = name if extension.name is None else extension.name
            if data_size < MAX_SIZE:
                member = Member(offset, data_size)
                added = _add_member(content, links, kind, name, extension, member, link)
                if added is not None and is_text(added, data_size):
                    text = read_at(offset, data_size)
                    if len(text) == data_size:
                        content.texts[added] = text
            if offset + data_size > size:
                raise _DamagedTar(f"its member {_shown(name)} has {data_size} bytes by its header")
            offset, extension = offset + _padded(data_size), _Extension()
    except _DamagedTar as damage:
        content.damage = f"{damage} (at byte {min(offset, size):,} of {size:,})"
    _resolve_links(content, links)
    return content


def _next_header(read_at: ReadAt, offset: int, size: int) -> tuple[int, bytes]:
    """Offset and bytes of the next header; no bytes at the end of the tar."""
    for _ in range(MAX_ZERO_BLOCKS):
        if offset >= size:
            return offset, b""
        header = read_at(offset, BLOCK)
        if len(header) < BLOCK:
            if header.count(0) == len(header):
                return offset + len(header), b""
            raise _DamagedTar("it ends within a header")
        if header.count(0) < BLOCK:
            return offset, header
        offset += BLOCK
    return offset, b""


def _parse_header(header: bytes) -> tuple[bytes, int, bytes, bytes]:
    """Type, size, name and link name of a header."""
    checksum = _number(header[148:156])
    plain = header[:148] + b" " * 8 + header[156:]
    total = sum(plain)
    # Some old programs add up signed bytes.
    if checksum != total and checksum != total - 256 * sum(byte > 127 for byte in plain):
        raise _DamagedTar("a header is damaged: its checksum does not match")
    size, kind = _number(header[124:136]), header[156:157]
    if size < 0:
        raise _DamagedTar("a header has a size below zero")
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0]
    if prefix and header[257:263] == b"ustar\0":
        name = prefix + b"/" + name
    if kind == FILE_KINDS[0] and name.endswith(b"/"):  # before POSIX, the name told
        kind = FOLDER_KIND
    return kind, size, name, header[157:257].partition(b"\0")[0]


def _number(cell: bytes) -> int:
    """A number in a header: octal digits, or base 256 where the first bit is set."""
    if cell[0] & 0x80:
        value = int.from_bytes(cell, "big") & ((1 << (8 * len(cell) - 1)) - 1)
        return value - (1 << (8 * len(cell) - 1)) if cell[0] & 0x40 else value
    digits = cell.partition(b"\0")[0].strip()
    if not digits:
        return 0
    if digits.strip(b"01234567"):
        raise _DamagedTar("a header is damaged: it has no number where one should be")
    return int(digits, 8)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _skip_sparse_map(read_at: ReadAt, header: bytes, offset: int) -> int:
    """The offset after the blocks that continue the map of a sparse file."""
    more = header[482:483]
    while more not in (b"", b"\0"):
        block = read_at(offset, BLOCK)
        if len(block) < BLOCK:
            raise _DamagedTar("it ends within a header")
        more, offset = block[504:505], offset + BLOCK
    return offset


def _extend(extension: _Extension, kind: bytes, data: bytes) -> None:
    """Take over a long name, or pax records for the next member."""
    if kind == b"L":
        extension.name = data.partition(b"\0")[0]
    elif kind == b"K":
        extension.link = data.partition(b"\0")[0]
    elif kind == b"x":  # records for all members (g) hold nothing about names and sizes
        for key, value in _pax_records(data):
            if key == b"path":
                extension.name = value
            elif key == b"linkpath":
                extension.link = value
            elif key == b"size":
                if not value.isdigit() or len(value) > 20:
                    raise _DamagedTar("a pax header has a size that is no number")
                extension.size = int(value)
            elif key.startswith(b"GNU.sparse."):
                extension.sparse = True


def _pax_records(data: bytes) -> list[tuple[bytes, bytes]]:
    r"""The records of a pax header, each of them "LENGTH KEY=VALUE\n"."""
    records, at = [], 0
    while at < len(data) and data[at] != 0:
        digits = data[at : at + 20].partition(b" ")[0]
        if not digits.isdigit() or int(digits) < len(digits) + 3:
            raise _DamagedTar("a pax header is damaged")
        record = data[at + len(digits) + 1 : at + int(digits)]
        key, equals, value = record.partition(b"=")
        if not equals or value[-1:] != b"\n" or at + int(digits) > len(data):
            raise _DamagedTar("a pax header is damaged")
        records.append((key, value[:-1]))
        at += int(digits)
    return records


def _add_member(
    content: TarContent,
    links: list[tuple[bytes, bytes]],
    kind: bytes,
    raw_name: bytes,
    extension: _Extension,
    member: Member,
    link: bytes,
) -> bytes | None:
    """Take a member over if it is a file, and return its name; a link is put aside."""
    if kind == FOLDER_KIND:
        return None
    name = _relative(raw_name)
    if kind not in FILE_KINDS and kind not in LINK_KINDS and kind != SPARSE_KIND:
        content.left_out["devices and other special entries"] += 1
    elif kind == SPARSE_KIND or extension.sparse:
        content.left_out["sparse files"] += 1
    elif name is None:
        content.left_out["names with .. or none"] += 1
    elif kind in LINK_KINDS:
        target = link if extension.link is None else extension.link
        if kind == b"2":
            target = posixpath.join(posixpath.dirname(name), target)
        links.append((name, target))
    else:
        content.left_out["members replaced by a later one of the same name"] += (
            name in content.members
        )
        content.members.pop(name, None)
        content.members[name] = member
        return name
    return None


def _relative(name: bytes) -> bytes | None:
    """A name in a tar, relative and normalized; None if it leads out or names nothing."""
    if b".." in name.split(b"/") or b"\0" in name:
        return None
    plain = posixpath.normpath(name.lstrip(b"/"))
    return None if plain == b"." else plain


def _resolve_links(content: TarContent, links: list[tuple[bytes, bytes]]) -> None:
    """Give links the bytes of the members that they lead to, also through other links."""
    for _ in range(2):
        for name, target in links:
            found = content.members.get(posixpath.normpath(target.lstrip(b"/")))
            if found is not None and name not in content.members:
                content.members[name] = found
    unresolved = sum(name not in content.members for name, _ in links)
    content.left_out["links that lead nowhere in the tar"] += unresolved
    content.left_out = +content.left_out  # without zeros


def _shown(name: bytes) -> str:
    text = name[-80:].decode("utf-8", "replace")
    return "".join(char if char.isprintable() else "?" for char in text)
