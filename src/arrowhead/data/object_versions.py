"""Versions of objects: list, download, upload on a condition; one attempt each.

`data.object_writes` adds retries and refusals. Errors are the store's own; `kind_of` tells what
they mean. S3 is called by its own operations, since fsspec's interface has no If-Match; so is
Google, for ifGenerationMatch.
"""

from __future__ import annotations

import base64
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from arrowhead.data import object_store

ABSENT = ""
PART_BYTES = 64 * 2**20
FATAL_CODES = {"NoSuchBucket": "bucket", "404": "missing", "NoSuchKey": "missing"}
DENIED_CODES = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "403", "Forbidden")


class PreconditionError(Exception):
    """The object is not the version that was to be replaced."""


class IncompleteError(Exception):
    """The store, or the file here, holds other bytes than were sent."""


def kind_of(error: BaseException) -> str:
    """What an error means: bucket, credentials, denied, missing (these stay), or passing."""
    chain: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in chain:
        chain.append(one)
        one = one.__cause__ or one.__context__
    for one in chain:
        code = _error_code(one)
        if code in FATAL_CODES:
            return FATAL_CODES[code]
        if code in DENIED_CODES:
            return "denied"
        if type(one).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
            return "credentials"
    if isinstance(error, FileNotFoundError):
        return "bucket" if "bucket" in str(error).lower() else "missing"
    if isinstance(error, PermissionError) or str(error).startswith("Forbidden: "):  # of gcsfs
        return "denied"
    return "passing"


def _error_code(error: BaseException) -> str:
    """The code of an answer of S3, such as NoSuchBucket; "" for another exception."""
    response = getattr(error, "response", None)
    if not isinstance(response, dict):
        return ""
    return str(response.get("Error", {}).get("Code", ""))


# --------------------------------------------------------------------------------- reading


def list_versions(uri: str, *, recursive: bool) -> dict[str, tuple[int, str]]:
    """Size and etag by key of the objects below a URI.

    recursive: also of those below a further slash; else of these only their folder, as "shards/".
    """
    store, top = object_store.open_store(uri)
    if hasattr(store, "call_s3"):
        return _list_s3(store, top, recursive)
    try:
        found = store.find(top, detail=True) if recursive else _entries(store, top)
    except FileNotFoundError:
        return {}
    return {
        name[len(top) + 1 :] + "/" * (info.get("type") != "file"): (
            int(info.get("size") or 0),
            _etag(info),
        )
        for name, info in found.items()
        if name.startswith(f"{top}/")
    }


def _entries(store: Any, top: str) -> dict[str, dict[str, Any]]:
    return {info["name"].rstrip("/"): info for info in store.ls(top, detail=True)}


def _list_s3(store: Any, top: str, recursive: bool) -> dict[str, tuple[int, str]]:
    bucket, _, prefix = top.partition("/")
    request = {"Bucket": bucket, "Prefix": f"{prefix}/", "Delimiter": "" if recursive else "/"}
    objects: dict[str, tuple[int, str]] = {}
    more = True
    while more:
        page = store.call_s3("list_objects_v2", **request)
        for each in page.get("CommonPrefixes", ()):
            objects[each["Prefix"][len(prefix) + 1 :]] = 0, ""
        for each in page.get("Contents", ()):
            objects[each["Key"][len(prefix) + 1 :]] = int(each["Size"]), each["ETag"].strip('"')
        if more := page.get("IsTruncated", False):
            request["ContinuationToken"] = page["NextContinuationToken"]
    return objects


def version(uri: str, key: str) -> str:
    """The etag of an object. Raises FileNotFoundError."""
    store, top = object_store.open_store(uri)
    return _version(store, f"{top}/{key}")


def _version(store: Any, name: str) -> str:
    if hasattr(store, "call_s3"):
        return _head_s3(store, name)["ETag"].strip('"')  # type: ignore[no-any-return]
    return _etag(store.info(name))


def _head_s3(store: Any, name: str) -> dict[str, Any]:
    bucket, _, key = name.partition("/")
    answer: dict[str, Any] = store.call_s3("head_object", Bucket=bucket, Key=key)
    return answer


def _etag(info: dict[str, Any]) -> str:
    keys = ("generation", "ETag", "etag", "LastModified", "last_modified", "updated", "mtime")
    return str(next((info[key] for key in keys if info.get(key)), "?")).strip('"')


def age_seconds(uri: str, key: str) -> float:
    """How long ago an object was written: on S3 by the clock of the store."""
    store, top = object_store.open_store(uri)
    if hasattr(store, "call_s3"):
        answer = _head_s3(store, f"{top}/{key}")
        date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        now = parsedate_to_datetime(date) if date else datetime.now(UTC)
        return float((now - answer["LastModified"]).total_seconds())
    return max(0.0, time.time() - float(store.modified(f"{top}/{key}").timestamp()))


def download_version(uri: str, key: str, target: Path) -> str:
    """Download an object; the etag of the version that was downloaded."""
    store, top = object_store.open_store(uri)
    name = f"{top}/{key}"
    if not hasattr(store, "call_s3"):
        info = store.info(name)
        store.get_file(name, str(target))
        if target.stat().st_size != int(info["size"]) or _version(store, name) != _etag(info):
            raise IncompleteError(f"{name} changed while it was downloaded")
        return _etag(info)
    bucket, _, path = name.partition("/")

    async def get() -> str:
        answer = await store._call_s3("get_object", Bucket=bucket, Key=path)
        size = 0
        async with answer["Body"] as body:
            with target.open("wb") as file:
                while data := await body.read(2**20):
                    size += file.write(data)
        if size != int(answer["ContentLength"]):
            raise IncompleteError(f"{size} of {answer['ContentLength']} bytes came")
        return str(answer["ETag"]).strip('"')

    etag: str = object_store.run(store, get)
    return etag


# --------------------------------------------------------------------------------- writing


def upload(uri: str, key: str, file: Path, md5: str, replaces: str | None) -> str:
    """Upload a file; the etag of the new version.

    Args:
        uri: The root.
        key: Of the object, below it.
        file: The file.
        md5: Its MD5, base64.
        replaces: The etag of the version to replace, ABSENT for none; None for any.

    Raises:
        PreconditionError: Another version is there.
        IncompleteError: What the store received is not the file.
    """
    store, top = object_store.open_store(uri)
    name = f"{top}/{key}"
    if hasattr(store, "call_s3"):
        return _upload_s3(store, name, file, md5, replaces)
    if object_store.is_google(store):
        return _upload_google(store, name, file, md5, replaces)
    if replaces and (not store.exists(name) or _version(store, name) != replaces):
        raise PreconditionError(name)
    try:
        store.pipe_file(
            name, file.read_bytes(), mode="create" if replaces == ABSENT else "overwrite"
        )
    except FileExistsError as error:
        raise PreconditionError(name) from error
    info = store.info(name)
    if int(info["size"]) != file.stat().st_size:
        raise IncompleteError(f"{name} has {info['size']} bytes, not {file.stat().st_size}")
    return _etag(info)


def _upload_s3(store: Any, name: str, file: Path, md5: str, replaces: str | None) -> str:
    bucket, _, key = name.partition("/")
    place = {"Bucket": bucket, "Key": key}
    condition = {} if replaces is None else {"IfMatch": f'"{replaces}"'}
    if replaces == ABSENT:
        condition = {"IfNoneMatch": "*"}
    try:
        if file.stat().st_size > PART_BYTES:
            return _upload_parts(store, place, file, condition)
        answer = store.call_s3(
            "put_object", Body=file.read_bytes(), ContentMD5=md5, **place, **condition
        )
    except Exception as error:
        if _condition_failed(error, replaces):
            raise PreconditionError(name) from error
        raise
    etag = str(answer["ETag"]).strip('"')
    # An encrypted object may have another ETag than its MD5: then the size is compared.
    if etag != base64.b64decode(md5).hex():
        size = int(_head_s3(store, name)["ContentLength"])
        if size != file.stat().st_size:
            raise IncompleteError(f"{name} has {size} bytes, not {file.stat().st_size}")
    return etag


def _condition_failed(error: BaseException, replaces: str | None) -> bool:
    code = _error_code(error) or _error_code(error.__cause__ or error)
    if code in ("PreconditionFailed", "412"):
        return True
    return bool(replaces) and code in ("NoSuchKey", "404")  # If-Match where nothing is


def _upload_parts(store: Any, place: dict[str, str], file: Path, condition: dict[str, str]) -> str:
    """Upload a large file in parts, which become an object when all are there."""
    upload_id = store.call_s3("create_multipart_upload", **place)["UploadId"]
    try:
        parts = []
        with file.open("rb") as opened:
            for number, data in enumerate(iter(lambda: opened.read(PART_BYTES), b""), 1):
                answer = store.call_s3(
                    "upload_part", **place, UploadId=upload_id, PartNumber=number, Body=data
                )
                parts.append({"PartNumber": number, "ETag": answer["ETag"]})
        answer = store.call_s3(
            "complete_multipart_upload",
            **place,
            **condition,
            UploadId=upload_id,
            MultipartUpload={"Parts": parts},
        )
    except BaseException:
        store.call_s3("abort_multipart_upload", **place, UploadId=upload_id)
        raise
    size = int(_head_s3(store, f"{place['Bucket']}/{place['Key']}")["ContentLength"])
    if size != file.stat().st_size:
        raise IncompleteError(f"{place['Key']} has {size} bytes, not {file.stat().st_size}")
    return str(answer["ETag"]).strip('"')


def _upload_google(store: Any, name: str, file: Path, md5: str, replaces: str | None) -> str:
    bucket, _, key = name.partition("/")
    condition = {} if replaces is None else {"ifGenerationMatch": replaces or "0"}
    try:
        answer = store.call(
            "POST",
            f"{store._location}/upload/storage/v1/b/{quote(bucket)}/o",
            uploadType="media",
            name=key,
            data=file.read_bytes(),
            headers={"Content-Type": "application/octet-stream"},
            json_out=True,
            **condition,
        )
    except Exception as error:
        if isinstance(error, FileExistsError) or getattr(error, "code", None) in (412, "412"):
            raise PreconditionError(name) from error
        raise
    if answer.get("md5Hash") not in (None, md5):
        raise IncompleteError(f"{name} has another MD5 than the file")
    return str(answer["generation"])


def holds(uri: str, key: str, size: int, md5: str) -> bool:
    """Whether an object has this size and MD5 (base64): our own write, whose answer was lost."""
    store, top = object_store.open_store(uri)
    name = f"{top}/{key}"
    try:
        if hasattr(store, "call_s3"):
            answer = _head_s3(store, name)
            etag = str(answer["ETag"]).strip('"')
            return int(answer["ContentLength"]) == size and etag == base64.b64decode(md5).hex()
        info = store.info(name)
    except FileNotFoundError:
        return False
    return int(info["size"]) == size and md5 in (info.get("md5Hash"), info.get("content_md5"))


def remove(uri: str, key: str) -> None:
    """Delete an object."""
    store, top = object_store.open_store(uri)
    bucket, _, name = f"{top}/{key}".partition("/")
    if hasattr(store, "call_s3"):
        store.call_s3("delete_object", Bucket=bucket, Key=name)
    else:
        store.rm_file(f"{top}/{key}")


def copy(uri: str, key: str, target: str) -> None:
    """Copy an object within its store."""
    store, top = object_store.open_store(uri)
    store.copy(f"{top}/{key}", f"{top}/{target}")
