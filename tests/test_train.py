"""Training's promises: plain PyTorch's numbers, every row once, the same numbers twice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from arrowhead import ConfigError, DataError, heads
from arrowhead.train import Data, Team, TrainConfig, batches, rate_at, train, validate, view_of


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """On matrices this small and cores this busy, threads wait for each other more than work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _toy(rows: int, *, width: int = 16, classes: int = 3, views: int = 1, apart: float = 3) -> Data:
    """Gaussian clouds `apart` times their width from each other; a fifth of them validates."""
    draw = np.random.default_rng(0)
    label = np.arange(rows) % classes
    centre = apart * draw.normal(size=(classes, 1, width)) / 2
    feature = (centre[label] + draw.normal(size=(rows, views, width))).astype(np.float16)
    cut = rows * 4 // 5
    names = [f"class {n}" for n in range(classes)]
    return Data.of((feature[:cut], label[:cut]), (feature[cut:], label[cut:]), names)


# -------------------------------------------------------------------------------- order


@given(st.integers(1, 500), st.integers(2, 70), st.integers(0, 5), st.integers(0, 5))
@settings(deadline=None)
def test_batches_cover_all_rows_once_and_never_leave_a_batch_of_one(
    rows: int, size: int, seed: int, epoch: int
) -> None:
    made = list(batches(rows, size, seed, epoch))
    assert sorted(np.concatenate(made).tolist()) == list(range(rows))
    assert all(len(batch) >= 2 for batch in made) or rows == 1
    assert all(len(batch) == size for batch in made[:-1])
    assert len(made[-1]) <= size + 1


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return np.concatenate(list(batches(100, 16, seed, epoch))).tolist()

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_the_view_of_a_row_changes_by_epoch_not_by_batch() -> None:
    rows = np.arange(300)
    first = view_of(rows, 4, seed=0, epoch=0)
    assert sorted(set(first.tolist())) == [0, 1, 2, 3]
    assert (view_of(rows, 4, seed=0, epoch=1) != first).mean() > 0.5
    some = np.array([7, 250, 3])
    assert view_of(some, 4, seed=0, epoch=0).tolist() == first[some].tolist()
    assert not view_of(rows, 1, seed=0, epoch=0).any()


def test_one_cycle_rises_for_a_quarter_and_falls_to_nothing() -> None:
    config = TrainConfig()
    rates = [rate_at(share, config, 2.0) for share in np.linspace(0, 1, 101)]
    assert rates[0] == pytest.approx(2.0 / 25)
    assert rates[25] == max(rates) == pytest.approx(2.0)
    assert rates[100] == pytest.approx(0, abs=1e-12)
    assert rates[:26] == sorted(rates[:26])
    assert rates[25:] == sorted(rates[25:], reverse=True)
    constant = TrainConfig(schedule="constant")
    assert {rate_at(share, constant, 2.0) for share in (0, 0.1, 0.9)} == {2.0}


# ------------------------------------------------------------------------------ the loop


def _plain(data: Data, config: TrainConfig, rate: float) -> tuple[nn.Linear, float]:
    """Weights and mean training loss after `config.epochs`, as anyone would write it."""
    features = data.train_feature[:, 0].float()
    features = (features - features.mean(0)) / features.std(0, correction=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        head = nn.Linear(features.shape[1], data.classes)
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=config.weight_decay)
    loss_of = nn.CrossEntropyLoss(label_smoothing=config.smoothing)
    for epoch in range(config.epochs):
        losses = 0.0
        for rows in batches(len(data.train_label), config.batch_size, config.seed, epoch):
            loss = loss_of(head(features[rows]), data.train_label[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses += loss.item() * len(rows)
    return head, losses / len(data.train_label)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("epochs", [1, 3])
def test_training_equals_a_plain_hand_written_pytorch_loop(epochs: int, smoothing: float) -> None:
    data = _toy(500, apart=1)
    config = TrainConfig(
        epochs=epochs, schedule="constant", precision="fp32", smoothing=smoothing, batch_size=64
    )
    plain, loss = _plain(data, config, 0.01)
    made = train(data, config, 0.01)
    weight, bias = list(made.state.values())[-2:]
    np.testing.assert_allclose(weight, plain.weight.detach().numpy(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(bias, plain.bias.detach().numpy(), rtol=0, atol=1e-6)
    assert made.epochs[-1]["train_loss"] == pytest.approx(loss, abs=1e-6)
    with torch.inference_mode():
        clean = data.train_feature[:, 0].float()
        valid = (data.valid_feature.float() - clean.mean(0)) / clean.std(0, correction=0)
        logit = plain(valid)
    wanted = nn.functional.cross_entropy(logit, data.valid_label)
    assert made.epochs[-1]["valid_loss"] == pytest.approx(float(wanted), abs=1e-6)
    hits = (logit.argmax(1) == data.valid_label).double().mean()
    assert made.epochs[-1]["accuracy"] == pytest.approx(float(hits))


@pytest.mark.parametrize("kind", ["linear", "lesson"])
@pytest.mark.parametrize("views", [1, 3])
def test_both_heads_learn_a_separable_toy_set(kind: str, views: int) -> None:
    data = _toy(600, views=views)
    config = TrainConfig(head=kind, epochs=5, dropout=0.25)  # type: ignore[arg-type]
    lines = train(data, config, 0.02).epochs
    assert [line["epoch"] for line in lines] == list(range(5))
    assert lines[-1]["accuracy"] > 0.97
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]


@pytest.mark.parametrize("kind", ["linear", "lesson"])
def test_the_same_seed_gives_the_same_numbers_twice(kind: str) -> None:
    data = _toy(300, apart=1, views=2)

    def run(seed: int) -> tuple[list[dict[str, float]], np.ndarray]:
        config = TrainConfig(head=kind, epochs=2, dropout=0.5, seed=seed)  # type: ignore[arg-type]
        made = train(data, config, 0.01)
        return made.epochs, np.concatenate([value.ravel() for value in made.state.values()])

    torch.manual_seed(1)
    first, weights = run(3)
    torch.manual_seed(2)  # the caller's generator plays no part
    again, same = run(3)
    assert first == again
    assert np.array_equal(weights, same)
    assert run(4)[0] != first


def test_a_linear_head_learns_from_features_that_are_large_alike_and_partly_constant() -> None:
    data = _toy(600)
    far = (data.train_feature[:, 0].double().numpy(), data.valid_feature.double().numpy())
    arrays = [np.pad(500 + 0.5 * array, ((0, 0), (0, 4)))[:, None] for array in far]
    train_pair, valid_pair = (
        (array.astype(np.float16), label.numpy())
        for array, label in zip(arrays, (data.train_label, data.valid_label), strict=True)
    )
    shifted = Data.of(train_pair, valid_pair, ["a", "b", "c"])
    made = train(shifted, TrainConfig(epochs=5), 0.02)
    assert made.epochs[-1]["accuracy"] > 0.97
    assert all(np.isfinite(value).all() for value in made.state.values())


def test_every_epoch_is_recorded_as_it_comes() -> None:
    lines: list[dict[str, float]] = []
    made = train(_toy(60), TrainConfig(epochs=3), 0.01, record=lines.append)
    assert lines == made.epochs
    assert set(lines[0]) == {"epoch", "train_loss", "valid_loss", "accuracy"}


def test_one_row_too_many_for_the_batches_does_not_stop_batch_norm() -> None:
    data = _toy(81)  # 64 rows to learn from
    one_over = replace(
        data,
        train_feature=torch.cat([data.train_feature, data.train_feature[:1]]),
        train_label=torch.cat([data.train_label, data.train_label[:1]]),
    )
    assert len(one_over.train_label) == 65
    lines = train(one_over, TrainConfig(head="lesson", epochs=1, batch_size=64), 0.01).epochs
    assert np.isfinite(lines[0]["train_loss"])


def test_validation_counts_every_row_once_in_eval_mode() -> None:
    data = _toy(60_000, width=4)  # more validation rows than one pass takes
    head = heads.make("lesson", 4, 3, dropout=0.5)
    tally = validate(head, data.valid_feature, data.valid_label, Team())
    assert tally.seen == len(data.valid_label) == 12_000
    with torch.inference_mode():
        guess = head.eval()(data.valid_feature.float()).argmax(1)
    assert tally.correct == (guess == data.valid_label).sum()


def test_dropout_keeps_the_share_and_the_mean_and_repeats_by_step() -> None:
    drop = heads.GlobalDropout(0.25, seed=1)
    ones = torch.ones(400, 50)
    drop.place = heads.Place(step=3, first=0, rows=400)
    made = drop(ones)
    assert float((made == 0).double().mean()) == pytest.approx(0.25, abs=0.02)
    assert float(made.mean()) == pytest.approx(1, abs=0.03)
    halves = []
    for first in (0, 200):  # two workers draw the rows that one would have drawn
        drop.place = heads.Place(step=3, first=first, rows=400)
        halves.append(drop(ones[:200]))
    assert torch.equal(torch.cat(halves), made)
    drop.place = heads.Place(step=4, first=0, rows=400)
    assert not torch.equal(drop(ones), made)
    assert torch.equal(drop.eval()(ones), ones)


def test_the_lesson_head_is_the_lessons() -> None:
    parts = [type(part) for part in heads.make("lesson", 16, 3)]
    norm, drop = heads.GlobalBatchNorm, heads.GlobalDropout
    assert parts == [norm, drop, nn.Linear, nn.ReLU, norm, drop, nn.Linear]


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
    ],
)
def test_settings_that_cannot_train_are_refused_in_three_parts(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError) as refusal:
        TrainConfig(**bad)  # type: ignore[arg-type]
    assert all((refusal.value.found, refusal.value.wanted, refusal.value.do))
    assert f"--{next(iter(bad)).replace('_', '-')}" in refusal.value.found


def test_a_class_without_images_to_learn_from_is_named() -> None:
    feature = np.zeros((4, 1, 2), np.float16)
    some, none = np.array([0, 2, 0, 2]), np.array([], np.int64)
    with pytest.raises(DataError, match="of bee"):
        Data.of((feature, some), (feature, some), ["ant", "bee", "cat"])
    with pytest.raises(DataError, match="validation split has no readable image"):
        Data.of((feature, some % 2 + some // 2), (feature[:0], none), ["ant", "bee"])
