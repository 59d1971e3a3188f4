"""Heads: features (B, D) to logits (B, C).

The same numbers on any number of workers: batch norm takes its statistics from the global
batch, and dropout draws its mask for the global batch and takes this worker's rows of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import is_available, is_initialized
from torch.distributed.nn.functional import all_reduce


@dataclass(frozen=True, slots=True)
class Place:
    """Which rows of which global batch a worker holds: step number, first row, rows in all."""

    step: int
    first: int
    rows: int


class Standardize(nn.Module):
    """Features minus their training mean, over their training deviation; nothing to learn.

    Without it a linear head on a body whose features are large and alike hardly learns.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))

    def forward(self, input: Tensor) -> Tensor:
        """(B, D) to (B, D)."""
        return (input - self.mean) / self.deviation


class GlobalBatchNorm(nn.BatchNorm1d):
    """Batch norm over the rows of all workers (torch's SyncBatchNorm exists on GPUs only)."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, D) to (B, D), float32 when several workers train together."""
        if not (self.training and is_available() and is_initialized()):
            return super().forward(input)
        wide = input.float()
        ones = wide.new_ones(1)
        sums = torch.cat([ones * len(wide), wide.sum(0)])
        count, total = all_reduce(sums).split([1, wide.shape[1]])  # type: ignore[no-untyped-call]
        mean = total / count
        var = all_reduce((wide - mean).square().sum(0)) / count  # type: ignore[no-untyped-call]
        with torch.no_grad():
            share = self.momentum or 0.1
            self.running_mean.lerp_(mean, share)  # type: ignore[union-attr]
            self.running_var.lerp_(var * count / (count - 1).clamp(min=1), share)  # type: ignore[union-attr]
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        normal: Tensor = (wide - mean) * (var + self.eps).rsqrt()
        return normal * self.weight + self.bias


class GlobalDropout(nn.Module):
    """Dropout whose mask is a function of (seed, step): one mask for the global batch."""

    def __init__(self, share: float, seed: int) -> None:
        super().__init__()
        self.share, self.seed = share, seed
        self.place = Place(0, 0, 0)

    def forward(self, input: Tensor) -> Tensor:
        """(B, D) to (B, D); the rows are those of `place`."""
        if not self.training or self.share == 0:
            return input
        mixed = np.random.SeedSequence((self.seed, self.place.step)).generate_state(1, np.uint64)
        draw = torch.Generator().manual_seed(int(mixed[0] >> np.uint64(1)))
        kept = torch.rand((self.place.rows, input.shape[1]), generator=draw) >= self.share
        mine = kept[self.place.first : self.place.first + len(input)].to(input.device)
        return input * mine / (1 - self.share)


def make(
    kind: str, width: int, classes: int, *, dropout: float = 0.0, seed: int = 0
) -> nn.Sequential:
    """A head of `kind` with weights drawn from `seed`.

    linear: standardized, dropout, one linear layer. lesson: fast.ai's batch norm, dropout, linear
    to 512, ReLU, batch norm, dropout, linear.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "linear":
            return nn.Sequential(
                Standardize(width), GlobalDropout(dropout, seed), nn.Linear(width, classes)
            )
        return nn.Sequential(
            GlobalBatchNorm(width),
            GlobalDropout(dropout / 2, seed),
            nn.Linear(width, 512),
            nn.ReLU(),
            GlobalBatchNorm(512),
            GlobalDropout(dropout, seed + 1),
            nn.Linear(512, classes),
        )


def standardize(head: nn.Module, mean_D: Tensor, deviation_D: Tensor) -> None:
    """Give a head that standardizes the training split's mean and deviation."""
    for part in head.modules():
        if isinstance(part, Standardize):
            part.mean.copy_(mean_D)
            part.deviation.copy_(deviation_D)


def place(head: nn.Module, here: Place) -> None:
    """Tell every dropout of the head which rows come next."""
    for part in head.modules():
        if isinstance(part, GlobalDropout):
            part.place = here


def restore(kind: str, width: int, classes: int, state: Mapping[str, Tensor]) -> nn.Sequential:
    """A trained head, ready for inference: float32 (B, width) to logits (B, classes)."""
    head = make(kind, width, classes)
    head.load_state_dict(dict(state))
    return head.eval()
