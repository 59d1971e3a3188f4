"""What the README shows runs as it is written there."""

from __future__ import annotations

import hashlib
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from arrowhead import cli, cli_cluster

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, drawn: Path) -> Iterator[Path]:
    """photos, new-photos, and a torch cache whose ResNet34 stands in for the downloaded one: of a
    block where that has three to six, since what it sees matters to nobody here.
    """
    import torch
    from torchvision import models

    place = tmp_path_factory.mktemp("readme")
    shutil.copytree(drawn, place / "photos", ignore=shutil.ignore_patterns("new"))
    shutil.copytree(drawn / "new", place / "new-photos")
    cache = place / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    draft = cache / "draft"
    patch, whole = pytest.MonkeyPatch(), models.resnet._resnet
    patch.setattr(
        models.resnet, "_resnet", lambda block, _, *more, **kw: whole(block, [1] * 4, *more, **kw)
    )
    torch.save(models.resnet34(weights=None).state_dict(), draft)
    digest = hashlib.sha256(draft.read_bytes()).hexdigest()
    cached = draft.rename(cache / f"resnet34-{digest[:8]}.pth")
    entry = models.ResNet34_Weights.DEFAULT.value
    before = entry.url
    object.__setattr__(entry, "url", f"http://127.0.0.1:9/{cached.name}")  # frozen, process-wide
    yield place
    object.__setattr__(entry, "url", before)
    patch.undo()


@pytest.fixture(autouse=True)
def _there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
    monkeypatch.setenv("HF_HOME", str(folder / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "hub"))


def needs_a_cluster(program: str, words: list[str]) -> bool:
    """Whether tests/test_submit.py runs its like; here its files are there and its flags exist."""
    root = Path(__file__).parents[1]
    if program == "cluster/local.sh":
        return (root / program).is_file()
    after = words[words.index("--") + 1 :] if "--" in words else []
    if program == "RAY_AUTH_MODE=token":  # ray job submit … -- python train.py …
        assert after[:2] == ["python", "train.py"]
        own = [str(root / "jobs" / word) if word.endswith(".toml") else word for word in after[2:]]
        return cli_cluster.understood(["train", *own]) is not None
    if program == "arrowhead" and words[0] == "submit":
        return cli_cluster.understood(after) is not None
    return program == "arrowhead" and words[0] == "jobs"


def test_the_commands_run_as_written(capsys):
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(commands) == 31
    for command in commands:
        program, *words = shlex.split(command)
        if needs_a_cluster(program, words):
            continue
        if program == "mlflow":  # a server: tests/test_fit.py reads what it would show
            assert Path("mlflow.db").is_file()
            continue
        if program in ("python", "curl"):  # a server and its client: tests/test_serve.py
            assert program == "curl" or (Path(__file__).parents[1] / words[0]).is_file()
            continue
        assert program == "arrowhead"
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == 0, (command, capsys.readouterr().err)
    assert "0 decoded" in capsys.readouterr().out
    assert Path("model.onnx").is_file()


def test_the_python_runs_as_written(capsys):
    """In the order of the page, after the commands."""
    exec(compile("\n".join(blocks("python")), "README.md", "exec"), {})
    shown = capsys.readouterr().out
    assert "epoch  train loss  valid loss  accuracy" in shown
    assert "'path', 'image_id', 'view', 'feature', 'fault'" in shown


def test_make_offers_what_the_readme_names():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    for target in ("demo", "test", "lint", "bench", "clean"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert "make demo" in README.split("## ")[0]
    assert "make test" in README.split("## ")[0]
