"""Grids: many settings trained as one stack, their ranking, and successive halving.

scikit-learn, Optuna and Ray Tune train one model per trial; here all trials share each pass over
the features, and the ranking says which settings differ significantly.
"""

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
from arrowhead.training.trainer import StopRule, TrainedHead
from arrowhead.wording import pluralize

# The settings that heads of one stack can differ in, and how LOW..HIGH:N spaces their values.
GRID_SETTINGS = {
    "rate": "geometric",
    "weight_decay": "geometric",
    "dropout": "linear",
    "seed": "integer",
}
MAX_GRID_SIZE = 4096
DIVERGED = 1e30  # stands for the loss of a head that diverged, so that it ranks last
MetricByImage = Callable[[Sequence[Sequence[int]]], NDArray[np.float64]]
"""From groups of heads to their metrics, image by image: see `comparison.metric_by_image`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig:
    """Many heads on the same features, trained together."""

    grid: str | None = None
    """All combinations of these values, such as "rate=1e-4..1e-1:16 weight_decay=0,1e-2
    dropout=0,0.5 seed=0,1,2". LOW..HIGH:N gives N values in geometric steps (dropout: linear
    steps). The best head becomes the bundle."""
    halving: bool = False
    """With --grid: stop the worse half of the settings after a quarter of the epochs, and again
    after half of them."""
    folds: int = 0
    """Also train N heads, each on all but one of N folds: this gives every image a probability from
    a head that was not trained on it."""
    learning_curve: bool = False
    """Also train on 5, 10, 20, 50 and 100 % of the images, to show whether more images would
    help."""
    curve_seeds: int = 3
    """Heads per share of the learning curve, each with another seed; with logistic regression each
    with other images, and a single one with all images."""

    def __post_init__(self) -> None:
        if self.folds < 0 or self.folds == 1 or self.folds > 100:
            raise ConfigError(f"--folds is {self.folds}.", "0 (none), or 2 to 100.", "give 5.")
        if self.halving and not self.grid:
            raise ConfigError("--halving has no --grid.", "a grid to halve.", "add --grid.")
        if self.curve_seeds != 3 and not self.learning_curve:
            raise ConfigError(
                f"--curve-seeds {self.curve_seeds} has no --learning-curve.",
                "a learning curve with this many heads per share.",
                "add --learning-curve, or leave --curve-seeds out.",
            )
        if not 1 <= self.curve_seeds <= 100:
            raise ConfigError(
                f"--curve-seeds is {self.curve_seeds}.", "1 to 100.", "give another --curve-seeds."
            )
        if self.grid:
            parse_grid(self.grid)


def parse_grid(text: str) -> list[dict[str, float]]:
    """Return every combination of a grid: "rate=1e-3,1e-2 seed=0,1" gives four.

    The first setting varies slowest.

    Raises:
        ConfigError: A setting does not exist, or heads of one stack cannot differ in it.
    """
    values: dict[str, list[float]] = {}
    for word in text.split():
        name, _, listed = word.partition("=")
        name = name.replace("-", "_")
        if name not in GRID_SETTINGS or name in values or not listed:
            raise ConfigError(
                f"--grid has {word!r}.",
                f"NAME=VALUES, each NAME once, of {', '.join(GRID_SETTINGS)} (the heads of a grid"
                " share all other settings).",
                'write e.g. --grid "rate=1e-4..1e-1:16 dropout=0,0.5 seed=0,1,2".',
            )
        values[name] = [value for part in listed.split(",") for value in _parse_values(name, part)]
    count = math.prod(len(some) for some in values.values())
    if not values or count > MAX_GRID_SIZE:
        raise ConfigError(
            f"--grid makes {pluralize(count, 'head') if values else 'no heads'}.",
            f"1 to {MAX_GRID_SIZE} heads.",
            "give fewer values.",
        )
    return [dict(zip(values, some, strict=True)) for some in itertools.product(*values.values())]


def _parse_values(name: str, text: str) -> list[float]:
    """Parse one value, or LOW..HIGH:N."""
    low, dots, rest = text.partition("..")
    high, colon, count = rest.partition(":")
    spacing = GRID_SETTINGS[name]
    try:
        if not dots:
            values = [float(text)]
        elif spacing == "integer" and not colon:
            values = [float(n) for n in range(int(low), int(high) + 1)]
        else:
            if spacing == "geometric" and not 0 < float(low) <= float(high):
                raise ValueError
            space = np.geomspace if spacing == "geometric" else np.linspace
            values = [float(f"{x:.6g}") for x in space(float(low), float(high), int(count))]
        if not values or (spacing == "integer" and any(value != int(value) for value in values)):
            raise ValueError
    except (ValueError, OverflowError) as error:
        raise ConfigError(
            f"--grid has {text!r} for {name}.",
            "a number, or LOW..HIGH:N"
            + (" above 0" if spacing == "geometric" else "")
            + (" (whole numbers)" if spacing == "integer" else "")
            + ".",
            f"write e.g. {name}={'0,1,2' if name == 'seed' else '0.1..0.5:3'}.",
        ) from error
    return [int(value) if spacing == "integer" else value for value in values]


def grid_trials(data: Data, config: TrainConfig, lr: float, grid: str | None) -> list[Trial]:
    """Return the trials of a grid on the training split; a single one without a grid.

    Args:
        data: Features and labels.
        config: The settings that the grid overrides.
        lr: The learning rate, unless the grid has its own.
        grid: The grid, as in `parse_grid`.
    """
    trials = []
    for setting in parse_grid(grid) if grid else [{}]:
        overrides: dict[str, Any] = dict(setting)
        one = replace(config, **({"rate": lr} | overrides))
        trials.append(Trial(config=one, lr=float(one.rate), train=data.train, valid=data.valid))
    return trials


def halving_rule(overrides: Sequence[Mapping[str, float]], config: TrainConfig) -> StopRule:
    """Return a stop rule for `train_stack`: successive halving (Jamieson & Talwalkar,
    arXiv:1502.07943).

    It stops the worse half of the settings after a quarter and after half of the epochs. All
    seeds of a setting stop together.
    """
    rungs = {math.ceil(config.total_epochs / 4), math.ceil(config.total_epochs / 2)}

    def losers(
        epochs_done: int, active: Sequence[int], history: Sequence[list[dict[str, float]]]
    ) -> set[int]:
        if epochs_done not in rungs:
            return set()
        groups = _group_seeds([overrides[number] for number in active])
        ranked = sorted(
            groups, key=lambda group: _rank_key([history[active[i]][-1] for i in group], config)
        )
        return {active[i] for group in ranked[(len(ranked) + 1) // 2 :] for i in group}

    return losers


def _group_seeds(overrides: Sequence[Mapping[str, float]]) -> list[list[int]]:
    """Group the positions of settings that differ only in their seed."""
    groups: dict[Any, list[int]] = {}
    for i, one in enumerate(overrides):
        groups.setdefault(tuple((k, v) for k, v in one.items() if k != "seed"), []).append(i)
    return list(groups.values())


def _rank_key(results: Sequence[Mapping[str, float]], config: TrainConfig) -> tuple[float, float]:
    """Return what settings are ranked by, lower is better: the metric, then the loss."""
    metric = selection_metric(config)
    sign = 1 if metric == "valid_loss" else -1
    return (
        float(np.mean([_finite_or_worst(result[metric], sign) for result in results])) * sign,
        float(np.mean([_finite_or_worst(result["valid_loss"], 1) for result in results])),
    )


def _finite_or_worst(value: float, sign: int) -> float:
    return value if math.isfinite(value) else DIVERGED * sign


def selection_metric(config: TrainConfig) -> str:
    """Return the metric that heads are compared by: --best, or accuracy."""
    return "accuracy" if config.best == "last" else config.best


def rank_settings(
    overrides: Sequence[Mapping[str, float]],
    heads: Sequence[TrainedHead],
    config: TrainConfig,
    metric_by_image: MetricByImage,
) -> dict[str, Any]:
    """Rank a grid's settings by the selection metric; the seeds of a setting rank together.

    Args:
        overrides: The setting of each head.
        heads: The heads of the grid.
        config: The settings that they share.
        metric_by_image: Computes the metric of settings, image by image.

    Returns:
        `figure`, the metric; `settings` [{knobs, heads, seeds, mean, spread, valid_loss, epochs,
        stopped, p}], best first; `best`, the head to keep; `test`, the name of the test; `alike`,
        how many settings do not differ significantly from the best; and `words`, a summary.

        p is the p-value of the difference from the best setting, paired by image (see
        `comparison.paired_p_value`) and corrected for the number of comparisons. It is None for
        the best setting itself and for settings that --halving stopped: their metrics are those of
        an unfinished schedule, so they rank below all finished ones, by the epochs they reached.
    """
    metric, results = selection_metric(config), [one.epochs[one.epoch] for one in heads]

    def rank(group: Sequence[int]) -> tuple[float, ...]:
        stopped = any(heads[i].stopped == "halving" for i in group)
        reached = min(len(heads[i].epochs) for i in group) if stopped else 0
        return stopped, -reached, *_rank_key([results[i] for i in group], config)

    ranked = sorted(_group_seeds(overrides), key=rank)
    table = [_table_row(group, overrides, heads, config) for group in ranked]
    finished = [row for row in table if not row["stopped"]]
    test, images = None, 0
    if len(finished) > 1:
        value_SN = metric_by_image([row["heads"] for row in finished])
        test, images = comparison.test_name(value_SN), value_SN.shape[1]
        p_values = [comparison.paired_p_value(value_SN[0] - value_N) for value_N in value_SN[1:]]
        corrected = comparison.holm_correction(np.array(p_values))
        for row, p in zip(finished[1:], corrected, strict=True):
            row["p"] = float(p)
    not_different = sum(row["p"] > comparison.SIGNIFICANCE_LEVEL for row in finished[1:])
    return {
        "figure": metric,
        "settings": table,
        "best": min(ranked[0], key=lambda i: _rank_key([results[i]], config)),
        "test": test,
        "alike": not_different if test else None,
        "words": _summarize(table, finished, f"{test} on the same {images} validation images"),
    }


def _table_row(
    group: list[int],
    overrides: Sequence[Mapping[str, float]],
    heads: Sequence[TrainedHead],
    config: TrainConfig,
) -> dict[str, Any]:
    """Return a setting's row of the ranking, without its p-value."""
    results = [heads[i].epochs[heads[i].epoch] for i in group]
    values = [result[selection_metric(config)] for result in results]
    return {
        "knobs": {k: v for k, v in overrides[group[0]].items() if k != "seed"},
        "heads": group,
        "seeds": [int(overrides[i].get("seed", config.seed)) for i in group],
        "mean": float(np.mean(values)),
        "spread": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "valid_loss": float(np.mean([result["valid_loss"] for result in results])),
        "epochs": min(len(heads[i].epochs) for i in group),
        "stopped": any(heads[i].stopped == "halving" for i in group),
        "p": None,
    }


def _summarize(
    table: Sequence[Mapping[str, Any]], finished: Sequence[Mapping[str, Any]], test: str
) -> str:
    """Say whether the best setting differs significantly from the others."""
    if len(table) == 1:
        return "one setting: nothing to compare"
    stopped = len(table) - len(finished)
    note = f"; {stopped} stopped early and cannot be compared" if stopped else ""
    if len(finished) == 1:
        return f"one setting was trained to the end: nothing to compare{note}"
    if len(table[0]["seeds"]) == 1:
        note += "; one seed each, another seed may give another ranking"
    p_values = [row["p"] for row in finished[1:]]
    not_different = [p for p in p_values if p > comparison.SIGNIFICANCE_LEVEL]
    others = f"{len(p_values)} other setting{'s' if len(p_values) > 1 else ''}"
    if len(p_values) > 1:
        test += f", corrected for {len(p_values)} comparisons (Holm)"
    if not not_different:
        return (
            f"the best is distinguishable from the {others} (p at most {max(p_values):.2g}: {test})"
            f"{note}"
        )
    return (
        f"the best is not distinguishable from {len(not_different)} of the {others}"
        f" (p at least {min(not_different):.2g}: {test}){note}"
    )


def format_setting(overrides: Mapping[str, float]) -> str:
    """Format a setting as it is written in a grid."""
    return " ".join(f"{name}={value:.6g}" for name, value in overrides.items()) or "as given"
