"""Labels and splits that stand in a container beside the images, read as those of a table.

cat/001.json  {"label": "cat", "split": "val"}      -> a record of a tar
image, label, is_valid                              -> a record of a Parquet file
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from arrowhead.data.source_config import SourceConfig
from arrowhead.data.table_parser import LABEL_COLUMNS, SPLIT_COLUMNS, TableParser, normalize_name
from arrowhead.errors import ConfigError

# Normalized names of columns that may say something about labels or splits.
KNOWN_NAMES = frozenset(
    {
        *(name for names in LABEL_COLUMNS for name in names),
        *SPLIT_COLUMNS,
        *(f"is{part}" for part in ("train", "training", "val", "valid", "validation", "test")),
    }
)


def wanted_names(config: SourceConfig) -> frozenset[str]:
    """Normalized names of the columns to read."""
    given = (config.label_column, config.split_column)
    return KNOWN_NAMES | {normalize_name(name) for name in given if name}


class RecordParser(TableParser):
    """Records with named fields, of which the first is the path of the image."""

    def __init__(self, source: str, names: Sequence[str], records: Sequence[list[str]]) -> None:
        self._names, self._records = list(names), records
        super().__init__(source, "", ",", 0)
        self._place = source

    def _numbered_rows(self) -> Iterator[tuple[int, list[str]]]:
        yield 0, self._names
        yield from enumerate(self._records, 1)

    def row_place(self, line: int) -> str:
        """The image of a record, for messages."""
        return f"{self.source}, {self._records[line - 1][0]}"

    def row_error(self, line: int, what: str) -> ConfigError:
        """The refusal of a record."""
        return ConfigError(
            f"{self.row_place(line)}: it {what}.",
            "one class for each image, or a list of labels; train, val or test as its split.",
            "correct it; --label-column and --split-column choose other columns.",
        )


def read_records(
    source: str,
    names: Sequence[str],
    records: Sequence[list[str]],
    config: SourceConfig,
    notes: list[str],
) -> tuple[list[tuple[str, ...]], list[str] | None]:
    """The labels and splits of records.

    Args:
        source: Where they come from, for messages.
        names: Of the fields; the first is `path`.
        records: A cell for each field; the cell of the label is "" where there is none.
        config: Which fields hold labels and splits, and how labels are separated.
        notes: What was guessed is appended here.

    Returns:
        Sorted class names of each record, () where there are none; and the splits, None if no
        field says them.

    Raises:
        ConfigError: No field, or more than one, can hold the labels.
    """
    parser = RecordParser(source, names, records)
    guesses: list[str] = []
    parser.find_columns(replace(config, path_column=None), True, guesses, by_cells=True)
    assert parser.label is not None
    if parser.names[parser.label] not in ("cls", "txt"):  # their meaning is no guess
        notes += guesses
    labelled = [bool(record[parser.label].strip()) for record in records]
    if not any(labelled):
        return [()] * len(records), None
    with_label = [record for record, has_label in zip(records, labelled, strict=True) if has_label]
    inner = RecordParser(source, names, with_label)
    inner.label, inner.splits = parser.label, parser.splits
    labels_of = inner.label_reader(config, notes)
    split_of = inner.split_reader(notes) if inner.splits else None
    read = iter(
        [(labels_of(n, row), split_of(n, row) if split_of else "") for n, row in inner.rows()]
    )
    rows = [next(read) if has_label else ((), "") for has_label in labelled]
    return [names for names, _ in rows], [split for _, split in rows] if split_of else None
