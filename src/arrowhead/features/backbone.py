"""Bodies: pretrained backbones without their final layer, one feature row per image.

    name, weights          of torchvision or timm, from a file, bundled, or random
      -> load              float32 tensors by name, their sha256, how their images were prepared
      -> Body              uint8 (B, 3, S, S) -> float32 (B, D), batch norm folded, channels last

Unlike torchvision and timm, loading identifies weights by their tensors, whichever file they came
from, and never unpickles code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from arrowhead.decode.pixels import PixelConfig
from arrowhead.errors import ConfigError
from arrowhead.features import body_table, networks, timm_bodies, torchvision_bodies
from arrowhead.features import precision as precisions
from arrowhead.features.networks import BUNDLED_BODY, TIMM_PREFIX, Network, Pool, Published, Triple
from arrowhead.features.precision import Precision, dtype_of, has_units, round_weights

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn


# Some networks (EfficientNet, RegNet) give other last bits for 17 images than for 16 or 32.
ROW_MULTIPLE = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class BodyConfig:
    """The network that turns an image into a feature."""

    body: str = "resnet34"
    """Any classification network of torchvision (resnet34) or timm (timm/convnext_tiny.fb_in22k, or
    without the tag timm/convnext_tiny), its final layer removed. `arrowhead backbones` lists them.
    """
    weights: str = "auto"
    """auto: the published weights, torchvision's from the torch hub cache, timm's from the Hugging
    Face hub cache, or downloaded; a torchvision weights name (IMAGENET1K_V1); a .safetensors or
    .pth file; bundled: ImageNet weights that are installed with Arrowhead, for
    timm/tf_efficientnet_lite0, which is then the default body; or random (untrained)."""
    mean: Triple | None = None
    """Channel means that the weights were trained with, of pixels scaled to 0..1. Default: those of
    the weights; for a file of a torchvision network those of ImageNet."""
    std: Triple | None = None
    """Channel standard deviations, likewise."""
    pool: Pool = "auto"
    """From the last feature map to one row: avg, max, or concat (both, as fast.ai does); from the
    tokens of a timm transformer: cls (class token), avg (of the other tokens), or cls+avg (both, as
    DINOv2 does). auto: what the network does itself."""
    body_precision: Precision = "fp32"
    """Of the network's products: fp32, bf16 (faster on CPUs and GPUs with units for it) or fp16.
    auto: bf16 if this machine has such units and the features of 16 drawn pictures nearly stay
    (cosine to fp32 of 0.998 or more), else fp32. A store and its bundles keep it on every
    machine."""
    accept_license: bool = False
    """Use weights whose license restricts their use, such as non-commercial ones or DINOv3's."""

    def __post_init__(self) -> None:
        if self.std is not None and not all(value > 0 for value in self.std):
            raise ConfigError(
                f"--std is {self.std}.", "three numbers above 0.", "give e.g. --std 0.5 0.5 0.5."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """A body's tensors by name, without the final layer, and how to prepare its input.

    Attributes:
        state: The tensors.
        mean: Per channel, of pixels scaled to 0..1.
        std: Likewise.
        pixels: Size, resize mode, interpolation and crop that the weights were evaluated with.
        license: Of the weights, in lower case; "" if unknown.
        source: Where the weights come from: an address, a package, the name of a file, or random.
    """

    state: dict[str, torch.Tensor]
    mean: Triple
    std: Triple
    pixels: PixelConfig = PixelConfig()
    license: str = ""
    source: str = ""

    @property
    def sha256(self) -> str:
        """Hash of names, dtypes, shapes and values, independent of the file format."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def origin(self) -> dict[str, str]:
        """Source and license, for people; not part of a recipe."""
        return {"source": self.source, "license": self.license or "unknown"}


# ------------------------------------------------------------------------------ weights


def check_config(config: BodyConfig) -> None:
    """Raise ConfigError for an unknown body, a missing weights file, or an unaccepted license.

    This imports neither torch nor timm, which would take seconds just to find a typo, unless the
    installed timm is newer than Arrowhead's table of its networks.
    """
    if not config.body.startswith(TIMM_PREFIX):
        names = torchvision_bodies.registered_names()
        if names and config.body not in names:
            raise torchvision_bodies.unknown_body_error(config.body, names)
    elif not body_table.has(config.body):
        timm_bodies.config_of(config.body)
    if config.weights == "bundled" and config.body.partition(".")[0] != BUNDLED_BODY:
        raise ConfigError(
            f"--weights bundled are weights of {BUNDLED_BODY}, not of {config.body}.",
            f"--body {BUNDLED_BODY}.",
            "leave --body out, or give other --weights.",
        )
    if networks.is_weights_file(config.weights):
        networks.require_file(Path(config.weights))
    known = body_table.license_of(config.body, config.weights)
    if known is not None:
        _check_license(config, known)


def _check_license(config: BodyConfig, license: str) -> None:
    """Raise ConfigError if the license of published weights restricts use and is not accepted."""
    is_restricted = license not in ("", "unknown", *networks.PERMISSIVE_LICENSES)
    if config.weights != "random" and is_restricted and not config.accept_license:
        raise ConfigError(
            f"The weights of {config.body} are published under the license {license}, which"
            " restricts what they may be used for.",
            "that you have read it and accept it.",
            "add --accept-license, or choose another body (`arrowhead backbones` shows licenses).",
        )


def load(config: BodyConfig, size: int | None = None) -> Weights:
    """Load the weights that `config` names.

    Args:
        config: The body and its weights.
        size: Side of the input in pixels; transformers have weights for one size, which are
            interpolated to another. None: the size of the weights.

    Raises:
        ConfigError: the body or the weights name is unknown, published weights are neither in the
            cache nor can they be downloaded, or the weights do not fit the body.
        DataError: the file cannot be read.
    """
    import torch

    check_config(config)
    published = _published(config, size)
    net, is_unneeded = _build(config.body, size or published.pixels.size)
    state = {name: t for name, t in published.state.items() if not is_unneeded(name)}
    try:
        with torch.no_grad():
            networks.load_tensors(net, state)
    except RuntimeError as error:
        raise ConfigError(
            f"{config.weights} does not fit {config.body}: {_first_mismatch(error)}",
            f"the tensors of {_library(config.body)}'s {config.body.removeprefix(TIMM_PREFIX)},"
            " with the same names and shapes.",
            "give the --body that the weights were trained for.",
        ) from error
    state = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    return Weights(
        state=state,
        mean=config.mean or published.mean,
        std=config.std or published.std,
        pixels=published.pixels,
        license=published.license,
        source=published.source,
    )


def build_network(
    body: str, weights: Mapping[str, torch.Tensor], *, pool: str, size: int, fold: bool = True
) -> tuple[nn.Module, Network]:
    """Build a body with these weights.

    Args:
        body: As in the recipe.
        weights: Its tensors by name.
        pool: How its output is pooled.
        size: Side of its input in pixels.
        fold: Fold batch norms, for inference. Without it the network can be trained.

    Returns:
        The network under the names that its library gives the tensors, and the same network ready
        to compute features. With `fold` the first one is no longer complete.
    """
    net, _ = _build(body, size)
    networks.load_tensors(net, weights)
    if body.startswith(TIMM_PREFIX):
        return net, timm_bodies.assemble(net, body, pool, size, fold=fold)
    return net, torchvision_bodies.assemble(net, body, pool, fold=fold)


def _library(body: str) -> str:
    return "timm" if body.startswith(TIMM_PREFIX) else "torchvision"


def _first_mismatch(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
    return lines[0][:200] if lines else str(error)[:200]


def _build(body: str, size: int | None) -> tuple[nn.Module, Callable[[str], bool]]:
    """A network without its final layer, and which tensors of its weights it does not need."""
    if body.startswith(TIMM_PREFIX):
        return timm_bodies.build(body, size)
    return torchvision_bodies.build(body, size)


def _published(config: BodyConfig, size: int | None) -> Published:
    """The weights as their maker loads them; ConfigError if their license is not accepted."""
    published = _load_published(config, size)
    if not networks.is_weights_file(config.weights):
        return published
    origin = networks.read_origin(Path(config.weights))
    if not (license := str(origin.get("license", ""))):
        return published
    _check_license(config, license)
    source = str(origin.get("source") or published.source)
    return replace(published, license=license, source=source)


def _load_published(config: BodyConfig, size: int | None) -> Published:
    body, weights = config.body, config.weights
    if body.startswith(TIMM_PREFIX):
        _check_license(config, timm_bodies.license_of_name(body, weights))
        return timm_bodies.published_weights(body, weights, size)
    if weights == "random":
        return Published(state=torchvision_bodies.random_state(body, size))
    if networks.is_weights_file(weights):
        path = Path(weights)
        return Published(state=networks.read_state_dict(path), source=path.name)
    _check_license(config, torchvision_bodies.license_of_name(body, weights))
    return torchvision_bodies.published_weights(body, weights)


# ----------------------------------------------------------------------------- the body


class Body:
    """Computes features on one device: uint8 pixels (B, 3, S, S) -> float32 (B, D); inference only.

    module: the torch module, from uint8 pixels to features; width: D; size: S; name: as in the
    recipe; pool, precision: likewise, with auto resolved; device: where it runs; is_native: whether
    the device has units for the precision, see `features.precision`.
    """

    def __init__(
        self,
        body: str,
        weights: Mapping[str, torch.Tensor],
        *,
        pool: str,
        mean: Triple,
        std: Triple,
        size: int = 224,
        precision: str = "fp32",
        device: str = "cpu",
    ) -> None:
        import torch

        _, network = build_network(body, weights, pool=pool, size=size)
        self.precision = precision
        self.is_native = has_units(precision, device)
        if (dtype := dtype_of(precision)) is not None:
            round_weights(network.net, dtype, keep=self.is_native)
        network.net.to(memory_format=torch.channels_last)
        self.module = _make_feature_extractor(network, mean, std).to(device)
        self.name, self.pool, self.size = body, network.pool, size
        self.device = torch.device(device)
        black_image = torch.zeros((1, 3, size, size), dtype=torch.uint8, device=device)
        try:
            with torch.inference_mode(), self.autocast():
                self.width = int(self.module(black_image).shape[1])
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AssertionError) as error:  # which one depends on the network
            usual = next((row.size for row in body_table.rows(body)), 224)
            raise networks.size_error(body, size, usual, error) from error

    def __call__(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Features of a batch, in the order of its images."""
        import torch

        rows = len(pixels_BCHW)
        missing = -rows % ROW_MULTIPLE
        if missing:
            black_images = pixels_BCHW.new_zeros((missing, *pixels_BCHW.shape[1:]))
            pixels_BCHW = torch.cat([pixels_BCHW, black_images])
        with torch.inference_mode(), self.autocast():
            out: torch.Tensor = self.module(pixels_BCHW.to(self.device))
            return out[:rows]

    def make_portable(self) -> None:
        """Compute in float32 from now on, as on a machine without units, to be exported.

        The weights stay rounded to the precision.
        """
        self.is_native = False
        self.module.float()

    def autocast(self) -> torch.autocast:
        """The context in which the module runs: products in the precision of the recipe."""
        import torch

        dtype = dtype_of(self.precision) if self.is_native else None
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)


def choose_precision(config: BodyConfig, weights: Weights, size: int) -> tuple[Precision, str]:
    """What the precision auto means on this machine, and a line that says why; "" if it is fp32.

    bf16 if there are units for it and the features of pictures then have a cosine of at least
    MIN_COSINE to those in float32.
    """
    from torch.nn.functional import cosine_similarity

    device = precisions.best_device()
    if not has_units("bf16", device):
        return "fp32", ""
    pixels_BCHW = precisions.pictures(ROW_MULTIPLE, size)
    exact_BD, rounded_BD = (
        Body(
            config.body,
            weights.state,
            pool=config.pool,
            mean=weights.mean,
            std=weights.std,
            size=size,
            precision=name,
            device=device,
        )(pixels_BCHW)
        for name in ("fp32", "bf16")
    )
    cosine = float(cosine_similarity(rounded_BD, exact_BD).min())
    if not cosine >= precisions.MIN_COSINE:
        return "fp32", (
            f"body precision fp32: in bf16, for which this machine has units, the features of"
            f" {config.body} would change (cosine {cosine:.4f}, required {precisions.MIN_COSINE})"
        )
    line = f"body precision bf16, for which this machine has units (cosine to fp32: {cosine:.5f})"
    return "bf16", line


def _make_feature_extractor(network: Network, mean: Triple, std: Triple) -> nn.Module:
    """Build the module that normalizes pixels, runs the network and pools."""
    import torch
    from torch import nn

    class FeatureExtractor(nn.Module):
        mean: torch.Tensor
        std: torch.Tensor

        def __init__(self, network: Network) -> None:
            super().__init__()
            self.net, self.pool = network.net, network.pool_output
            self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
            self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

        def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
            return self.pool_output(self.net(self.normalize(pixels_BCHW)))

        def normalize(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
            scaled = (pixels_BCHW.float() / 255 - self.mean) / self.std
            return scaled.contiguous(memory_format=torch.channels_last)

        def pool_output(self, net_output: torch.Tensor) -> torch.Tensor:
            pooled: torch.Tensor = self.pool(net_output.float())
            return pooled

    # Its class is a reference cycle: it must not hold the network, as a closure would.
    return FeatureExtractor(network).eval()
