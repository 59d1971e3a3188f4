"""What stages report, shown to people and recorded in MLflow.

    Screen, Means      where it goes: a terminal, a notebook, nowhere; a run, or none
    Told               of a study: epochs, curves, restarts, each once
    say_…              one line for a person
    show_…             lines, figures and tables, also kept with the run

Stages know none of this; `pipeline` gives it to them as plain functions.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import localtime, monotonic, strftime
from typing import Any, Protocol

import numpy as np

from arrowhead import calibration, extract, metrics, recording, report, shards, sweep
from arrowhead.bundle import NO_GOLDEN_IMAGES, Bundle
from arrowhead.cluster import LaunchConfig
from arrowhead.evaluate import for_tables
from arrowhead.lr_finder import Curve
from arrowhead.novelty import Novelty
from arrowhead.plan import Catalog
from arrowhead.score import Held, ScoreConfig
from arrowhead.shards import Store
from arrowhead.study import Learned, OutOfFold, Study
from arrowhead.tracking import Run
from arrowhead.train import TrainConfig, Trained
from arrowhead.wording import counted

# ------------------------------------------------------------------------ what stages are run with

Advance = Callable[[int, int, str], None]


class Screen(Protocol):
    """Where stages are shown."""

    def say(self, line: str) -> None:
        """One line for a person."""

    def passing(self, line: str) -> None:
        """A line whose place the next line takes, where a screen can do that."""

    def bar(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """A progress line of `total` images; inside, call with (more done, more faults, the stage
        that binds).
        """


class Silence:
    """A screen that shows nothing."""

    def say(self, line: str) -> None:
        """Nothing."""

    def passing(self, line: str) -> None:
        """Nothing."""

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Advance]:
        """Nothing."""
        yield lambda done, faults, binding: None


@dataclass(frozen=True, kw_only=True, slots=True)
class Means:
    """What a stage is run with: where, what it is shown on, and the MLflow run, if any."""

    launch: LaunchConfig = LaunchConfig()
    screen: Screen = Silence()
    run: Run | None = None
    parent: Run | None = None
    """The run above `run`: what the whole command read is recorded there."""

    @property
    def top(self) -> Run | None:
        """The parent run, or the only one."""
        return self.parent or self.run


@contextmanager
def child(means: Means, name: str) -> Iterator[Means]:
    """The same means with a run of their own below the run, if there is one."""
    if means.run is None:
        yield means
        return
    with means.run.child(name) as run:
        yield dataclasses.replace(means, run=run, parent=means.top)


def params(means: Means, values: dict[str, Any]) -> None:
    """Settings, recorded if there is a run."""
    if means.run:
        means.run.params(values)


# -------------------------------------------------------------------------- extraction and scoring


@dataclass(slots=True)
class Work:
    """What workers reported, added up."""

    decoded: int = 0
    looked_up: int = 0
    fallback: int = 0
    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))
    workers: int = 1
    drift: dict[str, Any] | None = None
    """The largest that a worker found (see `bundle.Drift`)."""
    files: int = 0
    faults: int = 0

    def add(self, message: dict[str, Any]) -> None:
        """A finished chunk (see `extract.tell`)."""
        self.files += message["files"]
        self.faults += sum(message["faults"].values())
        self.decoded += message["decoded"]
        self.looked_up += message["looked_up"]
        self.fallback += message["fallback"]
        for stage, seconds in message["seconds"].items():
            self.seconds[stage] += seconds


EVERY = 5.0  # seconds between two records of how far a stage is


class Progress:
    """How far a stage is, recorded every few seconds for `arrowhead watch`. The step is the number
    of images that are done, so a run that is taken up again goes on where it was.
    """

    def __init__(self, run: Run | None, work: Work, there: int, total: int) -> None:
        self._run, self._work, self._there, self._total = run, work, there, total
        self._began = self._last = monotonic()
        self._recorded = -1
        self.now()

    def __call__(self) -> None:
        """Record, if it is time."""
        if monotonic() - self._last >= EVERY:
            self.now()

    def now(self) -> None:
        """Record, once for each number of images."""
        self._last = monotonic()
        work, done = self._work, self._there + self._work.files
        if self._run is None or done == self._recorded:
            return
        self._recorded = done
        busy = {f"progress.seconds.{k}": work.seconds.get(k, 0.0) for k in extract.STAGES}
        rate = work.files / max(self._last - self._began, 1e-9)
        figures = {"images": done, "total": self._total, "faults": work.faults, "rate": rate}
        self._run.record({f"progress.{k}": v for k, v in figures.items()} | busy, step=done)


def labels(means: Means, verb: str) -> dict[str, str]:
    """What a stage's measures are marked with."""
    return {"run": means.top.run_id if means.top else "none", "verb": verb}


def say_source(catalog: Catalog, screen: Screen) -> None:
    """How a source was read, and what is to be learned from it."""
    for note in catalog.notes:
        screen.say(note)
    if catalog.classes:
        screen.say(_task(catalog))


def _task(catalog: Catalog) -> str:
    """What is learned: how many labels each, the number of classes and the first names."""
    classes = catalog.classes
    more = f" and {len(classes) - 6} more" if len(classes) > 6 else ""
    kind = "several labels for each image" if catalog.multi else "one label for each image"
    return (
        f"task: {kind}, {counted(len(classes), 'class', 'classes')}: {', '.join(classes[:6])}{more}"
    )


def say_split(listed: Catalog, drawn: Catalog, screen: Screen) -> None:
    """How many images train and validate where that was drawn; which classes cannot be validated.

    listed: the catalog with "" where a split was to be drawn; drawn: the same with all splits.
    """
    parts = Counter(drawn.splits)
    if "" in listed.splits:
        screen.say(
            f"split by content, class by class: {counted(parts['train'], 'image')} to train,"
            f" {parts['valid']} to validate"
        )
    validated = {
        name
        for names, split in zip(drawn.labels, drawn.splits, strict=True)
        if split == "valid"
        for name in names
    }
    if missing := sorted(set(drawn.classes) - validated):
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        screen.say(
            f"no image validates {', '.join(missing[:10])}{more}: too few different images of"
            f" {'these classes' if len(missing) > 1 else 'this class'}, which train all the same"
        )


def say_classes(store: Store, catalog: Catalog, screen: Screen) -> None:
    """Say what is no class though it looks like one, and how the classes changed since last."""
    for folder in catalog.empty:
        screen.say(f"{folder}/ holds no image: it is not a class")
    if not (store.path / "manifest.json").is_file():
        return
    before, now = set(store.manifest()["classes"]), set(catalog.classes)
    if before != now:
        gone, new = ", ".join(sorted(before - now)), ", ".join(sorted(now - before))
        screen.say(
            f"the classes of {store.path} change: {f'gone {gone}' if gone else ''}"
            f"{'; ' if gone and new else ''}{f'new {new}' if new else ''}."
            " Heads trained before keep the classes they were trained with."
        )


def say_account(path: Path, screen: Screen) -> None:
    """What a finished store holds, on one line."""
    store = Store(path)
    manifest, catalog = store.manifest(), Catalog(**store.read_catalog())
    files = sum(one["files"] for one in manifest["shards"])
    faults = sum(one["faults"] for one in manifest["shards"])
    screen.say(_account(files - faults, faults, catalog.ignored))
    screen.say(_task(catalog))


def _account(features: int, faults: int, ignored: int) -> str:
    return (
        f"{counted(features + faults + ignored, 'input')} = {counted(features, 'feature')}"
        f" + {counted(faults, 'fault')}"
        f" + {ignored} ignored"
    )


def say_counts(means: Means, counts: dict[str, int], done: Work) -> None:
    """What an extraction came to, and what it was bound by."""
    means.screen.say(_account(counts["features"], counts["faults"], counts["ignored"]))
    _say_ways(means.screen, counts, done)


def _say_ways(screen: Screen, counts: dict[str, int], done: Work) -> None:
    """How the images came to features, and what that was bound by."""
    parts = [f"{counts['decoded']} decoded", f"{counts['looked_up']} looked up"]
    parts += [f"{counts['skipped']} skipped: done before"]
    if counts["fallback"]:
        parts.append(f"{counts['fallback']} by the fallback decoder")
    screen.say(" · ".join(parts))
    screen.say(extract.roofline(done.seconds, done.decoded, done.workers))


def say_restart(message: dict[str, Any], screen: Screen) -> None:
    """Why the workers are started again."""
    screen.say(
        f"{message['restart'].rstrip('.')}. The workers are started again; what is done stays."
    )


def say_drift(drift: dict[str, Any], screen: Screen) -> None:
    """How far this machine is from the one that made the bundle (see `bundle.Drift`)."""
    if not drift["images"]:
        screen.say(NO_GOLDEN_IMAGES)
        return
    screen.say(
        f"golden images: {drift['images']} replayed, largest feature drift {drift['feature']:.1g},"
        f" {counted(drift['changed'], 'label')} changed"
    )


def cut_of(loaded: Bundle, config: ScoreConfig) -> float | None:
    """The novelty above which an image is marked; None if nothing is."""
    if not (loaded.novelty and config.flag_novel):
        return None
    cut = loaded.novelty.threshold(config.false_alarms)
    return cut if np.isfinite(cut) else None


def say_scores(
    means: Means, counts: dict[str, int], done: Work, loaded: Bundle, config: ScoreConfig
) -> None:
    """What a scoring came to, and what it was bound by."""
    say = means.screen.say
    ignored = f" ({counted(counts['ignored'], 'other file')} ignored)" if counts["ignored"] else ""
    account = f"{counts['scored']} scored + {counted(counts['faults'], 'fault')}"
    say(f"{counted(counts['inputs'], 'input')} = {account}{ignored}")
    _say_ways(means.screen, counts, done)
    if not (loaded.novelty and config.flag_novel):
        return
    cut, share = cut_of(loaded, config), f"{100 * config.false_alarms:g} %"
    if cut is None:
        say(
            f"no image can be called novel at {share} false alarms: the bundle was validated on"
            f" {counted(len(loaded.novelty.known), 'image')}, too few to say so"
        )
    else:
        say(
            f"{counted(counts['novel'], 'novel image')}: further than {cut:.3f} from the training"
            f" images ({share} of images like them are, too)"
        )


def say_damaged(names: list[str], screen: Screen) -> None:
    """Which parts of the scores are made again because their bytes have changed."""
    for name in names:
        screen.say(f"{name} has changed since it was written: its images are scored again")


def say_faults(kinds: Counter[str], paths: Sequence[str], rows: Path, screen: Screen) -> None:
    """The kinds of the faults, the first files, and where all of them are."""
    if kinds:
        screen.say(
            f"not read: {fault_words(kinds, paths)}; all of them: the rows of {rows} whose column"
            " fault is filled"
        )


def fault_words(kinds: Counter[str], paths: Sequence[str]) -> str:
    """Faults by kind, and the paths of the first files that have one."""
    more = ", …" if kinds.total() > len(paths) else ""
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return f"{counts} ({', '.join(paths)}{more})"


def say_folders(held: Held, screen: Screen) -> None:
    """How many of the images the bundle was made of; how the labels agree with the folders' names,
    where these are the bundle's classes.
    """
    found = held.folders
    if found:
        screen.say(
            f"the folders are named after classes of the bundle: {found.right} of {found.images}"
            f" agree ({percent(found.right, found.images)})"
        )
    if held.trained or held.validated:
        screen.say(
            f"WARNING: the bundle was trained on {held.trained} of these images and validated with"
            f" {held.validated}: how well it does on them says little about others"
        )
    elif held.trained is None and found:
        screen.say(
            "the bundle does not say which images it was trained on: if these are among them, that"
            " figure says little about others"
        )


def percent(right: int, images: int) -> str:
    """A share with its 95 % confidence interval (Wilson)."""
    low, high = metrics.interval(right, images)
    return f"{100 * right / images:.1f} %, 95 % interval {100 * low:.1f} to {100 * high:.1f} %"


def show_scores(result: dict[str, Any], found: Held, out: Path, run: Run) -> None:
    """Counts, seconds and a picture of the predictions, recorded. result: see `inference.score`."""
    counts = {f"labels.{label}": count for label, count in found.labels.items()}
    seconds = {f"seconds.{stage}": value for stage, value in result["seconds"].items()}
    run.record(result["counts"] | counts | seconds | (result["images_used"] or {}))
    names = {"bundle": "bundle_fingerprint", "recipe": "recipe_fingerprint"}
    run.tags({tag: result[name] for tag, name in names.items()})
    run.tags({"trained_by": str(result["trained_by"])})
    run.keep(out / "score.json")
    figure = report.scores_figure(found.labels, found.chances, found.novelties)
    run.keep(report.save(figure, out / "scores.png"), "scores")


# ---------------------------------------------------------------------------------------- learning


MAX_EPOCH_LINES = 30  # on the screen; --json, MLflow and watch have every epoch


class Told:
    """What workers report of a study, shown and recorded; once, however often they start again."""

    def __init__(self, asked: Study, means: Means) -> None:
        self._asked, self._means = asked, means
        self._done: set[Any] = set()
        self._said = self._sent = 0.0
        self._best = -np.inf
        self._unsaid: dict[int, str] = {}  # lines of epochs that were left out so far
        self._points: dict[str, list[tuple[int, float]]] = defaultdict(list)

    def send(self) -> None:
        """Record the epochs that were not recorded yet: one request for all of them."""
        if self._points and self._means.run:
            self._means.run.series(self._points)
        self._points, self._sent = defaultdict(list), monotonic()

    def sized(self, workers: int) -> None:
        """How many workers there are now."""
        if str(self._means.launch.workers) not in ("0", str(workers)):
            self._means.screen.say(f"{workers} worker{'s' if workers > 1 else ''}")

    def __call__(self, message: dict[str, Any]) -> None:
        """Take one report (see `study.learn`)."""
        screen = self._means.screen
        if "restart" in message:
            say_restart(message, screen)
        elif "warning" in message:
            screen.say(message["warning"])
        elif "goes_on" in message:
            done = message["goes_on"]
            screen.say(
                f"{message['part']}: {counted(done, 'epoch')} done before; going on from the"
                " checkpoint"
            )
        elif "curve" in message and "curve" not in self._done:
            self._done.add("curve")
            say_rates(message["curve"], screen)
        elif "lines" in message and (message["part"], message["epoch"]) not in self._done:
            self._done.add((message["part"], message["epoch"]))
            self._epoch(message)

    def _epoch(self, message: dict[str, Any]) -> None:
        part, epoch, lines = message["part"], message["epoch"], message["lines"]
        screen, config = self._means.screen, self._asked.head
        if part == "heads" and not self._asked.sweep.grid:
            if "rate" not in message:
                say_logistic(lines[0], screen)
            else:
                column = _column(lines[0], config.best)
                if epoch == 0:
                    screen.say(HEADING + (f"  {column:>{max(8, len(column))}}" if column else ""))
                line = self._row(lines[0], column)
                if epoch % math.ceil(config.total_epochs / MAX_EPOCH_LINES) == 0:
                    screen.say(line)
                else:
                    self._unsaid[epoch] = line
                    screen.passing(f"{line}  of {config.total_epochs} epochs")
            found = {"rate": message["rate"]} if "rate" in message else {}
            for name, value in (lines[0] | found).items():
                if name != "epoch":
                    self._points[name].append((epoch, value))
            if monotonic() - self._sent > 1:  # a request for each of many short epochs costs more
                self.send()  # than the epochs
            return
        last = epoch + 1 == config.total_epochs
        if last or epoch == 0 or monotonic() - self._said > 2:
            self._said = monotonic()
            name = sweep.figure(config)
            pick = min if name == "valid_loss" else max
            best = pick(line[name] for line in lines.values())
            at = "" if config.head == "logistic" else f"epoch {epoch} · "
            screen.say(
                f"{part} · {at}training {counted(len(lines), 'head')} · best {name} {best:.4f}"
            )
            if self._means.run:
                figures = {"epoch": epoch, "heads": len(lines), name: best}
                found = {f"progress.{part}.{k}": v for k, v in figures.items()}
                self._means.run.record(found, step=epoch)

    def ended(self, made: Learned) -> None:
        """Say the lines of the epoch that is kept and of the last one, if they were left out."""
        if made.heads and self._unsaid:
            one = made.winner
            for epoch in sorted({one.epoch, len(one.epochs) - 1} & self._unsaid.keys()):
                self._means.screen.say(self._unsaid.pop(epoch))

    def _row(self, line: dict[str, float], column: str) -> str:
        """One epoch; a star where what --best names is better than ever before."""
        shown, best = row(line), self._asked.head.best
        if column:
            shown += f"  {line[column]:>{max(8, len(column))}.6f}"
        if best == "last":
            return shown
        value = line[best] * (-1 if best == "valid_loss" else 1)
        better = value > self._best
        self._best = max(self._best, value) if better else self._best
        return shown + " *" * better


def _column(line: dict[str, float], best: str) -> str:
    """What the table of epochs shows beside loss and accuracy, "" for nothing: what --best names;
    of several labels F2, as most of their decisions are an easy no.
    """
    extra = "f2" if "f2" in line else ""
    return best if best in ("balanced_accuracy", "f1") else extra


def say_logistic(line: dict[str, float], screen: Screen) -> None:
    """The figures of logistic regression, and how its strength was chosen."""
    chosen = f" by cross-validation (loss {line['cv_loss']:.4f})" if "cv_loss" in line else ""
    screen.say(f"logistic regression: L2 {line['l2']:.4g} (C {1 / line['l2']:.4g}){chosen}")
    screen.say(
        f"train loss {line['train_loss']:.6f} · valid loss {line['valid_loss']:.6f}"
        f" · accuracy {line['accuracy']:.6f}"
    )


HEADING = f"{'epoch':>5}  {'train loss':>10}  {'valid loss':>10}  {'accuracy':>8}"


def row(line: dict[str, float]) -> str:
    """One epoch in the lesson's columns."""
    return (
        f"{int(line['epoch']):>5}  {line['train_loss']:>10.6f}  {line['valid_loss']:>10.6f}"
        f"  {line['accuracy']:>8.6f}"
    )


def say_stop(made: Learned, screen: Screen) -> None:
    """When and why --patience ended the training of the head that is kept, and how many others."""
    stopped = [one for one in made.heads if one.stopped == "patience"]
    if len(made.heads) > 1 and stopped:
        screen.say(f"{len(stopped)} of {len(made.heads)} heads stopped early (--patience)")
    if made.heads and made.winner.stopped == "patience":
        assert made.config is not None
        one = made.winner
        screen.say(
            f"stopped after epoch {len(one.epochs) - 1}: {made.config.best} has not improved since"
            f" epoch {one.epoch} (--patience {made.config.patience})"
        )


def say_rates(curve: Curve, screen: Screen) -> None:
    """The LR finder's suggestions on one line, each with the factor by which seeds differ."""
    words, found = "within a factor of {:.2g} across seeds", []
    for name, rate in curve.suggestions.items():
        spread = curve.spreads.get(name)
        found.append(
            f"{name} {rate:.2g}" + ("" if spread is None else f" ({words.format(spread)})")
        )
        words = words if spread is None else "factor {:.2g}"  # said once
    screen.say(f"learning rate: {' · '.join(found)} — {curve.verdict}")
    if curve.race:
        ran = " · ".join(f"{name} {loss:.4f}" for name, loss in curve.race.items())
        screen.say(f"race, by validation loss: {ran}")
    screen.say(f"rate {curve.rate:.2g} ({curve.chosen})")


def show_curve(curve: Curve, folder: Path, means: Means) -> None:
    """Figure and CSV into `folder`, and to the run."""
    figure = report.save(report.lr_figure(curve), folder / "lr_finder.png")
    report.lr_csv(curve, folder / "lr_finder.csv")
    if means.run:
        means.run.keep(figure, "lr_finder")
        means.run.keep(folder / "lr_finder.csv", "lr_finder")
        named = {k.replace("/", "_over_"): k for k in curve.suggestions}
        found = {f"rate.{name}": curve.suggestions[k] for name, k in named.items()}
        found |= {
            f"spread.{name}": curve.spreads[k] for name, k in named.items() if k in curve.spreads
        }
        for name, k in named.items():
            if curve.race and np.isfinite(curve.race[k]):
                found[f"race.{name}"] = curve.race[k]
        means.run.record(found | {"rate": curve.rate})
        alive = np.isfinite(curve.losses).all(0)
        mean = curve.losses.mean(0)
        means.run.curve("lr_finder.rate", curve.rates[alive].tolist())
        means.run.curve("lr_finder.loss", mean[alive].tolist())
        means.run.tags({"lr_finder.verdict": curve.verdict})


# -------------------------------------------------------------------------------------- evaluation


def say_threshold(known: Novelty, screen: Screen) -> None:
    """From which distance on an image is novel."""
    cut = known.threshold(0.05)
    if np.isfinite(cut):
        share = "5 % of images like these are further than"
        screen.say(f"novelty: {share} {cut:.3f} from the training images")
    else:
        few = len(known.known)
        screen.say(f"novelty: {counted(few, 'validation image')}: too few for a threshold")


def show_evaluation(
    figures: dict[str, Any], classes: list[str], folder: Path, means: Means
) -> None:
    """A head's figures on one line for validation and one for test, if there is one; its confusion
    matrices go into `folder`, and to the run.
    """
    test = {k.removeprefix("test_"): v for k, v in figures.items() if k.startswith("test_")}
    means.screen.say(evaluation(figures))
    if test:
        means.screen.say(f"{evaluation(test, 'test')} · nothing was chosen on these images")
    for name, found in (("confusion", figures), ("test_confusion", test)):
        if "confusion" in found:
            title = "Test images" if found is test else "Validation images"
            figure = report.confusion_figure(np.array(found["confusion"]), classes, title)
            picture = report.save(figure, folder / f"{name}.png")
            if means.run:
                means.run.keep(picture, "evaluation")


IMBALANCE = 3  # times as many training images as the rarest class: rare classes are named


def say_rare_classes(catalog: Catalog, figures: dict[str, Any], screen: Screen) -> None:
    """Where classes are unbalanced in training, how well the rarest are told: the accuracy of all
    images hides them. figures: see `metrics.evaluate`.
    """
    rows = zip(catalog.labels, catalog.splits, strict=True)
    counts = Counter(name for names, split in rows if split == "train" for name in names)
    if catalog.multi or not counts or max(counts.values()) < IMBALANCE * min(counts.values()):
        return
    common = max(counts, key=lambda name: (counts[name], name))
    rare = sorted(counts, key=lambda name: (counts[name], name))
    rare = [name for name in rare if IMBALANCE * counts[name] <= counts[common]]
    words = []
    for name in rare[:3]:
        line = figures["per_class"].get(name, {"images": 0})
        told = (
            f"recall {line['recall']:.4f} of {line['images']}" if line["images"] else "not tested"
        )
        words.append(f"{name} ({counts[name]}: {told})")
    more = f" and {len(rare) - 3} more" if len(rare) > 3 else ""
    screen.say(
        f"unbalanced: {counts[common]} training images of {common}, few of"
        f" {', '.join(words)}{more}: look at the balanced accuracy; --class-weights balanced gives"
        " rare classes more weight"
    )


SHOWN_CLASSES = 30  # with more, those with the lowest F1


def class_table(by_class: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A line for each class: images, precision, recall, F1; of many classes the worst."""
    shown = list(by_class.items())
    if len(shown) > SHOWN_CLASSES:
        shown = sorted(shown, key=lambda pair: (not pair[1]["images"], pair[1]["f1"]))
        shown = shown[:SHOWN_CLASSES]
    wide = max(5, *(min(len(name), 40) for name, _ in shown))
    lines = [f"{'class':<{wide}}  {'images':>8}  {'precision':>9}  {'recall':>7}  {'F1':>7}"]
    for name, line in shown:
        short = name if len(name) <= 40 else f"{name[:39]}…"
        lines.append(
            f"{short:<{wide}}  {line['images']:>8}  {line['precision']:>9.4f}"
            f"  {line['recall']:>7.4f}  {line['f1']:>7.4f}"
        )
    if len(shown) < len(by_class):
        lines.append(
            f"{'…':<{wide}}  the {len(shown)} classes with the lowest F1 of {len(by_class)}"
        )
    return lines


def show_figures(result: dict[str, Any], loaded: Bundle, out: Path, means: Means) -> None:
    """How good a bundle is on labelled images: a line, a table of classes, and OUT/confusion.png,
    all of it kept with the run. result: see `inference.evaluate`.
    """
    figures, say = result["metrics"], means.screen.say
    shown, title = for_tables(figures), "Labelled images"
    if figures["tables_show"] == "trusted":
        words = {"new": "new to the bundle", "validation": "that validated the bundle"}
        title = f"Images {words[figures['trusted_images']]}"
        say(f"by class, {shown['images']} images {words[figures['trusted_images']]}:")
    for line in class_table(shown["per_class"]):
        say(line)
    if figures["faults"]:
        say(f"in no figure: {counted(figures['faults'], 'image')} that could not be read")
    say(evaluation(figures, "labelled"))
    say_used(figures, means.screen)
    files = []
    if "confusion" in shown:
        picture = report.confusion_figure(np.array(shown["confusion"]), loaded.classes, title)
        files.append(report.save(picture, out / "confusion.png"))
    if means.run:
        means.run.record({k: v for k, v in figures.items() if isinstance(v, float)})
        trusted = figures["trusted"] or {}
        means.run.record({f"trusted.{k}": v for k, v in trusted.items() if isinstance(v, float)})
        means.run.record(result["counts"] | (figures["images_used"] or {}))
        means.run.tags({"trusted_images": figures["trusted_images"]})
        names = {"bundle": "bundle_fingerprint", "recipe": "recipe_fingerprint"}
        tags = {tag: result[name] for tag, name in names.items()}
        means.run.tags(tags | {"trained_by": str(result["trained_by"])})
        for path in [out / "evaluation.json", out / "per_class.csv", *files]:
            means.run.keep(path, "evaluation")


def say_used(figures: Mapping[str, Any], screen: Screen) -> None:
    """Which of the figures to trust. figures: see `evaluate.figures`."""
    used, trusted, kind = (figures[k] for k in ("images_used", "trusted", "trusted_images"))
    if used is None:
        screen.say(
            "the bundle does not say which images it was trained on: if these are among them, the"
            " figures are too good"
        )
        return
    if kind == "all":
        return
    screen.say(
        f"WARNING: the bundle was trained on {used['trained_on']} of these images and validated"
        f" with {used['validated']}: the figures of all of them are too good"
    )
    if kind == "none":
        screen.say("it was trained on all of them: nothing here says how good it is on others")
    else:
        what = "new" if kind == "new" else "validation"
        words = "it has not seen" if kind == "new" else "it was validated, not trained, with"
        if trusted is None:
            screen.say(f"all are images that {words}: rate and temperature were chosen on them")
        else:
            screen.say(f"the figure to trust, of the images {words}:")
            screen.say(evaluation(trusted, what))


def previous(out: Path, means: Means) -> Path | None:
    """Where the bundle that is replaced is kept; None for one that this very run had saved before
    it was stopped.
    """
    run = means.run.run_id if means.run else None
    there = _about(out)
    if there and run and there.get("lineage", {}).get("run_id") == run:
        return None
    return out.with_name(f"{out.name}.previous")


def say_replaced(out: Path, new: Path, means: Means) -> None:
    """Say which bundle at `out` the one in the folder `new` takes the place of, and how their
    figures compare; nothing if none is there.
    """
    kept, old, this = previous(out, means), _about(out), _about(new)
    if kept is None or old is None or this is None:
        return
    words = f"replaces the bundle of {_date(out)}: {_compared(old, this)}; it is kept in {kept}"
    if lost := _about(kept):
        words += f", in place of the bundle of {_date(kept)}: {_compared(lost, this)}"
    means.screen.say(words)


def _date(bundle: Path) -> str:
    return strftime("%Y-%m-%d %H:%M", localtime((bundle / "bundle.json").stat().st_mtime))


def _compared(old: Mapping[str, Any], this: Mapping[str, Any]) -> str:
    """An older bundle's figure beside that of this one, in words."""
    name = "f2_samples" if "f2_samples" in this["metrics"] else "accuracy"
    was, now = old.get("metrics", {}).get(name), this["metrics"].get(name)
    same = old.get("lineage", {}).get("data") == this["lineage"]["data"]
    if same and isinstance(was, int | float) and isinstance(now, int | float):
        return f"{name.partition('_')[0]} {was:.4f} (this one {now:.4f})"
    return "of other images, so that their figures cannot be compared"


def _about(bundle: Path) -> dict[str, Any] | None:
    """What bundle.json says, unchecked; None if it is not there or cannot be read."""
    try:
        content = json.loads((bundle / "bundle.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def evaluation(figures: dict[str, Any], kind: str = "validation") -> str:
    """A head's figures on one line, as `metrics.evaluate` gives them. kind: of the images."""
    loss = "loss not finite" if figures["loss"] is None else f"loss {figures['loss']:.4f}"
    if "temperature" in figures:
        loss += f" · {calibration.words(figures)}"
    elif figures.get("ece") is not None:
        loss += (
            f" · ECE {figures['ece']:.3f} ({figures['ece_low']:.3f} to {figures['ece_high']:.3f})"
        )
    said, images = "test: " if kind == "test" else "", figures["images"]
    if "f2_samples" in figures:
        tuned = "thresholds tuned on them" if kind == "validation" else "the bundle's thresholds"
        if figures.get("f2_samples_held_out") is not None:
            tuned += f"; {figures['f2_samples_held_out']:.4f} where tuned on other parts of them"
        return (
            f"{said}F2 {figures['f2_samples']:.4f} (mean over {images} {kind} images, at {tuned}) ·"
            f" decisions right {figures['accuracy']:.4f} · {loss}"
        )
    right = round(figures["accuracy"] * images)
    low, high = metrics.interval(right, images)
    balanced = f" · balanced {figures['balanced_accuracy']:.4f}"
    return (
        f"{said}accuracy {figures['accuracy']:.4f} ({right} of {images} {kind} images, 95 %"
        f" interval {low:.3f} to {high:.3f}){balanced} · {loss}"
    )


# -------------------------------------------------------------------------------------- many heads


SHOWN_SETTINGS = 5  # on the screen


def show_grid(
    store: Store, asked: Study, made: Learned, folder: Path, means: Means
) -> dict[str, Any]:
    """The ranked heads of a grid: on the screen, as a table, each as a child run."""
    knobs, heads, ranked = asked.knobs, made.heads, made.ranking
    assert ranked is not None
    means.screen.say(
        f"{counted(len(heads), 'head')}, {counted(len(ranked['settings']), 'setting')}, by"
        f" {ranked['figure']}:"
    )
    for setting in ranked["settings"][:SHOWN_SETTINGS]:
        spread = "" if setting["spread"] is None else f" ± {setting['spread']:.4f}"
        means.screen.say(
            f"  {setting['mean']:.4f}{spread}  loss {setting['valid_loss']:.4f}"
            f"  {sweep.words(setting['knobs'])}{_chance(setting)}"
        )
    if len(ranked["settings"]) > SHOWN_SETTINGS:
        means.screen.say(f"  … the best {SHOWN_SETTINGS}; all of them are in report/grid.csv")
    means.screen.say(ranked["words"])
    table = report.grid_csv(ranked, folder / "grid.csv")
    if means.run:
        means.run.keep(table, "grid")
        means.run.tags({"grid.verdict": ranked["words"]})
        means.run.children(
            [sweep.words(one) for one in knobs],
            [{f"train.{name}": value for name, value in one.items()} for one in knobs],
            [_by_epoch(one) for one in heads],
            {"part": "grid", "dataset": recording.dataset_name(Catalog(**store.read_catalog()))}
            | {"body": store.recipe.body, "recipe": store.recipe.fingerprint},
        )
    return ranked


def _chance(setting: dict[str, Any]) -> str:
    """Whether a setting differs from the best, after its name."""
    if setting["stopped"]:
        return f"  (stopped after {counted(setting['epochs'], 'epoch')})"
    return "" if setting["p"] is None else f"  p {setting['p']:.2g}"


def _by_epoch(head: Trained) -> dict[str, list[tuple[int, float]]]:
    """A head's figures as MLflow wants them, those of the epoch that was kept last."""
    names = [name for name in head.epochs[0] if name != "epoch"]
    made = {name: [(int(line["epoch"]), line[name]) for line in head.epochs] for name in names}
    kept = head.epochs[head.epoch]
    return made | {f"kept.{name}": [(head.epoch, kept[name])] for name in names}


def show_folds(
    store: Store, config: TrainConfig, found: OutOfFold, folder: Path, means: Means
) -> dict[str, Any]:
    """Out-of-fold probabilities into `folder`; mean and spread of the folds' figures."""
    catalog = store.read_catalog()
    target = folder / "folds.arrow"
    classes = store.manifest()["classes"]
    shards.write_folds(
        target,
        {
            "path": [catalog["paths"][at] for at in found.row],
            "labels": [catalog["labels"][at] for at in found.row],
            "fold": found.fold,
            "probability": _chances(found.logit, found.multi),
        },
        {
            "classes": classes,
            "recipe": store.recipe.fingerprint,
            "catalog": store.manifest()["catalog"]["sha256"],
            "training": config.parameters(),
        },
    )
    table = {
        name: {"mean": float(np.mean(values)), "spread": float(np.std(values, ddof=1))}
        for name in found.last[0]
        if name not in ("epoch", "train_loss")
        for values in [[line[name] for line in found.last]]
    }
    shown = " · ".join(f"{k} {v['mean']:.4f} ± {v['spread']:.4f}" for k, v in table.items())
    long = "" if config.head == "logistic" else f", {counted(found.epochs, 'epoch')} each"
    means.screen.say(f"{len(found.last)} folds{long}: {shown}")
    if found.not_held_out:
        names = ", ".join(f"{name} ({count})" for name, count in found.not_held_out.items())
        means.screen.say(
            "classes with too few different images to hold out (images): "
            f"{names}. They are trained on in every fold and get no probability."
        )
    means.screen.say(
        f"{target.name}: a probability for every image, from a head that has not seen it"
    )
    if means.run:
        means.run.record(
            {f"folds.{k}.{kind}": v for k, pair in table.items() for kind, v in pair.items()}
        )
        means.run.keep(target, "folds")
    return {
        "figures": table,
        "folds": found.last,
        "epochs": found.epochs,
        "not_held_out": found.not_held_out,
        "file": target.name,
    }


def _chances(logit_NC: Any, multi: bool) -> Any:
    """Probabilities, float32 (N, C), uncalibrated."""
    import torch

    logit = torch.from_numpy(logit_NC)
    return (logit.sigmoid() if multi else logit.softmax(1)).numpy()


def show_shares(curve: dict[str, Any], folder: Path, means: Means) -> None:
    """The learning curve: on the screen, as figure and table."""
    for point in curve["points"]:
        spread = "" if point["spread"] is None else f" ± {point['spread']:.4f}"
        share = f"{100 * point['share']:.0f} %"
        means.screen.say(f"{share:>6} {point['images']:>8} images  {point['mean']:.4f}{spread}")
    means.screen.say(curve["words"])
    stem = folder / "learning_curve"
    picture = report.save(report.learning_figure(curve), stem.with_suffix(".png"))
    table = report.learning_csv(curve, stem.with_suffix(".csv"))
    if means.run:
        means.run.keep(picture, "learning_curve")
        means.run.keep(table, "learning_curve")
        means.run.tags({"learning_curve.verdict": curve["words"]})
        for point in curve["points"]:
            means.run.record({f"learning_curve.{curve['figure']}": point["mean"]}, point["images"])
