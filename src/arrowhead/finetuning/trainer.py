"""The training loop of a fine-tuning.

    rows of an epoch       a permutation by (seed, epoch), cut into steps of nearly the same size
      -> parts of a step   at most --micro-batch rows; of each part every worker takes its rows
      -> PixelBatches      their augmented pixels
      -> Finetuning        forward, backward, one optimizer step; the average of the weights
      -> validate          the clean view of every validation image, once

All workers take the same steps, and the loss is divided by the rows of the global batch. Order,
augmentation and dropout are functions of (seed, epoch or step), so a checkpoint, which may fall
between any two steps, holds no random state. Lightning, Hugging Face's Trainer and fast.ai repeat
or skip images after such a restart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.finetuning import global_batch, network
from arrowhead.finetuning.augmentation import AugmentConfig, mix, soft_targets
from arrowhead.finetuning.config import FinetuneConfig, split_in_pairs
from arrowhead.finetuning.global_batch import GlobalRows
from arrowhead.finetuning.network import FinetuneNetwork
from arrowhead.finetuning.pixel_batches import PixelBatches
from arrowhead.training import config as training_config
from arrowhead.training import metrics, schedule
from arrowhead.training.batches import DistributedContext

if TYPE_CHECKING:
    import torch
    from torch import Tensor

EMA_WARMUP = 10.0  # the average begins with a memory of a tenth of the steps so far
State = tuple[dict[str, "Tensor"], dict[str, Any]]
"""Tensors, and values for JSON: all that is needed to resume a training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """The images of the cache.

    Attributes:
        label: On the CPU, int64 (N,), or uint8 (N, C) with several labels per image.
        train, valid: Positions in the cache, int64.
        classes: The classes' names.
        class_weights: float32 (C,), or None.
    """

    label: Tensor
    train: NDArray[np.int64]
    valid: NDArray[np.int64]
    classes: Sequence[str]
    class_weights: Tensor | None = None

    @property
    def multilabel(self) -> bool:
        """Whether images have several labels."""
        return self.label.dim() == 2


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a step: its rows in the global batch, and this worker's.

    Attributes:
        step: Number of the step, from the first epoch on.
        number: Number of the part in its step.
        is_last: Whether the step ends with it.
        rows: This worker's images, positions in the cache.
        first: Position of the first of them in the global batch.
        seen: How the layers see the global part.
        weight: What the loss of the global batch is divided by.
    """

    step: int
    number: int
    is_last: bool
    rows: NDArray[np.int64]
    first: int
    seen: GlobalRows
    weight: float


class Plan:
    """Which images each step of a training takes, on one worker."""

    def __init__(
        self, samples: Samples, config: FinetuneConfig, distributed: DistributedContext
    ) -> None:
        self._samples, self._config, self._distributed = samples, config, distributed
        self.steps_per_epoch = math.ceil(len(samples.train) / config.global_batch)
        self.steps = self.steps_per_epoch * config.total_epochs

    def parts(self, epoch: int, first_step: int) -> Iterator[Part]:
        """The parts of the steps of an epoch, from `first_step` (of the epoch) on."""
        seed, train = self._config.seed, self._samples.train
        rows = np.random.default_rng((seed, epoch)).permutation(train)
        steps = split_in_pairs(len(rows), self.steps_per_epoch)
        for number in range(first_step, self.steps_per_epoch):
            yield from self._parts_of(epoch * self.steps_per_epoch + number, rows[steps[number]])

    def _parts_of(self, step: int, batch: NDArray[np.int64]) -> Iterator[Part]:
        rank, workers = self._distributed.rank, self._distributed.world_size
        weight = float(len(batch))
        weights = self._samples.class_weights
        if weights is not None and not self._samples.multilabel:
            weight = float(weights[self._samples.label[batch]].sum())
        count = math.ceil(len(batch) / (self._config.micro_batch or len(batch)))
        count = max(1, min(count, len(batch) // (2 * workers)))
        pieces = split_in_pairs(len(batch), count)
        for number, piece in enumerate(pieces):
            own = split_in_pairs(piece.stop - piece.start, workers)[rank]
            first = piece.start + own.start
            seen = GlobalRows(
                (self._config.seed, step, number),
                own.start,
                own.stop - own.start,
                piece.stop - piece.start,
                workers,
            )
            rows = batch[first : piece.start + own.stop]
            yield Part(step, number, number == count - 1, rows, first, seen, weight)


class Finetuning:
    """A fine-tuning on one worker.

    Attributes:
        step: Number of steps that are done.
        history: Metrics of each finished epoch.
        kept: The epoch whose weights are kept: the last, or the best so far.
    """

    def __init__(
        self,
        tuned: FinetuneNetwork,
        samples: Samples,
        batches: PixelBatches,
        config: FinetuneConfig,
        augment: AugmentConfig,
        distributed: DistributedContext = DistributedContext(),
        device: str = "cpu",
    ) -> None:
        import torch

        self.tuned, self.samples, self.config = tuned, samples, config
        self._batches, self._augment, self._distributed = batches, augment, distributed
        self._device = torch.device(device)
        self.plan = Plan(samples, config, distributed)
        self._groups = network.prepare(tuned, config)
        network.set_training(tuned, config)
        self._is_random = global_batch.has_random_layers(tuned.module)
        self._is_synced = distributed.world_size > 1 and global_batch.trains_batch_norms(
            tuned.module
        )
        self._dtype = training_config.matmul_dtype(config.precision, self._device)
        self._optimizer = self._make_optimizer()
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=self._dtype is torch.float16)
        self._model: Any = tuned.module
        if distributed.world_size > 1:
            self._model = torch.nn.parallel.DistributedDataParallel(
                tuned.module, broadcast_buffers=False
            )
        self.step, self.history, self.kept = 0, list[dict[str, float]](), -1
        # Of the epoch: the summed loss and weight.
        self._sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        tensors = network.trained_float_tensors(tuned)
        self._ema = {n: t.clone() for n, t in tensors.items()} if config.ema else {}
        self._best: dict[str, Tensor] = {}

    def _make_optimizer(self) -> torch.optim.Optimizer:
        import torch

        groups = [
            {"params": one.parameters, "lr": one.lr, "weight_decay": one.weight_decay}
            for one in self._groups
        ]
        if self.config.optimizer == "sgd":
            return torch.optim.SGD(groups, momentum=self.config.momentum)
        return torch.optim.AdamW(groups)

    # -------------------------------------------------------------------------- training

    @property
    def epoch(self) -> int:
        """Number of the epoch that the next step belongs to."""
        return self.step // self.plan.steps_per_epoch

    @property
    def finished(self) -> bool:
        """Whether all steps are done, and the last epoch is validated."""
        return len(self.history) == self.config.total_epochs

    def train(self, after_step: Callable[[Finetuning], None]) -> None:
        """Train until the end of the epoch, and validate; `after_step` is called after each step
        and after the validation.
        """
        epoch = len(self.history)
        done = self.step - epoch * self.plan.steps_per_epoch
        for part, pixels in self.batches(epoch, done):
            self.train_part(part, pixels)
            if part.is_last:
                self.step += 1
                after_step(self)
        self._end_epoch(epoch)
        after_step(self)

    def batches(self, epoch: int, first_step: int) -> Iterator[tuple[Part, Tensor]]:
        """The parts of an epoch from one of its steps on, with their augmented pixels."""
        parts = list(self.plan.parts(epoch, first_step))
        pixels = self._batches.augmented(epoch, [part.rows for part in parts])
        yield from zip(parts, pixels, strict=True)

    def train_part(self, part: Part, pixels: Tensor, factor: float | None = None) -> None:
        """Add the gradients of a part; with the last part of a step, update the weights.

        factor: of the peak learning rates; None: that of the schedule.
        """
        import torch

        label = self.samples.label[part.rows].to(self._device)
        smoothing = self.config.smoothing
        target = soft_targets(label, len(self.samples.classes), smoothing)
        pixels, target = mix(pixels, target, self._augment, part.step, part.first)
        synced = part.is_last or self._distributed.world_size == 1
        with nullcontext() if synced else self._model.no_sync():
            with self._seeing(part), self._autocast():
                logit = self._model(pixels)
            loss = self._loss_sum(logit, target) / part.weight
            scaled = self._scaler.scale(loss * self._distributed.world_size)  # DDP averages
            scaled.backward()  # type: ignore[no-untyped-call]
        self._sums[0] += loss.detach().double() * part.weight
        if part.is_last:
            self._sums[1] += part.weight if self._distributed.rank == 0 else 0.0
            if factor is None:
                progress = part.step / self.plan.steps
                factor = schedule.lr_factor(progress, self.config, self.config.total_epochs)
            self._update(factor)
            with torch.no_grad():
                self._update_average(part.step)

    def _seeing(self, part: Part) -> AbstractContextManager[Any]:
        """The context in which layers see the global batch, if some of them have to."""
        is_needed = self._is_random or self._is_synced
        return global_batch.seen_by_layers(part.seen) if is_needed else nullcontext()

    def _autocast(self) -> AbstractContextManager[Any]:
        import torch

        return torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None)

    def _loss_sum(self, logit_BC: Tensor, target_BC: Tensor) -> Tensor:
        """The loss summed over rows: cross entropy, or the mean over labels of binary ones."""
        from torch.nn import functional

        weights = self.samples.class_weights
        weights = None if weights is None else weights.to(logit_BC.device)
        if self.samples.multilabel:
            loss = functional.binary_cross_entropy_with_logits(
                logit_BC, target_BC, pos_weight=weights, reduction="none"
            )
            return loss.mean(1).sum()
        if weights is not None:
            target_BC = target_BC * weights
        return -(target_BC * logit_BC.log_softmax(1)).sum()

    def _update(self, factor: float) -> None:
        """One step of the optimizer along the gradients, at `factor` of the peak rates."""
        import torch

        for settings, group in zip(self._optimizer.param_groups, self._groups, strict=True):
            settings["lr"] = group.lr * factor
        self._scaler.unscale_(self._optimizer)
        if self.config.clip:
            parameters = [p for group in self._groups for p in group.parameters]
            torch.nn.utils.clip_grad_norm_(parameters, self.config.clip)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)

    def _update_average(self, step: int) -> None:
        if not self._ema:
            return
        decay = min(self.config.ema, (1 + step) / (EMA_WARMUP + step))
        for name, tensor in network.trained_float_tensors(self.tuned).items():
            self._ema[name].lerp_(tensor, 1 - decay)

    def take_loss(self) -> float:
        """The mean loss of the images since the last call, over all workers."""
        loss, weight = self._all_reduce(self._sums).tolist()
        self._sums.zero_()
        return float(loss / weight)

    def rate_factor(self) -> float:
        """The learning rate of the next step as a factor of its peak."""
        progress = min(self.step, self.plan.steps - 1) / self.plan.steps
        return schedule.lr_factor(progress, self.config, self.config.total_epochs)

    def _end_epoch(self, epoch: int) -> None:
        line = {"epoch": epoch, "train_loss": self.take_loss()} | self.validate()
        self.history.append(line)
        best = self.config.best
        sign = -1 if best == "valid_loss" else 1
        values = [sign * one[best] if best in one else 0.0 for one in self.history]
        if best == "last" or values[-1] > max(values[:-1], default=-math.inf) or self.kept < 0:
            self.kept = epoch
            if best != "last":
                self._best = {name: t.clone() for name, t in self.result().items()}

    def _all_reduce(self, sums: Tensor) -> Tensor:
        """Sums over all workers, on the CPU."""
        import torch.distributed as dist

        if self._distributed.world_size == 1:
            return sums.cpu().clone()
        total = sums.to(self._device).clone()
        dist.all_reduce(total)
        return total.cpu()

    # ------------------------------------------------------------------------ validation

    def validate(self) -> dict[str, float]:
        """The metrics of the averaged weights, or of the weights, on the validation split (see
        `trainer.Training.validate`).
        """
        import torch

        classes, multilabel = len(self.samples.classes), self.samples.multilabel
        sums = torch.zeros(4 if multilabel else 2 + classes, dtype=torch.float64)
        for part, logit_CB in self.predict(self.samples.valid):
            label = self.samples.label[part][None]
            mask = torch.ones(1, len(part), dtype=torch.bool)
            sums += metrics.sum_over_rows(logit_CB[None, None], label, mask, multilabel=multilabel)[
                0, 0
            ]
        label = self.samples.label[self.samples.valid]
        return metrics.from_sums(self._all_reduce(sums), label, classes)

    def predict(self, rows: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """The clean view of this worker's share of some images under the averaged weights, or the
        weights: parts of the rows with their logits, float32 (C, b), on the CPU.
        """
        import torch

        own = {name: t.clone() for name, t in self.tuned.tensors().items()} if self._ema else {}
        self.tuned.load(self._ema)
        self.tuned.module.eval()
        rank, workers = self._distributed.rank, self._distributed.world_size
        count = len(rows)
        rows = rows[count * rank // workers : count * (rank + 1) // workers]
        size = max(1, min(self.config.micro_batch or count, self.config.global_batch) // workers)
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        for part, pixels in zip(parts, self._batches.clean(parts), strict=True):
            with torch.inference_mode(), self._autocast():
                logit_CB = self.tuned.module(pixels).float().cpu().mT
            yield part, logit_CB
        self.tuned.load(own)
        network.set_training(self.tuned, self.config)

    def result(self) -> dict[str, Tensor]:
        """The tensors of the network to keep, by name: the best or the last, averaged if wanted."""
        if self._best and self.finished:
            return self._best
        return self.tuned.tensors() | self._ema

    # ----------------------------------------------------------------------- checkpoints

    def save(self) -> State:
        """All that `load` needs; every worker calls it, and what rank 0 gets counts."""
        import torch

        sums = self._all_reduce(self._sums)
        tensors = {f"network.{name}": t for name, t in self.tuned.tensors().items()}
        for kind, copies in (("ema", self._ema), ("best", self._best)):
            tensors |= {f"{kind}.{name}": t for name, t in copies.items()}
        for number, group in enumerate(self._groups):
            for name, parameter in zip(group.names, group.parameters, strict=True):
                for kind, value in self._optimizer.state[parameter].items():
                    if isinstance(value, torch.Tensor):
                        tensors[f"optimizer.{number}.{kind}.{name}"] = value
        facts: dict[str, Any] = {
            "step": self.step,
            "history": self.history,
            "kept": self.kept,
            "sums": sums.tolist(),
            "scaler": self._scaler.state_dict(),
        }
        return tensors, facts

    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Resume from what `save` returned, on any number of workers."""
        import torch

        self.step, self.history = facts["step"], [dict(one) for one in facts["history"]]
        self.kept = facts["kept"]
        self._sums.copy_(torch.tensor(facts["sums"], dtype=torch.float64))
        if self._distributed.rank:
            self._sums.zero_()
        if facts["scaler"]:
            self._scaler.load_state_dict(facts["scaler"])
        self.tuned.load(_with_prefix(tensors, "network."))
        for name, tensor in _with_prefix(tensors, "ema.").items():
            self._ema[name].copy_(tensor)
        self._best = {
            name: tensor.to(self._device) for name, tensor in _with_prefix(tensors, "best.").items()
        }
        for number, group in enumerate(self._groups):
            for name, parameter in zip(group.names, group.parameters, strict=True):
                state = self._optimizer.state[parameter]
                for kind in ("step", "exp_avg", "exp_avg_sq", "momentum_buffer"):
                    key = f"optimizer.{number}.{kind}.{name}"
                    if key in tensors:
                        value = tensors[key].clone()
                        state[kind] = value if kind == "step" else value.to(self._device)


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


@dataclass(slots=True)
class Clock:
    """Tells when the next checkpoint or progress report is due."""

    seconds: float
    _last: float = field(default_factory=monotonic)

    def is_due(self) -> bool:
        """Whether `seconds` have passed since the last call that said so."""
        if monotonic() - self._last < self.seconds:
            return False
        self._last = monotonic()
        return True
