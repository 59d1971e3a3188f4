"""Heads: features (B, D) to logits (B, C); one, or a stack of them that learn together.

    make, restore       one head as plain torch modules: first weights, inference
    Stack.of            L x G heads side by side; G of a *lane* see the same batches
      -> logits         (L, G, C, B), batched matrix products
      -> descend        from the loss's slope at the logits to that of every weight

All weights of a stack lie in one flat tensor, so an optimizer moves them in a few operations.
The same numbers come on any number of workers: batch norm takes its statistics from the global
batch, and dropout draws its mask for the global batch and takes this worker's rows of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

State = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Place:
    """Which rows of which global batch a worker holds: step number, first row, rows in all; and
    whether other workers hold the rest.
    """

    step: int
    first: int
    rows: int
    shared: bool = False


# ------------------------------------------------------------------------------ one head


class Standardize(nn.Module):
    """Features minus their training mean, over their training deviation; nothing to learn.

    Without it a linear head on a body whose features are large and alike hardly learns.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))

    def forward(self, input: Tensor) -> Tensor:
        """(B, D) to (B, D)."""
        return (input - self.mean) / self.deviation


def make(kind: str, width: int, classes: int, *, seed: int = 0) -> nn.Sequential:
    """A head of `kind` with weights drawn from `seed`.

    linear: standardized, dropout, one linear layer. lesson: fast.ai's batch norm, dropout, linear
    to 512, ReLU, batch norm, dropout, linear.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "linear":
            return nn.Sequential(Standardize(width), nn.Dropout(), nn.Linear(width, classes))
        return nn.Sequential(
            nn.BatchNorm1d(width),
            nn.Dropout(),
            nn.Linear(width, 512),
            nn.ReLU(),
            nn.BatchNorm1d(512),
            nn.Dropout(),
            nn.Linear(512, classes),
        )


def restore(kind: str, width: int, classes: int, state: State) -> nn.Sequential:
    """A trained head, ready for inference: float32 (B, width) to logits (B, classes)."""
    head = make(kind, width, classes)
    head.load_state_dict(dict(state))
    return head.eval()


# ------------------------------------------------------------------------------- a stack


class Stack(ABC):
    """L x G heads of one kind; those of a lane see the same batches under the same dropout.

    theta, grad: float32 (P,), all that is learned, and the loss's slope there. `views` names the
    parts of such a flat tensor, each (L, G, …). buffers: what is not learned, by name, (L, G, …).
    """

    learned: Sequence[str]

    def __init__(
        self, states: Sequence[Sequence[State]], dropout: Sequence[float], seeds: Sequence[int]
    ) -> None:
        self.shape = len(states), len(states[0])
        self.dropout, self.seeds = list(dropout), list(seeds)
        parts = {
            name: torch.stack([torch.stack([one[name] for one in lane]) for lane in states])
            for name in states[0][0]
        }
        self._sizes = {name: parts[name].shape for name in self.learned}
        self.theta = torch.cat([parts[name].flatten() for name in self.learned])
        self.grad = torch.zeros_like(self.theta)
        self.buffers = {name: part for name, part in parts.items() if name not in self.learned}
        self.parts, self.gradients = self.views(self.theta), self.views(self.grad)

    @staticmethod
    def of(
        kind: str,
        states: Sequence[Sequence[State]],
        dropout: Sequence[float],
        seeds: Sequence[int],
        *,
        multi: bool = False,
    ) -> Stack:
        """A stack of heads with these states, [lane][head]; dropout and seed by lane.

        multi: several labels per image, so that the logits of two classes are both needed.
        """
        if kind == "linear":
            return Linear(states, dropout, seeds, multi=multi)
        return Lesson(states, dropout, seeds)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The parts of a flat tensor (P,), (L, G, …) each, by name."""
        counts = [size.numel() for size in self._sizes.values()]
        pieces = zip(self._sizes.items(), torch.split(flat, counts), strict=True)
        return {name: piece.view(size) for (name, size), piece in pieces}

    def spread(self, value_LG: Tensor) -> Tensor:
        """One value per head as one per weight, (P,)."""
        parts = self.views(self.theta).values()
        lanes, each = self.shape
        wide = [
            value_LG.view(lanes, each, *[1] * (part.dim() - 2)).expand_as(part) for part in parts
        ]
        return torch.cat([part.flatten() for part in wide])

    def taken(self, flat: Tensor, heads: Tensor) -> Tensor:
        """Those parts of a flat tensor that belong to some heads, int64 (L', G') into L x G."""
        parts = self.views(flat).values()
        return torch.cat([part.flatten(0, 1)[heads.flatten()].flatten() for part in parts])

    def finite(self, flat: Tensor) -> Tensor:
        """Which heads have only finite values in a flat tensor, bool (L, G)."""
        whole = [part.isfinite().flatten(2).all(2) for part in self.views(flat).values()]
        return torch.stack(whole).all(0)

    def state(self, lane: int, head: int, flat: Tensor | None = None) -> dict[str, Tensor]:
        """One head's state, as `restore` takes it; its learned part from `flat`, if given."""
        parts = self.parts if flat is None else self.views(flat)
        return {name: part[lane, head].clone() for name, part in (parts | self.buffers).items()}

    @abstractmethod
    def logits(
        self,
        feature_LBD: Tensor,
        place: Place | None = None,
        real_LB: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Logits, float32 (L, G, C, B), up to a constant per row where rows have one label.

        feature_LBD: float16, L lanes or 1 for all. place: given while training; None applies the
        heads as they are. real_LB: bool, the rows that count (others fill a lane up), None: all.
        dtype: of matrix products, None for float32.
        """

    @abstractmethod
    def held(self, width: int) -> int:
        """Numbers that `logits` holds at once for each row of width `width`."""

    @abstractmethod
    def descend(self, slope_LGCB: Tensor) -> None:
        """Fill `grad`, given the loss's slope at the logits that were made last."""


class Linear(Stack):
    """Standardize, dropout, one linear layer. Its slopes are two matrix products: no autograd."""

    learned = ("2.weight", "2.bias")

    def __init__(
        self,
        states: Sequence[Sequence[State]],
        dropout: Sequence[float],
        seeds: Sequence[int],
        *,
        multi: bool,
    ) -> None:
        super().__init__(states, dropout, seeds)
        # Of two classes only the difference of the logits matters: half the products.
        self._pair = self.parts["2.bias"].shape[2] == 2 and not multi
        self._mean = self.buffers["0.mean"][:, :1]
        self._scale = 1 / self.buffers["0.deviation"][:, :1]
        self._room = self.theta.new_empty(0)

    @torch.no_grad()
    def logits(
        self,
        feature_LBD: Tensor,
        place: Place | None = None,
        real_LB: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """See `Stack.logits`."""
        lanes, each = self.shape
        rows, width = feature_LBD.shape[1:]
        if self._room.numel() < lanes * rows * width:  # fresh memory costs more than the sum
            self._room = self.theta.new_empty(lanes * rows * width)
        x_LBD = self._room[: lanes * rows * width].view(lanes, rows, width)
        torch.sub(feature_LBD, self._mean, out=x_LBD)
        if place:
            for lane, share in enumerate(self.dropout):
                if share:
                    x_LBD[lane].mul_(kept(self.seeds[lane], 0, place, rows, width, share).to(x_LBD))
        weight, bias = self.parts["2.weight"], self.parts["2.bias"]
        if self._pair:
            weight, bias = weight[:, :, 1] - weight[:, :, 0], bias[:, :, 1] - bias[:, :, 0]
        weight, bias = weight.reshape(lanes, -1, width), bias.reshape(lanes, -1, 1)
        # Dividing by the deviation: the features or the weights, whichever are fewer.
        self._scaled = weight.shape[1] > rows
        if self._scaled:
            x_LBD.mul_(self._scale)
        else:
            weight = weight * self._scale
        self._x = x_LBD if dtype is None else x_LBD.to(dtype)
        if dtype is None:
            logit = torch.baddbmm(bias, weight, x_LBD.mT)
        else:
            logit = torch.bmm(weight.to(dtype), self._x.mT).float() + bias
        logit = logit.view(lanes, each, weight.shape[1] // each, rows)
        return nn.functional.pad(logit, (0, 0, 1, 0)) if self._pair else logit

    def held(self, width: int) -> int:
        """See `Stack.held`."""
        return self.shape[0] * width + self.parts["2.bias"].numel()

    @torch.no_grad()
    def descend(self, slope_LGCB: Tensor) -> None:
        """See `Stack.descend`."""
        lanes, each = self.shape
        gradient = slope_LGCB[:, :, 1:] if self._pair else slope_LGCB
        gradient = gradient.flatten(1, 2)
        made = torch.bmm(gradient.to(self._x.dtype), self._x).float()
        if not self._scaled:
            made.mul_(self._scale)
        weight, bias = self.gradients["2.weight"], self.gradients["2.bias"]
        made, sums = (
            made.view(lanes, each, -1, made.shape[2]),
            gradient.sum(2).view(lanes, each, -1),
        )
        if self._pair:
            torch.neg(made[:, :, 0], out=weight[:, :, 0])
            torch.neg(sums[:, :, 0], out=bias[:, :, 0])
            weight[:, :, 1:], bias[:, :, 1:] = made, sums
        else:
            weight.copy_(made)
            bias.copy_(sums)


class Lesson(Stack):
    """The lesson's head, batched over lanes and heads; its slopes come from autograd."""

    learned = (
        "0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias", "6.weight", "6.bias",
    )  # fmt: skip

    def logits(
        self,
        feature_LBD: Tensor,
        place: Place | None = None,
        real_LB: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """See `Stack.logits`."""
        leaves = self._leaves() if place else self.parts
        wide = feature_LBD.to(self.theta.dtype).expand(self.shape[0], -1, -1)[:, None]
        with (
            torch.set_grad_enabled(place is not None),
            torch.autocast(wide.device.type, dtype, enabled=dtype is not None),
        ):
            x = self._norm(wide, "0", leaves, place, real_LB)
            x = self._drop(x, 0, place)
            x = (x @ leaves["2.weight"].mT + leaves["2.bias"][:, :, None]).relu()
            x = self._norm(x.to(wide), "4", leaves, place, real_LB)
            x = self._drop(x, 1, place)
            self._made = (leaves["6.weight"] @ x.mT).to(wide) + leaves["6.bias"][..., None]
        return self._made.detach()

    def held(self, width: int) -> int:
        """See `Stack.held`."""
        return self.shape[0] * self.shape[1] * (width + 512) + self.parts["6.bias"].numel()

    def descend(self, slope_LGCB: Tensor) -> None:
        """See `Stack.descend`."""
        self.grad.zero_()
        # Not .backward(slope): torch then imports sympy, 1.7 s at the first step.
        (self._made * slope_LGCB).sum().backward()  # type: ignore[no-untyped-call]
        del self._made

    def _leaves(self) -> dict[str, Tensor]:
        """The learned parts for autograd, which adds what it finds to our own slopes."""
        leaves = {name: part.detach().requires_grad_() for name, part in self.parts.items()}
        for name, leaf in leaves.items():
            leaf.grad = self.gradients[name]
        return leaves

    def _norm(
        self,
        x_LGBD: Tensor,
        name: str,
        leaves: Mapping[str, Tensor],
        place: Place | None,
        real_LB: Tensor | None,
    ) -> Tensor:
        """Batch norm over the rows of all workers (Ioffe & Szegedy, arXiv:1502.03167)."""
        gain, shift = leaves[f"{name}.weight"], leaves[f"{name}.bias"]
        running = [self.buffers[f"{name}.running_{what}"] for what in ("mean", "var")]
        if place is None:
            mean, var = (one[:, :, None] for one in running)
        else:
            here = torch.ones_like(x_LGBD[..., :1])
            if real_LB is not None:
                here = here * real_LB[:, None, :, None]
            count, total = _over_workers(place, here.sum(2), (x_LGBD * here).sum(2))
            mean = (total / count)[:, :, None]
            (squares,) = _over_workers(place, ((x_LGBD - mean).square() * here).sum(2))
            var = (squares / count)[:, :, None]
            with torch.no_grad():  # 0.1 and the unbiased variance: as torch's BatchNorm1d
                running[0].lerp_(mean[:, :, 0].expand_as(running[0]), 0.1)
                unbiased = squares / (count - 1).clamp(min=1)
                running[1].lerp_(unbiased.expand_as(running[1]), 0.1)
                self.buffers[f"{name}.num_batches_tracked"].add_(1)
        normal = (x_LGBD - mean) * (var + 1e-5).rsqrt()
        return normal * gain[:, :, None] + shift[:, :, None]

    def _drop(self, x_LGBD: Tensor, layer: int, place: Place | None) -> Tensor:
        if place is None or not any(self.dropout):
            return x_LGBD
        rows, width = x_LGBD.shape[2:]
        shares = [share / (2 - layer) for share in self.dropout]  # half of it before the first
        lanes = zip(self.seeds, shares, strict=True)
        masks = [kept(seed, layer, place, rows, width, share) for seed, share in lanes]
        return x_LGBD * torch.stack(masks)[:, None].to(x_LGBD)


def _over_workers(place: Place, *sums: Tensor) -> list[Tensor]:
    """Sums over the rows here as sums over those of all workers; autograd passes through."""
    if not place.shared:
        return list(sums)
    flat = all_reduce(torch.cat([one.flatten() for one in sums]))  # type: ignore[no-untyped-call]
    pieces: Any = flat.split([one.numel() for one in sums])
    return [piece.view_as(one) for piece, one in zip(pieces, sums, strict=True)]


def kept(seed: int, layer: int, place: Place, rows: int, width: int, share: float) -> Tensor:
    """Dropout's factors, float32 (rows, width) on the CPU: 0, or 1 / (1 - share).

    A function of (seed, layer, step) and the row's number in the global batch alone.
    """
    draw = np.random.Generator(np.random.SFC64((seed, layer, place.step)))
    drawn = draw.integers(65536, size=(place.first + rows, width), dtype=np.uint16)
    mine = drawn[place.first :] >= round(share * 65536)
    return torch.from_numpy(mine).float().div_(1 - share)
