"""Metrics on held-out images: the test split after training, and `arrowhead evaluate`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars
import pytest
import safetensors.numpy
from conftest import AddMlflowDb, MakeBundle

from arrowhead.cli.main import main

FLAGS = ["--body", "resnet18", "--weights", "random", "--size", "64"]
HEAD = ["--epochs", "4", "--rate", "0.01"]


def copy_with_test_split(image_folder: Path, folder: Path) -> Path:
    """Copy the synthetic images and move two thirds of valid/ to test/."""
    shutil.copytree(image_folder, folder, ignore=shutil.ignore_patterns("new"))
    for label in sorted((folder / "valid").iterdir()):
        (folder / "test" / label.name).mkdir(parents=True)
        images = sorted(label.iterdir())
        for image in images[len(images) // 3 :]:
            image.rename(folder / "test" / label.name / image.name)
    return folder


@pytest.fixture(scope="module")
def workdir(
    tmp_path_factory: pytest.TempPathFactory, image_folder: Path, add_mlflow_db: AddMlflowDb
) -> Path:
    """A folder with photos in three splits and the output of `fit`."""
    folder = add_mlflow_db(tmp_path_factory.mktemp("evaluate"))
    copy_with_test_split(image_folder, folder / "photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with pytest.raises(SystemExit) as exit_info:
            main(["fit", "photos", "out", *FLAGS, *HEAD])
    assert exit_info.value.code == 0
    return folder


@pytest.fixture(autouse=True)
def _run_in_workdir(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workdir)


def bundle_json(bundle: str | Path) -> dict[str, Any]:
    return dict(json.loads((Path(bundle) / "bundle.json").read_text()))


def count_files(folder: str) -> int:
    return sum(1 for file in Path(folder).rglob("*") if file.is_file())


# ------------------------------------------------------------------------------- the split test


def test_the_test_images_are_evaluated_once_at_the_end(command: Any) -> None:
    from mlflow import MlflowClient

    result = command("train", "out/store", "again", *HEAD)
    assert (
        "test: accuracy" in command.stderr
        and "nothing was chosen on these images" in command.stderr
    )
    metrics = result["metrics"]
    assert metrics["test_images"] == count_files("photos/test") > metrics["images"]
    assert bundle_json("again")["metrics"]["test_accuracy"] == metrics["test_accuracy"]
    low, high = metrics["test_accuracy_interval"]
    assert low < metrics["test_accuracy"] < high
    rows = command("score", "again", "photos/test", "test-scores")
    assert rows["folders"]["accuracy"] == pytest.approx(metrics["test_accuracy"])
    assert [low, high] == rows["folders"]["accuracy_interval"]
    run = MlflowClient(tracking_uri="sqlite:///mlflow.db").get_run(result["run_id"])
    children = MlflowClient(tracking_uri="sqlite:///mlflow.db").search_runs(
        [run.info.experiment_id], f"tags.mlflow.parentRunId = '{result['run_id']}'"
    )
    recorded = [one.data.metrics.get("test_accuracy") for one in (run, *children)]
    assert metrics["test_accuracy"] in recorded


def test_test_images_do_not_influence_training_or_selection(
    command: Any, image_folder: Path, tmp_path: Path
) -> None:
    """Swapped test labels change the test metrics and nothing else."""
    copy_with_test_split(image_folder, tmp_path / "photos")
    first, second, third = sorted((tmp_path / "photos" / "test").iterdir())
    first.rename(tmp_path / "x")
    second.rename(first)
    third.rename(second)
    (tmp_path / "x").rename(third)
    args = [*FLAGS, *HEAD, "--best", "accuracy"]
    command("fit", tmp_path / "photos", tmp_path / "out", *args)
    command("fit", "photos", tmp_path / "right", *args)
    swapped, original = bundle_json(tmp_path / "out/bundle"), bundle_json(tmp_path / "right/bundle")
    one, two = (
        safetensors.numpy.load_file(tmp_path / name / "bundle" / "weights.safetensors")
        for name in ("out", "right")
    )
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert swapped["temperature"] == original["temperature"]
    swapped_metrics, original_metrics = swapped["metrics"], original["metrics"]
    assert swapped_metrics["test_accuracy"] < original_metrics["test_accuracy"]
    for name in swapped_metrics.keys() | original_metrics.keys():
        assert name.startswith("test_") or swapped_metrics[name] == original_metrics[name]


def test_without_test_images_there_is_no_test_metric(command: Any, tmp_path: Path) -> None:
    shutil.copytree("photos", tmp_path / "photos", ignore=shutil.ignore_patterns("test"))
    result = command("fit", tmp_path / "photos", tmp_path / "out", *FLAGS, *HEAD)
    assert not any(name.startswith("test_") for name in result["metrics"])


def test_the_accuracy_interval_is_wilsons() -> None:
    from scipy.stats import binomtest

    from arrowhead.evaluation.metrics import wilson_interval

    for correct, images in ((0, 3), (197, 200), (1, 1), (500, 1000)):
        wilson = binomtest(correct, images).proportion_ci(method="wilson")
        assert wilson_interval(correct, images) == pytest.approx(
            (wilson.low, wilson.high), abs=1e-6
        )
    assert wilson_interval(0, 0) == (0.0, 1.0)


# ------------------------------------------------------------------------------ arrowhead evaluate


def test_evaluate_reproduces_the_test_metrics_of_training(command: Any) -> None:
    """The metrics computed from the Parquet scores equal those that `train` stored."""
    result = command("evaluate", "out/bundle", "photos", "by-split", "--split", "test")
    stored = bundle_json("out/bundle")["metrics"]
    metrics = result["metrics"]
    assert metrics["images"] == count_files("photos/test")
    for name, value in stored.items():
        if name.startswith("test_") and isinstance(value, float):
            assert metrics[name.removeprefix("test_")] == pytest.approx(value, rel=1e-5), name
    assert metrics["confusion"] == stored["test_confusion"]
    assert metrics["per_class"] == stored["test_per_class"]
    again = command("evaluate", "out/bundle", "photos/test", "by-folder")
    assert again["metrics"]["confusion"] == metrics["confusion"]
    assert again["metrics"]["loss"] == pytest.approx(metrics["loss"], rel=1e-5)


def test_the_written_metrics_equal_scikit_learns(command: Any, workdir: Path) -> None:
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
    for line in ("95 % interval", "precision", *bundle_json("out/bundle")["classes"]):
        assert line in command.stderr
    assert command("scores", "verify", "written")["problems"] == []
    client = MlflowClient(tracking_uri=f"sqlite:///{workdir}/mlflow.db")
    run = client.get_run(result["run_id"])
    assert run.data.tags["trained_by"] == bundle_json("out/bundle")["lineage"]["run_id"]
    assert run.data.metrics["accuracy"] == pytest.approx(result["metrics"]["accuracy"])
    (data,) = run.inputs.dataset_inputs
    assert data.tags[0].value == "evaluation"
    assert "evaluation/confusion.png" in [
        one.path for one in client.list_artifacts(result["run_id"], "evaluation")
    ]


def test_training_images_are_counted_and_excluded_from_the_trusted_metrics(
    command: Any, tmp_path: Path
) -> None:
    used = {"trained_on": count_files("photos/train"), "validated": count_files("photos/valid")}
    stored = bundle_json("out/bundle")["metrics"]
    for number, image in enumerate(sorted(Path("photos").rglob("*.jpg"))):  # names do not matter
        (tmp_path / "all" / image.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(image, tmp_path / "all" / image.parent.name / f"{number}.jpg")
    metrics = command("evaluate", "out/bundle", tmp_path / "all", tmp_path / "a")["metrics"]
    assert f"WARNING: the bundle was trained on {used['trained_on']} of these" in command.stderr
    assert (metrics["images_used"], metrics["trusted_images"]) == (used, "new")
    assert metrics["images"] == count_files("photos")
    assert metrics["trusted"]["images"] == count_files("photos/test")
    assert metrics["trusted"]["confusion"] == stored["test_confusion"]
    written = json.loads((tmp_path / "a" / "evaluation.json").read_text())["metrics"]
    assert written["trusted"] == metrics["trusted"]
    assert metrics["tables_show"] == "trusted"
    assert f"by class, {count_files('photos/test')} images new to the bundle:" in command.stderr
    table = polars.read_csv(tmp_path / "a" / "per_class.csv")
    assert table["images"].sum() == count_files("photos/test")
    scored = command("score", "out/bundle", tmp_path / "all", tmp_path / "s")
    assert scored["images_used"] == used and "WARNING" in command.stderr
    shutil.copytree("photos", tmp_path / "fit", ignore=shutil.ignore_patterns("test"))
    metrics = command("evaluate", "out/bundle", tmp_path / "fit", tmp_path / "b")["metrics"]
    assert metrics["trusted_images"] == "validation"
    assert metrics["trusted"]["confusion"] == stored["confusion"]
    metrics = command("evaluate", "out/bundle", "photos/train", tmp_path / "c")["metrics"]
    assert (metrics["trusted_images"], metrics["trusted"]) == ("none", None)
    assert "nothing here says how good it is on others" in command.stderr
    metrics = command("evaluate", "out/bundle", "photos/test", tmp_path / "d")["metrics"]
    assert (metrics["trusted_images"], metrics["trusted"]) == ("all", None)
    assert "WARNING" not in command.stderr


def test_it_is_reported_if_all_images_were_validation_images(command: Any, tmp_path: Path) -> None:
    metrics = command("evaluate", "out/bundle", "photos/valid", tmp_path / "a")["metrics"]
    assert (metrics["trusted_images"], metrics["trusted"]) == ("validation", None)
    result = [line for line in command.stderr.splitlines() if "the bundle was" in line]
    assert len(result) == 1 and "with all of these images, not trained on them" in result[0]
    command("score", "out/bundle", "photos/valid", tmp_path / "b")
    stored = metrics["images"]
    assert f"WARNING: the bundle was validated with {stored} of these images:" in command.stderr


def test_it_is_reported_if_the_bundle_does_not_record_its_training_images(
    command: Any, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    metrics = command("evaluate", make_bundle(), "photos/test", tmp_path / "a")["metrics"]
    assert (metrics["images_used"], metrics["trusted_images"]) == (None, "unknown")
    assert "does not say which images it was trained on" in command.stderr
    command("score", make_bundle(), "photos/test", tmp_path / "b")
    assert "does not say which images it was trained on" in command.stderr


def test_a_table_is_evaluated_with_features_of_a_store_instead_of_decoding(
    command: Any, tmp_path: Path
) -> None:
    images = sorted(Path("photos/test").rglob("*.jpg"))
    lines = [f"{image.absolute()},{image.parent.name}" for image in images[::-1]]
    (tmp_path / "labels.csv").write_text("\n".join(["path,labels", *lines]))
    args = ["--store", "out/store"]
    result = command("evaluate", "out/bundle", tmp_path / "labels.csv", tmp_path / "out", *args)
    assert result["counts"]["decoded"] == 0
    stored = bundle_json("out/bundle")["metrics"]
    assert result["metrics"]["accuracy"] == stored["test_accuracy"]


def test_a_multi_label_bundle_is_evaluated_on_a_multi_label_table(
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
    args = [*FLAGS, *HEAD, "--multi-label"]
    command("fit", tmp_path / "train.csv", tmp_path / "out", *args)
    bundle = tmp_path / "out" / "bundle"
    result = command("evaluate", bundle, tmp_path / "test.csv", tmp_path / "figures")
    names = bundle_json(bundle)["classes"]
    assert names == ["baskets", "beads", "leaves", "round"]
    rows = polars.read_parquet(tmp_path / "figures" / "parts")
    predicted = np.array([[name in labels for name in names] for labels in rows["labels"]])
    truth = np.array([[name in line for name in names] for line in rows["path"]])
    truth[:, 3] = truth[:, 1]
    metrics = result["metrics"]
    assert metrics["f1_macro"] == pytest.approx(
        f1_score(truth, predicted, average="macro", zero_division=0)
    )
    accuracy = metrics["accuracy_at_thresholds"]
    assert accuracy == pytest.approx((truth == predicted).mean())
    message = (
        f"decisions right {accuracy:.4f} at these thresholds, {metrics['accuracy']:.4f} at 0.5"
    )
    assert message in command.stderr
    assert not (tmp_path / "figures" / "confusion.png").exists()
    assert "round" in command.stderr and "counts as absent" not in command.stderr
    lines = [f"{image.absolute()},{image.parent.name}" for image in images]
    (tmp_path / "one.csv").write_text("\n".join(["path,label", *lines]))
    result = command("evaluate", bundle, tmp_path / "one.csv", tmp_path / "one")
    assert "a class that is not among an image's labels counts as absent" in command.stderr
    assert result["metrics"]["per_class"]["round"]["images"] == 0


def test_the_default_output_folder_is_the_same_for_the_same_evaluation(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workdir: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["evaluate", workdir / "out/bundle", workdir / "photos/test"]
    args += ["--tracking-uri", f"sqlite:///{workdir}/mlflow.db"]
    first, second = command(*args), command(*args)
    assert first["out"] == second["out"] and first["out"].startswith("evaluation-test-")
    assert second["counts"]["decoded"] == 0 and second["counts"]["skipped"] > 0
    assert first["metrics"] == second["metrics"]
    other = command(*args[:2], workdir / "photos", *args[3:])
    assert other["out"] != first["out"]
    shutil.rmtree(other["out"])
    Path(other["out"]).write_text("mine")
    with pytest.raises(SystemExit) as exit_info:  # a refusal, not a traceback
        main([*map(str, args[:2]), str(workdir / "photos"), *args[3:]])
    assert exit_info.value.code == 2


def test_classes_unknown_to_the_bundle_are_refused_or_ignored_on_request(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("photos/test", tmp_path / "photos")
    first, second, _ = sorted((tmp_path / "photos").iterdir())
    shutil.copytree(first, tmp_path / "photos" / "foxes")
    shutil.rmtree(second)  # a class without images is permitted
    args = ["evaluate", "out/bundle", str(tmp_path / "photos"), str(tmp_path / "out")]
    with pytest.raises(SystemExit) as exit_info:
        main(args)
    output = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert "foxes" in output and "--ignore-unknown-classes" in output
    assert not (tmp_path / "out").exists()
    result = command(*args, "--ignore-unknown-classes")
    assert result["metrics"]["images"] == count_files("photos/test") * 2 // 3
    assert result["metrics"]["per_class"][second.name]["images"] == 0
    assert "foxes" in command.stderr


def test_unreadable_images_are_reported_and_excluded_from_all_metrics(
    command: Any, tmp_path: Path
) -> None:
    shutil.copytree("photos/test", tmp_path / "photos")
    first, *_ = sorted((tmp_path / "photos").iterdir())
    (first / "torn.jpg").write_bytes(b"\xff\xd8\xff nothing")
    result = command("evaluate", "out/bundle", tmp_path / "photos", tmp_path / "out", code=3)
    assert result["metrics"]["images"] == count_files("photos/test")
    assert result["metrics"]["faults"] == result["counts"]["faults"] == 1


@pytest.mark.parametrize(
    ("args", "message_part"),
    [
        (["photos/test", "--split", "valid"], "no image in the split valid"),
        (["photos/test/CLASS"], "no folder"),
        (["two.csv", "--multi-label"], "one label"),
        (["none.csv"], "no label"),
        (["nowhere"], "nowhere"),
    ],
)
def test_data_that_cannot_be_evaluated_is_refused(
    args: list[str], message_part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, _ = bundle_json("out/bundle")["classes"]
    image = next(Path("photos/test").rglob("*.jpg"))
    Path("two.csv").write_text(f"path,labels\n{image},{first} {second}\n")
    others = sorted(Path("photos/test").rglob("*.jpg"))[1:3]
    Path("none.csv").write_text(f'path,tags\n{others[0]},"[""{first}""]"\n{others[1]},[]\n')
    data = args[0].replace("CLASS", first)
    with pytest.raises(SystemExit) as exit_info:
        main(["evaluate", "out/bundle", data, str(tmp_path / "x"), *args[1:]])
    assert exit_info.value.code == 2
    assert message_part in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
