"""Lines and progress on a terminal; plain lines elsewhere.

visible        a line without control characters: what a name holds cannot steer a terminal
take_any_text  standard output and error that are not UTF-8 get plain characters instead
Screen         lines, progress, the result
"""

from __future__ import annotations

import codecs
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from unicodedata import category

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from arrowhead.wording import counted

Advance = Callable[[int, int, str], None]
SELDOM = 10.0  # seconds between lines of progress where nobody sees a bar move

# What our own lines hold, for terminals and logs that are not UTF-8. Anything else is escaped.
PLAIN = str.maketrans(
    {"±": "+-", "…": "...", "→": "->", "≤": "<=", "≥": ">="}
    | dict(zip("·×÷—–•“”‘’│┃╭╮╰╯─━╌╸╺█░", "-x/--*\"\"''||++++-----#.", strict=True))
)
ENCODING_ERRORS = "arrowhead.plain"  # name of the error handler below


def visible(text: str) -> str:
    r"""The text with control characters written out as \xNN or \uNNNN: C0 and C1 controls, line
    and paragraph separators, and the marks that turn the direction of what follows.

    Other Unicode stays as it is. A lone surrogate, which stands for a byte of a file's name that
    is not UTF-8, is written as that byte.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or not _steers(c) else _escaped(c) for c in text)


def _steers(character: str) -> bool:
    # Format characters other than the direction marks (joiners in emoji and Indic scripts) are part
    # of ordinary text; so are spaces that isprintable does not count.
    if character == "\t":
        return False
    if character in "\u061c\u200e\u200f" or "\u202a" <= character <= "\u202e":
        return True
    return "\u2066" <= character <= "\u2069" or category(character) in ("Cc", "Cs", "Zl", "Zp")


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        code -= 0xDC00
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _plain(error: UnicodeError) -> tuple[str, int]:
    """For the codecs module: what is written for characters that an encoding does not have."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    bad = error.object[error.start : error.end]
    made = (c if c.isascii() else _escaped(c) for c in bad.translate(PLAIN))
    return "".join(made), error.end


codecs.register_error(ENCODING_ERRORS, _plain)


def take_any_text() -> None:
    """Let standard output and standard error take any text, whatever their encoding is."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):  # some stand-ins have none
            reconfigure(errors=ENCODING_ERRORS)


def encodable(text: str) -> str:
    """The text with what standard output cannot encode replaced, as `take_any_text` does."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, ENCODING_ERRORS).decode(encoding)


class Screen:
    """Lines and progress bars on a terminal; plain lines elsewhere."""

    def __init__(self, to_stderr: bool) -> None:
        self.console = Console(stderr=to_stderr, highlight=False, emoji=False)
        self._passing, self._passed = False, -SELDOM  # whether such a line is shown; when last

    def say(self, line: str) -> None:
        """One line; its control characters are shown, not obeyed."""
        self._wipe()
        self.console.print(visible(line), markup=False, soft_wrap=True)

    def passing(self, line: str) -> None:
        """A line whose place the next one takes, at most ten a second; only on a terminal."""
        if not self.console.is_terminal or self.console.is_dumb_terminal:
            return
        if monotonic() - self._passed < 0.1:
            return
        self._passed = monotonic()
        self._wipe()
        self._passing = True
        text = Text(visible(line), end="", no_wrap=True, overflow="ellipsis")
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
                visible(title), total=total, rate=0.0, faults=counted(0, "fault"), binding="…"
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
                yield lambda lines: area.update(Text("\n".join(map(visible, lines))), refresh=True)
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
