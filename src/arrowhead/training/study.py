"""What is asked of a training on a store, and what came of it."""

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
from arrowhead.training import config as training_config
from arrowhead.training import grid
from arrowhead.training import logistic as training_logistic
from arrowhead.training.config import MIN_STEPS, TrainConfig, total_steps
from arrowhead.training.dataset import class_weighting
from arrowhead.training.grid import SweepConfig
from arrowhead.training.lr_finder import Curve, FinderConfig
from arrowhead.training.trainer import Trained
from arrowhead.wording import counted


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """All that is asked of the heads of one store."""

    head: TrainConfig = TrainConfig()
    finder: FinderConfig = FinderConfig()
    sweep: SweepConfig = SweepConfig()
    teach: bool = True
    """False: the LR finder alone."""
    start: Mapping[str, NDArray[Any]] | None = None
    """Weights that the heads begin with (see `dataset.Trial`)."""

    @property
    def overrides(self) -> list[dict[str, float]]:
        """What each head of the grid is given; one empty dict without a grid."""
        return grid.settings(self.sweep.grid) if self.sweep.grid else [{}]

    def __post_init__(self) -> None:
        if self.head.head == "logistic" and (self.sweep.grid or not self.teach):
            raise ConfigError(
                "--head logistic is found exactly: it has no learning rate to find and nothing for"
                " --grid to compare (its strength is chosen by cross-validation).",
                "a head that is trained by gradient descent.",
                "add --head linear" + (", or leave --grid out." if self.sweep.grid else "."),
            )
        if self.finder != FinderConfig() and not self.finds():
            logistic = self.head.head == "logistic"
            why = "--head logistic has none" if logistic else "it is given"
            raise ConfigError(
                f"Settings of the LR finder (--lr-find.…) but no learning rate to find: {why}.",
                "--rate auto, or no settings of the finder.",
                "leave the flags of the finder out, or "
                + ("add --head linear." if logistic else "the learning rate (--rate, --grid)."),
            )

    def resolve(self, store: Store) -> tuple[Study, list[str]]:
        """The study with what is auto made definite for a store, and lines that say what a user
        might not expect.
        """
        part = store.features(rows_only=True)
        train, valid = (part.label[part.split == split] for split in ("train", "valid"))
        classes, recipe = len(store.manifest()["classes"]), store.recipe
        head, said = self.head, []
        if head.head == "auto":
            work = len(train) * recipe.views * recipe.width * classes
            exact = (
                self.teach
                and self.start is None
                and not (self.sweep.grid or head.changed_descent_settings())
            )
            exact = exact and self.finder == FinderConfig() and work <= training_logistic.MOST_WORK
            head = dataclasses.replace(head, head="logistic" if exact else "linear")
            if self.teach and not exact:
                said.append(f"head: linear, by gradient descent, {self._why_not_exact()}")
        if head.class_weights == "auto":
            wanted = class_weighting(train, valid, classes)
            head = dataclasses.replace(head, class_weights=wanted)
            if wanted == "validation":
                said.append(
                    "classes come in other shares in training than in validation: training images"
                    " are weighted as validation has them (--class-weights none: as they come)"
                )
        enough = training_config.resolve_epochs(
            dataclasses.replace(head, epochs="auto"), len(train)
        )
        steps = total_steps(head, len(train))
        given = head.epochs != "auto" and head.rate == "auto"  # who gives both knows their own mind
        if given and 2 * steps < min(MIN_STEPS, total_steps(enough, len(train))):
            said.append(
                f"--epochs {head.epochs} of {counted(len(train), 'image')} is"
                f" {counted(steps, 'step')};"
                f" --epochs auto would take {total_steps(enough, len(train))}"
                f" ({counted(enough.total_epochs, 'epoch')})"
            )
        return dataclasses.replace(
            self, head=training_config.resolve_epochs(head, len(train))
        ), said

    def _why_not_exact(self) -> str:
        """Why --head auto does not take logistic regression, in words."""
        if flags := [
            "--" + name.replace("_", "-") for name in self.head.changed_descent_settings()
        ]:
            return f"as {', '.join(flags)} asks for (without: logistic regression, found exactly)"
        if self.sweep.grid:
            return "as --grid asks for (without: logistic regression, found exactly)"
        if self.finder != FinderConfig():
            return "as the LR finder's flags ask for (without: logistic regression, found exactly)"
        if self.start is not None:
            return "going on with the weights that are there"
        return "as logistic regression would take long here (--head logistic: all the same)"

    def finds(self) -> bool:
        """Whether the LR finder is needed."""
        if self.head.head == "logistic":
            return False
        return not self.teach or (self.head.rate == "auto" and "rate" not in self.overrides[0])

    def key(self, store: Store) -> str:
        """Stands for these settings and the store's content: what a checkpoint belongs to."""
        asked = dataclasses.asdict(dataclasses.replace(self, start=None))
        for name, value in sorted((self.start or {}).items()):
            asked[f"start.{name}"] = hashlib.sha256(value.tobytes()).hexdigest()
        del asked["head"]["checkpoint_seconds"]
        held = {str(path): digest for path, digest in store.expected_hashes().items()}
        text = json.dumps([__version__, asked, sorted(held.values())], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(kw_only=True, slots=True)
class Learned:
    """What came of a study. heads: one, or one per setting of the grid, in its order.

    best: position of the winner in `heads`. It is chosen once, here; the bundle, the folds, the
    learning curve and what is recorded all use it and `config`. config: all that the winner was
    trained with, its learning rate included; None if nothing was trained. ranking: of a grid, see
    `grid.summary`. folds: see `OutOfFold`. shares: the learning curve, see `learning_curve.curve`.
    """

    curve: Curve | None = None
    heads: list[Trained] = field(default_factory=list)
    best: int = 0
    config: TrainConfig | None = None
    ranking: dict[str, Any] | None = None
    folds: OutOfFold | None = None
    shares: dict[str, Any] | None = None
    seconds: float = 0.0

    @property
    def winner(self) -> Trained:
        """The head that becomes the bundle."""
        return self.heads[self.best]


@dataclass(frozen=True, kw_only=True, slots=True)
class OutOfFold:
    """row: int64 (n,), of the catalog; fold: int64 (n,), -1 for an image that was held out in none;
    logit: float32 (n, C), of the head that was trained without this fold, nan where there is none;
    last: what each fold's head ended with; epochs: for how many epochs they were trained;
    not_held_out: classes that no fold could hold out, with their numbers of images.
    """

    multi: bool
    row: NDArray[np.int64]
    fold: NDArray[np.int64]
    logit: NDArray[np.float32]
    last: list[dict[str, float]]
    epochs: int
    not_held_out: dict[str, int]
