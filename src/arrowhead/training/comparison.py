"""Whether heads that judged the same images differ by more than chance.

    trained heads, validation images  -> by_image   each head's figure, image by image
    differences, image by image       -> paired_p   p-value: exact McNemar, or sign flips
    many p-values                     -> holm       corrected for how many there are

Two heads are right and wrong on mostly the same images, so their difference is far more certain
than either figure: of 1,000 images, 10 that only one of them gets right decide (p = 0.002), though
the standard error of each accuracy is 10 images, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from arrowhead.data import splits
from arrowhead.training.batches import DistributedContext
from arrowhead.training.dataset import Data, Trial
from arrowhead.training.trainer import VALIDATION_NUMBERS, Trained, figures_by_image

if TYPE_CHECKING:
    from arrowhead.training.heads import Stack

SURE = 0.05  # p-values up to this are called a difference
EXACT = 16  # so many differing images at most are flipped in all ways: 65,536


def by_image(
    data: Data,
    trials: Sequence[Trial],
    heads: Sequence[Trained],
    groups: Sequence[Sequence[int]],
    figure: str,
    distributed: DistributedContext = DistributedContext(),
) -> NDArray[np.float64]:
    """The figure of each group of heads (the seeds of a setting) for each validation image, float64
    (groups, images); the mean of a row is the mean of the heads' figures. Same on every worker.

    trials, heads: of one stack, validated on the same rows, with the weights that are kept.
    groups: positions in them. figure: as in the heads' lines: valid_loss (nats), accuracy,
    balanced_accuracy, f1, f2. Images with one content count once, with the sum of their values.
    """
    import torch
    import torch.distributed as dist

    valid, device = trials[groups[0][0]].valid, data.feature.device
    name = "accuracy" if figure == "balanced_accuracy" else figure
    share = splits.share(len(valid), distributed.rank, distributed.world)
    value = torch.zeros(len(groups), len(valid), device=device)
    home = {head: group for group, some in enumerate(groups) for head in some}
    stacks: dict[int, list[int]] = {}  # heads that learned from the same rows: one product
    for head in home:
        stacks.setdefault(id(trials[head].train), []).append(head)
    for numbers in stacks.values():
        stack = _stack(data, trials[numbers[0]], [heads[at] for at in numbers])
        into = torch.tensor([home[at] for at in numbers], device=device)
        weight = torch.tensor([1 / len(groups[home[at]]) for at in numbers], device=device)
        size = max(16, VALIDATION_NUMBERS // stack.held(data.feature.shape[2]))
        for at in range(share.start, share.stop, size):
            here = slice(at, min(at + size, share.stop))
            rows = torch.from_numpy(valid[here])
            feature = data.feature.take((rows * data.feature.shape[1]).to(device))
            label = data.label[rows.to(data.label.device)][None]
            found = figures_by_image(stack.logits(feature[None]), label, multi=data.multi)[name]
            value[:, here].index_add_(0, into, found[0].float() * weight[:, None])
    if distributed.world > 1:
        dist.all_reduce(value)  # zero but for each worker's own images: exact
    worst = 1e30 if figure == "valid_loss" else 0.0  # of a head that diverged
    plain = np.nan_to_num(value.cpu().numpy().astype(np.float64), nan=worst, posinf=worst)
    if figure == "balanced_accuracy":
        label_N = data.label[torch.from_numpy(valid).to(data.label.device)].cpu().numpy()
        plain *= _balance(label_N)
    return _once(plain, data.key[valid])


def _stack(data: Data, trial: Trial, heads: Sequence[Trained]) -> Stack:
    """The heads as they were kept, in one lane."""
    import torch

    from arrowhead.training.heads import Stack

    device = data.feature.device
    states = [
        {name: torch.from_numpy(value).to(device) for name, value in one.state.items()}
        for one in heads
    ]
    return Stack.of(trial.config.architecture, [states], [0.0], [0], multi=data.multi)


def _balance(label_N: NDArray[np.int64]) -> NDArray[np.float64]:
    """What makes the mean over images the mean over the classes that occur, float64 (N,)."""
    counts = np.bincount(label_N)
    weight: NDArray[np.float64] = len(label_N) / (counts[label_N] * (counts > 0).sum())
    return weight


def _once(value_SN: NDArray[np.float64], key_N: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Copies of one image are no independent witnesses: one column each, scaled so that the mean
    stays.
    """
    different, where = np.unique(key_N, return_inverse=True)
    if len(different) == len(key_N):
        return value_SN
    sums: NDArray[np.float64] = np.stack([np.bincount(where, value_N) for value_N in value_SN])
    sums *= len(different) / len(key_N)
    return sums


def paired_p(difference_N: NDArray[np.float64]) -> float:
    """How likely a sum as far from 0 is if each image's difference could as well have the other
    sign: two-sided, 0 to 1.

    Of differences of one size (one head right, the other wrong) that is the exact McNemar test
    (McNemar 1947). Else the sign-flip permutation test (Fisher 1935): all ways for up to 16
    differing images, beyond that its normal limit.
    """
    differing = difference_N[np.abs(difference_N) > 1e-12]
    size, count = np.abs(differing), len(differing)
    if not count:
        return 1.0
    if np.ptp(size) <= 1e-6 * size.max():
        fewer = int(min((differing > 0).sum(), (differing < 0).sum()))
        step = np.arange(fewer)
        ways = np.concatenate([[0.0], np.cumsum(np.log((count - step) / (step + 1)))])
        return float(min(1.0, 2 * np.exp(ways - count * math.log(2)).sum()))
    total = abs(differing.sum())
    if count <= EXACT:
        sign = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
        return float((np.abs((2 * sign - 1) @ size) >= total * (1 - 1e-9)).mean())
    return math.erfc(total / math.sqrt(2 * float(np.square(differing).sum())))


def method(value_SN: NDArray[np.float64]) -> str:
    """What `paired_p` is, of these values."""
    plain = bool(np.isin(value_SN, (0.0, 1.0)).all())
    return "exact McNemar test" if plain else "paired sign-flip test"


def holm(p_M: NDArray[np.float64]) -> NDArray[np.float64]:
    """p-values corrected for their number (Holm 1979): who calls those up to 0.05 a difference is
    wrong about any of them in 5 % of cases at most.
    """
    order = np.argsort(p_M, kind="stable")
    steps = np.maximum.accumulate(p_M[order] * np.arange(len(p_M), 0, -1))
    made = np.empty(len(p_M))
    made[order] = np.minimum(steps, 1)
    return made
