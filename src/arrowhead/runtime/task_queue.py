"""Tasks for workers, one by one, and what workers report."""

from __future__ import annotations

import time

from arrowhead.runtime.worker import Report

SILENT_SECONDS = (
    10.0  # seconds without one, after which the driver is told; Ray itself takes a minute
)


class TaskQueue:
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

    def next_task(self, node: str = "") -> int | None:
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
        old = time.monotonic() - SILENT_SECONDS
        silent = {host for host, last in self._heard.values() if last < old}
        self._reports += [{"silent": host} for host in sorted(silent - self._silent)]
        self._silent = silent
        for node in self._hosts.keys() & self._going.keys() - self._told:
            self._told.add(node)
            self._reports.append({"leaving": self._hosts[node], "until": self._going[node]})
        reports, self._reports = self._reports, []
        return reports
