"""AdamW and SGD for many heads, each at its own rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from arrowhead.training.optimizer_config import OptimizerConfig

if TYPE_CHECKING:
    from torch import Tensor

    from arrowhead.training.heads import Stack


class Optimizer:
    """AdamW or SGD, as torch's, for all heads of a stack, each with its own rate and decay.

    scaled (for fp16): each head's slopes are scaled by a factor of its own, so a step of one head
    that overflows is left out and halves that factor, and the other heads never know.
    """

    def __init__(
        self,
        stack: Stack,
        config: OptimizerConfig,
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
        gradient, room = self.stack.grad, self._room
        if self.config.optimizer == "sgd":
            _add(gradient, self.stack.theta, self._decay, 1.0)
            if self.config.momentum:
                gradient = self.first.mul_(self.config.momentum).add_(gradient)
            _add(self.stack.theta, gradient, self._rate, -factor)
            return
        self.first.lerp_(gradient, 0.1)
        self.second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
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
