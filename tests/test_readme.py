"""What the README shows runs as it is written there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from arrowhead import cli

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, drawn: Path) -> Path:
    """photos, new-photos, and a torch cache whose ResNet34 stands in for the downloaded one."""
    import torch
    from torchvision import models

    place = tmp_path_factory.mktemp("readme")
    shutil.copytree(drawn, place / "photos", ignore=shutil.ignore_patterns("new"))
    shutil.copytree(drawn / "new", place / "new-photos")
    cache = place / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    name = Path(models.ResNet34_Weights.DEFAULT.url).name
    torch.save(models.resnet34(weights=None).state_dict(), cache / name)
    return place


def test_the_commands_run_as_written(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(commands) == 8
    for command in commands:
        program, *words = shlex.split(command)
        if program == "mlflow":  # a server: tests/test_fit.py reads what it would show
            assert Path("mlflow.db").is_file()
            continue
        assert program == "arrowhead"
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == 0, (command, capsys.readouterr().err)
    assert "0 decoded" in capsys.readouterr().out


def test_the_python_runs_as_written(folder):
    """In one process, in the order of the page, after the commands."""
    script = "\n".join(blocks("python"))
    env = os.environ | {"TORCH_HOME": str(folder / "torch")}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "epoch  train loss  valid loss  accuracy" in done.stdout
    assert "'path', 'image_id', 'view', 'feature', 'fault'" in done.stdout


def test_make_offers_what_the_readme_names():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    for target in ("demo", "test", "lint", "bench", "clean"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert "make demo" in README.split("## ")[0]
    assert "make test" in README.split("## ")[0]
