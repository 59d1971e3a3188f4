"""The verbs that use a bundle: score, evaluate, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from arrowhead.bundle import resolve
from arrowhead.bundle.export import ExportConfig
from arrowhead.cli.app import fetched, finish, me, run_context, say_next, say_written, sibling
from arrowhead.cli.options import (
    BundleAddress,
    Data,
    Evaluate,
    Export,
    Extract,
    LabelSource,
    Launch,
    Models,
    Out,
    Output,
    ReadSource,
    Scores,
    Tracking,
    TrackingStore,
)
from arrowhead.cli.screen import Screen
from arrowhead.data import sources
from arrowhead.features.extract import ExtractConfig
from arrowhead.inference.evaluate import EvaluateConfig
from arrowhead.inference.score_request import ScoreConfig
from arrowhead.output_paths import check_file, check_folder, expanded
from arrowhead.runtime.ray_cluster import LaunchConfig
from arrowhead.tracking.client import TrackingConfig


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
    from arrowhead.commands import score as commands_score

    out = check_folder(out, "scores")
    resolve.must_be_there(bundle)
    sources.must_be_there(images)
    with run_context("score", launch, tracking, output) as context:
        result = commands_score.score(bundle, images, out, scores, extract, context, tracking)
        found = " · ".join(f"{name} {count}" for name, count in result["labels"].items())
        context.screen.say(f"labels: {found}")
        code = f"import pandas; print(pandas.read_parquet({str(out / 'parts')!r}))"
        made = ["parts", "score.json", "scores.csv", "scores.png"]
        made += ["inputs.arrow", "request.json", "journal"]
        result["files"] = say_written(context.screen, [out / name for name in made])
        say_next(
            context.screen, [[sibling("python"), "-P", "-c", code], [me(), "scores", "verify", out]]
        )
    return finish(result, output)


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
    from arrowhead.commands import score as commands_score

    out = out and check_folder(out, "scores")
    resolve.must_be_there(bundle)
    sources.must_be_there(data)
    with run_context("evaluate", launch, tracking, output) as context:
        result = commands_score.evaluate(
            bundle, data, out, source, evaluation, extract, context, tracking
        )
        folder = Path(result["out"])
        made = ("evaluation.json", "per_class.csv", "confusion.png", "parts", "score.json")
        result["files"] = say_written(context.screen, [folder / name for name in made])
        say_next(context.screen, [[me(), "scores", "verify", folder]])
    return finish(result, output)


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
    from arrowhead.bundle import export as bundle_export

    out = expanded(out)
    check_file(bundle_export.file_of(out, what.format))
    resolve.must_be_there(bundle)
    with fetched(bundle, tracking) as folder:
        result = bundle_export.export(folder, out, what) | {"bundle": bundle}
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
