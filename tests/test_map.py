"""The architecture: which package imports which, who imports a library, how large things are."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "arrowhead"
# From the bottom to the top: a package, or a module beside the packages, imports only from those
# before it.
ORDER = [
    "errors",
    "wording",
    "printable",
    "fileio",
    "output_paths",
    "spreadsheet",
    "arrow_io",
    "data",
    "decode",
    "evaluation",
    "runtime",
    "features",
    "training",
    "tracking",
    "bundle",
    "inference",
    "examine",
    "reporting",
    "commands",
    "demo",
    "doctor",
    "notebook",
    "cli",
]
# The modules that import a library.
DOORS = {
    "nvidia": {"decode.decoder", "decode.headers"},
    "torchvision": {"features.backbone"},
    "pyarrow": {
        "arrow_io",
        "features.catalog_file",
        "features.shard_file",
        "inference.scores_io",
        "training.folds_file",
    },
    "mlflow": {
        "inference.mlflow_model",
        "tracking.client",
        "tracking.registry",
        "tracking.resume",
        "tracking.store",
        "tracking.system_metrics",
    },
    "ray": {
        "runtime.health",
        "runtime.jobs",
        "runtime.meters",
        "runtime.ray_cluster",
        "runtime.ray_private",
        "runtime.ray_train",
    },
    "matplotlib": {"examine.figures"},
    "fsspec": {"data.object_store"},
    "onnx": {"bundle.export"},
    "onnxruntime": {"bundle.export"},
    "onnxscript": {"bundle.export"},
    "cyclopts": {
        "cli.app",
        "cli.artifacts",
        "cli.cluster",
        "cli.demo",
        "cli.inference",
        "cli.main",
        "cli.options",
        "cli.train",
    },
    "rich": {"cli.screen"},
}
HEAVY = {"torch", "torchvision", "nvidia", "ray", "mlflow", "pyarrow", "matplotlib", "onnx"}
# The two that import a heavy library when they are imported: heads are torch modules, and MLflow
# runs the other itself.
IMPORTED_LATE = {"training.heads", "inference.mlflow_model"}
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts): path
    for path in sorted(SOURCE.rglob("*.py"))
    if path.name not in ("__init__.py", "__main__.py")
}
MAX_LINES, MAX_MEDIAN_LINES = 600, 250
MAX_FUNCTION_LINES, MAX_PARAMETERS = 60, 8
# Exceptions, which should become fewer.
LONG_FUNCTIONS: set[str] = set()
MANY_PARAMETERS = {
    "cli.inference.evaluate",
    "cli.train.fit",
    "cli.train.precompute",
    "cli.train.train",
}


def imports(module: str, *, at_the_top: bool = False) -> set[str]:
    """Dotted names that a module imports; `at_the_top`: only what its own import brings in."""
    tree = ast.parse(MODULES[module].read_text())
    result = set()
    for node in tree.body if at_the_top else ast.walk(tree):
        if isinstance(node, ast.Import):
            result |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            result |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
    return result


def ours(module: str, *, at_the_top: bool = False) -> set[str]:
    """The modules of Arrowhead among them."""
    names = imports(module, at_the_top=at_the_top)
    return {name.removeprefix("arrowhead.") for name in names} & MODULES.keys()


def functions(node: ast.AST, name: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function below a node, with the names of what it stands in."""
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, ast.FunctionDef | ast.ClassDef)
        inner = f"{name}.{child.name}" if named else name
        if isinstance(child, ast.FunctionDef):
            yield inner, child
        yield from functions(child, inner)


def test_every_module_is_in_a_package_of_the_order():
    assert {module.partition(".")[0] for module in MODULES} == set(ORDER)


def test_the_architecture_page_names_every_module_in_the_order_of_the_packages():
    page = (SOURCE.parents[1] / "docs" / "architecture.md").read_text()
    result = re.findall(r"^\| `([\w.]+)` \|", page, re.MULTILINE)
    assert sorted(result) == sorted(MODULES)
    packages = [module.partition(".")[0] for module in result]
    assert packages == sorted(packages, key=ORDER.index)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_package_only_imports_from_those_before_it(module):
    package = module.partition(".")[0]
    others = {other.partition(".")[0] for other in ours(module)} - {package}
    assert {one for one in others if ORDER.index(one) > ORDER.index(package)} == set()


def test_no_module_imports_itself_by_way_of_others():
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for other in ours(module):
                visit(other, (*way, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("library", sorted(DOORS))
def test_a_library_has_its_doors_and_no_others(library):
    users = {one for one in MODULES if library in {name.split(".")[0] for name in imports(one)}}
    assert users == DOORS[library]


@pytest.mark.parametrize("module", sorted(MODULES.keys() - IMPORTED_LATE))
def test_importing_a_module_brings_nothing_heavy(module):
    assert not {name.split(".")[0] for name in imports(module, at_the_top=True)} & HEAVY
    assert not ours(module, at_the_top=True) & IMPORTED_LATE


@pytest.mark.parametrize("package", sorted(p.parent.name for p in SOURCE.glob("*/__init__.py")))
def test_a_package_is_a_docstring_and_its_modules(package):
    tree = ast.parse((SOURCE / package / "__init__.py").read_text())
    assert ast.get_docstring(tree) and len(tree.body) == 1


def test_modules_are_short_enough_to_be_read():
    lines = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    assert {module for module, count in lines.items() if count > MAX_LINES} == set()
    assert median(lines.values()) <= MAX_MEDIAN_LINES


def test_functions_are_short_and_take_few_parameters():
    long, many = set(), set()
    trees = [(module, ast.parse(path.read_text())) for module, path in MODULES.items()]
    for name, node in (one for module, tree in trees for one in functions(tree, module)):
        if node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES:
            long.add(name)
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if len([one for one in given if one.arg not in ("self", "cls")]) > MAX_PARAMETERS:
            many.add(name)
    assert long == LONG_FUNCTIONS
    assert many == MANY_PARAMETERS
