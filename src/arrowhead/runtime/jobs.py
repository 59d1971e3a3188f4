"""A command onto a cluster: Ray Jobs, with a token, a small upload and the job's own exit code.

    words of a verb        as they would be typed here; `cli.cluster` has understood them
      -> reach             what answers at the address, whether it takes the token, its nodes
      -> standing          the folder the job will stand in: this one, if the cluster has it
      -> submit            the package's source and the TOML go up, never data
      -> follow            the job's lines as they come, then how it ended

Every call begins with one small request that may take ten seconds and no longer; Ray, whose client
waits for ever, is imported after that. A cluster that asks for no token is not sent one.
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
import signal
import tempfile
import threading
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

HERE = "http://127.0.0.1:8265"
LARGEST = 50_000_000  # bytes; the package is under 1 MB, so more is a mistake that Ray would carry
PATIENCE = 10.0  # seconds for one small request
STOP_SECONDS = 30  # from a job's SIGTERM to its SIGKILL: Ray's own 3 may not end an MLflow run
RETRIES = 5  # of a log that broke off, one second apart, then two, …
FINISHED = {"SUCCEEDED", "FAILED", "STOPPED"}

# What Ray writes into a job's log: its own INFO lines, and the command that the user has typed.
_NOISE = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}\s+INFO \w+\.py:\d+ -- |Running entrypoint for job "
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """Which cluster."""

    address: str | None = None
    """Its job server, http(s)://HOST:PORT. Default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or
    http://127.0.0.1:8265."""
    insecure: bool = False
    """Go on where others can listen or take part: plain http to another machine (the token would
    travel readable), or another machine's cluster that asks for no token."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A job server that answered; token: None where it asks for none; nodes: IP address and
    resources of each that is alive.
    """

    url: str
    token: str | None = field(repr=False)
    nodes: tuple[tuple[str, dict[str, float]], ...]

    @property
    def here(self) -> bool:
        """Whether every node is this machine, so that its paths are ours. An address on loopback
        alone does not say so: it may be the end of a tunnel.
        """
        import psutil

        own = {one.address for card in psutil.net_if_addrs().values() for one in card}
        return bool(self.nodes) and all(address in own for address, _ in self.nodes)

    @property
    def units(self) -> int:
        """Workers that it has room for: one per GPU, or per CPU where it has no GPU; at least 1."""
        total = {
            kind: sum(int(has.get(kind, 0)) for _, has in self.nodes) for kind in ("GPU", "CPU")
        }
        return max(1, total["GPU"] or total["CPU"])


@dataclass(frozen=True, slots=True)
class Job:
    """One job: its id, Ray's word for its state, exit code (None until there is one), the command,
    when it began (seconds since 1970) and, where Ray lost it, what Ray says.
    """

    job_id: str
    status: str
    exit_code: int | None
    command: str
    began: float | None
    words: str = ""


# -------------------------------------------------------------------------- the address


def connect(config: ClusterConfig) -> Cluster:
    """The cluster at the address, asked for its nodes. Raises ConfigError if nothing answers there,
    if it does not take the token, or if others could read it.
    """
    url = _url(config)
    near = _is_near(url)
    if url.startswith("http:") and not near and not config.insecure:
        raise ConfigError(
            f"{url} is plain http to another machine: who is on the way could read the token.",
            "https, or a tunnel that ends on this machine.",
            "ssh -L 8265:127.0.0.1:8265 HOST (or kubectl port-forward) and"
            f" --address {HERE}; or, where you trust the network, --insecure.",
        )
    token = None
    status, body = _get(url, None)
    if status in (401, 403):
        token, source = _token(url)
        status, body = _get(url, token)
        if status in (401, 403):
            raise ConfigError(
                f"{url} does not accept the token from {source}.",
                "the token that this cluster was started with.",
                f"copy it from its head node (`ray get-auth-token` there) to {token_file()}, mode"
                " 0600, or set RAY_AUTH_TOKEN_PATH.",
            )
    elif status == 200 and not near and not config.insecure:
        raise ConfigError(
            f"{url} asks for no token: whoever reaches it runs code there.",
            "a cluster with token authentication.",
            "start it with RAY_AUTH_MODE=token; to use it as it is, --insecure.",
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
            f"What answers at {url} is no Ray job server ({error}).",
            "the address of a Ray dashboard, whose port is 8265 unless it was moved.",
            f"check the address; {HERE} is that of `cluster/local.sh up`.",
        ) from error
    return Cluster(url, token, nodes)


def _url(config: ClusterConfig) -> str:
    named = {name: os.environ.get(name) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")}
    given = {"--address": config.address} | named
    name, address = next(((k, v) for k, v in given.items() if v and v != "auto"), ("", HERE))
    gcs = name == "RAY_ADDRESS" and "://" not in address
    parts = urlsplit(address if "://" in address else f"http://{address}")
    try:
        fits = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 80)
    except ValueError:
        fits = False
    if gcs or not fits or parts.username or parts.query:
        raise ConfigError(
            f"{name} is {address if '@' not in address else 'an address with a name in it'}.",
            "the address of a job server: http://HOST:8265 or https://HOST.",
            f"give e.g. --address {HERE}.",
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def _is_near(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _get(url: str, token: str | None) -> tuple[int, bytes]:
    """Status and body of the list of nodes; ConfigError where nothing answers."""
    import requests  # Ray's client uses it too: proxies and certificates are the same

    try:
        answer = requests.get(
            f"{url}/api/v0/nodes?limit=10000",
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=PATIENCE,
            allow_redirects=False,  # a token goes where it was meant to go
        )
    except requests.RequestException as error:
        raise _silent(url, error) from error
    return answer.status_code, answer.content


def _silent(url: str, error: Exception) -> ConfigError:
    why = "it did not answer in time" if "timed out" in str(error) else "nothing listens there"
    if "certificate" in str(error).lower():
        why = "its certificate is not trusted here (REQUESTS_CA_BUNDLE)"
    return ConfigError(
        f"No Ray job server answers at {url}: {why}.",
        "the address of a running cluster's dashboard.",
        "start one on this machine with `cluster/local.sh up`, or give --address.",
    )


def _token(url: str) -> tuple[str, str]:
    """The token, and where it was found: where Ray looks, in Ray's order."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token, "RAY_AUTH_TOKEN"
    path = token_file()
    try:
        token = path.read_text().strip()
    except OSError:
        token = ""
    if not token:
        raise ConfigError(
            f"{url} asks for a token and there is none here.",
            f"the cluster's token in RAY_AUTH_TOKEN, or in a file: RAY_AUTH_TOKEN_PATH names it,"
            f" else {Path.home() / '.ray' / 'auth_token'}.",
            f"copy it from the head node (`ray get-auth-token` there) to {path}, mode 0600.",
        )
    return token, str(path)


# --------------------------------------------------------------------------- the folder


def standing(cluster: Cluster, shared: list[Path], places: list[str]) -> Path | None:
    """The folder that the job stands in, so that relative paths mean there what they mean here;
    None if the cluster does not have it and nothing needs it.

    shared: folders that every node has under the same path. places: files and folders that the
    verb will read or write. Raises ConfigError for one that the cluster does not have.
    """
    if not cluster.nodes:
        raise ConfigError(
            f"The cluster at {cluster.url} has no node yet.",
            "a head node that is up.",
            "wait a little and submit again.",
        )
    here = Path.cwd()
    if cluster.here:
        return here
    folders = [Path(os.path.normpath(here / folder)) for folder in shared]
    # cwd is a physical path; --shared may name a link to where we are.
    real = ((folder, folder.resolve()) for folder in folders)
    stand = next((f / here.relative_to(r) for f, r in real if here.is_relative_to(r)), None)
    for place in places:
        path = Path(os.path.normpath((stand or here) / place))
        if not any(path.is_relative_to(folder) for folder in folders):
            raise ConfigError(
                f"{path} is on this machine; {cluster.url} is a cluster of other machines"
                f" ({', '.join(sorted({address for address, _ in cluster.nodes})[:3])}).",
                "addresses (s3://…, gs://…), or paths below a folder that every node has.",
                "copy it to such a place; if the nodes have this folder under the same path, say"
                f" --shared {path.parent}.",
            )
        if stand is None and not Path(place).is_absolute():
            raise ConfigError(
                f"{place} is relative to {here}, which the cluster does not have.",
                "an absolute path, or a command from below --shared.",
                f"give {path}.",
            )
    return stand


def must_be_there(
    cluster: Cluster, shared: list[Path], stand: Path | None, inputs: list[str]
) -> None:
    """Refuse, before anything is sent, what the verb is to read and is not there.

    Only where this machine sees what the cluster will see: its own disk, or a shared folder that it
    has. stand: as `standing` gives it.
    """
    here = Path.cwd()
    folders = [Path(os.path.normpath(here / folder)) for folder in shared]
    for place in inputs:
        path = Path(os.path.normpath((stand or here) / place))
        seen = cluster.here or any(path.is_relative_to(f) and f.is_dir() for f in folders)
        if seen and not os.path.lexists(path):
            raise ConfigError(
                f"{path} is not there.",
                "a file or folder to read.",
                f"check the path; relative ones begin at {stand or here}.",
            )


# ------------------------------------------------------------------------------ the job


def submit(
    cluster: Cluster,
    words: list[str],
    *,
    folder: Path | None,
    config: Path | None = None,
    variables: dict[str, str] | None = None,
    need: str | None = None,
) -> tuple[str, int]:
    """Start `arrowhead WORDS` on the head node; the job's id and the bytes that were sent.

    folder: where it stands; None: in a folder of Ray's, gone afterwards. config: a TOML file, sent
    along. variables: environment of the job; whoever may list jobs sees it. need: a variable that
    the head node must have set, or the job ends with exit code 2.
    """
    toml = ""
    if config is not None:  # it lies where the job begins: in Ray's copy of what was sent
        toml = f'--config "${"OLDPWD" if folder else "PWD"}"{shlex.quote(f"/{config.name}")} '
    # -P: what lies in the folder is not imported.
    line = f"exec python -P -m arrowhead {toml}{shlex.join(words)}"
    if folder is not None:
        line = f"cd {shlex.quote(str(folder))} && {line}"
    if need is not None:  # ${NAME:?words} would end bash, which /bin/sh may be, with 127
        words_of_it = f"arrowhead: {need} is not set on the head node: set it, or give the flag"
        line = (
            f'[ -n "${{{need}:-}}" ] || {{ echo {shlex.quote(words_of_it)} >&2; exit 2; }}; {line}'
        )
    with tempfile.TemporaryDirectory(prefix="arrowhead-job-") as draft:
        size = _pack(Path(draft), config)
        with _client(cluster) as client:
            patience = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}
            runtime = {"working_dir": draft, "env_vars": patience | (variables or {})}
            job_id = client.submit_job(entrypoint=line, runtime_env=runtime)
    return str(job_id), size


def _pack(folder: Path, config: Path | None) -> int:
    """Fill the folder that is sent: our source, the TOML, nothing else. Its bytes."""
    source = Path(arrowhead.__file__).parent
    files = {path: f"arrowhead/{path.relative_to(source)}" for path in sorted(source.rglob("*.py"))}
    files[source / "py.typed"] = "arrowhead/py.typed"
    if config is not None:
        files[config] = config.name
    size = sum(path.stat().st_size for path in files)
    if size > LARGEST:
        largest = max(files, key=lambda path: path.stat().st_size)
        raise ConfigError(
            f"{size / 1e6:.0f} MB would be sent to the cluster, most of it {largest}.",
            f"{LARGEST / 1e6:.0f} MB at most: every node keeps a copy for every job.",
            "keep data in a place that the cluster reads (s3://…, a shared folder) and name it.",
        )
    for path, name in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    return size


def look(cluster: Cluster, job_id: str) -> Job:
    """How a job is doing. Raises ConfigError for a job that the cluster does not know."""
    with _client(cluster) as client:
        return _job(client.get_job_info(job_id))


def listed(cluster: Cluster) -> list[Job]:
    """The jobs that the cluster knows, oldest first."""
    with _client(cluster) as client:
        jobs = [_job(info) for info in client.list_jobs() if info.submission_id]
    return sorted(jobs, key=lambda job: job.began or 0)


def stop(cluster: Cluster, job_id: str) -> bool:
    """Ask a job to end; whether it was running."""
    with _client(cluster) as client:
        return bool(client.stop_job(job_id))


def logs(cluster: Cluster, job_id: str) -> list[str]:
    """What a job has written so far, line by line, without Ray's own lines."""
    with _client(cluster) as client:
        written = client.get_job_logs(job_id).splitlines()
    return [line for line in written if not _NOISE.match(line)]


def follow(cluster: Cluster, job_id: str, say: Callable[[str], None]) -> Job:
    """Say every line of a job's log as it comes, until it ends; how it ended.

    Raises LostError when the cluster is not there any more, or when Ray lost the job.
    """
    said = 0  # characters; a log that broke off is told from its beginning again
    with _client(cluster) as client, _interrupts() as look:

        async def tell() -> None:
            nonlocal said
            seen, rest = 0, ""
            async for text in client.tail_job_logs(job_id):
                look()
                seen += len(text)
                if seen <= said:
                    continue
                fresh = text[len(text) - (seen - said) :]
                *lines, rest = (rest + fresh).split("\n")
                for line in lines:
                    if not _NOISE.match(line):
                        say(line)
                said = seen - len(rest)
            if rest:
                say(rest)

        for attempt in range(RETRIES + 1):
            try:
                asyncio.run(tell())
                look()
                while (job := _job(client.get_job_info(job_id))).status not in FINISHED:
                    time.sleep(0.5)
                break
            except Exception as error:  # of aiohttp, requests and Ray, according to the moment
                if _is_unknown(error):
                    raise
                if attempt == RETRIES:
                    raise LostError(
                        f"{cluster.url} answers no more; job {job_id} may go on.",
                        "a way to the cluster that stays open.",
                        f"when it answers again: arrowhead jobs logs {job_id} --follow",
                    ) from error
                time.sleep(attempt + 1)
    if job.status == "FAILED" and job.exit_code is None:
        raise LostError(
            f"Ray lost job {job_id}: {job.words}",
            "a job that runs to its own end; what it had finished is kept.",
            "submit the same command again: it goes on where it stopped.",
        )
    return job


@contextmanager
def _interrupts() -> Iterator[Callable[[], None]]:
    """Ctrl-C or SIGTERM is an interrupt at once inside this block, or at the next call of what it
    gives.

    asyncio's own way cancels the task, and libraries that wait for a connection may lose that.
    """
    pressed: list[int] = []

    def press(number: int, frame: Any) -> None:
        pressed.append(number)
        raise KeyboardInterrupt

    def look() -> None:
        if pressed:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # signals are the main one's
        yield look
        return
    before = {one: signal.signal(one, press) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield look
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _job(info: Any) -> Job:
    status, code = str(info.status), info.driver_exit_code
    if status == "STOPPED":
        code = 130
    elif status not in FINISHED:
        code = None
    elif code is not None and code < 0:  # by a signal: as a shell says it
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
    """Ray's client of this cluster; what it raises inside comes out in three parts."""
    # Its variables beat the address it is given.
    before = os.environ.get("RAY_API_SERVER_ADDRESS")
    os.environ["RAY_API_SERVER_ADDRESS"] = cluster.url
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.WARNING)
    # Said outright: RAY_AUTH_MODE would have to be in the environment before ray was imported.
    headers = {"Authorization": f"Bearer {cluster.token}"} if cluster.token else {}
    try:
        yield JobSubmissionClient(cluster.url, headers=headers)
    except AuthenticationError as error:
        raise ConfigError(
            f"{cluster.url} takes the token no more.",
            "the token that this cluster was started with.",
            "run the command again.",
        ) from error
    except (requests.RequestException, ConnectionError) as error:
        raise _silent(cluster.url, error) from error
    except RuntimeError as error:
        if not _is_unknown(error):
            raise
        raise ConfigError(
            f"{cluster.url} knows no such job.",
            "the id of a job of this cluster; a cluster that was started anew has none.",
            "see `arrowhead jobs list`.",
        ) from error
    finally:
        if before is None:
            del os.environ["RAY_API_SERVER_ADDRESS"]
        else:
            os.environ["RAY_API_SERVER_ADDRESS"] = before
