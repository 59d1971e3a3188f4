"""Draws figures with matplotlib and writes the tables behind them as CSV.

    LR finder's curve  -> lr_figure         loss against learning rate, suggestions marked
    counts (C, C)      -> confusion_figure  labels against predictions
    histograms         -> scores_figure     labels, probabilities and novelty of scored images
    learning curve     -> learning_figure   a metric against the number of training images
    ranked grid        -> grid_csv          one row per setting, the best first

Class names in any script are readable: unlike in plain matplotlib, fonts that have their characters
are searched for, `$` starts no formula, and control characters are escaped.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arrowhead import fileio, spreadsheet, wording
from arrowhead.printable import escape_control_chars

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from arrowhead.training.lr_finder import Curve

MAX_NAME_CHARS = 28
MAX_CLASSES_WITH_COUNTS = 30  # with more, a confusion matrix shows colors only
MAX_NAMED_CLASSES = 200  # with more, only every second, third … class is named on the axes
MAX_BARS = 20
DEFAULT_FONT = "DejaVu Sans"  # comes with matplotlib
FALLBACK_FONT = "Last Resort"  # comes with matplotlib; draws a box for any character


def lr_figure(curve: Curve) -> Figure:
    """Plot the result of the LR finder.

    Above: each suggested learning rate, and how far single seeds differ from it. Below: the loss,
    with the mean of the seeds, their standard deviation shaded, each seed as a thin line, and the
    same for held-out images.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5.2), layout="constrained")
    names = list(curve.suggestions)
    # Each suggestion has a row, so that labels cannot overlap.
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(0.26 * len(names) + 0.2, 3.4))
    for row, (name, rate) in enumerate(curve.suggestions.items()):
        color, factor = f"C{row + 2}", curve.spreads.get(name, 1.0)
        above.plot([rate / factor, rate * factor], [row, row], color=color, lw=4, alpha=0.35)
        above.plot(rate, row, "D" if name == curve.chosen else "o", color=color)
        for axes in (above, below):
            axes.axvline(rate, color=color, lw=0.8, ls=":", zorder=0)
    labels = [f"{name}  {rate:.1e}" for name, rate in curve.suggestions.items()]
    above.set_yticks(range(len(names)), labels)
    above.set_ylim(len(names) - 0.4, -0.6)
    for label, name in zip(above.get_yticklabels(), names, strict=True):
        label.set_fontweight("bold" if name == curve.chosen else "normal")
    figure.suptitle(textwrap.fill(f"LR finder – {curve.words}", 88), fontsize="medium")
    _plot_losses(below, curve)
    above.set(xscale="log", xlim=(curve.rates[0], curve.rates[-1]))
    below.set(xlabel="learning rate", ylabel=f"loss (nats), mean of {len(curve.losses)}")
    below.grid(alpha=0.3)
    return figure


def _plot_losses(axes: Any, curve: Curve) -> None:
    """Plot the losses of all seeds.

    Losses far above the start are cut off and marked with triangles, because one diverged seed
    would flatten everything else.
    """
    series = [("training, smoothed", "C0", "-", curve.losses)]
    if curve.held_out is not None:
        series.append(("held-out rows", "C1", "--", curve.held_out))
    plotted = []
    for name, color, style, losses in series:
        is_finite = np.isfinite(losses)
        has_loss = is_finite.any(0)
        if not has_loss.any():
            continue
        rates, finite = curve.rates[has_loss], np.where(is_finite, losses, np.nan)[:, has_loss]
        mean, std = np.nanmean(finite, 0), np.nanstd(finite, 0)
        axes.plot(rates, mean, style, color=color, label=name)
        axes.plot(rates, finite.T, style, color=color, lw=0.6, alpha=0.4)
        axes.fill_between(rates, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)
        diverged = np.flatnonzero(~is_finite.all(0))
        if name.startswith("training") and len(diverged):
            first = curve.rates[diverged[0]]
            axes.axvspan(first, curve.rates[-1], color="0.5", alpha=0.12, lw=0, label="diverged")
        plotted.append((rates, finite, mean, std, color))
    if not plotted:
        axes.text(0.5, 0.5, "every seed diverged at once", transform=axes.transAxes, ha="center")
        return
    low = min(float((mean - std).min()) for *_, mean, std, _ in plotted)
    high = max(float(mean[0] + std[0]) for *_, mean, std, _ in plotted)
    height = max(high - low, 0.02 * abs(high), 1e-6)
    top = high + 0.35 * height
    for rates, finite, _, _, color in plotted:
        cut_off = rates[np.nanmax(finite, 0) > top]
        axes.plot(cut_off, np.full(len(cut_off), top), "^", color=color, clip_on=False, ms=5)
    axes.set_ylim(low - 0.05 * height, top)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, frameon=False)


def lr_csv(curve: Curve, path: Path) -> None:
    """Write the rate and the loss of each seed, one row per step; empty where a seed diverged."""
    header = ["rate", *(f"loss_seed_{i}" for i in range(len(curve.losses)))]
    with spreadsheet.open_csv(path, header) as sheet:
        for rate, *losses in zip(curve.rates, *curve.losses, strict=True):
            cells = [None if np.isnan(loss) else float(f"{loss:.6g}") for loss in losses]
            sheet.row([float(f"{rate:.6g}"), *cells])


def confusion_figure(
    counts_CC: NDArray[np.int64], classes: list[str], title: str = "Validation images"
) -> Figure:
    """Plot a confusion matrix: labels in rows, predictions in columns.

    Colors show the share of the label's images; with few classes, cells also show counts.
    """
    from matplotlib.figure import Figure

    count = len(classes)
    show_counts, step = count <= MAX_CLASSES_WITH_COUNTS, -(-count // MAX_NAMED_CLASSES)
    ticks = list(range(0, count, step))
    names, text = text_style(classes[tick] for tick in ticks)
    # Inches for the names plus inches for the cells; with many classes a cell is 9 points wide.
    side = 1.5 + 0.09 * max(map(len, names))
    side += min(14.0, 1.1 + 0.7 * count) if show_counts else 0.125 * min(count, MAX_NAMED_CLASSES)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    share = counts_CC / np.maximum(counts_CC.sum(1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    rotation: dict[str, Any] = {"rotation": 90}
    if show_counts:
        rotation = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    else:
        text |= {"fontsize": 6.5}
    axes.set_xticks(ticks, names, **text, **rotation)
    axes.set_yticks(ticks, names, **text)
    axes.set(xlabel="predicted", ylabel="label", title=title)
    if show_counts:
        for (row, column), images in np.ndenumerate(counts_CC):
            color = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(images), ha="center", va="center", color=color)
    return figure


def scores_figure(
    labels: Mapping[str, int],
    probability_counts: NDArray[np.int64],
    novelty_counts: NDArray[np.int64],
) -> Figure:
    """Plot the images by label (the 20 most frequent), and two histograms.

    The histograms show the probability of the most probable label (0 to 1) and the novelty (0 to
    2), see `inference.summary.ScoreSummary`.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    shown = sorted(labels.items(), key=lambda pair: -pair[1])[:MAX_BARS]
    names, text = text_style(name for name, _ in shown)
    figure = Figure(figsize=(10, 1.8 + 0.22 * max(8, len(shown))), layout="constrained")
    by_label, by_probability, by_novelty = figure.subplots(1, 3, width_ratios=(1.4, 1, 1))
    by_label.barh(range(len(shown)), [count for _, count in shown])
    by_label.set_yticks(range(len(shown)), names, **text)
    by_label.invert_yaxis()
    remaining = len(labels) - len(shown)
    by_label.set(xlabel="images", title="label" + (f" (and {remaining} more)" if remaining else ""))
    for axes, counts, end, name in (
        (by_probability, probability_counts, 1, "probability of the label"),
        (by_novelty, novelty_counts, 2, "novelty"),
    ):
        bin_width = end / len(counts)
        axes.bar(np.arange(len(counts)) * bin_width, counts, width=bin_width, align="edge")
        axes.set(xlim=(0, end), ylabel="images", title=name)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    by_label.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def learning_figure(curve: dict[str, Any]) -> Figure:
    """Plot a learning curve: a validation metric against the number of training images.

    Shows every head, the mean, and the standard deviation as a shaded band. curve: the JSON form of
    a learning curve (see `training.learning_curve`).
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    points = curve["points"]
    images = np.array([point["images"] for point in points])
    mean = np.array([point["mean"] for point in points])
    std = np.array([point["spread"] or 0.0 for point in points])
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.fill_between(images, mean - std, mean + std, alpha=0.2, linewidth=0)
    axes.plot(
        images, mean, "o-", label=f"mean of {wording.pluralize(len(points[0]['values']), 'head')}"
    )
    for point in points:
        axes.plot([point["images"]] * len(point["values"]), point["values"], "k.", markersize=3)
    axes.set_xscale("log")
    axes.set_xticks(images, [f"{count}" for count in images])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="training images", ylabel=f"validation {curve['figure']}")
    axes.set_title(curve["words"], fontsize="small", wrap=True)
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    return figure


def learning_csv(curve: dict[str, Any], path: Path) -> Path:
    """Write share, images, mean, spread, then the metric of each head, one row per share of images.

    Returns the path.
    """
    max_heads = max(len(point["values"]) for point in curve["points"])
    heads = [f"head_{i}" for i in range(max_heads)]
    with spreadsheet.open_csv(
        path, ["share", "images", curve["figure"], "spread", *heads]
    ) as sheet:
        for point in curve["points"]:
            cells = [point[key] for key in ("share", "images", "mean", "spread")]
            padding = [None] * (max_heads - len(point["values"]))
            sheet.row([*cells, *point["values"], *padding])
    return path


def epochs_csv(epochs: list[dict[str, float]], path: Path) -> Path:
    """Write one row of metrics per epoch of a training; returns the path."""
    with spreadsheet.open_csv(path, list(epochs[0])) as sheet:
        for epoch in epochs:
            sheet.row(list(epoch.values()))
    return path


def grid_csv(ranked: dict[str, Any], path: Path) -> Path:
    """Write one row per setting of a grid, the best first; returns the path.

    Columns: the settings, seeds, mean, spread, validation loss, epochs, and the corrected p-value
    of the difference from the best.
    """
    names = list(ranked["settings"][0]["knobs"])
    header = [*names, "seeds", ranked["figure"], "spread", "valid_loss", "epochs", "p"]
    with spreadsheet.open_csv(path, header) as sheet:
        for setting in ranked["settings"]:
            seeds = " ".join(map(str, setting["seeds"]))
            cells = [setting[key] for key in ("mean", "spread", "valid_loss", "epochs", "p")]
            sheet.row([*(setting["knobs"][name] for name in names), seeds, *cells])
    return path


def display(figure: Figure) -> None:
    """Show a figure in a notebook; does nothing elsewhere."""
    try:
        from IPython import get_ipython
        from IPython.display import Image
        from IPython.display import display as show
    except ImportError:
        return
    if get_ipython() is not None:  # as PNG: a notebook shows a Figure only after importing pyplot
        png = io.BytesIO()
        figure.savefig(png, dpi=100)
        show(Image(png.getvalue()))


def save(figure: Any, path: Path) -> Path:
    """Write a figure as PNG (or in the format of its suffix), complete or not at all.

    Returns the path.
    """
    with fileio.atomic_write(path) as draft, warnings.catch_warnings():
        # A missing glyph must not fail a program that turns warnings into errors.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(draft, dpi=120, format=path.suffix.removeprefix(".") or "png")
    return path


# ------------------------------------------------------------------------- names in figures


def text_style(names: Iterable[str]) -> tuple[list[str], dict[str, Any]]:
    """Prepare names for a figure: the texts, and matplotlib's properties for them.

    Long names lose their middle. Control characters are escaped, and so are characters that no font
    on this machine has, whose boxes would all look alike. `$` starts no formula.
    """
    shortened = [_shorten(escape_control_chars(name)) for name in names]
    needed = {ord(character) for name in shortened for character in name}
    families = _choose_fonts(frozenset(needed - _code_points(DEFAULT_FONT)))
    available = {ord(" ")}.union(*map(_code_points, families))
    texts = [
        "".join(char if ord(char) in available else _escape(char) for char in name)
        for name in shortened
    ]
    return texts, {"parse_math": False, "fontfamily": families}


def _shorten(name: str) -> str:
    if len(name) <= MAX_NAME_CHARS:
        return name
    half = (MAX_NAME_CHARS - 1) // 2
    return f"{name[: MAX_NAME_CHARS - 1 - half]}…{name[-half:]}"


def _escape(character: str) -> str:
    r"""A character as \uNNNN or \UNNNNNNNN."""
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


@cache
def _choose_fonts(missing: frozenset[int]) -> list[str]:
    """The default font, and further fonts of this machine that have the missing code points."""
    families, remaining = [DEFAULT_FONT], set(missing)
    for family in _font_files() if remaining else ():
        if family.startswith(FALLBACK_FONT):
            continue
        if covered := remaining & _code_points(family):
            families.append(family)
            remaining -= covered
        if not remaining:
            break
    return families


@cache
def _code_points(family: str) -> frozenset[int]:
    """The code points of the characters that a font has."""
    from matplotlib.font_manager import get_font

    return frozenset(get_font(_font_files()[family]).get_charmap())


@cache
def _font_files() -> dict[str, str]:
    """A font file for each family on this machine, of its regular style if there is one."""
    from matplotlib.font_manager import fontManager

    fonts = sorted(
        fontManager.ttflist,
        key=lambda font: (font.name, font.style != "normal", abs(int(font.weight) - 400)),
    )
    return {font.name: font.fname for font in reversed(fonts)}
