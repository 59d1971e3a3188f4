"""A bundle as one file that other programs run: pixels in, calibrated probabilities out.

    bundle               body, head, temperature
      -> whole           one torch module; features pass through float16, as in a store
      -> program         traced once, for any number of images
      -> onnx or pt2     weights, and in the metadata what a caller must know
      -> check           the file itself, run on the golden images beside the bundle

    pixels         uint8   (B, 3, S, S)   RGB, as `decode` makes them
    probabilities  float32 (B, C)         in the order of the bundle's classes

A file that gives other numbers or labels than its bundle never gets its name.
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
TRACED = 2  # images; not 1, which torch may take for a constant
TOLERANCE = 1e-3
MAX_ONNX_BYTES = (
    2**31 - 2**24
)  # bytes of weights: protobuf ends at 2 GiB, and the graph needs some too
RESIZE = {
    "crop": "shorter side to round(8 / 7 size), then the middle size x size",
    "squash": "both sides to size",
    "pad": "longer side to size, the picture in the middle, the rest black",
}

Run = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """What kind of file is written."""

    format: Literal["onnx", "pt2"] = "onnx"
    """onnx: for onnxruntime and its like, weights inside, at most 2 GB. pt2: for torch.export.load,
    which unpickles parts of what it opens: load your own, never a stranger's."""


def export(path: Path, out: Path, config: ExportConfig) -> dict[str, Any]:
    """Write the bundle at `path` to the file `out`, or to model.FORMAT in the folder `out`.

    The file must give every golden image (drawn pixels, where the bundle has none) the labels that
    the bundle gives it here, and probabilities within TOLERANCE, image by image and all at once.
    The result has the largest difference.
    Where a feature lies between two float16 numbers, another order of sums may pick the other one:
    that is nearly all of the difference. Measured, either format: at most 7e-6 on 300 photos with
    trained heads (MobileNetV2), 4e-5 with random ones (ResNet18, ConvNeXt, ViT); trained heads
    whose features are shaken by 1e-6 before they are rounded: 7e-5. TOLERANCE is ten times that.

    Raises ConfigError for what cannot be written so, DataError where the file disagrees.
    """
    file = file_of(out, config.format)
    if config.format == "onnx":
        _must_have_onnx()
    bundle = bundle_format.load(path)
    body, head = bundle.make_body(), bundle.make_head()
    check = _golden if bundle.golden else _drawn
    pixels_BCHW, wanted_BC = check(bundle, path, body, head)
    module = whole(bundle, body.module, head)
    if config.format == "onnx":
        _must_fit(module)
    about = metadata(bundle, bundle_format.fingerprint(path))
    with fileio.draft(file) as draft_file:
        with _quiet():
            program = _trace(module, bundle)
            run = (_onnx if config.format == "onnx" else _pt2)(program, about, draft_file)
        sizes = sorted({1, len(pixels_BCHW)})
        worst = max(_difference(bundle, run, pixels_BCHW, wanted_BC, size) for size in sizes)
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
        "largest_difference": worst,
        "tolerance": TOLERANCE,
    }


def file_of(out: Path, format: str) -> Path:
    """Where the file goes."""
    other = {"onnx": ".pt2", "pt2": ".onnx"}[format]
    folder = os.path.isdir(out)  # noqa: PTH112 - False, not an error, where a name is too long
    if out.suffix == other and not folder:
        raise ConfigError(
            f"{out} is to hold {format}.",
            f"a name that ends in .{format}, or a folder.",
            f"rename it, or give --format {other[1:]}.",
        )
    if out.suffix == f".{format}" and not folder:
        return out
    if os.path.isfile(out):  # noqa: PTH113 - likewise
        raise ConfigError(
            f"{out} is a file already.",
            f"a name that ends in .{format}, or a folder.",
            f"give {out}.{format}.",
        )
    return out / f"model.{format}"


# ---------------------------------------------------------------------------- the graph


def whole(bundle: Bundle, body: nn.Module, head: nn.Module) -> nn.Module:
    """Body and head with all that lies between and after them, as `score` goes: uint8 pixels
    (B, 3, S, S) to float32 probabilities (B, C).
    """
    import torch
    from torch import nn

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = body, head

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            logits = self.head(self.body(pixels).half().float()) / bundle.temperature
            made: torch.Tensor = logits.sigmoid() if bundle.multi else logits.softmax(1)
            return made

    return Whole().eval()


def _trace(module: nn.Module, bundle: Bundle) -> ExportedProgram:
    import torch
    from torch.export import Dim

    side = bundle.recipe.size
    blank = torch.zeros((TRACED, 3, side, side), dtype=torch.uint8)
    with torch.no_grad():
        program = torch.export.export(
            module, (blank,), dynamic_shapes={"pixels": {0: Dim("batch", min=1)}}
        )
    for node in program.graph.nodes:  # the paths of this machine's files are nobody's business
        node.meta.pop("stack_trace", None)
    return program


def _onnx(program: ExportedProgram, about: str, file: Path) -> Run:
    """Write the program as ONNX; what runs the file."""
    import onnx
    import onnxruntime
    import torch

    made = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        input_names=["pixels"],
        output_names=["probabilities"],
        verbose=False,
    )
    assert made is not None
    made.model.metadata_props["arrowhead"] = about
    made.save(str(file), external_data=False)
    onnx.checker.check_model(str(file))
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def run(pixels_BCHW: NDArray[np.uint8]) -> NDArray[np.float32]:
        (out,) = session.run(["probabilities"], {"pixels": pixels_BCHW})
        return np.asarray(out)

    return run


def _pt2(program: ExportedProgram, about: str, file: Path) -> Run:
    """Write the program as torch's archive; what runs the file."""
    import torch

    with file.open("wb") as sink:  # by its name torch would ask for one that ends in .pt2
        torch.export.save(program, sink, extra_files={"arrowhead.json": about})
    with file.open("rb") as source:
        module = torch.export.load(source).module()

    def run(pixels_BCHW: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            out: NDArray[np.float32] = module(torch.from_numpy(pixels_BCHW)).numpy()
        return out

    return run


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters talk: in warnings, and on standard output, which is for the result."""
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield


def _must_have_onnx() -> None:
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


def _must_fit(module: nn.Module) -> None:
    size = sum(tensor.nbytes for tensor in module.state_dict().values())
    if size > MAX_ONNX_BYTES:
        raise ConfigError(
            f"The weights are {size / 1e9:.1f} GB, and an ONNX file with its weights inside ends at"
            " 2 GB (protobuf's limit).",
            f"at most {MAX_ONNX_BYTES / 1e9:.1f} GB.",
            "give --format pt2, which has no such limit, or train on a smaller --body.",
        )


def metadata(bundle: Bundle, fingerprint: str) -> str:
    """JSON of all that a caller must know to make pixels and to read probabilities. ONNX holds it
    as the property `arrowhead`, pt2 as the extra file `arrowhead.json`.
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
                "rule": RESIZE[recipe.resize],
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


def _golden(
    bundle: Bundle, path: Path, body: Any, head: nn.Module
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The golden images' pixels (B, 3, S, S), and what the bundle itself gives them here (B, C)."""
    images = [one.data for one in bundle.golden]
    threads = len(os.sched_getaffinity(0))
    with replay.decoder(bundle.recipe, "cpu", threads, max(16, len(images))) as decode:
        pixels = decode(images, [bytes(16)] * len(images))
    if fault := next((fault for fault in pixels.faults if fault), None):
        raise DataError(
            f"{path}: its golden images cannot be read here: {fault}.",
            "the images that the bundle was saved with, to check the file by.",
            "run `arrowhead doctor`; else train again.",
        )
    feature_BD = replay.seen(body, pixels)
    wanted_BC = bundle_format.probabilities(
        head, feature_BD, bundle.temperature, multi=bundle.multi
    )
    view = pixels.views[0][: len(images)].transpose(0, 3, 1, 2)
    return np.ascontiguousarray(view), wanted_BC


def _drawn(
    bundle: Bundle, path: Path, body: Any, head: nn.Module
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """As `_golden`, for a bundle without: pixels drawn from one seed, from blots to noise."""
    import torch
    from torch.nn.functional import interpolate

    draw, side = torch.Generator().manual_seed(0), bundle.recipe.size
    grains = [torch.rand((1, 3, cells, cells), generator=draw) for cells in (2, 3, 5, 8, 16, side)]
    views = torch.cat([interpolate(one, (side, side), mode="bilinear") for one in grains])
    view_BCHW = (views * 255).round().to(torch.uint8)
    with torch.inference_mode():
        feature_BD = body(view_BCHW).cpu().numpy().astype(np.float16).astype(np.float32)
    wanted_BC = bundle_format.probabilities(
        head, feature_BD, bundle.temperature, multi=bundle.multi
    )
    return view_BCHW.numpy(), wanted_BC


def _difference(
    bundle: Bundle,
    run: Run,
    pixels_BCHW: NDArray[np.uint8],
    wanted_BC: NDArray[np.float32],
    size: int,
) -> float:
    """How far the file's probabilities are from the bundle's, in batches of `size` images.

    Raises DataError where that is too far, or another label.
    """
    starts = range(0, len(pixels_BCHW), size)
    made_BC = np.concatenate([run(pixels_BCHW[at : at + size]) for at in starts])
    worst = float(np.abs(made_BC - wanted_BC).max())
    changed_B = (bundle.given(made_BC) != bundle.given(wanted_BC)).any(1)
    if not bundle.golden:  # drawn pixels may lie where a label hangs by a thread
        changed_B &= bundle.margin(wanted_BC) > 2 * TOLERANCE
    changed = int(changed_B.sum())
    if changed or not worst <= TOLERANCE:
        images = "golden images" if bundle.golden else "drawn pixels"
        raise DataError(
            f"The file gives the {images} other probabilities than the bundle (batches of"
            f" {size}): largest difference {worst:.2g}, {changed} of {len(made_BC)} labels"
            " changed. It was not kept.",
            f"a difference of at most {TOLERANCE:g}, and the same labels.",
            "try the other --format, or another torch and onnxruntime; and tell us, please.",
        )
    return worst
