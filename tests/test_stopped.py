"""What a stopped extraction leaves behind, and how it goes on (`make test-slow`)."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import forks
import pytest

pytestmark = pytest.mark.slow

FLAGS = ["--body", "resnet18", "--weights", "random", "--size", "224", "--chunk-size", "8"]


def start(folder: Path, data: Path, store: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "arrowhead", "precompute", str(data), store, *FLAGS, "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return forks.Popen(command, cwd=folder, text=True, **pipes)


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return dict(json.loads(out.splitlines()[-1]))


@pytest.fixture(scope="module")
def whole(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert finish(start(folder, drawn, "whole"))["counts"]["decoded"] == 72
    return folder / "whole"


def strike(stopped: subprocess.Popen[str], shards: Path, blow: signal.Signals) -> str:
    """Stop it when it has written a shard more; what it said."""
    there = len(list(shards.glob("*.arrow")))
    while stopped.poll() is None and len(list(shards.glob("*.arrow"))) == there:
        time.sleep(0.02)
    stopped.send_signal(blow)
    _, err = stopped.communicate(timeout=300)
    assert stopped.returncode == (130 if blow is signal.SIGINT else -blow), err
    return err


def test_an_extraction_that_ctrl_c_and_kill_9_stopped_ends_with_the_same_bytes(
    drawn, whole, tmp_path
):
    shards = tmp_path / "stopped" / "shards"
    said = strike(start(tmp_path, drawn, "stopped"), shards, signal.SIGINT)
    assert "Run the same command again" in said
    strike(start(tmp_path, drawn, "stopped"), shards, signal.SIGKILL)
    done = list(shards.glob("*.arrow"))
    assert not (tmp_path / "stopped" / "manifest.json").exists()
    again = finish(start(tmp_path, drawn, "stopped"))
    assert again["counts"]["decoded"] < 72 - 8
    assert again["counts"]["decoded"] + again["counts"]["reused"] == 72
    assert {shard.name for shard in done} < {shard.name for shard in shards.glob("*.arrow")}
    for name in ("manifest.json", *(f"shards/{file.name}" for file in shards.glob("*.arrow"))):
        assert (tmp_path / "stopped" / name).read_bytes() == (whole / name).read_bytes()
