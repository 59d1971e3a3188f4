"""Compare backbones on the same images: how often heads on their features are right.

    features of each body   -> held_out_accuracy   is the head right that has not seen the image?
    the same for two bodies -> compare             their difference, paired by image

Two bodies are right and wrong on mostly the same images, so their difference is far more certain
than either accuracy (see `training.comparison`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from arrowhead.training import comparison
from arrowhead.training.dataset import Data, InMemoryFeatures
from arrowhead.training.out_of_fold import OutOfFold


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """Results on images that a body's heads were not trained on; N different images.

    Attributes:
        key: Hashes of the images' contents, uint64 (N,), ascending.
        correct: float64 (N,), 1 if the label was predicted, else 0; with several labels per image
            the share of labels that were.
    """

    key: NDArray[np.uint64]
    correct: NDArray[np.float64]

    @property
    def accuracy(self) -> float:
        """Share of correct predictions."""
        return float(self.correct.mean())

    @property
    def half_width(self) -> float:
        """Half of the 95 % confidence interval of the accuracy, by the normal approximation."""
        return comparison.half_width(self.correct)


def held_out_accuracy(data: Data, rows: NDArray[np.int64]) -> HeldOut:
    """Train logistic regressions on folds of some images, and test each on the images left out.

    Args:
        data: Features and labels; their first views are used, and the splits do not matter.
        rows: The images to use.

    Raises:
        ConfigError: No class has two different images.
    """
    import torch

    views = data.feature.shape[1]
    feature = data.feature.take(torch.from_numpy(rows * views).to(data.feature.device))
    data = replace(
        data,
        feature=InMemoryFeatures(feature[:, None]),
        label=data.label[rows],
        key=data.key[rows],
        train=np.arange(len(rows)),
        valid=np.arange(0),
    )
    heads = OutOfFold(data).head_margins()
    label = data.label.cpu().numpy()
    if data.multilabel:
        judged = np.isfinite(heads.margin).all(1)
        correct = (heads.margin > 0).mean(1)
    else:
        judged = np.isfinite(heads.margin)
        correct = (heads.predicted == label).astype(np.float64)
    key, first = np.unique(data.key[judged], return_index=True)
    return HeldOut(key=key, correct=correct[judged][first])


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """How much more often one body is right than another.

    Attributes:
        points: The difference of the accuracies, in percentage points.
        half_width: Half of its 95 % confidence interval, in percentage points.
        p: The two-sided p-value of no difference, corrected for the number of comparisons.
    """

    points: float
    half_width: float
    p: float

    @property
    def is_certain(self) -> bool:
        """Whether the difference is more than chance."""
        return self.p < comparison.SIGNIFICANCE_LEVEL


def compare(best: HeldOut, others: Sequence[HeldOut]) -> list[Difference]:
    """Compare one body with each of the others, on the images that both have."""
    differences = []
    for other in others:
        _, mine, its = np.intersect1d(best.key, other.key, return_indices=True)
        differences.append(best.correct[mine] - other.correct[its])
    p = comparison.holm_correction(
        np.array([comparison.paired_p_value(difference) for difference in differences])
    )
    return [
        Difference(
            points=100 * float(one.mean()),
            half_width=100 * comparison.half_width(one),
            p=float(corrected),
        )
        for one, corrected in zip(differences, p, strict=True)
    ]
