"""Signals that ask a command to end, and output that nobody reads.

    interrupt_on_signals   SIGTERM and SIGHUP interrupt like Ctrl-C inside the block
    deferred               none of them interrupts inside a step that must complete
    keep_handlers          a library cannot replace the handlers inside the block
    mark_handled           the interrupt was caught on purpose
    exit_on_signals        the command is over: any further signal ends the process at once
    exit_without_teardown  the command is over: end the process, without freeing its memory
    make_output_lossy      a closed pipe or a full disk under the log loses log lines, not the work

Kubernetes, SLURM, systemd and Ray's `jobs stop` send SIGTERM and kill after some seconds; a closing
terminal sends SIGHUP, which `nohup` ignores.

Python raises an interrupt between any two instructions of the main thread. In two places that goes
wrong: where a lock is held and nothing releases it yet (in `logging`, that would stop every
thread), and where exceptions are swallowed (finalizers, `__del__`, callbacks from C). In the first
case the interrupt waits a moment; in the second it is raised again. Neither Python's own handlers
nor Ray's promise this, and Ray replaces the SIGTERM handler of its driver.
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import ctypes
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

DUPLICATE_SECONDS = 1.0  # `timeout`, systemd and others send two signals for one request
INTERRUPTED_EXIT_CODE = 130
DEFAULT_HANDLERS = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
}
STOP_SIGNALS = tuple(DEFAULT_HANDLERS)
ALARM_SECONDS = 0.5  # between two cancellations of the alarm that Ray sets
RETRY_SECONDS = 0.01
MAX_WAIT_SECONDS = 2.0  # for code that holds a lock: it may itself wait for a full pipe
# Modules whose functions hold locks, except in the calls that wait for something else.
LOCKING_MODULES = ("logging", "threading", "weakref", "importlib._bootstrap", "queue")
WAITING_CALLS = ("wait", "wait_for", "join", "_wait_for_tstate_lock", "get", "put")


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to end; the exception's text is the signal's name."""


class _State:
    """Signals received inside a block of `interrupt_on_signals`."""

    def __init__(self) -> None:
        self.active = False
        self.first: float | None = None  # when the first SIGTERM or SIGHUP came
        self.deferred_depth = 0  # of nested `deferred` blocks
        self.pending: int | None = None  # the signal that came inside one
        self.deferred_until = 0.0  # when it interrupts anyway
        self.resent = False  # the next signal is sent by this module, for an earlier one
        self.wait_until = 0.0  # after this, the interrupt is raised even where a lock is held


_state = _State()


@contextlib.contextmanager
def interrupt_on_signals() -> Iterator[None]:
    """SIGTERM, SIGHUP and Ctrl-C raise Interrupted in the main thread inside this block.

    A second SIGTERM or SIGHUP, at least a second after the first, ends the process at once with
    exit code 130. A signal that is ignored when the block begins stays ignored. Does nothing
    outside the main thread, because only that can handle signals.
    """
    global _state
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _state = _State()
    _state.active = True
    before = {}
    for number, default in DEFAULT_HANDLERS.items():
        if signal.getsignal(number) is default:
            before[number] = signal.signal(number, _interrupt)
    show_unraisable = sys.unraisablehook

    def hide_interrupts(unraisable: sys.UnraisableHookArgs) -> None:
        if not isinstance(unraisable.exc_value, Interrupted):  # which is raised again
            show_unraisable(unraisable)

    sys.unraisablehook = hide_interrupts
    try:
        yield
    finally:
        _state.active = False
        sys.unraisablehook = show_unraisable
        for number, handler in before.items():
            signal.signal(number, handler)


def mark_handled() -> None:
    """Do not raise the interrupt again: it was caught, and the command ends."""
    _state.active = False


def _interrupt(number: int, frame: FrameType | None) -> None:
    """The signal handler: raise Interrupted now, or arrange for it to be raised later."""
    resent, _state.resent = _state.resent, False
    if not resent:
        if number != signal.SIGINT:  # Ctrl-C pressed twice interrupts twice, as everywhere
            if _state.first is not None:
                if monotonic() - _state.first > DUPLICATE_SECONDS:
                    os._exit(INTERRUPTED_EXIT_CODE)
                return
            _state.first = monotonic()
        _state.wait_until = monotonic() + MAX_WAIT_SECONDS
    if _state.deferred_depth and (left := _state.deferred_until - monotonic()) > 0:
        _state.pending = number
        if not resent and left < math.inf:
            _thread.start_new_thread(_resend_after, (_state, number, left))
    elif _holds_a_lock(frame) and monotonic() < _state.wait_until:
        _thread.start_new_thread(_resend, (_state, number, None))
    else:
        _raise(number)


def _raise(number: int) -> None:
    """Raise Interrupted, and again if something swallows it."""
    _state.pending = None
    interrupted = Interrupted(signal.Signals(number).name)
    reference = weakref.ref(interrupted)
    # Not a threading.Thread: its start takes locks that the interrupted code may hold.
    _thread.start_new_thread(_resend, (_state, number, reference))
    try:
        raise interrupted
    finally:
        del interrupted  # this frame is in its traceback: it would never be freed


def _holds_a_lock(frame: FrameType | None) -> bool:
    """Whether the interrupted code may hold a lock of Python's own modules."""
    if frame is None:
        return False
    name = frame.f_globals.get("__name__") or ""
    locking = name.partition(".")[0] == "logging" or name in LOCKING_MODULES
    return locking and frame.f_code.co_name not in WAITING_CALLS


def _resend(state: _State, number: int, reference: weakref.ref[Interrupted] | None) -> None:
    """In a thread: interrupt the main thread again, soon or once the exception has been freed.

    While an interrupt ends its command, through every `finally` and `except`, some frame refers to
    it. If it has been freed and the command still runs, it was swallowed.
    """
    sleep(RETRY_SECONDS)
    while reference is not None and reference() is not None and state.active:
        sleep(RETRY_SECONDS)
    if state.active and state is _state:
        state.resent = True
        signal.pthread_kill(threading.main_thread().ident or 0, number)


def _resend_after(state: _State, number: int, seconds: float) -> None:
    """In a thread: interrupt a `deferred` block that is not over after so many seconds."""
    sleep(seconds + RETRY_SECONDS)
    if state.active and state is _state and state.pending:
        state.resent = True
        signal.pthread_kill(threading.main_thread().ident or 0, number)


@contextlib.contextmanager
def deferred(seconds: float = math.inf) -> Iterator[None]:
    """Complete a short step: a signal inside the block interrupts at its end.

    Args:
        seconds: The longest time that a signal waits; then it interrupts the step.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = _state.deferred_until
    _state.deferred_until = max(before, monotonic() + seconds)
    _state.deferred_depth += 1
    try:
        yield
    finally:
        _state.deferred_depth -= 1
        _state.deferred_until = before
    if not _state.deferred_depth and _state.pending:
        _raise(_state.pending)


@contextlib.contextmanager
def keep_handlers() -> Iterator[None]:
    """Keep this process's handlers while code inside the block sets others, such as `ray.init`.

    Ray's C++ code sets its own SIGTERM handler. Until that is replaced again, a SIGTERM sets an
    alarm that aborts the process after three seconds; a thread cancels it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    set_handler, ended = signal.signal, threading.Event()

    def ignore_stop_signals(number: int, handler: Any) -> Any:
        if number in STOP_SIGNALS:
            return signal.getsignal(number)
        return set_handler(number, handler)

    def cancel_alarms() -> None:
        while not ended.wait(ALARM_SECONDS):
            signal.alarm(0)

    if _state.active:
        threading.Thread(target=cancel_alarms, daemon=True).start()
    signal.signal = ignore_stop_signals  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = set_handler
        for number in STOP_SIGNALS:
            if (handler := signal.getsignal(number)) is not None:
                signal.signal(number, handler)
        ended.set()
        if _state.active:
            signal.alarm(0)


def exit_on_signals(code: int) -> None:
    """From now on SIGTERM, SIGHUP and Ctrl-C end the process at once with this exit code.

    For a command that is over, while libraries shut down, which takes Ray some seconds.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    for number, default in DEFAULT_HANDLERS.items():
        if signal.getsignal(number) is default:
            signal.signal(number, lambda *_: os._exit(code))


def exit_without_teardown(code: int) -> None:
    """End the process as Python does, but leave it to the system to free the memory.

    Threads that are not daemons are joined, everything that was registered with `atexit` runs (the
    last log lines, temporary folders, child processes, Ray), and buffers are flushed. Freeing the
    objects of torch and MLflow one by one would take most of a second more, and the destructors of
    Ray's C++ code sometimes crash after an interrupt.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).fflush(None)  # what C libraries have printed
    os._exit(code)


# ----------------------------------------------------------------------------------- output


class _LossyFile(io.FileIO):
    """A file that discards what the system refuses to write.

    Attributes:
        error: The first error that lost output, except for a reader that has gone.
    """

    error: OSError | None = None

    def write(self, data: ReadableBuffer, /) -> int:
        """Write all of it, or discard it."""
        try:
            return super().write(data)
        except BlockingIOError:
            raise
        except OSError as error:  # the reader has gone, the disk is full, the terminal is closed
            if error.errno != errno.EPIPE and self.error is None:
                self.error = error
            return len(memoryview(data).cast("B"))


def make_output_lossy() -> None:
    """Let standard output and standard error discard what cannot be written.

    Streams that are not the process's own (a notebook's, a test's) stay as they are.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__"):
            continue
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
            file = _LossyFile(stream.fileno(), "w", closefd=False)
            lossy = io.TextIOWrapper(
                io.BufferedWriter(file),
                encoding=stream.encoding,
                errors=stream.errors,
                newline="\n",
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            lossy.mode = "w"  # type: ignore[misc]  # as on Python's own streams
            setattr(sys, name, lossy)


def output_error() -> OSError | None:
    """The error that lost part of standard output, if any; only after `make_output_lossy`.

    None too if the reader had gone, because nobody misses that output.
    """
    buffer = getattr(sys.stdout, "buffer", None)
    return getattr(getattr(buffer, "raw", None), "error", None)
