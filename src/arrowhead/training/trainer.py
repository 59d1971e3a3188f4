"""Train heads on features by gradient descent.

    float16 (N, V, D), labels     all images of the store, in memory or memory-mapped
      -> BatchSampler             which rows, in which order: drawn from (seed, epoch)
      -> Training.train_step      one optimizer step for every head
      -> Training.validate        every validation row once
      -> TrainedHead              weights, and the metrics of each epoch

A single head is a stack of one. With several workers each rank takes its slice of every global
batch and gradients are summed: 1 and N workers take the same steps. Order, view and dropout are
functions of (seed, epoch or step), so a checkpoint holds no random state. Lightning and Hugging
Face's Trainer train one model and change its result with the number of workers.
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
from arrowhead.training import dataset, metrics, schedule
from arrowhead.training.batches import BatchSampler, DistributedContext
from arrowhead.training.config import TrainConfig
from arrowhead.training.dataset import Data, Trial
from arrowhead.training.losses import Loss
from arrowhead.training.optimizer import Optimizer

if TYPE_CHECKING:
    from torch import Tensor


# Numbers that validation holds in memory at once: 4 MiB of float32 fit a CPU's cache.
MAX_VALIDATION_VALUES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedHead:
    """A head's weights and how its training went.

    Attributes:
        state: The weights by name, as numpy arrays.
        epochs: The metrics of each epoch.
        epoch: The epoch whose weights these are.
        stopped: Why training stopped before the last epoch: "patience" or "halving"; "" if it did
            not.
        l2: Of logistic regression, the strength of the L2 penalty.
    """

    state: dict[str, NDArray[Any]]
    epochs: list[dict[str, float]]
    epoch: int
    stopped: str = ""
    l2: float | None = None


TrainingState = tuple[dict[str, "Tensor"], dict[str, Any]]
"""Tensors, and values for JSON: all that is needed to resume a training."""
EpochMetrics = dict[int, dict[str, float]]
"""One epoch's metrics by trial, of the trials that still train."""
StopRule = Callable[[int, Sequence[int], Sequence[list[dict[str, float]]]], set[int]]
"""From the epochs done, the trials that still train, and every trial's metrics of each epoch, to
the trials to stop."""
AfterEpoch = Callable[[Callable[[], TrainingState], int, bool], None]
"""Called after every epoch with a function that returns the state, the number of epochs done, and
whether training is over."""


class Training:
    """A stack of heads in training: what the training loop, the LR finder and checkpoints share.

    Trials that differ only in learning rate and weight decay form a group, which shares its
    batches (see `heads.Stack`). Trials with other rows, seeds or dropout form groups of their own
    in the same stack. All other settings must be equal.
    """

    def __init__(
        self,
        data: Data,
        trials: Sequence[Trial],
        distributed: DistributedContext = DistributedContext(),
        states: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> None:
        max_rows = max(len(trial.train) for trial in trials)
        trials = [
            replace(one, config=training_config.resolve_epochs(one.config, max_rows))
            for one in trials
        ]
        self.data, self.trials, self.distributed = data, trials, distributed
        self.config = trials[0].config
        choices = ("f1", "f2") if data.multilabel else ("balanced_accuracy",)
        if self.config.best not in ("last", "valid_loss", "accuracy", *choices):
            raise ConfigError(
                f"--best {self.config.best}: images here have"
                f" {'several labels' if data.multilabel else 'one label'} each.",
                f"last, valid_loss, accuracy, {', '.join(choices)}.",
                "give another --best.",
            )
        self.device = data.feature.device
        self.dtype = training_config.matmul_dtype(self.config.precision, self.device)
        sizes = {len(trial.train) for trial in trials}
        self.steps_per_epoch = max(
            len(training_config.batch_ends(size, self.config.batch_size)) for size in sizes
        )
        self.epochs_done = 0
        self.history: list[list[dict[str, float]]] = [[] for _ in trials]
        self.best: dict[int, tuple[float, int]] = {}  # trial -> best value of --best, its epoch
        self.stopped: dict[int, str] = {}
        # Weights of the best epochs, and of heads that were stopped.
        self._saved_states: dict[int, dict[str, Tensor]] = {}
        standardization: dict[int, tuple[Tensor, Tensor]] = {}
        initial = states or [self._initial_state(trial, standardization) for trial in trials]
        self._build_stack(range(len(trials)), initial)

    def _initial_state(
        self, trial: Trial, standardization: dict[int, tuple[Tensor, Tensor]]
    ) -> dict[str, Tensor]:
        """Return the initial state dict of a head.

        Args:
            trial: How the head is trained.
            standardization: Mean and standard deviation of each set of training rows; those that
                are missing are added.
        """
        import torch

        from arrowhead.training import heads

        config, width = trial.config, self.data.feature.shape[2]
        head = heads.build_head(
            config.architecture, width, len(self.data.classes), seed=config.seed
        )
        state = head.state_dict()
        if trial.initial_state is not None:
            state = {
                name: torch.from_numpy(np.array(one)) for name, one in trial.initial_state.items()
            }
        elif config.architecture == "linear":
            if id(trial.train) not in standardization:
                mean_std = dataset.mean_and_std(self.data.feature, trial.train)
                standardization[id(trial.train)] = mean_std
            state["0.mean"], state["0.deviation"] = standardization[id(trial.train)]
        # The lesson's head amplifies rounding errors a thousandfold in a few epochs: in float32,
        # another number of workers would give another head. float64 takes twice the time.
        lesson = config.architecture == "lesson"
        double = lesson and self.dtype is None and self.device.type == "cpu"
        return {
            name: value.to(self.device).double()
            if double and value.is_floating_point()
            else value.to(self.device)
            for name, value in state.items()
        }

    def _build_stack(self, numbers: Sequence[int], states: Sequence[Mapping[str, Tensor]]) -> None:
        """Arrange these trials in groups and build their stack, optimizer and batches.

        Groups with fewer heads than the largest are padded with copies whose learning rate is 0.
        """
        import torch

        from arrowhead.training.heads import Stack

        by_key: dict[Any, list[int]] = {}
        for number in numbers:
            one = self.trials[number]
            key = id(one.train), id(one.valid), one.config.seed, one.config.dropout
            by_key.setdefault(key, []).append(number)
        heads = max(map(len, by_key.values()))
        groups = [group + group[:1] * (heads - len(group)) for group in by_key.values()]
        state_of = dict(zip(numbers, states, strict=True))
        first = [self.trials[group[0]] for group in groups]
        self.active = list(numbers)
        self.position_of = {
            n: (i, k) for i, group in enumerate(by_key.values()) for k, n in enumerate(group)
        }
        self.stack = Stack.from_states(
            self.config.architecture,
            [[state_of[number] for number in group] for group in groups],
            [one.config.dropout for one in first],
            [one.config.seed for one in first],
            multilabel=self.data.multilabel,
        )
        lr_GH = torch.zeros(len(groups), heads, device=self.device, dtype=self.stack.theta.dtype)
        decay_GH = torch.zeros_like(lr_GH)
        for number, position in self.position_of.items():
            lr_GH[position] = self.trials[number].lr
            decay_GH[position] = self.trials[number].config.weight_decay
        scaled = self.dtype is torch.float16
        self.optimizer = Optimizer(self.stack, self.config, lr_GH, decay_GH, scaled=scaled)
        batch_size = self.config.batch_size
        self.loss = Loss(
            multilabel=self.data.multilabel,
            smoothing=self.config.smoothing,
            class_weights=self._class_weights(first),
        )
        self._samplers = [
            BatchSampler(self.data, one.train, one.config.seed, batch_size) for one in first
        ]
        shared = len({id(one.valid) for one in first}) == 1
        self._valid_rows = [one.valid for one in (first[:1] if shared else first)]
        self._loss_sum = torch.zeros(self.stack.shape, dtype=torch.float64, device=self.device)
        self._weight_sum = torch.zeros(len(groups), dtype=torch.float64, device=self.device)

    def _class_weights(self, first: Sequence[Trial]) -> Tensor | None:
        """Return each group's class weights, float32 (G, C); (C,) if all groups share their rows.

        Args:
            first: The first trial of each group.
        """
        import torch

        by_rows = {(id(one.train), id(one.valid)): one for one in first}
        computed = {key: dataset.class_weights(self.data, one) for key, one in by_rows.items()}
        weights = [computed[id(one.train), id(one.valid)] for one in first]
        present = [one for one in weights if one is not None]
        if len(computed) == 1 and present:
            return present[0]
        return torch.stack(present) if present else None

    # ------------------------------------------------------------------------- one step

    def train_step(self, step: int, factor: float) -> Tensor:
        """Take one optimizer step with every head.

        Args:
            step: The number of the step, which decides its batch.
            factor: The learning rate, as a factor of each head's own.

        Returns:
            This worker's part of the loss before the step, float32 (G, H): summed over workers it
            is the mean loss of the global batch.
        """
        import torch.distributed as dist

        from arrowhead.training.heads import BatchSlice

        flat_GB, label, mask_GB, total = self._batch(step)
        share = splits.rows_of(flat_GB.shape[1], self.distributed.rank, self.distributed.world_size)
        own = slice(share.start, share.stop)
        feature = self.data.feature.take(flat_GB[:, own].reshape(-1))
        feature_GBD = feature.view(len(flat_GB), len(share), self.data.feature.shape[2])
        mask_GB = None if mask_GB is None else mask_GB[:, own]
        batch = BatchSlice(step, share.start, flat_GB.shape[1], self.distributed.world_size > 1)
        logit_GHCB = self.stack.logits(feature_GBD, batch, mask_GB, self.dtype)
        loss_GH, grad_GHCB = self.loss.sum_and_gradient(logit_GHCB, label[..., own], mask_GB, total)
        self.stack.backward(self.optimizer.scale_gradient(grad_GHCB))
        if self.distributed.world_size > 1:
            dist.all_reduce(self.stack.grad)
        self.optimizer.step(factor)
        self._loss_sum += loss_GH
        self._weight_sum += total
        return loss_GH / (total if isinstance(total, float) else total[:, None])

    def _batch(self, step: int) -> tuple[Tensor, Tensor, Tensor | None, float | Tensor]:
        """Return the global batch of every group; shorter ones are padded.

        Returns:
            Rows for `InMemoryFeatures.take` (G, B); labels (G, B) or (G, C, B); which rows are not
            padding, bool (G, B), None if all; and the sum of the rows' weights, a number or (G,).
        """
        import torch

        pairs = [sampler.batch(step) for sampler in self._samplers]
        counts = [len(flat) for flat, _ in pairs]
        mask_GB = None
        if min(counts) < max(counts):
            rows = [torch.arange(max(counts), device=self.device) for _ in counts]
            mask_GB = torch.stack([row < n for row, n in zip(rows, counts, strict=True)])
            rows = [row.clamp(max=n - 1) for row, n in zip(rows, counts, strict=True)]
            pairs = [
                (flat[row.to(flat.device)], label[row])
                for (flat, label), row in zip(pairs, rows, strict=True)
            ]
        flat_GB = torch.stack([flat for flat, _ in pairs])
        label = torch.stack([label for _, label in pairs])
        if self.data.multilabel:
            label = label.mT.float()
        weight = self.loss.row_weights(label)
        if weight is not None:
            total = (weight if mask_GB is None else weight * mask_GB).sum(1)
            return flat_GB, label, mask_GB, total
        if mask_GB is not None:
            return flat_GB, label, mask_GB, mask_GB.sum(1).float()
        return flat_GB, label, None, float(counts[0])

    # -------------------------------------------------------------------------- validation

    def validate(self, max_rows: int | None = None) -> list[dict[str, float]]:
        """Compute the metrics of each head on its validation rows; every row counts once.

        Args:
            max_rows: Use only the first rows, up to this many.

        Returns:
            For each active trial, with one label per image: valid_loss (nats), accuracy,
            balanced_accuracy. With several labels: valid_loss (mean over labels), accuracy (of
            single decisions), f1, f2 (mean over images; a label is predicted if its probability is
            above 0.5).
        """
        import torch
        import torch.distributed as dist

        rows = [torch.from_numpy(one[:max_rows]) for one in self._valid_rows]
        device, classes = self.data.label.device, len(self.data.classes)
        columns = 4 if self.data.multilabel else 2 + classes
        sums = torch.zeros(*self.stack.shape, columns, dtype=torch.float64, device=device)
        shares = [
            splits.rows_of(len(one), self.distributed.rank, self.distributed.world_size)
            for one in rows
        ]
        values = self.stack.values_per_row(self.data.feature.shape[2])
        size = max(16, MAX_VALIDATION_VALUES // values)
        for start in range(0, max(map(len, shares)), size):
            parts = [
                one[share.start : share.stop][start : start + size]
                for one, share in zip(rows, shares, strict=True)
            ]
            counts = [len(part) for part in parts]
            padded = [torch.nn.functional.pad(part, (0, max(counts) - len(part))) for part in parts]
            row_GB = torch.stack(padded)
            flat = (row_GB * self.data.feature.shape[1]).to(self.device)
            feature = self.data.feature.take(flat.flatten()).view(*row_GB.shape, -1)
            label = self.data.label[row_GB.to(device)]
            mask = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
            logit_GHCB = self.stack.logits(feature)
            sums += metrics.sum_over_rows(
                logit_GHCB, label, mask.to(device), multilabel=self.data.multilabel
            )
        if self.distributed.world_size > 1:
            dist.all_reduce(sums)
        sums = sums.cpu()
        return [
            metrics.from_sums(sums[self.position_of[n]], self._valid_labels(n, rows), classes)
            for n in self.active
        ]

    def _valid_labels(self, number: int, rows: Sequence[Tensor]) -> Tensor:
        """Return the labels of a trial's validation rows."""
        own = rows[self.position_of[number][0] if len(rows) > 1 else 0]
        return self.data.label[own.to(self.data.label.device)]

    # --------------------------------------------------------------------------- the loop

    def train_epoch(self) -> list[dict[str, float]]:
        """Train every head for one epoch, then validate.

        Returns:
            The metrics of each active trial, in the order of `active`.
        """
        import torch.distributed as dist

        epochs = self.config.total_epochs
        first = self.epochs_done * self.steps_per_epoch
        for step in range(first, first + self.steps_per_epoch):
            progress = step / (self.steps_per_epoch * epochs)
            self.train_step(step, schedule.lr_factor(progress, self.config, epochs))
        if self.distributed.world_size > 1:
            dist.all_reduce(self._loss_sum)
        losses = (self._loss_sum / self._weight_sum[:, None]).cpu()
        self._loss_sum, self._weight_sum = self._loss_sum * 0, self._weight_sum * 0
        epoch_metrics = [
            {"epoch": self.epochs_done, "train_loss": float(losses[self.position_of[number]])}
            | validation
            for number, validation in zip(self.active, self.validate(), strict=True)
        ]
        self.epochs_done += 1
        for number, result in zip(self.active, epoch_metrics, strict=True):
            self.history[number].append(result)
            self._update_best(number, result)
        return epoch_metrics

    def _update_best(self, number: int, result: Mapping[str, float]) -> None:
        """Save a head's weights if they are the best so far."""
        if self.config.best == "last":
            return
        value = result[self.config.best] * (-1 if self.config.best == "valid_loss" else 1)
        value = -math.inf if math.isnan(value) else value
        if number not in self.best or value > self.best[number][0]:
            self.best[number] = value, self.epochs_done - 1
            self._saved_states[number] = self.stack.state(*self.position_of[number])

    def out_of_patience(self) -> set[int]:
        """Return the trials whose --best metric has not improved for --patience epochs."""
        patience = self.config.patience
        if not patience:
            return set()
        return {n for n in self.active if self.epochs_done - 1 - self.best[n][1] >= patience}

    def stop(self, losers: set[int]) -> None:
        """Stop training these trials; the others train on exactly as they would without them."""
        import torch

        remaining = [number for number in self.active if number not in losers]
        for number in set(self.active) - set(remaining):
            self._saved_states.setdefault(number, self.stack.state(*self.position_of[number]))
        if not remaining:
            self.active = []
            return
        stack, optimizer, position_of = self.stack, self.optimizer, self.position_of
        self._build_stack(remaining, [stack.state(*position_of[number]) for number in remaining])
        by_position = {position: number for number, position in self.position_of.items()}
        heads = self.stack.shape[1]
        old_GH = torch.zeros(self.stack.shape, dtype=torch.int64, device=self.device)
        for group in range(len(old_GH)):
            for head in range(heads):
                old = position_of[by_position.get((group, head), by_position[group, 0])]
                old_GH[group, head] = old[0] * stack.shape[1] + old[1]
        tensors = {
            name: stack.select_heads(one, old_GH) if one.dim() == 1 else one.flatten()[old_GH]
            for name, one in optimizer.state_tensors().items()
        }
        self.optimizer.load(tensors, optimizer.steps)

    @property
    def finished(self) -> bool:
        """Whether all epochs are done or no trial still trains."""
        return self.epochs_done == self.config.total_epochs or not self.active

    def trained_heads(self) -> list[TrainedHead]:
        """Return every head with its last or best weights."""
        trained = []
        for number, history in enumerate(self.history):
            saved = self._saved_states.get(number)
            state = self.stack.state(*self.position_of[number]) if saved is None else saved
            epoch = self.best[number][1] if number in self.best else len(history) - 1
            arrays = {name: _to_float32(value).cpu().numpy() for name, value in state.items()}
            why = self.stopped.get(number, "")
            trained.append(TrainedHead(state=arrays, epochs=history, epoch=epoch, stopped=why))
        return trained

    # ------------------------------------------------------------------------ checkpoints

    def save(self) -> TrainingState:
        """Return all that `load` needs, with the tensors on the CPU."""
        import torch

        tensors = {"theta": self.stack.theta}
        tensors |= {f"buffer.{name}": one for name, one in self.stack.buffers.items()}
        tensors |= {
            f"optimizer.{name}": one for name, one in self.optimizer.state_tensors().items()
        }
        saved = list(self._saved_states)
        for name in self._saved_states[saved[0]] if saved else ():
            tensors[f"kept.{name}"] = torch.stack(
                [self._saved_states[number][name] for number in saved]
            )
        facts = {
            "done": self.epochs_done,
            "numbers": self.active,
            "lines": [list(one) for one in self.history],
            "best": [[number, *one] for number, one in self.best.items()],
            "kept": saved,
            "stopped": list(self.stopped.items()),
            "steps": self.optimizer.steps,
        }
        return {name: one.to("cpu", copy=True) for name, one in tensors.items()}, facts

    def load(self, state: TrainingState) -> None:
        """Resume from what `save` returned, on any number of workers."""
        saved_tensors, facts = state
        tensors = {name: one.to(self.device) for name, one in saved_tensors.items()}
        self.epochs_done, self.history = facts["done"], [list(one) for one in facts["lines"]]
        self.best = {number: (value, epoch) for number, value, epoch in facts["best"]}
        self.stopped = dict(facts.get("stopped", []))
        self._saved_states = {
            number: {
                name.removeprefix("kept."): one[i]
                for name, one in tensors.items()
                if name.startswith("kept.")
            }
            for i, number in enumerate(facts["kept"])
        }
        if set(facts["numbers"]) != set(self.active):
            remaining = facts["numbers"]
            if not remaining:
                self.active = []
                return
            self._build_stack(
                remaining, [self.stack.state(*self.position_of[number]) for number in remaining]
            )
        self.stack.theta.copy_(tensors["theta"])
        for name, buffer in self.stack.buffers.items():
            buffer.copy_(tensors[f"buffer.{name}"])
        prefix = "optimizer."
        own = {n.removeprefix(prefix): one for n, one in tensors.items() if n.startswith(prefix)}
        self.optimizer.load(own, facts["steps"])


def evaluate(
    data: Data,
    trial: Trial,
    state: Mapping[str, NDArray[Any]],
    distributed: DistributedContext = DistributedContext(),
) -> dict[str, float]:
    """Compute a trained head's metrics on the trial's validation rows (`Training.validate`)."""
    import torch

    device = data.feature.device
    tensors = {name: torch.from_numpy(value).to(device) for name, value in state.items()}
    return Training(data, [trial], distributed, [tensors]).validate()[0]


def _to_float32(value: Tensor) -> Tensor:
    """Convert a weight to a bundle's dtype; counts stay integers."""
    return value.float() if value.is_floating_point() else value


@contextmanager
def limit_threads(training: Training) -> Iterator[None]:
    """Use one thread while steps are small: on a busy machine threads would wait longer for each
    other than such a step takes.
    """
    import torch

    groups, heads = training.stack.shape
    rows, width = training.config.batch_size, training.data.feature.shape[2]
    before = torch.get_num_threads()
    if groups * rows * width * (4 + heads * len(training.data.classes)) < 1 << 21:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_stack(
    data: Data,
    trials: Sequence[Trial],
    distributed: DistributedContext = DistributedContext(),
    report: Callable[[EpochMetrics], None] = lambda metrics: None,
    *,
    stop_rule: StopRule | None = None,
    resume_from: TrainingState | None = None,
    after_epoch: AfterEpoch = lambda save, epochs_done, finished: None,
    stop_epoch: int | None = None,
) -> list[TrainedHead]:
    """Train many heads at once.

    Args:
        data: Features and labels.
        trials: How each head is trained, on which rows.
        distributed: This worker's rank; all workers call this function together.
        report: Gets the metrics of each epoch.
        stop_rule: Decides after each epoch which trials to stop.
        resume_from: The state that `after_epoch` saved, to resume from there.
        after_epoch: Called after each epoch, to save checkpoints.
        stop_epoch: End after this many epochs of a schedule made for all epochs.

    Returns:
        One head per trial, in their order.
    """
    training = Training(data, trials, distributed)
    if resume_from:
        training.load(resume_from)
    stop_epoch = training.config.total_epochs if stop_epoch is None else stop_epoch
    while not training.finished and training.epochs_done < stop_epoch:
        with limit_threads(training):
            training.train_epoch()
        report({number: training.history[number][-1] for number in training.active})
        stopped = dict.fromkeys(training.out_of_patience(), "patience")
        losers = (
            stop_rule(training.epochs_done, training.active, training.history) if stop_rule else ()
        )
        for number in losers:
            stopped.setdefault(number, "halving")
        if stopped and not training.finished:
            training.stopped |= stopped
            training.stop(set(stopped))
        last = training.finished or training.epochs_done == stop_epoch
        after_epoch(training.save, training.epochs_done, last)
    return training.trained_heads()


def train(
    data: Data,
    config: TrainConfig,
    lr: float,
    distributed: DistributedContext = DistributedContext(),
    report: Callable[[dict[str, float]], None] = lambda metrics: None,
    *,
    resume_from: TrainingState | None = None,
    after_epoch: AfterEpoch = lambda save, epochs_done, finished: None,
) -> TrainedHead:
    """Train one head by gradient descent; `report` gets the metrics of each epoch."""
    trial = Trial(config=config, lr=lr, train=data.train, valid=data.valid)
    return train_stack(
        data,
        [trial],
        distributed,
        lambda metrics: report(metrics[0]),
        resume_from=resume_from,
        after_epoch=after_epoch,
    )[0]
