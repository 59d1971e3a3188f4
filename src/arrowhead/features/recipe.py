"""The recipe: every setting that determines a feature, and a fingerprint of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from arrowhead import fileio
from arrowhead.errors import ConfigError, DataError
from arrowhead.features.store_format import FORMAT, RECIPE_SCHEMA

OPTIONAL_FIELDS = ("crop_pct", "body_precision")  # not written where they have their default


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Every setting that determines a feature. Features of different recipes are never mixed."""

    format: int = FORMAT
    body: str
    """torchvision's name of the network, or timm's after timm/."""
    weights: str
    """sha256 of the body's tensors, see `backbone.Weights.sha256`."""
    pool: str
    """avg (for a network of torchvision what it does itself), max, concat (both), cls (class
    token), cls+avg, or own (what another network of timm does itself)."""
    width: int
    """Numbers per feature (D)."""
    size: int
    """Side of the square input image, in pixels."""
    resize: str
    """crop (shorter side to size / crop_pct, then a center crop), squash, or pad."""
    interpolation: str = "linear"
    """linear or cubic, as DALI names them."""
    crop_pct: float | None = None
    """None: 7/8, with the resized side rounded to the nearest pixel; 1 for squash and pad. It is
    then not written, so recipes from before there was such a field keep their fingerprint."""
    antialias: bool = True
    mean: tuple[float, float, float]
    """Per channel, of pixels scaled to 0..1."""
    std: tuple[float, float, float]
    views: int = 1
    """Rows per image: view 0 is clean, the others are augmented."""
    augment: str = "none"
    """Augmentation policy of the other views."""
    augment_seed: int = 0
    dtype: str = "float16"
    body_precision: str = "fp32"
    """fp32, bf16 or fp16: of the body's products. fp32 is not written, as in recipes from before
    there was such a field."""
    decoder: str = "dali"
    """The decoder, and how it crops photos with an EXIF rotation (`DECODER_RULES`)."""

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    def to_dict(self) -> dict[str, Any]:
        """The fields as they are written."""
        fields = dataclasses.asdict(self)
        if self.crop_pct is None:
            del fields["crop_pct"]
        if self.body_precision == "fp32":
            del fields["body_precision"]
        return fields

    @property
    def fingerprint(self) -> str:
        """A hash of the recipe, 16 hex digits."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=8).hexdigest()

    def single_view(self) -> Recipe:
        """The recipe for scoring: one view without augmentation, whatever the training views."""
        return dataclasses.replace(self, views=1, augment="none", augment_seed=0)

    @staticmethod
    def from_dict(fields: Mapping[str, Any], where: str) -> Recipe:
        """Parse a recipe; `where` it was read from is for error messages.

        Raises DataError if it has another format.
        """
        field_names = {field.name for field in dataclasses.fields(Recipe)}
        if fields.get("format") != FORMAT or {*fields, *OPTIONAL_FIELDS} != field_names:
            raise DataError(
                f"{where} holds a recipe of format {fields.get('format')}.",
                f"format {FORMAT}, with the fields that this version knows.",
                "use the Arrowhead version that wrote it, or extract again into a new store.",
            )
        fileio.check_schema(
            fields, RECIPE_SCHEMA, f"the recipe in {where}", "extract again into a new store."
        )
        triples = {name: tuple(fields[name]) for name in ("mean", "std")}
        return Recipe(**{**fields, **triples})

    def require_equal(self, other: Recipe, ours: str, theirs: str) -> None:
        """Raise ConfigError if features of `other` cannot be mixed with those of this recipe.

        ours, theirs: names of what the two recipes belong to, for the message.
        """
        for field in dataclasses.fields(Recipe):
            our_value, their_value = getattr(self, field.name), getattr(other, field.name)
            if our_value != their_value:
                raise ConfigError(
                    f"{ours} was made with {field.name} = {our_value}, {theirs} with"
                    f" {their_value}.",
                    "the same recipe: features of different recipes cannot be compared.",
                    f"use {field.name} = {our_value}, or write to another folder.",
                )
