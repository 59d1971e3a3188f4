"""Python files in a data folder are never imported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import AddMlflowDb

# Modules that a command, its decoder or a worker of Ray may import.
SHADOWED_MODULES = """
    PIL cloudpickle email fsspec google grpc logging matplotlib mlflow multiprocessing numpy nvidia
    pickle psutil pyarrow random ray safetensors sitecustomize sqlite3 ssl subprocess tempfile torch
    torchvision typing usercustomize yaml
""".split()  # noqa: SIM905 - longer as a list than its program
ARROWHEAD = str(Path(sys.executable).with_name("arrowhead"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "workers"),
    [
        ([ARROWHEAD], "0"),
        ([sys.executable, "-m", "arrowhead"], "0"),
        ([ARROWHEAD], "1"),
    ],
    ids=["here", "as a module", "a worker"],
)
def test_modules_in_the_working_directory_are_not_imported(
    program: list[str], workers: str, image_folder: Path, add_mlflow_db: AddMlflowDb, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    for photo in sorted(image_folder.rglob("train/*/*.jpg"))[::6]:
        (data / photo.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, data / photo.parent.name)
    for name in SHADOWED_MODULES:
        (data / f"{name}.py").write_text(
            f"open({str(tmp_path / 'run')!r}, 'a').write('{name} ')\nraise ImportError('{name}')\n"
        )
    arguments = ["precompute", ".", "../store", "--body", "resnet18", "--weights", "random"]
    arguments += ["--size", "32", "--workers", workers]
    arguments += ["--tracking-uri", f"sqlite:///{add_mlflow_db(tmp_path) / 'mlflow.db'}"]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONSAFEPATH", "PYTHONPATH")}
    completed = subprocess.run(
        [*program, *arguments], cwd=data, env=environment, capture_output=True, text=True
    )
    assert not (tmp_path / "run").exists(), (tmp_path / "run").read_text()
    assert completed.returncode == 0, completed.stderr
    assert (tmp_path / "store" / "manifest.json").is_file()
