"""Compare exported files with their bundle, on photos: results and speed on this CPU.

    .venv/bin/python bench/exported.py out/bundle PHOTOS --images 200

For every format this prints its size, the largest difference of a probability, the number of
changed labels, and images per second, in turns (the median of the rounds). The last line is the
published torchvision weights with Pillow's pixels instead of the decoder's.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.bundle import export, preparation, replay
from arrowhead.bundle import format as bundle_format
from arrowhead.bundle.export import ExportConfig
from arrowhead.bundle.format import Bundle

BATCH_SIZE = 16
FORMATS = (
    ("onnx", "fp32"),
    ("onnx", "fp16"),
    ("openvino", "fp32"),
    ("openvino", "fp16"),
    ("pt2", "fp32"),
)
Run = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


def main() -> None:
    """Export, measure, print, and write JSON with --out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    bundle = bundle_format.load(args.bundle)
    files = sorted(args.photos.rglob("*.jpg"))
    files = random.Random(0).sample(files, min(args.images, len(files)))
    images = [file.read_bytes() for file in files]
    body, head = bundle.make_body(), bundle.make_head()
    with replay.clean_decoder(bundle.recipe, "cpu", 2, len(images)) as decode:
        pixels = decode(images, [bytes(16)] * len(images))
        expected = bundle_format.probabilities(
            head,
            replay.features_of_pixels(body, pixels),
            bundle.temperature,
            multi=bundle.multi,
        )
        view = np.ascontiguousarray(pixels.views[0][: len(images)].transpose(0, 3, 1, 2))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for format, precision in FORMATS:
            config = ExportConfig(format=format, precision=precision)
            result = export.export(args.bundle, Path(folder) / f"{format}-{precision}", config)
            runs[f"{format} {precision}"] = load(Path(result["file"]))
            rows.append({"format": f"{format} {precision}", "bytes": result["bytes"]})
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(args.rounds):
            for row, (name, run) in zip(rows, runs.items(), strict=True):
                start = time.perf_counter()
                prob = np.concatenate(
                    [run(view[at : at + BATCH_SIZE]) for at in range(0, len(view), BATCH_SIZE)]
                )
                seconds[name].append(time.perf_counter() - start)
                row |= compared(bundle, prob, expected)
                row["images_per_second"] = len(view) / median(seconds[name])
        config = ExportConfig(format="torchvision")
        result = export.export(args.bundle, Path(folder), config)
        rows.append(
            {"format": "torchvision, Pillow's pixels", "bytes": result["bytes"]}
            | compared(bundle, with_pillow(bundle, result, files), expected)
        )
    for row in rows:
        print(json.dumps(row))
    if args.out:
        args.out.write_text(json.dumps({"images": len(files), "rows": rows}, indent=1) + "\n")


def load(file: Path) -> Run:
    """A function that runs an exported file."""
    if file.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        return lambda batch: session.run(None, {"pixels": batch})[0]
    if file.suffix == ".xml":
        import openvino

        model = openvino.compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return lambda batch: np.array(model({"pixels": batch})[0])
    import torch

    module = torch.export.load(file).module()

    def run(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return np.asarray(module(torch.from_numpy(batch)).numpy())

    return run


def compared(
    bundle: Bundle, prob: NDArray[np.float32], expected: NDArray[np.float32]
) -> dict[str, Any]:
    """The largest difference, and the number of images with other labels."""
    changed = (bundle.predict_labels(prob) != bundle.predict_labels(expected)).any(1)
    return {
        "largest_difference": float(np.abs(prob - expected).max()),
        "median_difference": float(np.median(np.abs(prob - expected).max(1))),
        "changed_labels": int(changed.sum()),
    }


def with_pillow(bundle: Bundle, result: dict[str, Any], files: list[Path]) -> NDArray[np.float32]:
    """Probabilities as the code of a model card computes them."""
    import safetensors.torch
    import torch
    import torchvision
    from PIL import Image, ImageOps
    from torchvision import transforms

    names = {"torchvision": torchvision, "transforms": transforms}
    names |= {"Image": Image, "ImageOps": ImageOps}
    exec(preparation.transform_code(bundle.recipe, normalized=True), names)
    net = eval(result["build"], names)
    net.load_state_dict(safetensors.torch.load_file(result["file"]))
    net.eval()
    rows = []
    with torch.inference_mode():
        for file in files:
            image = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
            logits = net(names["prepare"](image)[None])
            rows.append(logits.sigmoid() if bundle.multi else logits.softmax(1))
    return np.asarray(torch.cat(rows).numpy())


if __name__ == "__main__":
    main()
