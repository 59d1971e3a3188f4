"""The command finetune."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from arrowhead.cli.app import (
    finish,
    given_flags,
    local_bundle,
    open_command,
    program,
    run_context,
    show_next_commands,
    show_written,
    ui_command,
)
from arrowhead.cli.options import (
    Data,
    Out,
    Output,
    Report,
    RunFlags,
    TunedImages,
    Tuning,
)
from arrowhead.cli.train import bundles, refuse_flags_of_bundle
from arrowhead.data import sources
from arrowhead.examine.config import ReportConfig
from arrowhead.features import backbone
from arrowhead.features.feature_config import FeatureConfig, complete_from_store
from arrowhead.finetuning.augmentation import AugmentConfig
from arrowhead.output_paths import check_output_folder


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

    out = _check_out(out)
    request = _images(images)
    augment = {f.name: getattr(tuning.augment, f.name) for f in dataclasses.fields(AugmentConfig)}
    settings = commands_finetune.FinetuneSettings(
        config=tuning.config,
        augment=AugmentConfig(**augment | {"seed": tuning.config.seed}),
        cache=tuning.cache,
    )
    run_file = commands_train.run_file(out / "bundle", data, base, request, settings)
    request = _resolve(request, out, base)
    catalog = sources.labelled_catalog(data, request.source)
    sources.check_can_validate(data, catalog)
    tracking = run.tracking
    with run_context("finetune", run.launch, tracking, output, run_file, run.registry) as context:
        if base is None:
            result = commands_finetune.finetune(catalog, out, None, request, settings, context)
        else:
            with local_bundle(base, tracking) as folder:
                result = commands_finetune.finetune(
                    catalog, out, folder, request, settings, context
                )
        page = _add_report(result, report, context)
        tuned = [] if result["better"] == "tuned" else [out / "bundle.tuned"]
        written = [out / "pixels", result["body"], result["tuned_store"], *bundles(out / "bundle")]
        result["files"] = show_written(context.screen, [*written, *tuned, *page])
        score_command = [program(), "score", result["bundle"], "IMAGES", "SCORES"]
        show_next_commands(
            context.screen, [*map(open_command, page), score_command, ui_command(tracking)]
        )
    return finish(result, output, faults_flag="--extract.max-faults")


def _check_out(out: Path) -> Path:
    out = check_output_folder(out, "results")
    for store in (out / "store", out / "pixels", out / "frozen" / "store"):
        check_output_folder(store, "store")
    for name in ("bundle", "bundle.previous", "bundle.tuned"):
        check_output_folder(out / name, "bundle")
    return out


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
        request = complete_from_store(out / "frozen" / "store", request, given_flags())
        backbone.check_config(request.body)
        return request
    refuse_flags_of_bundle()
    return request


def _add_report(result: dict[str, Any], report: ReportConfig, context: Any) -> list[Path]:
    """Write the report of the better bundle if it is wanted; the page, or nothing."""
    from arrowhead.commands import examine as commands_examine

    result["report"] = None
    if report.report and result["store"]:
        result["report"] = commands_examine.report_of_training(
            Path(result["store"]), Path(result["bundle"]), context
        )
    return [Path(result["report"])] if result["report"] else []
