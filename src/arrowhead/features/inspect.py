"""Describes, verifies and cleans a feature store.

    info      counts by class and split, faults by kind, recipe, size
    verify    compares every file with its hash and every row with the catalog
    gc        lists, and removes on request, files that nothing refers to

Nothing is repaired here: a finding names the file and says what to do.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arrowhead import fileio
from arrowhead.data import chunks
from arrowhead.data.catalog import Catalog
from arrowhead.errors import ConfigError, DataError
from arrowhead.features import corrections, store_format
from arrowhead.features.store import Store
from arrowhead.wording import pluralize


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem with one file of a store.

    Attributes:
        kind: changed, missing or misfit (damage: the features cannot be trusted); or draft,
            leftover or unfinished (a file that readers do not need).
        path: The file.
        words: What was found and what to do.
    """

    kind: str
    path: str
    words: str

    @property
    def damage(self) -> bool:
        """Whether the store must not be trained on."""
        return self.kind in ("changed", "missing", "misfit")


def info(path: Path) -> dict[str, Any]:
    """Describe a finished store.

    Returns:
        A dict for JSON: store, recipe, fingerprint, classes, images, features, faults by kind,
        distinct (image contents), features by class and split, shards, bytes, root, corrections
        (labels: how many differ from the source's; changes: numbers of those in effect).

    Raises:
        ConfigError: the store is not finished.
    """
    store = Store(path)
    manifest, catalog = store.manifest(), Catalog(**store.read_catalog())
    by_class: dict[str, Counter[str]] = defaultdict(Counter)
    fault_kinds, contents, row = Counter[str](), set[bytes](), 0
    for rows in store.shards():
        for image_id, fault in zip(rows.image_ids, rows.faults, strict=True):
            if fault:
                fault_kinds[fault.partition(":")[0]] += 1
            else:
                contents.add(image_id)
            for name in catalog.labels[row]:
                by_class[name][catalog.splits[row]] += not fault
            row += 1
    faults = fault_kinds.total()
    return {
        "store": str(path),
        "recipe": store.recipe.to_dict(),
        "fingerprint": store.recipe.fingerprint,
        "weights": store.weights_origin,
        "classes": manifest["classes"],
        "images": len(catalog),
        "features": len(catalog) - faults,
        "faults": dict(fault_kinds),
        "distinct": len(contents),
        "by_class": {name: dict(counts) for name, counts in sorted(by_class.items())},
        "shards": len(manifest["shards"]),
        "bytes": store.files.size(),
        "root": catalog.root,
        "corrections": {
            "labels": len(catalog.source_labels),
            "changes": corrections.active_changes(corrections.read_history(store)),
        },
    }


def verify(path: Path) -> list[Finding]:
    """Find all problems of a store, damage first.

    Raises DataError for a store of another format, or if store.json or the manifest is missing or
    has changed.
    """
    store = Store(path)
    store.files.fetch_all(again=True)
    manifest = store.manifest()
    findings = list(_check_files(store))
    findings += _check_rows(store, manifest, {finding.path for finding in findings})
    return findings + find_unneeded(store)


def _check_files(store: Store) -> Iterator[Finding]:
    """Find files that are missing or have changed."""
    hashes = store.expected_hashes()
    hashes[store.path / "catalog.arrow"] = store.manifest()["catalog"]["sha256"]
    for path, digest in hashes.items():
        try:
            store_format.check_sha256(path, digest)
        except DataError as error:
            kind = "changed" if path.is_file() else "missing"
            yield Finding(kind, str(path), f"{error.found} Do: {error.do}")
    try:
        corrections.read_history(store)
    except DataError as error:
        file = store.path / store.manifest()["corrections"]["name"]
        kind = "changed" if file.is_file() else "missing"
        yield Finding(kind, str(file), f"{error.found} Do: {error.do}")
    for shard in store.manifest()["shards"]:
        file = store.path / "digests" / shard["name"]
        if file.is_file() and file.read_bytes().strip() != shard["sha256"].encode():
            words = "not the sha256 of its shard. Do: delete it; the manifest has the sha256, too"
            yield Finding("changed", str(file), words)
    intact_images = store.load_golden() or {}
    for name in store.manifest().get("golden", []):
        file = store.golden_path(name)
        if file.is_file() and bytes.fromhex(name) not in intact_images:
            words = "its bytes have changed. Do: delete it and run precompute again"
            yield Finding("changed", str(file), words)
    try:
        from arrowhead.features import extract

        extract.load_weights(store.recipe, store.weights_path)
    except DataError as error:
        kind = "changed" if store.weights_path.is_file() else "missing"
        yield Finding(kind, str(store.weights_path), f"{error.found} Do: {error.do}")


def _check_rows(store: Store, manifest: dict[str, Any], bad_files: set[str]) -> Iterator[Finding]:
    """Find shards that do not agree with the catalog and the manifest.

    bad_files: files that are already known to have changed; they are not read.
    """
    catalog_path = str(store.path / manifest["catalog"]["name"])
    paths: list[str] = []
    for shard in manifest["shards"]:
        path = store.shard_path(shard["name"])
        if str(path) in bad_files:
            continue
        try:
            rows = store.read_shard(shard["name"], check=True)
        except (DataError, ConfigError) as error:
            yield Finding("misfit", str(path), f"{error.found} Do: {error.do}")
            continue
        faults = sum(fault is not None for fault in rows.faults)
        if (len(rows.paths), faults) != (shard["files"], shard["faults"]):
            counts = f"{pluralize(len(rows.paths), 'file')} and {pluralize(faults, 'fault')}"
            yield Finding("misfit", str(path), f"it holds {counts}; the manifest says {shard}")
        paths += rows.paths
    duplicates = [name for name, count in Counter(paths).items() if count > 1]
    if duplicates:
        words = f"more than one row for {pluralize(len(duplicates), 'file')}: {duplicates[:3]}"
        yield Finding("misfit", str(store.path), words)
    if bad_files - {str(store.weights_path)}:
        return
    catalog = Catalog(**store.read_catalog())
    if catalog.paths != paths:
        yield Finding("misfit", catalog_path, "its files are not those of the shards")
    if catalog.classes != manifest["classes"]:
        yield Finding("misfit", catalog_path, "its classes are not those of the manifest")


def find_unneeded(store: Store) -> list[Finding]:
    """Find drafts, and files that neither the manifest nor an unfinished extraction refers to."""
    manifest = store.manifest()
    needed = {shard["name"] for shard in manifest["shards"]}
    findings = []
    if store.pending_path.is_file():
        try:
            pending = Catalog(**store.read_pending())
            for rows in chunks.split_into_chunks(pending.paths, store.chunk_size):
                needed.add(chunks.shard_name(pending, rows, store.recipe.fingerprint))
        except DataError:  # it cannot be read, so any shard may be needed
            needed |= set(store.shard_names())
        words = "an extraction is running or was stopped. Do: run the same precompute again"
        findings.append(Finding("unfinished", str(store.pending_path), words))
    for draft in sorted([*store.path.glob(".*.draft"), *store.path.glob("*/.*.draft")]):
        words = "an unfinished file of a killed process. Do: features gc"
        findings.append(Finding("draft", str(draft), words))
    for name in store.shard_names():
        if name not in needed:
            words = "no catalog refers to it any more. Do: features gc"
            findings.append(Finding("leftover", str(store.shard_path(name)), words))
    for catalog in sorted(store.path.glob("catalog-*.arrow")):
        if catalog.name != manifest["catalog"]["name"]:
            words = "the catalog of an earlier run. Do: features gc"
            findings.append(Finding("leftover", str(catalog), words))
    history = manifest.get("corrections", {"name": ""})["name"]
    for file in sorted(store.path.glob("corrections-*.arrow")):
        if file.name != history:
            words = "the history of corrected labels before the last change. Do: features gc"
            findings.append(Finding("leftover", str(file), words))
    for image in store.unused_golden(manifest.get("golden", [])):
        words = "no longer a golden image. Do: features gc"
        findings.append(Finding("leftover", str(image), words))
    return findings + list(_find_unneeded_digests(store, needed))


def _find_unneeded_digests(store: Store, needed_shards: set[str]) -> Iterator[Finding]:
    needed = needed_shards | ({store.pending_path.stem} if store.pending_path.is_file() else set())
    for file in sorted(store.path.glob("digests/*")):
        if file.name not in needed and not file.name.startswith("."):
            words = "the digest of a shard that no catalog refers to any more. Do: features gc"
            yield Finding("leftover", str(file), words)


def gc(path: Path, *, remove: bool) -> list[Finding]:
    """List the drafts and leftovers of a finished store; with `remove`, also remove them.

    Raises:
        ConfigError: the store was never finished (then every file is needed), another process is
            writing to it, or a folder of the store is a symbolic link, whose target may belong to
            something else.
    """
    store = Store(path)
    with store.lock():
        store.files.fetch_all()
        findings = [one for one in find_unneeded(store) if one.kind in ("draft", "leftover")]
        for finding in findings:
            folder = Path(finding.path).parent
            if folder.is_symlink() and folder != path:
                raise ConfigError(
                    f"{folder} is a link to {folder.readlink()}.",
                    "a folder inside the store: files behind a link are not removed.",
                    "check the files there yourself, or replace the link by the folder itself.",
                )
        for finding in findings if remove else []:
            unneeded = Path(finding.path)
            store.files.remove(unneeded) if unneeded.is_file() else fileio.remove_path(unneeded)
    return findings
