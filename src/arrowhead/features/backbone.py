"""Bodies: torchvision networks without their final layer, pooled to one row per image.

name, weights          torchvision's, a file, or random on purpose
  -> load              float32 tensors by name, their sha256, mean and std
  -> Body              uint8 (B, 3, S, S) -> float32 (B, D), batch norm folded, channels last
"""

from __future__ import annotations

import difflib
import hashlib
import re
import socket
import sys
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
FILES = (".safetensors", ".pth", ".pt")  # endings of --weights that name a file


@dataclass(frozen=True, kw_only=True, slots=True)
class BodyConfig:
    """The network that turns a picture into a feature."""

    body: str = "resnet34"
    """Any torchvision classification network, its final layer removed."""
    weights: str = "auto"
    """auto: torchvision's default ImageNet weights, from the torch hub cache or downloaded;
    a torchvision weights name (IMAGENET1K_V1); a .safetensors or .pth file; random, knowingly."""
    mean: tuple[float, float, float] | None = None
    """Channel means the weights were made with, of pixels scaled to 0..1. Default: ImageNet's."""
    std: tuple[float, float, float] | None = None
    """Channel deviations, likewise."""
    pool: Literal["avg", "max", "concat"] = "avg"
    """From the last feature map to one row; concat (avg and max) is the lesson's."""

    def __post_init__(self) -> None:
        if self.std is not None and not all(value > 0 for value in self.std):
            raise ConfigError(
                f"--std is {self.std}.", "three numbers above 0.", "give e.g. --std 0.5 0.5 0.5."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """A body's tensors by name, without the final layer, and what pixels they expect."""

    state: dict[str, torch.Tensor]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def sha256(self) -> str:
        """Hash of names, shapes and values: the same whichever file they came from."""
        total = hashlib.sha256()
        for name, tensor in sorted(self.state.items()):
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            total.update(tensor.contiguous().numpy().tobytes())
        return total.hexdigest()


# ------------------------------------------------------------------------------ weights


def check(config: BodyConfig) -> None:
    """ConfigError for an unknown body or a weights file that is not there, torch unseen: importing
    it to find a slip of the pen takes seconds.
    """
    known = _names()
    if known and config.body not in known:
        raise _unknown(config.body, known)
    if Path(config.weights).suffix in FILES:
        _must_be_file(Path(config.weights))


def _names() -> list[str]:
    """The networks in torchvision's source, by what registers them; none if it is not as known."""
    spec = find_spec("torchvision")
    folders = [Path(one) / "models" for one in (spec and spec.submodule_search_locations) or ()]
    registered = re.compile(r"^@register_model\(\)\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)
    texts = [file.read_text("utf-8") for folder in folders for file in folder.glob("*.py")]
    return sorted(name for text in texts for name in registered.findall(text))


def load(config: BodyConfig) -> Weights:
    """The weights that `config` names.

    Raises ConfigError for an unknown body or weights name, or when ImageNet weights can be had
    neither from the cache nor by download; DataError for a file that does not fit the body.
    """
    import torch

    net, final = _headless(config.body)
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if config.weights == "random":
        state = dict(_build(config.body).state_dict())
    elif (suffix := Path(config.weights).suffix) in FILES:
        state = _from_file(Path(config.weights), suffix)
    else:
        state, mean, std = _from_torchvision(config)
    unused = (f"{final}.", "aux1.", "aux2.", "AuxLogits.")
    state = {name: tensor for name, tensor in state.items() if not name.startswith(unused)}
    try:
        with torch.no_grad():
            net.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ConfigError(
            f"{config.weights} does not fit {config.body}: {_first_misfit(error)}",
            f"the tensors of torchvision's {config.body}, by its names.",
            "give the --body the weights were made for.",
        ) from error
    state = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    return Weights(state=state, mean=config.mean or mean, std=config.std or std)


def _first_misfit(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
    return lines[0][:200] if lines else str(error)[:200]


def _from_file(path: Path, suffix: str) -> dict[str, torch.Tensor]:
    import safetensors.torch
    import torch

    _must_be_file(path)
    try:
        if suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise DataError(
            f"{path} cannot be read: {(str(error) or repr(error)).splitlines()[0][:200]}",
            "tensors by name: safetensors, or a state dict saved by torch.save.",
            "save it again with safetensors; whole pickled models are not opened.",
        ) from error


def _must_be_file(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(
            f"--weights {path} is not there.",
            "a .safetensors or .pth file of the body's weights.",
            "check the path, or use --weights auto.",
        )


def _from_torchvision(config: BodyConfig) -> tuple[dict[str, torch.Tensor], Any, Any]:
    import torch

    models = _torchvision()
    known = models.get_model_weights(config.body)
    try:
        chosen = known["DEFAULT" if config.weights == "auto" else config.weights]
    except KeyError:
        raise ConfigError(
            f"{config.body} has no weights called {config.weights!r}.",
            f"auto, random, a .safetensors or .pth file, or {', '.join(known.__members__)}.",
            "give one of these.",
        ) from None
    name = chosen.url.rpartition("/")[2]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not cached.is_file():
        _download(config.body, chosen.url, cached)
    _must_match_its_name(cached)
    preset = chosen.transforms()
    mean, std = getattr(preset, "mean", IMAGENET_MEAN), getattr(preset, "std", IMAGENET_STD)
    return _from_file(cached, ".pth"), tuple(mean), tuple(std)


def _download(body: str, url: str, cached: Path) -> None:
    """Fetch torchvision's file into torch's cache; it appears there only if its hash is right."""
    import torch

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # urllib would wait for a silent host for ever
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        digest = re.search(r"-([0-9a-f]{8,})\.", cached.name)
        torch.hub.download_url_to_file(
            url, str(cached), hash_prefix=digest[1] if digest else None, progress=False
        )
    except (OSError, RuntimeError, HTTPException) as error:
        raise ConfigError(
            f"The ImageNet weights of {body} are not in torch's cache ({cached}) and could not be"
            f" downloaded from {url}: {error or type(error).__name__}.",
            "the file in the cache, or a connection.",
            "give a file you have (--weights PATH.safetensors or PATH.pth), or choose untrained"
            " weights knowingly (--weights random).",
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def _must_match_its_name(cached: Path) -> None:
    """Torchvision's file names carry the start of the sha256; torch never looks a second time."""
    digest = re.search(r"-([0-9a-f]{8,})\.", cached.name)
    with cached.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if digest and not found.startswith(digest[1]):
        raise DataError(
            f"{cached} is torn: its sha256 starts with {found[:8]}.",
            f"{digest[1]}, as its name says.",
            "delete the file; it is downloaded again.",
        )


# ----------------------------------------------------------------------------- networks


def _torchvision() -> Any:
    """torchvision.models, imported without torch's compiler.

    One predicate of torchvision's detection operators brings the compiler in: 2.3 s where the rest
    of the import takes 0.2, in every command. Classification networks never ask it.
    """
    name = "torch._dynamo.utils"
    if "torchvision" not in sys.modules and name not in sys.modules:
        stand_in = ModuleType(name)
        stand_in.is_compile_supported = lambda device: False  # type: ignore[attr-defined]
        sys.modules[name] = stand_in
        try:
            import torchvision
        except ImportError:  # another torchvision, which asks for more
            for half in [one for one in sys.modules if one.partition(".")[0] == "torchvision"]:
                del sys.modules[half]
        finally:
            del sys.modules[name]
    import torchvision.models

    return torchvision.models


def _build(body: str) -> nn.Module:
    models = _torchvision()
    known = models.list_models(module=models)
    if body not in known:
        raise _unknown(body, known)
    import torch

    # These two carry auxiliary heads for training, and shift their input to other statistics.
    inception = body in ("googlenet", "inception_v3")
    extra = {"aux_logits": False, "init_weights": False, "transform_input": True}
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay where they are
        torch.manual_seed(0)  # and a random body is the same body on every worker
        net: nn.Module = models.get_model(body, weights=None, **extra if inception else {})
        return net


def _unknown(body: str, known: list[str]) -> ConfigError:
    close = difflib.get_close_matches(body, known, 3)
    return ConfigError(
        f"torchvision has no classification network called {body!r}.",
        f"one of its {len(known)}, such as resnet34, mobilenet_v2 or convnext_tiny.",
        f"did you mean {' or '.join(close)}?" if close else "see torchvision.models.",
    )


def _headless(body: str) -> tuple[nn.Module, str]:
    """The network with its final layer replaced by the identity, and that layer's name."""
    from torch import nn

    net = _build(body)
    final = [name for name, part in net.named_modules() if isinstance(part, nn.Linear)]
    if not final:
        raise ConfigError(
            f"{body} ends in no linear layer that could be removed.",
            "a network whose last layer is linear, as nearly all of torchvision's are.",
            "give another --body.",
        )
    parent, _, leaf = final[-1].rpartition(".")
    setattr(net.get_submodule(parent), leaf, nn.Identity())
    return net.eval(), final[-1]


def _trunk(net: nn.Module, body: str) -> nn.Module:
    """The part of a headless network that ends in a feature map (B, C, H, W)."""
    from torch import nn

    if body.startswith("densenet"):  # its last activation is not a module
        return nn.Sequential(net.features, nn.ReLU(inplace=True))  # type: ignore[arg-type]
    if hasattr(net, "features") and not body.startswith("swin"):
        return net.features  # type: ignore[return-value]
    parts = dict(net.named_children())
    if "avgpool" in parts and body not in ("googlenet", "inception_v3"):
        return nn.Sequential(*list(parts.values())[: list(parts).index("avgpool")])
    raise ConfigError(
        f"{body} has no feature map to pool in another way.",
        "a convolutional network for --pool max or concat.",
        "use --pool avg.",
    )


class Body:
    """uint8 pixels (B, 3, S, S) -> float32 features (B, D), on one device, for inference only.

    module: what it runs, as one torch module, for those who build on it.
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

        net, _ = _headless(body)
        net.load_state_dict(dict(weights))
        fused = _fused(net if pool == "avg" else _trunk(net, body))
        fused.to(memory_format=torch.channels_last)
        self.module = _sight(fused, pool, mean, std).to(device)
        self._device = torch.device(device)
        blank = torch.zeros((16, 3, size, size), dtype=torch.uint8, device=device)
        self.width = int(self(blank).shape[1])

    def __call__(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Features of a batch; the order of rows is kept. float16 arithmetic on CUDA."""
        import torch

        on_gpu = self._device.type == "cuda"
        with torch.inference_mode(), torch.autocast("cuda", torch.float16, enabled=on_gpu):
            out: torch.Tensor = self.module(pixels_BCHW.to(self._device))
            return out


def _sight(
    net: nn.Module, pool: str, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> nn.Module:
    """The way from pixels to features as one module; net: headless, or a trunk if it is pooled."""
    import torch
    from torch import nn

    class Sight(nn.Module):
        mean: torch.Tensor
        std: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.net = net
            self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
            self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

        def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
            scaled = (pixels_BCHW.float() / 255 - self.mean) / self.std
            out: torch.Tensor = self.net(
                scaled.contiguous(memory_format=torch.channels_last)
            ).float()
            if pool == "avg":
                return out.flatten(1)
            highest = out.amax((2, 3))
            return highest if pool == "max" else torch.cat([out.mean((2, 3)), highest], 1)

    return Sight().eval()


def _fused(net: nn.Module) -> nn.Module:
    """The network with batch norms folded into the convolutions before them (1.24x to 1.29x).

    Networks that cannot be traced (branches on values) stay as they are: same features, slower.
    """
    from torch.fx.experimental.optimization import fuse

    try:
        return fuse(net)
    except Exception:
        return net
