"""Every format is decoded as a browser shows it, and every view is a function of its image.

The reference is Pillow: EXIF orientation applied, on a white background, 16 bits scaled to 8.
"""

from __future__ import annotations

import io
import itertools
import shutil
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as reference
from hostile import (
    animated,
    chunk,
    encoded,
    interlaced,
    png,
    resampled,
    segment,
    segments,
    wide_table,
    ycck,
)
from PIL import Image, ImageOps, TiffImagePlugin
from torchvision import models, transforms

from arrowhead import ConfigError
from arrowhead.data import chunks as data_chunks
from arrowhead.data import sources as data_sources
from arrowhead.decode import pillow_images
from arrowhead.decode import pixels as decode_pixels
from arrowhead.decode.codecs import CpuCodec
from arrowhead.decode.decoder import Decoder
from arrowhead.decode.geometry import draw_augmentation
from arrowhead.decode.pixels import PixelConfig
from arrowhead.decode.worker_process import SubprocessDecoder
from arrowhead.features.backbone import Body, BodyConfig, load
from arrowhead.features.extract import ExtractConfig, FeatureCache, FeaturePipeline, make_recipe
from arrowhead.runtime.worker import Worker

SIDE = 64


@pytest.fixture(scope="module")
def photos(image_folder: Path) -> list[bytes]:
    """24 synthetic JPEGs of many sizes."""
    return [path.read_bytes() for path in sorted(image_folder.rglob("*.jpg"))[:24]]


@pytest.fixture(scope="module")
def photo(photos: list[bytes]) -> Image.Image:
    """One of them at 64 x 64, so that resizing to that size changes no pixel."""
    return Image.open(io.BytesIO(photos[0])).convert("RGB").resize((SIDE, SIDE))


@pytest.fixture(scope="module")
def same_size() -> Iterator[SubprocessDecoder]:
    with SubprocessDecoder(_squash_config(SIDE), batch_size=8, threads=2) as decoder:
        yield decoder


@pytest.fixture(scope="module")
def smaller() -> Iterator[SubprocessDecoder]:
    with SubprocessDecoder(_squash_config(40), batch_size=8, threads=2) as decoder:
        yield decoder


def _squash_config(side: int) -> PixelConfig:
    return PixelConfig(size=side, resize="squash")


def _ids(count: int) -> list[bytes]:
    return [number.to_bytes(16, "big") for number in range(count)]


def _reference_pixels(data: bytes) -> np.ndarray:
    """The first frame of a file, decoded by Pillow on a white background; uint8 (H, W, 3)."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        page = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(page, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def _resized(image_HWC: np.ndarray, side: int) -> np.ndarray:
    """uint8 (side, side, 3), by torchvision's antialiased bilinear."""
    pixels = torch.from_numpy(image_HWC.copy()).permute(2, 0, 1)
    return reference.resize(pixels, [side, side], antialias=True).permute(1, 2, 0).numpy()


def _mean_difference(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference, of 255."""
    return float(np.abs(a.astype(float) - b).mean())


# ---------------------------------------------------------------------- kinds of files


def _bmp(
    bits: int, lines: bytes, *, way: int = 0, behind: bytes = b"", height: int = SIDE
) -> bytes:
    """A BMP of a kind that Pillow reads but does not write; behind: masks, or a palette."""
    masks = 12 * (way == 3)
    head = struct.pack("<IiiHHIIiiII", 40, SIDE, height, 1, bits, way, len(lines), 0, 0, 0, 0)
    start = 54 + len(behind)
    assert masks <= len(behind)
    full = struct.pack("<IHHI", start + len(lines), 0, 0, start) + head + behind + lines
    return b"BM" + full


def _sixteen_bits(pixels_HWC: np.ndarray, colour: int, before: bytes = b"") -> bytes:
    """A 16-bit PNG of this colour type."""
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels_HWC)
    height, width = pixels_HWC.shape[:2]
    return png(width, height, depth=16, colour=colour, pixels=lines, before=before)


def _files_of_every_format(photo: Image.Image) -> dict[str, tuple[bytes, bool]]:
    """Files by name, and whether Pillow must decode them."""
    pixels, grey = np.asarray(photo), np.asarray(photo.convert("L"))
    alpha = Image.radial_gradient("L").resize(photo.size)
    transparent = photo.copy()
    transparent.putalpha(alpha)
    palette = photo.quantize(200)
    shades = np.asarray(palette)
    colours = np.array(palette.getpalette() + [0] * 768, np.uint8)[:768].reshape(256, 3)
    bgr0 = np.pad(colours[:, ::-1], ((0, 0), (0, 1))).tobytes()
    deep = grey.astype(np.uint16) * 257 + np.arange(SIDE, dtype=np.uint16) * 3
    deep_rgb = pixels.astype(np.uint16) * 257
    deep_alpha = np.asarray(alpha, np.uint16) * 257
    key = chunk(b"tRNS", struct.pack(">H", deep[5, 5]))
    red, green, blue = (pixels[::-1, :, part].astype("<u2") for part in range(3))
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    runs = b"".join(
        b"".join(bytes([1, shade]) for shade in line) + b"\0\0" for line in shades[::-1]
    )
    nibbles = shades[::-1] % 16
    ours = {
        "JPEG": encoded(photo, "JPEG"),
        "JPEG 4:4:4": encoded(photo, "JPEG", subsampling="4:4:4"),
        "JPEG 4:2:2": encoded(photo, "JPEG", subsampling="4:2:2"),
        "JPEG 4:4:0": resampled(photo, "4:2:2", 0x12),
        "JPEG 4:1:1": resampled(photo, "4:2:0", 0x41),
        "progressive JPEG": encoded(photo, "JPEG", progressive=True),
        "JPEG with restarts": encoded(photo, "JPEG", restart_marker_blocks=1),
        "JPEG of 16-bit tables": wide_table(encoded(photo, "JPEG")),
        "grey JPEG": encoded(photo.convert("L"), "JPEG"),
        "RGB JPEG": encoded(photo, "JPEG", keep_rgb=True),
        "CMYK JPEG": encoded(photo.convert("CMYK"), "JPEG"),
        "YCCK JPEG": ycck(photo),
        "MPO": animated(photo, "MPO"),
        "PNG": encoded(photo, "PNG"),
        "interlaced PNG": interlaced(photo),
        "grey PNG": encoded(photo.convert("L"), "PNG"),
        "1-bit PNG": encoded(photo.convert("1"), "PNG"),
        "palette PNG": encoded(palette, "PNG"),
        "palette PNG of 4 bits": encoded(photo.quantize(16), "PNG", bits=4),
        "16-bit grey PNG": _sixteen_bits(deep[..., None], 0),
        "16-bit RGB PNG": _sixteen_bits(deep_rgb, 2),
        "WebP": encoded(photo, "WEBP"),
        "lossless WebP": encoded(photo, "WEBP", lossless=True),
        "animated WebP": animated(photo, "WEBP"),
    }
    pillows = {
        "PNG with alpha": encoded(transparent, "PNG"),
        "grey PNG with alpha": encoded(transparent.convert("LA"), "PNG"),
        "16-bit PNG with alpha": _sixteen_bits(np.dstack([deep_rgb, deep_alpha]), 6),
        "16-bit grey PNG with alpha": _sixteen_bits(np.dstack([deep, deep_alpha]), 4),
        "palette PNG, one colour clear": encoded(palette, "PNG", transparency=3),
        "palette PNG, colours half clear": encoded(palette, "PNG", transparency=bytes(range(200))),
        "PNG, one colour clear": encoded(photo, "PNG", transparency=tuple(pixels[5, 5].tolist())),
        "grey PNG, one shade clear": encoded(
            photo.convert("L"), "PNG", transparency=int(grey[5, 5])
        ),
        "16-bit grey PNG, one shade clear": _sixteen_bits(deep[..., None], 0, key),
        "WebP with alpha": encoded(transparent, "WEBP"),
        "lossless WebP with alpha": encoded(transparent, "WEBP", lossless=True),
        "animated WebP with alpha": animated(transparent, "WEBP"),
        "BMP": encoded(photo, "BMP"),
        "BMP from the top down": _bmp(24, pixels[..., ::-1].tobytes(), height=-SIDE),
        "grey BMP": encoded(photo.convert("L"), "BMP"),
        "1-bit BMP": encoded(photo.convert("1"), "BMP"),
        "palette BMP": encoded(palette, "BMP"),
        "palette BMP of 4 bits": _bmp(
            4, (nibbles[:, ::2] << 4 | nibbles[:, 1::2]).tobytes(), behind=bgr0[:64]
        ),
        "run-length BMP": _bmp(8, runs + b"\0\1", way=1, behind=bgr0),
        "BMP with alpha": encoded(transparent, "BMP"),
        "16-bit BMP": _bmp(16, (red >> 3 << 10 | green >> 3 << 5 | blue >> 3).tobytes()),
        "16-bit BMP, masked": _bmp(
            16, (red >> 3 << 11 | green >> 2 << 5 | blue >> 3).tobytes(), way=3, behind=masks
        ),
        "TIFF": encoded(photo, "TIFF"),
        "grey TIFF": encoded(photo.convert("L"), "TIFF"),
        "16-bit grey TIFF": encoded(Image.fromarray(deep), "TIFF"),
        "palette TIFF": encoded(palette, "TIFF"),
        "fax TIFF": encoded(photo.convert("1"), "TIFF", compression="group4"),
        "YCbCr TIFF": encoded(photo.convert("YCbCr"), "TIFF"),
        "BigTIFF": encoded(photo, "TIFF", big_tiff=True),
        "TIFF of many pages": animated(photo, "TIFF"),
        "TIFF with alpha": encoded(transparent, "TIFF"),
        "CMYK TIFF": encoded(photo.convert("CMYK"), "TIFF"),
        "GIF": encoded(photo, "GIF"),
        "animated GIF": animated(photo, "GIF"),
        "GIF, one colour clear": encoded(palette, "GIF", transparency=3),
        "AVIF": encoded(photo, "AVIF"),
        "AVIF with alpha": encoded(transparent, "AVIF"),
    } | {
        f"TIFF, {way}": encoded(photo, "TIFF", compression=way)
        for way in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd")
    }
    pillow_too = ("TIFF", "BMP")
    result = {n: (data, any(k in n for k in pillow_too)) for n, data in ours.items()}
    return result | {name: (data, True) for name, data in pillows.items()}


def test_every_format_is_decoded_as_a_browser_shows_it(
    photo: Image.Image, same_size: SubprocessDecoder, smaller: SubprocessDecoder
) -> None:
    # Tolerance, mean absolute difference of 255: 0.5 for what is rounded on the way from 16 bits,
    # a palette of 16-bit colours or YCbCr, and for the resampling of two libraries; else none.
    rounded = ("16-bit", "palette TIFF", "YCbCr TIFF")
    wrong = {}
    for name, (data, by_pillow) in _files_of_every_format(photo).items():
        expected = _reference_pixels(data)
        assert expected.std() > 10, name
        result, smaller_result = same_size([data], _ids(1)), smaller([data], _ids(1))
        apart = _mean_difference(result.views[0][0], expected)
        resized = _mean_difference(smaller_result.views[0][0], _resized(expected, 40))
        exact = apart == 0 or (name.startswith(rounded) and apart <= 0.5)
        if result.faults != [None] or not exact or resized > 0.5:
            wrong[name] = result.faults[0], apart, resized
        elif result.fallback != [by_pillow]:
            wrong[name] = "decoded by Pillow" if result.fallback[0] else "not decoded by Pillow"
    assert not wrong


def test_the_first_frame_of_an_animation_is_decoded(
    photo: Image.Image, same_size: SubprocessDecoder
) -> None:
    for kind in ("GIF", "WEBP", "PNG", "AVIF", "TIFF", "MPO"):
        animation, still = animated(photo, kind), encoded(photo, "JPEG" if kind == "MPO" else kind)
        result = same_size([animation, still], _ids(2))
        assert result.faults == [None, None], kind
        # Frames are compressed differently from a still image; another frame differs by 20.
        assert _mean_difference(result.views[0][0], result.views[0][1]) < 6, kind


def test_a_partial_first_frame_of_an_animation_is_on_a_white_background(
    photo: Image.Image, same_size: SubprocessDecoder
) -> None:
    part = Image.new("RGBA", photo.size)
    part.paste(photo.crop((0, 0, 40, 40)), (20, 10))
    for kind in ("GIF", "PNG"):  # of WebP Pillow says no more than that it were black
        animation = encoded(part, kind, save_all=True, append_images=[photo.convert("RGBA")])
        result = same_size([animation], _ids(1))
        assert result.faults == [None], kind
        assert (result.views[0][0][:8] == 255).all(), kind
        assert _mean_difference(result.views[0][0], _reference_pixels(animation)) < 1, kind


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("JPEG", mode) for mode in ("RGB", "L", "CMYK")),
        *(("PNG", mode) for mode in ("RGB", "RGBA", "P", "LA", "1")),
        *(("WEBP", mode) for mode in ("RGB", "RGBA")),
        *(("TIFF", mode) for mode in ("RGB", "RGBA", "L", "CMYK", "1")),
        *(("AVIF", mode) for mode in ("RGB", "RGBA")),
    ],
)
@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_exif_orientation_is_applied_in_every_format_and_mode(
    kind: str, mode: str, resize: str, photos: list[bytes]
) -> None:
    # Tolerance: mean absolute difference 1 of 255 for resampling in another order; a wrong turn is
    # more than 15 away. 80 x 64 becomes 56 x 56 with even remainders: no middle to choose.
    image = Image.open(io.BytesIO(photos[0])).convert("RGB").resize((80, 64)).convert(mode)
    files, upright = [], []
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        files.append(encoded(image, kind, exif=exif))
        upright.append(encoded(Image.fromarray(_reference_pixels(files[-1])), "PNG"))
    config = PixelConfig(size=56, resize=resize)
    with SubprocessDecoder(config, batch_size=8, threads=1) as decoder:
        result, expected = decoder(files, _ids(8)), decoder(upright, _ids(8))
    assert result.faults == expected.faults == [None] * 8
    first = expected.views[0][0]
    assert min(_mean_difference(first, np.rot90(first, turns)) for turns in (1, 2, 3)) > 15
    apart = [_mean_difference(result.views[0][row], expected.views[0][row]) for row in range(8)]
    assert max(apart) < 1, apart


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
def test_a_rotated_photo_is_cropped_like_the_upright_one_for_any_size(
    resize: str, photos: list[bytes]
) -> None:
    # Tolerance: mean absolute difference 0.5 of 255 for resampling in another order. One pixel
    # further, these come out 1.5 away and more.
    image = Image.open(io.BytesIO(photos[0])).convert("RGB")
    wrong = {}
    for width, height in ((80, 64), (81, 64), (95, 71), (64, 83), (71, 96), (120, 61), (40, 91)):
        files, upright = [], []
        for orientation in range(1, 9):
            exif = Image.Exif()
            exif[0x0112] = orientation
            files.append(encoded(image.resize((width, height)), "PNG", exif=exif))
            upright.append(encoded(Image.fromarray(_reference_pixels(files[-1])), "PNG"))
        config = PixelConfig(size=57, resize=resize)
        with SubprocessDecoder(config, batch_size=8, threads=1) as decoder:
            result, expected = decoder(files, _ids(8)), decoder(upright, _ids(8))
        assert result.faults == expected.faults == [None] * 8
        for row in range(8):
            apart = _mean_difference(result.views[0][row], expected.views[0][row])
            if apart > 0.5:
                wrong[width, height, row + 1] = round(apart, 2)
    assert not wrong


def test_a_store_with_the_older_crop_rule_still_gets_the_same_pixels(photos: list[bytes]) -> None:
    """Rows that are added to it, and golden images of its bundles, come out as the old ones did."""
    image = Image.open(io.BytesIO(photos[0])).convert("RGB").resize((64, 81))
    files = []
    for orientation in (1, 6):
        exif = Image.Exif()
        exif[0x0112] = orientation
        files.append(encoded(image, "PNG", exif=exif))
    views = {}
    for rule in decode_pixels.DECODER_RULES:
        with SubprocessDecoder(PixelConfig(size=57), batch_size=8, threads=1, rule=rule) as decoder:
            views[rule] = decoder(files, _ids(2)).views[0]
    old, new = views["dali"], views["dali-upright"]
    assert (old[0] == new[0]).all()
    assert (old[1] == np.rot90(old[0], -1)).all()  # cut as it is stored, then turned
    assert not (old[1] == new[1]).all()
    with pytest.raises(ConfigError, match="of-tomorrow"):
        SubprocessDecoder(PixelConfig(size=57), batch_size=8, threads=1, rule="of-tomorrow")


# --------------------------------------------------------------------- colours of a JPEG


def _jpeg(data: bytes, jfif: bool, transform: int | None, ids: bytes = b"") -> bytes:
    """The same JPEG with or without JFIF's and Adobe's segments, its components named by `ids`."""
    named, kept = bytearray(data), [data[:2]]
    if jfif:
        kept.append(segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0"))
    if transform is not None:
        kept.append(segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([transform])))
    for marker, start, end in segments(data):
        at = {0xC0: start + 10, 0xC2: start + 10, 0xDA: start + 5}.get(marker)
        for number, name in enumerate(ids if at else b""):
            named[at + number * (2 if marker == 0xDA else 3)] = name
        if marker not in (0xE0, 0xEE):
            kept.append(bytes(named[start:end]))
    return b"".join(kept) + data[list(segments(data))[-1][2] :]


def test_jpegs_of_every_colour_space_are_decoded_as_by_pillow(
    photo: Image.Image, same_size: SubprocessDecoder
) -> None:
    # Tolerance: mean absolute difference 1 of 255, for CMYK is taken times K in whole numbers. A
    # CMYK whose inversion is missed is 90 away.
    sources = {
        "grey": (encoded(photo.convert("L"), "JPEG"), [b""]),
        "YCbCr": (encoded(photo, "JPEG"), [b"\1\2\3", b"\0\1\2", b"RGB", b"rgb", b"YCc"]),
        "RGB": (encoded(photo, "JPEG", keep_rgb=True), [b"RGB", b"\1\2\3"]),
        "CMYK": (encoded(photo.convert("CMYK"), "JPEG"), [b"", b"CMYK", b"\0\1\2\3"]),
        "YCCK": (ycck(photo), [b"", b"YCcK"]),
        "progressive CMYK": (encoded(photo.convert("CMYK"), "JPEG", progressive=True), [b""]),
    }
    adobe = {"no": None, "0": 0, "1": 1, "2": 2, "of another name": 0, "too short": 0}
    files = {}
    for name, (data, named) in sources.items():
        for ids, jfif, (messages, transform) in itertools.product(
            named, (True, False), adobe.items()
        ):
            result = _jpeg(data, jfif, transform, ids)
            if messages == "of another name":
                result = result.replace(b"Adobe", b"Adobf")
            elif messages == "too short":  # libjpeg takes none of less than 12 bytes
                result = result.replace(b"\xff\xee\0\x0e", b"\xff\xee\0\x0d").replace(
                    b"Adobe\0\x64\0\0\0\0\0", b"Adobe\0\x64\0\0\0\0"
                )
            files[name, ids, jfif, messages] = result
    assert len(files) > 150
    wrong = {}
    for case, data in files.items():
        result, expected = same_size([data], _ids(1)), _reference_pixels(data)
        apart = _mean_difference(result.views[0][0], expected)
        if result.faults != [None] or apart > 1:
            wrong[case] = result.faults[0], round(apart, 1)
    assert not wrong


def test_a_damaged_cmyk_jpeg_without_adobes_segment_is_a_fault(
    photo: Image.Image, same_size: SubprocessDecoder
) -> None:
    full = _jpeg(encoded(photo.convert("CMYK"), "JPEG"), jfif=False, transform=None)
    broken = full[: len(full) // 2] + bytes(40) + full[len(full) // 2 + 40 :]
    cut, truncated, well = same_size([full[: len(full) // 2], broken, full], _ids(3)).faults
    assert cut and cut.startswith("truncated")
    assert truncated and truncated.startswith(("truncated", "corrupt"))
    assert well is None


# -------------------------------------------------------------------- unsupported formats


def _box(brand: bytes, *others: bytes, kind: bytes = b"ftyp") -> bytes:
    """The first bytes of an ISO base media file."""
    full = brand + bytes(4) + b"".join(others)
    return struct.pack(">I", len(full) + 8) + kind + full + bytes(64)


def _raw(photo: Image.Image, **tags: Any) -> bytes:
    """A TIFF with the marks of a camera's raw file: what Pillow shows of it is a thumbnail."""
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in tags.items():
        info[{"dng": 0xC612, "reduced": 0x00FE, "below": 0x014A}[name]] = value
    return encoded(photo, "TIFF", tiffinfo=info)


def test_an_unsupported_format_is_a_fault_that_says_what_to_do(
    photo: Image.Image, same_size: SubprocessDecoder
) -> None:
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"></svg>'
    files = {
        "HEIC": [
            _box(b"heic", b"mif1", b"heic"),
            _box(b"mif1", b"mif1", b"heic"),
            _box(b"heix", b"mif1"),
            _box(b"hevc", b"msf1", b"hevc"),
        ],
        "HEIF": [_box(b"mif1", b"mif1", b"miaf")],
        "JPEG XL": [b"\xff\x0a\xfa\x7f\x01" + bytes(40), b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40)],
        "JPEG 2000": [
            b"\xff\x4f\xff\x51\0\x2f" + bytes(60),
            b"\0\0\0\x0cjP  \r\n\x87\n" + _box(b"jp2 ", b"jp2 "),
            encoded(photo, "JPEG2000"),
            encoded(photo, "JPEG2000", no_jp2=True),
        ],
        "JPEG XR": [b"II\xbc\x01" + bytes(40)],
        "JPEG-LS": [b"\xff\xd8\xff\xf7\0\x0b\x08\0\x40\0\x40\1\1\x11\0" + bytes(60)],
        "Photoshop": [b"8BPS\0\1" + bytes(40)],
        "SVG": [svg, b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- drawn -->\n' + svg],
        "ICO": [encoded(photo, "ICO")],
        "PNM": [encoded(photo, "PPM"), encoded(photo.convert("L"), "PPM")],
        "DICOM": [bytes(128) + b"DICM" + bytes(60)],
        "OpenEXR": [b"\x76\x2f\x31\x01" + bytes(60)],
        "a film": [
            _box(b"isom", b"mp42"),
            _box(b"qt  "),
            b"RIFF\x40\0\0\0AVI LIST" + bytes(60),
            b"\x1a\x45\xdf\xa3" + bytes(60),
        ],
        "raw file": [
            b"II*\0\x10\0\0\0CR\2\0" + bytes(60),
            _box(b"crx ", b"crx ", b"isom"),
            b"FUJIFILMCCD-RAW 0201" + bytes(60),
            b"IIU\0\x18\0\0\0" + bytes(60),
            b"IIRO\x08\0\0\0" + bytes(60),
            _raw(photo, dng=b"\1\4\0\0"),
            _raw(photo, reduced=1, below=8),
        ],
    }
    wrong = {}
    for name, examples in files.items():
        for number, data in enumerate(examples):
            fault = same_size([data], _ids(1)).faults[0] or "taken for an image"
            kind, _, words = fault.partition(": ")
            do = any(way in words for way in ("JPEG", "still pictures"))
            if kind != "unsupported" or name not in words or not do:
                wrong[name, number] = fault
    assert not wrong


def test_a_file_that_only_starts_like_another_format_is_recognized(
    photo: Image.Image, same_size: SubprocessDecoder
) -> None:
    page = b"<!DOCTYPE html><html><body><svg></svg></body></html>" * 4
    notes = [b"P1 is the first of the plots that we photographed\n", b"BPG is a word", bytes(200)]
    result = same_size([page, *notes, b"<?xml version='1.0'?><annotation/>" * 9], _ids(5))
    assert {(fault or "").partition(":")[0] for fault in result.faults} == {"not an image"}
    films = [animated(photo, "AVIF"), encoded(photo, "AVIF"), encoded(photo, "TIFF")]
    assert same_size(films, _ids(3)).faults == [None] * 3


# ------------------------------------------------------------------------- real photos


@pytest.fixture(scope="module")
def squares(dogscats: Path) -> list[Image.Image]:
    """64 real photos, 224 x 224."""
    paths = sorted(dogscats.rglob("*.jpg"))[::12][:64]
    return [ImageOps.fit(Image.open(path).convert("RGB"), (224, 224)) for path in paths]


def test_decoded_photos_are_bit_identical_to_pillows_before_resizing(
    squares: list[Image.Image],
) -> None:
    ways = [
        {"quality": quality, "subsampling": sampling, "progressive": number % 2 == 1}
        for number, quality in enumerate((60, 75, 90, 95))
        for sampling in ("4:2:0", "4:2:2", "4:4:4")
    ]
    files = [encoded(image, "JPEG", **ways[n % len(ways)]) for n, image in enumerate(squares)]
    with SubprocessDecoder(_squash_config(224), batch_size=64, threads=2) as decoder:
        result = decoder(files, _ids(64))
    assert result.faults == [None] * 64
    assert not any(result.fallback)
    for row, data in enumerate(files):
        assert np.array_equal(result.views[0][row], _reference_pixels(data))


def test_features_are_close_to_those_of_plain_torchvision_code(
    dogscats: Path, mobilenet: list[str], tmp_path: Path
) -> None:
    # Tolerances, as cosines. For the same pixels: 0.9999 (the store holds float16, batch norms are
    # folded). For torchvision's resize of tensors: 0.999. For that of PIL images, which rounds
    # twice: 0.998, and 0.999 for 95 % (torchvision's own two ways are as far apart).
    paths = sorted((dogscats / "valid").rglob("*.jpg"))[::3][:60]
    for path in paths:
        shutil.copy(path, tmp_path)
    half = (0.5, 0.5, 0.5)
    config = BodyConfig(body="mobilenet_v2", weights=mobilenet[3], mean=half, std=half)
    weights, pixels = load(config), PixelConfig()
    body = Body(config.body, weights.state, pool="avg", mean=half, std=half)
    recipe = make_recipe(pixels, config, weights, body.width)
    catalog = data_sources.unlabelled_catalog(tmp_path)
    worker = Worker(0, 1, "cpu", 2, lambda: None, lambda report: None)
    with FeaturePipeline(worker, body, recipe, pixels, ExtractConfig()) as pipeline:
        runs = data_chunks.split_into_chunks(catalog.paths, 256)
        chunks = list(
            pipeline(((at, catalog.subset(rows)) for at, rows in enumerate(runs)), FeatureCache())
        )
    ours = {
        path: row[0] for done in chunks for path, row in zip(done.paths, done.features, strict=True)
    }
    assert len(ours) == len(paths)

    plain = models.mobilenet_v2(weights=None)
    missing, _ = plain.load_state_dict(weights.state, strict=False)
    assert set(missing) == {"classifier.1.weight", "classifier.1.bias"}
    plain.classifier = torch.nn.Identity()
    plain.eval()
    of_image = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    with SubprocessDecoder(pixels, batch_size=1, threads=2) as decoder, torch.inference_mode():
        cosines = []
        for path in paths:
            image = Image.open(path).convert("RGB")
            tensor = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
            given = decoder([path.read_bytes()], _ids(1)).views[0][0].transpose(2, 0, 1)
            rounded_twice = np.asarray(of_image(image)).transpose(2, 0, 1)
            seen = np.stack([given, of_image(tensor).numpy(), rounded_twice])
            theirs = plain((torch.from_numpy(seen) / 255 - 0.5) / 0.5)
            feature = torch.from_numpy(ours[path.name].astype(np.float32))
            cosines.append(torch.cosine_similarity(theirs, feature[None], dim=1).numpy())
    same, of_tensors, of_images = np.array(cosines).T
    assert same.min() > 0.9999
    assert of_tensors.min() > 0.999
    assert of_images.min() > 0.998
    assert (of_images > 0.999).mean() >= 0.95


# -------------------------------------------------------------------------------- views


def test_an_image_is_decoded_once_for_all_views(
    photos: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"codec": 0, "Pillow": 0}
    by_codec, by_pillow = CpuCodec.__call__, pillow_images.decode_with_pillow

    def count_codec(self: CpuCodec, headers: list) -> list:
        counts["codec"] += len(headers)
        return by_codec(self, headers)

    def count_pillow(data: bytes) -> object:
        counts["Pillow"] += 1
        return by_pillow(data)

    monkeypatch.setattr(CpuCodec, "__call__", count_codec)
    monkeypatch.setattr(pillow_images, "decode_with_pillow", count_pillow)
    transparent = encoded(Image.open(io.BytesIO(photos[0])).convert("RGBA"), "PNG")
    engine = Decoder(PixelConfig(size=32, views=5), batch_size=8, threads=1)
    result = engine([*photos[:6], transparent, transparent], _ids(8))
    assert counts == {"codec": 6, "Pillow": 2}
    assert len({view[:8].tobytes() for view in result.views}) == 5


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
def test_with_augmentation_none_all_views_are_bit_identical(
    resize: str, photos: list[bytes]
) -> None:
    config = PixelConfig(size=SIDE, views=3, augment="none", resize=resize)
    with SubprocessDecoder(config, batch_size=8, threads=2) as decoder:
        views = decoder(photos[:8], _ids(8)).views
    assert np.array_equal(views[0], views[1])
    assert np.array_equal(views[0], views[2])


def test_side_on_views_rotate_by_at_most_10_degrees_and_have_no_quarter_turns(
    photo: Image.Image,
) -> None:
    # A picture dark above and light below stays so in every view; seen from above it does not.
    sky = np.zeros((SIDE, SIDE, 3), np.uint8)
    sky[SIDE // 2 :] = 255
    data = encoded(Image.fromarray(sky), "PNG")
    upside_down = {}
    for policy in ("side-on", "top-down"):
        config = PixelConfig(size=32, views=9, augment=policy)
        with SubprocessDecoder(config, batch_size=32, threads=2) as decoder:
            views = decoder([data] * 32, _ids(32)).views
        lower = np.stack([view[:32, 24:].mean((1, 2, 3)) for view in views[1:]])
        upper = np.stack([view[:32, :8].mean((1, 2, 3)) for view in views[1:]])
        upside_down[policy] = int((lower - upper < 100).sum())
        augmentations = [
            draw_augmentation(config, image_id, view)
            for image_id in _ids(200)
            for view in range(1, 5)
        ]
        turned = {augmentation.quarter_turns for augmentation in augmentations}
        assert turned == ({0} if policy == "side-on" else {0, 1, 2, 3})
        assert max(abs(float(augmentation.angle[0])) for augmentation in augmentations) <= 10
        assert {augmentation.mirrored for augmentation in augmentations} == {False, True}
    assert upside_down["side-on"] == 0
    assert upside_down["top-down"] > 100


def test_a_view_depends_only_on_seed_image_and_view_not_on_batch_order_or_process(
    photos: list[bytes],
) -> None:
    config = PixelConfig(size=32, views=4, augment_seed=5)
    ids = _ids(24)
    with SubprocessDecoder(config, batch_size=24, threads=2) as decoder:
        full = decoder(photos, ids).views
        again = decoder(photos, ids).views
        order = np.random.default_rng(0).permutation(24)
        shuffled = decoder([photos[n] for n in order], [ids[n] for n in order]).views
        other_name = decoder(photos[:1], [b"\xff" * 16]).views
    with SubprocessDecoder(config, batch_size=5, threads=1) as decoder:
        fives = [decoder(photos[n : n + 5], ids[n : n + 5]).views for n in range(0, 24, 5)]
    engine = Decoder(config, batch_size=7, threads=1)
    here = [engine(photos[n : n + 7], ids[n : n + 7]).views for n in range(0, 24, 7)]
    for view in range(4):
        assert np.array_equal(full[view], again[view])
        assert np.array_equal(full[view][order], shuffled[view])
        assert np.array_equal(full[view], _join_batches(fives, view, 5))
        assert np.array_equal(full[view], _join_batches(here, view, 7))
        # Only the clean view does not depend on the image id.
        assert np.array_equal(full[view][0], other_name[view][0]) == (view == 0)


def _join_batches(batches: Sequence[list[np.ndarray]], view: int, size: int) -> np.ndarray:
    return np.concatenate([views[view][:size] for views in batches])[:24]
