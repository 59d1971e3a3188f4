"""Layers that see the global batch, so that the number of workers does not change a training.

    batch norm    takes its statistics from the rows of all workers
    dropout       draws its mask for the rows of all workers, and takes this worker's

Both are drawn or computed from (seed, step) and the rows' position alone, so there is no random
state to save. torch's SyncBatchNorm runs on GPUs only, and its dropout has a state per worker.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.overrides import TorchFunctionMode


BATCH_NORM_ARGUMENTS = (
    "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class GlobalRows:
    """This worker's rows of a part of a global batch.

    Attributes:
        key: Seed of the masks: of the training, its step and the part.
        first: Position of this worker's first row.
        count: Number of its rows.
        total: Number of rows of all workers.
        workers: Number of workers.
    """

    key: tuple[int, ...]
    first: int
    count: int
    total: int
    workers: int


def has_random_layers(net: nn.Module) -> bool:
    """Whether a module that is in training mode drops something."""
    for module in net.modules():
        names = ("p", "drop_prob", "drop_rate")
        shares = [getattr(module, name, 0.0) for name in names]
        if module.training and any(isinstance(p, float) and p > 0 for p in shares):
            return True
    return False


def trains_batch_norms(net: nn.Module) -> bool:
    """Whether a batch norm takes its statistics from the batch."""
    from torch import nn

    base = nn.modules.batchnorm._BatchNorm
    return any(isinstance(module, base) and module.training for module in net.modules())


def seen_by_layers(rows: GlobalRows) -> TorchFunctionMode:
    """A context in which batch norm and dropout see the global batch."""
    import torch
    from torch.nn import functional
    from torch.overrides import TorchFunctionMode

    class GlobalBatch(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self._drawn = 0

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            if func is functional.dropout:
                return self._dropout(*args, **kwargs)
            if func is torch.Tensor.bernoulli_ and len(args) > 1 and _per_row(args[0]):
                target: Tensor = args[0]
                return target.copy_(self._draw(target, float(args[1])))
            if func is functional.batch_norm and rows.workers > 1:
                given = dict(zip(BATCH_NORM_ARGUMENTS, args, strict=False)) | kwargs
                return _batch_norm(rows, given) if given["training"] else func(*args, **kwargs)
            return func(*args, **kwargs)

        def _dropout(
            self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
        ) -> Tensor:
            if not training or not p:
                return input
            if not _per_row(input):
                return functional.dropout(input, p)
            return input * self._draw(input, 1 - p).div_(1 - p)

        def _draw(self, like: Tensor, keep: float) -> Tensor:
            """1 with probability `keep`, else 0, in the shape of `like`."""
            generator = torch.Generator(like.device)
            generator.manual_seed(_mix(*rows.key, self._drawn))
            self._drawn += 1
            copies = like.shape[0] // rows.count  # windows of attention: several rows an image
            shape = (rows.total * copies, *like.shape[1:])
            kept = torch.rand(shape, generator=generator, device=like.device) < keep
            return kept[rows.first * copies :][: like.shape[0]].to(like.dtype)

    def _per_row(tensor: Tensor) -> bool:
        return tensor.dim() > 0 and tensor.shape[0] > 0 and tensor.shape[0] % rows.count == 0

    return GlobalBatch()


def _mix(*numbers: int) -> int:
    import numpy as np

    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def _batch_norm(rows: GlobalRows, given: Mapping[str, Any]) -> Tensor:
    """Batch norm over the rows of all workers (Ioffe & Szegedy, arXiv:1502.03167).

    given: the arguments of `torch.nn.functional.batch_norm` by name.
    """
    import torch
    from torch.distributed.nn.functional import all_reduce

    input: Tensor = given["input"]
    running_mean, running_var = given["running_mean"], given["running_var"]
    weight, bias = given.get("weight"), given.get("bias")
    momentum, eps = given.get("momentum", 0.1), given.get("eps", 1e-5)
    x = input.float()
    count = rows.total * math.prod(input.shape[2:])
    axes = [axis for axis in range(x.dim()) if axis != 1]
    shape = [-1 if axis == 1 else 1 for axis in range(x.dim())]
    mean = all_reduce(x.sum(axes)) / count  # type: ignore[no-untyped-call]
    centered = x - mean.view(shape)
    var = all_reduce(centered.square().sum(axes)) / count  # type: ignore[no-untyped-call]
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (count / max(count - 1, 1))).to(running_var.dtype), momentum)
    out = centered * (var + eps).rsqrt().view(shape)
    if weight is not None:
        out = out * weight.view(shape)
    if bias is not None:
        out = out + bias.view(shape)
    normalized: Tensor = out.to(input.dtype)
    return normalized
