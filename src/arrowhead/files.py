"""Names and bytes of files, on a disk or in an object store.

    a root                 a folder, or a URI such as s3://bucket/prefix
      -> listing           every file below it: path, size, stamp; no file is opened
      -> read              the bytes of one of them, or why there are none

A *stamp* tells that a file changed: its mtime in ns on a disk, see `object_store` for the others.
Names of files are bytes on a disk; here they travel as text that leads back to them.

Which files below a root are no rows is the business of `exclusions`.

This room imports only what starts fast: listing a large folder, Python processes that need
nothing else import it.
"""

from __future__ import annotations

import errno
import gc
import marshal
import os
import re
import stat
import sys
from array import array
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress, islice, repeat
from resource import RUSAGE_THREAD, getrusage
from time import perf_counter
from typing import IO, TYPE_CHECKING, Any

from arrowhead import ConfigError, exclusions, object_store
from arrowhead.exclusions import IMAGES

if TYPE_CHECKING:
    from concurrent.futures import Future
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

MAX_BEGINNINGS = 1000  # a request each: more sidecars in a store are looked into by sample
ALONE = 0.01  # seconds before helpers are called, which need twice as long to come
FEW, PART = 512, 16384  # names looked at in one go, alone and by a helper
LISTED, COUNTED, NAMED = range(3)  # wanted: rows; a count of the files; rows of names that we know
FOLDER, FILE = stat.S_IFDIR >> 12, stat.S_IFREG >> 12
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://([^/]*)(.*)", re.DOTALL)
_ESCAPED = re.compile(r"\\(?:\\|x[0-9a-f]{2})")

# A folder to look into: its path below the root, ending in "/" (b"" is the root), the names in it
# (None: all), device and inode of the folders above it, and what is wanted.
Visit = tuple[bytes, list[bytes] | None, tuple[tuple[int, int], ...], int]
# What was found: texts of paths, joined by NUL; whether they ascend; columns of int64: sizes,
# seconds and nanoseconds.
Block = tuple[str, bool, list[bytes]]
# Blocks, number of files left out, of these the sidecars by kind, folders that hold no file of
# their own, what is ours, visits still to make.
Found = tuple[list[Block], int, dict[bytes, int], list[str], list[str], list[Visit]]
# Makes visits, up to a number of names.
Explorer = Callable[[list[Visit], int], Found]
# What the names in an open folder are (bits 12 to 15 of st_mode, 0: none); the columns of a Block.
Looks = tuple[bytearray, list["array[int]"]]
Looker = Callable[[int, list[bytes]], Looks]


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

    Raises ConfigError for a URI that holds a password: URIs are written to files and screens; and
    for "", which would be the working folder where a shell's variable is not set.
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
    if "@" in host:
        raise ConfigError(
            f"the {scheme}:// address holds a name or a password.",
            "an address without them: it is written to catalogs and to the screen.",
            "leave them out; put credentials into the environment (AWS_*, GOOGLE_*).",
        )
    return text(os.fsencode(f"{scheme.lower()}://{host}{path.rstrip('/')}"))


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
    return _without_figures(_explored(raw(root), [(b"", None, (), LISTED)]))


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
        columns = np.array(rows, np.int64).reshape(-1, 2)
        return columns[:, 0].copy(), columns[:, 1].copy()
    visits: dict[bytes, list[bytes]] = {}
    for path in paths:
        folder, slash, name = raw(path).rpartition(b"/")
        visits.setdefault(folder + slash, []).append(name)
    named: list[Visit] = [(folder, names, (), NAMED) for folder, names in visits.items()]
    found = _explored(raw(root), named)
    assert found.paths == paths
    return found.sizes, found.stamps


def _explored(root: bytes, visits: list[Visit]) -> Listing:
    """All that these visits and those they lead to find.

    A large folder is shared out. On a disk a file costs the kernel a microsecond and Python half of
    one, so helpers are processes, one per core; on a network file system it costs a round trip, so
    they are threads, and many. How often the first files were waited for shows which it is.
    """
    from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

    import numpy as np

    explore = partial(_explore, root, _look_each)
    began, waits = perf_counter(), getrusage(RUSAGE_THREAD).ru_nvcsw
    arrived = [explore(visits, FEW)]
    while (visits := arrived[-1][-1]) and perf_counter() - began < ALONE:
        arrived.append(explore(visits, FEW))
    seen = sum(len(columns[0]) // 8 for more, *_ in arrived for *_, columns in more)
    far = getrusage(RUSAGE_THREAD).ru_nvcsw - waits > seen // 8
    count = 32 if far else min(len(os.sched_getaffinity(0)), 8)
    busy: dict[Future[Found], Explorer] = {}
    blocks: list[tuple[list[str], list[bytes]]] = []
    folders: list[str] = []
    own: list[str] = []
    sidecars: Counter[str] = Counter()
    ignored, ascending = 0, True
    with ExitStack() as stack:
        idle: list[Explorer] = []
        if visits:
            pool = stack.enter_context(ThreadPoolExecutor(count))
            idle = [explore if far else stack.enter_context(_helper(root)) for _ in range(count)]
        while arrived:
            while visits and idle:
                names = 0
                given: list[Visit] = []
                most = 1 + len(visits) // (2 * count)
                while visits and len(given) < most and names < PART:
                    given.append(visits.pop())
                    names += len(given[-1][1] or ())
                explorer = idle.pop()
                busy[pool.submit(explorer, given, PART)] = explorer
            for more, left_out, kinds, bare, ours, _ in arrived:
                for joined, sound, columns in more:
                    ascending = ascending and sound
                    blocks.append((joined.split("\0"), columns))
                ignored += left_out
                sidecars.update({text(kind): count for kind, count in kinds.items()})
                folders += bare
                own += ours
            arrived = []
            for done in wait(busy, return_when=FIRST_COMPLETED).done if busy else ():
                idle.append(busy.pop(done))
                arrived.append(done.result())
                visits += arrived[-1][-1]
    blocks.sort(key=lambda block: block[0][0])
    pairs = zip(blocks, islice(blocks, 1, None), strict=False)
    ascending = ascending and all(one[0][-1] < other[0][0] for one, other in pairs)
    paths: list[str] = []
    for some, _ in blocks:
        paths += some
    size_N, second_N, nano_N = (
        np.frombuffer(bytearray().join([columns[at] for _, columns in blocks]), np.int64)
        for at in range(3)
    )
    stamp_N = 10**9 * second_N + nano_N
    if not ascending:  # files beside folders, or names that are escaped
        order = np.array(sorted(range(len(paths)), key=paths.__getitem__), np.int64)
        paths.sort()
        size_N, stamp_N = size_N[order], stamp_N[order]
    return Listing(
        paths=paths,
        sizes=size_N,
        stamps=stamp_N,
        ignored=ignored,
        sidecars=dict(sidecars),
        folders=sorted(folders),
        own=sorted(own),
    )


def _explore(root: bytes, look: Looker, visits: list[Visit], limit: int) -> Found:
    """What these visits find, until some `limit` names were looked at, and the visits left over."""
    blocks: list[Block] = []
    folders: list[str] = []
    own: list[str] = []
    sidecars: dict[bytes, int] = {}
    ignored, seen, waiting = 0, 0, list(visits)
    while waiting and seen < limit:
        below, names, above, wanted = waiting.pop()
        whole = names is None
        folder = os.path.join(root, below)
        aside: dict[int, bytes] = {}
        try:
            # O_PATH: looking at a file takes no leave to list its folder.
            handle = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                status = os.fstat(handle)
                here = (status.st_dev, status.st_ino)
                if here in above:  # a link back up the tree
                    continue
                if names is None:
                    names = sorted(os.listdir(folder))
                    if wanted == LISTED:
                        if below and exclusions.is_own_folder(handle, names):
                            own.append(text(below[:-1]))
                            continue
                        names, junk, ours = exclusions.sorted_out(names)
                        own += [text(below + name) for name in ours]
                        waiting += [(below, junk, above, COUNTED)] if junk else []
                whole = whole and len(names) <= limit
                parts = range(limit, len(names), PART)
                waiting += [(below, names[i : i + PART], above, wanted) for i in parts]
                names = names[:limit]
                # Only a name that we were given can hold a NUL, where C would end it.
                safe = wanted != NAMED or not any(b"\0" in name for name in names)
                kinds, columns = (look if safe else _look_each)(handle, names)
                if wanted == LISTED:
                    aside = exclusions.sidecars(handle, names, kinds)
            finally:
                os.close(handle)
        except (OSError, ValueError):  # gone, or not ours to see: a row for each name we have
            if names is None:
                parent, slash, name = below[:-1].rpartition(b"/")
                below, names = parent + slash, [name]
            kinds, zeros = bytearray(len(names)), array("q", bytes(8 * len(names)))
            columns = [array("q", [-1]) * len(names), zeros, zeros]
        seen += 1 + len(names)
        if aside or (FOLDER in kinds and wanted != NAMED):
            inner = [name for name, kind in zip(names, kinds, strict=True) if kind == FOLDER]
            waiting += [(below + name + b"/", None, (*above, here), wanted) for name in inner]
            files = [kind != FOLDER and at not in aside for at, kind in enumerate(kinds)]
            names = list(compress(names, files))
            columns = [array("q", compress(column, files)) for column in columns]
            for sort in aside.values():
                sidecars[sort] = sidecars.get(sort, 0) + 1
            ignored += len(aside)
        if wanted == COUNTED:
            ignored += len(names)
        elif names:
            blocks.append((*_texts(below, names), [column.tobytes() for column in columns]))
        elif whole and below:
            parent, slash, name = below[:-1].rpartition(b"/")
            if name.lower().endswith(IMAGES):  # somebody will miss it: it is a row, and a fault
                nothing = [array("q", [number]).tobytes() for number in (-1, 0, 0)]
                blocks.append((*_texts(parent + slash, [name]), nothing))
            else:
                folders.append(text(below[:-1]))
    return blocks, ignored, sidecars, folders, own, waiting


def _look_each(handle: int, names: list[bytes]) -> Looks:
    """Kinds, sizes, seconds and nanoseconds of the names in an open folder; links are followed."""
    kinds, columns = bytearray(), [array("q") for _ in range(3)]
    for name in names:
        try:
            status = os.stat(name, dir_fd=handle)
        except (OSError, ValueError):  # a ring of links, a link to nowhere
            kind, row = 0, (-1, 0, 0)
        else:
            kind = status.st_mode >> 12
            size = status.st_size if kind == FILE else -1
            row = (size, *divmod(status.st_mtime_ns, 10**9))
        kinds.append(kind)
        for column, value in zip(columns, row, strict=True):
            column.append(value)
    return kinds, columns


def _look_all() -> Looker:
    """`_look_each` at a third of Python's share of the time: statx into one buffer.

    Not for threads: the interpreter is held meanwhile. struct statx is the same on every machine
    (statx(2)): 256 bytes, of which byte 29 holds the kind and the words of 8 bytes from 40, 112 and
    120 on the size, the seconds and the nanoseconds of the mtime.
    """
    import ctypes

    call = getattr(ctypes.PyDLL(None), "statx", None)
    if call is None or sys.byteorder != "little":
        return _look_each
    call.restype = None
    blank = bytes(256 * FEW)
    words = array("q", blank)
    octets = memoryview(words).cast("B")
    start, _ = words.buffer_info()
    slots = [ctypes.c_size_t.from_param(start + 256 * i) for i in range(FEW)]
    upper_half = bytes(octet >> 4 for octet in range(256))

    def look(handle: int, names: list[bytes]) -> Looks:
        kinds, columns = bytearray(), [array("q") for _ in range(3)]
        for first in range(0, len(names), FEW):
            part = names[first : first + FEW]
            octets[:] = blank  # where the call fails, the kind stays 0
            # 0x800: as stat(2), mount nothing; 0x241: type, size, mtime.
            deque(map(call, repeat(handle), part, repeat(0x800), repeat(0x241), slots), 0)
            kinds += octets[29 : 256 * len(part) : 256].tobytes().translate(upper_half)
            for column, word in zip(columns, (5, 14, 15), strict=True):
                column += words[word : 32 * len(part) : 32]
        if kinds.count(FILE) < len(names):
            for i in [i for i, kind in enumerate(kinds) if kind != FILE]:
                kinds[i : i + 1], row = _look_each(handle, names[i : i + 1])
                for column, value in zip(columns, row, strict=True):
                    column[i : i + 1] = value
        return kinds, columns

    return look


def _texts(below: bytes, names: list[bytes]) -> tuple[str, bool]:
    """The texts of these paths, joined by NUL, and whether they ascend as the names do."""
    joined, prefix = b"/".join(names).decode("utf-8", "surrogateescape"), text(below)
    if joined.isprintable() and "\\" not in joined:  # UTF-8 sorts as what it stands for
        return prefix + joined.replace("/", "\0" + prefix), True
    texts = [prefix + text(name) for name in names]
    return "\0".join(texts), texts == sorted(texts)


@contextmanager
def _helper(root: bytes) -> Iterator[Explorer]:
    """`_explore` in a process of its own, or in the calling thread where that cannot be."""
    from pathlib import Path
    from subprocess import DEVNULL, PIPE, Popen

    # Isolated and without site packages it starts in 20 ms.
    code = "import sys; sys.path.append(sys.argv[1]); from arrowhead import files; files.serve()"
    here = str(Path(__file__).resolve().parents[1])
    command: list[str | bytes] = [sys.executable or "", "-I", "-S", "-c", code, here, root]
    try:
        process = Popen(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL)  # noqa: S603 - ourselves
    except OSError:
        yield partial(_explore, root, _look_each)
        return
    say, hear = process.stdin, process.stdout
    assert say and hear

    def explore(visits: list[Visit], limit: int) -> Found:
        try:
            _send(say, (visits, limit))
            found: Found = _receive(hear)
        except (OSError, EOFError):  # it was killed: its work is done here
            return _explore(root, _look_each, visits, limit)
        return found

    try:
        yield explore
    finally:
        process.kill()
        process.wait()
        hear.close()
        with suppress(OSError):
            say.close()


def serve() -> None:
    """The far end of `_helper`: explores what it is sent until nothing more comes."""
    gc.disable()  # nothing here goes in circles
    explore = partial(_explore, os.fsencode(sys.argv[2]), _look_all())
    with suppress(OSError, EOFError):
        while True:
            _send(sys.stdout.buffer, explore(*_receive(sys.stdin.buffer)))


def _send(pipe: IO[bytes], message: Any) -> None:
    data = marshal.dumps(message)
    pipe.write(len(data).to_bytes(8, "big") + data)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> Any:
    size = int.from_bytes(pipe.read(8), "big")
    data = pipe.read(size)
    if not size or len(data) < size:
        raise EOFError
    return marshal.loads(data)  # noqa: S302 - it comes from our own process


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
