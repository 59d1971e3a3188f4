r"""Read a table of new labels: the images that it names, and their labels.

path,label,suggested,score,new_label      as `label_errors.csv` has them; other columns are ignored
cats/7.jpg,cats,dogs,0.98,dogs            a row without a new label is left alone

The cells are those of a CSV file that Arrowhead wrote and a person edited, or of one that a person
wrote: escaped for spreadsheets or not, paths as catalogs hold them or as the disk does.
"""

from __future__ import annotations

import bisect
import difflib
import os
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from arrowhead import spreadsheet
from arrowhead.data import named_files, path_text, table_parser, tables
from arrowhead.data.source_config import SourceConfig
from arrowhead.data.table_parser import TableParser
from arrowhead.errors import ConfigError
from arrowhead.wording import pluralize

MAX_COMPARED_PATHS = 5000  # difflib compares some 20,000 a second


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelFixes:
    """The rows of a table that have a new label, in its order; M rows.

    Attributes:
        source: The table, as the user gave it.
        lines: The line that each row starts in.
        paths: Cells of the column of paths.
        new: Cells of the column of new labels.
        seen: Cells of the column label, "" where it is empty or missing.
        reasons: Cells of the column reason, "" where it is empty or missing.
        skipped: Number of rows without a new label.
    """

    source: str
    lines: list[int]
    paths: list[str]
    new: list[str]
    seen: list[str]
    reasons: list[str]
    skipped: int


def read_fixes(source: str | Path, column: str, path_column: str | None = None) -> LabelFixes:
    """Read a table (.csv, .tsv) of new labels.

    Args:
        source: Path or URI of the table.
        column: The column of new labels.
        path_column: The column of paths; found by its name or cells if not given.

    Raises:
        ConfigError: It cannot be read, lacks a column, or has no new label.
    """
    name = os.fspath(source)
    if not tables.is_table(source) or tables.is_list(source):
        raise ConfigError(
            f"{name} is not a table by its name.",
            "a file .csv or .tsv with the columns path and new_label.",
            "give such a file; `arrowhead relabel STORE --history` shows what was changed before.",
        )
    wanted = "a table with the columns path and new_label, such as label_errors.csv of a report."
    content = tables.read_content(name, named_files.absolute_path(name), wanted)
    config = SourceConfig(path_column=path_column)
    parser = TableParser.parse(name, content, config, labelled=False, notes=[])
    new = parser.find_column(column)
    if new is None or new == parser.path:
        raise _column_error(name, parser, column)
    seen, reason = parser.find_column("label"), parser.find_column("reason")
    if seen == new:
        seen = None
    rows = list(parser.rows())
    filled = [(line, row) for line, row in rows if row[new].strip()]
    if not filled:
        raise _no_labels_error(name, parser, len(rows), parser.names[new])
    for line, row in filled:
        if not row[parser.path].strip():
            raise table_parser.line_error(name, line, "has a new label but no path")

    def cells(column: int | None) -> list[str]:
        if column is None:
            return [""] * len(filled)
        return [spreadsheet.original_text(row[column]) for _, row in filled]

    return LabelFixes(
        source=name,
        lines=[line for line, _ in filled],
        paths=[row[parser.path] for _, row in filled],
        new=cells(new),
        seen=cells(seen),
        reasons=cells(reason),
        skipped=len(rows) - len(filled),
    )


def _column_error(source: str, parser: TableParser, column: str) -> ConfigError:
    others = [name for index, name in enumerate(parser.names) if index != parser.path]
    near = difflib.get_close_matches(column, others, n=1)
    such_as = f", such as --column {near[0]}" if near else ""
    do = f"name the column of new labels with --column{such_as}."
    if parser.find_column("suggested") is not None:
        do = "write the right labels into a column new_label, or take all suggestions with --column"
        do += " suggested."
    return ConfigError(
        f"{source} has no column {column} beside {parser.names[parser.path]}, which names the"
        f" images; its columns are {', '.join(parser.names)}.",
        "a column with the new label of each image; rows where it is empty are left alone.",
        do,
    )


def _no_labels_error(source: str, parser: TableParser, rows: int, column: str) -> ConfigError:
    suggested = parser.find_column("suggested") is not None and column != "suggested"
    return ConfigError(
        f"{source} has no row below its header."
        if not rows
        else f"{source} has {pluralize(rows, 'row')}, but column {column} is empty in all of them.",
        "a new label for at least one image.",
        f"write the right labels into column {column}"
        + (", or take all suggestions with --column suggested." if suggested else "."),
    )


# -------------------------------------------------------------------------------- paths


def find_row(row_by_path: Mapping[str, int], root: str, cell: str) -> int | None:
    """The row of the image that a cell names; None if there is none.

    Args:
        row_by_path: Row by path of a catalog.
        root: The catalog's root.
        cell: A path below the root, or an absolute one; as catalogs or as the disk have it.
    """
    for spelling in _spellings(cell, root):
        if (row := row_by_path.get(spelling)) is not None:
            return row
    return None


def _spellings(cell: str, root: str) -> Iterator[str]:
    """The paths below the root that a cell may mean, most literal first."""
    text = spreadsheet.original_text(cell)
    yield text
    yield cell
    decoded = named_files.decode_windows_1252(text)
    for name in dict.fromkeys((text, decoded, text.strip(), text.strip().replace("\\", "/"))):
        if below := _below_root(name, root):
            yield below  # an absolute path as Arrowhead writes it
        raw = name.encode("utf-8", "surrogateescape")
        if not raw.startswith(b"/"):
            yield path_text.escape_path(posixpath.normpath(raw))
            continue
        folder, _, leaf = posixpath.normpath(raw).rpartition(b"/")
        for parent in (folder, os.path.realpath(folder or b"/")):
            if below := _below_root(path_text.escape_path(parent + b"/" + leaf), root):
                yield below


def _below_root(path: str, root: str) -> str:
    """A path relative to the root; "" if it is not below it."""
    top = root.rstrip("/") + "/"
    return path.removeprefix(top) if path.startswith(top) else ""


def closest_paths(paths: Sequence[str], cell: str, count: int = 3) -> list[str]:
    """The paths of a catalog that a cell may mean: files of the same name, else similar paths.

    paths: sorted.
    """
    text = spreadsheet.original_text(cell).strip().replace("\\", "/")
    folder, _, leaf = text.rpartition("/")
    same_name = [path for path in paths if path.endswith(leaf) and path.split("/")[-1] == leaf]
    if same_name:
        return sorted(same_name, key=lambda path: (-_similarity(path, text), path))[:count]
    first = bisect.bisect_left(paths, f"{folder}/") if folder else 0
    last = bisect.bisect_left(paths, f"{folder}0") if folder else len(paths)  # 0 follows /
    nearby = paths[first:last] or paths
    return difflib.get_close_matches(text, nearby[:MAX_COMPARED_PATHS], n=count)


def _similarity(path: str, other: str) -> float:
    return difflib.SequenceMatcher(None, path, other, autojunk=False).ratio()


# -------------------------------------------------------------------------------- labels


def label_parser(
    fixes: LabelFixes, classes: Sequence[str], *, multi: bool, separator: str | None
) -> Callable[[str], tuple[str, ...]]:
    """A function that returns the labels in a cell, sorted.

    Args:
        fixes: The table, whose cells show the separator if it is not given.
        classes: The store's classes; a cell that is one of them is that class.
        multi: Whether an image may have several labels, or none.
        separator: Between several labels. Default: the first of | ; , that occurs in the table.
    """
    known = set(classes)
    cells = [*fixes.new, *fixes.seen]
    found = separator or next((sign for sign in "|;," if any(sign in c for c in cells)), "")

    def parse(cell: str) -> tuple[str, ...]:
        if cell in known:
            return (cell,)
        text = cell.strip()
        is_list = multi and re.fullmatch(r"\[.*\]", text, re.DOTALL) is not None
        names = table_parser.split_labels(text, found if multi else "", is_list)
        if multi and not found and text not in known and known.issuperset(text.split()):
            names = text.split()
        return tuple(
            sorted({name if name in known else table_parser.escape_label(name) for name in names})
        )

    return parse
