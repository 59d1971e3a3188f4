"""Features to a trained head.

    float16 (n, D), labels     one split's rows, on the device
      -> batches               index-selects; the order comes from (seed, epoch)
      -> step                  one move downhill; a Tally of sums
      -> validate              every validation row once
      -> Trained               weights, and one line of figures per epoch

With several workers every rank takes its slice of every global batch, and gradients are
averaged by DistributedDataParallel: 1 and N workers walk the same path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from arrowhead import ConfigError, DataError, plan
from arrowhead.metrics import Tally

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How a head is trained on features."""

    head: Literal["linear", "lesson"] = "linear"
    """linear; or the lesson's: batch norm, dropout, linear to 512, ReLU, once more, linear."""
    epochs: int = 20
    """Passes over the training split."""
    rate: float | Literal["auto"] = "auto"
    """Learning rate at its highest; auto asks the LR finder."""
    schedule: Literal["one-cycle", "constant"] = "one-cycle"
    """one-cycle rises to the rate for a quarter of all steps, then falls by a cosine to nothing."""
    batch_size: int = 64
    """Rows per step, over all workers together."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    dropout: float = 0.0
    """Share of inputs dropped before the last layer, 0 up to 1 (the lesson's head: half of it
    before its first)."""
    smoothing: float = 0.0
    """Label smoothing, 0 up to 1."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on GPUs with bf16 units, fp16 on older ones, fp32 on CPUs."""
    seed: int = 0
    """Of the head's first weights, the order of rows, and dropout."""

    def __post_init__(self) -> None:
        for knob, value, fine, wanted in (
            ("epochs", self.epochs, self.epochs >= 1, "1 or more"),
            ("batch-size", self.batch_size, self.batch_size >= 2, "2 or more"),
            ("rate", self.rate, self.rate == "auto" or 0 < self.rate < 1e3, "auto, or above 0"),
            ("weight-decay", self.weight_decay, self.weight_decay >= 0, "0 or more"),
            ("dropout", self.dropout, 0 <= self.dropout < 1, "from 0 up to 1"),
            ("smoothing", self.smoothing, 0 <= self.smoothing < 1, "from 0 up to 1"),
            ("seed", self.seed, self.seed >= 0, "0 or more"),
        ):
            if not fine:
                raise ConfigError(f"--{knob} is {value}.", f"{wanted}.", f"give another --{knob}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """What a head learns from; tensors on one device. n training and m validation rows.

    train_feature: float16 (n, V, D); train_label: int64 (n,); valid_feature: float16 (m, D);
    valid_label: int64 (m,); classes: C; mean, deviation: float32 (D,), of clean training features.
    """

    train_feature: torch.Tensor
    train_label: torch.Tensor
    valid_feature: torch.Tensor
    valid_label: torch.Tensor
    classes: int
    mean: torch.Tensor
    deviation: torch.Tensor

    @staticmethod
    def of(
        train: tuple[NDArray[np.float16], NDArray[np.int64]],
        valid: tuple[NDArray[np.float16], NDArray[np.int64]],
        classes: list[str],
        device: str = "cpu",
    ) -> Data:
        """From (feature (n, V, D), label (n,)) per split; DataError if a class is absent."""
        import torch

        for split, (_, label) in (("training", train), ("validation", valid)):
            absent = sorted(set(range(len(classes))) - set(label.tolist()))
            if len(label) == 0 or (absent and split == "training"):
                raise DataError(
                    f"The {split} split has no readable image"
                    + (f" of {', '.join(classes[i] for i in absent)}." if len(label) else "."),
                    "at least one of every class to learn from, and some to check with.",
                    "add images, or hold out another share (--valid-share).",
                )
        tensors = [torch.from_numpy(array).to(device) for pair in (train, valid) for array in pair]
        mean, deviation = spread(tensors[0][:, 0])
        return Data(
            mean=mean,
            deviation=deviation,
            train_feature=tensors[0],
            train_label=tensors[1],
            valid_feature=tensors[2][:, 0],
            valid_label=tensors[3],
            classes=len(classes),
        )


def spread(feature_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each column, float32 (D,); a column that never varies counts as 1."""
    import torch

    sums = torch.zeros(2, feature_ND.shape[1], dtype=torch.float64, device=feature_ND.device)
    for part in torch.split(feature_ND, 65536):
        sums[0] += part.double().sum(0)
    mean = sums[0] / len(feature_ND)
    for part in torch.split(
        feature_ND, 65536
    ):  # a second pass: squares of large means would cancel
        sums[1] += (part.double() - mean).square().sum(0)
    deviation = (sums[1] / len(feature_ND)).sqrt()
    deviation[deviation == 0] = 1
    return mean.float(), deviation.float()


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """A head's weights by name (numpy), and one dict of figures per epoch."""

    state: dict[str, NDArray[Any]]
    epochs: list[dict[str, float]]


@dataclass(frozen=True, slots=True)
class Team:
    """This worker's rank among `world` workers that train one head together."""

    rank: int = 0
    world: int = 1


# ---------------------------------------------------------------------------- the step


def step(
    head: nn.Module,
    feature_BD: torch.Tensor,
    label_B: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    *,
    share: float = 1.0,
    dtype: torch.dtype | None = None,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """Move the head once, downhill on one batch.

    share: what the mean over these rows weighs in the gradient; with W workers and b of the
    global B rows here it is W b / B, since DDP divides by W. dtype: of autocast, None for fp32.
    Returns float64 (3,): seen, correct, nats, still on the device.
    """
    import torch
    import torch.nn.functional as F

    with torch.autocast(feature_BD.device.type, dtype, enabled=dtype is not None):
        logit_BC = head(feature_BD.float()).float()
    nats_B = F.cross_entropy(logit_BC, label_B, reduction="none", label_smoothing=smoothing)
    # A worker without rows still takes part in the exchange of gradients.
    loss = nats_B.mean() * share if len(label_B) else logit_BC.sum() * 0
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return tally_of(logit_BC.detach(), label_B, nats_B.detach())


def tally_of(logit: torch.Tensor, label: torch.Tensor, nats: torch.Tensor) -> torch.Tensor:
    """float64 (3,) on the device: rows seen, rows right, nats of loss."""
    import torch

    seen = torch.full((), len(label), dtype=torch.float64, device=label.device)
    return torch.stack([seen, (logit.argmax(1) == label).sum().double(), nats.double().sum()])


def validate(head: nn.Module, feature_ND: torch.Tensor, label_N: torch.Tensor, team: Team) -> Tally:
    """Loss and accuracy of the head over all rows; each worker counts its own share once."""
    import torch
    import torch.nn.functional as F

    mine = plan.share(len(label_N), team.rank, team.world)
    head.eval()
    total = torch.zeros(3, dtype=torch.float64, device=label_N.device)
    with torch.inference_mode():
        for at in range(mine.start, mine.stop, 4096):
            rows = slice(at, min(at + 4096, mine.stop))
            logit, label = head(feature_ND[rows].float()), label_N[rows]
            total += tally_of(logit, label, F.cross_entropy(logit, label, reduction="none"))
    head.train()
    return together(total, team)


def together(sums: torch.Tensor, team: Team) -> Tally:
    """The tally of all workers: their sums (see `tally_of`) added up."""
    import torch.distributed as dist

    if team.world > 1:
        dist.all_reduce(sums)
    return Tally(*sums.tolist())


# ---------------------------------------------------------------------------- schedules


def rate_at(share: float, config: TrainConfig, peak: float) -> float:
    """The learning rate when `share` (0 to 1) of all steps is done.

    one-cycle (Smith & Topin, arXiv:1708.07120): here a cosine both up and down, from peak/25.
    """
    if config.schedule == "constant":
        return peak
    warm = 0.25
    if share < warm:
        return peak * (1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * share / warm)) / 2)
    return peak * (1 + math.cos(math.pi * (share - warm) / (1 - warm))) / 2


def batches(rows: int, size: int, seed: int, epoch: int) -> Iterator[NDArray[np.int64]]:
    """All rows once, in an order drawn from (seed, epoch), `size` at a time.

    One row left over joins the batch before it: batch norm needs two.
    """
    order = np.random.default_rng((seed, epoch)).permutation(rows)
    starts = list(range(0, rows, size))
    if len(starts) > 1 and rows - starts[-1] == 1:
        starts.pop()
    for start, stop in zip(starts, [*starts[1:], rows], strict=True):
        yield order[start:stop]


def view_of(rows: NDArray[np.int64], views: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Which view of each row this epoch uses: a function of (seed, epoch, row)."""
    if views == 1:
        return np.zeros(len(rows), np.int64)
    drawn = np.random.default_rng((seed, epoch, views)).integers(views, size=int(rows.max()) + 1)
    return drawn[rows]


# ------------------------------------------------------------------------------ the loop


class Trainer:
    """A head with its optimizer on one device: what the loop and the LR finder share."""

    def __init__(self, data: Data, config: TrainConfig, team: Team) -> None:
        import torch

        from arrowhead import heads

        self.data, self.config, self.team = data, config, team
        device = data.train_feature.device
        width = data.train_feature.shape[2]
        self.head: nn.Module = heads.make(
            config.head, width, data.classes, dropout=config.dropout, seed=config.seed
        ).to(device)
        heads.standardize(self.head, data.mean, data.deviation)
        self.model: nn.Module = self.head
        if team.world > 1:
            self.model = torch.nn.parallel.DistributedDataParallel(self.head)
        self.optimizer = torch.optim.AdamW(
            self.head.parameters(), lr=1e-3, weight_decay=config.weight_decay
        )
        self.dtype = precision(config.precision, device)
        scaled = self.dtype is torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        self.done = 0

    def move(self, rows: NDArray[np.int64], views: NDArray[np.int64], rate: float) -> torch.Tensor:
        """One step on these rows of the training split (all workers together) at this rate."""
        import torch

        from arrowhead import heads

        mine = plan.share(len(rows), self.team.rank, self.team.world)
        heads.place(self.head, heads.Place(self.done, mine.start, len(rows)))
        at = torch.from_numpy(rows[mine.start : mine.stop])
        view = torch.from_numpy(views[mine.start : mine.stop])
        device = self.data.train_label.device
        at, view = at.to(device), view.to(device)
        flat = self.data.train_feature.flatten(0, 1)
        feature_BD = flat.index_select(0, at * self.data.train_feature.shape[1] + view)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.done += 1
        return step(
            self.model,
            feature_BD,
            self.data.train_label.index_select(0, at),
            self.optimizer,
            self.scaler,
            share=len(mine) * self.team.world / len(rows),
            dtype=self.dtype,
            smoothing=self.config.smoothing,
        )


def precision(asked: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, None for fp32: bf16 only where the GPU has it in silicon."""
    import torch

    if asked == "auto":
        if device.type != "cuda":
            return None  # a head is too small for autocast to pay on a CPU
        has_units = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if has_units else torch.float16
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[asked]


def train(
    data: Data,
    config: TrainConfig,
    rate: float,
    team: Team = Team(),
    record: Callable[[dict[str, float]], None] = lambda line: None,
) -> Trained:
    """Train one head for `config.epochs`; `record` gets each epoch's figures as they come."""
    import torch

    rows, views = data.train_feature.shape[:2]
    trainer = Trainer(data, config, team)
    lines: list[dict[str, float]] = []
    for epoch in range(config.epochs):
        total = torch.zeros(3, dtype=torch.float64, device=data.train_label.device)
        todo = list(batches(rows, config.batch_size, config.seed, epoch))
        for number, batch in enumerate(todo):
            share = (epoch + number / len(todo)) / config.epochs
            view = view_of(batch, views, config.seed, epoch)
            total += trainer.move(batch, view, rate_at(share, config, rate))
        trained = together(total, team)
        valid = validate(trainer.head, data.valid_feature, data.valid_label, team)
        line = {
            "epoch": epoch,
            "train_loss": trained.loss,
            "valid_loss": valid.loss,
            "accuracy": valid.accuracy,
        }
        lines.append(line)
        record(line)
    state = {name: t.detach().cpu().numpy() for name, t in trainer.head.state_dict().items()}
    return Trained(state=state, epochs=lines)
