"""All uses of Ray's private names, and a check that the installed Ray has them.

Ray may change these names at any time. `NAMES` lists each with the parameters that Arrowhead
passes. Before a cluster is joined, `missing_names` compares the list with the installed Ray, so
another version of Ray is refused with a clear message. pyproject.toml allows no version of Ray
newer than the newest one known to have all of these names.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
from collections.abc import Iterable, Iterator
from typing import Any

_TRAIN = "ray.train.v2._internal"
LEAVE_SECONDS = 30.0  # for workers to leave torch's process group
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
    ("ray._private.node", "Node.start_api_server", ()),
    ("ray._private.parameter", "RayParams", ("no_monitor", "include_log_monitor")),
    ("ray.train.v2.api.data_parallel_trainer", "DataParallelTrainer._create_default_callbacks", ()),
    (
        "ray.train.v2.api.data_parallel_trainer",
        "DataParallelTrainer._initialize_and_run_controller",
        (),
    ),
    (f"{_TRAIN}.execution.controller", "TrainController.run", ()),
    (f"{_TRAIN}.execution.controller", "TrainController.get_result", ()),
    (f"{_TRAIN}.execution.scaling_policy", "FixedScalingPolicy.after_controller_start", ()),
    (f"{_TRAIN}.execution.scaling_policy", "FixedScalingPolicy._maybe_send_resource_request", ()),
    ("ray.train.backend", "Backend.on_start", ("self", "worker_group", "backend_config")),
    ("ray.train._internal.utils", "get_address_and_port", ()),
    (
        "ray.train.torch.config",
        "_setup_torch_process_group",
        ("backend", "world_rank", "world_size", "init_method"),
    ),
    ("ray.train.torch.config", "_set_torch_distributed_env_vars", ()),
    ("ray.train.torch.config", "_shutdown_torch", ("destroy_process_group",)),
    (f"{_TRAIN}.execution.worker_group.worker_group", "WorkerGroup.execute_single", ()),
    (f"{_TRAIN}.execution.worker_group.worker_group", "WorkerGroup.execute_single_async", ()),
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


# -------------------------------------------------------------------------- a faster start


@contextlib.contextmanager
def few_processes() -> Iterator[None]:
    """Within this, `ray.init` starts a Ray of this machine without processes that nothing uses.

    Left out are the autoscaler's monitor, the log monitor (workers report through the task queue)
    and the server of usage statistics, which are off. Each costs a second of a CPU.
    """
    from ray._private import node, parameter

    params, start_api_server = parameter.RayParams, node.Node.start_api_server
    parameter.RayParams = functools.partial(params, no_monitor=True, include_log_monitor=False)
    node.Node.start_api_server = lambda self, **_: None
    try:
        yield
    finally:
        parameter.RayParams, node.Node.start_api_server = params, start_api_server


def fast_starting_trainer(private_ray: bool) -> Any:
    """Ray's data-parallel trainer without helper processes, each of which takes seconds to start.

    One distributes Ray data sets, of which there are none. On a private Ray, two more are needless:
    one frees the resources of a driver that was killed, but such a Ray ends with its driver; the
    other asks an autoscaler for the resources of a group of fixed size.

    Args:
        private_ray: Whether this process started the Ray it uses.

    Returns:
        The subclass of DataParallelTrainer.
    """
    import ray
    from ray.train.v2._internal.callbacks import datasets, placement_group_callback
    from ray.train.v2._internal.execution.controller import TrainController
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    unneeded: list[type] = [datasets.DatasetsCallback]
    if private_ray:
        unneeded.append(placement_group_callback.PlacementGroupCleanerCallback)

    class LocalScalingPolicy(FixedScalingPolicy):  # type: ignore[misc]
        def after_controller_start(self, train_run_context: Any) -> None:
            pass

        def _maybe_send_resource_request(self) -> None:
            pass

    class Trainer(DataParallelTrainer):  # type: ignore[misc]
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [one for one in callbacks if not isinstance(one, tuple(unneeded))]

        def _initialize_and_run_controller(self, **options: Any) -> Any:
            if not private_ray:
                return super()._initialize_and_run_controller(**options)
            if type(options["scaling_policy"]) is FixedScalingPolicy:
                options["scaling_policy"] = LocalScalingPolicy(self.scaling_config)
            # Ray gives this actor environment variables, which a private Ray has from this process.
            # Without them it takes a process that is waiting for work.
            controller = ray.remote(num_cpus=0)(TrainController).remote(**options)
            ray.get(controller.run.remote())
            return ray.get(controller.get_result.remote())

    return Trainer


# ----------------------------------------------------------------- torch's process group


def torch_backend(backend: str) -> Any:
    """The BackendConfig that connects workers by torch.distributed.

    It does what Ray's TorchConfig does, with two differences. Only workers import torch: Ray's own
    makes the process that controls the group import it, too, before it starts them. And gloo uses
    the network interface that has Ray's address: by default it takes the one of the address that
    the machine's name resolves to, often 127.0.1.1, where two hosts would not find each other.

    Args:
        backend: gloo or nccl.
    """
    import ray
    from ray.train._internal.utils import get_address_and_port
    from ray.train.backend import Backend, BackendConfig

    class TorchBackend(Backend):  # type: ignore[misc]
        share_cuda_visible_devices = True

        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            address, port = worker_group.execute_single(0, get_address_and_port)
            size = len(worker_group)
            ray.get(
                [
                    worker_group.execute_single_async(
                        rank, _join_process_group, backend, rank, size, address, port
                    )
                    for rank in range(size)
                ]
            )

        def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
            futures = worker_group.execute_async(_leave_process_group)
            with contextlib.suppress(ray.exceptions.GetTimeoutError):
                ray.get(futures, timeout=LEAVE_SECONDS)

    class TorchConfig(BackendConfig):  # type: ignore[misc]
        backend_cls = TorchBackend

    return TorchConfig()


def _join_process_group(backend: str, rank: int, size: int, address: str, port: int) -> None:
    """Join torch's process group, on a worker."""
    import psutil
    import ray
    import ray.train.torch
    import torch
    from ray.train.torch import config

    own = ray.util.get_node_ip_address()
    for interface, addresses in psutil.net_if_addrs().items():
        if any(one.address == own for one in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    config._set_torch_distributed_env_vars()
    if (device := ray.train.torch.get_device()).type == "cuda":
        torch.cuda.set_device(device)
    config._setup_torch_process_group(backend, rank, size, "env://")


def _leave_process_group() -> None:
    from ray.train.torch import config

    config._shutdown_torch(destroy_process_group=True)
