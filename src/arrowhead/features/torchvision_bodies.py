"""torchvision's classification networks without their last layer, and their published weights.

Unlike torchvision, loading checks the hash of a cached file and never unpickles code.
"""

from __future__ import annotations

import difflib
import gc
import hashlib
import re
import socket
import sys
from collections.abc import Callable
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from arrowhead.decode.pixels import PixelConfig
from arrowhead.errors import ConfigError, DataError
from arrowhead.features import networks
from arrowhead.features.networks import Network, Published

if TYPE_CHECKING:
    import torch
    from torch import nn

DOWNLOAD_TIMEOUT_SECONDS = 20
HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,})\.")  # torchvision's names: resnet18-f37072fd.pth
AUXILIARY_HEADS = ("aux1.", "aux2.", "AuxLogits.")  # of GoogLeNet and Inception, for training only
LICENSE = "bsd-3-clause"  # of torchvision, and of the weights for which it names no other
SWAG_LICENSE = "cc-by-nc-4.0"


def registered_names() -> list[str]:
    """Names of torchvision's classification networks, found in its source by their decorator.

    This does not import torchvision, which would take seconds just to find a typo. Empty if a
    version of torchvision registers them in another way.
    """
    spec = find_spec("torchvision")
    locations = (spec and spec.submodule_search_locations) or ()
    folders = [Path(location) / "models" for location in locations]
    decorated = re.compile(r"^@register_model\(\)\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)
    sources = [file.read_text("utf-8") for folder in folders for file in folder.glob("*.py")]
    return sorted(name for source in sources for name in decorated.findall(source))


def unknown_body_error(body: str, names: list[str]) -> ConfigError:
    """The error for a name that torchvision does not have."""
    close = difflib.get_close_matches(body, names, 3)
    return ConfigError(
        f"torchvision has no classification network called {body!r}.",
        f"one of its {len(names)}, such as resnet34, mobilenet_v2 or convnext_tiny; or timm/NAME.",
        f"did you mean {' or '.join(close)}?" if close else "see `arrowhead backbones`.",
    )


# ------------------------------------------------------------------------------ weights


def published_weights(body: str, weights: str) -> Published:
    """The weights that torchvision publishes; downloads them if they are not in torch's cache.

    Args:
        body: torchvision's name of the network.
        weights: auto for its default, or a name such as IMAGENET1K_V1.

    Raises:
        ConfigError: If there are no such weights, or they cannot be downloaded.
        DataError: If the file in the cache is damaged.
    """
    import torch

    entry = _weights_entry(body, weights)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rpartition("/")[2]
    if not cached.is_file():
        _download(body, entry.url, cached)
    _check_hash_in_name(cached)
    preset = entry.transforms()
    return Published(
        state=networks.read_state_dict(cached),
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        pixels=_pixels_of_preset(preset),
        license=license_of(entry),
        source=entry.url,
    )


def license_of_name(body: str, weights: str) -> str:
    """The license of weights that torchvision publishes, before they are loaded."""
    return license_of(_weights_entry(body, weights))


def license_of(entry: Any) -> str:
    """The license of torchvision's weights, as an SPDX identifier in lower case."""
    named = str(entry.meta.get("license", ""))
    return SWAG_LICENSE if "SWAG" in named else named or LICENSE


def _weights_entry(body: str, weights: str) -> Any:
    available = import_models().get_model_weights(body)
    try:
        return available["DEFAULT" if weights == "auto" else weights]
    except KeyError:
        raise ConfigError(
            f"{body} has no weights called {weights!r}.",
            f"auto, random, a .safetensors or .pth file, or {', '.join(available.__members__)}.",
            "give one of these.",
        ) from None


def _pixels_of_preset(preset: Any) -> PixelConfig:
    """The size, interpolation and crop of a torchvision preset."""
    size, resized = preset.crop_size[0], preset.resize_size[0]
    return PixelConfig(
        size=size,
        resize="crop",
        interpolation="bicubic" if preset.interpolation.value == "bicubic" else "bilinear",
        crop_pct=None if size / resized == 0.875 else min(size / resized, 1.0),
    )


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
        raise networks.offline_error(
            body,
            f"The ImageNet weights of {body} are not in torch's cache ({cached}) and could not be"
            f" downloaded from {url}: {error or type(error).__name__}.",
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


def import_models() -> Any:
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


def _build_network(body: str, size: int | None) -> nn.Module:
    models = import_models()
    networks = models.list_models(module=models)
    if body not in networks:
        raise unknown_body_error(body, networks)
    import torch

    with torch.random.fork_rng(devices=[]):  # leaves the caller's random state alone
        torch.manual_seed(0)  # a random body is the same on every worker
        net: nn.Module = models.get_model(body, weights=None, **build_options(body, size))
        return net


def build_options(body: str, size: int | None) -> dict[str, Any]:
    """What torchvision's function takes, besides the number of classes, to build a network."""
    if body in ("googlenet", "inception_v3"):
        # They have auxiliary heads for training, and normalize their input in another way.
        return {"aux_logits": False, "init_weights": False, "transform_input": True}
    if body.startswith("vit_") and size:
        return {"image_size": size}  # its positions are for one size
    return {}


def build_classifier(body: str, options: dict[str, Any]) -> nn.Module:
    """Build a network with its last layer, with random weights."""
    import torch

    models = import_models()
    with torch.random.fork_rng(devices=[]):
        net: nn.Module = models.get_model(body, weights=None, **options)
    return net


def build(body: str, size: int | None = None) -> tuple[nn.Module, Callable[[str], bool]]:
    """Build a network without its last layer, with random weights.

    Returns:
        The network, and a function that says whether it does not need the tensor of a name.

    Raises:
        ConfigError: If torchvision has no such network, or it does not end with a linear layer.
    """
    net, final_layer = _build_without_final_layer(body, size)
    unused = (f"{final_layer}.", *AUXILIARY_HEADS)
    return net, lambda name: name.startswith(unused)


def random_state(body: str, size: int | None = None) -> dict[str, torch.Tensor]:
    """The tensors of an untrained network, the same in every call."""
    return dict(_build_network(body, size).state_dict())


def assemble(net: nn.Module, body: str, pool: str, *, fold: bool = True) -> Network:
    """Make a network ready for inference: batch norms folded, and the way to pool its output.

    Pooling avg is what the network does itself, whatever comes between its map and its last layer.
    Without `fold` the network shares its modules with `net`, and can be trained.

    Raises:
        ConfigError: If the network cannot be pooled in this way.
    """
    import torch

    pool = "avg" if pool == "auto" else pool
    if pool not in networks.MAP_POOLS:
        raise ConfigError(
            f"--pool {pool} reads the class token of a transformer, which torchvision's {body} does"
            " not give.",
            "avg, max or concat for a network of torchvision.",
            "use --pool avg, or a transformer of timm (`arrowhead backbones 'timm/vit*'`).",
        )
    layers = net if pool == "avg" else _feature_map_layers(net, body)
    return Network(
        net=_fuse_batch_norms(layers) if fold else layers,
        pool=pool,
        pool_output=(lambda out: torch.flatten(out, 1))
        if pool == "avg"
        else networks.pool_map(pool),
    )


def _build_without_final_layer(body: str, size: int | None) -> tuple[nn.Module, str]:
    """The network with its final layer replaced by the identity, and the name of that layer."""
    from torch import nn

    net = _build_network(body, size)
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


def _fuse_batch_norms(net: nn.Module) -> nn.Module:
    """Fold batch norms into the convolutions before them (1.24x to 1.29x as fast).

    Networks that torch.fx cannot trace stay as they are: same features, slower.
    """
    from torch.fx.experimental.optimization import fuse

    # A trace leaves reference cycles that hold a copy of the network. Python would free it at its
    # next full collection only, and every command of a session would cost another copy. A
    # collection of all objects takes half a second, so it does not look at the older ones.
    older_are_frozen = gc.get_freeze_count() > 0
    if not older_are_frozen:
        gc.freeze()
    try:
        fused = fuse(net)
        graph: Any = fused.graph
        graph.owning_module = None  # or it would be freed late, too
        return fused
    except Exception:
        return net
    finally:
        gc.collect()
        if not older_are_frozen:
            gc.unfreeze()
