"""Settings of the decoder, and the types of its results."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

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


DEFAULT_SIZE = 224

Resize = Literal["crop", "squash", "pad"]
Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelConfig:
    """How a file becomes the body's square input.

    What is None is that of the body's weights (`complete`), and without weights 224 pixels, crop,
    bilinear, 8/7.
    """

    size: int | None = None
    """Height and width of the body's input, in pixels. Default: those that the weights were made
    for, 224 for most."""
    resize: Resize | None = None
    """crop: resize the shorter side to --size / --crop-pct and crop the centre (as torchvision and
    timm do); squash: resize both sides to --size; pad: resize the longer side to --size, pad with
    black. Default: as the weights were evaluated, crop for most."""
    interpolation: Interpolation | None = None
    """How pixels are interpolated, always with antialiasing. Default: that of the weights."""
    crop_pct: float | None = None
    """Part of the resized image's shorter side that the centre crop keeps, above 0 and up to 1;
    with squash, of both sides. Default: that of the weights, 0.875 for most; 1 for squash."""
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
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ConfigError(
                f"--crop-pct is {self.crop_pct}.", "above 0, at most 1.", "give e.g. 0.875."
            )
        for flag, value, low, high in (
            ("size", self.side, 16, 2048),
            ("views", self.views, 1, 255),
            ("max-pixels", self.max_pixels, 1, 2**31 - 1),
            ("max-scans", self.max_scans, 1, 2**31 - 1),
        ):
            if not low <= value <= high:
                raise ConfigError(
                    f"--{flag} is {value}.", f"{low} to {high}.", f"give --{flag} in that range."
                )

    @property
    def side(self) -> int:
        """Height and width of the body's input, in pixels."""
        return DEFAULT_SIZE if self.size is None else self.size

    @property
    def resized_side(self) -> int:
        """The length to which `crop` resizes the shorter side, and `squash` both, in pixels.

        Rounded down, as timm does. Without `crop_pct` it is rounded to the nearest, as Arrowhead
        always did; at 224 pixels and 0.875 both are torchvision's 256.
        """
        if self.resize == "pad" or (self.resize == "squash" and self.crop_pct is None):
            return self.side
        if self.crop_pct is None:
            return round(self.side * 8 / 7)
        return math.floor(self.side / self.crop_pct + 1e-9)

    def complete(self, of_weights: PixelConfig) -> PixelConfig:
        """These settings, with those of the weights where they are None."""
        resize = self.resize or of_weights.resize or "crop"
        if resize == "pad" and self.crop_pct is not None:
            raise ConfigError(
                "--crop-pct has no effect with --resize pad, which crops nothing.",
                "one of the two.",
                "add --resize crop, or leave --crop-pct out.",
            )
        its_crop_pct = of_weights.crop_pct if resize == of_weights.resize else None
        filled = replace(
            self,
            size=self.size or of_weights.side,
            resize=resize,
            interpolation=self.interpolation or of_weights.interpolation or "bilinear",
            crop_pct=self.crop_pct or its_crop_pct,
        )
        same = filled.resized_side == replace(filled, crop_pct=None).resized_side
        # One way to write what gives the same pixels, so that their recipes are the same.
        return replace(filled, crop_pct=None) if same else filled

    @property
    def policy(self) -> str:
        """The policy as the recipe records it: none when there is nothing to augment."""
        return self.augment if self.views > 1 else "none"


Device = int | Literal["cpu"] | None
"""Where to decode: a CUDA device's number; None for the CPU; "cpu" for what runs on a GPU, with the
checks of its decoder, on the CPU, to test it."""


def device_of(name: str) -> Device:
    """The device for a network that runs on "cpu" or "cuda:K"."""
    return int(name.partition(":")[2] or 0) if name.startswith("cuda") else None


def torch_device(device: int | Literal["cpu"]) -> str:
    """Torch's name of a device."""
    return device if isinstance(device, str) else f"cuda:{device}"


@dataclass(frozen=True, slots=True)
class Pixels:
    """The decoded pixels of b files.

    Attributes:
        views: One uint8 (rows, S, S, 3) per view, rows >= b; black if faulty or after the last
            file. NumPy arrays, or with a device tensors on it.
        faults: b faults, None for a valid image.
        fallback: b flags, whether Pillow decoded it.
        sizes: Height and width of b upright images, in pixels; (0, 0) if faulty.
        seconds: Decoding time.
        repaired: How many images the device's decoder got wrong, so that they are the CPU's.
    """

    views: list[Any]
    faults: list[str | None]
    fallback: list[bool]
    sizes: list[tuple[int, int]]
    seconds: float = 0.0
    repaired: int = 0


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

    @property
    def upright_size(self) -> tuple[int, int]:
        """Height and width of the upright image."""
        size = self.height, self.width
        return size if self.orientation < 5 else size[::-1]


def too_large_fault(width: int, height: int, config: PixelConfig) -> str:
    """The fault of an image with too many pixels."""
    return f"too large: {width} x {height} pixels, more than {config.max_pixels}"
