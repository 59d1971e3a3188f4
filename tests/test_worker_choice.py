"""`--workers auto`: one process, one worker per GPU, or the cluster that an address names."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from arrowhead.runtime import worker_choice
from arrowhead.runtime.ray_cluster import LaunchConfig
from arrowhead.runtime.worker_choice import choose_workers

# A machine with two GPUs, as far as the choice of workers is concerned.
TWO_GPUS = (
    "import sys; from arrowhead.runtime import worker_choice; from arrowhead.cli.main import main;"
    " worker_choice.local_gpus = lambda: 2; main(sys.argv[1:])"
)


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.parametrize(
    ("gpus", "workers", "words"),
    [(0, 0, "has no GPU"), (1, 0, "on its GPU"), (2, 2, "one for each GPU"), (8, 8, "8 workers")],
)
def test_auto_is_one_process_up_to_one_gpu_and_then_one_worker_per_gpu(
    gpus, workers, words, monkeypatch
):
    monkeypatch.setattr(worker_choice, "local_gpus", lambda: gpus)
    config, line = choose_workers(LaunchConfig(restarts=1), "fit")
    assert (config.workers, config.restarts) == (workers, 1)
    assert words in line


def test_heads_are_trained_in_one_process_however_many_gpus_there_are(monkeypatch):
    monkeypatch.setattr(worker_choice, "local_gpus", lambda: 8)
    config, line = choose_workers(LaunchConfig(), "train")
    assert (config.workers, line) == (0, "")


@pytest.mark.parametrize(("command", "workers"), [("score", (1, 1024)), ("train", (1, 1))])
@pytest.mark.parametrize("source", ["flag", "RAY_ADDRESS"])
def test_auto_uses_the_cluster_that_an_address_names(command, workers, source, monkeypatch):
    address = "10.0.0.1:6379" if source == "flag" else None
    if address is None:
        monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    config, line = choose_workers(LaunchConfig(address=address), command)
    assert (config.min_workers, config.max_workers) == workers
    assert "10.0.0.1:6379" in line
    assert ("RAY_ADDRESS" in line) == (source == "RAY_ADDRESS")


def test_a_given_number_of_workers_is_kept(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    for workers in (0, "2", "1:2"):
        assert choose_workers(LaunchConfig(workers=workers), "fit") == (
            LaunchConfig(workers=workers),
            "",
        )


@pytest.mark.slow
def test_two_gpus_get_two_workers_without_a_flag_and_without_a_word_about_ray(
    image_folder, tmp_path
):
    """Two CPU workers stand in for two GPUs."""
    arguments = [
        "precompute",
        image_folder,
        "--body",
        "resnet18",
        "--weights",
        "random",
        "--size",
        "32",
    ]
    for name, program in (
        ("two", ["-c", TWO_GPUS]),
        ("one", ["-m", "arrowhead"]),
    ):
        completed = subprocess.run(
            [sys.executable, *program, *map(str, arguments), name],
            cwd=tmp_path,
            text=True,
            capture_output=True,
            timeout=300,
        )
        output = completed.stdout + completed.stderr
        assert completed.returncode == 0, output
        assert not re.search(r"\bray\b", output, re.IGNORECASE)
        assert ("running on 2 workers: one for each GPU of this machine" in output) == (
            name == "two"
        )
    assert shards(tmp_path / "two") == shards(tmp_path / "one")


def shards(store: Path) -> dict[str, bytes]:
    """The bytes of the shards of a store, by name."""
    files = (store / "shards").glob("*.arrow")
    result = {file.name: file.read_bytes() for file in files}
    assert result
    return result
