"""How images are prepared for a bundle, as settings and as code for other libraries.

The same steps for Pillow and torchvision as those of Arrowhead's decoder: EXIF orientation, resize,
crop. Their pixels differ a little from the decoder's.
"""

from __future__ import annotations

from typing import Any

from arrowhead.features import extract
from arrowhead.features.recipe import Recipe

PIL_FILTERS = {"bilinear": ("BILINEAR", 2), "bicubic": ("BICUBIC", 3)}  # name and number


def processor_config(recipe: Recipe) -> dict[str, Any]:
    """The settings as a preprocessor_config.json, with the keys that transformers uses."""
    pixels = extract.make_pixel_config(recipe)
    square = {"height": recipe.size, "width": recipe.size}
    crop = recipe.resize == "crop"
    return {
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": pixels.resized_side} if crop else square,
        "resample": PIL_FILTERS[pixels.interpolation or "bilinear"][1],
        "do_center_crop": crop,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(recipe.mean),
        "image_std": list(recipe.std),
        "arrowhead_resize": recipe.resize,
    }


def describe(recipe: Recipe) -> str:
    """The preparation in one sentence."""
    pixels = extract.make_pixel_config(recipe)
    how = {
        "crop": f"the shorter side resized to {pixels.resized_side} pixels and the middle"
        f" {recipe.size} x {recipe.size} cropped",
        "squash": f"both sides resized to {recipe.size} pixels",
        "pad": f"the longer side resized to {recipe.size} pixels and the rest filled with black",
    }[recipe.resize]
    return (
        f"Images are turned upright (EXIF), converted to RGB, and {how}"
        f" ({pixels.interpolation}, with antialiasing)."
    )


def transform_code(recipe: Recipe, *, normalized: bool) -> str:
    """Python code that defines `prepare`, from a PIL image to a tensor (3, S, S).

    Args:
        recipe: The bundle's recipe.
        normalized: float32, normalized; else uint8.
    """
    size, pixels = recipe.size, extract.make_pixel_config(recipe)
    filter_name = PIL_FILTERS[pixels.interpolation or "bilinear"][0]
    mode = f"transforms.InterpolationMode.{filter_name}"
    steps = {
        "crop": [
            f"transforms.Resize({pixels.resized_side}, {mode})",
            f"transforms.CenterCrop({size})",
        ],
        "squash": [f"transforms.Resize(({size}, {size}), {mode})"],
        "pad": [f"lambda image: ImageOps.pad(image, ({size}, {size}), Image.{filter_name})"],
    }[recipe.resize]
    if normalized:
        mean, std = list(recipe.mean), list(recipe.std)
        steps += ["transforms.ToTensor()", f"transforms.Normalize({mean}, {std})"]
    else:
        steps.append("transforms.PILToTensor()")
    lines = "".join(f"        {step},\n" for step in steps)
    return f"prepare = transforms.Compose(\n    [\n{lines}    ]\n)"
