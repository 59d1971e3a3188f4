"""Seconds for a catalog of a million files, against a walk that only counts them, in one run.

    python bench/listing.py [--files N] [--folder DIR] [--rounds R]

Two ways take turns, each in a fresh process, so that a busy machine slows both:

    walk        a bare recursive os.scandir: names and kinds only, nothing is kept
    labelled    plan.labelled: path, size, mtime, label and split of every file, sorted

The tree is made below DIR (default: the system's folder for temporary files) and deleted
afterwards; files hold one byte. The file system's cache is warm: a first walk is not counted.
Medians and their ratio are printed and written to bench/results/. Memory is the largest resident
set of the process and, times their number, of its helpers.
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
from datetime import date
from pathlib import Path
from time import perf_counter

CORES = len(os.sched_getaffinity(0))
PER_FOLDER = 1000


def grow(root: Path, files: int) -> int:
    """A tree of train/ and valid/, five classes of many folders in each; the number of folders."""
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
    return folders


def walk(folder: str) -> int:
    """How many files lie below a folder."""
    count = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            count += walk(entry.path) if entry.is_dir() else 1
    return count


def measure(way: str, folder: str) -> None:
    """One way, in this process: files, seconds and MiB as one line of JSON."""
    from arrowhead import plan

    began = perf_counter()
    rows = walk(folder) if way == "walk" else len(plan.labelled(folder))
    seconds = perf_counter() - began
    mine = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    helpers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * min(CORES, 8)
    print(json.dumps({"files": rows, "seconds": seconds, "mib": (mine + helpers) / 1024}))


def main() -> None:
    """Make the tree, measure, print, write."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--files", type=int, default=1_000_000)
    asked.add_argument("--folder", type=Path, help="where the tree is made")
    asked.add_argument("--rounds", type=int, default=5)
    asked.add_argument("--measure", choices=("walk", "labelled"), help=argparse.SUPPRESS)
    args = asked.parse_args()
    if args.measure:
        measure(args.measure, str(args.folder))
        return
    taken: dict[str, list[dict[str, float]]] = {"walk": [], "labelled": []}
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folders = grow(Path(scratch), args.files)
        walk(scratch)
        for _ in range(args.rounds):
            for way, results in taken.items():
                command = [sys.executable, __file__, "--measure", way, "--folder", scratch]
                answer = subprocess.run(command, capture_output=True, text=True, check=True)
                results.append(json.loads(answer.stdout))
                assert results[-1]["files"] == args.files
    seconds = {way: [result["seconds"] for result in results] for way, results in taken.items()}
    median = {way: statistics.median(each) for way, each in seconds.items()}
    ratio = median["labelled"] / median["walk"]
    mib = max(result["mib"] for result in taken["labelled"])
    for way, each in median.items():
        print(f"{way:<10} {each:6.2f} s  {args.files / each / 1e6:.2f} million files/s")
    print(f"labelled takes {ratio:.2f} x the walk, {mib:.0f} MiB at most")
    result = {
        "command": f"python bench/listing.py --files {args.files} --rounds {args.rounds}",
        "machine": f"{platform.machine()}, {CORES} cores, Python {platform.python_version()}",
        "folders": folders,
        "seconds": seconds,
        "ratio": ratio,
        "mib": mib,
    }
    file = Path(__file__).parent / "results" / f"listing_{date.today()}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {file}")


if __name__ == "__main__":
    main()
