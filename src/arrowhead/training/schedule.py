"""The learning rate at each step, as a factor of its highest."""

from __future__ import annotations

import math

from arrowhead.errors import ConfigError
from arrowhead.training.optimizer_config import DescentConfig


def warm_up_of(config: DescentConfig) -> float:
    """The share of all steps under a rising rate, the default included."""
    if config.warmup is not None:
        return config.warmup
    return 0.25 if config.schedule == "one-cycle" else 0.0


def factor(share: float, config: DescentConfig, epochs: int) -> float:
    """The learning rate, over its highest, when `share` (0 to 1) of `epochs` is done.

    one-cycle (Smith & Topin, arXiv:1708.07120): here a cosine both up and down, from 1/25. cosine
    with restarts: SGDR (Loshchilov & Hutter, arXiv:1608.03983). A warm-up before constant or
    cosine rises in a straight line, from 1/25 too.
    """
    warm = warm_up_of(config)
    risen = min(share / warm, 1.0) if warm else 1.0
    if config.schedule == "one-cycle":
        if risen < 1:
            return 1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * risen)) / 2
        return (1 + math.cos(math.pi * (share - warm) / (1 - warm))) / 2
    ramp = 1 / 25 + (1 - 1 / 25) * risen
    if config.schedule == "constant":
        return ramp
    done, cycle = share * epochs, float(config.cycle_len or epochs)
    while done >= cycle - 1e-9 and config.cycle_len:
        done, cycle = done - cycle, cycle * config.cycle_mult
    return ramp * (1 + math.cos(math.pi * min(max(done, 0.0) / cycle, 1.0))) / 2


def must_fit(config: DescentConfig, epochs: int) -> None:
    """ConfigError if the last cosine would be cut off."""
    if not config.cycle_len:
        return
    ends = _cycle_ends(config.cycle_len, config.cycle_mult, epochs)
    if ends[-1] != epochs:
        near = " or ".join(str(end) for end in ends[-2:])
        raise ConfigError(
            f"{epochs} epochs cut the last cosine off: cycles end after epoch"
            f" {', '.join(map(str, ends))}.",
            "epochs that end with a cycle, where the rate is lowest.",
            f"give --epochs {near}, or another --cycle-len.",
        )


def whole_cycles(config: DescentConfig, epochs: int) -> int:
    """The first number of epochs, from `epochs` on, that ends with a cycle."""
    if not config.cycle_len:
        return epochs
    return _cycle_ends(config.cycle_len, config.cycle_mult, epochs)[-1]


def _cycle_ends(first: int, factor: int, epochs: int) -> list[int]:
    """After which epochs cycles end, up to the first that is at `epochs` or later."""
    ends = [first]
    while ends[-1] < epochs:
        ends.append(ends[-1] + first * factor ** len(ends))
    return ends
