r"""Paths as tables and lists write them, to files below one root.

dogs/1.jpg, ../2.jpg, /data/3.jpg, s3://bucket/4.jpg      from a base folder on, or from the top
dogs\5.jpg                                                as Windows writes them
6.jpg                                                     a name that is in one folder below
"""

from __future__ import annotations

import itertools
import os
import posixpath
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from arrowhead.data import listing, path_text
from arrowhead.errors import ConfigError
from arrowhead.wording import counted


def windows_1252(cell: str) -> str:
    """A cell with bytes that are not UTF-8, read as Windows-1252, which such tables mostly are."""
    raw = cell.encode("utf-8", "surrogateescape")
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        try:
            return raw.decode("cp1252")
        except UnicodeDecodeError:
            return raw.decode("latin-1")
    return cell


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """Where the paths of a table lead to: root and paths below it as text; sizes, stamps (N,)."""

    root: str
    paths: list[str]
    sizes: NDArray[np.int64]
    stamps: NDArray[np.int64]

    @property
    def missing(self) -> int:
        """How many files are not there."""
        return int((self.sizes < 0).sum())


def find(
    source: str,
    base: bytes,
    cells: list[bytes],
    lines: list[int],
    notes: list[str],
) -> Found:
    """The files that these paths (`cells`, of these lines) name from a base on.

    They are tried as they are written, then as Windows writes them, then as names of files in
    folders below; what helped is added to `notes`. A file that is not there has the size -1.
    Raises ConfigError where none is there, a name is there twice, or files lie in several stores.
    """
    found = _looked_up(source, base, cells, lines)
    for change, words in CHANGES:
        if not found.missing:
            return found
        if (changed := [change(cell) for cell in cells]) != cells:
            other = _looked_up(source, base, changed, lines)
            if other.missing < found.missing:
                found, cells = other, changed
                notes.append(f"paths: {words}")
    hint = ""
    if found.missing:
        at = [row for row in np.flatnonzero(found.sizes < 0).tolist() if b"/" not in cells[row]]
        places, hint = _below(source, base, [cells[row] for row in at], [lines[row] for row in at])
        if places:
            cells = list(cells)
            for row in at:
                cells[row] = places.get(cells[row], cells[row])
            found = _looked_up(source, base, cells, lines)
            notes.append(
                f"{len(places)} of {counted(len(cells), 'image')} found by name in folders below"
            )
    if found.missing == len(cells):
        raise _none_there(source, cells, base, hint)
    return found


def _slashes(path: bytes) -> bytes:
    return path.replace(b"\\", b"/")


def _from_windows(path: bytes) -> bytes:
    return windows_1252(path.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")


CHANGES: tuple[tuple[Callable[[bytes], bytes], str], ...] = (
    (bytes.strip, "spaces around them are left out"),
    (_slashes, "backslashes are read as slashes"),
    (_from_windows, "bytes that are not UTF-8 are read as Windows-1252"),
)


def _looked_up(source: str, base: bytes, cells: list[bytes], lines: list[int]) -> Found:
    """The files that these paths name, as they are written."""
    full = []
    for cell, line in zip(cells, lines, strict=True):
        try:
            full.append(_joined(base, cell))
        except ConfigError as error:
            raise ConfigError(
                f"{source}, line {line}: {error.found}", error.wanted, error.do
            ) from (error)
    at: dict[bytes, int] = {}
    for path, line in zip(full, lines, strict=True):
        at.setdefault(path, line)
    top = _common(source, base, at)
    root = path_text.escape_path(
        top[:-1] if path_text.in_store(path_text.escape_path(top)) else os.path.realpath(top)
    )
    paths = [path_text.escape_path(path[len(top) :]) for path in full]
    once = sorted(set(paths))
    sizes, stamps = listing.look(root, once)
    place = {path: row for row, path in enumerate(once)}
    row = np.fromiter((place[path] for path in paths), np.int64, len(paths))
    return Found(root=root, paths=paths, sizes=sizes[row], stamps=stamps[row])


def _below(
    source: str, base: bytes, names: list[bytes], lines: list[int]
) -> tuple[dict[bytes, bytes], str]:
    """Where these names of files are in the folders below the base; what would find them if they
    lack an ending. Raises ConfigError for a name that is there twice.
    """
    try:
        listed = listing.listing(path_text.escape_path(base or b"/")).paths if names else []
    except ConfigError:
        return {}, ""
    by_name: dict[bytes, list[str]] = {}
    for path in listed:
        by_name.setdefault(path_text.unescape_path(path).rpartition(b"/")[2], []).append(path)
    found = {}
    for name, line in zip(names, lines, strict=True):
        places = by_name.get(name, [])
        if len(places) > 1:
            raise ConfigError(
                f"{source}, line {line}: {path_text.escape_path(name)} is in several folders:"
                f" {places[0]} and {places[1]}.",
                "names that lead to one file each.",
                "write the folder into the path, or give the one folder with --images (in score"
                " --base).",
            )
        if places:
            found[name] = path_text.unescape_path(places[0])
    stems = {name.rpartition(b".")[0]: name for name in by_name} if not found else {}
    known = next((stems[name] for name in names if name in stems), None)
    return found, "" if known is None else f".{path_text.escape_path(known.rpartition(b'.')[2])}"


def _none_there(source: str, cells: list[bytes], base: bytes, ending: str) -> ConfigError:
    """Why no file is where a table says."""
    first = path_text.escape_path(cells[0])
    do = (
        "give their folder with --images (in score --base), or what the paths lack at the end with"
        " --suffix."
    )
    why = f"such as {path_text.escape_path(_joined(base, cells[0]))}"
    if re.match(rb"[A-Za-z]:[\\/]|\\\\", cells[0]):
        why = f"such as {first}, a path of a Windows machine"
        do = "make the paths start at the images' folder, and give that with --images."
    elif ending:
        do = f"add --suffix {ending}: such files are there."
    return ConfigError(
        f"none of the {len(cells)} files that {source} names is there, {why}.",
        "paths of image files, from its own folder on.",
        do,
    )


def absolute(name: str) -> bytes:
    """A folder or file as a path from the top, or as a URI."""
    if path_text.in_store(name):
        return path_text.unescape_path(path_text.resolve(name))
    # Not what a link leads to: paths start where the table lies.
    return posixpath.normpath(os.fsencode(Path(name).absolute()))


def _joined(base: bytes, path: bytes) -> bytes:
    """A path of a table from the top, . and .. worked out."""
    odd = path[:1] == b"/" or path[-1:] in (b"/", b".") or b"./" in path or b"//" in path
    if not odd:
        return base.rstrip(b"/") + b"/" + path
    origin, below = _origin(base)
    if path_text.in_store(shown := path_text.escape_path(path)):
        origin, below = _origin(path_text.unescape_path(path_text.resolve(shown)))
        path = b""
    return origin + b"/" + posixpath.normpath(posixpath.join(b"/" + below, path)).lstrip(b"/")


def _origin(full: bytes) -> tuple[bytes, bytes]:
    """The store of a URI, such as s3://bucket (b"" on a disk), and the path in it."""
    if not path_text.in_store(path_text.escape_path(full)):
        return b"", full
    scheme, _, rest = full.partition(b"://")
    store, slash, path = rest.partition(b"/")
    return scheme + b"://" + store, slash + path


def _common(source: str, base: bytes, lines: Mapping[bytes, int]) -> bytes:
    """The folder that holds all paths, ending in /: the base, unless one leaves it."""
    first, last = min(lines), max(lines)  # what these two share, all share
    top = base.rstrip(b"/") + b"/"
    if first.startswith(top) and last.startswith(top):
        return top
    if _origin(first)[0] != _origin(last)[0]:
        raise ConfigError(
            f"{source} names files in several places: {path_text.escape_path(first)} in line"
            f" {lines[first]},"
            f" {path_text.escape_path(last)} in line {lines[last]}.",
            "files on one disk or in one bucket.",
            "split the table, or copy the files together; --images says where paths start.",
        )
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    shared = bytes(byte for byte, _ in alike)
    return shared[: shared.rindex(b"/") + 1]
