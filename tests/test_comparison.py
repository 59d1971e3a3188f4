"""Comparisons of heads: metrics per image, exact p-values, few false positives."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_data import data_from_arrays

from arrowhead.training import comparison, grid
from arrowhead.training.comparison import holm_correction, paired_p_value
from arrowhead.training.config import TrainConfig
from arrowhead.training.dataset import Data
from arrowhead.training.trainer import train_stack


def _data(*, multi: bool = False, copies: bool = False, rows: int = 300) -> Data:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 4, rows) ** 2 // 3  # 0, 0, 1, 3: class 0 is common
    label[label == 3] = 2
    feature = (np.eye(3)[label] + rng.normal(size=(rows, 3)))[:, None].astype(np.float16)
    if multi:
        label = (rng.random((rows, 3)) < 0.4).astype(np.uint8)
        feature = (label + rng.normal(size=(rows, 3)))[:, None].astype(np.float16)
    result = data_from_arrays(
        (feature[:150], label[:150]), (feature[150:], label[150:]), list("abc")
    )
    if copies:
        result.key[160:] = result.key[160:] // 2
    return result


@pytest.mark.parametrize("kind", ["linear", "lesson"])
@pytest.mark.parametrize(
    ("multi", "metric"),
    [(False, "valid_loss"), (False, "accuracy"), (False, "balanced_accuracy"), (True, "f1"),
     (True, "f2"), (True, "accuracy"), (True, "valid_loss")],
)  # fmt: skip
def test_the_mean_of_the_metric_over_images_equals_that_of_the_selected_epoch(
    kind: Any, multi: bool, metric: Any
) -> None:
    for copies in (False, True):
        data = _data(multi=multi, copies=copies)
        best = "last" if kind == "linear" else metric
        config = TrainConfig(head=kind, epochs=4, batch_size=32, best=best)
        trials = grid.grid_trials(data, config, 1.0, "rate=1e-3,1e-1 seed=0,1")
        heads = train_stack(data, trials)
        value = comparison.metric_by_image(data, trials, heads, [[2, 3], [0], [1]], metric)
        assert value.shape == (3, len(np.unique(data.key[data.valid])))
        single = [item.epochs[item.epoch][metric] for item in heads]
        expected = [(single[2] + single[3]) / 2, single[0], single[1]]
        assert value.mean(1) == pytest.approx(expected, rel=1e-5)


@given(st.integers(0, 40), st.integers(0, 40))
@settings(deadline=None)
def test_for_binary_outcomes_the_p_value_is_that_of_the_exact_binomial_test(
    better: int, worse: int
) -> None:
    differences = np.array([1.0] * better + [-1.0] * worse + [0.0] * 7)
    count, low = better + worse, min(better, worse)
    exact = min(1.0, 2 * sum(math.comb(count, k) for k in range(low + 1)) / 2**count)
    assert paired_p_value(differences) == pytest.approx(exact)


@given(st.lists(st.floats(-5, 5).map(lambda x: round(x, 3)), max_size=9))
@settings(deadline=None)
def test_for_few_images_the_p_value_is_that_of_the_exact_permutation_test(
    values: list[float],
) -> None:
    sums = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(values))
    ]
    expected = np.mean([item >= abs(sum(values)) - 1e-9 for item in sums])
    assert paired_p_value(np.array(values)) == pytest.approx(expected)


def test_for_many_images_the_p_value_is_close_to_that_of_random_sign_flips() -> None:
    rng = np.random.default_rng(0)
    for shift in (0.0, 0.2, 0.4):
        values = rng.exponential(size=60) * rng.choice([-1, 1], 60) + shift
        flips = rng.choice([-1, 1], (200_000, 60)) @ values
        expected = (np.abs(flips) >= abs(values.sum())).mean()
        assert paired_p_value(values) == pytest.approx(expected, abs=0.02)


def test_the_p_value_of_a_hundred_thousand_images_is_finite() -> None:
    assert paired_p_value(np.repeat([1.0, -1.0], [50_500, 49_500])) == pytest.approx(
        0.00157, rel=0.02
    )
    assert 0 <= paired_p_value(np.ones(100_000)) < 1e-300


def test_duplicate_images_count_once_in_a_comparison() -> None:
    key = np.repeat(np.arange(10, dtype=np.uint64), 5)
    value = np.stack([np.ones(50), np.repeat([0.0, 1.0], [5, 45])])
    merged = comparison._merge_copies(value, key)
    assert paired_p_value(value[0] - value[1]) < 0.07
    assert paired_p_value(merged[0] - merged[1]) == 1.0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_correction_equals_its_step_down_definition(values: list[float]) -> None:
    result = holm_correction(np.array(values))
    previous = 0.0
    for rank, index in enumerate(np.argsort(values, kind="stable")):
        previous = max(previous, min(1.0, values[index] * (len(values) - rank)))
        assert result[index] == pytest.approx(previous)


def test_equal_settings_are_called_different_in_at_most_five_percent_of_cases() -> None:
    """Of eight equal settings, the best one rarely differs significantly from the others."""
    rng = np.random.default_rng(0)
    rejected = 0
    for _ in range(300):
        difficulty = rng.random(200)
        correct = (rng.random((8, 200)) * 0.6 + difficulty * 0.4 < 0.7).astype(float)
        best = correct[correct.mean(1).argmax()]
        p = holm_correction(
            np.array([paired_p_value(best - item) for item in correct if item is not best])
        )
        rejected += p[0] <= 0.05
    assert rejected <= 15
