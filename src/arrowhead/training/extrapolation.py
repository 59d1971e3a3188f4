"""What more labels would give: a cross-validated learning curve, and its continuation.

    features, labels   -> measure       heads on growing shares of the folds' training images, each
                                        tested on the fold that was left out
    errors by size     -> extrapolate   a power law a + b n^-c, with an interval

Error rates of many learners fall as a power of the number of training images (Hestness et al.,
arXiv:1712.00409; Rosenfeld et al., arXiv:1909.12673). The interval covers the chance of the
test images and of the draws, not that the law itself may not hold so far out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from arrowhead.training import comparison, cross_validation, learning_curve, logistic
from arrowhead.training.config import TrainConfig
from arrowhead.training.dataset import Data, InMemoryFeatures, Trial
from arrowhead.training.trainer import TrainedHead

FOLDS, REPEATS = 5, 2
MIN_PER_CLASS = 3  # on average, in the smallest share
MAX_WORK = 1 << 33  # images x width x classes x heads; above, fewer repeats, then a sample
EXPONENTS = np.linspace(0.1, 2.0, 39)
RESAMPLES = 2000
LOGISTIC = TrainConfig(head="logistic", class_weights="none")


@dataclass(frozen=True, slots=True)
class MeasuredCurve:
    """A learning curve, ascending by size; S sizes, N different images.

    Attributes:
        images: (S,), mean number of training images.
        correct: float64 (S, N), how often the held-out image was right, over the draws.
        draws: float64 (S, draws), the share of right images of each draw.
    """

    images: NDArray[np.float64]
    correct: NDArray[np.float64]
    draws: NDArray[np.float64]

    def points(self) -> list[dict[str, float]]:
        """Images, accuracy, half of its 95 % interval and the spread over draws, by size."""
        return [
            {
                "images": round(float(images)),
                "accuracy": float(correct.mean()),
                "half_width": comparison.half_width(correct),
                "spread": float(draws.std(ddof=1)) if len(draws) > 1 else 0.0,
            }
            for images, correct, draws in zip(self.images, self.correct, self.draws, strict=True)
        ]


def head_logits(
    data: Data,
    train: NDArray[np.int64],
    test: NDArray[np.int64],
    l2: float | Literal["auto"] = "auto",
) -> TestedHead:
    """Train a logistic regression on some rows (all their views), and test it on the first view of
    others.
    """
    import torch

    from arrowhead.training import heads

    trial = Trial(config=replace(LOGISTIC, l2=l2), lr=0.0, train=train, valid=test)
    trained = logistic.train(data, [trial])[0]
    state = {name: torch.from_numpy(value) for name, value in trained.state.items()}
    views, width = data.feature.shape[1:]
    head = heads.restore_head("linear", width, len(data.classes), state)
    with torch.inference_mode():
        flat = torch.from_numpy(test * views).to(data.feature.device)
        logit: NDArray[np.float32] = head(data.feature.take(flat).float().cpu()).numpy()
    return TestedHead(trained, logit)


@dataclass(frozen=True, slots=True)
class TestedHead:
    """A head and its logits of the images that it was tested on, float32 (n, C)."""

    head: TrainedHead
    logit: NDArray[np.float32]


def correct_share(logit_NC: NDArray[np.float32], label: NDArray[Any]) -> NDArray[np.float64]:
    """1 for each image that is right, else 0; with several labels the share of right ones."""
    if label.ndim == 2:
        share: NDArray[np.float64] = ((logit_NC > 0) == (label > 0)).mean(1)
        return share
    correct: NDArray[np.float64] = (logit_NC.argmax(1) == label).astype(np.float64)
    return correct


def first_views(data: Data, rows: NDArray[np.int64]) -> Data:
    """The clean views of some rows as data of their own, in memory."""
    import torch

    flat = torch.from_numpy(rows * data.feature.shape[1]).to(data.feature.device)
    feature = InMemoryFeatures(data.feature.take(flat)[:, None])
    everything = np.arange(len(rows))
    return replace(
        data,
        feature=feature,
        label=data.label[torch.from_numpy(rows)],
        key=data.key[rows],
        train=everything,
        valid=everything[:0],
    )


def measure(
    data: Data, report: Callable[[int, int], None] = lambda done, of: None
) -> MeasuredCurve:
    """Measure the learning curve of heads on the training and validation images together.

    Args:
        data: Features and labels; first views are used.
        report: Gets the number of heads that are done, and of all.

    Raises:
        ConfigError: No class has two different images.
    """
    data = first_views(data, np.sort(np.concatenate([data.train, data.valid])))
    work = len(data.key) * data.feature.shape[2] * len(data.classes) * FOLDS
    if work > MAX_WORK:
        parts = -(-work // MAX_WORK)
        label = data.label.cpu().numpy()
        part = cross_validation.assign_folds(data.key, label, parts, data.classes)
        data = first_views(data, np.flatnonzero(part <= 0))
    repeats = int(np.clip(MAX_WORK // work, 1, REPEATS))
    label = data.label.cpu().numpy()
    rows = len(data.key)
    sums: dict[float, NDArray[np.float64]] = {}
    images: dict[float, list[int]] = {}
    strength: dict[float, float] = {}  # of each share, chosen in the first fold
    for repeat in range(repeats):
        # Copies keep one key, so they stay in one fold.
        key = cross_validation.shuffle_keys(data.key, f"draw {repeat}")
        fold = cross_validation.assign_folds(key, label, FOLDS, data.classes)
        folds = int(fold.max()) + 1
        for number in range(folds):
            train = np.flatnonzero(fold != number)
            test = np.flatnonzero(fold == number)
            shares = learning_curve.nested_rows(replace(data, key=key, train=train), 0)
            for share, chosen in shares.items():
                if share < 1 and len(chosen) < MIN_PER_CLASS * len(data.classes):
                    continue
                tested = head_logits(data, chosen, test, strength.get(share, "auto"))
                if tested.head.l2 is not None:
                    strength[share] = tested.head.l2
                place = sums.setdefault(share, np.full((repeats, rows), np.nan))
                place[repeat, test] = correct_share(tested.logit, label[test])
                images.setdefault(share, []).append(len(chosen))
            report(repeat * folds + number + 1, repeats * folds)
    # A share that is too small in one draw for all classes says nothing about the images of it.
    complete = [s for s in sorted(sums) if not np.isnan(sums[s][:, fold >= 0]).any()]
    judged = ~np.isnan(sums[complete[-1]]).any(0)
    first = np.unique(data.key[judged], return_index=True)[1]
    values = np.stack([sums[share][:, judged][:, first] for share in complete])
    return MeasuredCurve(
        images=np.array([np.mean(images[share]) for share in complete]),
        correct=values.mean(1),
        draws=values.mean(2),
    )


@dataclass(frozen=True, slots=True)
class Forecast:
    """The expected accuracy with another number of training images.

    Attributes:
        images: That number.
        accuracy: Expected.
        gain: Over the first number that was asked for, in accuracy.
        low, high: The 95 % interval of the gain.
    """

    images: int
    accuracy: float
    gain: float
    low: float
    high: float


def extrapolate(curve: MeasuredCurve, images: Sequence[int], seed: int = 0) -> list[Forecast]:
    """Continue a learning curve to larger numbers of images; [] for fewer than 3 points.

    The interval is that of a parametric bootstrap: errors as the tested images and the draws let
    them vary.
    """
    sizes = curve.images
    if len(sizes) < 3:
        return []
    count = curve.correct.shape[1]
    rng = np.random.default_rng(seed)
    error_S = 1 - curve.correct.mean(1)
    # Sizes share their test images, so their errors are correlated; draws are independent.
    covariance = np.cov(curve.correct) / count
    draws = curve.draws.shape[1]
    if draws > 1:
        covariance += np.diag(curve.draws.var(1, ddof=1) / draws)
    noise_RS = rng.multivariate_normal(np.zeros(len(sizes)), covariance, RESAMPLES)
    error_BS = np.vstack([error_S, (error_S + noise_RS).clip(0, 1)])
    wanted = np.array([sizes[-1], *images], float)
    fitted_BM = _fit_power_law(sizes, error_BS, wanted, count)
    better_BM = fitted_BM[:, :1] - fitted_BM[:, 1:]  # than at the largest measured number
    gain_BM = better_BM - better_BM[:, :1]
    low, high = np.quantile(gain_BM[1:], (0.025, 0.975), axis=0)
    now = 1 - float(error_BS[0, -1])
    return [
        Forecast(
            int(number),
            min(now + float(better_BM[0, i]), 1.0),
            float(gain_BM[0, i]),
            float(low[i]),
            float(high[i]),
        )
        for i, number in enumerate(images)
    ]


def _fit_power_law(
    sizes: NDArray[np.float64],
    error_BS: NDArray[np.float64],
    wanted: NDArray[np.float64],
    count: int,
) -> NDArray[np.float64]:
    """Fit a + b n^-c, with a and b of at least 0, to each row of errors; its values at `wanted`.

    A grid over c, and for each the weighted least squares of a and b; weights as of the variance of
    a share of `count` images.
    """
    mean_S = error_BS[0]
    weight_S = 1 / (mean_S * (1 - mean_S) + 1 / count)
    best = np.full(len(error_BS), np.inf)
    result = np.zeros((len(error_BS), len(wanted)))
    for exponent in EXPONENTS:
        x, x_wanted = (sizes / sizes[0]) ** -exponent, (wanted / sizes[0]) ** -exponent
        total = weight_S.sum()
        mean_x, mean_y = (weight_S * x).sum() / total, error_BS @ weight_S / total
        b = (error_BS - mean_y[:, None]) @ (weight_S * (x - mean_x))
        b = b / (weight_S * (x - mean_x) ** 2).sum()
        a = mean_y - b * mean_x
        only_b = error_BS @ (weight_S * x) / (weight_S * x * x).sum()
        a, b = np.where(a < 0, 0, a), np.where(a < 0, only_b, b)
        a, b = np.where(b < 0, mean_y, a), np.where(b < 0, 0, b)
        residual = (weight_S * (error_BS - a[:, None] - b[:, None] * x) ** 2).sum(1)
        better = residual < best
        best = np.where(better, residual, best)
        values = a[:, None] + b[:, None] * x_wanted
        result = np.where(better[:, None], values, result)
    return result
