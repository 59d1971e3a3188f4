"""The command `watch`."""

from __future__ import annotations

from time import sleep
from typing import Annotated

from cyclopts import Parameter

from arrowhead.cli.app import finish, given_flags
from arrowhead.cli.options import Out, Output, Watched, WatchedTracking
from arrowhead.cli.screen import Screen
from arrowhead.errors import ConfigError


def watch(
    run: Annotated[
        str | None,
        Parameter(help="The run's id, the start of its id, or its name. Default: the newest run."),
    ] = None,
    *,
    follow: Annotated[
        bool,
        Parameter(negative="--no-follow", help="Watch until the run ends, or show it once."),
    ] = True,
    every: Annotated[float, Parameter(help="Seconds between two updates.")] = 2.0,
    tracking: Watched = WatchedTracking(),
    output: Out = Output(),
) -> int:
    """Watch a run from another terminal or machine.

    Shows the progress of each stage and what limits its speed, the epochs, and the load of the
    machine, as recorded in MLflow. The exit code is 0 if the run has finished, 130 if it was
    interrupted, 1 if it failed. Ctrl-C stops watching, never the run.

    Example: arrowhead watch --tracking-uri http://127.0.0.1:5000
    """
    from arrowhead.tracking import watch as tracking_watch
    from arrowhead.tracking.watch import Watch

    if "every" in given_flags() and not follow:
        raise ConfigError(
            "--every has no effect with --no-follow.", "one of the two.", "leave one out."
        )
    if not every > 0:
        raise ConfigError(f"--every is {every}.", "more than 0 seconds.", "give e.g. 2.")
    screen = Screen(to_stderr=output.json)
    with Watch(tracking, run) as watched, screen.live() as show:
        view = watched.look()
        show(tracking_watch.lines(view))
        while follow and view.running:
            sleep(every)
            view = watched.look()
            show(tracking_watch.lines(view))
    finish(view.plain(), output)
    return 0 if not follow else view.code
