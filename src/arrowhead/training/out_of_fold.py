"""What logistic regressions and neighbours say about the label of an image they were not given.

    features, labels       -> OutOfFold          repeated folds, the strength of the L2 penalty
    trust in each label    -> head_margins       logits of heads that were not trained on the image
                           -> neighbour_margins  votes of the nearest other images

A margin is the logit of the label that was given against all others; with several labels per image,
that of each label's being present, or absent, as it was given. Exact copies of an image are held
out together, and are not among its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from arrowhead.training import logistic
from arrowhead.training.batches import DistributedContext
from arrowhead.training.config import TrainConfig
from arrowhead.training.dataset import Data, Trial
from arrowhead.training.logistic import LogisticSolver, Models

if TYPE_CHECKING:
    from torch import Tensor

FOLDS, MAX_REPEATS = 10, 4
MAX_WORK = 1 << 32  # images x features x columns x models: above, fewer repeats, then fewer folds
NEIGHBOURS = (10, 20, 50, 100)
MAX_NEIGHBOUR_ROWS = 1 << 14  # images among which neighbours are looked for
MAX_AXES = 128
BLOCK_VALUES = 1 << 24  # similarities in a block


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadMargins:
    """What the heads of all folds say; N images.

    Attributes:
        margin: float64 (N,), or (N, C) with several labels per image; nan: in no fold.
        predicted: int64 (N,), the most likely class; (N, 0) with several labels per image.
        other: int64 (N,), the most likely class but for the given one; likewise.
    """

    margin: NDArray[np.float64]
    predicted: NDArray[np.int64]
    other: NDArray[np.int64]


class OutOfFold:
    """Folds over all images of some data, whatever their splits, and their heads.

    Raises:
        ConfigError: No class has two different images.
    """

    def __init__(self, data: Data) -> None:
        import torch

        rows = np.arange(len(data.key))
        config = TrainConfig(head="logistic", class_weights="none")
        self.data = data
        trial = Trial(config=config, lr=0.0, train=rows, valid=rows)
        self.solver = LogisticSolver(data, trial, DistributedContext())
        work = len(rows) * self.solver.width * self.solver.columns
        folds = FOLDS if work * FOLDS <= MAX_WORK else logistic.FOLDS
        repeats = int(np.clip(MAX_WORK // (work * folds), 1, MAX_REPEATS))
        self.masks = torch.cat([self.solver.folds(folds, repeat) for repeat in range(repeats)])
        sample = logistic.sample_for_cv(data, trial)
        chooser = self.solver
        if sample is not trial:
            axes = self.solver.principal_axes
            chooser = LogisticSolver(data, sample, DistributedContext(), axes)
        self.strength, _, start = logistic.choose_strength(chooser)
        self._models: Models | None = None
        if start is not None:
            shape = len(self.masks), -1, -1
            self._models = Models(start.weight.expand(shape), start.bias.expand(shape[:2]))

    def head_margins(self, trust_N: NDArray[np.float64] | None = None) -> HeadMargins:
        """Solve the heads of all folds, and return what they say about held-out labels.

        trust_N: The weight of each image in training; None: all weigh the same.
        """
        import torch

        weight = self.masks.double()
        if trust_N is not None:
            weight = weight * torch.from_numpy(trust_N)
        models = self.solver.solve(weight, self.strength, self._models, logistic.CV_GRADIENT_NORM)
        self._models = models
        margins, predicted, other = [], [], []
        for block, logit_KBC in self.solver.logits(models):
            held_out = ~self.masks[:, block]
            mean_BC = (logit_KBC * held_out[..., None]).sum(0) / held_out.sum(0)[:, None]
            label = self.data.label[block]
            if self.data.multilabel:
                margins.append((2.0 * label - 1) * mean_BC)
                empty = torch.empty(len(label), 0, dtype=torch.int64)
                predicted.append(empty)
                other.append(empty)
                continue
            predicted.append(mean_BC.argmax(1))
            given = mean_BC.gather(1, label[:, None])[:, 0]
            mean_BC.scatter_(1, label[:, None], -torch.inf)
            margins.append(given - mean_BC.logsumexp(1))
            other.append(mean_BC.argmax(1))
        return HeadMargins(
            margin=torch.cat(margins).numpy(),
            predicted=torch.cat(predicted).numpy(),
            other=torch.cat(other).numpy(),
        )

    def neighbour_margins(
        self, trust_N: NDArray[np.float64] | None = None
    ) -> dict[int, NDArray[np.float32]]:
        """Return what the nearest other images say about labels, for several numbers of them.

        Neighbours are those of the highest cosine similarity along the principal axes of the
        standardized features, half whitened: divided by the square root of each axis' standard
        deviation, since the first axes alone tell cats from dogs well but digits badly.

        Args:
            trust_N: The weight of each image's vote; None: all weigh the same.

        Returns:
            float32 (N,), or (N, C) with several labels per image, by number of neighbours: the
            logarithm of the votes for the label that was given over those for the most frequent
            other one.
        """
        import torch

        key, label = self.data.key, self.data.label
        bank = np.arange(len(key))
        if len(bank) > MAX_NEIGHBOUR_ROWS:  # drawn by content
            bank = np.sort(np.argsort(key, kind="stable")[:MAX_NEIGHBOUR_ROWS])
        bank_T = torch.cat([self._directions(rows) for rows in np.array_split(bank, 64)]).T
        bank_label, bank_key = label[bank], torch.from_numpy(key[bank].view(np.int64))
        trust = None if trust_N is None else torch.from_numpy(trust_N)[bank].float()
        counts = self._neighbour_counts(len(bank))
        result: dict[int, list[Tensor]] = {count: [] for count in counts}
        columns = len(self.data.classes) * (counts[-1] if self.data.multilabel else 1)
        size = max(1, BLOCK_VALUES // max(len(bank), columns))
        for first in range(0, len(key), size):
            rows = np.arange(first, min(first + size, len(key)))
            similarity = self._directions(rows) @ bank_T
            copy = torch.from_numpy(key[rows].view(np.int64))[:, None] == bank_key
            similarity[copy] = -2
            value, nearest = similarity.topk(counts[-1], dim=1)
            vote = value.clamp(min=1e-6)
            if trust is not None:
                vote = vote * trust[nearest]
            vote = vote * (value > -2)
            for count in counts:
                share = torch.nn.functional.normalize(vote[:, :count], p=1.0, dim=1)
                voters = bank_label[nearest[:, :count]]
                result[count].append(self._vote_margin(share * count, voters, label[rows]))
        return {count: torch.cat(parts).numpy() for count, parts in result.items()}

    def _neighbour_counts(self, bank: int) -> list[int]:
        """Return the numbers of neighbours: up to half of the images of a class of median size.

        In smaller classes it is the number of the other images of the class.
        """
        label = self.data.label
        sizes = label.sum(0) if self.data.multilabel else label.bincount()
        typical = int(sizes[sizes > 0].double().median()) * bank // len(label)
        counts = [min(count, bank) for count in NEIGHBOURS if count <= typical // 2]
        return counts or [min(max(typical - 1, 1), NEIGHBOURS[0], bank)]

    def _directions(self, rows: NDArray[np.int64]) -> Tensor:
        """Return unit vectors along the half whitened principal axes, float32 (B, A)."""
        import torch

        axes, variance = self.solver.principal_axes
        if not len(variance):  # all features are constant
            return torch.zeros(len(rows), 1)
        top = variance.argsort(descending=True)[:MAX_AXES]
        top = top[variance[top] > 1e-9 * variance.max()]
        scaled_axes = axes[:, top] * variance[top].pow(-0.25)
        return torch.nn.functional.normalize(self.solver.first_views(rows) @ scaled_axes).float()

    def _vote_margin(self, vote_BK: Tensor, voter_label: Tensor, label_B: Tensor) -> Tensor:
        """Return the margin of votes for the given labels, float32 (B,) or (B, C)."""
        if self.data.multilabel:
            for_it = (vote_BK[..., None] * voter_label).sum(1)
            odds = (for_it + 0.5).log() - (vote_BK.sum(1, keepdim=True) - for_it + 0.5).log()
            return (2.0 * label_B - 1) * odds
        votes = vote_BK.new_zeros(len(vote_BK), len(self.data.classes))
        votes.scatter_add_(1, voter_label, vote_BK)
        given = votes.gather(1, label_B[:, None])[:, 0]
        votes.scatter_(1, label_B[:, None], -1)
        return (given + 0.5).log() - (votes.max(1).values.clamp(min=0) + 0.5).log()
