"""Python programs without the seconds they take to import: forks of a process that has imported.

`Popen` and `run` are those of subprocess, for words that start a Python: `[sys.executable, "-m",
MODULE, …]`, `["-c", CODE, …]` or `[FILE, …]`. What they start is a process of its own and a child
of this one, with its own folder, environment, streams and signals. It can be stopped, killed and
waited for, and runs at its end what is registered for that.

A test of what differs from a new interpreter takes subprocess:
- Libraries read some variables when they are imported (`PYTHON…`, `LC_…`, `OMP_…`): here they are
  those of the tests, and others are refused. What Ray and Intel read is not: they set it, too.
- /proc shows the command line and the environment of the server.
- Signals are those of a command in front of a terminal, whatever the tests ignore.
- Its end frees nothing, and strings hash alike in all forks of a server.

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

# What a `fit`, a `score` and the decoder's process import in all.
IMPORTS = """
    arrowhead.cli.main arrowhead.commands.train arrowhead.commands.score
    arrowhead.decode.worker_process arrowhead.inference.score arrowhead.inference.evaluate
    arrowhead.runtime.launch arrowhead.tracking.run arrowhead.training.heads
    mlflow mlflow.store.tracking.sqlalchemy_store matplotlib.figure matplotlib.backends.backend_agg
    nvidia.dali.fn nvidia.dali.types numpy pandas PIL.Image psutil pyarrow.compute pyarrow.dataset
    pyarrow.parquet ray.train.torch ray.train.v2.api.data_parallel_trainer safetensors.torch torch
    torch.fx.experimental.optimization torchvision.models
""".split()  # noqa: SIM905 - longer as a list
READ_ON_IMPORT = ("PYTHON", "LC_", "LANG", "OMP_", "LD_")
READ_LATER = {"PYTHONPATH", "PYTHONSAFEPATH"}  # the latter holds for all forks
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
PR_SET_CHILD_SUBREAPER = 36
HEADER = 8
HIGH = 200  # file descriptors that no program asks for by number


# ------------------------------------------------------------------------------ for tests


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """A fork that runs a Python program."""

    def _execute_child(self, args: Sequence[Any], *more: Any) -> None:
        names = "executable preexec_fn close_fds pass_fds cwd env startupinfo creationflags shell"
        names += " p2cread p2cwrite c2pread c2pwrite errread errwrite"
        given = dict(zip(names.split(), more, strict=False))
        words = [os.fsdecode(word) for word in args]
        assert words[0] == sys.executable, words
        assert not (given["executable"] or given["preexec_fn"] or given["shell"])
        env = os.environ if given["env"] is None else given["env"]
        request = {
            "words": words[1:],
            "cwd": os.fsdecode(given["cwd"] or Path.cwd()),
            "env": {os.fsdecode(name): os.fsdecode(value) for name, value in env.items()},
        }
        streams = [given["p2cread"], given["c2pwrite"], given["errwrite"]]
        fds = {own: own if fd == -1 else fd for own, fd in enumerate(streams)}
        fds |= {fd: fd for fd in given["pass_fds"]}
        try:
            self.pid = _server().fork(request, fds)
        finally:
            pipes = [given[name] for name in names.split()[-6:]]
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
    done = subprocess.CompletedProcess(words, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


class Decoders:
    """Stands in for subprocess where decoders' processes are started: forks where they do."""

    DEVNULL = subprocess.DEVNULL
    TimeoutExpired = subprocess.TimeoutExpired

    @staticmethod
    def Popen(words: Sequence[Any], **more: Any) -> subprocess.Popen[Any]:
        if _server().differs(more["env"]):
            return subprocess.Popen(words, **more)
        return Popen(words, **more)


class Server:
    """A process that has imported, and the line to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._environment = _on_import(os.environ)
        self._line, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )

    def differs(self, env: Mapping[str, str]) -> bool:
        """Whether a new interpreter would not be what this one is."""
        paths = map(Path, env.get("PYTHONPATH", "").split(":"))
        customized = any((path / "sitecustomize.py").is_file() for path in paths)
        return customized or _on_import(env) != self._environment

    def fork(self, request: dict[str, Any], fds: Mapping[int, int]) -> int:
        """Process id of a child of this process. fds: ours, by their numbers in the child."""
        assert not self.differs(request["env"]), "it needs an interpreter of its own"
        request["fds"] = list(fds)
        request["umask"] = os.umask(0)
        os.umask(request["umask"])
        data = json.dumps(request).encode()
        with self._lock, _adopting():
            socket.send_fds(self._line, [len(data).to_bytes(HEADER, "big")], [*fds.values()])
            self._line.sendall(data)
            answer = _exactly(self._line, HEADER)
        return int.from_bytes(answer, "big")


_servers: dict[int, Server] = {}


def _server() -> Server:
    """The one of this process, whose children its forks are."""
    if os.getpid() not in _servers:
        _servers[os.getpid()] = Server()
    return _servers[os.getpid()]


def _on_import(env: Mapping[str, str]) -> dict[str, str]:
    names = {name for name in env if name.startswith(READ_ON_IMPORT)} - READ_LATER
    return {name: env[name] for name in names}


@contextlib.contextmanager
def _adopting() -> Iterator[None]:
    """Meanwhile, who loses its parent below this process becomes its child."""
    libc = ctypes.CDLL(None)
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _exactly(line: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = line.recv(count - len(data))
        if not more:
            raise EOFError("the other end of the line has ended")
        data += more
    return data


# ------------------------------------------------------------------------------ the server


def serve(line: socket.socket) -> dict[str, Any]:
    """Fork for every request; returns in the forks only, with the request."""
    while True:
        head, fds, _, _ = socket.recv_fds(line, HEADER, 100)
        if not head:
            os._exit(0)
        head += _exactly(line, HEADER - len(head))
        request = dict(json.loads(_exactly(line, int.from_bytes(head, "big"))))
        read, write = os.pipe()
        hold, go = os.pipe()
        between = os.fork()
        if between == 0:
            child = os.fork()
            if child == 0:
                for one in (read, write, go, line.detach()):
                    os.close(one)
                os.read(hold, 1)  # until its parent is who it will be
                os.close(hold)
                become(request, fds)
                return request
            os.write(write, child.to_bytes(HEADER, "big"))
            os._exit(0)
        os.close(write)
        os.close(hold)
        for fd in fds:
            os.close(fd)
        os.waitpid(between, 0)  # now that it has ended, its child is one of the tests' process
        os.close(go)
        line.sendall(os.read(read, HEADER))
        os.close(read)


def become(request: dict[str, Any], fds: list[int]) -> None:
    """Take the streams, the environment, the folder and the signals that were asked for."""
    free = max(HIGH, *request["fds"]) + 1  # or one would be closed for another
    away = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, free) for fd in fds]
    for fd in fds:
        os.close(fd)
    for own, fd in zip(request["fds"], away, strict=True):
        os.dup2(fd, own)
        os.close(fd)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    os.umask(request["umask"])
    for sig in SIGNALS:
        signal.signal(sig, signal.default_int_handler if sig == signal.SIGINT else signal.SIG_DFL)
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(":") if path]
    sys.modules["numpy"].random.seed()


def execute(words: list[str]) -> None:
    """Do what `python WORDS` does."""
    while words[0] == "-P":
        words = words[1:]
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")


def end(error: BaseException | None) -> None:
    """End as the interpreter does, but for the seconds in which it frees every object."""
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
    line = socket.socket(fileno=fcntl.fcntl(int(sys.argv[1]), fcntl.F_DUPFD_CLOEXEC, HIGH))
    os.close(int(sys.argv[1]))
    for name in IMPORTS:
        __import__(name)
    gc.collect()
    gc.freeze()  # the pages of what is there stay shared
    request = serve(line)
    try:
        execute(request["words"])
    except BaseException as error:
        end(error)
    end(None)
