"""Bodies: pretrained torchvision backbones without their final layer, one feature row per image.

    name, weights          of torchvision, from a file, or random
      -> load              float32 tensors by name, their sha256, mean and std
      -> Body              uint8 (B, 3, S, S) -> float32 (B, D), batch norm folded, channels last

Unlike torchvision and timm, loading checks the hash of a cached file, never unpickles code, and
identifies weights by their tensors, whichever file they came from.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import socket
import sys
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from arrowhead.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch
    from torch import nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt")  # a --weights value that ends so is a file
DOWNLOAD_TIMEOUT_SECONDS = 20
HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,})\.")  # torchvision's names: resnet18-f37072fd.pth
AUXILIARY_HEADS = ("aux1.", "aux2.", "AuxLogits.")  # of GoogLeNet and Inception, for training only


@dataclass(frozen=True, kw_only=True, slots=True)
class BodyConfig:
    """The network that turns an image into a feature."""

    body: str = "resnet34"
    """Any torchvision classification network, its final layer removed."""
    weights: str = "auto"
    """auto: torchvision's default ImageNet weights, from the torch hub cache or downloaded;
    a torchvision weights name (IMAGENET1K_V1); a .safetensors or .pth file; or random (untrained).
    """
    mean: tuple[float, float, float] | None = None
    """Channel means that the weights were trained with, of pixels scaled to 0..1. Default: those of
    ImageNet."""
    std: tuple[float, float, float] | None = None
    """Channel standard deviations, likewise."""
    pool: Literal["avg", "max", "concat"] = "avg"
    """Pooling from the last feature map to one row; concat joins avg and max, as fast.ai does."""

    def __post_init__(self) -> None:
        if self.std is not None and not all(value > 0 for value in self.std):
            raise ConfigError(
                f"--std is {self.std}.", "three numbers above 0.", "give e.g. --std 0.5 0.5 0.5."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """A body's tensors by name, without the final layer, and the normalization of its input."""

    state: dict[str, torch.Tensor]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def sha256(self) -> str:
        """Hash of names, dtypes, shapes and values, independent of the file format."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


# ------------------------------------------------------------------------------ weights


def check_config(config: BodyConfig) -> None:
    """Raise ConfigError for an unknown body or a missing weights file.

    This does not import torch, which would take seconds just to find a typo.
    """
    networks = _registered_networks()
    if networks and config.body not in networks:
        raise _unknown_body_error(config.body, networks)
    if Path(config.weights).suffix in WEIGHTS_SUFFIXES:
        _require_file(Path(config.weights))


def _registered_networks() -> list[str]:
    """Names of torchvision's classification networks, found in its source by their decorator.

    Empty if a version of torchvision registers them in another way.
    """
    spec = find_spec("torchvision")
    locations = (spec and spec.submodule_search_locations) or ()
    folders = [Path(location) / "models" for location in locations]
    decorated = re.compile(r"^@register_model\(\)\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)
    sources = [file.read_text("utf-8") for folder in folders for file in folder.glob("*.py")]
    return sorted(name for source in sources for name in decorated.findall(source))


def load(config: BodyConfig) -> Weights:
    """Load the weights that `config` names.

    Raises:
        ConfigError: the body or the weights name is unknown, ImageNet weights are neither in the
            cache nor can they be downloaded, or the weights do not fit the body.
        DataError: the file cannot be read.
    """
    import torch

    net, final_layer = _build_without_final_layer(config.body)
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if config.weights == "random":
        state = dict(_build_network(config.body).state_dict())
    elif (suffix := Path(config.weights).suffix) in WEIGHTS_SUFFIXES:
        state = _read_state_dict(Path(config.weights), suffix)
    else:
        state, mean, std = _load_torchvision_weights(config)
    unused = (f"{final_layer}.", *AUXILIARY_HEADS)
    state = {name: tensor for name, tensor in state.items() if not name.startswith(unused)}
    try:
        with torch.no_grad():
            _load_tensors(net, state)
    except RuntimeError as error:
        raise ConfigError(
            f"{config.weights} does not fit {config.body}: {_first_mismatch(error)}",
            f"the tensors of torchvision's {config.body}, with the same names and shapes.",
            "give the --body that the weights were trained for.",
        ) from error
    state = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    return Weights(state=state, mean=config.mean or mean, std=config.std or std)


def _load_tensors(net: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Load tensors by name, of the version of the network that torchvision builds today.

    A safetensors file holds no version numbers, and MNASNet refuses tensors without its own. Layers
    get none: batch norms without one may lack the count of batches, which old files do.
    """
    versioned = OrderedDict(state)
    vars(versioned)["_metadata"] = {"": {"version": net._version}}
    net.load_state_dict(versioned)


def _first_mismatch(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
    return lines[0][:200] if lines else str(error)[:200]


def _read_state_dict(path: Path, suffix: str) -> dict[str, torch.Tensor]:
    import safetensors.torch
    import torch

    _require_file(path)
    try:
        if suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise DataError(
            f"{path} cannot be read: {(str(error) or repr(error)).splitlines()[0][:200]}",
            "tensors by name: safetensors, or a state dict saved by torch.save.",
            "save it again with safetensors; pickled models are not opened.",
        ) from error


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(
            f"--weights {path} does not exist.",
            "a .safetensors or .pth file of the body's weights.",
            "check the path, or use --weights auto.",
        )


def _load_torchvision_weights(config: BodyConfig) -> tuple[dict[str, torch.Tensor], Any, Any]:
    """The state dict, mean and std of weights that torchvision knows by name."""
    import torch

    models = _import_torchvision_models()
    available = models.get_model_weights(config.body)
    try:
        weights = available["DEFAULT" if config.weights == "auto" else config.weights]
    except KeyError:
        raise ConfigError(
            f"{config.body} has no weights called {config.weights!r}.",
            f"auto, random, a .safetensors or .pth file, or {', '.join(available.__members__)}.",
            "give one of these.",
        ) from None
    name = weights.url.rpartition("/")[2]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not cached.is_file():
        _download(config.body, weights.url, cached)
    _check_hash_in_name(cached)
    preset = weights.transforms()
    mean, std = getattr(preset, "mean", IMAGENET_MEAN), getattr(preset, "std", IMAGENET_STD)
    return _read_state_dict(cached, ".pth"), tuple(mean), tuple(std)


def _download(body: str, url: str, cached: Path) -> None:
    """Download torchvision's file into torch's cache, where it appears only with the right hash."""
    import torch

    previous_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)  # urllib would wait forever
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        digest = HASH_IN_NAME.search(cached.name)
        torch.hub.download_url_to_file(
            url, str(cached), hash_prefix=digest[1] if digest else None, progress=False
        )
    except (OSError, RuntimeError, HTTPException) as error:
        raise ConfigError(
            f"The ImageNet weights of {body} are not in torch's cache ({cached}) and could not be"
            f" downloaded from {url}: {error or type(error).__name__}.",
            "the file in the cache, or a network connection.",
            "give a file that you have (--weights PATH.safetensors or PATH.pth), or use untrained"
            " weights (--weights random).",
        ) from error
    finally:
        socket.setdefaulttimeout(previous_timeout)


def _check_hash_in_name(cached: Path) -> None:
    """Compare a cached file with the start of the sha256 in its name.

    torch checks this only when it downloads the file.
    """
    expected = HASH_IN_NAME.search(cached.name)
    with cached.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if expected and not actual.startswith(expected[1]):
        raise DataError(
            f"{cached} is damaged: its sha256 starts with {actual[:8]}.",
            f"{expected[1]}, as its name says.",
            "delete the file; it is downloaded again.",
        )


# ----------------------------------------------------------------------------- networks


def _import_torchvision_models() -> Any:
    """Import torchvision.models without torch's compiler.

    torchvision's detection operators import the compiler for one predicate, which takes 2.3 s where
    the rest of the import takes 0.2 s. Classification networks never call it, so a stub replaces
    the module during the import.
    """
    name = "torch._dynamo.utils"
    if "torchvision" not in sys.modules and name not in sys.modules:
        stub = ModuleType(name)
        stub.is_compile_supported = lambda device: False  # type: ignore[attr-defined]
        sys.modules[name] = stub
        try:
            import torchvision
        except ImportError:  # this version of torchvision needs more than the stub has
            for module in [one for one in sys.modules if one.partition(".")[0] == "torchvision"]:
                del sys.modules[module]
        finally:
            del sys.modules[name]
    import torchvision.models

    return torchvision.models


def _build_network(body: str) -> nn.Module:
    models = _import_torchvision_models()
    networks = models.list_models(module=models)
    if body not in networks:
        raise _unknown_body_error(body, networks)
    import torch

    # These two have auxiliary heads for training, and normalize their input in another way.
    is_inception = body in ("googlenet", "inception_v3")
    options = {"aux_logits": False, "init_weights": False, "transform_input": True}
    with torch.random.fork_rng(devices=[]):  # leaves the caller's random state alone
        torch.manual_seed(0)  # a random body is the same on every worker
        net: nn.Module = models.get_model(body, weights=None, **options if is_inception else {})
        return net


def _unknown_body_error(body: str, networks: list[str]) -> ConfigError:
    close = difflib.get_close_matches(body, networks, 3)
    return ConfigError(
        f"torchvision has no classification network called {body!r}.",
        f"one of its {len(networks)}, such as resnet34, mobilenet_v2 or convnext_tiny.",
        f"did you mean {' or '.join(close)}?" if close else "see torchvision.models.",
    )


def _size_error(body: str, size: int, error: Exception) -> ConfigError:
    """The error for images of a size that a network does not take."""
    models = _import_torchvision_models()
    preset = models.get_model_weights(body)["DEFAULT"].transforms()
    usual = getattr(preset, "crop_size", [224])[0]
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


def _build_without_final_layer(body: str) -> tuple[nn.Module, str]:
    """The network with its final layer replaced by the identity, and the name of that layer."""
    from torch import nn

    net = _build_network(body)
    linear = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ConfigError(
            f"{body} has no linear layer at its end that could be removed.",
            "a network whose last layer is linear, as in nearly all of torchvision's.",
            "give another --body.",
        )
    parent, _, attribute = linear[-1].rpartition(".")
    setattr(net.get_submodule(parent), attribute, nn.Identity())
    return net.eval(), linear[-1]


def _feature_map_layers(net: nn.Module, body: str) -> nn.Module:
    """The layers of a network that compute its last feature map (B, C, H, W)."""
    from torch import nn

    if body.startswith("densenet"):  # its last activation is a function, not a module
        return nn.Sequential(net.features, nn.ReLU(inplace=True))  # type: ignore[arg-type]
    if hasattr(net, "features") and not body.startswith("swin"):
        return net.features  # type: ignore[return-value]
    children = dict(net.named_children())
    if "avgpool" in children and body not in ("googlenet", "inception_v3"):
        return nn.Sequential(*list(children.values())[: list(children).index("avgpool")])
    raise ConfigError(
        f"{body} has no feature map, which --pool max and concat need.",
        "a convolutional network for --pool max or concat.",
        "use --pool avg.",
    )


class Body:
    """Computes features on one device: uint8 pixels (B, 3, S, S) -> float32 (B, D); inference only.

    module: the torch module, from uint8 pixels to features; width: D; name, pool: as in the recipe;
    device: where it runs.
    """

    def __init__(
        self,
        body: str,
        weights: Mapping[str, torch.Tensor],
        *,
        pool: str,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        size: int = 224,
        device: str = "cpu",
    ) -> None:
        import torch

        net, _ = _build_without_final_layer(body)
        _load_tensors(net, weights)
        fused = _fuse_batch_norms(net if pool == "avg" else _feature_map_layers(net, body))
        fused.to(memory_format=torch.channels_last)
        self.module = _make_feature_extractor(fused, pool, mean, std).to(device)
        self.name, self.pool, self.device = body, pool, torch.device(device)
        black_images = torch.zeros((16, 3, size, size), dtype=torch.uint8, device=device)
        try:
            self.width = int(self(black_images).shape[1])
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AssertionError) as error:  # which one depends on the network
            raise _size_error(body, size, error) from error

    def __call__(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Features of a batch, in the order of its images; with float16 arithmetic on CUDA."""
        import torch

        with torch.inference_mode(), self.autocast():
            out: torch.Tensor = self.module(pixels_BCHW.to(self.device))
            return out

    def autocast(self) -> torch.autocast:
        """The context in which the module runs: float16 arithmetic on CUDA."""
        import torch

        return torch.autocast("cuda", torch.float16, enabled=self.device.type == "cuda")


def _make_feature_extractor(
    net: nn.Module, pool: str, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> nn.Module:
    """Build the module that normalizes pixels, runs `net` and pools.

    net: for pool avg the network without its final layer, which pools itself; else the layers up to
    the last feature map.
    """
    import torch
    from torch import nn

    class FeatureExtractor(nn.Module):
        mean: torch.Tensor
        std: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.net = net
            self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
            self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

        def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
            return self.pool_output(self.net(self.normalize(pixels_BCHW)))

        def normalize(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
            scaled = (pixels_BCHW.float() / 255 - self.mean) / self.std
            return scaled.contiguous(memory_format=torch.channels_last)

        def pool_output(self, net_output: torch.Tensor) -> torch.Tensor:
            out = net_output.float()
            if pool == "avg":
                return out.flatten(1)
            highest = out.amax((2, 3))
            return highest if pool == "max" else torch.cat([out.mean((2, 3)), highest], 1)

    return FeatureExtractor().eval()


def _fuse_batch_norms(net: nn.Module) -> nn.Module:
    """Fold batch norms into the convolutions before them (1.24x to 1.29x as fast).

    Networks that torch.fx cannot trace stay as they are: same features, slower.
    """
    from torch.fx.experimental.optimization import fuse

    try:
        return fuse(net)
    except Exception:
        return net
