"""Features and labels that heads are trained on, in memory or mapped."""

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
    """Features in memory, on the device they are used on: float16 (N, V, D)."""

    def __init__(self, feature_NVD: Tensor) -> None:
        self._flat = feature_NVD.flatten(0, 1)
        self.shape: Sequence[int] = feature_NVD.shape
        self.device = feature_NVD.device

    def take(self, flat_B: Tensor) -> Tensor:
        """float16 (B, D), on the device; flat_B: int64, row x V + view."""
        return self._flat.index_select(0, flat_B)


class MemoryMappedFeatures:
    """Features left in memory-mapped shards, float16 (n, V, D) each, for stores larger than memory.

    row: which row of all shards each of ours is, int64 (N,).
    """

    def __init__(
        self, parts: Sequence[NDArray[np.float16]], row: NDArray[np.int64], device: torch.device
    ) -> None:
        self._parts, self._row, self.device = parts, row, device
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        self.shape: Sequence[int] = (len(row), *parts[0].shape[1:])

    def take(self, flat_B: Tensor) -> Tensor:
        """As `InMemoryFeatures.take`."""
        import torch

        ours, view = np.divmod(flat_B.cpu().numpy(), self.shape[1])
        row = self._row[ours]
        home = np.searchsorted(self._starts, row, "right") - 1
        made = np.empty((len(row), self.shape[2]), np.float16)
        for part in np.unique(home):
            here = home == part
            made[here] = self._parts[part][row[here] - self._starts[part], view[here]]
        return torch.from_numpy(made).to(self.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """What heads learn from: N images, of which some train and some validate.

    feature: float16 (N, V, D). label: int64 (N,), or uint8 (N, C) where images have several; on
    the device. key: uint64 (N,), of the image's content. train, valid: int64 rows.
    """

    feature: InMemoryFeatures | MemoryMappedFeatures
    label: Tensor
    key: NDArray[np.uint64]
    train: NDArray[np.int64]
    valid: NDArray[np.int64]
    classes: Sequence[str]

    @property
    def multi(self) -> bool:
        """Whether images have several labels."""
        return self.label.dim() == 2

    @staticmethod
    def of(
        train: tuple[NDArray[np.float16], NDArray[Any]],
        valid: tuple[NDArray[np.float16], NDArray[Any]],
        classes: Sequence[str],
        device: str = "cpu",
    ) -> Data:
        """From (feature (n, V, D), label (n,) or (n, C)) per split; see `check_trainable`."""
        import torch

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

    def check_trainable(self) -> Data:
        """Itself; ConfigError if a split is empty or nothing teaches one of the classes."""
        for split, rows in (("training", self.train), ("validation", self.valid)):
            label = self.label[rows].cpu().numpy()
            seen = np.flatnonzero(label.any(0)) if self.multi else label
            absent = sorted(set(range(len(self.classes))) - set(seen.tolist()))
            if split == "validation" and len(label) == 0:
                self._must_have_different_images()
            if len(label) == 0 or (absent and split == "training"):
                raise ConfigError(
                    f"The {split} split has no readable image"
                    + (f" of {', '.join(self.classes[i] for i in absent)}." if len(label) else "."),
                    "at least one of every class to learn from, and some to check with.",
                    "add images, or hold out another share (--valid-share).",
                )
        return self

    def _must_have_different_images(self) -> None:
        """ConfigError where no class has two of them: then no share of the images can validate, as
        copies of one image stay together.
        """
        label, key = self.label[self.train].cpu().numpy(), self.key[self.train]
        hot = label > 0 if self.multi else label[:, None] == np.arange(len(self.classes))
        if all(len(np.unique(key[has])) < 2 for has in hot.T):
            raise ConfigError(
                "No image can be held out for validation: of the images that can be read, those of"
                f" each class are copies of one ({len(key)} images, {len(np.unique(key))}"
                " different).",
                "two different images or more of some class (better 20 of each): copies of one stay"
                " together.",
                "add other images.",
            )


def mean_and_std(
    feature: InMemoryFeatures | MemoryMappedFeatures, rows: NDArray[np.int64]
) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each column over the clean view of some rows, float32 (D,); a column
    that never varies counts as 1.
    """
    import torch

    views, width = feature.shape[1:]
    flat = torch.from_numpy(rows * views).to(feature.device)
    first = feature.take(flat[:4096]).float().mean(0)  # squares of large means would cancel
    sums = torch.zeros(2, width, dtype=torch.float64, device=feature.device)
    for part in torch.split(flat, 512):  # in place, and small enough for the cache: 4 x as fast
        away = feature.take(part).float().sub_(first)
        sums[0] += away.sum(0)
        sums[1] += away.square_().sum(0)
    mean = sums[0] / len(rows)
    deviation = (sums[1] / len(rows) - mean.square()).clamp(min=0).sqrt()
    deviation[deviation < 1e-6 * first.abs() + 1e-12] = 1
    return (first + mean).float(), deviation.float()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Trial:
    """One head of a stack: how it is trained, at which rate, on which rows."""

    config: TrainConfig
    rate: float
    train: NDArray[np.int64]
    valid: NDArray[np.int64]
    start: Mapping[str, NDArray[Any]] | None = None
    """Weights that it begins with, by name, as `Trained.state` has them; None: new ones."""


def class_weighting(
    train: NDArray[Any], valid: NDArray[Any], classes: int
) -> Literal["none", "validation"]:
    """What --class-weights auto comes to for these labels, (n,) or (n, C)."""
    import torch

    if train.ndim == 2:
        return "none"
    clear = losses.differ(torch.from_numpy(train), torch.from_numpy(valid), classes)
    return "validation" if clear else "none"


def class_weights(data: Data, trial: Trial) -> Tensor | None:
    """What each class weighs in the loss of a head, float32 (C,); None: all the same.

    They come from the labels of the images that it learns from and, where classes are to weigh as
    in validation, of the validation images; of these a head that is trained without a fold leaves
    out what is in that fold, since it is to be predicted.
    """
    asked, classes = trial.config.class_weights, len(data.classes)
    label = data.label[trial.train]
    if asked == "balanced":
        return losses.balance(label, classes)
    if asked == "none" or data.multi:
        return None
    valid = data.valid
    if trial.valid is not valid:
        valid = np.setdiff1d(valid, trial.valid)
    wanted = data.label[valid]
    if (
        asked == "auto"
        and class_weighting(label.cpu().numpy(), wanted.cpu().numpy(), classes) == "none"
    ):
        return None
    return losses.weights_as(label, wanted, classes)
