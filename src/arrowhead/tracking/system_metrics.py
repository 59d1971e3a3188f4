"""What the machine does during a run, recorded with it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from arrowhead.tracking.client import TrackingConfig, first_line
from arrowhead.tracking.sender import Sender
from arrowhead.tracking.writes import batch

MIN_INTERVAL_SECONDS, DEFAULT_INTERVAL_SECONDS = (
    0.5,
    10.0,
)  # seconds between samples of system metrics: a run's first, its later ones


@contextmanager
def gauge(config: TrackingConfig, sender: Sender, run_id: str) -> Iterator[None]:
    """System metrics of this process's machine, under MLflow's names, while the block lasts.

    The collectors are MLflow's, the thread is ours: MLflow's own ends for good at the first
    answer that fails, and stopping it waits for the server without a limit.
    """
    if not config.system_metrics:
        yield
        return
    stop = threading.Event()
    watch = threading.Thread(target=_watch, args=(sender, run_id, stop), daemon=True)
    watch.start()
    try:
        yield
    finally:
        stop.set()
        watch.join(5.0)


def _watch(sender: Sender, run_id: str, stop: threading.Event) -> None:
    try:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        usual = float(
            os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL") or DEFAULT_INTERVAL_SECONDS
        )
        collect = SystemMetricsMonitor(run_id, tracking_uri=sender.store.client.tracking_uri)
        collect.collect_metrics()  # the first figures are of the time since the machine started
        began, step = monotonic(), sender.store.samples(run_id)
        while not stop.is_set():
            for one in collect.monitors:
                one.clear_metrics()
            # Short runs get a few samples, long ones no more than MLflow's usual.
            stop.wait(min(usual, max(MIN_INTERVAL_SECONDS, (monotonic() - began) / 4)))
            collect.collect_metrics()
            found = {f"system/{k}": v for k, v in collect.aggregate_metrics().items()}
            points = {name: [(step, float(value))] for name, value in found.items()}
            sender.write({"do": "batch", "run": run_id} | batch(points))
            step += 1
    except Exception as error:
        sender.say(f"no system metrics are recorded: {first_line(error)}")
