"""The formats that hold the whole computation as a graph: ONNX, OpenVINO and pt2.

    inference_module         pixels to probabilities, as one torch module
      -> trace               an ExportedProgram for any batch size
      -> write_onnx, …       the file, and a function that runs it

Every file contains the weights and `metadata`. OpenVINO's is made from the ONNX graph.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from arrowhead.bundle.reference import Run
from arrowhead.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.export import ExportedProgram

OPSET = 20
TRACE_BATCH_SIZE = 2  # torch may treat a size of 1 as a constant
MAX_ONNX_BYTES = 2**31 - 2**24  # of weights: protobuf's limit is 2 GiB, and the graph needs some


def convert_to_half(feature_extractor: nn.Module) -> None:
    """Convert the network of a body to float16, in place.

    Its input is still normalized in float32, and its output becomes float32 again, as on a GPU.
    """
    from torch import nn

    class HalfPrecision(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net.half()

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.net(input.half())
            return out

    assert isinstance(feature_extractor.net, nn.Module)
    feature_extractor.net = HalfPrecision(feature_extractor.net)


def trace(module: nn.Module, side: int) -> ExportedProgram:
    """Trace a module that takes uint8 pixels (B, 3, side, side), for any B."""
    import torch
    from torch.export import Dim

    example = torch.zeros((TRACE_BATCH_SIZE, 3, side, side), dtype=torch.uint8)
    with torch.no_grad():
        program = torch.export.export(
            module, (example,), dynamic_shapes={"pixels": {0: Dim("batch", min=1)}}
        )
    for node in program.graph.nodes:  # would publish paths of this machine
        node.meta.pop("stack_trace", None)
    return program


def write_onnx(program: ExportedProgram, metadata_json: str, file: Path) -> Run:
    """Write the program as ONNX; return a function that runs the file."""
    import onnx
    import onnxruntime

    _save_onnx(program, metadata_json, file)
    onnx.checker.check_model(str(file))
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def run(pixels_BCHW: NDArray[np.uint8]) -> NDArray[np.float32]:
        (out,) = session.run(["probabilities"], {"pixels": pixels_BCHW})
        return np.asarray(out)

    return run


def _save_onnx(program: ExportedProgram, metadata_json: str, file: Path) -> None:
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


def write_openvino(
    program: ExportedProgram, metadata_json: str, files: tuple[Path, Path], *, half: bool
) -> Run:
    """Write the program as OpenVINO's intermediate representation; return a function that runs it.

    Args:
        program: In float32.
        metadata_json: Becomes the entry `arrowhead` of the model's runtime information.
        files: Drafts of the .xml and the .bin file.
        half: Whether weights are stored as float16; the plugin of a device chooses the precision of
            the arithmetic.
    """
    import openvino

    core = openvino.Core()
    with tempfile.TemporaryDirectory(dir=files[0].parent, suffix=".draft") as folder:
        graph, saved = Path(folder) / "model.onnx", Path(folder) / "model.xml"
        _save_onnx(program, metadata_json, graph)
        # Not openvino.convert_model, which sends usage statistics.
        model = core.read_model(graph)
        model.set_rt_info(metadata_json, ["arrowhead"])
        openvino.save_model(model, saved, compress_to_fp16=half)
        del model
        compiled = core.compile_model(
            core.read_model(saved), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
        for source, file in zip((saved, saved.with_suffix(".bin")), files, strict=True):
            file.write_bytes(source.read_bytes())

    def run(pixels_BCHW: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.array(compiled({"pixels": pixels_BCHW})["probabilities"])

    return run


def write_pt2(program: ExportedProgram, metadata_json: str, file: Path) -> Run:
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
def silence_exporters() -> Iterator[None]:
    """Drop the exporters' warnings and keep their output off stdout, which is for the result."""
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield


def require_packages(format: str) -> None:
    """Raise ConfigError if a package that writes or checks the format is not installed."""
    if format not in ("onnx", "openvino"):
        return
    packages = "onnx, onnxruntime and onnxscript" if format == "onnx" else "openvino and onnxscript"
    try:
        import onnxscript  # noqa: F401  # torch's exporter is written in it

        if format == "onnx":
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
        else:
            import openvino  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{'ONNX' if format == 'onnx' else 'OpenVINO'} cannot be written here: {error}.",
            f"the packages {packages}.",
            f"pip install 'arrowhead[{format}]', or give --format pt2.",
        ) from error


def check_onnx_size(module: nn.Module) -> None:
    """Raise ConfigError if the weights are too large for an ONNX file that contains them."""
    size = sum(tensor.nbytes for tensor in module.state_dict().values())
    if size > MAX_ONNX_BYTES:
        raise ConfigError(
            f"The weights are {size / 1e9:.1f} GB, but an ONNX file with its weights inside ends at"
            " 2 GB (protobuf's limit).",
            f"at most {MAX_ONNX_BYTES / 1e9:.1f} GB.",
            "give --format pt2, which has no such limit, or train on a smaller --body.",
        )
