"""Which part of a photo is seen: the frame of a view, upright."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arrowhead.decode.pixels import Header, PixelConfig


def frame(
    config: PixelConfig, header: Header, mirrored: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The region of an image that the clean view shows: float32 (y, x) of two corners, in pixels.

    crop is torchvision's Resize(8/7 size), CenterCrop(size), whole pixels included: what it would
    cut out of the resized image is traced back, so only that much is ever resized.

    mirrored: bool (y, x), which sides of the stored picture will be seen from the other end; the
    middle of these is rounded from there.
    """
    whole = np.array([header.height, header.width], np.float64)
    if config.resize != "crop":
        return np.zeros(2, np.float32), whole.astype(np.float32)
    shorter = round(config.size * 8 / 7)
    resized = np.floor(shorter * whole / whole.min())
    start = np.round((resized - config.size) / 2)
    if mirrored is not None:
        start = np.where(mirrored, resized - config.size - start, start)
    scale = whole / resized
    return (start * scale).astype(np.float32), ((start + config.size) * scale).astype(np.float32)


def mirrored(orientation: int) -> NDArray[np.bool_]:
    """Which sides of a stored picture `upright` mirrors: bool (y, x)."""
    rows, columns = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return np.array([columns, rows] if orientation >= 5 else [rows, columns])


@dataclass(frozen=True, slots=True)
class Shot:
    """One augmented view: what is cut out (float32 (y, x) and (h, w), shares of the image), by how
    many degrees it is turned, its (brightness, contrast), quarter turns, whether it is mirrored.
    """

    anchor: NDArray[np.float32]
    shape: NDArray[np.float32]
    angle: NDArray[np.float32]
    light: NDArray[np.float32]
    quarters: int
    mirrored: bool


def shot(config: PixelConfig, image_id: bytes, view: int) -> Shot:
    """The augmentation of one view: a pure function of (seed, image_id, view).

    Random resized crop of half to all of the image, +-10 degrees, +-10 % light and mirroring,
    as in the lesson's side-on transforms; top-down adds quarter turns.
    """
    key = f"{config.augment_seed}/{image_id.hex()}/{view}".encode()
    seed = int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "little")
    draw = np.random.default_rng(seed)
    if config.augment == "none":
        everything = np.ones(2, np.float32), np.zeros(1, np.float32)
        return Shot(np.zeros(2, np.float32), everything[0], everything[1], everything[0], 0, False)
    shape = np.sqrt(draw.uniform(0.5, 1)) * np.exp(draw.uniform(-0.15, 0.15) * np.array([1, -1]))
    shape = np.minimum(shape, 1).astype(np.float32)
    anchor = (draw.uniform(0, 1, 2) * (1 - shape)).astype(np.float32)
    angle = draw.uniform(-10, 10, 1).astype(np.float32)
    light = draw.uniform(0.9, 1.1, 2).astype(np.float32)
    mirrored, quarters = bool(draw.integers(2)), int(draw.integers(4))
    return Shot(
        anchor, shape, angle, light, quarters if config.augment == "top-down" else 0, mirrored
    )


def upright(image_HWC: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """A square image turned and mirrored as EXIF orientation 1..8 asks (TIFF 6.0, tag 274)."""
    turned = image_HWC.transpose(1, 0, 2) if orientation >= 5 else image_HWC
    if orientation in (3, 4, 7, 8):
        turned = turned[::-1]
    return turned[:, ::-1] if orientation in (2, 3, 6, 7) else turned


def turned(image_HWC: NDArray[np.uint8], taken: Shot) -> NDArray[np.uint8]:
    """What is left of a shot once DALI has done its part: quarter turns, then the mirror."""
    turned = np.rot90(image_HWC, taken.quarters)
    return turned[:, ::-1] if taken.mirrored else turned
