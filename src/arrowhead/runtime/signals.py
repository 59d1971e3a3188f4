"""How a command is told to end from outside, and what its output does when nobody takes it.

    stops          SIGTERM and SIGHUP interrupt like Ctrl-C, while the block lasts
    deferred       none of them inside a step that must not be left half done
    kept           a library sets none of its own
    handled        the interrupt was caught on purpose
    ends           the command is over: from here on each ends the process at once
    lossy_output   a closed pipe or a full disk under the log costs the log, not the work

Kubernetes, SLURM, systemd and Ray's `jobs stop` send SIGTERM and wait some seconds before they
kill; a terminal that goes away sends SIGHUP, which `nohup` has set to be ignored.

Python raises an interrupt between any two instructions of the main thread. Two places are wrong:
where a lock has been taken and nothing releases it yet (in `logging`, it would stop every thread),
and where the exception goes nowhere (a finalizer, `__del__`, a callback from C). In the first the
interrupt waits a moment; after the second it is raised again.
"""

from __future__ import annotations

import _thread
import contextlib
import errno
import io
import math
import os
import signal
import sys
import threading
import weakref
from collections.abc import Iterator
from time import monotonic, sleep
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

SAME_SECONDS = 1.0  # `timeout`, systemd and others send two signals for one request to end
INTERRUPTED = 130  # exit code
USUAL = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
}
STOPPING = tuple(USUAL)
ALARM_SECONDS = 0.5
RETRY_SECONDS = 0.01
MAX_WAIT_SECONDS = 2.0  # for code that holds a lock: it may itself wait for a pipe that is full
# Modules whose functions take locks for themselves, but for the calls that wait for something else.
LOCKING_MODULES = ("logging", "threading", "weakref", "importlib._bootstrap", "queue")
WAITING_CALLS = ("wait", "wait_for", "join", "_wait_for_tstate_lock", "get", "put")


class Interrupted(KeyboardInterrupt):
    """The process was told to end by a signal; its text is the signal's name."""


class _State:
    """Signals that came while the block of `stops` lasts."""

    def __init__(self) -> None:
        self.active = False
        self.first: float | None = None  # when the first SIGTERM or SIGHUP came
        self.deferred = 0  # depth of `deferred` blocks
        self.waiting: int | None = None  # the signal that came inside one
        self.deferred_until = 0.0  # when it interrupts all the same
        self.again = False  # the next signal is our own, for one that came before
        self.tries_until = 0.0  # from then on, the interrupt is raised wherever the thread is


_state = _State()


@contextlib.contextmanager
def stops() -> Iterator[None]:
    """SIGTERM, SIGHUP and Ctrl-C raise Interrupted in the main thread, while the block lasts.

    A second SIGTERM or SIGHUP, a second or more after the first, ends the process at once with
    exit code 130. A signal that is ignored when the block begins stays ignored. Does nothing
    outside the main thread, which alone may handle signals.
    """
    global _state
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _state = _State()
    _state.active = True
    before = {}
    for number, usual in USUAL.items():
        if signal.getsignal(number) is usual:
            before[number] = signal.signal(number, _interrupt)
    show_unraisable = sys.unraisablehook

    def unraisable(lost: sys.UnraisableHookArgs) -> None:
        if not isinstance(lost.exc_value, Interrupted):  # which is raised again
            show_unraisable(lost)

    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        _state.active = False
        sys.unraisablehook = show_unraisable
        for number, handler in before.items():
            signal.signal(number, handler)


def handled() -> None:
    """The interrupt has been caught and the command ends: it is not raised again."""
    _state.active = False


def _interrupt(number: int, frame: FrameType | None) -> None:
    ours, _state.again = _state.again, False
    if not ours:
        if number != signal.SIGINT:  # pressed twice, Ctrl-C interrupts twice, as everywhere
            if _state.first is not None:
                if monotonic() - _state.first > SAME_SECONDS:
                    os._exit(INTERRUPTED)
                return
            _state.first = monotonic()
        _state.tries_until = monotonic() + MAX_WAIT_SECONDS
    if _state.deferred and (left := _state.deferred_until - monotonic()) > 0:
        _state.waiting = number
        if not ours and left < math.inf:
            _thread.start_new_thread(_send_late, (_state, number, left))
    elif _holds_a_lock(frame) and monotonic() < _state.tries_until:
        _thread.start_new_thread(_send_again, (_state, number, None))
    else:
        _raise(number)


def _raise(number: int) -> None:
    _state.waiting = None
    interrupted = Interrupted(signal.Signals(number).name)
    seen = weakref.ref(interrupted)
    # Not a threading.Thread, whose start takes locks that the interrupted code may hold.
    _thread.start_new_thread(_send_again, (_state, number, seen))
    try:
        raise interrupted
    finally:
        del interrupted  # this frame is in its traceback: it would never be freed


def _holds_a_lock(frame: FrameType | None) -> bool:
    if frame is None:
        return False
    name = frame.f_globals.get("__name__") or ""
    locking = name.partition(".")[0] == "logging" or name in LOCKING_MODULES
    return locking and frame.f_code.co_name not in WAITING_CALLS


def _send_again(state: _State, number: int, seen: weakref.ref[Interrupted] | None) -> None:
    """In a thread: interrupt the main thread once more, soon, or when the interrupt is no more.

    While an interrupt ends its command, through every `finally` and `except`, somebody holds it.
    Where it has been freed and the command still runs, it was swallowed.
    """
    sleep(RETRY_SECONDS)
    while seen is not None and seen() is not None and state.active:
        sleep(RETRY_SECONDS)
    if state.active and state is _state:
        state.again = True
        signal.pthread_kill(threading.main_thread().ident or 0, number)


def _send_late(state: _State, number: int, seconds: float) -> None:
    """In a thread: interrupt a `deferred` block that is not over after so many seconds."""
    sleep(seconds + RETRY_SECONDS)
    if state.active and state is _state and state.waiting:
        state.again = True
        signal.pthread_kill(threading.main_thread().ident or 0, number)


@contextlib.contextmanager
def deferred(seconds: float = math.inf) -> Iterator[None]:
    """A short step that is done whole: a signal that comes inside interrupts at its end, or when
    the step has lasted for so many seconds.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = _state.deferred_until
    _state.deferred_until = max(before, monotonic() + seconds)
    _state.deferred += 1
    try:
        yield
    finally:
        _state.deferred -= 1
        _state.deferred_until = before
    if not _state.deferred and _state.waiting:
        _raise(_state.waiting)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Keeps this process's handlers through code that sets others, such as `ray.init`.

    Ray's C++ puts one of its own over that of SIGTERM. Until it is taken off again, a SIGTERM sets
    an alarm that aborts the process after three seconds: it is cancelled.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual, over = signal.signal, threading.Event()

    def other(number: int, handler: Any) -> Any:
        return signal.getsignal(number) if number in STOPPING else usual(number, handler)

    def no_alarm() -> None:
        while not over.wait(ALARM_SECONDS):
            signal.alarm(0)

    if _state.active:
        threading.Thread(target=no_alarm, daemon=True).start()
    signal.signal = other  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = usual
        for number in STOPPING:
            if (handler := signal.getsignal(number)) is not None:
                signal.signal(number, handler)
        over.set()
        if _state.active:
            signal.alarm(0)


def ends(code: int) -> None:
    """The command is over, with this exit code: while libraries end theirs, which takes Ray some
    seconds, SIGTERM, SIGHUP and Ctrl-C end the process at once with the same code.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    for number, usual in USUAL.items():
        if signal.getsignal(number) is usual:
            signal.signal(number, lambda *_: os._exit(code))


# ----------------------------------------------------------------------------------- output


class _LossyFile(io.FileIO):
    """A file that takes everything: what the system refuses to write is lost.

    error: the first error that lost something, but that of a reader who has gone: nobody misses it.
    """

    error: OSError | None = None

    def write(self, data: ReadableBuffer, /) -> int:
        """Write, or lose, all of it."""
        try:
            return super().write(data)
        except BlockingIOError:
            raise
        except OSError as error:  # the reader has gone, the disk is full, the terminal is closed
            if error.errno != errno.EPIPE and self.error is None:
                self.error = error
            return len(memoryview(data).cast("B"))


def lossy_output() -> None:
    """Make standard output and standard error lose what cannot be written. Streams that are not the
    process's own (a notebook's, a test's) stay as they are.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__"):
            continue
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
            file = _LossyFile(stream.fileno(), "w", closefd=False)
            made = io.TextIOWrapper(
                io.BufferedWriter(file),
                encoding=stream.encoding,
                errors=stream.errors,
                newline="\n",
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            made.mode = "w"  # type: ignore[misc]  # as Python's own
            setattr(sys, name, made)


def lost() -> OSError | None:
    """The error for which standard output has lost something, None if all of it was taken, or the
    reader had gone. Only after `lossy_output`.
    """
    buffer = getattr(sys.stdout, "buffer", None)
    return getattr(getattr(buffer, "raw", None), "error", None)
