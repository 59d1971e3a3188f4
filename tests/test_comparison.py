"""Comparisons of heads: metrics per image, exact p-values, no false claims."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arrowhead.training import comparison, grid
from arrowhead.training.comparison import holm_correction, paired_p_value
from arrowhead.training.config import TrainConfig
from arrowhead.training.dataset import Data
from arrowhead.training.trainer import train_stack


def _data(*, multi: bool = False, copies: bool = False, rows: int = 300) -> Data:
    draw = np.random.default_rng(0)
    label = draw.integers(0, 4, rows) ** 2 // 3  # 0, 0, 1, 3: one class is common, one absent
    label[label == 3] = 2
    feature = (np.eye(3)[label] + draw.normal(size=(rows, 3)))[:, None].astype(np.float16)
    if multi:
        label = (draw.random((rows, 3)) < 0.4).astype(np.uint8)
        feature = (label + draw.normal(size=(rows, 3)))[:, None].astype(np.float16)
    result = Data.from_arrays(
        (feature[:150], label[:150]), (feature[150:], label[150:]), list("abc")
    )
    if copies:
        result.key[160:] = result.key[160:] // 2
    return result


@pytest.mark.parametrize("kind", ["linear", "lesson"])
@pytest.mark.parametrize(
    ("multi", "figure"),
    [(False, "valid_loss"), (False, "accuracy"), (False, "balanced_accuracy"), (True, "f1"),
     (True, "f2"), (True, "accuracy"), (True, "valid_loss")],
)  # fmt: skip
def test_the_mean_over_images_is_the_figure_of_the_kept_epoch(
    kind: Any, multi: bool, figure: Any
) -> None:
    for copies in (False, True):
        data = _data(multi=multi, copies=copies)
        best = "last" if kind == "linear" else figure
        config = TrainConfig(head=kind, epochs=4, batch_size=32, best=best)
        trials = grid.grid_trials(data, config, 1.0, "rate=1e-3,1e-1 seed=0,1")
        heads = train_stack(data, trials)
        value = comparison.metric_by_image(data, trials, heads, [[2, 3], [0], [1]], figure)
        assert value.shape == (3, len(np.unique(data.key[data.valid])))
        each = [one.epochs[one.epoch][figure] for one in heads]
        expected = [(each[2] + each[3]) / 2, each[0], each[1]]
        assert value.mean(1) == pytest.approx(expected, rel=1e-5)


@given(st.integers(0, 40), st.integers(0, 40))
@settings(deadline=None)
def test_of_right_and_wrong_the_p_value_is_the_exact_binomial_one(more: int, fewer: int) -> None:
    differences = np.array([1.0] * more + [-1.0] * fewer + [0.0] * 7)
    count, low = more + fewer, min(more, fewer)
    exact = min(1.0, 2 * sum(math.comb(count, k) for k in range(low + 1)) / 2**count)
    assert paired_p_value(differences) == pytest.approx(exact)


@given(st.lists(st.floats(-5, 5).map(lambda x: round(x, 3)), max_size=9))
@settings(deadline=None)
def test_of_few_images_all_signs_are_tried(values: list[float]) -> None:
    sums = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(values))
    ]
    expected = np.mean([one >= abs(sum(values)) - 1e-9 for one in sums])
    assert paired_p_value(np.array(values)) == pytest.approx(expected)


def test_of_many_images_the_normal_limit_is_near_what_flipping_gives() -> None:
    draw = np.random.default_rng(0)
    for shift in (0.0, 0.2, 0.4):
        values = draw.exponential(size=60) * draw.choice([-1, 1], 60) + shift
        flips = draw.choice([-1, 1], (200_000, 60)) @ values
        expected = (np.abs(flips) >= abs(values.sum())).mean()
        assert paired_p_value(values) == pytest.approx(expected, abs=0.02)


def test_a_hundred_thousand_images_give_a_number() -> None:
    assert paired_p_value(np.repeat([1.0, -1.0], [50_500, 49_500])) == pytest.approx(
        0.00157, rel=0.02
    )
    assert 0 <= paired_p_value(np.ones(100_000)) < 1e-300


def test_copies_of_one_image_are_one_witness() -> None:
    key = np.repeat(np.arange(10, dtype=np.uint64), 5)
    value = np.stack([np.ones(50), np.repeat([0.0, 1.0], [5, 45])])
    once = comparison._merge_copies(value, key)
    assert paired_p_value(value[0] - value[1]) < 0.07
    assert paired_p_value(once[0] - once[1]) == 1.0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holms_correction_steps_down(values: list[float]) -> None:
    result = holm_correction(np.array(values))
    last = 0.0
    for folder, at in enumerate(np.argsort(values, kind="stable")):
        last = max(last, min(1.0, values[at] * (len(values) - folder)))
        assert result[at] == pytest.approx(last)


def test_equal_settings_are_called_different_in_one_of_twenty_cases_at_most() -> None:
    """The true best, any of eight that are equal, is said to be worse than the one that came out
    best.
    """
    draw = np.random.default_rng(0)
    wrong = 0
    for _ in range(300):
        hard = draw.random(200)
        right = (draw.random((8, 200)) * 0.6 + hard * 0.4 < 0.7).astype(float)
        best = right[right.mean(1).argmax()]
        p = holm_correction(
            np.array([paired_p_value(best - one) for one in right if one is not best])
        )
        wrong += p[0] <= 0.05
    assert wrong <= 15
