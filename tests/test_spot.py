"""Machines that an autoscaler adds and a cloud takes back: every task runs once (`make test-slow`).

The machines are raylets that Ray's own autoscaler starts on this one (its fake provider).
Run as a program, this file is a driver: `test_spot.py ADDRESS FOLDER SCENARIO`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from arrowhead import ConfigError, LostError
from arrowhead.runtime import launch
from arrowhead.runtime.ray_cluster import LaunchConfig
from arrowhead.runtime.worker import Worker

HEAD_NODE = "f" * 51 + "00000"
# What Ray's AutoscalingCluster does, without its `ray stop`, which would end every Ray here.
FAKE = {
    "RAY_FAKE_CLUSTER": "1",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": HEAD_NODE,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_NODE,
}


GOING = re.compile(
    r"\S+ will be taken away at \d\d:\d\d:\d\d: it gets no new work, the others continue"
)


def work(worker: Worker, folder: Path, nap: float) -> None:
    """Takes tasks until there are none; notes on the disk where each is begun and done."""
    node = ray.get_runtime_context().get_node_id()
    while (task := worker.next_task()) is not None:
        note(folder, {"begun": task, "node": node})
        time.sleep(nap)
        note(folder, {"done": task, "node": node})
        worker.report({"task": task, "node": node})


def note(folder: Path, what: dict[str, Any]) -> None:
    with (folder / "notes").open("a") as file:
        file.write(json.dumps(what) + "\n")


# ------------------------------------------------------------------- this file as a command


def drain(address: str, nodes: set[str], seconds: int) -> None:
    """What a cloud's notice comes to: the machines will be taken back in so many seconds."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    why = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    until = int(1000 * (time.time() + seconds))
    for node in nodes:
        accepted, error = GcsClient(address=address).drain_node(node, why, "spot", until)
        assert accepted, error


def drive(address: str, folder: Path, scenario: str) -> dict[str, Any]:
    heard: list[dict[str, Any]] = []
    sizes: list[int] = []
    drained: set[str] = set()

    def listen(report: dict[str, Any]) -> None:
        heard.append(report)
        done = [one["node"] for one in heard if "task" in one]
        if scenario in ("one", "all") and "task" in report and len(done) == 6:
            drained.update(done if scenario == "all" else done[-1:])
            drain(address, drained, 10)

    launch.run(
        work,
        folder,
        0.5,
        config=LaunchConfig(workers="1:2" if scenario == "all" else "2:3", address=address),
        tasks=list(range({"one": 60, "all": 20}[scenario])),
        on_report=listen,
        on_start=sizes.append,
    )
    refused = refusal(address, folder, "5:6")
    return {"heard": heard, "sizes": sizes, "drained": sorted(drained), "refused": refused}


def refusal(address: str, folder: Path, workers: int | str) -> str:
    """Why so many workers are not had."""
    config = LaunchConfig(workers=workers, restarts=0, address=address)
    with pytest.raises((ConfigError, LostError)) as refused:
        launch.run(work, folder, 0.5, config=config, tasks=[0])
    return str(refused.value)


# ------------------------------------------------------------------------------- promises


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, Path]]:
    """One that has no machine for work yet, and four of one CPU when it is full-grown."""
    with autoscaled({"CPU": 1}) as result:
        yield result


@contextlib.contextmanager
def autoscaled(machine: dict[str, int]) -> Iterator[tuple[str, Path]]:
    """A head with an autoscaler: its address, and the folder that its processes are known by."""
    folder = Path(tempfile.mkdtemp(prefix="ahs", dir="/tmp"))
    (folder / ".ray").mkdir(mode=0o700)
    (folder / ".ray" / "auth_token").write_text("7" * 64)
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
    address = f"{ray.util.get_node_ip_address()}:{port}"
    # Ray's `fake_multinode` by its class: the defaults that go with that name are not in the wheel.
    fake = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    provider = {"type": "external", "module": fake, "head_node_id": HEAD_NODE}
    provider |= {"gcs_address": address, "launch_multiple": True, "disable_node_updaters": True}
    commands = ["initialization_commands", "setup_commands"]
    commands += [f"{kind}_setup_commands" for kind in ("head", "worker")]
    commands += [f"{kind}_start_ray_commands" for kind in ("head", "worker")]
    config = {key: [] for key in commands} | {
        "cluster_name": "spot",
        "cluster_synced_files": [],
        "file_mounts": {},
        "auth": {},
        "max_workers": 4,
        "idle_timeout_minutes": 10,
        "provider": provider,
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0},
            "spot": {
                "resources": machine | {"object_store_memory": 100_000_000},
                "node_config": {},
                "max_workers": 4,
            },
        },
    }
    (folder / "ray_bootstrap_config.yaml").write_text(json.dumps(config))
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    here = [f"--port={port}", f"--temp-dir={folder}/t"]
    more = [
        f"--autoscaling-config={folder}/ray_bootstrap_config.yaml",
        "--num-cpus=0",
        "--include-dashboard=false",
    ]
    with (folder / "log").open("wb") as log:
        head = subprocess.Popen(
            [*start, *here, *more, "--object-store-memory=100000000"],
            env=environment(folder) | FAKE,
            stdout=log,
            stderr=log,
        )
    try:
        while b"runtime started" not in (folder / "log").read_bytes():
            assert head.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)
        yield address, folder
    finally:
        while result := ours(folder):
            for pid in result:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            head.poll()
            time.sleep(0.1)
        shutil.rmtree(folder, ignore_errors=True)


def environment(folder: Path) -> dict[str, str]:
    own = {"HOME": str(folder), "RAY_TMPDIR": f"{folder}/t", "SPOT_FOLDER": str(folder)}
    return os.environ | own | {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}


def ours(folder: Path) -> list[int]:
    mark, result = f"SPOT_FOLDER={folder}\0".encode(), []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes() + b"\0":
                result.append(int(entry.name))
    return result


def run(cluster: tuple[str, Path], folder: Path, scenario: str) -> dict[str, Any]:
    address, home = cluster
    done = subprocess.run(
        [sys.executable, __file__, address, str(folder), scenario],
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    (folder / "notes").touch()
    notes = [json.loads(line) for line in (folder / "notes").read_text().splitlines()]
    return json.loads(done.stdout.splitlines()[-1]) | {"notes": notes}


def done(found: dict[str, Any]) -> Counter[int]:
    return Counter(one["task"] for one in found["heard"] if "task" in one)


def told(found: dict[str, Any], kind: str) -> list[str]:
    return [one[kind] for one in found["heard"] if kind in one]


def count(found: dict[str, Any], kind: str, nodes: list[str]) -> Counter[int]:
    return Counter(one[kind] for one in found["notes"] if kind in one and one["node"] in nodes)


@pytest.mark.slow
def test_a_range_scales_from_zero_and_a_machine_announced_to_go_costs_nothing(cluster, tmp_path):
    result = run(cluster, tmp_path, "one")
    assert told(result, "warning")[0] == "waiting for 2 workers: the cluster has room for 0"
    assert "--workers is 5:6; the cluster can grow to 4 at most" in result["refused"]
    assert result["sizes"][0] in (2, 3)
    assert done(result) == Counter(range(60))
    assert told(result, "restart") == ["A machine was taken away, as announced"]
    # It ends what it has; a group that is started again loses what its other workers had in hand.
    gone = result["drained"]
    assert count(result, "begun", gone) == count(result, "done", gone)
    begun = Counter(one["begun"] for one in result["notes"] if "begun" in one)
    assert sum(begun.values()) - 60 <= sum(result["sizes"][:-1]) - 1
    # From the moment that it is told of it takes nothing more, and the others go on.
    (told_at,) = (
        at for at, one in enumerate(result["heard"]) if GOING.fullmatch(one.get("warning", ""))
    )
    again = next(at for at, one in enumerate(result["heard"]) if "restart" in one)
    between = [one["node"] for one in result["heard"][told_at:again] if "node" in one]
    assert sum(node in gone for node in between) <= 1  # what it had in hand
    assert any(node not in gone for node in between)


@pytest.mark.slow
def test_when_all_machines_are_announced_to_go_the_work_moves_to_others(cluster, tmp_path):
    result = run(cluster, tmp_path, "all")
    assert done(result) == Counter(range(20))
    assert told(result, "restart") == ["Every machine with workers will be taken away"]
    assert Counter(one["begun"] for one in result["notes"] if "begun" in one) == Counter(range(20))
    last = next(one["node"] for one in reversed(result["heard"]) if "node" in one)
    assert last not in result["drained"]


@pytest.mark.slow
def test_gpus_that_no_machine_has_yet_are_asked_for(tmp_path):
    """The machine that comes has its GPU in Ray's books only, and nccl says so."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here, so nccl would not miss it")
    with autoscaled({"CPU": 1, "GPU": 1}) as cluster:
        result = run(cluster, tmp_path, "gpu")
    assert "requires at least one CUDA device" in result["refused"]


if __name__ == "__main__":
    address, folder, scenario = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    if scenario == "gpu":
        print(json.dumps({"refused": refusal(address, folder, 1)}))
    else:
        print(json.dumps(drive(address, folder, scenario)))
