"""MLflow has the same record as the bundle: settings, data sets, models that can be ranked."""

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
def place(tmp_path_factory: pytest.TempPathFactory, drawn: Path, tracked: Any) -> Path:
    """A folder with a table of the drawn images, a store of it, and a training by a grid."""
    folder: Path = tracked(tmp_path_factory.mktemp("recording"))
    with (folder / "weave.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["path", "labels", "split"])
        for image in sorted(drawn.glob("*/*/*.jpg")):
            split, label = image.parts[-3:-1]
            lines.writerow([image, label, split])
    grid = "rate=0.001,0.1 weight_decay=0,0.5 dropout=0,0.2 seed=0,1"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        words = ["fit", "weave.csv", "out", *SMALL, *QUIET, "--epochs", "3", "--grid", grid]
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0
    return folder


@pytest.fixture(autouse=True)
def _there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def client(place: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=TrackingConfig().uri)


def run_of(client: Any, bundle: Path) -> Any:
    lineage = json.loads((bundle / "bundle.json").read_bytes())["lineage"]
    return client.get_run(lineage["run_id"]), lineage


def models(client: Any, run: Any) -> list[Any]:
    outputs = run.outputs.model_outputs if run.outputs else []
    return [client.get_logged_model(one.model_id) for one in outputs]


def test_the_run_has_the_settings_of_the_grids_winner_as_its_bundle_has_them(client, place):
    run, lineage = run_of(client, place / "out/bundle")
    for name, value in lineage["training"].items():
        assert run.data.params[f"train.{name}"] == str(value)
    assert run.data.params["train.rate_asked"] == "grid"
    assert not [name for name in run.data.tags if name.startswith("resumed.")]


def test_a_rate_that_was_found_is_the_number_and_what_was_asked_has_a_name_of_its_own(
    client, place, command
):
    result = command("train", "out/store", "found", "--epochs", "2", *QUIET, "--no-log-model")
    run, _ = run_of(client, place / "found")
    assert float(run.data.params["train.rate"]) == result["rate"]
    assert run.data.params["train.rate_asked"] == "auto"
    assert models(client, run) == []  # none was to be logged
    assert "bundle" not in [file.path for file in client.list_artifacts(run.info.run_id)]
    assert run.data.metrics["accuracy"] == result["metrics"]["accuracy"]


def test_precision_and_warm_up_are_what_was_used(client, place):
    run, lineage = run_of(client, place / "out/bundle")
    used = {name: run.data.params[f"train.{name}"] for name in ("precision", "warmup")}
    assert used["precision"] in ("fp32", "bf16", "fp16")
    assert used["warmup"] == "0.25"
    assert (
        run.data.params["train.precision_asked"] == run.data.params["train.warmup_asked"] == "auto"
    )
    assert used == {name: str(lineage["training"][name]) for name in used}


def test_the_runs_of_lr_find_score_and_evaluate_have_their_settings_and_data_set(
    client, place, drawn, command
):
    result = command("lr-find", "out/store", "--steps", "20", "--batch-size", "16", *QUIET)
    run = client.get_run(result["run_id"])
    assert run.data.params["lr_finder.steps"] == "20"
    assert run.data.params["train.batch_size"] == "16"
    assert run.data.tags["dataset"] == "weave"
    assert {one.dataset.name for one in run.inputs.dataset_inputs} == {"weave"}
    scored = command("score", "out/bundle", drawn / "new", "scores", "--flag-novel", *QUIET)
    params = client.get_run(scored["run_id"]).data.params
    assert params["score.flag_novel"] == "True" and "extract.chunk_size" in params
    judged = command("evaluate", "out/bundle", drawn / "valid", "judged", *QUIET)
    params = client.get_run(judged["run_id"]).data.params
    assert params["bundle"] == judged["bundle_fingerprint"]
    request, not_asked = (client.get_run(one["run_id"]).data.metrics for one in (scored, judged))
    assert request["novel"] == scored["counts"]["novel"], "counted where --flag-novel asked"
    written = json.loads(Path("judged/score.json").read_bytes())
    assert judged["counts"]["novel"] is written["counts"]["novel"] is None
    assert "novel" not in not_asked and not_asked["inputs"] == judged["counts"]["inputs"]
    command("scores", "verify", "judged")
    assert command("watch", judged["run_id"], "--no-follow")["status"] == "FINISHED"


def test_a_model_of_logistic_regression_is_named_so(client, place, command):
    command("train", "out/store", "exact", "--head", "logistic", *QUIET)
    run, _ = run_of(client, place / "exact")
    (model,) = models(client, run)
    assert model.name == "weave-shufflenet_v2_x0_5-logistic"


def test_a_table_is_the_source_and_each_split_an_input_with_its_counts(client, place):
    run, _ = run_of(client, place / "out/bundle")
    given = {
        tag.value: one.dataset
        for one in run.inputs.dataset_inputs
        for tag in one.tags
        if tag.key == "mlflow.data.context"
    }
    assert given.keys() == {"training", "validation"}
    for use, count in (("training", 18), ("validation", 6)):
        assert given[use].name == "weave"
        assert json.loads(given[use].source) == {"uri": str(place / "weave.csv")}
        profile = json.loads(given[use].profile)
        assert profile["num_rows"] == 3 * count
        assert profile["images_by_class"] == dict.fromkeys(demo.CLASSES, count)
        assert json.loads(given[use].schema)["mlflow_colspec"]
    assert given["training"].digest != given["validation"].digest


def test_a_logged_model_is_named_and_has_the_figures_params_and_tags_to_rank_it_by(client, place):
    run, lineage = run_of(client, place / "out/bundle")
    (model,) = models(client, run)
    assert model.name == "weave-shufflenet_v2_x0_5-linear"
    figures = {one.key: one for one in model.metrics}
    assert figures["accuracy"].value == run.data.metrics["accuracy"]
    assert figures["accuracy"].dataset_name == "weave"
    (valid,) = [
        one.dataset.digest
        for one in run.inputs.dataset_inputs
        if "validation" in [tag.value for tag in one.tags]
    ]
    assert figures["accuracy"].dataset_digest == valid
    assert model.params["train.rate"] == str(lineage["training"]["rate"])
    tags = {name: model.tags.get(name) for name in ("body", "task", "dataset")}
    assert tags == {"body": "shufflenet_v2_x0_5", "task": "single-label", "dataset": "weave"}
    ranked = client.search_logged_models(
        experiment_ids=[run.info.experiment_id],
        order_by=[{"field_name": "metrics.accuracy", "ascending": False}],
    )
    assert model.model_id in [one.model_id for one in ranked]


def test_the_models_example_is_drawn_and_no_photo_of_the_user_s(client, place, drawn, tmp_path):
    from mlflow.artifacts import download_artifacts

    run, _ = run_of(client, place / "out/bundle")
    (model,) = models(client, run)
    folder = Path(download_artifacts(model.artifact_location, dst_path=str(tmp_path)))
    result = json.loads((folder / "input_example.json").read_text())
    photos = {image.read_bytes() for image in drawn.rglob("*.jpg")}
    assert base64.b64decode(result["data"][0][0]) not in photos
    assert not list(folder.rglob("report"))


def test_a_model_that_is_not_logged_cannot_be_registered(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "out/store", "b", "--no-log-model", "--register", "dogs"])
    assert ended.value.code == 2
    assert "--no-log-model" in capsys.readouterr().err
