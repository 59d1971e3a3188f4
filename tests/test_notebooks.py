"""The notebooks in examples/: they run, and their committed outputs are complete and small."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
MAX_BYTES, MAX_PICTURE_BYTES = 250_000, 60_000
ABSOLUTE_PATH = re.compile(
    r"(?<![\w.:/])/(tmp|home|root|work|usr|var|opt|mnt|Users|builds)/|[A-Z]:\\"
)

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read_cells(path: Path, kind: str = "code") -> list[dict[str, Any]]:
    cells = json.loads(path.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == kind]


def read_pictures(path: Path) -> list[str]:
    data = [output.get("data", {}) for cell in read_cells(path) for output in cell["outputs"]]
    return [text for one in data for kind, text in one.items() if kind.startswith("image/")]


def output_kinds(path: Path) -> list[list[str]]:
    """What each code cell gives: printed text, pictures, values."""
    return [[output["output_type"] for output in cell["outputs"]] for cell in read_cells(path)]


def test_the_notebooks_of_the_guides_are_there():
    names = [path.stem for path in NOTEBOOKS]
    assert names == ["clean_labels", "learning_rate", "lesson", "resnet_from_scratch"]
    guide = (ROOT / "docs/guides/python.md").read_text()
    assert [name for name in names if f"examples/{name}.ipynb" not in guide] == []


@each_notebook
def test_committed_outputs_are_complete_and_in_order(path):
    cells = read_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = list(chain(*output_kinds(path)))
    assert kinds
    assert "error" not in kinds
    printed = [output.get("name") for cell in cells for output in cell["outputs"]]
    assert "stderr" not in printed  # warnings


@each_notebook
def test_notebooks_and_their_pictures_are_small(path):
    assert path.stat().st_size < MAX_BYTES
    assert max(map(len, read_pictures(path)), default=0) < MAX_PICTURE_BYTES


@each_notebook
def test_notebooks_hold_no_path_time_or_version_of_a_machine(path):
    text = path.read_text()
    for picture in read_pictures(path):
        text = text.replace(json.dumps(picture), '""')
    assert ABSOLUTE_PATH.findall(text) == []
    notebook = json.loads(text)
    assert [cell["metadata"] for cell in notebook["cells"] if cell["metadata"]] == []
    assert notebook["metadata"]["language_info"] == {"name": "python"}


@each_notebook
def test_links_in_notebooks_lead_to_files(path):
    text = "".join(line for cell in read_cells(path, "markdown") for line in cell["source"])
    targets = [one for one in re.findall(r"\]\(([^)]+)\)", text) if "://" not in one]
    assert [target for target in targets if not (path.parent / target).exists()] == []


def test_the_resnet_has_at_most_60_lines():
    cells = [
        "".join(cell["source"]) for cell in read_cells(ROOT / "examples/resnet_from_scratch.ipynb")
    ]
    classes = [cell for cell in cells if "(nn.Module)" in cell]
    lines = [line for line in "\n".join(classes).splitlines() if line.strip()]
    assert 0 < len(lines) <= 60
    assert "torchvision.models" not in "\n".join(classes)


@pytest.mark.slow
@each_notebook
def test_notebooks_run_and_give_what_is_committed(path, tmp_path):
    command = [sys.executable, ROOT / "docs/make_notebooks.py", "--out", tmp_path, path.stem]
    completed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    executed = tmp_path / path.name
    sources = [cell["source"] for cell in read_cells(path)]
    assert [cell["source"] for cell in read_cells(executed)] == sources
    assert output_kinds(executed) == output_kinds(path)
    assert executed.stat().st_size < MAX_BYTES
