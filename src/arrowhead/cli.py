"""The command line: flags in, exit code out.

Every flag is a field of the dataclass that uses it; `--config FILE.toml` sets the same fields in
a table named after the verb. Exit codes: 0 done, 1 a bug of ours (with its traceback), 2 bad
request, 3 too many faults, 4 bad data, 130 interrupted (run the same command to go on).
"""

from __future__ import annotations

import os
import shutil
import sys
import traceback
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from time import sleep
from typing import Annotated

from cyclopts import CycloptsError, Parameter

from arrowhead import (
    ConfigError,
    DataError,
    LostError,
    Refusal,
    cli_cluster,
    cli_inspect,
    environment,
    model,
    plan,
    signals,
)
from arrowhead import bundle as bundles
from arrowhead.cli_app import (
    Body,
    BundleAddress,
    BundlePath,
    Data,
    Evaluate,
    Export,
    Extract,
    Finder,
    FinderHead,
    Golden,
    Head,
    HeadOfFinder,
    LabelSource,
    Launch,
    Models,
    NamedExtract,
    NamedFinder,
    Out,
    Output,
    Pixels,
    ReadSource,
    Registry,
    Scores,
    Source,
    StorePath,
    Sweep,
    Tracking,
    TrackingStore,
    Watched,
    WatchedTracking,
    answer_must_be_taken,
    app,
    fetched,
    finish,
    give,
    given,
    me,
    refuse,
    run_context,
    say_next,
    say_written,
    sibling,
    ui_command,
    verb_in,
)
from arrowhead.cluster import LaunchConfig
from arrowhead.decode import PixelConfig
from arrowhead.evaluate import EvaluateConfig
from arrowhead.export import ExportConfig
from arrowhead.extract import ExtractConfig
from arrowhead.features import FeatureConfig, as_in_store
from arrowhead.golden import GoldenConfig
from arrowhead.lr_finder import FinderConfig
from arrowhead.model import BodyConfig
from arrowhead.plan import Catalog
from arrowhead.registry import RegistryConfig
from arrowhead.score import ScoreConfig
from arrowhead.screen import Screen, take_any_text
from arrowhead.shards import Store
from arrowhead.study import Study
from arrowhead.sweep import SweepConfig
from arrowhead.tables import SourceConfig
from arrowhead.targets import check_file, check_folder, expanded
from arrowhead.tracking_address import hidden, without_secret
from arrowhead.tracking_client import TrackingConfig
from arrowhead.train import TrainConfig
from arrowhead.wording import counted

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
    from arrowhead import pipeline

    out = check_folder(out, "results")
    check_folder(out / "store", "store")
    for folder in _bundles(out / "bundle"):
        check_folder(folder, "bundle")
    images = FeatureConfig(source=source, body=body, pixels=pixels, extract=extract, golden=golden)
    asked = Study(head=head, finder=finder, sweep=many)
    place = pipeline.unfinished(out / "bundle", data, images, asked)
    images, catalog = _ready(data, out / "store", images, Screen(to_stderr=output.json))
    plan.must_validate(data, catalog)
    with run_context("fit", launch, tracking, output, place, registry) as means:
        result = pipeline.fit(catalog, out, images, asked, means)
        result["files"] = say_written(means.screen, [out / "store", *_bundles(out / "bundle")])
        score_it = [me(), "score", result["bundle"], "IMAGES", "SCORES"]
        say_next(means.screen, [score_it, ui_command(tracking)])
    return finish(result, output)


@app.command(sort_key=2)
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
    from arrowhead import pipeline

    store = check_folder(store, "store")
    images = FeatureConfig(source=source, body=body, pixels=pixels, extract=extract, golden=golden)
    images, catalog = _ready(data, store, images, Screen(to_stderr=output.json))
    with run_context("precompute", launch, tracking, output) as means:
        result = pipeline.precompute(catalog, store, images, means)
        result["files"] = say_written(means.screen, [store])
        say_next(means.screen, [[me(), "lr-find", store], [me(), "train", store, "BUNDLE"]])
    return finish(result, output)


def _ready(
    data: str, store: Path, asked: FeatureConfig, screen: Screen
) -> tuple[FeatureConfig, Catalog]:
    """What can be refused at once is refused; the settings, with what an existing store remembers,
    and the images.
    """
    images = as_in_store(store, asked, given())
    model.check(images.body)
    catalog = plan.labelled(data, images.source)
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


@app.command(sort_key=3)
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
    from arrowhead import account, pipeline

    Store(store := expanded(store))
    check_folder(store, "store")
    with run_context("lr-find", launch, tracking, output) as means:
        account.say_account(store, means.screen)
        curve = pipeline.find_rate(store, head, finder, means)
        result = curve.plain() | {"rate": curve.rate, "figure": str(store / "lr_finder.png")}
        drawn = [store / "lr_finder.png", store / "lr_finder.csv"]
        result["files"] = say_written(means.screen, drawn)
        run_id = means.run.run_id if means.run else None
        # The rate suits the training that was asked about, and no other head or length.
        asked = flags_of(replace(head, rate=float(f"{curve.rate:.2g}")))
        say_next(means.screen, [[me(), "train", store, "BUNDLE", *asked]])
    return finish(result | {"store": str(store), "run_id": run_id}, output)


def flags_of(head: TrainConfig) -> list[str]:
    """The flags that ask for this training, but those whose default it has."""
    plain = asdict(TrainConfig())
    asked = {name: value for name, value in asdict(head).items() if value != plain[name]}
    return [word for name in asked for word in (f"--{name.replace('_', '-')}", str(asked[name]))]


@app.command(sort_key=4)
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
    from arrowhead import account, pipeline

    Store(store := expanded(store))
    bundle, before = _bundles(check_folder(bundle, "bundle"))
    check_folder(before, "bundle")
    asked = Study(head=head, finder=finder, sweep=many)
    place = pipeline.unfinished(bundle, store.absolute(), asked)
    with run_context("train", launch, tracking, output, place, registry) as means:
        account.say_account(store, means.screen)
        result = pipeline.fit_head(store, bundle, asked, means, golden)
        result["files"] = say_written(means.screen, _bundles(bundle))
        say_next(means.screen, [[me(), "score", bundle, "IMAGES", "SCORES"]])
    return finish(result, output)


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
    from arrowhead import inference

    out = check_folder(out, "scores")
    bundles.must_be_there(bundle)
    plan.must_be_there(images)
    with run_context("score", launch, tracking, output) as means:
        result = inference.score(bundle, images, out, scores, extract, means, tracking)
        found = " · ".join(f"{name} {count}" for name, count in result["labels"].items())
        means.screen.say(f"labels: {found}")
        code = f"import pandas; print(pandas.read_parquet({str(out / 'parts')!r}))"
        made = ["parts", "score.json", "scores.csv", "scores.png"]
        made += ["inputs.arrow", "request.json", "journal"]
        result["files"] = say_written(means.screen, [out / name for name in made])
        say_next(
            means.screen, [[sibling("python"), "-P", "-c", code], [me(), "scores", "verify", out]]
        )
    return finish(result, output)


@app.command(sort_key=5)
def evaluate(
    bundle: BundleAddress,
    data: Data,
    out: Annotated[
        Path | None,
        Parameter(
            help="Folder for figures and predictions; without, evaluation-… in the working folder."
        ),
    ] = None,
    *,
    evaluation: Evaluate = EvaluateConfig(),
    source: LabelSource = ReadSource(),
    extract: Extract = ExtractConfig(),
    launch: Launch = LaunchConfig(),
    tracking: Tracking = TrackingConfig(),
    output: Out = Output(),
) -> int:
    """How good a bundle is on labelled images: accuracy with its 95 % interval, calibration, a
    table of classes, the confusion matrix.

    The images are scored as `score` does it, so a stopped evaluation goes on where it was. Writes
    evaluation.json, per_class.csv, confusion.png and the predictions, OUT/parts.

    Example: arrowhead evaluate out/bundle new-labelled-photos/ --split test
    """
    from arrowhead import inference

    out = out and check_folder(out, "scores")
    bundles.must_be_there(bundle)
    plan.must_be_there(data)
    with run_context("evaluate", launch, tracking, output) as means:
        result = inference.evaluate(bundle, data, out, source, evaluation, extract, means, tracking)
        folder = Path(result["out"])
        made = ("evaluation.json", "per_class.csv", "confusion.png", "parts", "score.json")
        result["files"] = say_written(means.screen, [folder / name for name in made])
        say_next(means.screen, [[me(), "scores", "verify", folder]])
    return finish(result, output)


@app.command(sort_key=6)
def export(
    bundle: BundleAddress,
    out: Annotated[
        Path,
        Parameter(help="File that ends in .onnx or .pt2; or a folder for model.onnx, model.pt2."),
    ],
    *,
    what: Export = ExportConfig(),
    tracking: Models = TrackingStore(),
    output: Out = Output(),
) -> int:
    """Write a bundle as one file for programs without Arrowhead: uint8 pixels in, calibrated
    probabilities out, for any number of images.

    How pixels are made and what the probabilities mean is in the file's metadata. The file is run
    on the golden images; one that gives other numbers than the bundle is not kept.

    Example: arrowhead export out/bundle model.onnx
    """
    from arrowhead import export as exporting

    out = expanded(out)
    check_file(exporting.file_of(out, what.format))
    bundles.must_be_there(bundle)
    with fetched(bundle, tracking) as folder:
        result = exporting.export(folder, out, what) | {"bundle": bundle}
    screen = Screen(to_stderr=output.json)
    sizes = " and ".join(map(str, result["batch_sizes"]))
    screen.say(
        f"{result['file']}: {result['bytes'] / 1e6:.1f} MB · checked on {result['images']}"
        f" {result['checked_on']} in batches of {sizes}: largest difference"
        f" {result['largest_difference']:.2g} (allowed {result['tolerance']:g})"
    )
    result["files"] = say_written(screen, [result["file"]])
    if what.format == "onnx":
        opened = f"onnxruntime.InferenceSession({result['file']!r}).get_inputs()[0]"
        code = f"import onnxruntime; print({opened})"
    else:
        code = f"import torch; print(torch.export.load({result['file']!r}).graph_signature)"
    say_next(screen, [[sibling("python"), "-P", "-c", code]])
    return finish(result, output)


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
    from arrowhead import account, inference, pipeline
    from arrowhead import demo as drawing

    out = check_folder(out, "results")
    images, fitted, bundle = out / "images", out / "fit", out / "fit" / "bundle"
    for folder, kind in ((images, "results"), (fitted / "store", "store"), (bundle, "bundle")):
        check_folder(folder, kind)
    asked = Study(head=head)
    place = pipeline.unfinished(bundle, "demo", asked)
    with run_context("demo", launch, tracking, output, place) as means:
        if not images.is_dir():
            draft = out / ".images.draft"  # of a demo that was stopped, or of this one
            shutil.rmtree(draft, ignore_errors=True)
            drew = drawing.draw(draft)
            draft.rename(images)
            means.screen.say(
                f"{counted(drew, 'image')} of {', '.join(drawing.CLASSES)} drawn in {images}"
            )
        config = FeatureConfig(body=_demo_body(means.screen))
        result = pipeline.fit(images, fitted, config, asked, means)
        scores = _new_folder(out / "scores")
        with account.child(means, "score") as part:
            scored = inference.score(
                bundle, images / "new", scores, ScoreConfig(), ExtractConfig(), part
            )
        found = " · ".join(f"{name} {count}" for name, count in scored["labels"].items())
        means.screen.say(f"labels of the images in {images / 'new'}: {found}")
        wrote = [images, fitted / "store", *_bundles(bundle), scores]
        result["files"] = say_written(means.screen, wrote)
        other, lesson = out / "valid-scores", ["--head", "lesson", "--epochs", "5"]
        score_it = [me(), "score", out / "lesson", images / "valid", other, "--probabilities"]
        train_it = [me(), "train", fitted / "store", out / "lesson", *lesson]
        say_next(means.screen, [train_it, score_it, ui_command(tracking)])
    return finish(result | {"scores": str(scores), "labels": scored["labels"]}, output)


def _new_folder(path: Path) -> Path:
    """`path`, or where that is taken, the first of path-2, path-3 … that is not."""
    names = (path if n == 1 else path.with_name(f"{path.name}-{n}") for n in count(1))
    return next(one for one in names if not os.path.lexists(one))


def _bundles(path: Path) -> list[Path]:
    """A bundle, and the one that it has replaced."""
    return [path, path.with_name(f"{path.name}.previous")]


def _demo_body(screen: Screen) -> BodyConfig:
    """A trained body where one can be had, else, said aloud, a random one."""
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
    tracking: Watched = WatchedTracking(),
    output: Out = Output(),
) -> int:
    """Watch a run from another terminal, or another machine: how far each stage is and what binds
    it, epochs, the machine's load. It looks into MLflow, where the run records itself.

    Exit code 0 when the run has finished, 130 when it was interrupted, 1 when it failed. Ctrl-C
    ends the watching, never the run.

    Example: arrowhead watch --tracking-uri http://127.0.0.1:5000
    """
    from arrowhead import watch as watching

    if "every" in given() and not follow:
        raise ConfigError("--every has no effect with --no-follow.", "one.", "leave one out.")
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
    finish(view.plain(), output)
    return 0 if not follow else view.code


@app.command(sort_key=7)
def doctor(*, output: Out = Output()) -> int:
    """Look this machine over: what is installed, what it can do, what to mend. Exit code 0 when
    nothing that Arrowhead needs is missing.
    """
    from arrowhead import doctor as examination

    checks = examination.checks()
    if output.json:
        give({"checks": [check.plain() for check in checks]})
    else:
        for check in checks:
            Screen(to_stderr=False).say(check.line())
    return 1 if any(check.state == "missing" for check in checks) else 0


app.command(cli_inspect.features)
app.command(cli_inspect.bundles)
app.command(cli_inspect.scores_app)
app.command(cli_cluster.submit, sort_key=9)
app.command(cli_cluster.jobs_app)


def main(words: list[str] | None = None) -> None:
    """Run the verb in `words` (default: the command line's); say what went wrong; exit."""
    environment.complete()
    signals.lossy_output()
    with signals.stops():
        code = _run(sys.argv[1:] if words is None else words)
    sys.exit(code)


TELLING = ("features", "scores", "bundle", "jobs", "doctor")  # verbs whose lines are the result


def _run(words: list[str]) -> int:
    """Run a verb; its exit code, after what went wrong is said."""
    words = cli_inspect.scores_verb(words)
    app.config = ()  # of an earlier call in this process
    take_any_text()
    try:
        code = app.meta(words, exit_on_error=False, print_error=False, result_action="return_value")
        if words and words[0] in TELLING:
            if sys.stdout:
                sys.stdout.flush()
            answer_must_be_taken()
    except CycloptsError as error:
        wanted = "a verb, its arguments and its flags, as --help lists them."
        # The word that is not understood may be an address.
        code = refuse(without_secret(str(error)), wanted, f"run {me()} {verb_in(words)}--help.")
    except LostError as error:
        refuse(error.found, error.wanted, error.do)
        if sys.stdout:
            sys.stdout.flush()
        os._exit(signals.INTERRUPTED)  # leaving a Ray that is dead takes a minute
    except Refusal as error:
        code = refuse(error.found, error.wanted, error.do, 4 if isinstance(error, DataError) else 2)
    except KeyboardInterrupt as error:
        signals.handled()
        by = f" by {error}" if str(error) not in ("", "SIGINT") else ""
        screen = Screen(to_stderr=True)
        screen.say("")  # the terminal has shown ^C
        screen.say(f"arrowhead: interrupted{by}. Run the same command again to go on.")
        code = signals.INTERRUPTED
    except Exception:
        told = traceback.format_exc()
        if hidden(told) == told:
            raise
        sys.stderr.write(hidden(told))  # as Python would, without the store's password
        code = 1
    return code if isinstance(code, int) else 0
