"""Losses, gradients and optimizers equal torch's, schedules equal their papers', and in fp16 a head
that overflows does not affect the others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn

from arrowhead import ConfigError
from arrowhead.training import heads
from arrowhead.training.heads import Stack
from arrowhead.training.losses import Loss, balanced_weights
from arrowhead.training.optimizer import Optimizer
from arrowhead.training.optimizer_config import OptimizerConfig
from arrowhead.training.schedule import check_cycles, lr_factor

pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------------ schedules


def _rates(config: OptimizerConfig, epochs: int, steps: int) -> np.ndarray:
    """The factor at each step, (epochs, steps)."""
    count = epochs * steps
    result = [lr_factor(step / count, config, epochs) for step in range(count)]
    return np.array(result).reshape(epochs, steps)


def test_one_cycle_rises_for_a_quarter_and_falls_to_zero() -> None:
    rates = [lr_factor(share, OptimizerConfig(), 7) for share in np.linspace(0, 1, 101)]
    assert rates[0] == pytest.approx(1 / 25)
    assert rates[25] == max(rates) == pytest.approx(1)
    assert rates[100] == pytest.approx(0, abs=1e-12)
    assert rates[:26] == sorted(rates[:26])
    assert rates[25:] == sorted(rates[25:], reverse=True)


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.9])
def test_one_cycle_peaks_at_the_end_of_its_warm_up(warmup: float) -> None:
    config = OptimizerConfig(warmup=warmup)
    rates = [lr_factor(step / 1000, config, 3) for step in range(1000)]
    assert int(np.argmax(rates)) == round(warmup * 1000)
    assert max(rates) == pytest.approx(1)


def test_the_constant_schedule_has_a_linear_warm_up() -> None:
    assert (_rates(OptimizerConfig(schedule="constant"), 3, 10) == 1).all()
    rates = _rates(OptimizerConfig(schedule="constant", warmup=0.2), 1, 100)[0]
    assert rates[0] == pytest.approx(1 / 25)
    assert np.diff(rates[:21]) == pytest.approx(np.full(20, (1 - 1 / 25) / 20))
    assert rates[20:] == pytest.approx(np.ones(80))


def test_sgdr_restarts_at_the_full_rate_after_1_2_and_4_epochs() -> None:
    config = OptimizerConfig(schedule="cosine", cycle_len=1, cycle_mult=2)
    rates = _rates(config, 7, 50).flatten()
    restarts = np.flatnonzero(np.diff(rates, prepend=0) > 0)
    assert restarts.tolist() == [0, 50, 150]
    for start, length in zip(restarts, (50, 100, 200), strict=True):
        expected = (1 + np.cos(np.pi * np.arange(length) / length)) / 2  # arXiv:1608.03983, (5)
        assert rates[start : start + length] == pytest.approx(expected, abs=1e-9)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 70))
@settings(deadline=None)
def test_each_cosine_cycle_starts_at_the_first_step_of_its_epoch(
    length: int, mult: int, cycles: int, steps: int
) -> None:
    lengths = [length * mult**number for number in range(cycles)]
    config = OptimizerConfig(schedule="cosine", cycle_len=length, cycle_mult=mult)
    check_cycles(config, sum(lengths))
    rates = _rates(config, sum(lengths), steps)
    for start in np.cumsum([0, *lengths[:-1]]):
        assert rates[start, 0] == pytest.approx(1, abs=1e-6)
    assert ((rates >= 0) & (rates <= 1)).all()


def test_a_single_cosine_spans_all_epochs_and_a_warm_up_only_lowers_it() -> None:
    plain = _rates(OptimizerConfig(schedule="cosine"), 5, 20).flatten()
    assert plain == pytest.approx((1 + np.cos(np.pi * np.arange(100) / 100)) / 2)
    warm = _rates(OptimizerConfig(schedule="cosine", warmup=0.3), 5, 20).flatten()
    assert warm[30:] == pytest.approx(plain[30:])
    assert (warm[:30] < plain[:30]).all()
    assert lr_factor(1.0, OptimizerConfig(schedule="cosine"), 5) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("epochs", "suggested"), [(2, "1 or 3"), (5, "3 or 7"), (6, "3 or 7"), (14, "7 or 15")]
)
def test_an_incomplete_cosine_cycle_is_refused_and_epochs_that_fit_are_suggested(
    epochs: int, suggested: str
) -> None:
    config = OptimizerConfig(schedule="cosine", cycle_len=1, cycle_mult=2)
    with pytest.raises(ConfigError, match=f"--epochs {suggested}"):
        check_cycles(config, epochs)
    with pytest.raises(ConfigError, match="--epochs 3,"):
        check_cycles(OptimizerConfig(schedule="cosine", cycle_len=3), 2)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weight_decay", -0.1),
        ("weight_decay", float("nan")),
        ("weight_decay", float("inf")),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("warmup", 1.0),
        ("warmup", float("nan")),
        ("smoothing", 1.0),
        ("cycle_len", 0),
        ("cycle_mult", 0),
    ],
)
def test_optimizer_settings_out_of_range_are_refused_in_three_parts(
    field: str, value: float
) -> None:
    with pytest.raises(ConfigError) as refusal:
        OptimizerConfig(schedule="cosine", **{field: value})  # type: ignore[arg-type]
    assert f"--{field.replace('_', '-')} is" in refusal.value.found
    assert all((refusal.value.wanted, refusal.value.do))


def test_restarts_are_refused_for_schedules_other_than_cosine() -> None:
    with pytest.raises(ConfigError, match="--cycle-len 2"):
        OptimizerConfig(cycle_len=2)


# --------------------------------------------------------------------------------- losses


def _torch_loss(loss: Loss, logit_CB: Tensor, label: Tensor) -> Tensor:
    """The loss of each row (B,), computed by torch's functions."""
    if not loss.multilabel:
        options = {
            "weight": loss.class_weights,
            "label_smoothing": loss.smoothing,
            "reduction": "none",
        }
        return nn.functional.cross_entropy(logit_CB.mT, label, **options)  # type: ignore[arg-type]
    target = label * (1 - loss.smoothing) + loss.smoothing / 2
    pos_weight = None if loss.class_weights is None else loss.class_weights[:, None]
    loss_CB = nn.functional.binary_cross_entropy_with_logits(
        logit_CB, target, pos_weight=pos_weight, reduction="none"
    )
    return loss_CB.mean(0)


@given(
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(2, 6), st.integers(1, 7)),
    st.booleans(),
    st.sampled_from([0.0, 0.1, 0.5]),
    st.booleans(),
    st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_losses_and_gradients_equal_those_of_torch(
    seed: int,
    shape: tuple[int, int, int, int],
    multi: bool,
    smoothing: float,
    weighted: bool,
    padded: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups, heads_per_group, classes, rows = shape
    logit = 5 * torch.randn(shape, generator=generator)
    weights = torch.rand(classes, generator=generator) + 0.1 if weighted else None
    loss = Loss(multilabel=multi, smoothing=smoothing, class_weights=weights)
    label = torch.randint(classes, (groups, rows), generator=generator)
    if multi:
        label = torch.randint(2, (groups, classes, rows), generator=generator).float()
    valid = torch.rand(groups, rows, generator=generator) < 0.7 if padded else None
    total = torch.rand(groups, generator=generator) + 1
    loss_sum, gradient = loss.sum_and_gradient(logit.clone(), label, valid, total)
    for group in range(groups):
        for head in range(heads_per_group):
            leaf = logit[group, head].clone().requires_grad_()
            loss_B = _torch_loss(loss, leaf, label[group])
            expected = (loss_B if valid is None else loss_B[valid[group]]).sum()
            (expected / total[group]).backward()
            torch.testing.assert_close(
                loss_sum[group, head], expected.detach(), rtol=1e-5, atol=1e-5
            )
            torch.testing.assert_close(gradient[group, head], leaf.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("multi", [False, True])
def test_a_confident_wrong_row_has_a_finite_loss_and_gradient(multi: bool) -> None:
    logit = torch.tensor([1e4, -1e4]).view(1, 1, 2, 1)
    label = torch.tensor([0.0, 1.0]).view(1, 2, 1) if multi else torch.tensor([[1]])
    loss_sum, gradient = Loss(multilabel=multi).sum_and_gradient(logit.clone(), label, None, 1.0)
    assert float(loss_sum) == pytest.approx(1e4 if multi else 2e4)
    assert gradient.flatten().tolist() == ([0.5, -0.5] if multi else [1, -1])


@given(st.lists(st.integers(0, 4), min_size=5, max_size=60))
@settings(deadline=None)
def test_balanced_weights_equal_those_of_scikit_learn(labels: list[int]) -> None:
    label = np.array([*range(5), *labels])
    expected = compute_class_weight("balanced", classes=np.arange(5), y=label)
    np.testing.assert_allclose(balanced_weights(torch.from_numpy(label), 5), expected, rtol=1e-6)


def test_balanced_weights_of_a_label_balance_positives_and_negatives() -> None:
    label = torch.tensor([[1, 0], [0, 0], [0, 1], [0, 1], [0, 1]], dtype=torch.uint8)
    weights = balanced_weights(label, 2)
    present, absent = label.sum(0), (1 - label).sum(0)
    torch.testing.assert_close(weights * present, absent.float())
    never, always = balanced_weights(torch.tensor([[0, 1]] * 9, dtype=torch.uint8), 2).tolist()
    assert np.isfinite([never, always]).all()
    assert min(never, always) > 0


# ------------------------------------------------------------------------------ optimizers

CLASSES, WIDTH = 3, 5
RATES = torch.tensor([[0.1, 0.01, 0.3], [0.02, 0.1, 0.0]])
DECAYS = torch.tensor([[0.0, 0.1, 0.01], [0.5, 0.0, 0.0]])


def _stack(shape: tuple[int, int]) -> tuple[Stack, list[list[nn.Sequential]]]:
    """A stack of different heads, and the heads themselves."""
    groups, heads_per_group = shape
    single = [
        [
            heads.build_head("linear", WIDTH, CLASSES, seed=10 * group + head)
            for head in range(heads_per_group)
        ]
        for group in range(groups)
    ]
    states = [[head.state_dict() for head in group] for group in single]
    result = Stack.from_states("linear", states, [0.0] * groups, [0] * groups)
    return result, single


@pytest.mark.parametrize(
    "config",
    [
        OptimizerConfig(optimizer="adamw"),
        OptimizerConfig(optimizer="sgd"),
        OptimizerConfig(optimizer="sgd", momentum=0.0),
    ],
    ids=["adamw", "sgd", "sgd without momentum"],
)
@pytest.mark.parametrize("scaled", [False, True], ids=["fp32", "scaled"])
@pytest.mark.parametrize("equal_rates", [False, True], ids=["own rates", "one rate"])
def test_each_head_is_updated_as_by_torchs_optimizer(
    config: OptimizerConfig, scaled: bool, equal_rates: bool
) -> None:
    rates = torch.full_like(RATES, 0.05) if equal_rates else RATES
    decays = torch.full_like(DECAYS, 0.1) if equal_rates else DECAYS
    stack, single = _stack((2, 3))
    optimizer_under_test = Optimizer(stack, config, rates, decays, scaled=scaled)
    torch_optimizers: dict[tuple[int, int], torch.optim.Optimizer] = {}
    for group, head in np.ndindex(2, 3):
        options: dict[str, Any] = {
            "lr": float(rates[group, head]),
            "weight_decay": float(decays[group, head]),
        }
        parameters = single[group][head].parameters()
        torch_optimizers[group, head] = (
            torch.optim.AdamW(parameters, **options)
            if config.optimizer == "adamw"
            else torch.optim.SGD(parameters, momentum=config.momentum, **options)
        )
    generator = torch.Generator().manual_seed(0)
    for share in (1.0, 0.5, 0.9, 0.1):
        stack.grad.copy_(torch.randn(len(stack.grad), generator=generator))
        for (group, head), optimizer in torch_optimizers.items():
            gradients = stack.state(group, head, stack.grad)
            for name, weight in single[group][head].named_parameters():
                weight.grad = gradients[name].clone()
            optimizer.param_groups[0]["lr"] = float(rates[group, head]) * share
            optimizer.step()
        if scaled:
            stack.grad.mul_(65536)
        optimizer_under_test.step(share)
    for group, head in torch_optimizers:
        result = stack.state(group, head)
        for name, weight in single[group][head].named_parameters():
            torch.testing.assert_close(result[name], weight.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("overflow", [float("inf"), float("nan")])
def test_a_step_that_overflows_is_skipped_and_halves_the_scale_of_its_head_only(
    kind: str, overflow: float
) -> None:
    config = OptimizerConfig(optimizer=kind, weight_decay=0.1)  # type: ignore[arg-type]

    def run(shape: tuple[int, int], steps: list[bool]) -> tuple[Stack, Optimizer]:
        """Take steps with equal gradients for all heads; where True, head (0, 1) overflows."""
        stack, _ = _stack(shape)
        ones = torch.ones(shape)
        optimizer = Optimizer(stack, config, ones * 0.1, ones * 0.1, scaled=True)
        generator = torch.Generator().manual_seed(0)
        for overflows in steps:
            gradient = torch.randn(CLASSES, WIDTH, generator=generator)
            stack.gradients["2.weight"].copy_(gradient.expand(*shape, -1, -1))
            stack.gradients["2.bias"].copy_(gradient[:, 0].expand(*shape, -1))
            assert optimizer.scale_GH is not None
            stack.grad.mul_(stack.expand_to_weights(optimizer.scale_GH))
            if overflows:
                stack.gradients["2.bias"][0, 1, 2] = overflow
            optimizer.step(1.0)
        return stack, optimizer

    stack, optimizer = run((2, 2), [False, True, False])
    reference, _ = run((2, 2), [False, False, False])
    assert optimizer.scale_GH is not None
    assert optimizer.scale_GH.tolist() == [[65536, 32768], [65536, 65536]]
    assert optimizer.skipped_GH.tolist() == [[0, 1], [0, 0]]
    for group, head in [(0, 0), (1, 0), (1, 1)]:
        for name, value in reference.state(group, head).items():
            assert torch.equal(stack.state(group, head)[name], value)
    # The head that overflowed equals one that never took the step.
    single, _ = _stack((2, 2))
    alone = Optimizer(
        single, config, torch.full((2, 2), 0.1), torch.full((2, 2), 0.1), scaled=False
    )
    generator = torch.Generator().manual_seed(0)
    for overflows in (False, True, False):
        gradient = torch.randn(CLASSES, WIDTH, generator=generator)
        if not overflows:
            single.gradients["2.weight"].copy_(gradient.expand(2, 2, -1, -1))
            single.gradients["2.bias"].copy_(gradient[:, 0].expand(2, 2, -1))
            alone.step(1.0)
    for name, value in single.state(0, 1).items():
        torch.testing.assert_close(stack.state(0, 1)[name], value, rtol=1e-5, atol=1e-5)


def test_the_loss_scale_doubles_after_2000_finite_steps_as_in_torch() -> None:
    stack, _ = _stack((1, 2))
    zeros = torch.zeros(1, 2)
    optimizer = Optimizer(stack, OptimizerConfig(), zeros, zeros, scaled=True)
    assert optimizer.scale_GH is not None
    for step in range(2003):
        stack.grad.zero_()
        if step == 2:
            stack.gradients["2.bias"][0, 1, 0] = float("inf")
        optimizer.step(1.0)
        if step == 1999:
            assert optimizer.scale_GH.tolist() == [[131072, 32768]]
    assert optimizer.scale_GH.tolist() == [[131072, 65536]]


@pytest.mark.parametrize("scaled", [False, True])
def test_an_optimizer_resumes_from_a_saved_state(scaled: bool) -> None:
    def new_optimizer() -> tuple[Stack, Optimizer]:
        stack, _ = _stack((2, 3))
        return stack, Optimizer(stack, OptimizerConfig(), RATES, DECAYS, scaled=scaled)

    def step_with_random_gradients(stack: Stack, optimizer: Optimizer, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            stack.grad.copy_(torch.randn(len(stack.grad), generator=generator))
            optimizer.step(1.0)

    stack, optimizer = new_optimizer()
    step_with_random_gradients(stack, optimizer, range(3))
    tensors = {name: one.clone() for name, one in optimizer.state_tensors().items()}
    theta, steps = stack.theta.clone(), optimizer.steps
    step_with_random_gradients(stack, optimizer, range(3, 6))
    again, resumed = new_optimizer()
    again.theta.copy_(theta)
    resumed.load(tensors, steps)
    step_with_random_gradients(again, resumed, range(3, 6))
    assert torch.equal(again.theta, stack.theta)
