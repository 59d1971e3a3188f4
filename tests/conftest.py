"""What tests share: small real JPEGs drawn by the demo, real photos where they lie beside us."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., dict[str, Any]]
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

# Before anything imports torch: tests measure promises, not this machine's core count.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/, valid/ and new/ of drawn JPEGs: 3 classes, 24 images each."""
    from arrowhead import demo

    folder = tmp_path_factory.mktemp("drawn")
    demo.draw(folder, per_class=24)
    return folder


@pytest.fixture(scope="session")
def dogscats() -> Path:
    """600 + 200 real photos of cats and dogs."""
    folder = SHARED / "dogscats"
    if not folder.is_dir():
        pytest.skip("the real photos (../shared/data/dogscats) are not on this machine")
    return folder


@pytest.fixture(scope="session")
def mobilenet() -> list[str]:
    """Flags of a pretrained body."""
    weights = SHARED / "weights" / "mobilenet_v2-coral.safetensors"
    if not weights.is_file():
        pytest.skip("the pretrained weights (../shared/data/weights) are not on this machine")
    half = ["0.5", "0.5", "0.5"]
    flags = ["--body", "mobilenet_v2", "--weights", str(weights)]
    return [*flags, "--mean", *half, "--std", *half]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a verb with --json; its result."""
    from arrowhead import cli

    def run(*words: object, code: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([*map(str, words), "--json"])
        out = capsys.readouterr()
        assert ended.value.code == code, out.err
        return dict(json.loads(out.out.splitlines()[-1]))

    return run
