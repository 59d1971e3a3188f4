"""Test-time augmentation: an image's logits are averaged over its clean and augmented views.

    features of the validation images, (N, V, D)   in the store that the head was trained on
      -> calibrate     for 1, 2, … V - 1 augmented views: temperature, thresholds, metrics
      -> the bundle's lineage, "tta"
    with_views         the bundle for scoring with that many augmented views

Averages are less confident than the clean view alone, so each number of views has its own
temperature. The augmented views are those of the bundle's recipe, the same on every machine.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.bundle.format import Bundle
from arrowhead.errors import ConfigError
from arrowhead.evaluation import calibration, metrics
from arrowhead.features.recipe import Recipe
from arrowhead.features.store import Features

if TYPE_CHECKING:
    from torch import nn

REPORTED = ("loss", "accuracy", "balanced_accuracy", "f1", "map", "ece")


def calibrate(head: nn.Module, valid: Features, bundle: Bundle) -> list[dict[str, Any]]:
    """Calibrate each number of augmented views on the validation images.

    Returns:
        For each number, ascending: views (augmented ones), temperature, thresholds (None with one
        label per image), and metrics.
    """
    if bundle.recipe.augment == "none":
        return []
    logit_NVC = view_logits(head, valid.feature)
    result = []
    for views in range(1, logit_NVC.shape[1]):
        logit_NC = logit_NVC[:, : 1 + views].mean(1)
        fitted = calibration.calibrate(logit_NC, valid.label, valid.image_id, bundle.classes)
        evaluated = fitted.metrics | metrics.evaluate(
            logit_NC,
            valid.label,
            bundle.classes,
            temperature=fitted.temperature,
            thresholds=fitted.thresholds,
        )
        result.append(
            {
                "views": views,
                "temperature": fitted.temperature,
                "thresholds": None if fitted.thresholds is None else fitted.thresholds.tolist(),
                "metrics": {name: evaluated[name] for name in REPORTED if name in evaluated},
            }
        )
    return result


def view_logits(head: nn.Module, feature_NVD: NDArray[Any]) -> NDArray[np.float32]:
    """The head's logits of every view, float32 (N, V, C)."""
    import torch

    with torch.inference_mode():
        flat = torch.from_numpy(feature_NVD.astype(np.float32)).flatten(0, 1)
        logit_NVC: NDArray[np.float32] = head(flat).unflatten(0, feature_NVD.shape[:2]).numpy()
    return logit_NVC


def with_views(bundle: Bundle, views: int, where: str | Path) -> Bundle:
    """The bundle with the temperature and thresholds for this many augmented views.

    where: of the bundle, for messages. Raises ConfigError if it is not calibrated for them.
    """
    if not views:
        return bundle
    calibrated = {entry["views"]: entry for entry in bundle.lineage.get("tta", [])}
    if views not in calibrated:
        most = max(calibrated, default=0)
        raise ConfigError(
            f"--tta {views}: {where} is calibrated for"
            + (f" up to {most} augmented views." if most else " the clean view alone."),
            "a bundle trained on a store with the clean view and that many augmented ones.",
            (f"give --tta {most}, or " if most else "")
            + f"run precompute with --views {views + 1}, and train again.",
        )
    entry = calibrated[views]
    return dataclasses.replace(
        bundle, temperature=entry["temperature"], thresholds=entry["thresholds"]
    )


def scoring_recipe(recipe: Recipe, views: int) -> Recipe:
    """The recipe for scoring with this many augmented views."""
    return dataclasses.replace(recipe, views=1 + views) if views else recipe.single_view()


def require_views(store: Recipe, bundle: Recipe, views: int, where: str | Path) -> None:
    """Raise ConfigError if the features of a store do not hold the views that are averaged."""
    ours, theirs = ((one.augment, one.augment_seed) for one in (bundle, store))
    if views and (store.views <= views or ours != theirs):
        raise ConfigError(
            f"{where} holds {store.views} view(s) of each image, augmented by {store.augment}, seed"
            f" {store.augment_seed}.",
            f"{views + 1} views, augmented by {bundle.augment}, seed {bundle.augment_seed}, as"
            f" --tta {views} averages them.",
            "leave --store out, or give the store that the bundle was trained on.",
        )
