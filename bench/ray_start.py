"""How long a group of Ray workers takes to start: from an idle Python to the first line of a stage.

    .venv/bin/python bench/ray_start.py [--workers 2]

Prints when Ray was connected, when each worker's process was made and when its stage began, in
seconds from the start of this process, and the CPU seconds of all processes.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import psutil

from arrowhead.runtime import launch
from arrowhead.runtime.ray_cluster import LaunchConfig, connect
from arrowhead.runtime.worker import Worker


def stage(worker: Worker) -> None:
    """Report when this began."""
    process = psutil.Process()
    begun = {"begun": time.time(), "made": process.create_time(), "rank": worker.rank}
    worker.report(begun)


def main() -> None:
    """Start a group and print its times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    config = LaunchConfig(workers=parser.parse_args().workers)
    this = psutil.Process()
    start = this.create_time()
    connect(config)
    print(f"{time.time() - start:5.1f} s  Ray is connected")

    def show(report: dict[str, Any]) -> None:
        if "begun" in report:
            made, begun = report["made"] - start, report["begun"] - start
            print(f"{begun:5.1f} s  worker {report['rank']} works (process made at {made:.1f} s)")

    launch.run(stage, config=config, on_report=show)
    cpu = 0.0
    for process in [this, *this.children(recursive=True)]:
        times = process.cpu_times()
        cpu += times.user + times.system
    print(f"{cpu:5.1f} s  of CPU, in {len(this.children(recursive=True)) + 1} processes")
    print(f"       {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
