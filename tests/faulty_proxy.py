"""An HTTP proxy between a client and a local server that answers 503, is slow, or hangs up."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit

# Gets method and path of a request; what to do with it: "" (forward), "503", "403", "slow" (wait a
# second), "cut upload" (hang up in the middle of the body, of which the server gets a part), "cut
# download" (hang up in the middle of the answer), "cut answer" (the server does the work, and its
# answer is lost).
Rule = Callable[[str, str], str]


class FaultyProxy:
    """Forwards to one server; `rule` may be replaced at any time."""

    def __init__(self, server: str) -> None:
        self.rule: Rule = lambda method, path: ""
        self.done: list[tuple[str, str, str]] = []
        self._target = (urlsplit(server).hostname, urlsplit(server).port)
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Stop accepting."""
        self._socket.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._socket.accept()[0]
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), client:
            self._forward(client)

    def _forward(self, client: socket.socket) -> None:
        head, body = _read_head(client)
        method, path = head.split(b" ", 2)[:2]
        fault = self.rule(method.decode(), path.decode())
        self.done.append((method.decode(), path.decode(), fault))
        length = int((re.search(rb"(?i)\r\ncontent-length: *(\d+)", head) or [0, 0])[1])
        if re.search(rb"(?i)\r\nexpect: *100-continue", head):
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            head = re.sub(rb"(?i)\r\nexpect:[^\r]*", b"", head)
        wanted = length // 2 if fault == "cut upload" else length
        while len(body) < wanted:
            body += client.recv(65536)
        if fault in ("503", "403"):
            code = {"503": "SlowDown", "403": "AccessDenied"}[fault]
            text = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
            client.sendall(
                f"HTTP/1.1 {fault} no\r\nContent-Type: application/xml\r\nConnection: close\r\n"
                f"Content-Length: {len(text)}\r\n\r\n".encode()
                + (b"" if method == b"HEAD" else text)
            )
            return
        if fault == "slow":
            time.sleep(1)
        head = re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", head)
        with socket.create_connection(self._target, 60) as server:
            server.sendall(head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1) + body[:wanted])
            if fault == "cut upload":
                return
            answer = b""
            while data := server.recv(65536):
                answer += data
        if fault == "cut answer":
            return
        start = answer.find(b"\r\n\r\n") + 4
        cut = start + (len(answer) - start) // 2 if fault == "cut download" else len(answer)
        client.sendall(re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", answer[:start], count=1)[:-2])
        client.sendall(b"Connection: close\r\n\r\n" + answer[start:cut])


def _read_head(client: socket.socket) -> tuple[bytes, bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        more = client.recv(65536)
        if not more:
            raise ValueError("the client hung up")
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    return head + b"\r\n\r\n", body
