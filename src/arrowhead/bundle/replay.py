"""A bundle's golden images replayed: does this machine see what its maker saw?"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from arrowhead.bundle import format as bundle_format
from arrowhead.bundle.format import Bundle
from arrowhead.decode.pixels import Pixels
from arrowhead.decode.worker_process import GuardedDecoder
from arrowhead.errors import DataError
from arrowhead.features import extract
from arrowhead.features.backbone import Body
from arrowhead.features.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn


NO_GOLDEN_IMAGES = (
    "The bundle has no golden images: nothing proves that this machine sees images as the one that"
    " trained it. Train again from a store that keeps some to have that checked."
)


@dataclass(frozen=True, slots=True)
class Drift:
    """How far this machine is from the one that made the bundle.

    images: golden images replayed; feature: largest cosine distance of a feature (0: none);
    probability: largest change of a probability; changed: images whose labels differ.
    """

    images: int
    feature: float
    probability: float
    changed: int


def must_agree(
    drift: Drift,
    most: float,
    do: str = "check that decoder, weights and recipe are the bundle's. --max-drift allows more"
    " drift, but never other labels.",
) -> None:
    """DataError when golden images came out differently: a feature further off than `most`, or
    another label. do: what to do about it.
    """
    if drift.changed or not drift.feature <= most:
        raise DataError(
            f"The bundle's golden images come out differently on this machine: largest feature"
            f" drift {drift.feature:.2g}, {drift.changed} of {drift.images} labels changed.",
            f"a drift of at most {most:g} and the same labels.",
            do,
        )


def verify(path: Path) -> Drift:
    """Load the bundle at `path` and replay its golden images here; how far they drift.

    Raises DataError if it is torn.
    """
    import torch

    bundle = bundle_format.load(path)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    body, head = bundle.make_body(device), bundle.make_head(device)
    return replay(bundle, body, head, device, len(os.sched_getaffinity(0)))


def replay(bundle: Bundle, body: Body, head: nn.Module, device: str, threads: int) -> Drift:
    """Decode and score the golden images here and compare with what they gave at first."""
    if not bundle.golden:
        return Drift(0, 0.0, 0.0, 0)
    feature_ND = features(bundle.recipe, body, [one.data for one in bundle.golden], device, threads)
    before_ND = np.stack([one.feature for one in bundle.golden])
    before_NC = np.stack([one.probabilities for one in bundle.golden])
    now_NC = bundle_format.probabilities(head, feature_ND, bundle.temperature, multi=bundle.multi)
    norms = np.linalg.norm(feature_ND, axis=1) * np.linalg.norm(before_ND, axis=1)
    cosine = (feature_ND * before_ND).sum(1) / np.maximum(norms, 1e-12)
    cosine[(feature_ND == before_ND).all(1)] = 1  # also where both are zeros, without direction
    # An image that cannot be decoded here is as far away as can be.
    lost = np.isnan(feature_ND).any(1)
    cosine[lost], now_NC[lost] = -1, 1 - before_NC[lost]
    changed = lost | (bundle.given(now_NC) != bundle.given(before_NC)).any(1)
    return Drift(
        images=len(bundle.golden),
        feature=float(max(0.0, 1 - cosine.min())),
        probability=float(np.abs(now_NC - before_NC).max()),
        changed=int(changed.sum()),
    )


def features(
    recipe: Recipe, body: Body, images: Sequence[bytes], device: str, threads: int
) -> NDArray[np.float32]:
    """float32 (N, D): clean features of a few images, NaN where one cannot be decoded."""
    with decoder(recipe, device, threads, max(16, len(images))) as decode:
        return seen(body, decode(images, [bytes(16)] * len(images)))


def decoder(recipe: Recipe, device: str, threads: int, batch_size: int) -> GuardedDecoder:
    """What makes the clean view of images, whatever views the recipe trained on."""
    clean = dataclasses.replace(recipe, views=1, augment="none", augment_seed=0)
    number = int(device.partition(":")[2] or 0) if "cuda" in device else None
    return GuardedDecoder(
        extract.make_pixel_config(clean),
        batch_size=batch_size,
        threads=threads,
        device=number,
        rule=recipe.decoder,
    )


def seen(body: Body, pixels: Pixels) -> NDArray[np.float32]:
    """float32 (N, D): the features of decoded images, NaN where there is a fault."""
    import torch

    view = torch.from_numpy(pixels.views[0]).permute(0, 3, 1, 2)
    out = body(view)[: len(pixels.faults)].cpu().numpy().astype(np.float16).astype(np.float32)
    out[[fault is not None for fault in pixels.faults]] = np.nan
    return out
