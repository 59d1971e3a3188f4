"""What all commands share: the app, how a command begins and how it ends."""

from __future__ import annotations

import difflib
import json
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from cyclopts import (
    App,
    Argument,
    ArgumentCollection,
    CycloptsError,
    Group,
    MissingArgumentError,
    Parameter,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)
from cyclopts.config import Toml

from arrowhead import __version__, fileio
from arrowhead.data import mirrors
from arrowhead.errors import ConfigError
from arrowhead.output_paths import expand_user
from arrowhead.runtime import signals
from arrowhead.tracking.address import redacted, secrets_of, without_secrets
from arrowhead.wording import shell_command

if TYPE_CHECKING:
    from arrowhead.cli.options import Output
    from arrowhead.runtime.ray_cluster import LaunchConfig
    from arrowhead.tracking.client import TrackingConfig
    from arrowhead.tracking.registry import RegistryConfig

app = App(
    name="arrowhead",
    version=__version__,
    default_parameter=Parameter(negative=""),
    suppress_keyboard_interrupt=False,  # `main` handles it
    help="A folder of images becomes a trained, evaluated, deployable classifier.\n\n"
    "Each image is decoded once; every experiment after that takes seconds."
    " Start with `arrowhead demo`, or `arrowhead fit DATA OUT` on your own folder.",
)
app.meta.suppress_keyboard_interrupt = False
app.meta.group_parameters = Group("All commands", sort_key=9)


def command_group(name: str, help_text: str, sort_key: int) -> App:
    """A command with commands below it, such as `arrowhead jobs list`."""
    return App(
        name=name,
        help=help_text,
        sort_key=sort_key,
        default_parameter=Parameter(negative=""),
        suppress_keyboard_interrupt=False,
    )


# ------------------------------------------------------------------- how a command begins


@contextmanager
def run_context(
    name: str,
    launch: LaunchConfig,
    tracking: TrackingConfig,
    output: Output,
    run_file: Path | None = None,
    registry: RegistryConfig | None = None,
) -> Iterator[Any]:
    """The RunContext of a command; its MLflow run is open inside the block.

    Args:
        name: The command, which also names the run.
        launch: Where the work is done.
        tracking: Where the run is recorded.
        output: How to print the result.
        run_file: A file that remembers the unfinished run, in the folder of its checkpoints.
            Removed when the run has finished.
        registry: Where the bundle will be registered. Default: RegistryConfig().
    """
    from arrowhead.cli.screen import Screen
    from arrowhead.reporting.run_context import RunContext
    from arrowhead.runtime import worker_choice
    from arrowhead.tracking.registry import RegistryConfig
    from arrowhead.tracking.run import start

    registry = registry or RegistryConfig()
    screen = Screen(to_stderr=output.json)
    launch, line = worker_choice.choose_workers(launch, name)
    if line:
        screen.print(line)
    if not launch.max_workers and (unused := sorted(given_flags() & {"restarts", "wait"})):
        flags = ", ".join(f"--{flag}" for flag in unused)
        screen.print(f"{flags} {'have' if unused[1:] else 'has'} no effect without --workers")
    mlflow_run = start(tracking, name, run_file, registry=registry, print_line=screen.print)
    with _lock_checkpoints(run_file, screen.print):
        with mlflow_run as run:
            yield RunContext(launch=launch, screen=screen, run=run)
        if run_file:  # the checkpoints of this run are gone too; those of others stay
            run_file.unlink(missing_ok=True)


@contextmanager
def _lock_checkpoints(run_file: Path | None, print_line: Callable[[str], None]) -> Iterator[None]:
    """Lock the folder of checkpoints, so no other process trains the same bundle."""
    if run_file is None:
        yield
        return
    from arrowhead.commands import train

    with fileio.locked_output_folder(
        run_file.parent, print_line, display_path=train.bundle_of_checkpoint_dir(run_file.parent)
    ):
        yield


def program() -> str:
    """The program as the user called it, for commands to paste."""
    direct = Path(sys.argv[0]).name == "arrowhead"  # not a script in jobs/, not python -m
    return sys.argv[0] if direct and "/" in sys.argv[0] and not _is_on_path() else "arrowhead"


def _is_on_path() -> bool:
    path = shutil.which("arrowhead")
    return path is not None and Path(path).resolve() == Path(sys.argv[0]).resolve()


def sibling_program(name: str) -> str:
    """Another program of the same environment, with the path that the user typed."""
    return str(Path(program()).with_name(name))


def ui_command(tracking: TrackingConfig) -> str:
    """The command that opens MLflow's UI on the runs.

    An address with a secret is not shown: the shell fills in the variable.
    """
    uri = tracking.uri
    if uri.startswith("http"):  # a server, which already has a UI
        return shell_command(
            [sibling_program("python"), "-P", "-m", "webbrowser", without_secrets(uri)]
        )
    shown = '"$MLFLOW_TRACKING_URI"' if secrets_of(uri) else shell_command([uri])
    return f"{shell_command([sibling_program('mlflow')])} ui --backend-store-uri {shown}"


def open_command(page: Path) -> list[str]:
    """The command that opens a page in the user's browser."""
    return [sibling_program("python"), "-P", "-m", "webbrowser", page.absolute().as_uri()]


# --------------------------------------------------------------------- how a command ends


def show_next_commands(screen: Any, commands: Sequence[str | Sequence[object]]) -> None:
    """Show the commands to try next, one a line, ready to paste into a shell.

    Args:
        screen: Where to show them.
        commands: Each a list of words, which are quoted as needed, or a string, shown as it is.
    """
    screen.print("next:")
    for one in commands:
        screen.print(f"  {one if isinstance(one, str) else shell_command(one)}")


def show_written(screen: Any, paths: Sequence[str | Path]) -> list[str]:
    """Show what a command has written.

    Args:
        screen: Where to show it.
        paths: Files and folders; those that do not exist are left out.

    Returns:
        The paths shown, with the files of a folder called report.
    """
    written: list[str] = []
    screen.print("written:")
    for path in map(Path, paths):
        if not path.exists():
            continue
        written.append(str(path))
        screen.print(f"  {path}")
        report = path / "report"
        files = sorted(report.iterdir()) if report.is_dir() and path.suffix != ".previous" else []
        written += map(str, files)
        if files:
            screen.print(f"  {report}: {', '.join(file.name for file in files)}")
    return written


def bundles(path: Path) -> list[Path]:
    """The folders of a bundle and of the bundle that it replaces."""
    return [path, path.with_name(f"{path.name}.previous")]


def finish(result: dict[str, Any], output: Output, *, faults_flag: str = "--max-faults") -> int:
    """Print the result if --json is given; the exit code.

    Args:
        result: The result of the command.
        output: Where it goes.
        faults_flag: The command's flag for the number of faults it accepts.
    """
    if output.json:
        print_result(result)
    if not result.get("too_many_faults"):
        return 0
    from arrowhead.cli.screen import Screen

    counts = result["counts"]
    Screen(to_stderr=True).print(
        f"arrowhead: {counts['faults']} of {counts['inputs']} images could not be read, more than"
        f" {faults_flag} allows. The results for all other images are written."
    )
    return 3


def print_result(result: dict[str, Any]) -> None:
    """Print the result as one line of JSON on standard output.

    Raises:
        ConfigError: It could not be written, for example to a full disk. Not if the reader has
            gone, because then nobody wants the result.
    """
    from arrowhead.cli.screen import Screen

    Screen(to_stderr=False).print_raw(json.dumps(fileio.jsonable(result), allow_nan=False))
    check_output_written()


def check_output_written() -> None:
    """Raise ConfigError if part of standard output could not be written."""
    if error := signals.output_error():
        raise ConfigError(
            f"The result could not be written to standard output: {error.strerror}.",
            "a file or pipe that can be written.",
            "redirect the output elsewhere and run the same command again; finished work is kept.",
        )


# ---------------------------------------------------------------------------- the flags


@app.meta.default
def entry(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[
        Path | None,
        Parameter(help="TOML file that sets flags, in a table named after the command."),
    ] = None,
) -> Any:
    """The entry of every command line: first --config, then the command."""
    configure(config)
    return app(tokens, exit_on_error=False, print_error=False)


class _GivenFlags:
    """Remembers which flags are given_flags, on the command line or in the TOML file.

    Also expands ~ in paths, even if the shell did not. For cyclopts this is a source of flags that
    adds none.
    """

    def __init__(self) -> None:
        self.names: frozenset[str] = frozenset()

    def __call__(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        """Called by cyclopts after the TOML file is read, before values are converted."""
        given = (argument.name for argument in arguments if argument.tokens)
        self.names = frozenset(name.lstrip("-").replace("-", "_") for name in given)
        for argument in arguments:
            if _is_path(argument):
                argument.tokens = [
                    token.evolve(value=str(expand_user(Path(token.value))))
                    if token.value.startswith("~")
                    else token
                    for token in argument.tokens
                ]
            if argument.name == "--weights":  # of an address: its place in the mirror
                argument.tokens = [
                    token.evolve(value=str(mirrors.mirror_of(token.value)))
                    if token.value.lower().startswith(ADDRESSES)
                    else token
                    for token in argument.tokens
                ]
        tracked = any(argument.name == "--tracking-uri" for argument in arguments)
        if tracked and "tracking_uri" not in self.names:  # then MLflow's variables count
            from arrowhead.tracking.client import check_address_variables

            check_address_variables()


ADDRESSES = tuple(f"{scheme}:/" for scheme in (*mirrors.SCHEMES, "file"))
PATH_ARGUMENTS = {
    "--data",
    "--source",
    "--bundle",
    "--images",
    "--base",
    "--weights",
}  # or addresses


def _is_path(argument: Argument) -> bool:
    """Whether an argument is, or may be, a file or folder."""
    if argument.name in PATH_ARGUMENTS:
        return True
    return Path in (argument.hint, *get_args(argument.hint))


_given_flags = _GivenFlags()


def given_flags() -> frozenset[str]:
    """The flags given to the current command, by their field names, such as max_pixels."""
    return _given_flags.names


def configure(config: Path | None) -> None:
    """Read flags from this TOML file too, or from no file."""
    app.config = (_given_flags,)
    if config is not None:
        config = expand_user(config)
        if not config.is_file():
            raise ConfigError(
                f"--config {config} does not exist.", "a TOML file.", "check the path."
            )
        try:
            tables = tomllib.loads(config.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"--config {config} cannot be read: {error}.",
                "a TOML file, with a table named after the command.",
                "write e.g. [train] and below it epochs = 20.",
            ) from error
        _check_tables(config, tables)
        app.config = (Toml(config, must_exist=True, search_parents=False), _given_flags)


def _check_tables(config: Path, tables: dict[str, Any]) -> None:
    """Raise ConfigError for a table that no command reads; cyclopts checks the keys inside."""
    commands = sorted(name for name in app if not name.startswith("-"))
    for name, value in tables.items():
        if name not in commands or not isinstance(value, dict):
            table = isinstance(value, dict)
            near = difflib.get_close_matches(name, commands, n=1) if table else []
            fix = f"[{near[0]}]" if near else "a table named after the command, such as [train]"
            raise ConfigError(
                f"--config {config}: no command reads {f'[{name}]' if table else name}.",
                f"tables named after commands: {', '.join(commands)}.",
                f"write {fix}." if table else f"put {name} below {fix}.",
            )


# ---------------------------------------------------------------------------- refusals


def command_in(words: list[str]) -> str:
    """The first command among `words`, with a space after it; "" if there is none."""
    return next((f"{word} " for word in words if word in app and not word.startswith("-")), "")


def closest_flag(name: str, flags: Iterable[str]) -> str | None:
    """The flag that a misspelt name probably means, None if none is similar.

    The similarity is difflib's ratio, plus 0.1 for the same first letter, which is seldom mistyped;
    it must be above 0.75.

    Args:
        name: What the user typed, without dashes.
        flags: The known flags, without dashes.
    """

    def score(flag: str) -> tuple[float, int]:
        similarity = difflib.SequenceMatcher(None, name, flag, autojunk=False).ratio()
        return similarity + 0.1 * (name[:1] == flag[:1]), -abs(len(flag) - len(name))

    in_group = [flag for flag in flags if flag.endswith(f".{name}")]
    if len(in_group) == 1:  # --max-faults, where a command calls it --extract.max-faults
        return in_group[0]
    best = max(sorted(flags), key=score, default=None)
    return best if best is not None and score(best)[0] > 0.75 else None


def parse_refusal(error: CycloptsError, words: list[str]) -> tuple[str, str, str]:
    """The three parts of the refusal of a command line that cyclopts could not parse.

    An unknown flag gets Arrowhead's own suggestion: cyclopts compares the dashes too, so short
    flags look alike to it.
    """
    found = str(error)
    command = " ".join(error.command_chain or ()) or command_in(words).strip()
    help_command = " ".join([program(), *command.split(), "--help"])
    if error.argument is not None:
        name, flag = error.argument.name, error.argument
        if isinstance(error, MissingArgumentError) and flag.index is not None and not flag.tokens:
            found = f"{command}: {name.lstrip('-').upper()} ({name}) is missing."
        wanted = f"{name}: {_type_text(flag.hint)}. {_help_text(error, name)}"
        return found, wanted, f"correct {name}; {help_command} shows all arguments and flags."
    if isinstance(error, UnknownOptionError):
        found, closest = _unknown_flag(error)
        wanted = f"a flag of {command or 'arrowhead'}."
        return found, wanted, f"write {closest}." if closest else f"run {help_command}."
    if isinstance(error, UnknownCommandError):
        return found, "one of the commands.", f"run {help_command}."
    if isinstance(error, UnusedCliTokensError):
        found = f"{command}: too many arguments: {' '.join(error.unused_tokens or ())}."
    return found, "each argument and each flag once, as --help lists them.", f"run {help_command}."


def _unknown_flag(error: UnknownOptionError) -> tuple[str, str | None]:
    """What to say about an unknown flag, and the flag that was probably meant."""
    message = str(error)
    if "Did you mean to" in message:
        return message, None
    message = message.partition(" Did you mean ")[0]
    typed = (error.token.keyword or error.token.value).partition("=")[0]
    dashes = "--" if typed.startswith("--") else ""
    if not dashes and not typed.startswith("["):  # "[name]" is a key of --config
        return message, None
    names = {name for one in error.argument_collection if one.parse for name in one.names}
    flags = {name[2:] for name in names if name.startswith("--")}
    closest = closest_flag(typed.strip("-[]"), flags)
    if closest is None:
        return message, None
    return f"{message} Did you mean {dashes}{closest}?", dashes + closest


def _help_text(error: CycloptsError, name: str) -> str:
    """The help of a flag, for fields of a dataclass read from the docstring below the field."""
    assert error.app is not None
    for argument in error.app.assemble_argument_collection(parse_docstring=True):
        if argument.name == name:
            return " ".join((argument.parameter.help or "").split())
    return ""


TYPE_TEXTS = {
    bool: "no value (it is on or off)",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
}


def _type_text(hint: Any) -> str:
    """The values that a flag takes, in words."""
    if hint in TYPE_TEXTS:
        return TYPE_TEXTS[hint]
    parts = [part for part in get_args(hint) if part is not type(None)]
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, parts)) if len(parts) > 1 else str(parts[0])
    if get_origin(hint) in (tuple, list):
        several = {float: "numbers", int: "whole numbers"}.get(parts[0], "values")
        return f"{len(parts)} {several}" if Ellipsis not in parts else several
    return " or ".join(_type_text(part) for part in parts) or "a value"


def show_refusal(found: str, wanted: str, do: str) -> None:
    """Show the three parts of a refusal on standard error."""
    from arrowhead.cli.screen import Screen

    for label, text in (("arrowhead: ", found), ("  wanted  ", wanted), ("  do      ", do)):
        Screen(to_stderr=True).print(redacted(label + " ".join(text.strip().splitlines())))


@contextmanager
def local_bundle(bundle: str, tracking: TrackingConfig) -> Iterator[Path]:
    """The folder of a bundle; a downloaded one exists only inside the block."""
    from arrowhead.bundle.resolve import bundle_folder

    with tempfile.TemporaryDirectory(prefix="arrowhead-bundle-") as scratch:
        yield bundle_folder(bundle, tracking, Path(scratch))
