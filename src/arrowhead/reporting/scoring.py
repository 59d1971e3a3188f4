"""What is said of scores and their evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from arrowhead.bundle.format import Bundle
from arrowhead.bundle.replay import NO_GOLDEN_IMAGES
from arrowhead.evaluation import metrics
from arrowhead.examine import figures as examine_figures
from arrowhead.inference.score_request import ScoreConfig
from arrowhead.inference.summary import ScoreSummary
from arrowhead.reporting import evaluation, extraction
from arrowhead.reporting.progress import Work
from arrowhead.reporting.run_context import RunContext, Screen
from arrowhead.tracking.run import Run
from arrowhead.wording import counted


def say_drift(drift: dict[str, Any], screen: Screen) -> None:
    """How far this machine is from the one that made the bundle (see `replay.Drift`)."""
    if not drift["images"]:
        screen.say(NO_GOLDEN_IMAGES)
        return
    screen.say(
        f"golden images: {drift['images']} replayed, largest feature drift {drift['feature']:.1g},"
        f" {counted(drift['changed'], 'label')} changed"
    )


def novelty_threshold(loaded: Bundle, config: ScoreConfig) -> float | None:
    """The novelty above which an image is marked; None if nothing is."""
    if not (loaded.novelty and config.flag_novel):
        return None
    threshold = loaded.novelty.threshold(config.false_alarms)
    return threshold if np.isfinite(threshold) else None


def say_scores(
    context: RunContext, counts: dict[str, Any], done: Work, loaded: Bundle, config: ScoreConfig
) -> None:
    """What a scoring came to, and what it was bound by."""
    say = context.screen.say
    ignored = f" ({counted(counts['ignored'], 'other file')} ignored)" if counts["ignored"] else ""
    account = f"{counts['scored']} scored + {counted(counts['faults'], 'fault')}"
    say(f"{counted(counts['inputs'], 'input')} = {account}{ignored}")
    extraction.say_ways(context.screen, counts, done)
    if not (loaded.novelty and config.flag_novel):
        return
    threshold, share = novelty_threshold(loaded, config), f"{100 * config.false_alarms:g} %"
    if threshold is None:
        say(
            f"no image can be called novel at {share} false alarms: the bundle was validated on"
            f" {counted(len(loaded.novelty.known), 'image')}, too few to say so"
        )
    else:
        say(
            f"{counted(counts['novel'], 'novel image')}: further than {threshold:.3f} from the"
            f" training images ({share} of images like them are, too)"
        )


def say_folders(summary: ScoreSummary, screen: Screen) -> None:
    """How many of the images the bundle was made of; how the labels agree with the folders' names,
    where these are the bundle's classes.
    """
    found = summary.folders
    if found:
        screen.say(
            f"the folders are named after classes of the bundle: {found.right} of {found.images}"
            f" agree ({percent(found.right, found.images)})"
        )
    if summary.trained or summary.validated:
        words = evaluation.used_words(summary.trained or 0, summary.validated or 0)
        screen.say(
            f"WARNING: the bundle was {words}: how well it does on them says little about others"
        )
    elif summary.trained is None and found:
        screen.say(
            "the bundle does not say which images it was trained on: if these are among them, that"
            " figure says little about others"
        )


def percent(right: int, images: int) -> str:
    """A share with its 95 % confidence interval (Wilson)."""
    low, high = metrics.wilson_interval(right, images)
    return f"{100 * right / images:.1f} %, 95 % interval {100 * low:.1f} to {100 * high:.1f} %"


def show_scores(result: dict[str, Any], found: ScoreSummary, out: Path, run: Run) -> None:
    """Counts, seconds and a picture of the predictions, recorded. result: see `score`."""
    counts = {f"labels.{label}": count for label, count in found.labels.items()}
    seconds = {f"seconds.{stage}": value for stage, value in result["seconds"].items()}
    run.record(result["counts"] | counts | seconds | (result["images_used"] or {}))
    names = {"bundle": "bundle_fingerprint", "recipe": "recipe_fingerprint"}
    run.tags({tag: result[name] for tag, name in names.items()})
    run.tags({"trained_by": str(result["trained_by"])})
    run.log_artifact(out / "score.json")
    figure = examine_figures.scores_figure(
        found.labels, found.probability_counts, found.novelty_counts
    )
    run.log_artifact(examine_figures.save(figure, out / "scores.png"), "scores")


def show_evaluation(
    figures: dict[str, Any], classes: list[str], folder: Path, context: RunContext
) -> None:
    """A head's figures on one line for validation and one for test, if there is one; its confusion
    matrices go into `folder`, and to the run.
    """
    test = {k.removeprefix("test_"): v for k, v in figures.items() if k.startswith("test_")}
    context.screen.say(evaluation.evaluation(figures))
    if test:
        context.screen.say(
            f"{evaluation.evaluation(test, 'test')} · nothing was chosen on these images"
        )
    for name, found in (("confusion", figures), ("test_confusion", test)):
        if "confusion" in found:
            title = "Test images" if found is test else "Validation images"
            figure = examine_figures.confusion_figure(np.array(found["confusion"]), classes, title)
            picture = examine_figures.save(figure, folder / f"{name}.png")
            if context.run:
                context.run.log_artifact(picture, "evaluation")
