"""The last feature map of a body: which part of an image gives which features.

    uint8 pixels (B, 3, S, S)
      -> feature map     float32 (B, K, h, w), what the network pools
      -> features        float32 (B, D), as `Body` computes them, differentiable by the map

The map is found in the network's torch.fx graph: the input of its last average pooling. A vision
transformer does not pool; its map is the tokens of the patches that its last attention layer reads.
For timm's networks see `split_maps`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from arrowhead.features.backbone import Body
from arrowhead.features.networks import TIMM_PREFIX
from arrowhead.features.split_maps import SplitMaps, no_map_error

if TYPE_CHECKING:
    import torch
    from torch import fx

# Layers that may follow the pooling if the features are still the average of the map.
SHAPE_LAYERS = {"flatten", "Dropout", "Flatten", "Identity", "output"}


def feature_maps(body: Body) -> FeatureMaps | SplitMaps:
    """What gives the last feature map of a body; ConfigError if there is none."""
    return SplitMaps(body) if body.name.startswith(TIMM_PREFIX) else FeatureMaps(body)


class FeatureMaps:
    """Runs a body as `Body.__call__` does, and gives the last feature map beside the features.

    Args:
        body: The body, which stays as it is.

    Attributes:
        averaged: Whether the features are the average of the map over its positions.

    Raises:
        ConfigError: If no feature map is found in the network.
    """

    def __init__(self, body: Body) -> None:
        from torch import fx

        self._body = body
        self._module: Any = body.module
        if not isinstance(self._module.net, fx.GraphModule):
            raise no_map_error(body.name)
        nodes = list(self._module.net.graph.nodes)
        layers = [_layer(self._module.net, node) for node in nodes]
        self._has_tokens = self.averaged = False
        if body.pool != "avg":
            reader = len(nodes) - 1  # the network's output is the map
        elif pooling := [i for i, node in enumerate(nodes) if _is_pooling(node, layers[i])]:
            reader = pooling[-1]
            after = {_name(layer) for layer in layers[reader + 1 :]}
            self.averaged = _is_global(nodes[reader], layers[reader]) and after <= SHAPE_LAYERS
        elif "MultiheadAttention" in (names := [_name(layer) for layer in layers]):
            reader = len(names) - 1 - names[::-1].index("MultiheadAttention")
            self._has_tokens = True
        else:
            raise no_map_error(body.name)
        self._map_node = nodes[reader].all_input_nodes[0]
        self._start, self._stride = _receptive_fields(self._module.net, self._map_node)

    def extent(self, positions: int, size: int) -> tuple[float, float]:
        """Where the map lies in the pixels along each axis, as shares of their size.

        Position i of a ResNet's map is computed from the pixels around 32 i, not from those around
        32 i + 16 as if the map divided the pixels into equal cells: its map lies further left and
        up than the pixels. That of a ConvNeXt, a Swin or a vision transformer does not.

        Args:
            positions: Of the map along the axis, h or w.
            size: Of the pixels along the axis, S.
        """
        length = positions * self._stride
        if not size / 2 < length < 2 * size:  # it is made smaller by other means, such as slices
            return 0.0, 1.0
        first = self._start + 0.5 - self._stride / 2
        return first / size, (first + length) / size

    def __call__(self, pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Feature map (B, K, h, w) and features (B, D) of a batch of pixels, uint8 (B, 3, S, S).

        The map is a leaf that requires a gradient; only what follows it is recorded.
        """
        import torch
        from torch import fx

        map_node, split = self._map_node, _split_tokens if self._has_tokens else _split_map

        class Run(fx.Interpreter):
            """Starts to record for gradients at the feature map."""

            map_BKhw: torch.Tensor | None = None

            def run_node(self, n: fx.Node) -> Any:
                with torch.set_grad_enabled(self.map_BKhw is not None):
                    result = super().run_node(n)
                if n is not map_node:
                    return result
                with torch.enable_grad():
                    self.map_BKhw, result = split(result)
                return result

        run = Run(self._module.net)
        with torch.no_grad(), self._body.autocast():
            output = run.run(self._module.normalize(pixels_BCHW.to(self._body.device)))
            with torch.enable_grad():
                feature_BD = self._module.pool_output(output)
        assert run.map_BKhw is not None
        return run.map_BKhw, feature_BD


def _split_map(map_BKhw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The map as a float32 leaf, and what the next layer reads, computed from it."""
    leaf = map_BKhw.detach().float().requires_grad_()
    return leaf, leaf.to(map_BKhw)


def _split_tokens(token_BTK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_split_map`, for tokens: one of the class, then those of the patches, row by row."""
    import torch

    rows, tokens, width = token_BTK.shape
    side = math.isqrt(tokens - 1)
    patch_BKT = token_BTK[:, 1:].detach().mT.float()
    leaf = patch_BKT.reshape(rows, width, side, side).requires_grad_()
    return leaf, torch.cat([token_BTK[:, :1].detach(), leaf.flatten(2).mT.to(token_BTK)], 1)


def _layer(net: fx.GraphModule, node: fx.Node) -> Any:
    """The module, function or method name that a node calls."""
    return net.get_submodule(str(node.target)) if node.op == "call_module" else node.target


def _name(layer: Any) -> str:
    """The name of a layer's type or function."""
    return str(
        getattr(layer, "__name__", layer if isinstance(layer, str) else type(layer).__name__)
    )


def _is_pooling(node: fx.Node, layer: Any) -> bool:
    """Whether a node averages a map, to one position or to a few."""
    averages_map = _name(layer) == "mean" and [2, 3] in node.args
    return averages_map or _name(layer) in ("AdaptiveAvgPool2d", "adaptive_avg_pool2d")


def _is_global(node: fx.Node, layer: Any) -> bool:
    """Whether a pooling node averages all positions."""
    size = getattr(layer, "output_size", node.args[-1])
    return _name(layer) == "mean" or size in (1, (1, 1), [1, 1])


def _receptive_fields(net: fx.GraphModule, map_node: fx.Node) -> tuple[float, float]:
    """The center of a map's first receptive field, and the distance of two centers, in pixels.

    Computed from kernel sizes, strides and paddings (Dumoulin and Visin 2016, arXiv:1603.07285).
    """
    fields: dict[fx.Node, tuple[float, float]] = {}
    for node in net.graph.nodes:
        inputs = [fields[one] for one in node.all_input_nodes]
        start, stride = max(inputs, key=lambda field: field[1], default=(0.0, 1.0))
        layer = _layer(net, node)
        if _name(layer) in ("Conv2d", "MaxPool2d", "AvgPool2d"):
            kernel, step, padding, dilation = (
                value[0] if isinstance(value, tuple) else value
                for value in (
                    layer.kernel_size,
                    layer.stride,
                    layer.padding,
                    getattr(layer, "dilation", 1),
                )
            )
            start += ((kernel - 1) * dilation / 2 - padding) * stride
            stride *= step
        fields[node] = (start, stride)
        if node is map_node:
            break
    return fields[map_node]
