"""The command line: flags in, exit code out.

Every flag is a field of the dataclass that uses it; `--config FILE.toml` sets the same fields in
a table named after the verb. Exit codes: 0 done, 1 a bug of ours (with its traceback), 2 bad
request, 3 too many faults, 4 bad data, 130 interrupted (run the same command to go on).
"""

from __future__ import annotations

import os
import sys
import traceback
from time import sleep
from typing import Annotated

from cyclopts import CycloptsError, Parameter

from arrowhead.cli import artifacts, cluster, demo, inference, train
from arrowhead.cli.app import (
    answer_must_be_taken,
    app,
    finish,
    give,
    given,
    me,
    not_understood,
    refuse,
    verb_in,
)
from arrowhead.cli.options import Out, Output, Watched, WatchedTracking
from arrowhead.cli.screen import Screen
from arrowhead.errors import ConfigError, DataError, LostError, Refusal
from arrowhead.printable import take_any_text
from arrowhead.runtime import environment, signals
from arrowhead.tracking.address import hidden, without_secret


def watch(
    run: Annotated[
        str | None,
        Parameter(help="The run's id or its first letters, or its name; without, the newest run."),
    ] = None,
    *,
    follow: Annotated[
        bool, Parameter(negative="--no-follow", help="Go on until the run ends; else show it once.")
    ] = True,
    every: Annotated[float, Parameter(help="Seconds between two looks.")] = 2.0,
    tracking: Watched = WatchedTracking(),
    output: Out = Output(),
) -> int:
    """Watch a run from another terminal, or another machine: how far each stage is and what binds
    it, epochs, the machine's load. It looks into MLflow, where the run records itself.

    Exit code 0 when the run has finished, 130 when it was interrupted, 1 when it failed. Ctrl-C
    ends the watching, never the run.

    Example: arrowhead watch --tracking-uri http://127.0.0.1:5000
    """
    from arrowhead.tracking import watch as tracking_watch
    from arrowhead.tracking.watch import Watch

    if "every" in given() and not follow:
        raise ConfigError("--every has no effect with --no-follow.", "one.", "leave one out.")
    if not every > 0:
        raise ConfigError(f"--every is {every}.", "more than 0 seconds.", "give e.g. 2.")
    screen = Screen(to_stderr=output.json)
    with Watch(tracking, run) as seen, screen.live() as show:
        view = seen.look()
        show(tracking_watch.lines(view))
        while follow and view.running:
            sleep(every)
            view = seen.look()
            show(tracking_watch.lines(view))
    finish(view.plain(), output)
    return 0 if not follow else view.code


def doctor(*, output: Out = Output()) -> int:
    """Look this machine over: what is installed, what it can do, what to mend. Exit code 0 when
    nothing that Arrowhead needs is missing.
    """
    from arrowhead import doctor as examination

    checks = examination.checks()
    if output.json:
        give({"checks": [check.plain() for check in checks]})
    else:
        for check in checks:
            Screen(to_stderr=False).say(check.line())
    return 1 if any(check.state == "missing" for check in checks) else 0


app.command(train.fit, sort_key=1)
app.command(train.precompute, sort_key=2)
app.command(train.lr_find, sort_key=3)
app.command(train.train, sort_key=4)
app.command(inference.score, sort_key=5)
app.command(inference.evaluate, sort_key=5)
app.command(inference.export, sort_key=6)
app.command(demo.demo, sort_key=0)
app.command(watch, sort_key=7)
app.command(doctor, sort_key=7)
app.command(artifacts.features)
app.command(artifacts.bundles)
app.command(artifacts.scores_app)
app.command(cluster.submit, sort_key=9)
app.command(cluster.jobs_app)


def main(words: list[str] | None = None) -> None:
    """Run the verb in `words` (default: the command line's); say what went wrong; exit."""
    environment.ensure_home_and_user()
    signals.lossy_output()
    with signals.stops():
        code = _run(sys.argv[1:] if words is None else words)
    if words is None:
        signals.ends(code)
    sys.exit(code)


TELLING = ("features", "scores", "bundle", "jobs", "doctor")  # verbs whose lines are the result


def _run(words: list[str]) -> int:
    """Run a verb; its exit code, after what went wrong is said."""
    words = artifacts.scores_verb(words)
    app.config = ()  # of an earlier call in this process
    take_any_text()
    try:
        code = app.meta(words, exit_on_error=False, print_error=False, result_action="return_value")
        if words and words[0] in TELLING:
            if sys.stdout:
                sys.stdout.flush()
            answer_must_be_taken()
    except CycloptsError as error:
        wanted = "a verb, its arguments and its flags, as --help lists them."
        # The word that is not understood may be an address.
        code = refuse(
            without_secret(not_understood(error)), wanted, f"run {me()} {verb_in(words)}--help."
        )
    except LostError as error:
        refuse(error.found, error.wanted, error.do)
        if sys.stdout:
            sys.stdout.flush()
        os._exit(signals.INTERRUPTED)  # leaving a Ray that is dead takes a minute
    except Refusal as error:
        code = refuse(error.found, error.wanted, error.do, 4 if isinstance(error, DataError) else 2)
    except KeyboardInterrupt as error:
        signals.handled()
        by = f" by {error}" if str(error) not in ("", "SIGINT") else ""
        screen = Screen(to_stderr=True)
        screen.say("")  # the terminal has shown ^C
        screen.say(f"arrowhead: interrupted{by}. Run the same command again to go on.")
        code = signals.INTERRUPTED
    except Exception:
        told = traceback.format_exc()
        if hidden(told) == told:
            raise
        sys.stderr.write(hidden(told))  # as Python would, without the store's password
        code = 1
    return code if isinstance(code, int) else 0
