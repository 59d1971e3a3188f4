"""Summarizes scores: counts by label and fault, histograms, agreement with folder names."""

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
from arrowhead.inference.score_request import ScoreRequest

BIN_EDGES = np.linspace(0, 1, 21)
MAX_UNREADABLE_PATHS = 5


@dataclass(kw_only=True, slots=True)
class ScoreSummary:
    """Counts over all scored images."""

    faults: Counter[str] = field(default_factory=Counter)
    """By kind."""
    labels: Counter[str] = field(default_factory=Counter)
    """Images by label; an image with several labels counts for each."""
    probability_counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(20, np.int64))
    """Histogram of the probability of the most probable label: 20 bins from 0 to 1."""
    novelty_counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(20, np.int64))
    """Histogram of the novelty: 20 bins from 0 to 2."""
    novel: int | None = None
    """Images that are marked as novel; None without --flag-novel."""
    folders: Agreement | None = None
    """Agreement of the labels with folder names, if folders are named after classes."""
    trained: int | None = None
    """Images that the bundle was trained on; None if the bundle does not record that."""
    validated: int | None = None
    """Other images that it was validated with."""
    unreadable: list[str] = field(default_factory=list)
    """Paths of the first files that could not be read."""

    @property
    def images_used(self) -> dict[str, int] | None:
        """How many of the images the bundle was made from, for JSON."""
        if self.trained is None or self.validated is None:
            return None
        return {"trained_on": self.trained, "validated": self.validated}


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of the images in folders named after classes, how many got that class (`right`)."""

    images: int
    right: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with the accuracy and its 95 % interval."""
        return {
            "images": self.images,
            "right": self.right,
            "accuracy": self.right / self.images,
            "accuracy_interval": list(metrics.wilson_interval(self.right, self.images)),
        }


class _FolderAgreement:
    """Compares labels with folder names in the layouts CLASS/… (depth 0) and SPLIT/CLASS/… (1).

    A layout is ruled out by the first image that does not fit it.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self._classes = set(classes)
        self._images, self._right = Counter[int](), Counter[int]()
        self._possible_depths = {0, 1}

    def add(self, path: str, label: str | None) -> None:
        """Count one image; label: None at a fault."""
        folders = path.split("/")[:-1]
        for depth in list(self._possible_depths):
            if len(folders) <= depth or folders[depth] not in self._classes:
                self._possible_depths.remove(depth)
            elif label is not None:
                self._images[depth] += 1
                self._right[depth] += label == folders[depth]

    def result(self) -> Agreement | None:
        """The agreement; None if the folders are not named after classes."""
        for depth in sorted(self._possible_depths):
            if self._images[depth]:
                return Agreement(self._images[depth], self._right[depth])
        return None


def summarize(request: ScoreRequest, bundle: Bundle) -> ScoreSummary:
    """Summarize the finished parts, one part at a time.

    Raises DataError if they do not hold every input once, in order.
    """
    flag_novel = request.config.flag_novel
    summary = ScoreSummary(
        labels=Counter(dict.fromkeys(bundle.classes, 0)), novel=0 if flag_novel else None
    )
    folders = _FolderAgreement(bundle.classes)
    uses = Counter[int]()
    names = ["image_id", "labels" if bundle.multi else "label", "probability", "fault"]
    names += ["novelty"] if bundle.novelty else []
    names += ["novel"] if flag_novel else []
    for columns in request.read_columns(names):
        rows = zip(columns["path"], columns["fault"], strict=True)
        faults = [(path, fault.partition(":")[0]) for path, fault in rows if fault]
        summary.faults.update(kind for _, kind in faults)
        missing_paths = MAX_UNREADABLE_PATHS - len(summary.unreadable)
        summary.unreadable += [path for path, _ in faults][:missing_paths]
        if bundle.known_images:
            use_N = bundle.known_images.lookup(columns["image_id"])
            uses.update(use_N[[fault is None for fault in columns["fault"]]].tolist())
        if bundle.multi:
            summary.labels.update(label for labels in columns["labels"] for label in labels or ())
        else:
            summary.labels.update(label for label in columns["label"] if label is not None)
            for path, label in zip(columns["path"], columns["label"], strict=True):
                folders.add(path, label)
        summary.probability_counts += _histogram(columns["probability"], BIN_EDGES)
        summary.novelty_counts += _histogram(columns.get("novelty", []), 2 * BIN_EDGES)
        if summary.novel is not None:
            summary.novel += sum(map(bool, columns["novel"]))
    summary.folders = folders.result() if not bundle.multi else None
    if bundle.known_images:
        summary.trained, summary.validated = uses[TRAINED], uses[VALIDATED]
    return summary


def _histogram(values: list[float | None], edges: NDArray[np.float64]) -> NDArray[np.int64]:
    counts: NDArray[np.int64]
    counts, _ = np.histogram([value for value in values if value is not None], edges)
    return counts
