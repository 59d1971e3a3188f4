"""A real MLflow server from deploy/: PostgreSQL, logins, artifacts proxied by the server.

Commands of a team log at once and lose nothing, a stranger gets nothing, the UI opens.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytest

from arrowhead import ConfigError
from arrowhead.tracking.client import TrackingConfig
from arrowhead.tracking.run import start

pytestmark = [pytest.mark.services, pytest.mark.slow]
ADMIN = "admin", secrets.token_hex(12)
USER, PASSWORD = "arrowhead", secrets.token_hex(12)  # the login that deploy/README.md gives to jobs
ROOT = Path(__file__).resolve().parents[1]
POSTGRES_BIN = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """The address of a temporary PostgreSQL on loopback, with three databases.

    +psycopg2: SQLAlchemy's own choice for postgresql:// is psycopg 3, another package.
    """
    if not POSTGRES_BIN:
        pytest.skip("PostgreSQL is not on this machine (Debian: apt-get install postgresql)")
    import psycopg2

    port, password = free_port(), secrets.token_hex(12)
    # pytest's folder is closed to other users, and PostgreSQL refuses to run as root.
    folder = Path(tempfile.mkdtemp(prefix="arrowhead-postgres-"))
    user = ["runuser", "-u", "nobody", "--"] if os.geteuid() == 0 else []
    if user:
        shutil.chown(folder, "nobody")

    def run(program: str, *words: object) -> None:
        completed = subprocess.run(
            [*user, f"{POSTGRES_BIN}/{program}", *map(str, words)],
            cwd=folder,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        assert completed.returncode == 0, completed.stdout + completed.stderr

    (folder / "word").write_text(password)
    (folder / "word").chmod(0o644)
    data = folder / "data"
    try:
        auth_flags = ["--auth=scram-sha-256", "--username=postgres", f"--pwfile={folder}/word"]
        run("initdb", "-D", data, "--no-sync", *auth_flags)
        flags = f"-p {port} -c listen_addresses=127.0.0.1 -c fsync=off -k {folder}"
        run("pg_ctl", "-D", data, "-w", "-t", 120, "-l", folder / "log", "-o", flags, "start")
        try:
            connection = psycopg2.connect(
                host="127.0.0.1", port=port, user="postgres", password=password, dbname="postgres"
            )
            connection.autocommit = True
            connection.cursor().execute(f"CREATE ROLE mlflow LOGIN PASSWORD '{password}'")
            for name in ("mlflow", "logins", "fresh"):
                connection.cursor().execute(f"CREATE DATABASE {name} OWNER mlflow")
            connection.close()
            yield f"postgresql+psycopg2://mlflow:{password}@127.0.0.1:{port}"
        finally:
            run("pg_ctl", "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


@dataclass
class Server:
    """A running `mlflow server`: its address, its artifact store, its process, its log."""

    address: str
    artefacts: Path
    process: psutil.Process
    log: Path

    def ask(
        self, route: str, user: str = "", word: str = "", body: str | None = None
    ) -> tuple[int, str]:
        """Status and text of a GET, or of a POST when there is a JSON body."""
        request = urllib.request.Request(self.address + route, body and body.encode())
        request.add_header("Content-Type", "application/json")
        if user:
            token = base64.b64encode(f"{user}:{word}".encode()).decode()
            request.add_header("Authorization", f"Basic {token}")
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@pytest.fixture(scope="module")
def server(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("flask_wtf", reason="MLflow's logins need mlflow[auth]")
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    secrets_dir = folder / "secrets"
    secrets_dir.mkdir()
    password, _, directory = database.partition("//mlflow:")[2].partition("@")
    for name, content in {
        "postgres": password,
        "admin": ADMIN[1],
        "session": secrets.token_hex(16),
        "s3-id": "unused",
        "s3-key": "unused",
    }.items():
        (secrets_dir / name).write_text(f"{content}\n")
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SECRETS": str(secrets_dir),
        "TMPDIR": str(folder),
        "DATABASE": directory,
        "BUCKET": str(folder / "artefacts"),
        "HOSTS": f"127.0.0.1:{port}",
        "BIND": "127.0.0.1",
        "PORT": str(port),
        "WORKERS": "2",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # its job runner is not needed here
    }
    log = folder / "log"
    with log.open("wb") as log_file:
        process = subprocess.Popen(
            ["sh", ROOT / "deploy" / "mlflow-server.sh"],
            cwd=folder,
            env=os.environ | environment,
            stdout=log_file,
            stderr=log_file,
            start_new_session=True,
        )
    result = Server(
        f"http://127.0.0.1:{port}", folder / "artefacts", psutil.Process(process.pid), log
    )
    try:
        deadline = time.monotonic() + 240
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                if result.ask("/health")[0] == 200:
                    break
            except OSError:
                time.sleep(0.3)
        new = json.dumps({"username": USER, "password": PASSWORD})
        status, text = result.ask("/api/2.0/mlflow/users/create", *ADMIN, body=new)
        assert status == 200, text
        yield result
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Give MLflow's client a name and a password by environment variables, as a person would."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)


CLIENT = """
import sys, time
from pathlib import Path
from arrowhead.tracking.run import start
from arrowhead.tracking.client import TrackingConfig

address, mine, other = sys.argv[1:]
with start(TrackingConfig(tracking_uri=address, system_metrics=False), f"client-{mine}") as run:
    Path(f"ready-{mine}").touch()
    until = time.monotonic() + 200
    while not Path(f"ready-{other}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    run.params({"client": mine, "rate": 0.1})
    for step in range(40):
        run.record({"loss": float(mine) + 1 / (step + 1)}, step)
    artefact = Path(f"note-{mine}.txt")
    artefact.write_text(f"of client {mine}")
    run.log_artifact(artefact)
    print(run.run_id)
"""


@pytest.fixture(scope="module")
def logged(server: Server, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The ids of two runs that two processes logged at the same time."""
    folder = tmp_path_factory.mktemp("clients")
    credentials = {"MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD": PASSWORD}
    clients = [
        subprocess.Popen(
            [sys.executable, "-c", CLIENT, server.address, own_id, other_id],
            cwd=folder,
            env=os.environ | credentials,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for own_id, other_id in (("1", "2"), ("2", "1"))
    ]
    output = [client.communicate(timeout=300) for client in clients]
    assert [client.returncode for client in clients] == [0, 0], output
    assert not list(folder.glob(".arrowhead/unsent/*/writes.jsonl")), output
    return [out.split()[-1] for out, _ in output]


def test_concurrent_first_clients_create_the_schema_once(database, tmp_path):
    program = """
import sys
from arrowhead.tracking.run import start
from arrowhead.tracking.client import TrackingConfig
with start(TrackingConfig(tracking_uri=sys.argv[1], system_metrics=False), sys.argv[2]) as run:
    print(run.run_id)
"""
    commands = []
    for number in range(3):
        (tmp_path / str(number)).mkdir()  # its own lock, as on a machine of its own
        argv = [sys.executable, "-c", program, f"{database}/fresh", f"run-{number}"]
        environment = os.environ | {"TMPDIR": str(tmp_path / str(number))}
        out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        commands.append(subprocess.Popen(argv, cwd=tmp_path, env=environment, text=True, **out))
    output = [command.communicate(timeout=300)[0] for command in commands]
    assert [command.returncode for command in commands] == [0, 0, 0], output
    assert len(set(output)) == 3


def test_concurrent_clients_log_two_complete_runs(server, logged, login):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=server.address)
    spans = []
    for mine, run_id in zip(("1", "2"), logged, strict=True):
        run = client.get_run(run_id)
        assert run.info.status == "FINISHED"
        assert run.data.params == {"client": mine, "rate": "0.1"}
        points = client.get_metric_history(run_id, "loss")
        assert sorted((one.step, one.value) for one in points) == [
            (step, float(mine) + 1 / (step + 1)) for step in range(40)
        ]
        spans.append((run.info.start_time, run.info.end_time))
    assert max(began for began, _ in spans) < min(ended for _, ended in spans)


def test_artifacts_are_proxied_to_the_servers_artifact_store(server, logged, login):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=server.address)
    for mine, run_id in zip(("1", "2"), logged, strict=True):
        assert client.get_run(run_id).info.artifact_uri.startswith("mlflow-artifacts:/")
        got = Path(client.download_artifacts(run_id, f"note-{mine}.txt", "."))
        assert got.read_text() == f"of client {mine}"
        (kept,) = server.artefacts.rglob(f"{run_id}/artifacts/note-{mine}.txt")
        assert kept.read_text() == f"of client {mine}"


SEARCH = "/api/2.0/mlflow/experiments/search?max_results=5"


def test_request_with_a_wrong_password_is_refused(server, logged):
    for user, word in (("", ""), (USER, "guess"), ("someone", PASSWORD)):
        status, text = server.ask(SEARCH, user, word)
        assert status == 401
        assert "arrowhead" not in text
    assert server.ask(SEARCH, USER, PASSWORD)[0] == 200


def test_command_without_a_password_is_refused_before_any_work(server, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD", raising=False)
    away = TrackingConfig(tracking_uri=server.address, system_metrics=False)
    with pytest.raises(ConfigError, match=r"(?i)not authenticated"), start(away, "stranger"):
        pytest.fail("it began to work")


def test_server_and_database_listen_on_loopback_only(server, database):
    ports = {int(re.findall(r":(\d+)$", address)[0]) for address in (server.address, database)}
    heard = [
        one.laddr
        for one in psutil.net_connections("tcp")
        if one.status == psutil.CONN_LISTEN and one.laddr.port in ports
    ]
    assert {one.port for one in heard} == ports
    assert {one.ip for one in heard} == {"127.0.0.1"}


def test_no_password_appears_in_logs_or_process_arguments(server, database, logged):
    text = server.log.read_text()
    assert PASSWORD not in text
    assert ADMIN[1] not in text
    of_database = database.partition("//mlflow:")[2].partition("@")[0]
    assert of_database not in text
    words = [word for one in psutil.process_iter() for word in _command_line(one)]
    assert any("basic-auth" in word for word in words)
    assert not [word for word in words if ADMIN[1] in word or of_database in word]
    assert (server.log.parent / "auth.ini").stat().st_mode & 0o777 == 0o600


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_db_upgrade_of_a_current_schema_changes_nothing(server, database, logged):
    # `mlflow db upgrade` is the step that deploy/README.md gives for a new version, after a dump.
    def state() -> Any:
        import psycopg2

        address = database.replace("+psycopg2", "")
        with psycopg2.connect(f"{address}/mlflow") as line, line.cursor() as cursor:
            cursor.execute("SELECT version_num FROM alembic_version")
            version = cursor.fetchall()
            cursor.execute("SELECT count(*) FROM runs")
            return version, cursor.fetchone()

    before = state()
    words = [sys.executable, "-m", "mlflow", "db", "upgrade", f"{database}/mlflow"]
    completed = subprocess.run(words, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    assert state() == before


async def shown(profile: Path, door: str, page: str, words: list[str]) -> str:
    """The text of a page that a browser shows, once it holds all these words; or after a while.

    door: opened first, an address with name and password. Chromium then knows them; in the page's
    own address they would stop its requests.
    """
    import aiohttp

    until = time.monotonic() + 150
    port_file = profile / "DevToolsActivePort"
    while not (port_file.exists() and port_file.read_text().count("\n")):
        assert time.monotonic() < until, "the browser did not start"
        await asyncio.sleep(0.1)
    port = port_file.read_text().split()[0]
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            tabs = await answer.json(content_type=None)
        tab = next(one["webSocketDebuggerUrl"] for one in tabs if one["type"] == "page")
        async with session.ws_connect(tab, max_msg_size=0) as line:
            count = itertools.count(1)

            async def do(method: str, **params: Any) -> dict[str, Any]:
                number = next(count)
                await line.send_json({"id": number, "method": method, "params": params})
                while (result := await line.receive_json(timeout=120)).get("id") != number:
                    pass
                assert "error" not in result, result
                return dict(result["result"])

            text = ""
            for address, wanted in ((door, [version("mlflow")]), (page, words)):
                await do("Page.navigate", url=address)
                while not all(word in text for word in wanted) and time.monotonic() < until:
                    await asyncio.sleep(0.3)
                    request = await do("Runtime.evaluate", expression="document.body?.innerText")
                    text = request["result"].get("value") or ""
            picture = await do("Page.captureScreenshot", format="png")
            (profile.parent / "page.png").write_bytes(base64.b64decode(picture["data"]))
            return text


def test_ui_shows_the_experiment_and_its_runs(server, logged, tmp_path):
    if not CHROMIUM:
        pytest.skip("Chromium is not on this machine (Debian: apt-get install chromium)")
    status, text = server.ask(SEARCH, USER, PASSWORD)
    assert status == 200
    (number,) = [
        one["experiment_id"]
        for one in json.loads(text)["experiments"]
        if one["name"] == "arrowhead"
    ]
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    flags += " --disable-background-networking --disable-component-update --disable-dev-shm-usage"
    flags += " --remote-debugging-port=0 --window-size=1400,900"
    profile = tmp_path / "profile"
    browser = subprocess.Popen(
        [CHROMIUM, *flags.split(), f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        door = server.address.replace("//", f"//{USER}:{PASSWORD}@") + "/version"
        page = f"{server.address}/#/experiments/{number}/runs"
        words = ["arrowhead", "client-1", "client-2"]
        seen = asyncio.run(shown(profile, door, page, words))
    finally:
        os.killpg(browser.pid, signal.SIGKILL)
        browser.wait()
    assert [word for word in words if word not in seen] == [], seen
