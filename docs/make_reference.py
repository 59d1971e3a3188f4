"""Write the reference pages that the code holds: every command's flags, the Python API.

    python docs/make_reference.py [FOLDER]

FOLDER/reference/cli.md comes from the command line app, so from the dataclasses behind the flags;
FOLDER/reference/python.md from signatures and docstrings. FOLDER is docs/ if not given. Neither
page
is committed: `make docs` writes both anew, so that they cannot be stale.
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import arrowhead
from arrowhead.cli import main as command_line
from arrowhead.notebook import Answer, Classifier, DrawnCurve

CLASSES: tuple[Any, ...] = (
    arrowhead.Images,
    arrowhead.Learner,
    Answer,
    Classifier,
    DrawnCurve,
    arrowhead.Refusal,
    arrowhead.ConfigError,
    arrowhead.DataError,
    arrowhead.LostError,
)
WIDTH = 80
SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Yields")


def commands() -> str:
    """The page of the commands, in Markdown."""
    page = command_line.app.generate_docs(output_format="markdown", recursive=True)
    start, rest = page.split("## Table of Contents", 1)
    page = start + "**Commands**" + rest.split("**Commands**", 1)[1]
    page = re.sub(r"\n {8,}(?=\S)", "\n  ", page)  # continued lines, indented as code would be
    page = re.sub(r"^Example: (.*)$", r"Example: `\1`", page, flags=re.MULTILINE)
    page = page.replace("```console", "```text")
    return page.replace("# arrowhead\n", "# Commands\n", 1)


def python() -> str:
    """The page of the Python API, in Markdown."""
    parts = [
        "# Python",
        "Importing `arrowhead` runs nothing heavy: torch and the others are imported when they are"
        " first used. Settings that are given as keywords have the names of the"
        " [commands' flags](cli.md), with `_` for `-`.",
    ]
    for one in CLASSES:
        parts += [f"## {one.__name__}", signature(one.__name__, one), *text(one)]
        for name, trial in trials(one):
            parts += [f"### {one.__name__}.{name}", *described(one, name, trial)]
    return "\n\n".join(parts) + "\n"


def trials(owner: Any) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that the class itself documents, in the order of its source."""
    for name, trial in vars(owner).items():
        plain = trial.__func__ if isinstance(trial, staticmethod | classmethod) else trial
        if not name.startswith("_") and (inspect.isfunction(plain) or isinstance(plain, property)):
            yield name, plain


def described(owner: Any, name: str, trial: Any) -> list[str]:
    """A method or property: how it is called, what its docstring says."""
    if isinstance(trial, property):
        kind = inspect.signature(trial.fget).return_annotation
        return [f"```python\n{owner.__name__}.{name}: {kind}\n```", *text(trial)]
    return [signature(f"{owner.__name__}.{name}", trial), *text(trial)]


def signature(name: str, function: Any) -> str:
    """A block of code with the signature; a long one has a line for each argument."""
    whole = inspect.signature(function)
    arguments = list(listed(one for one in whole.parameters.values() if one.name != "self"))
    returned = f" -> {whole.return_annotation}" if isinstance(whole.return_annotation, str) else ""
    returned = returned.removesuffix(" -> None")
    line = f"{name}({', '.join(arguments)}){returned}"
    if len(line) > WIDTH and arguments:
        shown = ",\n    ".join(arguments)
        line = f"{name}(\n    {shown},\n){returned}"
    return f"```python\n{line}\n```"


def listed(arguments: Iterator[inspect.Parameter]) -> Iterator[str]:
    """Arguments as they are written, with the star before those that are keywords only."""
    starred = False
    for one in arguments:
        if one.kind is one.KEYWORD_ONLY and not starred:
            starred = True
            yield "*"
        stars = {one.VAR_POSITIONAL: "*", one.VAR_KEYWORD: "**"}.get(one.kind, "")
        yield f"{stars}{one.name}: {one.annotation}{default(one.default)}"


def default(value: Any) -> str:
    """` = VALUE`; of settings, which are long, the class alone."""
    if value is inspect.Parameter.empty:
        return ""
    return f" = {type(value).__name__}()" if is_dataclass(value) else f" = {value!r}"


def text(documented: Any) -> list[str]:
    """A docstring as Markdown; the sections of Google's style become lists."""
    blocks = (inspect.getdoc(documented) or "").replace("<", "&lt;").split("\n\n")
    return [section(block) for block in blocks]


def section(block: str) -> str:
    """A paragraph as it is, or `Args:` and the like with one item a line."""
    title, _, lines = block.partition("\n")
    if title.rstrip(":") not in SECTIONS or not title.endswith(":"):
        return block
    text = textwrap.dedent(lines)
    items = [text] if title in ("Returns:", "Yields:") else re.split(r"\n(?=\S)", text)
    shown = [re.sub(r"^([\w*.]+):", r"`\1`:", " ".join(item.split())) for item in items]
    return f"**{title.rstrip(':')}**\n\n" + "\n".join(f"- {item}" for item in shown)


def main(folder: Path) -> None:
    """Write both pages below `folder`."""
    place = folder / "reference"
    place.mkdir(parents=True, exist_ok=True)
    (place / "cli.md").write_text(commands())
    (place / "python.md").write_text(python())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
