"""What a stopped command leaves behind, and how it resumes (`make test-slow`)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
    output = strike(start(tmp_path, drawn, "stopped"), shards, signal.SIGINT)
    assert "Run the same command again" in output
    strike(start(tmp_path, drawn, "stopped"), shards, signal.SIGKILL)
    done = list(shards.glob("*.arrow"))
    assert not (tmp_path / "stopped" / "manifest.json").exists()
    again = finish(start(tmp_path, drawn, "stopped"))
    assert again["counts"]["decoded"] < 72 - 8
    assert again["counts"]["decoded"] + again["counts"]["reused"] == 72
    assert {shard.name for shard in done} < {shard.name for shard in shards.glob("*.arrow")}
    for name in ("manifest.json", *(f"shards/{file.name}" for file in shards.glob("*.arrow"))):
        assert (tmp_path / "stopped" / name).read_bytes() == (whole / name).read_bytes()


# ------------------------------------------------------------------------- two workers on a Ray

SMALL = ["--body", "shufflenet_v2_x0_5", "--weights", "random", "--size", "64"]
CHUNKS = ["--chunk-size", "8"]
SECONDS = 40  # from a signal to the end; 4 to 10 where nothing else runs


@dataclass(frozen=True)
class Place:
    """A folder with a tracking store, and commands of two workers in it."""

    folder: Path

    def start(self, *words: object) -> subprocess.Popen[str]:
        """A command with a Ray of its own, as a terminal starts it."""
        env = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
        return forks.Popen(
            [sys.executable, "-m", "arrowhead", *map(str, words), "--workers", "2"],
            cwd=self.folder,
            env=env | {"STOPPED_FOLDER": str(self.folder), "RAY_USAGE_STATS_ENABLED": "0"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def processes(self) -> dict[int, str]:
        """Command lines, by process id, of what the commands have started."""
        mark, result = f"STOPPED_FOLDER={self.folder}\0".encode(), {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes() + b"\0":
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                    result[int(entry.name)] = line.decode(errors="replace")
        return result

    def stop(
        self, command: subprocess.Popen[str], blow: signal.Signals, there: Callable[[], object]
    ) -> str:
        """Stop a command when something is there; what it said. It leaves no process behind."""
        until = time.monotonic() + 300
        while command.poll() is None and not there():
            assert time.monotonic() < until
            time.sleep(0.05)
        assert command.poll() is None, command.communicate()
        command.send_signal(blow)
        _, output = command.communicate(timeout=SECONDS)
        assert command.returncode == 130, output
        assert "Run the same command again" in output
        assert "Traceback" not in output
        until = time.monotonic() + 5  # what was killed takes a moment
        while left := self.processes():
            assert time.monotonic() < until, left
            time.sleep(0.1)
        return output

    def runs(self, verb: str) -> list[str]:
        """How the runs of a verb and their children ended, the oldest first."""
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=f"sqlite:///{self.folder}/mlflow.db")
        experiment = client.get_experiment_by_name("arrowhead")
        result = client.search_runs([experiment.experiment_id], order_by=["start_time"])
        return [run.info.status for run in result if run.info.run_name == verb]


@pytest.fixture
def place(tmp_path: Path, tracked: Callable[[Path], Path]) -> Iterator[Place]:
    result = Place(tracked(tmp_path))
    yield result
    for pid in result.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def is_there(place: Place, word: str) -> Callable[[], bool]:
    return lambda: any(word in line for line in place.processes().values())


def test_two_workers_that_are_stopped_while_ray_starts_and_while_they_decode_go_on(place, drawn):
    words = ["precompute", drawn, "store", *SMALL, *CHUNKS]
    shards = place.folder / "store" / "shards"
    output = place.stop(place.start(*words), signal.SIGTERM, is_there(place, "/raylet/raylet "))
    assert "interrupted by SIGTERM" in output
    assert place.runs("precompute") == ["KILLED"]
    place.stop(place.start(*words), signal.SIGINT, lambda: list(shards.glob("*.arrow")))
    assert place.runs("precompute") == ["KILLED", "KILLED"]
    done = len(list(shards.glob("*.arrow")))
    assert done
    again = finish(place.start(*words, "--json"))
    assert again["counts"]["skipped"] >= done
    assert again["counts"]["decoded"] + again["counts"]["reused"] == 72
    assert place.runs("precompute") == ["KILLED", "KILLED", "FINISHED"]


def test_two_workers_that_are_stopped_while_they_train_go_on_in_the_same_run(place, drawn, command):
    command("precompute", drawn, place.folder / "store", *SMALL)
    words = ["train", "store", "b", "--head", "linear", "--epochs", "20000", "--rate", "0.01"]
    words += ["--checkpoint-seconds", "0"]

    def kept() -> set[str]:
        return {path.name for path in (place.folder / ".b.training").rglob("heads-*")}

    place.stop(place.start(*words), signal.SIGTERM, kept)
    first = kept()
    assert first
    before = place.runs("train")
    assert {*before} == {"KILLED"}
    place.stop(place.start(*words), signal.SIGHUP, lambda: kept() - first)
    assert max(kept()) > max(first)
    assert place.runs("train") == before


def test_two_workers_that_are_stopped_while_they_score_go_on(place, drawn, bundled):
    words = ["score", bundled(), drawn, "scores", *CHUNKS]
    parts = place.folder / "scores" / "parts"
    place.stop(place.start(*words), signal.SIGTERM, lambda: list(parts.glob("part-*")))
    done = len(list(parts.glob("part-*")))
    assert done
    assert place.runs("score") == ["KILLED"]
    again = finish(place.start(*words, "--json"))
    assert again["counts"]["skipped"] >= done
    assert place.runs("score") == ["KILLED", "FINISHED"]


def test_a_stopped_run_is_killed_though_its_ray_answers_no_more(place, drawn, command):
    """Whoever stops a whole service stops Ray's processes, too: nothing may be asked of them."""
    command("precompute", drawn, place.folder / "store", *SMALL)
    words = ["train", "store", "b", "--head", "linear", "--epochs", "20000", "--rate", "0.01"]
    train = place.start(*words, "--checkpoint-seconds", "0")
    until = time.monotonic() + 300
    while not list((place.folder / ".b.training").glob("attempt-*/heads-??????")):
        assert train.poll() is None, train.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)
    for pid, line in place.processes().items():
        if "/raylet/raylet " in line or "gcs_server " in line:
            os.kill(pid, signal.SIGSTOP)
    train.send_signal(signal.SIGTERM)
    until = time.monotonic() + 30  # after 60, Ray itself would end the process
    while "RUNNING" in place.runs("train"):
        assert time.monotonic() < until
        time.sleep(0.5)
    assert {*place.runs("train")} == {"KILLED"}
    train.kill()
    train.communicate(timeout=30)
