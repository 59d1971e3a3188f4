"""A head's figures: shown, recorded, compared with the bundle before."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from time import localtime, strftime
from typing import Any

import numpy as np

from arrowhead.bundle.format import Bundle
from arrowhead.data.catalog import Catalog
from arrowhead.evaluation import calibration, metrics
from arrowhead.evaluation.novelty import NoveltyDetector
from arrowhead.examine import figures as examine_figures
from arrowhead.inference.evaluate import reported_metrics
from arrowhead.reporting.run_context import RunContext, Screen
from arrowhead.wording import counted


def say_threshold(known: NoveltyDetector, screen: Screen) -> None:
    """From which distance on an image is novel."""
    threshold = known.threshold(0.05)
    if np.isfinite(threshold):
        share = "5 % of images like these are further than"
        screen.say(f"novelty: {share} {threshold:.3f} from the training images")
    else:
        few = len(known.known)
        screen.say(f"novelty: {counted(few, 'validation image')}: too few for a threshold")


def say_no_golden_images(screen: Screen) -> None:
    """Warn that no machine can be compared with this one."""
    screen.say(
        "No golden images: the bundle will not prove that a machine which scores with it sees"
        " images as this one does. Run precompute on the photos again to have some."
    )


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


def show_figures(result: dict[str, Any], loaded: Bundle, out: Path, context: RunContext) -> None:
    """How good a bundle is on labelled images: a line, a table of classes, and OUT/confusion.png,
    all of it kept with the run. result: see `commands.score.evaluate`.
    """
    figures, say = result["metrics"], context.screen.say
    shown, title = reported_metrics(figures), "Labelled images"
    if figures["tables_show"] == "trusted":
        words = {"new": "new to the bundle", "validation": "that validated the bundle"}
        title = f"Images {words[figures['trusted_images']]}"
        say(f"by class, {shown['images']} images {words[figures['trusted_images']]}:")
    for line in class_table(shown["per_class"]):
        say(line)
    if figures["faults"]:
        say(f"in no figure: {counted(figures['faults'], 'image')} that could not be read")
    say(evaluation(figures, "labelled"))
    say_used(figures, context.screen)
    files = []
    if "confusion" in shown:
        picture = examine_figures.confusion_figure(
            np.array(shown["confusion"]), loaded.classes, title
        )
        files.append(examine_figures.save(picture, out / "confusion.png"))
    if context.run:
        context.run.record({k: v for k, v in figures.items() if isinstance(v, float)})
        trusted = figures["trusted"] or {}
        context.run.record({f"trusted.{k}": v for k, v in trusted.items() if isinstance(v, float)})
        context.run.record(result["counts"] | (figures["images_used"] or {}))
        context.run.tags({"trusted_images": figures["trusted_images"]})
        names = {"bundle": "bundle_fingerprint", "recipe": "recipe_fingerprint"}
        tags = {tag: result[name] for tag, name in names.items()}
        context.run.tags(tags | {"trained_by": str(result["trained_by"])})
        for path in [out / "evaluation.json", out / "per_class.csv", *files]:
            context.run.log_artifact(path, "evaluation")


def say_used(figures: Mapping[str, Any], screen: Screen) -> None:
    """Which of the figures to trust. figures: see `inference.evaluate.compute_metrics`."""
    used, trusted, kind = (figures[k] for k in ("images_used", "trusted", "trusted_images"))
    if used is None:
        screen.say(
            "the bundle does not say which images it was trained on: if these are among them, the"
            " figures are too good"
        )
        return
    if kind == "all":
        return
    if kind == "none":
        screen.say(
            "WARNING: the bundle was trained on all of these images: nothing here says how good it"
            " is on others"
        )
    elif trusted is None:
        screen.say(
            "the bundle was validated with all of these images, not trained on them: its settings"
            " and temperature were chosen on them"
        )
    else:
        words = used_words(used["trained_on"], used["validated"])
        screen.say(f"WARNING: the bundle was {words}: the figures of all of them are too good")
        what = "new" if kind == "new" else "validation"
        whose = "it has not seen" if kind == "new" else "it was validated, not trained, with"
        screen.say(f"the figure to trust, of the images {whose}:")
        screen.say(evaluation(trusted, what))


def used_words(trained: int, validated: int) -> str:
    """What a bundle was made of some images by; of each how many, where there are any."""
    both = (("trained on", trained), ("validated with", validated))
    parts = [f"{what} {count}" for what, count in both if count]
    parts[0] += " of these images"
    return " and ".join(parts)


def previous(out: Path, context: RunContext) -> Path | None:
    """Where the bundle that is replaced is kept; None for one that this very run had saved before
    it was stopped.
    """
    run = context.run.run_id if context.run else None
    there = _about(out)
    if there and run and there.get("lineage", {}).get("run_id") == run:
        return None
    return out.with_name(f"{out.name}.previous")


def say_replaced(out: Path, new: Path, context: RunContext) -> None:
    """Say which bundle at `out` the one in the folder `new` takes the place of, and how their
    figures compare; nothing if none is there.
    """
    kept, old, this = previous(out, context), _about(out), _about(new)
    if kept is None or old is None or this is None:
        return
    words = f"replaces the bundle of {_date(out)}: {_compared(old, this)}; it is kept in {kept}"
    if lost := _about(kept):
        words += f", in place of the bundle of {_date(kept)}: {_compared(lost, this)}"
    context.screen.say(words)


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
        loss += f" · {calibration.describe(figures)}"
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
            f" decisions right {figures['accuracy_at_thresholds']:.4f} at these thresholds,"
            f" {figures['accuracy']:.4f} at 0.5 · {loss}"
        )
    right = round(figures["accuracy"] * images)
    low, high = metrics.wilson_interval(right, images)
    balanced = f" · balanced {figures['balanced_accuracy']:.4f}"
    return (
        f"{said}accuracy {figures['accuracy']:.4f} ({right} of {images} {kind} images, 95 %"
        f" interval {low:.3f} to {high:.3f}){balanced} · {loss}"
    )
