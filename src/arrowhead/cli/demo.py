"""The command demo: fit and score on images that it draws itself."""

from __future__ import annotations

import os
import shutil
from itertools import count
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from arrowhead.cli.app import (
    bundles,
    finish,
    program,
    run_context,
    show_next_commands,
    show_written,
    ui_command,
)
from arrowhead.cli.options import Launch, Out, Output, Tracking
from arrowhead.cli.stage_options import Head
from arrowhead.features.backbone import BodyConfig
from arrowhead.features.extract import ExtractConfig
from arrowhead.features.feature_config import FeatureConfig
from arrowhead.features.networks import BUNDLED_BODY
from arrowhead.inference.score_request import ScoreConfig
from arrowhead.output_paths import check_output_folder
from arrowhead.runtime.ray_cluster import LaunchConfig
from arrowhead.tracking.client import TrackingConfig
from arrowhead.training.config import TrainConfig
from arrowhead.training.study import Study
from arrowhead.wording import pluralize


def demo(
    out: Annotated[Path, Parameter(help="Folder for the images and the results.")] = Path("demo"),
    *,
    head: Head = TrainConfig(),
    launch: Launch = LaunchConfig(),
    tracking: Tracking = TrackingConfig(),
    output: Out = Output(),
) -> int:
    """Try Arrowhead on images that it draws itself: draw, fit, score.

    Needs no data and no network: the body is EfficientNet-Lite0 with ImageNet weights that are
    installed with Arrowhead (--weights bundled).
    """
    from arrowhead import demo as demo_images
    from arrowhead.commands import score
    from arrowhead.commands import train as commands_train
    from arrowhead.reporting.run_context import child_context

    out = check_output_folder(out, "results")
    images, fitted, bundle = out / "images", out / "fit", out / "fit" / "bundle"
    for folder, kind in ((images, "results"), (fitted / "store", "store"), (bundle, "bundle")):
        check_output_folder(folder, kind)
    study = Study(head=head)
    run_file = commands_train.run_file(bundle, "demo", study)
    with run_context("demo", launch, tracking, output, run_file) as context:
        if not images.is_dir():
            draft = out / ".images.draft"  # perhaps left by a demo that was stopped
            shutil.rmtree(draft, ignore_errors=True)
            drawn = demo_images.draw(draft)
            draft.rename(images)
            context.screen.print(
                f"{pluralize(drawn, 'image')} of {', '.join(demo_images.CLASSES)} drawn in {images}"
            )
        config = FeatureConfig(body=_demo_body())
        result = commands_train.fit(images, fitted, config, study, context)
        scores = _new_folder(out / "scores")
        with child_context(context, "score") as score_context:
            scored = score.score(
                bundle, images / "new", scores, ScoreConfig(), ExtractConfig(), score_context
            )
        counts = " · ".join(f"{name} {count}" for name, count in scored["labels"].items())
        context.screen.print(f"labels of the images in {images / 'new'}: {counts}")
        written = [images, fitted / "store", *bundles(bundle), scores]
        result["files"] = show_written(context.screen, written)
        flags = ["--head", "lesson", "--epochs", "5"]
        train_command = [program(), "train", fitted / "store", out / "lesson", *flags]
        score_command = [program(), "score", out / "lesson", images / "valid"]
        score_command += [out / "valid-scores", "--probabilities"]
        show_next_commands(context.screen, [train_command, score_command, ui_command(tracking)])
    return finish(result | {"scores": str(scores), "labels": scored["labels"]}, output)


def _new_folder(path: Path) -> Path:
    """`path`, or the first of path-2, path-3 … that does not exist."""
    names = (path if n == 1 else path.with_name(f"{path.name}-{n}") for n in count(1))
    return next(name for name in names if not os.path.lexists(name))


def _demo_body() -> BodyConfig:
    """The body whose trained weights are installed with Arrowhead: it needs no network."""
    return BodyConfig(body=BUNDLED_BODY, weights="bundled")
