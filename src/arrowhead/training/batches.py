"""Which rows form a batch: a function of seed and epoch, sliced by rank.

PyTorch's DistributedSampler gives every rank equally many rows, by repeating or dropping some, and
its global batches change with the number of ranks. Here the batches are the same on any number of
workers, and they depend on (seed, epoch) alone, so a checkpoint holds no random state.
"""

from __future__ import annotations

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
    """The rank of this worker among `world_size` workers that train together."""

    rank: int = 0
    world_size: int = 1


def choose_views(key: NDArray[np.uint64], views: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Choose the view of each image that this epoch uses: a function of (seed, epoch, image).

    Args:
        key: Hashes of the images' contents, (N,).
        views: The number of views per image.
        seed: The head's seed.
        epoch: The epoch's number.

    Returns:
        Positions of views, int64 (N,).
    """
    if views == 1:
        return np.zeros(len(key), np.int64)
    mixed = key ^ np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)  # SplitMix64's mixing
    return ((mixed >> np.uint64(32)) * np.uint64(views) >> np.uint64(32)).astype(np.int64)


class BatchSampler:
    """The batches of a set of rows, epoch after epoch; a batch is a function of the step number."""

    def __init__(self, data: Data, rows: NDArray[np.int64], seed: int, batch_size: int) -> None:
        self._data, self._rows, self._seed = data, rows, seed
        self._ends = config.batch_ends(len(rows), batch_size)
        self.steps_per_epoch = len(self._ends)
        self._epoch = -1

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return rows for `InMemoryFeatures.take`, int64 (B,), and labels, (B,) or (B, C)."""
        if self._epoch != step // self.steps_per_epoch:
            self._start_epoch(step // self.steps_per_epoch)
        end = step % self.steps_per_epoch
        span = slice(self._ends[end - 1] if end else 0, self._ends[end])
        return self._flat[span], self._label[span]

    def _start_epoch(self, epoch: int) -> None:
        import torch

        data, views = self._data, self._data.feature.shape[1]
        rows = np.random.default_rng((self._seed, epoch)).permutation(self._rows)
        flat = rows * views + choose_views(data.key[rows], views, self._seed, epoch)
        index = torch.from_numpy(rows).to(data.label.device)
        self._flat = torch.from_numpy(flat).to(data.feature.device)
        self._label = data.label.index_select(0, index)
        self._epoch = epoch
