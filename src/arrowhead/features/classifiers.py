"""Networks as their own library builds them, with the last layer, for a number of classes.

The input of the last layer is the feature that a `backbone.Body` computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from arrowhead.errors import ConfigError
from arrowhead.features import timm_bodies, torchvision_bodies
from arrowhead.features.networks import TIMM_PREFIX

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Classifier:
    """A network with its last layer.

    Attributes:
        library: torchvision or timm.
        architecture: The library's name of the network.
        options: What the library's function takes to build it, `num_classes` included.
        net: The network with random weights, in evaluation mode.
        last_layer: The name of its last layer.
    """

    library: str
    architecture: str
    options: dict[str, Any]
    net: nn.Module
    last_layer: str

    @property
    def expression(self) -> str:
        """The Python expression that builds the network."""
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        if self.library == "timm":
            return f"timm.create_model({self.architecture!r}, {arguments})"
        return f"torchvision.models.{self.architecture}({arguments})"


def library_of(body: str) -> str:
    """The library that builds a body: torchvision or timm."""
    return "timm" if body.startswith(TIMM_PREFIX) else "torchvision"


def classifier(body: str, classes: int, size: int) -> Classifier:
    """Build the network of `body` with a last layer for `classes` classes.

    Args:
        body: As in a recipe.
        classes: The number of outputs.
        size: Side of the input in pixels.

    Raises:
        ConfigError: If its last layer is not a linear layer with a bias.
    """
    from torch import nn

    options: dict[str, Any] = {"num_classes": classes}
    if library_of(body) == "timm":
        options |= timm_bodies.size_options(body, size)
        net, name = timm_bodies.build_classifier(body, options)
    else:
        options |= torchvision_bodies.build_options(body, size)
        net = torchvision_bodies.build_classifier(body, options)
        name = [one for one, module in net.named_modules() if isinstance(module, nn.Linear)][-1]
    last = dict(net.named_modules()).get(name)
    if not isinstance(last, nn.Linear) or last.bias is None or last.out_features != classes:
        raise ConfigError(
            f"{body} does not end with a linear layer with a bias, which could hold this head.",
            "a network that ends with a linear layer.",
            "export with --format onnx or pt2.",
        )
    return Classifier(
        library=library_of(body),
        architecture=body.removeprefix(TIMM_PREFIX),
        options=options,
        net=net.eval(),
        last_layer=name,
    )
