"""What a stage is run with: where, what it is shown on, its MLflow run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from arrowhead.runtime.ray_cluster import LaunchConfig
from arrowhead.tracking.run import Run

Advance = Callable[[int, int, str], None]


class Screen(Protocol):
    """Where stages are shown."""

    def say(self, line: str) -> None:
        """One line for a person."""

    def passing(self, line: str) -> None:
        """A line whose place the next line takes, where a screen can do that."""

    def bar(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """A progress line of `total` images; inside, call with (more done, more faults, the stage
        that binds).
        """


class Silence:
    """A screen that shows nothing."""

    def say(self, line: str) -> None:
        """Nothing."""

    def passing(self, line: str) -> None:
        """Nothing."""

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Advance]:
        """Nothing."""
        yield lambda done, faults, binding: None


@dataclass(frozen=True, kw_only=True, slots=True)
class RunContext:
    """What a stage is run with: where, what it is shown on, and the MLflow run, if any."""

    launch: LaunchConfig = LaunchConfig()
    screen: Screen = Silence()
    run: Run | None = None
    parent: Run | None = None
    """The run above `run`: what the whole command read is recorded there."""

    @property
    def top(self) -> Run | None:
        """The parent run, or the only one."""
        return self.parent or self.run


@contextmanager
def child(context: RunContext, name: str) -> Iterator[RunContext]:
    """The same means with a run of their own below the run, if there is one."""
    if context.run is None:
        yield context
        return
    with context.run.child(name) as run:
        yield dataclasses.replace(context, run=run, parent=context.top)


def params(context: RunContext, values: dict[str, Any]) -> None:
    """Settings, recorded if there is a run."""
    if context.run:
        context.run.params(values)


def labels(context: RunContext, verb: str) -> dict[str, str]:
    """What a stage's measures are marked with."""
    return {"run": context.top.run_id if context.top else "none", "verb": verb}
