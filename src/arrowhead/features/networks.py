"""What the makers of networks (`torchvision_bodies`, `timm_bodies`) have in common.

name                   resnet34 (torchvision) or timm/resnet34.a1_in1k
  -> maker             builds the network without its classifier, and loads published weights
  -> Network           float (B, 3, S, S) -> last feature map or tokens -> features (B, D)
  -> `backbone.Body`   uint8 (B, 3, S, S) -> float32 (B, D)
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from arrowhead import fileio
from arrowhead.data import remote_folder
from arrowhead.decode.pixels import PixelConfig
from arrowhead.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch
    from torch import nn

Triple = tuple[float, float, float]
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt")  # a --weights value that ends so is a file
# Under these, weights may be used for anything; others ask for --accept-license.
PERMISSIVE_LICENSES = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0")
TIMM_PREFIX = "timm/"
ORIGIN_KEY = "arrowhead.origin"  # of the metadata in a .safetensors file
TUNED_PREFIX = "fine-tuned from "  # of the source of weights, in their origin
BUNDLED_BODY = "timm/tf_efficientnet_lite0"
Pool = Literal["auto", "avg", "max", "concat", "cls", "cls+avg"]
MAP_POOLS, TOKEN_POOLS = ("avg", "max", "concat"), ("cls", "avg", "cls+avg")


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """Weights as a maker loads them, and how their images were prepared.

    Attributes:
        state: Tensors by name; may include those of the classifier.
        mean: Per channel, of pixels scaled to 0..1.
        std: Likewise.
        pixels: Size, resize mode, interpolation and crop percentage.
        license: As published, such as apache-2.0; "" if unknown.
        source: Where they come from: an address, a file, or "random".
    """

    state: dict[str, torch.Tensor]
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    pixels: PixelConfig = PixelConfig()
    license: str = ""
    source: str = "random"


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """A network without its classifier, ready for inference.

    Attributes:
        net: From normalized pixels, float (B, 3, S, S), to what `pool_output` reads.
        pool: The pooling, with auto resolved, as the recipe records it.
        pool_output: From the output of `net`, as float32, to features (B, D).
    """

    net: nn.Module
    pool: str
    pool_output: Callable[[torch.Tensor], torch.Tensor]


def pool_map(pool: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function that pools a feature map (B, K, h, w) to (B, D) by avg, max or concat."""
    import torch

    def pooled(map_BKhw: torch.Tensor) -> torch.Tensor:
        if pool == "avg":
            return map_BKhw.mean((2, 3))
        highest = map_BKhw.amax((2, 3))
        return highest if pool == "max" else torch.cat([map_BKhw.mean((2, 3)), highest], 1)

    return pooled


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a .safetensors, .pth or .pt file; nothing in it is executed.

    Raises:
        ConfigError: If there is no such file.
        DataError: If it cannot be read.
    """
    import safetensors.torch
    import torch

    require_file(path)
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        return _unwrap(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise DataError(
            f"{path} cannot be read: {(str(error) or repr(error)).splitlines()[0][:200]}",
            "tensors by name: safetensors, or a state dict saved by torch.save.",
            "save it again with safetensors; pickled models are not opened.",
        ) from error


def write_weights(path: Path, state: Mapping[str, torch.Tensor], origin: Mapping[str, Any]) -> None:
    """Write tensors as a .safetensors file for `--weights`, with what `read_origin` reads."""
    import safetensors.torch

    metadata = {ORIGIN_KEY: json.dumps(origin, sort_keys=True)}
    with fileio.atomic_write(path) as draft:
        draft.write_bytes(safetensors.torch.save(dict(state), metadata))


def read_origin(path: Path) -> dict[str, Any]:
    """What Arrowhead wrote about the origin of the tensors into a .safetensors file; {} if nothing.

    Its keys are those of `backbone.Weights.origin`, and what made the weights of others.
    """
    import safetensors

    if path.suffix != ".safetensors":
        return {}
    try:
        with safetensors.safe_open(path, "pt") as file:
            origin = json.loads((file.metadata() or {}).get(ORIGIN_KEY, "{}"))
    except (OSError, ValueError, safetensors.SafetensorError):
        return {}
    return origin if isinstance(origin, dict) else {}


def _unwrap(content: Any) -> dict[str, torch.Tensor]:
    """The state dict in a checkpoint, which training scripts save together with other things."""
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(content.get(key), dict):
            return _unwrap(content[key])
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def load_tensors(net: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Load tensors by name, of the version of the network that the library builds today.

    A safetensors file holds no version numbers, and MNASNet refuses tensors without its own. Layers
    get none: batch norms without one may lack the count of batches, which old files do.

    Raises RuntimeError if names or shapes differ.
    """
    versioned = OrderedDict(state)
    vars(versioned)["_metadata"] = {"": {"version": net._version}}
    net.load_state_dict(versioned)


def require_file(path: Path) -> None:
    """Raise ConfigError if the file of weights does not exist; of an address, fetch it."""
    remote_folder.of(path.parent).fetch_changed(path)
    if not path.is_file():
        raise ConfigError(
            f"--weights {path} does not exist.",
            "a .safetensors or .pth file of the body's weights.",
            "check the path, or use --weights auto.",
        )


def offline_error(body: str, found: str) -> ConfigError:
    """The error for published weights that are not here and cannot be downloaded."""
    return ConfigError(
        found,
        "the file in the cache, or a network connection.",
        "give a file that you have (--weights PATH.safetensors or PATH.pth), or use the ImageNet"
        f" weights that Arrowhead is installed with (--body {BUNDLED_BODY} --weights bundled), or"
        " untrained ones (--weights random).",
    )


def size_error(body: str, size: int, usual: int, error: Exception) -> ConfigError:
    """The error for images of a size that a network does not take.

    usual: the size that its weights were made for, in pixels.
    """
    reason = str(error).strip().splitlines()[0][:200]
    if size == usual:
        return ConfigError(
            f"{body} cannot compute features: {reason}.",
            "a network that takes one batch of pixels and returns one row for each image.",
            "give another --body.",
        )
    return ConfigError(
        f"{body} cannot compute features of {size} x {size} pixels: {reason}.",
        f"a size that this network takes, such as {usual}, which it was trained with.",
        f"give --size {usual}, or another --body.",
    )


def is_weights_file(weights: str) -> bool:
    """Whether a --weights value is the path of a file."""
    return Path(weights).suffix in WEIGHTS_SUFFIXES
