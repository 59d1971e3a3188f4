"""A damaged or incomplete checkpoint is detected, and the previous one is used."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import forks
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arrowhead.training import checkpoint
from arrowhead.training.checkpoint import Checkpoint

KEY = "a1b2"


def make_tensors(number: int) -> dict[str, torch.Tensor]:
    """Tensors as a trainer saves them; each number has different ones."""
    generator = torch.Generator().manual_seed(number)
    weight = torch.randn(3, 5, generator=generator)
    return {"head.weight": weight, "step": torch.tensor(number), "half": weight.half()}


def make_facts(number: int, key: str = KEY) -> dict[str, object]:
    return {"key": key, "number": number, "run": "r1", "rates": [0.1, number / 3]}


def save_checkpoint(directory: Path, number: int, name: str = "", key: str = KEY) -> Path:
    folder = directory / (name or f"epoch-{number:04}")
    checkpoint.write(folder, make_tensors(number), make_facts(number, key))
    return folder


def is_checkpoint(result: Checkpoint | None, number: int, key: str = KEY) -> bool:
    """Whether this is exactly the checkpoint of that number."""
    expected = make_tensors(number)
    return (
        result is not None
        and (result.number, result.facts) == (number, make_facts(number, key))
        and result.tensors.keys() == expected.keys()
        and all(torch.equal(result.tensors[name], expected[name]) for name in expected)
        and all(result.tensors[name].dtype == expected[name].dtype for name in expected)
    )


def fail_on_warning(message: str) -> None:
    raise AssertionError(message)


# ----------------------------------------------------------------------- saved and loaded


def test_a_checkpoint_is_read_back_to_the_last_bit(tmp_path):
    unusual = {
        "nan": torch.tensor([float("nan"), float("-inf"), -0.0]),
        "view": torch.arange(12).reshape(3, 4).t(),
        "none": torch.empty(0, 7),
        "bf16": torch.tensor(1.5, dtype=torch.bfloat16),
        "rng": torch.get_rng_state(),
    }
    unusual["tied"] = unusual["view"][0]  # shares memory
    grad = torch.nn.Parameter(torch.ones(2))
    checkpoint.write(
        tmp_path / "one", {**unusual, "grad": grad}, make_facts(4) | {"shape": (1, 2), 7: "x"}
    )
    result = checkpoint.newest(tmp_path, KEY, fail_on_warning)
    assert result is not None
    assert result.facts == make_facts(4) | {"shape": [1, 2], "7": "x"}
    for name, tensor in unusual.items():
        assert result.tensors[name].dtype == tensor.dtype
        assert torch.equal(
            result.tensors[name].reshape(-1).view(torch.uint8),
            tensor.contiguous().reshape(-1).view(torch.uint8),
        ), name
    assert torch.equal(result.tensors["grad"], torch.ones(2))


def test_the_newest_checkpoint_is_the_one_with_the_highest_number_not_folder_name(tmp_path):
    save_checkpoint(tmp_path, 9, "attempt-1/epoch-0009")
    save_checkpoint(tmp_path, 11, "attempt-1/a")
    save_checkpoint(tmp_path, 10, "z")
    save_checkpoint(tmp_path, 12, "b/c/d")
    assert is_checkpoint(checkpoint.newest(tmp_path, KEY, fail_on_warning), 12)
    shutil.rmtree(tmp_path / "b")
    assert is_checkpoint(checkpoint.newest(tmp_path, KEY, fail_on_warning), 11)


def test_checkpoints_of_another_training_are_ignored_without_a_warning(tmp_path):
    save_checkpoint(tmp_path, 1)
    other = save_checkpoint(tmp_path, 2, key="other")
    os.truncate(other / checkpoint.TENSORS_FILE, 5)
    assert is_checkpoint(checkpoint.newest(tmp_path, KEY, fail_on_warning), 1)
    assert checkpoint.newest(tmp_path, "third", fail_on_warning) is None
    checkpoint.prune(tmp_path, KEY)
    assert other.is_dir()


def test_an_empty_or_missing_directory_has_no_checkpoint(tmp_path):
    assert checkpoint.newest(tmp_path, KEY, fail_on_warning) is None
    assert checkpoint.newest(tmp_path / "not there", KEY, fail_on_warning) is None
    checkpoint.prune(tmp_path / "not there", KEY)


@pytest.mark.parametrize("incomplete", [{"number": 1}, {"key": KEY}, {"key": KEY, "number": "1"}])
def test_facts_without_key_and_number_are_not_written(tmp_path, incomplete):
    with pytest.raises(TypeError):
        checkpoint.write(tmp_path / "one", {}, incomplete)


# --------------------------------------------------------------------------------- damaged


def check_fallback(directory: Path, damaged: Path) -> None:
    """The damaged checkpoint is skipped with one warning that names it and the one used."""
    output: list[str] = []
    assert is_checkpoint(checkpoint.newest(directory, KEY, output.append), 1)
    assert len(output) == 1
    assert str(damaged) in output[0]
    assert "Using the one before it" in output[0]
    assert "epoch-0001" in output[0]


@pytest.mark.parametrize("name", [checkpoint.METADATA_FILE, checkpoint.TENSORS_FILE])
def test_a_file_truncated_at_any_length_is_detected(tmp_path, name):
    save_checkpoint(tmp_path, 1)
    damaged = save_checkpoint(tmp_path, 2)
    data = (damaged / name).read_bytes()
    # A missing last line feed changes nothing.
    for length in range(len(data) - (data[-1:] == b"\n")):
        (damaged / name).write_bytes(data[:length])
        check_fallback(tmp_path, damaged)
    (damaged / name).write_bytes(data + b"0")
    check_fallback(tmp_path, damaged)
    (damaged / name).unlink()
    check_fallback(tmp_path, damaged)


@pytest.mark.parametrize("name", [checkpoint.METADATA_FILE, checkpoint.TENSORS_FILE])
def test_a_flipped_bit_anywhere_is_detected(tmp_path, name):
    save_checkpoint(tmp_path, 1)
    damaged = save_checkpoint(tmp_path, 2)
    data = (damaged / name).read_bytes()
    for folder in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[folder] ^= 1 << bit
            (damaged / name).write_bytes(changed)
            output: list[str] = []
            result = checkpoint.newest(tmp_path, KEY, output.append)
            # A bit of whitespace in the metadata may change no value.
            assert (is_checkpoint(result, 1) and len(output) == 1) or (
                is_checkpoint(result, 2) and not output
            )
            if name == checkpoint.TENSORS_FILE:
                assert is_checkpoint(result, 1)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(st.binary(max_size=60) | st.sampled_from([b"[]", b"3", b'"x"', b"null", b'{"format": 2}']))
def test_metadata_with_any_other_content_is_detected(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("place")
    save_checkpoint(folder, 1)
    damaged = save_checkpoint(folder, 2)
    (damaged / checkpoint.METADATA_FILE).write_bytes(content)
    check_fallback(folder, damaged)


def test_if_no_checkpoint_is_complete_each_gets_a_warning_and_none_is_used(tmp_path):
    for number in (1, 2):
        os.truncate(save_checkpoint(tmp_path, number) / checkpoint.TENSORS_FILE, 9)
    output: list[str] = []
    assert checkpoint.newest(tmp_path, KEY, output.append) is None
    assert [("There is no complete one" in one) for one in output] == [True, True]


def test_tensors_swapped_with_another_checkpoint_are_detected(tmp_path):
    first, second = save_checkpoint(tmp_path, 1), save_checkpoint(tmp_path, 2)
    shutil.copyfile(first / checkpoint.TENSORS_FILE, second / checkpoint.TENSORS_FILE)
    check_fallback(tmp_path, second)


# --------------------------------------------------------------------------------- pruning


def checkpoint_names(directory: Path) -> list[str]:
    return sorted(path.parent.name for path in directory.rglob(checkpoint.TENSORS_FILE))


def test_pruning_keeps_the_two_newest_complete_checkpoints(tmp_path):
    for number in range(1, 6):
        save_checkpoint(tmp_path, number, f"attempt-{number % 2}/epoch-{number:04}")
    os.truncate(tmp_path / "attempt-1" / "epoch-0005" / checkpoint.TENSORS_FILE, 40)
    os.truncate(tmp_path / "attempt-1" / "epoch-0003" / checkpoint.METADATA_FILE, 40)
    checkpoint.prune(tmp_path, KEY)
    assert checkpoint_names(tmp_path) == ["epoch-0002", "epoch-0004"]


def test_if_no_checkpoint_is_complete_pruning_removes_only_drafts(tmp_path):
    for number in (1, 2, 3):
        os.truncate(save_checkpoint(tmp_path, number) / checkpoint.TENSORS_FILE, 9)
    checkpoint.write(checkpoint.draft_path(tmp_path), make_tensors(4), make_facts(4))
    checkpoint.prune(tmp_path, KEY)
    assert checkpoint_names(tmp_path) == ["epoch-0001", "epoch-0002", "epoch-0003"]


def test_a_draft_is_not_used_as_a_checkpoint_and_pruning_removes_it(tmp_path):
    save_checkpoint(tmp_path, 1)
    checkpoint.write(checkpoint.draft_path(tmp_path), make_tensors(2), make_facts(2))
    (tmp_path / "attempt-1" / ".epoch-0003.0badcafe.draft").mkdir(parents=True)
    assert is_checkpoint(checkpoint.newest(tmp_path, KEY, fail_on_warning), 1)
    checkpoint.prune(tmp_path, KEY)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "attempt-1",
        checkpoint.METADATA_FILE,
        "epoch-0001",
        checkpoint.TENSORS_FILE,
    ]


def test_pruning_interrupted_after_any_step_keeps_the_newest_checkpoint(tmp_path, monkeypatch):
    """The disk fails at the first, second, … removal; the newest checkpoint stays the same."""
    steps = 0

    class Stopped(Exception):
        pass

    def limit_steps(function):
        def step(*args, **more):
            nonlocal steps
            steps -= 1
            if steps < 0:
                raise Stopped
            return function(*args, **more)

        return step

    finished = False
    stop = 0
    while not finished:
        folder = tmp_path / str(stop)
        for number in range(1, 6):
            save_checkpoint(folder, number)
        steps, stop = stop, stop + 1
        with monkeypatch.context() as patch:
            for owner, name in ((os, "unlink"), (os, "rmdir"), (os, "rename")):
                patch.setattr(owner, name, limit_steps(getattr(os, name)))
            try:
                checkpoint.prune(folder, KEY)
                finished = True
            except Stopped:
                pass
        assert is_checkpoint(checkpoint.newest(folder, KEY, fail_on_warning), 5)
        checkpoint.prune(folder, KEY)
        assert checkpoint_names(folder) == ["epoch-0004", "epoch-0005"]
        assert len(list(folder.iterdir())) == 2
    assert stop > 10


# ----------------------------------------------------------------------------------- kills


def write_for_ever(directory: Path) -> None:
    """Save checkpoints as a trainer in this process does, without end, and print each number."""
    from arrowhead.runtime import launch
    from arrowhead.runtime.worker import Worker

    def stage(worker: Worker) -> None:
        last = checkpoint.newest(directory, KEY, fail_on_warning)
        number = last.number if last else 0
        while True:
            number += 1
            draft = checkpoint.draft_path(directory)
            checkpoint.write(draft, make_tensors(number), make_facts(number))
            # Names repeat, so a new checkpoint replaces an old one.
            worker.save_checkpoint(draft, f"epoch-{number % 3}")
            print(number, flush=True)
            checkpoint.prune(directory, KEY)

    launch.run(stage, checkpoint_dir=directory)


def test_after_a_kill_at_any_moment_the_last_saved_checkpoint_is_complete(tmp_path):
    rng = random.Random(0)
    for _ in range(3):
        command_args = [sys.executable, __file__, str(tmp_path)]
        process = forks.Popen(
            command_args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(0.2 + rng.random() / 2)
        process.kill()
        out, err = process.communicate(timeout=300)
        assert first, err[-4000:]
        last = int((first + out).split()[-1])
        result = checkpoint.newest(tmp_path, KEY, fail_on_warning)
        assert result is not None
        assert result.number in (last, last + 1)
        assert is_checkpoint(result, result.number)


def test_the_metadata_is_readable_json(tmp_path):
    metadata = json.loads((save_checkpoint(tmp_path, 3) / checkpoint.METADATA_FILE).read_text())
    assert metadata["facts"] == make_facts(3)
    assert set(metadata) == {"format", "checkpoint", "facts", "sha256", "seal"}


if __name__ == "__main__":
    write_for_ever(Path(sys.argv[1]))


# --------------------------------------------------------------------- finished trainings


def test_a_finished_training_removes_only_its_own_checkpoints(tmp_path):
    ours = [
        save_checkpoint(tmp_path, 1, key=f"{KEY}:heads"),
        save_checkpoint(tmp_path, 2, "f", key=f"{KEY}:folds"),
    ]
    attempt = save_checkpoint(tmp_path / "attempt-1", 3, key=f"{KEY}:heads")
    (tmp_path / "attempt-1" / "rays-notes.json").write_text("{}")
    others = [
        save_checkpoint(tmp_path, 4, key="other:heads"),
        save_checkpoint(tmp_path / "attempt-2", 5, key="c3"),
    ]
    checkpoint.remove_finished(tmp_path, KEY)
    assert not any(folder.exists() for folder in [*ours, attempt.parent])
    assert all(folder.exists() for folder in others)
    assert is_checkpoint(
        checkpoint.newest(tmp_path, "other:heads", fail_on_warning), 4, "other:heads"
    )
    checkpoint.remove_finished(tmp_path / "absent", KEY)


def test_a_successful_training_keeps_checkpoints_of_other_trainings_of_that_bundle(
    tmp_path, add_mlflow_db, command, monkeypatch
):
    monkeypatch.chdir(add_mlflow_db(tmp_path))
    shutil.copytree(Path(__file__).parent / "written_before" / "store", "store")
    other = save_checkpoint(tmp_path / ".bundle.training", 7, key="another:heads")
    run = other.parent / "run-0123456789ab.json"
    run.write_text("{}")
    command("train", "store", "bundle", "--epochs", 2, "--rate", 0.01)
    assert {one.name for one in other.parent.iterdir()} == {other.name, run.name, ".lock"}
    shutil.rmtree(other)
    run.unlink()
    command("train", "store", "bundle", "--epochs", 2, "--rate", 0.01)
    assert not other.parent.exists()  # removed when no unfinished training is left


def test_a_full_disk_while_the_bundle_is_saved_is_reported_and_the_next_run_resumes(
    tmp_path, add_mlflow_db, command, monkeypatch
):
    """RLIMIT_FSIZE stands in for the full disk: the bundle's weights (1.5 MB) do not fit."""
    monkeypatch.chdir(add_mlflow_db(tmp_path))
    shutil.copytree(Path(__file__).parent / "written_before" / "store", "store")
    command_args = ["train", "store", "bundle", "--epochs", "2", "--rate", "0.01"]
    code = (
        "import resource, sys\n"
        "from arrowhead.cli.main import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_300_000, resource.RLIM_INFINITY))\n"
        "main(sys.argv[1:])\n"
    )
    completed = forks.run(
        [sys.executable, "-c", code, *command_args], capture_output=True, text=True, check=False
    )
    assert completed.returncode == 2, completed.stderr
    assert "cannot be written: File too large." in completed.stderr
    assert "Traceback" not in completed.stderr
    assert not list(tmp_path.rglob("*.draft")) and not Path("bundle").exists()
    command(*command_args)
    assert "going on from the checkpoint" in " ".join(command.stderr.split())
    assert {one.name for one in tmp_path.glob(".bundle*")} == set()
