"""Printed text is correct, and printed commands can be pasted into a shell."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from arrowhead.printable import escape_control_chars
from arrowhead.wording import pluralize, shell_command

NAMES = [
    "plain/path-1.0",
    "with space",
    "it's",
    "print(\"a\", 'b')",
    "a'b $HOME `id` \\ !",
    "two\nlines",
    "tab\t and ' and \\",
    "\x1b[31mred",
    "bell\x071",
    "\u202eturned",
    "latin-\udce9",
    "Zürich · 北京",
    "",
    "~/home",
]


def test_nouns_are_plural_for_any_number_but_one():
    assert [pluralize(n, "part") for n in (0, 1, 2)] == ["0 parts", "1 part", "2 parts"]
    assert pluralize(2, "class", "classes") == "2 classes"


@pytest.mark.parametrize("shell", ["bash", "zsh", "ksh"])
def test_printed_command_can_be_pasted_into_a_shell(shell):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    shown = escape_control_chars(shell_command(["printf", r"%s\0", *NAMES]))
    assert shown.isprintable()
    result = subprocess.run([shell, "-c", shown], capture_output=True, check=True).stdout
    assert result.decode(errors="surrogateescape").split("\0")[:-1] == NAMES


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_command_printed_on_a_screen_that_is_not_utf_8_can_be_pasted(encoding):
    words = "from arrowhead.wording import shell_command"
    words += f"; print(shell_command(['printf', r'%s\\0', *{NAMES!a}]))"
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": encoding}
    shown = subprocess.run([sys.executable, "-c", words], capture_output=True, env=env, check=True)
    line = shown.stdout.decode(encoding).encode().decode()
    result = subprocess.run(["bash", "-c", line], capture_output=True, check=True).stdout
    assert result.decode(errors="surrogateescape").split("\0")[:-1] == NAMES


def test_quoting_keeps_words_readable():
    code = "print(read('scores/parts'))"
    assert shell_command(["python", "-c", code]) == f'python -c "{code}"'
