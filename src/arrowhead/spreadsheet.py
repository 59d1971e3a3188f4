r"""Write CSV files that are safe to open in a spreadsheet.

A spreadsheet runs a field that starts with = + - or @ as a formula, and a terminal obeys control
characters. File and class names come from other people's data, so both are escaped:

    =1+1, -x, @y, 'z   ->  '=1+1, '-x, '@y, ''z     (OWASP, "CSV Injection")
    ESC [ 3 1 m        ->  \x1b[31m

A program that reads the CSV removes one leading ' from a text field (`original_text`); Parquet and
Arrow files hold the exact names. Python's csv module does not escape formulas.
"""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from arrowhead import fileio
from arrowhead.printable import escape_control_chars

# The escape mark ' is escaped too, so that removing one always gives the original back.
FORMULA_PREFIXES = "=+-@'"


class CsvWriter:
    """Writes rows to an open CSV file: numbers unchanged, None as an empty field."""

    def __init__(self, file: Any) -> None:
        self._writer = csv.writer(file)

    def row(self, cells: Sequence[Any]) -> None:
        """Write one row."""
        self._writer.writerow([safe_cell(value) for value in cells])


@contextmanager
def open_csv(path: Path, header: Sequence[str]) -> Iterator[CsvWriter]:
    """Write a CSV file (UTF-8) with a header atomically; yields its writer."""
    with fileio.atomic_write(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        writer = CsvWriter(file)
        writer.row(header)
        yield writer


def safe_cell(value: Any) -> Any:
    """Escape text that a spreadsheet would run or a terminal would obey; other values unchanged."""
    if not isinstance(value, str):
        return value
    text = escape_control_chars(value)
    # Some localized spreadsheets treat full-width signs like ASCII ones.
    first = unicodedata.normalize("NFKC", text.lstrip()[:1])[:1]
    return f"'{text}" if first and first in FORMULA_PREFIXES else text


def original_text(cell: str) -> str:
    """The text that `safe_cell` wrote as this cell. A cell that it did not escape is unchanged."""
    return cell[1:] if cell[:1] == "'" and safe_cell(cell[1:]) == cell else cell
