"""The command `publish`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from arrowhead.bundle import resolve
from arrowhead.bundle.publish import PublishConfig
from arrowhead.cli.app import (
    finish,
    local_bundle,
    program,
    show_next_commands,
    show_written,
)
from arrowhead.cli.options import BundleAddress, Models, Out, Output, TrackingStore
from arrowhead.cli.screen import Screen
from arrowhead.cli.stage_options import Publish
from arrowhead.data import remote_folder


def publish(
    bundle: BundleAddress,
    folder: Annotated[
        Path, Parameter(help="New folder or URI to write; one published before is replaced.")
    ],
    *,
    options: Publish = PublishConfig(),
    tracking: Models = TrackingStore(),
    output: Out = Output(),
) -> int:
    """Write a folder for others, as on the Hugging Face hub: weights, settings, model card.

    torchvision or timm loads the weights without Arrowhead (bundles with other heads than linear
    ones get an ONNX model instead). The model card has the bundle's results with their intervals,
    classes, how to use the model, its limits and licenses. Read it, and add what only you know.
    None of your photos is in the folder unless you say --photos. --push sends it to the hub.

    Example: arrowhead publish out/bundle cats-or-dogs --license apache-2.0 --push me/cats-or-dogs
    """
    from arrowhead.bundle import hub
    from arrowhead.bundle import publish as bundle_publish

    folder = remote_folder.check_output(folder, "publication")
    resolve.check_exists(bundle)
    with local_bundle(bundle, tracking) as local:
        result = bundle_publish.publish(local, folder, options) | {"bundle": bundle}
    remote_folder.of(folder).publish("arrowhead.json")
    screen = Screen(to_stderr=output.json)
    if result["why_onnx"]:
        screen.print(f"model.onnx instead of model.safetensors: {result['why_onnx']}")
    screen.print(
        f"{folder}: {result['bytes'] / 1e6:.1f} MB · checked on {result['images']}"
        f" {result['checked_on']}: largest difference of the {result['compared']}"
        f" {result['largest_difference']:.2g} (allowed {result['tolerance']:g})"
    )
    top = [folder / name for name in result["contents"] if "/" not in name]
    result["files"] = show_written(screen, [*top, folder / "bundle"])
    result["pushed"] = None
    if options.push:
        result["pushed"] = hub.push(folder, options.push, public=options.public)
        screen.print(f"pushed: {result['pushed']}")
    show_next_commands(
        screen,
        [
            ["less", folder / "README.md"],
            [program(), "score", folder / "bundle", "IMAGES", "SCORES"],
        ],
    )
    return finish(result, output)
