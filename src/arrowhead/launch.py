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

A stage that wants to go on in its middle keeps checkpoints (`worker.keep`); it is started anew, on
all ranks, whenever the group is, and looks for the newest one itself. Ray Train is told of each,
but what it notes is never read again: every start of a group has an attempt's folder of its own.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from arrowhead import ConfigError, LostError, cluster, fileio, ray_private, signals
from arrowhead.cluster import LaunchConfig

Report = dict[str, Any]
Measure = Callable[..., None]
Keep = Callable[[Path | None, str], None]


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


BEAT = 1.0  # seconds between a worker's signs of life, and between looks at the cluster
SILENT = 10.0  # seconds without one, after which the driver is told; Ray itself takes a minute


class Desk:
    """Hands out task numbers and keeps reports until the driver reads them.

    going: machines (node ids) that are announced to go, and when (milliseconds since 1970, 0: not
    known). They are given no more tasks, so nothing is lost with them.
    """

    def __init__(self, tasks: list[int], going: dict[str, int] | None = None) -> None:
        self._left = list(tasks)  # not reported as done
        self._tasks = iter(tasks)
        self._reports: list[Report] = []
        self._heard: dict[int, tuple[str, float]] = {}  # by rank: its host, and when
        self._hosts: dict[str, str] = {}  # by node id: the host, of all in this group
        self._silent: set[str] = set()
        self._going = going or {}
        self._told: set[str] = set()

    def open(self, workers: int) -> None:
        """A group of this size begins: what an earlier one claimed and did not do is free again."""
        self._tasks = iter(list(self._left))
        self._heard, self._hosts, self._silent, self._told = {}, {}, set(), set()
        self._reports.append({"workers": workers})

    def beat(self, rank: int, host: str, node: str = "") -> None:
        """A worker is alive."""
        self._heard[rank] = host, time.monotonic()
        self._hosts[node] = host

    def leave(self, rank: int) -> None:
        """A worker has done its part; nothing more is heard of it."""
        self._heard.pop(rank, None)

    def claim(self, node: str = "") -> int | None:
        """The next task's number; None when all are taken, or when the machine is to go."""
        return None if node in self._going else next(self._tasks, None)

    def announce(self, going: dict[str, int]) -> None:
        """These machines are to go. Who asks Ray for them hangs where it has died; not we."""
        self._going = going

    def report(self, message: Report) -> None:
        """Keep a report for the driver; a task is done once, whoever says so again."""
        if "task" in message:
            if message["task"] not in self._left:
                return
            self._left.remove(message["task"])
        self._reports.append(message)

    def read(self) -> list[Report]:
        """The reports since the last reading; `silent`: a host that is not heard any more,
        `leaving`: one that is announced to go, `until` then.
        """
        old = time.monotonic() - SILENT
        silent = {host for host, last in self._heard.values() if last < old}
        self._reports += [{"silent": host} for host in sorted(silent - self._silent)]
        self._silent = silent
        for node in self._hosts.keys() & self._going.keys() - self._told:
            self._told.add(node)
            self._reports.append({"leaving": self._hosts[node], "until": self._going[node]})
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
    with tempfile.TemporaryDirectory(
        prefix="arrowhead-run-", ignore_cleanup_errors=True
    ) as scratch:  # Ray Train always wants storage
        place = place.absolute() if place else Path(scratch)
        if config.most == 0:
            sized(1)
            return stage(_worker_here(tasks or [], listen, place), *args)
        return _on_ray(stage, args, config, tasks or [], listen, place, sized, labels or {})


def _worker_here(tasks: list[int], listen: Callable[[Report], None], place: Path) -> Worker:
    """The only worker, which is this process."""
    import torch

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    threads = len(os.sched_getaffinity(0))
    claim, keep = Desk(tasks).claim, partial(_keep_here, place)
    return Worker(0, 1, device, threads, claim, listen, keep)


def _keep_here(place: Path, draft: Path | None, name: str) -> None:
    if draft is not None:
        place.mkdir(parents=True, exist_ok=True)
        fileio.put_in_place(draft, place / name)


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
        fileio.put_in_place(Path(written.path), attempt / name)
        return ray.train.Checkpoint.from_directory(attempt / name)

    ray.train.report(
        {},
        checkpoint=None if draft is None else ray.train.Checkpoint.from_directory(draft),
        checkpoint_dir_name=name,
        checkpoint_upload_fn=settle,
    )


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

    with signals.kept():  # Ray sets its own
        cluster.connect(config)
    lookout, restarts = _Lookout(config, hear), 0
    while True:
        try:
            with lookout.watch():
                result = _group(stage, args, config, left, lookout, place, labels)
            if not (left and lookout.leaving):
                return result
            listen({"restart": "Every machine that had workers is announced to go"})
        except _NoRoomError:
            continue  # `lookout` ends this
        except _WorkerGoneError as gone:
            restarts += not lookout.leaving
            if restarts > config.restarts:
                said = f"{str(gone).rstrip('.')}. It was started again {config.restarts} times."
                raise _lost(said) from gone
            listen({"restart": str(gone)})
        _settle(listen)


def _on_worker(
    desk: Any, stage: Callable[..., Any], args: tuple[Any, ...], labels: dict[str, str]
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
            world=context.get_world_size(),
            device=str(ray.train.torch.get_device()),
            threads=torch.get_num_threads(),
            claim=lambda: ray.get(desk.claim.remote(node)),
            report=lambda message: ray.get(desk.report.remote(message)),
            keep=_keep_in_group,
            measure=Meters(labels),
        )
        # Ray starts this again, on all ranks, when it resizes the group: nobody may claim before
        # the desk knows.
        if worker.rank == 0:
            ray.get(desk.open.remote(worker.world))
        ray.train.collective.barrier()
        with _heard(desk, worker.rank):
            return stage(worker, *args)

    return train_function


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

    going = lookout.going
    desk = ray.remote(num_cpus=0, scheduling_strategy=cluster.beside_us())(Desk).remote(
        tasks, going
    )
    train_function = _on_worker(desk, stage, args, labels)

    def pass_on() -> None:
        nonlocal going
        if lookout.going != going:
            going = lookout.going
            desk.announce.remote(going)
        for report in ray.get(desk.read.remote()):
            lookout.hear(report)

    # Ray is waited for in a thread: where it has died it would hang for a minute, then end us.
    fitted: Future[Any] = Future()
    # Never an old name: Ray would read its own notes there, which a kill may have torn.
    attempt = f"{ATTEMPT}{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
    _sweep(place)

    def fit() -> None:
        try:
            fitted.set_result(_fit(train_function, cluster.size(config), place, attempt))
        except BaseException as error:
            fitted.set_exception(error)

    threading.Thread(target=fit, daemon=True).start()
    try:
        while not fitted.done():
            if cluster.is_dead():
                raise _lost("The Ray that ran this command has died.")
            wait([fitted], timeout=0.25)
            with contextlib.suppress(ray.exceptions.RayError):
                pass_on()
            lookout.tell()
        return fitted.result()
    except ray.exceptions.RayError as error:
        if cluster.is_dead():
            raise _lost("The Ray that ran this command has died.") from error
        raise _WorkerGoneError(_line(error, 0)) from error
    finally:
        with contextlib.suppress(ray.exceptions.RayError):
            pass_on()
            ray.kill(desk)
        if not cluster.is_dead():
            with contextlib.suppress(ray.exceptions.RayError):
                cluster.give_back(lookout.held())
        _sweep(place)


@contextlib.contextmanager
def _heard(desk: Any, rank: int) -> Iterator[None]:
    """Signs of life to the desk as long as this block lasts."""
    import ray

    host, node = ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id()
    ended = threading.Event()

    def beat() -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(desk.beat.remote(rank, host, node))
            while not ended.wait(BEAT):
                ray.get(desk.beat.remote(rank, host, node))
            ray.get(desk.leave.remote(rank))

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


WORD = 5.0  # seconds between two looks at what a group waits for
MINUTE = 60.0  # after which a person who still waits is told again


class _Lookout:
    """Sees what Ray keeps to itself, or says late: room that is waited for, hosts that are cut off,
    machines that are announced to go (`going`: node ids, and when, in milliseconds since 1970).

    The room of a group of workers is a placement group: there from before its workers are started
    until they have all ended, and another one whenever Ray starts the group anew. Only a thread
    asks Ray for it: where the head has died, who asks hangs for a minute and is ended by Ray.
    """

    def __init__(self, config: LaunchConfig, listen: Callable[[Report], None]) -> None:
        self._config, self._listen = config, listen
        self._others = set(cluster.placement_groups())  # our caller's
        self.leaving = False  # whether a machine of this group is announced to go
        self.going: dict[str, int] = {}
        self._begun = False
        self._silent: list[str] = []
        self._found: list[Report | LostError] = []
        self._running: set[str] = set()
        self._room = -1
        self._idle = self._looked = self._said = time.monotonic()

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Look, in a thread, as long as this block lasts."""
        ended = threading.Event()

        def look() -> None:
            while not ended.wait(BEAT):
                with contextlib.suppress(Exception):  # Ray may end under it
                    self._look()

        self.leaving = False
        threading.Thread(target=look, daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def hear(self, report: Report) -> None:
        """Pass a report on, or what it means."""
        if "leaving" in report:
            self.leaving = True
            until = time.strftime("at %H:%M:%S", time.localtime(report["until"] / 1000))
            when = until if report["until"] else "soon"
            said = f"{report['leaving']} is going {when}: it takes no more, the others go on"
            self._listen({"warning": said})
        elif "silent" in report:
            self._silent.append(report["silent"])
        else:
            self._begun |= "workers" in report
            self._listen(report)

    def tell(self) -> None:
        """Pass on what was seen; LostError when no workers could be started for too long."""
        while self._found:
            found = self._found.pop(0)
            if isinstance(found, LostError):
                raise found
            self._listen(found)

    def held(self) -> dict[str, str]:
        """The placement groups of this group, with their states."""
        found = cluster.placement_groups()
        return {name: state for name, state in found.items() if name not in self._others}

    def _look(self) -> None:
        self.going = cluster.going()
        now = time.monotonic()
        if not (self._begun or self._silent or now > self._looked + WORD):
            return
        held = self.held()
        if self._begun:
            self._begun, self._running = False, set(held)
        works = bool(self._running & held.keys())
        while self._silent:
            host = self._silent.pop()
            if works:  # else Ray has ended these workers itself
                said = f"a worker on {host} has not answered for {SILENT:.0f} s. If its machine is"
                said += " cut off, Ray gives it up in about a minute, and the others start again"
                self._found.append({"warning": said})
        if works or "CREATED" in held.values():
            self._idle, self._room = now, -1
        elif now > self._looked + WORD:
            self._look_for_room(now)
            cluster.recount()
        if now > self._looked + WORD:
            self._looked = now

    def _look_for_room(self, now: float) -> None:
        least, room = self._config.least, cluster.room(self._config, free=True)
        wanted = f"{least} worker{'s' if least > 1 else ''}"
        if now > self._idle + self._config.wait:
            said = f"For {self._config.wait:.0f} s the cluster had no room for {wanted}."
            self._found.append(_lost(said))
        elif room < least and (room != self._room or now > self._said + MINUTE):
            self._room, self._said = room, now
            said = f"waiting for {wanted}: the cluster has room for {room}"
            self._found.append({"warning": said})


GIVEN_UP = 90.0  # seconds after which Ray has given up a machine that does not answer


def _settle(listen: Callable[[Report], None]) -> None:
    """After a loss: wait until Ray counts on no machine that does not answer. Started earlier, the
    group would be given room there, and wait for it.
    """
    until, told = time.monotonic() + GIVEN_UP, ""
    while (
        not cluster.is_dead() and (deaf := ", ".join(cluster.deaf())) and time.monotonic() < until
    ):
        if deaf != told:
            listen({"warning": f"{deaf} does not answer: waiting until Ray gives it up"})
        told = deaf
        time.sleep(0.5)
    cluster.recount()


ATTEMPT = "attempt-"


def _sweep(place: Path) -> None:
    """Remove attempts' folders that hold nothing but Ray's notes."""
    for attempt in place.glob(f"{ATTEMPT}*"):
        if attempt.is_dir() and not any(inside.is_dir() for inside in attempt.iterdir()):
            shutil.rmtree(attempt, ignore_errors=True)


def _lost(what: str) -> LostError:
    return LostError(
        what,
        "workers and a Ray that live to the end; what they had finished is kept.",
        "run the same command again: it goes on where it stopped.",
    )


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
    on_gpu = cluster.gpus() >= least
    try:
        trainer = ray_private.lean_trainer(cluster.is_own())(
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


def _line(error: Any, which: int) -> str:
    """One line of what Ray says, without its colours and what stands in brackets."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines() or [type(error).__name__]
    return textwrap.shorten(re.sub(r" *\([^()]*(\([^()]*\)[^()]*)*\)", "", lines[which]), 200)


def _cause(error: Any) -> BaseException:
    """What really happened: a worker lost, or the worker's own exception inside Ray's."""
    failures = list(getattr(error, "worker_failures", {}).values())
    for rank, failure in getattr(error, "worker_failures", {}).items():
        if type(failure).__name__.startswith("WorkerHealthCheck"):  # Ray keeps the class private
            found = re.search("node_ip='([^']*)'", str(failure))
            host = f" on {found[1]}" if found else ""
            why = _line(failure, -1)
            return _WorkerGoneError(f"Worker {rank}{host} is gone: {why}")
    if not failures:  # the controller's own end, or a machine taken back
        if type(error).__name__ == "PreemptionError":
            return _WorkerGoneError("A machine was taken back, as announced")
        inner = getattr(error, "controller_failure", error)
        if type(inner).__name__ == "WorkerGroupStartupTimeoutError":
            return _NoRoomError(str(inner))
        return _WorkerGoneError(_line(inner, -1))
    failure = failures[0]
    inner = getattr(failure, "_base_exc", None) or getattr(failure, "cause", None)
    return inner or failure  # type: ignore[no-any-return]
