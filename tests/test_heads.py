"""Heads in a stack equal plain torch modules, padding rows have no effect, and the dropout of a row
does not depend on its worker.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from arrowhead.training import heads
from arrowhead.training.heads import BatchSlice, Stack, Standardize

KINDS = ["linear", "lesson"]
WIDTH = 7

pytestmark = pytest.mark.usefixtures("one_thread")


def _heads(kind: str, classes: int, groups: int, heads_per_group: int) -> list[list[nn.Sequential]]:
    """Heads with different weights; those of a group share the mean and deviation."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for group in range(groups):
        result.append(
            [
                heads.build_head(kind, WIDTH, classes, seed=group * heads_per_group + n)
                for n in range(heads_per_group)
            ]
        )
        mean = torch.randn(WIDTH, generator=generator)
        deviation = torch.rand(WIDTH, generator=generator) + 0.5
        for head in result[-1]:
            if isinstance(head[0], Standardize):
                head[0].mean.copy_(mean)
                head[0].deviation.copy_(deviation)
            for part in head:
                if isinstance(part, nn.Dropout):
                    part.p = 0.0
    return result


def _stack(kind: str, single: list[list[nn.Sequential]], *, multi: bool = False) -> Stack:
    states = [[head.state_dict() for head in group] for group in single]
    return Stack.from_states(kind, states, [0.0] * len(states), [0] * len(states), multilabel=multi)


def _batch(groups: int, rows: int) -> Tensor:
    features = np.random.default_rng(1).normal(size=(groups, rows, WIDTH)).astype(np.float16)
    return torch.from_numpy(features)


def _centre_logits(logit_CB: Tensor, *, multi: bool) -> Tensor:
    """Centre single-label logits, because a constant added to all of them has no effect."""
    return logit_CB if multi else logit_CB - logit_CB.mean(-2, keepdim=True)


# ------------------------------------------------------------------------------ one head


def test_the_lesson_head_has_the_layers_of_fastais_lesson() -> None:
    parts = [type(part) for part in heads.build_head("lesson", 16, 3)]
    norm, drop = nn.BatchNorm1d, nn.Dropout
    assert parts == [norm, drop, nn.Linear, nn.ReLU, norm, drop, nn.Linear]


@pytest.mark.parametrize("kind", KINDS)
def test_initial_weights_depend_only_on_the_seed(kind: str) -> None:
    def weights(seed: int) -> Tensor:
        return nn.utils.parameters_to_vector(heads.build_head(kind, 5, 3, seed=seed).parameters())

    torch.manual_seed(1)
    first = weights(3)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)  # the caller's generator was not used up
    assert torch.equal(weights(3), first)
    assert not torch.equal(weights(4), first)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("multi", [False, True])
def test_a_head_taken_from_a_stack_gives_the_same_logits(
    kind: str, classes: int, multi: bool
) -> None:
    stack = _stack(kind, _heads(kind, classes, 2, 3), multi=multi)
    feature = _batch(2, 9)
    logit = stack.logits(feature)
    assert logit.shape == (2, 3, classes, 9)
    for group, head in np.ndindex(2, 3):
        single = heads.restore_head(kind, WIDTH, classes, stack.state(group, head))
        assert not single.training
        with torch.inference_mode():
            expected = single(feature[group].float()).mT
        result = _centre_logits(logit[group, head], multi=multi)
        torch.testing.assert_close(
            result, _centre_logits(expected, multi=multi), rtol=1e-5, atol=1e-5
        )
    same = stack.logits(feature[:1])  # one batch for all groups
    torch.testing.assert_close(same[0], logit[0])
    torch.testing.assert_close(same[1], stack.logits(feature[:1].expand(2, -1, -1))[1])


# ------------------------------------------------------------------------------- a stack


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(
    ("groups", "heads_per_group", "rows"), [(1, 1, 2), (1, 1, 1), (2, 3, 20), (2, 5, 3), (1, 6, 6)]
)
def test_logits_gradients_and_statistics_equal_autograds_for_each_head(
    kind: str, multi: bool, classes: int, groups: int, heads_per_group: int, rows: int
) -> None:
    single = _heads(kind, classes, groups, heads_per_group)
    stack = _stack(kind, single, multi=multi)
    feature = _batch(groups, rows)
    logit = stack.logits(feature, BatchSlice(0, 0, rows))
    gradient = torch.randn(logit.shape, generator=torch.Generator().manual_seed(2))
    if not multi:
        gradient -= gradient.mean(2, keepdim=True)  # as every loss of one label has it
    stack.backward(gradient.clone())
    if kind == "lesson" and rows == 1:  # torch's batch norm refuses it; a store may have it
        assert stack.grad.isfinite().all()
        return
    for group, number in np.ndindex(groups, heads_per_group):
        head = single[group][number].train()
        plain = head(feature[group].float()).mT
        plain.backward(gradient[group, number])
        result = _centre_logits(logit[group, number], multi=multi)
        expected = _centre_logits(plain.detach(), multi=multi)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
        gradients = stack.state(group, number, stack.grad)
        for name, weight in head.named_parameters():
            torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-4, atol=1e-4)
        for name, buffer in head.named_buffers():
            torch.testing.assert_close(stack.state(group, number)[name], buffer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [2, 3])
def test_a_worker_without_rows_of_a_batch_contributes_no_gradient(kind: str, classes: int) -> None:
    stack = _stack(kind, _heads(kind, classes, 2, 3))
    stack.grad.fill_(1)
    if kind == "linear":  # alone: the lesson's statistics would be those of no row at all
        logit = stack.logits(_batch(2, 0), BatchSlice(0, 3, 3))
        assert logit.shape == (2, 3, classes, 0)
        stack.backward(logit)
        assert not stack.grad.any()
    assert stack.logits(_batch(2, 0)).shape == (2, 3, classes, 0)


@pytest.mark.parametrize("kind", KINDS)
@given(counts=st.lists(st.integers(2, 8), min_size=2, max_size=4))
@settings(deadline=None, max_examples=15)
def test_padding_rows_change_nothing(kind: str, counts: list[int]) -> None:
    groups, rows = len(counts), max(counts)
    single = _heads(kind, 3, groups, 2)
    stack = _stack(kind, single)
    feature = _batch(groups, rows)
    valid = torch.arange(rows) < torch.tensor(counts)[:, None]
    stack.logits(feature, BatchSlice(0, 0, rows), valid)
    gradient = torch.ones(groups, 2, 3, rows)
    gradient[:, :, 0] = -2
    stack.backward(gradient * valid[:, None, None])
    for group, count in enumerate(counts):
        alone = _stack(kind, [single[group]])
        alone.logits(feature[group : group + 1, :count], BatchSlice(0, 0, count))
        alone.backward(gradient[group : group + 1, :, :, :count].clone())
        for head in range(2):
            for flat, own in ((stack.grad, alone.grad), (None, None)):
                expected = alone.state(0, head, own)
                for name, value in stack.state(group, head, flat).items():
                    torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_flat_tensors_of_a_stack_can_be_split_by_parameter_and_head(kind: str) -> None:
    single = _heads(kind, 3, 2, 3)
    stack = _stack(kind, single)
    for group, head in np.ndindex(2, 3):
        for name, value in single[group][head].state_dict().items():
            assert torch.equal(stack.state(group, head)[name], value)
    numbers = stack.expand_to_weights(torch.arange(6.0).view(2, 3))
    for group, head in np.ndindex(2, 3):
        own = stack.state(group, head, numbers)
        assert all((own[name] == 3 * group + head).all() for name in stack.parameter_names)
    picked = torch.tensor([[4, 0]])
    some = stack.select_heads(stack.theta, picked)
    fewer = _stack(kind, [[single[1][1], single[0][0]]])
    assert torch.equal(some, fewer.theta)
    flat = stack.theta.clone()
    stack.unflatten(flat)[stack.parameter_names[0]][1, 2].view(-1)[0] = float("nan")
    stack.unflatten(flat)[stack.parameter_names[-1]][0, 1, 0] = float("-inf")
    assert stack.finite_heads(flat).tolist() == [[True, False, True], [True, True, False]]
    assert stack.finite_heads(stack.theta).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_copied_from_a_stack_does_not_change_later(kind: str) -> None:
    stack = _stack(kind, _heads(kind, 2, 1, 1))
    taken = stack.state(0, 0)
    before = {name: value.clone() for name, value in taken.items()}
    stack.theta.add_(1)
    for buffer in stack.buffers.values():
        buffer.add_(1)
    assert all(torch.equal(taken[name], value) for name, value in before.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_with_nan_weights_does_not_affect_the_others(kind: str) -> None:
    single = _heads(kind, 2, 2, 2)
    feature, folder = _batch(2, 6), BatchSlice(0, 0, 6)
    gradient = torch.ones(2, 2, 2, 6)
    gradient[:, :, 0] = -1
    well, broken = _stack(kind, single), _stack(kind, single)
    for part in broken.parameters.values():
        part[0, 1] = float("nan")
    logits = []
    for stack in (well, broken):
        logits.append(stack.logits(feature, folder))
        stack.backward(gradient.clone())
    assert logits[1][0, 1, 1].isnan().all()
    for group, head in [(0, 0), (1, 0), (1, 1)]:
        torch.testing.assert_close(logits[1][group, head], logits[0][group, head])
        for name, value in well.state(group, head, well.grad).items():
            torch.testing.assert_close(broken.state(group, head, broken.grad)[name], value)


# ------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(share: float) -> None:
    mask = heads.dropout_mask(1, 0, BatchSlice(3, 0, 400), 400, 50, share)
    assert mask.dtype == torch.float32
    assert float((mask == 0).double().mean()) == pytest.approx(share, abs=0.02)
    assert float(mask.mean()) == pytest.approx(1, abs=0.06)
    assert mask.unique().tolist() == pytest.approx([0, 1 / (1 - share)])


@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 99), st.integers(0, 1))
@settings(deadline=None, max_examples=40)
def test_the_dropout_mask_does_not_depend_on_the_number_of_workers(
    rows: int, world: int, step: int, layer: int
) -> None:
    full = heads.dropout_mask(5, layer, BatchSlice(step, 0, rows), rows, 6, 0.5)
    thresholds = [rows * rank // world for rank in range(world + 1)]
    parts = [
        heads.dropout_mask(5, layer, BatchSlice(step, start, rows), stop - start, 6, 0.5)
        for start, stop in pairwise(thresholds)
    ]
    assert torch.equal(torch.cat(parts), full)


def test_each_seed_layer_and_step_has_its_own_dropout_mask() -> None:
    result = [
        heads.dropout_mask(seed, layer, BatchSlice(step, 0, 20), 20, 20, 0.5)
        for seed in range(2)
        for layer in range(2)
        for step in range(2)
    ]
    for number, one in enumerate(result):
        for other in result[:number]:
            assert 0.3 < float((one == other).double().mean()) < 0.7


@pytest.mark.parametrize("kind", KINDS)
def test_each_group_has_its_own_dropout_and_only_while_training(kind: str) -> None:
    single = _heads(kind, 3, 1, 1)
    state = single[0][0].state_dict()
    feature = _batch(1, 50).expand(3, -1, -1)
    stack = Stack.from_states(kind, [[state]] * 3, [0.0, 0.5, 0.5], [0, 0, 1])
    still = stack.logits(feature)
    torch.testing.assert_close(still[1:], still[:1].expand(2, -1, -1, -1))
    result = stack.logits(feature, BatchSlice(0, 0, 50))
    torch.testing.assert_close(
        result[0],
        Stack.from_states(kind, [[state]], [0.0], [0]).logits(feature[:1], BatchSlice(0, 0, 50))[0],
    )
    for one, other in [(0, 1), (0, 2), (1, 2)]:
        assert not torch.allclose(result[one], result[other], atol=1e-3)
    again = Stack.from_states(kind, [[state]], [0.5], [1]).logits(feature[:1], BatchSlice(0, 0, 50))
    torch.testing.assert_close(again[0], result[2])
