"""Probabilities that mean what they say, judged on images that did not fit them.

    logits, labels, contents of the validation images
      -> calibrate    a temperature where it helps, else 1; thresholds; figures on held-out parts

A temperature or a threshold looks better on the images it was fitted to than it is. So each part of
the validation images is judged by what was fitted to all others (cross-fitting); what a bundle then
uses is fitted to all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.evaluation import metrics
from arrowhead.evaluation.metrics import Labels

MIN_IMAGES = 20  # different images, to fit a temperature to
MARGIN = 1.645  # standard errors: one-sided 5 %


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What a bundle gives its probabilities and labels by.

    thresholds: float64 (C,), None where images have one label. figures: for the bundle's metrics,
    all of images that took no part in fitting what they were judged by:
        temperature; temperature_fitted: what was fitted, None if there were too few images;
        one label: ece, ece_low, ece_high: calibration error with the temperature that is kept, see
        `metrics.calibration_error`; ece_uncalibrated: with 1; ece_fitted: with the fitted one;
        several: accuracy_at_thresholds, f1 and f2 (see `metrics.evaluate`), each named
        ..._held_out.
    """

    temperature: float
    thresholds: NDArray[np.float64] | None = None
    figures: dict[str, Any] = field(default_factory=dict)


def calibrate(
    logit_NC: NDArray[Any], label: Labels, key_N: NDArray[np.uint64], classes: list[str]
) -> Calibration:
    """Fit a temperature, and thresholds where images have several labels, to validation images.

    key_N: of an image's content; copies of one image are held out together. The temperature is 1
    unless a fitted one makes held-out images more likely by more than chance (1.645 standard errors
    of the mean gain in log-likelihood) and their calibration error no larger.
    """
    with np.errstate(invalid="ignore", over="ignore"):  # of a head that diverged: 1
        return _calibrate(logit_NC, label, key_N, classes)


def _calibrate(
    logit_NC: NDArray[Any], label: Labels, key_N: NDArray[np.uint64], classes: list[str]
) -> Calibration:
    part_N = _parts(key_N)
    fitted = _fitted(logit_NC, label)
    enough = len(np.unique(key_N)) >= MIN_IMAGES
    temperature_N = np.ones(len(label))  # of each image, fitted to the other parts
    for held in _held_out(part_N) if enough else ():
        temperature_N[held] = _fitted(logit_NC[~held], label[~held])
    several = label.ndim == 2
    plain, cooled = (
        _judged(logit_NC, label, temperature)
        for temperature in (np.ones(len(label)), temperature_N)
    )
    keep = enough and _gains(plain.nats - cooled.nats, key_N)
    figures: dict[str, Any] = {}
    if not several:
        before, after = (metrics.calibration_error(one.sure, one.right) for one in (plain, cooled))
        keep = keep and after[0] <= before[0]
        figures |= zip(("ece", "ece_low", "ece_high"), after if keep else before, strict=True)
        figures |= {"ece_uncalibrated": before[0], "ece_fitted": after[0] if enough else None}
    temperature = fitted if keep else 1.0
    thresholds = None
    if several:
        prob_NC = _probabilities(logit_NC, np.full(len(label), temperature))
        thresholds = metrics.thresholds(prob_NC, label.astype(np.uint8))
        used_N = temperature_N if keep else np.ones(len(label))
        figures = _several(logit_NC, label, used_N, part_N, classes) if enough else {}
    figures |= {"temperature": temperature, "temperature_fitted": fitted if enough else None}
    return Calibration(
        temperature=temperature, thresholds=thresholds, figures=metrics.plain(figures)
    )


def words(figures: dict[str, Any]) -> str:
    """The temperature, and what it does for images that took no part in fitting it."""
    temperature, error = figures["temperature"], ""
    if figures.get("ece_high") is not None:
        error = f"{figures['ece']:.3f} ({figures['ece_low']:.3f} to {figures['ece_high']:.3f})"
    if temperature != 1:
        if not error:
            return f"temperature {temperature:.2f}"
        before = figures["ece_uncalibrated"]
        return (
            f"temperature {temperature:.2f} · ECE {error} on held-out parts, {before:.3f} without"
        )
    why = "a fitted one did not help"
    if figures.get("temperature_fitted") is None:
        why = f"fewer than {MIN_IMAGES} different images to fit one"
    return f"temperature 1 ({why}){f' · ECE {error}' if error else ''}"


def _parts(key_N: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Which part each image is in, int64 (N,): a function of the contents alone. Ten parts; fewer
    of many images, where a part less to fit to changes nothing.
    """
    different, where = np.unique(key_N, return_inverse=True)
    count = len(different)
    parts = 10 if count < 2_000 else 5 if count < 20_000 else 2
    mixed = np.argsort(different * np.uint64(0x9E3779B97F4A7C15), kind="stable")
    dealt = np.empty(count, np.int64)
    dealt[mixed] = np.arange(count) % parts
    made: NDArray[np.int64] = dealt[where]
    return made


def _held_out(part_N: NDArray[np.int64]) -> Iterator[NDArray[np.bool_]]:
    return (part_N == part for part in np.unique(part_N))


def _fitted(logit_NC: NDArray[Any], label: Labels) -> float:
    import torch

    return metrics.temperature(torch.from_numpy(logit_NC), torch.from_numpy(label))


@dataclass(frozen=True, slots=True)
class _Judged:
    """Each image under a temperature: nats (with several labels their mean); confidence in the best
    label, and whether it is right (zeros with several), float64 (N,).
    """

    nats: NDArray[np.float64]
    sure: NDArray[np.float64]
    right: NDArray[np.bool_]


def _judged(logit_NC: NDArray[Any], label: Labels, temperature_N: NDArray[np.float64]) -> _Judged:
    rows, count = logit_NC.shape
    nats_N, sure_N, right_N = np.zeros(rows), np.zeros(rows), np.zeros(rows, np.bool_)
    for here in metrics.slices(rows, count):
        z_BC = logit_NC[here].astype(np.float64) / temperature_N[here, None]
        if label.ndim == 2:
            nats_N[here] = (np.logaddexp(0, z_BC) - z_BC * (label[here] > 0)).mean(1)
            continue
        log_BC = z_BC - metrics.log_sum_exp(z_BC)[:, None]
        nats_N[here] = -np.take_along_axis(log_BC, label[here, None], 1)[:, 0]
        sure_N[here] = np.exp(log_BC.max(1))
        right_N[here] = z_BC.argmax(1) == label[here]
    return _Judged(nats_N, sure_N, right_N)


def _gains(gain_N: NDArray[np.float64], key_N: NDArray[np.uint64]) -> bool:
    """Whether the mean gain is above 0 by more than chance; copies of an image count as one."""
    different, where = np.unique(key_N, return_inverse=True)
    gain_M = np.bincount(where, gain_N)
    error = gain_M.std(ddof=1) / np.sqrt(len(different)) if len(different) > 1 else np.inf
    return bool(gain_M.mean() > MARGIN * error)


def _probabilities(
    logit_NC: NDArray[Any], temperature_N: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Sigmoids as a bundle gives them, so that a decision here is a decision there."""
    import torch

    cooled = (
        torch.from_numpy(logit_NC) / torch.from_numpy(temperature_N.astype(np.float32))[:, None]
    )
    made: NDArray[np.float32] = cooled.sigmoid().numpy()
    return made


def _several(
    logit_NC: NDArray[Any],
    label_NC: Labels,
    temperature_N: NDArray[np.float64],
    part_N: NDArray[np.int64],
    classes: list[str],
) -> dict[str, Any]:
    """Figures of decisions at thresholds that were tuned on the other parts."""
    prob_NC = _probabilities(logit_NC, temperature_N)
    given_NC = np.zeros(label_NC.shape, np.bool_)
    for held in _held_out(part_N):
        threshold_C = metrics.thresholds(prob_NC[~held], label_NC[~held].astype(np.uint8))
        given_NC[held] = prob_NC[held] >= threshold_C
    decided = metrics.evaluate(np.where(given_NC, 9.0, -9.0), label_NC, classes)
    names = ("accuracy_at_thresholds", "f1_samples", "f2_samples", "f1_macro", "f2_macro")
    return {f"{name}_held_out": decided[name] for name in names}
