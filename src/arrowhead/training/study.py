"""The request for a training on a feature store, and its results."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead import __version__
from arrowhead.errors import ConfigError
from arrowhead.features.store import Store
from arrowhead.training import grid
from arrowhead.training import logistic as training_logistic
from arrowhead.training.config import MIN_STEPS, TrainConfig, resolve_epochs, total_steps
from arrowhead.training.dataset import resolve_class_weights
from arrowhead.training.grid import SweepConfig
from arrowhead.training.lr_finder import Curve, FinderConfig
from arrowhead.training.trainer import TrainedHead
from arrowhead.wording import pluralize


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """The request: which heads to train on a store, and what to examine about them.

    Attributes:
        head: The settings of the head.
        finder: The settings of the LR finder.
        sweep: A grid, folds and a learning curve.
        train_heads: False runs the LR finder alone.
        initial_state: The heads' initial weights (see `dataset.Trial`).
    """

    head: TrainConfig = TrainConfig()
    finder: FinderConfig = FinderConfig()
    sweep: SweepConfig = SweepConfig()
    train_heads: bool = True
    initial_state: Mapping[str, NDArray[Any]] | None = None

    @property
    def overrides(self) -> list[dict[str, float]]:
        """The settings of each head of the grid; one empty dict without a grid."""
        return grid.parse_grid(self.sweep.grid) if self.sweep.grid else [{}]

    def __post_init__(self) -> None:
        if self.head.head == "logistic" and (self.sweep.grid or not self.train_heads):
            raise ConfigError(
                "--head logistic has no learning rate to find and no settings for --grid to"
                " compare (it chooses its L2 strength by cross-validation).",
                "a head that is trained by gradient descent.",
                "add --head linear" + (", or leave --grid out." if self.sweep.grid else "."),
            )
        if self.finder != FinderConfig() and not self.needs_lr_finder():
            logistic = self.head.head == "logistic"
            why = "--head logistic has none" if logistic else "you gave it"
            raise ConfigError(
                f"Settings of the LR finder (--lr-find.…) but no learning rate to find: {why}.",
                "--rate auto, or no settings of the finder.",
                "leave the flags of the finder out, or "
                + ("add --head linear." if logistic else "the learning rate (--rate, --grid)."),
            )

    def resolve(self, store: Store) -> tuple[Study, list[str]]:
        """Replace `auto` by what it stands for on a store.

        Returns:
            The study, and messages about what a user might not expect.
        """
        part = store.features(rows_only=True)
        train, valid = (part.label[part.split == split] for split in ("train", "valid"))
        classes = len(store.manifest()["classes"])
        head, messages = self.head, []
        if head.head == "auto":
            reason = self._reason_for_descent(store, len(train))
            head = dataclasses.replace(head, head="linear" if reason else "logistic")
            if self.train_heads and reason:
                messages.append(f"head: linear, trained by gradient descent, {reason}")
        if head.class_weights == "auto":
            weighting = resolve_class_weights(train, valid, classes)
            head = dataclasses.replace(head, class_weights=weighting)
            if weighting == "validation":
                messages.append(
                    "class frequencies differ between training and validation: training images are"
                    " weighted to match validation (--class-weights none: no weights)"
                )
        images = len(train)
        steps = total_steps(head, images)
        auto = resolve_epochs(dataclasses.replace(head, epochs="auto"), images)
        # A user who gives both epochs and learning rate needs no advice.
        advise = head.epochs != "auto" and head.rate == "auto"
        if advise and 2 * steps < min(MIN_STEPS, total_steps(auto, images)):
            messages.append(
                f"--epochs {head.epochs} of {pluralize(images, 'image')} is"
                f" {pluralize(steps, 'step')};"
                f" --epochs auto would take {total_steps(auto, images)}"
                f" ({pluralize(auto.total_epochs, 'epoch')})"
            )
        return dataclasses.replace(self, head=resolve_epochs(head, images)), messages

    def _reason_for_descent(self, store: Store, images: int) -> str:
        """Say why --head auto does not take logistic regression; "" if it does."""
        default = "(default: logistic regression)"
        if changed := self.head.changed_descent_settings():
            flags = ", ".join("--" + name.replace("_", "-") for name in changed)
            return f"because you set {flags} {default}"
        if self.sweep.grid:
            return f"because you set --grid {default}"
        if self.finder != FinderConfig() or not self.train_heads:
            return f"because you set flags of the LR finder {default}"
        if self.initial_state is not None:
            return "because training continues from existing weights"
        recipe, classes = store.recipe, len(store.manifest()["classes"])
        if images * recipe.views * recipe.width * classes > training_logistic.MAX_AUTO_WORK:
            return "because logistic regression would take long here (--head logistic: use it)"
        return ""

    def needs_lr_finder(self) -> bool:
        """Return whether the learning rate is still to be found."""
        if self.head.head == "logistic":
            return False
        if not self.train_heads:
            return True
        return self.head.rate == "auto" and "rate" not in self.overrides[0]

    def key(self, store: Store) -> str:
        """Return a hash of the settings and the store's content, which checkpoints belong to."""
        request: dict[str, Any] = {
            "head": dataclasses.asdict(self.head),
            "finder": dataclasses.asdict(self.finder),
            "sweep": dataclasses.asdict(self.sweep),
            "teach": self.train_heads,  # as earlier checkpoints have it
            "start": None,
        }
        for name, value in sorted((self.initial_state or {}).items()):
            request[f"start.{name}"] = hashlib.sha256(value.tobytes()).hexdigest()
        del request["head"]["checkpoint_seconds"]
        text = json.dumps(
            [__version__, request, sorted(store.expected_hashes().values())], sort_keys=True
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(kw_only=True, slots=True)
class StudyResult:
    """The result of a study.

    Attributes:
        curve: The LR finder's curve, if it ran.
        heads: The trained head; with a grid one head per setting, in the grid's order.
        best: The position of the winner in `heads`. It is chosen once, here: the bundle, the
            folds, the learning curve and the records all use it and `config`.
        config: All settings of the winner, its learning rate included; None if no head was
            trained.
        ranking: With a grid, see `grid.rank_settings`.
        folds: With folds, see `OutOfFold`.
        shares: With a learning curve, see `learning_curve.curve`.
        seconds: How long the study took.
    """

    curve: Curve | None = None
    heads: list[TrainedHead] = field(default_factory=list)
    best: int = 0
    config: TrainConfig | None = None
    ranking: dict[str, Any] | None = None
    folds: OutOfFold | None = None
    shares: dict[str, Any] | None = None
    seconds: float = 0.0

    @property
    def winner(self) -> TrainedHead:
        """The head that becomes the bundle."""
        return self.heads[self.best]


@dataclass(frozen=True, kw_only=True, slots=True)
class OutOfFold:
    """Predictions of images by heads that were not trained on them.

    Attributes:
        multi: Whether images have several labels.
        row: Rows of the catalog, int64 (n,).
        fold: The fold that holds each image out, int64 (n,); -1: none.
        logit: Logits of the head trained without this fold, float32 (n, C); nan if there is none.
        last: The final metrics of each fold's head.
        epochs: The number of epochs that the heads were trained for.
        not_held_out: Classes that no fold could hold out, with their numbers of images.
    """

    multi: bool
    row: NDArray[np.int64]
    fold: NDArray[np.int64]
    logit: NDArray[np.float32]
    last: list[dict[str, float]]
    epochs: int
    not_held_out: dict[str, int]
