"""Feature extraction: reads, decodes and runs the body on images, chunk by chunk.

    chunk                  up to 2 x chunk_size rows of the catalog
      -> read              bytes and their hash; unreadable files become faults
      -> FeatureCache      looked up by hash: a renamed or touched image is not decoded again
      -> decode            in a separate process: uint8 (B, S, S, 3) per view, and faults
      -> body              float32 (B, D)
      -> shard             one file, written completely or not at all

Reading, decoding and the forward pass overlap in separate threads. A chunk is the unit of restart:
a stopped run repeats at most one chunk per worker. Unlike torch's DataLoader, the pipeline turns an
image that crashes or hangs the decoder into a fault of that image and goes on.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from arrowhead.data import chunks as data_chunks
from arrowhead.data import mirrors
from arrowhead.data.catalog import Catalog
from arrowhead.decode.pixels import CROPPED_UPRIGHT, Interpolation, PixelConfig, device_of
from arrowhead.decode.worker_process import SubprocessDecoder, decode_in_turn
from arrowhead.errors import ConfigError, DataError
from arrowhead.features.backbone import ROW_MULTIPLE, Body, BodyConfig, Weights
from arrowhead.features.captured_body import CapturedBody
from arrowhead.features.networks import TIMM_PREFIX
from arrowhead.features.recipe import Recipe
from arrowhead.features.shard_file import ShardRows
from arrowhead.features.stage_timer import StageTimer
from arrowhead.features.store import Store
from arrowhead.runtime.worker import Worker

if TYPE_CHECKING:
    import torch

INTERPOLATIONS: dict[Interpolation, str] = {
    "bilinear": "linear",
    "bicubic": "cubic",
}  # torchvision's names and DALI's
File = tuple[bytes, str | None, bytes]  # content, fault, image id
STAGES = ("read", "decode", "forward", "write")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractConfig:
    """How images are processed; none of these settings changes a feature."""

    batch_size: int = 32
    """Images per decode and forward pass (try 256 on a GPU)."""
    chunk_size: int = 256
    """Typical number of images per shard. A worker takes one chunk at a time, and a stopped run
    repeats at most that."""
    readers: int = 8
    """Threads that read files, per worker."""
    max_bytes: int = 256 * 2**20
    """Larger files are not read; they become faults."""
    max_faults: float = 0.01
    """More faults than this end the command with exit code 3. Below 1: a share of the images; from
    1 on: a count."""
    patience: float = 60.0
    """Seconds that decoding a batch may take, plus one per megabyte of files (the --patience of
    training counts epochs). After that the decoder counts as hung: its process is replaced, and the
    batch is tried file by file."""

    def __post_init__(self) -> None:
        for flag, value, minimum in (
            ("batch-size", self.batch_size, 1),
            ("chunk-size", self.chunk_size, 1),
            ("readers", self.readers, 1),
            ("max-bytes", self.max_bytes, 1),
            ("max-faults", self.max_faults, 0),
            ("patience", self.patience, 1),
        ):
            if not value >= minimum:  # also refuses NaN
                raise ConfigError(f"--{flag} is {value}.", f"{minimum} or more.", "raise it.")

    def too_many(self, faults: int, inputs: int) -> bool:
        """Whether this many faults exceed the limit."""
        limit = self.max_faults if self.max_faults >= 1 else self.max_faults * inputs
        return faults > limit


def make_recipe(pixels: PixelConfig, body: BodyConfig, weights: Weights, width: int) -> Recipe:
    """The recipe of these settings; what they leave open is as the weights were made for.

    Of a network of timm, `body` must name the pooling: `Body.pool` says what auto is for it. The
    precision auto is fp32 here; `backbone.choose_precision` chooses another.
    """
    pixels = pixels.complete(weights.pixels)
    assert body.pool != "auto" or not body.body.startswith(TIMM_PREFIX)
    return Recipe(
        body=body.body,
        weights=weights.sha256,
        pool="avg" if body.pool == "auto" else body.pool,
        width=width,
        size=pixels.side,
        resize=pixels.resize or "crop",
        interpolation=INTERPOLATIONS[pixels.interpolation or "bilinear"],
        crop_pct=pixels.crop_pct,
        mean=weights.mean,
        std=weights.std,
        views=pixels.views,
        augment=pixels.policy,
        augment_seed=pixels.augment_seed if pixels.views > 1 else 0,
        decoder=CROPPED_UPRIGHT,
        body_precision="fp32" if body.body_precision == "auto" else body.body_precision,
    )


def make_pixel_config(recipe: Recipe) -> PixelConfig:
    """The pixel settings of a recipe, with default limits, which are not part of it."""
    interpolation = next(
        ours for ours, dali in INTERPOLATIONS.items() if dali == recipe.interpolation
    )
    config = PixelConfig(
        size=recipe.size,
        resize=recipe.resize,  # type: ignore[arg-type]
        interpolation=interpolation,
        crop_pct=recipe.crop_pct,
        views=recipe.views,
        augment=recipe.augment,  # type: ignore[arg-type]
        augment_seed=recipe.augment_seed,
    )
    if recipe.resize != "crop" or recipe.crop_pct is not None:
        return config
    # Written out, or the default of the weights would take its place.
    return replace(config, crop_pct=config.side / config.resized_side)


# ----------------------------------------------------------------------- extraction stage


def extract(worker: Worker, path: Path, pixels: PixelConfig, config: ExtractConfig) -> None:
    """Write the shard of every chunk that this worker takes from the store's pending catalog."""
    store = Store(mirrors.here(path))
    body = load_body(store.recipe, store.weights_path, worker.device)
    write_shards(worker, store, body, pixels, config)


def write_shards(
    worker: Worker,
    store: Store,
    body: Callable[[torch.Tensor], torch.Tensor],
    pixels: PixelConfig,
    config: ExtractConfig,
) -> None:
    """Write the shards of a store with the features that `body` computes; see `extract`."""
    catalog = Catalog(**store.read_pending())
    chunk_rows = data_chunks.split_into_chunks(catalog.paths, store.chunk_size)
    names = [data_chunks.shard_name(catalog, rows, store.recipe.fingerprint) for rows in chunk_rows]
    chunks = (
        (number, catalog.subset(chunk_rows[number])) for number in iter(worker.next_task, None)
    )
    with FeaturePipeline(worker, body, store.recipe, pixels, config) as pipeline:
        for chunk in pipeline(chunks, FeatureCache.from_store(store)):
            with pipeline.timer.stage("write"):
                store.write_shard(names[chunk.number], chunk.rows())
            report_chunk(worker, chunk, pipeline.timer.take(), "features_written")


def report_chunk(worker: Worker, chunk: Chunk, seconds: dict[str, float], metric: str) -> None:
    """Report a finished chunk to the driver and to the cluster's metrics.

    metric: name of the metric that counts the written rows.
    """
    counts = chunk.counts()
    worker.report(counts | {"seconds": seconds})
    worker.measure("images_decoded", counts["decoded"])
    worker.measure("images_repaired", counts["repaired"])
    worker.measure(metric, counts["decoded"] + counts["looked_up"])
    for kind, count in counts["faults"].items():
        worker.measure("faults", count, kind=kind)
    for stage, value in seconds.items():
        worker.measure("stage_seconds", value, stage=stage)


def load_body(recipe: Recipe, weights: Path, device: str) -> Body:
    """Build the body of a recipe from a weights file."""
    return Body(
        recipe.body,
        load_weights(recipe, weights),
        pool=recipe.pool,
        mean=recipe.mean,
        std=recipe.std,
        size=recipe.size,
        precision=recipe.body_precision,
        device=device,
    )


def load_weights(recipe: Recipe, path: Path) -> dict[str, torch.Tensor]:
    """Load the tensors of a recipe's body; raises DataError if the file does not hold them."""
    import safetensors.torch

    try:
        state = dict(safetensors.torch.load_file(path))
    except (OSError, SafetensorError) as error:
        state, actual = {}, str(error)
    else:
        actual = Weights(state=state, mean=recipe.mean, std=recipe.std).sha256
    if actual != recipe.weights:
        raise DataError(
            f"{path} does not hold the weights that made the features: {actual}.",
            f"tensors whose sha256 is {recipe.weights}.",
            "delete the file and run precompute again: it writes the file again and decodes"
            " nothing.",
        )
    return state


class FeatureCache:
    """Looks up features that are in shards already, by image id.

    The features stay memory-mapped; each image takes 32 bytes of memory.
    """

    def __init__(self, shards: Sequence[ShardRows] = ()) -> None:
        self._features = [shard.features for shard in shards]
        self._sizes = [shard.sizes for shard in shards]
        positions = [
            (shard_index, row)
            for shard_index, shard in enumerate(shards)
            for row, fault in enumerate(shard.faults)
            if not fault
        ]
        ids = np.array([shards[i].image_ids[row] for i, row in positions], "V16")
        order = np.argsort(ids, kind="stable") if len(ids) else np.zeros(0, np.int64)
        self._ids = ids[order]
        self._positions = np.array(positions, np.int64).reshape(-1, 2)[order]

    @staticmethod
    def from_store(store: Store) -> FeatureCache:
        """Index all shards of a store, including those that are not in its manifest.

        Shards in the manifest are not checked here (`Store.intact_shards` does that). Raises
        DataError if the content of another shard has changed.
        """
        finished = (store.path / "manifest.json").is_file()
        listed = {shard["name"] for shard in store.manifest()["shards"]} if finished else set()
        store.check_unlisted_shards()
        names = store.shard_names()
        store.fetch_shards(names)
        return FeatureCache([store.read_shard(name, check=name not in listed) for name in names])

    def get(self, image_id: bytes) -> NDArray[Any] | None:
        """The features of an image, (V, D); None if no shard holds it."""
        position = self._find(image_id)
        if position is None:
            return None
        feature: NDArray[Any] = self._features[position[0]][position[1]]
        return feature

    def get_size(self, image_id: bytes) -> NDArray[np.int32] | None:
        """Height and width of an image, if its shard holds them."""
        shard_index, row = self._find(image_id) or (-1, -1)
        sizes = self._sizes[shard_index] if shard_index >= 0 else None
        return None if sizes is None else sizes[row]

    def _find(self, image_id: bytes) -> tuple[int, int] | None:
        """The shard and row of an image."""
        key = np.array(image_id, "V16")
        index = int(np.searchsorted(self._ids, key))
        if index == len(self._ids) or self._ids[index] != key:
            return None
        shard_index, row = self._positions[index]
        return int(shard_index), int(row)


# --------------------------------------------------------------------------- the pipeline


@dataclass(slots=True)
class Batch:
    """Images of one chunk that pass through the pipeline together."""

    rows: list[int]
    """Their rows in the chunk."""
    encoded: list[bytes]
    image_ids: list[bytes]
    chunk: Chunk
    last: bool
    """Whether it completes the chunk; such a batch may be empty."""
    views: list[torch.Tensor] = field(default_factory=list)
    """Pixels, once decoded: uint8 (B, 3, S, S) per view."""
    faults: list[str | None] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    ready_event: torch.cuda.Event | None = None
    """On a GPU: set when the features have been copied to the host."""


@dataclass(slots=True)
class Chunk:
    """The images of one chunk, whose features and faults the pipeline fills in."""

    number: int
    paths: list[str]
    features: NDArray[Any]
    faults: list[str | None]
    sizes: NDArray[np.int32]
    image_ids: list[bytes] = field(default_factory=list)
    looked_up: int = 0
    fallback: int = 0
    repaired: int = 0

    def rows(self) -> ShardRows:
        """The chunk as rows of a shard."""
        return ShardRows(
            paths=self.paths,
            image_ids=self.image_ids,
            features=self.features,
            faults=self.faults,
            sizes=self.sizes,
        )

    def mark_fault(self, row: int, fault: str) -> None:
        """Mark an image as faulty and clear its features."""
        self.faults[row] = fault
        self.features[row] = 0
        self.sizes[row] = 0

    def counts(self) -> dict[str, Any]:
        """Counts for a report, where files = decoded + looked_up + faults.

        fallback: images that Pillow decoded; repaired: those that the GPU's decoder got wrong, so
        that the CPU decoded them again; faults: by kind.
        """
        kinds = Counter(fault.partition(":")[0] for fault in self.faults if fault)
        return {
            "task": self.number,
            "files": len(self.paths),
            "decoded": len(self.paths) - self.looked_up - kinds.total(),
            "looked_up": self.looked_up,
            "fallback": self.fallback,
            "repaired": self.repaired,
            "faults": dict(kinds),
        }


class FeaturePipeline:
    """Computes the features of the images of one chunk after another, in order.

    Extraction writes the resulting chunks to shards; scoring runs a head on them.
    """

    def __init__(
        self,
        worker: Worker,
        body: Callable[[torch.Tensor], torch.Tensor],
        recipe: Recipe,
        pixels: PixelConfig,
        config: ExtractConfig,
    ) -> None:
        self.timer = StageTimer()
        self._device = worker.device
        self._body = body if worker.device == "cpu" else CapturedBody(body)
        self._recipe, self._config = recipe, config
        self._copy_stream: torch.cuda.Stream | None = None
        device = device_of(worker.device)
        # On a GPU one child prepares a batch in Python while the GPU decodes that of the other.
        count = 1 if device is None else 2
        self._decoders = [
            SubprocessDecoder(
                pixels,
                batch_size=config.batch_size,
                threads=max(1, worker.threads // count),
                device=device,
                timeout_seconds=config.patience,
                rule=recipe.decoder,
            )
            for _ in range(count)
        ]

    def __enter__(self) -> FeaturePipeline:
        return self

    def __exit__(self, *error: object) -> None:
        for decoder in self._decoders:
            decoder.close()

    def __call__(
        self, chunks: Iterable[tuple[int, Catalog]], cache: FeatureCache
    ) -> Iterator[Chunk]:
        """Yield each chunk with its features.

        Args:
            chunks: (number, the chunk's images).
            cache: features of images that need not be decoded.
        """
        with ThreadPoolExecutor(self._config.readers, "read") as readers:
            batches = prefetch(self._read(chunks, cache, readers), 2)
            in_flight: deque[tuple[Batch, list[torch.Tensor]]] = deque()
            for batch in prefetch(self._decode(batches), 2):
                in_flight.append((batch, self._forward(batch)))
                # On a GPU, queue the next batch before waiting for the previous one's features.
                if len(in_flight) > (self._device != "cpu"):
                    yield from self._finish(*in_flight.popleft())
            for remaining in in_flight:
                yield from self._finish(*remaining)

    def _read(
        self,
        chunks: Iterable[tuple[int, Catalog]],
        cache: FeatureCache,
        readers: ThreadPoolExecutor,
    ) -> Iterator[Batch]:
        shape = self._recipe.views, self._recipe.width
        for number, files in chunks:
            features = np.zeros((len(files), *shape), self._recipe.dtype)
            sizes = np.zeros((len(files), 2), np.int32)
            chunk = Chunk(number, list(files.paths), features, [None] * len(files), sizes)
            batch = Batch([], [], [], chunk, last=False)
            # Batches of about equal size: Body fills a short one up with black images.
            batches = -(-len(files) // self._config.batch_size)
            images_per_batch = -(-len(files) // batches)
            images_per_batch = min(
                self._config.batch_size, -(-images_per_batch // ROW_MULTIPLE) * ROW_MULTIPLE
            )
            for row, (data, fault, image_id) in enumerate(self._read_files(files, readers)):
                chunk.image_ids.append(image_id)
                if fault:
                    chunk.mark_fault(row, fault)
                elif (cached := cache.get(image_id)) is not None:
                    chunk.features[row] = cached[: self._recipe.views]
                    size = cache.get_size(image_id)
                    chunk.sizes[row] = 0 if size is None else size
                    chunk.looked_up += 1
                else:
                    batch.rows.append(row)
                    batch.encoded.append(data)
                    batch.image_ids.append(image_id)
                if len(batch.rows) == images_per_batch:
                    yield batch
                    batch = Batch([], [], [], chunk, last=False)
            yield replace(batch, last=True)

    def _read_files(self, files: Catalog, readers: ThreadPoolExecutor) -> Iterator[File]:
        """Contents, faults and image ids of files, in order; reads at most two batches ahead."""
        if files.in_order:
            for row in range(len(files)):
                with self.timer.stage("read"):
                    (content,) = hashed([files.read_file(row, self._config.max_bytes)])
                yield content
            return

        def read(rows: Any) -> list[File]:
            return hashed(files.read_span(rows, self._config.max_bytes))

        pending: deque[Future[list[File]]] = deque()
        ahead = 0  # images that are being read
        for rows in files.spans():
            pending.append(readers.submit(read, rows))
            ahead += len(rows)
            while ahead > 2 * self._config.batch_size:
                done = self._wait_for(pending.popleft())
                ahead -= len(done)
                yield from done
        while pending:
            yield from self._wait_for(pending.popleft())

    def _wait_for(self, future: Future[list[File]]) -> list[File]:
        with self.timer.stage("read"):  # only waiting counts, not reading ahead
            return future.result()

    def _decode(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch, pixels in decode_in_turn(self._decoders, batches):
            self.timer.add("decode", pixels.seconds)
            batch.views = [self._to_device(view) for view in pixels.views if batch.rows]
            batch.faults, batch.sizes, batch.encoded = pixels.faults, pixels.sizes, []
            batch.chunk.fallback += sum(pixels.fallback)
            batch.chunk.repaired += pixels.repaired
            yield batch

    def _to_device(self, view_BHWC: NDArray[np.uint8] | torch.Tensor) -> torch.Tensor:
        """Pixels on the body's device, uint8 (B, 3, S, S). The decoder's may be there already."""
        import torch

        pixels = torch.as_tensor(view_BHWC).permute(0, 3, 1, 2)
        if pixels.device == torch.device(self._device):
            return pixels
        if self._copy_stream is None:
            self._copy_stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._copy_stream):  # overlaps the previous forward pass
            return pixels.pin_memory().to(self._device, non_blocking=True)

    def _forward(self, batch: Batch) -> list[torch.Tensor]:
        """The features (B, D) of each view; from a GPU, only valid after `batch.ready_event`."""
        import torch

        with self.timer.stage("forward"):
            if self._device != "cpu":
                if self._copy_stream is not None:
                    torch.cuda.current_stream(self._device).wait_stream(self._copy_stream)
                for pixels in batch.views:  # allocated on another stream
                    pixels.record_stream(torch.cuda.current_stream(self._device))
            features = [self._body(pixels) for pixels in batch.views]
            if self._device != "cpu":
                features = [_copy_to_host(feature) for feature in features]
                batch.ready_event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                batch.ready_event.record()
        batch.views = []
        return features

    def _finish(self, batch: Batch, views: list[torch.Tensor]) -> Iterator[Chunk]:
        """Copy a batch's features into its chunk; yield the chunk if the batch completes it."""
        features = batch.chunk.features
        with self.timer.stage("forward"):
            if batch.ready_event is not None:
                batch.ready_event.synchronize()
            for view, feature in enumerate(views):
                with np.errstate(over="ignore"):  # float16 overflow becomes a fault below
                    features[batch.rows, view] = feature.numpy().astype(features.dtype, copy=False)
        if batch.rows:
            batch.chunk.sizes[batch.rows] = batch.sizes
            finite = np.isfinite(features[batch.rows]).reshape(len(batch.rows), -1).all(1)
            for position in np.flatnonzero(~finite):
                batch.faults[position] = (
                    batch.faults[position] or "not finite: the body gave a number beyond float16"
                )
        for row, fault in zip(batch.rows, batch.faults, strict=True):
            if fault:
                batch.chunk.mark_fault(row, fault)
        if batch.last:
            yield batch.chunk


def hashed(contents: Iterable[tuple[bytes, str | None]]) -> list[File]:
    """Files with their image ids; in the threads that read, since hashing takes as long."""
    return [
        (data, fault, hashlib.blake2b(data, digest_size=16).digest()) for data, fault in contents
    ]


def _copy_to_host(features: torch.Tensor) -> torch.Tensor:
    """Queue a copy from a GPU to pinned memory, without waiting for it."""
    import torch

    host = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
    return host.copy_(features, non_blocking=True)


def prefetch(items: Iterable[Any], depth: int) -> Iterator[Any]:
    """Yield the items while a thread computes up to `depth` of them ahead.

    An exception in the thread is raised here, after the items before it.
    """
    iterator, end = iter(items), object()
    pool = ThreadPoolExecutor(1)
    try:
        ready = deque(pool.submit(next, iterator, end) for _ in range(depth))
        while (item := ready.popleft().result()) is not end:
            ready.append(pool.submit(next, iterator, end))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
        if isinstance(iterator, Generator):
            iterator.close()


# ---------------------------------------------------------------------------- throughput


def bottleneck(seconds: Mapping[str, float]) -> str:
    """The stage that was busy longest; "" if none was."""
    busy = {stage: seconds.get(stage, 0.0) for stage in STAGES}
    return max(busy, key=lambda stage: busy[stage]) if any(busy.values()) else ""


def roofline(seconds: Mapping[str, float], images: int, workers: int) -> str:
    """Say which stage is the bottleneck: shares of busy time, the rate, and its upper bound.

    Args:
        seconds: by stage, summed over the workers; `workers`: from launch to the last chunk.
        images: decoded images.
        workers: number of workers.
    """
    total = sum(seconds.get(stage, 0.0) for stage in STAGES)
    if not images or not total:
        return "nothing decoded: every image was done before"
    shares = " · ".join(f"{s} {100 * seconds.get(s, 0) / total:.0f} %" for s in STAGES)
    stage = bottleneck(seconds)
    rate, upper_bound = images / seconds["workers"], images * workers / seconds[stage]
    limit = f"at most {upper_bound:.1f} if only {stage} took time"
    return f"{shares} — bound by {stage}: {rate:.1f} img/s ({limit})"
