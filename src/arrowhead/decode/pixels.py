"""How pixels are asked for, and what a decoder gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from arrowhead.errors import ConfigError

CROPPED_AS_STORED, CROPPED_UPRIGHT = "dali", "dali-upright"
RULES = (CROPPED_AS_STORED, CROPPED_UPRIGHT)
"""A recipe's `decoder`: where the middle of a photo is that EXIF turns, when a pixel is over. As it
is stored (older stores), or as it is seen. Photos that are not turned come out the same."""


def must_know(rule: str) -> None:
    """Refuse a recipe's `decoder` that is not one of RULES."""
    if rule not in RULES:
        raise ConfigError(
            f"The recipe's decoder is {rule!r}.",
            f"one that this version of Arrowhead has: {', '.join(RULES)}.",
            "use the Arrowhead version that made the store or bundle, or a newer one.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelConfig:
    """From a file to the square that the body sees."""

    size: int = 224
    """Side of the square, in pixels."""
    resize: Literal["crop", "squash", "pad"] = "crop"
    """crop: shorter side to 8/7 of size, the middle cut out (torchvision's rule);
    squash: both sides to size; pad: longer side to size, the rest black."""
    views: int = 1
    """Rows per image: view 0 is clean, the others are augmented."""
    augment: Literal["side-on", "top-down", "none"] = "side-on"
    """Policy of views 1 and up: side-on for photos (crops, mirror, slight turns, light);
    top-down for satellite or microscope images (also quarter turns); none repeats view 0."""
    augment_seed: int = 0
    """Seed of the augmented views; part of the recipe."""
    max_pixels: int = 100_000_000
    """Images whose header claims more pixels are refused before they are decoded."""
    max_scans: int = 100
    """JPEGs with more scans are refused before they are decoded (usual progressive ones: 10)."""

    def __post_init__(self) -> None:
        for knob, value, low, high in (
            ("size", self.size, 16, 2048),
            ("views", self.views, 1, 255),
            ("max-pixels", self.max_pixels, 1, 2**31 - 1),
            ("max-scans", self.max_scans, 1, 2**31 - 1),
        ):
            if not low <= value <= high:
                raise ConfigError(
                    f"--{knob} is {value}.", f"{low} to {high}.", f"give --{knob} in that range."
                )

    @property
    def policy(self) -> str:
        """The policy as the recipe records it: none when there is nothing to augment."""
        return self.augment if self.views > 1 else "none"


@dataclass(frozen=True, slots=True)
class Pixels:
    """What b files came out as.

    views: one uint8 (rows, S, S, 3) per view, rows >= b; black where faulty or past the last file.
    faults: b, None when the image is well. fallback: b, whether Pillow decoded it.
    seconds: time it took.
    """

    views: list[NDArray[np.uint8]]
    faults: list[str | None]
    fallback: list[bool]
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself before it is decoded: pixels, and the EXIF orientation (1..8).

    stream: nvImageCodec's handle, None for what Pillow decodes.
    """

    height: int
    width: int
    orientation: int
    stream: Any = None


def too_large(width: int, height: int, config: PixelConfig) -> str:
    """The fault of an image with too many pixels."""
    return f"too large: {width} x {height} pixels, more than {config.max_pixels}"
