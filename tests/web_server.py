"""A web server on this machine that misbehaves on request: for tests of downloads."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Page:
    """What the server does with one path.

    Attributes:
        data: The bytes of the file.
        etag: Its ETag; "" for none.
        modified: Its Last-Modified; "" for none.
        cuts: How many bytes of the body each request gets before the connection is cut; requests
            after the last of these get everything.
        ignores_range: Always send the whole file.
        ignores_if_range: Send the part that was asked for, of whatever version.
        declared: The Content-Length of a whole file, if not the true one; -1 for none.
        statuses: Statuses of the first requests, instead of the file.
        location: Redirect there.
        encoding: Content-Encoding.
        before: Called with the number of the request before it is answered.
    """

    data: bytes = b""
    etag: str = '"v1"'
    modified: str = ""
    cuts: list[int] = field(default_factory=list)
    ignores_range: bool = False
    ignores_if_range: bool = False
    declared: int | None = None
    statuses: list[int] = field(default_factory=list)
    retry_after: str = ""
    location: str = ""
    encoding: str = ""
    slow_bytes: int = 0
    requests: list[dict[str, str]] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WebServer

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.close_connection = True
        page = self.server.pages.get(self.path.partition("?")[0])
        if page is None:
            self.answer(404, {"Content-Length": "0"})
            return
        page.requests.append(dict(self.headers))
        if page.statuses:
            headers = {"Retry-After": page.retry_after} if page.retry_after else {}
            self.answer(page.statuses.pop(0), headers | {"Content-Length": "0"})
        elif page.location:
            self.answer(302, {"Location": page.location, "Content-Length": "0"})
        else:
            self.send_file(page)

    def answer(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()

    def send_file(self, page: Page) -> None:
        total, data = len(page.data), page.data
        headers = {"ETag": page.etag, "Last-Modified": page.modified}
        headers = {name: value for name, value in headers.items() if value}
        if page.encoding:
            headers["Content-Encoding"] = page.encoding
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        condition = self.headers.get("If-Range")
        known = page.ignores_if_range or condition in (None, page.etag, page.modified)
        status, length = 200, total
        if asked and known and not page.ignores_range:
            start = int(asked[1])
            if start >= total:
                headers |= {"Content-Range": f"bytes */{total}", "Content-Length": "0"}
                self.answer(416, headers)
                return
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
            status, data, length = 206, data[start:], total - start
        elif page.declared is not None:
            length = page.declared
        if length >= 0:
            headers["Content-Length"] = str(length)
        self.answer(status, headers)
        body = data[: page.cuts.pop(0)] if page.cuts else data
        step = page.slow_bytes or len(body) or 1
        for at in range(0, len(body), step):
            if self.server.stopping.wait(0.02 if page.slow_bytes else 0):
                return
            try:
                self.wfile.write(body[at : at + step])
            except ConnectionError:  # the client was killed
                return


class WebServer(ThreadingHTTPServer):
    """Serves `pages` by path."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.pages: dict[str, Page] = {}
        self.stopping = threading.Event()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


@contextmanager
def web_server() -> Iterator[WebServer]:
    """A running server."""
    with WebServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.stopping.set()
            server.shutdown()
            thread.join()
