"""Submitting a command to a cluster: what is refused, what is sent, what comes back.

`cluster/local.sh` starts the cluster with a home folder of its own; the last test stops it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

import arrowhead
from arrowhead import ConfigError
from arrowhead.cli import cluster as cli_cluster
from arrowhead.cli.main import main
from arrowhead.runtime import jobs, meters
from arrowhead.runtime.jobs import Cluster, ClusterConfig

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "jobs").glob("*.toml"))
SMALL = ["--body", "resnet18", "--weights", "random", "--size", "32"]
REMOTE_CLUSTER = Cluster(
    "http://10.9.9.9:8265", None, (("10.9.9.9", {"CPU": 4.0}), ("10.9.9.8", {}))
)
TRAIN_COMMAND = ["train", "store", "bundle"]


@pytest.fixture(autouse=True)
def _no_address_in_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must be refused; return its message on one line."""

    def command(*words: object) -> str:
        with pytest.raises(SystemExit) as exit_info:
            main([str(word) for word in words])
        output = capsys.readouterr().err
        assert exit_info.value.code == 2, output
        assert "  wanted  " in output
        assert "  do      " in output
        return " ".join(output.split())

    return command


# ------------------------------------------------------------------ refused before connecting


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "store", "bundle", "--epoch", "3"], "Did you mean --epochs?"),
        (["trian", "store", "bundle"], 'Did you mean "train"?'),
        (["train", "store"], "--bundle"),
        (["train", "store", "bundle", "--rate", "-1"], "--rate"),
        (["demo"], "`demo` does not run on a cluster"),
        (["submit", "--", "train", "store", "bundle"], "`submit` does not run on a cluster"),
        (["jobs", "list"], "`jobs` does not run on a cluster"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_typo_is_refused_before_contacting_a_cluster(refused, words, said):
    assert said in refused("submit", "--address", "http://127.0.0.1:9", "--", *words)


def test_unreachable_address_is_refused_with_how_to_start_a_cluster(refused):
    output = refused("submit", "--address", "http://127.0.0.1:9", "--", *TRAIN_COMMAND)
    assert "No Ray job server answers at http://127.0.0.1:9" in output
    assert "cluster/local.sh up" in output


def test_token_is_not_sent_unencrypted_to_another_machine_by_default(refused):
    for address in ("http://10.9.9.9:8265", "10.9.9.9:8265"):
        output = refused("jobs", "list", "--address", address)
        assert "could read the token" in output
        assert "--insecure" in output


@pytest.mark.parametrize(
    "address", ["ftp://x", "http://", "http://me:secret@host", "http://h:port"]
)
def test_invalid_job_server_address_is_refused(refused, address):
    output = refused("jobs", "list", "--address", address)
    assert "--address is" in output
    assert "secret" not in output


def test_gcs_address_in_the_environment_is_not_used_as_a_job_server(refused, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.9.9.9:6379")
    assert "RAY_ADDRESS is 10.9.9.9:6379" in refused("jobs", "list")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    assert "answers at http://127.0.0.1:9" in refused("jobs", "list")


def test_server_other_than_ray_is_refused(refused, tmp_path):
    server = subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        port = re.search(r"port (\d+)", server.stdout.readline())[1]
        output = refused("jobs", "list", "--address", f"http://127.0.0.1:{port}")
        assert "is no Ray job server (HTTP 404)" in output
    finally:
        server.kill()
        server.wait()


def test_command_with_another_cluster_address_is_refused():
    call = cli_cluster.parse_command(
        ["train", "s", "b", "--workers", "1", "--address", "10.0.0.1:6379"]
    )
    with pytest.raises(ConfigError, match=r"--address 10\.0\.0\.1"):
        cli_cluster._with_workers(call, 4)


# ------------------------------------------------------------------- folders of the cluster


def test_local_paths_are_refused_for_a_remote_cluster(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"{tmp_path}/photos is on this machine") as error_info:
        jobs.job_folder(REMOTE_CLUSTER, [], ["photos"])
    assert f"--shared {tmp_path}" in error_info.value.do
    # Addresses only: no local process is needed.
    assert jobs.job_folder(REMOTE_CLUSTER, [], []) is None
    assert jobs.job_folder(REMOTE_CLUSTER, [tmp_path], ["photos", f"{tmp_path}/out"]) == tmp_path
    with pytest.raises(ConfigError, match=r"\.\./photos|photos is on this machine"):
        jobs.job_folder(REMOTE_CLUSTER, [tmp_path], ["../photos"])


def test_only_absolute_paths_refer_to_a_shared_folder_from_outside(tmp_path, monkeypatch):
    (tmp_path / "shared").mkdir()
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    shared = [tmp_path / "shared"]
    assert jobs.job_folder(REMOTE_CLUSTER, shared, [f"{tmp_path}/shared/photos"]) is None
    with pytest.raises(ConfigError, match="is relative to") as error_info:
        jobs.job_folder(REMOTE_CLUSTER, shared, ["../shared/photos"])
    assert error_info.value.do == f"give {tmp_path}/shared/photos."


def test_shared_folder_may_be_a_link_to_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "disk" / "mine").mkdir(parents=True)
    (tmp_path / "shared").symlink_to("disk")
    monkeypatch.chdir(tmp_path / "shared" / "mine")
    assert (
        jobs.job_folder(REMOTE_CLUSTER, [tmp_path / "shared"], ["out"])
        == tmp_path / "shared" / "mine"
    )


def test_tunnel_to_a_remote_cluster_is_not_taken_for_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tunnel = Cluster("http://127.0.0.1:8265", None, REMOTE_CLUSTER.nodes)
    with pytest.raises(ConfigError, match="is on this machine"):
        jobs.job_folder(tunnel, [], ["photos"])


@pytest.mark.parametrize(
    ("words", "places"),
    [
        (["fit", "s3://b/photos", "out"], ["out"]),
        (["fit", "t.csv", "out", "--images", "photos"], ["t.csv", "out", "photos"]),
        (["fit", "file:///photos", "out", "--weights", "w.pth"], ["/photos", "out", "w.pth"]),
        (["score", "models:/dogs@champion", "gs://b/new", "out", "--store", "s"], ["out", "s"]),
        (["evaluate", "out/bundle", "t.csv", "--store", "s"], ["out/bundle", "t.csv", "s"]),
        (["train", "s", "b", "--tracking-uri", "sqlite:///m.db"], ["s", "b", "m.db"]),
        (["train", "s", "b", "--tracking-uri", "https://mlflow.example"], ["s", "b"]),
        (["features", "verify", "s"], ["s"]),
        (["bundle", "register", "b", "dogs", "--tracking-uri", "http://m:1"], ["b"]),
        (["doctor"], []),
    ],
    ids=lambda value: " ".join(value),
)
def test_every_path_argument_of_a_command_is_known(monkeypatch, words, places):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert sorted(cli_cluster._requirements(cli_cluster.parse_command(words)).paths) == sorted(
        places
    )


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("postgresql://me:secret@db/mlflow", "holds a password"),
        ("postgresql://db/mlflow?user=me&password=secret", "holds a password"),
        ("postgresql://db/mlflow?password=${DB_SECRET}", "holds a variable"),
        ("http://${USER_SECRET}@mlflow:5000", "holds a variable"),
        ("http://mlflow:5000/$SECRET", "holds a variable"),
    ],
)
@pytest.mark.parametrize("by", ["environment", "flag"])
def test_secrets_of_the_mlflow_address_are_not_sent(monkeypatch, uri, said, by):
    flag = []
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if by == "environment":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    else:
        flag = ["--tracking-uri", uri]
    with pytest.raises(ConfigError, match=said) as error_info:
        cli_cluster._requirements(cli_cluster.parse_command([*TRAIN_COMMAND, *flag]))
    assert "secret" not in str(error_info.value).lower()


def test_stopped_job_has_time_to_end_its_mlflow_run(monkeypatch):
    from ray.dashboard.modules.job import job_supervisor

    sent: dict[str, Any] = {}

    class Client:
        def submit_job(self, entrypoint: str, runtime_env: dict[str, Any]) -> str:
            sent.update(runtime_env["env_vars"])
            return "raysubmit_1"

    monkeypatch.setattr(jobs, "_client", lambda cluster: contextlib.nullcontext(Client()))
    jobs.submit(
        REMOTE_CLUSTER, ["doctor"], folder=None, env_vars={"MLFLOW_TRACKING_URI": "sqlite://"}
    )
    assert sent == {"RAY_JOB_STOP_WAIT_TIME_S": "30", "MLFLOW_TRACKING_URI": "sqlite://"}
    read = Path(job_supervisor.__file__).read_text()
    assert '"RAY_JOB_STOP_WAIT_TIME_S"' in read


def test_mlflow_address_is_passed_to_the_job(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert cli_cluster._requirements(cli_cluster.parse_command(TRAIN_COMMAND)).env_vars == {
        "MLFLOW_TRACKING_URI": "http://mlflow:5000"
    }


@pytest.mark.parametrize(
    ("words", "inputs"),
    [
        (["fit", "photos", "out"], ["photos"]),
        (["precompute", "t.csv", "s", "--images", "photos"], ["photos", "t.csv"]),
        (["train", "s", "b"], ["s"]),
        (["score", "b", "new", "out", "--store", "s"], ["b", "new", "s"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_inputs_of_a_command_must_exist_before_submitting(tmp_path, monkeypatch, words, inputs):
    monkeypatch.chdir(tmp_path)
    required = cli_cluster._requirements(cli_cluster.parse_command(words)).inputs
    assert sorted(required) == inputs
    own = Cluster("http://127.0.0.1:8265", None, (("127.0.0.1", {"CPU": 2.0}),))
    for missing in inputs:
        for name in inputs:
            (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / missing).rmdir()
        with pytest.raises(ConfigError, match=f"{tmp_path}/{missing} does not exist"):
            jobs.check_inputs(own, [], tmp_path, required)
        with pytest.raises(ConfigError, match="does not exist"):
            jobs.check_inputs(REMOTE_CLUSTER, [tmp_path], tmp_path, required)
        jobs.check_inputs(REMOTE_CLUSTER, [], None, required)  # remote files cannot be checked
        (tmp_path / missing).mkdir()
        jobs.check_inputs(own, [], tmp_path, required)


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_variable_missing_on_the_head_node_gives_exit_code_2(shell, monkeypatch):
    """In any shell of the head node."""
    sent = []

    class Client:
        def submit_job(self, entrypoint: str, runtime_env: dict[str, Any]) -> str:
            sent.append(entrypoint)
            return "raysubmit_1"

    monkeypatch.setattr(jobs, "_client", lambda cluster: contextlib.nullcontext(Client()))
    jobs.submit(REMOTE_CLUSTER, ["doctor"], folder=None, required_variable="MLFLOW_TRACKING_URI")
    bare = {"PATH": os.environ["PATH"]}
    completed = subprocess.run([shell, "-c", sent[0]], env=bare, capture_output=True, text=True)
    assert completed.returncode == 2
    assert completed.stderr.startswith("arrowhead: MLFLOW_TRACKING_URI is not set on the head node")
    remote_env = bare | {"MLFLOW_TRACKING_URI": "http://mlflow:5000"}
    script = sent[0].replace("exec python", "echo")
    completed = subprocess.run(
        [shell, "-c", script], env=remote_env, capture_output=True, text=True
    )
    assert completed.stdout.strip().endswith("-m arrowhead doctor")


# ------------------------------------------------------------------------- uploads


@pytest.mark.parametrize(
    ("words", "workers"),
    [
        (["precompute", "d", "s"], "1:4"),
        (["fit", "d", "o"], "1:4"),
        (["score", "b", "i", "o"], "1:4"),
        (["train", "s", "b"], "1"),
        (["lr-find", "s"], "1"),
    ],
    ids=lambda value: value[0],
)
def test_command_gets_all_cluster_workers_by_default(tmp_path, words, workers):
    request = cli_cluster._with_workers(
        cli_cluster.parse_command(words), REMOTE_CLUSTER.worker_capacity
    )
    assert request == [words[0], "--workers", workers, *words[1:]]
    assert cli_cluster.parse_command(request).arguments["launch"].workers == (
        workers if ":" in workers else 1
    )
    for own in (["--workers", "0"], ["--workers=2"]):
        call = cli_cluster.parse_command([*words, *own])
        assert cli_cluster._with_workers(call, REMOTE_CLUSTER.worker_capacity) == [*words, *own]
    toml = tmp_path / "own.toml"
    toml.write_text(f"[{words[0]}]\nworkers = 3\n")
    call = cli_cluster.parse_command([*words, "--config", str(toml)])
    assert cli_cluster._with_workers(call, REMOTE_CLUSTER.worker_capacity) == words
    for fewer in (["export", "b", "o.onnx"], ["doctor"]):
        assert (
            cli_cluster._with_workers(
                cli_cluster.parse_command(fewer), REMOTE_CLUSTER.worker_capacity
            )
            == fewer
        )


def test_workers_are_counted_by_gpus_if_there_are_any():
    nodes = (("a", {"CPU": 16.0}), ("b", {"CPU": 16.0, "GPU": 4.0}), ("c", {"GPU": 4.0}))
    assert Cluster("", None, nodes).worker_capacity == 8
    assert Cluster("", None, (("a", {}),)).worker_capacity == 1


def test_only_source_and_toml_are_uploaded(tmp_path):
    toml = tmp_path / "mine.toml"
    toml.write_text("[train]\nepochs = 1\n")
    draft = tmp_path / "draft"
    draft.mkdir()
    size = jobs._copy_source(draft, toml)
    sent = {str(path.relative_to(draft)) for path in draft.rglob("*") if path.is_file()}
    package = Path(arrowhead.__file__).parent
    source = {f"arrowhead/{path.relative_to(package)}" for path in package.rglob("*.py")}
    pages = {
        f"arrowhead/{p.relative_to(package)}" for p in (package / "examine/templates").iterdir()
    }
    table = "arrowhead/features/body_table.json"
    assert sent == source | pages | {table, "arrowhead/py.typed", "mine.toml"}
    assert size == sum((draft / name).stat().st_size for name in sent) < 3_000_000


def test_oversized_upload_is_refused_with_its_reason(tmp_path):
    toml = tmp_path / "huge.toml"
    with toml.open("wb") as file:
        file.truncate(60_000_000)
    with pytest.raises(ConfigError, match=r"6\d MB would be sent .*huge.toml") as error_info:
        jobs._copy_source(tmp_path, toml)
    assert "50 MB at most" in error_info.value.wanted


# ------------------------------------------------------------------------------ recipes


def header(recipe: Path) -> dict[str, str]:
    """The run, on and expect entries in the first lines of a recipe."""
    lines = re.findall(r"^# +(\w+) {2,}(.*(?:\n#  .*)*)", recipe.read_text(), re.MULTILINE)
    return {name: " ".join(words.replace("\n#", " ").split()) for name, words in lines}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_header_states_command_cluster_and_result(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    output = header(recipe)
    assert list(output) == ["run", "on", "expect"]
    program, submit, dashes, verb, *rest = shlex.split(output["run"])
    assert (program, submit, dashes, verb) == (
        "arrowhead",
        "submit",
        "--",
        recipe.stem.replace("_", "-"),
    )
    call = cli_cluster.parse_command([verb, *rest])
    assert call.config == recipe.relative_to(ROOT)
    script = recipe.with_suffix(".py").read_text()
    assert f'main(["{verb}", *sys.argv[1:]])' in script


def test_every_command_with_workers_or_a_bundle_has_a_job_script():
    scripts = {path.stem for path in (ROOT / "jobs").glob("*.py")}
    assert scripts == {"precompute", "lr_find", "train", "score", "evaluate", "fit", "export"}
    assert scripts == {path.stem for path in RECIPES}


# --------------------------------------------------------------------------- a real cluster


@dataclass
class LocalCluster:
    """A running cluster of `cluster/local.sh`, and commands that use it."""

    home: Path
    port: int
    env: dict[str, str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def token(self) -> str:
        return (self.home / ".ray" / "auth_token").read_text()

    def script(self, *words: str, code: int = 0) -> str:
        """Run local.sh; return its output."""
        completed = subprocess.run(
            [ROOT / "cluster" / "local.sh", *words],
            env=self.env,
            text=True,
            capture_output=True,
            timeout=300,
        )
        assert completed.returncode == code, completed.stdout + completed.stderr
        return completed.stdout + completed.stderr

    def start(self, *words: object, **more: str) -> subprocess.Popen[str]:
        """Start an arrowhead command for this cluster in its own process."""
        return subprocess.Popen(
            [sys.executable, "-m", "arrowhead", *map(str, words)],
            cwd=self.home,
            env=self.env | {"RAY_API_SERVER_ADDRESS": self.url} | more,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, *words: object, code: int = 0, **more: str) -> tuple[str, str]:
        """Standard output and error of such a command."""
        process = self.start(*words, **more)
        out, err = process.communicate(timeout=500)
        assert process.returncode == code, out + err
        return out, err

    def processes(self) -> list[psutil.Process]:
        """Running processes of the cluster, however they were started: those whose command line,
        environment or open files name its home or its session.
        """
        folders = (str(self.home), *(str(path) for path in self.sessions))
        result = []
        for process in psutil.process_iter():
            try:
                strings = [*process.cmdline(), process.cwd(), *process.environ().values()]
                strings += [file.path for file in process.open_files()]
            except psutil.Error:
                continue
            if process.pid != os.getpid() and any(f in one for f in folders for one in strings):
                result.append(process)
        return result

    @property
    def sessions(self) -> list[Path]:
        file = self.home / "state" / "arrowhead" / "cluster" / "session"
        return [Path(file.read_text().strip())] if file.exists() else []


@pytest.fixture(scope="module")
def local_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A head node and a worker node, with token authentication."""
    home = tmp_path_factory.mktemp("home")
    ports = []
    with socket.socket() as first, socket.socket() as second, socket.socket() as third:
        for probe in (first, second, third):
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_TRACKING"))}
    env |= {
        "HOME": str(home),
        "XDG_STATE_HOME": str(home / "state"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
        **dict(zip(("PORT", "GCS_PORT", "CLIENT_PORT"), map(str, ports), strict=True)),
    }
    cluster = LocalCluster(home, ports[0], env)
    assert "arrowhead submit --address" in cluster.script("up", "1")
    yield cluster
    cluster.script("down")


def post(host: str, port: int, path: str, token: str | None) -> int:
    """HTTP status of an attempt to run a command."""
    connection = http.client.HTTPConnection(host, port, timeout=30)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    connection.request("POST", path, json.dumps({"entrypoint": "true"}), headers)
    status = connection.getresponse().status
    connection.close()
    return status


@pytest.mark.slow
def test_local_cluster_starts_once_and_reports_it(local_cluster):
    assert "it is already up" in local_cluster.script("up", "1")
    assert "Active:" in local_cluster.script("status")
    taken = local_cluster.env | {"XDG_STATE_HOME": str(local_cluster.home / "other")}
    output = LocalCluster(local_cluster.home, local_cluster.port, taken).script("up", "1", code=2)
    assert f"port {local_cluster.port} is taken" in output
    assert not (local_cluster.home / "other").exists()


@pytest.mark.slow
def test_requests_without_token_cannot_run_anything(local_cluster):
    assert (local_cluster.home / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
    assert post("127.0.0.1", local_cluster.port, "/api/jobs/", None) == 401
    assert post("127.0.0.1", local_cluster.port, "/api/jobs/", "0" * 64) == 403
    listening = [
        (line.laddr, process)
        for process in local_cluster.processes()
        for line in process.net_connections("tcp")
        if line.status == psutil.CONN_LISTEN
    ]
    assert {place.ip for place, _ in listening if place.port == local_cluster.port} == {"127.0.0.1"}
    # Agents of nodes start jobs, too, and Ray lets them listen on the machine's own address.
    agents = [place for place, process in listening if "Agent" in "".join(process.cmdline())]
    answers = set()
    for folder in agents:
        try:
            host = folder.ip if folder.ip not in ("0.0.0.0", "::") else "127.0.0.1"
            answers.add(post(host, folder.port, "/api/job_agent/jobs/", None))
        except (OSError, http.client.HTTPException):  # gRPC
            continue
    assert 401 in answers
    assert answers <= {401, 404, 405}  # the metrics server accepts no POST


@pytest.mark.slow
def test_submit_without_token_is_refused_with_where_to_put_it(local_cluster, tmp_path):
    arguments = ["submit", "--", *TRAIN_COMMAND]
    _, err = local_cluster.run(*arguments, code=2, HOME=str(tmp_path))
    assert "asks for a token, and this machine has none" in err
    assert "RAY_AUTH_TOKEN_PATH" in err
    assert f"{tmp_path}/.ray/auth_token" in err
    _, err = local_cluster.run(*arguments, code=2, HOME=str(tmp_path), RAY_AUTH_TOKEN="wrong")
    assert "does not accept the token from RAY_AUTH_TOKEN" in err
    assert "wrong" not in err


@pytest.fixture(scope="module")
def extracted(local_cluster: LocalCluster, image_folder: Path) -> tuple[dict[str, Any], str]:
    """A job with relative paths and a TOML in the folder it was submitted from: result and log."""
    (local_cluster.home / "photos").symlink_to(image_folder)
    toml = '[precompute]\nbody = "resnet18"\nweights = "random"\nworkers = 1\n'
    (local_cluster.home / "mine.toml").write_text(toml)
    arguments = ["precompute", "photos", "store", "--size", "32", "--config", "mine.toml"]
    out, err = local_cluster.run("submit", "--json", "--", *arguments)
    return json.loads(out.splitlines()[-1]), err


@pytest.mark.slow
def test_job_works_in_the_folder_it_was_submitted_from(local_cluster, extracted):
    result, log = extracted
    assert result["status"] == "SUCCEEDED"
    assert result["exit_code"] == 0
    assert result["address"] == local_cluster.url
    assert 100_000 < result["uploaded_bytes"] < 3_000_000
    assert f"job {result['job_id']}" in log.splitlines()[0]
    assert "96 inputs = 72 features + 0 faults + 24 ignored" in log
    assert (local_cluster.home / "store" / "manifest.json").is_file()
    assert (local_cluster.home / "mlflow.db").is_file()
    assert "Running entrypoint" not in log
    assert " -- " not in log  # the format of Ray's own log lines
    store = json.loads((local_cluster.home / "store" / "store.json").read_text())
    assert store["recipe"]["body"] == "resnet18"
    out, _ = local_cluster.run("jobs", "list", "--json")
    known = {job["job_id"]: job for job in json.loads(out)["jobs"]}
    assert known[result["job_id"]]["command"].endswith(" precompute photos store --size 32")


@pytest.mark.slow
def test_exit_code_is_that_of_the_job(local_cluster):
    (local_cluster.home / "nothing").mkdir()
    out, _ = local_cluster.run("submit", "--", "features", "verify", "nothing", code=2)
    assert "arrowhead: nothing is not a" in out
    assert "  wanted  " in out


@pytest.mark.slow
def test_ctrl_c_leaves_the_job_running_and_jobs_stop_ends_it(local_cluster, image_folder):
    slow = ["precompute", image_folder, "slow", "--body", "resnet34", "--weights", "random"]
    follower = local_cluster.start("submit", "--", *slow)
    job_id = re.search(r"job (\w+) at", follower.stdout.readline())[1]
    follower.send_signal(signal.SIGINT)
    out, err = follower.communicate(timeout=60)
    assert follower.returncode == 130, err
    assert f"arrowhead jobs logs {job_id} --follow" in out
    out, _ = local_cluster.run("jobs", "stop", job_id, "--json")
    assert json.loads(out)["stopped"] is True
    out, _ = local_cluster.run("jobs", "logs", job_id, "--follow", "--json", code=130)
    assert json.loads(out.splitlines()[-1])["status"] == "STOPPED"
    _, err = local_cluster.run("jobs", "logs", "raysubmit_nothing", code=2)
    assert "knows no such job" in err


class Scraper(threading.Thread):
    """Reads the metrics of the cluster's nodes twice a second, as Prometheus would."""

    def __init__(self, local_cluster: LocalCluster) -> None:
        super().__init__(daemon=True)
        self._local, self._over = local_cluster, threading.Event()
        self.seen: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
        """Newest value by labels, by name."""

    def run(self) -> None:
        while not self._over.wait(0.5):
            with contextlib.suppress(OSError, http.client.HTTPException):
                for target in self.targets():
                    with urllib.request.urlopen(f"http://{target}/metrics", timeout=5) as answer:
                        self._take(answer.read().decode())

    def targets(self) -> list[str]:
        """Metric addresses of the nodes; the job server gives them to clients with its token."""
        line = http.client.HTTPConnection("127.0.0.1", self._local.port, timeout=5)
        line.request(
            "GET", "/api/prometheus/sd", headers={"Authorization": f"Bearer {self._local.token}"}
        )
        result = json.loads(line.getresponse().read())
        line.close()
        return [target for one in result for target in one["targets"]]

    def _take(self, text: str) -> None:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = tuple(sorted(sample.labels.items()))
                self.seen.setdefault(sample.name, {})[labels] = sample.value

    def end(self) -> None:
        self._over.set()
        self.join()

    def total(self, name: str, **labels: str) -> float:
        """The sum over nodes and processes of the series with these labels."""
        return sum(
            value
            for held, value in self.seen.get(f"ray_arrowhead_{name}", {}).items()
            if labels.items() <= dict(held).items()
        )


@pytest.fixture(scope="module")
def scraper(local_cluster: LocalCluster) -> Iterator[Scraper]:
    result = Scraper(local_cluster)
    result.start()
    yield result
    result.end()


def submit_training(local_cluster: LocalCluster) -> subprocess.CompletedProcess[str]:
    """`ray job submit`, as the README shows it; bundle and run are where the recipe says."""
    arguments = ["job", "submit", "--working-dir", str(ROOT / "jobs"), "--"]
    arguments += ["python", "train.py", "--config", "train.toml", "store", "bundle"]
    arguments[-2:] = [str(local_cluster.home / name) for name in arguments[-2:]]
    arguments += ["--workers", "1", "--tracking-uri", f"sqlite:///{local_cluster.home}/mlflow.db"]
    completed = subprocess.run(
        [Path(sys.executable).parent / "ray", *arguments, "--no-report"],
        cwd=local_cluster.home,
        env=local_cluster.env
        | {"RAY_API_SERVER_ADDRESS": local_cluster.url, "RAY_AUTH_MODE": "token"},
        text=True,
        capture_output=True,
        timeout=500,
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return completed


@pytest.mark.slow
def test_ray_job_submit_runs_a_job_script_with_its_recipe(local_cluster, extracted, scraper):
    completed = submit_training(local_cluster)
    result = json.loads((local_cluster.home / "bundle" / "bundle.json").read_text())
    assert result["head"] == "linear"
    assert local_cluster.token not in completed.stdout + completed.stderr


@pytest.mark.slow
def test_workers_report_metrics_labelled_with_their_run(local_cluster, scraper):
    """Of the two jobs before.

    Ray sends a worker's metrics every ten seconds, and those of a worker that ends before that
    may be lost. So a training of two seconds is repeated until its metrics have arrived.
    """
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{local_cluster.home}/mlflow.db")
    experiment = client.get_experiment_by_name("arrowhead").experiment_id

    def newest(name: str, *, child: bool = False) -> Any:
        runs = client.search_runs([experiment], order_by=["start_time DESC"])
        named = [run for run in runs if run.info.run_name == name]
        return next(run for run in named if ("mlflow.parentRunId" in run.data.tags) == child)

    of = {"run": newest("precompute").info.run_id, "verb": "extract"}
    assert scraper.total("images_decoded_total", **of) == 72
    assert scraper.total("features_written_total", **of) == 72
    assert scraper.total("faults_total", **of) == 0
    for stage in ("read", "decode", "forward", "write"):
        assert scraper.total("stage_seconds_total", stage=stage, **of) > 0
    for _ in range(4):
        run, last = newest("train"), newest("train", child=True).data.metrics
        of = {"run": run.info.run_id, "verb": "train", "part": "heads"}
        epoch = int(run.data.params["train.epochs"]) - 1
        until = monotonic() + 20  # a node publishes its processes' numbers some seconds later
        while monotonic() < until and scraper.total("epoch", **of) != epoch:
            sleep(0.2)
        if scraper.total("epoch", **of) == epoch:
            break
        submit_training(local_cluster)
    assert scraper.total("epoch", **of) == epoch
    assert scraper.total("accuracy", **of) == pytest.approx(last["accuracy"])
    for split in ("train", "valid"):
        loss = scraper.total("loss", split=split, **of)
        assert loss == pytest.approx(last[f"{split}_loss"])


@pytest.mark.slow
def test_dashboard_queries_only_existing_metrics(local_cluster, scraper, extracted):
    """Ray's metrics are looked up in the running cluster, Arrowhead's in `meters.METRICS`."""
    board = json.loads((ROOT / "deploy" / "grafana" / "arrowhead.json").read_text())
    texts = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    request = {name for text in texts for name in re.findall(r"\bray_\w+", text)}
    ours = {
        f"ray_arrowhead_{name}{'_total' * (kind == 'counter')}": {*keys, "run", "verb"}
        for name, (kind, _, keys) in meters.METRICS.items()
    }
    until = monotonic() + 30
    while monotonic() < until and "ray_node_mem_total" not in scraper.seen:
        sleep(0.2)
    # This cluster has no GPU, so this metric is missing.
    known = ours.keys() | scraper.seen.keys() | {"ray_node_gpus_utilization"}
    assert request - known == set()
    assert ours.keys() <= request
    for text in texts:  # sums and legends use labels that the series have
        for name in re.findall(r"\bray_arrowhead_\w+", text):
            by = {
                word.strip()
                for group in re.findall(r"by \(([^)]*)\)", text)
                for word in group.split(",")
            }
            assert by <= ours[name] | {"NodeAddress"}


@pytest.mark.slow
def test_token_appears_in_no_log_job_or_run(local_cluster, extracted):
    from mlflow import MlflowClient

    token = local_cluster.token
    out, err = local_cluster.run("jobs", "list", "--json")
    assert token not in out + err + extracted[1] + json.dumps(extracted[0])
    client = MlflowClient(tracking_uri=f"sqlite:///{local_cluster.home}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("arrowhead").experiment_id])
    assert runs
    assert not any(token in str(run.to_dictionary()) for run in runs)
    (session,) = local_cluster.sessions
    logs = [path for path in session.rglob("*") if path.is_file() and "logs" in path.parts]
    logs += [*(local_cluster.home / "state").rglob("*.log"), local_cluster.home / "mlflow.db"]
    assert any("job-driver" in path.name for path in logs)
    assert [path for path in logs if token.encode() in path.read_bytes()] == []
    for process in local_cluster.processes():
        assert token not in " ".join(process.cmdline())


@pytest.mark.slow
def test_down_leaves_no_process_or_session(local_cluster):
    (session,) = local_cluster.sessions
    before = local_cluster.processes()
    assert before
    assert local_cluster.script("down") == "down\n"
    assert psutil.wait_procs(before, timeout=5)[1] == []
    assert local_cluster.processes() == []
    assert not session.exists()
    for name in ("PORT", "GCS_PORT", "CLIENT_PORT"):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", int(local_cluster.env[name]))) != 0
    assert local_cluster.script("down") == "not up\n"
    assert local_cluster.script("status", code=3) == "not up\n"
    with pytest.raises(ConfigError, match="No Ray job server answers"):
        jobs.connect(ClusterConfig(address=local_cluster.url))
