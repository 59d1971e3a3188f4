"""What every worker does to train heads on a store.

    store, settings       the same on every worker
      -> load_data        features on the device, or memory-mapped
      -> run_study        LR finder, then heads: one or a grid, folds, a learning curve
      -> StudyResult      on rank 0: the curve, every head, what was examined about them

Each part of a study (heads, folds, learning curve) has its own checkpoints, the last one at its
end, so a study that was stopped resumes in the part and after the epoch where it was.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.data import mirrors
from arrowhead.features.store import Store
from arrowhead.runtime.worker import Worker
from arrowhead.training import (
    checkpoint,
    comparison,
    cross_validation,
    learning_curve,
    logistic,
    lr_finder,
    schedule,
)
from arrowhead.training import grid as training_grid
from arrowhead.training.batches import DistributedContext
from arrowhead.training.checkpoint import Checkpoint
from arrowhead.training.config import TrainConfig, resolve_defaults
from arrowhead.training.dataset import Data, InMemoryFeatures, MemoryMappedFeatures, Trial
from arrowhead.training.lr_finder import Curve
from arrowhead.training.study import OutOfFold, Study, StudyResult
from arrowhead.training.trainer import EpochMetrics, TrainedHead, TrainingState, train_stack

if TYPE_CHECKING:
    import torch


def run_study(
    worker: Worker, path: Path, study: Study, checkpoint_dir: Path | None, run_id: str | None
) -> StudyResult:
    """Run a study; every worker calls this function, and the result of rank 0 counts.

    Rank 0 reports {"curve"}, then {"part", "epoch", "lines"} after every epoch, including the
    epochs before it resumed; {"part", "resumed_after"} where it resumes; and {"warning"} for a
    corrupt checkpoint.

    Args:
        worker: Rank, device, and where reports go.
        path: The store.
        study: The request, resolved for the store.
        checkpoint_dir: The directory of checkpoints; None: save none.
        run_id: The MLflow run's id, noted in checkpoints.
    """
    began = perf_counter()
    store = Store(mirrors.here(path))
    data, row = load_data(store, worker.device, worker.world_size)
    distributed = DistributedContext(worker.rank, worker.world_size)
    note = {"key": study.key(store), "run_id": run_id}
    parts = _PartTrainer(worker, checkpoint_dir, note, study.head.checkpoint_seconds)
    result = StudyResult(curve=_find_learning_rate(parts, data, study, distributed))
    if study.train_heads:
        winner = _train_heads(parts, data, study, result, distributed)
        if study.sweep.folds:
            result.folds = _train_folds(parts, data, row, study, result, distributed)
        if study.sweep.learning_curve:
            shares = learning_curve.share_trials(data, winner, study.sweep.curve_seeds)
            trials = [trial for _, trial in shares]
            heads = parts.train("learning-curve", data, trials, distributed)
            metric_by_image = _metric_by_image(data, trials, heads, winner, distributed)
            result.shares = learning_curve.curve(shares, heads, winner, metric_by_image)
        # Only for the records: training resolves these defaults itself.
        result.config = resolve_defaults(winner, data.feature.device)
    result.seconds = perf_counter() - began
    return result


def _find_learning_rate(
    parts: _PartTrainer, data: Data, study: Study, distributed: DistributedContext
) -> Curve | None:
    """Run the LR finder, if it is needed.

    A resumed study takes the curve from its checkpoint: on another number of workers its last
    bits, and so the learning rate, might differ.
    """
    if not study.needs_lr_finder():
        return None
    saved = parts.newest("heads") if study.train_heads else None
    curve = (
        Curve.from_plain(saved.facts["curve"])
        if saved
        else lr_finder.find_learning_rate(data, study.head, study.finder, distributed)
    )
    parts.curve = curve
    parts.report({"curve": curve})
    return curve


def _train_heads(
    parts: _PartTrainer,
    data: Data,
    study: Study,
    result: StudyResult,
    distributed: DistributedContext,
) -> TrainConfig:
    """Train the head, or the heads of the grid, into `result`; return the winner's settings."""
    rate = result.curve.rate if result.curve else study.head.rate
    if study.head.head == "logistic":
        trials = [Trial(config=study.head, lr=0.0, train=data.train, valid=data.valid)]
    else:
        lr = 1.0 if rate == "auto" else float(rate)
        trials = training_grid.grid_trials(data, study.head, lr, study.sweep.grid)
        trials = [dataclasses.replace(one, initial_state=study.initial_state) for one in trials]
    stop_rule = (
        training_grid.halving_rule(study.overrides, study.head) if study.sweep.halving else None
    )
    result.heads = parts.train("heads", data, trials, distributed, stop_rule)
    if study.sweep.grid:
        metric_by_image = _metric_by_image(data, trials, result.heads, study.head, distributed)
        result.ranking = training_grid.rank_settings(
            study.overrides, result.heads, study.head, metric_by_image
        )
        result.best = result.ranking["best"]
    winner = trials[result.best].config
    if result.winner.l2 is not None:
        winner = dataclasses.replace(winner, l2=result.winner.l2)
    result.config = winner
    return winner


def _train_folds(
    parts: _PartTrainer,
    data: Data,
    row: NDArray[np.int64],
    study: Study,
    result: StudyResult,
    distributed: DistributedContext,
) -> OutOfFold:
    """Train one head per fold with the winner's settings, and predict the fold with it.

    The heads train for as many epochs as the winner's weights took: if the epoch were chosen on the
    fold that is predicted, its labels would take part.
    """
    import torch

    from arrowhead.training import heads as training_heads

    winner, epochs = result.config, result.winner.epoch + 1
    assert winner is not None
    rows = np.sort(np.concatenate([data.train, data.valid]))
    label = data.label.cpu().numpy()[rows]
    fold = cross_validation.assign_folds(data.key[rows], label, study.sweep.folds, data.classes)
    trials = cross_validation.fold_trials(data, winner, fold)
    heads = parts.train("folds", data, trials, distributed, stop_epoch=epochs)
    logit = np.full((len(rows), len(data.classes)), np.nan, np.float32)
    views, width = data.feature.shape[1:]
    for number, trained in enumerate(heads):
        state = {name: torch.from_numpy(value) for name, value in trained.state.items()}
        head = training_heads.restore_head(winner.architecture, width, len(data.classes), state)
        with torch.inference_mode():
            for i in np.array_split(np.flatnonzero(fold == number), 1 + len(rows) // 65536):
                flat = torch.from_numpy(rows[i] * views).to(data.feature.device)
                logit[i] = head(data.feature.take(flat).float().cpu()).numpy()
    return OutOfFold(
        multi=data.multilabel,
        row=row[rows],
        fold=fold,
        logit=logit,
        last=[one.epochs[one.epoch] for one in heads],
        epochs=epochs,
        not_held_out=cross_validation.not_held_out(fold, label, data.classes),
    )


def _metric_by_image(
    data: Data,
    trials: Sequence[Trial],
    heads: Sequence[TrainedHead],
    config: TrainConfig,
    distributed: DistributedContext,
) -> training_grid.MetricByImage:
    """Return a function that compares these heads; every worker calls it."""
    metric = training_grid.selection_metric(config)
    return lambda groups: comparison.metric_by_image(
        data, trials, heads, groups, metric, distributed
    )


class _PartTrainer:
    """Trains the parts of a study on one worker, with checkpoints and reports."""

    def __init__(
        self, worker: Worker, checkpoint_dir: Path | None, note: dict[str, Any], seconds: float
    ) -> None:
        self._worker, self._checkpoint_dir, self._note = worker, checkpoint_dir, note
        self._checkpoint_seconds = seconds
        self.curve: Curve | None = None

    def report(self, message: dict[str, Any]) -> None:
        """Send a report to the driver, from rank 0 only."""
        if self._worker.rank == 0:
            self._worker.report(message)

    def newest(self, part: str) -> Checkpoint | None:
        """Return the newest checkpoint of a part."""
        if self._checkpoint_dir is None:
            return None

        def warn(message: str) -> None:
            self.report({"warning": message})

        return checkpoint.newest(self._checkpoint_dir, f"{self._note['key']}:{part}", warn)

    def train(
        self,
        part: str,
        data: Data,
        trials: Sequence[Trial],
        distributed: DistributedContext,
        stop_rule: Callable[..., set[int]] | None = None,
        stop_epoch: int | None = None,
    ) -> list[TrainedHead]:
        """Train a stack, from its newest checkpoint on (see `train_stack`)."""
        config = trials[0].config

        def report_epoch(metrics: EpochMetrics) -> None:
            epoch = int(next(iter(metrics.values()))["epoch"])
            message = {"part": part, "epoch": epoch, "lines": metrics}
            if len(trials) == 1 and config.head != "logistic":
                progress = epoch / config.total_epochs
                factor = schedule.lr_factor(progress, config, config.total_epochs)
                message["rate"] = trials[0].lr * factor
            self.report(message)

        def report_and_measure(metrics: EpochMetrics) -> None:
            report_epoch(metrics)
            self._measure(part, list(metrics.values()))

        if config.head == "logistic":  # takes seconds: if it is stopped, it starts again
            heads = logistic.train(data, trials, distributed)
            report_and_measure({number: one.epochs[0] for number, one in enumerate(heads)})
            return heads
        saved = self.newest(part)
        resume_from: TrainingState | None = None
        if saved:
            resume_from = saved.tensors, saved.facts
            history = saved.facts["lines"]
            for epoch in range(max(map(len, history))):
                report_epoch({n: one[epoch] for n, one in enumerate(history) if len(one) > epoch})
            self.report({"part": part, "resumed_after": saved.facts["done"]})
        last_saved = [monotonic()]

        def after_epoch(save: Callable[[], TrainingState], epoch: int, finished: bool) -> None:
            due = finished or monotonic() - last_saved[0] >= self._checkpoint_seconds
            if self._checkpoint_dir is not None and _decide_on_rank_0(
                due, distributed, data.feature.device
            ):
                self._save_checkpoint(self._checkpoint_dir, part, save, epoch)
                last_saved[0] = monotonic()

        return train_stack(
            data,
            trials,
            distributed,
            report_and_measure,
            stop_rule=stop_rule,
            resume_from=resume_from,
            after_epoch=after_epoch,
            stop_epoch=stop_epoch,
        )

    def _measure(self, part: str, results: list[dict[str, float]]) -> None:
        """Publish an epoch's best values of the active heads, for the cluster's metrics."""
        if self._worker.rank != 0:
            return
        measure = self._worker.measure
        measure("epoch", results[0]["epoch"], part=part)
        for split in ("train", "valid"):
            loss = min(result[f"{split}_loss"] for result in results)
            measure("loss", loss, part=part, split=split)
        measure("accuracy", max(result["accuracy"] for result in results), part=part)

    def _save_checkpoint(
        self, checkpoint_dir: Path, part: str, save: Callable[[], TrainingState], epoch: int
    ) -> None:
        draft = None
        key = f"{self._note['key']}:{part}"
        if self._worker.rank == 0:
            draft = checkpoint.draft_path(checkpoint_dir)
            tensors, facts = save()
            curve = self.curve.plain() if self.curve else None
            facts = facts | self._note | {"key": key, "number": epoch, "curve": curve}
            checkpoint.write(draft, tensors, facts)
        self._worker.save_checkpoint(draft, f"{part}-{epoch:06d}")
        if self._worker.rank == 0:
            checkpoint.prune(checkpoint_dir, key)


def _decide_on_rank_0(due: bool, distributed: DistributedContext, device: torch.device) -> bool:
    """Return rank 0's decision on every worker: a rank that saved alone would wait forever."""
    import torch
    import torch.distributed as dist

    if distributed.world_size == 1:
        return due
    flag = torch.tensor([float(due)], device=device)
    dist.broadcast(flag, 0)
    return bool(flag.item())


def load_data(store: Store, device: str, workers: int = 1) -> tuple[Data, NDArray[np.int64]]:
    """Load all readable images of a store for a training.

    Args:
        store: The feature store.
        device: The device that trains.
        workers: The number of workers.

    Returns:
        The data, and each image's row in the catalog.

    Raises:
        ConfigError: See `Data.check_trainable`.
    """
    data, row = read_data(store, device, workers)
    return data.check_trainable(), row


def read_data(store: Store, device: str, workers: int = 1) -> tuple[Data, NDArray[np.int64]]:
    """Read all readable images of a store, whatever their splits.

    Features are copied to the device if they fill less than half of its free memory (on a CPU the
    workers share it); else they stay memory-mapped.

    Args:
        store: The feature store.
        device: The device that trains.
        workers: The number of workers.

    Returns:
        The data, and each image's row in the catalog.
    """
    import torch

    torch_device, recipe = torch.device(device), store.recipe
    files = sum(one["files"] for one in store.manifest()["shards"])
    size = files * recipe.views * recipe.width * 2
    copies = workers if torch_device.type == "cpu" else 1
    fits = size * copies < _free_bytes(torch_device) // 2
    part = store.features(rows_only=not fits)
    feature: InMemoryFeatures | MemoryMappedFeatures
    if fits:
        feature = InMemoryFeatures(torch.from_numpy(part.feature).to(torch_device))
    else:
        feature = MemoryMappedFeatures(store.mapped_features(), part.row, torch_device)
    data = Data(
        feature=feature,
        label=torch.from_numpy(part.label).to(torch_device),
        key=part.image_id,
        train=np.flatnonzero(part.split == "train"),
        valid=np.flatnonzero(part.split == "valid"),
        classes=store.manifest()["classes"],
    )
    return data, part.row


def _free_bytes(device: torch.device) -> int:
    """Return the free memory of a device."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
