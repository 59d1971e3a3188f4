"""Users of a container without a home, a name or a writable folder get no traceback."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

NOBODY = """
import getpass, os, pathlib, pwd, tempfile
from arrowhead.runtime import environment
os.setgid(54321)
os.setuid(54321)
environment.ensure_home_and_user()
first = pathlib.Path.home()
(first / "cache").mkdir(exist_ok=True)
print(first.stat().st_mode & 0o777, getpass.getuser())
del os.environ["HOME"]
environment.ensure_home_and_user()
print(pathlib.Path.home() == first)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user without a name")
def test_a_user_without_an_entry_gets_a_home_and_a_name_of_its_own():
    clean = {"PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, "-c", NOBODY], env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{0o700} 54321", "True"]
