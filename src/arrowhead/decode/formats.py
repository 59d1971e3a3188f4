"""What the bytes of a file say of it, read before any decoder sees them.

    foreign        an image (or film) of a kind that is not decoded here, with what to do about it
    jpeg           a JPEG's segments up to its first scan: orientation, colours, damage
    torn           a PNG or WebP that claims more than it holds

Pure functions of bytes; no library but Pillow's reader of EXIF blocks.
"""

from __future__ import annotations

import re
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
FRAMES = dict.fromkeys((0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF), "arithmetic-coded JPEG")
FRAMES |= {0xC3: "lossless JPEG", **dict.fromkeys((0xC5, 0xC6, 0xC7), "hierarchical JPEG")}
FRAMES |= {0xF7: "JPEG-LS"}
MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # not one of those that stand inside a scan
# What libjpeg assumes of four components where Adobe's segment is missing, said outright.
ADOBE = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\0"

# ------------------------------------------------------------------------- other formats

CONVERT = "convert it to JPEG or PNG"
EXPORT = "export it as JPEG or PNG"
DEVELOP = "develop it to JPEG or TIFF with the camera's program"
FILM = "take still pictures out of it (e.g. with ffmpeg)"
RAW = "a camera's raw file"

# Where a format is known by its first bytes: what it is, and what to do.
FOREIGN = {
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
    b"FUJIFILMCCD-RAW": (f"RAF, {RAW}", DEVELOP),
    b"FOVb": (f"X3F, {RAW}", DEVELOP),
    b"\0MRM": (f"MRW, {RAW}", DEVELOP),
    b"IIU\0": (f"RW2, {RAW}", DEVELOP),
    b"IIRO": (f"ORF, {RAW}", DEVELOP),
    b"IIRS": (f"ORF, {RAW}", DEVELOP),
    b"MMOR": (f"ORF, {RAW}", DEVELOP),
    b"\x1a\x45\xdf\xa3": ("a film (Matroska or WebM)", FILM),
}
# Brands of ISO base media files (ISO/IEC 14496-12; 23008-12, annex B; the MP4 registry).
HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
BRANDS = {
    **dict.fromkeys(HEIC, ("HEIC", CONVERT)),
    b"jxl ": ("JPEG XL", CONVERT),
    **dict.fromkeys((b"jp2 ", b"jpx ", b"jpm ", b"mjp2"), ("JPEG 2000", CONVERT)),
    **dict.fromkeys((b"mif1", b"msf1", b"mif2", b"miaf"), ("HEIF", CONVERT)),
    b"crx ": (f"CR3, {RAW}", DEVELOP),
}


def foreign(data: bytes) -> str | None:
    """The fault of an image of a kind that no decoder here reads, in words; None for the rest,
    which may be an image that is decoded here, or none at all.
    """
    if data.startswith((b"\xff\xd8\xff", b"\x89PNG", b"GIF8")):
        return None
    found = next((told for start, told in FOREIGN.items() if data.startswith(start)), None)
    if data[4:8] == b"ftyp":
        found = _brand(data)
    elif data.startswith(b"RIFF") and data[8:12] in (b"AVI ", b"RDIB", b"RMID"):
        found = ("a film (AVI)", FILM) if data[8:12] == b"AVI " else None
    elif data[:4] in (b"\0\0\1\0", b"\0\0\2\0") and 0 < data[4] < 64 and not data[5]:
        found = "ICO (an icon)", CONVERT
    elif data[128:132] == b"DICM":
        found = "DICOM", EXPORT
    elif re.match(rb"P[1-6]\s+(#[^\n]*\n\s*)*\d+\s+\d+\s|P7\nWIDTH ", data[:512]):
        found = "PNM", CONVERT
    elif data[8:10] == b"CR" and data.startswith((b"II*\0", b"MM\0*")):
        found = f"CR2, {RAW}", DEVELOP
    elif _is_svg(data):
        found = "SVG (a drawing, not pixels)", EXPORT
    return f"unsupported: {found[0]}: {found[1]}" if found else None


def _brand(data: bytes) -> tuple[str, str] | None:
    """What an ISO base media file is, by its brands: the major one, then those it names as well.

    AVIF is not foreign; a HEIF that does not say how it is coded is taken for HEIC by its others.
    """
    length = min(int.from_bytes(data[:4], "big"), 512)
    brands = [data[8:12], *(data[at : at + 4] for at in range(16, length - 3, 4))]
    if {b"avif", b"avis"} & set(brands) and not HEIC & set(brands):
        return None
    named = [BRANDS[brand] for brand in brands if brand in BRANDS]
    coded = [told for told in named if told[0] != "HEIF"]
    return (coded or named or [("a film (MP4 or QuickTime)", FILM)])[0]


PROLOGUE = re.compile(rb"<\?.*?\?>|<!--.*?-->|<!DOCTYPE svg[^>\[]*(\[.*?\])?\s*>", re.DOTALL)


def _is_svg(data: bytes) -> bool:
    head = data[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()
    return head.startswith(b"<") and PROLOGUE.sub(b"", head).lstrip().startswith(
        (b"<svg", b"<svg:")
    )


def is_raw(tags: Any) -> bool:
    """Whether the TIFF whose first directory has these tags is a camera's raw file (DNG, NEF, ARW):
    what Pillow would show of it is a thumbnail, or the bare sensor.
    """
    reduced, photometric = tags.get(0x00FE, 0), tags.get(0x0106)
    # DNGVersion; a small first picture with others below it; a colour filter array.
    return 0xC612 in tags or (bool(reduced & 1) and 0x014A in tags) or photometric == 32803


# ---------------------------------------------------------------------------------- JPEG


@dataclass(frozen=True, slots=True)
class Jpeg:
    """What a JPEG's segments say: EXIF orientation (1..8), number of components, and whether
    Adobe's segment is there.
    """

    orientation: int
    components: int
    adobe: bool

    def spelled_out(self, data: bytes) -> bytes:
        """The same JPEG, read alike by all decoders.

        Four components without Adobe's segment are inverted CMYK to libjpeg's users (Pillow,
        browsers) and plain CMYK to nvImageCodec, which then shows a picture that is almost black.
        """
        return data if self.adobe or self.components != 4 else data[:2] + ADOBE + data[2:]


def jpeg(data: bytes, max_scans: int) -> Jpeg | str:
    """What the segments of a JPEG up to its first scan say; or the fault they show."""
    at, orientations, components, progressive, adobe = 2, [], 0, False, False
    while True:
        while data[at : at + 2] == b"\xff\xff":  # fill bytes
            at += 1
        if at + 4 > len(data):
            return "truncated: the file ends before its first scan"
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at] != 0xFF or marker < 0xC0 or length < 2:
            return f"corrupt: no segment starts at byte {at}"
        segment = data[at + 4 : at + 2 + length]
        if marker == 0xDA:
            break
        if marker in FRAMES:
            return f"unsupported: {FRAMES[marker]}"
        if marker in (0xC0, 0xC1, 0xC2):
            if segment[:1] != b"\x08":
                return f"unsupported: JPEG of {segment[0] if segment else 0} bits"
            components, progressive = (segment[5] if len(segment) > 5 else 0), marker == 0xC2
        if marker == 0xE1 and segment.startswith(b"Exif\0\0"):
            orientations.append(_exif(segment))
        adobe = adobe or (marker == 0xEE and segment.startswith(b"Adobe") and len(segment) >= 12)
        at += 2 + length
    # One scan of all parts is the only one, unless progressive: counting costs as much as the rest.
    # Whatever follows the picture (a telephone's film) is not counted, but costs a closer look.
    alone = not progressive and segment[:1] == bytes([components])
    many = not alone and data.count(b"\xff\xda", at) > max_scans
    if many and (scans := _scans(data, at)) > max_scans:
        return f"too large: {scans} scans, more than {max_scans}"
    if len(named := set(orientations) - {0}) > 1:
        return f"corrupt: its EXIF segments contradict one another: orientations {sorted(named)}"
    return Jpeg(max(named, default=1), components, adobe)


def _scans(data: bytes, at: int) -> int:
    """Number of scans of a JPEG whose first one starts at `at`."""
    count = 0
    while (marker := data[at + 1 : at + 2]) not in (b"", b"\xd9"):
        count += marker == b"\xda"
        found = MARKER.search(data, at + 2 + int.from_bytes(data[at + 2 : at + 4], "big"))
        at = found.end() - 2 if found else len(data)
    return count


def _exif(block: bytes) -> int:
    """The orientation an EXIF block names, 0 if it names none or is torn."""
    from PIL import Image

    exif = Image.Exif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exif.load(block)
            value = exif.get(0x0112)
    except Exception:  # a torn block: the picture stands as it is stored
        return 0
    return value if value in range(1, 9) else 0


# --------------------------------------------------------------------------- PNG and WebP


def torn(data: bytes) -> str | None:
    """The fault of a PNG or WebP that claims more than it holds: decoders make room for it."""
    png = data.startswith(b"\x89PNG")
    end = len(data) if png else 8 + int.from_bytes(data[4:8], "little")
    at = 8 if png else 12
    while at + 8 <= end <= len(data):
        if png:
            at += 12 + int.from_bytes(data[at : at + 4], "big")
            if data[at - 8 : at - 4] == b"IEND":
                return None
        else:
            length = int.from_bytes(data[at + 4 : at + 8], "little")
            at += 8 + length + length % 2
    claimed = max(at, end)
    return "truncated: its last chunk ends after the file" if claimed > len(data) + 1 else None


def is_special(data: bytes) -> bool:
    """Whether a PNG makes one of its colours transparent, or moves: of a damaged one that moves
    nvImageCodec shows memory that nothing was written to.
    """
    head = data[: data.find(b"IDAT")] if data.startswith(b"\x89PNG") else b""
    return b"tRNS" in head or b"acTL" in head
