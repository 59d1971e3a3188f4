"""Names and bytes of files, on a disk or in an object store.

    a root                 a folder, or a URI such as s3://bucket/prefix
      -> listing           every file below it: path, size, stamp; no file is opened
      -> read              the bytes of one of them, or why there are none

A *stamp* tells that a file changed: its mtime in ns on a disk, see `object_store` for the others.
Names of files are bytes on a disk; here they travel as text that leads back to them.

Which files below a root are no rows is the business of `exclusions`.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from resource import RUSAGE_THREAD, getrusage
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from arrowhead import ConfigError, exclusions, object_store
from arrowhead.exclusions import IMAGES

if TYPE_CHECKING:
    from concurrent.futures import Future
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

MAX_BEGINNINGS = 1000  # a request each: more sidecars in a store are looked into by sample
PART = 4096  # names looked at in one task
THREADS = 32  # where files have to be waited for
FEW_WAITS = 16
FOLDER, FILE = stat.S_IFDIR >> 12, stat.S_IFREG >> 12
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://([^/]*)(.*)", re.DOTALL)
# Addresses of pages and services, not of stores that list their objects.
WEB = ("http", "https", "ftp", "ftps", "hdfs", "webhdfs")
_ESCAPED = re.compile(r"\\(?:\\|x[0-9a-f]{2})")

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
        self.paths.append(text(path))
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


# ------------------------------------------------------------------ names of files, as text


def text(raw: bytes) -> str:
    r"""A file name as text that is valid UTF-8, safe on a screen, and leads back to the name.

    Bytes that are not UTF-8, control characters and the backslash become \xNN or \\.
    """
    name = raw.decode("utf-8", "surrogateescape")
    if name.isprintable() and "\\" not in name:
        return name
    out = []
    for char in name:
        if char == "\\":
            out.append("\\\\")
        elif "\udc80" <= char <= "\udcff":
            out.append(f"\\x{ord(char) - 0xDC00:02x}")
        elif char.isprintable():
            out.append(char)
        else:  # control characters, line separators, marks that turn writing around
            out.extend(f"\\x{byte:02x}" for byte in char.encode())
    return "".join(out)


def raw(path: str) -> bytes:
    """The file name that `text` was made from."""
    if "\\" not in path:
        return path.encode()
    out, at = bytearray(), 0
    for match in _ESCAPED.finditer(path):
        out += path[at : match.start()].encode()
        out += b"\\" if match[0] == "\\\\" else bytes.fromhex(match[0][2:])
        at = match.end()
    return bytes(out + path[at:].encode())


def resolve(source: str | Path) -> str:
    """The root that a user's `source` names, as text: what every other function here takes.

    Raises ConfigError for a URI that holds a password: URIs are written to files and screens; for
    an address of the web; and for "", which would be the working folder where a shell's variable
    is not set.
    """
    if not (given := os.fspath(source)):
        raise ConfigError(
            "The path given is empty.", "a folder, a file or an address.", "give . for this folder."
        )
    if not (uri := _URI.fullmatch(given)):
        return text(os.path.realpath(os.fsencode(given)))
    scheme, host, path = uri.groups()
    if scheme.lower() == "file":
        from urllib.parse import unquote_to_bytes

        return text(os.path.realpath(unquote_to_bytes(path or "/")))
    if scheme.lower() in WEB:
        raise _not_a_store(scheme.lower(), host)
    if "@" in host:
        raise ConfigError(
            f"the {scheme}:// address holds a name or a password.",
            "an address without them: it is written to catalogs and to the screen.",
            "leave them out; put credentials into the environment (AWS_*, GOOGLE_*).",
        )
    return text(os.fsencode(f"{scheme.lower()}://{host}{path.rstrip('/')}"))


def _not_a_store(scheme: str, host: str) -> ConfigError:
    """Why an address of the web is refused; a name, a password and a query are not shown."""
    kind = "an address of HDFS" if scheme.endswith("hdfs") else "a web address"
    return ConfigError(
        f"{scheme}://{host.rpartition('@')[2]}/… is {kind}, which is not read.",
        "a folder or a table on a disk, or at s3:// or gs://.",
        "download it first, and give the folder.",
    )


def in_store(root: str) -> bool:
    """Whether a root is in an object store, not on a disk."""
    return _URI.match(root) is not None


# ----------------------------------------------------------------------------- listing


def listing(root: str) -> Listing:
    """Every file below a root (as `resolve` gives it), whatever the folders are called.

    Links are followed; a link back up its own path is not. Files are listed, not opened.
    Raises ConfigError for a root that is not there, is no folder, or cannot be listed.
    """
    if in_store(root):
        return _stored(root)
    must_be_folder(root)
    return _without_figures(_walked(raw(root)))


def must_be_folder(root: str) -> None:
    """ConfigError for a root on a disk that is not there, is no folder, or cannot be listed."""
    try:
        os.listdir(raw(root))
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

    if in_store(root):
        there = {text(_encoded(key)): (size, stamp) for key, size, stamp in _objects(root)}
        rows = [there.get(path, (-1, 0)) for path in paths]
    else:
        top = raw(root)

        def look_at(part: range) -> tuple[list[tuple[int, int]], int, list[range]]:
            names = [os.path.join(top, raw(paths[row])) for row in part]
            return [_status(name)[1:] for name in names], len(part), []

        parts = [range(at, min(at + PART, len(paths))) for at in range(0, len(paths), PART)]
        by_part = dict(_share_out(look_at, parts))
        rows = [row for part in parts for row in by_part[part]]
    columns = np.array(rows, np.int64).reshape(-1, 2)
    return columns[:, 0].copy(), columns[:, 1].copy()


def _walked(root: bytes) -> Listing:
    """All that lies below a folder."""
    import numpy as np

    found = Found()
    for _, more in _share_out(partial(_visit, root), [Visit()]):
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


def _share_out(work: Work[Task, Result], tasks: list[Task]) -> Iterator[tuple[Task, Result]]:
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
                    found.own.append(text(visit.folder[:-1]))
                    return found, len(names), []
                names, later = _set_apart(visit, names, found)
            rows = [_status(name, handle) for name in names]
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
            found.sidecars.update([text(aside[at])] if at in aside else [])
        else:
            found.add(visit.folder + name, size, stamp)
    if visit.names is None and visit.folder and not (found.paths or visit.hidden):
        if visit.folder[:-1].lower().endswith(IMAGES):  # somebody will miss it: a row, and a fault
            found.add(visit.folder[:-1], -1, 0)
        elif len(names) < PART:
            found.folders.append(text(visit.folder[:-1]))
    return found, 1 + len(names), later


def _set_apart(visit: Visit, names: list[bytes], found: Found) -> tuple[list[bytes], list[Visit]]:
    """Of all names in a folder those to look at now; visits to the others and to what is hidden."""
    names, junk, ours = (names, [], []) if visit.hidden else exclusions.sorted_out(names)
    found.own += [text(visit.folder + name) for name in ours]
    parts = [names[at : at + PART] for at in range(PART, len(names), PART)]
    later = [visit._replace(names=part) for part in parts]
    return names[:PART], [*later, *([visit._replace(names=junk, hidden=True)] if junk else [])]


def _status(name: bytes, folder: int | None = None) -> tuple[int, int, int]:
    """Kind (bits 12 to 15 of st_mode, 0: none), size (-1: no ordinary file) and mtime in ns of what
    a name leads to, in an open folder or from the root; links are followed.
    """
    try:
        status = os.stat(name, dir_fd=folder)
    except (OSError, ValueError):  # a link to nowhere, a ring of them, a NUL in the name
        return 0, -1, 0
    kind = status.st_mode >> 12
    return kind, status.st_size if kind == FILE else -1, status.st_mtime_ns


# ------------------------------------------------------------------------------ reading


def read(
    root: str, path: str, max_bytes: int, size: int | None = None, stamp: int | None = None
) -> tuple[bytes, str | None]:
    """A file's bytes and None, or no bytes and the fault, in words.

    size, stamp: as listed; a file that differs from them is a fault. Pipes and devices are never
    waited on. May be called from many threads at once.
    """

    def judge(size_now: int, stamp_now: int) -> str | None:
        if fault := _changed(size_now, stamp_now, size, stamp):
            return fault
        return _too_large(size_now, max_bytes) if size_now > max_bytes else None

    if in_store(root):
        try:
            return object_store.read(_uri(root), raw(path).decode(), judge)
        except FileNotFoundError:
            return b"", "unreadable: No such file or directory"
        except PermissionError:
            return b"", "unreadable: Permission denied"
        except Exception as error:  # stores raise what they like
            return b"", f"unreadable: {object_store.words(error)}"
    file = os.path.join(raw(root), raw(path))
    try:
        handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            before = os.fstat(handle)
            if not stat.S_ISREG(before.st_mode):
                return b"", "not a file: a folder, pipe, socket or device"
            if fault := judge(before.st_size, before.st_mtime_ns):
                return b"", fault
            with os.fdopen(handle, "rb", closefd=False) as stream:
                data = stream.read(before.st_size + 1)
            after = os.fstat(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno == errno.ENXIO:  # how a socket, or a device without a driver, answers
            return b"", "not a file: a folder, pipe, socket or device"
        return b"", f"unreadable: {error.strerror}"
    except ValueError:  # a NUL in it
        return b"", "unreadable: no file can have this name"
    if len(data) != before.st_size or after.st_mtime_ns != before.st_mtime_ns:
        return b"", "changed: it was written to while it was read"
    return data, None


def _changed(size: int, stamp: int, old_size: int | None, old_stamp: int | None) -> str | None:
    """The fault of a file that differs from what was listed; None of sizes and stamps fit all."""
    if old_size == -1:
        return f"changed: it could not be looked at when it was listed, now it has {size} bytes"
    if old_size is not None and size != old_size:
        return f"changed: it had {old_size} bytes when it was listed, now it has {size}"
    if old_stamp is not None and stamp != old_stamp:
        return "changed: it was written again after it was listed"
    return None


def _too_large(size: int, max_bytes: int) -> str:
    return f"too large: {size} bytes, more than {max_bytes}"


# ------------------------------------------------------------------------ object stores


def _stored(root: str) -> Listing:
    """As `listing`, of a store."""
    import numpy as np

    there = [(_encoded(key), size, stamp) for key, size, stamp in _objects(root)]
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
            own.add(text(b"/".join(parts[:mine])))
        elif any(part[:1] == b"." or part in exclusions.JUNK for part in parts):
            ignored += parts[-1] != b""
        elif parts[-1]:
            rows.append((text(name), size, stamp))
        else:  # a marker, as consoles make them for a new folder: no file
            folders.append(text(name[:-1]))
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
            data, _ = read(root, text(key), 2**26)
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
        name = raw(path)
        if kind := exclusions.sidecar_kind(name.rpartition(b"/")[2]):
            by_kind.setdefault(kind, []).append(path)

    def images(paths: Sequence[str]) -> set[str]:
        full = [path for path in paths if path not in empty]
        keys = [raw(path).decode("utf-8", "surrogateescape") for path in full]
        heads = object_store.beginnings(_uri(root), keys, exclusions.HEAD_BYTES)
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
        found |= {path: text(kind) for path in paths if path not in kept}
    return found


def _objects(root: str) -> list[object_store.Object]:
    """Every object below a root in a store; ConfigError if it cannot be listed."""
    try:
        return object_store.objects(_uri(root))
    except ConfigError:
        raise
    except Exception as error:  # stores raise what they like
        raise ConfigError(
            f"{root} cannot be listed: {object_store.words(error)}.",
            "a bucket or prefix that exists and that these credentials may list.",
            "check its spelling, the credentials (AWS_*, GOOGLE_*) and, for a store of your own,"
            " AWS_ENDPOINT_URL.",
        ) from error


def fetch(root: str, path: str, target: Path) -> None:
    """Copy a file below a root in a store to the disk. Raises FileNotFoundError if it is not there,
    ConfigError if the store does not give it.
    """
    try:
        object_store.fetch(_uri(root), raw(path).decode(), target)
    except (ConfigError, FileNotFoundError):
        raise
    except Exception as error:  # stores raise what they like
        raise ConfigError(
            f"{root}/{path} cannot be fetched: {object_store.words(error)}.",
            "an address that exists and that these credentials may read.",
            "check its spelling, the credentials (AWS_*, GOOGLE_*) and, for a store of your own,"
            " AWS_ENDPOINT_URL.",
        ) from error


def _uri(root: str) -> str:
    return raw(root).decode("utf-8", "surrogateescape")


def _encoded(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")
