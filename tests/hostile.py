"""Broken image files as in real archives: truncated, mislabelled, contradictory, or too large.

`hostile` generates several hundred files, the same ones for the same photos and seed, each with its
expected outcome; some are unusual but valid. `on_disk` creates files that cannot be read and names
that must be escaped before they are shown. `mutants` yields randomly damaged photos.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.random import Generator
from PIL import Image

Outcome = frozenset[str] | Literal["either"] | None


class Case(NamedTuple):
    """A file and its expected outcome.

    The outcome is a set of permitted fault kinds, None if the file must decode, or "either" if it
    may decode or be a fault, as long as it is the same every time.
    """

    data: bytes
    outcome: Outcome


Cases = Iterator[tuple[str, bytes, Outcome]]

KINDS = frozenset({"empty", "not an image", "truncated", "corrupt", "unsupported", "too large"})
WELL = None
EITHER: Outcome = "either"
NO_IMAGE = frozenset({"not an image"})
TRUNCATED = frozenset({"truncated"})
CORRUPT = frozenset({"corrupt"})
BROKEN = frozenset({"truncated", "corrupt"})
UNSUPPORTED = frozenset({"unsupported"})
TOO_LARGE = frozenset({"too large"})
REFUSED = frozenset({"unsupported", "corrupt", "truncated"})
OUTSIZED = REFUSED | TOO_LARGE


def hostile(photos: Sequence[bytes], seed: int = 0) -> dict[str, Case]:
    """Generate several hundred cases by name from the first four of these JPEGs."""
    rng = np.random.default_rng(seed)
    images = [Image.open(io.BytesIO(photo)).convert("RGB") for photo in photos[:4]]
    plain = [encoded(image, "JPEG", quality=80) for image in images]
    result: dict[str, Case] = {}
    for family in (
        _no_images(rng),
        _cut_jpegs(images),
        _cut_others(images[0]),
        _signatures(rng),
        _lengths(plain[0]),
        _tables(plain[0]),
        _frames(plain[0]),
        _scans(images[0], plain[0]),
        _exifs(plain[0]),
        _entropy(images, rng),
        _unusual_but_valid(images[0], plain[0], rng),
        _false_sizes(plain[0]),
        _pngs(images[0]),
        _tiffs(),
        _gifs(images[0]),
        _webps(images[0]),
        _bmps(images[0]),
        _other_kinds(images[0]),
        _thin_images(),
    ):
        for name, data, outcome in family:
            assert name not in result, name
            result[name] = Case(data, outcome)
    return result


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """Encode the image in this format of Pillow."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# ------------------------------------------------------------------------------- no images


def _no_images(rng: Generator) -> Cases:
    page = b"<!DOCTYPE html><html><head><title>404</title></head><body>Not Found</body></html>\n"
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr(zipfile.ZipInfo("cat.txt"), "not a cat" * 99)
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9"/></svg>'
    yield "empty", b"", frozenset({"empty"})
    for name, data in {
        "a zero byte": b"\0",
        "one byte of a JPEG": b"\xff",
        "two bytes of a JPEG": b"\xff\xd8",
        "a start and an end": b"\xff\xd8\xff\xd9",
        "a web page": page * 30,
        "a web page in UTF-16": page.decode().encode("utf-16"),
        "text": b"This was a photo once.\n" * 200,
        "one line feed": b"\n",
        "terminal escapes": b"\x1b[2J\x1b]0;title\x07\x1b[31m" * 9,
        "a zip": zipped.getvalue(),
        "a PDF": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj <</Type /Catalog>> endobj\n%%EOF\n" * 9,
        "JSON": b'{"error": "forbidden"}',
        "a script": b"#!/bin/sh\nrm -r photos\n",
        "an ELF header": b"\x7fELF\x02\x01\x01" + bytes(57),
        "a pickle": b"\x80\x04\x95" + bytes(20) + b".",
        "4 kB of zeros": bytes(4096),
        "4 kB of FF": b"\xff" * 4096,
        "4 kB of noise": b"\0" + rng.bytes(4095),
        "a PostScript file": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "a Mac resource fork": b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(60),
        "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64,
        "base64 of a JPEG": b"data:image/jpeg;base64,/9j/4AAQSkZJRgABAQ",
    }.items():
        yield name, data, NO_IMAGE | TRUNCATED | CORRUPT if data.startswith(b"\xff") else NO_IMAGE
    yield "an SVG", svg, UNSUPPORTED
    yield "an XML prologue and an SVG", b'<?xml version="1.0"?>\n' + svg, UNSUPPORTED


def _signatures(rng: Generator) -> Cases:
    """The first bytes of every format, followed by nothing, zeros or noise."""
    for name, start in {
        "JPEG": b"\xff\xd8\xff",
        "JFIF": b"\xff\xd8\xff\xe0\0\x10JFIF\0",
        "JPEG with EXIF": b"\xff\xd8\xff\xe1\0\x20Exif\0\0",
        "PNG": b"\x89PNG\r\n\x1a\n",
        "PNG's IHDR": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        "GIF": b"GIF89a",
        "WebP": b"RIFF\x40\0\0\0WEBP",
        "WebP lossy": b"RIFF\x40\0\0\0WEBPVP8 ",
        "WebP lossless": b"RIFF\x40\0\0\0WEBPVP8L",
        "WebP extended": b"RIFF\x40\0\0\0WEBPVP8X",
        "RIFF but sound": b"RIFF\x24\0\0\0WAVEfmt ",
        "BMP": b"BM",
        "TIFF little": b"II*\0",
        "TIFF big": b"MM\0*",
        "BigTIFF": b"II+\0\x08\0\0\0",
        "AVIF": b"\0\0\0\x1cftypavif\0\0\0\0",
        "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0",
        "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n",
        "JPEG 2000 codestream": b"\xff\x4f\xff\x51",
        "JPEG XL": b"\xff\x0a",
        "ICO": b"\0\0\1\0\1\0",
        "PNM": b"P6\n",
        "PSD": b"8BPS\0\1",
    }.items():
        yield f"the signature of {name}, and nothing", start, KINDS
        yield f"the signature of {name}, and zeros", start + bytes(500), KINDS
        for number in range(2):
            outcome = EITHER if name in ("BMP", "PNM") else KINDS
            yield f"the signature of {name}, and noise {number}", start + rng.bytes(3000), outcome


def _other_kinds(image: Image.Image) -> Cases:
    small = image.resize((48, 40))
    yield "AVIF", encoded(small, "AVIF"), WELL
    yield "animated AVIF", animated(small, "AVIF"), WELL
    yield "ICO", encoded(small.resize((32, 32)), "ICO"), NO_IMAGE | UNSUPPORTED
    # No browser shows these, and their decoders are fragile: a flipped bit crashes OpenJPEG.
    foreign = NO_IMAGE | UNSUPPORTED
    yield "JPEG 2000", encoded(small, "JPEG2000"), foreign
    waves = encoded(small, "JPEG2000")
    tile = waves.find(b"\xff\x51") + 22  # in its segment SIZ; nvImageCodec divides by it
    yield "JPEG 2000 of tiles of 0", _patch(waves, tile, bytes(8)), foreign
    yield "PPM", encoded(small, "PPM"), foreign
    yield "PPM with fewer pixels than it says", b"P6\n64 64\n255\n" + bytes(900), foreign
    yield "PPM claiming 30000 x 30000", b"P6\n30000 30000\n255\n" + bytes(900), foreign
    yield "text PPM of a word", b"P3\n9 9\n255\nnine " + b"1 " * 300, foreign
    yield "MPO", animated(small, "MPO"), WELL
    yield "MPO cut in its second picture", animated(small, "MPO")[:-200], WELL
    brand = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0\0\0\x40meta" + bytes(56)
    yield "HEIC", brand + bytes(2000), NO_IMAGE | UNSUPPORTED
    yield "a film", b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(900), NO_IMAGE | UNSUPPORTED


def animated(image: Image.Image, kind: str) -> bytes:
    """An animation of the image and two rotated copies."""
    others = [image.rotate(turn) for turn in (90, 180)]
    film = bytearray(encoded(image, kind, save_all=True, append_images=others))
    for box in (b"mvhd", b"tkhd", b"mdhd") if kind == "AVIF" else ():
        dates = (
            film.find(box) + 8
        )  # creation time; zeroed, so that the corpus is the same every day
        film[dates : dates + 16] = bytes(16)
    return bytes(film)


# ------------------------------------------------------------------------------ cut short


def _cut_jpegs(images: Sequence[Image.Image]) -> Cases:
    exif = Image.Exif()
    exif[0x010E] = "described " * 20
    kinds = {
        "JPEG": encoded(images[0], "JPEG", exif=exif),
        "big JPEG": encoded(images[1].resize((900, 700)), "JPEG", quality=90),
        "progressive JPEG": encoded(images[2], "JPEG", progressive=True),
        "JPEG with restarts": encoded(images[3], "JPEG", restart_marker_rows=1),
        "grey JPEG": encoded(images[0].convert("L"), "JPEG"),
    }
    for kind, data in kinds.items():
        scan = _find_segment(data, 0xDA)
        tables = _find_segment(data, 0xC4)
        for name, at in {
            "after its third byte": 3,
            "in its first segment": 15,
            "in a quantisation table": _find_segment(data, 0xDB) + 20,
            "between two segments": tables,
            "in the length of a segment": tables + 3,
            "in a Huffman table": tables + 12,
            "before its first scan": scan,
            "in the header of its scan": scan + 6,
        }.items():
            yield f"{kind} cut {name}", data[:at], TRUNCATED
        for share in (0.02, 0.3, 0.5, 0.9):
            at = scan + 14 + int(share * (len(data) - scan - 14))
            yield f"{kind} cut at {share:.0%} of its scans", data[:at], TRUNCATED
            zeros = bytes(len(data) - at)
            yield f"{kind} cut at {share:.0%}, then zeros", data[:at] + zeros, BROKEN
        yield f"{kind} without its last 40 bytes", data[:-40], TRUNCATED
        yield f"{kind} without its last byte", data[:-1], EITHER
        yield f"{kind} without its end marker", data[:-2], EITHER
        yield f"{kind} cut at half its scans, then ended", _truncate_and_end(data, 0.5), BROKEN


def _truncate_and_end(data: bytes, share: float) -> bytes:
    scan = _find_segment(data, 0xDA)
    return data[: scan + int(share * (len(data) - scan))].rstrip(b"\xff") + b"\xff\xd9"


def _cut_others(image: Image.Image) -> Cases:
    small = image.resize((96, 80))
    for name, data in {
        "PNG": encoded(small, "PNG"),
        "PNG with alpha": encoded(small.convert("RGBA"), "PNG"),
        "interlaced PNG": interlaced(small),
        "WebP": encoded(small, "WEBP"),
        "lossless WebP": encoded(small, "WEBP", lossless=True),
        "animated WebP": animated(small, "WEBP"),
        "BMP": encoded(small, "BMP"),
        "TIFF": encoded(small, "TIFF"),
        "LZW TIFF": encoded(small, "TIFF", compression="tiff_lzw"),
        "deflated TIFF": encoded(small, "TIFF", compression="tiff_adobe_deflate"),
        "JPEG TIFF": encoded(small, "TIFF", compression="jpeg"),
        "GIF": encoded(small, "GIF"),
        "AVIF": encoded(small, "AVIF"),
    }.items():
        for share in (0.05, 0.3, 0.6, 0.9):
            yield f"{name} cut at {share:.0%}", data[: int(share * len(data))], KINDS - {"empty"}
        yield f"{name} cut after 20 bytes", data[:20], KINDS - {"empty"}
        yield f"{name} without its last byte", data[:-1], EITHER
        yield f"{name} with a tail", data + b"\0tail" * 50, EITHER if "TIFF" in name else WELL


# ------------------------------------------------------------------------- JPEG segments


def segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, start, end) of every segment up to and including the first scan's header."""
    at = 2
    while True:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        yield data[at + 1], at, end
        if data[at + 1] == 0xDA:
            return
        at = end


def _find_segment(data: bytes, marker: int) -> int:
    return next(start for this_marker, start, _ in segments(data) if this_marker == marker)


def segment(marker: int, payload: bytes) -> bytes:
    """A JPEG segment."""
    return struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload


def after_start(data: bytes, *added: bytes) -> bytes:
    """Insert segments before those of a JPEG."""
    return data[:2] + b"".join(added) + data[2:]


def _patch(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def _lengths(photo: bytes) -> Cases:
    for number, (marker, start, end) in enumerate(segments(photo)):
        true = end - start - 2
        name = f"segment {number} ({marker:02X})"
        for length in (0, 1):
            wrong = _patch(photo, start + 2, struct.pack(">H", length))
            yield f"{name} says it is {length} long", wrong, REFUSED
        for length in (2, true - 1, true + 1, true + 40, 0x7FFF, 0xFFFF):
            # The skipped bytes may be unnecessary, so a decoder may succeed.
            outcome = EITHER if marker in (0xE0, 0xDA) and length < true + 2 else REFUSED
            wrong = _patch(photo, start + 2, struct.pack(">H", length))
            yield f"{name} says it is {length} long, not {true}", wrong, outcome
    for marker in (0xE1, 0xE2, 0xEE, 0xFE):
        wrong = after_start(photo, struct.pack(">BBH", 0xFF, marker, 0xFFF0))
        yield f"an added segment {marker:02X} swallows the header", wrong, BROKEN
        yield (
            f"an added segment {marker:02X} of no length",
            after_start(photo, segment(marker, b"")),
            WELL,
        )


def _remove_segment(data: bytes, marker: int, which: int = 0) -> bytes:
    _, start, end = [item for item in segments(data) if item[0] == marker][which]
    return data[:start] + data[end:]


def _tables(photo: bytes) -> Cases:
    result = [item for item in segments(photo) if item[0] == 0xC4]
    for number, (_, start, end) in enumerate(result):
        counts, symbols = start + 5, start + 21
        name = f"Huffman table {number}"
        # libjpeg-turbo falls back on the standard's default tables, as for Motion JPEG.
        yield f"{name} missing", _remove_segment(photo, 0xC4, number), EITHER
        yield f"{name} with 255 codes of one bit", _patch(photo, counts, b"\xff"), BROKEN
        yield f"{name} with more codes than bits", _patch(photo, counts, b"\x03"), BROKEN
        yield f"{name} with no codes", _patch(photo, counts, bytes(16)), BROKEN
        zeroed = _patch(photo, symbols, bytes(end - symbols))
        yield f"{name} with symbols of nothing", zeroed, EITHER
        full = _patch(photo, symbols, b"\xff" * (end - symbols))
        yield f"{name} with symbols of FF", full, EITHER if number % 2 else BROKEN
        swapped = photo[symbols:end][::-1]
        yield f"{name} with its symbols reversed", _patch(photo, symbols, swapped), EITHER
        yield f"{name} of class 7", _patch(photo, start + 4, b"\x70"), BROKEN
        yield f"{name} in slot 9", _patch(photo, start + 4, b"\x09"), BROKEN
    start = _find_segment(photo, 0xDB)
    yield "a quantisation table missing", _remove_segment(photo, 0xDB), BROKEN
    yield "a quantisation table in slot 9", _patch(photo, start + 4, b"\x09"), BROKEN
    yield "a quantisation table of 64-bit values", _patch(photo, start + 4, b"\x30"), EITHER
    yield "a quantisation table of zeros", _patch(photo, start + 5, bytes(64)), EITHER
    yield "no tables at all", photo[:2] + photo[_find_segment(photo, 0xC0) :], BROKEN


def _frames(photo: bytes) -> Cases:
    start = _find_segment(photo, 0xC0)
    for marker in (0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF):
        yield f"frame {marker:02X}", _patch(photo, start + 1, bytes([marker])), UNSUPPORTED
    yield "frame C1, whose baseline is legal", _patch(photo, start + 1, b"\xc1"), WELL
    yield "frame C2, though it is not progressive", _patch(photo, start + 1, b"\xc2"), EITHER
    yield "frame C8, which is reserved", _patch(photo, start + 1, b"\xc8"), REFUSED
    yield "a JPEG of 12 bits", _twelve_bits(), UNSUPPORTED
    yield "a lossless JPEG", _lossless(), UNSUPPORTED
    for bits in (0, 1, 7, 9, 12, 16, 255):
        wrong = _patch(photo, start + 4, bytes([bits]))
        yield f"a frame of {bits} bits", wrong, UNSUPPORTED | CORRUPT
    for name, height, width, outcome in (
        ("no height", 0, 64, REFUSED),
        ("no width", 64, 0, REFUSED),
        ("no size", 0, 0, REFUSED),
        ("65535 x 65535", 65535, 65535, TOO_LARGE),
        ("30000 x 30000", 30000, 30000, TOO_LARGE),
        ("65500 x 65500", 65500, 65500, TOO_LARGE),
        ("65535 x 9", 9, 65535, OUTSIZED),
        ("9 x 65535", 65535, 9, OUTSIZED),
        ("1 x 1", 1, 1, EITHER),
    ):
        wrong = _patch(photo, start + 5, struct.pack(">HH", height, width))
        yield f"a frame of {name}", wrong, outcome
    for count in (0, 1, 2, 4, 255):
        yield f"a frame of {count} parts", _patch(photo, start + 9, bytes([count])), REFUSED
    for factors in (0x00, 0x01, 0x55, 0xFF):
        wrong = _patch(photo, start + 11, bytes([factors]))
        yield f"sampling factors {factors:02X}", wrong, REFUSED
    for factors in (0x31, 0x13, 0x44, 0x24):
        wrong = _patch(photo, start + 11, bytes([factors]))
        yield f"sampling factors {factors:02X}", wrong, EITHER
    yield "a part without its table", _patch(photo, start + 12, b"\3"), BROKEN
    yield (
        "two parts of one name",
        _patch(photo, start + 13, photo[start + 10 : start + 11]),
        EITHER,
    )
    frame = photo[start : start + 19]
    for name, size in (("same", None), ("larger", (2000, 2000)), ("smaller", (8, 8))):
        other = _patch(frame, 5, struct.pack(">HH", *size)) if size else frame
        yield f"a second frame, {name}", photo[:start] + frame + other + photo[start + 19 :], EITHER
        yield f"a first frame, {name}", photo[:start] + other + photo[start:], EITHER
    yield "no frame", _remove_segment(photo, 0xC0), REFUSED
    yield (
        "its frame after its scan",
        _remove_segment(photo, 0xC0)[:-2] + frame + b"\xff\xd9",
        REFUSED,
    )


def _pack_bits(*codes: str) -> bytes:
    """Entropy-coded data: padded with ones, a zero byte after each FF."""
    text = "".join(codes)
    text += "1" * (-len(text) % 8)
    packed = bytes(int(text[at : at + 8], 2) for at in range(0, len(text), 8))
    return packed.replace(b"\xff", b"\xff\0")


def _table(slot: int, lengths: Sequence[int], symbols: bytes) -> bytes:
    return segment(0xC4, bytes([slot, *lengths, *bytes(16 - len(lengths))]) + symbols)


def _twelve_bits() -> bytes:
    """A valid 12-bit JPEG (extended, Huffman): 16 x 16, four equal light blocks."""
    blocks = ["01", format(800, "010b"), "0", *["00", "0"] * 3]
    return b"".join(
        (
            b"\xff\xd8",
            segment(0xDB, b"\0" + b"\x10" * 64),
            segment(0xC1, struct.pack(">BHHBBBB", 12, 16, 16, 1, 1, 0x11, 0)),
            _table(0x00, (0, 2), b"\0\x0a"),
            _table(0x10, (1,), b"\0"),
            segment(0xDA, b"\1\1\0\0\x3f\0"),
            _pack_bits(*blocks),
            b"\xff\xd9",
        )
    )


def _lossless() -> bytes:
    """A valid lossless JPEG: 16 x 16 of one grey, every difference 0."""
    return b"".join(
        (
            b"\xff\xd8",
            segment(0xC3, struct.pack(">BHHBBBB", 8, 16, 16, 1, 1, 0x11, 0)),
            _table(0x00, (1,), b"\0"),
            segment(0xDA, b"\1\1\0\1\0\0"),
            _pack_bits("0" * 256),
            b"\xff\xd9",
        )
    )


def _scans(image: Image.Image, photo: bytes) -> Cases:
    start = _find_segment(photo, 0xDA)
    yield "a scan of no parts", _patch(photo, start + 4, b"\0"), BROKEN
    yield "a scan of 9 parts", _patch(photo, start + 4, b"\x09"), BROKEN
    yield "a scan of an unknown part", _patch(photo, start + 5, b"\x77"), BROKEN
    yield "a scan with tables 9", _patch(photo, start + 6, b"\x99"), BROKEN
    yield "a scan from 9 to 3", _patch(photo, start + 11, b"\x09\x03"), EITHER
    yield "a scan without data", photo[: start + 14] + b"\xff\xd9", BROKEN
    yield "no scan", photo[:start] + b"\xff\xd9", BROKEN
    yield "two scans of the same", photo[:-2] + photo[start:], EITHER
    yield "an end before the end", _patch(photo, start + 600, b"\xff\xd9"), BROKEN
    yield "a start in the middle", _patch(photo, start + 600, b"\xff\xd8"), EITHER
    yield "a JPEG in its own scan", photo[: start + 600] + photo, EITHER
    yield "an unknown marker in the scan", _patch(photo, start + 600, b"\xff\x02"), EITHER
    progressive = encoded(image, "JPEG", progressive=True)
    first, last = progressive.find(b"\xff\xda"), progressive.rfind(b"\xff\xda")
    scan = progressive[last:-2]
    yield "a progressive JPEG of 1500 scans", progressive[:-2] + scan * 1500, TOO_LARGE
    yield (
        "a progressive JPEG of 101 scans",
        (progressive[:-2] + scan * (101 - progressive.count(b"\xff\xda")) + b"\xff\xd9"),
        TOO_LARGE,
    )
    yield (
        "a progressive JPEG of 99 scans",
        (progressive[:-2] + scan * (99 - progressive.count(b"\xff\xda")) + b"\xff\xd9"),
        EITHER,
    )
    hidden = segment(0xFE, b"\xff\xd9") + scan
    yield "1500 scans, false ends between them", progressive[:-2] + hidden * 1500, TOO_LARGE
    yield "1500 scans behind fill bytes", progressive[:-2] + (b"\xff" + scan) * 1500, TOO_LARGE
    # libjpeg reports the first damage only: the extra bytes, not the truncated scan.
    tables = progressive.find(b"\xff\xc4", first)
    later = progressive.find(b"\xff\xda", progressive.find(b"\xff\xda", tables) + 2)
    behind = progressive.find(b"\xff\xc4", later)
    truncated = progressive[tables : later + 20] + progressive[behind:]
    yield "bytes too many, then a torn scan", progressive[:tables] + bytes(150) + truncated, BROKEN
    yield "a torn scan among others", progressive[:tables] + truncated, BROKEN
    yield (
        "a progressive JPEG without its first scan",
        (progressive[:first] + progressive[progressive.find(b"\xff\xda", first + 2) :]),
        EITHER,
    )
    yield (
        "a progressive JPEG of one scan",
        (progressive[: progressive.find(b"\xff\xc4", first)] + b"\xff\xd9"),
        EITHER,
    )


# ---------------------------------------------------------------------------------- EXIF


def _exif(orientation: int, order: str = ">") -> bytes:
    start = b"MM\0*" if order == ">" else b"II*\0"
    entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"Exif\0\0" + start + struct.pack(order + "IH", 8, 1) + entry + bytes(4)


def _exifs(photo: bytes) -> Cases:
    def with_exif(*blocks: bytes) -> bytes:
        return after_start(photo, *(segment(0xE1, block) for block in blocks))

    yield "two EXIF segments that contradict one another", with_exif(_exif(6), _exif(8)), CORRUPT
    yield "three EXIF segments, the last apart", with_exif(_exif(1), _exif(1), _exif(3)), CORRUPT
    yield "EXIF 6 and then 1", with_exif(_exif(6), _exif(1)), CORRUPT
    yield "two EXIF segments that agree", with_exif(_exif(6), _exif(6, "<")), WELL
    yield "an EXIF segment and a torn one", with_exif(_exif(6), b"Exif\0\0MM\0*"), WELL
    yield (
        "an EXIF segment and XMP",
        with_exif(_exif(3), b"http://ns.adobe.com/xap/1.0/\0<x/>"),
        WELL,
    )
    yield (
        "EXIF behind JFIF and a comment",
        photo[:20] + segment(0xFE, b"hello") + segment(0xE1, _exif(5)) + photo[20:],
        WELL,
    )
    for value in (0, 9, 255, 65535):
        yield f"EXIF orientation {value}", with_exif(_exif(value)), WELL
    for name, block in {
        "nothing": b"Exif\0\0",
        "half a head": b"Exif\0\0MM\0",
        "an offset past its end": b"Exif\0\0MM\0*\xff\xff\xff\xff",
        "an offset to itself": b"Exif\0\0MM\0*\0\0\0\0",
        "65535 tags and no more": b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
        "a loop": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\x08",
        "no byte order": b"Exif\0\0XX\0*\0\0\0\x08\0\0",
        "noise": b"Exif\0\0" + bytes(range(200)),
        "an orientation of 4 billion values": b"Exif\0\0MM\0*\0\0\0\x08\0\1"
        + struct.pack(">HHII", 0x0112, 3, 2**32 - 1, 8),
        "an orientation in words": b"Exif\0\0MM\0*\0\0\0\x08\0\1"
        + struct.pack(">HHI", 0x0112, 2, 4)
        + b"six\0"
        + bytes(4),
        "an orientation of nothing": b"Exif\0\0MM\0*\0\0\0\x08\0\1"
        + struct.pack(">HHII", 0x0112, 3, 0, 0),
        "an orientation of a kind unheard of": b"Exif\0\0MM\0*\0\0\0\x08\0\1"
        + struct.pack(">HHII", 0x0112, 99, 1, 6 << 16),
        "a rational divided by nothing": b"Exif\0\0MM\0*\0\0\0\x08\0\1"
        + struct.pack(">HHII", 0x0112, 5, 1, 26)
        + bytes(12),
        "a floating-point orientation": b"Exif\0\0MM\0*\0\0\0\x08\0\1"
        + struct.pack(">HHIf", 0x0112, 11, 1, 6.0),
    }.items():
        yield f"EXIF of {name}", with_exif(block), WELL
    huge = _exif(1) + bytes(65000)
    yield "thirty EXIF segments of 64 kB", with_exif(*[huge] * 30), WELL
    thumb = encoded(Image.new("RGB", (16, 16)), "JPEG")
    yield "EXIF with a picture in it", with_exif(_exif(1) + thumb), WELL


# -------------------------------------------------------------------- damage in the pixels


def _entropy(images: Sequence[Image.Image], rng: Generator) -> Cases:
    for number, image in enumerate(images):
        photo = encoded(image.resize((400, 320)), "JPEG", quality=92)
        scan = _find_segment(photo, 0xDA) + 14
        for tries in range(3):
            at = int(rng.integers(scan, len(photo) - 1100))
            yield f"photo {number} with zeros {tries}", _patch(photo, at, bytes(1024)), EITHER
            yield f"photo {number} with FF {tries}", _patch(photo, at, b"\xff" * 512), EITHER
            flipped = bytes([photo[at] ^ 1 << int(rng.integers(8))])
            yield f"photo {number} with a bit flipped {tries}", _patch(photo, at, flipped), EITHER
            noise = _patch(photo, at, rng.bytes(1024))
            yield f"photo {number} with noise {tries}", noise, EITHER
            other = int(rng.integers(scan, len(photo) - 1100))
            swapped = _patch(photo, at, photo[other : other + 1024])
            yield f"photo {number} with a piece of itself {tries}", swapped, EITHER
            yield f"photo {number} without a page {tries}", photo[:at] + photo[at + 1024 :], EITHER
        restarts = encoded(image, "JPEG", restart_marker_rows=1)
        first = restarts.find(b"\xff\xd0", _find_segment(restarts, 0xDA))
        yield (
            f"photo {number} with a restart out of turn",
            _patch(restarts, first, b"\xff\xd5"),
            EITHER,
        )
        yield f"photo {number} without a restart", restarts[:first] + restarts[first + 2 :], EITHER


# ---------------------------------------------------------------------------- odd but well


def _unusual_but_valid(image: Image.Image, photo: bytes, rng: Generator) -> Cases:
    filled = photo
    for _, start, _ in reversed(list(segments(photo))):
        filled = filled[:start] + b"\xff\xff\xff" + filled[start:]
    yield "fill bytes before every marker", filled, WELL
    yield "fill bytes before the end", photo[:-2] + b"\xff\xff\xff\xff" + photo[-1:], WELL
    for name, tail in {
        "a byte": b"x",
        "zeros": bytes(5000),
        "noise": rng.bytes(20_000),
        "a film": b"\0\0\0\x18ftypmp42" + rng.bytes(200_000),
        "two hundred scans' worth of markers": b"\xff\xda\0\x08" * 200,
        "another JPEG": photo,
        "a zip": b"PK\x03\x04" + rng.bytes(300),
        "a second end": b"\xff\xd9",
    }.items():
        yield f"{name} after the end", photo + tail, WELL
    wide = image.resize((320, 256))
    for sampling in ("4:4:4", "4:2:2", "4:2:0"):
        yield f"sampling {sampling}", encoded(wide, "JPEG", subsampling=sampling), WELL
        yield (
            f"progressive, sampling {sampling}",
            encoded(wide, "JPEG", subsampling=sampling, progressive=True),
            WELL,
        )
    yield "sampling 4:4:0", resampled(wide, "4:2:2", 0x12), WELL
    yield "sampling 4:1:1", resampled(wide, "4:2:0", 0x41), WELL
    for options in (
        {"restart_marker_blocks": 1},
        {"restart_marker_blocks": 7, "progressive": True},
        {"restart_marker_rows": 1, "optimize": True},
        {"quality": 1},
        {"quality": 100},
        {"keep_rgb": True},
        {"comment": b"so it goes \xff\xd9\xff\xda\x1b[31m\n" * 300},
        {"icc_profile": bytes(200_000)},
    ):
        name = ", ".join(f"{key} {value}"[:30] for key, value in options.items())
        yield f"a JPEG saved with {name}", encoded(image, "JPEG", **options), WELL
    yield "a grey JPEG", encoded(image.convert("L"), "JPEG"), WELL
    yield "a CMYK JPEG", encoded(image.convert("CMYK"), "JPEG"), WELL
    yield "a YCCK JPEG", ycck(image), WELL
    yield "a quantisation table of 16 bits", wide_table(photo), WELL
    yield "tables in one segment", _join_huffman_tables(photo), WELL
    yield (
        "every APP segment",
        after_start(photo, *(segment(marker, rng.bytes(99)) for marker in range(0xE2, 0xEE))),
        WELL,
    )
    yield "a thousand comments", after_start(photo, *[segment(0xFE, b"so it goes")] * 1000), WELL
    yield "a JPEG without JFIF", _remove_segment(photo, 0xE0), WELL


def resampled(image: Image.Image, sampling: str, factors: int) -> bytes:
    """A valid JPEG with other subsampling factors.

    It has as many blocks per unit in another order, so the picture is scrambled.
    """
    photo = encoded(image, "JPEG", subsampling=sampling)
    return _patch(photo, _find_segment(photo, 0xC0) + 11, bytes([factors]))


def ycck(image: Image.Image) -> bytes:
    """The image as a YCCK JPEG: Pillow's CMYK with YCCK in the Adobe segment."""
    key = Image.new("L", image.size, 255)  # stored inverted: no black
    y, cb, cr = image.convert("YCbCr").split()
    stored = [Image.eval(part, lambda value: 255 - value) for part in (y, cb, cr, key)]
    photo = encoded(Image.merge("CMYK", stored), "JPEG", quality=90)
    return _patch(photo, _find_segment(photo, 0xEE) + 15, b"\2")


def wide_table(photo: bytes) -> bytes:
    """The same JPEG with its first quantisation table in 16 bits, which frame type C1 allows."""
    start = _find_segment(photo, 0xDB)
    values = photo[start + 5 : start + 69]
    table = b"\x10" + b"".join(struct.pack(">H", value) for value in values)
    wide = photo[:start] + segment(0xDB, table) + photo[start + 69 :]
    return _patch(wide, _find_segment(wide, 0xC0) + 1, b"\xc1")


def _join_huffman_tables(photo: bytes) -> bytes:
    """The same JPEG with all Huffman tables in one segment."""
    result = [(start, end) for marker, start, end in segments(photo) if marker == 0xC4]
    full = segment(0xC4, b"".join(photo[start + 4 : end] for start, end in result))
    return photo[: result[0][0]] + full + photo[result[-1][1] :]


# --------------------------------------------------------------------------------- claims


def _false_sizes(photo: bytes) -> Cases:
    """Headers that claim far more pixels than the file holds."""
    side = 30_000
    progressive = encoded(Image.open(io.BytesIO(photo)), "JPEG", progressive=True)
    at = _find_segment(progressive, 0xC2) + 5
    claimed = _patch(progressive, at, struct.pack(">HH", side, side))
    yield "a progressive JPEG claiming 30000 x 30000", claimed, TOO_LARGE
    for name, width, height in (
        ("30000 x 30000", side, side),
        ("20000 x 5001", 20_000, 5001),
        ("2147483647 x 2147483647", 2**31 - 1, 2**31 - 1),
        ("1 x 2147483647", 1, 2**31 - 1),
    ):
        yield f"PNG claiming {name}", png(width, height), OUTSIZED
        yield f"grey PNG with alpha claiming {name}", png(width, height, colour=4), OUTSIZED
    yield "BMP claiming 30000 x 30000", _bmp(side, side), TOO_LARGE
    yield "BMP claiming 2147483647 lines", _bmp(9, 2**31 - 1), OUTSIZED
    yield "GIF claiming 30000 x 30000", _gif(side, side), TOO_LARGE
    yield "GIF claiming 65535 x 65535", _gif(65535, 65535), TOO_LARGE
    yield "TIFF claiming 30000 x 30000", _tiff({256: side, 257: side}), TOO_LARGE
    yield "TIFF claiming 4294967295 x 1", _tiff({256: 2**32 - 1, 257: 1}), OUTSIZED
    canvas = struct.pack("<I", side - 1)[:3] * 2
    yield "WebP claiming 30000 x 30000", _riff(b"VP8X", bytes(4) + canvas), OUTSIZED
    largest = struct.pack("<I", 2**24 - 1)[:3] * 2
    yield "WebP claiming 16777216 x 16777216", _riff(b"VP8X", bytes(4) + largest), OUTSIZED
    lossless = b"\x2f" + struct.pack("<I", 16383 | 16383 << 14)
    yield "lossless WebP claiming 16384 x 16384", _riff(b"VP8L", lossless + bytes(9)), OUTSIZED
    flat = zlib.compress(bytes(10_001 * 10_000), 9)
    grey = zlib.compress(bytes(5001 * 4000))
    yield "a PNG of 20 million pixels in 20 kB", png(5000, 4000, colour=0, data=grey), WELL
    tall = png(10_000, 10_001, colour=0, data=flat)
    yield "a PNG of one line too many in 100 kB", tall, TOO_LARGE
    yield "a PNG inflating to 100 MB for 9 pixels", png(9, 1, data=flat), EITHER
    text = b"Comment\0\0" + zlib.compress(bytes(50_000_000), 9)
    yield "a PNG with 50 MB of text in 50 kB", png(9, 9, before=chunk(b"zTXt", text)), EITHER
    profile = b"profile\0\0" + zlib.compress(bytes(50_000_000), 9)
    yield "a PNG with a profile of 50 MB", png(9, 9, before=chunk(b"iCCP", profile)), EITHER


def chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG chunk."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by PNG's colour type


def png(
    width: int,
    height: int,
    *,
    depth: int = 8,
    colour: int = 2,
    interlaced: int = 0,
    before: bytes = b"",
    pixels: bytes | None = None,
    data: bytes | None = None,
) -> bytes:
    """Build a PNG, by default black, 8 bits and RGB.

    Args:
        width: in the header.
        height: in the header.
        depth: bits per channel.
        colour: PNG's colour type.
        interlaced: PNG's interlace method.
        before: chunks between the header and the pixels.
        pixels: filtered lines, to be deflated.
        data: filtered and deflated lines.
    """
    if data is None:
        line = 1 + -(-width * CHANNELS.get(colour, 1) * depth // 8)
        data = zlib.compress(
            bytes(line * height if line * height < 10**6 else 99) if pixels is None else pixels
        )
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    body = chunk(b"IHDR", head) + before + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def interlaced(image: Image.Image) -> bytes:
    """An RGB image as an interlaced PNG (Adam7), which Pillow reads but does not write."""
    pixels_HWC = np.asarray(image)
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2))
    lines = b""
    for left, top, across, down in (*passes, (0, 1, 1, 2)):
        lines += b"".join(b"\0" + line.tobytes() for line in pixels_HWC[top::down, left::across])
    return png(*image.size, interlaced=1, pixels=lines)


def _pngs(image: Image.Image) -> Cases:
    photo = encoded(image.resize((96, 80)), "PNG")
    data = photo.find(b"IDAT")
    yield "PNG with a broken checksum of its pixels", _patch(photo, data + 400, b"\0\0\0"), EITHER
    length = int.from_bytes(photo[data - 4 : data], "big")
    crc = data + 4 + length
    yield "PNG with a wrong checksum", _patch(photo, crc, b"\0\0\0\0"), EITHER
    head = photo.find(b"IHDR")
    yield "PNG with a wrong checksum of its header", _patch(photo, head + 17, b"\0\0\0\0"), EITHER
    yield "PNG of broken deflate", png(40, 40, data=b"\x78\x9c" + b"\xff" * 300), BROKEN
    yield "PNG of no deflate", png(40, 40, data=b"nothing deflated at all"), BROKEN
    yield "PNG without pixels", png(40, 40, data=b""), BROKEN
    yield "PNG of too few lines", png(40, 40, pixels=bytes(121 * 9)), BROKEN
    yield "PNG of too many lines", png(40, 40, pixels=bytes(121 * 99)), EITHER
    yield "PNG of unknown filters", png(40, 40, pixels=b"\x09" * 121 * 40), BROKEN
    yield "PNG without its end", photo[:-12], EITHER
    yield "PNG without IDAT", photo[: data - 4] + chunk(b"IEND", b""), BROKEN
    yield (
        "PNG with two headers",
        (
            photo[:33]
            + chunk(b"IHDR", struct.pack(">IIBBBBB", 900, 900, 8, 2, 0, 0, 0))
            + photo[33:]
        ),
        EITHER,
    )
    for depth, colour in ((3, 2), (8, 5), (16, 3), (1, 6), (0, 0), (255, 255)):
        yield (
            f"PNG of depth {depth}, colour {colour}",
            png(9, 9, depth=depth, colour=colour),
            REFUSED,
        )
    yield "PNG of no size", png(0, 0), REFUSED
    yield "palette PNG without palette", png(9, 9, colour=3), REFUSED
    short = chunk(b"PLTE", b"\1\2\3")
    yield (
        "palette PNG of one colour, using more",
        (png(9, 9, colour=3, before=short, pixels=b"\0\1\2\3\4\5\6\7\x08\x09" * 9)),
        EITHER,
    )
    yield (
        "palette PNG with more alphas than colours",
        (png(9, 9, colour=3, before=short + chunk(b"tRNS", bytes(99)))),
        EITHER,
    )
    yield "PNG with a bad tRNS", png(9, 9, before=chunk(b"tRNS", b"\0")), EITHER
    yield "PNG with a critical chunk no one knows", png(9, 9, before=chunk(b"WHAT", b"?")), EITHER
    yield (
        "PNG with a chunk longer than itself",
        (photo[:33] + struct.pack(">I", 2**31 - 1) + b"tEXt" + photo[33:]),
        REFUSED,
    )
    longer = _patch(photo, data - 4, struct.pack(">I", 2**31 - 1))
    yield "PNG with pixels longer than itself", longer, EITHER
    clear = encoded(image.resize((96, 80)).convert("RGBA"), "PNG")
    for name, data in (("PNG", photo), ("PNG with alpha", clear)):
        for number, block in enumerate(
            (b"", b"MM\0*\xff\xff", b"XX\0*\0\0\0\x08", b"II*\0\0\0\0\0")
        ):
            truncated = data[:33] + chunk(b"eXIf", block) + data[33:]
            yield f"{name} and torn EXIF {number}", truncated, WELL
    film = animated(image.resize((60, 50)), "PNG")
    yield "APNG", film, WELL
    for number, share in enumerate((0.4, 0.6, 0.8)):
        # OpenCV returns uninitialized memory where the pixels of these do not inflate.
        start = film.find(b"IDAT")
        length = int.from_bytes(film[start - 4 : start], "big")
        truncated = _patch(film, start + int(share * length), bytes(40))
        yield f"APNG torn in its picture {number}", truncated, BROKEN
    many = chunk(b"tEXt", b"Comment\0" + b"x" * 99)
    yield "PNG with 2000 texts", photo[:33] + many * 2000 + photo[33:], WELL


def _tiff(
    tags: dict[int, int | tuple[int, ...]], pixels: bytes = bytes(2000), *, after: int = 0
) -> bytes:
    """A little-endian TIFF of one directory; every value has 32 bits, pixels start at byte 8."""
    defaults = {256: 20, 257: 20, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 20, 279: len(pixels)}
    entries, extra = b"", b""
    merged = sorted((defaults | tags).items())
    at = 8 + len(pixels)
    extra_start = at + 2 + 12 * len(merged) + 4
    for tag, value in merged:
        values = value if isinstance(value, tuple) else (value,)
        packed = struct.pack(f"<{len(values)}I", *values)
        if len(values) > 1:
            packed, extra = struct.pack("<I", extra_start + len(extra)), extra + packed
        entries += struct.pack("<HHI", tag, 4, len(values)) + packed
    directory = struct.pack("<H", len(merged)) + entries + struct.pack("<I", after)
    return b"II*\0" + struct.pack("<I", at) + pixels + directory + extra


def _tiffs() -> Cases:
    yield "TIFF", _tiff({}, bytes(400)), WELL
    yield "TIFF of no size", _tiff({256: 0, 257: 0}), REFUSED
    yield "TIFF whose pixels lie past its end", _tiff({273: 10**9}), REFUSED
    yield "TIFF whose pixels lie in its header", _tiff({273: 0}), EITHER
    yield "TIFF of too few bytes", _tiff({279: 9}, bytes(9)), REFUSED
    yield "TIFF of a byte count past its end", _tiff({279: 2**31}), EITHER
    yield "TIFF in a circle", _tiff({}, bytes(400), after=408), WELL
    yield "TIFF whose next page is nowhere", _tiff({}, bytes(400), after=2**32 - 1), WELL
    yield "TIFF whose directory is nowhere", b"II*\0\xff\xff\xff\x7f" + bytes(99), REFUSED
    yield "TIFF without tags", b"II*\0\x08\0\0\0\0\0" + bytes(9), REFUSED
    yield "TIFF of 65535 tags and no more", b"II*\0\x08\0\0\0\xff\xff" + bytes(200), REFUSED
    for code in (2, 3, 4, 5, 6, 7, 8, 34676, 34712, 34887, 50000, 50001, 65000):
        yield f"TIFF of compression {code}", _tiff({259: code}), EITHER
    for bits in (0, 1, 2, 4, 7, 16, 24, 32, 64, 65535):
        yield f"TIFF of {bits} bits", _tiff({258: bits}, bytes(20_000)), EITHER
    for parts in (0, 2, 5, 200, 65535):
        yield f"TIFF of {parts} parts per pixel", _tiff({277: parts}), EITHER
    yield "TIFF of floating point", _tiff({258: 32, 339: 3}), EITHER
    yield "TIFF of YCbCr and no more", _tiff({262: 6, 277: 3, 258: (8, 8, 8)}), EITHER
    yield "TIFF with a palette of nothing", _tiff({262: 3}), EITHER
    yield "TIFF of 4 billion lines a strip", _tiff({278: 2**32 - 1}, bytes(400)), WELL
    yield "TIFF of no lines a strip", _tiff({278: 0}), EITHER
    tiles = {322: 2**31, 323: 2**31, 324: 8, 325: 400}
    yield "TIFF of tiles of 2 billion", _tiff(tiles), EITHER
    yield "TIFF of tiles of 0", _tiff({322: 0, 323: 0, 324: 8, 325: 400}), EITHER
    planes = {277: 3, 284: 2, 258: (8, 8, 8), 262: 2, 273: (8, 408, 808), 279: (400, 400, 400)}
    yield "TIFF of planes", _tiff(planes, bytes(1200)), EITHER
    yield "TIFF orientation 77", _tiff({274: 77}, bytes(400)), WELL
    yield "TIFF of a JPEG of another size", _tiff_of_jpeg(), EITHER
    photo = encoded(
        Image.linear_gradient("L").convert("RGB").resize((48, 60)), "TIFF", compression="jpeg"
    )
    # libtiff leaves the pixels to the right of it uninitialized.
    inner = photo.find(b"\xff\xc0") + 7
    yield "TIFF of a JPEG narrower than it", _patch(photo, inner, struct.pack(">H", 41)), EITHER


def _tiff_of_jpeg() -> bytes:
    photo = encoded(Image.new("L", (200, 200), 99), "JPEG")
    return _tiff({259: 7, 279: len(photo)}, photo)


def _gif(width: int, height: int, frame: tuple[int, int, int, int] = (0, 0, 1, 1)) -> bytes:
    screen = struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    picture = b"," + struct.pack("<HHHHB", *frame, 0) + b"\2\2D\1\0"
    return b"GIF89a" + screen + picture + b";"


def _gifs(image: Image.Image) -> Cases:
    small = image.resize((64, 48))
    photo = encoded(small, "GIF")
    yield "GIF", photo, WELL
    yield "animated GIF", animated(small, "GIF"), WELL
    yield "animated GIF cut in its second frame", animated(small, "GIF")[: len(photo) + 300], WELL
    yield "GIF of no frames", photo[:13] + bytes(768) + b";", BROKEN | UNSUPPORTED
    yield "GIF of no size", _gif(0, 0), EITHER
    yield "GIF whose frame leaves the screen", _gif(20, 20, (15, 15, 20, 20)), EITHER
    yield "GIF whose frame is outsized", _gif(20, 20, (0, 0, 65535, 65535)), OUTSIZED
    yield "GIF of broken codes", photo[:-600] + b"\xff" * 599 + b";", EITHER
    yield "GIF of code size 99", photo.replace(b"\0\x08\xff", b"\0\x63\xff", 1), EITHER
    yield "GIF with comments without end", photo[:-1] + b"!\xfe" + b"\xffx" * 900, WELL


def _riff(kind: bytes, data: bytes) -> bytes:
    body = b"WEBP" + kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _webps(image: Image.Image) -> Cases:
    small = image.resize((64, 48))
    lossy, lossless = encoded(small, "WEBP"), encoded(small, "WEBP", lossless=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    extended = encoded(small, "WEBP", exif=exif)
    yield "WebP", lossy, WELL
    yield "lossless WebP", lossless, WELL
    yield "extended WebP", extended, WELL
    yield "animated WebP", animated(small, "WEBP"), WELL
    for name, data in (("lossy", lossy), ("lossless", lossless)):
        body = data[12:]
        for size, canvas in (("larger", (1999, 1999)), ("smaller", (7, 7))):
            sides = b"".join(struct.pack("<I", side)[:3] for side in canvas)
            head = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + sides
            full = b"RIFF" + struct.pack("<I", len(head + body)) + head + body
            yield f"WebP, {name}, on a {size} canvas", full, EITHER
        yield f"WebP, {name}, RIFF says 0", _patch(data, 4, bytes(4)), EITHER
        yield f"WebP, {name}, RIFF says 4 GB", _patch(data, 4, b"\xff" * 4), EITHER
        yield f"WebP, {name}, its chunk says 4 GB", _patch(data, 16, b"\xff" * 4), EITHER
        middle = len(data) // 2
        yield f"WebP, {name}, zeroed", _patch(data, middle, bytes(len(data) // 4)), EITHER
        yield f"WebP, {name}, noisy", _patch(data, 30, bytes(range(200))), EITHER
    yield "WebP of no chunks", b"RIFF\4\0\0\0WEBP", REFUSED
    block = extended.find(b"EXIF") + 4
    for length in (1000, 10**9, 2**32 - 1):
        longer = _patch(extended, block, struct.pack("<I", length))
        yield f"WebP with {length} bytes of EXIF, as it says", longer, EITHER
    yield "extended WebP with torn EXIF", extended.replace(b"MM\0*", b"MM\0+"), WELL


def _bmp(width: int, height: int, *, bits: int = 24, rle: int = 0, pixels: bytes = b"") -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, rle, len(pixels), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(pixels), 0, 0, 54) + head + pixels


def _bmps(image: Image.Image) -> Cases:
    photo = encoded(image.resize((64, 48)), "BMP")
    yield "BMP", photo, WELL
    pixels = bytes(60 * 20)
    yield "BMP from the top down", _bmp(20, -20, pixels=pixels), WELL
    yield "BMP of negative width", _bmp(-20, 20, pixels=pixels), EITHER
    yield "BMP of the most negative height", _bmp(20, -(2**31), pixels=pixels), OUTSIZED
    yield "BMP of no size", _bmp(0, 0, pixels=pixels), REFUSED
    yield "BMP of too few lines", _bmp(20, 200, pixels=pixels), REFUSED
    for bits in (0, 1, 2, 4, 8, 15, 16, 32, 64):
        yield f"BMP of {bits} bits", _bmp(20, 20, bits=bits, pixels=bytes(4000)), EITHER
    for code in (1, 2, 3, 4, 5, 99):
        bits = {1: 8, 2: 4}.get(code, 24)
        data = _bmp(20, 20, bits=bits, rle=code, pixels=b"\xff\1\0\2\xff\xff" * 200)
        yield f"BMP of compression {code}", data, EITHER
    yield "BMP whose pixels lie past its end", _patch(photo, 10, b"\xff\xff\xff\x7f"), EITHER
    yield "BMP whose pixels lie in its header", _patch(photo, 10, bytes(4)), EITHER
    yield "BMP of an unknown header", _patch(photo, 14, b"\x63"), EITHER


def _thin_images() -> Cases:
    """Very small, very thin and very long images."""
    for width, height in ((1, 1), (2, 1), (1, 2), (1, 700), (700, 1), (2, 60_000), (3, 3), (8, 9)):
        image = Image.new("RGB", (width, height), (200, 100, 50))
        for kind in ("PNG", "JPEG", "GIF"):
            yield f"{kind} of {width} x {height}", encoded(image, kind), WELL


# -------------------------------------------------------------------------------- mutants


def mutants(seeds: Sequence[bytes], count: int, seed: int = 0) -> Iterator[bytes]:
    """Yield files with one to four changes each: bytes flipped, removed, inserted or spliced."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        data = bytearray(seeds[rng.integers(len(seeds))])
        # Half of the changes hit the headers, although they are a small part of a file.
        top = len(data) if rng.random() < 0.5 else min(len(data), 700)
        for _ in range(int(rng.integers(1, 5))):
            at, length = int(rng.integers(top)), int(rng.geometric(0.05))
            match rng.integers(6):
                case 0:
                    data[at : at + 1] = bytes([rng.integers(256)])
                case 1:
                    data[at : at + 1] = bytes(
                        b ^ 1 << int(rng.integers(8)) for b in data[at : at + 1]
                    )
                case 2:
                    del data[at : at + length]
                case 3:
                    data[at:at] = rng.bytes(length)
                case 4:
                    other = seeds[rng.integers(len(seeds))]
                    start = int(rng.integers(len(other)))
                    data[at : at + length] = other[start : start + length]
                case _:
                    data[at : at + length] = (
                        rng.choice([0, 255]).astype(np.uint8).tobytes() * length
                    )
        yield bytes(data)


# ------------------------------------------------------------------------------- on disk

ODD_NAMES = (
    b"new\nline.jpg",
    b"carriage\rreturn.jpg",
    b"tab\tand 'quotes' \"double\".jpg",
    "cat \N{CAT FACE} \N{COMBINING ACUTE ACCENT}e.jpg".encode(),
    b"\x1b[31mred\x1b]0;title\x07.jpg",
    b"not utf-8 \xff\xfe\xc3\x28.jpg",
    b"back\\slash \\x41.jpg",
    "right \N{RIGHT-TO-LEFT OVERRIDE}gpj.exe.jpg".encode(),
    b"-rf --help.jpg",
    b" space at both ends .jpg",
    b"%s {0} $HOME `id`.jpg",
    b"a" * 251 + b".jpg",
)


def on_disk(folder: Path, photo: bytes) -> dict[bytes, frozenset[str] | None]:
    """Create unreadable files, and valid ones with odd names, in an existing folder.

    A folder named dog.jpg holds a valid file: the result has `dog.jpg/inside.jpg`, not `dog.jpg`.
    The file without permission is created only if the user is not root, who may read everything.

    Returns:
        The permitted fault kinds of each file by its name, None for valid files.
    """
    result: dict[bytes, frozenset[str] | None] = {}

    def put(name: bytes, kind: str | None) -> Path:
        result[name] = None if kind is None else frozenset({kind})
        return folder / os.fsdecode(name)

    os.mkfifo(put(b"pipe.jpg", "not a file"))
    put(b"link to a pipe.jpg", "not a file").symlink_to("pipe.jpg")
    put(b"link to a device.jpg", "not a file").symlink_to("/dev/zero")
    put(b"link to a folder.jpg/inside.jpg", None).parent.symlink_to("dog.jpg")
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(folder):
        server.bind("socket.jpg")  # relative, because a socket's path must be short
    put(b"socket.jpg", "not a file")
    put(b"dangling.jpg", "unreadable").symlink_to("nowhere.jpg")
    put(b"ring one.jpg", "unreadable").symlink_to("ring two.jpg")
    put(b"ring two.jpg", "unreadable").symlink_to("ring one.jpg")
    if os.geteuid() != 0:
        secret = put(b"secret.jpg", "unreadable")
        secret.write_bytes(photo)
        secret.chmod(0)
    (folder / "dog.jpg").mkdir()
    for name in (b"dog.jpg/inside.jpg", *ODD_NAMES):
        put(name, None).write_bytes(photo)
    put(b"link to a photo.jpg", None).symlink_to("dog.jpg/inside.jpg")
    put(b"empty.jpg", "empty").write_bytes(b"")
    put(b"page.jpg", "not an image").write_bytes(b"<html>gone</html>")
    return result
