"""Compare the rows per second of head training in Arrowhead and in two common loops, in one run.

    python bench/head.py [--rows N] [--width D] [--rounds R] [--seconds S] [--threads T]

The alternatives run in turns, round by round, so that a busy machine slows all of them. Ratios are
computed within a round, and their medians are printed: of wall-clock time and, in brackets, of
processor time, which a busy machine disturbs less. Features are random float16, in memory. An
alternative runs for about S seconds in each round.

    loader      DataLoader(TensorDataset, shuffle=True, num_workers=0), linear, cross entropy, SGD
    bare        the same by hand: x = X[perm[i:i+B]].float(), a new permutation for each pass
    sgd, adamw  Training.train_step, with the same SGD as the loops, and with adamw, the default
    stacks      64 heads: 16 rates x 4 weight decays, or 16 rates x 4 seeds (each seed with its own
                batches); 512 heads: 512 rates. Two classes, time per step compared with one head
    end to end  train(): epochs with validation, against the bare loop, which never validates

Classes and batch sizes vary. The table and bench/results/head_cpu_<date>.json give the load of the
machine.
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
from arrowhead.training.dataset import Data, InMemoryFeatures, Trial
from arrowhead.training.trainer import Training, train

CORES = len(os.sched_getaffinity(0))
RATE = 0.01
Loop = Callable[[int], float]
"""Runs this many steps and returns the seconds."""


def data_of(feature_ND: Tensor, classes: int, valid: int = 0) -> Data:
    """These features with random labels; the last `valid` rows (or ten) are for validation."""
    rows = np.arange(len(feature_ND))
    generator = torch.Generator().manual_seed(0)
    return Data(
        feature=InMemoryFeatures(feature_ND[:, None]),
        label=torch.randint(classes, (len(rows),), generator=generator),
        key=rows.astype(np.uint64),
        train=rows[: len(rows) - valid],
        valid=rows[-(valid or 10) :],
        classes=[str(number) for number in range(classes)],
    )


# ---------------------------------------------------------------------------- other loops


def loader(data: Data, feature_ND: Tensor, size: int) -> Loop:
    """The usual loop with a DataLoader."""
    head = nn.Linear(feature_ND.shape[1], len(data.classes))
    optimizer = torch.optim.SGD(head.parameters(), lr=RATE)
    loss_of = nn.CrossEntropyLoss()
    batches = DataLoader(TensorDataset(feature_ND, data.label), batch_size=size, shuffle=True)

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from batches

    stream = endless()
    next(stream)  # the first step would also draw the order

    def run(steps: int) -> float:
        start = perf_counter()
        for _ in range(steps):
            feature, label = next(stream)
            optimizer.zero_grad()
            loss_of(head(feature.float()), label).backward()
            optimizer.step()
        return perf_counter() - start

    return run


def bare(data: Data, feature_ND: Tensor, size: int) -> Loop:
    """The same without a loader."""
    head = nn.Linear(feature_ND.shape[1], len(data.classes))
    optimizer = torch.optim.SGD(head.parameters(), lr=RATE)
    rows = len(data.train)
    state = [torch.randperm(rows), 0]

    def run(steps: int) -> float:
        start = perf_counter()
        perm, at = state
        for _ in range(steps):
            if at + size > rows:
                perm, at = torch.randperm(rows), 0
            row = perm[at : at + size]
            loss = nn.functional.cross_entropy(head(feature_ND[row].float()), data.label[row])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            at += size
        state[:] = perm, at
        return perf_counter() - start

    return run


# ----------------------------------------------------------------------------- Arrowhead


def grid(data: Data, config: TrainConfig, heads: str) -> list[Trial]:
    """The heads of a stack, by its name in the table."""
    rates = np.geomspace(1e-4, 1e-1, 512 if heads == "512 heads" else 16).tolist()
    others = {
        "one": [{}],
        "64 heads, one seed": [{"weight_decay": decay} for decay in (0.0, 1e-4, 1e-3, 1e-2)],
        "64 heads, four seeds": [{"seed": seed} for seed in range(4)],
        "512 heads": [{}],
    }[heads]
    return [
        Trial(
            config=replace(config, **other),
            lr=rate,
            train=data.train,
            valid=data.valid,
        )
        for rate in ([RATE] if heads == "one" else rates)
        for other in others
    ]


def arrowhead(data: Data, size: int, optimizer: str, heads: str = "one") -> Loop:
    """Arrowhead's training steps."""
    config = TrainConfig(
        batch_size=size,
        optimizer=optimizer,  # type: ignore[arg-type]
        weight_decay=0.01 if optimizer == "adamw" else 0.0,
        momentum=0.9 if optimizer == "adamw" else 0.0,
    )
    training = Training(data, grid(data, config, heads))
    done = [0]

    def run(steps: int) -> float:
        start = perf_counter()
        for step in range(done[0], done[0] + steps):
            training.train_step(step, 1.0)
        done[0] += steps
        return perf_counter() - start

    return run


# ----------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Times:
    """Seconds per step of each loop, one per round: wall-clock and processor time."""

    clock: dict[str, list[float]]
    work: dict[str, list[float]]

    def ratio(self, name: str, other: str) -> tuple[float, float]:
        """How many times as long one loop took as another: wall-clock and processor time."""
        clock, work = self.clock, self.work
        return median_ratio(clock[name], clock[other]), median_ratio(work[name], work[other])


def run_in_turns(loops: dict[str, Loop], rounds: int, seconds: float) -> Times:
    """Run each loop for about `seconds` in every round."""
    steps = {}
    for name, loop in loops.items():
        loop(3)
        steps[name] = max(3, int(seconds / (loop(10) / 10)))
    times = Times({name: [] for name in loops}, {name: [] for name in loops})
    for _ in range(rounds):
        for name, loop in loops.items():
            work_before = process_time()
            times.clock[name].append(loop(steps[name]) / steps[name])
            times.work[name].append((process_time() - work_before) / steps[name])
    return times


def median_ratio(times: list[float], others: list[float]) -> float:
    """The median over rounds of the ratio of two times."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def compare_loops(feature_ND: Tensor, args: argparse.Namespace) -> list[dict[str, object]]:
    """Compare one head in Arrowhead with the other loops."""
    lines: list[dict[str, object]] = []
    print(f"{'C':>5} {'batch':>6}   rows/s: loader     bare      sgd    adamw", end="   ")
    print("sgd/loader      sgd/bare  adamw/loader    adamw/bare")
    for classes in args.classes:
        data = data_of(feature_ND, classes)
        for size in args.batches:
            times = run_in_turns(
                {
                    "loader": loader(data, feature_ND, size),
                    "bare": bare(data, feature_ND, size),
                    "sgd": arrowhead(data, size, "sgd"),
                    "adamw": arrowhead(data, size, "adamw"),
                },
                args.rounds,
                args.seconds,
            )
            rates = {name: size / statistics.median(each) for name, each in times.clock.items()}
            ratios = {
                f"{name} over {other}": times.ratio(other, name)
                for name in ("sgd", "adamw")
                for other in ("loader", "bare")
            }
            print(
                f"{classes:>5} {size:>6}          ", *(f"{r:8.0f}" for r in rates.values()), end=""
            )
            shown = (f"{clock:5.2f} ({work:5.2f})" for clock, work in ratios.values())
            print("  ", *shown, flush=True)
            lines.append(
                {"classes": classes, "batch": size, "rows_per_second": rates, "ratios": ratios}
                | {"seconds_per_step": asdict(times)}
            )
    return lines


def compare_stacks(feature_ND: Tensor, args: argparse.Namespace) -> list[dict[str, object]]:
    """Compare stacks of heads with one head, with two classes."""
    lines: list[dict[str, object]] = []
    data = data_of(feature_ND, 2)
    names = ["one", "64 heads, one seed", "64 heads, four seeds", "512 heads"]
    print("\nC = 2, time of a step over that of one head")
    print(f"{'':>6} {'batch':>6} ", *(f"{name:>21}" for name in names[1:]))
    for optimizer in ("adamw", "sgd"):
        for size in args.batches:
            loops = {name: arrowhead(data, size, optimizer, name) for name in names}
            times = run_in_turns(loops, args.rounds, args.seconds)
            ratios = {name: times.ratio(name, "one") for name in names[1:]}
            shown = (f"{clock:12.2f} ({work:5.2f})" for clock, work in ratios.values())
            print(f"{optimizer:>6} {size:>6} ", *shown, flush=True)
            lines.append(
                {"optimizer": optimizer, "batch": size, "ratios": ratios}
                | {"seconds_per_step": asdict(times)}
            )
    return lines


def compare_end_to_end(feature_ND: Tensor, args: argparse.Namespace) -> dict[str, object]:
    """Compare the complete `train`, five epochs with a tenth of the rows for validation."""
    data = data_of(feature_ND, 2, len(feature_ND) // 10)
    size, epochs = TrainConfig().batch_size, 5
    steps = epochs * (len(data.train) // size)

    def run_train() -> float:
        start = perf_counter()
        train(data, TrainConfig(epochs=epochs), RATE)
        return perf_counter() - start

    seconds: dict[str, list[float]] = {"bare": [], "train()": []}
    for _ in range(min(args.rounds, 5)):
        seconds["bare"].append(bare(data, feature_ND, size)(steps))
        seconds["train()"].append(run_train())
    rates = {name: steps * size / statistics.median(each) for name, each in seconds.items()}
    ratio = median_ratio(seconds["bare"], seconds["train()"])
    print(f"\nC = 2, batch {size}, {epochs} epochs of {len(data.train):,} rows")
    print(
        f"bare {rates['bare']:,.0f} rows/s; train(), adamw, with {len(data.valid):,} rows", end=""
    )
    print(f" validated each epoch: {rates['train()']:,.0f} rows/s, {ratio:.2f} x bare")
    return {
        "classes": 2,
        "batch": size,
        "epochs": epochs,
        "rows_validated": len(data.valid),
        "rows_per_second": rates,
        "train over bare": ratio,
        "seconds": seconds,
    }


def main() -> None:
    """Measure, print the results and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.25, help="of each loop in each round")
    parser.add_argument("--threads", type=int, default=CORES)
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 1000])
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load = [os.getloadavg()[0]]
    if load[0] > 0.5:
        print(f"load before: {load[0]:.1f} on {CORES} cores: trust the ratios, not the rates\n")
    generator = torch.Generator().manual_seed(0)
    feature_ND = torch.empty(args.rows, args.width, dtype=torch.float16)
    for part in feature_ND.split(8192):
        part.copy_(torch.randn(part.shape, generator=generator))
    result = {
        "command": f"python bench/head.py --rows {args.rows} --width {args.width}"
        f" --rounds {args.rounds} --seconds {args.seconds} --threads {args.threads}",
        "machine": f"{platform.machine()}, {CORES} cores, torch {torch.__version__}",
        "ratios": "medians over the rounds: of wall-clock time, of processor time",
        "one_head": compare_loops(feature_ND, args),
        "stacks": compare_stacks(feature_ND, args),
        "end_to_end": compare_end_to_end(feature_ND, args),
    }
    load.append(os.getloadavg()[0])
    result["load_before_and_after"] = load  # the load after includes this program's threads
    print(f"load before {load[0]:.1f}, after {load[1]:.1f}; {args.threads} threads of this program")
    file = Path(__file__).parent / "results" / f"head_cpu_{date.today()}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {file}")


if __name__ == "__main__":
    main()
