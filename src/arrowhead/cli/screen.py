"""Lines and progress on a terminal; plain lines elsewhere."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from arrowhead import printable
from arrowhead.printable import ENCODING_ERRORS
from arrowhead.wording import counted

Advance = Callable[[int, int, str], None]
SELDOM = 10.0  # seconds between lines of progress where nobody sees a bar move


codecs.register_error(ENCODING_ERRORS, printable._plain)


class Screen:
    """Lines and progress bars on a terminal; plain lines elsewhere."""

    def __init__(self, to_stderr: bool) -> None:
        self.console = Console(stderr=to_stderr, highlight=False, emoji=False)
        self._passing, self._passed = False, -SELDOM  # whether such a line is shown; when last

    def say(self, line: str) -> None:
        """One line; its control characters are shown, not obeyed."""
        self._wipe()
        self.console.print(printable.visible(line), markup=False, soft_wrap=True)

    def passing(self, line: str) -> None:
        """A line whose place the next one takes, at most ten a second; only on a terminal."""
        if not self.console.is_terminal or self.console.is_dumb_terminal:
            return
        if monotonic() - self._passed < 0.1:
            return
        self._passed = monotonic()
        self._wipe()
        self._passing = True
        text = Text(printable.visible(line), end="", no_wrap=True, overflow="ellipsis")
        text.truncate(max(self.console.width - 1, 1))
        self.console.print(text, end="", soft_wrap=True)
        self.console.file.flush()

    def _wipe(self) -> None:
        if self._passing:
            self._passing = False
            self.console.file.write("\r\x1b[2K")

    def give(self, line: str) -> None:
        """One line for a program to read: no style, no wrapping, and out at once."""
        self._wipe()
        self.console.file.write(f"{line}\n")
        self.console.file.flush()

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Advance]:
        """A live bar with img/s, time left and faults; on a pipe a line every ten seconds."""
        self._wipe()
        with (
            self._live(title, total)
            if self.console.is_terminal
            else self._lines(title, total) as advance
        ):
            yield advance

    @contextmanager
    def _live(self, title: str, total: int) -> Iterator[Advance]:
        columns = (
            "{task.fields[rate]:.1f} img/s",
            "{task.fields[faults]}",
            "bound by {task.fields[binding]}",
        )
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            *(TextColumn(column) for column in columns),
            TimeRemainingColumn(),
            console=self.console,
        ) as progress:
            task = progress.add_task(
                printable.visible(title),
                total=total,
                rate=0.0,
                faults=counted(0, "fault"),
                binding="…",
            )
            began, faults = monotonic(), 0

            def advance(done: int, more_faults: int, binding: str) -> None:
                nonlocal faults
                faults += more_faults
                so_far = progress.tasks[0].completed + done
                rate = so_far / max(monotonic() - began, 1e-9)
                told = counted(faults, "fault")
                progress.update(task, advance=done, rate=rate, faults=told, binding=binding)

            yield advance

    @contextmanager
    def _lines(self, title: str, total: int) -> Iterator[Advance]:
        began = said = monotonic()
        so_far = faults = 0

        def advance(done: int, more_faults: int, binding: str) -> None:
            nonlocal so_far, faults, said
            so_far, faults = so_far + done, faults + more_faults
            if monotonic() - said > SELDOM or so_far == total:
                said = monotonic()
                rate = so_far / max(said - began, 1e-9)
                self.say(
                    f"{title} {so_far}/{total} · {rate:.1f} img/s · {counted(faults, 'fault')}"
                    f" · bound by {binding}"
                )

        yield advance

    @contextmanager
    def live(self) -> Iterator[Callable[[Sequence[str]], None]]:
        """Lines that replace the ones before; on a pipe those that are new, every ten seconds and
        at the end.
        """
        if self.console.is_terminal:
            with Live(console=self.console, auto_refresh=False) as area:
                yield lambda lines: area.update(
                    Text("\n".join(map(printable.visible, lines))), refresh=True
                )
            return
        said: list[str] = []
        newest: Sequence[str] = []
        last = -SELDOM

        def show(lines: Sequence[str]) -> None:
            nonlocal said, newest, last
            newest = lines
            if monotonic() - last >= SELDOM:
                last = monotonic()
                self._new(lines, said)
                said = list(lines)

        yield show
        self._new(newest, said)

    def _new(self, lines: Sequence[str], said: Sequence[str]) -> None:
        for line in lines:
            if line not in said:
                self.say(line)
