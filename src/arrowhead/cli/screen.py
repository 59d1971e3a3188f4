"""Lines and progress on a terminal; plain lines elsewhere."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from time import monotonic
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from arrowhead import printable
from arrowhead.data import mirrors
from arrowhead.printable import ENCODING_ERRORS
from arrowhead.wording import pluralize

Advance = Callable[[int, int, str], None]
Show = Callable[[int, float, str, str], None]
"""Takes images done, images per second, faults in words, and what limits the speed."""
LINE_SECONDS = 10.0  # between two lines of progress where there is no terminal


codecs.register_error(ENCODING_ERRORS, printable._handle_encode_error)


class Screen:
    """Lines and progress bars on a terminal; plain lines elsewhere."""

    def __init__(self, to_stderr: bool) -> None:
        self.console = Console(stderr=to_stderr, highlight=False, emoji=False)
        self._status_shown, self._status_time = False, -LINE_SECONDS

    def print(self, line: str) -> None:
        """Print a line, with control characters made visible."""
        self._clear_status()
        line = printable.escape_control_chars(mirrors.show(line))
        self.console.print(line, markup=False, soft_wrap=True)

    def print_status(self, line: str) -> None:
        """On a terminal, show a line that the next one replaces, at most ten a second."""
        if not self.console.is_terminal or self.console.is_dumb_terminal:
            return
        if monotonic() - self._status_time < 0.1:
            return
        self._status_time = monotonic()
        self._clear_status()
        self._status_shown = True
        line = mirrors.show(line)
        text = Text(printable.escape_control_chars(line), end="", no_wrap=True, overflow="ellipsis")
        text.truncate(max(self.console.width - 1, 1))
        self.console.print(text, end="", soft_wrap=True)
        self.console.file.flush()

    def _clear_status(self) -> None:
        if self._status_shown:
            self._status_shown = False
            self.console.file.write("\r\x1b[2K")

    def print_raw(self, line: str) -> None:
        """Print a line for a program to read: without style or wrapping, and flushed."""
        self._clear_status()
        self.console.file.write(f"{mirrors.show(line)}\n")
        self.console.file.flush()

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Advance]:
        """Show a bar with images per second, time left and faults; without a terminal, lines.

        Args:
            title: What is going on.
            total: Number of images.

        Yields:
            A function to call with images done, new faults, and what limits the speed.
        """
        self._clear_status()
        start, completed, faults = monotonic(), 0, 0
        with (
            self._live_bar(title, total) if self.console.is_terminal else self._lines(title, total)
        ) as show:

            def advance(done: int, new_faults: int, binding: str) -> None:
                nonlocal completed, faults
                completed, faults = completed + done, faults + new_faults
                rate = completed / max(monotonic() - start, 1e-9)
                show(completed, rate, pluralize(faults, "fault"), binding)

            yield advance

    @contextmanager
    def _live_bar(self, title: str, total: int) -> Iterator[Show]:
        columns = ("{task.fields[rate]:.1f} img/s", "{task.fields[faults]}")
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            *map(TextColumn, (*columns, "bound by {task.fields[binding]}")),
            TimeRemainingColumn(),
            console=self.console,
        ) as progress:
            fields: dict[str, Any] = {"rate": 0.0, "faults": pluralize(0, "fault"), "binding": "…"}
            task = progress.add_task(printable.escape_control_chars(title), total=total, **fields)
            yield lambda completed, rate, faults, binding: progress.update(
                task, completed=completed, rate=rate, faults=faults, binding=binding
            )

    @contextmanager
    def _lines(self, title: str, total: int) -> Iterator[Show]:
        last_line = monotonic()

        def show(completed: int, rate: float, faults: str, binding: str) -> None:
            nonlocal last_line
            if monotonic() - last_line > LINE_SECONDS or completed == total:
                last_line = monotonic()
                text = f"{title} {completed}/{total} · {rate:.1f} img/s · {faults}"
                self.print(f"{text} · bound by {binding}")

        yield show

    @contextmanager
    def byte_bar(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """Show how many megabytes are done; without a terminal, lines.

        Args:
            title: What is going on.

        Yields:
            A function to call with the bytes done and the bytes in all (0: not known). It shows
            the bar when it is first called; the bytes done may also become fewer.
        """
        self._clear_status()
        with ExitStack() as stack:
            bar = _ByteBar(self, stack, printable.escape_control_chars(title))
            yield bar.show

    @contextmanager
    def live(self) -> Iterator[Callable[[Sequence[str]], None]]:
        """Show lines that replace the previous ones; without a terminal, only new lines.

        New lines are printed every ten seconds and at the end.
        """
        if self.console.is_terminal:
            with Live(console=self.console, auto_refresh=False) as area:
                yield lambda lines: area.update(
                    Text("\n".join(map(printable.escape_control_chars, lines))), refresh=True
                )
            return
        printed: list[str] = []
        latest: Sequence[str] = []
        last_time = -LINE_SECONDS

        def show(lines: Sequence[str]) -> None:
            nonlocal printed, latest, last_time
            latest = lines
            if monotonic() - last_time >= LINE_SECONDS:
                last_time = monotonic()
                self._print_new(lines, printed)
                printed = list(lines)

        yield show
        self._print_new(latest, printed)

    def _print_new(self, lines: Sequence[str], printed: Sequence[str]) -> None:
        for line in lines:
            if line not in printed:
                self.print(line)


class _ByteBar:
    """The bar of `Screen.byte_bar`, from its first call on."""

    def __init__(self, screen: Screen, stack: ExitStack, title: str) -> None:
        self._screen, self._stack, self._title = screen, stack, title
        self._progress: Progress | None = None
        self._last_line = monotonic()

    def show(self, done: int, total: int) -> None:
        if not self._screen.console.is_terminal:
            self._show_line(done, total)
            return
        if self._progress is None:
            columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
            self._progress = self._stack.enter_context(
                Progress(
                    TextColumn("{task.description}", markup=False),
                    *columns,
                    console=self._screen.console,
                )
            )
            self._progress.add_task(self._title, total=total or None, completed=done)
        self._progress.update(self._progress.task_ids[0], completed=done, total=total or None)

    def _show_line(self, done: int, total: int) -> None:
        if monotonic() - self._last_line < LINE_SECONDS:
            return
        self._last_line = monotonic()
        of = f" of {total / 1e6:,.0f}" if total else ""
        self._screen.print(f"{self._title} {done / 1e6:,.0f}{of} MB")
