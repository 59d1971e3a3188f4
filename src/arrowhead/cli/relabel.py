"""The command relabel."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from arrowhead.cli.app import finish, given_flags, program, show_next_commands
from arrowhead.cli.options import Out, Output, StorePath
from arrowhead.cli.screen import Screen
from arrowhead.cli.stage_options import Change, Fixes, FixesTable
from arrowhead.commands.relabel import ChangeConfig
from arrowhead.data import remote_folder
from arrowhead.errors import ConfigError
from arrowhead.reporting.run_context import SilentScreen

TABLE_FLAGS = {"column", "path_column", "label_separator", "new_classes", "copies", "reason"}
CHANGE_FLAGS = {"by", "dry_run"}


def relabel(
    store: StorePath,
    fixes: Annotated[
        str | None,
        Parameter(
            help="Table (.csv, .tsv) with a column path and one of new labels: label_errors.csv"
            " after you have filled in its column new_label, or your own."
        ),
    ] = None,
    *,
    table: Fixes = FixesTable(),
    change: Change = ChangeConfig(),
    undo: Annotated[bool, Parameter(help="Undo the last change instead.")] = False,
    history: Annotated[bool, Parameter(help="Show all changes instead.")] = False,
    output: Out = Output(),
) -> int:
    """Correct labels in a feature store, without decoding an image.

    Your files stay as they are. The corrections are kept when the images are listed again (`fit`,
    `precompute`), follow images that are moved, and can be undone, one change at a time. No image
    moves between train and validation. If the table has a column label, it must hold the labels
    that the store has, so that an old table changes nothing by mistake.

    Example: arrowhead relabel out/store fixes.csv --reason "looked at the pictures"
    """
    from arrowhead.commands import relabel as commands_relabel

    _check_request(fixes, undo=undo, history=history)
    store, screen = remote_folder.local(store), Screen(to_stderr=output.json)
    if history:
        result = commands_relabel.show_history(store, SilentScreen() if output.json else screen)
        return finish(result, output)
    if fixes is None:
        result = commands_relabel.undo(store, change, screen)
    else:
        result = commands_relabel.relabel(store, fixes, table, change, screen)
    if result["labels"] and not change.dry_run:
        bundle = store.parent / "bundle"
        is_of_fit = store.name == "store" and (bundle / "bundle.json").is_file()
        commands = [[program(), "train", store, bundle if is_of_fit else "BUNDLE"]]
        if fixes is not None:
            commands.append([program(), "relabel", store, "--undo"])
        show_next_commands(screen, commands)
    return finish(result, output)


def _check_request(fixes: str | None, *, undo: bool, history: bool) -> None:
    """Raise ConfigError unless one of the three actions is asked for, with flags of its own."""
    actions = (fixes is not None) + undo + history
    if actions != 1:
        raise ConfigError(
            f"relabel does one thing at a time; {'several were' if actions else 'none was'} asked"
            " for.",
            "a table of new labels, --undo, or --history.",
            "give one of them, such as `arrowhead relabel STORE FIXES.csv`.",
        )
    unused = TABLE_FLAGS if undo else TABLE_FLAGS | CHANGE_FLAGS if history else set()
    if flags := [f"--{name.replace('_', '-')}" for name in sorted(unused & given_flags())]:
        raise ConfigError(
            f"{', '.join(flags)} {'have' if len(flags) > 1 else 'has'} no effect with"
            f" {'--undo' if undo else '--history'}.",
            "flags of one action.",
            "leave out what does not belong to it.",
        )
