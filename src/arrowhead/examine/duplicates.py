"""Find images that are there twice: exact copies, and altered copies of one photo.

    image ids               equal ids: exact copies
    near_copies             different files that show the same photo, confirmed by their pixels
      -> groups             files that are connected by equal ids or by confirmed pairs

A copy of a training image in the validation split makes the accuracy look better than it is (Barz
and Denzler, "Do We Train on Test Data?", 2020, name it for CIFAR): `leaked_rows` finds these
images, `write_drop_list` lists what to leave out. The thresholds come from bench/duplicates.py: 15
alterations of real photos.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead import fileio, spreadsheet
from arrowhead.data.catalog import Catalog
from arrowhead.examine import near_copies, originals
from arrowhead.examine.near_copies import (
    Components,
    DuplicateConfig,
    DuplicatePair,
    NearCopies,
    Reader,
)
from arrowhead.examine.neighbours import UnitVectors
from arrowhead.examine.originals import Originals
from arrowhead.features.store import Store
from arrowhead.wording import pluralize

CSV_COLUMNS = ("group", "path", "split", "label", "kind", "similarity", "keep", "labels_differ")
KEEP_ORDER = ("test", "valid", "train", "")  # which split's file of a group is kept


@dataclass(frozen=True, kw_only=True, slots=True)
class DuplicateGroup:
    """Copies of one photo.

    Attributes:
        rows: int64 (n,), rows of the catalog, ascending; at least two.
        kind: "exact" if all files have the same bytes, else "near".
        similarity: The lowest pixel similarity of the pairs that connect the group; 1 if exact.
    """

    rows: NDArray[np.int64]
    kind: str
    similarity: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Duplicates:
    """What `find_duplicates` found.

    Attributes:
        groups: Groups of copies, by their first row.
        pairs: The pairs of different files that are copies (they connect the groups), and those
            that could not be read, the most similar features first. Exact copies are not listed:
            their groups are.
        compared: Number of pairs whose pixels were compared.
        not_compared: Number of pairs with close features that were left when
            `max_rejected_pairs` was reached.
    """

    groups: list[DuplicateGroup]
    pairs: list[DuplicatePair]
    compared: int
    not_compared: int

    @property
    def unverified(self) -> list[DuplicatePair]:
        """Pairs with close features of which a file could not be read: in no group."""
        return [pair for pair in self.pairs if pair.pixel_similarity is None]


def find_duplicates(
    store: Store,
    catalog: Catalog,
    config: DuplicateConfig = DuplicateConfig(),
    read: Reader | None = None,
    near: NearCopies | None = None,
) -> Duplicates:
    """Find exact and near copies within and across splits.

    Images with a fault are left out. Memory: about a kilobyte per image.

    Args:
        store: A finished feature store.
        catalog: Its catalog, with the images at its root.
        config: How alike copies are.
        read: Gives the small grey pixels of a row; None: they are read from the originals, whose
            content must be the one that the store read.
        near: The near copies, if they are known (see `report_cache`).

    Raises:
        DataError: A file of the store has changed.
    """
    row_M = store.features(rows_only=True).row
    first_M = _first_with_same_id(store.image_ids()[row_M], row_M)
    if near is None:
        distinct = row_M[first_M == row_M]
        features = UnitVectors(shards=store.mapped_features(), row_M=distinct)
        near = near_copies.find_near_copies(
            features, read or originals.grey_reader(Originals.of(store, catalog)), config
        )
    return Duplicates(
        groups=_groups(row_M, first_M, near.pairs),
        pairs=near.pairs,
        compared=near.compared,
        not_compared=near.not_compared,
    )


def rows_to_compare(store: Store, config: DuplicateConfig = DuplicateConfig()) -> list[int]:
    """The rows whose pixels `find_duplicates` compares in any case: one of each content.

    None in a store with more than `max_thumbnails` of them, where only candidates are read.
    """
    row_M = store.features(rows_only=True).row
    first_M = _first_with_same_id(store.image_ids()[row_M], row_M)
    rows: list[int] = row_M[first_M == row_M].tolist()
    return rows if config.max_rejected_pairs and len(rows) <= config.max_thumbnails else []


def leaked_rows(duplicates: Duplicates, split_N: NDArray[np.str_]) -> NDArray[np.bool_]:
    """Mark validation and test images that have a copy in training, bool (N,).

    split_N: the split of every row of the catalog. Accuracy on the other rows is what the model
    reaches on photos that it has not seen.
    """
    leaked_N = np.zeros(len(split_N), bool)
    for group in duplicates.groups:
        split = split_N[group.rows]
        if (split == "train").any():
            leaked_N[group.rows[(split == "valid") | (split == "test")]] = True
    return leaked_N


def groups_across_splits(duplicates: Duplicates, catalog: Catalog) -> list[DuplicateGroup]:
    """The groups with files in more than one split."""
    return [
        group
        for group in duplicates.groups
        if len({catalog.splits[row] for row in group.rows.tolist()}) > 1
    ]


def groups_with_different_labels(duplicates: Duplicates, catalog: Catalog) -> list[DuplicateGroup]:
    """The groups whose files do not all have the same labels."""
    return [group for group in duplicates.groups if len(_group_labels(group, catalog)) > 1]


def kept_row(group: DuplicateGroup, catalog: Catalog) -> int:
    """The row of a group to keep: test before valid before train, then the largest file.

    So a leak is mended by leaving out the training copy. Ties are decided by path.
    """
    rows: list[int] = group.rows.tolist()
    return min(
        rows,
        key=lambda row: (
            KEEP_ORDER.index(catalog.splits[row]) if catalog.splits[row] in KEEP_ORDER else 9,
            -int(catalog.sizes[row]),
            catalog.paths[row],
        ),
    )


def table(duplicates: Duplicates, catalog: Catalog) -> list[dict[str, Any]]:
    """One row per file of a group.

    Columns: group (from 1), path, split, label (several are joined by |), kind (exact or near),
    similarity (of the group), keep (bool), labels_differ (bool).
    """
    rows = []
    for number, group in enumerate(duplicates.groups, 1):
        keep, differ = kept_row(group, catalog), len(_group_labels(group, catalog)) > 1
        for row in group.rows.tolist():
            rows.append(
                {
                    "group": number,
                    "path": catalog.paths[row],
                    "split": catalog.splits[row],
                    "label": "|".join(catalog.labels[row]),
                    "kind": group.kind,
                    "similarity": group.similarity,
                    "keep": row == keep,
                    "labels_differ": differ,
                }
            )
    return rows


def write_csv(duplicates: Duplicates, catalog: Catalog, path: Path) -> Path:
    """Write `table` as duplicates.csv, with yes and no; returns the path."""
    with spreadsheet.open_csv(path, CSV_COLUMNS) as sheet:
        for row in table(duplicates, catalog):
            cells = row | {"similarity": round(row["similarity"], 4)}
            cells |= {name: "yes" if row[name] else "no" for name in ("keep", "labels_differ")}
            sheet.row([cells[name] for name in CSV_COLUMNS])
    return path


def write_drop_list(duplicates: Duplicates, catalog: Catalog, path: Path) -> Path:
    """Write the paths of all files that `kept_row` does not keep, for `--drop`; returns the path.

    One path per line, relative to the root. Lines that start with # say which file is kept, and
    where labels differ.
    """
    lines = ["# Files to leave out: arrowhead precompute --drop FILE, arrowhead fit --drop FILE."]
    lines.append("# Remove the line of a file that you want to keep.")
    for number, group in enumerate(duplicates.groups, 1):
        keep = kept_row(group, catalog)
        labels = _group_labels(group, catalog)
        note = f"; the labels differ: {', '.join(labels)}" if len(labels) > 1 else ""
        lines.append(f"# group {number}, {group.kind}: keeps {catalog.paths[keep]}{note}")
        paths = [catalog.paths[row] for row in group.rows.tolist() if row != keep]
        lines += [f"./{name}" if name.startswith("#") else name for name in paths]
    with fileio.atomic_write(path) as draft:
        draft.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def summarize(duplicates: Duplicates, catalog: Catalog) -> list[str]:
    """Sentences for the user about what was found."""
    groups = duplicates.groups
    if not groups:
        lines = ["no copies found"]
    else:
        extra = sum(len(group.rows) - 1 for group in groups)
        exact = sum(group.kind == "exact" for group in groups)
        lines = [
            f"{pluralize(extra, 'image')} too many: {pluralize(len(groups), 'group')} of copies,"
            f" {exact} exact and {len(groups) - exact} near"
        ]
    split_N = np.array(catalog.splits, np.str_)
    if leaked := int(leaked_rows(duplicates, split_N).sum()):
        held_out = int(np.isin(split_N, ("valid", "test")).sum())
        lines.append(f"leaks: {leaked} of {held_out} validation and test images are in training")
    for group in (differing := groups_with_different_labels(duplicates, catalog))[:3]:
        names = [f"{catalog.paths[row]} ({'|'.join(catalog.labels[row])})" for row in group.rows]
        lines.append(f"labels of copies differ: {', '.join(names[:4])}")
    if len(differing) > 3:
        lines.append(f"labels differ in {len(differing) - 3} more groups")
    if unverified := len(duplicates.unverified):
        lines.append(f"{pluralize(unverified, 'close pair')} not verified: a file cannot be read")
    if duplicates.not_compared:
        lines.append(f"{pluralize(duplicates.not_compared, 'close pair')} not compared")
    return lines


# ---------------------------------------------------------------------------- exact copies


def _first_with_same_id(id_M: NDArray[np.uint64], row_M: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each row the first row with the same image id, int64 (M,)."""
    if not len(id_M):
        return row_M
    order = np.lexsort((row_M, id_M[:, 1], id_M[:, 0]))
    starts = np.ones(len(order), bool)
    starts[1:] = (id_M[order[1:]] != id_M[order[:-1]]).any(1)
    first_M = np.empty_like(row_M)
    first_M[order] = row_M[order][np.flatnonzero(starts)][np.cumsum(starts) - 1]
    return first_M


# -------------------------------------------------------------------------------- groups


def _groups(
    row_M: NDArray[np.int64], first_M: NDArray[np.int64], pairs: Sequence[DuplicatePair]
) -> list[DuplicateGroup]:
    """The groups of rows that are connected by equal ids or by confirmed pairs."""
    components = Components()
    lowest: dict[int, float] = {}  # similarity by root, of near copies
    confirmed = [pair for pair in pairs if pair.pixel_similarity is not None]
    for pair in confirmed:
        components.connect(pair.one, pair.other)
    for pair in confirmed:
        root, similarity = components.root(pair.one), float(pair.pixel_similarity or 0.0)
        lowest[root] = min(lowest.get(root, 1.0), similarity)
    roots = {pair.one for pair in confirmed} | {pair.other for pair in confirmed}
    distinct, count = np.unique(first_M, return_counts=True)
    roots |= set(distinct[count > 1].tolist())
    members: dict[int, list[int]] = {}
    in_a_group = np.isin(first_M, np.fromiter(roots, np.int64, len(roots)))
    for row, first in zip(row_M[in_a_group].tolist(), first_M[in_a_group].tolist(), strict=True):
        members.setdefault(components.root(first), []).append(row)
    return [
        DuplicateGroup(
            rows=np.array(sorted(members[root]), np.int64),
            kind="near" if root in lowest else "exact",
            similarity=lowest.get(root, 1.0),
        )
        for root in sorted(members)
    ]


def _group_labels(group: DuplicateGroup, catalog: Catalog) -> list[str]:
    """The different labels of a group's files, sorted; several labels are joined by |."""
    return sorted({"|".join(catalog.labels[row]) for row in group.rows.tolist()})
