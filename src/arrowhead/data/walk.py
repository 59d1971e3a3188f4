"""Walk a folder: list every file below it with its size and stamp.

`os.walk` neither follows links without running into loops nor uses threads where stat is slow.
"""

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
from arrowhead.data.exclusions import IMAGE_SUFFIXES

if TYPE_CHECKING:
    from concurrent.futures import Future

    import numpy as np
    from numpy.typing import NDArray


NAMES_PER_TASK = 4096
MAX_THREADS = 32  # used only where the file system is slow to answer
MIN_WAITS = 16  # waits for the file system before threads are used
FOLDER_KIND, FILE_KIND = stat.S_IFDIR >> 12, stat.S_IFREG >> 12

Task = TypeVar("Task")
Result = TypeVar("Result")
# Returns the result of a task, how many files it examined, and further tasks.
Work = Callable[[Task], tuple[Result, int, list[Task]]]


class Visit(NamedTuple):
    """A folder to list.

    Attributes:
        folder: Its path below the root, ending in "/"; b"" is the root.
        names: The entries to examine, None for all.
        ancestors: Device and inode of its parent folders.
        hidden: Whether files in it are only counted as ignored.
    """

    folder: bytes = b""
    names: list[bytes] | None = None
    ancestors: tuple[tuple[int, int], ...] = ()
    hidden: bool = False


@dataclass(slots=True)
class ListingBuilder:
    """Collects the rows of a `Listing`, in any order."""

    paths: list[str] = field(default_factory=list)
    sizes: array[int] = field(default_factory=lambda: array("q"))
    stamps: array[int] = field(default_factory=lambda: array("q"))
    ignored: int = 0
    sidecars: Counter[str] = field(default_factory=Counter)
    folders: list[str] = field(default_factory=list)
    own: list[str] = field(default_factory=list)

    def add_row(self, path: bytes, size: int, stamp: int) -> None:
        """Add one file."""
        self.paths.append(path_text.escape_path(path))
        self.sizes.append(size)
        self.stamps.append(stamp)

    def merge(self, other: ListingBuilder) -> None:
        """Add what another visit found."""
        self.paths += other.paths
        self.sizes += other.sizes
        self.stamps += other.stamps
        self.ignored += other.ignored
        self.sidecars.update(other.sidecars)
        self.folders += other.folders
        self.own += other.own


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """Every file below a root; N rows, sorted by path.

    A folder that cannot be listed is a row of size -1. So is one that is named like an image and
    contains no file.

    Attributes:
        paths: Escaped path of each file below the root.
        sizes: int64 (N,) bytes, -1 if it is not a regular file or stat fails.
        stamps: int64 (N,), see `listing`.
        ignored: Number of ignored files: hidden and system files, also in hidden folders, and
            sidecars.
        sidecars: Number of sidecars by suffix (".txt") or, without one, by name ("README").
        folders: Escaped paths of folders that hold no file directly.
        own: Escaped paths that Arrowhead or MLflow wrote; not counted as ignored.
    """

    paths: list[str]
    sizes: NDArray[np.int64]
    stamps: NDArray[np.int64]
    ignored: int
    sidecars: dict[str, int]
    folders: list[str]
    own: list[str]


def walk_folder(root: bytes, keep: tuple[bytes, ...] = ()) -> Listing:
    """List everything below a folder; keep: see `exclusions.find_sidecars`."""
    import numpy as np

    builder = ListingBuilder()
    for _, part in run_tasks(partial(_visit_folder, root, keep), [Visit()]):
        builder.merge(part)
    order = sorted(range(len(builder.paths)), key=builder.paths.__getitem__)
    return Listing(
        paths=[builder.paths[row] for row in order],
        sizes=np.array(builder.sizes, np.int64)[order],
        stamps=np.array(builder.stamps, np.int64)[order],
        ignored=builder.ignored,
        sidecars=dict(builder.sidecars),
        folders=sorted(builder.folders),
        own=sorted(builder.own),
    )


def run_tasks(work: Work[Task, Result], tasks: list[Task]) -> Iterator[tuple[Task, Result]]:
    """Run tasks, and the tasks that these return; yields tasks with results in any order.

    Uses one thread while the kernel answers immediately, since Python threads would only wait for
    the interpreter lock. Once this thread often has to wait, as on a network file system, where
    each file costs a round trip, a thread pool does the rest.
    """
    from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

    # Voluntary context switches of this thread: how often it waited.
    tasks, n_files, first_waits = tasks[::-1], 0, getrusage(RUSAGE_THREAD).ru_nvcsw
    while tasks and getrusage(RUSAGE_THREAD).ru_nvcsw - first_waits <= MIN_WAITS + n_files // 8:
        task = tasks.pop()
        result, examined, further = work(task)
        yield task, result
        n_files += examined
        tasks += reversed(further)
    with ThreadPoolExecutor(MAX_THREADS) as pool:
        running: dict[Future[tuple[Result, int, list[Task]]], Task] = {}
        while tasks or running:
            while tasks and len(running) < 2 * MAX_THREADS:
                task = tasks.pop()
                running[pool.submit(work, task)] = task
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                result, _, further = done.result()
                yield running.pop(done), result
                tasks += reversed(further)


def _visit_folder(
    root: bytes, keep: tuple[bytes, ...], visit: Visit
) -> tuple[ListingBuilder, int, list[Visit]]:
    """List one folder; returns what it found, how many names it examined, and further visits."""
    builder, names, further = ListingBuilder(), visit.names, list[Visit]()
    try:
        # O_PATH: stat in a folder does not need the permission to list it.
        folder = os.path.join(root, visit.folder)
        handle = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            status = os.fstat(handle)
            ancestors = (*visit.ancestors, (status.st_dev, status.st_ino))
            if ancestors[-1] in visit.ancestors:  # a link to one of its parents
                return builder, 1, []
            if names is None:
                names = sorted(os.listdir(folder))
                if visit.folder and not visit.hidden and exclusions.is_own_folder(handle, names):
                    builder.own.append(path_text.escape_path(visit.folder[:-1]))
                    return builder, len(names), []
                names, further = _partition_visit(visit, names, builder)
            rows = [file_status(name, handle) for name in names]
            kinds = bytearray(kind for kind, *_ in rows)
            hidden = visit.hidden
            sidecars = {} if hidden else exclusions.find_sidecars(handle, names, kinds, keep)
        finally:
            os.close(handle)
    except OSError:  # removed, or no permission: each known name becomes a row
        parent, slash, name = visit.folder[:-1].rpartition(b"/")
        unseen = [visit.folder + name for name in names] if names else [parent + slash + name]
        for path in unseen:
            if visit.hidden:
                builder.ignored += 1
            else:
                builder.add_row(path, -1, 0)
        return builder, 1, []
    for i, (name, (kind, size, stamp)) in enumerate(zip(names, rows, strict=True)):
        if kind == FOLDER_KIND:
            further.append(Visit(visit.folder + name + b"/", None, ancestors, visit.hidden))
        elif visit.hidden or i in sidecars:
            builder.ignored += 1
            builder.sidecars.update([path_text.escape_path(sidecars[i])] if i in sidecars else [])
        else:
            builder.add_row(visit.folder + name, size, stamp)
    if visit.names is None and visit.folder and not (builder.paths or visit.hidden):
        # A folder that is named like an image becomes a fault, so that the user notices it.
        if visit.folder[:-1].lower().endswith(IMAGE_SUFFIXES):
            builder.add_row(visit.folder[:-1], -1, 0)
        elif len(names) < NAMES_PER_TASK:
            builder.folders.append(path_text.escape_path(visit.folder[:-1]))
    return builder, 1 + len(names), further


def _partition_visit(
    visit: Visit, names: list[bytes], builder: ListingBuilder
) -> tuple[list[bytes], list[Visit]]:
    """Split the names in a folder into those to examine now, and visits for the other ones."""
    names, hidden, own = (names, [], []) if visit.hidden else exclusions.partition_names(names)
    builder.own += [path_text.escape_path(visit.folder + name) for name in own]
    starts = range(NAMES_PER_TASK, len(names), NAMES_PER_TASK)
    further = [visit._replace(names=names[i : i + NAMES_PER_TASK]) for i in starts]
    if hidden:
        further.append(visit._replace(names=hidden, hidden=True))
    return names[:NAMES_PER_TASK], further


def file_status(name: bytes, folder: int | None = None) -> tuple[int, int, int]:
    """The stat of a file, following links.

    Args:
        name: Its name in `folder`, or its absolute path.
        folder: Handle of an open folder.

    Returns:
        Kind (st_mode >> 12; 0 if stat fails), size (-1 if it is not a regular file), mtime in ns.
    """
    try:
        status = os.stat(name, dir_fd=folder)
    except (OSError, ValueError):  # a broken link, a loop of links, NUL in the name
        return 0, -1, 0
    kind = status.st_mode >> 12
    return kind, status.st_size if kind == FILE_KIND else -1, status.st_mtime_ns
