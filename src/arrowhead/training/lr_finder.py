"""The LR finder: a rising learning rate on cached features, and the rates it suggests.

    features, TrainConfig
      -> find_learning_rate  R seeds in one stack, S steps, each at a higher rate
      -> losses, held_out    float64 (R, S): on training rows, and on held-out rows
      -> suggest             a rate by each of five rules, their spread over seeds, a verdict
      -> race                on request: the suggested rates, trained and compared

This is the range test of Smith (arXiv:1506.01186, section 3.3), with the very step that trains.

fastai's and Lightning's finders look only at the training loss. A feature store is small: a
hundred steps pass over 600 rows ten times, and a head overfits them at any rate. The loss of
held-out rows predicts the result of training, so the rate that `--rate auto` takes and the verdict
come from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arrowhead import fileio
from arrowhead.errors import ConfigError
from arrowhead.training.batches import DistributedContext
from arrowhead.training.config import TrainConfig, total_steps
from arrowhead.training.dataset import Data, Trial
from arrowhead.training.losses import Loss
from arrowhead.training.trainer import Training, limit_threads, train_stack

if TYPE_CHECKING:
    from torch import Tensor

# Enough held-out rows to tell 2 % of the loss, few enough to evaluate 25 times.
MAX_HELD_OUT_ROWS = 2048
HELD_OUT_EVALUATIONS = 25
# Standard deviations by which held-out rows must tell labels from chance: 600 stores with shuffled
# labels reached 3.1 at most, with 25 evaluations each.
MIN_SIGNAL = 3.5
MAX_SUGGESTION_SPAN = 1000.0  # a good verdict has suggestions within this factor
MAX_SEED_SPREAD = 4.0  # a stable rate has a geometric standard deviation over seeds up to this

# Trainings of up to this many steps are tried in full at several rates, if that is quick: the work
# is steps x rates x rows x features x columns.
MAX_SCHEDULE_STEPS = 500
MAX_SCHEDULE_WORK = 1 << 35
SCHEDULE_POWERS = (-3, -2, -1, 0, 1, 2, 3, 4, 5, 6)  # of two, times the first suggestion

MAX_LOSS = 1e30  # nats; a higher loss counts as infinite: its square might overflow

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class FinderConfig:
    """The range of learning rates to test."""

    low: float = 1e-6
    """First rate."""
    high: float = 10.0
    """Last rate; the test ends earlier if every seed has diverged."""
    steps: int = 100
    """Steps from low to high."""
    seeds: int = 3
    """Tests with different initial weights and row orders; suggestions come from their mean."""
    race: bool = False
    """Train heads at every suggested rate; the one with the lowest validation loss wins."""
    race_epochs: int | None = None
    """Epochs of the race. Default: as many as the training has."""

    def __post_init__(self) -> None:
        if not (0 < self.low < self.high <= 1e38 and self.steps >= 20 and self.seeds >= 1):
            raise ConfigError(
                f"The range test is set to {self.low} to {self.high} in {self.steps} steps with"
                f" {self.seeds} seeds.",
                "0 < low < high (1e38 at most), 20 steps or more, 1 seed or more.",
                "leave --low, --high, --steps and --seeds at their defaults, or correct them.",
            )
        if self.race_epochs is not None and not (self.race and self.race_epochs >= 1):
            raise ConfigError(
                f"--race-epochs is {self.race_epochs}, --race is {'on' if self.race else 'off'}.",
                "--race, and 1 epoch or more.",
                "add --race and give --race-epochs 1 or more, or leave both out.",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """The losses of the range test, and the learning rates that they suggest.

    Attributes:
        rates: The learning rate of each step, float64 (S,).
        losses: Smoothed training losses, float64 (R, S), nats; nan from the step where a seed
            diverged.
        suggestions: Learning rates by the names of the rules (see `suggest`).
        verdict: "good" (held-out rows tell labels from chance, seeds agree, all suggestions lie
            within a factor of 1,000), "flat: no signal", "unstable" or "rules differ".
        held_out: Losses on held-out rows after the step, float64 (R, S), nats; nan where it was
            not computed.
        spreads: By the names of suggestions, the factor by which seeds differ: the geometric
            standard deviation, 1 if all seeds agree. Empty with one seed, or if one diverged at
            once.
        race: Validation losses by the names of suggestions, inf if training diverged; None without
            a race.
    """

    rates: Floats
    losses: Floats
    suggestions: dict[str, float]
    verdict: str
    held_out: Floats | None = None
    spreads: dict[str, float] = field(default_factory=dict)
    race: dict[str, float] | None = None

    @property
    def chosen(self) -> str:
        """The name of the suggestion that `--rate auto` uses: the race's winner, or the first."""
        if self.race:
            return min(self.race, key=self.race.__getitem__)
        return next(iter(self.suggestions))

    @property
    def span(self) -> float:
        """The factor between the lowest and the highest suggestion."""
        return max(self.suggestions.values()) / min(self.suggestions.values())

    @property
    def words(self) -> str:
        """The verdict and what it means."""
        meanings = {
            "good": "seeds agree, and all suggestions lie within a factor of"
            f" {math.ceil(self.span)}",
            "unstable": "seeds suggest rates far from each other",
            "rules differ": f"seeds agree, but suggestions lie a factor of {self.span:,.0f} apart",
        }
        if self.verdict not in meanings:
            return self.verdict
        return f"{self.verdict}: {meanings[self.verdict]}"

    @property
    def rate(self) -> float:
        """The learning rate that `--rate auto` uses."""
        return self.suggestions[self.chosen]

    def __repr__(self) -> str:
        """In one line; the arrays would fill the screen at a prompt."""
        rates = " · ".join(f"{name} {rate:.2g}" for name, rate in self.suggestions.items())
        return (
            f"{type(self).__name__}(rate {self.rate:.2g} ({self.chosen}): {rates}; {self.verdict})"
        )

    def plain(self) -> dict[str, Any]:
        """Return the curve as lists and numbers, for JSON."""
        names = ["rates", "losses", "held_out", "suggestions", "spreads", "race", "chosen"]
        return dict(fileio.jsonable({name: getattr(self, name) for name in [*names, "verdict"]}))

    @staticmethod
    def from_plain(plain: dict[str, Any]) -> Curve:
        """Restore a curve from what `plain` returned."""
        race = plain["race"] and {k: np.inf if v is None else v for k, v in plain["race"].items()}
        held_out = plain["held_out"] and np.array(plain["held_out"], np.float64)
        return Curve(
            rates=np.array(plain["rates"]),
            losses=np.array(plain["losses"], np.float64),  # None becomes nan
            held_out=held_out,
            suggestions=plain["suggestions"],
            spreads=plain["spreads"],
            race=race,
            verdict=plain["verdict"],
        )


def rate_range(config: FinderConfig) -> Floats:
    """Return the rates of the test, in geometric steps: good rates differ by factors.

    Smith's steps are linear.
    """
    return np.geomspace(config.low, config.high, config.steps)


# ------------------------------------------------------------------------------- the test


def find_learning_rate(
    data: Data,
    config: TrainConfig,
    finder: FinderConfig,
    distributed: DistributedContext = DistributedContext(),
) -> Curve:
    """Run the range test, and suggest learning rates.

    All workers call this function together. When to stop is decided from numbers that all of them
    have, so none stops alone.
    """
    import torch

    rates = rate_range(finder)
    # Rows come sorted by path, that is by class: the first 2,048 may all be of one class.
    sample = np.sort(np.random.default_rng(0).permutation(len(data.valid))[:MAX_HELD_OUT_ROWS])
    configs = [replace(config, seed=config.seed + seed) for seed in range(finder.seeds)]
    held_out_rows = data.valid[sample]
    trials = [Trial(config=one, lr=1.0, train=data.train, valid=held_out_rows) for one in configs]
    training = Training(data, trials, distributed)
    raw = np.full((finder.seeds, finder.steps), np.nan)
    held_out, signal = raw.copy(), 0.0
    interval = max(1, finder.steps // HELD_OUT_EVALUATIONS)
    pending: list[Tensor] = []  # losses on the device: reading each would wait for it every step
    for step, rate in enumerate(rates):
        with limit_threads(training):
            pending.append(training.train_step(step, float(rate)))
        if len(pending) < interval and step + 1 < finder.steps:
            continue
        losses = _sum_over_workers(torch.stack(pending).double(), distributed).cpu().numpy()
        losses[np.abs(losses) > MAX_LOSS] = np.inf
        positions = [training.position_of[seed] for seed in range(finder.seeds)]
        raw[:, step + 1 - len(pending) : step + 1] = [losses[:, i, k] for i, k in positions]
        pending = []
        alive = ~np.isnan(smooth(raw[:, : step + 1])[:, -1])
        if not alive.any():
            break
        held_out_losses, step_signal = _evaluate_held_out(
            training, held_out_rows, alive, distributed
        )
        held_out[alive, step] = held_out_losses[alive]
        signal = max(signal, step_signal)
    curve = suggest(rates, smooth(raw), held_out, signal)
    curve = _with_schedule_suggestion(curve, data, configs, distributed)
    if curve.verdict == "good" and curve.span >= MAX_SUGGESTION_SPAN:
        curve = replace(curve, verdict="rules differ")
    return _with_race(curve, data, configs, finder, distributed) if finder.race else curve


def _sum_over_workers(value: Tensor, distributed: DistributedContext) -> Tensor:
    import torch.distributed as dist

    if distributed.world_size > 1:
        dist.all_reduce(value)
    return value


def _evaluate_held_out(
    training: Training,
    rows: NDArray[np.int64],
    alive: NDArray[np.bool_],
    distributed: DistributedContext,
) -> tuple[Floats, float]:
    """Evaluate the heads on held-out rows.

    The signal is the score test of the logits' scale at 0: if labels are independent of images, the
    sum over rows of (label - its mean) x (logit - its mean) has expectation 0, however much the
    head has overfitted. Its t statistic is converted to standard deviations of a normal variable
    (Wallace 1959), for stores of few rows.

    Args:
        training: The heads, one per seed.
        rows: The held-out rows.
        alive: Which seeds have not diverged, bool (R,).
        distributed: This worker's rank.

    Returns:
        The loss of each head, float64 (R,), nats; and the signal: by how many standard deviations
        the heads that have not diverged are better than chance.
    """
    import torch

    data, device = training.data, training.data.label.device
    label = data.label[torch.from_numpy(rows).to(device)]
    flat = torch.from_numpy(rows * data.feature.shape[1]).to(training.device)
    logit_RCB = training.stack.logits(data.feature.take(flat)[None])[:, 0]
    groups = [training.position_of[seed][0] for seed in range(len(alive))]
    logit_RCB = logit_RCB[groups]
    labels = label.mT.float()[None] if data.multilabel else label[None]
    labels = labels.expand(len(alive), *labels.shape[1:])
    loss = Loss(multilabel=data.multilabel)
    loss_R = loss.sum_and_gradient(logit_RCB[:, None].clone(), labels, None, 1.0)[0][:, 0]
    if data.multilabel:
        label_CB = label.mT.double()
    else:
        label_CB = torch.nn.functional.one_hot(label, len(data.classes)).mT.double()
    logit = logit_RCB[torch.from_numpy(alive).to(device)].double().nan_to_num(0, 0, 0)
    logit = logit - logit.mean(2, keepdim=True)
    logit = (logit / logit.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-12)).sum(0)
    score_B = (logit * (label_CB - label_CB.mean(1, keepdim=True))).sum(0)
    results = torch.cat(
        [loss_R.double() / len(rows), score_B.sum()[None], score_B.square().sum()[None]]
    )
    # Rank 0's results are used on all workers.
    own = results if distributed.rank == 0 else torch.zeros_like(results)
    results = _sum_over_workers(own, distributed).cpu()
    losses = results[:-2].numpy()
    losses[losses > MAX_LOSS] = np.inf
    total, squares = results[-2:].tolist()
    freedom = len(rows) - 1
    if freedom < 1 or not total > 0:
        return losses, 0.0
    share = min(total**2 / (squares * len(rows)), 1 - 1e-15)
    normal = (8 * freedom + 1) / (8 * freedom + 3) * np.sqrt(-freedom * np.log1p(-share))
    return losses, float(normal)


def _with_schedule_suggestion(
    curve: Curve, data: Data, configs: Sequence[TrainConfig], distributed: DistributedContext
) -> Curve:
    """Add the suggestion `schedule` before the others.

    It is the rate, among factors of two around the first suggestion, whose full training ends with
    the lowest validation loss. The range test does not know how many steps the training has: a
    training of 15 steps needs a rate ten times as high, one with 400 epochs of few images a rate
    several times as low. If the trainings would take long, the curve stays as it is.
    """
    width, config, rates = data.feature.shape[2], configs[0], curve.rates
    columns = 512 if config.architecture == "lesson" else len(data.classes)
    steps = total_steps(config, len(data.train))
    work = steps * len(SCHEDULE_POWERS) * config.batch_size * width * columns
    if steps > MAX_SCHEDULE_STEPS or work > MAX_SCHEDULE_WORK or curve.verdict.startswith("flat"):
        return curve
    configs = configs if work * len(configs) <= MAX_SCHEDULE_WORK else configs[:1]
    candidates = np.unique(
        np.clip(curve.rate * 2.0 ** np.array(SCHEDULE_POWERS), rates[0], rates[-1])
    )
    losses = _final_losses(data, configs, candidates.tolist(), distributed).mean(1)
    best = int(np.where(np.isfinite(losses), losses, np.inf).argmin())
    suggestion = {"schedule": float(candidates[best])}
    return replace(curve, suggestions=suggestion | curve.suggestions)


def _with_race(
    curve: Curve,
    data: Data,
    configs: Sequence[TrainConfig],
    finder: FinderConfig,
    distributed: DistributedContext,
) -> Curve:
    """Add the validation loss of a training at each suggested rate, averaged over the seeds."""
    names: dict[float, list[str]] = {}
    for name, rate in curve.suggestions.items():
        names.setdefault(rate, []).append(name)
    epochs = finder.race_epochs or configs[0].epochs
    if epochs != configs[0].epochs:  # cycles of another length would be cut off
        configs = [replace(one, epochs=epochs, cycle_len=None, cycle_mult=1) for one in configs]
    race: dict[str, float] = {}
    for rate, losses in zip(
        names, _final_losses(data, configs, list(names), distributed), strict=True
    ):
        mean = float(losses.mean())
        race |= dict.fromkeys(names[rate], mean if np.isfinite(mean) else np.inf)
    return replace(curve, race={name: race[name] for name in curve.suggestions})


def _final_losses(
    data: Data,
    configs: Sequence[TrainConfig],
    rates: Sequence[float],
    distributed: DistributedContext,
) -> Floats:
    """Train a head with each config at each rate; return the last validation losses.

    Returns:
        float64 (rates, configs).
    """
    configs = [replace(one, best="last", patience=0) for one in configs]
    trials = [
        Trial(config=one, lr=rate, train=data.train, valid=data.valid)
        for rate in rates
        for one in configs
    ]
    losses = [one.epochs[-1]["valid_loss"] for one in train_stack(data, trials, distributed)]
    return np.reshape(losses, (len(rates), len(configs)))


# ---------------------------------------------------------------------- reading the curve


def smooth(raw: Floats) -> Floats:
    """Smooth losses (R, S); nan from the step where a seed diverged.

    First a running median of five, so that one or two outlying batches, nan or not, leave no trace
    (a mean would smear them over its window); then a Gaussian of four steps. Both are centred: a
    mean of past losses would shift everything to too high a rate.

    A seed has diverged where its loss is not finite any more, or is above four times its lowest
    plus a tenth of its first.
    """
    smoothed_losses = np.full(raw.shape, np.nan)
    finite_or_inf = np.where(np.isfinite(raw), raw, np.inf)
    for row, out in zip(finite_or_inf, smoothed_losses, strict=True):
        padded = np.pad(row, 2, mode="edge")
        median = np.median(np.lib.stride_tricks.sliding_window_view(padded, 5), 1)
        diverged = np.flatnonzero(~np.isfinite(median))
        end = int(diverged[0]) if len(diverged) else len(row)
        distance = np.arange(end)[:, None] - np.arange(end)
        weight = np.exp(-((distance / 4) ** 2) / 2)
        smoothed = weight @ median[:end] / weight.sum(1)
        lowest = np.minimum.accumulate(smoothed)
        diverged = np.flatnonzero(smoothed > 4 * lowest + 0.1 * np.abs(smoothed[:1]))
        end = int(diverged[0]) if len(diverged) else end
        out[:end] = smoothed[:end]
    return smoothed_losses


def suggest(
    rates: Floats, losses: Floats, held_out: Floats | None = None, signal: float = np.inf
) -> Curve:
    """Suggest learning rates from the mean curve of the seeds, up to where the first diverged.

    The rules:

    - held-out: 0.3 of the way, in factors, from the rate where half of the held-out loss's fall is
      done to that where it is lowest. It is our own: of the rules tried on 30 pairs of features and
      head it came nearest to the best of a grid (on real photos within a factor of 2.8). It is left
      out if no held-out loss is finite.
    - valley: the middle of the longest fall of the loss (fastai 2's code; its documentation
      says two thirds).
    - steepest: where the loss falls fastest per factor of the rate.
    - minimum/10: a tenth of the rate of the lowest loss.
    - slide: a window slides down from the highest rate while the gradients at its ends differ; its
      lower end where it stops (Chang's rule, in fastai 2).

    Args:
        rates: The rates of the test, (S,).
        losses: Smoothed training losses, (R, S).
        held_out: Losses on held-out rows, (R, S).
        signal: By how many standard deviations held-out rows tell labels from chance. The verdict
            is flat below MIN_SIGNAL, or where no loss falls; unstable where seeds suggest rates
            far from each other.
    """
    if held_out is not None and not np.isfinite(held_out).all(0).any():
        held_out = None
    alive = np.flatnonzero(np.isfinite(losses).all(0))
    if len(alive) < 3:  # diverged at once: nothing is known below the first rate
        names = ("valley", "steepest", "minimum/10", "slide")
        suggestions = dict.fromkeys(("held-out",) if held_out is not None else (), float(rates[0]))
        suggestions |= dict.fromkeys(names, float(rates[0]))
        return Curve(
            rates=rates,
            losses=losses,
            suggestions=suggestions,
            verdict="unstable",
            held_out=held_out,
        )
    suggestions = _apply_rules(rates, losses, held_out)
    curves = [losses[:, alive].mean(0)]
    if held_out is not None:
        curves.append(_mean_held_out(rates, held_out)[1])
    falling = any(one[0] - one.min() > 0.03 * abs(one[0]) for one in curves)
    first = next(iter(suggestions))
    spreads = _seed_spreads(rates, losses, held_out)
    verdict = "unstable" if spreads.get(first, 1.0) > MAX_SEED_SPREAD else "good"
    if signal < MIN_SIGNAL or not falling:
        verdict = "flat: no signal"
    return Curve(
        rates=rates,
        losses=losses,
        suggestions=suggestions,
        verdict=verdict,
        held_out=held_out,
        spreads=spreads,
    )


def _apply_rules(rates: Floats, losses: Floats, held_out: Floats | None) -> dict[str, float]:
    """Apply every rule to the mean of some seeds, each with at least three losses."""
    alive = np.isfinite(losses).all(0)
    rate, mean = rates[alive], losses[:, alive].mean(0)
    log_rate = np.log(rate)
    lowest = int(mean.argmin())
    gradient = np.gradient(mean, log_rate)
    start, stop = _longest_fall(mean)
    suggestions = {} if held_out is None else {"held-out": _held_out_rule(rates, held_out)}
    suggestions |= {
        "valley": rate[start + (stop - start) // 2],
        "steepest": rate[int(gradient[: lowest + 1].argmin())],
        "minimum/10": rate[lowest] / 10,
        "slide": rate[_slide_rule(mean)],
    }
    return {name: float(value) for name, value in suggestions.items()}


def _seed_spreads(rates: Floats, losses: Floats, held_out: Floats | None) -> dict[str, float]:
    """Return the factor by which seeds differ, by the name of the rule; empty with one seed."""
    if len(losses) == 1:
        return {}
    single = [
        _apply_rules(rates, losses[seed, None], None if held_out is None else held_out[seed, None])
        for seed in range(len(losses))
    ]
    return {
        name: float(np.exp(np.std(np.log([one[name] for one in single])))) for name in single[0]
    }


def _mean_held_out(rates: Floats, held_out: Floats) -> tuple[Floats, Floats]:
    """Return the rates at which all seeds have a finite held-out loss, and its mean there."""
    finite = np.isfinite(held_out).all(0)
    return rates[finite], held_out[:, finite].mean(0)


def _held_out_rule(rates: Floats, held_out: Floats) -> float:
    """See `suggest`."""
    rate, mean = _mean_held_out(rates, held_out)
    log_rate, lowest = np.log(rate), int(mean.argmin())
    best = np.minimum.accumulate(mean[: lowest + 1])
    half = (mean[0] + mean[lowest]) / 2
    # np.interp needs rising points, so both are negated.
    half_done = np.interp(-half, -best, log_rate[: lowest + 1])
    return float(np.exp(half_done + 0.3 * (log_rate[lowest] - half_done)))


def _longest_fall(mean: Floats) -> tuple[int, int]:
    """Return the ends of the longest decreasing subsequence: the loss's fall, without bumps."""
    length, start = np.ones(len(mean), int), np.arange(len(mean))
    for i in range(1, len(mean)):
        longer = np.flatnonzero((mean[:i] > mean[i]) & (length[:i] + 1 > length[i]))
        if len(longer):
            best = longer[length[longer].argmax()]
            length[i], start[i] = length[best] + 1, start[best]
    end = int(length.argmax())
    return int(start[end]), end


def _slide_rule(mean: Floats) -> int:
    """Return the lower end of the window where it stops (see `suggest`).

    fastai's 15 steps and 0.005 per step are for 100 steps and a loss of about 1; here they are
    shares of the curve's length and fall.
    """
    gradient = np.gradient(mean)
    width = max(1, round(0.15 * len(mean)))
    tolerance = 0.5 / len(mean) * (mean[0] - mean.min())
    left = len(mean) - 1 - width
    while left > 0 and abs(gradient[left + width] - gradient[left]) > tolerance:
        left -= 1
    return left
