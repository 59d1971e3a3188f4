"""Calibration: a temperature is used only if it helps images that it was not fitted to."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from arrowhead.evaluation import metrics
from arrowhead.evaluation.calibration import Calibration, calibrate, describe

Case = tuple[NDArray[Any], NDArray[Any]]


def _single_label(rows: int, classes: int, scale: float, seed: int = 0) -> Case:
    """Logits that are `scale` times too confident, and labels sampled from the calibrated ones."""
    rng = np.random.default_rng(seed)
    calibrated = 2 * rng.normal(size=(rows, classes))
    label = (calibrated + rng.gumbel(size=calibrated.shape)).argmax(1)
    return (scale * calibrated).astype(np.float32), label


def _multi_label(rows: int, classes: int, scale: float, seed: int = 0) -> Case:
    rng = np.random.default_rng(seed)
    calibrated = 2 * rng.normal(size=(rows, classes)) - 1
    label = (rng.random(calibrated.shape) < 1 / (1 + np.exp(-calibrated))).astype(np.uint8)
    return (scale * calibrated).astype(np.float32), label


def _fit(logit: NDArray[Any], label: NDArray[Any], key: Any = None) -> Calibration:
    key = np.arange(len(label), dtype=np.uint64) if key is None else key
    result = calibrate(logit, label, key, [f"c{i}" for i in range(logit.shape[1])])
    json.dumps(result.metrics, allow_nan=False)
    return result


@pytest.mark.parametrize("make", [_single_label, _multi_label])
@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("scale", [0.4, 3.0])
def test_an_over_or_underconfident_head_gets_a_temperature(
    make: Any, classes: int, scale: float
) -> None:
    result = _fit(*make(400, classes, scale))
    assert result.temperature == pytest.approx(scale, rel=0.3)
    if make is _single_label:
        figures = result.metrics
        assert figures["ece"] < figures["ece_uncalibrated"] / 2
        assert figures["ece"] == figures["ece_fitted"]
        low, high = figures["ece_low"], figures["ece_high"]
        assert 0 <= low <= figures["ece"] <= high
        error = f"ECE {figures['ece']:.3f} ({low:.3f} to {high:.3f}) on held-out images"
        assert f"{error}, {figures['ece_uncalibrated']:.3f} without" in describe(figures)


@pytest.mark.parametrize("make", [_single_label, _multi_label])
@pytest.mark.parametrize(("rows", "classes"), [(60, 2), (300, 10), (2000, 10)])
def test_calibrated_probabilities_keep_temperature_1(make: Any, rows: int, classes: int) -> None:
    """In all but about one of twenty cases, which the confidence margin permits."""
    temperatures = [_fit(*make(rows, classes, 1.0, seed)).temperature for seed in range(20)]
    assert temperatures.count(1.0) >= 17


def test_a_temperature_that_increases_the_held_out_ece_is_not_used() -> None:
    """In every one of 40 small, slightly overconfident data sets."""
    used = 0
    for seed in range(40):
        figures = _fit(*_single_label(200, 10, 1.5, seed)).metrics
        assert figures["ece"] <= figures["ece_uncalibrated"]
        assert (figures["temperature"] == 1) == (figures["ece"] == figures["ece_uncalibrated"])
        used += figures["temperature"] != 1
    assert 4 <= used <= 36


def test_the_ece_is_computed_on_images_that_the_temperature_was_not_fitted_to() -> None:
    """Each image is evaluated at the temperature fitted to the other folds."""
    logit, label = _single_label(100, 3, 4.0)
    held_out = _fit(logit, label).metrics["ece"]
    import torch

    temperature = metrics.fit_temperature(torch.from_numpy(logit), torch.from_numpy(label))
    in_sample = metrics.evaluate(logit, label, list("abc"), temperature=temperature)["ece"]
    assert held_out != in_sample
    copies = np.zeros(100, np.uint64)  # one image 100 times: no other image to fit to
    assert _fit(logit, label, copies).temperature == 1


@pytest.mark.parametrize("rows", [0, 1, 2, 19])
@pytest.mark.parametrize("make", [_single_label, _multi_label])
def test_too_few_images_get_no_temperature(make: Any, rows: int) -> None:
    result = _fit(*make(rows, 3, 5.0))
    assert (result.temperature, result.metrics["temperature_fitted"]) == (1, None)
    assert "fewer than 20 different images" in describe(result.metrics)


def test_thresholds_are_tuned_on_all_images_and_evaluated_on_held_out_folds() -> None:
    rng = np.random.default_rng(0)
    label = (rng.random((200, 12)) < 0.05).astype(np.uint8)
    noise = rng.normal(size=label.shape).astype(np.float32)  # independent of the labels
    result = _fit(noise, label)
    assert result.thresholds is not None
    in_sample = metrics.evaluate(
        noise,
        label,
        list("abcdefghijkl"),
        temperature=result.temperature,
        thresholds=result.thresholds,
    )
    assert result.metrics["f2_macro_held_out"] < in_sample["f2_macro"] - 0.02


def test_a_head_that_diverged_keeps_temperature_1() -> None:
    logit, label = _single_label(50, 3, 2.0)
    logit[7, 1] = np.nan
    result = _fit(logit, label)
    assert result.temperature == 1
    assert result.metrics["ece"] is None
    assert describe(result.metrics) == "temperature 1 (a fitted one did not help)"
    logit, label = _multi_label(50, 3, 2.0)
    logit[7, 1] = np.inf
    assert _fit(logit, label).temperature == 1


def test_duplicate_images_do_not_make_a_temperature_significant() -> None:
    logit, label = _single_label(30, 3, 1.3, seed=5)
    once = _fit(logit, label).temperature
    key = np.tile(np.arange(30, dtype=np.uint64), 40)
    repeated = _fit(np.tile(logit, (40, 1)), np.tile(label, 40), key).temperature
    assert (once == 1) == (repeated == 1)
