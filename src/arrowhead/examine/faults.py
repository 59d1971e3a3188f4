"""The files of a store that have no feature: unreadable, corrupt, not an image …"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from arrowhead.features.store import Store


@dataclass(frozen=True, slots=True)
class FaultKind:
    """The faults of one kind, such as truncated.

    Attributes:
        kind: The kind, see docs/faults.md.
        images: Number of files.
        examples: (path below the store's root, fault) of the first files, in catalog order.
    """

    kind: str
    images: int
    examples: tuple[tuple[str, str], ...]


def find_faults(store: Store, max_examples: int = 5) -> list[FaultKind]:
    """Count the faults of a store by kind, the most frequent first, with example files."""
    counts: dict[str, int] = {}
    examples: dict[str, list[tuple[str, str]]] = {}
    for kind, path, fault in _iter_faults(store):
        counts[kind] = counts.get(kind, 0) + 1
        if len(some := examples.setdefault(kind, [])) < max_examples:
            some.append((path, fault))
    order = sorted(counts, key=lambda kind: (-counts[kind], kind))
    return [FaultKind(kind, counts[kind], tuple(examples[kind])) for kind in order]


def fault_table(store: Store) -> list[dict[str, str]]:
    """One row per file without a feature for `tables.write_table`: kind, path, fault."""
    return [
        {"kind": kind, "path": path, "fault": fault} for kind, path, fault in _iter_faults(store)
    ]


def _iter_faults(store: Store) -> Iterator[tuple[str, str, str]]:
    """Yield kind, path and fault of every file without a feature, in catalog order."""
    if not any(shard["faults"] for shard in store.manifest()["shards"]):
        return
    for rows in store.shards():
        for path, fault in zip(rows.paths, rows.faults, strict=True):
            if fault:
                yield fault.partition(":")[0], path, fault
