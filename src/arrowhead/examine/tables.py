"""Tables of a report: as CSV for spreadsheets, and as Parquet with the exact values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arrowhead import fileio, spreadsheet
from arrowhead.data.catalog import Catalog
from arrowhead.examine.predictions import Predictions

BLOCK_ROWS = 65_536


def write_table(folder: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the same keys as NAME.csv and NAME.parquet; nothing if there are none."""
    if not rows:
        return
    folder.mkdir(exist_ok=True)
    header = list(rows[0])
    with spreadsheet.open_csv(folder / f"{name}.csv", header) as sheet:
        for row in rows:
            sheet.row([row[column] for column in header])
    write_parquet(folder / f"{name}.parquet", rows)


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the same keys as a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with fileio.atomic_write(path) as draft:
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), draft)


def write_predictions(folder: Path, catalog: Catalog, predictions: Predictions) -> None:
    """Write what is predicted for every image as predictions.csv and predictions.parquet.

    In blocks, so that a million images need little memory. Several labels are separated by | in
    the CSV, and lists in the Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(exist_ok=True)
    header = ["path", "split", "held_out", "labels", "predicted", "correct"]
    numbers = ["confidence", "label_probability", "margin", "loss"]
    names = pa.list_(pa.string())
    schema = pa.schema(
        [
            ("path", pa.string()),
            ("split", pa.string()),
            ("held_out", pa.bool_()),
            ("labels", names),
            ("predicted", names),
            ("correct", pa.bool_()),
            *((name, pa.float32()) for name in numbers),
        ]
    )
    with (
        fileio.atomic_write(folder / "predictions.parquet") as draft,
        spreadsheet.open_csv(folder / "predictions.csv", header + numbers) as sheet,
        pq.ParquetWriter(draft, schema) as writer,
    ):
        for start in range(0, len(predictions), BLOCK_ROWS):
            block = range(start, min(start + BLOCK_ROWS, len(predictions)))
            rows = [
                [
                    catalog.paths[predictions.row[index]],
                    str(predictions.split[index]),
                    bool(predictions.held_out[index]),
                    predictions.names(predictions.label[index]),
                    predictions.names(predictions.predicted[index]),
                    bool(predictions.correct[index]),
                    *(float(f"{getattr(predictions, name)[index]:.6g}") for name in numbers),
                ]
                for index in block
            ]
            for row in rows:
                sheet.row(["|".join(x) if isinstance(x, list) else x for x in row])
            columns = [list(column) for column in zip(*rows, strict=True)]
            writer.write_table(pa.table(columns, schema=schema))


def read_csv_columns(path: Path) -> dict[str, np.ndarray[Any, Any]] | None:
    """The columns of a CSV of numbers that Arrowhead wrote, nan where empty; None without one."""
    if not path.is_file():
        return None
    import csv

    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file))
    try:
        values = np.array([[float(cell or "nan") for cell in row] for row in rows])
        return dict(zip(header, values.reshape(len(rows), len(header)).T, strict=True))
    except ValueError:  # not as Arrowhead wrote it
        return None
