"""A function onto N workers: in this process, or a Ray Train worker group.

    stage(worker, *args)     an ordinary function; args are small plain values and paths
      -> workers 0           Ray Train's local mode: the same train function, in this process
      -> workers N           one Ray Train worker per GPU or CPU; gloo or nccl between them
      -> rank 0's result

Tasks (chunk numbers) are claimed one by one, not dealt, so a slow worker holds nobody up. What
workers report reaches the driver while they run; only the driver talks to people and to MLflow.
When a worker dies the group is started again with the tasks that were not reported as done (`task`
in a report). When Ray itself dies, LostError says how to go on.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arrowhead import ConfigError, LostError

Report = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchConfig:
    """Where the work is done."""

    workers: int = 0
    """0: in this process. N: a Ray Train group of N workers, one per GPU, or per CPU."""
    address: str | None = None
    """Of a running Ray cluster (auto, or HOST:PORT). Default: RAY_ADDRESS, or a Ray of our own."""
    restarts: int = 3
    """How often a group that lost a worker is started again before the command gives up."""

    def __post_init__(self) -> None:
        if self.restarts < 0:
            raise ConfigError(f"--restarts is {self.restarts}.", "0 or more.", "give e.g. 3.")
        if self.workers < 0:
            raise ConfigError(
                f"--workers is {self.workers}.", "0 (this process) or more.", "give e.g. 2."
            )
        if self.address and not self.workers:
            raise ConfigError(
                f"--address {self.address} needs workers.",
                "--workers of 1 or more with an address.",
                "add --workers N.",
            )


@dataclass(frozen=True, slots=True)
class Worker:
    """What a stage knows of where it runs.

    device: cpu or cuda:K; threads: CPU threads it may use; claim: the next task's number, None
    when all are taken; report: sends one small dict of plain values to the driver.
    """

    rank: int
    world: int
    device: str
    threads: int
    claim: Callable[[], int | None]
    report: Callable[[Report], None]


class Desk:
    """Hands out task numbers and keeps reports until the driver reads them."""

    def __init__(self, tasks: list[int]) -> None:
        self._tasks = iter(tasks)
        self._reports: list[Report] = []

    def claim(self) -> int | None:
        """The next task's number, None when all are taken."""
        return next(self._tasks, None)

    def report(self, message: Report) -> None:
        """Keep a report for the driver."""
        self._reports.append(message)

    def read(self) -> list[Report]:
        """The reports since the last reading."""
        reports, self._reports = self._reports, []
        return reports


def run(
    stage: Callable[..., Any],
    *args: Any,
    config: LaunchConfig = LaunchConfig(),
    tasks: list[int] | None = None,
    listen: Callable[[Report], None] = lambda report: None,
) -> Any:
    """Run `stage(worker, *args)` on every worker; rank 0's return value.

    tasks: the numbers that workers claim. listen: gets every report, here, in order of arrival.
    """
    # Workers start in a directory of Ray's own.
    args = tuple(arg.absolute() if isinstance(arg, Path) else arg for arg in args)
    if config.workers == 0:
        return _fit(_here(stage, args, tasks or [], listen), workers=0)
    return _on_ray(stage, args, config, tasks or [], listen)


def _here(
    stage: Callable[..., Any],
    args: tuple[Any, ...],
    tasks: list[int],
    listen: Callable[[Report], None],
) -> Callable[[dict[str, Any]], Any]:
    def train_function(_: dict[str, Any]) -> Any:
        import torch

        device = "cuda:0" if torch.cuda.is_available() else "cpu"
        threads = len(os.sched_getaffinity(0))
        desk = Desk(tasks)
        return stage(Worker(0, 1, device, threads, desk.claim, listen), *args)

    return train_function


def _on_ray(
    stage: Callable[..., Any],
    args: tuple[Any, ...],
    config: LaunchConfig,
    tasks: list[int],
    listen: Callable[[Report], None],
) -> Any:
    """Run on a worker group, and again with what is left to do when a worker was lost."""
    left = list(tasks)

    def hear(report: Report) -> None:
        if report.get("task") in left:
            left.remove(report["task"])
        listen(report)

    _connect(config)
    for restarts_left in range(config.restarts, -1, -1):
        try:
            return _group(stage, args, config, left, hear)
        except _WorkerGoneError as gone:
            if not restarts_left:
                raise _lost(f"{gone} It was started again {config.restarts} times.") from gone
            listen({"restart": str(gone)})
    return None


def _group(
    stage: Callable[..., Any],
    args: tuple[Any, ...],
    config: LaunchConfig,
    tasks: list[int],
    listen: Callable[[Report], None],
) -> Any:
    """One worker group, from its start to its end."""
    import ray

    desk = ray.remote(num_cpus=0)(Desk).remote(tasks)

    def train_function(_: dict[str, Any]) -> Any:
        import ray.train
        import torch

        context = ray.train.get_context()
        worker = Worker(
            rank=context.get_world_rank(),
            world=context.get_world_size(),
            device=str(ray.train.torch.get_device()),
            threads=torch.get_num_threads(),
            claim=lambda: ray.get(desk.claim.remote()),
            report=lambda message: ray.get(desk.report.remote(message)),
        )
        return stage(worker, *args)

    def pass_on() -> None:
        for report in ray.get(desk.read.remote()):
            listen(report)

    # Ray is waited for in a thread: where it has died it would hang for a minute, then end us.
    fitted: Future[Any] = Future()

    def fit() -> None:
        try:
            fitted.set_result(_fit(train_function, workers=config.workers))
        except BaseException as error:
            fitted.set_exception(error)

    threading.Thread(target=fit, daemon=True).start()
    while not fitted.done():
        if _is_dead():
            raise _lost("The Ray that ran this command has died.")
        wait([fitted], timeout=0.25)
        with contextlib.suppress(ray.exceptions.RayError):
            pass_on()
    try:
        return fitted.result()
    except ray.exceptions.RayError as error:
        if _is_dead():
            raise _lost("The Ray that ran this command has died.") from error
        raise _WorkerGoneError(str(error).splitlines()[0]) from error
    finally:
        with contextlib.suppress(ray.exceptions.RayError):
            pass_on()
            ray.kill(desk)


def _lost(what: str) -> LostError:
    return LostError(
        what,
        "workers and a Ray that live to the end; what they had finished is kept.",
        "run the same command again: it goes on where it stopped.",
    )


def _is_dead() -> bool:
    """Whether a process of a Ray that we started (raylet, GCS) has died."""
    import ray._private.worker as inside

    node = getattr(inside, "_global_node", None)  # there is no public way to ask
    return bool(node and node.dead_processes())


def _fit(train_function: Callable[[dict[str, Any]], Any], workers: int) -> Any:
    """Ray Train runs the function on a group of this size (0: here); rank 0's return value."""
    import logging

    import ray.train
    import ray.train.torch
    import torch

    logging.getLogger("ray.train").setLevel(logging.WARNING)
    scratch = tempfile.mkdtemp(prefix="arrowhead-ray-")  # Ray Train wants a place for checkpoints
    on_gpu = torch.cuda.is_available() if workers == 0 else _gpus() >= workers
    try:
        trainer = ray.train.torch.TorchTrainer(
            train_function,
            train_loop_config={},
            scaling_config=ray.train.ScalingConfig(
                num_workers=workers,
                use_gpu=on_gpu and workers > 0,
                resources_per_worker={"CPU": 1} | ({"GPU": 1} if on_gpu and workers else {}),
            ),
            torch_config=ray.train.torch.TorchConfig(backend="nccl" if on_gpu else "gloo"),
            run_config=ray.train.RunConfig(storage_path=scratch, name="stage"),
        )
        return trainer.fit().return_value
    except ray.train.TrainingFailedError as error:
        raise _cause(error) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class _WorkerGoneError(RuntimeError):
    """A worker process or its machine is gone."""


def _cause(error: Any) -> BaseException:
    """What really happened: a worker lost, or the worker's own exception inside Ray's."""
    failures = list(getattr(error, "worker_failures", {}).values())
    for rank, failure in getattr(error, "worker_failures", {}).items():
        if type(failure).__name__.startswith("WorkerHealthCheck"):  # Ray keeps the class private
            return _WorkerGoneError(f"Worker {rank} is gone: {str(failure).splitlines()[0]}")
    if not failures:  # the controller's own end, or a machine taken back
        return _WorkerGoneError(str(error).splitlines()[0])
    failure = failures[0]
    inner = getattr(failure, "_base_exc", None) or getattr(failure, "cause", None)
    return inner or failure  # type: ignore[no-any-return]


def _gpus() -> int:
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def _connect(config: LaunchConfig) -> None:
    """Join the cluster, or start a Ray of our own: loopback dashboard, token on."""
    secure()
    import ray

    if ray.is_initialized():
        return
    address = config.address or os.environ.get("RAY_ADDRESS")
    if address:
        _must_answer(address)
    own: dict[str, Any] = {"num_cpus": max(config.workers, os.cpu_count() or 1)}
    try:
        ray.init(
            address=address or "local",
            log_to_driver=False,  # workers report through the desk; Ray's own lines drown it
            logging_level="warning",
            **({} if address else own | {"include_dashboard": False}),
        )
    except ConnectionError as error:
        raise _no_cluster(str(address), error) from error
    atexit.register(ray.shutdown)


def _must_answer(address: str) -> None:
    """Refuse a HOST:PORT where nothing listens; Ray itself would wait there for ever."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():  # auto, local: Ray finds these without waiting
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"No Ray cluster answers at {address}: {error}.",
        "the address of a running head node.",
        "start one (`ray start --head`), or leave --address out for a Ray of this machine.",
    )


def secure() -> Path:
    """Switch Ray's token authentication on; the token file, made (mode 0600) if there is none.

    Without it anyone who reaches the job port runs code here (CVE-2023-48022).
    """
    if "ray" not in sys.modules:  # ray reads it once, at import; later, ray.init sees to it
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    path = token_file()
    if not path.exists() and "RAY_AUTH_TOKEN" not in os.environ:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(32))
    elif path.exists():
        path.chmod(0o600)
    return path


def token_file() -> Path:
    """Where Ray looks for the token."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def cluster() -> str | None:
    """Address of the Ray cluster this machine belongs to, None without one."""
    from ray._private import services

    found = services.find_gcs_addresses()
    return os.environ.get("RAY_ADDRESS") or (sorted(found)[0] if found else None)
