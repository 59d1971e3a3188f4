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


def test_a_fork_is_a_child_with_its_own_directory_environment_arguments_and_streams(tmp_path):
    code = "import os, sys; print(os.getppid(), os.getcwd(), sys.argv, dict(os.environ), input())"
    environment = forks._import_environment(os.environ)
    completed = forks.run(
        [*PYTHON, code, "a", "b c"],
        cwd=tmp_path,
        env=environment | {"ONLY": "é"},
        input="word\n",
        capture_output=True,
        text=True,
    )
    words = ["-c", "a", "b c"]
    assert (
        completed.stdout == f"{os.getpid()} {tmp_path} {words} {environment | {'ONLY': 'é'}} word\n"
    )
    assert (completed.returncode, completed.stderr) == (0, "")
    assert Path.cwd() != tmp_path


@pytest.mark.parametrize(
    ("code", "exit_code", "stderr"),
    [
        ("import sys; sys.exit(3)", 3, ""),
        ("raise SystemExit('why')", 1, "why\n"),
        ("import atexit, os; atexit.register(os.write, 2, b'last')", 0, "last"),
        ("import os; os._exit(7)", 7, ""),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
    ],
)
def test_a_fork_has_the_exit_code_and_output_of_a_new_python(code, exit_code, stderr):
    for run in (forks.run, subprocess.run):
        completed = run([*PYTHON, code], capture_output=True, text=True)
        assert (completed.returncode, completed.stderr) == (exit_code, stderr)


def test_a_fork_that_fails_prints_its_traceback():
    completed = forks.run([*PYTHON, "def f(): 1 / 0\nf()"], capture_output=True, text=True)
    assert completed.returncode == 1
    assert completed.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_a_fork_receives_signals_and_ctrl_c_though_the_server_ignores_it():
    code = """
import time
try:
    print("ready", flush=True)
    time.sleep(60)
finally:
    print("unwound")
"""
    for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        pipe = subprocess.PIPE
        with forks.Popen([*PYTHON, code], stdout=pipe, stderr=pipe, text=True) as process:
            assert process.stdout.readline() == "ready\n"
            assert process.pid in {child.pid for child in psutil.Process().children()}
            process.send_signal(sig)
            out, _ = process.communicate(timeout=60)
        assert process.returncode == -sig
        assert out == ("unwound\n" if sig == signal.SIGINT else "")


def test_file_descriptors_are_passed_on_under_their_numbers_however_high():
    pipes = [os.pipe() for _ in range(200)]
    code = "import os, sys; [os.write(int(fd), fd.encode()) for fd in sys.argv[1:]]"
    last = [write for _, write in pipes[-6:]]
    forks.run([*PYTHON, code, *map(str, reversed(last))], pass_fds=last)
    for read, write in pipes:
        os.close(write)
        assert os.read(read, 10) == (str(write).encode() if write in last else b"")
        os.close(read)


def test_variables_read_on_import_are_refused_and_decoders_get_a_new_interpreter():
    other = os.environ | {"PYTHONUTF8": "0"}
    with pytest.raises(AssertionError, match="an interpreter of its own"):
        forks.run([*PYTHON, "pass"], env=other)
    code, pipe = "import sys; print(sys.flags.utf8_mode)", subprocess.PIPE
    with forks.Decoders.Popen([*PYTHON, code], env=other, stdout=pipe) as process:
        assert process.communicate()[0] == b"0\n"


def test_a_fork_runs_the_sitecustomize_on_its_path_first(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; print(sys.argv)\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [*PYTHON, "print('main')", "a"]
    completed = forks.run(command, env=environment, capture_output=True, text=True)
    assert completed.stdout == "['-c', 'a']\nmain\n"


def test_a_fork_handles_ctrl_c_though_the_tests_ignore_it():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    code = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    try:
        completed = forks.run([*PYTHON, code], capture_output=True, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert completed.stdout == "True\n"


def test_the_server_starts_no_threads_and_neither_ray_nor_cuda():
    code = (
        "import os, sys, threading; import ray, torch; print(len(os.listdir('/proc/self/task')),"
        " threading.active_count(), ray.is_initialized(), torch.cuda.is_initialized())"
    )
    completed = forks.run([*PYTHON, code], capture_output=True, text=True)
    assert completed.stdout == "1 1 False False\n"
