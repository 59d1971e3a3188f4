"""The verbs that make stores and bundles: fit, precompute, lr-find, train."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from arrowhead.cli.app import finish, given, me, run_context, say_next, say_written, ui_command
from arrowhead.cli.options import (
    Body,
    BundlePath,
    Data,
    Extract,
    Finder,
    FinderHead,
    Golden,
    Head,
    HeadOfFinder,
    Launch,
    NamedExtract,
    NamedFinder,
    Out,
    Output,
    Pixels,
    Registry,
    Source,
    StorePath,
    Sweep,
    Tracking,
)
from arrowhead.cli.screen import Screen
from arrowhead.data import sources
from arrowhead.data.catalog import Catalog
from arrowhead.data.source_config import SourceConfig
from arrowhead.decode.pixels import PixelConfig
from arrowhead.errors import ConfigError
from arrowhead.features import backbone
from arrowhead.features.backbone import BodyConfig
from arrowhead.features.extract import ExtractConfig
from arrowhead.features.feature_config import FeatureConfig, as_in_store
from arrowhead.features.golden_images import GoldenConfig
from arrowhead.features.store import Store
from arrowhead.output_paths import check_folder, expanded
from arrowhead.runtime.ray_cluster import LaunchConfig
from arrowhead.tracking.client import TrackingConfig
from arrowhead.tracking.registry import RegistryConfig
from arrowhead.training.config import TrainConfig
from arrowhead.training.grid import SweepConfig
from arrowhead.training.lr_finder import FinderConfig
from arrowhead.training.study import Study
from arrowhead.wording import counted


def fit(
    data: Data,
    out: Annotated[Path, Parameter(help="Folder for the results: OUT/store and OUT/bundle.")],
    *,
    source: Source = SourceConfig(),
    body: Body = BodyConfig(),
    pixels: Pixels = PixelConfig(),
    extract: NamedExtract = ExtractConfig(),
    head: Head = TrainConfig(),
    golden: Golden = GoldenConfig(),
    finder: NamedFinder = FinderConfig(),
    many: Sweep = SweepConfig(),
    launch: Launch = LaunchConfig(),
    tracking: Tracking = TrackingConfig(),
    registry: Registry = RegistryConfig(),
    output: Out = Output(),
) -> int:
    """The main job: a folder of images becomes a trained classifier.

    Catalog, features, learning rate, head, evaluation, bundle; recorded in MLflow. Run it again
    with other training flags: no image is decoded a second time.

    Example: arrowhead fit photos/ out/ --body resnet34
    """
    from arrowhead.commands import train as commands_train

    out = check_folder(out, "results")
    check_folder(out / "store", "store")
    for folder in bundles(out / "bundle"):
        check_folder(folder, "bundle")
    images = FeatureConfig(source=source, body=body, pixels=pixels, extract=extract, golden=golden)
    asked = Study(head=head, finder=finder, sweep=many)
    place = commands_train.unfinished(out / "bundle", data, images, asked)
    images, catalog = _ready(data, out / "store", images, Screen(to_stderr=output.json))
    sources.must_validate(data, catalog)
    with run_context("fit", launch, tracking, output, place, registry) as context:
        result = commands_train.fit(catalog, out, images, asked, context)
        result["files"] = say_written(context.screen, [out / "store", *bundles(out / "bundle")])
        score_it = [me(), "score", result["bundle"], "IMAGES", "SCORES"]
        say_next(context.screen, [score_it, ui_command(tracking)])
    return finish(result, output)


def precompute(
    data: Data,
    store: Annotated[
        Path,
        Parameter(
            help="Folder for the feature store; in one that is there, only new or changed images"
            " are decoded."
        ),
    ],
    *,
    source: Source = SourceConfig(),
    body: Body = BodyConfig(),
    pixels: Pixels = PixelConfig(),
    extract: Extract = ExtractConfig(),
    golden: Golden = GoldenConfig(),
    launch: Launch = LaunchConfig(),
    tracking: Tracking = TrackingConfig(),
    output: Out = Output(),
) -> int:
    """Decode every image once and store what the body sees in it.

    A stopped run goes on where it was; a second run decodes only what is new or changed.

    Example: arrowhead precompute photos/ store/ --workers 2
    """
    from arrowhead.commands import precompute as commands_precompute

    store = check_folder(store, "store")
    images = FeatureConfig(source=source, body=body, pixels=pixels, extract=extract, golden=golden)
    images, catalog = _ready(data, store, images, Screen(to_stderr=output.json))
    with run_context("precompute", launch, tracking, output) as context:
        result = commands_precompute.precompute(catalog, store, images, context)
        result["files"] = say_written(context.screen, [store])
        say_next(context.screen, [[me(), "lr-find", store], [me(), "train", store, "BUNDLE"]])
    return finish(result, output)


def _ready(
    data: str, store: Path, asked: FeatureConfig, screen: Screen
) -> tuple[FeatureConfig, Catalog]:
    """What can be refused at once is refused; the settings, with what an existing store remembers,
    and the images.
    """
    images = as_in_store(store, asked, given())
    backbone.check(images.body)
    catalog = sources.labelled(data, images.source)
    if images != asked:
        body, pixels = images.body, images.pixels
        own = f" with {body.weights}" if body.weights != asked.body.weights else ""
        screen.say(
            f"as in {store}: body {body.body}{own} · pool {body.pool} · {pixels.size} pixels,"
            f" {pixels.resize} · {counted(pixels.views, 'view')}"
        )
    _say_unused(images, catalog, store, screen)
    return images, catalog


def _say_unused(images: FeatureConfig, catalog: Catalog, store: Path, screen: Screen) -> None:
    """Refuse, or say, what was asked for and changes nothing here."""
    if images.pixels.views == 1 and (idle := given() & {"augment", "augment_seed"}):
        flag = "--" + min(idle).replace("_", "-")
        raise ConfigError(
            f"{flag} has no effect with one view of each image, which is clean.",
            "views to augment.",
            f"add e.g. --views 4, or leave {flag} out.",
        )
    if given() & {"chunk_size", "extract.chunk_size"} and (store / "store.json").is_file():
        begun = Store(store).chunk_size
        if begun != images.extract.chunk_size:
            screen.say(f"--chunk-size is not used: {store} was begun with {begun}")
    if "valid_share" in given() and "" not in catalog.splits:
        screen.say("--valid-share is not used: the images come with a validation split")


def lr_find(
    store: StorePath,
    *,
    head: HeadOfFinder = FinderHead(),
    finder: Finder = FinderConfig(),
    launch: Launch = LaunchConfig(),
    tracking: Tracking = TrackingConfig(),
    output: Out = Output(),
) -> int:
    """Try a rising learning rate on stored features and suggest one.

    Writes lr_finder.png and lr_finder.csv into the store's folder and to MLflow.

    Example: arrowhead lr-find out/store --head lesson
    """
    from arrowhead.commands import train as commands_train
    from arrowhead.reporting import extraction

    Store(store := expanded(store))
    check_folder(store, "store")
    with run_context("lr-find", launch, tracking, output) as context:
        extraction.say_account(store, context.screen)
        curve = commands_train.find_rate(store, head, finder, context)
        result = curve.plain() | {"rate": curve.rate, "figure": str(store / "lr_finder.png")}
        drawn = [store / "lr_finder.png", store / "lr_finder.csv"]
        result["files"] = say_written(context.screen, drawn)
        run_id = context.run.run_id if context.run else None
        # The rate suits the training that was asked about, and no other head or length.
        asked = flags_of(replace(head, rate=float(f"{curve.rate:.2g}")))
        say_next(context.screen, [[me(), "train", store, "BUNDLE", *asked]])
    return finish(result | {"store": str(store), "run_id": run_id}, output)


def flags_of(head: TrainConfig) -> list[str]:
    """The flags that ask for this training, but those whose default it has."""
    plain = asdict(TrainConfig())
    asked = {name: value for name, value in asdict(head).items() if value != plain[name]}
    return [word for name in asked for word in (f"--{name.replace('_', '-')}", str(asked[name]))]


def train(
    store: StorePath,
    bundle: BundlePath,
    *,
    head: Head = TrainConfig(),
    golden: Golden = GoldenConfig(),
    finder: NamedFinder = FinderConfig(),
    many: Sweep = SweepConfig(),
    launch: Launch = LaunchConfig(),
    tracking: Tracking = TrackingConfig(),
    registry: Registry = RegistryConfig(),
    output: Out = Output(),
) -> int:
    """Train a head on stored features and save it with its body as a bundle.

    Example: arrowhead train out/store out/bundle --head lesson --epochs 5 --rate 0.01
    """
    from arrowhead.commands import train as commands_train
    from arrowhead.reporting import extraction

    Store(store := expanded(store))
    bundle, before = bundles(check_folder(bundle, "bundle"))
    check_folder(before, "bundle")
    asked = Study(head=head, finder=finder, sweep=many)
    place = commands_train.unfinished(bundle, store.absolute(), asked)
    with run_context("train", launch, tracking, output, place, registry) as context:
        extraction.say_account(store, context.screen)
        result = commands_train.fit_head(store, bundle, asked, context, golden)
        result["files"] = say_written(context.screen, bundles(bundle))
        say_next(context.screen, [[me(), "score", bundle, "IMAGES", "SCORES"]])
    return finish(result, output)


def bundles(path: Path) -> list[Path]:
    """A bundle, and the one that it has replaced."""
    return [path, path.with_name(f"{path.name}.previous")]
