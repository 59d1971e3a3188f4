"""Find labels that are probably wrong, from features and labels alone.

    store                  features and labels of all splits
      -> copies            held out together; of an image with different labels, one is wrong
      -> OutOfFold         margins of heads and of neighbours that have not seen the label
      -> LabelNoise        the two weighed against each other; how often labels are wrong
      -> again             with heads and votes from the labels that agree with the prediction:
                           the order; how many are wrong, unless it explains the labels worse
      -> LabelErrors       ranked labels, an estimate with an interval, label_errors.csv

bench/label_errors.py compares the ranking with margins of scikit-learn's logistic regressions,
held out and in-sample, and with confident learning (Northcutt et al., arXiv:1911.00068).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
MIN_COPY_PROB = 0.6  # of a label, for it to be suggested to the other copies of the image
MIN_ACCURACY = 0.75  # of held-out predictions; below, they are wrong more often than labels are
DEFAULT_RATE = 0.05  # of wrong labels, where none could be estimated
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
            too many; with one label per image, none, since exact copies of the image have
            different labels and it is open which is right.
        score: float64 (M,), the probability that the label is wrong, estimated from heads and
            neighbours which have not seen it. For exact copies with different labels, of which
            one is right at most, it also counts how many copies have each label.
        flagged: How many of the first labels are more likely wrong than right, or have a copy with
            another label so that it is open which of the two is wrong.
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

    @property
    def reliable(self) -> bool:
        """Whether a contradiction speaks against the label rather than against the prediction."""
        return self.learnable and (self.multi or self.accuracy >= MIN_ACCURACY)


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


def find_label_errors(store: Store, near_copies: Sequence[NDArray[np.int64]] = ()) -> LabelErrors:
    """Rank the labels of all readable images of a store, whatever their split.

    Args:
        store: A feature store; its first views are used.
        near_copies: Groups of catalog rows that show one photo: no copy is judged by another.
            Exact copies need not be named.

    Raises:
        ConfigError: The images have fewer than two classes.
    """
    data, row = run.read_data(store, "cpu")
    return rank_labels(data, row, near_copies)


def rank_labels(
    data: Data, row_N: NDArray[np.int64], near_copies: Sequence[NDArray[np.int64]] = ()
) -> LabelErrors:
    """Rank the labels of images: see `find_label_errors`.

    Args:
        data: Features and labels; the splits do not matter.
        row_N: The row of each image in the catalog.
        near_copies: Groups of rows of the catalog.
    """
    if len(data.classes) < 2 and not data.multilabel:
        raise ConfigError(
            f"All images have the same label: {', '.join(data.classes) or 'none'}.",
            "images of two or more classes.",
            "add images of another class.",
        )
    evidence = _judge(replace(data, key=_merge_copies(data.key, row_N, near_copies)))
    judged = np.isfinite(evidence.wrong)
    copies = _conflicting_copies(data, evidence)
    reliable = data.multilabel or evidence.accuracy >= MIN_ACCURACY
    sure = evidence.learnable and reliable
    score = evidence.wrong if sure else np.minimum(evidence.wrong, FLAG_SCORE)
    score = np.where(copies.conflicting, copies.wrong, np.where(judged, score, 0.0))
    suggested = np.where(copies.conflicting, copies.preferred, evidence.other)
    flag = (score > FLAG_SCORE) | copies.undecided
    key, columns = data.key, 1
    if data.multilabel:
        columns = len(data.classes)
        key = np.repeat(key, columns)
    order = np.lexsort((np.arange(len(score)), key, -score, ~flag))
    order = order[(judged | flag)[order]][: len(data.key)]
    image, label, suggested = _entries(data, order, suggested)
    wrong = np.where(copies.conflicting | ~judged, 0.0, evidence.wrong)
    low, high = evidence.noise.interval if evidence.noise else (0.0, 0.0)
    certain = copies.certain
    return LabelErrors(
        row=row_N[image],
        label=label,
        suggested=suggested,
        score=score[order],
        flagged=int(flag[order].sum()),
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
        again = _fit(heads, folds.neighbour_margins(trust), judged, present)
        noise = _choose_number(noise, again)
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


def _choose_number(first: LabelNoise, again: LabelNoise) -> LabelNoise:
    """Return the second fit, or its order with the probabilities of the first.

    Heads without the labels that contradict them rank better, and are sharper, so they should find
    no fewer wrong labels. But if many contradictions come from one kind of image (dark photos, one
    camera), they are surer of that kind than they should be, explain the labels worse than before,
    and nearly every contradiction passes for a mistake of theirs.
    """
    if again.cost <= first.cost or again.wrong.sum() >= first.wrong.sum():
        return again
    wrong = np.empty_like(first.wrong)
    wrong[np.argsort(again.wrong, kind="stable")] = np.sort(first.wrong)
    return replace(first, wrong=wrong, margin=again.margin)


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


# ------------------------------------------------------------------------------------- copies


def _merge_copies(
    key_N: NDArray[np.uint64], row_N: NDArray[np.int64], groups: Sequence[NDArray[np.int64]]
) -> NDArray[np.uint64]:
    """Return keys that are the same for all images of a group of near copies."""
    key_N, position = key_N.copy(), {row: n for n, row in enumerate(row_N.tolist())}
    for group in groups:
        members = [position[row] for row in group.tolist() if row in position]
        if members:
            key_N[np.isin(key_N, key_N[members])] = key_N[members].min()
    return key_N


@dataclass(frozen=True, kw_only=True, slots=True)
class _Copies:
    """Exact copies of an image with different labels, as flat arrays like those of `_Evidence`.

    Attributes:
        conflicting: Whether a copy of the image has another label.
        wrong: The probability that the label is wrong, if it conflicts.
        preferred: The label that a conflicting copy should have; -1 if it has it, or if undecided.
        undecided: Whether the label conflicts and no label is likely to be the right one.
        certain: How many labels must be wrong.
    """

    conflicting: NDArray[np.bool_]
    wrong: NDArray[np.float64]
    preferred: NDArray[np.int64]
    undecided: NDArray[np.bool_]
    certain: int


def _conflicting_copies(data: Data, evidence: _Evidence) -> _Copies:
    """Find exact copies of an image with different labels, and judge which label is right."""
    label = data.label.numpy()
    rate = float(evidence.noise.rate.mean()) if evidence.noise else DEFAULT_RATE
    # The prediction's log odds of the label, without what the label itself contributed.
    wrong = np.clip(np.nan_to_num(evidence.wrong, nan=rate), 1e-9, 1 - 1e-9)
    odds = np.log1p(-wrong) - np.log(wrong) + np.log(rate) - np.log1p(-rate)
    odds = np.where(np.isfinite(evidence.wrong) & evidence.learnable, odds, 0.0)
    if not data.multilabel:
        return _conflicts(data.key, label, odds, rate)
    odds = odds.reshape(label.shape)
    columns = [
        _conflicts(data.key, label[:, one].astype(np.int64), odds[:, one], rate)
        for one in range(label.shape[1])
    ]
    undecided = np.stack([one.undecided for one in columns], 1).reshape(-1)
    wrong = np.stack([one.wrong for one in columns], 1).reshape(-1)
    return _Copies(
        conflicting=np.stack([one.conflicting for one in columns], 1).reshape(-1),
        wrong=np.where(undecided, np.minimum(wrong, FLAG_SCORE), wrong),  # no change is suggested
        preferred=np.full(label.size, NO_LABEL),
        undecided=undecided,
        certain=sum(one.certain for one in columns),
    )


def _conflicts(
    key: NDArray[np.uint64], label: NDArray[np.int64], odds: NDArray[np.float64], rate: float
) -> _Copies:
    """See `_conflicting_copies`, for one label per image.

    The right label is one of those that the copies have. How likely each of them is: the
    probability that the predictions give it, times that of so many right and wrong copies.
    """
    preferred, conflicting = np.full(len(label), NO_LABEL), np.zeros(len(label), bool)
    wrong, undecided, certain = np.zeros(len(label)), np.zeros(len(label), bool), 0
    _, group, count = np.unique(key, return_inverse=True, return_counts=True)
    copies = np.flatnonzero(count[group] > 1)
    copies = copies[np.argsort(group[copies], kind="stable")]
    starts = np.flatnonzero(np.diff(group[copies], prepend=-1))
    for rows in np.split(copies, starts[1:]) if len(copies) else []:
        names, position, number = np.unique(label[rows], return_inverse=True, return_counts=True)
        if len(names) == 1:
            continue
        certain += int(number.sum() - number.max())
        predicted = -np.logaddexp(0, -np.bincount(position, odds[rows]) / number)
        log = predicted + number * (np.log1p(-rate) - np.log(rate))
        prob = np.exp(log - np.logaddexp.reduce(log))
        best = int(prob.argmax())
        conflicting[rows], wrong[rows] = True, 1 - prob[position]
        undecided[rows] = prob[best] < MIN_COPY_PROB
        if prob[best] >= MIN_COPY_PROB:
            preferred[rows] = np.where(position == best, NO_LABEL, names[best])
    return _Copies(
        conflicting=conflicting,
        wrong=wrong,
        preferred=preferred,
        undecided=undecided,
        certain=certain,
    )


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
