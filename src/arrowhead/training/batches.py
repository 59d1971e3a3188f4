"""Which rows form a batch: a function of seed and pass, sliced by rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from arrowhead.training import config
from arrowhead.training.dataset import Data

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class DistributedContext:
    """This worker's rank among `world` workers that train together."""

    rank: int = 0
    world: int = 1


def batches(rows: int, size: int, seed: int, epoch: int) -> Iterator[NDArray[np.int64]]:
    """All rows once, in an order drawn from (seed, epoch), `size` at a time.

    One row left over joins the batch before it: batch norm needs two.
    """
    order = _order(rows, seed, epoch)
    ends = config.batch_ends(rows, size)
    for start, stop in zip([0, *ends[:-1]], ends, strict=True):
        yield order[start:stop]


def _order(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(rows)


def view_of(key: NDArray[np.uint64], views: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Which view of each image this epoch uses: a function of (seed, epoch, image)."""
    if views == 1:
        return np.zeros(len(key), np.int64)
    mixed = key ^ np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)  # SplitMix64's mixing
    return ((mixed >> np.uint64(32)) * np.uint64(views) >> np.uint64(32)).astype(np.int64)


class Lane:
    """Batches of one row set in one order, pass after pass; a function of the step's number."""

    def __init__(self, data: Data, rows: NDArray[np.int64], seed: int, size: int) -> None:
        self._data, self._rows, self._seed, self._size = data, rows, seed, size
        self._ends = config.batch_ends(len(rows), size)
        self.steps = len(self._ends)
        self._pass = -1

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Rows for `InMemoryFeatures.take`, int64 (B,), and the labels, (B,) or (B, C)."""
        if self._pass != step // self.steps:
            self._begin(step // self.steps)
        end = step % self.steps
        span = slice(self._ends[end - 1] if end else 0, self._ends[end])
        return self._flat[span], self._label[span]

    def _begin(self, number: int) -> None:
        import torch

        data, views = self._data, self._data.feature.shape[1]
        rows = self._rows[_order(len(self._rows), self._seed, number)]
        flat = rows * views + view_of(data.key[rows], views, self._seed, number)
        at = torch.from_numpy(rows).to(data.label.device)
        self._flat = torch.from_numpy(flat).to(data.feature.device)
        self._label = data.label.index_select(0, at)
        self._pass = number
