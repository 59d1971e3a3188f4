"""How a head is trained: the flags, and what `auto` stands for."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, cast

from arrowhead.errors import ConfigError
from arrowhead.training import schedule
from arrowhead.training.optimizer_config import DescentConfig

if TYPE_CHECKING:
    import torch


MIN_STEPS = 400  # of --epochs auto: see bench/heads_accuracy.py
MIN_EPOCHS, MAX_EPOCHS = 5, 400


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
            schedule.must_fit(self, self.epochs)
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
    steps = len(batch_ends(max(images, 1), config.batch_size))
    epochs = min(max(MIN_EPOCHS, math.ceil(MIN_STEPS / steps)), MAX_EPOCHS)
    return replace(config, epochs=schedule.whole_cycles(config, epochs))


def steps_of(config: TrainConfig, images: int) -> int:
    """How many steps a training on so many images takes."""
    return len(batch_ends(max(images, 1), config.batch_size)) * resolve(config, images).total_epochs


def batch_ends(rows: int, size: int) -> list[int]:
    """Where batches of `size` rows end; the last one is never a single row."""
    ends = [*range(size, rows, size), rows]
    if len(ends) > 1 and ends[-1] - ends[-2] == 1:
        del ends[-2]
    return ends


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
    return replace(config, warmup=schedule.warm_up_of(config), precision=cast(Any, name))
