"""The sections of a report about the data: labels, duplicates, slices, outliers, faults.

Each function turns the result of an analysis into what the template shows, and into the sentence
that the report may begin with.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from arrowhead.data.catalog import Catalog
from arrowhead.evaluation.metrics import wilson_interval
from arrowhead.examine import duplicates as examine_duplicates
from arrowhead.examine.cards import CardMaker
from arrowhead.examine.duplicates import DuplicateGroup, Duplicates
from arrowhead.examine.faults import FaultKind
from arrowhead.examine.findings import Finding
from arrowhead.examine.label_errors import NO_LABEL, LabelErrors
from arrowhead.examine.outliers import Outliers
from arrowhead.examine.poor_images import PoorImages
from arrowhead.examine.predictions import Predictions
from arrowhead.examine.slices import LISTED_WITH_ROWS, Slice, SliceReport
from arrowhead.wording import pluralize

MIN_LABEL_CARDS, MAX_LABEL_CARDS = 6, 48
MIN_LABEL_SCORE = 0.1  # labels that are less likely wrong are not shown
MAX_GROUPS, MAX_GROUP_CARDS = 12, 6
MAX_SLICE_CARDS, MAX_OTHER_SLICE_CARDS, MAX_SAME_SLICES = 12, 6, 3
MAX_SLICES = LISTED_WITH_ROWS  # that are not worse
MAX_OUTLIERS, MAX_POOR_IMAGES = 12, 24
MIN_CLEAN_IMAGES = 10  # without copies in training, of which an accuracy is told


@dataclass(frozen=True, slots=True)
class Section:
    """What a section shows, and what it adds to the findings."""

    content: dict[str, Any]
    findings: Sequence[Finding] = ()


# ---------------------------------------------------------------------------- labels


def shown_label_errors(found: LabelErrors) -> list[int]:
    """The entries of `found` to show: as many as are probably wrong, and a few more."""
    probable = round(found.estimated_errors) if found.reliable else 0
    wanted = max(found.flagged, probable, MIN_LABEL_CARDS)
    count = min(wanted, MAX_LABEL_CARDS, len(found.row))
    return [k for k in range(count) if k < found.flagged or found.score[k] >= MIN_LABEL_SCORE]


def label_errors_section(
    found: LabelErrors, catalog: Catalog, classes: Sequence[str], store: str, card_of: CardMaker
) -> Section:
    """Labels that are probably wrong, with what they should be."""
    cards = []
    for k in shown_label_errors(found):
        row = int(found.row[k])
        suggested = _suggested_labels(found, k, catalog.labels[row], classes)
        cards.append(card_of(row, suggested="|".join(suggested), score=float(found.score[k])))
    images = len(found.row)
    low, high = found.interval
    estimate = round(found.estimated_errors)
    if not found.learnable:
        sentence = (
            "The labels cannot be predicted from the features better than by the classes' sizes,"
            " so only copies of an image with different labels are named."
        )
    elif not found.reliable:
        sentence = (
            f"Only {100 * found.accuracy:.0f} % of the labels are predicted by models that were not"
            " trained on them, so these cannot tell wrong labels from hard ones: only copies of an"
            " image with different labels are named."
        )
    elif estimate == 0 and not found.flagged:
        sentence = f"No label of the {pluralize(images, 'image')} is likely to be wrong."
    else:
        sentence = (
            f"About {_wrong_labels(found, estimate)} (95 % interval {low:.0f} to {high:.0f}). The"
            " score is the probability that a label is wrong, judged by models that were not"
            " trained on it."
        )
    content = {
        "sentence": sentence,
        "cards": cards,
        "command": shlex.join(["arrowhead", "relabel", store, "fixes.csv"]),
    }
    if not found.flagged:
        return Section(content)
    text = f"{_wrong_labels(found, found.flagged)}."
    if estimate > found.flagged and found.reliable:
        text = f"About {_wrong_labels(found, estimate)}."
    return Section(content, [Finding(0.92, text, "labels", "Check and correct")])


def _wrong_labels(found: LabelErrors, count: int) -> str:
    """How many labels are wrong, in words; with several labels an image may have many of them."""
    verb, images = "is" if count == 1 else "are", len(found.row)
    if found.multi:
        labels = f"{pluralize(count, 'label')} of {pluralize(images, 'image')}"
        return f"{labels} {verb} probably missing or too many"
    return f"{count} of {pluralize(images, 'label')} {verb} probably wrong"


def _suggested_labels(
    found: LabelErrors, k: int, labels: Sequence[str], classes: Sequence[str]
) -> list[str]:
    """The labels that an image should have, according to one entry."""
    suggested = int(found.suggested[k])
    if not found.multi:
        return [] if suggested == NO_LABEL else [classes[suggested]]
    if suggested == NO_LABEL:
        return [name for name in labels if name != classes[int(found.label[k])]]
    return sorted({*labels, classes[suggested]})


# ---------------------------------------------------------------------------- duplicates


def shown_groups(found: Duplicates, catalog: Catalog) -> list[DuplicateGroup]:
    """The groups to show: those across splits first, then those with different labels."""
    across = {id(group) for group in examine_duplicates.groups_across_splits(found, catalog)}
    mixed = {id(group) for group in examine_duplicates.groups_with_different_labels(found, catalog)}
    order = sorted(
        found.groups, key=lambda group: (id(group) not in across, id(group) not in mixed)
    )
    return order[:MAX_GROUPS]


def duplicates_section(
    found: Duplicates, catalog: Catalog, predictions: Predictions, card_of: CardMaker, command: str
) -> Section:
    """Copies of images, and what the accuracy is without those that are also in training."""
    across = {id(group) for group in examine_duplicates.groups_across_splits(found, catalog)}
    groups = []
    for number, group in enumerate(shown_groups(found, catalog), 1):
        rows = group.rows.tolist()
        labels = {catalog.labels[row] for row in rows}
        title = f"Group {number}: {len(rows)} {group.kind} copies"
        title += " in training and validation or test" if id(group) in across else ""
        title += ", with different labels" if len(labels) > 1 else ""
        cards = [
            card_of(row, note=f"{catalog.splits[row]} · label {', '.join(catalog.labels[row])}")
            for row in rows[:MAX_GROUP_CARDS]
        ]
        groups.append({"title": title, "cards": cards})
    sentence = _describe_groups(found.groups)
    findings = []
    leaked_N = examine_duplicates.leaked_rows(found, np.array(catalog.splits))
    leaked_M = leaked_N[predictions.row]
    if leaked := int(leaked_M.sum()):
        exact = int((leaked_M & ~predictions.held_out).sum())  # the bundle knows their content
        text = (
            f"{pluralize(leaked, 'validation or test image')}"
            f" {'are copies' if leaked > 1 else 'is a copy'} of training images"
            f" ({exact} exact, {leaked - exact} near)"
        )
        clean_M = predictions.held_out & ~leaked_M
        if clean_M.sum() >= MIN_CLEAN_IMAGES and not predictions.multi:
            correct, total = int(predictions.correct[clean_M].sum()), int(clean_M.sum())
            low, high = wilson_interval(correct, total)
            text += (
                f"; on the others the accuracy is {correct / total:.4f} ({correct} of {total}, 95 %"
                f" interval {low:.3f} to {high:.3f})"
            )
        sentence = f"{text}. {sentence}"
        findings.append(Finding(0.95, f"{text}.", "duplicates", "See the copies"))
    elif found.groups:
        text = f"{pluralize(len(found.groups), 'group')} of copies of the same photo."
        findings.append(Finding(0.3, text, "duplicates", "See them"))
    if found.compared and not leaked:
        sentence += " No validation or test image is a copy of a training image."
    more = len(found.groups) - len(groups)
    content = {
        "sentence": sentence + (f" {more} more groups are in duplicates.csv." if more > 0 else ""),
        "groups": groups,
        "command": command if found.groups else None,
    }
    return Section(content, findings)


def _describe_groups(groups: Sequence[DuplicateGroup]) -> str:
    """How many groups there are, in words."""
    if not groups:
        return "No image is a copy of another one."
    files = sum(len(group.rows) for group in groups)
    exact = sum(group.kind == "exact" for group in groups)
    return (
        f"{pluralize(files, 'file')} {'show' if files > 1 else 'shows'}"
        f" {pluralize(len(groups), 'photo')}: {pluralize(exact, 'group')} of exact copies,"
        f" {len(groups) - exact} of near copies (resized, cropped, turned, edited)."
    )


# ---------------------------------------------------------------------------- slices


def slices_section(found: SliceReport, predictions: Predictions, card_of: CardMaker) -> Section:
    """Groups of images on which the model is worse, each with its mistakes."""
    mistakes = _slice_mistakes(found, predictions)
    worse = len(found.worse)
    lines = [
        {
            "name": one.name,
            "note": _slice_note(one),
            "images": one.images,
            "accuracy": one.accuracy,
            "low": one.low,
            "high": one.high,
            "rest": one.rest_accuracy,
            "p": "" if one.adjusted_p is None else f"{one.adjusted_p:.2g}",
            "significant": number < worse,
            "shown": len(rows),
            "title": f"Mistakes on images with {one.name}",
            "count": pluralize(wrong, "mistake")
            if wrong == len(rows)
            else f"{len(rows)} of {pluralize(wrong, 'mistake')}, those of the highest loss",
        }
        for number, (one, rows, wrong) in enumerate(mistakes)
    ]
    shown_in: dict[int, list[str]] = {}
    for number, (_, rows, _) in enumerate(mistakes):
        for position, row in enumerate(rows):
            shown_in.setdefault(row, []).append(f"{number}:{position}")
    findings = []
    if found.worse:
        findings.append(Finding(0.9, slice_sentence(found.worse[0]), "slices", "See the slices"))
        sentence = (
            f"{pluralize(worse, 'slice')} of {found.tested} examined"
            f" {'are' if worse > 1 else 'is'} significantly worse than the rest, also when the"
            " number of slices is accounted for."
        )
        if worse > 1:
            sentence += " Each is compared without the images of those above it."
    else:
        sentence = (
            f"None of the {found.tested} examined slices is significantly worse than the rest."
            if found.tested
            else "There are too few held-out images to compare slices."
        )
    content = {
        "sentence": " ".join([sentence, *found.notes]),
        "caption": f"Held-out images; accuracy of all {found.images}: {found.accuracy:.4f}",
        "lines": lines,
        "cards": [card_of(row, galleries=names) for row, names in shown_in.items()],
    }
    return Section(content, findings)


def slice_sentence(worst: Slice) -> str:
    """What is said of the worst slice; with a name such as a camera's, if it has much the same
    images: that says more than a range of numbers.
    """
    name = next((name for name in worst.same_images if ": " in name), "")
    return (
        f"Accuracy is lower on images with {worst.name}: {worst.accuracy:.3f} of {worst.images},"
        f" against {worst.rest_accuracy:.3f} of all others"
        f"{f' (much the same images: {name})' if name else ''}."
    )


def shown_slice_rows(found: SliceReport, predictions: Predictions) -> list[int]:
    """The rows of the pictures that `slices_section` shows."""
    return [row for _, rows, _ in _slice_mistakes(found, predictions) for row in rows]


def _slice_mistakes(
    found: SliceReport, predictions: Predictions
) -> list[tuple[Slice, list[int], int]]:
    """The slices to show, the worse ones first: each with the rows of the mistakes to show, the
    highest loss first, and the number of all its mistakes.
    """
    result = []
    for number, one in enumerate([*found.worse, *found.others[:MAX_SLICES]]):
        is_wrong = np.isin(predictions.row, one.row) & ~predictions.correct & predictions.held_out
        wrong = np.flatnonzero(is_wrong)
        wrong = wrong[np.argsort(-predictions.loss[wrong], kind="stable")]
        most = MAX_SLICE_CARDS if number < len(found.worse) else MAX_OTHER_SLICE_CARDS
        result.append((one, predictions.row[wrong[:most]].tolist(), len(wrong)))
    return result


def _slice_note(one: Slice) -> str:
    """Which images are left out of a slice, and which other slices are nearly the same."""
    notes = ["without the images of the slices above"] if one.without else []
    if one.same_images:
        names = ", ".join(one.same_images[:MAX_SAME_SLICES])
        more = ", …" if len(one.same_images) > MAX_SAME_SLICES else ""
        notes.append(f"much the same images: {names}{more}")
    return "; ".join(notes)


# ---------------------------------------------------------------------------- unusual images


def shown_outliers(found: Outliers) -> list[int]:
    """The most novel images of all splits, the most novel first."""
    rows = np.concatenate([np.zeros(0, np.int64), *found.novel.values()])
    order = np.lexsort((rows, -found.distance[rows]))
    return [int(row) for row in rows[order][:MAX_OUTLIERS]]


def outliers_section(found: Outliers, catalog: Catalog, card_of: CardMaker) -> Section:
    """The images that are least like the training images."""
    cards = [
        card_of(
            row,
            note=f"{catalog.splits[row]} · {', '.join(catalog.labels[row])} · distance"
            f" {found.distance[row]:.2f}",
        )
        for row in shown_outliers(found)
    ]
    sentence = (
        "The images of all splits least like any training image, by the distance of their features"
        " (0: the same, 2: opposite)."
    )
    if np.isfinite(found.threshold):
        sentence += f" 5 % of the validation images lie above {found.threshold:.2f}."
    return Section({"sentence": sentence, "cards": cards})


def shown_poor_images(found: PoorImages) -> list[tuple[int, str]]:
    """The poor images to show, with their reasons."""
    pairs = [(row, reason) for reason, rows in found.rows.items() for row in rows]
    return pairs[:MAX_POOR_IMAGES]


def poor_images_section(found: PoorImages, catalog: Catalog, card_of: CardMaker) -> Section:
    """Images with little to see."""
    cards = [
        card_of(row, note=f"{reason} · {catalog.splits[row]} · {', '.join(catalog.labels[row])}")
        for row, reason in shown_poor_images(found)
    ]
    counts = ", ".join(f"{len(rows)} {reason}" for reason, rows in found.rows.items())
    sentence = (
        f"{pluralize(found.count, 'image')} with little to see (of {found.measured} measured):"
        f" {counts}."
    )
    if not found.count:
        return Section({"sentence": "", "cards": []})
    return Section(
        {"sentence": sentence, "cards": cards}, [Finding(0.7, sentence, "unusual", "See them")]
    )


def faults_section(found: Sequence[FaultKind], images: int) -> Section:
    """Files that could not be read, by kind."""
    faults = sum(kind.images for kind in found)
    if not faults:
        return Section({"sentence": "Every file could be read.", "lines": []})
    lines = [
        {
            "kind": kind.kind,
            "files": kind.images,
            "examples": [f"{path} ({fault})" for path, fault in kind.examples[:3]],
        }
        for kind in found
    ]
    share = faults / images
    text = f"{pluralize(faults, 'file')} could not be read ({100 * share:.1f} %)."
    finding = Finding(0.6 if share > 0.01 else 0.25, text, "unusual", "See which")
    return Section({"sentence": f"{text} They are in no figure.", "lines": lines}, [finding])
