"""The command advise: frozen head, cached views or fine-tuning, and what more labels would give.

STORE            the features: a cross-validated learning curve of heads
    OUT/views        the features of a sample with 8 views of each image
    OUT/pixels       its pixels; OUT/trial: what is left of trials of fine-tuning
    OUT/advice.json  the result
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead import fileio
from arrowhead.bundle import body_file
from arrowhead.commands import pixel_cache, precompute
from arrowhead.commands.advise_config import AdviseConfig
from arrowhead.data import sample
from arrowhead.data.catalog import Catalog
from arrowhead.errors import ConfigError
from arrowhead.features import extract
from arrowhead.features.feature_config import FeatureConfig
from arrowhead.features.golden_images import GoldenConfig
from arrowhead.features.store import Store
from arrowhead.finetuning import run as finetuning_run
from arrowhead.finetuning import trial
from arrowhead.finetuning.augmentation import AugmentConfig
from arrowhead.finetuning.config import FinetuneConfig, resolve_epochs
from arrowhead.finetuning.network import BODY, HEAD
from arrowhead.finetuning.pixel_cache import PixelCache
from arrowhead.finetuning.run import OutOfMemoryRefusal, Request
from arrowhead.finetuning.trial import TrialRows
from arrowhead.reporting import advice, run_context
from arrowhead.reporting.run_context import RunContext
from arrowhead.runtime import launch
from arrowhead.training import body_comparison, cross_validation, extrapolation
from arrowhead.training import run as training_run
from arrowhead.training.body_comparison import HeldOut
from arrowhead.training.dataset import Data, InMemoryFeatures
from arrowhead.training.extrapolation import head_logits

RESULT, SPEEDS = "advice.json", "speeds.json"
VIEWS = (2, 4, 8)
MORE_LABELS = (2, 4)  # times as many
PER_CLASS = 4  # images that a class keeps in the sample, if it has them
PROBE_STEPS = 4


@dataclass(frozen=True, slots=True)
class Pool:
    """The sample that the trials use, n images.

    Attributes:
        cache: Their pixels, labels and classes.
        feature_NVD: Their features with all views.
        fold: The fold of each, -1 for an image that is always trained on.
        speeds: Measured seconds per image: `decode`, and `views` for all views with decoding.
    """

    cache: PixelCache
    feature_NVD: NDArray[np.float16]
    fold: NDArray[np.int64]
    speeds: dict[str, float]

    def rows(self, number: int) -> TrialRows:
        """The images that train and those that are tested when a fold is left out."""
        return TrialRows(np.flatnonzero(self.fold != number), np.flatnonzero(self.fold == number))

    def data(self, views: int) -> Data:
        """The features with that many views."""
        import torch

        everything = np.arange(len(self.cache))
        return Data(
            feature=InMemoryFeatures(torch.from_numpy(self.feature_NVD[:, :views].copy())),
            label=torch.from_numpy(np.array(self.cache.label)),
            key=self.cache.image_id,
            train=everything,
            valid=everything[:0],
            classes=list(self.cache.classes),
        )


def advise(
    path: Path, data: Catalog | None, out: Path, config: AdviseConfig, context: RunContext
) -> dict[str, Any]:
    """Measure what heads, cached views and fine-tuning give, and what each costs.

    Args:
        path: A finished store.
        data: Its images, if they are not any more where the store was made.
        out: The folder of the trials and of the result.
        config: What is tried.
        context: Where to run, show and record.

    Returns:
        learning_curve, forecast, options (see `advice.table`), advice (sentences), choice, and so
        on; `reporting.advice` shows them.
    """
    store = Store(path)
    store.verify()
    features, _ = training_run.load_data(store, "cpu")
    run_context.log_params(context, dataclasses.asdict(config))
    curve, forecast, head_seconds = _more_labels(features, context)
    pool = _prepare(store, data, out, config, context)
    images = len(features.train) + len(features.valid)
    heads = _test_heads(pool, config, context)
    tuned, plan = _test_tuning(store, pool, out, config, (images, len(features.train)), context)
    options = _options(pool, heads, tuned, plan, (images, head_seconds))
    plan |= {
        "images": images,
        "train_images": int((pool.fold != 0).sum()),
        "is_sample": len(pool.cache) < images,
    }
    words = advice.sentences(options, forecast, plan)
    result = {
        "images": images,
        "learning_curve": curve.points(),
        "forecast": [dataclasses.asdict(one) for one in forecast],
        "trial": plan | {"images": len(pool.cache), "folds": int(pool.fold.max()) + 1},
        "options": options,
        "choice": advice.choose(options)["name"],
        "advice": words,
        "store": str(path),
        "run_id": context.run.run_id if context.run else None,
    }
    with fileio.atomic_write(out / RESULT) as draft:
        draft.write_text(json.dumps(fileio.jsonable(result), indent=1) + "\n")
    if context.run:
        numbers = {f"accuracy.{one['name']}": one["accuracy"] for one in options}
        numbers |= {f"seconds.{one['name']}": one["seconds"] for one in options}
        context.run.record({k.replace(",", ""): v for k, v in numbers.items() if v is not None})
    return result


# ---------------------------------------------------------------------------- more labels


def _more_labels(
    features: Data, context: RunContext
) -> tuple[extrapolation.MeasuredCurve, list[extrapolation.Forecast], float]:
    """The learning curve, its continuation, and the seconds that a head on all images takes."""

    def report(done: int, of: int) -> None:
        context.screen.print_status(f"learning curve: {done} of {of} folds")

    curve = extrapolation.measure(features, report)
    images = len(features.train) + len(features.valid)
    forecast = extrapolation.extrapolate(curve, [images, *(n * images for n in MORE_LABELS)])
    for line in advice.curve_table(curve.points(), forecast[1:]):
        context.screen.print(line)
    began = perf_counter()
    head_logits(features, features.train, features.valid)
    return curve, forecast, perf_counter() - began


# ------------------------------------------------------------------------------- the sample


def _prepare(
    store: Store, data: Catalog | None, out: Path, config: AdviseConfig, context: RunContext
) -> Pool:
    """Draw the sample, and compute its views and pixels."""
    drawn = _draw(store, data, config)
    context.screen.print(f"trials on {len(drawn)} images, in {out}:")
    recipe = store.recipe.single_view()
    pixels = extract.make_pixel_config(recipe)
    images = FeatureConfig(
        body=body_file.body_config(recipe, store.weights_path),
        pixels=dataclasses.replace(pixels, views=max(VIEWS), augment=config.augment),
        golden=GoldenConfig(golden_images=False),
    )
    speeds = _read_speeds(out)
    with run_context.child_context(context, "views") as child:
        extracted = precompute.precompute(drawn, out / "views", images, child)
    speeds |= _speed("views", extracted)
    images = dataclasses.replace(images, pixels=dataclasses.replace(pixels, views=1))
    with run_context.child_context(context, "decode") as child:
        decoded = pixel_cache.build_pixel_cache(drawn, out / "pixels", images, context=child)
    speeds |= _speed("decode", decoded)
    with fileio.atomic_write(out / SPEEDS) as draft:
        draft.write_text(json.dumps(speeds) + "\n")
    cache = PixelCache(out / "pixels")
    found = Store(out / "views").features()
    _, where, place = np.intersect1d(found.image_id, cache.image_id, return_indices=True)
    position = dict(zip(cache.image_id[place].tolist(), where.tolist(), strict=True))
    if missing := len(set(cache.image_id.tolist()) - position.keys()):
        raise AssertionError(f"{missing} images have pixels and no features")
    feature = found.feature[[position[key] for key in cache.image_id.tolist()]]
    label = np.array(cache.label)
    fold = cross_validation.assign_folds(cache.image_id, label, config.folds, cache.classes)
    return Pool(cache, feature, fold, speeds)


def _draw(store: Store, data: Catalog | None, config: AdviseConfig) -> Catalog:
    """Draw the sample from the training and validation images of the store."""
    stored = Catalog(**store.read_catalog())
    part = store.features(rows_only=True)
    usable = set(part.row[np.isin(part.split, ("train", "valid"))].tolist())
    label_of = {stored.paths[row]: stored.labels[row] for row in usable}
    catalog = data or stored
    catalog = catalog.select([path in label_of for path in catalog.paths])
    labels = [label_of[path] for path in catalog.paths]
    catalog = dataclasses.replace(catalog, labels=labels, source_labels={}, dropped=())
    if len(catalog):
        share = min(1.0, config.trial_images / len(catalog))
        catalog = sample.draw_sample(catalog, share, PER_CLASS)
    fault = catalog.read_file(0, extract.ExtractConfig().max_bytes)[1] if len(catalog) else ""
    if not len(catalog) or fault:
        raise ConfigError(
            f"The images of {store.path} are not in {catalog.root}"
            + (f": {catalog.paths[0]} ({fault})." if fault else "."),
            "the images that the store was made from: trials augment them.",
            "give their folder or table as the second argument: arrowhead advise STORE DATA.",
        )
    # The folds decide what is tested; a split in the catalog only keeps one from being drawn.
    splits = ["train" if row % 5 else "valid" for row in range(len(catalog))]
    return dataclasses.replace(catalog, splits=splits)


def _speed(name: str, extracted: dict[str, Any]) -> dict[str, float]:
    """Seconds per image, if images were decoded now."""
    decoded = extracted["counts"]["decoded"]
    return {name: extracted["seconds"]["workers"] / decoded} if decoded else {}


def _read_speeds(out: Path) -> dict[str, float]:
    """The speeds that an earlier run measured: images that are done already say nothing."""
    try:
        speeds = json.loads((out / SPEEDS).read_text())
        return {str(name): float(value) for name, value in speeds.items()}
    except (OSError, ValueError, AttributeError):
        return {}


# ------------------------------------------------------------------------------- the trials


def _test_heads(
    pool: Pool, config: AdviseConfig, context: RunContext
) -> dict[int, NDArray[np.float32]]:
    """The logits of heads trained on 1, 2, 4 and 8 views, by number of views; nan: not tested."""
    result = {}
    for views in (1, *VIEWS):
        context.screen.print_status(f"heads on {views} views")
        logit = np.full((len(pool.cache), len(pool.cache.classes)), np.nan, np.float32)
        data = pool.data(views)
        for number in range(int(pool.fold.max()) + 1):
            rows = pool.rows(number)
            logit[rows.test] = head_logits(data, rows.train, rows.test).logit
        result[views] = logit
    return result


def _test_tuning(
    store: Store,
    pool: Pool,
    out: Path,
    config: AdviseConfig,
    counts: tuple[int, int],
    context: RunContext,
) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """Fine-tune on each fold's other images, as far as the budget allows.

    counts: all images, and the training images among them, of a fine-tuning of everything.

    Returns:
        The logits, nan where none were computed; and the plan: epochs and seconds of a fine-tuning
        of all images, seconds per image, what one epoch would take.
    """
    images, train_images = counts
    folder = out / "trial"
    folder.mkdir(parents=True, exist_ok=True)
    logit = np.full((len(pool.cache), len(pool.cache.classes)), np.nan, np.float32)
    folds = int(pool.fold.max()) + 1
    with run_context.child_context(context, "trial") as child:
        rows = pool.rows(0)
        probe = dataclasses.replace(rows, test=rows.test[:2], steps=PROBE_STEPS)
        measured = _tune(store, pool, folder, config, (probe, None), child)["seconds_per_image"]
        decode, forward = _decode_and_forward(pool)
        fixed = images * (2 * decode + forward)  # the pixel cache, the features of the tuned body
        epoch = train_images * measured
        wanted = resolve_epochs(FinetuneConfig(), train_images).total_epochs
        epochs = min(wanted, int(max(config.budget * 60 - fixed, 0) / epoch))
        plan = {"epochs": epochs, "one_epoch_seconds": fixed + epoch, "budget": config.budget}
        if epochs:
            limit = None if epochs == wanted else epochs
            for number in range(_affordable(pool, measured, limit, config, child)):
                child.screen.print_status(f"fine-tuning fold {number + 1} of {folds}")
                rows = pool.rows(number)
                found = _tune(store, pool, folder, config, (rows, limit), child)
                logit[rows.test] = found["logit"]
                measured = found["seconds_per_image"]
    plan |= {"seconds_per_image": measured, "seconds": fixed + epochs * train_images * measured}
    return logit, plan


def _affordable(
    pool: Pool, seconds: float, limit: int | None, config: AdviseConfig, context: RunContext
) -> int:
    """The number of folds that a trial of fine-tuning has time for, at least one."""
    folds, images = int(pool.fold.max()) + 1, int((pool.fold != 0).sum())
    epochs = limit or resolve_epochs(FinetuneConfig(), images).total_epochs
    each = images * epochs * seconds
    count = max(1, min(folds, int(config.budget * 60 / each)))
    context.screen.print(
        f"fine-tuning {count} of {folds} folds, {images} images each, {epochs} epochs: about"
        f" {advice.duration(count * each)}"
    )
    return count


def _tune(
    store: Store,
    pool: Pool,
    folder: Path,
    config: AdviseConfig,
    work: tuple[TrialRows, int | None],
    context: RunContext,
) -> dict[str, Any]:
    """Fine-tune on some images and test on others; a result that is there already is read.

    work: the images, and the number of epochs (None: by the number of images).
    """
    import torch

    rows, epochs = work
    tuning = FinetuneConfig(epochs=epochs or "auto")
    recipe = store.recipe.single_view()
    state = extract.load_weights(store.recipe, store.weights_path)
    head = head_logits(pool.data(1), rows.train, rows.test).head.state
    tensors = {f"{BODY}{name}": tensor for name, tensor in state.items()}
    tensors |= {f"{HEAD}{name}": torch.from_numpy(value) for name, value in head.items()}
    request = Request(
        recipe=recipe,
        architecture="linear",
        classes=tuple(pool.cache.classes),
        config=resolve_epochs(tuning, len(rows.train)),
        augment=AugmentConfig(augment=config.augment),
        start=finetuning_run.save_start(folder, tensors),
    )
    key = hashlib.sha256(request.key(pool.cache).encode())
    for positions in (rows.train, rows.test):
        key.update(positions.tobytes())
    file = folder / f"{key.hexdigest()[:16]}.json"
    if rows.steps is None and file.is_file():
        saved: dict[str, Any] = json.loads(file.read_text())
        return saved | {"logit": np.array(saved["logit"], np.float32)}
    result = _launch(request, pool, folder, rows, context)
    if rows.steps is None:
        with fileio.atomic_write(file) as draft:
            draft.write_text(json.dumps(result | {"logit": result["logit"].tolist()}))
    return result


def _launch(
    request: Request, pool: Pool, folder: Path, rows: TrialRows, context: RunContext
) -> dict[str, Any]:
    """Run a trial, in smaller parts if the memory is too small for a step."""

    def on_report(report: dict[str, Any]) -> None:
        if "step" in report:
            context.screen.print_status(f"step {report['step']} of {report['of']}")
        elif "warning" in report:
            context.screen.print(report["warning"])

    while True:
        try:
            result: dict[str, Any] = launch.run(
                trial.run_trial,
                pool.cache.path,
                folder,
                request,
                rows,
                config=context.launch,
                on_report=on_report,
                labels=run_context.metric_labels(context, "advise"),
            )
            return result
        except OutOfMemoryRefusal as error:
            if not error.smaller:
                raise
            smaller = dataclasses.replace(request.config, micro_batch=error.smaller)
            request = dataclasses.replace(request, config=smaller)


# ------------------------------------------------------------------------------ the options


def _decode_and_forward(pool: Pool) -> tuple[float, float]:
    """Seconds per image of decoding, and of the body for one view."""
    decode, views = pool.speeds.get("decode", math.nan), pool.speeds.get("views", math.nan)
    return decode, max(views - decode, 0.0) / max(VIEWS)


def _options(
    pool: Pool,
    heads: dict[int, NDArray[np.float32]],
    tuned: NDArray[np.float32],
    plan: dict[str, Any],
    costs: tuple[int, float],
) -> list[dict[str, Any]]:
    """Every option with its accuracy, its difference to the frozen head, and its cost.

    costs: the number of all images, and the seconds that a head on them takes.
    """
    images, head_seconds = costs
    decode, forward = _decode_and_forward(pool)
    options = [("frozen head", heads[1], head_seconds)]
    options += [
        (f"{k} cached views", heads[k], images * (decode + k * forward) + k * head_seconds)
        for k in VIEWS
    ]
    if not np.isnan(tuned).all():
        epochs = plan["epochs"]
        name = f"fine-tuned, {epochs} epoch{'s' if epochs > 1 else ''}"
        options.append((name, tuned, plan["seconds"] + head_seconds))
    held_out = [_held_out(pool, logit) for _, logit, _ in options]
    differences = body_comparison.compare(held_out[0], held_out[1:])
    lines: list[dict[str, Any]] = []
    for number, ((name, _, seconds), result) in enumerate(zip(options, held_out, strict=True)):
        one = differences[number - 1] if number else None
        lines.append(
            {
                "name": name,
                "accuracy": result.accuracy,
                "half_width": result.half_width,
                "images": len(result.key),
                "points": 0.0 - one.points if one else 0.0,
                "points_half_width": one.half_width if one else 0.0,
                "p": one.p if one else None,
                "seconds": seconds if math.isfinite(seconds) else None,
            }
        )
    return lines


def _held_out(pool: Pool, logit_NC: NDArray[np.float32]) -> HeldOut:
    """Which of the tested images are right, copies once."""
    tested = np.flatnonzero(~np.isnan(logit_NC).any(1))
    correct = extrapolation.correct_share(logit_NC[tested], np.array(pool.cache.label)[tested])
    key, first = np.unique(pool.cache.image_id[tested], return_index=True)
    return HeldOut(key=key, correct=correct[first])
