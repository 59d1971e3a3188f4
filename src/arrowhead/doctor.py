"""Check what Arrowhead needs on this machine; each check is ok, a warning or missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from arrowhead.decode import worker_process
from arrowhead.errors import ConfigError
from arrowhead.runtime import ray_cluster
from arrowhead.tracking import client
from arrowhead.tracking.address import without_secrets
from arrowhead.tracking.client import TrackingConfig

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check; `fix` says what to do, and is empty if all is well."""

    name: str
    state: Literal["ok", "warning", "missing"]
    found: str
    fix: str = ""

    def plain(self) -> dict[str, str]:
        """As a dict, for JSON."""
        return asdict(self)

    def line(self) -> str:
        """As a line to print."""
        fix = f"  → {self.fix}" if self.fix else ""
        return f"{self.state:<8} {self.name:<10} {self.found}{fix}"


def checks() -> list[Check]:
    """Run every check. An exception in one becomes its result."""
    return [check for function in CHECKS for check in _run_check(function)]


def _run_check(function: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    name = function.__name__.strip("_")
    try:
        yield from function()
    except Exception as error:  # a broken installation can fail in any way
        message = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        yield Check(name, "missing", message, f"reinstall the package that {name} needs")


def _python() -> Iterator[Check]:
    version = platform.python_version()
    supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    fix = "" if supported else "use Python 3.11, 3.12 or 3.13"
    yield Check(
        "python", "ok" if supported else "warning", f"{version}, {os.cpu_count()} cores", fix
    )


def _torch() -> Iterator[Check]:
    import torch

    build = f"{torch.__version__}, CPU capability {torch.backends.cpu.get_cpu_capability()}"
    yield Check("torch", "ok", f"{build}, {torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        yield Check(
            "gpu",
            "warning",
            "none",
            "the CPU is fast enough for thousands of images, slow for millions",
        )
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        found = f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}"
        yield Check("gpu", "ok", f"{found}, {gpu.total_memory / GIB:.0f} GiB")


def _decoder() -> Iterator[Check]:
    version = importlib.metadata.version("nvidia-dali-cuda130")
    formats = ", ".join(worker_process.supported_formats())
    yield Check("dali", "ok", f"{version}, decodes {formats} on the CPU")


def _ray() -> Iterator[Check]:
    version = importlib.metadata.version("ray")
    address = ray_cluster.cluster_address()
    yield Check(
        "ray", "ok", f"{version}, {f'cluster at {address}' if address else 'no cluster running'}"
    )
    token = ray_cluster.token_file()
    if token.is_file() and token.stat().st_mode & 0o077:
        yield Check("ray token", "warning", f"{token} can be read by others", f"chmod 600 {token}")


def _mlflow() -> Iterator[Check]:
    version = importlib.metadata.version("mlflow")
    try:
        client.check_address_variables()
    except ConfigError as error:
        yield Check("mlflow", "missing", f"{version}, {error.found}", error.do)
        return
    config = TrackingConfig()
    yield Check("mlflow", "ok", f"{version}, store {without_secrets(config.uri)}")


def _weights() -> Iterator[Check]:
    home = Path(os.environ.get("TORCH_HOME") or Path.home() / ".cache" / "torch")
    files = sorted((home / "hub" / "checkpoints").glob("*.pth"))
    if files:
        yield Check(
            "weights", "ok", f"{len(files)} in {home}: {', '.join(f.name for f in files[:5])}"
        )
    else:
        fix = "--weights auto downloads them; or give --weights FILE, or --weights bundled"
        yield Check("weights", "warning", f"none cached in {home}", fix)


def _memory() -> Iterator[Check]:
    if Path("/dev/shm").is_dir():
        free = shutil.disk_usage("/dev/shm").free / GIB
        fix = (
            ""
            if free >= 1
            else "give the container more (docker run --shm-size=8g): Ray stores objects there"
        )
        yield Check("/dev/shm", "ok" if free >= 1 else "warning", f"{free:.1f} GiB free", fix)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fix = "" if soft >= 4096 else f"ulimit -n {hard}: Ray opens many files"
    yield Check(
        "open files", "ok" if soft >= 4096 else "warning", f"at most {soft} (hard {hard})", fix
    )


def _disk() -> Iterator[Check]:
    free = shutil.disk_usage(Path.cwd()).free / GIB
    fix = "" if free >= 5 else "free some space: the features of a million images need 1 to 4 GiB"
    yield Check(
        "disk", "ok" if free >= 5 else "warning", f"{free:.0f} GiB free in {Path.cwd()}", fix
    )


CHECKS = (_python, _torch, _decoder, _ray, _mlflow, _weights, _memory, _disk)
