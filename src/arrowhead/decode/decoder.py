"""Decode batches of encoded images to pixels.

    B files' bytes
      -> header            size, format, orientation, without decoding; errors become faults
      -> nvImageCodec      DALI's decoder library; Pillow for what it decodes unlike a browser
      -> DALI              resize; one branch per view for the augmentations
      -> orientation       EXIF rotation and mirroring
      -> uint8             (B, S, S, 3) per view, and faults

A bad image becomes a black row and a fault; its neighbours are the same with it or without it. The
pipeline runs on the CPU or, if `device` is given, on a GPU (with its hardware JPEG engine if there
is one). A file may still crash the process: `worker_process` runs the decoder in a child process.
"""

from __future__ import annotations

import itertools
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.decode import geometry, pillow_images
from arrowhead.decode import headers as decode_headers
from arrowhead.decode import pixels as decode_pixels
from arrowhead.decode.pixels import CROPPED_UPRIGHT, Header, PixelConfig, Pixels

# Messages of the decoders that are kept; if there are more, every file of the batch is checked.
MAX_STDERR_BYTES = 65536
# Pixels that are decoded before they are resized (150 MB); ten times as many on a GPU.
MAX_GROUP_PIXELS = 50_000_000


class Decoder:
    """Decodes batches of images; holds the codecs and one DALI pipeline.

    Args:
        config: Size, views and limits.
        batch_size: Maximal number of files per batch.
        threads: Decoding threads.
        device: CUDA device number, or None for the CPU.
        read_messages: Returns what was written to stderr since its last call; the decoders report
            there why an image failed.
        rule: The recipe's `decoder`, one of DECODER_RULES; ConfigError for another.
    """

    def __init__(
        self,
        config: PixelConfig,
        *,
        batch_size: int,
        threads: int,
        device: int | None = None,
        read_messages: Callable[[], str] = lambda: "",
        rule: str = CROPPED_UPRIGHT,
    ) -> None:
        from PIL import Image

        # DALI's OpenCV fallback would ignore the limit on decompression bombs of libjpeg-turbo.
        os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(config.max_pixels))
        Image.MAX_IMAGE_PIXELS = config.max_pixels
        decode_pixels.check_decoder_rule(rule)
        self.config, self.batch_size = config, batch_size
        self._crops_upright = rule == CROPPED_UPRIGHT
        self._read_messages, self._device = read_messages, device
        self._pipeline_inputs: list[list[Any]] = []
        self._pipeline = _build_pipeline(
            config, batch_size, threads, device, lambda: self._pipeline_inputs
        )
        self._cpu = _create_cpu_decoders(threads if device is None else 1)
        if device is not None:
            import torch

            torch.cuda.set_device(device)
            self._gpu = _create_gpu_decoder(threads, device)
        read_messages()

    def __call__(
        self,
        encoded: Sequence[bytes],
        image_ids: Sequence[bytes],
        into: NDArray[np.uint8] | None = None,
    ) -> Pixels:
        """Decode up to `batch_size` files; the result has as many rows as files.

        Args:
            encoded: The files' bytes.
            image_ids: 16 bytes each, which determine the augmentations.
            into: Memory for the pixels, uint8 (views, rows, S, S, 3); allocated by default.
        """
        headers = [decode_headers.read_header(data, self.config) for data in encoded]
        faults: list[str | None] = [h if isinstance(h, str) else None for h in headers]
        side = self.config.side
        if into is None:
            into = np.empty((self.config.views, len(encoded), side, side, 3), np.uint8)
        views = [view[: len(encoded)] for view in into]
        valid = [i for i, fault in enumerate(faults) if fault is None]
        for rows in _group_by_pixels(
            valid, headers, MAX_GROUP_PIXELS if self._device is None else 10 * MAX_GROUP_PIXELS
        ):
            images = self._decode_rows(rows, encoded, headers, faults)
            self._fill_views(images, image_ids, headers, views)
        for view in views:
            view[[fault is not None for fault in faults]] = 0
        fallback = [
            isinstance(header, Header) and header.stream is None and fault is None
            for header, fault in zip(headers, faults, strict=True)
        ]
        sizes = [
            header.upright_size if isinstance(header, Header) and fault is None else (0, 0)
            for header, fault in zip(headers, faults, strict=True)
        ]
        return Pixels(views, faults, fallback, sizes)

    def _decode_rows(
        self,
        rows: list[int],
        encoded: Sequence[bytes],
        headers: list[Any],
        faults: list[str | None],
    ) -> dict[int, Any]:
        """Decode these rows: {row: image (H, W, 3)}; failures are written to `faults`."""
        images: dict[int, Any]
        images = {
            i: pillow_images.decode_with_pillow(encoded[i])
            for i in rows
            if headers[i].stream is None
        }
        self._read_messages()
        codec_rows = [i for i in rows if headers[i].stream is not None]
        images |= dict(
            zip(codec_rows, self._decode_batch([headers[i] for i in codec_rows]), strict=True)
        )
        # A message does not name its image: the suspects are decoded again, one by one, on the CPU,
        # whose decoders report what they find. GPU decoders do not report a truncated JPEG.
        has_damage = _reports_damage(self._read_messages())
        for i in codec_rows:
            jpeg = encoded[i].startswith(b"\xff\xd8")
            is_truncated = self._device is not None and not _has_end_marker(encoded[i])
            if images[i] is None or (jpeg and (has_damage or is_truncated)):
                retried, messages = (
                    _decode_on_cpu(self._cpu, [headers[i]])[0],
                    self._read_messages(),
                )
                if retried is None or _reports_damage(messages):
                    images[i] = _decode_fault(encoded[i], messages)
                elif images[i] is None:  # otherwise keep the pixels of the batch's decoder
                    images[i] = retried
        for i in rows:
            if isinstance(images[i], str):
                faults[i] = images.pop(i)
            elif headers[i].stream is None:
                height, width, _ = images[i].shape
                headers[i] = replace(headers[i], height=height, width=width)
        return images

    def _decode_batch(self, headers: list[Header]) -> list[Any]:
        """One image (H, W, 3) per header on the decoder's device, None if decoding failed."""
        if not headers:
            return []
        if self._device is None:
            return _decode_on_cpu(self._cpu, headers)
        import torch

        outputs = self._gpu.decode([header.stream for header in headers], params=_decode_params())
        return [None if m is None else torch.utils.dlpack.from_dlpack(m) for m in outputs]

    def _fill_views(
        self,
        images: dict[int, Any],
        image_ids: Sequence[bytes],
        headers: list[Any],
        views: list[NDArray[np.uint8]],
    ) -> None:
        """Resize, augment and orient images, and write them to their rows of `views`."""
        if not images:
            return
        rows = list(images)
        self._pipeline_inputs = [[self._to_device(image) for image in images.values()]]
        mirrored = [
            geometry.mirrored_axes(headers[i].orientation) & self._crops_upright for i in rows
        ]
        if self.config.resize == "pad":
            self._pipeline_inputs += [
                [np.where(its, CENTER_ROUNDED_DOWN, CENTER) for its in mirrored]
            ]
        else:
            regions = [
                geometry.view_region(self.config, headers[i], m)
                for i, m in zip(rows, mirrored, strict=True)
            ]
            self._pipeline_inputs += [[start for start, _ in regions], [end for _, end in regions]]
        for view_index in range(1, self.config.views if self.config.policy != "none" else 1):
            augmentations = [
                geometry.draw_augmentation(self.config, image_ids[i], view_index) for i in rows
            ]
            self._pipeline_inputs += [
                [a.anchor for a in augmentations],
                [a.shape for a in augmentations],
            ]
            self._pipeline_inputs += [
                [a.angle for a in augmentations],
                [a.light for a in augmentations],
            ]
        outputs = [batch.as_cpu() for batch in self._pipeline.run()]
        for view_index, (view, batch) in enumerate(
            zip(views, itertools.cycle(outputs), strict=False)
        ):
            for i, pixels_SS3 in zip(rows, batch.as_array(), strict=True):
                upright = geometry.apply_orientation(pixels_SS3, headers[i].orientation)
                # The augmentation mirrors the upright image: left and right are the viewer's.
                if view_index:
                    upright = geometry.turn_and_mirror(
                        upright, geometry.draw_augmentation(self.config, image_ids[i], view_index)
                    )
                view[i] = upright

    def _to_device(self, image: Any) -> Any:
        """The image on the device that DALI runs on."""
        if self._device is None or not isinstance(image, np.ndarray):
            return image
        import torch

        return torch.from_numpy(image.copy()).to(f"cuda:{self._device}")


DECODER_OPTIONS = ":fancy_upsampling=1"  # the default differs between versions of nvImageCodec


def _decode_params() -> Any:
    from nvidia import nvimgcodec as nv

    # With conflicting EXIF blocks, applying the orientation here overruns a buffer in the library.
    return nv.DecodeParams(apply_exif_orientation=False, color_spec=nv.ColorSpec.SRGB)


def _create_gpu_decoder(threads: int, device: int) -> Any:
    """Create the decoder of nvImageCodec on a GPU."""
    from nvidia import nvimgcodec as nv

    # With a load hint below 1, the choice of an image's decoder would depend on the batch.
    hardware = nv.Backend(nv.HW_GPU_ONLY, load_hint=1.0)
    others = (nv.GPU_ONLY, nv.HYBRID_CPU_GPU, nv.CPU_ONLY)
    return nv.Decoder(
        device, threads, [hardware, *(nv.Backend(kind) for kind in others)], DECODER_OPTIONS
    )


def _create_cpu_decoders(threads: int) -> list[Any]:
    """Create one single-threaded decoder of nvImageCodec per thread. A multi-threaded one uses one
    thread less than there are cores, while its caller only waits.
    """
    from nvidia import nvimgcodec as nv

    cpu, backends = nv.NVIMGCODEC_DEVICE_CPU_ONLY, [nv.Backend(nv.CPU_ONLY)]
    return [nv.Decoder(cpu, 1, backends, DECODER_OPTIONS) for _ in range(threads)]


def _decode_on_cpu(decoders: list[Any], headers: list[Header]) -> list[NDArray[np.uint8] | None]:
    """One image (H, W, 3) per header in host memory, None if decoding failed."""
    from nvidia import nvimgcodec

    params = _decode_params()
    # Zeros, since a decoder may stop halfway without an error and leave uninitialized memory.
    arrays = [np.zeros((header.height, header.width, 3), np.uint8) for header in headers]
    outputs: list[Any] = [None] * len(headers)

    def decode(index: int) -> None:
        share = slice(index, None, len(decoders))
        into = [nvimgcodec.as_image(array) for array in arrays[share]]
        streams = [header.stream for header in headers[share]]
        outputs[share] = decoders[index].decode(streams, images=into, params=params)

    indices = range(1, min(len(decoders), len(headers)))
    others = [threading.Thread(target=decode, args=(index,)) for index in indices]
    for thread in others:
        thread.start()
    decode(0)
    for thread in others:
        thread.join()
    return [a if m is not None else None for a, m in zip(arrays, outputs, strict=True)]


def _has_end_marker(data: bytes) -> bool:
    """Whether a JPEG ends with its end marker."""
    return data.rstrip(b"\0").endswith(b"\xff\xd9")


def _group_by_pixels(rows: list[int], headers: list[Any], max_pixels: int) -> Iterator[list[int]]:
    """Yield groups of rows with at most `max_pixels` pixels, to limit the memory for big images."""
    group: list[int] = []
    pixels = 0
    for row in rows:
        size = headers[row].height * headers[row].width
        if group and pixels + size > max_pixels:
            yield group
            group, pixels = [], 0
        group.append(row)
        pixels += size
    if group:
        yield group


def _reports_damage(messages: str) -> bool:
    """Whether libjpeg reported damage that may change pixels.

    Extraneous bytes before the end marker do not: browsers show such an image, too. Libjpeg reports
    only the first problem of an image. Messages are counted, since several threads write them
    interleaved.
    """
    harmless = messages.count("extraneous bytes before marker 0xd9")
    return len(messages) >= MAX_STDERR_BYTES or messages.count("Corrupt JPEG data") > harmless


def _decode_fault(data: bytes, messages: str) -> str:
    """The fault of an image whose header parsed but which did not decode, from the messages."""
    lines = [re.sub(r"\x1b\[[0-9;]*m|\[\w+\] *", "", line) for line in messages.splitlines()]
    # Lines of OpenCV, the last fallback, hold a time; the summary holds only a position.
    informative = [
        line for line in lines if line.strip() and "@" not in line and "position" not in line
    ]
    reason = pillow_images.clean_message(informative[0]) if informative else "the decoder gave up"
    lacks_end = data.startswith(b"\xff\xd8") and not _has_end_marker(data)
    is_truncated = lacks_end or pillow_images.means_truncated(reason)
    return f"{'truncated' if is_truncated else 'corrupt'}: {reason}"


def _build_pipeline(
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


CENTER = np.float32(0.5)
CENTER_ROUNDED_DOWN = np.float32(0.4999)  # the center, rounded the other way if the size is odd
