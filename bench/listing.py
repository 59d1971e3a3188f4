"""Compare the seconds to list a million files with bare walks over the same files, in one run.

    python bench/listing.py [--files N] [--folder DIR] [--rounds R]

Three alternatives run in turns, each in a new process, so that a busy machine slows all of them:

    count       a recursive os.scandir that only counts: the minimum for a walk
    walk        the same as a generator that yields every entry (as in PEP 471)
    labelled    sources.labelled_catalog: path, size, mtime, label and split of every file, sorted

The bare walks do not stat any file; `labelled` does so for each.

Files have one byte. The tree is deleted afterwards; with --folder it is created in DIR, unless it
exists from an earlier run, and kept. The file system's cache is warm: a first walk is not counted.
Medians and their ratios are printed and written to bench/results/. Memory is the largest resident
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
FILES_PER_FOLDER = 1000
ALTERNATIVES = ("count", "walk", "labelled")


def create_tree(root: Path, files: int) -> None:
    """Create train/ and valid/ with five classes each, in many folders."""
    folders = -(-files // FILES_PER_FOLDER)
    for number in range(folders):
        split = "valid" if number // 5 % 5 == 4 else "train"
        folder = root / split / f"class{number % 5}" / f"part{number:04d}"
        folder.mkdir(parents=True)
        handle = os.open(folder, os.O_RDONLY)
        for row in range(number * FILES_PER_FOLDER, min(files, (number + 1) * FILES_PER_FOLDER)):
            # Names in no order, like those of photos from many cameras.
            name = f"IMG_{row * 2654435761 % 2**32:010d}.jpg"
            file = os.open(name, os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=handle)
            os.write(file, b"x")
            os.close(file)
        os.close(handle)


def count(folder: str) -> int:
    """The number of files below a folder."""
    total = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            total += count(entry.path) if entry.is_dir() else 1
    return total


def walk(folder: str) -> Iterator[os.DirEntry[str]]:
    """Every file below a folder."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from walk(entry.path)
            else:
                yield entry


def measure(name: str, folder: str) -> None:
    """Run one alternative in this process; print files, seconds and MiB as one line of JSON."""
    from arrowhead.data import sources

    alternatives: dict[str, Callable[[], int]] = {
        "count": lambda: count(folder),
        "walk": lambda: sum(1 for _ in walk(folder)),
        "labelled": lambda: len(sources.labelled_catalog(folder)),
    }
    start = perf_counter()
    rows = alternatives[name]()
    seconds = perf_counter() - start
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"files": rows, "seconds": seconds, "mib": kib / 1024}))


def main() -> None:
    """Create the tree and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="the folder of the tree, created if missing")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", choices=ALTERNATIVES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure, str(args.folder))
        return
    with ExitStack() as stack:
        tree = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if not (tree / "train").is_dir():
            create_tree(tree, args.files)
        compare(tree, count(str(tree)), args.rounds)


def compare(tree: Path, files: int, rounds: int) -> None:
    """Run the alternatives in turns over a tree of `files` files; print and write the results."""
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in ALTERNATIVES}
    for _ in range(rounds):
        for name, results in measured.items():
            command = [sys.executable, __file__, "--measure", name, "--folder", str(tree)]
            process = subprocess.run(command, capture_output=True, text=True, check=True)
            results.append(json.loads(process.stdout))
            assert results[-1]["files"] == files
    seconds = {name: [one["seconds"] for one in results] for name, results in measured.items()}
    median = {name: statistics.median(each) for name, each in seconds.items()}
    ratios = {name: median["labelled"] / median[name] for name in ("count", "walk")}
    mib = max(result["mib"] for result in measured["labelled"])
    for name, each in median.items():
        print(f"{name:<10} {each:6.2f} s  {files / each / 1e6:.2f} million files/s")
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
