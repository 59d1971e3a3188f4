"""The section of a report with its curves: calibration, ROC, training, the LR finder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arrowhead.bundle.format import REPORT_FOLDER
from arrowhead.evaluation.metrics import log_sum_exp
from arrowhead.examine import charts, tables
from arrowhead.examine.predictions import Predictions


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart (a matplotlib figure) with its name and the sentences below it."""

    name: str
    figure: Any
    caption: str


def draw(predictions: Predictions, metrics: dict[str, Any], bundle: Path) -> Iterator[Chart]:
    """Draw the curves that there are data for.

    Args:
        predictions: The predictions.
        metrics: See `mistakes.evaluate`.
        bundle: The bundle's folder, whose report/ has the tables of its training.
    """
    held_out = predictions.held_out
    if not held_out.any():
        return
    if not predictions.multi:
        logit_MC = predictions.held_out_logits.astype(np.float64)
        raw_M = np.exp(logit_MC.max(1) - log_sum_exp(logit_MC))
        yield Chart(
            "reliability",
            charts.reliability_chart(
                predictions.confidence[held_out], raw_M, predictions.correct[held_out]
            ),
            _calibration_caption(predictions, metrics),
        )
    label, prob_MC = predictions.label[held_out], predictions.held_out_probabilities()
    if _has_two_answers(label):
        yield Chart(
            "roc_and_precision_recall",
            charts.curves_chart(prob_MC, label, predictions.classes),
            _curves_caption(predictions, metrics),
        )
    yield from _training_charts(predictions, bundle)


def _has_two_answers(label: Any) -> bool:
    """Whether any class has images with it and images without it."""
    if label.ndim == 2:
        return bool(((label > 0).any(0) & ~(label > 0).all(0)).any())
    return len(np.unique(label)) > 1


def _calibration_caption(predictions: Predictions, metrics: dict[str, Any]) -> str:
    """What the reliability diagram says. The bundle's own error was measured by cross-fitting."""
    own = predictions.bundle.metrics
    measured = own if own.get("ece") is not None else metrics
    if measured.get("ece") is None:
        return "Confidence against accuracy."
    caption = f"Expected calibration error {measured['ece']:.3f}"
    if measured.get("ece_uncalibrated") is not None and predictions.bundle.temperature != 1:
        caption += (
            f"; {measured['ece_uncalibrated']:.3f} without the temperature of"
            f" {predictions.bundle.temperature:.2f}"
        )
    where = ", on images that the temperature was not fitted to" if measured is own else ""
    return f"{caption}{where}. Above the dotted line the model is more often right than it says."


def _curves_caption(predictions: Predictions, metrics: dict[str, Any]) -> str:
    caption = ""
    if metrics.get("auroc") is not None:
        caption = f"Area under the ROC curve {metrics['auroc']:.4f}. "
    if len(predictions.classes) > charts.MAX_CURVES:
        return f"{caption}Shown: the {charts.MAX_CURVES} classes with the smallest area."
    return f"{caption}Each class against the rest."


def _training_charts(predictions: Predictions, bundle: Path) -> Iterator[Chart]:
    """The curves of the training, as far as it left their tables in the bundle."""
    epochs = tables.read_csv_columns(bundle / REPORT_FOLDER / "epochs.csv")
    names = ("epoch", "train_loss", "valid_loss", "accuracy")
    if epochs and all(name in epochs for name in names) and len(epochs["epoch"]) > 1:
        columns = [epochs[name].tolist() for name in names]
        lines = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
        kept = predictions.bundle.lineage.get("epoch")
        yield Chart(
            "training",
            charts.training_chart(lines, kept),
            f"Training of {len(lines)} epochs; the bundle has the weights of epoch {kept}.",
        )
    learning = tables.read_csv_columns(bundle / REPORT_FOLDER / "learning_curve.csv")
    if learning and {"images", "spread"} < learning.keys() and len(learning) > 3:
        metric, mean = list(learning.items())[2]
        yield Chart(
            "learning_curve",
            charts.learning_chart(
                learning["images"].tolist(), mean, np.nan_to_num(learning["spread"])
            ),
            f"Learning curve: {metric} with a part of the training images. If it still"
            " rises, more images will help.",
        )
    finder = tables.read_csv_columns(bundle / REPORT_FOLDER / "lr_finder.csv")
    if finder and "rate" in finder and len(finder) > 1:
        rates = finder.pop("rate")
        losses_SR = np.array(list(finder.values()))
        if np.isfinite(losses_SR).any():
            rate = predictions.bundle.lineage.get("rate")
            yield Chart(
                "lr_finder",
                charts.finder_chart(rates.tolist(), losses_SR, rate),
                "The LR finder: the loss while the learning rate rises. Each thin line is a seed.",
            )
