"""What is in a feature store, whether it is whole, and what in it is not needed.

    info      counts by class and split, faults by kind, recipe, size
    verify    every file against its hash, every row against the catalog; litter, too
    gc        what neither the manifest nor a running extraction refers to; removed on request

Nothing is repaired here: a finding names the file, and what to do.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arrowhead import fileio
from arrowhead.data import chunks
from arrowhead.data.catalog import Catalog
from arrowhead.errors import ConfigError, DataError
from arrowhead.features import extract, store_format
from arrowhead.features.store import Store
from arrowhead.wording import counted


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing wrong with a store.

    kind: changed, missing, misfit (damage: features cannot be trusted), or draft, leftover,
    unfinished (litter: nobody reads it). path: the file. words: what was found, what to do.
    """

    kind: str
    path: str
    words: str

    @property
    def damage(self) -> bool:
        """Whether the store must not be trained on."""
        return self.kind in ("changed", "missing", "misfit")


def info(path: Path) -> dict[str, Any]:
    """What a finished store holds.

    Returns recipe, fingerprint, images and features by split and class, faults by kind, distinct
    (contents), shards, bytes, classes. Raises ConfigError if it is not finished.
    """
    store = Store(path)
    manifest, catalog = store.manifest(), Catalog(**store.read_catalog())
    by_class: dict[str, Counter[str]] = defaultdict(Counter)
    kinds, contents, row = Counter[str](), set[bytes](), 0
    for rows in store.rows():
        for image_id, fault in zip(rows.image_ids, rows.faults, strict=True):
            if fault:
                kinds[fault.partition(":")[0]] += 1
            else:
                contents.add(image_id)
            for name in catalog.labels[row]:
                by_class[name][catalog.splits[row]] += not fault
            row += 1
    faults = kinds.total()
    return {
        "store": str(path),
        "recipe": dataclasses.asdict(store.recipe),
        "fingerprint": store.recipe.fingerprint,
        "classes": manifest["classes"],
        "images": len(catalog),
        "features": len(catalog) - faults,
        "faults": dict(kinds),
        "distinct": len(contents),
        "by_class": {name: dict(counts) for name, counts in sorted(by_class.items())},
        "shards": len(manifest["shards"]),
        "bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        "root": catalog.root,
    }


def verify(path: Path) -> list[Finding]:
    """Everything that is wrong with a store, damage first.

    Raises DataError for a store of another format, or whose own papers (store.json, manifest)
    are missing or have changed.
    """
    store = Store(path)
    manifest = store.manifest()
    found = list(_files(store))
    found += _rows(store, manifest, {one.path for one in found})
    return found + litter(store)


def _files(store: Store) -> Iterator[Finding]:
    """Files that are missing, or not the ones that were written."""
    named = store.hashes()
    named[store.path / "catalog.arrow"] = store.manifest()["catalog"]["sha256"]
    for path, digest in named.items():
        try:
            store_format.must_be_intact(path, digest)
        except DataError as error:
            kind = "changed" if path.is_file() else "missing"
            yield Finding(kind, str(path), f"{error.found} Do: {error.do}")
    for shard in store.manifest()["shards"]:
        file = store.path / "digests" / shard["name"]
        if file.is_file() and file.read_bytes().strip() != shard["sha256"].encode():
            words = "it is not its shard's sha256. Do: delete it, the manifest has that, too"
            yield Finding("changed", str(file), words)
    kept = store.golden() or {}
    for name in store.manifest().get("golden", []):
        file = store.golden_file(name)
        if file.is_file() and bytes.fromhex(name) not in kept:
            words = "its bytes are not the photo's any more. Do: delete it, run precompute again"
            yield Finding("changed", str(file), words)
    try:
        extract.load_weights(store.recipe, store.weights)
    except DataError as error:
        kind = "changed" if store.weights.is_file() else "missing"
        yield Finding(kind, str(store.weights), f"{error.found} Do: {error.do}")


def _rows(store: Store, manifest: dict[str, Any], bad: set[str]) -> Iterator[Finding]:
    """Rows that are not the catalog's: each file once, in order, as the manifest counts them.

    bad: files that are known not to be what was written; they are not looked into.
    """
    catalog = store.path / manifest["catalog"]["name"]
    paths: list[str] = []
    for one in manifest["shards"]:
        path = store.shard(one["name"])
        if str(path) in bad:
            continue
        try:
            rows = store.read(one["name"], check=True)
        except (DataError, ConfigError) as error:
            yield Finding("misfit", str(path), f"{error.found} Do: {error.do}")
            continue
        faults = sum(fault is not None for fault in rows.faults)
        if (len(rows.paths), faults) != (one["files"], one["faults"]):
            held = f"{counted(len(rows.paths), 'file')} and {counted(faults, 'fault')}"
            words = f"{held}; the manifest says {one}"
            yield Finding("misfit", str(path), words)
        paths += rows.paths
    twice = [name for name, count in Counter(paths).items() if count > 1]
    if twice:
        yield Finding(
            "misfit", str(store.path), f"two rows of {counted(len(twice), 'file')}: {twice[:3]}"
        )
    if bad - {str(store.weights)}:
        return
    listed = Catalog(**store.read_catalog())
    if listed.paths != paths:
        yield Finding("misfit", str(catalog), "its files are not those of the shards")
    if listed.classes != manifest["classes"]:
        yield Finding("misfit", str(catalog), "its classes are not those of the manifest")


def litter(store: Store) -> list[Finding]:
    """Drafts, and what neither the manifest nor an unfinished extraction refers to."""
    manifest = store.manifest()
    needed = {one["name"] for one in manifest["shards"]}
    found = []
    if store.pending.is_file():
        try:
            listed = Catalog(**store.read_pending())
            runs = chunks.chunks(listed.paths, store.chunk_size)
            needed |= {chunks.chunk_name(listed, rows, store.recipe.fingerprint) for rows in runs}
        except DataError:  # nobody knows what it needs
            needed |= set(store.on_disk())
        words = "an extraction is under way or was stopped. Do: run the same precompute again"
        found.append(Finding("unfinished", str(store.pending), words))
    for draft in sorted([*store.path.glob(".*.draft"), *store.path.glob("*/.*.draft")]):
        found.append(Finding("draft", str(draft), "left by a killed writer. Do: features gc"))
    for name in store.on_disk():
        if name not in needed:
            words = "no catalog refers to it any more. Do: features gc"
            found.append(Finding("leftover", str(store.shard(name)), words))
    for catalog in sorted(store.path.glob("catalog-*.arrow")):
        if catalog.name != manifest["catalog"]["name"]:
            words = "of an earlier run. Do: features gc"
            found.append(Finding("leftover", str(catalog), words))
    for photo in store.spare_golden(manifest.get("golden", [])):
        found.append(Finding("leftover", str(photo), "no bundle will take it. Do: features gc"))
    return found + list(_spare_digests(store, needed))


def _spare_digests(store: Store, needed: set[str]) -> Iterator[Finding]:
    """Digests of shards that nobody needs."""
    spare = needed | ({store.pending.stem} if store.pending.is_file() else set())
    for file in sorted(store.path.glob("digests/*")):
        if file.name not in spare and not file.name.startswith("."):
            words = "of a shard that no catalog refers to any more. Do: features gc"
            yield Finding("leftover", str(file), words)


def gc(path: Path, *, remove: bool) -> list[Finding]:
    """Drafts and leftovers of a finished store; with `remove`, they are gone when this returns.

    Raises ConfigError if the store was never finished (then everything in it is needed), while
    another command is writing it, or where a folder of the store is a link: what lies at its
    other end may be somebody else's.
    """
    store = Store(path)
    with store.locked():
        found = [one for one in litter(store) if one.kind in ("draft", "leftover")]
        for one in found:
            folder = Path(one.path).parent
            if folder.is_symlink() and folder != path:
                raise ConfigError(
                    f"{folder} is a link to {folder.readlink()}.",
                    "a folder of the store's own: nothing is removed at the other end of a link.",
                    "look there yourself, or put the folder itself in the link's place.",
                )
        for one in found if remove else []:
            fileio.remove(Path(one.path))
    return found
