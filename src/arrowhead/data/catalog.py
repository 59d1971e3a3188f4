"""The catalog: every file of a source with its size, stamp, labels and split."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.data import reading


@dataclass(frozen=True, kw_only=True, slots=True)
class Catalog:
    """One row per file, sorted by path; N rows.

    root: text of the resolved folder, or a URI; paths: text of each path below it (see
    `text`); sizes: int64 (N,) bytes, -1 where the file could not be looked at; stamps: int64
    (N,), see `listing`; labels: tuples of class names, sorted, empty without labels; splits: train,
    valid, test, or "" until it is drawn; tries: uint8 (N,), how often a file that could not be read
    became readable later: part of its shard's name; ignored: number of files seen and left out
    (hidden files, system files, sidecars, files outside any class folder); source: text of the
    table that names the files, "" where a folder is listed; empty: class folders without an image,
    such as train/fox; notes: how the source was read, sentences for a person.
    """

    root: str
    paths: list[str]
    sizes: NDArray[np.int64]
    stamps: NDArray[np.int64]
    labels: list[tuple[str, ...]]
    splits: list[str]
    tries: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    ignored: int = 0
    source: str = ""
    empty: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.tries) == 0:
            object.__setattr__(self, "tries", np.zeros(len(self.paths), np.uint8))

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def classes(self) -> list[str]:
        """Names of the classes, sorted: position is the label's number."""
        return sorted({name for names in set(self.labels) for name in names})

    @property
    def multi(self) -> bool:
        """Whether any image has more than one label."""
        return any(len(names) > 1 for names in set(self.labels))

    def part(self, rows: range) -> Catalog:
        """Some of its rows, as a catalog of their own."""
        here = slice(rows.start, rows.stop)
        names = ("paths", "sizes", "stamps", "labels", "splits", "tries")
        return replace(self, **{name: getattr(self, name)[here] for name in names})

    def read(self, row: int, max_bytes: int) -> tuple[bytes, str | None]:
        """A row's bytes and None, or no bytes and the fault: also if it changed since the listing.

        May be called from many threads at once.
        """
        size, stamp = int(self.sizes[row]), int(self.stamps[row])
        return reading.read(self.root, self.paths[row], max_bytes, size, stamp)

    def columns(self) -> dict[str, Any]:
        """The fields by name, as `catalog_file.write_catalog` takes them."""
        said = ("empty", "notes")
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name not in said}

    def digest(self) -> str:
        """Hash of what is in the catalog, whoever lists it and wherever the root lies."""
        total = hashlib.blake2b(digest_size=16)
        rows = zip(self.paths, self.sizes.tolist(), self.labels, self.splits, strict=True)
        while part := "".join(map(repr, itertools.islice(rows, 4096))):
            total.update(part.encode())
        return total.hexdigest()
