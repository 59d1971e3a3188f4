"""Draw the train/validation split from the content of the images.

scikit-learn's splitters keep neither copies of an image together nor the split stable when images
are added.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from arrowhead.data import sources
from arrowhead.data.catalog import Catalog


def draw_splits(
    catalog: Catalog,
    image_ids: Sequence[bytes],
    valid_share: float,
    faulty: Sequence[bool] | None = None,
    trained_labels: Sequence[tuple[str, ...]] | None = None,
) -> Catalog:
    """Draw the split of rows whose split is "", stratified by class.

    In each class the images with the lowest ids are for validation: the given share, rounded, at
    least one, and at least one image stays in train. Adding a few images therefore moves few
    others. Copies of an image get the same split, also if the split of one of them is given. An
    image with several labels counts for the rarest of them.

    Args:
        catalog: N rows.
        image_ids: N hashes of the content, 16 bytes each.
        valid_share: Share of each class to hold out.
        faulty: Which rows have no readable image; they go to train and are not counted.
        trained_labels: The labels that each need an image in train, if they are not the catalog's.

    Returns:
        The catalog with all splits set.
    """
    free_N = np.array([split == "" for split in catalog.splits], bool)
    drawn_N = free_N if faulty is None else free_N & ~np.array(faulty, bool)
    splits = [split or "train" for split in catalog.splits]
    key_N = np.frombuffer(b"".join(image_ids), ">u8").reshape(-1, 2)[:, 0]
    row_M = np.flatnonzero(drawn_N)  # M rows to draw; below: K distinct images among them
    key_K, first_K, image_M, count_K = np.unique(
        key_N[row_M], return_index=True, return_inverse=True, return_counts=True
    )
    given_N = np.array(catalog.splits)
    valid_K = np.isin(key_K, key_N[given_N == "valid"])
    fixed_K = valid_K | np.isin(key_K, key_N[given_N == "train"])
    test_K = ~fixed_K & np.isin(key_K, key_N[given_N == "test"])
    fixed_K |= test_K
    labels_K = _labels_of_images(catalog.labels, row_M, first_K, image_M)
    rarest_K = sources.rarest_labels(labels_K)
    strata: dict[str, list[int]] = {}
    for image in np.flatnonzero(~fixed_K).tolist():
        strata.setdefault(rarest_K[image], []).append(image)
    for images in strata.values():
        _draw_validation(images, count_K, valid_share, valid_K)
    if trained_labels is not None:
        labels_K = _labels_of_images(trained_labels, row_M, first_K, image_M)
    train_labels = set(itertools.compress(labels_K, ~(valid_K | test_K)))
    train_labels |= set(itertools.compress(trained_labels or catalog.labels, given_N == "train"))
    train_classes = {name for names in train_labels for name in names}
    # Each class needs an image in train: move drawn images there.
    for image in np.flatnonzero(valid_K & ~fixed_K)[::-1].tolist():
        if not train_classes.issuperset(labels_K[image]):
            train_classes.update(labels_K[image])
            valid_K[image] = False
    for split, chosen_K in (("valid", valid_K), ("test", test_K)):
        for row in row_M[chosen_K[image_M]].tolist():
            splits[row] = split
    return replace(catalog, splits=splits)


def _labels_of_images(
    labels_N: Sequence[tuple[str, ...]],
    row_M: NDArray[np.int64],
    first_K: NDArray[np.int64],
    image_M: NDArray[np.int64],
) -> list[tuple[str, ...]]:
    """The labels of K distinct images: those of all copies, which may differ.

    Args:
        labels_N: Labels of every row of the catalog.
        row_M: The rows to draw.
        first_K: Position in row_M of the first copy of each image.
        image_M: The image of each row to draw, an index into K.
    """
    labels_K = [labels_N[row] for row in row_M[first_K].tolist()]
    for row, image in zip(row_M.tolist(), image_M.tolist(), strict=True):
        if labels_N[row] != labels_K[image]:
            labels_K[image] = tuple(sorted({*labels_K[image], *labels_N[row]}))
    return labels_K


def _draw_validation(
    images: list[int], count_K: NDArray[np.int64], share: float, valid_K: NDArray[np.bool_]
) -> None:
    """Choose validation images of one class, in place.

    Args:
        images: The images of the class, indices into K, ordered by id.
        count_K: Number of copies of each image.
        share: Share of the files to hold out.
        valid_K: Set to True for the chosen images.
    """
    remaining = max(1, math.floor(share * int(count_K[images].sum()) + 0.5))
    chosen: list[int] = []
    for image in images:
        if remaining < 1 or len(chosen) + 1 == len(images):
            break
        if count_K[image] <= remaining:
            chosen.append(image)
            remaining -= int(count_K[image])
    if not chosen and len(images) > 1:  # each image has more copies than are to be held out
        chosen = [min(images, key=lambda image: int(count_K[image]))]
    valid_K[chosen] = True


def rows_of(count: int, rank: int, world_size: int) -> range:
    """The consecutive rows, out of `count`, of one rank; sizes differ by at most one."""
    return range(count * rank // world_size, count * (rank + 1) // world_size)
