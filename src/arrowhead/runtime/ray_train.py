"""A stage on a group of Ray Train workers, started again after a loss."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
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


def _save_checkpoint_in_group(draft: Path | None, name: str) -> None:
    """Rank 0 names its folder, and Ray Train, which needs to hear it of all ranks, is told."""
    import ray.train

    attempt = Path(ray.train.get_context().get_storage().experiment_fs_path)
    if draft is not None and not attempt.is_dir():
        raise ConfigError(
            f"{attempt.parent} on {socket.gethostname()} is not the folder that the command sees.",
            "a place for checkpoints on a disk that all machines share.",
            "write to a shared folder, or run with --workers 0.",
        )

    def settle(written: Any, name: str) -> Any:
        # Ray's own way copies file by file and flushes nothing: a kill leaves half a checkpoint.
        fileio.put_in_place(Path(written.path), attempt / name)
        return ray.train.Checkpoint.from_directory(attempt / name)

    ray.train.report(
        {},
        checkpoint=None if draft is None else ray.train.Checkpoint.from_directory(draft),
        checkpoint_dir_name=name,
        checkpoint_upload_fn=settle,
    )


def run_on_ray(
    stage: Callable[..., Any],
    args: tuple[Any, ...],
    config: LaunchConfig,
    tasks: list[int],
    listen: Callable[[Report], None],
    place: Path,
    sized: Callable[[int], None],
    labels: dict[str, str],
) -> Any:
    """Run on a worker group, and again with what is left to do when a worker was lost."""
    left = list(tasks)

    def hear(report: Report) -> None:
        if report.keys() == {"workers"}:
            sized(report["workers"])
            return
        if report.get("task") in left:
            left.remove(report["task"])
        listen(report)

    ray_cluster.connect(config)
    monitor, restarts = HealthMonitor(config, hear), 0
    while True:
        try:
            with monitor.watch():
                result = _group(stage, args, config, left, monitor, place, labels)
            if not (left and monitor.leaving):
                return result
            listen({"restart": "Every machine that had workers is announced to go"})
        except _NoRoomError:
            continue  # `lookout` ends this
        except _WorkerGoneError as gone:
            restarts += not monitor.leaving
            if restarts > config.restarts:
                said = f"{str(gone).rstrip('.')}. It was started again {config.restarts} times."
                raise health.lost_error(said) from gone
            listen({"restart": str(gone)})
        _settle(listen)


def _on_worker(
    queue: Any, stage: Callable[..., Any], args: tuple[Any, ...], labels: dict[str, str]
) -> Callable[[dict[str, Any]], Any]:
    """What Ray Train runs on every worker of a group."""

    def train_function(_: dict[str, Any]) -> Any:
        import ray
        import ray.train
        import ray.train.collective
        import torch

        context, node = ray.train.get_context(), ray.get_runtime_context().get_node_id()
        worker = Worker(
            rank=context.get_world_rank(),
            world_size=context.get_world_size(),
            device=str(ray.train.torch.get_device()),
            threads=torch.get_num_threads(),
            next_task=lambda: ray.get(queue.next_task.remote(node)),
            report=lambda message: ray.get(queue.report.remote(message)),
            save_checkpoint=_save_checkpoint_in_group,
            measure=Meters(labels),
        )
        # Ray starts this again, on all ranks, when it resizes the group: nobody may claim before
        # the desk knows.
        if worker.rank == 0:
            ray.get(queue.start_group.remote(worker.world_size))
        ray.train.collective.barrier()
        with health.heard(queue, worker.rank):
            return stage(worker, *args)

    return train_function


def _group(
    stage: Callable[..., Any],
    args: tuple[Any, ...],
    config: LaunchConfig,
    tasks: list[int],
    monitor: HealthMonitor,
    place: Path,
    labels: dict[str, str],
) -> Any:
    """One worker group, from its start to its end."""
    import ray

    going = monitor.going
    queue = ray.remote(num_cpus=0, scheduling_strategy=ray_cluster.beside_us())(TaskQueue).remote(
        tasks, going
    )
    train_function = _on_worker(queue, stage, args, labels)

    def pass_on() -> None:
        nonlocal going
        if monitor.going != going:
            going = monitor.going
            queue.set_draining.remote(going)
        for report in ray.get(queue.take_reports.remote()):
            monitor.hear(report)

    # Ray is waited for in a thread: where it has died it would hang for a minute, then end us.
    fitted: Future[Any] = Future()
    # Never an old name: Ray would read its own notes there, which a kill may have torn.
    attempt = f"{ATTEMPT}{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
    _sweep(place)

    def fit() -> None:
        try:
            fitted.set_result(_fit(train_function, ray_cluster.size(config), place, attempt))
        except BaseException as error:
            fitted.set_exception(error)

    threading.Thread(target=fit, daemon=True).start()
    ends = False  # a Ray of our own, with this process
    try:
        while not fitted.done():
            if ray_cluster.is_dead():
                raise health.lost_error("The Ray that ran this command has died.")
            wait([fitted], timeout=0.25)
            with contextlib.suppress(ray.exceptions.RayError):
                pass_on()
            monitor.tell()
        return fitted.result()
    except ray.exceptions.RayError as error:
        if ray_cluster.is_dead():
            raise health.lost_error("The Ray that ran this command has died.") from error
        raise _WorkerGoneError(health.line(error, 0)) from error
    except signals.Interrupted:
        ends = ray_cluster.is_own()
        raise
    finally:
        if not (ends or ray_cluster.is_dead()):
            _clean_up(pass_on, queue, monitor)
        _sweep(place)


def _clean_up(pass_on: Callable[[], None], queue: Any, monitor: HealthMonitor) -> None:
    """Take the last reports and give back what a group held.

    Not after an interrupt where Ray is our own: whoever stops a service tells Ray's processes, too
    (systemd, scancel). Once they are gone, Ray ends the process that asks it for anything, and its
    MLflow run would stay RUNNING.
    """
    import ray

    with contextlib.suppress(ray.exceptions.RayError):
        pass_on()
        ray.kill(queue)
    with contextlib.suppress(ray.exceptions.RayError):
        ray_cluster.give_back(monitor.own_placement_groups())


GIVE_UP_SECONDS = 90.0  # seconds after which Ray has given up a machine that does not answer


def _settle(listen: Callable[[Report], None]) -> None:
    """After a loss: wait until Ray counts on no machine that does not answer. Started earlier, the
    group would be given room there, and wait for it.
    """
    until, told = time.monotonic() + GIVE_UP_SECONDS, ""
    while (
        not ray_cluster.is_dead()
        and (deaf := ", ".join(ray_cluster.deaf()))
        and time.monotonic() < until
    ):
        if deaf != told:
            listen({"warning": f"{deaf} does not answer: waiting until Ray gives it up"})
        told = deaf
        time.sleep(0.5)
    ray_cluster.recount()


ATTEMPT = "attempt-"


def _sweep(place: Path) -> None:
    """Remove attempts' folders that hold nothing but Ray's notes."""
    for attempt in place.glob(f"{ATTEMPT}*"):
        if attempt.is_dir() and not any(inside.is_dir() for inside in attempt.iterdir()):
            shutil.rmtree(attempt, ignore_errors=True)


def _fit(
    train_function: Callable[[dict[str, Any]], Any],
    workers: int | tuple[int, int],
    storage: Path,
    name: str,
) -> Any:
    """Ray Train runs the function on a group of this size; rank 0's return value."""
    import logging

    import ray.train
    import ray.train.torch

    logging.getLogger("ray.train").setLevel(logging.WARNING)
    least = workers if isinstance(workers, int) else workers[0]
    on_gpu = ray_cluster.gpus() >= least
    try:
        trainer = ray_private.lean_trainer(ray_cluster.is_own())(
            train_function,
            train_loop_config={},
            scaling_config=ray.train.ScalingConfig(
                num_workers=workers,
                use_gpu=on_gpu,
                resources_per_worker={"CPU": 1} | ({"GPU": 1} if on_gpu else {}),
            ),
            torch_config=_joined_by("nccl" if on_gpu else "gloo"),
            # All checkpoints stay, as far as Ray goes: where it thins them out, its controller
            # fails on one that `checkpoint.prune` has removed before.
            run_config=ray.train.RunConfig(
                storage_path=str(storage),
                name=name,
                # Room for an elastic group may be gone before Ray takes it. Alone it would wait
                # for that room for ever; here the loop above counts again.
                failure_config=ray.train.FailureConfig(
                    controller_failure_limit=-1 if isinstance(workers, int) else 0,
                    # After a machine that was announced to go, too: Ray counts on it until it has
                    # gone.
                    max_preemption_failures=0,
                ),
            ),
        )
        return trainer.fit().return_value
    except ray.train.TrainingFailedError as error:
        raise _cause(error) from None


def _joined_by(backend: str) -> Any:
    """Ray's way to join workers, after each has told gloo which network card to use.

    By itself gloo takes the address that the machine's name stands for, which on many is one of
    the machine's own (127.0.1.1): workers on two hosts would not find each other.
    """
    import ray.train.torch

    usual: Any = ray.train.torch.TorchConfig

    class Backend(usual(backend).backend_cls):  # type: ignore[misc]
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(_choose_card)
            super().on_start(worker_group, backend_config)

    class Joined(usual):  # type: ignore[misc]
        backend_cls = Backend

    return Joined(backend)


def _choose_card() -> None:
    """Tell gloo the network card that has the address by which Ray knows this machine."""
    import psutil
    import ray

    address = ray.util.get_node_ip_address()
    for card, its in psutil.net_if_addrs().items():
        if any(one.address == address for one in its):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", card)


class _WorkerGoneError(RuntimeError):
    """A worker process or its machine is gone."""


class _NoRoomError(RuntimeError):
    """Workers were not given room in time."""


def _cause(error: Any) -> BaseException:
    """What really happened: a worker lost, or the worker's own exception inside Ray's."""
    failures = list(getattr(error, "worker_failures", {}).values())
    for rank, failure in getattr(error, "worker_failures", {}).items():
        if type(failure).__name__.startswith("WorkerHealthCheck"):  # Ray keeps the class private
            found = re.search("node_ip='([^']*)'", str(failure))
            host = f" on {found[1]}" if found else ""
            why = health.line(failure, -1)
            return _WorkerGoneError(f"Worker {rank}{host} is gone: {why}")
    if not failures:  # the controller's own end, or a machine taken back
        if type(error).__name__ == "PreemptionError":
            return _WorkerGoneError("A machine was taken back, as announced")
        inner = getattr(error, "controller_failure", error)
        if type(inner).__name__ == "WorkerGroupStartupTimeoutError":
            return _NoRoomError(str(inner))
        return _WorkerGoneError(health.line(inner, -1))
    failure = failures[0]
    inner = getattr(failure, "_base_exc", None) or getattr(failure, "cause", None)
    return inner or failure  # type: ignore[no-any-return]
