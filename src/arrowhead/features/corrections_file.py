"""The history of corrected labels as an Arrow file: a row for every label of an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arrowhead import arrow_io, fileio
from arrowhead.errors import DataError
from arrowhead.features.store_format import CORRECTIONS_NAME, RESTORE_CORRECTIONS

OPTIONAL = ("undone", "undone_by")  # null in rows that are in effect


def _types() -> dict[str, Any]:
    """The type of each column, by name; they are the fields of `corrections.Correction`."""
    import pyarrow as pa

    text, words = pa.string(), pa.dictionary(pa.int32(), pa.string())
    return {
        "change": pa.int32(),
        "when": words,
        "by": words,
        "reason": words,
        "path": text,
        "image_id": pa.binary(16),
        "old": pa.list_(text),
        "new": pa.list_(text),
        "copies": pa.bool_(),
        "undone": words,
        "undone_by": words,
    }


def write_corrections(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write a history, by column, as one Arrow file, complete or not at all."""
    import pyarrow as pa

    types = _types()
    arrays = {}
    for name, kind in types.items():
        values: Sequence[Any] = columns[name]
        if name in ("old", "new"):
            values = [list(names) for names in values]
        is_words = pa.types.is_dictionary(kind)
        array = pa.array(values, pa.string() if is_words else kind)
        arrays[name] = array.dictionary_encode() if is_words else array
    arrow_io.write_arrow(path, pa.table(arrays))


def read_corrections(path: Path) -> dict[str, list[Any]]:
    """Read what `write_corrections` wrote; labels are tuples.

    Compare the file's hash first. Raises DataError if its columns are others.
    """
    table = arrow_io.read_arrow(path)
    types = _types()
    is_valid = dict(zip(table.column_names, table.schema.types, strict=True)) == types and not any(
        table[name].null_count for name in types if name not in OPTIONAL
    )
    if not is_valid:
        raise DataError(
            f"{path} is not a history of corrections as Arrowhead writes it:"
            f" {table.schema.to_string()[:300]}",
            f"the columns {', '.join(types)}.",
            RESTORE_CORRECTIONS,
        )
    columns: dict[str, list[Any]] = table.to_pydict()
    for name in ("old", "new"):
        columns[name] = [tuple(names) for names in columns[name]]
    return columns


def read_newest(folder: Path) -> dict[str, list[Any]]:
    """The longest history among those in a folder whose hash is that in their name; {} if none."""
    newest: dict[str, list[Any]] = {}
    newest_key = (0, 0)
    for path in sorted(folder.glob("corrections-*.arrow")):
        name = CORRECTIONS_NAME.fullmatch(path.name)
        if not name or not fileio.sha256(path).startswith(name[1]):
            continue
        columns = read_corrections(path)
        # A history only grows: by rows, and by marks that a row was undone.
        key = len(columns["path"]), sum(when is not None for when in columns["undone"])
        if key > newest_key:
            newest, newest_key = columns, key
    return newest
