"""A bundle, as MLflow serves it.

    column `image`       bytes of encoded images
      -> Predictor       as `score` does
      -> columns         label, probability, labels, probabilities

MLflow runs this file itself (a "model from code": nothing is pickled); no other room imports it.
`tracking` puts it into the model beside the bundle.
"""

from __future__ import annotations

from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import pandas  # type: ignore[import-untyped]
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class Served(PythonModel):  # type: ignore[misc]  # mlflow has no types
    """Encoded images in, labels out."""

    def load_context(self, context: Any) -> None:
        """Load the bundle, and replay its golden images: a machine that sees them differently
        raises DataError instead of serving.
        """
        from arrowhead.predict import Predictor

        self._predict = Predictor(
            Path(context.artifacts["bundle"]),
            do="install the versions of requirements.txt in the model's folder.",
        )

    def predict(
        self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> pandas.DataFrame:
        """A row per row of `model_input`, which has the column `image`."""
        made = self._predict([bytes(one) for one in model_input["image"]])
        classes, chance_NC = self._predict.bundle.classes, made.probabilities
        best = zip(chance_NC.argmax(1).tolist(), made.faults, strict=True)
        labels = [classes[i] if fault is None else None for i, fault in best]
        return pandas.DataFrame(
            {
                # pandas' own text type would make a None NaN, which is no JSON.
                "label": pandas.Series(labels, dtype=object, index=model_input.index),
                "probability": chance_NC.max(1).astype(np.float64),
                "labels": [list(compress(classes, row)) for row in made.given.tolist()],
                "probabilities": list(chance_NC.astype(np.float64)),
            },
            index=model_input.index,
        )


set_model(Served())
