"""From a feature store to a bundle."""

from __future__ import annotations

import dataclasses
import hashlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from arrowhead import __version__
from arrowhead.bundle import format as bundle_format
from arrowhead.bundle import golden
from arrowhead.bundle.format import Bundle
from arrowhead.bundle.known_images import KnownImages
from arrowhead.commands import precompute
from arrowhead.data.catalog import Catalog
from arrowhead.evaluation import calibration, metrics, novelty
from arrowhead.evaluation.novelty import Novelty
from arrowhead.features import extract
from arrowhead.features.feature_config import FeatureConfig
from arrowhead.features.golden_images import GoldenConfig
from arrowhead.features.store import Features, Store
from arrowhead.reporting import context, evaluation, experiments, recording, scoring
from arrowhead.reporting import training as reporting_training
from arrowhead.reporting.context import Means
from arrowhead.reporting.training import Told
from arrowhead.runtime import launch
from arrowhead.training import checkpoint
from arrowhead.training import run as training_run
from arrowhead.training.config import TrainConfig
from arrowhead.training.lr_finder import Curve, FinderConfig
from arrowhead.training.study import Learned, Study
from arrowhead.training.trainer import Trained

# ------------------------------------------------------------------------------ learning


def find_rate(
    path: Path, config: TrainConfig, finder: FinderConfig, means: Means = Means()
) -> Curve:
    """The LR finder's curve and suggestions on a store."""
    asked = Study(head=config, finder=finder, teach=False)
    curve = learn(path, asked, means).curve
    assert curve is not None
    if means.run:
        store = Store(path)
        recording.settings_asked(means.run, asked.resolve(store)[0].head, ())
        found = {f"lr_finder.{k}": v for k, v in dataclasses.asdict(finder).items()}
        means.run.params(found | {"recipe": store.recipe.json()})
        means.run.tags({"recipe": store.recipe.fingerprint, "body": store.recipe.body})
        recording.datasets(means.run, Catalog(**store.read_catalog()))
    reporting_training.show_curve(curve, path, means)
    return curve


def learn(path: Path, asked: Study, means: Means = Means(), place: Path | None = None) -> Learned:
    """Train on a verified store. place: a folder of checkpoints, where a stopped study goes on."""
    store = Store(path)
    store.verify()
    asked, said = asked.resolve(store)
    for line in said:
        means.screen.say(line)
    told = Told(asked, means)
    run = means.top.run_id if means.top else None
    args = path, asked, place, run
    try:
        made: Learned = launch.run(
            training_run.learn,
            *args,
            config=means.launch,
            listen=told,
            place=place,
            sized=told.sized,
            labels=context.labels(means, "train"),
        )
    finally:
        told.send()
    told.ended(made)
    reporting_training.say_stop(made, means.screen)
    return made


# ---------------------------------------------------------------------- evaluation, bundle


def save(
    store: Store,
    config: TrainConfig,
    trained: Trained,
    out: Path,
    means: Means = Means(),
    lineage: dict[str, Any] | None = None,
    keep: GoldenConfig = GoldenConfig(),
) -> dict[str, Any]:
    """Evaluate a head and save it as a bundle to `out`, as `write_bundle` does; its metrics."""
    with bundle_format.saving(out, evaluation.previous(out, means)) as folder:
        figures = write_bundle(store, config, trained, folder, means, lineage, keep)
        evaluation.say_replaced(out, folder, means)
    if means.run:
        recording.trained_model(means.run, out, figures)
    return figures


def write_bundle(
    store: Store,
    config: TrainConfig,
    trained: Trained,
    folder: Path,
    means: Means = Means(),
    lineage: dict[str, Any] | None = None,
    keep: GoldenConfig = GoldenConfig(),
) -> dict[str, Any]:
    """Evaluate a head on the validation split and write its bundle into a folder of
    `bundle.format.saving`, with its confusion matrices; its metrics.

    Temperature and thresholds are fitted to the validation images; what they are worth is judged on
    parts of them that were left out (see `calibration.calibrate`). The split test, if there is one,
    is looked at once, at the end, and only to be told: test_accuracy and the like.
    """
    import torch

    valid = store.features("valid")
    classes = store.manifest()["classes"]
    made = Bundle(
        recipe=store.recipe,
        classes=classes,
        head=config.kind,
        temperature=1.0,
        multi=valid.multi,
        body_state=extract.load_weights(store.recipe, store.weights),
        head_state={name: torch.tensor(value) for name, value in trained.state.items()},
        metrics={},
        lineage={},
    )
    head = made.make_head()
    with torch.inference_mode():
        logit_NC = head(torch.from_numpy(valid.feature[:, 0].astype(np.float32)))
    found = calibration.calibrate(logit_NC.numpy(), valid.label, valid.image_id, classes)
    heat, cuts = found.temperature, found.thresholds
    figures = metrics.evaluate(
        logit_NC.numpy(), valid.label, classes, temperature=heat, thresholds=cuts
    )
    figures |= found.figures
    figures |= _test_figures(store, head, classes, heat, cuts)
    known, told = _novelty(store, valid), lineage or {}
    evaluation.say_threshold(known, means.screen)
    lineage = told | {
        "arrowhead": __version__,
        "run_id": means.run.run_id if means.run else None,
        "data": Catalog(**store.read_catalog()).digest(),
        "training": config.parameters(),
        "epoch": trained.epoch,
    }
    made = dataclasses.replace(
        made,
        temperature=heat,
        thresholds=None if cuts is None else cuts.tolist(),
        metrics=figures,
        lineage=lineage,
        novelty=known,
        images=KnownImages.of(store.features("train", mapped=True).image_id, valid.image_id),
    )
    photos = golden.pick(store, made, means.screen.say) if keep.golden_images else []
    bundle_format.write(dataclasses.replace(made, golden=photos), folder)
    if config.best != "last":
        means.screen.say(f"kept: epoch {trained.epoch}, the best by {config.best}")
    scoring.show_evaluation(figures, classes, folder / bundle_format.REPORT, means)
    evaluation.say_rare_classes(Catalog(**store.read_catalog()), figures, means.screen)
    return figures


def _test_figures(
    store: Store, head: Any, classes: list[str], temperature: float, thresholds: Any
) -> dict[str, Any]:
    """A trained head's figures for the split test, each named test_…; {} without such images."""
    import torch

    test = store.features("test")
    if not len(test.row):
        return {}
    with torch.inference_mode():
        logit_NC = head(torch.from_numpy(test.feature[:, 0].astype(np.float32))).numpy()
    found = metrics.evaluate(
        logit_NC, test.label, classes, temperature=temperature, thresholds=thresholds
    )
    return {f"test_{name}": value for name, value in found.items()}


def _novelty(store: Store, valid: Features) -> Novelty:
    """What the bundle remembers of the training images, from their clean view."""
    train = store.features("train", mapped=True)
    row_M = train.row[novelty.sample(train.image_id)]
    bank, first = [], 0
    for part in store.maps():
        here = row_M[(row_M >= first) & (row_M < first + len(part))] - first
        bank.append(part[here, 0])
        first += len(part)
    return Novelty.of(np.concatenate(bank), valid.feature[:, 0])


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
    means: Means,
) -> dict[str, Any]:
    """The main job: features to OUT/store; rate, head and evaluation to OUT/bundle."""
    with context.child(means, "extract") as part:
        result = precompute.precompute(data, out / "store", images, part)
    return result | fit_head(out / "store", out / "bundle", asked, means, images.golden)


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
    path: Path, out: Path, asked: Study, means: Means, keep: GoldenConfig = GoldenConfig()
) -> dict[str, Any]:
    """From a store to a bundle: rate, heads, evaluation."""
    store = Store(path)
    settled = asked.resolve(store)[0]
    if means.run:
        recording.settings_asked(means.run, settled.head, asked.knobs[0])
    context.params(
        means, {f"sweep.{k}": v for k, v in dataclasses.asdict(asked.sweep).items() if v}
    )
    context.params(means, {"workers": means.launch.workers, "arrowhead": __version__})
    if means.run:
        means.run.tags({"recipe": store.recipe.fingerprint, "body": store.recipe.body})
        means.run.params({"recipe": store.recipe.json()})
        catalog = Catalog(**store.read_catalog())
        recording.datasets(means.run, catalog)
    # The heads of a grid are children themselves.
    with nullcontext(means) if asked.sweep.grid else context.child(means, "train") as part:
        made = learn(path, asked, part, training_of(out))
    best, chosen = made.winner, made.config
    assert chosen is not None
    if means.run:
        recording.settings_used(means.run, chosen)
    rate = None if chosen.head == "logistic" else float(chosen.rate)
    result: dict[str, Any] = {"epochs": best.epochs}
    with bundle_format.saving(out, evaluation.previous(out, means)) as folder:
        beside = folder / bundle_format.REPORT
        if made.curve:
            with context.child(means, "lr-find") as part:
                reporting_training.show_curve(made.curve, beside, part)
        if asked.sweep.grid:
            result["grid"] = experiments.show_grid(store, asked, made, beside, means)
        if made.folds:
            found = experiments.show_folds(store, chosen, made.folds, beside, means)
            result["folds"] = found | {"file": str(out / bundle_format.REPORT / found["file"])}
        if made.shares:
            experiments.show_shares(made.shares, beside, means)
            result["learning_curve"] = made.shares
        figures = write_bundle(store, chosen, best, folder, means, {"rate": rate}, keep)
        evaluation.say_replaced(out, folder, means)
    if means.run:
        recording.trained_model(means.run, out, figures)
    registered = means.run.register(out) if means.run else None
    checkpoint.forget(training_of(out), settled.key(store))
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
        "run_id": means.run.run_id if means.run else None,
    }
