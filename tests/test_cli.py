"""The command line for a new user: help and refusals in three parts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from arrowhead.cli import cluster, train
from arrowhead.cli.main import main
from arrowhead.training.config import TrainConfig

VERBS = ["demo", "fit", "precompute", "lr-find", "train", "score", "export", "doctor", "submit"]


def run(*args: object) -> int:
    """The exit code of a command, run in this process."""
    with pytest.raises(SystemExit) as ended:
        main([str(arg) for arg in args])
    return int(ended.value.code or 0)


def test_help_and_version_bring_no_heavy_library():
    script = (
        "import sys; sys.argv = ['arrowhead', '--help']\n"
        "from arrowhead.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'ray', 'mlflow', 'nvidia', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith("[]")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_that_says_what_it_does(capsys, verb):
    assert run(verb, "--help") == 0
    shown = capsys.readouterr().out
    assert f"Usage: arrowhead {verb}" in shown
    assert "--json" in shown
    assert verb in ("doctor", "demo") or "Example: arrowhead" in shown
    assert verb in ("doctor", "export") or "--workers" in shown


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path, tracked):
    """Runs a command that must be refused; its three lines."""
    monkeypatch.chdir(tracked(tmp_path))

    def command(*args: object, code: int = 2) -> tuple[str, str, str]:
        assert run(*args) == code
        result, wanted, do = capsys.readouterr().err.strip().splitlines()[-3:]
        assert result.startswith("arrowhead: ")
        assert wanted.startswith("  wanted  ")
        assert do.startswith("  do      ")
        return result, wanted, do

    return command


def test_a_missing_folder_is_refused(refused):
    result, _, _ = refused("fit", "nowhere", "out")
    assert "nowhere is not there" in result


def test_a_folder_without_images_is_refused(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    result, _, _ = refused("precompute", "empty", "store")
    assert "no images" in result


def test_one_class_is_refused(refused, tmp_path, drawn):
    (tmp_path / "one" / "leaves").mkdir(parents=True)
    file = next((drawn / "train" / "leaves").iterdir())
    (tmp_path / "one" / "leaves" / "a.jpg").write_bytes(file.read_bytes())
    result, wanted, _ = refused("fit", "one", "out")
    assert "one class, 'leaves'" in result
    assert "two classes" in wanted


def test_a_class_that_training_never_sees_is_refused(refused, tmp_path, drawn):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(drawn / "train")
    (tmp_path / "data" / "valid").mkdir()
    for name in ("leaves", "ferns"):
        (tmp_path / "data" / "valid" / name).symlink_to(drawn / "valid" / "leaves")
    result, _, _ = refused("fit", "data", "out")
    assert "no images of ferns" in result


def test_an_unknown_body_is_refused_with_the_near_miss(refused, drawn):
    result, _, do = refused("fit", drawn, "out", "--body", "resnet43", "--weights", "random")
    assert "resnet43" in result
    assert "resnet34" in do


@pytest.mark.parametrize(
    "flags",
    [
        ["--rate", "fast"],
        ["--rate", "-1"],
        ["--epochs", "0"],
        ["--size", "3"],
        ["--pool", "median"],
        ["--workers", "-2"],
        ["--address", "10.0.0.1:6379"],
        ["--valid-share", "1.5"],
        ["--bodi", "resnet34"],
        ["--std", "0", "1", "1"],
    ],
    ids=lambda flags: " ".join(flags),
)
def test_a_bad_flag_is_refused_by_name(refused, drawn, flags):
    result, _, _ = refused("fit", drawn, "out", *flags)
    assert flags[0] in result


@pytest.mark.parametrize(
    "words", [["score", "nothing", "x", "y"], ["train", "nothing", "x"], ["lr-find", "nothing"]]
)
def test_what_is_no_store_or_bundle_is_refused(refused, words):
    result, _, _ = refused(*words)
    assert "nothing is not a" in result


def test_a_missing_argument_is_refused(refused):
    result, _, do = refused("fit")
    assert "--data" in result
    assert "fit --help" in do


def test_a_refused_request_leaves_no_run_behind(refused, drawn, tmp_path):
    from mlflow import MlflowClient

    result, _, _ = refused("fit", drawn, "out", "--weights", "IMAGENET1K_V9")  # a run has begun
    assert "IMAGENET1K_V9" in result
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("arrowhead")
    assert client.search_runs([experiment.experiment_id]) == []


def test_a_tracking_store_that_cannot_be_opened_is_refused_before_any_work(refused, drawn):
    result, _, do = refused("fit", drawn, "out", "--tracking-uri", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9" in result
    assert "--tracking-uri" in do
    assert not Path("out").exists()


def test_an_address_where_no_cluster_listens_is_refused_at_once(refused, drawn):
    flags = ["--body", "resnet18", "--weights", "random", "--size", "32"]
    away = ["--workers", "1", "--address", "127.0.0.1:9"]
    result, _, do = refused("precompute", drawn, "store", *flags, *away)
    assert "No Ray cluster answers at 127.0.0.1:9" in result
    assert "ray start --head" in do


def test_doctor_finds_this_machine_fit(capsys):
    assert run("doctor", "--json") == 0
    checks = json.loads(capsys.readouterr().out.splitlines()[-1])["checks"]
    names = {check["name"] for check in checks}
    assert {"python", "torch", "gpu", "dali", "ray", "mlflow", "weights", "disk"} <= names
    assert all(check["fix"] for check in checks if check["state"] != "ok")
    assert "JPEG" in next(check["found"] for check in checks if check["name"] == "dali")


def test_a_config_file_sets_the_same_flags_and_the_command_line_wins(
    refused, drawn, tmp_path, monkeypatch
):
    seen = []
    monkeypatch.setattr(train, "Store", lambda path: path)
    monkeypatch.setattr("arrowhead.reporting.extraction.show_store", lambda *args: None)
    monkeypatch.setattr(
        "arrowhead.commands.train.train_bundle", lambda *args: seen.append(args[2]) or {}
    )
    toml = tmp_path / "train.toml"
    toml.write_text('[train]\nrate = 0.5\nepochs = 3\nhead = "lesson"\n')
    assert run("train", "s", "b", "--config", toml, "--epochs", "4") == 0
    assert (seen[0].head.rate, seen[0].head.epochs, seen[0].head.head) == (0.5, 4, "lesson")
    toml.write_text("[train]\nepoch = 3\n")
    result, _, _ = refused("train", "s", "b", "--config", toml)
    assert "epoch" in result
    toml.write_text("[train]\nepochs = 3\n[score]\ncsv = true\n[features]\n")  # of other verbs
    assert run("train", "s", "b", "--config", toml) == 0
    for text, what, fix in (
        ("[trian]\nepochs = 3\n", "no command reads [trian]", "write [train]"),
        ("[Train]\nepochs = 3\n", "no command reads [Train]", "write [train]"),
        ("epochs = 3\n", "no command reads epochs", "put epochs below"),
        ("[train]\nepochs = 3\n[[score]]\n", "no command reads score", "put score below"),
    ):
        toml.write_text(text)
        result, _, do = refused("train", "s", "b", "--config", toml)
        assert what in result and fix in do


@pytest.mark.parametrize(
    "flags",
    [
        ["--head", "lesson", "--epochs", "5", "--batch-size", "16"],
        ["--optimizer", "sgd", "--class-weights", "balanced", "--weight-decay", "1e-05"],
        ["--schedule", "cosine", "--cycle-len", "2", "--smoothing", "0.1"],
        [],
    ],
)
def test_a_suggested_rate_is_offered_with_the_training_it_was_tried_for(flags):
    request = cluster.parse_command(["lr-find", "store", *flags])
    assert request is not None
    head = replace(request.arguments.get("head", TrainConfig()), rate=0.00094)
    offered = train.flags_of(head)
    assert len(offered) == len(flags) + 2  # no flag that was not asked for, but --rate
    again = cluster.parse_command(["train", "store", "bundle", *offered])
    assert again is not None and asdict(again.arguments["head"]) == asdict(head)


def test_a_config_file_of_one_call_is_not_looked_for_by_the_next(tmp_path, monkeypatch, capsys):
    """Also where its name was relative and the next call stands elsewhere."""
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text("[train]\nepochs = 3\n")
    words = ["train", "store", "bundle", "--config", "mine.toml"]
    call = cluster.parse_command(words)
    assert call is not None and call.arguments["head"].epochs == 3
    with pytest.raises(SystemExit):
        main(words)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    with pytest.raises(SystemExit) as ended:
        main(["train", "store", "bundle"])
    assert ended.value.code == 2
    assert "not a feature store" in capsys.readouterr().err
    again = cluster.parse_command(["train", "store", "bundle"])
    assert again is not None and again.arguments["head"].epochs == TrainConfig().epochs


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--heed", "--head"),
        ("--heed=lesson", "--head"),
        ("--sede", "--seed"),
        ("--eed", "--seed"),
        ("--epoch", "--epochs"),
        ("--batch", "--batch-size"),
        ("--val-share", "--valid-share"),
        ("--store", None),
        ("--prefix", None),
        ("--test", None),
        ("--xyz", None),
    ],
)
def test_an_unknown_flag_is_answered_with_the_near_one_and_with_none_where_none_is_near(
    refused, typed, meant
):
    result, _, _ = refused("fit", "photos", "out", typed, "x")
    suggestion = f" Did you mean {meant}?" if meant else ""
    assert result == f"arrowhead: Unknown option: {typed.partition('=')[0]}.{suggestion}"


def test_an_unknown_key_of_a_config_file_is_answered_with_the_near_one(refused):
    Path("mine.toml").write_text("[train]\nheed = 'lesson'\n")
    result, _, _ = refused("--config", "mine.toml", "train", "store", "bundle")
    assert "heed" in result and result.endswith("Did you mean head?")


@pytest.mark.parametrize(
    "words",
    [
        ["lr-find", "store", "--rate", "0.1"],
        ["lr-find", "store", "--l2", "0.1"],
        ["lr-find", "store", "--patience", "3"],
        ["lr-find", "store", "--best", "accuracy"],
        ["evaluate", "bundle", "photos", "--valid-share", "0.3"],
        ["export", "bundle", "model.onnx", "--run-name", "a"],
        ["watch", "--no-system-metrics"],
        ["bundle", "info", "bundle", "--experiment", "a"],
        ["bundle", "verify", "bundle", "--run-name", "a"],
        ["bundle", "register", "bundle", "dogs", "--no-system-metrics"],
    ],
    ids=" ".join,
)
def test_a_flag_that_would_do_nothing_is_unknown_and_not_in_the_help(refused, capsys, words):
    flag = next(word for word in words if word.startswith("--"))
    result, _, _ = refused(*words)
    assert f"Unknown option: {flag}." in result
    verb = words[:2] if words[0] == "bundle" else words[:1]
    assert run(*verb, "--help") == 0
    assert f" {flag} " not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["fit", "{photos}", "out", "--label-column", "breed"], "--label-column"),
        (["fit", "{photos}", "out", "--augment", "top-down", "--weights", "random"], "--augment"),
        (["fit", "{photos}", "out", "--curve-seeds", "5"], "--curve-seeds"),
        (["fit", "{photos}", "out", "--momentum", "0.5"], "--momentum"),
        (["fit", "{photos}", "out", "--rate", "0.1", "--lr-find.steps", "50"], "--lr-find"),
        (["score", "{bundle}", "{photos}", "scores", "--base", "elsewhere"], "--base"),
        (["score", "{bundle}", "{photos}", "scores", "--false-alarms", "0.1"], "--false-alarms"),
        (["watch", "--no-follow", "--every", "5"], "--every"),
    ],
)
def test_a_flag_that_has_no_effect_beside_the_others_is_refused(
    refused, drawn, bundled, words, named
):
    places = {"photos": drawn, "bundle": bundled()}
    result, _, _ = refused(*(word.format(**places) for word in words))
    assert named in result
    assert not Path("out", "bundle").exists()


def test_a_home_that_the_shell_did_not_expand_is_expanded_by_every_verb(
    refused, drawn, bundled, tmp_path, monkeypatch, command
):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(bundled(), tmp_path / "bundle")
    shutil.copytree(drawn / "valid", tmp_path / "photos")
    flags = ["--body", "resnet18", "--weights", "random", "--size", "32"]
    assert command("precompute", "~/photos", "~/store", *flags)["store"] == str(tmp_path / "store")
    for verb in ("info", "verify", "gc"):
        command("features", verb, "~/store")
    command("bundle", "info", "~/bundle")
    command("bundle", "verify", "~/bundle")
    result, _, _ = refused("score", "~/nothing", "~/photos", "~/scores")
    assert str(tmp_path / "nothing") in result
    Path("here.toml").write_text('[precompute]\nimages = "~/elsewhere"\n')
    call = cluster.parse_command(["precompute", "a.csv", "s", "--config", "~/here.toml"])
    assert call is not None and call.arguments["source"].images == str(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    "words", [["bundle", "info", "{bundle}", "--json"], ["bundle", "info", "{bundle}"]], ids=len
)
def test_a_result_that_a_full_disk_lost_is_no_success(bundled, words):
    call = [sys.executable, "-m", "arrowhead", *(word.format(bundle=bundled()) for word in words)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(call, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert "could not be written to standard output: No space left on device" in done.stderr
    piped = '"$@" | true; exit "${PIPESTATUS[0]}"'
    done = subprocess.run(
        ["bash", "-c", piped, "-", *call], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
