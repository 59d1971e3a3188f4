"""Settings of a head's training (each field is a flag), and what their `auto` stands for."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, cast

from arrowhead.errors import ConfigError
from arrowhead.training import schedule
from arrowhead.training.optimizer_config import OptimizerConfig

if TYPE_CHECKING:
    import torch


# What --epochs auto aims at; bench/heads_accuracy.py measures the choice.
MIN_STEPS = 400
MIN_EPOCHS, MAX_EPOCHS = 5, 400


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(OptimizerConfig):
    """How a head is trained on features."""

    head: Literal["auto", "logistic", "linear", "lesson"] = "auto"
    """logistic: logistic regression, a linear head solved to its exact optimum, with no learning
    rate; linear: a linear head trained by gradient descent; lesson: fast.ai's head (batch norm,
    dropout, linear to 512, ReLU, batch norm, dropout, linear). auto: logistic, or linear if you
    set an option of gradient descent (--epochs, --rate, --schedule …) or a grid, or if logistic
    would take too long."""
    l2: float | Literal["auto"] = "auto"
    """logistic: strength of the L2 penalty, 1/C in scikit-learn; auto chooses it by 5-fold
    cross-validation within the training split."""
    epochs: int | Literal["auto"] = "auto"
    """Passes over the training split; auto: as many as make enough steps, however few images there
    are."""
    rate: float | Literal["auto"] = "auto"
    """Peak learning rate; auto runs the LR finder."""
    batch_size: int = 64
    """Rows per step, over all workers together."""
    dropout: float = 0.0
    """Share of inputs dropped before the last layer, from 0 up to 1 (the lesson's head drops half
    of this share before its first layer)."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on GPUs with bf16 units, fp16 on older ones, fp32 on CPUs (where the lesson's head
    computes in float64, for the same result on any number of workers)."""
    seed: int = 0
    """Seed of the initial weights, the order of rows, and dropout."""
    best: Literal["last", "valid_loss", "accuracy", "balanced_accuracy", "f1", "f2"] = "last"
    """Which epoch's weights to keep: the last, or the best by this metric of the validation split
    (f1, f2: several labels per image)."""
    patience: int = 0
    """Epochs without an improvement of --best after which training stops early; 0: never."""
    checkpoint_seconds: float = 5.0
    """Seconds of training between checkpoints; 0: one after every epoch."""

    def __post_init__(self) -> None:
        OptimizerConfig.__post_init__(self)
        if self.epochs != "auto":
            schedule.check_cycles(self, self.epochs)
        for flag, value, valid, wanted in (
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
            if not valid:
                raise ConfigError(f"--{flag} is {value}.", f"{wanted}.", f"give another --{flag}.")
        if self.patience and self.best == "last":
            raise ConfigError(
                f"--patience {self.patience} has no metric to wait for: --best is last.",
                "a metric that should improve.",
                "add --best valid_loss or --best accuracy.",
            )
        self._check_head()

    def _check_head(self) -> None:
        """Raise ConfigError if a setting is given that the chosen head does not have."""
        changed = self.changed_descent_settings()
        if (
            self.checkpoint_seconds
            != TrainConfig.__dataclass_fields__["checkpoint_seconds"].default
        ):
            changed.append("checkpoint_seconds")
        if self.head == "logistic" and changed:
            flag = f"--{changed[0].replace('_', '-')}"
            raise ConfigError(
                f"{flag} {getattr(self, changed[0])} is a setting of gradient descent;"
                " --head logistic does not use it.",
                "--head logistic, or settings of gradient descent.",
                f"leave {flag} out, or add --head linear.",
            )
        if self.l2 != "auto" and (
            self.head not in ("auto", "logistic") or self.changed_descent_settings()
        ):
            raise ConfigError(
                f"--l2 {self.l2} is for --head logistic.",
                "--weight-decay, for a head trained by gradient descent.",
                "leave --l2 out, or add --head logistic.",
            )

    def changed_descent_settings(self) -> list[str]:
        """Return the names of gradient descent's settings that are not at their defaults."""
        return [
            one.name
            for one in fields(self)
            if one.name not in ("head", "l2", "class_weights", "seed")
            and getattr(self, one.name) != one.default
        ]

    def parameters(self) -> dict[str, Any]:
        """Return the settings that this head uses, by name, as a run and a bundle record them."""
        settings = asdict(self)
        if self.head != "logistic":
            del settings["l2"]
            return settings
        return {name: settings[name] for name in ("head", "l2", "class_weights", "seed")}

    @property
    def architecture(self) -> Literal["linear", "lesson"]:
        """The head's layers (see `heads.build_head`), however they are trained."""
        return "lesson" if self.head == "lesson" else "linear"

    @property
    def total_epochs(self) -> int:
        """`epochs` as a number; 1 for logistic regression.

        Raises:
            AssertionError: `epochs` is still auto (see `resolve_epochs`).
        """
        if self.head == "logistic":
            return 1
        if self.epochs == "auto":
            raise AssertionError("--epochs auto was not resolved")
        return self.epochs


def resolve_epochs(config: TrainConfig, images: int) -> TrainConfig:
    """Replace `--epochs auto` by a number of epochs for this many training images.

    The number gives MIN_STEPS steps, but is at least MIN_EPOCHS and at most MAX_EPOCHS. With
    --cycle-len it is rounded up to the end of a cycle.
    """
    if config.epochs != "auto" or config.head == "logistic":
        return config
    steps = len(batch_ends(max(images, 1), config.batch_size))
    epochs = min(max(MIN_EPOCHS, math.ceil(MIN_STEPS / steps)), MAX_EPOCHS)
    return replace(config, epochs=schedule.round_up_to_cycle(config, epochs))


def total_steps(config: TrainConfig, images: int) -> int:
    """Return the number of steps that a training on this many images takes."""
    steps = len(batch_ends(max(images, 1), config.batch_size))
    return steps * resolve_epochs(config, images).total_epochs


def batch_ends(rows: int, batch_size: int) -> list[int]:
    """Return where each batch ends. A single row left over joins the batch before it: batch norm
    needs two rows.
    """
    ends = [*range(batch_size, rows, batch_size), rows]
    if len(ends) > 1 and ends[-1] - ends[-2] == 1:
        del ends[-2]
    return ends


def matmul_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype of matrix products for `--precision` on a device; None means float32."""
    import torch

    if precision == "auto":
        if device.type != "cuda":
            return None  # a head is too small for lower precision to pay on a CPU
        has_bf16_units = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if has_bf16_units else torch.float16
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def resolve_defaults(config: TrainConfig, device: torch.device) -> TrainConfig:
    """Replace --warmup's default and `--precision auto` by what a training on the device uses."""
    if config.head == "logistic":
        return config
    dtype = matmul_dtype(config.precision, device)
    name = {"None": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}[str(dtype)]
    return replace(config, warmup=schedule.warmup_share(config), precision=cast(Any, name))
