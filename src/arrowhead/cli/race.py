"""The command race."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from arrowhead.cli.app import finish, program, run_context, show_next_commands, show_written
from arrowhead.cli.options import Data, Launch, Out, Output, Tracking
from arrowhead.cli.stage_options import Pixels, Race, RaceFlags, Source
from arrowhead.commands import race_config
from arrowhead.data import remote_folder, sample, sources
from arrowhead.data.source_config import SourceConfig
from arrowhead.decode.pixels import PixelConfig
from arrowhead.features import backbone
from arrowhead.features.feature_config import FeatureConfig
from arrowhead.runtime.ray_cluster import LaunchConfig
from arrowhead.tracking.client import TrackingConfig
from arrowhead.wording import pluralize

PER_CLASS = 20  # images that a class keeps at the least
MIN_IMAGES = 200  # fewer say little; so few images need no sample


def race(
    data: Data,
    out: Annotated[
        Path, Parameter(help="Folder or URI for the results: OUT/BODY/store, race.json.")
    ],
    *,
    race: Race = RaceFlags(),
    source: Source = SourceConfig(),
    pixels: Pixels = PixelConfig(),
    launch: Launch = LaunchConfig(),
    tracking: Tracking = TrackingConfig(),
    output: Out = Output(),
) -> int:
    """Compare backbones on a sample of your images: accuracy, speed, size.

    Every body extracts the features of the same images. Heads are trained on folds of them and
    tested on the images that were left out. The verdict says whether the best body is better by
    more than chance, and what it costs. `fit DATA OUT/BODY` uses the features again.

    Example: arrowhead race photos/ race/ --bodies resnet34,mobilenet_v2 --share 0.1
    """
    from arrowhead.commands import race as commands_race

    out = remote_folder.check_output(out, "results")
    entries = race_config.entries(race, out)
    for entry in entries:
        backbone.check_config(entry.config)
        remote_folder.check_output(entry.store, "store")
    images = FeatureConfig(source=source, pixels=pixels)
    catalog = sources.labelled_catalog(data, source)
    sources.check_can_validate(data, catalog)
    share = max(race.share, min(1.0, MIN_IMAGES / len(catalog)))
    drawn = sample.draw_sample(catalog, share, PER_CLASS)
    with run_context("race", launch, tracking, output) as context:
        context.screen.print(
            f"{pluralize(len(entries), 'body', 'bodies')} on {len(drawn):,} of"
            f" {pluralize(len(catalog), 'image')}"
        )
        result = commands_race.race(drawn, entries, out, images, context)
        for line in table(result["bodies"]):
            context.screen.print(line)
        context.screen.print(result["verdict"])
        best = result["bodies"][0]
        result["files"] = show_written(
            context.screen, [out / commands_race.RESULT, *(one.store for one in entries)]
        )
        show_next_commands(
            context.screen, [[program(), "fit", data, str(Path(best["store"]).parent)]]
        )
    return finish(result, output)


def table(bodies: list[dict[str, Any]]) -> list[str]:
    """The result as lines of text: a heading, then one line per body."""
    width = max(len("body"), *(len(one["body"]) for one in bodies))
    lines = [
        f"{'body':<{width}}  {'accuracy':>15}  {'behind the first':>16}  {'img/s':>7}  {'width':>5}"
        f"  {'parameters':>10}  license"
    ]
    for one in bodies:
        accuracy = f"{one['accuracy']:.4f} ± {one['half_width']:.4f}"
        behind = "" if one["p"] is None else _points(one)
        speed = one["images_per_second"]
        lines.append(
            f"{one['body']:<{width}}  {accuracy:>15}  {behind:>16}"
            f"  {'' if speed is None else f'{speed:.1f}':>7}  {one['width']:>5}"
            f"  {one['parameters'] / 1e6:>8.1f} M  {one['license']}"
        )
    return lines


def _points(one: dict[str, Any]) -> str:
    return f"{one['behind_points']:.1f} ± {one['behind_half_width']:.1f} points"
