"""A tracking store that MLflow writes to: its address, the way to it, and what it answers.

TrackingConfig   which store, which experiment
open_store       a client, and the experiment, made if need be
reading          a client of a store to look into; nothing is made
usable           what a store answers when it cannot be used becomes a refusal
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import socket
import sqlite3
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

from arrowhead.errors import ConfigError
from arrowhead.tracking.address import ADDRESSES, hidden, must_be_address, remember, without_secret

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as Recorded

SCHEMA_SECONDS = 60.0  # for a store whose schema another command is making
SAME_SECONDS = 5.0  # an error that lasts so long is none of a schema that is being made
PROBE = 2.0  # seconds an address gets to answer in mid-run; at the start it gets twice that
PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
# What the store itself says of a write that it will never take. Any other failure may pass.
REFUSED = {
    "BAD_REQUEST",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "MALFORMED_REQUEST",
    "RESOURCE_ALREADY_EXISTS",
}


def _default() -> str:
    """The store here."""
    return f"sqlite:///{Path.cwd() / 'mlflow.db'}"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """Where runs are recorded."""

    tracking_uri: str | None = field(default=None, repr=False)
    """MLflow tracking store. Default: MLFLOW_TRACKING_URI, or sqlite:///mlflow.db here."""
    experiment: str = "arrowhead"
    """Name of the MLflow experiment."""
    run_name: str | None = None
    """Name of the MLflow run. Default: the name of the command."""
    system_metrics: bool = True
    """Record the load of this machine during the run: CPU, memory, disk, network, NVIDIA GPUs."""

    def __post_init__(self) -> None:
        if self.tracking_uri:
            must_be_address(self.tracking_uri, "--tracking-uri")
            remember(self.tracking_uri)

    @property
    def uri(self) -> str:
        """The store that will be written to. It may hold a password: see `without_secret`."""
        return self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or _default()


def must_have_addresses() -> None:
    """Raises ConfigError for a malformed address in one of the variables that MLflow reads."""
    for name in ADDRESSES:
        if uri := os.environ.get(name):
            must_be_address(uri, name)


def connected(config: TrackingConfig) -> MlflowClient:
    """A client of a store that answers. Raises ConfigError for a malformed address."""
    import logging

    if not config.tracking_uri:
        must_have_addresses()

    # A write that fails is kept and sent later: one retry, and no minutes in front of a dead host.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    # Standard output is for what the command was asked for, a JSON line perhaps.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    if why := silence(config.uri, 2 * PROBE):
        raise OSError(why)
    from mlflow import MlflowClient

    for noisy in ("mlflow.system_metrics", "mlflow.pyfunc", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # It prints the traceback of every database error that we catch and say in one line.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    if "://" in config.uri and not config.uri.startswith("http"):
        return _with_schema(config.uri)
    return MlflowClient(tracking_uri=config.uri)


def _with_schema(uri: str) -> MlflowClient:
    """A client of a database, its tables made if it is new; commands that begin at once wait for
    the first.

    MLflow itself lets them all make the tables, and all but one die of it. Commands of one machine
    take turns; those of several, whose database undoes what fails, try again.
    """
    from mlflow import MlflowClient

    until, since, before = monotonic() + SCHEMA_SECONDS, monotonic(), ""
    place = str(_database(uri).absolute()) if uri.startswith("sqlite:") else without_secret(uri)
    with _turn(hashlib.sha256(place.encode()).hexdigest()[:16]):
        while True:
            try:
                client = MlflowClient(tracking_uri=uri)
                client.search_experiments(max_results=1)
                return client
            except Exception as error:
                said, now = str(error)[:300], monotonic()
                if said != before:
                    since, before = now, said
                if not _IN_THE_MAKING.search(said) or now > until or now > since + SAME_SECONDS:
                    raise
                sleep(0.5)


# What databases say to the second of two that make or migrate the same tables.
_IN_THE_MAKING = re.compile(
    r"(?i)already exists|duplicate|out-of-date database schema|no such table|does ?n[o']t exist"
    r"|deadlock|database is locked|alembic_version|undefined|concurrent"
)


@contextmanager
def _turn(name: str) -> Iterator[None]:
    """One process of this user at a time, where the machine has a place for a lock."""
    lock = Path(tempfile.gettempdir()) / f"arrowhead-{os.getuid()}-{name}.lock"
    try:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        yield
        return
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def open_store(config: TrackingConfig) -> tuple[MlflowClient, str]:
    """A client, and the id of the experiment, made if need be."""
    client = connected(config)
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(config.experiment)
    if found is None:
        kind = {"mlflow.experimentKind": "custom_model_development"}  # the UI's layout
        try:
            place = _artifacts(config.uri, config.experiment)
            return client, client.create_experiment(config.experiment, place, tags=kind)
        except MlflowException:  # another command was quicker
            found = client.get_experiment_by_name(config.experiment)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise ConfigError(
            f"The experiment {config.experiment!r} was deleted in {without_secret(config.uri)}.",
            "an active experiment, or a new name.",
            "give another --experiment, or restore it in the MLflow UI.",
        )
    return client, found.experiment_id


def _artifacts(uri: str, experiment: str) -> str | None:
    """Where a new experiment's files go: MLflow's own choice, which for a database is a folder in
    this one; where that cannot be written, beside the database.
    """
    if not uri.startswith("sqlite:") or os.access(".", os.W_OK):
        return None
    return str(_database(uri).absolute().parent / "mlruns" / quote(experiment, safe=""))


@contextmanager
def reading(config: TrackingConfig, what: str) -> Iterator[MlflowClient]:
    """A client of a store that `what` is looked for in; nothing is written.

    Raises ConfigError if there is no such store, and for what it answers inside.
    """
    _must_be_there(config, what)
    with usable(config):
        yield connected(config)


def _must_be_there(config: TrackingConfig, what: str) -> None:
    """MLflow would make a database that is not there, to find nothing in it."""
    if config.uri.startswith("sqlite:") and not _database(config.uri).exists():
        raise ConfigError(
            f"{what} is looked for in {without_secret(config.uri)}; no such database is there.",
            "the store that it was recorded in.",
            "give it with --tracking-uri or MLFLOW_TRACKING_URI.",
        )


@contextmanager
def usable(config: TrackingConfig) -> Iterator[None]:
    """Turns what a store answers when it cannot be used into a refusal."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except Exception as error:
        # What the libraries of databases and of artefact stores raise is no class of Python's.
        foreign = type(error).__module__.startswith(("sqlalchemy", "botocore", "google"))
        if not foreign and not isinstance(error, MlflowException | OSError | ImportError):
            raise
        raise ConfigError(
            f"The tracking store {without_secret(config.uri)} cannot be used: {first_line(error)}",
            "a database (sqlite:///…, postgresql://…) or the address of an MLflow server.",
            "give --tracking-uri sqlite:////FOLDER/mlflow.db, a FOLDER that can be written."
            if config.uri == _default() and not os.access(".", os.W_OK)
            else "check --tracking-uri and MLFLOW_TRACKING_URI; leave both out for ./mlflow.db.",
        ) from _shown(error)


def _shown(error: Exception) -> Exception | None:
    """An error as the cause of another, or None where Python would print a secret with it."""
    text = "".join(traceback.format_exception(error))
    return error if hidden(text) == text else None


def silence(uri: str, seconds: float) -> str | None:
    """Why nobody answers at a store's address; None if somebody does, or if it is no address.

    MLflow itself asks a dead server again for minutes, and a dead database for more.
    """
    if uri.startswith("sqlite:"):
        return _locked(uri, seconds)
    try:
        parts = urlsplit(re.sub("//.*@", "//", uri.partition("?")[0]))
        port = parts.port or PORTS.get(parts.scheme.partition("+")[0])
        if not parts.hostname or not port:
            return None
        if parts.scheme.startswith("http"):
            return _no_answer(f"{parts.scheme}://{parts.hostname}:{port}{parts.path}", seconds)
        with socket.create_connection((parts.hostname, port), seconds):
            return None
    except OSError as error:
        return first_line(error)
    except ValueError:  # its own library will say so
        return None


def _no_answer(url: str, seconds: float) -> str | None:
    """Why a web server gives no answer at all; which one it gives is left to MLflow."""
    import ssl
    from http.client import HTTPException
    from urllib.error import HTTPError, URLError
    from urllib.request import urlopen

    try:
        with urlopen(f"{url.rstrip('/')}/health", timeout=seconds):  # noqa: S310
            return None
    except HTTPError:
        return None
    except URLError as error:
        return None if isinstance(error.reason, ssl.SSLError) else str(error.reason)
    except (OSError, HTTPException) as error:
        return first_line(error)


def _locked(uri: str, seconds: float) -> str | None:
    """Why an SQLite file cannot be written; one that is not there yet is MLflow's to make."""
    path = _database(uri)
    if not path.name or path.name == ":memory:":
        return None
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            return None if os.access(path.parent, os.W_OK) else f"{path.parent} is not writable"
        address = f"file:{quote(str(path.absolute()))}?mode=rw"
        with contextlib.closing(sqlite3.connect(address, seconds, uri=True)) as file:
            file.execute("BEGIN IMMEDIATE")
            file.rollback()
    except (OSError, sqlite3.Error) as error:
        return str(error)
    return None


def _database(uri: str) -> Path:
    """The file of an SQLite store."""
    return Path(uri.partition("///")[2].partition("?")[0])


@contextmanager
def patience(size: int) -> Iterator[None]:
    """A second more per megabyte: a server may be slow to store what it is sent."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ[name]
    os.environ[name] = str(int(float(before)) + size // 1_000_000)
    try:
        yield
    finally:
        os.environ[name] = before


def refused(error: Exception) -> bool:
    """Whether the store itself says that it will never take a write."""
    from mlflow.exceptions import MlflowException

    if not isinstance(error, MlflowException):
        return False
    # A gateway before a server that is down answers too, but not in MLflow's words.
    return error.error_code in REFUSED and not str(error).startswith("API request to")


def first_line(error: Exception) -> str:
    """What an exception says, as far as it may be shown."""
    text = str(error).strip() or type(error).__name__
    return without_secret(text.splitlines()[0])[:300]


def find_run(client: MlflowClient, run_id: str) -> Recorded | None:
    """A run, or None if the store does not know it."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in (*REFUSED, "RESOURCE_DOES_NOT_EXIST"):
            return None
        raise


def missing(error: Exception) -> bool:
    """Whether a store says that it has not got what was asked for."""
    code = getattr(error, "error_code", "")
    # A server that does not know the question answers 404, too, but not in MLflow's words.
    return code == "RESOURCE_DOES_NOT_EXIST" and not str(error).startswith("API request to")


def search(client: MlflowClient, experiment: str, wanted: str) -> Iterator[Recorded]:
    """All runs that fit, oldest first."""
    token = None
    while True:
        page = client.search_runs(
            [experiment],
            wanted,
            max_results=1000,
            order_by=["attributes.start_time ASC"],
            page_token=token,
        )
        yield from page
        token = page.token
        if not token:
            return
