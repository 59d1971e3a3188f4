"""Small copies of images for a page: decoded at a reduced size, upright, as WebP."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from arrowhead.decode.pillow_images import open_image
from arrowhead.decode.pixels import PixelConfig

QUALITY = 72  # of the WebP files


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
    images: Mapping[int, Any], side: int, columns: int = 20
) -> tuple[Thumbnail | None, dict[int, int]]:
    """Paste small square copies of images into one picture, `columns` in a row.

    Args:
        images: Pillow images by row, with a longer side of `side` pixels; None is left out.
        side: Pixels of a square.
        columns: Squares in a line.

    Returns:
        The sheet, None if there is no image; and the position on it of each row that is there.
    """
    from PIL import Image

    tiles = [(row, image) for row, image in sorted(images.items()) if image is not None]
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
