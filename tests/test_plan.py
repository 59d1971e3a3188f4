"""Catalogs and chunks: names survive, rows are covered once, chunks and splits are stable."""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arrowhead import ConfigError
from arrowhead.data import chunks, path_text, sources
from arrowhead.data import splits as data_splits
from arrowhead.data.catalog import Catalog
from arrowhead.data.source_config import SourceConfig

NAMES = st.binary(min_size=1, max_size=40).filter(lambda name: not set(name) & {0, ord("/")})


def _write_files(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def _random_paths(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return sorted(f"train/c{rng.randrange(3)}/{rng.randrange(10**9)}.jpg" for _ in range(count))


def _rows_of(paths: list[str], size: int) -> set[tuple[str, ...]]:
    return {tuple(paths[row] for row in rows) for rows in chunks.split_into_chunks(paths, size)}


# ----------------------------------------------------------------------------- listing


def test_train_and_valid_folders_define_splits_and_labels(tmp_path: Path) -> None:
    _write_files(
        tmp_path, "train/cat/1.jpg", "train/dog/deep/2.jpg", "valid/cat/3.jpg", "test/dog/4.jpg"
    )
    catalog = sources.labelled_catalog(tmp_path)
    rows = zip(catalog.paths, catalog.labels, catalog.splits, strict=True)
    assert list(rows) == [
        ("test/dog/4.jpg", ("dog",), "test"),
        ("train/cat/1.jpg", ("cat",), "train"),
        ("train/dog/deep/2.jpg", ("dog",), "train"),
        ("valid/cat/3.jpg", ("cat",), "valid"),
    ]
    assert catalog.classes == ["cat", "dog"]
    assert catalog.sizes.tolist() == [len(path) for path in catalog.paths]


def test_class_folders_alone_leave_the_split_undefined(tmp_path: Path) -> None:
    catalog = sources.labelled_catalog(_write_files(tmp_path, "cat/1.jpg", "dog/2.jpg"))
    assert catalog.labels == [("cat",), ("dog",)]
    assert catalog.splits == ["", ""]


@pytest.mark.parametrize(
    ("train", "valid", "test"),
    [
        ("train", "val", "test"),
        ("Training", "Validation", "Testing"),
        ("TRAIN", "VALID", "TEST"),
        ("train_set", "val_set", "test_set"),
        ("training-images", "dev", "test images"),
        ("train2017", "val2017", "test2017"),
    ],
)
def test_common_split_names_are_recognized(
    tmp_path: Path, train: str, valid: str, test: str
) -> None:
    names = [f"{part}/{label}/1.jpg" for part in (train, valid, test) for label in ("a", "b")]
    catalog = sources.labelled_catalog(_write_files(tmp_path, *names, "other/c/1.jpg"))
    splits = dict(zip((path.split("/")[0] for path in catalog.paths), catalog.splits, strict=True))
    assert splits == {train: "train", valid: "valid", test: "test"}
    assert (catalog.classes, catalog.ignored) == (["a", "b"], 1)
    output = f"splits: {train}/ trains (2 files), {valid}/ validates (2 files), {test}/ tests"
    assert catalog.notes[0].startswith(output)
    assert "other/" in " ".join(catalog.notes)


@pytest.mark.parametrize(
    ("train", "valid"),
    [
        ("seg_train", "seg_val"),
        ("1-train", "2-valid"),
        ("train1", "val1"),
        ("pets Train", "Dev pets"),
    ],
)
def test_folders_with_split_like_names_are_splits_if_they_hold_the_same_classes(
    tmp_path: Path, train: str, valid: str
) -> None:
    names = [f"{part}/{label}/1.jpg" for part in (train, valid) for label in ("a", "b")]
    catalog = sources.labelled_catalog(_write_files(tmp_path / "alike", *names, "seg_pred/3.jpg"))
    assert catalog.classes == ["a", "b"]
    assert sorted(catalog.splits) == ["train", "train", "valid", "valid"]
    catalog = sources.labelled_catalog(
        _write_files(tmp_path / "not", f"{train}/a/1", f"{train}/b/1", f"{valid}/c/1")
    )
    assert catalog.classes == sorted([train, valid])


@pytest.mark.parametrize(
    ("upper", "lower", "words"),
    [
        (("tr", "va"), ("cat", "dog"), "tr/, va/ are read as classes, though each holds cat/"),
        (("cat", "dog"), ("train", "val"), "train/, val/ in each of them are not used as splits"),
    ],
)
def test_split_like_folders_read_as_classes_are_reported(
    tmp_path: Path, upper: tuple[str, ...], lower: tuple[str, ...], words: str
) -> None:
    names = [f"{top}/{name}/1.jpg" for top in upper for name in lower]
    catalog = sources.labelled_catalog(_write_files(tmp_path, *names))
    assert catalog.classes == list(upper)
    assert words in " ".join(catalog.notes)


@pytest.mark.parametrize(
    "test", [(), ("test_set/a/3", "test_set/b/3"), ("test_set/3", "test_set/4")]
)
def test_missing_validation_folder_is_replaced_by_a_reported_share_of_train(
    tmp_path: Path, test: tuple[str, ...]
) -> None:
    catalog = sources.labelled_catalog(
        _write_files(tmp_path, "train_set/a/1", "train_set/b/2", *test)
    )
    sides = ["test"] * 2 if "test_set/a/3" in test else []
    assert catalog.splits == [*sides, "", ""]
    assert catalog.classes == ["a", "b"]
    assert "a share of train_set/ is held out" in " ".join(catalog.notes)
    assert catalog.ignored == (2 if "test_set/3" in test else 0)  # test images without labels


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (("train/1.jpg", "plane/2.jpg", "bus/3.jpg"), ["bus", "plane", "train"]),
        (("valid/1.jpg", "invalid/2.jpg"), ["invalid", "valid"]),
        (("cat/1.jpg", "dog/1.jpg", "test/1.jpg"), ["cat", "dog", "test"]),
    ],
)
def test_class_named_like_a_split_stays_a_class_and_is_reported(
    tmp_path: Path, names: tuple[str, ...], classes: list[str]
) -> None:
    catalog = sources.labelled_catalog(_write_files(tmp_path, *names))
    assert catalog.classes == classes
    assert "is read as a class" in catalog.notes[0]


def test_refusal_of_the_parent_folder_names_the_right_folder(tmp_path: Path) -> None:
    _write_files(tmp_path, "photos/cat/1.jpg", "photos/dog/2.jpg")
    with pytest.raises(ConfigError) as error_info:
        sources.labelled_catalog(tmp_path)
    assert f"{tmp_path}/photos, which holds cat, dog" in error_info.value.do


def test_hidden_system_and_unlabelled_files_are_skipped_and_counted(tmp_path: Path) -> None:
    _write_files(tmp_path, "cat/1.jpg", "dog/2.jpg", "loose.jpg", ".DS_Store")
    _write_files(
        tmp_path, "cat/Thumbs.db", "cat/.hidden", ".ipynb_checkpoints/1.jpg", "__MACOSX/dog/._2"
    )
    _write_files(tmp_path, ".git/config", ".git/objects/ab", ".git/objects/cd")
    catalog = sources.labelled_catalog(tmp_path)
    assert catalog.paths == ["cat/1.jpg", "dog/2.jpg"]
    assert catalog.classes == ["cat", "dog"]
    assert catalog.ignored == 9  # every file, also those in hidden folders


def test_listing_of_linked_folders_does_not_depend_on_directory_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_files(tmp_path, "a/1.jpg", "a/2.jpg")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    listdir, result = os.listdir, []
    for reverse in (False, True):

        def names(folder: bytes, reverse: bool = reverse) -> list[bytes]:
            return sorted(listdir(folder), reverse=reverse)

        monkeypatch.setattr(os, "listdir", names)
        result.append(sources.unlabelled_catalog(tmp_path).paths)
    assert result[0] == result[1] == ["a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg"]


def test_empty_class_folder_is_reported_and_changes_no_label(tmp_path: Path) -> None:
    _write_files(
        tmp_path, "train/cat/1.jpg", "train/dog/deep/2.jpg", "valid/cat/3.jpg", "valid/dog/4.jpg"
    )
    before = sources.labelled_catalog(tmp_path)
    _write_files(tmp_path, "train/ant/.hidden")
    (tmp_path / "train/cow/deep").mkdir(parents=True)
    (tmp_path / "valid/cow").mkdir()
    (tmp_path / "other").mkdir()
    after = sources.labelled_catalog(tmp_path)
    assert after.empty_folders == ("train/ant", "train/cow", "valid/cow")
    assert (after.classes, after.labels) == (before.classes, before.labels)
    assert after.digest() == before.digest()
    flat = sources.labelled_catalog(_write_files(tmp_path / "flat", "a/1", "b/2", "c/.3"))
    assert flat.empty_folders == ("c",)


@pytest.mark.parametrize(
    "names", [("Cat", "cat"), ("caf\u00e9", "cafe\u0301"), ("Stra\u00dfe", "STRASSE")]
)
@pytest.mark.parametrize(
    "places", [("{}", "{}"), ("train/{}", "train/{}"), ("train/{}", "valid/{}")]
)
def test_classes_that_differ_only_in_case_or_unicode_form_are_refused_with_both_paths(
    tmp_path: Path, names: tuple[str, str], places: tuple[str, str]
) -> None:
    folders = [place.format(name) for place, name in zip(places, names, strict=True)]
    if "train" in places[0]:
        _write_files(tmp_path, "valid/dog/1.jpg", "train/dog/1.jpg")
    _write_files(tmp_path, *(f"{folder}/1.jpg" for folder in folders), "dog/1.jpg")
    with pytest.raises(ConfigError) as error_info:
        sources.labelled_catalog(tmp_path)
    for output in (*map(ascii, names), *folders):
        assert output in error_info.value.found
    assert error_info.value.do


@pytest.mark.parametrize(
    ("names", "word"),
    [
        ((), "no images"),
        (("cat/1.jpg",), "one class"),
        (("a.jpg", "b.jpg", "c.jpg"), "3 images without a class folder"),
        (("train/a.jpg", "valid/b.jpg"), "train/, valid/ and 2 images without a class folder"),
        (("train/a.jpg", "val/cat/b.jpg"), "1 image without a class folder"),
        (("train/cat/1", "train/dog/1", "val/1.jpg"), "val/ with 1 image and no class folder"),
        (("train/cat/1", "train/dog/1", "new/1.jpg"), "a split or a class"),
        (("cat/1.txt", "dog/notes.md"), "no images (2 other files)"),
        (("train/cat/1.jpg", "valid/cat/1.jpg", "valid/emu/1.jpg"), "emu"),
        (("train/cat/1.jpg", "train/emu/.no", "valid/cat/1.jpg", "valid/emu/1.jpg"), "emu"),
        (("train/cat/1.jpg", "train/dog/1.jpg", "valid/.no", "valid/cat/.no"), "valid"),
        (("Train/cat/1", "train/dog/1", "Valid/cat/1.jpg"), "Train/ and train/"),
        (("train/cat/1", "train/dog/1", "val/cat/1", "valid/cat/1"), "val/ and valid/"),
        (("valid/cat/1.jpg", "test/cat/1.jpg"), "no train/"),
        (("train/cat/1", "train/dog/1", "valid/cat/1", "Valid/cat/1"), "Valid/ and valid/"),
    ],
)
def test_folders_unusable_for_training_are_refused_with_advice(
    tmp_path: Path, names: tuple[str, ...], word: str
) -> None:
    with pytest.raises(ConfigError) as error_info:
        sources.labelled_catalog(_write_files(tmp_path, *names))
    assert word in error_info.value.found
    assert error_info.value.wanted
    assert error_info.value.do


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_validation_share_that_empties_a_split_is_refused(share: float) -> None:
    with pytest.raises(ConfigError) as error_info:
        SourceConfig(valid_share=share)
    assert all((error_info.value.found, error_info.value.wanted, error_info.value.do))


def test_catalog_digest_does_not_depend_on_its_location(tmp_path: Path) -> None:
    here = _write_files(tmp_path / "here", "cat/1.jpg", "dog/2.jpg")
    there = tmp_path / "there"
    shutil.copytree(here, there)
    assert sources.labelled_catalog(here).digest() == sources.labelled_catalog(there).digest()
    (there / "cat/1.jpg").write_bytes(b"longer than it was")
    assert sources.labelled_catalog(here).digest() != sources.labelled_catalog(there).digest()


# -------------------------------------------------------------------------- arithmetic


@given(st.lists(NAMES.map(path_text.escape_path), max_size=300), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_each_row_is_in_exactly_one_chunk(paths: list[str], size: int) -> None:
    runs = chunks.split_into_chunks(paths, size)
    assert [row for rows in runs for row in rows] == list(range(len(paths)))
    assert all(2 * len(rows) >= size for rows in runs[:-1])


def test_chunks_have_the_requested_length_on_average() -> None:
    runs = chunks.split_into_chunks(_random_paths(20_000, 0), 64)
    assert 0.75 * 64 < 20_000 / len(runs) < 1.5 * 64
    assert max(map(len, runs)) <= 4 * 64


def test_adding_one_file_changes_at_most_three_chunks() -> None:
    for seed in range(100):
        paths = _random_paths(640, seed)
        added = f"train/c1/{seed}-new.jpg"
        removed = _rows_of(paths, 16) - _rows_of(sorted([*paths, added]), 16)
        assert len(removed) <= 3, f"seed {seed}: one new file changed {len(removed)} chunks"


def test_shard_name_changes_with_content_timestamp_and_recipe(
    tmp_path: Path,
) -> None:
    _write_files(tmp_path, "a/1.jpg", "a/2.jpg")
    before = sources.unlabelled_catalog(tmp_path)
    name = chunks.shard_name(before, range(2), "recipe")
    assert chunks.shard_name(sources.unlabelled_catalog(tmp_path), range(2), "recipe") == name
    assert chunks.shard_name(before, range(2), "other") != name
    assert chunks.shard_name(before, range(1), "recipe") != name
    os.utime(tmp_path / "a/2.jpg", ns=(1, 1))
    assert chunks.shard_name(sources.unlabelled_catalog(tmp_path), range(2), "recipe") != name


def test_retries_rename_only_the_shards_that_contain_them(tmp_path: Path) -> None:
    before = sources.unlabelled_catalog(_write_files(tmp_path, "a/1.jpg", "a/2.jpg"))
    assert before.tries.tolist() == [0, 0]
    after = replace(before, tries=np.array([0, 1], np.uint8))
    names = [
        [chunks.shard_name(each, range(row, row + 1), "r") for row in (0, 1)]
        for each in (before, after)
    ]
    assert names[0][0] == names[1][0]
    assert names[0][1] != names[1][1]
    assert after.digest() == before.digest()


def test_shard_names_equal_those_of_earlier_versions() -> None:
    catalog = Catalog(
        root="/",
        paths=["a", "b\\\\c"],
        sizes=np.array([1, -1]),
        stamps=np.array([5, 0]),
        labels=[("x",), ("y",)],
        splits=["train", ""],
    )
    assert chunks.shard_name(catalog, range(2), "recipe") == "0b377998edba97ea4ee04c00"
    assert catalog.digest() == "90e06a84e21bcee5091b25880e16b069"


def test_catalog_round_trips_through_columns(tmp_path: Path) -> None:
    catalog = sources.labelled_catalog(_write_files(tmp_path, "cat/1.jpg", "dog/2.jpg"))
    assert "empty" not in catalog.columns()
    again = Catalog(**catalog.columns())
    assert again.digest() == catalog.digest()
    assert again.read_file(1, 99) == (b"dog/2.jpg", None)


def test_file_changed_since_listing_is_a_fault(tmp_path: Path) -> None:
    catalog = sources.unlabelled_catalog(_write_files(tmp_path, "1.jpg", "2.jpg"))
    (tmp_path / "2.jpg").write_bytes(b"other")
    assert catalog.read_file(0, 99) == (b"1.jpg", None)
    os.utime(tmp_path / "2.jpg", ns=(0, 0))
    assert catalog.read_file(1, 99) == (b"", "changed: it was written again after it was listed")


def _class_folder_catalog(root: Path, **counts: int) -> Catalog:
    """A catalog of class folders with the given numbers of files."""
    return sources.labelled_catalog(
        _write_files(root, *(f"{c}/{n:05}.jpg" for c in counts for n in range(counts[c])))
    )


def _random_ids(count: int, seed: int = 0) -> list[bytes]:
    rng = np.random.default_rng(seed)
    return [rng.bytes(16) for _ in range(count)]


def test_one_fifth_of_each_class_validates_and_at_least_one_image_trains(tmp_path: Path) -> None:
    counts = {"many": 250, "some": 48, "ten": 10, "three": 3, "two": 2, "single": 1}
    catalog = _class_folder_catalog(tmp_path, **counts)
    for seed in range(5):
        result = data_splits.draw_splits(catalog, _random_ids(len(catalog), seed), 0.2)
        pairs = list(zip(result.labels, result.splits, strict=True))
        held = {name: pairs.count(((name,), "valid")) for name in counts}
        assert held == {"many": 50, "some": 10, "ten": 2, "three": 1, "two": 1, "single": 0}
        assert set(result.splits) == {"train", "valid"}


def test_copies_of_an_image_stay_in_one_split_even_beside_given_splits(tmp_path: Path) -> None:
    catalog = _class_folder_catalog(tmp_path, cat=100, dog=100)
    ids = _random_ids(100) * 2  # every dog is a copy of a cat
    splits = data_splits.draw_splits(catalog, ids, 0.2).splits
    assert splits[:100] == splits[100:]
    assert splits.count("valid") == 40
    for part in ("valid", "train", "test"):
        given_splits = replace(catalog, splits=[part] * 100 + [""] * 100)
        assert data_splits.draw_splits(given_splits, ids, 0.2).splits == [part] * 200
    copies = data_splits.draw_splits(
        catalog, [*_random_ids(1) * 99, _random_ids(1, 1)[0], *_random_ids(100, 2)], 0.2
    ).splits
    assert copies[:99] == ["train"] * 99  # 99 of 100 images would not be a fifth
    assert copies[99] == "valid"


def test_adding_a_few_images_moves_few_others_between_splits(tmp_path: Path) -> None:
    catalog = _class_folder_catalog(tmp_path, cat=1000, dog=1000)
    ids = _random_ids(2000)
    before = data_splits.draw_splits(catalog, ids, 0.2).splits
    _write_files(tmp_path, *(f"cat/new{n}.jpg" for n in range(10)))
    after = data_splits.draw_splits(
        sources.labelled_catalog(tmp_path), [*ids[:1000], *_random_ids(10, 1), *ids[1000:]], 0.2
    )
    kept = after.splits[:1000] + after.splits[1010:]
    assert sum(a != b for a, b in zip(before, kept, strict=True)) <= 10


def test_unreadable_images_do_not_count_in_a_split(tmp_path: Path) -> None:
    catalog = _class_folder_catalog(tmp_path, cat=10, dog=3)
    ids = [
        *_random_ids(10),
        _random_ids(1, 1)[0],
        bytes(16),
        bytes(16),
    ]  # unread images have equal (empty) ids
    faulty = [False] * 11 + [True] * 2
    splits = data_splits.draw_splits(catalog, ids, 0.2, faulty).splits
    assert splits[:10].count("valid") == 2
    assert splits[10:] == ["train"] * 3


@given(
    st.lists(st.sets(st.sampled_from("abcdef"), min_size=1), min_size=2, max_size=60),
    st.integers(0, 2**32 - 1),
    st.floats(0.05, 0.6),
)
@settings(max_examples=200, deadline=None)
def test_every_label_occurs_in_training_for_multi_label_images(
    labels: list[set[str]], seed: int, share: float
) -> None:
    count = len(labels)
    catalog = Catalog(
        root="/",
        paths=[f"{n:03}" for n in range(count)],
        sizes=np.ones(count, np.int64),
        stamps=np.ones(count, np.int64),
        labels=[tuple(sorted(names)) for names in labels],
        splits=[""] * count,
    )
    ids = _random_ids(count, seed)
    splits = data_splits.draw_splits(catalog, ids, share)
    parts = list(zip(splits.labels, splits.splits, strict=True))
    train_labels = {name for names, split in parts if split == "train" for name in names}
    assert train_labels == {name for names in labels for name in names}
    assert data_splits.draw_splits(catalog, ids, share).splits == splits.splits


def test_larger_share_only_adds_to_the_validation_split_and_keeps_given_splits(
    tmp_path: Path,
) -> None:
    _write_files(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg", "valid/cat/3.jpg")
    given_splits = sources.labelled_catalog(tmp_path)
    zeros = [bytes(16)] * 3  # would fall into the validation split at any share
    assert data_splits.draw_splits(given_splits, zeros, 0.9).splits == given_splits.splits
    shutil.rmtree(tmp_path / "valid")
    catalog = _class_folder_catalog(tmp_path / "more", a=200, b=200)
    small, large = (
        data_splits.draw_splits(catalog, _random_ids(400), share).splits for share in (0.1, 0.4)
    )
    assert all(b == "valid" for a, b in zip(small, large, strict=True) if a == "valid")
    assert small.count("valid") < large.count("valid")


@given(st.integers(0, 1000), st.integers(1, 9))
def test_worker_shares_cover_all_rows_once_and_evenly(count: int, world: int) -> None:
    shares = [data_splits.rows_of(count, rank, world) for rank in range(world)]
    assert [row for own_rows in shares for row in own_rows] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
