"""A bundle's body as a file for `--weights`, to compute the features of other images with it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from arrowhead import fileio
from arrowhead.bundle.format import Bundle
from arrowhead.decode.pixels import PixelConfig
from arrowhead.features import extract, networks
from arrowhead.features.backbone import BodyConfig


def write_body(bundle: Bundle, path: Path) -> BodyConfig:
    """Write the body's weights with their source and license; the settings that use them."""
    import safetensors.torch

    origin = bundle.lineage.get("weights") or {}
    metadata = {networks.ORIGIN_KEY: json.dumps(origin, sort_keys=True)}
    with fileio.atomic_write(path) as draft:
        draft.write_bytes(safetensors.torch.save(dict(bundle.body_state), metadata))
    recipe = bundle.recipe
    return BodyConfig(
        body=recipe.body,
        weights=str(path),
        pool="auto" if recipe.pool == "own" else recipe.pool,  # type: ignore[arg-type]
        mean=recipe.mean,
        std=recipe.std,
        accept_license=True,  # asked when the bundle was made
    )


def pixels_of(bundle: Bundle, limits: PixelConfig) -> PixelConfig:
    """How the bundle shows an image to its body, with the limits and the views of `limits`."""
    names = ("max_pixels", "max_scans", "views", "augment", "augment_seed")
    kept = {name: getattr(limits, name) for name in names}
    return dataclasses.replace(extract.make_pixel_config(bundle.recipe.single_view()), **kept)
