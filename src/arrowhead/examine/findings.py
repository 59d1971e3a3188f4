"""What a report says first: the few things that are most worth a look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arrowhead.examine.mistakes import ConfusedPair
from arrowhead.examine.predictions import Predictions
from arrowhead.wording import pluralize

MAX_FINDINGS = 3
MIN_CLASS_IMAGES, MIN_RECALL = 10, 0.9  # a class with less recall is named


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


def model_findings(
    predictions: Predictions,
    metrics: Mapping[str, Any],
    confused: Sequence[ConfusedPair],
    faults: int,
) -> list[Finding]:
    """What the held-out images say about the model.

    Args:
        predictions: What it predicts.
        metrics: Of the held-out images, as `mistakes.evaluate` gives them.
        confused: Pairs of labels and predictions, the most frequent first.
        faults: How many files could not be read.
    """
    held_out = int(predictions.held_out.sum())
    if not held_out:
        text = "The bundle was trained on all of these images: nothing here says how good it is."
        return [Finding(1.0, text, "about", "About this report")]
    correct = int(predictions.correct[predictions.held_out].sum())
    text = f"{correct} of {pluralize(held_out, 'held-out image')} are right"
    if correct < held_out and confused and not predictions.multi:
        text += (
            f"; the most frequent mistake: {confused[0].label} taken for {confused[0].predicted}"
            f" ({pluralize(confused[0].images, 'image')})"
        )
    if faults:
        text += f"; {pluralize(faults, 'file')} could not be read"
    found = [Finding(1.0, f"{text}.", "pictures", "Look at the mistakes")]
    by_class = metrics["per_class"].items()
    weak = [line for line in by_class if line[1]["images"] >= MIN_CLASS_IMAGES]
    if weak and not predictions.multi:
        name, line = min(weak, key=lambda one: one[1]["recall"])
        if line["recall"] < MIN_RECALL:
            text = f"Of the images of {name} only {100 * line['recall']:.0f} % are recognized."
            found.append(Finding(0.35, text, "mistakes", "See the classes"))
    return found
