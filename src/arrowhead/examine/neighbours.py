"""Find the close neighbours among millions of features without comparing all pairs.

    features (memory-mapped)     as unit vectors
      -> projection              onto their first 128 principal components
      -> cells                   k-means; each row is compared with the rows of its nearest cells
      -> candidates              the nearest rows of each row, by the projection
      -> pairs                   their cosine similarity with all numbers, at least `min_similarity`

An inverted file with several probes (Jegou et al., "Product Quantization for Nearest Neighbor
Search", 2011, section 4), without the quantization of the rows. Up to EXACT_ROWS rows there is one
cell, so every pair is compared. bench/duplicates.py measures time, memory and recall.

A row in a crowd (thousands of copies of one image) keeps its nearest neighbours only, and one more:
the first row of the crowd. So a crowd stays one connected group without a pair for each two rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

NEIGHBOURS = 4  # that a row keeps
CANDIDATES = 8  # nearest rows by the projection, of which these are the nearest
PROBES = 12  # cells that a row is compared with
EXACT_ROWS = 16_384  # up to so many, there is one cell
ROWS_PER_CELL = 512
SAMPLE_ROWS = 65_536  # for the principal components and the cells
COMPONENTS, EXACT_COMPONENTS = 128, 256  # the latter up to EXACT_ROWS rows
ROUNDS = 6  # of k-means
BLOCK_ROWS = 16_384  # of features: with 512 numbers, 32 MB in float32
BLOCK_CELLS = 2**22  # similarities at a time: 16 MB
MAX_CELL_ROWS = 8 * ROWS_PER_CELL  # of a cell; larger ones are divided


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitVectors:
    """Rows of memory-mapped features as vectors of length 1.

    Attributes:
        shards: float16 (R, V, D) each; view 0 is used.
        row_M: int64 (M,), ascending: which rows of all shards.
    """

    shards: Sequence[NDArray[np.float16]]
    row_M: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.row_M)

    @property
    def width(self) -> int:
        """Numbers per row."""
        return int(self.shards[0].shape[2])

    def similarity(self, one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.float32]:
        """The cosine similarity of pairs of rows, float32 (P,)."""
        similarity = np.empty(len(one), np.float32)
        for block in _blocks(len(one), BLOCK_ROWS // 2):
            product = self.read(one[block])
            product *= self.read(other[block])
            similarity[block] = product.sum(1)
        return similarity

    def read(self, index: NDArray[np.int64] | slice) -> NDArray[np.float32]:
        """Some of the rows, float32 (m, D); zeros for a row of zeros."""
        row_M = self.row_M[index]
        ends = np.cumsum([len(shard) for shard in self.shards])
        vector = np.empty((len(row_M), self.width), np.float32)
        order = np.argsort(row_M, kind="stable")
        bounds = np.searchsorted(row_M[order], ends).tolist()
        start = 0
        for shard, last, end in zip(self.shards, bounds, ends.tolist(), strict=True):
            if last > start:
                at = order[start:last]
                vector[at] = shard[row_M[at] - (end - len(shard)), 0]
            start = last
        norm = np.linalg.norm(vector, axis=1, keepdims=True)
        vector /= np.where(norm > 0, norm, 1)
        return vector


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """Pairs of rows, the most similar first; ties by row.

    Attributes:
        one: int64 (P,), the lower row.
        other: int64 (P,), the higher row.
        similarity: float32 (P,), their cosine similarity.
    """

    one: NDArray[np.int64]
    other: NDArray[np.int64]
    similarity: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.one)


def close_pairs(features: UnitVectors, min_similarity: float) -> Pairs:
    """Find the pairs of close rows: each row with its nearest neighbours.

    Args:
        features: M rows.
        min_similarity: The least cosine similarity of a pair.

    Returns:
        Pairs of indices into `features`, at most M * (NEIGHBOURS + 1).
    """
    if len(features) < 2:
        empty = np.zeros(0, np.int64)
        return Pairs(one=empty, other=empty, similarity=np.zeros(0, np.float32))
    point_MK = _project(features)
    cells = _Cells.fit(point_MK)
    keys, first_keys = _candidates(point_MK, cells, min_similarity)
    del point_MK, cells
    one, other = np.divmod(keys, len(features))
    similarity = features.similarity(one, other)
    is_near = _among_nearest(one, other, similarity) | np.isin(keys, first_keys)
    kept = np.flatnonzero((similarity >= min_similarity) & is_near)
    kept = kept[np.argsort(-similarity[kept], kind="stable")]  # keys ascend, so ties are by row
    return Pairs(one=one[kept], other=other[kept], similarity=similarity[kept])


def _among_nearest(
    one: NDArray[np.int64], other: NDArray[np.int64], similarity: NDArray[np.float32]
) -> NDArray[np.bool_]:
    """Whether a pair is among the NEIGHBOURS most similar ones of either row, bool (P,)."""
    order = np.argsort(-similarity, kind="stable")
    is_near = np.zeros(len(one), bool)
    row = np.concatenate([one[order], other[order]])
    pair = np.concatenate([order, order])
    # By row, then by similarity: the two halves are merged by rank.
    rank = np.concatenate([np.arange(len(one)), np.arange(len(one))])
    by_row = np.lexsort((rank, row))
    sorted_row = row[by_row]
    position = np.arange(len(row)) - np.searchsorted(sorted_row, sorted_row)
    is_near[pair[by_row[position < NEIGHBOURS]]] = True
    return is_near


def _project(features: UnitVectors) -> torch.Tensor:
    """The rows on their first principal components, float32 (M, K).

    An orthogonal projection of unit vectors: distances can only shrink.
    """
    import torch

    step = max(1, len(features) // SAMPLE_ROWS)
    moment: NDArray[np.float64] = np.zeros((features.width, features.width))
    sample = np.arange(0, len(features), step)
    for block in _blocks(len(sample)):
        unit = features.read(sample[block])
        moment += (unit.T @ unit).astype(np.float64)
    _, vector_DD = np.linalg.eigh(moment)  # ascending
    components = COMPONENTS if len(features) > EXACT_ROWS else EXACT_COMPONENTS
    basis_DK = np.ascontiguousarray(vector_DD[:, ::-1][:, :components], np.float32)
    point_MK = np.empty((len(features), basis_DK.shape[1]), np.float32)
    for block in _blocks(len(features)):
        point_MK[block] = features.read(block) @ basis_DK
    return torch.from_numpy(point_MK)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cells:
    """The cells that rows are compared in.

    Attributes:
        members: The rows of each cell, ascending; a row is in one cell, and the first row of a
            divided cell in all its parts.
        visitors: The rows that are compared with each cell's members, ascending.
    """

    members: list[torch.Tensor]
    visitors: list[torch.Tensor]

    @staticmethod
    def fit(point_MK: torch.Tensor) -> _Cells:
        """Divide the rows into cells."""
        import torch

        rows = len(point_MK)
        if rows <= EXACT_ROWS:
            every = torch.arange(rows)
            return _Cells(members=[every], visitors=[every])
        centre_CK = _k_means(point_MK, rows // ROWS_PER_CELL)
        nearest_MP = _nearest_centres(point_MK, centre_CK, PROBES)
        members, visitors = [], []
        own = _group(nearest_MP[:, 0], len(centre_CK))
        near = _group(nearest_MP.reshape(-1), len(centre_CK))
        for home, probes in zip(own, near, strict=True):
            probing = probes // nearest_MP.shape[1]
            if len(home) <= MAX_CELL_ROWS:
                members.append(home)
                visitors.append(probing)
                continue
            # Too many rows for all pairs: neighbours along the direction in which they differ most.
            order = home[_order_by_largest_spread(point_MK[home])]
            for part in torch.split(order, MAX_CELL_ROWS // 2):
                part = torch.unique(torch.cat([home[:1], part]))
                members.append(part)
                visitors.append(part)
        return _Cells(members=members, visitors=visitors)


def _k_means(point_MK: torch.Tensor, count: int) -> torch.Tensor:
    """Centres of `count` cells, by Lloyd's algorithm on evenly spaced rows; float32 (count, K)."""
    import torch

    count = min(count, SAMPLE_ROWS // 16)
    sample = point_MK[:: max(1, len(point_MK) // SAMPLE_ROWS)]
    generator = torch.Generator().manual_seed(0)
    centre_CK = sample[torch.randperm(len(sample), generator=generator)[:count]].clone()
    for _ in range(ROUNDS):
        cell = _nearest_centres(sample, centre_CK, 1)[:, 0]
        sums = torch.zeros_like(centre_CK).index_add_(0, cell, sample)
        sizes = torch.bincount(cell, minlength=count)[:, None]
        centre_CK = torch.where(sizes > 0, sums / sizes.clamp(min=1), centre_CK)
    return centre_CK


def _nearest_centres(point_BK: torch.Tensor, centre_CK: torch.Tensor, count: int) -> torch.Tensor:
    """The nearest centres of each point, the nearest first; int64 (B, count)."""
    import torch

    half_square_C = centre_CK.square().sum(1) / 2
    count = min(count, len(centre_CK))
    step = max(1, BLOCK_CELLS // len(centre_CK))
    parts = [
        (part @ centre_CK.T - half_square_C).topk(count, dim=1).indices
        for part in torch.split(point_BK, step)
    ]
    return torch.cat(parts)


def _group(cell_N: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """The positions of each cell's number in `cell_N`, ascending."""
    import torch

    order = torch.argsort(cell_N, stable=True)
    parts: tuple[torch.Tensor, ...] = torch.split(
        order, torch.bincount(cell_N, minlength=count).tolist()
    )
    return parts


def _order_by_largest_spread(point_NK: torch.Tensor) -> torch.Tensor:
    """The order of the points along the component in which they vary most."""
    import torch

    component = int(point_NK.var(0).argmax())
    return torch.argsort(point_NK[:, component], stable=True)


def _candidates(
    point_MK: torch.Tensor, cells: _Cells, min_similarity: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs that may be close, as keys lower row * M + higher row, ascending and different; and
    those of them that connect a row with the first row of its crowd.

    The squared distance of two unit vectors is 2 - 2 * similarity; that of their projections is at
    most as large. So no pair in a cell is lost by the comparison of projections.
    """
    import torch

    rows = len(point_MK)
    max_square = 2 - 2 * min_similarity + 1e-5
    half_square_M = point_MK.square().sum(1) / 2
    best = torch.full((rows, CANDIDATES), torch.inf)  # half squared distances, ascending
    neighbour = torch.full((rows, CANDIDATES), -1)
    first = torch.full((rows,), rows)  # the lowest row that is close
    for members, visitors in zip(cells.members, cells.visitors, strict=True):
        member_KN = point_MK[members].T.contiguous()
        step = max(1, BLOCK_CELLS // max(1, len(members)))
        for visitor in torch.split(visitors, step) if len(members) else ():
            half = half_square_M[members] - point_MK[visitor] @ member_KN
            half += half_square_M[visitor][:, None]
            at = torch.searchsorted(members, visitor).clamp(max=len(members) - 1)
            own = torch.nonzero(members[at] == visitor)[:, 0]
            half[own, at[own]] = torch.inf
            is_close = half <= max_square / 2
            near = torch.nonzero(is_close.any(1))[:, 0]
            if not len(near):
                continue
            visitor, half, is_close = visitor[near], half[near], is_close[near]
            lowest = members[is_close.to(torch.uint8).argmax(1)]
            first[visitor] = torch.minimum(first[visitor], lowest)
            found = half.topk(min(CANDIDATES, half.shape[1]), dim=1, largest=False)
            values = torch.cat([best[visitor], found.values], 1)
            indices = torch.cat([neighbour[visitor], members[found.indices]], 1)
            merged = values.topk(CANDIDATES, dim=1, largest=False)
            best[visitor] = merged.values
            neighbour[visitor] = indices.gather(1, merged.indices)
    neighbour[best > max_square / 2] = -1
    first_keys = _pair_keys(torch.where(first < rows, first, -1)[:, None])
    return np.union1d(_pair_keys(neighbour), first_keys), first_keys


def _pair_keys(neighbour_MJ: torch.Tensor) -> NDArray[np.int64]:
    """Keys of the pairs of each row with its neighbours; -1 is no neighbour."""
    rows = len(neighbour_MJ)
    keys = []
    for column in neighbour_MJ.T.numpy():
        row = np.flatnonzero(column >= 0)
        other = column[row]
        keys.append(np.minimum(row, other) * rows + np.maximum(row, other))
    return np.unique(np.concatenate(keys))


def _blocks(count: int, size: int = BLOCK_ROWS) -> Iterator[slice]:
    """Slices of at most `size` that cover `count` rows."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
