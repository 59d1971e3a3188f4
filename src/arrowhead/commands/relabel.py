"""The command relabel: correct labels of a feature store, undo that, show what was corrected.

    table of new labels    data.label_fixes
      -> rows and labels   commands.label_changes   checked against the store; copies added
      -> history           features.corrections     the corrections before and these
      -> all labels        computed again from those of the source
      -> the store         Store.commit_labels      catalog, history and manifest

No image is read or decoded, and no feature is written.
"""

from __future__ import annotations

import dataclasses
import getpass
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from arrowhead.commands import label_changes
from arrowhead.commands.label_changes import TableConfig
from arrowhead.data import label_fixes
from arrowhead.data.catalog import Catalog
from arrowhead.errors import ConfigError
from arrowhead.features import corrections
from arrowhead.features.corrections import Correction, StoreLabels
from arrowhead.features.store import Store
from arrowhead.reporting import corrections as reporting_corrections
from arrowhead.reporting.run_context import Screen


@dataclass(frozen=True, kw_only=True, slots=True)
class ChangeConfig:
    """What is noted about a change of labels."""

    by: str | None = None
    """Who makes the change, for the history. Default: your user name."""
    reason: str = ""
    """Why, for the history. A column reason of the table says it row by row."""
    dry_run: bool = False
    """Show what would change, and change nothing."""

    @property
    def author(self) -> str:
        """Who makes the change."""
        try:
            return self.by or getpass.getuser()
        except (KeyError, OSError):  # a container without a user name
            return "unknown"


def relabel(
    path: Path, fixes: str | Path, table: TableConfig, config: ChangeConfig, screen: Screen
) -> dict[str, Any]:
    """Apply a table of new labels to the store at `path`.

    Returns:
        store, dry_run, change (its number; None if nothing changed), by, labels (how many changed),
        copies (how many of them the table does not name), unchanged, skipped (rows without a new
        label), moves, rows {path, old, new}, classes, new_classes, gone_classes, corrections (how
        many labels differ from the source's).

    Raises:
        ConfigError: The table cannot be read, names images that the store lacks or labels that are
            no classes, was made for other labels than the store has, or leaves too few classes.
        DataError: A file of the store has changed.
    """
    store = Store(path)
    rows = label_fixes.read_fixes(fixes, table.column, table.path_column)
    with _writable(store, config, screen):
        state = StoreLabels.read(store)
        changes = label_changes.plan_changes(state, rows, table)
        before, when = state.catalog, _now()
        number = max((one.change for one in state.history), default=0) + 1
        changed = {row for row, new in changes.labels.items() if new != before.labels[row]}
        contents = {state.image_ids[row] for row in changed if table.copies}
        added = [
            Correction(
                change=number,
                when=when,
                by=config.author,
                reason=changes.reasons[row] or config.reason,
                path=before.paths[row],
                image_id=state.image_ids[row],
                old=before.labels[row],
                new=labels,
                copies=table.copies,
            )
            for row, labels in sorted(changes.labels.items())
            if row in changed or state.image_ids[row] in contents
        ]
        history = [*state.history, *added]
        after = state.with_history(history, f"change {rows.source}; nothing was changed.")
        result = _commit(state, after, history, config)
    result |= {
        "change": number if added else None,
        "by": config.author,
        "copies": sum(before.labels[row] != after.labels[row] for row in changes.copies),
        "unchanged": len(changes.labels.keys() - changed - {*changes.copies}),
        "skipped": rows.skipped,
    }
    reporting_corrections.show_relabelled(result, rows.source, before, after, screen)
    return result


def undo(path: Path, config: ChangeConfig, screen: Screen) -> dict[str, Any]:
    """Undo the last change of the store at `path` that is in effect.

    Returns:
        store, dry_run, change (the number of the change that was undone), by, labels, moves, rows,
        classes, new_classes, gone_classes, corrections: see `relabel`.

    Raises:
        ConfigError: There is none, or the labels before leave too few classes.
        DataError: A file of the store has changed.
    """
    store = Store(path)
    with _writable(store, config, screen):
        state = StoreLabels.read(store)
        if not (active := corrections.active_changes(state.history)):
            raise ConfigError(
                f"{path} has no correction {'left ' * bool(state.history)}to undo.",
                "a store with a change by `arrowhead relabel STORE FIXES.csv`.",
                "give --history to see what was corrected and undone.",
            )
        when, by = _now(), config.author
        history = [
            dataclasses.replace(one, undone=when, undone_by=by) if one.change == active[-1] else one
            for one in state.history
        ]
        do = "put the images or labels of the source right, or correct other labels first."
        after = state.with_history(history, do)
        result = _commit(state, after, history, config)
    undone = next(one for one in history if one.change == active[-1])
    result |= {"change": undone.change, "by": by}
    reporting_corrections.show_undone(result, undone, len(active) - 1, screen)
    return result


def show_history(path: Path, screen: Screen) -> dict[str, Any]:
    """Show the corrections of the store at `path`, oldest first.

    Returns:
        store, corrections (how many labels differ from the source's), changes {change, when, by,
        undone, undone_by, labels, moves, rows}.
    """
    store = Store(path)
    labels = len(Catalog(**store.read_catalog()).source_labels)
    by_change: dict[int, list[Correction]] = {}
    for one in corrections.read_history(store):
        if one.old != one.new:
            by_change.setdefault(one.change, []).append(one)
    reporting_corrections.show_history(path, by_change, labels, screen)
    changes = [
        {name: getattr(rows[0], name) for name in ("change", "when", "by", "undone", "undone_by")}
        | {
            "labels": len(rows),
            "moves": corrections.count_moves([one.old for one in rows], [one.new for one in rows]),
            "rows": [one.plain() for one in rows],
        }
        for rows in by_change.values()
    ]
    return {"store": str(path), "corrections": labels, "changes": changes}


@contextmanager
def _writable(store: Store, config: ChangeConfig, screen: Screen) -> Iterator[None]:
    """Lock the store, unless nothing will be written."""
    if config.dry_run:
        yield
        return
    with store.lock(screen.print):
        yield


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _commit(
    state: StoreLabels, after: Catalog, history: Sequence[Correction], config: ChangeConfig
) -> dict[str, Any]:
    """Write catalog and history if the history has changed; the labels that changed."""
    if list(history) != state.history and not config.dry_run:
        state.store.commit_labels(after.columns(), corrections.history_columns(history))
    before = state.catalog
    rows = [row for row, labels in enumerate(after.labels) if labels != before.labels[row]]
    old, new = [before.labels[row] for row in rows], [after.labels[row] for row in rows]
    return {
        "store": str(state.store.path),
        "dry_run": config.dry_run,
        "labels": len(rows),
        "moves": corrections.count_moves(old, new),
        "rows": [
            {"path": after.paths[row], "old": list(one), "new": list(other)}
            for row, one, other in zip(rows, old, new, strict=True)
        ],
        "classes": after.classes,
        "new_classes": sorted({*after.classes} - {*before.classes}),
        "gone_classes": sorted({*before.classes} - {*after.classes}),
        "corrections": len(after.source_labels),
    }
