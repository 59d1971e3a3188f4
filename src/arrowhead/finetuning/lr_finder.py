"""The LR finder on an unfrozen network: a rising learning rate for all layer groups.

The rates of the groups keep their ratios; the rate of the test is the head's. The network is built
for the test from the weights to start from, which stay as they are.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arrowhead.finetuning import run
from arrowhead.finetuning.pixel_cache import PixelCache
from arrowhead.finetuning.run import Request
from arrowhead.finetuning.trainer import Finetuning, Part
from arrowhead.runtime.worker import Worker
from arrowhead.training import lr_finder
from arrowhead.training.lr_finder import MAX_LOSS, FinderConfig

if TYPE_CHECKING:
    from torch import Tensor


def run_lr_finder(
    worker: Worker, cache_path: Path, folder: Path, request: Request, finder: FinderConfig
) -> dict[str, Any]:
    """Run the range test; every worker calls this function. Returns the curve (`Curve.plain`).

    When to stop is decided from the loss of all workers, so none stops alone.
    """
    import torch

    cache = PixelCache(cache_path)
    rates = lr_finder.rate_range(finder)
    raw = np.full((finder.seeds, finder.steps), np.nan)
    with torch.random.fork_rng():
        for seed, losses in enumerate(raw):
            config = dataclasses.replace(request.config, seed=request.config.seed + seed)
            seeded = dataclasses.replace(request, config=config)
            samples = run.load_samples(cache, seeded)
            tuned = run.load_network(folder, seeded, worker.device)
            training = run.make_training(worker, cache, samples, tuned, seeded)
            top = config.group_rates[-1]
            for step, parts in enumerate(itertools.islice(_steps(training), finder.steps)):
                for part, pixels in parts:
                    training.train_part(part, pixels, float(rates[step]) / top)
                loss = training.take_loss()
                losses[step] = loss if abs(loss) <= MAX_LOSS else np.inf
                if np.isnan(lr_finder.smooth(losses[None, : step + 1])[0, -1]):
                    break
                if worker.rank == 0:
                    worker.report({"step": step + 1, "of": finder.steps, "epoch": 0})
    return lr_finder.suggest(rates, lr_finder.smooth(raw)).plain()


def _steps(training: Finetuning) -> Iterator[list[tuple[Part, Tensor]]]:
    """The steps of epoch after epoch: their parts with their pixels."""
    for epoch in itertools.count():
        step: list[tuple[Part, Tensor]] = []
        for part, pixels in training.batches(epoch, 0):
            step.append((part, pixels))
            if part.is_last:
                yield step
                step = []
