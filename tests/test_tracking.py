"""A run is recorded completely and once, whatever happens to server, process or disk."""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest

from arrowhead import ConfigError
from arrowhead.cli.main import main
from arrowhead.tracking import outbox, sender, writes
from arrowhead.tracking import run as tracking_run
from arrowhead.tracking.address import without_secrets
from arrowhead.tracking.client import TrackingConfig
from arrowhead.tracking.names import original
from arrowhead.tracking.registry import RegistryConfig
from arrowhead.tracking.run import Run, start
from arrowhead.tracking.store import TrackingStore


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an SQLite store shared by all tests here, because its schema takes seconds."""
    return tmp_path_factory.mktemp("tracking")


@pytest.fixture(autouse=True)
def _change_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def config(shared_folder: Path) -> TrackingConfig:
    """The shared store, without system metrics except in their own tests."""
    return TrackingConfig(tracking_uri=f"sqlite:///{shared_folder}/mlflow.db", system_metrics=False)


@pytest.fixture
def client(config: TrackingConfig) -> Any:
    return client_of(config)


def client_of(config: TrackingConfig) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=config.uri)


class Server:
    """A real `mlflow server` on loopback that can be killed and restarted."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.process = folder, None
        self.log = (folder / "server.log").open("wb")

    def __enter__(self) -> Server:
        address = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        backend = ["--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        artifacts = ["--artifacts-destination", str(self.folder / "artifacts")]
        argv = [sys.executable, "-m", "mlflow", "server", *address, *backend, *artifacts]
        # its job runner is not needed here
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        options: dict[str, Any] = {"stdout": self.log, "stderr": self.log, "env": environment}
        self.process = subprocess.Popen(argv, cwd=self.folder, start_new_session=True, **options)
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return self
            except OSError:
                time.sleep(0.1)
        pytest.fail((self.folder / "server.log").read_text())

    def kill(self) -> None:
        """Kill the server as a power cut would."""
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def __exit__(self, *error: object) -> None:
        self.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, shared_folder: Path) -> Iterator[Server]:
    result = Server(tmp_path_factory.mktemp("server"))
    # Copying the schema saves the server from creating it.
    if (shared_folder / "mlflow.db").exists():
        shutil.copy(shared_folder / "mlflow.db", result.folder / "server.db")
    with result:
        yield result
    result.log.close()


def metric_points(client: Any, run_id: str, name: str) -> list[tuple[int, float]]:
    """(step, value) of every point of a metric, including duplicates."""
    return sorted((point.step, point.value) for point in client.get_metric_history(run_id, name))


def make_outbox(base: Path, config: TrackingConfig, run_id: str) -> Path:
    """The folder of an outbox of a run, without writes."""
    folder = base / run_id
    folder.mkdir(parents=True)
    header = {"store": config.uri, "experiment": "1", "run_id": run_id}
    (folder / "run.json").write_text(json.dumps(header))
    return folder


def child_runs(client: Any, run_id: str) -> dict[str, Any]:
    """Child runs by name; fails if two have the same name."""
    experiment = client.get_run(run_id).info.experiment_id
    result = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{run_id}'")
    names = [run.info.run_name for run in result]
    assert len(set(names)) == len(names)
    return dict(zip(names, result, strict=True))


# ------------------------------------------------------------------------ what is logged


def test_importing_tracking_does_not_import_mlflow():
    code = "import sys; from arrowhead.tracking import run; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_everything_logged_can_be_read_back(config, client, tmp_path):
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "deep" / "a.txt").write_text("a")
    (tmp_path / "figure.png").write_bytes(b"png")
    with start(config, "fit") as run:
        run.params({"rate": 0.1, **{f"p{i}": i for i in range(150)}, "long": "x" * 7000})
        run.tags({f"t{i}": i for i in range(120)})
        run.record({"loss": 2.5, "bad": float("nan"), "text": "no number"}, 3)
        run.curve("curve", [float(i) for i in range(2500)])
        run.record({"accuracy.what? ü": 1})
        run.log_artifact(tmp_path / "figure.png", "figures")
        run.log_artifact(tmp_path / "folder")
        with run.child("train") as child:
            child.record({"loss": 1.0})
    result = client.get_run(run.run_id)
    assert result.info.status == "FINISHED"
    assert len(result.data.params) == 152
    assert result.data.params["rate"] == "0.1"
    assert {k: result.data.tags[k] for k in ("t0", "t119")} == {"t0": "0", "t119": "119"}
    assert metric_points(client, run.run_id, "loss") == [(3, 2.5)]
    assert np.isnan(result.data.metrics["bad"])
    assert result.data.metrics["accuracy.what_x3F_ ü"] == 1
    assert metric_points(client, run.run_id, "curve") == [(i, float(i)) for i in range(2500)]
    assert [f.path for f in client.list_artifacts(run.run_id, "figures")] == ["figures/figure.png"]
    deep = client.list_artifacts(run.run_id, "folder/deep")
    assert [file.path for file in deep] == ["folder/deep/a.txt"]
    assert child_runs(client, run.run_id)["train"].data.metrics == {"loss": 1.0}
    assert child_runs(client, run.run_id)["train"].info.status == "FINISHED"


def test_run_is_tagged_with_commit_user_command_and_version(config, client, tmp_path):
    user_info = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], [*user_info, "commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", *words], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    with start(config, "precompute") as run, run.child("extract") as child:
        pass
    expected = {
        "mlflow.source.git.commit": head.stdout.strip(),
        "mlflow.user": getpass.getuser(),
        "mlflow.source.name": "arrowhead precompute",
        "mlflow.source.type": "LOCAL",
        "arrowhead.version": "0.1.0",
    }
    tags = client.get_run(run.run_id).data.tags
    assert {name: tags.get(name) for name in expected} == expected
    below_tags = client.get_run(child.run_id).data.tags
    assert below_tags["mlflow.source.git.commit"] == head.stdout.strip()


@pytest.mark.parametrize(("place", "kind"), [("s3://bucket/dogs", "s3"), ("/data/dogs", "local")])
def test_mlflow_resolves_the_source_of_a_dataset(config, client, place, kind):
    import mlflow.data

    with start(config, "fit") as run:
        run.dataset(f"dogs-{kind}", "0123456789abcdef" * 4, place, "training")
    (given,) = client.get_run(run.run_id).inputs.dataset_inputs
    assert given.dataset.source_type == kind
    assert given.dataset.digest == "0123456789abcdef0123456789abcdef0123"
    assert mlflow.data.get_source(given.dataset).uri == place
    assert [(tag.key, tag.value) for tag in given.tags] == [("mlflow.data.context", "training")]


NAMES = ["a?b", "a#b", "x//y", "x/y", "../x", "/a", "a/", ".", "a\n", " a", "$10_", "=1+1", "<b>x"]
NAMES += ["_x3F_", "a:b", "猫", "😀", "e\u0301", "n" * 300, "n" * 299 + "m", "a" * 250, "'; --"]


@pytest.mark.parametrize("kind", ["database", "server"])
def test_every_class_name_has_its_own_metric_param_and_tag(config, request, kind):
    if kind == "server":
        server: Server = request.getfixturevalue("server")
        address = f"http://127.0.0.1:{server.port}"
        config = TrackingConfig(tracking_uri=address, system_metrics=False)
    output: list[str] = []
    with start(config, "score", print_line=output.append) as run:
        run.record({name: at for at, name in enumerate(NAMES)})
        run.params({name: at for at, name in enumerate(NAMES)})
        run.tags({f"seen {name}": at for at, name in enumerate(NAMES)})
    result = client_of(config).get_run(run.run_id).data
    assert output == []
    assert sorted(result.metrics.values()) == list(range(len(NAMES)))
    full = {k[-16:]: v for k, v in result.tags.items() if k.startswith("full_name.")}
    back = {
        original(k) if len(k) < 250 else full.get(k[-16:], k): v for k, v in result.params.items()
    }
    assert back == {name: str(at) for at, name in enumerate(NAMES)}
    assert len([name for name in result.tags if name.startswith("seen ")]) == len(NAMES)


def test_metric_refused_by_mlflow_only_prints_a_message(config, client, monkeypatch):
    # Simulate an MLflow with other naming rules.
    monkeypatch.setattr(writes, "mlflow_names", lambda names, taken: {one: one for one in names})
    output: list[str] = []
    with start(config, "fit", print_line=output.append) as run:
        run.record({"../x": 1.0})
        run.record({"../x": 2.0})
        run.record({"loss": 1.0})
    assert metric_points(client, run.run_id, "loss") == [(0, 1.0)]
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert len(output) == 1
    assert "refuses" in output[0]


def test_metric_refused_by_mlflow_does_not_block_others_in_the_outbox(config, client, tmp_path):
    with start(config, "fit", print_line=lambda line: None) as run:
        pass
    folder, output = make_outbox(tmp_path / "unsent", config, run.run_id), []
    with (folder / "writes.jsonl").open("w") as file:
        for name in ("loss", "../x", "accuracy"):
            write = {"do": "batch", "run": run.run_id, "metrics": [[name, 1.0, 5, 0]]}
            file.write(json.dumps(write | {"params": {}, "tags": {}}) + "\n")
    tracking_run.send(config, tmp_path / "unsent", output.append)
    assert metric_points(client, run.run_id, "loss") == [(0, 1.0)]
    assert metric_points(client, run.run_id, "accuracy") == [(0, 1.0)]
    assert ["refuses" in line for line in output] == [True, False]
    assert not folder.exists()


def test_damaged_lines_of_an_outbox_cost_nothing_else(config, client, tmp_path):
    with start(config, "fit", print_line=lambda line: None) as run:
        pass
    folder, output = make_outbox(tmp_path / "unsent", config, run.run_id), []
    whole = {"do": "batch", "run": run.run_id, "metrics": [["loss", 1.0, 5, 0]], "params": {}}
    gone = {"do": "file", "run": run.run_id, "path": "files/x/gone.txt", "folder": None}
    lines = [{"x": 1}, [1], 5, {"do": "zap"}, {"do": ["batch"]}, whole, whole | {"tags": {}}, gone]
    (folder / "writes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tracking_run.send(config, tmp_path / "unsent", output.append)
    assert metric_points(client, run.run_id, "loss") == [(0, 1.0)]
    assert "6 damaged lines" in output[0]
    assert "gone.txt" in output[1]
    assert not folder.exists()


def test_a_head_of_a_resumed_grid_is_sent_by_another_process_once(config, client, monkeypatch):
    file, do = Path("run.json"), TrackingStore.do
    with pytest.raises(RuntimeError), start(config, "fit", file) as run:
        raise RuntimeError
    tags = {"mlflow.parentRunId": run.run_id}
    experiment = client.get_run(run.run_id).info.experiment_id
    unfinished = client.create_run(experiment, tags=tags, run_name="head-0").info.run_id

    def fail(store: TrackingStore, write: Any, folder: Path) -> None:
        if write["do"] == "head":
            raise OSError("no answer")
        do(store, write, folder)

    monkeypatch.setattr(TrackingStore, "do", fail)
    with start(config, "fit", file, print_line=lambda line: None) as again:
        again.children(**head_runs(1))
    monkeypatch.setattr(TrackingStore, "do", do)
    tracking_run.send(config, print_line=lambda line: None)
    children = child_runs(client, run.run_id)
    assert [one.info.run_id for one in children.values()] == [unfinished]
    assert children["head-0"].info.status == "FINISHED"


def test_an_outbox_of_somebody_else_is_left_alone(config, tmp_path):
    folder, output = make_outbox(tmp_path / "unsent", config, "abc"), []
    (folder / "lock").mkdir()  # cannot be opened, as another user's cannot
    with start(config, "fit", outbox=tmp_path / "unsent", print_line=output.append):
        pass
    assert ["belongs to somebody else" in line for line in output] == [True]
    assert (folder / "run.json").exists()


def test_text_that_is_no_unicode_is_recorded_readably(config, client):
    output: list[str] = []
    with start(config, "fit", print_line=output.append) as run:
        run.params({"folder": "/x/\udcff"})
    assert client.get_run(run.run_id).data.params == {"folder": "/x/?"}
    assert not output


def test_system_metrics_of_a_short_run_have_samples_and_continue_on_resume(config, client):
    measured = TrackingConfig(tracking_uri=config.uri)
    name = "system/cpu_utilization_percentage"
    with pytest.raises(RuntimeError), start(measured, "fit", Path("run.json")) as run:
        time.sleep(2.5)
        raise RuntimeError
    first = metric_points(client, run.run_id, name)
    assert len(first) >= 2
    with start(measured, "fit", Path("run.json"), print_line=lambda line: None) as run:
        time.sleep(1)
    steps = [step for step, _ in metric_points(client, run.run_id, name)]
    assert steps == list(range(len(steps)))
    assert len(steps) > len(first)
    with start(config, "fit") as without:
        time.sleep(1)
    assert metric_points(client, without.run_id, name) == []


# ----------------------------------------------------------------------------- many heads


def head_runs(count: int, epochs: int = 3) -> dict[str, Any]:
    return {
        "names": [f"head-{i}" for i in range(count)],
        "params": [{"rate": 10.0**-i, "seed": i} for i in range(count)],
        "metrics": [
            {"loss": [(e, i + e / 10) for e in range(epochs)], "accuracy": [(0, i / count)]}
            for i in range(count)
        ],
    }


def test_each_head_of_a_grid_is_a_finished_child_run_with_its_metrics(config, client):
    with start(config, "train") as run:
        ids = run.children(**head_runs(5, 1200), tags={"grid": "g1"})
    result = child_runs(client, run.run_id)
    assert [result[f"head-{i}"].info.run_id for i in range(5)] == ids
    assert {one.info.status for one in result.values()} == {"FINISHED"}
    assert result["head-2"].data.params == {"rate": "0.01", "seed": "2"}
    assert result["head-2"].data.tags["grid"] == "g1"
    assert metric_points(client, ids[2], "loss") == [(e, 2 + e / 10) for e in range(1200)]
    best = client.search_runs(
        [result["head-0"].info.experiment_id],
        "tags.grid = 'g1'",
        order_by=["metrics.accuracy DESC"],
        max_results=1,
    )
    assert best[0].info.run_name == "head-4"


def test_resumed_grid_creates_only_missing_child_runs(config, client):
    with pytest.raises(RuntimeError), start(config, "train", Path("run.json")) as run:
        before = run.children(**head_runs(3))
        with run.child("head-3") as child:  # half written when the process died
            child.record({"loss": 3.0})
            raise RuntimeError
    with start(config, "train", Path("run.json"), print_line=lambda line: None) as run:
        after = run.children(**head_runs(5))
    assert after[:3] == before
    assert after[3] == child.run_id
    result = child_runs(client, run.run_id)
    assert result.keys() == {f"head-{i}" for i in range(5)}
    assert {one.info.status for one in result.values()} == {"FINISHED"}
    for i, run_id in enumerate(after):
        assert metric_points(client, run_id, "loss") == [(e, i + e / 10) for e in range(3)]


# ----------------------------------------------------------------- one run through crashes


def log_epochs(run: Run, count: int, **params: object) -> str:
    """Log what a command logs each time it runs; return the id of its child run."""
    run.params({"rate": 0.1, "text": "x" * 6500, **params})
    run.dataset("dogs", "abc", "/data/dogs", "training")
    with run.child("train") as child:
        child.curve("curve", [1.0, 2.0, 3.0])
        for epoch in range(count):
            child.record({"loss": 1 / (epoch + 1)}, epoch)
    return child.run_id


def test_failed_run_is_resumed_and_nothing_is_logged_twice(config, client):
    folder, output = Path("out/run.json"), []
    with pytest.raises(RuntimeError), start(config, "fit", folder) as first:
        child = log_epochs(first, 60, workers=2)
        raise RuntimeError
    assert client.get_run(first.run_id).info.status == "FAILED"
    assert json.loads(folder.read_text())["run_id"] == first.run_id
    with start(config, "fit", folder, print_line=output.append) as resumed:
        assert client.get_run(first.run_id).info.status == "RUNNING"
        assert log_epochs(resumed, 150, workers=4) == child
    assert resumed.run_id == first.run_id
    assert not folder.exists()
    result = client.get_run(first.run_id)
    assert result.info.status == "FINISHED"
    assert result.data.params["workers"] == "2"
    assert result.data.tags["resumed.workers"] == "4"
    assert sum("param workers" in line for line in output) == 1
    assert not any("param text" in line or "param rate" in line for line in output)
    assert len(result.inputs.dataset_inputs) == 1
    assert child_runs(client, first.run_id).keys() == {"train"}
    assert metric_points(client, child, "loss") == [(e, 1 / (e + 1)) for e in range(150)]
    assert metric_points(client, child, "curve") == [(0, 1.0), (1, 2.0), (2, 3.0)]
    with start(config, "fit", folder) as third:
        pass
    assert third.run_id != first.run_id


@pytest.mark.slow
def test_run_of_a_killed_process_is_finished_by_the_next_one(config, client, tmp_path):
    program = f"""
import os, signal
from pathlib import Path
from arrowhead.tracking.registry import RegistryConfig
from arrowhead.tracking.run import start
from arrowhead.tracking.address import without_secrets
from arrowhead.tracking.client import TrackingConfig
from arrowhead.tracking.names import original
config = TrackingConfig(tracking_uri={config.uri!r}, experiment="killed", system_metrics=False)
with start(config, "fit", Path("run.json")) as run:
    for step in range(4):
        run.record({{"loss": step}}, step)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    completed = subprocess.run([sys.executable, "-c", program], check=False, cwd=tmp_path)
    assert completed.returncode == -signal.SIGKILL
    killed = TrackingConfig(tracking_uri=config.uri, experiment="killed", system_metrics=False)
    with start(killed, "fit", Path("run.json"), print_line=lambda line: None) as run:
        for step in range(8):
            run.record({"loss": step}, step)
    (only,) = client.search_runs([client.get_experiment_by_name("killed").experiment_id])
    assert only.info.run_id == run.run_id
    assert metric_points(client, run.run_id, "loss") == [(e, e) for e in range(8)]


def test_process_killed_while_creating_its_run_leaves_one_run(config, client):
    folder = Path("run.json")
    with pytest.raises(RuntimeError), start(config, "fit", folder) as run:
        raise RuntimeError
    result = json.loads(folder.read_text())
    start_time = client.get_run(run.run_id).info.start_time
    folder.write_text(json.dumps(result | {"run_id": None, "start": start_time}))
    with start(config, "fit", folder, print_line=lambda line: None) as resumed:
        pass
    assert resumed.run_id == run.run_id
    folder.write_text(json.dumps(result | {"run_id": None, "start": 1}))
    with start(config, "fit", folder) as other:
        pass
    assert other.run_id != run.run_id


def test_interrupted_run_is_marked_killed_and_can_be_resumed(config, client):
    folder = Path("run.json")
    expect_interrupt = pytest.raises(KeyboardInterrupt)
    with expect_interrupt, start(config, "fit", folder) as run, run.child("train") as child:
        raise KeyboardInterrupt
    assert client.get_run(run.run_id).info.status == "KILLED"
    assert client.get_run(child.run_id).info.status == "KILLED"
    with start(config, "fit", folder, print_line=lambda line: None) as resumed:
        assert resumed.run_id == run.run_id


def test_interrupted_run_ends_though_its_store_is_unresponsive(
    config, client, tmp_path, monkeypatch
):
    monkeypatch.setattr(sender, "INTERRUPTED_SECONDS", 0.1)
    outboxes, lines, store_released = tmp_path / "unsent", [], threading.Event()
    with (
        pytest.raises(KeyboardInterrupt),
        start(config, "fit", outbox=outboxes, print_line=lines.append) as run,
        run.child("train") as child,
    ):
        assert child.run_id
        store = run._sender.store
        original_do, write_started = store.do, threading.Event()

        def hang(*arguments: Any) -> None:
            write_started.set()
            store_released.wait(60)
            original_do(*arguments)

        monkeypatch.setattr(store, "do", hang)
        run.record({"loss": 1.0})
        assert write_started.wait(60)
        raise KeyboardInterrupt
    assert "3 writes" in lines[-1] and str(outboxes) in lines[-1]
    store_released.set()
    tracking_run.send(config, outboxes, lines.append)
    for ended_run in (run, child):
        assert client.get_run(ended_run.run_id).info.status == "KILLED"
    assert metric_points(client, run.run_id, "loss") == [(0, 1.0)]


@pytest.mark.slow
def test_unsent_writes_of_a_killed_command_are_sent_by_the_next(config, client, tmp_path):
    program = f"""
import os
from arrowhead.tracking import store
from arrowhead.tracking.client import TrackingConfig
from arrowhead.tracking.run import start
with start(TrackingConfig(tracking_uri={config.uri!r}, system_metrics=False), "fit") as run:
    store.TrackingStore.do = lambda *arguments: __import__("time").sleep(60)
    for step in range(5):
        run.record({{"loss": float(step)}}, step)
    print(run.run_id, flush=True)
    os.kill(os.getpid(), 9)
"""
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    lines: list[str] = []
    tracking_run.send(config, print_line=lines.append)
    run_id = killed.stdout.strip()
    assert metric_points(client, run_id, "loss") == [(step, float(step)) for step in range(5)]
    assert lines[-1].endswith(f"what was kept of run {run_id}")
    assert not Path(".arrowhead").exists()


def test_refused_request_leaves_no_run_unless_it_had_done_work(config, client):
    folder = Path("run.json")
    with pytest.raises(ConfigError), start(config, "fit", folder) as run, run.child("a") as child:
        raise ConfigError("a", "b", "c")
    for refused_run in (run, child):
        assert client.get_run(refused_run.run_id).info.lifecycle_stage == "deleted"
    assert not folder.exists()
    with pytest.raises(RuntimeError), start(config, "fit", folder) as run:
        raise RuntimeError
    with pytest.raises(ConfigError), start(config, "fit", folder, print_line=lambda line: None):
        raise ConfigError("a", "b", "c")
    assert client.get_run(run.run_id).info.lifecycle_stage == "active"
    assert folder.exists()


@pytest.mark.parametrize("how", ["torn", "foreign", "verb", "deleted", "finished"])
def test_invalid_run_file_starts_a_new_run_with_a_message(config, client, how):
    folder, output = Path("run.json"), []
    with pytest.raises(RuntimeError), start(config, "fit", folder) as old:
        raise RuntimeError
    full = folder.read_bytes()
    if how == "torn":
        folder.write_bytes(full[:-3])
    if how == "foreign":
        folder.write_text("[1, 2]")
    if how == "deleted":
        client.delete_run(old.run_id)
    if how == "finished":
        client.set_terminated(old.run_id, "FINISHED")
    with start(
        config, "train" if how == "verb" else "fit", folder, print_line=output.append
    ) as new:
        pass
    assert new.run_id != old.run_id
    assert bool(output) == (how != "finished")
    assert not folder.exists()


# --------------------------------------------------------------------- an unreachable store


def test_unresponsive_address_is_refused(tmp_path):
    with socket.socket() as silent_server:  # accepts the connection, never answers
        silent_server.bind(("127.0.0.1", 0))
        silent_server.listen()
        for port in (silent_server.getsockname()[1], 9):
            uri = f"http://me:hush@127.0.0.1:{port}"
            with (
                pytest.raises(ConfigError) as error_info,
                start(TrackingConfig(tracking_uri=uri), "fit"),
            ):
                pass
            assert f"127.0.0.1:{port}" in error_info.value.found
            assert "hush" not in str(error_info.value)
    assert not list(tmp_path.iterdir())


def test_unwritable_database_is_refused(tmp_path, shared_folder, config):
    import sqlite3

    (tmp_path / "not.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(ConfigError, match="not a database"):
        start(TrackingConfig(tracking_uri=f"sqlite:///{tmp_path}/not.db"), "fit").__enter__()
    holder = sqlite3.connect(shared_folder / "mlflow.db")
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(ConfigError, match="locked"):
        start(config, "fit").__enter__()
    holder.close()


@pytest.mark.slow
def test_run_survives_its_server_and_the_next_run_sends_the_rest(server, tmp_path, monkeypatch):
    output: list[str] = []
    server_config = TrackingConfig(tracking_uri=f"http://me:hush@127.0.0.1:{server.port}")
    (tmp_path / "report.html").write_text("report")
    (tmp_path / "large.bin").write_bytes(bytes(2000))
    monkeypatch.setattr(outbox, "MAX_COPIED_BYTES", 1000)
    with start(server_config, "fit", tmp_path / "run.json", print_line=output.append) as run:
        with run.child("early") as early:
            early.record({"loss": 5.0})
            run.record({"loss": 0.0}, 0)
            run.flush()
            server.kill()
            for step in range(1, 30):
                run.record({"loss": float(step), "odd": float("nan")}, step)
            early.record({"loss": 4.0}, 1)
        run.params({"rate": 0.5})
        run.tags({"verdict": "good"})
        run.dataset("dogs", "abc", "/data/dogs", "training")
        with run.child("late") as late:
            late.record({"loss": 3.0})
        ids = run.children(**head_runs(3))
        run.log_artifact(tmp_path / "report.html", "reports")
        run.log_artifact(tmp_path / "large.bin")
        assert run.model(tmp_path) is None
    (tmp_path / "report.html").unlink()
    folder = tmp_path / ".arrowhead" / "unsent" / run.run_id
    assert len(output) == 3, output
    assert "is gone" in output[0]
    assert "no MLflow model" in output[1]
    assert str(folder) in output[2]
    assert not (tmp_path / "run.json").exists()
    assert b"hush" not in b"".join(f.read_bytes() for f in folder.rglob("*") if f.is_file())
    with pytest.raises(ConfigError):
        start(server_config, "fit").__enter__()
    outbox_copy = tmp_path / "kept"
    shutil.copytree(folder, outbox_copy)
    server.__enter__()
    client = client_of(server_config)

    def check() -> None:
        result = client.get_run(run.run_id)
        assert result.info.status == "FINISHED"
        assert metric_points(client, run.run_id, "loss") == [(e, float(e)) for e in range(30)]
        assert result.data.params == {"rate": "0.5"}
        assert result.data.tags["verdict"] == "good"
        assert len(result.inputs.dataset_inputs) == 1
        children = child_runs(client, run.run_id)
        assert children.keys() == {"early", "late", "head-0", "head-1", "head-2"}
        assert {one.info.status for one in children.values()} == {"FINISHED"}
        assert metric_points(client, early.run_id, "loss") == [(0, 5.0), (1, 4.0)]
        assert metric_points(client, children["late"].info.run_id, "loss") == [(0, 3.0)]
        head = children["head-2"]
        assert metric_points(client, head.info.run_id, "loss") == [
            (e, 2 + e / 10) for e in range(3)
        ]
        assert head.info.run_id not in ids
        files = {file.path for file in client.list_artifacts(run.run_id)}
        assert files == {"reports", "large.bin"}
        downloaded = client.download_artifacts(run.run_id, "reports/report.html", str(tmp_path))
        assert Path(downloaded).read_text() == "report"

    with start(server_config, "score", print_line=output.append):
        check()
    assert "sent to" in output[3]
    assert not folder.exists()
    shutil.copytree(outbox_copy, folder)  # as if the sender had died before removing it
    tracking_run.send(server_config, print_line=output.append)
    check()
    assert not folder.exists()


@pytest.mark.slow
def test_server_that_returns_during_a_run_gets_all_writes_in_order(server, monkeypatch, capsys):
    output: list[str] = []
    monkeypatch.setattr(sender, "RETRY_SECONDS", (0.2, 0.5))
    server_config = TrackingConfig(
        tracking_uri=f"http://127.0.0.1:{server.port}", system_metrics=False
    )
    with start(server_config, "fit", print_line=output.append) as run:
        run.record({"loss": 0.0}, 0)
        run.flush()
        server.kill()
        run.record({"loss": 1.0}, 1)
        with run.child("train") as child:
            server.__enter__()
            run.record({"loss": 2.0}, 2)
            deadline = time.monotonic() + 60
            while child.run_id.startswith("unsent") and time.monotonic() < deadline:
                time.sleep(0.1)
            assert not child.run_id.startswith("unsent")
            child.record({"loss": 7.0})
        run.record({"loss": 3.0}, 3)
    client = client_of(server_config)
    assert metric_points(client, run.run_id, "loss") == [(e, float(e)) for e in range(4)]
    assert metric_points(client, child.run_id, "loss") == [(0, 7.0)]
    assert child_runs(client, run.run_id)["train"].info.status == "FINISHED"
    assert len(output) == 2, output
    assert "is back" in output[1]
    assert capsys.readouterr().out == ""
    assert not Path(".arrowhead").exists()


def test_temporarily_refused_writes_are_queued_and_others_sent(
    config, client, shared_folder, monkeypatch
):
    import sqlite3

    output: list[str] = []
    monkeypatch.setattr(sender, "RETRY_SECONDS", (0.1, 0.1))
    database = sqlite3.connect(shared_folder / "mlflow.db")
    with start(config, "fit", print_line=output.append, outbox=Path("spool")) as run:
        database.execute("ALTER TABLE metrics RENAME TO away")
        run.record({"loss": 1.0}, 1)
        run.tags({"verdict": "good"})
        run.flush()
        assert client.get_run(run.run_id).data.tags["verdict"] == "good"
        assert len(list(Path("spool").iterdir())) == 1
        database.execute("ALTER TABLE away RENAME TO metrics")
        time.sleep(0.2)
        run.record({"loss": 2.0}, 2)
        run.flush()
        assert metric_points(client, run.run_id, "loss") == [(1, 1.0), (2, 2.0)]
    database.close()
    assert len(output) == 1, output
    assert "not recorded yet" in output[0]
    assert not Path("spool").exists()


def test_outbox_truncated_at_any_byte_loses_only_its_incomplete_last_line(config, client, tmp_path):
    output: list[str] = []
    with start(config, "fit") as run:
        pass
    experiment = client.get_run(run.run_id).info.experiment_id
    lines = [
        {"do": "batch", "run": "RUN", "metrics": [["loss", e / 2, 5, e]], "params": {}, "tags": {}}
        for e in range(4)
    ]
    full = b"".join(b"\n" + json.dumps(line).encode() for line in lines)
    ends = [found.end() for found in re.finditer(rb"\}\}", full)]
    cut_positions = sorted({0, 1, 7, *ends, *(end - 1 for end in ends), *(end + 1 for end in ends)})
    for cut in cut_positions:
        new = client.create_run(experiment).info.run_id
        folder = make_outbox(tmp_path / "spool", config, new)
        (folder / "writes.jsonl").write_bytes(full[:cut].replace(b"RUN", new.encode()))
        tracking_run.send(config, tmp_path / "spool", output.append)
        left = sum(end <= cut for end in ends)
        assert metric_points(client, new, "loss") == [(e, e / 2) for e in range(left)], cut
        assert not folder.exists()


def test_unsent_writes_of_a_deleted_run_are_set_aside(config, client, tmp_path):
    output: list[str] = []
    with start(config, "fit") as run:
        pass
    folder = make_outbox(tmp_path / "spool", config, run.run_id)
    (folder / "writes.jsonl").write_text('{"do": "delete", "run": "it"}')
    client.delete_run(run.run_id)
    tracking_run.send(config, tmp_path / "spool", output.append)
    assert folder.with_suffix(".refused").is_dir()
    tracking_run.send(config, tmp_path / "spool", output.append)
    assert len(output) == 1


# ------------------------------------------------------------------------------- the model


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    """A bundle of a random backbone and head with three golden images."""
    from arrowhead.bundle import format as bundle_format
    from arrowhead.bundle import replay
    from arrowhead.bundle.format import Bundle, GoldenImage
    from arrowhead.decode.pixels import PixelConfig
    from arrowhead.features import backbone, extract
    from arrowhead.features.backbone import BodyConfig
    from arrowhead.training import heads as training_heads

    body, pixels = BodyConfig(body="resnet18", weights="random"), PixelConfig(size=64)
    weights = backbone.load(body)
    recipe = extract.make_recipe(pixels, body, weights, 512)
    result = Bundle(
        recipe=recipe,
        classes=["baskets", "beads", "leaves"],
        head="linear",
        temperature=1.5,
        body_state=weights.state,
        head_state=training_heads.build_head("linear", 512, 3, seed=4).state_dict(),
        metrics={},
        lineage={},
    )
    images = [
        next((image_folder / "valid" / name).glob("*")).read_bytes() for name in result.classes
    ]
    feature_ND = replay.clean_features(recipe, result.make_body(), images, "cpu", 1)
    prob_NC = bundle_format.probabilities(result.make_head(), feature_ND, result.temperature)
    golden = [
        GoldenImage(name=f"{i}.img", data=data, feature=feature_ND[i], probabilities=prob_NC[i])
        for i, data in enumerate(images)
    ]
    from dataclasses import replace

    path = tmp_path_factory.mktemp("model") / "bundle"
    bundle_format.save(replace(result, golden=golden), path)
    return path


def test_mlflow_model_predicts_like_the_bundle_and_contains_no_pickle(
    config, client, bundle, tmp_path, monkeypatch
):
    import pandas

    from arrowhead.bundle.format import load

    with start(config, "fit") as run:
        address = run.model(bundle)
        assert run.model(bundle) == address
    import mlflow
    from mlflow.pyfunc import scoring_server

    (output,) = client.get_run(run.run_id).outputs.model_outputs
    assert f"models:/{output.model_id}" == address
    assert client.get_logged_model(output.model_id).source_run_id == run.run_id
    monkeypatch.setenv("MLFLOW_TRACKING_URI", config.uri)
    model_dir = Path(mlflow.artifacts.download_artifacts(address, dst_path=str(tmp_path / "model")))
    suffixes = {file.suffix for file in model_dir.rglob("*") if file.is_file()}
    assert not suffixes & {".pkl", ".pickle", ".pt", ".pth", ".bin", ".pyc", ".joblib"}
    model = mlflow.pyfunc.load_model(str(model_dir))
    flavor = model.metadata.flavors["python_function"]
    assert Path(flavor["model_code_path"]).name == "mlflow_model.py"
    assert "python_model" not in flavor
    golden = load(bundle).golden
    rows = pandas.DataFrame({"image": [one.data for one in golden] + [b"no image"]})
    prediction = model.predict(rows)
    expected = np.stack([one.probabilities for one in golden])
    np.testing.assert_allclose(
        np.stack(prediction["probabilities"][:3]), expected, rtol=0, atol=1e-6
    )
    classes = model.metadata.metadata["classes"]
    assert prediction["label"][:3].tolist() == [classes[i] for i in expected.argmax(1)]
    assert prediction["labels"].tolist() == [[label] for label in prediction["label"][:3]] + [[]]
    assert prediction["label"][3] is None
    assert np.isnan(prediction["probability"][3])
    assert model.metadata.get_input_schema().input_names() == ["image", "path"]
    names = model.metadata.get_output_schema().input_names()
    assert names == prediction.columns.tolist()
    example = (model_dir / "serving_input_example.json").read_text()
    over_http = scoring_server.infer_and_parse_data(
        json.loads(example), model.metadata.get_input_schema()
    )
    example_prediction = model.predict(over_http)
    assert example_prediction["label"][0] in classes
    assert not {bytes(data) for data in over_http["image"]} & {one.data for one in golden}


def test_registered_bundle_is_fetched_by_each_of_its_addresses(server, bundle, tmp_path):
    from arrowhead.bundle import resolve

    server_config = TrackingConfig(
        tracking_uri=f"http://127.0.0.1:{server.port}", system_metrics=False
    )
    with start(server_config, "fit", registry=RegistryConfig(register="far")) as run:
        model = run.model(bundle)
        assert run.register(bundle) == "models:/far/1"
        assert run.register(bundle) == "models:/far/1"
    expected = {file.name: file.read_bytes() for file in bundle.rglob("*") if file.is_file()}
    for address in ("models:/far@champion", "models:/far/1", model, f"runs:/{run.run_id}/model"):
        result = resolve.bundle_folder(address, server_config, tmp_path / "scratch")
        assert {f.name: f.read_bytes() for f in result.rglob("*") if f.is_file()} == expected
    for address, words in {
        "models:/fat@champion": "far",
        "models:/far@champoin": "champion",
        "models:/far/7": "no models:/far/7",
        f"runs:/{'0' * 32}/model": "no run",
    }.items():
        with pytest.raises(ConfigError) as error_info:
            resolve.bundle_folder(address, server_config, tmp_path / "scratch")
        assert words in str(error_info.value)


# ----------------------------------------------------------------------------------- secrets

SECRET = "hunter2-p%40ss"
SMALL = ["--body", "shufflenet_v2_x0_5", "--weights", "random", "--size", "64", "--epochs", "2"]


def read_all_bytes(folder: Path) -> bytes:
    """The bytes of all files below a folder."""
    return b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())


def test_password_in_the_address_is_neither_printed_nor_stored(
    server, image_folder, tmp_path, monkeypatch, capfd
):
    address = f"http://anna:{SECRET}@127.0.0.1:{server.port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)

    def run(*words: object) -> str:
        with pytest.raises(SystemExit) as exit_info:
            main([*map(str, words)])
        shown = capfd.readouterr()
        assert exit_info.value.code == 0, shown.err
        return shown.out + shown.err

    output = run("fit", image_folder, "out", *SMALL, "--rate", "0.01")
    assert f"webbrowser 'http://…@127.0.0.1:{server.port}'" in output
    output += run("score", "out/bundle", image_folder / "new", "scores")
    output += run("watch", "--no-follow", "--json")
    output += run("doctor")
    assert "finished" in output.lower()
    kept = read_all_bytes(tmp_path) + read_all_bytes(server.folder)
    for secret in (SECRET, "hunter2-p@ss", "hunter2"):
        assert secret not in output
        assert secret.encode() not in kept


@pytest.mark.parametrize(
    "address",
    [
        "http://anna:{secret}@127.0.0.1:{port}/",
        "http://127.0.0.1:{port}/?code={secret}",
        "postgresql+psycopg2://anna:{secret}@127.0.0.1:{port}/runs",
        "postgresql+psycopg2://127.0.0.1:{port}/runs?user=anna&password={secret}",
        "postgresql://anna:{secret}@/runs?host=/nowhere",
        "postgresql+psycopg2://anna:hunter2/with#slash@127.0.0.1:{port}/runs",
        "mssql+pyodbc:///?odbc_connect=SERVER%3Dx%3BPWD%3D{secret}",
        "nothing://anna:{secret}@127.0.0.1/runs",
        "sqlite:////nowhere/at/all.db?key={secret}",
    ],
)
@pytest.mark.parametrize("verb", [["fit", "photos", "out"], ["watch"]])
def test_refusal_of_an_address_hides_its_password(address, verb, monkeypatch, capfd):
    with socket.socket() as taken:  # bound, but not listening
        taken.bind(("127.0.0.1", 0))
        given = address.format(secret="hunter2", port=taken.getsockname()[1])
        monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
        with pytest.raises(SystemExit) as exit_info:
            main(verb)
    shown = capfd.readouterr()
    assert exit_info.value.code == 2, shown.err
    assert "hunter2" not in shown.out + shown.err
    assert "wanted" in shown.err


MALFORMED = [
    "http://anna:{secret}@host:badport",
    "http://anna:{secret}@host:99999",
    "http://anna:{secret}@host:0",
    "http://anna:{secret}@",
    "http://anna:{secret}",  # without the host
    "http://anna:{secret}@[::1:5000",
    "http://anna:two/{secret}@host:5000",
    "http://anna:two@{secret}#x@host:5000",
    "http://anna:two?{secret}@host:5000",
    "http:/anna:{secret}@host:5000",
    "anna:{secret}@host:5000",
    "http://{secret}@host:badport",  # a token
    "http://host:badport/?token={secret}",
    "http://host:badport/#token={secret}",
    "http://anna:{secret}@my host:5000",
    "nothing://anna:{secret}@host",
    "s3://anna:{secret}@bucket/runs",
    "postgres://anna:{secret}@host/runs",
    "postgresql://anna:{secret}@host:badport/runs",
    "postgresql://anna:two@{secret}@host/runs",
    "mysql+pymysql://anna:{secret}@[::1/runs",
]
VERBS = [
    ["fit", "photos", "out"],
    ["train", "store", "out"],
    ["lr-find", "store"],
    ["precompute", "photos", "out"],
    ["score", "bundle", "photos", "out"],
    ["evaluate", "models:/dogs/1", "photos"],
    ["export", "bundle", "out.onnx"],
    ["watch"],
    ["demo", "out", "--json"],
    ["bundle", "register", "bundle", "dogs"],
    ["bundle", "info", "models:/dogs/1"],
    ["submit", "--", "fit", "photos", "out"],
]


@pytest.mark.parametrize(
    ("address", "verb"),
    [(one, ["watch"]) for one in MALFORMED] + [(MALFORMED[0], verb) for verb in VERBS],
)
@pytest.mark.parametrize("by", ["flag", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"])
def test_malformed_address_is_refused_before_any_work_without_its_secret(
    address, verb, by, tmp_path, monkeypatch, capfd
):
    given = address.format(secret="hunter2")
    monkeypatch.chdir(tmp_path)
    if by == "flag":
        verb = [*verb, "--tracking-uri", given]
    else:
        monkeypatch.setenv(by, given)
    with pytest.raises(SystemExit) as exit_info:
        main(verb)
    shown = capfd.readouterr()
    assert exit_info.value.code == 2, shown.err
    assert (by if by != "flag" else "--tracking-uri") in shown.err  # and not for the missing photos
    assert "wanted" in shown.err and "do  " in shown.err
    assert "hunter2" not in shown.out + shown.err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("by", ["flag", "variable"])
@pytest.mark.parametrize("verb", [["watch"], ["fit", "photos", "out", "--json"], ["doctor"]])
def test_separate_process_leaves_no_trace_of_the_secret_in_a_malformed_address(verb, by, tmp_path):
    given = f"http://anna:{SECRET}@host:badport"
    flags = ["--tracking-uri", given] if by == "flag" else []  # doctor does not have that flag
    names = os.environ | ({} if flags else {"MLFLOW_TRACKING_URI": given})
    completed = subprocess.run(
        [sys.executable, "-P", "-m", "arrowhead", *verb, *flags],
        cwd=tmp_path,
        env=names,
        capture_output=True,
        timeout=300,
    )
    assert completed.returncode == (1 if verb == ["doctor"] and not flags else 2), completed.stderr
    for secret in (b"hunter2", SECRET.encode(), b"Traceback"):
        assert secret not in completed.stdout + completed.stderr + read_all_bytes(tmp_path)


@pytest.mark.parametrize("address", MALFORMED)
def test_python_api_refuses_a_malformed_address_without_its_secret(address, monkeypatch, tmp_path):
    given = address.format(secret="hunter2")
    with pytest.raises(ConfigError) as error_info:
        TrackingConfig(tracking_uri=given)
    result = "".join(traceback.format_exception(error_info.value))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    with (
        pytest.raises(ConfigError) as error_info,
        tracking_run.start(TrackingConfig(), "fit", outbox=tmp_path),
    ):
        pytest.fail("it began")
    result += "".join(traceback.format_exception(error_info.value))
    assert "hunter2" not in result
    good = TrackingConfig(tracking_uri="http://anna:hunter2@host")
    assert "hunter2" not in repr(good)


@pytest.mark.parametrize(
    "address",
    [
        "http://anna:p%40ss@127.0.0.1:5000/base",
        "https://glpat-1234@host",
        "http://[::1]:5000",
        "postgresql+psycopg2://anna:a/b#c@host:5432/runs?sslmode=require",
        "postgresql:///runs?host=/run/postgresql",
        "mssql+pyodbc:///?odbc_connect=SERVER%3Dx",
        "sqlite:////a folder/me@home.db",
        "sqlite:///:memory:",
        "file:///a@b/mlruns",
        "mlruns",
        "databricks",
        "databricks://profile",
    ],
)
def test_valid_store_address_is_accepted(address):
    assert TrackingConfig(tracking_uri=address).uri == address


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://a:b@host:5000/x", "http://…@host:5000/x"),
        ("at 'postgresql://a:b/c@d@host/x?sslmode=require'", None),
        ("sqlite:///a.db?mode=rw", "sqlite:///a.db?mode=rw"),
        ("http://host/?token=abc&timeout=3", "http://host/?token=…&timeout=3"),
        ("models:/dogs@champion", "models:/dogs@champion"),
    ],
)
def test_address_is_shown_without_its_secrets(text, shown):
    wanted = "at 'postgresql://…@host/x?sslmode=require'" if shown is None else shown
    assert without_secrets(text) == wanted


# ------------------------------------------------------------------------- concurrency


@pytest.mark.slow
def test_three_concurrent_commands_on_a_new_store_give_three_runs(tmp_path):
    program = """
import sys
from arrowhead.tracking.run import start
from arrowhead.tracking.client import TrackingConfig
config = TrackingConfig(tracking_uri=sys.argv[1] or None, system_metrics=False)
with start(config, sys.argv[2]) as run:
    run.record({"loss": 1.0})
"""
    clean = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    commands = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                program,
                "sqlite:///new.db",
                f"run-{number}",
            ],
            cwd=tmp_path,
            env=clean,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for number in range(3)
    ]
    output = [command.communicate(timeout=300)[0] for command in commands]
    assert [command.returncode for command in commands] == [0, 0, 0], output
    client = client_of(TrackingConfig(tracking_uri=f"sqlite:///{tmp_path}/new.db"))
    experiment = client.get_experiment_by_name("arrowhead").experiment_id
    runs = client.search_runs([experiment])
    assert sorted(run.info.run_name for run in runs) == ["run-0", "run-1", "run-2"]
    assert {run.info.status for run in runs} == {"FINISHED"}
