"""Recognize formats and damage from the bytes of a file, before a decoder sees them.

    unsupported_fault      images and films of formats that are not decoded, with what to do
    parse_jpeg             segments of a JPEG up to its first scan: orientation, colours, damage
    truncated_fault        PNG and WebP files that are shorter than their chunks claim

These are pure functions of bytes. Decoder libraries crash on some of these files, or decode them
without an error.
"""

from __future__ import annotations

import re
import struct
import warnings
from dataclasses import dataclass
from typing import Any

SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"RIFF": "WebP",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
}

# Start-of-frame markers beyond baseline, extended and progressive (ITU T.81, table B.1; T.87).
UNSUPPORTED_FRAMES = dict.fromkeys((0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF), "arithmetic-coded JPEG")
UNSUPPORTED_FRAMES |= {
    0xC3: "lossless JPEG",
    **dict.fromkeys((0xC5, 0xC6, 0xC7), "hierarchical JPEG"),
}
UNSUPPORTED_FRAMES |= {0xF7: "JPEG-LS"}
SEGMENT_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # without those inside a scan
# What libjpeg assumes for four components if this segment is missing.
ADOBE_SEGMENT = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\0"

# ------------------------------------------------------------------------- other formats

CONVERT = "convert it to JPEG or PNG"
EXPORT = "export it as JPEG or PNG"
DEVELOP = "develop it to JPEG or TIFF with the camera's program"
FILM = "take still pictures out of it (e.g. with ffmpeg)"
CAMERA_RAW = "a camera's raw file"

# First bytes of formats: their name, and what to do.
UNSUPPORTED_SIGNATURES = {
    b"\xff\x0a": ("JPEG XL", CONVERT),
    b"\0\0\0\x0cJXL \r\n\x87\n": ("JPEG XL", CONVERT),
    b"\xff\x4f\xff\x51": ("JPEG 2000", CONVERT),
    b"\0\0\0\x0cjP  \r\n\x87\n": ("JPEG 2000", CONVERT),
    b"II\xbc": ("JPEG XR", CONVERT),
    b"8BPS": ("Photoshop (PSD)", EXPORT),
    b"gimp xcf": ("GIMP (XCF)", EXPORT),
    b"AT&TFORM": ("DjVu", EXPORT),
    b"icns": ("ICNS (an icon)", EXPORT),
    b"qoif": ("QOI", CONVERT),
    b"FLIF": ("FLIF", CONVERT),
    b"BPG\xfb": ("BPG", CONVERT),
    b"DDS ": ("DDS", CONVERT),
    b"\x76\x2f\x31\x01": ("OpenEXR", CONVERT),
    b"#?RADIANCE": ("Radiance HDR", CONVERT),
    b"SIMPLE  =": ("FITS", CONVERT),
    b"\x8aMNG": ("MNG", CONVERT),
    b"\x8bJNG": ("JNG", CONVERT),
    b"FUJIFILMCCD-RAW": (f"RAF, {CAMERA_RAW}", DEVELOP),
    b"FOVb": (f"X3F, {CAMERA_RAW}", DEVELOP),
    b"\0MRM": (f"MRW, {CAMERA_RAW}", DEVELOP),
    b"IIU\0": (f"RW2, {CAMERA_RAW}", DEVELOP),
    b"IIRO": (f"ORF, {CAMERA_RAW}", DEVELOP),
    b"IIRS": (f"ORF, {CAMERA_RAW}", DEVELOP),
    b"MMOR": (f"ORF, {CAMERA_RAW}", DEVELOP),
    b"\x1a\x45\xdf\xa3": ("a film (Matroska or WebM)", FILM),
}
# Brands of ISO base media files (ISO/IEC 14496-12; 23008-12, annex B; the MP4 registry).
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
UNSUPPORTED_BRANDS = {
    **dict.fromkeys(HEIC_BRANDS, ("HEIC", CONVERT)),
    b"jxl ": ("JPEG XL", CONVERT),
    **dict.fromkeys((b"jp2 ", b"jpx ", b"jpm ", b"mjp2"), ("JPEG 2000", CONVERT)),
    **dict.fromkeys((b"mif1", b"msf1", b"mif2", b"miaf"), ("HEIF", CONVERT)),
    b"crx ": (f"CR3, {CAMERA_RAW}", DEVELOP),
}


def unsupported_fault(data: bytes) -> str | None:
    """The fault of an image or film of an unsupported format; None for supported formats and for
    files that are no images.
    """
    if data.startswith((b"\xff\xd8\xff", b"\x89PNG", b"GIF8")):
        return None
    signatures = UNSUPPORTED_SIGNATURES.items()
    name_and_advice = next((pair for start, pair in signatures if data.startswith(start)), None)
    if data[4:8] == b"ftyp":
        name_and_advice = _format_of_brands(data)
    elif data.startswith(b"RIFF") and data[8:12] in (b"AVI ", b"RDIB", b"RMID"):
        name_and_advice = ("a film (AVI)", FILM) if data[8:12] == b"AVI " else None
    elif data[:4] in (b"\0\0\1\0", b"\0\0\2\0") and 0 < data[4] < 64 and not data[5]:
        name_and_advice = "ICO (an icon)", CONVERT
    elif data[128:132] == b"DICM":
        name_and_advice = "DICOM", EXPORT
    elif re.match(rb"P[1-6]\s+(#[^\n]*\n\s*)*\d+\s+\d+\s|P7\nWIDTH ", data[:512]):
        name_and_advice = "PNM", CONVERT
    elif data[8:10] == b"CR" and data.startswith((b"II*\0", b"MM\0*")):
        name_and_advice = f"CR2, {CAMERA_RAW}", DEVELOP
    elif _is_svg(data):
        name_and_advice = "SVG (a drawing, not pixels)", EXPORT
    return "unsupported: " + ": ".join(name_and_advice) if name_and_advice else None


def _format_of_brands(data: bytes) -> tuple[str, str] | None:
    """The format of an ISO base media file by its brands, the major one first; None for AVIF.

    A generic HEIF brand counts only if no brand names the codec.
    """
    length = min(int.from_bytes(data[:4], "big"), 512)
    brands = [data[8:12], *(data[position : position + 4] for position in range(16, length - 3, 4))]
    if {b"avif", b"avis"} & set(brands) and not HEIC_BRANDS & set(brands):
        return None
    known = [UNSUPPORTED_BRANDS[brand] for brand in brands if brand in UNSUPPORTED_BRANDS]
    with_codec = [pair for pair in known if pair[0] != "HEIF"]
    return (with_codec or known or [("a film (MP4 or QuickTime)", FILM)])[0]


XML_PROLOGUE = re.compile(rb"<\?.*?\?>|<!--.*?-->|<!DOCTYPE svg[^>\[]*(\[.*?\])?\s*>", re.DOTALL)


def _is_svg(data: bytes) -> bool:
    head = data[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()
    return head.startswith(b"<") and XML_PROLOGUE.sub(b"", head).lstrip().startswith(
        (b"<svg", b"<svg:")
    )


def is_raw(tags: Any) -> bool:
    """Whether a TIFF with these tags is a camera's raw file (DNG, NEF, ARW), of which Pillow would
    decode a thumbnail or the raw sensor values.
    """
    reduced, photometric = tags.get(0x00FE, 0), tags.get(0x0106)
    # DNGVersion; a reduced-resolution first image with SubIFDs; a colour filter array.
    return 0xC612 in tags or (bool(reduced & 1) and 0x014A in tags) or photometric == 32803


# ---------------------------------------------------------------------------------- JPEG


@dataclass(frozen=True, slots=True)
class JpegInfo:
    """Facts from the segments of a JPEG: EXIF orientation (1 to 8), number of components, and
    whether it has an Adobe segment.
    """

    orientation: int
    components: int
    adobe: bool

    def with_adobe_segment(self, data: bytes) -> bytes:
        """The JPEG with an explicit Adobe segment if it is CMYK, so that all decoders agree.

        Without it, four components are inverted CMYK for libjpeg (Pillow, browsers) but plain CMYK
        for nvImageCodec, which then returns an almost black image.
        """
        return data if self.adobe or self.components != 4 else data[:2] + ADOBE_SEGMENT + data[2:]


def parse_jpeg(data: bytes, max_scans: int) -> JpegInfo | str:
    """Parse the segments of a JPEG up to its first scan; returns a fault if they are damaged."""
    position, orientations, components, progressive, adobe = 2, [], 0, False, False
    while True:
        while data[position : position + 2] == b"\xff\xff":  # fill bytes
            position += 1
        if position + 4 > len(data):
            return "truncated: the file ends before its first scan"
        marker, length = (
            data[position + 1],
            int.from_bytes(data[position + 2 : position + 4], "big"),
        )
        if data[position] != 0xFF or marker < 0xC0 or length < 2:
            return f"corrupt: no segment starts at byte {position}"
        segment = data[position + 4 : position + 2 + length]
        if marker == 0xDA:
            break
        if marker in UNSUPPORTED_FRAMES:
            return f"unsupported: {UNSUPPORTED_FRAMES[marker]}"
        if marker in (0xC0, 0xC1, 0xC2):
            if segment[:1] != b"\x08":
                return f"unsupported: JPEG of {segment[0] if segment else 0} bits"
            components, progressive = (segment[5] if len(segment) > 5 else 0), marker == 0xC2
        if marker == 0xE1 and segment.startswith(b"Exif\0\0"):
            orientations.append(_exif_orientation(segment))
        adobe = adobe or (marker == 0xEE and segment.startswith(b"Adobe") and len(segment) >= 12)
        position += 2 + length
    # A baseline JPEG whose first scan has all components has no other scan. This avoids counting,
    # which takes as long as everything else. data.count() may include what follows the image (a
    # phone's motion photo), so it is only a bound.
    is_single_scan = not progressive and segment[:1] == bytes([components])
    may_exceed = not is_single_scan and data.count(b"\xff\xda", position) > max_scans
    if may_exceed and (scans := _count_scans(data, position)) > max_scans:
        return f"too large: {scans} scans, more than {max_scans}"
    if len(known := set(orientations) - {0}) > 1:
        return f"corrupt: its EXIF segments contradict one another: orientations {sorted(known)}"
    return JpegInfo(max(known, default=1), components, adobe)


def _count_scans(data: bytes, position: int) -> int:
    """Number of scans of a JPEG whose first one starts at `position`."""
    count = 0
    while (marker := data[position + 1 : position + 2]) not in (b"", b"\xd9"):
        count += marker == b"\xda"
        found = SEGMENT_MARKER.search(
            data, position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        )
        position = found.end() - 2 if found else len(data)
    return count


def _exif_orientation(block: bytes) -> int:
    """The orientation in an EXIF block, 0 if it is missing or corrupt."""
    value = _orientation_of_sound_exif(block)
    if value is not None:
        return value if value <= 8 else 0
    from PIL import Image

    exif = Image.Exif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exif.load(block)
            value = exif.get(0x0112)
    except Exception:  # a corrupt block: the image is shown as stored
        return 0
    return int(value) if value in range(1, 9) else 0  # a float is equal to an integer


# Bytes of a value, by its type (TIFF 6.0, section 2; EXIF 2.3).
EXIF_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}


def _orientation_of_sound_exif(block: bytes) -> int | None:
    """The orientation in an EXIF block without any defect, in a tenth of the time that Pillow
    takes; 0 if there is none. None where Pillow has to decide.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[6:10])
    if order is None or len(block) < 16:
        return None
    start = 6 + struct.unpack_from(order + "I", block, 10)[0]
    if not 14 <= start <= len(block) - 2:
        return None
    end = start + 2 + 12 * struct.unpack_from(order + "H", block, start)[0]
    if end > len(block):
        return None
    found = []
    for tag, kind, count, value in struct.iter_unpack(order + "HHII", block[start + 2 : end]):
        size = EXIF_TYPE_BYTES.get(kind, 0) * count
        if not size or (size > 4 and 6 + value + size > len(block)):
            return None
        if tag == 0x0112:
            if (kind, count) != (3, 1):
                return None
            found.append(value & 0xFFFF if order == "<" else value >> 16)
    return found[0] if len(found) == 1 else (None if found else 0)


# --------------------------------------------------------------------------- PNG and WebP


def truncated_fault(data: bytes) -> str | None:
    """The fault of a PNG or WebP that is shorter than its chunks claim; decoders would allocate
    memory for the claimed size.
    """
    png = data.startswith(b"\x89PNG")
    end = len(data) if png else 8 + int.from_bytes(data[4:8], "little")
    position = 8 if png else 12
    while position + 8 <= end <= len(data):
        if png:
            position += 12 + int.from_bytes(data[position : position + 4], "big")
            if data[position - 8 : position - 4] == b"IEND":
                return None
        else:
            length = int.from_bytes(data[position + 4 : position + 8], "little")
            position += 8 + length + length % 2
    claimed = max(position, end)
    return "truncated: its last chunk ends after the file" if claimed > len(data) + 1 else None


def has_transparency_or_animation(data: bytes) -> bool:
    """Whether a PNG has a transparent colour or is animated, so that Pillow has to decode it:
    nvImageCodec returns uninitialized memory for a damaged animation.
    """
    head = data[: data.find(b"IDAT")] if data.startswith(b"\x89PNG") else b""
    return b"tRNS" in head or b"acTL" in head
