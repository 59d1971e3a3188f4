"""How images are prepared for a bundle, as settings and as code for other libraries.

The same steps for Pillow and torchvision as those of Arrowhead's decoder: EXIF orientation, resize,
crop. Their pixels differ a little from the decoder's.
"""

from __future__ import annotations

from typing import Any

from arrowhead.features.recipe import Recipe

PIL_FILTERS = {"bicubic": ("BICUBIC", 3)}  # name and number; else bilinear


def resized_side(recipe: Recipe) -> int:
    """The length to which crop resizes the shorter side, in pixels."""
    return round(recipe.size * 8 / 7)


def processor_config(recipe: Recipe) -> dict[str, Any]:
    """The settings as a preprocessor_config.json, with the keys that transformers uses."""
    square = {"height": recipe.size, "width": recipe.size}
    crop = recipe.resize == "crop"
    return {
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": resized_side(recipe)} if crop else square,
        "resample": PIL_FILTERS.get(recipe.interpolation, ("BILINEAR", 2))[1],
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
    how = {
        "crop": f"the shorter side resized to {resized_side(recipe)} pixels and the middle"
        f" {recipe.size} x {recipe.size} cropped",
        "squash": f"both sides resized to {recipe.size} pixels",
        "pad": f"the longer side resized to {recipe.size} pixels and the rest filled with black",
    }[recipe.resize]
    filter_name = PIL_FILTERS.get(recipe.interpolation, ("BILINEAR", 2))[0].lower()
    return (
        f"Images are turned upright (EXIF), converted to RGB, and {how} ({filter_name}, with"
        " antialiasing)."
    )


def transform_code(recipe: Recipe, *, normalized: bool) -> str:
    """Python code that defines `prepare`, from a PIL image to a tensor (3, S, S).

    Args:
        recipe: The bundle's recipe.
        normalized: float32, normalized; else uint8.
    """
    size = recipe.size
    filter_name = PIL_FILTERS.get(recipe.interpolation, ("BILINEAR", 2))[0]
    mode = f"transforms.InterpolationMode.{filter_name}"
    steps = {
        "crop": [
            f"transforms.Resize({resized_side(recipe)}, {mode})",
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
