"""Read original images once, for everything that a report needs of their pixels.

    rows to measure, compare, show   -> each file is read and hashed, a few at a time
      -> `Pixels`                       its properties, grey pixels, thumbnail, tile

Nothing of a file is kept but these small results. A file whose content is not the one that its
features were computed from counts as unreadable, even if its size and time are unchanged.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from arrowhead.data.catalog import Catalog
from arrowhead.examine import image_matching, image_properties, thumbnails
from arrowhead.examine.image_properties import ImagePropertiesConfig, Measured
from arrowhead.examine.thumbnails import Thumbnail
from arrowhead.features.extract import ExtractConfig
from arrowhead.features.store import Store

MAX_THREADS = 8
T = TypeVar("T")


class Originals:
    """The image files that a store was made from.

    Args:
        catalog: The images.
        image_id_N: uint64 (N,), the first 8 bytes of the image id of each of its rows, big endian.
    """

    def __init__(self, catalog: Catalog, image_id_N: NDArray[np.uint64]) -> None:
        self.catalog, self._image_id_N = catalog, image_id_N

    @staticmethod
    def of(store: Store, catalog: Catalog) -> Originals:
        """The originals of a store; catalog: all of its images."""
        return Originals(catalog, store.image_ids()[:, 0])

    def read(self, row: int) -> bytes | None:
        """The content of a row's file; None if it is gone or not the one that the store read."""
        data, fault = self.catalog.read_file(row, ExtractConfig().max_bytes)
        if fault:
            return None
        digest = hashlib.blake2b(data, digest_size=16).digest()
        same = int.from_bytes(digest[:8], "big") == int(self._image_id_N[row])
        return data if same else None

    def map(self, rows: Iterable[int], make: Callable[[bytes], T | None]) -> dict[int, T | None]:
        """Apply a function to the content of some files, in threads; None where it is not read."""

        def read_and_make(row: int) -> T | None:
            data = self.read(row)
            return None if data is None else make(data)

        return self.map_rows(rows, read_and_make)

    def map_rows(self, rows: Iterable[int], make: Callable[[int], T]) -> dict[int, T]:
        """Apply a function to some rows, in threads."""
        import warnings

        distinct = sorted({int(row) for row in rows})
        threads = min(MAX_THREADS, 2 * len(os.sched_getaffinity(0)))
        # Warnings are set up once, because threads share them.
        with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
            warnings.simplefilter("ignore")
            return dict(zip(distinct, pool.map(make, distinct), strict=True))


@dataclass(kw_only=True, slots=True)
class Pixels:
    """What was read of some originals, by row of the catalog; None where one cannot be read.

    Attributes:
        measured: Properties.
        grey: Small grey pixels, to compare (see `image_matching.decode_thumbnail`).
        thumbnails: Pictures to show.
        tiles: Pillow images for the map.
    """

    measured: dict[int, Measured | None] = field(default_factory=dict)
    grey: dict[int, NDArray[np.uint8] | None] = field(default_factory=dict)
    thumbnails: dict[int, Thumbnail | None] = field(default_factory=dict)
    tiles: dict[int, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """Which rows of a catalog are read for what."""

    measured: Sequence[int] = ()
    grey: Sequence[int] = ()
    thumbnails: Sequence[int] = ()
    tiles: Sequence[int] = ()


def read_pixels(originals: Originals, wanted: Wanted, side: int, tile_side: int) -> Pixels:
    """Read each original that is wanted for anything once.

    Args:
        originals: The files.
        wanted: Which of them are read for what.
        side: Pixels of the longer side of a thumbnail.
        tile_side: Pixels of the longer side of a tile.
    """
    measurement = ImagePropertiesConfig()
    made: dict[str, Callable[[bytes], Any]] = {
        "measured": lambda data: image_properties.measure_image(data, measurement),
        "grey": _grey,
        "thumbnails": lambda data: thumbnails.make_thumbnail(data, side),
        "tiles": lambda data: thumbnails.decode_small(data, tile_side),
    }
    rows = {name: {int(row) for row in getattr(wanted, name)} for name in made}

    def make(row: int) -> dict[str, Any]:
        data = originals.read(row)
        return {
            name: None if data is None else make_one(data)
            for name, make_one in made.items()
            if row in rows[name]
        }

    pixels = Pixels()
    for row, parts in originals.map_rows(set().union(*rows.values()), make).items():
        for name, part in parts.items():
            getattr(pixels, name)[row] = part
    return pixels


def grey_reader(originals: Originals) -> Callable[[int], NDArray[np.uint8] | None]:
    """A function that reads the small grey pixels of a row; None if it cannot be read."""

    def read(row: int) -> NDArray[np.uint8] | None:
        data = originals.read(row)
        return None if data is None else _grey(data)

    return read


def _grey(data: bytes) -> NDArray[np.uint8] | None:
    decoded = image_matching.decode_thumbnail(data)
    return None if isinstance(decoded, str) else decoded
