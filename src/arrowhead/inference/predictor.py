"""Images one request at a time: a bundle held ready, for servers.

encoded images       a few, of any number
  -> decoder         in its own process, kept running between requests
  -> body, head      as `score` does
  -> Prediction      probabilities, or a fault, per image

Threads may share one: they take turns.
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

BATCH = 32


@dataclass(frozen=True, slots=True)
class Prediction:
    """What n images came out as.

    probabilities: float32 (n, C), NaN where there is a fault. given: bool (n, C), the labels each
    has (see `Bundle.given`). faults: n, None when the image is well.
    """

    probabilities: NDArray[np.float32]
    given: NDArray[np.bool_]
    faults: list[str | None]


class Predictor:
    """The bundle at `path`, ready on the GPU if there is one; threads take turns.

    Its golden images are replayed first: a machine that sees them differently raises DataError
    instead of serving (`do`: what to do about it there). A bundle without any is served with a
    warning.
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
        replay.must_agree(drift, ScoreConfig().max_drift, do)
        if not drift.images:
            warnings.warn(replay.NO_GOLDEN_IMAGES, stacklevel=2)
        self._decoder = replay.decoder(self.bundle.recipe, device, threads, BATCH)
        self._turn = threading.Lock()

    def __call__(self, images: Sequence[bytes]) -> Prediction:
        """What the bundle gives these encoded images; a bad one spoils no other."""
        faults: list[str | None] = []
        features = [np.empty((0, self.bundle.recipe.width), np.float32)]
        with self._turn:  # one decoder, and one number of threads for torch
            for at in range(0, len(images), BATCH):
                batch = images[at : at + BATCH]
                pixels = self._decoder(batch, [bytes(16)] * len(batch))
                features.append(replay.seen(self._body, pixels))
                faults += pixels.faults
            feature_ND = np.concatenate(features)
            for row in np.flatnonzero(~np.isfinite(feature_ND).all(1)):
                faults[row] = faults[row] or "not finite: the body gave a number beyond float16"
                feature_ND[row] = np.nan
            made = self.bundle
            prob_NC = bundle_format.probabilities(
                self._head, feature_ND, made.temperature, multi=made.multi
            )
        return Prediction(prob_NC, made.given(prob_NC), faults)

    def close(self) -> None:
        """End the decoder's process."""
        self._decoder.close()
