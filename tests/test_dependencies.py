"""Imported packages are declared, and Ray's private names exist."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

from arrowhead import ConfigError
from arrowhead.runtime import ray_private
from arrowhead.runtime.ray_cluster import check_ray_version

ROOT = Path(__file__).resolve().parents[1]
DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {"arrowhead", "examples", "jobs"} | {path.stem for path in (ROOT / "tests").glob("*.py")}
# Used where they are there (a notebook; a type checker's own names), and nowhere else.
OPTIONAL = {"IPython", "_typeshed"}
# What may import what: the package stands on its own dependencies and on extras that it names.
PLACES = {
    "src": ["s3", "gcs", "onnx"],
    "jobs": [],
    "examples": ["serve"],
    "deploy": ["serve"],
    "bench": ["dev", "onnx"],
    "tests": ["dev", "s3", "onnx", "serve"],
    ".ci": [],
}


def _named(requirements: list[str]) -> set[str]:
    """Names of distributions, as packaging compares them."""
    result = {re.split(r"[\[<>=!~; ]", one)[0] for one in requirements}
    return {re.sub(r"[-_.]+", "-", name).lower() for name in result}


def _imported(place: str) -> Iterator[tuple[str, Path]]:
    for path in sorted((ROOT / place).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((name.name.partition(".")[0], path) for name in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module.partition(".")[0], path


@pytest.mark.parametrize("place", sorted(PLACES))
def test_every_library_that_is_imported_is_declared(place: str) -> None:
    extras = DECLARED["optional-dependencies"]
    declared = _named(DECLARED["dependencies"])
    for extra in PLACES[place]:
        declared |= _named(extras[extra])
    from_where = importlib.metadata.packages_distributions()
    undeclared = {}
    for module, path in _imported(place):
        if module in sys.stdlib_module_names or module in OURS | OPTIONAL:
            continue
        if not _named(from_where.get(module, [module])) & declared:
            undeclared[module] = str(path.relative_to(ROOT))
    assert not undeclared


def test_every_requirement_has_a_lower_bound() -> None:
    every = [*DECLARED["dependencies"], *chain(*DECLARED["optional-dependencies"].values())]
    unbound = [one for one in every if ">=" not in one and not one.startswith("arrowhead[")]
    assert not unbound


# ------------------------------------------------------------------- Ray's private corners


def test_ray_has_the_private_names_that_we_use() -> None:
    assert ray_private.missing_names() == []


def test_a_ray_that_lacks_one_of_them_is_refused_in_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gone = ("ray._private.state", "state.nodes_of_tomorrow", ())
    changed = ("ray._private.services", "find_gcs_addresses", ("of_tomorrow",))
    monkeypatch.setattr(ray_private, "NAMES", (*ray_private.NAMES, gone, changed))
    with pytest.raises(ConfigError, match="nodes_of_tomorrow") as refusal:
        check_ray_version()
    assert "and 1 more" in refusal.value.found
    assert "requirements.lock" in refusal.value.wanted


def test_ray_private_is_the_only_file_that_reaches_into_ray() -> None:
    """By import; attributes of what Ray hands out are in its list too."""
    inside = re.compile(r"ray\.[\w.]*\b_\w+")
    reaching = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{one.name}" for one in node.names]
            reaching |= {path.stem for name in names if inside.match(name)}
    assert reaching == {"ray_private"}
