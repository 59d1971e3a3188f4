"""Features to trained heads.

    float16 (N, V, D), labels     all images of the store, on the device or in the map
      -> lanes                    whose rows, in which order: drawn from (seed, pass)
      -> Training.move            one step downhill for every head
      -> Training.validate        every validation row once
      -> Trained                  weights, and one line of figures per epoch

One head is a stack of one. With several workers every rank takes its slice of every global batch
and slopes are summed: 1 and N workers walk the same path. Nothing is drawn from a generator that
lives on: order, view and dropout are functions of (seed, pass or step), so a checkpoint holds no
random state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from arrowhead import ConfigError, descent, plan
from arrowhead.descent import DescentConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MIN_STEPS = 400  # of --epochs auto: see bench/heads_accuracy.py
MIN_EPOCHS, MAX_EPOCHS = 5, 400
MOST = 1 << 20  # numbers that validation holds at once: 4 MiB of float32 stay in the caches


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(DescentConfig):
    """How a head is trained on features."""

    head: Literal["auto", "logistic", "linear", "lesson"] = "auto"
    """logistic: logistic regression, a linear head found exactly, with no learning rate; linear:
    the same by gradient descent; lesson: batch norm, dropout, linear to 512, ReLU, once more,
    linear. auto: logistic, or linear where a setting of gradient descent (--epochs, --rate,
    --schedule …) or a grid is given, or it would take too long."""
    l2: float | Literal["auto"] = "auto"
    """logistic: strength of the L2 penalty, scikit-learn's 1/C; auto chooses it by 5-fold
    cross-validation within the training split."""
    epochs: int | Literal["auto"] = "auto"
    """Passes over the training split; auto: enough steps, however few images there are."""
    rate: float | Literal["auto"] = "auto"
    """Learning rate at its highest; auto asks the LR finder."""
    batch_size: int = 64
    """Rows per step, over all workers together."""
    dropout: float = 0.0
    """Share of inputs dropped before the last layer, 0 up to 1 (the lesson's head: half of it
    before its first)."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on GPUs with bf16 units, fp16 on older ones, fp32 on CPUs (where the lesson's head
    computes fp32 in doubles: the same numbers on any number of workers)."""
    seed: int = 0
    """Of the head's first weights, the order of rows, and dropout."""
    best: Literal["last", "valid_loss", "accuracy", "balanced_accuracy", "f1", "f2"] = "last"
    """Which epoch's weights are kept: the last, or the best by this figure of the validation split
    (f1, f2: several labels per image)."""
    patience: int = 0
    """End when --best has not improved for this many epochs; 0: never."""
    checkpoint_seconds: float = 5.0
    """Seconds of training between checkpoints; 0: one after every epoch."""

    def __post_init__(self) -> None:
        DescentConfig.__post_init__(self)
        if self.epochs != "auto":
            descent.must_fit(self, self.epochs)
        for knob, value, fine, wanted in (
            (
                "epochs",
                self.epochs,
                self.epochs == "auto" or self.epochs >= 1,
                "auto, or 1 or more",
            ),
            ("l2", self.l2, self.l2 == "auto" or 1e-9 <= self.l2 < 1e9, "auto, or above 0"),
            ("batch-size", self.batch_size, self.batch_size >= 2, "2 or more"),
            ("rate", self.rate, self.rate == "auto" or 0 < self.rate < 1e3, "auto, or above 0"),
            ("dropout", self.dropout, 0 <= self.dropout < 1, "from 0 up to 1"),
            ("seed", self.seed, self.seed >= 0, "0 or more"),
            ("patience", self.patience, self.patience >= 0, "0 or more"),
            (
                "checkpoint-seconds",
                self.checkpoint_seconds,
                self.checkpoint_seconds >= 0,
                "0 or more",
            ),
        ):
            if not fine:
                raise ConfigError(f"--{knob} is {value}.", f"{wanted}.", f"give another --{knob}.")
        if self.patience and self.best == "last":
            raise ConfigError(
                f"--patience {self.patience} waits for nothing: --best is last.",
                "a figure that should improve.",
                "add --best valid_loss or --best accuracy.",
            )
        self._must_suit_head()

    def _must_suit_head(self) -> None:
        """ConfigError if something is asked for that this head does not have."""
        given = self.of_descent()
        if (
            self.checkpoint_seconds
            != TrainConfig.__dataclass_fields__["checkpoint_seconds"].default
        ):
            given.append("checkpoint_seconds")
        if self.head == "logistic" and given:
            flag = f"--{given[0].replace('_', '-')}"
            raise ConfigError(
                f"{flag} {getattr(self, given[0])} is a setting of gradient descent;"
                " --head logistic has none.",
                "a head that is found exactly, or settings of gradient descent.",
                f"leave {flag} out, or add --head linear.",
            )
        if self.l2 != "auto" and (self.head not in ("auto", "logistic") or self.of_descent()):
            raise ConfigError(
                f"--l2 {self.l2} is for --head logistic.",
                "weight decay, for a head trained by gradient descent.",
                "leave --l2 out, or add --head logistic.",
            )

    def of_descent(self) -> list[str]:
        """Names of the settings of gradient descent that are not at their defaults."""
        return [
            one.name
            for one in fields(self)
            if one.name not in ("head", "l2", "class_weights", "seed")
            and getattr(self, one.name) != one.default
        ]

    def parameters(self) -> dict[str, Any]:
        """The settings that this head has, by name: what a run and a bundle record."""
        every = asdict(self)
        if self.head != "logistic":
            del every["l2"]
            return every
        return {name: every[name] for name in ("head", "l2", "class_weights", "seed")}

    @property
    def kind(self) -> Literal["linear", "lesson"]:
        """What the head is made of (see `heads.make`), however it is trained."""
        return "lesson" if self.head == "lesson" else "linear"

    @property
    def total_epochs(self) -> int:
        """`epochs` as a number, 1 of a head that is found exactly; AssertionError before `resolve`
        has made one of auto.
        """
        if self.head == "logistic":
            return 1
        if self.epochs == "auto":
            raise AssertionError("--epochs auto was not resolved")
        return self.epochs


def resolve(config: TrainConfig, images: int) -> TrainConfig:
    """The config with a number of epochs, for training on so many images.

    auto: MIN_STEPS steps, but no fewer than MIN_EPOCHS passes and no more than MAX_EPOCHS; with
    --cycle-len the first end of a cycle from there on.
    """
    if config.epochs != "auto" or config.head == "logistic":
        return config
    steps = len(_ends(max(images, 1), config.batch_size))
    epochs = min(max(MIN_EPOCHS, math.ceil(MIN_STEPS / steps)), MAX_EPOCHS)
    return replace(config, epochs=descent.whole_cycles(config, epochs))


def steps_of(config: TrainConfig, images: int) -> int:
    """How many steps a training on so many images takes."""
    return len(_ends(max(images, 1), config.batch_size)) * resolve(config, images).total_epochs


# ------------------------------------------------------------------------------- features


class Held:
    """Features in memory, on the device they are used on: float16 (N, V, D)."""

    def __init__(self, feature_NVD: Tensor) -> None:
        self._flat = feature_NVD.flatten(0, 1)
        self.shape: Sequence[int] = feature_NVD.shape
        self.device = feature_NVD.device

    def take(self, flat_B: Tensor) -> Tensor:
        """float16 (B, D), on the device; flat_B: int64, row x V + view."""
        return self._flat.index_select(0, flat_B)


class Mapped:
    """Features left in memory-mapped shards, float16 (n, V, D) each, for stores larger than memory.

    row: which row of all shards each of ours is, int64 (N,).
    """

    def __init__(
        self, parts: Sequence[NDArray[np.float16]], row: NDArray[np.int64], device: torch.device
    ) -> None:
        self._parts, self._row, self.device = parts, row, device
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        self.shape: Sequence[int] = (len(row), *parts[0].shape[1:])

    def take(self, flat_B: Tensor) -> Tensor:
        """As `Held.take`."""
        import torch

        ours, view = np.divmod(flat_B.cpu().numpy(), self.shape[1])
        row = self._row[ours]
        home = np.searchsorted(self._starts, row, "right") - 1
        made = np.empty((len(row), self.shape[2]), np.float16)
        for part in np.unique(home):
            here = home == part
            made[here] = self._parts[part][row[here] - self._starts[part], view[here]]
        return torch.from_numpy(made).to(self.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """What heads learn from: N images, of which some train and some validate.

    feature: float16 (N, V, D). label: int64 (N,), or uint8 (N, C) where images have several; on
    the device. key: uint64 (N,), of the image's content. train, valid: int64 rows.
    """

    feature: Held | Mapped
    label: Tensor
    key: NDArray[np.uint64]
    train: NDArray[np.int64]
    valid: NDArray[np.int64]
    classes: Sequence[str]

    @property
    def multi(self) -> bool:
        """Whether images have several labels."""
        return self.label.dim() == 2

    @staticmethod
    def of(
        train: tuple[NDArray[np.float16], NDArray[Any]],
        valid: tuple[NDArray[np.float16], NDArray[Any]],
        classes: Sequence[str],
        device: str = "cpu",
    ) -> Data:
        """From (feature (n, V, D), label (n,) or (n, C)) per split; see `must_teach`."""
        import torch

        feature = torch.from_numpy(np.concatenate([train[0], valid[0]])).to(device)
        rows = np.arange(len(feature))
        return Data(
            feature=Held(feature),
            label=torch.from_numpy(np.concatenate([train[1], valid[1]])).to(device),
            key=rows.astype(np.uint64),
            train=rows[: len(train[1])],
            valid=rows[len(train[1]) :],
            classes=classes,
        ).must_teach()

    def must_teach(self) -> Data:
        """Itself; ConfigError if a split is empty or nothing teaches one of the classes."""
        for split, rows in (("training", self.train), ("validation", self.valid)):
            label = self.label[rows].cpu().numpy()
            seen = np.flatnonzero(label.any(0)) if self.multi else label
            absent = sorted(set(range(len(self.classes))) - set(seen.tolist()))
            if len(label) == 0 or (absent and split == "training"):
                raise ConfigError(
                    f"The {split} split has no readable image"
                    + (f" of {', '.join(self.classes[i] for i in absent)}." if len(label) else "."),
                    "at least one of every class to learn from, and some to check with.",
                    "add images, or hold out another share (--valid-share).",
                )
        return self


def spread(feature: Held | Mapped, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each column over the clean view of some rows, float32 (D,); a column
    that never varies counts as 1.
    """
    import torch

    views, width = feature.shape[1:]
    flat = torch.from_numpy(rows * views).to(feature.device)
    first = feature.take(flat[:4096]).float().mean(0)  # squares of large means would cancel
    sums = torch.zeros(2, width, dtype=torch.float64, device=feature.device)
    for part in torch.split(flat, 512):  # in place, and small enough for the cache: 4 x as fast
        away = feature.take(part).float().sub_(first)
        sums[0] += away.sum(0)
        sums[1] += away.square_().sum(0)
    mean = sums[0] / len(rows)
    deviation = (sums[1] / len(rows) - mean.square()).clamp(min=0).sqrt()
    deviation[deviation < 1e-6 * first.abs() + 1e-12] = 1
    return (first + mean).float(), deviation.float()


# ----------------------------------------------------------------------------------- lanes


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Member:
    """One head of a stack: how it is trained, at which rate, on which rows."""

    config: TrainConfig
    rate: float
    train: NDArray[np.int64]
    valid: NDArray[np.int64]
    start: Mapping[str, NDArray[Any]] | None = None
    """Weights that it begins with, by name, as `Trained.state` has them; None: new ones."""


@dataclass(frozen=True, slots=True)
class Team:
    """This worker's rank among `world` workers that train together."""

    rank: int = 0
    world: int = 1


def batches(rows: int, size: int, seed: int, epoch: int) -> Iterator[NDArray[np.int64]]:
    """All rows once, in an order drawn from (seed, epoch), `size` at a time.

    One row left over joins the batch before it: batch norm needs two.
    """
    order = _order(rows, seed, epoch)
    ends = _ends(rows, size)
    for start, stop in zip([0, *ends[:-1]], ends, strict=True):
        yield order[start:stop]


def _order(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(rows)


def _ends(rows: int, size: int) -> list[int]:
    ends = [*range(size, rows, size), rows]
    if len(ends) > 1 and ends[-1] - ends[-2] == 1:
        del ends[-2]
    return ends


def view_of(key: NDArray[np.uint64], views: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Which view of each image this epoch uses: a function of (seed, epoch, image)."""
    if views == 1:
        return np.zeros(len(key), np.int64)
    mixed = key ^ np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)  # SplitMix64's mixing
    return ((mixed >> np.uint64(32)) * np.uint64(views) >> np.uint64(32)).astype(np.int64)


class Lane:
    """Batches of one row set in one order, pass after pass; a function of the step's number."""

    def __init__(self, data: Data, rows: NDArray[np.int64], seed: int, size: int) -> None:
        self._data, self._rows, self._seed, self._size = data, rows, seed, size
        self._ends = _ends(len(rows), size)
        self.steps = len(self._ends)
        self._pass = -1

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Rows for `Held.take`, int64 (B,), `Held.take`, and the labels, (B,) or (B, C)."""
        if self._pass != step // self.steps:
            self._begin(step // self.steps)
        end = step % self.steps
        span = slice(self._ends[end - 1] if end else 0, self._ends[end])
        return self._flat[span], self._label[span]

    def _begin(self, number: int) -> None:
        import torch

        data, views = self._data, self._data.feature.shape[1]
        rows = self._rows[_order(len(self._rows), self._seed, number)]
        flat = rows * views + view_of(data.key[rows], views, self._seed, number)
        at = torch.from_numpy(rows).to(data.label.device)
        self._flat = torch.from_numpy(flat).to(data.feature.device)
        self._label = data.label.index_select(0, at)
        self._pass = number


# -------------------------------------------------------------------------------- training


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """A head's weights by name (numpy), one dict of figures per epoch, which epoch's weights these
    are, and why it stopped before the last epoch: "" (it did not), "patience" or "halving". l2: of
    logistic regression, the strength of its penalty.
    """

    state: dict[str, NDArray[Any]]
    epochs: list[dict[str, float]]
    epoch: int
    stopped: str = ""
    l2: float | None = None


Saved = tuple[dict[str, "Tensor"], dict[str, Any]]
"""Tensors, and plain values for JSON: all that a training needs to go on."""


class Training:
    """Heads on their way: what the loop, the LR finder and a checkpoint share.

    Members that differ in rate and weight decay only share a lane; other rows, seeds or dropout
    make lanes of their own, in the same batched products. All else must be equal.
    """

    def __init__(
        self,
        data: Data,
        members: Sequence[Member],
        team: Team = Team(),
        states: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> None:
        most = max(len(member.train) for member in members)
        members = [replace(one, config=resolve(one.config, most)) for one in members]
        self.data, self.members, self.team = data, members, team
        self.config = members[0].config
        figures = ("f1", "f2") if data.multi else ("balanced_accuracy",)
        if self.config.best not in ("last", "valid_loss", "accuracy", *figures):
            raise ConfigError(
                f"--best {self.config.best}: images here have"
                f" {'several labels' if data.multi else 'one label'} each.",
                f"last, valid_loss, accuracy, {', '.join(figures)}.",
                "give another --best.",
            )
        self.device = data.feature.device
        self.dtype = precision(self.config.precision, self.device)
        sizes = {len(member.train) for member in members}
        self.steps = max(len(_ends(size, self.config.batch_size)) for size in sizes)
        self.done = 0
        self.lines: list[list[dict[str, float]]] = [[] for _ in members]
        self.best: dict[int, tuple[float, int]] = {}
        self.stopped: dict[int, str] = {}
        self._kept: dict[int, dict[str, Tensor]] = {}
        spreads: dict[int, tuple[Tensor, Tensor]] = {}
        fresh = states or [self._fresh(member, spreads) for member in members]
        self._seat(range(len(members)), fresh)

    def _fresh(
        self, member: Member, spreads: dict[int, tuple[Tensor, Tensor]]
    ) -> dict[str, Tensor]:
        """The weights that a head begins with."""
        import torch

        from arrowhead import heads

        config, width = member.config, self.data.feature.shape[2]
        made = heads.make(config.kind, width, len(self.data.classes), seed=config.seed)
        state = made.state_dict()
        if member.start is not None:
            state = {name: torch.from_numpy(np.array(one)) for name, one in member.start.items()}
        elif config.kind == "linear":
            if id(member.train) not in spreads:
                spreads[id(member.train)] = spread(self.data.feature, member.train)
            state["0.mean"], state["0.deviation"] = spreads[id(member.train)]
        # The lesson's head multiplies last bits a thousandfold in a few epochs: in float32 another
        # number of workers would end elsewhere. On a CPU doubles cost it twice the time.
        wide = config.kind == "lesson" and self.dtype is None and self.device.type == "cpu"
        return {
            name: value.to(self.device).double()
            if wide and value.is_floating_point()
            else value.to(self.device)
            for name, value in state.items()
        }

    def _seat(self, numbers: Sequence[int], states: Sequence[Mapping[str, Tensor]]) -> None:
        """Give these members their places in a stack, lane by lane. Short lanes are filled up with
        copies that stand still.
        """
        import torch

        from arrowhead.heads import Stack

        lanes: dict[Any, list[int]] = {}
        for number in numbers:
            one = self.members[number]
            key = id(one.train), id(one.valid), one.config.seed, one.config.dropout
            lanes.setdefault(key, []).append(number)
        each = max(map(len, lanes.values()))
        seats = [lane + lane[:1] * (each - len(lane)) for lane in lanes.values()]
        state_of = dict(zip(numbers, states, strict=True))
        first = [self.members[lane[0]] for lane in seats]
        self.numbers = list(numbers)
        self.seat_of = {
            n: (i, k) for i, lane in enumerate(lanes.values()) for k, n in enumerate(lane)
        }
        self.stack = Stack.of(
            self.config.kind,
            [[state_of[number] for number in lane] for lane in seats],
            [one.config.dropout for one in first],
            [one.config.seed for one in first],
            multi=self.data.multi,
        )
        rate_LG = torch.zeros(len(seats), each, device=self.device, dtype=self.stack.theta.dtype)
        decay_LG = torch.zeros_like(rate_LG)
        for number, seat in self.seat_of.items():
            rate_LG[seat] = self.members[number].rate
            decay_LG[seat] = self.members[number].config.weight_decay
        scaled = self.dtype is torch.float16
        self.optimizer = descent.Optimizer(
            self.stack, self.config, rate_LG, decay_LG, scaled=scaled
        )
        size = self.config.batch_size
        self.loss = descent.Loss(
            multi=self.data.multi,
            smoothing=self.config.smoothing,
            classes=self._class_weights(first),
        )
        self._lanes = [Lane(self.data, one.train, one.config.seed, size) for one in first]
        shared = len({id(one.valid) for one in first}) == 1
        self._valid = [one.valid for one in (first[:1] if shared else first)]
        self._nats = torch.zeros(self.stack.shape, dtype=torch.float64, device=self.device)
        self._total = torch.zeros(len(seats), dtype=torch.float64, device=self.device)

    def _class_weights(self, first: Sequence[Member]) -> Tensor | None:
        """Weights of the classes for each lane, float32 (L, C); (C,) where all share rows."""
        import torch

        once = {(id(one.train), id(one.valid)): one for one in first}
        made = {key: class_weights(self.data, one) for key, one in once.items()}
        weights = [made[id(one.train), id(one.valid)] for one in first]
        there = [one for one in weights if one is not None]
        return there[0] if len(made) == 1 and there else torch.stack(there) if there else None

    # ------------------------------------------------------------------------- one step

    def move(self, step: int, factor: float) -> Tensor:
        """One step of every head, at `factor` of its rate; the loss of this worker's rows before
        it, float32 (L, G), summed, over the global batch's weight: the workers' sum is the loss.
        """
        import torch.distributed as dist

        from arrowhead.heads import Place

        flat_LB, label, real_LB, total = self._batch(step)
        mine = plan.share(flat_LB.shape[1], self.team.rank, self.team.world)
        here = slice(mine.start, mine.stop)
        feature = self.data.feature.take(flat_LB[:, here].reshape(-1))
        feature_LBD = feature.view(len(flat_LB), len(mine), self.data.feature.shape[2])
        real_LB = None if real_LB is None else real_LB[:, here]
        place = Place(step, mine.start, flat_LB.shape[1], self.team.world > 1)
        logit_LGCB = self.stack.logits(feature_LBD, place, real_LB, self.dtype)
        nats_LG, slope_LGCB = self.loss.of(logit_LGCB, label[..., here], real_LB, total)
        self.stack.descend(self.optimizer.scaled(slope_LGCB))
        if self.team.world > 1:
            dist.all_reduce(self.stack.grad)
        self.optimizer.move(factor)
        self._nats += nats_LG
        self._total += total
        return nats_LG / (total if isinstance(total, float) else total[:, None])

    def _batch(self, step: int) -> tuple[Tensor, Tensor, Tensor | None, float | Tensor]:
        """The global batch of every lane: flat (L, B), label (L, B) or (L, C, B), which rows are
        real, and what they weigh, a number or (L,).
        """
        import torch

        pairs = [lane.batch(step) for lane in self._lanes]
        counts = [len(flat) for flat, _ in pairs]
        real_LB = None
        if min(counts) < max(counts):
            fill = [torch.arange(max(counts), device=self.device) for _ in counts]
            real_LB = torch.stack([rows < n for rows, n in zip(fill, counts, strict=True)])
            fill = [rows.clamp(max=n - 1) for rows, n in zip(fill, counts, strict=True)]
            pairs = [
                (a[rows.to(a.device)], b[rows]) for (a, b), rows in zip(pairs, fill, strict=True)
            ]
        flat_LB = torch.stack([flat for flat, _ in pairs])
        label = torch.stack([label for _, label in pairs])
        if self.data.multi:
            label = label.mT.float()
        weight = self.loss.weight(label)
        if weight is not None:
            return flat_LB, label, real_LB, (weight if real_LB is None else weight * real_LB).sum(1)
        if real_LB is not None:
            return flat_LB, label, real_LB, real_LB.sum(1).float()
        return flat_LB, label, None, float(counts[0])

    # -------------------------------------------------------------------------- validation

    def validate(self, most: int | None = None) -> list[dict[str, float]]:
        """Figures of each head over the validation rows it is given (the first `most`); every row
        counts once. With one label: valid_loss (nats), accuracy, balanced_accuracy; with several:
        valid_loss (mean over labels), accuracy (of single decisions), f1, f2 (mean over images, a
        label is given where its probability is above a half).
        """
        import torch
        import torch.distributed as dist

        rows = [torch.from_numpy(one[:most]) for one in self._valid]
        device, classes = self.data.label.device, len(self.data.classes)
        kinds = 4 if self.data.multi else 2 + classes
        sums = torch.zeros(*self.stack.shape, kinds, dtype=torch.float64, device=device)
        shares = [plan.share(len(one), self.team.rank, self.team.world) for one in rows]
        size = max(16, MOST // self.stack.held(self.data.feature.shape[2]))
        for at in range(0, max(map(len, shares)), size):
            parts = [
                one[share.start : share.stop][at : at + size]
                for one, share in zip(rows, shares, strict=True)
            ]
            counts = [len(part) for part in parts]
            filled = [torch.nn.functional.pad(part, (0, max(counts) - len(part))) for part in parts]
            at_LB = torch.stack(filled)
            flat = (at_LB * self.data.feature.shape[1]).to(self.device)
            feature = self.data.feature.take(flat.flatten()).view(*at_LB.shape, -1)
            label = self.data.label[at_LB.to(device)]
            real = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
            sums += self._tally(self.stack.logits(feature), label, real.to(device))
        if self.team.world > 1:
            dist.all_reduce(sums)
        sums = sums.cpu()
        return [self._figures(sums[self.seat_of[n]], self._rows_of(n, rows)) for n in self.numbers]

    def _rows_of(self, number: int, rows: Sequence[Tensor]) -> Tensor:
        return rows[self.seat_of[number][0] if len(rows) > 1 else 0]

    def _tally(self, logit_LGCB: Tensor, label: Tensor, real_LB: Tensor) -> Tensor:
        """Sums over rows, float64 (L, G, kinds); label (L | 1, B) or (L | 1, B, C)."""
        import torch

        found = figures_by_image(logit_LGCB, label, multi=self.data.multi)
        real = real_LB[:, None]
        if self.data.multi:
            return torch.stack([(one * real).double().sum(2) for one in found.values()], 2)
        lanes, each, classes, rows = logit_LGCB.shape
        index = label[:, None].expand(lanes, each, rows)
        right = found["accuracy"] & real
        by_class = torch.zeros(lanes, each, classes, dtype=torch.float64, device=label.device)
        by_class.scatter_add_(2, index, right.double())
        sums = [torch.where(real, found["valid_loss"], 0), right]
        return torch.cat([torch.stack([one.double().sum(2) for one in sums], 2), by_class], 2)

    def _figures(self, sums: Tensor, rows: Tensor) -> dict[str, float]:
        import torch

        first = {"valid_loss": float(sums[0] / len(rows)), "accuracy": float(sums[1] / len(rows))}
        if self.data.multi:
            return first | {"f1": float(sums[2] / len(rows)), "f2": float(sums[3] / len(rows))}
        label = self.data.label[rows.to(self.data.label.device)]
        counts = torch.bincount(label, minlength=len(self.data.classes)).cpu()
        there = counts > 0
        recall = sums[2:][there] / counts[there]
        return first | {"balanced_accuracy": float(recall.mean())}

    # --------------------------------------------------------------------------- the loop

    def epoch(self) -> list[dict[str, float]]:
        """Every head once over its rows, then validated; the line of each that still learns, in
        the order of `numbers`.
        """
        import torch.distributed as dist

        epochs = self.config.total_epochs
        for step in range(self.done * self.steps, (self.done + 1) * self.steps):
            share = step / (self.steps * epochs)
            self.move(step, descent.factor(share, self.config, epochs))
        if self.team.world > 1:
            dist.all_reduce(self._nats)
        losses = (self._nats / self._total[:, None]).cpu()
        self._nats, self._total = self._nats * 0, self._total * 0
        lines = [
            {"epoch": self.done, "train_loss": float(losses[self.seat_of[number]])} | figures
            for number, figures in zip(self.numbers, self.validate(), strict=True)
        ]
        self.done += 1
        for number, line in zip(self.numbers, lines, strict=True):
            self.lines[number].append(line)
            self._judge(number, line)
        return lines

    def _judge(self, number: int, line: Mapping[str, float]) -> None:
        """Keep these weights if they are the best so far."""
        if self.config.best == "last":
            return
        value = line[self.config.best] * (-1 if self.config.best == "valid_loss" else 1)
        value = -math.inf if math.isnan(value) else value
        if number not in self.best or value > self.best[number][0]:
            self.best[number] = value, self.done - 1
            self._kept[number] = self.stack.state(*self.seat_of[number])

    def stale(self) -> set[int]:
        """Heads whose best figure is --patience epochs old."""
        patience = self.config.patience
        if not patience:
            return set()
        return {n for n in self.numbers if self.done - 1 - self.best[n][1] >= patience}

    def stop(self, losers: set[int]) -> None:
        """These heads learn no more; the others go on as if they had never been there."""
        import torch

        stay = [number for number in self.numbers if number not in losers]
        for number in set(self.numbers) - set(stay):
            self._kept.setdefault(number, self.stack.state(*self.seat_of[number]))
        if not stay:
            self.numbers = []
            return
        stack, optimizer, seat_of = self.stack, self.optimizer, self.seat_of
        self._seat(stay, [stack.state(*seat_of[number]) for number in stay])
        by_seat = {seat: number for number, seat in self.seat_of.items()}
        each = self.stack.shape[1]
        was = torch.zeros(self.stack.shape, dtype=torch.int64, device=self.device)
        for lane in range(len(was)):
            for seat in range(each):
                old = seat_of[by_seat.get((lane, seat), by_seat[lane, 0])]
                was[lane, seat] = old[0] * stack.shape[1] + old[1]
        moved = {
            name: stack.taken(one, was) if one.dim() == 1 else one.flatten()[was]
            for name, one in optimizer.tensors().items()
        }
        self.optimizer.load(moved, optimizer.steps)

    @property
    def over(self) -> bool:
        """Whether there is nothing more to learn."""
        return self.done == self.config.total_epochs or not self.numbers

    def trained(self) -> list[Trained]:
        """Every head with its last or best weights."""
        made = []
        for number, lines in enumerate(self.lines):
            kept = self._kept.get(number)
            state = self.stack.state(*self.seat_of[number]) if kept is None else kept
            epoch = self.best[number][1] if number in self.best else len(lines) - 1
            plain = {name: _single(value).cpu().numpy() for name, value in state.items()}
            why = self.stopped.get(number, "")
            made.append(Trained(state=plain, epochs=lines, epoch=epoch, stopped=why))
        return made

    # ------------------------------------------------------------------------ checkpoints

    def save(self) -> Saved:
        """All that `load` needs."""
        import torch

        names = self.stack.buffers
        tensors = {"theta": self.stack.theta}
        tensors |= {f"buffer.{name}": self.stack.buffers[name] for name in names}
        tensors |= {f"optimizer.{name}": one for name, one in self.optimizer.tensors().items()}
        kept = list(self._kept)
        for name in self._kept[kept[0]] if kept else ():
            tensors[f"kept.{name}"] = torch.stack([self._kept[number][name] for number in kept])
        facts = {
            "done": self.done,
            "numbers": self.numbers,
            "lines": [list(one) for one in self.lines],
            "best": [[number, *one] for number, one in self.best.items()],
            "kept": kept,
            "stopped": list(self.stopped.items()),
            "steps": self.optimizer.steps,
        }
        return {name: one.to("cpu", copy=True) for name, one in tensors.items()}, facts

    def load(self, saved: Saved) -> None:
        """Go on where `save` was called, on any number of workers."""
        tensors, facts = saved
        here = {name: one.to(self.device) for name, one in tensors.items()}
        self.done, self.lines = facts["done"], [list(one) for one in facts["lines"]]
        self.best = {number: (value, epoch) for number, value, epoch in facts["best"]}
        self.stopped = dict(facts.get("stopped", []))
        self._kept = {
            number: {
                name.removeprefix("kept."): one[at]
                for name, one in here.items()
                if name.startswith("kept.")
            }
            for at, number in enumerate(facts["kept"])
        }
        if set(facts["numbers"]) != set(self.numbers):
            stay = facts["numbers"]
            if not stay:
                self.numbers = []
                return
            self._seat(stay, [self.stack.state(*self.seat_of[number]) for number in stay])
        self.stack.theta.copy_(here["theta"])
        for name, buffer in self.stack.buffers.items():
            buffer.copy_(here[f"buffer.{name}"])
        prefix = "optimizer."
        own = {n.removeprefix(prefix): one for n, one in here.items() if n.startswith(prefix)}
        self.optimizer.load(own, facts["steps"])


def figures_by_image(logit_LGCB: Tensor, label: Tensor, *, multi: bool) -> dict[str, Tensor]:
    """What the figures of each head are means of, (L, G, B) each; label (L | 1, B), or (L | 1, B,
    C) of several. See `Training.validate`.
    """
    import torch

    if multi:
        wanted, given = label.mT[:, None] > 0, logit_LGCB > 0
        signed = torch.where(wanted, -logit_LGCB, logit_LGCB)
        nats = torch.nn.functional.softplus(signed).mean(2)
        hit, there = (given & wanted).sum(2), wanted.sum(2)
        many = given.sum(2) + 0 * nats  # nan stays nan
        f1, f2 = ((1 + weight) * hit / (weight * there + many).clamp(min=1) for weight in (1, 4))
        accuracy = (given == wanted).double().mean(2)
        return {"valid_loss": nats, "accuracy": accuracy, "f1": f1, "f2": f2}
    index = label[:, None, None].expand(*logit_LGCB.shape[:2], 1, -1)
    nats = -logit_LGCB.log_softmax(2).gather(2, index)[:, :, 0]
    return {"valid_loss": nats, "accuracy": logit_LGCB.argmax(2) == label[:, None]}


def class_weighting(
    train: NDArray[Any], valid: NDArray[Any], classes: int
) -> Literal["none", "validation"]:
    """What --class-weights auto comes to for these labels, (n,) or (n, C)."""
    import torch

    if train.ndim == 2:
        return "none"
    clear = descent.differ(torch.from_numpy(train), torch.from_numpy(valid), classes)
    return "validation" if clear else "none"


def class_weights(data: Data, member: Member) -> Tensor | None:
    """What each class weighs in the loss of a head, float32 (C,); None: all the same.

    They come from the labels of the images that it learns from and, where classes are to weigh as
    in validation, of the validation images; of these a head that is trained without a fold leaves
    out what is in that fold, since it is to be predicted.
    """
    asked, classes = member.config.class_weights, len(data.classes)
    label = data.label[member.train]
    if asked == "balanced":
        return descent.balance(label, classes)
    if asked == "none" or data.multi:
        return None
    valid = data.valid
    if member.valid is not valid:
        valid = np.setdiff1d(valid, member.valid)
    wanted = data.label[valid]
    if (
        asked == "auto"
        and class_weighting(label.cpu().numpy(), wanted.cpu().numpy(), classes) == "none"
    ):
        return None
    return descent.weights_as(label, wanted, classes)


def evaluate(
    data: Data, member: Member, state: Mapping[str, NDArray[Any]], team: Team = Team()
) -> dict[str, float]:
    """Figures of a finished head over the member's validation rows (see `Training.validate`)."""
    import torch

    device = data.feature.device
    there = {name: torch.from_numpy(value).to(device) for name, value in state.items()}
    return Training(data, [member], team, [there]).validate()[0]


def _single(value: Tensor) -> Tensor:
    """A weight as a bundle holds it: float32; counts stay."""
    return value.float() if value.is_floating_point() else value


@contextmanager
def threads_for(training: Training) -> Iterator[None]:
    """One thread where a step is small: on a busy machine threads wait longer for each other than
    such a step takes.
    """
    import torch

    lanes, each = training.stack.shape
    rows, width = training.config.batch_size, training.data.feature.shape[2]
    before = torch.get_num_threads()
    if lanes * rows * width * (4 + each * len(training.data.classes)) < 1 << 21:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def precision(asked: str, device: torch.device) -> torch.dtype | None:
    """The dtype of matrix products, None for fp32: bf16 only where the GPU has it in silicon."""
    import torch

    if asked == "auto":
        if device.type != "cuda":
            return None  # a head is too small for it to pay on a CPU
        has_units = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if has_units else torch.float16
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[asked]


def as_used(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The settings with the numbers in place of what stands for them: --warmup's default and, on
    that device, --precision auto.
    """
    if config.head == "logistic":
        return config
    dtype = precision(config.precision, device)
    name = {"None": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}[str(dtype)]
    return replace(config, warmup=descent.warm_up_of(config), precision=cast(Any, name))


Record = Callable[[dict[int, dict[str, float]]], None]
Keep = Callable[[Callable[[], Saved], int, bool], None]


def train_stack(
    data: Data,
    members: Sequence[Member],
    team: Team = Team(),
    record: Record = lambda lines: None,
    *,
    losers: Callable[[int, Sequence[int], Sequence[list[dict[str, float]]]], set[int]]
    | None = None,
    saved: Saved | None = None,
    keep: Keep = lambda save, epoch, over: None,
    until: int | None = None,
) -> list[Trained]:
    """Train many heads at once; one Trained per member, in their order.

    record: gets each epoch's lines by member. losers: of (epochs done, who still learns, all lines
    by member), whom to stop. keep: called after every epoch with the means to save, the number of
    epochs done, and whether it was the last. saved: what was saved then, to go on from there.
    until: end after so many epochs of a schedule that is made for all of them.
    """
    training = Training(data, members, team)
    if saved:
        training.load(saved)
    until = training.config.total_epochs if until is None else until
    while not training.over and training.done < until:
        with threads_for(training):
            training.epoch()
        record({number: training.lines[number][-1] for number in training.numbers})
        out = dict.fromkeys(training.stale(), "patience")
        for number in losers(training.done, training.numbers, training.lines) if losers else ():
            out.setdefault(number, "halving")
        if out and not training.over:
            training.stopped |= out
            training.stop(set(out))
        keep(training.save, training.done, training.over or training.done == until)
    return training.trained()


def train(
    data: Data,
    config: TrainConfig,
    rate: float,
    team: Team = Team(),
    record: Callable[[dict[str, float]], None] = lambda line: None,
    *,
    saved: Saved | None = None,
    keep: Keep = lambda save, epoch, over: None,
) -> Trained:
    """Train one head by gradient descent; `record` gets each epoch's figures as they come."""
    member = Member(config=config, rate=rate, train=data.train, valid=data.valid)
    return train_stack(
        data, [member], team, lambda lines: record(lines[0]), saved=saved, keep=keep
    )[0]
