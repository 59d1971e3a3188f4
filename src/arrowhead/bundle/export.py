"""Export a bundle as one ONNX or pt2 file for other programs, and compare the two.

    bundle                   body, head, temperature
      -> inference_module    one torch module; features are rounded to float16, as in a store
      -> ExportedProgram     traced once, for any batch size
      -> ONNX or pt2         with the weights, and metadata about pixels and probabilities
      -> comparison          the file and the bundle on the golden images

    pixels         uint8   (B, 3, S, S)   RGB, as `decode` makes them
    probabilities  float32 (B, C)         in the order of the bundle's classes

A file that gives other probabilities or labels than its bundle is not kept.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from arrowhead import __version__, fileio
from arrowhead.bundle import format as bundle_format
from arrowhead.bundle import replay
from arrowhead.bundle.format import Bundle
from arrowhead.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

OPSET = 20
# Of files that people may mean, but of no folder.
OTHER_SUFFIXES = (".bin", ".engine", ".json", ".pb", ".pt", ".pth", ".tflite", ".txt")
TRACE_BATCH_SIZE = 2  # torch may treat a size of 1 as a constant
TOLERANCE = 1e-3  # of a probability
MAX_ONNX_BYTES = 2**31 - 2**24  # of weights: protobuf's limit is 2 GiB, and the graph needs some
RESIZE_RULES = {
    "crop": "shorter side to round(8 / 7 size), then the middle size x size",
    "squash": "both sides to size",
    "pad": "longer side to size, the picture in the middle, the rest black",
}

Run = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """The format of the exported file."""

    format: Literal["onnx", "pt2"] = "onnx"
    """onnx: for onnxruntime and its like, weights inside, at most 2 GB. pt2: for torch.export.load,
    which unpickles parts of the file: load only files that you trust."""


def export(path: Path, out: Path, config: ExportConfig) -> dict[str, Any]:
    """Write the bundle at `path` to the file `out`, or to model.FORMAT in the folder `out`.

    For every golden image (random pixels, if the bundle has none) the file must give the bundle's
    labels, and its probabilities within TOLERANCE, in batches of one and in one batch.

    Nearly all of the difference comes from features between two float16 numbers: another order of
    summation may round them the other way. Measured in both formats: at most 7e-6 on 300 photos
    with trained heads (MobileNetV2), 4e-5 with random ones (ResNet18, ConvNeXt, ViT), and 7e-5 with
    trained heads if 1e-6 of noise is added to the features. TOLERANCE is ten times that.

    Returns:
        What was written, and the largest difference.

    Raises:
        ConfigError: If this bundle or this environment cannot write the format.
        DataError: If the file and the bundle disagree.
    """
    file = output_file(out, config.format)
    if config.format == "onnx":
        _require_onnx()
    bundle = bundle_format.load(path)
    body, head = bundle.make_body(), bundle.make_head()
    reference = _golden_reference if bundle.golden else _random_reference
    pixels_BCHW, expected_BC = reference(bundle, path, body, head)
    module = inference_module(bundle, body.module, head)
    if config.format == "onnx":
        _check_onnx_size(module)
    metadata_json = metadata(bundle, bundle_format.fingerprint(path))
    write = _write_onnx if config.format == "onnx" else _write_pt2
    with fileio.atomic_write(file) as draft_file:
        with _silence_exporters():
            run = write(_trace(module, bundle), metadata_json, draft_file)
        sizes = sorted({1, len(pixels_BCHW)})
        largest = max(_compare(bundle, run, pixels_BCHW, expected_BC, size) for size in sizes)
        written = draft_file.stat().st_size
    side = bundle.recipe.size
    return {
        "format": config.format,
        "file": str(file),
        "bytes": written,
        "inputs": {"pixels": ["uint8", "batch", 3, side, side]},
        "outputs": {"probabilities": ["float32", "batch", len(bundle.classes)]},
        "images": len(pixels_BCHW),
        "checked_on": "golden images" if bundle.golden else "drawn pixels",
        "batch_sizes": sizes,
        "largest_difference": largest,
        "tolerance": TOLERANCE,
    }


def output_file(out: Path, format: str) -> Path:
    """The file to write: `out` itself, or model.FORMAT in the folder `out`."""
    other = {"onnx": ".pt2", "pt2": ".onnx"}[format]
    is_folder = os.path.isdir(out)  # noqa: PTH112 - False, not an error, where a name is too long
    if out.suffix in (other, *OTHER_SUFFIXES) and not is_folder:
        raise ConfigError(
            f"{out} does not have the suffix of the format {format}.",
            f"a name that ends in .{format}, or a folder.",
            f"rename it, or give --format {other[1:]}." if out.suffix == other else "rename it.",
        )
    if out.suffix == f".{format}" and not is_folder:
        return out
    if os.path.isfile(out):  # noqa: PTH113 - likewise
        raise ConfigError(
            f"{out} is a file.",
            f"a name that ends in .{format}, or a folder.",
            f"give {out}.{format}.",
        )
    return out / f"model.{format}"


# ---------------------------------------------------------------------------- the graph


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


def _trace(module: nn.Module, bundle: Bundle) -> ExportedProgram:
    import torch
    from torch.export import Dim

    side = bundle.recipe.size
    example = torch.zeros((TRACE_BATCH_SIZE, 3, side, side), dtype=torch.uint8)
    with torch.no_grad():
        program = torch.export.export(
            module, (example,), dynamic_shapes={"pixels": {0: Dim("batch", min=1)}}
        )
    for node in program.graph.nodes:  # would publish paths of this machine
        node.meta.pop("stack_trace", None)
    return program


def _write_onnx(program: ExportedProgram, metadata_json: str, file: Path) -> Run:
    """Write the program as ONNX; return a function that runs the file."""
    import onnx
    import onnxruntime
    import torch

    exported = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        input_names=["pixels"],
        output_names=["probabilities"],
        verbose=False,
    )
    assert exported is not None
    exported.model.metadata_props["arrowhead"] = metadata_json
    exported.save(str(file), external_data=False)
    onnx.checker.check_model(str(file))
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def run(pixels_BCHW: NDArray[np.uint8]) -> NDArray[np.float32]:
        (out,) = session.run(["probabilities"], {"pixels": pixels_BCHW})
        return np.asarray(out)

    return run


def _write_pt2(program: ExportedProgram, metadata_json: str, file: Path) -> Run:
    """Write the program as a pt2 archive; return a function that runs the file."""
    import torch

    with file.open("wb") as sink:  # given a path, torch insists on the suffix .pt2
        torch.export.save(program, sink, extra_files={"arrowhead.json": metadata_json})
    with file.open("rb") as source:
        module = torch.export.load(source).module()

    def run(pixels_BCHW: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            out: NDArray[np.float32] = module(torch.from_numpy(pixels_BCHW)).numpy()
        return out

    return run


@contextmanager
def _silence_exporters() -> Iterator[None]:
    """Drop the exporters' warnings and keep their output off stdout, which is for the result."""
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401  # torch's exporter is written in it
    except ImportError as error:
        raise ConfigError(
            f"ONNX cannot be written here: {error}.",
            "the packages onnx, onnxruntime and onnxscript.",
            "pip install 'arrowhead[onnx]', or give --format pt2.",
        ) from error


def _check_onnx_size(module: nn.Module) -> None:
    size = sum(tensor.nbytes for tensor in module.state_dict().values())
    if size > MAX_ONNX_BYTES:
        raise ConfigError(
            f"The weights are {size / 1e9:.1f} GB, but an ONNX file with its weights inside ends at"
            " 2 GB (protobuf's limit).",
            f"at most {MAX_ONNX_BYTES / 1e9:.1f} GB.",
            "give --format pt2, which has no such limit, or train on a smaller --body.",
        )


def metadata(bundle: Bundle, fingerprint: str) -> str:
    """JSON that tells callers how to prepare pixels and interpret probabilities.

    ONNX holds it as the property `arrowhead`, pt2 as the extra file `arrowhead.json`.
    """
    recipe = bundle.recipe
    task = "multi-label" if bundle.multi else "single-label"
    thresholds = bundle.thresholds or [0.5] * len(bundle.classes)
    return json.dumps(
        {
            "arrowhead": __version__,
            "bundle": fingerprint,
            "recipe": asdict(recipe),
            "recipe_fingerprint": recipe.fingerprint,
            "preprocessing": {
                "pixels": f"uint8 (batch, 3, {recipe.size}, {recipe.size}), RGB, 0 to 255",
                "size": recipe.size,
                "resize": recipe.resize,
                "rule": RESIZE_RULES[recipe.resize],
                "interpolation": "linear",
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


# ---------------------------------------------------------------------------- the check


def _golden_reference(
    bundle: Bundle, path: Path, body: Any, head: nn.Module
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The golden images' pixels (B, 3, S, S), and the bundle's probabilities here (B, C)."""
    images = [image.data for image in bundle.golden]
    threads = len(os.sched_getaffinity(0))
    with replay.clean_decoder(bundle.recipe, "cpu", threads, max(16, len(images))) as decode:
        pixels = decode(images, [bytes(16)] * len(images))
    if fault := next((fault for fault in pixels.faults if fault), None):
        raise DataError(
            f"The golden images of {path} cannot be read on this machine: {fault}.",
            "the images that the bundle was saved with, to check the exported file.",
            "run `arrowhead doctor`; if it finds nothing, train again.",
        )
    feature_BD = replay.features_of_pixels(body, pixels)
    expected_BC = bundle_format.probabilities(
        head, feature_BD, bundle.temperature, multi=bundle.multi
    )
    view_BCHW = pixels.views[0][: len(images)].transpose(0, 3, 1, 2)
    return np.ascontiguousarray(view_BCHW), expected_BC


def _random_reference(
    bundle: Bundle, path: Path, body: Any, head: nn.Module
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Like `_golden_reference`, on random images: from coarse blobs to pixel noise, one seed."""
    import torch
    from torch.nn.functional import interpolate

    generator, side = torch.Generator().manual_seed(0), bundle.recipe.size
    grids = [torch.rand((1, 3, n, n), generator=generator) for n in (2, 3, 5, 8, 16, side)]
    images = torch.cat([interpolate(grid, (side, side), mode="bilinear") for grid in grids])
    view_BCHW = (images * 255).round().to(torch.uint8)
    with torch.inference_mode():
        feature_BD = body(view_BCHW).cpu().numpy().astype(np.float16).astype(np.float32)
    expected_BC = bundle_format.probabilities(
        head, feature_BD, bundle.temperature, multi=bundle.multi
    )
    return view_BCHW.numpy(), expected_BC


def _compare(
    bundle: Bundle,
    run: Run,
    pixels_BCHW: NDArray[np.uint8],
    expected_BC: NDArray[np.float32],
    batch_size: int,
) -> float:
    """The largest difference of a probability between the file and the bundle.

    Raises DataError if it is above TOLERANCE, or if a label differs.
    """
    starts = range(0, len(pixels_BCHW), batch_size)
    prob_BC = np.concatenate([run(pixels_BCHW[at : at + batch_size]) for at in starts])
    largest = float(np.abs(prob_BC - expected_BC).max())
    changed_B = (bundle.predict_labels(prob_BC) != bundle.predict_labels(expected_BC)).any(1)
    if not bundle.golden:  # random images may lie on a decision boundary
        changed_B &= bundle.margin(expected_BC) > 2 * TOLERANCE
    changed = int(changed_B.sum())
    if changed or not largest <= TOLERANCE:
        images = "golden images" if bundle.golden else "drawn pixels"
        raise DataError(
            f"The file gives the {images} other probabilities than the bundle (batches of"
            f" {batch_size}): largest difference {largest:.2g}, {changed} of {len(prob_BC)} labels"
            " changed. It was not kept.",
            f"a difference of at most {TOLERANCE:g}, and the same labels.",
            "try the other --format, or other versions of torch and onnxruntime, and please report"
            " it.",
        )
    return largest
