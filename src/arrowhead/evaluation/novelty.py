"""How unlike the training images an image is.

    training features      at most ROWS of them, standardized, on the unit sphere: the bank
      -> distance          from an image to its NEIGHBOUR-th nearest in it: 0 alike, 2 opposite
    of validation images   sorted: a false-alarm rate becomes a threshold

The k-nearest-neighbour detector of Sun et al., "Out-of-Distribution Detection with Deep Nearest
Neighbors" (arXiv:2204.06507, section 3). It asks nothing of labels, so it serves images with one,
several or no labels. We standardize features before they are normalized, which the paper does not:
on cats and dogs (bench/novelty.py) that finds more of the strangers.
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

ROWS = 4096  # of 512 numbers: 4 MB in a bundle, 0.1 ms per image on one core
NEIGHBOUR = 5
BLOCK = 1024  # images measured at a time: 16 MB of distances


def sample(image_id_N: NDArray[np.uint64]) -> NDArray[np.int64]:
    """int64 (up to ROWS,), ascending: which training images the bank keeps, drawn by their content,
    so that they are the same in whatever order the images come.
    """
    if len(image_id_N) <= ROWS:
        return np.arange(len(image_id_N))
    return np.sort(np.argsort(image_id_N, kind="stable")[:ROWS])


@dataclass(frozen=True, kw_only=True, slots=True)
class Novelty:
    """What a bundle knows of its training images.

    mean, deviation: float32 (D,), of their features; bank: float16 (M, D), their standardized unit
    features; known: float32 (n,), ascending: the distances of n validation images.
    """

    mean: torch.Tensor
    deviation: torch.Tensor
    bank: torch.Tensor
    known: torch.Tensor

    @staticmethod
    def of(train_ND: NDArray[np.float16], valid_ND: NDArray[np.float16]) -> Novelty:
        """Measured on clean features of training and validation images."""
        import torch

        train = torch.from_numpy(train_ND.astype(np.float32))
        mean, deviation = train.mean(0), train.std(0, correction=0)
        deviation = deviation.where(deviation > 1e-6, 1.0)  # a number that never changes
        bank = torch.nn.functional.normalize((train - mean) / deviation).half()
        blank = Novelty(mean=mean, deviation=deviation, bank=bank, known=torch.zeros(0))
        known = torch.from_numpy(np.sort(blank(valid_ND)))
        return Novelty(mean=mean, deviation=deviation, bank=bank, known=known)

    @staticmethod
    def from_tensors(parts: Mapping[str, torch.Tensor]) -> Novelty:
        """What `tensors` gave."""
        return Novelty(**{name: parts[name] for name in Novelty.__dataclass_fields__})

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fields by name."""
        return {name: getattr(self, name) for name in Novelty.__dataclass_fields__}

    def to(self, device: str) -> Novelty:
        """The same, measuring on that device."""
        return Novelty(**{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def about(self) -> dict[str, Any]:
        """What a person reads of it in bundle.json."""
        threshold = self.threshold(0.05)
        return {
            "method": "distance to the k-th nearest training image, on standardized unit features"
            " (arXiv:2204.06507); 0 to 2",
            "k": min(NEIGHBOUR, len(self.bank)),
            "training_images": len(self.bank),
            "validation_images": len(self.known),
            "threshold_at_5_percent_false_alarms": threshold if math.isfinite(threshold) else None,
        }

    def __call__(self, feature_ND: NDArray[Any]) -> NDArray[np.float32]:
        """float32 (N,): the distance of every image, 0 to 2."""
        import torch
        from torch.nn.functional import normalize

        near = min(NEIGHBOUR, len(self.bank))
        bank_DM, made = self.bank.float().T, []
        there_ND = torch.from_numpy(feature_ND.astype(np.float32)).to(self.bank.device)
        for feature_BD in torch.split(there_ND, BLOCK):
            likeness_BM = normalize((feature_BD - self.mean) / self.deviation) @ bank_DM
            nearest = likeness_BM.topk(near, dim=1).values[:, -1]
            made.append((2 - 2 * nearest).clamp(min=0).sqrt())
        found: NDArray[np.float32] = (
            torch.cat(made).cpu().numpy() if made else np.zeros(0, np.float32)
        )
        return found

    def threshold(self, false_alarms: float) -> float:
        """The distance above which an image is novel: of images like the validation images, at most
        this share lies there by chance (split conformal: the ceil((n + 1)(1 - share))-th smallest
        of n distances). Infinite when there are too few validation images to say so.
        """
        rank = math.ceil((len(self.known) + 1) * (1 - false_alarms))
        return float(self.known[rank - 1]) if rank <= len(self.known) else math.inf
