"""Properties of original images that may explain errors: size, brightness, sharpness …

    rows of the catalog -> sample, drawn by content -> read, decoded small, a few threads
      -> `ImageProperties`

Only a sample of a large store is read, so a million images take no longer than the sample. A file
that is gone, has changed or cannot be decoded has NaN for every property that needs its pixels.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.data.catalog import Catalog
from arrowhead.decode import formats, pillow_images
from arrowhead.errors import ConfigError

SIDE = 256  # pixels of the longer side at which pixels are measured; bodies see about as many
MAX_GREY = 1.0  # colourfulness; a photo in colour has 10 to 100
MAX_THREADS = 8
MAX_BYTES = 256 * 2**20  # as in `ExtractConfig`
SHAPE_PROPERTIES = ("width", "height", "aspect")
PIXEL_PROPERTIES = (*SHAPE_PROPERTIES, "brightness", "contrast", "sharpness", "colourfulness")


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagePropertiesConfig:
    """Which original images are measured."""

    max_images: int = 2000
    """Measure at most this many images, drawn by content; the others have no image properties."""
    max_pixels: int = 100_000_000
    """Images whose header claims more pixels are not decoded."""
    max_scans: int = 100
    """JPEGs with more scans are not decoded (a progressive JPEG usually has 10)."""

    def __post_init__(self) -> None:
        for flag, value in (
            ("max-images", self.max_images),
            ("max-pixels", self.max_pixels),
            ("max-scans", self.max_scans),
        ):
            if value < 1:
                raise ConfigError(f"--{flag} is {value}.", "1 or more.", f"give a larger --{flag}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageProperties:
    """Properties of M original images. Pixels are measured upright, at 256 on the longer side.

    Attributes:
        row: int64 (M,), rows of the catalog, ascending.
        width, height: float64 (M,), pixels of the original, upright.
        aspect: float64 (M,), width / height.
        file_size: float64 (M,), bytes.
        brightness: float64 (M,), mean luminance, 0 to 255.
        contrast: float64 (M,), standard deviation of the luminance (RMS contrast: Peli, "Contrast
            in complex images", J. Opt. Soc. Am. A 7(10), 1990).
        sharpness: float64 (M,), variance of the Laplacian of the luminance (LAP4 in Pertuz et al.,
            "Analysis of focus measure operators", Pattern Recognition 46(5), 2013).
        colourfulness: float64 (M,), the metric of Hasler and Suesstrunk ("Measuring colourfulness
            in natural images", SPIE 5007, 2003, section 7).
        format: M names such as JPEG; "" for a file that cannot be decoded.
        color: M values: grey, color, or "" for a file that cannot be decoded.
    """

    row: NDArray[np.int64]
    width: NDArray[np.float64]
    height: NDArray[np.float64]
    aspect: NDArray[np.float64]
    file_size: NDArray[np.float64]
    brightness: NDArray[np.float64]
    contrast: NDArray[np.float64]
    sharpness: NDArray[np.float64]
    colourfulness: NDArray[np.float64]
    format: list[str]
    color: list[str]

    @property
    def unreadable(self) -> int:
        """Number of images that could not be read or decoded."""
        return self.format.count("")


def sample_rows(
    row_N: NDArray[np.int64], image_id_N: NDArray[np.uint64], max_images: int
) -> NDArray[np.int64]:
    """Draw rows by image content: the order of the images does not change the sample.

    Returns int64 (up to max_images,), ascending.
    """
    order = np.lexsort((row_N, image_id_N))[:max_images]
    return np.sort(row_N[order])


def measure_images(
    catalog: Catalog,
    row_N: NDArray[np.int64],
    image_id_N: NDArray[np.uint64],
    config: ImagePropertiesConfig = ImagePropertiesConfig(),
) -> ImageProperties:
    """Read and measure original images, or a sample of them.

    Args:
        catalog: The images, on a disk or in an object store.
        row_N: Rows of the catalog.
        image_id_N: Their content ids, as in `Features.image_id`.
        config: How many images to measure, and limits of their size.
    """
    row_M = sample_rows(row_N, image_id_N, config.max_images)
    measured: dict[int, Measured | None] = {}
    if len(row_M):
        # Warnings are set up once, because threads share them.
        with warnings.catch_warnings(), ThreadPoolExecutor(_threads()) as pool:
            warnings.simplefilter("ignore")
            found = pool.map(lambda row: _measure_file(catalog, row, config), row_M.tolist())
            measured = dict(zip(row_M.tolist(), found, strict=True))
    return properties_of(catalog, row_M, measured)


def properties_of(
    catalog: Catalog, row_M: NDArray[np.int64], measured_by_row: Mapping[int, Measured | None]
) -> ImageProperties:
    """The properties of some rows, which were measured before.

    Args:
        catalog: The images.
        row_M: Rows of the catalog, ascending.
        measured_by_row: What `measure_image` gives for each of them; None for an unreadable file.
    """
    measured = [measured_by_row[row] for row in row_M.tolist()]
    unknown = (np.nan,) * len(PIXEL_PROPERTIES)
    value_MP = np.array([one.values if one else unknown for one in measured])
    value_MP = value_MP.reshape(len(row_M), len(PIXEL_PROPERTIES))
    value_by_name = dict(zip(PIXEL_PROPERTIES, value_MP.T.copy(), strict=True))
    size_M = catalog.sizes[row_M].astype(np.float64)
    gray_M = value_by_name["colourfulness"] < MAX_GREY
    return ImageProperties(
        row=row_M,
        file_size=np.where(size_M < 0, np.nan, size_M),
        format=[one.format if one else "" for one in measured],
        color=[
            ("grey" if gray else "color") if one else ""
            for one, gray in zip(measured, gray_M, strict=True)
        ],
        **value_by_name,
    )


def _threads() -> int:
    return min(MAX_THREADS, 2 * len(os.sched_getaffinity(0)))


@dataclass(frozen=True, slots=True)
class Measured:
    """Properties of one image.

    Attributes:
        format: Such as JPEG.
        values: In the order of PIXEL_PROPERTIES.
    """

    format: str
    values: tuple[float, ...]


def _measure_file(catalog: Catalog, row: int, config: ImagePropertiesConfig) -> Measured | None:
    data, fault = catalog.read_file(row, MAX_BYTES)
    return None if fault else measure_image(data, config)


def measure_image(
    data: bytes, config: ImagePropertiesConfig = ImagePropertiesConfig()
) -> Measured | None:
    """Measure one encoded image; None if it cannot be decoded."""
    try:
        if formats.unsupported_fault(data) or _is_damaged(data, config.max_scans):
            return None
        image = pillow_images.open_image(data)
        if image.width * image.height > config.max_pixels:
            return None
        return _measure(image)
    except Exception:  # decoders raise many kinds; a bad file has no properties
        return None


def _is_damaged(data: bytes, max_scans: int) -> bool:
    """Whether the file is one that must not get to a decoder (see `decode.headers`)."""
    if data.startswith(b"\xff\xd8\xff"):
        return isinstance(formats.parse_jpeg(data, max_scans), str)
    if data.startswith((b"\x89PNG", b"RIFF")):
        return formats.truncated_fault(data) is not None
    return False


def _measure(image: Any) -> Measured:
    """Measure an open image."""
    width, height = image.size
    orientation = 1 if image.format == "TIFF" else pillow_images.exif_orientation(image)
    if orientation > 4:  # the image is shown rotated by 90 degrees
        width, height = height, width
    name = str(image.format)
    rgb_HWC = _small_pixels(image)
    red, green, blue = rgb_HWC[..., 0], rgb_HWC[..., 1], rgb_HWC[..., 2]
    gray = 0.299 * red + 0.587 * green + 0.114 * blue  # luma of ITU-R BT.601
    padded = np.pad(gray, 1, mode="edge")
    laplacian = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    laplacian -= 4 * gray
    red_green, yellow_blue = red - green, (red + green) / 2 - blue
    deviation = np.hypot(red_green.std(), yellow_blue.std())
    colourfulness = deviation + 0.3 * np.hypot(red_green.mean(), yellow_blue.mean())
    pixels = (gray.mean(), gray.std(), laplacian.var(), colourfulness)
    values = (width, height, width / height, *pixels)
    return Measured(name, tuple(float(value) for value in values))


def _small_pixels(image: Any) -> NDArray[np.float32]:
    """The pixels of an image, float32 (H, W, 3), the longer side being SIDE.

    The properties do not depend on the orientation, so it is not applied.
    """
    from PIL import Image

    image.draft("RGB", (SIDE, SIDE))  # a JPEG is decoded at 1/2, 1/4 or 1/8 of its size
    image.load()
    if image.mode.startswith("I;16"):  # convert("RGB") would clip at 255
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image = image.convert("RGB")
    scale = SIDE / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    image = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    return np.asarray(image, np.float32)
