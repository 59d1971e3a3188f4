"""Read and check the header of an image before a decoder sees the file."""

from __future__ import annotations

from arrowhead.decode import formats, pillow_images, pixels
from arrowhead.decode.pixels import Header, PixelConfig


def read_header(data: bytes, config: PixelConfig) -> Header | str:
    """The header of an image, or the fault that keeps it from being decoded.

    A file whose header does not parse crashes DALI and the process, so it must not get there.
    """
    from nvidia import nvimgcodec

    if not data:
        return "empty: the file has no bytes"
    if fault := formats.unsupported_fault(data):
        return fault
    # nvImageCodec returns uninitialized memory for a damaged TIFF and wrong colours for a 16-bit
    # BMP, and its JPEG 2000 reader can be made to crash: only Pillow may open other formats.
    is_jpeg = data.startswith(b"\xff\xd8\xff")
    if not is_jpeg and not data.startswith((b"\x89PNG", b"RIFF")):
        return pillow_images.read_pillow_header(data, config)
    jpeg_info = formats.parse_jpeg(data, config.max_scans) if is_jpeg else None
    if isinstance(jpeg_info, str):
        return jpeg_info
    if jpeg_info is None and (fault := formats.truncated_fault(data)):
        return fault
    try:
        stream = nvimgcodec.CodeStream(jpeg_info.with_adobe_segment(data) if jpeg_info else data)
        height, width = int(stream.height), int(stream.width)
        channels = int(stream.num_channels)
    except Exception:
        return pillow_images.read_pillow_header(data, config)
    if height * width > config.max_pixels:
        return pixels.too_large_fault(width, height, config)
    if min(height, width, channels) < 1:
        return f"unsupported: {width} x {height} pixels in {channels} channels"
    orientation = jpeg_info.orientation if jpeg_info else _orientation(data)
    needs_pillow = not jpeg_info and (
        channels in (2, 4) or formats.has_transparency_or_animation(data)
    )
    return Header(height, width, orientation, None if needs_pillow else stream)


def _orientation(data: bytes) -> int:
    """The orientation of a PNG or WebP. Pillow decodes a PNG for it, so only if there is EXIF."""
    return (
        pillow_images.exif_orientation(pillow_images.open_image(data))
        if b"eXIf" in data or b"EXIF" in data
        else 1
    )
