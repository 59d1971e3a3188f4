"""Temperature scaling and decision thresholds, judged by cross-fitting.

    logits, labels, content hashes of the validation images
      -> calibrate    a temperature (1 unless another one helps), thresholds, held-out metrics

A temperature or a threshold looks better on the images it was fitted to than it is. So the
validation images are divided into folds, and each fold is judged with what was fitted to the
others (cross-fitting). What a bundle then uses is fitted to all of them. Unlike scikit-learn's
CalibratedClassifierCV, this changes nothing unless it helps held-out images significantly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead import fileio
from arrowhead.evaluation import metrics
from arrowhead.evaluation.metrics import Labels

MIN_IMAGES = 20  # distinct images, to fit a temperature to
SIGNIFICANCE_Z = 1.645  # standard errors of a one-sided test at 5 %
HASH_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing: 2**64 / golden ratio


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """How a bundle turns logits into probabilities and labels.

    Attributes:
        temperature: Divides the logits.
        thresholds: float64 (C,); None where images have one label.
        metrics: For the bundle's metrics, from images that took no part in fitting what they were
            judged with. temperature; temperature_fitted: the fitted one, None if there were too few
            images. With one label also ece, ece_low, ece_high: the calibration error with the
            temperature in use (see `metrics.calibration_error`); ece_uncalibrated: with temperature
            1; ece_fitted: with the fitted one. With several labels also accuracy_at_thresholds, f1
            and f2 (see `metrics.evaluate`), each named ..._held_out.
    """

    temperature: float
    thresholds: NDArray[np.float64] | None = None
    metrics: dict[str, Any] = field(default_factory=dict)


def calibrate(
    logit_NC: NDArray[Any], label: Labels, image_id_N: NDArray[np.uint64], classes: list[str]
) -> Calibration:
    """Fit a temperature, and thresholds where images have several labels, to validation images.

    The temperature stays 1 unless a fitted one makes held-out images significantly more likely
    (by 1.645 standard errors of the mean gain in log-likelihood) without increasing their
    calibration error.

    Args:
        logit_NC: float32 logits.
        label: see `metrics.Labels`.
        image_id_N: hashes of the images' contents; copies of an image are held out together.
        classes: the C class names.
    """
    with np.errstate(invalid="ignore", over="ignore"):  # a diverged head gets temperature 1
        return _calibrate(logit_NC, label, image_id_N, classes)


def _calibrate(
    logit_NC: NDArray[Any], label: Labels, image_id_N: NDArray[np.uint64], classes: list[str]
) -> Calibration:
    fold_N = _assign_folds(image_id_N)
    fitted = _fit_temperature(logit_NC, label)
    has_enough_images = len(np.unique(image_id_N)) >= MIN_IMAGES
    no_scaling_N = np.ones(len(label))
    cross_fitted_N = no_scaling_N.copy()  # for each image, fitted to the other folds
    if has_enough_images:
        for held_out_N in _held_out_masks(fold_N):
            cross_fitted_N[held_out_N] = _fit_temperature(logit_NC[~held_out_N], label[~held_out_N])
    before = _score_images(logit_NC, label, no_scaling_N)
    after = _score_images(logit_NC, label, cross_fitted_N)
    use_fitted = has_enough_images and _is_significant(before.loss - after.loss, image_id_N)
    held_out: dict[str, Any] = {}
    if label.ndim == 1:
        ece_before = metrics.calibration_error(before.confidence, before.correct)
        ece_after = metrics.calibration_error(after.confidence, after.correct)
        use_fitted = use_fitted and ece_after[0] <= ece_before[0]
        error, low, high = ece_after if use_fitted else ece_before
        held_out = {"ece": error, "ece_low": low, "ece_high": high}
        held_out["ece_uncalibrated"] = ece_before[0]
        held_out["ece_fitted"] = ece_after[0] if has_enough_images else None
    temperature = fitted if use_fitted else 1.0
    thresholds = None
    if label.ndim == 2:
        prob_NC = _sigmoid(logit_NC, np.full(len(label), temperature))
        thresholds = metrics.fit_thresholds(prob_NC, label.astype(np.uint8))
        if has_enough_images:
            temperature_N = cross_fitted_N if use_fitted else no_scaling_N
            held_out = _threshold_metrics(logit_NC, label, temperature_N, fold_N, classes)
    held_out["temperature"] = temperature
    held_out["temperature_fitted"] = fitted if has_enough_images else None
    return Calibration(
        temperature=temperature, thresholds=thresholds, metrics=fileio.jsonable(held_out)
    )


def describe(calibration_metrics: dict[str, Any]) -> str:
    """Say in one line which temperature is used and what it does to held-out images."""
    temperature, error = calibration_metrics["temperature"], ""
    if calibration_metrics.get("ece_high") is not None:
        ece, low, high = (calibration_metrics[name] for name in ("ece", "ece_low", "ece_high"))
        error = f"{ece:.3f} ({low:.3f} to {high:.3f})"
    if temperature != 1:
        if not error:
            return f"temperature {temperature:.2f}"
        before = calibration_metrics["ece_uncalibrated"]
        change = f"ECE {error} on held-out images, {before:.3f} without the temperature"
        return f"temperature {temperature:.2f} · {change}"
    reason = "a fitted one did not help"
    if calibration_metrics.get("temperature_fitted") is None:
        reason = f"fewer than {MIN_IMAGES} different images to fit one"
    return f"temperature 1 ({reason}){f' · ECE {error}' if error else ''}"


def _assign_folds(image_id_N: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The fold of each image, int64 (N,): a function of the contents alone.

    Ten folds; fewer for many images, where fitting to a smaller share of them changes nothing.
    """
    distinct, index_N = np.unique(image_id_N, return_inverse=True)
    count = len(distinct)
    folds = 10 if count < 2_000 else 5 if count < 20_000 else 2
    shuffled = np.argsort(distinct * HASH_MULTIPLIER, kind="stable")
    fold_of_distinct = np.empty(count, np.int64)
    fold_of_distinct[shuffled] = np.arange(count) % folds
    fold_N: NDArray[np.int64] = fold_of_distinct[index_N]
    return fold_N


def _held_out_masks(fold_N: NDArray[np.int64]) -> Iterator[NDArray[np.bool_]]:
    return (fold_N == fold for fold in np.unique(fold_N))


def _fit_temperature(logit_NC: NDArray[Any], label: Labels) -> float:
    import torch

    return metrics.fit_temperature(torch.from_numpy(logit_NC), torch.from_numpy(label))


@dataclass(frozen=True, slots=True)
class _ImageScores:
    """How each image scores under a temperature, (N,) each.

    loss: in nats, with several labels their mean. confidence in the predicted class, and whether it
    is correct: zeros with several labels.
    """

    loss: NDArray[np.float64]
    confidence: NDArray[np.float64]
    correct: NDArray[np.bool_]


def _score_images(
    logit_NC: NDArray[Any], label: Labels, temperature_N: NDArray[np.float64]
) -> _ImageScores:
    rows, count = logit_NC.shape
    loss_N, confidence_N, correct_N = np.zeros(rows), np.zeros(rows), np.zeros(rows, np.bool_)
    for block in metrics.block_slices(rows, count):
        z_BC = logit_NC[block].astype(np.float64) / temperature_N[block, None]
        if label.ndim == 2:
            loss_N[block] = (np.logaddexp(0, z_BC) - z_BC * (label[block] > 0)).mean(1)
            continue
        log_prob_BC = z_BC - metrics.log_sum_exp(z_BC)[:, None]
        loss_N[block] = -np.take_along_axis(log_prob_BC, label[block, None], 1)[:, 0]
        confidence_N[block] = np.exp(log_prob_BC.max(1))
        correct_N[block] = z_BC.argmax(1) == label[block]
    return _ImageScores(loss_N, confidence_N, correct_N)


def _is_significant(gain_N: NDArray[np.float64], image_id_N: NDArray[np.uint64]) -> bool:
    """Whether the mean gain is significantly above 0; copies of an image count as one."""
    distinct, index_N = np.unique(image_id_N, return_inverse=True)
    gain_M = np.bincount(index_N, gain_N)
    error = gain_M.std(ddof=1) / np.sqrt(len(distinct)) if len(distinct) > 1 else np.inf
    return bool(gain_M.mean() > SIGNIFICANCE_Z * error)


def _sigmoid(logit_NC: NDArray[Any], temperature_N: NDArray[np.float64]) -> NDArray[np.float32]:
    """Probabilities in float32, as a bundle computes them, so that both decide alike."""
    import torch

    temperature_N1 = torch.from_numpy(temperature_N.astype(np.float32))[:, None]
    prob_NC: NDArray[np.float32] = (torch.from_numpy(logit_NC) / temperature_N1).sigmoid().numpy()
    return prob_NC


def _threshold_metrics(
    logit_NC: NDArray[Any],
    label_NC: Labels,
    temperature_N: NDArray[np.float64],
    fold_N: NDArray[np.int64],
    classes: list[str],
) -> dict[str, Any]:
    """Metrics of decisions at thresholds that were fitted to the other folds."""
    prob_NC = _sigmoid(logit_NC, temperature_N)
    predicted_NC = np.zeros(label_NC.shape, np.bool_)
    for held_out_N in _held_out_masks(fold_N):
        threshold_C = metrics.fit_thresholds(
            prob_NC[~held_out_N], label_NC[~held_out_N].astype(np.uint8)
        )
        predicted_NC[held_out_N] = prob_NC[held_out_N] >= threshold_C
    # Logits of +-9 pass and fail the default threshold of 0.5.
    result = metrics.evaluate(np.where(predicted_NC, 9.0, -9.0), label_NC, classes)
    names = ("accuracy_at_thresholds", "f1_samples", "f2_samples", "f1_macro", "f2_macro")
    return {f"{name}_held_out": result[name] for name in names}
