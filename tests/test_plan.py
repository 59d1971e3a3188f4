"""The plan's promises: names survive, rows are covered once, borders and splits stay put."""

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

from arrowhead import ConfigError, files, plan

NAMES = st.binary(min_size=1, max_size=40).filter(lambda name: not set(name) & {0, ord("/")})


def _put(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def _paths(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return sorted(f"train/c{draw.randrange(3)}/{draw.randrange(10**9)}.jpg" for _ in range(count))


def _contents(paths: list[str], size: int) -> set[tuple[str, ...]]:
    return {tuple(paths[row] for row in rows) for rows in plan.chunks(paths, size)}


# ----------------------------------------------------------------------------- listing


def test_train_and_valid_folders_give_splits_and_labels(tmp_path: Path) -> None:
    _put(tmp_path, "train/cat/1.jpg", "train/dog/deep/2.jpg", "valid/cat/3.jpg", "test/dog/4.jpg")
    catalog = plan.labelled(tmp_path)
    rows = zip(catalog.paths, catalog.labels, catalog.splits, strict=True)
    assert list(rows) == [
        ("test/dog/4.jpg", ("dog",), "test"),
        ("train/cat/1.jpg", ("cat",), "train"),
        ("train/dog/deep/2.jpg", ("dog",), "train"),
        ("valid/cat/3.jpg", ("cat",), "valid"),
    ]
    assert catalog.classes == ["cat", "dog"]
    assert catalog.sizes.tolist() == [len(path) for path in catalog.paths]


def test_class_folders_alone_leave_the_split_to_be_drawn(tmp_path: Path) -> None:
    catalog = plan.labelled(_put(tmp_path, "cat/1.jpg", "dog/2.jpg"))
    assert catalog.labels == [("cat",), ("dog",)]
    assert catalog.splits == ["", ""]


def test_hidden_system_and_unlabelled_files_are_counted_and_left_out(tmp_path: Path) -> None:
    _put(tmp_path, "cat/1.jpg", "dog/2.jpg", "loose.jpg", ".DS_Store")
    _put(tmp_path, "cat/Thumbs.db", "cat/.hidden", ".ipynb_checkpoints/1.jpg", "__MACOSX/dog/._2")
    _put(tmp_path, ".git/config", ".git/objects/ab", ".git/objects/cd")
    catalog = plan.labelled(tmp_path)
    assert catalog.paths == ["cat/1.jpg", "dog/2.jpg"]
    assert catalog.classes == ["cat", "dog"]
    assert catalog.ignored == 9  # every file, also in folders that are hidden


def test_a_folder_linked_under_two_names_is_listed_the_same_whatever_the_disk_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _put(tmp_path, "a/1.jpg", "a/2.jpg")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    listdir, found = os.listdir, []
    for backwards in (False, True):

        def names(folder: bytes, backwards: bool = backwards) -> list[bytes]:
            return sorted(listdir(folder), reverse=backwards)

        monkeypatch.setattr(os, "listdir", names)
        found.append(plan.unlabelled(tmp_path).paths)
    assert found[0] == found[1] == ["a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg"]


def test_an_empty_class_folder_is_named_and_changes_no_label(tmp_path: Path) -> None:
    _put(tmp_path, "train/cat/1.jpg", "train/dog/deep/2.jpg", "valid/cat/3.jpg", "valid/dog/4.jpg")
    before = plan.labelled(tmp_path)
    _put(tmp_path, "train/ant/.hidden")
    (tmp_path / "train/cow/deep").mkdir(parents=True)
    (tmp_path / "valid/cow").mkdir()
    (tmp_path / "other").mkdir()
    after = plan.labelled(tmp_path)
    assert after.empty == ("train/ant", "train/cow", "valid/cow")
    assert (after.classes, after.labels) == (before.classes, before.labels)
    assert after.digest() == before.digest()
    assert plan.labelled(_put(tmp_path / "flat", "a/1", "b/2", "c/.3")).empty == ("c",)


@pytest.mark.parametrize(
    "names", [("Cat", "cat"), ("caf\u00e9", "cafe\u0301"), ("Stra\u00dfe", "STRASSE")]
)
@pytest.mark.parametrize(
    "places", [("{}", "{}"), ("train/{}", "train/{}"), ("train/{}", "valid/{}")]
)
def test_classes_that_differ_only_in_case_or_unicode_form_are_refused_with_both_places(
    tmp_path: Path, names: tuple[str, str], places: tuple[str, str]
) -> None:
    folders = [place.format(name) for place, name in zip(places, names, strict=True)]
    if "train" in places[0]:
        _put(tmp_path, "valid/dog/1.jpg", "train/dog/1.jpg")
    _put(tmp_path, *(f"{folder}/1.jpg" for folder in folders), "dog/1.jpg")
    with pytest.raises(ConfigError) as refusal:
        plan.labelled(tmp_path)
    for said in (*map(ascii, names), *folders):
        assert said in refusal.value.found
    assert refusal.value.do


@pytest.mark.parametrize(
    ("names", "word"),
    [
        ((), "no images"),
        (("cat/1.jpg",), "one class"),
        (("train/cat/1.jpg", "train/dog/1.jpg"), "no valid/"),
        (("train/cat/1.jpg", "valid/cat/1.jpg", "valid/emu/1.jpg"), "emu"),
        (("train/cat/1.jpg", "train/emu/.no", "valid/cat/1.jpg", "valid/emu/1.jpg"), "emu"),
        (("train/cat/1.jpg", "train/dog/1.jpg", "valid/.no", "valid/cat/.no"), "valid"),
        (("Train/cat/1.jpg", "Valid/cat/1.jpg"), "Train/, Valid/"),
        (("valid/cat/1.jpg", "test/cat/1.jpg"), "no train/"),
        (("train/cat/1", "train/dog/1", "valid/cat/1", "Valid/cat/1"), "Valid/ beside train/"),
    ],
)
def test_folders_that_cannot_teach_are_refused_with_what_to_do(
    tmp_path: Path, names: tuple[str, ...], word: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        plan.labelled(_put(tmp_path, *names))
    assert word in refusal.value.found
    assert refusal.value.wanted
    assert refusal.value.do


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_that_leaves_one_side_empty_is_refused(share: float) -> None:
    with pytest.raises(ConfigError) as refusal:
        plan.SourceConfig(valid_share=share)
    assert all((refusal.value.found, refusal.value.wanted, refusal.value.do))


def test_the_digest_is_of_the_contents_list_not_of_where_it_lies(tmp_path: Path) -> None:
    here = _put(tmp_path / "here", "cat/1.jpg", "dog/2.jpg")
    there = tmp_path / "there"
    shutil.copytree(here, there)
    assert plan.labelled(here).digest() == plan.labelled(there).digest()
    (there / "cat/1.jpg").write_bytes(b"longer than it was")
    assert plan.labelled(here).digest() != plan.labelled(there).digest()


# -------------------------------------------------------------------------- arithmetic


@given(st.lists(NAMES.map(files.text), max_size=300), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_every_row_is_in_exactly_one_chunk(paths: list[str], size: int) -> None:
    runs = plan.chunks(paths, size)
    assert [row for rows in runs for row in rows] == list(range(len(paths)))
    assert all(2 * len(rows) >= size for rows in runs[:-1])


def test_chunks_are_as_long_as_asked_on_average() -> None:
    runs = plan.chunks(_paths(20_000, 0), 64)
    assert 0.75 * 64 < 20_000 / len(runs) < 1.5 * 64
    assert max(map(len, runs)) <= 4 * 64


def test_adding_one_file_changes_three_chunks_at_most() -> None:
    for seed in range(100):
        paths = _paths(640, seed)
        added = f"train/c1/{seed}-new.jpg"
        gone = _contents(paths, 16) - _contents(sorted([*paths, added]), 16)
        assert len(gone) <= 3, f"seed {seed}: one new file changed {len(gone)} chunks"


def test_a_replaced_file_a_touched_file_and_another_recipe_belong_to_another_shard(
    tmp_path: Path,
) -> None:
    _put(tmp_path, "a/1.jpg", "a/2.jpg")
    before = plan.unlabelled(tmp_path)
    name = plan.chunk_name(before, range(2), "recipe")
    assert plan.chunk_name(plan.unlabelled(tmp_path), range(2), "recipe") == name
    assert plan.chunk_name(before, range(2), "other") != name
    assert plan.chunk_name(before, range(1), "recipe") != name
    os.utime(tmp_path / "a/2.jpg", ns=(1, 1))
    assert plan.chunk_name(plan.unlabelled(tmp_path), range(2), "recipe") != name


def test_tries_rename_the_shards_they_are_in_and_no_other(tmp_path: Path) -> None:
    before = plan.unlabelled(_put(tmp_path, "a/1.jpg", "a/2.jpg"))
    assert before.tries.tolist() == [0, 0]
    after = replace(before, tries=np.array([0, 1], np.uint8))
    names = [
        [plan.chunk_name(each, range(row, row + 1), "r") for row in (0, 1)]
        for each in (before, after)
    ]
    assert names[0][0] == names[1][0]
    assert names[0][1] != names[1][1]
    assert after.digest() == before.digest()


def test_names_of_shards_are_those_of_earlier_versions() -> None:
    catalog = plan.Catalog(
        root="/",
        paths=["a", "b\\\\c"],
        sizes=np.array([1, -1]),
        stamps=np.array([5, 0]),
        labels=[("x",), ("y",)],
        splits=["train", ""],
    )
    assert plan.chunk_name(catalog, range(2), "recipe") == "0b377998edba97ea4ee04c00"
    assert catalog.digest() == "90e06a84e21bcee5091b25880e16b069"


def test_columns_make_the_same_catalog_again(tmp_path: Path) -> None:
    catalog = plan.labelled(_put(tmp_path, "cat/1.jpg", "dog/2.jpg"))
    assert "empty" not in catalog.columns()
    again = plan.Catalog(**catalog.columns())
    assert again.digest() == catalog.digest()
    assert again.read(1, 99) == (b"dog/2.jpg", None)


def test_a_row_whose_file_has_changed_since_the_listing_is_a_fault(tmp_path: Path) -> None:
    catalog = plan.unlabelled(_put(tmp_path, "1.jpg", "2.jpg"))
    (tmp_path / "2.jpg").write_bytes(b"other")
    assert catalog.read(0, 99) == (b"1.jpg", None)
    os.utime(tmp_path / "2.jpg", ns=(0, 0))
    assert catalog.read(1, 99) == (b"", "changed: it was written again after it was listed")


def test_splits_are_drawn_from_content_so_copies_stay_together(tmp_path: Path) -> None:
    names = [f"{label}/{n:04d}.jpg" for label in ("cat", "dog") for n in range(1000)]
    catalog = plan.labelled(_put(tmp_path, *names))
    draw = np.random.default_rng(0)
    ids = [draw.bytes(16) for _ in range(1000)] * 2  # every dog is a copy of a cat
    splits = plan.drawn(catalog, ids, 0.2).splits
    assert splits[:1000] == splits[1000:]
    assert 0.15 < splits.count("valid") / 2000 < 0.25
    assert set(splits) == {"train", "valid"}


def test_a_larger_share_only_adds_to_the_validation_split_and_given_splits_stay(
    tmp_path: Path,
) -> None:
    _put(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg", "valid/cat/3.jpg")
    given_splits = plan.labelled(tmp_path)
    zeros = [bytes(16)] * 3  # would fall into the validation split at any share
    assert plan.drawn(given_splits, zeros, 0.9).splits == given_splits.splits
    shutil.rmtree(tmp_path / "valid")
    names = [f"{n:03d}.jpg" for n in range(200)]
    catalog = plan.labelled(_put(tmp_path / "more", *(f"{c}/{n}" for c in "ab" for n in names)))
    ids = [np.random.default_rng(n).bytes(16) for n in range(400)]
    small, large = (plan.drawn(catalog, ids, share).splits for share in (0.1, 0.4))
    assert all(b == "valid" for a, b in zip(small, large, strict=True) if a == "valid")
    assert small.count("valid") < large.count("valid")


@given(st.integers(0, 1000), st.integers(1, 9))
def test_shares_cover_all_rows_once_and_are_even(count: int, world: int) -> None:
    shares = [plan.share(count, rank, world) for rank in range(world)]
    assert [row for mine in shares for row in mine] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
