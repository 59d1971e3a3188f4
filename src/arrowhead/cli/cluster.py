"""Verbs of a cluster: a command sent there, and the jobs that it has."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import localtime, strftime
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Group, Parameter
from cyclopts.config import Toml

from arrowhead.cli.app import app, configure, entry, finish, give, me, say_next, verb_in
from arrowhead.cli.options import Out, Output, ToCluster
from arrowhead.cli.screen import Screen
from arrowhead.data.source_config import SourceConfig
from arrowhead.errors import ConfigError
from arrowhead.features.backbone import FILES as WEIGHT_FILES
from arrowhead.features.backbone import BodyConfig
from arrowhead.inference.evaluate import EvaluateConfig
from arrowhead.inference.score_request import ScoreConfig
from arrowhead.runtime import signals
from arrowhead.runtime.jobs import ClusterConfig
from arrowhead.runtime.ray_cluster import LaunchConfig
from arrowhead.tracking.address import secrets_of, without_secret
from arrowhead.tracking.client import TrackingConfig
from arrowhead.wording import command

# --------------------------------------------------------------------------- a cluster

# Verbs that belong to the machine of whoever types them.
ELSEWHERE = ("submit", "jobs", "watch", "demo")
MANY = ("fit", "precompute", "score", "evaluate")  # what takes workers and decodes images


def submit(
    *words: Annotated[
        str, Parameter(name="verb", help="After --: a verb, its arguments and its flags.")
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
        Parameter(negative="--no-follow", help="Show the job's log and end with its exit code."),
    ] = True,
    output: Out = Output(),
) -> int:
    """Run a verb on a Ray cluster: checked here, run there, its log and exit code brought back.

    Only Arrowhead's source and the verb's --config file are sent, never data. The job stands in
    the folder you stand in; on other machines that takes --shared, and addresses (s3://…) need
    nothing. Without --workers, `fit`, `precompute` and `score` get --workers 1:N, N being the
    cluster's GPUs (CPUs where it has none), `train` and `lr-find` one worker. Ctrl-C leaves the
    job running. The token is taken from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.

    Example: arrowhead submit -- fit photos/ out/ --epochs 10
    """
    from arrowhead.runtime import jobs

    if not words:
        raise ConfigError("Nothing to submit.", "a verb after --.", "see arrowhead submit --help.")
    outer = next((Path(one.path) for one in app.config if isinstance(one, Toml)), None)
    call = parse_command(list(words), outer)
    if call is None:  # --help, and it has been shown
        return 0
    places, variables, need, inputs = _needs(call)
    there = jobs.connect(cluster)
    folder = jobs.standing(there, shared or [], places)
    jobs.must_be_there(there, shared or [], folder, inputs)
    if folder is not None:
        need = None
    screen = Screen(to_stderr=output.json)
    if there.token is None:
        screen.say(f"{there.url} asks for no token: whoever reaches it can run code there.")
    job_id, size = jobs.submit(
        there,
        _with_workers(call, there.units),
        folder=folder,
        config=call.config,
        variables=variables,
        need=need,
    )
    away = "" if cluster.address is None else f" --address {there.url}"
    away += " --insecure" if cluster.insecure else ""
    back = f"{me()} jobs logs {job_id} --follow{away}"
    began = f"job {job_id} at {there.url}: {size / 1e6:.2f} MB sent"
    sent = {"address": there.url, "uploaded_bytes": size}
    if follow:
        return _followed(there, job_id, screen, output, back, sent, began)
    screen.say(began)
    say_next(screen, [back, f"{me()} jobs stop {job_id}{away}"])
    job = jobs.look(there, job_id)
    finish({"job_id": job_id, "status": job.status, "exit_code": job.exit_code} | sent, output)
    return 0


@dataclass(frozen=True, slots=True)
class Call:
    """A verb's command line, understood: its function and what that is given; the tokens without
    --config, and that file.
    """

    verb: Callable[..., Any]
    given: dict[str, Any]
    tokens: list[str]
    config: Path | None

    @property
    def name(self) -> str:
        """As it is typed."""
        return self.tokens[0]


def parse_command(words: list[str], config: Path | None = None) -> Call | None:
    """What a command line asks for, without doing it; None if that was help, which is shown.

    config: a TOML file that counts when the words name none. Raises ConfigError for what the verb
    would refuse at its start, and for a verb that has no place on a cluster.
    """
    quiet: dict[str, Any] = {"exit_on_error": False, "print_error": False}
    if words[0] in ELSEWHERE:
        raise ConfigError(
            f"`{words[0]}` is not for a cluster.",
            "a verb that works on data: fit, precompute, lr-find, train, score, export, …",
            f"run `{me()} {words[0]}` here.",
        )
    before, app.config = app.config, ()  # a file named before is not for these words
    try:
        entry_point, outer, _ = app.meta.parse_args(words, **quiet)
        if entry_point is not entry:
            entry_point(*outer.args, **outer.kwargs)
            return None
        tokens = list(outer.args)
        configure(file := outer.kwargs.get("config") or config)
        verb, bound, _ = app.parse_args(tokens, **quiet)
    except CycloptsError as error:
        raise ConfigError(
            without_secret(str(error).strip().replace("\n", " ")),
            "a verb, its arguments and its flags, as --help lists them.",
            f"run {me()} {verb_in(words)}--help.",
        ) from error
    finally:
        app.config = before
    bound.apply_defaults()
    return Call(verb, dict(bound.arguments), tokens, file)


def _needs(call: Call) -> tuple[list[str], dict[str, str], str | None, list[str]]:
    """Files and folders of this machine that a verb names; variables of ours that its job gets;
    a variable that the head node must have where the job cannot stand in this folder; and of the
    files and folders those that must be there before it begins.
    """
    from arrowhead.data import path_text

    named: list[Any] = []
    read: list[Any] = []
    for name, value in call.given.items():
        if (call.name, name) in (("precompute", "store"), ("train", "bundle")) or name == "out":
            named.append(value)
        elif name in ("data", "store", "bundle", "images"):
            read.append(value)
        elif isinstance(value, SourceConfig):
            read.append(value.images)
        elif isinstance(value, EvaluateConfig):
            read.append(value.store)
        elif isinstance(value, ScoreConfig):
            read += [value.base, value.store]
        elif isinstance(value, BodyConfig) and Path(value.weights).suffix in WEIGHT_FILES:
            read.append(value.weights)
    variables: dict[str, str] = {}
    need = None
    tracking = call.given.get("tracking")
    if isinstance(tracking, TrackingConfig):
        own = os.environ.get("MLFLOW_TRACKING_URI")
        uri = tracking.tracking_uri or own
        if uri is None:
            need = "MLFLOW_TRACKING_URI"
        else:
            _must_hide_nothing(uri)
            if file := re.fullmatch(r"(?:sqlite:///|file:(?://)?)?(?!\w+:)(.+)", uri):
                named.append(file[1])
        if own and not tracking.tracking_uri:
            variables["MLFLOW_TRACKING_URI"] = own

    def local(ones: list[Any]) -> list[str]:
        places = [os.fspath(one).removeprefix("file://") for one in ones if one is not None]
        models = ("models:/", "runs:/")
        return [one for one in places if not path_text.in_store(one) and not one.startswith(models)]

    return local(named + read), variables, need, local(read)


def _must_hide_nothing(uri: str) -> None:
    """Refuse the address of a store that whoever may list jobs should not see."""
    if re.search(r"\$[{(\w]", uri):  # Ray fills ${NAME} in from the head's environment
        raise ConfigError(
            "The address of the MLflow store holds a variable ($…).",
            "the address itself: what is filled in would be seen by whoever may list jobs.",
            "write the address out; one with a password is set as MLFLOW_TRACKING_URI where the"
            " cluster is started.",
        )
    if secrets_of(uri):
        raise ConfigError(
            "The address of the MLflow store holds a password.",
            "an address without: whoever may list jobs sees it.",
            "set MLFLOW_TRACKING_URI where the cluster is started, and unset it here.",
        )


def _with_workers(call: Call, units: int) -> list[str]:
    """The tokens, with workers for a verb that takes them and was not told how many."""
    launch = call.given.get("launch")
    if not isinstance(launch, LaunchConfig):
        return call.tokens
    if launch.address is not None:
        raise ConfigError(
            f"`{call.name}` is given --address {launch.address}, but it will run inside a cluster.",
            "the address of the cluster's job server, before --.",
            f"{me()} submit --address URL -- {call.name} … without --address.",
        )
    table = Toml(call.config).config.get(call.name, {}) if call.config else {}
    if "workers" in table or any(re.match(r"--workers(=|$)", token) for token in call.tokens):
        return call.tokens
    workers = f"1:{units}" if call.name in MANY and units > 1 else "1"
    return [call.name, "--workers", workers, *call.tokens[1:]]


def _followed(
    cluster: Any,
    job_id: str,
    screen: Screen,
    output: Output,
    back: str,
    sent: dict[str, Any],
    began: str | None = None,
) -> int:
    """Show a job's log until it ends; its exit code, or 130 when Ctrl-C leaves it running.

    began: a line to begin with. Whoever reads it may press Ctrl-C at once.
    """
    from arrowhead.runtime import jobs

    try:
        if began:
            screen.say(began)
        job = jobs.follow(cluster, job_id, screen.say)
        status, code = job.status, job.exit_code or 0
    except KeyboardInterrupt:
        signals.handled()
        status, code = "RUNNING", 130
        screen.say("")  # the terminal has shown ^C
        screen.say(f"The job goes on. To come back: {back}")
    if code == 127:
        screen.say("`python` is not on the PATH of the head node, or there is no Arrowhead in it.")
    ended = None if status == "RUNNING" else code
    finish({"job_id": job_id, "status": status, "exit_code": ended} | sent, output)
    return code


jobs_app = App(
    name="jobs",
    help="The jobs of a cluster: list them, read their logs, stop them.",
    sort_key=9,
    default_parameter=Parameter(negative=""),
    suppress_keyboard_interrupt=False,
)
JobId = Annotated[str, Parameter(name="id", help="The job's id, as `submit` and `jobs list` say.")]


@jobs_app.command(name="list")
def jobs_list(*, cluster: ToCluster = ClusterConfig(), output: Out = Output()) -> int:
    """The jobs that the cluster knows, oldest first.

    Example: arrowhead jobs list
    """
    from arrowhead.runtime import jobs

    there = jobs.connect(cluster)
    found = jobs.listed(there)
    if output.json:
        give({"address": there.url, "jobs": [asdict(job) for job in found]})
        return 0
    screen = Screen(to_stderr=False)
    for job in found:
        began = strftime("%Y-%m-%d %H:%M", localtime(job.began)) if job.began else "-" * 16
        code = "" if job.exit_code is None else f" {job.exit_code}"
        screen.say(f"{job.job_id}  {began}  {job.status + code:<13}  {job.command}")
    if not found:
        screen.say(f"{there.url} has no jobs.")
    return 0


@jobs_app.command(name="logs")
def jobs_logs(
    job_id: JobId,
    *,
    follow: Annotated[
        bool, Parameter(help="Go on until the job ends, with its exit code.")
    ] = False,
    cluster: ToCluster = ClusterConfig(),
    output: Out = Output(),
) -> int:
    """What a job has written. With --follow Ctrl-C leaves the job running.

    Example: arrowhead jobs logs raysubmit_VLSAnCQLcPmMnJm2 --follow
    """
    from arrowhead.runtime import jobs

    there = jobs.connect(cluster)
    screen = Screen(to_stderr=output.json)
    if follow:
        back = command(["arrowhead", *sys.argv[1:]])
        return _followed(there, job_id, screen, output, back, {"address": there.url})
    for line in jobs.logs(there, job_id):
        screen.say(line)
    if output.json:
        give({"address": there.url} | asdict(jobs.look(there, job_id)))
    return 0


@jobs_app.command(name="stop")
def jobs_stop(
    job_id: JobId, *, cluster: ToCluster = ClusterConfig(), output: Out = Output()
) -> int:
    """End a job. What it had finished is kept; the same command goes on from there.

    Example: arrowhead jobs stop raysubmit_VLSAnCQLcPmMnJm2
    """
    from arrowhead.runtime import jobs

    there = jobs.connect(cluster)
    was = jobs.stop(there, job_id)
    if not output.json:
        Screen(to_stderr=False).say(f"job {job_id} {'is told to end' if was else 'had ended'}")
    return finish({"job_id": job_id, "address": there.url, "stopped": was}, output)
