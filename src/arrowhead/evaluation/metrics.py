"""Every figure of a head, from its logits for rows it was not trained on.

    all logits, labels      -> evaluate     every figure of a head, ready for JSON
                            -> temperature  one number that makes probabilities honest
    probabilities, labels   -> thresholds   from where on an image is given a label

Labels are int64 (N,), or uint8 (N, C) of zeros and ones where an image may have several.

Whatever goes by rank (AUROC, average precision, thresholds) needs one sort of a class's scores and
the places of its positives in it: 5 s for all of them at 200,000 x 1,000, where scikit-learn's
functions, which the tests compare with, would take 85 s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Labels = NDArray[np.int64] | NDArray[np.uint8]
TOP = 5
BINS = 15


# ---------------------------------------------------------------------------- evaluation


def evaluate(
    logit_NC: NDArray[Any],
    label: Labels,
    classes: list[str],
    *,
    temperature: float = 1.0,
    thresholds: NDArray[np.float64] | None = None,
) -> dict[str, Any]:
    """Every figure of a head, from its logits (any float type) for rows it was not trained on.

    All of it is plain and finite, as JSON wants it; None where a figure is not defined.

    One label per image:
        images; loss: mean cross entropy of the logits as they are, in nats; accuracy;
        accuracy_interval: its 95 % confidence interval;
        top_5_accuracy, of more than 5 classes: of equal logits the first counts more;
        balanced_accuracy: mean recall of the classes that occur; auroc: of two classes that of the
        second, of more the mean of each against the rest, over the classes that occur;
        ece, ece_low, ece_high: calibration error of softmax(logits / temperature), and its 95 %
        interval (see `calibration_error`), ece_uncalibrated: of softmax(logits);
        per_class: see `per_class`; confusion: see `confusion`.
    Several labels per image; an image is given those whose sigmoid(logit / temperature) reaches the
    label's threshold, 0.5 where there are none:
        images; loss: mean binary cross entropy of all N x C decisions, of the logits as they are,
        in nats; accuracy: share of the decisions that are right at 0.5, as in the epochs of a
        training; accuracy_at_thresholds: at the thresholds, as all that follows; f1_samples,
        f2_samples: mean over images (the planet challenge's measure), f1_macro, f2_macro: mean over
        labels, each 0 where undefined, as in scikit-learn; auroc, mean_average_precision: mean over
        the labels for which they are defined; per_class: precision, recall, f1, threshold and
        images, by label.
    """
    # Logits of a head that diverged are figures too: None.
    with np.errstate(invalid="ignore", over="ignore"):
        if label.ndim == 2:
            threshold_C = (
                np.full(len(classes), 0.5) if thresholds is None else np.asarray(thresholds)
            )
            return dict(plain(_several_labels(logit_NC, label, classes, temperature, threshold_C)))
        return dict(plain(_one_label(logit_NC, label, classes, temperature)))


def plain(figure: Any) -> Any:
    """The same in Python's own types; None for what is not a finite number."""
    if isinstance(figure, dict):
        return {name: plain(value) for name, value in figure.items()}
    if isinstance(figure, np.ndarray):
        return figure.tolist()
    if isinstance(figure, (float, np.floating)):
        return float(figure) if math.isfinite(figure) else None
    return figure


def _one_label(
    logit_NC: NDArray[Any], label_N: NDArray[Any], classes: list[str], temperature: float
) -> dict[str, Any]:
    rows, count = logit_NC.shape
    guess_N, ahead_N = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    nats_N, raw_N, sure_N, norm_N = np.zeros((4, rows))
    for here in slices(rows, count):
        z_BC, own_B1 = logit_NC[here].astype(np.float64), label_N[here, None]
        z_B1, top_B = np.take_along_axis(z_BC, own_B1, 1), z_BC.max(1)
        tied_BC = (z_BC == z_B1) & (np.arange(count) < own_B1)
        guess_N[here], ahead_N[here] = z_BC.argmax(1), ((z_BC > z_B1) | tied_BC).sum(1)
        total_B, norm_N[here] = log_sum_exp(z_BC), log_sum_exp(z_BC / temperature)
        nats_N[here], raw_N[here] = total_B - z_B1[:, 0], np.exp(top_B - total_B)
        sure_N[here] = np.exp(top_B / temperature - norm_N[here])
    counts_CC = confusion(label_N, guess_N, count)
    right_N, present_C = guess_N == label_N, counts_CC.sum(1)
    error, low, high = calibration_error(sure_N, right_N)
    figures = {
        "images": rows,
        "loss": _mean(nats_N),
        "accuracy": _mean(right_N),
        "accuracy_interval": list(interval(int(right_N.sum()), rows)),
        "balanced_accuracy": _mean((np.diag(counts_CC) / np.maximum(present_C, 1))[present_C > 0]),
        "auroc": _auroc_of_classes(logit_NC, label_N, temperature, norm_N),
        "ece": error,
        "ece_low": low,
        "ece_high": high,
        "ece_uncalibrated": calibration_error(raw_N, right_N)[0],
        "per_class": per_class(counts_CC, classes),
        "confusion": counts_CC,
    }
    if count > TOP:
        figures[f"top_{TOP}_accuracy"] = _mean(ahead_N < TOP)
    return figures


def _auroc_of_classes(
    logit_NC: NDArray[Any], label_N: NDArray[Any], temperature: float, norm_N: NDArray[np.float64]
) -> float:
    """Mean over the classes that occur; norm_N: log of the softmax's denominator."""
    rows, count = logit_NC.shape
    if count == 2:
        wide_N2 = logit_NC.astype(np.float64)
        return _Ranks(wide_N2[:, 1] - wide_N2[:, 0], label_N == 1).auroc
    areas = []
    for here in slices(count, rows):
        # Of log-probabilities: they rank as probabilities do, but do not run into 0.
        z_BN = np.ascontiguousarray(logit_NC[:, here].T, np.float64) / temperature - norm_N
        for number, z_N in zip(range(count)[here], z_BN, strict=True):
            if (mine := label_N == number).any():
                areas.append(_Ranks(z_N, mine).auroc)
    return _mean(np.array(areas))


def _several_labels(
    logit_NC: NDArray[Any],
    label_NC: NDArray[Any],
    classes: list[str],
    temperature: float,
    threshold_C: NDArray[np.float64],
) -> dict[str, Any]:
    rows, count = logit_NC.shape
    right_C, given_C, present_C = np.zeros((3, count), np.int64)
    right_N, given_N, present_N = np.zeros((3, rows), np.int64)
    nats_C, area_C, precision_C = np.zeros((3, count))
    right_at_half = 0
    for here in slices(count, rows):
        z_BN = np.ascontiguousarray(logit_NC[:, here].T, np.float64)
        true_BN = np.ascontiguousarray(label_NC[:, here].T) != 0
        nats_C[here] = (np.logaddexp(0, z_BN) - z_BN * true_BN).sum(1)
        right_at_half += int(((z_BN >= 0) == true_BN).sum())
        # As a bundle gives its probabilities, so that a decision here is a decision there.
        given_BN = (1 / (1 + np.exp(-z_BN / temperature))).astype(np.float32) >= threshold_C[
            here, None
        ]
        both_BN = given_BN & true_BN
        right_C[here], given_C[here], present_C[here] = (
            part.sum(1) for part in (both_BN, given_BN, true_BN)
        )
        for total_N, part in ((right_N, both_BN), (given_N, given_BN), (present_N, true_BN)):
            total_N += part.sum(0)
        ranks = [_Ranks(z_N, true_N) for z_N, true_N in zip(z_BN, true_BN, strict=True)]
        area_C[here] = [one.auroc for one in ranks]
        precision_C[here] = [one.average_precision for one in ranks]
    decisions = rows * count
    wrong = (given_C + present_C - 2 * right_C).sum()
    by_label = _by_name(right_C, given_C, present_C, classes)
    return {
        "images": rows,
        "loss": nats_C.sum() / decisions if decisions else math.nan,
        "accuracy": right_at_half / decisions if decisions else math.nan,
        "accuracy_at_thresholds": 1 - wrong / decisions if decisions else math.nan,
        "f1_samples": _mean(_f_beta(right_N, given_N, present_N, 1)),
        "f2_samples": _mean(_f_beta(right_N, given_N, present_N, 2)),
        "f1_macro": _mean(_f_beta(right_C, given_C, present_C, 1)),
        "f2_macro": _mean(_f_beta(right_C, given_C, present_C, 2)),
        "auroc": _mean(area_C[(present_C > 0) & (present_C < rows)]),
        "mean_average_precision": _mean(precision_C[present_C > 0]),
        "per_class": {
            name: figures | {"threshold": float(threshold)}
            for (name, figures), threshold in zip(by_label.items(), threshold_C, strict=True)
        },
    }


def thresholds(
    probability_NC: NDArray[Any], label_NC: NDArray[np.uint8], beta: float = 2.0
) -> NDArray[np.float64]:
    """The threshold of each label that gives it the best F-beta on these rows: float64 (C,).

    A label is given where its probability reaches the threshold. Every cut that makes a difference
    is tried; of equally good ones the highest is taken, and then the middle between the lowest
    probability that passes and the next one below, so that last bits change no label. beta 2 counts
    recall four times as much as precision does. A label without a positive row gets 0.5.

    F-beta on the rows these were tuned on is too good: the fewer positives a label has, the more.
    For an honest figure, tune on some rows and evaluate on others.
    """
    threshold_C = np.full(probability_NC.shape[1], 0.5)
    for here in slices(len(threshold_C), len(probability_NC)):
        # What is not a number never passes; it is no reason to have no threshold.
        prob_BN = np.nan_to_num(np.ascontiguousarray(probability_NC[:, here].T, np.float64))
        for number, prob_N in zip(range(len(threshold_C))[here], prob_BN, strict=True):
            ranks = _Ranks(prob_N, label_NC[:, number] != 0)
            if len(ranks.own_P):
                threshold_C[number] = ranks.best_threshold(beta)
    return threshold_C


class _Ranks:
    """Where the scores of one class's positive rows stand among all.

    own_P: scores of the positives, highest first. Adding a negative to what passes only makes F
    worse, and both areas are sums over the positives, so no other place needs to be known.
    """

    def __init__(self, score_N: NDArray[np.float64], true_N: NDArray[np.bool_]) -> None:
        self.line_N = np.sort(score_N)
        self.own_P = np.sort(score_N[true_N])[::-1]
        self.below_P = np.searchsorted(self.line_N, self.own_P, "left")

    @property
    def auroc(self) -> float:
        """The chance that a positive stands above a negative, half for a tie; nan without both."""
        rows, own = len(self.line_N), len(self.own_P)
        if not own or own == rows or not self._finite:
            return math.nan
        not_above_P = np.searchsorted(self.line_N, self.own_P, "right")
        # Twice the pairs that are in order; among the positives themselves that is own squared.
        pairs = int(self.below_P.sum()) + int(not_above_P.sum()) - own**2
        return pairs / (2 * own * (rows - own))

    @property
    def average_precision(self) -> float:
        """The mean of the precision at each positive; rows of equal score pass together."""
        if not len(self.own_P) or not self._finite:
            return math.nan
        passed_P, right_P = self._passed()
        return float((right_P / passed_P).mean())

    def best_threshold(self, beta: float) -> float:
        """The threshold with the best F-beta (see `thresholds`); needs a positive."""
        passed_P, right_P = self._passed()
        at = int(_f_beta(right_P, passed_P, np.array(len(self.own_P)), beta).argmax())
        lowest, below = float(self.own_P[at]), int(self.below_P[at])
        middle = (lowest + (float(self.line_N[below - 1]) if below else 0.0)) / 2
        return middle if not below or middle > self.line_N[below - 1] else lowest

    def _passed(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows, and positive rows, whose score is at least that of each positive."""
        right_P = np.searchsorted(-self.own_P, -self.own_P, "right")
        return len(self.line_N) - self.below_P, right_P

    @property
    def _finite(self) -> bool:
        return bool(np.isfinite(self.line_N[[0, -1]]).all())  # nan is sorted to the end


def _f_beta(
    right: NDArray[np.int64], given: NDArray[np.int64], present: NDArray[np.int64], beta: float
) -> NDArray[np.float64]:
    """F-beta of each; 0 where nothing is right, nor could be."""
    weight = beta**2
    score: NDArray[np.float64] = (1 + weight) * right / np.maximum(weight * present + given, 1)
    return score


def calibration_error(
    sure_N: NDArray[np.float64], right_N: NDArray[np.bool_]
) -> tuple[float, float, float]:
    """Expected calibration error: the mean distance of confidence from accuracy, bin by bin (Guo et
    al., arXiv:1706.04599, 2), and its 95 % interval: 1.96 standard deviations of 200 resamples.

    15 bins of equal numbers of images (Nixon et al., arXiv:1904.01685), fewer where a bin would
    have less than 20; equal confidences share a bin. Bins of equal width would leave nearly all
    images in one. nan without images.
    """
    rows = len(sure_N)
    if not rows or not np.isfinite(sure_N).all():
        return math.nan, math.nan, math.nan
    bins = max(1, min(BINS, rows // 20))
    edges = np.sort(sure_N)[np.arange(1, bins) * rows // bins]
    bin_N, gap_N = np.searchsorted(edges, sure_N, "right"), right_N - sure_N

    def error(of: Any) -> float:
        return float(np.abs(np.bincount(bin_N[of], gap_N[of], bins)).sum() / rows)

    draw, found = np.random.default_rng(0), error(slice(None))
    away = 1.96 * float(np.std([error(draw.integers(rows, size=rows)) for _ in range(200)]))
    return found, max(found - away, 0.0), min(found + away, 1.0)


def log_sum_exp(z_BC: NDArray[np.float64]) -> NDArray[np.float64]:
    """The log of each row's sum of exponentials, float64 (B,)."""
    top_B1 = z_BC.max(1, keepdims=True)
    total_B: NDArray[np.float64] = np.log(np.exp(z_BC - top_B1).sum(1)) + top_B1[:, 0]
    return total_B


def _mean(value_N: NDArray[Any]) -> float:
    return float(value_N.mean()) if len(value_N) else math.nan


def slices(length: int, width: int) -> Iterator[slice]:
    """Slices of `length` lines of `width` numbers: 32 MB of float64 at a time, or 16 lines."""
    lines = max(16, 2**22 // max(width, 1))
    for at in range(0, length, lines):
        yield slice(at, min(at + lines, length))


def interval(right: int, images: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % confidence interval of a share, `right` of `images`: Wilson's (JASA 22, 1927), which
    keeps to 0..1 and holds for few images and for shares near 0 and 1.
    """
    if not images:
        return 0.0, 1.0
    share, weight = right / images, z * z / images
    middle = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / images + weight / (4 * images)) / (1 + weight)
    return max(0.0, middle - half), min(1.0, middle + half)


# ------------------------------------------------------------------------------- classes


def confusion(
    label_N: NDArray[np.int64], guess_N: NDArray[np.int64], classes: int
) -> NDArray[np.int64]:
    """Counts, int64 (C, C): row = the label, column = the guess."""
    return np.bincount(label_N * classes + guess_N, minlength=classes**2).reshape(classes, classes)


def per_class(counts_CC: NDArray[np.int64], names: list[str]) -> dict[str, dict[str, float]]:
    """Precision, recall, f1 (0 to 1; 0 where undefined) and number of images, by class."""
    return _by_name(np.diag(counts_CC), counts_CC.sum(0), counts_CC.sum(1), names)


def _by_name(
    right_C: NDArray[np.int64],
    given_C: NDArray[np.int64],
    present_C: NDArray[np.int64],
    names: list[str],
) -> dict[str, dict[str, float]]:
    score_C = _f_beta(right_C, given_C, present_C, 1)
    return {
        name: {
            "precision": float(right_C[i] / max(given_C[i], 1)),
            "recall": float(right_C[i] / max(present_C[i], 1)),
            "f1": float(score_C[i]),
            "images": int(present_C[i]),
        }
        for i, name in enumerate(names)
    }


def class_table(figures: Mapping[str, Mapping[str, float]]) -> list[str]:
    """`per_class` figures as lines of text, the lowest F1 first; a heading, then one per class.

    Classes without an image come last: nothing is known of them.
    """
    names = sorted(figures, key=lambda name: (figures[name]["images"] == 0, figures[name]["f1"]))
    width = max(5, *(len(name) for name in names)) if names else 5
    tuned = any("threshold" in one for one in figures.values())
    head = f"{'class':<{width}}  {'precision':>9}  {'recall':>6}  {'F1':>6}  {'images':>6}"
    lines = [head + ("  threshold" if tuned else "")]
    for name in names:
        one = figures[name]
        line = f"{name:<{width}}  {one['precision']:>9.4f}  {one['recall']:>6.4f}"
        line += f"  {one['f1']:>6.4f}  {int(one['images']):>6}"
        lines.append(line + (f"  {one['threshold']:>9.4f}" if tuned else ""))
    return lines


# --------------------------------------------------------------------------- temperature


def temperature(logit_NC: torch.Tensor, label: torch.Tensor) -> float:
    """The T that makes softmax(logits / T) fit the labels best (Guo et al., arXiv:1706.04599, 4.2).

    With labels (N, C), several per image, that of sigmoid(logits / T). T is sought between 1/20 and
    20, to 10 digits. Where all rows are right it would run to the border; so half a row of every
    class (of several labels: half a yes and half a no of each), spread over the rows, counts as
    well. 1 where nothing can be learnt: no rows, or a logit that is not finite.
    """
    slope_of = _gradients_of_labels if label.ndim == 2 else _gradients_of_classes
    # The nats are convex in 1/T. Newton's steps find where they are flat; a step that leaves what
    # is known to hold the minimum is replaced by the middle of it.
    low, high, sharpness = 1 / 20, 20.0, 1.0
    for _ in range(60):
        gradient, bend = 0.0, 0.0
        for here in slices(*logit_NC.shape):
            one, two = slope_of(logit_NC[here].double(), label[here], sharpness, len(logit_NC))
            gradient, bend = gradient + one, bend + two
        if not math.isfinite(gradient + bend):
            return 1.0
        if gradient == 0:
            break
        low, high = (low, sharpness) if gradient > 0 else (sharpness, high)
        step = sharpness - gradient / bend if bend > 0 else math.inf
        before, sharpness = sharpness, step if low < step < high else math.sqrt(low * high)
        if abs(sharpness - before) <= 1e-10 * before:
            break
    return 1 / sharpness


def _gradients_of_classes(
    z_BC: torch.Tensor, label_B: torch.Tensor, sharpness: float, rows: int
) -> tuple[float, float]:
    """First and second derivative, by sharpness, of these rows' nats."""
    prob_BC = (z_BC * sharpness).softmax(1)
    mean_B = (prob_BC * z_BC).sum(1)
    spread_B = (prob_BC * (z_BC - mean_B[:, None]).square()).sum(1)
    share = z_BC.shape[1] / (2 * rows)
    gradient = (mean_B * (1 + share)).sum() - z_BC.sum() / (2 * rows)
    own = z_BC.gather(1, label_B.long()[:, None]).sum()
    return float(gradient - own), float(spread_B.sum() * (1 + share))


def _gradients_of_labels(
    z_BC: torch.Tensor, label_BC: torch.Tensor, sharpness: float, rows: int
) -> tuple[float, float]:
    """First and second derivative, by sharpness, of these rows' nats."""
    prob_BC = (z_BC * sharpness).sigmoid()
    gradient_BC = (prob_BC * (1 + 1 / rows) - label_BC - 1 / (2 * rows)) * z_BC
    bend_BC = prob_BC * (1 - prob_BC) * z_BC.square() * (1 + 1 / rows)
    return float(gradient_BC.sum()), float(bend_BC.sum())
