"""Build a bundle from a feature store and a trained head.

Fits the temperature and the thresholds, evaluates the head, and adds the novelty detector, the
golden images and the lineage. Reads only the store: no photos, and neither Ray nor MLflow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arrowhead import __version__
from arrowhead.bundle import golden, tta
from arrowhead.bundle.format import Bundle
from arrowhead.bundle.known_images import KnownImages
from arrowhead.data.catalog import Catalog
from arrowhead.evaluation import calibration, novelty
from arrowhead.evaluation import metrics as evaluation_metrics
from arrowhead.evaluation.novelty import NoveltyDetector
from arrowhead.features import corrections, extract
from arrowhead.features.store import Features, Store
from arrowhead.training.config import TrainConfig
from arrowhead.training.trainer import TrainedHead

if TYPE_CHECKING:
    from torch import nn


def build(
    store: Store,
    config: TrainConfig,
    trained: TrainedHead,
    *,
    candidates: Mapping[bytes, bytes],
    lineage: dict[str, Any],
) -> Bundle:
    """Build the bundle of a trained head.

    Temperature and thresholds are fitted to the validation images; their metrics come from
    cross-fitting (see `calibration.calibrate`). Test images, if there are any, are only evaluated:
    nothing is fitted to them.

    Args:
        store: The feature store that the head was trained on.
        config: The settings of the training.
        trained: The head's weights.
        candidates: Image files by image id, from which golden images are chosen; may be empty.
        lineage: Entries to add to the bundle's lineage, such as the MLflow run id.

    Returns:
        The bundle with its metrics (see `metrics.evaluate`; those of test images start with
        `test_`).
    """
    valid = store.features("valid")
    bundle = _uncalibrated_bundle(store, config, trained, multi=valid.multi)
    head = bundle.make_head()
    logit_NC = _logits(head, valid)
    calibrated = calibration.calibrate(logit_NC, valid.label, valid.image_id, bundle.classes)
    decision: dict[str, Any] = {
        "temperature": calibrated.temperature,
        "thresholds": calibrated.thresholds,
    }
    metrics = evaluation_metrics.evaluate(logit_NC, valid.label, bundle.classes, **decision)
    metrics |= calibrated.metrics
    test = store.features("test")
    if len(test.row):
        tested = evaluation_metrics.evaluate(
            _logits(head, test), test.label, bundle.classes, **decision
        )
        metrics |= {f"test_{name}": value for name, value in tested.items()}
    train_ids = store.features("train", rows_only=True).image_id
    by_views = tta.calibrate(head, valid, bundle)
    bundle = dataclasses.replace(
        bundle,
        temperature=calibrated.temperature,
        thresholds=None if calibrated.thresholds is None else calibrated.thresholds.tolist(),
        metrics=metrics,
        lineage=_lineage(store, config, trained)
        | ({"tta": by_views} if by_views else {})
        | lineage,
        novelty=_novelty(store, valid),
        known_images=KnownImages.from_ids(train_ids, valid.image_id),
    )
    return dataclasses.replace(bundle, golden=golden.choose(store, bundle, candidates))


def _uncalibrated_bundle(
    store: Store, config: TrainConfig, trained: TrainedHead, *, multi: bool
) -> Bundle:
    """The backbone and the head, at temperature 1 and without metrics."""
    import torch

    return Bundle(
        recipe=store.recipe,
        classes=store.manifest()["classes"],
        head=config.architecture,
        temperature=1.0,
        multi=multi,
        body_state=extract.load_weights(store.recipe, store.weights_path),
        head_state={name: torch.tensor(value) for name, value in trained.state.items()},
        metrics={},
        lineage={},
    )


def _logits(head: nn.Module, part: Features) -> NDArray[np.float32]:
    """float32 (N, C): the head's logits of the clean views."""
    import torch

    with torch.inference_mode():
        logit_NC = head(torch.from_numpy(part.feature[:, 0].astype(np.float32)))
    array_NC: NDArray[np.float32] = logit_NC.numpy()
    return array_NC


def _lineage(store: Store, config: TrainConfig, trained: TrainedHead) -> dict[str, Any]:
    changes = corrections.active_changes(corrections.read_history(store))
    origin = store.weights_origin
    optional = {"corrections": changes} if changes else {}
    return (
        optional
        | ({"weights": origin} if origin else {})
        | {
            "arrowhead": __version__,
            "data": Catalog(**store.read_catalog()).digest(),
            "training": config.parameters(),
            "epoch": trained.epoch,
        }
    )


def _novelty(store: Store, valid: Features) -> NoveltyDetector:
    """The novelty detector: fitted to clean training features, calibrated on validation images."""
    train = store.features("train", rows_only=True)
    row_M = train.row[novelty.sample_bank_rows(train.image_id)]
    return NoveltyDetector.fit(store.clean_features(row_M), valid.feature[:, 0])
