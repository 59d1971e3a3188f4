"""A fine-tuning on the workers: what it is given, its checkpoints, and its result.

Request            recipe, head, settings: plain values, and the folders of cache and start
-> run_finetune  every worker; resumes from the newest checkpoint, between any two steps
-> result        metrics of each epoch; the tensors are in the last checkpoint
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from arrowhead import __version__, fileio
from arrowhead.errors import ConfigError
from arrowhead.features import extract
from arrowhead.features.recipe import Recipe
from arrowhead.finetuning import network
from arrowhead.finetuning.augmentation import AugmentConfig
from arrowhead.finetuning.config import FinetuneConfig
from arrowhead.finetuning.network import FinetuneNetwork
from arrowhead.finetuning.pixel_batches import PixelBatches
from arrowhead.finetuning.pixel_cache import PixelCache
from arrowhead.finetuning.trainer import Clock, Finetuning, Samples
from arrowhead.runtime.worker import Worker
from arrowhead.training import checkpoint, dataset
from arrowhead.training.batches import DistributedContext
from arrowhead.training.checkpoint import Checkpoint
from arrowhead.training.config import TrainConfig
from arrowhead.training.dataset import Data, InMemoryFeatures, Trial

if TYPE_CHECKING:
    from torch import Tensor

START_FILE = "start.safetensors"
PROGRESS_SECONDS = 1.0
GPU_DECISION_STEPS = 10  # asking rank 0 makes the GPU wait for the CPU


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What to fine-tune, and how.

    Attributes:
        recipe: Of the body's features, one view.
        architecture: Of the head: linear or lesson.
        classes: The classes' names, in the order of the head's outputs.
        config: How it is trained.
        augment: How images are augmented.
        start: Hash of the weights to start from.
    """

    recipe: Recipe
    architecture: str
    classes: tuple[str, ...]
    config: FinetuneConfig
    augment: AugmentConfig
    start: str

    def key(self, cache: PixelCache) -> str:
        """A hash of the settings and images, which checkpoints belong to.

        The size of the parts of a step is not in it: it may shrink when memory is short.
        """
        config = dataclasses.asdict(self.config)
        for name in ("micro_batch", "checkpoint_seconds"):
            del config[name]
        config["batch_size"] = self.config.global_batch
        images = hashlib.sha256(cache.image_id.tobytes())
        for array in (cache.label, cache.split.astype("S5")):
            images.update(np.ascontiguousarray(array).tobytes())
        content = [
            __version__,
            self.recipe.to_json(),
            [self.architecture, *self.classes],
            config,
            dataclasses.asdict(self.augment),
            self.start,
            cache.side,
            images.hexdigest(),
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class OutOfMemoryRefusal(ConfigError):
    """The device has too little memory for a part of a step.

    smaller: the size of the parts to try next; 0: there is none.
    """

    def __init__(self, found: str, wanted: str, do: str, smaller: int = 0) -> None:
        super().__init__(found, wanted, do)
        self.args = (found, wanted, do, smaller)  # what pickling rebuilds it from
        self.smaller = smaller


def run_finetune(
    worker: Worker, cache_path: Path, folder: Path, request: Request, run_id: str | None
) -> dict[str, Any]:
    """Fine-tune; every worker calls this function, and the result of rank 0 counts.

    Rank 0 reports {"groups"} (see `network.describe_groups`), {"epoch", "line", "rate"} after every
    epoch, including those before it resumed; {"resumed_after", "of"} in steps; {"step", "of",
    "epoch"} now and then; and {"warning"} for a corrupt checkpoint.

    Args:
        worker: Rank, device, and where reports go.
        cache_path: The pixel cache.
        folder: Where START_FILE lies and checkpoints are saved.
        request: What to do.
        run_id: The MLflow run's id, noted in checkpoints.

    Returns:
        history, kept (an epoch), seconds, steps, and images per second.

    Raises:
        OutOfMemoryRefusal: A part of a step does not fit into the device's memory.
    """
    began = perf_counter()
    cache = PixelCache(cache_path)
    samples = load_samples(cache, request)
    key = request.key(cache)
    saved = checkpoint.newest(folder, key, lambda text: _report(worker, {"warning": text}))
    with memory_refusal(worker, request.config):
        tuned = load_network(folder, request, worker.device)
        training = make_training(worker, cache, samples, tuned, request)
        groups = network.describe_groups(tuned, request.config)
        _report(worker, {"groups": groups, "steps_per_epoch": training.plan.steps_per_epoch})
        note = {"key": key, "run_id": run_id}
        first_step = _train(worker, training, saved, _Saver(worker, folder, note, request.config))
    images = (training.step - first_step) * request.config.global_batch
    seconds = perf_counter() - began
    return {
        "history": training.history,
        "kept": training.kept,
        "groups": groups,
        "steps": training.plan.steps,
        "seconds": seconds,
        "images_per_second": images / seconds,
        "key": key,
    }


def _train(worker: Worker, training: Finetuning, saved: Checkpoint | None, saver: _Saver) -> int:
    """Train to the end, from a checkpoint if there is one; the step at which this began."""
    if saved:
        training.load(saved.tensors, saved.facts)
        for line in training.history:
            _report(worker, {"epoch": line["epoch"], "line": line})
        _report(worker, {"resumed_after": training.step, "of": training.plan.steps})
    first_step = training.step
    while not training.finished:
        before = len(training.history)
        training.train(saver)
        line = training.history[before]
        _report(worker, {"epoch": before, "line": line, "rate": training.rate_factor()})
    return first_step


def load_network(folder: Path, request: Request, device: str) -> FinetuneNetwork:
    """The network with the weights to start from."""
    import safetensors.torch

    return FinetuneNetwork(
        request.recipe.to_dict(),
        request.architecture,
        len(request.classes),
        safetensors.torch.load_file(folder / START_FILE),
        device,
    )


def make_training(
    worker: Worker,
    cache: PixelCache,
    samples: Samples,
    tuned: FinetuneNetwork,
    request: Request,
) -> Finetuning:
    """The training of this worker."""
    config, recipe = request.config, request.recipe
    batches = PixelBatches(
        cache,
        request.augment,
        extract.make_pixel_config(recipe),
        recipe.mean,
        recipe.std,
        batch_size=config.global_batch + 2,
        device=worker.device,
        threads=worker.threads,
    )
    return Finetuning(
        tuned,
        samples,
        batches,
        config,
        request.augment,
        DistributedContext(worker.rank, worker.world_size),
        worker.device,
    )


def load_samples(cache: PixelCache, request: Request) -> Samples:
    """The labels and splits of the cache, and the class weights.

    Raises:
        ConfigError: See `Data.check_trainable`; the images have other classes than the head; or
            --best names a metric that they do not have.
    """
    import torch

    label = torch.from_numpy(np.array(cache.label))
    data = Data(
        feature=InMemoryFeatures(torch.zeros(len(label), 1, 0)),
        label=label,
        key=cache.image_id,
        train=np.flatnonzero(cache.split == "train"),
        valid=np.flatnonzero(cache.split == "valid"),
        classes=list(cache.classes),
    ).check_trainable()
    check_classes(cache.classes, request.classes)
    choices = ("f1", "f2") if data.multilabel else ("balanced_accuracy",)
    if request.config.best not in ("last", "valid_loss", "accuracy", *choices):
        raise ConfigError(
            f"--best {request.config.best}: images here have"
            f" {'several labels' if data.multilabel else 'one label'} each.",
            f"last, valid_loss, accuracy, {', '.join(choices)}.",
            "give another --best.",
        )
    trial = Trial(
        config=TrainConfig(class_weights=request.config.class_weights),
        lr=0.0,
        train=data.train,
        valid=data.valid,
    )
    return Samples(
        label=label,
        train=data.train,
        valid=data.valid,
        classes=data.classes,
        class_weights=dataset.class_weights(data, trial),
    )


def check_classes(images: Sequence[str], head: Sequence[str]) -> None:
    """Raise ConfigError if the images have other classes than the head."""
    if tuple(images) != tuple(head):
        raise ConfigError(
            f"The images have the classes {', '.join(images)}, and the head {', '.join(head)}.",
            "the classes that the bundle was trained on.",
            "leave --from out: then a head for these classes is trained first.",
        )


def _report(worker: Worker, message: dict[str, Any]) -> None:
    if worker.rank == 0:
        worker.report(message)


class _Saver:
    """Saves checkpoints and reports progress, between the steps of a training."""

    def __init__(
        self, worker: Worker, folder: Path, note: dict[str, Any], config: FinetuneConfig
    ) -> None:
        self._worker, self._folder, self._note = worker, folder, note
        self._due, self._shown = Clock(config.checkpoint_seconds), Clock(PROGRESS_SECONDS)

    def __call__(self, training: Finetuning) -> None:
        worker, steps = self._worker, training.plan.steps
        if self._shown.is_due():
            _report(worker, {"step": training.step, "of": steps, "epoch": training.epoch})
        if training.finished or self._decide(training.step):
            self._save(training)

    def _decide(self, step: int) -> bool:
        """Rank 0's decision, on every worker: a rank that saved alone would wait forever."""
        import torch
        import torch.distributed as dist

        if self._worker.world_size == 1:
            return self._due.is_due()
        if self._worker.device != "cpu" and step % GPU_DECISION_STEPS:
            return False
        flag = torch.tensor([float(self._due.is_due())], device=self._worker.device)
        dist.broadcast(flag, 0)
        return bool(flag.item())

    def _save(self, training: Finetuning) -> None:
        worker, draft = self._worker, None
        tensors, facts = training.save()
        number = training.step + training.finished  # the last one is after the validation
        if worker.rank == 0:
            draft = checkpoint.draft_path(self._folder)
            if training.finished:
                tensors = {f"result.{name}": t for name, t in training.result().items()} | tensors
            checkpoint.write(draft, tensors, facts | self._note | {"number": number})
        worker.save_checkpoint(draft, f"finetune-{number:08d}")
        if worker.rank == 0:
            checkpoint.prune(self._folder, self._note["key"])


def result_tensors(folder: Path, key: str) -> dict[str, Tensor]:
    """The tensors of the finished network, from its last checkpoint."""
    saved = checkpoint.newest(folder, key, lambda text: None)
    assert saved is not None, "a training that has finished saved its last checkpoint"
    prefix = "result."
    return {n.removeprefix(prefix): t for n, t in saved.tensors.items() if n.startswith(prefix)}


@contextlib.contextmanager
def memory_refusal(worker: Worker, config: FinetuneConfig) -> Iterator[None]:
    """Turn a lack of memory into a refusal that says which setting to change, and how."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        now = config.micro_batch or config.global_batch
        smaller = now // 2 if now // 2 >= 2 * worker.world_size else 0
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        parts = f"{now // worker.world_size} images at once on {worker.device}"
        do = f"add --micro-batch {smaller} (the result stays the same), or give a smaller --size."
        raise OutOfMemoryRefusal(
            f"There is too little memory for {parts}: {reason}",
            "parts of a step that fit into the memory.",
            do if smaller else "give a smaller --size or --body, or use a device with more memory.",
            smaller,
        ) from error


def save_start(folder: Path, tensors: dict[str, Tensor]) -> str:
    """Write the weights to start from; returns their hash."""
    import safetensors.torch

    data = safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()})
    with fileio.atomic_write(folder / START_FILE) as draft:
        draft.write_bytes(data)
    return hashlib.sha256(data).hexdigest()
