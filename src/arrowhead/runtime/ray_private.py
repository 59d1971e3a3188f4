"""All uses of Ray's private names, and a check that the installed Ray has them.

Ray may change these names at any time. `NAMES` lists each with the parameters that Arrowhead
passes. Before a cluster is joined, `missing_names` compares the list with the installed Ray, so
another version of Ray is refused with a clear message. pyproject.toml allows no version of Ray
newer than the newest one known to have all of these names.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from typing import Any

_TRAIN = "ray.train.v2._internal"
_COORDINATOR = "AutoscalingCoordinator"  # name and namespace of a Ray actor

# Module, name in it, and the parameters that Arrowhead passes (None: not a function).
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


def missing_names() -> list[str]:
    """The names that this Ray lacks, or that no longer take the parameters in `NAMES`."""
    import ray.job_config

    missing = []
    for module, name, parameters in NAMES:
        try:
            value: Any = importlib.import_module(module)
            for part in name.split("."):
                value = getattr(value, part)
            matches = parameters is None or {*parameters} <= {*inspect.signature(value).parameters}
        except (ImportError, AttributeError, TypeError, ValueError):
            matches = False
        if not matches:
            missing.append(f"{module}.{name}")
    if not isinstance(getattr(ray.job_config.JobConfig(), "_py_driver_sys_path", None), list):
        missing.append("ray.job_config.JobConfig._py_driver_sys_path")
    return missing


# ------------------------------------------------------------------- the connected cluster


def gcs_addresses() -> list[str]:
    """Addresses of the clusters that this machine belongs to."""
    from ray._private import services

    return sorted(services.find_gcs_addresses())


def local_node() -> Any:
    """The node that this process has started, with `is_head` and `dead_processes`; or None."""
    import ray._private.worker as ray_worker

    return getattr(ray_worker, "_global_node", None)


def draining_nodes() -> dict[str, int]:
    """Machines that will be taken away: node id -> when, in ms since 1970 (0: unknown)."""
    import ray._private.state as ray_state

    return dict(ray_state.state.get_draining_nodes())


def free_resources() -> dict[str, dict[str, float]]:
    """Free resources of each machine, by node id."""
    import ray._private.state as ray_state

    return dict(ray_state.available_resources_per_node())


def refresh_resources() -> None:
    """Make Ray's elastic groups see the machines of now; by themselves they look every 20 s."""
    import ray

    coordinator = ray.get_actor(_COORDINATOR, namespace=_COORDINATOR)
    ray.get(coordinator.get_reserved_resources.remote("arrowhead", recompute=True), timeout=5)


class _AlwaysEmptyList(list[str]):
    """A list that ignores `extend`."""

    def extend(self, items: Iterable[str]) -> None:
        """Ignore the items."""


def job_config_without_cwd() -> Any:
    """A JobConfig whose workers import nothing from the driver's working directory.

    That may be a folder of data, and a `numpy.py` in it would be run.
    """
    import ray.job_config

    config = ray.job_config.JobConfig()
    config._py_driver_sys_path = _AlwaysEmptyList()  # Ray adds the working directory to this
    return config


# ------------------------------------------------------------------------------ Ray Train


def fast_starting_trainer(private_ray: bool) -> Any:
    """TorchTrainer without two helper processes, which each group start would wait seconds for.

    One distributes Ray data sets, of which there are none. The other frees the resources of a
    driver that was killed; a private Ray ends with its driver anyway.

    Args:
        private_ray: Whether this process started the Ray it uses.

    Returns:
        The subclass of TorchTrainer.
    """
    import ray.train.torch
    from ray.train.v2._internal.callbacks import datasets, placement_group_callback

    unneeded: list[type] = [datasets.DatasetsCallback]
    if private_ray:
        unneeded.append(placement_group_callback.PlacementGroupCleanerCallback)

    class Trainer(ray.train.torch.TorchTrainer):  # type: ignore[misc]
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [one for one in callbacks if not isinstance(one, tuple(unneeded))]

    return Trainer
