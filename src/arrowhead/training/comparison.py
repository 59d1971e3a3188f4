"""Tests whether heads that predicted the same images differ by more than chance.

    trained heads, validation images  -> metric_by_image   each head's metric, image by image
    differences, image by image       -> paired_p_value    exact McNemar or sign-flip test
    many p-values                     -> holm_correction   corrected for the number of comparisons

Two heads are right and wrong on mostly the same images, so their difference is far more certain
than either metric: of 1,000 images, 10 that only one of them gets right decide (p = 0.002), though
the standard error of each accuracy is also about 10 images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.data import splits
from arrowhead.training import metrics
from arrowhead.training.batches import DistributedContext
from arrowhead.training.dataset import Data, Trial
from arrowhead.training.trainer import MAX_VALIDATION_VALUES, TrainedHead

if TYPE_CHECKING:
    from arrowhead.training.heads import Stack

SIGNIFICANCE_LEVEL = 0.05
Z_95 = 1.959964  # standard errors on each side of a 95 % interval
MAX_EXACT_IMAGES = 16  # up to this many differing images all 65,536 sign flips are computed


def metric_by_image(
    data: Data,
    trials: Sequence[Trial],
    heads: Sequence[TrainedHead],
    groups: Sequence[Sequence[int]],
    metric: str,
    distributed: DistributedContext = DistributedContext(),
) -> NDArray[np.float64]:
    """Compute a metric of each setting for each validation image; the same on every worker.

    Args:
        data: Features and labels.
        trials: The trials of one stack, validated on the same rows.
        heads: Their heads, with the weights that were kept.
        groups: For each setting, the positions of its heads (one per seed) in `heads`.
        metric: valid_loss (nats), accuracy, balanced_accuracy, f1 or f2.
        distributed: This worker's rank; all workers call this function together.

    Returns:
        float64 (settings, images). The mean of a row is the mean of the heads' metrics. Images
        with the same content count once, with the sum of their values.
    """
    import torch
    import torch.distributed as dist

    valid, device = trials[groups[0][0]].valid, data.feature.device
    name = "accuracy" if metric == "balanced_accuracy" else metric
    share = splits.rows_of(len(valid), distributed.rank, distributed.world_size)
    value = torch.zeros(len(groups), len(valid), device=device)
    group_of = {head: group for group, members in enumerate(groups) for head in members}
    stacks: dict[int, list[int]] = {}  # heads with the same training rows: one matrix product
    for head in group_of:
        stacks.setdefault(id(trials[head].train), []).append(head)
    for numbers in stacks.values():
        stack = _stack_heads(data, trials[numbers[0]], [heads[number] for number in numbers])
        target = torch.tensor([group_of[number] for number in numbers], device=device)
        weight = torch.tensor(
            [1 / len(groups[group_of[number]]) for number in numbers], device=device
        )
        size = max(16, MAX_VALIDATION_VALUES // stack.values_per_row(data.feature.shape[2]))
        for start in range(share.start, share.stop, size):
            batch = slice(start, min(start + size, share.stop))
            rows = torch.from_numpy(valid[batch])
            feature = data.feature.take((rows * data.feature.shape[1]).to(device))
            label = data.label[rows.to(data.label.device)][None]
            by_name = metrics.per_image(
                stack.logits(feature[None]), label, multilabel=data.multilabel
            )
            value[:, batch].index_add_(0, target, by_name[name][0].float() * weight[:, None])
    if distributed.world_size > 1:
        dist.all_reduce(value)  # exact: all other workers' values of an image are zero
    worst = 1e30 if metric == "valid_loss" else 0.0  # of a head that diverged
    value_SN = np.nan_to_num(value.cpu().numpy().astype(np.float64), nan=worst, posinf=worst)
    if metric == "balanced_accuracy":
        label_N = data.label[torch.from_numpy(valid).to(data.label.device)].cpu().numpy()
        value_SN *= _balancing_weights(label_N)
    return _merge_copies(value_SN, data.key[valid])


def _stack_heads(data: Data, trial: Trial, heads: Sequence[TrainedHead]) -> Stack:
    """Build a stack of trained heads, in one group."""
    import torch

    from arrowhead.training.heads import Stack

    device = data.feature.device
    states = [
        {name: torch.from_numpy(value).to(device) for name, value in one.state.items()}
        for one in heads
    ]
    return Stack.from_states(
        trial.config.architecture, [states], [0.0], [0], multilabel=data.multilabel
    )


def _balancing_weights(label_N: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return weights under which the mean over images is the mean of the classes' means."""
    counts = np.bincount(label_N)
    weight: NDArray[np.float64] = len(label_N) / (counts[label_N] * (counts > 0).sum())
    return weight


def _merge_copies(value_SN: NDArray[np.float64], key_N: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Merge copies of an image into one column, since they are not independent samples.

    The columns are scaled so that the mean of a row stays the same.
    """
    different, column = np.unique(key_N, return_inverse=True)
    if len(different) == len(key_N):
        return value_SN
    sums: NDArray[np.float64] = np.stack([np.bincount(column, value_N) for value_N in value_SN])
    sums *= len(different) / len(key_N)
    return sums


def half_width(value_N: NDArray[np.float64]) -> float:
    """Half of the 95 % interval of a mean, by the normal approximation; nan for one value."""
    if len(value_N) < 2:
        return float("nan")
    return float(Z_95 * value_N.std(ddof=1) / np.sqrt(len(value_N)))


def paired_p_value(difference_N: NDArray[np.float64]) -> float:
    """Return the two-sided p-value of the hypothesis that each difference's sign is random.

    If all differences have one size (one head right, the other wrong), this is the exact McNemar
    test (McNemar 1947), else the sign-flip permutation test (Fisher 1935): exact for up to 16
    differing images, beyond that with the normal approximation.

    Args:
        difference_N: The difference between two heads' values of each image.
    """
    differing = difference_N[np.abs(difference_N) > 1e-12]
    size, count = np.abs(differing), len(differing)
    if not count:
        return 1.0
    if np.ptp(size) <= 1e-6 * size.max():
        fewer = int(min((differing > 0).sum(), (differing < 0).sum()))
        k = np.arange(fewer)
        log_binomials = np.concatenate([[0.0], np.cumsum(np.log((count - k) / (k + 1)))])
        return float(min(1.0, 2 * np.exp(log_binomials - count * math.log(2)).sum()))
    total = abs(differing.sum())
    if count <= MAX_EXACT_IMAGES:
        sign = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
        return float((np.abs((2 * sign - 1) @ size) >= total * (1 - 1e-9)).mean())
    return math.erfc(total / math.sqrt(2 * float(np.square(differing).sum())))


def brier_by_image(prob_NC: NDArray[Any], label: NDArray[Any]) -> NDArray[np.float64]:
    """The Brier score of each image: the summed squared error of its probabilities, 0 to 2; with
    several labels per image the mean over labels (Brier 1950).
    """
    if label.ndim == 2:
        score: NDArray[np.float64] = np.square(prob_NC - label, dtype=np.float64).mean(1)
        return score
    target = np.eye(prob_NC.shape[1])[label]
    total: NDArray[np.float64] = np.square(prob_NC - target).sum(1)
    return total


def test_name(value_SN: NDArray[np.float64]) -> str:
    """Return the name of the test that `paired_p_value` makes of these values."""
    right_or_wrong = bool(np.isin(value_SN, (0.0, 1.0)).all())
    return "exact McNemar test" if right_or_wrong else "paired sign-flip test"


def holm_correction(p_M: NDArray[np.float64]) -> NDArray[np.float64]:
    """Correct p-values for their number (Holm 1979).

    Whoever calls those up to 0.05 significant is wrong about any of them in at most 5 % of cases.
    """
    order = np.argsort(p_M, kind="stable")
    steps = np.maximum.accumulate(p_M[order] * np.arange(len(p_M), 0, -1))
    corrected = np.empty(len(p_M))
    corrected[order] = np.minimum(steps, 1)
    return corrected
