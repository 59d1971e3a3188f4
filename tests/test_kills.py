"""Two workers on a real Ray give the same bytes and metrics as one process, even if one is killed.

`make test-slow` kills a worker and the cluster; `make chaos` kills twenty times at random moments.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import AddMlflowDb

from arrowhead.features.store import Store

pytestmark = pytest.mark.slow

# Long enough to be killed in the middle: tens of chunks of tenths of a second.
FLAGS = ["--body", "resnet18", "--weights", "random", "--size", "128", "--chunk-size", "8"]
IMAGES = 192
COPIES = 4  # of each image, where a cluster is killed while it scores


@pytest.fixture(scope="module")
def data(folder_of_192: Path) -> Path:
    return folder_of_192


@pytest.fixture(scope="module")
def undisturbed(data: Path) -> dict[str, bytes]:
    """The files of a store that was extracted without kills."""
    (result,) = finish(start(data.parent, data, "whole", workers=0))
    assert result["counts"]["decoded"] == IMAGES
    return files(data.parent / "whole")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A working directory; nothing of ours runs in it afterwards."""
    yield tmp_path
    for process in our_processes(tmp_path):
        os.kill(process, signal.SIGKILL)


def start(folder: Path, data: Path, store: str, workers: int) -> subprocess.Popen[str]:
    return run(folder, ["precompute", str(data), store, *FLAGS, "--workers", str(workers)])


PROGRAM = """
import json, sys
from arrowhead.cli.main import main
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit as ended:
        if ended.code:
            raise
"""


def run(folder: Path, *commands: list[str]) -> subprocess.Popen[str]:
    """Commands in one process, and so on one Ray: another would take half a minute."""
    scratch = folder / "r"
    scratch.mkdir(exist_ok=True)
    # A name that tells our processes from others', short enough for a Unix socket.
    short = Path("/tmp") / f"ah{abs(hash(str(folder))) % 10**8}"
    if not short.is_symlink():
        short.symlink_to(scratch)
    home = {"HOME": str(folder), "RAY_TMPDIR": str(short), "RAY_USAGE_STATS_ENABLED": "0"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps([[*words, "--json"] for words in commands])],
        cwd=folder,
        env=os.environ | home | {"KILLS_FOLDER": str(folder)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[str], lines: int = 1) -> list[dict[str, Any]]:
    """The results of its commands."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-4000:]
    assert len(results(out)) == lines
    return results(out)


def results(out: str) -> list[dict[str, Any]]:
    """Of commands that wrote this; dumps of a dying Ray are among it."""
    return [json.loads(line) for line in out.splitlines() if line.startswith('{"')]


def files(store: Path) -> dict[str, bytes]:
    named = [store / "manifest.json", *sorted((store / "shards").glob("*.arrow"))]
    return {file.name: file.read_bytes() for file in named}


def our_processes(folder: Path) -> dict[int, str]:
    """Processes of commands started in this folder: pid to command line."""
    mark, result = f"KILLS_FOLDER={folder}\0".encode(), {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark in (entry / "environ").read_bytes() + b"\0":
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                    result[int(entry.name)] = line.decode(errors="replace")
            except OSError:
                continue
    return result


VICTIMS = {
    "worker": lambda line: line.startswith("ray::") and "TrainWorker" in line,
    "raylet": lambda line: "/raylet/raylet " in line,
    "gcs": lambda line: "gcs_server " in line,
}


def kill_victim(
    command: subprocess.Popen[str], folder: Path, victim: str, rng: random.Random
) -> bool:
    """Kill a process of that kind; False if there was none (any more)."""
    if victim == "driver":
        command.kill()
        return True
    result = [pid for pid, line in our_processes(folder).items() if VICTIMS[victim](line)]
    if not result or command.poll() is not None:
        return False
    os.kill(rng.choice(sorted(result)), signal.SIGKILL)
    return True


def until_files(command: subprocess.Popen[str], folder: Path, kind: str, more: int) -> None:
    """Until it has written so many more files of a kind."""
    count = len(list(folder.glob(kind))) + more
    while command.poll() is None and len(list(folder.glob(kind))) < count:
        time.sleep(0.05)


def wait_for_no_processes(folder: Path) -> None:
    """Wait until nothing of a dead command is left, then see that nothing is."""
    for _ in range(100):
        if not our_processes(folder):
            return
        time.sleep(0.1)
    for process in our_processes(folder):  # Ray's own agents may outlive their raylet
        os.kill(process, signal.SIGKILL)


# ------------------------------------------------------------------------------- promises


@dataclass(frozen=True)
class Pair:
    """A fit and a scoring of one process, `alone` and `one`, and those of two workers, `group` and
    `two`: disturbed, the first by a killed worker, the other by a killed cluster.
    """

    folder: Path
    alone: dict[str, Any]
    group: dict[str, Any]
    scored: dict[str, Any]
    """Standard error of the last command, which ends the scoring that the killed cluster left."""
    stderr: str


@pytest.fixture(scope="module")
def pair(
    data: Path, add_mlflow_db: AddMlflowDb, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    folder = add_mlflow_db(tmp_path_factory.mktemp("pair"))
    # 13 rows a step: the last is one of few. What the finder says on two: tests/test_lr_finder.py.
    head = ["--head", "lesson", "--dropout", "0.25", "--epochs", "3", "--batch-size", "13"]
    head += ["--rate", "0.01", "--extract.chunk-size", "8", *FLAGS[:-2]]
    # Workers go on for seconds after the cluster's head is killed: there must be enough to do.
    for file in data.rglob("*.jpg"):
        for copy in range(COPIES):
            target = folder / "photos" / str(copy) / file.relative_to(data)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.hardlink_to(file)
    score = ["score", "alone/bundle", "photos", "--features", "--flag-novel", "--probabilities"]
    score += ["--chunk-size", "8"]
    two = ["--workers", "2"]
    try:
        alone = finish(run(folder, ["fit", str(data), "alone", *head], [*score, "one"]), lines=2)
        command = run(folder, ["fit", str(data), "group", *head, *two], [*score, "two", *two])
        until_files(command, folder / "group" / "store" / "shards", "*.arrow", 2)
        assert kill_victim(command, folder, "worker", random.Random(0)), command.communicate()[1]
        until_files(command, folder / "two" / "parts", "part-*", 2)
        assert kill_victim(command, folder, "gcs", random.Random(0)), command.communicate()[1]
        out, output = command.communicate(timeout=300)
        assert command.returncode == 130, output[-4000:]
        wait_for_no_processes(folder)
        (scored,) = finish(run(folder, [*score, "two"]))
        yield Pair(folder, alone[0], results(out)[0], scored, output)
    finally:
        for process in our_processes(folder):
            os.kill(process, signal.SIGKILL)


def test_two_workers_write_the_same_shards_as_one_even_if_one_is_killed(pair):
    assert "started again" in pair.stderr
    assert len(list((pair.folder / "alone" / "store" / "shards").glob("*.arrow"))) > 8
    assert files(pair.folder / "group" / "store") == files(pair.folder / "alone" / "store")
    # What the killed worker had written and not yet reported (a chunk) is found again by content.
    once, twice = dict(pair.alone["counts"]), dict(pair.group["counts"])
    result = twice.pop("looked_up")
    shards = Store(pair.folder / "alone" / "store").manifest()["shards"]
    chunk_sizes = {shard["files"] for shard in shards}  # 8 images or about as many
    assert once.pop("looked_up") == 0
    assert result in {0, *chunk_sizes}
    assert twice.pop("reused") - once.pop("reused") == result
    assert once.pop("decoded") - twice.pop("decoded") == result
    assert twice == once


def test_two_workers_have_the_same_metrics_as_one_in_every_epoch(pair):
    """The lesson's head: batch norm and dropout are those of the global batch."""
    assert len(pair.group["epochs"]) == 3
    for one, two in zip(pair.alone["epochs"], pair.group["epochs"], strict=True):
        assert two == pytest.approx(one, rel=1e-4)


def test_two_workers_write_the_same_scores_even_if_their_cluster_is_killed(pair):
    assert "run the same command again: it continues" in pair.stderr
    parts = sorted((pair.folder / "one" / "parts").glob("part-*"))
    assert len(parts) > 8
    assert 0 < pair.scored["counts"]["skipped"] < COPIES * IMAGES
    for part in parts:
        assert (pair.folder / "two" / "parts" / part.name).read_bytes() == part.read_bytes()


def test_the_token_of_a_local_ray_is_readable_by_its_owner_only(pair):
    assert (pair.folder / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("victim", ["gcs", "raylet"])
def test_an_extraction_resumes_after_its_cluster_is_killed(data, undisturbed, folder, victim):
    command = start(folder, data, "s", workers=2)
    until_files(command, folder / "s" / "shards", "*.arrow", 4)
    assert kill_victim(command, folder, victim, random.Random(0)), command.communicate()[1]
    _, err = command.communicate(timeout=300)
    assert command.returncode == 130, err[-4000:]
    assert "run the same command again: it continues" in err
    wait_for_no_processes(folder)
    (result,) = finish(start(folder, data, "s", workers=0))
    assert files(folder / "s") == undisturbed
    assert result["counts"]["skipped"] >= 8 * 4
    assert result["counts"]["features"] == IMAGES


def test_scores_survive_kills_of_workers_cluster_and_driver(data, folder):
    """The parts of an undisturbed scoring are the measure."""
    flags = ["--extract.chunk-size", "8", "--epochs", "1", "--rate", "0.01"]
    finish(run(folder, ["fit", str(data), "fit", *FLAGS[:-2], *flags]))
    words = ["score", "fit/bundle", str(data), "calm", "--chunk-size", "8", "--flag-novel"]
    finish(run(folder, words))
    expected_parts = {
        file.name: file.read_bytes() for file in (folder / "calm" / "parts").glob("part-*")
    }
    words[3], rng = "shaken", random.Random(0)
    for victim in ("driver", "worker", "gcs", "driver", "worker", "raylet"):
        before = len(list((folder / "shaken" / "parts").glob("part-*")))
        if before > len(expected_parts) - 10:  # too little is left to be struck in its middle
            shutil.rmtree(folder / "shaken")
            before = 0
        command = run(folder, [*words, "--workers", "2"])
        until_files(command, folder / "shaken" / "parts", "part-*", 2)
        assert kill_victim(command, folder, victim, rng)
        _, err = command.communicate(timeout=600)
        wait_for_no_processes(folder)
        assert command.returncode in (0, 130, -signal.SIGKILL), err[-4000:]
        print(f"killed {victim} with {before} parts there: exit code {command.returncode}")
    finish(run(folder, words))
    shaken = (folder / "shaken" / "parts").glob("part-*")
    assert {file.name: file.read_bytes() for file in shaken} == expected_parts


@pytest.mark.chaos
@pytest.mark.parametrize("seed", [int(os.environ.get("CHAOS_SEED", "0"))])
def test_after_twenty_kills_at_random_moments_a_store_has_the_same_bytes(
    data, undisturbed, folder, seed
):
    """Every kill is at a moment drawn between start-up and end; stores are begun anew when done."""
    rng = random.Random(seed)
    kinds = ["driver", "worker", "raylet", "gcs"] * 5
    rng.shuffle(kinds)
    kills: dict[str, int] = {}
    finished = 0
    while kinds:
        workers = 0 if kinds[-1] == "driver" and rng.random() < 0.5 else 2
        command = start(folder, data, "s", workers)
        before = len(list((folder / "s" / "shards").glob("*.arrow")))
        until_files(command, folder / "s" / "shards", "*.arrow", rng.randrange(0, 6))
        time.sleep(rng.random() * 2)
        if command.poll() is None and kill_victim(command, folder, kinds[-1], rng):
            kills[kinds[-1]] = kills.get(kinds[-1], 0) + 1
            print(f"killed {kinds.pop()} with {before} shards there, {workers} workers", flush=True)
        _, err = command.communicate(timeout=600)
        wait_for_no_processes(folder)
        wanted = (0, 130, -signal.SIGKILL)
        assert command.returncode in wanted, (command.returncode, err[-4000:])
        if command.returncode == 0:
            finished += 1
            assert files(folder / "s") == undisturbed
            shutil.rmtree(folder / "s")
    finish(start(folder, data, "s", workers=0))
    assert files(folder / "s") == undisturbed
    assert sum(kills.values()) == 20, kills
    print(kills, f"finished {finished} times in between")
