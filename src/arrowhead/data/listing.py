"""Every file below a root, on a disk or in an object store.

    a root                 a folder, or a URI such as s3://bucket/prefix
      -> listing           every file below it: path, size, stamp; no file is opened

A *stamp* tells that a file changed: its mtime in ns on a disk, see `object_store` for the others.

Which files below a root are no rows is the business of `exclusions`.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from arrowhead.data import exclusions, object_store, path_text, reading, walk
from arrowhead.data.walk import PART, Listing
from arrowhead.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


MAX_BEGINNINGS = 1000  # a request each: more sidecars in a store are looked into by sample


# ----------------------------------------------------------------------------- listing


def listing(root: str) -> Listing:
    """Every file below a root (as `resolve` gives it), whatever the folders are called.

    Links are followed; a link back up its own path is not. Files are listed, not opened.
    Raises ConfigError for a root that is not there, is no folder, or cannot be listed.
    """
    if path_text.in_store(root):
        return _stored(root)
    must_be_folder(root)
    return _without_figures(walk.walked(path_text.unescape_path(root)))


def must_be_folder(root: str) -> None:
    """ConfigError for a root on a disk that is not there, is no folder, or cannot be listed."""
    try:
        os.listdir(path_text.unescape_path(root))
    except OSError as error:
        found = {
            FileNotFoundError: f"{root} is not there.",
            NotADirectoryError: f"{root} is a file.",
        }
        raise ConfigError(
            found.get(type(error), f"{root} cannot be listed: {error.strerror}."),
            "a folder of images.",
            "check the spelling; `arrowhead demo` makes a folder to try.",
        ) from error


def _without_figures(found: Listing) -> Listing:
    """The listing without what stands because of our own folders: figures beside a bundle, and the
    folders above that hold nothing else.
    """
    if not found.own:
        return found
    above = {
        "/".join(parts[:n])
        for own in found.own
        for parts in [own.split("/")]
        for n in range(len(parts))
    }
    bare = [folder for folder in found.folders if folder not in above]
    rows = []
    for figure in {own + ending for own in found.own for ending in exclusions.OWN_FIGURES}:
        row = bisect_left(found.paths, figure)
        rows += [row] if found.paths[row : row + 1] == [figure] else []
    if not rows:
        return replace(found, folders=bare)
    import numpy as np

    gone = sorted(rows, reverse=True)
    paths, own = list(found.paths), [*found.own, *(found.paths[row] for row in gone)]
    for row in gone:
        del paths[row]
    sizes, stamps = np.delete(found.sizes, gone), np.delete(found.stamps, gone)
    return replace(found, paths=paths, sizes=sizes, stamps=stamps, folders=bare, own=sorted(own))


def look(root: str, paths: list[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sizes and stamps, int64 (N,) each, of these files below a root; size -1 where none is there.

    paths: text, sorted, each once. Raises ConfigError for a store that cannot be listed.
    """
    import numpy as np

    if path_text.in_store(root):
        there = {
            path_text.escape_path(path_text.encoded(key)): (size, stamp)
            for key, size, stamp in _objects(root)
        }
        rows = [there.get(path, (-1, 0)) for path in paths]
    else:
        top = path_text.unescape_path(root)

        def look_at(part: range) -> tuple[list[tuple[int, int]], int, list[range]]:
            names = [os.path.join(top, path_text.unescape_path(paths[row])) for row in part]
            return [walk.file_status(name)[1:] for name in names], len(part), []

        parts = [range(at, min(at + PART, len(paths))) for at in range(0, len(paths), PART)]
        by_part = dict(walk.share_out(look_at, parts))
        rows = [row for part in parts for row in by_part[part]]
    columns = np.array(rows, np.int64).reshape(-1, 2)
    return columns[:, 0].copy(), columns[:, 1].copy()


# ------------------------------------------------------------------------ object stores


def _stored(root: str) -> Listing:
    """As `listing`, of a store."""
    import numpy as np

    there = [(path_text.encoded(key), size, stamp) for key, size, stamp in _objects(root)]
    if not there:
        raise ConfigError(
            f"{root} holds nothing.",
            "a bucket, or a prefix of keys followed by /.",
            "check the spelling of bucket and prefix.",
        )
    ours = _own_folders(root, [name for name, *_ in there])
    rows, folders, own, ignored = [], [], set(), 0
    for name, size, stamp in there:
        parts = name.split(b"/")
        mine = next((n for n in range(1, len(parts)) if b"/".join(parts[:n]) in ours), None)
        mine = mine or next(
            (n for n, part in enumerate(parts, 1) if exclusions.is_own_name(part)), None
        )
        if mine is not None:
            own.add(path_text.escape_path(b"/".join(parts[:mine])))
        elif any(part[:1] == b"." or part in exclusions.JUNK for part in parts):
            ignored += parts[-1] != b""
        elif parts[-1]:
            rows.append((path_text.escape_path(name), size, stamp))
        else:  # a marker, as consoles make them for a new folder: no file
            folders.append(path_text.escape_path(name[:-1]))
    aside = _stored_sidecars(root, rows)
    rows = sorted(row for row in rows if row[0] not in aside)
    found = Listing(
        paths=[path for path, *_ in rows],
        sizes=np.array([size for _, size, _ in rows], np.int64),
        stamps=np.array([stamp for *_, stamp in rows], np.int64),
        ignored=ignored + len(aside),
        sidecars=dict(Counter(aside.values())),
        folders=sorted(folders),
        own=sorted(own),
    )
    return _without_figures(found)


def _own_folders(root: str, keys: list[bytes]) -> set[bytes]:
    """The folders in a store that are stores, bundles or scores of ours."""
    found = set()
    for key in keys:
        folder, _, name = key.rpartition(b"/")
        if name in exclusions.OWN_FILES and folder and folder not in found:
            data, _ = reading.read(root, path_text.escape_path(key), 2**26)
            found |= {folder} if exclusions.OWN_FILES[name] in data else set()
    return found


def _stored_sidecars(root: str, rows: list[tuple[str, int, int]]) -> dict[str, str]:
    """Paths and kinds of the sidecars among these rows of a store.

    Each is looked into, a request each; where there are many, a sample of each kind, and all of
    a kind of which the sample holds an image.
    """
    by_kind: dict[bytes, list[str]] = {}
    empty = {path for path, size, _ in rows if size == 0}
    for path, *_ in rows:
        name = path_text.unescape_path(path)
        if kind := exclusions.sidecar_kind(name.rpartition(b"/")[2]):
            by_kind.setdefault(kind, []).append(path)

    def images(paths: Sequence[str]) -> set[str]:
        full = [path for path in paths if path not in empty]
        keys = [path_text.unescape_path(path).decode("utf-8", "surrogateescape") for path in full]
        heads = object_store.beginnings(path_text.uri(root), keys, exclusions.HEAD_BYTES)
        pairs = zip(full, heads, strict=True)
        return {
            path for path, head in pairs if head is None or exclusions.looks_like_an_image(head)
        }

    found: dict[str, str] = {}
    for kind, paths in by_kind.items():
        step = -(-len(paths) * len(by_kind) // MAX_BEGINNINGS)
        kept = images(paths[::step])
        if kept and step > 1:
            kept = images(paths)
        found |= {path: path_text.escape_path(kind) for path in paths if path not in kept}
    return found


def _objects(root: str) -> list[object_store.Object]:
    """Every object below a root in a store; ConfigError if it cannot be listed."""
    try:
        return object_store.objects(path_text.uri(root))
    except ConfigError:
        raise
    except Exception as error:  # stores raise what they like
        raise ConfigError(
            f"{root} cannot be listed: {object_store.words(error)}.",
            "a bucket or prefix that exists and that these credentials may list.",
            "check its spelling, the credentials (AWS_*, GOOGLE_*) and, for a store of your own,"
            " AWS_ENDPOINT_URL.",
        ) from error
