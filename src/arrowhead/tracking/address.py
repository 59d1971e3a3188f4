"""Checks the address of a tracking store, and shows it without its secrets.

check_address      refuses a malformed address before it is used
without_secrets    a text that may be shown: no user, password or token in an address in it
secrets_of         the secrets of an address
register_secrets   from now on, `redacted` removes the secrets of an address from every text
"""

from __future__ import annotations

import json
import os
import re
from importlib.metadata import entry_points
from urllib.parse import quote, unquote, unquote_plus, urlsplit

from arrowhead.errors import ConfigError

MIN_SECRET_CHARS = 3  # a shorter one is part of many ordinary words
# Parameters in the query of an address that are no secrets; others are not shown.
PUBLIC_PARAMETERS = {
    "application_name",
    "cache",
    "charset",
    "connect_timeout",
    "driver",
    "encrypt",
    "mode",
    "options",
    "sslmode",
    "sslrootcert",
    "timeout",
    "trustservercertificate",
    "uri",
}
FOLDERS = ("file", "sqlite")  # their paths may hold anything
DATABASES = ("postgresql", "mysql", "mssql")
SERVERS = ("http", "https")
MLFLOW_SCHEMES = ("databricks", "databricks-uc", "uc")  # addresses that only MLflow knows
ADDRESSES = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
SECRETS = {
    "MLFLOW_TRACKING_PASSWORD": MIN_SECRET_CHARS,
    "MLFLOW_TRACKING_TOKEN": MIN_SECRET_CHARS,
    # A stand-in for tests, such as "testing", is no secret but a word.
    "AWS_SECRET_ACCESS_KEY": 16,
    "AWS_SESSION_TOKEN": 16,
    "DATABRICKS_TOKEN": 16,
}
"""Variables of MLflow that hold a secret, and how many characters it has at least."""

_secrets: set[str] = set()
"""Secrets of the addresses that this process was given."""


def register_secrets(uri: str) -> None:
    """Remember the secrets of an address, so that `redacted` removes them from every text."""
    _secrets.update(secrets_of(uri))


def redacted(text: str) -> str:
    """A text without the secrets that this process knows: of addresses that it was given, and of
    the variables that MLflow reads.
    """
    known = set(_secrets)
    for name in ADDRESSES:
        known |= secrets_of(os.environ.get(name, ""))
    for name, least in SECRETS.items():
        if len(value := os.environ.get(name, "")) >= least:
            known |= _spellings(value)
    for secret in sorted(known, key=len, reverse=True):  # as libraries say them, out of any address
        if len(secret) >= MIN_SECRET_CHARS:
            text = text.replace(secret, "…")
    return text


def without_secrets(text: str) -> str:
    """A store's address, or a line with one in it, without user, password and other secrets."""
    text = re.sub(r"//[^\s'\"]*@", "//…@", redacted(text))
    return re.sub(
        r"([?&#])([^=&#?\s'\"]+)=([^&#\s'\"]*)",
        lambda match: (
            match[0] if match[2].lower() in PUBLIC_PARAMETERS else f"{match[1]}{match[2]}=…"
        ),
        text,
    )


def secrets_of(uri: str) -> set[str]:
    """The secrets of an address, as written and unquoted.

    Of a malformed address, whatever may be a secret: the text before each @, and the text where a
    port should be.
    """
    scheme = _scheme(uri)
    before, _, query = uri.partition("?")
    if "@" not in before and "@" in query:  # a password with a question mark in it
        before, query = uri, ""
    values: list[str] = []
    for text in {before, uri} if scheme in (*SERVERS, *DATABASES) and "@" in before else {before}:
        values += _passwords(text, scheme)
    for part in re.split("[&#;]", query):
        name, _, value = part.partition("=")
        if value and name.lower() not in PUBLIC_PARAMETERS:
            # An ODBC connection string holds the password among other things.
            inner = re.findall(r"(?i)(?:pwd|password)=([^;]+)", unquote_plus(value))
            values += [value, *inner]
    return {form for value in values for form in _spellings(value)}


def _scheme(uri: str) -> str:
    """The text before ://, without the driver of a database; "" if there is none."""
    match = re.match(r"\s*([A-Za-z][\w.+-]*)://", uri)
    return match[1].lower().partition("+")[0] if match else ""


def _passwords(text: str, scheme: str) -> list[str]:
    """Passwords before the last @ of an address, and a possible one whose @ is missing."""
    rest = text.partition("//")[2]
    login, at, host = (rest or text).rpartition("@")
    if scheme in FOLDERS:  # an @ in the name of a file
        return [login.partition(":")[2]] if ":" in login.partition("/")[0] else []
    if not rest:  # no address at all, but it may have been meant as one: user:password@host
        return [login[at.end() :] for at in re.finditer(":", login)]
    if not at:
        port = re.split("[/?#]", host.rpartition("]")[2], maxsplit=1)[0].partition(":")[2]
        # http://user:password, the host forgotten: a port is digits.
        return [] if re.fullmatch(r"\d{0,5}", port) else [port]
    user, colon, password = login.partition(":")
    if not colon:  # a token instead of a user
        return [user] if scheme in SERVERS and user else []
    # Where it holds an @ or a slash, libraries take a part of it for the host, and say that.
    parts = [part for part in re.split("[@/?#:]", password) if part != password]
    return [password, *parts] if password else []


def _spellings(secret: str) -> set[str]:
    """A secret as written, unquoted, and as libraries and Python print it."""
    meant = {secret, unquote(secret), unquote_plus(secret)}
    written = {quote(one, safe="") for one in meant} | {repr(one)[1:-1] for one in meant}
    return meant | written | {json.dumps(one)[1:-1] for one in meant}


def check_address(uri: str, name: str) -> None:
    """Refuse an address that no store can have.

    Args:
        uri: the address.
        name: where it was given, --tracking-uri or a variable.

    Raises:
        ConfigError: without the address's secrets.
    """
    why, do = _malformed(uri)
    if not why:
        return
    register_secrets(uri)
    raise ConfigError(
        f"{name} is {without_secrets(uri)!r}: {why}.",
        "a database (sqlite:///…, postgresql://…) or the address of an MLflow server.",
        do or f"correct {name}; without one, runs are recorded in ./mlflow.db.",
    )


def _malformed(uri: str) -> tuple[str, str]:
    """Why no store can have this address, and what to do about it if that is not obvious."""
    scheme = _scheme(uri)
    if scheme in FOLDERS or (not scheme and "@" not in uri):  # a folder, or MLflow says what it is
        return "", ""
    if not scheme:
        return "it has a user before an @, but no http:// or postgresql:// at its beginning", ""
    if re.search(r"[\s\x00-\x1f\x7f]", uri):
        return "it has a blank or a line break in it", ""
    plugins = {one.name for one in entry_points(group="mlflow.tracking_store")}
    if scheme not in (*SERVERS, *DATABASES, *MLFLOW_SCHEMES, *plugins):
        return f"MLflow has no stores of the kind {scheme}", ""
    if scheme not in (*SERVERS, *DATABASES):
        return "", ""
    before, mark, query = uri.partition("?")
    if mark and "@" not in before and "@" in query and scheme in SERVERS:
        return _unescaped()
    login, at, host = before.partition("//")[2].rpartition("@")
    if at and re.search("[/#@]" if scheme in SERVERS else "@", login):
        return _unescaped()
    try:
        parts = urlsplit(f"{scheme}://{host if at else before.partition('//')[2]}")
        port = parts.port
    except ValueError:
        if "[" in host or "]" in host:
            return "the brackets of its host hold no IPv6 address", ""
        return "what follows the colon after its host is no port", "give a port from 1 to 65535."
    if port == 0:
        return "its port is 0", "give a port from 1 to 65535."
    if scheme in SERVERS and not parts.hostname:
        return "it names no host", ""
    return "", ""


def _unescaped() -> tuple[str, str]:
    return (
        "its user or password holds one of / ? # @ as it is",
        "write them as %2F %3F %23 %40 (Python: urllib.parse.quote(password, safe='')).",
    )
