"""Scoring at several sizes: most memory held, and rows per second.

    .venv/bin/python bench/score.py [--sizes 1000 10000 1000000] [--decoded 1000 4000]

Folders of so many names of a few drawn images (hard links) are scored by a small random body. With
`--store` all images are looked up, so that the bookkeeping of a million rows is measured and not a
million forward passes; `--decoded` sizes go the whole way. Memory is what the command and its
decoder hold together (anonymous and shared pages, sampled every 20 ms), each in a new process.
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
LINKS = 20_000  # names of one file that every file system allows


def main() -> None:
    """Measure and print; JSON if asked to."""
    asked = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    asked.add_argument("--sizes", type=int, nargs="*", default=[1000, 10_000, 1_000_000])
    asked.add_argument("--decoded", type=int, nargs="*", default=[1000, 4000])
    asked.add_argument("--out", type=Path)
    settings = asked.parse_args()
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        images = drawn(place)
        run(place, "fit", "photos", "fit", *FLAGS, "--epochs", "1", "--rate", "0.01")
        for size, flags in [
            *((size, ["--store", "fit/store"]) for size in settings.sizes),
            *((size, []) for size in settings.decoded),
        ]:
            data = place / f"names-{size}"
            if not data.exists():
                named(data, images, size)
            out = f"scores-{size}-{len(flags)}"
            found, held = run(place, "score", "fit/bundle", data.name, out, *flags)
            seconds = found["seconds"]["wall"]
            table.append(
                {
                    "rows": size,
                    "way": "looked up" if flags else "decoded",
                    "megabytes": round(held),
                    "rows_per_second": round(size / seconds),
                    "seconds": {k: round(v, 2) for k, v in found["seconds"].items()},
                    "balanced": found["counts"]["inputs"] == size,
                }
            )
            print(json.dumps(table[-1]), flush=True)
    if settings.out:
        settings.out.write_text(json.dumps(table, indent=1) + "\n")


def drawn(place: Path) -> list[Path]:
    """Drawn images in place/photos."""
    from arrowhead import demo

    demo.draw(place / "photos", per_class=24)
    return sorted((place / "photos").glob("train/*/*.jpg"))


def named(folder: Path, images: list[Path], size: int) -> None:
    """`size` names of the images, a thousand in a folder."""
    copies: list[Path] = []
    folder.mkdir()
    store = folder.with_name(f"{folder.name}-contents")
    store.mkdir()
    for number in range(size):
        if number % 1000 == 0:
            (folder / f"{number // 1000:04}").mkdir()
        at = number % len(images) + len(images) * (number // len(images) // LINKS)
        if at == len(copies):
            copies.append(store / f"{at}.jpg")
            copies[-1].write_bytes(images[at % len(images)].read_bytes())
        os.link(copies[at], folder / f"{number // 1000:04}" / f"{number:07}.jpg")


def run(place: Path, *words: str) -> tuple[dict[str, Any], float]:
    """The result of a command in a process of its own, and the most megabytes it held."""
    program = [sys.executable, str(Path(__file__).resolve()), "--child", *words, "--json"]
    done = subprocess.run(program, cwd=place, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1]), int(done.stderr.split()[-1]) / 1024


def child(words: list[str]) -> None:
    """Run a command; the most kilobytes held, last on stderr."""
    import psutil

    from arrowhead.cli import main as command_line

    most = 0

    def held(pid: int) -> int:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:  # gone
            return 0
        return sum(map(int, re.findall(r"Rss(?:Anon|Shmem):\s+(\d+)", status)))

    def watch() -> None:
        nonlocal most
        me = psutil.Process()
        while True:
            pids = [me.pid, *(one.pid for one in me.children(recursive=True))]
            most = max(most, sum(map(held, pids)))
            time.sleep(0.02)

    threading.Thread(target=watch, daemon=True).start()
    try:
        command_line.main(words)
    finally:
        print(most, file=sys.stderr)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        main()
