"""The command finetune."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from arrowhead.cli import tuned_output
from arrowhead.cli.app import given_flags
from arrowhead.cli.options import Data, Out, Output
from arrowhead.cli.stage_options import Report, RunFlags, TunedImages, Tuning
from arrowhead.cli.train import refuse_flags_of_bundle
from arrowhead.cli.tuned_output import Done
from arrowhead.data import sources
from arrowhead.errors import ConfigError
from arrowhead.examine.config import ReportConfig
from arrowhead.features import backbone
from arrowhead.features.feature_config import FeatureConfig, complete_from_store
from arrowhead.finetuning.augmentation import AugmentConfig


def finetune(
    data: Data,
    out: Annotated[Path, Parameter(help="Folder on a disk for the results: OUT/bundle, …")],
    *,
    base: Annotated[
        str | None,
        Parameter(
            name="--from",
            help="Bundle to start from: a folder written by `fit` or `train`, the URI of one, or a"
            " model in MLflow. Default: a head is trained on the frozen body first.",
        ),
    ] = None,
    images: Annotated[TunedImages, Parameter(name="*")] = TunedImages(),
    tuning: Annotated[Tuning, Parameter(name="*")] = Tuning(),
    run: Annotated[RunFlags, Parameter(name="*")] = RunFlags(),
    report: Report = ReportConfig(),
    output: Out = Output(),
) -> int:
    """Fine-tune: train the body and the head together on augmented images.

    Each image is decoded once, into OUT/pixels. The better one of the frozen head and the
    fine-tuned network becomes OUT/bundle. A stopped run continues between two steps.

    Example: arrowhead finetune photos/ out/ --from out/bundle
    """
    from arrowhead.commands import finetune as commands_finetune
    from arrowhead.commands import train as commands_train

    out = tuned_output.check_out(out)
    request = _images(images)
    augment = {f.name: getattr(tuning.augment, f.name) for f in dataclasses.fields(AugmentConfig)}
    settings = commands_finetune.FinetuneSettings(
        config=tuning.config,
        augment=AugmentConfig(**augment | {"seed": tuning.config.seed}),
        cache=tuning.cache,
    )
    request = _augmented_views(request, settings.augment)
    run_file = commands_train.run_file(out / "bundle", data, base, request, settings)
    catalog = sources.labelled_catalog(data, request.source)
    sources.check_can_validate(data, catalog)
    done = Done(out, catalog, base, request, settings)
    request = _resolve(request, out, base)
    return tuned_output.fine_tune("finetune", done, request, run_file, run, report, output)


def _augmented_views(request: FeatureConfig, augment: AugmentConfig) -> FeatureConfig:
    """The settings with views that are augmented as the training images are."""
    if request.pixels.views == 1:
        return request
    if augment.augment == "none":
        raise ConfigError(
            f"--views {request.pixels.views} has no effect with --augment none: all views would be"
            " the same.",
            "views that differ.",
            "leave --views out, or give --augment side-on or top-down.",
        )
    pixels = dataclasses.replace(request.pixels, augment=augment.augment)
    return dataclasses.replace(request, pixels=pixels)


def _images(images: TunedImages) -> FeatureConfig:
    return FeatureConfig(
        source=images.source,
        body=images.body,
        pixels=images.pixels,
        extract=images.extract,
        golden=images.golden,
    )


def _resolve(request: FeatureConfig, out: Path, base: str | None) -> FeatureConfig:
    """Check the body; with --from refuse the flags that the bundle decides."""
    if base is None:
        views = {name: getattr(request.pixels, name) for name in ("views", "augment")}
        store = out / "frozen" / "store"
        request = complete_from_store(store, request, given_flags() - views.keys())
        backbone.check_config(request.body)
        pixels = dataclasses.replace(request.pixels, **views)
        return dataclasses.replace(request, pixels=pixels)
    refuse_flags_of_bundle()
    return request
