"""The command examine: a report to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from arrowhead.bundle import resolve
from arrowhead.cli.app import finish, run_context, show_written
from arrowhead.cli.options import BundleAddress, Out, Output, StorePath, Tracking
from arrowhead.cli.stage_options import Examine
from arrowhead.data import remote_folder
from arrowhead.examine.config import ExamineConfig
from arrowhead.features.store import Store
from arrowhead.runtime.ray_cluster import LaunchConfig
from arrowhead.tracking.client import TrackingConfig


def examine(
    store: StorePath,
    bundle: BundleAddress,
    out: Annotated[
        Path, Parameter(help="Folder or URI for the report; an existing one is replaced.")
    ],
    *,
    config: Examine = ExamineConfig(),
    tracking: Tracking = TrackingConfig(),
    output: Out = Output(),
) -> int:
    """Show what the model got wrong and what the labels got wrong: a page to open in a browser.

    Writes OUT/report.html, one file with pictures, mistakes by class, curves and a map of the
    images; OUT/figures with the charts, and OUT/tables with all predictions as CSV and Parquet.
    Most of it comes from the stored features; originals are read at a small size, to show them and
    to compare them. `fit` and `train` write such a report beside the bundle (BUNDLE.report).

    Example: arrowhead examine out/store out/bundle report/
    """
    from arrowhead.commands import examine as commands_examine

    Store(store := remote_folder.local(store))
    out = remote_folder.check_output(out, "report")
    resolve.check_exists(bundle)
    with run_context("examine", LaunchConfig(), tracking, output) as context:
        result = commands_examine.examine(store, bundle, out, config, context, tracking)
        names = ("report.html", "figures", "tables", "report.json")
        result["files"] = show_written(context.screen, [out / name for name in names])
    return finish(result, output)
