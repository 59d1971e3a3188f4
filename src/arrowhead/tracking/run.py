"""A run, recorded in MLflow.

    start          one parent run per command; children per stage, or one per head of a grid
      -> Run       metrics by step, params, tags, files, data sets, the bundle as a model,
                   the model as a version of a registered one
    send           what earlier runs could not write is written now (`start` does it, too)

Only the driver writes. The default store is mlflow.db in the working directory, with the
artefacts in mlruns/ beside it: `mlflow ui` there shows everything.

Work never dies of tracking. A store that cannot be reached is refused before any work; when it
goes away later, writes are kept in order in a *spool*, a folder of JSON lines and copied files,
and sent when it is back, at the end, or by the next command:

    unsent/<run id>/run.json       store (no password in it), experiment, run
                    writes.jsonl   one write per line; a line that was cut is left out
                    files/N/…      copies of what was to be stored

Every write can be carried out twice with one result (metrics carry their first timestamp, a child
its start), so nobody has to know how far a killed sender came.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import uuid4

from arrowhead import fileio
from arrowhead.errors import ConfigError, DataError, LostError
from arrowhead.runtime import environment, signals
from arrowhead.tracking import delivery, system_metrics
from arrowhead.tracking import store as tracking_store
from arrowhead.tracking.address import without_secret
from arrowhead.tracking.client import TrackingConfig, find_run, open_store, patience, search, usable
from arrowhead.tracking.delivery import ENDING, Points, Sender
from arrowhead.tracking.outbox import Outbox, Write, stamp, write_whole
from arrowhead.tracking.registry import (
    RegistryConfig,
    digest_of,
    log_model,
    make_version,
    must_take,
    version_of,
)
from arrowhead.tracking.store import Say, Store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as Recorded


UNSENT = Path(".arrowhead") / "unsent"
ChildRuns = dict[str, list[tuple[str, str]]]
"""Children that a resumed run has: name to (run id, status), oldest first."""


def _unsent() -> Path:
    """Where writes are kept: in this folder or, where it cannot be written, in a temporary one."""
    here = os.access(UNSENT if UNSENT.exists() else ".", os.W_OK)
    return UNSENT if here else environment.private_temp_folder("unsent")


def _to_stderr(line: str) -> None:
    sys.stderr.write(f"{line}\n")


# ------------------------------------------------------------------------------- the face


class Run:
    """One MLflow run that is being written. Nothing in here raises because a store is gone."""

    def __init__(self, sender: Sender, run_id: str, children: ChildRuns | None = None) -> None:
        self._sender, self._id = sender, run_id
        self._child_runs: ChildRuns = children or {}
        self._inputs: dict[str | None, tuple[str, str]] = {}  # name and digest, by use
        self._names: dict[str, str] = {}  # see `mlflow_names`

    @property
    def run_id(self) -> str:
        """MLflow's id. A child made while the store is away has one of ours until it is sent."""
        return self._sender.store.ids.get(self._id, self._id)

    @property
    def logs_models(self) -> bool:
        """Whether `model` logs what it is given."""
        return self._sender.registry.log_model

    def record(
        self,
        metrics: Mapping[str, float],
        step: int = 0,
        *,
        model: str | None = None,
        dataset: str | None = None,
    ) -> None:
        """Log numbers at a step, in one request; what is not a number is left out.

        model: the address that `model` gave: they are its figures, too. dataset: what the data set
        was given for on which they were measured, such as "validation" (see `dataset`).
        """
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float)}
        points = {name: [(step, value)] for name, value in numbers.items()}
        write = {"do": "batch", "run": self._id} | delivery.batch(points, names=self._names)
        if model:
            write["model"] = model.rpartition("/")[2]
        if dataset in self._inputs:
            write["dataset"] = list(self._inputs[dataset])
        self._sender.write(write)

    def series(self, points: Points) -> None:
        """Log numbers at many steps: (step, value) by name, in requests of 1,000."""
        self._batch(points=points)

    def curve(self, name: str, values: list[float]) -> None:
        """Log one metric at steps 0, 1, 2 …, in requests of 1,000."""
        self._batch(points={name: list(enumerate(values))})

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters, as text. One that a resumed run has with another value stays; the new
        value is said, and kept as the tag `resumed.<name>`.
        """
        self._batch(params=values)

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags, as text."""
        self._batch(tags=values)

    def _batch(
        self,
        points: Points | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> None:
        write = delivery.batch(points, params, tags, names=self._names)
        self._sender.write({"do": "batch", "run": self._id} | write)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Copy a file, or a directory's files, to the run's artefacts."""
        if not path.exists():
            self._sender.say(f"not kept with the run, it is not there: {path}")
            return
        inside = (folder or path.name) if path.is_dir() else folder
        self._sender.write(
            {"do": "file", "run": self._id, "path": str(path.absolute()), "folder": inside}
        )

    def dataset(
        self,
        name: str,
        digest: str,
        source: str,
        use: str,
        *,
        profile: Mapping[str, Any] | None = None,
        schema: Mapping[str, Any] | None = None,
    ) -> None:
        """Record what the run read: name, digest (at most 36 characters), place, and what for
        (training, validation, testing, scoring). profile: counts; schema: as MLflow writes it.
        """
        place = urlsplit(source).scheme if "://" in source else ""
        kind = "local" if place in ("", "file") else place
        # MLflow reads a source back from JSON with a URI in it.
        where = json.dumps({"uri": without_secret(source)})
        data = {"name": name[:500], "digest": digest[:36], "source_type": kind, "source": where}
        for key, value in (("profile", profile), ("schema", schema)):
            if value:
                data[key] = json.dumps(value, ensure_ascii=False)
        self._inputs[use] = data["name"], data["digest"]
        self._sender.write({"do": "inputs", "run": self._id, "data": data, "use": use})

    def model(self, bundle: Path) -> str | None:
        """Log a bundle as a pyfunc model with signature and input example; its address, models:/m-…
        Its name is made of the data set's, the body's and the head's (see `registry.model_name`).

        In: `image`, the bytes of an encoded image (base64 in JSON), or `path`. Whoever asks a
        served model must not choose which files of its host are opened: paths are refused unless
        the host itself names a folder for them (ARROWHEAD_SERVE_PATHS, see `mlflow_model`).
        Out: `label` (the most probable), its `probability`, `labels` (those given: one, or where
        an image may have several any number), `probabilities` in the order of the metadata's
        `classes`; of an image that cannot be decoded None, NaN, [] and NaNs. Nothing in it is
        pickled: the bundle, `served.py`, Arrowhead's own source. None if none is to be logged
        (--no-log-model) or, with a message, if the store does not take it.
        """
        return self._sender.model(self.run_id, bundle) if self.logs_models else None

    def register(self, bundle: Path) -> str | None:
        """Make the model that was logged of a bundle a version of the registered model that
        `start` was given, once, and give it the alias; models:/NAME/VERSION. None if no name was
        given or, with a message that says how to do it later, if the registry does not take it.
        """
        return (
            self._sender.register(self.run_id, bundle) if self._sender.registry.register else None
        )

    @contextmanager
    def child(self, name: str) -> Iterator[Run]:
        """A run below this one, ended FINISHED, or FAILED when the block raises (KILLED by an
        interrupt). A resumed run takes up the child of that name that it has.
        """
        if self._child_runs.get(name):
            below, _ = self._child_runs[name].pop(0)
            self._sender.write({"do": "status", "run": below, "status": "RUNNING", "end": None})
            new = False
        else:
            made = _made(name, self._id, tracking_store.facts(name))
            self._sender.write({"do": "make", "made": made})
            below, new = made["local"], True
        with _ended(self._sender, below, new):
            yield Run(self._sender, below)

    def children(
        self,
        names: Sequence[str],
        params: Sequence[Mapping[str, Any]],
        metrics: Sequence[Points],
        tags: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """One FINISHED child per name with its params and metrics, three requests each; their ids.

        `tags` are set on all. A resumed run's finished children of these names are left as they
        are, unfinished ones are completed.
        """
        facts = tracking_store.facts("head") | {
            name: str(value) for name, value in (tags or {}).items()
        }
        ids: list[str] = []
        writes: list[Write] = []
        for name, values, points in zip(names, params, metrics, strict=True):
            made = _made(name, self._id, facts)
            if self._child_runs.get(name):
                below, status = self._child_runs[name].pop(0)
                self._sender.store.ids[made["local"]] = below
                if status == "FINISHED":
                    ids.append(below)
                    continue
            ids.append(made["local"])
            writes.append(
                {
                    "do": "head",
                    "made": made,
                    "end": tracking_store.now_ms(),
                    **delivery.batch(points, values),
                }
            )
        self._sender.write(*writes)
        return [self._sender.store.ids.get(one, one) for one in ids]


@contextmanager
def start(
    config: TrackingConfig,
    name: str,
    place: Path | None = None,
    *,
    registry: RegistryConfig = RegistryConfig(),
    outbox: Path | None = None,
    say: Say = _to_stderr,
) -> Iterator[Run]:
    """A parent run; ended FINISHED, FAILED when the block raises, KILLED when it is interrupted.

    place: a file that is there while the run is unfinished; with it the same command (`name`) on
    the same store and experiment takes that run up again. registry: what `Run.register` does.
    outbox: a folder for what cannot be sent, one folder in it per run; default .arrowhead/unsent.
    say: takes one line for a person, once per trouble.

    Raises ConfigError, before any work, when the store or the registry asked for cannot be used.
    """
    base = (outbox or _unsent()).absolute()
    with contextlib.ExitStack() as until_begun:
        with usable(config):
            client, experiment = open_store(config)
            if registry.register:
                must_take(client, registry.register)
            store = Store(client, experiment, say)
            mark = {"store": without_secret(config.uri), "experiment": experiment}
            taken = _taken_up(client, place, mark | {"verb": name}, say) if place else None
            delivery.send_all(store, base, mark["store"], taken.info.run_id if taken else None)
            # A signal between a run's making and the block that ends it would leave it RUNNING.
            until_begun.enter_context(signals.deferred())
            if taken:
                run_id, children = taken.info.run_id, _child_runs(client, taken)
                times = int(taken.data.tags.get("arrowhead.resumed", 0)) + 1
                client.update_run(run_id, status="RUNNING")
                client.set_tag(run_id, "arrowhead.resumed", str(times))
                say(f"goes on in MLflow run {run_id}, which was left {taken.info.status}")
            else:
                made = _made(config.run_name or name, None, tracking_store.facts(name))
                if place:  # before the run is there: a kill in between must not leave two
                    fresh = {"verb": name, "run_id": None, "start": made["start"]}
                    write_whole(place, mark | fresh)
                run_id, children = store.make(made), {}
        if place:
            write_whole(place, mark | {"verb": name, "run_id": run_id})
        mark |= {"run_id": run_id}
        sender = Sender(store, Outbox(base / run_id, mark), config.uri, registry)
        done = False
        try:
            gauge = system_metrics.gauge(config, sender, run_id)
            with _ended(sender, run_id, taken is None), gauge:
                until_begun.close()
                yield Run(sender, run_id, children)
            done = True
        except ConfigError:
            done = taken is None
            raise
        finally:
            sender.close()
            if place and done:
                place.unlink(missing_ok=True)


@contextmanager
def _ended(sender: Sender, run_id: str, new: bool) -> Iterator[None]:
    """Sets how the run ended. A request that was refused is no run: a new one is deleted."""
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | LostError)
        how = "KILLED" if stopped else "FAILED"
        within = delivery.STOPPING if stopped else ENDING
        with signals.deferred():
            ended = {"do": "status", "run": run_id, "status": how, "end": tracking_store.now_ms()}
            sender.write(ended, within=within)
            if isinstance(error, ConfigError) and new:
                sender.write({"do": "delete", "run": run_id}, within=within)
        raise
    ended = {"do": "status", "run": run_id, "status": "FINISHED", "end": tracking_store.now_ms()}
    sender.write(ended, within=ENDING)


def send(config: TrackingConfig, outbox: Path | None = None, say: Say = _to_stderr) -> None:
    """Send what earlier runs could not. Raises ConfigError when the store cannot be used."""
    with usable(config):
        client, experiment = open_store(config)
        store = Store(client, experiment, say)
        delivery.send_all(
            store, (outbox or _unsent()).absolute(), without_secret(config.uri), None, math.inf
        )


def register(
    bundle: Path,
    config: TrackingConfig,
    registry: RegistryConfig,
    *,
    outbox: Path | None = None,
    say: Say = _to_stderr,
) -> str:
    """Make a finished bundle a version of a registered model; models:/NAME/VERSION.

    Its model is logged first if it is not: with the run that trained it or, if this store does not
    know that, with a new one. Raises ConfigError if the store or its registry cannot be used.
    """
    assert registry.register, "a name"
    with usable(config):
        client, experiment = open_store(config)
        must_take(client, registry.register)
        store = Store(client, experiment, say)
        delivery.send_all(store, (outbox or _unsent()).absolute(), without_secret(config.uri), None)
        if version_of(client, registry.register, digest_of(bundle)) is None:
            trained = json.loads((bundle / "bundle.json").read_bytes())["lineage"].get("run_id")
            known = find_run(client, trained) if trained else None
            if known is None or known.info.lifecycle_stage != "active":
                trained = store.make(
                    _made("register", None, tracking_store.facts("bundle register"))
                )
                client.set_terminated(trained, "FINISHED")
            with patience(stamp(bundle)[0]):
                log_model(client, trained, bundle)
            return make_version(client, trained, bundle, registry, say)
        return make_version(client, "", bundle, registry, say)


def _made(name: str, parent: str | None, tags: Mapping[str, str]) -> dict[str, Any]:
    """A run to be made. Until it is, it goes by an id of ours."""
    local = f"unsent-{uuid4().hex}"
    return {
        "local": local,
        "name": name,
        "parent": parent,
        "start": tracking_store.now_ms(),
        "tags": dict(tags),
    }


# -------------------------------------------------------------------------- taken up again

UNFINISHED = ({"run_id": str}, {"run_id": None, "start": int})  # the second: while it is made


def _taken_up(
    client: MlflowClient, place: Path, mark: Mapping[str, Any], say: Say
) -> Recorded | None:
    """The unfinished run that a file names, if it is of this store, experiment and verb."""
    try:
        kept = json.loads(place.read_bytes())
        fileio.must_fit(kept, UNFINISHED, str(place), "delete the file.")
        same = all(kept[name] == value for name, value in mark.items())
        run_id, began = kept["run_id"], kept.get("start")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, RecursionError, DataError):
        say(f"{place} is torn or not ours: a new MLflow run is started")
        return None
    if not same:
        say(f"{place} is of another store, experiment or command: a new MLflow run is started")
        return None
    if run_id is None:  # killed while the run was being made
        made = search(client, mark["experiment"], f"attributes.start_time = {int(began)}")
        ours = (run for run in made if "mlflow.parentRunId" not in run.data.tags)
        return next(ours, None)
    run = find_run(client, run_id)
    if run is None or run.info.lifecycle_stage != "active":
        say(f"MLflow run {run_id} of {place} was deleted: a new one is started")
        return None
    return None if run.info.status == "FINISHED" else run


def _child_runs(client: MlflowClient, run: Recorded) -> ChildRuns:
    """The children of a run."""
    children: ChildRuns = {}
    below = f"tags.mlflow.parentRunId = '{run.info.run_id}'"
    for child in search(client, run.info.experiment_id, below):
        children.setdefault(child.info.run_name, []).append((child.info.run_id, child.info.status))
    return children
