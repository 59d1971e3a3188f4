"""What a report says first: the few things that are most worth a look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_FINDINGS = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """A sentence about the data or the model.

    Attributes:
        weight: How much it matters, from 0 (nothing to do) to 1 (look at it before all else).
        text: The sentence.
        anchor, link: The section that shows more, and the words of the link to it.
    """

    weight: float
    text: str
    anchor: str
    link: str


def rank(findings: Sequence[Finding]) -> tuple[list[Finding], list[Finding]]:
    """The three weightiest findings, and the others; equal weights keep their order."""
    ranked = sorted(findings, key=lambda finding: -finding.weight)
    return ranked[:MAX_FINDINGS], ranked[MAX_FINDINGS:]
