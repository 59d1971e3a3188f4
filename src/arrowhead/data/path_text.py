"""File names as escaped text, safe to print and reversible, and roots given by the user.

`os.fsdecode` is reversible too, but its text is not valid UTF-8 and may hold control characters.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from arrowhead.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://([^/]*)(.*)", re.DOTALL)
# Addresses of pages and services that cannot list objects, or that are not supported.
WEB_SCHEMES = ("http", "https", "ftp", "ftps", "hdfs", "webhdfs")
_ESCAPED = re.compile(r"\\(?:\\|x[0-9a-f]{2})")


def escape_path(name: bytes) -> str:
    r"""Escape a file name as valid UTF-8 text that is safe to print; `unescape_path` reverses it.

    Bytes that are not UTF-8 and control characters become \xNN, and a backslash becomes \\.
    """
    decoded = name.decode("utf-8", "surrogateescape")
    if decoded.isprintable() and "\\" not in decoded:
        return decoded
    out = []
    for char in decoded:
        if char == "\\":
            out.append("\\\\")
        elif "\udc80" <= char <= "\udcff":
            out.append(f"\\x{ord(char) - 0xDC00:02x}")
        elif char.isprintable():
            out.append(char)
        else:  # control characters, line separators, marks that change the direction of text
            out.extend(f"\\x{byte:02x}" for byte in char.encode())
    return "".join(out)


def unescape_path(path: str) -> bytes:
    """The file name that `escape_path` made this text from."""
    if "\\" not in path:
        return path.encode()
    out, position = bytearray(), 0
    for match in _ESCAPED.finditer(path):
        out += path[position : match.start()].encode()
        out += b"\\" if match[0] == "\\\\" else bytes.fromhex(match[0][2:])
        position = match.end()
    return bytes(out + path[position:].encode())


def resolve(source: str | Path) -> str:
    """The root that a user's `source` names: a resolved, escaped path or a URI.

    Raises:
        ConfigError: `source` is empty (an unset shell variable), a web address, or a URI with a
            user name or password, which would be written to files and screens.
    """
    if not (text := os.fspath(source)):
        raise ConfigError(
            "The path given is empty.", "a folder, a file or an address.", "give . for this folder."
        )
    if not (uri := _URI.fullmatch(text)):
        return escape_path(os.path.realpath(os.fsencode(text)))
    scheme, host, path = uri.groups()
    if scheme.lower() == "file":
        from urllib.parse import unquote_to_bytes

        return escape_path(os.path.realpath(unquote_to_bytes(path or "/")))
    if scheme.lower() in WEB_SCHEMES:
        raise _web_address_error(scheme.lower(), host)
    if "@" in host:
        raise ConfigError(
            f"the {scheme}:// address holds a name or a password.",
            "an address without them: it is written to catalogs and to the screen.",
            "remove them; put credentials into the environment (AWS_*, GOOGLE_*).",
        )
    return escape_path(os.fsencode(f"{scheme.lower()}://{host}{path.rstrip('/')}"))


def _web_address_error(scheme: str, host: str) -> ConfigError:
    """The refusal of a web address; user name, password and query are not shown."""
    kind = "an address of HDFS" if scheme.endswith("hdfs") else "a web address"
    return ConfigError(
        f"{scheme}://{host.rpartition('@')[2]}/… is {kind}, which Arrowhead does not read.",
        "a folder or a table on a disk, or at s3:// or gs://.",
        "download it first, and give the folder.",
    )


def is_store_uri(root: str) -> bool:
    """Whether a root is in an object store, rather than on a disk."""
    return _URI.match(root) is not None


def store_uri(root: str) -> str:
    """The unescaped URI of a root, as the store spells it."""
    return unescape_path(root).decode("utf-8", "surrogateescape")


def encode_key(key: str) -> bytes:
    """The bytes of an object's key."""
    return key.encode("utf-8", "surrogateescape")
