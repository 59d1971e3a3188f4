"""Learning curves: heads trained on nested shares of the training images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.training import comparison, cross_validation, grid
from arrowhead.training.config import TrainConfig
from arrowhead.training.dataset import Data, Trial
from arrowhead.training.grid import MetricByImage
from arrowhead.training.trainer import TrainedHead

SHARES = (0.05, 0.1, 0.2, 0.5, 1.0)


def share_trials(data: Data, config: TrainConfig, seeds: int) -> list[tuple[float, Trial]]:
    """Return trials on growing shares of the training images.

    Each share contains the one before, with the same share of every class and at least one image
    of each; shares without two images or without a class are left out. All trials take the same
    number of steps.

    The heads of a share differ by their seeds. Logistic regression draws nothing at random: there
    they differ by their images, and the full share has a single head.

    Args:
        data: Features and labels.
        config: The settings, with a learning rate.
        seeds: The number of heads per share.
    """
    if config.head == "logistic":
        draws = [nested_rows(data, draw) for draw in range(seeds)]
        return [
            (share, Trial(config=config, lr=0.0, train=rows, valid=data.valid))
            for share in SHARES
            if all(share in one for one in draws)
            for rows in [one[share] for one in (draws if share < 1 else draws[:1])]
        ]
    lr = cross_validation.learning_rate(config)
    trials = []
    for share, rows in nested_rows(data, 0).items():
        for seed in range(seeds):
            seeded = replace(config, seed=config.seed + seed)
            trials.append((share, Trial(config=seeded, lr=lr, train=rows, valid=data.valid)))
    return trials


def nested_rows(data: Data, draw: int) -> dict[float, NDArray[np.int64]]:
    """Return the rows of each share (see `share_trials`).

    Draw 0 orders the images of a class by content; other draws shuffle that order.
    """
    label = data.label[data.train].cpu().numpy()
    quantile = np.empty(len(label))  # an image is in the shares above its quantile
    stratum = cross_validation.strata(label)
    for rows in (np.flatnonzero(stratum == one) for one in np.unique(stratum)):
        order = np.argsort(
            cross_validation.shuffle_keys(data.key[data.train[rows]], "shares"), kind="stable"
        )
        if draw:
            order = np.random.default_rng(draw).permutation(order)
        quantile[rows[order]] = (np.arange(len(rows)) + 0.5) / len(rows)
        quantile[rows[order[0]]] = 0  # every share has one image of the class
    nested = {}
    for share in SHARES:
        rows = data.train[quantile < share]
        labels = label[quantile < share]
        present = labels.any(0).sum() if data.multilabel else len(np.unique(labels))
        if len(rows) >= 2 and present == len(data.classes):
            nested[share] = rows
    return nested


def curve(
    shares: Sequence[tuple[float, Trial]],
    heads: Sequence[TrainedHead],
    config: TrainConfig,
    metric_by_image: MetricByImage,
) -> dict[str, Any]:
    """Summarize the heads of `share_trials` as a learning curve.

    Returns:
        `points` [{share, images, mean, spread, values}]; `figure`, the metric; `p`, the p-value of
        the difference between the last two points, paired by image (None with fewer points); and
        `words`, what it means.
    """
    metric = grid.selection_metric(config)
    results = [one.epochs[one.epoch] for one in heads]
    points: list[dict[str, Any]] = []
    groups: list[list[int]] = []
    for share in dict.fromkeys(share for share, _ in shares):
        group = [i for i, (one, _) in enumerate(shares) if one == share]
        values = [results[i][metric] for i in group]
        groups.append(group)
        points.append(
            {
                "share": share,
                "images": len(shares[group[0]][1].train),
                "mean": float(np.mean(values)),
                "spread": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                "values": values,
            }
        )
    summary = {"figure": metric, "points": points, "p": None, "words": "too few images for a curve"}
    if len(points) < 2:
        return summary
    value_SN = metric_by_image(groups[-2:])
    p = comparison.paired_p_value(value_SN[1] - value_SN[0])
    test = f"{comparison.test_name(value_SN)} on the same {value_SN.shape[1]} validation images"
    return summary | {"p": p, "words": _describe_gain(points[-2], points[-1], metric, p, test)}


def _describe_gain(
    before: Mapping[str, Any], last: Mapping[str, Any], metric: str, p: float, test: str
) -> str:
    """Describe what the last increase of the number of images gained."""
    gain = (last["mean"] - before["mean"]) * (-1 if metric == "valid_loss" else 1)
    change = "improves" if gain > 0 else "worsens" if gain < 0 else "changes"
    span = (
        f"from {before['images']} to {last['images']} images {metric} {change} by {abs(gain):.4f}"
    )
    if gain > 0 and p <= comparison.SIGNIFICANCE_LEVEL:
        return f"{span} (p = {p:.2g}, {test}): more images would probably help"
    return f"{span} (p = {p:.2g}, {test}): the data do not show that more images would help"
