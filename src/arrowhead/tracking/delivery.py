"""Writes on their way: sent, or kept in the outbox until the store is back."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from arrowhead.tracking import client
from arrowhead.tracking import store as tracking_store
from arrowhead.tracking.address import without_secret
from arrowhead.tracking.client import PROBE, find_run, first_line, refused, silence
from arrowhead.tracking.names import is_shortened, mlflow_names, shortened
from arrowhead.tracking.outbox import Outbox, Write, stamp
from arrowhead.tracking.registry import RegistryConfig, log_model, make_version
from arrowhead.tracking.store import Store

RETRY_SECONDS = 5.0, 60.0  # seconds between tries while the store is away: the first, the longest
OTHERS = 30.0  # seconds at the start for what earlier runs left unsent
STOPPING, ENDING = 5.0, 30.0
"""Seconds that the last writes of a run wait for one of another thread: of a run that is
interrupted, whose process will soon be killed, and of another."""
Points = Mapping[str, Sequence[tuple[int, float]]]
"""Metrics of one head: name to (step, value)."""


def batch(
    points: Points | None = None,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
    *,
    names: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Metrics as [name, value, milliseconds, step], params and tags as text.

    What is no finite number goes as text: JSON has no word for it. A name that is too long for
    MLflow is kept whole in the tag `full_name.<its short form>`. names: those of earlier batches of
    the run (see `mlflow_names`).
    """
    now = tracking_store.now_ms()
    named = mlflow_names([*(points or {}), *(params or {}), *(tags or {})], names)
    rows = [
        [named[name], value if math.isfinite(value) else str(value), now, int(step)]
        for name, pairs in (points or {}).items()
        for step, value in pairs
    ]
    kept, marks = ({named[k]: str(v) for k, v in (part or {}).items()} for part in (params, tags))
    for name in {**(points or {}), **(params or {}), **(tags or {})}:
        if is_shortened(made := named[name]):
            marks[shortened(f"full_name.{made[-16:]}")] = name
    return {"metrics": rows, "params": kept, "tags": marks}


class Sender:
    """The way to the store: each write is carried out, or kept until the store is back."""

    def __init__(self, store: Store, outbox: Outbox, uri: str, registry: RegistryConfig) -> None:
        self.store, self.say, self.registry = store, store.say, registry
        self._outbox, self._uri = outbox, uri
        self._turn = threading.RLock()  # system metrics come from a thread of their own
        self._away = False
        self._wait = RETRY_SECONDS[0]
        self._next = monotonic() if len(outbox) else math.inf
        self._said: set[str] = set()
        self._stuck = False  # another thread's write has not come back in time

    def write(self, *writes: Write, within: float = -1) -> None:
        """Carry these out in order, or keep them. Raises nothing but an interrupt.

        within: seconds to wait for a write of another thread, after which these are kept; -1:
        however long it takes.
        """
        for one in writes:
            if not self._turn.acquire(timeout=0 if self._stuck else within):
                self._stuck = True
                self._keep(one)
                continue
            try:
                if self._away or not self._tried(one):
                    self._keep(one)
                if monotonic() >= self._next:
                    self._resend()
            finally:
                self._turn.release()

    def _tried(self, write: Write) -> bool:
        """Whether that write is dealt with; if not, the store has gone away."""
        try:
            self.store.do(write, self._outbox.folder)
        except Exception as error:
            if refused(error):
                self._once(f"MLflow refuses what is written to it: {first_line(error)}")
                return True
            silent = silence(self._uri, PROBE)
            if silent is None and self.store.answers():
                self._once(
                    f"not recorded yet, though {self._place} answers: {first_line(error)}."
                    f" It is kept in {self._outbox.folder} and tried again"
                )
                self._keep(write)
                return True
            self._away = True
            self.say(
                f"{self._place} is gone ({silent or first_line(error)}). The work goes on; what is"
                f" to be recorded is kept in {self._outbox.folder} and sent when it is back"
            )
            return False
        return True

    def _keep(self, write: Write) -> None:
        why = self._outbox.add(tracking_store.plain(write, self.store.ids))
        if why:
            self._once(f"{self._outbox.folder} cannot be written, only memory is left: {why}")
        if self._next == math.inf:
            self._next = monotonic() + self._wait

    def _resend(self) -> None:
        """Try what is kept; if that fails, not again for a while."""
        gone = silence(self._uri, PROBE) is not None or not self.store.answers()
        left = len(self._outbox) if gone else _send(self.store, self._outbox, math.inf)
        if left:
            self._wait = min(2 * self._wait, RETRY_SECONDS[1])
            self._next = monotonic() + self._wait
        else:
            self._wait, self._next = RETRY_SECONDS[0], math.inf
        if self._away and not gone:
            self._away = not self.store.answers()
            if not self._away:
                still = f", but for {left} writes" if left else ""
                self.say(f"{self._place} is back; what was kept has been sent to it{still}")

    def close(self) -> None:
        """Try once more what is left, and say where it stays."""
        ours = self._turn.acquire(timeout=0 if self._stuck else STOPPING)
        try:
            if len(self._outbox) and ours:
                self._resend()
            if lost := self._outbox.in_memory:
                self.say(
                    f"{lost} writes to {self._place} are lost: neither it nor {self._outbox.folder}"
                    " took them. The results of the command are whole"
                )
            elif left := len(self._outbox):
                self.say(
                    f"{left} writes to {self._place} are not sent. They are kept in"
                    f" {self._outbox.folder}; the next arrowhead command with this store sends them"
                    " first (in Python: arrowhead.tracking.run.send)"
                )
            self._outbox.release()
        finally:
            if ours:
                self._turn.release()

    def model(self, run_id: str, bundle: Path) -> str | None:
        """See `Run.model`."""
        why = "the tracking store is away"
        if not self._away and not run_id.startswith("unsent-"):
            try:
                with client.patience(stamp(bundle)[0]):
                    return log_model(self.store.client, run_id, bundle)
            except Exception as error:
                why = first_line(error)
        self.say(f"no MLflow model is made of {bundle} ({why}): the bundle is whole on the disk")
        return None

    def register(self, run_id: str, bundle: Path) -> str | None:
        """See `Run.register`."""
        why = "the tracking store is away"
        if not self._away and not run_id.startswith("unsent-"):
            try:
                return make_version(self.store.client, run_id, bundle, self.registry, self.say)
            except Exception as error:
                why = first_line(error)
        self.say(
            f"not registered as {self.registry.register} ({why}). This does it when all is well:"
            f" {self.registry.later(bundle)}"
        )
        return None

    def _once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self.say(line)

    @property
    def _place(self) -> str:
        return f"the tracking store {without_secret(self._uri)}"


def _send(store: Store, outbox: Outbox, until: float) -> int:
    """Send what a spool holds, in order, until a time; how many writes are left in it.

    A write that fails while the store answers is passed over, and stays.
    """
    writes, left = outbox.read(), []
    for at, one in enumerate(writes):
        if monotonic() > until:
            left += writes[at:]
            break
        try:
            store.do(one, outbox.folder)
        except Exception as error:
            if refused(error):
                store.say(f"MLflow refuses what was kept in {outbox.folder}: {first_line(error)}")
            elif store.answers():
                left.append(one)
            else:
                left += writes[at:]
                break
    outbox.replace([tracking_store.plain(one, store.ids) for one in left])
    return len(left)


def send_all(
    store: Store, base: Path, place: str, own: str | None, patience: float = OTHERS
) -> None:
    """Send what runs in this store left unsent; all of run `own`, the others for some seconds."""
    until = monotonic() + patience
    for file in sorted(base.glob("*/run.json")):
        try:
            header = json.loads(file.read_bytes())
            run_id, experiment = str(header["run_id"]), str(header["experiment"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        outbox = Outbox(file.parent, header)
        if header.get("store") != place or file.parent.name != run_id or not outbox.lock():
            continue
        try:
            run = find_run(store.client, run_id)
            if run is None or run.info.lifecycle_stage != "active":
                aside = file.parent.with_suffix(".refused")
                store.say(f"{place} has no run {run_id} any more: its unsent writes go to {aside}")
                file.parent.rename(aside)
                continue
            theirs = Store(store.client, experiment, store.say)
            if left := _send(theirs, outbox, math.inf if run_id == own else until):
                store.say(f"{left} writes of run {run_id} are still to be sent: {file.parent}")
            else:
                store.say(f"sent to {place}: what was kept of run {run_id}")
        finally:
            outbox.release()
