"""How far other ways from a file to a feature are from ours: what `--max-drift` has to tell apart.

    .venv/bin/python bench/drift.py --bundle out/bundle --data photos/valid [--images 200]

Each way makes a feature of every photo; its *drift* is the cosine distance from the feature that
`score` makes. Printed per way: median and largest drift, labels changed, and between which bounds
the largest of 8 golden images lies in 98 of 100 draws (`score` looks at that one). Ways that only
another decoder or device takes should lie below the default, ways that would spoil the scores
above it.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as transforms

from arrowhead.bundle import format as bundle_format
from arrowhead.bundle import replay
from arrowhead.bundle.format import Bundle
from arrowhead.data import sources

Feature = NDArray[np.float32]


def main() -> None:
    """Measure, print a table, write JSON if asked to."""
    asked = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    asked.add_argument("--bundle", type=Path, required=True)
    asked.add_argument("--data", required=True)
    asked.add_argument("--images", type=int, default=200)
    asked.add_argument("--only", default="", help="ways whose names hold this")
    asked.add_argument("--out", type=Path)
    settings = asked.parse_args()
    made = bundle_format.load(settings.bundle)
    catalog = sources.unlabelled(settings.data)
    rows = np.unique(np.linspace(0, len(catalog) - 1, settings.images).astype(int))
    files = [data for data, fault in (catalog.read(int(r), 2**28) for r in rows) if not fault]
    ours = features(made, made.recipe, files)
    files = [data for data, feature in zip(files, ours, strict=True) if np.isfinite(feature).all()]
    ours = ours[np.isfinite(ours).all(1)]
    label_N = probability_counts(made, ours).argmax(1)
    table = {}
    for name, way in ways(made).items():
        if settings.only not in name:
            continue
        theirs = way(files)
        drift_N = 1 - (ours * theirs).sum(1) / (
            np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
        )
        draws = np.random.default_rng(0).choice(drift_N, (2000, 8)).max(1)
        low, high = np.quantile(draws, [0.01, 0.99])
        table[name] = {
            "median": float(np.median(drift_N)),
            "largest": float(drift_N.max()),
            "largest_of_8": [float(low), float(high)],
            "labels_changed": int((probability_counts(made, theirs).argmax(1) != label_N).sum()),
        }
        print(
            f"{name:<44} median {np.median(drift_N):.1e}  largest {drift_N.max():.1e}  of 8"
            f" {low:.1e} to {high:.1e}  labels {table[name]['labels_changed']}/{len(files)}"
        )
    if settings.out:
        about = {"body": made.recipe.body, "images": len(files), "size": made.recipe.size}
        settings.out.write_text(json.dumps(about | {"ways": table}, indent=1) + "\n")


def probability_counts(made: Bundle, feature_ND: Feature) -> Feature:
    """What the bundle says of features."""
    return bundle_format.probabilities(
        made.make_head(), feature_ND, made.temperature, multi=made.multi
    )


def features(made: Bundle, recipe: Any, files: list[bytes], device: str = "cpu") -> Feature:
    """Features by our own decoder, of this recipe."""
    body = dataclasses.replace(made, recipe=recipe).make_body(device)
    parts = [files[at : at + 32] for at in range(0, len(files), 32)]
    return np.concatenate([replay.clean_features(recipe, body, part, device, 2) for part in parts])


def ways(made: Bundle) -> dict[str, Callable[[list[bytes]], Feature]]:
    """Names and makers of features."""
    recipe, size = made.recipe, made.recipe.size

    def other(**fields: Any) -> Callable[[list[bytes]], Feature]:
        return lambda files: features(made, dataclasses.replace(recipe, **fields), files)

    found: dict[str, Callable[[list[bytes]], Feature]] = {}
    if torch.cuda.is_available():
        found["DALI on a GPU"] = lambda files: features(made, recipe, files, "cuda:0")
    found["one thread, single images"] = lambda files: np.concatenate(
        [features(made, recipe, [data]) for data in files[:32]]
        + [features(made, recipe, files[32:])]
    )
    found["Pillow decodes, DALI resizes"] = lambda files: features(
        made, recipe, [lossless(data) for data in files]
    )
    found["chroma upsampled by repetition"] = lambda files: features(
        made, recipe, [lossless(data, blocky=True) for data in files]
    )
    body = made.make_body()

    def squares(shape: Callable[[Image.Image], Any]) -> Callable[[list[bytes]], Feature]:
        def way(files: list[bytes]) -> Feature:
            parts = []
            for at in range(0, len(files), 32):
                batch = [np.asarray(shape(opened(data))) for data in files[at : at + 32]]
                pixels = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)
                parts.append(body(pixels).numpy().astype(np.float16).astype(np.float32))
            return np.concatenate(parts)

        return way

    def torchvision(interpolation: Any, antialias: bool) -> Callable[[Image.Image], Any]:
        steps = transforms.Compose(
            [
                transforms.PILToTensor(),
                transforms.Resize(round(size * 8 / 7), interpolation, antialias=antialias),
                transforms.CenterCrop(size),
            ]
        )
        return lambda image: steps(image).permute(1, 2, 0).numpy()

    linear, cubic = InterpolationMode.BILINEAR, InterpolationMode.BICUBIC
    if recipe.resize == "crop":
        found["torchvision resizes (bilinear, antialias)"] = squares(torchvision(linear, True))
        found["Pillow resizes (bilinear)"] = squares(
            lambda image: pillow(image, size, Image.Resampling.BILINEAR)
        )
        found["torchvision resizes (bicubic)"] = squares(torchvision(cubic, True))
        found["torchvision resizes without antialias"] = squares(torchvision(linear, False))
        found["squash instead of crop"] = other(resize="squash")
        found["pad instead of crop"] = other(resize="pad")
    half, imagenet = (0.5, 0.5, 0.5), (0.485, 0.456, 0.406)
    found["another mean"] = other(mean=imagenet if recipe.mean == half else half)
    found["another mean and deviation"] = other(
        mean=imagenet if recipe.mean == half else half,
        std=(0.229, 0.224, 0.225) if recipe.std == half else half,
    )
    found["blue and red exchanged"] = lambda files: features(
        made, recipe, [lossless(data, swap=True) for data in files]
    )
    return found


def opened(data: bytes) -> Image.Image:
    """A file by Pillow, upright, RGB."""
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")


def lossless(data: bytes, *, swap: bool = False, blocky: bool = False) -> bytes:
    """A file decoded by Pillow and written so that every decoder gives the same pixels.

    blocky: colour at half the resolution, repeated, as decoders do that do not interpolate it
    (GPU decoders among them): a stand-in where there is no GPU to ask.
    """
    image, sheet = opened(data), io.BytesIO()
    if swap:
        image = Image.merge("RGB", image.split()[::-1])
    if blocky:
        luma, *chroma = image.convert("YCbCr").split()
        half = [one.reduce(2).resize(one.size, Image.Resampling.NEAREST) for one in chroma]
        image = Image.merge("YCbCr", [luma, *half]).convert("RGB")
    image.save(sheet, "PNG", compress_level=1)
    return sheet.getvalue()


def pillow(image: Image.Image, size: int, how: Image.Resampling) -> Image.Image:
    """Shorter side to 8/7 of `size`, the middle cut out."""
    scale = round(size * 8 / 7) / min(image.size)
    wide, high = (round(side * scale) for side in image.size)
    left, top = (wide - size) // 2, (high - size) // 2
    return image.resize((wide, high), how).crop((left, top, left + size, top + size))


if __name__ == "__main__":
    main()
