"""A run, recorded in MLflow.

    start          one parent run per command; children per stage, or one per head of a grid
      -> Run       metrics by step, params, tags, files, data sets, the bundle as a model,
                   the model as a version of a registered one
    send           what earlier runs could not write is written now (`start` does it, too)

Only the driver writes. The default store is mlflow.db in the working directory, with the
artifacts in mlruns/ beside it: `mlflow ui` there shows everything.

A store that cannot be used is refused before any work. When it goes away later, the work goes on:
all writes go through an outbox on the disk (`sender`), and are sent when the store is back, at the
end of the run, or by the next command.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from arrowhead import fileio
from arrowhead.errors import ConfigError, LostError
from arrowhead.runtime import environment, signals
from arrowhead.tracking import system_metrics, writes
from arrowhead.tracking.address import without_secrets
from arrowhead.tracking.client import (
    TrackingConfig,
    find_run,
    first_line,
    longer_timeout,
    open_store,
    refuse_store_errors,
)
from arrowhead.tracking.outbox import Outbox, stamp
from arrowhead.tracking.registry import (
    RegistryConfig,
    check_registrable,
    digest_of,
    log_model,
    make_version,
    version_of,
)
from arrowhead.tracking.resume import ChildRuns, reopen, unfinished_run
from arrowhead.tracking.sender import INTERRUPTED_SECONDS, Sender, send_unsent
from arrowhead.tracking.store import PrintLine, TrackingStore
from arrowhead.tracking.writes import Points, Write, is_local, new_run, now_ms, source_tags

UNSENT = Path(".arrowhead") / "unsent"


def _default_outbox() -> Path:
    """Where outboxes lie: in this folder or, where it cannot be written, in a temporary one."""
    writable = os.access(UNSENT if UNSENT.exists() else ".", os.W_OK)
    return UNSENT if writable else environment.private_temp_folder("unsent")


def _to_stderr(line: str) -> None:
    sys.stderr.write(f"{line}\n")


class Run:
    """One MLflow run that is being written. Nothing in here raises because a store is away."""

    def __init__(
        self,
        sender: Sender,
        run_id: str,
        registry: RegistryConfig,
        children: ChildRuns | None = None,
    ) -> None:
        self._sender, self._id, self._registry = sender, run_id, registry
        self._child_runs: ChildRuns = children or {}
        self._inputs: dict[str | None, tuple[str, str]] = {}  # name and digest, by use
        self._names: dict[str, str] = {}  # see `mlflow_names`

    @property
    def run_id(self) -> str:
        """MLflow's id, once the run is made there; while the store is away a local one."""
        if self._id not in self._sender.store.ids and is_local(self._id):
            self.flush()
        return self._sender.store.ids.get(self._id, self._id)

    @property
    def logs_models(self) -> bool:
        """Whether `model` logs what it is given."""
        return self._registry.log_model

    def store_has_run(self, run_id: str) -> bool:
        """Whether the store has a run with this id that was not deleted; False if it is away."""
        return self._sender.store.has_run(run_id)

    def flush(self) -> None:
        """Wait until the store has all that was recorded so far, or is known to be away."""
        self._sender.flush()

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
        write: Write = {"do": "batch", "run": self._id} | writes.batch(points, names=self._names)
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
        """Log parameters, as text. MLflow never changes one: where a resumed run has another value,
        a line says so, and the new value becomes the tag `resumed.<name>`.
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
        write = writes.batch(points, params, tags, names=self._names)
        self._sender.write({"do": "batch", "run": self._id} | write)

    def log_artifact(
        self, path: Path, folder: str | None = None, *, run_id: str | None = None
    ) -> None:
        """Log a file, or a directory's files, as artifacts of the run, or of another run."""
        if not path.exists():
            self._sender.print_line(f"not logged in MLflow, there is no such file: {path}")
            return
        inside = (folder or path.name) if path.is_dir() else folder
        self._sender.write(
            {
                "do": "file",
                "run": run_id or self._id,
                "path": str(path.absolute()),
                "folder": inside,
            }
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
        """Record an input of the run: name, digest (at most 36 characters), source, and its use
        (training, validation, testing, scoring). profile: counts; schema: as MLflow writes it.
        """
        scheme = urlsplit(source).scheme if "://" in source else ""
        kind = "local" if scheme in ("", "file") else scheme
        # MLflow reads a source back from JSON with a URI in it.
        where = json.dumps({"uri": without_secrets(source)})
        data = {"name": name[:500], "digest": digest[:36], "source_type": kind, "source": where}
        for key, value in (("profile", profile), ("schema", schema)):
            if value:
                data[key] = json.dumps(value, ensure_ascii=False)
        self._inputs[use] = data["name"], data["digest"]
        self._sender.write({"do": "inputs", "run": self._id, "data": data, "use": use})

    def model(self, bundle: Path) -> str | None:
        """Log a bundle as a pyfunc model with signature and input example; its address, models:/m-…
        Its name consists of the data set's, the body's and the head's (see `registry.model_name`).

        In: `image`, the bytes of an encoded image (base64 in JSON), or `path`. Whoever asks a
        served model must not choose which files of its host are opened: paths are refused unless
        the host itself names a folder for them (ARROWHEAD_SERVE_PATHS, see `mlflow_model`).
        Out: `label` (the most probable), its `probability`, `labels` (those given: one, or where
        an image may have several any number), `probabilities` in the order of the metadata's
        `classes`; of an image that cannot be decoded None, NaN, [] and NaNs. Nothing in it is
        pickled: the bundle, `served.py`, Arrowhead's own source. None if none is to be logged
        (--no-log-model) or, with a message, if the store does not take it.
        """
        if not self.logs_models:
            return None
        return self._in_store(
            lambda client: self._log_model(client, bundle),
            lambda why: (
                f"no MLflow model was logged of {bundle} ({why}): the bundle is complete there"
            ),
        )

    def _log_model(self, client: Any, bundle: Path) -> str:
        with longer_timeout(stamp(bundle)[0]):
            return log_model(client, self.run_id, bundle)

    def register(self, bundle: Path) -> str | None:
        """Make the model that was logged of a bundle a version of the registered model that
        `start` was given, once, and give it the alias; models:/NAME/VERSION. None if no name was
        given or, with a message that says how to do it later, if the registry does not take it.
        """
        if not self._registry.register:
            return None
        return self._in_store(
            lambda client: make_version(
                client, self.run_id, bundle, self._registry, self._sender.print_line
            ),
            lambda why: (
                f"not registered as {self._registry.register} ({why}). To register it later:"
                f" {self._registry.later(bundle)}"
            ),
        )

    def _in_store(self, do: Callable[[Any], str], failed: Callable[[str], str]) -> str | None:
        """The address that `do` gives, which needs the store now; None and a line if it fails."""
        self.flush()
        why = "the tracking store is away"
        if self._sender.reachable and not is_local(self.run_id):
            try:
                return do(self._sender.store.client)
            except Exception as error:
                why = first_line(error)
        self._sender.print_line(failed(why))
        return None

    @contextmanager
    def child(self, name: str) -> Iterator[Run]:
        """A run below this one, ended FINISHED, or FAILED when the block raises (KILLED by an
        interrupt). A resumed run goes on in the child of that name that it has.
        """
        earlier = self._child_runs.get(name)
        is_new = not earlier
        if earlier:
            child, _ = earlier.pop(0)
            self._sender.write({"do": "status", "run": child, "status": "RUNNING", "end": None})
        else:
            new = new_run(name, self._id, source_tags(name))
            self._sender.write({"do": "make", "made": new})
            child = new["local"]
        with _ended(self._sender, child, new=is_new):
            yield Run(self._sender, child, self._registry)

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
        all_tags = source_tags("head") | {name: str(value) for name, value in (tags or {}).items()}
        ids: list[str] = []
        heads: list[Write] = []
        for name, values, points in zip(names, params, metrics, strict=True):
            new = new_run(name, self._id, all_tags)
            if self._child_runs.get(name):
                child, status = self._child_runs[name].pop(0)
                new["run_id"] = child
                if status == "FINISHED":
                    ids.append(child)
                    continue
            ids.append(new["local"])
            heads.append(
                {"do": "head", "made": new, "end": now_ms(), **writes.batch(points, values)}
            )
        self._sender.write(*heads)
        self.flush()
        return [self._sender.store.ids.get(one, one) for one in ids]


@contextmanager
def start(
    config: TrackingConfig,
    name: str,
    resume_file: Path | None = None,
    *,
    registry: RegistryConfig = RegistryConfig(),
    outbox: Path | None = None,
    print_line: PrintLine = _to_stderr,
) -> Iterator[Run]:
    """A parent run; ended FINISHED, FAILED when the block raises, KILLED when it is interrupted.

    Args:
        config: the tracking store and the experiment.
        name: the verb; also the run's name unless the config has one.
        resume_file: a file that is there while the run is unfinished; with it the same verb on the
            same store and experiment goes on in that run.
        registry: what `Run.register` does.
        outbox: a folder for unsent writes, one folder in it per run; default .arrowhead/unsent.
        print_line: takes one line for a person, once per trouble.

    Raises:
        ConfigError: before any work, when the store or the registry asked for cannot be used.
    """
    base = (outbox or _default_outbox()).absolute()
    with contextlib.ExitStack() as until_begun:
        with refuse_store_errors(config):
            client, experiment = open_store(config)
            if registry.register:
                check_registrable(client, registry.register)
            store = TrackingStore(client, experiment, print_line)
            header = {"store": without_secrets(config.uri), "experiment": experiment}
            owner = header | {"verb": name}
            resumed = (
                unfinished_run(client, resume_file, owner, print_line) if resume_file else None
            )
            own = resumed.info.run_id if resumed else None
            send_unsent(store, base, header["store"], own)
            # A signal between a run's making and the block that ends it would leave it RUNNING.
            until_begun.enter_context(signals.deferred())
            if resumed:
                run_id, children = resumed.info.run_id, reopen(client, resumed, print_line)
            else:
                new = new_run(config.run_name or name, None, source_tags(name))
                if resume_file:  # before the run is there: a kill in between must not leave two
                    fileio.write_json(resume_file, owner | {"run_id": None, "start": new["start"]})
                run_id, children = store.make(new), {}
        if resume_file:
            fileio.write_json(resume_file, owner | {"run_id": run_id})
        sender = Sender(store, Outbox(base / run_id, header | {"run_id": run_id}), config.uri)
        with _recording(config, sender, run_id, resume_file, new=resumed is None):
            until_begun.close()
            yield Run(sender, run_id, registry, children)


@contextmanager
def _recording(
    config: TrackingConfig, sender: Sender, run_id: str, resume_file: Path | None, *, new: bool
) -> Iterator[None]:
    """A parent run while it is open: system metrics, how it ends, the last writes sent."""
    finished = interrupted = False
    try:
        with _ended(sender, run_id, new=new), system_metrics.gauge(config, sender, run_id):
            yield
        finished = True
    except ConfigError:
        finished = new
        raise
    except (KeyboardInterrupt, LostError):
        interrupted = True
        raise
    finally:
        sender.close(seconds=INTERRUPTED_SECONDS if interrupted else math.inf)
        if resume_file and finished:
            resume_file.unlink(missing_ok=True)


@contextmanager
def _ended(sender: Sender, run_id: str, *, new: bool) -> Iterator[None]:
    """Records how the run ended. A refused request leaves no run: a new one is deleted."""

    def record(status: str) -> None:
        sender.write({"do": "status", "run": run_id, "status": status, "end": now_ms()})

    try:
        yield
    except BaseException as error:
        with signals.deferred():
            interrupted = isinstance(error, KeyboardInterrupt | LostError)
            record("KILLED" if interrupted else "FAILED")
            if isinstance(error, ConfigError) and new:
                sender.write({"do": "delete", "run": run_id})
        raise
    record("FINISHED")


def send(
    config: TrackingConfig, outbox: Path | None = None, print_line: PrintLine = _to_stderr
) -> None:
    """Send what earlier runs could not. Raises ConfigError when the store cannot be used."""
    with refuse_store_errors(config):
        client, experiment = open_store(config)
        store = TrackingStore(client, experiment, print_line)
        base = (outbox or _default_outbox()).absolute()
        send_unsent(store, base, without_secrets(config.uri), None, math.inf)


def register(
    bundle: Path,
    config: TrackingConfig,
    registry: RegistryConfig,
    *,
    outbox: Path | None = None,
    print_line: PrintLine = _to_stderr,
) -> str:
    """Make a finished bundle a version of a registered model; models:/NAME/VERSION.

    Its model is logged first if it is not: with the run that trained it or, if this store does not
    know that, with a new one. Raises ConfigError if the store or its registry cannot be used.
    """
    assert registry.register, "a name"
    with refuse_store_errors(config):
        client, experiment = open_store(config)
        check_registrable(client, registry.register)
        store = TrackingStore(client, experiment, print_line)
        base = (outbox or _default_outbox()).absolute()
        send_unsent(store, base, without_secrets(config.uri), None)
        if version_of(client, registry.register, digest_of(bundle)) is None:
            trained = json.loads((bundle / "bundle.json").read_bytes())["lineage"].get("run_id")
            known = find_run(client, trained) if trained else None
            if known is None or known.info.lifecycle_stage != "active":
                new = new_run("register", None, source_tags("bundle register"))
                trained = store.make(new)
                client.set_terminated(trained, "FINISHED")
            with longer_timeout(stamp(bundle)[0]):
                log_model(client, trained, bundle)
            return make_version(client, trained, bundle, registry, print_line)
        return make_version(client, "", bundle, registry, print_line)
