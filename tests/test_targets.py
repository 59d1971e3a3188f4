"""Paths are checked before any work: what cannot be written or read is refused at once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from conftest import Command, Tracked

from arrowhead import ConfigError, demo, fileio
from arrowhead.cli import demo as cli_demo
from arrowhead.cli.main import main
from arrowhead.commands import train
from arrowhead.features import backbone
from arrowhead.features.backbone import BodyConfig
from arrowhead.output_paths import check_output_file, check_output_folder

RANDOM = ["--body", "shufflenet_v2_x0_5", "--weights", "random", "--size", "64"]
HEAVY = ("torch", "mlflow", "ray", "pyarrow")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tracked: Tracked) -> Path:
    """A working directory with a finished store in it."""
    return tracked(tmp_path_factory.mktemp("targets"))


@pytest.fixture(scope="module")
def store(place: Path, drawn: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        with pytest.raises(SystemExit) as ended:
            main(["precompute", str(drawn), "store", *RANDOM])
    assert ended.value.code == 0
    return place / "store"


@pytest.fixture
def here(store: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory; what a test leaves there goes again."""
    monkeypatch.chdir(place)
    return place


def refused(capsys: pytest.CaptureFixture[str], *words: object, code: int = 2) -> str:
    """What a command that must be refused says was found."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    result, wanted, do = capsys.readouterr().err.strip().splitlines()[-3:]
    assert ended.value.code == code, result
    assert wanted.startswith("  wanted  ") and do.startswith("  do      ")
    return result


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "words",
    [
        ["fit", "DATA", "OUT", *RANDOM],
        ["precompute", "DATA", "OUT", *RANDOM],
        ["train", "store", "OUT"],
        ["score", "BUNDLE", "DATA", "OUT"],
        ["export", "BUNDLE", "OUT"],
        ["demo", "OUT"],
    ],
    ids=lambda words: words[0],
)
def test_a_verb_refuses_a_place_that_it_cannot_write_before_it_works(
    here, drawn, bundled, capsys, words
):
    (here / "file").write_text("mine")
    messages = {"DATA": str(drawn), "BUNDLE": str(bundled())}
    for out in ("file", "file/below", "/proc/nowhere/out", "x" * 300):
        before = everything(here)
        request = [out if word == "OUT" else messages.get(word, word) for word in words]
        result = refused(capsys, *request)
        assert out[:20] in result
        assert everything(here) == before
    assert (here / "file").read_text() == "mine"


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
def test_a_folder_that_holds_something_else_is_refused_and_left_alone(
    here, drawn, bundled, capsys, words
):
    (here / "others").mkdir(exist_ok=True)
    (here / "others" / "notes.txt").write_text("mine")
    before = everything(here)
    result = {"DATA": str(drawn), "BUNDLE": str(bundled())}
    refused(capsys, *(result.get(word, word) for word in words))
    assert everything(here) == before


def test_a_folder_without_leave_to_write_is_refused(tmp_path):
    """As another user: who is root may write everywhere."""
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
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "setpriv" in done.stderr:
        pytest.skip(f"no way to be another user here: {done.stderr.strip()}")
    assert "closed/new cannot be written: Permission denied" in done.stderr


def test_places_are_taken_as_people_write_them(tmp_path, monkeypatch):
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
    assert everything(tmp_path) == {"real", "link", "dangling", "a"}


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
def test_a_place_that_is_none_is_refused(tmp_path, monkeypatch, out, found):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("pool")
    (tmp_path / "pool").symlink_to("loop")
    before = everything(tmp_path)
    for kind in ("results", "store", "bundle", "scores"):
        with pytest.raises(ConfigError) as refusal:
            check_output_folder(Path(out), kind)
        assert found in refusal.value.found
    if out != "loop":  # a file takes the place of a link
        with pytest.raises(ConfigError):
            check_output_file(Path(out))
    assert everything(tmp_path) == before


def test_a_folder_that_is_called_like_an_address_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3:").mkdir()
    assert check_output_folder(Path("s3:/bucket"), "results") == Path("s3:/bucket")


def test_a_store_or_bundle_that_was_moved_to_a_path_that_is_no_text_is_refused(
    store, bundled, tmp_path, capsys
):
    shutil.copytree(store, tmp_path / "s\udcff")
    assert "are not UTF-8" in refused(capsys, "features", "info", tmp_path / "s\udcff")
    shutil.copytree(bundled(), tmp_path / "b\udcff")
    assert "are not UTF-8" in refused(capsys, "bundle", "info", tmp_path / "b\udcff")


def test_a_name_that_leaves_no_room_for_a_draft_is_refused_before_the_training(tmp_path):
    for name in ("b" * 245, "ä" * 120):
        with pytest.raises(ConfigError, match="too long"):
            check_output_folder(tmp_path / name, "bundle")
    assert check_output_folder(tmp_path / ("b" * 200), "bundle")
    assert not list(tmp_path.iterdir())


def test_an_empty_path_is_not_the_working_folder(tmp_path, monkeypatch, capsys):
    """As of a shell's variable that is not set."""
    monkeypatch.chdir(tmp_path)
    assert "path given is empty" in refused(capsys, "fit", "", "out", *RANDOM)


def test_a_device_is_not_replaced_by_a_file(here, bundled, capsys):
    os.mkfifo(here / "pipe.onnx")
    result = refused(capsys, "export", bundled(), "pipe.onnx")
    assert "not a regular file" in result
    assert (here / "pipe.onnx").is_fifo()


def test_the_out_of_fit_in_place_of_its_store_is_told_the_store(tmp_path, capsys):
    (tmp_path / "out" / "store").mkdir(parents=True)
    for there in (False, True):
        if there:
            (tmp_path / "out" / "store" / "store.json").write_text("{}")
        with pytest.raises(SystemExit) as ended:
            main(["features", "info", str(tmp_path / "out")])
        assert ended.value.code == 2
        result = capsys.readouterr().err
        assert (f"do      give {tmp_path / 'out' / 'store'}." in result) is there


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
def test_what_is_not_there_is_told_before_anything_heavy_is_imported(tmp_path, drawn, words, found):
    script = (
        "import sys\nfrom arrowhead.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        f"finally: print([name for name in {HEAVY} if name in sys.modules])\n"
    )
    request = [str(drawn) if word == "DATA" else word for word in words]
    done = subprocess.run(
        [sys.executable, "-c", script, *request],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2
    assert found in done.stderr
    assert done.stdout.strip() == "[]"
    assert not list(tmp_path.iterdir())


def test_the_networks_that_are_known_without_torchvision_are_those_that_it_has():
    import torchvision.models

    assert backbone._registered_networks() == torchvision.models.list_models(
        module=torchvision.models
    )


def test_a_store_that_is_there_is_used_with_its_own_recipe(here, store, drawn, command: Command):
    result = command("precompute", drawn, "store")
    assert result["counts"]["decoded"] == 0
    assert "shufflenet_v2_x0_5" in command.said and "64 pixels" in command.said
    recipe = json.loads((store / "store.json").read_text())["recipe"]
    assert (recipe["body"], recipe["size"]) == ("shufflenet_v2_x0_5", 64)
    again = command("precompute", drawn, "store", "--size", "64", "--body", "shufflenet_v2_x0_5")
    assert again["counts"]["decoded"] == 0


@pytest.mark.parametrize("flags", [["--body", "resnet18"], ["--size", "96"], ["--pool", "max"]])
def test_a_flag_that_contradicts_a_store_is_refused_by_name(here, drawn, capsys, flags):
    result = refused(capsys, "precompute", drawn, "store", *flags)
    assert flags[0] in result and "store was made with" in result
    result = refused(capsys, "precompute", drawn, "store", "--weights", "random", *flags)
    assert flags[0] in result


def test_the_weights_of_a_store_are_not_needed_elsewhere(here, drawn, command, tmp_path):
    import safetensors.torch
    import torch
    import torchvision

    torch.manual_seed(7)
    state = torchvision.models.shufflenet_v2_x0_5(weights=None).state_dict()
    weights = tmp_path / "mine.safetensors"
    safetensors.torch.save_file(state, weights)
    flags = ["--body", "shufflenet_v2_x0_5", "--weights", weights, "--size", "32"]
    command("precompute", drawn, tmp_path / "own", *flags)
    weights.unlink()
    assert command("precompute", drawn, tmp_path / "own")["counts"]["decoded"] == 0


def test_a_demo_leaves_its_results_only_and_what_was_there(here, monkeypatch, command):
    """Smaller than it is, and with a smaller body."""
    monkeypatch.setattr(demo, "draw", partial(demo.draw, per_class=8))
    small = BodyConfig(body="shufflenet_v2_x0_5", weights="random")
    monkeypatch.setattr(cli_demo, "_demo_body", lambda screen: small)
    (here / "try it/scores").mkdir(parents=True)
    (here / "try it/scores/notes.txt").write_text("mine")
    result = command("demo", "try it", "--epochs", "2")
    assert (here / "try it/scores/notes.txt").read_text() == "mine"
    assert result["scores"] == "try it/scores-2"
    assert sorted(os.listdir("try it/fit")) == ["bundle", "store"]
    assert sorted(os.listdir("try it")) == ["fit", "images", "scores", "scores-2"]
    assert "arrowhead train 'try it/fit/store' 'try it/lesson'" in command.said
    assert set(result["files"]) >= {"try it/images", "try it/fit/bundle", "try it/scores-2"}


@pytest.mark.parametrize("words", [[], ["--grid", "seed=0,1"]], ids=["plain", "grid"])
def test_the_folder_that_one_stands_in_takes_a_bundle_once(
    store, tmp_path, monkeypatch, command, capsys, tracked, words
):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(tracked(folder))
    flags = ["--epochs", "2", "--rate", "0.01", *words]
    result = command("train", store, ".", *flags)
    assert Path(result["bundle"]).samefile(folder)
    assert {"bundle.json", "weights.safetensors", "golden", "mlflow.db"} <= everything(folder)
    assert command("bundle", "verify", ".")["drift"]["changed"] == 0
    assert list(tmp_path.iterdir()) == [folder]
    before = everything(folder)
    messages = refused(capsys, "train", store, ".", *flags)
    assert "your working directory" in messages
    assert everything(folder) == before


def test_fit_and_score_write_to_the_folder_that_one_stands_in(
    bundled, drawn, tmp_path, monkeypatch, command, tracked
):
    for name in ("fit", "scores"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tracked(tmp_path / "fit"))
    body = ["--body", "shufflenet_v2_x0_5", "--weights", "random", "--size", "64"]
    for _ in range(2):
        result = command("fit", drawn, ".", *body, "--epochs", "2", "--rate", "0.01")
        assert Path(result["bundle"]).resolve() == tmp_path / "fit" / "bundle"
    monkeypatch.chdir(tracked(tmp_path / "scores"))
    for _ in range(2):
        assert command("score", bundled(), drawn / "valid", ".")["counts"]["faults"] == 0
    assert Path("score.json").is_file()


def test_a_second_training_of_a_bundle_is_told_which(here, store, tmp_path, capsys):
    bundle = tmp_path / "bundle"
    with fileio.locked_output_folder(train.checkpoint_dir_of(bundle)):
        result = refused(capsys, "train", store, bundle, "--epochs", "1", "--rate", "0.1")
    assert f"{bundle} is being written" in result and ".training" not in result
