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


def _one(rows: int, classes: int, scale: float, seed: int = 0) -> Case:
    """Logits `scale` times too sure of labels that were drawn from them."""
    draw = np.random.default_rng(seed)
    honest = 2 * draw.normal(size=(rows, classes))
    label = (honest + draw.gumbel(size=honest.shape)).argmax(1)
    return (scale * honest).astype(np.float32), label


def _many(rows: int, classes: int, scale: float, seed: int = 0) -> Case:
    draw = np.random.default_rng(seed)
    honest = 2 * draw.normal(size=(rows, classes)) - 1
    label = (draw.random(honest.shape) < 1 / (1 + np.exp(-honest))).astype(np.uint8)
    return (scale * honest).astype(np.float32), label


def _fit(logit: NDArray[Any], label: NDArray[Any], key: Any = None) -> Calibration:
    key = np.arange(len(label), dtype=np.uint64) if key is None else key
    result = calibrate(logit, label, key, [f"c{i}" for i in range(logit.shape[1])])
    json.dumps(result.metrics, allow_nan=False)
    return result


@pytest.mark.parametrize("make", [_one, _many])
@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("scale", [0.4, 3.0])
def test_a_head_that_is_too_sure_or_not_sure_enough_gets_a_temperature(
    make: Any, classes: int, scale: float
) -> None:
    result = _fit(*make(400, classes, scale))
    assert result.temperature == pytest.approx(scale, rel=0.3)
    if make is _one:
        figures = result.metrics
        assert figures["ece"] < figures["ece_uncalibrated"] / 2
        assert figures["ece"] == figures["ece_fitted"]
        low, high = figures["ece_low"], figures["ece_high"]
        assert 0 <= low <= figures["ece"] <= high
        error = f"ECE {figures['ece']:.3f} ({low:.3f} to {high:.3f}) on held-out images"
        assert f"{error}, {figures['ece_uncalibrated']:.3f} without" in describe(figures)


@pytest.mark.parametrize("make", [_one, _many])
@pytest.mark.parametrize(("rows", "classes"), [(60, 2), (300, 10), (2000, 10)])
def test_honest_probabilities_are_left_alone(make: Any, rows: int, classes: int) -> None:
    """All but the one in twenty that the margin lets through."""
    kept = [_fit(*make(rows, classes, 1.0, seed)).temperature for seed in range(20)]
    assert kept.count(1.0) >= 17


def test_a_temperature_that_makes_the_calibration_error_larger_is_not_kept() -> None:
    """On images that did not fit it; in every one of many small sets that are a little too sure."""
    used = 0
    for seed in range(40):
        figures = _fit(*_one(200, 10, 1.5, seed)).metrics
        assert figures["ece"] <= figures["ece_uncalibrated"]
        assert (figures["temperature"] == 1) == (figures["ece"] == figures["ece_uncalibrated"])
        used += figures["temperature"] != 1
    assert 4 <= used <= 36


def test_the_figure_is_of_images_that_did_not_fit_the_temperature() -> None:
    """Each image's own part is left out: one image of another label changes its own confidence
    only through the temperature of the others.
    """
    logit, label = _one(100, 3, 4.0)
    held_out = _fit(logit, label).metrics["ece"]
    import torch

    fitted = metrics.fit_temperature(torch.from_numpy(logit), torch.from_numpy(label))
    inside = metrics.evaluate(logit, label, list("abc"), temperature=fitted)["ece"]
    assert held_out != inside
    copies = np.zeros(100, np.uint64)  # one photograph a hundred times: nothing is left to fit to
    assert _fit(logit, label, copies).temperature == 1


@pytest.mark.parametrize("rows", [0, 1, 2, 19])
@pytest.mark.parametrize("make", [_one, _many])
def test_too_few_images_get_no_temperature(make: Any, rows: int) -> None:
    result = _fit(*make(rows, 3, 5.0))
    assert (result.temperature, result.metrics["temperature_fitted"]) == (1, None)
    assert "fewer than 20 different images" in describe(result.metrics)


def test_thresholds_are_tuned_on_all_images_and_judged_on_parts_that_were_left_out() -> None:
    draw = np.random.default_rng(0)
    label = (draw.random((200, 12)) < 0.05).astype(np.uint8)
    noise = draw.normal(size=label.shape).astype(np.float32)  # says nothing of any label
    result = _fit(noise, label)
    assert result.thresholds is not None
    inside = metrics.evaluate(
        noise,
        label,
        list("abcdefghijkl"),
        temperature=result.temperature,
        thresholds=result.thresholds,
    )
    assert result.metrics["f2_macro_held_out"] < inside["f2_macro"] - 0.02


def test_a_head_that_diverged_keeps_temperature_1() -> None:
    logit, label = _one(50, 3, 2.0)
    logit[7, 1] = np.nan
    result = _fit(logit, label)
    assert result.temperature == 1
    assert result.metrics["ece"] is None
    assert describe(result.metrics) == "temperature 1 (a fitted one did not help)"
    logit, label = _many(50, 3, 2.0)
    logit[7, 1] = np.inf
    assert _fit(logit, label).temperature == 1


def test_copies_of_one_image_do_not_make_a_gain_certain() -> None:
    logit, label = _one(30, 3, 1.3, seed=5)
    once = _fit(logit, label).temperature
    key = np.tile(np.arange(30, dtype=np.uint64), 40)
    many = _fit(np.tile(logit, (40, 1)), np.tile(label, 40), key).temperature
    assert (once == 1) == (many == 1)
