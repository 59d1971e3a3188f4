"""Decode JPEGs into the memory of a device, and find the images that its decoder got wrong.

    headers
      -> memory            one block on the device, filled with a pattern that no photo has
      -> codec             writes into it; the device is synchronized before and after
      -> sample            some pixels of every image, copied to the host together
      -> compare           with the first rows of the same image, decoded on the CPU meanwhile
      -> decode again      what differs, and its batch, as a whole on the CPU

Hardware JPEG decoders have returned black images, parts of other images, and memory that they had
not written yet, each without an error. What finds it:

- not written, or not yet: sampled pixels still have the pattern.
- black, or another image: the first rows differ from the CPU's. If these rows are too plain to tell
  two images apart (a white background, a black photo), the whole image is decoded on the CPU.
- partly wrong: one image of `WHOLE_CHECK_EVERY` is compared as a whole, and so are all images of a
  batch in which one is wrong.

The same code runs on CPUs, where the tests give it decoders that fail on purpose.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.decode.codecs import Codec, CpuCodec
from arrowhead.decode.pixels import Header

if TYPE_CHECKING:
    import torch

SENTINEL = np.frombuffer(b"\x02\xf9\x3d\xc6", np.int32)[0].item()
"""Four bytes, repeated. Pixels have three: four different, garish colours, whatever the address."""
ALIGNMENT = 256  # bytes; of each image's memory
CHUNK = 32  # images that are held in host memory when they are decoded again
TOP_ROWS = 16  # the height of a block of a JPEG with halved chroma: fewer cost as much
TOP_GRID = (4, 32)  # rows and columns of pixels that are compared in these rows
WHOLE_GRID = (12, 16)  # and in the whole image
WHOLE_CHECK_EVERY = 256  # images, chosen by content
MAX_OFF = 12.0  # grey levels between two decoders that do not count as a difference
MAX_SHARE_OFF = 1 / 32  # of the compared pixels that may differ more, such as clipped colours
MAX_MEAN_OFF = 3.0  # grey levels, of the others
PLAIN_LEVELS, PLAIN_SHARE = 12.0, 0.1  # plain: less than this share is this far from the median
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # decoders agree on it, not on colour's edges


@dataclass(slots=True)
class DeviceImages:
    """Decoded images.

    Attributes:
        images: uint8 (H, W, 3) on the device; None where the CPU cannot decode it either.
        wrong: bool (B,), whether the device's decoder got it wrong, so that it is the CPU's.
    """

    images: list[Any]
    wrong: NDArray[np.bool_]


class CheckedCodec:
    """Decodes with `codec` on a device, checks every image, and replaces those that are wrong.

    Args:
        codec: The device's decoder.
        cpu: Decodes what is compared, and what is wrong.
        device: "cuda:K" or "cpu".
    """

    def __init__(self, codec: Codec, cpu: CpuCodec, device: str) -> None:
        self._codec, self._cpu, self._device = codec, cpu, device
        self._memory: torch.Tensor | None = None
        self._background = ThreadPoolExecutor(1, "check")

    def __call__(self, headers: list[Header], image_ids: Sequence[bytes]) -> DeviceImages:
        """Decode a batch. The images are valid until the next call, which reuses their memory."""
        if not headers:
            return DeviceImages([], np.zeros(0, bool))
        shapes = np.array([(header.height, header.width) for header in headers], np.int64)
        expected = self._background.submit(self._decode_tops, headers, shapes)
        try:
            images, offsets = self._fill_memory(shapes)
            synchronize(self._device)  # the hardware engine does not wait for the fill
            claimed = np.array(self._codec(headers, images), bool)
            synchronize(self._device)
            tops, wholes = (
                grid_positions(shapes, grid, rows, offsets)
                for grid, rows in ((TOP_GRID, TOP_ROWS), (WHOLE_GRID, None))
            )
            sampled = self._sample(np.concatenate([tops, wholes], 1))
        finally:
            tops_by_cpu, known = expected.result()
        found_top, found_whole = np.split(sampled, [tops.shape[1]], 1)
        wrong = ~claimed | is_unwritten(sampled, np.concatenate([tops, wholes], 1))
        wrong |= known & ~agrees(found_top, tops_by_cpu)
        doubtful = ~known | is_plain(tops_by_cpu)
        doubtful |= np.array([image_id[0] % WHOLE_CHECK_EVERY == 0 for image_id in image_ids])
        result = DeviceImages(list(images), wrong)
        self._check_whole(np.flatnonzero(wrong | doubtful), headers, found_whole, result)
        if wrong.any():  # what else of this batch is wrong where it was not compared?
            others = np.flatnonzero(~(wrong | doubtful))
            self._check_whole(others, headers, found_whole, result)
        return result

    def _decode_tops(
        self, headers: Sequence[Header], shapes: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Pixels (B, K, 3) of the first rows, decoded on the CPU, and which could be decoded."""
        heights = np.minimum(shapes[:, 0], TOP_ROWS)
        sizes = heights * shapes[:, 1] * 3
        offsets = np.cumsum(sizes) - sizes
        memory = np.zeros(int(sizes.sum()), np.uint8)
        tops = [
            memory[start : start + size].reshape(height, width, 3)
            for start, size, height, width in zip(
                offsets.tolist(),
                sizes.tolist(),
                heights.tolist(),
                shapes[:, 1].tolist(),
                strict=True,
            )
        ]
        known = np.array(self._cpu.decode_top(headers, tops), bool)
        positions = grid_positions(shapes, TOP_GRID, TOP_ROWS, offsets)
        return memory[positions[:, :, None] + np.arange(3)], known

    def _fill_memory(
        self, shapes: NDArray[np.int64]
    ) -> tuple[list[torch.Tensor], NDArray[np.int64]]:
        """Images (H, W, 3) of these shapes, filled with SENTINEL, and where each begins."""
        import torch

        sizes = -(-shapes.prod(1) * 3 // ALIGNMENT) * ALIGNMENT
        offsets, total = np.cumsum(sizes) - sizes, int(sizes.sum())
        if self._memory is None or len(self._memory) < total:
            self._memory = None  # frees it before more is allocated
            self._memory = torch.empty(total, dtype=torch.uint8, device=self._device)
        self._memory[:total].view(torch.int32).fill_(SENTINEL)
        images = [
            self._memory.as_strided((height, width, 3), (3 * width, 3, 1), offset)
            for (height, width), offset in zip(shapes.tolist(), offsets.tolist(), strict=True)
        ]
        return images, offsets

    def _sample(self, positions: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The pixels (B, K, 3) that begin at these positions (B, K) of the memory."""
        import torch

        assert self._memory is not None
        index = torch.from_numpy(positions).to(self._device)[:, :, None]
        pixels: NDArray[np.uint8] = (
            self._memory[index + torch.arange(3, device=self._device)].cpu().numpy()
        )
        return pixels

    def _check_whole(
        self,
        rows: NDArray[np.int64],
        headers: Sequence[Header],
        found: NDArray[np.uint8],
        result: DeviceImages,
    ) -> None:
        """Decode rows on the CPU, compare them with what was `found`, replace what is wrong."""
        import torch

        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK].tolist()
            for row, image in zip(part, self._cpu([headers[row] for row in part]), strict=True):
                if image is None:
                    result.images[row], result.wrong[row] = None, False
                    continue
                shape = np.array([image.shape[:2]], np.int64)
                positions = grid_positions(shape, WHOLE_GRID, None, np.zeros(1, np.int64))
                expected = image.reshape(-1)[positions[:, :, None] + np.arange(3)]
                if result.wrong[row] or not agrees(found[row : row + 1], expected)[0]:
                    result.wrong[row] = True
                    result.images[row].copy_(torch.from_numpy(image))


def synchronize(device: str) -> None:
    """Wait until a GPU has finished all that this process gave it."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


def grid_positions(
    shapes: NDArray[np.int64],
    grid: tuple[int, int],
    rows: int | None,
    offsets: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Where the pixels of a grid begin, (B, K).

    Args:
        shapes: (B, 2), height and width of the images.
        grid: Rows and columns of pixels to take.
        rows: Take them from the first rows of each image; None: from all of it.
        offsets: (B,), where each image begins.
    """
    height, width = shapes[:, 0], shapes[:, 1]
    if rows is not None:
        height = np.minimum(height, rows)
    y, x = (
        (2 * np.arange(count) + 1) * extent[:, None] // (2 * count)
        for count, extent in zip(grid, (height, width), strict=True)
    )
    positions = (y[:, :, None] * width[:, None, None] + x[:, None, :]) * 3
    return positions.reshape(len(shapes), -1) + offsets[:, None]


def is_unwritten(pixels: NDArray[np.uint8], positions: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which images (B,) have a pixel that still is SENTINEL.

    pixels: (B, K, 3), which begin at `positions` (B, K) of the memory.
    """
    pattern = np.frombuffer(np.int32(SENTINEL).tobytes(), np.uint8)
    rows, columns = np.nonzero(pixels[:, :, 0] == pattern[positions & 3])  # few, as a rule
    expected = pattern[(positions[rows, columns, None] + np.arange(3)) & 3]
    unwritten = np.zeros(len(pixels), bool)
    unwritten[rows[(pixels[rows, columns] == expected).all(1)]] = True
    return unwritten


def agrees(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which images (B,) two decoders show alike, from the same pixels (B, K, 3) of both."""
    off = np.abs(one @ LUMA - other @ LUMA)
    far = off > MAX_OFF
    mean = (off * ~far).sum(1) / np.maximum((~far).sum(1), 1)
    return np.asarray((far.mean(1) <= MAX_SHARE_OFF) & (mean <= MAX_MEAN_OFF))


def is_plain(pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which images (B,) have too little contrast in these pixels to tell them from others."""
    luma = pixels @ LUMA
    far = np.abs(luma - np.median(luma, axis=1, keepdims=True)) > PLAIN_LEVELS
    return np.asarray(far.mean(1) < PLAIN_SHARE)
