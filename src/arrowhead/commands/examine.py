"""The command examine: the report of a bundle on a store, also written by fit and train."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from arrowhead import fileio
from arrowhead.bundle import resolve
from arrowhead.data import remote_folder
from arrowhead.errors import Refusal
from arrowhead.examine.config import ExamineConfig
from arrowhead.examine.report import Report
from arrowhead.features.store import Store
from arrowhead.reporting.run_context import RunContext
from arrowhead.tracking.client import TrackingConfig
from arrowhead.wording import shell_command

# With more images, the report of a training leaves these out: they would take minutes.
MAX_LABEL_ERROR_IMAGES, MAX_DUPLICATE_IMAGES = 20_000, 3_000


def examine(
    store: Path,
    address: str | Path,
    out: Path,
    config: ExamineConfig,
    context: RunContext,
    tracking: TrackingConfig = TrackingConfig(),
) -> dict[str, Any]:
    """Write the report of a bundle on the images of a store.

    Args:
        store: The store.
        address: The bundle (see `resolve.bundle_folder`).
        out: The folder of the report, which is replaced as a whole.
        config: What the report contains.
        context: Where to show and record. The report is also logged with the run that trained the
            bundle, if the tracking store has it.
        tracking: The tracking store of a bundle in MLflow.

    Returns:
        The report's summary (see `Report.write`), `report`: the page, and the run ids.
    """
    with (
        tempfile.TemporaryDirectory(prefix="arrowhead-bundle-") as scratch,
        fileio.atomic_folder(out) as folder,
    ):
        bundle = resolve.bundle_folder(str(address), tracking, Path(scratch))
        report = Report(store, bundle, config, str(address), out, context.screen.print_status)
        result = report.write(folder)
    remote_folder.of(out).publish("report.json")
    for finding in [*result["first"], *result["also"]]:
        context.screen.print(finding)
    run_id = None
    if context.run:
        context.run.record(result["metrics"])
        trained = report.bundle.lineage.get("run_id")
        knows = trained is not None and context.run.store_has_run(trained)
        run_id = trained if knows else None
        context.run.tags({"bundle": result["bundle_fingerprint"], "trained_by": str(trained)})
        context.run.log_artifact(out, "report", run_id=run_id)
    return result | {
        "report": str(out / "report.html"),
        "run_id": context.run.run_id if context.run else None,
        "attached_to": run_id,
    }


def report_of_training(store: Path, bundle: Path, context: RunContext) -> str | None:
    """Write the report of a new bundle beside it, as BUNDLE.report; returns the page's path.

    The training is done and saved: if the report cannot be written, a line says so, and None is
    returned.
    """
    out = report_folder(bundle)
    command = shell_command(["arrowhead", "examine", store, bundle, out])
    try:
        with fileio.atomic_folder(remote_folder.check_output(out, "report")) as folder:
            config, print_status = _quick(store), context.screen.print_status
            report = Report(store, bundle, config, str(bundle), out, print_status)
            result = report.write(folder)
        remote_folder.of(out).publish("report.json")
    except Refusal as refusal:
        context.screen.print(f"no report: {refusal.found} Do: {refusal.do}")
        return None
    except Exception as error:
        context.screen.print(
            f"no report: {type(error).__name__}: {error}. The bundle is complete; to see the whole"
            f" error: {command}"
        )
        return None
    for finding in [*result["first"], *result["also"]]:
        context.screen.print(finding)
    if context.root_run:
        context.root_run.log_artifact(out, "report")
    return str(out / "report.html")


def _quick(store: Path) -> ExamineConfig:
    """What the report of a training contains: with many images not what takes minutes."""
    images = sum(shard["files"] for shard in Store(store).manifest()["shards"])
    return ExamineConfig(
        label_errors=images <= MAX_LABEL_ERROR_IMAGES, duplicates=images <= MAX_DUPLICATE_IMAGES
    )


def report_folder(bundle: Path) -> Path:
    """Where fit and train write the report of a bundle."""
    return bundle.with_name(f"{bundle.name}.report")
