"""Compare the images per second of Arrowhead's extraction and a plain torchvision loop, in one run.

    python bench/extract.py [--data FOLDER] [--images N] [--rounds R] [--body NAME]

Three alternatives run in turns, round by round, so that a busy machine slows all of them:

    plain           ImageFolder, DataLoader (one worker process per core), eager network
    channels-last   the same with network and batches in channels-last memory format
    arrowhead       read, DALI, folded batch norms, channels-last, features to float16

Weights are random, because the speed does not depend on them. Medians and ratios are printed and
written to bench/results/. Without --data, images are drawn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms

from arrowhead import demo
from arrowhead.data import chunks as data_chunks
from arrowhead.data import sources
from arrowhead.decode.pixels import PixelConfig
from arrowhead.features import backbone, extract, networks
from arrowhead.features.backbone import Body, BodyConfig
from arrowhead.features.extract import ExtractConfig, FeatureCache, FeaturePipeline
from arrowhead.runtime.worker import Worker

CORES = len(os.sched_getaffinity(0))


def loader(folder: Path, images: int) -> DataLoader[Any]:
    """torchvision's usual data loader, with its worker processes started.

    They are forked here, before any other library has threads: a later fork may hang.
    """
    steps = [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor()]
    steps.append(transforms.Normalize(networks.IMAGENET_MEAN, networks.IMAGENET_STD))
    data = datasets.ImageFolder(folder, transforms.Compose(steps))
    data.samples = data.samples[:images]
    batches = DataLoader(data, batch_size=32, num_workers=CORES, persistent_workers=True)
    for _ in batches:
        pass
    return batches


def plain(batches: DataLoader[Any], body: str, memory_format: torch.memory_format) -> float:
    """Seconds for one pass of the torchvision loop."""
    net = models.get_model(body, weights=None).eval().to(memory_format=memory_format)
    start = perf_counter()
    with torch.inference_mode():
        for batch, _ in batches:
            net(batch.to(memory_format=memory_format))
    return perf_counter() - start


def pump(folder: Path, body: str, images: int) -> tuple[float, dict[str, float]]:
    """Seconds of Arrowhead for this many images, and the busy seconds of its stages."""
    weights = backbone.load(BodyConfig(body=body, weights="random"))
    net = Body(body, weights.state, pool="avg", mean=weights.mean, std=weights.std)
    recipe = extract.make_recipe(PixelConfig(), BodyConfig(body=body), weights, net.width)
    catalog = sources.labelled_catalog(folder).subset(range(images))
    runs = data_chunks.split_into_chunks(catalog.paths, 256)
    chunks = [(number, catalog.subset(rows)) for number, rows in enumerate(runs)]
    worker = Worker(0, 1, "cpu", CORES, lambda: None, lambda report: None)
    with FeaturePipeline(worker, net, recipe, PixelConfig(), ExtractConfig()) as extraction:
        start = perf_counter()
        rows = sum(len(chunk.paths) for chunk in extraction(chunks, FeatureCache()))
        seconds = perf_counter() - start
        assert rows == images
        return seconds, extraction.timer.take() | {"workers": seconds}


def main() -> None:
    """Measure, print the rates and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with one folder per class")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--body", default="resnet34")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if args.data is None:
            demo.draw(Path(scratch), per_class=-(-args.images // 2))
        folder = args.data or Path(scratch) / "train"
        nchw, nhwc = torch.contiguous_format, torch.channels_last
        images = min(args.images, len(sources.labelled_catalog(folder)))
        batches = loader(folder, images)
        ways: dict[str, Callable[[], float]] = {
            "plain": lambda: plain(batches, args.body, nchw),
            "channels-last": lambda: plain(batches, args.body, nhwc),
        }
        times: dict[str, list[float]] = {name: [] for name in [*ways, "arrowhead"]}
        for _ in range(args.rounds):
            for name, way in ways.items():
                times[name].append(way())
            seconds, stages = pump(folder, args.body, images)
            times["arrowhead"].append(seconds)
    rates = {name: images / statistics.median(taken) for name, taken in times.items()}
    for name, rate in rates.items():
        print(f"{name:<14} {rate:6.1f} img/s  {rate / rates['plain']:.2f} x plain")
    roofline = extract.roofline(stages, images, 1)
    print(roofline)
    result = {
        "command": f"python bench/extract.py --images {args.images} --rounds {args.rounds}"
        f" --body {args.body}" + (" --data (real photos)" if args.data else ""),
        "machine": f"{platform.machine()}, {CORES} cores, torch {torch.__version__}",
        "images_per_second": rates,
        "rounds_seconds": times,
        "roofline": roofline,
    }
    file = Path(__file__).parent / "results" / f"extract_cpu_{args.body}_{date.today()}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {file}")


if __name__ == "__main__":
    main()
