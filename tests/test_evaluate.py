"""Figures on images that nothing was chosen on: the split test after a training, and labelled
images of any kind with `evaluate`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from conftest import Tracked

from arrowhead import cli

FLAGS = ["--body", "resnet18", "--weights", "random", "--size", "64"]
HEAD = ["--epochs", "4", "--rate", "0.01"]


def laid_out(drawn: Path, folder: Path) -> Path:
    """train/, valid/ and test/ of the drawn images: two thirds of the validation images test."""
    shutil.copytree(drawn, folder, ignore=shutil.ignore_patterns("new"))
    for label in sorted((folder / "valid").iterdir()):
        (folder / "test" / label.name).mkdir(parents=True)
        images = sorted(label.iterdir())
        for image in images[len(images) // 3 :]:
            image.rename(folder / "test" / label.name / image.name)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, drawn: Path, tracked: Tracked) -> Path:
    """A folder with photos in three splits, and what `fit` made of them."""
    folder = tracked(tmp_path_factory.mktemp("evaluate"))
    laid_out(drawn, folder / "photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with pytest.raises(SystemExit) as ended:
            cli.main(["fit", "photos", "out", *FLAGS, *HEAD])
    assert ended.value.code == 0
    return folder


@pytest.fixture(autouse=True)
def _there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def about(bundle: str | Path) -> dict[str, Any]:
    return dict(json.loads((Path(bundle) / "bundle.json").read_text()))


def count(folder: str) -> int:
    return sum(1 for file in Path(folder).rglob("*") if file.is_file())


# ------------------------------------------------------------------------------- the split test


def test_the_test_images_are_evaluated_once_at_the_end(command: Any) -> None:
    from mlflow import MlflowClient

    found = command("train", "out/store", "again", *HEAD)
    assert "test: accuracy" in command.said and "nothing was chosen on these images" in command.said
    figures = found["metrics"]
    assert figures["test_images"] == count("photos/test") > figures["images"]
    assert about("again")["metrics"]["test_accuracy"] == figures["test_accuracy"]
    low, high = figures["test_accuracy_interval"]
    assert low < figures["test_accuracy"] < high
    rows = command("score", "again", "photos/test", "test-scores")
    assert rows["folders"]["accuracy"] == pytest.approx(figures["test_accuracy"])
    assert [low, high] == rows["folders"]["accuracy_interval"]
    run = MlflowClient(tracking_uri="sqlite:///mlflow.db").get_run(found["run_id"])
    children = MlflowClient(tracking_uri="sqlite:///mlflow.db").search_runs(
        [run.info.experiment_id], f"tags.mlflow.parentRunId = '{found['run_id']}'"
    )
    recorded = [one.data.metrics.get("test_accuracy") for one in (run, *children)]
    assert figures["test_accuracy"] in recorded


def test_nothing_is_chosen_on_the_test_images(command: Any, drawn: Path, tmp_path: Path) -> None:
    """Other images under the labels of test: the same head, temperature, figures; but test's."""
    laid_out(drawn, tmp_path / "photos")
    first, second, third = sorted((tmp_path / "photos" / "test").iterdir())
    first.rename(tmp_path / "x")
    second.rename(first)
    third.rename(second)
    (tmp_path / "x").rename(third)
    words = [*FLAGS, *HEAD, "--best", "accuracy"]
    command("fit", tmp_path / "photos", tmp_path / "out", *words)
    command("fit", "photos", tmp_path / "right", *words)
    ours, theirs = about(tmp_path / "out/bundle"), about(tmp_path / "right/bundle")
    one, two = (
        safetensors.numpy.load_file(tmp_path / name / "bundle" / "weights.safetensors")
        for name in ("out", "right")
    )
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert ours["temperature"] == theirs["temperature"]
    wrong, right = ours["metrics"], theirs["metrics"]
    assert wrong["test_accuracy"] < right["test_accuracy"]
    for name in wrong.keys() | right.keys():
        assert name.startswith("test_") or wrong[name] == right[name]


def test_without_test_images_there_is_no_test_figure(command: Any, tmp_path: Path) -> None:
    shutil.copytree("photos", tmp_path / "photos", ignore=shutil.ignore_patterns("test"))
    found = command("fit", tmp_path / "photos", tmp_path / "out", *FLAGS, *HEAD)
    assert not any(name.startswith("test_") for name in found["metrics"])


def test_an_interval_is_wilsons() -> None:
    from scipy.stats import binomtest

    from arrowhead.metrics import interval

    for right, images in ((0, 3), (197, 200), (1, 1), (500, 1000)):
        wilson = binomtest(right, images).proportion_ci(method="wilson")
        assert interval(right, images) == pytest.approx((wilson.low, wilson.high), abs=1e-6)
    assert interval(0, 0) == (0.0, 1.0)
