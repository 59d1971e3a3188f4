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


def tensors(number: int) -> dict[str, torch.Tensor]:
    """What a trainer of that epoch would keep; every number has other bytes."""
    draw = torch.Generator().manual_seed(number)
    weight = torch.randn(3, 5, generator=draw)
    return {"head.weight": weight, "step": torch.tensor(number), "half": weight.half()}


def facts(number: int, key: str = KEY) -> dict[str, object]:
    return {"key": key, "number": number, "run": "r1", "rates": [0.1, number / 3]}


def keep(place: Path, number: int, name: str = "", key: str = KEY) -> Path:
    folder = place / (name or f"epoch-{number:04}")
    checkpoint.write(folder, tensors(number), facts(number, key))
    return folder


def same(found: Checkpoint | None, number: int, key: str = KEY) -> bool:
    """Whether it is the checkpoint of that number, to the last bit."""
    wanted = tensors(number)
    return (
        found is not None
        and (found.number, found.facts) == (number, facts(number, key))
        and found.tensors.keys() == wanted.keys()
        and all(torch.equal(found.tensors[name], wanted[name]) for name in wanted)
        and all(found.tensors[name].dtype == wanted[name].dtype for name in wanted)
    )


def must_be_well(message: str) -> None:
    raise AssertionError(message)


# ----------------------------------------------------------------------- written and found


def test_a_checkpoint_is_read_back_to_the_last_bit(tmp_path):
    odd = {
        "nan": torch.tensor([float("nan"), float("-inf"), -0.0]),
        "view": torch.arange(12).reshape(3, 4).t(),
        "none": torch.empty(0, 7),
        "bf16": torch.tensor(1.5, dtype=torch.bfloat16),
        "rng": torch.get_rng_state(),
    }
    odd["tied"] = odd["view"][0]  # shares memory
    grad = torch.nn.Parameter(torch.ones(2))
    checkpoint.write(tmp_path / "one", {**odd, "grad": grad}, facts(4) | {"shape": (1, 2), 7: "x"})
    result = checkpoint.newest(tmp_path, KEY, must_be_well)
    assert result is not None
    assert result.facts == facts(4) | {"shape": [1, 2], "7": "x"}
    for name, tensor in odd.items():
        assert result.tensors[name].dtype == tensor.dtype
        assert torch.equal(
            result.tensors[name].reshape(-1).view(torch.uint8),
            tensor.contiguous().reshape(-1).view(torch.uint8),
        ), name
    assert torch.equal(result.tensors["grad"], torch.ones(2))


def test_the_highest_number_is_the_newest_whatever_folders_are_called(tmp_path):
    keep(tmp_path, 9, "attempt-1/epoch-0009")
    keep(tmp_path, 11, "attempt-1/a")
    keep(tmp_path, 10, "z")
    keep(tmp_path, 12, "b/c/d")
    assert same(checkpoint.newest(tmp_path, KEY, must_be_well), 12)
    shutil.rmtree(tmp_path / "b")
    assert same(checkpoint.newest(tmp_path, KEY, must_be_well), 11)


def test_another_trainings_checkpoints_are_neither_used_nor_spoken_of(tmp_path):
    keep(tmp_path, 1)
    other = keep(tmp_path, 2, key="other")
    os.truncate(other / checkpoint.TENSORS_FILE, 5)
    assert same(checkpoint.newest(tmp_path, KEY, must_be_well), 1)
    assert checkpoint.newest(tmp_path, "third", must_be_well) is None
    checkpoint.prune(tmp_path, KEY)
    assert other.is_dir()


def test_an_empty_place_or_none_has_no_checkpoint(tmp_path):
    assert checkpoint.newest(tmp_path, KEY, must_be_well) is None
    assert checkpoint.newest(tmp_path / "not there", KEY, must_be_well) is None
    checkpoint.prune(tmp_path / "not there", KEY)


@pytest.mark.parametrize("wrong", [{"number": 1}, {"key": KEY}, {"key": KEY, "number": "1"}])
def test_facts_without_key_and_number_are_not_written(tmp_path, wrong):
    with pytest.raises(TypeError):
        checkpoint.write(tmp_path / "one", {}, wrong)


# ------------------------------------------------------------------------------------ torn


def falls_back(place: Path, bad: Path) -> None:
    """The torn checkpoint is passed over with one warning, which names it and the other."""
    output: list[str] = []
    assert same(checkpoint.newest(place, KEY, output.append), 1)
    assert len(output) == 1
    assert str(bad) in output[0]
    assert "Using the one before it" in output[0]
    assert "epoch-0001" in output[0]


@pytest.mark.parametrize("name", [checkpoint.METADATA_FILE, checkpoint.TENSORS_FILE])
def test_a_file_truncated_at_any_length_is_detected(tmp_path, name):
    keep(tmp_path, 1)
    bad = keep(tmp_path, 2)
    data = (bad / name).read_bytes()
    for length in range(len(data) - (data[-1:] == b"\n")):  # the last line end says nothing
        (bad / name).write_bytes(data[:length])
        falls_back(tmp_path, bad)
    (bad / name).write_bytes(data + b"0")
    falls_back(tmp_path, bad)
    (bad / name).unlink()
    falls_back(tmp_path, bad)


@pytest.mark.parametrize("name", [checkpoint.METADATA_FILE, checkpoint.TENSORS_FILE])
def test_a_flipped_bit_anywhere_is_detected(tmp_path, name):
    keep(tmp_path, 1)
    bad = keep(tmp_path, 2)
    data = (bad / name).read_bytes()
    for folder in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[folder] ^= 1 << bit
            (bad / name).write_bytes(changed)
            output: list[str] = []
            result = checkpoint.newest(tmp_path, KEY, output.append)
            # A bit of the label's layout may change nothing that it says.
            assert (same(result, 1) and len(output) == 1) or (same(result, 2) and not output)
            if name == checkpoint.TENSORS_FILE:
                assert same(result, 1)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(st.binary(max_size=60) | st.sampled_from([b"[]", b"3", b'"x"', b"null", b'{"format": 2}']))
def test_metadata_with_any_other_content_is_detected(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("place")
    keep(folder, 1)
    bad = keep(folder, 2)
    (bad / checkpoint.METADATA_FILE).write_bytes(content)
    falls_back(folder, bad)


def test_without_a_complete_checkpoint_there_is_one_warning_each_and_none_is_used(tmp_path):
    for number in (1, 2):
        os.truncate(keep(tmp_path, number) / checkpoint.TENSORS_FILE, 9)
    output: list[str] = []
    assert checkpoint.newest(tmp_path, KEY, output.append) is None
    assert [("There is no complete one" in one) for one in output] == [True, True]


def test_the_tensors_of_another_checkpoint_are_not_taken_for_its_own(tmp_path):
    first, second = keep(tmp_path, 1), keep(tmp_path, 2)
    shutil.copyfile(first / checkpoint.TENSORS_FILE, second / checkpoint.TENSORS_FILE)
    falls_back(tmp_path, second)


# ---------------------------------------------------------------------------------- pruned


def names(place: Path) -> list[str]:
    return sorted(path.parent.name for path in place.rglob(checkpoint.TENSORS_FILE))


def test_the_two_newest_complete_checkpoints_stay_and_incomplete_ones_do_not_count(tmp_path):
    for number in range(1, 6):
        keep(tmp_path, number, f"attempt-{number % 2}/epoch-{number:04}")
    os.truncate(tmp_path / "attempt-1" / "epoch-0005" / checkpoint.TENSORS_FILE, 40)
    os.truncate(tmp_path / "attempt-1" / "epoch-0003" / checkpoint.METADATA_FILE, 40)
    checkpoint.prune(tmp_path, KEY)
    assert names(tmp_path) == ["epoch-0002", "epoch-0004"]


def test_without_a_complete_checkpoint_only_drafts_are_removed(tmp_path):
    for number in (1, 2, 3):
        os.truncate(keep(tmp_path, number) / checkpoint.TENSORS_FILE, 9)
    checkpoint.write(checkpoint.draft_path(tmp_path), tensors(4), facts(4))
    checkpoint.prune(tmp_path, KEY)
    assert names(tmp_path) == ["epoch-0001", "epoch-0002", "epoch-0003"]


def test_a_draft_is_no_checkpoint_and_is_removed(tmp_path):
    keep(tmp_path, 1)
    checkpoint.write(checkpoint.draft_path(tmp_path), tensors(2), facts(2))
    (tmp_path / "attempt-1" / ".epoch-0003.0badcafe.draft").mkdir(parents=True)
    assert same(checkpoint.newest(tmp_path, KEY, must_be_well), 1)
    checkpoint.prune(tmp_path, KEY)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "attempt-1",
        checkpoint.METADATA_FILE,
        "epoch-0001",
        checkpoint.TENSORS_FILE,
    ]


def test_pruning_stopped_after_any_step_loses_nothing(tmp_path, monkeypatch):
    """The disk fails at the first, second, … removal; what was newest still is."""
    steps = 0

    class Stopped(Exception):
        pass

    def counted(real):
        def step(*args, **more):
            nonlocal steps
            steps -= 1
            if steps < 0:
                raise Stopped
            return real(*args, **more)

        return step

    finished = False
    stop = 0
    while not finished:
        folder = tmp_path / str(stop)
        for number in range(1, 6):
            keep(folder, number)
        steps, stop = stop, stop + 1
        with monkeypatch.context() as patch:
            for owner, name in ((os, "unlink"), (os, "rmdir"), (os, "rename")):
                patch.setattr(owner, name, counted(getattr(os, name)))
            try:
                checkpoint.prune(folder, KEY)
                finished = True
            except Stopped:
                pass
        assert same(checkpoint.newest(folder, KEY, must_be_well), 5)
        checkpoint.prune(folder, KEY)
        assert names(folder) == ["epoch-0004", "epoch-0005"]
        assert len(list(folder.iterdir())) == 2
    assert stop > 10


# ---------------------------------------------------------------------------------- killed


def write_for_ever(place: Path) -> None:
    """Checkpoint after checkpoint, as a trainer in this process keeps them; says each number."""
    from arrowhead.runtime import launch
    from arrowhead.runtime.worker import Worker

    def stage(worker: Worker) -> None:
        last = checkpoint.newest(place, KEY, must_be_well)
        number = last.number if last else 0
        while True:
            number += 1
            draft = checkpoint.draft_path(place)
            checkpoint.write(draft, tensors(number), facts(number))
            worker.save_checkpoint(
                draft, f"epoch-{number % 3}"
            )  # names come again: one replaces another
            print(number, flush=True)
            checkpoint.prune(place, KEY)

    launch.run(stage, checkpoint_dir=place)


def test_after_a_kill_at_any_moment_the_last_one_kept_is_there(tmp_path):
    draw = random.Random(0)
    for _ in range(3):
        words = [sys.executable, __file__, str(tmp_path)]
        process = forks.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(0.2 + draw.random() / 2)
        process.kill()
        out, err = process.communicate(timeout=300)
        assert first, err[-4000:]
        last = int((first + out).split()[-1])
        result = checkpoint.newest(tmp_path, KEY, must_be_well)
        assert result is not None
        assert result.number in (last, last + 1)
        assert same(result, result.number)


def test_a_label_can_be_read_by_people(tmp_path):
    label = json.loads((keep(tmp_path, 3) / checkpoint.METADATA_FILE).read_text())
    assert label["facts"] == facts(3)
    assert set(label) == {"format", "checkpoint", "facts", "sha256", "seal"}


if __name__ == "__main__":
    write_for_ever(Path(sys.argv[1]))


# ------------------------------------------------------------------------------------ done


def test_a_finished_training_removes_only_its_own_checkpoints(tmp_path):
    ours = [keep(tmp_path, 1, key=f"{KEY}:heads"), keep(tmp_path, 2, "f", key=f"{KEY}:folds")]
    attempt = keep(tmp_path / "attempt-1", 3, key=f"{KEY}:heads")
    (tmp_path / "attempt-1" / "rays-notes.json").write_text("{}")
    others = [keep(tmp_path, 4, key="other:heads"), keep(tmp_path / "attempt-2", 5, key="c3")]
    checkpoint.remove_finished(tmp_path, KEY)
    assert not any(folder.exists() for folder in [*ours, attempt.parent])
    assert all(folder.exists() for folder in others)
    assert same(checkpoint.newest(tmp_path, "other:heads", must_be_well), 4, "other:heads")
    checkpoint.remove_finished(tmp_path / "absent", KEY)


def test_a_success_keeps_the_checkpoints_of_other_unfinished_trainings_of_that_bundle(
    tmp_path, tracked, command, monkeypatch
):
    monkeypatch.chdir(tracked(tmp_path))
    shutil.copytree(Path(__file__).parent / "written_before" / "store", "store")
    other = keep(tmp_path / ".bundle.training", 7, key="another:heads")
    run = other.parent / "run-0123456789ab.json"
    run.write_text("{}")
    command("train", "store", "bundle", "--epochs", 2, "--rate", 0.01)
    assert {one.name for one in other.parent.iterdir()} == {other.name, run.name, ".lock"}
    shutil.rmtree(other)
    run.unlink()
    command("train", "store", "bundle", "--epochs", 2, "--rate", 0.01)
    assert not other.parent.exists()  # with nothing unfinished it goes


def test_a_full_disk_while_the_bundle_is_saved_is_reported_and_the_next_run_resumes(
    tmp_path, tracked, command, monkeypatch
):
    """RLIMIT_FSIZE stands in for the full disk: the bundle's weights (1.5 MB) do not fit."""
    monkeypatch.chdir(tracked(tmp_path))
    shutil.copytree(Path(__file__).parent / "written_before" / "store", "store")
    words = ["train", "store", "bundle", "--epochs", "2", "--rate", "0.01"]
    code = (
        "import resource, sys\n"
        "from arrowhead.cli.main import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_300_000, resource.RLIM_INFINITY))\n"
        "main(sys.argv[1:])\n"
    )
    done = forks.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "cannot be written: File too large." in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.draft")) and not Path("bundle").exists()
    command(*words)
    assert "going on from the checkpoint" in " ".join(command.said.split())
    assert {one.name for one in tmp_path.glob(".bundle*")} == set()
