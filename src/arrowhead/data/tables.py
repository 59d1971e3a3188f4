"""Tables and lists of images: from a file as people save it to paths, labels and splits.

    bytes                  UTF-8, UTF-16 or Windows-1252; with , ; tab or |
      -> columns           named by flags, else guessed from their names where that is clear
      -> rows              path, labels, split of each line
      -> files             where each path leads to; names alone are looked for in folders below

What was guessed is said in `Rows.notes`. What could be meant in two ways is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from arrowhead.data import named_files, path_text, reading
from arrowhead.data import sheet as data_sheet
from arrowhead.data.sheet import TABLES, Sheet
from arrowhead.data.source_config import SourceConfig
from arrowhead.errors import ConfigError

LISTS = (".txt", ".lst")
MAX_TABLE_BYTES = 2**31


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """What a table or list says, N rows in its order.

    root: text of the folder or URI that holds all files; paths: text of each below it; sizes,
    stamps: int64 (N,), see `listing.look`; labels: tuples of class names, sorted; splits: train,
    valid, test or ""; lines: where each row starts; notes: sentences for a person.
    """

    root: str
    paths: list[str]
    sizes: NDArray[np.int64]
    stamps: NDArray[np.int64]
    labels: list[tuple[str, ...]]
    splits: list[str]
    lines: list[int]
    notes: tuple[str, ...]


def is_table(source: str | Path) -> bool:
    """Whether a source is named like a table or list and is no folder."""
    name = os.fspath(source)
    return name.lower().endswith((*TABLES, *LISTS)) and not Path(name).is_dir()


def is_list(source: str | Path) -> bool:
    """Whether a table is a mere list of paths."""
    return os.fspath(source).lower().endswith(LISTS)


def must_be_readable(source: str | Path) -> None:
    """Refuse a table or list that is not there or is no text."""
    _content(os.fspath(source), named_files.absolute(os.fspath(source)))


def read(source: str | Path, config: SourceConfig, *, labelled: bool) -> Rows:
    """The rows of a table (.csv, .tsv) or list (.txt, .lst); with labels and splits if `labelled`.

    Raises ConfigError, with file and line, for what cannot be read or meant.
    """
    name, table = os.fspath(source), named_files.absolute(os.fspath(source))
    base = named_files.absolute(config.images) if config.images else table.rpartition(b"/")[0]
    content = _content(name, table)
    suffix = config.suffix.encode("utf-8", "surrogateescape")
    notes: list[str] = []
    labels: list[tuple[str, ...]] = []
    splits: list[str] = []
    if is_list(source):
        pairs = [(at, path + suffix) for at, path in enumerate(_lines(name, content), 1) if path]
        lines, cells = [at for at, _ in pairs], [path for _, path in pairs]
    else:
        sheet = Sheet.of(name, content, config, labelled, notes)
        lines, cells = [], []
        split_of = sheet.splitter(notes) if labelled else None
        labels_of = sheet.labeller(config, notes) if labelled else None
        for line, row in sheet.rows():
            if not row[sheet.path] or "\0" in row[sheet.path]:
                raise data_sheet.refused(name, line, "has no path, or one that no file can have")
            lines.append(line)
            cells.append(row[sheet.path].encode("utf-8", "surrogateescape") + suffix)
            labels.append(labels_of(line, row) if labels_of else ())
            splits.append(split_of(line, row) if split_of else "")
    if not cells:
        raise ConfigError(
            f"{name} names no images.", "a path in every line.", "write the paths into it."
        )
    found = named_files.find(name, base, cells, lines, notes)
    if labelled:
        _must_be_named_once(name, found.paths, lines)
    return Rows(
        root=found.root,
        paths=found.paths,
        sizes=found.sizes,
        stamps=found.stamps,
        labels=labels or [()] * len(cells),
        splits=splits or [""] * len(cells),
        lines=lines,
        notes=tuple(notes),
    )


def _content(source: str, table: bytes) -> bytes:
    """The bytes of a table or list."""
    folder, _, leaf = table.rpartition(b"/")
    content, fault = reading.read(
        path_text.escape_path(folder or b"/"), path_text.escape_path(leaf), MAX_TABLE_BYTES
    )
    if fault:
        raise ConfigError(
            f"{source} cannot be read: {fault}.",
            "a folder of images, or a table of them with the columns path and label.",
            "check the spelling.",
        )
    if content.startswith((b"PK\x03\x04", b"\x1f\x8b", b"\xd0\xcf\x11\xe0", b"PAR1", b"%PDF")):
        raise ConfigError(
            f"{source} is no text: it is a workbook, an archive or the like, whatever its name.",
            "a table as text, with a line for each image.",
            "save it as CSV (in Excel: Save As, CSV UTF-8).",
        )
    return content


def _lines(source: str, content: bytes) -> Iterator[bytes]:
    """The path in each line of a list; b"" for an empty line."""
    content = data_sheet.decoded(source, content).encode("utf-8", "surrogateescape")
    for line in content.split(b"\n"):
        path = line.removesuffix(b"\r")
        yield path if path.strip() else b""


def _must_be_named_once(source: str, paths: list[str], lines: list[int]) -> None:
    first: dict[str, int] = {}
    for path, line in zip(paths, lines, strict=True):
        if (before := first.setdefault(path, line)) != line:
            raise ConfigError(
                f"{source} names {path} twice, in lines {before} and {line}.",
                "one line for each image.",
                "take one of them out; several labels of an image stand in one line.",
            )
