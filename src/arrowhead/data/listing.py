"""List every file below a root, a folder or a URI such as s3://bucket/prefix.

A listing holds the path, size and stamp of each file. A *stamp* changes when the file does: on a
disk it is the mtime in ns; for stores see `object_store`. `exclusions` defines what is ignored.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from arrowhead.data import exclusions, object_store, path_text, reading, walk
from arrowhead.data.walk import NAMES_PER_TASK, Listing
from arrowhead.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


MAX_HEADER_READS = 1000  # requests; of more sidecars in a store only a sample is read


def list_files(root: str, keep: tuple[bytes, ...] = ()) -> Listing:
    """List every file below a root.

    Links are followed, except those that lead to one of their own parents. Images are not opened.

    Args:
        root: The root (see `path_text.resolve`).
        keep: Suffixes, in lower case, of files that are listed although they are named like
            sidecars.

    Raises:
        ConfigError: The root does not exist, is not a folder, or cannot be listed.
    """
    if path_text.is_store_uri(root):
        return _list_store(root, keep)
    check_folder(root)
    return _drop_own_figures(walk.walk_folder(path_text.unescape_path(root), keep))


def check_folder(root: str) -> None:
    """Raise ConfigError if a root on a disk does not exist, is no folder, or cannot be listed."""
    try:
        os.listdir(path_text.unescape_path(root))
    except OSError as error:
        messages = {
            FileNotFoundError: f"{root} is not there.",
            NotADirectoryError: f"{root} is a file.",
        }
        raise ConfigError(
            messages.get(type(error), f"{root} cannot be listed: {error.strerror}."),
            "a folder of images.",
            "check the spelling; `arrowhead demo` creates a folder to try.",
        ) from error


def _drop_own_figures(listed: Listing) -> Listing:
    """The listing without figures beside our bundles, and without folders that hold only our own
    output.
    """
    if not listed.own:
        return listed
    parents = {
        "/".join(parts[:n])
        for own in listed.own
        for parts in [own.split("/")]
        for n in range(len(parts))
    }
    bare = [folder for folder in listed.folders if folder not in parents]
    rows = []
    for figure in {own + ending for own in listed.own for ending in exclusions.OWN_FIGURE_SUFFIXES}:
        row = bisect_left(listed.paths, figure)
        rows += [row] if listed.paths[row : row + 1] == [figure] else []
    if not rows:
        return replace(listed, folders=bare)
    import numpy as np

    dropped = sorted(rows, reverse=True)
    paths, own = list(listed.paths), [*listed.own, *(listed.paths[row] for row in dropped)]
    for row in dropped:
        del paths[row]
    sizes, stamps = np.delete(listed.sizes, dropped), np.delete(listed.stamps, dropped)
    return replace(listed, paths=paths, sizes=sizes, stamps=stamps, folders=bare, own=sorted(own))


def stat_files(root: str, paths: list[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sizes and stamps of files below a root.

    Args:
        root: The root (see `path_text.resolve`).
        paths: Escaped paths below it, sorted and unique.

    Returns:
        Sizes and stamps, int64 (N,) each; size -1 for a missing file.

    Raises:
        ConfigError: The store cannot be listed.
    """
    import numpy as np

    if path_text.is_store_uri(root):
        listed = {
            path_text.escape_path(path_text.encode_key(key)): (size, stamp)
            for key, size, stamp in _list_objects(root)
        }
        rows = [listed.get(path, (-1, 0)) for path in paths]
    else:
        top = path_text.unescape_path(root)

        def stat_rows(part: range) -> tuple[list[tuple[int, int]], int, list[range]]:
            names = [os.path.join(top, path_text.unescape_path(paths[row])) for row in part]
            return [walk.file_status(name)[1:] for name in names], len(part), []

        parts = [
            range(at, min(at + NAMES_PER_TASK, len(paths)))
            for at in range(0, len(paths), NAMES_PER_TASK)
        ]
        by_part = dict(walk.run_tasks(stat_rows, parts))
        rows = [row for part in parts for row in by_part[part]]
    columns = np.array(rows, np.int64).reshape(-1, 2)
    return columns[:, 0].copy(), columns[:, 1].copy()


# ------------------------------------------------------------------------ object stores


def _list_store(root: str, keep: tuple[bytes, ...]) -> Listing:
    """As `list_files`, for a root in a store."""
    import numpy as np

    objects = [(path_text.encode_key(key), size, stamp) for key, size, stamp in _list_objects(root)]
    if not objects:
        raise ConfigError(
            f"{root} holds nothing.",
            "a bucket, or a prefix of keys followed by /.",
            "check the spelling of bucket and prefix.",
        )
    own_folders = _find_own_folders(root, [name for name, *_ in objects])
    rows, folders, own, ignored = [], [], set(), 0
    for name, size, stamp in objects:
        parts = name.split(b"/")
        depths = range(1, len(parts))
        own_depth = next((n for n in depths if b"/".join(parts[:n]) in own_folders), None)
        own_depth = own_depth or next(
            (n for n, part in enumerate(parts, 1) if exclusions.is_own_name(part)), None
        )
        if own_depth is not None:
            own.add(path_text.escape_path(b"/".join(parts[:own_depth])))
        elif any(part[:1] == b"." or part in exclusions.SYSTEM_FILES for part in parts):
            ignored += parts[-1] != b""
        elif parts[-1]:
            rows.append((path_text.escape_path(name), size, stamp))
        else:  # an empty object that web consoles create for a new folder
            folders.append(path_text.escape_path(name[:-1]))
    sidecars = _find_stored_sidecars(root, rows, keep)
    rows = sorted(row for row in rows if row[0] not in sidecars)
    found = Listing(
        paths=[path for path, *_ in rows],
        sizes=np.array([size for _, size, _ in rows], np.int64),
        stamps=np.array([stamp for *_, stamp in rows], np.int64),
        ignored=ignored + len(sidecars),
        sidecars=dict(Counter(sidecars.values())),
        folders=sorted(folders),
        own=sorted(own),
    )
    return _drop_own_figures(found)


def _find_own_folders(root: str, keys: list[bytes]) -> set[bytes]:
    """The folders in an object store that are feature stores, bundles or scores of Arrowhead."""
    own_folders = set()
    for key in keys:
        folder, _, name = key.rpartition(b"/")
        if name in exclusions.OWN_MARKERS and folder and folder not in own_folders:
            data, _ = reading.read_file(root, path_text.escape_path(key), 2**26)
            own_folders |= {folder} if exclusions.OWN_MARKERS[name] in data else set()
    return own_folders


def _find_stored_sidecars(
    root: str, rows: list[tuple[str, int, int]], keep: tuple[bytes, ...]
) -> dict[str, str]:
    """The sidecars among rows of an object store: {path: kind}.

    The first bytes of each are read, with one request each. If there are many, a sample of each
    kind is read, and the whole kind only if the sample contains an image.
    """
    by_kind: dict[bytes, list[str]] = {}
    empty = {path for path, size, _ in rows if size == 0}
    for path, *_ in rows:
        name = path_text.unescape_path(path)
        if keep and name.lower().endswith(keep):
            continue
        if kind := exclusions.sidecar_kind(name.rpartition(b"/")[2]):
            by_kind.setdefault(kind, []).append(path)

    def find_images(paths: Sequence[str]) -> set[str]:
        full = [path for path in paths if path not in empty]
        keys = [path_text.unescape_path(path).decode("utf-8", "surrogateescape") for path in full]
        heads = object_store.read_first_bytes(
            path_text.store_uri(root), keys, exclusions.HEADER_BYTES
        )
        pairs = zip(full, heads, strict=True)
        return {path for path, head in pairs if head is None or exclusions.looks_like_image(head)}

    kinds_by_path: dict[str, str] = {}
    for kind, paths in by_kind.items():
        step = -(-len(paths) * len(by_kind) // MAX_HEADER_READS)
        images = find_images(paths[::step])
        if images and step > 1:
            images = find_images(paths)
        kinds_by_path |= {path: path_text.escape_path(kind) for path in paths if path not in images}
    return kinds_by_path


def _list_objects(root: str) -> list[object_store.StoredObject]:
    """List every object below a root in a store; ConfigError if it cannot be listed."""
    try:
        return object_store.list_objects(path_text.store_uri(root))
    except ConfigError:
        raise
    except Exception as error:  # each store raises its own exceptions
        raise ConfigError(
            f"{root} cannot be listed: {object_store.error_summary(error)}.",
            "a bucket or prefix that exists and that these credentials may list.",
            "check its spelling, the credentials (AWS_*, GOOGLE_*) and, for your own store,"
            " AWS_ENDPOINT_URL.",
        ) from error
