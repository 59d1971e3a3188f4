"""Settings of the decoder, and the types of its results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from arrowhead.errors import ConfigError

CROPPED_AS_STORED, CROPPED_UPRIGHT = "dali", "dali-upright"
DECODER_RULES = (CROPPED_AS_STORED, CROPPED_UPRIGHT)
"""Values of a recipe's `decoder`: how to round the center of a photo that EXIF rotates, if its size
is odd. In the stored image (older stores), or in the upright one. Other photos are the same."""


def check_decoder_rule(rule: str) -> None:
    """Raise ConfigError for a recipe's `decoder` that is not one of DECODER_RULES."""
    if rule not in DECODER_RULES:
        raise ConfigError(
            f"The recipe's decoder is {rule!r}.",
            f"one that this version of Arrowhead has: {', '.join(DECODER_RULES)}.",
            "use the Arrowhead version that made the store or bundle, or a newer one.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelConfig:
    """How a file becomes the body's square input."""

    size: int = 224
    """Height and width of the body's input, in pixels."""
    resize: Literal["crop", "squash", "pad"] = "crop"
    """crop: resize the shorter side to 8/7 of --size and crop the centre (as torchvision does);
    squash: resize both sides to --size; pad: resize the longer side to --size, pad with black."""
    views: int = 1
    """Views (feature vectors) per image: the first is unchanged, the others are augmented."""
    augment: Literal["side-on", "top-down", "none"] = "side-on"
    """How views are augmented: side-on for photos (crops, flips, small rotations, brightness);
    top-down for satellite or microscope images (also rotations by 90 degrees); none."""
    augment_seed: int = 0
    """Seed of the augmented views; part of the recipe."""
    max_pixels: int = 100_000_000
    """Do not decode images with more pixels than this; they become faults."""
    max_scans: int = 100
    """Do not decode JPEGs with more scans than this (usual progressive JPEGs have 10)."""

    def __post_init__(self) -> None:
        for flag, value, low, high in (
            ("size", self.size, 16, 2048),
            ("views", self.views, 1, 255),
            ("max-pixels", self.max_pixels, 1, 2**31 - 1),
            ("max-scans", self.max_scans, 1, 2**31 - 1),
        ):
            if not low <= value <= high:
                raise ConfigError(
                    f"--{flag} is {value}.", f"{low} to {high}.", f"give --{flag} in that range."
                )

    @property
    def policy(self) -> str:
        """The policy as the recipe records it: none when there is nothing to augment."""
        return self.augment if self.views > 1 else "none"


@dataclass(frozen=True, slots=True)
class Pixels:
    """The decoded pixels of b files.

    Attributes:
        views: One uint8 (rows, S, S, 3) per view, rows >= b; black if faulty or after the last
            file.
        faults: b faults, None for a valid image.
        fallback: b flags, whether Pillow decoded it.
        seconds: Decoding time.
    """

    views: list[NDArray[np.uint8]]
    faults: list[str | None]
    fallback: list[bool]
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Header:
    """The header of an image.

    Attributes:
        height: Height in pixels.
        width: Width in pixels.
        orientation: EXIF orientation, 1 to 8.
        stream: Handle of nvImageCodec, None if Pillow decodes the image.
    """

    height: int
    width: int
    orientation: int
    stream: Any = None


def too_large_fault(width: int, height: int, config: PixelConfig) -> str:
    """The fault of an image with too many pixels."""
    return f"too large: {width} x {height} pixels, more than {config.max_pixels}"
