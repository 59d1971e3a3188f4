"""The decoders of nvImageCodec, on CPUs and on a GPU, as Arrowhead configures them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.decode.pixels import Header

if TYPE_CHECKING:
    import torch

DECODER_OPTIONS = ":fancy_upsampling=1"  # the default differs between versions of nvImageCodec

Codec = Callable[[list[Header], "list[torch.Tensor]"], Sequence[bool]]
"""Decodes images into uint8 (H, W, 3) tensors; returns which it claims to have decoded. It may
return before it has written them."""


def _params() -> Any:
    from nvidia import nvimgcodec as nv

    # With conflicting EXIF blocks, applying the orientation here overruns a buffer in the library.
    return nv.DecodeParams(apply_exif_orientation=False, color_spec=nv.ColorSpec.SRGB)


class CpuCodec:
    """Single-threaded decoders of nvImageCodec, one per thread. A multi-threaded one uses one
    thread less than there are cores, while its caller only waits.
    """

    def __init__(self, threads: int) -> None:
        from nvidia import nvimgcodec as nv

        cpu, backends = nv.NVIMGCODEC_DEVICE_CPU_ONLY, [nv.Backend(nv.CPU_ONLY)]
        self._decoders = [nv.Decoder(cpu, 1, backends, DECODER_OPTIONS) for _ in range(threads)]

    def __call__(self, headers: Sequence[Header]) -> list[NDArray[np.uint8] | None]:
        """One image (H, W, 3) per header in host memory, None if decoding failed."""
        # Zeros, since a decoder may stop halfway without an error and leave uninitialized memory.
        arrays = [np.zeros((header.height, header.width, 3), np.uint8) for header in headers]
        decoded = self._decode([header.stream for header in headers], arrays)
        return [array if ok else None for array, ok in zip(arrays, decoded, strict=True)]

    def decode_into(self, headers: list[Header], images: list[torch.Tensor]) -> list[bool]:
        """Decode into tensors on the CPU; see `Codec`."""
        return self._decode([h.stream for h in headers], [image.numpy() for image in images])

    def decode_top(self, headers: Sequence[Header], into: list[NDArray[np.uint8]]) -> list[bool]:
        """Decode the first rows of each image, as many as the array for it has.

        Of a baseline JPEG only these rows are decoded: 16 of 375 take 4 % of the time of all.
        """
        from nvidia import nvimgcodec as nv

        streams = [
            header.stream.get_sub_code_stream(region=nv.Region(0, 0, *array.shape[:2]))
            for header, array in zip(headers, into, strict=True)
        ]
        return self._decode(streams, into)

    def _decode(self, streams: list[Any], arrays: list[NDArray[np.uint8]]) -> list[bool]:
        from nvidia import nvimgcodec

        params = _params()
        outputs: list[Any] = [None] * len(streams)

        def decode(index: int) -> None:
            share = slice(index, None, len(self._decoders))
            into = [nvimgcodec.as_image(array) for array in arrays[share]]
            decoder = self._decoders[index]
            outputs[share] = decoder.decode(streams[share], images=into, params=params)

        indices = range(1, min(len(self._decoders), len(streams)))
        others = [threading.Thread(target=decode, args=(index,)) for index in indices]
        for thread in others:
            thread.start()
        if streams:
            decode(0)
        for thread in others:
            thread.join()
        return [output is not None for output in outputs]


class GpuCodec:
    """The decoder of nvImageCodec on a GPU, with its hardware JPEG engine if there is one.

    kinds: nvImageCodec's names of the back ends that it may use, preferred ones first.
    """

    KINDS = ("HW_GPU_ONLY", "GPU_ONLY", "HYBRID_CPU_GPU", "CPU_ONLY")

    def __init__(self, threads: int, device: int, kinds: Sequence[str] = KINDS) -> None:
        from nvidia import nvimgcodec as nv

        # With a load hint below 1, the choice of an image's decoder would depend on the batch.
        backends = [nv.Backend(getattr(nv, kind), load_hint=1.0) for kind in kinds]
        self._decoder = nv.Decoder(device, threads, backends, DECODER_OPTIONS)

    def __call__(self, headers: list[Header], images: list[torch.Tensor]) -> list[bool]:
        """Decode into `images`; see `Codec`."""
        import torch
        from nvidia import nvimgcodec

        into = nvimgcodec.as_images(images)
        streams = [header.stream for header in headers]
        outputs = self._decoder.decode(streams, images=into, params=_params())
        for output, wrapped, image in zip(outputs, into, images, strict=True):
            # Documented for images with memory of the library's own: others it may replace.
            if output is not None and output is not wrapped:
                decoded = torch.utils.dlpack.from_dlpack(output)
                if decoded.data_ptr() != image.data_ptr():
                    image.copy_(decoded)
        return [output is not None for output in outputs]
