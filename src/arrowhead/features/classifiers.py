"""Networks as their own library builds them, with the last layer, for a number of classes.

The input of the last layer is the feature that a `backbone.Body` computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from arrowhead.errors import ConfigError
from arrowhead.features import torchvision_bodies
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


def classifier(body: str, classes: int) -> Classifier:
    """Build the network of `body` with a last layer for `classes` classes.

    Raises:
        ConfigError: If its last layer is not a linear layer with a bias.
    """
    import torch
    from torch import nn

    if body.startswith(TIMM_PREFIX):
        raise ConfigError(
            f"{body} is a network of timm, whose weights cannot be written for timm yet.",
            "a network of torchvision.",
            "export with --format onnx or pt2.",
        )
    models = torchvision_bodies.import_models()
    options: dict[str, Any] = {"num_classes": classes}
    if body in ("googlenet", "inception_v3"):  # as `torchvision_bodies` builds them
        options |= {"aux_logits": False, "init_weights": False, "transform_input": True}
    with torch.random.fork_rng(devices=[]):
        net: nn.Module = models.get_model(body, weights=None, **options)
    linear = {name: one for name, one in net.named_modules() if isinstance(one, nn.Linear)}
    name = list(linear)[-1] if linear else ""
    if not linear or linear[name].bias is None or linear[name].out_features != classes:
        raise ConfigError(
            f"torchvision's {body} does not end with a linear layer that has a bias, so it cannot"
            " hold this head.",
            "a network that ends with a linear layer.",
            "export with --format onnx or pt2.",
        )
    return Classifier(
        library="torchvision",
        architecture=body,
        options=options,
        net=net.eval(),
        last_layer=name,
    )
