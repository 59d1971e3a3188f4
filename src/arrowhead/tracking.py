"""A run, recorded in MLflow.

    start          one parent run per command; children per stage
      -> Run       record metrics by step, params, figures, files, data sets

Only the driver writes. The default store is mlflow.db in the working directory, with the
artefacts in mlruns/ beside it: `mlflow ui` there shows everything.
"""

from __future__ import annotations

import contextlib
import getpass
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Any

from arrowhead import ConfigError

if TYPE_CHECKING:
    from mlflow import MlflowClient


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """Where runs are recorded."""

    tracking_uri: str | None = None
    """MLflow store. Default: MLFLOW_TRACKING_URI, or sqlite:///mlflow.db in this directory."""
    experiment: str = "arrowhead"
    """Name of the MLflow experiment."""
    run_name: str | None = None
    """Name of the run. Default: the command."""

    @property
    def uri(self) -> str:
        """The store that will be written to."""
        own = f"sqlite:///{Path.cwd() / 'mlflow.db'}"
        return self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or own


class Run:
    """One MLflow run that is being written."""

    def __init__(self, client: MlflowClient, run_id: str, experiment_id: str) -> None:
        self._client, self.run_id, self._experiment_id = client, run_id, experiment_id

    def record(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log numbers at a step, in one request; what is not a number is left out."""
        from mlflow.entities import Metric

        now = int(time() * 1000)
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float)}
        batch = [Metric(name, value, now, step) for name, value in numbers.items()]
        self._client.log_batch(self.run_id, metrics=batch)

    def curve(self, name: str, values: list[float]) -> None:
        """Log one metric at steps 0, 1, 2 …, in requests of 1,000."""
        from mlflow.entities import Metric

        now = int(time() * 1000)
        for at in range(0, len(values), 1000):
            part = enumerate(values[at : at + 1000], at)
            batch = [Metric(name, float(value), now, step) for step, value in part]
            self._client.log_batch(self.run_id, metrics=batch)

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters, as text."""
        from mlflow.entities import Param

        self._client.log_batch(
            self.run_id, params=[Param(name, str(value)) for name, value in values.items()]
        )

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags, as text."""
        for name, value in values.items():
            self._client.set_tag(self.run_id, name, str(value))

    def keep(self, path: Path, folder: str | None = None) -> None:
        """Copy a file, or a directory's files, to the run's artefacts."""
        if path.is_dir():
            self._client.log_artifacts(self.run_id, str(path), folder or path.name)
        else:
            self._client.log_artifact(self.run_id, str(path), folder)

    def dataset(self, name: str, digest: str, source: str, use: str) -> None:
        """Record what the run read: name, digest (at most 36 characters), place, and what for."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = Dataset(name=name, digest=digest[:36], source_type="local", source=source)
        tag = InputTag(key="mlflow.data.context", value=use)
        self._client.log_inputs(self.run_id, [DatasetInput(dataset=data, tags=[tag])])

    @contextmanager
    def child(self, name: str) -> Iterator[Run]:
        """A run below this one, ended FINISHED, or FAILED when the block raises."""
        with _open(self._client, self._experiment_id, name, self.run_id) as run:
            yield run


@contextmanager
def start(config: TrackingConfig, name: str) -> Iterator[Run]:
    """A new parent run; ended FINISHED, or FAILED when the block raises.

    Raises ConfigError when the store cannot be opened, before any work is done.
    """
    client, experiment = _client(config)
    with _open(client, experiment, config.run_name or name, None) as run:
        yield run


@contextmanager
def _open(client: MlflowClient, experiment: str, name: str, parent: str | None) -> Iterator[Run]:
    tags = {
        "mlflow.user": getpass.getuser(),
        "mlflow.source.name": f"arrowhead {name}",
        "mlflow.source.type": "LOCAL",
    }
    if parent:
        tags["mlflow.parentRunId"] = parent
    info = client.create_run(experiment, run_name=name, tags=tags).info
    try:
        yield Run(client, info.run_id, experiment)
    except BaseException as error:
        # Whatever the store says now (its disk may be full, too) must not hide what went wrong.
        with contextlib.suppress(Exception):
            interrupted = isinstance(error, KeyboardInterrupt)
            client.set_terminated(info.run_id, "KILLED" if interrupted else "FAILED")
            if isinstance(error, ConfigError):  # a request that was refused is no run
                client.delete_run(info.run_id)
        raise
    client.set_terminated(info.run_id, "FINISHED")


def _client(config: TrackingConfig) -> tuple[MlflowClient, str]:
    import logging

    # MLflow asks an unreachable server again for minutes; one refusal is enough to say so.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    for noisy in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        client = MlflowClient(tracking_uri=config.uri)
        found = client.get_experiment_by_name(config.experiment)
        if found is None:
            kind = {"mlflow.experimentKind": "custom_model_development"}  # the UI's layout
            return client, client.create_experiment(config.experiment, tags=kind)
    except (MlflowException, OSError) as error:
        raise ConfigError(
            f"The tracking store {without_secret(config.uri)} cannot be used:"
            f" {str(error).splitlines()[0][:300]}",
            "a database (sqlite:///…, postgresql://…) or the address of an MLflow server.",
            "check --tracking-uri and MLFLOW_TRACKING_URI; leave both out for ./mlflow.db.",
        ) from error
    if found.lifecycle_stage != "active":
        raise ConfigError(
            f"The experiment {config.experiment!r} was deleted in {without_secret(config.uri)}.",
            "an active experiment, or a new name.",
            "give another --experiment, or restore it in the MLflow UI.",
        )
    return client, found.experiment_id


def without_secret(uri: str) -> str:
    """A store's address without the name and password in it."""
    import re

    return re.sub(r"//[^@/]+@", "//…@", uri)
