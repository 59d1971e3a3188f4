"""How many labels are wrong, and which: a mixture of right and wrong labels.

    margins of held-out predictions   how strongly each speaks for the label that was given
      -> fit                          scale of each, rate of wrong labels: maximum likelihood
      -> LabelNoise.wrong             probability that a label is wrong, given all of these

The likelihood is that of logistic regression under random label noise (Bootkrajang & Kaban, "Label-
noise Robust Logistic Regression and Its Applications", ECML PKDD 2012): a label is recorded wrongly
at some rate, whatever the image, so an image can contradict its label only as far as this rate and
the sharpness of the predictions explain. Predictions that are often unsure explain a contradiction
without an error; sharp ones do not. Confident learning (Northcutt et al., arXiv:1911.00068) counts
contradictions beyond thresholds instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RATE_PRIOR = (1.5, 20.0)  # of the rates, a beta distribution: its mode is 2.6 %
SHARPNESS_PRIOR = 2.0  # power of the mean absolute logit: where the images do not tell sharp
# predictions of wrong labels from unsure ones of right labels, the former are assumed
MODE_SHARPNESS = 10.0  # mean absolute logit from which on the prior falls with the same power: few
# images that are told apart without an overlap would be judged the surer the larger the logits
SCALE_LIMITS = (-7.0, 4.0)  # of the natural logarithm of a scale
RATE_LIMITS = (-12.0, 0.0)  # of the logit of a rate: a label is more often right than wrong
STARTS = ((0.0, -2.2), (0.0, -4.6), (-2.0, -2.2), (-2.0, -4.6))  # scale, rate
DRAWS = 400  # of the parameters, for the interval


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelNoise:
    """The fitted mixture; M labels, J margins of each.

    Attributes:
        scale: float64 (J,), by which the margins are multiplied before they are added up: a weight
            and a temperature at once.
        rate: float64 (R,), the share of labels recorded wrongly. R is 1, or 2 with several labels
            per image: that of labels which are missing, and that of labels which are too many.
        margin: float64 (M,), the scaled margins' sum: the logit of the given label.
        wrong: float64 (M,), the probability that each label is wrong.
        interval: Between which numbers of wrong labels the true one lies with 95 % probability.
        cost: What the fit minimized, nats: lower is better for the same labels.
    """

    scale: NDArray[np.float64]
    rate: NDArray[np.float64]
    margin: NDArray[np.float64]
    wrong: NDArray[np.float64]
    interval: tuple[float, float]
    cost: float


def fit(
    margin_MJ: NDArray[np.float64],
    present_M: NDArray[np.bool_] | None = None,
    *,
    interval: bool = True,
) -> LabelNoise:
    """Fit the mixture.

    Args:
        margin_MJ: The logit of the given label against all others, from J predictions that have
            not seen it.
        present_M: With several labels per image, whether the label was given; a label that was
            not given is another kind of entry with a rate of its own. None: one label per image.
        interval: Whether the interval is wanted; without it, it is (nan, nan).
    """
    from scipy.optimize import minimize

    kind = None if present_M is None else present_M.astype(np.int64)
    rates, margins = 1 if kind is None else 2, margin_MJ.shape[1]

    def cost(point: NDArray[np.float64]) -> float:
        right, wrong, rate = _likelihoods(point, margin_MJ, kind)
        size = np.abs(margin_MJ @ np.exp(point[:margins])).mean() + 1e-9
        sharpness = SHARPNESS_PRIOR * np.log(min(size, MODE_SHARPNESS**2 / size))
        prior = (RATE_PRIOR[0] - 1) * np.log(rate) + (RATE_PRIOR[1] - 1) * np.log1p(-rate)
        return float(-np.log(np.maximum(right + wrong, 1e-300)).sum() - prior.sum() - sharpness)

    limits = [SCALE_LIMITS] * margins + [RATE_LIMITS] * rates
    results = [
        minimize(cost, np.repeat(start, (margins, rates)), method="L-BFGS-B", bounds=limits)
        for start in STARTS
    ]
    best = min(results, key=lambda result: float(result.fun))
    right, wrong, rate = _likelihoods(best.x, margin_MJ, kind)
    posterior = wrong / np.maximum(right + wrong, 1e-300)
    bounds = (np.nan, np.nan)
    if interval:
        draws = _draw_counts(cost, best.x, limits, margin_MJ, kind)
        low, high = np.quantile(draws, (0.025, 0.975))
        bounds = (float(max(low, 0.0)), float(min(high, len(margin_MJ))))
    return LabelNoise(
        scale=np.exp(best.x[:margins]),
        rate=rate,
        margin=margin_MJ @ np.exp(best.x[:margins]),
        wrong=posterior,
        interval=bounds,
        cost=float(best.fun),
    )


def _likelihoods(
    point: NDArray[np.float64],
    margin_MJ: NDArray[np.float64],
    kind: NDArray[np.int64] | None,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return how likely each given label is as a right one and as a wrong one, and the rates."""
    margins = margin_MJ.shape[1]
    rate = 1 / (1 + np.exp(-point[margins:]))
    total = np.clip(margin_MJ @ np.exp(point[:margins]), -500, 500)
    prob, other = 1 / (1 + np.exp(-total)), 1 / (1 + np.exp(total))  # 1 - prob would round to 0
    if kind is None:
        return (1 - rate[0]) * prob, rate[0] * other, rate
    # A label that is absent (0) is right at 1 - surplus and wrong at the rate of missing ones.
    return (1 - rate[1 - kind]) * prob, rate[kind] * other, rate


def _draw_counts(
    cost: Callable[[NDArray[np.float64]], float],
    best: NDArray[np.float64],
    limits: list[tuple[float, float]],
    margin_MJ: NDArray[np.float64],
    kind: NDArray[np.int64] | None,
) -> NDArray[np.float64]:
    """Draw numbers of wrong labels: parameters from their normal approximation (the Laplace
    approximation), then the number of wrong labels given these.
    """
    size, step = len(best), 0.05
    hessian = np.empty((size, size))
    unit = np.eye(size) * step
    for i in range(size):
        for j in range(i, size):
            corners = [
                cost(best + a * unit[i] + b * unit[j]) * a * b for a in (1, -1) for b in (1, -1)
            ]
            hessian[i, j] = hessian[j, i] = sum(corners) / (4 * step**2)
    value, vector = np.linalg.eigh(hessian)
    deviation = vector / np.sqrt(np.maximum(value, 0.25))  # at most 2 in every direction
    rng = np.random.default_rng(0)
    low, high = np.transpose(limits)
    counts = []
    for normal in rng.standard_normal((DRAWS, size)):
        point = np.clip(best + deviation @ normal, low, high)
        right, wrong, _ = _likelihoods(point, margin_MJ, kind)
        posterior = wrong / np.maximum(right + wrong, 1e-300)
        noise = np.sqrt((posterior * (1 - posterior)).sum()) * rng.standard_normal()
        counts.append(posterior.sum() + noise)
    return np.array(counts)
