"""Join or start the Ray cluster that does the work; know its machines and their free resources.

    connect                           the cluster at an address, or a private Ray with a token
    worker_count, worker_capacity     how many workers it can hold: now, and with its autoscaler
    draining_nodes, unreachable_nodes machines that will be taken away, or do not answer

Ray promises neither that an unreachable or draining machine gets no work, nor that waiting for
resources ends; Ray's private names needed for that are in `runtime.ray_private`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import secrets
import socket
import sys
import textwrap
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arrowhead.errors import ConfigError
from arrowhead.runtime import ray_private, signals

STARTUP_TIMEOUT_SECONDS = 20.0  # an interrupt waits until Ray has started, at most this long


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchConfig:
    """Where the work is done."""

    workers: int | str = "auto"
    """auto: this process; with several GPUs, one worker per GPU; with a cluster's address, as many
    as the cluster has room for. 0: this process. N: N Ray Train workers, one per GPU, or one per
    CPU if there are too few GPUs. MIN:MAX (e.g. 1:2): as many as the cluster has room for; if
    workers are lost, continue with fewer."""
    address: str | None = None
    """Address of a running Ray cluster (auto, or HOST:PORT). Default: RAY_ADDRESS, or a new Ray on
    this machine."""
    restarts: int = 3
    """How often to start the workers again after one is lost, before the command gives up."""
    wait: float = 1800.0
    """Seconds to wait until the cluster has room for the workers, before the command gives up."""

    def __post_init__(self) -> None:
        if self.restarts < 0:
            raise ConfigError(f"--restarts is {self.restarts}.", "0 or more.", "give e.g. 3.")
        if not self.wait > 0:
            raise ConfigError(f"--wait is {self.wait}.", "more than 0 seconds.", "give e.g. 1800.")
        if self.workers == "auto":
            return
        if not re.fullmatch(r"[0-9]{1,6}(:[0-9]{1,6})?", str(self.workers)):
            raise ConfigError(
                f"--workers is {self.workers}.",
                "auto, 0 (this process) or more, or a range of at least 1.",
                "give e.g. 2, or 1:2.",
            )
        if ":" in str(self.workers) and not 1 <= self.min_workers <= self.max_workers:
            raise ConfigError(
                f"--workers is {self.workers}.",
                "MIN:MAX with MIN of 1 or more and MAX not below it.",
                "give e.g. 1:2.",
            )
        if self.address and not self.max_workers:
            raise ConfigError(
                f"--address {self.address} needs workers.",
                "--workers of 1 or more, or auto, with an address.",
                "leave out --workers, or give the number of workers.",
            )

    @property
    def min_workers(self) -> int:
        """The smallest worker group that is started; 0: this process, also for `auto` as long as
        `worker_choice` has not replaced it.
        """
        return 0 if self.workers == "auto" else int(str(self.workers).partition(":")[0])

    @property
    def max_workers(self) -> int:
        """The size of the worker group if the cluster has room for it; 0: this process."""
        return 0 if self.workers == "auto" else int(str(self.workers).rpartition(":")[2])


def connect(config: LaunchConfig) -> None:
    """Join the cluster, or start a private Ray with token authentication and no dashboard.

    Raises:
        ConfigError: The cluster does not answer, or Ray does not start.
    """
    enable_token_auth()
    # A rank's second report waits until Ray has read its first one; the default is every 2 s.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    # By default Ray waits a minute for resources. If they are not free at once, count them again.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    import ray

    if ray.is_initialized():
        return
    check_ray_version()
    address = config.address or os.environ.get("RAY_ADDRESS")
    if address:
        _check_reachable(address)
    else:  # nobody preempts this machine, and the process that watches for it takes seconds
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # Ray runs workers at nice 15: on a busy machine they would start, and work, much slower
        # than the same command without workers.
        os.environ.setdefault("RAY_worker_niceness", "0")
    private_ray = {
        "num_cpus": max(config.max_workers, os.cpu_count() or 1),
        "include_dashboard": False,
    }
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"  # inherited by all of Ray's processes
    try:
        # Interrupted half way, Ray aborts this process or leaves its agents for a minute.
        lean = contextlib.nullcontext() if address else ray_private.few_processes()
        with signals.deferred(STARTUP_TIMEOUT_SECONDS), signals.keep_handlers(), lean:
            ray.init(
                address=address or "local",
                job_config=ray_private.job_config_without_cwd(),
                log_to_driver=False,  # workers report through the task queue
                logging_level="warning",
                **({} if address else private_ray),
            )
    except ConnectionError as error:
        raise _unreachable_error(str(address), error) from error
    except Exception as error:  # of many types, depending on which process is missing
        raise _start_error(address, error) from error
    finally:
        os.environ.pop("PYTHONSAFEPATH")
        if before is not None:
            os.environ["PYTHONSAFEPATH"] = before
    atexit.register(ray.shutdown)


def check_ray_version() -> None:
    """Raise ConfigError if this Ray lacks one of the private names that Arrowhead uses."""
    import ray

    if names := ray_private.missing_names():
        raise ConfigError(
            f"Ray {ray.__version__} has no {names[0]} that Arrowhead can use"
            f"{f' (and {len(names) - 1} more)' if names[1:] else ''}.",
            "the version in requirements.lock, or another that pyproject.toml allows.",
            "install that version, or run with --workers 0.",
        )


def _check_reachable(address: str) -> None:
    """Raise ConfigError if nothing listens at HOST:PORT; Ray itself would wait forever."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():  # auto, local: Ray resolves these without waiting
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise _unreachable_error(address, error) from error


def _unreachable_error(address: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"No Ray cluster answers at {address}: {error}.",
        "the address of a running head node.",
        "start one (`ray start --head`), or leave out --address to start Ray on this machine.",
    )


def _start_error(address: str | None, error: BaseException) -> ConfigError:
    """The refusal when Ray does not start: the first line of Ray's message, without colours."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines() or [type(error).__name__]
    why = textwrap.shorten(lines[0], 200)
    if address:
        return ConfigError(
            f"The Ray cluster at {address} answers, but this machine is not a node of it: {why}",
            "a node of that cluster: a machine on which its raylet runs.",
            f"start one here (`ray start --address {address}`), or send the command to the cluster"
            " with `arrowhead submit`.",
        )
    return ConfigError(
        f"Ray does not start on this machine: {why}",
        "running Ray processes (raylet, GCS), with free memory and space in /tmp and /dev/shm.",
        "see /tmp/ray/session_latest/logs, or run with --workers 0, which needs no Ray.",
    )


def enable_token_auth() -> Path:
    """Turn on Ray's token authentication; create the token file (mode 0600) if it is missing.

    Without a token, anyone who reaches the job port can run code here (CVE-2023-48022).

    Returns:
        The token file.
    """
    if "ray" not in sys.modules:  # ray reads this once, when it is imported
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    path = token_file()
    if not path.exists() and "RAY_AUTH_TOKEN" not in os.environ:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(32))
    elif path.exists():
        path.chmod(0o600)
    return path


def token_file() -> Path:
    """Where Ray looks for the token."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def cluster_address() -> str | None:
    """Address of the Ray cluster this machine belongs to, None without one."""
    addresses = ray_private.gcs_addresses()
    return os.environ.get("RAY_ADDRESS") or (addresses[0] if addresses else None)


def is_private() -> bool:
    """Whether this process started the Ray it uses, so that Ray ends with it."""
    node = ray_private.local_node()
    return bool(node and node.is_head())


def is_dead() -> bool:
    """Whether a process (raylet, GCS) of a private Ray has died."""
    node = ray_private.local_node()
    return bool(node and node.dead_processes())


def on_this_node() -> Any:
    """A scheduling strategy: on the driver's machine, so the loss of another does no harm."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


# ------------------------------------------------------------------- machines and resources


RELEASE_SECONDS = 5.0  # that Ray may take to free the resources of a lost group


def worker_count(config: LaunchConfig) -> int | tuple[int, int]:
    """The number of workers to request from Ray Train, or a range (min, max) for an elastic group.

    Ray's elastic groups follow the total resources of the machines, not the free ones, and then
    wait for resources that others hold. So the range ends at the free resources, unless all
    resources are free: then machines that join later make the group larger.
    """
    if (limit := _max_capacity(config)) < config.min_workers:
        raise ConfigError(
            f"--workers is {config.workers}; the cluster can grow to {limit} at most.",
            "no more workers than its CPUs (or GPUs, if it has enough) at its maximum size.",
            f"give --workers {limit}, or raise max_workers in the cluster's file.",
        )
    if config.min_workers == config.max_workers:
        return config.max_workers
    refresh_resources()
    deadline = time.monotonic() + RELEASE_SECONDS
    while True:
        free = worker_capacity(config, only_free=True)
        wanted = min(config.max_workers, worker_capacity(config, only_free=False))
        if free >= wanted or time.monotonic() > deadline:
            break
        time.sleep(0.25)
    limit = config.max_workers if free >= wanted else max(free, config.min_workers)
    return (config.min_workers, limit) if config.min_workers < limit else limit


def worker_capacity(config: LaunchConfig, only_free: bool) -> int:
    """How many workers the cluster can hold.

    Args:
        config: The request; decides whether a worker takes a GPU.
        only_free: Count the free resources of machines that are not draining, else all resources.
    """
    import ray

    kinds = _resource_kinds(config)
    if not only_free:
        return _workers(kinds, ray.cluster_resources())
    nodes, draining = ray_private.free_resources(), draining_nodes()
    return sum(_workers(kinds, free) for node, free in nodes.items() if node not in draining)


def _resource_kinds(config: LaunchConfig) -> list[str]:
    """The resources of which each worker takes one unit."""
    return ["CPU", "GPU"] if gpus() >= config.min_workers else ["CPU"]


def _workers(kinds: list[str], resources: dict[str, float]) -> int:
    """How many workers the resources are enough for."""
    return int(min(resources.get(kind, 0) for kind in kinds))


def gpus() -> int:
    """GPUs of the cluster, including those that its autoscaler may add."""
    import ray

    return int(max(ray.cluster_resources().get("GPU", 0), _autoscaler_limits().get("GPU", 0)))


def _autoscaler_limits() -> dict[str, float]:
    """CPUs and GPUs of the cluster at its maximum size; empty if unknown.

    Ray has no call for this. `ray up` leaves its configuration file on the head node, where drivers
    run; that file says nothing about a private Ray on the same machine.
    """
    import yaml  # type: ignore[import-untyped]

    if is_private():
        return {}
    try:
        config = yaml.safe_load((Path.home() / "ray_bootstrap_config.yaml").read_text())
        node_types, max_workers, head = (
            config["available_node_types"],
            config["max_workers"],
            config["head_node_type"],
        )
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return {}
    count = {k: min(v.get("max_workers", max_workers), max_workers) for k, v in node_types.items()}
    limits = {}
    for resource in ("CPU", "GPU"):
        units = {k: v.get("resources", {}).get(resource, 0) for k, v in node_types.items()}
        machines = sorted((units[k] for k in node_types for _ in range(count[k])), reverse=True)
        limits[resource] = float(units[head] + sum(machines[:max_workers]))
    return limits


def _max_capacity(config: LaunchConfig) -> int:
    """How many workers a cluster with an autoscaler can ever hold; without one, any number."""
    import ray

    limits = _autoscaler_limits()
    now = ray.cluster_resources()
    resources = {kind: max(limits.get(kind, 0), now.get(kind, 0)) for kind in ("CPU", "GPU")}
    return _workers(_resource_kinds(config), resources) if limits else config.max_workers


def draining_nodes() -> dict[str, int]:
    """Machines that will be taken away: node id -> when, in ms since 1970 (0: unknown)."""
    return ray_private.draining_nodes()


def unreachable_nodes() -> list[str]:
    """Addresses of machines that Ray lists as alive but that accept no connection."""
    import ray

    addresses = []
    for node in ray.nodes():
        try:
            if node["Alive"]:
                raylet = node["NodeManagerAddress"], node["NodeManagerPort"]
                socket.create_connection(raylet, timeout=2).close()
        except OSError:
            addresses.append(node["NodeManagerAddress"])
    return addresses


def refresh_resources() -> None:
    """Make Ray's elastic groups see the machines of now; by themselves they look every 20 s."""
    with contextlib.suppress(Exception):
        ray_private.refresh_resources()


def placement_groups() -> dict[str, str]:
    """Placement groups of this process that are not removed: id -> state."""
    import ray
    from ray.util.placement_group import placement_group_table

    job_id = ray.get_runtime_context().get_job_id()  # the end of their ids
    states = {group_id: group["state"] for group_id, group in placement_group_table().items()}
    return {k: state for k, state in states.items() if k.endswith(job_id) and state != "REMOVED"}


def remove_placement_groups(group_ids: Iterable[str]) -> None:
    """Free the resources of a worker group that has ended.

    If a group fails while its workers are connected to each other, Ray keeps its resources as long
    as this process lives, and the next group would wait for them.
    """
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    for group_id in group_ids:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group_id)))
