"""A container user without a home directory or user name can run Arrowhead."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
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
def test_a_user_without_a_passwd_entry_gets_a_home_and_a_name():
    environment = {"PATH": os.environ["PATH"]}
    completed = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.splitlines() == [f"{0o700} 54321", "True"]
