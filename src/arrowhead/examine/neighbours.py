"""Find the close neighbours among millions of features without comparing all pairs.

    features (memory-mapped)     as unit vectors
      -> projection              onto their first 128 principal components
      -> cells                   k-means; each row is compared with the rows of its nearest cells
      -> candidates              the nearest rows of each row, by the projection
      -> pairs                   their cosine similarity with all numbers, at least `min_similarity`

An inverted file with several probes (Jegou et al., "Product Quantization for Nearest Neighbor
Search", 2011, section 4), without the quantization of the rows. Up to EXACT_ROWS rows all numbers
of every pair are compared. bench/duplicates.py measures time, memory and recall.

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
CANDIDATES = 12  # nearest rows by the projection, of which these are the nearest
PROBES = 12  # cells that a row is compared with
EXACT_ROWS = 16_384  # up to so many, there is one cell and no projection
ROWS_PER_CELL = 512
SAMPLE_ROWS = 65_536  # for the principal components and the cells
COMPONENTS = 128
ROUNDS = 6  # of k-means
BLOCK_ROWS = 16_384  # of features: with 512 numbers, 32 MB in float32
BLOCK_PAIRS = 2048  # of rows of features, which then stay in the processor's cache
BLOCK_CELLS = 2**21  # similarities at a time: 8 MB
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
        for block in _blocks(len(one), BLOCK_PAIRS):
            distinct, at = np.unique_inverse(one[block])  # a row is often the first of many pairs
            similarity[block] = np.vecdot(self.read(distinct)[at], self.read(other[block]))
        return similarity

    def read(self, index: NDArray[np.int64] | slice) -> NDArray[np.float32]:
        """Some of the rows, float32 (m, D); zeros for a row of zeros."""
        row_M = self.row_M[index]
        ends = np.cumsum([len(shard) for shard in self.shards])
        half = np.empty((len(row_M), self.width), np.float16)
        order = np.argsort(row_M, kind="stable")
        bounds = np.searchsorted(row_M[order], ends).tolist()
        start = 0
        for shard, last, end in zip(self.shards, bounds, ends.tolist(), strict=True):
            if last > start:
                at = order[start:last]
                half[at] = shard[row_M[at] - (end - len(shard)), 0]
            start = last
        vector = half.astype(np.float32)
        norm = np.sqrt(np.vecdot(vector, vector))[:, None]
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
    import torch

    order = np.argsort(-similarity, kind="stable")
    is_near = np.zeros(len(one), bool)
    # Both rows of each pair, the most similar pair first; a stable sort by row keeps that order.
    row = torch.from_numpy(np.stack([one[order], other[order]], axis=1).ravel())
    sorted_row, by_row = (part.numpy() for part in torch.sort(row, stable=True))
    is_near_end = np.ones(len(by_row), bool)  # whether fewer than NEIGHBOURS before are of its row
    is_near_end[NEIGHBOURS:] = sorted_row[NEIGHBOURS:] != sorted_row[:-NEIGHBOURS]
    is_near[order[by_row[is_near_end] // 2]] = True
    return is_near


def _project(features: UnitVectors) -> torch.Tensor:
    """The rows on their first principal components, float32 (M, K).

    An orthogonal projection of unit vectors: distances can only shrink. Up to EXACT_ROWS rows it
    would take longer than it saves: their numbers stay as they are.
    """
    import torch

    if len(features) <= EXACT_ROWS:
        return torch.from_numpy(features.read(slice(None)))
    step = max(1, len(features) // SAMPLE_ROWS)
    moment: NDArray[np.float64] = np.zeros((features.width, features.width))
    sample = np.arange(0, len(features), step)
    for block in _blocks(len(sample)):
        unit = features.read(sample[block])
        moment += (unit.T @ unit).astype(np.float64)
    _, vector_DD = np.linalg.eigh(moment)  # ascending
    basis_DK = np.ascontiguousarray(vector_DD[:, ::-1][:, :COMPONENTS], np.float32)
    point_MK = np.empty((len(features), basis_DK.shape[1]), np.float32)
    for block in _blocks(len(features)):
        point_MK[block] = features.read(block) @ basis_DK
    return torch.from_numpy(point_MK)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cells:
    """The cells that rows are compared in.

    Attributes:
        members: The rows of each cell, ascending; a row is in one cell, and the first row of a
            divided cell in all its parts. They are compared with each other.
        visitors: The rows of other cells that are compared with each cell's members, ascending.
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
            return _Cells(members=[every], visitors=[every[:0]])
        centre_CK = _k_means(point_MK, rows // ROWS_PER_CELL)
        nearest_MP = _nearest_centres(point_MK, centre_CK, PROBES)
        members, visitors = [], []
        own = _group(nearest_MP[:, 0], len(centre_CK))
        near = _group(nearest_MP[:, 1:].reshape(-1), len(centre_CK))
        for home, probes in zip(own, near, strict=True):
            if len(home) <= MAX_CELL_ROWS:
                members.append(home)
                visitors.append(probes // (nearest_MP.shape[1] - 1))
                continue
            # Too many rows for all pairs: neighbours along the direction in which they differ most.
            order = home[_order_by_largest_spread(point_MK[home])]
            for part in torch.split(order, MAX_CELL_ROWS // 2):
                members.append(torch.unique(torch.cat([home[:1], part])))
                visitors.append(home[:0])
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
    """The nearest centres of each point, the nearest first; int32 (B, count)."""
    import torch

    half_square_C = centre_CK.square().sum(1) / 2
    count = min(count, len(centre_CK))
    step = max(1, BLOCK_CELLS // len(centre_CK))
    nearest_BP = torch.empty((len(point_BK), count), dtype=torch.int32)
    # One buffer for all blocks: small results between freed large ones would keep these from being
    # used again (7 GB for a million rows).
    buffer = torch.empty((min(step, len(point_BK)), len(centre_CK)))
    for block in _blocks(len(point_BK), step):
        part_BK = point_BK[block]
        close_BC = torch.addmm(
            half_square_C, part_BK, centre_CK.T, beta=-1, out=buffer[: len(part_BK)]
        )
        nearest_BP[block] = close_BC.topk(count, dim=1).indices.to(torch.int32)
    return nearest_BP


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

    nearest = _Nearest.empty(point_MK, min_similarity)
    # A row's own cell first: few rows of other cells are nearer than its neighbours there.
    for members in cells.members:
        step = max(1, BLOCK_CELLS // max(1, len(members)))
        for part in torch.split(torch.arange(len(members)), step) if len(members) else ():
            nearest.update(members[part], members, itself=part)
    for members, visitors in zip(cells.members, cells.visitors, strict=True):
        if len(members):
            for part in torch.split(visitors, max(1, BLOCK_CELLS // len(members))):
                nearest.update(part, members)
    return nearest.keys()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Nearest:
    """The nearest rows of each row that were found so far.

    Closeness is minus half the squared distance.

    Attributes:
        point: float32 (M, K).
        minus_half_square: float32 (M,), of the points' lengths.
        least: The closeness from which two rows are close.
        closeness: float32 (M, CANDIDATES), of the nearest rows, descending; -inf for none.
        neighbour: int32 (M, CANDIDATES), these rows.
        first: int32 (M,), the lowest row that is close; M for none.
    """

    point: torch.Tensor
    minus_half_square: torch.Tensor
    least: float
    closeness: torch.Tensor
    neighbour: torch.Tensor
    first: torch.Tensor

    @staticmethod
    def empty(point_MK: torch.Tensor, min_similarity: float) -> _Nearest:
        """No neighbours yet."""
        import torch

        rows = len(point_MK)
        return _Nearest(
            point=point_MK,
            minus_half_square=point_MK.square().sum(1) / -2,
            least=min_similarity - 1 - 5e-6,
            closeness=torch.full((rows, CANDIDATES), -torch.inf),
            neighbour=torch.full((rows, CANDIDATES), -1, dtype=torch.int32),
            first=torch.full((rows,), rows, dtype=torch.int32),
        )

    def update(
        self, visitor_V: torch.Tensor, members_N: torch.Tensor, itself: torch.Tensor | None = None
    ) -> None:
        """Compare V rows with N others; itself: the position of each among these, if it is there.

        Most rows are far from all members of most cells. So only the largest closeness of each row
        is computed for all, and the rest for the rows that it may change something for.
        """
        import torch

        close_VN = torch.addmm(
            self.minus_half_square[members_N], self.point[visitor_V], self.point[members_N].T
        )
        own_V = self.minus_half_square[visitor_V]
        if itself is not None:
            close_VN[torch.arange(len(itself)), itself] = -torch.inf
        best_V = close_VN.amax(1) + own_V
        worst_V = self.closeness[visitor_V, -1]
        is_nearer = (best_V >= self.least) & (best_V > worst_V)
        may_be_first = (best_V >= self.least) & (self.first[visitor_V] > members_N[0])
        for chosen, change in ((is_nearer, self._add), (may_be_first, self._lower_first)):
            at = torch.nonzero(chosen)[:, 0]
            if len(at):
                change(visitor_V[at], members_N, close_VN[at], own_V[at])

    def _add(
        self,
        visitor_V: torch.Tensor,
        members_N: torch.Tensor,
        close_VN: torch.Tensor,
        own_V: torch.Tensor,
    ) -> None:
        """Merge the nearest of some members into the neighbours of V rows."""
        import torch

        found = close_VN.topk(min(CANDIDATES, close_VN.shape[1]), dim=1)
        values = torch.cat([self.closeness[visitor_V], found.values + own_V[:, None]], 1)
        rows = members_N[found.indices].to(torch.int32)
        rows = torch.cat([self.neighbour[visitor_V], rows], 1)
        merged = values.topk(CANDIDATES, dim=1)
        self.closeness[visitor_V] = merged.values
        self.neighbour[visitor_V] = rows.gather(1, merged.indices)

    def _lower_first(
        self,
        visitor_V: torch.Tensor,
        members_N: torch.Tensor,
        close_VN: torch.Tensor,
        own_V: torch.Tensor,
    ) -> None:
        """Lower the first close row of V rows, if a lower member is close."""
        import torch

        below = int(torch.searchsorted(members_N, self.first[visitor_V].max()))
        is_close = close_VN[:, :below] >= (self.least - own_V)[:, None]
        lowest = members_N[is_close.to(torch.uint8).argmax(1)].to(torch.int32)
        lowest = torch.where(is_close.any(1), lowest, len(self.first))
        self.first[visitor_V] = torch.minimum(self.first[visitor_V], lowest)

    def keys(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The keys of all pairs, and of those with the first row of a crowd; see `_candidates`."""
        import torch

        rows = len(self.first)
        self.neighbour[self.closeness < self.least] = -1
        first_keys = _pair_keys(torch.where(self.first < rows, self.first, -1)[:, None])
        return _pair_keys(self.neighbour, first_keys), first_keys


def _pair_keys(
    neighbour_MJ: torch.Tensor, more: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """Keys of the pairs of each row with its neighbours, and more keys; -1 is no neighbour."""
    rows = len(neighbour_MJ)
    keys = [] if more is None else [more]
    for column in neighbour_MJ.T.numpy():
        row = np.flatnonzero(column >= 0)
        other = column[row].astype(np.int64)
        keys.append(np.minimum(row, other) * rows + np.maximum(row, other))
    key = np.concatenate(keys)
    del keys
    key.sort()
    is_new = np.ones(len(key), bool)
    is_new[1:] = key[1:] != key[:-1]
    return key[is_new]


def _blocks(count: int, size: int = BLOCK_ROWS) -> Iterator[slice]:
    """Slices of at most `size` that cover `count` rows."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
