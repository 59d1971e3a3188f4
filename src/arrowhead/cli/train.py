"""The commands that write stores and bundles: fit, precompute, lr-find, train."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from arrowhead.bundle import resolve
from arrowhead.cli import tuned_output
from arrowhead.cli.app import (
    bundles,
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
    BundlePath,
    Data,
    Launch,
    Out,
    Output,
    Registry,
    StorePath,
    Tracking,
)
from arrowhead.cli.screen import Screen
from arrowhead.cli.stage_options import (
    Body,
    Extract,
    Finder,
    FinderHead,
    Golden,
    Head,
    HeadOfFinder,
    NamedExtract,
    NamedFinder,
    Pixels,
    Report,
    RunFlags,
    Source,
    Sweep,
)
from arrowhead.data import remote_folder, sources
from arrowhead.data.catalog import Catalog
from arrowhead.data.source_config import SourceConfig
from arrowhead.decode.pixels import PixelConfig
from arrowhead.errors import ConfigError
from arrowhead.examine.config import ReportConfig
from arrowhead.features import backbone
from arrowhead.features.backbone import BodyConfig
from arrowhead.features.extract import ExtractConfig
from arrowhead.features.feature_config import FeatureConfig, complete_from_store
from arrowhead.features.golden_images import GoldenConfig
from arrowhead.features.store import Store
from arrowhead.runtime.ray_cluster import LaunchConfig
from arrowhead.tracking.client import TrackingConfig
from arrowhead.tracking.registry import RegistryConfig
from arrowhead.training.config import TrainConfig
from arrowhead.training.grid import SweepConfig
from arrowhead.training.lr_finder import FinderConfig
from arrowhead.training.study import Study
from arrowhead.wording import pluralize

# Flags that have no effect with --unlabelled.
# What a bundle decides: these flags have no effect with --from.
BODY_FLAGS = {"body", "weights", "mean", "std", "pool", "body_precision", "accept_license"}
PIXEL_FLAGS = {"size", "resize", "interpolation", "crop_pct"}
LABEL_FLAGS = {"valid_share", "label_column", "split_column", "multi_label", "label_separator"}


def fit(
    data: Data,
    out: Annotated[
        Path, Parameter(help="Folder or URI for the results, OUT/store and OUT/bundle.")
    ],
    *,
    source: Source = SourceConfig(),
    body: Body = BodyConfig(),
    pixels: Pixels = PixelConfig(),
    extract: NamedExtract = ExtractConfig(),
    head: Head = TrainConfig(),
    golden: Golden = GoldenConfig(),
    finder: NamedFinder = FinderConfig(),
    sweep: Sweep = SweepConfig(),
    finetune: Annotated[
        bool,
        Parameter(
            help="Then train body and head together, as `finetune` does by default; the better of"
            " the two becomes OUT/bundle.",
            group="Training",
        ),
    ] = False,
    launch: Launch = LaunchConfig(),
    tracking: Tracking = TrackingConfig(),
    registry: Registry = RegistryConfig(),
    report: Report = ReportConfig(),
    output: Out = Output(),
) -> int:
    """Train a classifier on a folder of images. This is the main command.

    It lists the images, extracts their features, chooses a learning rate, trains a head, evaluates
    it, saves a bundle, writes a report to look at, and records all of this in MLflow. Run it again
    with other training flags: no image is decoded a second time.

    Example: arrowhead fit photos/ out/ --body resnet34
    """
    from arrowhead.commands import train as commands_train

    out = tuned_output.check_out(out) if finetune else remote_folder.check_output(out, "results")
    remote_folder.check_output(out / "store", "store")
    resolve.check_output(out / "bundle")
    request = FeatureConfig(source=source, body=body, pixels=pixels, extract=extract, golden=golden)
    study = Study(head=head, finder=finder, sweep=sweep)
    run_file = commands_train.run_file(out / "bundle", data, request, study)
    screen = Screen(to_stderr=output.json)
    images, catalog = _prepare(data, out / "store", request, screen, given_flags())
    sources.check_can_validate(data, catalog)
    if finetune:
        run = RunFlags(launch=launch, tracking=tracking, registry=registry)
        done = _tuned_request(out, catalog, request, study)
        return tuned_output.fine_tune("fit", done, images, run_file, run, report, output)
    with run_context("fit", launch, tracking, output, run_file, registry) as context:
        result = commands_train.fit(catalog, out, images, study, context)
        page = _add_report(result, out / "store", out / "bundle", report, context)
        written = [out / "store", *bundles(out / "bundle"), *page]
        result["files"] = show_written(context.screen, written)
        score_command = [program(), "score", result["bundle"], "IMAGES", "SCORES"]
        commands = [*map(open_command, page), score_command, ui_command(tracking)]
        show_next_commands(context.screen, commands)
    return finish(result, output, faults_flag="--extract.max-faults")


def _tuned_request(
    out: Path, catalog: Catalog, request: FeatureConfig, study: Study
) -> tuned_output.Done:
    """The request of `fit --finetune`: the head is trained on OUT/store, as without the flag."""
    from arrowhead.commands.finetune import FinetuneSettings

    settings = FinetuneSettings(study=study, store=out / "store")
    return tuned_output.Done(out, catalog, None, request, settings)


def precompute(
    data: Data,
    store: Annotated[
        Path,
        Parameter(
            help="Folder or URI for the feature store. If it exists, only new and changed images"
            " are decoded."
        ),
    ],
    *,
    source: Source = SourceConfig(),
    body: Body = BodyConfig(),
    pixels: Pixels = PixelConfig(),
    extract: Extract = ExtractConfig(),
    golden: Golden = GoldenConfig(),
    base: Annotated[
        str | None,
        Parameter(
            name="--from",
            help="Compute the features with the body of this bundle, such as a fine-tuned one, and"
            " show it the images as the bundle does. A folder, a URI, or a model in MLflow.",
            group="Body",
        ),
    ] = None,
    unlabelled: Annotated[
        bool,
        Parameter(
            help="Store all images below DATA, or all paths of a table or list, without labels: to"
            " search in them, or to choose with `suggest` which to label.",
            group="Labels",
        ),
    ] = False,
    launch: Launch = LaunchConfig(),
    tracking: Tracking = TrackingConfig(),
    output: Out = Output(),
) -> int:
    """Decode every image once and store its features.

    A stopped run continues where it was; a second run decodes only new and changed images.

    Example: arrowhead precompute photos/ store/ --workers 2
    """
    from arrowhead.commands import precompute as commands_precompute

    store = remote_folder.check_output(store, "store")
    images = FeatureConfig(source=source, body=body, pixels=pixels, extract=extract, golden=golden)
    screen = Screen(to_stderr=output.json)
    with _body_of_bundle(base, images, tracking) as (images, explicit):
        images, catalog = _prepare(data, store, images, screen, explicit, unlabelled=unlabelled)
        with run_context("precompute", launch, tracking, output) as context:
            result = commands_precompute.precompute(catalog, store, images, context)
            result["files"] = show_written(context.screen, [store])
            show_next_commands(context.screen, _commands_for(store, unlabelled=unlabelled))
    return finish(result, output)


def _commands_for(store: Path, *, unlabelled: bool) -> list[list[Any]]:
    """The commands to try next with a new store."""
    if unlabelled:
        return [
            [program(), "suggest", store],
            [program(), "suggest", store, "BUNDLE"],
            [program(), "search", store, "IMAGE"],
        ]
    return [[program(), "lr-find", store], [program(), "train", store, "BUNDLE"]]


@contextmanager
def _body_of_bundle(
    base: str | None, images: FeatureConfig, tracking: TrackingConfig
) -> Iterator[tuple[FeatureConfig, frozenset[str]]]:
    """The settings with body and pixels of the bundle `base`, if there is one, and the names of the
    settings that an existing store must share. The file of the weights exists only inside the
    block.
    """
    from arrowhead.bundle import body_file
    from arrowhead.bundle import format as bundle_format

    if base is None:
        yield images, given_flags()
        return
    refuse_flags_of_bundle()
    with (
        local_bundle(base, tracking) as folder,
        tempfile.TemporaryDirectory(prefix="arrowhead-body-") as scratch,
    ):
        bundle = bundle_format.load(folder)
        body = body_file.write_body(bundle, Path(scratch) / "body.safetensors")
        pixels = body_file.pixels_of(bundle, images.pixels)
        yield replace(images, body=body, pixels=pixels), given_flags() | BODY_FLAGS | PIXEL_FLAGS


def refuse_flags_of_bundle() -> None:
    """Raise ConfigError for a flag that the bundle of --from decides."""
    if unused := given_flags() & (BODY_FLAGS | PIXEL_FLAGS):
        flag = "--" + min(unused).replace("_", "-")
        raise ConfigError(
            f"{flag} has no effect with --from: the bundle decides on body and pixels.",
            "one of the two.",
            f"leave {flag} out, or --from.",
        )


def _prepare(
    data: str,
    store: Path,
    request: FeatureConfig,
    screen: Screen,
    explicit: frozenset[str],
    *,
    unlabelled: bool = False,
) -> tuple[FeatureConfig, Catalog]:
    """Check the request, list the images, and take over the settings of an existing store.

    explicit: names of the settings that were given.

    Returns:
        The settings, with the store's own where no flag was given, and the images.
    """
    images = complete_from_store(store, request, explicit)
    backbone.check_config(images.body)
    if unlabelled:
        _check_unlabelled(store)
        catalog = sources.unlabelled_catalog(data, images.source, distinct=True)
    else:
        catalog = sources.labelled_catalog(data, images.source)
    if images != request and (store / "store.json").is_file():
        body, pixels = images.body, images.pixels
        weights = f" with {body.weights}" if body.weights != request.body.weights else ""
        screen.print(
            f"as in {store}: body {body.body}{weights} · pool {body.pool} · {pixels.size} pixels,"
            f" {pixels.resize}, {pixels.interpolation} · {pluralize(pixels.views, 'view')}"
        )
    _report_unused_flags(images, catalog, store, screen)
    return images, catalog


def _check_unlabelled(store: Path) -> None:
    """Raise ConfigError if --unlabelled contradicts other flags, or would drop a store's labels."""
    if unused := given_flags() & LABEL_FLAGS:
        flag = "--" + min(unused).replace("_", "-")
        raise ConfigError(
            f"{flag} says how labels are read, and --unlabelled that there are none.",
            "one of the two.",
            f"leave {flag} out.",
        )
    if (store / "manifest.json").is_file() and (classes := Store(store).manifest()["classes"]):
        raise ConfigError(
            f"{store} has labels ({', '.join(classes[:5])}), which --unlabelled would drop.",
            "a new folder, or a store without labels.",
            "write the unlabelled images to a store of their own.",
        )


def _report_unused_flags(
    images: FeatureConfig, catalog: Catalog, store: Path, screen: Screen
) -> None:
    """Refuse or mention flags that have no effect here."""
    if images.pixels.views == 1 and (unused := given_flags() & {"augment", "augment_seed"}):
        flag = "--" + min(unused).replace("_", "-")
        raise ConfigError(
            f"{flag} has no effect with one view per image, which is not augmented.",
            "more than one view.",
            f"add e.g. --views 4, or leave out {flag}.",
        )
    if given_flags() & {"chunk_size", "extract.chunk_size"} and (store / "store.json").is_file():
        chunk_size = Store(store).chunk_size
        if chunk_size != images.extract.chunk_size:
            screen.print(f"--chunk-size is not used: {store} was started with {chunk_size}")
    if "valid_share" in given_flags() and "" not in catalog.splits:
        screen.print("--valid-share is not used: the images already have a validation split")


def lr_find(
    store: StorePath,
    *,
    head: HeadOfFinder = FinderHead(),
    finder: Finder = FinderConfig(),
    launch: Launch = LaunchConfig(),
    tracking: Tracking = TrackingConfig(),
    output: Out = Output(),
) -> int:
    """Suggest a learning rate: train on stored features while the rate rises.

    Writes lr_finder.png and lr_finder.csv to the store's folder and to MLflow.

    Example: arrowhead lr-find out/store --head lesson
    """
    from arrowhead.commands import train as commands_train
    from arrowhead.reporting import extraction

    Store(store := remote_folder.local(store))
    remote_folder.check_output(store, "store")
    with run_context("lr-find", launch, tracking, output) as context:
        extraction.show_store(store, context.screen)
        curve = commands_train.find_learning_rate(store, head, finder, context)
        result = curve.plain() | {"rate": curve.rate, "figure": str(store / "lr_finder.png")}
        files = [store / "lr_finder.png", store / "lr_finder.csv"]
        result["files"] = show_written(context.screen, files)
        run_id = context.run.run_id if context.run else None
        # The rate suits exactly this head and training length.
        flags = flags_of(replace(head, rate=float(f"{curve.rate:.2g}")))
        show_next_commands(context.screen, [[program(), "train", store, "BUNDLE", *flags]])
    return finish(result | {"store": str(store), "run_id": run_id}, output)


def flags_of(head: TrainConfig) -> list[str]:
    """The flags for this training, without those at their default."""
    default = asdict(TrainConfig())
    changed = {name: value for name, value in asdict(head).items() if value != default[name]}
    return [
        word for name in changed for word in (f"--{name.replace('_', '-')}", str(changed[name]))
    ]


def train(
    store: StorePath,
    bundle: BundlePath,
    *,
    head: Head = TrainConfig(),
    golden: Golden = GoldenConfig(),
    finder: NamedFinder = FinderConfig(),
    sweep: Sweep = SweepConfig(),
    launch: Launch = LaunchConfig(),
    tracking: Tracking = TrackingConfig(),
    registry: Registry = RegistryConfig(),
    report: Report = ReportConfig(),
    output: Out = Output(),
) -> int:
    """Train a head on stored features, and save body and head as a bundle.

    Example: arrowhead train out/store out/bundle --head lesson --epochs 5 --rate 0.01
    """
    from arrowhead.commands import train as commands_train
    from arrowhead.reporting import evaluation, extraction

    Store(store := remote_folder.local(store))
    bundle = resolve.check_output(bundle)
    study = Study(head=head, finder=finder, sweep=sweep)
    run_file = commands_train.run_file(bundle, store.absolute(), study)
    with run_context("train", launch, tracking, output, run_file, registry) as context:
        extraction.show_store(store, context.screen)
        evaluation.show_bundle_to_delete(bundle, context)
        result = commands_train.train_bundle(store, bundle, study, context, golden)
        page = _add_report(result, store, bundle, report, context)
        result["files"] = show_written(context.screen, [*bundles(bundle), *page])
        score_command = [program(), "score", bundle, "IMAGES", "SCORES"]
        show_next_commands(context.screen, [*map(open_command, page), score_command])
    return finish(result, output)


def _add_report(
    result: dict[str, Any], store: Path, bundle: Path, report: ReportConfig, context: Any
) -> list[Path]:
    """Write the report of a new bundle if it is wanted; the page, or nothing."""
    from arrowhead.commands import examine as commands_examine

    result["report"] = None
    if report.report:
        result["report"] = commands_examine.report_of_training(store, bundle, context)
    return [Path(result["report"])] if result["report"] else []
