"""The command line: help, flags, config files, and refusals in three parts."""

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

COMMANDS = [
    "demo",
    "fit",
    "precompute",
    "lr-find",
    "train",
    "score",
    "export",
    "publish",
    "doctor",
    "submit",
    "fetch",
]


def run(*args: object) -> int:
    """The exit code of a command, run in this process."""
    with pytest.raises(SystemExit) as exit_info:
        main([str(arg) for arg in args])
    return int(exit_info.value.code or 0)


def test_help_imports_no_heavy_library():
    script = (
        "import sys; sys.argv = ['arrowhead', '--help']\n"
        "from arrowhead.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'ray', 'mlflow', 'nvidia', 'pyarrow'} & set(sys.modules)))"
    )
    completed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert completed.stdout.strip().endswith("[]")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_usage_and_an_example(capsys, name):
    assert run(name, "--help") == 0
    help_text = capsys.readouterr().out
    assert f"Usage: arrowhead {name}" in help_text
    assert "--json" in help_text
    assert name in ("doctor", "demo") or "Example: arrowhead" in help_text
    assert name in ("doctor", "export", "publish", "fetch") or "--workers" in help_text


@pytest.fixture
def expect_refusal(monkeypatch, capsys, tmp_path, add_mlflow_db):
    """A function that runs a command, requires a refusal and returns its three lines."""
    monkeypatch.chdir(add_mlflow_db(tmp_path))

    def run_refused(*args: object, code: int = 2) -> tuple[str, str, str]:
        assert run(*args) == code
        result, wanted, do = capsys.readouterr().err.strip().splitlines()[-3:]
        assert result.startswith("arrowhead: ")
        assert wanted.startswith("  wanted  ")
        assert do.startswith("  do      ")
        return result, wanted, do

    return run_refused


def test_a_missing_folder_is_refused(expect_refusal):
    result, _, _ = expect_refusal("fit", "nowhere", "out")
    assert "nowhere is not there" in result


def test_a_folder_without_images_is_refused(expect_refusal, tmp_path):
    (tmp_path / "empty").mkdir()
    result, _, _ = expect_refusal("precompute", "empty", "store")
    assert "no images" in result


def test_a_folder_with_one_class_is_refused(expect_refusal, tmp_path, image_folder):
    (tmp_path / "one" / "leaves").mkdir(parents=True)
    file = next((image_folder / "train" / "leaves").iterdir())
    (tmp_path / "one" / "leaves" / "a.jpg").write_bytes(file.read_bytes())
    result, wanted, _ = expect_refusal("fit", "one", "out")
    assert "one class, 'leaves'" in result
    assert "two classes" in wanted


def test_a_class_without_training_images_is_refused(expect_refusal, tmp_path, image_folder):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(image_folder / "train")
    (tmp_path / "data" / "valid").mkdir()
    for name in ("leaves", "ferns"):
        (tmp_path / "data" / "valid" / name).symlink_to(image_folder / "valid" / "leaves")
    result, _, _ = expect_refusal("fit", "data", "out")
    assert "no images of ferns" in result


def test_an_unknown_body_is_refused_and_a_similar_one_suggested(expect_refusal, image_folder):
    result, _, do = expect_refusal(
        "fit", image_folder, "out", "--body", "resnet43", "--weights", "random"
    )
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
        ["--address", "10.0.0.1:6379", "--workers", "0"],
        ["--valid-share", "1.5"],
        ["--bodi", "resnet34"],
        ["--std", "0", "1", "1"],
    ],
    ids=lambda flags: " ".join(flags),
)
def test_a_bad_flag_is_refused_by_name(expect_refusal, image_folder, flags):
    result, _, _ = expect_refusal("fit", image_folder, "out", *flags)
    assert flags[0] in result


@pytest.mark.parametrize(
    "words", [["score", "nothing", "x", "y"], ["train", "nothing", "x"], ["lr-find", "nothing"]]
)
def test_a_path_that_is_not_a_store_or_bundle_is_refused(expect_refusal, words):
    result, _, _ = expect_refusal(*words)
    assert "nothing is not a" in result


def test_a_missing_argument_is_refused(expect_refusal):
    result, _, do = expect_refusal("fit")
    assert "--data" in result
    assert "fit --help" in do


@pytest.mark.parametrize(
    ("words", "found", "wanted", "do"),
    [
        (
            "train s b --weight-decay abc",
            "abc",
            "--weight-decay: a number. adamw: decoupled from the gradient",
            "correct --weight-decay; arrowhead train --help",
        ),
        ("fit", "fit: DATA (--data) is missing.", "--data: a text. Images: a folder", "fit --help"),
        ("fit a b --mean 1 2", "Only got 2", "--mean: 3 numbers. Channel means", "correct --mean"),
        ("train s b --epochs", "--epochs", "a whole number or auto. Passes", "correct --epochs"),
        ("train s b --schedule x", "x", "--schedule: one of one-cycle, ", "correct --schedule"),
        ("train s b extra", "too many arguments: extra.", "each argument", "train --help"),
        ("train s b --heed x", "--heed", "a flag of train.", "write --head."),
        ("bundle inf", "inf", "one of the commands.", "arrowhead bundle --help"),
    ],
)
def test_a_command_line_that_cannot_be_parsed_gets_a_refusal_that_says_what_is_wanted(
    expect_refusal, words, found, wanted, do
):
    refusal = expect_refusal(*words.split())
    for text, part in zip(refusal, (found, wanted, do), strict=True):
        assert part in text


def test_a_refused_request_leaves_no_mlflow_run(expect_refusal, image_folder, tmp_path):
    from mlflow import MlflowClient

    result, _, _ = expect_refusal(
        "fit", image_folder, "out", "--weights", "IMAGENET1K_V9"
    )  # refused after the MLflow run started
    assert "IMAGENET1K_V9" in result
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("arrowhead")
    assert client.search_runs([experiment.experiment_id]) == []


def test_a_tracking_store_that_cannot_be_opened_is_refused_before_any_work(
    expect_refusal, image_folder
):
    result, _, do = expect_refusal(
        "fit", image_folder, "out", "--tracking-uri", "http://127.0.0.1:9"
    )
    assert "http://127.0.0.1:9" in result
    assert "--tracking-uri" in do
    assert not Path("out").exists()


def test_an_address_where_no_cluster_answers_is_refused_at_once(expect_refusal, image_folder):
    flags = ["--body", "resnet18", "--weights", "random", "--size", "32"]
    unreachable = ["--workers", "1", "--address", "127.0.0.1:9"]
    result, _, do = expect_refusal("precompute", image_folder, "store", *flags, *unreachable)
    assert "No Ray cluster answers at 127.0.0.1:9" in result
    assert "ray start --head" in do


def test_doctor_reports_every_check_and_a_fix_for_each_problem(capsys):
    assert run("doctor", "--json") == 0
    checks = json.loads(capsys.readouterr().out.splitlines()[-1])["checks"]
    names = {check["name"] for check in checks}
    assert {"python", "torch", "gpu", "dali", "ray", "mlflow", "weights", "disk"} <= names
    assert all(check["fix"] for check in checks if check["state"] != "ok")
    assert "JPEG" in next(check["found"] for check in checks if check["name"] == "dali")


def test_a_config_file_sets_flags_and_the_command_line_overrides_it(
    expect_refusal, image_folder, tmp_path, monkeypatch
):
    configs = []
    monkeypatch.setattr(train, "Store", lambda path: path)
    monkeypatch.setattr("arrowhead.reporting.extraction.show_store", lambda *args: None)
    monkeypatch.setattr(
        "arrowhead.commands.train.train_bundle", lambda *args: configs.append(args[2]) or {}
    )
    toml = tmp_path / "train.toml"
    toml.write_text('[train]\nrate = 0.5\nepochs = 3\nhead = "lesson"\n')
    assert run("train", "s", "b", "--config", toml, "--epochs", "4") == 0
    assert (configs[0].head.rate, configs[0].head.epochs, configs[0].head.head) == (
        0.5,
        4,
        "lesson",
    )
    toml.write_text("[train]\nepoch = 3\n")
    result, _, _ = expect_refusal("train", "s", "b", "--config", toml)
    assert "epoch" in result
    toml.write_text(
        "[train]\nepochs = 3\n[score]\ncsv = true\n[features]\n"
    )  # keys of other commands
    assert run("train", "s", "b", "--config", toml) == 0
    for text, problem, fix in (
        ("[trian]\nepochs = 3\n", "no command reads [trian]", "write [train]"),
        ("[Train]\nepochs = 3\n", "no command reads [Train]", "write [train]"),
        ("epochs = 3\n", "no command reads epochs", "put epochs below"),
        ("[train]\nepochs = 3\n[[score]]\n", "no command reads score", "put score below"),
    ):
        toml.write_text(text)
        result, _, do = expect_refusal("train", "s", "b", "--config", toml)
        assert problem in result and fix in do


@pytest.mark.parametrize(
    "flags",
    [
        ["--head", "lesson", "--epochs", "5", "--batch-size", "16"],
        ["--optimizer", "sgd", "--class-weights", "balanced", "--weight-decay", "1e-05"],
        ["--schedule", "cosine", "--cycle-len", "2", "--smoothing", "0.1"],
        [],
    ],
)
def test_lr_find_suggests_a_train_command_with_the_same_settings(flags):
    request = cluster.parse_command(["lr-find", "store", *flags])
    assert request is not None
    head = replace(request.arguments.get("head", TrainConfig()), rate=0.00094)
    suggested_flags = train.flags_of(head)
    assert len(suggested_flags) == len(flags) + 2  # the given flags and --rate
    again = cluster.parse_command(["train", "store", "bundle", *suggested_flags])
    assert again is not None and asdict(again.arguments["head"]) == asdict(head)


def test_a_config_file_of_one_call_is_not_used_by_the_next(tmp_path, monkeypatch, capsys):
    """Even if its path was relative and the next call has another working directory."""
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text("[train]\nepochs = 3\n")
    words = ["train", "store", "bundle", "--config", "mine.toml"]
    call = cluster.parse_command(words)
    assert call is not None and call.arguments["head"].epochs == 3
    with pytest.raises(SystemExit):
        main(words)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    with pytest.raises(SystemExit) as exit_info:
        main(["train", "store", "bundle"])
    assert exit_info.value.code == 2
    assert "not a feature store" in capsys.readouterr().err
    again = cluster.parse_command(["train", "store", "bundle"])
    assert again is not None and again.arguments["head"].epochs == TrainConfig().epochs


@pytest.mark.parametrize(
    ("typed", "suggested"),
    [
        ("--heed", "--head"),
        ("--heed=lesson", "--head"),
        ("--sede", "--seed"),
        ("--eed", "--seed"),
        ("--epoch", "--epochs"),
        ("--batch", "--batch-size"),
        ("--val-share", "--valid-share"),
        ("--max-faults", "--extract.max-faults"),
        ("--store", None),
        ("--prefix", None),
        ("--test", None),
        ("--xyz", None),
    ],
)
def test_an_unknown_flag_is_refused_and_a_similar_one_suggested_if_there_is_one(
    expect_refusal, typed, suggested
):
    result, _, _ = expect_refusal("fit", "photos", "out", typed, "x")
    suggestion = f" Did you mean {suggested}?" if suggested else ""
    assert result == f"arrowhead: Unknown option: {typed.partition('=')[0]}.{suggestion}"


def test_an_unknown_key_of_a_config_file_is_refused_and_a_similar_one_suggested(expect_refusal):
    Path("mine.toml").write_text("[train]\nheed = 'lesson'\n")
    result, _, _ = expect_refusal("--config", "mine.toml", "train", "store", "bundle")
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
def test_a_flag_without_effect_on_a_command_is_unknown_and_not_in_its_help(
    expect_refusal, capsys, words
):
    flag = next(word for word in words if word.startswith("--"))
    result, _, _ = expect_refusal(*words)
    assert f"Unknown option: {flag}." in result
    command_words = words[:2] if words[0] == "bundle" else words[:1]
    assert run(*command_words, "--help") == 0
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
def test_a_flag_without_effect_in_this_combination_is_refused(
    expect_refusal, image_folder, make_bundle, words, named
):
    paths = {"photos": image_folder, "bundle": make_bundle()}
    result, _, _ = expect_refusal(*(word.format(**paths) for word in words))
    assert named in result
    assert not Path("out", "bundle").exists()


def test_every_command_expands_a_tilde_that_the_shell_did_not_expand(
    expect_refusal, image_folder, make_bundle, tmp_path, monkeypatch, command
):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(make_bundle(), tmp_path / "bundle")
    shutil.copytree(image_folder / "valid", tmp_path / "photos")
    flags = ["--body", "resnet18", "--weights", "random", "--size", "32"]
    assert command("precompute", "~/photos", "~/store", *flags)["store"] == str(tmp_path / "store")
    for name in ("info", "verify", "gc"):
        command("features", name, "~/store")
    command("bundle", "info", "~/bundle")
    command("bundle", "verify", "~/bundle")
    result, _, _ = expect_refusal("score", "~/nothing", "~/photos", "~/scores")
    assert str(tmp_path / "nothing") in result
    Path("here.toml").write_text('[precompute]\nimages = "~/elsewhere"\n')
    call = cluster.parse_command(["precompute", "a.csv", "s", "--config", "~/here.toml"])
    assert call is not None and call.arguments["source"].images == str(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    "words", [["bundle", "info", "{bundle}", "--json"], ["bundle", "info", "{bundle}"]], ids=len
)
def test_a_result_that_cannot_be_written_to_standard_output_is_an_error(make_bundle, words):
    call = [
        sys.executable,
        "-m",
        "arrowhead",
        *(word.format(bundle=make_bundle()) for word in words),
    ]
    with Path("/dev/full").open("w") as full:
        completed = subprocess.run(
            call, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert completed.returncode == 2
    assert "could not be written to standard output: No space left on device" in completed.stderr
    piped = '"$@" | true; exit "${PIPESTATUS[0]}"'
    completed = subprocess.run(
        ["bash", "-c", piped, "-", *call], capture_output=True, text=True, check=False
    )
    assert (completed.returncode, completed.stderr) == (0, "")
