"""A bundle as weights for a network of torchvision or timm, to be loaded without Arrowhead.

    body                     all layers but the last, as they were before batch norms were folded
    + standardization, linear layer, temperature
      -> one linear layer    the last layer of the network
      -> safetensors         for `load_state_dict`

The linear layer W, b on features standardized by mean m and deviation s, at temperature T, is the
linear layer W / (s T), (b - W (m / s)) / T on the features themselves. Other heads have no such
form, and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.bundle.format import Bundle
from arrowhead.bundle.reference import Reference
from arrowhead.errors import ConfigError, DataError
from arrowhead.features import classifiers
from arrowhead.features.backbone import Body
from arrowhead.features.classifiers import Classifier

if TYPE_CHECKING:
    import torch

LOGIT_TOLERANCE = 1e-4  # relative for logits beyond 1


@dataclass(frozen=True, kw_only=True, slots=True)
class LibraryWeights:
    """A network of another library, and the tensors that make it the bundle's classifier."""

    classifier: Classifier
    state: dict[str, torch.Tensor]


def make_weights(bundle: Bundle, library: str) -> LibraryWeights:
    """The bundle's weights under the names of the library.

    Raises:
        ConfigError: If the library has no network that computes what the bundle computes.
    """
    recipe = bundle.recipe
    if library != (own := classifiers.library_of(recipe.body)):
        raise ConfigError(
            f"The body of this bundle, {recipe.body}, is of {own}, not of {library}.",
            f"--format {own}.",
            f"give --format {own}.",
        )
    if reason := _why_not(bundle):
        raise ConfigError(
            f"This bundle cannot be written as weights of {library}: {reason}.",
            "a linear head on the features that the network itself pools.",
            "train with --head logistic or linear and without --pool, or export with --format onnx"
            " or pt2, which take every bundle.",
        )
    classifier = classifiers.classifier(recipe.body, len(bundle.classes), recipe.size)
    weight, bias = fold_head(bundle.head_state, bundle.temperature)
    state = dict(bundle.body_state)
    state |= {f"{classifier.last_layer}.weight": weight, f"{classifier.last_layer}.bias": bias}
    try:
        classifier.net.load_state_dict(state)
    except (RuntimeError, ValueError) as error:  # MNASNet wants a version number with its tensors
        message = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{library}'s {recipe.body} does not load the tensors of this bundle: {message}",
            "a network that takes a plain state dict.",
            "export with --format onnx or pt2, which take every bundle.",
        ) from error
    return LibraryWeights(classifier=classifier, state=state)


def _why_not(bundle: Bundle) -> str:
    """Why a bundle is no linear layer on the network's own features; "" if it is."""
    recipe = bundle.recipe
    if bundle.head != "linear":
        return (
            f"its head is {bundle.head} (two linear layers with a ReLU between them), and a network"
            " of the library ends with one linear layer"
        )
    own = Body(
        recipe.body,
        bundle.body_state,
        pool="auto",
        mean=recipe.mean,
        std=recipe.std,
        size=recipe.size,
    ).pool
    if recipe.pool != own:
        return (
            f"its features are pooled with {recipe.pool}, and the network of the library pools with"
            f" {own}"
        )
    return ""


def fold_head(
    state: Mapping[str, torch.Tensor], temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fold standardization and temperature into the linear layer of a linear head.

    Args:
        state: The head's tensors, see `training.heads.build_head`.
        temperature: Divides the logits.

    Returns:
        weight: float32 (C, D).
        bias: float32 (C,).
    """
    mean, deviation = state["0.mean"].double(), state["0.deviation"].double()
    weight = state["2.weight"].double() / deviation
    bias = (state["2.bias"].double() - weight @ mean) / temperature
    return (weight / temperature).float(), bias.float()


def write(weights: LibraryWeights, metadata_json: str, file: Path) -> None:
    """Write the tensors to a safetensors file; its metadata has the entry `arrowhead`."""
    import safetensors.torch

    tensors = {name: tensor.contiguous().clone() for name, tensor in weights.state.items()}
    metadata = {"format": "pt", "arrowhead": metadata_json}
    file.write_bytes(safetensors.torch.save(tensors, metadata))


def check(bundle: Bundle, reference: Reference, weights: LibraryWeights, file: Path) -> float:
    """The largest difference of a logit between the written file and the bundle.

    The logits of the bundle are those of features that are not rounded to float16.

    Raises:
        DataError: If a logit differs by more than LOGIT_TOLERANCE, or a label differs.
    """
    import safetensors.torch
    import torch

    net, recipe = weights.classifier.net, bundle.recipe
    net.load_state_dict(safetensors.torch.load_file(file))
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (recipe.mean, recipe.std))
    with torch.inference_mode():
        logits = net((torch.from_numpy(reference.pixels).float() / 255 - mean) / std)
        prob = logits.sigmoid() if bundle.multi else logits.softmax(1)
    logit_BC, prob_BC = logits.numpy(), prob.numpy()
    scale_BC = np.maximum(1, np.abs(reference.logits))
    difference_BC: NDArray[Any] = np.abs(logit_BC - reference.logits)
    changed_B = (
        bundle.predict_labels(prob_BC) != bundle.predict_labels(reference.probabilities)
    ).any(1)
    if not bundle.golden:  # random images may lie on a decision boundary
        changed_B &= bundle.margin(reference.probabilities) > LOGIT_TOLERANCE
    if changed_B.any() or not (difference_BC <= LOGIT_TOLERANCE * scale_BC).all():
        raise DataError(
            f"{weights.classifier.library} gives the {reference.description} other logits with this"
            f" file than the bundle: largest difference {difference_BC.max():.2g},"
            f" {int(changed_B.sum())} of {len(changed_B)} labels changed. It was not kept.",
            f"a difference of at most {LOGIT_TOLERANCE:g}, and the same labels.",
            "export with --format onnx or pt2, and please report it.",
        )
    return float(difference_BC.max())
