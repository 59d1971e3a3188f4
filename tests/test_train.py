"""Every head of a stack gets plain PyTorch's numbers, whatever trains beside it, however often it
was interrupted, and with any number of workers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from training_data import data_from_arrays, epoch_batches

from arrowhead import ConfigError
from arrowhead.training import heads, schedule, trainer
from arrowhead.training import losses as training_losses
from arrowhead.training.batches import BatchSampler, DistributedContext, choose_views
from arrowhead.training.config import TrainConfig, matmul_dtype, resolve_epochs, total_steps
from arrowhead.training.dataset import (
    Data,
    InMemoryFeatures,
    MemoryMappedFeatures,
    Trial,
    mean_and_std,
)
from arrowhead.training.heads import BatchSlice
from arrowhead.training.trainer import TrainedHead, Training, TrainingState, train, train_stack

KINDS = ["linear", "lesson"]
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
StopRule = Callable[[int, Sequence[int], Sequence[list[dict[str, float]]]], set[int]]

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------------------------- epochs


@pytest.mark.parametrize("images", [2, 145, 600, 20_000, 1_000_000])
def test_auto_epochs_give_enough_steps_for_any_number_of_images(images: int) -> None:
    config = resolve_epochs(TrainConfig(head="linear"), images)
    assert total_steps(config, images) >= 400
    assert config.total_epochs == max(5, -(-400 // -(-images // 64)))
    cycles = TrainConfig(head="linear", schedule="cosine", cycle_len=1, cycle_mult=2)
    assert resolve_epochs(cycles, images).total_epochs + 1 in [2**n for n in range(1, 12)]


def test_given_epochs_are_kept() -> None:
    assert resolve_epochs(TrainConfig(epochs=5), 145).epochs == 5


# ------------------------------------------------------------------------------------ toy data


def _toy_data(
    rows: int,
    *,
    width: int = 16,
    classes: int = 3,
    views: int = 1,
    separation: float = 1,
    multi: bool = False,
    device: str = "cpu",
) -> Data:
    """Gaussian clusters, `separation` standard deviations apart, the first the largest.

    A fifth of the rows is the validation split.
    """
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2 * classes, rows) % (classes + 1) % classes
    label[:classes] = range(classes)
    center = separation * rng.normal(size=(classes, 1, width)) / 2
    feature = (center[label] + rng.normal(size=(rows, views, width))).astype(np.float16)
    multi_hot = (label[:, None] == range(classes)) | (rng.random((rows, classes)) < 0.2)
    labels = multi_hot.astype(np.uint8) if multi else label
    split = max(rows * 4 // 5, classes)
    class_names = [f"class {n}" for n in range(classes)]
    return data_from_arrays(
        (feature[:split], labels[:split]), (feature[split:], labels[split:]), class_names, device
    )


def _config(**overrides: Any) -> TrainConfig:
    defaults = {"epochs": 3, "batch_size": 33, "schedule": "constant", "precision": "fp32"}
    return TrainConfig(**(defaults | overrides))


def _trial(data: Data, rate: float, *, rows: Any = None, **overrides: Any) -> Trial:
    train_rows = data.train if rows is None else rows
    return Trial(config=_config(**overrides), lr=rate, train=train_rows, valid=data.valid)


def _clean_features(data: Data, rows: NDArray[np.int64]) -> Tensor:
    """View 0, float32 (n, D)."""
    return data.feature.take(torch.from_numpy(rows * data.feature.shape[1])).float()


def _train_to_end(training: Training) -> list[TrainedHead]:
    while not training.finished:
        training.train_epoch()
    return training.trained_heads()


def _assert_close(actual: TrainedHead, expected: TrainedHead, tolerance: float) -> None:
    """Compare losses and weights, with nan equal to nan."""
    assert len(actual.epochs) == len(expected.epochs)
    for epoch, expected_epoch in zip(actual.epochs, expected.epochs, strict=True):
        for metric in ("train_loss", "valid_loss"):
            assert epoch[metric] == pytest.approx(
                expected_epoch[metric], rel=tolerance, nan_ok=True
            )
    for name, value in expected.state.items():
        scale = max(1, np.abs(np.nan_to_num(value)).max())  # large when the head diverged
        np.testing.assert_allclose(
            actual.state[name], value, rtol=tolerance, atol=tolerance * scale
        )


def _assert_identical(actual: TrainedHead, expected: TrainedHead) -> None:
    """Compare bit for bit."""
    assert json.dumps(actual.epochs) == json.dumps(expected.epochs)
    assert actual.epoch == expected.epoch
    for name, value in expected.state.items():
        assert actual.state[name].tobytes() == value.tobytes(), name


# -------------------------------------------------------------------------------- features


def test_memory_mapped_features_train_the_identical_head(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    parts: list[NDArray[np.float16]] = []
    for number, rows in enumerate((7, 1, 40, 12)):
        file = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
            tmp_path / f"{number}.npy", mode="w+", dtype=np.float16, shape=(rows, 2, 5)
        )
        file[:] = rng.normal(size=file.shape)
        parts.append(file)
    row = rng.permutation(60)[:50]
    label = torch.from_numpy(rng.integers(0, 2, 50))
    all_features = torch.from_numpy(np.concatenate(parts)[row])
    in_memory, mapped = (
        InMemoryFeatures(all_features),
        MemoryMappedFeatures(parts, row, torch.device("cpu")),
    )
    assert tuple(mapped.shape) == tuple(in_memory.shape) == (50, 2, 5)
    flat = torch.tensor([99, 0, 0, 3, 42])
    assert torch.equal(mapped.take(flat), in_memory.take(flat))
    assert torch.equal(mapped.take(flat), all_features.flatten(0, 1)[flat])
    result = []
    for feature in (in_memory, mapped):
        data = Data(
            feature=feature,
            label=label,
            key=np.arange(50).astype(np.uint64),
            train=np.arange(40),
            valid=np.arange(40, 50),
            classes=["a", "b"],
        ).check_trainable()
        result.append(train(data, _config(batch_size=7), 0.01))
    _assert_identical(result[1], result[0])


@given(st.integers(0, 2**32 - 1), st.integers(1, 6000), st.sampled_from([0.0, 1.0, 500.0, -3000.0]))
@settings(deadline=None, max_examples=20)
def test_standardization_uses_mean_and_std_of_view_0_of_the_given_rows(
    seed: int, count: int, far: float
) -> None:
    rng = np.random.default_rng(seed)
    feature = (far + 8 * rng.normal(size=(count + 5, 2, 3))).astype(np.float16)
    feature[:, 1] = np.nan
    feature[:, 0, 2] = 7
    rows = rng.permutation(count + 5)[:count]
    mean, std = mean_and_std(InMemoryFeatures(torch.from_numpy(feature)), rows)
    selected = feature[rows, 0].astype(np.float64)
    np.testing.assert_allclose(mean, selected.mean(0), rtol=1e-5, atol=1e-5)
    expected = selected.std(0) if count > 1 else np.ones(3)
    np.testing.assert_allclose(std[:2], expected[:2], rtol=1e-4)
    assert float(std[2]) == 1  # a constant column


def test_class_without_training_images_is_refused_by_name() -> None:
    feature = np.zeros((4, 1, 2), np.float16)
    label, no_rows = np.array([0, 2, 0, 2]), np.array([], np.int64)
    with pytest.raises(ConfigError, match="of bee"):
        data_from_arrays((feature, label), (feature, label), ["ant", "bee", "cat"])
    with pytest.raises(ConfigError, match="validation split has no readable image"):
        data_from_arrays((feature, label % 2 + label // 2), (feature[:0], no_rows), ["ant", "bee"])
    copies = Data(
        feature=InMemoryFeatures(torch.zeros(6, 1, 2)),
        label=torch.tensor([0, 0, 0, 1, 1, 1]),
        key=np.array([7, 7, 7, 8, 8, 8], np.uint64),
        train=np.arange(6),
        valid=no_rows,
        classes=["ant", "bee"],
    )
    with pytest.raises(ConfigError, match=r"copies of one image \(6 images, 2 different\)"):
        copies.check_trainable()
    multi_hot = np.array([[1, 0], [1, 0], [0, 0], [1, 0]], np.uint8)
    with pytest.raises(ConfigError, match="of bee"):
        data_from_arrays((feature, multi_hot), (feature, multi_hot), ["ant", "bee"])


# ------------------------------------------------------------------------ order and views


@given(st.integers(1, 500), st.integers(2, 70), st.integers(0, 5), st.integers(0, 5))
@settings(deadline=None)
def test_batches_cover_all_rows_once_and_are_never_of_size_one(
    rows: int, size: int, seed: int, epoch: int
) -> None:
    result = list(epoch_batches(rows, size, seed, epoch))
    assert sorted(np.concatenate(result).tolist()) == list(range(rows))
    assert all(len(batch) >= 2 for batch in result) or rows == 1
    assert all(len(batch) == size for batch in result[:-1])
    assert len(result[-1]) <= size + 1


def test_order_depends_only_on_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return list(np.concatenate(list(epoch_batches(100, 16, seed, epoch))))

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


@given(
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=30, unique=True),
    st.lists(st.integers(0, 2**64 - 1), max_size=30),
    st.integers(1, 9),
    st.integers(0, 9),
    st.integers(0, 9),
)
def test_added_images_do_not_change_the_views_of_others(
    images: list[int], more: list[int], views: int, seed: int, epoch: int
) -> None:
    few = choose_views(np.array(images, np.uint64), views, seed, epoch)
    many = choose_views(np.array([*more, *images[::-1]], np.uint64), views, seed, epoch)
    assert many[len(more) :].tolist() == few[::-1].tolist()
    assert ((few >= 0) & (few < views)).all()


@pytest.mark.parametrize("views", [2, 3, 4, 7])
@pytest.mark.parametrize("keys", ["in a row", "at random", "apart by a power of two"])
def test_views_are_uniform_and_independent_across_epochs(views: int, keys: str) -> None:
    count = 30_000
    key = {
        "in a row": np.arange(count).astype(np.uint64),
        "at random": np.random.default_rng(0).integers(0, 2**64, count, np.uint64),
        "apart by a power of two": np.arange(count).astype(np.uint64) << np.uint64(40),
    }[keys]
    for seed in range(5):
        pair = choose_views(key, views, seed, 4) * views + choose_views(key, views, seed, 5)
        observed, expected = np.bincount(pair, minlength=views**2), count / views**2
        chi_square, degrees_of_freedom, t = (
            ((observed - expected) ** 2 / expected).sum(),
            views**2 - 1,
            20,
        )
        # Laurent & Massart, Ann. Statist. 28 (2000), lemma 1: exceeded with probability e^-20.
        assert chi_square < degrees_of_freedom + 2 * np.sqrt(degrees_of_freedom * t) + 2 * t


def test_sampler_epoch_has_each_row_once_in_its_chosen_view() -> None:
    data = _toy_data(100, views=4)
    rows = data.train[3:60]
    sampler = BatchSampler(data, rows, 5, 8)
    for epoch in range(3):
        pairs = [
            sampler.batch(step)
            for step in range(
                epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch
            )
        ]
        flat, label = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])
        row, view = np.divmod(flat.numpy(), 4)
        order = np.concatenate(list(epoch_batches(len(rows), 8, 5, epoch)))
        assert row.tolist() == rows[order].tolist()
        assert view.tolist() == choose_views(data.key[row], 4, 5, epoch).tolist()
        assert torch.equal(label, data.label[row])
    fresh_sampler = BatchSampler(data, rows, 5, 8)  # a batch depends on its step number alone
    for step in (2 * sampler.steps_per_epoch + 3, 1):
        assert torch.equal(fresh_sampler.batch(step)[0], sampler.batch(step)[0])


# -------------------------------------------------------------------- plain PyTorch's numbers


class _FixedDropout(nn.Module):
    """Dropout with Arrowhead's mask."""

    def __init__(self, share: float, seed: int, layer: int) -> None:
        super().__init__()
        self.share, self.seed, self.layer, self.step = share, seed, layer, 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.share:
            return x
        folder = BatchSlice(self.step, 0, len(x))
        return x * heads.dropout_mask(self.seed, self.layer, folder, len(x), x.shape[1], self.share)


def _train_by_hand(
    data: Data, config: TrainConfig, rate: float
) -> tuple[nn.Sequential, list[float]]:
    """A plain PyTorch training: the head, and the mean training loss of each epoch."""
    feature, label = _clean_features(data, data.train), data.label[data.train]
    head = heads.build_head(config.head, feature.shape[1], len(data.classes), seed=config.seed)
    dropouts = []
    for at, part in enumerate(head):
        if isinstance(part, nn.Dropout):
            half = config.head == "lesson" and not dropouts
            dropouts.append(
                _FixedDropout(config.dropout / (2 if half else 1), config.seed, len(dropouts))
            )
            head[at] = dropouts[-1]
    if config.head == "linear":
        head[0].mean.copy_(feature.mean(0))
        head[0].deviation.copy_(feature.std(0, correction=0))
    options: dict[str, Any] = {"lr": rate, "weight_decay": config.weight_decay}
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(head.parameters(), **options)
        if config.optimizer == "adamw"
        else torch.optim.SGD(head.parameters(), momentum=config.momentum, **options)
    )
    weights = None
    if config.class_weights == "balanced":
        weights = training_losses.balanced_weights(label, len(data.classes))
    criterion = nn.CrossEntropyLoss(weight=weights, label_smoothing=config.smoothing)
    losses, step = [], 0
    for epoch in range(config.epochs):
        loss_sum = weight_sum = 0.0
        order = list(epoch_batches(len(label), config.batch_size, config.seed, epoch))
        for rows in map(torch.from_numpy, order):
            progress = step / (len(order) * config.epochs)
            for group in optimizer.param_groups:
                group["lr"] = rate * schedule.lr_factor(progress, config, config.epochs)
            for dropout in dropouts:
                dropout.step = step
            logit, target = head(feature[rows]), label[rows]
            weight = float(len(rows))
            if data.multilabel:
                smoothed = target.float() * (1 - config.smoothing) + config.smoothing / 2
                loss = nn.functional.binary_cross_entropy_with_logits(
                    logit, smoothed, pos_weight=weights
                )
            else:
                loss = criterion(logit, target)
                weight = weight if weights is None else float(weights[target].sum())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum, weight_sum, step = (
                loss_sum + loss.item() * weight,
                weight_sum + weight,
                step + 1,
            )
        losses.append(loss_sum / weight_sum)
    return head.eval(), losses


VARIANTS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "strong decay": {"weight_decay": 1.0},
    "sgd": {"optimizer": "sgd"},
    "sgd without momentum": {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.1},
    "smoothing": {"smoothing": 0.1},
    "class weights": {"class_weights": "balanced"},
    "smoothing and class weights": {"smoothing": 0.2, "class_weights": "balanced"},
    "one-cycle": {"schedule": "one-cycle"},
    "restarts": {"schedule": "cosine", "cycle_len": 1, "cycle_mult": 2},
    "warm-up": {"warmup": 0.3, "optimizer": "sgd"},
    "dropout": {"dropout": 0.4},
    "one batch": {"batch_size": 400, "optimizer": "sgd"},
}


def _max_difference(data: Data, config: TrainConfig, rate: float) -> float:
    """The largest difference of weights, losses and last validation from the plain PyTorch loop."""
    head, losses = _train_by_hand(data, config, rate)
    result = train(data, config, rate)
    assert [epoch["epoch"] for epoch in result.epochs] == list(range(config.epochs))
    with torch.inference_mode():
        logit = head(_clean_features(data, data.valid))
    target = data.label[data.valid]
    valid_loss = (
        nn.functional.binary_cross_entropy_with_logits(logit, target.float())
        if data.multilabel
        else nn.functional.cross_entropy(logit, target)
    )
    pairs = [(epoch["train_loss"], loss) for epoch, loss in zip(result.epochs, losses, strict=True)]
    pairs.append((result.epochs[-1]["valid_loss"], float(valid_loss)))
    weights = [np.abs(result.state[k] - v.numpy()).max() for k, v in head.state_dict().items()]
    return float(max(*weights, *(abs(actual / expected - 1) for actual, expected in pairs)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labels", ["two classes", "three classes", "several labels"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_training_equals_a_hand_written_pytorch_loop(kind: str, labels: str, variant: str) -> None:
    rows = 401 if kind == "linear" else 121
    data = _toy_data(
        rows, classes=2 if labels == "two classes" else 3, multi=labels == "several labels"
    )
    # The sign of a ReLU input that is pure rounding error may differ here, and the two trainings
    # then diverge. This happens by chance, and not with every seed.
    differences = []
    for seed in range(1 if kind == "linear" else 4):
        config = _config(**({"head": kind, "seed": seed} | VARIANTS[variant]))
        differences.append(_max_difference(data, config, 0.01 if kind == "linear" else 0.002))
        if differences[-1] < 1e-5:
            return
    raise AssertionError(f"apart by {differences}")


def test_train_step_returns_the_loss_before_the_update() -> None:
    data = _toy_data(200)
    training = Training(data, [_trial(data, 0.1)])
    head = heads.restore_head("linear", 16, 3, training.stack.state(0, 0))
    rows = next(epoch_batches(len(data.train), 33, 0, 0))
    with torch.inference_mode():
        expected = nn.functional.cross_entropy(head(_clean_features(data, rows)), data.label[rows])
    assert float(training.train_step(0, 1.0)) == pytest.approx(float(expected), rel=1e-5)
    assert float(training.train_step(0, 0.0)) < float(expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("views", [1, 3])
def test_both_heads_learn_a_separable_toy_dataset(kind: str, multi: bool, views: int) -> None:
    data = _toy_data(600, views=views, separation=4, multi=multi)
    config = _config(head=kind, epochs=8, dropout=0.25, schedule="one-cycle")
    lines = train(data, config, 0.02).epochs
    # A fifth of the multi-hot labels is random and cannot be learned.
    assert lines[-1]["accuracy"] > (0.83 if multi else 0.97)
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_gives_the_same_numbers(kind: str) -> None:
    data = _toy_data(300, views=2)

    def run(seed: int) -> TrainedHead:
        return train(data, _config(head=kind, epochs=2, dropout=0.5, seed=seed), 0.01)

    torch.manual_seed(1)
    first = run(3)
    torch.manual_seed(2)  # the global generator has no influence
    _assert_identical(run(3), first)
    assert run(4).epochs != first.epochs


def test_linear_head_learns_from_large_similar_and_constant_features() -> None:
    data = _toy_data(600, separation=4)
    pairs = []
    for rows in (data.train, data.valid):
        shifted = np.pad(500 + 0.5 * _clean_features(data, rows).numpy(), ((0, 0), (0, 4)))[:, None]
        pairs.append((shifted.astype(np.float16), data.label[rows].numpy()))
    result = train(data_from_arrays(pairs[0], pairs[1], data.classes), _config(epochs=5), 0.02)
    assert result.epochs[-1]["accuracy"] > 0.97
    assert all(np.isfinite(value).all() for value in result.state.values())


def test_every_epoch_is_reported() -> None:
    reports: list[dict[str, float]] = []
    result = train(_toy_data(60), _config(), 0.01, report=reports.append)
    assert reports == result.epochs
    common_metrics = {"epoch", "train_loss", "valid_loss"}
    assert set(reports[0]) == common_metrics | {"accuracy", "balanced_accuracy"}
    result = train(_toy_data(60, multi=True), _config(), 0.01)
    assert set(result.epochs[0]) == common_metrics | {"accuracy", "f1", "f2"}


@pytest.mark.parametrize("rows", [1, 2, 3, 65])
@pytest.mark.parametrize("kind", KINDS)
def test_training_works_with_any_number_of_rows(kind: str, rows: int) -> None:
    rng = np.random.default_rng(0)
    feature, label = rng.normal(size=(rows, 1, 4)).astype(np.float16), np.zeros(rows, np.int64)
    data = data_from_arrays((feature, label), (feature, label), ["only"])
    result = train(data, _config(head=kind, epochs=2, batch_size=2 if rows < 9 else 64), 0.01)
    assert all(np.isfinite(value).all() for value in result.state.values())
    assert np.isfinite(result.epochs[-1]["train_loss"])


# ------------------------------------------------------------------------------ validation


def _sklearn_metrics(data: Data, rows: NDArray[np.int64], head: nn.Sequential) -> dict[str, float]:
    """scikit-learn's metrics of a head on the clean view of these rows."""
    from sklearn import metrics

    with torch.inference_mode():
        logit = head(_clean_features(data, rows))
    label = data.label[rows]
    target = label.numpy()
    if data.multilabel:
        loss = nn.functional.binary_cross_entropy_with_logits(logit, label.float())
        predicted = (logit.numpy() > 0).astype(np.uint8)
        f_scores = {
            f"f{beta}": metrics.fbeta_score(
                target, predicted, beta=beta, average="samples", zero_division=0
            )
            for beta in (1, 2)
        }
        return f_scores | {
            "valid_loss": float(loss),
            "accuracy": float((predicted == target).mean()),
        }
    predicted = logit.numpy().argmax(1)
    recall = metrics.recall_score(
        target, predicted, labels=np.unique(target), average="macro", zero_division=0
    )
    return {
        "valid_loss": float(nn.functional.cross_entropy(logit, label)),
        "accuracy": float((predicted == target).mean()),
        "balanced_accuracy": float(recall),
    }


@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=3),
    st.sampled_from([1, 2000, 10_000, 1 << 24]),
    st.booleans(),
    st.sampled_from(KINDS),
    st.sampled_from([2, 4]),
)
@settings(deadline=None, max_examples=40)
def test_validation_counts_every_row_once_for_any_chunk_size(
    counts: list[int], most: int, multi: bool, kind: str, classes: int
) -> None:
    data = _toy_data(150, width=6, classes=classes, views=2, multi=multi)
    assert isinstance(data.feature, InMemoryFeatures)
    feature = torch.stack(
        [_clean_features(data, np.arange(150)), torch.full((150, 6), torch.nan)], 1
    )
    data = replace(data, feature=InMemoryFeatures(feature.half()))
    rng = np.random.default_rng(counts[0])
    trials = [
        Trial(
            config=_config(head=kind, seed=seed),
            lr=0.1,
            train=data.train,
            valid=rng.permutation(150)[:count],
        )
        for seed, count in enumerate(counts)
    ]
    training = Training(data, trials)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(trainer, "MAX_VALIDATION_VALUES", most)
        result = training.validate()
    for number, (trial, metrics) in enumerate(zip(trials, result, strict=True)):
        state = training.stack.state(*training.position_of[number])
        head = heads.restore_head(kind, 6, classes, state)
        expected = _sklearn_metrics(data, trial.valid, head)
        assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_validation_can_be_limited_to_the_first_rows() -> None:
    data = _toy_data(200)
    training = Training(data, [_trial(data, 0.1)])
    head = heads.restore_head("linear", 16, 3, training.stack.state(0, 0))
    assert training.validate(7)[0] == pytest.approx(_sklearn_metrics(data, data.valid[:7], head))


def test_validation_does_not_change_training() -> None:
    data = _toy_data(100)
    for kind in KINDS:
        trials = [_trial(data, 0.1, head=kind, dropout=0.5)]
        validated, unvalidated = Training(data, trials), Training(data, trials)
        for step in range(4):
            for _ in range(2):
                validated.validate()
            validated.train_step(step, 1.0)
            unvalidated.train_step(step, 1.0)
        assert torch.equal(validated.stack.theta, unvalidated.stack.theta)


@pytest.mark.parametrize("kind", KINDS)
def test_validation_of_many_heads_respects_its_memory_limit(kind: str) -> None:
    data = _toy_data(3000, width=32)
    trials = [_trial(data, 0.1 + n, head=kind) for n in range(16)]
    training = Training(data, trials)
    logits, sizes = training.stack.logits, []

    def recording_logits(feature_GBD: Tensor, *others: Any) -> Tensor:
        sizes.append(feature_GBD.shape[1])
        return logits(feature_GBD, *others)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(trainer, "MAX_VALIDATION_VALUES", 1 << 20)
        monkeypatch.setattr(training.stack, "logits", recording_logits)
        training.validate()
    assert sum(sizes) == len(data.valid)
    hidden = 512 if kind == "lesson" else 0
    assert max(sizes) <= max(16, (1 << 20) // (16 * (3 + hidden)))


# ------------------------------------------------------------------------ stacks of heads


def _train_alone(data: Data, trial: Trial, steps: int) -> TrainedHead:
    """The head by itself, with as many steps per epoch as the stack takes."""
    training = Training(data, [trial])
    training.steps_per_epoch = steps
    return _train_to_end(training)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("labels", ["two classes", "three classes", "several labels"])
def test_each_stacked_head_equals_the_head_trained_alone(
    kind: str, optimizer: str, labels: str
) -> None:
    data = _toy_data(
        300, views=2, classes=2 if labels == "two classes" else 3, multi=labels == "several labels"
    )
    half_of_rows = data.train[::2]
    rates = [1e-3, 1e-2, 1e30]  # the last of these diverges
    grid = [
        {"rate": rate, "rows": rows, "seed": seed, "dropout": dropout, "weight_decay": decay}
        for seed, dropout, rows in [
            (0, 0.0, None),
            (1, 0.5, None),
            (1, 0.0, half_of_rows),
            (0, 0.5, half_of_rows),
        ]
        for rate in rates
        for decay in (0, 0.1)
        # This gives groups with different numbers of heads.
        if seed == 0 or decay == 0
    ]
    trials = [
        _trial(data, head=kind, optimizer=optimizer, batch_size=40, **settings) for settings in grid
    ]
    training = Training(data, trials)
    assert training.stack.shape == (4, 6)
    for trial, result in zip(trials, _train_to_end(training), strict=True):
        alone = _train_alone(data, trial, training.steps_per_epoch)
        if trial.lr < 1:
            _assert_close(result, alone, 1e-4)
        final_loss = result.epochs[-1]["train_loss"]
        assert np.isfinite(final_loss) if trial.lr < 1 else not final_loss < 10


@given(st.data())
@settings(deadline=None, max_examples=20)
def test_heads_with_different_training_rows_train_as_they_do_alone(
    values: st.DataObject,
) -> None:
    multi = values.draw(st.booleans(), "several labels")
    data = _toy_data(200, width=6, multi=multi, views=2)
    size = values.draw(st.integers(2, 50), "batch size")
    weights = values.draw(st.sampled_from(["none", "balanced"]), "class weights")
    rng = np.random.default_rng(0)
    trials = []
    for seed, count in enumerate(
        values.draw(st.lists(st.integers(2, 160), min_size=2, max_size=4))
    ):
        rows = np.sort(rng.permutation(160)[:count])
        valid = rng.permutation(200)[: max(1, count // 3)]
        config = _config(epochs=2, batch_size=size, seed=seed % 2, class_weights=weights)
        for rate in (0.001, 0.01)[: 1 + seed % 2]:
            trials.append(Trial(config=config, lr=rate, train=rows, valid=valid))
    training = Training(data, trials)
    for trial, result in zip(trials, _train_to_end(training), strict=True):
        _assert_close(result, _train_alone(data, trial, training.steps_per_epoch), 1e-4)


def test_group_with_fewer_rows_repeats_them_more_often() -> None:
    data = _toy_data(200)
    trials = [_trial(data, 0.01), _trial(data, 0.01, rows=data.train[:40])]
    training = Training(data, trials)
    assert training.steps_per_epoch == 5
    short = _train_to_end(training)[1]
    alone = Training(data, [trials[1]])
    assert alone.steps_per_epoch == 2
    for step in range(15):  # three epochs of the stack, 7.5 passes over these rows
        alone.train_step(step, 1.0)
    for name, value in alone.stack.state(0, 0).items():
        np.testing.assert_allclose(short.state[name], value, rtol=1e-4, atol=1e-4)


def test_epoch_reports_are_keyed_by_trial_in_order() -> None:
    data = _toy_data(80)
    trials = [_trial(data, 0.01, seed=seed % 2) for seed in range(4)]
    lines: list[dict[int, dict[str, float]]] = []
    result = train_stack(data, trials, report=lines.append)
    assert [list(line) for line in lines] == [[0, 1, 2, 3]] * 3
    for number, one in enumerate(result):
        assert one.epochs == [line[number] for line in lines]
    _assert_close(result[0], result[2], 1e-6)


# --------------------------------------------------------------------------- stopping


def _halving_rule(
    epochs_done: int, active: Sequence[int], history: Sequence[list[dict[str, float]]]
) -> set[int]:
    """Stop the worse half by validation loss, after epochs 2 and 3."""
    if epochs_done not in (2, 3):
        return set()
    ranked = sorted(active, key=lambda n: np.nan_to_num(history[n][-1]["valid_loss"], nan=1e9))
    return set(ranked[(len(ranked) + 1) // 2 :])


def _stop_all_after(epoch: int) -> StopRule:
    """Stop all heads after that many epochs."""
    return lambda done, learning, lines: set(learning) if done == epoch else set()


def _ragged_trials(data: Data, kind: str = "linear", **overrides: Any) -> list[Trial]:
    """Heads in ragged groups; one of them diverges from the start."""
    rows = [data.train, data.train[:90]]
    return [
        _trial(data, rate, rows=rows[seed % 2], head=kind, seed=seed, epochs=5, **overrides)
        for seed in range(3)
        for rate in ((0.001, 0.01, 1e30) if seed == 1 else (0.003, 0.03))
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_stopping_some_heads_does_not_change_the_others(kind: str, optimizer: str) -> None:
    data = _toy_data(200)
    trials = _ragged_trials(data, kind, optimizer=optimizer, dropout=0.3)
    full = train_stack(data, trials)
    with_stops = train_stack(data, trials, stop_rule=_halving_rule)
    lengths = [len(one.epochs) for one in with_stops]
    assert sorted(lengths) == [2, 2, 2, 3, 3, 5, 5]
    stopped_at = {
        epoch: train_stack(data, trials, stop_rule=_stop_all_after(epoch)) for epoch in (2, 3)
    }
    for number, (result, length) in enumerate(zip(with_stops, lengths, strict=True)):
        assert result.epoch == length - 1
        # A stopped head keeps the result it had then.
        expected = stopped_at[length][number] if length < 5 else full[number]
        _assert_close(result, expected, 1e-4)


def test_stopping_all_heads_ends_the_training() -> None:
    data = _toy_data(100)
    trials = _ragged_trials(data)
    result = train_stack(data, trials, stop_rule=_stop_all_after(1))
    assert [len(one.epochs) for one in result] == [1] * 7
    once = train_stack(data, [replace(m, config=replace(m.config, epochs=1)) for m in trials])
    for one, other in zip(result, once, strict=True):
        _assert_identical(one, other)


# ----------------------------------------------------------------- best epoch, early stopping

SINGLE_LABEL_METRICS = ["valid_loss", "accuracy", "balanced_accuracy"]
MULTI_LABEL_METRICS = ["valid_loss", "accuracy", "f1", "f2"]
CASES = [
    *((figure, False) for figure in SINGLE_LABEL_METRICS),
    *((figure, True) for figure in MULTI_LABEL_METRICS),
]


@pytest.mark.parametrize(("figure", "multi"), CASES)
def test_best_epoch_by_the_selected_metric_is_kept(figure: str, multi: bool) -> None:
    data = _toy_data(120, width=40, separation=0.3, multi=multi)  # so few rows that it overfits
    overrides: dict[str, Any] = {"epochs": 12, "batch_size": 16}
    full = train(data, _config(**overrides), 0.01)
    values = [line[figure] * (-1 if figure == "valid_loss" else 1) for line in full.epochs]
    best = int(np.argmax(values))
    result = train(data, _config(**overrides, best=figure), 0.01)
    assert result.epoch == best < 11
    assert result.epochs == full.epochs
    overrides["epochs"] = best + 1
    short = train(data, _config(**overrides), 0.01)
    for name, value in short.state.items():
        assert np.array_equal(result.state[name], value)


@pytest.mark.parametrize(("figure", "multi"), CASES)
@pytest.mark.parametrize("patience", [1, 3])
def test_training_stops_when_the_selected_metric_exceeds_its_patience(
    figure: str, multi: bool, patience: int
) -> None:
    data = _toy_data(120, width=40, separation=0.3, multi=multi)
    overrides: dict[str, Any] = {"epochs": 15, "batch_size": 16}
    full = train(data, _config(**overrides), 0.01)
    values = [line[figure] * (-1 if figure == "valid_loss" else 1) for line in full.epochs]
    best = 0
    for epoch, value in enumerate(values):
        best = epoch if value > values[best] else best
        if epoch - best >= patience:
            break
    lines: list[dict[str, float]] = []
    config = _config(**overrides, best=figure, patience=patience)
    result = train(data, config, 0.01, report=lines.append)
    assert result.epochs == lines == full.epochs[: epoch + 1]
    assert result.epoch == best
    assert epoch < 14


def test_each_stacked_head_stops_by_its_own_patience() -> None:
    data = _toy_data(120, width=40, separation=0.3)
    overrides: dict[str, Any] = {
        "epochs": 12,
        "batch_size": 16,
        "best": "valid_loss",
        "patience": 2,
    }
    trials = [_trial(data, rate, **overrides) for rate in (1e-4, 3e-3, 1e-2, 0.1)]
    result = train_stack(data, trials)
    assert len({len(one.epochs) for one in result}) > 2
    for one, trial in zip(result, trials, strict=True):
        alone = train(data, trial.config, trial.lr)
        assert one.epoch == alone.epoch
        _assert_close(one, alone, 1e-4)


@pytest.mark.parametrize(("figure", "multi"), [("f1", False), ("balanced_accuracy", True)])
def test_metric_undefined_for_these_labels_is_refused_before_training(
    figure: str, multi: bool
) -> None:
    data = _toy_data(60, multi=multi)
    with pytest.raises(ConfigError, match=f"--best {figure}"):
        Training(data, [_trial(data, 0.01, best=figure)])


def test_epoch_with_an_undefined_metric_is_never_the_best() -> None:
    data = _toy_data(60)
    training = Training(data, [_trial(data, 0.01, best="valid_loss", patience=2)])
    theta = training.stack.theta.clone()
    training.stack.theta.fill_(float("nan"))
    training.train_epoch()
    training.optimizer.first_moment.zero_()
    training.optimizer.second_moment.zero_()
    training.stack.theta.copy_(theta)
    training.train_epoch()
    training.train_epoch()
    result = training.trained_heads()[0]
    assert np.isnan(result.epochs[0]["valid_loss"])
    assert result.epoch > 0
    assert np.isfinite(result.state["2.weight"]).all()


# ---------------------------------------------------------------------------- checkpoints


class _StateRecorder:
    """Records the state after each epoch, as a checkpoint would."""

    def __init__(self) -> None:
        self.after: dict[int, TrainingState] = {}

    def __call__(self, save: Callable[[], TrainingState], done: int, over: bool) -> None:
        self.after[done] = _serialize_round_trip(save())
        self.over = over


def _serialize_round_trip(saved: TrainingState) -> TrainingState:
    """Serialize as a checkpoint does: safetensors and JSON."""
    import safetensors.torch

    tensors, metadata = saved
    return safetensors.torch.load(safetensors.torch.save(tensors)), json.loads(json.dumps(metadata))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("optimizer", "overrides"),
    [
        ("adamw", {"schedule": "one-cycle", "dropout": 0.4}),
        ("sgd", {"schedule": "cosine", "best": "valid_loss", "patience": 2}),
        ("adamw", {"precision": "fp16", "best": "accuracy", "patience": 3}),
    ],
    ids=["one-cycle", "patience", "fp16"],
)
@pytest.mark.parametrize("losers", [None, _halving_rule], ids=["all", "halving"])
def test_training_resumed_after_any_epoch_gives_identical_weights(
    kind: str, optimizer: str, overrides: dict[str, Any], losers: StopRule | None
) -> None:
    data = _toy_data(200, views=2)
    trials = _ragged_trials(data, kind, optimizer=optimizer, **overrides)
    after_epoch = _StateRecorder()
    full = train_stack(data, trials, stop_rule=losers, after_epoch=after_epoch)
    assert list(after_epoch.after) == [1, 2, 3, 4, 5]
    assert after_epoch.over
    for epoch, saved in after_epoch.after.items():
        recorder = _StateRecorder()
        resumed = train_stack(
            data, trials, stop_rule=losers, resume_from=saved, after_epoch=recorder
        )
        for one, other in zip(resumed, full, strict=True):
            _assert_identical(one, other)
        assert list(recorder.after) == list(range(epoch + 1, 6))
        for later, (tensors, metadata) in recorder.after.items():  # also after a second stop
            assert json.dumps(metadata) == json.dumps(after_epoch.after[later][1])
            for name, tensor in tensors.items():
                assert torch.equal(
                    tensor.nan_to_num(), after_epoch.after[later][0][name].nan_to_num()
                )


def test_resuming_a_finished_training_changes_nothing() -> None:
    data, recorder = _toy_data(60), _StateRecorder()
    full = train_stack(
        data, _ragged_trials(data), stop_rule=_stop_all_after(2), after_epoch=recorder
    )
    assert recorder.over
    resumed = train_stack(data, _ragged_trials(data), resume_from=recorder.after[2])
    for one, other in zip(resumed, full, strict=True):
        _assert_identical(one, other)


def test_saved_state_does_not_change_as_training_continues() -> None:
    data = _toy_data(60)
    trials = [_trial(data, 0.01, best="valid_loss") for _ in range(2)]
    training = Training(data, trials)
    training.train_epoch()
    saved = training.save()
    copy = _serialize_round_trip(saved)
    training.train_epoch()
    training.stop({0})
    for name, tensor in copy[0].items():
        assert torch.equal(saved[0][name], tensor), name
    assert saved[1] == copy[1]
    for _ in range(2):  # nor when another training resumes from it
        resumed = Training(data, trials)
        resumed.load(saved)
        resumed.train_epoch()
    for name, tensor in copy[0].items():
        assert torch.equal(saved[0][name], tensor), name
    assert saved[1] == copy[1]


# ----------------------------------------------------------------------------- precision


def _skip_without_cpu_fp16() -> None:
    try:
        torch.bmm(torch.ones(1, 2, 2).half(), torch.ones(1, 2, 2).half())
    except RuntimeError as error:
        pytest.skip(f"this torch has no fp16 products on the CPU: {error}")


def test_auto_precision_is_full_precision_on_a_cpu() -> None:
    assert matmul_dtype("auto", torch.device("cpu")) is None
    assert matmul_dtype("bf16", torch.device("cpu")) is torch.bfloat16
    assert matmul_dtype("fp16", torch.device("cpu")) is torch.float16


def _assert_half_precision_is_accurate(kind: str, precision: str, device: str) -> None:
    for multi in (False, True):
        data = _toy_data(600, separation=4, multi=multi, device=device)
        full_precision, result = (
            train(data, _config(head=kind, epochs=6, dropout=0.2, precision=dtype), 0.01).epochs[-1]
            for dtype in ("fp32", precision)
        )
        assert result["accuracy"] == pytest.approx(full_precision["accuracy"], abs=0.01)
        for metric in ("train_loss", "valid_loss"):
            assert result[metric] == pytest.approx(full_precision[metric], rel=0.05, abs=0.002)
            assert result[metric] != full_precision[metric]  # otherwise the precision had no effect


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("asked", ["bf16", "fp16"])
def test_half_precision_trains_as_well_as_full(kind: str, asked: str) -> None:
    if asked == "fp16":
        _skip_without_cpu_fp16()
    _assert_half_precision_is_accurate(kind, asked, "cpu")


def _assert_overflow_affects_one_head(kind: str, device: str) -> None:
    data = _toy_data(300, device=device)
    rates = [1e-3, 1e7, 1e-2]  # after one step the weights of the second one exceed fp16
    trials = [
        _trial(data, rate, head=kind, precision="fp16", seed=seed, batch_size=64)
        for seed in range(2)
        for rate in rates
    ]
    training = Training(data, trials)
    result = _train_to_end(training)
    optimizer = training.optimizer
    assert optimizer.scale_GH is not None
    assert training.stack.theta.isfinite().all()
    for number, trial in enumerate(trials):
        position = training.position_of[number]
        skipped = int(optimizer.skipped_GH[position])
        assert float(optimizer.scale_GH[position]) == 65536 / 2**skipped
        if trial.lr > 1:
            assert skipped > 0
            continue
        alone = Training(data, [trial])
        (expected,) = _train_to_end(alone)
        assert int(alone.optimizer.skipped_GH) == skipped < training.steps_per_epoch * 3
        _assert_close(result[number], expected, 1e-3)
        assert result[number].epochs[-1]["train_loss"] < result[number].epochs[0]["train_loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_fp16_overflow_skips_steps_of_that_head_only(kind: str) -> None:
    _skip_without_cpu_fp16()
    _assert_overflow_affects_one_head(kind, "cpu")


# -------------------------------------------------------------------------------- the GPU


@CUDA
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("asked", ["bf16", "fp16", "auto"])
def test_half_precision_trains_as_well_as_full_on_the_gpu(kind: str, asked: str) -> None:
    _assert_half_precision_is_accurate(kind, asked, "cuda")


@CUDA
@pytest.mark.parametrize("kind", KINDS)
def test_fp16_overflow_on_the_gpu_affects_one_head(kind: str) -> None:
    _assert_overflow_affects_one_head(kind, "cuda")


@CUDA
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("left", [False, True], ids=["on the device", "in the map"])
def test_several_groups_on_the_gpu_train_as_on_the_cpu(kind: str, multi: bool, left: bool) -> None:
    result = []
    for device in ("cpu", "cuda"):
        data = _toy_data(200, views=2, multi=multi, device=device)
        if left:
            flat_features = _toy_data(200, views=2, multi=multi).feature.take(torch.arange(400))
            parts = [flat_features.view(200, 2, -1).numpy()]
            data = replace(
                data, feature=MemoryMappedFeatures(parts, np.arange(200), torch.device(device))
            )
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        after_epoch = _StateRecorder()
        trials = _ragged_trials(data, kind, dropout=0.3, class_weights="balanced")
        result.append(train_stack(data, trials, stop_rule=_halving_rule, after_epoch=after_epoch))
        resumed = train_stack(
            data, trials, stop_rule=_halving_rule, resume_from=after_epoch.after[3]
        )
        torch.backends.cuda.matmul.allow_tf32 = before
        for one, other in zip(resumed, result[-1], strict=True):
            _assert_close(one, other, 1e-5)
    for one, other in zip(result[1], result[0], strict=True):
        _assert_close(one, other, 1e-3)


# ------------------------------------------------------------------------- many workers


def _training_jobs() -> dict[str, tuple[Data, list[Trial]]]:
    """Data and trials to train with one and several workers, by name."""
    odd = _toy_data(83)
    assert len(odd.train) == 5 * 13 + 1  # five batches of 13 and one remaining row
    small = _toy_data(14, width=5, classes=2)
    assert len(small.train) == 11
    multi_label = _toy_data(70, multi=True, views=2)
    row_sets = [odd.train, odd.train[:40], odd.train[:23]]
    jobs = {}
    for kind in KINDS:
        options = {"head": kind, "epochs": 2, "dropout": 0.5}
        jobs[f"{kind}, odd sizes"] = (
            odd,
            [_trial(odd, 0.01, batch_size=13, class_weights="balanced", smoothing=0.1, **options)],
        )
        # Batches of 3 rows and one of 2: some of four workers have none. With so few rows, batch
        # norm gives signs, and adamw turns any gradient into a full step, which would amplify
        # rounding errors.
        jobs[f"{kind}, few rows"] = (
            small,
            [_trial(small, 0.01, batch_size=3, optimizer="sgd", **options)],
        )
        jobs[f"{kind}, one row"] = small, [_trial(small, 0.01, rows=small.train[:1], **options)]
        jobs[f"{kind}, ragged groups"] = (
            odd,
            [
                _trial(odd, rate, rows=rows, batch_size=11, seed=seed, **options)
                for seed, rows in enumerate(row_sets)
                for rate in (0.001, 0.01)
            ],
        )
        jobs[f"{kind}, several labels"] = (
            multi_label,
            [
                _trial(
                    multi_label, 0.01, batch_size=17, seed=seed, class_weights="balanced", **options
                )
                for seed in range(2)
            ],
        )
    overrides: dict[str, Any] = {"epochs": 5, "best": "valid_loss", "patience": 1, "batch_size": 13}
    jobs["linear, stopped early"] = (
        odd,
        [_trial(odd, rate, **overrides) for rate in (1e-3, 0.03, 1)],
    )
    return jobs


RESUMED_JOBS = ["linear, ragged groups", "lesson, odd sizes"]


def _run_worker(rank: int, folder: Path) -> None:
    """Run one of four workers, then of two; write its results to the folder."""
    import safetensors.torch
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    for world_size in (4, 2):
        if rank >= world_size:
            continue
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/met-{world_size}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(minutes=5),
        )
        distributed, results = DistributedContext(rank, world_size), {}
        for name, (data, trials) in _training_jobs().items():
            results[name] = _to_json(train_stack(data, trials, distributed))
            if name in RESUMED_JOBS:
                tensors = safetensors.torch.load_file(folder / f"{name}.safetensors")
                metadata = json.loads((folder / f"{name}.json").read_text())
                result = train_stack(data, trials, distributed, resume_from=(tensors, metadata))
                results[f"{name}, resumed"] = _to_json(result)
        (folder / f"{world_size}-{rank}.json").write_text(json.dumps(results))
        dist.barrier()
        dist.destroy_process_group()


def _to_json(trained: Sequence[TrainedHead]) -> list[dict[str, Any]]:
    """Epochs, weights and best epoch, as JSON."""
    return [
        {
            "epochs": head.epochs,
            "epoch": head.epoch,
            "state": {name: value.tolist() for name, value in head.state.items()},
        }
        for head in trained
    ]


@pytest.fixture(scope="module")
def results_by_world_size(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[int, list[dict[str, Any]]]:
    """Results of each worker by number of workers: [1] in this process, [2] and [4] with gloo."""
    import safetensors.torch
    import torch.multiprocessing as processes

    folder = tmp_path_factory.mktemp("workers")
    first: dict[str, Any] = {}
    for name, (data, trials) in _training_jobs().items():
        after_epoch = _StateRecorder()
        first[name] = _to_json(train_stack(data, trials, after_epoch=after_epoch))
        if name in RESUMED_JOBS:
            tensors, metadata = after_epoch.after[1]
            safetensors.torch.save_file(tensors, folder / f"{name}.safetensors")
            (folder / f"{name}.json").write_text(json.dumps(metadata))
            first[f"{name}, resumed"] = first[name]
    processes.spawn(_run_worker, args=(folder,), nprocs=4, join=True)
    return {1: [first]} | {
        world: [json.loads((folder / f"{world}-{rank}.json").read_text()) for rank in range(world)]
        for world in (2, 4)
    }


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    "name", [*_training_jobs(), *(f"{name}, resumed" for name in RESUMED_JOBS)]
)
def test_several_workers_give_the_numbers_of_one(
    results_by_world_size: dict[int, list[dict[str, Any]]], world: int, name: str
) -> None:
    tolerance = 1e-4 if name.startswith("lesson") else 1e-5
    expected, result = results_by_world_size[1][0][name], results_by_world_size[world][0][name]
    for one, other in zip(result, expected, strict=True):
        assert one["epoch"] == other["epoch"]
        assert len(one["epochs"]) == len(other["epochs"])
        for line, expected_epoch in zip(one["epochs"], other["epochs"], strict=True):
            assert line == pytest.approx(expected_epoch, rel=tolerance)
        for part, value in other["state"].items():
            np.testing.assert_allclose(one["state"][part], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("world", [2, 4])
def test_all_workers_have_identical_weights_and_metrics(
    results_by_world_size: dict[int, list[dict[str, Any]]], world: int
) -> None:
    # Each worker decides by its own metrics which heads stop: a difference would part them.
    for other in results_by_world_size[world][1:]:
        assert json.dumps(other) == json.dumps(results_by_world_size[world][0])


# ----------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0},
        {"batch_size": 1},
        {"rate": 0.0},
        {"rate": -1.0},
        {"rate": float("nan")},
        {"rate": float("inf")},
        {"weight_decay": -0.1},
        {"weight_decay": float("nan")},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"smoothing": 1.0},
        {"seed": -1},
        {"patience": -1},
        {"patience": 2},
    ],
)
def test_invalid_settings_are_refused_in_three_parts(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError) as error_info:
        TrainConfig(**bad)  # type: ignore[arg-type]
    assert all((error_info.value.found, error_info.value.wanted, error_info.value.do))
    assert f"--{next(iter(bad)).replace('_', '-')}" in error_info.value.found


def test_epochs_that_cut_the_last_cosine_cycle_are_refused_with_valid_ones() -> None:
    overrides: dict[str, Any] = {"schedule": "cosine", "cycle_len": 1, "cycle_mult": 2}
    TrainConfig(epochs=7, **overrides)
    with pytest.raises(ConfigError, match="give --epochs 7 or 15"):
        TrainConfig(epochs=8, **overrides)
