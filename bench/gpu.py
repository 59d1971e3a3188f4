"""Measure a CUDA machine in one command: its limits, Arrowhead's rate, correctness.

    python bench/gpu.py [--data FOLDER] [--images N] [--body resnet34] [--weights FILE|random]
                        [--size 224] [--out DIR] [--seconds 580] [--only SECTION,SECTION]
                        [--decodes 100000] [--minute 60] [--price DOLLARS_PER_HOUR] [--cpu]

    machine      versions, the GPU, and whether it has a hardware JPEG engine
    truth        --decodes decodes by each path, every image compared with the CPU's
    sustained    the whole extraction of 500 x 375 JPEGs for a minute: rate, CPU, cost of a million
    decode       only decoding: nvImageCodec and DALI, by load of the hardware engine and by threads
    forward      only the body: as Arrowhead builds it, and torchvision's network, compiled
    copies       only copies: pixels to the device, features back
    pipeline     files on disk to features in memory, and the time of each stage
    correctness  features and pixels of the GPU back end compared with the CPU's
    hostile      broken files among photos, in batches of 64

It needs no network and imports neither Ray nor MLflow. Each section runs in its own process: if one
fails, crashes or runs out of time, it is reported and the next one starts. Results are written to
bench/results/gpu_<gpu>_<date>.json and .md. Exit code 1: something failed or missed its target.

Without a CUDA device, or with --cpu, the same sections run on the CPU with few images, in one
process. That tests this program but measures nothing. Every line then says so, and results are
written only with --out.
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
sys.path.insert(0, str(REPO / "src"))  # measure this checkout, not an installed package

MIN_COSINE = 0.999  # between the features of two back ends
MIN_RATE = 12_000  # images per second, sustained, with ResNet34 on one H100
MIN_SHARE = 0.9  # of the slower of decoding alone and the body alone
LOAD_HINTS = (0.0, 0.5, 0.75, 1.0)
LEFT_OUT = {
    "Ray": "extraction is measured in one process; starting workers does not depend on the GPU",
    "MLflow": "only the two files are written; a bare CUDA machine may not have MLflow",
    "shards": "features stay in memory: the disk of a borrowed machine is not typical",
    "head training": "features are in memory and steps are small; the CPU figures are sufficient",
}
# Seconds that a section may take, in the order in which the sections run: most important first.
LIMIT_SECONDS = {
    "machine": 90,
    "truth": 240,
    "sustained": 180,
    "correctness": 120,
    "hostile": 150,
    "pipeline": 120,
    "decode": 180,
    "copies": 60,
    "forward": 180,
}
REPORTED = (
    *("machine", "truth", "sustained", "decode", "forward", "copies", "pipeline"),
    *("correctness", "hostile"),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of every section.

    gpu: whether to use a GPU; engine: whether the GPU has a hardware JPEG engine.
    """

    data: str
    images: int
    body: str
    weights: str
    size: int
    gpu: bool
    cores: int
    engine: bool = False
    decodes: int = 100_000
    minute: float = 60.0
    price: float = 1.0

    @property
    def threads(self) -> int:
        """Decoding threads of one worker."""
        return min(16, self.cores)


# ------------------------------------------------------------------ the results of a section


class Sheet:
    """The results of one section, each written to disk at once."""

    def __init__(self, section: str, settings: Settings, file: Path) -> None:
        self.section, self.settings, self._file = section, settings, file

    def fact(self, **facts: Any) -> None:
        """Record a fact about the machine."""
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
        """Record one row of the table.

        Args:
            ceiling: The limit that the row measures, or "pipeline" for Arrowhead's own rate.
            passed: Whether a target was reached; None without a target.
        """
        if on == "GPU" and not self.settings.gpu:
            value, note, passed = None, "needs a GPU", None
        row = {"section": self.section, "what": what, "on": on, "value": value, "unit": unit}
        self._write({"row": row | {"note": note, "passed": passed, "ceiling": ceiling}})

    def measure(
        self, what: str, unit: str, work: Callable[[], Any], *, on: str, ceiling: str = ""
    ) -> None:
        """Record a row with the number (or number and note) that `work` returns."""
        if on == "GPU" and not self.settings.gpu:
            self.row(what, None, unit, on=on)
            return
        log(f"  {what}")
        try:
            result = work()
        except Exception as error:
            self.fail(what, error, on=on)
            return
        value, note = result if isinstance(result, tuple) else (result, "")
        self.row(what, value, unit, on=on, note=note, ceiling=ceiling)

    def fail(self, what: str, error: Exception, *, on: str = "") -> None:
        """Record a failure; the rest of the section continues."""
        words = traceback.format_exception_only(error)[-1].strip()[:300]
        print(traceback.format_exc(), file=sys.stderr)
        self._write({"failure": {"section": self.section, "what": what, "error": words}})
        if on:
            self.row(what, None, on=on, note=f"failed: {words}")

    def ended(self, seconds: float) -> None:
        """Record the end of the section, and whether it imported Ray or MLflow."""
        imported = sorted({"ray", "mlflow"} & sys.modules.keys())
        ended = {"section": self.section, "seconds": round(seconds, 1), "imported": imported}
        self._write({"ended": ended})

    def _write(self, line: dict[str, Any]) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps(line) + "\n")


def log(words: str) -> None:
    """Print progress."""
    print(words, file=sys.stderr, flush=True)


def rate(step: Callable[[], int], settings: Settings, seconds: float = 2.0) -> float:
    """Items per second. A step returns how many items it did; the first two are a warm-up."""
    wait = synchronize if settings.gpu else (lambda: None)
    for _ in range(2):
        step()
    wait()
    start, done = perf_counter(), 0
    while (elapsed := perf_counter() - start) < (seconds if settings.gpu else 0.3):
        done += step()
        wait()
    return done / elapsed


def synchronize() -> None:
    """Wait until the GPU has finished all its work."""
    import torch

    torch.cuda.synchronize()


# -------------------------------------------------------------------------------- photos


def jpegs(settings: Settings, count: int) -> list[bytes]:
    """The first `count` JPEGs of the folder, in the order of their names."""
    files = sorted(Path(settings.data).rglob("*.jp*g"))[:count]
    if not files:
        raise FileNotFoundError(f"no .jpg below {settings.data}")
    return [file.read_bytes() for file in files]


def repeated(catalog: Any, images: int) -> Any:
    """A catalog of this many rows that repeats the same files, so that the page cache has them."""
    rows = np.arange(images) % len(catalog)
    columns: dict[str, Any] = {}
    for field in dataclasses.fields(catalog):
        column = getattr(catalog, field.name)
        if isinstance(column, np.ndarray) and len(column) == len(catalog):
            columns[field.name] = column[rows]
        elif isinstance(column, list) and len(column) == len(catalog):
            columns[field.name] = [column[row] for row in rows]
    return dataclasses.replace(catalog, **columns)


def image_ids(count: int) -> list[bytes]:
    """Placeholder image ids, for decoding without a store."""
    return [number.to_bytes(16, "little") for number in range(count)]


def endless_batches(settings: Settings, batch: int, count: int) -> Any:
    """Batches of the first `count` JPEGs, repeated without end."""
    photos = jpegs(settings, count)
    files = list(itertools.islice(itertools.cycle(photos), -(-len(photos) // batch) * batch))
    return itertools.cycle([files[at : at + batch] for at in range(0, len(files), batch)])


# ------------------------------------------------------------------------------- sections


def machine(sheet: Sheet) -> None:
    """Versions, the GPU, and whether nvImageCodec finds a hardware JPEG engine."""
    from nvidia import dali, nvimgcodec

    gpu, about = sheet.settings.gpu, None
    if gpu:  # importing torch is slow
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

    def probe_engine() -> tuple[str, str]:
        state, message = engine(sheet.settings)
        sheet.fact(engine=state == "present")
        return state, message

    sheet.measure("hardware JPEG engine", "", probe_engine, on="GPU")


def driver() -> str:
    """The NVIDIA driver's version."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]


def engine(settings: Settings) -> tuple[str, str]:
    """present or absent, and the verbose message of nvImageCodec about it."""
    program = (
        "import sys; from nvidia import nvimgcodec as nv\n"
        "decoder = nv.Decoder(device_id=0, backends=[nv.Backend(nv.HW_GPU_ONLY)])\n"
        "image = decoder.decode(nv.CodeStream(sys.stdin.buffer.read()))\n"
        "print('decoded' if image is not None else 'refused')\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", program],
        input=jpegs(settings, 1)[0],
        capture_output=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYNVIMGCODEC_VERBOSITY": "3"},
    )
    output = (process.stdout + process.stderr).decode(errors="replace")
    output = re.sub(r"\x1b\[[0-9;]*m", "", output)
    messages = [line.strip() for line in output.splitlines() if "HW decoder" in line]
    present = process.stdout.rstrip().endswith(b"decoded")
    return ("present" if present else "absent"), (messages or output.split("\n"))[-1][-150:]


def small_jpegs(settings: Settings, count: int) -> list[bytes]:
    """Photos of 500 x 375 pixels, quality 90, made from the first photos of the folder."""
    from PIL import Image

    files = []
    for photo in jpegs(settings, count):
        out = io.BytesIO()
        Image.open(io.BytesIO(photo)).convert("RGB").resize((500, 375)).save(
            out, "JPEG", quality=90
        )
        files.append(out.getvalue())
    return files


def truth(sheet: Sheet) -> None:
    """Decode photos again and again by each path; every image is compared with the CPU's."""
    settings = sheet.settings
    paths = {
        "as Arrowhead asks": ("HW_GPU_ONLY", "GPU_ONLY", "HYBRID_CPU_GPU", "CPU_ONLY"),
        "hardware engine alone": ("HW_GPU_ONLY",),
        "CUDA alone": ("GPU_ONLY",),
        "CPU and CUDA": ("HYBRID_CPU_GPU",),
    }
    for name, kinds in paths.items():
        if settings.gpu and kinds == ("HW_GPU_ONLY",) and not settings.engine:
            sheet.row(f"{name}: wrong images", None, on="GPU", note="no hardware JPEG engine")
            continue
        report_truth(sheet, name, "GPU", kinds)
    if not settings.gpu:
        report_truth(sheet, "CPU back end", "CPU", ())


def report_truth(sheet: Sheet, name: str, on: str, kinds: Sequence[str]) -> None:
    """Record how many images a path gets wrong, and how many of them the check misses."""
    what = f"{name}: wrong images", f"{name}: wrong images that the check missed"
    if on == "GPU" and not sheet.settings.gpu:
        for title in what:
            sheet.row(title, None, on=on)
        return
    log(f"  {name}")
    try:
        count, wrong, missed, refused = judge_path(sheet.settings, kinds)
    except Exception as error:
        sheet.fail(name, error, on=on)
        return
    note = f"of {count} decodes; {refused} refused, and decoded on the CPU; target 0"
    sheet.row(what[0], wrong + missed, "images", on=on, note=note, passed=wrong + missed == 0)
    sheet.row(what[1], missed, "images", on=on, note="target 0", passed=missed == 0)


def judge_path(settings: Settings, kinds: Sequence[str]) -> tuple[int, int, int, int]:
    """Decodes of a path; how many were found wrong, were wrong but not found, and were refused."""
    import torch

    from arrowhead.decode import checked_codec, headers
    from arrowhead.decode.codecs import CpuCodec, GpuCodec
    from arrowhead.decode.pixels import PixelConfig

    device, batch = ("cuda:0", 256) if settings.gpu else ("cpu", 16)
    cpu = CpuCodec(settings.threads)
    codec = GpuCodec(settings.threads, 0, kinds) if kinds else CpuCodec(1).decode_into
    refused = 0

    def counting(some: Any, images: Any) -> Any:
        nonlocal refused
        claimed = codec(some, images)
        refused += len(some) - sum(claimed)
        return claimed

    checked = checked_codec.CheckedCodec(counting, cpu, device)
    files = small_jpegs(settings, 512 if settings.gpu else 24)
    parsed: list[Any] = [headers.read_header(file, PixelConfig()) for file in files]
    y, x = (torch.arange(5, extent, 10) for extent in (375, 500))
    expected = torch.stack(
        [torch.from_numpy(image)[y][:, x] for image in cpu(parsed) if image is not None]
    ).float()
    rng, done, wrong, missed = np.random.default_rng(0), 0, 0, 0
    total = settings.decodes if settings.gpu else 2 * batch
    while done < total:
        rows = rng.integers(0, len(files), batch)
        before = refused
        result = checked([parsed[row] for row in rows], [b"\1" * 16] * batch)
        wrong += max(0, int(result.wrong.sum()) - (refused - before))
        given = torch.stack([image[y][:, x] for image in result.images]).cpu().float()
        difference = (given - expected[rows]).abs().mean((1, 2, 3))
        missed += int((difference > 8).sum())  # grey levels; two photos differ by tens
        done += batch
    return done, wrong, missed, refused


def sustained(sheet: Sheet) -> None:
    """Measure the whole extraction for a while, against its two limits on the same photos."""
    settings = sheet.settings
    on, batch = ("GPU", 256) if settings.gpu else ("CPU", 16)
    titles = ["extraction", "CPU time", "cost of a million images", "share of the lower limit"]
    if not settings.gpu:
        for title in titles:
            sheet.row(title, None, on="GPU")
    log(f"  {settings.minute:.0f} s of extraction" if settings.gpu else "  a few images")
    with tempfile.TemporaryDirectory() as folder:
        for number, file in enumerate(small_jpegs(settings, 512 if settings.gpu else 16)):
            (Path(folder) / f"{number:04}.jpg").write_bytes(file)
        there = dataclasses.replace(settings, data=folder)
        try:
            pixels_on, images, seconds, cpu = extract_for(there, batch)
        except Exception as error:
            sheet.fail("extraction", error, on=on)
            return
        rate_reached = images / seconds
        note = (
            f"{images} images of 500 x 375, {settings.body}, in {seconds:.1f} s; pixels {pixels_on}"
        )
        passed = rate_reached >= MIN_RATE if settings.gpu and settings.body == "resnet34" else None
        if settings.gpu:
            note += f"; target {MIN_RATE:,}"
        sheet.row(titles[0], rate_reached, "img/s", on=on, note=note, passed=passed)
        share = 100 * cpu / (seconds * settings.cores)
        note = f"{share:.0f} % of {settings.cores} cores"
        sheet.row(titles[1], 1e6 * cpu / images, "µs per image", on=on, note=note)
        cost = settings.price / 3600 * 1e6 / rate_reached
        note = f"at {settings.price:g} dollars an hour (--price)"
        sheet.row(titles[2], cost, "dollars", on=on, note=note)
        try:
            backends = gpu_backends(1.0) if settings.gpu else [("CPU_ONLY", 1.0)]
            decoding, _ = codec_rate(there, backends, settings.threads)
            body = body_rate(there, "cuda:0" if settings.gpu else "cpu", batch)
        except Exception as error:
            sheet.fail(titles[3], error, on=on)
            return
        share = rate_reached / min(decoding, body)
        note = f"decoding alone {decoding:,.0f} img/s, the body alone {body:,.0f}"
        passed = share >= MIN_SHARE if settings.gpu else None
        sheet.row(titles[3], share, "", on=on, note=note + f"; target {MIN_SHARE}", passed=passed)


def extract_for(settings: Settings, batch: int) -> tuple[str, int, float, float]:
    """Extract for `settings.minute` seconds, or a few chunks without a GPU.

    Returns:
        Where the decoder leaves its pixels; images, seconds and CPU seconds after a warm-up.
    """
    from arrowhead.data import sources
    from arrowhead.features.extract import FeatureCache

    listed = sources.unlabelled_catalog(Path(settings.data))
    chunk = repeated(listed, 16 * batch if settings.gpu else 2 * batch)
    until = float("inf")

    def chunks() -> Any:
        for number in itertools.count():
            if perf_counter() > until or (not settings.gpu and number == 4):
                return
            yield number, chunk

    with open_pump(settings, "cuda:0" if settings.gpu else "cpu", batch) as pump:
        images, start, cpu, warm_up = 0, 0.0, 0.0, 3 if settings.gpu else 1
        for done in pump(chunks(), FeatureCache()):
            pids = [os.getpid(), *(one._child.pid for one in pump._decoders if one._child)]
            if done.number == warm_up - 1:
                start, cpu = perf_counter(), cpu_seconds(pids)
                until = start + settings.minute
            elif done.number >= warm_up:
                images += sum(fault is None for fault in done.faults)
                seconds, used = perf_counter() - start, cpu_seconds(pids) - cpu
        pixels_on = "on the GPU" if all(one.on_device for one in pump._decoders) else "on the host"
    return pixels_on, images, seconds, used


def cpu_seconds(pids: Sequence[int]) -> float:
    """CPU time of these processes so far."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def decode(sheet: Sheet) -> None:
    """Measure only decoding: JPEGs to pixels."""
    settings = sheet.settings
    for hint, threads in itertools.product(LOAD_HINTS, (8, 16)):
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
    for hint, threads in itertools.product(LOAD_HINTS, (8, 16)):
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
    """The decoder's back ends with their load hints, as Arrowhead configures them."""
    others = ("GPU_ONLY", "HYBRID_CPU_GPU", "CPU_ONLY")
    return [("HW_GPU_ONLY", hint), *((kind, 1.0) for kind in others)]


def codec(backends: list[tuple[str, float]], threads: int, options: str = "") -> tuple[Any, Any]:
    """A decoder of nvImageCodec with Arrowhead's parameters."""
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
    failed = sum(image is None for image in decoder.decode(streams, params=params))

    def step() -> int:
        images = decoder.decode(next(groups), params=params)
        return sum(image is not None for image in images)

    note = f"{failed} of {len(streams)} not decoded, and not counted" if failed else ""
    return rate(step, settings), note


def dali_rate(settings: Settings, device: str, hint: float, threads: int) -> float:
    """Images per second of DALI's own decoder."""
    from nvidia.dali import fn, pipeline_def, types

    batch = 128 if settings.gpu else 16
    groups = endless_batches(settings, batch, 512 if settings.gpu else 32)
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
    """Measure only the forward pass: pixels to features."""
    settings = sheet.settings
    for batch in (256, 512):
        work = partial(body_rate, settings, "cuda:0", batch)
        what = f"model.Body as built (bf16), batch {batch}"
        sheet.measure(what, "img/s", work, on="GPU", ceiling="forward")
        work = partial(body_rate, settings, "cuda:0", batch, captured=True)
        sheet.measure(f"the same, CUDA graph, batch {batch}", "img/s", work, on="GPU")
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
    precision = precision_of(device)
    return Body(settings.body, weights.state, **about, precision=precision, device=device)


def precision_of(device: str) -> Any:
    """The precision that auto chooses on an H100."""
    return "bf16" if "cuda" in device else "fp32"


def body_rate(settings: Settings, device: str, batch: int, *, captured: bool = False) -> Any:
    """Images per second of Arrowhead's body, with the pixels already on its device; `captured`: and
    whether a CUDA graph was used.
    """
    import torch

    from arrowhead.features.captured_body import CapturedBody

    body, side = body_of(settings, device), settings.size
    if captured:
        body = CapturedBody(body)
    pixels = torch.randint(256, (batch, side, side, 3), dtype=torch.uint8, device=device)
    pixels = pixels.permute(0, 3, 1, 2)

    def step() -> int:
        return len(body(pixels))

    reached = rate(step, settings)
    if not captured:
        return reached
    return reached, "replayed from a graph" if body.graphs else "no graph: it gave other bits"


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
    """Measure only copies between host and device."""
    settings = sheet.settings
    shape = 256, settings.size, settings.size, 3

    def to_device() -> tuple[float, str]:
        import torch

        pixels = torch.zeros(shape, dtype=torch.uint8).pin_memory()
        return copy_rate(pixels, lambda: pixels.to("cuda:0", non_blocking=True))

    def to_host() -> tuple[float, str]:
        import torch

        features = torch.zeros((256, 512), device="cuda:0")
        target = torch.zeros((256, 512)).pin_memory()
        return copy_rate(features, lambda: target.copy_(features, non_blocking=True))

    def copy_rate(data: Any, copy: Callable[[], Any]) -> tuple[float, str]:
        def step() -> int:
            for _ in range(16):
                copy()
            return 16

        times = rate(step, settings, 1.0)
        return 256 * times, f"{times * data.nbytes / 1e9:.1f} GB/s, batch 256"

    def in_memory() -> tuple[float, str]:
        pixels = np.full(shape, 7, np.uint8)  # the pages of a zero array would all be one page
        target = np.full_like(pixels, 0)

        def step() -> int:
            np.copyto(target, pixels)
            return 1

        times = rate(step, settings, 1.0)
        return (
            256 * times,
            f"{times * pixels.nbytes / 1e9:.1f} GB/s; extraction copies each image four times",
        )

    what = "pixels to the device, pinned"
    sheet.measure(what, "img/s", to_device, on="GPU", ceiling="copy")
    sheet.measure("512 features to the host, pinned", "img/s", to_host, on="GPU")
    sheet.measure("pixels within memory, one thread", "img/s", in_memory, on="CPU")


def pipeline(sheet: Sheet) -> None:
    """Measure the complete extraction in one process with its guarded decoder, and its parts."""
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
    for name, work in (("Decoder", decoder_rate), ("GuardedDecoder", guarded_rate)):
        on_gpu = partial(work, settings, 0, 256)
        sheet.measure(f"{name}, batch 256: bytes to pixels", "img/s", on_gpu, on="GPU")
    if settings.gpu:
        return
    work = partial(pump_rate, sheet, "cpu", 32, min(settings.images, 64))
    sheet.measure("extract.FeaturePipeline, batch 32", "img/s", work, on="CPU", ceiling="pipeline")
    for name, part in (("Decoder", decoder_rate), ("GuardedDecoder", guarded_rate)):
        on_cpu = partial(part, settings, None, 32)
        sheet.measure(f"{name}, batch 32: bytes to pixels", "img/s", on_cpu, on="CPU")


def pump_rate(sheet: Sheet, device: str, batch: int, images: int) -> tuple[float, str]:
    """Images per second of the extraction with a warm decoder; seconds by stage, bottleneck."""
    from arrowhead.data import chunks as data_chunks
    from arrowhead.data import sources
    from arrowhead.features import extract
    from arrowhead.features.extract import FeatureCache

    settings = sheet.settings
    listed = sources.unlabelled_catalog(Path(settings.data))
    with open_pump(settings, device, batch) as pump:

        def extract_rows(rows: int) -> list[Any]:
            catalog = repeated(listed, rows)
            runs = data_chunks.split_into_chunks(catalog.paths, 8 * batch)
            chunks = [(at, catalog.subset(rows)) for at, rows in enumerate(runs)]
            return list(pump(chunks, FeatureCache()))

        for _ in extract_rows(2 * batch):
            pass
        pump.timer.take()
        start = perf_counter()
        chunks = extract_rows(images)
        elapsed, busy = perf_counter() - start, pump.timer.take()
    faults = sum(fault is not None for chunk in chunks for fault in chunk.faults)
    parts = " · ".join(f"{stage} {busy[stage]:.2f} s" for stage in extract.STAGES if stage in busy)
    note = f"{images} images in {elapsed:.2f} s: {parts}; bottleneck: {extract.bottleneck(busy)}"
    return images / elapsed, note + (f"; {faults} faults" if faults else "")


def open_pump(settings: Settings, device: str, batch: int) -> Any:
    """The extraction of one worker, as Arrowhead builds it."""
    from arrowhead.decode.pixels import PixelConfig
    from arrowhead.features import extract
    from arrowhead.features.backbone import BodyConfig
    from arrowhead.features.extract import ExtractConfig, FeaturePipeline
    from arrowhead.runtime.worker import Worker

    weights, pixels = weights_of(settings), PixelConfig(size=settings.size)
    body = body_of(settings, device, weights)
    about = BodyConfig(
        body=settings.body, weights=settings.weights, body_precision=precision_of(device)
    )
    recipe = extract.make_recipe(pixels, about, weights, body.width)
    worker = Worker(0, 1, device, settings.threads, lambda: None, lambda report: None)
    config = ExtractConfig(batch_size=batch, chunk_size=8 * batch)
    return FeaturePipeline(worker, body, recipe, pixels, config)


def decoder_rate(settings: Settings, device: int | None, batch: int) -> float:
    """Images per second of Arrowhead's decoder in this process: decoded, resized, in CPU memory."""
    from arrowhead.decode.decoder import Decoder
    from arrowhead.decode.pixels import PixelConfig

    config = PixelConfig(size=settings.size)
    decoder = Decoder(config, batch_size=batch, threads=settings.threads, device=device)
    groups = endless_batches(settings, batch, 512 if settings.gpu else 32)

    def step() -> int:
        return len(decoder(next(groups), image_ids(batch)).faults)

    return rate(step, settings, 3.0)


def guarded_rate(settings: Settings, device: int | None, batch: int) -> float:
    """Images per second of the same decoder in a child process, with two batches in progress."""
    from arrowhead.decode.pixels import PixelConfig
    from arrowhead.decode.worker_process import SubprocessDecoder

    groups = endless_batches(settings, batch, 512 if settings.gpu else 32)
    config = PixelConfig(size=settings.size)
    threads = settings.threads
    with SubprocessDecoder(config, batch_size=batch, threads=threads, device=device) as guarded:
        endless = (SimpleNamespace(encoded=one, image_ids=image_ids(batch)) for one in groups)
        stream = guarded.stream(endless)

        def step() -> int:
            return len(next(stream)[1].faults)

        return rate(step, settings, 3.0)


def correctness(sheet: Sheet) -> None:
    """Compare two back ends on the same files. Without a GPU: the CPU with other batch sizes."""
    import torch

    settings = sheet.settings
    photos = jpegs(settings, min(settings.images, 256 if settings.gpu else 32))
    odd = kinds(photos[0])
    on, device = ("GPU", 0) if settings.gpu else ("CPU", None)
    torch_device = f"cuda:{device}" if settings.gpu else "cpu"
    log("  pixels and features of both back ends")
    files = [*photos, *odd.values()]
    cpu_pixels, cpu_faults = pixels_of(settings, files, None, 64)
    other_pixels, faults = pixels_of(settings, files, device, 128 if settings.gpu else 16)
    good = [row for row in range(len(photos)) if not cpu_faults[row] and not faults[row]]
    cpu_features = features(settings, "cpu", cpu_pixels[good])
    cases = {"features": features(settings, torch_device, other_pixels[good])}
    cases["features of the same pixels"] = features(settings, torch_device, cpu_pixels[good])
    against = "the CPU's" if settings.gpu else "the CPU's in smaller batches"
    for name, other_features in cases.items():
        cosine = torch.cosine_similarity(other_features, cpu_features, dim=1)
        note = f"mean {cosine.mean():.6f}, {len(good)} photos; target {MIN_COSINE}"
        least = float(cosine.min())
        what = f"{name} against {against}, least"
        sheet.row(what, least, "cosine", on=on, note=note, passed=least >= MIN_COSINE)
        if on == "CPU":
            sheet.row(f"{name} against the CPU's, least", None, "cosine", on="GPU")
    shifted = float(torch.cosine_similarity(cpu_features, cpu_features.roll(1, 0), dim=1).mean())
    sheet.row("features of one photo and the next, for scale", shifted, "cosine", on="CPU")
    difference = np.abs(cpu_pixels.astype(int) - other_pixels.astype(int))
    what = "pixels against the CPU's, mean difference"
    note = (
        f"largest {difference[good].max()}, of 255; {len(photos) - len(good)} photos became faults"
    )
    mean = float(difference[good].mean())
    sheet.row(f"photos: {what}", mean, "grey levels", on="GPU", note=note)
    for row, name in enumerate(odd, len(photos)):
        note = f"largest {difference[row].max()}"
        if cpu_faults[row] != faults[row]:
            note = f"{faults[row] or 'decoded'}; on the CPU {cpu_faults[row] or 'decoded'}"
        passed = cpu_faults[row] == faults[row] and bool(difference[row].mean() <= 3)
        mean = float(difference[row].mean())
        sheet.row(f"{name}: {what}", mean, "grey levels", on="GPU", note=note, passed=passed)
    for name, backends, options in (
        ("as Arrowhead asks", gpu_backends(1.0), ""),
        ("plain upsampling", gpu_backends(1.0), ":fancy_upsampling=0"),
        ("no hardware engine", gpu_backends(0.0), ""),
    ):
        work = partial(codec_differs, photos[:32], backends, options)
        what = f"nvImageCodec, {name}: pixels against the CPU's, mean difference"
        sheet.measure(what, "grey levels", work, on="GPU")


def pixels_of(
    settings: Settings, files: Sequence[bytes], device: int | None, batch: int
) -> tuple[NDArray[np.uint8], list[str | None]]:
    """Pixels, uint8 (N, S, S, 3), and faults of files, by Arrowhead's guarded decoder."""
    from arrowhead.decode.pixels import PixelConfig
    from arrowhead.decode.worker_process import SubprocessDecoder

    config = PixelConfig(size=settings.size)
    parts, faults = [], []
    with SubprocessDecoder(
        config, batch_size=batch, threads=settings.threads, device=device
    ) as guarded:
        for at in range(0, len(files), batch):
            group = files[at : at + batch]
            pixels = guarded(group, image_ids(len(group)))
            parts.append(pixels.views[0][: len(group)].copy())
            faults += pixels.faults
    return np.concatenate(parts), faults


def features(settings: Settings, device: str, pixels: NDArray[np.uint8]) -> Any:
    """Features, float32 (N, D) on the CPU, of pixels (N, S, S, 3)."""
    import torch

    body = body_of(settings, device)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return torch.cat([body(part.contiguous()).cpu() for part in images.split(64)])


def kinds(photo: bytes) -> dict[str, bytes]:
    """One photo in formats that decoders handle differently."""
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

    both = []
    for some_backends, some_options in ((backends, options), ([("CPU_ONLY", 1.0)], "")):
        decoder, params = codec(some_backends, 8, some_options)
        decoded = decoder.decode([nv.CodeStream(photo) for photo in photos], params=params)
        both.append([np.asarray(image.cpu()).astype(int) for image in decoded])
    differences = [np.abs(a - b) for a, b in zip(*both, strict=True)]
    largest = max(int(difference.max()) for difference in differences)
    return float(np.mean([difference.mean() for difference in differences])), f"largest {largest}"


def hostile(sheet: Sheet) -> None:
    """Decode bad files among photos. Every file must have a row, and no photo may change."""
    settings = sheet.settings
    photos = jpegs(settings, 64)
    sets = {"hostile files made here": broken_files(photos)}
    if settings.gpu and (module := hostile_module()):
        cases = module.hostile(photos)
        sets["those of tests/hostile.py"] = {name: case.data for name, case in cases.items()}
    for name, files in sets.items():
        log(f"  {len(files)} {name}")
        try:
            report_hostile(sheet, name, list(files.items()), photos)
        except Exception as error:
            sheet.fail(name, error, on="GPU" if settings.gpu else "CPU")


def report_hostile(
    sheet: Sheet, name: str, bad: list[tuple[str, bytes]], photos: Sequence[bytes]
) -> None:
    """Record the rows of one set of hostile files."""
    on, device = ("GPU", 0) if sheet.settings.gpu else ("CPU", None)
    result = decode_among_photos(sheet.settings, bad, photos, device)
    note = f"in {result.batches} of {-(-len(bad) // 40)} batches of 64"
    sheet.row(f"{name}: deaths of the decoder", result.deaths, "", on=on, note=note)
    note = f"{len(result.faults)} hostile files, {result.photos} photos"
    complete = result.rows == 64 * result.batches == len(result.faults) + result.photos
    sheet.row(f"{name}: rows accounted for", result.rows, "rows", on=on, note=note, passed=complete)
    note = "; ".join(sorted(set(result.photo_faults)))[:300]
    what, count = f"{name}: photos beside them that became faults", len(result.photo_faults)
    sheet.row(what, count, "photos", on=on, note=note, passed=not count)
    note = f"{result.changed} of {result.photos} photos differ at all"
    what = f"{name}: photos' pixels against a run without them, largest difference"
    largest = result.largest
    sheet.row(what, largest, "grey levels", on=on, note=note, passed=largest == 0)
    decoded = sorted(bad_name for bad_name, fault in result.faults.items() if fault is None)
    note = "decoded: " + (", ".join(decoded)[:300] or "none")
    what = f"{name}: how many became faults"
    sheet.row(what, len(result.faults) - len(decoded), "files", on=on, note=note)
    what = f"{name}: how many the CPU judges differently"
    if not sheet.settings.gpu:
        sheet.row(what, None, "files", on="GPU")
        return
    cpu = decode_among_photos(sheet.settings, bad, photos, None).faults
    both = [bad_name for bad_name in result.faults if bad_name in cpu]
    differ = [one for one in both if (result.faults[one] is None) != (cpu[one] is None)]
    note = "; ".join(f"{one}: {result.faults[one]}, on the CPU {cpu[one]}" for one in differ)
    sheet.row(what, len(differ), f"of {len(both)}", on="GPU", note=note[:2000])


def hostile_module() -> ModuleType | None:
    """tests/hostile.py, which has several hundred more files, if it exists."""
    file = REPO / "tests" / "hostile.py"
    spec = importlib.util.spec_from_file_location("hostile", file)
    if not file.is_file() or not spec or not spec.loader:
        return None
    module = importlib.util.module_from_spec(spec)
    sys.modules["hostile"] = module
    spec.loader.exec_module(module)
    return module


def decode_among_photos(
    settings: Settings, bad: list[tuple[str, bytes]], photos: Sequence[bytes], device: int | None
) -> SimpleNamespace:
    """Decode hostile files in batches of 64: up to 40 of them, the rest photos.

    No new batch starts after half a minute, because a decoder that keeps dying is slow.
    """
    from arrowhead.decode.pixels import PixelConfig
    from arrowhead.decode.worker_process import SubprocessDecoder

    result = SimpleNamespace(
        batches=0, rows=0, photos=0, changed=0, largest=0, photo_faults=[], faults={}
    )
    rng = np.random.default_rng(0)
    config, threads = PixelConfig(size=settings.size), settings.threads
    start = perf_counter()
    with SubprocessDecoder(
        config, batch_size=64, threads=threads, device=device, timeout_seconds=30
    ) as guarded:
        for at in range(0, len(bad), 40):
            if perf_counter() - start > 30:
                break
            some, order = bad[at : at + 40], rng.permutation(64)
            photo_rows = [row for row in range(64) if order[row] >= len(some)]
            files = [
                some[n][1] if n < len(some) else photos[row % len(photos)]
                for row, n in enumerate(order)
            ]
            mixed = guarded(files, image_ids(64))
            alone = guarded([files[row] for row in photo_rows], image_ids(len(photo_rows)))
            result.batches += 1
            result.rows += len(mixed.faults)
            result.photos += len(photo_rows)
            result.photo_faults += [mixed.faults[row] for row in photo_rows if mixed.faults[row]]
            for row, n in enumerate(order):
                if n < len(some):
                    result.faults[some[n][0]] = mixed.faults[row]
            for position, row in enumerate(photo_rows):
                pixels, expected = mixed.views[0][row], alone.views[0][position]
                difference = np.abs(pixels.astype(int) - expected.astype(int)).max()
                result.changed += int(difference > 0)
                result.largest = max(result.largest, int(difference))
        result.deaths = guarded.deaths
    return result


def broken_files(photos: Sequence[bytes]) -> dict[str, bytes]:
    """About 50 broken files, by name, made from four photos."""
    from PIL import Image

    rng = np.random.default_rng(0)
    result: dict[str, bytes] = {
        "empty": b"",
        "a web page": b"<!DOCTYPE html><html><body>Not Found</body></html>\n" * 20,
        "text": b"This was a photo once.\n" * 99,
        "noise": b"\0" + rng.bytes(4000),
        "a JPEG's first and last marker only": b"\xff\xd8\xff\xd9",
        "a PNG's signature and noise": b"\x89PNG\r\n\x1a\n" + rng.bytes(3000),
    }
    for number, photo in enumerate(photos[:4]):
        image = Image.open(io.BytesIO(photo)).convert("RGB")
        image.thumbnail((400, 400))
        outputs = {kind: io.BytesIO() for kind in ("JPEG", "PNG")}
        for kind, output in outputs.items():
            image.save(output, kind)
        plain, png = (output.getvalue() for output in outputs.values())
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
            "truncated PNG": png[: len(png) // 2],
        }
        result |= {f"{name} ({number})": data for name, data in files.items()}
    return result


# ------------------------------------------------------------------------------ the report


def run_sections(sections: Sequence[str], file: Path, settings: Settings) -> None:
    """Run sections in this process, one after the other."""
    for section in sections:
        log(section)
        start, sheet = perf_counter(), Sheet(section, settings, file)
        try:
            globals()[section](sheet)
        except Exception as error:
            sheet.fail("the section", error)
        sheet.ended(perf_counter() - start)


def run(
    sections: Sequence[str], settings: Settings, seconds: float, scratch: Path
) -> list[dict[str, Any]]:
    """Run sections in a child process. The lines that they wrote, and a failure for each section
    that did not finish.
    """
    file = scratch / f"{sections[0]}.jsonl"
    file.touch()
    error = ""
    if seconds < 10:
        error = "left out: the time was used up"
    else:
        values = ",".join(sections), str(file), json.dumps(dataclasses.asdict(settings))
        command = [sys.executable, str(Path(__file__).resolve()), "--sections", *values]
        child = subprocess.Popen(command, start_new_session=True, stdout=sys.stderr)
        try:
            if code := child.wait(seconds):
                reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                error = f"its process died: {reason}"
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
    """Arrowhead's rate as a share of the lowest limit, one row per batch size."""
    on = "GPU" if gpu else "CPU"
    best: dict[str, float] = {}
    for row in rows:
        if row["ceiling"] not in ("", "pipeline") and row["on"] == on and row["value"]:
            best[row["ceiling"]] = max(best.get(row["ceiling"], 0.0), row["value"])
    if not best:
        return []
    lowest = min(best, key=lambda name: best[name])
    note = "ceilings: " + ", ".join(f"{name} {best[name]:,.0f} img/s" for name in sorted(best))
    result = []
    for row in rows:
        if row["ceiling"] == "pipeline" and row["on"] == on and row["value"]:
            title = {"what": f"{row['what']}: share of the lowest ceiling, {lowest}", "note": note}
            share = {"value": row["value"] / best[lowest], "unit": "", "ceiling": ""}
            result.append(row | title | share)
    return result


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    gpu = result["gpu"] is not None
    where = result["gpu"] or "no GPU: CPU only, few images, this measures nothing"
    lines = [
        f"# bench/gpu.py, {where}, {result['date']}",
        "",
        f"`{result['command']}`: {result['photos']}; {result['seconds']['total']:.0f} s in all.",
        "",
        "| section | measured | on | value | unit | target | note |",
        "|---|---|---|---:|---|---|---|",
    ]
    for row in result["rows"]:
        on = row["on"] if gpu else "CPU only" if row["on"] == "CPU" else "CPU only: no GPU"
        target = {True: "pass", False: "**missed**", None: ""}[row["passed"]]
        cells = [
            row["section"],
            row["what"],
            on,
            format_value(row),
            row["unit"],
            target,
            row["note"],
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += ["", "Failed:" if result["failures"] else "Nothing failed."]
    lines += [f"- {f['section']}, {f['what']}: {f['error']}" for f in result["failures"]]
    lines += ["", "Left out:", *(f"- {what}: {why}" for what, why in result["left_out"].items())]
    imported = ", ".join(result["imported"]) or "neither Ray nor MLflow"
    return "\n".join([*lines, "", f"Imported: {imported}."]) + "\n"


def format_value(row: dict[str, Any]) -> str:
    """The value of a row, formatted for the table."""
    value = row["value"]
    if value is None or isinstance(value, str):
        return value or "–"
    if row["unit"] == "cosine":
        return f"{value:.6f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def photo_folder(data: Path | None, images: int, scratch: Path) -> tuple[Path, str]:
    """The folder of photos, and its description."""
    if data:
        return data, "the photos of --data"
    for beside in (REPO.parent / "shared", REPO / "shared"):
        if (folder := beside / "data" / "dogscats").is_dir():
            return folder, "real photos (dogscats)"
    from arrowhead import demo

    log("drawing photos")
    demo.draw(scratch / "drawn", per_class=min(100, -(-images // 3)))
    return scratch / "drawn", "photos drawn by arrowhead.demo"


def main() -> int:
    """Run the sections, print the table, write the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="a folder of photos")
    parser.add_argument("--images", type=int, default=8192, help="images to extract")
    parser.add_argument("--body", default="resnet34")
    parser.add_argument("--weights", default="random", help="a file, or random (as fast)")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--out", type=Path, help="default with a GPU: bench/results")
    parser.add_argument("--seconds", type=float, default=580, help="time limit")
    parser.add_argument("--only", default=",".join(LIMIT_SECONDS), help="sections, with commas")
    parser.add_argument("--decodes", type=int, default=100_000, help="per path, of truth")
    parser.add_argument("--minute", type=float, default=60.0, help="seconds of sustained")
    parser.add_argument("--price", type=float, default=1.0, help="dollars an hour of this machine")
    parser.add_argument("--cpu", action="store_true", help="use no GPU, even if there is one")
    parser.add_argument("--sections", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.sections:
        sections, file, values = args.sections
        run_sections(sections.split(","), Path(file), Settings(**json.loads(values)))
        return 0
    start, lines = perf_counter(), []
    with tempfile.TemporaryDirectory() as scratch:
        folder, description = photo_folder(args.data, args.images, Path(scratch))
        settings = Settings(
            data=str(folder.resolve()),
            images=args.images,
            body=args.body,
            weights=args.weights,
            size=args.size,
            gpu=not args.cpu,
            cores=len(os.sched_getaffinity(0)),
            decodes=args.decodes,
            minute=args.minute,
            price=args.price,
        )
        facts: dict[str, Any] = {"gpu": False, "engine": False}
        only = {"machine", *args.only.split(",")}
        waiting = [[section] for section in LIMIT_SECONDS if section in only]
        while waiting:
            sections = waiting.pop(0)
            left = args.seconds - (perf_counter() - start)
            limit = min(left, sum(LIMIT_SECONDS[section] for section in sections))
            lines += (new := run(sections, settings, limit, Path(scratch)))
            for line in new:
                facts |= line.get("facts", {})
            settings = dataclasses.replace(settings, gpu=facts["gpu"], engine=facts["engine"])
            if waiting and not settings.gpu:  # one process for all: slow imports happen only once
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
        "mode": "gpu" if settings.gpu else "CPU only: no value here is from a GPU",
        "gpu": gpu,
        "date": str(date.today()),
        "command": "python bench/gpu.py"
        + f" --images {args.images} --body {args.body} --size {args.size}"
        + f" --weights {'random' if args.weights == 'random' else '(a file)'}"
        + (" --cpu" if args.cpu else ""),
        "photos": f"{description}, {different} different ones",
        "rows": rows,
        "failures": [line["failure"] for line in lines if "failure" in line],
        "left_out": LEFT_OUT,
        "imported": sorted(imported | ({"ray", "mlflow"} & sys.modules.keys())),
        "seconds": seconds | {"total": round(perf_counter() - start, 1)},
    }
    print(table(result))
    out = args.out or (REPO / "bench" / "results" if settings.gpu else None)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") if gpu else "cpuonly"
        file = out / f"gpu_{slug}_{result['date']}"
        file.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        file.with_suffix(".md").write_text(table(result))
        log(f"written to {file}.json and .md")
    missed = any(row["passed"] is False for row in rows)
    return 1 if result["failures"] or result["imported"] or missed else 0


if __name__ == "__main__":
    sys.exit(main())
