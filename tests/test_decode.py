"""The decoder: rows keep their order, EXIF orientation is applied, views are deterministic."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as reference
from PIL import Image, ImageOps

from arrowhead import ConfigError
from arrowhead.decode.headers import read_header
from arrowhead.decode.pixels import PixelConfig
from arrowhead.decode.worker_process import SubprocessDecoder

SIDE = 64


class Decoder(SubprocessDecoder):
    """The decoder with views as tensors, channels first, as the backbone takes them."""

    def __call__(
        self, encoded: list[bytes], image_ids: list[bytes]
    ) -> tuple[list[torch.Tensor], list[str | None]]:
        result = super().__call__(encoded, image_ids)
        return [torch.from_numpy(view).permute(0, 3, 1, 2) for view in result.views], result.faults


@pytest.fixture(scope="module")
def photos(image_folder: Path) -> list[bytes]:
    """64 synthetic JPEGs of many sizes."""
    return [path.read_bytes() for path in sorted(image_folder.rglob("*.jpg"))[:64]]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(PixelConfig(size=SIDE), batch_size=64, threads=2)


@pytest.fixture(scope="module")
def clean_pixels(decoder: Decoder, photos: list[bytes]) -> torch.Tensor:
    """The decoded photos, from a batch without broken files."""
    (pixels,), faults = decoder(photos, _ids(photos))
    assert faults == [None] * 64
    return pixels


def _ids(files: list[bytes]) -> list[bytes]:
    return [zlib.crc32(data).to_bytes(16, "big") for data in files]


def _encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _mean_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean absolute difference, of 255."""
    return float((a.double() - b.double()).abs().mean())


# --------------------------------------------------------------------------- bad images

HOSTILE = {
    "empty": b"",
    "page": b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 20,
    "text": b"not an image at all\n" * 50,
    "half a header": b"\xff\xd8\xff\xe0\x00\x10JFIF",
    "signature only": b"\x89PNG\r\n\x1a\n",
}


def _broken_files(photo: bytes) -> dict[str, bytes]:
    truncated = photo[: len(photo) // 2]
    return HOSTILE | {
        "truncated": truncated,
        "torn, then padded": truncated + bytes(len(photo) - len(truncated)),
        "torn png": _encode(Image.open(io.BytesIO(photo)), "PNG")[:5000],
    }


def test_a_broken_image_does_not_change_the_others_in_its_batch(
    decoder: Decoder, photos: list[bytes], clean_pixels: torch.Tensor
) -> None:
    batch, positions = list(photos), {}
    for number, (name, data) in enumerate(_broken_files(photos[0]).items()):
        positions[3 + 8 * number % 61] = name
        batch[3 + 8 * number % 61] = data
    (pixels,), faults = decoder(batch, _ids(batch))
    for row in range(64):
        if row in positions:
            assert faults[row], f"{positions[row]} was not noticed"
            assert not pixels[row].any(), f"{positions[row]} left pixels behind"
        else:
            assert faults[row] is None
            assert torch.equal(pixels[row], clean_pixels[row]), f"row {row} changed"


def test_a_fault_starts_with_its_kind_and_is_one_line(
    decoder: Decoder, photos: list[bytes]
) -> None:
    files = list(_broken_files(photos[0]).values())
    _, faults = decoder(files, _ids(files))
    kinds = [fault.partition(":")[0] for fault in faults if fault]
    assert kinds == [
        "empty",
        "not an image",
        "not an image",
        "truncated",
        "unsupported",
        "truncated",
        "truncated",
        "truncated",
    ]
    assert all("\n" not in fault for fault in faults if fault)


def test_a_batch_of_broken_images_only_is_black_and_does_not_affect_the_next(
    decoder: Decoder, photos: list[bytes], clean_pixels: torch.Tensor
) -> None:
    truncated = [photo[: len(photo) // 2] for photo in photos]
    (pixels,), faults = decoder(truncated, _ids(truncated))
    assert all(faults)
    assert not pixels.any()
    (pixels,), faults = decoder(photos, _ids(photos))
    assert not any(faults)
    assert torch.equal(pixels, clean_pixels)


def test_a_short_batch_has_a_row_for_each_file(
    decoder: Decoder, photos: list[bytes], clean_pixels: torch.Tensor
) -> None:
    for count in (1, 16, 17):
        (pixels,), faults = decoder(photos[:count], _ids(photos[:count]))
        assert len(faults) == count
        assert torch.equal(pixels, clean_pixels[:count])


def test_pixels_do_not_depend_on_threads_or_batch_size(
    photos: list[bytes], clean_pixels: torch.Tensor
) -> None:
    small_decoder = Decoder(PixelConfig(size=SIDE), batch_size=4, threads=1)
    for first in range(0, 16, 4):
        batch = photos[first : first + 4]
        (pixels,), _ = small_decoder(batch, _ids(batch))
        assert torch.equal(pixels[:4], clean_pixels[first : first + 4])


# ------------------------------------------------------------------------- claimed sizes


def _png_of_claimed_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_an_image_that_claims_too_many_pixels_is_a_fault_and_not_decoded(decoder: Decoder) -> None:
    files = [_png_of_claimed_size(20_000, 20_000), _png_of_claimed_size(2**31 - 1, 2**31 - 1)]
    (pixels,), faults = decoder(files, _ids(files))
    assert faults[0] == "too large: 20000 x 20000 pixels, more than 100000000"
    assert faults[1] and faults[1].startswith(("too large:", "unsupported:"))
    assert not pixels.any()
    assert decoder.deaths == 0


def test_the_limit_on_pixels_is_exact(photos: list[bytes]) -> None:
    width, height = Image.open(io.BytesIO(photos[0])).size
    assert not isinstance(read_header(photos[0], PixelConfig(max_pixels=width * height)), str)
    assert isinstance(read_header(photos[0], PixelConfig(max_pixels=width * height - 1)), str)


def _peak_megabytes(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


def test_an_image_one_pixel_wide_does_not_exhaust_memory(decoder: Decoder) -> None:
    # One pixel wide, so "shorter side to 73" makes it 73 times as long: from 48 kB of pixels,
    # 256 MB. A strip of 65,500 pixels at size 224 would take 13 GB.
    strip = _encode(Image.new("RGB", (1, 16_000), (200, 100, 50)), "PNG")
    decoder([strip], [bytes(16)])
    process = decoder._child.pid
    Path(f"/proc/{process}/clear_refs").write_text("5")  # reset the peak
    before = _peak_megabytes(process)
    decoder([strip], [bytes(16)])
    assert _peak_megabytes(process) - before < 50


# ---------------------------------------------------------------------- orientation


@pytest.mark.parametrize(
    ("kind", "resize"),
    [
        ("JPEG", "squash"),
        ("JPEG", "crop"),
        ("TIFF", "squash"),
        ("PNG", "squash"),
        ("WEBP", "squash"),
    ],
)
def test_exif_orientation_is_applied(kind: str, resize: str, photos: list[bytes]) -> None:
    # Tolerance: mean absolute difference 1 of 255, because pixels are resampled in another order; a
    # wrong rotation differs by more than 20. 80 x 64 is cropped to 56 x 56 with even margins.
    photo = Image.open(io.BytesIO(photos[0])).convert("RGB").resize((80, 64))
    options = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    files, upright_files = [], []
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        files.append(_encode(photo, kind, exif=exif, **options))
        turned = ImageOps.exif_transpose(Image.open(io.BytesIO(files[-1]))).convert("RGB")
        upright_files.append(_encode(turned, "PNG"))
    decoder = Decoder(PixelConfig(size=56, resize=resize), batch_size=8, threads=1)
    (expected,), _ = decoder(upright_files, _ids(upright_files))
    (pixels,), faults = decoder(files, _ids(files))
    assert faults == [None] * 8
    differences = [round(_mean_difference(pixels[row], expected[row]), 1) for row in range(8)]
    sideways = [
        _mean_difference(expected[0], expected[0].rot90(turns, (1, 2))) for turns in (1, 2, 3)
    ]
    assert min(sideways) > 20
    assert max(differences) < 1, differences


def test_an_image_with_truncated_exif_is_not_rotated(
    decoder: Decoder, photos: list[bytes], clean_pixels: torch.Tensor
) -> None:
    for block in (
        b"Exif\0\0",
        b"Exif\0\0MM\0*\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
    ):
        segment = b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block
        truncated = photos[0][:2] + segment + photos[0][2:]
        (pixels,), faults = decoder([truncated], _ids([truncated]))
        assert faults == [None]
        assert torch.equal(pixels[0], clean_pixels[0])


# -------------------------------------------------------------------------------- sizes


def _resize_with_torchvision(image: Image.Image, resize: str, side: int) -> torch.Tensor:
    """Resize with torchvision's antialiased bilinear filter; uint8 (3, S, S)."""
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    if resize == "squash":
        return reference.resize(pixels, [side, side], antialias=True)
    if resize == "crop":
        resized = reference.resize(pixels, [round(side * 8 / 7)], antialias=True)
        return reference.center_crop(resized, [side, side])
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    left, top = (side - width + 1) // 2, (side - height + 1) // 2  # our rule; torchvision has none
    padding = (left, top, side - width - left, side - height - top)
    return reference.pad(reference.resize(pixels, [height, width], antialias=True), list(padding))


@pytest.mark.parametrize("side", [64, 224])
@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
def test_resize_rules_match_torchvision_within_tolerance(
    resize: str, side: int, photos: list[bytes]
) -> None:
    # Tolerance: mean absolute difference 1.5 of 255 per image. Rounding of sizes and coordinates
    # stays below it; a shift by one pixel does not.
    images = [Image.open(io.BytesIO(photo)).convert("RGB") for photo in photos[:24]]
    files = [
        _encode(image, "PNG") for image in images
    ]  # lossless, so that both decoders give the same pixels
    decoder = Decoder(PixelConfig(size=side, resize=resize), batch_size=24, threads=2)
    (pixels,), faults = decoder(files, _ids(files))
    assert faults == [None] * 24
    differences = {
        images[row].size: round(
            _mean_difference(pixels[row], _resize_with_torchvision(images[row], resize, side)), 2
        )
        for row in range(24)
    }
    assert max(differences.values()) < 1.5, differences


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_grey_palette_and_cmyk_images_are_converted_to_rgb(mode: str, photos: list[bytes]) -> None:
    image = Image.open(io.BytesIO(photos[0])).convert(mode)
    data = _encode(image, "TIFF" if mode == "CMYK" else "PNG")
    decoder = Decoder(PixelConfig(size=SIDE, resize="squash"), batch_size=1, threads=1)
    (pixels,), faults = decoder([data], [bytes(16)])
    assert faults == [None]
    assert (
        _mean_difference(pixels[0], _resize_with_torchvision(image.convert("RGB"), "squash", SIDE))
        < 3
    )


# -------------------------------------------------------------------------------- views


def test_augmented_views_depend_only_on_seed_image_and_view(
    photos: list[bytes], clean_pixels: torch.Tensor
) -> None:
    batch, ids = photos[:12], _ids(photos[:12])
    config = PixelConfig(size=SIDE, views=3)
    views, _ = Decoder(config, batch_size=12, threads=2)(batch, ids)
    assert torch.equal(views[0][:12], clean_pixels[:12])

    reversed_views, _ = Decoder(config, batch_size=5, threads=1)(batch[4::-1], ids[4::-1])
    for view, repeated in zip(views, reversed_views, strict=True):
        assert torch.equal(view[:5], repeated[:5].flip(0))

    other, _ = Decoder(PixelConfig(size=SIDE, views=3, augment_seed=1), batch_size=12, threads=2)(
        batch, ids
    )
    assert torch.equal(other[0], views[0])
    for row in range(12):
        assert _mean_difference(views[1][row], views[2][row]) > 1
        assert _mean_difference(views[1][row], views[0][row]) > 1
        assert _mean_difference(views[1][row], other[1][row]) > 1


def test_a_broken_image_does_not_change_augmented_views_of_others(photos: list[bytes]) -> None:
    decoder = Decoder(PixelConfig(size=SIDE, views=2), batch_size=8, threads=2)
    files, ids = photos[:8], _ids(photos[:8])
    clean, _ = decoder(files, ids)
    broken = [*files[:3], files[3][: len(files[3]) // 2], b"", *files[5:]]
    views, faults = decoder(broken, ids)
    assert [row for row, fault in enumerate(faults) if fault] == [3, 4]
    for row in range(8):
        for view, before in zip(views, clean, strict=True):
            assert not view[row].any() if row in (3, 4) else torch.equal(view[row], before[row])


def test_top_down_augmentation_includes_quarter_turns(photos: list[bytes]) -> None:
    files = photos[:1] * 24
    ids = [bytes([n]) * 16 for n in range(24)]
    top_down = Decoder(
        PixelConfig(size=SIDE, views=2, augment="top-down"), batch_size=24, threads=2
    )(files, ids)[0][1]
    side_on = Decoder(PixelConfig(size=SIDE, views=2), batch_size=24, threads=2)(files, ids)[0][1]
    same = sum(torch.equal(top_down[row], side_on[row]) for row in range(24))
    assert 0 < same < 16


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
def test_without_augmentation_every_view_equals_the_clean_one(
    resize: str, photos: list[bytes]
) -> None:
    config = PixelConfig(size=SIDE, views=2, augment="none", resize=resize)
    views, _ = Decoder(config, batch_size=8, threads=2)(photos[:8], _ids(photos[:8]))
    assert _mean_difference(views[0][:8], views[1][:8]) < 0.5


@pytest.mark.parametrize(
    "bad", [{"size": 8}, {"size": 4096}, {"views": 0}, {"views": 256}, {"max_pixels": 0}]
)
def test_pixel_settings_out_of_range_are_refused_in_three_parts(bad: dict[str, int]) -> None:
    with pytest.raises(ConfigError) as refusal:
        PixelConfig(**bad)
    assert all((refusal.value.found, refusal.value.wanted, refusal.value.do))
