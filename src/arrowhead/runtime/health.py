"""Early reports of machines that are silent or draining, and of workers that wait for resources.

Ray tells a Train driver neither: it drops a machine after about a minute, and waits silently.
"""

from __future__ import annotations

import contextlib
import re
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from arrowhead.errors import LostError
from arrowhead.runtime import ray_cluster, task_queue
from arrowhead.runtime.ray_cluster import LaunchConfig
from arrowhead.runtime.worker import Report

HEARTBEAT_SECONDS = 1.0  # between a worker's heartbeats, and between two polls of the cluster
RESOURCES_SECONDS = 5.0  # between two looks at the free resources
REMINDER_SECONDS = 60.0  # between two warnings about the same lack of resources


@contextlib.contextmanager
def heartbeats(queue: Any, rank: int) -> Iterator[None]:
    """Send heartbeats to the task queue inside this block."""
    import ray

    host, node = ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id()
    ended = threading.Event()

    def send() -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(queue.heartbeat.remote(rank, host, node))
            while not ended.wait(HEARTBEAT_SECONDS):
                ray.get(queue.heartbeat.remote(rank, host, node))
            ray.get(queue.finish_worker.remote(rank))

    threading.Thread(target=send, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


class HealthMonitor:
    """Warns about missing resources, hosts that stopped answering, and draining machines.

    The resources of a worker group are a placement group: it exists from before the workers start
    until all of them have ended, and Ray creates another whenever it restarts the group. Only a
    thread asks Ray for it: a call to a head node that has died blocks for a minute, then Ray ends
    the calling process.

    Attributes:
        leaving: Whether a machine of the current group will be taken away.
        draining: All draining machines: node id -> when, in milliseconds since 1970 (0: unknown).
    """

    def __init__(self, config: LaunchConfig, on_report: Callable[[Report], None]) -> None:
        self._config, self._on_report = config, on_report
        self._existing_groups = set(ray_cluster.placement_groups())  # the caller's own
        self.leaving = False
        self.draining: dict[str, int] = {}
        self._group_started = False  # since the last poll
        self._silent_hosts: list[str] = []
        self._pending: list[Report | LostError] = []
        self._running_groups: set[str] = set()
        self._last_capacity = -1
        self._last_busy = self._last_poll = self._last_warning = time.monotonic()

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Poll the cluster from a thread inside this block."""
        ended = threading.Event()

        def poll() -> None:
            while not ended.wait(HEARTBEAT_SECONDS):
                with contextlib.suppress(Exception):  # Ray may end meanwhile
                    self._poll()

        self.leaving = False
        threading.Thread(target=poll, daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def handle(self, report: Report) -> None:
        """Pass a report on, or turn it into a warning."""
        if "leaving" in report:
            self.leaving = True
            until = time.strftime("at %H:%M:%S", time.localtime(report["until"] / 1000))
            when = until if report["until"] else "soon"
            warning = f"{report['leaving']} will be taken away {when}: it gets no new work, the"
            self._on_report({"warning": f"{warning} others continue"})
        elif "silent" in report:
            self._silent_hosts.append(report["silent"])
        else:
            self._group_started |= "workers" in report
            self._on_report(report)

    def flush(self) -> None:
        """Pass on the warnings so far; raise LostError if workers waited too long to start."""
        while self._pending:
            warning = self._pending.pop(0)
            if isinstance(warning, LostError):
                raise warning
            self._on_report(warning)

    def own_placement_groups(self) -> dict[str, str]:
        """The placement groups of this run: id -> state."""
        groups = ray_cluster.placement_groups()
        return {k: state for k, state in groups.items() if k not in self._existing_groups}

    def _poll(self) -> None:
        self.draining = ray_cluster.draining_nodes()
        now = time.monotonic()
        due = now > self._last_poll + RESOURCES_SECONDS
        if not (self._group_started or self._silent_hosts or due):
            return
        groups = self.own_placement_groups()
        if self._group_started:
            self._group_started, self._running_groups = False, set(groups)
        running = bool(self._running_groups & groups.keys())
        while self._silent_hosts:
            host = self._silent_hosts.pop()
            if running:  # otherwise Ray has ended these workers itself
                seconds = task_queue.HEARTBEAT_TIMEOUT_SECONDS
                warning = f"a worker on {host} has not answered for {seconds:.0f} s. If its machine"
                warning += " is cut off, Ray gives it up in about a minute, and the others restart"
                self._pending.append({"warning": warning})
        if running or "CREATED" in groups.values():
            self._last_busy, self._last_capacity = now, -1
        elif due:
            self._check_capacity(now)
            ray_cluster.refresh_resources()
        if due:
            self._last_poll = now

    def _check_capacity(self, now: float) -> None:
        """Warn about missing resources; give up after `--wait` seconds."""
        minimum = self._config.min_workers
        capacity = ray_cluster.worker_capacity(self._config, only_free=True)
        workers = f"{minimum} worker{'s' if minimum > 1 else ''}"
        if now > self._last_busy + self._config.wait:
            reason = f"For {self._config.wait:.0f} s the cluster had no room for {workers}."
            self._pending.append(lost_error(reason))
        elif capacity < minimum and (
            capacity != self._last_capacity or now > self._last_warning + REMINDER_SECONDS
        ):
            self._last_capacity, self._last_warning = capacity, now
            warning = f"waiting for {workers}: the cluster has room for {capacity}"
            self._pending.append({"warning": warning})


def lost_error(reason: str) -> LostError:
    """The refusal when workers or Ray are gone."""
    return LostError(
        reason,
        "workers and a Ray that run to the end; finished work is kept.",
        "run the same command again: it continues where it stopped.",
    )


def error_line(error: Any, index: int) -> str:
    """One line of an error of Ray, without colours and parentheses, at most 200 characters."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines() or [type(error).__name__]
    return textwrap.shorten(re.sub(r" *\([^()]*(\([^()]*\)[^()]*)*\)", "", lines[index]), 200)
