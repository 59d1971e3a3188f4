"""How images become features: as it is asked for, and as a store remembers it.

FeatureConfig   where labels come from, pixels, body, and the working of it
as_in_store     what was asked, completed by the recipe of a store that is there
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arrowhead.data.source_config import SourceConfig
from arrowhead.decode.pixels import PixelConfig
from arrowhead.errors import ConfigError
from arrowhead.features import backbone
from arrowhead.features import extract as features_extract
from arrowhead.features.backbone import BodyConfig, Weights
from arrowhead.features.extract import ExtractConfig
from arrowhead.features.golden_images import GoldenConfig
from arrowhead.features.store import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureConfig:
    """How images become features: where labels come from, pixels, body, and the working of it."""

    source: SourceConfig = SourceConfig()
    pixels: PixelConfig = PixelConfig()
    body: BodyConfig = BodyConfig()
    extract: ExtractConfig = ExtractConfig()
    golden: GoldenConfig = GoldenConfig()


def as_in_store(path: Path, asked: FeatureConfig, given: Collection[str]) -> FeatureConfig:
    """The settings that were asked for, completed by the recipe of the store at `path`.

    given: names of the recipe's settings that the user has said (body, weights, size, …). All
    others are the store's own, its weights too. Without a store nothing changes. Raises ConfigError
    for a setting that contradicts the recipe.
    """
    if not (path / "store.json").is_file():
        return asked
    store = Store(path)
    recipe = store.recipe
    pixels = features_extract.pixels_of(recipe)
    own: dict[str, Any] = {"body": recipe.body, "pool": recipe.pool}
    own |= {"mean": recipe.mean, "std": recipe.std}
    own |= {"size": pixels.size, "resize": pixels.resize, "views": pixels.views}
    if pixels.views > 1:
        own |= {"augment": pixels.augment, "augment_seed": pixels.augment_seed}
    said = {f.name: getattr(asked.body, f.name) for f in dataclasses.fields(BodyConfig)}
    said |= {f.name: getattr(asked.pixels, f.name) for f in dataclasses.fields(PixelConfig)}
    for name, value in own.items():
        if name in given and said[name] != value:
            flag = "--" + name.replace("_", "-")
            mine = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise ConfigError(
                f"{path} was made with {name} = {value}, and {flag} asks for {said[name]}.",
                "one recipe: features made in two ways cannot be compared.",
                f"leave {flag} out (the store's own is used), give {flag} {mine}, or write to"
                " another folder.",
            )
    body = BodyConfig(
        body=recipe.body,
        weights=asked.body.weights
        if "weights" in given or not store.weights.is_file()
        else str(store.weights),
        mean=recipe.mean,
        std=recipe.std,
        pool=recipe.pool,  # type: ignore[arg-type]
    )
    limits = {name: getattr(asked.pixels, name) for name in ("max_pixels", "max_scans")}
    return dataclasses.replace(asked, body=body, pixels=dataclasses.replace(pixels, **limits))


def weights_of(path: Path, body: BodyConfig) -> Weights:
    """The weights that `body` names, or those that the store at `path` keeps.

    Raises DataError if the store's are damaged, ConfigError if others than the store's are named.
    """
    if not (path / "store.json").is_file():
        return backbone.load(body)
    store = Store(path)
    recipe = store.recipe
    if body.weights == str(store.weights):
        state = features_extract.load_weights(recipe, store.weights)
        return Weights(state=state, mean=recipe.mean, std=recipe.std)
    found = backbone.load(body)
    if body.body == recipe.body and found.sha256 != recipe.weights:
        raise ConfigError(
            f"{path} was made with other weights than those of --weights {body.weights}: sha256"
            f" {recipe.weights[:12]}…, not {found.sha256[:12]}….",
            "one recipe: features made in two ways cannot be compared.",
            "leave --weights out (the store keeps its own), or write to another folder."
            if store.weights.is_file()
            else "give --weights as when the store was made, or write to another folder.",
        )
    return found
