"""deploy/scoring.py under Ray Serve gives the bundle's predictions over HTTP."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from conftest import MakeBundle

from arrowhead.bundle.format import load

ROOT = Path(__file__).resolve().parents[1]

SERVE_SCRIPT = """
import sys
import ray
from ray import serve
from deploy.scoring import build

ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
serve.run(build({"bundle": sys.argv[2], "max_bytes": 100_000}), name="scoring")
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_served_bundle_gives_its_own_predictions(make_bundle: MakeBundle, tmp_path: Path) -> None:
    probe = subprocess.run([sys.executable, "-c", "from ray import serve"], capture_output=True)
    if probe.returncode:
        pytest.skip("Ray Serve is not installed (arrowhead[serve])")
    path = make_bundle()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    ports = f"{ROOT}/src:{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    server = subprocess.Popen(
        [sys.executable, "-c", SERVE_SCRIPT, str(port), str(path)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": ports, "HOME": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "log").open("wb"),
        text=True,
    )
    try:
        assert server.stdout is not None
        lines = iter(server.stdout.readline, "")
        assert any(line == "ready\n" for line in lines), (tmp_path / "log").read_text()[-3000:]

        def ask(body: bytes) -> tuple[int, dict[str, object]]:
            request = urllib.request.Request(f"http://127.0.0.1:{port}/predict", body)
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return answer.status, json.load(answer)
            except urllib.error.HTTPError as error:
                return error.code, json.load(error)

        bundle = load(path)
        for golden in bundle.golden:
            status, result = ask(golden.data)
            assert status == 200
            expected = np.array([result["probabilities"][name] for name in bundle.classes])  # type: ignore[index]
            assert np.abs(expected - golden.probabilities).max() < 1e-5
        assert ask(b"no image")[0] == 422
        assert ask(bytes(100_001))[0] == 413
    finally:
        server.communicate("", timeout=120)
    assert server.returncode == 0, (tmp_path / "log").read_text()[-3000:]
