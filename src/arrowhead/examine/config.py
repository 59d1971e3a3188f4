"""The flags of reports."""

from __future__ import annotations

from dataclasses import dataclass

from arrowhead.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """Whether a training ends with a report."""

    report: bool = True
    """Write a report to open in a browser, BUNDLE.report/report.html: what the model and the labels
    got wrong."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExamineConfig:
    """What a report contains."""

    pictures: int = 24
    """Pictures in each gallery."""
    label_errors: bool = True
    """Look for labels that are probably wrong."""
    duplicates: bool = True
    """Look for copies of images, also between training and held-out images."""
    slices: bool = True
    """Look for groups of images on which the model is worse."""
    heatmaps: bool = True
    """Show where the model looked."""
    map: bool = True
    """Draw a map of the images, similar ones near each other."""

    def __post_init__(self) -> None:
        if not 1 <= self.pictures <= 200:
            raise ConfigError(
                f"--pictures is {self.pictures}.", "1 to 200.", "give --pictures in that range."
            )
