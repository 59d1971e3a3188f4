"""The writes of a run on their way to MLflow: outbox first, then one thread sends them in order.

Whoever records waits for no store, and what a killed process left in its outbox is sent by the next
command. MLflow's own asynchronous logging keeps its queue in memory, and drops what a store does
not take while it is away.
"""

from __future__ import annotations

import json
import math
import threading
from collections import deque
from pathlib import Path
from time import monotonic

from arrowhead.tracking.address import without_secrets
from arrowhead.tracking.client import (
    PROBE_SECONDS,
    find_run,
    first_line,
    is_refusal,
    why_unreachable,
)
from arrowhead.tracking.outbox import Outbox
from arrowhead.tracking.store import TrackingStore
from arrowhead.tracking.writes import Write

RETRY_SECONDS = 5.0, 60.0  # between tries while a store is unreachable: the first, the longest
OTHER_RUNS_SECONDS = 30.0  # at the start, for what earlier runs left unsent
INTERRUPTED_SECONDS = 5.0  # for the last writes of an interrupted run: it will soon be killed
STALLED_SECONDS = 30.0  # without one write sent, until the end of a run waits no more


class Sender:
    """Sends the writes of one run, in the order they came, in a thread of its own.

    A write that fails is sent again later; the ones behind it wait only while the store does not
    answer at all. Nothing is raised because a store is away: `print_line` gets a line.
    """

    def __init__(self, store: TrackingStore, outbox: Outbox, uri: str) -> None:
        self.store, self.print_line = store, store.print_line
        self._outbox, self._uri = outbox, uri
        self._name = f"the tracking store {without_secrets(uri)}"
        self._lock = threading.RLock()  # held while the outbox or a flag below is used
        self._changed = threading.Condition(self._lock)
        self._tried = 0  # writes of the outbox that were sent, refused or put off
        self._away = False
        self._closing = self._closed = self._ended = False
        self._delay, self._retry_at = RETRY_SECONDS[0], math.inf
        self._said: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="mlflow-sender", daemon=True)
        self._thread.start()

    @property
    def reachable(self) -> bool:
        """Whether the store answered when it was last asked."""
        return not self._away

    def write(self, *writes: Write) -> None:
        """Record these, in order. Waits until they are sent only where the outbox cannot hold all
        of them: a very large file, or a full disk.
        """
        with self._lock:
            held = self._outbox.add(*writes, ids=self.store.ids)
            self._changed.notify_all()
        if not held:
            self.flush()

    def flush(self) -> None:
        """Wait until all that was written has been sent, or put off until the store takes it."""
        with self._lock:
            written = self._outbox.added
            self._changed.wait_for(lambda: self._away or self._ended or self._tried >= written)

    def close(self, *, seconds: float = math.inf) -> None:
        """Send what is left, and say where it stays if that takes longer than so many seconds, or
        if nothing can be sent for STALLED_SECONDS.
        """
        until = monotonic() + seconds
        with self._lock:
            self._closing = True
            self._changed.notify_all()
        try:
            while self._thread.is_alive():
                before, wait = len(self._outbox), min(STALLED_SECONDS, until - monotonic())
                self._thread.join(max(0.0, wait))
                if monotonic() >= until or len(self._outbox) == before:
                    break
        finally:
            with self._lock:
                self._closed = True
                self._outbox.close(self.store.ids)
        if lost := self._outbox.unsaved:
            self.print_line(
                f"{lost} writes to {self._name} are lost: neither it nor {self._outbox.folder}"
                f" took them ({self._outbox.problem}). The results of the command are complete"
            )
        elif left := len(self._outbox):
            self.print_line(
                f"{left} writes to {self._name} are not sent. They are kept in"
                f" {self._outbox.folder}; the next arrowhead command with this store sends them"
                " first (in Python: arrowhead.tracking.run.send)"
            )

    def _run(self) -> None:
        try:
            last_time = False
            while not last_time:
                with self._lock:
                    wait = max(0.0, self._retry_at - monotonic())
                    self._changed.wait_for(self._is_due, None if wait == math.inf else wait)
                    last_time = self._closing
                if len(self._outbox):
                    self._send(retry=last_time or monotonic() >= self._retry_at)
        finally:
            with self._lock:
                self._ended = True
                self._changed.notify_all()

    def _is_due(self) -> bool:
        return self._closing or (not self._away and self._tried < self._outbox.added)

    def _send(self, *, retry: bool) -> None:
        """Send what is new in the outbox or, to try again, all that it holds."""
        was_away = self._away
        if was_away and why_unreachable(self._uri, PROBE_SECONDS) is None and self.store.answers():
            self._away = False
        with self._lock:
            added = self._outbox.added
            queue = deque(() if self._away else self._outbox.pending(0 if retry else self._tried))
        while queue and not self._away:
            numbers, write = queue.popleft()
            outcome = self._deliver(write, joined=len(numbers) > 1)
            with self._lock:
                if self._closed:  # nobody waits for this thread any more
                    return
                if outcome == "refused" and len(numbers) > 1:  # perhaps only one of them
                    queue.extendleft(reversed(self._outbox.separate(numbers)))
                elif outcome in ("sent", "refused"):
                    self._outbox.remove(numbers)
                else:
                    self._outbox.keep(numbers, self.store.ids)
        with self._lock:
            self._tried, left = added, len(self._outbox)
            if not left:
                self._delay, self._retry_at = RETRY_SECONDS[0], math.inf
            elif retry or self._retry_at == math.inf:
                self._retry_at = monotonic() + self._delay
                self._delay = min(2 * self._delay, RETRY_SECONDS[1])
            self._changed.notify_all()
        if was_away and not self._away:
            rest = f", except for {left} writes" if left else ""
            self.print_line(f"{self._name} is back; what was kept has been sent to it{rest}")

    def _deliver(self, write: Write, *, joined: bool) -> str:
        """Carry a write out: sent, refused for good, put off, or the store is away."""
        try:
            self.store.do(write, self._outbox.folder)
        except Exception as error:
            if is_refusal(error):
                if not joined:
                    self._say_once(f"MLflow refuses what is written to it: {first_line(error)}")
                return "refused"
            silent = why_unreachable(self._uri, PROBE_SECONDS)
            if silent is None and self.store.answers():
                self._say_once(
                    f"not recorded yet, though {self._name} answers: {first_line(error)}."
                    f" It is kept in {self._outbox.folder} and tried again"
                )
                return "put off"
            with self._lock:
                self._away = True
                self._changed.notify_all()
            where = str(self._outbox.folder)
            if self._outbox.unsaved:
                where = f"memory only ({self._outbox.problem})"
            self.print_line(
                f"{self._name} is gone ({silent or first_line(error)}). The work goes on; what is"
                f" to be recorded is kept in {where} and sent when it is back"
            )
            return "away"
        return "sent"

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self.print_line(line)


def send_unsent(
    store: TrackingStore,
    base: Path,
    uri: str,
    own: str | None,
    seconds: float = OTHER_RUNS_SECONDS,
) -> None:
    """Send what earlier commands could not.

    Args:
        store: the tracking store.
        base: the folder of all outboxes.
        uri: the store's address without secrets, as the outboxes name it.
        own: the run that is about to go on: all of its writes are sent, however long it takes.
        seconds: time for those of other runs.
    """
    until = monotonic() + seconds
    for file in sorted(base.glob("*/run.json")):
        try:
            header = json.loads(file.read_bytes())
            run_id, experiment = str(header["run_id"]), str(header["experiment"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        outbox = Outbox(file.parent, header)
        if header.get("store") != uri or file.parent.name != run_id:
            continue
        try:
            if not outbox.lock():
                continue
        except FileNotFoundError:  # its owner has just sent it
            continue
        except OSError as error:
            store.print_line(f"not sent: {file.parent} belongs to somebody else ({error.strerror})")
            continue
        if outbox.damaged:
            store.print_line(f"{file.parent}: {outbox.damaged} damaged lines are left out")
        try:
            run = find_run(store.client, run_id)
            if run is None or run.info.lifecycle_stage != "active":
                aside = file.parent.with_suffix(".refused")
                store.print_line(
                    f"{uri} has no run {run_id} any more: its unsent writes go to {aside}"
                )
                file.parent.rename(aside)
                continue
            theirs = TrackingStore(store.client, experiment, store.print_line)
            sender = Sender(theirs, outbox, uri)
            sender.close(seconds=math.inf if run_id == own else until - monotonic())
            if not len(outbox):
                store.print_line(f"sent to {uri}: what was kept of run {run_id}")
        finally:
            outbox.release()
