"""The commands `submit` and `jobs`: run a command on a cluster, and look after its jobs."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import localtime, strftime
from typing import Annotated, Any

from cyclopts import CycloptsError, Group, Parameter
from cyclopts.config import Toml

from arrowhead.cli.app import (
    app,
    configure,
    entry,
    finish,
    parse_refusal,
    print_result,
    program,
    show_next_commands,
)
from arrowhead.cli.options import Out, Output
from arrowhead.cli.screen import Screen
from arrowhead.cli.stage_options import ToCluster
from arrowhead.data import drop_list, mirrors
from arrowhead.data.source_config import SourceConfig
from arrowhead.errors import ConfigError
from arrowhead.features import networks
from arrowhead.features.backbone import BodyConfig
from arrowhead.inference.evaluate import EvaluateConfig
from arrowhead.inference.score_request import ScoreConfig
from arrowhead.runtime import signals, worker_choice
from arrowhead.runtime.jobs import ClusterConfig
from arrowhead.runtime.ray_cluster import LaunchConfig
from arrowhead.tracking.address import secrets_of, without_secrets
from arrowhead.tracking.client import TrackingConfig
from arrowhead.wording import shell_command

# --------------------------------------------------------------------------- a cluster

# Commands that make sense only on the user's own machine.
LOCAL_COMMANDS = ("submit", "jobs", "watch", "demo")


def submit(
    *words: Annotated[
        str, Parameter(name="command", help="After --: a command, its arguments and its flags.")
    ],
    cluster: ToCluster = ClusterConfig(),
    shared: Annotated[
        list[Path] | None,
        Parameter(
            help="Folder that every node has under the same path. Needed for paths, unless all"
            " nodes are this machine. May be given several times.",
            group=Group("Cluster", sort_key=8),
        ),
    ] = None,
    follow: Annotated[
        bool,
        Parameter(
            negative="--no-follow", help="Show the job's log and return the job's exit code."
        ),
    ] = True,
    output: Out = Output(),
) -> int:
    """Run a command on a Ray cluster, and show its log and exit code here.

    The command is checked here before anything is sent. Only Arrowhead's source and the --config
    file are sent, never data. The job runs in the current folder; if the cluster has other
    machines, that folder must be in --shared. Addresses (s3://…) always work. Without --workers,
    `fit`, `precompute`, `score` and `evaluate` get --workers 1:N, where N is the cluster's number
    of GPUs (or CPUs, if it has no GPU); `train` and `lr-find` get one worker. Ctrl-C leaves the job
    running. The token comes from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.

    Example: arrowhead submit -- fit photos/ out/ --epochs 10
    """
    if not words:
        raise ConfigError(
            "There is no command to submit.", "a command after --.", "see arrowhead submit --help."
        )
    config = next((Path(one.path) for one in app.config if isinstance(one, Toml)), None)
    call = parse_command(list(words), config)
    if call is None:  # --help, which has been shown
        return 0
    return _submit(call, cluster, shared or [], follow, output)


def _submit(
    call: Call, config: ClusterConfig, shared: list[Path], follow: bool, output: Output
) -> int:
    """Check a command against the cluster and start it there; the exit code."""
    from arrowhead.runtime import jobs

    needs = _requirements(call)
    cluster = jobs.connect(config)
    folder = jobs.job_folder(cluster, shared, needs.paths)
    jobs.check_inputs(cluster, shared, folder, needs.inputs)
    screen = Screen(to_stderr=output.json)
    if cluster.token is None:
        screen.print(
            f"{cluster.url} asks for no token: everyone who reaches it can run code there."
        )
    job_id, size = jobs.submit(
        cluster,
        _with_workers(call, cluster.worker_capacity),
        folder=folder,
        config=call.config,
        env_vars=needs.env_vars,
        required_variable=needs.required_variable if folder is None else None,
    )
    flags = "" if config.address is None else f" --address {cluster.url}"
    flags += " --insecure" if config.insecure else ""
    logs_command = f"{program()} jobs logs {job_id} --follow{flags}"
    started = f"job {job_id} at {cluster.url}: {size / 1e6:.2f} MB sent"
    details = {"address": cluster.url, "uploaded_bytes": size}
    if follow:
        return _follow(cluster, job_id, screen, output, logs_command, details, started)
    screen.print(started)
    show_next_commands(screen, [logs_command, f"{program()} jobs stop {job_id}{flags}"])
    job = jobs.get_job(cluster, job_id)
    finish({"job_id": job_id, "status": job.status, "exit_code": job.exit_code} | details, output)
    return 0


@dataclass(frozen=True, slots=True)
class Call:
    """A parsed command line.

    Attributes:
        function: The function of the command.
        arguments: Its arguments by name.
        tokens: The words without --config; the first is the command's name.
        config: The file of --config.
    """

    function: Callable[..., Any]
    arguments: dict[str, Any]
    tokens: list[str]
    config: Path | None

    @property
    def name(self) -> str:
        """The command's name."""
        return self.tokens[0]


def parse_command(words: list[str], config: Path | None = None) -> Call | None:
    """Parse a command line without running it.

    Args:
        words: The command, its arguments and its flags.
        config: A TOML file that is used if the words name none.

    Returns:
        The parsed call; None if the words ask for help, which is then shown.

    Raises:
        ConfigError: The command line is invalid, or the command does not run on a cluster.
    """
    quiet: dict[str, Any] = {"exit_on_error": False, "print_error": False}
    if words[0] in LOCAL_COMMANDS:
        raise ConfigError(
            f"`{words[0]}` does not run on a cluster.",
            "a command that works on data: fit, precompute, lr-find, train, score, export, …",
            f"run `{program()} {words[0]}` here.",
        )
    before, app.config = app.config, ()  # these words have a --config of their own, or none
    try:
        entry_point, outer, _ = app.meta.parse_args(words, **quiet)
        if entry_point is not entry:
            entry_point(*outer.args, **outer.kwargs)
            return None
        tokens = list(outer.args)
        configure(file := outer.kwargs.get("config") or config)
        function, bound, _ = app.parse_args(tokens, **quiet)
    except CycloptsError as error:
        raise ConfigError(*map(without_secrets, parse_refusal(error, words))) from error
    finally:
        app.config = before
    bound.apply_defaults()
    return Call(function, dict(bound.arguments), tokens, file)


@dataclass(frozen=True, slots=True)
class Requirements:
    """What a command needs on the cluster.

    Attributes:
        paths: Local files and folders that it reads or writes.
        inputs: Those of them that must exist before it starts.
        env_vars: Variables of this environment that the job gets.
        required_variable: A variable that the head node must have if the job cannot run in the
            current folder.
    """

    paths: list[str]
    inputs: list[str]
    env_vars: dict[str, str]
    required_variable: str | None


def _requirements(call: Call) -> Requirements:
    """The files, folders and variables that a command needs."""
    outputs: list[Any] = []
    inputs: list[Any] = []
    for name, value in call.arguments.items():
        if (call.name, name) in (("precompute", "store"), ("train", "bundle")) or name in (
            "out",
            "folder",
        ):
            outputs.append(value)
        elif name in ("data", "store", "bundle", "images"):
            inputs.append(value)
        elif isinstance(value, SourceConfig):
            inputs += [value.images, None if value.drop == drop_list.TAKE_BACK else value.drop]
        elif isinstance(value, EvaluateConfig):
            inputs.append(value.store)
        elif isinstance(value, ScoreConfig):
            inputs += [value.base, value.store]
        elif isinstance(value, BodyConfig) and networks.is_weights_file(value.weights):
            inputs.append(mirrors.uri_of(Path(value.weights)) or value.weights)
    env_vars: dict[str, str] = {}
    required_variable = None
    tracking = call.arguments.get("tracking")
    if isinstance(tracking, TrackingConfig):
        from_environment = os.environ.get("MLFLOW_TRACKING_URI")
        uri = tracking.tracking_uri or from_environment
        if uri is None:
            required_variable = "MLFLOW_TRACKING_URI"
        else:
            _check_no_secret(uri)
            if file := re.fullmatch(r"(?:sqlite:///|file:(?://)?)?(?!\w+:)(.+)", uri):
                outputs.append(file[1])
        if from_environment and not tracking.tracking_uri:
            env_vars["MLFLOW_TRACKING_URI"] = from_environment
    return Requirements(
        _local_paths(outputs + inputs), _local_paths(inputs), env_vars, required_variable
    )


def _local_paths(values: list[Any]) -> list[str]:
    """The values that are paths: no None, no address in an object store or MLflow."""
    paths = [os.fspath(value).removeprefix("file://") for value in values if value is not None]
    models = ("models:/", "runs:/")
    return [path for path in paths if not mirrors.is_address(path) and not path.startswith(models)]


def _check_no_secret(uri: str) -> None:
    """Raise ConfigError for the address of a tracking store that would show a secret in a job."""
    if re.search(r"\$[{(\w]", uri):  # Ray replaces ${NAME} from the head node's environment
        raise ConfigError(
            "The address of the MLflow store holds a variable ($…).",
            "the address itself: everyone who may list jobs would see the variable's value.",
            "write out the address; if it has a password, set MLFLOW_TRACKING_URI where the"
            " cluster is started.",
        )
    if secrets_of(uri):
        raise ConfigError(
            "The address of the MLflow store holds a password.",
            "an address without one: everyone who may list jobs sees it.",
            "set MLFLOW_TRACKING_URI where the cluster is started, and unset it here.",
        )


def _with_workers(call: Call, capacity: int) -> list[str]:
    """The call's tokens, with --workers added if the command has that flag and it is not set."""
    launch = call.arguments.get("launch")
    if not isinstance(launch, LaunchConfig):
        return call.tokens
    if launch.address is not None:
        raise ConfigError(
            f"`{call.name}` has --address {launch.address}, but it will run inside a cluster.",
            "the address of the cluster's job server, before --.",
            f"write {program()} submit --address URL -- {call.name} …",
        )
    table = Toml(call.config).config.get(call.name, {}) if call.config else {}
    if "workers" in table or any(re.match(r"--workers(=|$)", token) for token in call.tokens):
        return call.tokens
    decodes = call.name in worker_choice.DECODING_COMMANDS
    workers = f"1:{capacity}" if decodes and capacity > 1 else "1"
    return [call.name, "--workers", workers, *call.tokens[1:]]


def _follow(
    cluster: Any,
    job_id: str,
    screen: Screen,
    output: Output,
    logs_command: str,
    details: dict[str, Any],
    started: str | None = None,
) -> int:
    """Show a job's log until it ends.

    Args:
        cluster: The job's cluster.
        job_id: The job.
        screen: Where to show the log.
        output: How to print the result.
        logs_command: The command that follows the job again, shown after Ctrl-C.
        details: Further keys of the result.
        started: A first line. Its reader may press Ctrl-C at once.

    Returns:
        The job's exit code, or 130 if Ctrl-C leaves it running.
    """
    from arrowhead.runtime import jobs

    try:
        if started:
            screen.print(started)
        job = jobs.follow_job(cluster, job_id, screen.print)
        status, code = job.status, job.exit_code or 0
    except KeyboardInterrupt:
        signals.mark_handled()
        status, code = "RUNNING", 130
        screen.print("")  # the terminal has shown ^C
        screen.print(f"The job is still running. To follow it again: {logs_command}")
    if code == 127:
        screen.print(
            "`python` is not on the PATH of the head node, or Arrowhead is not installed in it."
        )
    exit_code = None if status == "RUNNING" else code
    finish({"job_id": job_id, "status": status, "exit_code": exit_code} | details, output)
    return code


JobId = Annotated[
    str, Parameter(name="id", help="The job's id, as `submit` and `jobs list` show it.")
]


def jobs_list(*, cluster: ToCluster = ClusterConfig(), output: Out = Output()) -> int:
    """List the jobs of a cluster, oldest first.

    Example: arrowhead jobs list
    """
    from arrowhead.runtime import jobs

    server = jobs.connect(cluster)
    listed = jobs.list_jobs(server)
    if output.json:
        print_result({"address": server.url, "jobs": [asdict(job) for job in listed]})
        return 0
    screen = Screen(to_stderr=False)
    for job in listed:
        began = strftime("%Y-%m-%d %H:%M", localtime(job.began)) if job.began else "-" * 16
        code = "" if job.exit_code is None else f" {job.exit_code}"
        screen.print(f"{job.job_id}  {began}  {job.status + code:<13}  {job.command}")
    if not listed:
        screen.print(f"{server.url} has no jobs.")
    return 0


def jobs_logs(
    job_id: JobId,
    *,
    follow: Annotated[
        bool, Parameter(help="Wait until the job ends, and return its exit code.")
    ] = False,
    cluster: ToCluster = ClusterConfig(),
    output: Out = Output(),
) -> int:
    """Show a job's log. With --follow, Ctrl-C leaves the job running.

    Example: arrowhead jobs logs raysubmit_VLSAnCQLcPmMnJm2 --follow
    """
    from arrowhead.runtime import jobs

    server = jobs.connect(cluster)
    screen = Screen(to_stderr=output.json)
    if follow:
        same_command = shell_command(["arrowhead", *sys.argv[1:]])
        return _follow(server, job_id, screen, output, same_command, {"address": server.url})
    for line in jobs.read_log(server, job_id):
        screen.print(line)
    if output.json:
        print_result({"address": server.url} | asdict(jobs.get_job(server, job_id)))
    return 0


def jobs_stop(
    job_id: JobId, *, cluster: ToCluster = ClusterConfig(), output: Out = Output()
) -> int:
    """Stop a job. Finished work is kept; submit the same command again to continue.

    Example: arrowhead jobs stop raysubmit_VLSAnCQLcPmMnJm2
    """
    from arrowhead.runtime import jobs

    server = jobs.connect(cluster)
    stopped = jobs.stop_job(server, job_id)
    if not output.json:
        state = "is stopping" if stopped else "had already ended"
        Screen(to_stderr=False).print(f"job {job_id} {state}")
    return finish({"job_id": job_id, "address": server.url, "stopped": stopped}, output)
