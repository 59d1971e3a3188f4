"""The connection to a tracking store.

TrackingConfig        which store, which experiment
open_store            a client, and the experiment, created if it is new
open_for_reading      a client for a store that must exist; nothing is created
refuse_store_errors   errors of a store that cannot be used become refusals
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from arrowhead.errors import ConfigError
from arrowhead.tracking.address import (
    ADDRESSES,
    check_address,
    redacted,
    register_secrets,
    without_secrets,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as Recorded

SCHEMA_SECONDS = 60.0  # to wait while another command creates the tables of a new store
SAME_ERROR_SECONDS = 5.0  # an error that lasts longer does not come from tables being created
PROBE_SECONDS = 2.0  # for an address to answer during a run; twice that at the start
PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
# Error codes of a write that the store will never accept. Any other failure may be temporary.
REFUSAL_CODES = {
    "BAD_REQUEST",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "MALFORMED_REQUEST",
    "RESOURCE_ALREADY_EXISTS",
}


def _default() -> str:
    """The store in the working directory."""
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
            check_address(self.tracking_uri, "--tracking-uri")
            register_secrets(self.tracking_uri)

    @property
    def uri(self) -> str:
        """The store that will be written to. It may hold a password: see `without_secrets`."""
        return self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or _default()


def check_address_variables() -> None:
    """Raise ConfigError for a malformed address in a variable that MLflow reads."""
    for name in ADDRESSES:
        if uri := os.environ.get(name):
            check_address(uri, name)


def connect(config: TrackingConfig) -> MlflowClient:
    """A client of a store that answers.

    Raises:
        ConfigError: for a malformed address.
        OSError: if nobody answers there.
    """
    import logging

    if not config.tracking_uri:
        check_address_variables()

    # A write that fails is sent again later, so one retry is enough: no minutes for a dead host.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    # Standard output is for the command's result, perhaps a JSON line.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    if why := why_unreachable(config.uri, 2 * PROBE_SECONDS):
        raise OSError(why)
    from mlflow import MlflowClient

    for noisy in ("mlflow.system_metrics", "mlflow.pyfunc", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # It prints the traceback of every database error, which we report in one line.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    if "://" in config.uri and not config.uri.startswith("http"):
        return _connect_to_database(config.uri)
    return MlflowClient(tracking_uri=config.uri)


def _connect_to_database(uri: str) -> MlflowClient:
    """A client of a database, whose tables are created if it is new.

    When several commands start at once on a new database, MLflow lets all of them create the
    tables, and all but one fail. Here, commands on one machine take turns; those on several
    machines try again, since their database rolls back what failed.
    """
    from mlflow import MlflowClient

    until, since, before = monotonic() + SCHEMA_SECONDS, monotonic(), ""
    name = str(_database(uri).absolute()) if uri.startswith("sqlite:") else without_secrets(uri)
    with _one_process_at_a_time(hashlib.sha256(name.encode()).hexdigest()[:16]):
        while True:
            try:
                client = MlflowClient(tracking_uri=uri)
                client.search_experiments(max_results=1)
                return client
            except Exception as error:
                message, now = str(error)[:300], monotonic()
                if message != before:
                    since, before = now, message
                if (
                    not _SCHEMA_RACE.search(message)
                    or now > until
                    or now > since + SAME_ERROR_SECONDS
                ):
                    raise
                sleep(0.5)


# Errors of databases for the second of two clients that create or migrate the same tables.
_SCHEMA_RACE = re.compile(
    r"(?i)already exists|duplicate|out-of-date database schema|no such table|does ?n[o']t exist"
    r"|deadlock|database is locked|alembic_version|undefined|concurrent"
)


@contextmanager
def _one_process_at_a_time(name: str) -> Iterator[None]:
    """One process of this user at a time, where a lock file can be made."""
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
    """A client, and the id of the experiment, which is created if it is new."""
    client = connect(config)
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(config.experiment)
    if experiment is None:
        kind = {"mlflow.experimentKind": "custom_model_development"}  # the UI's layout
        try:
            location = _artifact_location(config.uri, config.experiment)
            return client, client.create_experiment(config.experiment, location, tags=kind)
        except MlflowException:  # another command created it first
            experiment = client.get_experiment_by_name(config.experiment)
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise ConfigError(
            f"The experiment {config.experiment!r} was deleted in {without_secrets(config.uri)}.",
            "an active experiment, or a new name.",
            "give another --experiment, or restore it in the MLflow UI.",
        )
    return client, experiment.experiment_id


def _artifact_location(uri: str, experiment: str) -> str | None:
    """Where a new experiment's files go: MLflow's own choice, which for a database is a folder in
    this one; where that cannot be written, beside the database.
    """
    if not uri.startswith("sqlite:") or os.access(".", os.W_OK):
        return None
    return str(_database(uri).absolute().parent / "mlruns" / quote(experiment, safe=""))


@contextmanager
def open_for_reading(config: TrackingConfig, what: str) -> Iterator[MlflowClient]:
    """A client for reading from an existing store; nothing is created or written.

    Args:
        config: the store.
        what: what is looked up there, for the refusal.

    Raises:
        ConfigError: if there is no such store, or for its errors inside the block.
    """
    _check_database_exists(config, what)
    with refuse_store_errors(config):
        yield connect(config)


def _check_database_exists(config: TrackingConfig, what: str) -> None:
    """Refuse a database file that does not exist: MLflow would create it, empty."""
    if config.uri.startswith("sqlite:") and not _database(config.uri).exists():
        raise ConfigError(
            f"{what} is looked for in {without_secrets(config.uri)}; no such database is there.",
            "the store that it was recorded in.",
            "give it with --tracking-uri or MLFLOW_TRACKING_URI.",
        )


@contextmanager
def refuse_store_errors(config: TrackingConfig) -> Iterator[None]:
    """Turn the errors of a store that cannot be used into ConfigError."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except Exception as error:
        # Libraries of databases and artifact stores have exception classes of their own.
        foreign = type(error).__module__.startswith(("sqlalchemy", "botocore", "google"))
        if not foreign and not isinstance(error, MlflowException | OSError | ImportError):
            raise
        raise ConfigError(
            f"The tracking store {without_secrets(config.uri)} cannot be used: {first_line(error)}",
            "a database (sqlite:///…, postgresql://…) or an MLflow server that answers.",
            "give --tracking-uri sqlite:////FOLDER/mlflow.db, a FOLDER that can be written."
            if config.uri == _default() and not os.access(".", os.W_OK)
            else "start it, or check --tracking-uri and MLFLOW_TRACKING_URI; without these, runs go"
            " to ./mlflow.db.",
        ) from _cause_without_secrets(error)


def _cause_without_secrets(error: Exception) -> Exception | None:
    """The error as the cause of another, or None if Python would print a secret with it."""
    text = "".join(traceback.format_exception(error))
    return error if redacted(text) == text else None


def why_unreachable(uri: str, seconds: float) -> str | None:
    """Why a store does not answer; None if it does, or if the address is not for us to judge.

    MLflow itself retries a dead server for minutes, and a dead database for longer.

    Args:
        uri: the store's address.
        seconds: how long to wait for an answer.
    """
    if uri.startswith("sqlite:"):
        return _why_not_writable(uri, seconds)
    try:
        parts = urlsplit(re.sub("//.*@", "//", uri.partition("?")[0]))
        port = parts.port or PORTS.get(parts.scheme.partition("+")[0])
        if not parts.hostname or not port:
            return None
        if parts.scheme.startswith("http"):
            return _why_no_http_answer(
                f"{parts.scheme}://{parts.hostname}:{port}{parts.path}", seconds
            )
        with socket.create_connection((parts.hostname, port), seconds):
            return None
    except OSError as error:
        return first_line(error)
    except ValueError:  # the database's own library will say so
        return None


def _why_no_http_answer(url: str, seconds: float) -> str | None:
    """Why a web server gives no answer at all; any answer, even an error, is left to MLflow."""
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


def _why_not_writable(uri: str, seconds: float) -> str | None:
    """Why an SQLite file cannot be written; MLflow creates one that does not exist yet."""
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
def longer_timeout(size: int) -> Iterator[None]:
    """One more second per megabyte for each request: a server may store slowly."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ[name]
    os.environ[name] = str(int(float(before)) + size // 1_000_000)
    try:
        yield
    finally:
        os.environ[name] = before


def is_refusal(error: Exception) -> bool:
    """Whether the store says that it will never accept this write."""
    from mlflow.exceptions import MlflowException

    if not isinstance(error, MlflowException):
        return False
    # A gateway in front of a dead server answers too, but not with MLflow's error codes.
    return error.error_code in REFUSAL_CODES and not str(error).startswith("API request to")


def first_line(error: Exception) -> str:
    """The first line of an exception's text, without secrets."""
    text = str(error).strip() or type(error).__name__
    return without_secrets(text.splitlines()[0])[:300]


def find_run(client: MlflowClient, run_id: str) -> Recorded | None:
    """A run, or None if the store does not know it."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in (*REFUSAL_CODES, "RESOURCE_DOES_NOT_EXIST"):
            return None
        raise


def get_or_none(get: Callable[[str], Any], key: str) -> Any:
    """What a method of the client returns for a key, or None if the store says that it has none."""
    from mlflow.exceptions import MlflowException

    try:
        return get(key)
    except MlflowException as error:
        # A server that does not know the route answers 404 too, but not with MLflow's error codes.
        if error.error_code != "RESOURCE_DOES_NOT_EXIST" or str(error).startswith("API request to"):
            raise
        return None


def search(
    client: MlflowClient, experiment: str, wanted: str = "", order: str = "ASC"
) -> Iterator[Recorded]:
    """All runs that match a filter; ASC: the oldest first, DESC: the newest."""
    token = None
    while True:
        page = client.search_runs(
            [experiment],
            wanted,
            max_results=1000,
            order_by=[f"attributes.start_time {order}"],
            page_token=token,
        )
        yield from page
        token = page.token
        if not token:
            return
