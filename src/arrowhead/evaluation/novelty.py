"""Out-of-distribution detection: how unlike the training images an image is.

    training features      up to MAX_BANK_ROWS of them, standardized, on the unit sphere: the bank
      -> distances         from each image to its K-th nearest neighbour there: 0 alike, 2 opposite
    validation images      their sorted distances turn a false-alarm rate into a threshold

The k-nearest-neighbour detector of Sun et al., "Out-of-Distribution Detection with Deep Nearest
Neighbors" (arXiv:2204.06507, section 3). It uses no labels, so it serves images with one, several
or no labels. Unlike the paper, features are standardized before they are normalized, which detects
more novel images on cats and dogs (bench/novelty.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

MAX_BANK_ROWS = 4096  # with 512 features: 4 MB in a bundle, 0.1 ms per image on one core
K = 5  # the neighbour whose distance counts
BATCH_ROWS = 1024  # 16 MB of distances at a time
MIN_STD = 1e-6  # of a feature; below, it is constant and is not scaled


def sample_bank_rows(image_id_N: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Choose the training images of the bank: int64 (up to MAX_BANK_ROWS,), ascending.

    They are drawn by content, so the choice does not depend on the order of the images.
    """
    if len(image_id_N) <= MAX_BANK_ROWS:
        return np.arange(len(image_id_N))
    return np.sort(np.argsort(image_id_N, kind="stable")[:MAX_BANK_ROWS])


@dataclass(frozen=True, kw_only=True, slots=True)
class NoveltyDetector:
    """Measures the distance of images from the training images.

    Attributes:
        mean: float32 (D,), of the training features.
        deviation: float32 (D,), their standard deviation.
        bank: float16 (M, D), standardized unit vectors of M training images.
        known: float32 (n,), ascending: the distances of n validation images.
    """

    mean: torch.Tensor
    deviation: torch.Tensor
    bank: torch.Tensor
    known: torch.Tensor

    @staticmethod
    def fit(train_ND: NDArray[np.float16], valid_ND: NDArray[np.float16]) -> NoveltyDetector:
        """Fit to features of training and validation images without augmentation."""
        import torch

        train = torch.from_numpy(train_ND.astype(np.float32))
        mean, deviation = train.mean(0), train.std(0, correction=0)
        deviation = deviation.where(deviation > MIN_STD, 1.0)
        bank = torch.nn.functional.normalize((train - mean) / deviation).half()
        detector = NoveltyDetector(mean=mean, deviation=deviation, bank=bank, known=torch.zeros(0))
        known = torch.from_numpy(np.sort(detector.distances(valid_ND)))
        return NoveltyDetector(mean=mean, deviation=deviation, bank=bank, known=known)

    @staticmethod
    def from_tensors(tensors: Mapping[str, torch.Tensor]) -> NoveltyDetector:
        """Restore a detector from its `tensors`; raises KeyError if one is missing."""
        names = NoveltyDetector.__dataclass_fields__
        return NoveltyDetector(**{name: tensors[name] for name in names})

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fields by name."""
        return {name: getattr(self, name) for name in NoveltyDetector.__dataclass_fields__}

    def to(self, device: str) -> NoveltyDetector:
        """A copy that computes on another device."""
        return NoveltyDetector(**{name: t.to(device) for name, t in self.tensors().items()})

    def summary(self) -> dict[str, Any]:
        """What bundle.json says of the detector."""
        threshold = self.threshold(0.05)
        return {
            "method": "distance to the k-th nearest training image, on standardized unit features"
            " (arXiv:2204.06507); 0 to 2",
            "k": min(K, len(self.bank)),
            "training_images": len(self.bank),
            "validation_images": len(self.known),
            "threshold_at_5_percent_false_alarms": threshold if math.isfinite(threshold) else None,
        }

    def distances(self, feature_ND: NDArray[Any]) -> NDArray[np.float32]:
        """The distance of every image from the training images, float32 (N,), 0 to 2."""
        import torch
        from torch.nn.functional import normalize

        k = min(K, len(self.bank))
        bank_DM = self.bank.float().T
        all_ND = torch.from_numpy(feature_ND.astype(np.float32)).to(self.bank.device)
        batches = []
        for feature_BD in torch.split(all_ND, BATCH_ROWS):
            cosine_BM = normalize((feature_BD - self.mean) / self.deviation) @ bank_DM
            nearest_B = cosine_BM.topk(k, dim=1).values[:, -1]
            batches.append((2 - 2 * nearest_B).clamp(min=0).sqrt())
        distance_N: NDArray[np.float32] = (
            torch.cat(batches).cpu().numpy() if batches else np.zeros(0, np.float32)
        )
        return distance_N

    def threshold(self, false_alarms: float) -> float:
        """The distance above which an image is novel, at this rate of false alarms.

        Of images like the validation images at most this share exceeds it by chance (split
        conformal prediction: the ceil((n + 1)(1 - rate))-th smallest of n distances). Infinite with
        too few validation images.
        """
        rank = math.ceil((len(self.known) + 1) * (1 - false_alarms))
        return float(self.known[rank - 1]) if rank <= len(self.known) else math.inf
