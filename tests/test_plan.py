"""The plan's promises: names survive, rows are covered once, borders and splits stay put."""

from __future__ import annotations

import os
import random
import shutil
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


# ------------------------------------------------------------------------------- names


@given(NAMES)
@settings(max_examples=500, deadline=None)
def test_a_name_survives_to_text_and_back(name: bytes) -> None:
    shown = files.text(name)
    assert files.raw(shown) == name
    assert shown.isprintable()
    shown.encode("utf-8")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"caf\xc3\xa9.jpg", "café.jpg"),
        (b"caf\xe9.jpg", r"caf\xe9.jpg"),
        (rb"a\x41.jpg", r"a\\x41.jpg"),
        ("ab\u202egpj.exe".encode(), r"ab\xe2\x80\xaegpj.exe"),
        (b"one\ntwo\t.jpg", r"one\x0atwo\x09.jpg"),
    ],
)
def test_names_are_shown_as_they_are_and_only_the_unshowable_is_escaped(
    name: bytes, shown: str
) -> None:
    assert files.text(name) == shown


def test_a_file_whose_name_is_not_utf8_is_listed_and_found_again(tmp_path: Path) -> None:
    handle = os.open(os.fsencode(tmp_path) + b"/bl\xf6d\\name\n.jpg", os.O_WRONLY | os.O_CREAT)
    os.write(handle, b"12345")
    os.close(handle)
    catalog = plan.unlabelled(tmp_path)
    assert catalog.sizes.tolist() == [5]
    assert catalog.read(0, 100) == (b"12345", None)


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
    _put(tmp_path, "cat/Thumbs.db", "cat/.hidden", "cat/.ipynb_checkpoints/1.jpg")
    catalog = plan.labelled(tmp_path)
    assert catalog.paths == ["cat/1.jpg", "dog/2.jpg"]
    assert catalog.ignored == 5  # a hidden folder counts once


def test_links_back_up_the_tree_end_and_dangling_links_stay_rows(tmp_path: Path) -> None:
    _put(tmp_path, "cat/1.jpg")
    (tmp_path / "cat" / "up").symlink_to(tmp_path)
    (tmp_path / "cat" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "cat" / "ring").symlink_to(tmp_path / "cat" / "ring")
    catalog = plan.unlabelled(tmp_path)
    assert dict(zip(catalog.paths, catalog.sizes.tolist(), strict=True)) == {
        "cat/1.jpg": 9,
        "cat/gone.jpg": -1,
        "cat/ring": -1,
    }


def test_a_folder_linked_under_two_names_is_listed_the_same_whatever_the_disk_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _put(tmp_path, "a/1.jpg")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    scandir, found = os.scandir, []
    for backwards in (False, True):

        class Listing:
            def __init__(self, folder: bytes, backwards: bool = backwards) -> None:
                with scandir(folder) as entries:
                    self.entries = sorted(entries, key=lambda e: e.name, reverse=backwards)

            def __enter__(self) -> list[os.DirEntry[bytes]]:
                return self.entries

            def __exit__(self, *error: object) -> None:
                pass

        monkeypatch.setattr(os, "scandir", Listing)
        found.append(plan.unlabelled(tmp_path).paths)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("names", "word"),
    [
        ((), "no images"),
        (("cat/1.jpg",), "one class"),
        (("train/cat/1.jpg", "train/dog/1.jpg"), "no valid/"),
        (("train/cat/1.jpg", "valid/cat/1.jpg", "valid/emu/1.jpg"), "emu"),
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


def test_a_missing_folder_and_a_file_are_refused(tmp_path: Path) -> None:
    _put(tmp_path, "file.jpg")
    for name in ("nowhere", "file.jpg"):
        with pytest.raises(ConfigError):
            plan.unlabelled(tmp_path / name)


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
