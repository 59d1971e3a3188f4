"""A bundle's body as a file for `--weights`, and the settings that use it as the bundle does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from arrowhead.bundle.format import Bundle
from arrowhead.decode.pixels import PixelConfig
from arrowhead.features import extract, networks
from arrowhead.features.backbone import BodyConfig
from arrowhead.features.recipe import Recipe


def write_body(bundle: Bundle, path: Path) -> BodyConfig:
    """Write the body's weights with their source and license; the settings that use them."""
    networks.write_weights(path, bundle.body_state, bundle.lineage.get("weights") or {})
    return body_config(bundle.recipe, path)


def body_config(recipe: Recipe, weights: Path) -> BodyConfig:
    """The settings of a recipe's body with the weights of a file."""
    return BodyConfig(
        body=recipe.body,
        weights=str(weights),
        pool="auto" if recipe.pool == "own" else recipe.pool,  # type: ignore[arg-type]
        mean=recipe.mean,
        std=recipe.std,
        body_precision=recipe.body_precision,  # type: ignore[arg-type]
        accept_license=True,  # asked when the bundle was made
    )


def pixels_of(bundle: Bundle, limits: PixelConfig) -> PixelConfig:
    """How the bundle shows an image to its body, with the limits and the views of `limits`."""
    names = ("max_pixels", "max_scans", "views", "augment", "augment_seed")
    kept = {name: getattr(limits, name) for name in names}
    return dataclasses.replace(extract.make_pixel_config(bundle.recipe.single_view()), **kept)
