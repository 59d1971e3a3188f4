"""The command advise."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from arrowhead.cli.app import finish, program, run_context, show_next_commands, show_written
from arrowhead.cli.options import Launch, Out, Output, StorePath, Tracking
from arrowhead.cli.stage_options import Advise, LabelSource, ReadSource
from arrowhead.commands.advise_config import AdviseConfig
from arrowhead.data import remote_folder, sources
from arrowhead.features.store import Store
from arrowhead.output_paths import check_output_folder
from arrowhead.runtime.ray_cluster import LaunchConfig
from arrowhead.tracking.client import TrackingConfig


def advise(
    store: StorePath,
    data: Annotated[
        str | None,
        Parameter(
            help="The images of the store, if they are not any more where they were when it was"
            " made: a folder, a table …, as for `fit`."
        ),
    ] = None,
    *,
    out: Annotated[
        Path | None,
        Parameter(
            help="Folder for the trials and advice.json. Default: STORE.advice, beside the store."
        ),
    ] = None,
    advise: Advise = AdviseConfig(),
    source: LabelSource = ReadSource(),
    launch: Launch = LaunchConfig(),
    tracking: Tracking = TrackingConfig(),
    output: Out = Output(),
) -> int:
    """Say what to do with your data: frozen head, cached views, fine-tuning or more labels.

    Heads are trained on growing shares of the store, each tested on images that it has not seen.
    A sample of the images is augmented and fine-tuned, too. The table shows accuracy with its 95 %
    interval and what each way costs on all images; the last line is the advice.

    Example: arrowhead advise out/store --budget 20
    """
    from arrowhead.commands import advise as commands_advise
    from arrowhead.reporting import advice, extraction

    Store(store := remote_folder.local(store))
    out = check_output_folder(out or store.with_name(f"{store.name}.advice"), "results")
    for part in ("views", "pixels"):
        check_output_folder(out / part, "store")
    catalog = sources.labelled_catalog(data, source) if data else None
    with run_context("advise", launch, tracking, output) as context:
        extraction.show_store(store, context.screen)
        result = commands_advise.advise(store, catalog, out, advise, context)
        for line in advice.table(result["options"]):
            context.screen.print(line)
        context.screen.print(result["advice"])
        result["files"] = show_written(context.screen, [out / commands_advise.RESULT])
        images = data or Store(store).read_catalog()["root"]
        show_next_commands(context.screen, [_next(result["choice"], store, images)])
    return finish(result, output)


def _next(choice: str, store: Path, data: str) -> list[Any]:
    """The command that follows the advice."""
    if choice == "frozen head":
        return [program(), "train", store, "BUNDLE"]
    if "views" in choice:
        return [program(), "fit", data, "OUT", "--views", choice.partition(" ")[0]]
    return [program(), "finetune", data, "OUT"]
