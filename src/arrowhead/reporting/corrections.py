"""Show which labels were corrected, and which corrections a new list of images keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arrowhead.data.catalog import Catalog
from arrowhead.features.corrections import CorrectedLabels, Correction, count_moves, show_labels
from arrowhead.reporting.run_context import Screen
from arrowhead.wording import join_first, pluralize, shell_command

MAX_PATHS_SHOWN = 3
MAX_ROWS_SHOWN = 20


def show_corrected_labels(
    path: Path, catalog: Catalog, corrected: CorrectedLabels, screen: Screen
) -> None:
    """Show how many labels are corrections, and which corrections do not apply any more.

    Args:
        path: The store.
        catalog: With the corrected labels.
        corrected: What the store's history made of the labels of the source.
        screen: Where to show it.
    """
    if count := len(corrected.source_labels):
        verb = "label is a correction" if count == 1 else "labels are corrections"
        command = shell_command(["arrowhead", "relabel", path, "--history"])
        screen.print(f"{count} {verb} ({command})")
    if corrected.overruled:
        examples = [
            f"{catalog.paths[row]} (corrected from {show_labels(one.old)} to"
            f" {show_labels(one.new)}, now {show_labels(catalog.labels[row])})"
            for row, one in corrected.overruled.items()
        ]
        screen.print(
            f"the source has a third label for {pluralize(len(examples), 'corrected image')}; it is"
            f" newer and is used: {join_first(examples, MAX_PATHS_SHOWN, ', ')}"
        )
    if paths := corrected.changed:
        verb = "is another image" if len(paths) == 1 else "are other images"
        screen.print(
            f"{pluralize(len(paths), 'file')} with a corrected label {verb} now; the label of the"
            f" source is used: {join_first(paths, MAX_PATHS_SHOWN, ', ')}"
        )


def show_relabelled(
    result: Mapping[str, Any], table: str, before: Catalog, after: Catalog, screen: Screen
) -> None:
    """Show what a table of new labels changed; result: see `commands.relabel.relabel`."""
    rest = []
    if result["unchanged"]:
        rest.append(f"{pluralize(result['unchanged'], 'row')} with the label that the store has")
    if result["skipped"]:
        rest.append(f"{pluralize(result['skipped'], 'row')} without a new label")
    if not result["labels"]:
        screen.print(f"{table} changes nothing: {', '.join(rest)}")
        return
    verb = "would change" if result["dry_run"] else "changed"
    screen.print(f"change {result['change']} by {result['by']}: {_describe(result, verb)}")
    if copies := result["copies"]:
        screen.print(
            f"{copies} of them {'is a copy' if copies == 1 else 'are copies'} of images in {table},"
            " byte for byte (--no-copies leaves copies alone)"
        )
    if rest:
        screen.print(f"left alone: {', '.join(rest)}")
    _show_classes(result, screen)
    if before.multi and not after.multi:
        screen.print(
            "no image has several labels any more: training will choose one for each image"
        )
    screen.print("features and splits are as before: no image moved between train and validation")


def show_undone(result: Mapping[str, Any], undone: Correction, left: int, screen: Screen) -> None:
    """Show what an undo changed.

    Args:
        result: See `commands.relabel.undo`.
        undone: A correction of the change that was undone.
        left: Number of changes that can still be undone.
        screen: Where to show it.
    """
    verb = "would be undone" if result["dry_run"] else "undone"
    screen.print(f"change {undone.change} ({undone.by}, {undone.when}) {verb}: {_describe(result)}")
    _show_classes(result, screen)
    screen.print(f"{pluralize(left, 'change')} left to undo")


def _describe(result: Mapping[str, Any], verb: str = "changed") -> str:
    """How many labels changed, and from what to what."""
    moves = join_first([f"{move} {count}" for move, count in result["moves"].items()])
    return f"{pluralize(result['labels'], 'label')} {verb}{f': {moves}' if moves else ''}"


def _show_classes(result: Mapping[str, Any], screen: Screen) -> None:
    if names := result["new_classes"]:
        word, them = ("class", "it") if len(names) == 1 else ("classes", "them")
        screen.print(
            f"new {word}: {join_first(names, separator=', ')};"
            f" bundles trained before do not know {them}"
        )
    if names := result["gone_classes"]:
        verb = "is no class" if len(names) == 1 else "are no classes"
        screen.print(f"{join_first(names, separator=', ')} {verb} any more: no image is left in it")


def show_history(
    path: Path, by_change: Mapping[int, Sequence[Correction]], labels: int, screen: Screen
) -> None:
    """Show all changes of a store, oldest first.

    Args:
        path: The store.
        by_change: Its corrections by the number of the change.
        labels: How many labels differ from the source's.
        screen: Where to show it.
    """
    if not by_change:
        screen.print(f"{path}: no label was corrected")
        return
    for number, rows in by_change.items():
        one = rows[0]
        moves = count_moves([each.old for each in rows], [each.new for each in rows])
        shown = join_first([f"{move} {count}" for move, count in moves.items()])
        undone = f" · undone {one.undone} by {one.undone_by}" if one.undone else ""
        screen.print(
            f"change {number} · {one.when} · {one.by} · {pluralize(len(rows), 'label')}: {shown}"
            f"{undone}"
        )
        for row in rows[:MAX_ROWS_SHOWN]:
            reason = f" ({row.reason})" if row.reason else ""
            screen.print(f"  {row.path}: {show_labels(row.old)} -> {show_labels(row.new)}{reason}")
        if len(rows) > MAX_ROWS_SHOWN:
            screen.print(f"  … and {len(rows) - MAX_ROWS_SHOWN} more (--json lists all)")
    verb = "differs" if labels == 1 else "differ"
    screen.print(f"{pluralize(labels, 'label')} {verb} from the source")
