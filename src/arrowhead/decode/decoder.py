"""Decode batches of encoded images to pixels.

    B files' bytes
      -> header            size, format, orientation, without decoding; errors become faults
      -> nvImageCodec      DALI's decoder library; Pillow for what it decodes unlike a browser
      -> views             resized, augmented and oriented by one DALI pipeline
      -> uint8             (B, S, S, 3) per view, and faults

A bad image becomes a black row and a fault; its neighbours are the same with it or without it. All
of it runs on the CPU or, if `device` is given, on a GPU: then JPEGs are decoded there (with its
hardware engine if there is one) and checked by `checked_codec`, other formats are decoded on the
CPU, and no pixels return to the host. A file may still crash the process: `worker_process` runs the
decoder in a child process.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.decode import headers as decode_headers
from arrowhead.decode import pillow_images
from arrowhead.decode import pixels as decode_pixels
from arrowhead.decode.checked_codec import CheckedCodec
from arrowhead.decode.codecs import Codec, CpuCodec, GpuCodec
from arrowhead.decode.pixels import CROPPED_UPRIGHT, Device, Header, PixelConfig, Pixels
from arrowhead.decode.view_pipeline import ViewPipeline

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
        device: Where to decode, see `Device`.
        read_messages: Returns what was written to stderr since its last call; the decoders report
            there why an image failed.
        rule: The recipe's `decoder`, one of DECODER_RULES; ConfigError for another.
        codec: The device's decoder of JPEGs; by default nvImageCodec's.
    """

    def __init__(
        self,
        config: PixelConfig,
        *,
        batch_size: int,
        threads: int,
        device: Device = None,
        read_messages: Callable[[], str] = lambda: "",
        rule: str = CROPPED_UPRIGHT,
        codec: Codec | None = None,
    ) -> None:
        from PIL import Image

        # DALI's OpenCV fallback would ignore the limit on decompression bombs of libjpeg-turbo.
        os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(config.max_pixels))
        Image.MAX_IMAGE_PIXELS = config.max_pixels
        decode_pixels.check_decoder_rule(rule)
        self.config, self.batch_size = config, batch_size
        self._read_messages, self._device = read_messages, device
        gpu = device if isinstance(device, int) else None
        self._views = ViewPipeline(
            config,
            batch_size=batch_size,
            threads=threads,
            gpu=gpu,
            crops_upright=rule == CROPPED_UPRIGHT,
            tensors=device is not None,
        )
        self._cpu = CpuCodec(threads)
        self._checked: CheckedCodec | None = None
        if device is not None:
            import torch

            self._torch_device = decode_pixels.torch_device(device)
            if gpu is not None:
                torch.cuda.set_device(gpu)
                codec = codec or GpuCodec(threads, gpu)
            codec = codec or CpuCodec(threads).decode_into
            self._checked = CheckedCodec(codec, self._cpu, self._torch_device)
        read_messages()

    def __call__(
        self, encoded: Sequence[bytes], image_ids: Sequence[bytes], into: Any = None
    ) -> Pixels:
        """Decode up to `batch_size` files; the result has as many rows as files.

        Args:
            encoded: The files' bytes.
            image_ids: 16 bytes each, which determine the augmentations.
            into: Memory for the pixels, uint8 (views, rows, S, S, 3): an array, or with a device a
                tensor on it; allocated by default.
        """
        headers: list[Any] = [decode_headers.read_header(data, self.config) for data in encoded]
        faults: list[str | None] = [h if isinstance(h, str) else None for h in headers]
        views = [view[: len(encoded)] for view in self._allocate(len(encoded), into)]
        wrong = np.zeros(len(encoded), bool)
        valid = [i for i, fault in enumerate(faults) if fault is None]
        for rows in _group_by_pixels(
            valid, headers, MAX_GROUP_PIXELS if self._device is None else 10 * MAX_GROUP_PIXELS
        ):
            images = self._decode_rows(rows, encoded, image_ids, headers, faults, wrong)
            if images:
                kept = list(images)
                self._views(
                    list(images.values()),
                    [image_ids[i] for i in kept],
                    [headers[i] for i in kept],
                    views,
                    np.array(kept),
                )
        faulty = [i for i, fault in enumerate(faults) if fault is not None]
        for view in views:
            view[faulty] = 0
        fallback = [
            isinstance(header, Header) and header.stream is None and fault is None
            for header, fault in zip(headers, faults, strict=True)
        ]
        sizes = [
            header.upright_size if isinstance(header, Header) and fault is None else (0, 0)
            for header, fault in zip(headers, faults, strict=True)
        ]
        return Pixels(views, faults, fallback, sizes, repaired=int(wrong.sum()))

    def _allocate(self, rows: int, into: Any) -> Any:
        """`into`, or new memory for the pixels of this many images."""
        shape = self.config.views, rows, self.config.side, self.config.side, 3
        if into is not None:
            return into
        if self._device is None:
            return np.empty(shape, np.uint8)
        import torch

        return torch.empty(shape, dtype=torch.uint8, device=self._torch_device)

    def _decode_rows(
        self,
        rows: list[int],
        encoded: Sequence[bytes],
        image_ids: Sequence[bytes],
        headers: list[Any],
        faults: list[str | None],
        wrong: NDArray[np.bool_],
    ) -> dict[int, Any]:
        """Decode these rows: {row: image (H, W, 3)}; failures are written to `faults`, and what the
        device's decoder got wrong to `wrong`.
        """
        by_pillow = [i for i in rows if headers[i].stream is None]
        images: dict[int, Any] = {
            i: pillow_images.decode_with_pillow(encoded[i]) for i in by_pillow
        }
        self._read_messages()
        codec_rows = [i for i in rows if headers[i].stream is not None]
        jpegs = [i for i in codec_rows if encoded[i].startswith(b"\xff\xd8")]
        on_cpu = codec_rows
        if self._checked is not None:
            on_cpu = [i for i in codec_rows if not encoded[i].startswith(b"\xff\xd8")]
            decoded = self._checked([headers[i] for i in jpegs], [image_ids[i] for i in jpegs])
            images |= dict(zip(jpegs, decoded.images, strict=True))
            wrong[jpegs] = decoded.wrong
        images |= dict(zip(on_cpu, self._cpu([headers[i] for i in on_cpu]), strict=True))
        # A message does not name its image: the suspects are decoded again, one by one, on the CPU,
        # whose decoders report what they find. GPU decoders do not report a truncated JPEG.
        suspects = {i for i in codec_rows if images[i] is None}
        if _reports_damage(self._read_messages()):
            suspects.update(jpegs)
        elif self._checked is not None:
            suspects.update(i for i in jpegs if not _has_end_marker(encoded[i]))
        for i in sorted(suspects):
            retried, messages = self._cpu([headers[i]])[0], self._read_messages()
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
        return {i: self._to_device(images[i]) for i in rows if i in images}

    def _to_device(self, image: Any) -> Any:
        """The image on the device that DALI runs on."""
        if self._device is None or not isinstance(image, np.ndarray):
            return image
        import torch

        return torch.from_numpy(np.require(image, requirements=["C", "W"])).to(self._torch_device)


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
