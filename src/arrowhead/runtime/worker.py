"""What a stage is given: its rank, device, tasks, and where it reports."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Report = dict[str, Any]
Measure = Callable[..., None]
SaveCheckpoint = Callable[[Path | None, str], None]


def _forget(draft: Path | None, name: str) -> None:
    """Keep nothing: what a worker does that nobody gave a place."""
    if draft is not None:
        shutil.rmtree(draft)


def _unmeasured(name: str, value: float, **labels: str) -> None:
    """Measure nothing: there is no cluster whose Ray would pass it on."""


@dataclass(frozen=True, slots=True)
class Worker:
    """What a stage knows of where it runs.

    device: cpu or cuda:K; threads: CPU threads it may use; next_task: the next task's number, None
    when all are taken; report: sends one small dict of plain values to the driver.

    save_checkpoint(draft, name): all ranks together give the finished folder `draft` its name below
    the place of checkpoints; rank 0 passes the folder, which must lie on the place's disk, the
    others None.

    measure(name, value, **labels): a number for whoever watches the cluster, see `MEASURES`.
    """

    rank: int
    world: int
    device: str
    threads: int
    next_task: Callable[[], int | None]
    report: Callable[[Report], None]
    save_checkpoint: SaveCheckpoint = _forget
    measure: Measure = _unmeasured
