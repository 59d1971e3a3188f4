"""Many heads in one pass: a grid of settings, trials of a stack, and its summary."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.errors import ConfigError
from arrowhead.training import comparison
from arrowhead.training.config import TrainConfig
from arrowhead.training.dataset import Data, Trial
from arrowhead.training.trainer import Trained
from arrowhead.wording import counted

GRID_SETTINGS = {
    "rate": "geometric",
    "weight_decay": "geometric",
    "dropout": "even",
    "seed": "whole",
}
MAX_GRID_SIZE = 4096
Lines = Sequence[list[dict[str, float]]]
Judge = Callable[[Sequence[Sequence[int]]], NDArray[np.float64]]
"""Groups of heads to their values, image by image: see `comparison.by_image`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig:
    """Many heads on the same features, in one pass."""

    grid: str | None = None
    """All combinations of these, such as "rate=1e-4..1e-1:16 weight_decay=0,1e-2 dropout=0,0.5
    seed=0,1,2". LOW..HIGH:N is N values, by equal factors (dropout: equal steps). The best head
    becomes the bundle."""
    halving: bool = False
    """Of a grid, the worse half of the settings stops after a quarter of the epochs, and again
    after half of them."""
    folds: int = 0
    """Also train on all but one of N parts, N times: a probability for every image from a head
    that has not seen it."""
    learning_curve: bool = False
    """Also train on 5, 10, 20, 50 and 100 % of the images: would more of them help?"""
    curve_seeds: int = 3
    """Heads per share of the learning curve, each with another seed; of logistic regression each
    with other images, but one with all of them."""

    def __post_init__(self) -> None:
        if self.folds < 0 or self.folds == 1 or self.folds > 100:
            raise ConfigError(f"--folds is {self.folds}.", "0 (none), or 2 to 100.", "give 5.")
        if self.halving and not self.grid:
            raise ConfigError("--halving has no --grid.", "a grid to halve.", "add --grid.")
        if self.curve_seeds != 3 and not self.learning_curve:
            raise ConfigError(
                f"--curve-seeds {self.curve_seeds} has no --learning-curve.",
                "a learning curve with so many heads per share.",
                "add --learning-curve, or leave --curve-seeds out.",
            )
        if not 1 <= self.curve_seeds <= 100:
            raise ConfigError(
                f"--curve-seeds is {self.curve_seeds}.", "1 to 100.", "give another --curve-seeds."
            )
        if self.grid:
            settings(self.grid)


def settings(words: str) -> list[dict[str, float]]:
    """Every combination in a grid, the first knob slowest: "rate=1e-3,1e-2 seed=0,1" gives four.

    Raises ConfigError for a knob that does not exist or that heads of one stack must share.
    """
    values: dict[str, list[float]] = {}
    for word in words.split():
        name, _, listed = word.partition("=")
        name = name.replace("-", "_")
        if name not in GRID_SETTINGS or name in values or not listed:
            raise ConfigError(
                f"--grid has {word!r}.",
                f"NAME=VALUES, each NAME once, of {', '.join(GRID_SETTINGS)} (heads of one pass"
                " share all else).",
                'write e.g. --grid "rate=1e-4..1e-1:16 dropout=0,0.5 seed=0,1,2".',
            )
        values[name] = [value for part in listed.split(",") for value in _values(name, part)]
    count = math.prod(len(some) for some in values.values())
    if not values or count > MAX_GRID_SIZE:
        raise ConfigError(
            f"--grid makes {counted(count, 'head') if values else 'no heads'}.",
            f"1 to {MAX_GRID_SIZE} in one pass.",
            "give fewer values.",
        )
    return [dict(zip(values, some, strict=True)) for some in itertools.product(*values.values())]


def _values(name: str, words: str) -> list[float]:
    """One value, or LOW..HIGH:N."""
    low, dots, rest = words.partition("..")
    high, colon, count = rest.partition(":")
    try:
        if not dots:
            made = [float(words)]
        elif GRID_SETTINGS[name] == "whole" and not colon:
            made = [float(n) for n in range(int(low), int(high) + 1)]
        else:
            if GRID_SETTINGS[name] == "geometric" and not 0 < float(low) <= float(high):
                raise ValueError
            space = np.geomspace if GRID_SETTINGS[name] == "geometric" else np.linspace
            made = [float(f"{x:.6g}") for x in space(float(low), float(high), int(count))]
        if not made or (
            GRID_SETTINGS[name] == "whole" and any(value != int(value) for value in made)
        ):
            raise ValueError
    except (ValueError, OverflowError) as error:
        raise ConfigError(
            f"--grid has {words!r} for {name}.",
            "a number, or LOW..HIGH:N"
            + (" above 0" if GRID_SETTINGS[name] == "geometric" else "")
            + (" (whole numbers)" if GRID_SETTINGS[name] == "whole" else "")
            + ".",
            f"write e.g. {name}={'0,1,2' if name == 'seed' else '0.1..0.5:3'}.",
        ) from error
    return [int(value) if GRID_SETTINGS[name] == "whole" else value for value in made]


def trials(data: Data, config: TrainConfig, rate: float, grid: str | None) -> list[Trial]:
    """The heads of a grid (one without), over the training split. rate: where the grid has none."""
    made = []
    for overrides in settings(grid) if grid else [{}]:
        own: dict[str, Any] = dict(overrides)
        one = replace(config, **({"rate": rate} | own))
        made.append(Trial(config=one, rate=float(one.rate), train=data.train, valid=data.valid))
    return made


def loser_of(
    overrides: Sequence[Mapping[str, float]], config: TrainConfig
) -> Callable[[int, Sequence[int], Lines], set[int]]:
    """For `train_stack`: the worse half of the settings, after a quarter and half of the epochs.

    Successive halving (Jamieson & Talwalkar, arXiv:1502.07943). Seeds of a setting go together.
    """
    rungs = {math.ceil(config.total_epochs / 4), math.ceil(config.total_epochs / 2)}

    def losers(done: int, numbers: Sequence[int], lines: Lines) -> set[int]:
        if done not in rungs:
            return set()
        groups = _groups([overrides[number] for number in numbers])
        ranked = sorted(
            groups, key=lambda group: _mean([lines[numbers[at]][-1] for at in group], config)
        )
        return {numbers[at] for group in ranked[(len(ranked) + 1) // 2 :] for at in group}

    return losers


def _groups(overrides: Sequence[Mapping[str, float]]) -> list[list[int]]:
    """Positions that differ in their seed only."""
    groups: dict[Any, list[int]] = {}
    for at, one in enumerate(overrides):
        groups.setdefault(tuple((k, v) for k, v in one.items() if k != "seed"), []).append(at)
    return list(groups.values())


def _mean(lines: Sequence[Mapping[str, float]], config: TrainConfig) -> tuple[float, float]:
    """What settings are ranked by, lower is better: the figure named, then the loss."""
    name = figure(config)
    sign = 1 if name == "valid_loss" else -1
    pair = [
        float(np.mean([_worst(line[name], sign) for line in lines])) * sign,
        float(np.mean([_worst(line["valid_loss"], 1) for line in lines])),
    ]
    return pair[0], pair[1]


def _worst(value: float, sign: int) -> float:
    """A head that has diverged ranks last."""
    return value if math.isfinite(value) else 1e30 * sign


def figure(config: TrainConfig) -> str:
    """The figure that heads are compared by: --best, or accuracy."""
    return "accuracy" if config.best == "last" else config.best


def summary(
    overrides: Sequence[Mapping[str, float]],
    heads: Sequence[Trained],
    config: TrainConfig,
    judge: Judge,
) -> dict[str, Any]:
    """Settings ranked by the figure asked for; seeds together.

    judge: gives the values of settings, image by image. Returns `figure`; `settings` [{knobs,
    heads, seeds, mean, spread, valid_loss, epochs, stopped, p}], the best first; `best`, the head
    to keep; `test`; `alike`, how many settings cannot be told from the best; and `words`.

    p: of the difference from the best setting, paired by image (see `comparison.paired_p`) and
    corrected for the number of settings compared; None for the best itself, and for settings that
    --halving stopped: their figures are of a head in mid-schedule, so they rank below all that
    finished, those that came further first, and nothing is claimed of them.
    """
    name, lines = figure(config), [one.epochs[one.epoch] for one in heads]

    def rank(group: Sequence[int]) -> tuple[float, ...]:
        stopped = any(heads[at].stopped == "halving" for at in group)
        reached = min(len(heads[at].epochs) for at in group) if stopped else 0
        return stopped, -reached, *_mean([lines[at] for at in group], config)

    ranked = sorted(_groups(overrides), key=rank)
    table: list[dict[str, Any]] = []
    for group in ranked:
        values = [lines[at][name] for at in group]
        table.append(
            {
                "knobs": {k: v for k, v in overrides[group[0]].items() if k != "seed"},
                "heads": group,
                "seeds": [int(overrides[at].get("seed", config.seed)) for at in group],
                "mean": float(np.mean(values)),
                "spread": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                "valid_loss": float(np.mean([lines[at]["valid_loss"] for at in group])),
                "epochs": min(len(heads[at].epochs) for at in group),
                "stopped": any(heads[at].stopped == "halving" for at in group),
                "p": None,
            }
        )
    finished = [row for row in table if not row["stopped"]]
    test, images = None, 0
    if len(finished) > 1:
        value_SN = judge([row["heads"] for row in finished])
        test, images = comparison.method(value_SN), value_SN.shape[1]
        found = [comparison.paired_p(value_SN[0] - value_N) for value_N in value_SN[1:]]
        for row, p in zip(finished[1:], comparison.holm(np.array(found)), strict=True):
            row["p"] = float(p)
    return {
        "figure": name,
        "settings": table,
        "best": min(ranked[0], key=lambda at: _mean([lines[at]], config)),
        "test": test,
        "alike": sum(row["p"] > comparison.SURE for row in finished[1:]) if test else None,
        "words": _verdict(table, finished, f"{test} on the same {images} validation images"),
    }


def _verdict(
    table: Sequence[Mapping[str, Any]], finished: Sequence[Mapping[str, Any]], test: str
) -> str:
    """What the ranking is worth, in words."""
    if len(table) == 1:
        return "one setting: nothing to compare"
    stopped = len(table) - len(finished)
    note = f"; {stopped} stopped early and cannot be compared" if stopped else ""
    if len(finished) == 1:
        return f"one setting was trained to the end: nothing to compare{note}"
    if len(table[0]["seeds"]) == 1:
        note += "; one seed each, another seed may rank them otherwise"
    p_values = [row["p"] for row in finished[1:]]
    alike = sum(p > comparison.SURE for p in p_values)
    others = f"{len(p_values)} other setting{'s' if len(p_values) > 1 else ''}"
    if len(p_values) > 1:
        test += f", corrected for {len(p_values)} comparisons (Holm)"
    if not alike:
        return (
            f"the best is distinguishable from the {others} (p at most {max(p_values):.2g}: {test})"
            f"{note}"
        )
    least = min(p for p in p_values if p > comparison.SURE)
    return (
        f"the best is not distinguishable from {alike} of the {others} (p at least {least:.2g}:"
        f" {test}){note}"
    )


def words(overrides: Mapping[str, float]) -> str:
    """A setting as one writes it in a grid."""
    return " ".join(f"{name}={value:.6g}" for name, value in overrides.items()) or "as given"
