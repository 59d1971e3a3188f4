"""`examples/serve.py`, run as its user runs it: a process, a port, requests."""

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
MOST = 100_000
PLACES = 4
SECONDS = 3


@pytest.fixture(scope="module")
def path(bundled: Callable[..., Path]) -> Path:
    return bundled()


@pytest.fixture(scope="module")
def port(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Where a server answers, until the tests of this file are done."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = int(free.getsockname()[1])
    log = tmp_path_factory.mktemp("serve") / "log"
    words = [ROOT / "examples" / "serve.py", path, "--port", number, "--max-bytes", MOST]
    words += ["--max-requests", PLACES, "--seconds", SECONDS]
    with log.open("wb") as sink:
        server = subprocess.Popen(
            [sys.executable, *map(str, words)],
            stdout=sink,
            stderr=sink,
            env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        )
    try:
        until = time.monotonic() + 300
        while not answers(number):
            assert server.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        yield number
    finally:
        slow = [begun(number, b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n")]
        slow.append(begun(number, b"POST /pre"))
        server.send_signal(signal.SIGTERM)
        try:
            # However slow the machine and its clients: the server itself waits for five seconds.
            assert server.wait(60) in (-signal.SIGTERM, 0)
        finally:
            server.kill()
            server.wait()
            for client in slow:
                client.close()
    assert "Traceback" not in log.read_text()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def begun(port: int, words: bytes) -> socket.socket:
    """A connection whose client has sent this much of a request, and no more."""
    client = socket.create_connection(("127.0.0.1", port), timeout=60)
    client.sendall(words)
    return client


def form(*parts: tuple[str, bytes], boundary: str = "----------------------------1a2b") -> Any:
    """Body and headers as `curl -F` sends them; each part: its Content-Disposition, its content."""
    lines = b"".join(
        f"--{boundary}\r\nContent-Disposition: form-data; {what}\r\n"
        f"Content-Type: image/jpeg\r\n\r\n".encode()
        + content
        + b"\r\n"
        for what, content in parts
    )
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    return {"body": lines + f"--{boundary}--\r\n".encode(), "headers": headers}


def ask(port: int, method: str, route: str, body: Any = None, **more: Any) -> tuple[int, Any]:
    """Status and JSON of a request."""
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    line.request(method, route, body, **more)
    answer = line.getresponse()
    result = answer.status, json.loads(answer.read())
    line.close()
    return result


def test_it_says_that_it_is_well(port: int) -> None:
    assert ask(port, "GET", "/healthz") == (200, {"status": "ok"})


def test_an_image_is_answered_with_what_its_bundle_gives_it(port: int, path: Path) -> None:
    result = load(path)
    for golden in result.golden:
        status, messages = ask(port, "POST", "/predict", golden.data)
        assert status == 200
        assert list(messages["probabilities"]) == result.classes
        given = list(messages["probabilities"].values())
        np.testing.assert_allclose(given, golden.probabilities, rtol=0, atol=1e-5)
        assert messages["label"] == result.classes[int(golden.probabilities.argmax())]
        assert messages["probability"] == max(given)
        assert messages["labels"] == [messages["label"]]


@pytest.mark.parametrize(
    ("cut", "fault"), [(None, "truncated"), (0, "empty"), (-1, "not an image")]
)
def test_a_file_that_is_no_image_is_refused_with_its_fault_and_the_next_one_is_answered(
    cut: int | None, fault: str, port: int, path: Path
) -> None:
    data = load(path).golden[0].data
    body = {None: data[: len(data) // 2], 0: b"", -1: b"not an image at all"}[cut]
    status, result = ask(port, "POST", "/predict", body)
    assert status == 422
    assert result["detail"].startswith(fault)
    assert ask(port, "POST", "/predict", data)[0] == 200


def test_a_body_beyond_the_limit_is_refused_whether_or_not_it_says_its_length(port: int) -> None:
    big = b"\xff\xd8\xff" + bytes(MOST)
    status, result = ask(port, "POST", "/predict", big)
    assert (status, result["detail"]) == (413, f"too large: more than {MOST} bytes")
    pieces = [big[at : at + 10_000] for at in range(0, len(big), 10_000)]
    status, _ = ask(port, "POST", "/predict", iter(pieces), encode_chunked=True)
    assert status == 413
    assert ask(port, "GET", "/healthz")[0] == 200


# ------------------------------------------------------------------------------- forms


def test_a_form_as_browsers_and_curl_send_it_is_answered_like_the_bare_image(
    port: int, path: Path
) -> None:
    photo = load(path).golden[0].data
    photo += b"\r\n--\r\n\r\n"  # bytes behind the picture that look like a form's
    bare = ask(port, "POST", "/predict", photo)
    assert bare[0] == 200
    curl = form(('name="file"; filename="photo.jpg"', photo))
    browser = form(
        ('name="comment"', b"a cat"),
        ('name="f"; filename="Käse & \\"Katze.jpg"; filename*=UTF-8\'\'K%C3%A4se.jpg', photo),
        boundary="----WebKitFormBoundary7MA4YWxkTrZu0gW",
    )
    for sent in (curl, browser):
        assert ask(port, "POST", "/predict", **sent) == bare
    sent = form(('name="file"; filename="photo.jpg"', photo))
    sent["headers"]["Content-Type"] = (
        'Multipart/Form-Data; boundary="----------------------------1a2b"'
    )
    assert ask(port, "POST", "/predict", **sent) == bare


def test_a_form_that_holds_no_one_image_says_so(port: int, path: Path) -> None:
    photo = load(path).golden[0].data
    file = ('name="file"; filename="photo.jpg"', photo)
    full = form(file)
    for sent, output in (
        (form(('name="file"', photo)), "0 files"),
        (form(file, file), "2 files"),
        ({**full, "body": full["body"][:-60]}, "incomplete"),
        ({**full, "headers": {"Content-Type": "multipart/form-data"}}, "no boundary"),
    ):
        status, result = ask(port, "POST", "/predict", **sent)
        assert (status, output in result["detail"]) == (400, True), result
    status, result = ask(port, "POST", "/predict", **form((file[0], bytes(MOST + 1))))
    assert (status, result["detail"]) == (413, f"too large: more than {MOST} bytes")
    status, result = ask(port, "POST", "/predict", **form((file[0], b"")))
    assert (status, result["detail"].partition(":")[0]) == (422, "empty")


# ------------------------------------------------------------------------- slow clients


def test_clients_that_are_slow_with_their_image_take_no_more_places_than_there_are(
    port: int, path: Path
) -> None:
    photo = load(path).golden[0].data
    head = f"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: {MOST}\r\n\r\n".encode()
    slow = [begun(port, head + photo[:1000]) for _ in range(PLACES + 3)]
    answers = [client.recv(4000).split(b"\r\n")[0] for client in slow]
    assert sorted(answers) == sorted(
        [b"HTTP/1.1 408 Request Timeout"] * PLACES + [b"HTTP/1.1 503 Service Unavailable"] * 3
    )
    for client in slow:
        client.close()
    assert ask(port, "POST", "/predict", photo)[0] == 200


def test_clients_that_do_not_end_their_first_lines_are_hung_up_on(port: int, path: Path) -> None:
    slow = [begun(port, b"POST /predict HTTP/1.1\r\nHost: a\r\nX-") for _ in range(50)]
    assert ask(port, "POST", "/predict", load(path).golden[0].data)[0] == 200
    ended = []
    for client in slow:
        try:
            while True:  # drop by drop, until it is closed
                client.sendall(b"a")
                client.settimeout(0.2)
                try:
                    ended.append(client.recv(100))
                    break
                except TimeoutError:
                    pass
        except OSError:  # reset
            ended.append(b"")
        client.close()
    assert ended == [b""] * 50
    assert ask(port, "GET", "/healthz")[0] == 200
