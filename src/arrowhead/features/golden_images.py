"""Golden images: a few of the photos themselves, kept to check other machines by.

    photos       -> keep    at the end of an extraction: candidates, copied into the store
    candidates   -> pick    at the end of a training: the clearly decided ones, for the bundle

A store is enough to train: the photos may have moved or changed by then. A copy is only used when
its bytes hash to the image id that the features were stored under.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from arrowhead import fileio
from arrowhead.data.catalog import Catalog
from arrowhead.features.store import Store

PER_CLASS = 4
MAX_CANDIDATES = {"valid": 48, "train": 16}
MAX_FILE_BYTES = 8 << 20
MAX_BYTES = 32 << 20  # of all candidates


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenConfig:
    """Whether photos are kept for checking."""

    golden_images: bool = True
    """Keep copies of a few photos (64 in a store, 32 MiB at most; 8 in a bundle): every machine
    that scores decodes them first, to prove that it sees images as this one. They are your photos,
    and travel with the bundle."""


def keep(
    store: Store, catalog: Catalog, image_ids: Sequence[bytes], faults: Sequence[str | None]
) -> list[str]:
    """Copy the candidates among the photos into the store; the names of those that are there.

    image_ids, faults: of every file of the catalog, which has its splits. The choice depends on
    content alone. A photo that has changed since it was read is left out.
    """
    kept = store.golden() or {}
    ranked = _ranked(catalog, image_ids, faults)
    there = {row: kept[image_ids[row]] for row in ranked if image_ids[row] in kept}
    names = []
    for row, data in _within(MAX_BYTES, _read(catalog, image_ids, ranked, there)):
        if row not in there:
            with fileio.draft(store.golden_file(image_ids[row].hex())) as temporary:
                temporary.write_bytes(data)
        names.append(image_ids[row].hex())
    return names


def _ranked(
    catalog: Catalog, image_ids: Sequence[bytes], faults: Sequence[str | None]
) -> list[int]:
    """Rows of the candidates, best first: images that no training has seen before those that one
    has; every class in turn; by content.
    """
    turn, seen = Counter[tuple[str, tuple[str, ...]]](), set[bytes]()
    ranked: dict[str, list[tuple[int, int]]] = {split: [] for split in MAX_CANDIDATES}
    for row in sorted(range(len(catalog)), key=lambda row: (image_ids[row], row)):
        split = catalog.splits[row]
        if faults[row] or split not in ranked or image_ids[row] in seen:
            continue
        seen.add(image_ids[row])
        place = split, tuple(catalog.labels[row])
        if turn[place] < PER_CLASS:
            ranked[split].append((turn[place], row))
        turn[place] += 1
    # Sorting is stable: within a turn they stay in the order of their content.
    best = {split: sorted(rows, key=lambda one: one[0]) for split, rows in ranked.items()}
    return [row for split, most in MAX_CANDIDATES.items() for _, row in best[split][:most]]


def _read(
    catalog: Catalog, image_ids: Sequence[bytes], rows: Sequence[int], there: Mapping[int, bytes]
) -> Iterator[tuple[int, bytes]]:
    """Row and bytes of those that can be read and are what they were, a few at a time."""

    def one(row: int) -> tuple[int, bytes]:
        data, fault = (there[row], None) if row in there else catalog.read(row, MAX_FILE_BYTES)
        same = hashlib.blake2b(data, digest_size=16).digest() == image_ids[row]
        return row, data if same and not fault else b""

    with ThreadPoolExecutor(8, "golden") as readers:
        for at in range(0, len(rows), 8):
            yield from (found for found in readers.map(one, rows[at : at + 8]) if found[1])


def _within(most: int, found: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """As many of them as fit."""
    for row, data in found:
        if len(data) <= most:
            most -= len(data)
            yield row, data


def from_photos(store: Store, catalog: Catalog) -> dict[bytes, bytes]:
    """Candidates of a store that kept none, by image id, read anew."""
    parts = list(store.rows())
    image_ids = [image_id for rows in parts for image_id in rows.image_ids]
    faults = [fault for rows in parts for fault in rows.faults]
    found = _read(catalog, image_ids, _ranked(catalog, image_ids, faults), {})
    return {image_ids[row]: data for row, data in _within(MAX_BYTES, found)}
