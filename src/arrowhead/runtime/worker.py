"""The worker that a stage runs on: its rank, device, tasks, and how it reports."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Report = dict[str, Any]
Measure = Callable[..., None]
SaveCheckpoint = Callable[[Path | None, str], None]


def _discard_checkpoint(draft: Path | None, name: str) -> None:
    """Save nothing: the default of a worker without a checkpoint directory."""
    if draft is not None:
        shutil.rmtree(draft)


def _ignore_measurement(name: str, value: float, **labels: str) -> None:
    """Measure nothing: without a cluster no Ray passes the numbers on."""


@dataclass(frozen=True, slots=True)
class Worker:
    """What a stage knows about the process it runs in.

    Attributes:
        rank: This worker's number, 0 to world_size - 1.
        world_size: Number of workers in the group.
        device: "cpu" or "cuda:K".
        threads: CPU threads the stage may use.
        next_task: Returns the next task's number, None when no task is left.
        report: Sends one small dict of plain values to the driver.
        save_checkpoint: Called as `save_checkpoint(draft, name)` by all ranks together. Moves the
            finished folder `draft` to `name` in the checkpoint directory. Rank 0 passes the folder,
            which must lie on the same disk as that directory; the others pass None.
        measure: Called as `measure(name, value, **labels)`. Publishes a number for those who watch
            the cluster, see `meters.METRICS`.
    """

    rank: int
    world_size: int
    device: str
    threads: int
    next_task: Callable[[], int | None]
    report: Callable[[Report], None]
    save_checkpoint: SaveCheckpoint = _discard_checkpoint
    measure: Measure = _ignore_measurement
