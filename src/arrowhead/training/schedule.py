"""Learning rate schedules: the rate at each step, as a factor of the peak learning rate.

PyTorch's schedulers step through a state; here the factor is a pure function of the share of
training that is done, so a checkpoint does not hold a scheduler.
"""

from __future__ import annotations

import math

from arrowhead.errors import ConfigError
from arrowhead.training.optimizer_config import OptimizerConfig

START_FACTOR = 1 / 25  # a warm-up starts at this factor of the peak rate


def warmup_share(config: OptimizerConfig) -> float:
    """Return the share of all steps that warm up, with the schedule's default if none is set."""
    if config.warmup is not None:
        return config.warmup
    return 0.25 if config.schedule == "one-cycle" else 0.0


def lr_factor(progress: float, config: OptimizerConfig, epochs: int) -> float:
    """Return the learning rate as a factor of its peak.

    one-cycle (Smith & Topin, arXiv:1708.07120) rises and falls along a cosine, from 1/25 of the
    peak. cosine with restarts is SGDR (Loshchilov & Hutter, arXiv:1608.03983). The warm-up before
    constant or cosine is linear, from 1/25 too.

    Args:
        progress: The share of the training that is done, from 0 to 1.
        config: The schedule, its warm-up and its cycles.
        epochs: The number of epochs of the whole training.
    """
    warmup = warmup_share(config)
    warmup_done = min(progress / warmup, 1.0) if warmup else 1.0
    if config.schedule == "one-cycle":
        if warmup_done < 1:
            rise = (1 - math.cos(math.pi * warmup_done)) / 2
            return START_FACTOR + (1 - START_FACTOR) * rise
        return (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2
    warmup_factor = START_FACTOR + (1 - START_FACTOR) * warmup_done
    if config.schedule == "constant":
        return warmup_factor
    epoch, cycle = progress * epochs, float(config.cycle_len or epochs)
    while epoch >= cycle - 1e-9 and config.cycle_len:
        epoch, cycle = epoch - cycle, cycle * config.cycle_mult
    return warmup_factor * (1 + math.cos(math.pi * min(max(epoch, 0.0) / cycle, 1.0))) / 2


def check_cycles(config: OptimizerConfig, epochs: int) -> None:
    """Raise ConfigError if the last cosine would be cut off."""
    if not config.cycle_len:
        return
    ends = _cycle_ends(config.cycle_len, config.cycle_mult, epochs)
    if ends[-1] != epochs:
        near = " or ".join(str(end) for end in ends[-2:])
        raise ConfigError(
            f"{epochs} epochs cut the last cosine off: cycles end after epoch"
            f" {', '.join(map(str, ends))}.",
            "a number of epochs at which a cycle ends and the learning rate is lowest.",
            f"give --epochs {near}, or another --cycle-len.",
        )


def round_up_to_cycle(config: OptimizerConfig, epochs: int) -> int:
    """Return the first number of epochs, from `epochs` on, at which a cycle ends."""
    if not config.cycle_len:
        return epochs
    return _cycle_ends(config.cycle_len, config.cycle_mult, epochs)[-1]


def _cycle_ends(cycle_len: int, cycle_mult: int, epochs: int) -> list[int]:
    """Return the epochs after which cycles end, up to the first one at `epochs` or later."""
    ends = [cycle_len]
    while ends[-1] < epochs:
        ends.append(ends[-1] + cycle_len * cycle_mult ** len(ends))
    return ends
