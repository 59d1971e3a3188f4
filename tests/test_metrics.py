"""Metrics equal scikit-learn or their own formula; thresholds are optimal, temperatures fit."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn import metrics as sk

from arrowhead.evaluation.metrics import (
    calibration_error,
    class_table,
    confusion_matrix,
    evaluate,
    fit_temperature,
    fit_thresholds,
    per_class_metrics,
)

SEEDS = st.integers(0, 2**32 - 1)


def test_confusion_counts_labels_in_rows_and_guesses_in_columns() -> None:
    label, guess = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 0, 1])
    assert confusion_matrix(label, guess, 4).tolist() == [
        [1, 2, 0, 0],
        [1, 1, 0, 0],
        [0, 1, 0, 0],
        [0, 0, 0, 0],
    ]


def test_per_class_figures_match_a_hand_written_example() -> None:
    counts = np.array([[1, 2, 0], [1, 1, 0], [0, 1, 0]])
    assert per_class_metrics(counts, ["ant", "bee", "cat"]) == {
        "ant": {"precision": 1 / 2, "recall": 1 / 3, "f1": 2 / 5, "images": 3},
        "bee": {"precision": 1 / 4, "recall": 1 / 2, "f1": 1 / 3, "images": 2},
        "cat": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "images": 1},  # never guessed
    }


def test_the_table_of_classes_begins_with_the_worst_and_ends_with_those_nothing_is_known_of() -> (
    None
):
    counts = np.array([[1, 2, 0, 0], [1, 1, 0, 0], [0, 0, 9, 0], [0, 0, 0, 0]])
    lines = class_table(per_class_metrics(counts, ["ant", "bumblebee", "cat", "dog"]))
    assert [line.split() for line in lines] == [
        ["class", "precision", "recall", "F1", "images"],
        ["ant", "0.5000", "0.3333", "0.4000", "3"],
        ["bumblebee", "0.3333", "0.5000", "0.4000", "2"],
        ["cat", "1.0000", "1.0000", "1.0000", "9"],
        ["dog", "0.0000", "0.0000", "0.0000", "0"],
    ]
    assert len({len(line) for line in lines}) == 1
    several = evaluate(np.zeros((1, 1)), np.ones((1, 1), np.uint8), ["one"])["per_class"]
    assert class_table(several)[1].split()[-1] == "0.5000"
    assert len(class_table({})) == 1


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=60))
@settings(deadline=None)
def test_every_row_is_counted_once(pairs: list[tuple[int, int]]) -> None:
    label, guess = np.array(pairs, np.int64).reshape(-1, 2).T
    counts = confusion_matrix(label, guess, 5)
    assert counts.sum() == len(pairs)
    assert np.diag(counts).sum() == (label == guess).sum()


# ------------------------------------------------------------------- one label per image


def _case(seed: int, classes: int, *, ties: bool = False) -> tuple[NDArray[Any], NDArray[Any]]:
    """Logits float32 (N, C), better than chance, and labels int64 (N,)."""
    draw = np.random.default_rng(seed)
    rows = int(draw.integers(2, 80))
    label_N = draw.integers(0, classes, rows)
    logit_NC = draw.normal(size=(rows, classes)).astype(np.float32)
    logit_NC[np.arange(rows), label_N] += 1
    return (np.round(2 * logit_NC) if ties else logit_NC), label_N


def _names(count: int) -> list[str]:
    return [f"class {number}" for number in range(count)]


def _softmax(logit_NC: NDArray[Any]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = torch.from_numpy(logit_NC).double().softmax(1).numpy()
    return result


@given(SEEDS, st.sampled_from([2, 3, 6, 9]))
@settings(deadline=None)
def test_figures_of_one_label_are_those_of_scikit_learn(seed: int, classes: int) -> None:
    logit, label = _case(seed, classes)
    result = evaluate(logit, label, _names(classes))
    every, guess, present = np.arange(classes), logit.argmax(1), np.unique(label)
    assert result["images"] == len(label)
    assert result["loss"] == pytest.approx(sk.log_loss(label, _softmax(logit), labels=every))
    assert result["accuracy"] == pytest.approx(sk.accuracy_score(label, guess))
    mean_recall = sk.recall_score(label, guess, labels=present, average="macro", zero_division=0)
    assert result["balanced_accuracy"] == pytest.approx(mean_recall)
    assert result["confusion"] == sk.confusion_matrix(label, guess, labels=every).tolist()
    if classes > 5:
        top = sk.top_k_accuracy_score(label, logit, k=5, labels=every)
        assert result["top_5_accuracy"] == pytest.approx(top)
    else:
        assert "top_5_accuracy" not in result
    columns = sk.precision_recall_fscore_support(label, guess, labels=every, zero_division=0)
    rows = zip(*columns, strict=True)
    for line, (precision, recall, f1, images) in zip(
        result["per_class"].values(), rows, strict=True
    ):
        assert line == pytest.approx(
            {"precision": precision, "recall": recall, "f1": f1, "images": images}
        )


@given(SEEDS, st.booleans())
@settings(deadline=None)
def test_auroc_of_two_classes_is_that_of_the_second_ties_included(seed: int, ties: bool) -> None:
    logit, label = _case(seed, 2, ties=ties)
    result = evaluate(logit, label, ["no", "yes"])["auroc"]
    if len(np.unique(label)) < 2:
        assert result is None
    else:
        margin = logit[:, 1].astype(np.float64) - logit[:, 0]
        assert result == pytest.approx(sk.roc_auc_score(label, margin))


@given(SEEDS, st.sampled_from([3, 8]), st.sampled_from([1.0, 2.5]))
@settings(deadline=None)
def test_auroc_of_more_classes_is_the_mean_over_those_that_occur(
    seed: int, classes: int, fitted: float
) -> None:
    logit, label = _case(seed, classes)
    result = evaluate(logit, label, _names(classes), temperature=fitted)["auroc"]
    present = np.unique(label)
    if len(present) < 2:
        assert result is None
        return
    chance = _softmax(logit / fitted)
    areas = [sk.roc_auc_score(label == one, chance[:, one]) for one in present]
    assert result == pytest.approx(np.mean(areas))


def test_of_equal_logits_the_first_class_counts_as_guessed_as_scores_list_them() -> None:
    label = np.array([0, 1, 4, 5, 6, 6, 6])
    result = evaluate(np.zeros((7, 7), np.float32), label, _names(7))
    assert result["accuracy"] == pytest.approx(1 / 7)
    assert result["top_5_accuracy"] == pytest.approx(3 / 7)


def _ece_by_hand(sure: NDArray[Any], right: NDArray[Any]) -> float:
    """Guo et al., equation 3, over bins of equal numbers of images."""
    order = np.argsort(sure)
    bins = np.array_split(order, max(1, min(15, len(sure) // 20)))
    return sum(abs(right[one].sum() - sure[one].sum()) for one in bins) / len(sure)


@given(SEEDS, st.sampled_from([2, 4]), st.sampled_from([10, 60, 300, 900]))
@settings(deadline=None, max_examples=40)
def test_the_calibration_error_is_that_of_the_formula_with_and_without_temperature(
    seed: int, classes: int, rows: int
) -> None:
    draw = np.random.default_rng(seed)
    label, logit = draw.integers(0, classes, rows), draw.normal(size=(rows, classes))
    result = evaluate(logit, label, _names(classes), temperature=2.0)
    right = logit.argmax(1) == label
    for name, fitted in (("ece", 2.0), ("ece_uncalibrated", 1.0)):
        sure = _softmax(logit / fitted).max(1)
        assert result[name] == pytest.approx(_ece_by_hand(sure, right), abs=1e-9)
    assert 0 <= result["ece_low"] <= result["ece"] <= result["ece_high"] <= 1


def test_equal_confidences_share_a_bin_whatever_their_order() -> None:
    sure, right = np.full(600, 0.75), np.arange(600) < 450
    assert calibration_error(sure, right)[0] == pytest.approx(0)
    assert calibration_error(sure[::-1], right[::-1])[0] == pytest.approx(0)


def test_the_interval_of_the_calibration_error_holds_that_of_many_more_images() -> None:
    logit, label = (part.numpy() for part in _logits(40_000, 4, 3.0))
    right, sure = logit.argmax(1) == label, _softmax(logit).max(1)
    true = calibration_error(sure, right)[0]
    inside = 0
    for first in range(0, 40_000, 500):
        _, low, high = calibration_error(sure[first : first + 500], right[first : first + 500])
        inside += low <= true <= high
    assert inside >= 72  # of 80


def test_a_fitted_temperature_mends_the_calibration_error_of_a_head_that_is_too_sure() -> None:
    logit, label = (part.numpy() for part in _logits(5000, 4, 4.0))
    fitted = fit_temperature(torch.from_numpy(logit), torch.from_numpy(label))
    result = evaluate(logit, label, _names(4), temperature=fitted)
    assert result["ece_uncalibrated"] > 0.1
    assert result["ece"] < 0.03


def test_many_rows_of_many_classes_give_the_same_figures_as_all_at_once() -> None:
    """More than one slice of rows, and of classes."""
    draw = np.random.default_rng(3)
    logit = draw.normal(size=(60_000, 80)).astype(np.float16)
    label = draw.integers(0, 80, 60_000)
    logit[np.arange(60_000), label] += 2
    result = evaluate(logit, label, _names(80), temperature=0.5)
    wide = torch.from_numpy(logit).double()
    nats = torch.nn.functional.cross_entropy(wide, torch.from_numpy(label))
    assert result["loss"] == pytest.approx(nats.item())
    assert result["accuracy"] == (logit.argmax(1) == label).mean()
    chance = (wide / 0.5).softmax(1).numpy()
    areas = [sk.roc_auc_score(label == one, chance[:, one]) for one in range(80)]
    assert result["auroc"] == pytest.approx(np.mean(areas))
    hot = (draw.random((60_000, 80)) < 0.1).astype(np.uint8)
    several = evaluate(logit, hot, _names(80))
    nats = torch.nn.functional.binary_cross_entropy_with_logits(
        wide, torch.from_numpy(hot).double()
    )
    assert several["loss"] == pytest.approx(nats.item())
    assert [line["images"] for line in several["per_class"].values()] == hot.sum(0).tolist()
    assert several["f2_samples"] == pytest.approx(
        sk.fbeta_score(hot, logit >= 0, beta=2, average="samples", zero_division=0)
    )


# --------------------------------------------------------------- several labels per image


def _several(seed: int, labels: int, *, ties: bool = False) -> tuple[NDArray[Any], NDArray[Any]]:
    """Logits float32 (N, C), better than chance, and labels uint8 (N, C), some rare, some none."""
    draw = np.random.default_rng(seed)
    rows = int(draw.integers(2, 60))
    label_NC = (draw.random((rows, labels)) < draw.random(labels)).astype(np.uint8)
    logit_NC = (draw.normal(size=label_NC.shape) + 2.0 * label_NC - 1).astype(np.float32)
    return (np.round(logit_NC) if ties else logit_NC), label_NC


@given(SEEDS, st.integers(1, 6), st.booleans(), st.sampled_from([1.0, 0.4]))
@settings(deadline=None)
def test_figures_of_several_labels_are_those_of_scikit_learn(
    seed: int, labels: int, ties: bool, fitted: float
) -> None:
    logit, label = _several(seed, labels, ties=ties)
    cut = np.random.default_rng(seed).random(labels)
    result = evaluate(logit, label, _names(labels), temperature=fitted, thresholds=cut)
    chance = torch.from_numpy(logit).sigmoid().double().numpy()
    passed = ((torch.from_numpy(logit) / fitted).sigmoid().numpy() >= cut).astype(np.uint8)
    assert result["images"] == len(label)
    nats = sk.log_loss(label.ravel(), chance.ravel(), labels=[0, 1])
    assert result["loss"] == pytest.approx(nats, rel=1e-5)
    assert result["accuracy_at_thresholds"] == pytest.approx((passed == label).mean())
    assert result["accuracy"] == pytest.approx(((logit >= 0) == label).mean())
    for beta in (1, 2):
        for average in ("samples", "macro"):
            if labels == 1:  # scikit-learn takes one column for a plain yes or no
                continue
            score = sk.fbeta_score(label, passed, beta=beta, average=average, zero_division=0)
            assert result[f"f{beta}_{average}"] == pytest.approx(score)
    some = [one for one in range(labels) if label[:, one].sum() > 0]
    both = [one for one in some if label[:, one].sum() < len(label)]
    areas = [sk.roc_auc_score(label[:, one], logit[:, one]) for one in both]
    assert result["auroc"] == (pytest.approx(np.mean(areas)) if areas else None)
    context = [sk.average_precision_score(label[:, one], logit[:, one]) for one in some]
    assert result["mean_average_precision"] == (
        pytest.approx(np.mean(context)) if context else None
    )
    for one, line in enumerate(result["per_class"].values()):
        figures = sk.precision_recall_fscore_support(
            label[:, one], passed[:, one], average="binary", zero_division=0
        )
        assert [line["precision"], line["recall"], line["f1"]] == pytest.approx(figures[:3])
        assert (line["threshold"], line["images"]) == (cut[one], label[:, one].sum())


def test_without_thresholds_a_label_is_given_at_one_half() -> None:
    logit = np.array([[0.0, -0.1], [0.1, 3.0]], np.float32)
    label = np.array([[1, 0], [1, 1]], np.uint8)
    result = evaluate(logit, label, ["a", "b"])
    assert result["accuracy"] == result["accuracy_at_thresholds"] == 1.0
    assert [line["threshold"] for line in result["per_class"].values()] == [0.5, 0.5]


def _f_beta(label: NDArray[Any], passed: NDArray[Any], beta: float) -> float:
    right, missed = (label & passed).sum(), (label & ~passed).sum()
    wrong, weight = (~label & passed).sum(), beta**2
    return float((1 + weight) * right / ((1 + weight) * right + weight * missed + wrong))


@given(SEEDS, st.sampled_from([0.5, 1.0, 2.0]), st.booleans(), st.sampled_from(["f4", "f8"]))
@settings(deadline=None)
def test_no_threshold_is_better_and_no_higher_one_as_good(
    seed: int, beta: float, ties: bool, kind: str
) -> None:
    logit, label = _several(seed, 3, ties=ties)
    chance = (1 / (1 + np.exp(-logit.astype(np.float64)))).astype(kind)
    result = fit_thresholds(chance, label, beta)
    for column, mine, cut in zip(chance.T, label.T == 1, result, strict=True):
        if not mine.any():
            assert cut == 0.5
            continue
        best = _f_beta(mine, column >= cut, beta)
        for other in np.unique(column).astype(np.float64):
            score = _f_beta(mine, column >= other, beta)
            assert score < best + 1e-12
            if other > cut and not ((column >= cut) == (column >= other)).all():
                assert score < best - 1e-12


def test_a_threshold_stands_in_the_middle_of_a_gap_so_last_bits_change_no_label() -> None:
    chance = np.array([[0.9], [0.7], [0.3], [0.1]], np.float32)
    label = np.array([[1], [1], [0], [0]], np.uint8)
    assert fit_thresholds(chance, label)[0] == pytest.approx(0.5)
    assert fit_thresholds(chance[:2], label[:2])[0] == pytest.approx(0.35)  # nothing below but 0


@pytest.mark.parametrize("low", [0.5, np.nextafter(0.5, 0), np.nextafter(0.5, 1)])
def test_probabilities_that_touch_are_parted_all_the_same(low: float) -> None:
    high = np.nextafter(low, 1)
    cut = fit_thresholds(np.array([[high], [low]]), np.array([[1], [0]], np.uint8))[0]
    assert low < cut <= high


def test_a_tuned_threshold_gains_over_one_half_on_the_rows_it_was_tuned_on() -> None:
    draw = np.random.default_rng(0)
    label = (draw.random((2000, 4)) < 0.05).astype(np.uint8)
    logit = draw.normal(size=label.shape) + 2.0 * label - 3
    cut = fit_thresholds(1 / (1 + np.exp(-logit)), label)
    plain, tuned = (evaluate(logit, label, _names(4), thresholds=at) for at in (None, cut))
    assert tuned["f2_macro"] > plain["f2_macro"] + 0.1


# -------------------------------------------------------------------- what is not defined


def _undefined(found: dict[str, Any]) -> set[str]:
    json.dumps(found, allow_nan=False)
    return {name for name, value in found.items() if value is None}


def test_figures_that_are_not_defined_are_none_and_all_of_it_is_json() -> None:
    right = np.eye(3, dtype=np.float32)[[1, 1]]
    assert _undefined(evaluate(right, np.array([1, 1]), _names(3))) == {"auroc"}
    nobody = evaluate(np.zeros((0, 3), np.float32), np.zeros(0, np.int64), _names(3))
    assert nobody["images"] == 0
    ratios = {"loss", "accuracy", "balanced_accuracy", "auroc"}
    ratios |= {"ece", "ece_low", "ece_high", "ece_uncalibrated"}
    assert _undefined(nobody) == ratios
    none = np.zeros((4, 3), np.uint8)
    figures = evaluate(np.zeros((4, 3), np.float32), none, _names(3))
    assert _undefined(figures) == {"auroc", "mean_average_precision"}
    assert (figures["f2_samples"], figures["accuracy"]) == (0, 0)
    assert figures["accuracy_at_thresholds"] == 0
    assert "loss" in _undefined(evaluate(np.zeros((0, 3)), none[:0], _names(3)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_head_that_diverged_gives_none_not_a_crash(bad: float) -> None:
    logit = np.array([[0.0, 1, 2], [bad, 0, 1], [2, 1, 0]], np.float32)
    result = evaluate(logit, np.array([2, 0, 0]), _names(3))
    assert _undefined(result) >= {"loss"}
    result = evaluate(logit, np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1]], np.uint8), _names(3))
    json.dumps(result, allow_nan=False)
    assert np.isfinite(fit_thresholds(logit, np.ones((3, 3), np.uint8))).all()
    assert fit_temperature(torch.from_numpy(logit), torch.tensor([2, 0, 0])) == 1


# --------------------------------------------------------------------------- temperature


def _logits(rows: int, classes: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `scale` times too sure of labels that were drawn from them."""
    draw = torch.Generator().manual_seed(0)
    honest = 2 * torch.randn(rows, classes, generator=draw)
    label = torch.multinomial(honest.softmax(1), 1, generator=draw)[:, 0]
    return honest * scale, label


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("scale", [0.25, 1.0, 3.0])
def test_the_temperature_recovers_a_known_scale(scale: float, classes: int) -> None:
    result = fit_temperature(*_logits(20_000, classes, scale))
    assert result == pytest.approx(scale, rel=0.05)


def test_the_temperature_lowers_the_loss_and_keeps_every_guess() -> None:
    logit, label = _logits(500, 3, 4.0)
    cooled = logit / fit_temperature(logit, label)
    loss = torch.nn.functional.cross_entropy
    assert loss(cooled, label) < loss(logit, label)
    assert torch.equal(cooled.argmax(1), logit.argmax(1))


def test_rows_that_are_all_right_or_few_do_not_run_to_the_border() -> None:
    right = 5 * torch.eye(3).repeat(20, 1)
    assert 0.06 < fit_temperature(right, torch.arange(3).repeat(20)) < 19
    assert 0.06 < fit_temperature(right[:1], torch.tensor([0])) < 19
    # Twice as sure means twice the temperature: the minimum is real, no plateau of rounding.
    once, twice = (fit_temperature(sure * right, torch.arange(3).repeat(20)) for sure in (0.2, 0.4))
    assert twice == pytest.approx(2 * once, rel=0.01)


def test_float16_logits_as_large_as_they_get_still_give_a_temperature() -> None:
    logit = torch.tensor([[60000.0, -60000.0], [-60000.0, 60000.0]], dtype=torch.float16)
    assert 0.05 <= fit_temperature(logit, torch.tensor([0, 1])) <= 20


def test_the_temperature_is_the_minimum_of_what_it_says_it_minimizes() -> None:
    logit, label = _logits(300, 4, 3.0)
    wide = logit.double()

    def nats(fitted: float) -> float:
        chance = (wide / fitted).log_softmax(1)
        own = torch.nn.functional.nll_loss(chance, label, reduction="sum")
        return float(own - 0.5 * chance.mean(0).sum())

    result = fit_temperature(logit, label)
    assert nats(result) < min(nats(result * (1 - 1e-4)), nats(result * (1 + 1e-4)))


@pytest.mark.parametrize("scale", [0.25, 1.0, 3.0])
def test_the_temperature_of_several_labels_recovers_a_known_scale(scale: float) -> None:
    draw = torch.Generator().manual_seed(0)
    honest = 2 * torch.randn(5000, 6, generator=draw) - 1
    label = torch.bernoulli(honest.sigmoid(), generator=draw).to(torch.uint8)
    result = fit_temperature(honest * scale, label)
    assert result == pytest.approx(scale, rel=0.05)
    wide, half = (honest * scale).double(), label.double()

    def nats(fitted: float) -> float:
        loss = torch.nn.functional.binary_cross_entropy_with_logits
        spread = sum(loss(wide / fitted, torch.full_like(half, one)) for one in (0.0, 1.0))
        return float(loss(wide / fitted, half, reduction="sum") + 0.5 * spread * 6)

    assert nats(result) < min(nats(result * (1 - 1e-4)), nats(result * (1 + 1e-4)))


def test_several_labels_that_are_all_right_do_not_run_to_the_border() -> None:
    label = (torch.arange(20)[:, None] % torch.tensor([2, 3, 5]) == 0).to(torch.uint8)
    sure = 5.0 * (2 * label.float() - 1)
    once, twice = fit_temperature(sure, label), fit_temperature(2 * sure, label)
    assert 0.06 < once < 19
    assert twice == pytest.approx(2 * once, rel=1e-6)


def test_logits_that_say_nothing_keep_their_temperature() -> None:
    assert fit_temperature(torch.zeros(5, 3), torch.zeros(5, dtype=torch.int64)) == 1
    assert fit_temperature(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)) == 1
    assert fit_temperature(torch.zeros(5, 3), torch.zeros(5, 3, dtype=torch.uint8)) == 1
