"""The command precompute: compute the features of images into a feature store."""

from __future__ import annotations

import bisect
import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from arrowhead.commands import chunks
from arrowhead.data import chunks as data_chunks
from arrowhead.data import drop_list, sources, splits
from arrowhead.data.catalog import Catalog
from arrowhead.features import backbone, corrections, extract, golden_images
from arrowhead.features.backbone import Body
from arrowhead.features.corrections import Correction
from arrowhead.features.feature_config import FeatureConfig, resolve_weights
from arrowhead.features.store import Store
from arrowhead.reporting import corrections as reporting_corrections
from arrowhead.reporting import extraction, recording, run_context
from arrowhead.reporting.progress import WorkTotals
from arrowhead.reporting.run_context import RunContext
from arrowhead.wording import shell_command

RETRIED_FAULTS = ("unreadable", "decoder_crash")  # a later run may not have these faults
MAX_FAULTS_SHOWN = 5
MAX_TRIES = 255  # what the catalog's column holds


def precompute(
    data: str | Path | Catalog,
    path: Path,
    images: FeatureConfig,
    context: RunContext = RunContext(),
    history: Sequence[Correction] | None = None,
) -> dict[str, Any]:
    """Compute the features of all images into a store; skip images that it has already.

    Args:
        data: A catalog, or what `sources.labelled` lists.
        path: The folder of the store.
        images: How labels, pixels and features are made.
        context: Where to run, show and record.
        history: Corrected labels to apply and keep, instead of those of the store.

    Returns:
        counts {inputs, features, decoded, looked_up, skipped, reused, fallback, repaired, faults,
        ignored}, the first faults with their paths, faults by kind, seconds by stage, the store.

    Raises:
        ConfigError: If the store has another recipe, or another command is writing it.
        DataError: If a file of the store has changed.
    """
    store, images = _open_store(path, images, context)
    return fill_store(data, store, images, extract.extract, context, history)


def fill_store(
    data: str | Path | Catalog,
    store: Store,
    images: FeatureConfig,
    stage: Callable[..., Any],
    context: RunContext,
    history: Sequence[Correction] | None = None,
) -> dict[str, Any]:
    """Write the shards that a store lacks, with the workers' function `stage`, and its manifest.

    See `precompute`.
    """
    start = perf_counter()
    listed = data if isinstance(data, Catalog) else sources.labelled_catalog(data, images.source)
    with store.lock(context.screen.print):
        intact = store.intact_shards()
        store.check_unlisted_shards()
        if history is None:
            history = corrections.read_history(store)
        if not context.source_shown:
            extraction.show_source(listed, context.screen)
        extraction.show_store_changes(store, listed, context.screen)
        listed = _count_retries(store, listed, images.extract.max_bytes)
        recipe = store.recipe.to_dict()
        run_context.log_params(context, {f"recipe.{k}": v for k, v in recipe.items()})
        names, missing, work = _extract_missing(store, listed, images, stage, context)
        manifest, catalog = _commit(store, listed, names, images, intact, list(history), context)
    work.seconds["wall"] = perf_counter() - start
    skipped = sum(
        shard["files"] - shard["faults"]
        for shard in manifest["shards"]
        if shard["name"] not in missing
    )
    fault_count = sum(shard["faults"] for shard in manifest["shards"])
    counts = _counts(catalog, fault_count, work, skipped)
    kinds = sum((Counter(shard["kinds"]) for shard in manifest["shards"]), Counter[str]())
    faults = chunks.list_faults(store) if fault_count else []
    _report(store, catalog, counts, work, context)
    paths = [one["path"] for one in faults[:MAX_FAULTS_SHOWN]]
    extraction.show_faults(kinds, paths, store.path / "shards", context.screen)
    return {
        "counts": counts,
        "faults": faults,
        "fault_kinds": dict(kinds),
        "seconds": dict(work.seconds),
        "roofline": extract.roofline(work.seconds, work.decoded, work.workers),
        "store": str(store.path),
        "fingerprint": store.recipe.fingerprint,
        "classes": manifest["classes"],
        "too_many_faults": images.extract.too_many(fault_count, len(catalog)),
    }


def _open_store(
    path: Path, images: FeatureConfig, context: RunContext
) -> tuple[Store, FeatureConfig]:
    """Open or create the store for these settings, with the weights of the body in it.

    Returns:
        The store, and the settings with those of the weights where none were given.
    """
    import safetensors.torch

    weights = resolve_weights(path, images.body, images.pixels.size)
    pixels = images.pixels.complete(weights.pixels)
    exists = (path / "store.json").is_file()
    precision, line = images.body.body_precision, ""
    if precision == "auto" and exists:
        precision = Store(path).recipe.body_precision  # type: ignore[assignment]
    elif precision == "auto":
        precision, line = backbone.choose_precision(images.body, weights, pixels.side)
    body = Body(
        images.body.body,
        weights.state,
        pool=images.body.pool,
        mean=weights.mean,
        std=weights.std,
        size=pixels.side,
    )
    body_config = dataclasses.replace(
        images.body,
        pool=body.pool,  # type: ignore[arg-type]
        body_precision=precision,
    )
    images = dataclasses.replace(images, pixels=pixels, body=body_config)
    recipe = extract.make_recipe(pixels, body_config, weights, body.width)
    if exists:  # an older store keeps the decoder that it was begun with
        recipe = dataclasses.replace(recipe, decoder=Store(path).recipe.decoder)
    origin = weights.origin if weights.source else None
    store = Store.create(path, recipe, images.extract.chunk_size, origin)
    extraction.show_body(store, context.screen)
    extraction.show_precision(store, line, context.screen)
    if not store.weights_path.is_file():
        with store.files.atomic_write(store.weights_path) as draft_file:
            draft_file.write_bytes(safetensors.torch.save(weights.state))
    return store, images


def _count_retries(store: Store, catalog: Catalog, max_bytes: int) -> Catalog:
    """Count one more try for each file that could not be read before and now can, and for each that
    crashed the decoder.

    The number of tries is part of a shard's name, so these files are decoded again although their
    size and time are unchanged (a change of permissions leaves both).
    """
    if not (store.path / "manifest.json").is_file():
        return catalog
    manifest = store.manifest()
    old_catalog = store.path / manifest["catalog"]["name"]
    store.files.fetch([old_catalog])
    retried = [one for one in manifest["shards"] if {*RETRIED_FAULTS} & {*one["kinds"]}]
    if not old_catalog.is_file() or not (retried or manifest["catalog"]["tries"]):
        return catalog
    old = Catalog(**store.read_catalog())
    faults = {
        path: fault
        for one in retried
        for rows in [store.read_shard(one["name"])]
        for path, fault in zip(rows.paths, rows.faults, strict=True)
        if fault and fault.startswith(RETRIED_FAULTS)
    }
    tries = catalog.tries.copy()
    for old_row in np.flatnonzero(
        [n > 0 or path in faults for n, path in zip(old.tries, old.paths, strict=True)]
    ):
        path = old.paths[old_row]
        row = bisect.bisect_left(catalog.paths, path)
        if row == len(catalog) or catalog.paths[row] != path:
            continue
        unchanged = (catalog.sizes[row], catalog.stamps[row]) == (
            old.sizes[old_row],
            old.stamps[old_row],
        )
        if unchanged:
            tries[row] = old.tries[old_row]
            if path in faults and tries[row] < MAX_TRIES:
                _, fault = catalog.read_file(row, max_bytes)
                tries[row] += not (fault or "").startswith("unreadable")
    return dataclasses.replace(catalog, tries=tries)


def _extract_missing(
    store: Store,
    catalog: Catalog,
    images: FeatureConfig,
    stage: Callable[..., Any],
    context: RunContext,
) -> tuple[list[str], set[str], WorkTotals]:
    """Compute the shards that the store lacks.

    Returns:
        The names of the catalog's shards, the names of those that were computed, and the work.
    """
    chunk_rows = data_chunks.split_into_chunks(catalog.paths, store.chunk_size)
    names = [data_chunks.shard_name(catalog, rows, store.recipe.fingerprint) for rows in chunk_rows]
    store.write_pending(catalog.columns())
    extraction.show_taken_back(drop_list.remember(store.path, catalog), context.screen)
    done = {*store.shard_names()}
    missing = [i for i, name in enumerate(names) if name not in done]
    total = sum(len(chunk_rows[i]) for i in missing)
    args = store.path, images.pixels, images.extract
    work = chunks.run_chunks(stage, args, missing, total, len(catalog) - total, "extract", context)
    return names, {names[i] for i in missing}, work


def _commit(
    store: Store,
    listed: Catalog,
    names: list[str],
    images: FeatureConfig,
    intact: dict[str, str],
    history: list[Correction],
    context: RunContext,
) -> tuple[dict[str, Any], Catalog]:
    """Apply corrected labels, draw missing splits, save candidates for golden images, write catalog
    and manifest.

    Returns:
        The manifest, and the catalog with every split and the labels to train on.
    """
    store.fetch_shards(names)
    shards = [store.read_shard(name) for name in names]
    if [path for rows in shards for path in rows.paths] != listed.paths:
        raise AssertionError("the shards do not hold every file of the catalog once, in order")
    ids = [image_id for rows in shards for image_id in rows.image_ids]
    faults = [fault for rows in shards for fault in rows.faults]
    is_faulty = [fault is not None for fault in faults]
    corrected = corrections.correct_labels(listed, ids, history, is_faulty)
    # Drawn by the labels before corrections, so that these move no image between splits.
    catalog = splits.draw_splits(
        dataclasses.replace(listed, labels=corrected.before),
        ids,
        images.source.valid_share,
        is_faulty,
        corrected.labels if history else None,
    )
    catalog = corrected.apply(catalog)
    if history:
        reporting_corrections.show_corrected_labels(store.path, catalog, corrected, context.screen)
        do = f"undo the last one: {shell_command(['arrowhead', 'relabel', store.path, '--undo'])}."
        corrections.check_classes(catalog, do)
    golden = (
        golden_images.save_candidates(store, catalog, ids, faults)
        if images.golden.golden_images
        else []
    )
    manifest = store.commit(
        names, catalog.columns(), intact, golden, corrections.history_columns(history)
    )
    store.delete_pending()
    if not context.source_shown:
        extraction.show_split(listed, catalog, context.screen)
    return manifest, catalog


def _counts(catalog: Catalog, faults: int, work: WorkTotals, skipped: int) -> dict[str, int]:
    """Counts of all files, with inputs = features + faults + ignored."""
    features = work.decoded + work.looked_up + skipped
    if features + faults != len(catalog):
        raise AssertionError(
            f"{len(catalog)} images, but {features} features and {faults} faults: {work}"
        )
    return {
        "inputs": features + faults + catalog.ignored,
        "features": features,
        "decoded": work.decoded,
        "looked_up": work.looked_up,
        "skipped": skipped,
        "reused": work.looked_up + skipped,
        "fallback": work.fallback,
        "repaired": work.repaired,
        "faults": faults,
        "ignored": catalog.ignored,
    }


def _report(
    store: Store, catalog: Catalog, counts: dict[str, int], work: WorkTotals, context: RunContext
) -> None:
    extraction.show_extraction(context.screen, counts, work)
    if context.root_run:
        recording.log_datasets(context.root_run, catalog)
    if context.run:
        context.run.record(counts | {f"seconds.{k}": v for k, v in work.seconds.items()})
        license = (store.weights_origin or {}).get("license", "unknown")
        context.run.tags({"recipe": store.recipe.fingerprint, "body": store.recipe.body})
        context.run.tags({"weights_license": license})
