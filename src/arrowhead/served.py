"""A bundle, as MLflow serves it.

    column `image`       bytes of encoded images
      -> decoder         in its own process, kept running between requests
      -> body, head      as `score` does
      -> columns         label, probability, labels, probabilities

MLflow runs this file itself (a "model from code": nothing is pickled); no other room imports it.
`tracking` puts it into the model beside the bundle.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import pandas  # type: ignore[import-untyped]
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
from numpy.typing import NDArray

BATCH = 32


class Served(PythonModel):  # type: ignore[misc]  # mlflow has no types
    """Encoded images in, labels out."""

    def load_context(self, context: Any) -> None:
        """Load the bundle, and replay its golden images: a machine that sees them differently
        raises DataError instead of serving.
        """
        import torch

        from arrowhead import bundle, extract, score
        from arrowhead.guard import GuardedDecoder

        self._bundle = bundle.load(Path(context.artifacts["bundle"]))
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
        self._body, self._head = self._bundle.make_body(device), self._bundle.make_head(device)
        threads = len(os.sched_getaffinity(0))
        drift = bundle.replay(self._bundle, self._body, self._head, device, threads)
        bundle.must_agree(drift, score.ScoreConfig().max_drift)
        self._decoder = GuardedDecoder(
            extract.pixels_of(score.one_view(self._bundle.recipe)),
            batch_size=BATCH,
            threads=threads,
            device=0 if torch.cuda.is_available() else None,
        )
        self._turn = threading.Lock()

    def predict(
        self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> pandas.DataFrame:
        """A row per row of `model_input`, which has the column `image`."""
        from arrowhead import bundle

        images = [bytes(one) for one in model_input["image"]]
        with self._turn:  # one decoder, whatever the server's threads
            parts = [self._features(images[at : at + BATCH]) for at in range(0, len(images), BATCH)]
        feature_ND = np.concatenate(parts)
        made = self._bundle
        chance_NC = bundle.probabilities(self._head, feature_ND, made.temperature, multi=made.multi)
        seen_N: Any = np.isfinite(feature_ND).all(axis=1).tolist()
        best = chance_NC.argmax(1).tolist()
        given = made.given(chance_NC).tolist()
        labels = [made.classes[i] if fine else None for i, fine in zip(best, seen_N, strict=True)]
        return pandas.DataFrame(
            {
                # pandas' own text type would make a None NaN, which is no JSON.
                "label": pandas.Series(labels, dtype=object, index=model_input.index),
                "probability": chance_NC.max(1).astype(np.float64),
                "labels": [list(compress(made.classes, row)) for row in given],
                "probabilities": list(chance_NC.astype(np.float64)),
            },
            index=model_input.index,
        )

    def _features(self, images: Sequence[bytes]) -> NDArray[np.float32]:
        """float32 (N, D), NaN where an image cannot be decoded; as `bundle.features` gives them."""
        import torch

        made = self._decoder(images, [bytes(16)] * len(images))
        view = torch.from_numpy(made.views[0]).permute(0, 3, 1, 2)
        out = self._body(view)[: len(images)].cpu().numpy()
        feature_ND: NDArray[np.float32] = out.astype(np.float16).astype(np.float32)
        feature_ND[[fault is not None for fault in made.faults]] = np.nan
        return feature_ND


set_model(Served())
