"""Screens: no file name can control a terminal, and no encoding ends a command."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from arrowhead import printable
from arrowhead.cli import screen as cli_screen
from arrowhead.cli.screen import Screen
from arrowhead.printable import escape_control_chars

ASCII_ENV = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
LATIN_1_ENV = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "latin-1"}


def arrowhead(
    *words: str | bytes, cwd: Path, **variables: str
) -> subprocess.CompletedProcess[bytes]:
    """Run a command in its own process, with its output as bytes."""
    return subprocess.run(
        [sys.executable, "-m", "arrowhead", *words],
        capture_output=True,
        cwd=cwd,
        env=os.environ | variables,
        check=False,
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mred", "a\\x1b[31mred"),
        ("title\x1b]0;x\x07", "title\\x1b]0;x\\x07"),
        ("two\nlines\r", "two\\x0alines\\x0d"),
        ("C1 \x9b31m", "C1 \\x9b31m"),
        ("evil\u202egpj.exe", "evil\\u202egpj.exe"),
        ("\u2066isolate\u2069", "\\u2066isolate\\u2069"),
        ("byte \udcff", "byte \\xff"),
        ("line\u2028separator", "line\\u2028separator"),
        ("fine: ñ 猫 👩\u200d🔬 · ×", "fine: ñ 猫 👩\u200d🔬 · ×"),
    ],
)
def test_control_characters_are_escaped_and_others_kept(capsys, text, shown):
    assert escape_control_chars(text) == shown
    Screen(to_stderr=False).print(text)
    assert (
        capsys.readouterr()
        .out.rstrip("\n")
        .replace("        ", " ")
        .startswith(shown.split("\t")[0])
    )


def test_every_symbol_in_messages_has_an_ascii_form():
    package = Path(cli_screen.__file__).parents[1]
    symbols = {c for file in package.rglob("*.py") for c in file.read_text("utf-8") if c > "\x7e"}
    assert "█" in symbols
    assert {
        c for c in symbols if "\\" in c.encode("ascii", printable.ENCODING_ERRORS).decode()
    } == set()


@pytest.mark.parametrize("variables", [ASCII_ENV, LATIN_1_ENV], ids=["ascii", "latin-1"])
def test_help_and_refusals_print_on_screens_that_are_not_utf_8(tmp_path, variables):
    encoding = variables["PYTHONIOENCODING"]
    for words in (["--help"], ["fit", "--help"], ["score", "--help"], ["submit", "--help"]):
        completed = arrowhead(*words, cwd=tmp_path, **variables)
        assert completed.returncode == 0, completed.stderr
        assert "Usage: arrowhead" in completed.stdout.decode(encoding)
    completed = arrowhead("fit", "no-…-where-猫", "out", cwd=tmp_path, **variables)
    assert completed.returncode == 2
    result, expected, do = completed.stderr.decode(encoding).splitlines()[-3:]
    assert result.startswith("arrowhead: ") and "where-" in result
    assert expected.startswith("  wanted  ") and do.startswith("  do      ")


def test_undecodable_path_is_refused_on_any_screen(tmp_path):
    for variables in (ASCII_ENV, {"PYTHONUTF8": "1"}):
        done = arrowhead("features", "info", b"caf\xe9", cwd=tmp_path, **variables)
        assert done.returncode == 2, done.stderr
        assert b"caf\\xe9" in done.stderr


def test_command_with_many_symbols_succeeds_on_an_ascii_screen(tmp_path, make_bundle):
    bundle = make_bundle()
    done = arrowhead("bundle", "info", str(bundle), cwd=tmp_path, **ASCII_ENV)
    assert done.returncode == 0, done.stderr
    assert b"3 classes - " in done.stdout
    done = arrowhead("bundle", "info", str(bundle), "--json", cwd=tmp_path, **ASCII_ENV)
    assert json.loads(done.stdout)["classes"] == ["baskets", "beads", "leaves"]


def test_progress_is_drawn_on_an_ascii_terminal(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii", errors="arrowhead.plain")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("FORCE_COLOR", "1")
    screen = Screen(to_stderr=False)
    with screen.bar("extract \x1b[2J", 4) as advance:
        advance(4, 1, "decode")
    stream.flush()
    shown = stream.buffer.getvalue()  # type: ignore[attr-defined]
    assert b"\\x1b[2J" in shown and b"4/4" in shown


def test_transient_line_is_overwritten_and_only_shown_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for terminal in (True, False):
        shown = io.StringIO()
        one = Screen(to_stderr=False)
        one.console = Console(file=shown, force_terminal=terminal, highlight=False, width=20)
        one.print_status("epoch 1 " + "x" * 40)
        one.print_status("too soon to be drawn")
        one.print("epoch 2")
        one.print("done")
        if not terminal:
            assert shown.getvalue() == "epoch 2\ndone\n"
            continue
        first, erase, remainder = shown.getvalue().partition("\r\x1b[2K")
        assert first.startswith("epoch 1 ") and len(first) < 20 and "\n" not in first
        assert erase and remainder == "epoch 2\ndone\n"
