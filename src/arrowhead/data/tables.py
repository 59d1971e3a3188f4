"""Read tables and lists of images: paths, labels and splits.

    bytes                  UTF-8, UTF-16 or Windows-1252; separated by , ; tab or |
      -> columns           named by flags, or guessed from the header where that is unambiguous
      -> rows              path, labels, split of each line
      -> files             resolved paths; bare names are searched in subfolders

Guesses are listed in `TableRows.notes`; ambiguous tables are refused. pandas reads the cells, but
neither finds the columns nor reports the line of a problem.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from arrowhead.data import named_files, path_text, reading, table_parser
from arrowhead.data.source_config import SourceConfig
from arrowhead.data.table_parser import TABLE_DELIMITERS, TableParser
from arrowhead.errors import ConfigError

LIST_SUFFIXES = (".txt", ".lst")
WANTED = "a folder of images, or a table of them with the columns path and label."
MAX_TABLE_BYTES = 2**31


@dataclass(frozen=True, kw_only=True, slots=True)
class TableRows:
    """The rows of a table or list, in its order; N rows.

    Attributes:
        root: Escaped path or URI of the folder that contains all files.
        paths: Escaped path of each file below it.
        sizes: int64 (N,) bytes, -1 for a missing file.
        stamps: int64 (N,), see `listing`.
        labels: Sorted class names of each file.
        splits: train, valid, test or "".
        lines: The line that each row starts in.
        notes: Sentences for the user.
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
    """Whether a source is named like a table or list and is not a folder."""
    name = os.fspath(source)
    return name.lower().endswith((*TABLE_DELIMITERS, *LIST_SUFFIXES)) and not Path(name).is_dir()


def is_list(source: str | Path) -> bool:
    """Whether a table is a list of paths only."""
    return os.fspath(source).lower().endswith(LIST_SUFFIXES)


def check_readable(source: str | Path) -> None:
    """Raise ConfigError for a table or list that does not exist or is not text."""
    read_content(os.fspath(source), named_files.absolute_path(os.fspath(source)))


def read_table(source: str | Path, config: SourceConfig, *, labelled: bool) -> TableRows:
    """Read a table (.csv, .tsv) or list (.txt, .lst).

    Args:
        source: Path or URI of the table.
        config: How to read it.
        labelled: Whether to read labels and splits.

    Raises:
        ConfigError: It cannot be read, or is ambiguous; names the file and line.
    """
    name, table = os.fspath(source), named_files.absolute_path(os.fspath(source))
    base = named_files.absolute_path(config.images) if config.images else table.rpartition(b"/")[0]
    content = read_content(name, table)
    suffix = config.suffix.encode("utf-8", "surrogateescape")
    notes: list[str] = []
    labels: list[tuple[str, ...]] = []
    splits: list[str] = []
    if is_list(source):
        numbered = [(n, path) for n, path in enumerate(_list_lines(name, content), 1) if path]
        lines, cells = [n for n, _ in numbered], [path + suffix for _, path in numbered]
    else:
        parser = TableParser.parse(name, content, config, labelled, notes)
        lines, cells = [], []
        split_of = parser.split_reader(notes) if labelled else None
        labels_of = parser.label_reader(config, notes) if labelled else None
        for line, row in parser.rows():
            if not row[parser.path] or "\0" in row[parser.path]:
                raise table_parser.line_error(
                    name, line, "has no path, or one that no file can have"
                )
            lines.append(line)
            cells.append(row[parser.path].encode("utf-8", "surrogateescape") + suffix)
            labels.append(labels_of(line, row) if labels_of else ())
            splits.append(split_of(line, row) if split_of else "")
    if not cells:
        raise ConfigError(
            f"{name} names no images.", "a path in every line.", "write the paths into it."
        )
    resolved = named_files.resolve_paths(name, base, cells, lines, notes)
    if labelled:
        _check_unique_paths(name, resolved.paths, lines)
    return TableRows(
        root=resolved.root,
        paths=resolved.paths,
        sizes=resolved.sizes,
        stamps=resolved.stamps,
        labels=labels or [()] * len(cells),
        splits=splits or [""] * len(cells),
        lines=lines,
        notes=tuple(notes),
    )


def read_cells(location: str) -> TableParser:
    """The cells of a table, without the roles of its columns.

    location: its escaped absolute path or URI, as in `Catalog.source`. Raises ConfigError if it
    cannot be read.
    """
    content = read_content(location, path_text.unescape_path(location))
    return TableParser.parse_cells(location, content)


def read_content(source: str, table: bytes, wanted: str = WANTED) -> bytes:
    """The bytes of a table or list.

    Args:
        source: The table as the user gave it.
        table: Its absolute path.
        wanted: What the user should give if it cannot be read.

    Raises:
        ConfigError: It cannot be read, or is not text.
    """
    folder, _, leaf = table.rpartition(b"/")
    content, fault = reading.read_file(
        path_text.escape_path(folder or b"/"), path_text.escape_path(leaf), MAX_TABLE_BYTES
    )
    if fault:
        raise ConfigError(
            f"{source} cannot be read: {fault}.",
            wanted,
            "check the spelling.",
        )
    if content.startswith((b"PK\x03\x04", b"\x1f\x8b", b"\xd0\xcf\x11\xe0", b"PAR1", b"%PDF")):
        raise ConfigError(
            f"{source} is not text: it is a workbook, an archive or the like, whatever its name.",
            "a table as text, with a line for each image.",
            "save it as CSV (in Excel: Save As, CSV UTF-8).",
        )
    return content


def _list_lines(source: str, content: bytes) -> Iterator[bytes]:
    """The path in each line of a list; b"" for an empty line."""
    content = table_parser.decode_text(source, content).encode("utf-8", "surrogateescape")
    for line in content.split(b"\n"):
        path = line.removesuffix(b"\r")
        yield path if path.strip() else b""


def _check_unique_paths(source: str, paths: list[str], lines: list[int]) -> None:
    first: dict[str, int] = {}
    for path, line in zip(paths, lines, strict=True):
        if (before := first.setdefault(path, line)) != line:
            raise ConfigError(
                f"{source} names {path} twice, in lines {before} and {line}.",
                "one line for each image.",
                "remove one of them; write several labels of an image into one line.",
            )
