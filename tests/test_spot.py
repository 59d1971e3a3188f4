"""Nodes that an autoscaler adds and a cloud preempts: every task runs once (`make test-slow`).

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
# Like Ray's AutoscalingCluster, but without its `ray stop`, which would end every Ray here.
FAKE_CLUSTER_ENV = {
    "RAY_FAKE_CLUSTER": "1",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": HEAD_NODE,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_NODE,
}


PREEMPTION_WARNING = re.compile(
    r"\S+ will be taken away at \d\d:\d\d:\d\d: it gets no new work, the others continue"
)


def work(worker: Worker, folder: Path, sleep_seconds: float) -> None:
    """Take tasks until there are none; write a note on disk when each is begun and done."""
    node = ray.get_runtime_context().get_node_id()
    while (task := worker.next_task()) is not None:
        write_note(folder, {"begun": task, "node": node})
        time.sleep(sleep_seconds)
        write_note(folder, {"done": task, "node": node})
        worker.report({"task": task, "node": node})


def write_note(folder: Path, entry: dict[str, Any]) -> None:
    with (folder / "notes").open("a") as file:
        file.write(json.dumps(entry) + "\n")


# ------------------------------------------------------------------- this file as a command


def drain(address: str, nodes: set[str], seconds: int) -> None:
    """Simulate a cloud's preemption notice: the nodes will be taken back in so many seconds."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline = int(1000 * (time.time() + seconds))
    for node in nodes:
        accepted, error = GcsClient(address=address).drain_node(node, reason, "spot", deadline)
        assert accepted, error


def run_scenario(address: str, folder: Path, scenario: str) -> dict[str, Any]:
    reports: list[dict[str, Any]] = []
    sizes: list[int] = []
    drained: set[str] = set()

    def on_report(report: dict[str, Any]) -> None:
        reports.append(report)
        finished_nodes = [event["node"] for event in reports if "task" in event]
        if scenario in ("one", "all") and "task" in report and len(finished_nodes) == 6:
            drained.update(finished_nodes if scenario == "all" else finished_nodes[-1:])
            drain(address, drained, 10)

    launch.run(
        work,
        folder,
        0.5,
        config=LaunchConfig(workers="1:2" if scenario == "all" else "2:3", address=address),
        tasks=list(range({"one": 60, "all": 20}[scenario])),
        on_report=on_report,
        on_start=sizes.append,
    )
    refused = refusal_message(address, folder, "5:6")
    return {"heard": reports, "sizes": sizes, "drained": sorted(drained), "refused": refused}


def refusal_message(address: str, folder: Path, workers: int | str) -> str:
    """The message that refuses so many workers."""
    config = LaunchConfig(workers=workers, restarts=0, address=address)
    with pytest.raises((ConfigError, LostError)) as error_info:
        launch.run(work, folder, 0.5, config=config, tasks=[0])
    return str(error_info.value)


# ------------------------------------------------------------------------------- promises


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, Path]]:
    """A cluster without worker nodes that can grow to four nodes of one CPU."""
    with autoscaling_cluster({"CPU": 1}) as result:
        yield result


@contextlib.contextmanager
def autoscaling_cluster(machine: dict[str, int]) -> Iterator[tuple[str, Path]]:
    """A head node with an autoscaler: its address, and the folder that marks its processes."""
    folder = Path(tempfile.mkdtemp(prefix="ahs", dir="/tmp"))
    (folder / ".ray").mkdir(mode=0o700)
    (folder / ".ray" / "auth_token").write_text("7" * 64)
    with socket.create_server(("", 0)) as probe:
        port = probe.getsockname()[1]
    address = f"{ray.util.get_node_ip_address()}:{port}"
    # By class, not as `fake_multinode`: the defaults for that name are not in the wheel.
    provider_class = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    provider = {"type": "external", "module": provider_class, "head_node_id": HEAD_NODE}
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
    location = [f"--port={port}", f"--temp-dir={folder}/t"]
    options = [
        f"--autoscaling-config={folder}/ray_bootstrap_config.yaml",
        "--num-cpus=0",
        "--include-dashboard=false",
    ]
    with (folder / "log").open("wb") as log:
        head = subprocess.Popen(
            [*start, *location, *options, "--object-store-memory=100000000"],
            env=environment(folder) | FAKE_CLUSTER_ENV,
            stdout=log,
            stderr=log,
        )
    try:
        while b"runtime started" not in (folder / "log").read_bytes():
            assert head.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)
        yield address, folder
    finally:
        while result := cluster_processes(folder):
            for pid in result:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            head.poll()
            time.sleep(0.1)
        shutil.rmtree(folder, ignore_errors=True)


def environment(folder: Path) -> dict[str, str]:
    variables = {"HOME": str(folder), "RAY_TMPDIR": f"{folder}/t", "SPOT_FOLDER": str(folder)}
    return os.environ | variables | {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}


def cluster_processes(folder: Path) -> list[int]:
    marker, result = f"SPOT_FOLDER={folder}\0".encode(), []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and marker in (entry / "environ").read_bytes() + b"\0":
                result.append(int(entry.name))
    return result


def run(cluster: tuple[str, Path], folder: Path, scenario: str) -> dict[str, Any]:
    address, home = cluster
    completed = subprocess.run(
        [sys.executable, __file__, address, str(folder), scenario],
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert completed.returncode == 0, completed.stderr[-6000:]
    (folder / "notes").touch()
    notes = [json.loads(line) for line in (folder / "notes").read_text().splitlines()]
    return json.loads(completed.stdout.splitlines()[-1]) | {"notes": notes}


def finished_tasks(result: dict[str, Any]) -> Counter[int]:
    return Counter(report["task"] for report in result["heard"] if "task" in report)


def reported(result: dict[str, Any], kind: str) -> list[str]:
    return [report[kind] for report in result["heard"] if kind in report]


def count_notes(result: dict[str, Any], kind: str, nodes: list[str]) -> Counter[int]:
    return Counter(
        entry[kind] for entry in result["notes"] if kind in entry and entry["node"] in nodes
    )


@pytest.mark.slow
def test_worker_range_scales_from_zero_and_a_preempted_node_loses_no_task(cluster, tmp_path):
    result = run(cluster, tmp_path, "one")
    assert reported(result, "warning")[0] == "waiting for 2 workers: the cluster has room for 0"
    assert "--workers is 5:6; the cluster can grow to 4 at most" in result["refused"]
    assert result["sizes"][0] in (2, 3)
    assert finished_tasks(result) == Counter(range(60))
    assert reported(result, "restart") == ["A machine was taken away, as announced"]
    # A worker finishes its task; a restarted group loses the tasks of its other workers.
    preempted = result["drained"]
    assert count_notes(result, "begun", preempted) == count_notes(result, "done", preempted)
    started = Counter(entry["begun"] for entry in result["notes"] if "begun" in entry)
    assert sum(started.values()) - 60 <= sum(result["sizes"][:-1]) - 1
    # After the warning the node takes no new task, and the others continue.
    (warned_at,) = (
        position
        for position, entry in enumerate(result["heard"])
        if PREEMPTION_WARNING.fullmatch(entry.get("warning", ""))
    )
    restarted_at = next(
        position for position, entry in enumerate(result["heard"]) if "restart" in entry
    )
    between = [
        entry["node"] for entry in result["heard"][warned_at:restarted_at] if "node" in entry
    ]
    assert sum(node in preempted for node in between) <= 1  # the task that it was working on
    assert any(node not in preempted for node in between)


@pytest.mark.slow
def test_work_moves_to_new_nodes_when_all_are_preempted(cluster, tmp_path):
    result = run(cluster, tmp_path, "all")
    assert finished_tasks(result) == Counter(range(20))
    assert reported(result, "restart") == ["Every machine with workers will be taken away"]
    assert Counter(entry["begun"] for entry in result["notes"] if "begun" in entry) == Counter(
        range(20)
    )
    last_node = next(entry["node"] for entry in reversed(result["heard"]) if "node" in entry)
    assert last_node not in result["drained"]


@pytest.mark.slow
def test_gpus_that_no_node_has_yet_are_requested(tmp_path):
    """The node that comes has a GPU only in Ray's bookkeeping, and torch reports that."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here, so torch would not miss it")
    with autoscaling_cluster({"CPU": 1, "GPU": 1}) as cluster:
        result = run(cluster, tmp_path, "gpu")
    assert "Found no NVIDIA driver" in result["refused"]


if __name__ == "__main__":
    address, folder, scenario = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    if scenario == "gpu":
        print(json.dumps({"refused": refusal_message(address, folder, 1)}))
    else:
        print(json.dumps(run_scenario(address, folder, scenario)))
