"""The charts of a report, drawn with matplotlib.

    confidence, correctness      -> reliability_chart   is a probability of 0.9 right 9 times in 10?
    probabilities, labels        -> curves_chart        ROC and precision-recall
    counts (C, C)                -> confusion_chart     many classes, similar ones side by side
    epochs                       -> training_chart      losses and accuracy by epoch
    rates, losses                -> finder_chart        the LR finder's curve

`inline_svg` gives a chart as SVG for a page: its text stays text, and its colors are CSS variables,
so that it follows the page's light or dark theme.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.examine.figures import text_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colors of the light theme; `inline_svg` puts CSS variables of these names in their place. Blue and
# orange differ for color-blind readers, too.
COLORS = {
    "ink": "#1d2329",
    "muted": "#5b6672",
    "line": "#d5dbe1",
    "blue": "#2a6fb0",
    "orange": "#c8590b",
}
WIDTH = 4.6  # inches: a column of the page, or a phone, with text that can be read
MAX_CURVES = 6  # classes with a curve of their own
MAX_NAMED_CLASSES = 60  # on the axes of a confusion matrix
MIN_IMAGES_PER_BIN = 15


def _new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="none")


def _style_axes(axes: Any) -> None:
    axes.set_facecolor("none")
    axes.grid(color=COLORS["line"], linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(COLORS["muted"])
    axes.tick_params(colors=COLORS["muted"], labelsize=8)
    for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
        text.set_color(COLORS["ink"])
        text.set_fontsize(9)


def _legend(axes: Any, **where: Any) -> None:
    axes.legend(frameon=False, fontsize=8, labelcolor=COLORS["ink"], **where)


def reliability_chart(
    confidence_N: NDArray[Any], raw_confidence_N: NDArray[Any], correct_N: NDArray[np.bool_]
) -> Figure:
    """Plot accuracy against confidence, with and without the temperature, above a histogram.

    Bins hold equal numbers of images (Nixon et al., arXiv:1904.01685).

    Args:
        confidence_N: Probability of the predicted class, calibrated.
        raw_confidence_N: The same without the temperature.
        correct_N: Whether the prediction is right.
    """
    figure = _new_figure(WIDTH, 4.4)
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
    low = float(min(confidence_N.min(), raw_confidence_N.min(), 0.9))
    axes.plot([0, 1], [0, 1], color=COLORS["muted"], lw=1, ls=":", label="perfect")
    for values, color, style, name in (
        (raw_confidence_N, COLORS["orange"], "--", "without temperature"),
        (confidence_N, COLORS["blue"], "-", "calibrated"),
    ):
        bins = max(1, min(10, len(values) // MIN_IMAGES_PER_BIN))
        parts = np.array_split(np.argsort(values, kind="stable"), bins)
        points = [(values[part].mean(), correct_N[part].mean()) for part in parts]
        axes.plot(*zip(*points, strict=True), style, marker="o", ms=4, color=color, label=name)
    axes.set(ylabel="accuracy", ylim=(-0.03, 1.03))
    _legend(axes, loc="best")
    below.hist(confidence_N, bins=np.linspace(low, 1, 21), color=COLORS["blue"], alpha=0.8)
    below.set(xlabel="confidence (probability of the predicted class)", ylabel="images")
    below.set_xlim(low - 0.02, 1.01)
    for one in (axes, below):
        _style_axes(one)
    return figure


def curves_chart(prob_MC: NDArray[Any], label: NDArray[Any], classes: Sequence[str]) -> Figure:
    """Plot ROC and precision-recall curves, one against the rest.

    With two classes: those of the second. With many classes: the mean, and the classes with the
    lowest area under the ROC curve.

    Args:
        prob_MC: Probabilities.
        label: int64 (M,), or (M, C) of zeros and ones.
        classes: The class names.
    """
    from sklearn.metrics import precision_recall_curve, roc_curve

    truth_MC = label > 0 if label.ndim == 2 else label[:, None] == np.arange(len(classes))
    shown = _classes_with_curves(prob_MC, truth_MC, single_label=label.ndim == 1)
    names, text = text_style(classes[index] for index in shown)
    figure = _new_figure(WIDTH, 7.4)
    roc, pr = figure.subplots(2, 1)
    styles = [(color, line) for line in ("-", "--", ":") for color in ("blue", "orange")]
    for index, name, (color, line) in zip(shown, names, styles, strict=False):
        truth_M, score_M = truth_MC[:, index], prob_MC[:, index]
        false_rate, true_rate, _ = roc_curve(truth_M, score_M)
        precision, recall, _ = precision_recall_curve(truth_M, score_M)
        look = {"color": COLORS[color], "ls": line, "lw": 1.6, "label": name}
        roc.plot(false_rate, true_rate, **look)
        pr.step(recall, precision, where="post", **look)
    roc.plot([0, 1], [0, 1], color=COLORS["muted"], lw=1, ls=":")
    roc.set(xlabel="false positive rate", ylabel="true positive rate", title="ROC")
    pr.set(xlabel="recall", ylabel="precision", title="Precision and recall")
    for axes in (roc, pr):
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.03))
        _style_axes(axes)
    _legend(roc, loc="lower right")
    for entry in roc.get_legend().get_texts():
        entry.set(**{k: v for k, v in text.items() if k in ("parse_math", "fontfamily")})
    return figure


def _classes_with_curves(
    prob_MC: NDArray[Any], truth_MC: NDArray[np.bool_], *, single_label: bool
) -> list[int]:
    """The classes to draw: of two the second, of many those with the lowest AUROC."""
    from sklearn.metrics import roc_auc_score

    both = truth_MC.any(0) & ~truth_MC.all(0)
    defined = [int(index) for index in np.flatnonzero(both)]
    if single_label and truth_MC.shape[1] == 2:
        return defined[-1:]
    if len(defined) <= MAX_CURVES:
        return defined
    aurocs = [roc_auc_score(truth_MC[:, index], prob_MC[:, index]) for index in defined]
    return [defined[k] for k in np.argsort(aurocs, kind="stable")[:MAX_CURVES]]


def confusion_chart(counts_CC: NDArray[np.int64], classes: Sequence[str]) -> Figure:
    """Plot the confusion matrix of many classes, those that are confused side by side.

    The order is that of the leaves of an average-linkage clustering of the classes by how often
    they are confused. Correct predictions are not colored: the mistakes are what one looks for.
    """
    from matplotlib.colors import LinearSegmentedColormap

    order = confusion_order(counts_CC)
    count = len(order)
    share_CC = counts_CC / np.maximum(counts_CC.sum(1, keepdims=True), 1)
    np.fill_diagonal(share_CC, np.nan)
    figure = _new_figure(8.6, 8.2)
    axes = figure.add_subplot()
    # From transparent to opaque, so that it is readable on light and dark pages.
    orange = tuple(int(COLORS["orange"][k : k + 2], 16) / 255 for k in (1, 3, 5))
    color_map = LinearSegmentedColormap.from_list("mistakes", [(*orange, 0.0), (*orange, 1.0)])
    top = max(float(np.nanmax(share_CC, initial=0)), 1e-9)
    picture = axes.imshow(share_CC[np.ix_(order, order)], cmap=color_map, vmin=0, vmax=top)
    axes.plot([-0.5, count - 0.5], [-0.5, count - 0.5], color=COLORS["line"], lw=0.6)
    step = -(-count // MAX_NAMED_CLASSES)
    ticks = list(range(0, count, step))
    names, text = text_style(classes[order[tick]] for tick in ticks)
    axes.set_xticks(ticks, names, rotation=90, **text)
    axes.set_yticks(ticks, names, **text)
    axes.set(xlabel="predicted", ylabel="label")
    _style_axes(axes)
    axes.grid(visible=False)
    axes.tick_params(labelsize=6)
    bar = figure.colorbar(picture, ax=axes, shrink=0.5, label="share of the label's images")
    bar.ax.tick_params(colors=COLORS["muted"], labelsize=7)
    bar.ax.yaxis.label.set(color=COLORS["ink"], fontsize=8)
    bar.outline.set_visible(False)
    return figure


def confusion_order(counts_CC: NDArray[np.int64]) -> list[int]:
    """An order of the classes in which those that are confused are neighbors."""
    from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
    from scipy.spatial.distance import squareform

    count = len(counts_CC)
    if count < 3:
        return list(range(count))
    share_CC = counts_CC / np.maximum(counts_CC.sum(1, keepdims=True), 1)
    similarity_CC = (share_CC + share_CC.T) / 2
    distance_CC = 1 - similarity_CC
    np.fill_diagonal(distance_CC, 0)
    condensed = squareform(distance_CC, checks=False)
    tree = linkage(condensed, "average")
    if count <= 500:  # its time grows with the cube of the number of classes
        tree = optimal_leaf_ordering(tree, condensed)
    return [int(leaf) for leaf in leaves_list(tree)]


def training_chart(epochs: Sequence[Mapping[str, float]], kept: int | None) -> Figure:
    """Plot training loss, validation loss and accuracy by epoch; `kept` marks the saved epoch."""
    from matplotlib.ticker import MaxNLocator

    figure = _new_figure(WIDTH, 5.2)
    losses, right = figure.subplots(2, 1)
    number = [epoch["epoch"] for epoch in epochs]
    for name, color, style, label in (
        ("train_loss", "orange", "--", "training"),
        ("valid_loss", "blue", "-", "validation"),
    ):
        losses.plot(
            number, [epoch[name] for epoch in epochs], style, color=COLORS[color], label=label
        )
    right.plot(number, [epoch["accuracy"] for epoch in epochs], color=COLORS["blue"])
    losses.set(xlabel="epoch", ylabel="loss (nats)", title="Loss")
    right.set(xlabel="epoch", ylabel="accuracy", title="Validation accuracy")
    for axes in (losses, right):
        _style_axes(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if kept is not None and number[0] < kept < number[-1]:
            axes.axvline(kept, color=COLORS["muted"], lw=1, ls=":")
    _legend(losses)
    return figure


def finder_chart(rates: Sequence[float], losses_SR: NDArray[Any], chosen: float | None) -> Figure:
    """Plot the LR finder's loss against the learning rate: each seed, their mean, the chosen rate.

    losses_SR: (seeds, rates), nan where a seed diverged.
    """
    figure = _new_figure(WIDTH, 3.2)
    axes = figure.add_subplot()
    has_loss = np.isfinite(losses_SR).any(0)
    x, y_SR = np.asarray(rates)[has_loss], losses_SR[:, has_loss]
    mean = np.nanmean(y_SR, 0)
    for line in y_SR:
        axes.plot(x, line, color=COLORS["blue"], lw=0.6, alpha=0.4)
    axes.plot(x, mean, color=COLORS["blue"], label="loss, mean of the seeds")
    low, high = float(mean.min()), float(mean[0])
    axes.set_ylim(low - 0.1 * (high - low + 1e-9), high + 0.5 * (high - low + 1e-9))
    if chosen:
        axes.axvline(chosen, color=COLORS["orange"], ls="--", label=f"chosen: {chosen:.2g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss (nats)")
    _style_axes(axes)
    _legend(axes, loc="lower left")
    return figure


def learning_chart(images: Sequence[float], mean: NDArray[Any], std: NDArray[Any]) -> Figure:
    """Plot a validation metric against the number of training images, with its deviation."""
    from matplotlib.ticker import NullLocator

    figure = _new_figure(WIDTH, 3.2)
    axes = figure.add_subplot()
    axes.fill_between(images, mean - std, mean + std, color=COLORS["blue"], alpha=0.2, lw=0)
    axes.plot(images, mean, "o-", color=COLORS["blue"])
    axes.set_xscale("log")
    axes.set_xticks(list(images), [f"{int(count)}" for count in images])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="training images", ylabel="validation metric")
    _style_axes(axes)
    return figure


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """A chart as SVG for a page: without size, with a description, colors as CSS variables.

    Args:
        figure: The chart.
        name: A name that no other chart of the page has; its ids start with it.
        description: What the chart shows, for readers who cannot see it.
    """
    import html

    import matplotlib

    file = io.StringIO()
    settings: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": name}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="([^"]+)"', rf' id="{name}-\1"', svg)
    svg = re.sub(r'(xlink:href="|href="|url\()#', rf"\1#{name}-", svg)
    for color, value in COLORS.items():
        svg = svg.replace(value, f"var(--{color})")
    opening = f'<svg role="img" aria-label="{html.escape(description, quote=True)}"'
    return re.sub(
        r'<svg([^>]*?) width="[^"]*"([^>]*)>',
        lambda tag: opening + re.sub(r' height="[^"]*"', "", tag[1] + tag[2]) + ">",
        svg,
        count=1,
    )
