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
def reference_store(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose extraction was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert finish(start(folder, image_folder, "whole"))["counts"]["decoded"] == 72
    return folder / "whole"


def stop_after_next_shard(
    process: subprocess.Popen[str], shards: Path, stop_signal: signal.Signals
) -> str:
    """Stop the process when it has written another shard; return its stderr."""
    shard_count = len(list(shards.glob("*.arrow")))
    while process.poll() is None and len(list(shards.glob("*.arrow"))) == shard_count:
        time.sleep(0.02)
    process.send_signal(stop_signal)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == (130 if stop_signal is signal.SIGINT else -stop_signal), errors
    return errors


def test_interrupted_and_killed_extraction_resumes_to_the_same_bytes(
    image_folder, reference_store, tmp_path
):
    shards = tmp_path / "stopped" / "shards"
    output = stop_after_next_shard(start(tmp_path, image_folder, "stopped"), shards, signal.SIGINT)
    assert "Run the same command again" in output
    stop_after_next_shard(start(tmp_path, image_folder, "stopped"), shards, signal.SIGKILL)
    shards_before = list(shards.glob("*.arrow"))
    assert not (tmp_path / "stopped" / "manifest.json").exists()
    result = finish(start(tmp_path, image_folder, "stopped"))
    assert result["counts"]["decoded"] < 72 - 8
    assert result["counts"]["decoded"] + result["counts"]["reused"] == 72
    assert {shard.name for shard in shards_before} < {
        shard.name for shard in shards.glob("*.arrow")
    }
    for name in ("manifest.json", *(f"shards/{file.name}" for file in shards.glob("*.arrow"))):
        assert (tmp_path / "stopped" / name).read_bytes() == (reference_store / name).read_bytes()


# ------------------------------------------------------------------------- two workers on a Ray

SMALL = ["--body", "shufflenet_v2_x0_5", "--weights", "random", "--size", "64"]
CHUNKS = ["--chunk-size", "8"]
STOP_TIMEOUT_SECONDS = 40  # from the signal to the end; 4 to 10 seconds on an idle machine


@dataclass(frozen=True)
class CommandFolder:
    """A folder with a tracking store, and commands of two workers in it."""

    folder: Path

    def start(self, *words: object) -> subprocess.Popen[str]:
        """Start a command with a Ray of its own, as from a terminal."""
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
        """Command lines, by process id, of all processes that the commands have started."""
        marker, result = f"STOPPED_FOLDER={self.folder}\0".encode(), {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and marker in (entry / "environ").read_bytes() + b"\0":
                    command_line = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                    result[int(entry.name)] = command_line.decode(errors="replace")
        return result

    def stop(
        self,
        command: subprocess.Popen[str],
        stop_signal: signal.Signals,
        condition: Callable[[], object],
    ) -> str:
        """Stop a command when the condition holds; return its stderr. No process may remain."""
        deadline = time.monotonic() + 300
        while command.poll() is None and not condition():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert command.poll() is None, command.communicate()
        command.send_signal(stop_signal)
        _, output = command.communicate(timeout=STOP_TIMEOUT_SECONDS)
        assert command.returncode == 130, output
        assert "Run the same command again" in output
        assert "Traceback" not in output
        deadline = time.monotonic() + 5  # killed processes take a moment to disappear
        while remaining := self.processes():
            assert time.monotonic() < deadline, remaining
            time.sleep(0.1)
        return output

    def runs(self, verb: str) -> list[str]:
        """Final status of the runs of a verb and their children, oldest first."""
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=f"sqlite:///{self.folder}/mlflow.db")
        experiment = client.get_experiment_by_name("arrowhead")
        result = client.search_runs([experiment.experiment_id], order_by=["start_time"])
        return [run.info.status for run in result if run.info.run_name == verb]


@pytest.fixture
def command_folder(
    tmp_path: Path, add_mlflow_db: Callable[[Path], Path]
) -> Iterator[CommandFolder]:
    result = CommandFolder(add_mlflow_db(tmp_path))
    yield result
    for pid in result.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def process_runs(command_folder: CommandFolder, text: str) -> Callable[[], bool]:
    return lambda: any(text in line for line in command_folder.processes().values())


def test_two_workers_stopped_during_ray_start_and_decoding_resume(command_folder, image_folder):
    arguments = ["precompute", image_folder, "store", *SMALL, *CHUNKS]
    shards = command_folder.folder / "store" / "shards"
    output = command_folder.stop(
        command_folder.start(*arguments),
        signal.SIGTERM,
        process_runs(command_folder, "/raylet/raylet "),
    )
    assert "interrupted by SIGTERM" in output
    assert command_folder.runs("precompute") == ["KILLED"]
    command_folder.stop(
        command_folder.start(*arguments), signal.SIGINT, lambda: list(shards.glob("*.arrow"))
    )
    assert command_folder.runs("precompute") == ["KILLED", "KILLED"]
    shards_before = len(list(shards.glob("*.arrow")))
    assert shards_before
    result = finish(command_folder.start(*arguments, "--json"))
    assert result["counts"]["skipped"] >= shards_before
    assert result["counts"]["decoded"] + result["counts"]["reused"] == 72
    assert command_folder.runs("precompute") == ["KILLED", "KILLED", "FINISHED"]


def test_two_workers_stopped_during_training_resume_in_the_same_run(
    command_folder, image_folder, command
):
    command("precompute", image_folder, command_folder.folder / "store", *SMALL)
    arguments = ["train", "store", "b", "--head", "linear", "--epochs", "20000", "--rate", "0.01"]
    arguments += ["--checkpoint-seconds", "0"]

    def checkpoints() -> set[str]:
        return {path.name for path in (command_folder.folder / ".b.training").rglob("heads-*")}

    command_folder.stop(command_folder.start(*arguments), signal.SIGTERM, checkpoints)
    first_checkpoints = checkpoints()
    assert first_checkpoints
    statuses_before = command_folder.runs("train")
    assert {*statuses_before} == {"KILLED"}
    command_folder.stop(
        command_folder.start(*arguments), signal.SIGHUP, lambda: checkpoints() - first_checkpoints
    )
    assert max(checkpoints()) > max(first_checkpoints)
    assert command_folder.runs("train") == statuses_before


def test_two_workers_stopped_during_scoring_resume(command_folder, image_folder, make_bundle):
    arguments = ["score", make_bundle(name="resnet18"), image_folder, "scores", *CHUNKS]
    parts = command_folder.folder / "scores" / "parts"
    command_folder.stop(
        command_folder.start(*arguments), signal.SIGTERM, lambda: list(parts.glob("part-*"))
    )
    parts_before = len(list(parts.glob("part-*")))
    assert parts_before
    assert command_folder.runs("score") == ["KILLED"]
    result = finish(command_folder.start(*arguments, "--json"))
    assert result["counts"]["skipped"] >= parts_before
    assert command_folder.runs("score") == ["KILLED", "FINISHED"]


def test_stopped_run_is_marked_killed_though_ray_is_unresponsive(
    command_folder, image_folder, command
):
    """A stopped service stops Ray's processes, too, so nothing may depend on their answers."""
    command("precompute", image_folder, command_folder.folder / "store", *SMALL)
    arguments = ["train", "store", "b", "--head", "linear", "--epochs", "20000", "--rate", "0.01"]
    train = command_folder.start(*arguments, "--checkpoint-seconds", "0")
    deadline = time.monotonic() + 300
    while not list((command_folder.folder / ".b.training").glob("attempt-*/heads-??????")):
        assert train.poll() is None, train.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for pid, line in command_folder.processes().items():
        if "/raylet/raylet " in line or "gcs_server " in line:
            os.kill(pid, signal.SIGSTOP)
    train.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 30  # after 60 seconds Ray itself would end the process
    while "RUNNING" in command_folder.runs("train"):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert {*command_folder.runs("train")} == {"KILLED"}
    train.kill()
    train.communicate(timeout=30)
