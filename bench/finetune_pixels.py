"""Compare the images per second of fine-tuning with those of a plain script, in one run.

    python bench/finetune_pixels.py [--data FOLDER] [--images N] [--rounds R] [--body NAME]

All alternatives run in turns, round by round, so that a busy machine slows all of them. Each pass
is one epoch after the first, with augmentation (random crop, mirroring, rotation, brightness and
contrast). First without a network:

    torchvision        ImageFolder, DataLoader (one worker process per core), its transforms
    decoded            Arrowhead, but every image is decoded again
    cached             Arrowhead, from the pixel cache

then with forward and backward pass and the optimizer's step, batches of 32:

    plain              that DataLoader, DistributedDataParallel, torchvision's network
    channels-last      the same with network and batches in channels-last memory format
    arrowhead          `arrowhead finetune`: pixel cache, batch norms with frozen statistics
    arrowhead-bn       the same with --batch-norm train, as the plain script

Beside the rates by the clock stand those by the CPU time of this process and its children: on a
busy machine they are what to compare. Weights are random, because the speed does not depend on
them. Medians and ratios are printed and written to bench/results/. Without --data, images are
drawn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import tempfile
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms

from arrowhead import demo
from arrowhead.commands.pixel_cache import build_pixel_cache
from arrowhead.decode.decoder import Decoder
from arrowhead.decode.pixels import PixelConfig
from arrowhead.features import backbone, extract, networks
from arrowhead.features.backbone import Body, BodyConfig
from arrowhead.features.feature_config import FeatureConfig
from arrowhead.finetuning import network
from arrowhead.finetuning.augmentation import AugmentConfig
from arrowhead.finetuning.config import FinetuneConfig
from arrowhead.finetuning.network import FinetuneNetwork
from arrowhead.finetuning.pixel_batches import PixelBatches
from arrowhead.finetuning.pixel_cache import PixelCache
from arrowhead.finetuning.trainer import Finetuning, Samples
from arrowhead.training import heads

CORES = len(os.sched_getaffinity(0))
BATCH = 32
MEAN, STD = networks.IMAGENET_MEAN, networks.IMAGENET_STD
Loader = DataLoader[Any]


def loader(folder: Path, images: int) -> Loader:
    """torchvision's usual loader of augmented training images, with its processes started.

    They are forked here, before any other library has threads: a later fork may hang.
    """
    steps = [
        transforms.RandomResizedCrop(224, scale=(0.35, 1)),
        transforms.RandomHorizontalFlip(),
        transforms.RandomRotation(10),
        transforms.ColorJitter(0.1, 0.1),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    data = datasets.ImageFolder(folder, transforms.Compose(steps))
    data.samples = data.samples[:: len(data.samples) // images][:images]
    batches = DataLoader(data, BATCH, shuffle=True, num_workers=CORES, persistent_workers=True)
    for _ in batches:
        pass
    return batches


class Plain:
    """The training of a plain script."""

    def __init__(self, batches: Loader, body: str, memory_format: torch.memory_format) -> None:
        net = models.get_model(body, weights=None, num_classes=2)
        self._batches, self._format = batches, memory_format
        self._net = nn.parallel.DistributedDataParallel(net.train().to(memory_format=memory_format))
        self._optimizer = torch.optim.AdamW(self._net.parameters(), 1e-4)

    def epoch(self) -> float:
        """Seconds of an epoch."""
        start = perf_counter()
        for batch, label in self._batches:
            logit = self._net(batch.to(memory_format=self._format))
            self._optimizer.zero_grad()
            nn.functional.cross_entropy(logit, label % 2).backward()
            self._optimizer.step()
        return perf_counter() - start


class Tuning:
    """The training of Arrowhead, on the training images of a pixel cache."""

    def __init__(self, cache: PixelCache, rows: NDArray[np.int64], body: str, norms: Any) -> None:
        weights = backbone.load(BodyConfig(body=body, weights="random"))
        net = Body(body, weights.state, pool="avg", mean=MEAN, std=STD)
        recipe = extract.make_recipe(PixelConfig(), BodyConfig(body=body), weights, net.width)
        head = heads.build_head("linear", net.width, 2).state_dict()
        tensors = {f"{network.BODY}{name}": t for name, t in weights.state.items()}
        tensors |= {f"{network.HEAD}{name}": t for name, t in head.items()}
        tuned = FinetuneNetwork(recipe.to_dict(), "linear", 2, tensors, "cpu")
        config = FinetuneConfig(batch_size=BATCH, batch_norm=norms, epochs=100)
        samples = Samples(
            label=torch.from_numpy(np.arange(len(cache)) % 2),
            train=rows,
            valid=rows[:2],
            classes=("a", "b"),
        )
        self._batches = batches(cache)
        self._training = Finetuning(tuned, samples, self._batches, config, AugmentConfig())
        self._epoch = 0

    def epoch(self) -> float:
        """Seconds of an epoch."""
        self._epoch += 1
        parts = list(self._training.plan.parts(self._epoch, 0))
        start = perf_counter()
        pixels = self._batches.augmented(self._epoch, [part.rows for part in parts])
        for part, batch in zip(parts, pixels, strict=True):
            self._training.train_part(part, batch)
        return perf_counter() - start


def batches(cache: Any) -> PixelBatches:
    """Arrowhead's batches of images."""
    return PixelBatches(
        cache, AugmentConfig(), PixelConfig(), MEAN, STD, batch_size=BATCH + 2, threads=CORES
    )


class DecodedAgain:
    """Looks like a pixel cache, but decodes the images of each batch from their files."""

    def __init__(self, cache: PixelCache, files: list[Path]) -> None:
        self._files, self.size, self.image_id = files, cache.size, cache.image_id
        pixels = PixelConfig(size=cache.side, resize="squash", interpolation="bicubic")
        self._decoder = Decoder(pixels, batch_size=BATCH, threads=CORES)
        self._decoded: dict[int, NDArray[np.uint8]] = {}

    def decoding(self, steps: list[NDArray[np.int64]]) -> Any:
        """The steps; the images of each are decoded when it is taken."""
        for index in steps:
            encoded = [self._files[i].read_bytes() for i in index]
            images = self._decoder(encoded, [bytes(16)] * len(index)).views[0]
            self._decoded = dict(zip(index.tolist(), images, strict=True))
            yield index

    def image(self, index: int) -> NDArray[np.uint8]:
        """An image of the step."""
        return self._decoded[int(index)]


def count(items: Iterator[Any]) -> float:
    """Seconds that it takes to compute all items."""
    start = perf_counter()
    for _ in items:
        pass
    return perf_counter() - start


def cpu_seconds() -> float:
    """CPU time of this process and its running children, in seconds."""
    ticks = 0
    for children in Path("/proc/self/task").glob("*/children"):
        for pid in children.read_text().split():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return process_time() + ticks / os.sysconf("SC_CLK_TCK")


def measure(args: argparse.Namespace, folder: Path, scratch: Path) -> dict[str, Any]:
    """Seconds per epoch of every alternative, for each round: {"wall": {name: […]}, "cpu": …}."""
    torch_batches = loader(folder, args.images)  # before other libraries have threads
    build_pixel_cache(folder, scratch / "pixels", FeatureConfig())
    cache = PixelCache(scratch / "pixels")
    step = len(cache) // args.images
    rows = np.arange(len(cache))[::step][: args.images]
    steps = [rows[first : first + BATCH] for first in range(0, len(rows), BATCH)]
    again = DecodedAgain(cache, sorted(folder.rglob("*.jpg")))
    input_only, decoding = batches(cache), batches(again)
    address = f"tcp://127.0.0.1:{free_port()}"
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    nchw, nhwc = torch.contiguous_format, torch.channels_last
    ways: dict[str, Callable[[], float]] = {
        "torchvision": lambda: count(iter(torch_batches)),
        "decoded": lambda: count(decoding.augmented(1, again.decoding(steps))),
        "cached": lambda: count(input_only.augmented(1, steps)),
        "plain": Plain(torch_batches, args.body, nchw).epoch,
        "channels-last": Plain(torch_batches, args.body, nhwc).epoch,
        "arrowhead": Tuning(cache, rows, args.body, "frozen").epoch,
        "arrowhead-bn": Tuning(cache, rows, args.body, "train").epoch,
    }
    times: dict[str, Any] = {clock: {name: [] for name in ways} for clock in ("wall", "cpu")}
    for number in range(args.rounds + 1):
        for name, way in ways.items():
            torch.set_num_threads(CORES)  # the same for all: idle threads that wait cost CPU time
            before = cpu_seconds()
            seconds = way()
            if number:  # the first round is the first epoch: not counted
                times["wall"][name].append(seconds)
                times["cpu"][name].append((cpu_seconds() - before) / CORES)
    dist.destroy_process_group()
    return times


def free_port() -> int:
    """A TCP port that nobody uses."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def main() -> None:
    """Measure, print the rates and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with one folder per class")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--body", default="mobilenet_v2")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if args.data is None:
            demo.draw(Path(scratch), per_class=-(-args.images // 2))
        folder = args.data or Path(scratch) / "train"
        times = measure(args, folder, Path(scratch))
    rates = {
        clock: {name: args.images / statistics.median(taken) for name, taken in part.items()}
        for clock, part in times.items()
    }
    for name in rates["wall"]:
        base = "torchvision" if name in ("torchvision", "decoded", "cached") else "plain"
        shown = [
            f"{rate[name]:7.1f} img/s {rate[name] / rate[base]:5.2f} x {base}"
            for rate in rates.values()
        ]
        print(f"{name:<14} {shown[0]}   by CPU time: {shown[1]}")
    result = {
        "command": f"python bench/finetune_pixels.py --images {args.images} --rounds {args.rounds}"
        f" --body {args.body}" + (" --data (real photos)" if args.data else ""),
        "machine": f"{platform.machine()}, {CORES} cores, torch {torch.__version__}",
        "images_per_second": rates,
        "rounds_seconds": times,
    }
    file = Path(__file__).parent / "results" / f"finetune_cpu_{args.body}_{date.today()}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {file}")


if __name__ == "__main__":
    main()
