"""A rising rate on cached features, and the rates it suggests.

    features, TrainConfig
      -> curve               float64 (R, S): the loss of R seeds at each of S rates
      -> suggest             valley, steepest, minimum/10, and a verdict

The range test of Smith (arXiv:1506.01186, section 3.3), with the very step that trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead import ConfigError
from arrowhead.train import (
    Data,
    Team,
    TrainConfig,
    Trainer,
    batches,
    together,
    validate,
    view_of,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class FinderConfig:
    """The range that is tested."""

    low: float = 1e-6
    """First rate."""
    high: float = 10.0
    """Last rate, unless every seed has diverged before."""
    steps: int = 100
    """Steps from low to high."""
    seeds: int = 3
    """Tests with different first weights and orders; suggestions are taken from their mean."""

    def __post_init__(self) -> None:
        if not (0 < self.low < self.high <= 1e38 and self.steps >= 20 and self.seeds >= 1):
            raise ConfigError(
                f"The range test asked for is {self.low} to {self.high} in {self.steps} steps with"
                f" {self.seeds} seeds.",
                "0 < low < high (1e38 at most), 20 steps or more, 1 seed or more.",
                "leave --low, --high, --steps and --seeds at their defaults, or mend them.",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """rates: float64 (S,); losses: float64 (R, S), smoothed, nan where a seed had diverged;
    suggestions: rates by name; verdict: good, "flat: no signal" or unstable.
    """

    rates: NDArray[np.float64]
    losses: NDArray[np.float64]
    suggestions: dict[str, float]
    verdict: str

    @property
    def rate(self) -> float:
        """The suggestion that `--rate auto` uses."""
        return self.suggestions["valley"]

    def plain(self) -> dict[str, Any]:
        """As lists and numbers, for JSON."""
        return {
            "rates": self.rates.tolist(),
            "losses": [[None if np.isnan(x) else x for x in row] for row in self.losses.tolist()],
            "suggestions": self.suggestions,
            "verdict": self.verdict,
        }


def rates(config: FinderConfig) -> NDArray[np.float64]:
    """Smith rises linearly; we rise geometrically, since good rates differ by factors."""
    return np.geomspace(config.low, config.high, config.steps)


def find(data: Data, config: TrainConfig, finder: FinderConfig, team: Team = Team()) -> Curve:
    """The curve of every seed and what it suggests.

    Losses are summed over all workers at every step, so all of them stop at the same one.
    """
    tested = rates(finder)
    losses = np.full((finder.seeds, finder.steps), np.nan)
    held_out = np.inf
    for seed in range(finder.seeds):
        one = replace(config, seed=config.seed + seed)
        losses[seed], lowest = _one(data, one, tested, team)
        held_out = min(held_out, lowest)
    return suggest(tested, losses, held_out / _entropy(data))


def _entropy(data: Data) -> float:
    """Loss, in nats, of a guess that knows how common each class is and nothing of the image."""
    import torch

    share = torch.bincount(data.valid_label, minlength=data.classes).double()
    share = share[share > 0] / share.sum()
    return max(float(-(share * share.log()).sum()), 1e-12)


def _one(
    data: Data, config: TrainConfig, tested: NDArray[np.float64], team: Team
) -> tuple[NDArray[np.float64], float]:
    """The bias-corrected running mean of the loss at each rate, nan after it has diverged; and
    the lowest loss on rows held out, since a head can always learn its own rows by heart.
    """
    held = data.valid_feature[:2048], data.valid_label[:2048]
    lowest = np.inf
    trainer = Trainer(data, config, team)
    rows, views = data.train_feature.shape[:2]
    losses, mean, best = np.full(len(tested), np.nan), 0.0, np.inf
    epoch = 0
    waiting: Iterator[NDArray[np.int64]] = iter(())
    for number, rate in enumerate(tested):
        batch = next(waiting, None)
        if batch is None:
            waiting = batches(rows, config.batch_size, config.seed, epoch)
            batch, epoch = next(waiting), epoch + 1
        view = view_of(batch, views, config.seed, epoch)
        loss = together(trainer.move(batch, view, rate), team).loss
        mean = 0.9 * mean + 0.1 * loss
        smooth = mean / (1 - 0.9 ** (number + 1))
        best = min(best, smooth)
        if not np.isfinite(loss) or (number > 10 and smooth > 4 * best + 0.1):
            break
        losses[number] = smooth
        if number % 5 == 4:
            lowest = min(lowest, validate(trainer.head, *held, team).loss)
    return losses, lowest


def suggest(
    tested: NDArray[np.float64], losses: NDArray[np.float64], held_out: float = 0.0
) -> Curve:
    """Rates read off the mean curve of the seeds, up to where the first of them diverged.

    minimum/10: a tenth of the rate of the lowest loss; steepest: where the loss falls fastest per
    factor of rate; valley: two thirds into the longest fall (as fastai 2 does).
    held_out: the lowest loss on held-out rows, as a share of what blind guessing costs. The verdict
    is flat where that is not below 0.98 or the curve hardly falls.
    """
    alive = np.flatnonzero(np.isfinite(losses).all(0))
    if len(alive) < 3:  # diverged at once: nothing below the first rate is known
        lowest_rate = dict.fromkeys(("valley", "steepest", "minimum/10"), float(tested[0]))
        return Curve(rates=tested, losses=losses, suggestions=lowest_rate, verdict="unstable")
    mean = losses[:, alive].mean(0)
    lowest = int(mean.argmin())
    slope = np.gradient(mean, np.log(tested[alive]))
    start, stop = _longest_fall(mean)
    chosen = {
        "valley": tested[alive[start + (stop - start) * 2 // 3]],
        "steepest": tested[alive[int(slope[: lowest + 1].argmin())]],
        "minimum/10": tested[alive[lowest]] / 10,
    }
    fall = mean[0] - mean[lowest]
    spread = losses[:, alive[lowest]].std() / max(fall, 1e-12)
    flat = held_out > 0.98 or fall < 0.05 * abs(mean[0])
    verdict = "flat: no signal" if flat else "unstable" if spread > 0.5 else "good"
    suggestions = {name: float(value) for name, value in chosen.items()}
    return Curve(rates=tested, losses=losses, suggestions=suggestions, verdict=verdict)


def _longest_fall(mean: NDArray[np.float64]) -> tuple[int, int]:
    """Ends of the longest decreasing subsequence: where the loss falls, bumps left out."""
    length, start = np.ones(len(mean), int), np.arange(len(mean))
    for i in range(1, len(mean)):
        longer = np.flatnonzero((mean[:i] > mean[i]) & (length[:i] + 1 > length[i]))
        if len(longer):
            best = longer[length[longer].argmax()]
            length[i], start[i] = length[best] + 1, start[best]
    end = int(length.argmax())
    return int(start[end]), end
