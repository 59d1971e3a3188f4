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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.data import splits
from arrowhead.errors import ConfigError
from arrowhead.training import config as training_config
from arrowhead.training import dataset, schedule
from arrowhead.training.batches import DistributedContext, Lane
from arrowhead.training.config import TrainConfig
from arrowhead.training.dataset import Data, Trial
from arrowhead.training.losses import Loss
from arrowhead.training.optimizer import Optimizer

if TYPE_CHECKING:
    from torch import Tensor


VALIDATION_NUMBERS = (
    1 << 20
)  # numbers that validation holds at once: 4 MiB of float32 stay in the caches


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
        trials: Sequence[Trial],
        distributed: DistributedContext = DistributedContext(),
        states: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> None:
        most = max(len(trial.train) for trial in trials)
        trials = [
            replace(one, config=training_config.resolve_epochs(one.config, most)) for one in trials
        ]
        self.data, self.trials, self.distributed = data, trials, distributed
        self.config = trials[0].config
        figures = ("f1", "f2") if data.multi else ("balanced_accuracy",)
        if self.config.best not in ("last", "valid_loss", "accuracy", *figures):
            raise ConfigError(
                f"--best {self.config.best}: images here have"
                f" {'several labels' if data.multi else 'one label'} each.",
                f"last, valid_loss, accuracy, {', '.join(figures)}.",
                "give another --best.",
            )
        self.device = data.feature.device
        self.dtype = training_config.matmul_dtype(self.config.precision, self.device)
        sizes = {len(trial.train) for trial in trials}
        self.steps = max(
            len(training_config.batch_ends(size, self.config.batch_size)) for size in sizes
        )
        self.done = 0
        self.lines: list[list[dict[str, float]]] = [[] for _ in trials]
        self.best: dict[int, tuple[float, int]] = {}
        self.stopped: dict[int, str] = {}
        self._kept: dict[int, dict[str, Tensor]] = {}
        spreads: dict[int, tuple[Tensor, Tensor]] = {}
        fresh = states or [self._fresh(trial, spreads) for trial in trials]
        self._seat(range(len(trials)), fresh)

    def _fresh(self, trial: Trial, spreads: dict[int, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """The weights that a head begins with."""
        import torch

        from arrowhead.training import heads

        config, width = trial.config, self.data.feature.shape[2]
        made = heads.make(config.architecture, width, len(self.data.classes), seed=config.seed)
        state = made.state_dict()
        if trial.start is not None:
            state = {name: torch.from_numpy(np.array(one)) for name, one in trial.start.items()}
        elif config.architecture == "linear":
            if id(trial.train) not in spreads:
                spreads[id(trial.train)] = dataset.mean_and_std(self.data.feature, trial.train)
            state["0.mean"], state["0.deviation"] = spreads[id(trial.train)]
        # The lesson's head multiplies last bits a thousandfold in a few epochs: in float32 another
        # number of workers would end elsewhere. On a CPU doubles cost it twice the time.
        wide = config.architecture == "lesson" and self.dtype is None and self.device.type == "cpu"
        return {
            name: value.to(self.device).double()
            if wide and value.is_floating_point()
            else value.to(self.device)
            for name, value in state.items()
        }

    def _seat(self, numbers: Sequence[int], states: Sequence[Mapping[str, Tensor]]) -> None:
        """Give these trials their places in a stack, lane by lane. Short lanes are filled up with
        copies that stand still.
        """
        import torch

        from arrowhead.training.heads import Stack

        lanes: dict[Any, list[int]] = {}
        for number in numbers:
            one = self.trials[number]
            key = id(one.train), id(one.valid), one.config.seed, one.config.dropout
            lanes.setdefault(key, []).append(number)
        each = max(map(len, lanes.values()))
        seats = [lane + lane[:1] * (each - len(lane)) for lane in lanes.values()]
        state_of = dict(zip(numbers, states, strict=True))
        first = [self.trials[lane[0]] for lane in seats]
        self.numbers = list(numbers)
        self.seat_of = {
            n: (i, k) for i, lane in enumerate(lanes.values()) for k, n in enumerate(lane)
        }
        self.stack = Stack.of(
            self.config.architecture,
            [[state_of[number] for number in lane] for lane in seats],
            [one.config.dropout for one in first],
            [one.config.seed for one in first],
            multi=self.data.multi,
        )
        rate_LG = torch.zeros(len(seats), each, device=self.device, dtype=self.stack.theta.dtype)
        decay_LG = torch.zeros_like(rate_LG)
        for number, seat in self.seat_of.items():
            rate_LG[seat] = self.trials[number].rate
            decay_LG[seat] = self.trials[number].config.weight_decay
        scaled = self.dtype is torch.float16
        self.optimizer = Optimizer(self.stack, self.config, rate_LG, decay_LG, scaled=scaled)
        size = self.config.batch_size
        self.loss = Loss(
            multi=self.data.multi,
            smoothing=self.config.smoothing,
            classes=self._class_weights(first),
        )
        self._lanes = [Lane(self.data, one.train, one.config.seed, size) for one in first]
        shared = len({id(one.valid) for one in first}) == 1
        self._valid = [one.valid for one in (first[:1] if shared else first)]
        self._nats = torch.zeros(self.stack.shape, dtype=torch.float64, device=self.device)
        self._total = torch.zeros(len(seats), dtype=torch.float64, device=self.device)

    def _class_weights(self, first: Sequence[Trial]) -> Tensor | None:
        """Weights of the classes for each lane, float32 (L, C); (C,) where all share rows."""
        import torch

        once = {(id(one.train), id(one.valid)): one for one in first}
        made = {key: dataset.class_weights(self.data, one) for key, one in once.items()}
        weights = [made[id(one.train), id(one.valid)] for one in first]
        there = [one for one in weights if one is not None]
        return there[0] if len(made) == 1 and there else torch.stack(there) if there else None

    # ------------------------------------------------------------------------- one step

    def move(self, step: int, factor: float) -> Tensor:
        """One step of every head, at `factor` of its rate; the loss of this worker's rows before
        it, float32 (L, G), summed, over the global batch's weight: the workers' sum is the loss.
        """
        import torch.distributed as dist

        from arrowhead.training.heads import Place

        flat_LB, label, real_LB, total = self._batch(step)
        mine = splits.share(flat_LB.shape[1], self.distributed.rank, self.distributed.world)
        here = slice(mine.start, mine.stop)
        feature = self.data.feature.take(flat_LB[:, here].reshape(-1))
        feature_LBD = feature.view(len(flat_LB), len(mine), self.data.feature.shape[2])
        real_LB = None if real_LB is None else real_LB[:, here]
        place = Place(step, mine.start, flat_LB.shape[1], self.distributed.world > 1)
        logit_LGCB = self.stack.logits(feature_LBD, place, real_LB, self.dtype)
        nats_LG, slope_LGCB = self.loss.of(logit_LGCB, label[..., here], real_LB, total)
        self.stack.descend(self.optimizer.scaled(slope_LGCB))
        if self.distributed.world > 1:
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
        shares = [
            splits.share(len(one), self.distributed.rank, self.distributed.world) for one in rows
        ]
        size = max(16, VALIDATION_NUMBERS // self.stack.held(self.data.feature.shape[2]))
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
        if self.distributed.world > 1:
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
            self.move(step, schedule.lr_factor(share, self.config, epochs))
        if self.distributed.world > 1:
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


def evaluate(
    data: Data,
    trial: Trial,
    state: Mapping[str, NDArray[Any]],
    distributed: DistributedContext = DistributedContext(),
) -> dict[str, float]:
    """Figures of a finished head over the trial's validation rows (see `Training.validate`)."""
    import torch

    device = data.feature.device
    there = {name: torch.from_numpy(value).to(device) for name, value in state.items()}
    return Training(data, [trial], distributed, [there]).validate()[0]


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


Record = Callable[[dict[int, dict[str, float]]], None]
AfterEpoch = Callable[[Callable[[], Saved], int, bool], None]


def train_stack(
    data: Data,
    trials: Sequence[Trial],
    distributed: DistributedContext = DistributedContext(),
    record: Record = lambda lines: None,
    *,
    losers: Callable[[int, Sequence[int], Sequence[list[dict[str, float]]]], set[int]]
    | None = None,
    saved: Saved | None = None,
    after_epoch: AfterEpoch = lambda save, epoch, over: None,
    until: int | None = None,
) -> list[Trained]:
    """Train many heads at once; one Trained per trial, in their order.

    record: gets each epoch's lines by trial. losers: of (epochs done, who still learns, all lines
    by trial), which to stop. after_epoch: called after every epoch with a function that saves, the
    number of epochs done, and whether it was the last. saved: what was saved then, to go on from
    there.
    until: end after so many epochs of a schedule that is made for all of them.
    """
    training = Training(data, trials, distributed)
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
        after_epoch(training.save, training.done, training.over or training.done == until)
    return training.trained()


def train(
    data: Data,
    config: TrainConfig,
    rate: float,
    distributed: DistributedContext = DistributedContext(),
    record: Callable[[dict[str, float]], None] = lambda line: None,
    *,
    saved: Saved | None = None,
    after_epoch: AfterEpoch = lambda save, epoch, over: None,
) -> Trained:
    """Train one head by gradient descent; `record` gets each epoch's figures as they come."""
    trial = Trial(config=config, rate=rate, train=data.train, valid=data.valid)
    return train_stack(
        data,
        [trial],
        distributed,
        lambda lines: record(lines[0]),
        saved=saved,
        after_epoch=after_epoch,
    )[0]
