"""Images per second through Arrowhead's pump and through the plain torchvision loop, in one run.

    python bench/extract.py [--data FOLDER] [--images N] [--rounds R] [--body NAME]

Three ways take turns, round by round, so that a busy machine slows all of them:

    plain           ImageFolder, DataLoader (one worker process per core), eager network
    channels-last   the same with the network and its batches in channels-last order
    arrowhead       read, DALI, folded batch norms, channels-last, features to float16

Weights are random: speed does not depend on them. Medians and ratios are printed and written to
bench/results/. Without --data, images are drawn.
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
from arrowhead.data.catalog import Catalog
from arrowhead.decode.pixels import PixelConfig
from arrowhead.features import backbone, extract
from arrowhead.features.backbone import Body, BodyConfig
from arrowhead.features.extract import ExtractConfig, FeatureCache, FeaturePipeline
from arrowhead.runtime.worker import Worker

CORES = len(os.sched_getaffinity(0))


def loader(folder: Path, images: int) -> DataLoader[Any]:
    """torchvision's ordinary loader, its worker processes up and running.

    They are forked here, before any other library has threads: a later fork may hang for ever.
    """
    clean = [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor()]
    norm = transforms.Normalize(backbone.IMAGENET_MEAN, backbone.IMAGENET_STD)
    data = datasets.ImageFolder(folder, transforms.Compose([*clean, norm]))
    data.samples = data.samples[:images]
    ready = DataLoader(data, batch_size=32, num_workers=CORES, persistent_workers=True)
    for _ in ready:
        pass
    return ready


def plain(batches: DataLoader[Any], body: str, memory_format: torch.memory_format) -> float:
    """Seconds for one pass of torchvision's own loop."""
    net = models.get_model(body, weights=None).eval().to(memory_format=memory_format)
    began = perf_counter()
    with torch.inference_mode():
        for batch, _ in batches:
            net(batch.to(memory_format=memory_format))
    return perf_counter() - began


def pump(folder: Path, body: str, images: int) -> tuple[float, dict[str, float]]:
    """Seconds for as many images through Arrowhead, and its stages' busy seconds."""
    weights = backbone.load(BodyConfig(body=body, weights="random"))
    net = Body(body, weights.state, pool="avg", mean=weights.mean, std=weights.std)
    recipe = extract.make_recipe(PixelConfig(), BodyConfig(body=body), weights, net.width)
    catalog = first(sources.labelled(folder), images)
    chunks = list(enumerate(data_chunks.chunks(catalog.paths, 256)))
    worker = Worker(0, 1, "cpu", CORES, lambda: None, lambda report: None)
    with FeaturePipeline(worker, net, recipe, PixelConfig(), ExtractConfig()) as through:
        began = perf_counter()
        rows = sum(len(chunk.paths) for chunk in through(catalog, chunks, FeatureCache()))
        seconds = perf_counter() - began
        assert rows == images
        return seconds, through.timer.take() | {"workers": seconds}


def first(catalog: Catalog, images: int) -> Catalog:
    """The first rows of a catalog."""
    return Catalog(
        root=catalog.root,
        paths=catalog.paths[:images],
        sizes=catalog.sizes[:images],
        stamps=catalog.stamps[:images],
        labels=catalog.labels[:images],
        splits=catalog.splits[:images],
    )


def main() -> None:
    """Measure, print, write."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--data", type=Path, help="folder with one folder per class")
    asked.add_argument("--images", type=int, default=256)
    asked.add_argument("--rounds", type=int, default=3)
    asked.add_argument("--body", default="resnet34")
    args = asked.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if args.data is None:
            demo.draw(Path(scratch), per_class=-(-args.images // 2))
        folder = args.data or Path(scratch) / "train"
        nchw, nhwc = torch.contiguous_format, torch.channels_last
        images = min(args.images, len(sources.labelled(folder)))
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
