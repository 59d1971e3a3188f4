"""A folder walked: every file below it with its size and stamp."""

from __future__ import annotations

import os
import stat
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from resource import RUSAGE_THREAD, getrusage
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from arrowhead.data import exclusions, path_text
from arrowhead.data.exclusions import IMAGES

if TYPE_CHECKING:
    from concurrent.futures import Future

    import numpy as np
    from numpy.typing import NDArray


PART = 4096  # names looked at in one task
THREADS = 32  # where files have to be waited for
FEW_WAITS = 16
FOLDER, FILE = stat.S_IFDIR >> 12, stat.S_IFREG >> 12

Task = TypeVar("Task")
Result = TypeVar("Result")
# Gives the result of a task, how many files it looked at, and the tasks that follow from it.
Work = Callable[[Task], tuple[Result, int, list[Task]]]


class Visit(NamedTuple):
    """A folder to look into.

    folder: its path below the root, ending in "/" (b"" is the root); names: those to look at (None:
    all that are in it); above: device and inode of the folders above it; hidden: only count.
    """

    folder: bytes = b""
    names: list[bytes] | None = None
    above: tuple[tuple[int, int], ...] = ()
    hidden: bool = False


@dataclass(slots=True)
class Found:
    """A `Listing` while it grows, in any order."""

    paths: list[str] = field(default_factory=list)
    sizes: array[int] = field(default_factory=lambda: array("q"))
    stamps: array[int] = field(default_factory=lambda: array("q"))
    ignored: int = 0
    sidecars: Counter[str] = field(default_factory=Counter)
    folders: list[str] = field(default_factory=list)
    own: list[str] = field(default_factory=list)

    def add(self, path: bytes, size: int, stamp: int) -> None:
        """A row."""
        self.paths.append(path_text.escape_path(path))
        self.sizes.append(size)
        self.stamps.append(stamp)

    def update(self, more: Found) -> None:
        """What another visit found."""
        self.paths += more.paths
        self.sizes += more.sizes
        self.stamps += more.stamps
        self.ignored += more.ignored
        self.sidecars.update(more.sidecars)
        self.folders += more.folders
        self.own += more.own


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """Every file below a root; N rows, sorted by path.

    paths: text of each path below the root; sizes: int64 (N,) bytes, -1 where there is no
    ordinary file to be read; stamps: int64 (N,); ignored: number of files seen and left out
    (hidden ones and system files, also inside hidden folders; sidecars); sidecars: how many of
    these are sidecars, by ending (".txt") or, without one, by name ("README"); folders: text of the
    folders that hold no file of their own; own: text of files and folders that Arrowhead or MLflow
    wrote, which are not counted. A folder that cannot be listed is a row of size -1, and so is one
    without a file that is named like an image.
    """

    paths: list[str]
    sizes: NDArray[np.int64]
    stamps: NDArray[np.int64]
    ignored: int
    sidecars: dict[str, int]
    folders: list[str]
    own: list[str]


def walked(root: bytes) -> Listing:
    """All that lies below a folder."""
    import numpy as np

    found = Found()
    for _, more in share_out(partial(_visit, root), [Visit()]):
        found.update(more)
    order = sorted(range(len(found.paths)), key=found.paths.__getitem__)
    return Listing(
        paths=[found.paths[row] for row in order],
        sizes=np.array(found.sizes, np.int64)[order],
        stamps=np.array(found.stamps, np.int64)[order],
        ignored=found.ignored,
        sidecars=dict(found.sidecars),
        folders=sorted(found.folders),
        own=sorted(found.own),
    )


def share_out(work: Work[Task, Result], tasks: list[Task]) -> Iterator[tuple[Task, Result]]:
    """Every task, and every one that it leads to, with its result, in any order.

    This thread works alone while the kernel answers at once: Python threads would only wait for
    each other. Where it has to wait for files, as on a network file system, where each costs a
    round trip, many threads do the rest.
    """
    from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

    tasks, seen, waits = tasks[::-1], 0, getrusage(RUSAGE_THREAD).ru_nvcsw
    while tasks and getrusage(RUSAGE_THREAD).ru_nvcsw - waits <= FEW_WAITS + seen // 8:
        task = tasks.pop()
        result, looked_at, more = work(task)
        yield task, result
        seen += looked_at
        tasks += reversed(more)
    with ThreadPoolExecutor(THREADS) as pool:
        busy: dict[Future[tuple[Result, int, list[Task]]], Task] = {}
        while tasks or busy:
            while tasks and len(busy) < 2 * THREADS:
                task = tasks.pop()
                busy[pool.submit(work, task)] = task
            for done in wait(busy, return_when=FIRST_COMPLETED).done:
                result, _, more = done.result()
                yield busy.pop(done), result
                tasks += reversed(more)


def _visit(root: bytes, visit: Visit) -> tuple[Found, int, list[Visit]]:
    """What a visit finds, how many names it looked at, and the visits that it leads to."""
    found, names, later = Found(), visit.names, list[Visit]()
    try:
        # O_PATH: looking at a file takes no leave to list its folder.
        folder = os.path.join(root, visit.folder)
        handle = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            status = os.fstat(handle)
            above = (*visit.above, (status.st_dev, status.st_ino))
            if above[-1] in visit.above:  # a link back up the tree
                return found, 1, []
            if names is None:
                names = sorted(os.listdir(folder))
                if visit.folder and not visit.hidden and exclusions.is_own_folder(handle, names):
                    found.own.append(path_text.escape_path(visit.folder[:-1]))
                    return found, len(names), []
                names, later = _set_apart(visit, names, found)
            rows = [file_status(name, handle) for name in names]
            kinds = bytearray(kind for kind, *_ in rows)
            aside = {} if visit.hidden else exclusions.sidecars(handle, names, kinds)
        finally:
            os.close(handle)
    except OSError:  # gone, or not ours to see: a row for each name that is known
        parent, slash, name = visit.folder[:-1].rpartition(b"/")
        unseen = [visit.folder + name for name in names] if names else [parent + slash + name]
        for path in unseen:
            if visit.hidden:
                found.ignored += 1
            else:
                found.add(path, -1, 0)
        return found, 1, []
    for at, (name, (kind, size, stamp)) in enumerate(zip(names, rows, strict=True)):
        if kind == FOLDER:
            later.append(Visit(visit.folder + name + b"/", None, above, visit.hidden))
        elif visit.hidden or at in aside:
            found.ignored += 1
            found.sidecars.update([path_text.escape_path(aside[at])] if at in aside else [])
        else:
            found.add(visit.folder + name, size, stamp)
    if visit.names is None and visit.folder and not (found.paths or visit.hidden):
        if visit.folder[:-1].lower().endswith(IMAGES):  # somebody will miss it: a row, and a fault
            found.add(visit.folder[:-1], -1, 0)
        elif len(names) < PART:
            found.folders.append(path_text.escape_path(visit.folder[:-1]))
    return found, 1 + len(names), later


def _set_apart(visit: Visit, names: list[bytes], found: Found) -> tuple[list[bytes], list[Visit]]:
    """Of all names in a folder those to look at now; visits to the others and to what is hidden."""
    names, junk, ours = (names, [], []) if visit.hidden else exclusions.sorted_out(names)
    found.own += [path_text.escape_path(visit.folder + name) for name in ours]
    parts = [names[at : at + PART] for at in range(PART, len(names), PART)]
    later = [visit._replace(names=part) for part in parts]
    return names[:PART], [*later, *([visit._replace(names=junk, hidden=True)] if junk else [])]


def file_status(name: bytes, folder: int | None = None) -> tuple[int, int, int]:
    """Kind (bits 12 to 15 of st_mode, 0: none), size (-1: no ordinary file) and mtime in ns of what
    a name leads to, in an open folder or from the root; links are followed.
    """
    try:
        status = os.stat(name, dir_fd=folder)
    except (OSError, ValueError):  # a link to nowhere, a ring of them, a NUL in the name
        return 0, -1, 0
    kind = status.st_mode >> 12
    return kind, status.st_size if kind == FILE else -1, status.st_mtime_ns
