"""What is said of a source, a store and its making."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from arrowhead.data.catalog import Catalog
from arrowhead.features import extract
from arrowhead.features.store import Store
from arrowhead.reporting.progress import Work
from arrowhead.reporting.run_context import RunContext, Screen
from arrowhead.wording import counted


def say_source(catalog: Catalog, screen: Screen) -> None:
    """How a source was read, and what is to be learned from it."""
    for note in catalog.notes:
        screen.say(note)
    if catalog.classes:
        screen.say(_task(catalog))


def _task(catalog: Catalog) -> str:
    """What is learned: how many labels each, the number of classes and the first names."""
    classes = catalog.classes
    more = f" and {len(classes) - 6} more" if len(classes) > 6 else ""
    kind = "several labels for each image" if catalog.multi else "one label for each image"
    return (
        f"task: {kind}, {counted(len(classes), 'class', 'classes')}: {', '.join(classes[:6])}{more}"
    )


def say_split(listed: Catalog, drawn: Catalog, screen: Screen) -> None:
    """How many images train and validate where that was drawn; which classes cannot be validated.

    listed: the catalog with "" where a split was to be drawn; drawn: the same with all splits.
    """
    parts = Counter(drawn.splits)
    if "" in listed.splits:
        screen.say(
            f"split by content, class by class: {counted(parts['train'], 'image')} to train,"
            f" {parts['valid']} to validate"
        )
    validated = {
        name
        for names, split in zip(drawn.labels, drawn.splits, strict=True)
        if split == "valid"
        for name in names
    }
    if missing := sorted(set(drawn.classes) - validated):
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        screen.say(
            f"no image validates {', '.join(missing[:10])}{more}: too few different images of"
            f" {'these classes' if len(missing) > 1 else 'this class'}, which train all the same"
        )


def say_classes(store: Store, catalog: Catalog, screen: Screen) -> None:
    """Say what is no class though it looks like one, and how the classes changed since last."""
    for folder in catalog.empty:
        screen.say(f"{folder}/ holds no image: it is not a class")
    if not (store.path / "manifest.json").is_file():
        return
    before, now = set(store.manifest()["classes"]), set(catalog.classes)
    if before != now:
        gone, new = ", ".join(sorted(before - now)), ", ".join(sorted(now - before))
        screen.say(
            f"the classes of {store.path} change: {f'gone {gone}' if gone else ''}"
            f"{'; ' if gone and new else ''}{f'new {new}' if new else ''}."
            " Heads trained before keep the classes they were trained with."
        )


def say_account(path: Path, screen: Screen) -> None:
    """What a finished store holds, on one line."""
    store = Store(path)
    manifest, catalog = store.manifest(), Catalog(**store.read_catalog())
    files = sum(one["files"] for one in manifest["shards"])
    faults = sum(one["faults"] for one in manifest["shards"])
    screen.say(_account(files - faults, faults, catalog.ignored))
    screen.say(_task(catalog))


def _account(features: int, faults: int, ignored: int) -> str:
    return (
        f"{counted(features + faults + ignored, 'input')} = {counted(features, 'feature')}"
        f" + {counted(faults, 'fault')}"
        f" + {ignored} ignored"
    )


def say_counts(context: RunContext, counts: dict[str, int], done: Work) -> None:
    """What an extraction came to, and what it was bound by."""
    context.screen.say(_account(counts["features"], counts["faults"], counts["ignored"]))
    say_ways(context.screen, counts, done)


def say_ways(screen: Screen, counts: dict[str, int], done: Work) -> None:
    """How the images came to features, and what that was bound by."""
    parts = [f"{counts['decoded']} decoded", f"{counts['looked_up']} looked up"]
    parts += [f"{counts['skipped']} skipped: done before"]
    if counts["fallback"]:
        parts.append(f"{counts['fallback']} by the fallback decoder")
    screen.say(" · ".join(parts))
    screen.say(extract.roofline(done.seconds, done.decoded, done.workers))


def say_damaged(names: list[str], screen: Screen) -> None:
    """Which parts of the scores are made again because their bytes have changed."""
    for name in names:
        screen.say(f"{name} has changed since it was written: its images are scored again")


def say_faults(kinds: Counter[str], paths: Sequence[str], rows: Path, screen: Screen) -> None:
    """The kinds of the faults, the first files, and where all of them are."""
    if kinds:
        screen.say(
            f"not read: {fault_words(kinds, paths)}; all of them: the rows of {rows} whose column"
            " fault is filled"
        )


def fault_words(kinds: Counter[str], paths: Sequence[str]) -> str:
    """Faults by kind, and the paths of the first files that have one."""
    more = ", …" if kinds.total() > len(paths) else ""
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return f"{counts} ({', '.join(paths)}{more})"
