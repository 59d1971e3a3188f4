"""What a command imports, how it ends, and what its list of commands reads."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from arrowhead.cli import main as command_line

# Libraries whose import takes more than 0.05 s, and parts of them that do.
HEAVY = [
    "fastapi",
    "fsspec",
    "matplotlib",
    "mlflow",
    "numpy",
    "nvidia.dali",
    "pandas",
    "PIL",
    "pyarrow",
    "ray",
    "scipy",
    "sklearn",
    "sqlalchemy",
    "sympy",
    "timm",
    "torch",
    "torchvision",
]
RUN_AND_LIST_MODULES = """
import atexit, json, pathlib, sys
heavy, sys.argv = json.loads(sys.argv[1]), ["arrowhead", *sys.argv[2:]]
def save():
    imported = [one for one in heavy if one in sys.modules]
    pathlib.Path("modules.json").write_text(json.dumps(imported))
atexit.register(save)
from arrowhead.__main__ import main
main()
"""


def heavy_imports(folder: Path, *words: object) -> set[str]:
    """The heavy modules that a command has imported when it ends, in a process of its own."""
    arguments = [json.dumps(HEAVY), *map(str, words)]
    subprocess.run(
        [sys.executable, "-c", RUN_AND_LIST_MODULES, *arguments],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    return set(json.loads((folder / "modules.json").read_text()))


@pytest.mark.parametrize("words", [["--help"], ["features"], ["jobs", "--help"], ["--version"]])
def test_list_of_commands_imports_no_heavy_module(tmp_path, words):
    assert heavy_imports(tmp_path, *words) == set()


def test_help_of_train_imports_no_heavy_module_but_numpy(tmp_path):
    assert heavy_imports(tmp_path, "train", "--help") <= {"numpy"}


def test_program_writes_everything_before_it_skips_the_teardown(tmp_path):
    script = (
        "import atexit, threading, time, sys\n"
        "from arrowhead.cli import main as cli\n"
        "def command():\n"
        "    atexit.register(lambda: print('at exit'))\n"
        "    threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()\n"
        "    sys.exit(3)\n"
        "cli.main = command\n"
        "from arrowhead.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("thread\nat exit\n", "", 3)


def test_help_in_the_list_of_commands_is_that_of_their_functions():
    source = Path(command_line.__file__).parent
    for name, (target, _) in command_line.COMMANDS.items():
        module, _, function = target.partition(":")
        tree = ast.parse((source / f"{module}.py").read_text("utf-8"))
        found = [one for one in tree.body if getattr(one, "name", "") == function]
        assert found and ast.get_docstring(found[0]), name
    assert all(command_line._docstrings()[target] for target, _ in command_line.COMMANDS.values())
