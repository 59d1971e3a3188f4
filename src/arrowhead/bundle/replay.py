"""Run a bundle's golden images on this machine and compare with the results stored in it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from arrowhead.bundle import format as bundle_format
from arrowhead.bundle.format import Bundle
from arrowhead.decode.pixels import Pixels, device_of
from arrowhead.decode.worker_process import SubprocessDecoder
from arrowhead.errors import DataError
from arrowhead.features import extract
from arrowhead.features.backbone import Body
from arrowhead.features.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn


NO_GOLDEN_IMAGES = (
    "The bundle has no golden images, so this machine cannot be compared with the one that trained"
    " it. Train again from a store with golden images to have that checked."
)


@dataclass(frozen=True, slots=True)
class Drift:
    """How much the results of this machine differ from those of the one that built the bundle.

    images: number of golden images; feature: largest cosine distance of a feature (0: equal);
    probability: largest change of a probability; changed: number of images whose labels differ.
    """

    images: int
    feature: float
    probability: float
    changed: int
    emulated: str = ""
    """The precision of the recipe for which this machine has no units; "" if it has."""


def check_drift(
    drift: Drift,
    max_drift: float,
    do: str = "check that decoder, weights and recipe are the bundle's. --max-drift allows more"
    " drift, but never other labels.",
) -> None:
    """Raise DataError if a feature drifts by more than `max_drift`, or a label changes.

    do: the third part of the error, what the user should do.
    """
    if drift.changed or not drift.feature <= max_drift:
        raise DataError(
            f"The bundle's golden images come out differently on this machine: largest feature"
            f" drift {drift.feature:.2g}, {drift.changed} of {drift.images} labels changed.",
            f"a drift of at most {max_drift:g} and the same labels.",
            do,
        )


def verify(path: Path) -> Drift:
    """Load the bundle at `path` and replay its golden images; raises DataError if it is damaged."""
    import torch

    bundle = bundle_format.load(path)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    body, head = bundle.make_body(device), bundle.make_head(device)
    return replay(bundle, body, head, device, len(os.sched_getaffinity(0)))


def replay(bundle: Bundle, body: Body, head: nn.Module, device: str, threads: int) -> Drift:
    """Decode and score the golden images on this machine and compare with the stored results.

    An image that cannot be decoded here counts as the largest possible drift.
    """
    emulated = "" if body.is_native else body.precision
    if not bundle.golden:
        return Drift(0, 0.0, 0.0, 0, emulated)
    images = [image.data for image in bundle.golden]
    feature_ND = clean_features(bundle.recipe, body, images, device, threads)
    prob_NC = bundle_format.probabilities(head, feature_ND, bundle.temperature, multi=bundle.multi)
    stored_ND = np.stack([image.feature for image in bundle.golden])
    stored_NC = np.stack([image.probabilities for image in bundle.golden])
    norm_N = np.linalg.norm(feature_ND, axis=1) * np.linalg.norm(stored_ND, axis=1)
    cosine_N = (feature_ND * stored_ND).sum(1) / np.maximum(norm_N, 1e-12)
    cosine_N[(feature_ND == stored_ND).all(1)] = 1  # includes two zero vectors
    failed_N = np.isnan(feature_ND).any(1)
    cosine_N[failed_N], prob_NC[failed_N] = -1, 1 - stored_NC[failed_N]
    label_NC, stored_label_NC = bundle.predict_labels(prob_NC), bundle.predict_labels(stored_NC)
    changed_N = failed_N | (label_NC != stored_label_NC).any(1)
    return Drift(
        images=len(bundle.golden),
        feature=float(max(0.0, 1 - cosine_N.min())),
        probability=float(np.abs(prob_NC - stored_NC).max()),
        changed=int(changed_N.sum()),
        emulated=emulated,
    )


def clean_features(
    recipe: Recipe, body: Body, images: Sequence[bytes], device: str, threads: int
) -> NDArray[np.float32]:
    """Features of encoded images without augmentation, float32 (N, D); NaN if decoding fails."""
    with clean_decoder(recipe, device, threads, max(1, len(images))) as decode:
        return features_of_pixels(body, decode(images, [bytes(16)] * len(images)))


def clean_decoder(recipe: Recipe, device: str, threads: int, batch_size: int) -> SubprocessDecoder:
    """A decoder that gives one view of each image, without the recipe's augmentation."""
    return SubprocessDecoder(
        extract.make_pixel_config(recipe.single_view()),
        batch_size=batch_size,
        threads=threads,
        device=device_of(device),
        rule=recipe.decoder,
    )


def features_of_pixels(body: Body, pixels: Pixels) -> NDArray[np.float32]:
    """Features of decoded images, float32 (N, D) with float16 precision; NaN at a fault."""
    import torch

    view_NCHW = torch.as_tensor(pixels.views[0]).permute(0, 3, 1, 2)
    feature_ND = body(view_NCHW).cpu().numpy()
    feature_ND = feature_ND.astype(np.float16).astype(np.float32)
    feature_ND[[fault is not None for fault in pixels.faults]] = np.nan
    return feature_ND
