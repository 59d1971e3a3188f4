"""Folders of images to a catalog, and the catalog to chunks.

    a folder on disk       names and sizes; no file is opened
      -> catalog           one row per file, sorted by path: path, size, mtime, labels, split
      -> chunks            runs of neighbouring rows, cut where a path's own hash says so

Everything after the listing is arithmetic: who extracts what is a function of the catalog
alone, so any number of workers, at any time, agree on it.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import stat
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead import ConfigError

JUNK = {b"Thumbs.db", b"desktop.ini", b"__MACOSX"}
SPLITS = ("train", "valid", "test")
_ESCAPED = re.compile(r"\\(?:\\|x[0-9a-f]{2})")


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """Where the labels come from when a folder does not say which images validate."""

    valid_share: float = 0.2
    """Share of images held out for validation, 0 to 1, when DATA has no train/ and valid/.
    Drawn from each file's content, so copies of one image never fall on both sides."""

    def __post_init__(self) -> None:
        if not 0 < self.valid_share < 1:
            raise ConfigError(
                f"--valid-share is {self.valid_share}.",
                "a share of the images, more than 0 and less than 1.",
                "give a share such as 0.2.",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Catalog:
    """One row per file, sorted by path; N rows.

    paths: text of each path below `root` (see `text`); sizes: int64 (N,) bytes, -1 where the
    file could not be looked at; stamps: int64 (N,) nanoseconds; labels: tuples of class names,
    empty without labels; splits: train, valid, test, or "" until it is drawn; ignored: number of
    files seen and left out (hidden files, system files, files outside any class folder).
    """

    root: str
    paths: list[str]
    sizes: NDArray[np.int64]
    stamps: NDArray[np.int64]
    labels: list[tuple[str, ...]]
    splits: list[str]
    ignored: int = 0

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def classes(self) -> list[str]:
        """Names of the classes, sorted: position is the label's number."""
        return sorted({name for names in self.labels for name in names})

    def file(self, row: int) -> bytes:
        """The name under which the file system knows this row's file."""
        return os.path.join(raw(self.root), raw(self.paths[row]))

    def columns(self) -> dict[str, Any]:
        """The fields by name, as `shards.write_catalog` takes them."""
        return {name.name: getattr(self, name.name) for name in fields(self)}

    def digest(self) -> str:
        """Hash of what is in the catalog, whoever lists it and wherever the root lies."""
        total = hashlib.blake2b(digest_size=16)
        for row in zip(self.paths, self.sizes.tolist(), self.labels, self.splits, strict=True):
            total.update(repr(row).encode())
        return total.hexdigest()


# ------------------------------------------------------------------ names of files, as text


def text(raw: bytes) -> str:
    r"""A file name as text that is valid UTF-8, safe on a screen, and leads back to the name.

    Bytes that are not UTF-8, control characters and the backslash become \xNN or \\.
    """
    out = []
    for char in raw.decode("utf-8", "surrogateescape"):
        if char == "\\":
            out.append("\\\\")
        elif "\udc80" <= char <= "\udcff":
            out.append(f"\\x{ord(char) - 0xDC00:02x}")
        elif char.isprintable():
            out.append(char)
        else:  # control characters, line separators, marks that turn writing around
            out.extend(f"\\x{byte:02x}" for byte in char.encode())
    return "".join(out)


def raw(path: str) -> bytes:
    """The file name that `text` was made from."""
    out, at = bytearray(), 0
    for match in _ESCAPED.finditer(path):
        out += path[at : match.start()].encode()
        out += b"\\" if match[0] == "\\\\" else bytes.fromhex(match[0][2:])
        at = match.end()
    return bytes(out + path[at:].encode())


# ----------------------------------------------------------------------------- listing


def labelled(root: Path) -> Catalog:
    """Images with labels: ROOT/{train,valid[,test]}/<class>/… or ROOT/<class>/….

    With the second layout `splits` is "" in every row, to be drawn with `drawn` once the
    contents have been read.
    Raises ConfigError for a missing or empty folder, one class, classes unknown to train/.
    """
    _must_be_folder(root)
    has_splits = (root / "train").is_dir()
    if has_splits and not (root / "valid").is_dir():
        raise ConfigError(
            f"{root} has train/ but no valid/.",
            "both, with one folder per class in each; or one folder per class and no train/.",
            f"make {root}/valid, or give {root}/train: a share of it is then held out.",
        )
    found, ignored = _files(root)
    rows = [row for row in found if len(_place(row[0], has_splits)[1]) > 0]
    catalog = _catalog(root, rows, ignored + len(found) - len(rows), has_splits)
    _must_have_classes(catalog)
    return catalog


def unlabelled(root: Path) -> Catalog:
    """Every file below a folder, whatever the folders are called; no labels, no split."""
    _must_be_folder(root)
    rows, ignored = _files(root)
    _must_have_images(root, len(rows))
    return _catalog(root, rows, ignored, None)


def _catalog(
    root: Path, rows: list[tuple[bytes, int, int]], ignored: int, has_splits: bool | None
) -> Catalog:
    rows = sorted((text(path), size, mtime) for path, size, mtime in rows)  # type: ignore[misc]
    places = [
        ("", ()) if has_splits is None else _place(raw(str(path)), has_splits) for path, *_ in rows
    ]
    return Catalog(
        root=text(os.fsencode(root.resolve())),
        paths=[str(path) for path, *_ in rows],
        sizes=np.array([size for _, size, _ in rows], np.int64),
        stamps=np.array([mtime for *_, mtime in rows], np.int64),
        labels=[labels for _, labels in places],
        splits=[split for split, _ in places],
        ignored=ignored,
    )


def _place(path: bytes, has_splits: bool) -> tuple[str, tuple[str, ...]]:
    """Split and labels that a path's folders give; no labels where it lies in no class folder."""
    *folders, _ = path.split(b"/")
    if not has_splits:
        return "", tuple(text(folder) for folder in folders[:1])
    split = text(folders[0]) if folders else ""
    return split, tuple(text(f) for f in folders[1:2]) if split in SPLITS else ()


def _files(root: Path) -> tuple[list[tuple[bytes, int, int]], int]:
    """(path below root, size, mtime in ns) of every file that may be an image; number ignored."""
    found, ignored = [], 0
    waiting: list[tuple[bytes, bytes, frozenset[tuple[int, int]]]]
    waiting = [(os.fsencode(root), b"", frozenset())]
    while waiting:
        folder, below, above = waiting.pop()
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in above:  # a link back up the tree
            continue
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(b".") or entry.name in JUNK:
                    ignored += 1
                elif _is_folder(entry):
                    waiting.append((entry.path, below + entry.name + b"/", above | {here}))
                else:
                    found.append((below + entry.name, *_stamp(entry)))
    return found, ignored


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a ring: listed, and a fault when it is read
        return False


def _stamp(entry: os.DirEntry[bytes]) -> tuple[int, int]:
    try:
        status = entry.stat()
    except OSError:
        return -1, 0
    return status.st_size if stat.S_ISREG(status.st_mode) else -1, status.st_mtime_ns


def _must_be_folder(root: Path) -> None:
    if not root.is_dir():
        raise ConfigError(
            f"{root} is {'a file' if root.exists() else 'not there'}.",
            "a folder of images.",
            "check the spelling; `arrowhead demo` makes a folder to try.",
        )


def _must_have_images(root: Path, count: int) -> None:
    if count == 0:
        raise ConfigError(
            f"{root} holds no images.",
            "image files, in train/<class>/ and valid/<class>/, in <class>/, or loose for scoring.",
            "put images there, or give the folder above or below it.",
        )


def _must_have_classes(catalog: Catalog) -> None:
    _must_have_images(Path(catalog.root), len(catalog))
    in_train = {
        name
        for names, split in zip(catalog.labels, catalog.splits, strict=True)
        if split in ("train", "")
        for name in names
    }
    if len(catalog.classes) < 2:
        raise ConfigError(
            f"{catalog.root} has one class, {catalog.classes[0]!r}.",
            "two classes or more: a classifier chooses between them.",
            "add a folder of images of something else beside it.",
        )
    if unknown := sorted(set(catalog.classes) - in_train):
        raise ConfigError(
            f"{catalog.root}/train has no images of {', '.join(unknown)}.",
            "every class of valid/ and test/ also in train/.",
            "move some of its images to train/, or remove or rename that folder.",
        )


# -------------------------------------------------------------------------- arithmetic


def drawn(catalog: Catalog, image_ids: Sequence[bytes], valid_share: float) -> Catalog:
    """The catalog with the splits that were "" drawn from the image ids (16 bytes each)."""
    limit = int(valid_share * 2**64)
    splits = [
        split or ("valid" if int.from_bytes(image_id[:8], "big") < limit else "train")
        for split, image_id in zip(catalog.splits, image_ids, strict=True)
    ]
    return replace(catalog, splits=splits)


def chunks(paths: Sequence[str], size: int) -> list[range]:
    """Runs of rows over all of them, `size` long on average; only the last is shorter than half.

    A row ends its run when the CRC-32 of its path is the smallest of all rows up to size/2 away.
    Nothing further off counts: a file added or removed moves borders up to that far away, so it
    changes three chunks at most, and every other shard stays as it is.
    """
    if not paths:
        return []
    reach = size // 2
    codes = np.array([zlib.crc32(path.encode()) for path in paths], np.int64)
    codes = (codes << 20) + np.arange(len(codes)) % 2**20  # no two neighbours alike
    padded = np.pad(codes, reach, constant_values=np.iinfo(np.int64).max)
    lowest = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1).min(1)
    ends = np.flatnonzero(codes == lowest) + 1
    borders = [0, *ends[(ends > reach) & (ends < len(paths))].tolist(), len(paths)]
    return [range(start, stop) for start, stop in itertools.pairwise(borders)]


def chunk_name(catalog: Catalog, rows: range, fingerprint: str) -> str:
    """Name of the shard that holds these rows: a hash of the files' stamps and the recipe.

    Size and mtime count: a file replaced under its old name belongs to another shard.
    """
    total = hashlib.blake2b(fingerprint.encode(), digest_size=12)
    for row in rows:
        stamp = f"{catalog.sizes[row]}\t{catalog.stamps[row]}\n"
        total.update(catalog.paths[row].encode() + b"\t" + stamp.encode())
    return total.hexdigest()


def share(count: int, rank: int, world: int) -> range:
    """The rows of one worker out of `count`: a run of neighbours, sizes at most one apart."""
    return range(count * rank // world, count * (rank + 1) // world)
