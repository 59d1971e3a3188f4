"""A function onto N workers: in this process, or a Ray Train worker group.

    stage(worker, *args)     an ordinary function; args are small plain values and paths
      -> workers 0           Ray Train's local mode: the same train function, in this process
      -> workers N           one Ray Train worker per GPU or CPU; gloo or nccl between them
      -> workers MIN:MAX     as many of these as the cluster has room for
      -> rank 0's result

Tasks (chunk numbers) are claimed one by one, not dealt, so a slow worker holds nobody up. What
workers report reaches the driver while they run; only the driver talks to people and to MLflow.
When a worker dies the group is started again with the tasks that were not reported as done (`task`
in a report). When Ray itself dies, LostError says how to go on. A machine that no longer answers,
and room that is waited for, are told long before Ray says anything (`warning` in a report).

What workers measure goes to Prometheus, where the cluster is scraped: each process gives its
numbers to the Ray of its machine every ten seconds and when it ends, so `kill -9` costs the last of
them. They are for watching; what counts is what is reported.

A stage that wants to go on in its middle keeps checkpoints (`worker.keep`); it is started anew, on
all ranks, whenever the group is, and looks for the newest one itself. Ray Train is told of each,
but what it notes is never read again: every start of a group has an attempt's folder of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from arrowhead import ConfigError, LostError

Report = dict[str, Any]
Measure = Callable[..., None]
Keep = Callable[[Path | None, str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchConfig:
    """Where the work is done."""

    workers: int | str = 0
    """0: in this process. N: a Ray Train group of N workers, one per GPU, or per CPU. MIN:MAX (e.g.
    1:2): as many as there is room for, and on with fewer when some are lost."""
    address: str | None = None
    """Of a running Ray cluster (auto, or HOST:PORT). Default: RAY_ADDRESS, or a Ray of our own."""
    restarts: int = 3
    """How often a group that lost a worker is started again before the command gives up."""
    wait: float = 1800.0
    """Seconds to wait for machines with room for the workers before the command gives up."""

    def __post_init__(self) -> None:
        if self.restarts < 0:
            raise ConfigError(f"--restarts is {self.restarts}.", "0 or more.", "give e.g. 3.")
        if not self.wait > 0:
            raise ConfigError(f"--wait is {self.wait}.", "more than 0 seconds.", "give e.g. 1800.")
        if not re.fullmatch(r"[0-9]{1,6}(:[0-9]{1,6})?", str(self.workers)):
            raise ConfigError(
                f"--workers is {self.workers}.",
                "0 (this process) or more, or a range of at least 1.",
                "give e.g. 2, or 1:2.",
            )
        if ":" in str(self.workers) and not 1 <= self.least <= self.most:
            raise ConfigError(
                f"--workers is {self.workers}.",
                "MIN:MAX with MIN of 1 or more and MAX not below it.",
                "give e.g. 1:2.",
            )
        if self.address and not self.most:
            raise ConfigError(
                f"--address {self.address} needs workers.",
                "--workers of 1 or more with an address.",
                "add --workers N.",
            )

    @property
    def least(self) -> int:
        """Workers without which no group is started; 0: this process."""
        return int(str(self.workers).partition(":")[0])

    @property
    def most(self) -> int:
        """Workers of a group that has all the room it asks for; 0: this process."""
        return int(str(self.workers).rpartition(":")[2])


def _forget(draft: Path | None, name: str) -> None:
    """Keep nothing: what a worker does that nobody gave a place."""
    if draft is not None:
        shutil.rmtree(draft)


def _unmeasured(name: str, value: float, **labels: str) -> None:
    """Measure nothing: there is no cluster whose Ray would pass it on."""


MEASURES = {
    "images_decoded": ("counter", "Images decoded.", ()),
    "features_written": ("counter", "Images whose features were written to a shard.", ()),
    "scores_written": ("counter", "Images whose scores were written to a part.", ()),
    "faults": ("counter", "Images that could not be read, by kind of fault.", ("kind",)),
    "stage_seconds": ("counter", "Seconds that a stage was busy.", ("stage",)),
    "epoch": ("gauge", "The epoch that ended last.", ("part",)),
    "loss": ("gauge", "Loss of that epoch, the lowest of all heads.", ("part", "split")),
    "accuracy": ("gauge", "Accuracy of that epoch, the highest of all heads.", ("part",)),
}
"""What workers measure: kind, meaning and labels by name. In Prometheus `ray_arrowhead_<name>`, a
counter with `_total` behind it; labels `run`, `verb` and Ray's own (NodeAddress …) are added."""


class Meters:
    """Measures of one process of a cluster."""

    def __init__(self, labels: dict[str, str]) -> None:
        self._labels = labels
        self._made: dict[str, Any] = {}

    def __call__(self, name: str, value: float, **labels: str) -> None:
        """Add to a counter, or set a gauge."""
        from ray.util import metrics

        kind, what, keys = MEASURES[name]
        if name not in self._made:
            make = metrics.Counter if kind == "counter" else metrics.Gauge
            made = make(f"arrowhead_{name}", what, (*keys, *self._labels))
            self._made[name] = made.set_default_tags(self._labels)
        if kind == "gauge":
            self._made[name].set(value, labels)
        elif value:  # Ray refuses to add nothing
            self._made[name].inc(value, labels)


@dataclass(frozen=True, slots=True)
class Worker:
    """What a stage knows of where it runs.

    device: cpu or cuda:K; threads: CPU threads it may use; claim: the next task's number, None
    when all are taken; report: sends one small dict of plain values to the driver.

    keep(draft, name): all ranks together give the finished folder `draft` its name below the place
    of checkpoints; rank 0 passes the folder, which must lie on the place's disk, the others None.

    measure(name, value, **labels): a number for whoever watches the cluster, see `MEASURES`.
    """

    rank: int
    world: int
    device: str
    threads: int
    claim: Callable[[], int | None]
    report: Callable[[Report], None]
    keep: Keep = _forget
    measure: Measure = _unmeasured


BEAT = 1.0  # seconds between a worker's signs of life
SILENT = 10.0  # seconds without one, after which the driver is told; Ray itself takes a minute


class Desk:
    """Hands out task numbers and keeps reports until the driver reads them."""

    def __init__(self, tasks: list[int]) -> None:
        self._left = list(tasks)  # not reported as done
        self._tasks = iter(tasks)
        self._reports: list[Report] = []
        self._heard: dict[int, tuple[str, float]] = {}  # by rank: its host, and when
        self._silent: set[str] = set()

    def open(self, workers: int) -> None:
        """A group of this size begins: what an earlier one claimed and did not do is free again."""
        self._tasks = iter(list(self._left))
        self._heard, self._silent = {}, set()
        self._reports.append({"workers": workers})

    def beat(self, rank: int, host: str) -> None:
        """A worker is alive."""
        self._heard[rank] = host, time.monotonic()

    def leave(self, rank: int) -> None:
        """A worker has done its part; nothing more is heard of it."""
        self._heard.pop(rank, None)

    def claim(self) -> int | None:
        """The next task's number, None when all are taken."""
        return next(self._tasks, None)

    def report(self, message: Report) -> None:
        """Keep a report for the driver; a task is done once, whoever says so again."""
        if "task" in message:
            if message["task"] not in self._left:
                return
            self._left.remove(message["task"])
        self._reports.append(message)

    def read(self) -> list[Report]:
        """The reports since the last reading; `silent`: a host that is not heard any more."""
        old = time.monotonic() - SILENT
        silent = {host for host, last in self._heard.values() if last < old}
        self._reports += [{"silent": host} for host in sorted(silent - self._silent)]
        self._silent = silent
        reports, self._reports = self._reports, []
        return reports


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
    place: the folder that `worker.keep` fills, on a disk that all workers share; without one, what
    is kept lives as long as this call. sized: told how many workers there are, at every start.
    labels: what all that is measured is marked with.
    """
    # Workers start in a directory of Ray's own.
    args = tuple(arg.absolute() if isinstance(arg, Path) else arg for arg in args)
    scratch = Path(tempfile.mkdtemp(prefix="arrowhead-ray-"))  # Ray Train always wants storage
    place = place.absolute() if place else scratch
    try:
        if config.most == 0:
            sized(1)
            here = _here(stage, args, tasks or [], listen, place)
            return _fit(here, 0, scratch, "here")
        return _on_ray(stage, args, config, tasks or [], listen, place, sized, labels or {})
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _here(
    stage: Callable[..., Any],
    args: tuple[Any, ...],
    tasks: list[int],
    listen: Callable[[Report], None],
    place: Path,
) -> Callable[[dict[str, Any]], Any]:
    def train_function(_: dict[str, Any]) -> Any:
        import torch

        device = "cuda:0" if torch.cuda.is_available() else "cpu"
        threads = len(os.sched_getaffinity(0))
        desk = Desk(tasks)
        # Ray Train's local mode persists nothing that is reported to it.
        worker = Worker(0, 1, device, threads, desk.claim, listen, partial(_keep_here, place))
        return stage(worker, *args)

    return train_function


def _keep_here(place: Path, draft: Path | None, name: str) -> None:
    if draft is not None:
        place.mkdir(parents=True, exist_ok=True)
        _name(draft, place / name)


def _keep_in_group(draft: Path | None, name: str) -> None:
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
        return ray.train.Checkpoint.from_directory(_name(Path(written.path), attempt / name))

    ray.train.report(
        {},
        checkpoint=None if draft is None else ray.train.Checkpoint.from_directory(draft),
        checkpoint_dir_name=name,
        checkpoint_upload_fn=settle,
    )


def _name(draft: Path, target: Path) -> Path:
    """Give a finished folder its name, on the disk too; what had the name goes only afterwards."""
    old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.draft")
    if target.exists():
        os.replace(target, old)
    os.replace(draft, target)
    handle = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    shutil.rmtree(old, ignore_errors=True)
    return target


def _on_ray(
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

    _connect(config)
    lookout, restarts = _Lookout(config, hear), 0
    while True:
        try:
            return _group(stage, args, config, left, lookout, place, labels)
        except _NoRoomError:
            continue  # `lookout` ends this
        except _WorkerGoneError as gone:
            restarts += 1
            if restarts > config.restarts:
                raise _lost(f"{gone} It was started again {config.restarts} times.") from gone
            listen({"restart": str(gone)})
            _settle(listen)


def _group(
    stage: Callable[..., Any],
    args: tuple[Any, ...],
    config: LaunchConfig,
    tasks: list[int],
    lookout: _Lookout,
    place: Path,
    labels: dict[str, str],
) -> Any:
    """One worker group, from its start to its end."""
    import ray

    desk = ray.remote(num_cpus=0, scheduling_strategy=_beside_us())(Desk).remote(tasks)

    def train_function(_: dict[str, Any]) -> Any:
        import ray.train
        import ray.train.collective
        import torch

        context = ray.train.get_context()
        worker = Worker(
            rank=context.get_world_rank(),
            world=context.get_world_size(),
            device=str(ray.train.torch.get_device()),
            threads=torch.get_num_threads(),
            claim=lambda: ray.get(desk.claim.remote()),
            report=lambda message: ray.get(desk.report.remote(message)),
            keep=_keep_in_group,
            measure=Meters(labels),
        )
        # Ray starts this again, on all ranks, when it resizes the group or loses a machine that
        # was announced to go: nobody may claim before the desk knows.
        if worker.rank == 0:
            ray.get(desk.open.remote(worker.world))
        ray.train.collective.barrier()
        with _heard(desk, worker.rank):
            return stage(worker, *args)

    def pass_on() -> None:
        for report in ray.get(desk.read.remote()):
            lookout.hear(report)

    # Ray is waited for in a thread: where it has died it would hang for a minute, then end us.
    fitted: Future[Any] = Future()
    # Never an old name: Ray would read its own notes there, which a kill may have torn.
    attempt = f"{ATTEMPT}{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
    _sweep(place)

    def fit() -> None:
        try:
            fitted.set_result(_fit(train_function, _size(config), place, attempt))
        except BaseException as error:
            fitted.set_exception(error)

    threading.Thread(target=fit, daemon=True).start()
    try:
        while not fitted.done():
            if _is_dead():
                raise _lost("The Ray that ran this command has died.")
            wait([fitted], timeout=0.25)
            with contextlib.suppress(ray.exceptions.RayError):
                pass_on()
                lookout.look()
        return fitted.result()
    except ray.exceptions.RayError as error:
        if _is_dead():
            raise _lost("The Ray that ran this command has died.") from error
        raise _WorkerGoneError(str(error).splitlines()[0]) from error
    finally:
        with contextlib.suppress(ray.exceptions.RayError):
            pass_on()
            ray.kill(desk)
        with contextlib.suppress(ray.exceptions.RayError):
            _give_back(lookout.held())
        _sweep(place)


def _beside_us() -> Any:
    """Where this process runs: no machine that goes takes what is placed so."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


@contextlib.contextmanager
def _heard(desk: Any, rank: int) -> Iterator[None]:
    """Signs of life to the desk as long as this block lasts."""
    import ray

    host, ended = ray.util.get_node_ip_address(), threading.Event()

    def beat() -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            while not ended.wait(BEAT):
                ray.get(desk.beat.remote(rank, host))
            ray.get(desk.leave.remote(rank))

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


WORD = 5.0  # seconds between two looks at what a group waits for
MINUTE = 60.0  # after which a person who still waits is told again


class _Lookout:
    """Sees what Ray keeps to itself, or says late: room that is waited for, hosts that are cut off.

    The room of a group of workers is a placement group: there from before its workers are started
    until they have all ended, and another one whenever Ray starts the group anew.
    """

    def __init__(self, config: LaunchConfig, listen: Callable[[Report], None]) -> None:
        self._config, self._listen = config, listen
        self._others = set(_placement_groups())  # our caller's
        self._running: set[str] = set()
        self._room = -1
        self._idle = self._looked = self._said = time.monotonic()

    def held(self) -> dict[str, str]:
        """The placement groups of this group, with their states."""
        found = _placement_groups()
        return {name: state for name, state in found.items() if name not in self._others}

    def hear(self, report: Report) -> None:
        """Pass a report on, or what it means."""
        if "workers" in report:
            self._running = set(self.held())
        if "silent" not in report:
            self._listen(report)
        elif self._running & self.held().keys():  # else Ray has ended these workers itself
            self._listen(
                {
                    "warning": f"{report['silent']} has not answered for {SILENT:.0f} s."
                    f" Ray gives a machine about a minute; then the workers start again without it."
                }
            )

    def look(self) -> None:
        """Say so when there is no room; LostError when no workers could be started for too long."""
        now = time.monotonic()
        if now < self._looked + WORD:
            return
        self._looked, held = now, self.held()
        if self._running & held.keys() or "CREATED" in held.values():
            self._idle, self._room = now, -1
            return
        if now > self._idle + self._config.wait:
            waited = f"{self._config.wait:.0f} s"
            raise _lost(f"For {waited} the cluster had no room for {self._wanted()}.")
        room = _room(self._config, free=True)
        if room < self._config.least and (room != self._room or now > self._said + MINUTE):
            self._room, self._said = room, now
            told = f"waiting for {self._wanted()}: the cluster has room for {room}"
            self._listen({"warning": told})

    def _wanted(self) -> str:
        return f"{self._config.least} worker{'s' if self._config.least > 1 else ''}"


GIVEN_UP = 90.0  # seconds after which Ray has given up a machine that does not answer


def _settle(listen: Callable[[Report], None]) -> None:
    """After a loss: wait until Ray counts on no machine that does not answer. Started earlier, the
    group would be given room there, and wait for it.
    """
    until, told = time.monotonic() + GIVEN_UP, ""
    while (deaf := ", ".join(_deaf())) and time.monotonic() < until:
        if deaf != told:
            listen({"warning": f"{deaf} does not answer: waiting until Ray gives it up"})
        told = deaf
        time.sleep(0.5)
    _recount()


def _deaf() -> list[str]:
    """Machines that Ray takes for alive and that take no connection."""
    import ray

    found = []
    for node in ray.nodes():
        place = node["NodeManagerAddress"], node["NodeManagerPort"]
        try:
            if node["Alive"]:
                socket.create_connection(place, timeout=2).close()
        except OSError:
            found.append(node["NodeManagerAddress"])
    return found


def _recount() -> None:
    """Have Ray's elastic groups see what machines there are now: they look every 20 s only."""
    import ray

    with contextlib.suppress(Exception):  # there is no public way to ask
        counts = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
        ray.get(counts.get_reserved_resources.remote("arrowhead", recompute=True), timeout=5)


def _placement_groups() -> dict[str, str]:
    """Those of this process that are not removed, with their states."""
    import ray
    from ray.util.placement_group import placement_group_table

    ours = ray.get_runtime_context().get_job_id()  # the end of their names
    states = {name: one["state"] for name, one in placement_group_table().items()}
    return {k: state for k, state in states.items() if k.endswith(ours) and state != "REMOVED"}


def _give_back(groups: Iterable[str]) -> None:
    """Free the room of a group that is gone. Where one fails while its workers are joined to each
    other, Ray keeps the room as long as this process lives, and the next group would wait for it.
    """
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    for name in groups:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(name)))


ATTEMPT = "attempt-"


def _sweep(place: Path) -> None:
    """Remove attempts' folders that hold nothing but Ray's notes."""
    for attempt in place.glob(f"{ATTEMPT}*"):
        if attempt.is_dir() and not any(inside.is_dir() for inside in attempt.iterdir()):
            shutil.rmtree(attempt, ignore_errors=True)


SETTLED = 5.0  # seconds that Ray may take to give back what a lost group held


def _size(config: LaunchConfig) -> int | tuple[int, int]:
    """What Ray Train is asked for: so many workers, or from so many to so many.

    Ray's elastic groups follow what the machines have, not what is free of it, and then wait for
    room that others hold. So the range ends where the free room does, unless all of it is free:
    then machines that join later make the group larger.
    """
    if config.least == config.most:
        return config.most
    until = time.monotonic() + SETTLED
    while (free := _room(config, free=True)) < config.most and time.monotonic() < until:
        time.sleep(0.25)
    most = config.most
    if free < min(most, _room(config, free=False)):
        most = max(free, config.least)
    return (config.least, most) if config.least < most else most


def _room(config: LaunchConfig, free: bool) -> int:
    """Workers that the cluster can hold: in its free room, or in all of it."""
    import ray

    there = ray.available_resources() if free else ray.cluster_resources()
    kinds = ("CPU", "GPU") if _gpus() >= config.least else ("CPU",)
    return int(min(there.get(kind, 0) for kind in kinds))


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


def _fit(
    train_function: Callable[[dict[str, Any]], Any],
    workers: int | tuple[int, int],
    storage: Path,
    name: str,
) -> Any:
    """Ray Train runs the function on a group of this size (0: here); rank 0's return value."""
    import logging

    import ray.train
    import ray.train.torch
    import torch

    logging.getLogger("ray.train").setLevel(logging.WARNING)
    least = workers if isinstance(workers, int) else workers[0]
    on_gpu = torch.cuda.is_available() if least == 0 else _gpus() >= least
    try:
        trainer = ray.train.torch.TorchTrainer(
            train_function,
            train_loop_config={},
            scaling_config=ray.train.ScalingConfig(
                num_workers=workers,
                use_gpu=on_gpu and least > 0,
                resources_per_worker={"CPU": 1} | ({"GPU": 1} if on_gpu and least else {}),
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
                    controller_failure_limit=-1 if isinstance(workers, int) else 0
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
            why = textwrap.shorten(str(failure).strip().splitlines()[-1], 160)
            return _WorkerGoneError(f"Worker {rank}{host} is gone: {why}")
    if not failures:  # the controller's own end, or a machine taken back
        inner = getattr(error, "controller_failure", error)
        if type(inner).__name__ == "WorkerGroupStartupTimeoutError":
            return _NoRoomError(str(inner))
        return _WorkerGoneError(textwrap.shorten(str(inner).strip().splitlines()[-1], 300))
    failure = failures[0]
    inner = getattr(failure, "_base_exc", None) or getattr(failure, "cause", None)
    return inner or failure  # type: ignore[no-any-return]


def _gpus() -> int:
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def _connect(config: LaunchConfig) -> None:
    """Join the cluster, or start a Ray of our own: loopback dashboard, token on."""
    secure()
    # A rank's second report waits until Ray has asked for its first, every 2 s if left alone.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    # Room is there at once or has to be counted again; left alone Ray hopes for it for a minute.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    import ray

    if ray.is_initialized():
        return
    address = config.address or os.environ.get("RAY_ADDRESS")
    if address:
        _must_answer(address)
    own: dict[str, Any] = {"num_cpus": max(config.most, os.cpu_count() or 1)}
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
