"""The extra columns of the table that a store was made from, as properties of its images.

    catalog.source -> table, read again -> its column of paths -> joined to the catalog's rows
      -> numbers, levels; identifiers are left out

A catalog does not keep these columns, nor the flags with which the table was read. The column of
paths is the one whose cells lead to images of the catalog.
"""

from __future__ import annotations

import math
import posixpath
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arrowhead.data import named_files, path_text, tables
from arrowhead.data.catalog import Catalog
from arrowhead.data.table_parser import TableParser
from arrowhead.errors import ConfigError
from arrowhead.examine.properties import Property, level_property
from arrowhead.wording import pluralize

EMPTY = "(empty)"
MAX_NUMBER_LEVELS = 10  # a column with so few different numbers has levels
SEARCH_HITS = 200  # cells that lead to images, after which the column of paths is known
MAX_DISTINCT_SHARE = 0.5  # of a text column; above, it holds identifiers

PathForm = Callable[[str], str]
# How a path of the catalog may be written in a table, the most certain form first.
PATH_FORMS: tuple[PathForm, ...] = (
    lambda path: path,
    lambda path: posixpath.splitext(path)[0],
    posixpath.basename,
    lambda path: posixpath.splitext(posixpath.basename(path))[0],
)


@dataclass(frozen=True, slots=True)
class _PathColumn:
    """Where a table names the images.

    Attributes:
        column: Index of the column.
        position_by_key: Position in the requested rows by the form of a path.
        key_of: The form of a cell.
    """

    column: int
    position_by_key: dict[str, int]
    key_of: Callable[[str], str]

    def position(self, row: Sequence[str]) -> int | None:
        """The position of the image that a row of the table names, None if it is another."""
        return self.position_by_key.get(self.key_of(row[self.column]))


def read_table_columns(
    catalog: Catalog, row_N: NDArray[np.int64]
) -> tuple[list[Property], list[str]]:
    """Read the extra columns of the table that a catalog was made from.

    Args:
        catalog: The catalog; from a folder it has no such columns.
        row_N: Rows of the catalog, ascending.

    Returns:
        A property for each column that is not an identifier, in the order of the table, and notes:
        sentences about columns that are left out, and about a table that is gone or has changed.
    """
    if not catalog.source or not len(row_N):
        return [], []
    try:
        parser = tables.read_cells(catalog.source)
        paths = _find_path_column(parser, catalog, row_N)
        if paths is None:
            return [], [
                f"the columns of {catalog.source} are not examined: it has changed, and no column"
                " names the images of the store"
            ]
        cells_by_column, found = _read_columns(parser, paths, len(row_N))
    except ConfigError as error:
        return [], [f"the columns of {catalog.source} are not examined: {error.found}"]
    notes = []
    if missing := len(row_N) - found:
        notes.append(
            f"{catalog.source} has changed: it names {found} of these {len(row_N)} images, and the"
            f" cells of the other {missing} count as empty"
        )
    properties: list[Property] = []
    left_out: list[str] = []
    for column, cells in cells_by_column.items():
        name = parser.names[column] or f"column {column + 1}"
        if made := _column_properties(named_files.decode_windows_1252(name), cells):
            properties += made
        else:
            left_out.append(name)
    if left_out:
        count = pluralize(len(left_out), "column")
        notes.append(f"left out: {count} of identifiers ({', '.join(left_out)})")
    return properties, notes


def _find_path_column(
    parser: TableParser, catalog: Catalog, row_N: NDArray[np.int64]
) -> _PathColumn | None:
    """Find the column whose cells lead to the requested rows; None if there is none."""
    prefix = catalog.root.rstrip("/") + "/"
    enough = min(SEARCH_HITS, len(row_N))

    def normalize(cell: str) -> str:
        text = cell.strip().replace("\\", "/").removeprefix(prefix)
        return path_text.escape_path(posixpath.normpath(text).encode("utf-8", "surrogateescape"))

    for number, form in enumerate(PATH_FORMS):
        key_of = normalize if number < 2 else lambda cell: posixpath.basename(normalize(cell))
        candidates = _index_paths(catalog.paths, row_N, form)
        hits: Counter[int] = Counter()
        for _, row in parser.rows():
            hits.update(c for c, cell in enumerate(row) if key_of(cell) in candidates)
            if hits and max(hits.values()) >= enough:
                break
        if hits and 2 * max(hits.values()) > enough:
            column = min(hits, key=lambda one: (-hits[one], one))
            return _PathColumn(column, candidates, key_of)
    return None


def _index_paths(paths: Sequence[str], row_N: NDArray[np.int64], form: PathForm) -> dict[str, int]:
    """Positions in row_N by the form of the path, without forms that several paths share."""
    position_by_key = {form(paths[row]): position for position, row in enumerate(row_N.tolist())}
    counts = Counter(key for key in map(form, paths) if key in position_by_key)
    return {key: at for key, at in position_by_key.items() if counts[key] == 1}


def _read_columns(
    parser: TableParser, paths: _PathColumn, images: int
) -> tuple[dict[int, list[str]], int]:
    """The cells of every other column, one per image, and how many images the table names."""
    columns = [column for column in range(len(parser.names)) if column != paths.column]
    # Equal cells share one text, so a column of a few words takes a pointer per image.
    shared: dict[str, str] = {}
    cells = {column: [""] * images for column in columns}
    is_found = [False] * images
    for _, row in parser.rows():
        position = paths.position(row)
        if position is None or is_found[position]:
            continue
        is_found[position] = True
        for column in columns:
            cell = row[column].strip()
            cells[column][position] = shared.setdefault(cell, cell)
    return cells, sum(is_found)


def _column_properties(name: str, cells: Sequence[str]) -> list[Property]:
    """The properties of one column; none if it holds identifiers."""
    counts = Counter(cells)
    empty = counts.pop("", 0)
    filled = counts.total()
    number_of = {cell: _parse_number(cell) for cell in counts}
    if counts and None not in number_of.values() and len(counts) > MAX_NUMBER_LEVELS:
        numbers = [number for number in number_of.values() if number is not None]
        if len(counts) == filled and all(number.is_integer() for number in numbers):
            return []  # whole numbers that are all different
        value_N = np.array([number_of.get(cell) for cell in cells], np.float64)
        properties = [Property(name=name, value=value_N)]
        if empty:
            absent_N = np.where(np.isnan(value_N), 0, -1)
            properties.append(Property(name=name, value=absent_N, levels=(EMPTY,)))
        return properties
    if len(counts) > max(MAX_NUMBER_LEVELS, MAX_DISTINCT_SHARE * filled):
        return []
    texts = {cell: named_files.decode_windows_1252(cell) for cell in counts} | {"": EMPTY}
    return [level_property(name, [texts[cell] for cell in cells])]


def _parse_number(cell: str) -> float | None:
    """The finite number in a cell, None for other text."""
    try:
        number = float(cell)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
