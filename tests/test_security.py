"""No file that a command reads can run code: nothing is unpickled or evaluated.

Two kinds of tests: the source is searched for calls that could run the data they read, and every
command gets malicious files of eight kinds, each of which creates a file (the canary) if it is run.
"""

from __future__ import annotations

import ast
import io
import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import MakeBundle

from arrowhead import arrow_io, fileio
from arrowhead.cli.main import main
from arrowhead.inference import scores_io
from arrowhead.training import checkpoint

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--body", "shufflenet_v2_x0_5", "--weights", "random", "--size", "64"]

# ------------------------------------------------------------------------ source code

PICKLE_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "cloudpickle",
    "dill",
    "shelve",
    "joblib",
    "marshal",
}
# Forbidden calls by the end of their dotted name, with the reason.
FORBIDDEN_CALLS = {
    "os.system": "a shell reads its words",
    "os.popen": "a shell reads its words",
    "pickle.load": "runs what it reads",
    "pandas.read_pickle": "runs what it reads",
    "yaml.load": "builds any object; yaml.safe_load does not",
    "yaml.unsafe_load": "builds any object",
    "yaml.full_load": "builds many objects",
    "jit.load": "runs what it reads",
    "export.load": "unpickles parts of what it reads",
    "pyfunc.load_model": "unpickles models",
    "pytorch.load_model": "unpickles models",
    "sklearn.load_model": "unpickles models",
    "shutil.unpack_archive": "lets names in an archive lead anywhere",
}
# Exceptions, by file and function, with the reason.
ALLOWED = {
    ("export_graph.py", "write_pt2: export.load"): "the draft that the line before has written",
}


class UnsafeCallFinder(ast.NodeVisitor):
    """Collects the calls of a module that could run what they read, as `function: call`."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self._inside = ["module"]

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._inside.append(node.name)
        self.generic_visit(node)
        self._inside.pop()

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._import(alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self._import(node.module or "")
        for alias in node.names:
            self._import(f"{node.module}.{alias.name}")

    def _import(self, name: str) -> None:
        if PICKLE_MODULES & set(name.split(".")):
            self.found.append(f"import {name}")

    def visit_Call(self, node: ast.Call) -> None:
        name, keywords = ast.unparse(node.func), {item.arg: item.value for item in node.keywords}
        method = name.rpartition(".")[2]

        def has_constant(flag: str, value: object) -> bool:
            return isinstance(keywords.get(flag), ast.Constant) and keywords[flag].value == value

        is_unsafe = (
            name in ("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec")
            or any(name == item or name.endswith(f".{item}") for item in FORBIDDEN_CALLS)
            or (PICKLE_MODULES & set(name.split(".")) and method in ("load", "loads", "Unpickler"))
            or (name == "torch.load" and not has_constant("weights_only", True))
            or ("allow_pickle" in keywords and not has_constant("allow_pickle", False))
            or ("shell" in keywords and not has_constant("shell", False))
            or (method in ("extractall", "extract") and "filter" not in keywords)
        )
        if is_unsafe:
            pattern = next((item for item in FORBIDDEN_CALLS if name.endswith(item)), name)
            self.found.append(f"{self._inside[-1]}: {pattern}")
        self.generic_visit(node)


def find_unsafe_calls(text: str) -> list[str]:
    finder = UnsafeCallFinder()
    finder.visit(ast.parse(text))
    return finder.found


def test_source_has_no_unpickling_evaluation_or_shell_call():
    result = {
        (file.name, place)
        for folder in ("src", "jobs", "examples", "deploy")
        for file in (ROOT / folder).rglob("*.py")
        for place in find_unsafe_calls(file.read_text())
    }
    assert result == set(ALLOWED)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from ray import cloudpickle",
        "import ray.cloudpickle as cp",
        "import marshal",
        "pickle.loads(data)",
        "cloudpickle.load(file)",
        "marshal.loads(data)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.UnsafeLoader)",
        "yaml.unsafe_load(text)",
        "eval(text)",
        "exec(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "torch.jit.load(path)",
        "torch.export.load(path)",
        "np.load(path, allow_pickle=True)",
        "numpy.load(path, allow_pickle=flag)",
        "pandas.read_pickle(path)",
        "os.system(words)",
        "subprocess.run(words, shell=True)",
        "subprocess.Popen(words, shell=flag)",
        "tarfile.open(path).extractall(folder)",
        "archive.extract(member, folder)",
        "shutil.unpack_archive(path)",
        "mlflow.pyfunc.load_model(uri)",
    ],
)
def test_finder_reports_unsafe_calls(line):
    assert find_unsafe_calls(line)


@pytest.mark.parametrize(
    "line",
    [
        "net.eval()",
        "torch.load(path, map_location='cpu', weights_only=True)",
        "yaml.safe_load(text)",
        "np.load(path)",
        "numpy.load(path, allow_pickle=False)",
        "json.loads(text)",
        "re.compile(text)",
        "subprocess.run(words)",
        "archive.extractall(folder, filter='data')",
    ],
)
def test_finder_accepts_safe_calls(line):
    assert find_unsafe_calls(line) == []


# ------------------------------------------------------------------------- planted files


class CanaryPayload:
    """Creates a file (the canary) when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return open, (str(self.canary), "w")


@pytest.fixture(scope="module")
def canary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mine") / "canary"


@pytest.fixture(scope="module")
def payload(canary: Path) -> bytes:
    return pickle.dumps(CanaryPayload(canary))


@pytest.fixture(scope="module")
def shared_folder(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """data/ (synthetic images), store/ of them, and mlflow.db, which all commands here share."""
    folder = tmp_path_factory.mktemp("planted")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        shutil.copytree(image_folder, folder / "data", ignore=shutil.ignore_patterns("new"))
        with pytest.raises(SystemExit) as exit_info:
            main(["precompute", str(folder / "data"), str(folder / "store"), *SMALL])
        assert exit_info.value.code == 0
        yield folder


RunCommand = Callable[..., str]


@pytest.fixture
def run_command(
    shared_folder: Path, canary: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> RunCommand:
    """Run a command that must end with `code`, report a refusal in three lines, and not create the
    canary; return its output.
    """
    monkeypatch.chdir(tmp_path)
    canary.unlink(missing_ok=True)

    def run(*words: object, code: int) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main([str(word) for word in words])
        output = capsys.readouterr()
        assert not canary.exists(), f"the canary sang in {words}"
        assert exit_info.value.code == code, output.err
        if code in (2, 4) and "verify" not in words:
            result, wanted, do = output.err.strip().splitlines()[-3:]
            assert result.startswith("arrowhead: ")
            assert wanted.startswith("  wanted  ")
            assert do.startswith("  do      ")
        return str(output.err + output.out)

    return run


def test_unpickling_the_payload_creates_the_canary(payload, canary):
    pickle.loads(payload).close()
    assert canary.exists()
    canary.unlink()


# 1, 2, 3: weights


def _whole_model(payload: bytes, canary: Path) -> bytes:
    """A whole model, as `torch.save(net)` writes it."""
    buffer = io.BytesIO()
    torch.save(CanaryPayload(canary), buffer)
    return buffer.getvalue()


def _payload_in_state_dict(payload: bytes, canary: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.bias": CanaryPayload(canary)}, buffer)
    return buffer.getvalue()


def _bare_payload(payload: bytes, canary: Path) -> bytes:
    return payload


def _exported_program(payload: bytes, canary: Path) -> bytes:
    """An archive of torch.export whose weights are a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model/archive_format", "pt2")
        archive.writestr("model/version", "6")
        archive.writestr("model/data/weights/model.pt", payload)
        archive.writestr("model/data.pkl", payload)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("make", "name", "code"),
    [
        (_whole_model, "net.pth", 4),
        (_payload_in_state_dict, "state.pt", 4),
        (_bare_payload, "bare.pth", 4),
        (_bare_payload, "net.safetensors", 4),
        (_exported_program, "net.pt2", 2),
        (_exported_program, "program.pth", 4),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
@pytest.mark.parametrize("verb", ["precompute", "fit"])
def test_pickled_weights_are_refused(
    verb, make, name, code, shared_folder, payload, canary, run_command, tmp_path
):
    (tmp_path / name).write_bytes(make(payload, canary))
    run_command(
        verb, shared_folder / "data", "out", "--body", "resnet18", "--weights", name, code=code
    )


# 3, 4, 6: bundles


READERS = [
    (lambda bundle, shared_folder: ["score", bundle, shared_folder / "data" / "valid", "scores"]),
    (lambda bundle, shared_folder: ["export", bundle, "m.pt2", "--format", "pt2"]),
    (lambda bundle, shared_folder: ["bundle", "info", bundle]),
    (lambda bundle, shared_folder: ["bundle", "verify", bundle]),
]


@pytest.mark.parametrize("words", READERS, ids=["score", "export", "info", "verify"])
def test_torch_export_program_is_not_a_bundle(
    words, shared_folder, payload, canary, run_command, tmp_path
):
    (tmp_path / "model.pt2").write_bytes(_exported_program(payload, canary))
    run_command(*words("model.pt2", shared_folder), code=2)


@pytest.fixture(scope="module")
def foreign_model(
    shared_folder: Path, payload: bytes, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """Addresses of a pickled MLflow model: as a registered model, and in its run."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("stranger")
    (folder / "python_model.pkl").write_bytes(payload)
    (folder / "artifacts").mkdir()
    (folder / "artifacts" / "weights.pkl").write_bytes(payload)
    (folder / "MLmodel").write_text(
        "flavors:\n  python_function:\n    loader_module: mlflow.pyfunc.model\n"
        "    python_model: python_model.pkl\n    cloudpickle_version: 3.1.1\n"
    )
    client = MlflowClient(f"sqlite:///{shared_folder}/mlflow.db")
    run = client.create_run(client.get_experiment_by_name("arrowhead").experiment_id)
    client.log_artifacts(run.info.run_id, str(folder), "model")
    client.create_registered_model("stranger")
    client.create_model_version("stranger", f"{run.info.artifact_uri}/model", run.info.run_id)
    return ["models:/stranger/1", f"runs:/{run.info.run_id}/model"]


@pytest.mark.parametrize("words", READERS, ids=["score", "export", "info", "verify"])
def test_pickled_mlflow_model_is_not_a_bundle(words, foreign_model, shared_folder, run_command):
    for address in foreign_model:
        assert "no bundle" in run_command(*words(address, shared_folder), code=2)


def _update_checksums(bundle: Path) -> None:
    """Update the checksums in bundle.json, as an attacker who wrote the whole bundle would."""
    content = json.loads((bundle / "bundle.json").read_text())
    del content["seal"]
    content["sha256"] = {name: fileio.sha256(bundle / name) for name in content["sha256"]}
    fileio.write_sealed(bundle / "bundle.json", content)


@pytest.mark.parametrize("planted", ["weights.safetensors", "golden/0.img", "golden/golden.json"])
@pytest.mark.parametrize(
    ("words", "code"),
    list(zip(READERS, (4, 4, 0, 4), strict=True)),
    ids=["score", "export", "info", "verify"],
)
def test_bundle_of_pickle_files_is_refused(
    words, code, planted, make_bundle: MakeBundle, shared_folder, payload, run_command, tmp_path
):
    # `info` counts files and opens only the JSON.
    shutil.copytree(_one_bundle(make_bundle), tmp_path / "bundle")
    npy = io.BytesIO()
    np.save(npy, np.array([payload, None], object), allow_pickle=True)
    (tmp_path / "bundle" / planted).write_bytes(npy.getvalue() if "img" in planted else payload)
    _update_checksums(tmp_path / "bundle")
    run_command(
        *words(tmp_path / "bundle", shared_folder), code=4 if planted.endswith("json") else code
    )


_saved: list[Path] = []


def _one_bundle(make_bundle: MakeBundle) -> Path:
    """One bundle for all tests here."""
    if not _saved:
        _saved.append(make_bundle())
    return _saved[0]


# 5: columns of extension types, in stores and scores


def _add_extension_column(path: Path, kind: str, payload: bytes) -> None:
    """Add a column to an Arrow or Parquet file that Ray Data would unpickle."""
    parquet = path.suffix == ".parquet"
    table = pq.read_table(path) if parquet else pa.ipc.open_file(path.read_bytes()).read_all()
    if kind == "object":
        name, notes = b"ray.data.arrow_pickled_object", b""
        column = pa.array([payload] * len(table), pa.large_binary())
    else:
        name, notes = b"ray.data.arrow_tensor_v2", payload
        column = pa.array([[0]] * len(table), pa.list_(pa.int64()))
    marks = {b"ARROW:extension:name": name, b"ARROW:extension:metadata": notes}
    table = table.set_column(0, pa.field("path", column.type, metadata=marks), column)
    if parquet:
        pq.write_table(table, path)
    else:
        arrow_io.write_arrow(path, table)


def _update_manifest(store: Path) -> None:
    """Update the checksums of the shards in the manifest."""
    manifest = json.loads((store / "manifest.json").read_text())
    del manifest["seal"]
    for one in manifest["shards"]:
        one["sha256"] = fileio.sha256(store / "shards" / f"{one['name']}.arrow")
    fileio.write_sealed(store / "manifest.json", manifest)


def test_ray_data_would_unpickle_the_extension_column(shared_folder, payload, canary, tmp_path):
    # Plain Arrow is affected, too: Ray Train imports Ray Data, which registers these types.
    import ray.data  # noqa: F401

    file = tmp_path / "shard.arrow"
    shutil.copy(next((shared_folder / "store" / "shards").glob("*.arrow")), file)
    _add_extension_column(file, "object", payload)
    for executed in pa.ipc.open_file(file.read_bytes()).read_all()["path"].to_pylist():
        executed.close()
    assert canary.exists()
    canary.unlink()


@pytest.mark.parametrize("kind", ["object", "metadata"])
@pytest.mark.parametrize(
    "words",
    [
        ["train", "store", "bundle", "--epochs", "1", "--rate", "0.01"],
        ["lr-find", "store"],
        ["features", "info", "store"],
        ["features", "verify", "store"],
        ["precompute", "DATA", "store", *SMALL],
        ["score", "BUNDLE", "DATA", "scores", "--store", "store"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_shard_with_an_extension_column_is_refused(
    words, kind, shared_folder, make_bundle: MakeBundle, payload, run_command, tmp_path
):
    import ray.data  # noqa: F401 - as Ray Train does

    shutil.copytree(shared_folder / "store", tmp_path / "store")
    for file in (tmp_path / "store" / "shards").iterdir():
        _add_extension_column(file, kind, payload)
    _update_manifest(tmp_path / "store")
    if words[0] == "precompute":  # otherwise images are looked up in the store on disk
        (tmp_path / "more").mkdir()
        shutil.copytree(shared_folder / "data", tmp_path / "data")
        file = next((tmp_path / "data" / "train").rglob("*.jpg"))
        file.write_bytes(file.read_bytes() + b"\0")
    stands = {"DATA": tmp_path / "data", "BUNDLE": _one_bundle(make_bundle)}
    if words[0] == "score":
        stands["DATA"] = shared_folder / "data" / "valid"
    run_command(*[stands.get(word, word) for word in words], code=4)


def test_score_part_with_an_extension_column_is_refused(
    shared_folder, make_bundle: MakeBundle, payload, run_command, tmp_path
):
    request = [
        "score",
        _one_bundle(make_bundle),
        shared_folder / "data" / "valid",
        tmp_path / "scores",
    ]
    run_command(*request, code=0)
    part = tmp_path / "scores" / "parts" / "part-000000.parquet"
    _add_extension_column(part, "object", payload)
    journal = tmp_path / "scores" / "journal"
    (entry,) = scores_io.read_journal(journal)[0]
    digest, size = fileio.sha256(part), part.stat().st_size
    scores_io.replace_journal(journal, [replace(entry, sha256=digest, bytes=size)])
    run_command(*request, code=4)


# 6: arrays of objects among images


def test_object_array_is_neither_image_nor_weights(
    shared_folder, make_bundle: MakeBundle, payload, canary, run_command, tmp_path
):
    (tmp_path / "images").mkdir()
    np.save(
        tmp_path / "images" / "a.npy", np.array([CanaryPayload(canary)], object), allow_pickle=True
    )
    for name in ("b.jpg", "c"):  # the name a.npy is not an image name: the file is skipped
        (tmp_path / "images" / name).write_bytes((tmp_path / "images" / "a.npy").read_bytes())
    run_command("score", _one_bundle(make_bundle), "images", "scores", code=3)
    part = tmp_path / "scores" / "parts" / "part-000000.parquet"
    faults = pq.read_table(part)["fault"].to_pylist()
    assert [fault.partition(":")[0] for fault in faults] == ["not an image"] * 2
    run_command(
        "fit", shared_folder / "data", "out", "--weights", tmp_path / "images" / "a.npy", code=2
    )


# 7: checkpoints


def test_pickle_files_beside_checkpoints_are_ignored(
    shared_folder, payload, canary, run_command, tmp_path
):
    directory = tmp_path / ".bundle.training"
    folder = directory / "attempt-1" / "checkpoint_000007"
    folder.mkdir(parents=True)
    for name in ("dict_checkpoint.pkl", ".metadata.pkl", "state.safetensors", "checkpoint.json"):
        (folder / name).write_bytes(payload)
    for name in ("checkpoint_manager_snapshot.json", "trainer.pkl", ".validate_storage_marker"):
        (directory / "attempt-1" / name).write_bytes(payload)
    output = run_command(
        "train", shared_folder / "store", "bundle", "--epochs", "1", "--rate", "0.01", code=0
    )
    assert "incomplete or has changed" in output


def test_pickled_checkpoint_with_a_valid_checksum_is_skipped(payload, canary, tmp_path):
    checkpoint.write(tmp_path / "1", {"w": torch.ones(2)}, {"key": "k", "number": 1})
    checkpoint.write(tmp_path / "2", {"w": torch.ones(3)}, {"key": "k", "number": 2})
    (tmp_path / "2" / checkpoint.TENSORS_FILE).write_bytes(payload)
    label = json.loads((tmp_path / "2" / checkpoint.METADATA_FILE).read_text())
    del label["seal"]
    label["sha256"] = fileio.sha256(tmp_path / "2" / checkpoint.TENSORS_FILE)
    fileio.write_sealed(tmp_path / "2" / checkpoint.METADATA_FILE, label)
    output: list[str] = []
    result = checkpoint.newest(tmp_path, "k", output.append)
    assert result is not None and result.number == 1
    assert len(output) == 1 and str(tmp_path / "2") in output[0]
    assert not canary.exists()


# 8: configuration


@pytest.mark.parametrize(
    "words",
    [
        ["fit", "DATA", "out"],
        ["precompute", "DATA", "out"],
        ["train", "STORE", "bundle"],
        ["lr-find", "STORE"],
        ["score", "BUNDLE", "DATA", "scores"],
        ["export", "BUNDLE", "m.onnx"],
        ["doctor"],
    ],
    ids=lambda words: words[0],
)
def test_config_with_yaml_tags_is_refused(words, shared_folder, canary, run_command, tmp_path):
    tag = f'!!python/object/apply:builtins.open ["{canary}", "w"]\n'
    (tmp_path / "config.yaml").write_text(f"train: {tag}{words[0]}:\n  epochs: {tag}")
    stands = {"DATA": shared_folder / "data", "STORE": shared_folder / "store", "BUNDLE": tmp_path}
    output = run_command(
        *[stands.get(word, word) for word in words], "--config", tmp_path / "config.yaml", code=2
    )
    assert "config.yaml" in output


# ---------------------------------------------------------------------------- dependencies


@pytest.mark.parametrize(
    ("dependencies", "code", "said"),
    [
        ([{"name": "a", "version": "1", "vulns": []}], 0, "1 packages audited, 0 with"),
        ([{"name": "a", "skip_reason": "not found"}], 3, "nothing was audited"),
        ([], 3, "nothing was audited"),
        (
            [
                {"name": "a", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]},
                {"name": "b", "skip_reason": "not found"},
            ],
            1,
            "a 1: CVE-1; fixed in 2",
        ),
    ],
    ids=["clean", "unknown", "empty", "vulnerable"],
)
def test_audit_without_a_database_fails(tmp_path, dependencies, code, said):
    result = tmp_path / "found.json"
    result.write_text(json.dumps({"dependencies": dependencies, "fixes": []}))
    script = Path(__file__).parents[1] / ".ci" / "audit.py"
    completed = subprocess.run([sys.executable, script, result], capture_output=True, text=True)
    assert completed.returncode == code, completed.stderr
    assert said in completed.stdout
