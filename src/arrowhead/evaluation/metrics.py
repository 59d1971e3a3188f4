"""Evaluation metrics of a classification head, computed from its logits on held-out images.

    all logits, labels      -> evaluate          every metric of a head, ready for JSON
                            -> fit_temperature   the temperature that calibrates the probabilities
    probabilities, labels   -> fit_thresholds    the decision threshold of each label

Labels are int64 (N,), or uint8 (N, C) of zeros and ones where an image may have several.

The results equal scikit-learn's, which the tests compare with. The rank-based metrics (AUROC,
average precision, thresholds) share one sort of each class's scores: 5 s for all of them at
200,000 x 1,000, where scikit-learn's functions would take 85 s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arrowhead import fileio

if TYPE_CHECKING:
    import torch

Labels = NDArray[np.int64] | NDArray[np.uint8]
TOP_K = 5
MAX_CALIBRATION_BINS = 15
MIN_IMAGES_PER_BIN = 20
MAX_CLASS_NAME_CHARS = 40  # in a table


# ---------------------------------------------------------------------------- evaluation


def evaluate(
    logit_NC: NDArray[Any],
    label: Labels,
    classes: list[str],
    *,
    temperature: float = 1.0,
    thresholds: NDArray[np.float64] | None = None,
) -> dict[str, Any]:
    """Compute every metric of a head from its logits for images it was not trained on.

    Args:
        logit_NC: logits of any float type.
        label: int64 (N,), or uint8 (N, C) where an image may have several labels.
        classes: the C class names.
        temperature: divides the logits before they become probabilities.
        thresholds: float64 (C,), the probability from which an image gets each label; 0.5 by
            default. Used only with several labels per image.

    Returns:
        A dict for JSON: plain Python types, and None for a metric that is undefined or not finite.

        With one label per image:
            images; loss: mean cross entropy of the logits without temperature, in nats; accuracy;
            accuracy_interval: its 95 % confidence interval;
            top_5_accuracy, with more than 5 classes: among equal logits the first class wins;
            balanced_accuracy: mean recall of the classes that occur; auroc: with two classes that
            of the second, with more the mean one-vs-rest AUROC of the classes that occur;
            ece, ece_low, ece_high: expected calibration error of softmax(logits / temperature) and
            its 95 % interval (see `calibration_error`); ece_uncalibrated: that of softmax(logits);
            per_class: see `per_class_metrics`; confusion: see `confusion_matrix`.
        With several labels per image, where an image gets the labels whose
        sigmoid(logit / temperature) reaches their threshold:
            images; loss: mean binary cross entropy of all N x C decisions, of the logits without
            temperature, in nats; accuracy: share of correct decisions at 0.5, as shown for each
            epoch of a training; accuracy_at_thresholds: the same at the thresholds, which all
            following metrics use, too; f1_samples, f2_samples: mean over images (the metric of the
            Planet challenge); f1_macro, f2_macro: mean over labels; all F scores are 0 where
            undefined, as in scikit-learn; auroc, mean_average_precision: mean over the labels for
            which they are defined; per_class: precision, recall, f1, threshold and images by label.
    """
    # A diverged head has non-finite logits, which become None.
    with np.errstate(invalid="ignore", over="ignore"):
        if label.ndim == 2:
            threshold_C = (
                np.full(len(classes), 0.5) if thresholds is None else np.asarray(thresholds)
            )
            metrics = _multi_label_metrics(logit_NC, label, classes, temperature, threshold_C)
        else:
            metrics = _single_label_metrics(logit_NC, label, classes, temperature)
        return dict(fileio.jsonable(metrics))


def _single_label_metrics(
    logit_NC: NDArray[Any], label_N: NDArray[Any], classes: list[str], temperature: float
) -> dict[str, Any]:
    rows, count = logit_NC.shape
    predicted_N, rank_N = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    loss_N, raw_confidence_N, confidence_N, log_norm_N = np.zeros((4, rows))
    for block in block_slices(rows, count):
        z_BC, label_B1 = logit_NC[block].astype(np.float64), label_N[block, None]
        label_z_B1, max_z_B = np.take_along_axis(z_BC, label_B1, 1), z_BC.max(1)
        tied_BC = (z_BC == label_z_B1) & (np.arange(count) < label_B1)
        predicted_N[block] = z_BC.argmax(1)
        rank_N[block] = ((z_BC > label_z_B1) | tied_BC).sum(1)
        raw_log_norm_B = log_sum_exp(z_BC)
        log_norm_N[block] = log_sum_exp(z_BC / temperature)
        loss_N[block] = raw_log_norm_B - label_z_B1[:, 0]
        raw_confidence_N[block] = np.exp(max_z_B - raw_log_norm_B)
        confidence_N[block] = np.exp(max_z_B / temperature - log_norm_N[block])
    counts_CC = confusion_matrix(label_N, predicted_N, count)
    correct_N, support_C = predicted_N == label_N, counts_CC.sum(1)
    recall_C = np.diag(counts_CC) / np.maximum(support_C, 1)
    ece, ece_low, ece_high = calibration_error(confidence_N, correct_N)
    metrics = {
        "images": rows,
        "loss": _mean(loss_N),
        "accuracy": _mean(correct_N),
        "accuracy_interval": list(wilson_interval(int(correct_N.sum()), rows)),
        "balanced_accuracy": _mean(recall_C[support_C > 0]),
        "auroc": _mean_auroc(logit_NC, label_N, temperature, log_norm_N),
        "ece": ece,
        "ece_low": ece_low,
        "ece_high": ece_high,
        "ece_uncalibrated": calibration_error(raw_confidence_N, correct_N)[0],
        "per_class": per_class_metrics(counts_CC, classes),
        "confusion": counts_CC,
    }
    if count > TOP_K:
        metrics[f"top_{TOP_K}_accuracy"] = _mean(rank_N < TOP_K)
    return metrics


def _mean_auroc(
    logit_NC: NDArray[Any],
    label_N: NDArray[Any],
    temperature: float,
    log_norm_N: NDArray[np.float64],
) -> float:
    """Mean one-vs-rest AUROC of the classes that occur; with two classes, that of the second.

    log_norm_N: log of the softmax's denominator.
    """
    rows, count = logit_NC.shape
    if count == 2:
        logit_N2 = logit_NC.astype(np.float64)
        return _RankedScores(logit_N2[:, 1] - logit_N2[:, 0], label_N == 1).auroc
    aurocs = []
    for block in block_slices(count, rows):
        # Log-probabilities rank as probabilities do, but do not underflow to 0.
        log_prob_BN = (
            np.ascontiguousarray(logit_NC[:, block].T, np.float64) / temperature - log_norm_N
        )
        for class_index, log_prob_N in zip(range(count)[block], log_prob_BN, strict=True):
            if (positive_N := label_N == class_index).any():
                aurocs.append(_RankedScores(log_prob_N, positive_N).auroc)
    return _mean(np.array(aurocs))


def _multi_label_metrics(
    logit_NC: NDArray[Any],
    label_NC: NDArray[Any],
    classes: list[str],
    temperature: float,
    threshold_C: NDArray[np.float64],
) -> dict[str, Any]:
    rows, count = logit_NC.shape
    correct_C, predicted_C, support_C = np.zeros((3, count), np.int64)
    correct_N, predicted_N, support_N = np.zeros((3, rows), np.int64)
    loss_C, auroc_C, average_precision_C = np.zeros((3, count))
    correct_at_half = 0
    for block in block_slices(count, rows):
        z_BN = np.ascontiguousarray(logit_NC[:, block].T, np.float64)
        label_BN = np.ascontiguousarray(label_NC[:, block].T) != 0
        loss_C[block] = (np.logaddexp(0, z_BN) - z_BN * label_BN).sum(1)
        correct_at_half += int(((z_BN >= 0) == label_BN).sum())
        # float32, as a bundle computes its probabilities, so that both decide alike.
        prob_BN = (1 / (1 + np.exp(-z_BN / temperature))).astype(np.float32)
        predicted_BN = prob_BN >= threshold_C[block, None]
        correct_BN = predicted_BN & label_BN
        correct_C[block], predicted_C[block], support_C[block] = (
            part.sum(1) for part in (correct_BN, predicted_BN, label_BN)
        )
        for total_N, part in (
            (correct_N, correct_BN),
            (predicted_N, predicted_BN),
            (support_N, label_BN),
        ):
            total_N += part.sum(0)
        ranked = [
            _RankedScores(z_N, positive_N) for z_N, positive_N in zip(z_BN, label_BN, strict=True)
        ]
        auroc_C[block] = [scores.auroc for scores in ranked]
        average_precision_C[block] = [scores.average_precision for scores in ranked]
    decisions = rows * count
    wrong = (predicted_C + support_C - 2 * correct_C).sum()
    by_label = _precision_recall_f1(correct_C, predicted_C, support_C, classes)
    return {
        "images": rows,
        "loss": loss_C.sum() / decisions if decisions else math.nan,
        "accuracy": correct_at_half / decisions if decisions else math.nan,
        "accuracy_at_thresholds": 1 - wrong / decisions if decisions else math.nan,
        "f1_samples": _mean(_f_beta(correct_N, predicted_N, support_N, 1)),
        "f2_samples": _mean(_f_beta(correct_N, predicted_N, support_N, 2)),
        "f1_macro": _mean(_f_beta(correct_C, predicted_C, support_C, 1)),
        "f2_macro": _mean(_f_beta(correct_C, predicted_C, support_C, 2)),
        "auroc": _mean(auroc_C[(support_C > 0) & (support_C < rows)]),
        "mean_average_precision": _mean(average_precision_C[support_C > 0]),
        "per_class": {
            name: metrics | {"threshold": float(threshold)}
            for (name, metrics), threshold in zip(by_label.items(), threshold_C, strict=True)
        },
    }


def fit_thresholds(
    prob_NC: NDArray[Any], label_NC: NDArray[np.uint8], beta: float = 2.0
) -> NDArray[np.float64]:
    """Find the decision threshold of each label with the best F-beta on these images.

    An image gets a label where its probability reaches the threshold. Every threshold that makes a
    difference is tried. Among equally good ones the highest is taken, and then the middle between
    the lowest probability that passes and the next one below, so that rounding changes no label.

    F-beta on the images the thresholds were fitted to is too optimistic, and the more so the fewer
    positives a label has. For an honest estimate, fit on some images and evaluate on others.

    Args:
        prob_NC: probabilities.
        label_NC: zeros and ones.
        beta: with 2, recall weighs four times as much as precision.

    Returns:
        float64 (C,); 0.5 for a label without a positive image.
    """
    threshold_C = np.full(prob_NC.shape[1], 0.5)
    for block in block_slices(len(threshold_C), len(prob_NC)):
        # A NaN never reaches a threshold, but must not keep the label from having one.
        prob_BN = np.nan_to_num(np.ascontiguousarray(prob_NC[:, block].T, np.float64))
        for class_index, prob_N in zip(range(len(threshold_C))[block], prob_BN, strict=True):
            ranked = _RankedScores(prob_N, label_NC[:, class_index] != 0)
            if len(ranked.positive_P):
                threshold_C[class_index] = ranked.best_threshold(beta)
    return threshold_C


class _RankedScores:
    """The ranks of one class's positive images (P of them) among the scores of all N images.

    Only the positives' ranks are needed: lowering a threshold to accept one more negative only
    makes F-beta worse, and AUROC and average precision are sums over the positives.

    positive_P: scores of the positives, highest first; below_P: how many scores are below each.
    """

    def __init__(self, score_N: NDArray[np.float64], positive_N: NDArray[np.bool_]) -> None:
        self.sorted_N = np.sort(score_N)
        self.positive_P = np.sort(score_N[positive_N])[::-1]
        self.below_P = np.searchsorted(self.sorted_N, self.positive_P, "left")

    @property
    def auroc(self) -> float:
        """Probability that a positive ranks above a negative, a tie counting half.

        NaN without positives or without negatives.
        """
        rows, positives = len(self.sorted_N), len(self.positive_P)
        if not positives or positives == rows or not self._is_finite:
            return math.nan
        not_above_P = np.searchsorted(self.sorted_N, self.positive_P, "right")
        # Twice the correctly ordered pairs. Pairs of two positives contribute positives**2.
        pairs = int(self.below_P.sum()) + int(not_above_P.sum()) - positives**2
        return pairs / (2 * positives * (rows - positives))

    @property
    def average_precision(self) -> float:
        """Mean precision at each positive; images of equal score pass a threshold together."""
        if not len(self.positive_P) or not self._is_finite:
            return math.nan
        accepted_P, correct_P = self._accepted()
        return float((correct_P / accepted_P).mean())

    def best_threshold(self, beta: float) -> float:
        """The threshold with the best F-beta (see `fit_thresholds`); requires a positive."""
        accepted_P, correct_P = self._accepted()
        f_beta_P = _f_beta(correct_P, accepted_P, np.array(len(self.positive_P)), beta)
        best = int(f_beta_P.argmax())
        lowest, below = float(self.positive_P[best]), int(self.below_P[best])
        middle = (lowest + (float(self.sorted_N[below - 1]) if below else 0.0)) / 2
        return middle if not below or middle > self.sorted_N[below - 1] else lowest

    def _accepted(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """How many images, and how many positives, score at least as high as each positive."""
        correct_P = np.searchsorted(-self.positive_P, -self.positive_P, "right")
        return len(self.sorted_N) - self.below_P, correct_P

    @property
    def _is_finite(self) -> bool:
        return bool(np.isfinite(self.sorted_N[[0, -1]]).all())  # np.sort moves NaN to the end


def _f_beta(
    correct: NDArray[np.int64],
    predicted: NDArray[np.int64],
    support: NDArray[np.int64],
    beta: float,
) -> NDArray[np.float64]:
    """F-beta from counts; 0 where it is undefined."""
    weight = beta**2
    denominator = np.maximum(weight * support + predicted, 1)
    score: NDArray[np.float64] = (1 + weight) * correct / denominator
    return score


def calibration_error(
    confidence_N: NDArray[np.float64], correct_N: NDArray[np.bool_]
) -> tuple[float, float, float]:
    """Expected calibration error (ECE) and its 95 % interval: (error, low, high).

    The ECE is the mean distance between confidence and accuracy over bins of confidence (Guo et
    al., arXiv:1706.04599, section 2). The interval is 1.96 standard deviations of 200 bootstrap
    resamples. There are 15 bins with equal numbers of images (Nixon et al., arXiv:1904.01685),
    fewer where a bin would have less than 20; equal confidences share a bin. Bins of equal width
    would put nearly all images into one. NaN without images.
    """
    rows = len(confidence_N)
    if not rows or not np.isfinite(confidence_N).all():
        return math.nan, math.nan, math.nan
    bins = max(1, min(MAX_CALIBRATION_BINS, rows // MIN_IMAGES_PER_BIN))
    edges = np.sort(confidence_N)[np.arange(1, bins) * rows // bins]
    bin_N, gap_N = np.searchsorted(edges, confidence_N, "right"), correct_N - confidence_N

    def error_of(sample: Any) -> float:
        return float(np.abs(np.bincount(bin_N[sample], gap_N[sample], bins)).sum() / rows)

    rng, error = np.random.default_rng(0), error_of(slice(None))
    resampled = [error_of(rng.integers(rows, size=rows)) for _ in range(200)]
    half_width = 1.96 * float(np.std(resampled))
    return error, max(error - half_width, 0.0), min(error + half_width, 1.0)


def log_sum_exp(z_BC: NDArray[np.float64]) -> NDArray[np.float64]:
    """The log of each row's sum of exponentials, float64 (B,), without overflow."""
    max_B1 = z_BC.max(1, keepdims=True)
    result_B: NDArray[np.float64] = np.log(np.exp(z_BC - max_B1).sum(1)) + max_B1[:, 0]
    return result_B


def _mean(value_N: NDArray[Any]) -> float:
    return float(value_N.mean()) if len(value_N) else math.nan


def block_slices(length: int, width: int) -> Iterator[slice]:
    """Slices over `length` rows of `width` numbers: 32 MB of float64 each, or at least 16 rows."""
    rows = max(16, 2**22 // max(width, 1))
    for start in range(0, length, rows):
        yield slice(start, min(start + rows, length))


def wilson_interval(correct: float, images: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % confidence interval (low, high) of the proportion `correct` of `images`.

    Wilson's score interval (JASA 22, 1927), which stays within 0..1 and holds for few images and
    for proportions near 0 and 1.
    """
    if not images:
        return 0.0, 1.0
    proportion, weight = correct / images, z * z / images
    center = (proportion + weight / 2) / (1 + weight)
    variance = proportion * (1 - proportion) / images + weight / (4 * images)
    half_width = z * math.sqrt(variance) / (1 + weight)
    return max(0.0, center - half_width), min(1.0, center + half_width)


# ------------------------------------------------------------------------------- classes


def confusion_matrix(
    label_N: NDArray[np.int64], predicted_N: NDArray[np.int64], classes: int
) -> NDArray[np.int64]:
    """Counts of images, int64 (C, C): rows are labels, columns are predictions."""
    counts = np.bincount(label_N * classes + predicted_N, minlength=classes**2)
    return counts.reshape(classes, classes)


def per_class_metrics(
    counts_CC: NDArray[np.int64], names: list[str]
) -> dict[str, dict[str, float]]:
    """Precision, recall, f1 (0 to 1; 0 where undefined) and number of images, by class."""
    return _precision_recall_f1(np.diag(counts_CC), counts_CC.sum(0), counts_CC.sum(1), names)


def _precision_recall_f1(
    correct_C: NDArray[np.int64],
    predicted_C: NDArray[np.int64],
    support_C: NDArray[np.int64],
    names: list[str],
) -> dict[str, dict[str, float]]:
    f1_C = _f_beta(correct_C, predicted_C, support_C, 1)
    return {
        name: {
            "precision": float(correct_C[i] / max(predicted_C[i], 1)),
            "recall": float(correct_C[i] / max(support_C[i], 1)),
            "f1": float(f1_C[i]),
            "images": int(support_C[i]),
        }
        for i, name in enumerate(names)
    }


def class_table(by_class: Mapping[str, Mapping[str, float]], most: int | None = None) -> list[str]:
    """Format per-class metrics as lines of text: a heading, then one line per class.

    The lowest F1 comes first. Classes without an image come last: their metrics say nothing.

    Args:
        by_class: The metrics.
        most: How many classes to show; None: all. If there are more, the last line says so.
    """
    names = sorted(by_class, key=lambda name: (by_class[name]["images"] == 0, by_class[name]["f1"]))
    longest = MAX_CLASS_NAME_CHARS
    shown = [n if len(n) <= longest else f"{n[: longest - 1]}…" for n in names[:most]]
    width = max(map(len, ["class", *shown]))
    has_thresholds = any("threshold" in metrics for metrics in by_class.values())
    heading = f"{'class':<{width}}  {'precision':>9}  {'recall':>6}  {'F1':>6}  {'images':>6}"
    lines = [heading + ("  threshold" if has_thresholds else "")]
    for name, metrics in zip(shown, (by_class[name] for name in names), strict=False):
        line = f"{name:<{width}}  {metrics['precision']:>9.4f}  {metrics['recall']:>6.4f}"
        line += f"  {metrics['f1']:>6.4f}  {int(metrics['images']):>6}"
        lines.append(line + (f"  {metrics['threshold']:>9.4f}" if has_thresholds else ""))
    if len(shown) < len(names):
        lines.append(f"…  the {len(shown)} classes with the lowest F1 of {len(names)}")
    return lines


# --------------------------------------------------------------------------- temperature


def fit_temperature(logit_NC: torch.Tensor, label: torch.Tensor) -> float:
    """Find the temperature T that minimizes the loss of softmax(logits / T) on these labels.

    The method is temperature scaling (Guo et al., arXiv:1706.04599, section 4.2), with T between
    1/20 and 20, to 10 digits. With labels (N, C), several per image, the loss is that of
    sigmoid(logits / T). Where all images are right T would run to its lower bound. So the loss also
    counts half an image of every class (with several labels: half a positive and half a negative of
    each), spread over all images.

    Returns:
        T, or 1 if nothing can be fitted: there are no images, or a logit is not finite.
    """
    from scipy.optimize import brentq

    derivative = _sigmoid_loss_derivative if label.ndim == 2 else _softmax_loss_derivative
    rows, low, high = len(logit_NC), 1 / 20, 20.0  # the bounds of 1/T

    def slope(inverse_temperature: float) -> float:
        parts = (
            (logit_NC[block].double(), label[block]) for block in block_slices(*logit_NC.shape)
        )
        return sum(derivative(*part, inverse_temperature, rows) for part in parts)

    start = slope(1.0)
    if start == 0 or not math.isfinite(start):
        return 1.0
    # The loss is convex in 1/T: its slope changes its sign once, or the minimum is a bound.
    if slope(low) >= 0:
        return 1 / low
    return 1 / high if slope(high) <= 0 else 1 / brentq(slope, low, high, xtol=1e-14, rtol=1e-10)


def _softmax_loss_derivative(
    z_BC: torch.Tensor, label_B: torch.Tensor, inverse_temperature: float, rows: int
) -> float:
    """The derivative of these rows' loss with respect to 1/T."""
    mean_B = ((z_BC * inverse_temperature).softmax(1) * z_BC).sum(1)
    prior = mean_B.sum() * z_BC.shape[1] - z_BC.sum()  # half an image of every class
    return float(
        (mean_B - z_BC.gather(1, label_B.long()[:, None])[:, 0]).sum() + prior / (2 * rows)
    )


def _sigmoid_loss_derivative(
    z_BC: torch.Tensor, label_BC: torch.Tensor, inverse_temperature: float, rows: int
) -> float:
    """The derivative of these rows' loss with respect to 1/T."""
    prob_BC = (z_BC * inverse_temperature).sigmoid()
    return float(((prob_BC * (1 + 1 / rows) - label_BC - 1 / (2 * rows)) * z_BC).sum())
