"""Check a table of new labels against a feature store: which of its rows get which labels."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from arrowhead.data import label_fixes
from arrowhead.data.catalog import Catalog
from arrowhead.data.label_fixes import LabelFixes
from arrowhead.data.sources import canonical_name
from arrowhead.errors import ConfigError
from arrowhead.features.corrections import Labels, StoreLabels, show_labels
from arrowhead.wording import join_first, pluralize

MAX_EXPLAINED = 5  # paths whose closest ones in the store are searched


@dataclass(frozen=True, kw_only=True, slots=True)
class TableConfig:
    """How a table of new labels is read."""

    column: str = "new_label"
    """Column with the new labels. Rows where it is empty are left alone."""
    path_column: str | None = None
    """Column with the images' paths. Default: path, image, filename …"""
    label_separator: str | None = None
    """Separator between several labels of an image, where images may have several. Default: the
    first of | ; , that occurs."""
    new_classes: bool = False
    """Allow labels that no image of the store has yet; otherwise they count as typing errors."""
    copies: bool = True
    """Also relabel exact copies of an image (files with the same bytes)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelChanges:
    """What a table asks for.

    Attributes:
        labels: The new labels by row of the store's catalog.
        reasons: Why, by row; "" if the table does not say.
        copies: Those of the rows that are copies of images in the table and not in it themselves.
    """

    labels: dict[int, Labels]
    reasons: dict[int, str]
    copies: list[int]


def plan_changes(state: StoreLabels, table: LabelFixes, config: TableConfig) -> LabelChanges:
    """Find the rows of a table in the store, and check what it asks for.

    Args:
        state: The store.
        table: Its rows with a new label.
        config: How they are read.

    Raises:
        ConfigError: The table names images that the store lacks or has not read, labels that are no
            classes, or two labels for one image; or the store's labels are not those in its column
            label.
    """
    catalog = state.catalog
    rows = _find_rows(state, table)
    multi = any(len(names) != 1 for names in set(catalog.labels))
    parse = label_fixes.label_parser(
        table, catalog.classes, multi=multi, separator=config.label_separator
    )
    new = [parse(cell) for cell in table.new]
    if not multi:
        _check_labelled(table, new)
    _check_class_names(table, new, catalog.classes, config)
    by_row: dict[int, int] = {}  # the position in the table of each row of the store
    for position, row in enumerate(rows):
        first = by_row.setdefault(row, position)
        if new[first] != new[position]:
            raise _contradiction(table, first, position, new, "name the same image")
    _check_seen_labels(table, catalog, rows, new, parse)
    copies = _find_copies(state, by_row, table, new) if config.copies else {}
    chosen = by_row | copies
    return LabelChanges(
        labels={row: new[position] for row, position in chosen.items()},
        reasons={row: table.reasons[position] for row, position in chosen.items()},
        copies=sorted(copies),
    )


def _find_rows(state: StoreLabels, table: LabelFixes) -> list[int]:
    """The row of the store for each row of a table; ConfigError if one has none."""
    catalog = state.catalog
    row_by_path = {path: row for row, path in enumerate(catalog.paths)}
    found = [label_fixes.find_row(row_by_path, catalog.root, cell) for cell in table.paths]
    missing = [position for position, row in enumerate(found) if row is None]
    if len(missing) == len(found):
        raise ConfigError(
            f"none of the {pluralize(len(found), 'image')} that {table.source} names is in"
            f" {state.store.path}, such as {table.paths[0]}; the store holds images of"
            f" {catalog.root}, such as {catalog.paths[0]}.",
            "a table of images of this store, with paths relative to that folder.",
            "give the store of these images, or repair the paths.",
        )
    if missing:
        lines = [f"line {table.lines[one]}: {table.paths[one]}" for one in missing]
        for number, position in enumerate(missing[:MAX_EXPLAINED]):
            if near := label_fixes.closest_paths(catalog.paths, table.paths[position]):
                lines[number] += f" (in the store: {', '.join(near)})"
        raise ConfigError(
            f"{table.source} names {pluralize(len(missing), 'image')} that"
            f" {state.store.path} does not hold: {join_first(lines, MAX_EXPLAINED)}.",
            f"paths relative to {catalog.root}, or absolute ones.",
            "correct these paths, or remove the rows; nothing was changed.",
        )
    rows = [row for row in found if row is not None]
    for position, row in enumerate(rows):
        if (state.faults[row] or "").startswith(("unreadable", "changed")):
            raise ConfigError(
                f"{table.source}, line {table.lines[position]}: {catalog.paths[row]} could not be"
                f" read when the features were computed ({state.faults[row]}), so its content is"
                " not known.",
                "images that the store has read.",
                "run the same precompute again, or remove the row; nothing was changed.",
            )
    return rows


def _check_labelled(table: LabelFixes, new: Sequence[Labels]) -> None:
    """Raise ConfigError for rows that take away the only label of an image."""
    lines = [f"line {line}" for names, line in zip(new, table.lines, strict=True) if not names]
    if lines:
        raise ConfigError(
            f"{table.source} gives no label in {join_first(lines)}, where each image of the store"
            " has one.",
            "one label for each image; a row with an empty cell is left alone.",
            "write the right labels, or leave these cells empty; nothing was changed.",
        )


def _check_class_names(
    table: LabelFixes, new: Sequence[Labels], classes: Sequence[str], config: TableConfig
) -> None:
    """Raise ConfigError for labels that are no classes, which are probably typing errors."""
    known = set(classes)
    unknown: dict[str, int] = {}  # the first line of each
    for names, line in zip(new, table.lines, strict=True):
        for name in names:
            if name not in known:
                unknown.setdefault(name, line)
    if not unknown or config.new_classes:
        return
    canonical = {canonical_name(name): name for name in classes}
    hints = []
    for name, line in unknown.items():
        near = difflib.get_close_matches(canonical_name(name), canonical, n=1)
        guess = f" (did you mean {canonical[near[0]]!a}?)" if near else ""
        hints.append(f"{name!a} in line {line}{guess}")
    raise ConfigError(
        f"{table.source} has {pluralize(len(unknown), 'label')} that no image of the store has:"
        f" {join_first(hints)}.",
        f"one of the classes {join_first(classes, 20, ', ')}.",
        "correct the spelling; for new classes give --new-classes. Nothing was changed.",
    )


def _check_seen_labels(
    table: LabelFixes,
    catalog: Catalog,
    rows: Sequence[int],
    new: Sequence[Labels],
    parse: Callable[[str], Labels],
) -> None:
    """Raise ConfigError for images whose label is another than the table says, and not the new one
    either: the table was made for other labels.
    """
    conflicts = []
    for position, row in enumerate(rows):
        seen, now = table.seen[position], catalog.labels[row]
        if seen.strip() and parse(seen) != now != new[position]:
            conflicts.append(
                f"line {table.lines[position]}: {catalog.paths[row]} is {show_labels(now)}, not"
                f" {seen.strip()}"
            )
    if conflicts:
        raise ConfigError(
            f"{table.source} was made for other labels than the store has now, in"
            f" {pluralize(len(conflicts), 'row')}: {join_first(conflicts)}.",
            "in column label the label that the store has, or nothing.",
            "look at these images again and correct the rows; nothing was changed.",
        )


def _find_copies(
    state: StoreLabels, by_row: Mapping[int, int], table: LabelFixes, new: Sequence[Labels]
) -> dict[int, int]:
    """The rows of exact copies that a table does not name itself, with their position in it."""
    by_content: dict[bytes, int] = {}
    for row, position in by_row.items():
        first = by_content.setdefault(state.image_ids[row], position)
        if new[first] != new[position]:
            raise _contradiction(table, first, position, new, "name copies of one image")
    return {
        row: by_content[image_id]
        for row, image_id in enumerate(state.image_ids)
        if image_id in by_content and row not in by_row
    }


def _contradiction(
    table: LabelFixes, first: int, second: int, new: Sequence[Labels], what: str
) -> ConfigError:
    copies = "" if "same" in what else " To label each copy on its own give --no-copies."
    return ConfigError(
        f"{table.source}, lines {table.lines[first]} and {table.lines[second]} {what}"
        f" ({table.paths[first]}, {table.paths[second]}) and give it different labels:"
        f" {show_labels(new[first])} and {show_labels(new[second])}.",
        "one label for each image.",
        f"remove one of the rows; nothing was changed.{copies}",
    )
