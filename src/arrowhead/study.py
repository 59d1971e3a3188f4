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
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arrowhead import (
    ConfigError,
    __version__,
    checkpoint,
    comparison,
    descent,
    logistic,
    lr_finder,
    sweep,
)
from arrowhead.launch import Worker
from arrowhead.lr_finder import Curve, FinderConfig
from arrowhead.shards import Store
from arrowhead.sweep import SweepConfig
from arrowhead.train import (
    MIN_STEPS,
    Data,
    Held,
    Mapped,
    Member,
    Saved,
    Team,
    TrainConfig,
    Trained,
    as_used,
    class_weighting,
    resolve,
    steps_of,
    train_stack,
)
from arrowhead.wording import counted

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """All that is asked of the heads of one store."""

    head: TrainConfig = TrainConfig()
    finder: FinderConfig = FinderConfig()
    sweep: SweepConfig = SweepConfig()
    teach: bool = True
    """False: the LR finder alone."""
    start: Mapping[str, NDArray[Any]] | None = None
    """Weights that the heads begin with (see `train.Member`)."""

    @property
    def knobs(self) -> list[dict[str, float]]:
        """What each head of the grid is given; one empty dict without a grid."""
        return sweep.settings(self.sweep.grid) if self.sweep.grid else [{}]

    def __post_init__(self) -> None:
        if self.head.head == "logistic" and (self.sweep.grid or not self.teach):
            raise ConfigError(
                "--head logistic is found exactly: it has no learning rate to find and nothing for"
                " --grid to compare (its strength is chosen by cross-validation).",
                "a head that is trained by gradient descent.",
                "add --head linear" + (", or leave --grid out." if self.sweep.grid else "."),
            )
        if self.finder != FinderConfig() and not self.finds():
            logistic = self.head.head == "logistic"
            why = "--head logistic has none" if logistic else "it is given"
            raise ConfigError(
                f"Settings of the LR finder (--lr-find.…) but no learning rate to find: {why}.",
                "--rate auto, or no settings of the finder.",
                "leave the flags of the finder out, or "
                + ("add --head linear." if logistic else "the learning rate (--rate, --grid)."),
            )

    def resolve(self, store: Store) -> tuple[Study, list[str]]:
        """The study with what is auto made definite for a store, and lines that say what a user
        might not expect.
        """
        part = store.features(mapped=True)
        train, valid = (part.label[part.split == split] for split in ("train", "valid"))
        classes, recipe = len(store.manifest()["classes"]), store.recipe
        head, said = self.head, []
        if head.head == "auto":
            work = len(train) * recipe.views * recipe.width * classes
            exact = self.teach and self.start is None and not (self.sweep.grid or head.of_descent())
            exact = exact and self.finder == FinderConfig() and work <= logistic.MOST_WORK
            head = dataclasses.replace(head, head="logistic" if exact else "linear")
            if self.teach and not exact:
                said.append(f"head: linear, by gradient descent, {self._why_not_exact()}")
        if head.class_weights == "auto":
            wanted = class_weighting(train, valid, classes)
            head = dataclasses.replace(head, class_weights=wanted)
            if wanted == "validation":
                said.append(
                    "classes come in other shares in training than in validation: training images"
                    " are weighted as validation has them (--class-weights none: as they come)"
                )
        enough = resolve(dataclasses.replace(head, epochs="auto"), len(train))
        steps = steps_of(head, len(train))
        given = head.epochs != "auto" and head.rate == "auto"  # who gives both knows their own mind
        if given and 2 * steps < min(MIN_STEPS, steps_of(enough, len(train))):
            said.append(
                f"--epochs {head.epochs} of {counted(len(train), 'image')} is"
                f" {counted(steps, 'step')};"
                f" --epochs auto would take {steps_of(enough, len(train))}"
                f" ({counted(enough.total_epochs, 'epoch')})"
            )
        return dataclasses.replace(self, head=resolve(head, len(train))), said

    def _why_not_exact(self) -> str:
        """Why --head auto does not take logistic regression, in words."""
        if flags := ["--" + name.replace("_", "-") for name in self.head.of_descent()]:
            return f"as {', '.join(flags)} asks for (without: logistic regression, found exactly)"
        if self.sweep.grid:
            return "as --grid asks for (without: logistic regression, found exactly)"
        if self.finder != FinderConfig():
            return "as the LR finder's flags ask for (without: logistic regression, found exactly)"
        if self.start is not None:
            return "going on with the weights that are there"
        return "as logistic regression would take long here (--head logistic: all the same)"

    def finds(self) -> bool:
        """Whether the LR finder is needed."""
        if self.head.head == "logistic":
            return False
        return not self.teach or (self.head.rate == "auto" and "rate" not in self.knobs[0])

    def key(self, store: Store) -> str:
        """Stands for these settings and the store's content: what a checkpoint belongs to."""
        asked = dataclasses.asdict(dataclasses.replace(self, start=None))
        for name, value in sorted((self.start or {}).items()):
            asked[f"start.{name}"] = hashlib.sha256(value.tobytes()).hexdigest()
        del asked["head"]["checkpoint_seconds"]
        held = {str(path): digest for path, digest in store.hashes().items()}
        text = json.dumps([__version__, asked, sorted(held.values())], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(kw_only=True, slots=True)
class Learned:
    """What came of a study. heads: one, or one per setting of the grid, in its order.

    best: position of the winner in `heads`. It is chosen once, here; the bundle, the folds, the
    learning curve and what is recorded all use it and `config`. config: all that the winner was
    trained with, its learning rate included; None if nothing was trained. ranking: of a grid, see
    `sweep.summary`. folds: see `OutOfFold`. shares: the learning curve, see `sweep.curve`.
    """

    curve: Curve | None = None
    heads: list[Trained] = field(default_factory=list)
    best: int = 0
    config: TrainConfig | None = None
    ranking: dict[str, Any] | None = None
    folds: OutOfFold | None = None
    shares: dict[str, Any] | None = None
    seconds: float = 0.0

    @property
    def winner(self) -> Trained:
        """The head that becomes the bundle."""
        return self.heads[self.best]


@dataclass(frozen=True, kw_only=True, slots=True)
class OutOfFold:
    """row: int64 (n,), of the catalog; fold: int64 (n,), -1 for an image that was held out in none;
    logit: float32 (n, C), of the head that was trained without this fold, nan where there is none;
    last: what each fold's head ended with; epochs: for how many epochs they were trained;
    not_held_out: classes that no fold could hold out, with their numbers of images.
    """

    multi: bool
    row: NDArray[np.int64]
    fold: NDArray[np.int64]
    logit: NDArray[np.float32]
    last: list[dict[str, float]]
    epochs: int
    not_held_out: dict[str, int]


def learn(worker: Worker, path: Path, study: Study, place: Path | None, run: str | None) -> Learned:
    """The study, on every worker; what rank 0 returns counts.

    place: the folder of checkpoints; None keeps none. run: the MLflow run's id, noted in them.
    Rank 0 reports {"rates", "verdict"}, then {"part", "epoch", "lines"} after every epoch, those of
    before a stop too, and {"warning"} for a checkpoint that is torn.
    """
    began = perf_counter()
    store = Store(path)
    data, row = data_of(store, worker.device, worker.world)
    team = Team(worker.rank, worker.world)
    note = {"key": study.key(store), "run_id": run}
    log = _Log(worker, place, note, study.head.checkpoint_seconds)
    made = Learned(curve=_curve(log, data, study, team))
    rate = made.curve.rate if made.curve else study.head.rate
    if not study.teach:
        made.seconds = perf_counter() - began
        return made
    grid = study.sweep.grid
    if study.head.head == "logistic":
        members = [Member(config=study.head, rate=0.0, train=data.train, valid=data.valid)]
    else:
        members = sweep.members(data, study.head, 1.0 if rate == "auto" else float(rate), grid)
        members = [dataclasses.replace(one, start=study.start) for one in members]
    losers = sweep.loser_of(study.knobs, study.head) if study.sweep.halving else None
    made.heads = log.train("heads", data, members, team, losers)
    if grid:
        judge = _judge(data, members, made.heads, study.head, team)
        made.ranking = sweep.summary(study.knobs, made.heads, study.head, judge)
        made.best = made.ranking["best"]
    winner = members[made.best].config
    if made.winner.l2 is not None:
        winner = dataclasses.replace(winner, l2=made.winner.l2)
    made.config = winner
    if study.sweep.folds:
        made.folds = _folds(log, data, row, study, made, team)
    if study.sweep.learning_curve:
        shares = sweep.share_members(data, winner, study.sweep.curve_seeds)
        members = [one for _, one in shares]
        ended = log.train("learning-curve", data, members, team)
        judge = _judge(data, members, ended, winner, team)
        made.shares = sweep.curve(shares, ended, winner, judge)
    made.config = as_used(winner, data.feature.device)  # what is recorded; all was trained with it
    made.seconds = perf_counter() - began
    return made


def _curve(log: _Log, data: Data, study: Study, team: Team) -> Curve | None:
    """The LR finder's curve, from the checkpoint where there is one: on another number of workers
    its last bits, and so the rate, might differ.
    """
    if not study.finds():
        return None
    kept = log.newest("heads") if study.teach else None
    curve = (
        _again(kept.facts["curve"])
        if kept
        else lr_finder.find(data, study.head, study.finder, team)
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
    team: Team,
) -> OutOfFold:
    """Train the winner's settings once per fold, for as many epochs as the winner's weights took:
    were the epoch chosen on the fold that is predicted, its labels would take part.
    """
    import torch

    from arrowhead import heads

    winner, epochs = made.config, made.winner.epoch + 1
    assert winner is not None
    pool = np.sort(np.concatenate([data.train, data.valid]))
    label = data.label.cpu().numpy()[pool]
    part = sweep.folds(data.key[pool], label, study.sweep.folds, data.classes)
    members = sweep.fold_members(data, winner, part)
    ended = log.train("folds", data, members, team, until=epochs)
    logit = np.full((len(pool), len(data.classes)), np.nan, np.float32)
    views, width = data.feature.shape[1:]
    for number, one in enumerate(ended):
        state = {name: torch.from_numpy(value) for name, value in one.state.items()}
        head = heads.restore(winner.kind, width, len(data.classes), state)
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
        not_held_out=sweep.not_held_out(part, label, data.classes),
    )


def _judge(
    data: Data,
    members: Sequence[Member],
    heads: Sequence[Trained],
    config: TrainConfig,
    team: Team,
) -> sweep.Judge:
    """What compares these heads, image by image; to be called on every worker."""
    name = sweep.figure(config)
    return lambda groups: comparison.by_image(data, members, heads, groups, name, team)


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

    def newest(self, part: str) -> checkpoint.Checkpoint | None:
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
        members: Sequence[Member],
        team: Team,
        losers: Callable[..., set[int]] | None = None,
        until: int | None = None,
    ) -> list[Trained]:
        """Train a stack, from its last checkpoint on (see `train_stack`)."""
        config = members[0].config

        def rate_at(epoch: int) -> dict[str, float]:
            if len(members) > 1 or config.head == "logistic":
                return {}
            factor = descent.factor(epoch / config.total_epochs, config, config.total_epochs)
            return {"rate": members[0].rate * factor}

        def record(lines: dict[int, dict[str, float]]) -> None:
            epoch = int(next(iter(lines.values()))["epoch"])
            self.tell({"part": part, "epoch": epoch, "lines": lines} | rate_at(epoch))
            self._measure(part, list(lines.values()))

        if config.head == "logistic":  # seconds: a stopped one begins again
            ended = logistic.train(data, members, team)
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

        def keep(save: Callable[[], Saved], epoch: int, over: bool) -> None:
            due = over or monotonic() - last[0] >= self._seconds
            if self._place is not None and _agreed(due, team, data.feature.device):
                self._keep(part, save, epoch)
                last[0] = monotonic()

        return train_stack(
            data, members, team, record, losers=losers, saved=saved, keep=keep, until=until
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
        sketch = None
        key = f"{self._note['key']}:{part}"
        if self._worker.rank == 0:
            sketch = checkpoint.draft(self._place)
            tensors, facts = save()
            curve = self.curve.plain() if self.curve else None
            noted = facts | self._note | {"key": key, "number": epoch, "curve": curve}
            checkpoint.write(sketch, tensors, noted)
        self._worker.keep(sketch, f"{part}-{epoch:06d}")
        if self._worker.rank == 0:
            checkpoint.prune(self._place, key)


def _agreed(due: bool, team: Team, device: torch.device) -> bool:
    """Rank 0's clock decides for all: a rank that kept alone would wait for ever."""
    import torch
    import torch.distributed as dist

    if team.world == 1:
        return due
    flag = torch.tensor([float(due)], device=device)
    dist.broadcast(flag, 0)
    return bool(flag.item())


# ---------------------------------------------------------------------------------- data


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
    part = store.features(mapped=not fits)
    feature: Held | Mapped
    if fits:
        feature = Held(torch.from_numpy(part.feature).to(chip))
    else:
        feature = Mapped(store.maps(), part.row, chip)
    data = Data(
        feature=feature,
        label=torch.from_numpy(part.label).to(chip),
        key=part.image_id,
        train=np.flatnonzero(part.split == "train"),
        valid=np.flatnonzero(part.split == "valid"),
        classes=store.manifest()["classes"],
    )
    return data.must_teach(), part.row


def _free(device: torch.device) -> int:
    """Bytes free on a device."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
