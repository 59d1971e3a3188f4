"""Metrics on images on which nothing was chosen: the test split after a training, and labelled
images with `evaluate`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars
import pytest
import safetensors.numpy
from conftest import Bundled, Tracked

from arrowhead.cli.main import main

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
            main(["fit", "photos", "out", *FLAGS, *HEAD])
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

    result = command("train", "out/store", "again", *HEAD)
    assert "test: accuracy" in command.said and "nothing was chosen on these images" in command.said
    figures = result["metrics"]
    assert figures["test_images"] == count("photos/test") > figures["images"]
    assert about("again")["metrics"]["test_accuracy"] == figures["test_accuracy"]
    low, high = figures["test_accuracy_interval"]
    assert low < figures["test_accuracy"] < high
    rows = command("score", "again", "photos/test", "test-scores")
    assert rows["folders"]["accuracy"] == pytest.approx(figures["test_accuracy"])
    assert [low, high] == rows["folders"]["accuracy_interval"]
    run = MlflowClient(tracking_uri="sqlite:///mlflow.db").get_run(result["run_id"])
    children = MlflowClient(tracking_uri="sqlite:///mlflow.db").search_runs(
        [run.info.experiment_id], f"tags.mlflow.parentRunId = '{result['run_id']}'"
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
    result = command("fit", tmp_path / "photos", tmp_path / "out", *FLAGS, *HEAD)
    assert not any(name.startswith("test_") for name in result["metrics"])


def test_an_interval_is_wilsons() -> None:
    from scipy.stats import binomtest

    from arrowhead.evaluation.metrics import wilson_interval

    for right, images in ((0, 3), (197, 200), (1, 1), (500, 1000)):
        wilson = binomtest(right, images).proportion_ci(method="wilson")
        assert wilson_interval(right, images) == pytest.approx((wilson.low, wilson.high), abs=1e-6)
    assert wilson_interval(0, 0) == (0.0, 1.0)


# ------------------------------------------------------------------------------ arrowhead evaluate


def test_a_bundle_is_evaluated_with_the_figures_of_its_training(command: Any) -> None:
    """The same images, through Parquet and back: the figures that `train` had of them."""
    result = command("evaluate", "out/bundle", "photos", "by-split", "--split", "test")
    there = about("out/bundle")["metrics"]
    figures = result["metrics"]
    assert figures["images"] == count("photos/test")
    for name, value in there.items():
        if name.startswith("test_") and isinstance(value, float):
            assert figures[name.removeprefix("test_")] == pytest.approx(value, rel=1e-5), name
    assert figures["confusion"] == there["test_confusion"]
    assert figures["per_class"] == there["test_per_class"]
    again = command("evaluate", "out/bundle", "photos/test", "by-folder")
    assert again["metrics"]["confusion"] == figures["confusion"]
    assert again["metrics"]["loss"] == pytest.approx(figures["loss"], rel=1e-5)


def test_the_written_metrics_equal_scikit_learns(command: Any, place: Path) -> None:
    from mlflow import MlflowClient
    from sklearn.metrics import classification_report

    result = command("evaluate", "out/bundle", "photos/test", "written")
    rows = polars.read_parquet("written/parts")
    truth = [path.split("/")[0] for path in rows["path"]]
    expected = classification_report(truth, rows["label"].to_list(), output_dict=True)
    table = polars.read_csv("written/per_class.csv")
    for line in table.iter_rows(named=True):
        theirs = expected[line["class"]]
        assert line["images"] == theirs["support"]
        assert line["f1"] == pytest.approx(theirs["f1-score"])
        assert line["precision"] == pytest.approx(theirs["precision"])
    assert json.loads(Path("written/evaluation.json").read_text())["metrics"] == result["metrics"]
    assert Path("written/confusion.png").is_file()
    for line in ("95 % interval", "precision", *about("out/bundle")["classes"]):
        assert line in command.said
    assert command("scores", "verify", "written")["problems"] == []
    client = MlflowClient(tracking_uri=f"sqlite:///{place}/mlflow.db")
    run = client.get_run(result["run_id"])
    assert run.data.tags["trained_by"] == about("out/bundle")["lineage"]["run_id"]
    assert run.data.metrics["accuracy"] == pytest.approx(result["metrics"]["accuracy"])
    (data,) = run.inputs.dataset_inputs
    assert data.tags[0].value == "evaluation"
    assert "evaluation/confusion.png" in [
        one.path for one in client.list_artifacts(result["run_id"], "evaluation")
    ]


def test_images_that_were_trained_on_are_counted_and_left_out_of_the_figure_to_trust(
    command: Any, tmp_path: Path
) -> None:
    used = {"trained_on": count("photos/train"), "validated": count("photos/valid")}
    there = about("out/bundle")["metrics"]
    for number, image in enumerate(sorted(Path("photos").rglob("*.jpg"))):  # under other names
        (tmp_path / "all" / image.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(image, tmp_path / "all" / image.parent.name / f"{number}.jpg")
    figures = command("evaluate", "out/bundle", tmp_path / "all", tmp_path / "a")["metrics"]
    assert f"WARNING: the bundle was trained on {used['trained_on']} of these" in command.said
    assert (figures["images_used"], figures["trusted_images"]) == (used, "new")
    assert figures["images"] == count("photos")
    assert figures["trusted"]["images"] == count("photos/test")
    assert figures["trusted"]["confusion"] == there["test_confusion"]
    written = json.loads((tmp_path / "a" / "evaluation.json").read_text())["metrics"]
    assert written["trusted"] == figures["trusted"]
    assert figures["tables_show"] == "trusted"
    assert f"by class, {count('photos/test')} images new to the bundle:" in command.said
    table = polars.read_csv(tmp_path / "a" / "per_class.csv")
    assert table["images"].sum() == count("photos/test")
    scored = command("score", "out/bundle", tmp_path / "all", tmp_path / "s")
    assert scored["images_used"] == used and "WARNING" in command.said
    shutil.copytree("photos", tmp_path / "fit", ignore=shutil.ignore_patterns("test"))
    figures = command("evaluate", "out/bundle", tmp_path / "fit", tmp_path / "b")["metrics"]
    assert figures["trusted_images"] == "validation"
    assert figures["trusted"]["confusion"] == there["confusion"]
    figures = command("evaluate", "out/bundle", "photos/train", tmp_path / "c")["metrics"]
    assert (figures["trusted_images"], figures["trusted"]) == ("none", None)
    assert "nothing here says how good it is on others" in command.said
    figures = command("evaluate", "out/bundle", "photos/test", tmp_path / "d")["metrics"]
    assert (figures["trusted_images"], figures["trusted"]) == ("all", None)
    assert "WARNING" not in command.said


def test_one_line_reports_that_all_images_were_validation_images(
    command: Any, tmp_path: Path
) -> None:
    figures = command("evaluate", "out/bundle", "photos/valid", tmp_path / "a")["metrics"]
    assert (figures["trusted_images"], figures["trusted"]) == ("validation", None)
    result = [line for line in command.said.splitlines() if "the bundle was" in line]
    assert len(result) == 1 and "with all of these images, not trained on them" in result[0]
    command("score", "out/bundle", "photos/valid", tmp_path / "b")
    there = figures["images"]
    assert f"WARNING: the bundle was validated with {there} of these images:" in command.said


def test_a_bundle_without_a_record_of_its_images_is_reported(
    command: Any, bundled: Bundled, tmp_path: Path
) -> None:
    figures = command("evaluate", bundled(), "photos/test", tmp_path / "a")["metrics"]
    assert (figures["images_used"], figures["trusted_images"]) == (None, "unknown")
    assert "does not say which images it was trained on" in command.said
    command("score", bundled(), "photos/test", tmp_path / "b")
    assert "does not say which images it was trained on" in command.said


def test_a_table_is_evaluated_and_a_store_saves_the_decoding(command: Any, tmp_path: Path) -> None:
    images = sorted(Path("photos/test").rglob("*.jpg"))
    lines = [f"{image.absolute()},{image.parent.name}" for image in images[::-1]]
    (tmp_path / "labels.csv").write_text("\n".join(["path,labels", *lines]))
    words = ["--store", "out/store"]
    result = command("evaluate", "out/bundle", tmp_path / "labels.csv", tmp_path / "out", *words)
    assert result["counts"]["decoded"] == 0
    there = about("out/bundle")["metrics"]
    assert result["metrics"]["accuracy"] == there["test_accuracy"]


def test_a_bundle_that_gives_several_labels_is_evaluated_on_a_table_of_several(
    command: Any, tmp_path: Path
) -> None:
    from sklearn.metrics import f1_score

    for part in ("train", "test"):
        images = sorted(Path("photos", part).rglob("*.jpg"))
        lines = [
            f"{image.absolute()},{image.parent.name}{' round' * (image.parent.name == 'beads')}"
            for image in images
        ]
        (tmp_path / f"{part}.csv").write_text("\n".join(["path,labels", *lines]))
    words = [*FLAGS, *HEAD, "--multi-label"]
    command("fit", tmp_path / "train.csv", tmp_path / "out", *words)
    bundle = tmp_path / "out" / "bundle"
    result = command("evaluate", bundle, tmp_path / "test.csv", tmp_path / "figures")
    names = about(bundle)["classes"]
    assert names == ["baskets", "beads", "leaves", "round"]
    rows = polars.read_parquet(tmp_path / "figures" / "parts")
    given = np.array([[name in labels for name in names] for labels in rows["labels"]])
    truth = np.array([[name in line for name in names] for line in rows["path"]])
    truth[:, 3] = truth[:, 1]
    figures = result["metrics"]
    assert figures["f1_macro"] == pytest.approx(
        f1_score(truth, given, average="macro", zero_division=0)
    )
    right = figures["accuracy_at_thresholds"]
    assert right == pytest.approx((truth == given).mean())
    both = f"decisions right {right:.4f} at these thresholds, {figures['accuracy']:.4f} at 0.5"
    assert both in command.said
    assert not (tmp_path / "figures" / "confusion.png").exists()
    assert "round" in command.said and "counts as absent" not in command.said
    lines = [f"{image.absolute()},{image.parent.name}" for image in images]
    (tmp_path / "one.csv").write_text("\n".join(["path,label", *lines]))
    result = command("evaluate", bundle, tmp_path / "one.csv", tmp_path / "one")
    assert "a class that is not among an image's labels counts as absent" in command.said
    assert result["metrics"]["per_class"]["round"]["images"] == 0


def test_without_an_output_folder_the_same_evaluation_uses_the_same_one(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", place / "out/bundle", place / "photos/test"]
    words += ["--tracking-uri", f"sqlite:///{place}/mlflow.db"]
    first, second = command(*words), command(*words)
    assert first["out"] == second["out"] and first["out"].startswith("evaluation-test-")
    assert second["counts"]["decoded"] == 0 and second["counts"]["skipped"] > 0
    assert first["metrics"] == second["metrics"]
    other = command(*words[:2], place / "photos", *words[3:])
    assert other["out"] != first["out"]
    shutil.rmtree(other["out"])
    Path(other["out"]).write_text("mine")
    with pytest.raises(SystemExit) as ended:  # not a traceback, there or where nobody may write
        main([*map(str, words[:2]), str(place / "photos"), *words[3:]])
    assert ended.value.code == 2


def test_classes_that_the_bundle_does_not_know_are_refused_or_left_out(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("photos/test", tmp_path / "photos")
    first, second, _ = sorted((tmp_path / "photos").iterdir())
    shutil.copytree(first, tmp_path / "photos" / "foxes")
    shutil.rmtree(second)  # a class without images is no fault
    words = ["evaluate", "out/bundle", str(tmp_path / "photos"), str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        main(words)
    output = capsys.readouterr().err
    assert ended.value.code == 2
    assert "foxes" in output and "--ignore-unknown-classes" in output
    assert not (tmp_path / "out").exists()
    result = command(*words, "--ignore-unknown-classes")
    assert result["metrics"]["images"] == count("photos/test") * 2 // 3
    assert result["metrics"]["per_class"][second.name]["images"] == 0
    assert "foxes" in command.said


def test_unreadable_images_are_reported_and_not_part_of_any_metric(
    command: Any, tmp_path: Path
) -> None:
    shutil.copytree("photos/test", tmp_path / "photos")
    first, *_ = sorted((tmp_path / "photos").iterdir())
    (first / "torn.jpg").write_bytes(b"\xff\xd8\xff nothing")
    result = command("evaluate", "out/bundle", tmp_path / "photos", tmp_path / "out", code=3)
    assert result["metrics"]["images"] == count("photos/test")
    assert result["metrics"]["faults"] == result["counts"]["faults"] == 1


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (["photos/test", "--split", "valid"], "no image in the split valid"),
        (["photos/test/CLASS"], "no folder"),
        (["two.csv", "--multi-label"], "one label"),
        (["none.csv"], "no label"),
        (["nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    words: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, _ = about("out/bundle")["classes"]
    image = next(Path("photos/test").rglob("*.jpg"))
    Path("two.csv").write_text(f"path,labels\n{image},{first} {second}\n")
    others = sorted(Path("photos/test").rglob("*.jpg"))[1:3]
    Path("none.csv").write_text(f'path,tags\n{others[0]},"[""{first}""]"\n{others[1]},[]\n')
    data = words[0].replace("CLASS", first)
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "out/bundle", data, str(tmp_path / "x"), *words[1:]])
    assert ended.value.code == 2
    assert word in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
