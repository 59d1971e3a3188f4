"""The precision of a body's products: what this hardware is fast at, and weights rounded to it.

A recipe names the precision. Weights are rounded to it on every machine; activations are where the
hardware has units for it, and stay float32 elsewhere, where emulated units would take ten times as
long. Most of the difference to float32 comes from the weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from torch import nn

Precision = Literal["auto", "fp32", "bf16", "fp16"]
# Between the features in float32 and in the precision that `auto` chooses.
MIN_COSINE = 0.998


def dtype_of(precision: str) -> torch.dtype | None:
    """The dtype of the products of a precision; None means float32."""
    import torch

    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def has_units(precision: str, device: str) -> bool:
    """Whether a device computes products of this precision in silicon."""
    import torch

    if precision == "fp32":
        return True
    if device.startswith("cuda"):
        return precision == "fp16" or torch.cuda.get_device_capability(device) >= (8, 0)
    able = torch.cpu.get_capabilities()
    names = {"bf16": ("avx512_bf16", "amx_bf16", "bf16"), "fp16": ("avx512_fp16", "amx_fp16")}
    return any(able.get(name, False) for name in names[precision])


def best_device() -> str:
    """The device of this machine that computes features."""
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"


def emulation_line(precision: str) -> str:
    """A line for a machine that has no units for the precision of a recipe."""
    return (
        f"this machine has no {precision} units: it computes the body in fp32 with weights rounded"
        f" to {precision}, which is slower and gives slightly other features"
    )


def round_weights(net: nn.Module, dtype: torch.dtype, *, keep: bool) -> None:
    """Round the weights of convolutions and linear layers to a dtype, in place.

    keep: They are of this dtype then, for `torch.autocast`. Otherwise they are float32 again.
    """
    import torch
    from torch import nn

    layers = (nn.modules.conv._ConvNd, nn.Linear)
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, layers):
                rounded = layer.weight.to(dtype)
                layer.weight = nn.Parameter(
                    rounded if keep else rounded.float(), requires_grad=False
                )


def pictures(count: int, size: int) -> torch.Tensor:
    """Pictures from coarse blobs to noise, uint8 (B, 3, S, S), the same in every call."""
    import torch
    from torch.nn.functional import interpolate

    generator = torch.Generator().manual_seed(0)
    grids = [torch.rand(1, 3, n % 13 + 2, n % 13 + 2, generator=generator) for n in range(count)]
    images = torch.cat([interpolate(one, (size, size), mode="bilinear") for one in grids])
    noise = torch.rand(images.shape, generator=generator) - 0.5
    return ((images + 0.2 * noise).clamp(0, 1) * 255).round().to(torch.uint8)
