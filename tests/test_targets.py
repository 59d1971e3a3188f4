"""Paths are checked before any work: what cannot be written or read is refused immediately."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from conftest import AddMlflowDb, Command

from arrowhead import ConfigError, demo, fileio
from arrowhead.cli import demo as cli_demo
from arrowhead.cli.main import main
from arrowhead.commands import train
from arrowhead.features import torchvision_bodies
from arrowhead.features.backbone import BodyConfig
from arrowhead.output_paths import check_output_file, check_output_folder

RANDOM = ["--body", "shufflenet_v2_x0_5", "--weights", "random", "--size", "64"]
HEAVY_LIBRARIES = ("torch", "mlflow", "ray", "pyarrow")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory, add_mlflow_db: AddMlflowDb) -> Path:
    """A working directory with a finished store in it."""
    return add_mlflow_db(tmp_path_factory.mktemp("targets"))


@pytest.fixture(scope="module")
def store(workdir: Path, image_folder: Path) -> Path:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(workdir)
        with pytest.raises(SystemExit) as exit_info:
            main(["precompute", str(image_folder), "store", *RANDOM])
    assert exit_info.value.code == 0
    return workdir / "store"


@pytest.fixture
def clean_workdir(store: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory; files that a test leaves there are removed."""
    monkeypatch.chdir(workdir)
    return workdir


def refused_result(capsys: pytest.CaptureFixture[str], *words: object, code: int = 2) -> str:
    """The first line (what was found) of a command that must be refused."""
    with pytest.raises(SystemExit) as exit_info:
        main([str(word) for word in words])
    result, wanted, do = capsys.readouterr().err.strip().splitlines()[-3:]
    assert exit_info.value.code == code, result
    assert wanted.startswith("  wanted  ") and do.startswith("  do      ")
    return result


def list_files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "words",
    [
        ["fit", "DATA", "OUT", *RANDOM],
        ["precompute", "DATA", "OUT", *RANDOM],
        ["train", "store", "OUT"],
        ["score", "BUNDLE", "DATA", "OUT"],
        ["export", "BUNDLE", "OUT"],
        ["publish", "BUNDLE", "OUT"],
        ["demo", "OUT"],
    ],
    ids=lambda words: words[0],
)
def test_unwritable_output_path_is_refused_before_any_work(
    clean_workdir, image_folder, make_bundle, capsys, words
):
    (clean_workdir / "file").write_text("mine")
    messages = {"DATA": str(image_folder), "BUNDLE": str(make_bundle())}
    for out in ("file", "file/below", "/proc/nowhere/out", "x" * 300):
        before = list_files(clean_workdir)
        request = [out if word == "OUT" else messages.get(word, word) for word in words]
        result = refused_result(capsys, *request)
        assert out[:20] in result
        assert list_files(clean_workdir) == before
    assert (clean_workdir / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "words",
    [
        ["precompute", "DATA", "others", *RANDOM],
        ["train", "store", "others"],
        ["train", "store", "store"],
        ["train", "store", "."],
        ["score", "BUNDLE", "DATA", "others"],
        ["score", "BUNDLE", "DATA", "store"],
    ],
    ids=" ".join,
)
def test_folder_with_other_contents_is_refused_and_left_unchanged(
    clean_workdir, image_folder, make_bundle, capsys, words
):
    (clean_workdir / "others").mkdir(exist_ok=True)
    (clean_workdir / "others" / "notes.txt").write_text("mine")
    before = list_files(clean_workdir)
    result = {"DATA": str(image_folder), "BUNDLE": str(make_bundle())}
    refused_result(capsys, *(result.get(word, word) for word in words))
    assert list_files(clean_workdir) == before


def test_folder_without_write_permission_is_refused(tmp_path):
    """As another user, because root may write everywhere."""
    (tmp_path / "closed").mkdir(mode=0o555)
    script = (
        "import sys\nfrom pathlib import Path\nfrom arrowhead import ConfigError; "
        "from arrowhead import output_paths\n"
        "try: output_paths.check_output_folder(Path(sys.argv[1]), 'store')\n"
        "except ConfigError as refusal: sys.exit(f'{refusal.found}')\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "closed" / "new")]
    if os.geteuid() == 0:
        if not (setpriv := shutil.which("setpriv")):
            pytest.skip("root may write everywhere, and there is no setpriv to be another user")
        command = [setpriv, "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", *command]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    if "setpriv" in completed.stderr:
        pytest.skip(f"no way to be another user here: {completed.stderr.strip()}")
    assert "closed/new cannot be written: Permission denied" in completed.stderr


def test_output_paths_are_accepted_in_common_spellings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("later")
    (tmp_path / "a").mkdir()
    assert check_output_folder(Path("new/"), "bundle") == Path("new")
    assert check_output_folder(Path("a/../new"), "bundle") == Path("a/../new")
    assert check_output_folder(Path("~/b"), "bundle") == tmp_path / "home" / "b"
    assert check_output_folder(Path("link"), "bundle") == tmp_path / "real"
    assert check_output_folder(Path("dangling"), "bundle") == tmp_path / "later"
    assert check_output_folder(Path("a/.."), "results") == tmp_path
    assert check_output_file(Path("m.onnx")) == Path("m.onnx")
    assert list_files(tmp_path) == {"real", "link", "dangling", "a"}


@pytest.mark.parametrize(
    ("out", "found"),
    [
        ("loop", "loop cannot be written: Too many levels of symbolic links"),
        ("~nosuchuser/out", "stands for no home directory"),
        ("s3://bucket/out", "is an address"),
        ("byte\udcff/out", "are not UTF-8"),
        ("gs://bucket/model.onnx", "is an address"),
    ],
)
def test_invalid_output_path_is_refused(tmp_path, monkeypatch, out, found):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("pool")
    (tmp_path / "pool").symlink_to("loop")
    before = list_files(tmp_path)
    for kind in ("results", "store", "bundle", "scores"):
        with pytest.raises(ConfigError) as error_info:
            check_output_folder(Path(out), kind)
        assert found in error_info.value.found
    if out != "loop":  # a file replaces a link
        with pytest.raises(ConfigError):
            check_output_file(Path(out))
    assert list_files(tmp_path) == before


def test_folder_with_an_address_like_name_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3:").mkdir()
    assert check_output_folder(Path("s3:/bucket"), "results") == Path("s3:/bucket")


def test_store_or_bundle_at_an_undecodable_path_is_refused(store, make_bundle, tmp_path, capsys):
    shutil.copytree(store, tmp_path / "s\udcff")
    assert "are not UTF-8" in refused_result(capsys, "features", "info", tmp_path / "s\udcff")
    shutil.copytree(make_bundle(), tmp_path / "b\udcff")
    assert "are not UTF-8" in refused_result(capsys, "bundle", "info", tmp_path / "b\udcff")


def test_name_too_long_for_its_draft_is_refused_before_training(tmp_path):
    for name in ("b" * 245, "ä" * 120):
        with pytest.raises(ConfigError, match="too long"):
            check_output_folder(tmp_path / name, "bundle")
    assert check_output_folder(tmp_path / ("b" * 200), "bundle")
    assert not list(tmp_path.iterdir())


def test_empty_path_does_not_mean_the_working_directory(tmp_path, monkeypatch, capsys):
    """As from an unset shell variable."""
    monkeypatch.chdir(tmp_path)
    assert "path given is empty" in refused_result(capsys, "fit", "", "out", *RANDOM)


def test_device_is_not_replaced_by_a_file(clean_workdir, make_bundle, capsys):
    os.mkfifo(clean_workdir / "pipe.onnx")
    result = refused_result(capsys, "export", make_bundle(), "pipe.onnx")
    assert "not a regular file" in result
    assert (clean_workdir / "pipe.onnx").is_fifo()


def test_output_of_fit_given_as_a_store_is_refused_with_the_store_path(tmp_path, capsys):
    (tmp_path / "out" / "store").mkdir(parents=True)
    for output_dir in (False, True):
        if output_dir:
            (tmp_path / "out" / "store" / "store.json").write_text("{}")
        with pytest.raises(SystemExit) as exit_info:
            main(["features", "info", str(tmp_path / "out")])
        assert exit_info.value.code == 2
        result = capsys.readouterr().err
        assert (f"do      give {tmp_path / 'out' / 'store'}." in result) is output_dir


def test_a_bundle_in_place_of_its_store_is_answered_with_the_store(make_bundle, capsys):
    bundle = make_bundle()
    store = bundle.parent / "store"
    for answer in (
        f"{bundle} is a bundle: give the store that it was trained on.",
        f"give {store}.",
    ):
        with pytest.raises(SystemExit) as ended:
            main(["train", str(bundle), "b"])
        assert ended.value.code == 2
        assert f"  do      {answer}" in capsys.readouterr().err
        store.mkdir(exist_ok=True)
        (store / "store.json").write_text("{}")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["fit", "nowhere", "out"], "nowhere is not there"),
        (["precompute", "nowhere.csv", "out"], "nowhere.csv cannot be read"),
        (["fit", "DATA", "out", "--weights", "no.safetensors"], "no.safetensors does not exist"),
        (["fit", "DATA", "out", "--body", "resnet43"], "'resnet43'"),
        (["train", "nowhere", "b"], "nowhere is not a feature store"),
        (["lr-find", "nowhere"], "nowhere is not a feature store"),
        (["score", "nowhere", "DATA", "s"], "nowhere is not a bundle"),
        (["export", "nowhere", "m.onnx"], "nowhere is not a bundle"),
        (["bundle", "info", "nowhere"], "nowhere is not a bundle"),
        (["bundle", "verify", "nowhere"], "nowhere is not a bundle"),
        (["lr-find", "~nobody9/store"], "stands for no home directory"),
        (["features", "info", "nowhere"], "nowhere is not a feature store"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_missing_input_is_refused_before_importing_heavy_libraries(
    tmp_path, image_folder, words, found
):
    script = (
        "import sys\nfrom arrowhead.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        f"finally: print([name for name in {HEAVY_LIBRARIES} if name in sys.modules])\n"
    )
    request = [str(image_folder) if word == "DATA" else word for word in words]
    completed = subprocess.run(
        [sys.executable, "-c", script, *request],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert completed.returncode == 2
    assert found in completed.stderr
    assert completed.stdout.strip() == "[]"
    assert not list(tmp_path.iterdir())


def test_backbone_list_without_torchvision_equals_torchvisions():
    import torchvision.models

    assert torchvision_bodies.registered_names() == torchvision.models.list_models(
        module=torchvision.models
    )


def test_existing_store_is_used_with_its_own_recipe(
    clean_workdir, store, image_folder, command: Command
):
    result = command("precompute", image_folder, "store")
    assert result["counts"]["decoded"] == 0
    assert "shufflenet_v2_x0_5" in command.stderr and "64 pixels" in command.stderr
    recipe = json.loads((store / "store.json").read_text())["recipe"]
    assert (recipe["body"], recipe["size"]) == ("shufflenet_v2_x0_5", 64)
    again = command(
        "precompute", image_folder, "store", "--size", "64", "--body", "shufflenet_v2_x0_5"
    )
    assert again["counts"]["decoded"] == 0


@pytest.mark.parametrize("flags", [["--body", "resnet18"], ["--size", "96"], ["--pool", "max"]])
def test_flag_that_contradicts_a_store_is_refused_by_name(
    clean_workdir, image_folder, capsys, flags
):
    result = refused_result(capsys, "precompute", image_folder, "store", *flags)
    assert flags[0] in result and "store was made with" in result
    result = refused_result(
        capsys, "precompute", image_folder, "store", "--weights", "random", *flags
    )
    assert flags[0] in result


def test_store_can_be_used_without_its_weights_file(clean_workdir, image_folder, command, tmp_path):
    import safetensors.torch
    import torch
    import torchvision

    torch.manual_seed(7)
    state = torchvision.models.shufflenet_v2_x0_5(weights=None).state_dict()
    weights = tmp_path / "mine.safetensors"
    safetensors.torch.save_file(state, weights)
    flags = ["--body", "shufflenet_v2_x0_5", "--weights", weights, "--size", "32"]
    command("precompute", image_folder, tmp_path / "own", *flags)
    weights.unlink()
    assert command("precompute", image_folder, tmp_path / "own")["counts"]["decoded"] == 0


@pytest.mark.slow
def test_demo_leaves_only_its_results_and_existing_files(clean_workdir, monkeypatch, command):
    """With fewer images and a smaller backbone than the real demo."""
    monkeypatch.setattr(demo, "draw", partial(demo.draw, per_class=8))
    small = BodyConfig(body="shufflenet_v2_x0_5", weights="random")
    monkeypatch.setattr(cli_demo, "_demo_body", lambda: small)
    (clean_workdir / "try it/scores").mkdir(parents=True)
    (clean_workdir / "try it/scores/notes.txt").write_text("mine")
    result = command("demo", "try it", "--epochs", "2")
    assert (clean_workdir / "try it/scores/notes.txt").read_text() == "mine"
    assert result["scores"] == "try it/scores-2"
    assert sorted(os.listdir("try it/fit")) == ["bundle", "store"]
    assert sorted(os.listdir("try it")) == ["fit", "images", "scores", "scores-2"]
    assert "arrowhead train 'try it/fit/store' 'try it/lesson'" in command.stderr
    assert set(result["files"]) >= {"try it/images", "try it/fit/bundle", "try it/scores-2"}


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--grid", "seed=0,1"]], ids=["plain", "grid"])
def test_working_directory_accepts_a_bundle_once(
    store, tmp_path, monkeypatch, command, capsys, add_mlflow_db, words
):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(add_mlflow_db(folder))
    flags = ["--epochs", "2", "--rate", "0.01", *words]
    result = command("train", store, ".", *flags)
    assert Path(result["bundle"]).samefile(folder)
    assert {"bundle.json", "weights.safetensors", "golden", "mlflow.db"} <= list_files(folder)
    assert command("bundle", "verify", ".")["drift"]["changed"] == 0
    assert list(tmp_path.iterdir()) == [folder]
    before = list_files(folder)
    messages = refused_result(capsys, "train", store, ".", *flags)
    assert "your working directory" in messages
    assert list_files(folder) == before


@pytest.mark.slow
def test_fit_and_score_write_to_the_working_directory(
    make_bundle, image_folder, tmp_path, monkeypatch, command, add_mlflow_db
):
    for name in ("fit", "scores"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(add_mlflow_db(tmp_path / "fit"))
    body = ["--body", "shufflenet_v2_x0_5", "--weights", "random", "--size", "64"]
    for _ in range(2):
        result = command("fit", image_folder, ".", *body, "--epochs", "2", "--rate", "0.01")
        assert Path(result["bundle"]).resolve() == tmp_path / "fit" / "bundle"
    monkeypatch.chdir(add_mlflow_db(tmp_path / "scores"))
    for _ in range(2):
        assert command("score", make_bundle(), image_folder / "valid", ".")["counts"]["faults"] == 0
    assert Path("score.json").is_file()


def test_second_training_to_a_bundle_is_refused_with_its_name(
    clean_workdir, store, tmp_path, capsys
):
    bundle = tmp_path / "bundle"
    with fileio.locked_output_folder(train.checkpoint_dir_of(bundle)):
        result = refused_result(capsys, "train", store, bundle, "--epochs", "1", "--rate", "0.1")
    assert f"{bundle} is being written" in result and ".training" not in result
