"""The LR finder: its rates train, it gives no advice without a signal, its curve is the same on any
number of workers, and a diverging head does not hang it.
"""

from __future__ import annotations

import csv
import json
import os
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from training_data import data_from_arrays

from arrowhead import ConfigError
from arrowhead.examine import figures
from arrowhead.training import lr_finder
from arrowhead.training.batches import DistributedContext
from arrowhead.training.config import TrainConfig
from arrowhead.training.dataset import Data, InMemoryFeatures, Trial
from arrowhead.training.lr_finder import (
    Curve,
    FinderConfig,
    find_learning_rate,
    rate_range,
    smooth,
    suggest,
)
from arrowhead.training.trainer import train, train_stack

RULES = {"held-out", "valley", "steepest", "minimum/10", "slide"}

pytestmark = pytest.mark.usefixtures("one_thread")


def _data(
    rows: int, *, width: int, classes: int, separation: float, seed: int = 0, multi: bool = False
) -> Data:
    """Gaussian clusters with validation rows sorted by class, as those of a folder are.

    Args:
        rows: training and validation rows.
        width: numbers per row.
        classes: number of classes.
        separation: distance of the clusters in their widths; at 0, labels are random.
        seed: of the generator.
        multi: half of the images also have the label of the next class.
    """
    rng = np.random.default_rng(seed)
    label = rng.integers(classes, size=rows)
    centre = separation * rng.normal(size=(classes, width))
    feature = (centre[label] + rng.normal(size=(rows, width))).astype(np.float16)[:, None]
    cut = rows * 4 // 5
    order = np.concatenate([np.arange(cut), cut + np.argsort(label[cut:], kind="stable")])
    feature, label = feature[order], label[order]
    names = [str(n) for n in range(classes)]
    if multi:
        many = np.eye(classes, dtype=np.uint8)[label]
        many |= np.eye(classes, dtype=np.uint8)[(label + 1) % classes] * rng.integers(
            2, size=(rows, 1), dtype=np.uint8
        )
        return data_from_arrays((feature[:cut], many[:cut]), (feature[cut:], many[cut:]), names)
    return data_from_arrays((feature[:cut], label[:cut]), (feature[cut:], label[cut:]), names)


# ------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize(
    ("rows", "width", "classes"), [(8000, 16, 5), (1000, 256, 2), (120, 512, 3)]
)
def test_random_labels_have_the_verdict_flat(
    rows: int, width: int, classes: int, multi: bool
) -> None:
    for seed in range(4):
        data = _data(rows, width=width, classes=classes, separation=0, seed=seed, multi=multi)
        assert find_learning_rate(data, TrainConfig(), FinderConfig()).verdict == "flat: no signal"


def test_shuffled_labels_are_flat_although_heads_overfit_them() -> None:
    kind = _data(160, width=512, classes=2, separation=1)
    for seed in range(40):
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(kind.label)))
        curve = find_learning_rate(
            replace(kind, label=kind.label[order]), TrainConfig(), FinderConfig()
        )
        assert curve.verdict == "flat: no signal"
        assert np.nanmin(curve.losses) < 0.5 * curve.losses[0, 0]


def test_the_lesson_head_has_the_verdict_flat_for_random_labels() -> None:
    for seed in range(3):
        data = _data(400, width=32, classes=3, separation=0, seed=seed)
        finder = FinderConfig(steps=50)
        assert (
            find_learning_rate(data, TrainConfig(head="lesson"), finder).verdict
            == "flat: no signal"
        )


@pytest.mark.parametrize("separation", [0.15, 1.0])
@pytest.mark.parametrize("multi", [False, True])
def test_a_signal_is_never_flat_however_weak_or_small_the_store(
    multi: bool, separation: float
) -> None:
    for seed in range(3):
        rows = 100 if separation == 1 else 2000
        data = _data(rows, width=64, classes=3, separation=separation, seed=seed, multi=multi)
        assert find_learning_rate(data, TrainConfig(), FinderConfig()).verdict == "good"


def test_a_short_training_gets_a_rate_that_was_tried_with_its_number_of_steps() -> None:
    data = _data(180, width=128, classes=5, separation=0.3)
    config = TrainConfig(head="linear", epochs=5)  # 15 steps
    curve = find_learning_rate(data, config, FinderConfig())
    assert curve.chosen == "schedule"
    ends = {
        name: train(data, config, curve.suggestions[name]).epochs[-1]
        for name in ("schedule", "held-out")
    }
    assert ends["schedule"]["valid_loss"] < ends["held-out"]["valid_loss"]
    assert curve.suggestions["schedule"] > curve.suggestions["held-out"]
    assert (
        "schedule"
        not in find_learning_rate(data, replace(config, epochs=200), FinderConfig()).suggestions
    )


def test_held_out_rows_of_all_classes_decide_though_rows_come_class_by_class() -> None:
    data = _data(30000, width=16, classes=2, separation=1)
    assert set(data.label[data.valid[:2048]].tolist()) == {0}
    assert find_learning_rate(data, TrainConfig(), FinderConfig(steps=40)).verdict == "good"


# ------------------------------------------------------------------------- rates that train


@pytest.mark.parametrize(
    ("head", "width", "classes", "multi"),
    [
        ("linear", 16, 3, False),
        ("linear", 256, 2, False),
        ("lesson", 16, 3, False),
        ("linear", 64, 4, True),
    ],
)
def test_separable_features_are_good_and_the_rate_trains_well(
    head: str, width: int, classes: int, multi: bool
) -> None:
    data = _data(800, width=width, classes=classes, separation=1, multi=multi)
    config = TrainConfig(head=head, epochs=10)  # type: ignore[arg-type]
    curve = find_learning_rate(data, config, FinderConfig())
    assert curve.verdict == "good"
    assert curve.suggestions.keys() - {"schedule"} == curve.spreads.keys() == RULES
    assert curve.rate == curve.suggestions[curve.chosen]
    assert curve.spreads["held-out"] < 2
    well, badly = (train(data, config, rate).epochs[-1] for rate in (curve.rate, 1e-6))
    assert well["accuracy"] > 0.85
    assert well["valid_loss"] < 0.5 * badly["valid_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"head": "linear"}, {"head": "lesson", "epochs": 8}])
def test_where_rates_matter_the_rate_is_within_three_of_the_best_of_a_grid(
    settings: dict[str, Any],
) -> None:
    data = _data(400, width=256, classes=2, separation=0.15)
    config = TrainConfig(**settings)
    curve = find_learning_rate(data, config, FinderConfig())
    grid = np.geomspace(1e-5, 1e-1, 9)
    trials = [
        Trial(config=replace(config, seed=seed), lr=rate, train=data.train, valid=data.valid)
        for rate in [*grid.tolist(), curve.rate]
        for seed in range(2)
    ]
    ended = [one.epochs[-1]["valid_loss"] for one in train_stack(data, trials)]
    loss = np.reshape(ended, (10, 2)).mean(1)
    assert loss.max() > 2 * loss.min()
    best = grid[loss[:9].argmin()]
    assert best / 3 < curve.rate < best * 3
    assert loss[9] < 1.2 * loss.min()


def test_the_rate_of_real_features_is_within_three_of_the_best_of_a_grid(
    photo_store: Path,
) -> None:
    from arrowhead.features.store import Store

    store = Store(photo_store)
    parts = [store.features(split) for split in ("train", "valid")]
    (train_part, valid_part) = ((np.array(part.feature), np.array(part.label)) for part in parts)
    data, config = data_from_arrays(train_part, valid_part, ["cats", "dogs"]), TrainConfig()
    curve = find_learning_rate(data, config, FinderConfig())
    assert curve.verdict == "good"
    grid = np.geomspace(1e-5, 1e-1, 9)
    trials = [
        Trial(config=replace(config, seed=seed), lr=rate, train=data.train, valid=data.valid)
        for rate in grid.tolist()
        for seed in range(5)
    ]
    ends = [one.epochs[-1]["valid_loss"] for one in train_stack(data, trials)]
    best = grid[np.reshape(ends, (9, 5)).mean(1).argmin()]
    assert best / 3 < curve.rate < best * 3


def test_the_race_chooses_the_rate_with_the_lowest_validation_loss() -> None:
    data = _data(400, width=64, classes=3, separation=0.3)
    config = TrainConfig(epochs=4, seed=3)
    finder = FinderConfig(race=True, seeds=2, steps=40)
    curve = find_learning_rate(data, config, finder)
    assert curve.race is not None
    assert curve.race.keys() == RULES | {"schedule"}
    assert curve.race[curve.chosen] == min(curve.race.values())
    assert curve.rate == curve.suggestions[curve.chosen]
    alone = [
        train(data, replace(config, seed=seed), curve.rate).epochs[-1]["valid_loss"]
        for seed in (3, 4)
    ]
    assert curve.race[curve.chosen] == pytest.approx(np.mean(alone), rel=1e-4)
    short = find_learning_rate(data, config, replace(finder, race_epochs=1)).race
    assert short is not None
    assert short["held-out"] != curve.race["held-out"]
    assert find_learning_rate(data, config, FinderConfig(seeds=2, steps=40)).race is None


def test_a_race_of_a_few_epochs_runs_whatever_the_training_would_end_or_keep_by() -> None:
    data = _data(200, width=16, classes=2, separation=1)
    config = TrainConfig(
        schedule="cosine", cycle_len=1, cycle_mult=2, epochs=7, best="accuracy", patience=1
    )
    curve = find_learning_rate(
        data, config, FinderConfig(race=True, race_epochs=2, seeds=1, steps=20)
    )
    assert curve.race is not None
    assert curve.spreads == {}  # one seed differs from nobody


def test_a_rate_whose_heads_diverge_loses_the_race_and_is_none_in_json() -> None:
    one = np.ones((1, 3))
    curve = Curve(
        rates=np.ones(3),
        losses=one,
        suggestions={"valley": 1.0, "slide": 0.1},
        verdict="good",
        race={"valley": np.inf, "slide": 0.5},
    )
    assert (curve.chosen, curve.rate) == ("slide", 0.1)
    assert curve.plain()["race"] == {"valley": None, "slide": 0.5}


# -------------------------------------------------------------------------- the curve itself


def test_the_same_seed_draws_the_same_curve_and_every_seed_its_own() -> None:
    data = _data(400, width=16, classes=3, separation=1)
    first, again = (
        find_learning_rate(data, TrainConfig(), FinderConfig(steps=30)) for _ in range(2)
    )
    assert np.array_equal(first.losses, again.losses, equal_nan=True)
    assert first.suggestions == again.suggestions
    assert len({tuple(row) for row in first.losses.tolist()}) == 3


def test_the_curve_of_a_seed_does_not_depend_on_other_seeds() -> None:
    data = _data(400, width=16, classes=3, separation=1)
    both = find_learning_rate(data, TrainConfig(), FinderConfig(steps=30, seeds=2))
    alone = find_learning_rate(data, TrainConfig(seed=1), FinderConfig(steps=30, seeds=1))
    np.testing.assert_allclose(both.losses[1], alone.losses[0], rtol=1e-4)


@pytest.mark.parametrize("head", ["linear", "lesson"])
@pytest.mark.parametrize(("low", "high"), [(1e-6, 1e3), (1e-6, 1e38), (1e20, 1e38)])
def test_a_range_that_ends_in_nan_still_gives_finite_advice(
    head: str, low: float, high: float, tmp_path: Path
) -> None:
    data = _data(400, width=16, classes=3, separation=1)
    config = TrainConfig(head=head, epochs=3)  # type: ignore[arg-type]
    curve = find_learning_rate(data, config, FinderConfig(low=low, high=high, steps=25, seeds=2))
    assert (curve.suggestions.keys() - {"schedule"}) | {"held-out"} == RULES
    assert all(np.isfinite(rate) and rate > 0 for rate in curve.suggestions.values())
    assert low <= curve.rate <= high
    json.loads(json.dumps(curve.plain(), allow_nan=False))
    assert figures.save(figures.lr_figure(curve), tmp_path / "curve.png").stat().st_size > 1000


@pytest.mark.parametrize("rows", [5, 8, 66])
def test_the_finder_works_for_stores_of_a_few_rows(rows: int) -> None:
    train_part = np.eye(4, dtype=np.float16)[np.arange(rows) % 2][:, None], np.arange(rows) % 2
    valid_part = train_part[0][:1], train_part[1][:1]
    curve = find_learning_rate(
        data_from_arrays(train_part, valid_part, ["a", "b"]), TrainConfig(), FinderConfig(steps=20)
    )
    assert np.isfinite(curve.rate)
    assert curve.verdict == "flat: no signal"  # one held-out row proves nothing


def test_a_seed_that_diverges_leaves_nan_behind_it_and_bounds_the_advice() -> None:
    data = _data(400, width=16, classes=3, separation=1)
    curve = find_learning_rate(data, TrainConfig(), FinderConfig(high=1e10))
    diverged = np.isnan(curve.losses).any(0)
    assert diverged.any()
    assert not np.isnan(curve.losses[:, 0]).any()
    for row in np.isnan(curve.losses):
        assert (np.diff(row.astype(int)) >= 0).all()  # once gone, gone
    for name in RULES:
        assert curve.suggestions[name] < curve.rates[diverged].min()


# ------------------------------------------------------------------------- reading a curve


def _valley(rates: NDArray[np.float64]) -> NDArray[np.float64]:
    """A loss that falls from 1e-4 to 1e-1, steepest at 1e-2, and rises behind it."""
    x = np.log10(rates)
    return np.asarray(1 / (1 + np.exp(4 * (x + 2))) + np.where(x > -1, (x + 1) ** 2, 0))


def test_suggestions_are_read_off_a_known_curve() -> None:
    rates = np.geomspace(1e-6, 10, 141)
    losses = np.stack([_valley(rates)] * 2)
    curve = suggest(rates, losses, losses)
    assert curve.verdict == "good"
    assert all(spread == pytest.approx(1) for spread in curve.spreads.values())
    lowest = rates[_valley(rates).argmin()]
    assert curve.suggestions["steepest"] == pytest.approx(1e-2, rel=0.2)
    assert curve.suggestions["minimum/10"] == pytest.approx(lowest / 10)
    assert curve.suggestions["valley"] == pytest.approx((rates[0] * lowest) ** 0.5, rel=0.2)
    half_done = 1e-2
    assert curve.rate == pytest.approx(half_done**0.7 * lowest**0.3, rel=0.1)


def test_slide_stops_where_the_slopes_at_the_windows_ends_agree() -> None:
    rates = np.geomspace(1e-6, 10, 100)
    folder = np.arange(100)
    # Flat up to 40, then bent upwards: from its right, the first straight window is 25 to 40.
    losses = np.where(folder < 40, 1 - folder / 80, 0.5 + ((folder - 40) / 20) ** 2)
    curve = suggest(rates, losses[None])
    assert curve.suggestions["slide"] == pytest.approx(rates[25], rel=0.4)


def test_spreads_are_the_factor_by_which_single_seeds_differ() -> None:
    rates = np.geomspace(1e-6, 10, 141)
    seeds = np.stack([_valley(rates), _valley(rates * 4)])
    curve = suggest(rates, seeds, seeds)
    # Two rates a factor 4 apart lie a factor 2 from their geometric mean.
    assert curve.spreads["steepest"] == pytest.approx(2, rel=0.15)
    assert curve.spreads["held-out"] == pytest.approx(2, rel=0.15)


def test_suggestions_are_robust_to_spikes_infinities_and_nans() -> None:
    rates = np.geomspace(1e-6, 10, 100)
    plain = np.stack([_valley(rates)] * 3)
    damaged = plain.copy()
    damaged[0, 20], damaged[1, 55], damaged[2, 70:72], damaged[0, 48] = 1e30, np.nan, np.inf, -1e30
    well, from_damaged = (suggest(rates, smooth(one)) for one in (plain, damaged))
    assert np.array_equal(np.isnan(well.losses), np.isnan(from_damaged.losses))
    for name, rate in well.suggestions.items():
        assert from_damaged.suggestions[name] == pytest.approx(rate, rel=0.2)


def test_smoothing_moves_nothing_to_higher_rates() -> None:
    step = np.where(np.arange(100) < 50, 2.0, 1.0)
    assert np.gradient(smooth(step[None])[0]).argmin() in (49, 50)


def test_losses_end_where_no_batch_is_finite_any_more() -> None:
    raw = np.ones((2, 40))
    raw[0, 20:] = np.nan
    raw[1, 30:] = 100.0
    diverged = np.isnan(smooth(raw))
    assert 18 <= diverged[0].argmax() <= 22
    assert 20 <= diverged[1].argmax() <= 30
    assert diverged[:, -1].all()


def test_curves_that_only_rise_or_stay_are_flat() -> None:
    rates = np.geomspace(1e-6, 10, 100)
    for losses in (np.ones(100), np.linspace(1, 3, 100), 1 - 0.02 * np.linspace(0, 1, 100)):
        assert suggest(rates, losses[None]).verdict == "flat: no signal"


def test_seeds_that_disagree_are_unstable() -> None:
    rates = np.geomspace(1e-6, 10, 100)
    down = 1 - 0.9 * np.linspace(0, 1, 100)
    up = np.where(np.arange(100) < 10, 1 - 0.05 * np.arange(100), 0.5 + 0.01 * np.arange(100))
    assert suggest(rates, np.stack([down, down])).verdict == "good"
    assert suggest(rates, np.stack([down, up])).verdict == "unstable"


def test_rates_rise_geometrically_from_low_to_high() -> None:
    rates = rate_range(FinderConfig(low=1e-4, high=1e-1, steps=31))
    assert (rates[0], rates[-1]) == (pytest.approx(1e-4), pytest.approx(1e-1))
    np.testing.assert_allclose(rates[1:] / rates[:-1], 10**0.1)


def test_missing_losses_of_a_curve_are_none_in_json() -> None:
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
        {"race": True, "race_epochs": 0},
        {"race_epochs": 3},
    ],
)
def test_finder_settings_out_of_range_are_refused_in_three_parts(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as refusal:
        FinderConfig(**bad)
    assert all((refusal.value.found, refusal.value.wanted, refusal.value.do))


# ------------------------------------------------------------------------- figure and table


def _curve() -> Curve:
    rates = np.geomspace(1e-6, 10, 100)
    seeds = np.stack([_valley(rates), _valley(rates * 1.5)])
    seeds[0, 90:] = np.nan
    return suggest(rates, seeds, seeds * 1.1)


def test_suggestions_three_decades_apart_are_not_called_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, finder = _data(100, width=64, classes=3, separation=1), FinderConfig(steps=40)
    near = find_learning_rate(data, TrainConfig(), finder)
    assert near.words.startswith("good: seeds agree, and all suggestions lie within a factor of ")
    monkeypatch.setattr(lr_finder, "MAX_SUGGESTION_SPAN", near.span)
    assert find_learning_rate(data, TrainConfig(), finder).verdict == "rules differ"
    wide = replace(near, suggestions={"valley": 1e-4, "slide": 0.2}, verdict="rules differ")
    assert wide.words == "rules differ: seeds agree, but suggestions lie a factor of 2,000 apart"


def test_the_figure_shows_verdict_and_every_suggestion_in_places_that_do_not_meet() -> None:
    figure = figures.lr_figure(_curve())
    above, below = figure.axes
    assert "good" in figure.get_suptitle()
    assert below.get_xscale() == "log"
    labels = above.get_yticklabels()
    assert [label.get_text().split()[0] for label in labels] == list(_curve().suggestions)
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in labels]
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[i + 1 :])
    legend = below.get_legend()
    assert legend is not None
    page = figure.bbox
    for box in (*boxes, legend.get_window_extent()):
        assert page.x0 <= box.x0 < box.x1 <= page.x1
        assert page.y0 <= box.y0 < box.y1 <= page.y1


def test_a_spike_does_not_determine_the_scale_of_the_figure() -> None:
    curve = _curve()
    assert curve.held_out is not None
    curve.held_out[:, 80] = 1e9
    low, high = figures.lr_figure(curve).axes[1].get_ylim()
    assert high - low < 3


def test_the_table_has_a_rate_and_a_loss_per_seed_and_nothing_where_it_diverged(
    tmp_path: Path,
) -> None:
    curve = _curve()
    figures.lr_csv(curve, tmp_path / "curve.csv")
    with (tmp_path / "curve.csv").open(newline="") as file:
        head, *lines = csv.reader(file)
    assert head == ["rate", "loss_seed_0", "loss_seed_1"]
    assert len(lines) == 100
    assert [float(line[0]) for line in lines] == pytest.approx(curve.rates.tolist(), rel=1e-5)
    assert float(lines[50][2]) == pytest.approx(curve.losses[1, 50], rel=1e-5)
    assert lines[95][1] == ""


def test_without_a_finite_held_out_loss_the_valley_is_used() -> None:
    rates = np.geomspace(1e-6, 10, 100)
    losses = np.stack([_valley(rates)] * 2)
    curve = suggest(rates, losses, np.full_like(losses, np.nan))
    assert curve.chosen == "valley"
    assert curve.rate == suggest(rates, losses).rate > rates[0]


# -------------------------------------------------------------------------- several workers


def _cases() -> dict[str, tuple[Data, TrainConfig, FinderConfig]]:
    """A sound test; seeds that diverge at rates of their own; a NaN among one worker's rows."""
    sound = _data(403, width=16, classes=3, separation=1)
    # A head is lost as soon as it draws row 7: early in one seed, late in another.
    poisoned = _data(403, width=16, classes=3, separation=1)
    rows = poisoned.feature.take(torch.arange(403))
    rows[7] = float("nan")
    poisoned = replace(poisoned, feature=InMemoryFeatures(rows[:, None]))
    few = FinderConfig(steps=30)
    return {
        "linear": (sound, TrainConfig(), few),
        "lesson": (sound, TrainConfig(head="lesson", epochs=10), few),
        "several labels": (
            _data(403, width=16, classes=3, separation=1, multi=True),
            TrainConfig(),
            few,
        ),
        "diverging": (sound, TrainConfig(batch_size=8), FinderConfig(steps=80, high=1e4, seeds=4)),
        "nan": (poisoned, TrainConfig(batch_size=16, head="lesson"), replace(few, seeds=4)),
        "race": (sound, TrainConfig(epochs=2), replace(few, race=True, seeds=2)),
    }


@cache
def _alone(name: str) -> Curve:
    """What one process finds of a case."""
    return find_learning_rate(*_cases()[name])


def _together(rank: int, folder: Path) -> None:
    """One of two workers; leaves what it found in the folder."""
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/met",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),  # a rank that waits for nobody ends here
    )
    result = {
        name: find_learning_rate(*case, DistributedContext(rank, 2)).plain()
        for name, case in _cases().items()
    }
    (folder / f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two gloo workers found."""
    from torch.multiprocessing.spawn import spawn

    folder = tmp_path_factory.mktemp("workers")
    spawn(_together, args=(folder,), nprocs=2, join=True)  # type: ignore[no-untyped-call]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(_cases()))
def test_two_workers_compute_the_same_curve_as_one(by_two: list[dict[str, Any]], name: str) -> None:
    one = _alone(name)
    first, second = (rank[name] for rank in by_two)
    assert first == second
    losses = np.array(first["losses"], dtype=float)  # None becomes nan
    assert np.array_equal(np.isnan(losses), np.isnan(one.losses))
    diverged = np.isnan(one.losses)
    # Where a loss is large it has been through a divergence, which no rounding survives.
    calm = ~diverged & (np.maximum.accumulate(np.nan_to_num(one.losses, nan=0), 1) < 3)
    calm[:, :-1] &= calm[:, 1:]  # the weights part one step before the loss shows it
    np.testing.assert_allclose(losses[calm], one.losses[calm], rtol=1e-5, atol=1e-5)
    assert one.held_out is not None
    checked = calm & np.isfinite(one.held_out)
    held_out = np.array(first["held_out"], dtype=float)
    np.testing.assert_allclose(held_out[checked], one.held_out[checked], rtol=1e-4, atol=1e-5)
    assert first["verdict"] == one.verdict
    for rule, rate in one.suggestions.items():
        assert first["suggestions"][rule] == pytest.approx(rate, rel=1e-3)
    assert (first["race"] is None) == (one.race is None)


def test_the_cases_of_two_workers_diverge_as_intended() -> None:
    diverging, poisoned = (np.isnan(_alone(name).losses) for name in ("diverging", "nan"))
    assert diverging.any(1).all()
    assert len({int(row.argmax()) for row in diverging}) > 1
    assert poisoned.any()
    assert len({int(row.sum()) for row in poisoned}) > 1
