"""The command line: flags in, exit code out.

Every flag is a field of the dataclass that uses it; `--config FILE.toml` sets the same fields in
a table named after the command. Exit codes: 0 done, 1 a bug in Arrowhead (with a traceback), 2 bad
request, 3 too many faults, 4 bad data, 130 interrupted (run the same command to continue).

A command imports only its own module: with all of them, `arrowhead --help` took a second.
"""

from __future__ import annotations

import ast
import os
import sys
import traceback
from importlib import import_module
from importlib.util import find_spec

from cyclopts import App, CycloptsError, Group

from arrowhead.cli.app import (
    app,
    check_output_written,
    command_group,
    parse_refusal,
    show_refusal,
)
from arrowhead.errors import DataError, LostError, Refusal
from arrowhead.printable import escape_unencodable_output
from arrowhead.runtime import environment, signals
from arrowhead.tracking.address import redacted, without_secrets

# Each command: its function in a module of this package, and its place in the list of commands.
COMMANDS: dict[str, tuple[str, int]] = {
    "fit": ("train:fit", 1),
    "precompute": ("train:precompute", 2),
    "race": ("race:race", 3),
    "advise": ("advise:advise", 3),
    "finetune": ("finetune:finetune", 2),
    "lr-find": ("train:lr_find", 3),
    "train": ("train:train", 4),
    "score": ("inference:score", 5),
    "evaluate": ("inference:evaluate", 5),
    "examine": ("examine:examine", 6),
    "relabel": ("relabel:relabel", 5),
    "export": ("inference:export", 6),
    "publish": ("publish:publish", 6),
    "search": ("search:search", 5),
    "suggest": ("search:suggest", 5),
    "demo": ("demo:demo", 0),
    "fetch": ("fetch:fetch", 0),
    "backbones": ("backbones:backbones", 6),
    "watch": ("watch:watch", 7),
    "doctor": ("doctor:doctor", 7),
    "features info": ("artifacts:info", 0),
    "features verify": ("artifacts:verify", 0),
    "features gc": ("artifacts:gc", 0),
    "bundle info": ("bundles:bundle_info", 0),
    "bundle verify": ("bundles:bundle_verify", 0),
    "bundle register": ("bundles:register", 0),
    "scores verify": ("artifacts:scores_verify", 0),
    "submit": ("cluster:submit", 9),
    "jobs list": ("cluster:jobs_list", 0),
    "jobs logs": ("cluster:jobs_logs", 0),
    "jobs stop": ("cluster:jobs_stop", 0),
}
GROUPS = {
    "bundle": ("Inspect a bundle, check it, register it.", 8),
    "features": ("Inspect a feature store, check it, clean it up.", 8),
    "scores": ("Check the output of `score`.", 8),
    "jobs": ("List the jobs of a cluster, read their logs, stop them.", 9),
}


def register_commands(*, with_help: bool) -> None:
    """Tell the app its commands, without importing them.

    Args:
        with_help: Read the help texts from the source files, for a list of commands.
    """
    parents: dict[str, App] = {"": app}
    docstrings = _docstrings() if with_help else {}
    for words, (target, sort_key) in COMMANDS.items():
        group, _, name = words.rpartition(" ")
        if group not in parents:
            if group in app:
                del app[group]
            parents[group] = command_group(group, *GROUPS[group])
            app.command(parents[group])
        if name in parents[group]:
            del parents[group][name]
        parents[group].command(
            f"{__package__}.{target}",
            name=name,
            sort_key=sort_key,
            help=docstrings.get(target),
            group_parameters=Group.create_default_parameters(),  # else that of --config
        )


def _docstrings() -> dict[str, str | None]:
    """The docstring of every command's function, by module and name."""
    found = {}
    for module in sorted({target.partition(":")[0] for target, _ in COMMANDS.values()}):
        spec = find_spec(f"{__package__}.{module}")
        source = spec.loader.get_source(spec.name) if spec and spec.loader else ""  # type: ignore[attr-defined]
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef):
                found[f"{module}:{node.name}"] = ast.get_docstring(node)
    return found


def is_command(words: list[str]) -> bool:
    """Whether a command line begins with a command: then no list of commands is shown."""
    return bool(words) and (words[0] in COMMANDS or " ".join(words[:2]) in COMMANDS)


def import_command(words: list[str]) -> None:
    """Import the module of the command that a command line begins with, if it begins with one."""
    command = COMMANDS.get(" ".join(words[:2])) or COMMANDS.get(words[0] if words else "")
    if command:
        import_module(f"{__package__}.{command[0].partition(':')[0]}")


register_commands(with_help=False)


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
    words = expand_score_verify(words)
    if not is_command(words):
        register_commands(with_help=True)
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
        from arrowhead.cli.screen import Screen

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


def expand_score_verify(words: list[str]) -> list[str]:
    """Turn `score verify OUT` into `scores verify OUT`.

    `score` takes three positional arguments, so this cannot mean a bundle called verify.
    """
    names = [word for word in words if not word.startswith("-")]
    return ["scores", *words[1:]] if words[:2] == ["score", "verify"] and len(names) == 3 else words
