"""Tests whether errors are more frequent in some of many overlapping groups of images.

    errors, groups         -> one p-value per group: Fisher's exact test, one-sided
    errors, shuffled       -> the smallest p-value that chance gives over all groups
      -> adjusted p-values (step-down minP: Westfall and Young, 1993, algorithm 2.8)

Errors that are shares, as with several labels per image, are tested with the normal approximation
of their sum under permutation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

BLOCK = 2**21  # numbers that are shuffled at a time
MAX_SHUFFLED = 5 * 10**8  # numbers over all shuffles of shares; more images get fewer shuffles
MIN_PERMUTATIONS = 200


class PermutationTest:
    """The errors of N images, to be tested in groups.

    Some properties are known only for a sample of the images. Their groups are compared with the
    rest of the sample, and errors are shuffled inside the sample and outside of it, so that the
    number of errors in the sample stays the same.
    """

    def __init__(self, error_N: NDArray[np.float64], sample_N: NDArray[np.bool_]) -> None:
        """error_N: 0 to 1 for each image; sample_N: whether it belongs to the sample."""
        self._error = error_N
        self._sample = sample_N
        self._is_binary = bool(np.isin(error_N, (0, 1)).all())
        self._log_factorial = np.cumsum(np.log(np.maximum(np.arange(len(error_N) + 1), 1)))
        self._strata = [
            one for one in (np.flatnonzero(sample_N), np.flatnonzero(~sample_N)) if len(one)
        ]

    def images(self, sampled: bool) -> int:
        """Number of images with which a group is compared, itself included."""
        return int(self._sample.sum()) if sampled else len(self._sample)

    def run(
        self,
        codes: Sequence[NDArray[np.int32]],
        ranges: Sequence[tuple[int, int]],
        sampled: Sequence[bool],
        permutations: int,
    ) -> tuple[list[float], list[float]]:
        """Test K groups.

        Args:
            codes: For each group int32 (N,), the codes of its property; groups of one property
                share one array.
            ranges: For each group its codes: the first, and the one after the last.
            sampled: For each group whether it is compared with the sample only.
            permutations: Number of shuffles.

        Returns:
            p-values and adjusted p-values of the K groups.
        """
        if not codes:
            return [], []
        everything_N = np.ones(len(self._error), bool)
        statistics = []
        observed = np.zeros(len(codes))
        for k, (code_N, (first, end)) in enumerate(zip(codes, ranges, strict=True)):
            group_N = (code_N >= first) & (code_N < end)
            among_N = self._sample if sampled[k] else everything_N
            statistics.append(self._statistic(int(group_N.sum()), among_N))
            observed[k] = statistics[k](np.array([self._error[group_N].sum()]))[0]
        order = np.argsort(observed, kind="stable")
        sorted_K = observed[order] * (1 + 1e-9)
        if not self._is_binary:
            affordable = MAX_SHUFFLED // (len(self._error) * len({id(one) for one in codes}))
            permutations = min(permutations, max(affordable, MIN_PERMUTATIONS))
        smaller_K = np.zeros(len(codes), np.int64)
        for sums_BK in self._shuffled_sums(codes, ranges, permutations):
            p_BK = np.stack([statistics[k](sums_BK[:, k]) for k in order.tolist()], axis=1)
            smallest_BK = np.minimum.accumulate(p_BK[:, ::-1], axis=1)[:, ::-1]
            smaller_K += (smallest_BK <= sorted_K).sum(0)
        adjusted = np.empty(len(codes))
        adjusted[order] = np.maximum.accumulate((1 + smaller_K) / (1 + permutations))
        return observed.tolist(), adjusted.tolist()

    def _statistic(self, images: int, among_N: NDArray[np.bool_]) -> _Statistic:
        error = self._error[among_N]
        if self._is_binary:
            return _FisherTail(images, len(error), int(error.sum()), self._log_factorial)
        return _NormalTail(images, len(error), float(error.mean()), float(error.std()))

    def _shuffled_sums(
        self,
        codes: Sequence[NDArray[np.int32]],
        ranges: Sequence[tuple[int, int]],
        permutations: int,
    ) -> Iterator[NDArray[np.float64]]:
        """Yield the sums of shuffled errors in every group, float64 (b, K), b shuffles each."""
        rng = np.random.default_rng(0)
        groups: dict[int, list[int]] = {}
        for k, code_N in enumerate(codes):
            groups.setdefault(id(code_N), []).append(k)
        errors = int(self._error.sum()) if self._is_binary else len(self._error)
        block = max(1, BLOCK // max(errors, 1))
        for start in range(0, permutations, block):
            count = min(block, permutations - start)
            position_BE, weight_BE = self._shuffle(rng, count)
            sums_BK = np.empty((count, len(codes)))
            for members in groups.values():
                code_N = codes[members[0]]
                width = int(code_N.max(initial=0)) + 1
                flat = code_N[position_BE].astype(np.int64) + width * np.arange(count)[:, None]
                weight = None if weight_BE is None else weight_BE.ravel()
                total_BC = np.bincount(flat.ravel(), weight, count * width).reshape(count, width)
                below_BC = np.concatenate(
                    [np.zeros((count, 1)), np.cumsum(total_BC, axis=1)], axis=1
                )
                for k in members:
                    first, end = (min(one, width) for one in ranges[k])
                    sums_BK[:, k] = below_BC[:, end] - below_BC[:, first]
            yield sums_BK

    def _shuffle(
        self, rng: np.random.Generator, count: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float64] | None]:
        """Shuffle the errors `count` times: positions (b, E), and their errors unless all are 1."""
        parts = []
        for stratum in self._strata:
            if self._is_binary:
                errors = int(self._error[stratum].sum())
                drawn = [
                    rng.choice(len(stratum), errors, replace=False, shuffle=False)
                    for _ in range(count)
                ]
            else:
                drawn = [rng.permutation(len(stratum)) for _ in range(count)]
            parts.append(stratum[np.stack(drawn)])
        position_BE = np.concatenate(parts, axis=1)
        if self._is_binary:
            return position_BE, None
        weight_E = np.concatenate([self._error[stratum] for stratum in self._strata])
        return position_BE, np.broadcast_to(weight_E, position_BE.shape)


class _FisherTail:
    """P(at least x errors) among m of n images, if E errors are spread at random over the n."""

    def __init__(
        self, images: int, among: int, errors: int, log_factorial: NDArray[np.float64]
    ) -> None:
        def log_choose(n: int, k: NDArray[np.int64]) -> NDArray[np.float64]:
            result: NDArray[np.float64] = log_factorial[n] - log_factorial[k] - log_factorial[n - k]
            return result

        x = np.arange(max(0, images + errors - among), min(images, errors) + 1)
        log_p = log_choose(errors, x) + log_choose(among - errors, images - x)
        log_p -= log_choose(among, np.array(images))
        tail = np.cumsum(np.exp(log_p)[::-1])[::-1]
        self._tail = np.minimum(np.concatenate([np.ones(x[0]), tail]), 1.0)

    def __call__(self, sum_B: NDArray[np.float64]) -> NDArray[np.float64]:
        """The p-value of each number of errors."""
        index_B = np.minimum(np.rint(sum_B).astype(np.int64), len(self._tail) - 1)
        p_B: NDArray[np.float64] = self._tail[index_B]
        return p_B


class _NormalTail:
    """P(a sum of at least x) over m of n images whose errors are shuffled, approximately."""

    def __init__(self, images: int, among: int, mean: float, deviation: float) -> None:
        self._mean = images * mean
        variance = deviation**2 * images * (among - images) / max(among - 1, 1)
        self._deviation = max(math.sqrt(variance), 1e-300)

    def __call__(self, sum_B: NDArray[np.float64]) -> NDArray[np.float64]:
        """The p-value of each sum."""
        from scipy.special import ndtr

        p_B: NDArray[np.float64] = ndtr((self._mean - sum_B) / self._deviation)
        return p_B


_Statistic = _FisherTail | _NormalTail
