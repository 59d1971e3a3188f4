"""The stages in order: launched, shown and recorded.

    precompute   DATA  -> store          catalog, extraction, manifest
    learn        store -> LR curve, head
    save         head  -> bundle         evaluation, temperature, golden images
    score        bundle, images -> Parquet parts
    fit          all but the last, in one parent run

Stages know neither Ray nor MLflow nor the screen; here they are given to `launch`, and what
they report goes to `tracking` and to the screen.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from arrowhead import (
    __version__,
    bundle,
    extract,
    launch,
    lr_finder,
    metrics,
    model,
    plan,
    report,
    shards,
    train,
)
from arrowhead import score as scoring
from arrowhead.bundle import Bundle, Golden
from arrowhead.decode import PixelConfig
from arrowhead.extract import ExtractConfig
from arrowhead.launch import LaunchConfig, Worker
from arrowhead.lr_finder import Curve, FinderConfig
from arrowhead.model import BodyConfig
from arrowhead.plan import Catalog, SourceConfig
from arrowhead.score import ScoreConfig
from arrowhead.shards import Store
from arrowhead.tracking import Run
from arrowhead.train import Data, Team, TrainConfig, Trained

GOLDEN = 8
Advance = Callable[[int, int, str], None]


class Screen(Protocol):
    """Where stages are shown."""

    def say(self, line: str) -> None:
        """One line for a person."""

    def bar(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """A progress line of `total` images; inside, call with (more done, more faults, the stage
        that binds).
        """


class Silence:
    """A screen that shows nothing."""

    def say(self, line: str) -> None:
        """Nothing."""

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Advance]:
        """Nothing."""
        yield lambda done, faults, binding: None


@dataclass(frozen=True, kw_only=True, slots=True)
class Means:
    """What a stage is run with: where, what it is shown on, and the MLflow run, if any."""

    launch: LaunchConfig = LaunchConfig()
    screen: Screen = Silence()
    run: Run | None = None
    parent: Run | None = None
    """The run above `run`: what the whole command read is recorded there."""

    @property
    def top(self) -> Run | None:
        """The parent run, or the only one."""
        return self.parent or self.run


# -------------------------------------------------------------------------- the first pass


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureConfig:
    """How images become features: where labels come from, pixels, body, and the working of it."""

    source: SourceConfig = SourceConfig()
    pixels: PixelConfig = PixelConfig()
    body: BodyConfig = BodyConfig()
    extract: ExtractConfig = ExtractConfig()


def precompute(
    data: str | Path, path: Path, images: FeatureConfig, means: Means = Means()
) -> dict[str, Any]:
    """Make the store at `path` hold a feature of every image of `data` (see `plan.labelled`).

    Images whose features are there already are not decoded again. Returns counts {inputs,
    features, decoded, looked_up, skipped, reused, fallback, faults, ignored}, faults with their
    paths, seconds by stage, store, fingerprint. Raises ConfigError if the store was made in
    another way or another command is writing it, DataError if something in it has changed.
    """
    began = perf_counter()
    catalog = plan.labelled(data, images.source)
    store = _store(path, images)
    with store.locked():
        intact = store.intact()
        _say_classes(store, catalog, means.screen)
        catalog = _tried_again(store, catalog, images.extract.max_bytes)
        _record(means, {f"recipe.{k}": v for k, v in dataclasses.asdict(store.recipe).items()})
        runs = plan.chunks(catalog.paths, store.chunk_size)
        names = [plan.chunk_name(catalog, rows, store.recipe.fingerprint) for rows in runs]
        shards.write_catalog(extract.pending(store), catalog.columns())
        missing = [i for i, name in enumerate(names) if not store.shard(name).is_file()]
        total = sum(len(runs[i]) for i in missing)
        args = path, images.pixels, images.extract
        done = _work(extract.extract, args, missing, total, "extract", means) if missing else Work()
        manifest, drawn = _complete(store, catalog, names, images.source, intact)
    done.seconds["wall"] = perf_counter() - began
    redone = {names[i] for i in missing}
    skipped = sum(
        one["files"] - one["faults"] for one in manifest["shards"] if one["name"] not in redone
    )
    faults = sum(one["faults"] for one in manifest["shards"])
    counts = _balance(catalog, faults, done, skipped)
    _say_counts(means, counts, done)
    if means.top:
        means.top.dataset(_name(catalog), drawn.digest(), catalog.root, "training")
    if means.run:
        means.run.record(counts | {f"seconds.{k}": v for k, v in done.seconds.items()})
        means.run.tags({"recipe": store.recipe.fingerprint, "body": store.recipe.body})
    return {
        "counts": counts,
        "faults": fault_list(store),
        "seconds": dict(done.seconds),
        "roofline": extract.roofline(done.seconds, done.decoded, means.launch.workers or 1),
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


def _say_classes(store: Store, catalog: Catalog, screen: Screen) -> None:
    """Say what is no class though it looks like one, and how the classes changed since last."""
    for folder in catalog.empty:
        screen.say(f"{folder}/ holds no image: it is not a class")
    if not (store.path / "manifest.json").is_file():
        return
    before, now = set(store.manifest()["classes"]), set(catalog.classes)
    if before != now:
        gone, new = ", ".join(sorted(before - now)), ", ".join(sorted(now - before))
        screen.say(
            f"the classes of {store.path} change: {f'gone {gone}' if gone else ''}"
            f"{'; ' if gone and new else ''}{f'new {new}' if new else ''}."
            " Heads trained before keep the classes they were trained with."
        )


def _tried_again(store: Store, catalog: Catalog, max_bytes: int) -> Catalog:
    """The catalog, with one more try for each file that could not be read and now can.

    Its stamp is as before (a permission given leaves it), so only the count of tries gives its
    shard another name.
    """
    if not (store.path / "manifest.json").is_file():
        return catalog
    manifest = store.manifest()
    kept = store.path / manifest["catalog"]["name"]
    sick = [one for one in manifest["shards"] if one["kinds"].get("unreadable")]
    if not kept.is_file() or not (sick or manifest["catalog"]["tries"]):
        return catalog
    shards.must_hash_to(kept, manifest["catalog"]["sha256"])
    old = Catalog(**store.read_catalog())
    unreadable = {
        path
        for one in sick
        for rows in [store.read(one["name"])]
        for path, fault in zip(rows.paths, rows.faults, strict=True)
        if fault and fault.startswith("unreadable")
    }
    tries = catalog.tries.copy()
    for was in np.flatnonzero(
        [n > 0 or p in unreadable for n, p in zip(old.tries, old.paths, strict=True)]
    ):
        row = bisect.bisect_left(catalog.paths, old.paths[was])
        same = row < len(catalog) and catalog.paths[row] == old.paths[was]
        if same and (catalog.sizes[row], catalog.stamps[row]) == (old.sizes[was], old.stamps[was]):
            tries[row] = old.tries[was]
            if old.paths[was] in unreadable:
                _, fault = catalog.read(row, max_bytes)
                tries[row] += not (fault or "").startswith("unreadable")
    return dataclasses.replace(catalog, tries=tries)


def _name(catalog: Catalog) -> str:
    """What a data set is called: the last part of where it lies."""
    return catalog.root.rstrip("/").rpartition("/")[2] or catalog.root


def _store(path: Path, images: FeatureConfig) -> Store:
    """The store for these settings, its body's weights inside."""
    import safetensors.torch

    weights = model.load(images.body)
    body = model.Body(
        images.body.body,
        weights.state,
        pool=images.body.pool,
        mean=weights.mean,
        std=weights.std,
        size=images.pixels.size,
    )
    recipe = extract.recipe_of(images.pixels, images.body, weights, body.width)
    store = Store.create(path, recipe, images.extract.chunk_size)
    if not store.weights.is_file():
        with shards.draft(store.weights) as sketch:
            sketch.write_bytes(safetensors.torch.save(weights.state))
    return store


def _complete(
    store: Store,
    catalog: Catalog,
    names: list[str],
    source: SourceConfig,
    intact: dict[str, str],
) -> tuple[dict[str, Any], Catalog]:
    """Check that every file has its row, draw the splits, write catalog and manifest."""
    parts = [store.read(name) for name in names]
    if [path for rows in parts for path in rows.paths] != catalog.paths:
        raise AssertionError("the shards do not hold every file of the catalog once, in order")
    ids = [image_id for rows in parts for image_id in rows.image_ids]
    drawn = plan.drawn(catalog, ids, source.valid_share)
    manifest = store.complete(names, drawn.columns(), intact)
    extract.pending(store).unlink()
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


@dataclass(slots=True)
class Work:
    """What workers reported, added up."""

    decoded: int = 0
    looked_up: int = 0
    fallback: int = 0
    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))
    result: Any = None


def _work(
    stage: Callable[..., Any],
    args: tuple[Any, ...],
    tasks: list[int],
    total: int,
    title: str,
    means: Means,
) -> Work:
    """Run a chunk-claiming stage on all workers, shown as one bar."""
    done = Work()
    with means.screen.bar(title, total) as advance:

        def listen(message: dict[str, Any]) -> None:
            if "restart" in message:
                _say_restart(message, means.screen)
                return
            done.decoded += message["decoded"]
            done.looked_up += message["looked_up"]
            done.fallback += message["fallback"]
            for stage_name, seconds in message["seconds"].items():
                done.seconds[stage_name] += seconds
            faults = sum(message["faults"].values())
            advance(message["files"], faults, extract.binding(done.seconds))

        began = perf_counter()
        done.result = launch.run(stage, *args, config=means.launch, tasks=tasks, listen=listen)
        done.seconds["workers"] = perf_counter() - began
    return done


def _say_restart(message: dict[str, Any], screen: Screen) -> None:
    screen.say(f"{message['restart']}. The workers are started again; what is done stays.")


def _say_counts(means: Means, counts: dict[str, int], done: Work) -> None:
    means.screen.say(_account(counts["features"], counts["faults"], counts["ignored"]))
    parts = [f"{counts['decoded']} decoded", f"{counts['looked_up']} looked up"]
    parts += [f"{counts['skipped']} skipped: done before"]
    if counts["fallback"]:
        parts.append(f"{counts['fallback']} by the fallback decoder")
    means.screen.say(" · ".join(parts))
    means.screen.say(extract.roofline(done.seconds, done.decoded, means.launch.workers or 1))


def _record(means: Means, params: dict[str, Any]) -> None:
    if means.run:
        means.run.params(params)


# ------------------------------------------------------------------------------ learning


def learn_stage(
    worker: Worker, path: Path, config: TrainConfig, finder: FinderConfig | None, teach: bool
) -> tuple[Curve | None, Trained | None, float]:
    """On every worker: the LR finder, if asked for, then training at the rate; seconds of both."""
    store = Store(path)
    data = data_of(store, worker.device)
    team = Team(worker.rank, worker.world)
    began = perf_counter()
    curve = lr_finder.find(data, config, finder, team) if finder else None
    if not teach:
        return curve, None, perf_counter() - began
    rate = curve.rate if curve else float(config.rate)
    tell = worker.report if worker.rank == 0 else lambda message: None
    if curve:
        tell({"verdict": curve.verdict, "suggestions": curve.suggestions})

    def record(line: dict[str, float]) -> None:
        tell(line | {"rate": train.rate_at(line["epoch"] / config.epochs, config, rate)})

    trained = train.train(data, config, rate, team, record)
    return curve, trained, perf_counter() - began


def data_of(store: Store, device: str) -> Data:
    """Training and validation features of a store, on a device."""
    parts = {split: store.features(split) for split in ("train", "valid")}
    pairs = {split: (part.feature, part.label) for split, part in parts.items()}
    return Data.of(pairs["train"], pairs["valid"], store.manifest()["classes"], device)


def find_rate(
    path: Path, config: TrainConfig, finder: FinderConfig, means: Means = Means()
) -> Curve:
    """The LR finder's curve and suggestions on a store."""
    Store(path).verify()
    curve, _, _ = launch.run(learn_stage, path, config, finder, False, config=means.launch)
    say_rates(curve.suggestions, curve.verdict, means.screen)
    show_curve(curve, path, means)
    return curve  # type: ignore[no-any-return]


def learn(
    path: Path, config: TrainConfig, finder: FinderConfig, means: Means = Means()
) -> tuple[Curve | None, Trained, float]:
    """Train a head on a verified store; LR curve (if rate is auto), head, seconds taken."""
    Store(path).verify()

    def listen(line: dict[str, Any]) -> None:
        if "restart" in line:
            _say_restart(line, means.screen)
            return
        if "verdict" in line:
            say_rates(line["suggestions"], line["verdict"], means.screen)
            return
        if line["epoch"] == 0:
            means.screen.say(HEADING)
        means.screen.say(row(line))
        if means.run:
            means.run.record({k: v for k, v in line.items() if k != "epoch"}, int(line["epoch"]))

    asked = finder if config.rate == "auto" else None
    curve, trained, seconds = launch.run(
        learn_stage, path, config, asked, True, config=means.launch, listen=listen
    )
    return curve, trained, seconds


def say_account(path: Path, screen: Screen) -> None:
    """What a finished store holds, on one line."""
    store = Store(path)
    manifest, ignored = store.manifest(), store.read_catalog()["ignored"]
    files = sum(one["files"] for one in manifest["shards"])
    faults = sum(one["faults"] for one in manifest["shards"])
    screen.say(_account(files - faults, faults, ignored))


def _account(features: int, faults: int, ignored: int) -> str:
    return (
        f"{features + faults + ignored} inputs = {features} features + {faults} faults"
        f" + {ignored} ignored"
    )


HEADING = f"{'epoch':>5}  {'train loss':>10}  {'valid loss':>10}  {'accuracy':>8}"


def row(line: dict[str, float]) -> str:
    """One epoch in the lesson's columns."""
    return (
        f"{int(line['epoch']):>5}  {line['train_loss']:>10.6f}  {line['valid_loss']:>10.6f}"
        f"  {line['accuracy']:>8.6f}"
    )


def say_rates(suggestions: dict[str, float], verdict: str, screen: Screen) -> None:
    """The LR finder's suggestions on one line; `--rate auto` takes the first."""
    found = " · ".join(f"{name} {rate:.2g}" for name, rate in suggestions.items())
    screen.say(f"learning rate: {found} — {verdict}")


def show_curve(curve: Curve, folder: Path, means: Means) -> None:
    """Figure and CSV into `folder`, and to the run."""
    figure = report.save(report.lr_figure(curve), folder / "lr_finder.png")
    report.lr_csv(curve, folder / "lr_finder.csv")
    if means.run:
        means.run.keep(figure, "lr_finder")
        means.run.keep(folder / "lr_finder.csv", "lr_finder")
        means.run.record(
            {f"rate.{k.replace('/', '_over_')}": v for k, v in curve.suggestions.items()}
        )
        alive = np.isfinite(curve.losses).all(0)
        mean = curve.losses.mean(0)
        means.run.curve("lr_finder.rate", curve.rates[alive].tolist())
        means.run.curve("lr_finder.loss", mean[alive].tolist())
        means.run.tags({"lr_finder.verdict": curve.verdict})


# ---------------------------------------------------------------------- evaluation, bundle


def save(
    store: Store, config: TrainConfig, trained: Trained, out: Path, means: Means = Means()
) -> dict[str, Any]:
    """Evaluate a head on the validation split and save it as a bundle; its metrics."""
    import torch

    valid = store.features("valid")
    classes = store.manifest()["classes"]
    head_state = {name: torch.tensor(value) for name, value in trained.state.items()}
    made = Bundle(
        recipe=store.recipe,
        classes=classes,
        head=config.head,
        temperature=1.0,
        body_state=extract.load_weights(store.recipe, store.weights),
        head_state=head_state,
        metrics={},
        lineage={},
    )
    head, label_N = made.make_head(), torch.from_numpy(valid.label)
    with torch.inference_mode():
        logit_NC = head(torch.from_numpy(valid.feature[:, 0].astype(np.float32)))
    nats = torch.nn.functional.cross_entropy(logit_NC, label_N).item()
    guess_N = logit_NC.argmax(1).numpy()
    counts_CC = metrics.confusion(valid.label, guess_N, len(classes))
    figures = {
        "accuracy": float((guess_N == valid.label).mean()),
        "loss": nats,
        "images": len(valid.label),
    }
    temperature = metrics.temperature(logit_NC, label_N)
    by_class = metrics.per_class(counts_CC, classes)
    chances = (logit_NC / temperature).softmax(1).numpy()
    lineage = {
        "arrowhead": __version__,
        "run_id": means.run.run_id if means.run else None,
        "data": Catalog(**store.read_catalog()).digest(),
        "training": dataclasses.asdict(config),
    }
    bundle.save(
        dataclasses.replace(
            made,
            temperature=temperature,
            metrics=figures | {"per_class": by_class, "confusion": counts_CC.tolist()},
            lineage=lineage,
            golden=_golden(store, valid, chances, means.screen),
        ),
        out,
    )
    _show_evaluation(figures, temperature, counts_CC, classes, out, means)
    return figures | {"temperature": temperature, "per_class": by_class}


def _golden(store: Store, valid: shards.Features, chances: Any, screen: Screen) -> list[Golden]:
    """A few validation images, evenly spaced, with the features and probabilities they gave."""
    catalog = Catalog(**store.read_catalog())
    kept: list[Golden] = []
    for at in np.unique(np.linspace(0, len(valid.row) - 1, GOLDEN).astype(int)):
        data, fault = catalog.read(int(valid.row[at]), ExtractConfig().max_bytes)
        if fault:
            screen.say(f"not kept as a golden image: {catalog.paths[valid.row[at]]} ({fault})")
            continue
        feature = valid.feature[at, 0].astype(np.float32)
        kept.append(
            Golden(name=f"{len(kept)}.img", data=data, feature=feature, probabilities=chances[at])
        )
    return kept


def _show_evaluation(
    figures: dict[str, Any],
    temperature: float,
    counts_CC: Any,
    classes: list[str],
    out: Path,
    means: Means,
) -> None:
    right = round(figures["accuracy"] * figures["images"])
    means.screen.say(
        f"accuracy {figures['accuracy']:.4f} ({right} of {figures['images']} validation images) ·"
        f" loss {figures['loss']:.4f} · temperature {temperature:.2f}"
    )
    if not means.run:
        return
    means.run.record({"accuracy": figures["accuracy"], "loss": figures["loss"]})
    means.run.record({"temperature": temperature})
    figure = report.save(
        report.confusion_figure(counts_CC, classes), out.with_name(f"{out.name}-confusion.png")
    )
    means.run.keep(figure, "evaluation")
    means.run.keep(out, "bundle")


# ------------------------------------------------------------------------------- verbs


def fit(
    data: str | Path,
    out: Path,
    images: FeatureConfig,
    config: TrainConfig,
    finder: FinderConfig,
    means: Means,
) -> dict[str, Any]:
    """The main job: features to OUT/store; rate, head and evaluation to OUT/bundle."""
    with child(means, "extract") as part:
        result = precompute(data, out / "store", images, part)
    return result | fit_head(out / "store", out / "bundle", config, finder, means)


def fit_head(
    path: Path, out: Path, config: TrainConfig, finder: FinderConfig, means: Means
) -> dict[str, Any]:
    """From a store to a bundle: rate, head, evaluation."""
    _record(means, {f"train.{k}": v for k, v in dataclasses.asdict(config).items()})
    _record(means, {"workers": means.launch.workers, "arrowhead": __version__})
    store = Store(path)
    if means.run:
        means.run.tags({"recipe": store.recipe.fingerprint, "body": store.recipe.body})
        means.run.params({"recipe": store.recipe.json()})
    out.parent.mkdir(parents=True, exist_ok=True)
    with child(means, "train") as part:
        curve, trained, seconds = learn(path, config, finder, part)
    if curve:
        with child(means, "lr-find") as part:
            show_curve(curve, out.parent, part)
    figures = save(store, config, trained, out, means)
    return {
        "epochs": trained.epochs,
        "rate": curve.rate if curve else config.rate,
        "lr_finder": {"suggestions": curve.suggestions, "verdict": curve.verdict}
        if curve
        else None,
        "metrics": figures,
        "train_seconds": seconds,
        "bundle": str(out),
        "store": str(path),
        "run_id": means.run.run_id if means.run else None,
    }


@contextmanager
def child(means: Means, name: str) -> Iterator[Means]:
    """The same means with a run of their own below the run, if there is one."""
    if means.run is None:
        yield means
        return
    with means.run.child(name) as run:
        yield dataclasses.replace(means, run=run, parent=means.top)


def score(
    path: Path, images: str | Path, out: Path, config: ScoreConfig, how: ExtractConfig, means: Means
) -> dict[str, Any]:
    """Score every file of `images` (see `plan.unlabelled`) with a bundle; counts, labels, drift,
    seconds.
    """
    began = perf_counter()
    loaded = bundle.load(path)
    catalog = plan.unlabelled(images)
    runs = plan.chunks(catalog.paths, how.chunk_size)
    missing = scoring.prepare(out, path, catalog, config, how.chunk_size)
    total = sum(len(runs[number]) for number in missing)
    args = path, out, config, how
    done = _work(scoring.score, args, missing, total, "score", means) if missing else Work()
    held = scoring.count_parts(out, loaded.classes, catalog)
    faults = sum(held["faults"].values())
    done.seconds["wall"] = perf_counter() - began
    skipped = len(catalog) - faults - done.decoded
    counts = _balance(catalog, faults, done, skipped) | {"scored": len(catalog) - faults}
    if done.result:
        means.screen.say(
            f"golden images: {done.result.images} replayed, largest feature drift"
            f" {done.result.feature:.1g}, {done.result.changed} labels changed"
        )
    _say_counts(means, counts, done)
    result = {
        "counts": counts,
        "faults": held["faults"],
        "labels": held["labels"],
        "seconds": dict(done.seconds),
        "roofline": extract.roofline(done.seconds, done.decoded, means.launch.workers or 1),
        "bundle": str(path),
        "bundle_fingerprint": bundle.fingerprint(path),
        "recipe_fingerprint": loaded.recipe.fingerprint,
        "drift": dataclasses.asdict(done.result) if done.result else None,
        "out": str(out),
        "arrowhead": __version__,
        "trained_by": loaded.lineage.get("run_id"),
        "run_id": means.run.run_id if means.run else None,
        "too_many_faults": how.too_many(faults, len(catalog)),
    }
    if done.result or not (out / "score.json").is_file():
        shards.write_json(out / "score.json", result)
    if means.run:
        means.run.dataset(_name(catalog), catalog.digest(), catalog.root, "scoring")
        means.run.record(counts | {f"labels.{i}": n for i, n in enumerate(held["labels"].values())})
        means.run.record({f"seconds.{k}": v for k, v in done.seconds.items()})
        means.run.tags(
            {"bundle": result["bundle_fingerprint"], "recipe": loaded.recipe.fingerprint}
        )
        means.run.keep(out / "score.json")
    return result
