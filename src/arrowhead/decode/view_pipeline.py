"""Resize, augment and orient decoded images: one DALI pipeline, one batch at a time.

    images (H, W, 3)     in host memory, or on a GPU
      -> DALI            resize; one branch per view for the augmentations
      -> symmetries      EXIF orientation, quarter turns, mirroring: at most eight groups of images
      -> uint8           (rows, S, S, 3) per view, written into memory on the same device

On a GPU nothing is copied to the host.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.decode import geometry
from arrowhead.decode.pixels import Header, PixelConfig

CENTER = np.float32(0.5)
CENTER_ROUNDED_DOWN = np.float32(0.4999)  # the center, rounded the other way if the size is odd


class ViewPipeline:
    """Makes the views of batches of images.

    Args:
        config: Size and views.
        batch_size: Maximal number of images per batch.
        threads: CPU threads of DALI.
        gpu: CUDA device number, or None for the CPU.
        crops_upright: Whether the center is rounded in the upright image, see `DECODER_RULES`.
        tensors: Whether images and views are torch tensors, also on the CPU.
    """

    def __init__(
        self,
        config: PixelConfig,
        *,
        batch_size: int,
        threads: int,
        gpu: int | None,
        crops_upright: bool,
        tensors: bool,
    ) -> None:
        self._config, self._crops_upright, self._tensors = config, crops_upright, tensors
        self._gpu = gpu
        self._inputs: list[Any] = []
        self._pipeline = _build(config, batch_size, threads, gpu, lambda: self._inputs)

    def __call__(
        self,
        images: Sequence[Any],
        image_ids: Sequence[bytes],
        headers: Sequence[Header],
        views: Sequence[Any],
        rows: NDArray[np.int64],
    ) -> None:
        """Write the views of images into `rows` of `views`.

        Args:
            images: uint8 (H, W, 3) each, on the pipeline's device.
            image_ids: 16 bytes each, which determine the augmentations.
            headers: Sizes and orientations.
            views: One uint8 (>= rows, S, S, 3) per view, on the same device.
            rows: The row of each image.
        """
        config = self._config
        orientation = np.array([header.orientation for header in headers])
        if self._tensors and self._gpu is None:  # DALI would ask torch for the GPU of a tensor
            images = [image.numpy() for image in images]
        self._inputs = [list(images), *self._placement(headers, orientation)]
        symmetries = [geometry.SYMMETRY_OF_ORIENTATION[orientation]]
        for view in range(1, config.views if config.policy != "none" else 1):
            drawn = [geometry.draw_augmentation(config, one, view) for one in image_ids]
            for name in ("anchor", "shape", "angle", "light"):
                self._inputs.append(np.stack([getattr(one, name) for one in drawn]))
            # The augmentation mirrors the upright image: left and right are the viewer's.
            turns = geometry.symmetry_of_turns(
                np.array([one.quarter_turns for one in drawn]),
                np.array([one.mirrored for one in drawn]),
            )
            symmetries.append(geometry.compose_symmetries(symmetries[0], turns))
        outputs = [self._as_array(output) for output in self._pipeline.run()]
        same_for_all = itertools.cycle(zip(outputs, symmetries, strict=True))
        for view, (batch_BSSC, symmetry) in zip(views, same_for_all, strict=False):
            geometry.place(batch_BSSC, symmetry, view, rows)

    def _placement(
        self, headers: Sequence[Header], orientation: NDArray[np.int64]
    ) -> list[NDArray[np.float32]]:
        """The inputs that say which part of each image the clean view shows."""
        mirrored = geometry.MIRRORED_AXES[orientation] & self._crops_upright
        if self._config.resize == "pad":
            return [np.where(mirrored, CENTER_ROUNDED_DOWN, CENTER)]
        sizes = np.array([(header.height, header.width) for header in headers], np.float64)
        return list(geometry.view_regions(self._config, sizes, mirrored))

    def _as_array(self, output: Any) -> Any:
        """An output (B, S, S, 3) of DALI without a copy: a tensor or a NumPy array."""
        if self._tensors:
            import torch

            return torch.utils.dlpack.from_dlpack(output.as_tensor())
        return np.asarray(output.as_tensor())


def _build(
    config: PixelConfig, batch_size: int, threads: int, device: int | None, get_inputs: Any
) -> Any:
    from nvidia.dali import fn, pipeline_def, types

    dali_device = "cpu" if device is None else "gpu"
    side = config.side
    augmented = config.views - 1 if config.policy != "none" else 0
    placement_inputs = 1 if config.resize == "pad" else 2
    count = placement_inputs + 4 * augmented

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=batch_size, num_threads=threads, device_id=device, prefetch_queue_depth=1
    )
    def images_to_views() -> Any:
        image = fn.external_source(
            lambda: get_inputs()[0],
            device=dali_device,
            dtype=types.UINT8,
            ndim=3,
            layout="HWC",
            no_copy=device is None,
        )
        floats = {"dtype": types.FLOAT, "ndim": 1}
        inputs: Any = fn.external_source(lambda: get_inputs()[1:], num_outputs=count, **floats)
        interpolation = {
            "interp_type": types.INTERP_CUBIC
            if config.interpolation == "bicubic"
            else types.INTERP_LINEAR,
            "antialias": True,
            "device": dali_device,
        }
        if config.resize == "pad":
            fitted = fn.resize(image, size=[side, side], mode="not_larger", **interpolation)
            placement: Any = {
                "crop_pos_y": inputs[0][0],
                "crop_pos_x": inputs[0][1],
                "device": dali_device,
            }
            out = [fn.crop(fitted, crop=[side, side], out_of_bounds_policy="pad", **placement)]
        else:
            region = {"roi_start": inputs[0], "roi_end": inputs[1]}
            out = [fn.resize(image, size=[side, side], **region, **interpolation)]
        for i in range(placement_inputs, count, 4):
            anchor, shape, angle, light = inputs[i : i + 4]
            cropped = fn.slice(image, anchor, shape, axis_names="HW", device=dali_device)
            square = fn.resize(cropped, size=[side, side], **interpolation)
            turned = fn.rotate(
                square, angle=angle, keep_size=True, fill_value=None, device=dali_device
            )
            lighting = {"brightness": light[0], "contrast": light[1]}
            out.append(fn.brightness_contrast(turned, **lighting, device=dali_device))
        return tuple(out)

    pipeline = images_to_views()
    pipeline.build()
    return pipeline
