"""A CUDA machine in one command: its ceilings, the pump's own rate beside them, correctness.

    python bench/gpu.py [--data FOLDER] [--images N] [--body resnet34] [--weights FILE|random]
                        [--size 224] [--out DIR] [--seconds 450] [--cpu]

    machine      what is there, and whether it has a hardware JPEG engine
    decode       JPEGs alone: nvImageCodec and DALI, by share of the hardware engine and by threads
    forward      the body alone: as Arrowhead builds it, and torchvision's own, compiled
    copies       pixels to the device, features back
    pipeline     files on disk to features in memory, and where the time goes
    correctness  features and pixels of the GPU back end against the CPU's
    hostile      files that are no photos among photos, in batches of 64

It needs no network and imports neither Ray nor MLflow. Each section is a process of its own: one
that fails, dies or runs out of time is reported and the next one goes on. Rows appear in
bench/results/gpu_<gpu>_<date>.json and .md. Exit code 1: something failed or missed its mark.

Without a CUDA device, or with --cpu, the same sections run on the CPU at small counts, in one
process: that tests this program and measures nothing. Every line then says so, and results are
kept only with --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import io
import itertools
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from time import perf_counter
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "src"))  # this checkout is measured, whatever is installed

MARK = 0.999  # cosine that features of two back ends must reach
HINTS = (0.0, 0.5, 0.75, 1.0)
LEFT_OUT = {
    "Ray": "the pump is measured in one process; starting workers is no matter of the GPU",
    "MLflow": "nothing is recorded but the two files; a bare CUDA machine need not have it",
    "shards": "features stay in memory: the disk of a borrowed machine says nothing",
    "head training": "features are in memory and steps are small; the CPU figures tell enough",
}
# Seconds a section may take; in the order in which they run, what matters most first.
LIMITS = {
    "machine": 90,
    "correctness": 120,
    "hostile": 150,
    "pipeline": 120,
    "decode": 180,
    "copies": 60,
    "forward": 180,
}
REPORTED = ("machine", "decode", "forward", "copies", "pipeline", "correctness", "hostile")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What every section is told.

    gpu: whether there is one and it is to be used; engine: whether it has one for JPEGs.
    """

    data: str
    images: int
    body: str
    weights: str
    size: int
    gpu: bool
    cores: int
    engine: bool = False

    @property
    def threads(self) -> int:
        """Decoding threads of one worker."""
        return min(16, self.cores)


# --------------------------------------------------------------------- what a section writes


class Sheet:
    """The rows of one section, each on the disk as soon as it is known."""

    def __init__(self, section: str, settings: Settings, file: Path) -> None:
        self.section, self.settings, self._file = section, settings, file

    def fact(self, **facts: Any) -> None:
        """Something about the machine."""
        self._write({"facts": facts})

    def row(
        self,
        what: str,
        value: float | str | None,
        unit: str = "",
        *,
        on: str,
        note: str = "",
        passed: bool | None = None,
        ceiling: str = "",
    ) -> None:
        """One line. ceiling: the limit that it is a measure of, or "pipeline" for what is limited.

        passed: whether a mark was reached, None where there is none.
        """
        if on == "GPU" and not self.settings.gpu:
            value, note, passed = None, "needs a GPU", None
        row = {"section": self.section, "what": what, "on": on, "value": value, "unit": unit}
        self._write({"row": row | {"note": note, "passed": passed, "ceiling": ceiling}})

    def measure(
        self, what: str, unit: str, work: Callable[[], Any], *, on: str, ceiling: str = ""
    ) -> None:
        """The row of a number (or of a number and a note) that `work` finds."""
        if on == "GPU" and not self.settings.gpu:
            self.row(what, None, unit, on=on)
            return
        say(f"  {what}")
        try:
            found = work()
        except Exception as error:
            self.fail(what, error, on=on)
            return
        value, note = found if isinstance(found, tuple) else (found, "")
        self.row(what, value, unit, on=on, note=note, ceiling=ceiling)

    def fail(self, what: str, error: Exception, *, on: str = "") -> None:
        """Something went wrong and the rest goes on."""
        words = traceback.format_exception_only(error)[-1].strip()[:300]
        print(traceback.format_exc(), file=sys.stderr)
        self._write({"failure": {"section": self.section, "what": what, "error": words}})
        if on:
            self.row(what, None, on=on, note=f"failed: {words}")

    def ended(self, seconds: float) -> None:
        """The section is over; what it should not have imported, if it did."""
        imported = sorted({"ray", "mlflow"} & sys.modules.keys())
        ended = {"section": self.section, "seconds": round(seconds, 1), "imported": imported}
        self._write({"ended": ended})

    def _write(self, line: dict[str, Any]) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps(line) + "\n")


def say(words: str) -> None:
    """Progress, for whoever waits."""
    print(words, file=sys.stderr, flush=True)


def rate(step: Callable[[], int], settings: Settings, seconds: float = 2.0) -> float:
    """Things per second. A step does some and says how many; the first two are not timed."""
    wait = synchronised if settings.gpu else (lambda: None)
    for _ in range(2):
        step()
    wait()
    began, done = perf_counter(), 0
    while (spent := perf_counter() - began) < (seconds if settings.gpu else 0.3):
        done += step()
        wait()
    return done / spent


def synchronised() -> None:
    """Wait until the GPU has done everything it was given."""
    import torch

    torch.cuda.synchronize()


# -------------------------------------------------------------------------------- photos


def jpegs(settings: Settings, count: int) -> list[bytes]:
    """Different JPEGs of the folder, in the order of their names; at most `count`."""
    files = sorted(Path(settings.data).rglob("*.jp*g"))[:count]
    if not files:
        raise FileNotFoundError(f"no .jpg below {settings.data}")
    return [file.read_bytes() for file in files]


def repeated(catalog: Any, images: int) -> Any:
    """A catalog of as many rows, the same files over and over: the page cache serves them."""
    rows = np.arange(images) % len(catalog)
    columns: dict[str, Any] = {}
    for field in dataclasses.fields(catalog):
        column = getattr(catalog, field.name)
        if isinstance(column, np.ndarray):
            columns[field.name] = column[rows]
        elif isinstance(column, list) and len(column) == len(catalog):
            columns[field.name] = [column[row] for row in rows]
    return dataclasses.replace(catalog, **columns)


def names(count: int) -> list[bytes]:
    """Image ids, for decoding that keeps none."""
    return [number.to_bytes(16, "little") for number in range(count)]


def pools(settings: Settings, batch: int, count: int) -> Any:
    """Batches of as many JPEGs, round and round."""
    photos = jpegs(settings, count)
    stock = list(itertools.islice(itertools.cycle(photos), -(-len(photos) // batch) * batch))
    return itertools.cycle([stock[at : at + batch] for at in range(0, len(stock), batch)])


# ------------------------------------------------------------------------------- sections


def machine(sheet: Sheet) -> None:
    """Versions, the GPU, and whether nvImageCodec finds a hardware JPEG engine."""
    from nvidia import dali, nvimgcodec

    gpu, about = sheet.settings.gpu, None
    if gpu:  # not asked otherwise: importing torch takes its time
        import torch

        gpu = torch.cuda.is_available()
        about = torch.cuda.get_device_properties(0) if gpu else None
    sheet.fact(gpu=gpu)
    sheet.settings = dataclasses.replace(sheet.settings, gpu=gpu)
    versions = {
        "Python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "DALI": dali.__version__,
        "nvImageCodec": f"{nvimgcodec.__version__} (CUDA {nvimgcodec.__cuda_version__})",
        "cores": str(sheet.settings.cores),
    }
    for name, version in versions.items():
        sheet.row(name, version, on="CPU")
    if about:
        sheet.fact(name=about.name)
    sheet.row("GPU", about and about.name, on="GPU")
    sheet.row("CUDA of torch", about and torch.version.cuda, on="GPU")
    sheet.row("compute capability", about and f"{about.major}.{about.minor}", on="GPU")
    sheet.row("memory", about and round(about.total_memory / 2**30, 1), "GiB", on="GPU")
    sheet.measure("driver", "", driver, on="GPU")

    def found() -> tuple[str, str]:
        state, words = engine(sheet.settings)
        sheet.fact(engine=state == "present")
        return state, words

    sheet.measure("hardware JPEG engine", "", found, on="GPU")


def driver() -> str:
    """The NVIDIA driver's version."""
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]


def engine(settings: Settings) -> tuple[str, str]:
    """present, or absent; and what nvImageCodec says of it when asked to be talkative."""
    program = (
        "import sys; from nvidia import nvimgcodec as nv\n"
        "decoder = nv.Decoder(device_id=0, backends=[nv.Backend(nv.HW_GPU_ONLY)])\n"
        "made = decoder.decode(nv.CodeStream(sys.stdin.buffer.read()))\n"
        "print('decoded' if made is not None else 'refused')\n"
    )
    asked = subprocess.run(
        [sys.executable, "-c", program],
        input=jpegs(settings, 1)[0],
        capture_output=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYNVIMGCODEC_VERBOSITY": "3"},
    )
    words = re.sub(r"\x1b\[[0-9;]*m", "", (asked.stdout + asked.stderr).decode(errors="replace"))
    told = [line.strip() for line in words.splitlines() if "HW decoder" in line]
    there = asked.stdout.rstrip().endswith(b"decoded")
    return ("present" if there else "absent"), (told or words.split("\n"))[-1][-150:]


def decode(sheet: Sheet) -> None:
    """JPEGs to pixels and nothing else."""
    settings = sheet.settings
    for hint, threads in itertools.product(HINTS, (8, 16)):
        work = partial(codec_rate, settings, gpu_backends(hint), threads)
        what = f"nvImageCodec, hardware load {hint}, {threads} threads"
        sheet.measure(what, "img/s", work, on="GPU", ceiling="decode")
    plain = partial(codec_rate, settings, gpu_backends(1.0), 16, ":fancy_upsampling=0")
    what = "nvImageCodec, hardware load 1.0, 16 threads, plain upsampling"
    sheet.measure(what, "img/s", plain, on="GPU")
    what, alone = "nvImageCodec, hardware engine alone", [("HW_GPU_ONLY", 1.0)]
    if settings.engine:
        sheet.measure(what, "img/s", partial(codec_rate, settings, alone, 16), on="GPU")
    else:
        sheet.row(what, None, "img/s", on="GPU", note="no hardware JPEG engine")
    for hint, threads in itertools.product(HINTS, (8, 16)):
        work = partial(dali_rate, settings, "mixed", hint, threads)
        what = f"DALI mixed, hw_decoder_load {hint}, {threads} threads"
        sheet.measure(what, "img/s", work, on="GPU", ceiling="decode")
    threads = settings.threads
    work = partial(codec_rate, settings, [("CPU_ONLY", 1.0)], threads)
    what = f"nvImageCodec, {threads} threads"
    sheet.measure(what, "img/s", work, on="CPU", ceiling="decode")
    work = partial(dali_rate, settings, "cpu", 0.0, threads)
    sheet.measure(f"DALI cpu, {threads} threads", "img/s", work, on="CPU", ceiling="decode")


def gpu_backends(hint: float) -> list[tuple[str, float]]:
    """The decoder's back ends as Arrowhead asks for them, by share of the batch."""
    others = ("GPU_ONLY", "HYBRID_CPU_GPU", "CPU_ONLY")
    return [("HW_GPU_ONLY", hint), *((kind, 1.0) for kind in others)]


def codec(backends: list[tuple[str, float]], threads: int, options: str = "") -> tuple[Any, Any]:
    """A decoder of nvImageCodec and its parameters, which are Arrowhead's."""
    from nvidia import nvimgcodec as nv

    cpu = all(kind == "CPU_ONLY" for kind, _ in backends)
    decoder = nv.Decoder(
        device_id=nv.NVIMGCODEC_DEVICE_CPU_ONLY if cpu else 0,
        max_num_cpu_threads=threads,
        backends=[nv.Backend(getattr(nv, kind), load_hint=hint) for kind, hint in backends],
        options=options,
    )
    return decoder, nv.DecodeParams(apply_exif_orientation=False, color_spec=nv.ColorSpec.SRGB)


def codec_rate(
    settings: Settings, backends: list[tuple[str, float]], threads: int, options: str = ""
) -> tuple[float, str]:
    """Images per second of nvImageCodec, and how many it could not decode."""
    from nvidia import nvimgcodec as nv

    batch = 128 if settings.gpu else 16
    decoder, params = codec(backends, threads, options)
    photos = jpegs(settings, 512 if settings.gpu else 32)
    streams = [nv.CodeStream(photo) for photo in photos]
    groups = itertools.cycle([streams[at : at + batch] for at in range(0, len(streams), batch)])
    missed = sum(made is None for made in decoder.decode(streams, params=params))

    def step() -> int:
        made = decoder.decode(next(groups), params=params)
        return sum(image is not None for image in made)

    note = f"{missed} of {len(streams)} not decoded, and not counted" if missed else ""
    return rate(step, settings), note


def dali_rate(settings: Settings, device: str, hint: float, threads: int) -> float:
    """Images per second of DALI's own decoder."""
    from nvidia.dali import fn, pipeline_def, types

    batch = 128 if settings.gpu else 16
    groups = pools(settings, batch, 512 if settings.gpu else 32)
    more = {"hw_decoder_load": hint} if device == "mixed" else {}

    @pipeline_def(
        batch_size=batch,
        num_threads=threads,
        device_id=0 if device == "mixed" else None,
        prefetch_queue_depth=2,
    )
    def decoded() -> Any:
        data = fn.external_source(
            lambda: [np.frombuffer(photo, np.uint8) for photo in next(groups)],
            dtype=types.UINT8,
            ndim=1,
        )
        return fn.decoders.image(
            data, device=device, output_type=types.RGB, adjust_orientation=False, **more
        )

    pipeline = decoded()
    pipeline.build()

    def step() -> int:
        return len(pipeline.run()[0])

    return rate(step, settings)


def forward(sheet: Sheet) -> None:
    """Pixels to features and nothing else."""
    settings = sheet.settings
    for batch in (256, 512):
        work = partial(body_rate, settings, "cuda:0", batch)
        what = f"model.Body as built (float16), batch {batch}"
        sheet.measure(what, "img/s", work, on="GPU", ceiling="forward")
    for batch in (256, 512):
        for compiled in (False, True):
            how = "compiled" if compiled else "eager"
            work = partial(plain_rate, settings, "cuda:0", batch, compiled)
            what = f"torchvision, bf16, channels last, {how}, batch {batch}"
            sheet.measure(what, "img/s", work, on="GPU")
    work = partial(body_rate, settings, "cpu", 32)
    sheet.measure("model.Body as built, batch 32", "img/s", work, on="CPU", ceiling="forward")
    work = partial(plain_rate, settings, "cpu", 32, False)
    sheet.measure("torchvision, channels last, eager, batch 32", "img/s", work, on="CPU")


def weights_of(settings: Settings) -> Any:
    """The body's tensors."""
    from arrowhead.features import backbone
    from arrowhead.features.backbone import BodyConfig

    return backbone.load(BodyConfig(body=settings.body, weights=settings.weights))


def body_of(settings: Settings, device: str, weights: Any = None) -> Any:
    """The body as Arrowhead builds it."""
    from arrowhead.features.backbone import Body

    weights = weights or weights_of(settings)
    about = {"pool": "avg", "mean": weights.mean, "std": weights.std, "size": settings.size}
    return Body(settings.body, weights.state, **about, device=device)


def body_rate(settings: Settings, device: str, batch: int) -> float:
    """Images per second of Arrowhead's body; the pixels lie on its device."""
    import torch

    body, side = body_of(settings, device), settings.size
    pixels = torch.randint(256, (batch, side, side, 3), dtype=torch.uint8, device=device)
    pixels = pixels.permute(0, 3, 1, 2)

    def step() -> int:
        return len(body(pixels))

    return rate(step, settings)


def plain_rate(settings: Settings, device: str, batch: int, compiled: bool) -> float:
    """Images per second of torchvision's network; bf16 on a GPU."""
    import torch
    from torchvision import models

    kind = torch.bfloat16 if "cuda" in device else torch.float32
    net = models.get_model(settings.body, weights=None).eval()
    net = net.to(device, kind, memory_format=torch.channels_last)
    net = torch.compile(net, dynamic=False) if compiled else net
    side = settings.size
    images = torch.rand((batch, 3, side, side), device=device).to(kind)
    images = images.contiguous(memory_format=torch.channels_last)

    def step() -> int:
        with torch.inference_mode():
            return len(net(images))

    return rate(step, settings)


def copies(sheet: Sheet) -> None:
    """What has to move, moved and nothing else."""
    settings = sheet.settings
    shape = 256, settings.size, settings.size, 3

    def there() -> tuple[float, str]:
        import torch

        pixels = torch.zeros(shape, dtype=torch.uint8).pin_memory()
        return moved(pixels, lambda: pixels.to("cuda:0", non_blocking=True))

    def back() -> tuple[float, str]:
        import torch

        features = torch.zeros((256, 512), device="cuda:0")
        home = torch.zeros((256, 512)).pin_memory()
        return moved(features, lambda: home.copy_(features, non_blocking=True))

    def moved(data: Any, move: Callable[[], Any]) -> tuple[float, str]:
        def step() -> int:
            for _ in range(16):
                move()
            return 16

        times = rate(step, settings, 1.0)
        return 256 * times, f"{times * data.nbytes / 1e9:.1f} GB/s, batch 256"

    def in_memory() -> tuple[float, str]:
        pixels = np.full(shape, 7, np.uint8)  # zeros would be one page of memory, over and over
        home = np.full_like(pixels, 0)

        def step() -> int:
            np.copyto(home, pixels)
            return 1

        times = rate(step, settings, 1.0)
        return (
            256 * times,
            f"{times * pixels.nbytes / 1e9:.1f} GB/s; an image on its way is moved so four times",
        )

    what = "pixels to the device, pinned"
    sheet.measure(what, "img/s", there, on="GPU", ceiling="copy")
    sheet.measure("512 features to the host, pinned", "img/s", back, on="GPU")
    sheet.measure("pixels within memory, one thread", "img/s", in_memory, on="CPU")


def pipeline(sheet: Sheet) -> None:
    """Files on disk to features, in one process with its guarded decoder; and its parts."""
    settings = sheet.settings
    sizes = (128, 256)
    for batch in sizes:
        sheet.measure(
            f"extract.FeaturePipeline, batch {batch}",
            "img/s",
            partial(pump_rate, sheet, "cuda:0", batch, settings.images),
            on="GPU",
            ceiling="pipeline",
        )
    for name, work in (("decode.Decoder", decoder_rate), ("guard.GuardedDecoder", guarded_rate)):
        on_gpu = partial(work, settings, 0, 256)
        sheet.measure(f"{name}, batch 256: files' bytes to squares", "img/s", on_gpu, on="GPU")
    if settings.gpu:
        return
    work = partial(pump_rate, sheet, "cpu", 32, min(settings.images, 64))
    sheet.measure("extract.FeaturePipeline, batch 32", "img/s", work, on="CPU", ceiling="pipeline")
    for name, part in (("decode.Decoder", decoder_rate), ("guard.GuardedDecoder", guarded_rate)):
        on_cpu = partial(part, settings, None, 32)
        sheet.measure(f"{name}, batch 32: files' bytes to squares", "img/s", on_cpu, on="CPU")


def pump_rate(sheet: Sheet, device: str, batch: int, images: int) -> tuple[float, str]:
    """Images per second through the pump, its decoder warm; seconds by stage, what binds."""
    from arrowhead.data import chunks as data_chunks
    from arrowhead.data import sources
    from arrowhead.decode.pixels import PixelConfig
    from arrowhead.features import extract
    from arrowhead.features.backbone import BodyConfig
    from arrowhead.features.extract import ExtractConfig, FeatureCache, FeaturePipeline
    from arrowhead.runtime.worker import Worker

    settings = sheet.settings
    weights, pixels = weights_of(settings), PixelConfig(size=settings.size)
    body = body_of(settings, device, weights)
    about = BodyConfig(body=settings.body, weights=settings.weights)
    recipe = extract.make_recipe(pixels, about, weights, body.width)
    worker = Worker(0, 1, device, settings.threads, lambda: None, lambda report: None)
    config = ExtractConfig(batch_size=batch, chunk_size=8 * batch)
    found = sources.unlabelled(Path(settings.data))
    with FeaturePipeline(worker, body, recipe, pixels, config) as pump:

        def through(rows: int) -> list[Any]:
            catalog = repeated(found, rows)
            runs = data_chunks.chunks(catalog.paths, config.chunk_size)
            chunks = [(at, catalog.part(rows)) for at, rows in enumerate(runs)]
            return list(pump(chunks, FeatureCache()))

        for _ in through(2 * batch):
            pass
        pump.timer.take()
        began = perf_counter()
        chunks = through(images)
        spent, busy = perf_counter() - began, pump.timer.take()
    faults = sum(fault is not None for chunk in chunks for fault in chunk.faults)
    parts = " · ".join(f"{stage} {busy[stage]:.2f} s" for stage in extract.STAGES if stage in busy)
    note = f"{images} images in {spent:.2f} s: {parts}; bound by {extract.bottleneck(busy)}"
    return images / spent, note + (f"; {faults} faults" if faults else "")


def decoder_rate(settings: Settings, device: int | None, batch: int) -> float:
    """Images per second of Arrowhead's decoder in this process: decoded, resized, on the CPU."""
    from arrowhead.decode.decoder import Decoder
    from arrowhead.decode.pixels import PixelConfig

    config = PixelConfig(size=settings.size)
    decoder = Decoder(config, batch_size=batch, threads=settings.threads, device=device)
    groups = pools(settings, batch, 512 if settings.gpu else 32)

    def step() -> int:
        return len(decoder(next(groups), names(batch)).faults)

    return rate(step, settings, 3.0)


def guarded_rate(settings: Settings, device: int | None, batch: int) -> float:
    """Images per second of the same decoder in a process of its own, two batches under way."""
    from arrowhead.decode.pixels import PixelConfig
    from arrowhead.decode.worker_process import GuardedDecoder

    groups = pools(settings, batch, 512 if settings.gpu else 32)
    config = PixelConfig(size=settings.size)
    threads = settings.threads
    with GuardedDecoder(config, batch_size=batch, threads=threads, device=device) as guarded:
        endless = (SimpleNamespace(encoded=one, image_ids=names(batch)) for one in groups)
        stream = guarded.stream(endless)

        def step() -> int:
            return len(next(stream)[1].faults)

        return rate(step, settings, 3.0)


def correctness(sheet: Sheet) -> None:
    """Two back ends, the same files. Without a GPU: the CPU against itself, in other batches."""
    import torch

    settings = sheet.settings
    photos = jpegs(settings, min(settings.images, 256 if settings.gpu else 32))
    odd = kinds(photos[0])
    on, device = ("GPU", 0) if settings.gpu else ("CPU", None)
    place = f"cuda:{device}" if settings.gpu else "cpu"
    say("  squares and features of both back ends")
    files = [*photos, *odd.values()]
    expected, fine = squares(settings, files, None, 64)
    found, also = squares(settings, files, device, 128 if settings.gpu else 16)
    well = [row for row in range(len(photos)) if not fine[row] and not also[row]]
    there = features(settings, "cpu", expected[well])
    cases = {"features": features(settings, place, found[well])}
    cases["features of the same pixels"] = features(settings, place, expected[well])
    against = "the CPU's" if settings.gpu else "the CPU's in smaller batches"
    for name, here in cases.items():
        alike = torch.cosine_similarity(here, there, dim=1)
        note = f"mean {alike.mean():.6f}, {len(well)} photos; mark {MARK}"
        least = float(alike.min())
        what = f"{name} against {against}, least"
        sheet.row(what, least, "cosine", on=on, note=note, passed=least >= MARK)
        if on == "CPU":
            sheet.row(f"{name} against the CPU's, least", None, "cosine", on="GPU")
    others = float(torch.cosine_similarity(there, there.roll(1, 0), dim=1).mean())
    sheet.row("features of one photo and the next, for scale", others, "cosine", on="CPU")
    off = np.abs(expected.astype(int) - found.astype(int))
    what = "square against the CPU's, mean difference"
    note = f"most {off[well].max()}, of 255; {len(photos) - len(well)} photos became faults"
    sheet.row(f"photos: {what}", float(off[well].mean()), "grey levels", on="GPU", note=note)
    for row, name in enumerate(odd, len(photos)):
        note = f"most {off[row].max()}"
        if fine[row] != also[row]:
            note = f"{also[row] or 'well'}; on the CPU {fine[row] or 'well'}"
        passed = fine[row] == also[row] and bool(off[row].mean() <= 3)
        mean = float(off[row].mean())
        sheet.row(f"{name}: {what}", mean, "grey levels", on="GPU", note=note, passed=passed)
    for name, backends, options in (
        ("as Arrowhead asks", gpu_backends(1.0), ""),
        ("plain upsampling", gpu_backends(1.0), ":fancy_upsampling=0"),
        ("no hardware engine", gpu_backends(0.0), ""),
    ):
        work = partial(codec_differs, photos[:32], backends, options)
        what = f"nvImageCodec, {name}: pixels against the CPU's, mean difference"
        sheet.measure(what, "grey levels", work, on="GPU")


def squares(
    settings: Settings, files: Sequence[bytes], device: int | None, batch: int
) -> tuple[NDArray[np.uint8], list[str | None]]:
    """uint8 (N, S, S, 3) and faults of files, by Arrowhead's guarded decoder."""
    from arrowhead.decode.pixels import PixelConfig
    from arrowhead.decode.worker_process import GuardedDecoder

    config = PixelConfig(size=settings.size)
    parts, faults = [], []
    with GuardedDecoder(
        config, batch_size=batch, threads=settings.threads, device=device
    ) as guarded:
        for at in range(0, len(files), batch):
            group = files[at : at + batch]
            pixels = guarded(group, names(len(group)))
            parts.append(pixels.views[0][: len(group)].copy())
            faults += pixels.faults
    return np.concatenate(parts), faults


def features(settings: Settings, device: str, pixels: NDArray[np.uint8]) -> Any:
    """float32 (N, D) on the CPU, of squares."""
    import torch

    body = body_of(settings, device)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return torch.cat([body(part.contiguous()).cpu() for part in images.split(64)])


def kinds(photo: bytes) -> dict[str, bytes]:
    """One photo in kinds that decoders treat differently."""
    from PIL import Image

    image = Image.open(io.BytesIO(photo)).convert("RGB").resize((333, 251))
    turned = Image.Exif()
    turned[0x0112] = 6

    def file(kind: str, mode: str = "RGB", **options: Any) -> bytes:
        out = io.BytesIO()
        image.convert(mode).save(out, kind, **options)
        return out.getvalue()

    deep = io.BytesIO()
    levels = np.asarray(image.convert("L")).astype(np.uint16) * 257
    Image.fromarray(levels).save(deep, "PNG")
    return {
        "grey JPEG": file("JPEG", "L"),
        "CMYK JPEG": file("JPEG", "CMYK"),
        "progressive JPEG": file("JPEG", progressive=True),
        "4:4:4 JPEG": file("JPEG", subsampling=0),
        "4:2:2 JPEG": file("JPEG", subsampling=1),
        "JPEG with restarts": file("JPEG", restart_marker_rows=1),
        "JPEG on its side": file("JPEG", exif=turned),
        "PNG": file("PNG"),
        "palette PNG": file("PNG", "P"),
        "see-through PNG": file("PNG", "RGBA"),
        "16-bit PNG": deep.getvalue(),
        "WebP": file("WEBP"),
        "TIFF": file("TIFF"),
        "BMP": file("BMP"),
    }


def codec_differs(
    photos: Sequence[bytes], backends: list[tuple[str, float]], options: str
) -> tuple[float, str]:
    """Mean difference of decoded photos, in full size, from the CPU's."""
    from nvidia import nvimgcodec as nv

    made = []
    for ways, more in ((backends, options), ([("CPU_ONLY", 1.0)], "")):
        decoder, params = codec(ways, 8, more)
        decoded = decoder.decode([nv.CodeStream(photo) for photo in photos], params=params)
        made.append([np.asarray(image.cpu()).astype(int) for image in decoded])
    off = [np.abs(a - b) for a, b in zip(*made, strict=True)]
    return float(np.mean([o.mean() for o in off])), f"most {max(int(o.max()) for o in off)}"


def hostile(sheet: Sheet) -> None:
    """Bad files among photos. Every row must be accounted for and no photo may change."""
    settings = sheet.settings
    photos = jpegs(settings, 64)
    sets = {"hostile files made here": spoiled(photos)}
    if settings.gpu and (more := neighbours()):
        cases = more.hostile(photos)
        sets["those of tests/hostile.py"] = {name: case.data for name, case in cases.items()}
    for called, files in sets.items():
        say(f"  {len(files)} {called}")
        try:
            besieged(sheet, called, list(files.items()), photos)
        except Exception as error:
            sheet.fail(called, error, on="GPU" if settings.gpu else "CPU")


def besieged(
    sheet: Sheet, called: str, bad: list[tuple[str, bytes]], photos: Sequence[bytes]
) -> None:
    """The rows of one set of hostile files."""
    on, device = ("GPU", 0) if sheet.settings.gpu else ("CPU", None)
    told = among(sheet.settings, bad, photos, device)
    note = f"in {told.batches} of {-(-len(bad) // 40)} batches of 64"
    sheet.row(f"{called}: deaths of the decoder", told.deaths, "", on=on, note=note)
    note = f"{len(told.faults)} hostile files, {told.photos} photos"
    whole = told.rows == 64 * told.batches == len(told.faults) + told.photos
    sheet.row(f"{called}: rows accounted for", told.rows, "rows", on=on, note=note, passed=whole)
    note = "; ".join(sorted(set(told.harmed)))[:300]
    what = f"{called}: photos beside them that became faults"
    sheet.row(what, len(told.harmed), "photos", on=on, note=note, passed=not told.harmed)
    note = f"{told.changed} of {told.photos} photos differ at all"
    what = f"{called}: photos' pixels against a run without them, most"
    sheet.row(what, told.most, "grey levels", on=on, note=note, passed=told.most == 0)
    well = sorted(name for name, fault in told.faults.items() if fault is None)
    note = "came out well: " + (", ".join(well)[:300] or "none")
    what = f"{called}: how many became faults"
    sheet.row(what, len(told.faults) - len(well), "files", on=on, note=note)
    what = f"{called}: how many the CPU judges otherwise"
    if not sheet.settings.gpu:
        sheet.row(what, None, "files", on="GPU")
        return
    cpu = among(sheet.settings, bad, photos, None).faults
    both = [name for name in told.faults if name in cpu]
    differ = [name for name in both if (told.faults[name] is None) != (cpu[name] is None)]
    note = "; ".join(f"{name}: {told.faults[name]}, on the CPU {cpu[name]}" for name in differ)
    sheet.row(what, len(differ), f"of {len(both)}", on="GPU", note=note[:2000])


def neighbours() -> ModuleType | None:
    """tests/hostile.py, which knows several hundred more, where it lies beside us."""
    file = REPO / "tests" / "hostile.py"
    spec = importlib.util.spec_from_file_location("hostile", file)
    if not file.is_file() or not spec or not spec.loader:
        return None
    room = importlib.util.module_from_spec(spec)
    sys.modules["hostile"] = room
    spec.loader.exec_module(room)
    return room


def among(
    settings: Settings, bad: list[tuple[str, bytes]], photos: Sequence[bytes], device: int | None
) -> SimpleNamespace:
    """What became of hostile files, 40 at a time, and of the photos that make 64 of them.

    No new batch is begun after half a minute: a decoder that keeps dying takes its time.
    """
    from arrowhead.decode.pixels import PixelConfig
    from arrowhead.decode.worker_process import GuardedDecoder

    told = SimpleNamespace(batches=0, rows=0, photos=0, changed=0, most=0, harmed=[], faults={})
    rng = np.random.default_rng(0)
    config, threads = PixelConfig(size=settings.size), settings.threads
    began = perf_counter()
    with GuardedDecoder(
        config, batch_size=64, threads=threads, device=device, patience=30
    ) as guarded:
        for at in range(0, len(bad), 40):
            if perf_counter() - began > 30:
                break
            some, order = bad[at : at + 40], rng.permutation(64)
            mates = [row for row in range(64) if order[row] >= len(some)]
            files = [
                some[n][1] if n < len(some) else photos[row % len(photos)]
                for row, n in enumerate(order)
            ]
            mixed = guarded(files, names(64))
            alone = guarded([files[row] for row in mates], names(len(mates)))
            told.batches += 1
            told.rows += len(mixed.faults)
            told.photos += len(mates)
            told.harmed += [mixed.faults[row] for row in mates if mixed.faults[row]]
            for row, n in enumerate(order):
                if n < len(some):
                    told.faults[some[n][0]] = mixed.faults[row]
            for place, row in enumerate(mates):
                here, there = mixed.views[0][row], alone.views[0][place]
                off = np.abs(here.astype(int) - there.astype(int)).max()
                told.changed += int(off > 0)
                told.most = max(told.most, int(off))
        told.deaths = guarded.deaths
    return told


def spoiled(photos: Sequence[bytes]) -> dict[str, bytes]:
    """40-odd files that are no whole photos, made from four that are."""
    from PIL import Image

    rng = np.random.default_rng(0)
    found: dict[str, bytes] = {
        "empty": b"",
        "a web page": b"<!DOCTYPE html><html><body>Not Found</body></html>\n" * 20,
        "text": b"This was a photo once.\n" * 99,
        "noise": b"\0" + rng.bytes(4000),
        "a start and an end": b"\xff\xd8\xff\xd9",
        "a PNG's signature and noise": b"\x89PNG\r\n\x1a\n" + rng.bytes(3000),
    }
    for number, photo in enumerate(photos[:4]):
        image = Image.open(io.BytesIO(photo)).convert("RGB")
        image.thumbnail((400, 400))
        sheets = {kind: io.BytesIO() for kind in ("JPEG", "PNG")}
        for kind, sheet in sheets.items():
            image.save(sheet, kind)
        plain, png = (sheet.getvalue() for sheet in sheets.values())
        frame, tables, scan = (
            plain.index(mark) for mark in (b"\xff\xc0", b"\xff\xc4", b"\xff\xda")
        )
        half = (scan + len(plain)) // 2

        def patched(at: int, new: bytes, plain: bytes = plain) -> bytes:
            return plain[:at] + new + plain[at + len(new) :]

        huge = (30000).to_bytes(2, "big") * 2
        noise = rng.integers(0, 255, 400).astype(np.uint8).tobytes()  # no FF: no marker in it
        files = {
            "cut at half its scan": plain[:half],
            "cut before its scan": plain[:scan],
            "zeros from half its scan on": plain[:half] + bytes(len(plain) - half),
            "noise in its scan": patched(half, noise),
            "impossible Huffman table": patched(tables + 5, b"\xff" * 16),
            "no height": patched(frame + 5, b"\0\0"),
            "no width": patched(frame + 7, b"\0\0"),
            "12 bits": patched(frame + 4, b"\x0c"),
            "30000 x 30000": patched(frame + 5, huge),
            "a segment of length 1": patched(4, b"\0\1"),
            "torn PNG": png[: len(png) // 2],
        }
        found |= {f"{name} ({number})": data for name, data in files.items()}
    return found


# ------------------------------------------------------------------------------ the report


def serve(sections: Sequence[str], file: Path, settings: Settings) -> None:
    """Sections one after the other, in a process of their own."""
    for section in sections:
        say(section)
        began, sheet = perf_counter(), Sheet(section, settings, file)
        try:
            globals()[section](sheet)
        except Exception as error:
            sheet.fail("the section", error)
        sheet.ended(perf_counter() - began)


def run(
    sections: Sequence[str], settings: Settings, seconds: float, scratch: Path
) -> list[dict[str, Any]]:
    """The lines that sections wrote, and one of failure for each that did not come to its end."""
    file = scratch / f"{sections[0]}.jsonl"
    file.touch()
    error = ""
    if seconds < 10:
        error = "left out: the time was used up"
    else:
        told = ",".join(sections), str(file), json.dumps(dataclasses.asdict(settings))
        call = [sys.executable, str(Path(__file__).resolve()), "--sections", *told]
        child = subprocess.Popen(call, start_new_session=True, stdout=sys.stderr)
        try:
            if code := child.wait(seconds):
                died = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                error = f"its process died: {died}"
        except subprocess.TimeoutExpired:
            error = f"stopped after {seconds:.0f} s"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    lines = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
    ended = {line["ended"]["section"] for line in lines if "ended" in line}
    for section in sections:
        if section not in ended:
            failure = {"section": section, "what": "the section", "error": error or "no end"}
            lines.append({"failure": failure})
    return lines


def shares(rows: list[dict[str, Any]], gpu: bool) -> list[dict[str, Any]]:
    """The pump's rate as a share of the lowest ceiling, a row for each batch size."""
    on = "GPU" if gpu else "CPU"
    best: dict[str, float] = {}
    for row in rows:
        if row["ceiling"] not in ("", "pipeline") and row["on"] == on and row["value"]:
            best[row["ceiling"]] = max(best.get(row["ceiling"], 0.0), row["value"])
    if not best:
        return []
    lowest = min(best, key=lambda name: best[name])
    note = "ceilings: " + ", ".join(f"{name} {best[name]:,.0f} img/s" for name in sorted(best))
    made = []
    for row in rows:
        if row["ceiling"] == "pipeline" and row["on"] == on and row["value"]:
            more = {"what": f"{row['what']}: share of the lowest ceiling, {lowest}", "note": note}
            share = {"value": row["value"] / best[lowest], "unit": "", "ceiling": ""}
            made.append(row | more | share)
    return made


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    gpu = result["gpu"] is not None
    where = result["gpu"] or "no GPU: CPU only, small counts, this measures nothing"
    lines = [
        f"# bench/gpu.py, {where}, {result['date']}",
        "",
        f"`{result['command']}`: {result['photos']}; {result['seconds']['total']:.0f} s in all.",
        "",
        "| section | measured | on | value | unit | mark | note |",
        "|---|---|---|---:|---|---|---|",
    ]
    for row in result["rows"]:
        on = row["on"] if gpu else "CPU only" if row["on"] == "CPU" else "CPU only: no GPU"
        mark = {True: "pass", False: "**missed**", None: ""}[row["passed"]]
        cells = [row["section"], row["what"], on, shown(row), row["unit"], mark, row["note"]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += ["", "Failed:" if result["failures"] else "Nothing failed."]
    lines += [f"- {f['section']}, {f['what']}: {f['error']}" for f in result["failures"]]
    lines += ["", "Left out:", *(f"- {what}: {why}" for what, why in result["left_out"].items())]
    imported = ", ".join(result["imported"]) or "neither Ray nor MLflow"
    return "\n".join([*lines, "", f"Imported: {imported}."]) + "\n"


def shown(row: dict[str, Any]) -> str:
    """A value as the table has it."""
    value = row["value"]
    if value is None or isinstance(value, str):
        return value or "–"
    if row["unit"] == "cosine":
        return f"{value:.6f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def photos_for(asked: Path | None, images: int, scratch: Path) -> tuple[Path, str]:
    """The folder of photos, and what to call it."""
    if asked:
        return asked, "the photos given"
    for beside in (REPO.parent / "shared", REPO / "shared"):
        if (folder := beside / "data" / "dogscats").is_dir():
            return folder, "real photos (dogscats)"
    from arrowhead import demo

    say("drawing photos")
    demo.draw(scratch / "drawn", per_class=min(100, -(-images // 3)))
    return scratch / "drawn", "photos drawn by arrowhead.demo"


def main() -> int:
    """Run the sections, print the table, write the files."""
    asked = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    asked.add_argument("--data", type=Path, help="a folder of photos")
    asked.add_argument("--images", type=int, default=8192, help="how many go through the pump")
    asked.add_argument("--body", default="resnet34")
    asked.add_argument("--weights", default="random", help="a file, or random: as fast")
    asked.add_argument("--size", type=int, default=224)
    asked.add_argument("--out", type=Path, help="default: bench/results, where there is a GPU")
    asked.add_argument("--seconds", type=float, default=450, help="for everything")
    asked.add_argument("--cpu", action="store_true", help="use no GPU, even if there is one")
    asked.add_argument("--sections", nargs=3, help=argparse.SUPPRESS)
    args = asked.parse_args()
    if args.sections:
        sections, file, told = args.sections
        serve(sections.split(","), Path(file), Settings(**json.loads(told)))
        return 0
    began, lines = perf_counter(), []
    with tempfile.TemporaryDirectory() as scratch:
        folder, called = photos_for(args.data, args.images, Path(scratch))
        settings = Settings(
            data=str(folder.resolve()),
            images=args.images,
            body=args.body,
            weights=args.weights,
            size=args.size,
            gpu=not args.cpu,
            cores=len(os.sched_getaffinity(0)),
        )
        facts: dict[str, Any] = {"gpu": False, "engine": False}
        waiting = [[section] for section in LIMITS]
        while waiting:
            sections = waiting.pop(0)
            left = args.seconds - (perf_counter() - began)
            limit = min(left, sum(LIMITS[section] for section in sections))
            lines += (new := run(sections, settings, limit, Path(scratch)))
            for line in new:
                facts |= line.get("facts", {})
            settings = dataclasses.replace(settings, gpu=facts["gpu"], engine=facts["engine"])
            if waiting and not settings.gpu:  # what starts up slowly need do so only once
                waiting = [[section for group in waiting for section in group]]
        different = len(list(folder.rglob("*.jp*g")))
    rows = [line["row"] for line in lines if "row" in line]
    rows += shares(rows, settings.gpu)
    rows.sort(key=lambda row: REPORTED.index(row["section"]))
    gpu = facts.get("name", "a GPU without a name") if settings.gpu else None
    assert settings.gpu or not any(row["on"] == "GPU" and row["value"] is not None for row in rows)
    ended = [line["ended"] for line in lines if "ended" in line]
    imported = {name for end in ended for name in end["imported"]}
    seconds = {end["section"]: end["seconds"] for end in ended}
    result = {
        "what": "bench/gpu.py",
        "mode": "gpu" if settings.gpu else "CPU only: no figure here is a GPU's",
        "gpu": gpu,
        "date": str(date.today()),
        "command": "python bench/gpu.py"
        + f" --images {args.images} --body {args.body} --size {args.size}"
        + f" --weights {'random' if args.weights == 'random' else '(a file)'}"
        + (" --cpu" if args.cpu else ""),
        "photos": f"{called}, {different} different ones",
        "rows": rows,
        "failures": [line["failure"] for line in lines if "failure" in line],
        "left_out": LEFT_OUT,
        "imported": sorted(imported | ({"ray", "mlflow"} & sys.modules.keys())),
        "seconds": seconds | {"total": round(perf_counter() - began, 1)},
    }
    print(table(result))
    out = args.out or (REPO / "bench" / "results" if settings.gpu else None)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") if gpu else "cpuonly"
        file = out / f"gpu_{slug}_{result['date']}"
        file.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        file.with_suffix(".md").write_text(table(result))
        say(f"written to {file}.json and .md")
    missed = any(row["passed"] is False for row in rows)
    return 1 if result["failures"] or result["imported"] or missed else 0


if __name__ == "__main__":
    sys.exit(main())
