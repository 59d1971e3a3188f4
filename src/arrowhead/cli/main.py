"""The command line: flags in, exit code out.

Every flag is a field of the dataclass that uses it; `--config FILE.toml` sets the same fields in
a table named after the command. Exit codes: 0 done, 1 a bug in Arrowhead (with a traceback), 2 bad
request, 3 too many faults, 4 bad data, 130 interrupted (run the same command to continue).
"""

from __future__ import annotations

import os
import sys
import traceback
from time import sleep
from typing import Annotated

from cyclopts import CycloptsError, Parameter

from arrowhead.cli import (
    advise,
    artifacts,
    backbones,
    cluster,
    demo,
    examine,
    fetch,
    finetune,
    inference,
    publish,
    race,
    relabel,
    search,
    train,
)
from arrowhead.cli.app import (
    app,
    check_output_written,
    finish,
    given_flags,
    parse_refusal,
    print_result,
    show_refusal,
)
from arrowhead.cli.options import Out, Output, Watched, WatchedTracking
from arrowhead.cli.screen import Screen
from arrowhead.errors import ConfigError, DataError, LostError, Refusal
from arrowhead.printable import escape_unencodable_output
from arrowhead.runtime import environment, signals
from arrowhead.tracking.address import redacted, without_secrets


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


def doctor(*, output: Out = Output()) -> int:
    """Check this machine: what is installed, what it can do, and what to fix.

    The exit code is 1 if something that Arrowhead needs is missing.
    """
    from arrowhead import doctor as arrowhead_doctor

    checks = arrowhead_doctor.checks()
    if output.json:
        print_result({"checks": [check.plain() for check in checks]})
    else:
        for check in checks:
            Screen(to_stderr=False).print(check.line())
    return 1 if any(check.state == "missing" for check in checks) else 0


app.command(train.fit, sort_key=1)
app.command(train.precompute, sort_key=2)
app.command(race.race, sort_key=3)
app.command(advise.advise, sort_key=3)
app.command(finetune.finetune, sort_key=2)
app.command(train.lr_find, sort_key=3)
app.command(train.train, sort_key=4)
app.command(inference.score, sort_key=5)
app.command(inference.evaluate, sort_key=5)
app.command(examine.examine, sort_key=6)
app.command(relabel.relabel, sort_key=5)
app.command(inference.export, sort_key=6)
app.command(publish.publish, sort_key=6)
app.command(search.search, sort_key=5)
app.command(search.suggest, sort_key=5)
app.command(demo.demo, sort_key=0)
app.command(fetch.fetch, sort_key=0)
app.command(backbones.backbones, sort_key=6)
app.command(watch, sort_key=7)
app.command(doctor, sort_key=7)
app.command(artifacts.features)
app.command(artifacts.bundles)
app.command(artifacts.scores_app)
app.command(cluster.submit, sort_key=9)
app.command(cluster.jobs_app)


def main(words: list[str] | None = None) -> None:
    """Run the command in `words` (default: sys.argv), show what went wrong, and exit."""
    environment.ensure_home_and_user()
    signals.make_output_lossy()
    with signals.interrupt_on_signals():
        code = _run(sys.argv[1:] if words is None else words)
    if words is None:
        signals.exit_on_signals(code)
    sys.exit(code)


# Commands whose result is what they print: it is an error if that cannot be written.
PRINTING_COMMANDS = ("backbones", "features", "scores", "bundle", "jobs", "doctor", "relabel")


def _run(words: list[str]) -> int:
    """Run a command; show what went wrong; the exit code."""
    words = artifacts.expand_score_verify(words)
    app.config = ()  # forget an earlier call in this process
    escape_unencodable_output()
    try:
        code = app.meta(words, exit_on_error=False, print_error=False, result_action="return_value")
        if words and words[0] in PRINTING_COMMANDS:
            if sys.stdout:
                sys.stdout.flush()
            check_output_written()
    except CycloptsError as error:
        # The word that cannot be parsed may be an address with a password.
        show_refusal(*map(without_secrets, parse_refusal(error, words)))
        code = 2
    except LostError as error:
        show_refusal(error.found, error.wanted, error.do)
        if sys.stdout:
            sys.stdout.flush()
        os._exit(signals.INTERRUPTED_EXIT_CODE)  # a normal exit would wait a minute for a dead Ray
    except Refusal as error:
        show_refusal(error.found, error.wanted, error.do)
        code = 4 if isinstance(error, DataError) else 2
    except KeyboardInterrupt as error:
        signals.mark_handled()
        by = f" by {error}" if str(error) not in ("", "SIGINT") else ""
        screen = Screen(to_stderr=True)
        screen.print("")  # a new line after the terminal's ^C
        screen.print(f"arrowhead: interrupted{by}. Run the same command again to continue.")
        code = signals.INTERRUPTED_EXIT_CODE
    except Exception:
        text = traceback.format_exc()
        if redacted(text) == text:
            raise
        sys.stderr.write(redacted(text))  # without the password of the tracking store
        code = 1
    return code if isinstance(code, int) else 0
