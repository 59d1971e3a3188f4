"""Build the pixel cache that fine-tuning reads."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arrowhead.commands import precompute
from arrowhead.data import sources
from arrowhead.data.catalog import Catalog
from arrowhead.decode.pixels import PixelConfig
from arrowhead.errors import ConfigError
from arrowhead.features.corrections import Correction
from arrowhead.features.feature_config import FeatureConfig
from arrowhead.features.golden_images import GoldenConfig
from arrowhead.finetuning import pixel_cache
from arrowhead.finetuning.pixel_cache import PixelCacheConfig, PixelStore
from arrowhead.reporting.run_context import RunContext


def build_pixel_cache(
    data: str | Path | Catalog,
    path: Path,
    images: FeatureConfig,
    cache: PixelCacheConfig = PixelCacheConfig(),
    context: RunContext = RunContext(),
    history: Sequence[Correction] | None = None,
) -> dict[str, Any]:
    """Decode all images into the pixel cache at `path`; skip those that it has already.

    Args:
        data: A catalog, or what `sources.labelled` lists.
        path: The folder of the cache.
        images: Labels, size of the body's input, limits of decoding; `PixelCache` opens the result.
        cache: Size of the images and of the cache.
        context: Where to run, show and record.
        history: Corrected labels, see `precompute`.

    Returns:
        As `precompute`.

    Raises:
        ConfigError: The cache has another recipe, would take too much disk space, or another
            command is writing it.
        DataError: A file of the cache has changed.
    """
    listed = data if isinstance(data, Catalog) else sources.labelled_catalog(data, images.source)
    side = check_cache(path, listed, images.pixels.side, cache)
    recipe = pixel_cache.pixel_recipe(side)
    store = PixelStore.create(path, recipe, pixel_cache.CHUNK_SIZE)
    limits = {name: getattr(images.pixels, name) for name in ("max_pixels", "max_scans")}
    images = dataclasses.replace(
        images,
        pixels=PixelConfig(size=side, resize="squash", interpolation="bicubic", **limits),
        golden=GoldenConfig(golden_images=False),
    )
    result = precompute.fill_store(
        listed, store, images, pixel_cache.write_pixels, context, history
    )
    _delete_unused(store)
    return result


def check_cache(path: Path, catalog: Catalog, size: int, cache: PixelCacheConfig) -> int:
    """The side of the cached images of a body with inputs of `size` pixels.

    Raises:
        ConfigError: The cache has another recipe, or would take too much disk space.
    """
    side = cache.side(size)
    _check_recipe(path, side, size)
    _check_space(path, catalog, side, cache.cache_bytes)
    return side


def _check_recipe(path: Path, side: int, size: int) -> None:
    """Raise ConfigError if there is a pixel cache at `path` with images of another size.

    size: of the body's input; a cache with smaller images is of no use to it.
    """
    if not (path / "store.json").is_file():
        return
    existing = PixelStore(path).recipe
    if existing.size != side:
        reuse = f"give --cache-size {existing.size}, " if existing.size >= size else ""
        raise ConfigError(
            f"{path} holds images of {existing.size} x {existing.size} pixels, and this run needs"
            f" {side} x {side}.",
            "one size in a pixel cache.",
            f"{reuse}write to another folder, or delete {path}: it is made again from the images.",
        )


def _check_space(path: Path, catalog: Catalog, side: int, limit: int) -> None:
    """Raise ConfigError if the cache of these images would be larger than allowed, or than what is
    free on the disk.
    """
    each = side * side * 3
    total = len(catalog) * each
    size = f"{len(catalog)} images of {side} x {side} pixels take {_size(total)}"
    if total > limit:
        fits = pixel_cache.SIDE_MULTIPLE * int(
            (limit / 3 / len(catalog)) ** 0.5 // pixel_cache.SIDE_MULTIPLE
        )
        smaller = f", or --cache-size {fits} (and a --size up to that)" if fits >= 32 else ""
        raise ConfigError(
            f"The pixel cache is too large: {size}.",
            f"at most {_size(limit)} (--cache-bytes {limit}).",
            f"give --cache-bytes {total}{smaller}.",
        )
    present = sum(file.stat().st_size for file in (path / "shards").glob("*.arrow"))
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if total - present > free:
        raise ConfigError(
            f"{path} has too little space for the pixel cache: {size}, {_size(free)} are free.",
            f"{_size(total - present)} of free disk space.",
            "free some, or give an OUT on another disk.",
        )


def _size(count: int) -> str:
    """A number of bytes for people."""
    if count < 10**6:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e9:.1f} GB" if count >= 10**9 else f"{count / 1e6:.1f} MB"


def _delete_unused(store: PixelStore) -> None:
    """Delete the shards of images that are not in the catalog any more, to bound the cache."""
    used = {shard["name"] for shard in store.manifest()["shards"]}
    with store.lock():
        for name in store.shard_names():
            if name not in used:
                store.shard_path(name).unlink()
