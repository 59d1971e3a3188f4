"""Heads, from features (B, D) to logits (B, C): one as PyTorch modules, or a stack trained at once.

    build_head, restore_head    one head as plain PyTorch modules: initial weights, inference
    Stack.from_states           G x H heads; the H heads of a *group* see the same batches
      -> logits                 (G, H, C, B), by batched matrix products
      -> backward               from the loss's gradient at the logits to that of every weight

All weights of a stack lie in one flat tensor, so an optimizer updates them in a few operations.
The results are the same on any number of workers: batch norm takes its statistics from the global
batch, and dropout draws its mask for the global batch and takes this worker's rows of it.
`torch.func.stack_module_state` with `vmap` stacks modules too, but keeps neither promise.

Letters in shape suffixes: G groups, H heads of a group, C classes, B rows, D features, P weights.
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
class BatchSlice:
    """A worker's rows of a global batch.

    Attributes:
        step: The number of the training step.
        first_row: Where this worker's rows start in the global batch.
        global_rows: The number of rows of the global batch.
        distributed: Whether other workers hold the other rows.
    """

    step: int
    first_row: int
    global_rows: int
    distributed: bool = False


# ------------------------------------------------------------------------------ one head


class Standardize(nn.Module):
    """Subtract the training features' mean and divide by their standard deviation.

    Without it, gradient descent on a linear head hardly makes progress where a backbone's features
    are large and nearly constant.
    """

    mean: Tensor
    deviation: Tensor  # the name is a key of saved state dicts

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))

    def forward(self, input: Tensor) -> Tensor:
        """(B, D) to (B, D)."""
        return (input - self.mean) / self.deviation


def build_head(architecture: str, width: int, classes: int, *, seed: int = 0) -> nn.Sequential:
    """Build a head with initial weights drawn from `seed`.

    Args:
        architecture: linear (standardization, dropout, one linear layer), or lesson (fast.ai's
            batch norm, dropout, linear to 512, ReLU, batch norm, dropout, linear).
        width: The number of features, D.
        classes: The number of classes, C.
        seed: Seed of the initial weights; the global random state stays as it is.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if architecture == "linear":
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


def restore_head(architecture: str, width: int, classes: int, state: State) -> nn.Sequential:
    """Build a trained head, ready for inference: float32 (B, width) to logits (B, classes)."""
    head = build_head(architecture, width, classes)
    head.load_state_dict(dict(state))
    return head.eval()


# ------------------------------------------------------------------------------- a stack


class Stack(ABC):
    """G x H heads of one architecture, trained at once.

    The H heads of a group see the same batches under the same dropout masks.

    Attributes:
        shape: (G, H).
        theta: All trainable weights, float32 (P,); `parameters` names views of it.
        grad: The loss's gradient there, float32 (P,); `gradients` names views of it.
        parameters, gradients: By name, each (G, H, …).
        buffers: State that is not trained, by name, each (G, H, …).
    """

    parameter_names: Sequence[str]

    def __init__(
        self, states: Sequence[Sequence[State]], dropout: Sequence[float], seeds: Sequence[int]
    ) -> None:
        self.shape = len(states), len(states[0])
        self.dropout, self.seeds = list(dropout), list(seeds)
        tensors = {
            name: torch.stack([torch.stack([one[name] for one in group]) for group in states])
            for name in states[0][0]
        }
        self._sizes = {name: tensors[name].shape for name in self.parameter_names}
        self.theta = torch.cat([tensors[name].flatten() for name in self.parameter_names])
        self.grad = torch.zeros_like(self.theta)
        self.buffers = {
            name: tensor for name, tensor in tensors.items() if name not in self.parameter_names
        }
        self.parameters, self.gradients = self.unflatten(self.theta), self.unflatten(self.grad)

    @staticmethod
    def from_states(
        architecture: str,
        states: Sequence[Sequence[State]],
        dropout: Sequence[float],
        seeds: Sequence[int],
        *,
        multilabel: bool = False,
    ) -> Stack:
        """Build a stack from the state dicts of its heads.

        Args:
            architecture: linear or lesson (see `build_head`).
            states: The state dicts, [group][head].
            dropout: The dropout probability of each group.
            seeds: The seed of each group's dropout masks.
            multilabel: Whether images have several labels, so that a head of two classes needs
                the logits of both.
        """
        if architecture == "linear":
            return LinearStack(states, dropout, seeds, multilabel=multilabel)
        return LessonStack(states, dropout, seeds)

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Return views of a flat tensor (P,) by the names of the parameters, each (G, H, …)."""
        counts = [size.numel() for size in self._sizes.values()]
        pieces = zip(self._sizes.items(), torch.split(flat, counts), strict=True)
        return {name: piece.view(size) for (name, size), piece in pieces}

    def expand_to_weights(self, value_GH: Tensor) -> Tensor:
        """Repeat one value per head for each of the head's weights, (P,)."""
        parameters = self.unflatten(self.theta).values()
        groups, heads = self.shape
        expanded = [
            value_GH.view(groups, heads, *[1] * (one.dim() - 2)).expand_as(one)
            for one in parameters
        ]
        return torch.cat([one.flatten() for one in expanded])

    def select_heads(self, flat: Tensor, heads: Tensor) -> Tensor:
        """Select some heads' values from a flat tensor; heads: int64 (G', H'), positions in G x H.

        Returns:
            The flat tensor of a stack of these heads.
        """
        parts = self.unflatten(flat).values()
        return torch.cat([part.flatten(0, 1)[heads.flatten()].flatten() for part in parts])

    def finite_heads(self, flat: Tensor) -> Tensor:
        """Return which heads have only finite values in a flat tensor, bool (G, H)."""
        finite = [part.isfinite().flatten(2).all(2) for part in self.unflatten(flat).values()]
        return torch.stack(finite).all(0)

    def state(self, group: int, head: int, flat: Tensor | None = None) -> dict[str, Tensor]:
        """Copy one head's state dict for `restore_head`, with parameters from `flat` if given."""
        parameters = self.parameters if flat is None else self.unflatten(flat)
        tensors = parameters | self.buffers
        return {name: tensor[group, head].clone() for name, tensor in tensors.items()}

    @abstractmethod
    def logits(
        self,
        feature_GBD: Tensor,
        batch: BatchSlice | None = None,
        mask_GB: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Apply the heads.

        Args:
            feature_GBD: float16, G groups or 1 for all.
            batch: Given during training, for dropout and batch norm; None: inference.
            mask_GB: bool, the rows that count; None: all. The others are padding.
            dtype: Of matrix products; None: float32.

        Returns:
            float32 (G, H, C, B), up to a constant per row where images have one label.
        """

    @abstractmethod
    def values_per_row(self, width: int) -> int:
        """Return how many numbers `logits` holds in memory for each row of `width` features."""

    @abstractmethod
    def backward(self, grad_GHCB: Tensor) -> None:
        """Fill `grad`, given the loss's gradient at the logits of the last call of `logits`."""


class LinearStack(Stack):
    """Heads of standardization, dropout and one linear layer.

    Their gradients are two matrix products, without autograd.
    """

    parameter_names = ("2.weight", "2.bias")

    def __init__(
        self,
        states: Sequence[Sequence[State]],
        dropout: Sequence[float],
        seeds: Sequence[int],
        *,
        multilabel: bool,
    ) -> None:
        super().__init__(states, dropout, seeds)
        # With two classes only the difference of the logits matters: half the products.
        self._single_logit = self.parameters["2.bias"].shape[2] == 2 and not multilabel
        self._mean = self.buffers["0.mean"][:, :1]
        self._scale = 1 / self.buffers["0.deviation"][:, :1]
        self._buffer = self.theta.new_empty(0)

    @torch.no_grad()
    def logits(
        self,
        feature_GBD: Tensor,
        batch: BatchSlice | None = None,
        mask_GB: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """See `Stack.logits`."""
        groups, heads = self.shape
        rows, width = feature_GBD.shape[1:]
        # Allocating memory for each batch would take longer than the subtraction.
        if self._buffer.numel() < groups * rows * width:
            self._buffer = self.theta.new_empty(groups * rows * width)
        x_GBD = self._buffer[: groups * rows * width].view(groups, rows, width)
        torch.sub(feature_GBD, self._mean, out=x_GBD)
        if batch:
            for group, p in enumerate(self.dropout):
                if p:
                    mask = dropout_mask(self.seeds[group], 0, batch, rows, width, p)
                    x_GBD[group].mul_(mask.to(x_GBD))
        weight, bias = self.parameters["2.weight"], self.parameters["2.bias"]
        if self._single_logit:
            weight, bias = weight[:, :, 1] - weight[:, :, 0], bias[:, :, 1] - bias[:, :, 0]
        weight, bias = weight.reshape(groups, -1, width), bias.reshape(groups, -1, 1)
        # Divide the features or the weights by the standard deviation, whichever are fewer.
        self._features_scaled = weight.shape[1] > rows
        if self._features_scaled:
            x_GBD.mul_(self._scale)
        else:
            weight = weight * self._scale
        self._x = x_GBD if dtype is None else x_GBD.to(dtype)
        if dtype is None:
            logit = torch.baddbmm(bias, weight, x_GBD.mT)
        else:
            logit = torch.bmm(weight.to(dtype), self._x.mT).float() + bias
        logit = logit.view(groups, heads, weight.shape[1] // heads, rows)
        return nn.functional.pad(logit, (0, 0, 1, 0)) if self._single_logit else logit

    def values_per_row(self, width: int) -> int:
        """See `Stack.values_per_row`."""
        return self.shape[0] * width + self.parameters["2.bias"].numel()

    @torch.no_grad()
    def backward(self, grad_GHCB: Tensor) -> None:
        """See `Stack.backward`."""
        groups, heads = self.shape
        grad = grad_GHCB[:, :, 1:] if self._single_logit else grad_GHCB
        grad = grad.flatten(1, 2)
        weight_grad = torch.bmm(grad.to(self._x.dtype), self._x).float()
        if not self._features_scaled:
            weight_grad.mul_(self._scale)
        weight, bias = self.gradients["2.weight"], self.gradients["2.bias"]
        weight_grad, bias_grad = (
            weight_grad.view(groups, heads, -1, weight_grad.shape[2]),
            grad.sum(2).view(groups, heads, -1),
        )
        if self._single_logit:
            torch.neg(weight_grad[:, :, 0], out=weight[:, :, 0])
            torch.neg(bias_grad[:, :, 0], out=bias[:, :, 0])
            weight[:, :, 1:], bias[:, :, 1:] = weight_grad, bias_grad
        else:
            weight.copy_(weight_grad)
            bias.copy_(bias_grad)


class LessonStack(Stack):
    """Heads as in fast.ai's lesson, batched; their gradients come from autograd."""

    parameter_names = (
        "0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias", "6.weight", "6.bias",
    )  # fmt: skip

    def logits(
        self,
        feature_GBD: Tensor,
        batch: BatchSlice | None = None,
        mask_GB: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """See `Stack.logits`."""
        leaves = self._autograd_leaves() if batch else self.parameters
        x_GHBD = feature_GBD.to(self.theta.dtype).expand(self.shape[0], -1, -1)[:, None]
        with (
            torch.set_grad_enabled(batch is not None),
            torch.autocast(x_GHBD.device.type, dtype, enabled=dtype is not None),
        ):
            x = self._batch_norm(x_GHBD, "0", leaves, batch, mask_GB)
            x = self._dropout(x, 0, batch)
            x = (x @ leaves["2.weight"].mT + leaves["2.bias"][:, :, None]).relu()
            x = self._batch_norm(x.to(x_GHBD), "4", leaves, batch, mask_GB)
            x = self._dropout(x, 1, batch)
            self._logits = (leaves["6.weight"] @ x.mT).to(x_GHBD) + leaves["6.bias"][..., None]
        return self._logits.detach()

    def values_per_row(self, width: int) -> int:
        """See `Stack.values_per_row`."""
        return self.shape[0] * self.shape[1] * (width + 512) + self.parameters["6.bias"].numel()

    def backward(self, grad_GHCB: Tensor) -> None:
        """See `Stack.backward`."""
        self.grad.zero_()
        # .backward(grad_GHCB) would import sympy, which takes 1.7 s at the first step.
        (self._logits * grad_GHCB).sum().backward()  # type: ignore[no-untyped-call]
        del self._logits

    def _autograd_leaves(self) -> dict[str, Tensor]:
        """Return the parameters as leaves of autograd, which accumulates into `gradients`."""
        leaves = {
            name: parameter.detach().requires_grad_() for name, parameter in self.parameters.items()
        }
        for name, leaf in leaves.items():
            leaf.grad = self.gradients[name]
        return leaves

    def _batch_norm(
        self,
        x_GHBD: Tensor,
        name: str,
        leaves: Mapping[str, Tensor],
        batch: BatchSlice | None,
        mask_GB: Tensor | None,
    ) -> Tensor:
        """Batch norm over the rows of all workers (Ioffe & Szegedy, arXiv:1502.03167).

        Unlike `torch.nn.SyncBatchNorm` it serves many heads, leaves out padding, and runs on CPUs.
        """
        weight, bias = leaves[f"{name}.weight"], leaves[f"{name}.bias"]
        running = [self.buffers[f"{name}.running_{what}"] for what in ("mean", "var")]
        if batch is None:
            mean, var = (one[:, :, None] for one in running)
        else:
            mask = torch.ones_like(x_GHBD[..., :1])
            if mask_GB is not None:
                mask = mask * mask_GB[:, None, :, None]
            count, total = _sum_over_workers(batch, mask.sum(2), (x_GHBD * mask).sum(2))
            mean = (total / count)[:, :, None]
            (squares,) = _sum_over_workers(batch, ((x_GHBD - mean).square() * mask).sum(2))
            var = (squares / count)[:, :, None]
            with torch.no_grad():  # momentum 0.1 and the unbiased variance, as in BatchNorm1d
                running[0].lerp_(mean[:, :, 0].expand_as(running[0]), 0.1)
                unbiased = squares / (count - 1).clamp(min=1)
                running[1].lerp_(unbiased.expand_as(running[1]), 0.1)
                self.buffers[f"{name}.num_batches_tracked"].add_(1)
        normalized = (x_GHBD - mean) * (var + 1e-5).rsqrt()
        return normalized * weight[:, :, None] + bias[:, :, None]

    def _dropout(self, x_GHBD: Tensor, layer: int, batch: BatchSlice | None) -> Tensor:
        if batch is None or not any(self.dropout):
            return x_GHBD
        rows, width = x_GHBD.shape[2:]
        probabilities = [p / (2 - layer) for p in self.dropout]  # half before the first layer
        groups = zip(self.seeds, probabilities, strict=True)
        masks = [dropout_mask(seed, layer, batch, rows, width, p) for seed, p in groups]
        return x_GHBD * torch.stack(masks)[:, None].to(x_GHBD)


def _sum_over_workers(batch: BatchSlice, *sums: Tensor) -> list[Tensor]:
    """Add up sums over this worker's rows over all workers; differentiable."""
    if not batch.distributed:
        return list(sums)
    flat = all_reduce(torch.cat([one.flatten() for one in sums]))  # type: ignore[no-untyped-call]
    pieces: Any = flat.split([one.numel() for one in sums])
    return [piece.view_as(one) for piece, one in zip(pieces, sums, strict=True)]


def dropout_mask(
    seed: int, layer: int, batch: BatchSlice, rows: int, width: int, p: float
) -> Tensor:
    """Draw dropout's factors: 0 with probability p, else 1 / (1 - p).

    They depend only on (seed, layer, step) and a row's position in the global batch.

    Returns:
        float32 (rows, width), on the CPU.
    """
    generator = np.random.Generator(np.random.SFC64((seed, layer, batch.step)))
    drawn = generator.integers(65536, size=(batch.first_row + rows, width), dtype=np.uint16)
    kept = drawn[batch.first_row :] >= round(p * 65536)
    return torch.from_numpy(kept).float().div_(1 - p)
