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

from arrowhead.bundle import load

ROOT = Path(__file__).parents[1]
MOST = 100_000


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
        server.send_signal(signal.SIGINT)
        try:
            server.wait(120)
        finally:
            server.kill()
            server.wait()
    assert "Traceback" not in log.read_text()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def ask(port: int, method: str, route: str, body: Any = None, **more: Any) -> tuple[int, Any]:
    """Status and JSON of a request."""
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    line.request(method, route, body, **more)
    answer = line.getresponse()
    told = answer.status, json.loads(answer.read())
    line.close()
    return told


def test_it_says_that_it_is_well(port: int) -> None:
    assert ask(port, "GET", "/healthz") == (200, {"status": "ok"})


def test_an_image_is_answered_with_what_its_bundle_gives_it(port: int, path: Path) -> None:
    made = load(path)
    for golden in made.golden:
        status, told = ask(port, "POST", "/predict", golden.data)
        assert status == 200
        assert list(told["probabilities"]) == made.classes
        given = list(told["probabilities"].values())
        np.testing.assert_allclose(given, golden.probabilities, rtol=0, atol=1e-5)
        assert told["label"] == made.classes[int(golden.probabilities.argmax())]
        assert told["probability"] == max(given)
        assert told["labels"] == [told["label"]]


@pytest.mark.parametrize(
    ("cut", "fault"), [(None, "truncated"), (0, "empty"), (-1, "not an image")]
)
def test_what_is_no_image_is_refused_with_its_fault_and_the_next_one_is_answered(
    cut: int | None, fault: str, port: int, path: Path
) -> None:
    data = load(path).golden[0].data
    body = {None: data[: len(data) // 2], 0: b"", -1: b"not an image at all"}[cut]
    status, told = ask(port, "POST", "/predict", body)
    assert status == 422
    assert told["detail"].startswith(fault)
    assert ask(port, "POST", "/predict", data)[0] == 200


def test_a_body_beyond_the_limit_is_refused_whether_or_not_it_says_its_length(port: int) -> None:
    big = b"\xff\xd8\xff" + bytes(MOST)
    status, told = ask(port, "POST", "/predict", big)
    assert (status, told["detail"]) == (413, f"too large: more than {MOST} bytes")
    pieces = [big[at : at + 10_000] for at in range(0, len(big), 10_000)]
    status, _ = ask(port, "POST", "/predict", iter(pieces), encode_chunked=True)
    assert status == 413
    assert ask(port, "GET", "/healthz")[0] == 200
