"""Accuracy before and after: this bundle and the one that it replaced, on the same images.

If labels were corrected between the two trainings, both are measured by the labels of both times:
better labels change the figure of a model that did not change at all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from arrowhead.bundle import format as bundle_format
from arrowhead.data.catalog import Catalog
from arrowhead.errors import Refusal
from arrowhead.evaluation.metrics import wilson_interval
from arrowhead.examine import predictions as examine_predictions
from arrowhead.examine.predictions import Predictions
from arrowhead.features import corrections
from arrowhead.features.store import Store
from arrowhead.wording import pluralize


def compare_with_previous(
    store: Store, catalog: Catalog, bundle: Path, predictions: Predictions
) -> dict[str, Any] | None:
    """Compare a bundle with BUNDLE.previous on the images that both were not trained on.

    Returns:
        sentence; columns: names of the labels that were used; rows: name and, for each column,
        images, accuracy (with several labels: of images whose labels are all right), low and high
        of its 95 % interval. None if there is no previous bundle of this recipe and these classes.
    """
    path = bundle.with_name(f"{bundle.name}.previous")
    try:
        if not (path / "bundle.json").is_file():
            return None
        previous = bundle_format.load(path)
        before = examine_predictions.predict(store, previous)
    except Refusal:  # damaged, or of another recipe or other classes
        return None
    index = (predictions.held_out & before.held_out).nonzero()[0].tolist()
    if not index:
        return None
    changes = previous.lineage.get("corrections", [])
    old_labels = corrections.labels_with(store, changes)
    rows = predictions.row[index].tolist()
    changed = sum(old_labels[row] != catalog.labels[row] for row in rows)
    sets = [("labels now", catalog.labels)]
    if changed:
        sets.insert(0, ("labels before the corrections", old_labels))
    lines = []
    for name, predicted in (("previous bundle", before), ("this bundle", predictions)):
        answers = [tuple(sorted(predicted.names(predicted.predicted[k]))) for k in index]
        cells = []
        for _, labels in sets:
            correct = sum(answer == labels[row] for answer, row in zip(answers, rows, strict=True))
            low, high = wilson_interval(correct, len(rows))
            cells.append({"accuracy": correct / len(rows), "low": low, "high": high})
        lines.append({"name": name, "cells": cells})
    sentence = f"On the same {pluralize(len(rows), 'held-out image')}"
    if changed:
        sentence += f", of which {changed} {'have' if changed > 1 else 'has'} a corrected label"
    return {"sentence": f"{sentence}.", "columns": [name for name, _ in sets], "rows": lines}
