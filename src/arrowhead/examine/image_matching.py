"""Compare the pixels of two images: do they show the same photo?

    file -> thumbnail       grey, longer side 64 pixels
      -> whole images       both stretched to a square; 8 orientations
      -> a part of one      the middle of one is searched in the other; mirrored or not, 15 sizes
      -> similarity         the highest normalized cross-correlation: 1 for the same photo

Template matching by normalized cross-correlation (Lewis, "Fast Normalized Cross-Correlation",
1995), computed with the FFT. The correlation does not depend on brightness and contrast. The whole
images find copies that were resized, compressed, stretched, turned or mirrored; the part finds
cropped copies and those with a border. Only details of a certain size count (a difference of
Gaussians), which keeps two photos of a dark animal on a bright ground apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from arrowhead.decode import pillow_images

SIDE = 64  # pixels of a thumbnail's longer side
STRETCHED_SIDE = 32
MARGIN = 7  # pixels of a stretched image that are left out on each side: two frames are alike
SQUARE_SIDE = STRETCHED_SIDE - 2 * MARGIN
FINE_SIGMA, COARSE_SIGMA = 0.8, 2.5  # pixels: details between these sizes are compared
TEMPLATE_SHARE = 0.62  # of width and height: a crop that keeps the middle contains it
SCALES = tuple(1.07**step for step in range(-7, 8))  # 0.62 to 1.61
MIN_TEMPLATE_SIDE = 8  # pixels
NEAR = 3  # pixels between two places that count as one
# Correlations from which two images are the same photo; see bench/duplicates.py.
MIN_WHOLE, MIN_PART = 0.8, 0.82
# A part of a woven or tiled pattern is found in every such pattern, and there at many places. So
# images whose middle correlates this much with itself elsewhere must also match clearly better at
# one place than at any other, unless they are almost equal.
MIN_REPETITION, MIN_DISTINCT, EQUAL_PATTERN = 0.5, 0.1, 0.95
MIN_ROUGH = 0.55  # with a third of the sizes; below, the others are not tried
MIN_CONTRAST = 2.0  # grey levels: standard deviation below which an image is of one colour
MAX_FLAT_DIFFERENCE = 8.0  # grey levels between two images of one colour that are the same
MIN_WINDOW_ENERGY = 0.1  # of the mean: what a part needs to be compared

Thumbnail = NDArray[np.uint8]
Grey = NDArray[np.float32]


def decode_thumbnail(data: bytes) -> Thumbnail | str:
    """Decode a file in grey, uint8 (H, W) with a longer side of SIDE pixels; or return a fault."""
    grey = pillow_images.decode_small_grey(data, SIDE)
    return grey if isinstance(grey, str) else thumbnail(grey)


def thumbnail(grey: NDArray[Any]) -> Thumbnail:
    """Resize grey pixels (H, W), 0 to 255, to a longer side of SIDE pixels."""
    from PIL import Image

    factor = SIDE / max(grey.shape)
    height, width = (max(MIN_TEMPLATE_SIDE, round(n * factor)) for n in grey.shape)
    image = Image.fromarray(grey.astype(np.float32))
    resized = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    return resized.round().clip(0, 255).astype(np.uint8)


def is_flat(grey: Thumbnail) -> bool:
    """Whether a thumbnail is of one colour, so that there are no details to compare."""
    return float(grey.std()) < MIN_CONTRAST


def square_details(grey: Thumbnail) -> Grey:
    """The details of a whole thumbnail, stretched to a square, without its margin.

    Returns:
        float32 (SQUARE_SIDE, SQUARE_SIDE) with mean 0 and norm 1; zeros for one colour.
    """
    if is_flat(grey):
        return np.zeros((SQUARE_SIDE, SQUARE_SIDE), np.float32)
    down, across = (_resizing(n, STRETCHED_SIDE, 0.0, float(n)) for n in grey.shape)
    stretched = _product(down, grey.astype(np.float32), across)
    return _normalize(_details(stretched)[MARGIN:-MARGIN, MARGIN:-MARGIN])


def turn_alike(square_NHW: Grey, pattern: Grey) -> Grey:
    """Turn each square to the one of its 8 orientations that correlates most with a pattern.

    All orientations of an image give the same result, so turned and mirrored copies become equal.
    A copy with small differences can give another orientation where two correlate almost equally;
    use several patterns.
    """
    forms = list(orientations(square_NHW))
    best_N = np.stack([(form * pattern).sum((1, 2)) for form in forms]).argmax(0)
    turned_NHW = np.empty_like(square_NHW)
    for number, form in enumerate(forms):
        turned_NHW[best_N == number] = form[best_N == number]
    return turned_NHW


def smooth_pattern(generator: np.random.Generator) -> Grey:
    """A random pattern with details of the size that is compared, for `turn_alike`."""
    noise = generator.standard_normal((SQUARE_SIDE, SQUARE_SIDE)).astype(np.float32)
    return _normalize(_details(noise))


def similarity(one: Thumbnail, other: Thumbnail) -> tuple[float, float]:
    """How alike two images are as a whole, and at best in part.

    Args:
        one: A thumbnail.
        other: Another one.

    Returns:
        Two correlations, 0 to 1. Of the same photo both are near 1, or the second alone if one is
        a crop or has a border. The second is 0 if the first is at least MIN_WHOLE, and so needs no
        confirmation. Two images of one colour have 1 and 0 if it is the same, else 0 and 0.
    """
    if is_flat(one) or is_flat(other):
        difference = abs(float(one.mean()) - float(other.mean()))
        same = is_flat(one) and is_flat(other) and difference <= MAX_FLAT_DIFFERENCE
        return float(same), 0.0
    square = square_details(other)
    wholes = [float((turned * square).sum()) for turned in orientations(square_details(one))]
    whole, match = max(wholes), _Match(0.0, 0.0)
    if whole < MIN_WHOLE:
        match = _best_match(one, other, SCALES[1::3])
        if match.similarity >= MIN_ROUGH:
            match = max(match, _best_match(one, other, SCALES))
    part = match.similarity
    if (
        is_same_photo(whole, part)
        and max(whole, part) < EQUAL_PATTERN
        and max(repetition(one), repetition(other)) >= MIN_REPETITION
    ):
        if whole >= MIN_WHOLE:  # then the parts were not compared
            turned = list(orientations(one))[int(np.argmax(wholes))]
            match = _best_match(turned, other, SCALES)
        if match.similarity - match.elsewhere < MIN_DISTINCT:
            return 0.0, 0.0
    return min(1.0, max(0.0, whole)), min(1.0, max(0.0, part))


class _Match(NamedTuple):
    """The place where the middle of one image correlates most with a part of another.

    Attributes:
        similarity: The correlation there.
        elsewhere: The highest one at the same scale, more than NEAR pixels away.
    """

    similarity: float
    elsewhere: float


def _best_match(one: Thumbnail, other: Thumbnail, scales: Sequence[float]) -> _Match:
    """The best match of the middle of one in the other, or the other way round."""
    return max(_match_middle(one, other, scales), _match_middle(other, one, scales))


def repetition(grey: Thumbnail) -> float:
    """The highest correlation of the middle of an image with itself at another place, -1 to 1.

    Places are more than NEAR pixels apart, and at least half of the middle overlaps.
    """
    from scipy import fft

    part = _normalize(_details(_middle(grey.astype(np.float32), 1.0)))
    height, width = part.shape
    shape = (2 * height, 2 * width)
    spectrum, ones = fft.rfft2(part, shape), fft.rfft2(np.ones_like(part), shape)
    energies = fft.rfft2(np.square(part), shape)
    product = fft.irfft2(spectrum * np.conj(spectrum), shape)
    first = fft.irfft2(np.conj(energies) * ones, shape)  # of the pixels that overlap
    second = fft.irfft2(energies * np.conj(ones), shape)
    down = np.minimum(np.arange(2 * height), 2 * height - np.arange(2 * height))[:, None]
    right = np.minimum(np.arange(2 * width), 2 * width - np.arange(2 * width))[None]
    overlap = (height - down).clip(0) * (width - right).clip(0)
    elsewhere = (2 * overlap >= height * width) & (down**2 + right**2 > NEAR**2)
    return float((product / np.sqrt((first * second).clip(1e-9)))[elsewhere].max())


def is_same_photo(whole: float, part: float) -> bool:
    """Whether similarities say that two images show the same photo."""
    return whole >= MIN_WHOLE or part >= MIN_PART


def orientations(pixels: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """The eight turned and mirrored forms of an image, or of several, (…, H, W)."""
    for form in (pixels, pixels[..., ::-1]):
        for quarter_turns in range(4):
            yield np.rot90(form, quarter_turns, axes=(-2, -1))


def _match_middle(image: Thumbnail, template: Thumbnail, scales: Sequence[float]) -> _Match:
    """The best match of the middle of `template` with a part of `image`."""
    from scipy import fft

    shape = (SIDE, SIDE)  # a template that lies inside the image does not wrap around
    details = _details(image.astype(np.float32))
    forms = np.stack([details, details[:, ::-1]])
    spectrum_FHW = fft.rfft2(forms, shape)
    # Sums over all rectangles from the upper left corner.
    sums_FHW = np.pad(np.square(forms, dtype=np.float64), ((0, 0), (1, 0), (1, 0)))
    sums_FHW = sums_FHW.cumsum(1).cumsum(2)
    best, best_FHW, grey = -1.0, np.zeros((1, 1, 1)), template.astype(np.float32)
    for scale in scales:
        part = _middle(grey, scale)
        height, width = part.shape
        if height > details.shape[0] or width > details.shape[1]:
            continue
        if float(part.std()) < MIN_CONTRAST:
            continue
        spectrum = np.conj(fft.rfft2(_normalize(_details(part)), shape))
        energy_FHW = (
            sums_FHW[:, height:, width:]
            - sums_FHW[:, :-height, width:]
            - sums_FHW[:, height:, :-width]
            + sums_FHW[:, :-height, :-width]
        )
        floor = MIN_WINDOW_ENERGY * sums_FHW[0, -1, -1] * part.size / details.size
        product_FHW = fft.irfft2(spectrum_FHW * spectrum, shape)
        inside = product_FHW[:, : energy_FHW.shape[1], : energy_FHW.shape[2]]
        match_FHW = inside / np.sqrt(np.maximum(energy_FHW, floor))
        if (highest := float(match_FHW.max())) > best:
            best, best_FHW = highest, match_FHW
    form, row, column = np.unravel_index(best_FHW.argmax(), best_FHW.shape)
    down = np.arange(best_FHW.shape[1])[:, None] - row
    right = np.arange(best_FHW.shape[2]) - column
    is_far = down**2 + right**2 > NEAR**2
    return _Match(best, float(best_FHW[form].max(where=is_far, initial=-1.0)))


def _middle(grey: Grey, scale: float) -> Grey:
    """The middle of an image, resized by `scale`."""
    down, across = (_resizing(n, *_middle_of(n, scale)) for n in grey.shape)
    return _product(down, grey, across)


def _middle_of(side: int, scale: float) -> tuple[int, float, float]:
    """Pixels of the middle of a side, resized by `scale`; where it begins and ends."""
    pixels = max(MIN_TEMPLATE_SIDE, round(side * TEMPLATE_SHARE * scale))
    length = min(side, pixels / scale)
    return pixels, (side - length) / 2, (side + length) / 2


def _details(grey: Grey) -> Grey:
    """The details between two sizes: a difference of Gaussians."""
    (fine_down, coarse_down), (fine_across, coarse_across) = map(_smoothing, grey.shape)
    return _product(fine_down, grey, fine_across) - _product(coarse_down, grey, coarse_across)


def _product(down: Grey, grey: Grey, across: Grey) -> Grey:
    """Apply one matrix to the columns of pixels and one to their rows."""
    product: Grey = np.matmul(np.matmul(down, grey), across.T)
    return product


# Resizing and smoothing are linear and treat rows and columns alike, and thumbnails have few
# sizes: as products with small matrices, comparing two images takes half the time.


@cache
def _smoothing(side: int) -> tuple[Grey, Grey]:
    """What smooths one axis of `side` pixels for fine and for coarse details, (side, side)."""
    from scipy import ndimage

    fine, coarse = (
        ndimage.gaussian_filter1d(np.eye(side, dtype=np.float32), sigma, axis=0, mode="nearest")
        for sigma in (FINE_SIGMA, COARSE_SIGMA)
    )
    return fine, coarse


@cache
def _resizing(side: int, pixels: int, first: float, last: float) -> Grey:
    """What resizes one axis from `side` pixels, of those between two places, (pixels, side)."""
    from PIL import Image

    image = Image.fromarray(np.eye(side, dtype=np.float32))
    box = (0.0, first, float(side), last)
    resized = image.resize((side, pixels), Image.Resampling.BICUBIC, box=box)
    return np.asarray(resized, dtype=np.float32)


def _normalize(details: Grey) -> Grey:
    """The same with mean 0 and norm 1; zeros if there is almost nothing."""
    centred = details - details.mean()
    norm = float(np.linalg.norm(centred))
    return centred / norm if norm > 1e-3 else np.zeros_like(centred)
