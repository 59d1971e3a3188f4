"""Rows per second of head training: the ordinary loop, the bare loop and Arrowhead, in one run.

    python bench/head.py [--rows N] [--width D] [--rounds R] [--seconds S] [--threads T]

The ways take turns, round by round, so that a busy machine slows all of them; ratios are taken
within a round, and their medians are given: on the clock and, in brackets, of processor time, which
a busy machine disturbs less. Features are random float16, in memory; a way lasts about S seconds in
each round.

    loader      DataLoader(TensorDataset, shuffle=True, num_workers=0), linear, cross entropy, SGD
    bare        the same by hand: x = X[perm[i:i+B]].float(), a new permutation for each pass
    sgd, adamw  Training.move, with the loops' plain SGD, and with adamw, the default
    64 heads    16 rates x 4 weight decays (one lane), 16 rates x 4 seeds (four lanes), 512 rates
    of two classes, against one head trained with the same optimizer, by time per step
    end to end  train(): epochs with validation, against the bare loop that never validates

Classes and batch sizes vary. The table and bench/results/head_cpu_<date>.json say how loaded the
machine was.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from arrowhead.training.config import TrainConfig
from arrowhead.training.dataset import Data, Held, Trial
from arrowhead.training.trainer import Training, train

CORES = len(os.sched_getaffinity(0))
RATE = 0.01
Way = Callable[[int], float]
"""Seconds for so many steps."""


def data_of(feature_ND: Tensor, classes: int, valid: int = 0) -> Data:
    """These features with random labels; the last `valid` rows check, ten if none do."""
    rows = np.arange(len(feature_ND))
    draw = torch.Generator().manual_seed(0)
    return Data(
        feature=Held(feature_ND[:, None]),
        label=torch.randint(classes, (len(rows),), generator=draw),
        key=rows.astype(np.uint64),
        train=rows[: len(rows) - valid],
        valid=rows[-(valid or 10) :],
        classes=[str(number) for number in range(classes)],
    )


# ---------------------------------------------------------------------------- other ways


def loader(data: Data, feature_ND: Tensor, size: int) -> Way:
    """The loop as people write it."""
    head = nn.Linear(feature_ND.shape[1], len(data.classes))
    optimizer = torch.optim.SGD(head.parameters(), lr=RATE)
    loss_of = nn.CrossEntropyLoss()
    batches = DataLoader(TensorDataset(feature_ND, data.label), batch_size=size, shuffle=True)

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from batches

    stream = endless()
    next(stream)  # drawing the order is no part of a step

    def run(steps: int) -> float:
        began = perf_counter()
        for _ in range(steps):
            feature, label = next(stream)
            optimizer.zero_grad()
            loss_of(head(feature.float()), label).backward()
            optimizer.step()
        return perf_counter() - began

    return run


def bare(data: Data, feature_ND: Tensor, size: int) -> Way:
    """The same without a loader."""
    head = nn.Linear(feature_ND.shape[1], len(data.classes))
    optimizer = torch.optim.SGD(head.parameters(), lr=RATE)
    rows = len(data.train)
    state = [torch.randperm(rows), 0]

    def run(steps: int) -> float:
        began = perf_counter()
        perm, at = state
        for _ in range(steps):
            if at + size > rows:
                perm, at = torch.randperm(rows), 0
            picked = perm[at : at + size]
            loss = nn.functional.cross_entropy(head(feature_ND[picked].float()), data.label[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            at += size
        state[:] = perm, at
        return perf_counter() - began

    return run


# ---------------------------------------------------------------------------------- ours


def grid(data: Data, config: TrainConfig, heads: str) -> list[Trial]:
    """The heads of a stack, by the name that the table gives it."""
    rates = np.geomspace(1e-4, 1e-1, 512 if heads == "512 heads" else 16).tolist()
    others = {
        "one": [{}],
        "64 heads, one lane": [{"weight_decay": decay} for decay in (0.0, 1e-4, 1e-3, 1e-2)],
        "64 heads, four lanes": [{"seed": seed} for seed in range(4)],
        "512 heads": [{}],
    }[heads]
    return [
        Trial(
            config=replace(config, **other),
            rate=rate,
            train=data.train,
            valid=data.valid,
        )
        for rate in ([RATE] if heads == "one" else rates)
        for other in others
    ]


def ours(data: Data, size: int, optimizer: str, heads: str = "one") -> Way:
    """Arrowhead's steps."""
    config = TrainConfig(
        batch_size=size,
        optimizer=optimizer,  # type: ignore[arg-type]
        weight_decay=0.01 if optimizer == "adamw" else 0.0,
        momentum=0.9 if optimizer == "adamw" else 0.0,
    )
    training = Training(data, grid(data, config, heads))
    done = [0]

    def run(steps: int) -> float:
        began = perf_counter()
        for step in range(done[0], done[0] + steps):
            training.move(step, 1.0)
        done[0] += steps
        return perf_counter() - began

    return run


# ----------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Taken:
    """Seconds per step of each way, round by round: on the clock, and of processor time."""

    clock: dict[str, list[float]]
    work: dict[str, list[float]]

    def over(self, own: str, other: str) -> tuple[float, float]:
        """How many times as long one way took as another, on the clock and of processor time."""
        return ratio(self.clock[own], self.clock[other]), ratio(self.work[own], self.work[other])


def turns(ways: dict[str, Way], rounds: int, seconds: float) -> Taken:
    """Each way for about so many seconds, and so in every round."""
    steps = {}
    for name, way in ways.items():
        way(3)
        steps[name] = max(3, int(seconds / (way(10) / 10)))
    taken = Taken({name: [] for name in ways}, {name: [] for name in ways})
    for _ in range(rounds):
        for name, way in ways.items():
            had = process_time()
            taken.clock[name].append(way(steps[name]) / steps[name])
            taken.work[name].append((process_time() - had) / steps[name])
    return taken


def ratio(over: list[float], under: list[float]) -> float:
    """The median of how much longer one way took than another, within a round."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def steps(feature_ND: Tensor, args: argparse.Namespace) -> list[dict[str, object]]:
    """One head against the other loops."""
    lines: list[dict[str, object]] = []
    print(f"{'C':>5} {'batch':>6}   rows/s: loader     bare      sgd    adamw", end="   ")
    print("sgd/loader      sgd/bare  adamw/loader    adamw/bare")
    for classes in args.classes:
        data = data_of(feature_ND, classes)
        for size in args.batches:
            taken = turns(
                {
                    "loader": loader(data, feature_ND, size),
                    "bare": bare(data, feature_ND, size),
                    "sgd": ours(data, size, "sgd"),
                    "adamw": ours(data, size, "adamw"),
                },
                args.rounds,
                args.seconds,
            )
            rates = {name: size / statistics.median(own) for name, own in taken.clock.items()}
            times = {
                f"{own} over {other}": taken.over(other, own)
                for own in ("sgd", "adamw")
                for other in ("loader", "bare")
            }
            print(
                f"{classes:>5} {size:>6}          ", *(f"{r:8.0f}" for r in rates.values()), end=""
            )
            print("  ", *(f"{one:5.2f} ({work:5.2f})" for one, work in times.values()), flush=True)
            lines.append(
                {"classes": classes, "batch": size, "rows_per_second": rates, "ratios": times}
                | {"seconds_per_step": asdict(taken)}
            )
    return lines


def stacks(feature_ND: Tensor, args: argparse.Namespace) -> list[dict[str, object]]:
    """Stacks of heads of two classes against one head."""
    lines: list[dict[str, object]] = []
    data = data_of(feature_ND, 2)
    names = ["one", "64 heads, one lane", "64 heads, four lanes", "512 heads"]
    print("\nC = 2, time of a step over that of one head")
    print(f"{'':>6} {'batch':>6} ", *(f"{name:>21}" for name in names[1:]))
    for optimizer in ("adamw", "sgd"):
        for size in args.batches:
            ways = {name: ours(data, size, optimizer, name) for name in names}
            taken = turns(ways, args.rounds, args.seconds)
            times = {name: taken.over(name, "one") for name in names[1:]}
            shown = (f"{one:12.2f} ({work:5.2f})" for one, work in times.values())
            print(f"{optimizer:>6} {size:>6} ", *shown, flush=True)
            lines.append(
                {"optimizer": optimizer, "batch": size, "ratios": times}
                | {"seconds_per_step": asdict(taken)}
            )
    return lines


def whole(feature_ND: Tensor, args: argparse.Namespace) -> dict[str, object]:
    """`train` from its first line to its last, five epochs, a tenth of the rows validating."""
    data = data_of(feature_ND, 2, len(feature_ND) // 10)
    size, epochs = TrainConfig().batch_size, 5
    passes = epochs * (len(data.train) // size)

    def trained(count: int) -> float:
        began = perf_counter()
        train(data, TrainConfig(epochs=count), RATE)
        return perf_counter() - began

    taken: dict[str, list[float]] = {"bare": [], "train()": []}
    for _ in range(min(args.rounds, 5)):
        taken["bare"].append(bare(data, feature_ND, size)(passes))
        taken["train()"].append(trained(epochs))
    rates = {name: passes * size / statistics.median(own) for name, own in taken.items()}
    times = ratio(taken["bare"], taken["train()"])
    print(f"\nC = 2, batch {size}, {epochs} epochs of {len(data.train):,} rows")
    print(
        f"bare {rates['bare']:,.0f} rows/s; train(), adamw, with {len(data.valid):,} rows", end=""
    )
    print(f" validated each epoch: {rates['train()']:,.0f} rows/s, {times:.2f} x bare")
    return {
        "classes": 2,
        "batch": size,
        "epochs": epochs,
        "rows_validated": len(data.valid),
        "rows_per_second": rates,
        "train over bare": times,
        "seconds": taken,
    }


def main() -> None:
    """Measure, print, write."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--rows", type=int, default=200_000)
    asked.add_argument("--width", type=int, default=1024)
    asked.add_argument("--rounds", type=int, default=9)
    asked.add_argument("--seconds", type=float, default=0.25, help="of each way in each round")
    asked.add_argument("--threads", type=int, default=CORES)
    asked.add_argument("--classes", type=int, nargs="+", default=[2, 1000])
    asked.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024])
    args = asked.parse_args()
    torch.set_num_threads(args.threads)
    load = [os.getloadavg()[0]]
    if load[0] > 0.5:
        print(f"load before: {load[0]:.1f} on {CORES} cores: trust ratios, not rates\n")
    draw = torch.Generator().manual_seed(0)
    feature_ND = torch.empty(args.rows, args.width, dtype=torch.float16)
    for part in feature_ND.split(8192):
        part.copy_(torch.randn(part.shape, generator=draw))
    result = {
        "command": f"python bench/head.py --rows {args.rows} --width {args.width}"
        f" --rounds {args.rounds} --seconds {args.seconds} --threads {args.threads}",
        "machine": f"{platform.machine()}, {CORES} cores, torch {torch.__version__}",
        "ratios": "medians over the rounds: of time on the clock, of processor time",
        "one_head": steps(feature_ND, args),
        "stacks": stacks(feature_ND, args),
        "end_to_end": whole(feature_ND, args),
    }
    load.append(os.getloadavg()[0])
    result["load_before_and_after"] = load  # ours is one of it, per thread
    print(f"load before {load[0]:.1f}, after {load[1]:.1f}; {args.threads} threads of ours")
    file = Path(__file__).parent / "results" / f"head_cpu_{date.today()}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {file}")


if __name__ == "__main__":
    main()
