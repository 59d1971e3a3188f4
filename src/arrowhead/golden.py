"""Golden images: a few of the photos themselves, kept to check other machines by.

    photos       -> keep    at the end of an extraction: candidates, copied into the store
    candidates   -> pick    at the end of a training: the clearly decided ones, for the bundle

A store is enough to train: the photos may have moved or changed by then. A copy is only used when
its bytes hash to the image id that the features were stored under.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arrowhead import bundle, fileio
from arrowhead.bundle import Bundle, Golden
from arrowhead.plan import Catalog
from arrowhead.shards import Store

PER_CLASS = 4
MAX_CANDIDATES = {"valid": 48, "train": 16}
MAX_FILE_BYTES = 8 << 20
MAX_BYTES = 32 << 20  # of all candidates
IN_A_BUNDLE = 8
CLEAR = 0.1  # of probability, from the next decision


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenConfig:
    """Whether photos are kept for checking."""

    golden_images: bool = True
    """Keep copies of a few photos (64 in a store, 32 MiB at most; 8 in a bundle): every machine
    that scores decodes them first, to prove that it sees images as this one. They are your photos,
    and travel with the bundle."""


# ------------------------------------------------------------------------ into the store


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


# ----------------------------------------------------------------------- into the bundle


def pick(store: Store, made: Bundle, say: Callable[[str], None]) -> list[Golden]:
    """Images for a bundle that is finished but for them, with the features and probabilities they
    gave.

    Of each stretch of candidates the first that is clearly decided, else the clearest: a label that
    hangs by a thousandth would change on any other machine. say: gets a sentence where there are
    none.
    """
    part = store.features(mapped=True)
    catalog = Catalog(**store.read_catalog())
    images = store.golden()
    if images is None:  # of an older version, which kept none: the photos may still be there
        images = _from_photos(store, catalog)
    ids = np.array([int.from_bytes(one[:8]) for one in images], np.uint64)
    at_M = np.flatnonzero(np.isin(part.image_id, ids))
    at_M = at_M[np.unique(part.image_id[at_M], return_index=True)[1]]  # each content once
    unseen_M = at_M[part.split[at_M] == "valid"]
    at_M = np.sort(unseen_M if len(unseen_M) else at_M)
    if not len(at_M):
        say(
            "No golden images: the bundle will not prove that a machine which scores with it sees"
            " images as this one does. Run precompute on the photos again to have some."
        )
        return []
    by_id = dict(zip(ids.tolist(), images.values(), strict=True))
    feature_MD = _features(store, part.row[at_M])
    chance_MC = bundle.probabilities(
        made.make_head(), feature_MD, made.temperature, multi=made.multi
    )
    clear_M = np.minimum(made.margin(chance_MC), CLEAR)
    kept: list[Golden] = []
    for stretch in np.array_split(np.arange(len(at_M)), IN_A_BUNDLE):
        for i in stretch[np.argsort(-clear_M[stretch], kind="stable")][:1]:
            data = by_id[int(part.image_id[at_M[i]])]
            name = f"{len(kept)}.img"
            kept.append(
                Golden(name=name, data=data, feature=feature_MD[i], probabilities=chance_MC[i])
            )
    return kept


def _from_photos(store: Store, catalog: Catalog) -> dict[bytes, bytes]:
    parts = list(store.rows())
    image_ids = [image_id for rows in parts for image_id in rows.image_ids]
    faults = [fault for rows in parts for fault in rows.faults]
    found = _read(catalog, image_ids, _ranked(catalog, image_ids, faults), {})
    return {image_ids[row]: data for row, data in _within(MAX_BYTES, found)}


def _features(store: Store, row_M: NDArray[np.int64]) -> NDArray[np.float32]:
    """float32 (M, D): the clean view of some rows of the catalog, in ascending order."""
    found, first = [], 0
    for part in store.maps():
        here = row_M[(row_M >= first) & (row_M < first + len(part))] - first
        found.append(part[here, 0].astype(np.float32))
        first += len(part)
    return np.concatenate(found)
