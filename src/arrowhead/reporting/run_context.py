"""RunContext: where a stage runs, where it is shown, and where it is recorded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from arrowhead.printable import encodable_text, escape_control_chars
from arrowhead.runtime.ray_cluster import LaunchConfig
from arrowhead.tracking.run import Run

Advance = Callable[[int, int, str], None]


class Screen(Protocol):
    """Where messages and progress are shown."""

    def print(self, line: str) -> None:
        """Show a line."""

    def print_status(self, line: str) -> None:
        """On a terminal, show a line that the next one replaces."""

    def bar(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """Show a progress bar of `total` images.

        Inside the block, call the given function with the number of images done, the number of new
        faults, and the stage that limits the speed.
        """


class SilentScreen:
    """A screen that shows nothing."""

    def print(self, line: str) -> None:
        """Ignore the line."""

    def print_status(self, line: str) -> None:
        """Ignore the line."""

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Advance]:
        """Ignore the progress."""
        yield lambda done, faults, bottleneck: None


class PrintingScreen(SilentScreen):
    """A screen that prints lines with `print`."""

    def print(self, line: str) -> None:
        """Print a line."""
        print(encodable_text(escape_control_chars(line)))  # noqa: T201


@dataclass(frozen=True, kw_only=True, slots=True)
class RunContext:
    """Where a stage runs, the screen that shows it, and its MLflow run, if any."""

    launch: LaunchConfig = LaunchConfig()
    screen: Screen = SilentScreen()
    run: Run | None = None
    parent: Run | None = None
    """The run above `run`, which records what belongs to the whole command."""
    source_shown: bool = False
    """Whether the screen has shown already how these images were read and split."""

    @property
    def root_run(self) -> Run | None:
        """The run of the whole command."""
        return self.parent or self.run


@contextmanager
def child_context(context: RunContext, name: str) -> Iterator[RunContext]:
    """The same context with a child run, if there is a run."""
    if context.run is None:
        yield context
        return
    with context.run.child(name) as run:
        yield dataclasses.replace(context, run=run, parent=context.root_run)


def log_params(context: RunContext, values: dict[str, Any]) -> None:
    """Log MLflow params, if there is a run."""
    if context.run:
        context.run.params(values)


def metric_labels(context: RunContext, stage: str) -> dict[str, str]:
    """The Prometheus labels of what a stage measures."""
    return {"run": context.root_run.run_id if context.root_run else "none", "verb": stage}
