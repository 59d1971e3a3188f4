"""The figures' promises: sums that add up, counts in their places, a temperature that fits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arrowhead.metrics import Tally, confusion, per_class, temperature


def test_tallies_add_so_ragged_batches_cannot_bend_a_mean() -> None:
    whole = Tally(64, 32, 6.4) + Tally(1, 1, 65.0)
    assert whole == Tally(65, 33, 71.4)
    assert whole.accuracy == 33 / 65
    assert whole.loss == 71.4 / 65  # not the mean of 0.1 and 65


def test_an_empty_tally_has_no_mean_and_does_not_divide_by_zero() -> None:
    assert math.isnan(Tally().loss)
    assert math.isnan(Tally().accuracy)


def test_confusion_counts_labels_in_rows_and_guesses_in_columns() -> None:
    label, guess = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 0, 1])
    assert confusion(label, guess, 4).tolist() == [
        [1, 2, 0, 0],
        [1, 1, 0, 0],
        [0, 1, 0, 0],
        [0, 0, 0, 0],
    ]


def test_per_class_figures_match_a_hand_written_example() -> None:
    counts = np.array([[1, 2, 0], [1, 1, 0], [0, 1, 0]])
    assert per_class(counts, ["ant", "bee", "cat"]) == {
        "ant": {"precision": 1 / 2, "recall": 1 / 3, "images": 3},
        "bee": {"precision": 1 / 4, "recall": 1 / 2, "images": 2},
        "cat": {"precision": 0.0, "recall": 0.0, "images": 1},  # never guessed
    }


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=60))
@settings(deadline=None)
def test_every_row_is_counted_once(pairs: list[tuple[int, int]]) -> None:
    label, guess = np.array(pairs, np.int64).reshape(-1, 2).T
    counts = confusion(label, guess, 5)
    assert counts.sum() == len(pairs)
    assert np.diag(counts).sum() == (label == guess).sum()


def _logits(rows: int, classes: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `scale` times too sure of labels that were drawn from them."""
    draw = torch.Generator().manual_seed(0)
    honest = 2 * torch.randn(rows, classes, generator=draw)
    label = torch.multinomial(honest.softmax(1), 1, generator=draw)[:, 0]
    return honest * scale, label


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("scale", [0.25, 1.0, 3.0])
def test_the_temperature_recovers_a_known_scale(scale: float, classes: int) -> None:
    found = temperature(*_logits(20_000, classes, scale))
    assert found == pytest.approx(scale, rel=0.05)


def test_the_temperature_lowers_the_loss_and_keeps_every_guess() -> None:
    logit, label = _logits(500, 3, 4.0)
    cooled = logit / temperature(logit, label)
    loss = torch.nn.functional.cross_entropy
    assert loss(cooled, label) < loss(logit, label)
    assert torch.equal(cooled.argmax(1), logit.argmax(1))


def test_rows_that_are_all_right_or_few_do_not_run_to_the_border() -> None:
    right = 5 * torch.eye(3).repeat(20, 1)
    assert 0.06 < temperature(right, torch.arange(3).repeat(20)) < 19
    assert 0.06 < temperature(right[:1], torch.tensor([0])) < 19
    # Twice as sure means twice the temperature: the minimum is real, no plateau of rounding.
    once, twice = (temperature(sure * right, torch.arange(3).repeat(20)) for sure in (0.2, 0.4))
    assert twice == pytest.approx(2 * once, rel=0.01)


def test_float16_logits_as_large_as_they_get_still_give_a_temperature() -> None:
    logit = torch.tensor([[60000.0, -60000.0], [-60000.0, 60000.0]], dtype=torch.float16)
    assert 0.05 <= temperature(logit, torch.tensor([0, 1])) <= 20
