"""L-BFGS on many problems at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


MOST_EVALUATIONS = 500


def minimize(
    measure: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    start_KP: Tensor,
    to: float,
    memory: int = 10,
) -> Tensor:
    """Minima (K, P) of K smooth convex functions side by side, each from its own start.

    measure: values (K',) and gradients (K', P) at points (K', P) of the lanes int64 (K',). A lane
    is done when its gradient's norm is `to`, or no step along it helps any more. Every lane takes
    its own steps: one that has to try a shorter step does not hold up the others, and lanes that
    are done are measured no more.
    """
    import torch

    found = start_KP.clone()
    lane = torch.arange(len(found), device=found.device)
    at = found.clone()
    value, gradient = measure(at, lane)
    way, length = -gradient, torch.ones_like(value)
    pairs = _Pairs(memory, at)
    for _ in range(MOST_EVALUATIONS):
        along = (gradient * way).sum(1)
        done = (gradient.norm(dim=1) <= to) | (length < 1e-9) | ~(along < 0)
        if done.any():
            found[lane[done]] = at[done]
            stay = ~done
            kept = (one[stay] for one in (lane, at, value, gradient, way, length, along))
            lane, at, value, gradient, way, length, along = kept
            pairs.keep(stay)
        if not len(lane):
            return found
        there = at + length[:, None] * way
        new_value, new_slope = measure(there, lane)
        # Armijo's rule, with room for rounding where the value hardly moves any more.
        room = 1e-13 * value.abs().clamp(min=1e-3)
        good = new_value.isfinite() & (new_value <= value + 1e-4 * length * along + room)
        step = torch.where(good[:, None], there - at, 0)
        pairs.add(step, torch.where(good[:, None], new_slope - gradient, 0), good)
        at, value = at + step, torch.where(good, new_value, value)
        gradient = torch.where(good[:, None], new_slope, gradient)
        way = torch.where(good[:, None], -pairs.times(gradient), way)
        length = torch.where(good, 1.0, length * 0.3)
    found[lane] = at
    return found


class _Pairs:
    """The last steps of each lane and how the gradient changed: an inverse Hessian to multiply
    with. All lanes share a slot per evaluation; a lane that did not move leaves its slot empty.
    """

    def __init__(self, memory: int, like_KP: Tensor) -> None:
        self._step = like_KP.new_zeros(memory, *like_KP.shape)
        self._change = self._step.clone()
        self._weight = like_KP.new_zeros(memory, len(like_KP))
        self._scale = like_KP.new_ones(len(like_KP))
        self._count = 0

    def add(self, step: Tensor, change: Tensor, moved: Tensor) -> None:
        import torch

        slot, self._count = self._count % len(self._step), self._count + 1
        both, square = (step * change).sum(1), change.square().sum(1)
        useful = moved & (both > 1e-14 * square)
        self._step[slot], self._change[slot] = step, change
        self._weight[slot] = torch.where(useful, 1 / both.clamp(min=1e-300), 0)
        self._scale = torch.where(useful, both / square.clamp(min=1e-300), self._scale)

    def keep(self, stay: Tensor) -> None:
        self._step, self._change = self._step[:, stay], self._change[:, stay]
        self._weight, self._scale = self._weight[:, stay], self._scale[stay]

    def times(self, gradient: Tensor) -> Tensor:
        """The inverse Hessian times a gradient (K, P)."""
        newest = [
            (self._count - 1 - age) % len(self._step)
            for age in range(min(self._count, len(self._step)))
        ]
        made, shares = gradient.clone(), []
        for slot in newest:
            share = self._weight[slot] * (self._step[slot] * made).sum(1)
            made -= share[:, None] * self._change[slot]
            shares.append(share)
        made *= self._scale[:, None]
        for slot, share in zip(reversed(newest), reversed(shares), strict=True):
            back = self._weight[slot] * (self._change[slot] * made).sum(1)
            made += (share - back)[:, None] * self._step[slot]
        return made
