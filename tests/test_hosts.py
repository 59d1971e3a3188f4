"""Several hosts give the same bytes and metrics as one process, even if one is killed or cut off
(`make test-slow`).

A host is a network namespace of this machine with an address of its own and a Ray node in it; the
file system is shared, as users have it. The first two hold one worker each, the head none.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

FLAGS = ["--body", "resnet18", "--weights", "random", "--size", "128"]
NET = "10.203.77"  # reachable from these namespaces only
HEAD = f"{NET}.1:6379"
# Ray takes a machine for lost after a minute without an answer. Here after a third of that, which
# is still longer than our own command keeps silent.
RAY_HEALTH_CHECK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "6",
}


class Host:
    """A network namespace, and the Ray node in it."""

    def __init__(self, number: int, folder: Path) -> None:
        self.name, self.address = f"ah{os.getpid()}-{number}", f"{NET}.{number}"
        self._folder = folder
        self._starts = 0

    def ip(self, *words: str) -> None:
        ip("-n", self.name, *words)

    def run(self, words: list[str], log: Path) -> subprocess.Popen[bytes]:
        """A command in this namespace, with the token in its home."""
        home = {"HOME": str(self._folder), "RAY_AUTH_MODE": "token"}
        with log.open("wb") as file:
            return subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{self.name}", *words],
                env=os.environ | RAY_HEALTH_CHECK | home | {"RAY_USAGE_STATS_ENABLED": "0"},
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def start(self, *words: str) -> Callable[[], None]:
        """Begin to start a Ray node; the call that waits until it has joined."""
        self._starts += 1
        scratch = self._folder / f"{self.name[-1]}{self._starts}"  # sockets in it: a short path
        log = scratch.with_suffix(".log")
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
        own = [f"--node-ip-address={self.address}", f"--temp-dir={scratch}"]
        node = self.run([*ray, *own, "--object-store-memory=100000000", *words], log)

        def joined() -> None:
            wait_until(lambda: node.poll() is not None or b"runtime started" in log.read_bytes())
            assert node.poll() is None, log.read_text()

        return joined

    def pids(self) -> list[int]:
        actual = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True)
        return [int(pid) for pid in actual.stdout.split()]

    def kill(self) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def works(self) -> bool:
        """Whether a worker runs here."""
        return any("TrainWorker" in command_line(pid) for pid in self.pids())

    def raylet(self) -> int | None:
        return next((pid for pid in self.pids() if "/raylet/raylet " in command_line(pid)), None)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def command_line(pid: int) -> str:
    try:
        line = (Path("/proc") / str(pid) / "cmdline").read_bytes()
    except OSError:
        return ""
    return line.replace(b"\0", b" ").decode(errors="replace")


def wait_until(reached: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, f"not reached in {seconds:.0f} s"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def hosts(add_mlflow_db: Callable[[Path], Path]) -> Iterator[list[Host]]:
    """A head and two hosts on a bridge, in one Ray cluster, removed afterwards."""
    if not (shutil.which("ip") and shutil.which("nsenter")):
        pytest.skip("several hosts need `ip` and `nsenter` (iproute2, util-linux)")
    folder = add_mlflow_db(Path(tempfile.mkdtemp(prefix="ah", dir="/tmp")))
    (folder / ".ray").mkdir(mode=0o700)
    (folder / ".ray" / "auth_token").write_text("5" * 64)
    (folder / ".ray" / "auth_token").chmod(0o600)
    outcome = [Host(number, folder) for number in (1, 2, 3)]
    try:
        try:
            for host in outcome:
                ip("netns", "add", host.name)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        head, *others = outcome
        # The bridge is the head's: no firewall of this machine is in the way.
        head.ip("link", "set", "lo", "up")
        head.ip("link", "add", "bridge", "type", "bridge")
        head.ip("address", "add", f"{head.address}/24", "dev", "bridge")
        head.ip("link", "set", "bridge", "up")
        for host in others:
            cable = ["link", "add", f"to-{host.address}", "type", "veth"]
            head.ip(*cable, "peer", "name", "eth0", "netns", host.name)
            head.ip("link", "set", f"to-{host.address}", "master", "bridge", "up")
            host.ip("address", "add", f"{host.address}/24", "dev", "eth0")
            host.ip("link", "set", "lo", "up")
            host.ip("link", "set", "eth0", "up")
        head.start("--head", "--port=6379", "--num-cpus=0", "--include-dashboard=false")()
        for joined in [host.start(f"--address={HEAD}", "--num-cpus=1") for host in others]:
            joined()
        yield outcome
    finally:
        for host in outcome:
            host.kill()
        wait_until(lambda: not any(host.pids() for host in outcome))
        for host in outcome:
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def alone(
    folder_of_192: Path,
    tmp_path_factory: pytest.TempPathFactory,
    add_mlflow_db: Callable[[Path], Path],
) -> tuple[Path, dict[str, Any]]:
    """The fit of one process, and its result."""
    folder = add_mlflow_db(tmp_path_factory.mktemp("hosts"))
    words = [sys.executable, "-m", "arrowhead", *fit(folder_of_192, folder / "alone")]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


HEAD_FLAGS = ["--head", "linear", "--rate", "0.05", "--epochs", "4", "--json"]


def fit(data: Path, out: Path) -> list[str]:
    return ["fit", str(data), str(out), *FLAGS, "--extract.chunk-size", "8", *HEAD_FLAGS]


def precompute(data: Path, store: Path) -> list[str]:
    return ["precompute", str(data), str(store), *FLAGS, "--chunk-size", "8", "--json"]


def shards(store: Path) -> int:
    return len(list((store / "shards").glob("*.arrow")))


def files(store: Path) -> dict[str, bytes]:
    named = [store / "manifest.json", *sorted((store / "shards").glob("*.arrow"))]
    return {file.name: file.read_bytes() for file in named}


def run_on_head(head: Host, words: list[str], log: Path) -> subprocess.Popen[bytes]:
    return head.run([sys.executable, "-m", "arrowhead", *words, "--address", HEAD], log)


def result(command: subprocess.Popen[bytes], log: Path) -> dict[str, Any]:
    assert command.wait(timeout=240) == 0, log.read_text()
    lines = [line for line in log.read_text().splitlines() if line.startswith('{"')]
    return dict(json.loads(lines[-1]))


def test_extraction_loses_no_row_if_one_host_is_killed_and_another_disconnected(
    hosts, alone, folder_of_192
):
    head, first, second = hosts
    folder, _ = alone
    store, log = folder / "disturbed", folder / "disturbed.log"
    command = run_on_head(head, [*precompute(folder_of_192, store), "--workers", "1:2"], log)
    wait_until(lambda: shards(store) >= 4 or command.poll() is not None)
    assert first.works() and second.works(), log.read_text()

    os.kill(first.raylet(), signal.SIGKILL)
    wait_until(lambda: f"on {first.address} is gone" in log.read_text())
    shard_count = shards(store)
    wait_until(lambda: shards(store) >= shard_count + 2)
    head.ip("link", "set", f"to-{second.address}", "down")
    assert command.poll() is None, "it ended before a host was cut off"
    first.start(f"--address={HEAD}", "--num-cpus=1")
    wait_until(lambda: f"{second.address} has not answered" in log.read_text(), 30)
    assert f"on {second.address} is gone" not in log.read_text()  # Ray has not said so yet
    counts = result(command, log)["counts"]
    assert f"on {second.address} is gone" in log.read_text()
    assert counts["features"] == counts["decoded"] + counts["looked_up"] == 192
    assert files(store) == files(folder / "alone" / "store")


def test_waiting_for_a_host_is_reported_and_two_hosts_train_like_one_process(
    hosts, alone, folder_of_192
):
    """The second host, which was cut off, comes back while the command waits for it."""
    head, first, second = hosts
    folder, expected = alone
    log = folder / "together.log"
    store = folder / "disturbed"  # by the test before
    train = ["train", str(store), str(folder / "together"), *HEAD_FLAGS, "--workers", "2"]
    command = run_on_head(head, train, log)
    never = folder / "never.log"
    three = [*precompute(folder_of_192, folder / "never"), "--workers", "3", "--wait", "1"]
    impatient = run_on_head(head, three, never)
    wait_until(lambda: "waiting for 2 workers: the cluster has room for 1" in log.read_text())
    head.ip("link", "set", f"to-{second.address}", "up")
    wait_until(lambda: second.raylet() is None)  # its Ray finds that it is given up, and ends
    second.start(f"--address={HEAD}", "--num-cpus=1")
    assert impatient.wait(120) == 130
    assert "For 1 s the cluster had no room for 3 workers" in never.read_text()
    assert "run the same command again" in never.read_text()
    wait_until(lambda: first.works() and second.works())
    actual = result(command, log)
    assert len(actual["epochs"]) == 4
    for one, two in zip(expected["epochs"], actual["epochs"], strict=True):
        assert two == pytest.approx(one, rel=1e-5)
