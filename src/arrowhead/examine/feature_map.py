"""A map of the images in two dimensions: similar images lie near each other.

    up to MAX_POINTS images -> standardized features -> 50 principal components -> t-SNE -> x, y

t-SNE (van der Maaten and Hinton, JMLR 9, 2008) as scikit-learn computes it. Distances between far
groups and the sizes of groups mean nothing; neighbors do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arrowhead.evaluation.calibration import HASH_MULTIPLIER
from arrowhead.examine.predictions import Predictions, feature_blocks
from arrowhead.features.store import Store

MAX_POINTS = 600  # 2 s on one core
MIN_POINTS = 12  # with fewer images a map shows nothing
COMPONENTS = 50


@dataclass(frozen=True, slots=True)
class FeatureMap:
    """Positions of some images.

    Attributes:
        index: int64 (k,), positions in `Predictions`.
        xy: float32 (k, 2), from 0 to 1.
    """

    index: NDArray[np.int64]
    xy: NDArray[np.float32]


def project(
    store: Store, predictions: Predictions, max_points: int = MAX_POINTS
) -> FeatureMap | None:
    """Compute the map; None if there are too few images.

    All held-out mistakes are on it, then held-out and then training images, drawn by content.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    index = choose(predictions, max_points)
    if len(index) < MIN_POINTS:
        return None
    feature_ND = np.concatenate(
        [block for _, block in feature_blocks(store, predictions.row[index])]
    ).astype(np.float32)
    deviation_D = feature_ND.std(0)
    feature_ND = (feature_ND - feature_ND.mean(0)) / np.where(deviation_D > 1e-6, deviation_D, 1)
    if not feature_ND.any():  # all images are alike
        return None
    components = min(COMPONENTS, *feature_ND.shape)
    reduced = PCA(components, svd_solver="randomized", random_state=0).fit_transform(feature_ND)
    tsne = TSNE(
        perplexity=min(30, (len(index) - 1) / 3),
        init=reduced[:, :2] / max(float(reduced[:, 0].std()), 1e-12) * 1e-4,
        max_iter=300,
        random_state=0,
    )
    with threadpool_limits(1):  # its threads wait for each other: two take longer than one
        xy = tsne.fit_transform(reduced)
    low, high = xy.min(0), xy.max(0)
    return FeatureMap(index, ((xy - low) / np.maximum(high - low, 1e-9)).astype(np.float32))


def choose(predictions: Predictions, count: int = MAX_POINTS) -> NDArray[np.int64]:
    """The images on the map, int64 (k,), ascending."""
    order = predictions.image_id * HASH_MULTIPLIER
    wrong = predictions.held_out & ~predictions.correct
    rank = np.lexsort((order, ~predictions.held_out, ~wrong))
    chosen: NDArray[np.int64] = np.sort(rank[:count])
    return chosen
