"""Generate the reference pages: the flags of every command, and the Python API.

    python docs/make_reference.py [FOLDER]

FOLDER/reference/cli.md is made from the command line app, FOLDER/reference/python.md from
signatures and docstrings. FOLDER defaults to docs/. Neither page is committed: `make docs` writes
both, so they are always up to date.
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
MAX_SIGNATURE_CHARS = 80
SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Yields")


def commands() -> str:
    """The page of commands, as Markdown."""
    page = command_line.app.generate_docs(output_format="markdown", recursive=True)
    start, rest = page.split("## Table of Contents", 1)
    page = start + "**Commands**" + rest.split("**Commands**", 1)[1]
    page = re.sub(r"\n {8,}(?=\S)", "\n  ", page)  # else continuation lines are code blocks
    page = re.sub(r"^Example: (.*)$", r"Example: `\1`", page, flags=re.MULTILINE)
    page = page.replace("```console", "```text")
    return page.replace("# arrowhead\n", "# Commands\n", 1)


def python_api() -> str:
    """The page of the Python API, as Markdown."""
    parts = [
        "# Python",
        "Importing `arrowhead` is fast: torch and other large libraries are imported when they are"
        " first used. Settings that you pass as keywords have the names of the"
        " [commands' flags](cli.md), with `_` for `-`.",
    ]
    for cls in CLASSES:
        parts += [f"## {cls.__name__}", signature(cls.__name__, cls), *docstring(cls)]
        for name, member in members(cls):
            parts += [f"### {cls.__name__}.{name}", *describe(cls, name, member)]
    return "\n\n".join(parts) + "\n"


def members(cls: Any) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that the class itself defines, in source order."""
    for name, member in vars(cls).items():
        plain = member.__func__ if isinstance(member, staticmethod | classmethod) else member
        if not name.startswith("_") and (inspect.isfunction(plain) or isinstance(plain, property)):
            yield name, plain


def describe(cls: Any, name: str, member: Any) -> list[str]:
    """Signature and docstring of a method or property."""
    if isinstance(member, property):
        kind = inspect.signature(member.fget).return_annotation
        return [f"```python\n{cls.__name__}.{name}: {kind}\n```", *docstring(member)]
    return [signature(f"{cls.__name__}.{name}", member), *docstring(member)]


def signature(name: str, function: Any) -> str:
    """A code block with the signature, with one line per argument if it is long."""
    sig = inspect.signature(function)
    arguments = list(format_arguments(p for p in sig.parameters.values() if p.name != "self"))
    returns = f" -> {sig.return_annotation}" if isinstance(sig.return_annotation, str) else ""
    returns = returns.removesuffix(" -> None")
    line = f"{name}({', '.join(arguments)}){returns}"
    if len(line) > MAX_SIGNATURE_CHARS and arguments:
        lines = ",\n    ".join(arguments)
        line = f"{name}(\n    {lines},\n){returns}"
    return f"```python\n{line}\n```"


def format_arguments(parameters: Iterator[inspect.Parameter]) -> Iterator[str]:
    """Arguments as in the source, with `*` before the first keyword-only one."""
    has_star = False
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and not has_star:
            has_star = True
            yield "*"
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        yield f"{stars}{p.name}: {p.annotation}{format_default(p.default)}"


def format_default(value: Any) -> str:
    """` = VALUE`, or ` = CLASS()` for a dataclass, which would be long."""
    if value is inspect.Parameter.empty:
        return ""
    return f" = {type(value).__name__}()" if is_dataclass(value) else f" = {value!r}"


def docstring(documented: Any) -> list[str]:
    """A docstring as Markdown paragraphs; sections in Google style become lists."""
    blocks = (inspect.getdoc(documented) or "").replace("<", "&lt;").split("\n\n")
    return [section(block) for block in blocks]


def section(block: str) -> str:
    """A paragraph unchanged, or a section such as `Args:` as a list."""
    title, _, lines = block.partition("\n")
    if title.rstrip(":") not in SECTIONS or not title.endswith(":"):
        return block
    text = textwrap.dedent(lines)
    items = [text] if title in ("Returns:", "Yields:") else re.split(r"\n(?=\S)", text)
    entries = [re.sub(r"^([\w*.]+):", r"`\1`:", " ".join(item.split())) for item in items]
    return f"**{title.rstrip(':')}**\n\n" + "\n".join(f"- {entry}" for entry in entries)


def main(folder: Path) -> None:
    """Write both pages below `folder`."""
    reference = folder / "reference"
    reference.mkdir(parents=True, exist_ok=True)
    (reference / "cli.md").write_text(commands())
    (reference / "python.md").write_text(python_api())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
