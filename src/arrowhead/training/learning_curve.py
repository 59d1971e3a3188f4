"""A learning curve: heads trained on nested shares of the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.training import comparison, cross_validation, grid
from arrowhead.training.config import TrainConfig
from arrowhead.training.dataset import Data, Trial
from arrowhead.training.grid import Judge
from arrowhead.training.trainer import Trained

SHARES = (0.05, 0.1, 0.2, 0.5, 1.0)


def share_trials(data: Data, config: TrainConfig, seeds: int) -> list[tuple[float, Trial]]:
    """Heads on growing shares of the training images, each share containing the one before, with
    every class alike and present; all take the same number of steps. Shares without two images or
    without one of each class are left out. config: with a learning rate.

    Heads of one share differ by their seeds. In logistic regression nothing is drawn: there they
    differ by their images, and all images have one head.
    """
    if config.head == "logistic":
        draws = [_shares(data, draw) for draw in range(seeds)]
        return [
            (share, Trial(config=config, rate=0.0, train=rows, valid=data.valid))
            for share in SHARES
            if all(share in one for one in draws)
            for rows in [one[share] for one in (draws if share < 1 else draws[:1])]
        ]
    rate = cross_validation.rate_of(config)
    trials = []
    for share, rows in _shares(data, 0).items():
        for seed in range(seeds):
            one = replace(config, seed=config.seed + seed)
            trials.append((share, Trial(config=one, rate=rate, train=rows, valid=data.valid)))
    return trials


def _shares(data: Data, draw: int) -> dict[float, NDArray[np.int64]]:
    """Nested rows of the training images by share, see `share_trials`. Draw 0 takes each class in
    an order of contents, others in an order drawn from that one.
    """
    label = data.label[data.train].cpu().numpy()
    place = np.empty(len(label))
    stratum = cross_validation.stratum(label)
    for rows in (np.flatnonzero(stratum == one) for one in np.unique(stratum)):
        order = np.argsort(
            cross_validation.mixed(data.key[data.train[rows]], "shares"), kind="stable"
        )
        if draw:
            order = np.random.default_rng(draw).permutation(order)
        place[rows[order]] = (np.arange(len(rows)) + 0.5) / len(rows)
        place[rows[order[0]]] = 0  # every share has one
    made = {}
    for share in SHARES:
        rows = data.train[place < share]
        there = label[place < share]
        seen = there.any(0).sum() if data.multi else len(np.unique(there))
        if len(rows) >= 2 and seen == len(data.classes):
            made[share] = rows
    return made


def curve(
    shares: Sequence[tuple[float, Trial]],
    heads: Sequence[Trained],
    config: TrainConfig,
    judge: Judge,
) -> dict[str, Any]:
    """The learning curve: `points` [{share, images, mean, spread, values}], `figure`, `words`, and
    `p` of the difference between the last two points, paired by image (None with fewer points).
    """
    name, lines = grid.figure(config), [one.epochs[one.epoch] for one in heads]
    points: list[dict[str, Any]] = []
    groups: list[list[int]] = []
    for share in dict.fromkeys(share for share, _ in shares):
        at = [i for i, (one, _) in enumerate(shares) if one == share]
        values = [lines[i][name] for i in at]
        groups.append(at)
        points.append(
            {
                "share": share,
                "images": len(shares[at[0]][1].train),
                "mean": float(np.mean(values)),
                "spread": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                "values": values,
            }
        )
    made = {"figure": name, "points": points, "p": None, "words": "too few images for a curve"}
    if len(points) < 2:
        return made
    value_SN = judge(groups[-2:])
    p = comparison.paired_p(value_SN[1] - value_SN[0])
    test = f"{comparison.method(value_SN)} on the same {value_SN.shape[1]} validation images"
    return made | {"p": p, "words": _more(points[-2], points[-1], name, p, test)}


def _more(
    before: Mapping[str, Any], last: Mapping[str, Any], name: str, p: float, test: str
) -> str:
    """Whether the last doubling of the images paid, in words."""
    gain = (last["mean"] - before["mean"]) * (-1 if name == "valid_loss" else 1)
    moved = "got better" if gain > 0 else "got worse" if gain < 0 else "moved"
    span = f"from {before['images']} to {last['images']} images {name} {moved} by {abs(gain):.4f}"
    if gain > 0 and p <= comparison.SURE:
        return f"{span} (p = {p:.2g}, {test}): more images would probably help"
    return f"{span} (p = {p:.2g}, {test}): it cannot be said that more would help"
