"""The commands fit, train and lr-find: from images or a feature store to a bundle."""

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
from arrowhead.data import remote_folder
from arrowhead.data.catalog import Catalog
from arrowhead.errors import ConfigError
from arrowhead.examine import figures
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

# ------------------------------------------------------------------------------ commands


def fit(
    data: str | Path | Catalog,
    out: Path,
    images: FeatureConfig,
    study: Study,
    context: RunContext,
) -> dict[str, Any]:
    """Compute features into OUT/store, and train the bundle OUT/bundle on them.

    Returns what `precompute.precompute` and `train_bundle` return.
    """
    evaluation.show_bundle_to_delete(out / "bundle", context)
    with run_context.child_context(context, "extract") as child:
        result = precompute.precompute(data, out / "store", images, child)
    return result | train_bundle(out / "store", out / "bundle", study, context, images.golden)


def train_bundle(
    path: Path, out: Path, study: Study, context: RunContext, golden: GoldenConfig = GoldenConfig()
) -> dict[str, Any]:
    """Train on the store at `path`, and write the best head as a bundle to `out`.

    Returns the winner's settings and metrics, and the results of LR finder, grid, folds and
    learning curve.
    """
    store = Store(path)
    trained_catalog = store.manifest()["catalog"]["sha256"]
    resolved = study.resolve(store)[0]
    _log_study(store, study, resolved.head, context)
    # Each head of a grid gets a child run instead.
    with (
        nullcontext(context)
        if study.sweep.grid
        else run_context.child_context(context, "train") as child
    ):
        study_result = run_study(path, study, child, checkpoint_dir_of(out))
    winner, config = study_result.winner, study_result.config
    assert config is not None
    if context.run:
        recording.log_final_settings(context.run, config)
    rate = None if config.head == "logistic" else float(config.rate)
    with bundle_format.draft(out, evaluation.previous_bundle(out, context)) as folder:
        report = folder / bundle_format.REPORT_FOLDER
        experiment_results = _report_experiments(store, study, study_result, report, context)
        if "folds" in experiment_results:
            file = out / bundle_format.REPORT_FOLDER / experiment_results["folds"]["file"]
            experiment_results["folds"]["file"] = str(file)
        metrics = write_bundle(store, config, winner, folder, context, {"rate": rate}, golden)
        _check_unchanged(store, trained_catalog)
        evaluation.show_replaced_bundle(out, folder, context)
    if context.run:
        recording.log_model(context.run, out, metrics)
    registered = context.run.register(out) if context.run else None
    checkpoint.remove_finished(checkpoint_dir_of(out), resolved.key(store))
    return experiment_results | {
        "epochs": winner.epochs,
        "head": config.head,
        "rate": rate,
        "l2": winner.l2,
        "lr_finder": _curve_summary(study_result.curve) if study_result.curve else None,
        "epoch": winner.epoch,
        "stopped": winner.stopped or None,
        "metrics": metrics,
        "train_seconds": study_result.seconds,
        "bundle": str(out),
        "registered": registered,
        "store": str(path),
        "run_id": context.run.run_id if context.run else None,
    }


def find_learning_rate(
    path: Path, config: TrainConfig, finder: FinderConfig, context: RunContext = RunContext()
) -> Curve:
    """Run the LR finder on the store at `path`; write its figure and table into the store."""
    study = Study(head=config, finder=finder, train_heads=False)
    curve = run_study(path, study, context).curve
    assert curve is not None
    if context.run:
        store = Store(path)
        recording.log_requested_settings(context.run, study.resolve(store)[0].head, ())
        params = {f"lr_finder.{k}": v for k, v in dataclasses.asdict(finder).items()}
        context.run.params(params | {"recipe": store.recipe.to_json()})
        context.run.tags({"recipe": store.recipe.fingerprint, "body": store.recipe.body})
        recording.log_datasets(context.run, Catalog(**store.read_catalog()))
    reporting_training.report_lr_curve(curve, path, context)
    for name in ("lr_finder.png", "lr_finder.csv"):
        remote_folder.of(path).upload(path / name)
    return curve


# ------------------------------------------------------------------------------ training


def run_study(
    path: Path,
    study: Study,
    context: RunContext = RunContext(),
    checkpoint_dir: Path | None = None,
) -> StudyResult:
    """Verify the store at `path` and train on it.

    checkpoint_dir: where checkpoints are saved, and from where a stopped study is resumed.
    """
    store = Store(path)
    store.verify()
    study, messages = study.resolve(store)
    for message in messages:
        context.screen.print(message)
    reporter = StudyReporter(study, context)
    run_id = context.root_run.run_id if context.root_run else None
    args = path, study, checkpoint_dir, run_id
    try:
        study_result: StudyResult = launch.run(
            training_run.run_study,
            *args,
            config=context.launch,
            on_report=reporter,
            checkpoint_dir=checkpoint_dir,
            on_start=reporter.show_workers,
            labels=run_context.metric_labels(context, "train"),
        )
    finally:
        reporter.send()
    reporter.finish(study_result)
    reporting_training.show_early_stopping(study_result, context.screen)
    return study_result


def checkpoint_dir_of(bundle: Path) -> Path:
    """Where the training of a bundle saves its checkpoints until it has finished."""
    return bundle.with_name(f".{bundle.name}.training")


def bundle_of_checkpoint_dir(checkpoint_dir: Path) -> Path:
    """The inverse of `checkpoint_dir_of`."""
    return checkpoint_dir.with_name(checkpoint_dir.name.removeprefix(".").removesuffix(".training"))


def run_file(bundle: Path, *request: Any) -> Path:
    """The file that remembers the unfinished run of this request, beside its checkpoints."""
    digest = hashlib.blake2b(repr(request).encode("utf-8", "surrogateescape"), digest_size=6)
    return checkpoint_dir_of(bundle.absolute()) / f"run-{digest.hexdigest()}.json"


def _log_study(store: Store, study: Study, head: TrainConfig, context: RunContext) -> None:
    """Log what was requested. head: the settings, as far as they are known before training."""
    run = context.run
    if run is None:
        return
    recording.log_requested_settings(run, head, study.overrides[0])
    sweep = dataclasses.asdict(study.sweep)
    run.params({f"sweep.{k}": v for k, v in sweep.items() if v})
    run.params({"workers": context.launch.workers, "arrowhead": __version__})
    run.params({"recipe": store.recipe.to_json()})
    run.tags({"recipe": store.recipe.fingerprint, "body": store.recipe.body})
    recording.log_datasets(run, Catalog(**store.read_catalog()))


def _check_unchanged(store: Store, catalog: str) -> None:
    """Raise ConfigError if the store has another catalog than when the training began; catalog: the
    sha256 of that. The head would have learned other labels than it is evaluated by.
    """
    store.files.refresh()
    if store.manifest()["catalog"]["sha256"] != catalog:
        raise ConfigError(
            f"the labels or images of {store.path} were changed during the training.",
            "a store that stays the same until the bundle is written.",
            "run the same command again.",
        )


def _report_experiments(
    store: Store, study: Study, study_result: StudyResult, folder: Path, context: RunContext
) -> dict[str, Any]:
    """Report LR finder, grid, folds and learning curve, with files in `folder`; their results."""
    result: dict[str, Any] = {}
    if len(study_result.winner.epochs) > 1:
        figures.epochs_csv(study_result.winner.epochs, folder / "epochs.csv")
    if study_result.curve:
        with run_context.child_context(context, "lr-find") as child:
            reporting_training.report_lr_curve(study_result.curve, folder, child)
    if study.sweep.grid:
        result["grid"] = experiments.report_grid(store, study, study_result, folder, context)
    if study_result.folds:
        assert study_result.config is not None
        result["folds"] = experiments.report_folds(
            store, study_result.config, study_result.folds, folder, context
        )
    if study_result.shares:
        experiments.report_learning_curve(study_result.shares, folder, context)
        result["learning_curve"] = study_result.shares
    return result


def _curve_summary(curve: Curve) -> dict[str, Any]:
    """The results of the LR finder, without the points of its curve."""
    names = ("suggestions", "spreads", "race", "chosen", "verdict")
    return {name: value for name, value in curve.plain().items() if name in names}


# ------------------------------------------------------------------------------- bundles


def save_bundle(
    store: Store,
    config: TrainConfig,
    trained: TrainedHead,
    out: Path,
    context: RunContext = RunContext(),
) -> dict[str, Any]:
    """Save a trained head as a bundle to `out` (see `write_bundle`); returns its metrics."""
    with bundle_format.draft(out, evaluation.previous_bundle(out, context)) as folder:
        metrics = write_bundle(store, config, trained, folder, context)
        evaluation.show_replaced_bundle(out, folder, context)
    if context.run:
        recording.log_model(context.run, out, metrics)
    return metrics


def write_bundle(
    store: Store,
    config: TrainConfig,
    trained: TrainedHead,
    folder: Path,
    context: RunContext = RunContext(),
    lineage: dict[str, Any] | None = None,
    golden: GoldenConfig = GoldenConfig(),
) -> dict[str, Any]:
    """Build the bundle of a trained head, write it and its confusion matrices into a folder of
    `bundle.format.draft`, and report its metrics, which are returned.
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
    evaluation.show_novelty_threshold(bundle.novelty, context.screen)
    if golden.golden_images and not bundle.golden:
        evaluation.show_no_golden_images(context.screen)
    if config.best != "last":
        context.screen.print(f"kept: epoch {trained.epoch}, the best by {config.best}")
    report = folder / bundle_format.REPORT_FOLDER
    scoring.report_bundle(bundle.metrics, bundle.classes, report, context)
    catalog = Catalog(**store.read_catalog())
    evaluation.show_class_imbalance(catalog, bundle.metrics, context.screen)
    return bundle.metrics


def _golden_candidates(store: Store) -> Mapping[bytes, bytes]:
    """The copies of photos that the store keeps. Stores of version 0.1.0 keep none: then the photos
    themselves, if they are unchanged.
    """
    images = store.load_golden()
    if images is None:
        return golden_images.read_candidates(store, Catalog(**store.read_catalog()))
    return images
