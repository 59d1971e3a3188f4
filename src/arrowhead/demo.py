"""Draw photo-like images of three classes, to try Arrowhead without a data set.

The JPEG files lie in `train/<class>/` and `valid/<class>/`, and unlabelled ones to score in `new/`.

Each image shows a still life on a patterned table among clutter: a woven basket, a coil of beads,
or a sprig of leaves. Colours, light, clutter and camera have the same distributions for every
class, so only the subject's shape and texture tell the classes apart.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

CLASSES = ("baskets", "beads", "leaves")
VALID_SHARE = 0.25
NEW_IMAGES = 24
SIZES = ((240, 180), (256, 256), (320, 240), (400, 300), (480, 320), (640, 480))  # width, height

Colour = tuple[int, int, int]
Floats = NDArray[np.float32]


def draw(folder: Path, *, per_class: int = 120, seed: int = 0) -> int:
    """Write FOLDER/{train,valid}/<class>/<name>.jpg and FOLDER/new/<name>.jpg.

    The same arguments write the same bytes. Existing files under other names stay.

    Args:
        folder: Where to write.
        per_class: Images of each class, of which a quarter are for validation.
        seed: Of all random choices.

    Returns:
        The number of images.
    """
    valid = round(per_class * VALID_SHARE)
    for label, name in enumerate(CLASSES):
        for index in range(per_class):
            part = "valid" if index < valid else "train"
            rng = np.random.default_rng([seed, label, index])
            _save(folder / part / name / f"{name}-{index:04d}.jpg", label, rng)
    for index in range(NEW_IMAGES):
        # Another seed than for the training images. The class is drawn at random, so neither a
        # file's name nor its position in the folder reveals it.
        rng = np.random.default_rng([seed, len(CLASSES), index])
        _save(folder / "new" / f"photo-{index:04d}.jpg", int(rng.integers(len(CLASSES))), rng)
    return len(CLASSES) * per_class + NEW_IMAGES


def _save(path: Path, label: int, rng: Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _scene(label, rng).save(path, quality=int(rng.integers(70, 96)))


def _scene(label: int, rng: Generator) -> Image.Image:
    """One RGB photograph with a subject of class CLASSES[label]."""
    width, height = SIZES[rng.integers(len(SIZES))]
    if rng.random() < 0.4:
        width, height = height, width
    image = _ground(width, height, rng)
    _scatter(image, int(rng.integers(3, 7)), rng)
    side = int(min(width, height) * rng.uniform(0.95, 1.15))
    _paste(image, SUBJECTS[CLASSES[label]](side, rng), rng)
    _scatter(image, int(rng.integers(0, 3)), rng)
    return _photograph(image, rng)


def _colour(rng: Generator) -> Colour:
    """A random colour, from the same distribution for every class."""
    hue, saturation, value = rng.random(), rng.uniform(0.1, 0.5), rng.uniform(0.45, 0.9)
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (min(255, round(channel * factor)) for channel in colour)
    return red, green, blue


def _smooth(width: int, height: int, cells: tuple[int, int], rng: Generator) -> Floats:
    """Smooth noise around 0, float32 [height, width], with `cells` (x, y) bumps per side."""
    grid = rng.uniform(-1, 1, (cells[1], cells[0])).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))


def _ground(width: int, height: int, rng: Generator) -> Image.Image:
    """A table top in RGB: two colours mixed by noise, streaked like wood or mottled like stone."""
    first, second = np.array(_colour(rng), np.float32), np.array(_colour(rng), np.float32)
    mix = 0.5 + 0.4 * _smooth(width, height, (3, 3), rng)
    fine = (int(rng.integers(3, 60)), int(rng.integers(3, 60)))
    grain = 1 + rng.uniform(0.02, 0.08) * _smooth(width, height, fine, rng)
    pixels = (first + mix[..., None] * 0.5 * (second - first)) * grain[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _scatter(image: Image.Image, count: int, rng: Generator) -> None:
    """Draw `count` paper scraps, coins and pencils onto the image, each with a hard shadow."""
    pen = ImageDraw.Draw(image)
    for _ in range(count):
        centre = rng.uniform(0, 1, 2) * image.size
        radius = min(image.size) * rng.uniform(0.04, 0.13)
        outline = _outline(radius, rng)
        colour = _colour(rng)
        for offset, shade in ((radius * 0.12, 0.3), (0.0, 1.0)):
            points = (centre + offset + outline).ravel().tolist()
            pen.polygon(points, fill=_shade(colour, shade))


def _outline(radius: float, rng: Generator) -> NDArray[np.float64]:
    """A polygon around the origin in pixels, [corners, 2]: triangle to circle, wide to slender."""
    corners = int(rng.choice((3, 4, 4, 5, 32)))
    angles = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    stretch = rng.uniform(0.15, 1.0)
    points = radius / np.sqrt(stretch) * np.stack([np.cos(angles), stretch * np.sin(angles)], 1)
    rotated: NDArray[np.float64] = points @ _rotation(rng.uniform(0, 2 * np.pi))
    return rotated


def _rotation(angle: float) -> NDArray[np.float64]:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, sin], [-sin, cos]], np.float64)


def _paste(image: Image.Image, tile: Image.Image, rng: Generator) -> None:
    """Rotate an RGBA tile by any angle and paste it with a soft shadow, mostly inside the image."""
    tile = tile.rotate(rng.uniform(0, 360), Image.Resampling.BILINEAR, expand=True)
    free = np.array(image.size) - tile.size
    x, y = (free * rng.uniform(0.1, 0.9, 2)).astype(int).tolist()
    mask = tile.getchannel("A")
    drop = max(2, min(tile.size) // 40)
    shadow = mask.filter(ImageFilter.BoxBlur(drop)).point(lambda alpha: alpha * 0.6)
    image.paste((0, 0, 0), (x + drop, y + drop), shadow)
    image.paste(tile, (x, y), mask)


def _basket(side: int, rng: Generator) -> Image.Image:
    """A woven basket seen from above, round or oval, RGBA [side, side]."""
    strands = rng.uniform(19, 24)
    x = np.arange(side, dtype=np.float32)[None] / side
    cell, within = np.divmod(x * strands, 1)
    bulge = np.sin(np.pi * within)
    # Each cell shows the strand along y or the one along x, each shaded like a cylinder.
    over = (cell + cell.T) % 2 == 0
    light = 0.4 + np.where(over, 0.45 * bulge + 0.25 * bulge.T, 0.25 * bulge + 0.45 * bulge.T)
    colours = np.array([_colour(rng), _colour(rng)], np.float32)
    pixels = colours[over.astype(np.intp)] * light[..., None]
    reach = np.hypot(2 * x - 1, (2 * x.T - 1) / rng.uniform(0.75, 1.0))
    pixels[reach > 0.9] *= 0.75
    tile = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    tile.putalpha(Image.fromarray(((reach < 1) * 255).astype(np.uint8)))
    return tile


def _beads(side: int, rng: Generator) -> Image.Image:
    """A string of glossy beads in a coil, RGBA [side, side]."""
    turns = rng.uniform(3.3, 4.5)
    pitch = side / 2 / (turns + 0.5)
    ball = max(2, int(pitch * 0.46))
    sprites = [_bead(ball, _colour(rng)) for _ in range(2)]
    tile = Image.new("RGBA", (side, side))
    angle = np.pi
    while angle < 2 * np.pi * turns:
        radius = pitch * angle / (2 * np.pi)
        x, y = side / 2 + radius * np.cos(angle), side / 2 + radius * np.sin(angle)
        tile.alpha_composite(sprites[rng.integers(2)], (round(x) - ball, round(y) - ball))
        angle += 2 * ball / radius
    return tile


def _bead(radius: int, colour: Colour) -> Image.Image:
    """A ball lit from one side with a highlight, RGBA [2 * radius + 1, 2 * radius + 1]."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1].astype(np.float32) / radius
    depth = np.sqrt(np.clip(1 - x**2 - y**2, 0, 1))
    facing = np.clip((depth - 0.6 * x - 0.6 * y) / 1.3, 0, 1)[..., None]
    pixels = np.array(colour, np.float32) * (0.4 + 0.7 * facing) + 60 * facing**12
    tile = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    tile.putalpha(Image.fromarray(((depth > 0) * 255).astype(np.uint8)))
    return tile


def _sprig(side: int, rng: Generator) -> Image.Image:
    """A stem with leaves on both sides and one on top, RGBA [side, side]."""
    tile = Image.new("RGBA", (side, side))
    pen = ImageDraw.Draw(tile)
    colours = [_colour(rng), _colour(rng)]
    middle, top = side / 2, side * 0.42
    pen.line((middle, side * 0.98, middle, top), _shade(colours[0], 0.5), side // 50 + 1)
    for pair in reversed(range(int(rng.integers(2, 4)))):
        foot = np.array([middle, top + side * 0.25 * pair])
        for turn in (-1, 1):
            length = side * rng.uniform(0.44, 0.52)
            _leaf(pen, foot, turn * rng.uniform(0.7, 1.2), length, colours[rng.integers(2)])
    _leaf(pen, np.array([middle, top]), 0.0, side * 0.4, colours[0])
    return tile


def _leaf(
    pen: ImageDraw.ImageDraw,
    foot: NDArray[np.float64],
    angle: float,
    length: float,
    colour: Colour,
) -> None:
    """A pointed leaf with midrib and veins; `foot` in pixels, `angle` in radians from upright."""
    turn = _rotation(angle)

    def placed(across: NDArray[np.float64], along: NDArray[np.float64]) -> list[float]:
        points = np.stack([across, -along], 1) * length @ turn + foot
        return [float(value) for value in points.ravel()]

    along = np.linspace(0, 1, 15)
    half = 0.27 * np.sin(np.pi * along**0.8)
    sides = placed(half, along), placed(-half, along)
    for points, light in zip(sides, (1.0, 0.7), strict=True):
        pen.polygon(points, fill=_shade(colour, light), outline=_shade(colour, 0.45))
    thick = max(1, round(length / 40))
    pen.line(placed(0 * along, along), _shade(colour, 1.5), thick)
    for rib, reach in zip(along[1:-3:3], half[3:-1:3], strict=True):
        vein = placed(np.array([-reach, 0, reach]) * 0.9, np.array([rib + 0.13, rib, rib + 0.13]))
        pen.line(vein, _shade(colour, 0.6), thick)


def _photograph(image: Image.Image, rng: Generator) -> Image.Image:
    """The scene with light from one side, slightly out of focus, with sensor noise; RGB."""
    width, height = image.size
    blur = rng.uniform(0.4, 1.2) * min(width, height) / 320
    image = image.filter(ImageFilter.GaussianBlur(blur))
    gradient = rng.uniform(-0.2, 0.2, 2)
    right, down = np.linspace(-1, 1, width), np.linspace(-1, 1, height)[:, None]
    light = 1 + gradient[0] * right + gradient[1] * down
    noise = rng.standard_normal((height, width, 1), np.float32) * rng.uniform(2, 6)
    pixels = np.asarray(image) * light.astype(np.float32)[..., None] + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


SUBJECTS: dict[str, Callable[[int, Generator], Image.Image]] = {
    "baskets": _basket,
    "beads": _beads,
    "leaves": _sprig,
}
