"""AdamW and SGD for a stack of heads, each with its own learning rate.

PyTorch's optimizers have one learning rate per parameter group and one GradScaler for all; these
step all heads in a few operations and skip overflowing steps per head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from arrowhead.training.optimizer_config import OptimizerConfig

if TYPE_CHECKING:
    from torch import Tensor

    from arrowhead.training.heads import Stack

INITIAL_SCALE = 65536.0  # this and the interval are those of torch's GradScaler
SCALE_GROWTH_INTERVAL = 2000


class Optimizer:
    """AdamW or SGD with PyTorch's updates, for all heads of a stack.

    Each head has its own learning rate and weight decay, (G, H). For fp16 (`scaled`) each head has
    a gradient scale of its own: a head whose gradient overflows skips the step and halves its
    scale, and the other heads are not affected.
    """

    def __init__(
        self,
        stack: Stack,
        config: OptimizerConfig,
        lr_GH: Tensor,
        decay_GH: Tensor,
        *,
        scaled: bool,
    ) -> None:
        import torch

        self.stack, self.config = stack, config
        self.lr_GH, self.decay_GH = lr_GH, decay_GH
        # A number if all heads have the same value, else one value per weight.
        same = bool((lr_GH == lr_GH[0, 0]).all() & (decay_GH == decay_GH[0, 0]).all())
        self._lr = float(lr_GH[0, 0]) if same else stack.expand_to_weights(lr_GH)
        self._decay = float(decay_GH[0, 0]) if same else stack.expand_to_weights(decay_GH)
        self._lr_decay = self._lr * self._decay
        self.first_moment = torch.zeros_like(stack.theta)  # with SGD: momentum
        self.second_moment = torch.zeros_like(stack.theta)
        self.steps = 0
        self.skipped_GH = torch.zeros_like(lr_GH)
        self.scale_GH = torch.full_like(lr_GH, INITIAL_SCALE) if scaled else None
        self.finite_steps_GH = torch.zeros_like(lr_GH)
        self._buffer = torch.empty_like(stack.theta)

    def scale_gradient(self, grad_GHCB: Tensor) -> Tensor:
        """Scale the loss's gradient in place, if gradients are scaled."""
        if self.scale_GH is None:
            return grad_GHCB
        return grad_GHCB.mul_(self.scale_GH[:, :, None, None])

    def step(self, factor: float) -> None:
        """Take one step along the stack's gradients, at `factor` of each head's learning rate."""
        import torch

        with torch.no_grad():
            self.steps += 1
            if self.scale_GH is None:
                self._update(factor)
                return
            stack, state = self.stack, (self.stack.theta, self.first_moment, self.second_moment)
            stack.grad.div_(stack.expand_to_weights(self.scale_GH))
            finite_GH = stack.finite_heads(stack.grad)
            self.skipped_GH += ~finite_GH
            before = [one.clone() for one in state]
            self._update(factor)
            finite = stack.expand_to_weights(finite_GH)
            for new, old in zip(state, before, strict=True):
                new.copy_(torch.where(finite, new, old))
            self.finite_steps_GH = torch.where(finite_GH, self.finite_steps_GH + 1, 0)
            grow_GH = self.finite_steps_GH >= SCALE_GROWTH_INTERVAL
            self.scale_GH *= torch.where(finite_GH, torch.where(grow_GH, 2.0, 1.0), 0.5)
            self.finite_steps_GH[grow_GH] = 0

    def _update(self, factor: float) -> None:
        """Update weights and moments of all heads."""
        grad, buffer = self.stack.grad, self._buffer
        if self.config.optimizer == "sgd":
            _add_scaled(grad, self.stack.theta, self._decay, 1.0)
            if self.config.momentum:
                grad = self.first_moment.mul_(self.config.momentum).add_(grad)
            _add_scaled(self.stack.theta, grad, self._lr, -factor)
            return
        self.first_moment.lerp_(grad, 0.1)
        self.second_moment.mul_(0.999).addcmul_(grad, grad, value=0.001)
        buffer.copy_(self.second_moment).sqrt_()
        _add_scaled(self.stack.theta, self.stack.theta, self._lr_decay, -factor)
        if self.scale_GH is None:
            correction1, correction2 = 1 - 0.9**self.steps, math.sqrt(1 - 0.999**self.steps)
            buffer.add_(1e-8 * correction2).reciprocal_().mul_(self.first_moment)
            _add_scaled(self.stack.theta, buffer, self._lr, -factor * correction2 / correction1)
            return
        # The bias correction of a head counts only the steps that it did not skip.
        steps_P = self.stack.expand_to_weights((self.steps - self.skipped_GH).clamp(min=1))
        correction1_P, correction2_P = 1 - 0.9**steps_P, (1 - 0.999**steps_P).sqrt()
        buffer.add_(1e-8 * correction2_P).reciprocal_().mul_(self.first_moment)
        buffer.mul_(correction2_P / correction1_P)
        _add_scaled(self.stack.theta, buffer, self._lr, -factor)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint, by the names that they have there."""
        tensors = {"first": self.first_moment, "second": self.second_moment}
        if self.scale_GH is not None:
            tensors |= {
                "scale": self.scale_GH,
                "skipped": self.skipped_GH,
                "fine": self.finite_steps_GH,
            }
        return tensors

    def load(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Restore the state that `state_tensors` gave after this many steps."""
        self.steps = steps
        for name, value in self.state_tensors().items():
            value.copy_(tensors[name])


def _add_scaled(target: Tensor, direction: Tensor, scale: float | Tensor, factor: float) -> None:
    """In place, target += factor * scale * direction; scale: a number, or one value per weight."""
    if isinstance(scale, float):
        if scale:
            target.add_(direction, alpha=factor * scale)
    else:
        target.addcmul_(direction, scale, value=factor)
