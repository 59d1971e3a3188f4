"""Training as a user runs it: many heads, folds, a learning curve, interruptions at any moment."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
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
from conftest import AddMlflowDb

from arrowhead.cli.main import main
from arrowhead.features.store import Store
from arrowhead.training import run as training_run

BODY = ["--body", "resnet18", "--weights", "random", "--size", "64"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory, add_mlflow_db: AddMlflowDb) -> Path:
    """A working directory that the tests of this file share."""
    return add_mlflow_db(tmp_path_factory.mktemp("study"))


@pytest.fixture(autouse=True)
def _change_directory(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workdir)


@pytest.fixture(scope="module")
def store(image_folder: Path, workdir: Path) -> Path:
    """Features of the synthetic images."""
    run_in_process(workdir, "precompute", image_folder, workdir / "store", *BODY)
    return workdir / "store"


def run_in_process(workdir: Path, *words: object, code: int = 0) -> None:
    """Run a command in this process, which saves the imports of a new one."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(workdir)
        with pytest.raises(SystemExit) as exit_info:
            main([*map(str, words)])
    assert exit_info.value.code == code


def runs(workdir: Path, name: str) -> list[Any]:
    """MLflow runs of this name, newest first."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{workdir}/mlflow.db")
    experiment = client.get_experiment_by_name("arrowhead").experiment_id
    return list(client.search_runs([experiment], f"tags.`mlflow.runName` = '{name}'"))


def children(workdir: Path, parent: str) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{workdir}/mlflow.db")
    experiment = client.get_experiment_by_name("arrowhead").experiment_id
    words = f"tags.`mlflow.parentRunId` = '{parent}'"
    return list(client.search_runs([experiment], words, order_by=["metrics.accuracy DESC"]))


# ------------------------------------------------------------------------------ many heads


def test_grid_keeps_its_best_head_and_logs_each_head_as_a_child_run(store, workdir, command):
    grid = "rate=1e-5,1e-2 weight_decay=0,0.1 seed=0,1"
    result = command("train", store, "best", "--grid", grid, "--epochs", 4)
    heads = children(workdir, result["run_id"])
    actual = [run for run in heads if run.info.run_name != "train"]
    assert len(actual) == 8
    assert {run.info.status for run in actual} == {"FINISHED"}
    assert actual[0].data.params["train.rate"] == "0.01"
    best = result["grid"]["settings"][0]
    assert best["knobs"]["rate"] == result["rate"] == 0.01
    assert best["mean"] >= result["grid"]["settings"][-1]["mean"]
    accuracy = result["epochs"][-1]["accuracy"]
    assert "; p: p-value of the difference from the first row:" in command.stderr
    assert re.search(
        "rows: the mean ± standard deviation over 2 seeds; the bundle is the best head of the first"
        rf" row: seed [01], accuracy {accuracy:.4f}\n",
        command.stderr,
    )
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


def test_folds_and_learning_curve_use_the_settings_of_the_best_head(store, workdir, command):
    also = ["--epochs", 3, "--folds", 3, "--learning-curve", "--curve-seeds", 2]
    grid = ["--grid", "rate=1e-6,1e-2 weight_decay=0.5 dropout=0.3 seed=1", "--rate", 0.5]
    searched = command("train", store, "searched", *grid, *also)
    folds = polars.read_ipc(searched["folds"]["file"])
    messages = ["--rate", 0.01, "--weight-decay", 0.5, "--dropout", 0.3, "--seed", 1]
    request = command("train", store, "asked", *messages, *also)
    parts = {
        line.split(" · ")[0]: line for line in command.stderr.splitlines() if "training " in line
    }
    for part in ("folds", "learning-curve"):
        assert "best" not in parts[part], "the best of these heads says nothing"
    assert searched["rate"] == 0.01
    assert searched["folds"]["figures"] == request["folds"]["figures"]
    assert folds.equals(polars.read_ipc(request["folds"]["file"]))
    assert searched["learning_curve"]["points"] == request["learning_curve"]["points"]
    result = [json.loads(Path(name, "bundle.json").read_text()) for name in ("searched", "asked")]
    assert result[0]["lineage"]["training"] == result[1]["lineage"]["training"]


def test_out_of_fold_probabilities_come_from_heads_not_trained_on_the_image(
    store, workdir, command
):
    result = command("train", store, "folded", "--rate", 0.01, "--epochs", 3, "--folds", 4)
    table = polars.read_ipc(result["folds"]["file"])
    catalog = Store(store).read_catalog()
    used = [p for p, s in zip(catalog["paths"], catalog["splits"], strict=True) if s != "test"]
    assert table["path"].to_list() == used
    assert sorted(set(table["fold"])) == [0, 1, 2, 3]
    prob = np.array(table["probability"].to_list())
    assert np.abs(prob.sum(1) - 1).max() < 1e-5
    classes = Store(store).manifest()["classes"]
    label = np.array([classes.index(names[0]) for names in table["labels"].to_list()])
    by_fold = [
        float((prob.argmax(1) == label)[table["fold"].to_numpy() == fold].mean())
        for fold in range(4)
    ]
    assert result["folds"]["figures"]["accuracy"]["mean"] == pytest.approx(np.mean(by_fold))
    assert [line["accuracy"] for line in result["folds"]["folds"]] == pytest.approx(by_fold)


def test_epoch_table_shows_the_selection_metric_and_why_training_ended(
    store, workdir, command, capsys
):
    flags = ["--rate", 0.05, "--epochs", 40, "--best", "balanced_accuracy", "--patience", 3]
    result = command("train", store, "early", *flags)
    output, lines = command.stderr, result["epochs"]
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
    run_in_process(workdir, "bundle", "info", workdir / "early", "--per-class")
    info = capsys.readouterr().out
    assert "single-label" in info
    assert "\\x0a" not in info
    assert f"learning rate 0.05 · epochs 40 (kept: epoch {result['epoch']})" in info
    table = info.split("validation images, by class:")[1].split("\n")
    assert table[1].split() == ["class", "precision", "recall", "F1", "images"]
    assert {line.split()[0] for line in table[2:5]} == {"baskets", "beads", "leaves"}
    run_in_process(workdir, "bundle", "info", workdir / "early")
    assert "by class" not in capsys.readouterr().out


def test_folds_train_for_as_many_epochs_as_the_best_head(store, workdir, command):
    flags = ["--rate", 0.3, "--epochs", 9, "--best", "accuracy", "--patience", 3, "--folds", 3]
    result = command("train", store, "patient", *flags)
    assert result["folds"]["epochs"] == result["epoch"] + 1
    assert {line["epoch"] for line in result["folds"]["folds"]} == {result["epoch"]}


def test_single_image_class_has_no_out_of_fold_probability_and_training_succeeds(
    image_folder, workdir, command
):
    rows = ["path,label,split"]
    for file in sorted(image_folder.glob("*/*/*.jpg")):
        split, name = file.relative_to(image_folder).parts[:2]
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


def test_learning_curve_is_plotted_and_logged(store, workdir, command):
    flags = ["--rate", 0.01, "--epochs", 3, "--learning-curve", "--curve-seeds", 2]
    result = command("train", store, "curved", *flags)
    points = result["learning_curve"]["points"]
    assert points[-1]["share"] == 1.0
    assert [point["images"] for point in points] == sorted({point["images"] for point in points})
    assert Path("curved/report/learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert len(Path("curved/report/learning_curve.csv").read_text().splitlines()) == 1 + len(points)


def test_memory_mapped_store_gives_the_same_numbers(store, command, monkeypatch):
    flags = ["--rate", 0.01, "--epochs", 2]
    in_memory = command("train", store, "held", *flags)
    monkeypatch.setattr(training_run, "_free_bytes", lambda device: 1000)
    mapped = command("train", store, "mapped", *flags)
    assert mapped["epochs"] == in_memory["epochs"]


def test_multi_label_images_are_trained_and_scored(image_folder, workdir, command):
    rows = ["path\tlabels\tsplit"]
    for file in sorted(image_folder.glob("*/*/*.jpg")):
        split, name = file.relative_to(image_folder).parts[:2]
        both = f"{name} woven" if name == "baskets" else name
        if split in ("train", "valid"):
            rows.append(f"{file}\t{both}\t{split}")
    Path("several.tsv").write_text("\n".join(rows) + "\n")
    result = command(
        "fit", "several.tsv", "several", "--multi-label", *BODY, "--epochs", 8, "--best", "f2"
    )
    assert {"valid_loss", "accuracy", "f1", "f2"} <= result["epochs"][0].keys()
    assert result["epoch"] == int(np.argmax([line["f2"] for line in result["epochs"]]))
    heading = next(line for line in command.stderr.splitlines() if line.split()[:1] == ["epoch"])
    assert heading.split()[-1] == "f2"
    figures, kept = result["metrics"], result["epochs"][result["epoch"]]
    assert figures["f2_samples"] > 0.6
    assert figures["accuracy"] == pytest.approx(kept["accuracy"]), "one name, one number"
    tuned = f"decisions right {figures['accuracy_at_thresholds']:.4f} at these thresholds"
    assert f"{tuned}, {figures['accuracy']:.4f} at 0.5" in command.stderr
    outcome = json.loads(Path("several/bundle/bundle.json").read_text())
    assert outcome["task"] == "multi-label"
    assert outcome["thresholds"].keys() == {"baskets", "beads", "leaves", "woven"}
    command("score", "several/bundle", image_folder / "valid", "several-scores", "--probabilities")
    table = polars.read_parquet("several-scores/parts")
    thresholds = np.array([outcome["thresholds"][name] for name in outcome["classes"]])
    for probability_counts, labels in zip(
        table["probabilities"], table["labels"].to_list(), strict=True
    ):
        given = np.array(outcome["classes"])[np.array([*probability_counts.values()]) >= thresholds]
        assert labels == given.tolist()
    assert table["labels"].list.len().max() >= 2


# --------------------------------------------------------------------------------- interruptions


def weights(bundle: Path) -> dict[str, np.ndarray]:
    result = safetensors.numpy.load_file(bundle / "weights.safetensors")
    return {name: value for name, value in result.items() if name.startswith("head.")}


def start(workdir: Path, *words: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "arrowhead", *map(str, words), "--json"]
    out = (workdir / "killed.out").open("wb")
    return forks.Popen(command, cwd=workdir, stdout=out, stderr=out)


FLAGS = ["--head", "lesson", "--dropout", 0.3, "--rate", 0.003, "--epochs", 60, "--batch-size", 9]


@pytest.fixture(scope="module")
def undisturbed(store: Path, workdir: Path) -> Path:
    """The bundle of an uninterrupted training."""
    run_in_process(workdir, "train", store, workdir / "calm", *FLAGS)
    return workdir / "calm"


@dataclass(frozen=True)
class InterruptedTraining:
    """A training that was interrupted, suspended while another wanted its folder, killed, had its
    newest checkpoint truncated, and then finished.
    """

    bundle: Path
    refused: str
    """What the other command said."""
    truncated: str
    """The checkpoint's name."""
    output: str
    """What the last command said."""
    runs: list[Any]
    """Of all these commands."""


@pytest.fixture(scope="module")
def interrupted(undisturbed: Path, store: Path, workdir: Path) -> InterruptedTraining:
    arguments = ["train", store, workdir / "shaken", *FLAGS, "--checkpoint-seconds", 0]
    before = len(runs(workdir, "train"))

    def newest_checkpoint() -> int:
        result = [int(path.name[6:]) for path in workdir.glob(".shaken.training/heads-??????")]
        return max(result, default=-1)

    def start_and_wait(more: int) -> subprocess.Popen[bytes]:
        """Start the command; return when its newest checkpoint is this many epochs later."""
        process, target_epoch = start(workdir, *arguments), newest_checkpoint() + more
        deadline = time.monotonic() + 300
        while newest_checkpoint() < target_epoch:
            assert process.poll() is None, (workdir / "killed.out").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return process

    first = start_and_wait(2)
    os.kill(first.pid, signal.SIGINT)
    assert first.wait(300) == 130
    assert not (workdir / "shaken").exists()
    second = start_and_wait(4)
    os.kill(second.pid, signal.SIGSTOP)
    refused, output = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(refused):
        run_in_process(workdir, *arguments, code=2)
    second.kill()
    assert second.wait(300) == -signal.SIGKILL
    truncated = workdir / ".shaken.training" / f"heads-{newest_checkpoint():06}"
    state = truncated / "state.safetensors"  # every length is tested in test_checkpoint.py
    state.write_bytes(state.read_bytes()[:-1])
    with contextlib.redirect_stdout(output):
        run_in_process(workdir, *arguments)
    all_runs = runs(workdir, "train")
    new_runs = all_runs[: len(all_runs) - before]
    return InterruptedTraining(
        workdir / "shaken", refused.getvalue(), truncated.name, output.getvalue(), new_runs
    )


def test_stopped_training_resumes_to_the_same_weights(undisturbed, interrupted):
    assert "going on from the checkpoint" in " ".join(interrupted.output.split())
    expected, result = weights(undisturbed), weights(interrupted.bundle)
    assert all(np.array_equal(expected[part], result[part]) for part in expected)
    assert not interrupted.bundle.with_name(f".{interrupted.bundle.name}.training").exists()


def test_truncated_checkpoint_falls_back_to_the_previous_one_and_reports_it(interrupted):
    assert interrupted.truncated in interrupted.output
    assert "incomplete or has changed" in interrupted.output


def test_stopped_training_resumes_in_the_same_run_without_duplicate_steps(
    undisturbed, interrupted, workdir
):
    from mlflow import MlflowClient

    assert len(interrupted.runs) == 2  # one parent and its child, both resumed
    parent = next(run for run in interrupted.runs if "mlflow.parentRunId" not in run.data.tags)
    assert parent.info.status == "FINISHED"
    (child,) = children(workdir, parent.info.run_id)
    client = MlflowClient(tracking_uri=f"sqlite:///{workdir}/mlflow.db")
    history = client.get_metric_history(child.info.run_id, "train_loss")
    assert Counter(point.step for point in history) == Counter(range(60))


def test_concurrent_training_to_the_same_bundle_is_refused(interrupted):
    assert "being written by another Arrowhead command" in interrupted.refused


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(4))
def test_training_on_two_workers_survives_kills_with_the_same_weights(
    undisturbed, store, workdir, seed
):
    rng = np.random.default_rng(seed)
    name = f"chaos-{seed}"
    arguments = ["train", store, workdir / name, *FLAGS, "--checkpoint-seconds", 0, "--workers", 2]
    before = len(runs(workdir, "train"))
    for victim in rng.permutation(["driver", "driver", "worker"]):
        driver = start(workdir, *arguments)
        time.sleep(float(rng.uniform(8, 40)))
        driver_process = psutil.Process(driver.pid)
        with contextlib.suppress(psutil.Error):
            workers = [
                p for p in driver_process.children(recursive=True) if "RayTrainWorker" in p.name()
            ]
            if victim == "driver":
                driver.kill()
            elif workers:
                workers[int(rng.integers(len(workers)))].kill()
        if victim == "worker":
            assert driver.wait(400) == 0, (workdir / "killed.out").read_text()
            break
        driver.wait(60)
    if not (workdir / name / "bundle.json").is_file():
        assert start(workdir, *arguments).wait(400) == 0, (workdir / "killed.out").read_text()
    expected, result = weights(undisturbed), weights(workdir / name)
    for part in expected:  # two workers sum in another order than one
        np.testing.assert_allclose(result[part], expected[part], rtol=1e-5, atol=1e-6)
    assert len(runs(workdir, "train")) == before + 2
