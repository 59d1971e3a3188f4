"""Run a function on N workers: in this process, or in a Ray Train worker group.

    stage(worker, *args)     an ordinary function; args are small plain values and paths
      -> workers 0           a plain call in this process, without Ray
      -> workers N           one Ray Train worker per GPU or CPU, connected by gloo or nccl
      -> workers MIN:MAX     as many of these as the cluster has room for
      -> rank 0's result

Workers take tasks (chunk numbers) from a queue, so a slow worker does not delay the others. Their
reports reach the driver while they run; only the driver writes to the screen and to MLflow. When a
worker dies, the group starts again with the tasks not yet reported as done (`task` in a report).
When Ray itself dies, LostError says how to continue. A machine that stops answering, and workers
waiting for free resources, produce a `warning` report long before Ray says anything. A draining
machine (one that will be taken away) gets no more tasks; the other machines continue.

What workers measure goes to Prometheus where the cluster is scraped. Each process sends its numbers
to the Ray of its machine every ten seconds and when it ends, so `kill -9` loses the last of them.
They are for monitoring; results count only what is reported.

A stage that can resume saves checkpoints (`worker.save_checkpoint`). Whenever the group starts
again, the stage starts from its beginning on all ranks and looks for the newest checkpoint itself.
Ray Train is told about each checkpoint, but its own record of them is never read: every start of a
group has its own attempt folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arrowhead.runtime import local, ray_train
from arrowhead.runtime.ray_cluster import LaunchConfig
from arrowhead.runtime.worker import Report


def run(
    stage: Callable[..., Any],
    *args: Any,
    config: LaunchConfig = LaunchConfig(),
    tasks: list[int] | None = None,
    on_report: Callable[[Report], None] = lambda report: None,
    checkpoint_dir: Path | None = None,
    on_start: Callable[[int], None] = lambda workers: None,
    labels: dict[str, str] | None = None,
) -> Any:
    """Run `stage(worker, *args)` on every worker.

    Args:
        stage: An ordinary function; its first argument is the `Worker`.
        args: Further arguments of `stage`. Paths are made absolute.
        config: Where to run, and on how many workers.
        tasks: Numbers handed out by `worker.next_task`.
        on_report: Called in this process with every report, in order of arrival.
        checkpoint_dir: Where `worker.save_checkpoint` saves, on a disk that all workers share.
            Without one, checkpoints are deleted when this call ends.
        on_start: Called with the number of workers whenever a group starts.
        labels: Labels of everything that workers measure.

    Returns:
        What `stage` returned on rank 0.
    """
    # Ray starts workers in a directory of its own.
    args = tuple(arg.absolute() if isinstance(arg, Path) else arg for arg in args)
    with tempfile.TemporaryDirectory(
        prefix="arrowhead-run-", ignore_cleanup_errors=True
    ) as scratch:  # Ray Train always needs a storage folder
        checkpoint_dir = checkpoint_dir.absolute() if checkpoint_dir else Path(scratch)
        if config.max_workers == 0:
            on_start(1)
            return stage(local.local_worker(tasks or [], on_report, checkpoint_dir), *args)
        return ray_train.run_on_ray(
            stage, args, config, tasks or [], on_report, checkpoint_dir, on_start, labels or {}
        )
