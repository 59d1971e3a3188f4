"""Geometry of the views: the region to crop, the augmentations, and the EXIF orientation."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arrowhead.decode.pixels import Header, PixelConfig


def view_region(
    config: PixelConfig, header: Header, mirrored: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The region of an image that the clean view shows.

    "crop" gives the same pixels as torchvision's Resize(resized_side), CenterCrop(size), with the
    same rounding, but resizes only the region that it keeps.

    Args:
        config: Size and resize mode.
        header: Height and width of the stored image.
        mirrored: bool (y, x), which axes the orientation will mirror; their center is rounded
            from the other end.

    Returns:
        Start and end corner, float32 (y, x) each, in pixels of the stored image.
    """
    image_size = np.array([header.height, header.width], np.float64)
    side = config.side
    if config.resize == "pad" or (config.resize == "squash" and config.resized_side == side):
        return np.zeros(2, np.float32), image_size.astype(np.float32)
    if config.resize == "squash":
        resized = np.full(2, float(config.resized_side))
    else:
        resized = np.floor(config.resized_side * image_size / image_size.min())
    start = np.round((resized - side) / 2)
    if mirrored is not None:
        start = np.where(mirrored, resized - side - start, start)
    scale = image_size / resized
    return (start * scale).astype(np.float32), ((start + side) * scale).astype(np.float32)


def mirrored_axes(orientation: int) -> NDArray[np.bool_]:
    """Which axes of the stored image `apply_orientation` mirrors: bool (y, x)."""
    rows, columns = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return np.array([columns, rows] if orientation >= 5 else [rows, columns])


def upright_box(
    config: PixelConfig, header: Header, *, crops_upright: bool = True
) -> tuple[float, float, float, float]:
    """Where the clean view lies in the upright image.

    Args:
        config: Size and resize mode.
        header: Size of the stored image, and its EXIF orientation.
        crops_upright: Whether the center is rounded in the upright image, see `DECODER_RULES`.

    Returns:
        (left, top, right, bottom) as shares of the upright image's width and height. Resize mode
        pad shows more than the image, so its box begins below 0 and ends above 1.
    """
    size = np.array([header.height, header.width], np.float64)
    if config.resize == "pad":
        margin = (size.max() / size - 1) / 2
        start, end = -margin, 1 + margin
    else:
        mirrored = mirrored_axes(header.orientation) & crops_upright
        start, end = (corner / size for corner in view_region(config, header, mirrored))
    if header.orientation >= 5:
        start, end = start[::-1], end[::-1]
    flips = [header.orientation in (3, 4, 7, 8), header.orientation in (2, 3, 6, 7)]
    start, end = np.where(flips, 1 - end, start), np.where(flips, 1 - start, end)
    return float(start[1]), float(start[0]), float(end[1]), float(end[0])


@dataclass(frozen=True, slots=True)
class Augmentation:
    """The parameters of one augmented view.

    Attributes:
        anchor: float32 (y, x) of the crop's corner, as shares of the image.
        shape: float32 (h, w) of the crop, as shares of the image.
        angle: float32 (1,) rotation, in degrees.
        light: float32 (brightness, contrast) factors.
        quarter_turns: Number of rotations by 90 degrees, 0 to 3.
        mirrored: Whether the view is mirrored left to right.
    """

    anchor: NDArray[np.float32]
    shape: NDArray[np.float32]
    angle: NDArray[np.float32]
    light: NDArray[np.float32]
    quarter_turns: int
    mirrored: bool


def draw_augmentation(config: PixelConfig, image_id: bytes, view: int) -> Augmentation:
    """Draw the augmentation of one view: a pure function of seed, image_id and view.

    A random resized crop of 50 to 100 % of the image, rotation by up to 10 degrees, brightness and
    contrast within 10 %, and mirroring, like fastai's transforms_side_on; top-down adds quarter
    turns. torchvision's transforms use a global generator, so they depend on the order of images.
    """
    key = f"{config.augment_seed}/{image_id.hex()}/{view}".encode()
    seed = int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "little")
    generator = np.random.default_rng(seed)
    if config.augment == "none":
        ones, angle = np.ones(2, np.float32), np.zeros(1, np.float32)
        return Augmentation(np.zeros(2, np.float32), ones, angle, ones, 0, False)
    shape = np.sqrt(generator.uniform(0.5, 1)) * np.exp(
        generator.uniform(-0.15, 0.15) * np.array([1, -1])
    )
    shape = np.minimum(shape, 1).astype(np.float32)
    anchor = (generator.uniform(0, 1, 2) * (1 - shape)).astype(np.float32)
    angle = generator.uniform(-10, 10, 1).astype(np.float32)
    light = generator.uniform(0.9, 1.1, 2).astype(np.float32)
    mirrored, quarter_turns = bool(generator.integers(2)), int(generator.integers(4))
    return Augmentation(
        anchor, shape, angle, light, quarter_turns if config.augment == "top-down" else 0, mirrored
    )


def apply_orientation(image_HWC: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Apply the EXIF orientation, 1 to 8, to a square image (TIFF 6.0, tag 274)."""
    turned = image_HWC.transpose(1, 0, 2) if orientation >= 5 else image_HWC
    if orientation in (3, 4, 7, 8):
        turned = turned[::-1]
    return turned[:, ::-1] if orientation in (2, 3, 6, 7) else turned


def turn_and_mirror(image_HWC: NDArray[np.uint8], augmentation: Augmentation) -> NDArray[np.uint8]:
    """Apply the part of an augmentation that DALI does not: quarter turns, then mirroring."""
    turned = np.rot90(image_HWC, augmentation.quarter_turns)
    return turned[:, ::-1] if augmentation.mirrored else turned
