"""Settings of the loss, the optimizer and the learning rate schedule; each field is a flag."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from arrowhead.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """Loss, optimizer and schedule."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw (Loshchilov & Hutter, arXiv:1711.05101); sgd, with --momentum."""
    weight_decay: float = 0.01
    """adamw: decoupled from the gradient; sgd: added to the gradient, as in PyTorch."""
    momentum: float = 0.9
    """Momentum of sgd, from 0 up to 1."""
    schedule: Literal["one-cycle", "constant", "cosine"] = "one-cycle"
    """one-cycle rises to --rate, then falls to 0 along a cosine. cosine falls to 0 and restarts
    every --cycle-len epochs (SGDR)."""
    warmup: float | None = None
    """Share of all steps with a rising learning rate, from 0 up to 1. Default: 0.25 for one-cycle,
    else 0."""
    cycle_len: int | None = None
    """Epochs of the first cosine. Default: all epochs."""
    cycle_mult: int = 1
    """Each cosine is this many times as long as the one before: --cycle-len 1 --cycle-mult 2 gives
    cosines of 1, 2, 4 … epochs."""
    smoothing: float = 0.0
    """Label smoothing, from 0 up to 1 (Szegedy et al., arXiv:1512.00567, section 7)."""
    class_weights: Literal["auto", "none", "balanced", "validation"] = "auto"
    """balanced: a rare class weighs as much as a common one (with several labels per image: a
    label's presence weighs as much as its absence). validation: weight the training images as if
    classes were as frequent as in the validation split. auto: validation where the two splits
    clearly differ, else none."""

    def __post_init__(self) -> None:
        warmup = 0.0 if self.warmup is None else self.warmup
        for flag, value, valid, wanted in (
            ("weight-decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "0 or more"),
            ("momentum", self.momentum, 0 <= self.momentum < 1, "from 0 up to 1"),
            ("warmup", warmup, 0 <= warmup < 1, "from 0 up to 1"),
            ("smoothing", self.smoothing, 0 <= self.smoothing < 1, "from 0 up to 1"),
            (
                "cycle-len",
                self.cycle_len,
                self.cycle_len is None or self.cycle_len >= 1,
                "1 or more",
            ),
            ("cycle-mult", self.cycle_mult, self.cycle_mult >= 1, "1 or more"),
        ):
            if not valid:
                raise ConfigError(f"--{flag} is {value}.", f"{wanted}.", f"give another --{flag}.")
        if self.momentum != 0.9 and self.optimizer != "sgd":
            raise ConfigError(
                f"--momentum {self.momentum:g} goes with --optimizer sgd, not {self.optimizer}.",
                "sgd, or no --momentum.",
                "add --optimizer sgd, or leave --momentum out.",
            )
        if self.cycle_mult > 1 and not self.cycle_len:
            raise ConfigError(
                f"--cycle-mult {self.cycle_mult} has no --cycle-len.",
                "the length of the first cosine.",
                "add e.g. --schedule cosine --cycle-len 1.",
            )
        if self.cycle_len and self.schedule != "cosine":
            raise ConfigError(
                f"--cycle-len {self.cycle_len} goes with --schedule cosine, not {self.schedule}.",
                "--schedule cosine, or no restarts.",
                "add --schedule cosine, or leave --cycle-len out.",
            )
