"""Metrics equal scikit-learn or their own formula; thresholds and temperatures are optimal."""

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


def test_confusion_matrix_has_labels_in_rows_and_predictions_in_columns() -> None:
    label, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 0, 1])
    assert confusion_matrix(label, predicted, 4).tolist() == [
        [1, 2, 0, 0],
        [1, 1, 0, 0],
        [0, 1, 0, 0],
        [0, 0, 0, 0],
    ]


def test_per_class_metrics_match_a_hand_computed_example() -> None:
    counts = np.array([[1, 2, 0], [1, 1, 0], [0, 1, 0]])
    assert per_class_metrics(counts, ["ant", "bee", "cat"]) == {
        "ant": {"precision": 1 / 2, "recall": 1 / 3, "f1": 2 / 5, "images": 3},
        "bee": {"precision": 1 / 4, "recall": 1 / 2, "f1": 1 / 3, "images": 2},
        "cat": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "images": 1},  # never predicted
    }


def test_class_table_sorts_worst_first_and_classes_without_images_last() -> None:
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
    counts = np.diag([1, 2, 3])
    short = class_table(per_class_metrics(counts, ["a" * 60, "b" * 30, "c"]), most=2)
    assert [line.split()[0] for line in short[1:3]] == ["a" * 39 + "…", "b" * 30]
    assert short[3] == "…  the 2 classes with the lowest F1 of 3"


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=60))
@settings(deadline=None)
def test_confusion_matrix_counts_every_row_once(pairs: list[tuple[int, int]]) -> None:
    label, predicted = np.array(pairs, np.int64).reshape(-1, 2).T
    counts = confusion_matrix(label, predicted, 5)
    assert counts.sum() == len(pairs)
    assert np.diag(counts).sum() == (label == predicted).sum()


# ------------------------------------------------------------------- one label per image


def _single_label_data(
    seed: int, classes: int, *, ties: bool = False
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Logits float32 (N, C), better than chance, and labels int64 (N,)."""
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(2, 80))
    label_N = rng.integers(0, classes, rows)
    logit_NC = rng.normal(size=(rows, classes)).astype(np.float32)
    logit_NC[np.arange(rows), label_N] += 1
    return (np.round(2 * logit_NC) if ties else logit_NC), label_N


def _class_names(count: int) -> list[str]:
    return [f"class {number}" for number in range(count)]


def _softmax(logit_NC: NDArray[Any]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = torch.from_numpy(logit_NC).double().softmax(1).numpy()
    return result


@given(SEEDS, st.sampled_from([2, 3, 6, 9]))
@settings(deadline=None)
def test_single_label_metrics_equal_scikit_learn(seed: int, classes: int) -> None:
    logit, label = _single_label_data(seed, classes)
    result = evaluate(logit, label, _class_names(classes))
    class_ids, predicted, present = np.arange(classes), logit.argmax(1), np.unique(label)
    assert result["images"] == len(label)
    assert result["loss"] == pytest.approx(sk.log_loss(label, _softmax(logit), labels=class_ids))
    assert result["accuracy"] == pytest.approx(sk.accuracy_score(label, predicted))
    mean_recall = sk.recall_score(
        label, predicted, labels=present, average="macro", zero_division=0
    )
    assert result["balanced_accuracy"] == pytest.approx(mean_recall)
    assert result["confusion"] == sk.confusion_matrix(label, predicted, labels=class_ids).tolist()
    if classes > 5:
        top = sk.top_k_accuracy_score(label, logit, k=5, labels=class_ids)
        assert result["top_5_accuracy"] == pytest.approx(top)
    else:
        assert "top_5_accuracy" not in result
    columns = sk.precision_recall_fscore_support(
        label, predicted, labels=class_ids, zero_division=0
    )
    rows = zip(*columns, strict=True)
    for metrics, (precision, recall, f1, images) in zip(
        result["per_class"].values(), rows, strict=True
    ):
        assert metrics == pytest.approx(
            {"precision": precision, "recall": recall, "f1": f1, "images": images}
        )


@given(SEEDS, st.booleans())
@settings(deadline=None)
def test_binary_auroc_is_that_of_the_second_class_including_ties(seed: int, ties: bool) -> None:
    logit, label = _single_label_data(seed, 2, ties=ties)
    result = evaluate(logit, label, ["no", "yes"])["auroc"]
    if len(np.unique(label)) < 2:
        assert result is None
    else:
        margin = logit[:, 1].astype(np.float64) - logit[:, 0]
        assert result == pytest.approx(sk.roc_auc_score(label, margin))


@given(SEEDS, st.sampled_from([3, 8]), st.sampled_from([1.0, 2.5]))
@settings(deadline=None)
def test_multiclass_auroc_is_the_mean_over_classes_present(
    seed: int, classes: int, fitted: float
) -> None:
    logit, label = _single_label_data(seed, classes)
    result = evaluate(logit, label, _class_names(classes), temperature=fitted)["auroc"]
    present = np.unique(label)
    if len(present) < 2:
        assert result is None
        return
    prob = _softmax(logit / fitted)
    aurocs = [sk.roc_auc_score(label == class_id, prob[:, class_id]) for class_id in present]
    assert result == pytest.approx(np.mean(aurocs))


def test_tied_logits_predict_the_first_class_as_in_scores() -> None:
    label = np.array([0, 1, 4, 5, 6, 6, 6])
    result = evaluate(np.zeros((7, 7), np.float32), label, _class_names(7))
    assert result["accuracy"] == pytest.approx(1 / 7)
    assert result["top_5_accuracy"] == pytest.approx(3 / 7)


def _reference_ece(confidence: NDArray[Any], correct: NDArray[Any]) -> float:
    """Guo et al., equation 3, over bins of equal numbers of images."""
    order = np.argsort(confidence)
    bins = np.array_split(order, max(1, min(15, len(confidence) // 20)))
    return sum(abs(correct[members].sum() - confidence[members].sum()) for members in bins) / len(
        confidence
    )


@given(SEEDS, st.sampled_from([2, 4]), st.sampled_from([10, 60, 300, 900]))
@settings(deadline=None, max_examples=40)
def test_calibration_error_matches_its_formula_with_and_without_temperature(
    seed: int, classes: int, rows: int
) -> None:
    rng = np.random.default_rng(seed)
    label, logit = rng.integers(0, classes, rows), rng.normal(size=(rows, classes))
    result = evaluate(logit, label, _class_names(classes), temperature=2.0)
    correct = logit.argmax(1) == label
    for name, temperature in (("ece", 2.0), ("ece_uncalibrated", 1.0)):
        confidence = _softmax(logit / temperature).max(1)
        assert result[name] == pytest.approx(_reference_ece(confidence, correct), abs=1e-9)
    assert 0 <= result["ece_low"] <= result["ece"] <= result["ece_high"] <= 1


def test_equal_confidences_share_a_bin_whatever_their_order() -> None:
    confidence, correct = np.full(600, 0.75), np.arange(600) < 450
    assert calibration_error(confidence, correct)[0] == pytest.approx(0)
    assert calibration_error(confidence[::-1], correct[::-1])[0] == pytest.approx(0)


def test_calibration_error_interval_covers_the_value_of_a_large_sample() -> None:
    logit, label = (part.numpy() for part in _scaled_logits(40_000, 4, 3.0))
    correct, confidence = logit.argmax(1) == label, _softmax(logit).max(1)
    full_sample_ece = calibration_error(confidence, correct)[0]
    inside = 0
    for first in range(0, 40_000, 500):
        _, low, high = calibration_error(
            confidence[first : first + 500], correct[first : first + 500]
        )
        inside += low <= full_sample_ece <= high
    assert inside >= 72  # of 80


def test_fitted_temperature_reduces_the_calibration_error_of_an_overconfident_head() -> None:
    logit, label = (part.numpy() for part in _scaled_logits(5000, 4, 4.0))
    temperature = fit_temperature(torch.from_numpy(logit), torch.from_numpy(label))
    result = evaluate(logit, label, _class_names(4), temperature=temperature)
    assert result["ece_uncalibrated"] > 0.1
    assert result["ece"] < 0.03


def test_metrics_computed_in_slices_equal_those_computed_at_once() -> None:
    """Enough rows and classes that both are processed in more than one slice."""
    rng = np.random.default_rng(3)
    logit = rng.normal(size=(60_000, 80)).astype(np.float16)
    label = rng.integers(0, 80, 60_000)
    logit[np.arange(60_000), label] += 2
    result = evaluate(logit, label, _class_names(80), temperature=0.5)
    logit64 = torch.from_numpy(logit).double()
    expected_loss = torch.nn.functional.cross_entropy(logit64, torch.from_numpy(label))
    assert result["loss"] == pytest.approx(expected_loss.item())
    assert result["accuracy"] == (logit.argmax(1) == label).mean()
    prob = (logit64 / 0.5).softmax(1).numpy()
    aurocs = [sk.roc_auc_score(label == class_id, prob[:, class_id]) for class_id in range(80)]
    assert result["auroc"] == pytest.approx(np.mean(aurocs))
    multi_hot = (rng.random((60_000, 80)) < 0.1).astype(np.uint8)
    multi_label = evaluate(logit, multi_hot, _class_names(80))
    expected_loss = torch.nn.functional.binary_cross_entropy_with_logits(
        logit64, torch.from_numpy(multi_hot).double()
    )
    assert multi_label["loss"] == pytest.approx(expected_loss.item())
    assert [metrics["images"] for metrics in multi_label["per_class"].values()] == multi_hot.sum(
        0
    ).tolist()
    assert multi_label["f2_samples"] == pytest.approx(
        sk.fbeta_score(multi_hot, logit >= 0, beta=2, average="samples", zero_division=0)
    )


# --------------------------------------------------------------- several labels per image


def _multi_label_data(
    seed: int, labels: int, *, ties: bool = False
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Logits float32 (N, C), better than chance, and labels uint8 (N, C), some rare, some none."""
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(2, 60))
    label_NC = (rng.random((rows, labels)) < rng.random(labels)).astype(np.uint8)
    logit_NC = (rng.normal(size=label_NC.shape) + 2.0 * label_NC - 1).astype(np.float32)
    return (np.round(logit_NC) if ties else logit_NC), label_NC


@given(SEEDS, st.integers(1, 6), st.booleans(), st.sampled_from([1.0, 0.4]))
@settings(deadline=None)
def test_multi_label_metrics_equal_scikit_learn(
    seed: int, labels: int, ties: bool, fitted: float
) -> None:
    logit, label = _multi_label_data(seed, labels, ties=ties)
    threshold = np.random.default_rng(seed).random(labels)
    result = evaluate(logit, label, _class_names(labels), temperature=fitted, thresholds=threshold)
    prob = torch.from_numpy(logit).sigmoid().double().numpy()
    predicted = ((torch.from_numpy(logit) / fitted).sigmoid().numpy() >= threshold).astype(np.uint8)
    assert result["images"] == len(label)
    expected_loss = sk.log_loss(label.ravel(), prob.ravel(), labels=[0, 1])
    assert result["loss"] == pytest.approx(expected_loss, rel=1e-5)
    assert result["accuracy_at_thresholds"] == pytest.approx((predicted == label).mean())
    assert result["accuracy"] == pytest.approx(((logit >= 0) == label).mean())
    for beta in (1, 2):
        for average in ("samples", "macro"):
            if labels == 1:  # scikit-learn reads one column as binary labels
                continue
            score = sk.fbeta_score(label, predicted, beta=beta, average=average, zero_division=0)
            assert result[f"f{beta}_{average}"] == pytest.approx(score)
    present = [class_id for class_id in range(labels) if label[:, class_id].sum() > 0]
    mixed = [class_id for class_id in present if label[:, class_id].sum() < len(label)]
    aurocs = [sk.roc_auc_score(label[:, class_id], logit[:, class_id]) for class_id in mixed]
    assert result["auroc"] == (pytest.approx(np.mean(aurocs)) if aurocs else None)
    average_precisions = [
        sk.average_precision_score(label[:, class_id], logit[:, class_id]) for class_id in present
    ]
    assert result["mean_average_precision"] == (
        pytest.approx(np.mean(average_precisions)) if average_precisions else None
    )
    for class_id, metrics in enumerate(result["per_class"].values()):
        expected = sk.precision_recall_fscore_support(
            label[:, class_id], predicted[:, class_id], average="binary", zero_division=0
        )
        assert [metrics["precision"], metrics["recall"], metrics["f1"]] == pytest.approx(
            expected[:3]
        )
        assert (metrics["threshold"], metrics["images"]) == (
            threshold[class_id],
            label[:, class_id].sum(),
        )


def test_default_threshold_is_one_half() -> None:
    logit = np.array([[0.0, -0.1], [0.1, 3.0]], np.float32)
    label = np.array([[1, 0], [1, 1]], np.uint8)
    result = evaluate(logit, label, ["a", "b"])
    assert result["accuracy"] == result["accuracy_at_thresholds"] == 1.0
    assert [line["threshold"] for line in result["per_class"].values()] == [0.5, 0.5]


def _f_beta(label: NDArray[Any], predicted: NDArray[Any], beta: float) -> float:
    true_positives, false_negatives = (label & predicted).sum(), (label & ~predicted).sum()
    false_positives, weight = (~label & predicted).sum(), beta**2
    return float(
        (1 + weight)
        * true_positives
        / ((1 + weight) * true_positives + weight * false_negatives + false_positives)
    )


@given(SEEDS, st.sampled_from([0.5, 1.0, 2.0]), st.booleans(), st.sampled_from(["f4", "f8"]))
@settings(deadline=None)
def test_fitted_threshold_is_the_highest_of_the_optimal_ones(
    seed: int, beta: float, ties: bool, kind: str
) -> None:
    logit, label = _multi_label_data(seed, 3, ties=ties)
    prob = (1 / (1 + np.exp(-logit.astype(np.float64)))).astype(kind)
    result = fit_thresholds(prob, label, beta)
    for column, positive, threshold in zip(prob.T, label.T == 1, result, strict=True):
        if not positive.any():
            assert threshold == 0.5
            continue
        best = _f_beta(positive, column >= threshold, beta)
        for other in np.unique(column).astype(np.float64):
            score = _f_beta(positive, column >= other, beta)
            assert score < best + 1e-12
            if other > threshold and not ((column >= threshold) == (column >= other)).all():
                assert score < best - 1e-12


def test_threshold_lies_midway_in_a_gap_so_rounding_changes_no_label() -> None:
    prob = np.array([[0.9], [0.7], [0.3], [0.1]], np.float32)
    label = np.array([[1], [1], [0], [0]], np.uint8)
    assert fit_thresholds(prob, label)[0] == pytest.approx(0.5)
    assert fit_thresholds(prob[:2], label[:2])[0] == pytest.approx(0.35)  # the lower neighbour is 0


@pytest.mark.parametrize("low", [0.5, np.nextafter(0.5, 0), np.nextafter(0.5, 1)])
def test_threshold_separates_adjacent_floating_point_probabilities(low: float) -> None:
    high = np.nextafter(low, 1)
    threshold = fit_thresholds(np.array([[high], [low]]), np.array([[1], [0]], np.uint8))[0]
    assert low < threshold <= high


def test_tuned_threshold_beats_one_half_on_the_rows_it_was_tuned_on() -> None:
    rng = np.random.default_rng(0)
    label = (rng.random((2000, 4)) < 0.05).astype(np.uint8)
    logit = rng.normal(size=label.shape) + 2.0 * label - 3
    threshold = fit_thresholds(1 / (1 + np.exp(-logit)), label)
    plain, tuned = (
        evaluate(logit, label, _class_names(4), thresholds=at) for at in (None, threshold)
    )
    assert tuned["f2_macro"] > plain["f2_macro"] + 0.1


# -------------------------------------------------------------------- what is not defined


def _undefined_metrics(metrics: dict[str, Any]) -> set[str]:
    json.dumps(metrics, allow_nan=False)
    return {name for name, value in metrics.items() if value is None}


def test_undefined_metrics_are_none_and_the_result_is_valid_json() -> None:
    correct = np.eye(3, dtype=np.float32)[[1, 1]]
    assert _undefined_metrics(evaluate(correct, np.array([1, 1]), _class_names(3))) == {"auroc"}
    empty = evaluate(np.zeros((0, 3), np.float32), np.zeros(0, np.int64), _class_names(3))
    assert empty["images"] == 0
    ratios = {"loss", "accuracy", "balanced_accuracy", "auroc"}
    ratios |= {"ece", "ece_low", "ece_high", "ece_uncalibrated"}
    assert _undefined_metrics(empty) == ratios
    none = np.zeros((4, 3), np.uint8)
    all_negative = evaluate(np.zeros((4, 3), np.float32), none, _class_names(3))
    assert _undefined_metrics(all_negative) == {"auroc", "mean_average_precision"}
    assert (all_negative["f2_samples"], all_negative["accuracy"]) == (0, 0)
    assert all_negative["accuracy_at_thresholds"] == 0
    assert "loss" in _undefined_metrics(evaluate(np.zeros((0, 3)), none[:0], _class_names(3)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_diverged_head_gives_none_instead_of_a_crash(bad: float) -> None:
    logit = np.array([[0.0, 1, 2], [bad, 0, 1], [2, 1, 0]], np.float32)
    result = evaluate(logit, np.array([2, 0, 0]), _class_names(3))
    assert _undefined_metrics(result) >= {"loss"}
    result = evaluate(logit, np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1]], np.uint8), _class_names(3))
    json.dumps(result, allow_nan=False)
    assert np.isfinite(fit_thresholds(logit, np.ones((3, 3), np.uint8))).all()
    assert fit_temperature(torch.from_numpy(logit), torch.tensor([2, 0, 0])) == 1


# --------------------------------------------------------------------------- temperature


def _scaled_logits(rows: int, classes: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are `scale` times as large as those that the labels were drawn from."""
    rng = torch.Generator().manual_seed(0)
    calibrated = 2 * torch.randn(rows, classes, generator=rng)
    label = torch.multinomial(calibrated.softmax(1), 1, generator=rng)[:, 0]
    return calibrated * scale, label


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("scale", [0.25, 1.0, 3.0])
def test_temperature_recovers_a_known_scale(scale: float, classes: int) -> None:
    result = fit_temperature(*_scaled_logits(20_000, classes, scale))
    assert result == pytest.approx(scale, rel=0.05)


def test_temperature_lowers_the_loss_and_keeps_every_prediction() -> None:
    logit, label = _scaled_logits(500, 3, 4.0)
    scaled = logit / fit_temperature(logit, label)
    loss = torch.nn.functional.cross_entropy
    assert loss(scaled, label) < loss(logit, label)
    assert torch.equal(scaled.argmax(1), logit.argmax(1))


def test_temperature_stays_off_its_bounds_when_all_rows_are_correct_or_few() -> None:
    correct = 5 * torch.eye(3).repeat(20, 1)
    assert 0.06 < fit_temperature(correct, torch.arange(3).repeat(20)) < 19
    assert 0.06 < fit_temperature(correct[:1], torch.tensor([0])) < 19
    # Logits twice as large need twice the temperature: a real minimum, not a plateau of rounding.
    once, twice = (
        fit_temperature(scale * correct, torch.arange(3).repeat(20)) for scale in (0.2, 0.4)
    )
    assert twice == pytest.approx(2 * once, rel=0.01)


def test_extreme_float16_logits_give_a_temperature() -> None:
    logit = torch.tensor([[60000.0, -60000.0], [-60000.0, 60000.0]], dtype=torch.float16)
    assert 0.05 <= fit_temperature(logit, torch.tensor([0, 1])) <= 20


def test_temperature_minimizes_its_documented_loss() -> None:
    logit, label = _scaled_logits(300, 4, 3.0)
    logit64 = logit.double()

    def objective(temperature: float) -> float:
        log_prob = (logit64 / temperature).log_softmax(1)
        data_loss = torch.nn.functional.nll_loss(log_prob, label, reduction="sum")
        return float(data_loss - 0.5 * log_prob.mean(0).sum())

    result = fit_temperature(logit, label)
    assert objective(result) < min(objective(result * (1 - 1e-4)), objective(result * (1 + 1e-4)))


@pytest.mark.parametrize("scale", [0.25, 1.0, 3.0])
def test_multi_label_temperature_recovers_a_known_scale(scale: float) -> None:
    rng = torch.Generator().manual_seed(0)
    calibrated = 2 * torch.randn(5000, 6, generator=rng) - 1
    label = torch.bernoulli(calibrated.sigmoid(), generator=rng).to(torch.uint8)
    result = fit_temperature(calibrated * scale, label)
    assert result == pytest.approx(scale, rel=0.05)
    logit64, label64 = (calibrated * scale).double(), label.double()

    def objective(temperature: float) -> float:
        loss = torch.nn.functional.binary_cross_entropy_with_logits
        regularizer = sum(
            loss(logit64 / temperature, torch.full_like(label64, target)) for target in (0.0, 1.0)
        )
        return float(loss(logit64 / temperature, label64, reduction="sum") + 0.5 * regularizer * 6)

    assert objective(result) < min(objective(result * (1 - 1e-4)), objective(result * (1 + 1e-4)))


def test_multi_label_temperature_stays_off_its_bounds_when_all_labels_are_correct() -> None:
    label = (torch.arange(20)[:, None] % torch.tensor([2, 3, 5]) == 0).to(torch.uint8)
    logit = 5.0 * (2 * label.float() - 1)
    once, twice = fit_temperature(logit, label), fit_temperature(2 * logit, label)
    assert 0.06 < once < 19
    assert twice == pytest.approx(2 * once, rel=1e-6)


def test_uninformative_logits_keep_temperature_one() -> None:
    assert fit_temperature(torch.zeros(5, 3), torch.zeros(5, dtype=torch.int64)) == 1
    assert fit_temperature(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)) == 1
    assert fit_temperature(torch.zeros(5, 3), torch.zeros(5, 3, dtype=torch.uint8)) == 1
