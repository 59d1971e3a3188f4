"""The LR finder's promises: rates that train, no advice where nothing is to be learned."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from arrowhead import ConfigError
from arrowhead.lr_finder import Curve, FinderConfig, find, rates, suggest
from arrowhead.train import Data, TrainConfig, train


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """On matrices this small and cores this busy, threads wait for each other more than work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _data(rows: int, *, width: int, classes: int, apart: float, seed: int = 0) -> Data:
    """Gaussian clouds `apart` times their width from each other; at 0, labels mean nothing."""
    draw = np.random.default_rng(seed)
    label = draw.integers(classes, size=rows)
    centre = apart * draw.normal(size=(classes, width))
    feature = (centre[label] + draw.normal(size=(rows, width))).astype(np.float16)[:, None]
    cut = rows * 4 // 5
    names = [str(n) for n in range(classes)]
    return Data.of((feature[:cut], label[:cut]), (feature[cut:], label[cut:]), names)


# 8,000 rows: at 100 steps of 64 none comes twice, so a fall of the loss is not memory.
@pytest.mark.parametrize(("width", "classes"), [(16, 2), (16, 5), (256, 2)])
def test_labels_that_mean_nothing_are_flat(width: int, classes: int) -> None:
    data = _data(8000, width=width, classes=classes, apart=0)
    assert find(data, TrainConfig(), FinderConfig()).verdict == "flat: no signal"


@pytest.mark.parametrize(
    ("head", "width", "classes"), [("linear", 16, 3), ("linear", 256, 2), ("lesson", 16, 3)]
)
def test_separable_features_are_good_and_the_valley_trains_well(
    head: str, width: int, classes: int
) -> None:
    data = _data(800, width=width, classes=classes, apart=1)
    config = TrainConfig(head=head, epochs=5)  # type: ignore[arg-type]
    curve = find(data, config, FinderConfig())
    assert curve.verdict == "good"
    assert curve.rate == curve.suggestions["valley"]
    assert train(data, config, curve.rate).epochs[-1]["accuracy"] > 0.95
    # One that cannot reach it in five epochs: the valley is not just any rate.
    assert train(data, config, 1e-6).epochs[-1]["accuracy"] < 0.95


def test_the_same_seed_draws_the_same_curve_and_every_seed_its_own() -> None:
    data = _data(400, width=16, classes=3, apart=1)
    first, again = (find(data, TrainConfig(), FinderConfig(steps=30)) for _ in range(2))
    assert np.array_equal(first.losses, again.losses, equal_nan=True)
    assert first.suggestions == again.suggestions
    assert len({tuple(row) for row in first.losses.tolist()}) == 3


@pytest.mark.parametrize("head", ["linear", "lesson"])
@pytest.mark.parametrize(("low", "high"), [(1e-6, 1e3), (1e-6, 1e38), (1e20, 1e38)])
def test_a_range_that_ends_in_nan_still_gives_finite_advice(
    head: str, low: float, high: float
) -> None:
    data = _data(400, width=16, classes=3, apart=1)
    config = TrainConfig(head=head)  # type: ignore[arg-type]
    curve = find(data, config, FinderConfig(low=low, high=high, steps=25, seeds=2))
    assert all(np.isfinite(rate) and rate > 0 for rate in curve.suggestions.values())
    assert low <= curve.rate <= high
    json.loads(json.dumps(curve.plain(), allow_nan=False))


def test_a_seed_that_diverges_leaves_nan_behind_it_and_bounds_the_advice() -> None:
    data = _data(400, width=16, classes=3, apart=1)
    curve = find(data, TrainConfig(), FinderConfig(high=1e10))
    gone = np.isnan(curve.losses).any(0)
    assert gone.any()
    assert not np.isnan(curve.losses[:, 0]).any()
    for row in np.isnan(curve.losses):
        assert (np.diff(row.astype(int)) >= 0).all()  # once gone, gone
    assert curve.suggestions["valley"] < curve.rates[gone].min()
    assert curve.suggestions["minimum/10"] < curve.rates[gone].min()


def _valley(tested: np.ndarray) -> np.ndarray:
    """A loss that falls from 1e-4 to 1e-1, steepest at 1e-2, and rises behind it."""
    x = np.log10(tested)
    return 1 / (1 + np.exp(4 * (x + 2))) + np.where(x > -1, (x + 1) ** 2, 0)


def test_suggestions_are_read_off_a_known_curve() -> None:
    tested = np.geomspace(1e-6, 10, 141)
    curve = suggest(tested, np.stack([_valley(tested)] * 2))
    assert curve.verdict == "good"
    assert curve.suggestions["steepest"] == pytest.approx(1e-2, rel=0.2)
    assert curve.suggestions["minimum/10"] == pytest.approx(1e-2, rel=0.5)
    lowest = tested[_valley(tested).argmin()]
    falls_from = tested[0]
    two_thirds = falls_from * (lowest / falls_from) ** (2 / 3)
    assert curve.rate == pytest.approx(two_thirds, rel=0.2)


def test_curves_that_only_rise_or_stay_are_flat() -> None:
    tested = np.geomspace(1e-6, 10, 100)
    for losses in (np.ones(100), np.linspace(1, 5, 100), 1 - 0.02 * np.linspace(0, 1, 100)):
        assert suggest(tested, losses[None]).verdict == "flat: no signal"


def test_seeds_that_disagree_are_unstable() -> None:
    tested = np.geomspace(1e-6, 10, 100)
    down = 1 - 0.9 * np.linspace(0, 1, 100)
    assert suggest(tested, np.stack([down, down])).verdict == "good"
    assert suggest(tested, np.stack([down, np.ones(100)])).verdict == "unstable"


def test_rates_rise_geometrically_from_low_to_high() -> None:
    tested = rates(FinderConfig(low=1e-4, high=1e-1, steps=31))
    assert (tested[0], tested[-1]) == (pytest.approx(1e-4), pytest.approx(1e-1))
    np.testing.assert_allclose(tested[1:] / tested[:-1], 10**0.1)


def test_a_curve_says_none_where_it_has_no_loss() -> None:
    losses = np.array([[1.0, 0.5, np.nan]])
    curve = Curve(rates=np.ones(3), losses=losses, suggestions={"valley": 1.0}, verdict="good")
    assert curve.plain()["losses"] == [[1.0, 0.5, None]]


@pytest.mark.parametrize(
    "bad",
    [
        {"low": 0.0},
        {"low": 1.0, "high": 0.1},
        {"low": float("nan")},
        {"high": float("inf")},
        {"high": 1e300},  # float32 cannot hold it
        {"steps": 19},
        {"seeds": 0},
    ],
)
def test_ranges_that_test_nothing_are_refused_in_three_parts(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError) as refusal:
        FinderConfig(**bad)  # type: ignore[arg-type]
    assert all((refusal.value.found, refusal.value.wanted, refusal.value.do))
