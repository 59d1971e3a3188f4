"""What every worker does when heads are trained on a store.

    store, settings       the same on every worker
      -> data_of          features on the device, or left in the map
      -> learn            LR finder, then heads: one or a grid, folds, a learning curve
      -> Learned          on rank 0: the curve, every head, what was asked about them

Each part keeps checkpoints under a key of its own, the last one when it is done, so a stopped
study goes on in the part and after the epoch where it was.
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
from arrowhead.training.study import Learned, OutOfFold, Study
from arrowhead.training.trainer import Saved, Trained, train_stack

if TYPE_CHECKING:
    import torch


def learn(worker: Worker, path: Path, study: Study, place: Path | None, run: str | None) -> Learned:
    """The study, on every worker; what rank 0 returns counts.

    place: the folder of checkpoints; None keeps none. run: the MLflow run's id, noted in them.
    Rank 0 reports {"rates", "verdict"}, then {"part", "epoch", "lines"} after every epoch, those of
    before a stop too, and {"warning"} for a checkpoint that is torn.
    """
    began = perf_counter()
    store = Store(path)
    data, row = data_of(store, worker.device, worker.world_size)
    distributed = DistributedContext(worker.rank, worker.world_size)
    note = {"key": study.key(store), "run_id": run}
    log = _Log(worker, place, note, study.head.checkpoint_seconds)
    made = Learned(curve=_curve(log, data, study, distributed))
    rate = made.curve.rate if made.curve else study.head.rate
    if not study.teach:
        made.seconds = perf_counter() - began
        return made
    grid = study.sweep.grid
    if study.head.head == "logistic":
        trials = [Trial(config=study.head, rate=0.0, train=data.train, valid=data.valid)]
    else:
        trials = training_grid.trials(
            data, study.head, 1.0 if rate == "auto" else float(rate), grid
        )
        trials = [dataclasses.replace(one, start=study.start) for one in trials]
    losers = training_grid.loser_of(study.overrides, study.head) if study.sweep.halving else None
    made.heads = log.train("heads", data, trials, distributed, losers)
    if grid:
        judge = _judge(data, trials, made.heads, study.head, distributed)
        made.ranking = training_grid.summary(study.overrides, made.heads, study.head, judge)
        made.best = made.ranking["best"]
    winner = trials[made.best].config
    if made.winner.l2 is not None:
        winner = dataclasses.replace(winner, l2=made.winner.l2)
    made.config = winner
    if study.sweep.folds:
        made.folds = _folds(log, data, row, study, made, distributed)
    if study.sweep.learning_curve:
        shares = learning_curve.share_trials(data, winner, study.sweep.curve_seeds)
        trials = [one for _, one in shares]
        ended = log.train("learning-curve", data, trials, distributed)
        judge = _judge(data, trials, ended, winner, distributed)
        made.shares = learning_curve.curve(shares, ended, winner, judge)
    made.config = resolve_defaults(
        winner, data.feature.device
    )  # what is recorded; all was trained with it
    made.seconds = perf_counter() - began
    return made


def _curve(log: _Log, data: Data, study: Study, distributed: DistributedContext) -> Curve | None:
    """The LR finder's curve, from the checkpoint where there is one: on another number of workers
    its last bits, and so the rate, might differ.
    """
    if not study.finds():
        return None
    kept = log.newest("heads") if study.teach else None
    curve = (
        _again(kept.facts["curve"])
        if kept
        else lr_finder.find(data, study.head, study.finder, distributed)
    )
    log.curve = curve
    log.tell({"curve": curve})
    return curve


def _again(plain: dict[str, Any]) -> Curve:
    """The curve that `Curve.plain` wrote."""
    race = plain["race"] and {k: np.inf if v is None else v for k, v in plain["race"].items()}
    held_out = plain["held_out"] and np.array(plain["held_out"], np.float64)
    return Curve(
        rates=np.array(plain["rates"]),
        losses=np.array(plain["losses"], np.float64),  # None becomes nan
        held_out=held_out,
        suggestions=plain["suggestions"],
        spreads=plain["spreads"],
        race=race,
        verdict=plain["verdict"],
    )


def _folds(
    log: _Log,
    data: Data,
    row: NDArray[np.int64],
    study: Study,
    made: Learned,
    distributed: DistributedContext,
) -> OutOfFold:
    """Train the winner's settings once per fold, for as many epochs as the winner's weights took:
    were the epoch chosen on the fold that is predicted, its labels would take part.
    """
    import torch

    from arrowhead.training import heads as training_heads

    winner, epochs = made.config, made.winner.epoch + 1
    assert winner is not None
    pool = np.sort(np.concatenate([data.train, data.valid]))
    label = data.label.cpu().numpy()[pool]
    part = cross_validation.folds(data.key[pool], label, study.sweep.folds, data.classes)
    trials = cross_validation.fold_trials(data, winner, part)
    ended = log.train("folds", data, trials, distributed, until=epochs)
    logit = np.full((len(pool), len(data.classes)), np.nan, np.float32)
    views, width = data.feature.shape[1:]
    for number, one in enumerate(ended):
        state = {name: torch.from_numpy(value) for name, value in one.state.items()}
        head = training_heads.restore(winner.architecture, width, len(data.classes), state)
        with torch.inference_mode():
            for at in np.array_split(np.flatnonzero(part == number), 1 + len(pool) // 65536):
                flat = torch.from_numpy(pool[at] * views).to(data.feature.device)
                logit[at] = head(data.feature.take(flat).float().cpu()).numpy()
    last = [one.epochs[one.epoch] for one in ended]
    return OutOfFold(
        multi=data.multi,
        row=row[pool],
        fold=part,
        logit=logit,
        last=last,
        epochs=epochs,
        not_held_out=cross_validation.not_held_out(part, label, data.classes),
    )


def _judge(
    data: Data,
    trials: Sequence[Trial],
    heads: Sequence[Trained],
    config: TrainConfig,
    distributed: DistributedContext,
) -> training_grid.Judge:
    """What compares these heads, image by image; to be called on every worker."""
    name = training_grid.figure(config)
    return lambda groups: comparison.by_image(data, trials, heads, groups, name, distributed)


class _Log:
    """Checkpoints and reports of one worker."""

    def __init__(
        self, worker: Worker, place: Path | None, note: dict[str, Any], seconds: float
    ) -> None:
        self._worker, self._place, self._note, self._seconds = worker, place, note, seconds
        self.curve: Curve | None = None

    def tell(self, message: dict[str, Any]) -> None:
        """A report to the driver, from one worker only."""
        if self._worker.rank == 0:
            self._worker.report(message)

    def newest(self, part: str) -> Checkpoint | None:
        """Where this part of the study can go on."""
        if self._place is None:
            return None

        def warn(words: str) -> None:
            self.tell({"warning": words})

        return checkpoint.newest(self._place, f"{self._note['key']}:{part}", warn)

    def train(
        self,
        part: str,
        data: Data,
        trials: Sequence[Trial],
        distributed: DistributedContext,
        losers: Callable[..., set[int]] | None = None,
        until: int | None = None,
    ) -> list[Trained]:
        """Train a stack, from its last checkpoint on (see `train_stack`)."""
        config = trials[0].config

        def rate_at(epoch: int) -> dict[str, float]:
            if len(trials) > 1 or config.head == "logistic":
                return {}
            factor = schedule.lr_factor(epoch / config.total_epochs, config, config.total_epochs)
            return {"rate": trials[0].rate * factor}

        def record(lines: dict[int, dict[str, float]]) -> None:
            epoch = int(next(iter(lines.values()))["epoch"])
            self.tell({"part": part, "epoch": epoch, "lines": lines} | rate_at(epoch))
            self._measure(part, list(lines.values()))

        if config.head == "logistic":  # seconds: a stopped one begins again
            ended = logistic.train(data, trials, distributed)
            record({number: one.epochs[0] for number, one in enumerate(ended)})
            return ended
        kept = self.newest(part)
        saved: Saved | None = None
        if kept:
            saved = kept.tensors, kept.facts
            lines = kept.facts["lines"]
            for epoch in range(max(map(len, lines))):
                told = {n: one[epoch] for n, one in enumerate(lines) if len(one) > epoch}
                self.tell({"part": part, "epoch": epoch, "lines": told} | rate_at(epoch))
            self.tell({"part": part, "goes_on": kept.facts["done"]})
        last = [monotonic()]

        def after_epoch(save: Callable[[], Saved], epoch: int, over: bool) -> None:
            due = over or monotonic() - last[0] >= self._seconds
            if self._place is not None and _agreed(due, distributed, data.feature.device):
                self._keep(part, save, epoch)
                last[0] = monotonic()

        return train_stack(
            data,
            trials,
            distributed,
            record,
            losers=losers,
            saved=saved,
            after_epoch=after_epoch,
            until=until,
        )

    def _measure(self, part: str, lines: list[dict[str, float]]) -> None:
        """An epoch, for whoever watches the cluster; the best of the heads that learn."""
        if self._worker.rank != 0:
            return
        measure = self._worker.measure
        measure("epoch", lines[0]["epoch"], part=part)
        for split in ("train", "valid"):
            loss = min(line[f"{split}_loss"] for line in lines)
            measure("loss", loss, part=part, split=split)
        measure("accuracy", max(line["accuracy"] for line in lines), part=part)

    def _keep(self, part: str, save: Callable[[], Saved], epoch: int) -> None:
        assert self._place is not None
        draft_file = None
        key = f"{self._note['key']}:{part}"
        if self._worker.rank == 0:
            draft_file = checkpoint.draft(self._place)
            tensors, facts = save()
            curve = self.curve.plain() if self.curve else None
            noted = facts | self._note | {"key": key, "number": epoch, "curve": curve}
            checkpoint.write(draft_file, tensors, noted)
        self._worker.save_checkpoint(draft_file, f"{part}-{epoch:06d}")
        if self._worker.rank == 0:
            checkpoint.prune(self._place, key)


def _agreed(due: bool, distributed: DistributedContext, device: torch.device) -> bool:
    """Rank 0's clock decides for all: a rank that kept alone would wait for ever."""
    import torch
    import torch.distributed as dist

    if distributed.world == 1:
        return due
    flag = torch.tensor([float(due)], device=device)
    dist.broadcast(flag, 0)
    return bool(flag.item())


def data_of(store: Store, device: str, world: int = 1) -> tuple[Data, NDArray[np.int64]]:
    """All well images of a store on a device, and which row of the catalog each is.

    Features are copied to the device where they fill less than half of what is free there, shared
    with as many workers; else they stay in the memory map.
    """
    import torch

    chip, recipe = torch.device(device), store.recipe
    files = sum(one["files"] for one in store.manifest()["shards"])
    size = files * recipe.views * recipe.width * 2
    fits = size * (world if chip.type == "cpu" else 1) < _free(chip) // 2
    part = store.features(rows_only=not fits)
    feature: InMemoryFeatures | MemoryMappedFeatures
    if fits:
        feature = InMemoryFeatures(torch.from_numpy(part.feature).to(chip))
    else:
        feature = MemoryMappedFeatures(store.mapped_features(), part.row, chip)
    data = Data(
        feature=feature,
        label=torch.from_numpy(part.label).to(chip),
        key=part.image_id,
        train=np.flatnonzero(part.split == "train"),
        valid=np.flatnonzero(part.split == "valid"),
        classes=store.manifest()["classes"],
    )
    return data.check_trainable(), part.row


def _free(device: torch.device) -> int:
    """Bytes free on a device."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
