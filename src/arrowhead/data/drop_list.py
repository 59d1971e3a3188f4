"""Leave out images that a text file lists, such as copies of other images.

One path per line, relative to the root of the images or absolute; lines that start with # are
comments. `examine.duplicates.write_drop_list` writes such a file.

A store remembers the list in DROPPED_FILE, and later runs into it leave out the same images unless
they give another list, or TAKE_BACK.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from arrowhead.data import named_files, path_text, reading, remote_folder
from arrowhead.data.catalog import Catalog
from arrowhead.errors import ConfigError
from arrowhead.wording import pluralize

DROPPED_FILE = "dropped.txt"  # of a store
TAKE_BACK = "none"  # in the place of a list: leave out no image
MAX_BYTES = 2**30
MAX_UNKNOWN_SHOWN = 3


def leave_out(catalog: Catalog, file: str) -> Catalog:
    """The catalog without the files that a list names.

    They are added to `ignored`; a note says how many they are, and which paths of the list are not
    in the catalog.

    Args:
        catalog: All files.
        file: Path or URI of the list, or TAKE_BACK for no list.

    Raises:
        ConfigError: The list cannot be read.
    """
    if file == TAKE_BACK:
        return catalog
    listed = _read_paths(file, catalog.root)
    kept = [path not in listed for path in catalog.paths]
    dropped = len(kept) - sum(kept)
    notes = list(catalog.notes)
    if Path(file).name == DROPPED_FILE:
        if dropped:
            notes.append(
                f"{pluralize(dropped, 'image')} left out as before ({file}; --drop {TAKE_BACK}"
                f" takes {'them' if dropped > 1 else 'it'} back)"
            )
    else:
        note = f"--drop {Path(file).name}: {pluralize(dropped, 'image')} left out"
        notes.append(note + _describe_unknown(listed, catalog))
    return replace(catalog.select(kept), dropped=tuple(sorted(listed)), notes=tuple(notes))


def remember(store: Path, catalog: Catalog) -> int:
    """Write the list that a catalog was made with into a store; without a list, remove that.

    Returns:
        How many images are in the catalog that the store's list left out until now.
    """
    file = store / DROPPED_FILE
    before = _read_paths(str(file), catalog.root) if file.is_file() else set()
    if not catalog.dropped:
        remote_folder.of(store).remove(file)
    elif before != set(catalog.dropped):
        lines = [f"./{path}" if path.startswith("#") else path for path in catalog.dropped]
        with remote_folder.of(store).atomic_write(file) as draft:
            draft.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(before.intersection(catalog.paths)) if before else 0


def _describe_unknown(listed: Collection[str], catalog: Catalog) -> str:
    """Which of the listed paths are not among the images, as the end of a sentence."""
    known = set(catalog.paths)
    unknown = sorted(path for path in listed if path not in known)
    if not unknown:
        return ""
    paths = pluralize(len(unknown), "path is", "paths are")
    such_as = ", ".join(unknown[:MAX_UNKNOWN_SHOWN])
    return f"; {paths} not among the images, such as {such_as} (below {catalog.root})"


def _read_paths(file: str, root: str) -> set[str]:
    """The paths in a list relative to a root, escaped as in a catalog."""
    folder, _, name = named_files.absolute_path(file).rpartition(b"/")
    content, fault = reading.read_file(
        path_text.escape_path(folder or b"/"), path_text.escape_path(name), MAX_BYTES
    )
    if fault:
        raise ConfigError(
            f"--drop {file} cannot be read: {fault}.",
            "a text file with the path of an image in each line.",
            "check the spelling; a path here is relative to the current folder.",
        )
    paths = set()
    for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        path = line.rstrip(b"\r")
        if path.strip() and not path.startswith(b"#"):
            paths.add(_relative(_escaped(path.removeprefix(b"./")), root))
    return paths


def _escaped(path: bytes) -> str:
    """A path as a catalog spells it; one that is escaped already stays as it is."""
    text = path.decode("utf-8", "surrogateescape")
    if text.isprintable() and path_text.escape_path(path_text.unescape_path(text)) == text:
        return text
    return path_text.escape_path(path)


def _relative(path: str, root: str) -> str:
    """An absolute path or URI below the root, relative to it; any other path as it is.

    The root has no symbolic links, so those in a path to its folder are followed, too.
    """
    prefix = root.rstrip("/") + "/"
    if path.startswith(prefix):
        return path.removeprefix(prefix)
    if not path.startswith("/"):
        return path
    folder, _, name = path_text.unescape_path(path).rpartition(b"/")
    real = path_text.escape_path(os.path.realpath(folder or b"/").rstrip(b"/") + b"/" + name)
    return real.removeprefix(prefix)
