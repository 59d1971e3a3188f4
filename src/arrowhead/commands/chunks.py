"""Chunks of a catalog given to workers, and their reports added up."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

from arrowhead.features import extract
from arrowhead.features.store import Store
from arrowhead.reporting import run_context, scoring, training
from arrowhead.reporting.progress import Progress, Work
from arrowhead.reporting.run_context import RunContext
from arrowhead.runtime import launch


def fault_list(store: Store, most: int = 1000) -> list[dict[str, str]]:
    """Path and fault of the first `most` images that could not be read."""
    found = [
        {"path": path, "fault": fault}
        for rows in store.shards()
        for path, fault in zip(rows.paths, rows.faults, strict=True)
        if fault
    ]
    return found[:most]


def run_chunks(
    stage: Callable[..., Any],
    args: tuple[Any, ...],
    tasks: list[int],
    total: int,
    there: int,
    title: str,
    context: RunContext,
) -> Work:
    """Run a chunk-claiming stage on all workers, shown as one bar. total: images in these tasks;
    there: images of the others, which are done.
    """
    done = Work()
    if not tasks:
        return done
    progress = Progress(context.run, done, there, there + total)
    with context.screen.bar(title, total) as advance:

        def listen(message: dict[str, Any]) -> None:
            if "restart" in message:
                training.say_restart(message, context.screen)
                return
            if "warning" in message:
                context.screen.say(message["warning"])
                return
            if "drift" in message:
                if done.drift is None:  # the others are machines like this one, or refuse
                    scoring.say_drift(message["drift"], context.screen)
                done.drift = max(done.drift or {}, message["drift"], key=_far)
                return
            done.add(message)
            faults = sum(message["faults"].values())
            advance(message["files"], faults, extract.bottleneck(done.seconds))
            progress()

        def sized(workers: int) -> None:
            done.workers = workers

        began = perf_counter()
        launch.run(
            stage,
            *args,
            config=context.launch,
            tasks=tasks,
            on_report=listen,
            on_start=sized,
            labels=run_context.labels(context, title),
        )
        done.seconds["workers"] = perf_counter() - began
    progress.now()
    return done


def _far(drift: dict[str, Any]) -> tuple[int, float]:
    return drift.get("changed", -1), drift.get("feature", -1.0)
