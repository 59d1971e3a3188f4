"""The command fetch: download a data set and unpack it safely."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from arrowhead.cli.app import finish, program, show_next_commands
from arrowhead.cli.options import Out, Output
from arrowhead.cli.screen import Screen
from arrowhead.cli.stage_options import Fetch
from arrowhead.commands.fetch import FetchConfig
from arrowhead.data.known_datasets import DATASETS
from arrowhead.errors import ConfigError
from arrowhead.output_paths import check_output_folder


def fetch(
    source: Annotated[
        str | None,
        Parameter(
            help="What to fetch: the name of a data set (left out: a list of them), an address"
            " (https://…, http://…, file://…), or the path of a zip or tar archive."
        ),
    ] = None,
    directory: Annotated[
        Path | None, Parameter(help="Folder for what is in the archive, new or empty.")
    ] = None,
    *,
    list_names: Annotated[
        bool, Parameter(name="--list", help="List the data sets with size and terms.")
    ] = False,
    fetching: Fetch = FetchConfig(),
    output: Out = Output(),
) -> int:
    """Download a data set and unpack it.

    A download that stopped continues where it was when you run the command again. Hashes are
    checked where they are known. Nothing in an archive is written outside DIRECTORY; a damaged or
    hostile archive leaves nothing behind.

    Example: arrowhead fetch imagenette-160 photos
    """
    from arrowhead.commands import fetch as commands_fetch

    screen = Screen(to_stderr=output.json)
    if list_names or source is None:
        return _list_datasets(source, screen, output)
    if directory is None:
        raise ConfigError(
            "No folder is given.",
            "what to fetch, and a folder for it.",
            f"add one, for example: {program()} fetch {source} photos",
        )
    directory = check_output_folder(directory, "data")
    if directory.resolve() == Path.cwd():
        raise ConfigError(
            f"{directory} is your working directory.",
            "a folder of its own for what comes from the network.",
            "give a folder inside, such as photos.",
        )
    result = commands_fetch.fetch(source, directory, fetching, screen)
    show_next_commands(screen, [[program(), "fit", result["data"], "out"]])
    return finish(result, output)


def _list_datasets(source: str | None, screen: Screen, output: Output) -> int:
    if source is not None:
        raise ConfigError("--list with something to fetch.", "one of the two.", "leave one out.")
    rows: list[dict[str, Any]] = []
    for one in DATASETS.values():
        screen.print(f"{one.name}  {one.size / 1e6:,.0f} MB")
        screen.print(f"  {one.description}")
        screen.print(f"  terms: {one.terms} ({one.page})")
        urls = [archive.url for archive in one.archives]
        fields = {"name": one.name, "description": one.description, "bytes": one.size}
        rows.append(fields | {"terms": one.terms, "page": one.page, "urls": urls})
    show_next_commands(screen, [[program(), "fetch", "imagenette-160", "photos"]])
    return finish({"datasets": rows}, output)
