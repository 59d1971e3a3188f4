"""Addresses of stores, bundles and scores, and the local folders that mirror them.

    s3://bucket/pets/store   <->   CACHE/arrowhead-mirrors/1f0c9a3e/s3/bucket/pets/store

Everything that works on a folder works on its mirror; `data.remote_folder` carries files to and
fro. The path of a mirror says which address it stands for, in any process and on any machine; the
eight digits are a hash of the endpoint, so that buckets of the same name are kept apart.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from arrowhead.errors import ConfigError

CACHE_VARIABLE = "ARROWHEAD_CACHE_DIR"
FOLDER = "arrowhead-mirrors"
SCHEMES = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az"}
# What tells one endpoint from another.
ENDPOINT_VARIABLES = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "STORAGE_EMULATOR_HOST",
    "AZURE_STORAGE_ACCOUNT_NAME",
    "AZURE_STORAGE_CONNECTION_STRING",
)
# `Path` turns s3://bucket into s3:/bucket.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/{1,3}(.*)", re.DOTALL)
_MIRROR = re.compile(rf"(.*)/{FOLDER}/[0-9a-f]{{8}}/(s3|gs|az)(?:/(.*))?", re.DOTALL)
# Of any machine: at the start of a word, so that links (file:///…) stay: a browser can open them.
_MIRROR_IN_TEXT = re.compile(
    rf"(?<![^\s'\"(=\[,])/(?:[^\s'\"]*?/)?{FOLDER}/[0-9a-f]{{8}}/(s3|gs|az)/"
)


def cache_folder() -> Path:
    """The user's cache; raises RuntimeError without a home directory."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "arrowhead"


def root() -> Path:
    """The folder of all mirrors of this user and endpoint, without symbolic links."""
    try:
        cache = cache_folder()
    except RuntimeError as error:
        raise ConfigError(
            "There is no home directory, and no cache for the files of an address.",
            f"a folder for them in {CACHE_VARIABLE}.",
            f"set {CACHE_VARIABLE} to a folder on a disk of this machine.",
        ) from error
    endpoint = repr([os.environ.get(name, "") for name in ENDPOINT_VARIABLES])
    digest = hashlib.blake2b(endpoint.encode("utf-8", "surrogateescape"), digest_size=4)
    return Path(os.path.realpath(cache)) / FOLDER / digest.hexdigest()


def is_address(path: str | Path) -> bool:
    """Whether a user's text or path is an address rather than a path on a disk."""
    match = _ADDRESS.fullmatch(str(path))
    return match is not None and not os.path.lexists(f"{match[1]}:")


def mirror_of(address: str | Path) -> Path:
    """The folder for an address; a path on a disk (and what file:// names) as it is.

    Raises:
        ConfigError: Results cannot be written there, or the address holds a password, no bucket or
            a part such as `..`.
    """
    text = str(address)
    match = _ADDRESS.fullmatch(text)
    if match is None or not is_address(text):
        return Path(text)
    scheme, rest = match[1].lower(), match[2]
    if scheme == "file":
        from urllib.parse import unquote

        return Path("/" + unquote(rest).lstrip("/"))
    shown = f"{scheme}://{rest.rpartition('@')[2]}"
    if scheme not in SCHEMES:
        raise ConfigError(
            f"{shown} is an address to which Arrowhead does not write.",
            "a path on a disk, or an address with s3://, gs://, az:// or file://.",
            "give a path on a disk, and copy the result to the address afterwards.",
        )
    bucket, *keys = rest.rstrip("/").split("/")
    if "@" in bucket:
        raise ConfigError(
            f"the {scheme}:// address holds a name or a password.",
            "an address without them: it is shown and recorded.",
            "remove them; put credentials into the environment (AWS_*, GOOGLE_*).",
        )
    if not bucket or not keys:
        raise ConfigError(
            f"{shown} names {'a whole bucket' if bucket else 'no bucket'}.",
            "a bucket, and a folder (a prefix of keys) in it.",
            f"write e.g. {scheme}://{bucket or 'BUCKET'}/pets.",
        )
    if any(key in ("", ".", "..") or not key.isprintable() or len(key) > 200 for key in keys):
        raise ConfigError(
            f"{shown} has a part that cannot be the name of a folder.",
            "names of up to 200 printable characters between slashes; not . or ..",
            "give another address.",
        )
    return root().joinpath(SCHEMES[scheme], bucket, *keys)


def uri_of(path: Path) -> str | None:
    """The address that a path in a mirror stands for; None for any other path."""
    match = _MIRROR.fullmatch(os.fspath(path))
    return f"{match[2]}://{match[3]}" if match and match[3] else None


def here(path: Path) -> Path:
    """A path in a mirror of another machine as the path in this machine's mirror."""
    uri = uri_of(path)
    return path if uri is None else mirror_of(uri)


def beside(path: Path, name: str) -> Path:
    """Where something about a path in a mirror is kept: at its place in a folder beside them."""
    top, _, rest = str(path).rpartition(f"/{FOLDER}/")
    endpoint, _, below = rest.partition("/")
    return Path(top, FOLDER, endpoint, name, below)


def show(text: str) -> str:
    """A text for people, with addresses in the place of paths in their mirrors."""
    if FOLDER not in text:
        return text
    ours = re.escape(str(root().parent))
    text = re.sub(rf"(?<!file://){ours}/[0-9a-f]{{8}}/(s3|gs|az)/", r"\1://", text)
    return _MIRROR_IN_TEXT.sub(r"\1://", text)
