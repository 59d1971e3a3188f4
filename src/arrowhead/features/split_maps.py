"""The last feature map, or the last tokens, of a network of timm.

timm's networks are split into `forward_features` and `forward_head`: what lies between them is the
map that `feature_maps` finds in the graph of a network of torchvision. The tokens of a transformer
are taken where its last block reads them: after it, a class token no longer depends on them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from arrowhead.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from arrowhead.features.backbone import Body

EXAMPLES = 2


class SplitMaps:
    """Runs a body as `Body.__call__` does, and gives the map or tokens beside the features.

    Args:
        body: A body of timm, which stays as it is.

    Attributes:
        averaged: Whether the features are the average of the map over its positions.

    Raises:
        ConfigError: If the network has no map, nor tokens that lie on a square grid.
    """

    def __init__(self, body: Body) -> None:
        import torch

        module: Any = body.module
        self._body, self._module, self._net = body, module, module.net
        generator = torch.Generator().manual_seed(0)
        pixels = torch.rand(EXAMPLES, 3, body.size, body.size, generator=generator) * 255
        noise = self._module.normalize(pixels.to(body.device))
        with torch.inference_mode(), body.autocast():
            out = self._net.feature_map(noise)
        self._block = None if _is_map(out) else _last_block(self._net.net)
        if self._block is None and not _is_map(out):
            raise no_map_error(body.name)
        with torch.no_grad(), body.autocast():
            self._field = _receptive_field(self._net, noise) if _is_map(out) else (0.0, 0.0)
            map_BKhw, feature_BD = self._run(noise)
        average_BK = map_BKhw.mean((2, 3))
        self.averaged = self._block is None and (
            average_BK.shape == feature_BD.shape
            and torch.allclose(average_BK, feature_BD, rtol=1e-4, atol=1e-5)
        )

    def extent(self, positions: int, size: int) -> tuple[float, float]:
        """Where the map lies in the pixels along each axis, as `FeatureMaps.extent`."""
        start, stride = self._field
        length = positions * stride
        if not size / 2 < length < 2 * size:
            return 0.0, 1.0
        first = start + 0.5 - stride / 2
        return first / size, (first + length) / size

    def __call__(self, pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Feature map (B, K, h, w) and features (B, D) of a batch of pixels, uint8 (B, 3, S, S).

        The map is a leaf that requires a gradient; only what follows it is recorded.
        """
        import torch

        with torch.no_grad(), self._body.autocast():
            return self._run(self._module.normalize(pixels_BCHW.to(self._body.device)))

    def _run(self, normalized_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        if self._block is None:
            out = self._net.feature_map(normalized_BCHW)
            leaf = out.detach().float().requires_grad_()
            with torch.enable_grad():
                return leaf, self._net.pool(leaf.to(out)).float()
        leaves: list[torch.Tensor] = []

        def start_recording(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            torch.set_grad_enabled(True)  # until the end of the `no_grad` around this
            leaf, tokens = _split_tokens(args[0], self._net.prefix_tokens, self._body.name)
            leaves.append(leaf)
            return (tokens, *args[1:])

        hook = self._block.register_forward_pre_hook(start_recording)
        try:
            with torch.no_grad():
                feature_BD = self._net(normalized_BCHW).float()
        finally:
            hook.remove()
        if not leaves:
            raise no_map_error(self._body.name)
        return leaves[0], feature_BD


def _is_map(out: Any) -> bool:
    return getattr(out, "ndim", 0) == 4


def _last_block(net: Any) -> nn.Module | None:
    """The last block of a transformer."""
    blocks = list(getattr(net, "blocks", []))
    return blocks[-1] if blocks else None


def _split_tokens(
    token_BTK: torch.Tensor, prefix: int, body: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of the patches as a map, a float32 leaf, and all tokens computed from it."""
    import torch

    if token_BTK.ndim != 3:
        raise no_map_error(body)
    rows, tokens, width = token_BTK.shape
    side = math.isqrt(max(tokens - prefix, 0))
    if side < 2 or side * side != tokens - prefix:
        raise no_map_error(body)
    patch_BKT = token_BTK[:, prefix:].detach().mT.float()
    leaf = patch_BKT.reshape(rows, width, side, side).requires_grad_()
    patches = leaf.flatten(2).mT.to(token_BTK)
    return leaf, torch.cat([token_BTK[:, :prefix].detach(), patches], 1)


def _receptive_field(net: nn.Module, normalized_BCHW: torch.Tensor) -> tuple[float, float]:
    """The center of a map's first receptive field, and the distance of two centers, in pixels.

    Computed from the layers that shrink the map, the first of each size in the order in which they
    run (Dumoulin and Visin 2016, arXiv:1603.07285).
    """
    from torch import nn

    shrinking: dict[int, tuple[float, int]] = {}

    def look(layer: Any, args: Any, out: Any) -> None:
        before, after = args[0].shape[-1], out.shape[-1]
        step, kernel, padding, dilation = (
            value[-1] if isinstance(value, tuple) else value
            for value in (
                layer.stride,
                layer.kernel_size,
                layer.padding,
                getattr(layer, "dilation", 1),
            )
        )
        if args[0].ndim != 4 or step == 1 or before in shrinking:
            return
        reach = (kernel - 1) * dilation
        # Layers with TensorFlow's padding pad as much as the size needs, half of it before.
        needed = max((after - 1) * step + reach + 1 - before, 0) // 2
        shrinking[before] = (
            reach / 2 - (padding if isinstance(padding, int) and padding else needed),
            step,
        )

    layers = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
    hooks = [m.register_forward_hook(look) for m in net.modules() if isinstance(m, layers)]
    try:
        net(normalized_BCHW)
    finally:
        for hook in hooks:
            hook.remove()
    start, stride = 0.0, 1.0
    for _, (shift, step) in sorted(shrinking.items(), reverse=True):
        start += shift * stride
        stride *= step
    return start, stride


def no_map_error(body: str) -> ConfigError:
    """The error for a network in which no map is found."""
    return ConfigError(
        f"No feature map was found in {body}.",
        "a network that averages its last feature map, or a vision transformer.",
        "use another --body if you want to see where the network looked.",
    )
