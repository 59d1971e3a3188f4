"""No file that a command reads can run code: nothing is unpickled or evaluated.

Two witnesses. The source is searched for every call that would run what it reads. And eight kinds
of planted files, each of which makes a file (the canary) where it is run, go through every command
that reads such files.
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
from conftest import Bundled

from arrowhead import arrow_io, fileio
from arrowhead.cli.main import main
from arrowhead.inference import scores_io
from arrowhead.training import checkpoint

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--body", "resnet18", "--weights", "random", "--size", "64"]

# ------------------------------------------------------------------------ what is written

PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve", "joblib", "marshal"}
# Calls by the end of their dotted name, and why they are not made here.
NEVER = {
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
# What is allowed, by file and function, and why.
ALLOWED = {
    ("export.py", "_write_pt2: export.load"): "the draft that the line before has written",
}


class Search(ast.NodeVisitor):
    """Every place of a module that could run what it reads, as `function: call`."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self._inside = ["module"]

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._inside.append(node.name)
        self.generic_visit(node)
        self._inside.pop()

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Import(self, node: ast.Import) -> None:
        for one in node.names:
            self._import(one.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self._import(node.module or "")
        for one in node.names:
            self._import(f"{node.module}.{one.name}")

    def _import(self, name: str) -> None:
        if PICKLES & set(name.split(".")):
            self.found.append(f"import {name}")

    def visit_Call(self, node: ast.Call) -> None:
        name, given = ast.unparse(node.func), {one.arg: one.value for one in node.keywords}
        last = name.rpartition(".")[2]

        def says(flag: str, value: object) -> bool:
            return isinstance(given.get(flag), ast.Constant) and given[flag].value == value

        bad = (
            name in ("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec")
            or any(name == one or name.endswith(f".{one}") for one in NEVER)
            or (PICKLES & set(name.split(".")) and last in ("load", "loads", "Unpickler"))
            or (name == "torch.load" and not says("weights_only", True))
            or ("allow_pickle" in given and not says("allow_pickle", False))
            or ("shell" in given and not says("shell", False))
            or (last in ("extractall", "extract") and "filter" not in given)
        )
        if bad:
            short = next((one for one in NEVER if name.endswith(one)), name)
            self.found.append(f"{self._inside[-1]}: {short}")
        self.generic_visit(node)


def search(text: str) -> list[str]:
    looking = Search()
    looking.visit(ast.parse(text))
    return looking.found


def test_no_code_here_unpickles_evaluates_or_hands_words_to_a_shell():
    result = {
        (file.name, place)
        for folder in ("src", "jobs", "examples", "deploy")
        for file in (ROOT / folder).rglob("*.py")
        for place in search(file.read_text())
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
def test_the_search_finds_what_runs_what_it_reads(line):
    assert search(line)


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
def test_the_search_lets_pass_what_does_not(line):
    assert search(line) == []


# ------------------------------------------------------------------------- what is planted


class Singing:
    """Where it is unpickled, the canary sings: a file is made."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return open, (str(self.canary), "w")


@pytest.fixture(scope="module")
def canary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mine") / "canary"


@pytest.fixture(scope="module")
def payload(canary: Path) -> bytes:
    return pickle.dumps(Singing(canary))


@pytest.fixture(scope="module")
def made(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """data/ (drawn images), store/ of them, and mlflow.db, which all commands here share."""
    folder = tmp_path_factory.mktemp("planted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        shutil.copytree(drawn, folder / "data", ignore=shutil.ignore_patterns("new"))
        with pytest.raises(SystemExit) as ended:
            main(["precompute", str(folder / "data"), str(folder / "store"), *SMALL])
        assert ended.value.code == 0
        yield folder


Ends = Callable[..., str]


@pytest.fixture
def ends(
    made: Path, canary: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Ends:
    """Runs a command that ends with `code`, in three lines if that is a refusal, and in silence;
    what it says on stderr.
    """
    monkeypatch.chdir(tmp_path)
    canary.unlink(missing_ok=True)

    def run(*words: object, code: int) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        output = capsys.readouterr()
        assert not canary.exists(), f"the canary sang in {words}"
        assert ended.value.code == code, output.err
        if code in (2, 4) and "verify" not in words:
            result, wanted, do = output.err.strip().splitlines()[-3:]
            assert result.startswith("arrowhead: ")
            assert wanted.startswith("  wanted  ")
            assert do.startswith("  do      ")
        return str(output.err + output.out)

    return run


def test_the_canary_sings_where_a_payload_is_unpickled(payload, canary):
    pickle.loads(payload).close()
    assert canary.exists()
    canary.unlink()


# 1, 2, 3: weights


def _pickled(payload: bytes, canary: Path) -> bytes:
    """A whole model, as `torch.save(net)` writes it."""
    full = io.BytesIO()
    torch.save(Singing(canary), full)
    return full.getvalue()


def _in_a_state_dict(payload: bytes, canary: Path) -> bytes:
    full = io.BytesIO()
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.bias": Singing(canary)}, full)
    return full.getvalue()


def _bare(payload: bytes, canary: Path) -> bytes:
    return payload


def _program(payload: bytes, canary: Path) -> bytes:
    """An archive of torch.export whose weights are a pickle."""
    full = io.BytesIO()
    with zipfile.ZipFile(full, "w") as archive:
        archive.writestr("model/archive_format", "pt2")
        archive.writestr("model/version", "6")
        archive.writestr("model/data/weights/model.pt", payload)
        archive.writestr("model/data.pkl", payload)
    return full.getvalue()


@pytest.mark.parametrize(
    ("make", "name", "code"),
    [
        (_pickled, "net.pth", 4),
        (_in_a_state_dict, "state.pt", 4),
        (_bare, "bare.pth", 4),
        (_bare, "net.safetensors", 4),
        (_program, "net.pt2", 2),
        (_program, "program.pth", 4),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
@pytest.mark.parametrize("verb", ["precompute", "fit"])
def test_weights_that_are_a_pickle_are_refused(
    verb, make, name, code, made, payload, canary, ends, tmp_path
):
    (tmp_path / name).write_bytes(make(payload, canary))
    ends(verb, made / "data", "out", "--body", "resnet18", "--weights", name, code=code)


# 3, 4, 6: bundles


READERS = [
    (lambda bundle, made: ["score", bundle, made / "data" / "valid", "scores"]),
    (lambda bundle, made: ["export", bundle, "m.pt2", "--format", "pt2"]),
    (lambda bundle, made: ["bundle", "info", bundle]),
    (lambda bundle, made: ["bundle", "verify", bundle]),
]


@pytest.mark.parametrize("words", READERS, ids=["score", "export", "info", "verify"])
def test_a_program_of_torch_is_no_bundle(words, made, payload, canary, ends, tmp_path):
    (tmp_path / "model.pt2").write_bytes(_program(payload, canary))
    ends(*words("model.pt2", made), code=2)


@pytest.fixture(scope="module")
def stranger(made: Path, payload: bytes, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The addresses of a pickled MLflow model: as a registered one, and in its run."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("stranger")
    (folder / "python_model.pkl").write_bytes(payload)
    (folder / "artifacts").mkdir()
    (folder / "artifacts" / "weights.pkl").write_bytes(payload)
    (folder / "MLmodel").write_text(
        "flavors:\n  python_function:\n    loader_module: mlflow.pyfunc.model\n"
        "    python_model: python_model.pkl\n    cloudpickle_version: 3.1.1\n"
    )
    client = MlflowClient(f"sqlite:///{made}/mlflow.db")
    run = client.create_run(client.get_experiment_by_name("arrowhead").experiment_id)
    client.log_artifacts(run.info.run_id, str(folder), "model")
    client.create_registered_model("stranger")
    client.create_model_version("stranger", f"{run.info.artifact_uri}/model", run.info.run_id)
    return ["models:/stranger/1", f"runs:/{run.info.run_id}/model"]


@pytest.mark.parametrize("words", READERS, ids=["score", "export", "info", "verify"])
def test_a_pickled_model_in_mlflow_is_no_bundle(words, stranger, made, ends):
    for address in stranger:
        assert "no bundle" in ends(*words(address, made), code=2)


def _resealed(bundle: Path) -> None:
    """Make bundle.json vouch for the files as they are, as a stranger who made it all would."""
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
def test_a_bundle_whose_files_are_pickles_is_refused(
    words, code, planted, bundled: Bundled, made, payload, ends, tmp_path
):
    # `info` counts files and opens none but the JSON.
    shutil.copytree(_whole(bundled), tmp_path / "bundle")
    npy = io.BytesIO()
    np.save(npy, np.array([payload, None], object), allow_pickle=True)
    (tmp_path / "bundle" / planted).write_bytes(npy.getvalue() if "img" in planted else payload)
    _resealed(tmp_path / "bundle")
    ends(*words(tmp_path / "bundle", made), code=4 if planted.endswith("json") else code)


_saved: list[Path] = []


def _whole(bundled: Bundled) -> Path:
    """One bundle for all tests here."""
    if not _saved:
        _saved.append(bundled())
    return _saved[0]


# 5: columns of extension types, in stores and scores


def _extended(path: Path, kind: str, payload: bytes) -> None:
    """Give an Arrow or Parquet file a column that Ray Data, were it asked, would unpickle."""
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


def _vouched(store: Path) -> None:
    """Make the manifest vouch for the shards as they are."""
    manifest = json.loads((store / "manifest.json").read_text())
    del manifest["seal"]
    for one in manifest["shards"]:
        one["sha256"] = fileio.sha256(store / "shards" / f"{one['name']}.arrow")
    fileio.write_sealed(store / "manifest.json", manifest)


def test_ray_would_unpickle_such_a_column(made, payload, canary, tmp_path):
    # Why plain Arrow is not enough: Ray Train imports Ray Data, and with it these types.
    import ray.data  # noqa: F401

    file = tmp_path / "shard.arrow"
    shutil.copy(next((made / "store" / "shards").glob("*.arrow")), file)
    _extended(file, "object", payload)
    for sung in pa.ipc.open_file(file.read_bytes()).read_all()["path"].to_pylist():
        sung.close()
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
def test_a_shard_with_columns_that_run_is_refused(
    words, kind, made, bundled: Bundled, payload, ends, tmp_path
):
    import ray.data  # noqa: F401 - as Ray Train does

    shutil.copytree(made / "store", tmp_path / "store")
    for file in (tmp_path / "store" / "shards").iterdir():
        _extended(file, kind, payload)
    _vouched(tmp_path / "store")
    if words[0] == "precompute":  # it would look images up in what is on the disk
        (tmp_path / "more").mkdir()
        shutil.copytree(made / "data", tmp_path / "data")
        file = next((tmp_path / "data" / "train").rglob("*.jpg"))
        file.write_bytes(file.read_bytes() + b"\0")
    stands = {"DATA": tmp_path / "data", "BUNDLE": _whole(bundled)}
    if words[0] == "score":
        stands["DATA"] = made / "data" / "valid"
    ends(*[stands.get(word, word) for word in words], code=4)


def test_a_part_of_scores_with_columns_that_run_is_refused(
    made, bundled: Bundled, payload, ends, tmp_path
):
    request = ["score", _whole(bundled), made / "data" / "valid", tmp_path / "scores"]
    ends(*request, code=0)
    part = tmp_path / "scores" / "parts" / "part-000000.parquet"
    _extended(part, "object", payload)
    journal = tmp_path / "scores" / "journal"
    (known,) = scores_io.read_journal(journal)[0]
    digest, size = fileio.sha256(part), part.stat().st_size
    scores_io.replace_journal(journal, [replace(known, sha256=digest, bytes=size)])
    ends(*request, code=4)


# 6: arrays of objects among images


def test_an_array_of_objects_is_no_image_and_no_weights(
    made, bundled: Bundled, payload, canary, ends, tmp_path
):
    (tmp_path / "images").mkdir()
    np.save(tmp_path / "images" / "a.npy", np.array([Singing(canary)], object), allow_pickle=True)
    for name in ("b.jpg", "c"):  # the name of a.npy says that it is no image: it is left out
        (tmp_path / "images" / name).write_bytes((tmp_path / "images" / "a.npy").read_bytes())
    ends("score", _whole(bundled), "images", "scores", code=3)
    part = tmp_path / "scores" / "parts" / "part-000000.parquet"
    faults = pq.read_table(part)["fault"].to_pylist()
    assert [fault.partition(":")[0] for fault in faults] == ["not an image"] * 2
    ends("fit", made / "data", "out", "--weights", tmp_path / "images" / "a.npy", code=2)


# 7: checkpoints


def test_files_beside_checkpoints_that_ray_would_unpickle_are_ignored(
    made, payload, canary, ends, tmp_path
):
    directory = tmp_path / ".bundle.training"
    folder = directory / "attempt-1" / "checkpoint_000007"
    folder.mkdir(parents=True)
    for name in ("dict_checkpoint.pkl", ".metadata.pkl", "state.safetensors", "checkpoint.json"):
        (folder / name).write_bytes(payload)
    for name in ("checkpoint_manager_snapshot.json", "trainer.pkl", ".validate_storage_marker"):
        (directory / "attempt-1" / name).write_bytes(payload)
    output = ends("train", made / "store", "bundle", "--epochs", "1", "--rate", "0.01", code=0)
    assert "incomplete or has changed" in output


def test_a_checkpoint_whose_label_vouches_for_a_pickle_is_passed_over(payload, canary, tmp_path):
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
def test_a_config_with_yaml_tags_is_refused(words, made, canary, ends, tmp_path):
    tag = f'!!python/object/apply:builtins.open ["{canary}", "w"]\n'
    (tmp_path / "config.yaml").write_text(f"train: {tag}{words[0]}:\n  epochs: {tag}")
    stands = {"DATA": made / "data", "STORE": made / "store", "BUNDLE": tmp_path}
    output = ends(
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
def test_an_audit_without_a_database_does_not_pass(tmp_path, dependencies, code, said):
    result = tmp_path / "found.json"
    result.write_text(json.dumps({"dependencies": dependencies, "fixes": []}))
    script = Path(__file__).parents[1] / ".ci" / "audit.py"
    done = subprocess.run([sys.executable, script, result], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert said in done.stdout
