"""A trained bundle can be found, fetched, loaded and served under its registered name."""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
import shutil
import sqlite3
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import polars
import pytest
from conftest import AddMlflowDb

from arrowhead import ConfigError, DataError, fileio
from arrowhead.bundle import format as bundle_format
from arrowhead.bundle import replay, resolve
from arrowhead.cli.main import main
from arrowhead.tracking import registry
from arrowhead.tracking.client import TrackingConfig
from arrowhead.tracking.registry import RegistryConfig
from arrowhead.tracking.run import start

SMALL = ["--body", "resnet18", "--weights", "random", "--size", "64"]
SHORT = ["--epochs", "2", "--rate", "0.01"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory, add_mlflow_db: AddMlflowDb) -> Path:
    """A working directory with a tracking store that the tests of this file share, in order."""
    return add_mlflow_db(tmp_path_factory.mktemp("registry"))


@pytest.fixture(autouse=True)
def _change_directory(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workdir)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("ARROWHEAD_SERVE_PATHS", raising=False)


@pytest.fixture(scope="module")
def fitted(workdir: Path, image_folder: Path) -> Path:
    """The bundle of a first fit, registered as `weave`."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(workdir)
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        data = workdir / "data"
        shutil.copytree(image_folder, data, ignore=shutil.ignore_patterns("new"))
        with pytest.raises(SystemExit) as exit_info:
            main(["fit", str(data), "out", *SMALL, *SHORT, "--register", "weave"])
    assert exit_info.value.code == 0
    return workdir / "out" / "bundle"


@pytest.fixture
def config(workdir: Path) -> TrackingConfig:
    return TrackingConfig(tracking_uri=f"sqlite:///{workdir}/mlflow.db", system_metrics=False)


@pytest.fixture
def client(config: TrackingConfig) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=config.uri)


def versions(client: Any, name: str) -> list[int]:
    return sorted(int(one.version) for one in client.search_model_versions(f"name = '{name}'"))


def version_of(client: Any, name: str, alias: str) -> int:
    return int(client.get_model_version_by_alias(name, alias).version)


def run_of(bundle: Path) -> str:
    return str(json.loads((bundle / "bundle.json").read_text())["lineage"]["run_id"])


@pytest.fixture(scope="module")
def model_dir(fitted: Path) -> Path:
    """The directory of the MLflow model that the fit logged."""
    (result,) = fitted.parents[1].glob("mlruns/**/MLmodel")
    return result.parent


@pytest.fixture(scope="module")
def logged_files(model_dir: Path) -> dict[Path, bytes]:
    """The files of the model before any test loads it: Python may compile what it imports."""
    return {file: file.read_bytes() for file in model_dir.rglob("*") if file.is_file()}


@pytest.fixture(autouse=True)
def _snapshot_before_loading(logged_files: dict[Path, bytes]) -> None:
    pass


# ---------------------------------------------------------------------------- predictions


@pytest.fixture(scope="module")
def mixed_images(workdir: Path, image_folder: Path) -> Path:
    """Eight images with a truncated one between them."""
    images = workdir / "mixed"
    images.mkdir()
    for i, file in enumerate(sorted((image_folder / "new").iterdir())[:8]):
        shutil.copy(file, images / f"{i}.jpg")
    full = (images / "3.jpg").read_bytes()
    (images / "3b.jpg").write_bytes(full[: len(full) // 2])
    return images


@pytest.fixture
def scored(fitted: Path, mixed_images: Path, command: Any) -> polars.DataFrame:
    if not Path("scores").exists():
        command("score", fitted, mixed_images, "scores", "--probabilities", code=3)
    return polars.read_parquet("scores/parts")


@pytest.mark.slow
def test_model_loaded_by_mlflow_in_a_new_process_predicts_what_score_does(
    config, scored, mixed_images, workdir
):
    program = """
import json, sys
from pathlib import Path
import mlflow, pandas
rows = pandas.DataFrame({"image": [p.read_bytes() for p in sorted(Path(sys.argv[1]).iterdir())]})
made = mlflow.pyfunc.load_model("models:/weave@champion").predict(rows)
made.to_json(sys.argv[2], orient="records", double_precision=15)
"""
    argv = [sys.executable, "-c", program, str(mixed_images), str(workdir / "fresh.json")]
    subprocess.run(argv, check=True, env=os.environ | {"MLFLOW_TRACKING_URI": config.uri})
    fresh = json.loads((workdir / "fresh.json").read_text())
    assert [Path(path).name for path in scored["path"]] == sorted(
        p.name for p in mixed_images.iterdir()
    )
    assert [one["label"] for one in fresh] == scored["label"].to_list()
    assert [one["label"] is None for one in fresh] == [i == 4 for i in range(9)]
    for one, row in zip(fresh, scored.iter_rows(named=True), strict=True):
        if row["fault"] is None:
            expected = np.array([*row["probabilities"].values()])
            gap = np.abs(np.array(one["probabilities"]) - expected)
            assert gap.max() <= 1e-6
            assert abs(one["probability"] - row["probability"]) <= 1e-6


@pytest.mark.slow
def test_mlflow_models_predict_accepts_the_input_example(config, model_dir, fitted, workdir):
    arguments = ["models", "predict", "-m", "models:/weave@champion", "-t", "json"]
    files = [
        "-i",
        str(model_dir / "serving_input_example.json"),
        "-o",
        str(workdir / "answer.json"),
    ]
    local = ["--env-manager", "local"]
    completed = subprocess.run(
        [sys.executable, "-m", "mlflow", *arguments, *files, *local],
        env=os.environ | {"MLFLOW_TRACKING_URI": config.uri},
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    (prediction,) = json.loads((workdir / "answer.json").read_text())["predictions"]
    bundle, data = bundle_format.load(fitted), registry._drawn_image()  # not a user's photo
    feature_1D = replay.clean_features(bundle.recipe, bundle.make_body(), [data], "cpu", 1)
    expected = bundle_format.probabilities(bundle.make_head(), feature_1D, bundle.temperature)[0]
    np.testing.assert_allclose(prediction["probabilities"], expected, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def loaded_model(model_dir: Path) -> Any:
    """The model in this process, on a host that allows no paths."""
    import mlflow

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.delenv("ARROWHEAD_SERVE_PATHS", raising=False)
        return mlflow.pyfunc.load_model(str(model_dir))


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"path": ["mixed/0.jpg"]}, "opens no files"),
        ({"image": [b"x"], "path": ["mixed/0.jpg"]}, "image and path"),
        ({"image": [None]}, "no image"),
        ({"photo": [b"x"]}, "image"),
    ],
    ids=str,
)
def test_request_without_images_is_refused_with_the_expected_input(loaded_model, columns, named):
    import pandas
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException, match=named) as error_info:
        loaded_model.predict(pandas.DataFrame(columns))
    assert error_info.value.get_http_status_code() == 400


def test_image_paths_are_read_only_below_the_allowed_folder(
    loaded_model, model_dir, mixed_images, scored, workdir, monkeypatch
):
    import mlflow
    import pandas
    from mlflow.exceptions import MlflowException

    monkeypatch.setenv("ARROWHEAD_SERVE_PATHS", str(mixed_images))
    # The variable was not set when the model was loaded.
    with pytest.raises(MlflowException, match="opens no files"):
        loaded_model.predict(pandas.DataFrame({"path": ["0.jpg"]}))
    allowed = mlflow.pyfunc.load_model(str(model_dir))
    names = [*scored["path"].to_list(), str(mixed_images / "0.jpg"), "missing.jpg", None]
    prediction = allowed.predict(pandas.DataFrame({"path": names}))
    assert prediction["label"].tolist() == [*scored["label"], scored["label"][0], None, None]
    for outside in ("../data", "/etc/passwd", str(workdir / "out" / "bundle" / "golden" / "0.img")):
        with pytest.raises(MlflowException, match="not below"):
            allowed.predict(pandas.DataFrame({"path": ["0.jpg", outside]}))
    (mixed_images / "link.jpg").symlink_to(next((workdir / "data").glob("train/*/*")))
    with pytest.raises(MlflowException, match="not below"):
        allowed.predict(pandas.DataFrame({"path": ["link.jpg"]}))
    (mixed_images / "link.jpg").unlink()


# ------------------------------------------------------------------------------ contents


def test_model_declares_its_signature_and_requirements(model_dir):
    from importlib.metadata import version

    from mlflow.models import Model

    model_info = Model.load(str(model_dir))
    taken = {
        column.name: (str(column.type), column.required) for column in model_info.signature.inputs
    }
    assert taken == {
        "image": ("DataType.binary", False),
        "path": ("DataType.string", False),
    }
    given = model_info.signature.outputs.input_names()
    assert given == ["label", "probability", "labels", "probabilities"]
    example = json.loads((model_dir / "serving_input_example.json").read_text())
    assert example["dataframe_split"]["columns"] == ["image"]
    requirements = (model_dir / "requirements.txt").read_text().splitlines()
    assert {f"torch=={version('torch').partition('+')[0]}"} <= set(requirements)
    names = {line.partition("==")[0] for line in requirements}
    assert {"torch", "torchvision", "mlflow", "safetensors"} <= names
    assert not {"ray", "matplotlib", "cyclopts"} & names


def is_pickle(data: bytes) -> bool:
    """Whether the data is exactly one pickle with more than one opcode."""
    try:
        return sum(1 for _ in pickletools.genops(io.BytesIO(data))) > 1
    except Exception:
        return False


def test_model_files_contain_no_pickle(logged_files):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert is_pickle(pickle.dumps({"a": [1]}, protocol))
    assert {"mlflow_model.py", "weights.safetensors"} <= {file.name for file in logged_files}
    unwanted = {".pkl", ".pt", ".pth", ".bin", ".pyc", ".joblib"}
    assert not {file.suffix for file in logged_files} & unwanted
    assert [file for file in logged_files if zipfile.is_zipfile(file)] == []  # as torch.save writes
    assert [file for file, data in logged_files.items() if is_pickle(data)] == []


# -------------------------------------------------------------------------------- versions


def test_registered_version_names_its_bundle_run_and_model(client, fitted):
    result = client.get_model_version_by_alias("weave", "champion")
    (output,) = client.get_run(run_of(fitted)).outputs.model_outputs
    address = f"models:/{output.model_id}"
    assert (int(result.version), result.run_id) == (1, run_of(fitted))
    assert result.tags == {
        "bundle": bundle_format.fingerprint(fitted),
        "run_id": run_of(fitted),
        "model": address,
    }
    noted = client.get_logged_model(output.model_id).tags["mlflow.modelVersions"]
    assert json.loads(noted) == [{"name": "weave", "version": "1"}]


def test_alias_moves_to_the_next_training_and_back_on_request(fitted, client, command):
    result = command("train", "out/store", "next", *SHORT, "--seed", "1", "--register", "weave")
    assert result["registered"] == "models:/weave/2"
    assert version_of(client, "weave", "champion") == 2
    result = command("bundle", "register", fitted, "weave")
    assert result["registered"] == "models:/weave/1"
    assert version_of(client, "weave", "champion") == 1
    command("bundle", "register", "next", "weave", "--alias", "challenger")
    assert version_of(client, "weave", "challenger") == 2
    assert versions(client, "weave") == [1, 2]


def test_resumed_run_registers_once(fitted, config, client):
    output: list[str] = []
    request = RegistryConfig(register="again")

    def train() -> None:
        with start(
            config, "fit", Path("again.json"), registry=request, print_line=output.append
        ) as run:
            run.model(fitted)
            addresses.append(run.register(fitted))
            if len(addresses) < 3:
                raise RuntimeError

    addresses: list[str | None] = []
    for _ in range(2):
        with pytest.raises(RuntimeError):
            train()
    train()
    assert addresses == ["models:/again/1"] * 3
    assert versions(client, "again") == [1]


def test_registry_failure_during_a_run_only_prints_the_command_to_register_later(
    fitted, config, client, workdir, command
):
    output: list[str] = []
    request = RegistryConfig(register="later on", alias="challenger")
    with sqlite3.connect(workdir / "mlflow.db") as database:
        with start(config, "fit", registry=request, print_line=output.append) as run:
            run.model(fitted)
            database.execute("ALTER TABLE registered_models RENAME TO away")
            database.commit()
            assert run.register(fitted) is None
        with pytest.raises(ConfigError, match="Nothing can be registered"):
            start(config, "fit", registry=request).__enter__()
        database.execute("ALTER TABLE away RENAME TO registered_models")
    assert client.get_run(run.run_id).info.status == "FINISHED"
    words = f"arrowhead bundle register {fitted} 'later on' --alias challenger"
    assert len(output) == 1
    assert output[0].endswith(words)
    result = command("bundle", "register", fitted, "later on", "--alias", "challenger")
    assert result["registered"] == "models:/later on/1"


def test_bundle_from_elsewhere_is_registered_with_a_new_run(fitted, client, command, workdir):
    copy = workdir / "elsewhere"
    shutil.copytree(fitted, copy)
    content = json.loads((copy / "bundle.json").read_text().replace(run_of(fitted), "f" * 32))
    del content["seal"]
    fileio.write_sealed(copy / "bundle.json", content)
    assert command("bundle", "register", copy, "guest")["registered"] == "models:/guest/1"
    assert command("bundle", "register", copy, "guest")["registered"] == "models:/guest/1"
    (result,) = client.search_model_versions("name = 'guest'")
    assert client.get_run(result.run_id).info.status == "FINISHED"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--register", "a/b"], "a/b"),
        (["--register", "dogs:1"], "dogs:1"),
        (["--register", "dogs@best"], "--alias best"),
        (["--register", " "], "--register"),
        (["--register", "dogs", "--alias", "latest"], "latest"),
        (["--register", "dogs", "--alias", "v2"], "v2"),
        (["--register", "dogs", "--alias", "a b"], "a b"),
        (["--alias", "challenger"], "--register"),
    ],
    ids=" ".join,
)
def test_invalid_registry_name_is_refused_before_any_work(flags, named, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", "data", "never", *SMALL, *flags])
    assert exit_info.value.code == 2
    assert named in capsys.readouterr().err
    assert not Path("never").exists()


# ------------------------------------------------------------------------------- addresses


def bundle_contents(model_dir: Path) -> dict[str, bytes]:
    """The bundle's own files; its report is for people and is not fetched."""
    files = (file for file in model_dir.rglob("*") if file.is_file())
    named = {str(file.relative_to(model_dir)): file.read_bytes() for file in files}
    return {name: content for name, content in named.items() if not name.startswith("report/")}


def test_every_address_of_a_bundle_resolves_to_the_same_files(fitted, config, client, tmp_path):
    version = client.get_model_version("weave", "1")
    expected = bundle_contents(fitted)
    for address in (
        "models:/weave@champion",
        "models:/weave/1",
        version.tags["model"],
        f"runs:/{version.run_id}/model",
    ):
        result = resolve.bundle_folder(address, config, tmp_path)
        assert result.parent == tmp_path
        assert bundle_contents(result) == expected
    result = resolve.bundle_folder("models:/weave/latest", config, tmp_path)
    assert bundle_contents(result) == bundle_contents(Path("next"))
    assert [file.name for file in tmp_path.iterdir()] == ["bundle"]
    assert resolve.bundle_folder(str(fitted), config, tmp_path) == fitted
    assert resolve.bundle_folder(fitted.as_uri(), config, tmp_path) == fitted
    assert resolve.bundle_folder("nowhere", config, tmp_path) == Path("nowhere")


@pytest.fixture
def unusable_models(client: Any, config: TrackingConfig, tmp_path: Path) -> dict[str, str]:
    """A run without a model, a run with its bundle as an artifact, another program's model."""
    with start(config, "fit") as bare, start(config, "fit") as kept:
        kept.log_artifact(Path("next"), "bundle")
    model = client.create_logged_model(client.get_run(bare.run_id).info.experiment_id, "alien")
    (tmp_path / "MLmodel").write_text("flavors: {}")
    client.log_model_artifacts(model.model_id, str(tmp_path))
    return {"BARE": bare.run_id, "KEPT": kept.run_id, "ALIEN": model.model_id}


@pytest.mark.parametrize(
    ("address", "found", "hint"),
    [
        ("models:/weaves@champion", "registered as weaves", "weave"),
        ("models:/weave@champoin", "no alias champoin", "champion"),
        ("models:/weave/99", "no models:/weave/99", ""),
        ("models:/weave", "which model", "models:/weave@champion"),
        ("models:/weave/1/artifacts/../..", "which model", ""),
        ("models:/m-" + "0" * 32, "no models:/m-0", ""),
        ("runs:/" + "0" * 32 + "/model", "no run 0", ""),
        ("runs:/BARE/model", "has no model model", ""),
        ("runs:/KEPT/model", "has no model model", "bundle"),
        ("models:/ALIEN", "holds no bundle", "arrowhead fit"),
    ],
)
def test_address_without_a_bundle_is_refused_with_what_is_there(
    fitted, config, unusable_models, tmp_path, address, found, hint
):
    for name, real in unusable_models.items():
        address = address.replace(name, real)
    with pytest.raises(ConfigError) as error_info:
        resolve.bundle_folder(address, config, tmp_path / "scratch")
    assert found in error_info.value.found
    assert hint in f"{error_info.value.wanted} {error_info.value.do}"
    assert not list((tmp_path / "scratch").glob("*"))


def test_bundle_logged_as_an_artifact_has_an_address(config, unusable_models, tmp_path):
    result = resolve.bundle_folder(f"runs:/{unusable_models['KEPT']}/bundle", config, tmp_path)
    assert bundle_contents(result) == bundle_contents(Path("next"))


def test_missing_tracking_store_is_refused_and_not_created(tmp_path):
    for uri in (f"sqlite:///{tmp_path}/no.db", "http://127.0.0.1:9"):
        with pytest.raises(ConfigError, match=uri):
            resolve.bundle_folder(
                "models:/weave@champion", TrackingConfig(tracking_uri=uri), tmp_path
            )
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def remote_bundle(fitted: Path) -> Any:
    """The bundle in an object store, and a function that changes a file of it."""
    import fsspec

    store = fsspec.filesystem("memory")
    store.put(str(fitted), "/shelf/bundle", recursive=True)

    def change(name: str, data: bytes | None) -> None:
        store.rm(f"/shelf/bundle/{name}")
        if data is not None:
            store.pipe(f"/shelf/bundle/{name}", data)

    yield change
    store.rm("/shelf", recursive=True)


def test_bundle_in_an_object_store_is_fetched_completely_or_not_at_all(
    remote_bundle, fitted, config, tmp_path
):
    result = resolve.bundle_folder("memory://shelf/bundle", config, tmp_path)
    assert bundle_contents(result) == bundle_contents(fitted)
    before = bundle_contents(tmp_path)
    remote_bundle("golden/0.img", b"other")
    with pytest.raises(DataError, match=r"bundle/golden/0\.img differs from bundle"):
        resolve.bundle_folder("memory://shelf/bundle", config, tmp_path)
    remote_bundle("golden/0.img", None)
    with pytest.raises(DataError, match=r"golden/0.img is missing"):
        resolve.bundle_folder("memory://shelf/bundle", config, tmp_path)
    with pytest.raises(ConfigError, match="not a bundle"):
        resolve.bundle_folder("memory://shelf", config, tmp_path)
    assert bundle_contents(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["../../evil", "/tmp/evil", "a/../../evil", "a//b", "a\\b", "a\nb"]
)
def test_bundle_with_paths_outside_its_folder_is_refused(
    remote_bundle, fitted, config, tmp_path, name
):
    content = json.loads((fitted / "bundle.json").read_text())
    content["sha256"][name] = "0" * 64
    del content["seal"]
    copy = tmp_path / "copy"
    shutil.copytree(fitted, copy)
    fileio.write_sealed(copy / "bundle.json", content)
    remote_bundle("bundle.json", (copy / "bundle.json").read_bytes())
    with pytest.raises(DataError, match="outside its folder"):
        resolve.bundle_folder("memory://shelf/bundle", config, tmp_path / "scratch")
    assert list(tmp_path.rglob("*evil*")) == []
    with pytest.raises(DataError, match="outside its folder"):
        bundle_format.load(copy)
