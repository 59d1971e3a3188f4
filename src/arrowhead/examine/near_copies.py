"""Find pairs of files that show the same photo, altered.

    features             neighbours.close_pairs: rows whose features are close
    thumbnails           close_pairs again, on the pixels of whole images turned alike
      -> candidates
      -> confirmed       by image_matching, which reads both files

Features find cropped copies and copies with a border. A network that was trained on upright photos
gives a turned copy other features, so the pixels of whole images are searched too. For that, every
file is read once more and decoded small; with more than `max_thumbnails` images only the files of
candidates are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arrowhead.errors import ConfigError
from arrowhead.examine import image_matching
from arrowhead.examine.image_matching import Thumbnail
from arrowhead.examine.neighbours import Pairs, UnitVectors, close_pairs

BATCH_PAIRS = 256  # whose files are in memory at a time
PATTERNS = 4  # by which thumbnails are turned alike


@dataclass(frozen=True, kw_only=True, slots=True)
class DuplicateConfig:
    """How altered copies are searched for."""

    min_feature_similarity: float = 0.66
    """Cosine similarity of features, 0 to 1, from which the pixels of two images are compared.
    Lower finds stranger copies and takes longer."""
    max_thumbnails: int = 20_000
    """Number of different images up to which all files are read once more, to find turned and
    mirrored copies by their pixels. With more images, only files with close features are read."""
    max_rejected_pairs: int = 20_000
    """Stop after so many pairs with close features were different photos: those that are left
    have less similar features. 0 finds exact copies only."""

    def __post_init__(self) -> None:
        if not 0 < self.min_feature_similarity <= 1:
            raise ConfigError(
                f"min_feature_similarity is {self.min_feature_similarity}.",
                "a similarity, more than 0 and at most 1.",
                "give one such as 0.66.",
            )
        for name in ("max_thumbnails", "max_rejected_pairs"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}.", "0 or more.", "give e.g. 20000."
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class DuplicatePair:
    """Two different files that show the same photo, or whose pixels could not be compared.

    Attributes:
        one: The lower row of the catalog; of files with the same bytes the first.
        other: The higher row.
        feature_similarity: Cosine similarity of the features, up to 1.
        pixel_similarity: Correlation of the pixels, up to 1; None if a file could not be read.
    """

    one: int
    other: int
    feature_similarity: float
    pixel_similarity: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class NearCopies:
    """What `find_near_copies` found.

    Attributes:
        pairs: Confirmed pairs, which connect all copies of a photo, and pairs that could not be
            verified since a file could not be read.
        compared: Number of pairs whose pixels were compared.
        not_compared: Number of pairs with close features that were left when it stopped.
    """

    pairs: list[DuplicatePair]
    compared: int
    not_compared: int


class Components:
    """Connected rows: a union-find whose roots are the lowest rows."""

    def __init__(self) -> None:
        self._parent: dict[int, int] = {}

    def root(self, row: int) -> int:
        """The lowest row that is connected with this one."""
        parent = self._parent
        while (above := parent.get(row, row)) != row:
            parent[row] = parent.get(above, above)
            row = parent[row]
        return row

    def connect(self, one: int, other: int) -> None:
        """Connect two rows and all that are connected with them."""
        low, high = sorted((self.root(one), self.root(other)))
        self._parent[high] = low


Reader = Callable[[int], Thumbnail | None]


def find_near_copies(features: UnitVectors, read: Reader, config: DuplicateConfig) -> NearCopies:
    """Find the pairs of rows that show the same photo.

    Args:
        features: M images with different bytes.
        read: Gives the thumbnail of a row of `features.row_M`, or None. It is called from threads.
        config: How to search.
    """
    if config.max_rejected_pairs == 0:
        return NearCopies(pairs=[], compared=0, not_compared=0)
    close = close_pairs(features, config.min_feature_similarity)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        if len(features) <= config.max_thumbnails:
            thumbnails = dict(
                zip(features.row_M.tolist(), pool.map(read, features.row_M.tolist()), strict=True)
            )
            alike = _alike_pairs(features, list(thumbnails.values()))
            return _confirm(_joined(alike, close), features, thumbnails.__getitem__, config, pool)
        return _confirm(close, features, read, config, pool)


def _alike_pairs(features: UnitVectors, thumbnails: Sequence[Thumbnail | None]) -> Pairs:
    """Pairs of images whose whole pixels correlate in some orientation, with the similarity of
    their features.
    """
    side = image_matching.SQUARE_SIDE
    square_NHW = np.zeros((len(thumbnails), side, side), np.float32)
    for row, grey in enumerate(thumbnails):
        if grey is not None:
            square_NHW[row] = image_matching.square_details(grey)
    rows = np.arange(len(thumbnails))
    generator = np.random.default_rng(0)
    keys = [np.zeros(0, np.int64)]
    for _ in range(PATTERNS):
        pattern = image_matching.smooth_pattern(generator)
        turned_NHW = image_matching.turn_alike(square_NHW, pattern)
        turned = turned_NHW.reshape(-1, 1, side * side).astype(np.float16)
        found = close_pairs(UnitVectors(shards=[turned], row_M=rows), image_matching.MIN_WHOLE)
        keys.append(found.one * len(rows) + found.other)
    one, other = np.divmod(np.unique(np.concatenate(keys)), max(1, len(rows)))
    return Pairs(one=one, other=other, similarity=features.similarity(one, other))


def _joined(first: Pairs, then: Pairs) -> Pairs:
    """The pairs of both, without repetition."""
    known = set(zip(first.one.tolist(), first.other.tolist(), strict=True))
    pairs = zip(then.one.tolist(), then.other.tolist(), strict=True)
    new = np.array([pair not in known for pair in pairs], bool)
    return Pairs(
        one=np.concatenate([first.one, then.one[new]]),
        other=np.concatenate([first.other, then.other[new]]),
        similarity=np.concatenate([first.similarity, then.similarity[new]]),
    )


def _confirm(
    candidates: Pairs,
    features: UnitVectors,
    read: Reader,
    config: DuplicateConfig,
    pool: ThreadPoolExecutor,
) -> NearCopies:
    """Compare the pixels of candidates in their order.

    A pair whose files are connected already is skipped, so a crowd of n copies takes about n
    comparisons.
    """
    components, pairs, compared, rejected, left = Components(), [], 0, 0, 0
    for batch, done in _batches(candidates, features.row_M, components):
        rows = sorted({row for one, other, _ in batch for row in (one, other)})
        thumbnails = dict(zip(rows, pool.map(read, rows), strict=True))
        scores = pool.map(
            _compare,
            [thumbnails[one] for one, _, _ in batch],
            [thumbnails[other] for _, other, _ in batch],
        )
        for (one, other, similarity), score in zip(batch, scores, strict=True):
            compared += score is not None
            if score is not None and not image_matching.is_same_photo(*score):
                rejected += 1
                continue
            pixel = None if score is None else max(score)
            if pixel is not None:
                components.connect(one, other)
            pairs.append(
                DuplicatePair(
                    one=one,
                    other=other,
                    feature_similarity=similarity,
                    pixel_similarity=pixel,
                )
            )
        if rejected >= config.max_rejected_pairs:
            left = len(candidates) - done
            break
    return NearCopies(pairs=pairs, compared=compared, not_compared=left)


def _batches(
    candidates: Pairs, row_M: NDArray[np.int64], components: Components
) -> Iterator[tuple[list[tuple[int, int, float]], int]]:
    """Batches of pairs (row, row, similarity) that are not connected yet, and how many candidates
    are done with each.
    """
    batch: list[tuple[int, int, float]] = []
    for done in range(len(candidates)):
        one, other = int(row_M[candidates.one[done]]), int(row_M[candidates.other[done]])
        if components.root(one) != components.root(other):
            batch.append((one, other, float(candidates.similarity[done])))
        if len(batch) == BATCH_PAIRS or (batch and done + 1 == len(candidates)):
            yield batch, done + 1
            batch = []


def _compare(one: Thumbnail | None, other: Thumbnail | None) -> tuple[float, float] | None:
    """The similarities of two thumbnails; None if one could not be read."""
    if one is None or other is None:
        return None
    return image_matching.similarity(one, other)
