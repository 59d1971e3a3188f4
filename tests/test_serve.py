"""`examples/serve.py` as users run it: a process, a port, requests."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arrowhead.bundle.format import load

ROOT = Path(__file__).parents[1]
MAX_BYTES = 100_000
MAX_REQUESTS = 4
TIMEOUT_SECONDS = 3


@pytest.fixture(scope="module")
def path(make_bundle: Callable[..., Path]) -> Path:
    return make_bundle()


@pytest.fixture(scope="module")
def port(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a server that runs until the tests of this file are done."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        free_port = int(free.getsockname()[1])
    log = tmp_path_factory.mktemp("serve") / "log"
    argv = [ROOT / "examples" / "serve.py", path, "--port", free_port, "--max-bytes", MAX_BYTES]
    argv += ["--max-requests", MAX_REQUESTS, "--seconds", TIMEOUT_SECONDS]
    with log.open("wb") as log_file:
        server = subprocess.Popen(
            [sys.executable, *map(str, argv)],
            stdout=log_file,
            stderr=log_file,
            env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        )
    try:
        deadline = time.monotonic() + 300
        while not is_listening(free_port):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield free_port
    finally:
        slow_clients = [
            send_partial_request(
                free_port, b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n"
            )
        ]
        slow_clients.append(send_partial_request(free_port, b"POST /pre"))
        server.send_signal(signal.SIGTERM)
        try:
            # Independent of the machine's speed: the server itself waits five seconds.
            assert server.wait(60) in (-signal.SIGTERM, 0)
        finally:
            server.kill()
            server.wait()
            for client in slow_clients:
                client.close()
    assert "Traceback" not in log.read_text()


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def send_partial_request(port: int, data: bytes) -> socket.socket:
    """A connection whose client has sent only these bytes of a request."""
    client = socket.create_connection(("127.0.0.1", port), timeout=60)
    client.sendall(data)
    return client


def multipart_form(
    *parts: tuple[str, bytes], boundary: str = "----------------------------1a2b"
) -> Any:
    """Body and headers as `curl -F` sends them; each part: its Content-Disposition, its content."""
    lines = b"".join(
        f"--{boundary}\r\nContent-Disposition: form-data; {disposition}\r\n"
        f"Content-Type: image/jpeg\r\n\r\n".encode()
        + content
        + b"\r\n"
        for disposition, content in parts
    )
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    return {"body": lines + f"--{boundary}--\r\n".encode(), "headers": headers}


def ask(port: int, method: str, route: str, body: Any = None, **more: Any) -> tuple[int, Any]:
    """Status and JSON of a response."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, route, body, **more)
    response = connection.getresponse()
    result = response.status, json.loads(response.read())
    connection.close()
    return result


def test_health_check_reports_ok(port: int) -> None:
    assert ask(port, "GET", "/healthz") == (200, {"status": "ok"})


def test_image_gets_the_bundles_prediction(port: int, path: Path) -> None:
    result = load(path)
    for golden in result.golden:
        status, messages = ask(port, "POST", "/predict", golden.data)
        assert status == 200
        assert list(messages["probabilities"]) == result.classes
        expected = list(messages["probabilities"].values())
        np.testing.assert_allclose(expected, golden.probabilities, rtol=0, atol=1e-5)
        assert messages["label"] == result.classes[int(golden.probabilities.argmax())]
        assert messages["probability"] == max(expected)
        assert messages["labels"] == [messages["label"]]


@pytest.mark.parametrize(
    ("cut", "fault"), [(None, "truncated"), (0, "empty"), (-1, "not an image")]
)
def test_broken_image_is_refused_with_its_fault_and_the_next_is_answered(
    cut: int | None, fault: str, port: int, path: Path
) -> None:
    data = load(path).golden[0].data
    body = {None: data[: len(data) // 2], 0: b"", -1: b"not an image at all"}[cut]
    status, result = ask(port, "POST", "/predict", body)
    assert status == 422
    assert result["detail"].startswith(fault)
    assert ask(port, "POST", "/predict", data)[0] == 200


def test_oversized_body_is_refused_with_or_without_content_length(port: int) -> None:
    big = b"\xff\xd8\xff" + bytes(MAX_BYTES)
    status, result = ask(port, "POST", "/predict", big)
    assert (status, result["detail"]) == (413, f"too large: more than {MAX_BYTES} bytes")
    pieces = [big[at : at + 10_000] for at in range(0, len(big), 10_000)]
    status, _ = ask(port, "POST", "/predict", iter(pieces), encode_chunked=True)
    assert status == 413
    assert ask(port, "GET", "/healthz")[0] == 200


# ------------------------------------------------------------------------------- forms


def test_multipart_form_of_browsers_and_curl_is_answered_like_the_raw_image(
    port: int, path: Path
) -> None:
    photo = load(path).golden[0].data
    photo += b"\r\n--\r\n\r\n"  # bytes after the image that look like a form's
    bare = ask(port, "POST", "/predict", photo)
    assert bare[0] == 200
    curl = multipart_form(('name="file"; filename="photo.jpg"', photo))
    browser = multipart_form(
        ('name="comment"', b"a cat"),
        ('name="f"; filename="Käse & \\"Katze.jpg"; filename*=UTF-8\'\'K%C3%A4se.jpg', photo),
        boundary="----WebKitFormBoundary7MA4YWxkTrZu0gW",
    )
    for sent in (curl, browser):
        assert ask(port, "POST", "/predict", **sent) == bare
    sent = multipart_form(('name="file"; filename="photo.jpg"', photo))
    sent["headers"]["Content-Type"] = (
        'Multipart/Form-Data; boundary="----------------------------1a2b"'
    )
    assert ask(port, "POST", "/predict", **sent) == bare


def test_form_without_exactly_one_image_is_refused(port: int, path: Path) -> None:
    photo = load(path).golden[0].data
    file = ('name="file"; filename="photo.jpg"', photo)
    full = multipart_form(file)
    for sent, output in (
        (multipart_form(('name="file"', photo)), "0 files"),
        (multipart_form(file, file), "2 files"),
        ({**full, "body": full["body"][:-60]}, "incomplete"),
        ({**full, "headers": {"Content-Type": "multipart/form-data"}}, "no boundary"),
    ):
        status, result = ask(port, "POST", "/predict", **sent)
        assert (status, output in result["detail"]) == (400, True), result
    status, result = ask(
        port, "POST", "/predict", **multipart_form((file[0], bytes(MAX_BYTES + 1)))
    )
    assert (status, result["detail"]) == (413, f"too large: more than {MAX_BYTES} bytes")
    status, result = ask(port, "POST", "/predict", **multipart_form((file[0], b"")))
    assert (status, result["detail"].partition(":")[0]) == (422, "empty")


# ------------------------------------------------------------------------- slow clients


def test_slow_uploads_do_not_exceed_the_request_limit(port: int, path: Path) -> None:
    photo = load(path).golden[0].data
    head = f"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: {MAX_BYTES}\r\n\r\n".encode()
    slow_clients = [
        send_partial_request(port, head + photo[:1000]) for _ in range(MAX_REQUESTS + 3)
    ]
    status_lines = [client.recv(4000).split(b"\r\n")[0] for client in slow_clients]
    assert sorted(status_lines) == sorted(
        [b"HTTP/1.1 408 Request Timeout"] * MAX_REQUESTS + [b"HTTP/1.1 503 Service Unavailable"] * 3
    )
    for client in slow_clients:
        client.close()
    assert ask(port, "POST", "/predict", photo)[0] == 200


def test_clients_that_never_finish_their_headers_are_disconnected(port: int, path: Path) -> None:
    slow_clients = [
        send_partial_request(port, b"POST /predict HTTP/1.1\r\nHost: a\r\nX-") for _ in range(50)
    ]
    assert ask(port, "POST", "/predict", load(path).golden[0].data)[0] == 200
    closed = []
    for client in slow_clients:
        try:
            while True:  # byte by byte, until the server closes it
                client.sendall(b"a")
                client.settimeout(0.2)
                try:
                    closed.append(client.recv(100))
                    break
                except TimeoutError:
                    pass
        except OSError:  # connection reset
            closed.append(b"")
        client.close()
    assert closed == [b""] * 50
    assert ask(port, "GET", "/healthz")[0] == 200
