"""The command finetune: body and head trained together on augmented pixels.

OUT/frozen        without --from: store and bundle of the frozen body, as `fit` makes them
    OUT/pixels        the pixel cache
    OUT/body.safetensors, OUT/store   the tuned body, and the features that it gives
    OUT/bundle        the better one of the frozen and the fine-tuned bundle
    OUT/bundle.tuned  the fine-tuned one, if it is not the better one
    OUT/finetune.json the request and its result: the same command does not train again
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arrowhead import __version__, fileio
from arrowhead.bundle import body_file
from arrowhead.bundle import format as bundle_format
from arrowhead.commands import pixel_cache, precompute, train, tuned_choice
from arrowhead.commands.tuned_choice import Base
from arrowhead.data import sources
from arrowhead.data.catalog import Catalog
from arrowhead.errors import ConfigError
from arrowhead.examine import figures
from arrowhead.features import corrections, networks
from arrowhead.features.backbone import BodyConfig
from arrowhead.features.corrections import Correction
from arrowhead.features.feature_config import FeatureConfig, resolve_weights
from arrowhead.features.recipe import Recipe
from arrowhead.features.store import Store
from arrowhead.finetuning import run as finetuning_run
from arrowhead.finetuning.augmentation import AugmentConfig
from arrowhead.finetuning.config import FinetuneConfig, resolve_epochs
from arrowhead.finetuning.network import BODY, HEAD
from arrowhead.finetuning.pixel_cache import PixelCache, PixelCacheConfig
from arrowhead.finetuning.run import OutOfMemoryRefusal, Request
from arrowhead.reporting import evaluation, recording, run_context
from arrowhead.reporting import finetuning as reporting_finetuning
from arrowhead.reporting.finetuning import FinetuneReporter
from arrowhead.reporting.run_context import RunContext
from arrowhead.runtime import launch
from arrowhead.training import checkpoint
from arrowhead.training.config import TrainConfig
from arrowhead.training.study import Study
from arrowhead.training.trainer import TrainedHead

FINISHED = "finetune.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneSettings:
    """How a network is fine-tuned.

    Attributes:
        config: The training.
        augment: The augmentation of training images.
        cache: The cache of decoded pixels.
        study: How the frozen head is trained, without a bundle to start from.
        store: Where the features of the frozen body are then; None: OUT/frozen/store.
    """

    config: FinetuneConfig = FinetuneConfig()
    augment: AugmentConfig = AugmentConfig()
    cache: PixelCacheConfig = PixelCacheConfig()
    study: Study = Study()
    store: Path | None = None


def finetune(
    data: str | Path | Catalog,
    out: Path,
    base: Path | None,
    images: FeatureConfig,
    settings: FinetuneSettings,
    context: RunContext,
) -> dict[str, Any]:
    """Fine-tune a bundle's network on images; OUT/bundle is then the better one of the two.

    Args:
        data: A catalog, or what `sources.labelled_catalog` lists.
        out: The folder of the results.
        base: The bundle to start from; None: a head on the frozen body is trained first.
        images: How images are read; without `base` also the body and its pixels.
        settings: How it is fine-tuned.
        context: Where to run, show and record.

    Returns:
        counts and faults of the images; epochs; frozen, tuned: the metrics of both on the
        validation images; better: "frozen" or "tuned"; bundle, store, and so on.
    """
    catalog = data if isinstance(data, Catalog) else sources.labelled_catalog(data, images.source)
    evaluation.show_bundle_to_delete(out / "bundle", context)
    history = find_corrections(out, base, context)
    origin = Base(base, bundle_format.load(base), None) if base else None
    _check_cache(out, catalog, origin, images, settings)
    origin = origin or _train_frozen(catalog, out / "frozen", images, settings, context, history)
    if not history:  # else the classes are known when the images have been read
        finetuning_run.check_classes(catalog.classes, origin.bundle.classes)
    recipe = origin.bundle.recipe.single_view()
    images = dataclasses.replace(images, pixels=body_file.pixels_of(origin.bundle, images.pixels))
    if base is None:
        context = dataclasses.replace(context, source_shown=True)
    context.screen.print(f"images for fine-tuning, decoded once into {out / 'pixels'}:")
    with run_context.child_context(context, "decode") as child:
        decoded = pixel_cache.build_pixel_cache(
            catalog, out / "pixels", images, settings.cache, child, history
        )
    context = dataclasses.replace(context, source_shown=True)
    request, trained = train_network(out, origin, recipe, settings, context)
    body = write_body(out, origin, recipe, request, trained)
    body_config = body_file.body_config(recipe, body)
    store_path = tuned_store(out / "store", body_config, _with_views(recipe, images), history)
    images = dataclasses.replace(images, body=body_config)
    context.screen.print("features of the fine-tuned body:")
    with run_context.child_context(context, "extract") as child:
        extracted = precompute.precompute(catalog, store_path, images, child, history)
    _check_finite(extracted, origin, settings.config)
    result = _choose(out, origin, Store(store_path), (request, trained), images, context)
    _remove_checkpoints(out, trained["key"])
    facts = {
        "classes": list(request.classes),
        "micro_batch": request.config.micro_batch,
        "pixels": str(out / "pixels"),
        "body": str(body),
        "run_id": context.run.run_id if context.run else None,
    }
    return _of_images(decoded) | _of_training(trained) | facts | result


def _remove_checkpoints(out: Path, key: str) -> None:
    folder = train.checkpoint_dir_of(out / "bundle")
    checkpoint.remove_finished(folder, key)
    (folder / finetuning_run.START_FILE).unlink(missing_ok=True)


def request_key(
    catalog: Catalog,
    out: Path,
    base: Path | None,
    images: FeatureConfig,
    settings: FinetuneSettings,
) -> str:
    """A hash of the images, their labels, and all settings but the base; see `finished`."""
    history = find_corrections(out, base, RunContext())
    parts = catalog.paths, catalog.labels, catalog.splits, history, images, settings
    digest = hashlib.sha256(repr((__version__, parts)).encode("utf-8", "surrogatepass"))
    for array in (catalog.sizes, catalog.stamps):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def finished(out: Path, key: str, base: str | None) -> dict[str, Any] | None:
    """The result of the same request, if it has finished and its bundle is still there.

    base: the fingerprint of the bundle to start from. It may also be the one that was kept.
    """
    try:
        saved: dict[str, Any] = json.loads((out / FINISHED).read_text())
        bundle = bundle_format.fingerprint(out / "bundle")
    except (OSError, ValueError):
        return None
    if not isinstance(saved, dict) or (saved.get("key"), saved.get("bundle")) != (key, bundle):
        return None
    result: dict[str, Any] = saved["result"]
    return result if base in (saved["base"], *([bundle] if base else [])) else None


def remember(out: Path, key: str, base: str | None, result: dict[str, Any]) -> None:
    """Note that a request has finished, for `finished`."""
    saved = {"key": key, "base": base, "bundle": bundle_format.fingerprint(out / "bundle")}
    with fileio.atomic_write(out / FINISHED) as draft:
        draft.write_text(json.dumps(fileio.jsonable(saved | {"result": result})) + "\n")


def _check_cache(
    out: Path,
    catalog: Catalog,
    base: Base | None,
    images: FeatureConfig,
    settings: FinetuneSettings,
) -> None:
    """Raise ConfigError if the pixel cache will not fit, before anything is trained."""
    if base:
        size = base.bundle.recipe.size
    else:
        store = settings.store or out / "frozen" / "store"
        weights = resolve_weights(store, images.body, images.pixels.size)
        size = images.pixels.complete(weights.pixels).side
    pixel_cache.check_cache(out / "pixels", catalog, size, settings.cache)


def _with_views(recipe: Recipe, images: FeatureConfig) -> Recipe:
    """The recipe of a store with the augmented views of these settings."""
    pixels = images.pixels
    if pixels.views == 1:
        return recipe
    seed = pixels.augment_seed
    return dataclasses.replace(recipe, views=pixels.views, augment=pixels.policy, augment_seed=seed)


def find_corrections(out: Path, base: Path | None, context: RunContext) -> list[Correction]:
    """The corrected labels of these images: those of the store of OUT, or beside the bundle to
    start from, where a label was corrected, or a correction undone, last.
    """
    paths = [out / "store", out / "store.tuned", out / "frozen" / "store"]
    if base:
        paths.append(base.with_name("store"))
    newest, chosen = "", None
    histories: dict[Path, list[Correction]] = {}
    for path in paths:
        if (path / "manifest.json").is_file():
            histories[path] = corrections.read_history(Store(path))
            last = max((max(one.when, one.undone or "") for one in histories[path]), default="")
            if last > newest:
                newest, chosen = last, path
    if chosen is None:
        return []
    if corrections.active_changes(histories[chosen]):
        context.screen.print(f"the labels that were corrected in {chosen} are used")
    return histories[chosen]


def _of_images(decoded: dict[str, Any]) -> dict[str, Any]:
    return {name: decoded[name] for name in ("counts", "faults", "fault_kinds", "too_many_faults")}


def _of_training(trained: dict[str, Any]) -> dict[str, Any]:
    return {
        "epochs": trained["history"],
        "epoch": trained["kept"],
        "groups": trained["groups"],
        "steps": trained["steps"],
        "train_seconds": trained["seconds"],
        "images_per_second": trained["images_per_second"],
    }


# ------------------------------------------------------------------------------ the base


def _train_frozen(
    catalog: Catalog,
    folder: Path,
    images: FeatureConfig,
    settings: FinetuneSettings,
    context: RunContext,
    history: list[Correction],
) -> Base:
    """Train a head on the features of the frozen body, as `fit` does."""
    if settings.store is None:
        images = dataclasses.replace(images, pixels=dataclasses.replace(images.pixels, views=1))
    context.screen.print("first a head on the frozen body:")
    store, bundle = settings.store or folder / "store", folder / "bundle"
    with run_context.child_context(context, "frozen") as child:
        precompute.precompute(catalog, store, images, child, history)
        result = train.run_study(store, settings.study, child)
        assert result.config is not None
        train.save_bundle(Store(store), result.config, result.winner, bundle, child)
    return Base(bundle, bundle_format.load(bundle), store)


# ---------------------------------------------------------------------------- the training


def train_network(
    out: Path, base: Base, recipe: Recipe, settings: FinetuneSettings, context: RunContext
) -> tuple[Request, dict[str, Any]]:
    """Fine-tune, in smaller parts if the memory is too small for a step; see `run_finetune`."""
    folder = train.checkpoint_dir_of(out / "bundle")
    request = make_request(out, base, recipe, settings)
    root = context.root_run.run_id if context.root_run else None
    with run_context.child_context(context, "train") as child:
        reporter = FinetuneReporter(request, child)
        _log_settings(request, base, child)
        while True:
            try:
                result = launch.run(
                    finetuning_run.run_finetune,
                    out / "pixels",
                    folder,
                    request,
                    root,
                    config=context.launch,
                    on_report=reporter,
                    checkpoint_dir=folder,
                    on_start=reporter.show_workers,
                    labels=run_context.metric_labels(context, "finetune"),
                )
                break
            except OutOfMemoryRefusal as error:
                if settings.config.batch_size != "auto" or not error.smaller:
                    raise
                context.screen.print(
                    f"{error.found} Going on with parts of {error.smaller} images"
                    f" (--micro-batch {error.smaller}); steps still have"
                    f" {request.config.global_batch}."
                )
                config = dataclasses.replace(request.config, micro_batch=error.smaller)
                request = dataclasses.replace(request, config=config)
            finally:
                reporter.send()
    return request, result


def make_request(out: Path, base: Base, recipe: Recipe, settings: FinetuneSettings) -> Request:
    """Write the weights to start from beside the checkpoints of OUT; what the workers are given."""
    folder = train.checkpoint_dir_of(out / "bundle")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{BODY}{name}": t for name, t in base.bundle.body_state.items()}
    tensors |= {f"{HEAD}{name}": t for name, t in base.bundle.head_state.items()}
    train_images = int((PixelCache(out / "pixels").split == "train").sum())
    return Request(
        recipe=recipe,
        architecture=base.bundle.head,
        classes=tuple(base.bundle.classes),
        config=resolve_epochs(settings.config, train_images),
        augment=settings.augment,
        start=finetuning_run.save_start(folder, tensors),
    )


def _log_settings(request: Request, base: Base, context: RunContext) -> None:
    values = {f"finetune.{k}": v for k, v in request.config.parameters().items()}
    values |= {f"augment.{k}": v for k, v in dataclasses.asdict(request.augment).items()}
    values |= {"recipe": base.bundle.recipe.to_json(), "base": base.fingerprint}
    run_context.log_params(context, values | {"workers": context.launch.workers})


# ------------------------------------------------------------------------------ the result


def write_body(
    out: Path, base: Base, recipe: Recipe, request: Request, trained: dict[str, Any]
) -> Path:
    """Write the tuned body with its origin: a file for `--weights`."""
    folder = train.checkpoint_dir_of(out / "bundle")
    tensors = finetuning_run.result_tensors(folder, trained["key"])
    body = {n.removeprefix(BODY): t for n, t in tensors.items() if n.startswith(BODY)}
    trained["head"] = {
        n.removeprefix(HEAD): t.numpy() for n, t in tensors.items() if n.startswith(HEAD)
    }
    weights = base.bundle.lineage.get("weights") or {}
    origin = {
        "license": weights.get("license", "unknown"),
        "source": _tuned_source(weights.get("source", "")),
        "base_weights": recipe.weights,
        "base_bundle": base.fingerprint,
        "finetune": request.config.parameters() | dataclasses.asdict(request.augment),
    }
    path = out / "body.safetensors"
    networks.write_weights(path, body, origin)
    return path


def _check_finite(extracted: dict[str, Any], base: Base, config: FinetuneConfig) -> None:
    """Raise ConfigError if the tuned body gives no usable features: the training diverged."""
    broken, usable = extracted["fault_kinds"].get("not finite", 0), extracted["counts"]["features"]
    if broken > usable:
        lower = ",".join(f"{rate / 10:g}" for rate in config.group_rates)
        raise ConfigError(
            f"The training diverged: the fine-tuned body gives numbers beyond float16 for {broken}"
            f" of {broken + usable} images.",
            "learning rates at which the loss falls.",
            f"give lower ones, such as --rates {lower}. The bundle that this started from,"
            f" {base.path}, is as it was.",
        )


def _tuned_source(source: str) -> str:
    if source.startswith(networks.TUNED_PREFIX):
        return source
    return networks.TUNED_PREFIX + (source or "weights not recorded")


def tuned_store(
    path: Path, body: BodyConfig, recipe: Recipe, history: Sequence[Correction] = ()
) -> Path:
    """Where the features of this body are stored.

    A store of other weights or pixels that an earlier fine-tuning left there is replaced (one with
    corrected labels that are not in `history` is kept under another name); that of a frozen body
    stays, and the new one lies beside it.
    """
    from arrowhead.features import backbone

    beside = path.with_name(f"{path.name}.tuned")
    digest = backbone.load(body, recipe.size).sha256
    for candidate in (path, beside):
        if not (candidate / "store.json").is_file():
            return candidate
        store = Store(candidate)
        if store.recipe.weights == digest and _same_pixels(store.recipe, recipe):
            return candidate
        source = (store.weights_origin or {}).get("source", "")
        if source.startswith(networks.TUNED_PREFIX) or candidate == beside:
            _make_way(candidate, history)
            return candidate
    raise AssertionError("the second place is always taken")


def _make_way(path: Path, history: Sequence[Correction]) -> None:
    """Remove a store, or rename it if labels in it were corrected: nobody should do that again."""
    if all(one in history for one in corrections.read_history(Store(path))):
        fileio.remove_path(path)
        return
    kept, number = path.with_name(f"{path.name}.corrected"), 2
    while kept.exists():
        kept, number = path.with_name(f"{path.name}.corrected-{number}"), number + 1
    path.rename(kept)


def _same_pixels(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes, apart from the weights, give one body the same pixels."""
    return dataclasses.replace(one, weights="", decoder=other.decoder) == dataclasses.replace(
        other, weights=""
    )


def _choose(
    out: Path,
    base: Base,
    store: Store,
    work: tuple[Request, dict[str, Any]],
    images: FeatureConfig,
    context: RunContext,
) -> dict[str, Any]:
    """Write the fine-tuned bundle, compare it with the base, and make the better one OUT/bundle."""
    tuned_path, bundle_path = out / "bundle.tuned", out / "bundle"
    tuned = _write_tuned(tuned_path, base, store, work, images, context)
    valid = store.features("valid")
    feature_ND = tuned_choice.frozen_features(base, valid, store, images, context)
    frozen = tuned_choice.frozen_metrics(base, store, feature_ND)
    tuned_bundle = bundle_format.load(tuned_path)
    judgement = tuned_choice.judge(base.bundle, tuned_bundle, valid, feature_ND)
    is_better = judgement.is_better
    name = "f2_samples" if "f2_samples" in tuned else "accuracy"
    reporting_finetuning.show_comparison(frozen, tuned, name, judgement, context.screen)
    previous = evaluation.previous_bundle(bundle_path, context)
    bundle_format.check_replaceable(bundle_path)
    if is_better:
        fileio.replace_folder(tuned_path, bundle_path, previous)
    elif not (bundle_path.exists() and bundle_path.samefile(base.path)):
        with fileio.atomic_folder(bundle_path, previous) as folder:
            shutil.copytree(base.path, folder, dirs_exist_ok=True)
    metrics = tuned if is_better else frozen
    registered = None
    if context.run:
        context.run.record({f"frozen.{name}": frozen[name], f"tuned.{name}": tuned[name]})
        recording.log_model(context.run, bundle_path, metrics)
        registered = context.run.register(bundle_path)
    their_store = store.path if is_better else base.store
    return {
        "frozen": frozen,
        "tuned": tuned,
        "metrics": metrics,
        "brier": dataclasses.asdict(judgement),
        "better": "tuned" if is_better else "frozen",
        "bundle": str(bundle_path),
        "tuned_bundle": str(bundle_path if is_better else tuned_path),
        "store": str(their_store) if their_store else None,
        "tuned_store": str(store.path),
        "registered": registered,
    }


def _write_tuned(
    path: Path,
    base: Base,
    store: Store,
    work: tuple[Request, dict[str, Any]],
    images: FeatureConfig,
    context: RunContext,
) -> dict[str, Any]:
    """Write the fine-tuned bundle; its metrics."""
    request, trained = work
    head = TrainedHead(state=trained["head"], epochs=trained["history"], epoch=trained["kept"])
    config = TrainConfig(head="lesson" if request.architecture == "lesson" else "linear")
    settings = request.config.parameters() | dataclasses.asdict(request.augment)
    lineage = {
        "training": {"head": request.architecture} | settings,
        "finetuned_from": base.fingerprint,
        "rate": request.config.group_rates[-1],
    }
    with bundle_format.draft(path) as folder:
        figures.epochs_csv(trained["history"], folder / bundle_format.REPORT_FOLDER / "epochs.csv")
        return train.write_bundle(store, config, head, folder, context, lineage, images.golden)
