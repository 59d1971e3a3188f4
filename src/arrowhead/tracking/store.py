"""Writes carried out in MLflow. Each may be sent twice and counts once.

MLflow does not promise that: a metric that is logged again is there twice, a run that is made again
is another run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arrowhead.tracking.client import find_run, longer_timeout, search
from arrowhead.tracking.names import shortened
from arrowhead.tracking.outbox import stamp
from arrowhead.tracking.writes import Write, is_local

if TYPE_CHECKING:
    from mlflow import MlflowClient


MAX_PARAM_CHARS = 6000  # of a param's value: MLflow cuts off the rest

PrintLine = Callable[[str], None]
"""Shows one line to a person."""


@dataclass(slots=True)
class _Logged:
    """What a run holds already, and is not sent again."""

    params: dict[str, str] = field(default_factory=dict)
    steps: dict[str, set[int]] = field(default_factory=dict)
    inputs: set[tuple[str, str, str]] = field(default_factory=set)


class TrackingStore:
    """Carries writes out in one experiment, from this process or an earlier one."""

    def __init__(self, client: MlflowClient, experiment: str, print_line: PrintLine) -> None:
        self.client, self.experiment, self.print_line = client, experiment, print_line
        self.ids: dict[str, str] = {}
        """Local id of a run that was made here, to MLflow's."""
        self._logged: dict[str, _Logged] = {}

    def do(self, write: Write, folder: Path) -> None:
        """Carry one write out; relative paths of files are under `folder`."""
        if write["do"] == "make":
            self.make(write["made"])
            return
        if write["do"] == "head":
            run = self.make(write["made"])
            self._log(run, write)
            self.client.set_terminated(run, "FINISHED", write["end"])
            return
        run = self._known_id(write["run"])
        match write["do"]:
            case "batch":
                self._log(run, write)
            case "file":
                self._file(run, folder / write["path"], write)
            case "inputs":
                self._inputs(run, write["data"], write["use"])
            case "status" if write["status"] == "RUNNING":
                self.client.update_run(run, status="RUNNING")
            case "status":
                self.client.set_terminated(run, write["status"], write["end"])
            case "delete":
                self.client.delete_run(run)

    def has_run(self, run_id: str) -> bool:
        """Whether there is a run with this id that was not deleted; False if the store is away."""
        try:
            run = find_run(self.client, run_id)
        except Exception:  # whatever a store that is away raises
            return False
        return run is not None and run.info.lifecycle_stage == "active"

    def make(self, new: Mapping[str, Any]) -> str:
        """The id of a run (see `writes.new_run`), which is made unless it is there."""
        if "run_id" in new:  # of a resumed run, whose children MLflow has
            self.ids[new["local"]] = new["run_id"]
        if new["local"] in self.ids:
            return self.ids[new["local"]]
        tags = dict(new["tags"])
        if new["parent"]:
            tags["mlflow.parentRunId"] = self._known_id(new["parent"])
        run_id = self._made_before(new, tags) if new.get("tried") else None
        if run_id is None:
            info = self.client.create_run(
                self.experiment, start_time=new["start"], tags=tags, run_name=new["name"]
            ).info
            run_id = info.run_id
            self._logged[run_id] = _Logged()
        self.ids[new["local"]] = run_id
        return run_id

    def _made_before(self, new: Mapping[str, Any], tags: Mapping[str, str]) -> str | None:
        """The run that an earlier try made, though its answer did not come back."""
        child = f"tags.mlflow.parentRunId = '{tags['mlflow.parentRunId']}'"
        for run in search(
            self.client, self.experiment, f"{child} and attributes.start_time = {new['start']}"
        ):
            if run.info.run_name == new["name"]:
                return str(run.info.run_id)
        return None

    def answers(self) -> bool:
        """Whether the store carries out the simplest request."""
        try:
            self.client.get_experiment(self.experiment)
        except Exception:
            return False
        return True

    def samples(self, run_id: str) -> int:
        """How many samples of system metrics the run has."""
        history = self.client.get_metric_history(run_id, "system/cpu_utilization_percentage")
        return max((point.step + 1 for point in history), default=0)

    def _known_id(self, run: str) -> str:
        if is_local(run) and run not in self.ids:
            raise LookupError(f"the run {run} is not made yet")
        return self.ids.get(run, run)

    def _logged_by(self, run_id: str) -> _Logged:
        """What the run holds: nothing if it was made here, else read once."""
        if run_id not in self._logged:
            run = self.client.get_run(run_id)
            given = run.inputs.dataset_inputs if run.inputs else []
            self._logged[run_id] = _Logged(
                params=dict(run.data.params),
                steps={
                    name: {point.step for point in self.client.get_metric_history(run_id, name)}
                    for name in run.data.metrics
                    if not name.startswith("system/")  # those go on from their last step
                },
                inputs={
                    (one.dataset.name, one.dataset.digest, tag.value)
                    for one in given
                    for tag in one.tags
                    if tag.key == "mlflow.data.context"
                },
            )
        return self._logged[run_id]

    def _log(self, run_id: str, write: Write) -> None:
        """Metrics, params and tags in as few requests as MLflow allows."""
        from mlflow.entities import Metric, Param, RunTag

        logged = self._logged_by(run_id)
        data = dict(zip(("dataset_name", "dataset_digest"), write.get("dataset", ()), strict=False))
        metrics = [
            Metric(name, float(value), at, step, model_id=write.get("model"), **data)
            for name, value, at, step in write["metrics"]
            if step not in logged.steps.get(name, ())
        ]
        held = logged.params
        new = {name: value for name, value in write["params"].items() if name not in held}
        changed = {
            name: value
            for name, value in write["params"].items()
            if name in held and held[name] != value[:MAX_PARAM_CHARS]
        }
        resumed = {shortened(f"resumed.{name}"): value for name, value in changed.items()}
        params = [Param(name, value) for name, value in new.items()]
        tags = [RunTag(name, value) for name, value in {**write["tags"], **resumed}.items()]
        while metrics or params or tags:  # a request takes 1,000 items, 100 params, 100 tags
            some_params, params = params[:100], params[100:]
            some_tags, tags = ([], tags) if some_params else (tags[:100], tags[100:])
            left = 1000 - len(some_params) - len(some_tags)
            some_metrics, metrics = metrics[:left], metrics[left:]
            self.client.log_batch(run_id, metrics=some_metrics, params=some_params, tags=some_tags)
        held |= {name: value[:MAX_PARAM_CHARS] for name, value in new.items()}
        for name, value in changed.items():
            self.print_line(
                f"param {name} of run {run_id} was {held[name][:80]} and is now"
                f" {value[:80]}: the new value is the tag resumed.{name}"
            )

    def _file(self, run_id: str, path: Path, write: Write) -> None:
        if not path.exists() or write.get("stamp", stamp(path)) != stamp(path):
            self.print_line(f"not sent to MLflow, it was removed or changed since: {path}")
            return
        log = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
        with longer_timeout(stamp(path)[0]):
            log(run_id, str(path), write["folder"])

    def _inputs(self, run_id: str, data: Mapping[str, str], use: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        key = data["name"], data["digest"], use
        if key in self._logged_by(run_id).inputs:
            return
        tag = InputTag(key="mlflow.data.context", value=use)
        self.client.log_inputs(run_id, [DatasetInput(dataset=Dataset(**data), tags=[tag])])
        self._logged_by(run_id).inputs.add(key)
