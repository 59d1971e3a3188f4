"""kill -9 of a worker, the driver, the raylet or the GCS: the same bytes in the end.

`make test` kills each once or so; `make chaos` kills twenty times at random moments.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Long enough to be killed in the middle: tens of chunks of tenths of a second.
FLAGS = ["--body", "resnet18", "--weights", "random", "--size", "128", "--chunk-size", "8"]
IMAGES = 192


@pytest.fixture(scope="module")
def data(many: Path) -> Path:
    return many


@pytest.fixture(scope="module")
def whole(data: Path) -> dict[str, bytes]:
    """The files of a store that nobody disturbed."""
    command = start(data.parent, data, "whole", workers=0)
    assert finish(command)["counts"]["decoded"] == IMAGES
    return files(data.parent / "whole")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A working directory; nothing of ours runs in it afterwards."""
    yield tmp_path
    for process in ours(tmp_path):
        os.kill(process, signal.SIGKILL)


def start(folder: Path, data: Path, store: str, workers: int) -> subprocess.Popen[str]:
    return run(folder, ["precompute", str(data), store, *FLAGS, "--workers", str(workers)])


def run(folder: Path, words: list[str]) -> subprocess.Popen[str]:
    scratch = folder / "r"
    scratch.mkdir(exist_ok=True)
    # A name that tells our processes from others', short enough for a Unix socket.
    short = Path("/tmp") / f"ah{abs(hash(str(folder))) % 10**8}"
    if not short.is_symlink():
        short.symlink_to(scratch)
    home = {"HOME": str(folder), "RAY_TMPDIR": str(short), "RAY_USAGE_STATS_ENABLED": "0"}
    return subprocess.Popen(
        [sys.executable, "-m", "arrowhead", *words, "--json"],
        cwd=folder,
        env=os.environ | home | {"KILLS_FOLDER": str(folder)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> dict[str, Any]:
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, err[-4000:]
    return dict(json.loads(out.splitlines()[-1]))


def files(store: Path) -> dict[str, bytes]:
    named = [store / "manifest.json", *sorted((store / "shards").glob("*.arrow"))]
    return {file.name: file.read_bytes() for file in named}


def ours(folder: Path) -> dict[int, str]:
    """Processes of commands started in this folder: pid to command line."""
    mark, found = f"KILLS_FOLDER={folder}\0".encode(), {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark in (entry / "environ").read_bytes() + b"\0":
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(entry.name)] = line.decode(errors="replace")
            except OSError:
                continue
    return found


VICTIMS = {
    "worker": lambda line: line.startswith("ray::") and "TrainWorker" in line,
    "raylet": lambda line: "/raylet/raylet " in line,
    "gcs": lambda line: "gcs_server " in line,
}


def strike(command: subprocess.Popen[str], folder: Path, victim: str, draw: random.Random) -> bool:
    """Kill a process of that kind; False if there was none (any more)."""
    if victim == "driver":
        command.kill()
        return True
    found = [pid for pid, line in ours(folder).items() if VICTIMS[victim](line)]
    if not found or command.poll() is not None:
        return False
    os.kill(draw.choice(sorted(found)), signal.SIGKILL)
    return True


def until_shards(command: subprocess.Popen[str], store: Path, count: int) -> None:
    while command.poll() is None and len(list((store / "shards").glob("*.arrow"))) < count:
        time.sleep(0.05)


def settled(folder: Path) -> None:
    """Wait until nothing of a dead command is left, then see that nothing is."""
    for _ in range(100):
        if not ours(folder):
            return
        time.sleep(0.1)
    for process in ours(folder):  # Ray's own agents may outlive their raylet
        os.kill(process, signal.SIGKILL)


def until_on(command: subprocess.Popen[str], store: Path, more: int) -> None:
    """Until it has written some more shards."""
    until_shards(command, store, len(list((store / "shards").glob("*.arrow"))) + more)


@pytest.mark.parametrize("victim", ["gcs", pytest.param("raylet", marks=pytest.mark.chaos)])
def test_a_killed_worker_is_replaced_and_a_killed_cluster_ends_the_command_which_goes_on(
    data, whole, folder, victim
):
    command = start(folder, data, "s", workers=2)
    until_on(command, folder / "s", 2)
    assert strike(command, folder, "worker", random.Random(0))
    until_on(command, folder / "s", 2)
    assert strike(command, folder, victim, random.Random(0)), command.communicate()[1]
    _, err = command.communicate(timeout=300)
    assert command.returncode == 130, err[-4000:]
    assert "started again" in err
    assert "run the same command again: it goes on" in err
    settled(folder)
    result = finish(start(folder, data, "s", workers=0))
    assert files(folder / "s") == whole
    assert result["counts"]["skipped"] >= 8 * 4
    assert result["counts"]["features"] == IMAGES


@pytest.mark.chaos
def test_scores_survive_kills_of_workers_cluster_and_driver(data, folder):
    """The parts of an undisturbed scoring are the measure."""
    few = ["--extract.chunk-size", "8", "--epochs", "1", "--rate", "0.01"]
    finish(run(folder, ["fit", str(data), "fit", *FLAGS[:-2], *few]))
    words = ["score", "fit/bundle", str(data), "calm", "--chunk-size", "8", "--flag-novel"]
    finish(run(folder, words))
    calm = {file.name: file.read_bytes() for file in (folder / "calm").glob("part-*")}
    words[3], draw = "shaken", random.Random(0)
    for victim in ("driver", "worker", "gcs", "driver", "worker", "raylet"):
        before = len(list((folder / "shaken").glob("part-*")))
        if before == len(calm):
            shutil.rmtree(folder / "shaken")
            before = 0
        command = run(folder, [*words, "--workers", "2"])
        while command.poll() is None and before + 2 > len(list((folder / "shaken").glob("part-*"))):
            time.sleep(0.05)
        assert strike(command, folder, victim, draw)
        _, err = command.communicate(timeout=600)
        settled(folder)
        assert command.returncode in (0, 130, -signal.SIGKILL), err[-4000:]
        print(f"killed {victim} with {before} parts there: exit code {command.returncode}")
    finish(run(folder, words))
    assert {file.name: file.read_bytes() for file in (folder / "shaken").glob("part-*")} == calm


@pytest.mark.chaos
@pytest.mark.parametrize("seed", [int(os.environ.get("CHAOS_SEED", "0"))])
def test_twenty_kills_at_random_moments_leave_the_same_bytes(data, whole, folder, seed):
    """Every kill is at a moment drawn between start-up and end; stores are begun anew when done."""
    draw = random.Random(seed)
    kinds = ["driver", "worker", "raylet", "gcs"] * 5
    draw.shuffle(kinds)
    struck: dict[str, int] = {}
    finished = 0
    while kinds:
        workers = 0 if kinds[-1] == "driver" and draw.random() < 0.5 else 2
        command = start(folder, data, "s", workers)
        before = len(list((folder / "s" / "shards").glob("*.arrow")))
        until_shards(command, folder / "s", before + draw.randrange(0, 6))
        time.sleep(draw.random() * 2)
        if command.poll() is None and strike(command, folder, kinds[-1], draw):
            struck[kinds[-1]] = struck.get(kinds[-1], 0) + 1
            print(f"killed {kinds.pop()} with {before} shards there, {workers} workers", flush=True)
        _, err = command.communicate(timeout=600)
        settled(folder)
        wanted = (0, 130, -signal.SIGKILL)
        assert command.returncode in wanted, (command.returncode, err[-4000:])
        if command.returncode == 0:
            finished += 1
            assert files(folder / "s") == whole
            shutil.rmtree(folder / "s")
    finish(start(folder, data, "s", workers=0))
    assert files(folder / "s") == whole
    assert sum(struck.values()) == 20, struck
    print(struck, f"finished {finished} times in between")
