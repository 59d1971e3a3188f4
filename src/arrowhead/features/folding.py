"""Fold batch norms into the convolutions before them, in networks that torch.fx cannot trace.

torch.fx traces code, and much of timm's depends on sizes. This records one forward pass instead:
which convolution's output went into which batch norm, and nowhere else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

TOLERANCE = 1e-3  # of the largest output: folding changes the last bits only


@dataclass(slots=True)
class _Trace:
    """Calls of convolutions and batch norms in one forward pass, by ids of tensors."""

    conv_of_output: dict[int, int] = field(default_factory=dict)
    """The weight of the convolution by its output."""
    conv_of_norm: dict[int, int] = field(default_factory=dict)
    """The weight of the convolution by the running mean of the batch norm that read it."""
    uses: Counter[int] = field(default_factory=Counter)
    """How often a tensor was an input of an operation."""
    output_of_norm: dict[int, int] = field(default_factory=dict)
    """The convolution's output by the running mean of the batch norm."""
    alive: list[torch.Tensor] = field(default_factory=list)
    """Keeps tensors, so that no two have the same id."""


def fold_batch_norms(net: nn.Module, example_BCHW: torch.Tensor) -> int:
    """Fold every batch norm that directly follows a convolution, in place.

    The network stays as it is if its output would change by more than rounding.

    Args:
        net: In evaluation mode.
        example_BCHW: An input.

    Returns:
        The number of folded batch norms.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    noise_BCHW = torch.rand(example_BCHW.shape, generator=generator) - 0.5
    with torch.no_grad():
        expected, trace = _record(net, noise_BCHW)
        pairs = list(_pairs(net, trace))
        before = [_fold(net, *pair) for pair in pairs]
        try:
            folded = net(noise_BCHW)
            difference = float((folded - expected).abs().max())
            same = difference <= TOLERANCE * max(float(expected.abs().max()), 1e-6)
        except Exception:  # the network reads the batch norm's tensors itself
            same = False
        if not same:
            for (conv_name, norm_name), (weight, bias, norm) in zip(pairs, before, strict=True):
                conv: Any = net.get_submodule(conv_name)
                conv.weight, conv.bias = weight, bias
                net.set_submodule(norm_name, norm)
    return len(pairs) if same else 0


def _record(net: nn.Module, example_BCHW: torch.Tensor) -> tuple[torch.Tensor, _Trace]:
    """Run the network once and record its convolutions and batch norms."""
    import torch
    from torch.nn import functional
    from torch.overrides import TorchFunctionMode

    trace = _Trace()

    class Recorder(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if not isinstance(out, torch.Tensor | tuple | list):
                return out  # sizes and types are not uses
            is_conv = func in (functional.conv2d, torch.conv2d)
            flat = [*args, *(kwargs or {}).values()]
            flat += [one for group in flat if isinstance(group, list | tuple) for one in group]
            tensors = [one for one in flat if isinstance(one, torch.Tensor)]
            trace.uses.update({id(one) for one in tensors})
            trace.alive += tensors
            if is_conv and isinstance(out, torch.Tensor):
                trace.conv_of_output[id(out)] = id(args[1])
                trace.alive.append(out)
            elif func in (functional.batch_norm, torch.batch_norm):
                mean = next((one for one in tensors if one.dim() == 1), None)
                if mean is not None and id(args[0]) in trace.conv_of_output:
                    trace.conv_of_norm[id(mean)] = trace.conv_of_output[id(args[0])]
                    trace.output_of_norm[id(mean)] = id(args[0])
            return out

    with Recorder():
        out = net(example_BCHW)
    return out, trace


def _pairs(net: nn.Module, trace: _Trace) -> Iterator[tuple[str, str]]:
    """Names of convolutions and of the batch norms to fold into them."""
    from torch import nn

    convs = {
        id(module.weight): name
        for name, module in net.named_modules()
        if isinstance(module, nn.Conv2d)
    }
    for name, norm in net.named_modules(remove_duplicate=False):
        if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None or not norm.affine:
            continue
        is_plain = (
            type(norm) is nn.BatchNorm2d or {"drop", "act"} <= dict(norm.named_children()).keys()
        )
        weight = trace.conv_of_norm.get(id(norm.running_mean))
        once = (
            trace.uses[weight or 0] == 1
            and trace.uses[id(norm.running_mean)] == 1
            and trace.uses[trace.output_of_norm.get(id(norm.running_mean), 0)] == 1
        )
        if is_plain and weight in convs and once:
            yield convs[weight], name


def _fold(net: nn.Module, conv_name: str, norm_name: str) -> tuple[Any, Any, nn.Module]:
    """Fold one batch norm; returns the convolution's weight and bias and the norm, as they were."""
    from torch import nn
    from torch.nn.utils.fusion import fuse_conv_bn_weights

    conv: Any = net.get_submodule(conv_name)
    norm: Any = net.get_submodule(norm_name)
    before = conv.weight, conv.bias, norm
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight,
        conv.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    # timm's norms also activate: what remains of them stays.
    rest = [norm.drop, norm.act] if type(norm) is not nn.BatchNorm2d else []
    net.set_submodule(norm_name, nn.Sequential(*rest) if rest else nn.Identity())
    return before
