"""Report a fine-tuning while it runs, and compare its result with the frozen head."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from time import monotonic
from typing import Any

from arrowhead.finetuning.run import Request
from arrowhead.reporting.run_context import RunContext, Screen
from arrowhead.reporting.training import EPOCH_HEADER, SEND_SECONDS, epoch_row, show_restart
from arrowhead.wording import pluralize


class FinetuneReporter:
    """Shows and records what the workers of a fine-tuning report.

    Every epoch is reported once, even if the workers are restarted and report it again.
    """

    def __init__(self, request: Request, context: RunContext) -> None:
        self._request, self._context = request, context
        self._reported: set[Any] = set()
        self._last_sent = 0.0
        self._series: dict[str, list[tuple[int, float]]] = defaultdict(list)

    def __call__(self, report: dict[str, Any]) -> None:
        """Handle one report (see `finetuning.run.run_finetune`)."""
        screen = self._context.screen
        if "restart" in report:
            show_restart(report, screen)
        elif "warning" in report:
            screen.print(report["warning"])
        elif "resumed_after" in report:
            screen.print(f"{report['resumed_after']} of {report['of']} steps done before; going on")
        elif "groups" in report and "groups" not in self._reported:
            self._reported.add("groups")
            self._show_groups(report)
        elif "line" in report and report["epoch"] not in self._reported:
            self._reported.add(report["epoch"])
            self._report_epoch(report)
        elif "step" in report:
            screen.print_status(
                f"epoch {report['epoch']} · step {report['step']} of {report['of']}"
            )

    def show_workers(self, workers: int) -> None:
        """Show how many workers there are, if that is not what was requested."""
        launch = self._context.launch
        if launch.max_workers and str(launch.workers) != str(workers):
            self._context.screen.print(pluralize(workers, "worker"))

    def send(self) -> None:
        """Record the epochs since the last call, in one request to MLflow."""
        if self._series and self._context.run:
            self._context.run.series(self._series)
        self._series, self._last_sent = defaultdict(list), monotonic()

    def _show_groups(self, report: dict[str, Any]) -> None:
        parts = [
            f"{_millions(group['parameters'])} at {group['rate']:.2g}"
            if group["rate"]
            else f"{_millions(group['parameters'])} frozen"
            for group in report["groups"]
        ]
        config = self._request.config
        self._context.screen.print(
            f"fine-tuning {self._request.recipe.body}: weights of the layer groups and their rates:"
            f" {', '.join(parts)} (head) · {pluralize(config.total_epochs, 'epoch')} of"
            f" {report['steps_per_epoch']} steps"
        )

    def _report_epoch(self, report: dict[str, Any]) -> None:
        line, screen = report["line"], self._context.screen
        column = "f2" if "f2" in line else ""
        best = self._request.config.best
        column = best if best in ("balanced_accuracy", "f1") else column
        if report["epoch"] == 0:
            screen.print(EPOCH_HEADER + (f"  {column:>8}" if column else ""))
        row = epoch_row(line)
        screen.print(row + (f"  {line[column]:>{max(8, len(column))}.6f}" if column else ""))
        values = dict(line)
        if "rate" in report:
            values["rate_factor"] = report["rate"]
        for name, value in values.items():
            if name != "epoch":
                self._series[name].append((report["epoch"], value))
        if monotonic() - self._last_sent > SEND_SECONDS:
            self.send()


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 10_000 else str(count)


def show_comparison(
    frozen: Mapping[str, Any],
    tuned: Mapping[str, Any],
    name: str,
    judgement: Any,
    screen: Screen,
) -> None:
    """Show both bundles' figures on the validation images, and which is kept for what reason.

    judgement: see `tuned_choice.Judgement`.
    """
    what = "F2" if name == "f2_samples" else name
    figures = []
    for metrics in (tuned, frozen):
        loss = "not finite" if metrics["loss"] is None else f"{metrics['loss']:.4f}"
        figures.append(f"{what} {metrics[name]:.4f}, loss {loss}")
    screen.print(
        f"fine-tuned: {figures[0]} · frozen head: {figures[1]} (same"
        f" {tuned['images']} validation images)"
    )
    change = f"{-judgement.gain:+.4f} ± {judgement.half_width:.4f}, p = {judgement.p:.2g}"
    if judgement.is_better:
        kept = "the fine-tuned bundle is kept"
    elif judgement.gain > 0:
        kept = "not certainly better (p < 0.05): the frozen one is kept"
    else:
        kept = "the frozen one is kept"
    screen.print(
        f"Brier score {judgement.tuned:.4f} fine-tuned, {judgement.frozen:.4f} frozen ({change},"
        f" paired by image): {kept}"
    )
