"""Report a training while it runs: epochs, early stopping, the LR finder's curve."""

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
from arrowhead.wording import pluralize

MAX_EPOCH_LINES = 30  # on the screen; --json, MLflow and watch have every epoch
SEND_SECONDS = 1.0  # between two requests to MLflow: one per short epoch would slow training
STATUS_SECONDS = 2.0  # between two status lines of a training of many heads
EPOCH_HEADER = f"{'epoch':>5}  {'train loss':>10}  {'valid loss':>10}  {'accuracy':>8}"


def show_restart(report: dict[str, Any], screen: Screen) -> None:
    """Show why the workers are started again."""
    screen.print(
        f"{report['restart'].rstrip('.')}. The workers are started again; what is done stays."
    )


class StudyReporter:
    """Shows and records what the workers of a study report.

    Every epoch is reported once, even if the workers are restarted and report it again.
    """

    def __init__(self, study: Study, context: RunContext) -> None:
        self._study, self._context = study, context
        self._reported: set[Any] = set()
        self._last_status = self._last_sent = 0.0
        self._best = -np.inf
        self._hidden_rows: dict[int, str] = {}  # rows of epochs that were not shown
        self._series: dict[str, list[tuple[int, float]]] = defaultdict(list)

    def __call__(self, report: dict[str, Any]) -> None:
        """Handle one report (see `training.run.run_study`)."""
        screen = self._context.screen
        if "restart" in report:
            show_restart(report, screen)
        elif "warning" in report:
            screen.print(report["warning"])
        elif "resumed_after" in report:
            done = pluralize(report["resumed_after"], "epoch")
            screen.print(f"{report['part']}: {done} done before; going on from the checkpoint")
        elif "curve" in report and "curve" not in self._reported:
            self._reported.add("curve")
            show_suggested_rates(report["curve"], screen)
        elif "lines" in report and (report["part"], report["epoch"]) not in self._reported:
            self._reported.add((report["part"], report["epoch"]))
            if report["part"] == "heads" and not self._study.sweep.grid:
                self._report_epoch(report)
            else:
                self._report_many_heads(report)

    def show_workers(self, workers: int) -> None:
        """Show how many workers there are, if that is not what was requested."""
        launch = self._context.launch
        if launch.max_workers and str(launch.workers) != str(workers):
            self._context.screen.print(f"{workers} worker{'s' if workers > 1 else ''}")

    def send(self) -> None:
        """Record the epochs since the last call, in one request to MLflow."""
        if self._series and self._context.run:
            self._context.run.series(self._series)
        self._series, self._last_sent = defaultdict(list), monotonic()

    def finish(self, result: StudyResult) -> None:
        """Show the rows of the epoch that is kept and of the last epoch, if they were hidden."""
        if result.heads and self._hidden_rows:
            winner = result.winner
            for epoch in sorted({winner.epoch, len(winner.epochs) - 1} & self._hidden_rows.keys()):
                self._context.screen.print(self._hidden_rows.pop(epoch))

    def _report_epoch(self, report: dict[str, Any]) -> None:
        """Report an epoch of a single head: a row of a table."""
        epoch, line = report["epoch"], report["lines"][0]
        screen, config = self._context.screen, self._study.head
        if "rate" not in report:
            show_logistic(line, screen)
        else:
            column = _extra_column(line, config.best)
            if epoch == 0:
                heading = f"  {column:>{max(8, len(column))}}" if column else ""
                screen.print(EPOCH_HEADER + heading)
            row = self._row(line, column)
            if epoch % math.ceil(config.total_epochs / MAX_EPOCH_LINES) == 0:
                screen.print(row)
            else:
                self._hidden_rows[epoch] = row
                screen.print_status(f"{row}  of {config.total_epochs} epochs")
        rate = {"rate": report["rate"]} if "rate" in report else {}
        for name, value in (line | rate).items():
            if name != "epoch":
                self._series[name].append((epoch, value))
        if monotonic() - self._last_sent > SEND_SECONDS:
            self.send()

    def _report_many_heads(self, report: dict[str, Any]) -> None:
        """Report an epoch of a grid, folds or a learning curve: a status line now and then."""
        part, epoch, lines = report["part"], report["epoch"], report["lines"]
        config = self._study.head
        is_last = epoch + 1 == config.total_epochs
        if not (is_last or epoch == 0 or monotonic() - self._last_status > STATUS_SECONDS):
            return
        self._last_status = monotonic()
        number = "" if config.head == "logistic" else f"epoch {epoch} · "
        best, values = "", {"epoch": float(epoch), "heads": float(len(lines))}
        if part == "heads":  # folds and shares of the images are no competition
            name = grid.selection_metric(config)
            choose = min if name == "valid_loss" else max
            values[name] = choose(line[name] for line in lines.values())
            best = f" · best {name} {values[name]:.4f}"
        self._context.screen.print(
            f"{part} · {number}training {pluralize(len(lines), 'head')}{best}"
        )
        if self._context.run:
            self._context.run.record(
                {f"progress.{part}.{k}": v for k, v in values.items()}, step=epoch
            )

    def _row(self, line: dict[str, float], column: str) -> str:
        """The row of an epoch; with a star if --best has not been as good before."""
        row, best = epoch_row(line), self._study.head.best
        if column:
            row += f"  {line[column]:>{max(8, len(column))}.6f}"
        if best == "last":
            return row
        value = line[best] * (-1 if best == "valid_loss" else 1)
        is_best = value > self._best
        self._best = max(self._best, value) if is_best else self._best
        return row + " *" * is_best


def _extra_column(line: dict[str, float], best: str) -> str:
    """A metric to show beside loss and accuracy: that of --best; for multi-label F2, because the
    accuracy of mostly negative labels says little; "" for none.
    """
    default = "f2" if "f2" in line else ""
    return best if best in ("balanced_accuracy", "f1") else default


def epoch_row(line: dict[str, float]) -> str:
    """An epoch in the columns of EPOCH_HEADER."""
    return (
        f"{int(line['epoch']):>5}  {line['train_loss']:>10.6f}  {line['valid_loss']:>10.6f}"
        f"  {line['accuracy']:>8.6f}"
    )


def show_logistic(line: dict[str, float], screen: Screen) -> None:
    """Show the metrics of a logistic regression, and how its L2 strength was chosen."""
    chosen = f" by cross-validation (loss {line['cv_loss']:.4f})" if "cv_loss" in line else ""
    screen.print(f"logistic regression: L2 {line['l2']:.4g} (C {1 / line['l2']:.4g}){chosen}")
    screen.print(
        f"train loss {line['train_loss']:.6f} · valid loss {line['valid_loss']:.6f}"
        f" · accuracy {line['accuracy']:.6f}"
    )


def show_early_stopping(result: StudyResult, screen: Screen) -> None:
    """Show how many heads --patience stopped, and when it stopped the one that is kept."""
    stopped = [head for head in result.heads if head.stopped == "patience"]
    if len(result.heads) > 1 and stopped:
        screen.print(f"{len(stopped)} of {len(result.heads)} heads stopped early (--patience)")
    if result.heads and result.winner.stopped == "patience":
        assert result.config is not None
        winner = result.winner
        screen.print(
            f"stopped after epoch {len(winner.epochs) - 1}: {result.config.best} has not improved"
            f" since epoch {winner.epoch} (--patience {result.config.patience})"
        )


def show_suggested_rates(curve: Curve, screen: Screen) -> None:
    """Show the LR finder's suggestions, with their variation across seeds, and its choice."""
    wording, suggestions = "within a factor of {:.2g} across seeds", []
    for name, rate in curve.suggestions.items():
        factor = curve.spreads.get(name)
        if factor is None:
            suggestions.append(f"{name} {rate:.2g}")
        else:
            suggestions.append(f"{name} {rate:.2g} ({wording.format(factor)})")
            wording = "factor {:.2g}"  # the long wording only once
    screen.print(f"learning rate: {' · '.join(suggestions)} — {curve.words}")
    if curve.race:
        losses = " · ".join(f"{name} {loss:.4f}" for name, loss in curve.race.items())
        screen.print(f"race, by validation loss: {losses}")
    screen.print(f"rate {curve.rate:.2g} ({curve.chosen})")


def report_lr_curve(curve: Curve, folder: Path, context: RunContext) -> None:
    """Write the LR finder's figure and table to `folder`, and record the curve."""
    figure = examine_figures.save(examine_figures.lr_figure(curve), folder / "lr_finder.png")
    examine_figures.lr_csv(curve, folder / "lr_finder.csv")
    if not context.run:
        return
    context.run.log_artifact(figure, "lr_finder")
    context.run.log_artifact(folder / "lr_finder.csv", "lr_finder")
    values = {"rate": curve.rate}
    for name, rate in curve.suggestions.items():
        metric = name.replace("/", "_over_")
        values[f"rate.{metric}"] = rate
        if name in curve.spreads:
            values[f"spread.{metric}"] = curve.spreads[name]
        if curve.race and np.isfinite(curve.race[name]):
            values[f"race.{metric}"] = curve.race[name]
    context.run.record(values)
    finite = np.isfinite(curve.losses).all(0)
    context.run.curve("lr_finder.rate", curve.rates[finite].tolist())
    context.run.curve("lr_finder.loss", curve.losses.mean(0)[finite].tolist())
    context.run.tags({"lr_finder.verdict": curve.verdict})
