"""Which images train, validate and test, drawn by content."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from arrowhead.data import sources
from arrowhead.data.catalog import Catalog


def drawn(
    catalog: Catalog,
    image_ids: Sequence[bytes],
    valid_share: float,
    faulty: Sequence[bool] | None = None,
) -> Catalog:
    """The catalog with the splits that were "" drawn, class by class, from the image ids.

    image_ids: 16 bytes each, a hash of the content; faulty: which rows have no image (they go to
    train and count nowhere). Of each class the images with the lowest ids validate, as many as the
    share, rounded, but at least one; one stays in train. So a few images more move few others. The
    copies of an image stay together, with those whose split was given, too: a copy of a test image
    is tested. An image with several labels counts for the rarest of them.
    """
    free_N = np.array([split == "" for split in catalog.splits], bool)
    well_N = free_N if faulty is None else free_N & ~np.array(faulty, bool)
    splits = [split or "train" for split in catalog.splits]
    key_N = np.frombuffer(b"".join(image_ids), ">u8").reshape(-1, 2)[:, 0]
    row_M = np.flatnonzero(well_N)
    key_K, first_K, image_M, count_K = np.unique(
        key_N[row_M], return_index=True, return_inverse=True, return_counts=True
    )
    given_N = np.array(catalog.splits)
    valid_K = np.isin(key_K, key_N[given_N == "valid"])
    fixed_K = valid_K | np.isin(key_K, key_N[given_N == "train"])
    test_K = ~fixed_K & np.isin(key_K, key_N[given_N == "test"])
    fixed_K |= test_K
    labels_K = [catalog.labels[row] for row in row_M[first_K].tolist()]
    for at in np.flatnonzero(count_K[image_M] > 1).tolist():  # copies may be labelled differently
        image = int(image_M[at])
        labels_K[image] = tuple(sorted({*labels_K[image], *catalog.labels[row_M[at]]}))
    rarest_K = sources.rarest(labels_K)
    strata: dict[str, list[int]] = {}
    for image in np.flatnonzero(~fixed_K).tolist():
        strata.setdefault(rarest_K[image], []).append(image)
    for images in strata.values():
        _hold_out(images, count_K, valid_share, valid_K)
    taught = {
        name for names in set(itertools.compress(labels_K, ~(valid_K | test_K))) for name in names
    } | {
        name
        for names in set(itertools.compress(catalog.labels, given_N == "train"))
        for name in names
    }
    for image in np.flatnonzero(valid_K & ~fixed_K)[::-1].tolist():  # each class must be taught
        if not taught.issuperset(labels_K[image]):
            taught.update(labels_K[image])
            valid_K[image] = False
    for split, chosen_K in (("valid", valid_K), ("test", test_K)):
        for row in row_M[chosen_K[image_M]].tolist():
            splits[row] = split
    return replace(catalog, splits=splits)


def _hold_out(
    images: list[int], count_K: NDArray[np.int64], share: float, valid_K: NDArray[np.bool_]
) -> None:
    """Mark those of a class's images (by number, in order) that validate."""
    wanted = max(1, math.floor(share * int(count_K[images].sum()) + 0.5))
    taken: list[int] = []
    for image in images:
        if wanted < 1 or len(taken) + 1 == len(images):
            break
        if count_K[image] <= wanted:
            taken.append(image)
            wanted -= int(count_K[image])
    if not taken and len(images) > 1:  # all have more copies than are wanted
        taken = [min(images, key=lambda image: int(count_K[image]))]
    valid_K[taken] = True


def share(count: int, rank: int, world: int) -> range:
    """The rows of one worker out of `count`: a run of neighbours, sizes at most one apart."""
    return range(count * rank // world, count * (rank + 1) // world)
