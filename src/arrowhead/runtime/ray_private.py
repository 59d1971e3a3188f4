"""The corners of Ray that have no public way in: all of them, and whether they are there.

Ray promises none of these names. `NAMES` lists each with the parameters that we pass, and `missing`
compares the list with the Ray that is installed before a cluster is joined, so that another version
of Ray is refused in words. Above the newest version they were seen in, pyproject.toml takes none.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from typing import Any

_TRAIN = "ray.train.v2._internal"
_COORDINATOR = "AutoscalingCoordinator"  # name and namespace of an actor of Ray's

# Module, name in it, and the parameters that we pass; None for what is no function.
NAMES: tuple[tuple[str, str, tuple[str, ...] | None], ...] = (
    ("ray._private.services", "find_gcs_addresses", ()),
    ("ray._private.worker", "_global_node", None),
    ("ray._private.node", "Node.is_head", ()),
    ("ray._private.node", "Node.dead_processes", ()),
    ("ray._private.state", "state.get_draining_nodes", ()),
    ("ray._private.state", "available_resources_per_node", ()),
    (
        "ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator",
        "_AutoscalingCoordinatorActor.get_reserved_resources",
        ("requester_id", "recompute"),
    ),
    (f"{_TRAIN}.callbacks.datasets", "DatasetsCallback", None),
    (f"{_TRAIN}.callbacks.placement_group_callback", "PlacementGroupCleanerCallback", None),
    ("ray.train.torch", "TorchTrainer._create_default_callbacks", ()),
    (
        "ray.train.torch.config",
        "_TorchBackend.on_start",
        ("self", "worker_group", "backend_config"),
    ),
    (f"{_TRAIN}.execution.worker_group.worker_group", "WorkerGroup.execute", ()),
    (f"{_TRAIN}.execution.storage", "StorageContext.experiment_fs_path", None),
    (f"{_TRAIN}.exceptions", "WorkerHealthCheckTimeoutError", None),
    (f"{_TRAIN}.exceptions", "WorkerHealthCheckFailedError", None),
    (f"{_TRAIN}.exceptions", "WorkerGroupStartupTimeoutError", None),
    (f"{_TRAIN}.exceptions", "UserExceptionWithTraceback", ("exc", "traceback_str")),
    ("ray.train.v2.api.exceptions", "PreemptionError", None),
    ("ray.train.v2.api.exceptions", "WorkerGroupError", ("error_message", "worker_failures")),
    ("ray.train.v2.api.exceptions", "ControllerError", ("controller_failure",)),
    (f"{_TRAIN}.constants", "HEALTH_CHECK_INTERVAL_S_ENV_VAR", None),
    (f"{_TRAIN}.constants", "WORKER_GROUP_START_TIMEOUT_S_ENV_VAR", None),
    (f"{_TRAIN}.constants", "ENABLE_PREEMPTION_WATCHER_ENV_VAR", None),
)


def missing() -> list[str]:
    """The names that this Ray lacks, or that do not take our parameters any more."""
    import ray.job_config

    lacking = []
    for module, name, parameters in NAMES:
        try:
            found: Any = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
            fits = parameters is None or {*parameters} <= {*inspect.signature(found).parameters}
        except (ImportError, AttributeError, TypeError, ValueError):
            fits = False
        if not fits:
            lacking.append(f"{module}.{name}")
    if not isinstance(getattr(ray.job_config.JobConfig(), "_py_driver_sys_path", None), list):
        lacking.append("ray.job_config.JobConfig._py_driver_sys_path")
    return lacking


# --------------------------------------------------------------------- the Ray we are in


def gcs_addresses() -> list[str]:
    """Addresses of the clusters that this machine belongs to."""
    from ray._private import services

    return sorted(services.find_gcs_addresses())


def own_node() -> Any:
    """The node that this process has started, with `is_head` and `dead_processes`; or None."""
    import ray._private.worker as inside

    return getattr(inside, "_global_node", None)


def draining_nodes() -> dict[str, int]:
    """Machines that are announced to go (node ids), and when: milliseconds since 1970, or 0."""
    import ray._private.state as inside

    return dict(inside.state.get_draining_nodes())


def free_resources() -> dict[str, dict[str, float]]:
    """What is free of each machine, by node id."""
    import ray._private.state as inside

    return dict(inside.available_resources_per_node())


def recount() -> None:
    """Have Ray's elastic groups see what machines there are now: they look every 20 s only."""
    import ray

    counts = ray.get_actor(_COORDINATOR, namespace=_COORDINATOR)
    ray.get(counts.get_reserved_resources.remote("arrowhead", recompute=True), timeout=5)


class _Closed(list[str]):
    """Takes nothing up."""

    def extend(self, items: Iterable[str]) -> None:
        """Leave them."""


def nothing_from_our_folder() -> Any:
    """Settings of a driver whose workers import nothing from the folder that it stands in: it is a
    folder of data, and its `numpy.py` would be run.
    """
    import ray.job_config

    config = ray.job_config.JobConfig()
    config._py_driver_sys_path = _Closed()  # Ray adds our folder to this
    return config


# ------------------------------------------------------------------------------ Ray Train


def lean_trainer(own: bool) -> Any:
    """Ray's trainer, less two processes that each group would wait seconds for: one hands out Ray
    data sets, of which there are none; one frees the room of a driver that was killed, which in a
    Ray of our `own` goes with it.
    """
    import ray.train.torch
    from ray.train.v2._internal.callbacks import datasets, placement_group_callback

    needless: list[type] = [datasets.DatasetsCallback]
    if own:
        needless.append(placement_group_callback.PlacementGroupCleanerCallback)

    class Trainer(ray.train.torch.TorchTrainer):  # type: ignore[misc]
        def _create_default_callbacks(self) -> list[Any]:
            usual = super()._create_default_callbacks()
            return [one for one in usual if not isinstance(one, tuple(needless))]

    return Trainer
