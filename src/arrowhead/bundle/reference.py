"""What a bundle gives for some images, to compare exported files with.

The images are the bundle's golden images; if it has none, images that are drawn from a seed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.bundle import format as bundle_format
from arrowhead.bundle import replay
from arrowhead.bundle.format import Bundle
from arrowhead.errors import DataError

if TYPE_CHECKING:
    from torch import nn

MIN_BATCH_SIZE = 16  # as in scoring: a CPU may compute smaller batches in another order

Run = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """Images, and what the bundle gives for them on this machine.

    Attributes:
        description: What the images are, for messages.
        pixels: uint8 (B, 3, S, S), RGB.
        probabilities: float32 (B, C), as `score` computes them.
        logits: float32 (B, C), divided by the temperature, from features that are not rounded to
            float16.
    """

    description: str
    pixels: NDArray[np.uint8]
    probabilities: NDArray[np.float32]
    logits: NDArray[np.float32]


def make_reference(bundle: Bundle, path: Path, body: Any, head: nn.Module) -> Reference:
    """Run the bundle on its golden images, or on drawn images.

    Args:
        bundle: The bundle.
        path: Where it is, for messages.
        body: Its body, see `Bundle.make_body`.
        head: Its head, see `Bundle.make_head`.

    Raises:
        DataError: If the golden images cannot be decoded here.
    """
    import torch

    view_BCHW = _golden_pixels(bundle, path) if bundle.golden else _drawn_pixels(bundle)
    black = np.zeros((max(0, MIN_BATCH_SIZE - len(view_BCHW)), *view_BCHW.shape[1:]), np.uint8)
    with torch.inference_mode():
        feature_BD = body(torch.from_numpy(np.concatenate([view_BCHW, black])))
        feature_BD = feature_BD[: len(view_BCHW)].cpu().float()
        logit_BC = head(feature_BD) / bundle.temperature
    return Reference(
        description="golden images" if bundle.golden else "drawn pixels",
        pixels=view_BCHW,
        probabilities=bundle_format.probabilities(
            head, feature_BD.half().numpy(), bundle.temperature, multi=bundle.multi
        ),
        logits=logit_BC.numpy(),
    )


def _golden_pixels(bundle: Bundle, path: Path) -> NDArray[np.uint8]:
    """The pixels of the golden images, (B, 3, S, S)."""
    images = [image.data for image in bundle.golden]
    threads = len(os.sched_getaffinity(0))
    with replay.clean_decoder(bundle.recipe, "cpu", threads, len(images)) as decode:
        pixels = decode(images, [bytes(16)] * len(images))
        view_BCHW: NDArray[np.uint8] = pixels.views[0].transpose(0, 3, 1, 2).copy()
    if fault := next((fault for fault in pixels.faults if fault), None):
        raise DataError(
            f"The golden images of {path} cannot be read on this machine: {fault}.",
            "the images that the bundle was saved with, to check the exported file.",
            "run `arrowhead doctor`; if it finds nothing, train again.",
        )
    return view_BCHW


def _drawn_pixels(bundle: Bundle) -> NDArray[np.uint8]:
    """Images from coarse blobs to pixel noise, always the same, (B, 3, S, S)."""
    import torch
    from torch.nn.functional import interpolate

    generator, side = torch.Generator().manual_seed(0), bundle.recipe.size
    grids = [torch.rand((1, 3, n, n), generator=generator) for n in (2, 3, 5, 8, 16, side)]
    images = torch.cat([interpolate(grid, (side, side), mode="bilinear") for grid in grids])
    view_BCHW: NDArray[np.uint8] = (images * 255).round().to(torch.uint8).numpy()
    return view_BCHW


def compare(
    bundle: Bundle, reference: Reference, run: Run, batch_size: int, tolerance: float
) -> float:
    """The largest difference of a probability between an exported file and its bundle.

    Args:
        bundle: The bundle.
        reference: What it gives.
        run: Runs the file: pixels (B, 3, S, S) to probabilities (B, C).
        batch_size: The number of images for each call of `run`.
        tolerance: The largest difference allowed.

    Raises:
        DataError: If a probability differs by more, or a label differs.
    """
    starts = range(0, len(reference.pixels), batch_size)
    prob_BC = np.concatenate([run(reference.pixels[at : at + batch_size]) for at in starts])
    expected_BC = reference.probabilities
    largest = float(np.abs(prob_BC - expected_BC).max())
    changed_B = (bundle.predict_labels(prob_BC) != bundle.predict_labels(expected_BC)).any(1)
    if not bundle.golden:  # random images may lie on a decision boundary
        changed_B &= bundle.margin(expected_BC) > 2 * tolerance
    changed = int(changed_B.sum())
    if changed or not largest <= tolerance:
        raise DataError(
            f"The file gives the {reference.description} other probabilities than the bundle"
            f" (batches of {batch_size}): largest difference {largest:.2g}, {changed} of"
            f" {len(prob_BC)} labels changed. It was not kept.",
            f"a difference of at most {tolerance:g}, and the same labels.",
            "try the other --format, or other versions of torch and onnxruntime, and please report"
            " it.",
        )
    return largest
