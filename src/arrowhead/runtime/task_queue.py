"""A queue of tasks for workers, and of the workers' reports for the driver.

An actor of ours, and not `ray.util.queue.Queue`, because that does not keep a task of a worker that
died, nor know which machines are silent or draining.
"""

from __future__ import annotations

import time

from arrowhead.runtime.worker import Report

# Ray itself takes about a minute to notice that a machine stopped answering.
HEARTBEAT_TIMEOUT_SECONDS = 10.0


class TaskQueue:
    """Hands out task numbers and keeps reports until the driver reads them.

    Args:
        tasks: Task numbers, in the order in which they are handed out.
        draining: Machines that will be taken away: node id -> when, in milliseconds since 1970 (0:
            unknown). They get no more tasks, so nothing is lost with them.
    """

    def __init__(self, tasks: list[int], draining: dict[str, int] | None = None) -> None:
        self._unfinished = list(tasks)  # not reported as done
        self._tasks = iter(tasks)
        self._reports: list[Report] = []
        self._heartbeats: dict[int, tuple[str, float]] = {}  # rank -> host, time of the last one
        self._hosts: dict[str, str] = {}  # node id -> host, of all machines in this group
        self._silent: set[str] = set()
        self._draining = draining or {}
        self._reported_draining: set[str] = set()

    def start_group(self, workers: int) -> None:
        """Start with a new group: tasks that an earlier one took and did not finish are free."""
        self._tasks = iter(list(self._unfinished))
        self._heartbeats, self._hosts = {}, {}
        self._silent, self._reported_draining = set(), set()
        self._reports.append({"workers": workers})

    def heartbeat(self, rank: int, host: str, node: str = "") -> None:
        """Note that a worker is alive."""
        self._heartbeats[rank] = host, time.monotonic()
        self._hosts[node] = host

    def finish_worker(self, rank: int) -> None:
        """Expect no more heartbeats: this worker's stage has ended."""
        self._heartbeats.pop(rank, None)

    def next_task(self, node: str = "") -> int | None:
        """The next task's number; None when all are taken or the machine is draining."""
        return None if node in self._draining else next(self._tasks, None)

    def set_draining(self, draining: dict[str, int]) -> None:
        """Replace the draining machines.

        The driver passes them in: a call to a Ray that has died would block this actor.
        """
        self._draining = draining

    def report(self, message: Report) -> None:
        """Keep a report for the driver; a second report of a finished task is dropped."""
        if "task" in message:
            if message["task"] not in self._unfinished:
                return
            self._unfinished.remove(message["task"])
        self._reports.append(message)

    def take_reports(self) -> list[Report]:
        """Return and remove all reports since the last call.

        Among them `silent`, a host whose heartbeats have stopped, and `leaving`, a host that will
        be taken away at `until`; each host once.
        """
        oldest = time.monotonic() - HEARTBEAT_TIMEOUT_SECONDS
        silent = {host for host, last in self._heartbeats.values() if last < oldest}
        self._reports += [{"silent": host} for host in sorted(silent - self._silent)]
        self._silent = silent
        for node in self._hosts.keys() & self._draining.keys() - self._reported_draining:
            self._reported_draining.add(node)
            self._reports.append({"leaving": self._hosts[node], "until": self._draining[node]})
        reports, self._reports = self._reports, []
        return reports
