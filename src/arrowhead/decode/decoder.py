"""Encoded bytes to pixels.

    B files' bytes         (some are no images at all)
      -> header            read without decoding: size, kind, orientation; what fails is a fault
      -> nvImageCodec      DALI's decoder library; Pillow for what it cannot show as a browser does
      -> DALI              one branch per view: resized, augmented
      -> upright           EXIF orientation, applied by us
      -> uint8             (B, S, S, 3) per view; faults

A row never moves: a bad image leaves a black hole in its place and a fault beside it, so its
neighbours come out the same with it or without it. The same definition serves the CPU and, with
`device` a CUDA number, the GPU (hardware JPEG engine where there is one). A file may still kill
the process that decodes it: `worker_process` runs this room in one of its own.
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

FLOOD = 65536  # words of decoders that are kept; after so many, every file of the batch is asked
GROUP = 50_000_000  # pixels decoded before they are resized: 150 MB; on a GPU ten times as many


class Decoder:
    """Batches of encoded images to batches of pixels; holds one codec and one DALI pipeline.

    device: a CUDA device number, or None for the CPU. threads: decoding threads. said: gives what
    the decoders wrote to stderr since it was last asked; they say there why an image failed.
    rule: the recipe's `decoder`, one of RULES; ConfigError for another.
    """

    def __init__(
        self,
        config: PixelConfig,
        *,
        batch_size: int,
        threads: int,
        device: int | None = None,
        said: Callable[[], str] = lambda: "",
        rule: str = CROPPED_UPRIGHT,
    ) -> None:
        from PIL import Image

        # DALI's OpenCV fallback would undo the limit that libjpeg-turbo sets on bombs.
        os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(config.max_pixels))
        Image.MAX_IMAGE_PIXELS = config.max_pixels
        decode_pixels.must_know(rule)
        self.config, self.batch_size = config, batch_size
        self._upright = rule == CROPPED_UPRIGHT
        self._said, self._device = said, device
        self._fed: list[list[Any]] = []
        self._pipeline = _pipeline(config, batch_size, threads, device, lambda: self._fed)
        self._cpu = _cpu_codec(threads if device is None else 1)
        if device is not None:
            import torch

            torch.cuda.set_device(device)
            self._gpu = _gpu_codec(threads, device)
        said()

    def __call__(
        self,
        encoded: Sequence[bytes],
        image_ids: Sequence[bytes],
        into: NDArray[np.uint8] | None = None,
    ) -> Pixels:
        """Pixels and faults of up to `batch_size` files; exactly as many rows as files.

        into: uint8 (views, b or more, S, S, 3), memory to write them to.
        """
        headers = [decode_headers.header(data, self.config) for data in encoded]
        faults: list[str | None] = [h if isinstance(h, str) else None for h in headers]
        side = self.config.size
        if into is None:
            into = np.empty((self.config.views, len(encoded), side, side, 3), np.uint8)
        views = [view[: len(encoded)] for view in into]
        well = [i for i, fault in enumerate(faults) if fault is None]
        for rows in _groups(well, headers, GROUP if self._device is None else 10 * GROUP):
            images = self._images(rows, encoded, headers, faults)
            self._shape(images, image_ids, headers, views)
        for view in views:
            view[[fault is not None for fault in faults]] = 0
        fallback = [
            isinstance(found, Header) and found.stream is None and fault is None
            for found, fault in zip(headers, faults, strict=True)
        ]
        return Pixels(views, faults, fallback)

    def _images(
        self,
        rows: list[int],
        encoded: Sequence[bytes],
        headers: list[Any],
        faults: list[str | None],
    ) -> dict[int, Any]:
        """The decoded images (H, W, 3) of these rows that are well; faults of the others."""
        images: dict[int, Any]
        images = {i: pillow_images.by_pillow(encoded[i]) for i in rows if headers[i].stream is None}
        self._said()
        ours = [i for i in rows if headers[i].stream is not None]
        images |= dict(zip(ours, self._decode([headers[i] for i in ours]), strict=True))
        # One complaint in a batch does not say whose it is: the suspects are asked one by one, on
        # the CPU, whose decoders say what they found. The GPU's keep silent of a JPEG cut short.
        doubted = _damaged(self._said())
        for i in ours:
            jpeg = encoded[i].startswith(b"\xff\xd8")
            cut = self._device is not None and not _ends(encoded[i])
            if images[i] is None or (jpeg and (doubted or cut)):
                again, words = _on_cpu(self._cpu, [headers[i]])[0], self._said()
                if again is None or _damaged(words):
                    images[i] = _verdict(encoded[i], words)
                elif images[i] is None:  # else a bad mate would choose who decodes this one
                    images[i] = again
        for i in rows:
            if isinstance(images[i], str):
                faults[i] = images.pop(i)
            elif headers[i].stream is None:
                height, width, _ = images[i].shape
                headers[i] = replace(headers[i], height=height, width=width)
        return images

    def _decode(self, headers: list[Header]) -> list[Any]:
        """One image (H, W, 3) per header, None where decoding failed; on the device asked for."""
        if not headers:
            return []
        if self._device is None:
            return _on_cpu(self._cpu, headers)
        import torch

        made = self._gpu.decode([found.stream for found in headers], params=_params())
        return [None if m is None else torch.utils.dlpack.from_dlpack(m) for m in made]

    def _shape(
        self,
        images: dict[int, Any],
        image_ids: Sequence[bytes],
        headers: list[Any],
        views: list[NDArray[np.uint8]],
    ) -> None:
        """Resize, augment and turn these images into their rows of `views`."""
        if not images:
            return
        rows = list(images)
        self._fed = [[self._placed(image) for image in images.values()]]
        mirrored = [geometry.mirrored(headers[i].orientation) & self._upright for i in rows]
        if self.config.resize == "pad":
            self._fed += [[np.where(its, BEFORE, MIDDLE) for its in mirrored]]
        else:
            frames = [
                geometry.frame(self.config, headers[i], m)
                for i, m in zip(rows, mirrored, strict=True)
            ]
            self._fed += [[start for start, _ in frames], [end for _, end in frames]]
        for number in range(1, self.config.views if self.config.policy != "none" else 1):
            shots = [geometry.shot(self.config, image_ids[i], number) for i in rows]
            self._fed += [[s.anchor for s in shots], [s.shape for s in shots]]
            self._fed += [[s.angle for s in shots], [s.light for s in shots]]
        made = [batch.as_cpu() for batch in self._pipeline.run()]
        for number, (view, batch) in enumerate(zip(views, itertools.cycle(made), strict=False)):
            for i, square in zip(rows, batch.as_array(), strict=True):
                upright = geometry.upright(square, headers[i].orientation)
                # Mirrored after it is upright: left and right are the viewer's.
                if number:
                    upright = geometry.turned(
                        upright, geometry.shot(self.config, image_ids[i], number)
                    )
                view[i] = upright

    def _placed(self, image: Any) -> Any:
        """An image on the device that resizes it."""
        if self._device is None or not isinstance(image, np.ndarray):
            return image
        import torch

        return torch.from_numpy(image.copy()).to(f"cuda:{self._device}")


FANCY = ":fancy_upsampling=1"  # nvImageCodec's default differs between its versions


def _params() -> Any:
    from nvidia import nvimgcodec as nv

    # Two EXIF blocks that disagree overrun a buffer where the library turns the image.
    return nv.DecodeParams(apply_exif_orientation=False, color_spec=nv.ColorSpec.SRGB)


def _gpu_codec(threads: int, device: int) -> Any:
    """The decoder of nvImageCodec on a GPU."""
    from nvidia import nvimgcodec as nv

    # A share below 1 for the hardware engine would let an image's mates choose its decoder.
    hardware = nv.Backend(nv.HW_GPU_ONLY, load_hint=1.0)
    others = (nv.GPU_ONLY, nv.HYBRID_CPU_GPU, nv.CPU_ONLY)
    return nv.Decoder(device, threads, [hardware, *(nv.Backend(kind) for kind in others)], FANCY)


def _cpu_codec(threads: int) -> list[Any]:
    """A decoder of nvImageCodec for each thread: one of several threads takes a thread less than
    there are cores, and its caller only waits.
    """
    from nvidia import nvimgcodec as nv

    cpu, backends = nv.NVIMGCODEC_DEVICE_CPU_ONLY, [nv.Backend(nv.CPU_ONLY)]
    return [nv.Decoder(cpu, 1, backends, FANCY) for _ in range(threads)]


def _on_cpu(decoders: list[Any], headers: list[Header]) -> list[NDArray[np.uint8] | None]:
    """One image (H, W, 3) per header in host memory, None where decoding failed."""
    from nvidia import nvimgcodec

    params = _params()
    # Zeros: a decoder that stops half-way without a word must not show what lay there before.
    arrays = [np.zeros((found.height, found.width, 3), np.uint8) for found in headers]
    made: list[Any] = [None] * len(headers)

    def decode(number: int) -> None:
        mine = slice(number, None, len(decoders))
        into = [nvimgcodec.as_image(array) for array in arrays[mine]]
        streams = [found.stream for found in headers[mine]]
        made[mine] = decoders[number].decode(streams, images=into, params=params)

    numbers = range(1, min(len(decoders), len(headers)))
    others = [threading.Thread(target=decode, args=(number,)) for number in numbers]
    for thread in others:
        thread.start()
    decode(0)
    for thread in others:
        thread.join()
    return [a if m is not None else None for a, m in zip(arrays, made, strict=True)]


def _ends(data: bytes) -> bool:
    """Whether a JPEG has its end marker."""
    return data.rstrip(b"\0").endswith(b"\xff\xd9")


def _groups(rows: list[int], headers: list[Any], most: int) -> Iterator[list[int]]:
    """The rows in runs of at most so many pixels, so that big images do not fill the memory."""
    group: list[int] = []
    pixels = 0
    for row in rows:
        size = headers[row].height * headers[row].width
        if group and pixels + size > most:
            yield group
            group, pixels = [], 0
        group.append(row)
        pixels += size
    if group:
        yield group


def _damaged(words: str) -> bool:
    """Whether libjpeg saw damage it decoded past. It says the first only: bytes left over before
    the end marker are the last, and hurt no pixel; browsers and we show such an image.
    (Counted, not looked for line by line: several threads write between one another.)
    """
    harmless = words.count("extraneous bytes before marker 0xd9")
    return len(words) >= FLOOD or words.count("Corrupt JPEG data") > harmless


def _verdict(data: bytes, words: str) -> str:
    """The fault of an image that parsed but did not decode, in the decoder's words."""
    lines = [re.sub(r"\x1b\[[0-9;]*m|\[\w+\] *", "", line) for line in words.splitlines()]
    # OpenCV, asked last, stamps its lines with the time; the summary names a position only.
    told = [line for line in lines if line.strip() and "@" not in line and "position" not in line]
    why = pillow_images.plain(told[0]) if told else "the decoder gave up"
    cut = data.startswith(b"\xff\xd8") and not _ends(data)
    return f"{'truncated' if cut or pillow_images.cut_short(why) else 'corrupt'}: {why}"


def _pipeline(
    config: PixelConfig, batch_size: int, threads: int, device: int | None, feed: Any
) -> Any:
    from nvidia.dali import fn, pipeline_def, types

    chip = "cpu" if device is None else "gpu"
    side = config.size
    augmented = config.views - 1 if config.policy != "none" else 0
    placing = 1 if config.resize == "pad" else 2
    count = placing + 4 * augmented

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=batch_size, num_threads=threads, device_id=device, prefetch_queue_depth=1
    )
    def images_to_views() -> Any:
        image = fn.external_source(
            lambda: feed()[0],
            device=chip,
            dtype=types.UINT8,
            ndim=3,
            layout="HWC",
            no_copy=device is None,
        )
        numbers = {"dtype": types.FLOAT, "ndim": 1}
        fed: Any = fn.external_source(lambda: feed()[1:], num_outputs=count, **numbers)
        smooth = {"interp_type": types.INTERP_LINEAR, "antialias": True, "device": chip}
        if config.resize == "pad":
            fitted = fn.resize(image, size=[side, side], mode="not_larger", **smooth)
            placed: Any = {"crop_pos_y": fed[0][0], "crop_pos_x": fed[0][1], "device": chip}
            out = [fn.crop(fitted, crop=[side, side], out_of_bounds_policy="pad", **placed)]
        else:
            region = {"roi_start": fed[0], "roi_end": fed[1]}
            out = [fn.resize(image, size=[side, side], **region, **smooth)]
        for at in range(placing, count, 4):
            anchor, shape, angle, light = fed[at : at + 4]
            cut = fn.slice(image, anchor, shape, axis_names="HW", device=chip)
            square = fn.resize(cut, size=[side, side], **smooth)
            turned = fn.rotate(square, angle=angle, keep_size=True, fill_value=None, device=chip)
            lit = {"brightness": light[0], "contrast": light[1]}
            out.append(fn.brightness_contrast(turned, **lit, device=chip))
        return tuple(out)

    pipeline = images_to_views()
    pipeline.build()
    return pipeline


MIDDLE = np.float32(0.5)
BEFORE = np.float32(0.4999)  # the middle, but the other pixel of two where half a pixel is over
