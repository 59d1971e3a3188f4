r"""CSV files that people open in a spreadsheet, and programs read back.

A spreadsheet runs a field that begins with = + - or @ as a formula, and a terminal obeys control
characters. Names come from folders and tables of others, so both are made harmless here:

    =1+1, -x, @y, 'z   '=1+1, '-x, '@y, ''z      (OWASP, "CSV Injection")
    ESC [ 3 1 m        \x1b[31m

A program takes one leading ' off a text field to have the name again; Parquet and Arrow files hold
the exact names.
"""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from arrowhead import fileio
from arrowhead.printable import visible

STARTS = "=+-@'"  # of a formula; and the mark itself, so that taking one off is always right


class Sheet:
    """An open CSV file; numbers are written as they are, None as an empty field."""

    def __init__(self, file: Any) -> None:
        self._out = csv.writer(file)

    def row(self, cells: Sequence[Any]) -> None:
        """One line."""
        self._out.writerow([cell(one) for one in cells])


@contextmanager
def writing(path: Path, header: Sequence[str]) -> Iterator[Sheet]:
    """A CSV file (UTF-8) with a header, whole or absent."""
    with fileio.draft(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        sheet = Sheet(file)
        sheet.row(header)
        yield sheet


def cell(value: Any) -> Any:
    """A field that neither a spreadsheet nor a terminal takes for more than its text."""
    if not isinstance(value, str):
        return value
    text = visible(value)
    # Full-width signs count as the plain ones in some languages' spreadsheets.
    first = unicodedata.normalize("NFKC", text.lstrip()[:1])[:1]
    return f"'{text}" if first and first in STARTS else text
