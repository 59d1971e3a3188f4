"""A bundle, as MLflow serves it.

    column `image`       bytes of encoded images
    or `path`            where they lie, if the host allows it
      -> Predictor       as `score` does
      -> columns         label, probability, labels, probabilities

MLflow runs this file itself (a "model from code": nothing is pickled); no other room imports it.
`tracking` puts it into the model beside the bundle.

Paths come from whoever asks, files from the host. So they are read only if the host's environment
has ARROWHEAD_SERVE_PATHS when the model is loaded: a folder, or a URI, and nothing that lies
elsewhere is opened.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import pandas  # type: ignore[import-untyped]
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class Served(PythonModel):  # type: ignore[misc]  # mlflow has no types
    """Encoded images in, labels out."""

    def load_context(self, context: Any) -> None:
        """Load the bundle, and replay its golden images: a machine that sees them differently
        raises DataError instead of serving.
        """
        from arrowhead.data import path_text
        from arrowhead.inference.predictor import Predictor

        self._predict = Predictor(
            Path(context.artifacts["bundle"]),
            do="install the versions of requirements.txt in the model's folder.",
        )
        root = os.environ.get("ARROWHEAD_SERVE_PATHS")
        self._root = path_text.resolve(root) if root else None

    def predict(
        self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> pandas.DataFrame:
        """A row per row of `model_input`, which has the column `image` or `path`."""
        made = self._predict(self._images(model_input))
        classes, prob_NC = self._predict.bundle.classes, made.probabilities
        best = zip(prob_NC.argmax(1).tolist(), made.faults, strict=True)
        labels = [classes[i] if fault is None else None for i, fault in best]
        return pandas.DataFrame(
            {
                # pandas' own text type would make a None NaN, which is no JSON.
                "label": pandas.Series(labels, dtype=object, index=model_input.index),
                "probability": prob_NC.max(1).astype(np.float64),
                "labels": [list(compress(classes, row)) for row in made.given.tolist()],
                "probabilities": list(prob_NC.astype(np.float64)),
            },
            index=model_input.index,
        )

    def _images(self, rows: pandas.DataFrame) -> list[bytes]:
        """The bytes of each row's image, none where they cannot be had: that row gets no label."""
        given = [name for name in ("image", "path") if name in rows and rows[name].notna().any()]
        if given == ["image"]:
            return [bytes(one) if there else b"" for one, there in _cells(rows["image"])]
        if given == ["path"] and self._root is not None:
            return [
                self._read(self._root, one) if there else b"" for one, there in _cells(rows["path"])
            ]
        if given == ["path"]:
            found = "the rows have paths, and this server opens no files"
        else:
            found = f"the rows have {' and '.join(given) or 'no image'}"
        raise MlflowException.invalid_parameter_value(
            f"{found}. Send the column `image` (the bytes of encoded images) or, where the host was"
            " started with ARROWHEAD_SERVE_PATHS=FOLDER, `path`; one of the two, filled."
        )

    @staticmethod
    def _read(root: str, path: str) -> bytes:
        """The file at a path, as score parts write it: below the root, or whole."""
        from arrowhead.data import path_text, reading
        from arrowhead.features.extract import ExtractConfig

        most = ExtractConfig().max_bytes
        if path_text.in_store(root):
            return reading.read(root, path, most)[0]
        top = path_text.unescape_path(root)
        file = os.path.realpath(os.path.join(top, path_text.unescape_path(path)))
        if os.path.commonpath([top, file]) != top:
            raise MlflowException.invalid_parameter_value(
                f"{path} is not below the folder that this server may read."
            )
        return reading.read(root, path_text.escape_path(os.path.relpath(file, top)), most)[0]


def _cells(column: pandas.Series) -> Iterator[tuple[Any, bool]]:
    """Each value of a column, and whether there is one: None may have become NaN."""
    return zip(column, column.notna(), strict=True)


set_model(Served())
