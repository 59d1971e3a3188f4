"""The catalog: one row per image file, with its size, stamp, labels and split."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.data import reading


@dataclass(frozen=True, kw_only=True, slots=True)
class Catalog:
    """One row per file, sorted by path; N rows.

    Attributes:
        root: The resolved folder as escaped text (see `path_text`), or a URI.
        paths: Escaped path of each file below it.
        sizes: int64 (N,) bytes, -1 where stat failed.
        stamps: int64 (N,), a value that changes when the file does (see `listing`).
        labels: Sorted class names of each file, empty without labels.
        splits: train, valid, test, or "" until the split is drawn.
        tries: uint8 (N,), how often a file that could not be read became readable later; part of
            the name of its shard.
        ignored: Number of files that are no rows (hidden and system files, sidecars, files outside
            class folders).
        source_labels: What the source says, by row, about the images whose label was corrected.
        source: Escaped path of the table that lists the files, "" for a folder.
        dropped: Escaped paths that a drop list names, whether or not they were there; sorted.
        empty_folders: Class folders without an image, such as train/fox.
        notes: Sentences for the user about how the source was read.
    """

    root: str
    paths: list[str]
    sizes: NDArray[np.int64]
    stamps: NDArray[np.int64]
    labels: list[tuple[str, ...]]
    splits: list[str]
    tries: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    ignored: int = 0
    source_labels: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    source: str = ""
    dropped: tuple[str, ...] = ()
    empty_folders: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.tries) == 0:
            object.__setattr__(self, "tries", np.zeros(len(self.paths), np.uint8))

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def classes(self) -> list[str]:
        """Sorted class names; a class's position is its label index."""
        return sorted({name for names in set(self.labels) for name in names})

    @property
    def multi(self) -> bool:
        """Whether any image has more than one label."""
        return any(len(names) > 1 for names in set(self.labels))

    def subset(self, rows: range) -> Catalog:
        """A catalog of some of the rows."""
        selection = slice(rows.start, rows.stop)
        names = ("paths", "sizes", "stamps", "labels", "splits", "tries")
        corrected = {
            row - rows.start: names for row, names in self.source_labels.items() if row in rows
        }
        columns = {name: getattr(self, name)[selection] for name in names}
        return replace(self, **columns, source_labels=corrected)

    def read_file(self, row: int, max_bytes: int) -> tuple[bytes, str | None]:
        """The bytes of a row's file and None, or no bytes and the fault.

        A file that changed since it was listed is a fault, too. Thread-safe.
        """
        size, stamp = int(self.sizes[row]), int(self.stamps[row])
        return reading.read_file(self.root, self.paths[row], max_bytes, size, stamp)

    def columns(self) -> dict[str, Any]:
        """The fields by name that `catalog_file.write_catalog` saves."""
        unsaved = ("dropped", "empty_folders", "notes")
        names = [field.name for field in fields(self) if field.name not in unsaved]
        return {name: getattr(self, name) for name in names}

    def digest(self) -> str:
        """Hash of the rows, independent of where the root is."""
        total = hashlib.blake2b(digest_size=16)
        rows = zip(self.paths, self.sizes.tolist(), self.labels, self.splits, strict=True)
        while part := "".join(map(repr, itertools.islice(rows, 4096))):
            total.update(part.encode())
        return total.hexdigest()
