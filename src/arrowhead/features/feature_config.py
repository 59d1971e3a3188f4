"""The settings of a feature extraction, and how an existing store completes them.

FeatureConfig          labels, pixels, body, extraction, golden images
recipe_flags           the flags that give another store the recipe of a store
complete_from_store    takes the settings that the user did not give from a store's recipe
resolve_weights        loads the weights that the settings name, or those of the store
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arrowhead.data import drop_list
from arrowhead.data.source_config import SourceConfig
from arrowhead.decode.pixels import PixelConfig
from arrowhead.errors import ConfigError
from arrowhead.features import backbone
from arrowhead.features import extract as features_extract
from arrowhead.features.backbone import BodyConfig, Weights
from arrowhead.features.extract import ExtractConfig
from arrowhead.features.golden_images import GoldenConfig
from arrowhead.features.networks import BUNDLED_BODY, TIMM_PREFIX
from arrowhead.features.store import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureConfig:
    """All settings of a feature extraction."""

    source: SourceConfig = SourceConfig()
    pixels: PixelConfig = PixelConfig()
    body: BodyConfig = BodyConfig()
    extract: ExtractConfig = ExtractConfig()
    golden: GoldenConfig = GoldenConfig()


def complete_from_store(
    path: Path, config: FeatureConfig, explicit: Collection[str]
) -> FeatureConfig:
    """Replace the settings that the user did not give by those of an existing store: its recipe,
    and the list of images that it leaves out.

    Without a store at `path`, `config` is returned as it is.

    Args:
        path: the store, which need not exist.
        config: the settings, as given or by default.
        explicit: names of the settings that the user gave (body, weights, size, …). All others,
            the weights included, are taken from the store's recipe.

    Raises:
        ConfigError: an explicit setting contradicts the recipe.
    """
    if config.body.weights == "bundled" and "body" not in explicit:
        bundled = dataclasses.replace(config.body, body=BUNDLED_BODY)
        config = dataclasses.replace(config, body=bundled)
    if not (path / "store.json").is_file():
        return config
    recipe = (store := Store(path)).recipe
    pixels = features_extract.make_pixel_config(recipe)
    stored: dict[str, Any] = {n: getattr(recipe, n) for n in ("body", "pool", "mean", "std")}
    stored |= {"size": pixels.size, "resize": pixels.resize, "views": pixels.views}
    stored |= {"interpolation": pixels.interpolation, "crop_pct": pixels.crop_pct}
    if pixels.views > 1:
        stored |= {"augment": pixels.augment, "augment_seed": pixels.augment_seed}
    stored["body_precision"] = recipe.body_precision
    requested = {f.name: getattr(config.body, f.name) for f in dataclasses.fields(BodyConfig)}
    requested |= {f.name: getattr(config.pixels, f.name) for f in dataclasses.fields(PixelConfig)}
    if requested["crop_pct"] and _same_crop(pixels, requested["crop_pct"]):
        requested["crop_pct"] = pixels.crop_pct
    for name, value in stored.items():
        if name in explicit and requested[name] not in (value, None, "auto"):
            flag = "--" + name.replace("_", "-")
            argument = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise ConfigError(
                f"{path} was made with {name} = {value}, and {flag} asks for {requested[name]}.",
                "the same recipe: features of different recipes cannot be compared.",
                f"leave {flag} out (the store's value is used), give {flag} {argument}, or write to"
                " another folder.",
            )
    has_own = "weights" not in explicit and store.weights_path.is_file()
    body = BodyConfig(
        body=recipe.body,
        weights=str(store.weights_path) if has_own else config.body.weights,
        mean=recipe.mean,
        std=recipe.std,
        pool=recipe.pool,  # type: ignore[arg-type]
        body_precision=recipe.body_precision,  # type: ignore[arg-type]
        accept_license=has_own or config.body.accept_license,  # asked when the store was made
    )
    limits = {name: getattr(config.pixels, name) for name in ("max_pixels", "max_scans")}
    source, dropped = config.source, path / drop_list.DROPPED_FILE
    if source.drop is None and dropped.is_file():
        source = dataclasses.replace(source, drop=str(dropped))
    pixels = dataclasses.replace(pixels, **limits)
    return dataclasses.replace(config, source=source, body=body, pixels=pixels)


def _same_crop(pixels: PixelConfig, crop_pct: float) -> bool:
    """Whether another crop_pct gives the same pixels: resized images have whole pixels."""
    return pixels.resize != "pad" and (
        dataclasses.replace(pixels, crop_pct=crop_pct).resized_side == pixels.resized_side
    )


def recipe_flags(store: Store) -> list[str]:
    """The flags with which another store gets the recipe of this one, apart from its views."""
    recipe = store.recipe
    flags = ["--body", recipe.body, "--weights", str(store.weights_path)]
    flags += ["--body-precision", recipe.body_precision]
    for name in ("mean", "std"):
        flags += [f"--{name}", *map(str, getattr(recipe, name))]
    is_timm = recipe.body.startswith(TIMM_PREFIX)
    flags += ["--pool", recipe.pool] if recipe.pool != "avg" or is_timm else []
    pixels, default = features_extract.make_pixel_config(recipe), PixelConfig()
    # A file says nothing of pixels: for a network of torchvision these then have fixed defaults,
    # for one of timm those of its published weights.
    default = dataclasses.replace(
        default.complete(default), crop_pct=pixels.side / round(pixels.side * 8 / 7)
    )
    for name in ("size", "resize", "interpolation", "crop_pct"):
        value = getattr(pixels, name)
        if value is not None and (is_timm or value != getattr(default, name)):
            flags += [f"--{name.replace('_', '-')}", str(value)]
    return flags


def resolve_weights(path: Path, body: BodyConfig, size: int | None = None) -> Weights:
    """Load the weights that `body` names: usually those in the store at `path`, if it exists.

    size: Side of the input in pixels, None for that of the weights.

    Raises:
        DataError: the store's weights are damaged.
        ConfigError: `body` names other weights than those that made the store.
    """
    if not (path / "store.json").is_file():
        return backbone.load(body, size)
    store = Store(path)
    recipe = store.recipe
    if body.weights == str(store.weights_path):
        state = features_extract.load_weights(recipe, store.weights_path)
        pixels = features_extract.make_pixel_config(recipe)
        return Weights(state=state, mean=recipe.mean, std=recipe.std, pixels=pixels)
    weights = backbone.load(body, recipe.size)
    if body.body == recipe.body and weights.sha256 != recipe.weights:
        raise ConfigError(
            f"{path} was made with other weights than --weights {body.weights}: their sha256 is"
            f" {recipe.weights[:12]}…, not {weights.sha256[:12]}….",
            "the same recipe: features of different recipes cannot be compared.",
            "leave --weights out (the store contains its weights), or write to another folder."
            if store.weights_path.is_file()
            else "give the --weights that made the store, or write to another folder.",
        )
    return weights
