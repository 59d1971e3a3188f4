"""The recipe: how a feature was made, and its fingerprint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from arrowhead import fileio
from arrowhead.errors import ConfigError, DataError
from arrowhead.features.store_format import FORMAT, RECIPE


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a feature was made. Features of unequal recipes are never mixed."""

    format: int = FORMAT
    body: str
    """torchvision's name of the network."""
    weights: str
    """sha256 of the body's tensors, whichever file they came from."""
    pool: str
    """avg, max or concat (both): from the last feature map to one row."""
    width: int
    """D, numbers per feature."""
    size: int
    """Side of the square the body sees, in pixels."""
    resize: str
    """crop (shorter side to 8/7 of size, middle cut out), squash, or pad."""
    interpolation: str = "linear"
    antialias: bool = True
    mean: tuple[float, float, float]
    """Per channel, of pixels scaled to 0..1."""
    std: tuple[float, float, float]
    views: int = 1
    """Rows per image: view 0 is clean, the others augmented."""
    augment: str = "none"
    """Policy of the augmented views."""
    augment_seed: int = 0
    dtype: str = "float16"
    decoder: str = "dali"
    """Who decodes, and where a turned photo's middle is (`pixels.RULES`)."""

    def json(self) -> str:
        """Canonical: sorted keys, no spaces."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @property
    def fingerprint(self) -> str:
        """16 hex digits that stand for the recipe."""
        return hashlib.blake2b(self.json().encode(), digest_size=8).hexdigest()

    @staticmethod
    def from_dict(fields: Mapping[str, Any], where: str) -> Recipe:
        """The recipe in `fields`, read from `where`; DataError if it is of another format."""
        known = {field.name for field in dataclasses.fields(Recipe)}
        if fields.get("format") != FORMAT or set(fields) != known:
            raise DataError(
                f"{where} holds a recipe of format {fields.get('format')}.",
                f"format {FORMAT}, with the fields this version knows.",
                "use the Arrowhead version that wrote it, or extract again into a new store.",
            )
        fileio.must_fit(fields, RECIPE, f"the recipe in {where}", "extract again into a new store.")
        triples = {name: tuple(fields[name]) for name in ("mean", "std")}
        return Recipe(**{**fields, **triples})

    def must_equal(self, other: Recipe, ours: str, theirs: str) -> None:
        """Refuse to mix features of this recipe (in `ours`) with those of `other` (`theirs`)."""
        for field in dataclasses.fields(Recipe):
            mine, its = getattr(self, field.name), getattr(other, field.name)
            if mine != its:
                raise ConfigError(
                    f"{ours} was made with {field.name} = {mine}, {theirs} with {its}.",
                    "one recipe: features made in two ways cannot be compared.",
                    f"ask for {field.name} = {mine}, or write to another place.",
                )
