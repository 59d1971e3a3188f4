"""Seconds for a catalog of a million files, against bare walks over the same files, in one run.

    python bench/listing.py [--files N] [--folder DIR] [--rounds R]

Three ways take turns, each in a fresh process, so that a busy machine slows all of them:

    count       a recursive os.scandir that only counts: the least that a walk can do
    walk        the same as a generator that hands out every entry (as in PEP 471)
    labelled    plan.labelled: path, size, mtime, label and split of every file, sorted

The bare walks look at no file; `labelled` asks the kernel about each one.

Files hold one byte. The tree is deleted afterwards; with --folder it is made in DIR, unless it is
there from an earlier run, and stays. The file system's cache is warm: a first walk is not counted.
Medians and their ratio are printed and written to bench/results/. Memory is the largest resident
set of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from time import perf_counter

CORES = len(os.sched_getaffinity(0))
PER_FOLDER = 1000
WAYS = ("count", "walk", "labelled")


def grow(root: Path, files: int) -> None:
    """A tree of train/ and valid/, five classes of many folders in each."""
    folders = -(-files // PER_FOLDER)
    for number in range(folders):
        split = "valid" if number // 5 % 5 == 4 else "train"
        folder = root / split / f"class{number % 5}" / f"part{number:04d}"
        folder.mkdir(parents=True)
        handle = os.open(folder, os.O_RDONLY)
        for row in range(number * PER_FOLDER, min(files, (number + 1) * PER_FOLDER)):
            # Names in no order, as those of photos from many cameras.
            name = f"IMG_{row * 2654435761 % 2**32:010d}.jpg"
            file = os.open(name, os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=handle)
            os.write(file, b"x")
            os.close(file)
        os.close(handle)


def count(folder: str) -> int:
    """How many files lie below a folder."""
    found = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            found += count(entry.path) if entry.is_dir() else 1
    return found


def walk(folder: str) -> Iterator[os.DirEntry[str]]:
    """Every file below a folder."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from walk(entry.path)
            else:
                yield entry


def measure(way: str, folder: str) -> None:
    """One way, in this process: files, seconds and MiB as one line of JSON."""
    from arrowhead.data import sources

    ways: dict[str, Callable[[], int]] = {
        "count": lambda: count(folder),
        "walk": lambda: sum(1 for _ in walk(folder)),
        "labelled": lambda: len(sources.labelled(folder)),
    }
    began = perf_counter()
    rows = ways[way]()
    seconds = perf_counter() - began
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"files": rows, "seconds": seconds, "mib": kib / 1024}))


def main() -> None:
    """Make the tree and compare."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--files", type=int, default=1_000_000)
    asked.add_argument("--folder", type=Path, help="where the tree is, or is to be")
    asked.add_argument("--rounds", type=int, default=5)
    asked.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    args = asked.parse_args()
    if args.measure:
        measure(args.measure, str(args.folder))
        return
    with ExitStack() as stack:
        kept = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if not (kept / "train").is_dir():
            grow(kept, args.files)
        compare(kept, count(str(kept)), args.rounds)


def compare(tree: Path, files: int, rounds: int) -> None:
    """Let the ways take turns over a tree of so many files; print and write what came out."""
    taken: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, results in taken.items():
            command = [sys.executable, __file__, "--measure", way, "--folder", str(tree)]
            answer = subprocess.run(command, capture_output=True, text=True, check=True)
            results.append(json.loads(answer.stdout))
            assert results[-1]["files"] == files
    seconds = {way: [result["seconds"] for result in results] for way, results in taken.items()}
    median = {way: statistics.median(each) for way, each in seconds.items()}
    ratios = {way: median["labelled"] / median[way] for way in ("count", "walk")}
    mib = max(result["mib"] for result in taken["labelled"])
    for way, each in median.items():
        print(f"{way:<10} {each:6.2f} s  {files / each / 1e6:.2f} million files/s")
    print(f"labelled takes {ratios['count']:.2f} x count, {ratios['walk']:.2f} x walk")
    print(f"and {mib:.0f} MiB at most")
    result = {
        "command": f"python bench/listing.py --files {files} --rounds {rounds}",
        "machine": f"{platform.machine()}, {CORES} cores, Python {platform.python_version()}",
        "seconds": seconds,
        "labelled_over": ratios,
        "mib": mib,
    }
    file = Path(__file__).parent / "results" / f"listing_{date.today()}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {file}")


if __name__ == "__main__":
    main()
