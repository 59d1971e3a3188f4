"""Run a command on a cluster with Ray Jobs.

    connect       checks the address and the token; returns the cluster's nodes
    job_folder    the job's working directory: this one, if the cluster has it
    submit        sends the package's source and the TOML file, never data
    follow_job    prints the job's log as it grows; returns how the job ended

Ray's job client promises neither a timeout nor that a token stays where it belongs: each command
here starts with one small request that takes ten seconds at most, and a cluster that asks for no
token is not sent one. Ray is imported only after that.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import arrowhead
from arrowhead.errors import ConfigError, LostError
from arrowhead.runtime.ray_cluster import token_file

LOCAL_ADDRESS = "http://127.0.0.1:8265"
MAX_UPLOAD_BYTES = 50_000_000  # the package is about 2 MB: anything larger is a mistake
REQUEST_TIMEOUT_SECONDS = 10.0
STOP_WAIT_SECONDS = 30  # from a job's SIGTERM to its SIGKILL: Ray's 3 may not end an MLflow run
MAX_RETRIES = 5  # of an interrupted log: after one second, then two, …
FINAL_STATES = {"SUCCEEDED", "FAILED", "STOPPED"}

# Lines that Ray adds to a job's log: its own INFO lines, and the command that was submitted.
_RAY_LINES = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}\s+INFO \w+\.py:\d+ -- |Running entrypoint for job "
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """Which cluster to use."""

    address: str | None = None
    """Address of the cluster's job server, http(s)://HOST:PORT. Default: RAY_API_SERVER_ADDRESS,
    RAY_ADDRESS, or http://127.0.0.1:8265."""
    insecure: bool = False
    """Allow plain http to another machine (others on the network could read the token), and a
    cluster on another machine that asks for no token (everyone could run code there)."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A job server that has answered.

    Attributes:
        url: Its address.
        token: The token, None if the server asks for none.
        nodes: IP address and resources of each node that is alive.
    """

    url: str
    token: str | None = field(repr=False)
    nodes: tuple[tuple[str, dict[str, float]], ...]

    @property
    def is_local(self) -> bool:
        """Whether every node is this machine, so that paths mean the same there.

        The URL does not tell: a loopback address may be the end of a tunnel.
        """
        import psutil

        own = {one.address for cards in psutil.net_if_addrs().values() for one in cards}
        return bool(self.nodes) and all(address in own for address, _ in self.nodes)

    @property
    def worker_capacity(self) -> int:
        """Workers that it can hold: one per GPU, or per CPU if it has no GPU; at least 1."""
        total = {
            kind: sum(int(resources.get(kind, 0)) for _, resources in self.nodes)
            for kind in ("GPU", "CPU")
        }
        return max(1, total["GPU"] or total["CPU"])


@dataclass(frozen=True, slots=True)
class Job:
    """A job of the cluster.

    Attributes:
        job_id: Its submission id.
        status: Ray's name of its state.
        exit_code: None until it has ended.
        command: Its shell command.
        began: When it started, in seconds since 1970.
        words: Ray's message about it, one line.
    """

    job_id: str
    status: str
    exit_code: int | None
    command: str
    began: float | None
    words: str = ""


# -------------------------------------------------------------------------- the address


def connect(config: ClusterConfig) -> Cluster:
    """Connect to the job server at the address and get its nodes.

    Raises:
        ConfigError: Nothing answers there, the token is not accepted, or others could read it.
    """
    url = _url(config)
    loopback = _is_loopback(url)
    if url.startswith("http:") and not loopback and not config.insecure:
        raise ConfigError(
            f"{url} is plain http to another machine: others on the network could read the token.",
            "https, or a tunnel that ends on this machine.",
            "ssh -L 8265:127.0.0.1:8265 HOST (or kubectl port-forward) and"
            f" --address {LOCAL_ADDRESS}; or --insecure, if you trust the network.",
        )
    token = None
    status, body = _get(url, None)
    if status in (401, 403):
        token, source = _find_token(url)
        status, body = _get(url, token)
        if status in (401, 403):
            raise ConfigError(
                f"{url} does not accept the token from {source}.",
                "the token that this cluster was started with.",
                f"copy it from its head node (`ray get-auth-token` there) to {token_file()}, mode"
                " 0600, or set RAY_AUTH_TOKEN_PATH.",
            )
    elif status == 200 and not loopback and not config.insecure:
        raise ConfigError(
            f"{url} asks for no token: everyone who reaches it can run code there.",
            "a cluster with token authentication.",
            "start it with RAY_AUTH_MODE=token, or add --insecure to use it as it is.",
        )
    try:
        if status != 200:
            raise ValueError(f"HTTP {status}")
        rows = json.loads(body)["data"]["result"]["result"]
        nodes = tuple(
            (row["node_ip"], row["resources_total"]) for row in rows if row["state"] == "ALIVE"
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"The server at {url} is no Ray job server ({error}).",
            "the address of a Ray dashboard; its port is 8265 unless it was changed.",
            f"check the address; {LOCAL_ADDRESS} is that of `cluster/local.sh up`.",
        ) from error
    return Cluster(url, token, nodes)


def _url(config: ClusterConfig) -> str:
    """The URL of the job server: from the flag, the variables, or the default."""
    variables = {name: os.environ.get(name) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")}
    candidates = ({"--address": config.address} | variables).items()
    name, address = next(((k, v) for k, v in candidates if v and v != "auto"), ("", LOCAL_ADDRESS))
    gcs = name == "RAY_ADDRESS" and "://" not in address
    parts = urlsplit(address if "://" in address else f"http://{address}")
    try:
        valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 80)
    except ValueError:
        valid = False
    if gcs or not valid or parts.username or parts.query:
        raise ConfigError(
            f"{name} is {address if '@' not in address else 'an address with a user name in it'}.",
            "the address of a job server: http://HOST:8265 or https://HOST.",
            f"give e.g. --address {LOCAL_ADDRESS}.",
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _get(url: str, token: str | None) -> tuple[int, bytes]:
    """Status and body of the list of nodes; ConfigError if nothing answers."""
    import requests  # as Ray's client does, so proxies and certificates are the same

    try:
        response = requests.get(
            f"{url}/api/v0/nodes?limit=10000",
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=REQUEST_TIMEOUT_SECONDS,
            allow_redirects=False,  # the token goes to no other server
        )
    except requests.RequestException as error:
        raise _no_answer(url, error) from error
    return response.status_code, response.content


def _no_answer(url: str, error: Exception) -> ConfigError:
    """The refusal when no job server answers."""
    why = "it did not answer in time" if "timed out" in str(error) else "nothing listens there"
    if "certificate" in str(error).lower():
        why = "its certificate is not trusted here (REQUESTS_CA_BUNDLE)"
    return ConfigError(
        f"No Ray job server answers at {url}: {why}.",
        "the address of a running cluster's dashboard.",
        "start one on this machine with `cluster/local.sh up`, or give --address.",
    )


def _find_token(url: str) -> tuple[str, str]:
    """The token and its source; the places and their order are Ray's."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token, "RAY_AUTH_TOKEN"
    path = token_file()
    try:
        token = path.read_text().strip()
    except OSError:
        token = ""
    if not token:
        raise ConfigError(
            f"{url} asks for a token, and this machine has none.",
            f"the cluster's token in RAY_AUTH_TOKEN, or in a file: RAY_AUTH_TOKEN_PATH names it,"
            f" else {Path.home() / '.ray' / 'auth_token'}.",
            f"copy it from the head node (`ray get-auth-token` there) to {path}, mode 0600.",
        )
    return token, str(path)


# --------------------------------------------------------------------------- the folder


def job_folder(cluster: Cluster, shared: list[Path], paths: list[str]) -> Path | None:
    """The job's working directory, in which relative paths mean the same as here.

    Args:
        cluster: Where the job will run.
        shared: Folders that every node has under the same path.
        paths: Files and folders that the command will read or write.

    Returns:
        The folder; None if the cluster does not have this one and no path needs it.

    Raises:
        ConfigError: The cluster does not have one of the paths.
    """
    if not cluster.nodes:
        raise ConfigError(
            f"The cluster at {cluster.url} has no node yet.",
            "a head node that is up.",
            "wait a little and submit again.",
        )
    cwd = Path.cwd()
    if cluster.is_local:
        return cwd
    folders = [Path(os.path.normpath(cwd / folder)) for folder in shared]
    # cwd is a path without links; --shared may be a link to a folder that contains it.
    real = ((folder, folder.resolve()) for folder in folders)
    job_cwd = next((f / cwd.relative_to(r) for f, r in real if cwd.is_relative_to(r)), None)
    for name in paths:
        path = Path(os.path.normpath((job_cwd or cwd) / name))
        if not any(path.is_relative_to(folder) for folder in folders):
            raise ConfigError(
                f"{path} is on this machine; {cluster.url} is a cluster of other machines"
                f" ({', '.join(sorted({address for address, _ in cluster.nodes})[:3])}).",
                "addresses (s3://…, gs://…), or paths in a folder that every node has.",
                "copy it to such a place; if the nodes have this folder under the same path, add"
                f" --shared {path.parent}.",
            )
        if job_cwd is None and not Path(name).is_absolute():
            raise ConfigError(
                f"{name} is relative to {cwd}, which the cluster does not have.",
                "an absolute path, or a command started inside a --shared folder.",
                f"give {path}.",
            )
    return job_cwd


def check_inputs(
    cluster: Cluster, shared: list[Path], folder: Path | None, inputs: list[str]
) -> None:
    """Raise ConfigError for an input that does not exist, before anything is sent.

    Checks only what this machine sees as the cluster does: its own disk, and shared folders that
    exist here too.

    Args:
        cluster: Where the job will run.
        shared: Folders that every node has under the same path.
        folder: The job's working directory, from `job_folder`.
        inputs: Files and folders that the command will read.
    """
    cwd = Path.cwd()
    folders = [Path(os.path.normpath(cwd / one)) for one in shared]
    for name in inputs:
        path = Path(os.path.normpath((folder or cwd) / name))
        visible = cluster.is_local or any(path.is_relative_to(f) and f.is_dir() for f in folders)
        if visible and not os.path.lexists(path):
            raise ConfigError(
                f"{path} does not exist.",
                "a file or folder to read.",
                f"check the path; relative ones start at {folder or cwd}.",
            )


# ------------------------------------------------------------------------------ the job


def submit(
    cluster: Cluster,
    command: list[str],
    *,
    folder: Path | None,
    config: Path | None = None,
    env_vars: dict[str, str] | None = None,
    required_variable: str | None = None,
) -> tuple[str, int]:
    """Start `arrowhead COMMAND` on the head node.

    Args:
        cluster: Where to run.
        command: The command's words, without "arrowhead".
        folder: Its working directory; None: a temporary folder of Ray's.
        config: A TOML file that is sent along for --config.
        env_vars: Environment variables of the job; everyone who may list jobs sees them.
        required_variable: A variable that must be set on the head node; if it is not, the job ends
            with exit code 2.

    Returns:
        The job's id, and how many bytes were sent.
    """
    toml = ""
    if config is not None:  # it is in the folder where the job starts: Ray's copy of the upload
        toml = f'--config "${"OLDPWD" if folder else "PWD"}"{shlex.quote(f"/{config.name}")} '
    # -P: import nothing from the working directory.
    line = f"exec python -P -m arrowhead {toml}{shlex.join(command)}"
    if folder is not None:
        line = f"cd {shlex.quote(str(folder))} && {line}"
    if required_variable is not None:  # ${NAME:?text} would end bash with 127
        name = required_variable
        message = f"arrowhead: {name} is not set on the head node: set it, or give the flag"
        line = f'[ -n "${{{name}:-}}" ] || {{ echo {shlex.quote(message)} >&2; exit 2; }}; {line}'
    with tempfile.TemporaryDirectory(prefix="arrowhead-job-") as upload:
        size = _copy_source(Path(upload), config)
        with _client(cluster) as client:
            stop_wait = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_SECONDS)}
            runtime_env = {"working_dir": upload, "env_vars": stop_wait | (env_vars or {})}
            job_id = client.submit_job(entrypoint=line, runtime_env=runtime_env)
    return str(job_id), size


def _copy_source(folder: Path, config: Path | None) -> int:
    """Copy the package's source and the TOML file to the folder that is sent; their bytes."""
    source = Path(arrowhead.__file__).parent
    files = {
        path: f"arrowhead/{path.relative_to(source)}"
        for path in sorted(source.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    if config is not None:
        files[config] = config.name
    size = sum(path.stat().st_size for path in files)
    if size > MAX_UPLOAD_BYTES:
        largest = max(files, key=lambda path: path.stat().st_size)
        raise ConfigError(
            f"{size / 1e6:.0f} MB would be sent to the cluster, most of it {largest}.",
            f"{MAX_UPLOAD_BYTES / 1e6:.0f} MB at most: every node keeps a copy for every job.",
            "put data where the cluster can read it (s3://…, a shared folder) and give its path.",
        )
    for path, name in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    return size


def get_job(cluster: Cluster, job_id: str) -> Job:
    """The job with this id. Raises ConfigError if the cluster does not know it."""
    with _client(cluster) as client:
        return _job(client.get_job_info(job_id))


def list_jobs(cluster: Cluster) -> list[Job]:
    """The jobs that the cluster knows, oldest first."""
    with _client(cluster) as client:
        jobs = [_job(info) for info in client.list_jobs() if info.submission_id]
    return sorted(jobs, key=lambda job: job.began or 0)


def stop_job(cluster: Cluster, job_id: str) -> bool:
    """Ask a job to end; whether it was running."""
    with _client(cluster) as client:
        return bool(client.stop_job(job_id))


def read_log(cluster: Cluster, job_id: str) -> list[str]:
    """The lines of a job's log so far, without Ray's own."""
    with _client(cluster) as client:
        lines = client.get_job_logs(job_id).splitlines()
    return [line for line in lines if not _RAY_LINES.match(line)]


def follow_job(cluster: Cluster, job_id: str, show: Callable[[str], None]) -> Job:
    """Show each line of a job's log as it comes, until the job ends.

    Returns:
        The ended job.

    Raises:
        LostError: The cluster does not answer any more, or Ray lost the job.
    """
    shown = 0  # characters: after an interruption the log comes again from its beginning

    async def show_log(client: Any) -> None:
        nonlocal shown
        received, rest = 0, ""
        async for text in client.tail_job_logs(job_id):
            received += len(text)
            if received <= shown:
                continue
            new = text[len(text) - (received - shown) :]
            *lines, rest = (rest + new).split("\n")
            for line in lines:
                if not _RAY_LINES.match(line):
                    show(line)
            shown = received - len(rest)
        if rest:
            show(rest)

    with _client(cluster) as client:
        for attempt in range(MAX_RETRIES + 1):
            try:
                asyncio.run(show_log(client))
                while (job := _job(client.get_job_info(job_id))).status not in FINAL_STATES:
                    time.sleep(0.5)
                break
            except Exception as error:  # of aiohttp, requests or Ray, depending on the moment
                if _is_unknown(error):
                    raise
                if attempt == MAX_RETRIES:
                    raise LostError(
                        f"{cluster.url} does not answer any more; job {job_id} may still run.",
                        "a connection to the cluster that stays open.",
                        f"when it answers again: arrowhead jobs logs {job_id} --follow",
                    ) from error
                time.sleep(attempt + 1)
    if job.status == "FAILED" and job.exit_code is None:
        raise LostError(
            f"Ray lost job {job_id}: {job.words}",
            "a job that runs to its end; finished work is kept.",
            "submit the same command again: it continues where it stopped.",
        )
    return job


def _job(info: Any) -> Job:
    """Ray's details of a job as a `Job`, with the exit code that a shell would show."""
    status, code = str(info.status), info.driver_exit_code
    if status == "STOPPED":
        code = 130
    elif status not in FINAL_STATES:
        code = None
    elif code is not None and code < 0:  # ended by a signal
        code = 128 - code
    return Job(
        job_id=info.submission_id,
        status=status,
        exit_code=code,
        command=info.entrypoint,
        began=info.start_time / 1000 if info.start_time else None,
        words=next(iter((info.message or "").splitlines()), ""),
    )


def _is_unknown(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and "status code 404" in str(error)


@contextmanager
def _client(cluster: Cluster) -> Iterator[Any]:
    """Ray's job client of this cluster; its errors inside the block become refusals."""
    # Ray prefers this variable to the address that it is given.
    before = os.environ.get("RAY_API_SERVER_ADDRESS")
    os.environ["RAY_API_SERVER_ADDRESS"] = cluster.url
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.WARNING)
    # Explicit, because Ray reads RAY_AUTH_MODE only when it is imported.
    headers = {"Authorization": f"Bearer {cluster.token}"} if cluster.token else {}
    try:
        yield JobSubmissionClient(cluster.url, headers=headers)
    except AuthenticationError as error:
        raise ConfigError(
            f"{cluster.url} no longer accepts the token.",
            "the token that this cluster was started with.",
            "run the command again.",
        ) from error
    except (requests.RequestException, ConnectionError) as error:
        raise _no_answer(cluster.url, error) from error
    except RuntimeError as error:
        if not _is_unknown(error):
            raise
        raise ConfigError(
            f"{cluster.url} knows no such job.",
            "the id of a job on this cluster; after a restart it has no jobs.",
            "see `arrowhead jobs list`.",
        ) from error
    finally:
        if before is None:
            del os.environ["RAY_API_SERVER_ADDRESS"]
        else:
            os.environ["RAY_API_SERVER_ADDRESS"] = before
