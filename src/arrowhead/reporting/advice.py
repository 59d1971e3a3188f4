"""The advice of `arrowhead advise` as tables and sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from arrowhead.training.comparison import SIGNIFICANCE_LEVEL
from arrowhead.training.extrapolation import Forecast

WORTHWHILE_POINTS = 0.5  # less is hardly worth twice the labels


def curve_table(points: Sequence[Mapping[str, float]], forecast: Sequence[Forecast]) -> list[str]:
    """The learning curve and its continuation, a heading and one line for each size."""
    lines = [f"{'training images':>15}  {'accuracy of a frozen head':>25}  over draws"]
    for one in points:
        accuracy = f"{one['accuracy']:.4f} ± {one['half_width']:.4f}"
        lines.append(f"{one['images']:>15,}  {accuracy:>25}  ± {one['spread']:.4f}")
    for ahead in forecast:
        accuracy = f"about {ahead.accuracy:.4f}"
        lines.append(f"{ahead.images:>15,}  {accuracy:>25}  {_gain(ahead)} points")
    return lines


def table(options: Sequence[Mapping[str, Any]]) -> list[str]:
    """The options, a heading and one line for each."""
    width = max(len(one["name"]) for one in options)
    lines = [
        f"{'':<{width}}  {'accuracy':>15}  {'over the frozen head':>20}  {'p':>6}  all images take"
    ]
    for one in options:
        accuracy = f"{one['accuracy']:.4f} ± {one['half_width']:.4f}"
        points = "" if one["p"] is None else f"{_points(one)} points"
        p = "" if one["p"] is None else f"{one['p']:.2g}"
        cost = "" if one["seconds"] is None else duration(one["seconds"])
        lines.append(f"{one['name']:<{width}}  {accuracy:>15}  {points:>20}  {p:>6}  {cost}")
    return lines


def choose(options: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The most accurate option that is better than the frozen head by more than chance, else the
    frozen head; among equally accurate ones the cheapest.
    """
    certain = [
        one
        for one in options
        if one["p"] is not None and one["p"] < SIGNIFICANCE_LEVEL and one["points"] > 0
    ]
    return max(
        certain, key=lambda one: (one["points"], -(one["seconds"] or 0.0)), default=options[0]
    )


def sentences(
    options: Sequence[Mapping[str, Any]], forecast: Sequence[Forecast], plan: Mapping[str, Any]
) -> str:
    """What to do, why, and what more labels would give."""
    chosen, others = choose(options), options[1:]
    scale = f" Trials trained on {plan['train_images']} images; with all {plan['images']},"
    scale = f"{scale} differences are usually smaller." if plan["is_sample"] else ""
    most = max(others, key=lambda one: one["points"])
    if chosen is options[0]:
        text = (
            f"Keep the frozen head: on {chosen['images']} held-out images nothing was right more"
            f" often by more than chance (at best {most['name']}: {_points(most)} points)."
        )
    else:
        cost = "" if chosen["seconds"] is None else f", for {duration(chosen['seconds'])}"
        text = (
            f"{_imperative(chosen['name'])}: {_points(chosen)} points over the frozen head on"
            f" {chosen['images']} held-out images{cost}."
        )
    if not plan["epochs"]:
        text += (
            f" Fine-tuning does not fit into {plan['budget']:g} minutes: one epoch takes"
            f" {duration(plan['one_epoch_seconds'])} (--budget)."
        )
    return f"{text}{scale} {_labels(forecast)}"


def _labels(forecast: Sequence[Forecast]) -> str:
    """What more labels would give. forecast: for all images, and for several times as many."""
    if len(forecast) < 2:
        return "There are too few images to say what more labels would give."
    gains = [
        f"{_gain(one)} points with {round(one.images / forecast[0].images)} times as many"
        for one in forecast[1:]
    ]
    helps = forecast[1].low > 0 and 100 * forecast[1].gain >= WORTHWHILE_POINTS
    start = "More labels would help" if helps else "More labels would probably change little"
    return f"{start}: {', '.join(gains)}."


def _imperative(name: str) -> str:
    return f"Fine-tune ({name.partition(', ')[2]})" if "fine-tuned" in name else f"Store {name}"


def _points(one: Mapping[str, Any]) -> str:
    return f"{one['points'] + 0.0:+.1f} ± {one['points_half_width']:.1f}"


def _gain(one: Forecast) -> str:
    return f"{100 * one.gain:+.1f} ({100 * one.low:+.1f} to {100 * one.high:+.1f})"


def duration(seconds: float) -> str:
    """A duration for people."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
