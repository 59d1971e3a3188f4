"""Compare the images per second of the guarded decoder and a bare DALI pipeline, in one run.

    python bench/decode.py [--data FOLDER] [--images N] [--rounds R] [--threads T] [--size S]

Three alternatives run in turns, round by round, so that a busy machine slows all of them:

    bare            one DALI pipeline in this process: fn.decoders.image, the same resize. It has
                    no header check and no child process, and stops at the first bad file
    guarded         GuardedDecoder.stream on the same files, all good
    1 % bad         the same with every 100th file truncated

All get the same bytes in memory, in batches of 32, and return new NumPy arrays. Medians and ratios
of the rates and of processor time, which a busy machine disturbs less, are printed and written to
bench/results/. Without --data, images are drawn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from hashlib import blake2b
from itertools import cycle, islice
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
from nvidia.dali import fn, pipeline_def, types

from arrowhead import demo
from arrowhead.decode.geometry import view_region
from arrowhead.decode.headers import read_header
from arrowhead.decode.pixels import PixelConfig
from arrowhead.decode.worker_process import SubprocessDecoder

CORES = len(os.sched_getaffinity(0))
BATCH = 32


@dataclass(frozen=True)
class Batch:
    """The bytes and ids of files, as the guarded decoder takes them."""

    encoded: Sequence[bytes]
    image_ids: Sequence[bytes]


def batches(files: Sequence[bytes]) -> list[Batch]:
    """The files in batches of 32."""
    ids = [blake2b(data, digest_size=16).digest() for data in files]
    starts = range(0, len(files), BATCH)
    return [Batch(files[at : at + BATCH], ids[at : at + BATCH]) for at in starts]


def bare(all_batches: Sequence[Batch], config: PixelConfig, threads: int) -> Callable[[], int]:
    """A function that decodes and resizes these batches with DALI alone and counts the images.

    The crops come from the headers, as in the guarded decoder. They are computed here, so that the
    function only decodes and resizes.
    """
    inputs = []
    for batch in all_batches:
        arrays = [np.frombuffer(data, np.uint8) for data in batch.encoded]
        regions = [view_region(config, read_header(data, config)) for data in batch.encoded]
        inputs.append((arrays, *map(list, zip(*regions, strict=True))))

    @pipeline_def(batch_size=BATCH, num_threads=threads, device_id=None, prefetch_queue_depth=2)
    def plain() -> Any:
        kinds = {"dtype": [types.UINT8, types.FLOAT, types.FLOAT], "ndim": [1, 1, 1]}
        encoded, start, end = fn.external_source(inputs, num_outputs=3, cycle="raise", **kinds)
        exact = {"adjust_orientation": False, "jpeg_fancy_upsampling": True}
        image = fn.decoders.image(encoded, device="cpu", **exact)
        smooth = {"interp_type": types.INTERP_LINEAR, "antialias": True}
        side = [config.size, config.size]
        return fn.resize(image, size=side, roi_start=start, roi_end=end, **smooth)

    pipeline = plain()
    pipeline.build()

    def run() -> int:
        count = 0
        try:
            while True:
                (pixels,) = pipeline.run()
                count += len(pixels.as_array().copy())
        except StopIteration:
            pipeline.reset()
        return count

    return run


def shares_of_bare(seconds: dict[str, list[float]]) -> dict[str, float]:
    """The rate of each alternative as a share of the bare one's: the median over rounds."""
    return {
        name: statistics.median(b / s for b, s in zip(seconds["bare"], own, strict=True))
        for name, own in seconds.items()
    }


def processor_seconds(child: int | None) -> float:
    """Processor time of this process and a child process so far."""
    child_seconds = 0.0
    if child:
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        child_seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return process_time() + child_seconds


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of JPEGs, at any depth")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=CORES)
    parser.add_argument("--size", type=int, default=224)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if args.data is None:
            demo.draw(Path(scratch), per_class=100)
        paths = sorted((args.data or Path(scratch)).rglob("*.jpg"))
        files = [path.read_bytes() for path in islice(cycle(paths), args.images)]
    config = PixelConfig(size=args.size)
    good = batches(files)
    truncated = [data[: len(data) // 2] if n % 100 == 50 else data for n, data in enumerate(files)]
    bad = batches(truncated)
    run_bare = bare(good, config, args.threads)

    times: dict[str, list[float]] = {"bare": [], "guarded": [], "1 % bad": []}
    with SubprocessDecoder(config, batch_size=BATCH, threads=args.threads) as guarded:

        def decode_guarded(all_batches: Sequence[Batch], faults: int) -> None:
            counts = [
                (len(b.encoded), sum(map(bool, p.faults))) for b, p in guarded.stream(all_batches)
            ]
            assert np.sum(counts, axis=0).tolist() == [len(files), faults]

        def decode_bare() -> None:
            assert run_bare() == len(files)

        alternatives: dict[str, Callable[[], None]] = {
            "bare": decode_bare,
            "guarded": lambda: decode_guarded(good, 0),
            "1 % bad": lambda: decode_guarded(bad, len(range(50, len(files), 100))),
        }
        work: dict[str, list[float]] = {name: [] for name in alternatives}
        for number in range(args.rounds + 1):
            for name, decode in alternatives.items():
                child = guarded._child.pid if guarded._child else None
                work_before, start = processor_seconds(child), perf_counter()
                decode()
                if number:  # the first round is a warm-up
                    times[name].append(perf_counter() - start)
                    work[name].append(processor_seconds(child) - work_before)
        assert guarded.deaths == 0
    rates = {name: len(files) / statistics.median(seconds) for name, seconds in times.items()}
    share, work_share = shares_of_bare(times), shares_of_bare(work)
    for name, rate in rates.items():
        each = statistics.median(work[name]) / len(files) * 1000
        print(
            f"{name:<10} {rate:7.1f} img/s, {share[name]:.3f} of bare"
            f"   {each:.3f} ms of a core per image, {work_share[name]:.3f} of bare"
        )
    result = {
        "command": f"python bench/decode.py --images {args.images} --rounds {args.rounds}"
        f" --threads {args.threads} --size {args.size}"
        + (" --data (real photos)" if args.data else ""),
        "machine": f"{platform.machine()}, {CORES} cores",
        "images_per_second": rates,
        "share_of_bare_rate": share,
        "share_of_bare_processor_time": work_share,
        "rounds_seconds": times,
        "rounds_processor_seconds": work,
    }
    file = Path(__file__).parent / "results" / f"decode_cpu_{date.today()}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {file}")


if __name__ == "__main__":
    main()
