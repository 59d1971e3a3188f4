"""Reads and writes a catalog (the list of images with labels and splits) as an Arrow file."""

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
    """Write a catalog (`Catalog.columns`) as one Arrow file, complete or not at all.

    Columns: path, size, stamp, labels, split, tries; if labels were corrected, source_labels, null
    for the other images; if images are in containers, container and offset. Metadata: root,
    ignored, source, image_column.
    """
    import pyarrow as pa

    names_type = pa.list_(pa.string())
    table = pa.table(
        {
            "path": pa.array(columns["paths"], pa.string()),
            "size": pa.array(columns["sizes"], pa.int64()),
            "stamp": pa.array(columns["stamps"], pa.int64()),
            "labels": pa.array([list(names) for names in columns["labels"]], names_type),
            "split": pa.array(columns["splits"], pa.string()).dictionary_encode(),
            "tries": pa.array(columns["tries"], pa.uint8()),
        }
    )
    if corrected := columns.get("source_labels"):
        source_labels = [
            list(corrected[row]) if row in corrected else None for row in range(table.num_rows)
        ]
        table = table.append_column("source_labels", pa.array(source_labels, names_type))
    if columns.get("containers"):
        container = pa.array(columns["containers"], pa.string()).dictionary_encode()
        table = table.append_column("container", container)
        table = table.append_column("offset", pa.array(columns["offsets"], pa.int64()))
    metadata = {"arrowhead.root": columns["root"], "arrowhead.ignored": str(columns["ignored"])}
    if columns.get("source"):
        metadata["arrowhead.source"] = columns["source"]
    if columns.get("image_column"):
        metadata["arrowhead.image_column"] = columns["image_column"]
    arrow_io.write_arrow(path, table.replace_schema_metadata(metadata))


def read_catalog(path: Path, rows: range | NDArray[np.int64] | None = None) -> dict[str, Any]:
    """Read what `write_catalog` wrote as the fields of `Catalog`; all rows unless `rows` is set,
    in its order.
    """
    import pyarrow as pa

    table = catalog_table(path)
    if isinstance(rows, range):
        table = table.slice(rows.start, len(rows))
    elif rows is not None:
        table = table.take(pa.array(rows, pa.int64()))
    return {
        "root": table.schema.metadata[b"arrowhead.root"].decode(),
        "paths": table["path"].to_pylist(),
        "sizes": table["size"].to_numpy(),
        "stamps": table["stamp"].to_numpy(),
        "labels": [tuple(names) for names in table["labels"].to_pylist()],
        "splits": table["split"].to_pylist(),
        "tries": table["tries"].to_numpy(),
        "source_labels": _source_labels(table),
        "ignored": int(table.schema.metadata[b"arrowhead.ignored"]),
        "source": table.schema.metadata.get(b"arrowhead.source", b"").decode(),
    } | _containers(table)


def find_paths(table: Any, paths: Sequence[str]) -> dict[str, int]:
    """The rows of those of some paths that a catalog's table holds; no other row is read."""
    import pyarrow as pa
    import pyarrow.compute as pc

    wanted = pa.array(sorted(set(paths)), pa.string())
    row_M = np.flatnonzero(np.asarray(pc.is_in(table["path"], value_set=wanted)))
    return dict(zip(table["path"].take(pa.array(row_M)).to_pylist(), row_M.tolist(), strict=True))


def _containers(table: Any) -> dict[str, Any]:
    """The fields of `Catalog` about containers; {} if all images are files."""
    if "container" not in table.column_names:
        return {}
    column = table.schema.metadata.get(b"arrowhead.image_column", b"").decode()
    return {
        "containers": table["container"].to_pylist(),
        "offsets": table["offset"].to_numpy(),
        "image_column": column,
    }


def _source_labels(table: Any) -> dict[int, tuple[str, ...]]:
    """The field `Catalog.source_labels`."""
    if "source_labels" not in table.column_names:
        return {}
    column = table["source_labels"]
    rows = np.flatnonzero(column.is_valid().to_numpy())
    return {
        row: tuple(names)
        for row, names in zip(rows.tolist(), column.take(rows).to_pylist(), strict=True)
    }


def catalog_table(path: Path) -> Any:
    """The memory-mapped pyarrow table of a catalog; raises DataError if its schema differs."""
    import pyarrow as pa

    table = arrow_io.read_arrow(path)
    types = {
        "path": pa.string(),
        "size": pa.int64(),
        "stamp": pa.int64(),
        "labels": pa.list_(pa.string()),
        "split": pa.dictionary(pa.int32(), pa.string()),
        "tries": pa.uint8(),
    }
    corrected = {"source_labels": pa.list_(pa.string())}
    located = {"container": pa.dictionary(pa.int32(), pa.string()), "offset": pa.int64()}
    metadata = table.schema.metadata or {}
    allowed = (types, types | corrected, types | located, types | corrected | located)
    is_valid = (
        dict(zip(table.column_names, table.schema.types, strict=True)) in allowed
        and not any(table[name].null_count for name in table.column_names if name not in corrected)
        and b"arrowhead.root" in metadata
        and metadata.get(b"arrowhead.ignored", b"").isdigit()
    )
    if not is_valid:
        raise DataError(
            f"{path} is not a catalog as Arrowhead writes it: {table.schema.to_string()[:300]}",
            f"the columns {', '.join(types)} without nulls; root and ignored in the metadata.",
            REPAIR,
        )
    return table


def split_column(table: Any) -> NDArray[np.str_]:
    """The split of each row of a catalog's table, str (N,)."""
    column = arrow_io.single_array(table["split"])
    names = np.array(column.dictionary.to_pylist(), np.str_)
    split_N: NDArray[np.str_] = names[column.indices.to_numpy()]
    return split_N


def label_column(
    table: Any, classes: Sequence[str], row: NDArray[np.int64]
) -> NDArray[np.int64] | NDArray[np.uint8]:
    """The labels of the rows `row` of a catalog's table, in the form of `Features.label`."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = arrow_io.single_array(table["labels"])
    offsets = column.offsets.to_numpy()
    value_set = pa.array(classes, pa.string())
    class_index = pc.index_in(column.values, value_set=value_set).to_numpy(zero_copy_only=False)
    class_index = class_index[offsets[0] : offsets[-1]]
    labels_per_row = np.diff(offsets)
    if np.isnan(class_index.astype(np.float64)).any():
        raise DataError(
            "The store's catalog has labels that are not among the classes of its manifest.",
            f"the classes {', '.join(classes[:5])} and so on.",
            "run the same precompute again, or extract again into a new store.",
        )
    if (labels_per_row == 1).all():
        single: NDArray[np.int64] = class_index[row].astype(np.int64)
        return single
    output_row = np.full(len(labels_per_row), -1)  # -1: a row that was not asked for
    output_row[row] = np.arange(len(row))
    row_of_label = np.repeat(output_row, labels_per_row)
    selected = row_of_label >= 0
    label = np.zeros((len(row), len(classes)), np.uint8)
    label[row_of_label[selected], class_index[selected]] = 1
    return label
