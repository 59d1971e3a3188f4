"""Geometry of the views: the region to crop, the augmentations, and the EXIF orientation."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.decode.pixels import Header, PixelConfig


def view_region(
    config: PixelConfig, header: Header, mirrored: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """`view_regions` of one image: start and end corner, float32 (y, x) each."""
    size = np.array([[header.height, header.width]], np.float64)
    flags = None if mirrored is None else np.asarray(mirrored)[None]
    start, end = view_regions(config, size, flags)
    return start[0], end[0]


def view_regions(
    config: PixelConfig, sizes: NDArray[np.float64], mirrored: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The regions of images that the clean view shows.

    "crop" gives the same pixels as torchvision's Resize(resized_side), CenterCrop(size), with the
    same rounding, but resizes only the region that it keeps.

    Args:
        config: Size and resize mode.
        sizes: (B, 2), height and width of the stored images.
        mirrored: bool (B, 2) for (y, x), which axes the orientation will mirror; their center is
            rounded from the other end.

    Returns:
        Start and end corners, float32 (B, 2) each, (y, x) in pixels of the stored image.
    """
    side = config.side
    if config.resize == "pad" or (config.resize == "squash" and config.resized_side == side):
        return np.zeros(sizes.shape, np.float32), sizes.astype(np.float32)
    if config.resize == "squash":
        resized = np.full(sizes.shape, float(config.resized_side))
    else:
        resized = np.floor(config.resized_side * sizes / sizes.min(axis=1, keepdims=True))
    start = np.round((resized - side) / 2)
    if mirrored is not None:
        start = np.where(mirrored, resized - side - start, start)
    scale = sizes / resized
    return (start * scale).astype(np.float32), ((start + side) * scale).astype(np.float32)


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
        mirrored = MIRRORED_AXES[header.orientation] & crops_upright
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


# ------------------------------------------------------------------------ symmetries
#
# The eight symmetries of a square as numbers: 4 if the image is transposed first, plus 2 if its
# rows are then reversed, plus 1 if its columns are.

SYMMETRY_OF_ORIENTATION = np.array([0, 0, 1, 3, 2, 4, 5, 7, 6])
"""By EXIF orientation, 1 to 8 (TIFF 6.0, tag 274)."""
SYMMETRY_OF_QUARTER_TURNS = np.array([0, 6, 3, 5])
"""By the number of turns by 90 degrees, counterclockwise as numpy.rot90 counts them."""
MIRRORED_AXES = np.array(
    [[n & (1 if n >= 4 else 2), n & (2 if n >= 4 else 1)] for n in SYMMETRY_OF_ORIENTATION], bool
)
"""By EXIF orientation: which axes (y, x) of the stored image are mirrored."""


def symmetry_of_turns(
    quarter_turns: NDArray[np.int64], mirrored: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """The symmetries that turn images, then mirror some of them left to right."""
    return np.asarray(SYMMETRY_OF_QUARTER_TURNS[quarter_turns] ^ mirrored)


def compose_symmetries(first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
    """The symmetries that do the same as `first` and then `second`."""
    # Transposing an image whose rows are reversed is reversing the columns of the transposed one.
    flips = np.where(second & 4, (first & 1) << 1 | (first & 2) >> 1, first & 3)
    return np.asarray((first ^ second) & 4 | (flips ^ second) & 3)


def place(
    images_BSSC: Any, symmetry: NDArray[np.int64], view: Any, rows: NDArray[np.int64]
) -> None:
    """Write images into `rows` of a view, each with its symmetry.

    Args:
        images_BSSC: uint8 (B, S, S, 3), a NumPy array or a torch tensor on any device.
        symmetry: (B,).
        view: uint8 (>= rows, S, S, 3), of the same kind and on the same device.
        rows: (B,), ascending.
    """
    if len(rows) == rows[-1] + 1 - rows[0]:
        view[int(rows[0]) : int(rows[-1]) + 1] = images_BSSC
    else:
        view[rows] = images_BSSC
    for number in np.unique(symmetry[symmetry != 0]).tolist():
        which = np.flatnonzero(symmetry == number)
        images = images_BSSC[which]
        if number & 4:
            images = images.swapaxes(1, 2)
        axes = tuple(axis for axis, bit in ((1, 2), (2, 1)) if number & bit)
        if axes:
            images = np.flip(images, axes) if isinstance(images, np.ndarray) else images.flip(axes)
        view[rows[which]] = images
