"""Small copies of original images for a page: upright, as WebP.

    catalog rows -> read and decoded at a reduced size, a few files at a time -> `Thumbnail`

Only the images that a page shows are read, so their number does not depend on the store's size.
Originals that are gone or have changed since they were listed give None.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from arrowhead.data.catalog import Catalog
from arrowhead.decode.pillow_images import open_image
from arrowhead.decode.pixels import PixelConfig
from arrowhead.features.extract import ExtractConfig

QUALITY = 72  # of the WebP files
MAX_THREADS = 8
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A small upright copy of an image.

    Attributes:
        webp: The WebP file.
        width, height: Its size in pixels.
    """

    webp: bytes
    width: int
    height: int

    @property
    def uri(self) -> str:
        """The picture as a data: URI."""
        return "data:image/webp;base64," + base64.b64encode(self.webp).decode()


def read_thumbnails(
    catalog: Catalog,
    rows: Sequence[int],
    side: int,
    on_done: Callable[[], None] = lambda: None,
) -> dict[int, Thumbnail | None]:
    """Make thumbnails of some images of a catalog.

    Args:
        catalog: The images.
        rows: Rows of the catalog.
        side: The longer side of a thumbnail in pixels; smaller images keep their size.
        on_done: Called after each image.

    Returns:
        The thumbnail of each row; None if the original cannot be read or decoded, or has changed
        since it was listed.
    """

    def make(data: bytes) -> Thumbnail | None:
        thumbnail = make_thumbnail(data, side)
        on_done()
        return thumbnail

    return _map_files(catalog, rows, make)


def _map_files(
    catalog: Catalog, rows: Sequence[int], make: Callable[[bytes], T | None]
) -> dict[int, T | None]:
    """Apply a function to the bytes of some files, in threads; None where one cannot be read."""

    def read_and_make(row: int) -> T | None:
        data, fault = catalog.read_file(row, ExtractConfig().max_bytes)
        return None if fault else make(data)

    distinct = sorted({int(row) for row in rows})
    with ThreadPoolExecutor(min(MAX_THREADS, 2 * (os.cpu_count() or 1))) as pool:
        return dict(zip(distinct, pool.map(read_and_make, distinct), strict=True))


def read_pixels(
    catalog: Catalog, rows: Sequence[int], side: int
) -> dict[int, NDArray[np.uint8] | None]:
    """Like `read_thumbnails`, as uint8 (H, W, 3)."""

    def decode(data: bytes) -> NDArray[np.uint8] | None:
        image = decode_small(data, side)
        return None if image is None else np.asarray(image)

    return _map_files(catalog, rows, decode)


def make_thumbnail(data: bytes, side: int) -> Thumbnail | None:
    """Make a thumbnail of an encoded image; None if it cannot be decoded."""
    image = decode_small(data, side)
    if image is None:
        return None
    file = io.BytesIO()
    image.save(file, "WEBP", quality=QUALITY, method=2)
    return Thumbnail(file.getvalue(), *image.size)


def decode_small(data: bytes, side: int) -> Any:
    """Decode an image at a reduced size: a Pillow RGB image, upright, on white; None if impossible.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that is enough, which takes a fraction of
    the time.
    """
    from PIL import Image, ImageOps

    with suppress(Exception):  # whatever a decoder raises: the picture is left out
        image = open_image(data)
        if image.width * image.height > PixelConfig().max_pixels:
            return None
        image.draft("RGB", (side, side))
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # as `decode_with_pillow` does
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        image.thumbnail((side, side), Image.Resampling.BILINEAR, reducing_gap=2.0)
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")
    return None


def sprite_sheet(
    catalog: Catalog, rows: Sequence[int], side: int, columns: int = 20
) -> tuple[Thumbnail | None, dict[int, int]]:
    """Paste small square copies of images into one picture, `columns` in a row.

    Returns:
        The sheet, None if no image can be read; and the position on it of each row that is there.
    """
    from PIL import Image

    made = _map_files(catalog, rows, lambda data: decode_small(data, side))
    tiles = [(row, image) for row, image in made.items() if image is not None]
    if not tiles:
        return None, {}
    sheet = Image.new("RGB", (columns * side, -(-len(tiles) // columns) * side), "white")
    for position, (_, image) in enumerate(tiles):
        left, top = position % columns * side, position // columns * side
        sheet.paste(image, (left + (side - image.width) // 2, top + (side - image.height) // 2))
    file = io.BytesIO()
    sheet.save(file, "WEBP", quality=QUALITY, method=2)
    return (
        Thumbnail(file.getvalue(), *sheet.size),
        {row: position for position, (row, _) in enumerate(tiles)},
    )
