"""Settings of a fine-tuning; each field is a flag."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from arrowhead.errors import ConfigError
from arrowhead.training import schedule
from arrowhead.training.optimizer_config import OptimizerConfig

DEFAULT_BATCH_SIZE = 32
# bench/finetune.py measures these and the other defaults.
DEFAULT_RATES = (1e-5, 3e-5, 1e-4)  # early layers, middle layers, head
MIN_STEPS = 20  # what --epochs auto aims at
MIN_EPOCHS, MAX_EPOCHS = 3, 10
DEFAULT_LAYER_DECAY = 0.75  # of transformers, as in BEiT (arXiv:2106.08254) and later papers


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig(OptimizerConfig):
    """How body and head are trained together."""

    epochs: int | Literal["auto"] = "auto"
    """Passes over the training split; auto: 3, more if there are few images."""
    rates: str = "auto"
    """Peak learning rates of the layer groups, with commas between them: the last one is that of
    the head, the others divide the body's layers from the first to the last into parts of the same
    depth (1e-4,1e-3,1e-2: early layers, middle layers, head). A single rate is for all layers."""
    freeze_to: int = 0
    """Train only the layer groups from this number on: 0 trains all, 1 all but the first, -1 the
    head alone. The others keep their weights and the statistics of their batch norms."""
    layer_decay: float | Literal["auto"] = "auto"
    """Factor by which the learning rate falls from each layer to the one before it, above 0 and up
    to 1; the body's last layer has the rate before the head's. auto: 0.75 for transformers with
    --rates auto, else 1, the rates of --rates as they are."""
    batch_norm: Literal["frozen", "train"] = "frozen"
    """frozen: batch norms keep the statistics of the pretrained weights, so an image's output does
    not depend on the others in its batch. train: those of trained groups take their statistics from
    the batch, of all workers together."""
    batch_size: int | Literal["auto"] = "auto"
    """Images per step, over all workers together. auto: 32, and if the device runs out of memory,
    they are processed in smaller parts (see --micro-batch), with the same result."""
    micro_batch: int | None = None
    """Process the images of a step in parts of at most this many, over all workers together, and
    add up their gradients: needs less memory. Default: all at once."""
    clip: float = 1.0
    """Largest norm of the gradient over all weights; longer ones are shortened. 0: no limit."""
    ema: float = 0.98
    """Decay of an exponential moving average of the weights, which then is the result; it begins
    with a shorter memory. 0: the weights themselves."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on GPUs with bf16 units, fp16 with a scaled loss on older ones, fp32 on CPUs."""
    seed: int = 0
    """Seed of the order of images, their augmentation, and dropout."""
    best: Literal["last", "valid_loss", "accuracy", "balanced_accuracy", "f1", "f2"] = "last"
    """Which epoch's weights to keep: the last, or the best by this metric of the validation split
    (f1, f2: several labels per image)."""
    checkpoint_seconds: float = 30.0
    """Seconds of training between checkpoints; 0: one after every step."""

    def __post_init__(self) -> None:
        OptimizerConfig.__post_init__(self)
        if self.epochs != "auto":
            schedule.check_cycles(self, self.epochs)
        decay, micro = self.layer_decay, self.micro_batch
        for flag, value, valid, wanted in (
            (
                "epochs",
                self.epochs,
                self.epochs == "auto" or self.epochs >= 1,
                "auto, or 1 or more",
            ),
            ("layer-decay", decay, decay == "auto" or 0 < decay <= 1, "auto, or above 0, up to 1"),
            (
                "batch-size",
                self.batch_size,
                self.batch_size == "auto" or self.batch_size >= 2,
                "auto, or 2 or more",
            ),
            ("micro-batch", micro, micro is None or micro >= 2, "2 or more"),
            ("clip", self.clip, 0 <= self.clip < math.inf, "0 or more"),
            ("ema", self.ema, 0 <= self.ema < 1, "from 0 up to 1"),
            ("seed", self.seed, self.seed >= 0, "0 or more"),
            (
                "checkpoint-seconds",
                self.checkpoint_seconds,
                self.checkpoint_seconds >= 0,
                "0 or more",
            ),
        ):
            if not valid:
                raise ConfigError(f"--{flag} is {value}.", f"{wanted}.", f"give another --{flag}.")
        if not -len(self.group_rates) <= self.freeze_to < len(self.group_rates):
            raise ConfigError(
                f"--freeze-to is {self.freeze_to}, and there are {len(self.group_rates)} layer"
                " groups.",
                f"from {-len(self.group_rates)} to {len(self.group_rates) - 1}; -1 trains the head"
                " alone.",
                "give another --freeze-to, or as many --rates as groups that you want.",
            )

    @property
    def group_rates(self) -> tuple[float, ...]:
        """The peak learning rate of each layer group; the last is that of the head."""
        if self.rates == "auto":
            return DEFAULT_RATES
        try:
            rates = tuple(float(word) for word in self.rates.split(","))
        except ValueError:
            rates = ()
        if not rates or not all(0 < rate < 1e3 for rate in rates):
            raise ConfigError(
                f"--rates is {self.rates}.",
                "auto, or learning rates above 0 with commas between them.",
                "give e.g. --rates 1e-4,1e-3,1e-2.",
            )
        return rates

    @property
    def total_epochs(self) -> int:
        """`epochs` as a number.

        Raises:
            AssertionError: `epochs` is still auto (see `resolve_epochs`).
        """
        if self.epochs == "auto":
            raise AssertionError("--epochs auto was not resolved")
        return self.epochs

    @property
    def global_batch(self) -> int:
        """Images per step, over all workers together."""
        return DEFAULT_BATCH_SIZE if self.batch_size == "auto" else self.batch_size

    def parameters(self) -> dict[str, Any]:
        """The settings by name, as a run and a bundle record them."""
        return asdict(self) | {"rates": list(self.group_rates), "batch_size": self.global_batch}


def resolve_epochs(config: FinetuneConfig, images: int) -> FinetuneConfig:
    """Replace `--epochs auto` by a number of epochs for this many training images: MIN_EPOCHS, or
    more for MIN_STEPS steps, but at most MAX_EPOCHS. With --cycle-len it is rounded up to the end
    of a cycle.
    """
    if config.epochs != "auto":
        return config
    steps = max(math.ceil(images / config.global_batch), 1)
    epochs = min(max(MIN_EPOCHS, math.ceil(MIN_STEPS / steps)), MAX_EPOCHS)
    return replace(config, epochs=schedule.round_up_to_cycle(config, epochs))


def split_in_pairs(count: int, parts: int) -> list[slice]:
    """Split rows into parts of nearly the same size, each beginning at an even row.

    No part is empty if there are at least two rows for each. Images are mixed in pairs
    (`augmentation.mix`), which therefore stay together.
    """
    pairs = (count + 1) // 2
    ends = [min(2 * (pairs * number // parts), count) for number in range(parts + 1)]
    return [slice(*pair) for pair in pairwise(ends)]
