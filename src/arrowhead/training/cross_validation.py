"""Folds for cross-validation: each image is held out once, and copies of an image together.

scikit-learn's StratifiedGroupKFold keeps groups together too, but its folds depend on the order of
the rows; these depend only on the images' contents and labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.errors import ConfigError
from arrowhead.training.config import TrainConfig
from arrowhead.training.dataset import Data, Trial


def assign_folds(
    key: NDArray[np.uint64], label: NDArray[Any], count: int, classes: Sequence[str]
) -> NDArray[np.int64]:
    """Assign each image to the fold that holds it out.

    Folds have the same share of every class (with several labels per image, of an image's rarest
    label), and copies of an image are in the same fold. A class whose images would all fall into
    one fold, such as a class of one different image, is held out in none, since the head that
    predicts them would not have been trained on the class (see `not_held_out`).

    Args:
        key: Hashes of the images' contents, (N,).
        label: (N,), or (N, C) with several labels per image.
        count: The maximum number of folds.
        classes: The classes' names.

    Returns:
        Numbers of folds, int64 (N,). -1: no fold holds the image out, all of them train on it.

    Raises:
        ConfigError: No image can be held out.
    """
    different, first, image = np.unique(key, return_index=True, return_inverse=True)
    order = np.lexsort((shuffle_keys(different, "folds"), strata(label)[first]))
    fold_of_image = np.empty(len(different), np.int64)
    fold_of_image[order] = np.arange(len(different)) % count
    for number in range(len(classes)):
        members = image[label[:, number] > 0 if label.ndim == 2 else label == number]
        if len(members) and len(np.unique(fold_of_image[members])) == 1:
            fold_of_image[members] = -1
    held_out = fold_of_image >= 0
    if not held_out.any():
        raise ConfigError(
            f"--folds {count} can hold out no image: each class has only one different image.",
            "a class with two or more different images.",
            "add images, or leave --folds out.",
        )
    _, fold_of_image[held_out] = np.unique(fold_of_image[held_out], return_inverse=True)  # no gaps
    fold: NDArray[np.int64] = fold_of_image[image]
    return fold


def not_held_out(
    fold: NDArray[np.int64], label: NDArray[Any], classes: Sequence[str]
) -> dict[str, int]:
    """Return the classes that `assign_folds` could not hold out, with their numbers of images."""
    member_NC = label > 0 if label.ndim == 2 else label[:, None] == np.arange(len(classes))
    counts, held_out = member_NC.sum(0), (member_NC & (fold >= 0)[:, None]).sum(0)
    never = np.flatnonzero((counts > 0) & (held_out == 0)).tolist()
    return {classes[number]: int(counts[number]) for number in never}


def strata(label: NDArray[Any]) -> NDArray[np.int64]:
    """Return what images are stratified by, int64 (N,): the class, or an image's rarest label."""
    if label.ndim == 1:
        return label.astype(np.int64)
    rarity = np.where(label > 0, label.sum(0), len(label) + 1)
    rarest: NDArray[np.int64] = np.where(label.any(1), rarity.argmin(1), label.shape[1])
    return rarest


def shuffle_keys(key: NDArray[np.uint64], purpose: str) -> NDArray[np.uint64]:
    """Hash keys again for each purpose: the splits were drawn from the same keys."""
    salt = np.uint64(int.from_bytes(purpose.encode()[:8], "big"))
    return (key ^ salt) * np.uint64(0x9E3779B97F4A7C15)


def learning_rate(config: TrainConfig) -> float:
    """Return the learning rate; 0 for logistic regression, which has none."""
    return 0.0 if config.head == "logistic" else float(config.rate)


def fold_trials(data: Data, config: TrainConfig, fold: NDArray[np.int64]) -> list[Trial]:
    """Return one trial per fold, trained on all other folds and validated on its own.

    Only the training and validation splits take part. All trials keep the weights of the last
    epoch: an epoch chosen on the fold that is predicted would have used its labels. The caller
    decides the number of epochs (see `trainer.train_stack`, stop_epoch).

    Args:
        data: Features and labels.
        config: The settings, with a learning rate.
        fold: The fold of each image of both splits, in the order of rows.
    """
    config, lr = replace(config, best="last", patience=0), learning_rate(config)
    rows = np.sort(np.concatenate([data.train, data.valid]))
    return [
        Trial(config=config, lr=lr, train=rows[fold != one], valid=rows[fold == one])
        for one in range(int(fold.max()) + 1)
    ]
