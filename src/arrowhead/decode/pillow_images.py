"""Decode with Pillow what nvImageCodec would not show as a browser does."""

from __future__ import annotations

import io
import re
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.decode import formats, pixels
from arrowhead.decode.pixels import Header, PixelConfig

# Formats that Pillow may open: their readers are its own, or those that browsers use.
PILLOW_FORMATS = ("GIF", "PNG", "WEBP", "BMP", "TIFF", "AVIF", "JPEG")


def exif_orientation(image: Any) -> int:
    """The EXIF orientation of a Pillow image, 1 if its EXIF data is missing or corrupt."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = image.getexif().get(0x0112, 1)
    except Exception:
        return 1
    return int(value) if value in range(1, 9) else 1  # a float is equal to an integer


def open_image(data: bytes) -> Any:
    """Open a file with Pillow without decoding it."""
    from PIL import Image

    Image.init()  # registers all formats; Image.open would register some of them later
    return Image.open(io.BytesIO(data), formats=PILLOW_FORMATS)


def read_pillow_header(data: bytes, config: PixelConfig) -> Header | str:
    """The header of an image that Pillow will decode, or a fault."""
    from PIL import Image

    signatures = formats.SIGNATURES.items()
    kind = next((name for start, name in signatures if data.startswith(start)), None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = open_image(data)
            width, height = image.size
            raw = image.format == "TIFF" and formats.is_raw(image.tag_v2)
    except Image.DecompressionBombError:
        return f"too large: more than {config.max_pixels} pixels"
    except Exception as error:
        message = clean_message(str(error))
        if not kind:
            return f"not an image: it starts with {data[:8].hex(' ')}"
        return f"{'truncated' if means_truncated(message) else 'unsupported'}: {kind}, {message}"
    if height * width > config.max_pixels:
        return pixels.too_large_fault(width, height, config)
    if raw:
        return f"unsupported: {formats.CAMERA_RAW}: {formats.DEVELOP}"
    # Pillow applies the orientation of a TIFF itself; that of an AVIF is not in its EXIF data.
    return Header(height, width, 1 if image.format == "TIFF" else exif_orientation(image))


def decode_with_pillow(data: bytes) -> NDArray[np.uint8] | str:
    """Decode an image as a browser shows it on a white page: uint8 (H, W, 3), or a fault."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.asarray(_on_white(open_image(data)).convert("RGB"))
    except Exception as error:
        return _decode_fault(error)


def decode_small_grey(data: bytes, side: int) -> NDArray[np.uint8] | str:
    """Decode an image in grey, shrunk so that its longer side has at most `side` pixels.

    A JPEG is decoded at an eighth, a quarter or half of its size where that is enough. The EXIF
    orientation is not applied.

    Returns:
        uint8 (H, W), or a fault.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = open_image(data)
            image.draft("L", (2 * side, 2 * side))
            image = _on_white(image).convert("L")
            image.thumbnail((side, side), Image.Resampling.BOX, reducing_gap=None)
            return np.asarray(image)
    except Exception as error:
        return _decode_fault(error)


def _on_white(image: Any) -> Any:
    """A Pillow image, decoded, with 8 bits per channel and its transparent pixels on white."""
    from PIL import Image

    image.load()
    if image.mode.startswith("I;16"):  # convert("RGB") would clip at 255
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image


def _decode_fault(error: Exception) -> str:
    """The fault for an exception of Pillow."""
    message = clean_message(str(error)) or type(error).__name__
    return f"{'truncated' if means_truncated(message) else 'corrupt'}: {message}"


def clean_message(message: str) -> str:
    """Clean a library's message for a fault: printable, on one line, the same in every run."""
    message = re.sub(r"\x1b\[[0-9;]*m|<[^>]* at 0x[0-9a-f]+>|/\S+/", "", message)
    return "".join(c if c.isprintable() else " " for c in " ".join(message.split()))[:200].strip()


def means_truncated(message: str) -> bool:
    """Whether a library's message means that the file ends too early."""
    return bool(re.search(r"truncated|[Pp]remature end|[Uu]nexpected end|not big enough", message))
