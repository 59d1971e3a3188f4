"""Many heads at once: grids, folds, shares of the images, correct ranking."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from training_data import data_from_arrays

from arrowhead import ConfigError
from arrowhead.training import comparison, cross_validation, grid, learning_curve, logistic
from arrowhead.training.config import TrainConfig
from arrowhead.training.dataset import Data
from arrowhead.training.grid import SweepConfig
from arrowhead.training.trainer import TrainedHead, train_stack


def _toy_data(rows: int = 600, *, width: int = 16, classes: int = 3, apart: float = 1.0) -> Data:
    rng = np.random.default_rng(0)
    label = np.arange(rows) % classes
    centre = apart * rng.normal(size=(classes, 1, width)) / 2
    feature = (centre[label] + rng.normal(size=(rows, 1, width))).astype(np.float16)
    cut = rows * 4 // 5
    names = [f"class {n}" for n in range(classes)]
    return data_from_arrays((feature[:cut], label[:cut]), (feature[cut:], label[cut:]), names)


# ----------------------------------------------------------------------------------- grids


def test_grid_is_all_combinations_of_its_values() -> None:
    result = grid.parse_grid("rate=1e-4..1e-1:4 weight-decay=0,1e-2 dropout=0..0.5:3 seed=0..2")
    assert len(result) == 4 * 2 * 3 * 3
    assert sorted({one["rate"] for one in result}) == [1e-4, 1e-3, 1e-2, 1e-1]
    assert sorted({one["dropout"] for one in result}) == [0, 0.25, 0.5]
    assert sorted({one["seed"] for one in result}) == [0, 1, 2]
    assert len({tuple(one.items()) for one in result}) == len(result)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("rates=1", "rates=1"),
        ("rate", "rate"),
        ("rate=", "rate="),
        ("rate=1e-3 rate=1e-2", "each NAME once"),
        ("epochs=1,2", "share all"),
        ("rate=fast", "fast"),
        ("rate=0..1:3", "0..1:3"),
        ("rate=1e-3..1e-1", "1e-3..1e-1"),
        ("seed=0.5", "0.5"),
        ("dropout=0..1:0", "0..1:0"),
        ("seed=0..9999", "10000 heads"),
        ("   ", "no heads"),
    ],
)
def test_invalid_grid_is_refused_with_the_invalid_word(words: str, says: str) -> None:
    with pytest.raises(ConfigError) as error_info:
        SweepConfig(grid=words)
    assert says in f"{error_info.value.found} {error_info.value.wanted}"


def test_invalid_setting_is_refused_before_training() -> None:
    with pytest.raises(ConfigError, match="dropout"):
        grid.grid_trials(_toy_data(), TrainConfig(), 0.01, "dropout=0.5,1.5")


def _train_and_rank(
    data: Data, config: TrainConfig, words: str, *, halving: bool = False, rate: float = 1.0
) -> dict[str, Any]:
    """Train a grid and rank it, as `training.run.run_study` does."""
    overrides, trials = grid.parse_grid(words), grid.grid_trials(data, config, rate, words)
    heads = train_stack(
        data, trials, stop_rule=grid.halving_rule(overrides, config) if halving else None
    )

    def judge(groups: Any) -> Any:
        return comparison.metric_by_image(
            data, trials, heads, groups, grid.selection_metric(config)
        )

    return grid.rank_settings(overrides, heads, config, judge)


def test_best_setting_wins_and_a_diverged_one_ranks_last() -> None:
    words = "rate=1e-6,1e-2,9e2 seed=0,1,2"
    config = TrainConfig(epochs=5, optimizer="sgd", schedule="constant")
    ranked = _train_and_rank(_toy_data(), config, words)
    assert [one["knobs"]["rate"] for one in ranked["settings"]] == [1e-2, 1e-6, 9e2]
    assert grid.parse_grid(words)[ranked["best"]]["rate"] == 1e-2
    assert ranked["alike"] == 0
    assert "distinguishable from the 2 other settings" in ranked["words"]
    assert "not" not in ranked["words"]


@pytest.mark.parametrize("best", ["last", "valid_loss", "balanced_accuracy"])
def test_settings_within_noise_are_reported_as_indistinguishable(best: Any) -> None:
    words = "dropout=0.2,0.21,0.22 seed=0,1,2"
    ranked = _train_and_rank(_toy_data(), TrainConfig(epochs=3, best=best), words, rate=1e-2)
    assert ranked["alike"] == 2
    assert "not distinguishable from 2 of the 2 other settings" in ranked["words"]


def _trained_head(accuracy: list[float], *, loss: float = 0.5, stopped: str = "") -> TrainedHead:
    lines = [{"epoch": i, "valid_loss": loss, "accuracy": x} for i, x in enumerate(accuracy)]
    return TrainedHead(state={}, epochs=lines, epoch=len(lines) - 1, stopped=stopped)


def test_winner_comes_from_the_best_setting_not_from_the_best_single_head() -> None:
    overrides = grid.parse_grid("rate=1e-3,1e-2 seed=0,1")
    heads = [
        _trained_head([0.8]),
        _trained_head([0.82]),
        _trained_head([0.9]),
        _trained_head([0.5]),
    ]
    ranked = grid.rank_settings(overrides, heads, TrainConfig(), lambda groups: np.eye(2))
    assert [one["knobs"]["rate"] for one in ranked["settings"]] == [1e-3, 1e-2]
    assert ranked["best"] == 1


def test_paired_comparison_distinguishes_settings_by_ten_images() -> None:
    """Unpaired standard errors of the accuracies, 0.009 each, would not distinguish them."""
    correct = np.ones((3, 1000))
    correct[:, :50] = 0
    correct[1, 50:60] = 0
    correct[2, 50:59], correct[2, 0] = 0, 1
    heads = [_trained_head([row.mean()]) for row in correct]
    overrides = grid.parse_grid("rate=1,2,3")

    def judge(groups: Any) -> Any:
        return np.stack([correct[group].mean(0) for group in groups])

    pair = grid.rank_settings(overrides[:2], heads[:2], TrainConfig(), judge)
    assert pair["settings"][1]["p"] == pytest.approx(2 * 0.5**10)
    assert (pair["alike"], pair["test"]) == (0, "exact McNemar test")
    assert "distinguishable from the 1 other setting (p at most 0.002" in pair["words"]
    assert "the same 1000 validation images" in pair["words"]
    every = grid.rank_settings(overrides, heads, TrainConfig(), judge)
    assert [one["knobs"]["rate"] for one in every["settings"]] == [1, 3, 2]
    assert [one["p"] for one in every["settings"][1:]] == pytest.approx(
        [2 * 11 * 0.5**10, 2 * 2 * 0.5**10]  # the smaller of two counts, doubled
    )


def test_heads_stopped_by_halving_rank_last_and_no_comparison_is_claimed() -> None:
    overrides = grid.parse_grid("rate=1,2,3,4")
    heads = [
        _trained_head([0.99], stopped="halving"),
        _trained_head([0.6] * 4),
        _trained_head([0.95] * 2, stopped="halving"),
        _trained_head([0.7] * 4),
    ]
    request = []

    def judge(groups: Any) -> Any:
        request.extend(groups)
        return np.array([[1.0, 1, 1], [1, 0, 1]])

    ranked = grid.rank_settings(overrides, heads, TrainConfig(epochs=4), judge)
    assert [one["knobs"]["rate"] for one in ranked["settings"]] == [4, 2, 3, 1]
    assert (ranked["best"], request) == (3, [[3], [1]])
    assert [one["p"] is None for one in ranked["settings"]] == [True, False, True, True]
    assert "2 stopped early and cannot be compared" in ranked["words"]
    full = _train_and_rank(
        _toy_data(), TrainConfig(epochs=8), "rate=1e-6..1e-1:6 seed=0,1", halving=True
    )
    assert [one["epochs"] for one in full["settings"]] == [8, 8, 4, 2, 2, 2]
    assert [one["stopped"] for one in full["settings"]] == [False] * 2 + [True] * 4


def test_halving_stops_the_worse_half_twice_and_keeps_the_best() -> None:
    data = _toy_data()
    words = "rate=1e-6,1e-5,1e-4,1e-3,1e-2,3e-2,1e-1,3e-1 seed=0,1"
    config = TrainConfig(epochs=8, schedule="constant")
    losers = grid.halving_rule(grid.parse_grid(words), config)
    halved = train_stack(data, grid.grid_trials(data, config, 1.0, words), stop_rule=losers)
    full = train_stack(data, grid.grid_trials(data, config, 1.0, words))
    lengths = sorted(len(one.epochs) for one in halved)
    assert lengths == [2] * 8 + [4] * 4 + [8] * 4
    for one, other in zip(halved, full, strict=True):  # heads that stay are not disturbed
        for line, same in zip(one.epochs, other.epochs, strict=False):
            assert line == pytest.approx(same, rel=1e-5)
    stayed = {
        grid.parse_grid(words)[at]["rate"] for at, one in enumerate(halved) if len(one.epochs) == 8
    }
    assert not stayed & {1e-6, 1e-5, 1e-4}


# ----------------------------------------------------------------------------------- folds


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=30, max_size=200),
    st.integers(2, 7),
)
def test_folds_keep_copies_together_and_have_equal_sizes(rows: list[int], count: int) -> None:
    key = np.array(rows, np.uint64)
    assume(len(np.unique(key)) > 1)
    label = np.zeros(len(rows), np.int64)
    part = cross_validation.assign_folds(key, label, count, ["one"])
    assert part.min() == 0
    folds_by_key = {int(one): {int(p) for p in part[key == one]} for one in np.unique(key)}
    assert all(len(folds) == 1 for folds in folds_by_key.values())
    sizes = np.bincount([next(iter(folds)) for folds in folds_by_key.values()], minlength=count)
    assert sizes.max() - sizes.min() <= 1
    shuffled = np.random.default_rng(0).permutation(len(rows))
    assert np.array_equal(
        cross_validation.assign_folds(key[shuffled], label, count, ["one"]), part[shuffled]
    )


def test_folds_are_stratified_by_class() -> None:
    key = np.random.default_rng(0).integers(1 << 60, size=100).astype(np.uint64)
    label = np.repeat([0, 1, 2], [50, 40, 10])
    part = cross_validation.assign_folds(key, label, 5, ["a", "b", "c"])
    for one in range(5):
        assert np.bincount(label[part == one]).tolist() == [10, 8, 2]


def test_class_with_one_distinct_image_is_in_every_training_fold_and_reported() -> None:
    key = np.arange(100, dtype=np.uint64)
    label = np.repeat([0, 1, 2, 3], [50, 46, 1, 3])
    key[97:] = 97  # one photograph, three copies
    names = ["a", "b", "one", "copied"]
    part = cross_validation.assign_folds(key, label, 5, names)
    assert part[96:].tolist() == [-1] * 4
    assert cross_validation.not_held_out(part, label, names) == {"one": 1, "copied": 3}
    assert sorted(set(part[:96])) == [0, 1, 2, 3, 4]
    data = replace(_toy_data(100, classes=4), label=torch.from_numpy(label))
    for one in cross_validation.fold_trials(data, TrainConfig(rate=0.1), part):
        assert set(label[one.train]) == {0, 1, 2, 3}
        assert {96, 97, 98, 99} <= set(one.train.tolist())
    with pytest.raises(ConfigError, match="can hold out no image"):
        cross_validation.assign_folds(key[:2], np.array([0, 1]), 5, names)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans(), st.integers(2, 6))
def test_every_fold_trains_on_every_class_that_it_predicts(
    seed: int, multi: bool, count: int
) -> None:
    """Few images, rare classes, copies with contradictory labels."""
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(2, 40))
    key = rng.integers(0, 30, rows).astype(np.uint64)
    label = rng.integers(0, 5, rows)
    if multi:
        label = (rng.random((rows, 5)) < rng.random(5) ** 2).astype(np.uint8)
    multi_hot = label > 0 if multi else label[:, None] == np.arange(5)
    names = list("abcde")
    try:
        part = cross_validation.assign_folds(key, label, count, names)
    except ConfigError:
        return
    assert sorted(set(part[part >= 0])) == list(range(part.max() + 1))
    for one in range(part.max() + 1):
        assert not set(key[part == one]) & set(key[part != one])
        trained = multi_hot[part != one].any(0)
        assert trained[multi_hot[part == one].any(0)].all()
    named = cross_validation.not_held_out(part, label, names)
    assert named == {
        names[i]: multi_hot[:, i].sum()
        for i in range(5)
        if multi_hot[:, i].any() and not multi_hot[part >= 0, i].any()
    }


@pytest.mark.parametrize("best", ["valid_loss", "accuracy"])
def test_labels_of_a_fold_do_not_influence_its_predictions(best: Any) -> None:
    data = _toy_data(120, apart=0.5)
    config = TrainConfig(rate=0.1, epochs=12, best=best, patience=2)
    part = np.arange(120) // 7 % 3
    other = data.label.clone()
    other[torch.from_numpy(part == 1)] = other[torch.from_numpy(part == 1)].flip(0)
    assert not torch.equal(other, data.label)
    states = []
    for label in (data.label, other):
        shuffled = replace(data, label=label)
        trials = cross_validation.fold_trials(shuffled, config, part)
        heads = train_stack(shuffled, trials, stop_epoch=7)
        assert [len(one.epochs) for one in heads] == [7, 7, 7]
        states.append([one.state for one in heads])
    for name, weight in states[0][1].items():
        assert np.array_equal(weight, states[1][1][name])
    assert not np.array_equal(states[0][0]["2.weight"], states[1][0]["2.weight"])


@pytest.mark.parametrize("head", ["linear", "logistic"])
@pytest.mark.parametrize("weights", ["balanced", "validation"])
def test_class_weights_ignore_the_labels_of_the_predicted_fold(head: Any, weights: Any) -> None:
    data = _toy_data(120, apart=0.5)
    label = data.label.clone()
    label[data.valid[:12]] = 0
    own_labels: dict[str, Any] = {"l2": 1.0} if head == "logistic" else {"rate": 0.1, "epochs": 3}
    config = TrainConfig(head=head, class_weights=weights, **own_labels)
    part = np.arange(120) // 7 % 3
    states = []
    for here in (label, torch.where(torch.from_numpy(part == 1), 0, label)):
        other = replace(data, label=here)
        trials = cross_validation.fold_trials(other, config, part)
        result = logistic.train(other, trials) if head == "logistic" else train_stack(other, trials)
        states.append([one.state for one in result])
    for name, weight in states[0][1].items():
        np.testing.assert_allclose(weight, states[1][1][name], rtol=1e-5, atol=1e-5)
    assert not np.allclose(states[0][0]["2.bias"], states[1][0]["2.bias"], atol=1e-3)


def test_fold_head_trains_only_on_images_of_the_other_folds() -> None:
    data = _toy_data(100)
    pool = np.arange(100)
    part = cross_validation.assign_folds(
        pool.astype(np.uint64), data.label.numpy(), 4, data.classes
    )
    result = cross_validation.fold_trials(data, TrainConfig(rate=0.1), part)
    assert sorted(np.concatenate([one.valid for one in result]).tolist()) == pool.tolist()
    for one in result:
        assert not set(one.train.tolist()) & set(one.valid.tolist())
        assert len(one.train) + len(one.valid) == 100


# ------------------------------------------------------------------------- learning curve


def test_shares_are_nested_contain_every_class_and_take_equal_steps() -> None:
    data = _toy_data(1000)
    result = learning_curve.share_trials(data, TrainConfig(rate=0.1), seeds=2)
    sets = [set(one.train.tolist()) for _, one in result[::2]]
    assert [len(one) for one in sets] == pytest.approx([40, 80, 160, 400, 800], abs=3)
    assert all(small < large for small, large in itertools.pairwise(sets))
    for one in sets:
        counts = np.bincount(data.label.numpy()[list(one)])
        assert counts.max() - counts.min() <= 2
    assert len(result) == 10


def test_logistic_regression_shares_are_drawn_once_per_seed() -> None:
    data, config = _toy_data(1000), TrainConfig(head="logistic", l2=1.0)
    result = learning_curve.share_trials(data, config, seeds=3)
    by_share = {
        share: [set(one.train.tolist()) for at, one in result if at == share]
        for share in learning_curve.SHARES
    }
    assert [len(sets) for sets in by_share.values()] == [3, 3, 3, 3, 1], "all images: one way"
    for sets in list(by_share.values())[:-1]:
        assert len({len(one) for one in sets}) == 1
        assert all(one != other for one, other in itertools.combinations(sets, 2))
    for small, large in itertools.pairwise(list(by_share.values())[:-1]):
        assert all(one < other for one, other in zip(small, large, strict=True)), "nested"
    trials = [one for _, one in result]
    heads = logistic.train(data, trials)

    def judge(groups: Any) -> Any:
        return comparison.metric_by_image(data, trials, heads, groups, "accuracy")

    points = learning_curve.curve(result, heads, config, judge)["points"]
    assert all(point["spread"] is not None for point in points[:-1])


def test_single_image_class_is_in_every_share() -> None:
    data = _toy_data(1000)
    data.label[data.train] = torch.where(data.label[data.train] == 2, 0, data.label[data.train])
    data.label[5] = 2
    result = learning_curve.share_trials(data, TrainConfig(rate=0.1), seeds=1)
    assert [share for share, _ in result] == list(learning_curve.SHARES)
    assert all(5 in one.train for _, one in result)


def test_learning_curve_reports_whether_more_images_would_help() -> None:
    def conclusion(apart: float, rows: int) -> dict[str, Any]:
        data, config = _toy_data(rows, width=64, apart=apart), TrainConfig(epochs=5, rate=3e-3)
        shares = learning_curve.share_trials(data, config, seeds=3)
        trials = [one for _, one in shares]
        heads = train_stack(data, trials)

        def judge(groups: Any) -> Any:
            return comparison.metric_by_image(data, trials, heads, groups, "accuracy")

        return learning_curve.curve(shares, heads, config, judge)

    easy = conclusion(3.0, 4000)
    assert "do not show" in easy["words"]
    assert easy["points"][-1]["mean"] > 0.99
    hard = conclusion(0.25, 4000)
    assert hard["points"][0]["mean"] < hard["points"][-1]["mean"] - 0.05
    assert all(math.isfinite(point["mean"]) for point in hard["points"])
    assert ("probably help" in hard["words"]) == (hard["p"] <= 0.05)
