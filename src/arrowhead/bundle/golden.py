"""Choose a bundle's golden images among a store's candidates."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from arrowhead.bundle import format as bundle_format
from arrowhead.bundle.format import Bundle, GoldenImage
from arrowhead.features.store import Store

MAX_GOLDEN_IMAGES = 8
CLEAR_MARGIN = 0.1  # of probability; a larger margin counts as no clearer


def choose(store: Store, bundle: Bundle, candidates: Mapping[bytes, bytes]) -> list[GoldenImage]:
    """Choose golden images, and add the features and probabilities that they give.

    The candidates (validation images, if there are any among them) are divided into
    `MAX_GOLDEN_IMAGES` groups in catalog order. Each group gives the first image whose label is
    clear, or the image with the largest margin: an image close to a decision boundary may change
    its label on another machine.

    Args:
        store: The feature store with the candidates' features.
        bundle: The bundle, complete except for its golden images.
        candidates: Image files by image id.

    Returns:
        At most `MAX_GOLDEN_IMAGES` images; none if the store has features of no candidate.
    """
    if not candidates:
        return []
    part = store.features(rows_only=True)
    ids = np.array([int.from_bytes(image_id[:8]) for image_id in candidates], np.uint64)
    position_M = np.flatnonzero(np.isin(part.image_id, ids))
    _, first = np.unique(part.image_id[position_M], return_index=True)
    position_M = position_M[first]  # one of several copies of an image
    valid_M = position_M[part.split[position_M] == "valid"]
    position_M = np.sort(valid_M if len(valid_M) else position_M)
    if not len(position_M):
        return []
    data_by_id = dict(zip(ids.tolist(), candidates.values(), strict=True))
    feature_MD = store.clean_features(part.row[position_M]).astype(np.float32)
    prob_MC = bundle_format.probabilities(
        bundle.make_head(), feature_MD, bundle.temperature, multi=bundle.multi
    )
    clear_M = np.minimum(bundle.margin(prob_MC), CLEAR_MARGIN)
    chosen: list[GoldenImage] = []
    for group in np.array_split(np.arange(len(position_M)), MAX_GOLDEN_IMAGES):
        for i in group[np.argsort(-clear_M[group], kind="stable")][:1]:
            chosen.append(
                GoldenImage(
                    name=f"{len(chosen)}.img",
                    data=data_by_id[int(part.image_id[position_M[i]])],
                    feature=feature_MD[i],
                    probabilities=prob_MC[i],
                )
            )
    return chosen
