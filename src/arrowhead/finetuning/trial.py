"""A short fine-tuning on some images of a pixel cache, tested on others.

TrialRows          which images train, and which are tested
  -> run_trial     every worker; the logits of the tested images, and the seconds of each step
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.finetuning import run as finetuning_run
from arrowhead.finetuning.pixel_cache import PixelCache
from arrowhead.finetuning.run import Request
from arrowhead.finetuning.trainer import Finetuning, Samples
from arrowhead.runtime.worker import Worker


@dataclass(frozen=True, slots=True)
class TrialRows:
    """Positions in the cache, int64; `steps`: most steps, None for all."""

    train: NDArray[np.int64]
    test: NDArray[np.int64]
    steps: int | None = None


def run_trial(
    worker: Worker, cache_path: Path, folder: Path, request: Request, rows: TrialRows
) -> dict[str, Any]:
    """Fine-tune on `rows.train` from the weights in `folder`, and test on `rows.test`.

    Every worker calls this function, and the result of rank 0 counts; it reports {"step", "of",
    "epoch"}. Nothing is saved: a trial that was stopped starts again.

    Returns:
        logit, float32 (tested images, C), and seconds_per_image of training: that of a step of
        median length.

    Raises:
        OutOfMemoryRefusal: A part of a step does not fit into the device's memory.
    """
    import torch

    cache = PixelCache(cache_path)
    samples = Samples(
        label=torch.from_numpy(np.array(cache.label)),
        train=rows.train,
        valid=rows.test,
        classes=list(cache.classes),
    )
    with finetuning_run.memory_refusal(worker, request.config):
        tuned = finetuning_run.load_network(folder, request, worker.device)
        training = finetuning_run.make_training(worker, cache, samples, tuned, request)
        seconds, sizes = _train(worker, training, rows.steps)
        logit_NC = _test(worker, training, rows.test)
    later = slice(1, None) if len(seconds) > 1 else slice(None)  # the first one warms up
    rate = np.median(np.array(seconds[later]) / np.array(sizes[later]))
    return {"logit": logit_NC, "seconds_per_image": float(rate)}


def _train(worker: Worker, training: Finetuning, most: int | None) -> tuple[list[float], list[int]]:
    """Take the steps of all epochs, or the first ones; the seconds and the images of each."""
    seconds, sizes = [], []
    plan, total = training.plan, min(training.plan.steps, most or training.plan.steps)
    began, images = perf_counter(), 0
    for epoch in range(training.config.total_epochs):
        for part, pixels in training.batches(epoch, 0):
            training.train_part(part, pixels)
            images += part.seen.total
            if not part.is_last:
                continue
            training.take_loss()  # also waits for the device
            training.step += 1
            seconds.append(perf_counter() - began)
            sizes.append(images)
            began, images = perf_counter(), 0
            if worker.rank == 0:
                worker.report({"step": training.step, "of": total, "epoch": epoch})
            if training.step == total:
                return seconds, sizes
    raise AssertionError(f"{plan.steps} steps were planned")


def _test(worker: Worker, training: Finetuning, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """The logits of some images, float32 (n, C), on every worker."""
    import torch
    import torch.distributed as dist

    place = {int(row): number for number, row in enumerate(rows)}
    logit_NC = torch.zeros(len(rows), len(training.samples.classes), device=worker.device)
    for part, logit_CB in training.predict(rows):
        where = torch.tensor([place[int(row)] for row in part], device=worker.device)
        logit_NC[where] = logit_CB.mT.to(worker.device)
    if worker.world_size > 1:
        dist.all_reduce(logit_NC)  # the others' rows are zero
    result: NDArray[np.float32] = logit_NC.cpu().numpy()
    return result
