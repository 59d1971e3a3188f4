"""Report scores: counts, novelty, drift, and how far the labels can be trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from arrowhead.bundle.format import Bundle
from arrowhead.bundle.replay import NO_GOLDEN_IMAGES
from arrowhead.evaluation import metrics
from arrowhead.examine import figures as examine_figures
from arrowhead.features.precision import emulation_line
from arrowhead.inference.score_request import ScoreConfig
from arrowhead.inference.summary import ScoreSummary
from arrowhead.reporting import evaluation, extraction
from arrowhead.reporting.progress import WorkTotals
from arrowhead.reporting.run_context import RunContext, Screen
from arrowhead.tracking.run import Run
from arrowhead.wording import pluralize


def show_drift(drift: dict[str, Any], screen: Screen) -> None:
    """Show the result of the golden images (see `replay.Drift`)."""
    if drift["emulated"]:
        screen.print(emulation_line(drift["emulated"]))
    if not drift["images"]:
        screen.print(NO_GOLDEN_IMAGES)
        return
    screen.print(
        f"golden images: {drift['images']} replayed, largest feature drift {drift['feature']:.1g},"
        f" {pluralize(drift['changed'], 'label')} changed"
    )


def novelty_threshold(bundle: Bundle, config: ScoreConfig) -> float | None:
    """The distance above which an image is marked as novel; None if none is marked."""
    if not (bundle.novelty and config.flag_novel):
        return None
    threshold = bundle.novelty.threshold(config.false_alarms)
    return threshold if np.isfinite(threshold) else None


def show_scoring(
    screen: Screen, counts: dict[str, Any], work: WorkTotals, bundle: Bundle, config: ScoreConfig
) -> None:
    """Show the counts of a scoring, what limited its speed, and the novel images."""
    ignored = (
        f" ({pluralize(counts['ignored'], 'other file')} ignored)" if counts["ignored"] else ""
    )
    screen.print(
        f"{pluralize(counts['inputs'], 'input')} = {counts['scored']} scored"
        f" + {pluralize(counts['faults'], 'fault')}{ignored}"
    )
    extraction.show_throughput(screen, counts, work)
    if not (bundle.novelty and config.flag_novel):
        return
    threshold, rate = novelty_threshold(bundle, config), f"{100 * config.false_alarms:g} %"
    if threshold is None:
        screen.print(
            f"no image can be called novel at {rate} false alarms: the bundle was validated on"
            f" {pluralize(len(bundle.novelty.known), 'image')}, too few for a threshold"
        )
    else:
        screen.print(
            f"{pluralize(counts['novel'], 'novel image')}: novelty above {threshold:.3f}"
            f" ({rate} false alarms)"
        )


def show_label_trust(summary: ScoreSummary, screen: Screen) -> None:
    """Show how the labels agree with folders named after classes, and how many of the images the
    bundle was trained on or validated with.
    """
    folders = summary.folders
    if folders:
        screen.print(
            f"the folders are named after classes of the bundle: {folders.right} of"
            f" {folders.images} agree ({_percent(folders.right, folders.images)})"
        )
    if summary.trained or summary.validated:
        overlap = evaluation.describe_overlap(summary.trained or 0, summary.validated or 0)
        screen.print(
            f"WARNING: the bundle was {overlap}: how well it does on them says little about others"
        )
    elif summary.trained is None and folders:
        screen.print(
            "the bundle does not say which images it was trained on: if these are among them, their"
            " agreement says little about others"
        )


def _percent(correct: int, images: int) -> str:
    """A percentage with its 95 % confidence interval (Wilson)."""
    low, high = metrics.wilson_interval(correct, images)
    return f"{100 * correct / images:.1f} %, 95 % interval {100 * low:.1f} to {100 * high:.1f} %"


def record_scores(result: dict[str, Any], summary: ScoreSummary, out: Path, run: Run) -> None:
    """Record counts, seconds and histograms of the scores in MLflow.

    result: see `commands.score.score`.
    """
    labels = {f"labels.{label}": count for label, count in summary.labels.items()}
    seconds = {f"seconds.{stage}": value for stage, value in result["seconds"].items()}
    run.record(result["counts"] | labels | seconds | (result["images_used"] or {}))
    run.tags(evaluation.lineage_tags(result))
    run.log_artifact(out / "score.json")
    figure = examine_figures.scores_figure(
        summary.labels, summary.probability_counts, summary.novelty_counts
    )
    run.log_artifact(examine_figures.save(figure, out / "scores.png"), "scores")


def report_bundle(
    bundle_metrics: dict[str, Any], classes: list[str], folder: Path, context: RunContext
) -> None:
    """Show the validation and test metrics of a new bundle; write and record its confusion
    matrices in `folder`.
    """
    test = {k.removeprefix("test_"): v for k, v in bundle_metrics.items() if k.startswith("test_")}
    context.screen.print(evaluation.metrics_line(bundle_metrics))
    if test:
        context.screen.print(
            f"{evaluation.metrics_line(test, 'test')} · nothing was chosen on these images"
        )
    for name, title, part in (
        ("confusion", "Validation images", bundle_metrics),
        ("test_confusion", "Test images", test),
    ):
        if "confusion" in part:
            figure = examine_figures.confusion_figure(np.array(part["confusion"]), classes, title)
            picture = examine_figures.save(figure, folder / f"{name}.png")
            if context.run:
                context.run.log_artifact(picture, "evaluation")
