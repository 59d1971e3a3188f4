"""Training as a user runs it: many heads, folds, a learning curve, interruptions at any moment."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forks
import numpy as np
import polars
import psutil
import pytest
import safetensors.numpy
from conftest import Tracked

from arrowhead.cli.main import main
from arrowhead.features.store import Store
from arrowhead.training import run as training_run

BODY = ["--body", "resnet18", "--weights", "random", "--size", "64"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tracked: Tracked) -> Path:
    """A working directory that the tests of this file share."""
    return tracked(tmp_path_factory.mktemp("study"))


@pytest.fixture(autouse=True)
def _there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


@pytest.fixture(scope="module")
def store(drawn: Path, place: Path) -> Path:
    """Features of the drawn images."""
    here(place, "precompute", drawn, place / "store", *BODY)
    return place / "store"


def here(place: Path, *words: object, code: int = 0) -> None:
    """A command in this process, which spares the seconds that a new one imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        with pytest.raises(SystemExit) as ended:
            main([*map(str, words)])
    assert ended.value.code == code


def runs(place: Path, name: str) -> list[Any]:
    """MLflow runs of this name, the newest first."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{place}/mlflow.db")
    experiment = client.get_experiment_by_name("arrowhead").experiment_id
    return list(client.search_runs([experiment], f"tags.`mlflow.runName` = '{name}'"))


def children(place: Path, parent: str) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{place}/mlflow.db")
    experiment = client.get_experiment_by_name("arrowhead").experiment_id
    words = f"tags.`mlflow.parentRunId` = '{parent}'"
    return list(client.search_runs([experiment], words, order_by=["metrics.accuracy DESC"]))


# ------------------------------------------------------------------------------ many heads


def test_a_grid_keeps_its_best_head_and_records_each_as_a_child(store, place, command):
    grid = "rate=1e-5,1e-2 weight_decay=0,0.1 seed=0,1"
    result = command("train", store, "best", "--grid", grid, "--epochs", 4)
    heads = children(place, result["run_id"])
    actual = [run for run in heads if run.info.run_name != "train"]
    assert len(actual) == 8
    assert {run.info.status for run in actual} == {"FINISHED"}
    assert actual[0].data.params["train.rate"] == "0.01"
    best = result["grid"]["settings"][0]
    assert best["knobs"]["rate"] == result["rate"] == 0.01
    assert best["mean"] >= result["grid"]["settings"][-1]["mean"]
    with Path("best/report/grid.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["rate"] for row in table[:2]] == ["0.01", "0.01"]
    assert table[0]["seeds"] == "0 1"
    assert table[0]["p"] == ""
    assert [float(row["p"]) for row in table[1:]] == pytest.approx(
        [one["p"] for one in result["grid"]["settings"][1:]]
    )
    outcome = json.loads(Path("best/bundle.json").read_text())
    assert outcome["metrics"]["accuracy"] == pytest.approx(result["epochs"][-1]["accuracy"])
    assert outcome["lineage"]["training"]["rate"] == 0.01
    images = outcome["metrics"]["images"]
    assert f"on the same {images} validation images" in result["grid"]["words"]


def test_folds_and_learning_curve_use_the_settings_of_the_head_that_is_kept(store, place, command):
    also = ["--epochs", 3, "--folds", 3, "--learning-curve", "--curve-seeds", 2]
    grid = ["--grid", "rate=1e-6,1e-2 weight_decay=0.5 dropout=0.3 seed=1", "--rate", 0.5]
    searched = command("train", store, "searched", *grid, *also)
    folds = polars.read_ipc(searched["folds"]["file"])
    messages = ["--rate", 0.01, "--weight-decay", 0.5, "--dropout", 0.3, "--seed", 1]
    request = command("train", store, "asked", *messages, *also)
    parts = {
        line.split(" · ")[0]: line for line in command.said.splitlines() if "training " in line
    }
    for part in ("folds", "learning-curve"):
        assert "best" not in parts[part], "the best of these heads says nothing"
    assert searched["rate"] == 0.01
    assert searched["folds"]["figures"] == request["folds"]["figures"]
    assert folds.equals(polars.read_ipc(request["folds"]["file"]))
    assert searched["learning_curve"]["points"] == request["learning_curve"]["points"]
    result = [json.loads(Path(name, "bundle.json").read_text()) for name in ("searched", "asked")]
    assert result[0]["lineage"]["training"] == result[1]["lineage"]["training"]


def test_folds_give_every_image_one_probability_from_a_head_that_has_not_seen_it(
    store, place, command
):
    result = command("train", store, "folded", "--rate", 0.01, "--epochs", 3, "--folds", 4)
    table = polars.read_ipc(result["folds"]["file"])
    catalog = Store(store).read_catalog()
    used = [p for p, s in zip(catalog["paths"], catalog["splits"], strict=True) if s != "test"]
    assert table["path"].to_list() == used
    assert sorted(set(table["fold"])) == [0, 1, 2, 3]
    chance = np.array(table["probability"].to_list())
    assert np.abs(chance.sum(1) - 1).max() < 1e-5
    classes = Store(store).manifest()["classes"]
    label = np.array([classes.index(names[0]) for names in table["labels"].to_list()])
    by_fold = [
        float((chance.argmax(1) == label)[table["fold"].to_numpy() == fold].mean())
        for fold in range(4)
    ]
    assert result["folds"]["figures"]["accuracy"]["mean"] == pytest.approx(np.mean(by_fold))
    assert [line["accuracy"] for line in result["folds"]["folds"]] == pytest.approx(by_fold)


def test_the_table_of_epochs_shows_what_best_chooses_by_and_when_and_why_it_ended(
    store, place, command, capsys
):
    flags = ["--rate", 0.05, "--epochs", 40, "--best", "balanced_accuracy", "--patience", 3]
    result = command("train", store, "early", *flags)
    output, lines = command.said, result["epochs"]
    assert result["stopped"] == "patience"
    heading = next(line for line in output.splitlines() if line.split()[:1] == ["epoch"])
    assert heading.split()[-1] == "balanced_accuracy"
    shown = [line.split() for line in output.splitlines() if line.split()[:1] in [["0"], ["1"]]]
    for words, line in zip(shown, lines, strict=False):
        assert float(words[4]) == pytest.approx(line["balanced_accuracy"], abs=1e-6)
    starred = [words.split()[0] for words in output.splitlines() if words.endswith(" *")]
    assert starred[-1] == str(result["epoch"])
    assert len(lines) == result["epoch"] + 1 + 3
    assert (
        f"stopped after epoch {len(lines) - 1}: balanced_accuracy has not improved since epoch"
        f" {result['epoch']}"
    ) in output
    here(place, "bundle", "info", place / "early", "--per-class")
    info = capsys.readouterr().out
    assert "single-label" in info
    assert "\\x0a" not in info
    assert f"learning rate 0.05 · epochs 40 (kept: epoch {result['epoch']})" in info
    table = info.split("validation images, by class:")[1].split("\n")
    assert table[1].split() == ["class", "precision", "recall", "F1", "images"]
    assert {line.split()[0] for line in table[2:5]} == {"baskets", "beads", "leaves"}
    here(place, "bundle", "info", place / "early")
    assert "by class" not in capsys.readouterr().out


def test_folds_train_for_as_long_as_the_head_that_is_kept_did(store, place, command):
    flags = ["--rate", 0.3, "--epochs", 9, "--best", "accuracy", "--patience", 3, "--folds", 3]
    result = command("train", store, "patient", *flags)
    assert result["folds"]["epochs"] == result["epoch"] + 1
    assert {line["epoch"] for line in result["folds"]["folds"]} == {result["epoch"]}


def test_a_class_of_one_image_has_no_out_of_fold_probability_and_does_not_end_the_training(
    drawn, place, command
):
    rows = ["path,label,split"]
    for file in sorted(drawn.glob("*/*/*.jpg")):
        split, name = file.relative_to(drawn).parts[:2]
        if split in ("train", "valid"):
            rows.append(f"{file},{name},{split}")
    alone = rows[1].split(",")[0]
    rows[1] = f"{alone},alone,train"
    Path("alone.csv").write_text("\n".join(rows).replace("label", "labels") + "\n")
    command("precompute", "alone.csv", "alone-store", *BODY)
    result = command("train", "alone-store", "alone", "--rate", 0.01, "--epochs", 2, "--folds", 3)
    assert result["folds"]["not_held_out"] == {"alone": 1}
    table = polars.read_ipc(result["folds"]["file"])
    assert len(table) == len(rows) - 1
    none = table.filter(polars.col("probability").is_null() & polars.col("fold").is_null())
    assert [labels.to_list() for labels in none["labels"]] == [["alone"]]
    assert table["probability"].null_count() == 1


def test_the_learning_curve_is_drawn_and_recorded(store, place, command):
    flags = ["--rate", 0.01, "--epochs", 3, "--learning-curve", "--curve-seeds", 2]
    result = command("train", store, "curved", *flags)
    points = result["learning_curve"]["points"]
    assert points[-1]["share"] == 1.0
    assert [point["images"] for point in points] == sorted({point["images"] for point in points})
    assert Path("curved/report/learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert len(Path("curved/report/learning_curve.csv").read_text().splitlines()) == 1 + len(points)


def test_a_store_larger_than_memory_is_left_in_the_map_and_gives_the_same_numbers(
    store, command, monkeypatch
):
    flags = ["--rate", 0.01, "--epochs", 2]
    held = command("train", store, "held", *flags)
    monkeypatch.setattr(training_run, "_free_bytes", lambda device: 1000)
    mapped = command("train", store, "mapped", *flags)
    assert mapped["epochs"] == held["epochs"]


def test_several_labels_per_image_are_trained_and_scored(drawn, place, command):
    rows = ["path\tlabels\tsplit"]
    for file in sorted(drawn.glob("*/*/*.jpg")):
        split, name = file.relative_to(drawn).parts[:2]
        both = f"{name} woven" if name == "baskets" else name
        if split in ("train", "valid"):
            rows.append(f"{file}\t{both}\t{split}")
    Path("several.tsv").write_text("\n".join(rows) + "\n")
    result = command(
        "fit", "several.tsv", "several", "--multi-label", *BODY, "--epochs", 8, "--best", "f2"
    )
    assert {"valid_loss", "accuracy", "f1", "f2"} <= result["epochs"][0].keys()
    assert result["epoch"] == int(np.argmax([line["f2"] for line in result["epochs"]]))
    heading = next(line for line in command.said.splitlines() if line.split()[:1] == ["epoch"])
    assert heading.split()[-1] == "f2"
    figures, kept = result["metrics"], result["epochs"][result["epoch"]]
    assert figures["f2_samples"] > 0.6
    assert figures["accuracy"] == pytest.approx(kept["accuracy"]), "one name, one number"
    tuned = f"decisions right {figures['accuracy_at_thresholds']:.4f} at these thresholds"
    assert f"{tuned}, {figures['accuracy']:.4f} at 0.5" in command.said
    outcome = json.loads(Path("several/bundle/bundle.json").read_text())
    assert outcome["task"] == "multi-label"
    assert outcome["thresholds"].keys() == {"baskets", "beads", "leaves", "woven"}
    command("score", "several/bundle", drawn / "valid", "several-scores", "--probabilities")
    table = polars.read_parquet("several-scores/parts")
    thresholds = np.array([outcome["thresholds"][name] for name in outcome["classes"]])
    for probability_counts, labels in zip(
        table["probabilities"], table["labels"].to_list(), strict=True
    ):
        given = np.array(outcome["classes"])[np.array([*probability_counts.values()]) >= thresholds]
        assert labels == given.tolist()
    assert table["labels"].list.len().max() >= 2


# --------------------------------------------------------------------------------- stops


def weights(bundle: Path) -> dict[str, np.ndarray]:
    result = safetensors.numpy.load_file(bundle / "weights.safetensors")
    return {name: value for name, value in result.items() if name.startswith("head.")}


def start(place: Path, *words: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "arrowhead", *map(str, words), "--json"]
    out = (place / "killed.out").open("wb")
    return forks.Popen(command, cwd=place, stdout=out, stderr=out)


FLAGS = ["--head", "lesson", "--dropout", 0.3, "--rate", 0.003, "--epochs", 60, "--batch-size", 9]


@pytest.fixture(scope="module")
def undisturbed(store: Path, place: Path) -> Path:
    """A bundle whose training nobody stopped."""
    here(place, "train", store, place / "calm", *FLAGS)
    return place / "calm"


@dataclass(frozen=True)
class Shaken:
    """A training that was interrupted, stopped while another wanted its place, killed, robbed of
    the end of its newest checkpoint, and then left alone.
    """

    bundle: Path
    refused: str
    """What the other command said."""
    torn: str
    """The checkpoint's name."""
    said: str
    """What the last command said."""
    runs: list[Any]
    """Of all these commands."""


@pytest.fixture(scope="module")
def shaken(undisturbed: Path, store: Path, place: Path) -> Shaken:
    words = ["train", store, place / "shaken", *FLAGS, "--checkpoint-seconds", 0]
    before = len(runs(place, "train"))

    def newest() -> int:
        result = [int(path.name[6:]) for path in place.glob(".shaken.training/heads-??????")]
        return max(result, default=-1)

    def begun(more: int) -> subprocess.Popen[bytes]:
        """The command, when it has kept a checkpoint so much later than the last."""
        process, least = start(place, *words), newest() + more
        until = time.monotonic() + 300
        while newest() < least:
            assert process.poll() is None, (place / "killed.out").read_text()
            assert time.monotonic() < until
            time.sleep(0.02)
        return process

    first = begun(2)
    os.kill(first.pid, signal.SIGINT)
    assert first.wait(300) == 130
    assert not (place / "shaken").exists()
    second = begun(4)
    os.kill(second.pid, signal.SIGSTOP)
    refused, output = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(refused):
        here(place, *words, code=2)
    second.kill()
    assert second.wait(300) == -signal.SIGKILL
    truncated = place / ".shaken.training" / f"heads-{newest():06}"
    state = truncated / "state.safetensors"  # at every length: test_checkpoint.py
    state.write_bytes(state.read_bytes()[:-1])
    with contextlib.redirect_stdout(output):
        here(place, *words)
    every = runs(place, "train")
    new = every[: len(every) - before]
    return Shaken(place / "shaken", refused.getvalue(), truncated.name, output.getvalue(), new)


def test_a_stopped_training_goes_on_to_the_same_weights(undisturbed, shaken):
    assert "going on from the checkpoint" in " ".join(shaken.said.split())
    calm, result = weights(undisturbed), weights(shaken.bundle)
    assert all(np.array_equal(calm[part], result[part]) for part in calm)
    assert not shaken.bundle.with_name(f".{shaken.bundle.name}.training").exists()


def test_a_torn_checkpoint_falls_back_to_the_one_before_it_and_says_so(shaken):
    assert shaken.torn in shaken.said
    assert "incomplete or has changed" in shaken.said


def test_a_stopped_training_goes_on_in_the_same_run_and_doubles_no_step(undisturbed, shaken, place):
    from mlflow import MlflowClient

    assert len(shaken.runs) == 2  # one parent and its child, both taken up again
    parent = next(run for run in shaken.runs if "mlflow.parentRunId" not in run.data.tags)
    assert parent.info.status == "FINISHED"
    (child,) = children(place, parent.info.run_id)
    client = MlflowClient(tracking_uri=f"sqlite:///{place}/mlflow.db")
    history = client.get_metric_history(child.info.run_id, "train_loss")
    assert Counter(point.step for point in history) == Counter(range(60))


def test_two_commands_do_not_train_to_the_same_bundle(shaken):
    assert "being written by another Arrowhead command" in shaken.refused


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(4))
def test_a_training_on_two_workers_survives_any_kills_with_the_same_weights(
    undisturbed, store, place, seed
):
    draw = np.random.default_rng(seed)
    name = f"chaos-{seed}"
    words = ["train", store, place / name, *FLAGS, "--checkpoint-seconds", 0, "--workers", 2]
    before = len(runs(place, "train"))
    for victim in draw.permutation(["driver", "driver", "worker"]):
        driver = start(place, *words)
        time.sleep(float(draw.uniform(8, 40)))
        ours = psutil.Process(driver.pid)
        with contextlib.suppress(psutil.Error):
            workers = [p for p in ours.children(recursive=True) if "RayTrainWorker" in p.name()]
            if victim == "driver":
                driver.kill()
            elif workers:
                workers[int(draw.integers(len(workers)))].kill()
        if victim == "worker":
            assert driver.wait(400) == 0, (place / "killed.out").read_text()
            break
        driver.wait(60)
    if not (place / name / "bundle.json").is_file():
        assert start(place, *words).wait(400) == 0, (place / "killed.out").read_text()
    calm, result = weights(undisturbed), weights(place / name)
    for part in calm:  # two workers sum in another order than one
        np.testing.assert_allclose(result[part], calm[part], rtol=1e-5, atol=1e-6)
    assert len(runs(place, "train")) == before + 2
