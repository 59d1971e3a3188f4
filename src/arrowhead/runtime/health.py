"""Machines that are silent or announced to go, and workers that wait for room: said early."""

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

HEARTBEAT_SECONDS = (
    1.0  # seconds between a worker's signs of life, and between looks at the cluster
)


@contextlib.contextmanager
def heard(queue: Any, rank: int) -> Iterator[None]:
    """Signs of life to the desk as long as this block lasts."""
    import ray

    host, node = ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id()
    ended = threading.Event()

    def beat() -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(queue.heartbeat.remote(rank, host, node))
            while not ended.wait(HEARTBEAT_SECONDS):
                ray.get(queue.heartbeat.remote(rank, host, node))
            ray.get(queue.finish_worker.remote(rank))

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


LOOK_SECONDS = 5.0  # seconds between two looks at what a group waits for
REMIND_SECONDS = 60.0  # after which a person who still waits is told again


class HealthMonitor:
    """Sees what Ray keeps to itself, or says late: room that is waited for, hosts that are cut off,
    machines that are announced to go (`going`: node ids, and when, in milliseconds since 1970).

    The room of a group of workers is a placement group: there from before its workers are started
    until they have all ended, and another one whenever Ray starts the group anew. Only a thread
    asks Ray for it: where the head has died, who asks hangs for a minute and is ended by Ray.
    """

    def __init__(self, config: LaunchConfig, listen: Callable[[Report], None]) -> None:
        self._config, self._listen = config, listen
        self._others = set(ray_cluster.placement_groups())  # our caller's
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
            while not ended.wait(HEARTBEAT_SECONDS):
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

    def own_placement_groups(self) -> dict[str, str]:
        """The placement groups of this group, with their states."""
        found = ray_cluster.placement_groups()
        return {name: state for name, state in found.items() if name not in self._others}

    def _look(self) -> None:
        self.going = ray_cluster.going()
        now = time.monotonic()
        if not (self._begun or self._silent or now > self._looked + LOOK_SECONDS):
            return
        own_placement_groups = self.own_placement_groups()
        if self._begun:
            self._begun, self._running = False, set(own_placement_groups)
        works = bool(self._running & own_placement_groups.keys())
        while self._silent:
            host = self._silent.pop()
            if works:  # else Ray has ended these workers itself
                seconds = task_queue.HEARTBEAT_TIMEOUT_SECONDS
                said = f"a worker on {host} has not answered for {seconds:.0f} s."
                said += " If its machine is cut off, Ray gives it up in about a minute, and"
                said += " the others start again"
                self._found.append({"warning": said})
        if works or "CREATED" in own_placement_groups.values():
            self._idle, self._room = now, -1
        elif now > self._looked + LOOK_SECONDS:
            self._look_for_room(now)
            ray_cluster.recount()
        if now > self._looked + LOOK_SECONDS:
            self._looked = now

    def _look_for_room(self, now: float) -> None:
        least, room = self._config.min_workers, ray_cluster.room(self._config, free=True)
        wanted = f"{least} worker{'s' if least > 1 else ''}"
        if now > self._idle + self._config.wait:
            said = f"For {self._config.wait:.0f} s the cluster had no room for {wanted}."
            self._found.append(lost_error(said))
        elif room < least and (room != self._room or now > self._said + REMIND_SECONDS):
            self._room, self._said = room, now
            said = f"waiting for {wanted}: the cluster has room for {room}"
            self._found.append({"warning": said})


def lost_error(what: str) -> LostError:
    """The refusal when what ran the work is gone."""
    return LostError(
        what,
        "workers and a Ray that live to the end; what they had finished is kept.",
        "run the same command again: it goes on where it stopped.",
    )


def line(error: Any, which: int) -> str:
    """One line of what Ray says, without its colours and what stands in brackets."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines() or [type(error).__name__]
    return textwrap.shorten(re.sub(r" *\([^()]*(\([^()]*\)[^()]*)*\)", "", lines[which]), 200)
