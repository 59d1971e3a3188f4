"""Measure the drift of features with other preprocessing, to choose the default of `--max-drift`.

    .venv/bin/python bench/drift.py --bundle out/bundle --data photos/valid [--images 200]

Each variant computes a feature for every photo. Its *drift* is the cosine distance from the feature
that `score` computes. For each variant this prints the median and largest drift, the changed
labels, and the range of the largest drift of 8 golden images in 98 of 100 draws (`score` uses that
maximum). Variants that differ only in decoder or device should be below the default, variants that
would make scores wrong above it.
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
    """Measure, print a table, and write JSON with --out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--only", default="", help="variants whose names contain this")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    bundle = bundle_format.load(args.bundle)
    catalog = sources.unlabelled_catalog(args.data)
    rows = np.unique(np.linspace(0, len(catalog) - 1, args.images).astype(int))
    files = [data for data, fault in (catalog.read_file(int(r), 2**28) for r in rows) if not fault]
    feature_ND = features(bundle, bundle.recipe, files)
    finite_N = np.isfinite(feature_ND).all(1)
    files = [data for data, finite in zip(files, finite_N, strict=True) if finite]
    feature_ND = feature_ND[finite_N]
    label_N = probabilities(bundle, feature_ND).argmax(1)
    table = {}
    for name, variant in variants(bundle).items():
        if args.only not in name:
            continue
        other_ND = variant(files)
        drift_N = 1 - (feature_ND * other_ND).sum(1) / (
            np.linalg.norm(feature_ND, axis=1) * np.linalg.norm(other_ND, axis=1)
        )
        draws = np.random.default_rng(0).choice(drift_N, (2000, 8)).max(1)
        low, high = np.quantile(draws, [0.01, 0.99])
        table[name] = {
            "median": float(np.median(drift_N)),
            "largest": float(drift_N.max()),
            "largest_of_8": [float(low), float(high)],
            "labels_changed": int((probabilities(bundle, other_ND).argmax(1) != label_N).sum()),
        }
        print(
            f"{name:<44} median {np.median(drift_N):.1e}  largest {drift_N.max():.1e}  of 8"
            f" {low:.1e} to {high:.1e}  labels {table[name]['labels_changed']}/{len(files)}"
        )
    if args.out:
        about = {"body": bundle.recipe.body, "images": len(files), "size": bundle.recipe.size}
        args.out.write_text(json.dumps(about | {"ways": table}, indent=1) + "\n")


def probabilities(bundle: Bundle, feature_ND: Feature) -> Feature:
    """The bundle's probabilities for these features."""
    return bundle_format.probabilities(
        bundle.make_head(), feature_ND, bundle.temperature, multi=bundle.multi
    )


def features(bundle: Bundle, recipe: Any, files: list[bytes], device: str = "cpu") -> Feature:
    """Features of files by Arrowhead's decoder with this recipe."""
    body = dataclasses.replace(bundle, recipe=recipe).make_body(device)
    parts = [files[at : at + 32] for at in range(0, len(files), 32)]
    return np.concatenate([replay.clean_features(recipe, body, part, device, 2) for part in parts])


def variants(bundle: Bundle) -> dict[str, Callable[[list[bytes]], Feature]]:
    """Functions from files to features, by name."""
    recipe, size = bundle.recipe, bundle.recipe.size

    def other(**fields: Any) -> Callable[[list[bytes]], Feature]:
        return lambda files: features(bundle, dataclasses.replace(recipe, **fields), files)

    result: dict[str, Callable[[list[bytes]], Feature]] = {}
    if torch.cuda.is_available():
        result["DALI on a GPU"] = lambda files: features(bundle, recipe, files, "cuda:0")
    result["one thread, single images"] = lambda files: np.concatenate(
        [features(bundle, recipe, [data]) for data in files[:32]]
        + [features(bundle, recipe, files[32:])]
    )
    result["Pillow decodes, DALI resizes"] = lambda files: features(
        bundle, recipe, [lossless(data) for data in files]
    )
    result["chroma upsampled by repetition"] = lambda files: features(
        bundle, recipe, [lossless(data, blocky=True) for data in files]
    )
    body = bundle.make_body()

    def cropped(shape: Callable[[Image.Image], Any]) -> Callable[[list[bytes]], Feature]:
        def variant(files: list[bytes]) -> Feature:
            parts = []
            for at in range(0, len(files), 32):
                batch = [np.asarray(shape(opened(data))) for data in files[at : at + 32]]
                pixels = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)
                parts.append(body(pixels).numpy().astype(np.float16).astype(np.float32))
            return np.concatenate(parts)

        return variant

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
        result["torchvision resizes (bilinear, antialias)"] = cropped(torchvision(linear, True))
        result["Pillow resizes (bilinear)"] = cropped(
            lambda image: pillow(image, size, Image.Resampling.BILINEAR)
        )
        result["torchvision resizes (bicubic)"] = cropped(torchvision(cubic, True))
        result["torchvision resizes without antialias"] = cropped(torchvision(linear, False))
        result["squash instead of crop"] = other(resize="squash")
        result["pad instead of crop"] = other(resize="pad")
    half, imagenet = (0.5, 0.5, 0.5), (0.485, 0.456, 0.406)
    result["another mean"] = other(mean=imagenet if recipe.mean == half else half)
    result["another mean and deviation"] = other(
        mean=imagenet if recipe.mean == half else half,
        std=(0.229, 0.224, 0.225) if recipe.std == half else half,
    )
    result["blue and red swapped"] = lambda files: features(
        bundle, recipe, [lossless(data, swap=True) for data in files]
    )
    return result


def opened(data: bytes) -> Image.Image:
    """A file decoded by Pillow: upright, RGB."""
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")


def lossless(data: bytes, *, swap: bool = False, blocky: bool = False) -> bytes:
    """A file decoded by Pillow and saved as PNG, which every decoder reads alike.

    blocky: halve the resolution of the colour and repeat its pixels, as decoders without
    interpolation do (GPU decoders among them). It stands in for a GPU where there is none.
    """
    image, output = opened(data), io.BytesIO()
    if swap:
        image = Image.merge("RGB", image.split()[::-1])
    if blocky:
        luma, *chroma = image.convert("YCbCr").split()
        half = [one.reduce(2).resize(one.size, Image.Resampling.NEAREST) for one in chroma]
        image = Image.merge("YCbCr", [luma, *half]).convert("RGB")
    image.save(output, "PNG", compress_level=1)
    return output.getvalue()


def pillow(image: Image.Image, size: int, how: Image.Resampling) -> Image.Image:
    """Resize the shorter side to 8/7 of `size`, then crop the centre."""
    scale = round(size * 8 / 7) / min(image.size)
    wide, high = (round(side * scale) for side in image.size)
    left, top = (wide - size) // 2, (high - size) // 2
    return image.resize((wide, high), how).crop((left, top, left + size, top + size))


if __name__ == "__main__":
    main()
