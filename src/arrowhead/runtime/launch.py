"""A function onto N workers: in this process, or a Ray Train worker group.

    stage(worker, *args)     an ordinary function; args are small plain values and paths
      -> workers 0           a plain call in this process, without Ray
      -> workers N           one Ray Train worker per GPU or CPU; gloo or nccl between them
      -> workers MIN:MAX     as many of these as the cluster has room for
      -> rank 0's result

Tasks (chunk numbers) are claimed one by one, not dealt, so a slow worker holds nobody up. What
workers report reaches the driver while they run; only the driver talks to people and to MLflow.
When a worker dies the group is started again with the tasks that were not reported as done (`task`
in a report). When Ray itself dies, LostError says how to go on. A machine that no longer answers,
and room that is waited for, are told long before Ray says anything (`warning` in a report). A
machine that is announced to go (a spot machine, a drain) is given no more tasks; the others go on.

What workers measure goes to Prometheus, where the cluster is scraped: each process gives its
numbers to the Ray of its machine every ten seconds and when it ends, so `kill -9` costs the last of
them. They are for watching; what counts is what is reported.

A stage that wants to go on in its middle keeps checkpoints (`worker.save_checkpoint`); it is
started anew, on all ranks, whenever the group is, and looks for the newest one itself. Ray Train is
told of each, but what it notes is never read again: every start of a group has an attempt's folder
of its own.
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
    listen: Callable[[Report], None] = lambda report: None,
    place: Path | None = None,
    sized: Callable[[int], None] = lambda workers: None,
    labels: dict[str, str] | None = None,
) -> Any:
    """Run `stage(worker, *args)` on every worker; rank 0's return value.

    tasks: the numbers that workers claim. listen: gets every report, here, in order of arrival.
    place: the folder that `worker.save_checkpoint` fills, on a disk that all workers share; without
    one, what is kept lives as long as this call. sized: told how many workers there are, at every
    start.
    labels: what all that is measured is marked with.
    """
    # Workers start in a directory of Ray's own.
    args = tuple(arg.absolute() if isinstance(arg, Path) else arg for arg in args)
    with tempfile.TemporaryDirectory(
        prefix="arrowhead-run-", ignore_cleanup_errors=True
    ) as scratch:  # Ray Train always wants storage
        place = place.absolute() if place else Path(scratch)
        if config.most == 0:
            sized(1)
            return stage(local.local_worker(tasks or [], listen, place), *args)
        return ray_train.on_ray(
            stage, args, config, tasks or [], listen, place, sized, labels or {}
        )
