"""Writes carried out in an MLflow store, twice with one result."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Any

from arrowhead import __version__
from arrowhead.tracking.client import patience, search
from arrowhead.tracking.names import shortened
from arrowhead.tracking.outbox import Write, stamp

if TYPE_CHECKING:
    from mlflow import MlflowClient


MAX_PARAM_CHARS = 6000  # characters of a param's value that MLflow keeps

Say = Callable[[str], None]
"""One write as it lies in a spool: `do` names a method of `Store`, the rest are its arguments."""


def now_ms() -> int:
    """Now, in ms, as MLflow counts."""
    return int(time() * 1000)


def facts(verb: str) -> dict[str, str]:
    """Tags that MLflow's own tools set and filter by."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        user = str(os.getuid())
    facts = {
        "mlflow.user": user,
        "mlflow.source.name": f"arrowhead {verb}",
        "mlflow.source.type": "LOCAL",
        "arrowhead.version": __version__,
    }
    commit = _commit(Path.cwd())
    return facts | ({"mlflow.source.git.commit": commit} if commit else {})


@cache
def _commit(folder: Path) -> str | None:
    """The commit that is checked out in a folder, if git is installed and there is one."""
    git = shutil.which("git")
    if not git:
        return None
    words = [git, "-C", str(folder), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=5, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@dataclass(slots=True)
class _Logged:
    """What a run has already and is not given again."""

    params: dict[str, str] = field(default_factory=dict)
    steps: dict[str, set[int]] = field(default_factory=dict)
    inputs: set[tuple[str, str, str]] = field(default_factory=set)


class Store:
    """Carries writes out. Each may come twice, from this process or another, and counts once."""

    def __init__(self, client: MlflowClient, experiment: str, say: Say) -> None:
        self.client, self.experiment, self.say = client, experiment, say
        self.ids: dict[str, str] = {}
        """Our id of a run that was made here, to MLflow's."""
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
        run = self._real(write["run"])
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

    def make(self, made: Mapping[str, Any]) -> str:
        """The id of a run, made unless it is there."""
        if made["local"] in self.ids:
            return self.ids[made["local"]]
        tags = dict(made["tags"])
        if made["parent"]:
            tags["mlflow.parentRunId"] = self._real(made["parent"])
        run_id = self._twin(made, tags) if made.get("tried") else None
        if run_id is None:
            info = self.client.create_run(
                self.experiment, start_time=made["start"], tags=tags, run_name=made["name"]
            ).info
            run_id = info.run_id
            self._logged[run_id] = _Logged()
        self.ids[made["local"]] = run_id
        return run_id

    def _twin(self, made: Mapping[str, Any], tags: Mapping[str, str]) -> str | None:
        """The run that an earlier try made, though its answer did not come back."""
        below = f"tags.mlflow.parentRunId = '{tags['mlflow.parentRunId']}'"
        same = f"{below} and attributes.start_time = {made['start']}"
        for run in search(self.client, self.experiment, same):
            if run.info.run_name == made["name"]:
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

    def _real(self, run: str) -> str:
        if run.startswith("unsent-") and run not in self.ids:
            raise LookupError(f"the run {run} is not made yet")
        return self.ids.get(run, run)

    def _has(self, run_id: str) -> _Logged:
        """What the run has: nothing if it was made here, else read once."""
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

        logged = self._has(run_id)
        data = dict(zip(("dataset_name", "dataset_digest"), write.get("dataset", ()), strict=False))
        metrics = [
            Metric(name, float(value), at, step, model_id=write.get("model"), **data)
            for name, value, at, step in write["metrics"]
            if step not in logged.steps.get(name, ())
        ]
        new = {k: v for k, v in write["params"].items() if k not in logged.params}
        other = {
            k: v
            for k, v in write["params"].items()
            if k in logged.params and logged.params[k] != v[:MAX_PARAM_CHARS]
        }
        again = {shortened(f"resumed.{name}"): value for name, value in other.items()}
        tags = write["tags"] | again
        params = [Param(name, value) for name, value in new.items()]
        marks = [RunTag(name, value) for name, value in tags.items()]
        while metrics or params or marks:
            some, params = params[:100], params[100:]
            few, marks = ([], marks) if some else (marks[:100], marks[100:])
            room = 1000 - len(some) - len(few)
            part, metrics = metrics[:room], metrics[room:]
            self.client.log_batch(run_id, metrics=part, params=some, tags=few)
        logged.params |= {name: value[:MAX_PARAM_CHARS] for name, value in new.items()}
        for name, value in other.items():
            self.say(
                f"param {name} of run {run_id} was {logged.params[name][:80]} and is now"
                f" {value[:80]}: the new value is the tag resumed.{name}"
            )

    def _file(self, run_id: str, path: Path, write: Write) -> None:
        if write.get("stamp") and stamp(path) != write["stamp"]:
            self.say(f"not sent, it is not there any more as it was: {path}")
            return
        several = path.is_dir()
        with patience(stamp(path)[0]):
            log = self.client.log_artifacts if several else self.client.log_artifact
            log(run_id, str(path), write["folder"])

    def _inputs(self, run_id: str, data: Mapping[str, str], use: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        key = data["name"], data["digest"], use
        if key in self._has(run_id).inputs:
            return
        tag = InputTag(key="mlflow.data.context", value=use)
        self.client.log_inputs(run_id, [DatasetInput(dataset=Dataset(**data), tags=[tag])])
        self._has(run_id).inputs.add(key)


def plain(write: Write, ids: Mapping[str, str]) -> Write:
    """A write that another process understands: MLflow's ids where they are known."""
    if "run" in write:
        return write | {"run": ids.get(write["run"], write["run"])}
    made = write["made"]
    parent = made["parent"] and ids.get(made["parent"], made["parent"])
    return write | {"made": made | {"parent": parent, "tried": True}}
