"""The command line: flags in, exit code out.

Every flag is a field of the dataclass that uses it; `--config FILE.toml` sets the same fields in
a table named after the verb. Exit codes: 0 done, 1 a bug of ours (with its traceback), 2 bad
request, 3 too many faults, 4 bad data, 130 interrupted (run the same command to go on).
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import localtime, sleep, strftime
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Group, Parameter
from cyclopts.config import Toml

from arrowhead import ConfigError, DataError, LostError, Refusal, __version__
from arrowhead.cluster import LaunchConfig
from arrowhead.decode import PixelConfig
from arrowhead.export import ExportConfig
from arrowhead.extract import ExtractConfig
from arrowhead.jobs import ClusterConfig
from arrowhead.lr_finder import FinderConfig
from arrowhead.model import FILES as WEIGHT_FILES
from arrowhead.model import BodyConfig
from arrowhead.plan import SourceConfig
from arrowhead.score import ScoreConfig
from arrowhead.screen import Screen
from arrowhead.study import Study
from arrowhead.sweep import SweepConfig
from arrowhead.tracking import RegistryConfig, TrackingConfig
from arrowhead.train import TrainConfig

app = App(
    name="arrowhead",
    version=__version__,
    default_parameter=Parameter(negative=""),
    suppress_keyboard_interrupt=False,  # ours says how to go on
    help="A folder of images becomes a trained, examined, deployable classifier.\n\n"
    "Each image is decoded once; every experiment after that takes seconds."
    " Start with `arrowhead demo`, or `arrowhead fit DATA OUT` on your own folder.",
)
app.meta.suppress_keyboard_interrupt = False
app.meta.group_parameters = Group("Everywhere", sort_key=9)


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """How the result is given."""

    json: Annotated[bool, Parameter(negative="")] = False
    """Print the result as one JSON object, last on standard output; all else goes to stderr."""


Data = Annotated[
    str,
    Parameter(
        help="Images: a folder or URI (s3://…, gs://…) of train/CLASS/… and valid/CLASS/…, or of"
        " CLASS/…; or a table, FILE.csv or FILE.tsv, with columns path, labels and, if you like,"
        " split."
    ),
]
StorePath = Annotated[
    Path, Parameter(help="Feature store: a folder that `precompute` made, or will make.")
]
BundlePath = Annotated[
    Path, Parameter(help="Bundle: a folder that `fit` or `train` wrote, or will write.")
]
BundleAddress = Annotated[
    str,
    Parameter(
        help="Bundle: a folder that `fit` or `train` wrote; a URI of one (s3://…, gs://…); or a"
        " model in MLflow (models:/NAME@ALIAS, models:/NAME/3, runs:/RUN/model)."
    ),
]


def _flags(group: str, key: int) -> Any:
    return Parameter(name="*", group=Group(group, sort_key=key))


Source = Annotated[SourceConfig, _flags("Labels", 2)]
Body = Annotated[BodyConfig, _flags("Body", 3)]
Pixels = Annotated[PixelConfig, _flags("Pixels", 4)]
Extract = Annotated[ExtractConfig, _flags("Extraction", 5)]
NamedExtract = Annotated[
    ExtractConfig, Parameter(name="extract", group=Group("Extraction", sort_key=5))
]
Head = Annotated[TrainConfig, _flags("Training", 6)]
Finder = Annotated[FinderConfig, _flags("LR finder", 7)]
NamedFinder = Annotated[
    FinderConfig, Parameter(name="lr-find", group=Group("LR finder", sort_key=7))
]
Sweep = Annotated[SweepConfig, _flags("Many heads in one pass", 7)]
Scores = Annotated[ScoreConfig, _flags("Scores", 6)]
Export = Annotated[ExportConfig, _flags("Export", 6)]
Launch = Annotated[LaunchConfig, _flags("Workers", 8)]
Tracking = Annotated[TrackingConfig, _flags("Tracking", 9)]
Registry = Annotated[RegistryConfig, _flags("Tracking", 9)]
ToCluster = Annotated[ClusterConfig, _flags("Cluster", 8)]
Out = Annotated[Output, _flags("Output", 10)]


# ------------------------------------------------------------------------------- verbs


@app.command(sort_key=1)
def fit(
    data: Data,
    out: Annotated[Path, Parameter(help="Folder for the results: OUT/store and OUT/bundle.")],
    *,
    source: Source = SourceConfig(),
    body: Body = BodyConfig(),
    pixels: Pixels = PixelConfig(),
    extract: NamedExtract = ExtractConfig(),
    head: Head = TrainConfig(),
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

    Example: arrowhead fit photos/ out/ --body resnet34 --epochs 10
    """
    from arrowhead import pipeline

    images = pipeline.FeatureConfig(source=source, body=body, pixels=pixels, extract=extract)
    asked = Study(head=head, finder=finder, sweep=many)
    place = pipeline.unfinished(out / "bundle", data, images, asked)
    with _means("fit", launch, tracking, output, place, registry) as means:
        result = pipeline.fit(data, out, images, asked, means)
        _next(means.screen, [f"{_me()} score {result['bundle']} IMAGES SCORES", _ui(tracking)])
    return _end(result, output)


@app.command(sort_key=2)
def precompute(
    data: Data,
    store: StorePath,
    *,
    source: Source = SourceConfig(),
    body: Body = BodyConfig(),
    pixels: Pixels = PixelConfig(),
    extract: Extract = ExtractConfig(),
    launch: Launch = LaunchConfig(),
    tracking: Tracking = TrackingConfig(),
    output: Out = Output(),
) -> int:
    """Decode every image once and store what the body sees in it.

    A stopped run goes on where it was; a second run decodes only what is new or changed.

    Example: arrowhead precompute photos/ store/ --workers 2
    """
    from arrowhead import pipeline

    images = pipeline.FeatureConfig(source=source, body=body, pixels=pixels, extract=extract)
    with _means("precompute", launch, tracking, output) as means:
        result = pipeline.precompute(data, store, images, means)
        _next(means.screen, [f"{_me()} lr-find {store}", f"{_me()} train {store} BUNDLE"])
    return _end(result, output)


@app.command(sort_key=3)
def lr_find(
    store: StorePath,
    *,
    head: Head = TrainConfig(),
    finder: Finder = FinderConfig(),
    launch: Launch = LaunchConfig(),
    tracking: Tracking = TrackingConfig(),
    output: Out = Output(),
) -> int:
    """Try a rising learning rate on stored features and suggest one.

    Writes lr_finder.png and lr_finder.csv into the store's folder and to MLflow.

    Example: arrowhead lr-find out/store --head lesson
    """
    from arrowhead import account, pipeline

    with _means("lr-find", launch, tracking, output) as means:
        account.say_account(store, means.screen)
        curve = pipeline.find_rate(store, head, finder, means)
        result = curve.plain() | {"rate": curve.rate, "figure": str(store / "lr_finder.png")}
        run_id = means.run.run_id if means.run else None
        _next(means.screen, [f"{_me()} train {store} BUNDLE --rate {curve.rate:.2g}"])
    return _end(result | {"store": str(store), "run_id": run_id}, output)


@app.command(sort_key=4)
def train(
    store: StorePath,
    bundle: BundlePath,
    *,
    head: Head = TrainConfig(),
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
    from arrowhead import account, pipeline

    asked = Study(head=head, finder=finder, sweep=many)
    place = pipeline.unfinished(bundle, store.absolute(), asked)
    with _means("train", launch, tracking, output, place, registry) as means:
        account.say_account(store, means.screen)
        result = pipeline.fit_head(store, bundle, asked, means)
        _next(means.screen, [f"{_me()} score {bundle} IMAGES SCORES"])
    return _end(result, output)


@app.command(sort_key=5)
def score(
    bundle: BundleAddress,
    images: Annotated[
        str,
        Parameter(
            help="Images: a folder or URI, with or without folders inside; a table (.csv, .tsv:"
            " column path); or a list (.txt: a path per line)."
        ),
    ],
    out: Annotated[Path, Parameter(help="Folder for the Parquet parts and score.json.")],
    *,
    scores: Scores = ScoreConfig(),
    extract: Extract = ExtractConfig(),
    launch: Launch = LaunchConfig(),
    tracking: Tracking = TrackingConfig(),
    output: Out = Output(),
) -> int:
    """Label every image of a folder or list: one row per file, faults included, in its order.

    A stopped run goes on where it was. The images are made ready exactly as in training; a few
    golden images in the bundle are replayed first to prove it.

    Example: arrowhead score out/bundle new-photos/ scores/ --flag-novel --csv
    """
    from arrowhead import pipeline

    with _means("score", launch, tracking, output) as means:
        result = pipeline.score(bundle, images, out, scores, extract, means, tracking)
        found = " · ".join(f"{name} {count}" for name, count in result["labels"].items())
        means.screen.say(f"labels: {found}")
        first = out / "part-000000.parquet"
        _next(
            means.screen,
            [f"{_sibling('python')} -c \"import pandas; print(pandas.read_parquet('{first}'))\""],
        )
    return _end(result, output)


@app.command(sort_key=6)
def export(
    bundle: BundleAddress,
    out: Annotated[
        Path,
        Parameter(help="File that ends in .onnx or .pt2; or a folder for model.onnx, model.pt2."),
    ],
    *,
    what: Export = ExportConfig(),
    tracking: Tracking = TrackingConfig(),
    output: Out = Output(),
) -> int:
    """Write a bundle as one file for programs without Arrowhead: uint8 pixels in, calibrated
    probabilities out, for any number of images.

    How pixels are made and what the probabilities mean is in the file's metadata. The file is run
    on the golden images; one that gives other numbers than the bundle is not kept.

    Example: arrowhead export out/bundle model.onnx
    """
    from arrowhead import export as exporting

    with _fetched(bundle, tracking) as folder:
        result = exporting.export(folder, out, what) | {"bundle": bundle}
    if not output.json:
        Screen(to_stderr=False).say(
            f"{result['file']}: {result['bytes'] / 1e6:.1f} MB · {result['images']} golden images"
            f" in batches of {' and '.join(map(str, result['batch_sizes']))}: largest difference"
            f" {result['largest_difference']:.2g} (allowed {result['tolerance']:g})"
        )
    return _end(result, output)


@app.command(sort_key=0)
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
    from arrowhead import account, pipeline
    from arrowhead import demo as drawing

    with _means("demo", launch, tracking, output) as means:
        if not (out / "images").is_dir():
            count = drawing.draw(out / "images")
            means.screen.say(
                f"{count} images of {', '.join(drawing.CLASSES)} drawn in {out}/images"
            )
        images = pipeline.FeatureConfig(body=_demo_body(means.screen))
        asked = Study(head=head)
        result = pipeline.fit(out / "images", out / "fit", images, asked, means)
        bundle, new, scores = out / "fit" / "bundle", out / "images" / "new", out / "scores"
        shutil.rmtree(scores, ignore_errors=True)  # of an earlier demo, with another bundle
        with account.child(means, "score") as part:
            scored = pipeline.score(bundle, new, scores, ScoreConfig(), ExtractConfig(), part)
        found = " · ".join(f"{name} {count}" for name, count in scored["labels"].items())
        means.screen.say(f"labels of the images in {out}/images/new: {found}")
        _next(
            means.screen,
            [
                f"{_me()} train {out}/fit/store {out}/lesson --head lesson --epochs 5",
                f"{_me()} score {out}/lesson {out}/images/valid {out}/valid-scores --probabilities",
                _ui(tracking),
            ],
        )
    return _end(result | {"scores": str(out / "scores"), "labels": scored["labels"]}, output)


def _demo_body(screen: Screen) -> BodyConfig:
    """A trained body where one can be had, else, said aloud, a random one."""
    from arrowhead import model

    try:
        model.load(BodyConfig())
    except ConfigError:
        screen.say(
            "No ImageNet weights in torch's cache and none could be downloaded: the body is RANDOM."
            " It still sees textures; expect far less than with trained weights."
        )
        return BodyConfig(weights="random")
    return BodyConfig()


@app.command(sort_key=7)
def watch(
    run: Annotated[
        str | None,
        Parameter(help="The run's id or its first letters, or its name; without, the newest run."),
    ] = None,
    *,
    follow: Annotated[
        bool, Parameter(negative="--no-follow", help="Go on until the run ends; else show it once.")
    ] = True,
    every: Annotated[float, Parameter(help="Seconds between two looks.")] = 2.0,
    tracking: Tracking = TrackingConfig(),
    output: Out = Output(),
) -> int:
    """Watch a run from another terminal, or another machine: how far each stage is and what binds
    it, epochs, the machine's load. It looks into MLflow, where the run records itself.

    Exit code 0 when the run has finished, 130 when it was interrupted, 1 when it failed. Ctrl-C
    ends the watching, never the run.

    Example: arrowhead watch --tracking-uri http://127.0.0.1:5000
    """
    from arrowhead import watch as watching

    if not every > 0:
        raise ConfigError(f"--every is {every}.", "more than 0 seconds.", "give e.g. 2.")
    screen = Screen(to_stderr=output.json)
    with watching.Watch(tracking, run) as seen, screen.live() as show:
        view = seen.look()
        show(watching.lines(view))
        while follow and view.running:
            sleep(every)
            view = seen.look()
            show(watching.lines(view))
    _end(view.plain(), output)
    return 0 if not follow else view.code


@app.command(sort_key=7)
def doctor(*, output: Out = Output()) -> int:
    """Look this machine over: what is installed, what it can do, what to mend. Exit code 0 when
    nothing that Arrowhead needs is missing.
    """
    from arrowhead import doctor as examination

    checks = examination.checks()
    if output.json:
        print(json.dumps({"checks": [check.plain() for check in checks]}))
    else:
        for check in checks:
            Screen(to_stderr=False).say(check.line())
    return 1 if any(check.state == "missing" for check in checks) else 0


# ---------------------------------------------------------------------------- features

features = App(
    name="features",
    help="Look into a feature store, check it, clean it.",
    sort_key=8,
    default_parameter=Parameter(negative=""),
    suppress_keyboard_interrupt=False,
)
app.command(features)
Finished = Annotated[Path, Parameter(help="Feature store: a folder that `precompute` made.")]


@features.command
def info(store: Finished, *, output: Out = Output()) -> int:
    """What is in a store: images by class and split, faults by kind, recipe, size.

    Example: arrowhead features info out/store
    """
    from arrowhead import inventory

    held = inventory.info(store)
    if output.json:
        print(json.dumps(held))
        return 0
    screen = Screen(to_stderr=False)
    faults = sum(held["faults"].values())
    screen.say(
        f"{store}: {held['images']} images = {held['features']} features + {faults} faults ·"
        f" {held['distinct']} different contents · {held['shards']} shards ·"
        f" {held['bytes'] / 1e6:.1f} MB"
    )
    recipe = " · ".join(f"{name} {value}" for name, value in held["recipe"].items())
    screen.say(f"recipe {held['fingerprint']}: {recipe}")
    splits = sorted({split for counts in held["by_class"].values() for split in counts})
    wide = max([5, *map(len, held["by_class"])])
    screen.say(f"{'class':<{wide}}" + "".join(f"{split:>9}" for split in splits))
    for name, counts in held["by_class"].items():
        screen.say(f"{name:<{wide}}" + "".join(f"{counts.get(split, 0):>9}" for split in splits))
    for kind, count in held["faults"].items():
        screen.say(f"fault: {kind} {count}")
    return 0


@features.command
def verify(store: Finished, *, output: Out = Output()) -> int:
    """Check a store from end to end: hashes, schema, row counts, duplicates, classes.

    Exit code 4 when something in it cannot be trusted. Nothing is repaired.

    Example: arrowhead features verify out/store
    """
    from arrowhead import inventory

    found = inventory.verify(store)
    _show_findings(found, output)
    damaged = any(one.damage for one in found)
    if not output.json:
        Screen(to_stderr=False).say(f"{store} {'is DAMAGED' if damaged else 'is whole'}")
    return 4 if damaged else 0


@features.command
def gc(
    store: Finished,
    *,
    yes: Annotated[bool, Parameter(help="Remove them; without it they are only listed.")] = False,
    output: Out = Output(),
) -> int:
    """List what nothing refers to any more: drafts, shards and catalogs of earlier runs.

    Shards left from an earlier catalog are still looked up by content: keep them if those images
    may come back.

    Example: arrowhead features gc out/store --yes
    """
    from arrowhead import inventory

    found = inventory.gc(store, remove=yes)
    _show_findings(found, output)
    if not output.json:
        hint = "" if yes or not found else "; --yes removes them"
        done = "removed" if yes else "found"
        Screen(to_stderr=False).say(f"{len(found)} files {done}{hint}")
    return 0


def _show_findings(found: list[Any], output: Output) -> None:
    if output.json:
        print(json.dumps({"findings": [{**asdict(one), "damage": one.damage} for one in found]}))
        return
    for one in found:
        Screen(to_stderr=False).say(f"{one.kind}: {one.path}: {one.words}")


# ------------------------------------------------------------------------------ bundle

bundles = App(
    name="bundle",
    help="Look into a bundle, check it, register it.",
    sort_key=8,
    default_parameter=Parameter(negative=""),
    suppress_keyboard_interrupt=False,
)
app.command(bundles)


@bundles.command(name="info")
def bundle_info(
    bundle: BundleAddress, *, tracking: Tracking = TrackingConfig(), output: Out = Output()
) -> int:
    """What a bundle is: classes, recipe, head, figures, where it comes from.

    Example: arrowhead bundle info out/bundle
    """
    from arrowhead.bundle import info

    with _fetched(bundle, tracking) as folder:
        held = info(folder) | {"bundle": bundle}
    if output.json:
        print(json.dumps(_plain(held)))
        return 0
    screen = Screen(to_stderr=False)
    screen.say(
        f"{bundle}: {held['task']}, {len(held['classes'])} classes ·"
        f" {held['bytes'] / 1e6:.1f} MB · fingerprint {held['fingerprint']}"
    )
    screen.say(f"classes: {', '.join(held['classes'][:20])}{' …' * (len(held['classes']) > 20)}")
    recipe = " · ".join(f"{name} {value}" for name, value in held["recipe"].items())
    screen.say(f"recipe {held['recipe_fingerprint']}: {recipe}")
    screen.say(f"head: {held['head']} · temperature {held['temperature']:.3f}")
    figures = {k: v for k, v in held["metrics"].items() if isinstance(v, int | float)}
    screen.say("figures: " + " · ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    if known := held["novelty"]:
        cut = known["threshold_at_5_percent_false_alarms"]
        screen.say(
            f"novelty: {known['training_images']} training images kept; threshold at 5 % false"
            f" alarms {'unknown (too few validation images)' if cut is None else f'{cut:.3f}'}"
        )
    lineage = held["lineage"]
    screen.say(
        f"made by arrowhead {lineage.get('arrowhead')}, MLflow run {lineage.get('run_id')},"
        f" data {lineage.get('data')}"
    )
    screen.say(f"{held['golden_images']} golden images")
    return 0


@bundles.command(name="verify")
def bundle_verify(
    bundle: BundleAddress,
    *,
    max_drift: Annotated[
        float, Parameter(help="Largest cosine distance of a golden image's feature.")
    ] = ScoreConfig().max_drift,
    tracking: Tracking = TrackingConfig(),
    output: Out = Output(),
) -> int:
    """Check a bundle: seal, hashes, shapes; then replay its golden images on this machine.

    Exit code 4 when something in it cannot be trusted, or when this machine sees the images
    differently.

    Example: arrowhead bundle verify out/bundle
    """
    from arrowhead.bundle import must_agree, verify

    with _fetched(bundle, tracking) as folder:
        drift = verify(folder)
    if output.json:
        print(json.dumps({"bundle": bundle, "drift": asdict(drift)}))
    else:
        Screen(to_stderr=False).say(
            f"{bundle} is whole; {drift.images} golden images replayed: largest feature drift"
            f" {drift.feature:.1g}, {drift.changed} labels changed"
        )
    must_agree(drift, max_drift)
    return 0


@contextmanager
def _fetched(bundle: str, tracking: TrackingConfig) -> Iterator[Path]:
    """The bundle's folder; one that had to be fetched is there only inside."""
    from arrowhead.bundle import local

    with tempfile.TemporaryDirectory(prefix="arrowhead-bundle-") as scratch:
        yield local(bundle, tracking, Path(scratch))


@bundles.command
def register(
    bundle: Annotated[Path, Parameter(help="Bundle: a folder that `fit` or `train` wrote.")],
    name: Annotated[str, Parameter(help="Name of the registered model.")],
    *,
    alias: Annotated[str, Parameter(help="Alias that is moved to the new version.")] = "champion",
    tracking: Tracking = TrackingConfig(),
    output: Out = Output(),
) -> int:
    """Make a bundle a version of a registered model in MLflow, as --register of `fit` does. Done
    before, it only moves the alias.

    Example: arrowhead bundle register out/bundle dogs --alias challenger
    """
    from arrowhead.bundle import load
    from arrowhead.tracking import register as enter

    load(bundle)  # whole, or refused
    screen = Screen(to_stderr=output.json)
    asked = RegistryConfig(register=name, alias=alias)
    address = enter(bundle, tracking, asked, say=screen.say)
    return _end({"registered": address, "bundle": str(bundle)}, output)


# --------------------------------------------------------------------------- a cluster

# Verbs that belong to the machine of whoever types them.
ELSEWHERE = ("submit", "jobs", "watch", "demo")
MANY = ("fit", "precompute", "score")  # what takes workers and decodes images


@app.command(sort_key=9)
def submit(
    *words: Annotated[
        str, Parameter(name="verb", help="After --: a verb, its arguments and its flags.")
    ],
    cluster: ToCluster = ClusterConfig(),
    shared: Annotated[
        list[Path] | None,
        Parameter(
            help="Folder that every node has under the same path. Needed for paths, unless all"
            " nodes are this machine. May be given several times.",
            group=Group("Cluster", sort_key=8),
        ),
    ] = None,
    follow: Annotated[
        bool,
        Parameter(negative="--no-follow", help="Show the job's log and end with its exit code."),
    ] = True,
    output: Out = Output(),
) -> int:
    """Run a verb on a Ray cluster: checked here, run there, its log and exit code brought back.

    Only Arrowhead's source and the verb's --config file are sent, never data. The job stands in
    the folder you stand in; on other machines that takes --shared, and addresses (s3://…) need
    nothing. Without --workers, `fit`, `precompute` and `score` get --workers 1:N, N being the
    cluster's GPUs (CPUs where it has none), `train` and `lr-find` one worker. Ctrl-C leaves the
    job running. The token is taken from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.

    Example: arrowhead submit -- fit photos/ out/ --epochs 10
    """
    from arrowhead import jobs

    if not words:
        raise ConfigError("Nothing to submit.", "a verb after --.", "see arrowhead submit --help.")
    outer = next((Path(one.path) for one in app.config), None)
    call = understood(list(words), outer)
    if call is None:  # --help, and it has been shown
        return 0
    there = jobs.reach(cluster)
    places, variables, need = _needs(call)
    folder = jobs.standing(there, shared or [], places)
    if folder is not None:
        need = None
    screen = Screen(to_stderr=output.json)
    if there.token is None:
        screen.say(f"{there.url} asks for no token: whoever reaches it can run code there.")
    job_id, size = jobs.submit(
        there,
        _with_workers(call, there.units),
        folder=folder,
        config=call.config,
        variables=variables,
        need=need,
    )
    away = "" if cluster.address is None else f" --address {there.url}"
    away += " --insecure" if cluster.insecure else ""
    back = f"{_me()} jobs logs {job_id} --follow{away}"
    began = f"job {job_id} at {there.url}: {size / 1e6:.2f} MB sent"
    sent = {"address": there.url, "uploaded_bytes": size}
    if follow:
        return _followed(there, job_id, screen, output, back, sent, began)
    screen.say(began)
    _next(screen, [back, f"{_me()} jobs stop {job_id}{away}"])
    job = jobs.look(there, job_id)
    _end({"job_id": job_id, "status": job.status, "exit_code": job.exit_code} | sent, output)
    return 0


@dataclass(frozen=True, slots=True)
class Call:
    """A verb's command line, understood: its function and what that is given; the tokens without
    --config, and that file.
    """

    verb: Callable[..., Any]
    given: dict[str, Any]
    tokens: list[str]
    config: Path | None

    @property
    def name(self) -> str:
        """As it is typed."""
        return self.tokens[0]


def understood(words: list[str], config: Path | None = None) -> Call | None:
    """What a command line asks for, without doing it; None if that was help, which is shown.

    config: a TOML file that counts when the words name none. Raises ConfigError for what the verb
    would refuse at its start, and for a verb that has no place on a cluster.
    """
    quiet: dict[str, Any] = {"exit_on_error": False, "print_error": False}
    if words[0] in ELSEWHERE:
        raise ConfigError(
            f"`{words[0]}` is not for a cluster.",
            "a verb that works on data: fit, precompute, lr-find, train, score, export, …",
            f"run `{_me()} {words[0]}` here.",
        )
    before, app.config = app.config, ()  # a file named before is not for these words
    try:
        entry, outer, _ = app.meta.parse_args(words, **quiet)
        if entry is not _entry:
            entry(*outer.args, **outer.kwargs)
            return None
        tokens = list(outer.args)
        _configure(file := outer.kwargs.get("config") or config)
        verb, bound, _ = app.parse_args(tokens, **quiet)
    except CycloptsError as error:
        raise ConfigError(
            str(error).strip().replace("\n", " "),
            "a verb, its arguments and its flags, as --help lists them.",
            f"run {_me()} {_verb(words)}--help.",
        ) from error
    finally:
        app.config = before
    bound.apply_defaults()
    return Call(verb, dict(bound.arguments), tokens, file)


def _needs(call: Call) -> tuple[list[str], dict[str, str], str | None]:
    """Files and folders of this machine that a verb names; variables of ours that its job gets;
    a variable that the head node must have where the job cannot stand in this folder.
    """
    from arrowhead import files

    named: list[Any] = []
    for name, value in call.given.items():
        if name in ("data", "store", "bundle", "images", "out"):
            named.append(value)
        elif isinstance(value, SourceConfig):
            named.append(value.images)
        elif isinstance(value, ScoreConfig):
            named += [value.base, value.store]
        elif isinstance(value, BodyConfig) and Path(value.weights).suffix in WEIGHT_FILES:
            named.append(value.weights)
    variables: dict[str, str] = {}
    need = None
    tracking = call.given.get("tracking")
    if isinstance(tracking, TrackingConfig):
        own = os.environ.get("MLFLOW_TRACKING_URI")
        uri = tracking.tracking_uri or own
        if uri is None:
            need = "MLFLOW_TRACKING_URI"
        elif re.search(r"//[^/@]*:[^/@]*@", uri):
            raise ConfigError(
                "The address of the MLflow store holds a password.",
                "an address without: whoever may list jobs sees it.",
                "set MLFLOW_TRACKING_URI where the cluster is started, and unset it here.",
            )
        elif file := re.fullmatch(r"(?:sqlite:///|file:(?://)?)?(?!\w+:)(.+)", uri):
            named.append(file[1])
        if own and not tracking.tracking_uri:
            variables["MLFLOW_TRACKING_URI"] = own
    places = [os.fspath(one).removeprefix("file://") for one in named if one is not None]
    models = ("models:/", "runs:/")
    return (
        [one for one in places if not files.in_store(one) and not one.startswith(models)],
        variables,
        need,
    )


def _with_workers(call: Call, units: int) -> list[str]:
    """The tokens, with workers for a verb that takes them and was not told how many."""
    launch = call.given.get("launch")
    if not isinstance(launch, LaunchConfig):
        return call.tokens
    if launch.address is not None:
        raise ConfigError(
            f"`{call.name}` is given --address {launch.address}, but it will run inside a cluster.",
            "the address of the cluster's job server, before --.",
            f"{_me()} submit --address URL -- {call.name} … without --address.",
        )
    table = Toml(call.config).config.get(call.name, {}) if call.config else {}
    if "workers" in table or any(re.match(r"--workers(=|$)", token) for token in call.tokens):
        return call.tokens
    workers = f"1:{units}" if call.name in MANY and units > 1 else "1"
    return [call.name, "--workers", workers, *call.tokens[1:]]


def _followed(
    cluster: Any,
    job_id: str,
    screen: Screen,
    output: Output,
    back: str,
    sent: dict[str, Any],
    began: str | None = None,
) -> int:
    """Show a job's log until it ends; its exit code, or 130 when Ctrl-C leaves it running.

    began: a line to begin with. Whoever reads it may press Ctrl-C at once.
    """
    from arrowhead import jobs

    try:
        if began:
            screen.say(began)
        job = jobs.follow(cluster, job_id, screen.say)
        status, code = job.status, job.exit_code or 0
    except KeyboardInterrupt:
        status, code = "RUNNING", 130
        screen.say(f"\nThe job goes on. To come back: {back}")
    if code == 127:
        screen.say("`python` is not on the PATH of the head node, or there is no Arrowhead in it.")
    ended = None if status == "RUNNING" else code
    _end({"job_id": job_id, "status": status, "exit_code": ended} | sent, output)
    return code


jobs_app = App(
    name="jobs",
    help="The jobs of a cluster: list them, read their logs, stop them.",
    sort_key=9,
    default_parameter=Parameter(negative=""),
    suppress_keyboard_interrupt=False,
)
app.command(jobs_app)
JobId = Annotated[str, Parameter(name="id", help="The job's id, as `submit` and `jobs list` say.")]


@jobs_app.command(name="list")
def jobs_list(*, cluster: ToCluster = ClusterConfig(), output: Out = Output()) -> int:
    """The jobs that the cluster knows, oldest first.

    Example: arrowhead jobs list
    """
    from arrowhead import jobs

    there = jobs.reach(cluster)
    found = jobs.listed(there)
    if output.json:
        print(json.dumps({"address": there.url, "jobs": [asdict(job) for job in found]}))
        return 0
    screen = Screen(to_stderr=False)
    for job in found:
        began = strftime("%Y-%m-%d %H:%M", localtime(job.began)) if job.began else "-" * 16
        code = "" if job.exit_code is None else f" {job.exit_code}"
        screen.say(f"{job.job_id}  {began}  {job.status + code:<13}  {job.command}")
    if not found:
        screen.say(f"{there.url} has no jobs.")
    return 0


@jobs_app.command(name="logs")
def jobs_logs(
    job_id: JobId,
    *,
    follow: Annotated[
        bool, Parameter(help="Go on until the job ends, with its exit code.")
    ] = False,
    cluster: ToCluster = ClusterConfig(),
    output: Out = Output(),
) -> int:
    """What a job has written. With --follow Ctrl-C leaves the job running.

    Example: arrowhead jobs logs raysubmit_VLSAnCQLcPmMnJm2 --follow
    """
    from arrowhead import jobs

    there = jobs.reach(cluster)
    screen = Screen(to_stderr=output.json)
    if follow:
        back = shlex.join(["arrowhead", *sys.argv[1:]])
        return _followed(there, job_id, screen, output, back, {"address": there.url})
    for line in jobs.logs(there, job_id):
        screen.say(line)
    if output.json:
        print(json.dumps({"address": there.url} | asdict(jobs.look(there, job_id))))
    return 0


@jobs_app.command(name="stop")
def jobs_stop(
    job_id: JobId, *, cluster: ToCluster = ClusterConfig(), output: Out = Output()
) -> int:
    """End a job. What it had finished is kept; the same command goes on from there.

    Example: arrowhead jobs stop raysubmit_VLSAnCQLcPmMnJm2
    """
    from arrowhead import jobs

    there = jobs.reach(cluster)
    was = jobs.stop(there, job_id)
    if not output.json:
        Screen(to_stderr=False).say(f"job {job_id} {'is told to end' if was else 'had ended'}")
    return _end({"job_id": job_id, "address": there.url, "stopped": was}, output)


# ------------------------------------------------------------------- what verbs are run with


@contextmanager
def _means(
    verb: str,
    launch: LaunchConfig,
    tracking: TrackingConfig,
    output: Output,
    place: Path | None = None,
    registry: RegistryConfig = RegistryConfig(),
) -> Iterator[Any]:
    """What the stages are run with; the MLflow run is open inside. place: a file that stands for
    the run while it is unfinished, in the folder of its checkpoints; both go with the run's end.
    """
    from arrowhead import account
    from arrowhead.tracking import start

    screen = Screen(to_stderr=output.json)
    opened = start(tracking, verb, place, registry=registry, say=screen.say)
    with _alone(place), opened as run:
        yield account.Means(launch=launch, screen=screen, run=run)
    if place:
        shutil.rmtree(place.parent, ignore_errors=True)


@contextmanager
def _alone(place: Path | None) -> Iterator[None]:
    """Nobody else trains to the same bundle; a folder of checkpoints with none in it goes again."""
    if place is None:
        yield
        return
    from arrowhead import fileio

    with fileio.occupied(place.parent):
        yield


def _me() -> str:
    """How the user called us, so that the next command can be pasted."""
    ours = Path(sys.argv[0]).name == "arrowhead"  # not a script in jobs/, not python -m
    return sys.argv[0] if ours and "/" in sys.argv[0] and not _on_path() else "arrowhead"


def _on_path() -> bool:
    found = shutil.which("arrowhead")
    return found is not None and Path(found).resolve() == Path(sys.argv[0]).resolve()


def _sibling(program: str) -> str:
    """Another program of the same environment, called as the user called us."""
    return str(Path(_me()).with_name(program))


def _ui(tracking: TrackingConfig) -> str:
    return f"{_sibling('mlflow')} ui --backend-store-uri {tracking.uri}"


def _next(screen: Any, commands: list[str]) -> None:
    screen.say("next:")
    for command in commands:
        screen.say(f"  {command}")


def _end(result: dict[str, Any], output: Output) -> int:
    """Print the result if it was asked for; the exit code."""
    if output.json:
        print(json.dumps(_plain(result), allow_nan=False))
    if not result.get("too_many_faults"):
        return 0
    counts = result["counts"]
    print(
        f"arrowhead: {counts['faults']} of {counts['inputs']} images could not be read, more than"
        " --max-faults allows. Everything else is written.",
        file=sys.stderr,
    )
    return 3


def _plain(value: Any) -> Any:
    """The same as JSON can hold it: None for what is not a finite number."""
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ------------------------------------------------------------------------------ the door


@app.meta.default
def _entry(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[
        Path | None,
        Parameter(help="TOML file with the same flags, in a table named after the verb."),
    ] = None,
) -> Any:
    _configure(config)
    return app(tokens, exit_on_error=False, print_error=False)


def _configure(config: Path | None) -> None:
    app.config = ()
    if config is not None:
        if not config.is_file():
            raise ConfigError(f"--config {config} is not there.", "a TOML file.", "check the path.")
        try:
            tomllib.loads(config.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"--config {config} cannot be read: {error}.",
                "a TOML file, with a table named after the verb.",
                "write e.g. [train] and below it epochs = 20.",
            ) from error
        app.config = Toml(config, must_exist=True, search_parents=False)


def main(words: list[str] | None = None) -> None:
    """Run the verb in `words` (default: the command line's); say what went wrong; exit."""
    words = sys.argv[1:] if words is None else words
    app.config = ()  # of an earlier call in this process
    try:
        code = app.meta(words, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        wanted = "a verb, its arguments and its flags, as --help lists them."
        code = _refuse(str(error).strip(), wanted, f"run {_me()} {_verb(words)}--help.")
    except LostError as error:
        _refuse(error.found, error.wanted, error.do)
        sys.stdout.flush()
        os._exit(130)  # leaving a Ray that is dead takes a minute
    except Refusal as error:
        code = _refuse(
            error.found, error.wanted, error.do, 4 if isinstance(error, DataError) else 2
        )
    except KeyboardInterrupt:
        print("\narrowhead: interrupted. Run the same command again to go on.", file=sys.stderr)
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


def _verb(words: list[str]) -> str:
    """The verb among `words` and a blank, if there is one."""
    return next((f"{word} " for word in words if word in app and not word.startswith("-")), "")


def _refuse(found: str, wanted: str, do: str, code: int = 2) -> int:
    for line in (f"arrowhead: {found}", f"  wanted  {wanted}", f"  do      {do}"):
        Screen(to_stderr=True).say(line)
    return code
