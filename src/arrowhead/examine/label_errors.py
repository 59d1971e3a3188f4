"""Find labels that are probably wrong, from features and labels alone.

    store                  features and labels of all splits
      -> copies            the same content with different labels: one of them is wrong, certainly
      -> OutOfFold         margins of heads and of neighbours that have not seen the label
      -> LabelNoise        the two weighed against each other; how often labels are wrong
      -> again             with heads and votes from the labels that agree with the prediction
      -> LabelErrors       ranked labels, an estimate with an interval, label_errors.csv

bench/label_errors.py compares the ranking with margins of scikit-learn's logistic regressions,
held out and in-sample, and with confident learning (Northcutt et al., arXiv:1911.00068).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead import spreadsheet
from arrowhead.data.catalog import Catalog
from arrowhead.errors import ConfigError
from arrowhead.evaluation import label_noise
from arrowhead.evaluation.label_noise import LabelNoise
from arrowhead.features.store import Store
from arrowhead.training import comparison, run
from arrowhead.training.dataset import Data
from arrowhead.training.out_of_fold import HeadMargins, OutOfFold

NO_LABEL = -1
FLAG_SCORE = 0.5  # labels that are more likely wrong than right are flagged
REFITS = 1  # how often the heads are solved again with trust in each label
MIN_REFIT_IMAGES = 10  # of a class, for some of them to be left out
CSV_HEADER = ("path", "label", "suggested", "score", "new_label")
MIN_CSV_IMAGES = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelErrors:
    """Labels ranked from the most to the least suspicious; M of them.

    With one label per image M is the number of images whose label could be judged. With several,
    an entry is one label of one image that may be missing or be too many, and only the most
    suspicious entries are here, as many as there are images.

    Attributes:
        row: int64 (M,), rows of the catalog.
        label: int64 (M,), indices of the manifest's classes: the label that was given. -1: a label
            that may be missing.
        suggested: int64 (M,), the class that fits best among the others. -1: a label that may be
            too many.
        score: float64 (M,), the probability that the label is wrong, estimated from heads and
            neighbours which have not seen it. 1 for copies of an image with different labels, of
            which at least one is wrong.
        flagged: How many of the first labels are more likely wrong than right.
        estimated_errors: How many labels are wrong, estimated: the sum of these probabilities.
        interval: Between which numbers the true one lies with 95 % probability, as far as the
            model of wrong labels holds: each label is wrong with the same probability.
        conflicts: How many labels are wrong with certainty, at the least, since copies of an image
            have different labels.
        accuracy: Share of the judged labels that heads predict which were not trained on the
            image. nan if none could be judged.
        learnable: Whether these predictions are better than those of the classes' frequencies
            (p < 0.01). If they are not, nothing but copies is flagged: labels that the features
            do not explain cannot be judged by them.
        not_judged: Images of classes with a single different image.
        multi: Whether images have several labels.
    """

    row: NDArray[np.int64]
    label: NDArray[np.int64]
    suggested: NDArray[np.int64]
    score: NDArray[np.float64]
    flagged: int
    estimated_errors: float
    interval: tuple[float, float]
    conflicts: int
    accuracy: float
    learnable: bool
    not_judged: int
    multi: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class _Evidence:
    """What is known about the labels of N images, or of N x C labels, as flat arrays.

    wrong: The probability that each label is wrong; nan: not judged.
    """

    wrong: NDArray[np.float64]
    other: NDArray[np.int64]
    noise: LabelNoise | None
    accuracy: float
    learnable: bool


def find_label_errors(store: Store) -> LabelErrors:
    """Rank the labels of all readable images of a store, whatever their split.

    Args:
        store: A feature store; its first views are used.

    Raises:
        ConfigError: The images have fewer than two classes.
    """
    data, row = run.read_data(store, "cpu")
    return rank_labels(data, row)


def rank_labels(data: Data, row_N: NDArray[np.int64]) -> LabelErrors:
    """Rank the labels of images: see `find_label_errors`.

    Args:
        data: Features and labels; the splits do not matter.
        row_N: The row of each image in the catalog.
    """
    if len(data.classes) < 2 and not data.multilabel:
        raise ConfigError(
            f"All images have the same label: {', '.join(data.classes) or 'none'}.",
            "images of two or more classes.",
            "add images of another class.",
        )
    evidence = _judge(data)
    preferred_N, conflicting_N, certain = _conflicting_copies(data, evidence.wrong)
    score = evidence.wrong if evidence.learnable else np.minimum(evidence.wrong, FLAG_SCORE)
    judged = np.isfinite(score)
    score = np.where(conflicting_N, 1.0, np.where(judged, score, 0.0))
    suggested = np.where(conflicting_N & (preferred_N != NO_LABEL), preferred_N, evidence.other)
    key, columns = data.key, 1
    if data.multilabel:
        columns = len(data.classes)
        key = np.repeat(key, columns)
    order = np.lexsort((np.arange(len(score)), key, -score))
    order = order[(judged | conflicting_N)[order]][: len(data.key)]
    image, label, suggested = _entries(data, order, suggested)
    wrong = np.where(conflicting_N | ~judged, 0.0, evidence.wrong)
    low, high = evidence.noise.interval if evidence.noise else (0.0, 0.0)
    return LabelErrors(
        row=row_N[image],
        label=label,
        suggested=suggested,
        score=score[order],
        flagged=int((score[order] > FLAG_SCORE).sum()),
        estimated_errors=certain + float(wrong.sum()),
        interval=(max(low, float(certain)), max(high, certain + float(wrong.sum()))),
        conflicts=certain,
        accuracy=evidence.accuracy,
        learnable=evidence.learnable,
        not_judged=int((~judged).sum()) // columns,
        multi=data.multilabel,
    )


def _entries(
    data: Data, order: NDArray[np.int64], suggested: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return image, given label and suggested label of entries."""
    label = data.label.numpy()
    if not data.multilabel:
        return order, label[order].astype(np.int64), suggested[order]
    image, column = np.divmod(order, len(data.classes))
    given = label[image, column] > 0
    return image, np.where(given, column, NO_LABEL), np.where(given, NO_LABEL, column)


# ----------------------------------------------------------------------------- the evidence


def _judge(data: Data) -> _Evidence:
    """Estimate the probability that each label is wrong."""
    label = data.label.numpy()
    entries = label.size
    nothing = _Evidence(
        wrong=np.full(entries, np.nan),
        other=np.full(entries, NO_LABEL),
        noise=None,
        accuracy=np.nan,
        learnable=False,
    )
    try:
        folds = OutOfFold(data)
    except ConfigError:  # each class has a single different image
        return nothing
    heads = folds.head_margins()
    judged = np.isfinite(heads.margin).reshape(-1)
    if data.multilabel:
        judged &= np.tile(label.min(0) != label.max(0), len(label))
    if not judged.any():
        return nothing
    present = label.reshape(-1)[judged] > 0 if data.multilabel else None
    noise = _fit(heads, folds.neighbour_margins(), judged, present)
    first = heads
    for _ in range(REFITS):
        trust = _trust(noise.margin, judged, label)
        heads = folds.head_margins(trust)
        noise = _fit(heads, folds.neighbour_margins(trust), judged, present)
    wrong = np.full(entries, np.nan)
    wrong[judged] = noise.wrong
    other = heads.other.reshape(-1) if not data.multilabel else np.full(entries, NO_LABEL)
    return _Evidence(
        wrong=wrong,
        other=other,
        noise=noise,
        accuracy=float((first.margin.reshape(-1)[judged] > 0).mean())
        if data.multilabel
        else float((first.predicted == label)[judged].mean()),
        learnable=_is_learnable(first.margin.reshape(-1), judged, data),
    )


def _fit(
    heads: HeadMargins,
    neighbours: dict[int, NDArray[np.float32]],
    judged: NDArray[np.bool_],
    present: NDArray[np.bool_] | None,
) -> LabelNoise:
    """Weigh heads and neighbours; of the numbers of neighbours, the most likely is taken."""
    head = heads.margin.reshape(-1)[judged]
    fits = {}
    for count, margin in neighbours.items():
        both = np.stack([head, margin.reshape(-1)[judged].astype(np.float64)], 1)
        fits[count] = both, label_noise.fit(both, present, interval=False)
    best, _ = min(fits.values(), key=lambda one: one[1].cost)
    return label_noise.fit(best, present)


def _trust(
    margin: NDArray[np.float64], judged: NDArray[np.bool_], label: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the weight of each image: 0 if any of its labels is not the one predicted, else 1.

    Heads that were trained with wrong labels are as unsure as these are frequent, so that their
    predictions explain every wrong label without an error. Small classes keep all of their images:
    those that are left would look wrong without the others.
    """
    trust = np.ones(judged.shape)
    trust[judged] = margin > 0
    if label.ndim == 1:
        return np.where(np.bincount(label)[label] < MIN_REFIT_IMAGES, 1.0, trust)
    trust = trust.reshape(label.shape)
    lowest: NDArray[np.float64] = np.where(label.sum(0) < MIN_REFIT_IMAGES, 1.0, trust).min(1)
    return lowest


def _is_learnable(margin: NDArray[np.float64], judged: NDArray[np.bool_], data: Data) -> bool:
    """Whether held-out predictions beat those of the classes' frequencies, on different images."""
    label = data.label.numpy()
    if data.multilabel:
        share = np.clip(label.mean(0), 1e-6, 1 - 1e-6)
        prior = np.where(label > 0, np.log(share), np.log1p(-share)).reshape(-1)
        image = np.repeat(np.arange(len(label)), label.shape[1])[judged]
    else:
        prior = np.log(np.bincount(label)[label] / len(label))
        image = np.arange(len(label))[judged]
    gain = -np.logaddexp(0, -margin[judged]) - prior[judged]
    _, group = np.unique(data.key[image], return_inverse=True)
    gain_by_image = np.bincount(group, gain) / np.bincount(group)
    return bool(gain_by_image.sum() > 0 and comparison.paired_p_value(gain_by_image) < 0.01)


# ------------------------------------------------------------------------------- exact copies


def _conflicting_copies(
    data: Data, wrong: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_], int]:
    """Find copies of an image with different labels.

    The label of most copies counts as the right one. If two are equally frequent, every copy
    conflicts, and the other one is suggested.

    Returns:
        The label that a conflicting copy should have, int64, -1 with several labels per image;
        whether each label conflicts; and how many labels must be wrong.
    """
    label = data.label.numpy()
    if data.multilabel:
        columns = [
            _conflicts(data.key, label[:, one].astype(np.int64)) for one in range(label.shape[1])
        ]
        conflicting = np.stack([one[1] for one in columns], 1).reshape(-1)
        return np.full(label.size, NO_LABEL), conflicting, sum(one[2] for one in columns)
    return _conflicts(data.key, label)


def _conflicts(
    key: NDArray[np.uint64], label: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_], int]:
    """See `_conflicting_copies`, for one label per image."""
    preferred, conflicting, certain = np.full(len(label), NO_LABEL), np.zeros(len(label), bool), 0
    _, group, count = np.unique(key, return_inverse=True, return_counts=True)
    copies = np.flatnonzero(count[group] > 1)
    copies = copies[np.argsort(group[copies], kind="stable")]
    starts = np.flatnonzero(np.diff(group[copies], prepend=-1))
    for rows in np.split(copies, starts[1:]) if len(copies) else []:
        names, number = np.unique(label[rows], return_counts=True)
        if len(names) == 1:
            continue
        certain += int(number.sum() - number.max())
        tied = names[number == number.max()]
        preferred[rows] = np.where(label[rows] == tied[0], tied[-1], tied[0])
        conflicting[rows] = (label[rows] != tied[0]) | (len(tied) > 1)
    return preferred, conflicting, certain


# ---------------------------------------------------------------------------------- the table


@dataclass(frozen=True, kw_only=True, slots=True)
class Suggestion:
    """What an image's label should be; several labels are joined by |.

    Attributes:
        row: The row of the catalog.
        label: The label that was given, "" for none.
        suggested: The label to give instead; "" if none of the changes is likely.
        score: The highest score of the image's labels (see `LabelErrors.score`).
    """

    row: int
    label: str
    suggested: str
    score: float


def suggestions(errors: LabelErrors, catalog: Catalog, images: int) -> list[Suggestion]:
    """Return the most suspicious images with their labels as text, most suspicious first.

    With several labels per image, `suggested` has all changes that are more likely right than
    wrong, or else the most likely one.

    Args:
        errors: The ranked labels.
        catalog: The catalog of the store.
        images: The maximum number of images.
    """
    classes = catalog.classes
    changes: dict[int, list[int]] = {}  # positions of the entries by catalog row
    for position, row in enumerate(errors.row.tolist()):
        if row in changes:
            if errors.score[position] > FLAG_SCORE:
                changes[row].append(position)
        elif len(changes) < images:
            changes[row] = [position]
        elif not errors.multi:
            break
    result = []
    for row, positions in changes.items():
        labels = set(catalog.labels[row])
        for position in positions:
            given, other = int(errors.label[position]), int(errors.suggested[position])
            if errors.multi or other != NO_LABEL:
                labels -= {classes[given]} if given != NO_LABEL else set()
                labels |= {classes[other]} if other != NO_LABEL else set()
        before, after = "|".join(catalog.labels[row]), "|".join(sorted(labels))
        suggestion = Suggestion(
            row=row,
            label=before,
            suggested="" if after == before else after,
            score=float(errors.score[positions[0]]),
        )
        result.append(suggestion)
    return result


def write_csv(errors: LabelErrors, catalog: Catalog, path: Path, images: int | None = None) -> None:
    """Write label_errors.csv: path, label, suggested, score, and an empty column new_label.

    Look at the images, fill in new_label where the label is wrong, and give the file to
    `arrowhead relabel`. Only labels that are more likely wrong than right have a suggestion, so
    that `--column suggested` changes no other.

    Args:
        errors: The ranked labels.
        catalog: The catalog of the store.
        path: The file.
        images: The number of images, most suspicious first; None: twice as many as are flagged,
            but at least 100.
    """
    with spreadsheet.open_csv(path, CSV_HEADER) as writer:
        for row in table(errors, catalog, images):
            writer.row([row["path"], row["label"], row["suggested"], round(row["score"], 4), None])


def table(errors: LabelErrors, catalog: Catalog, images: int | None = None) -> list[dict[str, Any]]:
    """The rows of label_errors.csv without new_label: path, label, suggested (or None), score."""
    count = max(2 * errors.flagged, MIN_CSV_IMAGES) if images is None else images
    return [
        {
            "path": catalog.paths[one.row],
            "label": one.label,
            "suggested": one.suggested if one.score > FLAG_SCORE else None,
            "score": one.score,
        }
        for one in suggestions(errors, catalog, count)
    ]
