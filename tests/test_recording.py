"""MLflow records the same as the bundle: settings, datasets, and models that can be ranked."""

from __future__ import annotations

import base64
import csv
import json
from pathlib import Path
from typing import Any

import pytest

from arrowhead import demo
from arrowhead.cli.main import main
from arrowhead.tracking.client import TrackingConfig

SMALL = ["--body", "shufflenet_v2_x0_5", "--weights", "random", "--size", "64"]
QUIET = ["--no-system-metrics"]


@pytest.fixture(scope="module")
def workdir(
    tmp_path_factory: pytest.TempPathFactory, image_folder: Path, add_mlflow_db: Any
) -> Path:
    """A folder with a table of the synthetic images, a store of it, and a grid training."""
    folder: Path = add_mlflow_db(tmp_path_factory.mktemp("recording"))
    with (folder / "weave.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["path", "labels", "split"])
        for image in sorted(image_folder.glob("*/*/*.jpg")):
            split, label = image.parts[-3:-1]
            lines.writerow([image, label, split])
    grid = "rate=0.001,0.1 weight_decay=0,0.5 dropout=0,0.2 seed=0,1"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        arguments = ["fit", "weave.csv", "out", *SMALL, *QUIET, "--epochs", "3", "--grid", grid]
        with pytest.raises(SystemExit) as exit_info:
            main(arguments)
        assert exit_info.value.code == 0
    return folder


@pytest.fixture(autouse=True)
def _change_directory(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workdir)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def client(workdir: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=TrackingConfig().uri)


def run_of(client: Any, bundle: Path) -> Any:
    lineage = json.loads((bundle / "bundle.json").read_bytes())["lineage"]
    return client.get_run(lineage["run_id"]), lineage


def logged_models(client: Any, run: Any) -> list[Any]:
    outputs = run.outputs.model_outputs if run.outputs else []
    return [client.get_logged_model(one.model_id) for one in outputs]


def test_run_and_bundle_record_the_settings_of_the_grids_winner(client, workdir):
    run, lineage = run_of(client, workdir / "out/bundle")
    for name, value in lineage["training"].items():
        assert run.data.params[f"train.{name}"] == str(value)
    assert run.data.params["train.rate_asked"] == "grid"
    assert not [name for name in run.data.tags if name.startswith("resumed.")]


def test_auto_rate_is_logged_as_its_value_and_the_request_separately(client, workdir, command):
    result = command("train", "out/store", "found", "--epochs", "2", *QUIET, "--no-log-model")
    run, _ = run_of(client, workdir / "found")
    assert float(run.data.params["train.rate"]) == result["rate"]
    assert run.data.params["train.rate_asked"] == "auto"
    assert logged_models(client, run) == []  # --no-log-model was given
    assert "bundle" not in [file.path for file in client.list_artifacts(run.info.run_id)]
    assert run.data.metrics["accuracy"] == result["metrics"]["accuracy"]


def test_logged_precision_and_warmup_are_those_used(client, workdir):
    run, lineage = run_of(client, workdir / "out/bundle")
    used = {name: run.data.params[f"train.{name}"] for name in ("precision", "warmup")}
    assert used["precision"] in ("fp32", "bf16", "fp16")
    assert used["warmup"] == "0.25"
    assert (
        run.data.params["train.precision_asked"] == run.data.params["train.warmup_asked"] == "auto"
    )
    assert used == {name: str(lineage["training"][name]) for name in used}


def test_lr_find_score_and_evaluate_runs_log_their_settings_and_dataset(
    client, workdir, image_folder, command
):
    result = command("lr-find", "out/store", "--steps", "20", "--batch-size", "16", *QUIET)
    run = client.get_run(result["run_id"])
    assert run.data.params["lr_finder.steps"] == "20"
    assert run.data.params["train.batch_size"] == "16"
    assert run.data.tags["dataset"] == "weave"
    assert {one.dataset.name for one in run.inputs.dataset_inputs} == {"weave"}
    scored = command("score", "out/bundle", image_folder / "new", "scores", "--flag-novel", *QUIET)
    params = client.get_run(scored["run_id"]).data.params
    assert params["score.flag_novel"] == "True" and "extract.chunk_size" in params
    evaluated = command("evaluate", "out/bundle", image_folder / "valid", "judged", *QUIET)
    params = client.get_run(evaluated["run_id"]).data.params
    assert params["bundle"] == evaluated["bundle_fingerprint"]
    scoring_metrics, evaluation_metrics = (
        client.get_run(one["run_id"]).data.metrics for one in (scored, evaluated)
    )
    assert scoring_metrics["novel"] == scored["counts"]["novel"], "counted where --flag-novel asked"
    written = json.loads(Path("judged/score.json").read_bytes())
    assert evaluated["counts"]["novel"] is written["counts"]["novel"] is None
    assert (
        "novel" not in evaluation_metrics
        and evaluation_metrics["inputs"] == evaluated["counts"]["inputs"]
    )
    command("scores", "verify", "judged")
    assert command("watch", evaluated["run_id"], "--no-follow")["status"] == "FINISHED"


def test_logistic_regression_model_is_named_logistic(client, workdir, command):
    command("train", "out/store", "exact", "--head", "logistic", *QUIET)
    run, _ = run_of(client, workdir / "exact")
    (model,) = logged_models(client, run)
    assert model.name == "weave-shufflenet_v2_x0_5-logistic"


def test_table_is_the_dataset_source_and_each_split_an_input_with_its_counts(client, workdir):
    run, _ = run_of(client, workdir / "out/bundle")
    dataset_by_context = {
        tag.value: one.dataset
        for one in run.inputs.dataset_inputs
        for tag in one.tags
        if tag.key == "mlflow.data.context"
    }
    assert dataset_by_context.keys() == {"training", "validation"}
    for context, count in (("training", 18), ("validation", 6)):
        assert dataset_by_context[context].name == "weave"
        assert json.loads(dataset_by_context[context].source) == {"uri": str(workdir / "weave.csv")}
        profile = json.loads(dataset_by_context[context].profile)
        assert profile["num_rows"] == 3 * count
        assert profile["images_by_class"] == dict.fromkeys(demo.CLASSES, count)
        assert json.loads(dataset_by_context[context].schema)["mlflow_colspec"]
    assert dataset_by_context["training"].digest != dataset_by_context["validation"].digest


def test_logged_model_has_a_name_metrics_params_and_tags_for_ranking(client, workdir):
    run, lineage = run_of(client, workdir / "out/bundle")
    (model,) = logged_models(client, run)
    assert model.name == "weave-shufflenet_v2_x0_5-linear"
    metrics = {one.key: one for one in model.metrics}
    assert metrics["accuracy"].value == run.data.metrics["accuracy"]
    assert metrics["accuracy"].dataset_name == "weave"
    (valid,) = [
        one.dataset.digest
        for one in run.inputs.dataset_inputs
        if "validation" in [tag.value for tag in one.tags]
    ]
    assert metrics["accuracy"].dataset_digest == valid
    assert model.params["train.rate"] == str(lineage["training"]["rate"])
    tags = {name: model.tags.get(name) for name in ("body", "task", "dataset")}
    assert tags == {"body": "shufflenet_v2_x0_5", "task": "single-label", "dataset": "weave"}
    ranked = client.search_logged_models(
        experiment_ids=[run.info.experiment_id],
        order_by=[{"field_name": "metrics.accuracy", "ascending": False}],
    )
    assert model.model_id in [one.model_id for one in ranked]


def test_models_input_example_is_synthetic_and_not_a_user_photo(
    client, workdir, image_folder, tmp_path
):
    from mlflow.artifacts import download_artifacts

    run, _ = run_of(client, workdir / "out/bundle")
    (model,) = logged_models(client, run)
    folder = Path(download_artifacts(model.artifact_location, dst_path=str(tmp_path)))
    result = json.loads((folder / "input_example.json").read_text())
    photos = {image.read_bytes() for image in image_folder.rglob("*.jpg")}
    assert base64.b64decode(result["data"][0][0]) not in photos
    assert not list(folder.rglob("report"))


def test_unlogged_model_cannot_be_registered(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["train", "out/store", "b", "--no-log-model", "--register", "dogs"])
    assert exit_info.value.code == 2
    assert "--no-log-model" in capsys.readouterr().err
