"""Golden images of a bundle: the clearly decided ones among a store's candidates."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from arrowhead.bundle import format as bundle_format
from arrowhead.bundle.format import Bundle, Golden
from arrowhead.data.catalog import Catalog
from arrowhead.features import golden_images
from arrowhead.features.store import Store

IN_A_BUNDLE = 8
CLEAR = 0.1  # of probability, from the next decision


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
        images = golden_images.from_photos(store, catalog)
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
    chance_MC = bundle_format.probabilities(
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


def _features(store: Store, row_M: NDArray[np.int64]) -> NDArray[np.float32]:
    """float32 (M, D): the clean view of some rows of the catalog, in ascending order."""
    found, first = [], 0
    for part in store.maps():
        here = row_M[(row_M >= first) & (row_M < first + len(part))] - first
        found.append(part[here, 0].astype(np.float32))
        first += len(part)
    return np.concatenate(found)
