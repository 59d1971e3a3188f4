"""Verbs that look into what was made: stores, bundles and scores."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from arrowhead.cli.app import fetched, finish, give, me, say_next
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
from arrowhead.inference.score_request import ScoreConfig
from arrowhead.tracking.registry import RegistryConfig
from arrowhead.wording import counted

# ---------------------------------------------------------------------------- features

features = App(
    name="features",
    help="Look into a feature store, check it, clean it.",
    sort_key=8,
    default_parameter=Parameter(negative=""),
    suppress_keyboard_interrupt=False,
)
Finished = Annotated[
    Path,
    Parameter(help="Feature store: a folder that `precompute` made, or OUT/store that `fit` made."),
]


@features.command
def info(store: Finished, *, output: Out = Output()) -> int:
    """What is in a store: images by class and split, faults by kind, recipe, size.

    Example: arrowhead features info out/store
    """
    from arrowhead.features import inspect

    held = inspect.info(store)
    if output.json:
        give(held)
        return 0
    screen = Screen(to_stderr=False)
    faults = sum(held["faults"].values())
    screen.say(
        f"{store}: {counted(held['images'], 'image')} = {counted(held['features'], 'feature')}"
        f" + {counted(faults, 'fault')} · {counted(held['distinct'], 'different content')} ·"
        f" {counted(held['shards'], 'shard')} ·"
        f" {held['bytes'] / 1e6:.1f} MB"
    )
    recipe = " · ".join(f"{name} {value}" for name, value in held["recipe"].items())
    screen.say(f"recipe {held['fingerprint']}: {recipe}")
    splits = sorted({split for counts in held["by_class"].values() for split in counts})
    wide = max([5, *map(len, held["by_class"])])
    screen.say(f"{'class':<{wide}}" + "".join(f"{split:>9}" for split in splits))
    for name, counts in held["by_class"].items():
        screen.say(f"{name:<{wide}}" + "".join(f"{counts.get(split, 0):>9}" for split in splits))
    for kind, count in held["faults"].items():
        screen.say(f"fault: {kind} {count}")
    return 0


@features.command
def verify(store: Finished, *, output: Out = Output()) -> int:
    """Check a store from end to end: hashes, schema, row counts, duplicates, classes.

    Exit code 4 when something in it cannot be trusted. Nothing is repaired.

    Example: arrowhead features verify out/store
    """
    from arrowhead.features import inspect

    found = inspect.verify(store)
    _show_findings(found, output)
    damaged = any(one.damage for one in found)
    if not output.json:
        Screen(to_stderr=False).say(f"{store} {'is DAMAGED' if damaged else 'is whole'}")
    return 4 if damaged else 0


@features.command
def gc(
    store: Finished,
    *,
    yes: Annotated[bool, Parameter(help="Remove them; without it they are only listed.")] = False,
    output: Out = Output(),
) -> int:
    """List what nothing refers to any more: drafts, shards and catalogs of earlier runs.

    Shards left from an earlier catalog are still looked up by content: keep them if those images
    may come back.

    Example: arrowhead features gc out/store --yes
    """
    from arrowhead.features import inspect

    found = inspect.gc(store, remove=yes)
    _show_findings(found, output)
    if not output.json:
        many = counted(len(found), "file")
        told = (
            f"{many} removed"
            if yes
            else f"{many} found; --yes removes {'it' if len(found) == 1 else 'them'}"
        )
        Screen(to_stderr=False).say(told if found else "nothing to remove")
    return 0


def _show_findings(found: list[Any], output: Output) -> None:
    if output.json:
        give({"findings": [{**asdict(one), "damage": one.damage} for one in found]})
        return
    for one in found:
        Screen(to_stderr=False).say(f"{one.kind}: {one.path}: {one.words}")


# ------------------------------------------------------------------------------ scores

scores_app = App(
    name="scores",
    help="Check what `score` wrote.",
    sort_key=8,
    default_parameter=Parameter(negative=""),
    suppress_keyboard_interrupt=False,
)


@scores_app.command(name="verify")
def scores_verify(
    out: Annotated[Path, Parameter(help="Scores: a folder that `score` wrote.")],
    *,
    output: Out = Output(),
) -> int:
    """Check scores from end to end: the hash of every part, its rows, their order.

    Exit code 4 when something in them cannot be trusted. Nothing is repaired: the same score
    command makes damaged parts again. `arrowhead score verify OUT` does the same.

    Example: arrowhead scores verify scores/
    """
    from arrowhead.inference import verify as inference_verify

    found = inference_verify.verify(out)
    if output.json:
        give(found)
    else:
        screen = Screen(to_stderr=False)
        for problem in found["problems"]:
            screen.say(problem)
        screen.say(
            f"{out}: {counted(found['parts'], 'part')} · {counted(found['rows'], 'row')} ·"
            f" {found['bytes'] / 1e6:.1f} MB:"
            f" {'all as written' if not found['problems'] else 'cannot be trusted'}"
        )
    return 4 if found["problems"] else 0


def scores_verb(words: list[str]) -> list[str]:
    """`score verify OUT` as `scores verify OUT`: scoring takes three names, so this is no scoring
    with a bundle called verify.
    """
    names = [word for word in words if not word.startswith("-")]
    return ["scores", *words[1:]] if words[:2] == ["score", "verify"] and len(names) == 3 else words


# ------------------------------------------------------------------------------ bundle

bundles = App(
    name="bundle",
    help="Look into a bundle, check it, register it.",
    sort_key=8,
    default_parameter=Parameter(negative=""),
    suppress_keyboard_interrupt=False,
)


CALIBRATION = (  # figures that have a line of their own
    "temperature",
    "temperature_fitted",
    "ece",
    "ece_low",
    "ece_high",
    "ece_uncalibrated",
    "ece_fitted",
)
SHOWN = ("l2", "best", "batch_size", "weight_decay", "dropout", "seed")  # of a bundle's training


@bundles.command(name="info")
def bundle_info(
    bundle: BundleAddress,
    *,
    per_class: Annotated[
        bool,
        Parameter(help="Also precision, recall, F1 and images of each class, the worst first."),
    ] = False,
    tracking: Models = TrackingStore(),
    output: Out = Output(),
) -> int:
    """What a bundle is: task, classes, recipe, head, how it was trained, figures, lineage.

    Example: arrowhead bundle info out/bundle --per-class
    """
    from arrowhead.bundle import format as bundle_format
    from arrowhead.evaluation import calibration
    from arrowhead.evaluation.metrics import class_table

    with fetched(bundle, tracking) as folder:
        held = bundle_format.info(folder) | {"bundle": bundle}
    if output.json:
        give(held)
        return 0
    screen = Screen(to_stderr=False)
    screen.say(
        f"{bundle}: {held['task']}, {counted(len(held['classes']), 'class', 'classes')} ·"
        f" {held['bytes'] / 1e6:.1f} MB · fingerprint {held['fingerprint']}"
    )
    screen.say(f"classes: {', '.join(held['classes'][:20])}{' …' * (len(held['classes']) > 20)}")
    recipe = " · ".join(f"{name} {value}" for name, value in held["recipe"].items())
    screen.say(f"recipe {held['recipe_fingerprint']}: {recipe}")
    screen.say(_head_of(held))
    metrics = held["metrics"]
    figures = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
    shown = {k: v for k, v in figures.items() if k not in CALIBRATION}
    screen.say("figures: " + " · ".join(f"{name} {value:.4g}" for name, value in shown.items()))
    if "temperature" in metrics:
        screen.say(f"calibration: {calibration.describe(metrics)}")
    if known := held["novelty"]:
        cut = known["threshold_at_5_percent_false_alarms"]
        screen.say(
            f"novelty: {known['training_images']} training images kept; threshold at 5 % false"
            f" alarms {'unknown (too few validation images)' if cut is None else f'{cut:.3f}'}"
        )
    lineage = held["lineage"]
    screen.say(
        f"made by arrowhead {lineage.get('arrowhead')}, MLflow run {lineage.get('run_id')},"
        f" data {lineage.get('data')}"
    )
    screen.say(counted(held["golden_images"], "golden image"))
    for name, images in (("per_class", "validation"), ("test_per_class", "test")):
        if per_class and (found := held["metrics"].get(name)):
            screen.say(f"{images} images, by class:")
            for line in class_table(found):
                screen.say(line)
    return 0


def _head_of(held: dict[str, Any]) -> str:
    """A bundle's head and how it was trained, as far as the bundle knows."""
    lineage = held["lineage"]
    training = lineage.get("training") or {}
    exact = " by logistic regression" if training.get("head") == "logistic" else ""
    parts = [f"head: {held['head']}{exact}"]
    rate = lineage.get("rate", training.get("rate"))
    if isinstance(rate, float):
        parts.append(f"learning rate {rate:.4g}")
    if "epochs" in training and not exact:
        kept = f" (kept: epoch {lineage['epoch']})" if "epoch" in lineage else ""
        parts.append(f"epochs {training['epochs']}{kept}")
    parts += [f"{name.replace('_', ' ')} {training[name]}" for name in SHOWN if name in training]
    return " · ".join([*parts, f"temperature {held['temperature']:.3f}"])


@bundles.command(name="verify")
def bundle_verify(
    bundle: BundleAddress,
    *,
    max_drift: Annotated[
        float, Parameter(help="Largest cosine distance of a golden image's feature.")
    ] = ScoreConfig().max_drift,
    tracking: Models = TrackingStore(),
    output: Out = Output(),
) -> int:
    """Check a bundle: seal, hashes, shapes; then replay its golden images on this machine.

    Exit code 4 when something in it cannot be trusted, or when this machine sees the images
    differently.

    Example: arrowhead bundle verify out/bundle
    """
    from arrowhead.bundle import replay
    from arrowhead.bundle.replay import NO_GOLDEN_IMAGES, must_agree
    from arrowhead.bundle.resolve import must_be_there

    must_be_there(bundle)
    with fetched(bundle, tracking) as folder:
        drift = replay.verify(folder)
    if output.json:
        give({"bundle": bundle, "drift": asdict(drift)})
    else:
        screen = Screen(to_stderr=False)
        if not drift.images:
            screen.say(NO_GOLDEN_IMAGES)
        screen.say(
            f"{bundle} is whole (report/ is not checked); {counted(drift.images, 'golden image')}"
            f" replayed: largest feature drift {drift.feature:.1g},"
            f" {counted(drift.changed, 'label')} changed"
        )
    must_agree(drift, max_drift)
    return 0


@bundles.command
def register(
    bundle: Annotated[Path, Parameter(help="Bundle: a folder that `fit` or `train` wrote.")],
    name: Annotated[str, Parameter(help="Name of the registered model.")],
    *,
    alias: Annotated[str, Parameter(help="Alias that is moved to the new version.")] = "champion",
    tracking: Watched = WatchedTracking(),
    output: Out = Output(),
) -> int:
    """Make a bundle a version of a registered model in MLflow, as --register of `fit` does. Done
    before, it only moves the alias.

    Example: arrowhead bundle register out/bundle dogs --alias challenger
    """
    from arrowhead.bundle.format import load
    from arrowhead.bundle.resolve import must_be_there
    from arrowhead.tracking.run import register as enter

    must_be_there(str(bundle))
    load(bundle)  # whole, or refused
    screen = Screen(to_stderr=output.json)
    asked = RegistryConfig(register=name, alias=alias)
    address = enter(bundle, tracking, asked, say=screen.say)
    say_next(screen, [[me(), "score", f"models:/{name}@{alias}", "IMAGES", "SCORES"]])
    return finish({"registered": address, "bundle": str(bundle)}, output)
