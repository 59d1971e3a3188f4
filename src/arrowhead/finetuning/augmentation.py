"""The augmentation of training images: its settings, and what is drawn for one image or batch.

Every draw is a pure function of (seed, epoch, image id), or of (seed, step) where images are mixed.
So there is no random state to save, and neither the number of workers nor an interruption changes
what an image looks like in an epoch. The generators of torchvision and DALI have a state.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from arrowhead.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

MAGNITUDES = 31  # steps from none to strongest, as in the papers of RandAugment and TrivialAugment
OPERATIONS = 14  # of both suites of DALI
MAX_LOG_ASPECT = np.log(4 / 3)
CROP_TRIES = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """How training images are augmented, anew in each epoch."""

    augment: Literal["side-on", "top-down", "none"] = "side-on"
    """side-on for photos (random crops, mirroring, small rotations, brightness, contrast); top-down
    for satellite or microscope images (also rotations by 90 degrees); none."""
    crop_area: float = 0.7
    """Smallest part of the image's area that a random crop shows, above 0 and up to 1 (the largest
    is the whole image). Without effect with --augment none."""
    auto_augment: Literal["none", "rand", "trivial"] = "none"
    """Further operations on each image: rand (RandAugment: --rand-operations of 14, each of
    strength --rand-magnitude), trivial (TrivialAugment: one of 14, of any strength)."""
    rand_operations: int = 2
    """Operations of RandAugment per image."""
    rand_magnitude: int = 9
    """Strength of RandAugment's operations, 0 to 30."""
    mixup: float = 0.0
    """Mix pairs of images and their labels: the parameter of the Beta distribution of their shares
    (0.2 is usual); 0 mixes none."""
    cutmix: float = 0.0
    """Paste a part of one image into another, and mix their labels: the parameter of the Beta
    distribution of its area (1 is usual); 0 pastes none. With --mixup, each pair gets one of the
    two."""
    seed: int = 0
    """Seed of the augmentation."""

    def __post_init__(self) -> None:
        if not 0 < self.crop_area <= 1:
            raise ConfigError(
                f"--crop-area is {self.crop_area}.", "above 0, at most 1.", "give e.g. 0.35."
            )
        for flag, value, low, high in (
            ("rand-operations", self.rand_operations, 1, OPERATIONS),
            ("rand-magnitude", self.rand_magnitude, 0, MAGNITUDES - 1),
            ("mixup", self.mixup, 0, 100),
            ("cutmix", self.cutmix, 0, 100),
        ):
            if not low <= value <= high:
                raise ConfigError(
                    f"--{flag} is {value}.", f"{low} to {high}.", f"give --{flag} in that range."
                )

    @property
    def operations(self) -> int:
        """Operations of RandAugment or TrivialAugment per image."""
        return {"none": 0, "rand": self.rand_operations, "trivial": 1}[self.auto_augment]


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What is done to one image in one epoch.

    Attributes:
        start, end: float32 (y, x), corners of the region to show, as shares of the upright image.
        angle: Rotation in degrees, quarter turns included.
        light: float32 (brightness, contrast) factors.
        mirrored: Whether the result is mirrored left to right.
        operations: int32 (n,), positions in the suite of RandAugment or TrivialAugment.
        magnitudes: int32 (n,), 0 to MAGNITUDES - 1.
        negated: int32 (n,), 1 where the operation goes the other way.
    """

    start: NDArray[np.float32]
    end: NDArray[np.float32]
    angle: float
    light: NDArray[np.float32]
    mirrored: bool
    operations: NDArray[np.int32]
    magnitudes: NDArray[np.int32]
    negated: NDArray[np.int32]


def generator(*key: object) -> np.random.Generator:
    """A random generator that depends on nothing but the key."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def draw_augmentation(
    config: AugmentConfig, epoch: int, image_id: int, aspect: float
) -> Augmentation:
    """Draw the augmentation of an image in an epoch: a function of the seed, epoch and image id.

    A random resized crop (Szegedy et al., arXiv:1409.4842, as torchvision draws it), rotation by
    up to 10 degrees, brightness and contrast within 10 %, mirroring; top-down adds quarter turns.

    aspect: width / height of the upright image; 1 if its aspect ratio is squashed anyway.
    """
    draw = generator(config.seed, epoch, image_id)
    count = config.operations
    operations = draw.integers(OPERATIONS, size=count, dtype=np.int32)
    magnitudes = np.full(count, config.rand_magnitude, np.int32)
    if config.auto_augment == "trivial":
        magnitudes = draw.integers(MAGNITUDES, size=count, dtype=np.int32)
    negated = draw.integers(2, size=count, dtype=np.int32)
    if config.augment == "none":
        ends = np.zeros(2, np.float32), np.ones(2, np.float32)
        light, angle, mirrored = np.ones(2, np.float32), 0.0, False
    else:
        ends = draw_region(draw, config.crop_area, aspect)
        angle = float(draw.uniform(-10, 10))
        light = draw.uniform(0.9, 1.1, 2).astype(np.float32)
        mirrored, quarter_turns = bool(draw.integers(2)), int(draw.integers(4))
        angle += 90.0 * quarter_turns if config.augment == "top-down" else 0.0
    return Augmentation(*ends, angle, light, mirrored, operations, magnitudes, negated)


def draw_region(
    draw: np.random.Generator, min_area: float, aspect: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Draw a region of an image, float32 (y, x) corners as shares of its height and width.

    Its area is uniform in [min_area, 1]; its aspect ratio 3/4 to 4/3, in pixels.
    """
    for _ in range(CROP_TRIES):
        area = draw.uniform(min_area, 1)
        ratio = np.exp(draw.uniform(-MAX_LOG_ASPECT, MAX_LOG_ASPECT)) / aspect
        shape = np.sqrt(area * np.array([1 / ratio, ratio]))
        if shape.max() <= 1:
            break
    else:  # an image much wider or higher than the region may be: its largest square
        shape = np.minimum(np.array([aspect, 1 / aspect]), 1)
    start = draw.uniform(0, 1, 2) * (1 - shape)
    return start.astype(np.float32), (start + shape).astype(np.float32)


def soft_targets(label: Tensor, classes: int, smoothing: float = 0.0) -> Tensor:
    """Labels as probabilities, float32 (B, C), with label smoothing.

    label: int64 (B,), or uint8 (B, C) where an image may have several labels.
    """
    import torch

    if label.dim() == 2:
        return label.float() * (1 - smoothing) + smoothing / 2
    target = torch.nn.functional.one_hot(label, classes).float()
    return target * (1 - smoothing) + smoothing / classes


def mix(
    images: Tensor, target: Tensor, config: AugmentConfig, step: int, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Mix pairs of images and their targets by mixup or cutmix: a function of the seed and step.

    Image 2k of the global batch is mixed with image 2k + 1, both ways; an odd last one stays. The
    order of a batch is random, so its pairs are as random as those of a permutation.

    Args:
        images: float32 (b, 3, S, S), a part of the global batch.
        target: float32 (b, C), from `soft_targets`.
        config: Seed and strength.
        step: Number of the step, counted over all epochs.
        first: Position of the part in the global batch, an even number.
    """
    import torch

    if not config.mixup and not config.cutmix:
        return images, target
    if first % 2:
        raise ValueError(f"a pair is split: the part of the batch begins at {first}")
    pairs = len(images) // 2
    mixed_images, mixed_target = images.clone(), target.clone()
    for pair in range(pairs):
        draw = generator(config.seed, "mix", step, first // 2 + pair)
        pastes = bool(draw.random() < 0.5) if config.mixup and config.cutmix else not config.mixup
        alpha = config.cutmix if pastes else config.mixup
        share = float(draw.beta(alpha, alpha))
        one, other = 2 * pair, 2 * pair + 1
        if pastes:
            rows, columns, share = _draw_box(draw, images.shape[-1], share)
            for into, source in ((one, other), (other, one)):
                mixed_images[into, :, rows, columns] = images[source, :, rows, columns]
        else:
            mixed_images[one] = torch.lerp(images[other], images[one], share)
            mixed_images[other] = torch.lerp(images[one], images[other], share)
        mixed_target[one] = torch.lerp(target[other], target[one], share)
        mixed_target[other] = torch.lerp(target[one], target[other], share)
    return mixed_images, mixed_target


def _draw_box(draw: np.random.Generator, side: int, share: float) -> tuple[slice, slice, float]:
    """The box that cutmix pastes (Yun et al., arXiv:1905.04899), and the share that remains."""
    half, center = np.sqrt(1 - share) * side / 2, draw.uniform(0, side, 2)
    low, high = (np.clip(np.round(center + d), 0, side).astype(int) for d in (-half, half))
    rows, columns = slice(low[0], high[0]), slice(low[1], high[1])
    return rows, columns, float(1 - np.prod(high - low) / side**2)
