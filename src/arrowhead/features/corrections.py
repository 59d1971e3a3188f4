"""Corrected labels: their history in a store, and the labels that they give.

    labels of the source   what folders or a table say, listed anew by every precompute
      + history            who changed which label, when, from what to what
      -> labels            what is trained on; always computed from these two

The corrections of an image are applied in order, and each changes the label only where it is the
one that the person corrected. A file whose folder was put right meanwhile needs no correction any
more, and where the source says something else than before and after, the source is newer and wins.
An image is recognized by its content (image id), so corrections follow files that are moved or
renamed, and apply to exact copies.

A share of the images that is drawn for validation is drawn by the labels before corrections, so a
correction moves no image between splits.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from arrowhead.data.catalog import Catalog
from arrowhead.data.sources import canonical_name
from arrowhead.errors import ConfigError
from arrowhead.features.store import Store

Labels = tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Correction:
    """One corrected label.

    Attributes:
        change: Number of the change that it belongs to, from 1: one run of `arrowhead relabel`.
        when: UTC, such as 2026-11-27T14:05:09Z.
        by: Who made the change.
        reason: Why, "" if nobody said.
        path: The image below the catalog's root, as it was called then.
        image_id: Hash of its content, 16 bytes.
        old: Labels before, sorted.
        new: Labels after, sorted. The same as `old` where a copy of a corrected image had the
            label already: such a row only remembers that.
        copies: Whether it also holds for files with the same content under other paths.
        undone: When it was undone; None while it is in effect.
        undone_by: Who undid it.
    """

    change: int
    when: str
    by: str
    reason: str
    path: str
    image_id: bytes
    old: Labels
    new: Labels
    copies: bool
    undone: str | None = None
    undone_by: str | None = None

    def plain(self) -> dict[str, Any]:
        """A dict for JSON."""
        return asdict(self) | {"image_id": self.image_id.hex()}


@dataclass(frozen=True, kw_only=True, slots=True)
class CorrectedLabels:
    """What a history makes of the labels of a source; N rows.

    Attributes:
        labels: N, the labels to train on.
        before: N, the labels before any correction: those of the source; or, where the source has
            taken over a correction, the label that was corrected.
        source_labels: The source's labels by row, where they are not `labels`.
        overruled: Rows with a correction that does not apply, as the source has a third label.
        changed: Paths that hold another image than the one whose label was corrected, which is
            nowhere else either.
    """

    labels: list[Labels]
    before: list[Labels]
    source_labels: dict[int, Labels] = field(default_factory=dict)
    overruled: dict[int, Correction] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)

    def apply(self, catalog: Catalog) -> Catalog:
        """The catalog with these labels."""
        return replace(catalog, labels=self.labels, source_labels=self.source_labels)


# ------------------------------------------------------------------------------- history


def read_history(store: Store) -> list[Correction]:
    """Every correction of a store, oldest first, including those that were undone.

    Raises:
        DataError: The file of the history is missing or has changed.
    """
    columns = store.read_corrections()
    names = [one.name for one in fields(Correction)]
    rows = zip(*(columns[name] for name in names), strict=True) if columns else ()
    return [Correction(**dict(zip(names, row, strict=True))) for row in rows]


def history_columns(history: Sequence[Correction]) -> dict[str, list[Any]]:
    """A history by column, as `Store.commit` takes it."""
    names = [one.name for one in fields(Correction)]
    return {name: [getattr(one, name) for one in history] for name in names}


def active_changes(history: Sequence[Correction]) -> list[int]:
    """The numbers of the changes that are in effect, ascending."""
    return sorted({one.change for one in history if one.undone is None})


def labels_with(store: Store, changes: Collection[int] = ()) -> list[Labels]:
    """The labels of all images of a store's catalog, in its order, with some of the changes.

    A bundle's lineage says under `corrections` which changes were in effect when it was trained,
    so a report can compare two bundles by the labels of both times:

        before = labels_with(store, bundle.lineage.get("corrections", []))
        now = store.read_catalog()["labels"]

    Args:
        store: A finished store.
        changes: Numbers of changes, also of undone ones; none: the labels before any correction.
    """
    catalog, history = Catalog(**store.read_catalog()), read_history(store)
    if not history:
        return catalog.labels
    image_ids, _ = image_ids_and_faults(store)
    before = correct_labels(source_catalog(catalog), image_ids, history).before
    chosen = _by_image(one for one in history if one.change in changes)
    return [
        _replay(names, path, chosen.get(image_id, ()))[0]
        for names, path, image_id in zip(before, catalog.paths, image_ids, strict=True)
    ]


def image_ids_and_faults(store: Store) -> tuple[list[bytes], list[str | None]]:
    """The image id and the fault of every image of a store's catalog, in its order."""
    image_ids: list[bytes] = []
    faults: list[str | None] = []
    for rows in store.shards():
        image_ids += rows.image_ids
        faults += rows.faults
    return image_ids, faults


def source_catalog(catalog: Catalog) -> Catalog:
    """A store's catalog with the labels that its source gave."""
    labels = list(catalog.labels)
    for row, names in catalog.source_labels.items():
        labels[row] = names
    return replace(catalog, labels=labels, source_labels={})


def source_classes(store: Store) -> list[str]:
    """The classes of a finished store's source, before corrections."""
    manifest = store.manifest()
    if "corrections" not in manifest or not (store.path / manifest["catalog"]["name"]).is_file():
        return list(manifest["classes"])
    return source_catalog(Catalog(**store.read_catalog())).classes


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreLabels:
    """The labels of a finished store, and what they come from; N rows.

    Attributes:
        store: The store.
        catalog: Its catalog, with corrected labels.
        image_ids: N hashes of the contents.
        faults: N, None for an image without a fault.
        history: See `read_history`.
    """

    store: Store
    catalog: Catalog
    image_ids: list[bytes]
    faults: list[str | None]
    history: list[Correction]

    @staticmethod
    def read(store: Store) -> StoreLabels:
        """Read them. Raises DataError if a file of the store has changed."""
        image_ids, faults = image_ids_and_faults(store)
        return StoreLabels(
            store=store,
            catalog=Catalog(**store.read_catalog()),
            image_ids=image_ids,
            faults=faults,
            history=read_history(store),
        )

    def with_history(self, history: Sequence[Correction], do: str) -> Catalog:
        """The catalog that another history gives.

        Raises ConfigError, which says `do`, if a classifier cannot be trained on it.
        """
        source = source_catalog(self.catalog)
        faulty = [fault is not None for fault in self.faults]
        catalog = correct_labels(source, self.image_ids, history, faulty).apply(source)
        check_classes(catalog, do)
        return catalog


# -------------------------------------------------------------------------------- labels


def correct_labels(
    catalog: Catalog,
    image_ids: Sequence[bytes],
    history: Sequence[Correction],
    faulty: Sequence[bool] | None = None,
) -> CorrectedLabels:
    """Apply the corrections that are in effect.

    Args:
        catalog: The images with the labels of the source; N rows.
        image_ids: N hashes of their contents.
        history: See `read_history`.
        faulty: Which rows could not be read; their content is unknown.
    """
    active = [one for one in history if one.undone is None]
    result = CorrectedLabels(labels=list(catalog.labels), before=list(catalog.labels))
    if not active:
        return result
    expected_id = {one.path: one.image_id for one in active if one.old != one.new}
    by_image = _by_image(active)
    other_image, found = {}, set()
    for row, (path, image_id) in enumerate(zip(catalog.paths, image_ids, strict=True)):
        if expected_id.get(path, image_id) != image_id and not (faulty and faulty[row]):
            other_image[path] = expected_id[path]
        if image_id not in by_image:
            continue
        found.add(image_id)
        source_labels = catalog.labels[row]
        labels, before, last = _replay(source_labels, path, by_image[image_id])
        result.labels[row], result.before[row] = labels, before
        if labels != source_labels:
            result.source_labels[row] = source_labels
        elif last and labels not in {one.new for one in last}:
            result.overruled[row] = last[0]
    result.changed.extend(path for path, expected in other_image.items() if expected not in found)
    return result


def _by_image(corrections: Iterable[Correction]) -> dict[bytes, list[Correction]]:
    by_image: dict[bytes, list[Correction]] = {}
    for one in corrections:
        by_image.setdefault(one.image_id, []).append(one)
    return by_image


def _replay(
    source_labels: Labels, path: str, corrections: Sequence[Correction]
) -> tuple[Labels, Labels, list[Correction]]:
    """Apply the corrections of one image, in order, to one of the files that hold it.

    Returns:
        The labels after them; the labels before them (see `CorrectedLabels.before`); and the
        corrections of the last change, [] if none holds for this file.
    """
    relevant = (
        one for one in corrections if one.path == path or (one.copies and one.old != one.new)
    )
    changes = [list(group) for _, group in itertools.groupby(relevant, lambda one: one.change)]
    labels, first_applied = source_labels, len(changes)
    for number, change in enumerate(changes):
        # Copies that had different labels have a correction each.
        if match := next((one for one in change if one.old == labels), None):
            labels = match.new
            first_applied = min(first_applied, number)
    before = source_labels  # or the label from which an earlier change led here
    for change in reversed(changes[:first_applied]):
        origins = [one for one in change if one.new == before]
        if origins:
            before = next((one for one in origins if one.path == path), origins[0]).old
    return labels, before, changes[-1] if changes else []


# -------------------------------------------------------------------------------- checks


def check_classes(catalog: Catalog, do: str) -> None:
    """Check that a classifier can be trained on corrected labels, as listing a source does.

    Args:
        catalog: With corrected labels and all splits.
        do: What the user can do about it.

    Raises:
        ConfigError: There are fewer than two classes, a class without an image in train, or two
            names that differ only in case or Unicode form.
    """
    classes = catalog.classes
    if len(classes) < 2:
        raise ConfigError(
            f"with these corrections the store has {'one class' if classes else 'no class'}"
            f"{f', {classes[0]}' if classes else ''}.",
            "two classes or more: a classifier chooses between them.",
            do,
        )
    counts: Counter[tuple[str, Labels]] = Counter(zip(catalog.splits, catalog.labels, strict=True))
    in_train = {name for split, names in counts if split == "train" for name in names}
    if missing := [name for name in classes if name not in in_train]:
        raise ConfigError(
            f"with these corrections no image of {', '.join(missing)} is in the training split.",
            "every class with at least one image in train: corrections move no image between"
            " splits.",
            do,
        )
    twins: dict[str, str] = {}
    for name in classes:
        if (twin := twins.setdefault(canonical_name(name), name)) != name:
            raise ConfigError(
                f"with these corrections two classes look alike: {twin!a} and {name!a}.",
                "names that differ in more than case or the Unicode form of a letter.",
                do,
            )


def count_moves(old: Sequence[Labels], new: Sequence[Labels]) -> dict[str, int]:
    """Count how often each label became which other, such as {"cats -> dogs": 3}; largest first."""
    moves = Counter(
        f"{show_labels(before)} -> {show_labels(after)}"
        for before, after in zip(old, new, strict=True)
    )
    return dict(sorted(moves.items(), key=lambda move: (-move[1], move[0])))


def show_labels(names: Labels) -> str:
    """Labels for a message: separated by |, "(none)" without any."""
    return "|".join(names) or "(none)"
