"""What finished scores hold: counts by label and fault, histograms, agreement with
folders named after classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.bundle.format import Bundle
from arrowhead.bundle.known_images import TRAINED, VALIDATED
from arrowhead.evaluation import metrics
from arrowhead.inference.score_request import Request

BINS = np.linspace(0, 1, 21)
NAMED = 5  # files with faults, by path


@dataclass(kw_only=True, slots=True)
class ScoreSummary:
    """What the parts of `out` hold. faults: by kind; labels: images by label (one that may have
    several counts under each it is given); chances, novelties: histograms, in twenty steps from 0
    to 1 (novelty: 0 to 2).
    """

    faults: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    probability_counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(20, np.int64))
    novelty_counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(20, np.int64))
    novel: int | None = None
    """How many images are marked as novel; None where --flag-novel did not ask for marks."""
    folders: Agreement | None = None
    """How the labels agree with folders that are named after classes, if they are."""
    trained: int | None = None
    """How many of the images the bundle was trained on; None where it does not say."""
    validated: int | None = None
    """How many of the others it was validated with."""
    torn: list[str] = field(default_factory=list)
    """Paths of the first files that could not be read."""

    @property
    def used(self) -> dict[str, int] | None:
        """How many of the images the bundle was made of, as JSON takes it."""
        if self.trained is None or self.validated is None:
            return None
        return {"trained_on": self.trained, "validated": self.validated}


@dataclass(frozen=True, slots=True)
class Agreement:
    """How many of the images in folders that are named after classes are given that class."""

    images: int
    right: int

    def plain(self) -> dict[str, Any]:
        """As JSON takes it, with the accuracy and its 95 % interval."""
        return {
            "images": self.images,
            "right": self.right,
            "accuracy": self.right / self.images,
            "accuracy_interval": list(metrics.wilson_interval(self.right, self.images)),
        }


class _Folders:
    """Whether images lie in CLASS/… or in SPLIT/CLASS/…, and how their labels agree with that."""

    def __init__(self, classes: Sequence[str]) -> None:
        self._classes = set(classes)
        self._images, self._right = Counter[int](), Counter[int]()
        self._odd: set[int] = set()

    def add(self, path: str, label: str | None) -> None:
        """Count one image; label: None at a fault."""
        folders = path.split("/")[:-1]
        for depth in {0, 1} - self._odd:
            if len(folders) <= depth or folders[depth] not in self._classes:
                self._odd.add(depth)
            elif label is not None:
                self._images[depth] += 1
                self._right[depth] += label == folders[depth]

    def agreement(self) -> Agreement | None:
        """None where the folders are not named after classes."""
        for depth in sorted({0, 1} - self._odd):
            if self._images[depth]:
                return Agreement(self._images[depth], self._right[depth])
        return None


def summarize(request: Request, bundle: Bundle) -> ScoreSummary:
    """Count what the parts hold, one part at a time.

    Raises DataError unless they hold every input once, in order.
    """
    marks = request.config.flag_novel
    made = ScoreSummary(
        labels=Counter(dict.fromkeys(bundle.classes, 0)), novel=0 if marks else None
    )
    folders = _Folders(bundle.classes)
    used = Counter[int]()
    names = ["image_id", "labels" if bundle.multi else "label", "probability", "fault"]
    names += ["novelty"] if bundle.novelty else []
    names += ["novel"] if marks else []
    for columns in request.read(names):
        pairs = zip(columns["path"], columns["fault"], strict=True)
        torn = [(path, fault.partition(":")[0]) for path, fault in pairs if fault]
        made.faults.update(kind for _, kind in torn)
        made.torn += [path for path, _ in torn][: NAMED - len(made.torn)]
        if bundle.images:
            use_N = bundle.images.use(columns["image_id"])
            used.update(use_N[[fault is None for fault in columns["fault"]]].tolist())
        if bundle.multi:
            made.labels.update(label for given in columns["labels"] for label in given or ())
        else:
            made.labels.update(label for label in columns["label"] if label is not None)
            for path, label in zip(columns["path"], columns["label"], strict=True):
                folders.add(path, label)
        made.probability_counts += np.histogram(_there(columns["probability"]), BINS)[0]
        made.novelty_counts += np.histogram(_there(columns.get("novelty", [])), 2 * BINS)[0]
        if made.novel is not None:
            made.novel += sum(map(bool, columns["novel"]))
    made.folders = folders.agreement() if not bundle.multi else None
    if bundle.images:
        made.trained, made.validated = used[TRAINED], used[VALIDATED]
    return made


def _there(values: list[float | None]) -> list[float]:
    return [value for value in values if value is not None]
