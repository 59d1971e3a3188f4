"""Writes to S3, Google Cloud Storage and Azure: whole objects, conditional, checked, retried.

    write(uri, key, file, replaces=ETAG)    a new version, only if the object is the one of ETAG
    write(uri, key, file, replaces=ABSENT)  a new object, only if there is none
    write(uri, key, file)                   a new version, whatever is there

An object is the old one or the new one: a PUT that breaks off, and parts of an upload that is not
completed, are never visible. What the store received is compared with the file's MD5 or size. An
*etag* is the ETag of S3 and Azure, and the generation of Google. fsspec has no condition but "there
is none", and S3's errors through it do not say which condition failed.

S3 and Google check conditions themselves. Azure's library gives fsspec only "there is none"; a
version to replace is then compared just before the write.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from arrowhead.data import object_store, object_versions
from arrowhead.errors import ConfigError

ABSENT = ""  # the etag of an object that does not exist
# The libraries make several attempts each time. A store that never answered is given up sooner.
RETRY_DELAYS_SECONDS = (1.0, 2.0, 4.0, 8.0, 15.0)
FIRST_RETRY_DELAYS_SECONDS = (1.0,)
T = TypeVar("T")


class ConditionFailedError(Exception):
    """The object is not the version that was to be replaced; nothing was written."""


# --------------------------------------------------------------------------------- reading


def list_folder(
    uri: str, *, recursive: bool = False, first: bool = False
) -> dict[str, tuple[int, str]]:
    """Size and etag of the objects below a URI, by key; {} if there are none.

    Args:
        uri: The root.
        recursive: Also of those below a further slash; else of these only their folder, "shards/".
        first: Whether this is the first request of a command: then errors are shown soon.
    """
    return _retry(uri, lambda: object_versions.list_versions(uri, recursive=recursive), first=first)


def read(uri: str, key: str, target: Path) -> str:
    """Download an object to a file, and compare the size; the etag of this version.

    Raises:
        FileNotFoundError: There is no such object.
        ConfigError: It cannot be read.
    """
    return _retry(
        f"{uri}/{key}", lambda: object_versions.download_version(uri, key, target), missing=True
    )


def etag(uri: str, key: str) -> str:
    """The etag of an object; ABSENT if there is none."""
    try:
        return _retry(f"{uri}/{key}", lambda: object_versions.version(uri, key), missing=True)
    except FileNotFoundError:
        return ABSENT


def age_seconds(uri: str, key: str) -> float:
    """How long ago an object was written, by the clock of the store where that can be had."""
    return _retry(f"{uri}/{key}", lambda: object_versions.age_seconds(uri, key), missing=True)


# --------------------------------------------------------------------------------- writing


def write(uri: str, key: str, file: Path, replaces: str | None = None) -> str:
    """Upload a file as an object; the etag of the new version.

    Args:
        uri: The root.
        key: Of the object, below it.
        file: The file.
        replaces: The etag of the version that is replaced, ABSENT for none; None for any.

    Raises:
        ConditionFailedError: Another version, or none, is there; nothing was written.
        ConfigError: It cannot be written.
    """
    digest = _md5(file)

    def upload() -> str:
        try:
            return object_versions.upload(uri, key, file, digest, replaces)
        except object_versions.PreconditionError as error:
            # After an answer that was lost: it is our own write that is there.
            if object_versions.holds(uri, key, file.stat().st_size, digest):
                return object_versions.version(uri, key)
            raise ConditionFailedError(f"{uri}/{key}") from error

    return _retry(f"{uri}/{key}", upload)


def delete(uri: str, key: str) -> None:
    """Delete an object; one that does not exist is no error."""
    try:
        _retry(f"{uri}/{key}", lambda: object_versions.remove(uri, key), missing=True)
    except FileNotFoundError:
        return


def copy(uri: str, key: str, target: str) -> None:
    """Copy an object within its store, whatever is at the target."""
    _retry(f"{uri}/{key}", lambda: object_versions.copy(uri, key, target))


def md5_etag(file: Path) -> str:
    """The etag that a file has in S3, where it is not encrypted by a key or written in parts."""
    return base64.b64decode(_md5(file)).hex()


def _md5(file: Path) -> str:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, lambda: hashlib.md5(usedforsecurity=False))
    return base64.b64encode(digest.digest()).decode()


# ---------------------------------------------------------------------------------- errors


def _retry(uri: str, action: Callable[[], T], *, missing: bool = False, first: bool = False) -> T:
    """What an action gives; it is tried again after errors that may pass.

    Args:
        uri: What is read or written, for a refusal.
        action: What to try.
        missing: Raise FileNotFoundError for an object that does not exist; else ConfigError.
        first: Give up soon.
    """
    delays = FIRST_RETRY_DELAYS_SECONDS if first else RETRY_DELAYS_SECONDS
    for pause in (*delays, None):
        try:
            return action()
        except (ConfigError, ConditionFailedError):
            raise
        except Exception as error:  # each store raises its own exceptions
            kind = object_versions.kind_of(error)
            if kind == "missing" and missing:
                raise FileNotFoundError(uri) from error
            if kind != "passing" or pause is None:
                raise _error(uri, kind, error) from error
        time.sleep(pause)
    raise AssertionError


CAUSES = {
    "bucket": ("there is no such bucket", "create the bucket, or check its name"),
    "credentials": (
        "there are no credentials for it",
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or log in"
        " (`aws configure`, `gcloud auth application-default login`, `az login`)",
    ),
    "denied": (
        "access is denied",
        "give these credentials the right to list, read, write and delete objects there, or use"
        " others",
    ),
    "missing": ("there is no such object", "check the address"),
}


def _error(uri: str, kind: str, error: Exception) -> ConfigError:
    summary = object_store.error_summary(error)
    cause, do = CAUSES.get(
        kind,
        (
            "the store does not answer as it should",
            "check the network and, for your own store, AWS_ENDPOINT_URL; then run the same command"
            " again: it continues where it stopped",
        ),
    )
    return ConfigError(
        f"{uri} cannot be used: {cause} ({summary}).",
        "an address that exists, and credentials that may list, read and write there.",
        f"{do}.",
    )
