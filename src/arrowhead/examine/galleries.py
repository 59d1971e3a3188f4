"""Which images a report shows: right and wrong ones, the most uncertain, those of highest loss.

These are the pictures of fast.ai's first lesson. All of them show held-out images, because a head
is nearly always right about images that it was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arrowhead.evaluation.calibration import HASH_MULTIPLIER
from arrowhead.examine.predictions import Predictions


@dataclass(frozen=True, slots=True)
class Gallery:
    """Some images, the first the most telling.

    Attributes:
        name: A short name, such as most_incorrect.
        title: For people.
        note: How the images were chosen, in a sentence.
        index: int64 (k,), positions in `Predictions`.
    """

    name: str
    title: str
    note: str
    index: NDArray[np.int64]


class ImageRanking:
    """Ranks the held-out images of some predictions. Ties are in the order of the catalog."""

    def __init__(self, predictions: Predictions) -> None:
        self.predictions = predictions
        self.held_out = np.flatnonzero(predictions.held_out)
        self._prob_MC = predictions.held_out_probabilities()

    def at_random(self, *, correct: bool) -> NDArray[np.int64]:
        """Right or wrong images in an order that looks random and depends on their content only."""
        index = self._where(correct=correct)
        shuffled = np.argsort(self.predictions.image_id[index] * HASH_MULTIPLIER, kind="stable")
        return index[shuffled]

    def most_correct(self, class_index: int) -> NDArray[np.int64]:
        """Images of a class that are predicted right, the most confident first."""
        return self._of_class(class_index, correct=True)

    def most_incorrect(self, class_index: int) -> NDArray[np.int64]:
        """Images of a class that are predicted wrong, the least probable label first.

        With several labels: images about which the decision on this class is wrong.
        """
        return self._of_class(class_index, correct=False)

    def of_all_classes(self, count: int, *, correct: bool) -> NDArray[np.int64]:
        """The most correct or incorrect images of all classes, class by class.

        The classes, those with the most mistakes first, share `count` images; one with many fills
        the places of one with few.
        """
        rank = self.most_correct if correct else self.most_incorrect
        by_class = [index for index in map(rank, self._classes()) if len(index)]
        if not by_class:
            return np.zeros(0, np.int64)
        taken = np.zeros(len(by_class), np.int64)
        while taken.sum() < count:
            open_classes = [k for k, index in enumerate(by_class) if taken[k] < len(index)]
            if not open_classes:
                break
            for k in open_classes[: count - int(taken.sum())]:
                taken[k] += 1
        chosen = [index[:first] for index, first in zip(by_class, taken, strict=True)]
        return np.concatenate(list(_distinct(chosen)))

    def _classes(self) -> list[int]:
        """The classes, those with the most mistakes first."""
        predictions = self.predictions
        index, count = self.held_out, len(predictions.classes)
        if predictions.multi:
            errors = (predictions.label[index] != predictions.predicted[index]).sum(0)
        else:
            wrong = predictions.label[index][~predictions.correct[index]]
            errors = np.bincount(wrong, minlength=count)
        return [int(k) for k in np.argsort(-errors, kind="stable")]

    def most_uncertain(self) -> NDArray[np.int64]:
        """All images, the one nearest to another prediction first."""
        return self._sorted(self.held_out, self.predictions.margin)

    def top_losses(self) -> NDArray[np.int64]:
        """All images, the highest loss first."""
        return self._sorted(self.held_out, -self.predictions.loss)

    def _where(self, *, correct: bool) -> NDArray[np.int64]:
        index: NDArray[np.int64] = self.held_out[self.predictions.correct[self.held_out] == correct]
        return index

    def _of_class(self, class_index: int, *, correct: bool) -> NDArray[np.int64]:
        predictions, prob_M = self.predictions, self._prob_MC[:, class_index]
        if predictions.multi:
            label_M = predictions.label[self.held_out, class_index] > 0
            right_M = label_M == (predictions.predicted[self.held_out, class_index] > 0)
            chosen = np.flatnonzero((label_M & right_M) if correct else ~right_M)
            prob_M = np.where(label_M, prob_M, 1 - prob_M)
        else:
            is_class_M = predictions.label[self.held_out] == class_index
            right_M = predictions.correct[self.held_out] == correct
            chosen = np.flatnonzero(is_class_M & right_M)
        order = np.argsort((-1 if correct else 1) * prob_M[chosen], kind="stable")
        index: NDArray[np.int64] = self.held_out[chosen[order]]
        return index

    @staticmethod
    def _sorted(index: NDArray[np.int64], key: NDArray[np.float32]) -> NDArray[np.int64]:
        return index[np.argsort(key[index], kind="stable")]


def choose_galleries(predictions: Predictions, pictures: int = 24) -> list[Gallery]:
    """Choose the galleries of a report.

    Args:
        predictions: The predictions.
        pictures: How many images a gallery shows at most. The galleries by class share this number
            between the classes, and show at least one image of each of this many classes.
    """
    ranking = ImageRanking(predictions)
    galleries = [
        Gallery(
            "most_incorrect",
            "Most wrong",
            "Of each class the mistakes in which the label had the lowest probability.",
            ranking.of_all_classes(pictures, correct=False),
        ),
        Gallery(
            "top_losses",
            "Highest loss",
            "The images whose label surprises the model most.",
            ranking.top_losses()[:pictures],
        ),
        Gallery(
            "most_uncertain",
            "Most uncertain",
            "The images nearest to another prediction.",
            ranking.most_uncertain()[:pictures],
        ),
        Gallery(
            "random_incorrect",
            "Wrong, at random",
            "Mistakes drawn at random.",
            ranking.at_random(correct=False)[:pictures],
        ),
        Gallery(
            "most_correct",
            "Most right",
            "Of each class the images whose label had the highest probability.",
            ranking.of_all_classes(pictures, correct=True),
        ),
        Gallery(
            "random_correct",
            "Right, at random",
            "Images that are predicted right, drawn at random.",
            ranking.at_random(correct=True)[:pictures],
        ),
    ]
    return [gallery for gallery in galleries if len(gallery.index)]


def _distinct(parts: list[NDArray[np.int64]]) -> Iterator[NDArray[np.int64]]:
    """The parts without images that an earlier part has (with several labels)."""
    seen: set[int] = set()
    for part in parts:
        fresh = [index for index in part.tolist() if index not in seen]
        seen.update(fresh)
        yield np.array(fresh, np.int64)
