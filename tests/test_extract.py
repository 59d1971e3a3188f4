"""Extraction: no file stops it, no image is lost or decoded twice, threads end."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from arrowhead import ConfigError
from arrowhead.data import chunks as data_chunks
from arrowhead.data import path_text, reading, sources
from arrowhead.data.catalog import Catalog
from arrowhead.decode.pixels import PixelConfig
from arrowhead.decode.worker_process import SubprocessDecoder
from arrowhead.features.backbone import Body, BodyConfig, load
from arrowhead.features.extract import (
    Chunk,
    ExtractConfig,
    FeatureCache,
    FeaturePipeline,
    extract,
    load_body,
    make_pixel_config,
    make_recipe,
    prefetch,
    roofline,
)
from arrowhead.features.recipe import Recipe
from arrowhead.features.store import Store
from arrowhead.runtime.task_queue import TaskQueue
from arrowhead.runtime.worker import Report, Worker

PIXELS = PixelConfig(size=64, views=2)
CONFIG = ExtractConfig(batch_size=16, chunk_size=12, readers=2)


def _worker(tasks: int = 0, reports: list[Report] | None = None) -> Worker:
    received = [] if reports is None else reports
    return Worker(0, 1, "cpu", 2, TaskQueue(list(range(tasks))).next_task, received.append)


@pytest.fixture(scope="module")
def body_recipe_weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Body, Recipe, Path]:
    """A random ResNet18 for 64 pixels, its recipe and its weights file."""
    config = BodyConfig(body="resnet18", weights="random")
    weights = load(config)
    path = tmp_path_factory.mktemp("weights") / "body.safetensors"
    safetensors.torch.save_file(weights.state, path)
    recipe = make_recipe(PIXELS, config, weights, 512)
    return load_body(recipe, path, "cpu"), recipe, path


@pytest.fixture(scope="module")
def pipeline(body_recipe_weights: tuple[Body, Recipe, Path]) -> Iterator[FeaturePipeline]:
    with FeaturePipeline(
        _worker(), body_recipe_weights[0], body_recipe_weights[1], PIXELS, CONFIG
    ) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def folder(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 synthetic images in one folder."""
    result = tmp_path_factory.mktemp("folder") / "images"
    result.mkdir()
    for path in sorted(image_folder.glob("train/*/*.jpg"))[:30]:
        shutil.copy(path, result)
    return result


@pytest.fixture(scope="module")
def chunks(pipeline: FeaturePipeline, folder: Path) -> list[Chunk]:
    """The chunks that the pipeline extracts from the folder."""
    return _run_pipeline(pipeline, sources.unlabelled_catalog(folder))


def _run_pipeline(
    pipeline: FeaturePipeline, catalog: Catalog, cache: FeatureCache | None = None
) -> list[Chunk]:
    row_ranges = data_chunks.split_into_chunks(catalog.paths, CONFIG.chunk_size)
    return list(
        pipeline(
            ((at, catalog.subset(rows)) for at, rows in enumerate(row_ranges)),
            cache or FeatureCache(),
        )
    )


def _by_path(chunks: list[Chunk]) -> dict[str, np.ndarray]:
    return {p: f for chunk in chunks for p, f in zip(chunk.paths, chunk.features, strict=True)}


def _total(chunks: list[Chunk]) -> dict[str, int]:
    counts = [chunk.counts() for chunk in chunks]
    total = {name: sum(c[name] for c in counts) for name in ("files", "decoded", "looked_up")}
    return total | {"faults": sum(sum(c["faults"].values()) for c in counts)}


# ------------------------------------------------------------------------------ one file


def read(file: bytes, max_bytes: int) -> tuple[bytes, str | None]:
    folder, name = os.path.split(file)
    return reading.read_file(path_text.escape_path(folder), path_text.escape_path(name), max_bytes)


def _read_with_timeout(file: bytes, max_bytes: int = 100) -> tuple[bytes, str | None]:
    """The result of `read`; fails if it takes over 10 seconds."""
    results: list[tuple[bytes, str | None]] = []
    thread = threading.Thread(target=lambda: results.append(read(file, max_bytes)), daemon=True)
    thread.start()
    thread.join(10)
    assert results, f"reading {file!r} never ended"
    return results[0]


def test_reading_never_blocks_and_pipes_and_folders_are_faults(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "ring").symlink_to(tmp_path / "ring")
    (tmp_path / "to pipe").symlink_to(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fsencode(tmp_path / "socket"))
        for name, kind in (
            ("folder", "not a file"),
            ("pipe", "not a file"),
            ("to pipe", "not a file"),
            ("socket", "not a file"),
            ("dangling", "unreadable"),
            ("ring", "unreadable"),
            ("missing", "unreadable"),
            ("file/below", "unreadable"),
            ("n" * 300, "unreadable"),
            ("/dev/zero", "not a file"),
        ):
            data, fault = _read_with_timeout(os.fsencode(tmp_path / name))
            assert data == b""
            assert fault and fault.partition(":")[0] == kind, (name, fault)
    assert _read_with_timeout(os.fsencode(tmp_path / "file")) == (b"12345", None)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"12345")
    (tmp_path / "secret").chmod(0)
    assert read(os.fsencode(tmp_path / "secret"), 100) == (b"", "unreadable: Permission denied")


def test_the_limit_on_bytes_is_exact_and_larger_files_are_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read(os.fsencode(tmp_path / "file"), 5) == (b"12345", None)
    assert read(os.fsencode(tmp_path / "file"), 4) == (b"", "too large: 5 bytes, more than 4")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    data, fault = _read_with_timeout(os.fsencode(tmp_path / "sparse"), 2**28)
    assert (data, fault) == (b"", f"too large: {2**40} bytes, more than {2**28}")


def test_reading_leaks_no_handles(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        for name in ("file", ".", "missing"):
            read(os.fsencode(tmp_path / name), 3)
    assert len(os.listdir("/proc/self/fd")) == before


# --------------------------------------------------------------------------- the pipeline


def test_every_file_is_counted_as_decoded_looked_up_or_faulty(
    chunks: list[Chunk], folder: Path
) -> None:
    assert _total(chunks) == {"files": 30, "decoded": 30, "looked_up": 0, "faults": 0}
    assert [path for chunk in chunks for path in chunk.paths] == sorted(os.listdir(folder))
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
    assert len(chunks) > 1


def test_features_equal_the_backbones_output_for_the_decoded_pixels(
    chunks: list[Chunk], body_recipe_weights: tuple[Body, Recipe, Path], folder: Path
) -> None:
    with SubprocessDecoder(PIXELS, batch_size=1, threads=1) as decoder:
        for chunk in chunks:
            image_id, path = chunk.image_ids[-1], folder / chunk.paths[-1]
            views = decoder([path.read_bytes()], [image_id]).views
            pixels = [torch.from_numpy(view).permute(0, 3, 1, 2) for view in views]
            expected = np.stack(
                [body_recipe_weights[0](view)[0].numpy() for view in pixels]
            ).astype(np.float16)
            assert np.array_equal(chunk.features[-1], expected)
    features = np.stack(list(_by_path(chunks).values()))
    assert len(np.unique(features.reshape(60, -1), axis=0)) == 60


def test_a_second_run_with_a_feature_cache_decodes_nothing_and_gives_equal_features(
    pipeline: FeaturePipeline,
    chunks: list[Chunk],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    renamed = shutil.copytree(folder, tmp_path / "renamed")
    for path in list(renamed.iterdir()):
        path.rename(renamed / f"other-{path.name}")

    def fail(*args: object) -> None:
        raise AssertionError("an image that was known was decoded again")

    for decoder in pipeline._decoders:
        monkeypatch.setattr(decoder, "_ensure_started", fail)
    second = _run_pipeline(
        pipeline,
        sources.unlabelled_catalog(renamed),
        FeatureCache([chunk.rows() for chunk in chunks]),
    )
    assert _total(second) == {"files": 30, "decoded": 0, "looked_up": 30, "faults": 0}
    first = _by_path(chunks)
    for path, feature in _by_path(second).items():
        assert np.array_equal(feature, first[path.removeprefix("other-")])


def test_a_broken_file_becomes_one_row_with_a_fault_and_other_rows_stay_bit_identical(
    pipeline: FeaturePipeline, chunks: list[Chunk], folder: Path, tmp_path: Path
) -> None:
    broken_folder = shutil.copytree(folder, tmp_path / "spoilt")
    names = sorted(os.listdir(broken_folder))
    photo = (folder / names[0]).read_bytes()
    (broken_folder / "0-empty.jpg").write_bytes(b"")
    (broken_folder / f"{names[3]}-page.jpg").write_bytes(b"<html>404</html>" * 50)
    (broken_folder / f"{names[7]}-torn.jpg").write_bytes(photo[: len(photo) // 2])
    (broken_folder / f"{names[9]}-gone.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(broken_folder / "zz-pipe.jpg")
    chunks_with_faults = _run_pipeline(pipeline, sources.unlabelled_catalog(broken_folder))
    assert _total(chunks_with_faults) == {"files": 35, "decoded": 30, "looked_up": 0, "faults": 5}
    clean = _by_path(chunks)
    kinds = {}
    for chunk in chunks_with_faults:
        for path, fault, feature in zip(chunk.paths, chunk.faults, chunk.features, strict=True):
            if path in clean:
                assert fault is None
                assert np.array_equal(feature, clean[path])
            else:
                kinds[path.rpartition("-")[2]] = str(fault).partition(":")[0]
                assert not feature.any()
    assert kinds == {
        "empty.jpg": "empty",
        "page.jpg": "not an image",
        "torn.jpg": "truncated",
        "gone.jpg": "unreadable",
        "pipe.jpg": "not a file",
    }


def test_a_feature_that_overflows_float16_is_a_fault(
    body_recipe_weights: tuple[Body, Recipe, Path], folder: Path
) -> None:
    def huge(pixels: torch.Tensor) -> torch.Tensor:
        out = torch.ones(len(pixels), 512)
        out[1] = 1e6
        return out

    pipeline = FeaturePipeline(_worker(), huge, body_recipe_weights[1], PIXELS, CONFIG)  # type: ignore[arg-type]
    catalog = sources.unlabelled_catalog(folder)
    (chunk,) = pipeline([(0, catalog.subset(range(4)))], FeatureCache())
    assert [bool(fault) for fault in chunk.faults] == [False, True, False, False]
    assert str(chunk.faults[1]).startswith("not finite")
    assert not chunk.features[1].any()
    assert (chunk.features[[0, 2, 3]] == 1).all()


def test_no_threads_are_left_after_an_error_or_an_early_stop(
    body_recipe_weights: tuple[Body, Recipe, Path], pipeline: FeaturePipeline, folder: Path
) -> None:
    catalog, before = sources.unlabelled_catalog(folder), set(threading.enumerate())
    row_ranges = [(at, catalog.subset(range(5 * at, 5 * at + 5))) for at in range(6)]
    stream = pipeline(row_ranges, FeatureCache())
    next(stream)
    stream.close()
    del stream
    assert set(threading.enumerate()) <= before

    def fail(pixels: torch.Tensor) -> torch.Tensor:
        raise MemoryError("no room")

    broken = FeaturePipeline(_worker(), fail, body_recipe_weights[1], PIXELS, CONFIG)  # type: ignore[arg-type]
    with pytest.raises(MemoryError, match="no room"):
        list(broken(row_ranges, FeatureCache()))
    assert set(threading.enumerate()) <= before


# ----------------------------------------------------------------------------- the stage


def test_extraction_writes_the_planned_shards_and_a_second_run_reuses_them(
    body_recipe_weights: tuple[Body, Recipe, Path], folder: Path, tmp_path: Path
) -> None:
    _, recipe, weights = body_recipe_weights
    store = Store.create(tmp_path / "store", recipe, CONFIG.chunk_size)
    shutil.copy(weights, store.weights_path)
    catalog = sources.unlabelled_catalog(folder)
    row_ranges = data_chunks.split_into_chunks(catalog.paths, CONFIG.chunk_size)
    names = [data_chunks.shard_name(catalog, rows, recipe.fingerprint) for rows in row_ranges]
    reports: list[list[Report]] = [[], []]
    contents = []
    for run_reports in reports:
        store.write_pending(catalog.columns())
        extract(_worker(len(row_ranges), run_reports), store.path, PIXELS, CONFIG)
        assert store.shard_names() == sorted(names)
        contents.append([store.shard_path(name).read_bytes() for name in names])
    assert contents[0] == contents[1]
    assert [sum(r["decoded"] for r in run_reports) for run_reports in reports] == [30, 0]
    assert [sum(r["looked_up"] for r in run_reports) for run_reports in reports] == [0, 30]
    assert [sum(r["files"] for r in run_reports) for run_reports in reports] == [30, 30]
    assert set(reports[0][0]["seconds"]) == {"read", "decode", "forward", "write"}
    result = FeatureCache.from_store(store)
    for rows in map(store.read_shard, names):
        for image_id, feature in zip(rows.image_ids, rows.features, strict=True):
            assert np.array_equal(result.get(image_id), feature)
    assert result.get(bytes(16)) is None
    assert result.get(b"\xff" * 16) is None


# ------------------------------------------------------------------------------ prefetch


def test_prefetch_yields_the_items_in_order_and_then_the_exception() -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise ValueError("the sixth")

    result = []
    with pytest.raises(ValueError, match="the sixth"):
        result.extend(prefetch(items(), 2))
        result.append(-1)
    received = []
    with pytest.raises(ValueError, match="the sixth"):
        for item in prefetch(items(), 2):
            received.append(item)
    assert received == [0, 1, 2, 3, 4]
    assert list(prefetch(range(100), 1)) == list(range(100))
    assert list(prefetch([], 3)) == []


def test_prefetch_stops_its_thread_when_the_consumer_stops() -> None:
    before = set(threading.enumerate())
    produced = 0

    def endless() -> Iterator[int]:
        nonlocal produced
        while True:
            produced += 1
            yield produced

    for item in prefetch(endless(), 2):
        assert produced <= item + 3  # two in the queue, one being produced
        if item == 20:
            break
    assert set(threading.enumerate()) <= before
    assert produced <= 23


# ------------------------------------------------------------------------------ settings


def test_the_pixel_config_can_be_restored_from_a_recipe(
    body_recipe_weights: tuple[Body, Recipe, Path],
) -> None:
    restored = make_pixel_config(body_recipe_weights[1])
    assert restored.complete(PixelConfig()) == PIXELS.complete(PixelConfig())
    assert body_recipe_weights[1].augment == "side-on"


def test_max_faults_is_a_share_below_1_and_a_count_otherwise() -> None:
    share, count = ExtractConfig(max_faults=0.01), ExtractConfig(max_faults=3)
    assert [share.too_many(faults, 1000) for faults in (10, 11)] == [False, True]
    assert [count.too_many(faults, 1000) for faults in (3, 4)] == [False, True]
    assert ExtractConfig(max_faults=0).too_many(1, 1000)


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 0},
        {"chunk_size": 0},
        {"readers": 0},
        {"max_bytes": 0},
        {"max_faults": -0.1},
        {"max_faults": float("nan")},
    ],
)
def test_extraction_settings_out_of_range_are_refused_in_three_parts(
    settings: dict[str, float],
) -> None:
    with pytest.raises(ConfigError) as refusal:
        ExtractConfig(**settings)  # type: ignore[arg-type]
    assert all((refusal.value.found, refusal.value.wanted, refusal.value.do))


def test_the_roofline_names_the_bottleneck() -> None:
    seconds = {"read": 1.0, "decode": 2.0, "forward": 6.0, "write": 1.0, "workers": 8.0}
    line = roofline(seconds, images=120, workers=2)
    assert "forward 60 %" in line
    assert "bound by forward: 15.0 img/s (at most 40.0 if only forward took time)" in line
    assert roofline({"workers": 1.0}, 0, 1).startswith("nothing decoded")
