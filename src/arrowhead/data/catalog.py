"""The catalog: one row per image, with its size, stamp, labels and split.

An image is a file, or it lies in a container: a tar, Parquet or Arrow file (see `containers`).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.data import containers, reading, row_files


@dataclass(frozen=True, kw_only=True, slots=True)
class Catalog:
    """One row per image, sorted by path; N rows.

    Attributes:
        root: The resolved folder as escaped text (see `path_text`), or a URI.
        paths: Escaped path of each file below it; in a container, that of the container, followed
            by / and the name of the image in it.
        sizes: int64 (N,) bytes, -1 where stat failed, and for rows of Parquet and Arrow files.
        stamps: int64 (N,), a value that changes when the file or the container does (see
            `listing`).
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
        containers: Escaped path of each image's container below the root, "" for a file; empty if
            all images are files.
        offsets: int64 (N,), where the image is in its container: a byte of a tar, the number of a
            row; empty if all images are files.
        image_column: The column of Parquet and Arrow files that holds the images.
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
    containers: list[str] = field(default_factory=list)
    offsets: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    image_column: str = ""

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
        names = ("paths", "sizes", "stamps", "labels", "splits", "tries", "containers", "offsets")
        corrected = {
            row - rows.start: names for row, names in self.source_labels.items() if row in rows
        }
        columns = {name: getattr(self, name)[selection] for name in names}
        return replace(self, **columns, source_labels=corrected)

    def select(self, mask: Sequence[bool]) -> Catalog:
        """The rows for which the mask is true; the others count as ignored."""
        mask_N = np.array(mask, bool)
        left_out = int((~mask_N).sum())
        if not left_out:
            return self
        columns: dict[str, Any] = {
            name: list(itertools.compress(getattr(self, name), mask))
            for name in ("paths", "labels", "splits", "containers")
        }
        columns |= {name: getattr(self, name)[mask_N] for name in ("sizes", "stamps", "tries")}
        if self.containers:
            columns["offsets"] = self.offsets[mask_N]
        return replace(self, **columns, ignored=self.ignored + left_out)

    def read_file(self, row: int, max_bytes: int) -> tuple[bytes, str | None]:
        """The bytes of a row's image and None, or no bytes and the fault.

        A file or container that changed since it was listed is a fault, too. Thread-safe.
        """
        return self.read_span(range(row, row + 1), max_bytes)[0]

    def spans(self) -> Iterator[range]:
        """Consecutive rows that are read in one go: neighbours in a tar; other rows alone."""
        start = 0
        for row in range(1, len(self) + 1):
            if row == len(self) or not self._is_neighbour(row, start):
                yield range(start, row)
                start = row

    def _is_neighbour(self, row: int, start: int) -> bool:
        """Whether a row belongs to the span of rows that begins at `start`."""
        if not self.containers or self.in_order or self.containers[row] != self.containers[start]:
            return False
        offset, stop = int(self.offsets[row]), int(self.offsets[row - 1] + self.sizes[row - 1])
        return (
            row - start < containers.MAX_SPAN_ROWS
            and stop <= offset <= stop + containers.MAX_GAP_BYTES
            and offset + int(self.sizes[row]) - int(self.offsets[start])
            <= containers.MAX_SPAN_BYTES
        )

    def read_span(self, rows: range, max_bytes: int) -> list[tuple[bytes, str | None]]:
        """The rows of a span (see `spans`), each as `read_file` returns it. Thread-safe."""
        row = rows.start
        size, stamp = int(self.sizes[row]), int(self.stamps[row])
        container = self.containers[row] if self.containers else ""
        if not container:
            return [reading.read_file(self.root, self.paths[row], max_bytes, size, stamp)]
        if containers.kind_of(container) == "tar":
            places = [(int(self.offsets[one]), int(self.sizes[one])) for one in rows]
            return containers.read_members(self.root, container, stamp, places, max_bytes)
        place = row_files.Column(self.root, container, stamp, self.image_column)
        return [row_files.read_row(place, int(self.offsets[row]), max_bytes)]

    @property
    def in_order(self) -> bool:
        """Whether images are read fastest one after another: they are rows of Parquet files."""
        return bool(self.image_column)

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
