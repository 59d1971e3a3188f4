"""A catalog as an Arrow file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead import arrow_io
from arrowhead.errors import DataError
from arrowhead.features.store_format import REPAIR


def write_catalog(path: Path, columns: Mapping[str, Any]) -> None:
    """A catalog as an Arrow file: path, size, stamp, labels, split, tries; its root as metadata."""
    import pyarrow as pa

    table = pa.table(
        {
            "path": pa.array(columns["paths"], pa.string()),
            "size": pa.array(columns["sizes"], pa.int64()),
            "stamp": pa.array(columns["stamps"], pa.int64()),
            "labels": pa.array([list(names) for names in columns["labels"]], pa.list_(pa.string())),
            "split": pa.array(columns["splits"], pa.string()).dictionary_encode(),
            "tries": pa.array(columns["tries"], pa.uint8()),
        }
    )
    root = {"arrowhead.root": columns["root"], "arrowhead.ignored": str(columns["ignored"])}
    if columns.get("source"):
        root["arrowhead.source"] = columns["source"]
    arrow_io.write_arrow(path, table.replace_schema_metadata(root))


def read_catalog(path: Path, rows: range | None = None) -> dict[str, Any]:
    """The columns that `write_catalog` wrote, as the fields of `Catalog`; some rows of them,
    or all.
    """
    table = catalog_table(path)
    if rows is not None:
        table = table.slice(rows.start, len(rows))
    return {
        "root": table.schema.metadata[b"arrowhead.root"].decode(),
        "paths": table["path"].to_pylist(),
        "sizes": table["size"].to_numpy(),
        "stamps": table["stamp"].to_numpy(),
        "labels": [tuple(names) for names in table["labels"].to_pylist()],
        "splits": table["split"].to_pylist(),
        "tries": table["tries"].to_numpy(),
        "ignored": int(table.schema.metadata[b"arrowhead.ignored"]),
        "source": table.schema.metadata.get(b"arrowhead.source", b"").decode(),
    }


def catalog_table(path: Path) -> Any:
    """The memory-mapped pyarrow table of a catalog; DataError if it is of another shape."""
    import pyarrow as pa

    table = arrow_io.read_arrow(path)
    kinds = {
        "path": pa.string(),
        "size": pa.int64(),
        "stamp": pa.int64(),
        "labels": pa.list_(pa.string()),
        "split": pa.dictionary(pa.int32(), pa.string()),
        "tries": pa.uint8(),
    }
    notes = table.schema.metadata or {}
    fits = dict(zip(table.column_names, table.schema.types, strict=True)) == kinds
    fits &= not any(column.null_count for column in table.columns)
    if not (fits and b"arrowhead.root" in notes and notes.get(b"arrowhead.ignored", b"").isdigit()):
        raise DataError(
            f"{path} is not a catalog as Arrowhead writes it: {table.schema.to_string()[:300]}",
            f"the columns {', '.join(kinds)}, without gaps; root and ignored in the metadata.",
            REPAIR,
        )
    return table


def split_column(table: Any) -> NDArray[np.str_]:
    """The splits of a catalog's table, str (N,)."""
    column = arrow_io.whole(table["split"])
    names = np.array(column.dictionary.to_pylist(), np.str_)
    split_N: NDArray[np.str_] = names[column.indices.to_numpy()]
    return split_N


def label_column(
    table: Any, classes: Sequence[str], row: NDArray[np.int64]
) -> NDArray[np.int64] | NDArray[np.uint8]:
    """The labels of some rows of a catalog's table, as `Features` holds them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = arrow_io.whole(table["labels"])
    ends = column.offsets.to_numpy()
    known = pa.array(classes, pa.string())
    number = pc.index_in(column.values, value_set=known).to_numpy(zero_copy_only=False)
    number, count = number[ends[0] : ends[-1]], np.diff(ends)
    if np.isnan(number.astype(np.float64)).any():
        raise DataError(
            "The store's catalog has labels that are not among the classes of its manifest.",
            f"the classes {', '.join(classes[:5])} and so on.",
            "run the same precompute again, or extract again into a new store.",
        )
    if (count == 1).all():
        only: NDArray[np.int64] = number[row].astype(np.int64)
        return only
    place = np.full(len(count), -1)
    place[row] = np.arange(len(row))
    owner = np.repeat(place, count)
    label = np.zeros((len(row), len(classes)), np.uint8)
    label[owner[owner >= 0], number[owner >= 0]] = 1
    return label
