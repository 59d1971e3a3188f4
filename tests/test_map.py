"""The plan of the house: which room may import which, and which library has which door."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parents[1] / "src" / "arrowhead"
FLOORS = [
    {
        "environment",
        "fileio",
        "targets",
        "formats",
        "ray_private",
        "signals",
        "object_store",
        "tracking_address",
        "exclusions",
        "wording",
    },
    {
        "files",
        "decode",
        "model",
        "heads",
        "shards",
        "metrics",
        "known_images",
        "novelty",
        "spool",
        "tracking_client",
        "tracking_names",
        "cluster",
        "demo",
        "screen",
    },
    {"layouts", "named_files"},
    {"tables"},
    {
        "plan",
        "scores_io",
        "spreadsheet",
        "guard",
        "descent",
        "calibration",
        "checkpoint",
        "registry",
        "jobs",
        "launch",
    },
    {"extract", "doctor", "tracking"},
    {"bundle", "train", "inventory", "watch"},
    {"score", "golden", "export", "lr_finder", "comparison"},
    {"sweep", "features"},
    {"logistic", "recording", "report", "predict", "evaluate"},
    {"study"},
    {"account", "served"},
    {"pipeline"},
    {"learner", "inference"},
    {"cli_app"},
    {"cli_cluster", "cli_inspect"},
    {"cli"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
DOORS = {
    "nvidia": {"decode"},
    "torchvision": {"model"},
    "pyarrow": {"shards", "scores_io"},
    "mlflow": {
        "tracking",
        "tracking_client",
        "registry",
        "served",
    },  # served: MLflow runs it itself
    "ray": {"cluster", "launch", "jobs", "ray_private"},
    "matplotlib": {"report"},
    "fsspec": {"object_store"},
    "onnx": {"export"},
    "onnxruntime": {"export"},
    "onnxscript": {"export"},
    "cyclopts": {"cli", "cli_app", "cli_cluster", "cli_inspect"},
    "rich": {"screen"},
}
HEAVY = {"torch", "torchvision", "nvidia", "ray", "mlflow", "pyarrow", "matplotlib", "onnx"}


def imports(room: str, *, at_the_top: bool = False) -> set[str]:
    """Dotted names that a room imports; `at_the_top`: only what its own import brings in."""
    tree = ast.parse((HOUSE / f"{room}.py").read_text())
    found = set()
    for node in tree.body if at_the_top else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
    return found


def test_every_room_is_on_the_plan():
    rooms = {path.stem for path in HOUSE.glob("*.py")} - {"__init__", "__main__"}
    assert rooms == set(FLOOR)


def test_the_architecture_page_names_every_room_on_its_floor():
    page = (HOUSE.parents[1] / "docs" / "architecture.md").read_text()
    told = re.findall(r"^\| (\d+) \| `(\w+)` \|", page, re.MULTILINE)
    assert sorted(told) == sorted((str(floor), room) for room, floor in FLOOR.items())


@pytest.mark.parametrize("room", sorted(FLOOR))
def test_a_room_only_imports_from_floors_below(room):
    ours = {name.split(".")[1] for name in imports(room) if name.startswith("arrowhead.")}
    climbing = {other for other in ours & FLOOR.keys() if FLOOR[other] >= FLOOR[room]}
    assert climbing == set()


@pytest.mark.parametrize("library", sorted(DOORS))
def test_a_library_has_one_door(library):
    users = {room for room in FLOOR if library in {name.split(".")[0] for name in imports(room)}}
    assert users == DOORS[library]


@pytest.mark.parametrize("room", sorted(FLOOR.keys() - {"heads", "served"}))
def test_importing_a_room_brings_nothing_heavy(room):
    assert not {name.split(".")[0] for name in imports(room, at_the_top=True)} & HEAVY
