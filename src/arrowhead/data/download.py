"""Download a file over HTTP or HTTPS so that an interrupted download continues where it stopped.

    NAME.partial       the bytes that have come so far
    NAME.partial.json  which version of the remote file they belong to
    NAME               the complete file, hashes not yet checked

A download continues with Range and If-Range (RFC 9110, sections 13.1.5 and 14.2). The answer must
name the version that the partial file belongs to, so that two versions are never spliced. A server
that ignores Range sends the file from the start.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from arrowhead import __version__, fileio
from arrowhead.errors import ConfigError, DataError

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all; 0 in all: not known."""
PrintLine = Callable[[str], None]

CHUNK_BYTES = 2**16
MAX_ATTEMPTS = 200  # requests for one file, however little each of them brings
MAX_REDIRECTS = 10
MAX_WAIT_SECONDS = 60.0  # between two attempts, whatever Retry-After says
REDIRECTS = (301, 302, 303, 307, 308)
RETRIED_STATUSES = (408, 425, 429, 500, 502, 503, 504)
MAX_START_OVERS = 5  # for a file that changes while it is downloaded


@dataclass(frozen=True, kw_only=True, slots=True)
class DownloadConfig:
    """How a file is downloaded."""

    max_bytes: int
    """Larger files are refused."""
    tries: int = 6
    """Attempts in a row that bring nothing new before the download is given up."""
    retry_seconds: float = 1.0
    """Seconds before the second attempt; doubled for each further one that brings nothing new."""
    connect_seconds: float = 15.0
    """Seconds to wait for a connection."""
    read_seconds: float = 60.0
    """Seconds to wait for the next bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteFile:
    """A file on a web server.

    Attributes:
        url: Its address, http or https.
        shown: The address for messages, without its secrets.
        digests: "sha256:HEX" or "md5:HEX"; the file must have one of them. A publisher may have
            replaced a file, so several may be right. Empty: nothing is checked.
    """

    url: str
    shown: str
    digests: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """A hash of the address without user and query, which may hold secrets or expire."""
        parts = urlsplit(self.url)
        text = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Downloaded:
    """A complete file.

    Attributes:
        path: Where it is.
        size: Bytes.
        sha256: Hex digest of its bytes.
        checked: The digest that it was compared with, "" if none is known.
        resumed_at: Bytes that an earlier call had downloaded.
    """

    path: Path
    size: int
    sha256: str
    checked: str
    resumed_at: int = 0


class _Cut(Exception):
    """An attempt that failed and may be repeated.

    Args:
        reason: What happened, for a message.
        wait: Seconds that the server asks to wait.
    """

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class _StartOver(Exception):
    """The partial file is of no use; the reason is for a message."""


def download(
    remote: RemoteFile,
    path: Path,
    config: DownloadConfig,
    progress: Progress,
    print_line: PrintLine,
) -> Downloaded:
    """Download a file, or what is missing of it, and check its hash.

    Args:
        remote: What to download.
        path: Where the complete file goes. Its folder exists and nobody else writes there.
        config: Limits and retries.
        progress: Called with the bytes done and in all, also when a download starts over.
        print_line: Called with a line for the user.

    Raises:
        ConfigError: The server refuses, the file is too large, the disk is full, or the connection
            fails again and again. The partial file stays.
        DataError: The file has another hash. It stays, so that it can be looked at.
    """
    if path.is_file():
        with suppress(DataError):
            return check_file(path, remote.digests, remote.shown)
        print_line(f"{path} does not have the expected hash: it is downloaded again")
        path.unlink()
    transfer = _Transfer(remote, path, config, progress, print_line)
    resumed_at = transfer.offset
    if resumed_at:
        print_line(f"continuing at byte {resumed_at:,}")
    with fileio.refuse_full_disk(transfer.partial):
        transfer.run()
        os.replace(transfer.partial, path)
        transfer.state_path.unlink(missing_ok=True)
    checked = check_file(path, remote.digests, remote.shown)
    return Downloaded(
        path=path,
        size=checked.size,
        sha256=checked.sha256,
        checked=checked.checked,
        resumed_at=resumed_at,
    )


def partial_path(path: Path) -> Path:
    """Where the bytes of an unfinished download of `path` are."""
    return path.with_name(f"{path.name}.partial")


def check_file(path: Path, digests: Sequence[str], shown: str) -> Downloaded:
    """Hash a file and compare it with the digests that it may have.

    Args:
        path: The file.
        digests: See `RemoteFile.digests`.
        shown: How messages call the file.

    Raises:
        DataError: It has none of them.
    """
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    needs_md5 = any(one.startswith("md5:") for one in digests)
    with path.open("rb") as file:
        while block := file.read(2**20):
            sha256.update(block)
            if needs_md5:
                md5.update(block)
    found = f"sha256:{sha256.hexdigest()}", f"md5:{md5.hexdigest()}"
    checked = next((one for one in found if one in digests), "")
    if digests and not checked:
        known = " or ".join(one.replace(":", " ") for one in digests)
        raise DataError(
            f"{shown} does not have the expected hash: its sha256 is {sha256.hexdigest()}"
            + (f", its md5 {md5.hexdigest()}." if needs_md5 else "."),
            f"{known}.",
            "run the same command again to download it once more; if its publisher has replaced"
            f" it and you trust it, give --sha256 {sha256.hexdigest()}.",
        )
    return Downloaded(
        path=path, size=path.stat().st_size, sha256=sha256.hexdigest(), checked=checked
    )


class _Transfer:
    """The download of one file: what has come, and which version it belongs to."""

    def __init__(
        self,
        remote: RemoteFile,
        path: Path,
        config: DownloadConfig,
        progress: Progress,
        print_line: PrintLine,
    ) -> None:
        self.partial = partial_path(path)
        self.state_path = path.with_name(f"{path.name}.partial.json")
        self._remote, self._config, self._progress, self._print_line = (
            remote,
            config,
            progress,
            print_line,
        )
        self._version: dict[str, str] = {}  # ETag and Last-Modified, as far as the server has them
        self._total = 0  # bytes; 0: not known
        self._furthest = 0
        self.offset = self._recover()

    def _recover(self) -> int:
        """The number of bytes of an earlier call that can be used."""
        try:
            state = fileio.read_json(self.state_path)
            size = self.partial.stat().st_size
            version, total, key = dict(state["version"]), int(state["total"]), state["key"]
        except (DataError, OSError, KeyError, TypeError, ValueError):
            return 0
        # Without a version, only a hash can show that two parts belong together.
        usable = key == self._remote.key and (version or self._remote.digests)
        if not usable or (total and size > total):
            return 0
        self._version, self._total, self._furthest = version, total, size
        return size

    def run(self) -> None:
        """Download until the file is complete."""
        import requests

        if self._total and self.offset == self._total:
            return
        failures = start_overs = 0
        with requests.Session() as session:
            session.headers["User-Agent"] = f"arrowhead/{__version__}"
            for _ in range(MAX_ATTEMPTS):
                before = self._furthest
                try:
                    self._attempt(session)
                    return
                except _StartOver as reason:
                    self._print_line(f"{reason}: starting over")
                    self.offset, self._total, self._version = 0, 0, {}
                    start_overs += 1
                    if start_overs > MAX_START_OVERS:
                        raise self._given_up("the file changes again and again") from reason
                except _Cut as cut:
                    failures = 1 if self._furthest > before else failures + 1
                    if failures >= self._config.tries:
                        raise self._given_up(str(cut)) from cut
                    wait = max(cut.wait, self._config.retry_seconds * 2 ** (failures - 1))
                    wait = min(wait, MAX_WAIT_SECONDS)
                    self._print_line(f"{cut}; {self._have()}; trying again in {wait:.3g} s")
                    time.sleep(wait)
        raise self._given_up(f"{MAX_ATTEMPTS} requests did not suffice")

    def _attempt(self, session: Any) -> None:
        """One request: download to the end, or raise."""
        response = self._open(session)
        with response:
            status = response.status_code
            if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and self.offset:
                total = re.fullmatch(r"bytes \*/(\d+)", response.headers.get("Content-Range", ""))
                if total and int(total[1]) == self.offset and self._same_version(response):
                    return
                raise _StartOver("the partial file is longer than the file on the server")
            if status == HTTPStatus.PARTIAL_CONTENT and self.offset:
                self._check_continuation(response)
            elif status == HTTPStatus.OK:
                self._begin(response)
            else:
                self._refuse_status(response)
            self._receive(response)

    def _open(self, session: Any) -> Any:
        """The answer to a request for what is missing, after redirects."""
        import requests

        # The bytes are stored as they are on the server, so nothing may compress them on the way.
        headers = {"Accept-Encoding": "identity"}
        if self.offset:
            headers["Range"] = f"bytes={self.offset}-"
            if validator := _validator(self._version):
                headers["If-Range"] = validator
        url = self._remote.url
        timeout = self._config.connect_seconds, self._config.read_seconds
        for _ in range(MAX_REDIRECTS + 1):
            try:
                response = session.get(
                    url, headers=headers, stream=True, timeout=timeout, allow_redirects=False
                )
            except (requests.RequestException, OSError) as error:
                raise self._connection_error(error, url) from error
            # urllib3's own errors are not wrapped where it cannot read an address.
            except (requests.exceptions.BaseHTTPError, ValueError) as error:
                raise self._address_error() from error
            if response.status_code not in REDIRECTS:
                return response
            response.close()
            url = self._redirected(url, response.headers.get("Location", ""))
        raise ConfigError(
            f"{self._remote.shown} is redirected more than {MAX_REDIRECTS} times.",
            "an address that leads to a file.",
            "open the address in a browser and give the address that it ends at.",
        )

    def _redirected(self, url: str, location: str) -> str:
        try:
            target = urljoin(url, location)
            old, new = urlsplit(url).scheme, urlsplit(target).scheme
        except ValueError as error:
            raise self._address_error() from error
        if not location or new not in ("http", "https") or (old, new) == ("https", "http"):
            where = f"{new}:" if new not in ("http", "https") else "http, which is not encrypted"
            raise ConfigError(
                f"{self._remote.shown} is redirected to {where if location else 'nowhere'}.",
                "redirects to http or https, and from https to https only.",
                "give the address of the file itself.",
            )
        return target

    def _begin(self, response: Any) -> None:
        """Note the version and length of a file that is sent from the start."""
        if self.offset:
            same = bool(self._version) and self._same_version(response)
            reason = "the server cannot continue a download" if same else "the file has changed"
            self._print_line(f"{reason}: it is sent from the start")
        self.offset, self._version = 0, _version(response)
        length = response.headers.get("Content-Length", "")
        self._total = int(length) if length.isdecimal() else 0
        if self._total > self._config.max_bytes:
            raise self._too_large(f"has {self._total:,} bytes")
        self.partial.unlink(missing_ok=True)
        state = {"key": self._remote.key, "version": self._version, "total": self._total}
        fileio.write_json(self.state_path, state)

    def _check_continuation(self, response: Any) -> None:
        """Raise _StartOver unless the answer continues the partial file."""
        pattern = r"bytes (\d+)-\d+/(\d+|\*)"
        match = re.fullmatch(pattern, response.headers.get("Content-Range", ""))
        if not match or int(match[1]) != self.offset:
            raise _StartOver("the server sends another part of the file than was asked for")
        # Some servers ignore If-Range.
        total = int(match[2]) if match[2] != "*" else self._total
        if not self._same_version(response) or (self._total and total != self._total):
            raise _StartOver("the file has changed on the server")

    def _same_version(self, response: Any) -> bool:
        found = _version(response)
        return all(found.get(name, value) == value for name, value in self._version.items())

    def _receive(self, response: Any) -> None:
        """Append the body of the answer to the partial file."""
        import requests

        self._progress(self.offset, self._total)
        with self.partial.open("r+b" if self.offset else "wb") as file:
            file.truncate(self.offset)
            file.seek(self.offset)
            while True:
                try:
                    # Not iter_content, which undoes a Content-Encoding: a server that labels a
                    # .tar.gz as gzip would leave a .tar. Its errors are those of urllib3.
                    block = response.raw.read(CHUNK_BYTES, decode_content=False)
                except (requests.exceptions.BaseHTTPError, OSError) as error:
                    file.flush()
                    raise _Cut(_network_reason(error)) from error
                if not block:
                    break
                if self.offset + len(block) > self._config.max_bytes:
                    raise self._too_large("sends more")
                file.write(block)
                self.offset += len(block)
                self._furthest = max(self._furthest, self.offset)
                self._progress(self.offset, self._total)
            file.flush()
            os.fsync(file.fileno())
        if self._total and self.offset != self._total:
            raise _Cut("the connection ended early")

    def _refuse_status(self, response: Any) -> None:
        """Raise for a status that brings no file."""
        status = response.status_code
        phrase = f"the server answers {status} {_phrase(status)}".rstrip()
        if status in RETRIED_STATUSES:
            after = response.headers.get("Retry-After", "")
            raise _Cut(phrase, float(after) if after.isdecimal() else 0.0)
        reason = {
            401: "give a user and password, or an address that needs none.",
            403: "check that you may download it; some sites want you to sign in or accept terms.",
            404: "check the address; the publisher may have moved the file.",
            410: "look for another address; the publisher has removed the file.",
        }
        raise ConfigError(
            f"{self._remote.shown}: {phrase}.",
            "200 and the file.",
            reason.get(status, "open the address in a browser to see what the server says."),
        )

    def _have(self) -> str:
        total = f" of {self._total:,}" if self._total else ""
        return f"{self.offset:,}{total} bytes have come"

    def _given_up(self, reason: str) -> ConfigError:
        kept = f"; {self._have()} and are kept" if self.offset else ""
        return ConfigError(
            f"{self._remote.shown} could not be downloaded: {reason}{kept}.",
            "a server that sends the file to its end.",
            "run the same command again to continue, perhaps later."
            if self.offset
            else "check the address and the network, and run the same command again.",
        )

    def _too_large(self, what: str) -> ConfigError:
        return ConfigError(
            f"{self._remote.shown} {what}.",
            f"at most {self._config.max_bytes:,} bytes (--max-bytes).",
            "raise --max-bytes if you want a file of this size.",
        )

    def _address_error(self) -> ConfigError:
        return ConfigError(
            f"{self._remote.shown} is not a valid address, or is redirected to one that is not.",
            "http:// or https://, a host, and a path.",
            "check the spelling.",
        )

    def _connection_error(self, error: Exception, url: str) -> Exception:
        """What a request without an answer ends in; texts of requests may hold secrets."""
        import requests

        invalid = requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema
        if isinstance(error, (*invalid, requests.exceptions.MissingSchema)):
            return self._address_error()
        if isinstance(error, requests.exceptions.SSLError):
            return ConfigError(
                f"{urlsplit(url).hostname} does not prove who it is: its TLS certificate is not"
                " accepted.",
                "a certificate that this machine trusts.",
                "check the address and this machine's clock; for a certificate authority of your"
                " own, set REQUESTS_CA_BUNDLE.",
            )
        reason = f"{urlsplit(url).hostname}: {_network_reason(error)}"
        # A wrong name or port is told at once; an outage in the middle of a file is waited for.
        if isinstance(error, requests.Timeout) or self._furthest:
            return _Cut(reason)
        return self._given_up(reason)


def _version(response: Any) -> dict[str, str]:
    """The headers that name the version of a file."""
    names = "ETag", "Last-Modified"
    return {name: value for name in names if (value := response.headers.get(name, ""))}


def _validator(version: dict[str, str]) -> str:
    """What If-Range may hold: a strong ETag, else a date; "" if there is neither."""
    etag = version.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else version.get("Last-Modified", "")


def _phrase(status: int) -> str:
    with suppress(ValueError):
        return HTTPStatus(status).phrase
    return ""


def _network_reason(error: BaseException) -> str:
    """A short reason for an error of the network, without addresses."""
    chain: list[BaseException] = []
    pending: list[BaseException | None] = [error]
    while pending and len(chain) < 20:
        one = pending.pop()
        if one is None or one in chain:
            continue
        chain.append(one)
        inner = *one.args, getattr(one, "reason", None)
        pending += [arg for arg in inner if isinstance(arg, BaseException)]
        pending += [one.__cause__, one.__context__]
    names = {type(one).__name__ for one in chain}
    if "gaierror" in names or "NameResolutionError" in names:
        return "no machine of this name is known"
    if names & {"ReadTimeoutError", "ConnectTimeoutError", "TimeoutError", "ReadTimeout"}:
        return "the server does not answer"
    if "ProxyError" in names:
        return "the proxy cannot be reached"
    numbers = {one.errno for one in chain if isinstance(one, OSError) and one.errno}
    for number in (errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.ENETUNREACH):
        if number in numbers:
            return os.strerror(number).lower()
    return "the connection ended early"
