"""The header of a report: what was examined, on which images, and the main figures."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from time import gmtime, strftime
from typing import Any

from arrowhead.bundle import format as bundle_format
from arrowhead.data.catalog import Catalog
from arrowhead.evaluation import metrics as evaluation_metrics
from arrowhead.examine.content import Content
from arrowhead.examine.predictions import Predictions
from arrowhead.wording import pluralize


def make_header(
    catalog: Catalog,
    predictions: Predictions,
    metrics: Mapping[str, Any],
    store: Path,
    bundle_path: Path,
    address: str,
    out: Path,
) -> Content:
    """The content of a page without its sections.

    Args:
        catalog: All images of the store.
        predictions: What the bundle predicts for them.
        metrics: Of the held-out images, as `mistakes.evaluate` gives them.
        store: Its folder.
        bundle_path: The bundle's folder.
        address: What the user calls the bundle.
        out: Where the report will be.
    """
    bundle = predictions.bundle
    recipe = bundle.recipe
    source = catalog.source or catalog.root
    name = source.rstrip("/").rpartition("/")[2] or source
    return Content(
        title=f"{name}: what the model got wrong, and what the data got wrong",
        subtitle=f"{pluralize(len(catalog), 'image')}, {len(bundle.classes)} classes ·"
        f" {recipe.body}, {bundle.head} head · {strftime('%Y-%m-%d %H:%M', gmtime())} UTC",
        classes=bundle.classes,
        multi=bundle.multi,
        command=shlex.join(["arrowhead", "examine", str(store), address, str(out)]),
        about=[
            ("images", source),
            ("store", str(store.absolute())),
            ("bundle", address),
            ("fingerprint", bundle_format.fingerprint(bundle_path)),
            ("MLflow run", str(bundle.lineage.get("run_id") or "not recorded")),
            (
                "backbone",
                f"{recipe.body}, {recipe.size} pixels, {recipe.resize}",
            ),
            ("its weights", bundle.weights_sentence),
            ("classes", str(len(bundle.classes))),
        ],
        held_out_sentence=_held_out_sentence(predictions),
        tiles=_tiles(len(catalog), predictions, metrics),
    )


def _held_out_sentence(predictions: Predictions) -> str:
    """Which images the report shows, in words."""
    held_out = int(predictions.held_out.sum())
    train = int((predictions.split == "train").sum())
    sentence = (
        f"All pictures are of the {pluralize(held_out, 'held-out image')}: the model was not"
        f" trained on them, but on {pluralize(train, 'other image')}."
    )
    copies = int((predictions.split != "train").sum()) - held_out
    if copies:
        sentence += (
            f" {pluralize(copies, 'further validation or test image')}"
            f" {'are exact copies' if copies > 1 else 'is an exact copy'} of training images"
            " and not shown."
        )
    return sentence


def _tiles(
    images: int, predictions: Predictions, metrics: Mapping[str, Any]
) -> list[dict[str, str]]:
    """The main figures. images: the number of files of the store."""
    held_out, bundle = int(predictions.held_out.sum()), predictions.bundle
    tiles = []
    if held_out and not bundle.multi:
        correct = round(metrics["accuracy"] * held_out)
        low, high = evaluation_metrics.wilson_interval(correct, held_out)
        note = f"{correct} of {held_out}, 95 % interval {low:.3f} to {high:.3f}"
        tiles.append(_tile("Accuracy", f"{metrics['accuracy']:.4f}", note))
        note = "mean recall of the classes"
        tiles.append(_tile("Balanced accuracy", f"{metrics['balanced_accuracy']:.4f}", note))
    elif held_out:
        note = f"mean over {held_out} held-out images"
        tiles.append(_tile("F2", f"{metrics['f2_samples']:.4f}", note))
    ece = bundle.metrics.get("ece")
    if ece is not None:
        note = f"temperature {bundle.temperature:.2f}"
        tiles.append(_tile("Calibration error", f"{ece:.3f}", note))
    note = f"and {pluralize(images - len(predictions), 'unreadable file')}"
    return [*tiles, _tile("Images", f"{len(predictions):,}", note)]


def _tile(label: str, value: str, note: str) -> dict[str, str]:
    return {"label": label, "value": value, "note": note}
