"""Images to feature shards.

    chunk of the plan      up to 2 x chunk_size rows of the catalog
      -> read              bytes and their hash; unreadable files become faults
      -> known features    looked up by hash: a renamed or touched image is not decoded again
      -> decode            uint8 (B, 3, S, S) per view, and the faults
      -> body              float32 (B, D)
      -> shard             one file, whole or absent

Reading, decoding and the forward pass run ahead of each other in their own threads. A chunk is
the unit of restart: a stopped run repeats at most one chunk per worker.
"""

from __future__ import annotations

import hashlib
import os
import queue
import stat
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from arrowhead import ConfigError, DataError, plan, shards
from arrowhead.decode import Decoder, PixelConfig
from arrowhead.launch import Worker
from arrowhead.model import Body, BodyConfig, Weights
from arrowhead.plan import Catalog
from arrowhead.shards import Recipe, Rows, Store

if TYPE_CHECKING:
    import torch

STAGES = ("read", "decode", "forward", "write")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractConfig:
    """How the images are worked through; none of it changes a feature."""

    batch_size: int = 32
    """Images per decode and forward pass (try 256 on a GPU)."""
    chunk_size: int = 256
    """Typical images per shard: the unit that workers claim and that a stopped run repeats."""
    readers: int = 8
    """Threads that read files, per worker."""
    max_bytes: int = 256 * 2**20
    """Larger files are refused unread."""
    max_faults: float = 0.01
    """Exit code 3 above this: a share of the inputs below 1, a count from 1 on."""

    def __post_init__(self) -> None:
        for knob, value, low in (
            ("batch-size", self.batch_size, 1),
            ("chunk-size", self.chunk_size, 1),
            ("readers", self.readers, 1),
            ("max-bytes", self.max_bytes, 1),
            ("max-faults", self.max_faults, 0),
        ):
            if not value >= low:  # true of nan, too
                raise ConfigError(f"--{knob} is {value}.", f"{low} or more.", "raise it.")

    def too_many(self, faults: int, inputs: int) -> bool:
        """Whether this many faults break the limit."""
        limit = self.max_faults if self.max_faults >= 1 else self.max_faults * inputs
        return faults > limit


class Clock:
    """Busy seconds by stage, added up by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time this block takes as `name`'s."""
        began = perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._seconds[name] += perf_counter() - began

    def read(self) -> dict[str, float]:
        """The seconds since the last reading, which therefore add up."""
        with self._lock:
            seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds


def recipe_of(pixels: PixelConfig, body: BodyConfig, weights: Weights, width: int) -> Recipe:
    """The recipe that these settings come to."""
    return Recipe(
        body=body.body,
        weights=weights.sha256,
        pool=body.pool,
        width=width,
        size=pixels.size,
        resize=pixels.resize,
        mean=weights.mean,
        std=weights.std,
        views=pixels.views,
        augment=pixels.policy,
        augment_seed=pixels.augment_seed if pixels.views > 1 else 0,
    )


def pixels_of(recipe: Recipe, max_pixels: int = PixelConfig().max_pixels) -> PixelConfig:
    """The pixel settings that a recipe stands for."""
    return PixelConfig(
        size=recipe.size,
        resize=recipe.resize,  # type: ignore[arg-type]
        views=recipe.views,
        augment=recipe.augment,  # type: ignore[arg-type]
        augment_seed=recipe.augment_seed,
        max_pixels=max_pixels,
    )


# ------------------------------------------------------------------------------- a stage


def extract(worker: Worker, path: Path, pixels: PixelConfig, config: ExtractConfig) -> None:
    """Write the shard of every chunk this worker claims from the store's pending catalog."""
    store = Store(path)
    catalog = Catalog(**shards.read_catalog(pending(store)))
    runs = plan.chunks(catalog.paths, store.chunk_size)
    names = [plan.chunk_name(catalog, rows, store.recipe.fingerprint) for rows in runs]
    body = load_body(store.recipe, store.weights, worker.device)
    pump = Pump(worker, body, store.recipe, pixels, config)
    claimed = ((number, runs[number]) for number in iter(worker.claim, None))
    for chunk in pump(catalog, claimed, known(store)):
        with pump.clock.stage("write"):
            shards.write_shard(store.shard(names[chunk.number]), chunk.rows(), store.recipe)
        worker.report(chunk.counts() | {"seconds": pump.clock.read()})


def pending(store: Store) -> Path:
    """The catalog of the extraction that is under way."""
    return store.path / "pending.arrow"


def load_body(recipe: Recipe, weights: Path, device: str) -> Body:
    """The body of a recipe, from its weights file."""
    return Body(
        recipe.body,
        load_weights(recipe, weights),
        pool=recipe.pool,
        mean=recipe.mean,
        std=recipe.std,
        size=recipe.size,
        device=device,
    )


def load_weights(recipe: Recipe, path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a recipe's body; DataError if the file no longer holds them."""
    import safetensors.torch

    try:
        state = dict(safetensors.torch.load_file(path))
    except (OSError, SafetensorError) as error:
        state, found = {}, str(error)
    else:
        found = Weights(state=state, mean=recipe.mean, std=recipe.std).sha256
    if found != recipe.weights:
        raise DataError(
            f"{path} is not the body that made the features: {found}.",
            f"tensors whose sha256 is {recipe.weights}.",
            "delete the file and run precompute again: it is written anew, nothing is decoded.",
        )
    return state


def known(store: Store) -> dict[bytes, NDArray[np.float16]]:
    """Features (V, D) of all well images on the disk, by image id; memory-mapped."""
    found = {}
    for name in store.on_disk():
        rows = shards.read_shard(store.shard(name), store.recipe)
        for i, fault in enumerate(rows.faults):
            if fault is None:
                found[rows.image_ids[i]] = rows.features[i]
    return found


# ------------------------------------------------------------------------------ the pump


@dataclass(slots=True)
class Batch:
    """Images on their way: which chunk's rows they are, their bytes, then pixels and faults.

    `last` marks the batch that completes its chunk (it may hold no images at all).
    """

    rows: list[int]
    encoded: list[bytes]
    image_ids: list[bytes]
    chunk: Chunk
    last: bool
    views: list[torch.Tensor] = field(default_factory=list)
    faults: list[str | None] = field(default_factory=list)


@dataclass(slots=True)
class Chunk:
    """The rows of one chunk while they are being filled in; positions count from its start."""

    number: int
    paths: list[str]
    features: NDArray[np.float16]
    faults: list[str | None]
    image_ids: list[bytes] = field(default_factory=list)
    reused: int = 0

    def rows(self) -> Rows:
        """The rows as the shard takes them."""
        return Rows(
            paths=self.paths,
            image_ids=self.image_ids,
            features=self.features,
            faults=self.faults,
        )

    def spoil(self, row: int, fault: str) -> None:
        """Make a row a fault."""
        self.faults[row] = fault
        self.features[row] = 0

    def counts(self) -> dict[str, Any]:
        """Files = decoded + reused + all faults."""
        kinds = Counter(fault.partition(":")[0] for fault in self.faults if fault)
        decoded = len(self.paths) - self.reused - kinds.total()
        return {
            "files": len(self.paths),
            "decoded": decoded,
            "reused": self.reused,
            "faults": dict(kinds),
        }


class Pump:
    """Chunks of a catalog in, their rows with features out, in the order they were claimed.

    The one way from files to features: extraction writes what comes out, scoring puts a head
    behind it.
    """

    def __init__(
        self, worker: Worker, body: Body, recipe: Recipe, pixels: PixelConfig, config: ExtractConfig
    ) -> None:
        self.clock = Clock()
        self._body, self._recipe, self._config = body, recipe, config
        self._decoder = Decoder(
            pixels,
            batch_size=config.batch_size,
            threads=worker.threads,
            device=int(worker.device.partition(":")[2] or 0) if "cuda" in worker.device else None,
        )

    def __call__(
        self,
        catalog: Catalog,
        chunks: Iterable[tuple[int, range]],
        known: dict[bytes, NDArray[np.float16]],
    ) -> Iterator[Chunk]:
        """Each chunk (number, rows), filled in; images whose id is in `known` are not decoded."""
        with ThreadPoolExecutor(self._config.readers, "read") as readers:
            read = ahead(self._read(catalog, chunks, known, readers), 2)
            for batch in ahead(self._decode(read), 2):
                self._forward(batch)
                if batch.last:
                    yield batch.chunk

    def _read(
        self,
        catalog: Catalog,
        chunks: Iterable[tuple[int, range]],
        known: dict[bytes, NDArray[np.float16]],
        readers: ThreadPoolExecutor,
    ) -> Iterator[Batch]:
        shape = self._recipe.views, self._recipe.width
        for number, rows in chunks:
            paths = [catalog.paths[row] for row in rows]
            blank = np.zeros((len(paths), *shape), np.float16)
            chunk = Chunk(number, paths, blank, [None] * len(paths))
            batch = Batch([], [], [], chunk, last=False)
            # Even batches: a last one of a few rows would be filled up with black ones.
            full = -(-len(rows) // -(-len(rows) // self._config.batch_size))
            files = [catalog.file(row) for row in rows]
            for row, (data, fault) in enumerate(self._in_order(files, readers)):
                image_id = hashlib.blake2b(data, digest_size=16).digest()
                chunk.image_ids.append(image_id)
                if fault:
                    chunk.spoil(row, fault)
                elif image_id in known:
                    chunk.features[row] = known[image_id]
                    chunk.reused += 1
                else:
                    batch.rows.append(row)
                    batch.encoded.append(data)
                    batch.image_ids.append(image_id)
                if len(batch.rows) == full:
                    yield batch
                    batch = Batch([], [], [], chunk, last=False)
            yield replace(batch, last=True)

    def _in_order(
        self, files: list[bytes], readers: ThreadPoolExecutor
    ) -> Iterator[tuple[bytes, str | None]]:
        """Contents and faults of files, in order, at most two batches ahead of the taker."""
        waiting: deque[Future[tuple[bytes, str | None]]] = deque()
        for file in files:
            waiting.append(readers.submit(read, file, self._config.max_bytes))
            if len(waiting) > 2 * self._config.batch_size:
                yield self._arrived(waiting.popleft())
        while waiting:
            yield self._arrived(waiting.popleft())

    def _arrived(self, coming: Future[tuple[bytes, str | None]]) -> tuple[bytes, str | None]:
        with self.clock.stage("read"):  # what is waited for here was not read ahead in time
            return coming.result()

    def _decode(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if batch.rows:
                with self.clock.stage("decode"):
                    batch.views, batch.faults = self._decoder(batch.encoded, batch.image_ids)
                batch.encoded = []
            yield batch

    def _forward(self, batch: Batch) -> None:
        features = batch.chunk.features
        with self.clock.stage("forward"):
            for view, pixels in enumerate(batch.views):
                made = self._body(pixels)[: len(batch.rows)].cpu().numpy()
                with np.errstate(over="ignore"):  # what float16 cannot hold is a fault below
                    features[batch.rows, view] = made.astype(np.float16)
        for row, fault in zip(batch.rows, batch.faults, strict=True):
            if fault is None and not np.isfinite(features[row]).all():
                fault = "not finite: the body gave a number beyond float16"
            if fault:
                batch.chunk.spoil(row, fault)
        batch.views = []


def read(file: bytes, max_bytes: int) -> tuple[bytes, str | None]:
    """A file's bytes and None, or no bytes and the fault. Pipes and devices are never waited on."""
    try:
        handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                return b"", "not a file: a pipe, socket or device"
            if status.st_size > max_bytes:
                return b"", f"too large: {status.st_size} bytes, more than {max_bytes}"
            with os.fdopen(handle, "rb", closefd=False) as stream:
                return stream.read(), None
        finally:
            os.close(handle)
    except OSError as error:
        return b"", f"unreadable: {error.strerror}"


def ahead(items: Iterable[Any], depth: int) -> Iterator[Any]:
    """The items, made up to `depth` ahead by a thread of their own; its exception comes through."""
    line: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    stopped = threading.Event()

    def offer(kind: str, value: Any) -> bool:
        while not stopped.is_set():
            try:
                line.put((kind, value), timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not offer("item", item):
                    return
            offer("end", None)
        except BaseException as error:
            offer("error", error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            kind, value = line.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        stopped.set()
        thread.join()


# ------------------------------------------------------------------------- what it came to


def roofline(seconds: Mapping[str, float], images: int, workers: int) -> str:
    """Which stage binds: shares of the busy time, and the rate if that stage ran alone.

    seconds: by stage, summed over the workers, and `workers`, from launch to the last chunk.
    """
    total = sum(seconds.get(stage, 0.0) for stage in STAGES)
    if not images or not total:
        return "nothing decoded: every image was there already"
    shares = " · ".join(f"{s} {100 * seconds.get(s, 0) / total:.0f} %" for s in STAGES)
    binding = max(STAGES, key=lambda stage: seconds.get(stage, 0))
    reached, possible = images / seconds["workers"], images * workers / seconds[binding]
    return f"{shares} — bound by {binding}: {reached:.1f} img/s of {possible:.1f} possible here"
