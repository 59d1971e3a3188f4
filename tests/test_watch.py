"""`arrowhead watch` shows the progress of a run, its bottleneck, and how it ended."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import forks
import pytest
from conftest import AddMlflowDb

from arrowhead import ConfigError
from arrowhead.cli.main import main
from arrowhead.tracking import watch
from arrowhead.tracking.client import TrackingConfig
from arrowhead.tracking.run import start
from arrowhead.tracking.watch import View, Watch

SMALL = ["--body", "resnet18", "--weights", "random", "--size", "64"]
SHORT = ["--epochs", "3", "--rate", "0.01"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory, add_mlflow_db: AddMlflowDb) -> Path:
    """A working directory with its tracking store."""
    return add_mlflow_db(tmp_path_factory.mktemp("watch"))


@pytest.fixture(autouse=True)
def _change_directory(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workdir)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def config(workdir: Path) -> TrackingConfig:
    return TrackingConfig(tracking_uri=f"sqlite:///{workdir}/mlflow.db", system_metrics=False)


def start_reporting_command(workdir: Path, *words: object) -> subprocess.Popen[str]:
    """Start a command that records its progress five times a second."""
    program = (
        "import sys; from arrowhead.reporting import progress; "
        "from arrowhead.cli.main import main; progress.RECORD_SECONDS = 0.2; main()"
    )
    return forks.Popen(
        [sys.executable, "-c", program, *map(str, words)],
        cwd=workdir,
        env={k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run_watch(*words: object, code: int = 0) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["watch", *map(str, words)])
    assert exit_info.value.code == code


@pytest.mark.slow
def test_watch_follows_a_run_to_its_end(workdir, image_folder):
    from mlflow import MlflowClient

    slow = ["--body", "resnet18", "--weights", "random", "--extract.chunk-size", "4"]
    fit = start_reporting_command(
        workdir, "fit", image_folder, "slow", *slow, *SHORT, "--run-name", "slowly"
    )
    views: list[View] = []
    config = TrackingConfig(tracking_uri=f"sqlite:///{workdir}/mlflow.db")
    while fit.poll() is None and not views:  # until the run exists
        try:
            with Watch(config, "slowly") as watcher:
                views.append(watcher.look())
        except ConfigError:
            time.sleep(0.5)
    with Watch(config, "slowly") as watcher:
        while views[-1].running:
            views.append(watcher.look())
            time.sleep(0.3)
    assert fit.wait() == 0, fit.communicate()
    image_counts = [
        stage.images["images"] for view in views for stage in view.stages if stage.images
    ]
    assert image_counts == sorted(image_counts)
    assert any(0 < number < 72 for number in image_counts)
    assert image_counts[-1] == 72
    last = views[-1]
    assert [stage.name for stage in last.stages] == ["slowly", "extract", "train"]
    assert {stage.status for stage in last.stages} == {"FINISHED"}
    assert (last.stages[2].epoch, last.stages[2].epochs) == (2, 3)
    assert last.facts == {"dataset": image_folder.name, "body": "resnet18"}
    assert any(
        view.machine["system/cpu_utilization_percentage"] > 0 for view in views[:-1] if view.machine
    )
    client = MlflowClient(tracking_uri=config.uri)
    filter_string = f"tags.mlflow.parentRunId = '{last.run_id}' and attributes.run_name = 'extract'"
    (extract_run,) = client.search_runs(
        [client.get_experiment_by_name("arrowhead").experiment_id], filter_string
    )
    steps = [
        view.step for view in client.get_metric_history(extract_run.info.run_id, "progress.images")
    ]
    assert steps == sorted(set(steps))
    lines = watch.lines(last)
    assert re.search(r"extract +█{12} 72/72 · \d+\.\d img/s · bound by forward \(\d+ %", lines[1])
    assert re.search(r"train +epoch 3 of 3 · train loss .* · valid loss .* · accuracy", lines[2])


@pytest.mark.slow
def test_watch_of_an_interrupted_run_exits_with_its_code(workdir, image_folder, capsys):
    slow = ["--body", "resnet18", "--weights", "random", "--size", "448", "--chunk-size", "4"]
    process = start_reporting_command(
        workdir, "precompute", image_folder, "cut", *slow, "--run-name", "cut"
    )
    while process.poll() is None and not list((workdir / "cut" / "shards").glob("*.arrow")):
        time.sleep(0.1)
    timer = threading.Timer(1.0, process.send_signal, [signal.SIGINT])
    timer.start()
    run_watch("cut", "--every", "0.2", code=130)
    assert process.wait(timeout=60) == 130
    output = capsys.readouterr().out.splitlines()
    assert re.match(r"cut \w{8} · running for \d+ s", output[0])
    last_line = next(line for line in output if "killed" in line)
    assert re.match(r"cut \w{8} · killed after \d+ s", last_line)


def test_watch_counts_heads_and_shows_the_best_metric(workdir, image_folder, config, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["precompute", str(image_folder), "store", *SMALL])
    assert exit_info.value.code == 0
    with pytest.raises(SystemExit) as exit_info:
        main(["train", "store", "b", "--grid", "rate=0.003..0.1:4", "--epochs", "3"])
    assert exit_info.value.code == 0
    with Watch(config, "train") as watcher:
        view = watcher.look()
    assert len(view.stages) < 4  # the heads themselves are not stages
    text = "\n".join(watch.lines(view))
    assert re.search(r"heads: epoch 2 · training 4 heads · best accuracy \d", text)
    best = view.stages[0].stacks["heads"]["accuracy"]
    capsys.readouterr()
    run_watch("train", "--json")
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["stages"][0]["stacks"]["heads"]["accuracy"] == best


@pytest.fixture(scope="module")
def two_runs(workdir: Path) -> tuple[str, str]:
    """Ids of two finished runs with the same name, the older first."""
    config = TrackingConfig(
        tracking_uri=f"sqlite:///{workdir}/mlflow.db",
        experiment="two",
        run_name="twin",
        system_metrics=False,
    )
    result = []
    for number in range(2):
        with start(config, "fit", outbox=workdir / "unsent") as run, run.child("extract") as part:
            part.record({"progress.images": number}, step=number)
        result.append(run.run_id)
        time.sleep(0.01)
    return result[0], result[1]


def watched_run_id(config: TrackingConfig, word: str | None) -> str:
    with Watch(config, word) as watcher:
        return watcher.look().run_id


def test_run_is_selected_by_id_prefix_name_or_as_the_newest(two_runs, config):
    config = TrackingConfig(tracking_uri=config.uri, experiment="two")
    assert (
        watched_run_id(config, two_runs[0])
        == watched_run_id(config, two_runs[0][:8])
        == two_runs[0]
    )
    assert watched_run_id(config, "twin") == watched_run_id(config, None) == two_runs[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nobody"], "give one of the latest: twin"),
        (["raysubmit_abc"], "arrowhead jobs logs raysubmit_abc --follow"),
        (["--experiment", "none"], "There is no run in the experiment 'none'"),
        (["--tracking-uri", "sqlite:///absent.db"], "no such database is there"),
        (["--every", "0"], "--every is 0"),
    ],
)
def test_unknown_run_to_watch_is_refused(two_runs, words, said, capsys):
    where = [] if "--experiment" in words else ["--experiment", "two"]
    run_watch(*where, *words, code=2)
    assert said in " ".join(capsys.readouterr().err.split())
    assert not Path("absent.db").exists()


def test_unresponsive_store_and_silent_run_are_reported(two_runs, workdir, monkeypatch):
    monkeypatch.setattr(watch, "QUIET_SECONDS", 0.05)
    (workdir / "other").mkdir()
    file = workdir / "other" / "mlflow.db"
    file.write_bytes((workdir / "mlflow.db").read_bytes())
    config = TrackingConfig(tracking_uri=f"sqlite:///{file}", system_metrics=False, run_name="mute")
    with start(config, "fit", outbox=workdir / "unsent") as run, Watch(config) as seen:
        view = seen.look()
        assert "nothing new" not in watch.lines(view)[-1]
        time.sleep(0.1)
        assert "nothing new for" in watch.lines(seen.look())[-1]
        run.record({"progress.images": 1})
        run.flush()
        assert "nothing new" not in watch.lines(seen.look())[-1]
        full = file.read_bytes()
        file.write_bytes(b"no database" * 1000)
        view = seen.look()
        assert view.run_id == run.run_id
        assert "the store does not answer: " in "\n".join(watch.lines(view))
        file.write_bytes(full)
        assert seen.look().trouble is None
