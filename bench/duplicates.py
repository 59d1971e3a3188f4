"""Alterations for now."""

from __future__ import annotations

import io
from collections.abc import Callable

from PIL import Image, ImageDraw, ImageEnhance, ImageOps


def jpeg(image: Image.Image, quality: int = 92) -> bytes:
    """The image as a JPEG file."""
    return _file(image, "JPEG", quality=quality)


def _file(image: Image.Image, kind: str, **options: int) -> bytes:
    output = io.BytesIO()
    image.save(output, kind, **options)
    return output.getvalue()


def _resized(image: Image.Image, factor: float) -> bytes:
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return jpeg(image.resize(size, Image.Resampling.BICUBIC))


def _cropped(image: Image.Image, share: float, corner: tuple[float, float] = (0.5, 0.5)) -> bytes:
    """Cut off this share of the width and of the height; corner (0, 0) keeps the upper left."""
    width, height = round(image.width * (1 - share)), round(image.height * (1 - share))
    left, top = (
        round((image.width - width) * corner[0]),
        round((image.height - height) * corner[1]),
    )
    return jpeg(image.crop((left, top, left + width, top + height)))


def _bordered(image: Image.Image, share: float, colour: str) -> bytes:
    return jpeg(ImageOps.expand(image, round(share * max(image.size)), colour))


def _brighter(image: Image.Image, factor: float) -> bytes:
    return jpeg(ImageEnhance.Brightness(image).enhance(factor))


def _watermarked(image: Image.Image) -> bytes:
    layer = Image.new("RGBA", image.size)
    draw = ImageDraw.Draw(layer)
    size = max(12, image.width // 10)
    place = (image.width * 0.1, image.height * 0.45)
    draw.text(place, "© SAMPLE PHOTO", (255, 255, 255, 140), font_size=size)
    return jpeg(Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB"))


Alteration = Callable[[Image.Image], bytes]
MILD: dict[str, Alteration] = {
    "resize 50 %": lambda image: _resized(image, 0.5),
    "JPEG 30": lambda image: jpeg(image, 30),
    "JPEG 75": lambda image: jpeg(image, 75),
    "JPEG 95": lambda image: jpeg(image, 95),
    "crop 5 %": lambda image: _cropped(image, 0.05),
    "grey": lambda image: jpeg(image.convert("L")),
    "brightness +20 %": lambda image: _brighter(image, 1.2),
    "border 3 %": lambda image: _bordered(image, 0.03, "black"),
    "watermark": _watermarked,
    "PNG": lambda image: _file(image, "PNG"),
}
HARD: dict[str, Alteration] = {
    "crop 20 %": lambda image: _cropped(image, 0.2),
    "flip": lambda image: jpeg(ImageOps.mirror(image)),
    "rotate 90": lambda image: jpeg(image.transpose(Image.Transpose.ROTATE_90)),
    "border 15 %": lambda image: _bordered(image, 0.15, "white"),
    "brightness x 1.8": lambda image: _brighter(image, 1.8),
}
# Further ones, to see how far it goes; no bar.
EXTRA: dict[str, Alteration] = {
    "crop 10 %": lambda image: _cropped(image, 0.1),
    "crop 20 % at a corner": lambda image: _cropped(image, 0.2, (0, 0)),
    "crop 40 %": lambda image: _cropped(image, 0.4),
    "rotate 270, grey": lambda image: jpeg(
        image.transpose(Image.Transpose.ROTATE_270).convert("L")
    ),
    "brightness x 0.4": lambda image: _brighter(image, 0.4),
    "stretched to a square": lambda image: jpeg(image.resize((256, 256))),
    "resize 25 %, JPEG 30": lambda image: jpeg(
        image.resize((max(1, image.width // 4), max(1, image.height // 4))), 30
    ),
}
