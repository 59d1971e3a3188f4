"""A fork of the server with imported packages behaves like a new `python`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import forks
import psutil
import pytest

PYTHON = [sys.executable, "-c"]


def test_a_fork_is_a_child_with_its_own_folder_environment_words_and_streams(tmp_path):
    code = "import os, sys; print(os.getppid(), os.getcwd(), sys.argv, dict(os.environ), input())"
    own = forks._on_import(os.environ)
    done = forks.run(
        [*PYTHON, code, "a", "b c"],
        cwd=tmp_path,
        env=own | {"ONLY": "é"},
        input="word\n",
        capture_output=True,
        text=True,
    )
    words = ["-c", "a", "b c"]
    assert done.stdout == f"{os.getpid()} {tmp_path} {words} {own | {'ONLY': 'é'}} word\n"
    assert (done.returncode, done.stderr) == (0, "")
    assert Path.cwd() != tmp_path


@pytest.mark.parametrize(
    ("code", "ended", "said"),
    [
        ("import sys; sys.exit(3)", 3, ""),
        ("raise SystemExit('why')", 1, "why\n"),
        ("import atexit, os; atexit.register(os.write, 2, b'last')", 0, "last"),
        ("import os; os._exit(7)", 7, ""),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
    ],
)
def test_a_fork_ends_as_python_does(code, ended, said):
    for run in (forks.run, subprocess.run):
        done = run([*PYTHON, code], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (ended, said)


def test_a_fork_that_fails_shows_where():
    done = forks.run([*PYTHON, "def f(): 1 / 0\nf()"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_a_fork_takes_signals_and_is_interrupted_though_the_server_is_not():
    code = """
import time
try:
    print("ready", flush=True)
    time.sleep(60)
finally:
    print("unwound")
"""
    for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        pipe = subprocess.PIPE
        with forks.Popen([*PYTHON, code], stdout=pipe, stderr=pipe, text=True) as process:
            assert process.stdout.readline() == "ready\n"
            assert process.pid in {child.pid for child in psutil.Process().children()}
            process.send_signal(sent)
            out, _ = process.communicate(timeout=60)
        assert process.returncode == -sent
        assert out == ("unwound\n" if sent == signal.SIGINT else "")


def test_open_files_are_passed_on_under_their_numbers_however_high():
    pipes = [os.pipe() for _ in range(200)]
    code = "import os, sys; [os.write(int(fd), fd.encode()) for fd in sys.argv[1:]]"
    last = [write for _, write in pipes[-6:]]
    forks.run([*PYTHON, code, *map(str, reversed(last))], pass_fds=last)
    for read, write in pipes:
        os.close(write)
        assert os.read(read, 10) == (str(write).encode() if write in last else b"")
        os.close(read)


def test_what_a_new_interpreter_would_read_is_refused_and_decoders_get_one(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('read')\n")
    for other in ({"PYTHONUTF8": "0"}, {"PYTHONPATH": str(tmp_path)}):
        with pytest.raises(AssertionError, match="an interpreter of its own"):
            forks.run([*PYTHON, "pass"], env=os.environ | other)
    pipe = subprocess.PIPE
    with forks.Decoders.Popen([*PYTHON, "pass"], env=os.environ | other, stdout=pipe) as process:
        assert process.communicate()[0] == b"read\n"


def test_a_fork_can_be_interrupted_though_the_tests_ignore_it():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    code = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    try:
        done = forks.run([*PYTHON, code], capture_output=True, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.stdout == "True\n"


def test_the_server_has_only_run_imports():
    code = (
        "import os, sys, threading; import ray, torch; print(len(os.listdir('/proc/self/task')),"
        " threading.active_count(), ray.is_initialized(), torch.cuda.is_initialized())"
    )
    done = forks.run([*PYTHON, code], capture_output=True, text=True)
    assert done.stdout == "1 1 False False\n"
