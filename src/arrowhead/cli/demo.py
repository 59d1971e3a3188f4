"""The verb demo: the main job on images drawn here."""

from __future__ import annotations

import os
import shutil
from itertools import count
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from arrowhead.cli import train
from arrowhead.cli.app import finish, me, run_context, say_next, say_written, ui_command
from arrowhead.cli.options import Head, Launch, Out, Output, Tracking
from arrowhead.cli.screen import Screen
from arrowhead.errors import ConfigError
from arrowhead.features import backbone
from arrowhead.features.backbone import BodyConfig
from arrowhead.features.extract import ExtractConfig
from arrowhead.features.feature_config import FeatureConfig
from arrowhead.inference.score_request import ScoreConfig
from arrowhead.output_paths import check_folder
from arrowhead.runtime.ray_cluster import LaunchConfig
from arrowhead.tracking.client import TrackingConfig
from arrowhead.training.config import TrainConfig
from arrowhead.training.study import Study
from arrowhead.wording import counted


def demo(
    out: Annotated[Path, Parameter(help="Folder for the images and the results.")] = Path("demo"),
    *,
    head: Head = TrainConfig(),
    launch: Launch = LaunchConfig(),
    tracking: Tracking = TrackingConfig(),
    output: Out = Output(),
) -> int:
    """The main job on images made here: draw, fit, score.

    Needs no data and no network. With ImageNet weights in torch's cache or a connection the body
    is a trained one; without, it says so and goes on with a random one.
    """
    from arrowhead import demo as drawing
    from arrowhead.commands import score
    from arrowhead.commands import train as commands_train
    from arrowhead.reporting.run_context import child

    out = check_folder(out, "results")
    images, fitted, bundle = out / "images", out / "fit", out / "fit" / "bundle"
    for folder, kind in ((images, "results"), (fitted / "store", "store"), (bundle, "bundle")):
        check_folder(folder, kind)
    asked = Study(head=head)
    place = commands_train.unfinished(bundle, "demo", asked)
    with run_context("demo", launch, tracking, output, place) as context:
        if not images.is_dir():
            draft = out / ".images.draft"  # of a demo that was stopped, or of this one
            shutil.rmtree(draft, ignore_errors=True)
            drew = drawing.draw(draft)
            draft.rename(images)
            context.screen.say(
                f"{counted(drew, 'image')} of {', '.join(drawing.CLASSES)} drawn in {images}"
            )
        config = FeatureConfig(body=_demo_body(context.screen))
        result = commands_train.fit(images, fitted, config, asked, context)
        scores = _new_folder(out / "scores")
        with child(context, "score") as part:
            scored = score.score(
                bundle, images / "new", scores, ScoreConfig(), ExtractConfig(), part
            )
        found = " · ".join(f"{name} {count}" for name, count in scored["labels"].items())
        context.screen.say(f"labels of the images in {images / 'new'}: {found}")
        wrote = [images, fitted / "store", *train.bundles(bundle), scores]
        result["files"] = say_written(context.screen, wrote)
        other, lesson = out / "valid-scores", ["--head", "lesson", "--epochs", "5"]
        score_it = [me(), "score", out / "lesson", images / "valid", other, "--probabilities"]
        train_it = [me(), "train", fitted / "store", out / "lesson", *lesson]
        say_next(context.screen, [train_it, score_it, ui_command(tracking)])
    return finish(result | {"scores": str(scores), "labels": scored["labels"]}, output)


def _new_folder(path: Path) -> Path:
    """`path`, or where that is taken, the first of path-2, path-3 … that is not."""
    names = (path if n == 1 else path.with_name(f"{path.name}-{n}") for n in count(1))
    return next(one for one in names if not os.path.lexists(one))


def _demo_body(screen: Screen) -> BodyConfig:
    """A trained body where one can be had, else, said aloud, a random one."""
    try:
        backbone.load(BodyConfig())
    except ConfigError:
        screen.say(
            "No ImageNet weights in torch's cache and none could be downloaded: the body is RANDOM."
            " It still sees textures; expect far less than with trained weights."
        )
        return BodyConfig(weights="random")
    return BodyConfig()
