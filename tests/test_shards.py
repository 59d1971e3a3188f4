"""Shards are complete or absent, are plain Arrow, are verified, and are never mixed."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from arrowhead import ConfigError, DataError, fileio
from arrowhead.features import shard_file
from arrowhead.features.recipe import Recipe
from arrowhead.features.shard_file import ShardRows
from arrowhead.features.store import Store
from arrowhead.inference import scores_io
from arrowhead.inference.scores_io import Scores

RECIPE = Recipe(
    body="resnet18",
    weights="0" * 64,
    pool="avg",
    width=4,
    size=64,
    resize="crop",
    mean=(0.1, 0.2, 0.3),
    std=(0.4, 0.5, 0.6),
    views=2,
    augment="side-on",
)


def _rows(first: int = 0, files: int = 3) -> ShardRows:
    """Rows whose features encode file, view and column; the second file is a fault."""
    number = np.arange(first, first + files)[:, None, None]
    features = (100 * number + 10 * np.arange(2)[:, None] + np.arange(4)).astype(np.float16)
    features[1] = 0
    return ShardRows(
        paths=[f"train/a/{first + i}.jpg" for i in range(files)],
        image_ids=[bytes([first + i]) * 16 for i in range(files)],
        features=features,
        faults=[None, "truncated: cut", *[None] * (files - 2)],
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two shards of three files; in the catalog, files 0, 1 and 3 are training images."""
    result = Store.create(tmp_path / "store", RECIPE, 3)
    for name, first in (("one", 0), ("two", 3)):
        result.write_shard(name, _rows(first))
    columns = {
        "root": r"/data/bl\xf6d",
        "paths": [f"train/a/{i}.jpg" for i in range(6)],
        "sizes": np.arange(6) - 1,
        "stamps": np.arange(6) + 2**60,
        "labels": [("a",), ("a",), ("b",), ("b",), ("b",), ("a",)],
        "splits": ["train", "train", "valid", "train", "test", "valid"],
        "tries": np.zeros(6, np.uint8),
        "ignored": 7,
    }
    result.commit(["one", "two"], columns, {})
    return result


# ------------------------------------------------------------------------- complete files


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk_leaves_no_incomplete_shard_and_the_refusal_gives_advice(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa

    path = tmp_path / "shards" / "one.arrow"

    def torn(self: object, table: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as broken:
        broken.setattr(pa.RecordBatchFileWriter, "write_table", torn)
        with pytest.raises(ConfigError, match="cannot be written") as error_info:
            shard_file.write_shard(path, _rows(), RECIPE)
    assert str(path) in error_info.value.found
    assert "run the same command again" in error_info.value.do
    assert list(path.parent.iterdir()) == []
    shard_file.write_shard(path, _rows(), RECIPE)
    assert list(path.parent.iterdir()) == [path]


def test_failed_write_leaves_the_old_file_unchanged(tmp_path: Path) -> None:
    fileio.write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(TypeError):
        fileio.write_json(tmp_path / "a.json", {"new": object()})
    with pytest.raises(KeyboardInterrupt), fileio.atomic_write(tmp_path / "a.json") as draft_file:
        draft_file.write_text('{"new"')
        raise KeyboardInterrupt
    assert fileio.read_json(tmp_path / "a.json") == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_killed_writer_leaves_no_file_that_is_read_as_a_shard(tmp_path: Path) -> None:
    result = Store.create(tmp_path / "store", RECIPE, 3)
    code = (
        "import os, signal, sys; from pathlib import Path; from arrowhead import fileio\n"
        "with fileio.atomic_write(Path(sys.argv[1])) as sketch:\n"
        "    sketch.write_bytes(b'ARROW1 half a shard')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    completed = subprocess.run([sys.executable, "-c", code, result.shard_path("one")], check=False)
    assert completed.returncode == -signal.SIGKILL
    assert result.shard_names() == []
    shard_file.write_shard(result.shard_path("one"), _rows(), RECIPE)
    assert result.shard_names() == ["one"]


def test_truncated_shard_is_a_data_error(tmp_path: Path) -> None:
    path = tmp_path / "one.arrow"
    shard_file.write_shard(path, _rows(), RECIPE)
    full = path.read_bytes()
    for length in [0, 1, 7, 8, *range(50, len(full), 97), len(full) - 1]:
        path.write_bytes(full[:length])
        with pytest.raises(DataError) as error_info:
            shard_file.read_shard(path, RECIPE)
        assert str(path) in error_info.value.found


def test_missing_truncated_or_binary_json_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "torn.json").write_text('{"a": 1')
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    for name in ("missing.json", "torn.json", "bytes.json"):
        with pytest.raises(DataError, match=name):
            fileio.read_json(tmp_path / name)


# ------------------------------------------------------------------------------ shards


def test_shard_rows_round_trip(tmp_path: Path) -> None:
    path, rows = tmp_path / "one.arrow", _rows()
    shard_file.write_shard(path, rows, RECIPE)
    back = shard_file.read_shard(path, RECIPE)
    assert back.features.dtype == np.float16
    np.testing.assert_array_equal(back.features, rows.features)
    assert (list(back.paths), list(back.image_ids)) == (rows.paths, rows.image_ids)
    assert list(back.faults) == rows.faults


def test_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        shard_file.write_shard(tmp_path / name, _rows(), RECIPE)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


READERS = {
    "pyarrow": """
import pyarrow as pa
table = pa.ipc.open_file(pa.memory_map(PATH)).read_all()
columns, features = table.schema.names, table["feature"].to_pylist()
faults = table["fault"].to_pylist()
""",
    "pandas": """
import pandas
table = pandas.read_feather(PATH)
columns, features = list(table), list(table["feature"])
faults = [fault if isinstance(fault, str) else None for fault in table["fault"]]
""",
    "polars": """
import polars
table = polars.read_ipc(PATH)
columns, features, faults = table.columns, table["feature"].to_list(), table["fault"].to_list()
""",
    "datasets": """
import datasets
table = datasets.load_dataset("arrow", data_files=PATH, split="train")
columns, features, faults = table.column_names, table["feature"], table["fault"]
""",
    "duckdb": """
import duckdb, pyarrow as pa
shard = pa.ipc.open_file(pa.memory_map(PATH)).read_all()
wide = pa.list_(pa.float32(), shard.schema.field("feature").type.list_size)
shard = shard.set_column(3, "feature", shard["feature"].cast(wide))
rows = duckdb.sql("select path, image_id, view, feature, fault from shard").fetchall()
columns, features, faults = shard.schema.names, [row[3] for row in rows], [row[4] for row in rows]
""",
}


@pytest.mark.parametrize("program", READERS)
def test_other_programs_read_a_shard_without_arrowhead(program: str, tmp_path: Path) -> None:
    path = tmp_path / "one.arrow"
    shard_file.write_shard(path, _rows(), RECIPE)
    code = f"""
import sys
PATH = sys.argv[1]
{READERS[program]}
assert list(columns) == ["path", "image_id", "view", "feature", "fault"], columns
features = list(features)
assert len(features) == 6
assert list(features[5]) == [210, 211, 212, 213], features
assert features[2] is None, features[2]
assert list(faults) == [None, None, "truncated: cut", "truncated: cut", None, None], faults
assert "arrowhead" not in sys.modules
"""
    home = {"HOME": str(tmp_path), "HF_HOME": str(tmp_path), "HF_DATASETS_OFFLINE": "1"}
    completed = subprocess.run(
        [sys.executable, "-c", code, path], env=os.environ | home, capture_output=True, text=True
    )
    assert completed.returncode == 0, completed.stderr


# ------------------------------------------------------------------------------- store


def test_features_are_the_readable_rows_of_a_split_with_their_catalog_indices(store: Store) -> None:
    train, valid, test = (store.features(split) for split in ("train", "valid", "test"))
    assert (train.row.tolist(), train.label.tolist()) == ([0, 3], [0, 1])
    assert (valid.row.tolist(), valid.label.tolist()) == ([2, 5], [1, 0])
    assert (test.row.tolist(), test.label.tolist()) == ([], [])
    assert train.feature.shape == (2, 2, 4)
    assert valid.feature[:, :, 0].tolist() == [[200, 210], [500, 510]]


def test_catalog_round_trips(store: Store) -> None:
    columns = store.read_catalog()
    assert columns["root"] == r"/data/bl\xf6d"
    assert columns["ignored"] == 7
    assert columns["sizes"].tolist() == [-1, 0, 1, 2, 3, 4]
    assert columns["stamps"].tolist() == [2**60 + i for i in range(6)]
    assert columns["labels"][2:] == [("b",), ("b",), ("b",), ("a",)]
    assert columns["splits"] == ["train", "train", "valid", "train", "test", "valid"]


def test_manifest_counts_files_and_faults(store: Store) -> None:
    entries = store.manifest()["shards"]
    assert [(e["name"], e["files"], e["faults"]) for e in entries] == [("one", 3, 1), ("two", 3, 1)]


def _flip_bit(path: Path, bit: int) -> bytes:
    full = bytearray(path.read_bytes())
    full[bit // 8] ^= 1 << bit % 8
    return bytes(full)


def test_flipped_metadata_bit_is_detected_before_training(store: Store) -> None:
    """Flip every single bit of the manifest and of store.json."""
    for path in (store.path / "manifest.json", store.path / "store.json"):
        full = path.read_bytes()
        for bit in range(8 * len(full)):
            path.write_bytes(_flip_bit(path, bit))
            with pytest.raises(DataError) as error_info:
                Store(store.path).verify()
            assert path.name in error_info.value.found
            path.write_bytes(full)
    Store(store.path).verify()


def test_flipped_shard_or_catalog_bit_is_detected_before_training(store: Store) -> None:
    """Flip one bit of every byte."""
    catalog = store.path / store.manifest()["catalog"]["name"]
    for path in (store.shard_path("two"), catalog):
        full = path.read_bytes()
        for byte in range(len(full)):
            path.write_bytes(_flip_bit(path, 8 * byte + byte % 8))
            with pytest.raises(DataError, match=path.name):
                store.verify()
            path.write_bytes(full)
    store.verify()


def test_shard_without_manifest_entry_verifies_its_own_content(store: Store) -> None:
    """A resumed run reuses shards of a killed run, but not one with a changed feature."""
    path = store.shard_path("one")
    full = path.read_bytes()
    feature = np.arange(4, dtype=np.float16).tobytes()  # of file 0, view 0
    at = full.index(feature)
    path.write_bytes(full[:at] + b"\1" + full[at + 1 :])
    (store.path / "manifest.json").unlink()
    (store.path / "digests" / "one").unlink()  # as older versions wrote it
    with pytest.raises(DataError, match=r"one\.arrow has changed"):  # nothing else verifies it
        Store(store.path).read_shard("one")
    path.write_bytes(full)
    shutil.rmtree(store.path / "digests")
    np.testing.assert_array_equal(Store(store.path).read_shard("one").features, _rows(0).features)
    store.shard_path("two").write_bytes(store.shard_path("two").read_bytes()[:-100])
    with pytest.raises(DataError, match=r"two\.arrow has changed"):
        Store(store.path).check_unlisted_shards()
    store.shard_path("two").unlink()
    Store(store.path).check_unlisted_shards()
    path.write_bytes(full[:at] + b"\1" + full[at + 1 :])
    with pytest.raises(DataError, match=r"one\.arrow differs from .*digests.one"):
        Store(store.path).read_shard("one")


def test_second_writer_is_refused_while_the_first_works(store: Store) -> None:
    with (
        store.lock(),
        pytest.raises(ConfigError, match="being written"),
        Store(store.path).lock(),
    ):
        pass
    with store.lock():  # the lock was released
        pass


def test_missing_shard_is_detected_before_training(store: Store) -> None:
    store.shard_path("one").unlink()
    with pytest.raises(DataError, match=r"one\.arrow is missing"):
        store.verify()


def test_unfinished_store_is_reported_as_unfinished(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="never finished"):
        Store.create(tmp_path / "store", RECIPE, 3).manifest()


def test_different_recipe_is_refused_with_the_first_differing_field(store: Store) -> None:
    for changes, field in (
        ({"size": 224}, "size"),
        ({"mean": (0.0, 0.0, 0.0), "augment_seed": 5}, "mean"),
        ({"weights": "1" * 64, "pool": "max"}, "weights"),
    ):
        other = dataclasses.replace(RECIPE, **changes)
        with pytest.raises(ConfigError) as error_info:
            Store.create(store.path, other, 3)
        assert f"made with {field} =" in error_info.value.found
        with pytest.raises(ConfigError, match=f"made with {field} ="):
            shard_file.read_shard(store.shard_path("one"), other)


def test_every_recipe_field_changes_the_fingerprint() -> None:
    fingerprints = {RECIPE.fingerprint}
    for field in dataclasses.fields(Recipe):
        value = getattr(RECIPE, field.name)
        other = (9.0, 9.0, 9.0) if isinstance(value, tuple) else f"{value}1"
        fingerprints.add(dataclasses.replace(RECIPE, **{field.name: other}).fingerprint)
    assert len(fingerprints) == len(dataclasses.fields(Recipe)) + 1


def test_store_reopens_with_its_own_recipe(store: Store) -> None:
    assert Store.create(store.path, RECIPE, 3).recipe == RECIPE
    assert Store(store.path).recipe == RECIPE


def test_folder_with_other_contents_is_left_unchanged(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError):
        Store.create(tmp_path, RECIPE, 3)
    assert os.listdir(tmp_path) == ["thesis.txt"]
    with pytest.raises(ConfigError):
        Store(tmp_path)


def test_store_of_an_unknown_format_is_refused(store: Store) -> None:
    head = fileio.read_json(store.path / "store.json")
    head["format"] = 99
    fileio.write_json(store.path / "store.json", head)
    with pytest.raises(DataError, match="format 99"):
        Store(store.path)


def test_invalid_parquet_file_is_a_data_error(tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    scores = Scores(
        classes=["cat", "dog"],
        paths=["a", "b"],
        image_ids=[bytes(16)] * 2,
        faults=[None, "empty: the file has no bytes"],
        top_index=np.array([[1, 0], [0, 1]]),
        probability=np.array([[0.25, 0.75], [0.5, 0.5]], np.float32),
    )
    scores_io.write_scores(path, scores, {"made": "here"})
    assert scores_io.read_columns(path, ["path", "label", "top_k"]) == {
        "path": ["a", "b"],
        "label": ["dog", None],
        "top_k": [
            [{"label": "dog", "probability": 0.75}, {"label": "cat", "probability": 0.25}],
            None,
        ],
    }
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(DataError, match=r"scores\.parquet"):
        scores_io.read_columns(path, ["path"])
