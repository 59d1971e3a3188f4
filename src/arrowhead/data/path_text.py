"""Names of files as text: safe on a screen, and leading back to their bytes."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from arrowhead.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://([^/]*)(.*)", re.DOTALL)
# Addresses of pages and services, not of stores that list their objects.
WEB = ("http", "https", "ftp", "ftps", "hdfs", "webhdfs")
_ESCAPED = re.compile(r"\\(?:\\|x[0-9a-f]{2})")


def escape_path(unescape_path: bytes) -> str:
    r"""A file name as text that is valid UTF-8, safe on a screen, and leads back to the name.

    Bytes that are not UTF-8, control characters and the backslash become \xNN or \\.
    """
    name = unescape_path.decode("utf-8", "surrogateescape")
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


def unescape_path(path: str) -> bytes:
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
        return escape_path(os.path.realpath(os.fsencode(given)))
    scheme, host, path = uri.groups()
    if scheme.lower() == "file":
        from urllib.parse import unquote_to_bytes

        return escape_path(os.path.realpath(unquote_to_bytes(path or "/")))
    if scheme.lower() in WEB:
        raise _not_a_store(scheme.lower(), host)
    if "@" in host:
        raise ConfigError(
            f"the {scheme}:// address holds a name or a password.",
            "an address without them: it is written to catalogs and to the screen.",
            "leave them out; put credentials into the environment (AWS_*, GOOGLE_*).",
        )
    return escape_path(os.fsencode(f"{scheme.lower()}://{host}{path.rstrip('/')}"))


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


def uri(root: str) -> str:
    """The text of a root as the store knows it."""
    return unescape_path(root).decode("utf-8", "surrogateescape")


def encoded(key: str) -> bytes:
    """The bytes of an object's key."""
    return key.encode("utf-8", "surrogateescape")
