"""The stages in order: launched, shown and recorded.

    precompute   DATA  -> store          catalog, extraction, manifest
    learn        store -> LR curve, head
    save         head  -> bundle         evaluation, temperature, golden images
    fit          all of it, in one parent run

Stages know neither Ray nor MLflow nor the screen; here they are given to `launch`, and what
they report to `account`.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from arrowhead import (
    __version__,
    account,
    bundle,
    calibration,
    checkpoint,
    extract,
    fileio,
    golden,
    launch,
    metrics,
    model,
    novelty,
    plan,
    recording,
    shards,
    study,
)
from arrowhead.account import Means, Work
from arrowhead.bundle import Bundle
from arrowhead.features import FeatureConfig, weights_of
from arrowhead.golden import GoldenConfig
from arrowhead.known_images import KnownImages
from arrowhead.lr_finder import Curve, FinderConfig
from arrowhead.novelty import Novelty
from arrowhead.plan import Catalog
from arrowhead.shards import Store
from arrowhead.study import Learned, Study
from arrowhead.train import TrainConfig, Trained

# -------------------------------------------------------------------------- the first pass


TRIED_AGAIN = ("unreadable", "decoder_crash")  # faults that the next run may not find
NAMED = 5  # files with faults, by path
MAX_TRIES = 255  # what the catalog's column holds


def precompute(
    data: str | Path | Catalog, path: Path, images: FeatureConfig, means: Means = Means()
) -> dict[str, Any]:
    """Make the store at `path` hold a feature of every image of `data` (see `plan.labelled`), which
    may have been listed already.

    Images whose features are there already are not decoded again. Returns counts {inputs,
    features, decoded, looked_up, skipped, reused, fallback, faults, ignored}, faults with their
    paths, seconds by stage, store, fingerprint. Raises ConfigError if the store was made in
    another way or another command is writing it, DataError if something in it has changed.
    """
    began = perf_counter()
    catalog = data if isinstance(data, Catalog) else plan.labelled(data, images.source)
    store = _store(path, images)
    with store.locked(means.screen.say):
        intact = store.intact()
        store.examine_leftovers()
        account.say_source(catalog, means.screen)
        account.say_classes(store, catalog, means.screen)
        catalog = _tried_again(store, catalog, images.extract.max_bytes)
        account.params(
            means, {f"recipe.{k}": v for k, v in dataclasses.asdict(store.recipe).items()}
        )
        runs = plan.chunks(catalog.paths, store.chunk_size)
        names = [plan.chunk_name(catalog, rows, store.recipe.fingerprint) for rows in runs]
        store.write_pending(catalog.columns())
        missing = [i for i, name in enumerate(names) if not store.shard(name).is_file()]
        total = sum(len(runs[i]) for i in missing)
        args = path, images.pixels, images.extract
        there = len(catalog) - total
        done = run_chunks(extract.extract, args, missing, total, there, "extract", means)
        manifest, drawn = _complete(store, catalog, names, images, intact)
        account.say_split(catalog, drawn, means.screen)
    done.seconds["wall"] = perf_counter() - began
    redone = {names[i] for i in missing}
    skipped = sum(
        one["files"] - one["faults"] for one in manifest["shards"] if one["name"] not in redone
    )
    faults = sum(one["faults"] for one in manifest["shards"])
    counts = _balance(catalog, faults, done, skipped)
    account.say_counts(means, counts, done)
    kinds = sum((Counter(one["kinds"]) for one in manifest["shards"]), Counter[str]())
    torn = fault_list(store) if faults else []
    first = [one["path"] for one in torn[:NAMED]]
    account.say_faults(kinds, first, store.path / "shards", means.screen)
    if means.top:
        recording.datasets(means.top, drawn)
    if means.run:
        means.run.record(counts | {f"seconds.{k}": v for k, v in done.seconds.items()})
        means.run.tags({"recipe": store.recipe.fingerprint, "body": store.recipe.body})
    return {
        "counts": counts,
        "faults": torn,
        "fault_kinds": dict(kinds),
        "seconds": dict(done.seconds),
        "roofline": extract.roofline(done.seconds, done.decoded, done.workers),
        "store": str(path),
        "fingerprint": store.recipe.fingerprint,
        "classes": manifest["classes"],
        "too_many_faults": images.extract.too_many(faults, len(catalog)),
    }


def _balance(catalog: Catalog, faults: int, done: Work, skipped: int) -> dict[str, int]:
    """The account of all files that were seen: inputs = features + faults + ignored."""
    features = done.decoded + done.looked_up + skipped
    if features + faults != len(catalog):
        raise AssertionError(
            f"{len(catalog)} images, but {features} features and {faults} faults: {done}"
        )
    return {
        "inputs": features + faults + catalog.ignored,
        "features": features,
        "decoded": done.decoded,
        "looked_up": done.looked_up,
        "skipped": skipped,
        "reused": done.looked_up + skipped,
        "fallback": done.fallback,
        "faults": faults,
        "ignored": catalog.ignored,
    }


def _tried_again(store: Store, catalog: Catalog, max_bytes: int) -> Catalog:
    """The catalog, with one more try for each file that could not be read and now can, and for each
    that the decoder's process died over.

    Its stamp is as before (a permission given leaves it), so only the count of tries gives its
    shard another name.
    """
    if not (store.path / "manifest.json").is_file():
        return catalog
    manifest = store.manifest()
    kept = store.path / manifest["catalog"]["name"]
    passing = [one for one in manifest["shards"] if {*TRIED_AGAIN} & {*one["kinds"]}]
    if not kept.is_file() or not (passing or manifest["catalog"]["tries"]):
        return catalog
    old = Catalog(**store.read_catalog())
    faults = {
        path: fault
        for one in passing
        for rows in [store.read(one["name"])]
        for path, fault in zip(rows.paths, rows.faults, strict=True)
        if fault and fault.startswith(TRIED_AGAIN)
    }
    tries = catalog.tries.copy()
    for was in np.flatnonzero(
        [n > 0 or p in faults for n, p in zip(old.tries, old.paths, strict=True)]
    ):
        row = bisect.bisect_left(catalog.paths, old.paths[was])
        same = row < len(catalog) and catalog.paths[row] == old.paths[was]
        if same and (catalog.sizes[row], catalog.stamps[row]) == (old.sizes[was], old.stamps[was]):
            tries[row] = old.tries[was]
            if old.paths[was] in faults and tries[row] < MAX_TRIES:
                _, fault = catalog.read(row, max_bytes)
                tries[row] += not (fault or "").startswith("unreadable")
    return dataclasses.replace(catalog, tries=tries)


def _store(path: Path, images: FeatureConfig) -> Store:
    """The store for these settings, its body's weights inside."""
    import safetensors.torch

    weights = weights_of(path, images.body)
    body = model.Body(
        images.body.body,
        weights.state,
        pool=images.body.pool,
        mean=weights.mean,
        std=weights.std,
        size=images.pixels.size,
    )
    recipe = extract.recipe_of(images.pixels, images.body, weights, body.width)
    if (path / "store.json").is_file():  # it goes on as it was begun, photo by photo
        recipe = dataclasses.replace(recipe, decoder=Store(path).recipe.decoder)
    store = Store.create(path, recipe, images.extract.chunk_size)
    if not store.weights.is_file():
        with fileio.draft(store.weights) as sketch:
            sketch.write_bytes(safetensors.torch.save(weights.state))
    return store


def _complete(
    store: Store,
    catalog: Catalog,
    names: list[str],
    images: FeatureConfig,
    intact: dict[str, str],
) -> tuple[dict[str, Any], Catalog]:
    """Check that every file has its row, draw the splits, keep golden images, write catalog and
    manifest.
    """
    parts = [store.read(name) for name in names]
    if [path for rows in parts for path in rows.paths] != catalog.paths:
        raise AssertionError("the shards do not hold every file of the catalog once, in order")
    ids = [image_id for rows in parts for image_id in rows.image_ids]
    faults = [fault for rows in parts for fault in rows.faults]
    faulty = [fault is not None for fault in faults]
    drawn = plan.drawn(catalog, ids, images.source.valid_share, faulty)
    kept = golden.keep(store, drawn, ids, faults) if images.golden.golden_images else []
    manifest = store.complete(names, drawn.columns(), intact, kept)
    store.drop_pending()
    return manifest, drawn


def fault_list(store: Store, most: int = 1000) -> list[dict[str, str]]:
    """Path and fault of the first `most` images that could not be read."""
    found = [
        {"path": path, "fault": fault}
        for rows in store.rows()
        for path, fault in zip(rows.paths, rows.faults, strict=True)
        if fault
    ]
    return found[:most]


def run_chunks(
    stage: Callable[..., Any],
    args: tuple[Any, ...],
    tasks: list[int],
    total: int,
    there: int,
    title: str,
    means: Means,
) -> Work:
    """Run a chunk-claiming stage on all workers, shown as one bar. total: images in these tasks;
    there: images of the others, which are done.
    """
    done = Work()
    if not tasks:
        return done
    progress = account.Progress(means.run, done, there, there + total)
    with means.screen.bar(title, total) as advance:

        def listen(message: dict[str, Any]) -> None:
            if "restart" in message:
                account.say_restart(message, means.screen)
                return
            if "warning" in message:
                means.screen.say(message["warning"])
                return
            if "drift" in message:
                if done.drift is None:  # the others are machines like this one, or refuse
                    account.say_drift(message["drift"], means.screen)
                done.drift = max(done.drift or {}, message["drift"], key=_far)
                return
            done.add(message)
            faults = sum(message["faults"].values())
            advance(message["files"], faults, extract.binding(done.seconds))
            progress()

        def sized(workers: int) -> None:
            done.workers = workers

        began = perf_counter()
        launch.run(
            stage,
            *args,
            config=means.launch,
            tasks=tasks,
            listen=listen,
            sized=sized,
            labels=account.labels(means, title),
        )
        done.seconds["workers"] = perf_counter() - began
    progress.now()
    return done


def _far(drift: dict[str, Any]) -> tuple[int, float]:
    return drift.get("changed", -1), drift.get("feature", -1.0)


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
    account.show_curve(curve, path, means)
    return curve


def learn(path: Path, asked: Study, means: Means = Means(), place: Path | None = None) -> Learned:
    """Train on a verified store. place: a folder of checkpoints, where a stopped study goes on."""
    store = Store(path)
    store.verify()
    asked, said = asked.resolve(store)
    for line in said:
        means.screen.say(line)
    told = account.Told(asked, means)
    run = means.top.run_id if means.top else None
    args = path, asked, place, run
    try:
        made: Learned = launch.run(
            study.learn,
            *args,
            config=means.launch,
            listen=told,
            place=place,
            sized=told.sized,
            labels=account.labels(means, "train"),
        )
    finally:
        told.send()
    told.ended(made)
    account.say_stop(made, means.screen)
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
    with bundle.saving(out, account.previous(out, means)) as folder:
        figures = write_bundle(store, config, trained, folder, means, lineage, keep)
        account.say_replaced(out, folder, means)
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
    `bundle.saving`, with its confusion matrices; its metrics.

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
    account.say_threshold(known, means.screen)
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
    bundle.write(dataclasses.replace(made, golden=photos), folder)
    if config.best != "last":
        means.screen.say(f"kept: epoch {trained.epoch}, the best by {config.best}")
    account.show_evaluation(figures, classes, folder / bundle.REPORT, means)
    account.say_rare_classes(Catalog(**store.read_catalog()), figures, means.screen)
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


def _novelty(store: Store, valid: shards.Features) -> Novelty:
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
    with account.child(means, "extract") as part:
        result = precompute(data, out / "store", images, part)
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
    account.params(
        means, {f"sweep.{k}": v for k, v in dataclasses.asdict(asked.sweep).items() if v}
    )
    account.params(means, {"workers": means.launch.workers, "arrowhead": __version__})
    if means.run:
        means.run.tags({"recipe": store.recipe.fingerprint, "body": store.recipe.body})
        means.run.params({"recipe": store.recipe.json()})
        catalog = Catalog(**store.read_catalog())
        recording.datasets(means.run, catalog)
    # The heads of a grid are children themselves.
    with nullcontext(means) if asked.sweep.grid else account.child(means, "train") as part:
        made = learn(path, asked, part, training_of(out))
    best, chosen = made.winner, made.config
    assert chosen is not None
    if means.run:
        recording.settings_used(means.run, chosen)
    rate = None if chosen.head == "logistic" else float(chosen.rate)
    result: dict[str, Any] = {"epochs": best.epochs}
    with bundle.saving(out, account.previous(out, means)) as folder:
        beside = folder / bundle.REPORT
        if made.curve:
            with account.child(means, "lr-find") as part:
                account.show_curve(made.curve, beside, part)
        if asked.sweep.grid:
            result["grid"] = account.show_grid(store, asked, made, beside, means)
        if made.folds:
            found = account.show_folds(store, chosen, made.folds, beside, means)
            result["folds"] = found | {"file": str(out / bundle.REPORT / found["file"])}
        if made.shares:
            account.show_shares(made.shares, beside, means)
            result["learning_curve"] = made.shares
        figures = write_bundle(store, chosen, best, folder, means, {"rate": rate}, keep)
        account.say_replaced(out, folder, means)
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
