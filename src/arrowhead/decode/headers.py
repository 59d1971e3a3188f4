"""What a file's header says, read before any decoder sees the file."""

from __future__ import annotations

from arrowhead.decode import formats, pillow_images, pixels
from arrowhead.decode.pixels import Header, PixelConfig


def header(data: bytes, config: PixelConfig) -> Header | str:
    """The header of an image, or the fault that keeps the image from the decoder.

    DALI dies with the process on a file whose header does not parse, so none gets there.
    """
    from nvidia import nvimgcodec

    if not data:
        return "empty: the file has no bytes"
    if fault := formats.foreign(data):
        return fault
    # Of a damaged TIFF nvImageCodec shows memory that nothing was written to, of a BMP of 16 bits
    # other colours, and its reader of JPEG 2000 can be made to die: Pillow opens those, or nobody.
    is_jpeg = data.startswith(b"\xff\xd8\xff")
    if not is_jpeg and not data.startswith((b"\x89PNG", b"RIFF")):
        return pillow_images.pillow_header(data, config)
    jpeg = formats.jpeg(data, config.max_scans) if is_jpeg else None
    if isinstance(jpeg, str):
        return jpeg
    if jpeg is None and (fault := formats.torn(data)):
        return fault
    try:
        stream = nvimgcodec.CodeStream(jpeg.spelled_out(data) if jpeg else data)
        height, width = int(stream.height), int(stream.width)
        channels = int(stream.num_channels)
    except Exception:
        return pillow_images.pillow_header(data, config)
    if height * width > config.max_pixels:
        return pixels.too_large(width, height, config)
    if min(height, width, channels) < 1:
        return f"unsupported: {width} x {height} pixels in {channels} channels"
    orientation = jpeg.orientation if jpeg else _orientation(data)
    by_pillow = not jpeg and (channels in (2, 4) or formats.is_special(data))
    return Header(height, width, orientation, None if by_pillow else stream)


def _orientation(data: bytes) -> int:
    """The orientation of a PNG or WebP. Only where it names one: Pillow decodes a PNG to look."""
    return (
        pillow_images.turn(pillow_images.opened(data)) if b"eXIf" in data or b"EXIF" in data else 1
    )
