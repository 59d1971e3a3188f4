"""Choose how many workers run a command with `--workers auto`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from arrowhead.runtime.ray_cluster import LaunchConfig

DECODING_COMMANDS = ("fit", "precompute", "score", "evaluate", "race", "demo")
"""The commands that profit from many workers. Heads train in seconds, wherever they are."""
MAX_CLUSTER_WORKERS = 1024


def choose_workers(config: LaunchConfig, command: str) -> tuple[LaunchConfig, str]:
    """Replace `--workers auto` by a number or a range.

    Args:
        config: The flags; a number or a range is kept.
        command: The command's name. Those that decode use many workers, the others one.

    Returns:
        The settings with a number or a range of workers, and a line for the screen that says what
        was chosen and why; "" if there was nothing to choose.
    """
    if config.workers != "auto":
        return config, ""
    decodes = command in DECODING_COMMANDS
    if address := config.address or os.environ.get("RAY_ADDRESS"):
        workers = f"1:{MAX_CLUSTER_WORKERS}" if decodes else "1"
        source = "" if config.address else " (RAY_ADDRESS)"
        number = "all GPUs (or CPUs)" if decodes else "one worker"
        line = f"running on {number} of the cluster at {address}{source}"
        return dataclasses.replace(config, workers=workers), line
    gpus = local_gpus() if decodes else 0
    if gpus > 1:
        line = f"running on {gpus} workers: one for each GPU of this machine"
        return dataclasses.replace(config, workers=gpus), line
    cores = len(os.sched_getaffinity(0))
    device = "its GPU" if gpus else f"{cores} CPU core{'s' if cores > 1 else ''}; it has no GPU"
    line = f"running in one process on this machine, on {device}" if decodes else ""
    return dataclasses.replace(config, workers=0), line


def local_gpus() -> int:
    """Number of NVIDIA GPUs that this process may use."""
    # Without a driver, there is no reason to wait for the import of torch.
    if not (any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()):
        return 0
    import torch

    return torch.cuda.device_count()
