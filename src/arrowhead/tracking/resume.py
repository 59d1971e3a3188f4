"""An MLflow run that an earlier command left unfinished."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arrowhead import fileio
from arrowhead.errors import DataError
from arrowhead.tracking.client import find_run, search
from arrowhead.tracking.store import PrintLine

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

ChildRuns = dict[str, list[tuple[str, str]]]
"""Children of a resumed run: name to (run id, status), oldest first."""
FORMATS = ({"run_id": str}, {"run_id": None, "start": int})  # the second: while the run is made


def unfinished_run(
    client: MlflowClient, file: Path, owner: Mapping[str, Any], print_line: PrintLine
) -> MlflowRun | None:
    """The unfinished run that a file names, or None.

    Args:
        client: of the tracking store.
        file: written by `run.start`, and there while the run is unfinished.
        owner: store, experiment and verb of the command that asks; another's run is left alone.
        print_line: takes a line that says why a run cannot go on.
    """
    try:
        content = json.loads(file.read_bytes())
        fileio.check_schema(content, FORMATS, str(file), "delete the file.")
        same_owner = all(content[name] == value for name, value in owner.items())
        run_id, began = content["run_id"], content.get("start")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, RecursionError, DataError):
        print_line(f"{file} is corrupt or no file of Arrowhead's: a new MLflow run is started")
        return None
    if not same_owner:
        print_line(
            f"{file} is of another store, experiment or command: a new MLflow run is started"
        )
        return None
    if run_id is None:  # the command was killed while the run was being made
        candidates = search(client, owner["experiment"], f"attributes.start_time = {int(began)}")
        return next((run for run in candidates if "mlflow.parentRunId" not in run.data.tags), None)
    run = find_run(client, run_id)
    if run is None or run.info.lifecycle_stage != "active":
        print_line(f"MLflow run {run_id} of {file} was deleted: a new one is started")
        return None
    return None if run.info.status == "FINISHED" else run


def reopen(client: MlflowClient, run: MlflowRun, print_line: PrintLine) -> ChildRuns:
    """Set an unfinished run RUNNING and count that it was resumed; its children."""
    run_id = run.info.run_id
    children: ChildRuns = {}
    below = f"tags.mlflow.parentRunId = '{run_id}'"
    for child in search(client, run.info.experiment_id, below):
        children.setdefault(child.info.run_name, []).append((child.info.run_id, child.info.status))
    times = int(run.data.tags.get("arrowhead.resumed", 0)) + 1
    client.update_run(run_id, status="RUNNING")
    client.set_tag(run_id, "arrowhead.resumed", str(times))
    print_line(f"resuming MLflow run {run_id}, which was left {run.info.status}")
    return children
