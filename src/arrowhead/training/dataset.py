"""Features and labels that heads are trained on, in memory or memory-mapped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from arrowhead.errors import ConfigError
from arrowhead.training import losses
from arrowhead.training.config import TrainConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class InMemoryFeatures:
    """Features in memory, on the device that uses them: float16 (N, V, D)."""

    def __init__(self, feature_NVD: Tensor) -> None:
        self._flat = feature_NVD.flatten(0, 1)
        self.shape: Sequence[int] = feature_NVD.shape
        self.device = feature_NVD.device

    def take(self, flat_B: Tensor) -> Tensor:
        """Return some features, float16 (B, D), on the device; flat_B: int64, row x V + view."""
        return self._flat.index_select(0, flat_B)


class MemoryMappedFeatures:
    """Features in memory-mapped shards, for stores larger than memory.

    Args:
        parts: The shards, float16 (n, V, D) each.
        row: The row among those of all shards, int64 (N,).
        device: Where `take` puts the features.
    """

    def __init__(
        self, parts: Sequence[NDArray[np.float16]], row: NDArray[np.int64], device: torch.device
    ) -> None:
        self._parts, self._row, self.device = parts, row, device
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        self.shape: Sequence[int] = (len(row), *parts[0].shape[1:])

    def take(self, flat_B: Tensor) -> Tensor:
        """See `InMemoryFeatures.take`."""
        import torch

        index, view = np.divmod(flat_B.cpu().numpy(), self.shape[1])
        row = self._row[index]
        part_of_row = np.searchsorted(self._starts, row, "right") - 1
        feature = np.empty((len(row), self.shape[2]), np.float16)
        for part in np.unique(part_of_row):
            mask = part_of_row == part
            feature[mask] = self._parts[part][row[mask] - self._starts[part], view[mask]]
        return torch.from_numpy(feature).to(self.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """N images, some of them for training and some for validation.

    Attributes:
        feature: float16 (N, V, D).
        label: On the device, int64 (N,), or uint8 (N, C) with several labels per image.
        key: Hashes of the images' contents, uint64 (N,).
        train, valid: Rows, int64.
        classes: The classes' names.
    """

    feature: InMemoryFeatures | MemoryMappedFeatures
    label: Tensor
    key: NDArray[np.uint64]
    train: NDArray[np.int64]
    valid: NDArray[np.int64]
    classes: Sequence[str]

    @property
    def multilabel(self) -> bool:
        """Whether images have several labels."""
        return self.label.dim() == 2

    def check_trainable(self) -> Data:
        """Return the data itself.

        Raises:
            ConfigError: There are no labels, a split is empty, or the training split lacks a class.
        """
        if not self.classes:
            raise ConfigError(
                "The store has no labels: it was made with --unlabelled.",
                "images with labels to train on.",
                "label some of them (`arrowhead suggest` chooses which) and run `arrowhead fit` on"
                " the table of them.",
            )
        for split, rows in (("training", self.train), ("validation", self.valid)):
            label = self.label[rows].cpu().numpy()
            present = np.flatnonzero(label.any(0)) if self.multilabel else label
            absent = sorted(set(range(len(self.classes))) - set(present.tolist()))
            if split == "validation" and len(label) == 0:
                self._check_different_images()
            if len(label) == 0 or (absent and split == "training"):
                raise ConfigError(
                    f"The {split} split has no readable image"
                    + (f" of {', '.join(self.classes[i] for i in absent)}." if len(label) else "."),
                    "at least one training image of every class, and some validation images.",
                    "add images, or hold out another share (--valid-share).",
                )
        return self

    def _check_different_images(self) -> None:
        """Raise ConfigError if no class has two different images.

        Copies of an image stay in one split, so then no image can be held out for validation.
        """
        label, key = self.label[self.train].cpu().numpy(), self.key[self.train]
        member_NC = label > 0 if self.multilabel else label[:, None] == np.arange(len(self.classes))
        if all(len(np.unique(key[members])) < 2 for members in member_NC.T):
            raise ConfigError(
                "No image can be held out for validation: the readable images of each class are"
                f" copies of one image ({len(key)} images, {len(np.unique(key))} different), and"
                " copies stay in one split.",
                "at least two different images of some class (better 20 of each class).",
                "add other images.",
            )


def mean_and_std(
    feature: InMemoryFeatures | MemoryMappedFeatures, rows: NDArray[np.int64]
) -> tuple[Tensor, Tensor]:
    """Compute each feature's mean and standard deviation over the first view of some rows.

    Returns:
        float32 (D,) each. The standard deviation of a constant feature is given as 1.
    """
    import torch

    views, width = feature.shape[1:]
    flat = torch.from_numpy(rows * views).to(feature.device)
    # Subtracted first, since squares of large means would cancel.
    shift = feature.take(flat[:4096]).float().mean(0)
    sums = torch.zeros(2, width, dtype=torch.float64, device=feature.device)
    for part in torch.split(flat, 512):  # in place, and small enough for the cache: 4 x as fast
        shifted = feature.take(part).float().sub_(shift)
        sums[0] += shifted.sum(0)
        sums[1] += shifted.square_().sum(0)
    mean = sums[0] / len(rows)
    std = (sums[1] / len(rows) - mean.square()).clamp(min=0).sqrt()
    std[std < 1e-6 * shift.abs() + 1e-12] = 1
    return (shift + mean).float(), std.float()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Trial:
    """One head of a stack: how it is trained, at which learning rate, on which rows."""

    config: TrainConfig
    lr: float
    train: NDArray[np.int64]
    valid: NDArray[np.int64]
    initial_state: Mapping[str, NDArray[Any]] | None = None
    """Initial weights by name, as in `TrainedHead.state`; None: drawn from the seed."""


def resolve_class_weights(
    train: NDArray[Any], valid: NDArray[Any], classes: int
) -> Literal["none", "validation"]:
    """Return what `--class-weights auto` stands for with these labels, (n,) or (n, C)."""
    import torch

    if train.ndim == 2:
        return "none"
    differ = losses.frequencies_differ(torch.from_numpy(train), torch.from_numpy(valid), classes)
    return "validation" if differ else "none"


def class_weights(data: Data, trial: Trial) -> Tensor | None:
    """Compute the class weights of a head's loss, float32 (C,); None: all classes weigh the same.

    They come from the labels of the head's training images and, with `--class-weights validation`,
    from those of the validation split. A fold's head leaves out the validation images in the
    fold that it predicts.
    """
    setting, classes = trial.config.class_weights, len(data.classes)
    label = data.label[trial.train]
    if setting == "balanced":
        return losses.balanced_weights(label, classes)
    if setting == "none" or data.multilabel:
        return None
    valid = data.valid
    if trial.valid is not valid:
        valid = np.setdiff1d(valid, trial.valid)
    target = data.label[valid]
    if (
        setting == "auto"
        and resolve_class_weights(label.cpu().numpy(), target.cpu().numpy(), classes) == "none"
    ):
        return None
    return losses.weights_to_match(label, target, classes)
