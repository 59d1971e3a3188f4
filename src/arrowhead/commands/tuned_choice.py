"""Whether a fine-tuned network is better than the frozen one it started from, by more than chance.

validation images   -> frozen_features   those of the frozen body, from a store or computed
both bundles        -> judge             calibrated probabilities, the Brier score of each image
                    -> Judgement         the fine-tuned one only if its score is certainly lower

The Brier score is compared image by image. Accuracy alone decides little, because the two differ in
few of a few hundred images. Where there is no evidence, the frozen bundle is kept.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead import fileio
from arrowhead.bundle import body_file
from arrowhead.bundle import format as bundle_format
from arrowhead.bundle.format import Bundle
from arrowhead.commands import precompute
from arrowhead.data.catalog import Catalog
from arrowhead.evaluation import metrics as evaluation_metrics
from arrowhead.features.feature_config import FeatureConfig
from arrowhead.features.store import Features, Store
from arrowhead.reporting import run_context
from arrowhead.reporting.run_context import RunContext
from arrowhead.training import comparison


@dataclass(frozen=True, slots=True)
class Base:
    """The bundle to start from: its folder and content, and its store if there is one."""

    path: Path
    bundle: Bundle
    store: Path | None

    @property
    def fingerprint(self) -> str:
        """See `bundle_format.fingerprint`."""
        return bundle_format.fingerprint(self.path)


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """Two bundles compared on the same validation images.

    Attributes:
        frozen, tuned: Mean Brier scores, lower is better.
        gain: Frozen minus tuned.
        half_width: Half of the 95 % interval of the gain.
        p: The two-sided p-value of no difference, by a paired sign-flip test.
        images: Different images.
    """

    frozen: float
    tuned: float
    gain: float
    half_width: float
    p: float
    images: int

    @property
    def is_better(self) -> bool:
        """Whether the fine-tuned bundle is better by more than chance."""
        return self.gain > 0 and self.p < comparison.SIGNIFICANCE_LEVEL


def judge(
    base: Bundle, tuned: Bundle, valid: Features, frozen_feature_ND: NDArray[Any]
) -> Judgement:
    """Compare two bundles on the validation images of the tuned body's store."""
    briers = []
    for bundle, feature in ((base, frozen_feature_ND), (tuned, valid.feature[:, 0])):
        prob = bundle_format.probabilities(
            bundle.make_head(), feature, bundle.temperature, multi=bundle.multi
        )
        briers.append(comparison.brier_by_image(np.nan_to_num(prob), valid.label))
    first = np.unique(valid.image_id, return_index=True)[1]  # copies are no further evidence
    frozen_N, tuned_N = (one[first] for one in briers)
    gain_N = frozen_N - tuned_N
    return Judgement(
        frozen=float(frozen_N.mean()),
        tuned=float(tuned_N.mean()),
        gain=float(gain_N.mean()),
        half_width=comparison.half_width(gain_N),
        p=comparison.paired_p_value(gain_N),
        images=len(gain_N),
    )


def frozen_metrics(base: Base, store: Store, frozen_feature_ND: NDArray[Any]) -> dict[str, Any]:
    """The metrics of the base on the validation images of `store`: its own, if those were the same
    images with the same labels.
    """
    import torch

    catalog = Catalog(**store.read_catalog())
    if base.bundle.lineage.get("data") == catalog.digest():
        return base.bundle.metrics
    with torch.inference_mode():
        logit_NC = base.bundle.make_head()(torch.from_numpy(frozen_feature_ND).float()).numpy()
    thresholds = base.bundle.thresholds
    return evaluation_metrics.evaluate(
        logit_NC,
        store.features("valid").label,
        base.bundle.classes,
        temperature=base.bundle.temperature,
        thresholds=None if thresholds is None else np.array(thresholds),
    )


def frozen_features(
    base: Base, valid: Features, store: Store, images: FeatureConfig, context: RunContext
) -> NDArray[np.float16]:
    """The frozen body's features of the validation images of `store`, float16 (n, D), in its order.

    They come from the base's own store, if that has them; else they are computed beside `store`.
    """
    folder = store.path.parent / "frozen"
    scratch = folder / "valid"
    recipe = base.bundle.recipe.single_view()
    places = [base.store, base.path.with_name("store"), folder / "store", scratch]
    for path in places:
        if path and (path / "manifest.json").is_file():
            other = Store(path)
            if other.recipe.single_view() == recipe:
                found = _lookup(other, valid.image_id)
                if found is not None:
                    return found
    fileio.remove_path(scratch)
    folder.mkdir(parents=True, exist_ok=True)
    body = body_file.write_body(base.bundle, folder / "body.safetensors")
    catalog = Catalog(**store.read_catalog())
    catalog = catalog.select([split == "valid" for split in catalog.splits])
    pixels = dataclasses.replace(images.pixels, views=1)
    images = dataclasses.replace(images, body=body, pixels=pixels)
    context.screen.print(f"features of the validation images by the body of {base.path}:")
    with run_context.child_context(context, "frozen") as child:
        precompute.precompute(catalog, scratch, images, child)
    found = _lookup(Store(scratch), valid.image_id)
    if found is None:
        raise AssertionError(f"{scratch} lacks images that were just computed")
    return found


def _lookup(store: Store, image_id_N: NDArray[np.uint64]) -> NDArray[np.float16] | None:
    """The clean features of these images, in their order; None if one of them is not there."""
    part = store.features(rows_only=True)
    row_of = dict(zip(part.image_id.tolist(), part.row.tolist(), strict=True))
    rows = [row_of.get(one, -1) for one in image_id_N.tolist()]
    if min(rows, default=-1) < 0:
        return None
    ascending, where = np.unique(np.array(rows), return_inverse=True)
    feature: NDArray[np.float16] = store.clean_features(ascending)[where]
    return feature
