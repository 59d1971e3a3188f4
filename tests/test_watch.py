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
from conftest import Tracked

from arrowhead import ConfigError
from arrowhead.cli.main import main
from arrowhead.tracking import watch
from arrowhead.tracking.client import TrackingConfig
from arrowhead.tracking.run import start
from arrowhead.tracking.watch import View, Watch

SMALL = ["--body", "resnet18", "--weights", "random", "--size", "64"]
SHORT = ["--epochs", "3", "--rate", "0.01"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tracked: Tracked) -> Path:
    """A working directory with its store."""
    return tracked(tmp_path_factory.mktemp("watch"))


@pytest.fixture(autouse=True)
def _there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def config(place: Path) -> TrackingConfig:
    return TrackingConfig(tracking_uri=f"sqlite:///{place}/mlflow.db", system_metrics=False)


def often(place: Path, *words: object) -> subprocess.Popen[str]:
    """A command that records how far it is five times a second."""
    program = (
        "import sys; from arrowhead.reporting import progress; "
        "from arrowhead.cli.main import main; progress.RECORD_SECONDS = 0.2; main()"
    )
    return forks.Popen(
        [sys.executable, "-c", program, *map(str, words)],
        cwd=place,
        env={k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def watched(*words: object, code: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["watch", *map(str, words)])
    assert ended.value.code == code


def test_a_run_is_followed_from_another_terminal_to_its_end(place, drawn):
    from mlflow import MlflowClient

    slow = ["--body", "resnet18", "--weights", "random", "--extract.chunk-size", "4"]
    fit = often(place, "fit", drawn, "slow", *slow, *SHORT, "--run-name", "slowly")
    looks: list[View] = []
    config = TrackingConfig(tracking_uri=f"sqlite:///{place}/mlflow.db")
    while fit.poll() is None and not looks:  # until the run is there
        try:
            with Watch(config, "slowly") as seen:
                looks.append(seen.look())
        except ConfigError:
            time.sleep(0.5)
    with Watch(config, "slowly") as seen:
        while looks[-1].running:
            looks.append(seen.look())
            time.sleep(0.3)
    assert fit.wait() == 0, fit.communicate()
    done = [stage.images["images"] for one in looks for stage in one.stages if stage.images]
    assert done == sorted(done)
    assert any(0 < number < 72 for number in done)
    assert done[-1] == 72
    last = looks[-1]
    assert [stage.name for stage in last.stages] == ["slowly", "extract", "train"]
    assert {stage.status for stage in last.stages} == {"FINISHED"}
    assert (last.stages[2].epoch, last.stages[2].epochs) == (2, 3)
    assert last.facts == {"dataset": drawn.name, "body": "resnet18"}
    assert any(
        one.machine["system/cpu_utilization_percentage"] > 0 for one in looks[:-1] if one.machine
    )
    client = MlflowClient(tracking_uri=config.uri)
    below = f"tags.mlflow.parentRunId = '{last.run_id}' and attributes.run_name = 'extract'"
    (part,) = client.search_runs([client.get_experiment_by_name("arrowhead").experiment_id], below)
    steps = [one.step for one in client.get_metric_history(part.info.run_id, "progress.images")]
    assert steps == sorted(set(steps))
    words = watch.lines(last)
    assert re.search(r"extract +█{12} 72/72 · \d+\.\d img/s · bound by forward \(\d+ %", words[1])
    assert re.search(r"train +epoch 3 of 3 · train loss .* · valid loss .* · accuracy", words[2])


def test_an_interrupted_run_ends_the_watch_with_its_code(place, drawn, capsys):
    slow = ["--body", "resnet18", "--weights", "random", "--size", "448", "--chunk-size", "4"]
    cut = often(place, "precompute", drawn, "cut", *slow, "--run-name", "cut")
    while cut.poll() is None and not list((place / "cut" / "shards").glob("*.arrow")):
        time.sleep(0.1)
    later = threading.Timer(1.0, cut.send_signal, [signal.SIGINT])
    later.start()
    watched("cut", "--every", "0.2", code=130)
    assert cut.wait(timeout=60) == 130
    output = capsys.readouterr().out.splitlines()
    assert re.match(r"cut \w{8} · running for \d+ s", output[0])
    ended = next(line for line in output if "killed" in line)
    assert re.match(r"cut \w{8} · killed after \d+ s", ended)


def test_many_heads_are_counted_and_their_best_is_named(place, drawn, config, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["precompute", str(drawn), "store", *SMALL])
    assert ended.value.code == 0
    with pytest.raises(SystemExit) as ended:
        main(["train", "store", "b", "--grid", "rate=0.003..0.1:4", "--epochs", "3"])
    assert ended.value.code == 0
    with Watch(config, "train") as seen:
        view = seen.look()
    assert len(view.stages) < 4  # the heads themselves are not stages
    words = "\n".join(watch.lines(view))
    assert re.search(r"heads: epoch 2 · training 4 heads · best accuracy \d", words)
    best = view.stages[0].stacks["heads"]["accuracy"]
    capsys.readouterr()
    watched("train", "--json")
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["stages"][0]["stacks"]["heads"]["accuracy"] == best


@pytest.fixture(scope="module")
def two(place: Path) -> tuple[str, str]:
    """Ids of two finished runs of one name, the older first."""
    config = TrackingConfig(
        tracking_uri=f"sqlite:///{place}/mlflow.db",
        experiment="two",
        run_name="twin",
        system_metrics=False,
    )
    result = []
    for number in range(2):
        with start(config, "fit", outbox=place / "unsent") as run, run.child("extract") as part:
            part.record({"progress.images": number}, step=number)
        result.append(run.run_id)
        time.sleep(0.01)
    return result[0], result[1]


def found(config: TrackingConfig, word: str | None) -> str:
    with Watch(config, word) as seen:
        return seen.look().run_id


def test_a_run_is_named_by_its_id_or_its_beginning_its_name_or_by_being_the_newest(two, config):
    config = TrackingConfig(tracking_uri=config.uri, experiment="two")
    assert found(config, two[0]) == found(config, two[0][:8]) == two[0]
    assert found(config, "twin") == found(config, None) == two[1]


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
def test_what_cannot_be_watched_is_refused(two, words, said, capsys):
    where = [] if "--experiment" in words else ["--experiment", "two"]
    watched(*where, *words, code=2)
    assert said in " ".join(capsys.readouterr().err.split())
    assert not Path("absent.db").exists()


def test_a_store_that_does_not_answer_and_a_run_that_is_silent_are_said(two, place, monkeypatch):
    monkeypatch.setattr(watch, "QUIET_SECONDS", 0.05)
    (place / "other").mkdir()
    file = place / "other" / "mlflow.db"
    file.write_bytes((place / "mlflow.db").read_bytes())
    config = TrackingConfig(tracking_uri=f"sqlite:///{file}", system_metrics=False, run_name="mute")
    with start(config, "fit", outbox=place / "unsent") as run, Watch(config) as seen:
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
