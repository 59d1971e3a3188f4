"""Data and batches for training tests, without a store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from arrowhead.training import config
from arrowhead.training.dataset import Data, InMemoryFeatures

Part = tuple[NDArray[np.float16], NDArray[Any]]


def data_from_arrays(train: Part, valid: Part, classes: Sequence[str], device: str = "cpu") -> Data:
    """Data of (feature (n, V, D), label (n,) or (n, C)) of each split; see `check_trainable`."""
    feature = torch.from_numpy(np.concatenate([train[0], valid[0]])).to(device)
    rows = np.arange(len(feature))
    return Data(
        feature=InMemoryFeatures(feature),
        label=torch.from_numpy(np.concatenate([train[1], valid[1]])).to(device),
        key=rows.astype(np.uint64),
        train=rows[: len(train[1])],
        valid=rows[len(train[1]) :],
        classes=classes,
    ).check_trainable()


def epoch_batches(rows: int, batch_size: int, seed: int, epoch: int) -> Iterator[NDArray[np.int64]]:
    """All rows once, in the batches of `batches.BatchSampler`."""
    order = np.random.default_rng((seed, epoch)).permutation(rows)
    ends = config.batch_ends(rows, batch_size)
    for start, stop in zip([0, *ends[:-1]], ends, strict=True):
        yield order[start:stop]
