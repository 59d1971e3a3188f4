"""Writes to an MLflow run as plain data, to be kept on the disk and sent later."""

from __future__ import annotations

import getpass
import math
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from time import time
from typing import Any
from uuid import uuid4

from arrowhead import __version__
from arrowhead.tracking.names import is_shortened, mlflow_names, shortened

Write = dict[str, Any]
"""One write: `do` says what to do, the rest are its arguments (see `store.TrackingStore.do`)."""
Points = Mapping[str, Sequence[tuple[int, float]]]
"""Metrics: name to (step, value)."""
FIELDS = {
    "make": {"made"},
    "head": {"made", "metrics", "params", "tags", "end"},
    "batch": {"run", "metrics", "params", "tags"},
    "file": {"run", "path", "folder"},
    "inputs": {"run", "data", "use"},
    "status": {"run", "status", "end"},
    "delete": {"run"},
}
"""What each kind of write has besides `do`: the run by its id, or as `new_run` made it."""
LOCAL_PREFIX = "unsent-"  # of the ids that runs go by here until MLflow has made them


def is_write(value: Any) -> bool:
    """Whether a value read from a file is a write with all of its fields."""
    fields = FIELDS.get(str(value.get("do"))) if isinstance(value, dict) else None
    return fields is not None and fields <= value.keys()


def now_ms() -> int:
    """The time now, in milliseconds, as MLflow counts."""
    return int(time() * 1000)


def batch(
    points: Points | None = None,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
    *,
    names: dict[str, str] | None = None,
) -> Write:
    """Metrics as [name, value, milliseconds, step], params and tags as text.

    NaN and infinity are written as text, since JSON has no number for them. A name that is too long
    for MLflow is kept in full in the tag `full_name.<end of its short form>`.

    Args:
        points: metrics by name.
        params: parameters by name.
        tags: tags by name.
        names: the names that earlier batches of the run used; it is filled (see `mlflow_names`).
    """
    now = now_ms()
    written = mlflow_names([*(points or {}), *(params or {}), *(tags or {})], names)
    metrics = [
        [written[name], value if math.isfinite(value) else str(value), now, int(step)]
        for name, pairs in (points or {}).items()
        for step, value in pairs
    ]
    params_text = {written[name]: _text(value) for name, value in (params or {}).items()}
    tags_text = {written[name]: _text(value) for name, value in (tags or {}).items()}
    for name, short in written.items():
        if is_shortened(short):
            tags_text[shortened(f"full_name.{short[-16:]}")] = name
    return {"metrics": metrics, "params": params_text, "tags": tags_text}


def _text(value: Any) -> str:
    """A value as text that any store takes; what is no Unicode, as in some file names, is "?"."""
    return str(value).encode("utf-8", "replace").decode()


def new_run(name: str, parent: str | None, tags: Mapping[str, str]) -> dict[str, Any]:
    """A run that MLflow is to make; until then it goes by a local id."""
    return {
        "local": f"{LOCAL_PREFIX}{uuid4().hex}",
        "name": name,
        "parent": parent,
        "start": now_ms(),
        "tags": dict(tags),
    }


def is_local(run_id: str) -> bool:
    """Whether MLflow does not know a run by this id."""
    return run_id.startswith(LOCAL_PREFIX)


def for_another_process(write: Write, ids: Mapping[str, str]) -> Write:
    """A write with MLflow's run ids where they are known, and a note that it may have been sent.

    Args:
        write: as this process sends it.
        ids: local run ids to MLflow's.
    """
    if "run" in write:
        return write | {"run": ids.get(write["run"], write["run"])}
    run = write["made"]
    parent = run["parent"] and ids.get(run["parent"], run["parent"])
    return write | {"made": run | {"parent": parent, "tried": True}}


def source_tags(verb: str) -> dict[str, str]:
    """The tags that MLflow's own tools set and filter by: user, command, commit."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        user = str(os.getuid())
    tags = {
        "mlflow.user": user,
        "mlflow.source.name": f"arrowhead {verb}",
        "mlflow.source.type": "LOCAL",
        "arrowhead.version": __version__,
    }
    commit = _commit(Path.cwd())
    return tags | ({"mlflow.source.git.commit": commit} if commit else {})


@cache
def _commit(folder: Path) -> str | None:
    """The commit checked out in a folder, if git is installed and there is one."""
    git = shutil.which("git")
    if not git:
        return None
    words = [git, "-C", str(folder), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=5, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
