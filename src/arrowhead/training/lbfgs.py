"""L-BFGS on many smooth convex problems at once.

SciPy and PyTorch minimize one function at a time. Here K problems share every evaluation, and each
has its own line search, so one that needs a shorter step does not hold up the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


MAX_EVALUATIONS = 500
# Of the backtracking line search: the share of the predicted decrease that a step must achieve
# (Armijo's rule), how much shorter the next step is, and when the search gives up.
ARMIJO_FACTOR = 1e-4
STEP_SHRINK = 0.3
MIN_STEP_LENGTH = 1e-9


def minimize(
    evaluate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    start_KP: Tensor,
    max_gradient_norm: float,
    memory: int = 10,
) -> Tensor:
    """Minimize K functions, each from its own start (Nocedal & Wright 2006, algorithm 7.4).

    A problem is done when its gradient's norm is at most `max_gradient_norm`, or when no step
    along the search direction lowers its value any more; then it is not evaluated again.

    Args:
        evaluate: From points (K', P) of some problems and their numbers, int64 (K'), to the
            values (K') and gradients (K', P).
        start_KP: The starting points.
        max_gradient_norm: The gradient norm at which a problem is done.
        memory: How many of the last steps approximate the inverse Hessian.

    Returns:
        The minima, (K, P).
    """
    import torch

    minimum = start_KP.clone()
    problem = torch.arange(len(minimum), device=minimum.device)
    point = minimum.clone()
    value, grad = evaluate(point, problem)
    direction, length = -grad, torch.ones_like(value)
    hessian = _InverseHessian(memory, point)
    for _ in range(MAX_EVALUATIONS):
        directional_derivative = (grad * direction).sum(1)
        done = (
            (grad.norm(dim=1) <= max_gradient_norm)
            | (length < MIN_STEP_LENGTH)
            | ~(directional_derivative < 0)
        )
        if done.any():
            minimum[problem[done]] = point[done]
            active = ~done
            problem, point, value, grad, direction, length, directional_derivative = (
                one[active]
                for one in (problem, point, value, grad, direction, length, directional_derivative)
            )
            hessian.select(active)
        if not len(problem):
            return minimum
        candidate = point + length[:, None] * direction
        new_value, new_grad = evaluate(candidate, problem)
        # Armijo's rule, with a tolerance for rounding where the value hardly changes any more.
        tolerance = 1e-13 * value.abs().clamp(min=1e-3)
        limit = value + ARMIJO_FACTOR * length * directional_derivative + tolerance
        accepted = new_value.isfinite() & (new_value <= limit)
        step = torch.where(accepted[:, None], candidate - point, 0)
        hessian.update(step, torch.where(accepted[:, None], new_grad - grad, 0), accepted)
        point, value = point + step, torch.where(accepted, new_value, value)
        grad = torch.where(accepted[:, None], new_grad, grad)
        direction = torch.where(accepted[:, None], -hessian.multiply(grad), direction)
        length = torch.where(accepted, 1.0, length * STEP_SHRINK)
    minimum[problem] = point
    return minimum


class _InverseHessian:
    """The inverse Hessian of each problem, from the last steps and the changes of the gradient.

    All problems share a slot of the memory per evaluation; a problem whose step was not accepted
    leaves its slot empty.
    """

    def __init__(self, memory: int, point_KP: Tensor) -> None:
        self._step = point_KP.new_zeros(memory, *point_KP.shape)
        self._change = self._step.clone()
        self._weight = point_KP.new_zeros(memory, len(point_KP))
        self._scale = point_KP.new_ones(len(point_KP))
        self._count = 0

    def update(self, step: Tensor, change: Tensor, accepted: Tensor) -> None:
        """Remember each problem's last step and the change of its gradient."""
        import torch

        slot, self._count = self._count % len(self._step), self._count + 1
        product, square = (step * change).sum(1), change.square().sum(1)
        useful = accepted & (product > 1e-14 * square)
        self._step[slot], self._change[slot] = step, change
        self._weight[slot] = torch.where(useful, 1 / product.clamp(min=1e-300), 0)
        self._scale = torch.where(useful, product / square.clamp(min=1e-300), self._scale)

    def select(self, active: Tensor) -> None:
        """Drop the problems that are done."""
        self._step, self._change = self._step[:, active], self._change[:, active]
        self._weight, self._scale = self._weight[:, active], self._scale[active]

    def multiply(self, grad: Tensor) -> Tensor:
        """Multiply by a gradient (K, P): the two-loop recursion."""
        newest_first = [
            (self._count - 1 - age) % len(self._step)
            for age in range(min(self._count, len(self._step)))
        ]
        product, alphas = grad.clone(), []
        for slot in newest_first:
            alpha = self._weight[slot] * (self._step[slot] * product).sum(1)
            product -= alpha[:, None] * self._change[slot]
            alphas.append(alpha)
        product *= self._scale[:, None]
        for slot, alpha in zip(reversed(newest_first), reversed(alphas), strict=True):
            beta = self._weight[slot] * (self._change[slot] * product).sum(1)
            product += (alpha - beta)[:, None] * self._step[slot]
        return product
