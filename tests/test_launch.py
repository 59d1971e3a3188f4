"""Stages on workers are started again where they stopped, on fewer workers if necessary.

Run as a program, this file is one command: `test_launch.py SCENARIO FOLDER`, so that drivers and
workers can be killed without harm to the tests.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import forks
import pytest

from arrowhead import ConfigError
from arrowhead.runtime import launch as runtime_launch
from arrowhead.runtime import task_queue
from arrowhead.runtime.ray_cluster import LaunchConfig, enable_token_auth
from arrowhead.runtime.task_queue import TaskQueue
from arrowhead.runtime.worker import Worker

EPOCHS, ROWS, KEY = 12, 40, "k"


def count(worker: Worker, directory: Path, epochs: int, seconds_per_epoch: float) -> dict[str, Any]:
    """Sum rows over all ranks in every epoch; resume from the newest checkpoint."""
    import time

    import torch
    import torch.distributed as dist

    from arrowhead.training import checkpoint

    output: list[str] = []
    last = checkpoint.newest(directory, KEY, output.append)
    total = last.tensors["total"] if last else torch.zeros(ROWS, dtype=torch.float64)
    first = last.number + 1 if last else 0
    worker.report({"pid": os.getpid(), "rank": worker.rank, "first": first})
    spent = []
    for epoch in range(first, epochs):
        task = worker.next_task()
        time.sleep(
            seconds_per_epoch
        )  # long against the rest: a kill finds tasks claimed and not done
        rows = torch.zeros(ROWS, dtype=torch.float64)
        mine = range(worker.rank, ROWS, worker.world_size)
        rows[list(mine)] = torch.tensor([float(row * (epoch + 1)) for row in mine]).double()
        if worker.world_size > 1:
            dist.all_reduce(rows)
        total += rows
        if task is not None:
            worker.report({"task": task, "rank": worker.rank})
        draft = checkpoint.draft_path(directory) if worker.rank == 0 else None
        if draft is not None:
            checkpoint.write(draft, {"total": total}, {"key": KEY, "number": epoch})
        start = time.perf_counter()
        worker.save_checkpoint(draft, f"epoch-{epoch:04}")
        spent.append(time.perf_counter() - start)
        if worker.rank == 0:
            checkpoint.prune(directory, KEY)
            worker.report({"epoch": epoch, "world": worker.world_size})
    while (task := worker.next_task()) is not None:
        worker.report({"task": task, "rank": worker.rank})
    return {"total": total.tolist(), "first": first, "said": output, "keep": sorted(spent)}


def expected(epochs: int = EPOCHS) -> list[float]:
    return [float(row * sum(range(1, epochs + 1))) for row in range(ROWS)]


# ------------------------------------------------------------------- this file as a command


def alone(folder: Path) -> dict[str, Any]:
    """In one process, slowly enough to be killed."""
    return dict(
        runtime_launch.run(count, folder / "place", EPOCHS, 0.2, checkpoint_dir=folder / "place")
    )


def shrink(folder: Path) -> dict[str, Any]:
    """On 1:2 workers; one is killed, and its CPU is given to somebody else."""
    import ray

    reports: list[dict[str, Any]] = []
    sizes: list[int] = []
    cpu_holders: list[Any] = []

    @ray.remote(num_cpus=1)
    class CpuHolder:
        pass

    def listen(report: dict[str, Any]) -> None:
        reports.append(report)
        if report.get("epoch") == 4 and not cpu_holders:
            cpu_holders.append(CpuHolder.remote())  # waits until the group gives its room back
            victim = next(one["pid"] for one in reports if one.get("rank") == 1 and "pid" in one)
            os.kill(victim, signal.SIGKILL)

    result = runtime_launch.run(
        count,
        folder / "place",
        EPOCHS,
        0.3,
        config=LaunchConfig(workers="1:2"),
        tasks=list(range(20)),
        on_report=listen,
        checkpoint_dir=folder / "place",
        on_start=sizes.append,
    )
    return {**result, "sizes": sizes, "heard": reports}


def grow(folder: Path) -> dict[str, Any]:
    """On 1:2 workers of a cluster of one CPU; another machine joins in mid-run."""
    import ray
    from ray.cluster_utils import Cluster

    enable_token_auth()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="warning")
    reports: list[dict[str, Any]] = []
    sizes: list[int] = []

    def listen(report: dict[str, Any]) -> None:
        reports.append(report)
        if report.get("epoch") == 2 and len(sizes) == 1:
            cluster.add_node(num_cpus=1)

    result = runtime_launch.run(
        count,
        folder / "place",
        150,
        1.0,
        config=LaunchConfig(workers="1:2"),
        tasks=list(range(60)),
        on_report=listen,
        checkpoint_dir=folder / "place",
        on_start=sizes.append,
    )
    return {**result, "sizes": sizes, "heard": reports}


def command(folder: Path, scenario: str) -> subprocess.Popen[str]:
    (folder / "r").mkdir(exist_ok=True)
    short = Path("/tmp") / f"ahl{abs(hash(str(folder))) % 10**8}"  # Unix sockets: short paths
    if not short.is_symlink():
        short.symlink_to(folder / "r")
    home = {"HOME": str(folder), "RAY_TMPDIR": str(short), "RAY_USAGE_STATS_ENABLED": "0"}
    return forks.Popen(
        [sys.executable, __file__, scenario, str(folder)],
        env=os.environ | home,
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=580)
    assert process.returncode == 0, err[-4000:]
    return dict(json.loads(out.splitlines()[-1]))


# ------------------------------------------------------------------------------- promises


def test_a_checkpoint_is_saved_in_the_checkpoint_directory_under_its_name(tmp_path):
    folder = tmp_path / "place"
    result = runtime_launch.run(count, folder, 3, 0.0, checkpoint_dir=folder)
    assert result["total"] == expected(3)
    assert sorted(path.name for path in folder.iterdir()) == ["epoch-0001", "epoch-0002"]
    again = runtime_launch.run(count, folder, 5, 0.0, checkpoint_dir=folder)
    assert (again["first"], again["total"]) == (3, expected(5))


def test_a_checkpoint_saved_under_an_existing_name_replaces_it(tmp_path):
    folder = tmp_path / "place"

    def twice(worker: Worker) -> None:
        for word in ("old", "new"):
            draft = folder / ".x.draft"
            draft.mkdir(parents=True)
            (draft / "word").write_text(word)
            worker.save_checkpoint(draft, "same")

    runtime_launch.run(twice, checkpoint_dir=folder)
    assert [path.name for path in folder.iterdir()] == ["same"]
    assert (folder / "same" / "word").read_text() == "new"


def test_without_a_checkpoint_directory_checkpoints_are_discarded(tmp_path):
    draft = tmp_path / "draft"

    def once(worker: Worker) -> bool:
        draft.mkdir()
        worker.save_checkpoint(draft, "name")
        return draft.exists()

    assert runtime_launch.run(once) is False
    assert list(tmp_path.iterdir()) == []


def test_a_run_in_one_process_does_not_import_ray():
    words = "import sys; from arrowhead.runtime import launch; sys.modules['ray'] = None"
    words += (
        "; print(launch.run(lambda worker: (worker.next_task(), worker.world_size), tasks=[7]))"
    )
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "(7, 1)\n", "")


@pytest.mark.slow
def test_a_killed_command_resumes_from_its_newest_checkpoint(tmp_path):
    first = command(tmp_path, "alone")
    while first.poll() is None and not list((tmp_path / "place").glob("epoch-*")):
        time.sleep(0.02)
    time.sleep(0.5)
    first.kill()
    first.communicate(timeout=300)
    again = finish(command(tmp_path, "alone"))
    assert 0 < again["first"] < EPOCHS
    assert again["total"] == expected()


@pytest.mark.slow
def test_after_a_killed_worker_an_elastic_group_continues_with_the_workers_that_fit(tmp_path):
    # On the head of a cluster that may bring GPUs: a Ray of our own there has none.
    machine = {"resources": {"CPU": 8, "GPU": 8}, "max_workers": 4}
    grown = {"available_node_types": {"gpu": machine}, "max_workers": 4, "head_node_type": "gpu"}
    (tmp_path / "ray_bootstrap_config.yaml").write_text(json.dumps(grown))
    result = finish(command(tmp_path, "shrink"))
    assert result["sizes"] == [2, 1]
    assert result["total"] == expected()
    assert result["first"] >= 4  # not from the beginning
    worlds = {one["epoch"]: one["world"] for one in result["heard"] if "epoch" in one}
    assert sorted(worlds) == list(range(EPOCHS))
    assert worlds[3] == 2
    assert worlds[EPOCHS - 1] == 1
    done = Counter(one["task"] for one in result["heard"] if "task" in one)
    assert done == Counter(range(20))
    assert sum("restart" in one for one in result["heard"]) == 1
    left = list((tmp_path / "place").rglob("checkpoint.json"))
    assert [path.parent.name for path in sorted(left)] == ["epoch-0010", "epoch-0011"]


@pytest.mark.slow
def test_an_elastic_group_grows_when_a_machine_joins(tmp_path):
    result = finish(command(tmp_path, "grow"))
    assert result["sizes"] == [1, 2]
    assert result["total"] == expected(150)
    assert result["first"] > 2
    done = Counter(one["task"] for one in result["heard"] if "task" in one)
    assert done == Counter(range(60))
    assert not any("restart" in one for one in result["heard"])


def test_unfinished_tasks_are_claimed_again_when_the_group_restarts():
    queue = TaskQueue([3, 5, 7])
    queue.start_group(2)
    assert [queue.next_task(), queue.next_task()] == [3, 5]
    queue.report({"task": 3})
    queue.start_group(1)
    assert [queue.next_task(), queue.next_task(), queue.next_task()] == [5, 7, None]
    queue.report({"task": 5})
    queue.report({"task": 5})  # of a worker that was already given up
    assert queue.take_reports() == [{"workers": 2}, {"task": 3}, {"workers": 1}, {"task": 5}]


def test_a_host_without_heartbeat_is_reported_once_and_a_finished_one_never(monkeypatch):
    monkeypatch.setattr(task_queue, "HEARTBEAT_TIMEOUT_SECONDS", 0.2)
    queue = TaskQueue([])
    for rank, host in enumerate(["calm", "cut", "done"]):
        queue.heartbeat(rank, host)
    queue.finish_worker(2)
    time.sleep(0.3)
    queue.heartbeat(0, "calm")
    assert queue.take_reports() == [{"silent": "cut"}]
    assert queue.take_reports() == []
    queue.start_group(1)
    assert queue.take_reports() == [{"workers": 1}]


def test_a_draining_machine_gets_no_more_tasks_and_is_reported_once():
    queue = TaskQueue([3, 5])
    queue.heartbeat(0, "host-a", "a")
    queue.heartbeat(1, "host-b", "b")
    assert queue.next_task("a") == 3
    queue.set_draining({"a": 1_795_634_185_000, "elsewhere": 0})
    queue.finish_worker(0)
    assert queue.next_task("a") is None
    assert queue.next_task("b") == 5
    assert queue.take_reports() == [{"leaving": "host-a", "until": 1_795_634_185_000}]
    assert queue.take_reports() == []


@pytest.mark.parametrize(
    ("workers", "min_workers", "max_workers"),
    [("auto", 0, 0), (0, 0, 0), (2, 2, 2), ("2", 2, 2), ("1:2", 1, 2), ("3:3", 3, 3)],
)
def test_workers_are_a_number_or_a_range(workers, min_workers, max_workers):
    config = LaunchConfig(workers=workers)
    assert (config.min_workers, config.max_workers) == (min_workers, max_workers)


@pytest.mark.parametrize("workers", [-1, "-1", "0:2", "2:1", "1:", ":2", "1:2:3", "two", "", "1.5"])
def test_workers_that_are_neither_a_number_nor_a_range_are_refused(workers):
    with pytest.raises(ConfigError, match="--workers is"):
        LaunchConfig(workers=workers)


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan")])
def test_a_wait_that_is_not_positive_is_refused(seconds):
    with pytest.raises(ConfigError, match="--wait is"):
        LaunchConfig(wait=seconds)


def test_flags_and_config_files_accept_workers_as_number_or_range(tmp_path):
    import cyclopts

    seen: list[LaunchConfig] = []
    (tmp_path / "number.toml").write_text("[launch]\nworkers = 2\n")
    (tmp_path / "range.toml").write_text('[launch]\nworkers = "1:2"\n')
    for name, words in {
        "number.toml": [],
        "range.toml": [],
        "none.toml": ["--launch.workers", "1:2"],
        "no.toml": ["--launch.workers", "2"],
    }.items():
        config = cyclopts.config.Toml(tmp_path / name, must_exist=False)
        app = cyclopts.App(config=config, result_action="return_value")

        @app.default
        def verb(launch: LaunchConfig = LaunchConfig()) -> None:
            seen.append(launch)

        app(words)
    assert [one.workers for one in seen] == [2, "1:2", "1:2", 2]


if __name__ == "__main__":
    scenarios = {"alone": alone, "shrink": shrink, "grow": grow}
    print(json.dumps(scenarios[sys.argv[1]](Path(sys.argv[2]))))
