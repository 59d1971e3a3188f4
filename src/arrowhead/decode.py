"""Encoded bytes to pixels.

    B files' bytes         (some are no images at all)
      -> header            read without decoding: size, kind, orientation; what fails is a fault
      -> nvImageCodec      DALI's decoder library; Pillow for what it cannot show as a browser does
      -> DALI              one branch per view: resized, augmented
      -> upright           EXIF orientation, applied by us
      -> uint8             (B, S, S, 3) per view; faults

A row never moves: a bad image leaves a black hole in its place and a fault beside it, so its
neighbours come out the same with it or without it. The same definition serves the CPU and, with
`device` a CUDA number, the GPU (hardware JPEG engine where there is one). A file may still kill
the process that decodes it: `guard` runs this room in one of its own.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from arrowhead import ConfigError, formats

# What Pillow may open here: formats whose readers are its own or those of a browser.
PILLOW = ("GIF", "PNG", "WEBP", "BMP", "TIFF", "AVIF", "JPEG")
CROPPED_AS_STORED, CROPPED_UPRIGHT = "dali", "dali-upright"
RULES = (CROPPED_AS_STORED, CROPPED_UPRIGHT)
"""A recipe's `decoder`: where the middle of a photo is that EXIF turns, when a pixel is over. As it
is stored (older stores), or as it is seen. Photos that are not turned come out the same."""
FLOOD = 65536  # words of decoders that are kept; after so many, every file of the batch is asked
GROUP = 50_000_000  # pixels decoded before they are resized: 150 MB; on a GPU ten times as many


def must_know(rule: str) -> None:
    """Refuse a recipe's `decoder` that is not one of RULES."""
    if rule not in RULES:
        raise ConfigError(
            f"The recipe's decoder is {rule!r}.",
            f"one that this version of Arrowhead has: {', '.join(RULES)}.",
            "use the Arrowhead version that made the store or bundle, or a newer one.",
        )


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
    max_scans: int = 100
    """JPEGs with more scans are refused before they are decoded (usual progressive ones: 10)."""

    def __post_init__(self) -> None:
        for knob, value, low, high in (
            ("size", self.size, 16, 2048),
            ("views", self.views, 1, 255),
            ("max-pixels", self.max_pixels, 1, 2**31 - 1),
            ("max-scans", self.max_scans, 1, 2**31 - 1),
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
class Pixels:
    """What b files came out as.

    views: one uint8 (rows, S, S, 3) per view, rows >= b; black where faulty or past the last file.
    faults: b, None when the image is well. fallback: b, whether Pillow decoded it.
    seconds: time it took.
    """

    views: list[NDArray[np.uint8]]
    faults: list[str | None]
    fallback: list[bool]
    seconds: float = 0.0


# ------------------------------------------------------------------------------ headers


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself before it is decoded: pixels, and the EXIF orientation (1..8).

    stream: nvImageCodec's handle, None for what Pillow decodes.
    """

    height: int
    width: int
    orientation: int
    stream: Any = None


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
        return _pillow_header(data, config)
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
        return _pillow_header(data, config)
    if height * width > config.max_pixels:
        return _too_large(width, height, config)
    if min(height, width, channels) < 1:
        return f"unsupported: {width} x {height} pixels in {channels} channels"
    orientation = jpeg.orientation if jpeg else _orientation(data)
    by_pillow = not jpeg and (channels in (2, 4) or formats.is_special(data))
    return Header(height, width, orientation, None if by_pillow else stream)


def _orientation(data: bytes) -> int:
    """The orientation of a PNG or WebP. Only where it names one: Pillow decodes a PNG to look."""
    return _turn(_opened(data)) if b"eXIf" in data or b"EXIF" in data else 1


def _turn(image: Any) -> int:
    """The EXIF orientation of an image that Pillow has opened, 1 if it names none or is torn."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = image.getexif().get(0x0112, 1)
    except Exception:
        return 1
    return value if value in range(1, 9) else 1


def _too_large(width: int, height: int, config: PixelConfig) -> str:
    return f"too large: {width} x {height} pixels, more than {config.max_pixels}"


# ------------------------------------------------------------------------------- Pillow


def _opened(data: bytes) -> Any:
    """Pillow's image of a file, not decoded yet."""
    from PIL import Image

    Image.init()  # else a format named in PILLOW may not be there yet
    return Image.open(io.BytesIO(data), formats=PILLOW)


def _pillow_header(data: bytes, config: PixelConfig) -> Header | str:
    from PIL import Image

    known = formats.SIGNATURES.items()
    kind = next((name for start, name in known if data.startswith(start)), None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = _opened(data)
            width, height = image.size
            raw = image.format == "TIFF" and formats.is_raw(image.tag_v2)
    except Image.DecompressionBombError:
        return f"too large: more than {config.max_pixels} pixels"
    except Exception as error:
        words = _plain(str(error))
        if not kind:
            return f"not an image: it starts with {data[:8].hex(' ')}"
        return f"{'truncated' if _cut_short(words) else 'unsupported'}: {kind}, {words}"
    if height * width > config.max_pixels:
        return _too_large(width, height, config)
    if raw:
        return f"unsupported: {formats.RAW}: {formats.DEVELOP}"
    # A TIFF is turned by Pillow itself; what turns an AVIF is not in its EXIF block.
    return Header(height, width, 1 if image.format == "TIFF" else _turn(image))


def _by_pillow(data: bytes) -> NDArray[np.uint8] | str:
    """uint8 (H, W, 3), as a browser shows the image on a white page; or a fault."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = _opened(data)
            image.load()
            if image.mode.startswith("I;16"):  # convert would clip at 255
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, (255, 255, 255, 255))
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return np.asarray(image.convert("RGB"))
    except Exception as error:
        words = _plain(str(error)) or type(error).__name__
        return f"{'truncated' if _cut_short(words) else 'corrupt'}: {words}"


def _plain(words: str) -> str:
    """Words fit for a row: printable, on one line, the same in every run."""
    words = re.sub(r"\x1b\[[0-9;]*m|<[^>]* at 0x[0-9a-f]+>|/\S+/", "", words)
    return "".join(c if c.isprintable() else " " for c in " ".join(words.split()))[:200].strip()


def _cut_short(words: str) -> bool:
    return bool(re.search(r"truncated|[Pp]remature end|[Uu]nexpected end|not big enough", words))


# ------------------------------------------------------------------------------ decoding


class Decoder:
    """Batches of encoded images to batches of pixels; holds one codec and one DALI pipeline.

    device: a CUDA device number, or None for the CPU. threads: decoding threads. said: gives what
    the decoders wrote to stderr since it was last asked; they say there why an image failed.
    rule: the recipe's `decoder`, one of RULES; ConfigError for another.
    """

    def __init__(
        self,
        config: PixelConfig,
        *,
        batch_size: int,
        threads: int,
        device: int | None = None,
        said: Callable[[], str] = lambda: "",
        rule: str = CROPPED_UPRIGHT,
    ) -> None:
        from PIL import Image

        # DALI's OpenCV fallback would undo the limit that libjpeg-turbo sets on bombs.
        os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(config.max_pixels))
        Image.MAX_IMAGE_PIXELS = config.max_pixels
        must_know(rule)
        self.config, self.batch_size = config, batch_size
        self._upright = rule == CROPPED_UPRIGHT
        self._said, self._device = said, device
        self._fed: list[list[Any]] = []
        self._pipeline = _pipeline(config, batch_size, threads, device, lambda: self._fed)
        self._cpu = _cpu_codec(threads if device is None else 1)
        if device is not None:
            import torch

            torch.cuda.set_device(device)
            self._gpu = _gpu_codec(threads, device)
        said()

    def __call__(
        self,
        encoded: Sequence[bytes],
        image_ids: Sequence[bytes],
        into: NDArray[np.uint8] | None = None,
    ) -> Pixels:
        """Pixels and faults of up to `batch_size` files; exactly as many rows as files.

        into: uint8 (views, b or more, S, S, 3), memory to write them to.
        """
        headers = [header(data, self.config) for data in encoded]
        faults: list[str | None] = [h if isinstance(h, str) else None for h in headers]
        side = self.config.size
        if into is None:
            into = np.empty((self.config.views, len(encoded), side, side, 3), np.uint8)
        views = [view[: len(encoded)] for view in into]
        well = [i for i, fault in enumerate(faults) if fault is None]
        for rows in _groups(well, headers, GROUP if self._device is None else 10 * GROUP):
            images = self._images(rows, encoded, headers, faults)
            self._shape(images, image_ids, headers, views)
        for view in views:
            view[[fault is not None for fault in faults]] = 0
        fallback = [
            isinstance(found, Header) and found.stream is None and fault is None
            for found, fault in zip(headers, faults, strict=True)
        ]
        return Pixels(views, faults, fallback)

    def _images(
        self,
        rows: list[int],
        encoded: Sequence[bytes],
        headers: list[Any],
        faults: list[str | None],
    ) -> dict[int, Any]:
        """The decoded images (H, W, 3) of these rows that are well; faults of the others."""
        images: dict[int, Any]
        images = {i: _by_pillow(encoded[i]) for i in rows if headers[i].stream is None}
        self._said()
        ours = [i for i in rows if headers[i].stream is not None]
        images |= dict(zip(ours, self._decode([headers[i] for i in ours]), strict=True))
        # One complaint in a batch does not say whose it is: the suspects are asked one by one, on
        # the CPU, whose decoders say what they found. The GPU's keep silent of a JPEG cut short.
        doubted = _damaged(self._said())
        for i in ours:
            jpeg = encoded[i].startswith(b"\xff\xd8")
            cut = self._device is not None and not _ends(encoded[i])
            if images[i] is None or (jpeg and (doubted or cut)):
                again, words = _on_cpu(self._cpu, [headers[i]])[0], self._said()
                if again is None or _damaged(words):
                    images[i] = _verdict(encoded[i], words)
                elif images[i] is None:  # else a bad mate would choose who decodes this one
                    images[i] = again
        for i in rows:
            if isinstance(images[i], str):
                faults[i] = images.pop(i)
            elif headers[i].stream is None:
                height, width, _ = images[i].shape
                headers[i] = replace(headers[i], height=height, width=width)
        return images

    def _decode(self, headers: list[Header]) -> list[Any]:
        """One image (H, W, 3) per header, None where decoding failed; on the device asked for."""
        if not headers:
            return []
        if self._device is None:
            return _on_cpu(self._cpu, headers)
        import torch

        made = self._gpu.decode([found.stream for found in headers], params=_params())
        return [None if m is None else torch.utils.dlpack.from_dlpack(m) for m in made]

    def _shape(
        self,
        images: dict[int, Any],
        image_ids: Sequence[bytes],
        headers: list[Any],
        views: list[NDArray[np.uint8]],
    ) -> None:
        """Resize, augment and turn these images into their rows of `views`."""
        if not images:
            return
        rows = list(images)
        self._fed = [[self._placed(image) for image in images.values()]]
        mirrored = [_mirrored(headers[i].orientation) & self._upright for i in rows]
        if self.config.resize == "pad":
            self._fed += [[np.where(its, BEFORE, MIDDLE) for its in mirrored]]
        else:
            frames = [
                frame(self.config, headers[i], m) for i, m in zip(rows, mirrored, strict=True)
            ]
            self._fed += [[start for start, _ in frames], [end for _, end in frames]]
        for number in range(1, self.config.views if self.config.policy != "none" else 1):
            shots = [shot(self.config, image_ids[i], number) for i in rows]
            self._fed += [[s.anchor for s in shots], [s.shape for s in shots]]
            self._fed += [[s.angle for s in shots], [s.light for s in shots]]
        made = [batch.as_cpu() for batch in self._pipeline.run()]
        for number, (view, batch) in enumerate(zip(views, itertools.cycle(made), strict=False)):
            for i, square in zip(rows, batch.as_array(), strict=True):
                upright = _upright(square, headers[i].orientation)
                # Mirrored after it is upright: left and right are the viewer's.
                if number:
                    upright = _turned(upright, shot(self.config, image_ids[i], number))
                view[i] = upright

    def _placed(self, image: Any) -> Any:
        """An image on the device that resizes it."""
        if self._device is None or not isinstance(image, np.ndarray):
            return image
        import torch

        return torch.from_numpy(image.copy()).to(f"cuda:{self._device}")


FANCY = ":fancy_upsampling=1"  # nvImageCodec's default differs between its versions


def _params() -> Any:
    from nvidia import nvimgcodec as nv

    # Two EXIF blocks that disagree overrun a buffer where the library turns the image.
    return nv.DecodeParams(apply_exif_orientation=False, color_spec=nv.ColorSpec.SRGB)


def _gpu_codec(threads: int, device: int) -> Any:
    """The decoder of nvImageCodec on a GPU."""
    from nvidia import nvimgcodec as nv

    # A share below 1 for the hardware engine would let an image's mates choose its decoder.
    hardware = nv.Backend(nv.HW_GPU_ONLY, load_hint=1.0)
    others = (nv.GPU_ONLY, nv.HYBRID_CPU_GPU, nv.CPU_ONLY)
    return nv.Decoder(device, threads, [hardware, *(nv.Backend(kind) for kind in others)], FANCY)


def _cpu_codec(threads: int) -> list[Any]:
    """A decoder of nvImageCodec for each thread: one of several threads takes a thread less than
    there are cores, and its caller only waits.
    """
    from nvidia import nvimgcodec as nv

    cpu, backends = nv.NVIMGCODEC_DEVICE_CPU_ONLY, [nv.Backend(nv.CPU_ONLY)]
    return [nv.Decoder(cpu, 1, backends, FANCY) for _ in range(threads)]


def _on_cpu(decoders: list[Any], headers: list[Header]) -> list[NDArray[np.uint8] | None]:
    """One image (H, W, 3) per header in host memory, None where decoding failed."""
    from nvidia import nvimgcodec

    params = _params()
    # Zeros: a decoder that stops half-way without a word must not show what lay there before.
    arrays = [np.zeros((found.height, found.width, 3), np.uint8) for found in headers]
    made: list[Any] = [None] * len(headers)

    def decode(number: int) -> None:
        mine = slice(number, None, len(decoders))
        into = [nvimgcodec.as_image(array) for array in arrays[mine]]
        streams = [found.stream for found in headers[mine]]
        made[mine] = decoders[number].decode(streams, images=into, params=params)

    numbers = range(1, min(len(decoders), len(headers)))
    others = [threading.Thread(target=decode, args=(number,)) for number in numbers]
    for thread in others:
        thread.start()
    decode(0)
    for thread in others:
        thread.join()
    return [a if m is not None else None for a, m in zip(arrays, made, strict=True)]


def _ends(data: bytes) -> bool:
    """Whether a JPEG has its end marker."""
    return data.rstrip(b"\0").endswith(b"\xff\xd9")


def _groups(rows: list[int], headers: list[Any], most: int) -> Iterator[list[int]]:
    """The rows in runs of at most so many pixels, so that big images do not fill the memory."""
    group: list[int] = []
    pixels = 0
    for row in rows:
        size = headers[row].height * headers[row].width
        if group and pixels + size > most:
            yield group
            group, pixels = [], 0
        group.append(row)
        pixels += size
    if group:
        yield group


def _damaged(words: str) -> bool:
    """Whether libjpeg saw damage it decoded past. It says the first only: bytes left over before
    the end marker are the last, and hurt no pixel; browsers and we show such an image.
    (Counted, not looked for line by line: several threads write between one another.)
    """
    harmless = words.count("extraneous bytes before marker 0xd9")
    return len(words) >= FLOOD or words.count("Corrupt JPEG data") > harmless


def _verdict(data: bytes, words: str) -> str:
    """The fault of an image that parsed but did not decode, in the decoder's words."""
    lines = [re.sub(r"\x1b\[[0-9;]*m|\[\w+\] *", "", line) for line in words.splitlines()]
    # OpenCV, asked last, stamps its lines with the time; the summary names a position only.
    told = [line for line in lines if line.strip() and "@" not in line and "position" not in line]
    why = _plain(told[0]) if told else "the decoder gave up"
    cut = data.startswith(b"\xff\xd8") and not _ends(data)
    return f"{'truncated' if cut or _cut_short(why) else 'corrupt'}: {why}"


def _pipeline(
    config: PixelConfig, batch_size: int, threads: int, device: int | None, feed: Any
) -> Any:
    from nvidia.dali import fn, pipeline_def, types

    chip = "cpu" if device is None else "gpu"
    side = config.size
    augmented = config.views - 1 if config.policy != "none" else 0
    placing = 1 if config.resize == "pad" else 2
    count = placing + 4 * augmented

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=batch_size, num_threads=threads, device_id=device, prefetch_queue_depth=1
    )
    def images_to_views() -> Any:
        image = fn.external_source(
            lambda: feed()[0],
            device=chip,
            dtype=types.UINT8,
            ndim=3,
            layout="HWC",
            no_copy=device is None,
        )
        numbers = {"dtype": types.FLOAT, "ndim": 1}
        fed: Any = fn.external_source(lambda: feed()[1:], num_outputs=count, **numbers)
        smooth = {"interp_type": types.INTERP_LINEAR, "antialias": True, "device": chip}
        if config.resize == "pad":
            fitted = fn.resize(image, size=[side, side], mode="not_larger", **smooth)
            placed: Any = {"crop_pos_y": fed[0][0], "crop_pos_x": fed[0][1], "device": chip}
            out = [fn.crop(fitted, crop=[side, side], out_of_bounds_policy="pad", **placed)]
        else:
            region = {"roi_start": fed[0], "roi_end": fed[1]}
            out = [fn.resize(image, size=[side, side], **region, **smooth)]
        for at in range(placing, count, 4):
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


MIDDLE = np.float32(0.5)
BEFORE = np.float32(0.4999)  # the middle, but the other pixel of two where half a pixel is over


def frame(
    config: PixelConfig, header: Header, mirrored: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The region of an image that the clean view shows: float32 (y, x) of two corners, in pixels.

    crop is torchvision's Resize(8/7 size), CenterCrop(size), whole pixels included: what it would
    cut out of the resized image is traced back, so only that much is ever resized.

    mirrored: bool (y, x), which sides of the stored picture will be seen from the other end; the
    middle of these is rounded from there.
    """
    whole = np.array([header.height, header.width], np.float64)
    if config.resize != "crop":
        return np.zeros(2, np.float32), whole.astype(np.float32)
    shorter = round(config.size * 8 / 7)
    resized = np.floor(shorter * whole / whole.min())
    start = np.round((resized - config.size) / 2)
    if mirrored is not None:
        start = np.where(mirrored, resized - config.size - start, start)
    scale = whole / resized
    return (start * scale).astype(np.float32), ((start + config.size) * scale).astype(np.float32)


def _mirrored(orientation: int) -> NDArray[np.bool_]:
    """Which sides of a stored picture `_upright` mirrors: bool (y, x)."""
    rows, columns = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return np.array([columns, rows] if orientation >= 5 else [rows, columns])


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


def _upright(image_HWC: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """A square image turned and mirrored as EXIF orientation 1..8 asks (TIFF 6.0, tag 274)."""
    turned = image_HWC.transpose(1, 0, 2) if orientation >= 5 else image_HWC
    if orientation in (3, 4, 7, 8):
        turned = turned[::-1]
    return turned[:, ::-1] if orientation in (2, 3, 6, 7) else turned


def _turned(image_HWC: NDArray[np.uint8], taken: Shot) -> NDArray[np.uint8]:
    """What is left of a shot once DALI has done its part: quarter turns, then the mirror."""
    turned = np.rot90(image_HWC, taken.quarters)
    return turned[:, ::-1] if taken.mirrored else turned
