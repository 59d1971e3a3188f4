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
def folder(tmp_path: Path, tracked: Callable[[Path], Path]) -> Path:
    return tracked(tmp_path)


def begin(folder: Path, *words: object, **pipes: Any) -> subprocess.Popen[str]:
    there = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | pipes
    clean = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    words = (*ARROWHEAD, *map(str, words))
    return forks.Popen(words, cwd=folder, env=clean, text=True, **there)


def wait_for(process: subprocess.Popen[str], there: Callable[[], object]) -> None:
    while process.poll() is None and not there():
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


def test_a_terminated_extraction_is_killed_in_mlflow_and_the_same_command_resumes(folder, drawn):
    words = ["fit", drawn, "out", *SLOW, "--epochs", "2", "--rate", "0.01"]
    cut = begin(folder, *words)
    wait_for(cut, lambda: list((folder / "out/store/shards").glob("*.arrow")))
    helpers = children(cut.pid)
    assert helpers
    cut.send_signal(signal.SIGTERM)
    _, output = cut.communicate(timeout=60)
    assert cut.returncode == 130
    assert "interrupted by SIGTERM. Run the same command again" in output
    assert "Traceback" not in output
    assert alive(helpers) == []
    left = runs(folder)
    assert {name: status for name, (status, _) in left.items()} == {
        "fit": "KILLED",
        "extract": "KILLED",
    }
    again = begin(folder, *words)
    _, output = again.communicate(timeout=300)
    assert again.returncode == 0, output
    now = runs(folder)
    assert {status for status, _ in now.values()} == {"FINISHED"}
    assert now["fit"][1] == left["fit"][1]


def test_a_training_ends_when_its_terminal_goes_unless_that_is_ignored(folder, drawn, command):
    command("precompute", drawn, folder / "store", *SMALL)
    words = ["train", "store", "b", "--epochs", "20000", "--rate", "0.01"]
    words += ["--checkpoint-seconds", "0"]

    def trains() -> bool:
        return bool(list((folder / ".b.training").glob("heads-*")))

    cut = begin(folder, *words)
    wait_for(cut, trains)
    cut.send_signal(signal.SIGHUP)
    _, output = cut.communicate(timeout=60)
    assert cut.returncode == 130, output
    assert runs(folder)["train"][0] == "KILLED"
    (run_id,) = {run for name, (_, run) in runs(folder).items() if name == "train"} - {None}
    kept = {path.name for path in (folder / ".b.training").glob("heads-*")}
    assert kept
    # As nohup starts it.
    ignore = "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
    ignore += "from arrowhead.cli.main import main; main()"
    on = forks.Popen(
        [sys.executable, "-c", ignore, *words],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    wait_for(on, lambda: {path.name for path in (folder / ".b.training").glob("heads-*")} - kept)
    on.send_signal(signal.SIGHUP)
    kept |= {path.name for path in (folder / ".b.training").glob("heads-*")}
    wait_for(on, lambda: {path.name for path in (folder / ".b.training").glob("heads-*")} - kept)
    on.send_signal(signal.SIGTERM)
    out, output = on.communicate(timeout=60)
    assert on.returncode == 130, output
    assert run_id in out
    assert "done before; going on" in out


PROGRAM = """
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


def told(*waits: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", PROGRAM, *waits]
    result = subprocess.Popen(words, text=True, stdout=subprocess.PIPE)
    assert result.stdout
    assert result.stdout.readline() == "ready\n"
    return result


def test_an_atomic_step_is_finished_before_the_interrupt():
    process = told("0.5", "0")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == "whole\ncaught SIGTERM\nunwound\n"
    assert process.returncode == 0


def test_a_step_that_takes_too_long_is_interrupted_all_the_same():
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
    assert caught(program) == "waited\ncaught SIGTERM\nonce\n"


def test_a_library_that_starts_replaces_no_handler_and_its_alarm_ends_nothing():
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
    assert caught(program) == "caught SIGTERM\n"


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_while_libraries_end_leaves_the_exit_code_and_no_traceback(stop):
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
    words = [sys.executable, "-c", program]
    ended = subprocess.run(words, text=True, capture_output=True, timeout=30)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "written\nending\n", "")


def caught(program: str) -> str:
    """What a program prints that ends by a signal which it sends to itself."""
    words = [sys.executable, "-c", program]
    ended = subprocess.run(words, text=True, capture_output=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout


@pytest.mark.parametrize(
    "place",
    [
        "weakref.finalize(thing, stopped)",
        "thing.__class__.__del__ = lambda thing: stopped()",
        "seen = weakref.ref(thing, lambda seen: stopped())",
    ],
)
def test_an_interrupt_that_goes_nowhere_in_a_finalizer_is_raised_again(place):
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
    assert caught(program) == "caught SIGTERM\n"


def test_an_interrupt_that_a_library_swallows_is_raised_again_and_one_that_we_handle_is_not():
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
    assert caught(program) == "caught SIGINT\nwhole\n"


def test_an_interrupt_leaves_no_lock_of_logging_behind():
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
    assert caught(program) == "free\n"


def test_signals_that_come_together_are_one_and_a_later_one_ends_at_once():
    process = told("0.1", "60")
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGHUP)  # as systemd and `timeout` do
    assert process.stdout
    assert process.stdout.readline() == "whole\n"
    assert process.stdout.readline().startswith("caught SIG")
    time.sleep(signals.DUPLICATE_SECONDS + 0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == ""
    assert process.returncode == 130


def test_a_closed_pipe_and_a_full_disk_under_the_log_do_not_stop_the_work(folder, drawn):
    read, write = os.pipe()
    with Path("/dev/full").open("w") as full:
        words = ["precompute", drawn, "store", *SMALL, "--json"]
        work = begin(folder, *words, stdout=write, stderr=full)
        os.close(write)
        os.close(read)
        assert work.wait(timeout=300) == 0
    assert (folder / "store/manifest.json").is_file()
    assert runs(folder)["precompute"][0] == "FINISHED"
