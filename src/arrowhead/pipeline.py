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
import hashlib
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any, Protocol

import numpy as np

from arrowhead import (
    __version__,
    bundle,
    extract,
    launch,
    metrics,
    model,
    novelty,
    plan,
    report,
    shards,
    study,
    sweep,
)
from arrowhead import score as scoring
from arrowhead.bundle import Bundle, Golden
from arrowhead.decode import PixelConfig
from arrowhead.extract import ExtractConfig
from arrowhead.launch import LaunchConfig
from arrowhead.lr_finder import Curve, FinderConfig
from arrowhead.model import BodyConfig
from arrowhead.novelty import Novelty
from arrowhead.plan import Catalog, SourceConfig
from arrowhead.score import ScoreConfig
from arrowhead.shards import Store
from arrowhead.study import Learned, OutOfFold, Study
from arrowhead.tracking import Run, TrackingConfig
from arrowhead.train import TrainConfig, Trained

GOLDEN = 8
CLEAR = 0.1  # of probability, from the next decision
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
    workers: int = 1
    drift: dict[str, Any] | None = None
    """The largest that a worker found (see `bundle.Drift`)."""


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
            if "drift" in message:
                if done.drift is None:  # the others are machines like this one, or refuse
                    _say_drift(message["drift"], means.screen)
                done.drift = max(done.drift or {}, message["drift"], key=_far)
                return
            done.decoded += message["decoded"]
            done.looked_up += message["looked_up"]
            done.fallback += message["fallback"]
            for stage_name, seconds in message["seconds"].items():
                done.seconds[stage_name] += seconds
            faults = sum(message["faults"].values())
            advance(message["files"], faults, extract.binding(done.seconds))

        def sized(workers: int) -> None:
            done.workers = workers

        began = perf_counter()
        launch.run(stage, *args, config=means.launch, tasks=tasks, listen=listen, sized=sized)
        done.seconds["workers"] = perf_counter() - began
    return done


def _far(drift: dict[str, Any]) -> tuple[int, float]:
    return drift.get("changed", -1), drift.get("feature", -1.0)


def _say_drift(drift: dict[str, Any], screen: Screen) -> None:
    screen.say(
        f"golden images: {drift['images']} replayed, largest feature drift {drift['feature']:.1g},"
        f" {drift['changed']} labels changed"
    )


def _say_restart(message: dict[str, Any], screen: Screen) -> None:
    screen.say(f"{message['restart']}. The workers are started again; what is done stays.")


def _say_counts(means: Means, counts: dict[str, int], done: Work) -> None:
    means.screen.say(_account(counts["features"], counts["faults"], counts["ignored"]))
    _say_ways(means.screen, counts, done)


def _say_ways(screen: Screen, counts: dict[str, int], done: Work) -> None:
    """How the images came to features, and what that was bound by."""
    parts = [f"{counts['decoded']} decoded", f"{counts['looked_up']} looked up"]
    parts += [f"{counts['skipped']} skipped: done before"]
    if counts["fallback"]:
        parts.append(f"{counts['fallback']} by the fallback decoder")
    screen.say(" · ".join(parts))
    screen.say(extract.roofline(done.seconds, done.decoded, done.workers))


def _record(means: Means, params: dict[str, Any]) -> None:
    if means.run:
        means.run.params(params)


# ------------------------------------------------------------------------------ learning


def find_rate(
    path: Path, config: TrainConfig, finder: FinderConfig, means: Means = Means()
) -> Curve:
    """The LR finder's curve and suggestions on a store."""
    asked = Study(head=config, finder=finder, teach=False)
    curve = learn(path, asked, means).curve
    assert curve is not None
    show_curve(curve, path, means)
    return curve


def learn(path: Path, asked: Study, means: Means = Means(), place: Path | None = None) -> Learned:
    """Train on a verified store. place: a folder of checkpoints, where a stopped study goes on."""
    Store(path).verify()
    told = _Told(asked, means)
    run = means.top.run_id if means.top else None
    args = path, asked, place, run
    try:
        made: Learned = launch.run(
            study.learn, *args, config=means.launch, listen=told, place=place, sized=told.sized
        )
    finally:
        told.send()
    return made


class _Told:
    """What workers report of a study, shown and recorded; once, however often they start again."""

    def __init__(self, asked: Study, means: Means) -> None:
        self._asked, self._means = asked, means
        self._done: set[Any] = set()
        self._said = self._sent = 0.0
        self._points: dict[str, list[tuple[int, float]]] = defaultdict(list)

    def send(self) -> None:
        """Record the epochs that were not recorded yet: one request for all of them."""
        if self._points and self._means.run:
            self._means.run.series(self._points)
        self._points, self._sent = defaultdict(list), monotonic()

    def sized(self, workers: int) -> None:
        """How many workers there are now."""
        if str(self._means.launch.workers) not in ("0", str(workers)):
            self._means.screen.say(f"{workers} worker{'s' if workers > 1 else ''}")

    def __call__(self, message: dict[str, Any]) -> None:
        screen = self._means.screen
        if "restart" in message:
            _say_restart(message, screen)
        elif "warning" in message:
            screen.say(message["warning"])
        elif "goes_on" in message:
            done = message["goes_on"]
            screen.say(f"{message['part']}: {done} epochs are done; going on from their checkpoint")
        elif "curve" in message and "curve" not in self._done:
            self._done.add("curve")
            say_rates(message["curve"], screen)
        elif "lines" in message and (message["part"], message["epoch"]) not in self._done:
            self._done.add((message["part"], message["epoch"]))
            self._epoch(message)

    def _epoch(self, message: dict[str, Any]) -> None:
        part, epoch, lines = message["part"], message["epoch"], message["lines"]
        screen, config = self._means.screen, self._asked.head
        if part == "heads" and not self._asked.sweep.grid:
            if epoch == 0:
                screen.say(HEADING)
            screen.say(row(lines[0]))
            for name, value in (lines[0] | {"rate": message["rate"]}).items():
                if name != "epoch":
                    self._points[name].append((epoch, value))
            if monotonic() - self._sent > 1:  # a request for each of many short epochs costs more
                self.send()  # than the epochs
            return
        last = epoch + 1 == config.epochs
        if last or epoch == 0 or monotonic() - self._said > 2:
            self._said = monotonic()
            name = sweep.figure(config)
            pick = min if name == "valid_loss" else max
            best = pick(line[name] for line in lines.values())
            screen.say(
                f"{part} · epoch {epoch} · {len(lines)} heads learn · best {name} {best:.4f}"
            )


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


def say_rates(curve: Curve, screen: Screen) -> None:
    """The LR finder's suggestions on one line, each with the factor by which seeds differ."""
    found = " · ".join(
        f"{name} {rate:.2g}" + (f" ×÷{curve.spreads[name]:.2g}" if name in curve.spreads else "")
        for name, rate in curve.suggestions.items()
    )
    screen.say(f"learning rate: {found} — {curve.verdict}")
    if curve.race:
        ran = " · ".join(f"{name} {loss:.4f}" for name, loss in curve.race.items())
        screen.say(f"race, by validation loss: {ran}")
    screen.say(f"rate {curve.rate:.2g} ({curve.chosen})")


def show_curve(curve: Curve, folder: Path, means: Means) -> None:
    """Figure and CSV into `folder`, and to the run."""
    figure = report.save(report.lr_figure(curve), folder / "lr_finder.png")
    report.lr_csv(curve, folder / "lr_finder.csv")
    if means.run:
        means.run.keep(figure, "lr_finder")
        means.run.keep(folder / "lr_finder.csv", "lr_finder")
        named = {k.replace("/", "_over_"): k for k in curve.suggestions}
        found = {f"rate.{name}": curve.suggestions[k] for name, k in named.items()}
        found |= {
            f"spread.{name}": curve.spreads[k] for name, k in named.items() if k in curve.spreads
        }
        for name, k in named.items():
            if curve.race and np.isfinite(curve.race[k]):
                found[f"race.{name}"] = curve.race[k]
        means.run.record(found | {"rate": curve.rate})
        alive = np.isfinite(curve.losses).all(0)
        mean = curve.losses.mean(0)
        means.run.curve("lr_finder.rate", curve.rates[alive].tolist())
        means.run.curve("lr_finder.loss", mean[alive].tolist())
        means.run.tags({"lr_finder.verdict": curve.verdict})


# ---------------------------------------------------------------------- evaluation, bundle


def save(
    store: Store,
    config: TrainConfig,
    trained: Trained,
    out: Path,
    means: Means = Means(),
    lineage: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate a head on the validation split and save it as a bundle; its metrics."""
    import torch

    valid = store.features("valid")
    classes = store.manifest()["classes"]
    made = Bundle(
        recipe=store.recipe,
        classes=classes,
        head=config.head,
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
    heat = metrics.temperature(logit_NC, torch.from_numpy(valid.label))
    cooled = logit_NC / heat
    chances = (cooled.sigmoid() if valid.multi else cooled.softmax(1)).numpy()
    cuts = metrics.thresholds(chances, valid.label.astype(np.uint8)) if valid.multi else None
    figures = metrics.evaluate(
        logit_NC.numpy(), valid.label, classes, temperature=heat, thresholds=cuts
    ) | {"temperature": heat}
    known, told = _novelty(store, valid), lineage or {}
    means.screen.say(_threshold(known))
    lineage = told | {
        "arrowhead": __version__,
        "run_id": means.run.run_id if means.run else None,
        "data": Catalog(**store.read_catalog()).digest(),
        "training": dataclasses.asdict(config),
        "epoch": trained.epoch,
    }
    bundle.save(
        dataclasses.replace(
            made,
            temperature=heat,
            thresholds=None if cuts is None else cuts.tolist(),
            metrics=figures,
            lineage=lineage,
            novelty=known,
            golden=_golden(store, valid, chances, cuts, means.screen),
        ),
        out,
    )
    if config.best != "last":
        means.screen.say(f"kept: epoch {trained.epoch}, the best by {config.best}")
    _show_evaluation(figures, classes, out, means)
    return figures


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


def _threshold(known: Novelty) -> str:
    cut = known.threshold(0.05)
    if not np.isfinite(cut):
        return f"novelty: {len(known.known)} validation images are too few for a threshold"
    return f"novelty: 5 % of images like these are further than {cut:.3f} from the training images"


def _golden(
    store: Store, valid: shards.Features, chance_NC: Any, cuts: Any, screen: Screen
) -> list[Golden]:
    """A few validation images with the features and probabilities they gave.

    Of each stretch of rows the first that is clearly decided, else the clearest: a label that hangs
    by a thousandth would change on any other machine.
    """
    catalog = Catalog(**store.read_catalog())
    clear_N = _margin(chance_NC, cuts)
    kept: list[Golden] = []
    for rows in np.array_split(np.arange(len(valid.row)), GOLDEN):
        for at in rows[np.argsort(-np.minimum(clear_N[rows], CLEAR), kind="stable")][:1]:
            data, fault = catalog.read(int(valid.row[at]), ExtractConfig().max_bytes)
            if fault:
                screen.say(f"not kept as a golden image: {catalog.paths[valid.row[at]]} ({fault})")
                continue
            feature, chance = valid.feature[at, 0].astype(np.float32), chance_NC[at]
            name = f"{len(kept)}.img"
            kept.append(Golden(name=name, data=data, feature=feature, probabilities=chance))
    return kept


def _margin(chance_NC: Any, cuts: Any) -> Any:
    """How far each image's probabilities are from another decision, (N,)."""
    if cuts is not None:
        return np.abs(chance_NC - cuts).min(1)
    second, best = np.sort(chance_NC, 1)[:, -2:].T
    return best - second


def _show_evaluation(figures: dict[str, Any], classes: list[str], out: Path, means: Means) -> None:
    means.screen.say(_evaluation(figures))
    if not means.run:
        return
    means.run.record({k: v for k, v in figures.items() if isinstance(v, float)})
    if "confusion" in figures:
        counts_CC = np.array(figures["confusion"])
        picture = out.with_name(f"{out.name}-confusion.png")
        means.run.keep(
            report.save(report.confusion_figure(counts_CC, classes), picture), "evaluation"
        )
    if means.run.model(out) is None:  # the model holds the bundle
        means.run.keep(out, "bundle")


def _evaluation(figures: dict[str, Any]) -> str:
    """The head's figures on one line."""
    head = f"loss {figures['loss']:.4f} · temperature {figures['temperature']:.2f}"
    if "f2_samples" in figures:
        return (
            f"F2 {figures['f2_samples']:.4f} (mean over {figures['images']} validation images, at"
            f" thresholds tuned on them) · decisions right {figures['accuracy']:.4f} · {head}"
        )
    right = round(figures["accuracy"] * figures["images"])
    return (
        f"accuracy {figures['accuracy']:.4f} ({right} of {figures['images']} validation images) ·"
        f" {head}"
    )


# --------------------------------------------------------------------------- many heads


def _advice(curve: Curve) -> dict[str, Any]:
    """What a curve comes to, without its points."""
    kept = ("suggestions", "spreads", "race", "chosen", "verdict")
    return {name: value for name, value in curve.plain().items() if name in kept}


def _show_grid(
    store: Store, asked: Study, made: Learned, out: Path, means: Means
) -> dict[str, Any]:
    """Rank the heads of a grid: on the screen, as a table, each as a child run."""
    knobs, heads = asked.knobs, made.heads
    lines = [one.epochs[one.epoch] for one in heads]
    ranked = sweep.summary(knobs, lines, asked.head, made.images)
    means.screen.say(
        f"{len(heads)} heads, {len(ranked['settings'])} settings, by {ranked['figure']}:"
    )
    for setting in ranked["settings"][:5]:
        spread = "" if setting["spread"] is None else f" ± {setting['spread']:.4f}"
        means.screen.say(
            f"  {setting['mean']:.4f}{spread}  loss {setting['valid_loss']:.4f}"
            f"  {sweep.words(setting['knobs'])}"
        )
    means.screen.say(ranked["words"])
    table = report.grid_csv(ranked, out.with_name(f"{out.name}-grid.csv"))
    if means.run:
        means.run.keep(table, "grid")
        means.run.tags({"grid.verdict": ranked["words"]})
        means.run.children(
            [sweep.words(one) for one in knobs],
            [{f"train.{name}": value for name, value in one.items()} for one in knobs],
            [_by_epoch(one) for one in heads],
            {"part": "grid", "dataset": _name(Catalog(**store.read_catalog()))}
            | {"body": store.recipe.body, "recipe": store.recipe.fingerprint},
        )
    return ranked


def _by_epoch(head: Trained) -> dict[str, list[tuple[int, float]]]:
    """A head's figures as MLflow wants them, those of the epoch that was kept last."""
    names = [name for name in head.epochs[0] if name != "epoch"]
    made = {name: [(int(line["epoch"]), line[name]) for line in head.epochs] for name in names}
    kept = head.epochs[head.epoch]
    return made | {f"kept.{name}": [(head.epoch, kept[name])] for name in names}


def _show_folds(path: Path, asked: Study, found: OutOfFold, means: Means) -> dict[str, Any]:
    """Out-of-fold probabilities beside the store; mean and spread of the folds' figures."""
    store = Store(path)
    catalog = store.read_catalog()
    target = path.with_name(f"{path.name}-folds.arrow")
    classes = store.manifest()["classes"]
    shards.write_folds(
        target,
        {
            "path": [catalog["paths"][at] for at in found.row],
            "labels": [catalog["labels"][at] for at in found.row],
            "fold": found.fold,
            "probability": _chances(found.logit, found.multi),
        },
        {
            "classes": classes,
            "recipe": store.recipe.fingerprint,
            "catalog": store.manifest()["catalog"]["sha256"],
            "training": dataclasses.asdict(asked.head),
        },
    )
    table = {
        name: {"mean": float(np.mean(values)), "spread": float(np.std(values, ddof=1))}
        for name in found.last[0]
        if name not in ("epoch", "train_loss")
        for values in [[line[name] for line in found.last]]
    }
    shown = " · ".join(f"{k} {v['mean']:.4f} ± {v['spread']:.4f}" for k, v in table.items())
    means.screen.say(f"{len(found.last)} folds: {shown}")
    means.screen.say(f"a probability for every image, from a head that has not seen it: {target}")
    if means.run:
        means.run.record(
            {f"folds.{k}.{kind}": v for k, pair in table.items() for kind, v in pair.items()}
        )
        means.run.keep(target, "folds")
    return {"figures": table, "folds": found.last, "file": str(target)}


def _chances(logit_NC: Any, multi: bool) -> Any:
    """Probabilities, float32 (N, C), uncalibrated."""
    import torch

    logit = torch.from_numpy(logit_NC)
    return (logit.sigmoid() if multi else logit.softmax(1)).numpy()


def _show_shares(curve: dict[str, Any], out: Path, means: Means) -> None:
    """The learning curve: on the screen, as figure and table."""
    for point in curve["points"]:
        spread = "" if point["spread"] is None else f" ± {point['spread']:.4f}"
        share = f"{100 * point['share']:.0f} %"
        means.screen.say(f"{share:>6} {point['images']:>8} images  {point['mean']:.4f}{spread}")
    means.screen.say(curve["words"])
    stem = out.with_name(f"{out.name}-learning-curve")
    picture = report.save(report.learning_figure(curve), stem.with_suffix(".png"))
    table = report.learning_csv(curve, stem.with_suffix(".csv"))
    if means.run:
        means.run.keep(picture, "learning_curve")
        means.run.keep(table, "learning_curve")
        means.run.tags({"learning_curve.verdict": curve["words"]})
        for point in curve["points"]:
            means.run.record({f"learning_curve.{curve['figure']}": point["mean"]}, point["images"])


# ------------------------------------------------------------------------------- verbs


def fit(
    data: str | Path,
    out: Path,
    images: FeatureConfig,
    asked: Study,
    means: Means,
) -> dict[str, Any]:
    """The main job: features to OUT/store; rate, head and evaluation to OUT/bundle."""
    with child(means, "extract") as part:
        result = precompute(data, out / "store", images, part)
    return result | fit_head(out / "store", out / "bundle", asked, means)


def training_of(out: Path) -> Path:
    """Where the training of a bundle keeps its checkpoints until it is done."""
    return out.with_name(f".{out.name}.training")


def unfinished(out: Path, *request: Any) -> Path:
    """The file that stands for the unfinished run of a request, beside its checkpoints."""
    word = hashlib.blake2b(repr(request).encode("utf-8", "surrogateescape"), digest_size=6)
    return training_of(out.absolute()) / f"run-{word.hexdigest()}.json"


def fit_head(path: Path, out: Path, asked: Study, means: Means) -> dict[str, Any]:
    """From a store to a bundle: rate, heads, evaluation."""
    config = asked.head
    _record(means, {f"train.{k}": v for k, v in dataclasses.asdict(config).items()})
    _record(means, {f"sweep.{k}": v for k, v in dataclasses.asdict(asked.sweep).items() if v})
    _record(means, {"workers": means.launch.workers, "arrowhead": __version__})
    store = Store(path)
    if means.run:
        means.run.tags({"recipe": store.recipe.fingerprint, "body": store.recipe.body})
        means.run.params({"recipe": store.recipe.json()})
        catalog = Catalog(**store.read_catalog())
        means.run.dataset(_name(catalog), catalog.digest(), catalog.root, "training")
        means.run.tags({"dataset": _name(catalog)})
    out.parent.mkdir(parents=True, exist_ok=True)
    # The heads of a grid are children themselves.
    with nullcontext(means) if asked.sweep.grid else child(means, "train") as part:
        made = learn(path, asked, part, training_of(out))
    if made.curve:
        with child(means, "lr-find") as part:
            show_curve(made.curve, out.parent, part)
    result: dict[str, Any] = {"epochs": made.heads[0].epochs}
    best, rate = made.heads[0], made.curve.rate if made.curve else config.rate
    if asked.sweep.grid:
        ranked = result["grid"] = _show_grid(store, asked, made, out, means)
        best, knobs = made.heads[ranked["best"]], asked.knobs[ranked["best"]]
        config = dataclasses.replace(config, **({"rate": rate} | knobs))
        rate = config.rate
        result["epochs"] = best.epochs
    if made.folds:
        result["folds"] = _show_folds(path, asked, made.folds, means)
    if made.shares:
        _show_shares(made.shares, out, means)
        result["learning_curve"] = made.shares
    figures = save(store, config, best, out, means, {"rate": rate})
    registered = means.run.register(out) if means.run else None
    return result | {
        "rate": rate,
        "lr_finder": _advice(made.curve) if made.curve else None,
        "epoch": best.epoch,
        "metrics": figures,
        "train_seconds": made.seconds,
        "bundle": str(out),
        "registered": registered,
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
    address: str | Path,
    images: str | Path,
    out: Path,
    config: ScoreConfig,
    how: ExtractConfig,
    means: Means,
    tracking: TrackingConfig = TrackingConfig(),
) -> dict[str, Any]:
    """Score every file of `images` (see `plan.unlabelled`) with a bundle (see `bundle.local`).

    Returns counts {inputs, scored, decoded, looked_up, skipped, reused, fallback, faults, novel,
    ignored} with inputs = scored + faults, faults by kind, labels, drift, seconds by stage.
    """
    began = perf_counter()
    with shards.occupied(out), _at_hand(str(address), tracking, out) as path:
        loaded, mark = bundle.load(path), bundle.fingerprint(path)
        source = SourceConfig(images=config.base, suffix=config.suffix)
        catalog = plan.unlabelled(images, source)
        name, root, digest = _name(catalog), catalog.root, catalog.digest()
        files, ignored = len(catalog), catalog.ignored
        request = scoring.prepare(out, path, loaded, catalog, config, how.chunk_size)
        del catalog  # of a million files; from here on nobody holds more than some chunks
        missing = request.missing()
        total = sum(len(request.runs[number]) for number in missing)
        args = request, how
        done = _work(scoring.score, args, missing, total, "score", means) if missing else Work()
        found = scoring.held(request, loaded)
        table = scoring.write_csv(request, loaded) if config.csv else None
    faults = found.faults.total()
    done.seconds["wall"] = perf_counter() - began
    counts = {
        "inputs": files,
        "scored": files - faults,
        "decoded": done.decoded,
        "looked_up": done.looked_up,
        "skipped": files - total,
        "reused": files - total + done.looked_up,
        "fallback": done.fallback,
        "faults": faults,
        "novel": found.novel,
        "ignored": ignored,
    }
    _say_scores(means, counts, done, loaded, config)
    result = {
        "counts": counts,
        "faults": dict(found.faults),
        "labels": dict(found.labels),
        "seconds": dict(done.seconds),
        "roofline": extract.roofline(done.seconds, done.decoded, done.workers),
        "bundle": str(address),
        "bundle_fingerprint": mark,
        "recipe_fingerprint": loaded.recipe.fingerprint,
        "drift": done.drift,
        "novelty_threshold": _cut(loaded, config),
        "out": str(out),
        "csv": str(table) if table else None,
        "arrowhead": __version__,
        "trained_by": loaded.lineage.get("run_id"),
        "run_id": means.run.run_id if means.run else None,
        "too_many_faults": how.too_many(faults, files),
    }
    if missing or not (out / "score.json").is_file():
        shards.write_json(out / "score.json", result)
    if means.run:
        means.run.dataset(name, digest, root, "scoring")
        means.run.record(counts | {f"labels.{label}": n for label, n in found.labels.items()})
        means.run.record({f"seconds.{k}": v for k, v in done.seconds.items()})
        means.run.tags(
            {"bundle": result["bundle_fingerprint"], "recipe": loaded.recipe.fingerprint}
            | {"dataset": name, "body": loaded.recipe.body}
        )
        means.run.keep(out / "score.json")
        figure = report.scores_figure(found.labels, found.chances, found.novelties)
        means.run.keep(report.save(figure, out / "scores.png"), "scores")
    return result


@contextmanager
def _at_hand(address: str, tracking: TrackingConfig, out: Path) -> Iterator[Path]:
    """The bundle's folder. One that had to be fetched lies in `out` meanwhile: wherever a worker
    runs, it sees that.
    """
    scratch = out / ".bundle"
    try:
        yield bundle.local(address, tracking, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _cut(loaded: Bundle, config: ScoreConfig) -> float | None:
    """The novelty above which an image is marked; None if nothing is."""
    if not (loaded.novelty and config.flag_novel):
        return None
    cut = loaded.novelty.threshold(config.false_alarms)
    return cut if np.isfinite(cut) else None


def _say_scores(
    means: Means, counts: dict[str, int], done: Work, loaded: Bundle, config: ScoreConfig
) -> None:
    say = means.screen.say
    ignored = f" ({counts['ignored']} other files ignored)" if counts["ignored"] else ""
    account = f"{counts['scored']} scored + {counts['faults']} faults"
    say(f"{counts['inputs']} inputs = {account}{ignored}")
    _say_ways(means.screen, counts, done)
    if not (loaded.novelty and config.flag_novel):
        return
    cut, share = _cut(loaded, config), f"{100 * config.false_alarms:g} %"
    if cut is None:
        say(
            f"no image can be called novel at {share} false alarms: the bundle was validated on"
            f" {len(loaded.novelty.known)} images, too few to say so"
        )
    else:
        say(
            f"{counts['novel']} images are novel: further than {cut:.3f} from the training images"
            f" ({share} of images like them are, too)"
        )
