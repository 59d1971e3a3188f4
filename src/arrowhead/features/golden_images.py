"""Golden images: copies of a few photos, with which other machines are checked.

    photos       -> save_candidates       after an extraction: candidates are copied into the store
    candidates   -> bundle.golden.choose  after a training: the clearly decided ones go into the
                                          bundle

Training needs only the store, and the photos may have moved or changed by then; hence the copies.
A copy is only used if its bytes hash to the image id of its features.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from arrowhead.data.catalog import Catalog
from arrowhead.features.store import Store

PER_CLASS = 4
MAX_CANDIDATES = {"valid": 48, "train": 16}
MAX_FILE_BYTES = 8 << 20
MAX_BYTES = 32 << 20  # of all candidates
READERS = 8  # threads


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenConfig:
    """Whether photos are copied as golden images."""

    golden_images: bool = True
    """Keep copies of a few photos (64 in a store, 32 MiB at most; 8 in a bundle). Every machine
    decodes them before it scores, to prove that it computes the same features as this one. They are
    your photos, and whoever gets the bundle gets them."""


def save_candidates(
    store: Store, catalog: Catalog, image_ids: Sequence[bytes], faults: Sequence[str | None]
) -> list[str]:
    """Copy candidates for golden images into the store.

    The choice depends on the contents of the images alone. A photo that has changed since its
    features were computed is left out.

    Args:
        store: where the copies go; copies from an earlier run are reused.
        catalog: the images with their splits.
        image_ids: of every image of the catalog.
        faults: of every image of the catalog; None where it has none.

    Returns:
        The names (image ids in hex) of the copies in the store.
    """
    stored = store.load_golden() or {}
    candidates = _rank_candidates(catalog, image_ids, faults)
    copied = {row: stored[image_ids[row]] for row in candidates if image_ids[row] in stored}
    names = []
    for row, data in _limit_bytes(
        MAX_BYTES, _read_unchanged(catalog, image_ids, candidates, copied)
    ):
        if row not in copied:
            with store.files.atomic_write(store.golden_path(image_ids[row].hex())) as temporary:
                temporary.write_bytes(data)
        names.append(image_ids[row].hex())
    return names


def _rank_candidates(
    catalog: Catalog, image_ids: Sequence[bytes], faults: Sequence[str | None]
) -> list[int]:
    """Rows of the candidates, best first.

    Validation images come before training images; the classes take turns; within a turn images are
    ordered by content.
    """
    count, seen = Counter[tuple[str, tuple[str, ...]]](), set[bytes]()
    ranked: dict[str, list[tuple[int, int]]] = {split: [] for split in MAX_CANDIDATES}
    for row in sorted(range(len(catalog)), key=lambda row: (image_ids[row], row)):
        split = catalog.splits[row]
        if faults[row] or split not in ranked or image_ids[row] in seen:
            continue
        seen.add(image_ids[row])
        group = split, tuple(catalog.labels[row])
        if count[group] < PER_CLASS:
            ranked[split].append((count[group], row))
        count[group] += 1
    # Sorting is stable: within a turn, rows keep the order of their content.
    best = {split: sorted(rows, key=lambda pair: pair[0]) for split, rows in ranked.items()}
    return [row for split, limit in MAX_CANDIDATES.items() for _, row in best[split][:limit]]


def _read_unchanged(
    catalog: Catalog, image_ids: Sequence[bytes], rows: Sequence[int], copied: Mapping[int, bytes]
) -> Iterator[tuple[int, bytes]]:
    """Row and bytes of the images that can be read and still have their image id."""

    def read(row: int) -> tuple[int, bytes]:
        data, fault = (
            (copied[row], None) if row in copied else catalog.read_file(row, MAX_FILE_BYTES)
        )
        is_unchanged = hashlib.blake2b(data, digest_size=16).digest() == image_ids[row]
        return row, data if is_unchanged and not fault else b""

    with ThreadPoolExecutor(READERS, "golden") as readers:
        for start in range(0, len(rows), READERS):  # in batches: the caller may need only a few
            batch = readers.map(read, rows[start : start + READERS])
            yield from ((row, data) for row, data in batch if data)


def _limit_bytes(
    max_bytes: int, images: Iterator[tuple[int, bytes]]
) -> Iterator[tuple[int, bytes]]:
    """Those images that fit into `max_bytes` together, skipping any that does not fit."""
    for row, data in images:
        if len(data) <= max_bytes:
            max_bytes -= len(data)
            yield row, data


def read_candidates(store: Store, catalog: Catalog) -> dict[bytes, bytes]:
    """Read the candidates from the photos, for a store without copies; bytes by image id."""
    shards = list(store.shards())
    image_ids = [image_id for shard in shards for image_id in shard.image_ids]
    faults = [fault for shard in shards for fault in shard.faults]
    candidates = _rank_candidates(catalog, image_ids, faults)
    images = _read_unchanged(catalog, image_ids, candidates, {})
    return {image_ids[row]: data for row, data in _limit_bytes(MAX_BYTES, images)}
