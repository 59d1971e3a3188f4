"""The network that is fine-tuned: body and head in one module, and its layer groups.

    backbone.build_network      the body with its batch norms, under its library's names
      -> FinetuneNetwork        normalized pixels (B, 3, S, S) -> logits (B, C)
      -> blocks                 the body's layers from the first to the last
      -> layer_groups           early, middle … head, for differential rates and --freeze-to

fast.ai and timm have such groups for networks that they know by name; here the blocks are found in
the tree of modules, so that every network of torchvision and timm has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from arrowhead.features import backbone
from arrowhead.finetuning.config import DEFAULT_LAYER_DECAY, FinetuneConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

BODY, HEAD = "body.", "head."
INNER_LISTS = ("blocks", "layers")  # what libraries call the list of blocks in a stage


@dataclass(frozen=True, slots=True)
class Block:
    """Neighbouring layers of a network that share a learning rate.

    Attributes:
        modules: The modules.
        parameters: Their parameters, and those that belong to no module of a block.
    """

    modules: list[nn.Module]
    parameters: list[nn.Parameter]


class FinetuneNetwork:
    """Body and head.

    Attributes:
        module: The torch module, from normalized pixels (B, 3, S, S) to logits, float32 (B, C).
        head: The head in it.
    """

    def __init__(
        self,
        recipe: Mapping[str, Any],
        architecture: str,
        classes: int,
        tensors: Mapping[str, Tensor],
        device: str,
    ) -> None:
        """Build the network.

        Args:
            recipe: Of the features: body, pool, size and width.
            architecture: Of the head (see `heads.build_head`).
            classes: Number of classes.
            tensors: Those of the body and the head, with BODY or HEAD before their names.
            device: Where it runs.
        """
        import torch

        from arrowhead.training import heads

        body = {n.removeprefix(BODY): t for n, t in tensors.items() if n.startswith(BODY)}
        head = {n.removeprefix(HEAD): t for n, t in tensors.items() if n.startswith(HEAD)}
        self._net, network = backbone.build_network(
            recipe["body"], body, pool=recipe["pool"], size=recipe["size"], fold=False
        )
        self._net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        network.net.to(device)
        self.head = heads.restore_head(architecture, recipe["width"], classes, head).to(device)
        self.module = _join(network, self.head)

    def tensors(self) -> dict[str, Tensor]:
        """All weights and statistics by name, in memory that the network shares."""
        return {f"{BODY}{name}": t for name, t in self._net.state_dict().items()} | {
            f"{HEAD}{name}": t for name, t in self.head.state_dict().items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors of these names into the network."""
        import torch

        own = self.tensors()
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].copy_(tensor)

    def names(self) -> dict[int, str]:
        """The name of each parameter by its id."""
        named = [(BODY, *one) for one in self._net.named_parameters()]
        named += [(HEAD, *one) for one in self.head.named_parameters()]
        return {id(parameter): prefix + name for prefix, name, parameter in named}

    def blocks(self) -> list[Block]:
        """The body's blocks from the first layer to the last."""
        return blocks_of(self._net)

    def layer_groups(self, count: int) -> list[list[Block]]:
        """The blocks in `count` groups: the last is the head, the others divide the body."""
        head = [Block([self.head], list(self.head.parameters()))]
        if count == 1:
            return [self.blocks() + head]
        blocks, parts = self.blocks(), count - 1
        ends = [round(len(blocks) * number / parts) for number in range(parts + 1)]
        groups = [blocks[ends[number] : ends[number + 1]] for number in range(parts)]
        return [*groups, head]

    def is_transformer(self) -> bool:
        """Whether the body has many blocks with attention."""
        names = (type(module).__name__.lower() for module in self._net.modules())
        return sum("attention" in name for name in names) >= 4


def _join(network: Any, head: nn.Module) -> nn.Module:
    """The module from normalized pixels to logits; the head computes in float32."""
    import torch
    from torch import nn

    class BodyAndHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = network.net, head

        def forward(self, pixels_BCHW: Tensor) -> Tensor:
            out = self.body(pixels_BCHW)
            with torch.autocast(pixels_BCHW.device.type, enabled=False):
                logit_BC: Tensor = self.head(network.pool_output(out.float()))
                return logit_BC

    return BodyAndHead()


def blocks_of(net: nn.Module) -> list[Block]:
    """The blocks of a network in the order of its modules, which is that of their execution.

    A norm between two blocks belongs to the one before it; parameters of the network itself (class
    token, positions) belong to the first.
    """
    found: list[list[nn.Module]] = []
    for module in _leaves(net, depth=3):
        is_layer = any(parameter.dim() > 1 for parameter in module.parameters())
        if is_layer or not found:
            found.append([module])
        else:
            found[-1].append(module)
    blocks = [Block(one, [p for m in one for p in m.parameters()]) for one in found]
    inside = {id(parameter) for block in blocks for parameter in block.parameters}
    rest = [parameter for parameter in net.parameters() if id(parameter) not in inside]
    if not blocks:
        return [Block([net], rest)]
    blocks[0].parameters.extend(rest)
    return blocks


def _leaves(module: nn.Module, depth: int) -> Iterator[nn.Module]:
    """The modules with parameters, containers of blocks opened down to `depth`."""
    from torch import nn

    for child in module.children():
        if next(child.parameters(), None) is None:
            continue
        is_list = type(child) in (nn.Sequential, nn.ModuleList)
        inner = any(
            type(getattr(child, name, None)) in (nn.Sequential, nn.ModuleList)
            for name in INNER_LISTS
        )
        if depth and (is_list or inner):
            yield from _leaves(child, depth - 1)
        else:
            yield child


@dataclass(frozen=True, slots=True)
class RateGroup:
    """Parameters with the same peak learning rate and weight decay."""

    names: list[str]
    parameters: list[nn.Parameter]
    lr: float
    weight_decay: float


def prepare(network: FinetuneNetwork, config: FinetuneConfig) -> list[RateGroup]:
    """Freeze layer groups, and give the parameters of the others their learning rates.

    Biases, norms and other vectors get no weight decay.
    """
    decay = _layer_decay(network, config)
    rates = _peak_rates(config, decay)
    groups = network.layer_groups(len(rates))
    first = config.freeze_to % len(rates)
    names = network.names()
    result: list[RateGroup] = []
    depth = sum(map(len, groups[:-1]))  # how many blocks there are up to the last of the body
    if len(groups) == 1:
        depth = len(groups[0]) - 1
    number = 0
    for group, (blocks, rate) in enumerate(zip(groups, rates, strict=True)):
        for block in blocks:
            steps_below = max(depth - 1 - number, 0)
            number += 1
            is_frozen = group < first
            for parameter in block.parameters:
                parameter.requires_grad_(not is_frozen)
            if is_frozen:
                continue
            lr = rate * decay**steps_below
            for matrices in (True, False):
                chosen = [p for p in block.parameters if (p.dim() > 1) == matrices]
                if chosen:
                    wd = config.weight_decay if matrices else 0.0
                    result.append(RateGroup([names[id(p)] for p in chosen], chosen, lr, wd))
    return result


def _peak_rates(config: FinetuneConfig, decay: float) -> tuple[float, ...]:
    """The rate of each group; one for the whole body if its layers differ by the default decay."""
    rates = config.group_rates
    if config.layer_decay != "auto" or decay == 1:
        return rates
    return (*[rates[-2]] * (len(rates) - 1), rates[-1])


def _layer_decay(network: FinetuneNetwork, config: FinetuneConfig) -> float:
    if config.layer_decay != "auto":
        return config.layer_decay
    is_default = config.rates == "auto" and network.is_transformer()
    return DEFAULT_LAYER_DECAY if is_default else 1.0


def set_training(network: FinetuneNetwork, config: FinetuneConfig) -> None:
    """Put the groups that are trained into training mode, and the others into that of inference."""
    from torch import nn

    network.module.eval()
    groups = network.layer_groups(len(config.group_rates))
    for blocks in groups[config.freeze_to % len(groups) :]:
        for block in blocks:
            for module in block.modules:
                module.train()
    frozen = nn.modules.batchnorm._BatchNorm
    for module in network.module.modules():
        if config.batch_norm == "frozen" and isinstance(module, frozen):
            module.eval()


def describe_groups(network: FinetuneNetwork, config: FinetuneConfig) -> list[dict[str, Any]]:
    """Each layer group: blocks, parameters, rate, and whether it is trained."""
    rates = _peak_rates(config, _layer_decay(network, config))
    groups: Sequence[list[Block]] = network.layer_groups(len(rates))
    first = config.freeze_to % len(groups)
    return [
        {
            "blocks": len(blocks),
            "parameters": sum(p.numel() for block in blocks for p in block.parameters),
            "rate": rate if number >= first else 0.0,
        }
        for number, (blocks, rate) in enumerate(zip(groups, rates, strict=True))
    ]


def trained_float_tensors(network: FinetuneNetwork) -> dict[str, torch.Tensor]:
    """The tensors that training changes, those of an average of weights, by name."""
    return {name: t for name, t in network.tensors().items() if t.is_floating_point()}
