"""Report the metrics of a head, and compare them with those of the bundle that it replaces."""

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
from arrowhead.evaluation import calibration
from arrowhead.evaluation import metrics as evaluation_metrics
from arrowhead.evaluation.novelty import NoveltyDetector
from arrowhead.examine import figures as examine_figures
from arrowhead.inference.evaluate import reported_metrics
from arrowhead.reporting.run_context import RunContext, Screen
from arrowhead.wording import join_first, pluralize

MIN_IMBALANCE = 3  # ratio of the largest to the smallest class from which on it is reported
MAX_RARE_CLASSES_SHOWN = 3
MAX_CLASSES_SHOWN = 30  # of more, those with the lowest F1
TRUSTED_IMAGES = {"new": "new to the bundle", "validation": "that validated the bundle"}


def show_novelty_threshold(detector: NoveltyDetector, screen: Screen) -> None:
    """Show the distance above which an image is novel, at 5 % false alarms."""
    threshold = detector.threshold(0.05)
    if np.isfinite(threshold):
        screen.print(f"novelty threshold {threshold:.3f} (5 % false alarms)")
    else:
        images = pluralize(len(detector.known), "validation image")
        screen.print(f"no novelty threshold: {images}, too few for one")


def show_no_golden_images(screen: Screen) -> None:
    """Warn that other machines cannot be compared with this one."""
    screen.print(
        "No golden images: a machine that scores with this bundle cannot check that it sees images"
        " as this one does. Run precompute on the photos again to have some."
    )


def show_class_imbalance(catalog: Catalog, metrics: dict[str, Any], screen: Screen) -> None:
    """Show the recall of the rarest classes if the training classes are unbalanced.

    The accuracy over all images hides it. metrics: see `metrics.evaluate`.
    """
    rows = zip(catalog.labels, catalog.splits, strict=True)
    counts = Counter(name for names, split in rows if split == "train" for name in names)
    if catalog.multi or not counts or max(counts.values()) < MIN_IMBALANCE * min(counts.values()):
        return
    largest = max(counts, key=lambda name: (counts[name], name))
    rare = [
        name
        for name in sorted(counts, key=lambda name: (counts[name], name))
        if MIN_IMBALANCE * counts[name] <= counts[largest]
    ]
    parts = []
    for name in rare[:MAX_RARE_CLASSES_SHOWN]:
        line = metrics["per_class"].get(name, {"images": 0})
        recall = (
            f"recall {line['recall']:.4f} of {line['images']}" if line["images"] else "not tested"
        )
        parts.append(f"{name} ({counts[name]}: {recall})")
    hidden = len(rare) - MAX_RARE_CLASSES_SHOWN
    more = f" and {hidden} more" if hidden > 0 else ""
    screen.print(
        f"unbalanced: {counts[largest]} training images of {largest}, few of"
        f" {', '.join(parts)}{more}. Compare the balanced accuracy; --class-weights balanced gives"
        " rare classes more weight"
    )


def report_evaluation(
    result: dict[str, Any], bundle: Bundle, out: Path, context: RunContext
) -> None:
    """Show and record the metrics of a bundle on labelled images; write OUT/confusion.png.

    result: see `commands.score.evaluate`.
    """
    metrics, show = result["metrics"], context.screen.print
    shown, title = reported_metrics(metrics), "Labelled images"
    if metrics["tables_show"] == "trusted":
        images = TRUSTED_IMAGES[metrics["trusted_images"]]
        title = f"Images {images}"
        show(f"by class, {shown['images']} images {images}:")
    for line in evaluation_metrics.class_table(shown["per_class"], MAX_CLASSES_SHOWN):
        show(line)
    if metrics["faults"]:
        show(f"in no metric: {pluralize(metrics['faults'], 'image')} that could not be read")
    show(metrics_line(metrics, "labelled"))
    show_trusted_metrics(metrics, context.screen)
    pictures = []
    if "confusion" in shown:
        picture = examine_figures.confusion_figure(
            np.array(shown["confusion"]), bundle.classes, title
        )
        pictures.append(examine_figures.save(picture, out / "confusion.png"))
    if context.run:
        context.run.record({k: v for k, v in metrics.items() if isinstance(v, float)})
        trusted = metrics["trusted"] or {}
        context.run.record({f"trusted.{k}": v for k, v in trusted.items() if isinstance(v, float)})
        context.run.record(result["counts"] | (metrics["images_used"] or {}))
        context.run.tags({"trusted_images": metrics["trusted_images"]})
        context.run.tags(lineage_tags(result))
        for path in [out / "evaluation.json", out / "per_class.csv", *pictures]:
            context.run.log_artifact(path, "evaluation")


def lineage_tags(result: dict[str, Any]) -> dict[str, str]:
    """MLflow tags that identify the bundle of a result and the run that trained it."""
    return {
        "bundle": result["bundle_fingerprint"],
        "recipe": result["recipe_fingerprint"],
        "trained_by": str(result["trained_by"]),
    }


def show_trusted_metrics(metrics: Mapping[str, Any], screen: Screen) -> None:
    """Show which metrics to trust, if the bundle was made of some of the images.

    metrics: see `inference.evaluate.compute_metrics`.
    """
    used, trusted, kind = (metrics[k] for k in ("images_used", "trusted", "trusted_images"))
    if used is None:
        screen.print(
            "the bundle does not say which images it was trained on: if these are among them, the"
            " metrics are too good"
        )
    elif kind == "all":
        return
    elif kind == "none":
        screen.print(
            "WARNING: the bundle was trained on all of these images: nothing here says how good it"
            " is on others"
        )
    elif trusted is None:
        screen.print(
            "the bundle was validated with all of these images, not trained on them: its settings"
            " and temperature were chosen on them"
        )
    else:
        overlap = describe_overlap(used["trained_on"], used["validated"])
        screen.print(f"WARNING: the bundle was {overlap}: the metrics of all of them are too good")
        images = (
            "that are new to it"
            if kind == "new"
            else "that it was validated with and not trained on"
        )
        screen.print(f"the metrics to trust, of the images {images}:")
        screen.print(metrics_line(trusted, "new" if kind == "new" else "validation"))


def describe_overlap(trained: int, validated: int) -> str:
    """How many of some images a bundle was trained on and validated with, in words."""
    counts = (("trained on", trained), ("validated with", validated))
    parts = [f"{verb} {count}" for verb, count in counts if count]
    parts[0] += " of these images"
    return " and ".join(parts)


def previous_bundle(out: Path, context: RunContext) -> Path | None:
    """Where the bundle that is replaced is kept.

    None if this very run had saved it before it was stopped: then it is not kept.
    """
    run_id = context.run.run_id if context.run else None
    existing = _read_bundle_json(out)
    if existing and run_id and existing.get("lineage", {}).get("run_id") == run_id:
        return None
    return out.with_name(f"{out.name}.previous")


def show_bundle_to_delete(out: Path, context: RunContext) -> None:
    """Show before a training which bundle will be lost: that before the one at `out`."""
    previous = previous_bundle(out, context)
    if previous and _read_bundle_json(out) and _read_bundle_json(previous):
        context.screen.print(
            f"the new bundle will replace {out}, which is then kept in {previous}; the bundle there"
            f" now, of {_modified(previous)}, will be deleted. Copy it first if you need it."
        )


def show_replaced_bundle(out: Path, new: Path, context: RunContext) -> None:
    """Compare the bundle in the folder `new` with the one at `out` that it will replace, if any."""
    previous = previous_bundle(out, context)
    old, this = _read_bundle_json(out), _read_bundle_json(new)
    if previous is None or old is None or this is None:
        return
    message = (
        f"replaces the bundle of {_modified(out)}: {_compare(old, this)}; it is kept in {previous}"
    )
    if lost := _read_bundle_json(previous):
        message += f", in place of the bundle of {_modified(previous)}: {_compare(lost, this)}"
    context.screen.print(message)


def _modified(bundle: Path) -> str:
    return strftime("%Y-%m-%d %H:%M", localtime((bundle / "bundle.json").stat().st_mtime))


def _compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The metrics of an older and a new bundle, in words."""
    name = "f2_samples" if "f2_samples" in new["metrics"] else "accuracy"
    old_value, new_value = old.get("metrics", {}).get(name), new["metrics"].get(name)
    same_data = old.get("lineage", {}).get("data") == new["lineage"]["data"]
    if same_data and isinstance(old_value, int | float) and isinstance(new_value, int | float):
        return f"{name.partition('_')[0]} {old_value:.4f} (this one {new_value:.4f})"
    other = "images or labels"
    if isinstance(classes := old.get("classes"), list) and classes != new.get("classes"):
        other = f"classes ({join_first([*map(str, classes)], 5, ', ')})"
    return f"of other {other}, so that their metrics cannot be compared"


def _read_bundle_json(bundle: Path) -> dict[str, Any] | None:
    """The content of bundle.json, unchecked; None if it is missing or unreadable."""
    try:
        content = json.loads((bundle / "bundle.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def metrics_line(metrics: dict[str, Any], images: str = "validation") -> str:
    """Metrics on one line. metrics: see `metrics.evaluate`; images: the kind of images."""
    loss = "loss not finite" if metrics["loss"] is None else f"loss {metrics['loss']:.4f}"
    if "temperature" in metrics:
        loss += f" · {calibration.describe(metrics)}"
    elif metrics.get("ece") is not None:
        loss += (
            f" · ECE {metrics['ece']:.3f} ({metrics['ece_low']:.3f} to {metrics['ece_high']:.3f})"
        )
    prefix, count = "test: " if images == "test" else "", metrics["images"]
    if "f2_samples" in metrics:
        tuned = "thresholds tuned on them" if images == "validation" else "the bundle's thresholds"
        if metrics.get("f2_samples_held_out") is not None:
            tuned += f"; {metrics['f2_samples_held_out']:.4f} where tuned on other parts of them"
        return (
            f"{prefix}F2 {metrics['f2_samples']:.4f} (mean over {count} {images} images, at"
            f" {tuned}) · decisions right {metrics['accuracy_at_thresholds']:.4f} at these"
            f" thresholds, {metrics['accuracy']:.4f} at 0.5 · {loss}"
        )
    correct = round(metrics["accuracy"] * count)
    low, high = evaluation_metrics.wilson_interval(correct, count)
    return (
        f"{prefix}accuracy {metrics['accuracy']:.4f} ({correct} of {count} {images} images, 95 %"
        f" interval {low:.3f} to {high:.3f}) · balanced {metrics['balanced_accuracy']:.4f} · {loss}"
    )
