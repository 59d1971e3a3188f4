"""A rising rate on cached features, and the rates it suggests.

    features, TrainConfig
      -> find                R seeds in one stack, S steps, the rate rising at each
      -> losses, held_out    float64 (R, S): of the rows taught, and of rows held out
      -> suggest             a rate by each of five rules, their spreads, a verdict
      -> race                if asked for: the suggested rates, trained and compared

The range test of Smith (arXiv:1506.01186, section 3.3), with the very step that trains.

A cached store is small: a hundred steps walk 600 rows ten times, and a head learns them by heart
at any rate. The loss of rows held out says what training will come to, so the rate that
`--rate auto` takes is read off that, and so is the verdict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.errors import ConfigError
from arrowhead.training.batches import DistributedContext
from arrowhead.training.config import TrainConfig, total_steps
from arrowhead.training.dataset import Data, Trial
from arrowhead.training.trainer import Training, threads_for, train_stack

if TYPE_CHECKING:
    from torch import Tensor

MAX_HELD_OUT_ROWS = (
    2048  # held-out rows: enough to tell 2 % of the loss, few enough to check 25 times
)
SIGNAL = 3.5  # deviations; 600 stores of shuffled labels came to 3.1 at most, 25 looks at each
WIDE = 1000.0  # factor; suggestions further from each other than this are not called good
ASTRAY = 4.0  # factor; seeds whose rates spread further than this do not mean the same thing

SHORT = 500  # steps of a training that is tried at several rates, as it will be
AROUND = (-3, -2, -1, 0, 1, 2, 3, 4, 5, 6)  # powers of two times the first suggestion
MOST_WORK = 1 << 35  # steps x rates x rows x features x columns of all these trainings: seconds
HUGE = 1e30  # nats: what squares of it would overflow has diverged, in doubles too

Floats = NDArray[np.float64]


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
    race: bool = False
    """Train heads at every suggested rate; the lowest validation loss wins."""
    race_epochs: int | None = None
    """Epochs of the race; as many as the training has, by default."""

    def __post_init__(self) -> None:
        if not (0 < self.low < self.high <= 1e38 and self.steps >= 20 and self.seeds >= 1):
            raise ConfigError(
                f"The range test asked for is {self.low} to {self.high} in {self.steps} steps with"
                f" {self.seeds} seeds.",
                "0 < low < high (1e38 at most), 20 steps or more, 1 seed or more.",
                "leave --low, --high, --steps and --seeds at their defaults, or mend them.",
            )
        if self.race_epochs is not None and not (self.race and self.race_epochs >= 1):
            raise ConfigError(
                f"--race-epochs is {self.race_epochs}, --race is {'on' if self.race else 'off'}.",
                "1 epoch or more, of a race that is run.",
                "add --race and give --race-epochs 1 or more, or leave both out.",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """What the range test saw, and what it advises.

    rates: float64 (S,). losses: float64 (R, S), nats, smoothed, nan from where a seed had diverged.
    suggestions: rates by name. verdict: good (held-out rows tell labels from chance, seeds agree,
    all suggestions lie within a factor of 1,000), "flat: no signal", unstable, or "rules differ".
    held_out: float64 (R, S), nats on held-out rows after the step, nan where not measured.
    spreads: by the names of suggestions, the factor by which single seeds differ: the geometric
    standard deviation, 1 if all say the same; empty with one seed, or where one had no curve.
    race: validation loss by name, inf where training diverged; None if there was no race.
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
        context = {
            "good": "seeds agree, and all suggestions lie within a factor of"
            f" {math.ceil(self.span)}",
            "unstable": "seeds suggest rates far from each other",
            "rules differ": f"seeds agree, but suggestions lie a factor of {self.span:,.0f} apart",
        }
        return (
            f"{self.verdict}: {context[self.verdict]}" if self.verdict in context else self.verdict
        )

    @property
    def rate(self) -> float:
        """The rate that `--rate auto` uses."""
        return self.suggestions[self.chosen]

    def __repr__(self) -> str:
        """In a line: at a prompt the arrays would be hundreds."""
        told = " · ".join(f"{by} {rate:.2g}" for by, rate in self.suggestions.items())
        return (
            f"{type(self).__name__}(rate {self.rate:.2g} ({self.chosen}): {told}; {self.verdict})"
        )

    def plain(self) -> dict[str, Any]:
        """As lists and numbers, for JSON."""
        return {
            "rates": self.rates.tolist(),
            "losses": _plain(self.losses),
            "held_out": None if self.held_out is None else _plain(self.held_out),
            "suggestions": self.suggestions,
            "spreads": self.spreads,
            "race": self.race and {k: v if np.isfinite(v) else None for k, v in self.race.items()},
            "chosen": self.chosen,
            "verdict": self.verdict,
        }


def _plain(losses: Floats) -> list[list[float | None]]:
    return [[x if np.isfinite(x) else None for x in row] for row in losses.tolist()]


def rates(config: FinderConfig) -> Floats:
    """Smith rises linearly; we rise geometrically, since good rates differ by factors."""
    return np.geomspace(config.low, config.high, config.steps)


# ------------------------------------------------------------------------------- the test


def find(
    data: Data,
    config: TrainConfig,
    finder: FinderConfig,
    distributed: DistributedContext = DistributedContext(),
) -> Curve:
    """The curve of every seed and what they suggest.

    All workers must call it together. Whether to go on is decided from numbers that all of them
    have in common, so none stops alone.
    """
    import torch

    tested = rates(finder)
    # Rows come sorted by path, that is by class: the first 2,048 may all be cats.
    some = np.sort(np.random.default_rng(0).permutation(len(data.valid))[:MAX_HELD_OUT_ROWS])
    heads = [replace(config, seed=config.seed + seed) for seed in range(finder.seeds)]
    held = data.valid[some]
    trials = [Trial(config=one, rate=1.0, train=data.train, valid=held) for one in heads]
    training = Training(data, trials, distributed)
    raw = np.full((finder.seeds, finder.steps), np.nan)
    held_out, signal = raw.copy(), 0.0
    every = max(1, finder.steps // 25)
    waiting: list[Tensor] = []
    for number, rate in enumerate(tested):
        with threads_for(training):
            waiting.append(training.move(number, float(rate)))
        if len(waiting) < every and number + 1 < finder.steps:
            continue
        # One sum for several steps: asking after each would wait for the device each time.
        found = _summed(torch.stack(waiting).double(), distributed).cpu().numpy()
        found[np.abs(found) > HUGE] = np.inf
        seats = [training.seat_of[seed] for seed in range(finder.seeds)]
        raw[:, number + 1 - len(waiting) : number + 1] = [found[:, i, k] for i, k in seats]
        waiting = []
        alive = ~np.isnan(smoothed(raw[:, : number + 1])[:, -1])
        if not alive.any():
            break
        nats, strength = _checked(training, held, alive, distributed)
        held_out[alive, number] = nats[alive]
        signal = max(signal, strength)
    curve = suggest(tested, smoothed(raw), held_out, signal)
    curve = _scheduled(curve, data, heads, distributed)
    if curve.verdict == "good" and curve.span >= WIDE:
        curve = replace(curve, verdict="rules differ")
    return _raced(curve, data, heads, finder, distributed) if finder.race else curve


def _summed(mine: Tensor, distributed: DistributedContext) -> Tensor:
    import torch.distributed as dist

    if distributed.world > 1:
        dist.all_reduce(mine)
    return mine


def _checked(
    training: Training,
    rows: NDArray[np.int64],
    alive: NDArray[np.bool_],
    distributed: DistributedContext,
) -> tuple[Floats, float]:
    """Of heads on rows held out: the loss of each, float64 (R,), nats; and how far the living ones
    see more than chance, in deviations.

    Under labels that mean nothing, what a head gives to an image's own labels is what it gives to
    another's: the sum over rows of (label - its mean) x (logit - its mean) has mean 0, whatever
    the head has learned by heart. (It is the score test of the logits' scale at 0.) Its
    t is turned into deviations of a normal variable (Wallace 1959), for stores of few rows.
    """
    import torch

    from arrowhead.training.losses import Loss

    data, device = training.data, training.data.label.device
    label = data.label[torch.from_numpy(rows).to(device)]
    flat = torch.from_numpy(rows * data.feature.shape[1]).to(training.device)
    logit_RCB = training.stack.logits(data.feature.take(flat)[None])[:, 0]
    seats = [training.seat_of[seed][0] for seed in range(len(alive))]
    logit_RCB = logit_RCB[seats]
    each = label.mT.float()[None] if data.multi else label[None]
    each = each.expand(len(alive), *each.shape[1:])
    nats = Loss(multi=data.multi).of(logit_RCB[:, None].clone(), each, None, 1.0)[0][:, 0]
    if data.multi:
        own_CB = label.mT.double()
    else:
        own_CB = torch.nn.functional.one_hot(label, len(data.classes)).mT.double()
    seen = logit_RCB[torch.from_numpy(alive).to(device)].double().nan_to_num(0, 0, 0)
    seen = seen - seen.mean(2, keepdim=True)
    seen = (seen / seen.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-12)).sum(0)
    agree_B = (seen * (own_CB - own_CB.mean(1, keepdim=True))).sum(0)
    # The first worker's numbers are everyone's.
    found = torch.cat(
        [nats.double() / len(rows), agree_B.sum()[None], agree_B.square().sum()[None]]
    )
    found = _summed(found if distributed.rank == 0 else torch.zeros_like(found), distributed).cpu()
    losses = found[:-2].numpy()
    losses[losses > HUGE] = np.inf
    total, squares = found[-2:].tolist()
    freedom = len(rows) - 1
    if freedom < 1 or not total > 0:
        return losses, 0.0
    share = min(total**2 / (squares * len(rows)), 1 - 1e-15)
    normal = (8 * freedom + 1) / (8 * freedom + 3) * np.sqrt(-freedom * np.log1p(-share))
    return losses, float(normal)


def _scheduled(
    curve: Curve, data: Data, heads: Sequence[TrainConfig], distributed: DistributedContext
) -> Curve:
    """The curve with one more suggestion, `schedule`, before the others: of rates around the first
    one, by factors of two, the one whose training ends with the lowest validation loss.

    The range test does not know how many steps the training has: one of 15 steps needs a rate ten
    times as high, one that goes through few images 400 times a rate several times as low. So
    trainings of up to SHORT steps are tried as they will be; where all of them together would be
    work, the curve stays as it is.
    """
    width, config, tested = data.feature.shape[2], heads[0], curve.rates
    columns = 512 if config.architecture == "lesson" else len(data.classes)
    steps = total_steps(config, len(data.train))
    work = steps * len(AROUND) * config.batch_size * width * columns
    if steps > SHORT or work > MOST_WORK or curve.verdict.startswith("flat"):
        return curve
    heads = heads if work * len(heads) <= MOST_WORK else heads[:1]
    heads = [replace(one, best="last", patience=0) for one in heads]
    around = np.unique(np.clip(curve.rate * 2.0 ** np.array(AROUND), tested[0], tested[-1]))
    trials = [
        Trial(config=one, rate=float(rate), train=data.train, valid=data.valid)
        for rate in around
        for one in heads
    ]
    ended = [one.epochs[-1]["valid_loss"] for one in train_stack(data, trials, distributed)]
    losses = np.reshape(ended, (len(around), len(heads))).mean(1)
    best = int(np.where(np.isfinite(losses), losses, np.inf).argmin())
    found = {"schedule": float(around[best])}
    return replace(curve, suggestions=found | curve.suggestions)


def _raced(
    curve: Curve,
    data: Data,
    heads: Sequence[TrainConfig],
    finder: FinderConfig,
    distributed: DistributedContext,
) -> Curve:
    """The curve with the validation loss, mean of the seeds, that each suggested rate comes to."""
    names: dict[float, list[str]] = {}
    for name, rate in curve.suggestions.items():
        names.setdefault(rate, []).append(name)
    epochs = finder.race_epochs or heads[0].epochs
    if epochs != heads[0].epochs:  # other cycles would be cut off
        heads = [replace(one, epochs=epochs, cycle_len=None, cycle_mult=1) for one in heads]
    heads = [replace(one, best="last", patience=0) for one in heads]
    trials = [
        Trial(config=one, rate=rate, train=data.train, valid=data.valid)
        for rate in names
        for one in heads
    ]
    ended = [one.epochs[-1]["valid_loss"] for one in train_stack(data, trials, distributed)]
    race: dict[str, float] = {}
    for rate, losses in zip(names, np.reshape(ended, (len(names), len(heads))), strict=True):
        mean = float(losses.mean())
        race |= dict.fromkeys(names[rate], mean if np.isfinite(mean) else np.inf)
    return replace(curve, race={name: race[name] for name in curve.suggestions})


# ---------------------------------------------------------------------- reading the curve


def smoothed(raw: Floats) -> Floats:
    """Losses (R, S) without their spikes and noise, nan from the step where a seed diverged.

    First the running median of five, so one or two odd batches, NaN or not, leave no trace (a mean
    would smear them over its whole window); then a Gaussian of four steps. Both look as far forward
    as back: a mean of the past only shows everything at too high a rate.

    Diverged: no finite loss any more, or above four times the lowest plus a tenth of the first.
    """
    made = np.full(raw.shape, np.nan)
    for row, out in zip(np.where(np.isfinite(raw), raw, np.inf), made, strict=True):
        wide = np.pad(row, 2, mode="edge")
        middle = np.median(np.lib.stride_tricks.sliding_window_view(wide, 5), 1)
        gone = np.flatnonzero(~np.isfinite(middle))
        end = int(gone[0]) if len(gone) else len(row)
        away = np.arange(end)[:, None] - np.arange(end)
        weight = np.exp(-((away / 4) ** 2) / 2)
        smooth = weight @ middle[:end] / weight.sum(1)
        lowest = np.minimum.accumulate(smooth)
        gone = np.flatnonzero(smooth > 4 * lowest + 0.1 * np.abs(smooth[:1]))
        end = int(gone[0]) if len(gone) else end
        out[:end] = smooth[:end]
    return made


def suggest(
    tested: Floats, losses: Floats, held_out: Floats | None = None, signal: float = np.inf
) -> Curve:
    """Rates read off the mean curve of the seeds, up to where the first of them diverged.

    held-out: between the rate where half of the held-out loss's fall is done and that where it is
    lowest, 0.3 of the way in factors. Ours: of the rules tried on 30 pairs of features and head it
    came nearest to the best of a grid (on real photos within a factor 2.8). Left out where no
    held-out loss is finite.
    valley: the middle of the longest fall of the loss (fastai 2's code; its text says two thirds).
    steepest: where the loss falls fastest per factor of rate.
    minimum/10: a tenth of the rate of the lowest loss.
    slide: a window slides down from the highest rate, as long as the slopes at its ends differ;
    its lower end where it stops (Chang's rule, in fastai 2).

    signal: deviations by which held-out rows tell labels from chance. The verdict is flat below
    3.5, or where no loss falls; unstable where single seeds suggest rates far from each other.
    """
    if held_out is not None and not np.isfinite(held_out).all(0).any():
        held_out = None
    alive = np.flatnonzero(np.isfinite(losses).all(0))
    if len(alive) < 3:  # diverged at once: nothing below the first rate is known
        chosen = dict.fromkeys(("held-out",) if held_out is not None else (), float(tested[0]))
        names = ("valley", "steepest", "minimum/10", "slide")
        chosen |= dict.fromkeys(names, float(tested[0]))
        return Curve(
            rates=tested,
            losses=losses,
            suggestions=chosen,
            verdict="unstable",
            held_out=held_out,
        )
    chosen = _rules(tested, losses, held_out)
    spreads = {}
    if len(losses) > 1:
        single = [
            _rules(tested, losses[seed, None], None if held_out is None else held_out[seed, None])
            for seed in range(len(losses))
        ]
        for name in chosen:
            spreads[name] = float(np.exp(np.std(np.log([one[name] for one in single]))))
    mean = losses[:, alive].mean(0)
    falls = [mean]
    if held_out is not None:
        falls.append(_measured(tested, held_out)[1])
    falling = any(one[0] - one.min() > 0.03 * abs(one[0]) for one in falls)
    first = next(iter(chosen))
    verdict = "unstable" if spreads.get(first, 1.0) > ASTRAY else "good"
    if signal < SIGNAL or not falling:
        verdict = "flat: no signal"
    return Curve(
        rates=tested,
        losses=losses,
        suggestions=chosen,
        verdict=verdict,
        held_out=held_out,
        spreads=spreads,
    )


def _rules(tested: Floats, losses: Floats, held_out: Floats | None) -> dict[str, float]:
    """Every rule on the mean of some seeds; each seed has at least three losses."""
    alive = np.isfinite(losses).all(0)
    rate, mean = tested[alive], losses[:, alive].mean(0)
    log = np.log(rate)
    lowest = int(mean.argmin())
    gradient = np.gradient(mean, log)
    start, stop = _longest_fall(mean)
    chosen = {} if held_out is None else {"held-out": _held_out(tested, held_out)}
    chosen |= {
        "valley": rate[start + (stop - start) // 2],
        "steepest": rate[int(gradient[: lowest + 1].argmin())],
        "minimum/10": rate[lowest] / 10,
        "slide": rate[_slide(mean)],
    }
    return {name: float(value) for name, value in chosen.items()}


def _measured(tested: Floats, held_out: Floats) -> tuple[Floats, Floats]:
    """Rates at which all seeds have a finite held-out loss, and its mean there."""
    there = np.isfinite(held_out).all(0)
    return tested[there], held_out[:, there].mean(0)


def _held_out(tested: Floats, held_out: Floats) -> float:
    """See `suggest`."""
    rate, mean = _measured(tested, held_out)
    log, lowest = np.log(rate), int(mean.argmin())
    best = np.minimum.accumulate(mean[: lowest + 1])
    half = (mean[0] + mean[lowest]) / 2
    # np.interp wants its points rising.
    middle = np.interp(-half, -best, log[: lowest + 1])
    return float(np.exp(middle + 0.3 * (log[lowest] - middle)))


def _longest_fall(mean: Floats) -> tuple[int, int]:
    """Ends of the longest decreasing subsequence: where the loss falls, bumps left out."""
    length, start = np.ones(len(mean), int), np.arange(len(mean))
    for i in range(1, len(mean)):
        longer = np.flatnonzero((mean[:i] > mean[i]) & (length[:i] + 1 > length[i]))
        if len(longer):
            best = longer[length[longer].argmax()]
            length[i], start[i] = length[best] + 1, start[best]
    end = int(length.argmax())
    return int(start[end]), end


def _slide(mean: Floats) -> int:
    """The lower end of the window where it stops. fastai's 15 steps and 0.005 per step are of 100
    steps and of a loss of about 1: shares of the curve's length and fall here.
    """
    gradient = np.gradient(mean)
    width = max(1, round(0.15 * len(mean)))
    apart = 0.5 / len(mean) * (mean[0] - mean.min())
    left = len(mean) - 1 - width
    while left > 0 and abs(gradient[left + width] - gradient[left]) > apart:
        left -= 1
    return left
