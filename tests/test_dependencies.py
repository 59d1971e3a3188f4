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
# Used only if present: in a notebook, or by a type checker.
OPTIONAL = {"IPython", "_typeshed"}
# The extras whose packages each folder may import besides the dependencies.
EXTRAS_BY_FOLDER = {
    "src": ["s3", "gcs", "onnx", "openvino", "hub"],
    "jobs": [],
    "examples": ["serve"],
    "deploy": ["serve"],
    "bench": ["dev", "onnx", "openvino"],
    "tests": ["dev", "s3", "onnx", "openvino", "hub", "serve"],
    ".ci": [],
}


def _normalized_names(requirements: list[str]) -> set[str]:
    """Normalized names of distributions."""
    result = {re.split(r"[\[<>=!~; ]", item)[0] for item in requirements}
    return {re.sub(r"[-_.]+", "-", name).lower() for name in result}


def _imported_modules(folder: str) -> Iterator[tuple[str, Path]]:
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((name.name.partition(".")[0], path) for name in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module.partition(".")[0], path


@pytest.mark.parametrize("folder", sorted(EXTRAS_BY_FOLDER))
def test_every_imported_library_is_a_declared_dependency(folder: str) -> None:
    extras = DECLARED["optional-dependencies"]
    declared = _normalized_names(DECLARED["dependencies"])
    for extra in EXTRAS_BY_FOLDER[folder]:
        declared |= _normalized_names(extras[extra])
    distributions = importlib.metadata.packages_distributions()
    undeclared = {}
    for module, path in _imported_modules(folder):
        if module in sys.stdlib_module_names or module in OURS | OPTIONAL:
            continue
        if not _normalized_names(distributions.get(module, [module])) & declared:
            undeclared[module] = str(path.relative_to(ROOT))
    assert not undeclared


def test_every_requirement_has_a_lower_bound() -> None:
    requirements = [*DECLARED["dependencies"], *chain(*DECLARED["optional-dependencies"].values())]
    unbounded = [
        item for item in requirements if ">=" not in item and not item.startswith("arrowhead[")
    ]
    assert not unbounded


# ---------------------------------------------------------------------- Ray's private names


def test_ray_has_the_private_names_that_arrowhead_uses() -> None:
    assert ray_private.missing_names() == []


def test_a_ray_without_one_of_the_private_names_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    removed = ("ray._private.state", "state.nodes_of_tomorrow", ())
    changed = ("ray._private.services", "find_gcs_addresses", ("of_tomorrow",))
    monkeypatch.setattr(ray_private, "NAMES", (*ray_private.NAMES, removed, changed))
    with pytest.raises(ConfigError, match="nodes_of_tomorrow") as refusal:
        check_ray_version()
    assert "and 1 more" in refusal.value.found
    assert "requirements.lock" in refusal.value.wanted


def test_only_ray_private_imports_private_names_of_ray() -> None:
    """This searches imports; ray_private.NAMES also lists attributes of objects."""
    private = re.compile(r"ray\.[\w.]*\b_\w+")
    modules = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [item.name for item in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{item.name}" for item in node.names]
            modules |= {path.stem for name in names if private.match(name)}
    assert modules == {"ray_private"}
