"""How far a stage is: added up, recorded every few seconds."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass
from time import monotonic
from typing import Any

from arrowhead.features import extract
from arrowhead.tracking.run import Run


@dataclass(slots=True)
class Work:
    """What workers reported, added up."""

    decoded: int = 0
    looked_up: int = 0
    fallback: int = 0
    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))
    workers: int = 1
    drift: dict[str, Any] | None = None
    """The largest that a worker found (see `replay.Drift`)."""
    files: int = 0
    faults: int = 0

    def add(self, message: dict[str, Any]) -> None:
        """A finished chunk (see `extract.report_chunk`)."""
        self.files += message["files"]
        self.faults += sum(message["faults"].values())
        self.decoded += message["decoded"]
        self.looked_up += message["looked_up"]
        self.fallback += message["fallback"]
        for stage, seconds in message["seconds"].items():
            self.seconds[stage] += seconds


RECORD_SECONDS = 5.0  # seconds between two records of how far a stage is


class Progress:
    """How far a stage is, recorded every few seconds for `arrowhead watch`. The step is the number
    of images that are done, so a run that is taken up again goes on where it was.
    """

    def __init__(self, run: Run | None, work: Work, there: int, total: int) -> None:
        self._run, self._work, self._there, self._total = run, work, there, total
        self._began = self._last = monotonic()
        self._recorded = -1
        self.now()

    def __call__(self) -> None:
        """Record, if it is time."""
        if monotonic() - self._last >= RECORD_SECONDS:
            self.now()

    def now(self) -> None:
        """Record, once for each number of images."""
        self._last = monotonic()
        work, done = self._work, self._there + self._work.files
        if self._run is None or done == self._recorded:
            return
        self._recorded = done
        busy = {f"progress.seconds.{k}": work.seconds.get(k, 0.0) for k in extract.STAGES}
        rate = work.files / max(self._last - self._began, 1e-9)
        figures = {"images": done, "total": self._total, "faults": work.faults, "rate": rate}
        self._run.record({f"progress.{k}": v for k, v in figures.items()} | busy, step=done)
