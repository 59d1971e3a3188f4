"""The commands that use a bundle: score, evaluate, export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from arrowhead.bundle import resolve
from arrowhead.bundle.export import ExportConfig
from arrowhead.cli.app import (
    finish,
    local_bundle,
    program,
    run_context,
    show_next_commands,
    show_written,
    sibling_program,
)
from arrowhead.cli.options import (
    BundleAddress,
    Data,
    Launch,
    Models,
    Out,
    Output,
    Tracking,
    TrackingStore,
)
from arrowhead.cli.screen import Screen
from arrowhead.cli.stage_options import Evaluate, Export, Extract, LabelSource, ReadSource, Scores
from arrowhead.data import mirrors, remote_folder, sources
from arrowhead.features.extract import ExtractConfig
from arrowhead.inference.evaluate import EvaluateConfig
from arrowhead.inference.score_request import ScoreConfig
from arrowhead.output_paths import expand_user
from arrowhead.runtime.ray_cluster import LaunchConfig
from arrowhead.tracking.client import TrackingConfig


def score(
    bundle: BundleAddress,
    images: Annotated[
        str,
        Parameter(
            help="Images: a folder or URI, including its subfolders; a table (.csv, .tsv) with a"
            " column path; a list (.txt) with one path per line; or tar, Parquet or Arrow files"
            " with images, or a folder of them."
        ),
    ],
    out: Annotated[Path, Parameter(help="Folder or URI for the Parquet parts and score.json.")],
    *,
    scores: Scores = ScoreConfig(),
    extract: Extract = ExtractConfig(),
    launch: Launch = LaunchConfig(),
    tracking: Tracking = TrackingConfig(),
    output: Out = Output(),
) -> int:
    """Label every image of a folder, table or list.

    Writes one row per file, in order; files that cannot be read get a row with the fault. A stopped
    run continues where it was. Images are preprocessed exactly as in training. To check this, a few
    images kept in the bundle ("golden images") are scored first and compared.

    Example: arrowhead score out/bundle new-photos/ scores/ --flag-novel --csv
    """
    from arrowhead.commands import score as commands_score

    out = remote_folder.check_output(out, "scores")
    scores = replace(scores, store=scores.store and remote_folder.local(scores.store))
    resolve.check_exists(bundle)
    sources.check_exists(images)
    with run_context("score", launch, tracking, output) as context:
        result = commands_score.score(bundle, images, out, scores, extract, context, tracking)
        counts = " · ".join(f"{name} {count}" for name, count in result["labels"].items())
        context.screen.print(f"labels: {counts}")
        code = f"import pandas; print(pandas.read_parquet({str(out / 'parts')!r}))"
        names = ["parts", "score.json", "scores.csv", "scores.png"]
        result["files"] = show_written(context.screen, [out / name for name in names])
        show_next_commands(
            context.screen,
            [[sibling_program("python"), "-P", "-c", code], [program(), "scores", "verify", out]],
        )
    return finish(result, output)


def evaluate(
    bundle: BundleAddress,
    data: Data,
    out: Annotated[
        Path | None,
        Parameter(
            help="Folder or URI for the results. Default: evaluation-… in the current folder."
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
    """Evaluate a bundle on labelled images.

    Reports accuracy with its 95 % interval, calibration, a table of classes and the confusion
    matrix. Images are scored as with `score`, so a stopped evaluation continues where it was.
    Writes evaluation.json, per_class.csv, confusion.png and the predictions in OUT/parts.

    Example: arrowhead evaluate out/bundle new-labelled-photos/ --split test
    """
    from arrowhead.commands import score as commands_score

    out = out and remote_folder.check_output(out, "scores")
    resolve.check_exists(bundle)
    sources.check_exists(data)
    with run_context("evaluate", launch, tracking, output) as context:
        result = commands_score.evaluate(
            bundle, data, out, source, evaluation, extract, context, tracking
        )
        folder = Path(result["out"])
        names = ("evaluation.json", "per_class.csv", "confusion.png", "parts", "score.json")
        result["files"] = show_written(context.screen, [folder / name for name in names])
        show_next_commands(context.screen, [[program(), "scores", "verify", folder]])
    return finish(result, output)


def export(
    bundle: BundleAddress,
    out: Annotated[
        Path,
        Parameter(
            help="File ending in .onnx, .xml (OpenVINO), .pt2 or .safetensors, as --format says; or"
            " a folder for a file called model; or the URI of either."
        ),
    ],
    *,
    options: Export = ExportConfig(),
    tracking: Models = TrackingStore(),
    output: Out = Output(),
) -> int:
    """Export a bundle for programs without Arrowhead: ONNX, OpenVINO, pt2, weights.

    ONNX, OpenVINO and pt2 models take uint8 pixels of any number of images and return calibrated
    probabilities. Weights for torchvision or timm are loaded by load_state_dict into the network of
    that name, which takes normalized pixels and returns calibrated logits. The metadata says how to
    preprocess the pixels and which class each output belongs to. The file is run on the bundle's
    golden images, and not kept if its results differ from the bundle's.

    Example: arrowhead export out/bundle model.onnx --precision fp16
    """
    from arrowhead.bundle import export as bundle_export

    out = bundle_export.output_file(mirrors.mirror_of(expand_user(out)), options.format)
    out = remote_folder.check_output_file(out)
    resolve.check_exists(bundle)
    with local_bundle(bundle, tracking) as folder:
        result = bundle_export.export(folder, out, options) | {"bundle": bundle}
    screen = Screen(to_stderr=output.json)
    sizes = " and ".join(map(str, result["batch_sizes"]))
    screen.print(
        f"{result['file']}: {result['bytes'] / 1e6:.1f} MB · checked on {result['images']}"
        f" {result['checked_on']} in batches of {sizes}: largest difference of the"
        f" {result['compared']} {result['largest_difference']:.2g} (allowed"
        f" {result['tolerance']:g})"
    )
    weights = [out.with_suffix(".bin")] if options.format == "openvino" else []
    remote_folder.send_files([*weights, out])
    result["files"] = show_written(screen, [out, *weights])
    code = _loading_code(result)
    show_next_commands(screen, [[sibling_program("python"), "-P", "-c", code]])
    return finish(result, output)


def _loading_code(result: dict[str, Any]) -> str:
    """Python code that loads an exported file with the library that it is for."""
    file = result["file"]
    if result["format"] == "onnx":
        return f"import onnxruntime; print(onnxruntime.InferenceSession({file!r}).get_inputs()[0])"
    if result["format"] == "openvino":
        return f"import openvino; print(openvino.compile_model({file!r}, 'CPU'))"
    if result["format"] == "pt2":
        return f"import torch; print(torch.export.load({file!r}).graph_signature)"
    load = f"net.load_state_dict(safetensors.torch.load_file({file!r}))"
    return f"import safetensors.torch, {result['format']}; net = {result['build']}; print({load})"
