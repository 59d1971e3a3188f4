"""Encoded bytes to pixels.

    B files' bytes         (some are no images at all)
      -> header            read without decoding: size, kind; what fails here is a fault
      -> DALI              decoded once, then one branch per view: resized, augmented
      -> upright           EXIF orientation, applied by us
      -> uint8             (B, 3, S, S) per view, channels last in memory; faults

A row never moves: a bad image leaves a black hole in its place and a fault beside it, so its
neighbours come out the same with it or without it. One pipeline definition serves the CPU and,
with `device` a CUDA number, the GPU (DALI's mixed back end).
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from arrowhead import ConfigError

if TYPE_CHECKING:
    import torch

SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"RIFF": "WebP",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelConfig:
    """From a file to the square that the body sees."""

    size: int = 224
    """Side of the square, in pixels."""
    resize: Literal["crop", "squash", "pad"] = "crop"
    """crop: shorter side to 8/7 of size, the middle cut out (torchvision's rule);
    squash: both sides to size; pad: longer side to size, the rest black."""
    views: int = 1
    """Rows per image: view 0 is clean, the others are augmented."""
    augment: Literal["side-on", "top-down", "none"] = "side-on"
    """Policy of views 1 and up: side-on for photos (crops, mirror, slight turns, light);
    top-down for satellite or microscope images (also quarter turns); none repeats view 0."""
    augment_seed: int = 0
    """Seed of the augmented views; part of the recipe."""
    max_pixels: int = 100_000_000
    """Images whose header claims more pixels are refused before they are decoded."""

    def __post_init__(self) -> None:
        for knob, value, low, high in (
            ("size", self.size, 16, 2048),
            ("views", self.views, 1, 255),
            ("max-pixels", self.max_pixels, 1, 2**31 - 1),
        ):
            if not low <= value <= high:
                raise ConfigError(
                    f"--{knob} is {value}.", f"{low} to {high}.", f"give --{knob} in that range."
                )

    @property
    def policy(self) -> str:
        """The policy as the recipe records it: none when there is nothing to augment."""
        return self.augment if self.views > 1 else "none"


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself before it is decoded: pixels, and the EXIF orientation (1..8)."""

    height: int
    width: int
    orientation: int


def header(data: bytes, max_pixels: int) -> Header | str:
    """The header of an image, or the fault that keeps the image from the decoder.

    DALI dies with the process on a file whose header does not parse, so none gets there.
    """
    from nvidia import nvimgcodec

    if not data:
        return "empty: the file has no bytes"
    kind = next((name for start, name in SIGNATURES.items() if data.startswith(start)), None)
    try:
        stream = nvimgcodec.CodeStream(data)
        height, width = int(stream.height), int(stream.width)
        channels = int(stream.num_channels)
    except Exception as error:
        words = " ".join(str(error).split())[:200]
        return f"unsupported: {kind}, {words}" if kind else f"not an image: {words}"
    if height * width > max_pixels:
        return f"too large: {width} x {height} pixels, more than {max_pixels}"
    if min(height, width, channels) < 1:
        return f"unsupported: {width} x {height} pixels in {channels} channels"
    return Header(height, width, _orientation(data))


def _orientation(data: bytes) -> int:
    # JPEG and TIFF name it near the start; PNG has a chunk eXIf, WebP one at the end, EXIF.
    jpeg = data.startswith(b"\xff\xd8")
    tags = (b"Exif",) if jpeg else (b"Exif", b"eXIf", b"EXIF", b"*\0", b"\0*")
    if not any(tag in data for tag in tags):
        return 1
    from PIL import Image

    try:
        value = Image.open(io.BytesIO(data)).getexif().get(0x0112, 1)
    except Exception:  # a torn EXIF block: the picture stands as it is stored
        return 1
    return value if value in range(1, 9) else 1


class Decoder:
    """Batches of encoded images to batches of pixels; holds one DALI pipeline.

    device: a CUDA device number, or None for the CPU. threads: DALI's decoding threads.
    """

    def __init__(
        self, config: PixelConfig, *, batch_size: int, threads: int, device: int | None = None
    ) -> None:
        # DALI's OpenCV fallback would undo the limit that libjpeg-turbo sets on bombs.
        os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(config.max_pixels))
        self.config, self.batch_size = config, batch_size
        self._fed: list[list[NDArray[Any]]] = []
        self._pipeline = _pipeline(config, batch_size, threads, device, lambda: self._fed)
        self._where = "cpu" if device is None else f"cuda:{device}"

    def __call__(
        self, encoded: Sequence[bytes], image_ids: Sequence[bytes]
    ) -> tuple[list[torch.Tensor], list[str | None]]:
        """Pixels and faults of up to `batch_size` files.

        Returns one uint8 (b, 3, S, S) tensor per view, b the number of files but at least 16
        (networks compute a row to the same last bit in every batch of 16 or more), and one fault
        or None per file. Rows with a fault, and rows past the last file, are black.
        """
        import torch

        headers = [header(data, self.config.max_pixels) for data in encoded]
        faults: list[str | None] = [h if isinstance(h, str) else None for h in headers]
        side, rows = self.config.size, max(16, len(encoded))
        views = [
            torch.zeros((rows, side, side, 3), dtype=torch.uint8, device=self._where)
            for _ in range(self.config.views)
        ]
        well = [i for i, fault in enumerate(faults) if fault is None]
        self._decode(well, encoded, image_ids, headers, views, faults)
        for i, found in enumerate(headers):
            if isinstance(found, Header) and found.orientation != 1:
                for view in views:
                    view[i] = _upright(view[i], found.orientation)
        self._mirror(views, image_ids)
        return [view.permute(0, 3, 1, 2) for view in views], faults

    def _decode(
        self,
        rows: list[int],
        encoded: Sequence[bytes],
        image_ids: Sequence[bytes],
        headers: list[Any],
        views: list[torch.Tensor],
        faults: list[str | None],
    ) -> None:
        """Decode these rows into `views`; halve what fails until the bad image stands alone."""
        import torch

        if not rows:
            return
        self._fed = [[np.frombuffer(encoded[i], np.uint8) for i in rows]]
        if self.config.resize != "pad":
            frames = [frame(self.config, headers[i]) for i in rows]
            self._fed += [[start for start, _ in frames], [end for _, end in frames]]
        for number in range(1, self.config.views if self.config.policy != "none" else 1):
            shots = [shot(self.config, image_ids[i], number) for i in rows]
            self._fed += [[s.anchor for s in shots], [s.shape for s in shots]]
            self._fed += [[s.angle for s in shots], [s.light for s in shots]]
        try:
            made = self._pipeline.run()
        except RuntimeError as error:
            if len(rows) == 1:
                faults[rows[0]] = _verdict(encoded[rows[0]], error)
                return
            half = len(rows) // 2
            self._decode(rows[:half], encoded, image_ids, headers, views, faults)
            self._decode(rows[half:], encoded, image_ids, headers, views, faults)
            return
        for view, batch in zip(views, itertools.cycle(made), strict=False):
            view[rows] = torch.utils.dlpack.from_dlpack(batch.as_tensor())

    def _mirror(self, views: list[torch.Tensor], image_ids: Sequence[bytes]) -> None:
        # After the image is upright: left and right are the viewer's.
        for number, view in enumerate(views[1:], 1):
            for i, image_id in enumerate(image_ids):
                taken = shot(self.config, image_id, number)
                turned = view[i].rot90(taken.quarters) if taken.quarters else view[i]
                view[i] = turned.flip(1) if taken.mirrored else turned.clone()


def _pipeline(
    config: PixelConfig, batch_size: int, threads: int, device: int | None, feed: Any
) -> Any:
    from nvidia.dali import fn, pipeline_def, types

    chip = "cpu" if device is None else "gpu"
    side = config.size
    augmented = config.views - 1 if config.policy != "none" else 0
    framed = config.resize != "pad"
    kinds = [types.UINT8] + [types.FLOAT] * (2 * framed + 4 * augmented)

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=batch_size, num_threads=threads, device_id=device, prefetch_queue_depth=1
    )
    def images_to_views() -> Any:
        fed = fn.external_source(feed, num_outputs=len(kinds), dtype=kinds, ndim=[1] * len(kinds))
        image = fn.decoders.image(
            fed[0],
            device="cpu" if device is None else "mixed",
            output_type=types.RGB,
            adjust_orientation=False,  # two EXIF blocks that disagree overrun DALI's buffer
        )
        smooth = {"interp_type": types.INTERP_LINEAR, "antialias": True, "device": chip}
        if not framed:
            fitted = fn.resize(image, size=[side, side], mode="not_larger", **smooth)
            out = [fn.crop(fitted, crop=[side, side], out_of_bounds_policy="pad", device=chip)]
        else:
            region = {"roi_start": fed[1], "roi_end": fed[2]}
            out = [fn.resize(image, size=[side, side], **region, **smooth)]
        for at in range(1 + 2 * framed, len(kinds), 4):
            anchor, shape, angle, light = fed[at : at + 4]
            cut = fn.slice(image, anchor, shape, axis_names="HW", device=chip)
            square = fn.resize(cut, size=[side, side], **smooth)
            turned = fn.rotate(square, angle=angle, keep_size=True, fill_value=None, device=chip)
            lit = {"brightness": light[0], "contrast": light[1]}
            out.append(fn.brightness_contrast(turned, **lit, device=chip))
        return tuple(out)

    pipeline = images_to_views()
    pipeline.build()
    return pipeline


def frame(config: PixelConfig, header: Header) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The region of an image that the clean view shows: float32 (y, x) of two corners, in pixels.

    crop is torchvision's Resize(8/7 size), CenterCrop(size), whole pixels included: what it would
    cut out of the resized image is traced back, so only that much is ever resized.
    """
    whole = np.array([header.height, header.width], np.float64)
    if config.resize != "crop":
        return np.zeros(2, np.float32), whole.astype(np.float32)
    shorter = round(config.size * 8 / 7)
    resized = np.floor(shorter * whole / whole.min())
    start = np.round((resized - config.size) / 2)
    scale = whole / resized
    return (start * scale).astype(np.float32), ((start + config.size) * scale).astype(np.float32)


def works() -> list[str]:
    """Kinds of files that the decoder opens here, found by decoding one small image of each."""
    from PIL import Image

    kinds = ["JPEG", "PNG", "WebP", "BMP", "TIFF"]
    images = []
    for kind in kinds:
        sheet = io.BytesIO()
        Image.new("RGB", (32, 32), (200, 100, 50)).save(sheet, kind)
        images.append(sheet.getvalue())
    _, faults = Decoder(PixelConfig(size=32), batch_size=16, threads=1)(images, [b""] * len(images))
    return [kind for kind, fault in zip(kinds, faults, strict=True) if fault is None]


@dataclass(frozen=True, slots=True)
class Shot:
    """One augmented view: what is cut out (float32 (y, x) and (h, w), shares of the image), by how
    many degrees it is turned, its (brightness, contrast), quarter turns, whether it is mirrored.
    """

    anchor: NDArray[np.float32]
    shape: NDArray[np.float32]
    angle: NDArray[np.float32]
    light: NDArray[np.float32]
    quarters: int
    mirrored: bool


def shot(config: PixelConfig, image_id: bytes, view: int) -> Shot:
    """The augmentation of one view: a pure function of (seed, image_id, view).

    Random resized crop of half to all of the image, +-10 degrees, +-10 % light and mirroring,
    as in the lesson's side-on transforms; top-down adds quarter turns.
    """
    key = f"{config.augment_seed}/{image_id.hex()}/{view}".encode()
    seed = int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "little")
    draw = np.random.default_rng(seed)
    if config.augment == "none":
        everything = np.ones(2, np.float32), np.zeros(1, np.float32)
        return Shot(np.zeros(2, np.float32), everything[0], everything[1], everything[0], 0, False)
    shape = np.sqrt(draw.uniform(0.5, 1)) * np.exp(draw.uniform(-0.15, 0.15) * np.array([1, -1]))
    shape = np.minimum(shape, 1).astype(np.float32)
    anchor = (draw.uniform(0, 1, 2) * (1 - shape)).astype(np.float32)
    angle = draw.uniform(-10, 10, 1).astype(np.float32)
    light = draw.uniform(0.9, 1.1, 2).astype(np.float32)
    mirrored, quarters = bool(draw.integers(2)), int(draw.integers(4))
    return Shot(
        anchor, shape, angle, light, quarters if config.augment == "top-down" else 0, mirrored
    )


def _upright(image_HWC: torch.Tensor, orientation: int) -> torch.Tensor:
    """A square image turned and mirrored as EXIF orientation 1..8 asks (TIFF 6.0, tag 274)."""
    turned = image_HWC.transpose(0, 1) if orientation >= 5 else image_HWC
    if orientation in (3, 4, 7, 8):
        turned = turned.flip(0)
    if orientation in (2, 3, 6, 7):
        turned = turned.flip(1)
    return turned.clone()


def _verdict(data: bytes, error: RuntimeError) -> str:
    """The fault of an image that parsed but did not decode."""
    cut = data.startswith(b"\xff\xd8") and not data.rstrip(b"\0").endswith(b"\xff\xd9")
    words = [line.strip() for line in str(error).splitlines() if "ailed" in line]
    return f"{'truncated' if cut else 'corrupt'}: {words[-1] if words else 'the decoder gave up'}"
