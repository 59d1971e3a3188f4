"""The commands below `bundle`: inspect a bundle, check it, register it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from arrowhead.cli.app import (
    finish,
    local_bundle,
    print_result,
    program,
    show_next_commands,
)
from arrowhead.cli.options import (
    BundleAddress,
    Models,
    Out,
    Output,
    TrackingStore,
    Watched,
    WatchedTracking,
)
from arrowhead.cli.screen import Screen
from arrowhead.data import remote_folder
from arrowhead.inference.score_request import ScoreConfig
from arrowhead.tracking.registry import RegistryConfig
from arrowhead.wording import pluralize

CALIBRATION_METRICS = (  # shown on their own line
    "temperature",
    "temperature_fitted",
    "ece",
    "ece_low",
    "ece_high",
    "ece_uncalibrated",
    "ece_fitted",
)
TRAINING_SETTINGS = ("l2", "best", "batch_size", "weight_decay", "dropout", "seed")  # to show


def bundle_info(
    bundle: BundleAddress,
    *,
    per_class: Annotated[
        bool,
        Parameter(help="Also show precision, recall, F1 and images of each class, worst first."),
    ] = False,
    tracking: Models = TrackingStore(),
    output: Out = Output(),
) -> int:
    """Show a bundle's task, classes, recipe, head, training, metrics and lineage.

    Example: arrowhead bundle info out/bundle --per-class
    """
    from arrowhead.bundle import format as bundle_format
    from arrowhead.evaluation.metrics import class_table

    with local_bundle(bundle, tracking) as folder:
        facts = bundle_format.info(folder) | {"bundle": bundle}
    if output.json:
        print_result(facts)
        return 0
    screen = Screen(to_stderr=False)
    _print_bundle(facts, screen)
    for name, images in (("per_class", "validation"), ("test_per_class", "test")):
        if per_class and (table := facts["metrics"].get(name)):
            screen.print(f"{images} images, by class:")
            for line in class_table(table):
                screen.print(line)
    return 0


def _print_bundle(facts: dict[str, Any], screen: Screen) -> None:
    """Print all that `bundle info` shows without --per-class."""
    from arrowhead.evaluation import calibration

    screen.print(
        f"{facts['bundle']}: {facts['task']},"
        f" {pluralize(len(facts['classes']), 'class', 'classes')} ·"
        f" {facts['bytes'] / 1e6:.1f} MB · fingerprint {facts['fingerprint']}"
    )
    screen.print(
        f"classes: {', '.join(facts['classes'][:20])}{' …' * (len(facts['classes']) > 20)}"
    )
    recipe = " · ".join(f"{name} {value}" for name, value in facts["recipe"].items())
    screen.print(f"recipe {facts['recipe_fingerprint']}: {recipe}")
    if origin := facts["lineage"].get("weights"):
        screen.print(f"weights: {origin['source']}, license {origin['license']}")
    screen.print(_head_line(facts))
    metrics = facts["metrics"]
    numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
    shown = {k: v for k, v in numbers.items() if k not in CALIBRATION_METRICS}
    screen.print("metrics: " + " · ".join(f"{name} {value:.4g}" for name, value in shown.items()))
    if "temperature" in metrics:
        screen.print(f"calibration: {calibration.describe(metrics)}")
    if novelty := facts["novelty"]:
        threshold = novelty["threshold_at_5_percent_false_alarms"]
        value = "unknown (too few validation images)" if threshold is None else f"{threshold:.3f}"
        screen.print(
            f"novelty: {novelty['training_images']} training images kept; threshold at 5 % false"
            f" alarms {value}"
        )
    lineage = facts["lineage"]
    screen.print(
        f"made by arrowhead {lineage.get('arrowhead')}, MLflow run {lineage.get('run_id')},"
        f" data {lineage.get('data')}"
    )
    screen.print(pluralize(facts["golden_images"], "golden image"))


def _head_line(facts: dict[str, Any]) -> str:
    """A bundle's head and its training settings, as far as they are known."""
    lineage = facts["lineage"]
    training = lineage.get("training") or {}
    logistic = " by logistic regression" if training.get("head") == "logistic" else ""
    parts = [f"head: {facts['head']}{logistic}"]
    rate = lineage.get("rate", training.get("rate"))
    if isinstance(rate, float):
        parts.append(f"learning rate {rate:.4g}")
    if "epochs" in training and not logistic:
        best = f" (kept: epoch {lineage['epoch']})" if "epoch" in lineage else ""
        parts.append(f"epochs {training['epochs']}{best}")
    parts += [
        f"{name.replace('_', ' ')} {training[name]}"
        for name in TRAINING_SETTINGS
        if name in training
    ]
    return " · ".join([*parts, f"temperature {facts['temperature']:.3f}"])


def bundle_verify(
    bundle: BundleAddress,
    *,
    max_drift: Annotated[
        float,
        Parameter(help="Largest cosine distance allowed between stored and recomputed features."),
    ] = ScoreConfig().max_drift,
    tracking: Models = TrackingStore(),
    output: Out = Output(),
) -> int:
    """Check a bundle: checksums and shapes; then score its golden images on this machine.

    Golden images are a few images kept in the bundle with their results. The exit code is 4 if the
    bundle is damaged, or if this machine computes other results.

    Example: arrowhead bundle verify out/bundle
    """
    from arrowhead.bundle import replay, resolve
    from arrowhead.bundle.replay import NO_GOLDEN_IMAGES, check_drift

    resolve.check_exists(bundle)
    with local_bundle(bundle, tracking) as folder:
        drift = replay.verify(folder)
    if output.json:
        print_result({"bundle": bundle, "drift": asdict(drift)})
    else:
        screen = Screen(to_stderr=False)
        if not drift.images:
            screen.print(NO_GOLDEN_IMAGES)
        screen.print(
            f"{bundle} is complete (report/ is not checked);"
            f" {pluralize(drift.images, 'golden image')} scored again: largest feature drift"
            f" {drift.feature:.1g}, {pluralize(drift.changed, 'label')} changed"
        )
    check_drift(drift, max_drift)
    return 0


def register(
    bundle: Annotated[Path, Parameter(help="Bundle: a folder written by `fit` or `train`.")],
    name: Annotated[str, Parameter(help="Name of the registered model.")],
    *,
    alias: Annotated[str, Parameter(help="Alias to move to the new version.")] = "champion",
    tracking: Watched = WatchedTracking(),
    output: Out = Output(),
) -> int:
    """Register a bundle as a new version of a model in MLflow, like --register of `fit`.

    If the bundle is registered already, this only moves the alias.

    Example: arrowhead bundle register out/bundle dogs --alias challenger
    """
    from arrowhead.bundle import resolve
    from arrowhead.bundle.format import load
    from arrowhead.tracking.run import register as register_model

    resolve.refresh_mirror(bundle := remote_folder.local(bundle))
    resolve.check_exists(str(bundle))
    load(bundle)  # raises if it is damaged
    screen = Screen(to_stderr=output.json)
    config = RegistryConfig(register=name, alias=alias)
    address = register_model(bundle, tracking, config, print_line=screen.print)
    show_next_commands(
        screen, [[program(), "score", f"models:/{name}@{alias}", "IMAGES", "SCORES"]]
    )
    return finish({"registered": address, "bundle": str(bundle)}, output)
