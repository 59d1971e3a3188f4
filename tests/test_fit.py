"""`arrowhead fit` as a user runs it: from a folder of images to a bundle and scores."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import polars
import pyarrow as pa
import pytest
from conftest import AddMlflowDb

from arrowhead import ConfigError, Images, Learner
from arrowhead.cli.main import main
from arrowhead.features.backbone import BodyConfig

RANDOM = ["--body", "resnet18", "--weights", "random", "--size", "64"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory, add_mlflow_db: AddMlflowDb) -> Path:
    """A working directory that the tests of this file share, in order."""
    return add_mlflow_db(tmp_path_factory.mktemp("work"))


@pytest.fixture(autouse=True)
def _run_in_workdir(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workdir)


@pytest.fixture(scope="module")
def data(image_folder: Path, workdir: Path) -> Path:
    """A copy of the synthetic images that tests may change."""
    shutil.copytree(image_folder, workdir / "data")
    shutil.rmtree(workdir / "data" / "new")
    return workdir / "data"


@pytest.fixture(scope="module")
def fitted(data: Path, workdir: Path, image_folder: Path) -> Path:
    """The output folder of a first fit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workdir)
        with pytest.raises(SystemExit) as exit_info:
            main(["fit", str(data), "out", *RANDOM, "--epochs", "4"])
    assert exit_info.value.code == 0
    return workdir / "out"


def test_a_folder_becomes_a_store_and_a_bundle(fitted):
    assert (fitted / "store" / "manifest.json").is_file()
    assert (fitted / "bundle" / "bundle.json").is_file()
    bundle = json.loads((fitted / "bundle" / "bundle.json").read_text())
    assert bundle["classes"] == ["baskets", "beads", "leaves"]
    assert bundle["recipe"]["size"] == 64
    assert 0.34 < bundle["metrics"]["accuracy"] <= 1


def test_the_second_fit_decodes_nothing_and_gives_the_same_numbers(fitted, data, command):
    before = json.loads((fitted / "bundle" / "bundle.json").read_text())
    result = command("fit", data, "out", *RANDOM, "--epochs", "4")
    assert result["counts"]["decoded"] == 0
    assert result["counts"]["reused"] == result["counts"]["inputs"] == 72
    assert result["metrics"]["loss"] == before["metrics"]["loss"]
    assert [line["epoch"] for line in result["epochs"]] == [0, 1, 2, 3]
    assert {"train_loss", "valid_loss", "accuracy"} <= result["epochs"][0].keys()


def test_only_new_images_are_decoded(fitted, data, command, image_folder):
    new = sorted((image_folder / "new").iterdir())[0]
    (data / "train" / "beads" / "one_more.jpg").write_bytes(new.read_bytes())
    (data / "train" / "leaves").rename(data / "train" / "ferns")
    (data / "valid" / "leaves").rename(data / "valid" / "ferns")
    result = command("precompute", data, "out/store", *RANDOM)
    assert result["counts"]["decoded"] == 1
    assert result["counts"]["inputs"] == 73
    assert result["classes"] == ["baskets", "beads", "ferns"]


def test_another_recipe_is_refused_with_the_first_differing_field(fitted, data, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["precompute", str(data), "out/store", *RANDOM, "--resize", "squash"])
    assert exit_info.value.code == 2
    assert "resize = crop" in capsys.readouterr().err


def manifest_shard(store: Path) -> Path:
    """A shard that the manifest names: others may be left over from an earlier catalog."""
    name = json.loads((store / "manifest.json").read_text())["shards"][0]["name"]
    return store / "shards" / f"{name}.arrow"


def test_a_flipped_byte_is_detected_before_training(fitted, capsys):
    shard = manifest_shard(fitted / "store")
    original = shard.read_bytes()
    damaged = bytearray(original)
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(bytes(damaged))
    with pytest.raises(SystemExit) as exit_info:
        main(["train", "out/store", "other", "--epochs", "1", "--rate", "0.01"])
    shard.write_bytes(original)
    assert exit_info.value.code == 4
    assert shard.name in capsys.readouterr().err
    assert not Path("other").exists()


def test_a_second_fit_does_not_accept_a_changed_shard(fitted, data, command, capsys):
    shard = manifest_shard(fitted / "store")
    original = shard.read_bytes()
    shard.write_bytes(original[:-200] + bytes([original[-200] ^ 1]) + original[-199:])
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", str(data), "out", *RANDOM])
    assert exit_info.value.code == 4
    assert shard.name in capsys.readouterr().err
    shard.unlink()  # what the refusal says to do
    result = command("precompute", data, "out/store", *RANDOM)
    assert result["counts"]["decoded"] + result["counts"]["reused"] == 73
    assert shard.read_bytes() == original


def test_changed_backbone_weights_in_the_store_are_detected_before_a_bundle_is_built(
    fitted, capsys
):
    weights = fitted / "store" / "body.safetensors"
    original = weights.read_bytes()
    weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(SystemExit) as exit_info:
        main(["train", "out/store", "other", "--epochs", "1", "--rate", "0.01"])
    weights.write_bytes(original)
    assert exit_info.value.code == 4
    assert "body.safetensors" in capsys.readouterr().err
    assert not Path("other").exists()


def test_too_few_images_for_validation_are_refused_before_decoding(image_folder, tmp_path, capsys):
    for name in ("baskets", "beads"):
        photos = sorted((image_folder / "train" / name).iterdir())
        (tmp_path / "one" / name).mkdir(parents=True)
        shutil.copy(photos[0], tmp_path / "one" / name)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", str(tmp_path / "one"), str(out), *RANDOM])
    assert exit_info.value.code == 2
    output = capsys.readouterr().err
    assert "none can be held out for validation" in output
    assert "  wanted  two images or more" in output
    assert "  do      add images" in output
    assert not (out / "store").exists()
    with pytest.raises(ConfigError, match="none can be held out"):
        Learner(BodyConfig(body="resnet18", weights="random"), Images.from_folder(tmp_path / "one"))


def test_lr_find_writes_a_figure_and_a_table_and_suggests_rates(fitted, command):
    result = command("lr-find", "out/store")
    assert result["verdict"] in ("good", "unstable", "rules differ", "flat: no signal")
    five = {"held-out", "valley", "steepest", "minimum/10", "slide"}
    assert result["suggestions"].keys() - {"schedule"} == five
    assert Path(result["figure"]).read_bytes().startswith(b"\x89PNG")
    assert len((fitted / "store" / "lr_finder.csv").read_text().splitlines()) == 101


def test_the_replaced_bundle_is_kept_and_its_accuracy_compared(fitted, command):
    first = command("train", "out/store", "twice/bundle", "--epochs", "3")
    previous = Path("twice/bundle/bundle.json").read_bytes()
    assert "replaces" not in command.stderr and not Path("twice/bundle.previous").exists()
    second = command("train", "out/store", "twice/bundle", "--epochs", "1", "--rate", "1e-6")
    previous_accuracy, new_accuracy = (result["metrics"]["accuracy"] for result in (first, second))
    assert f"accuracy {previous_accuracy:.4f} (this one {new_accuracy:.4f})" in command.stderr
    assert Path("twice/bundle.previous/bundle.json").read_bytes() == previous
    command("bundle", "verify", "twice/bundle.previous")
    assert "twice/bundle.previous" in second["files"]
    command("train", "out/store", "twice/bundle", "--epochs", "2", "--rate", "1e-6")
    assert re.search(
        rf"in place of the bundle of [^:]+:..: accuracy {previous_accuracy:.4f}", command.stderr
    )
    assert "the bundle there now" in command.stderr and "will be deleted" in command.stderr


def test_reports_of_a_training_are_in_its_bundle_and_listed_in_the_result(fitted, command):
    result = command("train", "out/store", "named/b", "--epochs", "2", "--folds", "2")
    report = Path("named/b/report")
    names = {"confusion.png", "epochs.csv", "folds.arrow", "lr_finder.csv", "lr_finder.png"}
    assert {file.name for file in report.iterdir()} == names
    assert set(result["files"]) == {"named/b", *(str(report / name) for name in names)}
    assert [file.name for file in Path("named").iterdir()] == ["b"]
    assert str(report) in command.stderr
    shutil.rmtree(report)
    command("bundle", "verify", "named/b")  # it is valid without the report


def test_a_folder_with_other_files_is_not_overwritten_as_the_previous_bundle(fitted, capsys):
    Path("mine.previous").mkdir()
    Path("mine.previous/notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as exit_info:
        main(["train", "out/store", "mine", "--epochs", "1"])
    assert exit_info.value.code == 2
    assert "mine.previous holds files" in capsys.readouterr().err


def test_both_heads_train_on_the_same_store(fitted, command):
    result = command("train", "out/store", "lesson", "--head", "lesson", "--epochs", "2")
    assert len(result["epochs"]) == 2
    assert json.loads(Path("lesson/bundle.json").read_text())["head"] == "lesson"


def test_every_file_gets_one_row_of_scores_even_broken_ones(fitted, image_folder, command, workdir):
    images = workdir / "mixed"
    shutil.copytree(image_folder / "new", images / "deep" / "er")
    (images / "page.jpg").write_text("<html>not here</html>")
    (images / "empty.jpg").touch()
    cut = sorted((image_folder / "new").iterdir())[0].read_bytes()
    (images / "cut.jpg").write_bytes(cut[: len(cut) // 2])
    (images / "new\nline \N{CAT FACE} \x1b[31m.jpg").write_bytes(cut)
    (images / ".hidden.jpg").write_bytes(cut)
    result = command("score", "out/bundle", images, "scores", "--probabilities", code=3)
    counts = result["counts"]
    assert counts["inputs"] == 28 == counts["scored"] + counts["faults"]
    assert counts["ignored"] == 1
    assert result["faults"] == {"not an image": 1, "empty": 1, "truncated": 1}
    assert result["fault_kinds"] == result["faults"]
    output = " ".join(command.stderr.split())
    assert re.search(r"not read: 1 \S.*cut\.jpg, .*the rows of scores/parts whose column", output)
    rows = polars.read_parquet("scores/parts")
    assert rows["path"].to_list() == sorted(rows["path"].to_list())
    assert rows.height == 28
    scored = rows.filter(polars.col("fault").is_null())
    sums = scored["probabilities"].struct.unnest().sum_horizontal().to_numpy()
    np.testing.assert_allclose(sums, 1, atol=1e-5)
    same = scored.filter(polars.col("path").str.contains("line"))
    assert same["path"].to_list() == ["new\\x0aline \N{CAT FACE} \\x1b[31m.jpg"]
    faulty = rows.filter(polars.col("fault").is_not_null())
    assert faulty["label"].is_null().all() and faulty["top_k"].is_null().all()


def test_an_interrupted_scoring_resumes_and_another_bundle_is_refused(
    fitted, image_folder, command, capsys
):
    command("score", "out/bundle", image_folder / "new", "again", "--chunk-size", "6")
    parts = sorted(Path("again/parts").glob("*.parquet"))
    before = [part.read_bytes() for part in parts]
    assert len(parts) > 1
    parts[0].unlink()
    result = command("score", "out/bundle", image_folder / "new", "again", "--chunk-size", "6")
    assert [part.read_bytes() for part in parts] == before
    assert 0 < result["counts"]["decoded"] < result["counts"]["scored"]
    with pytest.raises(SystemExit) as exit_info:
        main(["score", "lesson", str(image_folder / "new"), "again", "--chunk-size", "6"])
    assert exit_info.value.code == 2
    assert "of another bundle" in capsys.readouterr().err


def test_a_bundle_with_one_changed_byte_is_refused(fitted, image_folder, capsys, workdir):
    shutil.copytree(fitted / "bundle", workdir / "torn")
    weights = workdir / "torn" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(SystemExit) as exit_info:
        main(["score", "torn", str(image_folder / "new"), "never"])
    assert exit_info.value.code == 4
    assert "weights.safetensors" in capsys.readouterr().err


def test_shards_open_without_arrowhead(fitted):
    for file in (fitted / "store" / "shards").iterdir():
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        assert table.column_names == ["path", "image_id", "view", "feature", "fault"]
        assert table.schema.field("feature").type == pa.list_(pa.float16(), 512)
        frame = polars.read_ipc(file)
        assert frame.height == table.num_rows


def test_the_run_can_be_read_back_from_mlflow(fitted, workdir):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{workdir}/mlflow.db")
    experiment = client.get_experiment_by_name("arrowhead").experiment_id
    parents = client.search_runs([experiment], "tags.`mlflow.runName` = 'fit'")
    first = min(parents, key=lambda run: run.info.start_time)
    assert first.info.status == "FINISHED"
    assert 0 < first.data.metrics["accuracy"] <= 1
    assert json.loads(first.data.params["recipe"])["body"] == "resnet18"
    names = {file.path for file in client.list_artifacts(first.info.run_id)}
    assert "evaluation" in names
    (model,) = client.search_logged_models([experiment], f"source_run_id = '{first.info.run_id}'")
    assert model.name == "data-resnet18-linear"
    filter_string = f"tags.`mlflow.parentRunId` = '{first.info.run_id}'"
    children = {run.info.run_name: run for run in client.search_runs([experiment], filter_string)}
    assert children.keys() == {"extract", "lr-find", "train"}
    history = client.get_metric_history(children["train"].info.run_id, "valid_loss")
    assert [point.step for point in history] == [0, 1, 2, 3]
    assert children["extract"].data.metrics["decoded"] == 72
    assert [one.dataset.name for one in first.inputs.dataset_inputs] == ["data", "data"]  # by split
    result = {f.path for f in client.list_artifacts(children["lr-find"].info.run_id, "lr_finder")}
    assert result == {"lr_finder/lr_finder.png", "lr_finder/lr_finder.csv"}


@pytest.mark.slow
def test_real_photos_are_classified(dogscats, mobilenet, photo_store, command):
    shutil.copytree(photo_store, "real/store")
    result = command("fit", dogscats, "real", *mobilenet)
    assert (result["counts"]["features"], result["counts"]["reused"]) == (800, 800)
    assert result["metrics"]["accuracy"] >= 0.96
    again = command("fit", dogscats, "real", *mobilenet, "--head", "lesson", "--epochs", "5")
    assert again["counts"]["decoded"] == 0
    assert again["metrics"]["accuracy"] >= 0.96
    scored = command("score", "real/bundle", dogscats / "valid", "real-scores")
    rows = polars.read_parquet("real-scores/parts")
    right = rows["label"] == rows["path"].str.split("/").list.first()
    assert right.mean() == pytest.approx(again["metrics"]["accuracy"])
    assert scored["labels"].keys() == {"cats", "dogs"}
