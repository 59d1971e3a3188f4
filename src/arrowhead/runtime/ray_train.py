"""Run a stage on a group of Ray Train workers, and start the group again after a loss.

Ray Train's own FailureConfig cannot tell a lost worker from a refusal, continues no task queue, and
leaves half a checkpoint when its copy is killed; so Arrowhead has a loop of its own here.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import Any

from arrowhead import fileio
from arrowhead.errors import ConfigError
from arrowhead.runtime import health, ray_cluster, ray_private, signals
from arrowhead.runtime.health import HealthMonitor
from arrowhead.runtime.meters import Meters
from arrowhead.runtime.ray_cluster import LaunchConfig
from arrowhead.runtime.task_queue import TaskQueue
from arrowhead.runtime.worker import Report, Worker

ATTEMPT_PREFIX = "attempt-"
GIVE_UP_SECONDS = 90.0  # after this Ray has given up a machine that does not answer


def run_on_ray(
    stage: Callable[..., Any],
    args: tuple[Any, ...],
    config: LaunchConfig,
    tasks: list[int],
    on_report: Callable[[Report], None],
    checkpoint_dir: Path,
    on_start: Callable[[int], None],
    labels: dict[str, str],
) -> Any:
    """Run a stage on a worker group; start the group again if a worker is lost.

    Args and return value are those of `launch.run`.

    Raises:
        LostError: Workers were lost more than `config.restarts` times, Ray died, or the cluster had
            no room for the workers for `config.wait` seconds.
    """
    unfinished = list(tasks)

    def handle(report: Report) -> None:
        if report.keys() == {"workers"}:
            on_start(report["workers"])
            return
        if report.get("task") in unfinished:
            unfinished.remove(report["task"])
        on_report(report)

    ray_cluster.connect(config)
    monitor, restarts = HealthMonitor(config, handle), 0
    while True:
        try:
            with monitor.watch():
                result = _run_group(
                    stage, args, config, unfinished, monitor, checkpoint_dir, labels
                )
            if not (unfinished and monitor.leaving):
                return result
            on_report({"restart": "Every machine with workers will be taken away"})
        except _NoCapacityError:
            continue  # until the monitor raises LostError
        except _WorkerLostError as error:
            restarts += not monitor.leaving
            if restarts > config.restarts:
                reason = f"{str(error).rstrip('.')}. It was started again {config.restarts} times."
                raise health.lost_error(reason) from error
            on_report({"restart": str(error)})
        _wait_for_unreachable_nodes(on_report)


def _run_group(
    stage: Callable[..., Any],
    args: tuple[Any, ...],
    config: LaunchConfig,
    tasks: list[int],
    monitor: HealthMonitor,
    checkpoint_dir: Path,
    labels: dict[str, str],
) -> Any:
    """Run one worker group, from its start to its end."""
    import ray

    draining = monitor.draining
    queue = ray.remote(num_cpus=0, scheduling_strategy=ray_cluster.on_this_node())(
        TaskQueue
    ).remote(tasks, draining)
    # Never an old name: Ray would read its own files there, which a kill may have corrupted.
    attempt = f"{ATTEMPT_PREFIX}{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
    _remove_empty_attempts(checkpoint_dir)
    train_function = _train_function(queue, stage, args, checkpoint_dir / attempt, labels)

    def forward() -> None:
        nonlocal draining
        if monitor.draining != draining:
            draining = monitor.draining
            queue.set_draining.remote(draining)
        for report in ray.get(queue.take_reports.remote()):
            monitor.handle(report)

    future = _run_in_thread(
        lambda: _fit(train_function, ray_cluster.worker_count(config), checkpoint_dir, attempt)
    )
    ends_with_us = False  # a private Ray, after an interrupt
    try:
        while not future.done():
            if ray_cluster.is_dead():
                raise health.lost_error("The Ray that ran this command has died.")
            wait([future], timeout=0.25)
            with contextlib.suppress(ray.exceptions.RayError):
                forward()
            monitor.flush()
        return future.result()
    except ray.exceptions.RayError as error:
        if ray_cluster.is_dead():
            raise health.lost_error("The Ray that ran this command has died.") from error
        raise _WorkerLostError(health.error_line(error, 0)) from error
    except signals.Interrupted:
        ends_with_us = ray_cluster.is_private()
        raise
    finally:
        if not (ends_with_us or ray_cluster.is_dead()):
            _clean_up(forward, queue, monitor)
        _remove_empty_attempts(checkpoint_dir)


def _run_in_thread(function: Callable[[], Any]) -> Future[Any]:
    """Call Ray in a thread: if Ray has died, a call blocks for a minute and then ends the process.

    Not with a ThreadPoolExecutor, because Python waits for its threads when it exits.
    """
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _train_function(
    queue: Any,
    stage: Callable[..., Any],
    args: tuple[Any, ...],
    attempt: Path,
    labels: dict[str, str],
) -> Callable[[dict[str, Any]], Any]:
    """The function that Ray Train runs on every worker of a group."""

    def train_function(_: dict[str, Any]) -> Any:
        import ray
        import ray.train
        import ray.train.collective
        import ray.train.torch
        import torch

        context, node = ray.train.get_context(), ray.get_runtime_context().get_node_id()
        worker = Worker(
            rank=context.get_world_rank(),
            world_size=context.get_world_size(),
            device=str(ray.train.torch.get_device()),
            threads=torch.get_num_threads(),
            next_task=lambda: ray.get(queue.next_task.remote(node)),
            report=lambda message: ray.get(queue.report.remote(message)),
            save_checkpoint=partial(_save_checkpoint, attempt),
            measure=Meters(labels),
        )
        # Ray calls this again on all ranks when it resizes the group. Nobody may take a task
        # before the queue has started with the new group.
        if worker.rank == 0:
            ray.get(queue.start_group.remote(worker.world_size))
        ray.train.collective.barrier()
        with health.heartbeats(queue, worker.rank):
            return stage(worker, *args)

    return train_function


def _save_checkpoint(attempt: Path, draft: Path | None, name: str) -> None:
    """Move rank 0's draft into the attempt's folder, and tell Ray Train on all ranks."""
    import ray.train

    if draft is not None and not attempt.is_dir():
        raise ConfigError(
            f"{attempt.parent} on {socket.gethostname()} is not the folder that the command sees.",
            "a checkpoint folder on a disk that all machines share.",
            "write to a shared folder, or run with --workers 0.",
        )

    def move(source: Any, name: str) -> Any:
        # Ray copies file by file and does not flush: after a kill half a checkpoint remains.
        fileio.replace_folder(Path(source.path), attempt / name)
        return ray.train.Checkpoint.from_directory(attempt / name)

    ray.train.report(
        {},
        checkpoint=None if draft is None else ray.train.Checkpoint.from_directory(draft),
        checkpoint_dir_name=name,
        checkpoint_upload_fn=move,
    )


def _clean_up(forward: Callable[[], None], queue: Any, monitor: HealthMonitor) -> None:
    """Forward the last reports and free the resources of a group.

    Not called after an interrupt if Ray is private: whoever stops a service also stops Ray's
    processes (systemd, scancel). Once they are gone, Ray ends a process that calls it, and the
    MLflow run would stay RUNNING.
    """
    import ray

    with contextlib.suppress(ray.exceptions.RayError):
        forward()
        ray.kill(queue)
    with contextlib.suppress(ray.exceptions.RayError):
        ray_cluster.remove_placement_groups(monitor.own_placement_groups())


def _wait_for_unreachable_nodes(on_report: Callable[[Report], None]) -> None:
    """After a loss, wait until Ray has given up all machines that do not answer.

    If the group started earlier, Ray would place it on these machines and wait for them.
    """
    deadline, reported = time.monotonic() + GIVE_UP_SECONDS, ""
    while (
        not ray_cluster.is_dead()
        and (hosts := ", ".join(ray_cluster.unreachable_nodes()))
        and time.monotonic() < deadline
    ):
        if hosts != reported:
            on_report({"warning": f"{hosts} does not answer: waiting until Ray gives it up"})
        reported = hosts
        time.sleep(0.5)
    ray_cluster.refresh_resources()


def _remove_empty_attempts(checkpoint_dir: Path) -> None:
    """Remove attempt folders that hold only Ray's own files."""
    for attempt in checkpoint_dir.glob(f"{ATTEMPT_PREFIX}*"):
        if attempt.is_dir() and not any(path.is_dir() for path in attempt.iterdir()):
            shutil.rmtree(attempt, ignore_errors=True)


def _fit(
    train_function: Callable[[dict[str, Any]], Any],
    workers: int | tuple[int, int],
    storage: Path,
    name: str,
) -> Any:
    """Run the function with Ray Train on a group of this size; rank 0's return value."""
    import logging

    import ray.train

    logging.getLogger("ray.train").setLevel(logging.WARNING)
    minimum = workers if isinstance(workers, int) else workers[0]
    use_gpu = ray_cluster.gpus() >= minimum
    try:
        trainer = ray_private.fast_starting_trainer(ray_cluster.is_private())(
            train_function,
            train_loop_config={},
            scaling_config=ray.train.ScalingConfig(
                num_workers=workers,
                use_gpu=use_gpu,
                resources_per_worker={"CPU": 1} | ({"GPU": 1} if use_gpu else {}),
            ),
            backend_config=ray_private.torch_backend("nccl" if use_gpu else "gloo"),
            # Ray keeps all checkpoints: if it deleted some, its controller would fail on those that
            # `checkpoint.prune` has already removed.
            run_config=ray.train.RunConfig(
                storage_path=str(storage),
                name=name,
                failure_config=ray.train.FailureConfig(
                    # Resources for an elastic group may be gone before Ray takes them. Ray would
                    # wait for them forever; instead `run_on_ray` counts the resources again.
                    controller_failure_limit=-1 if isinstance(workers, int) else 0,
                    # Likewise after a preemption: Ray counts on a draining machine to the end.
                    max_preemption_failures=0,
                ),
            ),
        )
        return trainer.fit().return_value
    except ray.train.TrainingFailedError as error:
        raise _cause(error) from None


class _WorkerLostError(RuntimeError):
    """A worker process or its machine is gone."""


class _NoCapacityError(RuntimeError):
    """Ray found no resources for the workers in time."""


def _cause(error: Any) -> BaseException:
    """What happened: a lost worker, or the exception of the stage inside Ray's own."""
    failures = dict(getattr(error, "worker_failures", {}))
    for rank, failure in failures.items():
        if type(failure).__name__.startswith("WorkerHealthCheck"):  # a private class of Ray
            address = re.search("node_ip='([^']*)'", str(failure))
            host = f" on {address[1]}" if address else ""
            reason = health.error_line(failure, -1)
            return _WorkerLostError(f"Worker {rank}{host} is gone: {reason}")
    if not failures:  # Ray's controller failed, or a machine was taken away
        if type(error).__name__ == "PreemptionError":
            return _WorkerLostError("A machine was taken away, as announced")
        inner = getattr(error, "controller_failure", error)
        if type(inner).__name__ == "WorkerGroupStartupTimeoutError":
            return _NoCapacityError(str(inner))
        return _WorkerLostError(health.error_line(inner, -1))
    failure = next(iter(failures.values()))
    inner = getattr(failure, "_base_exc", None) or getattr(failure, "cause", None)
    return inner or failure  # type: ignore[no-any-return]
