"""Online inference: a loaded bundle that classifies a few images per call, for servers.

    encoded images       any number
      -> decoder         in a separate process that keeps running between calls
      -> body, head      the same code as `score`
      -> Prediction      probabilities, or a fault, for each image

Threads can share a predictor; their calls run one after another.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from arrowhead.bundle import format as bundle_format
from arrowhead.bundle import replay
from arrowhead.inference.score_request import ScoreConfig

BATCH_SIZE = 32


@dataclass(frozen=True, slots=True)
class Prediction:
    """The predictions for n images.

    Attributes:
        probabilities: float32 (n, C); NaN where there is a fault.
        labels: bool (n, C), the labels of each image (see `Bundle.predict_labels`).
        faults: n; None for an image without a fault.
    """

    probabilities: NDArray[np.float32]
    labels: NDArray[np.bool_]
    faults: list[str | None]


class Predictor:
    """Loads a bundle, onto the GPU if there is one, and classifies images with it; thread-safe.

    The bundle's golden images are replayed first. A bundle without any gives a warning.

    Args:
        path: the bundle's folder.
        do: advice for the DataError that is raised if this machine computes other features or
            labels for the golden images.
    """

    def __init__(
        self, path: Path, *, do: str = "check that decoder, weights and recipe are the bundle's."
    ) -> None:
        import torch

        self.bundle = bundle_format.load(path)
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
        self._body, self._head = self.bundle.make_body(device), self.bundle.make_head(device)
        threads = len(os.sched_getaffinity(0))
        drift = replay.replay(self.bundle, self._body, self._head, device, threads)
        replay.check_drift(drift, ScoreConfig().max_drift, do)
        if not drift.images:
            warnings.warn(replay.NO_GOLDEN_IMAGES, stacklevel=2)
        self._decoder = replay.clean_decoder(self.bundle.recipe, device, threads, BATCH_SIZE)
        self._lock = threading.Lock()

    def __call__(self, images: Sequence[bytes]) -> Prediction:
        """Classify encoded images; a fault of one does not affect the others."""
        faults: list[str | None] = []
        features = [np.empty((0, self.bundle.recipe.width), np.float32)]
        with self._lock:  # the decoder and torch's number of threads are shared
            for start in range(0, len(images), BATCH_SIZE):
                batch = images[start : start + BATCH_SIZE]
                pixels = self._decoder(batch, [bytes(16)] * len(batch))
                features.append(replay.features_of_pixels(self._body, pixels))
                faults += pixels.faults
            feature_ND = np.concatenate(features)
            for row in np.flatnonzero(~np.isfinite(feature_ND).all(1)):
                faults[row] = faults[row] or "not finite: the body gave a number beyond float16"
                feature_ND[row] = np.nan
            prob_NC = bundle_format.probabilities(
                self._head, feature_ND, self.bundle.temperature, multi=self.bundle.multi
            )
        return Prediction(prob_NC, self.bundle.predict_labels(prob_NC), faults)

    def close(self) -> None:
        """Stop the decoder's process."""
        self._decoder.close()
