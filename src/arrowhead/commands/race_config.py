"""The settings of a race, and the bodies that take part."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from arrowhead.errors import ConfigError
from arrowhead.features.backbone import BodyConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class RaceConfig(BodyConfig):
    """The backbones of a race; `weights`, `mean`, `std` … are those of all of them."""

    bodies: str = "resnet34,mobilenet_v3_large,convnext_tiny"
    """Backbones with commas between them. BODY=WEIGHTS: with weights of its own."""
    share: float = 0.1
    """Share of every class that takes part, at least 20 images each and 200 in all."""

    def __post_init__(self) -> None:
        BodyConfig.__post_init__(self)
        if not 0 < self.share <= 1:
            raise ConfigError(f"--share is {self.share}.", "above 0, up to 1.", "give e.g. 0.1.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A body in the race: its settings and the folder for its features."""

    config: BodyConfig
    folder: Path

    @property
    def store(self) -> Path:
        """Its store, where `fit DATA FOLDER` looks for it."""
        return self.folder / "store"


def entries(request: RaceConfig, out: Path) -> list[Entry]:
    """The bodies of a race, whose features go to folders below `out`.

    Raises:
        ConfigError: There are fewer than two, or one occurs twice.
    """
    common = {one.name: getattr(request, one.name) for one in fields(BodyConfig)}
    result = []
    for name in request.bodies.split(","):
        body, _, weights = name.strip().partition("=")
        own = {"weights": weights} if weights else {}
        config = BodyConfig(**common | {"body": body} | own)
        result.append(Entry(config=config, folder=out / body.replace("/", "-")))
    folders = [one.folder for one in result]
    if twice := next((one for one in folders if folders.count(one) > 1), None):
        raise ConfigError(
            f"{twice.name} occurs twice in --bodies.", "each body once.", "leave one of them out."
        )
    if len(result) < 2:
        raise ConfigError(
            f"--bodies {request.bodies} is one body.",
            "two or more, with commas between them.",
            "give e.g. --bodies resnet34,mobilenet_v2.",
        )
    return result
