"""What verbs have in common: the app, how a verb begins and how it ends."""

from __future__ import annotations

import difflib
import json
import math
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_args

from cyclopts import (
    App,
    Argument,
    ArgumentCollection,
    CycloptsError,
    Group,
    Parameter,
    UnknownOptionError,
)
from cyclopts.config import Toml

from arrowhead import __version__
from arrowhead.cli.options import Output
from arrowhead.cli.screen import Screen
from arrowhead.errors import ConfigError
from arrowhead.output_paths import expanded
from arrowhead.runtime import signals
from arrowhead.runtime.ray_cluster import LaunchConfig
from arrowhead.tracking.address import hidden, secrets_of, without_secret
from arrowhead.tracking.client import TrackingConfig, must_have_addresses
from arrowhead.tracking.registry import RegistryConfig
from arrowhead.wording import command

app = App(
    name="arrowhead",
    version=__version__,
    default_parameter=Parameter(negative=""),
    suppress_keyboard_interrupt=False,  # ours says how to go on
    help="A folder of images becomes a trained, evaluated, deployable classifier.\n\n"
    "Each image is decoded once; every experiment after that takes seconds."
    " Start with `arrowhead demo`, or `arrowhead fit DATA OUT` on your own folder.",
)
app.meta.suppress_keyboard_interrupt = False
app.meta.group_parameters = Group("Everywhere", sort_key=9)


# ------------------------------------------------------------------- what verbs are run with


@contextmanager
def run_context(
    verb: str,
    launch: LaunchConfig,
    tracking: TrackingConfig,
    output: Output,
    place: Path | None = None,
    registry: RegistryConfig = RegistryConfig(),
) -> Iterator[Any]:
    """What the stages are run with; the MLflow run is open inside. place: a file that stands for
    the run while it is unfinished, in the folder of its checkpoints; it goes with the run's end.
    """
    from arrowhead.reporting.run_context import RunContext
    from arrowhead.tracking.run import start

    screen = Screen(to_stderr=output.json)
    if not launch.max_workers and (idle := sorted(given() & {"restarts", "wait"})):
        screen.say(f"without --workers no effect: {', '.join('--' + one for one in idle)}")
    opened = start(tracking, verb, place, registry=registry, say=screen.say)
    with _alone(place, screen.say):
        with opened as run:
            yield RunContext(launch=launch, screen=screen, run=run)
        if place:  # checkpoints of this run are gone, too; those of others stay
            place.unlink(missing_ok=True)


@contextmanager
def _alone(place: Path | None, say: Callable[[str], None]) -> Iterator[None]:
    """Nobody else trains to the same bundle; a folder of checkpoints with none in it goes again."""
    if place is None:
        yield
        return
    from arrowhead import fileio
    from arrowhead.commands import train

    with fileio.occupied(place.parent, say, shown=train.bundle_of(place.parent)):
        yield


def me() -> str:
    """How the user called us, so that the next command can be pasted."""
    ours = Path(sys.argv[0]).name == "arrowhead"  # not a script in jobs/, not python -m
    return sys.argv[0] if ours and "/" in sys.argv[0] and not _on_path() else "arrowhead"


def _on_path() -> bool:
    found = shutil.which("arrowhead")
    return found is not None and Path(found).resolve() == Path(sys.argv[0]).resolve()


def sibling(program: str) -> str:
    """Another program of the same environment, called as the user called us."""
    return str(Path(me()).with_name(program))


def ui_command(tracking: TrackingConfig) -> str:
    """The command that opens MLflow's UI on the runs. An address with a secret is not shown: the
    shell puts it in.
    """
    uri = tracking.uri
    if uri.startswith("http"):  # a server, whose UI is there already
        return command([sibling("python"), "-P", "-m", "webbrowser", without_secret(uri)])
    shown = '"$MLFLOW_TRACKING_URI"' if secrets_of(uri) else command([uri])
    return f"{command([sibling('mlflow')])} ui --backend-store-uri {shown}"


def say_next(screen: Any, commands: Sequence[str | Sequence[object]]) -> None:
    """The commands to try now, one a line, ready to be pasted into a shell: words are quoted where
    that is needed, a string is taken as it is.
    """
    screen.say("next:")
    for one in commands:
        screen.say(f"  {one if isinstance(one, str) else command(one)}")


def say_written(screen: Any, paths: Sequence[str | Path]) -> list[str]:
    """Say what a verb has written: each folder or file that is there, and what lies in a folder
    called report; all of these paths.
    """
    there = [Path(path) for path in paths if Path(path).exists()]
    found: list[str] = []
    screen.say("written:")
    for path in there:
        found.append(str(path))
        screen.say(f"  {path}")
        beside = path / "report"
        inside = sorted(beside.iterdir()) if beside.is_dir() and path.suffix != ".previous" else []
        found += map(str, inside)
        if inside:
            screen.say(f"  {beside}: {', '.join(one.name for one in inside)}")
    return found


def finish(result: dict[str, Any], output: Output) -> int:
    """Print the result if it was asked for; the exit code."""
    if output.json:
        give(result)
    if not result.get("too_many_faults"):
        return 0
    counts = result["counts"]
    Screen(to_stderr=True).say(
        f"arrowhead: {counts['faults']} of {counts['inputs']} images could not be read, more than"
        " --max-faults allows. Everything else is written."
    )
    return 3


def give(result: dict[str, Any]) -> None:
    """Print the result as one line of JSON on standard output. Raises ConfigError if it is not
    taken, by a full disk or the like; a reader that has gone wants no more.
    """
    Screen(to_stderr=False).give(json.dumps(_plain(result), allow_nan=False))
    answer_must_be_taken()


def answer_must_be_taken() -> None:
    """ConfigError if something of standard output was lost and its reader had not gone."""
    if error := signals.lost():
        raise ConfigError(
            f"The result could not be written to standard output: {error.strerror}.",
            "a file or pipe that takes it.",
            "send it elsewhere and run the same command again; what is done is not done twice.",
        )


def _plain(value: Any) -> Any:
    """The same as JSON can hold it: None for what is not a finite number."""
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ------------------------------------------------------------------------------ the door


@app.meta.default
def entry(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[
        Path | None,
        Parameter(help="TOML file with the same flags, in a table named after the verb."),
    ] = None,
) -> Any:
    """Where every command line comes in: --config first, then the verb."""
    configure(config)
    return app(tokens, exit_on_error=False, print_error=False)


class _Given:
    """Notes which flags were given, on the command line or in the TOML file, and expands ~ in
    paths, quoted for the shell or not: for cyclopts a source of flags that adds none.
    """

    def __init__(self) -> None:
        self.names: frozenset[str] = frozenset()

    def __call__(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        """Called by cyclopts after the sources before it, before anything is converted."""
        given = (argument.name for argument in arguments if argument.tokens)
        self.names = frozenset(name.lstrip("-").replace("-", "_") for name in given)
        for argument in arguments:
            if _is_place(argument):
                argument.tokens = [
                    token.evolve(value=str(expanded(Path(token.value))))
                    if token.value.startswith("~")
                    else token
                    for token in argument.tokens
                ]
        tracked = any(argument.name == "--tracking-uri" for argument in arguments)
        if tracked and "tracking_uri" not in self.names:  # the verb asks the variables
            must_have_addresses()


PLACES = {"--data", "--bundle", "--images", "--base", "--weights"}  # paths or addresses


def _is_place(argument: Argument) -> bool:
    """Whether an argument names a file or folder, or may."""
    if argument.name in PLACES:
        return True
    return Path in (argument.hint, *get_args(argument.hint))


_given = _Given()


def given() -> frozenset[str]:
    """Names of the flags that the verb at hand was given, as fields are called: max_pixels."""
    return _given.names


def configure(config: Path | None) -> None:
    """Flags are also read from this TOML file, or from none."""
    app.config = (_given,)
    if config is not None:
        config = expanded(config)
        if not config.is_file():
            raise ConfigError(f"--config {config} is not there.", "a TOML file.", "check the path.")
        try:
            tables = tomllib.loads(config.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"--config {config} cannot be read: {error}.",
                "a TOML file, with a table named after the verb.",
                "write e.g. [train] and below it epochs = 20.",
            ) from error
        _must_name_verbs(config, tables)
        app.config = (Toml(config, must_exist=True, search_parents=False), _given)


def _must_name_verbs(config: Path, tables: dict[str, Any]) -> None:
    """ConfigError for what no verb would read. A misspelt key below a verb cyclopts refuses."""
    verbs = sorted(name for name in app if not name.startswith("-"))
    for name, value in tables.items():
        if name not in verbs or not isinstance(value, dict):
            table = isinstance(value, dict)
            near = difflib.get_close_matches(name, verbs, n=1) if table else []
            meant = f"[{near[0]}]" if near else "a table named after the verb, such as [train]"
            raise ConfigError(
                f"--config {config}: no verb reads {f'[{name}]' if table else name}.",
                f"tables named after verbs: {', '.join(verbs)}.",
                f"write {meant}." if table else f"put {name} below {meant}.",
            )


def verb_in(words: list[str]) -> str:
    """The verb among `words` and a blank, if there is one."""
    return next((f"{word} " for word in words if word in app and not word.startswith("-")), "")


def near_flag(name: str, flags: Iterable[str]) -> str | None:
    """The flag that may be meant by a name, both without dashes; None where nothing is near.

    By the letters that both have in order (difflib), 0 to 1. The first letter is seldom mistyped:
    it counts as 0.1, and near is above 0.75.
    """

    def score(flag: str) -> tuple[float, int]:
        likeness = difflib.SequenceMatcher(None, name, flag, autojunk=False).ratio()
        return likeness + 0.1 * (name[:1] == flag[:1]), -abs(len(flag) - len(name))

    best = max(sorted(flags), key=score, default=None)
    return best if best is not None and score(best)[0] > 0.75 else None


def not_understood(error: CycloptsError) -> str:
    """What cyclopts could not parse, in words. Of an unknown flag with our own suggestion: cyclopts
    counts the dashes as letters, so that short flags look alike.
    """
    words = str(error)
    if not isinstance(error, UnknownOptionError) or "Did you mean to" in words:
        return words
    words = words.partition(" Did you mean ")[0]
    typed = (error.token.keyword or error.token.value).partition("=")[0]
    dashes = "--" if typed.startswith("--") else ""
    if not dashes and not typed.startswith("["):  # "[name]" is a key of --config
        return words
    known = {name for one in error.argument_collection if one.parse for name in one.names}
    flags = {name[2:] for name in known if name.startswith("--")}
    near = near_flag(typed.strip("-[]"), flags)
    return words if near is None else f"{words} Did you mean {dashes}{near}?"


def refuse(found: str, wanted: str, do: str, code: int = 2) -> int:
    """Say a refusal on standard error; its exit code."""
    for head, words in (("arrowhead: ", found), ("  wanted  ", wanted), ("  do      ", do)):
        Screen(to_stderr=True).say(hidden(head + " ".join(words.strip().splitlines())))
    return code


@contextmanager
def fetched(bundle: str, tracking: TrackingConfig) -> Iterator[Path]:
    """The bundle's folder; one that had to be fetched is there only inside."""
    from arrowhead.bundle.resolve import bundle_folder

    with tempfile.TemporaryDirectory(prefix="arrowhead-bundle-") as scratch:
        yield bundle_folder(bundle, tracking, Path(scratch))
