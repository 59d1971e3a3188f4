"""Add up what workers report, and record a stage's progress every few seconds."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass
from time import monotonic
from typing import Any

from arrowhead.features import extract
from arrowhead.tracking.run import Run

RECORD_SECONDS = 5.0  # between two records of progress


@dataclass(slots=True)
class WorkTotals:
    """Sums over the reports of all workers. Counts are of images."""

    decoded: int = 0
    looked_up: int = 0
    fallback: int = 0
    repaired: int = 0
    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))
    workers: int = 1
    drift: dict[str, Any] | None = None
    """The largest that a worker reported (see `replay.Drift`)."""
    files: int = 0
    faults: int = 0

    def add(self, report: dict[str, Any]) -> None:
        """Add the report of a finished chunk (see `extract.tell`)."""
        self.files += report["files"]
        self.faults += sum(report["faults"].values())
        self.decoded += report["decoded"]
        self.looked_up += report["looked_up"]
        self.fallback += report["fallback"]
        self.repaired += report["repaired"]
        for stage, seconds in report["seconds"].items():
            self.seconds[stage] += seconds


class ProgressRecorder:
    """Records a stage's progress in MLflow every few seconds, for `arrowhead watch`.

    The step is the number of images that are done, so a resumed run continues its curves.
    """

    def __init__(self, run: Run | None, work: WorkTotals, done_before: int, total: int) -> None:
        self._run, self._work, self._done_before, self._total = run, work, done_before, total
        self._start = self._last = monotonic()
        self._last_step = -1
        self.record()

    def record_if_due(self) -> None:
        """Record, if the last record is RECORD_SECONDS old."""
        if monotonic() - self._last >= RECORD_SECONDS:
            self.record()

    def record(self) -> None:
        """Record now, unless nothing was done since the last record."""
        self._last = monotonic()
        work, done = self._work, self._done_before + self._work.files
        if self._run is None or done == self._last_step:
            return
        self._last_step = done
        seconds = {f"progress.seconds.{k}": work.seconds.get(k, 0.0) for k in extract.STAGES}
        rate = work.files / max(self._last - self._start, 1e-9)
        values = {"images": done, "total": self._total, "faults": work.faults, "rate": rate}
        values["repaired"] = work.repaired
        self._run.record({f"progress.{k}": v for k, v in values.items()} | seconds, step=done)
