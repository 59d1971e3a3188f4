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
import getpass
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from time import monotonic, time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import uuid4

from arrowhead import (
    ConfigError,
    DataError,
    LostError,
    __version__,
    environment,
    fileio,
    signals,
)
from arrowhead.registry import (
    RegistryConfig,
    digest_of,
    log_model,
    make_version,
    must_take,
    version_of,
)
from arrowhead.spool import Spool, Write, stamp, write_whole
from arrowhead.tracking_address import without_secret
from arrowhead.tracking_client import (
    PROBE,
    TrackingConfig,
    find_run,
    first_line,
    open_store,
    patience,
    refused,
    search,
    silence,
    usable,
)
from arrowhead.tracking_names import is_shortened, mlflow_names, shortened

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as Recorded

UNSENT = Path(".arrowhead") / "unsent"
AGAIN = 5.0, 60.0  # seconds between tries while the store is away: the first, the longest
OTHERS = 30.0  # seconds at the start for what earlier runs left unsent
STOPPING, ENDING = 5.0, 30.0
"""Seconds that the last writes of a run wait for one of another thread: of a run that is
interrupted, whose process will soon be killed, and of another."""
LONGEST = 6000  # characters of a param's value that MLflow keeps
SOONEST, USUAL = (
    0.5,
    10.0,
)  # seconds between samples of system metrics: a run's first, its later ones

Say = Callable[[str], None]
"""One write as it lies in a spool: `do` names a method of `_Store`, the rest are its arguments."""
Points = Mapping[str, Sequence[tuple[int, float]]]
"""Metrics of one head: name to (step, value)."""
Kin = dict[str, list[tuple[str, str]]]
"""Children that a resumed run has: name to (run id, status), oldest first."""


def _unsent() -> Path:
    """Where writes are kept: in this folder or, where it cannot be written, in a temporary one."""
    here = os.access(UNSENT if UNSENT.exists() else ".", os.W_OK)
    return UNSENT if here else environment.own_folder("unsent")


def _to_stderr(line: str) -> None:
    sys.stderr.write(f"{line}\n")


# ------------------------------------------------------------------------------- the face


class Run:
    """One MLflow run that is being written. Nothing in here raises because a store is gone."""

    def __init__(self, post: _Post, run_id: str, kin: Kin | None = None) -> None:
        self._post, self._id = post, run_id
        self._kin: Kin = kin or {}
        self._inputs: dict[str | None, tuple[str, str]] = {}  # name and digest, by use
        self._names: dict[str, str] = {}  # see `mlflow_names`

    @property
    def run_id(self) -> str:
        """MLflow's id. A child made while the store is away has one of ours until it is sent."""
        return self._post.store.ids.get(self._id, self._id)

    @property
    def logs_models(self) -> bool:
        """Whether `model` logs what it is given."""
        return self._post.registry.log_model

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
        write = {"do": "batch", "run": self._id} | _batch(points, names=self._names)
        if model:
            write["model"] = model.rpartition("/")[2]
        if dataset in self._inputs:
            write["dataset"] = list(self._inputs[dataset])
        self._post.write(write)

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
        write = _batch(points, params, tags, names=self._names)
        self._post.write({"do": "batch", "run": self._id} | write)

    def keep(self, path: Path, folder: str | None = None) -> None:
        """Copy a file, or a directory's files, to the run's artefacts."""
        if not path.exists():
            self._post.say(f"not kept with the run, it is not there: {path}")
            return
        inside = (folder or path.name) if path.is_dir() else folder
        self._post.write(
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
        self._post.write({"do": "inputs", "run": self._id, "data": data, "use": use})

    def model(self, bundle: Path) -> str | None:
        """Log a bundle as a pyfunc model with signature and input example; its address, models:/m-…
        Its name is made of the data set's, the body's and the head's (see `registry.model_name`).

        In: `image`, the bytes of an encoded image (base64 in JSON), or `path`. Whoever asks a
        served model must not choose which files of its host are opened: paths are refused unless
        the host itself names a folder for them (ARROWHEAD_SERVE_PATHS, see `served`).
        Out: `label` (the most probable), its `probability`, `labels` (those given: one, or where
        an image may have several any number), `probabilities` in the order of the metadata's
        `classes`; of an image that cannot be decoded None, NaN, [] and NaNs. Nothing in it is
        pickled: the bundle, `served.py`, Arrowhead's own source. None if none is to be logged
        (--no-log-model) or, with a message, if the store does not take it.
        """
        return self._post.model(self.run_id, bundle) if self.logs_models else None

    def register(self, bundle: Path) -> str | None:
        """Make the model that was logged of a bundle a version of the registered model that
        `start` was given, once, and give it the alias; models:/NAME/VERSION. None if no name was
        given or, with a message that says how to do it later, if the registry does not take it.
        """
        return self._post.register(self.run_id, bundle) if self._post.registry.register else None

    @contextmanager
    def child(self, name: str) -> Iterator[Run]:
        """A run below this one, ended FINISHED, or FAILED when the block raises (KILLED by an
        interrupt). A resumed run takes up the child of that name that it has.
        """
        if self._kin.get(name):
            below, _ = self._kin[name].pop(0)
            self._post.write({"do": "status", "run": below, "status": "RUNNING", "end": None})
            new = False
        else:
            made = _made(name, self._id, _facts(name))
            self._post.write({"do": "make", "made": made})
            below, new = made["local"], True
        with _ended(self._post, below, new):
            yield Run(self._post, below)

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
        facts = _facts("head") | {name: str(value) for name, value in (tags or {}).items()}
        ids: list[str] = []
        writes: list[Write] = []
        for name, values, points in zip(names, params, metrics, strict=True):
            made = _made(name, self._id, facts)
            if self._kin.get(name):
                below, status = self._kin[name].pop(0)
                self._post.store.ids[made["local"]] = below
                if status == "FINISHED":
                    ids.append(below)
                    continue
            ids.append(made["local"])
            writes.append({"do": "head", "made": made, "end": _now(), **_batch(points, values)})
        self._post.write(*writes)
        return [self._post.store.ids.get(one, one) for one in ids]


@contextmanager
def start(
    config: TrackingConfig,
    name: str,
    place: Path | None = None,
    *,
    registry: RegistryConfig = RegistryConfig(),
    spool: Path | None = None,
    say: Say = _to_stderr,
) -> Iterator[Run]:
    """A parent run; ended FINISHED, FAILED when the block raises, KILLED when it is interrupted.

    place: a file that is there while the run is unfinished; with it the same command (`name`) on
    the same store and experiment takes that run up again. registry: what `Run.register` does.
    spool: a folder for what cannot be sent, one folder in it per run; default .arrowhead/unsent.
    say: takes one line for a person, once per trouble.

    Raises ConfigError when the store, or the registry that is asked for, cannot be used, before any
    work is done.
    """
    base = (spool or _unsent()).absolute()
    with contextlib.ExitStack() as until_begun:
        with usable(config):
            client, experiment = open_store(config)
            if registry.register:
                must_take(client, registry.register)
            store = _Store(client, experiment, say)
            mark = {"store": without_secret(config.uri), "experiment": experiment}
            taken = _taken_up(client, place, mark | {"verb": name}, say) if place else None
            _send_all(store, base, mark["store"], taken.info.run_id if taken else None)
            # A signal between a run's making and the block that ends it would leave it RUNNING.
            until_begun.enter_context(signals.deferred())
            if taken:
                run_id, kin = taken.info.run_id, _kin(client, taken)
                times = int(taken.data.tags.get("arrowhead.resumed", 0)) + 1
                client.update_run(run_id, status="RUNNING")
                client.set_tag(run_id, "arrowhead.resumed", str(times))
                say(f"goes on in MLflow run {run_id}, which was left {taken.info.status}")
            else:
                made = _made(config.run_name or name, None, _facts(name))
                if place:  # before the run is there: a kill in between must not leave two
                    fresh = {"verb": name, "run_id": None, "start": made["start"]}
                    write_whole(place, mark | fresh)
                run_id, kin = store.make(made), {}
        if place:
            write_whole(place, mark | {"verb": name, "run_id": run_id})
        post = _Post(store, Spool(base / run_id, mark | {"run_id": run_id}), config.uri, registry)
        done = False
        try:
            with _ended(post, run_id, taken is None), _gauge(config, post, run_id):
                until_begun.close()
                yield Run(post, run_id, kin)
            done = True
        except ConfigError:
            done = taken is None
            raise
        finally:
            post.close()
            if place and done:
                place.unlink(missing_ok=True)


@contextmanager
def _ended(post: _Post, run_id: str, new: bool) -> Iterator[None]:
    """Sets how the run ended. A request that was refused is no run: a new one is deleted."""
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | LostError)
        how = "KILLED" if stopped else "FAILED"
        within = STOPPING if stopped else ENDING
        with signals.deferred():
            ended = {"do": "status", "run": run_id, "status": how, "end": _now()}
            post.write(ended, within=within)
            if isinstance(error, ConfigError) and new:
                post.write({"do": "delete", "run": run_id}, within=within)
        raise
    ended = {"do": "status", "run": run_id, "status": "FINISHED", "end": _now()}
    post.write(ended, within=ENDING)


def send(config: TrackingConfig, spool: Path | None = None, say: Say = _to_stderr) -> None:
    """Send what earlier runs could not. Raises ConfigError when the store cannot be used."""
    with usable(config):
        client, experiment = open_store(config)
        store = _Store(client, experiment, say)
        _send_all(
            store, (spool or _unsent()).absolute(), without_secret(config.uri), None, math.inf
        )


def register(
    bundle: Path,
    config: TrackingConfig,
    registry: RegistryConfig,
    *,
    spool: Path | None = None,
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
        store = _Store(client, experiment, say)
        _send_all(store, (spool or _unsent()).absolute(), without_secret(config.uri), None)
        if version_of(client, registry.register, digest_of(bundle)) is None:
            trained = json.loads((bundle / "bundle.json").read_bytes())["lineage"].get("run_id")
            known = find_run(client, trained) if trained else None
            if known is None or known.info.lifecycle_stage != "active":
                trained = store.make(_made("register", None, _facts("bundle register")))
                client.set_terminated(trained, "FINISHED")
            with patience(stamp(bundle)[0]):
                log_model(client, trained, bundle)
            return make_version(client, trained, bundle, registry, say)
        return make_version(client, "", bundle, registry, say)


# --------------------------------------------------------------------- writes, as plain values


def _now() -> int:
    return int(time() * 1000)


def _made(name: str, parent: str | None, tags: Mapping[str, str]) -> dict[str, Any]:
    """A run to be made. Until it is, it goes by an id of ours."""
    local = f"unsent-{uuid4().hex}"
    return {"local": local, "name": name, "parent": parent, "start": _now(), "tags": dict(tags)}


def _batch(
    points: Points | None = None,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
    *,
    names: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Metrics as [name, value, milliseconds, step], params and tags as text.

    What is no finite number goes as text: JSON has no word for it. A name that is too long for
    MLflow is kept whole in the tag `full_name.<its short form>`. names: those of earlier batches of
    the run (see `mlflow_names`).
    """
    now = _now()
    named = mlflow_names([*(points or {}), *(params or {}), *(tags or {})], names)
    rows = [
        [named[name], value if math.isfinite(value) else str(value), now, int(step)]
        for name, pairs in (points or {}).items()
        for step, value in pairs
    ]
    kept, marks = ({named[k]: str(v) for k, v in (part or {}).items()} for part in (params, tags))
    for name in {**(points or {}), **(params or {}), **(tags or {})}:
        if is_shortened(made := named[name]):
            marks[shortened(f"full_name.{made[-16:]}")] = name
    return {"metrics": rows, "params": kept, "tags": marks}


def _facts(verb: str) -> dict[str, str]:
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


# ---------------------------------------------------------------------------- carrying out


@dataclass(slots=True)
class _Held:
    """What a run has already and is not given again."""

    params: dict[str, str] = field(default_factory=dict)
    steps: dict[str, set[int]] = field(default_factory=dict)
    inputs: set[tuple[str, str, str]] = field(default_factory=set)


class _Store:
    """Carries writes out. Each may come twice, from this process or another, and counts once."""

    def __init__(self, client: MlflowClient, experiment: str, say: Say) -> None:
        self.client, self.experiment, self.say = client, experiment, say
        self.ids: dict[str, str] = {}
        """Our id of a run that was made here, to MLflow's."""
        self._held: dict[str, _Held] = {}

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
            self._held[run_id] = _Held()
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

    def _has(self, run_id: str) -> _Held:
        """What the run has: nothing if it was made here, else read once."""
        if run_id not in self._held:
            run = self.client.get_run(run_id)
            given = run.inputs.dataset_inputs if run.inputs else []
            self._held[run_id] = _Held(
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
        return self._held[run_id]

    def _log(self, run_id: str, write: Write) -> None:
        """Metrics, params and tags in as few requests as MLflow allows."""
        from mlflow.entities import Metric, Param, RunTag

        held = self._has(run_id)
        data = dict(zip(("dataset_name", "dataset_digest"), write.get("dataset", ()), strict=False))
        metrics = [
            Metric(name, float(value), at, step, model_id=write.get("model"), **data)
            for name, value, at, step in write["metrics"]
            if step not in held.steps.get(name, ())
        ]
        new = {k: v for k, v in write["params"].items() if k not in held.params}
        other = {
            k: v
            for k, v in write["params"].items()
            if k in held.params and held.params[k] != v[:LONGEST]
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
        held.params |= {name: value[:LONGEST] for name, value in new.items()}
        for name, value in other.items():
            self.say(
                f"param {name} of run {run_id} was {held.params[name][:80]} and is now"
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


# --------------------------------------------------------------------------- now or later


class _Post:
    """The way to the store: each write is carried out, or kept until the store is back."""

    def __init__(self, store: _Store, spool: Spool, uri: str, registry: RegistryConfig) -> None:
        self.store, self.say, self.registry = store, store.say, registry
        self._spool, self._uri = spool, uri
        self._turn = threading.RLock()  # system metrics come from a thread of their own
        self._away = False
        self._wait = AGAIN[0]
        self._next = monotonic() if len(spool) else math.inf
        self._said: set[str] = set()
        self._stuck = False  # another thread's write has not come back in time

    def write(self, *writes: Write, within: float = -1) -> None:
        """Carry these out in order, or keep them. Raises nothing but an interrupt.

        within: seconds to wait for a write of another thread, after which these are kept; -1:
        however long it takes.
        """
        for one in writes:
            if not self._turn.acquire(timeout=0 if self._stuck else within):
                self._stuck = True
                self._keep(one)
                continue
            try:
                if self._away or not self._tried(one):
                    self._keep(one)
                if monotonic() >= self._next:
                    self._resend()
            finally:
                self._turn.release()

    def _tried(self, write: Write) -> bool:
        """Whether that write is dealt with; if not, the store has gone away."""
        try:
            self.store.do(write, self._spool.folder)
        except Exception as error:
            if refused(error):
                self._once(f"MLflow refuses what is written to it: {first_line(error)}")
                return True
            silent = silence(self._uri, PROBE)
            if silent is None and self.store.answers():
                self._once(
                    f"not recorded yet, though {self._place} answers: {first_line(error)}."
                    f" It is kept in {self._spool.folder} and tried again"
                )
                self._keep(write)
                return True
            self._away = True
            self.say(
                f"{self._place} is gone ({silent or first_line(error)}). The work goes on; what is"
                f" to be recorded is kept in {self._spool.folder} and sent when it is back"
            )
            return False
        return True

    def _keep(self, write: Write) -> None:
        why = self._spool.add(_plain(write, self.store.ids))
        if why:
            self._once(f"{self._spool.folder} cannot be written, only memory is left: {why}")
        if self._next == math.inf:
            self._next = monotonic() + self._wait

    def _resend(self) -> None:
        """Try what is kept; if that fails, not again for a while."""
        gone = silence(self._uri, PROBE) is not None or not self.store.answers()
        left = len(self._spool) if gone else _send(self.store, self._spool, math.inf)
        if left:
            self._wait = min(2 * self._wait, AGAIN[1])
            self._next = monotonic() + self._wait
        else:
            self._wait, self._next = AGAIN[0], math.inf
        if self._away and not gone:
            self._away = not self.store.answers()
            if not self._away:
                still = f", but for {left} writes" if left else ""
                self.say(f"{self._place} is back; what was kept has been sent to it{still}")

    def close(self) -> None:
        """Try once more what is left, and say where it stays."""
        ours = self._turn.acquire(timeout=0 if self._stuck else STOPPING)
        try:
            if len(self._spool) and ours:
                self._resend()
            if lost := self._spool.in_memory:
                self.say(
                    f"{lost} writes to {self._place} are lost: neither it nor {self._spool.folder}"
                    " took them. The results of the command are whole"
                )
            elif left := len(self._spool):
                self.say(
                    f"{left} writes to {self._place} are not sent. They are kept in"
                    f" {self._spool.folder}; the next arrowhead command with this store sends them"
                    " first (in Python: arrowhead.tracking.send)"
                )
            self._spool.release()
        finally:
            if ours:
                self._turn.release()

    def model(self, run_id: str, bundle: Path) -> str | None:
        """See `Run.model`."""
        why = "the tracking store is away"
        if not self._away and not run_id.startswith("unsent-"):
            try:
                with patience(stamp(bundle)[0]):
                    return log_model(self.store.client, run_id, bundle)
            except Exception as error:
                why = first_line(error)
        self.say(f"no MLflow model is made of {bundle} ({why}): the bundle is whole on the disk")
        return None

    def register(self, run_id: str, bundle: Path) -> str | None:
        """See `Run.register`."""
        why = "the tracking store is away"
        if not self._away and not run_id.startswith("unsent-"):
            try:
                return make_version(self.store.client, run_id, bundle, self.registry, self.say)
            except Exception as error:
                why = first_line(error)
        self.say(
            f"not registered as {self.registry.register} ({why}). This does it when all is well:"
            f" {self.registry.later(bundle)}"
        )
        return None

    def _once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self.say(line)

    @property
    def _place(self) -> str:
        return f"the tracking store {without_secret(self._uri)}"


def _send(store: _Store, spool: Spool, until: float) -> int:
    """Send what a spool holds, in order, until a time; how many writes are left in it.

    A write that fails while the store answers is passed over, and stays.
    """
    writes, left = spool.read(), []
    for at, one in enumerate(writes):
        if monotonic() > until:
            left += writes[at:]
            break
        try:
            store.do(one, spool.folder)
        except Exception as error:
            if refused(error):
                store.say(f"MLflow refuses what was kept in {spool.folder}: {first_line(error)}")
            elif store.answers():
                left.append(one)
            else:
                left += writes[at:]
                break
    spool.replace([_plain(one, store.ids) for one in left])
    return len(left)


def _send_all(
    store: _Store, base: Path, place: str, own: str | None, patience: float = OTHERS
) -> None:
    """Send what runs in this store left unsent; all of run `own`, the others for some seconds."""
    until = monotonic() + patience
    for file in sorted(base.glob("*/run.json")):
        try:
            header = json.loads(file.read_bytes())
            run_id, experiment = str(header["run_id"]), str(header["experiment"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        spool = Spool(file.parent, header)
        if header.get("store") != place or file.parent.name != run_id or not spool.lock():
            continue
        try:
            run = find_run(store.client, run_id)
            if run is None or run.info.lifecycle_stage != "active":
                aside = file.parent.with_suffix(".refused")
                store.say(f"{place} has no run {run_id} any more: its unsent writes go to {aside}")
                file.parent.rename(aside)
                continue
            theirs = _Store(store.client, experiment, store.say)
            if left := _send(theirs, spool, math.inf if run_id == own else until):
                store.say(f"{left} writes of run {run_id} are still to be sent: {file.parent}")
            else:
                store.say(f"sent to {place}: what was kept of run {run_id}")
        finally:
            spool.release()


def _plain(write: Write, ids: Mapping[str, str]) -> Write:
    """A write that another process understands: MLflow's ids where they are known."""
    if "run" in write:
        return write | {"run": ids.get(write["run"], write["run"])}
    made = write["made"]
    parent = made["parent"] and ids.get(made["parent"], made["parent"])
    return write | {"made": made | {"parent": parent, "tried": True}}


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


def _kin(client: MlflowClient, run: Recorded) -> Kin:
    """The children of a run."""
    kin: Kin = {}
    below = f"tags.mlflow.parentRunId = '{run.info.run_id}'"
    for child in search(client, run.info.experiment_id, below):
        kin.setdefault(child.info.run_name, []).append((child.info.run_id, child.info.status))
    return kin


# ------------------------------------------------------------------------- system metrics


@contextmanager
def _gauge(config: TrackingConfig, post: _Post, run_id: str) -> Iterator[None]:
    """System metrics of this process's machine, under MLflow's names, while the block lasts.

    The collectors are MLflow's, the thread is ours: MLflow's own ends for good at the first
    answer that fails, and stopping it waits for the server without a limit.
    """
    if not config.system_metrics:
        yield
        return
    stop = threading.Event()
    watch = threading.Thread(target=_watch, args=(post, run_id, stop), daemon=True)
    watch.start()
    try:
        yield
    finally:
        stop.set()
        watch.join(5.0)


def _watch(post: _Post, run_id: str, stop: threading.Event) -> None:
    try:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        usual = float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL") or USUAL)
        collect = SystemMetricsMonitor(run_id, tracking_uri=post.store.client.tracking_uri)
        collect.collect_metrics()  # the first figures are of the time since the machine started
        began, step = monotonic(), post.store.samples(run_id)
        while not stop.is_set():
            for one in collect.monitors:
                one.clear_metrics()
            # Short runs get a few samples, long ones no more than MLflow's usual.
            stop.wait(min(usual, max(SOONEST, (monotonic() - began) / 4)))
            collect.collect_metrics()
            found = {f"system/{k}": v for k, v in collect.aggregate_metrics().items()}
            points = {name: [(step, float(value))] for name, value in found.items()}
            post.write({"do": "batch", "run": run_id} | _batch(points))
            step += 1
    except Exception as error:
        post.say(f"no system metrics are recorded: {first_line(error)}")
