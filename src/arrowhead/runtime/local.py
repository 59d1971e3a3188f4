"""The only worker: this process, without Ray."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from arrowhead import fileio
from arrowhead.runtime.task_queue import TaskQueue
from arrowhead.runtime.worker import Report, Worker


def local_worker(tasks: list[int], listen: Callable[[Report], None], place: Path) -> Worker:
    """The only worker, which is this process."""
    import torch

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    threads = len(os.sched_getaffinity(0))
    next_task, save_checkpoint = TaskQueue(tasks).next_task, partial(_save_checkpoint_here, place)
    return Worker(0, 1, device, threads, next_task, listen, save_checkpoint)


def _save_checkpoint_here(place: Path, draft: Path | None, name: str) -> None:
    if draft is not None:
        place.mkdir(parents=True, exist_ok=True)
        fileio.put_in_place(draft, place / name)
