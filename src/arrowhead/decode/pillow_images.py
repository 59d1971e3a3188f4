"""Images that Pillow decodes, where the decoder library shows other pixels than a browser."""

from __future__ import annotations

import io
import re
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.decode import formats, pixels
from arrowhead.decode.pixels import Header, PixelConfig

# What Pillow may open here: formats whose readers are its own or those of a browser.
PILLOW = ("GIF", "PNG", "WEBP", "BMP", "TIFF", "AVIF", "JPEG")


def turn(image: Any) -> int:
    """The EXIF orientation of an image that Pillow has opened, 1 if it names none or is torn."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = image.getexif().get(0x0112, 1)
    except Exception:
        return 1
    return value if value in range(1, 9) else 1


def opened(data: bytes) -> Any:
    """Pillow's image of a file, not decoded yet."""
    from PIL import Image

    Image.init()  # else a format named in PILLOW may not be there yet
    return Image.open(io.BytesIO(data), formats=PILLOW)


def pillow_header(data: bytes, config: PixelConfig) -> Header | str:
    """The header of an image that Pillow decodes, or a fault."""
    from PIL import Image

    known = formats.SIGNATURES.items()
    kind = next((name for start, name in known if data.startswith(start)), None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = opened(data)
            width, height = image.size
            raw = image.format == "TIFF" and formats.is_raw(image.tag_v2)
    except Image.DecompressionBombError:
        return f"too large: more than {config.max_pixels} pixels"
    except Exception as error:
        words = plain(str(error))
        if not kind:
            return f"not an image: it starts with {data[:8].hex(' ')}"
        return f"{'truncated' if cut_short(words) else 'unsupported'}: {kind}, {words}"
    if height * width > config.max_pixels:
        return pixels.too_large(width, height, config)
    if raw:
        return f"unsupported: {formats.RAW}: {formats.DEVELOP}"
    # A TIFF is turned by Pillow itself; what turns an AVIF is not in its EXIF block.
    return Header(height, width, 1 if image.format == "TIFF" else turn(image))


def by_pillow(data: bytes) -> NDArray[np.uint8] | str:
    """uint8 (H, W, 3), as a browser shows the image on a white page; or a fault."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = opened(data)
            image.load()
            if image.mode.startswith("I;16"):  # convert would clip at 255
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, (255, 255, 255, 255))
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return np.asarray(image.convert("RGB"))
    except Exception as error:
        words = plain(str(error)) or type(error).__name__
        return f"{'truncated' if cut_short(words) else 'corrupt'}: {words}"


def plain(words: str) -> str:
    """Words fit for a row: printable, on one line, the same in every run."""
    words = re.sub(r"\x1b\[[0-9;]*m|<[^>]* at 0x[0-9a-f]+>|/\S+/", "", words)
    return "".join(c if c.isprintable() else " " for c in " ".join(words.split()))[:200].strip()


def cut_short(words: str) -> bool:
    """Whether a library's words say that the file ends too early."""
    return bool(re.search(r"truncated|[Pp]remature end|[Uu]nexpected end|not big enough", words))
