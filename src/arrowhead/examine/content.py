"""What the page of a report shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from arrowhead import __version__
from arrowhead.examine.findings import Finding
from arrowhead.examine.galleries import Gallery


@dataclass(kw_only=True, slots=True)
class Content:
    """What the template report.html.j2 shows; a section whose value is None is left out."""

    title: str
    subtitle: str
    classes: list[str]
    multi: bool
    command: str
    about: list[tuple[str, str]]
    version: str = __version__
    first: list[Finding] = field(default_factory=list)
    also: list[Finding] = field(default_factory=list)
    left_out: str = ""
    tiles: list[dict[str, str]] = field(default_factory=list)
    held_out_sentence: str = ""
    galleries: list[Gallery] = field(default_factory=list)
    cards: list[Any] = field(default_factory=list)
    has_heat: bool = False
    heat_sentence: str = ""
    confusion: dict[str, Any] | None = None
    per_class: list[dict[str, Any]] = field(default_factory=list)
    per_class_caption: str = ""
    label_errors: dict[str, Any] | None = None
    before_after: dict[str, Any] | None = None
    duplicates: dict[str, Any] | None = None
    slices: dict[str, Any] | None = None
    outliers: dict[str, Any] | None = None
    poor_images: dict[str, Any] | None = None
    faults: dict[str, Any] | None = None
    map: dict[str, Any] | None = None
    charts: list[dict[str, str]] = field(default_factory=list)

    @property
    def sections(self) -> list[tuple[str, str]]:
        """Anchor and name of each section that is there."""
        named = [
            ("pictures", "Pictures", self.cards),
            ("mistakes", "Mistakes", self.confusion),
            ("before", "Before and after", self.before_after),
            ("labels", "Labels", self.label_errors),
            ("duplicates", "Duplicates", self.duplicates),
            ("slices", "Slices", self.slices),
            ("unusual", "Unusual", self.outliers or self.faults),
            ("map-section", "Map", self.map),
            ("charts", "Curves", self.charts),
        ]
        return [(anchor, name) for anchor, name, shown in named if shown] + [("about", "About")]
