"""A training as it goes: epochs, stops, the learning-rate curve."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from arrowhead.examine import figures as examine_figures
from arrowhead.reporting.run_context import RunContext, Screen
from arrowhead.training import grid
from arrowhead.training.lr_finder import Curve
from arrowhead.training.study import Study, StudyResult
from arrowhead.wording import counted


def say_restart(message: dict[str, Any], screen: Screen) -> None:
    """Why the workers are started again."""
    screen.say(
        f"{message['restart'].rstrip('.')}. The workers are started again; what is done stays."
    )


MAX_EPOCH_LINES = 30  # on the screen; --json, MLflow and watch have every epoch


class StudyReporter:
    """What workers report of a study, shown and recorded; once, however often they start again."""

    def __init__(self, asked: Study, context: RunContext) -> None:
        self._asked, self._context = asked, context
        self._done: set[Any] = set()
        self._said = self._sent = 0.0
        self._best = -np.inf
        self._unsaid: dict[int, str] = {}  # lines of epochs that were left out so far
        self._points: dict[str, list[tuple[int, float]]] = defaultdict(list)

    def send(self) -> None:
        """Record the epochs that were not recorded yet: one request for all of them."""
        if self._points and self._context.run:
            self._context.run.series(self._points)
        self._points, self._sent = defaultdict(list), monotonic()

    def sized(self, workers: int) -> None:
        """How many workers there are now."""
        if str(self._context.launch.workers) not in ("0", str(workers)):
            self._context.screen.say(f"{workers} worker{'s' if workers > 1 else ''}")

    def __call__(self, message: dict[str, Any]) -> None:
        """Take one report (see `training.run.run_study`)."""
        screen = self._context.screen
        if "restart" in message:
            say_restart(message, screen)
        elif "warning" in message:
            screen.say(message["warning"])
        elif "resumed_after" in message:
            done = message["resumed_after"]
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
        screen, config = self._context.screen, self._asked.head
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
            at = "" if config.head == "logistic" else f"epoch {epoch} · "
            words, figures = "", {"epoch": float(epoch), "heads": float(len(lines))}
            if part == "heads":  # the best fold, or share of the images, says nothing
                name = grid.selection_metric(config)
                pick = min if name == "valid_loss" else max
                figures[name] = pick(line[name] for line in lines.values())
                words = f" · best {name} {figures[name]:.4f}"
            screen.say(f"{part} · {at}training {counted(len(lines), 'head')}{words}")
            if self._context.run:
                found = {f"progress.{part}.{k}": v for k, v in figures.items()}
                self._context.run.record(found, step=epoch)

    def ended(self, made: StudyResult) -> None:
        """Say the lines of the epoch that is kept and of the last one, if they were left out."""
        if made.heads and self._unsaid:
            one = made.winner
            for epoch in sorted({one.epoch, len(one.epochs) - 1} & self._unsaid.keys()):
                self._context.screen.say(self._unsaid.pop(epoch))

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


def say_stop(made: StudyResult, screen: Screen) -> None:
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
    screen.say(f"learning rate: {' · '.join(found)} — {curve.words}")
    if curve.race:
        ran = " · ".join(f"{name} {loss:.4f}" for name, loss in curve.race.items())
        screen.say(f"race, by validation loss: {ran}")
    screen.say(f"rate {curve.rate:.2g} ({curve.chosen})")


def show_curve(curve: Curve, folder: Path, context: RunContext) -> None:
    """Figure and CSV into `folder`, and to the run."""
    figure = examine_figures.save(examine_figures.lr_figure(curve), folder / "lr_finder.png")
    examine_figures.lr_csv(curve, folder / "lr_finder.csv")
    if context.run:
        context.run.log_artifact(figure, "lr_finder")
        context.run.log_artifact(folder / "lr_finder.csv", "lr_finder")
        named = {k.replace("/", "_over_"): k for k in curve.suggestions}
        found = {f"rate.{name}": curve.suggestions[k] for name, k in named.items()}
        found |= {
            f"spread.{name}": curve.spreads[k] for name, k in named.items() if k in curve.spreads
        }
        for name, k in named.items():
            if curve.race and np.isfinite(curve.race[k]):
                found[f"race.{name}"] = curve.race[k]
        context.run.record(found | {"rate": curve.rate})
        alive = np.isfinite(curve.losses).all(0)
        mean = curve.losses.mean(0)
        context.run.curve("lr_finder.rate", curve.rates[alive].tolist())
        context.run.curve("lr_finder.loss", mean[alive].tolist())
        context.run.tags({"lr_finder.verdict": curve.verdict})
