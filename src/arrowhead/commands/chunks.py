"""Run a stage over the chunks of a catalog, and add up what its workers report."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

from arrowhead.features import extract
from arrowhead.features.store import Store
from arrowhead.reporting import run_context, scoring, training
from arrowhead.reporting.progress import ProgressRecorder, WorkTotals
from arrowhead.reporting.run_context import RunContext
from arrowhead.runtime import launch


def list_faults(store: Store, max_faults: int = 1000) -> list[dict[str, str]]:
    """Path and fault of the first images that could not be read."""
    faults = [
        {"path": path, "fault": fault}
        for rows in store.shards()
        for path, fault in zip(rows.paths, rows.faults, strict=True)
        if fault
    ]
    return faults[:max_faults]


def run_chunks(
    stage: Callable[..., Any],
    args: tuple[Any, ...],
    tasks: list[int],
    total: int,
    done_before: int,
    title: str,
    context: RunContext,
) -> WorkTotals:
    """Run a stage on all workers, with a progress bar.

    Args:
        stage: Takes chunks with `worker.next_task` until there are none.
        args: Arguments of the stage after the worker.
        tasks: Numbers of the chunks to do.
        total: Images in these chunks.
        done_before: Images in the other chunks, which are done.
        title: Of the progress bar and the measurements.
        context: Where to run, show and record.
    """
    work = WorkTotals()
    if not tasks:
        return work
    progress = ProgressRecorder(context.run, work, done_before, done_before + total)
    with context.screen.bar(title, total) as advance:

        def on_report(report: dict[str, Any]) -> None:
            if "restart" in report:
                training.show_restart(report, context.screen)
            elif "warning" in report:
                context.screen.print(report["warning"])
            elif "drift" in report:
                if work.drift is None:  # shown once: the others are equal, or end with an error
                    scoring.show_drift(report["drift"], context.screen)
                work.drift = max(work.drift or {}, report["drift"], key=_drift_size)
            else:
                work.add(report)
                faults = sum(report["faults"].values())
                advance(report["files"], faults, extract.bottleneck(work.seconds))
                progress.record_if_due()

        def on_start(workers: int) -> None:
            work.workers = workers

        start = perf_counter()
        launch.run(
            stage,
            *args,
            config=context.launch,
            tasks=tasks,
            on_report=on_report,
            on_start=on_start,
            labels=run_context.metric_labels(context, title),
        )
        work.seconds["workers"] = perf_counter() - start
    progress.record()
    return work


def _drift_size(drift: dict[str, Any]) -> tuple[int, float]:
    return drift.get("changed", -1), drift.get("feature", -1.0)
