"""The only worker of a run without Ray: this process."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from arrowhead import fileio
from arrowhead.runtime.task_queue import TaskQueue
from arrowhead.runtime.worker import Report, Worker


def local_worker(
    tasks: list[int], on_report: Callable[[Report], None], checkpoint_dir: Path
) -> Worker:
    """This process as the only worker, on the first GPU if there is one."""
    import torch

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    threads = len(os.sched_getaffinity(0))
    save_checkpoint = partial(_save_checkpoint, checkpoint_dir)
    return Worker(0, 1, device, threads, TaskQueue(tasks).next_task, on_report, save_checkpoint)


def _save_checkpoint(checkpoint_dir: Path, draft: Path | None, name: str) -> None:
    if draft is not None:
        checkpoint_dir.mkdir(parents=True, exist_ok=True)
        fileio.replace_folder(draft, checkpoint_dir / name)
