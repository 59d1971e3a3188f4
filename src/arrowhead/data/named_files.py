r"""Resolve paths in tables and lists to files below one root.

dogs/1.jpg, ../2.jpg, /data/3.jpg, s3://bucket/4.jpg      relative to a base folder, or absolute
dogs\5.jpg                                                Windows separators
6.jpg                                                     a name that is unique in the subfolders
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
from arrowhead.wording import pluralize


def decode_windows_1252(cell: str) -> str:
    """Decode a cell that is not UTF-8 as Windows-1252, the usual encoding of such tables."""
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
class ResolvedPaths:
    """The files that a table names: escaped root and paths below it; sizes and stamps (N,)."""

    root: str
    paths: list[str]
    sizes: NDArray[np.int64]
    stamps: NDArray[np.int64]

    @property
    def missing(self) -> int:
        """Number of files that do not exist."""
        return int((self.sizes < 0).sum())


def resolve_paths(
    source: str,
    base: bytes,
    cells: list[bytes],
    lines: list[int],
    notes: list[str],
) -> ResolvedPaths:
    """Resolve the paths in a table.

    They are tried as written, then with common repairs (see PATH_REPAIRS), then as names of files
    in subfolders.

    Args:
        source: The table, for messages.
        base: Folder that the paths are relative to.
        cells: The paths.
        lines: Line of each path in the table, for messages.
        notes: What was repaired is appended here.

    Returns:
        The files; a missing one has size -1.

    Raises:
        ConfigError: All files are missing, a name is ambiguous, or files are in several stores.
    """
    resolved = _resolve_as_written(source, base, cells, lines)
    for repair, note in PATH_REPAIRS:
        if not resolved.missing:
            return resolved
        if (repaired := [repair(cell) for cell in cells]) != cells:
            other = _resolve_as_written(source, base, repaired, lines)
            if other.missing < resolved.missing:
                resolved, cells = other, repaired
                notes.append(f"paths: {note}")
    hint = ""
    if resolved.missing:
        missing_rows = [
            row for row in np.flatnonzero(resolved.sizes < 0).tolist() if b"/" not in cells[row]
        ]
        path_by_name, hint = _find_in_subfolders(
            source, base, [cells[row] for row in missing_rows], [lines[row] for row in missing_rows]
        )
        if path_by_name:
            cells = list(cells)
            for row in missing_rows:
                cells[row] = path_by_name.get(cells[row], cells[row])
            resolved = _resolve_as_written(source, base, cells, lines)
            total = pluralize(len(cells), "image")
            notes.append(f"{len(path_by_name)} of {total} found by name in folders below")
    if resolved.missing == len(cells):
        raise _no_files_error(source, cells, base, hint)
    return resolved


def _to_slashes(path: bytes) -> bytes:
    return path.replace(b"\\", b"/")


def _to_utf8(path: bytes) -> bytes:
    return decode_windows_1252(path.decode("utf-8", "surrogateescape")).encode(
        "utf-8", "surrogateescape"
    )


PATH_REPAIRS: tuple[tuple[Callable[[bytes], bytes], str], ...] = (
    (bytes.strip, "spaces around them are removed"),
    (_to_slashes, "backslashes are read as slashes"),
    (_to_utf8, "bytes that are not UTF-8 are read as Windows-1252"),
)


def _resolve_as_written(
    source: str, base: bytes, cells: list[bytes], lines: list[int]
) -> ResolvedPaths:
    """Resolve paths exactly as they are written."""
    full = []
    for cell, line in zip(cells, lines, strict=True):
        try:
            full.append(_join_path(base, cell))
        except ConfigError as error:
            raise ConfigError(
                f"{source}, line {line}: {error.found}", error.wanted, error.do
            ) from (error)
    line_of: dict[bytes, int] = {}
    for path, line in zip(full, lines, strict=True):
        line_of.setdefault(path, line)
    top = _common_folder(source, base, line_of)
    root = path_text.escape_path(
        top[:-1] if path_text.is_store_uri(path_text.escape_path(top)) else os.path.realpath(top)
    )
    paths = [path_text.escape_path(path[len(top) :]) for path in full]
    unique = sorted(set(paths))
    sizes, stamps = listing.stat_files(root, unique)
    row_of = {path: row for row, path in enumerate(unique)}
    row = np.fromiter((row_of[path] for path in paths), np.int64, len(paths))
    return ResolvedPaths(root=root, paths=paths, sizes=sizes[row], stamps=stamps[row])


def _find_in_subfolders(
    source: str, base: bytes, names: list[bytes], lines: list[int]
) -> tuple[dict[bytes, bytes], str]:
    """Find files by name in the folders below the base.

    Returns:
        {name: path below the base}, and the suffix, such as .jpg, that names without one lack; ""
        if that is not the reason.

    Raises:
        ConfigError: A name is in several folders.
    """
    try:
        listed = listing.list_files(path_text.escape_path(base or b"/")).paths if names else []
    except ConfigError:
        return {}, ""
    by_name: dict[bytes, list[str]] = {}
    for path in listed:
        by_name.setdefault(path_text.unescape_path(path).rpartition(b"/")[2], []).append(path)
    path_by_name = {}
    for name, line in zip(names, lines, strict=True):
        matches = by_name.get(name, [])
        if len(matches) > 1:
            raise ConfigError(
                f"{source}, line {line}: {path_text.escape_path(name)} is in several folders:"
                f" {matches[0]} and {matches[1]}.",
                "names that lead to one file each.",
                "write the folder into the path, or give the one folder with --images (in score"
                " --base).",
            )
        if matches:
            path_by_name[name] = path_text.unescape_path(matches[0])
    stems = {name.rpartition(b".")[0]: name for name in by_name} if not path_by_name else {}
    example = next((stems[name] for name in names if name in stems), None)
    return (
        path_by_name,
        "" if example is None else f".{path_text.escape_path(example.rpartition(b'.')[2])}",
    )


def _no_files_error(source: str, cells: list[bytes], base: bytes, suffix: str) -> ConfigError:
    """The refusal of a table of which no file exists; suffix: what the paths seem to lack."""
    first = path_text.escape_path(cells[0])
    do = (
        "give their folder with --images (in score --base), or the suffix that the paths lack with"
        " --suffix."
    )
    details = f"such as {path_text.escape_path(_join_path(base, cells[0]))}"
    if re.match(rb"[A-Za-z]:[\\/]|\\\\", cells[0]):
        details = f"such as {first}, a path of a Windows machine"
        do = "make the paths relative to the images' folder, and give that with --images."
    elif suffix:
        do = f"add --suffix {suffix}: such files are there."
    return ConfigError(
        f"none of the {len(cells)} files that {source} names is there, {details}.",
        "paths of image files, relative to the table's folder.",
        do,
    )


def absolute_path(name: str) -> bytes:
    """The absolute path, or URI, of a folder or file."""
    if path_text.is_store_uri(name):
        return path_text.unescape_path(path_text.resolve(name))
    # Links are not resolved: paths are relative to the folder that the table was given in.
    return posixpath.normpath(os.fsencode(Path(name).absolute()))


def _join_path(base: bytes, path: bytes) -> bytes:
    """The absolute path of a table's cell, normalized."""
    is_special = path[:1] == b"/" or path[-1:] in (b"/", b".") or b"./" in path or b"//" in path
    if not is_special:
        return base.rstrip(b"/") + b"/" + path
    origin, below = _split_store(base)
    if path_text.is_store_uri(shown := path_text.escape_path(path)):
        origin, below = _split_store(path_text.unescape_path(path_text.resolve(shown)))
        path = b""
    return origin + b"/" + posixpath.normpath(posixpath.join(b"/" + below, path)).lstrip(b"/")


def _split_store(full: bytes) -> tuple[bytes, bytes]:
    """Split a URI into store, such as s3://bucket (b"" on a disk), and path."""
    if not path_text.is_store_uri(path_text.escape_path(full)):
        return b"", full
    scheme, _, rest = full.partition(b"://")
    store, slash, path = rest.partition(b"/")
    return scheme + b"://" + store, slash + path


def _common_folder(source: str, base: bytes, lines: Mapping[bytes, int]) -> bytes:
    """The folder that contains all paths, ending in /: the base, unless one is outside."""
    first, last = min(lines), max(lines)  # a prefix of these two is a prefix of all
    top = base.rstrip(b"/") + b"/"
    if first.startswith(top) and last.startswith(top):
        return top
    if _split_store(first)[0] != _split_store(last)[0]:
        raise ConfigError(
            f"{source} names files in several places: {path_text.escape_path(first)} in line"
            f" {lines[first]},"
            f" {path_text.escape_path(last)} in line {lines[last]}.",
            "files on one disk or in one bucket.",
            "split the table, or copy the files to one place; --images sets the folder that paths"
            " are relative to.",
        )
    equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    prefix = bytes(byte for byte, _ in equal)
    return prefix[: prefix.rindex(b"/") + 1]
