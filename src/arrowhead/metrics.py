"""Tallies that add across batches and workers, and the figures they come to.

    logits, labels  -> Tally       sums and counts, added up on the way
    Tally           -> loss, accuracy
    all logits      -> confusion, per-class figures, the temperature

Ratios are taken last, so ragged last batches and uneven workers cannot bend a mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Tally:
    """Rows seen, rows right, and nats of loss, as sums."""

    seen: float = 0.0
    correct: float = 0.0
    nats: float = 0.0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.seen + other.seen, self.correct + other.correct, self.nats + other.nats)

    @property
    def loss(self) -> float:
        """Mean cross entropy per row, in nats."""
        return self.nats / self.seen if self.seen else float("nan")

    @property
    def accuracy(self) -> float:
        """Share of rows whose largest logit is the label's, 0 to 1."""
        return self.correct / self.seen if self.seen else float("nan")


def confusion(
    label_N: NDArray[np.int64], guess_N: NDArray[np.int64], classes: int
) -> NDArray[np.int64]:
    """Counts, int64 (C, C): row = the label, column = the guess."""
    return np.bincount(label_N * classes + guess_N, minlength=classes**2).reshape(classes, classes)


def per_class(counts_CC: NDArray[np.int64], names: list[str]) -> dict[str, dict[str, float]]:
    """Precision, recall (0 to 1; 0 where undefined) and number of images, by class."""
    right = np.diag(counts_CC)
    guessed, present = counts_CC.sum(0), counts_CC.sum(1)
    return {
        name: {
            "precision": float(right[i] / max(guessed[i], 1)),
            "recall": float(right[i] / max(present[i], 1)),
            "images": int(present[i]),
        }
        for i, name in enumerate(names)
    }


def temperature(logit_NC: torch.Tensor, label_N: torch.Tensor) -> float:
    """The T that makes softmax(logits / T) fit the labels best (Guo et al., arXiv:1706.04599, 4.2).

    One number, found by golden section on log T between 1/20 and 20. Where all rows are right, T
    would run to the border; so half a row of every class, spread over the rows, counts as well.
    """
    import torch.nn.functional as F

    logits = logit_NC.double()

    def nats(log_t: float) -> float:
        chances = F.log_softmax(logits / np.exp(log_t), 1)
        spread = -0.5 * chances.mean(0).sum()
        return float(F.nll_loss(chances, label_N, reduction="sum") + spread)

    low, high, golden = -np.log(20), np.log(20), (np.sqrt(5) - 1) / 2
    for _ in range(40):
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if nats(left) < nats(right) else (left, high)
    return float(np.exp((low + high) / 2))
