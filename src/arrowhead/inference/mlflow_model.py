"""A bundle as an MLflow pyfunc model.

    column `image`       bytes of encoded images
    or `path`            paths of images, if the host allows it
      -> Predictor       the same code as `score`
      -> columns         label, probability, labels, probabilities

MLflow runs this file itself (a "model from code", so nothing is pickled); no other module imports
it. `tracking.registry` logs it with the bundle.

Clients choose the paths, but the files are the host's. So paths are read only if the host sets
ARROWHEAD_SERVE_PATHS to a folder or URI when the model is loaded, and only below it.
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


class BundleModel(PythonModel):  # type: ignore[misc]  # mlflow has no types
    """Classifies encoded images."""

    def load_context(self, context: Any) -> None:
        """Load the bundle and replay its golden images.

        Raises DataError if this machine computes other features or labels for them.
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
        """Predict a row for each row of `model_input`, which has the column `image` or `path`."""
        prediction = self._predict(self._images(model_input))
        classes, prob_NC = self._predict.bundle.classes, prediction.probabilities
        most_probable = zip(prob_NC.argmax(1).tolist(), prediction.faults, strict=True)
        labels = [classes[i] if fault is None else None for i, fault in most_probable]
        return pandas.DataFrame(
            {
                # dtype object: pandas' text type would turn None into NaN, which is not JSON.
                "label": pandas.Series(labels, dtype=object, index=model_input.index),
                "probability": prob_NC.max(1).astype(np.float64),
                "labels": [list(compress(classes, row)) for row in prediction.labels.tolist()],
                "probabilities": list(prob_NC.astype(np.float64)),
            },
            index=model_input.index,
        )

    def _images(self, rows: pandas.DataFrame) -> list[bytes]:
        """The bytes of each row's image; empty for an image that is missing or unreadable."""
        filled = [name for name in ("image", "path") if name in rows and rows[name].notna().any()]
        if filled == ["image"]:
            return [bytes(image) if present else b"" for image, present in _cells(rows["image"])]
        if filled == ["path"] and self._root is not None:
            return [
                self._read(self._root, path) if present else b""
                for path, present in _cells(rows["path"])
            ]
        if filled == ["path"]:
            problem = "the rows have paths, and this server opens no files"
        else:
            problem = f"the rows have {' and '.join(filled) or 'no image'}"
        raise MlflowException.invalid_parameter_value(
            f"{problem}. Fill one of two columns: `image` (the bytes of encoded images), or `path`"
            " if the host was started with ARROWHEAD_SERVE_PATHS=FOLDER."
        )

    @staticmethod
    def _read(root: str, path: str) -> bytes:
        """Read the file at a path below `root`; the path is relative to it, or absolute.

        Paths are escaped as in score parts.
        """
        from arrowhead.data import path_text, reading
        from arrowhead.features.extract import ExtractConfig

        max_bytes = ExtractConfig().max_bytes
        if path_text.is_store_uri(root):
            return reading.read_file(root, path, max_bytes)[0]
        folder = path_text.unescape_path(root)
        file = os.path.realpath(os.path.join(folder, path_text.unescape_path(path)))
        if os.path.commonpath([folder, file]) != folder:
            raise MlflowException.invalid_parameter_value(
                f"{path} is not below the folder that this server may read."
            )
        relative = path_text.escape_path(os.path.relpath(file, folder))
        return reading.read_file(root, relative, max_bytes)[0]


def _cells(column: pandas.Series) -> Iterator[tuple[Any, bool]]:
    """Each value of a column, and whether it is present: pandas may have turned None into NaN."""
    return zip(column, column.notna(), strict=True)


set_model(BundleModel())
