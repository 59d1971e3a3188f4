"""How a command is told to end from outside, and what its output does when nobody takes it.

    stops          SIGTERM and SIGHUP interrupt like Ctrl-C, while the block lasts
    deferred       none of them inside a step that must not be left half done
    lossy_output   a closed pipe or a full disk under the log costs the log, not the work

Kubernetes, SLURM, systemd and Ray's `jobs stop` send SIGTERM and wait some seconds before they
kill; a terminal that goes away sends SIGHUP, which `nohup` has set to be ignored.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from time import monotonic
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

SAME_SECONDS = 1.0  # `timeout`, systemd and others send two signals for one request to end
INTERRUPTED = 130  # exit code


class Interrupted(KeyboardInterrupt):
    """The process was told to end by a signal; its text is the signal's name."""


class _State:
    """Signals that came while the block of `stops` lasts."""

    def __init__(self) -> None:
        self.first: float | None = None  # when the first SIGTERM or SIGHUP came
        self.deferred = 0  # depth of `deferred` blocks
        self.waiting: str | None = None  # the signal that came inside one


_state = _State()


@contextlib.contextmanager
def stops() -> Iterator[None]:
    """SIGTERM, SIGHUP and Ctrl-C raise Interrupted in the main thread, while the block lasts.

    A second SIGTERM or SIGHUP, a second or more after the first, ends the process at once with
    exit code 130. A signal that is ignored when the block begins stays ignored. Does nothing
    outside the main thread, which alone may handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _state.__init__()  # type: ignore[misc]  # of an earlier command in this process
    before = {}
    for number, usual in (
        (signal.SIGTERM, signal.SIG_DFL),
        (signal.SIGHUP, signal.SIG_DFL),
        (signal.SIGINT, signal.default_int_handler),
    ):
        if signal.getsignal(number) is usual:
            before[number] = signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    if number != signal.SIGINT:  # pressed twice, Ctrl-C interrupts twice, as everywhere
        if _state.first is not None:
            if monotonic() - _state.first > SAME_SECONDS:
                os._exit(INTERRUPTED)
            return
        _state.first = monotonic()
    if _state.deferred:
        _state.waiting = name
        return
    raise Interrupted(name)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """A short step that is done whole: a signal that comes inside interrupts at its end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _state.deferred += 1
    try:
        yield
    finally:
        _state.deferred -= 1
    if not _state.deferred and _state.waiting:
        name, _state.waiting = _state.waiting, None
        raise Interrupted(name)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Keeps this process's handlers through code that sets others, such as `ray.init`; a SystemExit
    that such a handler of SIGTERM raised inside is an interrupt.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = signal.SIGTERM, signal.SIGHUP, signal.SIGINT
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    except SystemExit as error:
        raise Interrupted(signal.SIGTERM.name) from error
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)


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
