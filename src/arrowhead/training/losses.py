"""Loss functions with their gradients at the logits in closed form, and class weights.

PyTorch's losses serve one model and need autograd; these give the loss and the gradient of a
whole stack of heads (G groups of H heads, see `heads`) in a few operations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """Cross entropy; binary cross entropy of each label where images have several.

    Attributes:
        multilabel: Whether images have several labels.
        smoothing: Label smoothing, from 0 up to 1.
        class_weights: float32 (C,), or (G, C) with one row per group; None: all classes weigh the
            same.
    """

    multilabel: bool
    smoothing: float = 0.0
    class_weights: Tensor | None = None

    def row_weights(self, label: Tensor) -> Tensor | None:
        """Return each row's weight in the mean, float32, in the labels' shape; None: all 1."""
        if self.multilabel or self.class_weights is None:
            return None
        if self.class_weights.dim() == 1:
            return self.class_weights[label]
        return self.class_weights.gather(1, label)

    def sum_and_gradient(
        self, logit_GHCB: Tensor, label: Tensor, mask_GB: Tensor | None, total: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute the loss summed over rows, and the gradient of the mean loss at the logits.

        Args:
            logit_GHCB: The logits; they are overwritten.
            label: int64 (G, B), or float32 (G, C, B) where images have several labels.
            mask_GB: bool, the rows that count; None: all. The others are padding.
            total: What the sum is divided by for the mean: a number, or (G,).

        Returns:
            The sums, float32 (G, H) in nats, and the gradient, float32 (G, H, C, B).
        """
        import torch

        with torch.no_grad():
            loss_and_gradient = self._binary_cross_entropy if self.multilabel else self._softmax
            loss_GHB, grad_GHCB = loss_and_gradient(logit_GHCB, label)
            if mask_GB is not None:
                loss_GHB = loss_GHB.mul(mask_GB[:, None])
                grad_GHCB = grad_GHCB.mul_(mask_GB[:, None, None])
            if isinstance(total, float):
                return loss_GHB.sum(2), grad_GHCB.mul_(1 / total)
            return loss_GHB.sum(2), grad_GHCB.div_(total.view(-1, 1, 1, 1))

    def _softmax(self, logit: Tensor, label_GB: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy as `torch.nn.functional.cross_entropy` computes it, with class weights and
        label smoothing.
        """
        groups, heads, classes, rows = logit.shape
        index = label_GB[:, None, None].expand(groups, heads, 1, rows)
        log_prob = logit.log_softmax(2)
        loss = log_prob.gather(2, index)[:, :, 0].neg_()
        if self.class_weights is None and not self.smoothing:
            grad = log_prob.exp_()
            return loss, grad.scatter_add_(2, index, grad.new_full((), -1.0).expand_as(index))
        weights = (
            log_prob.new_ones(classes)
            if self.class_weights is None
            else self.class_weights.to(log_prob.dtype)
        )
        weights_GC, smoothing = weights.view(-1, classes).expand(groups, -1), self.smoothing
        weight_GB = weights_GC.gather(1, label_GB.expand(groups, -1))
        # The target is `hard` at the label plus `even` at every class, both weighted.
        even = (weights_GC * (smoothing / classes)).view(groups, 1, -1, 1)
        hard = weight_GB[:, None] * (1 - smoothing)
        loss = loss * hard - (log_prob * even).sum(2)
        grad = log_prob.exp_().mul_(hard[:, :, None] + even.sum(2, True)).sub_(even)
        return loss, grad.scatter_add_(2, index, -hard[:, :, None].expand_as(index))

    def _binary_cross_entropy(self, logit: Tensor, label_GCB: Tensor) -> tuple[Tensor, Tensor]:
        """Binary cross entropy, averaged over the labels."""
        from torch.nn.functional import softplus

        target = label_GCB[:, None] * (1 - self.smoothing) + self.smoothing / 2
        positive = (
            target
            if self.class_weights is None
            else target * self.class_weights.view(-1, 1, logit.shape[2], 1)
        )
        loss = (positive * softplus(-logit) + (1 - target) * softplus(logit)).mean(2)
        grad = (1 - target) * logit.sigmoid() - positive * (-logit).sigmoid()
        return loss, grad.div_(logit.shape[2])


def balanced_weights(label: Tensor, classes: int) -> Tensor:
    """Return class weights under which rare classes count as much as common ones, float32 (C,).

    Args:
        label: int64 (n,): the weights are n / (C x count), as scikit-learn's `balanced`. uint8
            (n, C), several labels per image: the weights of presence, absent / present.
        classes: The number of classes, C.
    """
    import torch

    if label.dim() == 1:
        counts = torch.bincount(label, minlength=classes).double()
        return (len(label) / (classes * counts.clamp(min=1))).float()
    present = label.double().sum(0)
    return ((len(label) - present) / present.clamp(min=1)).clamp(1e-3, 1e3).float()


def weights_to_match(label: Tensor, target: Tensor, classes: int) -> Tensor:
    """Return class weights under which `label`'s classes are as frequent as `target`'s.

    The target's frequencies are smoothed towards those of `label`, as if it had C more images
    distributed as in `label`: a class that it lacks gets a small weight, not 0.

    Args:
        label: int64 (n,).
        target: int64 (m,).
        classes: The number of classes, C.

    Returns:
        float32 (C,).
    """
    import torch

    counts = torch.bincount(label, minlength=classes).double()
    share = counts / counts.sum()
    target_counts = torch.bincount(target, minlength=classes).double()
    target_share = (target_counts + classes * share) / (target_counts.sum() + classes)
    return (target_share / share.clamp(min=1e-12)).float()


def frequencies_differ(label: Tensor, other: Tensor, classes: int) -> bool:
    """Return whether class frequencies differ significantly between two sets of labels.

    A chi-squared test at a significance level of about 1 in 2,000 (with Wilson & Hilferty's normal
    approximation).
    """
    import torch

    counts = [torch.bincount(one, minlength=classes).double() for one in (label, other)]
    both = counts[0] + counts[1]
    occurs, freedom = both > 0, int((both > 0).sum()) - 1
    if freedom < 1 or not counts[0].sum() or not counts[1].sum():
        return False
    chi_squared = 0.0
    for one in counts:
        expected = both[occurs] * one.sum() / both.sum()
        chi_squared += float(((one[occurs] - expected).square() / expected).sum())
    variance = 2 / (9 * freedom)
    z = (math.cbrt(chi_squared / freedom) - (1 - variance)) / math.sqrt(variance)
    return z > 3.3
