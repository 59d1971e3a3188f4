"""Losses with their gradients at the logits, in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


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
            gradient = log.exp_()
            return nats, gradient.scatter_add_(
                2, index, gradient.new_full((), -1.0).expand_as(index)
            )
        weights = log.new_ones(classes) if self.classes is None else self.classes.to(log.dtype)
        weights_LC, s = weights.view(-1, classes).expand(lanes, -1), self.smoothing
        mine_LB = weights_LC.gather(1, label_LB.expand(lanes, -1))
        even = (weights_LC * (s / classes)).view(lanes, 1, -1, 1)
        hard = mine_LB[:, None] * (1 - s)
        nats = nats * hard - (log * even).sum(2)
        gradient = log.exp_().mul_(hard[:, :, None] + even.sum(2, True)).sub_(even)
        return nats, gradient.scatter_add_(2, index, -hard[:, :, None].expand_as(index))

    def _sigmoid(self, logit: Tensor, label_LCB: Tensor) -> tuple[Tensor, Tensor]:
        """Binary cross entropy of each label, the mean over labels."""
        from torch.nn.functional import softplus

        wanted = label_LCB[:, None] * (1 - self.smoothing) + self.smoothing / 2
        gain = (
            wanted if self.classes is None else wanted * self.classes.view(-1, 1, logit.shape[2], 1)
        )
        nats = (gain * softplus(-logit) + (1 - wanted) * softplus(logit)).mean(2)
        gradient = (1 - wanted) * logit.sigmoid() - gain * (-logit).sigmoid()
        return nats, gradient.div_(logit.shape[2])


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
