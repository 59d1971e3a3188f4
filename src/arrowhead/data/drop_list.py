"""Leave out images that a text file lists, such as copies of other images.

One path per line, relative to the root of the images; lines that start with # are comments.
`examine.duplicates.write_drop_list` writes such a file.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import compress
from pathlib import Path

import numpy as np

from arrowhead.data import named_files, path_text, reading
from arrowhead.data.catalog import Catalog
from arrowhead.errors import ConfigError
from arrowhead.wording import pluralize

MAX_BYTES = 2**30


def leave_out(catalog: Catalog, file: str) -> Catalog:
    """The catalog without the files that a list names.

    They are added to `ignored`; a note says how many they are, and which path of the list is not
    in the catalog.

    Args:
        catalog: All files.
        file: Path or URI of the list.

    Raises:
        ConfigError: The list cannot be read.
    """
    listed = _read_paths(file)
    kept = [path not in listed for path in catalog.paths]
    dropped = len(kept) - sum(kept)
    note = f"--drop {Path(file).name}: {pluralize(dropped, 'image')} left out"
    if len(listed) > dropped:
        known = set(catalog.paths)
        unknown = sorted(path for path in listed if path not in known)
        paths = pluralize(len(unknown), "path is", "paths are")
        note += f"; {paths} not among the images, such as {unknown[0]}"
    return replace(
        catalog,
        paths=list(compress(catalog.paths, kept)),
        sizes=catalog.sizes[np.array(kept, bool)],
        stamps=catalog.stamps[np.array(kept, bool)],
        labels=list(compress(catalog.labels, kept)),
        splits=list(compress(catalog.splits, kept)),
        tries=catalog.tries[np.array(kept, bool)],
        ignored=catalog.ignored + dropped,
        notes=(*catalog.notes, note),
    )


def _read_paths(file: str) -> set[str]:
    """The paths in a list, escaped as in a catalog."""
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
            paths.add(_escaped(path.removeprefix(b"./")))
    return paths


def _escaped(path: bytes) -> str:
    """A path as a catalog spells it; one that is escaped already stays as it is."""
    text = path.decode("utf-8", "surrogateescape")
    if text.isprintable() and path_text.escape_path(path_text.unescape_path(text)) == text:
        return text
    return path_text.escape_path(path)
