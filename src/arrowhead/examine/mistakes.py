"""Which classes are confused, and the metrics of each class, as tables for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.evaluation import metrics
from arrowhead.examine.predictions import Predictions

MAX_PAIRS = 15
MAX_TABLE_CLASSES = 16  # with more, the confusion matrix is a chart


@dataclass(frozen=True, slots=True)
class ConfusedPair:
    """Images of one class that are predicted as another; share: of the label's images."""

    label: str
    predicted: str
    images: int
    share: float


def evaluate(predictions: Predictions) -> dict[str, Any]:
    """Every metric of `metrics.evaluate` on the held-out images, by their current labels."""
    bundle = predictions.bundle
    return metrics.evaluate(
        predictions.held_out_logits,
        predictions.label[predictions.held_out],
        predictions.classes,
        temperature=bundle.temperature,
        thresholds=None if bundle.thresholds is None else np.array(bundle.thresholds),
    )


def most_confused(
    counts_CC: NDArray[np.int64], classes: list[str], count: int = MAX_PAIRS
) -> list[ConfusedPair]:
    """The pairs of label and prediction with the most mistakes; ties in the order of classes."""
    mistakes_CC = counts_CC.copy()
    np.fill_diagonal(mistakes_CC, 0)
    order = np.argsort(-mistakes_CC, axis=None, kind="stable")[:count]
    pairs = []
    for label, predicted in zip(*np.unravel_index(order, mistakes_CC.shape), strict=True):
        images = int(mistakes_CC[label, predicted])
        if images:
            share = images / int(counts_CC[label].sum())
            pairs.append(ConfusedPair(classes[label], classes[predicted], images, share))
    return pairs


def label_confusion(predictions: Predictions, count: int = MAX_PAIRS) -> list[ConfusedPair]:
    """With several labels: which label is missing or surplus most often."""
    held_out = predictions.held_out
    label_MC = predictions.label[held_out] > 0
    predicted_MC = predictions.predicted[held_out] > 0
    pairs = []
    for index, name in enumerate(predictions.classes):
        missing = int((label_MC[:, index] & ~predicted_MC[:, index]).sum())
        surplus = int((~label_MC[:, index] & predicted_MC[:, index]).sum())
        has_label = max(int(label_MC[:, index].sum()), 1)
        pairs.append(ConfusedPair(name, "(missing)", missing, missing / has_label))
        has_none = max(int((~label_MC[:, index]).sum()), 1)
        pairs.append(ConfusedPair("(not labelled)", name, surplus, surplus / has_none))
    pairs.sort(key=lambda pair: -pair.images)
    return [pair for pair in pairs[:count] if pair.images]


def confusion_rows(counts_CC: NDArray[np.int64], classes: list[str]) -> list[dict[str, Any]]:
    """The confusion matrix as rows of cells for a table: counts, and how strongly to color them."""
    share_CC = counts_CC / np.maximum(counts_CC.sum(1, keepdims=True), 1)
    return [
        {
            "name": name,
            "cells": [
                {
                    "count": int(counts_CC[row, column]),
                    "right": row == column,
                    "strength": round(100 * float(share_CC[row, column]) ** 0.5)
                    if row == column
                    else min(40, round(100 * float(share_CC[row, column]) ** 0.5)),
                    "pair": None if row == column else [name, predicted],
                    "predicted": predicted,
                }
                for column, predicted in enumerate(classes)
            ],
        }
        for row, name in enumerate(classes)
    ]
