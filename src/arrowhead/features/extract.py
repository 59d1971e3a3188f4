"""Images to feature shards.

    chunk of the plan      up to 2 x chunk_size rows of the catalog
      -> read              bytes and their hash; unreadable files become faults
      -> known features    looked up by hash: a renamed or touched image is not decoded again
      -> decode            in a process of its own: uint8 (B, S, S, 3) per view, and the faults
      -> body              float32 (B, D)
      -> shard             one file, whole or absent

Reading, decoding and the forward pass run ahead of each other in their own threads. A chunk is
the unit of restart: a stopped run repeats at most one chunk per worker.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from arrowhead.data import chunks as data_chunks
from arrowhead.data.catalog import Catalog
from arrowhead.decode.pixels import CROPPED_UPRIGHT, PixelConfig
from arrowhead.decode.worker_process import GuardedDecoder
from arrowhead.errors import ConfigError, DataError
from arrowhead.features.backbone import Body, BodyConfig, Weights
from arrowhead.features.recipe import Recipe
from arrowhead.features.shard_file import Rows
from arrowhead.features.store import Store
from arrowhead.runtime.worker import Worker

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
    """Exit code 3 above this: a share of the images below 1, a count from 1 on."""
    patience: float = 60.0
    """Seconds a batch may take to decode (and one more per megabyte of files) before the decoder is
    taken for hung, its process replaced, and the batch tried file by file."""

    def __post_init__(self) -> None:
        for knob, value, low in (
            ("batch-size", self.batch_size, 1),
            ("chunk-size", self.chunk_size, 1),
            ("readers", self.readers, 1),
            ("max-bytes", self.max_bytes, 1),
            ("max-faults", self.max_faults, 0),
            ("patience", self.patience, 1),
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
            self.add(name, perf_counter() - began)

    def add(self, name: str, seconds: float) -> None:
        """Count seconds measured elsewhere as `name`'s."""
        with self._lock:
            self._seconds[name] += seconds

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
        decoder=CROPPED_UPRIGHT,
    )


def pixels_of(recipe: Recipe) -> PixelConfig:
    """The pixel settings that a recipe stands for; the limits are not part of it."""
    return PixelConfig(
        size=recipe.size,
        resize=recipe.resize,  # type: ignore[arg-type]
        views=recipe.views,
        augment=recipe.augment,  # type: ignore[arg-type]
        augment_seed=recipe.augment_seed,
    )


# ------------------------------------------------------------------------------- a stage


def extract(worker: Worker, path: Path, pixels: PixelConfig, config: ExtractConfig) -> None:
    """Write the shard of every chunk this worker claims from the store's pending catalog."""
    store = Store(path)
    catalog = Catalog(**store.read_pending())
    runs = data_chunks.chunks(catalog.paths, store.chunk_size)
    names = [data_chunks.chunk_name(catalog, rows, store.recipe.fingerprint) for rows in runs]
    body = load_body(store.recipe, store.weights, worker.device)
    claimed = ((number, catalog.part(runs[number])) for number in iter(worker.next_task, None))
    with Pump(worker, body, store.recipe, pixels, config) as pump:
        for chunk in pump(claimed, Known.of(store)):
            with pump.clock.stage("write"):
                store.write(names[chunk.number], chunk.rows())
            tell(worker, chunk, pump.clock.read(), "features_written")


def tell(worker: Worker, chunk: Chunk, seconds: dict[str, float], written: str) -> None:
    """Report a chunk that is written, and measure it; written: the name of what was written."""
    counts = chunk.counts()
    worker.report(counts | {"seconds": seconds})
    worker.measure("images_decoded", counts["decoded"])
    worker.measure(written, counts["decoded"] + counts["looked_up"])
    for kind, count in counts["faults"].items():
        worker.measure("faults", count, kind=kind)
    for stage, value in seconds.items():
        worker.measure("stage_seconds", value, stage=stage)


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


class Known:
    """Features (V, D) of the well images that are on the disk, by image id; memory-mapped.

    Holds 32 bytes per image in memory.
    """

    def __init__(self, parts: Sequence[Rows] = ()) -> None:
        self._features = [rows.features for rows in parts]
        well = [(i, j) for i, rows in enumerate(parts) for j, f in enumerate(rows.faults) if not f]
        ids = np.array([parts[i].image_ids[j] for i, j in well], "V16")
        order = np.argsort(ids, kind="stable") if len(ids) else np.zeros(0, np.int64)
        self._ids, self._places = ids[order], np.array(well, np.int64).reshape(-1, 2)[order]

    @staticmethod
    def of(store: Store) -> Known:
        """What a store's shards hold, also those that no manifest names (yet, or any more).

        The manifest's are taken as they are: `Store.intact` compares them with their hashes.
        Raises DataError if another one differs from what was written.
        """
        finished = (store.path / "manifest.json").is_file()
        named = {one["name"] for one in store.manifest()["shards"]} if finished else set()
        store.examine_leftovers()
        return Known([store.read(name, check=name not in named) for name in store.on_disk()])

    def get(self, image_id: bytes) -> NDArray[np.float16] | None:
        """The image's features, None if it has never been decoded."""
        wanted = np.array(image_id, "V16")
        at = int(np.searchsorted(self._ids, wanted))
        if at == len(self._ids) or self._ids[at] != wanted:
            return None
        shard, row = self._places[at]
        found: NDArray[np.float16] = self._features[shard][row]
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
    made: torch.cuda.Event | None = None
    """On a GPU: its features have arrived."""


@dataclass(slots=True)
class Chunk:
    """The rows of one chunk while they are being filled in; positions count from its start."""

    number: int
    paths: list[str]
    features: NDArray[np.float16]
    faults: list[str | None]
    image_ids: list[bytes] = field(default_factory=list)
    looked_up: int = 0
    fallback: int = 0

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
        """Files = decoded + looked_up + all faults; fallback: how many of the decoded by Pillow."""
        kinds = Counter(fault.partition(":")[0] for fault in self.faults if fault)
        return {
            "task": self.number,
            "files": len(self.paths),
            "decoded": len(self.paths) - self.looked_up - kinds.total(),
            "looked_up": self.looked_up,
            "fallback": self.fallback,
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
        self._device = worker.device
        self._copies: torch.cuda.Stream | None = None
        self._decoder = GuardedDecoder(
            pixels,
            batch_size=config.batch_size,
            threads=worker.threads,
            device=int(worker.device.partition(":")[2] or 0) if "cuda" in worker.device else None,
            patience=config.patience,
            rule=recipe.decoder,
        )

    def __enter__(self) -> Pump:
        return self

    def __exit__(self, *error: object) -> None:
        self._decoder.close()

    def __call__(self, chunks: Iterable[tuple[int, Catalog]], known: Known) -> Iterator[Chunk]:
        """Each chunk (number, the rows of its files), filled in; images that are `known` are not
        decoded.
        """
        with ThreadPoolExecutor(self._config.readers, "read") as readers:
            read = ahead(self._read(chunks, known, readers), 2)
            under_way: deque[tuple[Batch, list[torch.Tensor]]] = deque()
            for batch in ahead(self._decode(read), 2):
                under_way.append((batch, self._forward(batch)))
                # On a GPU the next batch is queued before the last one's features are waited for.
                if len(under_way) > (self._device != "cpu"):
                    yield from self._finish(*under_way.popleft())
            for last in under_way:
                yield from self._finish(*last)

    def _read(
        self,
        chunks: Iterable[tuple[int, Catalog]],
        known: Known,
        readers: ThreadPoolExecutor,
    ) -> Iterator[Batch]:
        shape = self._recipe.views, self._recipe.width
        for number, files in chunks:
            blank = np.zeros((len(files), *shape), np.float16)
            chunk = Chunk(number, list(files.paths), blank, [None] * len(files))
            batch = Batch([], [], [], chunk, last=False)
            # Even batches: a last one of a few rows would be filled up with black ones.
            full = -(-len(files) // -(-len(files) // self._config.batch_size))
            for row, (data, fault) in enumerate(self._in_order(files, readers)):
                image_id = hashlib.blake2b(data, digest_size=16).digest()
                chunk.image_ids.append(image_id)
                if fault:
                    chunk.spoil(row, fault)
                elif (there := known.get(image_id)) is not None:
                    chunk.features[row] = there[: self._recipe.views]
                    chunk.looked_up += 1
                else:
                    batch.rows.append(row)
                    batch.encoded.append(data)
                    batch.image_ids.append(image_id)
                if len(batch.rows) == full:
                    yield batch
                    batch = Batch([], [], [], chunk, last=False)
            yield replace(batch, last=True)

    def _in_order(
        self, files: Catalog, readers: ThreadPoolExecutor
    ) -> Iterator[tuple[bytes, str | None]]:
        """Contents and faults of files, in order, at most two batches ahead of the taker."""
        waiting: deque[Future[tuple[bytes, str | None]]] = deque()
        for row in range(len(files)):
            waiting.append(readers.submit(files.read, row, self._config.max_bytes))
            if len(waiting) > 2 * self._config.batch_size:
                yield self._arrived(waiting.popleft())
        while waiting:
            yield self._arrived(waiting.popleft())

    def _arrived(self, coming: Future[tuple[bytes, str | None]]) -> tuple[bytes, str | None]:
        with self.clock.stage("read"):  # what is waited for here was not read ahead in time
            return coming.result()

    def _decode(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch, pixels in self._decoder.stream(batches):
            self.clock.add("decode", pixels.seconds)
            batch.views = [self._placed(view) for view in pixels.views if batch.rows]
            batch.faults, batch.encoded = pixels.faults, []
            batch.chunk.fallback += sum(pixels.fallback)
            yield batch

    def _placed(self, view_BHWC: NDArray[np.uint8]) -> torch.Tensor:
        """Pixels where the body takes them: uint8 (B, 3, S, S), on its device."""
        import torch

        pixels = torch.from_numpy(view_BHWC).permute(0, 3, 1, 2)
        if self._device == "cpu":
            return pixels
        if self._copies is None:
            self._copies = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._copies):  # beside the forward pass of the batch before
            return pixels.pin_memory().to(self._device, non_blocking=True)

    def _forward(self, batch: Batch) -> list[torch.Tensor]:
        """The features (B, D) of each view; from a GPU they are on their way when this returns."""
        import torch

        with self.clock.stage("forward"):
            if self._copies is not None:
                torch.cuda.current_stream(self._device).wait_stream(self._copies)
                for pixels in batch.views:
                    pixels.record_stream(torch.cuda.current_stream(self._device))
            made = [self._body(pixels)[: len(batch.rows)] for pixels in batch.views]
            if self._device != "cpu":
                made = [feature.to("cpu", non_blocking=True) for feature in made]
                batch.made = torch.cuda.Event()  # type: ignore[no-untyped-call]
                batch.made.record()
        batch.views = []
        return made

    def _finish(self, batch: Batch, made: list[torch.Tensor]) -> Iterator[Chunk]:
        """Put a batch's features into its chunk; the chunk, when this batch was its last."""
        features = batch.chunk.features
        with self.clock.stage("forward"):
            if batch.made is not None:
                batch.made.synchronize()
            for view, feature in enumerate(made):
                with np.errstate(over="ignore"):  # what float16 cannot hold is a fault below
                    features[batch.rows, view] = feature.numpy().astype(np.float16)
        for row, fault in zip(batch.rows, batch.faults, strict=True):
            if fault is None and not np.isfinite(features[row]).all():
                fault = "not finite: the body gave a number beyond float16"
            if fault:
                batch.chunk.spoil(row, fault)
        if batch.last:
            yield batch.chunk


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


def binding(seconds: Mapping[str, float]) -> str:
    """The stage that was busy longest, "" before any was."""
    busy = {stage: seconds.get(stage, 0.0) for stage in STAGES}
    return max(busy, key=lambda stage: busy[stage]) if any(busy.values()) else ""


def roofline(seconds: Mapping[str, float], images: int, workers: int) -> str:
    """Which stage binds: shares of the busy time, and the rate if that stage ran alone.

    seconds: by stage, summed over the workers, and `workers`, from launch to the last chunk.
    """
    total = sum(seconds.get(stage, 0.0) for stage in STAGES)
    if not images or not total:
        return "nothing decoded: every image was there already"
    shares = " · ".join(f"{s} {100 * seconds.get(s, 0) / total:.0f} %" for s in STAGES)
    stage = binding(seconds)
    reached, possible = images / seconds["workers"], images * workers / seconds[stage]
    return f"{shares} — bound by {stage}: {reached:.1f} img/s (it alone would do {possible:.1f})"
