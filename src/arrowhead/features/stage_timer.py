"""Adds up how long each stage of a pipeline was busy, in whichever threads it runs."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter


class StageTimer:
    """Adds up the busy seconds of each stage; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time that the `with` block takes to the stage `name`."""
        start = perf_counter()
        try:
            yield
        finally:
            self.add(name, perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Add seconds that were measured elsewhere to the stage `name`."""
        with self._lock:
            self._seconds[name] += seconds

    def take(self) -> dict[str, float]:
        """Return the seconds by stage since the last call, and start again from 0."""
        with self._lock:
            seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds
