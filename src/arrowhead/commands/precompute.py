"""From photos to a feature store."""

from __future__ import annotations

import bisect
import dataclasses
from collections import Counter
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from arrowhead import fileio
from arrowhead.commands import chunks
from arrowhead.data import chunks as data_chunks
from arrowhead.data import sources, splits
from arrowhead.data.catalog import Catalog
from arrowhead.features import extract, golden_images
from arrowhead.features.backbone import Body
from arrowhead.features.feature_config import FeatureConfig, resolve_weights
from arrowhead.features.store import Store
from arrowhead.reporting import extraction, recording, run_context
from arrowhead.reporting.progress import Work
from arrowhead.reporting.run_context import RunContext

TRIED_AGAIN = ("unreadable", "decoder_crash")  # faults that the next run may not find
NAMED = 5  # files with faults, by path
MAX_TRIES = 255  # what the catalog's column holds


def precompute(
    data: str | Path | Catalog,
    path: Path,
    images: FeatureConfig,
    context: RunContext = RunContext(),
) -> dict[str, Any]:
    """Make the store at `path` hold a feature of every image of `data` (see `labelled`), which
    may have been listed already.

    Images whose features are there already are not decoded again. Returns counts {inputs,
    features, decoded, looked_up, skipped, reused, fallback, faults, ignored}, faults with their
    paths, seconds by stage, store, fingerprint. Raises ConfigError if the store was made in
    another way or another command is writing it, DataError if something in it has changed.
    """
    began = perf_counter()
    catalog = data if isinstance(data, Catalog) else sources.labelled(data, images.source)
    store = _store(path, images)
    with store.lock(context.screen.say):
        intact = store.intact_shards()
        store.check_unlisted_shards()
        extraction.say_source(catalog, context.screen)
        extraction.say_classes(store, catalog, context.screen)
        catalog = _tried_again(store, catalog, images.extract.max_bytes)
        run_context.params(
            context, {f"recipe.{k}": v for k, v in dataclasses.asdict(store.recipe).items()}
        )
        runs = data_chunks.chunks(catalog.paths, store.chunk_size)
        names = [data_chunks.chunk_name(catalog, rows, store.recipe.fingerprint) for rows in runs]
        store.write_pending(catalog.columns())
        missing = [i for i, name in enumerate(names) if not store.shard_path(name).is_file()]
        total = sum(len(runs[i]) for i in missing)
        args = path, images.pixels, images.extract
        there = len(catalog) - total
        done = chunks.run_chunks(extract.extract, args, missing, total, there, "extract", context)
        manifest, drawn = _complete(store, catalog, names, images, intact)
        extraction.say_split(catalog, drawn, context.screen)
    done.seconds["wall"] = perf_counter() - began
    redone = {names[i] for i in missing}
    skipped = sum(
        one["files"] - one["faults"] for one in manifest["shards"] if one["name"] not in redone
    )
    faults = sum(one["faults"] for one in manifest["shards"])
    counts = _balance(catalog, faults, done, skipped)
    extraction.say_counts(context, counts, done)
    kinds = sum((Counter(one["kinds"]) for one in manifest["shards"]), Counter[str]())
    torn = chunks.fault_list(store) if faults else []
    first = [one["path"] for one in torn[:NAMED]]
    extraction.say_faults(kinds, first, store.path / "shards", context.screen)
    if context.top:
        recording.datasets(context.top, drawn)
    if context.run:
        context.run.record(counts | {f"seconds.{k}": v for k, v in done.seconds.items()})
        context.run.tags({"recipe": store.recipe.fingerprint, "body": store.recipe.body})
    return {
        "counts": counts,
        "faults": torn,
        "fault_kinds": dict(kinds),
        "seconds": dict(done.seconds),
        "roofline": extract.roofline(done.seconds, done.decoded, done.workers),
        "store": str(path),
        "fingerprint": store.recipe.fingerprint,
        "classes": manifest["classes"],
        "too_many_faults": images.extract.too_many(faults, len(catalog)),
    }


def _balance(catalog: Catalog, faults: int, done: Work, skipped: int) -> dict[str, int]:
    """The account of all files that were seen: inputs = features + faults + ignored."""
    features = done.decoded + done.looked_up + skipped
    if features + faults != len(catalog):
        raise AssertionError(
            f"{len(catalog)} images, but {features} features and {faults} faults: {done}"
        )
    return {
        "inputs": features + faults + catalog.ignored,
        "features": features,
        "decoded": done.decoded,
        "looked_up": done.looked_up,
        "skipped": skipped,
        "reused": done.looked_up + skipped,
        "fallback": done.fallback,
        "faults": faults,
        "ignored": catalog.ignored,
    }


def _tried_again(store: Store, catalog: Catalog, max_bytes: int) -> Catalog:
    """The catalog, with one more try for each file that could not be read and now can, and for each
    that the decoder's process died over.

    Its stamp is as before (a permission given leaves it), so only the count of tries gives its
    shard another name.
    """
    if not (store.path / "manifest.json").is_file():
        return catalog
    manifest = store.manifest()
    kept = store.path / manifest["catalog"]["name"]
    passing = [one for one in manifest["shards"] if {*TRIED_AGAIN} & {*one["kinds"]}]
    if not kept.is_file() or not (passing or manifest["catalog"]["tries"]):
        return catalog
    old = Catalog(**store.read_catalog())
    faults = {
        path: fault
        for one in passing
        for rows in [store.read_shard(one["name"])]
        for path, fault in zip(rows.paths, rows.faults, strict=True)
        if fault and fault.startswith(TRIED_AGAIN)
    }
    tries = catalog.tries.copy()
    for was in np.flatnonzero(
        [n > 0 or p in faults for n, p in zip(old.tries, old.paths, strict=True)]
    ):
        row = bisect.bisect_left(catalog.paths, old.paths[was])
        same = row < len(catalog) and catalog.paths[row] == old.paths[was]
        if same and (catalog.sizes[row], catalog.stamps[row]) == (old.sizes[was], old.stamps[was]):
            tries[row] = old.tries[was]
            if old.paths[was] in faults and tries[row] < MAX_TRIES:
                _, fault = catalog.read(row, max_bytes)
                tries[row] += not (fault or "").startswith("unreadable")
    return dataclasses.replace(catalog, tries=tries)


def _store(path: Path, images: FeatureConfig) -> Store:
    """The store for these settings, its body's weights inside."""
    import safetensors.torch

    weights = resolve_weights(path, images.body)
    body = Body(
        images.body.body,
        weights.state,
        pool=images.body.pool,
        mean=weights.mean,
        std=weights.std,
        size=images.pixels.size,
    )
    recipe = extract.make_recipe(images.pixels, images.body, weights, body.width)
    if (path / "store.json").is_file():  # it goes on as it was begun, photo by photo
        recipe = dataclasses.replace(recipe, decoder=Store(path).recipe.decoder)
    store = Store.create(path, recipe, images.extract.chunk_size)
    if not store.weights_path.is_file():
        with fileio.draft(store.weights_path) as draft_file:
            draft_file.write_bytes(safetensors.torch.save(weights.state))
    return store


def _complete(
    store: Store,
    catalog: Catalog,
    names: list[str],
    images: FeatureConfig,
    intact: dict[str, str],
) -> tuple[dict[str, Any], Catalog]:
    """Check that every file has its row, draw the splits, keep golden images, write catalog and
    manifest.
    """
    parts = [store.read_shard(name) for name in names]
    if [path for rows in parts for path in rows.paths] != catalog.paths:
        raise AssertionError("the shards do not hold every file of the catalog once, in order")
    ids = [image_id for rows in parts for image_id in rows.image_ids]
    faults = [fault for rows in parts for fault in rows.faults]
    faulty = [fault is not None for fault in faults]
    drawn = splits.drawn(catalog, ids, images.source.valid_share, faulty)
    kept = (
        golden_images.save_candidates(store, drawn, ids, faults)
        if images.golden.golden_images
        else []
    )
    manifest = store.commit(names, drawn.columns(), intact, kept)
    store.delete_pending()
    return manifest, drawn
