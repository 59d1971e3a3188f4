"""The settings of the command advise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from arrowhead.errors import ConfigError

MIN_IMAGES = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class AdviseConfig:
    """What is tried, and how long it may take."""

    budget: float = 30.0
    """Minutes that a fine-tuning of all images may take; trials of it take no longer, either."""
    trial_images: int = 400
    """Images of the trials, drawn class by class: more make them more certain, and slower."""
    folds: int = 3
    """Parts of these images; in turn each is tested by heads and networks trained on the others."""
    augment: Literal["side-on", "top-down"] = "side-on"
    """How images are augmented: photos taken from the side, or from above (satellite, microscope).
    """

    def __post_init__(self) -> None:
        for flag, value, valid, wanted in (
            ("budget", self.budget, 0 < self.budget < math.inf, "more than 0 minutes"),
            (
                "trial-images",
                self.trial_images,
                self.trial_images >= MIN_IMAGES,
                f"{MIN_IMAGES} or more",
            ),
            ("folds", self.folds, 2 <= self.folds <= 10, "2 to 10"),
        ):
            if not valid:
                raise ConfigError(f"--{flag} is {value}.", f"{wanted}.", f"give another --{flag}.")
