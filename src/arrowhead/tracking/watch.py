"""Shows the state of a running command from its MLflow run.

    Watch      finds a run in a store by id or name, or the newest
      -> look  View: its stages, their progress and bottleneck; the machine's load
    lines      a View as text

It only reads the tracking store, so it works from any machine that reaches the store.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from time import monotonic, time
from typing import Any

from arrowhead.errors import ConfigError
from arrowhead.features import extract
from arrowhead.tracking import client as tracking_client
from arrowhead.tracking.address import without_secrets
from arrowhead.tracking.client import TrackingConfig
from arrowhead.wording import pluralize

Recorded = Any  # a run as MLflow's client gives it
QUIET_SECONDS = 60.0  # without news: the run may be dead
MAX_STAGES = 20  # children shown; those of a grid come after its training
BAR_CHARS = 12
EXIT_CODES = {"FINISHED": 0, "KILLED": 130, "FAILED": 1}
PARENT = "mlflow.parentRunId"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One run of a command: the parent run or a child.

    Attributes:
        seconds: duration so far.
        images: done, total, faults, and rate (img/s since its start).
        busy: seconds by step of the extraction.
        epoch: the last finished one, counted from 0; of `epochs`.
        stacks: for heads trained together: part -> epoch, heads and the best metric.
        figures: the newest losses and metrics by name.
    """

    name: str
    status: str
    seconds: float
    images: dict[str, float] = field(default_factory=dict)
    busy: dict[str, float] = field(default_factory=dict)
    epoch: int | None = None
    epochs: int | None = None
    stacks: dict[str, dict[str, float]] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """A run at one moment.

    Attributes:
        machine: the newest system metrics of the driver's machine, by MLflow's names.
        quiet: seconds since something in the run changed, while it was watched.
    """

    run_id: str
    facts: dict[str, str]
    stages: list[Stage]
    machine: dict[str, float]
    quiet: float
    trouble: str | None = None
    """Why the store did not answer this time; the rest is from the last answer."""

    @property
    def status(self) -> str:
        """MLflow's status of the parent run."""
        return self.stages[0].status

    @property
    def running(self) -> bool:
        """Whether the run has not ended."""
        return self.status not in EXIT_CODES

    @property
    def code(self) -> int:
        """The exit code of its command according to the status; 0 while it is running."""
        return EXIT_CODES.get(self.status, 0)

    def plain(self) -> dict[str, Any]:
        """The view as a dict for JSON."""
        return {"status": self.status} | dataclasses.asdict(self)


class Watch:
    """A run to look at; use it as a context manager.

    Args:
        config: the tracking store and experiment.
        word: the run's id or its first characters, or its name (the newest of that name);
            None: the newest run.

    Raises:
        ConfigError: if the store cannot be read or has no such run.
    """

    def __init__(self, config: TrackingConfig, word: str | None = None) -> None:
        self._config, self._word = config, word
        self._open = ExitStack()
        self._view: View | None = None
        self._changed = monotonic()

    def __enter__(self) -> Watch:
        what = f"run {self._word}" if self._word else "the newest run"
        self._client = self._open.enter_context(
            tracking_client.open_for_reading(self._config, what)
        )
        self._run_id = _find_run_id(self._client, self._config, self._word)
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._open.__exit__(*error)

    def look(self) -> View:
        """The run as it is now. If the store does not answer, the view before, with the trouble."""
        try:
            view = self._look()
        except Exception as error:
            if self._view is None:
                raise
            self._view = dataclasses.replace(
                self._view,
                quiet=monotonic() - self._changed,
                trouble=tracking_client.first_line(error)[:200],
            )
            return self._view
        if self._view is None or _comparable(view) != _comparable(self._view):
            self._changed = monotonic()
        self._view = dataclasses.replace(view, quiet=monotonic() - self._changed)
        return self._view

    def _look(self) -> View:
        run = self._client.get_run(self._run_id)
        below = self._client.search_runs(
            [run.info.experiment_id],
            f"tags.`{PARENT}` = '{self._run_id}'",
            order_by=["attributes.start_time ASC"],
            max_results=MAX_STAGES,
        )
        children = [one for one in below if one.data.tags.get("part") != "grid"]
        metrics = run.data.metrics
        epochs = run.data.params.get("train.epochs")
        return View(
            run_id=self._run_id,
            facts={k: run.data.tags[k] for k in ("dataset", "body") if k in run.data.tags},
            stages=[self._stage(one, epochs) for one in (run, *children)],
            machine={k: v for k, v in metrics.items() if k.startswith("system/")},
            quiet=0.0,
        )

    def _stage(self, run: Recorded, epochs: str | None) -> Stage:
        metrics = run.data.metrics
        progress = {
            name.removeprefix("progress."): value
            for name, value in metrics.items()
            if name.startswith("progress.")
        }
        busy = {
            name.removeprefix("seconds."): progress.pop(name)
            for name in list(progress)
            if name.startswith("seconds.")
        }
        stacks: dict[str, dict[str, float]] = {}
        for name in [name for name in progress if "." in name]:
            part, _, figure = name.partition(".")
            stacks.setdefault(part, {})[figure] = progress.pop(name)
        epoch = None
        if "train_loss" in metrics:
            history = self._client.get_metric_history(run.info.run_id, "train_loss")
            epoch = max(point.step for point in history)
        figures = ("train_loss", "valid_loss", "accuracy", "f2", "rate")
        ended = run.info.end_time or time() * 1000
        return Stage(
            name=str(run.info.run_name),
            status=str(run.info.status),
            seconds=max(0.0, (ended - run.info.start_time) / 1000),
            images=progress,
            busy=busy,
            epoch=epoch,
            epochs=int(epochs) if epochs and epochs.isdigit() and epoch is not None else None,
            stacks=stacks,
            figures={name: metrics[name] for name in figures if name in metrics},
        )


def _comparable(view: View) -> Any:
    """The part of a view that changes only when something happened."""
    state = dataclasses.replace(view, quiet=0.0, trouble=None).plain()
    for stage in state["stages"]:
        del stage["seconds"]
    return state


def _find_run_id(client: Any, config: TrackingConfig, word: str | None) -> str:
    """The id of the run that a word names."""
    where = without_secrets(config.uri)
    experiment = client.get_experiment_by_name(config.experiment)
    latest: list[str] = []
    runs = (
        tracking_client.search(client, experiment.experiment_id, order="DESC") if experiment else ()
    )
    for run in runs:
        if PARENT in run.data.tags:
            continue
        if word is None or run.info.run_name == word or run.info.run_id.startswith(word):
            return str(run.info.run_id)
        latest += [f"{run.info.run_name} {run.info.run_id[:8]}"] if len(latest) < 5 else []
    if word and word.startswith("raysubmit_"):
        do = f"a job's log is shown by `arrowhead jobs logs {word} --follow`."
    elif latest:
        do = f"give one of the latest: {', '.join(latest)}."
    else:
        do = "give --experiment, --tracking-uri or MLFLOW_TRACKING_URI as the command has them."
    raise ConfigError(
        f"There is no {f'run {word!r}' if word else 'run'} in the experiment"
        f" {config.experiment!r} of {where}.",
        "the id of a run or its first letters, its name, or nothing for the newest.",
        do,
    )


# ------------------------------------------------------------------------------ as text


def lines(view: View) -> list[str]:
    """A View as lines of text: the run, its stages, the machine, and what is wrong."""
    command = view.stages[0]
    since = f"{'for' if view.running else 'after'} {_span(command.seconds)}"
    title = [f"{command.name} {view.run_id[:8]}", f"{view.status.lower()} {since}"]
    text = [" · ".join([*title, *view.facts.values()])]
    wide = max(len(stage.name) for stage in view.stages)
    for stage in view.stages:
        text += [
            f"  {stage.name:<{wide}}  {words}" for words in _words(stage, stage is not command)
        ]
    if view.running and view.machine:
        text.append(f"  {'machine':<{wide}}  {_load(view.machine)}")
    if view.trouble:
        text.append(f"  the store does not answer: {view.trouble}")
    if view.running and view.quiet > QUIET_SECONDS:
        text.append(
            f"  nothing new for {_span(view.quiet)}. If its process is gone, run the same command"
            " again: it continues where it stopped"
        )
    return text


def _words(stage: Stage, child: bool) -> Iterator[str]:
    """The progress of a stage; nothing for a run that only has children."""
    if stage.images:
        yield _images(stage)
    for part, figures in stage.stacks.items():
        named = {k: v for k, v in figures.items() if k not in ("epoch", "heads")}
        best = "".join(f" · best {name} {value:.4f}" for name, value in named.items())
        many = pluralize(round(figures["heads"]), "head")
        yield f"{part}: epoch {figures['epoch']:.0f} · training {many}{best}"
    if stage.epoch is not None:
        of = f" of {stage.epochs}" if stage.epochs else ""
        metrics = {k.replace("_", " "): v for k, v in stage.figures.items() if k != "rate"}
        words = [f"{name} {value:.3g}" for name, value in metrics.items()]
        yield " · ".join([f"epoch {stage.epoch + 1}{of}", *words])
    elif child and not (stage.images or stage.stacks):
        yield f"{stage.status.lower()}, {_span(stage.seconds)}"


def _images(stage: Stage) -> str:
    images = stage.images
    done, total = images.get("images", 0), images.get("total", 0)
    rate, faults = images.get("rate", 0.0), images.get("faults", 0)
    share = done / total if total else 1.0
    bar = "█" * int(BAR_CHARS * share) + "░" * (BAR_CHARS - int(BAR_CHARS * share))
    parts = [f"{bar} {done:.0f}/{total:.0f}", f"{rate:.1f} img/s"]
    if stage.status == "RUNNING" and rate and done < total:
        parts.append(f"{_span((total - done) / rate)} left")
    parts += [pluralize(round(faults), "fault")] if faults else []
    if stage_name := extract.bottleneck(stage.busy):
        part = stage.busy[stage_name] / sum(stage.busy.values())
        parts.append(f"bound by {stage_name} ({100 * part:.0f} %)")
    return " · ".join(parts)


def _load(machine: Mapping[str, float]) -> str:
    """The most useful of MLflow's system metrics, as text."""
    shown = []
    for name, words in (
        ("cpu_utilization_percentage", "processor {:.0f} %"),
        ("system_memory_usage_percentage", "memory {:.0f} %"),
        ("disk_usage_percentage", "disk {:.0f} % full"),
    ):
        value = machine.get(f"system/{name}")
        shown += [words.format(value)] if value is not None else []
    for name, value in sorted(machine.items()):
        chip, _, figure = name.removeprefix("system/").partition("_utilization")
        if chip.startswith("gpu_") and figure:
            full = machine.get(f"system/{chip}_memory_usage_percentage")
            memory = "" if full is None else f", memory {full:.0f} %"
            shown.append(f"{chip.replace('_', ' ')} {value:.0f} %{memory}")
    return " · ".join(shown)


def _span(seconds: float) -> str:
    """A duration for people: 42 s, 3 min 5 s, 2 h 10 min."""
    total = int(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    return f"{total // 3600} h {total % 3600 // 60} min"
