"""Figures: what a person looks at.

Curve              -> lr_figure         log rate against loss, suggestions marked
counts (C, C)      -> confusion_figure  labels against guesses
histograms         -> scores_figure     what a scoring came to
points             -> learning_figure   images against accuracy
ranked settings    -> grid_csv          a table, the best first
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from arrowhead.lr_finder import Curve


def lr_figure(curve: Curve) -> Figure:
    """The loss under a rising rate. Above: each suggestion, and how far single seeds differ from
    it. Below: the loss, mean of the seeds with their spread shaded, each seed as a thin line, and
    the same for held-out rows.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5.2), layout="constrained")
    names = list(curve.suggestions)
    # A row for each suggestion: labels cannot meet, however close the rates.
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(0.26 * len(names) + 0.2, 3.4))
    for row, (name, rate) in enumerate(curve.suggestions.items()):
        colour, factor = f"C{row + 2}", curve.spreads.get(name, 1.0)
        above.plot([rate / factor, rate * factor], [row, row], color=colour, lw=4, alpha=0.35)
        above.plot(rate, row, "D" if name == curve.chosen else "o", color=colour)
        for axes in (above, below):
            axes.axvline(rate, color=colour, lw=0.8, ls=":", zorder=0)
    marks = [f"{name}  {rate:.1e}" for name, rate in curve.suggestions.items()]
    above.set_yticks(range(len(names)), marks)
    above.set_ylim(len(names) - 0.4, -0.6)
    for label, name in zip(above.get_yticklabels(), names, strict=True):
        label.set_fontweight("bold" if name == curve.chosen else "normal")
    above.set_title(f"LR finder: {curve.verdict}")
    _losses(below, curve)
    above.set(xscale="log", xlim=(curve.rates[0], curve.rates[-1]))
    below.set(xlabel="learning rate", ylabel=f"loss (nats), mean of {len(curve.losses)}")
    below.grid(alpha=0.3)
    return figure


def _losses(axes: Any, curve: Curve) -> None:
    """Lines of the losses. What leaves at the top is marked there: one diverged seed would press
    all that matters into a line.
    """
    lines = [("training, smoothed", "C0", "-", curve.losses)]
    if curve.held_out is not None:
        lines.append(("held-out rows", "C1", "--", curve.held_out))
    drawn = []
    for name, colour, dashes, losses in lines:
        there = np.isfinite(losses)
        some = there.any(0)
        if not some.any():
            continue
        rates, counted = curve.rates[some], np.where(there, losses, np.nan)[:, some]
        middle, spread = np.nanmean(counted, 0), np.nanstd(counted, 0)
        axes.plot(rates, middle, dashes, color=colour, label=name)
        axes.plot(rates, counted.T, dashes, color=colour, lw=0.6, alpha=0.4)
        axes.fill_between(
            rates, middle - spread, middle + spread, color=colour, alpha=0.2, linewidth=0
        )
        gone = np.flatnonzero(~there.all(0))
        if name.startswith("training") and len(gone):
            first = curve.rates[gone[0]]
            axes.axvspan(first, curve.rates[-1], color="0.5", alpha=0.12, lw=0, label="diverged")
        drawn.append((rates, counted, middle, spread, colour))
    if not drawn:
        axes.text(0.5, 0.5, "every seed diverged at once", transform=axes.transAxes, ha="center")
        return
    low = min(float((middle - spread).min()) for *_, middle, spread, _ in drawn)
    high = max(float(middle[0] + spread[0]) for *_, middle, spread, _ in drawn)
    reach = max(high - low, 0.02 * abs(high), 1e-6)
    top = high + 0.35 * reach
    for rates, counted, _, _, colour in drawn:
        over = rates[np.nanmax(counted, 0) > top]
        axes.plot(over, np.full(len(over), top), "^", color=colour, clip_on=False, ms=5)
    axes.set_ylim(low - 0.05 * reach, top)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, frameon=False)


def lr_csv(curve: Curve, path: Path) -> None:
    """rate, then the loss of each seed, one line per step; empty where a seed had diverged."""
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["rate", *(f"loss_seed_{i}" for i in range(len(curve.losses)))])
        for rate, *losses in zip(curve.rates, *curve.losses, strict=True):
            out.writerow([f"{rate:.6g}", *("" if np.isnan(x) else f"{x:.6g}" for x in losses)])


def confusion_figure(counts_CC: NDArray[np.int64], classes: list[str]) -> Figure:
    """Counts of labels (rows) against guesses (columns); shades are shares of the label."""
    from matplotlib.figure import Figure

    side = min(14.0, 2.6 + 0.7 * len(classes))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    share = counts_CC / np.maximum(counts_CC.sum(1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="guessed", ylabel="label", title="Validation images")
    if len(classes) <= 30:
        for (row, column), count in np.ndenumerate(counts_CC):
            shade = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=shade)
    return figure


def scores_figure(
    labels: Mapping[str, int], chances: NDArray[np.int64], novelties: NDArray[np.int64]
) -> Figure:
    """Predictions at a glance: images by label (the 20 most frequent), and histograms of the best
    label's probability (0 to 1) and of novelty (0 to 2).
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    shown = sorted(labels.items(), key=lambda pair: -pair[1])[:20]
    figure = Figure(figsize=(10, 1.8 + 0.22 * max(8, len(shown))), layout="constrained")
    by_label, by_chance, by_novelty = figure.subplots(1, 3, width_ratios=(1.4, 1, 1))
    by_label.barh(range(len(shown)), [count for _, count in shown])
    by_label.set_yticks(range(len(shown)), [name[:24] for name, _ in shown])
    by_label.invert_yaxis()
    rest = len(labels) - len(shown)
    by_label.set(xlabel="images", title="label" + (f" (and {rest} more)" if rest else ""))
    for axes, counts, end, name in (
        (by_chance, chances, 1, "probability of the label"),
        (by_novelty, novelties, 2, "novelty"),
    ):
        step = end / len(counts)
        axes.bar(np.arange(len(counts)) * step, counts, width=step, align="edge")
        axes.set(xlim=(0, end), ylabel="images", title=name)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    by_label.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def learning_figure(curve: dict[str, Any]) -> Figure:
    """The figure heads are compared by, against the images they learned from: every head, the mean,
    and its spread shaded.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    points = curve["points"]
    images = np.array([point["images"] for point in points])
    mean = np.array([point["mean"] for point in points])
    spread = np.array([point["spread"] or 0.0 for point in points])
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.fill_between(images, mean - spread, mean + spread, alpha=0.2, linewidth=0)
    axes.plot(images, mean, "o-", label=f"mean of {len(points[0]['values'])} heads")
    for point in points:
        axes.plot([point["images"]] * len(point["values"]), point["values"], "k.", markersize=3)
    axes.set_xscale("log")
    axes.set_xticks(images, [f"{count}" for count in images])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="images to learn from", ylabel=f"validation {curve['figure']}")
    axes.set_title(curve["words"], fontsize="small", wrap=True)
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    return figure


def learning_csv(curve: dict[str, Any], path: Path) -> Path:
    """share, images, mean, spread, then each head's figure, one line per share; the path."""
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        heads = len(curve["points"][0]["values"])
        name = curve["figure"]
        out.writerow(["share", "images", name, "spread", *(f"head_{i}" for i in range(heads))])
        for one in curve["points"]:
            out.writerow(
                [one[key] for key in ("share", "images", "mean", "spread")] + one["values"]
            )
    return path


def grid_csv(ranked: dict[str, Any], path: Path) -> Path:
    """One line per setting of a grid, the best first: its knobs, seeds, mean, spread; the path."""
    names = list(ranked["settings"][0]["knobs"])
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow([*names, "seeds", ranked["figure"], "spread", "valid_loss"])
        for one in ranked["settings"]:
            seeds = " ".join(map(str, one["seeds"]))
            figures = [one["mean"], one["spread"], one["valid_loss"]]
            out.writerow([*(one["knobs"][name] for name in names), seeds, *figures])
    return path


def display(figure: Figure) -> None:
    """Draw a figure where a notebook can show one; nothing elsewhere."""
    try:
        from IPython import get_ipython
        from IPython.display import Image
        from IPython.display import display as show
    except ImportError:
        return
    if get_ipython() is not None:  # as bytes: a bare Figure shows only where pyplot was set up
        picture = io.BytesIO()
        figure.savefig(picture, dpi=100)
        show(Image(picture.getvalue()))


def save(figure: Any, path: Path) -> Path:
    """Write a figure as PNG (or by its suffix); the path."""
    figure.savefig(path, dpi=120)
    return path
