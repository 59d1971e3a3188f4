"""The pixel cache: every image decoded once, as a square of uint8 pixels in Arrow shards.

It is a store (`features.store`) whose "features" are the pixels of the whole image, squashed to
P x P, beside the height and width of the upright image. So it is made, resumed, reused by image id
and checked as a store is. Augmentations name regions in shares of the image, so its aspect ratio
comes back when a region is cropped out of the square and resized.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.decode.pixels import CROPPED_UPRIGHT, PixelConfig
from arrowhead.errors import ConfigError
from arrowhead.features import extract
from arrowhead.features.extract import ExtractConfig
from arrowhead.features.recipe import Recipe
from arrowhead.features.shard_file import PIXEL_DTYPE
from arrowhead.features.store import Store
from arrowhead.runtime.worker import Worker

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_SIZE = 64  # images per shard: 12 MB at 256 pixels
SIDE_MULTIPLE = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelCacheConfig:
    """The cache of decoded pixels that fine-tuning reads."""

    cache_size: int | None = None
    """Height and width of a cached image, in pixels, at least the size of the body's input.
    Default: 8/7 of that, rounded to a multiple of 16 (256 for 224)."""
    cache_bytes: int = 20 * 10**9
    """Most disk space that the cache may take, in bytes (an image of 256 x 256 takes 197 kB)."""

    def __post_init__(self) -> None:
        if self.cache_size is not None and not SIDE_MULTIPLE <= self.cache_size <= 2048:
            raise ConfigError(
                f"--cache-size is {self.cache_size}.",
                f"{SIDE_MULTIPLE} to 2048.",
                "leave it out, or give e.g. 256.",
            )
        if self.cache_bytes < 1:
            raise ConfigError(
                f"--cache-bytes is {self.cache_bytes}.", "1 or more.", "give e.g. 20000000000."
            )

    def side(self, size: int) -> int:
        """Height and width of a cached image for a body with inputs of `size` pixels."""
        if self.cache_size is None:
            return self.side_for(size)
        if self.cache_size < size:
            raise ConfigError(
                f"--cache-size is {self.cache_size}, and the body's input {size} pixels.",
                "cached images at least as large as the body's input.",
                f"give --cache-size {self.side_for(size)}, or leave it out.",
            )
        return self.cache_size

    @staticmethod
    def side_for(size: int) -> int:
        """The default of `side`."""
        return SIDE_MULTIPLE * round(size * 8 / 7 / SIDE_MULTIPLE)


class PixelStore(Store):
    """The pixel cache as a store, to write it; `PixelCache` reads it."""

    dtype = PIXEL_DTYPE


def pixel_recipe(side: int) -> Recipe:
    """The recipe of a pixel cache. No body is involved, so runs with any body share it."""
    return Recipe(
        body="none",
        weights="none",
        pool="own",
        width=side * side * 3,
        size=side,
        resize="squash",
        interpolation="cubic",  # nearer to the clean view of every recipe than linear
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        dtype=PIXEL_DTYPE,
        decoder=CROPPED_UPRIGHT,
    )


def write_pixels(worker: Worker, path: Path, pixels: PixelConfig, config: ExtractConfig) -> None:
    """Write the shard of every chunk that this worker takes, as `extract.extract` does."""
    extract.write_shards(worker, PixelStore(path), _flatten, pixels, config)


def _flatten(pixels_B3SS: Tensor) -> Tensor:
    """Pixels as rows of height x width x channel, uint8 (B, P x P x 3); no copy on the CPU."""
    return pixels_B3SS.permute(0, 2, 3, 1).flatten(1)


class PixelCache:
    """A finished pixel cache, memory-mapped: n images without a fault, in catalog order.

    Attributes:
        side: P, height and width of a cached image, in pixels.
        rows: int64 (n,), rows of the catalog.
        label: int64 (n,), or uint8 (n, C) if an image may have several labels.
        split: str (n,): train, valid or test.
        image_id: uint64 (n,), the first 8 bytes of the image id.
        size: int32 (n, 2), height and width of the upright original.
        classes: The classes' names.

    Raises:
        DataError: A shard has changed since it was written.
    """

    def __init__(self, path: Path) -> None:
        store = PixelStore(path)
        found = store.features(rows_only=True)
        self.path, self.side = path, store.recipe.size
        self.rows, self.label, self.split = found.row, found.label, found.split
        self.image_id = found.image_id
        self.classes: Sequence[str] = store.manifest()["classes"]
        self.fingerprint = store.recipe.fingerprint
        shards = list(store.shards())
        self._parts = [shard.features for shard in shards]
        sizes = [shard.sizes for shard in shards if shard.sizes is not None]
        self.size = np.concatenate(sizes)[self.rows] if sizes else np.zeros((0, 2), np.int32)
        starts = np.cumsum([0, *(len(part) for part in self._parts)])
        self._part = np.searchsorted(starts, self.rows, "right") - 1
        self._position = self.rows - starts[self._part]

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, index: int) -> NDArray[np.uint8]:
        """An image, uint8 (P, P, 3), a view of the memory map; index: 0 to n - 1."""
        pixels: NDArray[Any] = self._parts[self._part[index]][self._position[index], 0]
        return pixels.reshape(self.side, self.side, 3)
