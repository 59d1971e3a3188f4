"""Measure the peak memory and the rows per second of scoring at several sizes.

    .venv/bin/python bench/score.py [--sizes 1000 10000 1000000] [--decoded 1000 4000]

Folders with this many hard links to a few drawn images are scored with a small random body. The
images of `--sizes` are looked up in a store, to measure the bookkeeping of a million rows and not a
million forward passes; the images of `--decoded` are decoded. Memory is the sum for the command and
its decoder (anonymous and shared pages, sampled every 20 ms). Each scoring is a new process.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

FLAGS = ["--body", "resnet18", "--weights", "random", "--size", "32"]
MAX_LINKS = 20_000  # hard links to one file that every file system allows


def main() -> None:
    """Measure, print, and write JSON with --out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=[1000, 10_000, 1_000_000])
    parser.add_argument("--decoded", type=int, nargs="*", default=[1000, 4000])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        images = draw_images(scratch)
        run(scratch, "fit", "photos", "fit", *FLAGS, "--epochs", "1", "--rate", "0.01")
        for size, flags in [
            *((size, ["--store", "fit/store"]) for size in args.sizes),
            *((size, []) for size in args.decoded),
        ]:
            data = scratch / f"names-{size}"
            if not data.exists():
                link_images(data, images, size)
            out = f"scores-{size}-{len(flags)}"
            result, megabytes = run(scratch, "score", "fit/bundle", data.name, out, *flags)
            seconds = result["seconds"]["wall"]
            table.append(
                {
                    "rows": size,
                    "way": "looked up" if flags else "decoded",
                    "megabytes": round(megabytes),
                    "rows_per_second": round(size / seconds),
                    "seconds": {k: round(v, 2) for k, v in result["seconds"].items()},
                    "balanced": result["counts"]["inputs"] == size,
                }
            )
            print(json.dumps(table[-1]), flush=True)
    if args.out:
        args.out.write_text(json.dumps(table, indent=1) + "\n")


def draw_images(scratch: Path) -> list[Path]:
    """Draw images in scratch/photos."""
    from arrowhead import demo

    demo.draw(scratch / "photos", per_class=24)
    return sorted((scratch / "photos").glob("train/*/*.jpg"))


def link_images(folder: Path, images: list[Path], size: int) -> None:
    """Create `size` links to copies of the images, a thousand per folder."""
    copies: list[Path] = []
    folder.mkdir()
    contents = folder.with_name(f"{folder.name}-contents")
    contents.mkdir()
    for number in range(size):
        if number % 1000 == 0:
            (folder / f"{number // 1000:04}").mkdir()
        at = number % len(images) + len(images) * (number // len(images) // MAX_LINKS)
        if at == len(copies):
            copies.append(contents / f"{at}.jpg")
            copies[-1].write_bytes(images[at % len(images)].read_bytes())
        os.link(copies[at], folder / f"{number // 1000:04}" / f"{number:07}.jpg")


def run(scratch: Path, *words: str) -> tuple[dict[str, Any], float]:
    """Run a command in a new process; its result and its peak memory in megabytes."""
    program = [sys.executable, str(Path(__file__).resolve()), "--child", *words, "--json"]
    done = subprocess.run(program, cwd=scratch, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1]), int(done.stderr.split()[-1]) / 1024


def child(words: list[str]) -> None:
    """Run a command; print its peak memory in kilobytes as the last line of stderr."""
    import psutil

    from arrowhead.cli import main as command_line

    peak = 0

    def memory(pid: int) -> int:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:  # the process has ended
            return 0
        return sum(map(int, re.findall(r"Rss(?:Anon|Shmem):\s+(\d+)", status)))

    def watch() -> None:
        nonlocal peak
        this = psutil.Process()
        while True:
            pids = [this.pid, *(one.pid for one in this.children(recursive=True))]
            peak = max(peak, sum(map(memory, pids)))
            time.sleep(0.02)

    threading.Thread(target=watch, daemon=True).start()
    try:
        command_line.main(words)
    finally:
        print(peak, file=sys.stderr)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        main()
