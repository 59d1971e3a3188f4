"""Export a bundle as a file for other programs, and compare the two.

    bundle                   body, head, temperature
      -> inference_module    one torch module; features are rounded to float16, as in a store
      -> export_graph        ONNX, OpenVINO or pt2, with metadata about pixels and probabilities
    or
      -> library_weights     safetensors that torchvision or timm loads
      -> comparison          the file and the bundle on the golden images

    pixels         uint8   (B, 3, S, S)   RGB, as `decode` makes them
    probabilities  float32 (B, C)         in the order of the bundle's classes

A file that gives other results than its bundle is not kept.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from arrowhead import __version__, fileio
from arrowhead.bundle import export_graph, library_weights, reference
from arrowhead.bundle import format as bundle_format
from arrowhead.bundle.format import Bundle
from arrowhead.bundle.reference import Reference, Run
from arrowhead.errors import ConfigError
from arrowhead.features import extract

if TYPE_CHECKING:
    from torch import nn

SUFFIXES = {
    "onnx": ".onnx",
    "openvino": ".xml",
    "pt2": ".pt2",
    "torchvision": ".safetensors",
    "timm": ".safetensors",
}
# Of files that people may mean, but of no folder.
OTHER_SUFFIXES = (".bin", ".engine", ".json", ".pb", ".pt", ".pth", ".tflite", ".txt")
TOLERANCE = 1e-3  # of a probability
FLOAT16_TOLERANCE = 1e-2  # likewise, where the file or the bundle has weights of 16 bits
RESIZE_RULES = {
    "crop": "shorter side to {side} pixels, then the middle size x size",
    "squash": "both sides to size",
    "pad": "longer side to size, the picture in the middle, the rest black",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """The format of the exported file."""

    format: Literal["onnx", "openvino", "pt2", "torchvision", "timm"] = "onnx"
    """onnx: for onnxruntime and its like, weights inside, at most 2 GB. openvino: .xml and .bin,
    for OpenVINO. pt2: for torch.export.load, which unpickles parts of the file: load only files
    that you trust. torchvision, timm: weights (safetensors) that the library's network of that
    name loads; for linear heads."""
    precision: Literal["fp32", "fp16"] = "fp32"
    """fp16: half the size, for GPUs (ONNX) and for OpenVINO's devices; results differ slightly. The
    head and the normalization of the pixels stay fp32."""

    def __post_init__(self) -> None:
        if self.precision == "fp16" and self.format not in ("onnx", "openvino"):
            raise ConfigError(
                f"--precision fp16 is not for --format {self.format}.",
                "--format onnx or openvino.",
                "leave --precision out; in torch, module.half() converts the weights.",
            )


def export(path: Path, out: Path, config: ExportConfig) -> dict[str, Any]:
    """Write the bundle at `path` to the file `out`, or to model.SUFFIX in the folder `out`.

    For every golden image (random pixels, if the bundle has none) the file must give the bundle's
    labels, and its probabilities within TOLERANCE, in batches of one and in one batch.

    Nearly all of the difference comes from features between two float16 numbers: another order of
    summation may round them the other way. Measured in both formats: at most 7e-6 on 300 photos
    with trained heads (MobileNetV2), 4e-5 with random ones (ResNet18, ConvNeXt, ViT), and 7e-5 with
    trained heads if 1e-6 of noise is added to the features. TOLERANCE is ten times that. float16
    weights change more (MobileNetV2, trained head, bench/exported.py): 1.2e-3 on eight golden
    images; on 200 photos at most 0.013, half of them below 8e-5, and one label of a close call.

    Returns:
        What was written, and the largest difference.

    Raises:
        ConfigError: If this bundle or this environment cannot write the format.
        DataError: If the file and the bundle disagree.
    """
    file = output_file(out, config.format)
    export_graph.require_packages(config.format)
    bundle = bundle_format.load(path)
    metadata_json = metadata(bundle, bundle_format.fingerprint(path))
    if config.format in ("torchvision", "timm"):
        result = export_weights(bundle, path, file, config.format, metadata_json)
    else:
        result = _export_graph(bundle, path, file, config, metadata_json)
    return {"format": config.format, "precision": config.precision, "file": str(file)} | result


def output_file(out: Path, format: str) -> Path:
    """The file to write: `out` itself, or model.SUFFIX in the folder `out`."""
    suffix = SUFFIXES[format]
    others = {other: name for name, other in SUFFIXES.items() if other != suffix}
    if ".safetensors" in others:
        others[".safetensors"] = "torchvision or timm"
    is_folder = os.path.isdir(out)  # noqa: PTH112 - False, not an error, where a name is too long
    if out.suffix in (*others, *OTHER_SUFFIXES) and not is_folder:
        other = others.get(out.suffix)
        raise ConfigError(
            f"{out} does not have the suffix of the format {format}.",
            f"a name that ends in {suffix}, or a folder.",
            f"rename it, or give --format {other}." if other else "rename it.",
        )
    if out.suffix == suffix and not is_folder:
        return out
    if os.path.isfile(out):  # noqa: PTH113 - likewise
        raise ConfigError(
            f"{out} is a file.",
            f"a name that ends in {suffix}, or a folder.",
            f"give {out}{suffix}.",
        )
    return out / f"model{suffix}"


# ----------------------------------------------------------------------------- the formats


def inference_module(bundle: Bundle, body: nn.Module, head: nn.Module) -> nn.Module:
    """The computation of `score` as one module: uint8 pixels (B, 3, S, S) to float32 probabilities
    (B, C).
    """
    import torch
    from torch import nn

    class InferenceModule(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = body, head

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            logits = self.head(self.body(pixels).half().float()) / bundle.temperature
            prob: torch.Tensor = logits.sigmoid() if bundle.multi else logits.softmax(1)
            return prob

    return InferenceModule().eval()


def _export_graph(
    bundle: Bundle, path: Path, file: Path, config: ExportConfig, metadata_json: str
) -> dict[str, Any]:
    """Write a file that holds the whole computation; what was written and verified."""
    body, head = bundle.make_body(), bundle.make_head()
    expected = reference.make_reference(bundle, path, body, head)
    body.make_portable()
    is_low = {config.precision, bundle.recipe.body_precision} != {"fp32"}
    is_half = config.format == "onnx" and config.precision == "fp16"
    if is_half:
        export_graph.convert_to_half(body.module)
    module = inference_module(bundle, body.module, head)
    if config.format in ("onnx", "openvino"):
        export_graph.check_onnx_size(module)
    tolerance = FLOAT16_TOLERANCE if is_low else TOLERANCE
    with _draft_files(file, config.format) as drafts:
        with export_graph.silence_exporters():
            run = _write_graph(module, bundle.recipe.size, config, metadata_json, drafts)
        sizes = sorted({1, len(expected.pixels)})
        largest = max(reference.compare(bundle, expected, run, size, tolerance) for size in sizes)
        written = sum(draft.stat().st_size for draft in drafts)
    return {
        "bytes": written,
        "inputs": {"pixels": ["uint8", "batch", 3, bundle.recipe.size, bundle.recipe.size]},
        "outputs": {"probabilities": ["float32", "batch", len(bundle.classes)]},
        "images": len(expected.pixels),
        "checked_on": expected.description,
        "batch_sizes": sizes,
        "compared": "probabilities",
        "largest_difference": largest,
        "tolerance": tolerance,
    }


@contextmanager
def _draft_files(file: Path, format: str) -> Iterator[list[Path]]:
    """Drafts of the file, and for OpenVINO of its weights, which appear first."""
    with fileio.atomic_write(file) as draft:
        if format != "openvino":
            yield [draft]
            return
        with fileio.atomic_write(file.with_suffix(".bin")) as weights:
            yield [draft, weights]


def _write_graph(
    module: nn.Module, side: int, config: ExportConfig, metadata_json: str, drafts: list[Path]
) -> Run:
    program = export_graph.trace(module, side)
    if config.format == "openvino":
        half = config.precision == "fp16"
        files = drafts[0], drafts[1]
        return export_graph.write_openvino(program, metadata_json, files, half=half)
    write = export_graph.write_onnx if config.format == "onnx" else export_graph.write_pt2
    return write(program, metadata_json, drafts[0])


def export_weights(
    bundle: Bundle, path: Path, file: Path, library: str, metadata_json: str
) -> dict[str, Any]:
    """Write weights that a library loads; what was written and verified.

    Raises:
        ConfigError: If the bundle cannot be expressed so.
        DataError: If the library gives other logits than the bundle.
    """
    weights = library_weights.make_weights(bundle, library)
    # The file holds the weights as they were before they were rounded to a lower precision.
    exact = replace(bundle, recipe=replace(bundle.recipe, body_precision="fp32"))
    expected: Reference = reference.make_reference(
        bundle, path, exact.make_body(), bundle.make_head()
    )
    with fileio.atomic_write(file) as draft:
        library_weights.write(weights, metadata_json, draft)
        largest = library_weights.check(bundle, expected, weights, draft)
        written = draft.stat().st_size
    return {
        "bytes": written,
        "inputs": {"pixels": ["float32", "batch", 3, bundle.recipe.size, bundle.recipe.size]},
        "outputs": {"logits": ["float32", "batch", len(bundle.classes)]},
        "images": len(expected.pixels),
        "checked_on": expected.description,
        "batch_sizes": [len(expected.pixels)],
        "compared": "logits",
        "largest_difference": largest,
        "tolerance": library_weights.LOGIT_TOLERANCE,
        "build": weights.classifier.expression,
        "architecture": weights.classifier.architecture,
        "options": weights.classifier.options,
        "last_layer": weights.classifier.last_layer,
    }


def metadata(bundle: Bundle, fingerprint: str) -> str:
    """JSON that tells callers how to prepare pixels and interpret the output.

    ONNX and safetensors hold it as the property `arrowhead`, OpenVINO as runtime information of
    that name, pt2 as the extra file `arrowhead.json`.
    """
    recipe = bundle.recipe
    pixels = extract.make_pixel_config(recipe)
    task = "multi-label" if bundle.multi else "single-label"
    thresholds = bundle.thresholds or [0.5] * len(bundle.classes)
    return json.dumps(
        {
            "arrowhead": __version__,
            "bundle": fingerprint,
            "weights": bundle.lineage.get("weights"),
            "recipe": recipe.to_dict(),
            "recipe_fingerprint": recipe.fingerprint,
            "preprocessing": {
                "pixels": f"uint8 (batch, 3, {recipe.size}, {recipe.size}), RGB, 0 to 255",
                "size": recipe.size,
                "resize": recipe.resize,
                "rule": RESIZE_RULES[recipe.resize].format(side=pixels.resized_side),
                "interpolation": recipe.interpolation,
                "antialias": True,
                "orientation": "EXIF orientation applied",
                "transparency": "on white",
                "in_graph": "(pixels / 255 - mean) / std",
            },
            "classes": bundle.classes,
            "task": task,
            "decision": bundle_format.TASKS[task],
            "temperature": bundle.temperature,
            "thresholds": dict(zip(bundle.classes, thresholds, strict=True))
            if bundle.multi
            else None,
        }
    )
