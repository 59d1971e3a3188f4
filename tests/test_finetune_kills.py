"""Fine-tuning on worker groups, and killed in the middle of an epoch."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from test_kills import finish, kill_victim, our_processes, run, wait_for_no_processes

pytestmark = pytest.mark.slow

FLAGS = ["--weights", "bundled", "--size", "64", "--no-report"]
TRAIN = ["--from", "fit/bundle", "--epochs", "2", "--batch-size", "12", "--rates", "1e-5,3e-5,1e-4"]
TRAIN += ["--checkpoint-seconds", "0", "--no-report", "--ema", "0.9"]


@pytest.fixture(scope="module")
def folder(image_folder, add_mlflow_db, tmp_path_factory) -> Any:
    """A working directory with a bundle to start from, and a fine-tuning of one process."""
    folder = add_mlflow_db(tmp_path_factory.mktemp("group"))
    shutil.copytree(image_folder, folder / "data")
    try:
        finish(run(folder, ["fit", "data", "fit", *FLAGS], ["finetune", "data", "calm", *TRAIN]), 2)
        yield folder
    finally:
        for process in our_processes(folder):
            os.kill(process, signal.SIGKILL)


def until_checkpoint(command: Any, out: Path, number: int) -> None:
    """Until it has saved a checkpoint of this step or a later one."""
    while command.poll() is None:
        folders = (out / ".bundle.training").rglob("finetune-*")
        if any(int(one.name.partition("-")[2]) >= number for one in folders):
            return
        time.sleep(0.02)


def test_killed_between_steps_it_ends_with_the_same_bits(folder):
    words = ["finetune", "data", "killed", *TRAIN]
    for step in (2, 7):
        command = run(folder, words)
        until_checkpoint(command, folder / "killed", step)
        assert kill_victim(command, folder, "driver", random.Random(0))
        command.communicate()
        wait_for_no_processes(folder)
    command = run(folder, words)
    _, err = command.communicate(timeout=600)
    assert command.returncode == 0, err[-4000:]
    assert "steps done before; going on" in err
    body = [(folder / name / "body.safetensors").read_bytes() for name in ("calm", "killed")]
    assert body[0] == body[1]


@pytest.mark.parametrize("batch_norm", ["frozen", "train"])
def test_two_workers_have_the_losses_of_one_even_if_one_is_killed(folder, batch_norm):
    words = [*TRAIN, "--batch-norm", batch_norm]
    (one,) = finish(run(folder, ["finetune", "data", f"one-{batch_norm}", *words]))
    out = folder / f"two-{batch_norm}"
    command = run(folder, ["finetune", "data", out.name, *words, "--workers", "2"])
    until_checkpoint(command, out, 3)
    assert kill_victim(command, folder, "worker", random.Random(0))
    (two,) = finish(command)
    for name in ("train_loss", "valid_loss"):
        assert two["epochs"][0][name] == pytest.approx(one["epochs"][0][name], abs=1e-5)
    assert two["epochs"][1] == pytest.approx(one["epochs"][1], rel=1e-3)
