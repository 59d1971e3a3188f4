"""Batches of augmented or clean images from the pixel cache, by one DALI pipeline.

    rows of a step       cached squares, uint8 (P, P, 3)
      -> resize          the region that is shown, to S x S
      -> rotate, light   only if augmented; then RandAugment or TrivialAugment
      -> normalize       and mirror: float32 (B, 3, S, S), channels last, on the device

The same definition runs on CPUs and GPUs. What DALI's automatic augmentations usually draw
themselves (operation, magnitude, sign) are inputs here, see `augmentation.draw_augmentation`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.decode import geometry
from arrowhead.decode.pixels import Header, PixelConfig
from arrowhead.features.extract import prefetch
from arrowhead.finetuning.augmentation import (
    MAGNITUDES,
    OPERATIONS,
    AugmentConfig,
    draw_augmentation,
)
from arrowhead.finetuning.pixel_cache import PixelCache

if TYPE_CHECKING:
    from torch import Tensor

BATCHES_AHEAD = 1
REGION = ("start", "end", "size")
OPERATION = ("operations", "magnitudes", "negated")
INTEGERS, SCALARS = {"mirrored", *OPERATION}, {"angle", "mirrored"}
GREY = 128  # what rotations and shifts of the automatic augmentations leave empty


class PixelBatches:
    """Yields the images of one step after another; computes one batch ahead in a thread.

    Args:
        cache: The images.
        config: How training images are augmented.
        pixels: Size, resize mode and interpolation of the body's recipe.
        mean, std: Per channel, of pixels scaled to 0..1.
        batch_size: Most images per step.
        device: "cpu", or a CUDA device such as "cuda:0".
        threads: CPU threads of DALI.
    """

    def __init__(
        self,
        cache: PixelCache,
        config: AugmentConfig,
        pixels: PixelConfig,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        batch_size: int,
        device: str = "cpu",
        threads: int = 2,
    ) -> None:
        self._cache, self._config, self._pixels = cache, config, pixels
        self._normalization = mean, std
        self._run_on = batch_size, threads, device
        self._built: dict[bool, _Pipeline] = {}

    def augmented(self, epoch: int, steps: Sequence[NDArray[np.int64]]) -> Iterator[Tensor]:
        """Yield the augmented images of each step, float32 (b, 3, S, S).

        steps: for each step, indices of images in the cache (0 to n - 1).
        """
        pipeline = self._build(augmented=True)
        return prefetch((self._augment(pipeline, epoch, index) for index in steps), BATCHES_AHEAD)

    def clean(self, steps: Sequence[NDArray[np.int64]]) -> Iterator[Tensor]:
        """Yield the clean view of the images of each step, as the body's recipe shows it."""
        pipeline = self._build(augmented=False)
        return prefetch((self._show_clean(pipeline, index) for index in steps), BATCHES_AHEAD)

    def _build(self, *, augmented: bool) -> _Pipeline:
        """The pipeline for augmented or clean images, built once."""
        if augmented not in self._built:
            config = self._config if augmented else None
            self._built[augmented] = _Pipeline(
                config, self._pixels, self._normalization, self._run_on
            )
        return self._built[augmented]

    def _images(self, index: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        return [self._cache.image(i) for i in index]

    def _clean_regions(self, index: NDArray[np.int64]) -> dict[str, Any]:
        regions = [clean_region(self._pixels, *self._cache.size[i]) for i in index]
        return {name: np.stack([one[n] for one in regions]) for n, name in enumerate(REGION)}

    def _show_clean(self, pipeline: _Pipeline, index: NDArray[np.int64]) -> Tensor:
        return pipeline(self._images(index), self._clean_regions(index))

    def _augment(self, pipeline: _Pipeline, epoch: int, index: NDArray[np.int64]) -> Tensor:
        config, sizes = self._config, self._cache.size[index]
        aspects = sizes[:, 1] / sizes[:, 0]
        if self._pixels.resize == "squash":
            aspects = np.ones(len(index))
        drawn = [
            draw_augmentation(config, epoch, int(self._cache.image_id[i]), float(aspect))
            for i, aspect in zip(index, aspects, strict=True)
        ]
        inputs = self._clean_regions(index)
        if config.augment != "none":
            inputs["start"] = np.stack([one.start for one in drawn])
            inputs["end"] = np.stack([one.end for one in drawn])
            inputs["size"] = np.full((len(index), 2), self._pixels.side, np.float32)
        inputs["angle"] = np.array([one.angle for one in drawn], np.float32)
        inputs["light"] = np.stack([one.light for one in drawn])
        inputs["mirrored"] = np.array([one.mirrored for one in drawn], np.int32)
        if config.operations:
            for name in OPERATION:
                inputs[name] = np.stack([getattr(one, name) for one in drawn])
        return pipeline(self._images(index), inputs)


def clean_region(
    pixels: PixelConfig, height: int, width: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """What the clean view shows of an upright image.

    Returns:
        Start and end of the region, (y, x) as shares of the image, and the height and width to
        which it is resized: S x S, or smaller in resize mode pad, which pads it.
    """
    side = pixels.side
    box, size = (0.0, 0.0, 1.0, 1.0), (side, side)
    if pixels.resize == "pad":
        scale = side / max(height, width)
        size = max(1, round(height * scale)), max(1, round(width * scale))
    else:
        box = geometry.upright_box(pixels, Header(int(height), int(width), 1))
    left, top, right, bottom = box
    return _floats(top, left), _floats(bottom, right), _floats(*size)


def _floats(y: float, x: float) -> NDArray[np.float32]:
    return np.array([y, x], np.float32)


class _Pipeline:
    """The DALI pipeline for augmented (or without `config` for clean) images."""

    def __init__(
        self,
        config: AugmentConfig | None,
        pixels: PixelConfig,
        normalization: tuple[Sequence[float], Sequence[float]],
        run_on: tuple[int, int, str],
    ) -> None:
        self._names = list(REGION)
        if config and config.augment != "none":
            self._names += ["angle", "light", "mirrored"]
        if config and config.operations:
            self._names += OPERATION
        batch_size, threads, device = run_on
        device_id = int(device.partition(":")[2] or 0) if "cuda" in device else None

        from nvidia.dali import fn, pipeline_def, types

        @pipeline_def(  # type: ignore[untyped-decorator]
            batch_size=batch_size,
            num_threads=threads,
            device_id=device_id,
            prefetch_queue_depth=1,
            enable_conditionals=True,
        )
        def squares_to_batch() -> Any:
            image = fn.external_source(
                name="image", dtype=types.UINT8, ndim=3, layout="HWC", no_copy=True
            )
            inputs = {
                name: fn.external_source(
                    name=name,
                    dtype=types.INT32 if name in INTEGERS else types.FLOAT,
                    ndim=0 if name in SCALARS else 1,
                )
                for name in self._names
            }
            image = image if device_id is None else image.gpu()
            shown = _show(image, inputs, pixels)
            if config:
                shown = _augment(shown, inputs, config, pixels.side)
            mean, std = ([255.0 * value for value in values] for values in normalization)
            return fn.crop_mirror_normalize(
                shown,
                mean=mean,
                std=std,
                mirror=inputs.get("mirrored", 0),
                dtype=types.FLOAT,
                output_layout="HWC",
            )

        # DALI's suites of augmentations use its deprecated names; it overrides filters of warnings.
        with warnings.catch_warnings(record=True):
            self._pipeline = squares_to_batch()
            self._pipeline.build()

    def __call__(self, images: list[NDArray[np.uint8]], inputs: dict[str, Any]) -> Tensor:
        """Run on some images: float32 (b, 3, S, S); inputs: by name, one row per image."""
        import torch

        self._pipeline.feed_input("image", images)
        for name in self._names:
            self._pipeline.feed_input(name, inputs[name])
        (output,) = self._pipeline.run()
        batch_BHWC = torch.utils.dlpack.from_dlpack(output.as_tensor())
        # DALI may write the next batch into the same memory.
        return batch_BHWC.permute(0, 3, 1, 2).clone(memory_format=torch.channels_last)


def _show(image: Any, inputs: dict[str, Any], pixels: PixelConfig) -> Any:
    """The graph that resizes a region of the images to S x S."""
    from nvidia.dali import fn, types

    cubic = pixels.interpolation == "bicubic"
    region = {"roi_start": inputs["start"], "roi_end": inputs["end"], "roi_relative": True}
    side = pixels.side
    resized = fn.resize(
        image,
        size=inputs["size"],
        interp_type=types.INTERP_CUBIC if cubic else types.INTERP_LINEAR,
        antialias=True,
        **region,
    )
    return fn.crop(resized, crop=[side, side], out_of_bounds_policy="pad")


def _augment(image: Any, inputs: dict[str, Any], config: AugmentConfig, side: int) -> Any:
    """The graph that rotates and lights the images, then applies the automatic augmentations."""
    from nvidia.dali import fn

    if config.augment != "none":
        image = fn.rotate(image, angle=inputs["angle"], keep_size=True, fill_value=None)
        brightness, contrast = inputs["light"][0], inputs["light"][1]
        image = fn.brightness_contrast(image, brightness=brightness, contrast=contrast)
    if config.auto_augment == "none":
        return image
    from nvidia.dali.auto_aug import rand_augment, trivial_augment
    from nvidia.dali.auto_aug.core import select, signed_bin

    if config.auto_augment == "rand":
        suite = rand_augment.get_rand_augment_suite(max_translate_abs=round(side * 100 / 224))
    else:
        suite = trivial_augment.get_trivial_augment_wide_suite(
            max_translate_abs=round(side * 32 / 224)
        )
    assert len(suite) == OPERATIONS
    for n in range(config.operations):
        strength = signed_bin(inputs["magnitudes"][n], random_sign=inputs["negated"][n])
        image = select(
            suite,
            inputs["operations"][n],
            image,
            magnitude_bin=strength,
            num_magnitude_bins=MAGNITUDES,
            fill_value=GREY,
        )
    return image
