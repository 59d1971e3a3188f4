"""Objects in a store: S3, Google Cloud Storage, and whatever else fsspec opens.

    a URI                  s3://bucket/prefix, gs://bucket/prefix, …
      -> objects           every key below it, with size and stamp; no object is opened
      -> read              the bytes of one of them, unless it is not what was listed
      -> beginnings        the first bytes of many of them, side by side
      -> fetch             one of them as a file on the disk

A *stamp* is 63 bits of a hash of what the store changes with every write: the generation (Google),
the ETag (S3), or the time of the last write. URIs and keys are text as the store spells them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import repeat
from typing import TYPE_CHECKING, Any

from arrowhead.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
THREADS = 16
PAUSES_SECONDS = (0.5, 2.0, None)  # before another try; None: there is none
# Key below the root, bytes, stamp.
Object = tuple[str, int, int]
# Given size and stamp as the store has them now: why the object is not read, or None.
Judge = Callable[[int, int], str | None]


def objects(uri: str) -> list[Object]:
    """Every object below a URI. Raises what the store raises, ConfigError without its library."""
    store, top = _store(uri)
    if not hasattr(store, "call_s3"):
        return [
            (name[len(top) + 1 :], _size(store, info), _stamp(info))
            for name, info in store.find(top, detail=True).items()
            if info.get("type") == "file" and name.startswith(f"{top}/")
        ]
    bucket, _, prefix = top.partition("/")
    return _s3_objects(store, bucket, prefix and f"{prefix}/")


def _s3_objects(store: Any, bucket: str, prefix: str) -> list[Object]:
    """Every object below a prefix, page by page, prefixes side by side.

    s3fs's own `find` keeps all pages and trips over keys such as a//b.
    """

    def page_through(below: str, delimiter: str) -> tuple[list[Object], list[str]]:
        objects: list[Object] = []
        prefixes: list[str] = []
        asked = {"Bucket": bucket, "Prefix": below, "Delimiter": delimiter}
        more = True
        while more:
            page = store.call_s3("list_objects_v2", **asked)
            prefixes += [each["Prefix"] for each in page.get("CommonPrefixes", ())]
            objects += [
                (each["Key"][len(prefix) :], int(each["Size"]), _stamp(each))
                for each in page.get("Contents", ())
            ]
            if more := page.get("IsTruncated", False):
                asked["ContinuationToken"] = page["NextContinuationToken"]
        return objects, prefixes

    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(THREADS) as pool:
        found: list[Object] = []
        prefixes = [prefix]
        for _ in range(3):  # ROOT, train/, train/cat/: enough to share out
            if not 0 < len(prefixes) < 2 * THREADS:
                break
            pages = list(pool.map(page_through, prefixes, repeat("/")))
            below = [each for _, inner in pages for each in inner]
            if len(below) > 1000:  # a request each would take longer than to walk through them
                break
            found += [each for objects, _ in pages for each in objects]
            prefixes = below
        for objects, _ in pool.map(page_through, prefixes, repeat("")):
            found += objects
    return found


def read(uri: str, key: str, judge: Judge) -> tuple[bytes, str | None]:
    """An object's bytes and None, or no bytes and the fault that `judge` sees in it.

    Answers that break off are asked for again. Raises what the store raises.
    """
    store, top = _store(uri)
    if hasattr(store, "call_s3"):
        found: tuple[bytes, str | None] = _s3_read(store, f"{top}/{key}", judge)
        return found
    # gcsfs repeats requests and broken answers itself, for a minute: the two would multiply.
    for pause in PAUSES_SECONDS if not _is_google(store) else (None,):
        try:
            return _read(store, f"{top}/{key}", judge)
        except (FileNotFoundError, PermissionError):
            raise
        except Exception:  # stores raise what they like
            if pause is None:
                raise
            import time

            time.sleep(pause)
    raise AssertionError


def _read(store: Any, name: str, judge: Judge) -> tuple[bytes, str | None]:
    """As `read`, once, by what every fsspec store has."""
    info = store.info(name)
    size, stamp = _size(store, info), _stamp(info)
    if _is_google(store):  # this very generation is read, whatever is written meanwhile
        if fault := judge(size, stamp):
            return b"", fault
        pinned: bytes = store.cat_file(name, generation=info["generation"])
        return pinned, None
    if judge(size, stamp):  # some stores tell another time here than in a listing: that one counts
        info = _in_listing(store, name) or info
        if fault := judge(_size(store, info), _stamp(info)):
            return b"", fault
    data: bytes = store.cat_file(name)
    after = store.info(name)
    if len(data) != size or (_size(store, after), _stamp(after)) != (size, stamp):
        return b"", "changed: it was written to while it was read"
    return data, None


def _in_listing(store: Any, name: str) -> Mapping[str, Any] | None:
    """What a listing of its folder says of an object."""
    folder = name.rpartition("/")[0]
    return next((one for one in store.ls(folder, detail=True) if one["name"] == name), None)


def _s3_read(store: Any, path: str, judge: Judge, first: int | None = None) -> Any:
    """As `read`, from S3; first: only so many bytes."""
    import asyncio

    from fsspec.asyn import sync

    bucket, _, name = path.partition("/")
    part = {} if first is None else {"Range": f"bytes=0-{first - 1}"}

    async def get() -> tuple[bytes, str | None]:
        for pause in PAUSES_SECONDS:
            answer = await store._call_s3("get_object", Bucket=bucket, Key=name, **part)
            async with answer["Body"] as body:
                if fault := judge(int(answer["ContentLength"]), _stamp(answer)):
                    return b"", fault
                try:
                    return await body.read(), None
                except Exception:  # the client repeats requests, not answers that broke off
                    if pause is None:
                        raise
            await asyncio.sleep(pause)
        raise AssertionError

    return sync(store.loop, get)


def beginnings(uri: str, keys: Sequence[str], count: int) -> list[bytes | None]:
    """The first `count` bytes of these objects, which must not be empty; None where there are none
    to be had.
    """
    from concurrent.futures import ThreadPoolExecutor

    store, top = _store(uri)

    def begin(key: str) -> bytes | None:
        try:
            if hasattr(store, "call_s3"):
                return bytes(_s3_read(store, f"{top}/{key}", lambda size, stamp: None, count)[0])
            return bytes(store.cat_file(f"{top}/{key}", start=0, end=count))
        except Exception:  # stores raise what they like
            return None

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(begin, keys))


def fetch(uri: str, key: str, target: Path) -> None:
    """Copy an object to the disk. Raises what the store raises."""
    store, top = _store(uri)
    store.get_file(f"{top}/{key}", os.fspath(target))


def words(error: Exception) -> str:
    """What a library says, on one line; not the query of an address, which may be a signature."""
    said = re.sub(r"\?[^\s\"']+", "", str(error).strip() or type(error).__name__)
    line = " ".join(said.split())[:200].rstrip(".")
    return "".join(char if char.isprintable() else "?" for char in line)


def _store(uri: str) -> tuple[Any, str]:
    """The fsspec file system of a URI and where the root is in it."""
    scheme = uri.partition(":")[0]
    # A changed environment (another profile, another endpoint) makes another connection.
    names = sorted(name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "STORAGE_")))
    store = _connected(scheme, os.getpid(), tuple((name, os.environ[name]) for name in names))
    return store, store._strip_protocol(uri)


@lru_cache(maxsize=8)
def _connected(scheme: str, pid: int, environment: tuple[tuple[str, str], ...]) -> Any:
    """The fsspec file system of a scheme; its credentials are those of the environment."""
    settings: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if EXTRAS.get(scheme) == "s3":
        # A store that is not there is refused within half a minute.
        retries = {"mode": "standard", "total_max_attempts": 4}
        times = {"connect_timeout": 5, "read_timeout": 30}
        settings["config_kwargs"] = {"retries": retries, "max_pool_connections": 64, **times}
    elif EXTRAS.get(scheme) == "gcs":
        settings["requests_timeout"] = 30
    try:
        import fsspec

        store = fsspec.filesystem(scheme, **settings)
    except ImportError as error:
        extra = EXTRAS.get(scheme)
        raise ConfigError(
            f"{scheme}:// cannot be opened: {words(error)}.",
            "the library that reads such a store.",
            f"pip install 'arrowhead[{extra}]'." if extra else "install it beside Arrowhead.",
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"{scheme}:// cannot be opened: {words(error)}.",
            "a folder, or an address that fsspec opens, such as s3://bucket/prefix.",
            "check the spelling.",
        ) from error
    if EXTRAS.get(scheme) == "s3":
        store.retries = 1  # botocore's own are enough: the two would multiply
    return store


def _is_google(store: Any) -> bool:
    return "gs" in ((store.protocol,) if isinstance(store.protocol, str) else store.protocol)


def _size(store: Any, info: Mapping[str, Any]) -> int:
    size = info.get("size")
    return int(store.size(info["name"]) if size is None else size)


def _stamp(info: Mapping[str, Any]) -> int:
    """63 bits that change with an object, from what the store says of it."""
    import hashlib
    from datetime import datetime

    keys = ("generation", "ETag", "etag", "LastModified", "last_modified", "updated", "mtime")
    mark = next((info[key] for key in (*keys, "created") if info.get(key)), "")
    if isinstance(mark, datetime):  # some stores give it so, or as a number
        mark = mark.timestamp()
    return int.from_bytes(hashlib.blake2b(str(mark).encode(), digest_size=8).digest(), "big") >> 1
