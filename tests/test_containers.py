"""Images in tar shards, Parquet files and Arrow files: labels, splits, damage, hostile content."""

from __future__ import annotations

import hashlib
import io
import json
import os
import posixpath
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from s3_server import s3_bucket, start_s3_server

from arrowhead.data import (
    chunks,
    container_source,
    containers,
    drop_list,
    sources,
    tar_headers,
    tar_index,
)
from arrowhead.data.catalog import Catalog
from arrowhead.data.source_config import SourceConfig
from arrowhead.errors import ConfigError, DataError

Members = Sequence[tuple[str, bytes]]
JPEG = b"\xff\xd8\xff\xe0"  # enough for tests that decode nothing


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tar_index.CACHE_VARIABLE, str(tmp_path / "index-cache"))


def tar_bytes(members: Members, form: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar with these members."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return file.getvalue()


def write_tar(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members))
    return path


def sample(
    key: str, cls: str | None = None, data: bytes = b"", **record: Any
) -> list[tuple[str, bytes]]:
    """The members of a WebDataset sample."""
    members = [(f"{key}.jpg", JPEG + (data or key.encode()))]
    if cls is not None:
        members.append((f"{key}.cls", cls.encode()))
    if record:
        members.append((f"{key}.json", json.dumps(record).encode()))
    return members


def rows_of(catalog: Catalog) -> list[tuple[str, tuple[str, ...], str]]:
    return list(zip(catalog.paths, catalog.labels, catalog.splits, strict=True))


def contents(catalog: Catalog) -> list[bytes]:
    """The bytes of every row, read span by span as an extraction does."""
    read = [one for rows in catalog.spans() for one in catalog.read_span(rows, 2**28)]
    assert [fault for _, fault in read] == [None] * len(catalog)
    assert read == [catalog.read_file(row, 2**28) for row in range(len(catalog))]
    return [data for data, _ in read]


def notes_of(catalog: Catalog) -> str:
    return "\n".join(catalog.notes)


# ------------------------------------------------------------------------------ WebDataset


def test_shards_give_keys_as_paths_labels_and_splits(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-000.tar", [*sample("a/1", "1"), *sample("a/2", "0")])
    write_tar(tmp_path / "train-001.tar", [*sample("3", "1")])
    write_tar(tmp_path / "valid-000.tar", [*sample("1", "0"), ("notes.md", b"x")])
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    catalog = sources.labelled_catalog(tmp_path)
    assert rows_of(catalog) == [
        ("train-000.tar/a/1.jpg", ("dog",), "train"),
        ("train-000.tar/a/2.jpg", ("cat",), "train"),
        ("train-001.tar/3.jpg", ("dog",), "train"),
        ("valid-000.tar/1.jpg", ("cat",), "valid"),
    ]
    assert contents(catalog) == [JPEG + key for key in (b"a/1", b"a/2", b"3", b"1")]
    assert catalog.root == str(tmp_path)
    assert catalog.ignored == 1
    assert "splits by name: train from 2 files, valid from 1 file" in notes_of(catalog)
    assert "classnames.txt" in notes_of(catalog)


def test_one_shard_is_a_source_and_its_split_is_drawn(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "train-000.tar", [*sample("1", "cat"), *sample("2", "dog")])
    catalog = sources.labelled_catalog(shard)
    assert rows_of(catalog) == [
        ("train-000.tar/1.jpg", ("cat",), ""),
        ("train-000.tar/2.jpg", ("dog",), ""),
    ]
    assert sources.unlabelled_catalog(shard).paths == catalog.paths


@pytest.mark.parametrize(
    ("record", "config", "labels"),
    [
        ({"label": "cat", "caption": "a cat"}, SourceConfig(), ("cat",)),
        ({"label": 7, "text": "x"}, SourceConfig(), ("7",)),
        ({"class_name": "cat", "id": 3}, SourceConfig(), ("cat",)),
        ({"labels": ["sea", "sun"]}, SourceConfig(), ("sea", "sun")),
        ({"kind": "cat", "label": "x"}, SourceConfig(label_column="kind"), ("cat",)),
        ({"label": "sun|sea"}, SourceConfig(multi_label=True), ("sea", "sun")),
    ],
)
def test_json_keys_are_read_as_the_columns_of_a_table(
    tmp_path: Path, record: dict[str, Any], config: SourceConfig, labels: tuple[str, ...]
) -> None:
    other = dict.fromkeys(record, "other")
    if isinstance(record.get("labels"), list):
        other = {"labels": []}
    shard = write_tar(
        tmp_path / "a.tar",
        [*sample("1", **record, split="val"), *sample("2", **other, split="train")],
    )
    catalog = sources.labelled_catalog(shard, config, for_training=False)
    assert rows_of(catalog)[0] == ("a.tar/1.jpg", labels, "valid")
    assert catalog.splits[1] == "train"


def test_json_with_two_possible_labels_is_refused_with_the_flag(tmp_path: Path) -> None:
    record = {"category": "cat", "species": "felis"}
    shard = write_tar(tmp_path / "a.tar", [*sample("1", **record), *sample("2", **record)])
    with pytest.raises(ConfigError, match="category, species") as error_info:
        sources.labelled_catalog(shard)
    assert "--label-column" in error_info.value.do


def test_text_files_are_labels_but_captions_are_refused(tmp_path: Path) -> None:
    members = [*sample("1"), ("1.txt", b"cat\n"), *sample("2"), ("2.txt", b"dog")]
    catalog = sources.labelled_catalog(write_tar(tmp_path / "a.tar", members))
    assert catalog.labels == [("cat",), ("dog",)]
    members = [one for n in range(30) for one in (*sample(f"{n}"), (f"{n}.txt", b"photo %d" % n))]
    with pytest.raises(ConfigError, match="look like captions"):
        sources.labelled_catalog(write_tar(tmp_path / "b.tar", members))


def test_captions_beside_class_folders_are_ignored_and_masks_are_no_samples(tmp_path: Path) -> None:
    folders = [
        (f"{label}/{n}.{ending}", JPEG if ending == "jpg" else f"a {label} {n}".encode())
        for n in range(30)
        for label in ("cat", "dog")
        for ending in ("jpg", "txt")
    ]
    assert sources.labelled_catalog(write_tar(tmp_path / "a.tar", folders)).classes == [
        "cat",
        "dog",
    ]
    members = [*sample("1", "a"), ("1.seg.png", b"mask"), *sample("2", "b"), ("3.left.jpg", JPEG)]
    members += [("3.right.jpg", JPEG), ("3.cls", b"b")]
    catalog = sources.labelled_catalog(write_tar(tmp_path / "b.tar", members))
    names = ["1.jpg", "2.jpg", "3.left.jpg", "3.right.jpg"]
    assert catalog.paths == [f"b.tar/{name}" for name in names]
    assert "1 further images of a sample" in notes_of(catalog)


def test_class_number_without_a_name_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [*sample("1", "0"), *sample("2", "2")])
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(ConfigError, match=r"class 2 .* 2 names"):
        sources.labelled_catalog(tmp_path)
    (tmp_path / "classes.txt").unlink()
    assert sources.labelled_catalog(tmp_path).classes == ["0", "2"]


def test_image_without_a_label_is_left_out_and_counted(tmp_path: Path) -> None:
    members = [*sample("1", "cat"), *sample("2", "dog"), *sample("3")]
    catalog = sources.labelled_catalog(write_tar(tmp_path / "a.tar", members))
    assert catalog.paths == ["a.tar/1.jpg", "a.tar/2.jpg"]
    assert catalog.ignored == 1
    assert "1 image without a label" in notes_of(catalog)


def test_shards_of_some_splits_only_are_refused(tmp_path: Path) -> None:
    for name in ("train-0.tar", "other-0.tar"):
        write_tar(tmp_path / name, sample("1", "cat"))
    with pytest.raises(ConfigError, match=r"other-0.tar \(no split\)"):
        sources.labelled_catalog(tmp_path)


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train-00000-of-00003.parquet", "train"),
        ("imagenet1k-validation-01.tar", "valid"),
        ("data/test/0000.parquet", "test"),
        ("default/train/0001.parquet", "train"),
        ("train/val-0.tar", "valid"),
        ("photos-000.tar", ""),
        ("train-test-0.tar", ""),
        ("contest/latest-0.tar", ""),
    ],
)
def test_split_is_read_from_the_name_of_a_file_or_its_folder(path: str, split: str) -> None:
    from arrowhead.data import container_labels

    assert container_labels.split_of_name(path) == split


# -------------------------------------------------------------------------- folders in tars


def test_class_folders_in_a_tar_give_the_labels(tmp_path: Path) -> None:
    names = ["train/cat/1.jpg", "train/dog/2.jpg", "val/cat/3.jpg", "val/dog/4.jpg"]
    members = [(f"./photos/{name}", JPEG + name.encode()) for name in names]
    catalog = sources.labelled_catalog(write_tar(tmp_path / "photos.tar", members))
    assert rows_of(catalog) == [
        ("photos.tar/photos/train/cat/1.jpg", ("cat",), "train"),
        ("photos.tar/photos/train/dog/2.jpg", ("dog",), "train"),
        ("photos.tar/photos/val/cat/3.jpg", ("cat",), "valid"),
        ("photos.tar/photos/val/dog/4.jpg", ("dog",), "valid"),
    ]
    assert contents(catalog) == [JPEG + name.encode() for name in names]


def test_one_tar_for_each_class_or_split_gives_labels(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for label in ("n01", "n02"):
            write_tar(tmp_path / "a" / split / f"{label}.tar", [("1.JPEG", JPEG), ("2.JPEG", JPEG)])
        members = [("cat/1.jpg", JPEG), ("dog/1.jpg", JPEG)]
        write_tar(tmp_path / "b" / f"{split}.tar", members)
    by_class = sources.labelled_catalog(tmp_path / "a")
    assert rows_of(by_class)[0] == ("train/n01.tar/1.JPEG", ("n01",), "train")
    assert sorted(set(zip(by_class.labels, by_class.splits, strict=True))) == [
        (("n01",), "train"),
        (("n01",), "valid"),
        (("n02",), "train"),
        (("n02",), "valid"),
    ]
    by_split = sources.labelled_catalog(tmp_path / "b")
    assert rows_of(by_split)[-1] == ("val.tar/dog/1.jpg", ("dog",), "valid")


def test_numbered_shards_without_labels_are_no_classes(tmp_path: Path) -> None:
    for number in range(2):
        write_tar(tmp_path / f"photos-{number}.tar", [*sample("1"), *sample("2")])
    with pytest.raises(ConfigError, match="no labels"):
        sources.labelled_catalog(tmp_path)
    assert len(sources.unlabelled_catalog(tmp_path)) == 4


# --------------------------------------------------------------------- damage and hostility


def test_torn_tar_costs_only_what_is_behind_the_tear(tmp_path: Path) -> None:
    members = [one for n in range(9) for one in reversed(sample(f"{n}", "ab"[n % 2], b"x" * 900))]
    whole = tar_bytes(members)
    write_tar(tmp_path / "b.tar", [*sample("1", "a"), *sample("2", "b")])
    at = whole.index(b"5.jpg") + 512 + 100  # in the bytes of the sixth image
    (tmp_path / "a.tar").write_bytes(whole[:at])
    catalog = sources.labelled_catalog(tmp_path)
    assert catalog.paths == [*(f"a.tar/{n}.jpg" for n in range(6)), "b.tar/1.jpg", "b.tar/2.jpg"]
    read = [one for rows in catalog.spans() for one in catalog.read_span(rows, 2**20)]
    assert [fault for _, fault in read].count(None) == 7
    assert read[5] == (b"", "truncated: a.tar is cut off in it, after 100 bytes")
    assert "cut off or damaged, what follows is lost: a.tar: its member 5.jpg" in notes_of(catalog)
    assert "5 whole images before that" in notes_of(catalog)
    (tmp_path / "a.tar").write_bytes(whole)
    assert len(sources.labelled_catalog(tmp_path)) == 11


def test_damaged_header_in_the_middle_ends_a_tar_and_is_named(tmp_path: Path) -> None:
    whole = bytearray(tar_bytes([one for n in range(4) for one in sample(f"{n}", "ab"[n % 2])]))
    whole[whole.index(b"2.jpg") + 150] ^= 1
    (tmp_path / "a.tar").write_bytes(whole)
    catalog = sources.labelled_catalog(tmp_path / "a.tar")
    assert catalog.paths == ["a.tar/0.jpg", "a.tar/1.jpg"]
    assert "checksum" in notes_of(catalog)
    assert "2 whole images before that" in notes_of(catalog)


def test_tar_cut_between_members_is_named(tmp_path: Path) -> None:
    whole = tar_bytes([*sample("1", "a"), *sample("2", "b"), *sample("3", "b")])
    (tmp_path / "a.tar").write_bytes(whole[: whole.index(b"3.jpg")])
    catalog = sources.labelled_catalog(tmp_path / "a.tar")
    assert len(catalog) == 2
    assert "without an end mark, may be cut off: a.tar" in notes_of(catalog)


def test_tars_appended_to_one_another_are_read_to_the_end(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes(sample("1", "a")) + tar_bytes(sample("2", "b")))
    assert sources.labelled_catalog(tmp_path / "a.tar").paths == ["a.tar/1.jpg", "a.tar/2.jpg"]


@pytest.mark.parametrize("content", [b"", b"<html>not a tar</html>" * 99, b"\0" * 300])
def test_file_that_is_no_tar_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ConfigError, match="holds no images"):
        sources.labelled_catalog(tmp_path / "a.tar")


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar"])
def test_compressed_tar_is_refused_with_what_to_do(tmp_path: Path, name: str) -> None:
    import gzip

    (tmp_path / name).write_bytes(gzip.compress(tar_bytes(sample("1", "a"))))
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(ConfigError, match="compressed tar") as error_info:
            sources.labelled_catalog(source)
        assert "gunzip" in error_info.value.do


def hostile_tar() -> bytes:
    """A tar with everything that an honest one does not have."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:

        def add(name: str, data: bytes = JPEG, **fields: Any) -> None:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            for field, value in fields.items():
                setattr(entry, field, value)
            tar.addfile(entry, io.BytesIO(data) if entry.isreg() else None)

        add("/etc/absolute.jpg", JPEG + b"absolute")
        add("../../up.jpg")
        add("a/../../up.jpg")
        add("twice.jpg", JPEG + b"first")
        add("twice.jpg", JPEG + b"second")
        add("empty.jpg", b"")
        add("hard.jpg", b"", type=tarfile.LNKTYPE, linkname="twice.jpg")
        add("d/soft.jpg", b"", type=tarfile.SYMTYPE, linkname="../twice.jpg")
        add("passwd.jpg", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add("loop.jpg", b"", type=tarfile.SYMTYPE, linkname="loop.jpg")
        add("pipe.jpg", b"", type=tarfile.FIFOTYPE)
        add("disk.jpg", b"", type=tarfile.BLKTYPE)
        add("__MACOSX/._cat.jpg")
        add(".hidden/cat.jpg")
        add("n" * 300 + ".jpg", JPEG + b"long")
        add("\x1b[31mred\n.jpg", JPEG + b"red")
        for name, label in (("twice", "a"), ("empty", "b"), ("hard", "a"), ("absolute", "b")):
            add(f"{name}.cls", label.encode())
        add("broken.json", b"{" * 5000)
        add("deep.json", b"[" * 100_000)
    return file.getvalue()


def test_hostile_tar_gives_only_its_own_members_under_safe_names(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(hostile_tar())
    catalog = sources.unlabelled_catalog(tmp_path)
    inner = {path.removeprefix("a.tar/"): row for row, path in enumerate(catalog.paths)}
    long = "n" * 300 + ".jpg"
    red = r"\x1b[31mred\x0a.jpg"
    assert set(inner) == {
        *("etc/absolute.jpg", "twice.jpg", "empty.jpg", "hard.jpg", "d/soft.jpg"),
        *(long, red),
    }
    read = {name: catalog.read_file(row, 2**20) for name, row in inner.items()}
    assert read["etc/absolute.jpg"] == (JPEG + b"absolute", None)
    assert read["twice.jpg"] == read["hard.jpg"] == read["d/soft.jpg"] == (JPEG + b"second", None)
    assert read["empty.jpg"] == (b"", None)  # the decoder finds that it is empty
    assert read[long] == (JPEG + b"long", None) and read[red] == (JPEG + b"red", None)
    ignored = notes_of(catalog)
    for words in ("2 names with ..", "2 devices", "2 links that lead nowhere", "2 broken .json"):
        assert words in ignored


@pytest.mark.parametrize(
    ("cell", "size"),
    [
        (b"\x80" + (2**40).to_bytes(11, "big"), 2**40),
        (b"\xff" * 12, -1),
        (b"\x80" + b"\xff" * 11, 0),
    ],
)
def test_member_that_claims_a_huge_or_negative_size_ends_the_tar(
    tmp_path: Path, cell: bytes, size: int
) -> None:
    whole = bytearray(tar_bytes([*sample("1", "a"), *sample("2", "b"), *sample("3", "b")]))
    at = whole.index(b"3.jpg")
    whole[at + 124 : at + 136] = cell
    whole[at + 148 : at + 156] = b" " * 8
    whole[at + 148 : at + 156] = b"%06o\0 " % sum(whole[at : at + 512])
    (tmp_path / "a.tar").write_bytes(whole)
    catalog = sources.unlabelled_catalog(tmp_path)
    assert catalog.paths[:2] == ["a.tar/1.jpg", "a.tar/2.jpg"]
    assert "what follows is lost" in notes_of(catalog)
    for row in range(2, len(catalog)):
        assert catalog.read_file(row, 2**20)[1].startswith("too large")
        assert catalog.read_file(row, 2**62)[1].startswith("truncated")


def test_extended_header_that_claims_gigabytes_is_not_read(tmp_path: Path) -> None:
    header = bytearray(tarfile.TarInfo("x").tobuf(tarfile.GNU_FORMAT))
    header[156:157] = b"L"
    header[124:136] = b"%011o\0" % (2**32)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    file = tmp_path / "a.tar"
    with file.open("wb") as out:
        out.write(tar_bytes(sample("1", "a"))[:2048] + header)
        out.truncate(2**33)  # sparse on the disk
    tracemalloc.start()
    catalog = sources.unlabelled_catalog(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert catalog.paths == ["a.tar/1.jpg"]
    assert "an extended header claims 4294967296 bytes" in notes_of(catalog)
    assert peak < 2**23


NAMES = st.lists(st.text("abé中 .-_", min_size=1, max_size=60), min_size=1, max_size=4).map(
    "/".join
)


@given(
    st.lists(st.tuples(NAMES, st.binary(max_size=1300)), max_size=8),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.data(),
)
@settings(max_examples=150, deadline=None)
def test_headers_are_read_as_tarfile_reads_them_and_damage_adds_nothing(
    members: list[tuple[str, bytes]], form: int, data: st.DataObject
) -> None:
    """Whole tars give what was put in; cut-off ones a part of it; no bit flip raises."""
    try:
        whole = tar_bytes(members, form)
    except ValueError:  # ustar cannot hold such a name
        return
    expected = {}
    for name, content in members:
        key = posixpath.normpath(name.lstrip("/")).encode()
        if ".." not in name.split("/") and key != b".":
            expected.pop(key, None)
            expected[key] = content

    def read(tar: bytes) -> dict[bytes, bytes]:
        found = tar_headers.read_tar(lambda at, count: tar[at : at + count], len(tar))
        return {
            name: tar[one.offset : one.offset + one.size] for name, one in found.members.items()
        }

    complete = tar_headers.read_tar(lambda at, count: whole[at : at + count], len(whole))
    assert (complete.damage, complete.unmarked) == ("", False)
    assert read(whole) == expected
    cut = read(whole[: data.draw(st.integers(0, len(whole)))])
    every = {}
    for name, content in members:
        every.setdefault(posixpath.normpath(name.lstrip("/")).encode(), []).append(content)
    assert all(any(one.startswith(part) for one in every[name]) for name, part in cut.items())
    flipped = bytearray(whole)
    flipped[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    read(bytes(flipped))


# -------------------------------------------------------------------------- changes, caches


def test_changed_shard_is_a_fault_and_makes_other_chunks(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [*sample("1", "a"), *sample("2", "b")])
    write_tar(tmp_path / "b.tar", [*sample("1", "a"), *sample("2", "b")])
    before = sources.labelled_catalog(tmp_path)
    write_tar(tmp_path / "a.tar", [*sample("1", "a", b"new"), *sample("2", "b")])
    fault = "changed: a.tar was written again after it was listed"
    assert before.read_file(0, 2**20) == before.read_file(1, 2**20) == (b"", fault)
    assert before.read_file(2, 2**20)[1] is None
    after = sources.labelled_catalog(tmp_path)
    assert contents(after)[0] == JPEG + b"new"
    names = [
        [chunks.shard_name(one, rows, "r") for rows in (range(2), range(2, 4))]
        for one in (before, after)
    ]
    assert names[0][0] != names[1][0] and names[0][1] == names[1][1]
    (tmp_path / "b.tar").unlink()
    assert after.read_file(2, 2**20) == (b"", "unreadable: No such file or directory")


def test_index_in_the_cache_gives_the_same_catalog_without_reading_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.tar").write_bytes(hostile_tar())
    first = sources.unlabelled_catalog(tmp_path / "a.tar")
    kept = list((tmp_path / "index-cache").rglob("*.json"))
    assert len(kept) == 1
    with monkeypatch.context() as patch:
        patch.setattr(tar_index, "BlockReader", None)  # opening the tar would fail
        again = sources.unlabelled_catalog(tmp_path / "a.tar")
    assert (again.paths, again.notes) == (first.paths, first.notes)
    assert again.offsets.tolist() == first.offsets.tolist()
    kept[0].write_bytes(kept[0].read_bytes().replace(b"twice", b"other"))
    assert sources.unlabelled_catalog(tmp_path / "a.tar").paths == first.paths
    monkeypatch.setenv(tar_index.CACHE_VARIABLE, str(tmp_path / "a.tar"))  # no folder
    assert sources.unlabelled_catalog(tmp_path / "a.tar").paths == first.paths


def test_neighbours_in_a_tar_are_read_together_and_distant_ones_are_not(tmp_path: Path) -> None:
    big = os.urandom(containers.MAX_SPAN_BYTES // 2)
    members = [one for n in range(40) for one in sample(f"{n:02}", "a")]
    members += [*sample("50", "b", big), *sample("51", "b", big), *sample("52", "b", big)]
    catalog = sources.labelled_catalog(write_tar(tmp_path / "a.tar", members), for_training=False)
    assert [len(rows) for rows in catalog.spans()] == [32, 9, 1, 1]
    assert len(contents(catalog)) == 43


def test_images_and_shards_in_one_folder_are_a_folder(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", sample("1", "a"))
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "1.jpg").write_bytes(JPEG)
    catalog = sources.labelled_catalog(tmp_path)
    assert catalog.paths == ["cat/1.jpg", "dog/1.jpg"]
    assert "1 .tar" in notes_of(catalog)


def test_drop_list_leaves_out_images_of_a_shard(tmp_path: Path) -> None:
    members = [one for n in range(4) for one in sample(f"{n}", "ab"[n % 2])]
    shard = write_tar(tmp_path / "a.tar", members)
    (tmp_path / "drop.txt").write_text("a.tar/1.jpg\n")
    catalog = drop_list.leave_out(sources.labelled_catalog(shard), str(tmp_path / "drop.txt"))
    assert catalog.paths == ["a.tar/0.jpg", "a.tar/2.jpg", "a.tar/3.jpg"]
    assert contents(catalog) == [JPEG + b"0", JPEG + b"2", JPEG + b"3"]


def test_settings_that_apply_to_tables_only_are_refused(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [*sample("1", "a"), *sample("2", "b")])
    with pytest.raises(ConfigError, match="--suffix"):
        sources.labelled_catalog(shard, SourceConfig(suffix=".jpg"))
    with pytest.raises(ConfigError, match="No such file"):
        sources.labelled_catalog(tmp_path / "none.tar")


# ------------------------------------------------------------------------ Parquet and Arrow

Table = Callable[..., Path]


@pytest.fixture(params=["parquet", "arrow"])
def write_rows(request: pytest.FixtureRequest, tmp_path: Path) -> Table:
    """A function that writes columns into a Parquet file, or an Arrow stream."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(name: str, columns: Mapping[str, Any], **more: Any) -> Path:
        path = tmp_path / f"{name}.{request.param}"
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pa.table(dict(columns), metadata=more.get("metadata"))
        if request.param == "parquet":
            pq.write_table(table, path, row_group_size=more.get("rows", 3))
        else:
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as sink:
                sink.write_table(table, max_chunksize=more.get("rows", 3))
        return path

    return write


def image_column(images: Sequence[bytes | None], names: Sequence[str | None] = ()) -> Any:
    import pyarrow as pa

    paths = list(names) or [None] * len(images)
    rows = [{"bytes": data, "path": path} for data, path in zip(images, paths, strict=True)]
    return pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()}))


CLASS_LABEL = {
    b"huggingface": json.dumps(
        {
            "info": {
                "features": {
                    "image": {"_type": "Image"},
                    "digit": {"_type": "ClassLabel", "names": ["cat", "dog"]},
                }
            }
        }
    ).encode()
}


def test_rows_have_class_names_and_the_names_of_their_images(write_rows: Table) -> None:
    images = [JPEG + b"%d" % n for n in range(11)]
    names = [f"photos/{n}.jpg" for n in range(10)] + [None]
    digits = [n % 2 for n in range(10)] + [-1]
    columns = {"image": image_column(images, names), "digit": digits, "caption": ["x"] * 11}
    path = write_rows("train-0", columns, metadata=CLASS_LABEL)
    catalog = sources.labelled_catalog(path)
    assert rows_of(catalog)[:2] == [
        (f"{path.name}/00-0.jpg", ("cat",), ""),
        (f"{path.name}/01-1.jpg", ("dog",), ""),
    ]
    assert contents(catalog) == images[:10]
    assert "1 image without a label" in notes_of(catalog)  # class -1: not known
    every = sources.unlabelled_catalog(path)
    assert every.paths[-1] == f"{path.name}/10"
    assert contents(every) == images


@pytest.mark.parametrize("label", [["a", "b", "a"], [1, 2, 1], [["a"], ["b", "c"], []]])
def test_plain_bytes_and_any_kind_of_label_are_read(write_rows: Table, label: list[Any]) -> None:
    import pyarrow as pa

    images = [JPEG + b"1", JPEG + b"22", JPEG + b"3"]
    columns = {
        "jpg": pa.array(images, pa.large_binary()),
        "label": label,
        "split": ["train", "val", "test"],
    }
    catalog = sources.labelled_catalog(write_rows("a", columns), for_training=False)
    wanted = [tuple(map(str, one)) if isinstance(one, list) else (str(one),) for one in label]
    assert catalog.labels == wanted
    assert catalog.splits == ["train", "valid", "test"]
    assert contents(catalog) == images


def test_rows_are_read_in_any_order_by_several_threads(write_rows: Table) -> None:
    images = [os.urandom(1000 + n) for n in range(300)]
    path = write_rows(
        "a", {"image": image_column(images), "label": ["ab"[n % 2] for n in range(300)]}, rows=70
    )
    catalog = sources.unlabelled_catalog(path)
    order = sorted(range(300), key=lambda row: hashlib.sha256(b"%d" % row).digest())
    with ThreadPoolExecutor(6) as pool:
        read = list(pool.map(lambda row: catalog.read_file(row, 2**20), order))
    assert read == [(images[row], None) for row in order]


def test_row_without_bytes_is_a_fault_of_that_row(write_rows: Table) -> None:
    images = [JPEG, None, None, b"", JPEG]
    names = [None, None, "/etc/passwd", None, None]
    columns = {"image": image_column(images, names), "label": list("ababa")}
    catalog = sources.labelled_catalog(write_rows("a", columns))
    read = [catalog.read_file(row, 2**20) for row in range(5)]
    assert read[0] == read[4] == (JPEG, None)
    assert read[1] == (b"", "empty: the row holds no image")
    assert read[2][1] == "unreadable: the row holds the path of a file in place of the image"
    assert read[3] == (b"", None)  # the decoder finds that it is empty


def test_file_without_a_column_of_images_is_refused_with_its_columns(write_rows: Table) -> None:
    path = write_rows("a", {"image": ["cat.jpg", "dog.jpg"], "label": ["a", "b"]})
    with pytest.raises(ConfigError, match=r"no column that can hold images.* image, label"):
        sources.labelled_catalog(path)
    two = {"left": image_column([JPEG] * 2), "right": image_column([JPEG] * 2), "label": ["a", "b"]}
    path = write_rows("b", two)
    with pytest.raises(ConfigError, match="left, right") as error_info:
        sources.labelled_catalog(path)
    assert "--path-column" in error_info.value.do
    catalog = sources.labelled_catalog(path, SourceConfig(path_column="right"))
    assert (catalog.image_column, len(contents(catalog))) == ("right", 2)
    unlabelled = {"image": image_column([JPEG] * 2), "caption": ["a", "b"]}
    with pytest.raises(ConfigError, match="no labels"):
        sources.labelled_catalog(write_rows("c", unlabelled))


class _RunsCode(pa.ExtensionType):
    """An extension type that shows whether Arrow made it from a file."""

    made = 0

    def __init__(self) -> None:
        super().__init__(pa.binary(), "arrowhead.tests.runs_code")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> _RunsCode:
        cls.made += 1
        return cls()


@pytest.fixture
def registered_type() -> Iterator[type[_RunsCode]]:
    """A registered extension type, as importing Ray Train registers those of Ray Data."""
    pa.register_extension_type(_RunsCode())
    _RunsCode.made = 0
    yield _RunsCode
    pa.unregister_extension_type("arrowhead.tests.runs_code")


@pytest.mark.parametrize("name", ["x", "xx", "xxx", "xxxxxx"])  # moves the mark within base64
def test_column_of_an_extension_type_is_refused_before_arrow_makes_the_type(
    write_rows: Table, registered_type: type[_RunsCode], name: str
) -> None:
    marks = {"ARROW:extension:name": "arrowhead.tests.runs_code", "ARROW:extension:metadata": name}
    columns = {"image": image_column([JPEG] * 2), "label": ["a", "b"]}
    table = pa.table({**columns, name: pa.array([b"1", b"2"])})
    schema = table.schema.set(2, pa.field(name, pa.binary(), metadata=marks))
    path = write_rows("a", columns)
    if path.suffix == ".parquet":
        pq.write_table(table.cast(schema), path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as sink:
            sink.write_table(table.cast(schema))
    registered_type.made = 0
    with pytest.raises(DataError, match="extension type"):
        sources.labelled_catalog(path)
    assert registered_type.made == 0


def test_changed_rows_file_is_a_fault(write_rows: Table) -> None:
    columns = {"image": image_column([JPEG] * 4), "label": list("abab")}
    path = write_rows("a", columns)
    before = sources.labelled_catalog(path)
    assert before.read_file(0, 2**20) == (JPEG, None)
    write_rows("a", columns | {"image": image_column([JPEG + b"new"] * 4)})
    for row in (1, 3, 0):
        fault = f"changed: {path.name} was written again after it was listed"
        assert before.read_file(row, 2**20) == (b"", fault)
    assert contents(sources.labelled_catalog(path)) == [JPEG + b"new"] * 4


def test_damaged_rows_files_end_in_refusals_and_faults(write_rows: Table) -> None:
    """Cut off anywhere, and with flipped bytes: never another exception, never wrong lengths."""
    images = [os.urandom(500) for _ in range(20)]
    path = write_rows("a", {"image": image_column(images), "label": list("ab" * 10)})
    whole = path.read_bytes()
    for step in range(40):
        damaged = bytearray(whole[: len(whole) * step // 40] if step % 2 else whole)
        for at in range(step * 7, len(damaged), len(whole) // 5) if step % 2 == 0 else ():
            damaged[at] ^= 0x55
        path.write_bytes(damaged)
        os.utime(path, ns=(step, step + 1))
        try:
            catalog = sources.unlabelled_catalog(path)
        except (ConfigError, DataError):
            continue
        for row in range(len(catalog)):
            data, fault = catalog.read_file(row, 2**20)
            assert fault or isinstance(data, bytes)


def test_cut_off_arrow_stream_keeps_the_rows_before(tmp_path: Path) -> None:
    import pyarrow as pa

    images = [os.urandom(500) for _ in range(20)]
    table = pa.table({"image": image_column(images), "label": list("ab" * 10)})
    path = tmp_path / "a.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as sink:
        sink.write_table(table, max_chunksize=4)
    path.write_bytes(path.read_bytes()[:-3000])
    catalog = sources.labelled_catalog(path)
    assert contents(catalog) == images[: len(catalog)]
    assert 8 <= len(catalog) < 20
    assert "what follows is lost: a.arrow" in notes_of(catalog)


def test_large_row_group_is_read_some_rows_at_a_time(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [os.urandom(2**19) for _ in range(80)]  # 40 MiB in one row group
    path = tmp_path / "a.parquet"
    table = pa.table({"image": pa.array(images), "label": list("ab" * 40)})
    # Pages of a megabyte: pyarrow's own default is a page for 1024 values, however large.
    settings = {"use_dictionary": False, "write_batch_size": 2, "data_page_size": 2**20}
    pq.write_table(table, path, row_group_size=80, compression="none", **settings)
    del table
    catalog = sources.labelled_catalog(path)
    before = pa.total_allocated_bytes()
    peak = 0
    for row in range(len(catalog)):
        assert catalog.read_file(row, 2**20) == (images[row], None)
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert peak < 16 * 2**20


def test_folders_of_hugging_face_datasets_give_the_same_images(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    feature = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    images = {
        split: [JPEG + f"{split}{n}".encode() for n in range(6)] for split in ("train", "test")
    }
    saved = datasets.DatasetDict(
        {
            split: datasets.Dataset.from_list(
                [
                    {"image": {"bytes": one, "path": None}, "label": n % 2}
                    for n, one in enumerate(some)
                ],
                features=feature,
            )
            for split, some in images.items()
        }
    )
    saved.save_to_disk(tmp_path / "disk", num_shards={"train": 2, "test": 1})
    (tmp_path / "disk" / "train" / "cache-0123.arrow").write_bytes(b"of a map, not of the data")
    for split in saved:
        folder = tmp_path / "hub" / "data"
        folder.mkdir(parents=True, exist_ok=True)
        saved[split].to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    for source in ("disk", "hub"):
        catalog = sources.labelled_catalog(tmp_path / source)
        rows = zip(contents(catalog), catalog.labels, catalog.splits, strict=True)
        assert sorted(rows) == sorted(
            (one, (["cat", "dog"][n % 2],), "" if split == "train" else split)
            for split, some in images.items()
            for n, one in enumerate(some)
        )


def test_containers_of_several_kinds_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", sample("1", "a"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match="1 parquet, 1 tar"):
        sources.labelled_catalog(tmp_path)


# --------------------------------------------------------------------------- object stores


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    yield from start_s3_server()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    return s3_bucket(s3_server, monkeypatch, request.node.name)


def test_containers_in_s3_are_read_by_ranges_like_local_ones(bucket: Any, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [JPEG + os.urandom(30_000) for _ in range(60)]
    members = [one for n, data in enumerate(images) for one in sample(f"{n:02}", "01"[n % 2], data)]
    write_tar(tmp_path / "wds" / "train-0.tar", members[:80])
    write_tar(tmp_path / "wds" / "val-0.tar", members[80:])
    (tmp_path / "wds" / "classes.txt").write_text("cat\ndog\n")
    (tmp_path / "torn").mkdir()
    whole = (tmp_path / "wds" / "train-0.tar").read_bytes()
    (tmp_path / "torn" / "a.tar").write_bytes(whole[: len(whole) // 2])
    table = pa.table({"image": image_column(images), "label": list("ab" * 30)})
    for kind in ("pq", "arrow"):
        (tmp_path / kind).mkdir()
    pq.write_table(table, tmp_path / "pq" / "a.parquet", row_group_size=25)
    with (
        pa.OSFile(str(tmp_path / "arrow" / "a.arrow"), "wb") as file,
        pa.ipc.new_file(file, table.schema) as sink,
    ):
        sink.write_table(table, max_chunksize=25)
    for file in (tmp_path / one for one in ("wds", "torn", "pq", "arrow")):
        for part in file.iterdir():
            bucket.put_object(Key=f"d/{file.name}/{part.name}", Body=part.read_bytes())
    base = f"s3://{bucket.name}/d"
    for source in ("wds", "torn", "pq", "arrow", "wds/train-0.tar", "pq/a.parquet"):
        local = sources.labelled_catalog(tmp_path / source)
        remote = sources.labelled_catalog(f"{base}/{source}")
        assert rows_of(remote) == rows_of(local), source
        assert remote.offsets.tolist() == local.offsets.tolist()
        read = [
            [one for rows in catalog.spans() for one in catalog.read_span(rows, 2**20)]
            for catalog in (local, remote)
        ]
        assert read[0] == read[1], source
        assert remote.digest() == local.digest()
    before = sources.labelled_catalog(f"{base}/wds")
    bucket.put_object(Key="d/wds/train-0.tar", Body=whole + b"\0" * 512)
    assert before.read_file(0, 2**20)[1].startswith("changed: train-0.tar")
    assert before.read_file(len(before) - 1, 2**20)[1] is None
    with pytest.raises(ConfigError, match="No such file"):
        sources.labelled_catalog(f"{base}/none.tar")


def test_other_stores_read_parts_of_shards() -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    store = MemoryFileSystem()
    members = [one for n in range(9) for one in sample(f"{n}", "ab"[n % 2], os.urandom(900))]
    store.pipe({"/shards/train-0.tar": tar_bytes(members)})
    try:
        catalog = sources.labelled_catalog("memory://shards")
        images = [data for name, data in members if name.endswith(".jpg")]
        assert contents(catalog) == images
        assert contents(sources.labelled_catalog("memory://shards/train-0.tar")) == images
    finally:
        store.rm("/shards", recursive=True)


def test_listing_finds_one_container_by_its_name(tmp_path: Path) -> None:
    target = write_tar(tmp_path / "blobs" / "0123abcd", [*sample("1", "a"), *sample("2", "b")])
    link = tmp_path / "train-0.tar"
    link.symlink_to(target)  # as the cache of a model hub keeps files
    root, found = container_source.find_containers(link)
    assert (root, [one.path for one in found]) == (str(tmp_path), ["train-0.tar"])
    assert contents(sources.labelled_catalog(link)) == [JPEG + b"1", JPEG + b"2"]
