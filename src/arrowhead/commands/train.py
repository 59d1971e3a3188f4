"""From a feature store to a bundle."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from arrowhead import __version__
from arrowhead.bundle import build
from arrowhead.bundle import format as bundle_format
from arrowhead.commands import precompute
from arrowhead.data.catalog import Catalog
from arrowhead.features import golden_images
from arrowhead.features.feature_config import FeatureConfig
from arrowhead.features.golden_images import GoldenConfig
from arrowhead.features.store import Store
from arrowhead.reporting import evaluation, experiments, recording, run_context, scoring
from arrowhead.reporting import training as reporting_training
from arrowhead.reporting.run_context import RunContext
from arrowhead.reporting.training import StudyReporter
from arrowhead.runtime import launch
from arrowhead.training import checkpoint
from arrowhead.training import run as training_run
from arrowhead.training.config import TrainConfig
from arrowhead.training.lr_finder import Curve, FinderConfig
from arrowhead.training.study import Study, StudyResult
from arrowhead.training.trainer import TrainedHead

# ------------------------------------------------------------------------------ learning


def find_rate(
    path: Path, config: TrainConfig, finder: FinderConfig, context: RunContext = RunContext()
) -> Curve:
    """The LR finder's curve and suggestions on a store."""
    asked = Study(head=config, finder=finder, train_heads=False)
    curve = learn(path, asked, context).curve
    assert curve is not None
    if context.run:
        store = Store(path)
        recording.settings_asked(context.run, asked.resolve(store)[0].head, ())
        found = {f"lr_finder.{k}": v for k, v in dataclasses.asdict(finder).items()}
        context.run.params(found | {"recipe": store.recipe.to_json()})
        context.run.tags({"recipe": store.recipe.fingerprint, "body": store.recipe.body})
        recording.datasets(context.run, Catalog(**store.read_catalog()))
    reporting_training.show_curve(curve, path, context)
    return curve


def learn(
    path: Path, asked: Study, context: RunContext = RunContext(), place: Path | None = None
) -> StudyResult:
    """Train on a verified store. place: a folder of checkpoints, where a stopped study goes on."""
    store = Store(path)
    store.verify()
    asked, said = asked.resolve(store)
    for line in said:
        context.screen.say(line)
    told = StudyReporter(asked, context)
    run = context.top.run_id if context.top else None
    args = path, asked, place, run
    try:
        made: StudyResult = launch.run(
            training_run.run_study,
            *args,
            config=context.launch,
            on_report=told,
            checkpoint_dir=place,
            on_start=told.sized,
            labels=run_context.labels(context, "train"),
        )
    finally:
        told.send()
    told.ended(made)
    reporting_training.say_stop(made, context.screen)
    return made


# ---------------------------------------------------------------------- evaluation, bundle


def save(
    store: Store,
    config: TrainConfig,
    trained: TrainedHead,
    out: Path,
    context: RunContext = RunContext(),
    lineage: dict[str, Any] | None = None,
    golden: GoldenConfig = GoldenConfig(),
) -> dict[str, Any]:
    """Evaluate a head and save it as a bundle to `out`, as `write_bundle` does; its metrics."""
    with bundle_format.draft(out, evaluation.previous(out, context)) as folder:
        figures = write_bundle(store, config, trained, folder, context, lineage, golden)
        evaluation.say_replaced(out, folder, context)
    if context.run:
        recording.trained_model(context.run, out, figures)
    return figures


def write_bundle(
    store: Store,
    config: TrainConfig,
    trained: TrainedHead,
    folder: Path,
    context: RunContext = RunContext(),
    lineage: dict[str, Any] | None = None,
    golden: GoldenConfig = GoldenConfig(),
) -> dict[str, Any]:
    """Build the bundle of a trained head, write it into a folder of `bundle.format.draft` with
    confusion matrices beside it, and report its metrics, which are returned.
    """
    run_id = context.run.run_id if context.run else None
    bundle = build.build(
        store,
        config,
        trained,
        candidates=_golden_candidates(store) if golden.golden_images else {},
        lineage=(lineage or {}) | {"run_id": run_id},
    )
    bundle_format.write(bundle, folder)
    assert bundle.novelty is not None
    evaluation.say_threshold(bundle.novelty, context.screen)
    if golden.golden_images and not bundle.golden:
        evaluation.say_no_golden_images(context.screen)
    if config.best != "last":
        context.screen.say(f"kept: epoch {trained.epoch}, the best by {config.best}")
    report = folder / bundle_format.REPORT_FOLDER
    scoring.show_evaluation(bundle.metrics, bundle.classes, report, context)
    evaluation.say_rare_classes(Catalog(**store.read_catalog()), bundle.metrics, context.screen)
    return bundle.metrics


def _golden_candidates(store: Store) -> Mapping[bytes, bytes]:
    """The copies of photos that the store keeps. Stores of version 0.1.0 keep none: then the photos
    themselves, if they are unchanged.
    """
    images = store.load_golden()
    if images is None:
        return golden_images.read_candidates(store, Catalog(**store.read_catalog()))
    return images


# --------------------------------------------------------------------------- many heads


def _advice(curve: Curve) -> dict[str, Any]:
    """What a curve comes to, without its points."""
    kept = ("suggestions", "spreads", "race", "chosen", "verdict")
    return {name: value for name, value in curve.plain().items() if name in kept}


# ------------------------------------------------------------------------------- verbs


def fit(
    data: str | Path | Catalog,
    out: Path,
    images: FeatureConfig,
    asked: Study,
    context: RunContext,
) -> dict[str, Any]:
    """The main job: features to OUT/store; rate, head and evaluation to OUT/bundle."""
    with run_context.child(context, "extract") as part:
        result = precompute.precompute(data, out / "store", images, part)
    return result | fit_head(out / "store", out / "bundle", asked, context, images.golden)


def training_of(out: Path) -> Path:
    """Where the training of a bundle keeps its checkpoints until it is done."""
    return out.with_name(f".{out.name}.training")


def bundle_of(training: Path) -> Path:
    """The bundle whose checkpoints are kept there: the inverse of `training_of`."""
    return training.with_name(training.name.removeprefix(".").removesuffix(".training"))


def unfinished(out: Path, *request: Any) -> Path:
    """The file that stands for the unfinished run of a request, beside its checkpoints."""
    word = hashlib.blake2b(repr(request).encode("utf-8", "surrogateescape"), digest_size=6)
    return training_of(out.absolute()) / f"run-{word.hexdigest()}.json"


def fit_head(
    path: Path, out: Path, asked: Study, context: RunContext, golden: GoldenConfig = GoldenConfig()
) -> dict[str, Any]:
    """From a store to a bundle: rate, heads, evaluation."""
    store = Store(path)
    settled = asked.resolve(store)[0]
    if context.run:
        recording.settings_asked(context.run, settled.head, asked.overrides[0])
    run_context.params(
        context, {f"sweep.{k}": v for k, v in dataclasses.asdict(asked.sweep).items() if v}
    )
    run_context.params(context, {"workers": context.launch.workers, "arrowhead": __version__})
    if context.run:
        context.run.tags({"recipe": store.recipe.fingerprint, "body": store.recipe.body})
        context.run.params({"recipe": store.recipe.to_json()})
        recording.datasets(context.run, Catalog(**store.read_catalog()))
    # The heads of a grid are children themselves.
    with nullcontext(context) if asked.sweep.grid else run_context.child(context, "train") as part:
        made = learn(path, asked, part, training_of(out))
    best, chosen = made.winner, made.config
    assert chosen is not None
    if context.run:
        recording.settings_used(context.run, chosen)
    rate = None if chosen.head == "logistic" else float(chosen.rate)
    result: dict[str, Any] = {"epochs": best.epochs}
    with bundle_format.draft(out, evaluation.previous(out, context)) as folder:
        beside = folder / bundle_format.REPORT_FOLDER
        if made.curve:
            with run_context.child(context, "lr-find") as part:
                reporting_training.show_curve(made.curve, beside, part)
        if asked.sweep.grid:
            result["grid"] = experiments.show_grid(store, asked, made, beside, context)
        if made.folds:
            found = experiments.show_folds(store, chosen, made.folds, beside, context)
            result["folds"] = found | {
                "file": str(out / bundle_format.REPORT_FOLDER / found["file"])
            }
        if made.shares:
            experiments.show_shares(made.shares, beside, context)
            result["learning_curve"] = made.shares
        figures = write_bundle(store, chosen, best, folder, context, {"rate": rate}, golden)
        evaluation.say_replaced(out, folder, context)
    if context.run:
        recording.trained_model(context.run, out, figures)
    registered = context.run.register(out) if context.run else None
    checkpoint.remove_finished(training_of(out), settled.key(store))
    return result | {
        "head": chosen.head,
        "rate": rate,
        "l2": best.l2,
        "lr_finder": _advice(made.curve) if made.curve else None,
        "epoch": best.epoch,
        "stopped": best.stopped or None,
        "metrics": figures,
        "train_seconds": made.seconds,
        "bundle": str(out),
        "registered": registered,
        "store": str(path),
        "run_id": context.run.run_id if context.run else None,
    }
