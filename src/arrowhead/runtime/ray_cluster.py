"""The Ray cluster that work is done on: joined or started, its lock, its machines and their room.

    connect        the cluster at an address, or a Ray of our own with its token on
    size, room     how many workers it can hold: now, and when it is full-grown
    going, deaf    machines that are announced to go, or that take no connection

Much of this Ray has no public way to ask for: what is private of it is in `runtime.ray_private`.
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

START_SECONDS = 20.0  # an interrupt waits until Ray has started, for so long at most


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchConfig:
    """Where the work is done."""

    workers: int | str = 0
    """0: in this process. N: a Ray Train group of N workers, one per GPU, or per CPU. MIN:MAX (e.g.
    1:2): as many as there is room for, and on with fewer when some are lost."""
    address: str | None = None
    """Of a running Ray cluster (auto, or HOST:PORT). Default: RAY_ADDRESS, or a Ray of our own."""
    restarts: int = 3
    """How often a group that lost a worker is started again before the command gives up."""
    wait: float = 1800.0
    """Seconds to wait for machines with room for the workers before the command gives up."""

    def __post_init__(self) -> None:
        if self.restarts < 0:
            raise ConfigError(f"--restarts is {self.restarts}.", "0 or more.", "give e.g. 3.")
        if not self.wait > 0:
            raise ConfigError(f"--wait is {self.wait}.", "more than 0 seconds.", "give e.g. 1800.")
        if not re.fullmatch(r"[0-9]{1,6}(:[0-9]{1,6})?", str(self.workers)):
            raise ConfigError(
                f"--workers is {self.workers}.",
                "0 (this process) or more, or a range of at least 1.",
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
                "--workers of 1 or more with an address.",
                "add --workers N.",
            )

    @property
    def min_workers(self) -> int:
        """Workers without which no group is started; 0: this process."""
        return int(str(self.workers).partition(":")[0])

    @property
    def max_workers(self) -> int:
        """Workers of a group that has all the room it asks for; 0: this process."""
        return int(str(self.workers).rpartition(":")[2])


def connect(config: LaunchConfig) -> None:
    """Join the cluster, or start a Ray of our own: loopback dashboard, token on."""
    secure()
    # A rank's second report waits until Ray has asked for its first, every 2 s if left alone.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    # Room is there at once or has to be counted again; left alone Ray hopes for it for a minute.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    import ray

    if ray.is_initialized():
        return
    must_fit()
    address = config.address or os.environ.get("RAY_ADDRESS")
    if address:
        _must_answer(address)
    else:  # nobody takes this machine back; the process that would look for it takes seconds
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    own: dict[str, Any] = {"num_cpus": max(config.max_workers, os.cpu_count() or 1)}
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"  # for Ray's processes and all of theirs
    try:
        # Interrupted half way, Ray aborts this process or leaves its agents behind for a minute.
        with signals.deferred(START_SECONDS), signals.kept():
            ray.init(
                address=address or "local",
                job_config=ray_private.nothing_from_our_folder(),
                log_to_driver=False,  # workers report through the desk; Ray's own lines drown it
                logging_level="warning",
                **({} if address else own | {"include_dashboard": False}),
            )
    except ConnectionError as error:
        raise _no_cluster(str(address), error) from error
    except Exception as error:  # of many kinds, according to which process is missing
        raise _no_start(address, error) from error
    finally:
        os.environ.pop("PYTHONSAFEPATH")
        if before is not None:
            os.environ["PYTHONSAFEPATH"] = before
    atexit.register(ray.shutdown)


def must_fit() -> None:
    """Refuse a Ray that lacks what we use of its private names."""
    import ray

    if lacking := ray_private.missing():
        raise ConfigError(
            f"Ray {ray.__version__} has no {lacking[0]} that Arrowhead can use"
            f"{f' (and {len(lacking) - 1} more)' if lacking[1:] else ''}.",
            "the version in requirements.lock, or another that pyproject.toml allows.",
            "install that one, or run with --workers 0.",
        )


def _must_answer(address: str) -> None:
    """Refuse a HOST:PORT where nothing listens; Ray itself would wait there for ever."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():  # auto, local: Ray finds these without waiting
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"No Ray cluster answers at {address}: {error}.",
        "the address of a running head node.",
        "start one (`ray start --head`), or leave --address out for a Ray of this machine.",
    )


def _no_start(address: str | None, error: BaseException) -> ConfigError:
    """Ray raises its own words, or ends the process with them, when a raylet or GCS is missing."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines() or [type(error).__name__]
    why = textwrap.shorten(lines[0], 200)
    if address:
        return ConfigError(
            f"The Ray at {address} answers, but knows no node on this machine: {why}",
            "a machine that is a node of that cluster: a raylet runs on it.",
            f"start one here (`ray start --address {address}`), or send the command to the cluster"
            " with `arrowhead submit`.",
        )
    return ConfigError(
        f"Ray does not start on this machine: {why}",
        "its processes (raylet, GCS) running, with memory and room below /tmp and /dev/shm.",
        "see /tmp/ray/session_latest/logs, or run with --workers 0, which needs no Ray.",
    )


def secure() -> Path:
    """Switch Ray's token authentication on; the token file, made (mode 0600) if there is none.

    Without it anyone who reaches the job port runs code here (CVE-2023-48022).
    """
    if "ray" not in sys.modules:  # ray reads it once, at import; later, ray.init sees to it
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


def address() -> str | None:
    """Address of the Ray cluster this machine belongs to, None without one."""
    found = ray_private.gcs_addresses()
    return os.environ.get("RAY_ADDRESS") or (found[0] if found else None)


def is_own() -> bool:
    """Whether the Ray that we are in was started by this process, and ends with it."""
    node = ray_private.own_node()
    return bool(node and node.is_head())


def is_dead() -> bool:
    """Whether a process of a Ray that we started (raylet, GCS) has died."""
    node = ray_private.own_node()
    return bool(node and node.dead_processes())


def beside_us() -> Any:
    """Where this process runs: no machine that goes takes what is placed so."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


# ------------------------------------------------------------------------- machines and room


SETTLE_SECONDS = 5.0  # seconds that Ray may take to give back what a lost group held


def size(config: LaunchConfig) -> int | tuple[int, int]:
    """What Ray Train is asked for: so many workers, or from so many to so many.

    Ray's elastic groups follow what the machines have, not what is free of it, and then wait for
    room that others hold. So the range ends where the free room does, unless all of it is free:
    then machines that join later, or that an autoscaler brings, make the group larger.
    """
    if (limit := _most(config)) < config.min_workers:
        raise ConfigError(
            f"--workers is {config.workers}; the cluster grows to {limit} at most.",
            "no more workers than it has CPUs (GPUs, where it has enough) when it is full-grown.",
            f"give --workers {limit}, or raise max_workers in the cluster's file.",
        )
    if config.min_workers == config.max_workers:
        return config.max_workers
    recount()
    until = time.monotonic() + SETTLE_SECONDS
    while (free := room(config, free=True)) < min(
        config.max_workers, there := room(config, free=False)
    ):
        if time.monotonic() > until:
            break
        time.sleep(0.25)
    most = (
        config.max_workers
        if free >= min(config.max_workers, there)
        else max(free, config.min_workers)
    )
    return (config.min_workers, most) if config.min_workers < most else most


def room(config: LaunchConfig, free: bool) -> int:
    """Workers that the cluster can hold: in all of its machines, or in the free room of those that
    are to stay.
    """
    import ray

    kinds = _kinds(config)
    if not free:
        return _workers(kinds, ray.cluster_resources())
    nodes, leaving = ray_private.free_resources(), going()
    return sum(_workers(kinds, its) for node, its in nodes.items() if node not in leaving)


def _kinds(config: LaunchConfig) -> list[str]:
    """What each worker takes one of."""
    return ["CPU", "GPU"] if gpus() >= config.min_workers else ["CPU"]


def _workers(kinds: list[str], resources: dict[str, float]) -> int:
    """Workers that resources suffice for."""
    return int(min(resources.get(kind, 0) for kind in kinds))


def gpus() -> int:
    """GPUs of the cluster, with those that its autoscaler may bring."""
    import ray

    return int(max(ray.cluster_resources().get("GPU", 0), _full_grown().get("GPU", 0)))


def _full_grown() -> dict[str, float]:
    """CPUs and GPUs of the cluster when its autoscaler has brought all it may; empty if unknown.

    Ray's autoscaler tells nobody what it may bring. `ray up` leaves its file on the head, where
    drivers run; it says nothing of a Ray of our own there.
    """
    import yaml  # type: ignore[import-untyped]

    if is_own():
        return {}
    try:
        file = yaml.safe_load((Path.home() / "ray_bootstrap_config.yaml").read_text())
        kinds, limit, head = (
            file["available_node_types"],
            file["max_workers"],
            file["head_node_type"],
        )
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return {}
    grown = {}
    for what in ("CPU", "GPU"):
        has = {kind: its.get("resources", {}).get(what, 0) for kind, its in kinds.items()}
        most = {kind: min(its.get("max_workers", limit), limit) for kind, its in kinds.items()}
        machines = sorted((has[kind] for kind in kinds for _ in range(most[kind])), reverse=True)
        grown[what] = float(has[head] + sum(machines[:limit]))
    return grown


def _most(config: LaunchConfig) -> int:
    """Workers that a cluster with an autoscaler can ever hold; without one, any number."""
    import ray

    grown = _full_grown()
    there = ray.cluster_resources()
    most = {kind: max(grown.get(kind, 0), there.get(kind, 0)) for kind in ("CPU", "GPU")}
    return _workers(_kinds(config), most) if grown else config.max_workers


def going() -> dict[str, int]:
    """Machines that are announced to go (node ids), and when: milliseconds since 1970, or 0."""
    return ray_private.draining_nodes()


def deaf() -> list[str]:
    """Machines that Ray takes for alive and that take no connection."""
    import ray

    found = []
    for node in ray.nodes():
        place = node["NodeManagerAddress"], node["NodeManagerPort"]
        try:
            if node["Alive"]:
                socket.create_connection(place, timeout=2).close()
        except OSError:
            found.append(node["NodeManagerAddress"])
    return found


def recount() -> None:
    """Have Ray's elastic groups see what machines there are now: they look every 20 s only."""
    with contextlib.suppress(Exception):
        ray_private.recount()


def placement_groups() -> dict[str, str]:
    """Those of this process that are not removed, with their states."""
    import ray
    from ray.util.placement_group import placement_group_table

    ours = ray.get_runtime_context().get_job_id()  # the end of their names
    states = {name: one["state"] for name, one in placement_group_table().items()}
    return {k: state for k, state in states.items() if k.endswith(ours) and state != "REMOVED"}


def give_back(groups: Iterable[str]) -> None:
    """Free the room of a group that is gone. Where one fails while its workers are joined to each
    other, Ray keeps the room as long as this process lives, and the next group would wait for it.
    """
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    for name in groups:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(name)))
