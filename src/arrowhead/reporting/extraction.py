"""Show what was found in a source of images, and what became of its files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from arrowhead.data.catalog import Catalog
from arrowhead.errors import DataError
from arrowhead.features import corrections, extract, networks, precision
from arrowhead.features.store import Store
from arrowhead.reporting.progress import WorkTotals
from arrowhead.reporting.run_context import Screen
from arrowhead.wording import pluralize

MAX_CLASSES_SHOWN = 6
MAX_MISSING_CLASSES_SHOWN = 10


def show_source(catalog: Catalog, screen: Screen) -> None:
    """Show how the source was read, and its classes."""
    for note in catalog.notes:
        screen.print(note)
    if catalog.classes:
        screen.print(_task(catalog))


def show_taken_back(images: int, screen: Screen) -> None:
    """Show how many images are in the store again that a drop list left out until now."""
    if images:
        screen.print(f"{pluralize(images, 'image')} left out by an earlier --drop: back again")


def show_body(store: Store, screen: Screen) -> None:
    """Show the license of the body's weights, if it is known."""
    origin = store.weights_origin or {}
    if origin.get("license", "unknown") != "unknown":
        source = origin["source"]
        source = source if source.startswith(networks.TUNED_PREFIX) else f"from {source}"
        screen.print(f"body {store.recipe.body}: weights under {origin['license']}, {source}")


def show_precision(store: Store, chosen: str, screen: Screen) -> None:
    """Show what precision was chosen, and whether this machine has no units for the store's."""
    name = store.recipe.body_precision
    if chosen:
        screen.print(chosen)
    if not precision.has_units(name, precision.best_device()):
        screen.print(precision.emulation_line(name))


def _task(catalog: Catalog) -> str:
    """One line: labels per image, the number of classes and their first names."""
    classes = catalog.classes
    if not classes:
        return "no labels"
    names = ", ".join(classes[:MAX_CLASSES_SHOWN])
    if len(classes) > MAX_CLASSES_SHOWN:
        names += f" and {len(classes) - MAX_CLASSES_SHOWN} more"
    kind = "several labels for each image" if catalog.multi else "one label for each image"
    return f"task: {kind}, {pluralize(len(classes), 'class', 'classes')}: {names}"


def show_split(listed: Catalog, split: Catalog, screen: Screen) -> None:
    """Show the sizes of a split that was drawn, and the classes without a validation image.

    listed: the catalog as it was read; its split is "" where one had to be drawn. split: the same
    catalog with every split.
    """
    if not split.classes:
        return
    counts = Counter(split.splits)
    if "" in listed.splits:
        screen.print(
            f"split by content, class by class: {pluralize(counts['train'], 'image')} to train,"
            f" {counts['valid']} to validate"
        )
    validated = {
        name
        for names, part in zip(split.labels, split.splits, strict=True)
        if part == "valid"
        for name in names
    }
    if missing := sorted(set(split.classes) - validated):
        names = ", ".join(missing[:MAX_MISSING_CLASSES_SHOWN])
        if len(missing) > MAX_MISSING_CLASSES_SHOWN:
            names += f" and {len(missing) - MAX_MISSING_CLASSES_SHOWN} more"
        plural = len(missing) > 1
        screen.print(
            f"no image validates {names}: too few different images of"
            f" {'these classes' if plural else 'this class'}, which"
            f" {'are' if plural else 'is'} trained all the same"
        )


def show_store_changes(store: Store, catalog: Catalog, screen: Screen) -> None:
    """Show empty folders, and how the images and classes differ from those of the store."""
    for folder in catalog.empty_folders:
        screen.print(f"{folder}/ holds no image: it is not a class")
    if not (store.path / "manifest.json").is_file():
        return
    _show_replaced_images(store, catalog, screen)
    before, now = set(corrections.source_classes(store)), set(catalog.classes)
    if before != now:
        changes = [
            f"{word} {', '.join(sorted(names))}"
            for word, names in (("gone", before - now), ("new", now - before))
            if names
        ]
        screen.print(
            f"the classes of {store.path} change: {'; '.join(changes)}."
            " Heads trained before keep the classes they were trained with."
        )


def _show_replaced_images(store: Store, catalog: Catalog, screen: Screen) -> None:
    """Show that images of another source are about to replace those of a store."""
    try:
        if store.read_catalog(np.zeros(0, np.int64))["root"] == catalog.root:
            return
        old = Catalog(**store.read_catalog())
    except DataError:  # a damaged catalog is about to be replaced, too
        return
    gone = set(old.paths) - set(catalog.paths)
    if gone:  # else the folder was probably moved
        screen.print(
            f"WARNING: {store.path} holds {pluralize(len(old), 'image')} of {old.root}. The"
            f" {len(catalog)} of {catalog.root} replace them: {len(gone)} are not among these, such"
            f" as {min(gone)}, and their features are dropped. To keep both, stop now (Ctrl-C) and"
            " give another folder."
        )


def show_store(path: Path, screen: Screen) -> None:
    """Show what a finished store holds: counts of files, and the classes."""
    store = Store(path)
    manifest, catalog = store.manifest(), Catalog(**store.read_catalog())
    files = sum(shard["files"] for shard in manifest["shards"])
    faults = sum(shard["faults"] for shard in manifest["shards"])
    screen.print(_file_counts(files - faults, faults, catalog.ignored))
    screen.print(_task(catalog))


def show_extraction(screen: Screen, counts: dict[str, int], work: WorkTotals) -> None:
    """Show the counts of an extraction, and what limited its speed."""
    screen.print(_file_counts(counts["features"], counts["faults"], counts["ignored"]))
    show_throughput(screen, counts, work)


def _file_counts(features: int, faults: int, ignored: int) -> str:
    return (
        f"{pluralize(features + faults + ignored, 'input')} = {pluralize(features, 'feature')}"
        f" + {pluralize(faults, 'fault')}"
        f" + {ignored} ignored"
    )


def show_throughput(screen: Screen, counts: dict[str, int], work: WorkTotals) -> None:
    """Show where the features came from, and what limited the speed."""
    parts = [f"{counts['decoded']} decoded"]
    for name, text in (
        ("looked_up", "not decoded: an image with the same content was"),
        ("skipped", "skipped: done before"),
        ("fallback", "by the fallback decoder"),
        ("repaired", "decoded again on the CPU: the GPU's decoder got them wrong"),
    ):
        if counts[name]:
            parts.append(f"{counts[name]} {text}")
    screen.print(" · ".join(parts))
    screen.print(extract.roofline(work.seconds, work.decoded, work.workers))


def show_damaged_parts(names: list[str], screen: Screen) -> None:
    """Show which parts of the scores are computed again because their files have changed."""
    for name in names:
        screen.print(f"{name} has changed since it was written: its images are scored again")


def show_faults(kinds: Counter[str], paths: Sequence[str], rows: Path, screen: Screen) -> None:
    """Show the faults by kind, the first files, and which Arrow or Parquet files list them all."""
    if kinds:
        screen.print(
            f"not read: {describe_faults(kinds, paths)}; all of them are in the rows of"
            f" {rows} whose column fault is filled"
        )


def describe_faults(kinds: Counter[str], paths: Sequence[str]) -> str:
    """Faults by kind, with the paths of the first files."""
    more = ", …" if kinds.total() > len(paths) else ""
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return f"{counts} ({', '.join(paths)}{more})"
