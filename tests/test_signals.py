"""SIGTERM and SIGHUP end a command like Ctrl-C; a closed output costs only the output."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import pytest

from arrowhead.runtime import signals

SLOW = ["--body", "resnet18", "--weights", "random", "--size", "224", "--extract.chunk-size", "4"]
SMALL = ["--body", "shufflenet_v2_x0_5", "--weights", "random", "--size", "64"]
ARROWHEAD = [sys.executable, "-m", "arrowhead"]


@pytest.fixture
def folder(tmp_path: Path, add_mlflow_db: Callable[[Path], Path]) -> Path:
    return add_mlflow_db(tmp_path)


def start_command(folder: Path, *words: object, **pipes: Any) -> subprocess.Popen[str]:
    there = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | pipes
    environment = {
        name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"
    }
    words = (*ARROWHEAD, *map(str, words))
    return forks.Popen(words, cwd=folder, env=environment, text=True, **there)


def wait_for(process: subprocess.Popen[str], condition: Callable[[], object]) -> None:
    while process.poll() is None and not condition():
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()


def runs(folder: Path) -> dict[str, tuple[str, str]]:
    """Status and id of every run, by name."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("arrowhead")
    result = client.search_runs([experiment.experiment_id])
    return {run.info.run_name: (run.info.status, run.info.run_id) for run in result}


def children(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def alive(pids: list[int]) -> list[int]:
    import psutil

    def runs(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    return [pid for pid in pids if runs(pid)]


@pytest.mark.slow
def test_terminated_extraction_is_killed_in_mlflow_and_resumes(folder, image_folder):
    arguments = ["fit", image_folder, "out", *SLOW, "--epochs", "2", "--rate", "0.01"]
    process = start_command(folder, *arguments)
    wait_for(process, lambda: list((folder / "out/store/shards").glob("*.arrow")))
    helpers = children(process.pid)
    assert helpers
    process.send_signal(signal.SIGTERM)
    _, output = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted by SIGTERM. Run the same command again" in output
    assert "Traceback" not in output
    assert alive(helpers) == []
    runs_after_signal = runs(folder)
    assert {name: status for name, (status, _) in runs_after_signal.items()} == {
        "fit": "KILLED",
        "extract": "KILLED",
    }
    resumed = start_command(folder, *arguments)
    _, output = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, output
    runs_at_end = runs(folder)
    assert {status for status, _ in runs_at_end.values()} == {"FINISHED"}
    assert runs_at_end["fit"][1] == runs_after_signal["fit"][1]


def test_training_ends_on_sighup_unless_it_is_ignored(folder, image_folder, command):
    command("precompute", image_folder, folder / "store", *SMALL)
    arguments = ["train", "store", "b", "--epochs", "20000", "--rate", "0.01"]
    arguments += ["--checkpoint-seconds", "0"]

    def has_checkpoint() -> bool:
        return bool(list((folder / ".b.training").glob("heads-*")))

    process = start_command(folder, *arguments)
    wait_for(process, has_checkpoint)
    process.send_signal(signal.SIGHUP)
    _, output = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert runs(folder)["train"][0] == "KILLED"
    (run_id,) = {run for name, (_, run) in runs(folder).items() if name == "train"} - {None}
    seen_checkpoints = {path.name for path in (folder / ".b.training").glob("heads-*")}
    assert seen_checkpoints
    # as nohup starts it
    ignore = "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
    ignore += "from arrowhead.cli.main import main; main()"
    nohup_process = forks.Popen(
        [sys.executable, "-c", ignore, *arguments],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    wait_for(
        nohup_process,
        lambda: {path.name for path in (folder / ".b.training").glob("heads-*")} - seen_checkpoints,
    )
    nohup_process.send_signal(signal.SIGHUP)
    seen_checkpoints |= {path.name for path in (folder / ".b.training").glob("heads-*")}
    wait_for(
        nohup_process,
        lambda: {path.name for path in (folder / ".b.training").glob("heads-*")} - seen_checkpoints,
    )
    nohup_process.send_signal(signal.SIGTERM)
    out, output = nohup_process.communicate(timeout=60)
    assert nohup_process.returncode == 130, output
    assert run_id in out
    assert "done before; going on" in out


DEFERRED_STEP_PROGRAM = """
import sys, time
from arrowhead.runtime import signals
with signals.interrupt_on_signals():
    try:
        with signals.deferred():
            print("ready", flush=True)
            time.sleep(float(sys.argv[1]))
            print("whole", flush=True)
        time.sleep(60)
    except KeyboardInterrupt as error:
        print(f"caught {error}", flush=True)
        time.sleep(float(sys.argv[2]))
        print("unwound", flush=True)
"""


def start_program(*waits: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", DEFERRED_STEP_PROGRAM, *waits]
    result = subprocess.Popen(argv, text=True, stdout=subprocess.PIPE)
    assert result.stdout
    assert result.stdout.readline() == "ready\n"
    return result


def test_deferred_step_finishes_before_the_interrupt():
    process = start_program("0.5", "0")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == "whole\ncaught SIGTERM\nunwound\n"
    assert process.returncode == 0


def test_deferred_step_is_interrupted_after_its_timeout():
    program = """
import os, signal, time
from arrowhead.runtime import signals
with signals.interrupt_on_signals():
    try:
        with signals.deferred(0.3):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            print("waited")
            time.sleep(60)
    except KeyboardInterrupt as error:
        signals.mark_handled()
        print(f"caught {error}")
    time.sleep(0.5)
    print("once")
"""
    assert run_program(program) == "waited\ncaught SIGTERM\nonce\n"


def test_library_startup_neither_replaces_handlers_nor_ends_the_process_by_alarm():
    program = """
import ctypes, os, signal, sys, time
from arrowhead.runtime import signals
with signals.interrupt_on_signals():
    try:
        with signals.keep_handlers():
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))  # as Ray's Python
            ctypes.CDLL(None).signal(signal.SIGTERM, ctypes.c_void_p(1))  # as its C++
            signal.alarm(1)
            time.sleep(1.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    except KeyboardInterrupt as error:
        print(f"caught {error}")
signal.signal(signal.SIGTERM, signal.SIG_DFL)
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
"""
    assert run_program(program) == "caught SIGTERM\n"


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signal_during_shutdown_keeps_the_exit_code_and_prints_no_traceback(stop):
    program = f"""
import atexit, os, signal, sys, time
from arrowhead.runtime import signals
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
def slow():
    print("ending", flush=True)
    os.kill(os.getpid(), {int(stop)})
    time.sleep(60)
atexit.register(slow)
print("written")
signals.exit_on_signals(130)
sys.exit(130)
"""
    argv = [sys.executable, "-c", program]
    completed = subprocess.run(argv, text=True, capture_output=True, timeout=30)
    assert (completed.returncode, completed.stdout, completed.stderr) == (
        130,
        "written\nending\n",
        "",
    )


def run_program(program: str) -> str:
    """The output of a program that ends by a signal that it sends to itself."""
    argv = [sys.executable, "-c", program]
    completed = subprocess.run(argv, text=True, capture_output=True, timeout=60)
    assert (completed.returncode, completed.stderr) == (0, "")
    return completed.stdout


@pytest.mark.parametrize(
    "place",
    [
        "weakref.finalize(thing, stopped)",
        "thing.__class__.__del__ = lambda thing: stopped()",
        "seen = weakref.ref(thing, lambda seen: stopped())",
    ],
)
def test_interrupt_lost_in_a_finalizer_is_raised_again(place):
    program = f"""
import os, signal, time, weakref
from arrowhead.runtime import signals
class Thing: pass
def stopped():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
with signals.interrupt_on_signals():
    try:
        thing = Thing()
        {place}
        del thing
        time.sleep(60)
    except KeyboardInterrupt as error:
        print(f"caught {{error}}")
"""
    assert run_program(program) == "caught SIGTERM\n"


def test_swallowed_interrupt_is_raised_again_and_a_handled_one_is_not():
    program = """
import os, signal, time
from arrowhead.runtime import signals
with signals.interrupt_on_signals():
    try:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        except BaseException:
            pass
        time.sleep(60)
    except KeyboardInterrupt as error:
        signals.mark_handled()
        print(f"caught {error}")
    time.sleep(0.5)
    print("whole")
"""
    assert run_program(program) == "caught SIGINT\nwhole\n"


def test_interrupt_leaves_no_logging_lock_held():
    program = """
import io, logging, os, random, signal, threading, time
from arrowhead.runtime import signals
log = logging.getLogger("x")
log.propagate = False
log.addHandler(logging.StreamHandler(io.StringIO()))
def stop():
    time.sleep(random.uniform(0.001, 0.004))
    os.kill(os.getpid(), signal.SIGTERM)
for turn in range(100):  # without care, one in forty stops every thread that logs
    try:
        with signals.interrupt_on_signals():
            threading.Thread(target=stop).start()
            while True:
                log.warning("a line")
    except KeyboardInterrupt:
        pass
    other = threading.Thread(target=log.warning, args=("a line",), daemon=True)
    other.start()
    other.join(10)
    assert not other.is_alive(), turn
print("free")
"""
    assert run_program(program) == "free\n"


def test_simultaneous_signals_count_once_and_a_later_one_ends_immediately():
    process = start_program("0.1", "60")
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGHUP)  # as systemd and `timeout` send them
    assert process.stdout
    assert process.stdout.readline() == "whole\n"
    assert process.stdout.readline().startswith("caught SIG")
    time.sleep(signals.DUPLICATE_SECONDS + 0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == ""
    assert process.returncode == 130


def test_closed_stdout_and_full_stderr_do_not_stop_the_work(folder, image_folder):
    read, write = os.pipe()
    with Path("/dev/full").open("w") as full:
        arguments = ["precompute", image_folder, "store", *SMALL, "--json"]
        process = start_command(folder, *arguments, stdout=write, stderr=full)
        os.close(write)
        os.close(read)
        assert process.wait(timeout=300) == 0
    assert (folder / "store/manifest.json").is_file()
    assert runs(folder)["precompute"][0] == "FINISHED"


@pytest.mark.parametrize("module", ["arrowhead.cli.main", "cyclopts", "numpy"])
def test_interrupt_during_the_imports_ends_with_130_and_one_line(module):
    script = (
        "import os, signal, sys\n"
        "class PressCtrlC:\n"
        "    def find_spec(self, name, *args):\n"
        f"        if name == {module!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, PressCtrlC())\n"
        "sys.argv = ['arrowhead', 'train']\n"
        "from arrowhead.__main__ import main; main()\n"
    )
    completed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert completed.returncode == signals.INTERRUPTED_EXIT_CODE
    assert completed.stderr == "\narrowhead: interrupted before the command began.\n"
