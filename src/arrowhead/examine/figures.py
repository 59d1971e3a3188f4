"""Figures: what a person looks at.

Curve              -> lr_figure         log rate against loss, suggestions marked
counts (C, C)      -> confusion_figure  labels against guesses
histograms         -> scores_figure     what a scoring came to
points             -> learning_figure   images against accuracy
ranked settings    -> grid_csv          a table, the best first
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arrowhead import fileio, spreadsheet, wording
from arrowhead.printable import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from arrowhead.training.lr_finder import Curve

MAX_NAME_CHARS = 28
NUMBERED_CLASSES = 30  # up to so many the cells of a confusion matrix hold their counts
NAMED_CLASSES = 200  # with more, every second, third … class is named on the axes
FONT = "DejaVu Sans"  # matplotlib's own, always there
BOXES = "Last Resort"  # matplotlib's font of boxes for what no other font has


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
    above.set_title(f"LR finder: {curve.words}")
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
    header = ["rate", *(f"loss_seed_{i}" for i in range(len(curve.losses)))]
    with spreadsheet.writing(path, header) as sheet:
        for rate, *losses in zip(curve.rates, *curve.losses, strict=True):
            known = [None if np.isnan(loss) else float(f"{loss:.6g}") for loss in losses]
            sheet.row([float(f"{rate:.6g}"), *known])


def confusion_figure(
    counts_CC: NDArray[np.int64], classes: list[str], title: str = "Validation images"
) -> Figure:
    """Counts of labels (rows) against predictions (columns); shades are shares of the label."""
    from matplotlib.figure import Figure

    count = len(classes)
    few, step = count <= NUMBERED_CLASSES, -(-count // NAMED_CLASSES)
    at = list(range(0, count, step))
    names, text = _named(classes[place] for place in at)
    # Room for the names, then for the cells: 8 points each where there are many.
    side = 1.5 + 0.09 * max(map(len, names))
    side += min(14.0, 1.1 + 0.7 * count) if few else 0.125 * min(count, NAMED_CLASSES)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    share = counts_CC / np.maximum(counts_CC.sum(1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    text |= {} if few else {"fontsize": 6.5}
    turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if few else {"rotation": 90}
    axes.set_xticks(at, names, **text, **turned)
    axes.set_yticks(at, names, **text)
    axes.set(xlabel="predicted", ylabel="label", title=title)
    if few:
        for (row, column), images in np.ndenumerate(counts_CC):
            shade = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(images), ha="center", va="center", color=shade)
    return figure


def scores_figure(
    labels: Mapping[str, int], probability_counts: NDArray[np.int64], novelties: NDArray[np.int64]
) -> Figure:
    """Predictions at a glance: images by label (the 20 most frequent), and histograms of the best
    label's probability (0 to 1) and of novelty (0 to 2).
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    shown = sorted(labels.items(), key=lambda pair: -pair[1])[:20]
    names, text = _named(name for name, _ in shown)
    figure = Figure(figsize=(10, 1.8 + 0.22 * max(8, len(shown))), layout="constrained")
    by_label, by_chance, by_novelty = figure.subplots(1, 3, width_ratios=(1.4, 1, 1))
    by_label.barh(range(len(shown)), [count for _, count in shown])
    by_label.set_yticks(range(len(shown)), names, **text)
    by_label.invert_yaxis()
    rest = len(labels) - len(shown)
    by_label.set(xlabel="images", title="label" + (f" (and {rest} more)" if rest else ""))
    for axes, counts, end, name in (
        (by_chance, probability_counts, 1, "probability of the label"),
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
    axes.plot(
        images, mean, "o-", label=f"mean of {wording.counted(len(points[0]['values']), 'head')}"
    )
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
    most = max(len(one["values"]) for one in curve["points"])
    heads = [f"head_{i}" for i in range(most)]
    with spreadsheet.writing(path, ["share", "images", curve["figure"], "spread", *heads]) as sheet:
        for one in curve["points"]:
            figures = [one[key] for key in ("share", "images", "mean", "spread")]
            sheet.row([*figures, *one["values"], *[None] * (most - len(one["values"]))])
    return path


def grid_csv(ranked: dict[str, Any], path: Path) -> Path:
    """One line per setting of a grid, the best first: its knobs, seeds, mean, spread, validation
    loss, epochs, and the corrected p-value of its difference from the best; the path.
    """
    names = list(ranked["settings"][0]["knobs"])
    header = [*names, "seeds", ranked["figure"], "spread", "valid_loss", "epochs", "p"]
    with spreadsheet.writing(path, header) as sheet:
        for one in ranked["settings"]:
            seeds = " ".join(map(str, one["seeds"]))
            figures = [one[key] for key in ("mean", "spread", "valid_loss", "epochs", "p")]
            sheet.row([*(one["knobs"][name] for name in names), seeds, *figures])
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
    """Write a figure as PNG (or by its suffix), whole or absent; the path."""
    with fileio.draft(path) as draft, warnings.catch_warnings():
        # A box instead of a letter is no reason to fail where warnings are errors.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(draft, dpi=120, format=path.suffix.removeprefix(".") or "png")
    return path


# ------------------------------------------------------------------------- names in figures


def _named(names: Iterable[str]) -> tuple[list[str], dict[str, Any]]:
    """Names as a figure shows them, and matplotlib's properties of such a text.

    As they are: `$` starts no formula. Long ones lose their middle, control characters are
    escaped, and so are letters that no font on this machine has (boxes would all look alike).
    """
    shown = [_shortened(visible(name)) for name in names]
    wanted = {ord(character) for name in shown for character in name}
    families = _fonts(frozenset(wanted - _characters(FONT)))
    drawn = {ord(" ")}.union(*map(_characters, families))
    plain = ["".join(one if ord(one) in drawn else _escaped(one) for one in name) for name in shown]
    return plain, {"parse_math": False, "fontfamily": families}


def _shortened(name: str) -> str:
    if len(name) <= MAX_NAME_CHARS:
        return name
    half = (MAX_NAME_CHARS - 1) // 2
    return f"{name[: MAX_NAME_CHARS - 1 - half]}…{name[-half:]}"


def _escaped(character: str) -> str:
    r"""A character as \uNNNN or \UNNNNNNNN."""
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


@cache
def _fonts(missing: frozenset[int]) -> list[str]:
    """Families: the default, and as many others of this machine as have its missing characters."""
    found, left = [FONT], set(missing)
    for family in _families() if left else ():
        if not family.startswith(BOXES) and (there := left & _characters(family)):
            found.append(family)
            left -= there
        if not left:
            break
    return found


@cache
def _characters(family: str) -> frozenset[int]:
    """The characters that a font has, as code points."""
    from matplotlib.font_manager import get_font

    return frozenset(get_font(_families()[family]).get_charmap())


@cache
def _families() -> dict[str, str]:
    """The fonts of this machine: a file of each family, the plain one where there is one."""
    from matplotlib.font_manager import fontManager

    fonts = sorted(
        fontManager.ttflist,
        key=lambda font: (font.name, font.style != "normal", abs(int(font.weight) - 400)),
    )
    return {font.name: font.fname for font in reversed(fonts)}
