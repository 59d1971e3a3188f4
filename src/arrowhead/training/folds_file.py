"""Out-of-fold probabilities as an Arrow file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from arrowhead import arrow_io


def write_folds(path: Path, columns: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
    """Write out-of-fold probabilities as an Arrow file.

    Args:
        path: The file.
        columns: path, labels, fold, and probability: float32 of every class, in the order of the
            metadata's `arrowhead.classes`. Where fold is below 0, the file's fold and probability
            are null.
        notes: Values for the file's metadata, written as JSON.
    """
    import pyarrow as pa

    prob_NC = np.ascontiguousarray(columns["probability"], np.float32)
    flat, missing_N = pa.array(prob_NC.ravel(), pa.float32()), columns["fold"] < 0
    table = pa.table(
        {
            "path": pa.array(columns["path"], pa.string()),
            "labels": pa.array([list(one) for one in columns["labels"]], pa.list_(pa.string())),
            "fold": pa.array(columns["fold"], pa.int32(), mask=missing_N),
            "probability": pa.FixedSizeListArray.from_arrays(
                flat, prob_NC.shape[1], mask=pa.array(missing_N)
            ),
        }
    )
    metadata = {f"arrowhead.{name}": json.dumps(value) for name, value in notes.items()}
    arrow_io.write_arrow(path, table.replace_schema_metadata(metadata))
