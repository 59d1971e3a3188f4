"""Unpack zip and tar archives from strangers: nothing is written outside the given folder.

Only folders and regular files are created, by this module, with this process's permissions; so a
link cannot lead anywhere, and no device, owner or setuid bit comes out of an archive.

    names     relative, UTF-8, without "..", backslashes or control characters; no two that a
              file system without upper and lower case takes for one
    links     a link to a file of the archive becomes a copy of it; one that leads out is refused
    bounds    files and bytes are counted while they are written, whatever the headers say

Archives inside an archive stay as they are.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import posixpath
import re
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from arrowhead.data.exclusions import IMAGE_SUFFIXES
from arrowhead.errors import ConfigError, DataError

CHUNK_BYTES = 2**20
MAX_NAME_BYTES, MAX_PATH_BYTES, MAX_DEPTH = 255, 3000, 64  # Linux: 255, 4096 with the folder
MAX_LINK_BYTES = 4096
MAX_HEADER_BYTES = 2**20  # of one tar entry: long names and attributes, which are held in memory
XZ_MEMORY_BYTES = 2**29
LISTING = "fetched.sha256"  # the hash of every file, as `sha256sum -c` reads it
RECORD = "fetched.json"
RESERVED_NAMES = (LISTING, RECORD)
_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError)
# First bytes of what is no archive that this module reads.
_OTHER_KINDS = (
    (b"7z\xbc\xaf'\x1c", "a 7z archive", "unpack it with `7z x`"),
    (b"Rar!", "a RAR archive", "unpack it with `unrar x`"),
    (b"\x28\xb5\x2f\xfd", "compressed with Zstandard", "unpack it with `tar --zstd -xf`"),
    (b"PK\x07\x08", "a part of a split zip", "join its parts with `zip -s 0`"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ArchiveLimits:
    """How much may come out of all archives together."""

    max_bytes: int
    """Bytes of all files."""
    max_files: int
    """Files, folders and links."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unpacked:
    """What came out of the archives.

    Attributes:
        files: Number of files.
        images: How many of them are named like an image.
        size: Bytes of all files.
        links_left_out: Links to folders, or to nothing in the archives.
    """

    files: int
    images: int
    size: int
    links_left_out: int


class NotAnArchive(ConfigError):
    """A file is neither a zip nor a tar."""


class Unpacker:
    """Unpacks archives into one folder, and counts and hashes what comes out.

    Args:
        folder: An empty folder.
        limits: Bounds for all archives together.
    """

    def __init__(self, folder: Path, limits: ArchiveLimits) -> None:
        self._folder, self._limits = folder, limits
        self._archive = Path()
        self._entries = self._files = self._size = 0
        self._seen: dict[str, str] = {}  # folded path -> path
        self._folders = {""}
        self._sha256: dict[str, str] = {}
        self._links: list[tuple[str, str]] = []  # path, path of its target
        for name in RESERVED_NAMES:
            self._seen[_fold(name)] = name

    def unpack(self, archive: Path, progress: Callable[[int, int], None]) -> None:
        """Unpack one archive.

        Args:
            archive: A zip, a tar, or a tar compressed with gzip, bzip2 or xz; told by its bytes.
            progress: Called with the bytes of the archive that are read, and all its bytes.

        Raises:
            ConfigError: It exceeds the limits; NotAnArchive if it is no such archive.
            DataError: It is damaged, or has an entry that is refused.
        """
        self._archive = archive
        total = archive.stat().st_size
        with archive.open("rb") as file, self._damage():
            head = file.read(512)
            file.seek(0)
            if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
                self._unpack_zip(file, lambda done: progress(done, total))
            elif (stream := _tar_stream(head, file)) is not None:
                self._unpack_tar(stream, lambda: progress(file.tell(), total))
            else:
                raise _not_an_archive(archive, head)
        progress(total, total)

    def finish(self) -> Unpacked:
        """Copy the targets of links, and write the list of hashes."""
        pending = self._links
        while True:
            left = [link for link in pending if not self._copy_target(*link)]
            if len(left) == len(pending):
                break
            pending = left
        return Unpacked(
            files=self._files,
            images=sum(path.encode().lower().endswith(IMAGE_SUFFIXES) for path in self._sha256),
            size=self._size,
            links_left_out=len(pending),
        )

    def write_listing(self) -> None:
        """Write the hash of every file, those that were added afterwards included."""
        with (self._folder / LISTING).open("x", encoding="utf-8") as listing:
            for path in sorted(self._sha256):
                listing.write(f"{self._sha256[path]}  {path}\n")

    def add(self, path: str) -> None:
        """Hash a file that was written into the folder afterwards."""
        with (self._folder / path).open("rb") as file:
            self._sha256[path] = hashlib.file_digest(file, "sha256").hexdigest()

    # ------------------------------------------------------------------------------- zip

    def _unpack_zip(self, file: IO[bytes], progress: Callable[[int], None]) -> None:
        done = 0
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                name = self._zip_name(entry)
                if entry.flag_bits & 0x41:  # bits 0 and 6: encrypted, strongly encrypted
                    self._refuse(name, "is encrypted", "remove the password from the archive")
                kind = stat.S_IFMT(entry.external_attr >> 16)
                if kind not in (0, stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
                    self._refuse(name, "is a device or the like")
                is_folder = name.endswith("/")  # is_dir() fails for an empty name
                path = self._register(name, is_folder=is_folder)
                if is_folder:
                    continue
                try:
                    data = archive.open(entry)
                except NotImplementedError as error:
                    self._refuse(name, f"cannot be unpacked ({error})")
                with data:
                    if kind == stat.S_IFLNK:
                        target = data.read(MAX_LINK_BYTES + 1)
                        self._add_link(path, self._decode(target, name), posixpath.dirname(path))
                    else:
                        self._write(path, data)
                done += entry.compress_size
                progress(done)

    def _zip_name(self, entry: zipfile.ZipInfo) -> str:
        """The name of an entry, as UTF-8."""
        name = entry.orig_filename
        if entry.flag_bits & 0x800 or name.isascii():
            return name
        # Without the flag, zipfile takes the name for cp437. Many programs write UTF-8 all the
        # same; names in other encodings cannot be told apart.
        return self._decode(name.encode("cp437"), ascii(name))

    def _decode(self, data: bytes, name: str) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError:
            self._refuse(name, "has a name that is not UTF-8", "pack the files with UTF-8 names")

    # ------------------------------------------------------------------------------- tar

    def _unpack_tar(self, stream: IO[bytes], progress: Callable[[], None]) -> None:
        limit = self._limits.max_bytes + 4096 * self._limits.max_files
        reader = _TarReader(stream, limit, self._archive)
        opened: Any = {"fileobj": reader, "encoding": "utf-8", "errors": "surrogateescape"}
        try:
            tar: Any = tarfile.TarFile(**opened)
        except tarfile.ReadError as error:
            raise _not_an_archive(self._archive, b"?") from error
        with tar:
            while True:
                reader.begin_header()
                entry = tar.next()
                if entry is None:
                    break
                tar.members.clear()  # else every entry stays in memory
                self._unpack_tar_entry(tar, entry, reader)
                progress()
            reader.check_end()

    def _unpack_tar_entry(
        self, tar: tarfile.TarFile, entry: tarfile.TarInfo, reader: _TarReader
    ) -> None:
        name = entry.name
        if entry.issparse() or not (
            entry.isreg() or entry.isdir() or entry.issym() or entry.islnk()
        ):
            self._refuse(name, "is a device, a sparse file or the like")
        path = self._register(name, is_folder=entry.isdir())
        if entry.islnk():
            self._add_link(path, entry.linkname, "")
        elif entry.issym():
            self._add_link(path, entry.linkname, posixpath.dirname(path))
        # Python's own filter for data, as a second opinion.
        try:
            tarfile.data_filter(entry, str(self._folder))
        except tarfile.FilterError as error:
            self._refuse(name, f"is refused by Python's data filter ({type(error).__name__})")
        if entry.isreg():
            reader.begin_data(entry.size)
            data = tar.extractfile(entry)
            assert data is not None
            with data:
                self._write(path, data)

    # ----------------------------------------------------------------------------- entries

    def _register(self, name: str, *, is_folder: bool) -> str:
        """Check the name of an entry and create its folders; its path."""
        self._entries += 1
        if self._entries > self._limits.max_files:
            raise ConfigError(
                f"{self._archive} has more than {self._limits.max_files:,} entries.",
                f"at most {self._limits.max_files:,} files and folders (--max-files).",
                "raise --max-files if you trust the archive.",
            )
        try:
            path = checked_path(name)
        except ValueError as error:
            self._refuse(name, str(error))
        if not path:  # the entry "./" of the folder itself
            if not is_folder:
                self._refuse(name, "names no file")
            return path
        parts = path.split("/")
        for depth in range(1, len(parts)):
            self._add_folder("/".join(parts[:depth]), name)
        if is_folder:
            self._add_folder(path, name)
        else:
            self._claim(path, name)
        return path

    def _claim(self, path: str, name: str) -> None:
        """Refuse the entry `name` if another one has this path, or nearly."""
        folded = _fold(path)
        if (known := self._seen.get(folded)) is not None:
            twice = known == path and path not in RESERVED_NAMES
            what = "is there twice" if twice else f"has a name too similar to {known!r}"
            self._refuse(name, what)
        self._seen[folded] = path

    def _add_folder(self, path: str, name: str) -> None:
        if path in self._folders:
            return
        self._claim(path, name)
        self._folders.add(path)
        (self._folder / path).mkdir()

    def _add_link(self, path: str, target: str, start: str) -> None:
        """Remember a link; `start` is the folder that its target is relative to."""
        where = posixpath.normpath(posixpath.join(start, target))
        if target.startswith("/") or where == ".." or where.startswith("../") or "\\" in target:
            self._refuse(path, f"is a link that leads out of the archive, to {target!r}")
        self._links.append((path, where))

    def _copy_target(self, path: str, target: str) -> bool:
        """Replace a link by a copy of its target; False if that is no file."""
        if target not in self._sha256:
            return False
        with (self._folder / target).open("rb") as data:
            self._write(path, data)
        return True

    def _write(self, path: str, data: IO[bytes]) -> None:
        """Write a new file and count its bytes."""
        sha256 = hashlib.sha256()
        with (self._folder / path).open("xb") as file:  # x: never through a link, never twice
            while block := data.read(CHUNK_BYTES):
                self._size += len(block)
                if self._size > self._limits.max_bytes:
                    raise ConfigError(
                        f"More than {self._limits.max_bytes:,} bytes come out of {self._archive}.",
                        f"at most {self._limits.max_bytes:,} bytes (--max-bytes).",
                        "raise --max-bytes if you trust the archive.",
                    )
                sha256.update(block)
                file.write(block)
        self._files += 1
        self._sha256[path] = sha256.hexdigest()

    def _refuse(self, name: str, what: str, do: str = "") -> NoReturn:
        raise DataError(
            f"{self._archive}: the entry {_shown(name)} {what}. Nothing was unpacked.",
            "files and folders with relative UTF-8 names that differ, and links among them.",
            (do or "do not trust the archive; ask for one without such entries") + ".",
        )

    @contextmanager
    def _damage(self) -> Iterator[None]:
        """Turn the errors of a damaged archive into a DataError."""
        try:
            yield
        except (*_DAMAGED, ValueError, struct.error) as error:
            raise _damaged(self._archive, str(error)) from error
        except OSError as error:
            if error.errno is not None:
                raise
            raise _damaged(self._archive, str(error)) from error  # of bz2, without a number


def checked_path(name: str) -> str:
    """The path of an archive's entry, relative to the folder that it is unpacked into.

    Args:
        name: As the archive has it.

    Returns:
        Parts that are neither empty nor "." nor "..", joined by "/"; "" for the folder itself.

    Raises:
        ValueError: It leads elsewhere, or no file can have it; the text continues "the entry …".
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError("has a name that is not UTF-8") from None
    if name.startswith("/"):
        raise ValueError("has an absolute path")
    if "\\" in name:
        raise ValueError("has a backslash in its name")
    if re.match(r"[A-Za-z]:", name):
        raise ValueError("has the letter of a drive in its path")
    if any(unicodedata.category(character) == "Cc" for character in name):
        raise ValueError("has a control character in its name")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise ValueError('has ".." in its path')
    path = "/".join(parts)
    too_long = any(len(part.encode()) > MAX_NAME_BYTES for part in parts)
    if too_long or len(path.encode()) > MAX_PATH_BYTES or len(parts) > MAX_DEPTH:
        raise ValueError("has a path that is too long")
    return path


def _fold(path: str) -> str:
    """What a path is on a file system that ignores case and the composition of letters."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


class _TarReader:
    """The bytes of a tar file, read forwards, with bounds for what tarfile reads at once.

    tarfile reads the headers of long names into memory, whatever length they claim.

    Args:
        stream: The decompressed bytes.
        limit: Bytes that may come out of it.
        archive: For messages.
    """

    def __init__(self, stream: IO[bytes], limit: int, archive: Path) -> None:
        self._stream, self._limit, self._archive = stream, limit, archive
        self._position = 0
        self._allowed = MAX_HEADER_BYTES
        self._last = b""

    def begin_header(self) -> None:
        """The next bytes are the header of an entry."""
        self._allowed = MAX_HEADER_BYTES

    def begin_data(self, size: int) -> None:
        """The next bytes are the content of an entry, which is read in pieces."""
        self._allowed = size

    def read(self, size: int = -1) -> bytes:
        """The next bytes; fewer at the end."""
        if not 0 <= size <= self._allowed:
            raise _damaged(self._archive, "a header is too large")
        self._allowed -= size
        self._last = self._take(size)
        return self._last

    def _take(self, size: int) -> bytes:
        blocks = []
        while size > 0 and (block := self._stream.read(min(size, CHUNK_BYTES))):
            blocks.append(block)
            size -= len(block)
            self._position += len(block)
            if self._position > self._limit:
                raise ConfigError(
                    f"{self._archive} is larger than the bounds allow.",
                    f"at most {self._limit:,} bytes in it (--max-bytes, --max-files).",
                    "raise --max-bytes if you trust the archive.",
                )
        return b"".join(blocks)

    def tell(self) -> int:
        """The position in the decompressed bytes."""
        return self._position

    def seek(self, position: int, whence: int = 0) -> int:
        """Skip to a position further on."""
        if whence or position < self._position:
            raise _damaged(self._archive, "an entry begins before the end of the one before")
        while (left := position - self._position) > 0:
            if not self._take(min(left, CHUNK_BYTES)):
                break
        return self._position

    def check_end(self) -> None:
        """Check that the archive ends with its end mark, and that its checksum is right.

        tarfile takes a damaged header for the end.
        """
        if self._last != bytes(tarfile.BLOCKSIZE):
            raise _damaged(self._archive, "it ends in the middle, or a header is damaged")
        while self._take(CHUNK_BYTES):
            pass


class _XzReader(io.RawIOBase):
    """The bytes of an xz file, with a bound for the memory that its dictionary takes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._rest = file, b""
        self._decompressor: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            ended = self._decompressor is None or self._decompressor.eof
            if ended and not self._begin_stream():
                return 0
            if self._decompressor.needs_input and not self._rest:
                self._rest = self._file.read(CHUNK_BYTES)
                if not self._rest:
                    raise EOFError("the compressed data ends in the middle")
            data = self._decompressor.decompress(self._rest, len(buffer))
            self._rest = self._decompressor.unused_data
            if data:
                buffer[: len(data)] = data
                return len(data)

    def _begin_stream(self) -> bool:
        """Begin a compressed stream, of which a file may hold several; False at the end."""
        rest = self._rest.lstrip(b"\0")  # padding between two streams
        while not rest and (block := self._file.read(CHUNK_BYTES)):
            rest = block.lstrip(b"\0")
        if not rest:
            return False
        self._rest = rest
        self._decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY_BYTES)
        return True


def _tar_stream(head: bytes, file: IO[bytes]) -> Any:
    """The decompressed bytes of a tar file; None if it is none."""
    if head.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=file, mode="rb")
    if head.startswith(b"BZh"):
        return bz2.BZ2File(file)
    if head.startswith(b"\xfd7zXZ\0"):
        return io.BufferedReader(_XzReader(file))
    return file if head[257:262] == b"ustar" or _is_old_tar(head) else None


def _is_old_tar(head: bytes) -> bool:
    """Whether a header without a signature has the checksum of a tar header."""
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _not_an_archive(archive: Path, head: bytes) -> NotAnArchive:
    start = head.lstrip().lower()
    found = "neither a zip nor a tar archive"
    do = "give an archive; one that is damaged has to be downloaded again"
    if not head:
        found = "empty"
    elif start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<script")):
        found = "a web page, not an archive"
        do = "open the address in a browser: it may want you to sign in; give the file's own"
    for magic, kind, fix in _OTHER_KINDS:
        if head.startswith(magic):
            found, do = kind, fix
    return NotAnArchive(
        f"{archive} is {found}.", "a zip, or a tar (.tar, .tar.gz, .tar.bz2, .tar.xz).", f"{do}."
    )


def _damaged(archive: Path, reason: str) -> DataError:
    detail = f" ({reason})" if reason else ""
    return DataError(
        f"{archive} is damaged{detail}. Nothing was unpacked.",
        "a complete archive.",
        "get a complete copy of it; a download is removed, so run the same command again.",
    )


def _shown(name: str) -> str:
    text = name if len(name) <= 80 else f"{name[:77]}…"
    return repr(text)
