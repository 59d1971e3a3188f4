"""Folds: each image validates once, copies together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.errors import ConfigError
from arrowhead.training.config import TrainConfig
from arrowhead.training.dataset import Data, Trial


def folds(
    key: NDArray[np.uint64], label: NDArray[Any], count: int, classes: Sequence[str]
) -> NDArray[np.int64]:
    """Which of at most `count` parts each image is held out in, int64 (N,): a function of contents
    and labels. -1: in none, it is in the training images of every fold.

    Parts hold every class alike (of several labels per image: its rarest), and copies of one image
    together. A class whose images would all be in one part, such as a class of one different image,
    is held out in none: the head that predicts them would not have seen the class. See
    `not_held_out`. Raises ConfigError if no image can be held out.
    """
    different, first, where = np.unique(key, return_index=True, return_inverse=True)
    order = np.lexsort((mixed(different, "folds"), stratum(label)[first]))
    dealt = np.empty(len(different), np.int64)
    dealt[order] = np.arange(len(different)) % count
    for number in range(len(classes)):
        mine = where[label[:, number] > 0 if label.ndim == 2 else label == number]
        if len(mine) and len(np.unique(dealt[mine])) == 1:
            dealt[mine] = -1
    if (dealt < 0).all():
        raise ConfigError(
            f"--folds {count} can hold out no image: each class has one different image.",
            "two or more different images of a class.",
            "add images, or leave out --folds.",
        )
    _, dealt[dealt >= 0] = np.unique(dealt[dealt >= 0], return_inverse=True)  # no empty part
    part: NDArray[np.int64] = dealt[where]
    return part


def not_held_out(
    part: NDArray[np.int64], label: NDArray[Any], classes: Sequence[str]
) -> dict[str, int]:
    """Classes that `folds` could not hold out, and how many images each has."""
    hot = label > 0 if label.ndim == 2 else label[:, None] == np.arange(len(classes))
    counts, held = hot.sum(0), (hot & (part >= 0)[:, None]).sum(0)
    never = np.flatnonzero((counts > 0) & (held == 0)).tolist()
    return {classes[number]: int(counts[number]) for number in never}


def stratum(label: NDArray[Any]) -> NDArray[np.int64]:
    """What images are dealt by, int64 (N,): the class, or the rarest of an image's labels."""
    if label.ndim == 1:
        return label.astype(np.int64)
    rarity = np.where(label > 0, label.sum(0), len(label) + 1)
    rarest: NDArray[np.int64] = np.where(label.any(1), rarity.argmin(1), label.shape[1])
    return rarest


def mixed(key: NDArray[np.uint64], use: str) -> NDArray[np.uint64]:
    """Keys in an order of their own for each use: splits were drawn from the same hashes."""
    word = np.uint64(int.from_bytes(use.encode()[:8], "big"))
    return (key ^ word) * np.uint64(0x9E3779B97F4A7C15)


def rate_of(config: TrainConfig) -> float:
    """The learning rate; 0 of logistic regression, which has none."""
    return 0.0 if config.head == "logistic" else float(config.rate)


def fold_trials(data: Data, config: TrainConfig, part: NDArray[np.int64]) -> list[Trial]:
    """One head per part: it learns from the images of all others. Splits other than train and valid
    take no part. config: with a learning rate.

    Which epoch's weights are kept is not chosen on the part that is predicted: all keep the last,
    and the caller says how many epochs there are (see `trainer.train_stack`, until).
    """
    config, rate = replace(config, best="last", patience=0), rate_of(config)
    pool = np.sort(np.concatenate([data.train, data.valid]))
    return [
        Trial(config=config, rate=rate, train=pool[part != one], valid=pool[part == one])
        for one in range(int(part.max()) + 1)
    ]
