"""Start Python programs fast: fork a server process that has already imported the libraries.

`Popen` and `run` replace those of subprocess for Python commands: `[sys.executable, "-m", MODULE,
…]`, `[sys.executable, "-c", CODE, …]` or `[sys.executable, FILE, …]`. Each starts a separate
process, a child of this one, with its own working directory, environment, streams and signals. It
can be signalled and waited for, and it runs its atexit functions.

Use subprocess for a test that depends on what differs from a new interpreter:
- Libraries read some variables on import (`PYTHON…`, `LC_…`, `OMP_…`). A fork has those of the
  test process; a command with other values is refused. Variables that Ray and Intel's libraries
  set themselves are not compared.
- /proc shows the command line and environment of the server.
- A sitecustomize.py on PYTHONPATH runs after the imports of the server.
- Signals have their default handlers, even where the test process ignores them.
- A fork frees no objects at exit, and strings hash alike in all forks of a server.

Run as a program, this file is the server.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# All that `fit`, `score` and the decoder's process import.
IMPORTS = """
    arrowhead.cli.main arrowhead.commands.train arrowhead.commands.score
    arrowhead.commands.examine jinja2 scipy.cluster.hierarchy sklearn.decomposition
    sklearn.manifold sklearn.metrics
    arrowhead.decode.worker_process arrowhead.inference.score arrowhead.inference.evaluate
    arrowhead.runtime.launch arrowhead.tracking.run arrowhead.training.heads
    mlflow mlflow.store.tracking.sqlalchemy_store matplotlib.figure matplotlib.backends.backend_agg
    nvidia.dali.fn nvidia.dali.types numpy pandas PIL.Image psutil pyarrow.compute pyarrow.dataset
    pyarrow.parquet ray.train.torch ray.train.v2.api.data_parallel_trainer safetensors.torch torch
    torch.fx.experimental.optimization torchvision.models
""".split()  # noqa: SIM905 - longer as a list
READ_ON_IMPORT = ("PYTHON", "LC_", "LANG", "OMP_", "LD_")
# Forks always run with PYTHONSAFEPATH; Ray sets PYTHONBREAKPOINT in the process that starts it.
READ_LATER = {"PYTHONPATH", "PYTHONSAFEPATH", "PYTHONBREAKPOINT"}
DEFAULT_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
PR_SET_CHILD_SUBREAPER = 36
HEADER_BYTES = 8
MIN_SERVER_FD = 200  # the server's descriptors are above those that programs ask for by number


# ------------------------------------------------------------------------------ for tests


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """A fork that runs a Python program."""

    def _execute_child(self, args: Sequence[Any], *more: Any) -> None:
        names = "executable preexec_fn close_fds pass_fds cwd env startupinfo creationflags shell"
        names += " p2cread p2cwrite c2pread c2pwrite errread errwrite"
        options = dict(zip(names.split(), more, strict=False))
        words = [os.fsdecode(word) for word in args]
        assert words[0] == sys.executable, words
        assert not (options["executable"] or options["preexec_fn"] or options["shell"])
        env = os.environ if options["env"] is None else options["env"]
        request = {
            "words": words[1:],
            "cwd": os.fsdecode(options["cwd"] or Path.cwd()),
            "env": {os.fsdecode(name): os.fsdecode(value) for name, value in env.items()},
        }
        streams = [options["p2cread"], options["c2pwrite"], options["errwrite"]]
        fds = {target: target if fd == -1 else fd for target, fd in enumerate(streams)}
        fds |= {fd: fd for fd in options["pass_fds"]}
        try:
            self.pid = _server().fork(request, fds)
        finally:
            pipes = [options[name] for name in names.split()[-6:]]
            self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]
        self._child_created = True


def run(
    words: Sequence[Any],
    *,
    input: Any = None,
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    **more: Any,
) -> subprocess.CompletedProcess[Any]:
    """`subprocess.run` with a fork."""
    if capture_output:
        more |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if input is not None:
        more["stdin"] = subprocess.PIPE
    with Popen(words, **more) as process:
        try:
            out, err = process.communicate(input, timeout)
        except BaseException:
            process.kill()
            raise
    completed = subprocess.CompletedProcess(words, process.returncode, out, err)
    if check:
        completed.check_returncode()
    return completed


class Decoders:
    """Replaces the module subprocess for decoder processes: forks where that is equivalent."""

    DEVNULL = subprocess.DEVNULL
    TimeoutExpired = subprocess.TimeoutExpired

    @staticmethod
    def Popen(words: Sequence[Any], **more: Any) -> subprocess.Popen[Any]:
        if _server().differs(more["env"]):
            return subprocess.Popen(words, **more)
        return Popen(words, **more)


class Server:
    """The server process and the socket to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._environment = _import_environment(os.environ)
        self._line, server_socket = socket.socketpair()
        with server_socket:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(server_socket.fileno())],
                pass_fds=[server_socket.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )

    def differs(self, env: Mapping[str, str]) -> bool:
        """Whether a new interpreter with this environment would differ from a fork."""
        return _import_environment(env) != self._environment

    def fork(self, request: dict[str, Any], fds: Mapping[int, int]) -> int:
        """Start a child of this process and return its pid.

        Args:
            request: the command, its working directory and environment.
            fds: our file descriptors, by their numbers in the child.
        """
        assert not self.differs(request["env"]), "it needs an interpreter of its own"
        request["fds"] = list(fds)
        request["umask"] = os.umask(0)
        os.umask(request["umask"])
        data = json.dumps(request).encode()
        with self._lock, _child_subreaper():
            socket.send_fds(self._line, [len(data).to_bytes(HEADER_BYTES, "big")], [*fds.values()])
            self._line.sendall(data)
            answer = _receive_exactly(self._line, HEADER_BYTES)
        return int.from_bytes(answer, "big")


_servers: dict[int, Server] = {}


def _server() -> Server:
    """The server of this process; its forks become children of this process."""
    if os.getpid() not in _servers:
        _servers[os.getpid()] = Server()
    return _servers[os.getpid()]


def _import_environment(env: Mapping[str, str]) -> dict[str, str]:
    names = {name for name in env if name.startswith(READ_ON_IMPORT)} - READ_LATER
    return {name: env[name] for name in names}


@contextlib.contextmanager
def _child_subreaper() -> Iterator[None]:
    """Make orphaned descendants children of this process for the duration."""
    libc = ctypes.CDLL(None)
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _receive_exactly(line: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = line.recv(count - len(data))
        if not more:
            raise EOFError("the other end of the line has ended")
        data += more
    return data


# ------------------------------------------------------------------------------ the server


def serve(line: socket.socket) -> dict[str, Any]:
    """Fork for every request. Return the request, in the forks only."""
    while True:
        header, fds, _, _ = socket.recv_fds(line, HEADER_BYTES, 100)
        if not header:
            os._exit(0)
        header += _receive_exactly(line, HEADER_BYTES - len(header))
        request = dict(json.loads(_receive_exactly(line, int.from_bytes(header, "big"))))
        read_end, write_end = os.pipe()
        wait_end, release_end = os.pipe()
        intermediate = os.fork()
        if intermediate == 0:
            child = os.fork()
            if child == 0:
                for unused in (read_end, write_end, release_end, line.detach()):
                    os.close(unused)
                os.read(wait_end, 1)  # until the test process has become its parent
                os.close(wait_end)
                apply_request(request, fds)
                return request
            os.write(write_end, child.to_bytes(HEADER_BYTES, "big"))
            os._exit(0)
        os.close(write_end)
        os.close(wait_end)
        for fd in fds:
            os.close(fd)
        os.waitpid(
            intermediate, 0
        )  # once it has ended, the test process is the parent of its child
        os.close(release_end)
        line.sendall(os.read(read_end, HEADER_BYTES))
        os.close(read_end)


def apply_request(request: dict[str, Any], fds: list[int]) -> None:
    """Set streams, environment, working directory, umask and signals as the request says."""
    first_free = (
        max(MIN_SERVER_FD, *request["fds"]) + 1
    )  # so that no dup2 below closes a descriptor still needed
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, first_free) for fd in fds]
    for fd in fds:
        os.close(fd)
    for target, fd in zip(request["fds"], moved, strict=True):
        os.dup2(fd, target)
        os.close(fd)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    os.umask(request["umask"])
    for sig in DEFAULT_SIGNALS:
        signal.signal(sig, signal.default_int_handler if sig == signal.SIGINT else signal.SIG_DFL)
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(":") if path]
    sys.modules["numpy"].random.seed()


def execute(words: list[str]) -> None:
    """Do what `python` does with these arguments."""
    while words[0] == "-P":
        words = words[1:]
    sys.argv = words[1:] if words[0] == "-m" else ["-c", *words[2:]] if words[0] == "-c" else words
    run_sitecustomize()
    if words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    else:
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")


def run_sitecustomize() -> None:
    """Run a file of this name on PYTHONPATH, as a new interpreter does before its imports."""
    for path in filter(None, os.environ.get("PYTHONPATH", "").split(":")):
        file = Path(path) / "sitecustomize.py"
        if file.is_file():
            exec(compile(file.read_text(), file, "exec"), {"__name__": "sitecustomize"})


def exit_interpreter(error: BaseException | None) -> None:
    """Exit as the interpreter does, but do not spend seconds to free every object."""
    code = 0
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if code and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
    elif error is not None:
        traceback.print_exception(error)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            code = code or 120
    if isinstance(error, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 0xFF)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the tests
    line = socket.socket(fileno=fcntl.fcntl(int(sys.argv[1]), fcntl.F_DUPFD_CLOEXEC, MIN_SERVER_FD))
    os.close(int(sys.argv[1]))
    for name in IMPORTS:
        __import__(name)
    gc.collect()
    gc.freeze()  # forks share the memory pages of existing objects
    request = serve(line)
    try:
        execute(request["words"])
    except BaseException as error:
        exit_interpreter(error)
    exit_interpreter(None)
