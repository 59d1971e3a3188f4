"""The way downhill: losses with their slopes, the rate at each step, optimizers for many heads.

    logits (L, G, C, B), labels  -> nats, and the loss's slope at the logits, in closed form
    share of the steps done      -> the rate, as a factor of its highest
    slope at every weight        -> Optimizer.move: AdamW or SGD, each head at its own rate

Letters: L lanes of G heads, C classes, B rows, P weights of all heads together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from arrowhead import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from arrowhead.heads import Stack


@dataclass(frozen=True, kw_only=True, slots=True)
class DescentConfig:
    """Loss, optimizer and schedule."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw (Loshchilov & Hutter, arXiv:1711.05101); sgd, with --momentum."""
    weight_decay: float = 0.01
    """adamw: decoupled; sgd: added to the gradient, as torch does."""
    momentum: float = 0.9
    """Of sgd, 0 up to 1."""
    schedule: Literal["one-cycle", "constant", "cosine"] = "one-cycle"
    """one-cycle rises to the rate, then falls by a cosine to nothing. cosine falls to nothing and
    restarts every --cycle-len epochs (SGDR)."""
    warmup: float | None = None
    """Share of all steps under a rising rate, 0 up to 1. Default: 0.25 for one-cycle, else 0."""
    cycle_len: int | None = None
    """Epochs of the first cosine; all of them by default."""
    cycle_mult: int = 1
    """How many times as long each cosine is as the one before: with --cycle-len 1 --cycle-mult 2,
    1, 2, 4 … epochs."""
    smoothing: float = 0.0
    """Label smoothing, 0 up to 1 (Szegedy et al., arXiv:1512.00567, section 7)."""
    class_weights: Literal["auto", "none", "balanced", "validation"] = "auto"
    """balanced: a rare class weighs as much as a common one (several labels: a label's presence as
    much as its absence). validation: as if classes were as frequent in training as they are in
    validation. auto: validation where the two clearly differ, else none."""

    def __post_init__(self) -> None:
        warmup = 0.0 if self.warmup is None else self.warmup
        for knob, value, fine, wanted in (
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
            if not fine:
                raise ConfigError(f"--{knob} is {value}.", f"{wanted}.", f"give another --{knob}.")
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
                "restarts, or another schedule.",
                "add --schedule cosine, or leave --cycle-len out.",
            )


# ------------------------------------------------------------------------------ schedules


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


# --------------------------------------------------------------------------------- losses


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """What is minimized. classes: float32 (C,), or (L, C), one for each lane: weights of the
    classes, or None.
    """

    multi: bool
    smoothing: float = 0.0
    classes: Tensor | None = None

    def weight(self, label: Tensor) -> Tensor | None:
        """What each row weighs in the mean, float32 (…,) as the labels; None: all the same."""
        if self.multi or self.classes is None:
            return None
        return self.classes[label] if self.classes.dim() == 1 else self.classes.gather(1, label)

    def of(
        self, logit_LGCB: Tensor, label: Tensor, real_LB: Tensor | None, total: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Nats float32 (L, G), summed over the rows, and the slope float32 (L, G, C, B) of their
        sum over `total` (a number, or (L,)). Overwrites the logits.

        label: int64 (L, B), or with several labels per image float32 (L, C, B). real_LB: bool,
        the rows that count.
        """
        import torch

        with torch.no_grad():
            made = self._sigmoid if self.multi else self._softmax
            nats_LGB, slope_LGCB = made(logit_LGCB, label)
            if real_LB is not None:
                nats_LGB = nats_LGB.mul(real_LB[:, None])
                slope_LGCB = slope_LGCB.mul_(real_LB[:, None, None])
            if isinstance(total, float):
                return nats_LGB.sum(2), slope_LGCB.mul_(1 / total)
            return nats_LGB.sum(2), slope_LGCB.div_(total.view(-1, 1, 1, 1))

    def _softmax(self, logit: Tensor, label_LB: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy as torch's, class weights and smoothing too."""
        lanes, each, classes, rows = logit.shape
        index = label_LB[:, None, None].expand(lanes, each, 1, rows)
        log = logit.log_softmax(2)
        nats = log.gather(2, index)[:, :, 0].neg_()
        if self.classes is None and not self.smoothing:
            slope = log.exp_()
            return nats, slope.scatter_add_(2, index, slope.new_full((), -1.0).expand_as(index))
        weights = log.new_ones(classes) if self.classes is None else self.classes.to(log.dtype)
        weights_LC, s = weights.view(-1, classes).expand(lanes, -1), self.smoothing
        mine_LB = weights_LC.gather(1, label_LB.expand(lanes, -1))
        even = (weights_LC * (s / classes)).view(lanes, 1, -1, 1)
        hard = mine_LB[:, None] * (1 - s)
        nats = nats * hard - (log * even).sum(2)
        slope = log.exp_().mul_(hard[:, :, None] + even.sum(2, True)).sub_(even)
        return nats, slope.scatter_add_(2, index, -hard[:, :, None].expand_as(index))

    def _sigmoid(self, logit: Tensor, label_LCB: Tensor) -> tuple[Tensor, Tensor]:
        """Binary cross entropy of each label, the mean over labels."""
        from torch.nn.functional import softplus

        wanted = label_LCB[:, None] * (1 - self.smoothing) + self.smoothing / 2
        gain = (
            wanted if self.classes is None else wanted * self.classes.view(-1, 1, logit.shape[2], 1)
        )
        nats = (gain * softplus(-logit) + (1 - wanted) * softplus(logit)).mean(2)
        slope = (1 - wanted) * logit.sigmoid() - gain * (-logit).sigmoid()
        return nats, slope.div_(logit.shape[2])


def balance(label: Tensor, classes: int) -> Tensor:
    """Weights of the classes that make rare ones count as common ones do, float32 (C,).

    label int64 (n,): n / (C count), as scikit-learn's `balanced`. uint8 (n, C): absent / present.
    """
    import torch

    if label.dim() == 1:
        counts = torch.bincount(label, minlength=classes).double()
        return (len(label) / (classes * counts.clamp(min=1))).float()
    present = label.double().sum(0)
    return ((len(label) - present) / present.clamp(min=1)).clamp(1e-3, 1e3).float()


def weights_as(label: Tensor, wanted: Tensor, classes: int) -> Tensor:
    """Weights (C,) under which labels int64 (n,) are as frequent as in `wanted` int64 (m,).

    Rare classes of `wanted` are drawn to their share of `label`, as if C more of its images had
    been seen, so none comes to nothing.
    """
    import torch

    here = torch.bincount(label, minlength=classes).double()
    share = here / here.sum()
    there = torch.bincount(wanted, minlength=classes).double()
    mixed = (there + classes * share) / (there.sum() + classes)
    return (mixed / share.clamp(min=1e-12)).float()


def differ(label: Tensor, wanted: Tensor, classes: int) -> bool:
    """Whether class shares of two sets of labels clearly differ: a chi-squared test at about 1 in
    2,000 (Wilson & Hilferty's normal approximation).
    """
    import torch

    counts = [torch.bincount(one, minlength=classes).double() for one in (label, wanted)]
    both = counts[0] + counts[1]
    there, freedom = both > 0, int((both > 0).sum()) - 1
    if freedom < 1 or not counts[0].sum() or not counts[1].sum():
        return False
    total = 0.0
    for one in counts:
        expected = both[there] * one.sum() / both.sum()
        total += float(((one[there] - expected).square() / expected).sum())
    spread = 2 / (9 * freedom)
    z = (math.cbrt(total / freedom) - (1 - spread)) / math.sqrt(spread)
    return z > 3.3


# ------------------------------------------------------------------------------ optimizers


class Optimizer:
    """AdamW or SGD, as torch's, for all heads of a stack, each with its own rate and decay.

    scaled (for fp16): each head's slopes are scaled by a factor of its own, so a step of one head
    that overflows is left out and halves that factor, and the other heads never know.
    """

    def __init__(
        self,
        stack: Stack,
        config: DescentConfig,
        rate_LG: Tensor,
        decay_LG: Tensor,
        *,
        scaled: bool,
    ) -> None:
        import torch

        self.stack, self.config = stack, config
        self.rate_LG, self.decay_LG = rate_LG, decay_LG
        # A number where all heads agree, else one value per weight.
        alike = bool((rate_LG == rate_LG[0, 0]).all() & (decay_LG == decay_LG[0, 0]).all())
        self._rate = float(rate_LG[0, 0]) if alike else stack.spread(rate_LG)
        self._decay = float(decay_LG[0, 0]) if alike else stack.spread(decay_LG)
        self._shrink = self._rate * self._decay
        self.first = torch.zeros_like(stack.theta)
        self.second = torch.zeros_like(stack.theta)
        self.steps = 0
        self.skipped_LG = torch.zeros_like(rate_LG)
        self.scale_LG = torch.full_like(rate_LG, 65536.0) if scaled else None
        self.fine_LG = torch.zeros_like(rate_LG)
        self._room = torch.empty_like(stack.theta)

    def scaled(self, slope_LGCB: Tensor) -> Tensor:
        """The loss's slope, scaled for fp16 where that is asked for; in place."""
        if self.scale_LG is None:
            return slope_LGCB
        return slope_LGCB.mul_(self.scale_LG[:, :, None, None])

    def move(self, factor: float) -> None:
        """One step along the stack's slopes, at `factor` of each head's rate."""
        import torch

        with torch.no_grad():
            self.steps += 1
            if self.scale_LG is None:
                self._step(factor)
                return
            stack, kept = self.stack, (self.stack.theta, self.first, self.second)
            stack.grad.div_(stack.spread(self.scale_LG))
            well_LG = stack.finite(stack.grad)
            self.skipped_LG += ~well_LG
            before = [one.clone() for one in kept]
            self._step(factor)
            well = stack.spread(well_LG)
            for new, old in zip(kept, before, strict=True):
                new.copy_(torch.where(well, new, old))
            self.fine_LG = torch.where(well_LG, self.fine_LG + 1, 0)
            grown = self.fine_LG >= 2000  # as torch's GradScaler
            self.scale_LG *= torch.where(well_LG, torch.where(grown, 2.0, 1.0), 0.5)
            self.fine_LG[grown] = 0

    def _step(self, factor: float) -> None:
        slope, room = self.stack.grad, self._room
        if self.config.optimizer == "sgd":
            _add(slope, self.stack.theta, self._decay, 1.0)
            if self.config.momentum:
                slope = self.first.mul_(self.config.momentum).add_(slope)
            _add(self.stack.theta, slope, self._rate, -factor)
            return
        self.first.lerp_(slope, 0.1)
        self.second.mul_(0.999).addcmul_(slope, slope, value=0.001)
        room.copy_(self.second).sqrt_()
        _add(self.stack.theta, self.stack.theta, self._shrink, -factor)
        if self.scale_LG is None:
            first, second = 1 - 0.9**self.steps, math.sqrt(1 - 0.999**self.steps)
            room.add_(1e-8 * second).reciprocal_().mul_(self.first)
            _add(self.stack.theta, room, self._rate, -factor * second / first)
            return
        # A head that left steps out is younger than the others.
        age = self.stack.spread((self.steps - self.skipped_LG).clamp(min=1))
        first_P, second_P = 1 - 0.9**age, (1 - 0.999**age).sqrt()
        room.add_(1e-8 * second_P).reciprocal_().mul_(self.first).mul_(second_P / first_P)
        _add(self.stack.theta, room, self._rate, -factor)

    def tensors(self) -> dict[str, Tensor]:
        """What a resumed training needs."""
        kept = {"first": self.first, "second": self.second}
        if self.scale_LG is not None:
            kept |= {"scale": self.scale_LG, "skipped": self.skipped_LG, "fine": self.fine_LG}
        return kept

    def load(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Take up a state where it was left."""
        self.steps = steps
        for name, value in self.tensors().items():
            value.copy_(tensors[name])


def _add(to: Tensor, way: Tensor, each: float | Tensor, factor: float) -> None:
    """In place, to += factor * each * way; each: a number, or one value per weight."""
    if isinstance(each, float):
        if each:
            to.add_(way, alpha=factor * each)
    else:
        to.addcmul_(way, each, value=factor)
