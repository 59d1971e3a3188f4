"""The same images give the same features, scores and reports from every kind of source."""

from __future__ import annotations

import csv
import io
import shutil
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_kills
from conftest import AddMlflowDb, Command, MakeBundle

from arrowhead.data import chunks, sources, tar_index
from arrowhead.data.catalog import Catalog
from arrowhead.decode.pixels import PixelConfig
from arrowhead.features import backbone, catalog_file
from arrowhead.features.backbone import BodyConfig
from arrowhead.features.extract import ExtractConfig, FeatureCache, FeaturePipeline, make_recipe
from arrowhead.features.store import Store
from arrowhead.runtime.task_queue import TaskQueue
from arrowhead.runtime.worker import Worker

KINDS = ("folder", "table.csv", "tars", "photos.tar", "parquet", "arrow")
FLAGS = ["--body", "resnet18", "--weights", "random", "--size", "64", "--chunk-size", "7"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tar_index.CACHE_VARIABLE, str(tmp_path_factory.getbasetemp() / "indexes"))


def write_sources(folder: Path, images: list[tuple[str, str, Path]], shards: int) -> None:
    """Write images (split, label, file) as every kind of source."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for kind in ("tars", "parquet", "arrow"):
        (folder / kind).mkdir(parents=True)
    classes = sorted({label for _, label, _ in images})
    (folder / "tars" / "classes.txt").write_text("\n".join(classes))
    for split in sorted({split for split, *_ in images}):
        mine = [one for one in images if one[0] == split]
        for shard in range(shards):
            with tarfile.open(folder / "tars" / f"{split}-{shard}.tar", "w") as tar:
                for number, (_, label, file) in enumerate(mine[shard::shards]):
                    key = f"{number:04}"
                    cls = str(classes.index(label)).encode()
                    for ending, data in ((file.suffix, file.read_bytes()), (".cls", cls)):
                        entry = tarfile.TarInfo(key + ending)
                        entry.size = len(data)
                        tar.addfile(entry, io.BytesIO(data))
        column = [{"bytes": file.read_bytes(), "path": file.name} for *_, file in mine]
        table = pa.table({"image": column, "label": [label for _, label, _ in mine]})
        pq.write_table(table, folder / "parquet" / f"{split}-0.parquet", row_group_size=10)
        stream = folder / "arrow" / f"{split}-0.arrow"
        with pa.OSFile(str(stream), "wb") as file, pa.ipc.new_stream(file, table.schema) as sink:
            sink.write_table(table, max_chunksize=10)
    with tarfile.open(folder / "photos.tar", "w") as tar:
        tar.add(folder / "folder", "photos")
    with (folder / "table.csv").open("w", newline="") as file:
        rows = [(file.relative_to(folder), label, split) for split, label, file in images]
        csv.writer(file).writerows([("path", "label", "split"), *rows])


@pytest.fixture(scope="module")
def same(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 images of 3 classes, one of them cut off, as every kind of source."""
    folder = tmp_path_factory.mktemp("same")
    images = []
    for split, count in (("train", 7), ("valid", 3)):
        for label in sorted(one.name for one in (image_folder / split).iterdir()):
            target = folder / "folder" / split / label
            target.mkdir(parents=True)
            for photo in sorted((image_folder / split / label).iterdir())[:count]:
                images.append((split, label, Path(shutil.copy(photo, target))))
    images[4][2].write_bytes(images[4][2].read_bytes()[:900])
    write_sources(folder, images, shards=2)
    return folder


@pytest.fixture(scope="module")
def pipeline() -> Iterator[FeaturePipeline]:
    """Features of a random ResNet18 of 64 pixels."""
    pixels, body = PixelConfig(size=64), BodyConfig(body="resnet18", weights="random")
    weights = backbone.load(body)
    recipe = make_recipe(pixels, body, weights, 512)
    network = backbone.Body(
        "resnet18", weights.state, pool="avg", mean=weights.mean, std=weights.std, size=64
    )
    worker = Worker(0, 1, "cpu", 1, TaskQueue([]).next_task, lambda report: None)
    config = ExtractConfig(batch_size=16)
    with FeaturePipeline(worker, network, recipe, pixels, config) as result:
        yield result


def rows_by_id(catalog: Catalog, pipeline: FeaturePipeline, chunk_size: int) -> dict[bytes, Any]:
    """Label, split, kind of fault and the bytes of the features of every image, by its id."""
    chunk_rows = chunks.split_into_chunks(catalog.paths, chunk_size)
    rows = {}
    numbered = ((number, catalog.subset(part)) for number, part in enumerate(chunk_rows))
    for chunk in pipeline(numbered, FeatureCache()):
        first = chunk_rows[chunk.number].start
        assert chunk.paths == catalog.paths[first : first + len(chunk.paths)]
        for row, image_id in enumerate(chunk.image_ids):
            label = catalog.labels[first + row], catalog.splits[first + row]
            rows[image_id] = (*label, chunk.faults[row], chunk.features[row].tobytes())
    assert len(rows) == len(catalog)
    return rows


@pytest.mark.parametrize("chunk_size", [7, 100])
def test_same_images_give_equal_features_ids_labels_and_splits_from_every_source(
    same: Path, pipeline: FeaturePipeline, chunk_size: int
) -> None:
    by_kind = {
        kind: rows_by_id(sources.labelled_catalog(same / kind), pipeline, chunk_size)
        for kind in KINDS
    }
    faults = [fault for _, _, fault, _ in by_kind["folder"].values() if fault]
    assert len(by_kind["folder"]) == 30 and len(faults) == 1
    assert all(rows == by_kind["folder"] for rows in by_kind.values())


def test_catalog_in_a_file_reads_the_same_images(same: Path, tmp_path: Path) -> None:
    for kind in ("tars", "parquet", "folder"):
        catalog = sources.labelled_catalog(same / kind)
        file = tmp_path / f"{kind}.arrow"
        catalog_file.write_catalog(file, catalog.columns())
        read = Catalog(**catalog_file.read_catalog(file, range(3, 9)))
        assert (read.paths, read.containers) == (catalog.paths[3:9], catalog.containers[3:9])
        assert [read.read_file(row, 2**20) for row in range(6)] == [
            catalog.read_file(row, 2**20) for row in range(3, 9)
        ]


@pytest.mark.slow
def test_shards_are_scored_evaluated_searched_and_relabelled_like_files(
    same: Path,
    tmp_path: Path,
    command: Command,
    add_mlflow_db: AddMlflowDb,
    make_bundle: MakeBundle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import pyarrow.parquet as pq

    monkeypatch.chdir(add_mlflow_db(tmp_path))
    bundle = make_bundle()
    scores, metrics = {}, {}
    for kind in ("folder", "tars", "parquet"):
        result = command("score", bundle, same / kind, tmp_path / f"score-{kind}", code=3)
        assert result["counts"]["scored"] == 29
        table = pq.read_table(tmp_path / f"score-{kind}" / "parts")
        rows = table.drop_columns(["path"]).sort_by("image_id").to_pylist()
        scores[kind] = [row | {"fault": bool(row["fault"])} for row in rows]
        out = tmp_path / f"evaluate-{kind}"
        metrics[kind] = command("evaluate", bundle, same / kind, out, code=3)["metrics"]
    assert scores["tars"] == scores["parquet"] == scores["folder"]
    for kind in ("tars", "parquet"):
        assert metrics[kind]["accuracy"] == metrics["folder"]["accuracy"]
        assert metrics[kind]["loss"] == pytest.approx(metrics["folder"]["loss"])  # another order
    for kind, first in (("tars", "train-0.tar/0000.jpg"), ("parquet", "train-0.parquet/00-")):
        store = tmp_path / f"store-{kind}"
        command("precompute", same / kind, store, *FLAGS, code=3)
        path = next(one for one in Store(store).read_catalog()["paths"] if one.startswith(first))
        page = tmp_path / f"{kind}.html"
        found = command("search", store, path, "--out", page)
        assert found["queries"][0]["fault"] is None
        assert page.read_text().count("data:image/webp") >= 5  # read from the shards
        fixes = tmp_path / f"fixes-{kind}.csv"
        fixes.write_text(f"path,new_label\n{path},beads\n")
        assert command("relabel", store, fixes)["labels"] == 1
        (tmp_path / "drop.txt").write_text(f"{path}\n")
        kept = command(
            "precompute", same / kind, store, *FLAGS, "--drop", tmp_path / "drop.txt", code=3
        )
        assert (kept["counts"]["features"], kept["counts"]["decoded"]) == (28, 0)
    # Other shards of the same images: nothing is decoded again.
    shutil.copytree(same / "tars", tmp_path / "moved")
    again = command("precompute", tmp_path / "moved", tmp_path / "store-tars", *FLAGS, code=3)
    assert again["counts"]["decoded"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tars", "parquet"])
def test_killed_extraction_of_shards_continues_and_two_workers_write_the_same_bytes(
    folder_of_192: Path, tmp_path: Path, kind: str
) -> None:
    images = [("train", file.parent.name, file) for file in sorted(folder_of_192.rglob("*.jpg"))]
    (tmp_path / "folder").symlink_to(folder_of_192)
    write_sources(
        tmp_path,
        [
            (split, label, tmp_path / "folder" / file.relative_to(folder_of_192))
            for split, label, file in images
        ],
        shards=3,
    )
    data = tmp_path / kind
    (whole,) = test_kills.finish(test_kills.start(tmp_path, data, "whole", workers=0))
    assert whole["counts"]["decoded"] == len(images)
    killed = test_kills.start(tmp_path, data, "killed", workers=0)
    shards = tmp_path / "killed" / "shards"
    while killed.poll() is None and len(list(shards.glob("*.arrow"))) < 3:
        time.sleep(0.02)
    killed.kill()
    killed.communicate()
    done = len(list(shards.glob("*.arrow")))
    (resumed,) = test_kills.finish(test_kills.start(tmp_path, data, "killed", workers=0))
    assert 0 < resumed["counts"]["skipped"] < len(images) and done >= 3
    (two,) = test_kills.finish(test_kills.start(tmp_path, data, "two", workers=2))
    assert two["counts"]["decoded"] == len(images)
    expected = test_kills.files(tmp_path / "whole")
    assert test_kills.files(tmp_path / "killed") == expected
    assert test_kills.files(tmp_path / "two") == expected
