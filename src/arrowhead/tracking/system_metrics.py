"""System metrics of the machine, recorded with the run."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from arrowhead.tracking.client import TrackingConfig, first_line
from arrowhead.tracking.sender import Sender
from arrowhead.tracking.writes import batch

MIN_INTERVAL_SECONDS = 0.5  # between the first samples of a run
DEFAULT_INTERVAL_SECONDS = 10.0  # between its later ones


@contextmanager
def gauge(config: TrackingConfig, sender: Sender, run_id: str) -> Iterator[None]:
    """Record this machine's system metrics under MLflow's names while the block lasts.

    The collectors are MLflow's, the thread is ours: MLflow's thread ends at the first request that
    fails, and stopping it waits for the server without a limit.
    """
    if not config.system_metrics:
        yield
        return
    stop = threading.Event()
    thread = threading.Thread(target=_record, args=(sender, run_id, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(5.0)


def _record(sender: Sender, run_id: str, stop: threading.Event) -> None:
    try:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        interval = float(
            os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL") or DEFAULT_INTERVAL_SECONDS
        )
        collect = SystemMetricsMonitor(run_id, tracking_uri=sender.store.client.tracking_uri)
        collect.collect_metrics()  # the first sample covers the time since boot
        began, step = monotonic(), sender.store.samples(run_id)
        while not stop.is_set():
            for one in collect.monitors:
                one.clear_metrics()
            # Short runs get a few samples, long ones no more than MLflow's interval.
            stop.wait(min(interval, max(MIN_INTERVAL_SECONDS, (monotonic() - began) / 4)))
            collect.collect_metrics()
            metrics = collect.aggregate_metrics()
            points = {f"system/{k}": [(step, float(v))] for k, v in metrics.items()}
            sender.write({"do": "batch", "run": run_id} | batch(points))
            step += 1
    except Exception as error:
        sender.print_line(f"no system metrics are recorded: {first_line(error)}")
