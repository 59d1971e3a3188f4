"""List and read objects in S3, Google Cloud Storage, and any other store that fsspec opens.

A *stamp* is 63 bits of a hash of a value that changes with every write: the generation (Google),
the ETag (S3), or the time of the last write. URIs and keys are text as the store spells them.

fsspec alone neither detects that an object changed since it was listed, nor lists large S3 prefixes
in parallel.
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

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure"}
MAX_THREADS = 16
RETRY_DELAYS_SECONDS = (0.5, 2.0, None)  # None: no further attempt
# Key below the root, size in bytes, stamp.
StoredObject = tuple[str, int, int]
# Gets the current size and stamp of an object; returns a fault if it should not be read.
ObjectCheck = Callable[[int, int], str | None]


def list_objects(uri: str) -> list[StoredObject]:
    """List every object below a URI.

    Raises the store's own exceptions; ConfigError if its library is not installed.
    """
    store, top = open_store(uri)
    if not hasattr(store, "call_s3"):
        return [
            (name[len(top) + 1 :], _size(store, info), _stamp(info))
            for name, info in store.find(top, detail=True).items()
            if info.get("type") == "file" and name.startswith(f"{top}/")
        ]
    bucket, _, prefix = top.partition("/")
    return _list_s3_objects(store, bucket, prefix and f"{prefix}/")


def _list_s3_objects(store: Any, bucket: str, prefix: str) -> list[StoredObject]:
    """List every object below a prefix, page by page, several prefixes in parallel.

    `find` of s3fs keeps all pages in memory and fails on keys such as a//b.
    """

    def page_through(below: str, delimiter: str) -> tuple[list[StoredObject], list[str]]:
        objects: list[StoredObject] = []
        prefixes: list[str] = []
        request = {"Bucket": bucket, "Prefix": below, "Delimiter": delimiter}
        more = True
        while more:
            page = store.call_s3("list_objects_v2", **request)
            prefixes += [each["Prefix"] for each in page.get("CommonPrefixes", ())]
            objects += [
                (each["Key"][len(prefix) :], int(each["Size"]), _stamp(each))
                for each in page.get("Contents", ())
            ]
            if more := page.get("IsTruncated", False):
                request["ContinuationToken"] = page["NextContinuationToken"]
        return objects, prefixes

    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(MAX_THREADS) as pool:
        all_objects: list[StoredObject] = []
        prefixes = [prefix]
        for _ in range(3):  # ROOT, train/, train/cat/: enough prefixes for all threads
            if not 0 < len(prefixes) < 2 * MAX_THREADS:
                break
            pages = list(pool.map(page_through, prefixes, repeat("/")))
            below = [each for _, inner in pages for each in inner]
            if len(below) > 1000:  # one request each would take longer than listing them together
                break
            all_objects += [each for objects, _ in pages for each in objects]
            prefixes = below
        for objects, _ in pool.map(page_through, prefixes, repeat("")):
            all_objects += objects
    return all_objects


def read_object(
    uri: str, key: str, check: ObjectCheck, part: tuple[int, int] | None = None
) -> tuple[bytes, str | None]:
    """The bytes of an object and None, or no bytes and the fault that `check` returns.

    Interrupted downloads are retried. Raises the store's own exceptions.

    Args:
        uri: The root.
        key: Of the object, below it.
        check: Called with the size and the stamp of the whole object.
        part: Only the bytes from the first number up to the second, which must be in the object;
            fewer bytes come if it ends before.
    """
    store, top = open_store(uri)
    if hasattr(store, "call_s3"):
        result: tuple[bytes, str | None] = _read_s3_object(store, f"{top}/{key}", check, part)
        return result
    # gcsfs retries requests and downloads itself, for a minute: our retries would multiply them.
    for pause in RETRY_DELAYS_SECONDS if not is_google(store) else (None,):
        try:
            return _read_fsspec_object(store, f"{top}/{key}", check, part)
        except (FileNotFoundError, PermissionError):
            raise
        except Exception:  # each store raises its own exceptions
            if pause is None:
                raise
            import time

            time.sleep(pause)
    raise AssertionError


def stat_object(uri: str, key: str) -> tuple[int, int]:
    """Size and stamp of an object. Raises the store's own exceptions."""
    store, top = open_store(uri)
    name = f"{top}/{key}"
    info = store.info(name)
    if info.get("type") != "file":
        raise FileNotFoundError(name)
    return _size(store, info), _stamp(info)


def _read_fsspec_object(
    store: Any, name: str, check: ObjectCheck, part: tuple[int, int] | None
) -> tuple[bytes, str | None]:
    """As `read_object`, without retries, with the interface that every fsspec store has."""
    bounds = {} if part is None else {"start": part[0], "end": part[1]}
    info = store.info(name)
    size, stamp = _size(store, info), _stamp(info)
    if is_google(store):  # reads this generation even if the object is overwritten meanwhile
        if fault := check(size, stamp):
            return b"", fault
        pinned: bytes = store.cat_file(name, generation=info["generation"], **bounds)
        return pinned, None
    if check(size, stamp):  # some stores give another time here than in a listing, which counts
        info = _info_from_listing(store, name) or info
        if fault := check(_size(store, info), _stamp(info)):
            return b"", fault
    data: bytes = store.cat_file(name, **bounds)
    after = store.info(name)
    expected = size if part is None else min(part[1], size) - part[0]
    if len(data) != expected or (_size(store, after), _stamp(after)) != (size, stamp):
        return b"", "changed: it was written to while it was read"
    return data, None


def _info_from_listing(store: Any, name: str) -> Mapping[str, Any] | None:
    """The entry of an object in the listing of its folder."""
    folder = name.rpartition("/")[0]
    return next((info for info in store.ls(folder, detail=True) if info["name"] == name), None)


def _read_s3_object(
    store: Any, path: str, check: ObjectCheck, span: tuple[int, int] | None = None
) -> Any:
    """As `read_object`, from S3."""
    import asyncio

    from fsspec.asyn import sync

    bucket, _, name = path.partition("/")
    part = {} if span is None else {"Range": f"bytes={span[0]}-{span[1] - 1}"}

    async def get() -> tuple[bytes, str | None]:
        for pause in RETRY_DELAYS_SECONDS:
            answer = await store._call_s3("get_object", Bucket=bucket, Key=name, **part)
            async with answer["Body"] as body:
                whole = answer.get("ContentRange", "").rpartition("/")[2] or answer["ContentLength"]
                if fault := check(int(whole), _stamp(answer)):
                    return b"", fault
                try:
                    return await body.read(), None
                except Exception:  # the client retries requests, not interrupted downloads
                    if pause is None:
                        raise
            await asyncio.sleep(pause)
        raise AssertionError

    return sync(store.loop, get)


def read_first_bytes(uri: str, keys: Sequence[str], count: int) -> list[bytes | None]:
    """The first `count` bytes of each object, None if it cannot be read. Objects must not be empty:
    stores refuse a range of them.
    """
    from concurrent.futures import ThreadPoolExecutor

    store, top = open_store(uri)

    def read_start(key: str) -> bytes | None:
        try:
            if hasattr(store, "call_s3"):
                return bytes(
                    _read_s3_object(store, f"{top}/{key}", lambda size, stamp: None, (0, count))[0]
                )
            return bytes(store.cat_file(f"{top}/{key}", start=0, end=count))
        except Exception:  # each store raises its own exceptions
            return None

    with ThreadPoolExecutor(MAX_THREADS) as pool:
        return list(pool.map(read_start, keys))


def download(uri: str, key: str, target: Path) -> None:
    """Copy an object to the disk. Raises the store's own exceptions."""
    store, top = open_store(uri)
    store.get_file(f"{top}/{key}", os.fspath(target))


def run(store: Any, function: Callable[[], Any]) -> Any:
    """Run a coroutine function of an asynchronous store to its end."""
    from fsspec.asyn import sync

    return sync(store.loop, function)


def error_summary(error: Exception) -> str:
    """The message of an exception on one line, without URL queries, which may hold signatures."""
    message = re.sub(r"\?[^\s\"']+", "", str(error).strip() or type(error).__name__)
    line = " ".join(message.split())[:200].rstrip(".")
    return "".join(char if char.isprintable() else "?" for char in line)


def open_store(uri: str) -> tuple[Any, str]:
    """The fsspec file system of a URI, and the path of the root in it."""
    scheme = uri.partition(":")[0]
    # A changed environment (another profile or endpoint) needs another connection.
    names = sorted(name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "STORAGE_")))
    store = _connect(scheme, os.getpid(), tuple((name, os.environ[name]) for name in names))
    return store, store._strip_protocol(uri)


@lru_cache(maxsize=8)
def _connect(scheme: str, pid: int, environment: tuple[tuple[str, str], ...]) -> Any:
    """Create the fsspec file system of a scheme, with the credentials of the environment."""
    settings: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if EXTRAS.get(scheme) == "s3":
        # Refuse an unreachable store within half a minute.
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
            f"{scheme}:// cannot be opened: {error_summary(error)}.",
            "the library that reads such a store.",
            f"pip install 'arrowhead[{extra}]'." if extra else "install it beside Arrowhead.",
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"{scheme}:// cannot be opened: {error_summary(error)}.",
            "a folder, or an address that fsspec opens, such as s3://bucket/prefix.",
            "check the spelling.",
        ) from error
    if EXTRAS.get(scheme) == "s3":
        store.retries = 1  # botocore retries itself: retries of s3fs would multiply them
    return store


def is_google(store: Any) -> bool:
    """Whether a store is Google Cloud Storage."""
    return "gs" in ((store.protocol,) if isinstance(store.protocol, str) else store.protocol)


def _size(store: Any, info: Mapping[str, Any]) -> int:
    size = info.get("size")
    return int(store.size(info["name"]) if size is None else size)


def _stamp(info: Mapping[str, Any]) -> int:
    """The stamp of an object, from its metadata."""
    import hashlib
    from datetime import datetime

    keys = ("generation", "ETag", "etag", "LastModified", "last_modified", "updated", "mtime")
    mark = next((info[key] for key in (*keys, "created") if info.get(key)), "")
    if isinstance(mark, datetime):  # some stores give a datetime, others a number
        mark = mark.timestamp()
    return int.from_bytes(hashlib.blake2b(str(mark).encode(), digest_size=8).digest(), "big") >> 1
