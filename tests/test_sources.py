"""Tables and object stores as sources: the catalog equals the table, on S3 as on disk.

S3 is a real server (moto) that the tests start; `memory://` stands for every other fsspec store.
"""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from s3_server import s3_bucket, start_s3_server

from arrowhead import ConfigError
from arrowhead.data import chunks, listing, object_store, path_text, reading, sources
from arrowhead.data.catalog import Catalog
from arrowhead.data.source_config import SourceConfig

NAMES = st.binary(min_size=1, max_size=20).filter(
    lambda name: not set(name) & {0, ord("/")} and name not in (b".", b"..")
)
UNUSUAL_KEYS = (
    "a b.jpg",
    "caf\u00e9 \U0001f415.jpg",
    "back\\slash.jpg",
    "100%25+&#.jpg",
    "q?versionId=7.jpg",
)


def _write_files(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def _write_table(root: Path, content: str | bytes, name: str = "t.csv") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return root / name


def _rows_of(catalog: Catalog) -> list[tuple[str, tuple[str, ...], str]]:
    return list(zip(catalog.paths, catalog.labels, catalog.splits, strict=True))


# --------------------------------------------------------------------------------- tables


def test_table_gives_paths_labels_and_splits(tmp_path: Path) -> None:
    _write_files(tmp_path, "b/2.jpg", "a/1.jpg", "3.jpg")
    table = "path,labels,split\nb/2.jpg,dog,train\na/1.jpg,cat,valid\n3.jpg,cat,train\n"
    catalog = sources.labelled_catalog(_write_table(tmp_path, table))
    assert _rows_of(catalog) == [
        ("3.jpg", ("cat",), "train"),
        ("a/1.jpg", ("cat",), "valid"),
        ("b/2.jpg", ("dog",), "train"),
    ]
    assert catalog.root == path_text.resolve(tmp_path)
    assert catalog.sizes.tolist() == [5, 7, 7]
    assert catalog.stamps.tolist() == [(tmp_path / p).stat().st_mtime_ns for p in catalog.paths]
    assert catalog.read_file(2, 99) == (b"b/2.jpg", None)
    assert not catalog.multi


def test_label_with_spaces_is_one_label(tmp_path: Path) -> None:
    _write_files(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    table = "path,labels\n1.jpg,American Bobtail\n2.jpg,American Curl\n3.jpg,Saint Bernard\n"
    catalog = sources.labelled_catalog(_write_table(tmp_path, table))
    assert catalog.classes == ["American Bobtail", "American Curl", "Saint Bernard"]
    assert not catalog.multi
    assert catalog.notes == ()


@pytest.mark.parametrize(
    ("content", "config", "labels"),
    [
        ("path,tags\n1,sea  sun sea\n2,fog\n", {}, [("sea", "sun"), ("fog",)]),
        ("path,labels\n1,sea sun\n2,fog\n", {"multi_label": True}, [("sea", "sun"), ("fog",)]),
        (
            "path,label\n1,old sea| sun\n2,fog; mist\n",
            {"multi_label": True},
            [("old sea", "sun"), ("fog; mist",)],
        ),
        (
            "path,label\n1,old sea; sun\n2,fog|mist\n",
            {"label_separator": ";"},
            [("old sea", "sun"), ("fog|mist",)],
        ),
        (
            """path,label\n1,"['old sea', ""sun, low""]"\n2,[fog]\n3,[]\n""",
            {},
            [("old sea", "sun, low"), ("fog",), ()],
        ),
        ("path,tags\n1,sea sun\n2,fog\n", {"label_separator": ""}, [("sea sun",), ("fog",)]),
    ],
)
def test_multi_label_cells_are_enabled_by_flag_tags_column_or_list_syntax(
    tmp_path: Path, content: str, config: dict[str, Any], labels: list[tuple[str, ...]]
) -> None:
    _write_files(tmp_path, "1", "2", "3")
    catalog = sources.labelled_catalog(_write_table(tmp_path, content), SourceConfig(**config))
    assert catalog.labels == labels
    assert catalog.multi == any(len(names) > 1 for names in labels)
    assert not catalog.multi or "labels for each image" in " ".join(catalog.notes)


@pytest.mark.parametrize("empty", ["[]", "[ ]", "{}", "()"])
def test_an_empty_list_is_no_label_and_never_a_class(tmp_path: Path, empty: str) -> None:
    _write_files(tmp_path, "1", "2", "3")
    table = _write_table(tmp_path, f"path,label\n1,sea|sun\n2,fog\n3,{empty}\n")
    catalog = sources.labelled_catalog(table, SourceConfig(multi_label=True))
    assert catalog.labels == [("sea", "sun"), ("fog",), ()]
    table = _write_table(tmp_path, f"path,label\n1,sea\n2,fog\n3,{empty}\n")
    with pytest.raises(ConfigError, match="line 4: it has no label"):
        sources.labelled_catalog(table)
    table = _write_table(tmp_path, f"path,label\n1,['sea']\n2,[fog]\n3,{empty}\n")
    assert sources.labelled_catalog(table).labels == [("sea",), ("fog",), ()]


def test_a_word_for_a_missing_value_is_a_class_and_reported(tmp_path: Path) -> None:
    _write_files(tmp_path, "1", "2", "3")
    table = _write_table(tmp_path, "path,label\n1,nan\n2,naan\n3,None\n")
    catalog = sources.labelled_catalog(table)
    assert catalog.classes == ["None", "naan", "nan"]
    assert "'None' and 'nan' are classes like any other" in " ".join(catalog.notes)


def test_column_that_looks_multi_label_is_reported_and_read_as_one_label(tmp_path: Path) -> None:
    cells = ["haze primary", "clear primary", "clear", "haze", "haze water", "clear water"]
    _write_files(tmp_path, *map(str, range(6)))
    rows = "".join(f"{n},{cell}\n" for n, cell in enumerate(cells))
    catalog = sources.labelled_catalog(_write_table(tmp_path, f"path,labels\n{rows}"))
    assert catalog.classes == sorted(cells)
    assert "--multi-label" in " ".join(catalog.notes)


@pytest.mark.parametrize(
    ("config", "word"),
    [({"multi_label": True}, "one in every cell"), ({"label_separator": "|"}, "one in every cell")],
)
def test_multi_label_setting_without_such_cells_is_refused(
    tmp_path: Path, config: dict[str, Any], word: str
) -> None:
    _write_files(tmp_path, "1", "2")
    table = _write_table(tmp_path, "path,labels\n1,cat\n2,dog\n")
    with pytest.raises(ConfigError, match=word):
        sources.labelled_catalog(table, SourceConfig(**config))
    with pytest.raises(ConfigError, match="empty --label-separator"):
        SourceConfig(multi_label=True, label_separator="")


@pytest.mark.parametrize(
    ("header", "config"),
    [
        ("path,label", {}),
        ("image,class", {}),
        ("Filename,Breed", {}),
        ("id,species", {}),
        ("ID,filepaths,Labels", {}),  # an id is ignored if there is a path
        ("file_name,what it is", {}),  # the only remaining column
        ("photo of,category", {}),  # its cells name images
        ("one,two", {"path_column": "one", "label_column": "Two"}),
        ("image,path,class,label", {"path_column": "image", "label_column": "class"}),
    ],
)
def test_unambiguous_columns_are_detected_and_reported(
    tmp_path: Path, header: str, config: dict[str, Any]
) -> None:
    _write_files(tmp_path, "1.jpg", "2.jpg")
    cells = {2: ["{0}.jpg,{1}"], 3: ["7,{0}.jpg,{1}"], 4: ["{0}.jpg,x,{1},y"]}[
        header.count(",") + 1
    ]
    rows = "".join(cells[0].format(n, label) + "\n" for n, label in ((1, "a cat"), (2, "dog")))
    catalog = sources.labelled_catalog(
        _write_table(tmp_path, f"{header}\n{rows}"), SourceConfig(**config)
    )
    assert _rows_of(catalog) == [("1.jpg", ("a cat",), ""), ("2.jpg", ("dog",), "")]
    detected = header != "path,label" and not config
    assert any("guessed: column" in note for note in catalog.notes) == detected


def test_image_ids_are_completed_and_found_in_subfolders(tmp_path: Path) -> None:
    _write_files(
        tmp_path, "pics/train/cats/cat.1.jpg", "pics/valid/dogs/dog.2.jpg", "pics/dog.3.jpg"
    )
    table = _write_table(
        tmp_path, "id,breed\ncat.1,American Curl\ndog.2,Saint Bernard\ndog.3,Pug\n"
    )
    images = str(tmp_path / "pics")
    catalog = sources.labelled_catalog(table, SourceConfig(images=images, suffix=".jpg"))
    assert catalog.paths == ["dog.3.jpg", "train/cats/cat.1.jpg", "valid/dogs/dog.2.jpg"]
    assert catalog.sizes.min() > 0
    assert "2 of 3 images found by name" in " ".join(catalog.notes)
    with pytest.raises(ConfigError) as error_info:
        sources.labelled_catalog(table, SourceConfig(images=images))
    assert "--suffix .jpg" in error_info.value.do
    _write_files(tmp_path, "pics/other/cat.1.jpg")
    with pytest.raises(ConfigError, match=r"line 2: cat.1.jpg is in several folders"):
        sources.labelled_catalog(table, SourceConfig(images=images, suffix=".jpg"))


@pytest.mark.parametrize(
    ("header", "words", "splits"),
    [
        ("split", ("train", "val", "test"), ("train", "valid", "test")),
        ("Split", ("Training", "VALIDATION", " Testing "), ("train", "valid", "test")),
        ("data set", ("train", "valid", "test"), ("train", "valid", "test")),
        ("is_valid", ("False", "True", ""), ("train", "valid", "")),
        ("is_valid", ("0", "1", "0"), ("train", "valid", "train")),
        ("is_valid", ("", "True", ""), ("train", "valid", "train")),
        ("is_train", ("1", "", "1"), ("train", "valid", "train")),
        ("is_test", ("no", "no", "yes"), ("", "", "test")),
        ("is_train", ("1", "0", "1"), ("train", "valid", "train")),
        ("split", ("0", "1", "0"), ("train", "valid", "train")),
        ("is_valid,is_test", ("0,0", "1,0", "0,1"), ("train", "valid", "test")),
        ("set", ("train", "blue", ""), ("", "", "")),  # another image set
    ],
)
def test_split_columns_hold_names_or_booleans(
    tmp_path: Path, header: str, words: tuple[str, ...], splits: tuple[str, ...]
) -> None:
    _write_files(tmp_path, *(f"{n}.jpg" for n in range(9)))
    rows = "".join(
        f"{3 * at + n}.jpg,{'abc'[n]},{word}\n" for at, word in enumerate(words) for n in range(3)
    )
    catalog = sources.labelled_catalog(_write_table(tmp_path, f"path,label,{header}\n{rows}"))
    assert catalog.splits == [split for split in splits for _ in range(3)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", "sep=;\r\npath;label\r\ndö/1.jpg;Möps\r\ndö/2.jpg;cat, fat\r\n;\r\n".encode()),
        ("t.csv", "path;label\ndö/1.jpg;Möps\ndö/2.jpg;cat, fat\n".encode("utf-8-sig")),
        ("t.csv", 'path,label\ndö/1.jpg,Möps\ndö/2.jpg,"cat, fat"\n'.encode("cp1252")),
        ("t.txt.csv", "path\tlabel\ndö/1.jpg\tMöps\ndö/2.jpg\tcat, fat\n".encode("utf-16")),
        ("t.tsv", "path\tlabel\ndö/1.jpg\tMöps\ndö/2.jpg\tcat, fat\n".encode("utf-16-be")),
        ("t.csv", 'path,label\ndö\\1.jpg,Möps\n.\\dö\\2.jpg,"cat, fat"\n'.encode()),
        ("t.csv", "path|label\ndö/1.jpg|Möps\ndö/2.jpg|cat, fat\n".encode()),
        ("t.csv", '"path","label"\n"dö/1.jpg","Möps"\n"dö/2.jpg","cat, fat"\n'.encode()),
        ("t.csv", '"label";"path"\r\n"Möps";"dö/1.jpg"\r\n"cat, fat";"dö/2.jpg"\r\n'.encode()),
        ("t.csv", 'label, path\nMöps, dö/1.jpg\n"cat, fat", dö/2.jpg\n'.encode()),
    ],
)
def test_common_table_formats_are_read(tmp_path: Path, name: str, content: bytes) -> None:
    _write_files(tmp_path, "dö/1.jpg", "dö/2.jpg")
    catalog = sources.labelled_catalog(_write_table(tmp_path, content, name))
    assert _rows_of(catalog) == [("dö/1.jpg", ("Möps",), ""), ("dö/2.jpg", ("cat, fat",), "")]
    assert catalog.sizes.min() > 0


CLASS_NAMES_BY_SCRIPT = (
    "猫 一二三",
    "изба",
    "γάτα",
    "بسة",
    "ねこ",
    "고양이",
    "แมว",
    "बिल्ली",
    "🐈🐕",
    "Möps",
)


@pytest.mark.parametrize("code", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("script", CLASS_NAMES_BY_SCRIPT)
def test_utf_16_without_bom_is_read_in_any_script(tmp_path: Path, script: str, code: str) -> None:
    names = [f"{script}/{script * 9}{n}.jpg" for n in range(3)]
    _write_files(tmp_path, *names)
    text = "path,label\n" + "".join(f"{name},{script * 20} {name[-5]}\n" for name in names)
    rows = _rows_of(sources.labelled_catalog(_write_table(tmp_path, text.encode(code))))
    assert rows == [(name, (f"{script * 20} {name[-5]}",), "") for name in names]
    table = _write_table(tmp_path, "".join(f"{name}\r\n" for name in names).encode(code), "t.txt")
    assert sources.unlabelled_catalog(table).paths == names


@pytest.mark.parametrize("code", ["utf-16-le", "utf-16-be"])
def test_character_that_is_latin_when_byte_swapped_keeps_the_byte_order(
    tmp_path: Path, code: str
) -> None:
    _write_files(tmp_path, "1.jpg", "2.jpg")
    text = f"path,label\n1.jpg,{'一' * 99}\n2.jpg,{'丁' * 99}\n"
    catalog = sources.labelled_catalog(_write_table(tmp_path, text.encode(code)))
    assert catalog.classes == ["一" * 99, "丁" * 99]


@pytest.mark.parametrize("name", ["t.csv", "t.txt"])
@pytest.mark.parametrize("content", [b"path,label\n1.jpg,c\0t\n2.jpg,dog\n", b"\0" * 64])
def test_binary_file_as_a_table_is_refused_as_binary(
    tmp_path: Path, name: str, content: bytes
) -> None:
    with pytest.raises(ConfigError, match=r"holds NUL bytes|is UTF-32"):
        sources.unlabelled_catalog(_write_table(tmp_path, content, name))


@pytest.mark.parametrize(
    "address",
    ["https://me:secret@example.org/photos?key=secret", "HTTP://example.org/t.csv", "ftp://x/y"],
)
def test_web_address_as_a_source_is_refused_as_such(tmp_path: Path, address: str) -> None:
    from arrowhead.bundle import resolve

    _write_files(tmp_path, "1.jpg", "2.jpg")
    table = _write_table(tmp_path, f"path,label\n1.jpg,cat\n{address}/2.jpg,dog\n")
    for ask in (
        lambda: sources.labelled_catalog(address),
        lambda: sources.unlabelled_catalog(address),
        lambda: sources.check_exists(address),
        lambda: resolve.check_exists(address),
        lambda: sources.labelled_catalog(table),
        lambda: sources.labelled_catalog(table, SourceConfig(images=address)),
    ):
        with pytest.raises(ConfigError, match="is a web address") as error_info:
            ask()
        assert "download it first" in error_info.value.do
        assert "secret" not in str(error_info.value)
    with pytest.raises(ConfigError, match=r"t\.csv, line 3: "):
        sources.labelled_catalog(table)
    with pytest.raises(ConfigError, match="is an address of HDFS"):
        sources.labelled_catalog("hdfs://node:8020/photos")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PK\x03\x04 a workbook", ["not text", "workbook"]),
        (b"\xff\xfep\0a\0t\0h\0,\0l\0\0", ["UTF-16", "corrupt"]),
        (b"1.jpg,cat\n2.jpg,dog\n", ["first line", "1.jpg", "not a header"]),
        (b"path,label\nC:\\me\\1.jpg,cat\nC:\\me\\2.jpg,dog\n", ["a path of a Windows machine"]),
        (b"path,label\n\\\\pc\\me\\1.jpg,cat\n", ["a path of a Windows machine"]),
        (b'path,label\n"1.jpg,cat\n', ["line 2", "not valid CSV"]),
        (b"image,file,label\n1,1.jpg,cat\n", ["image and file", "both be meant"]),
        (b"path,is_valid\n1.jpg,0\n", ["path, is_valid", "holds the labels"]),
        (b"path,label,is_val,is_valid\n1.jpg,cat,0,1\n", ["is_val and is_valid", "both be meant"]),
    ],
)
def test_unreadable_tables_are_refused_with_the_actual_cause(
    tmp_path: Path, content: bytes, words: list[str]
) -> None:
    _write_files(tmp_path, "1.jpg", "2.jpg")
    with pytest.raises(ConfigError) as error_info:
        sources.labelled_catalog(_write_table(tmp_path, content))
    for word in words:
        assert word in error_info.value.found


def test_invalid_split_values_are_refused_with_the_valid_ones(tmp_path: Path) -> None:
    _write_files(tmp_path, "1.jpg", "2.jpg")
    table = _write_table(tmp_path, "path;label;check\n1.jpg;cat;ja\n2.jpg;dog;nein\n")
    with pytest.raises(ConfigError) as error_info:
        sources.labelled_catalog(table, SourceConfig(split_column="check"))
    assert "line 2: it has 'ja' as check" in error_info.value.found
    assert error_info.value.wanted.startswith("one of train, val and test in every line")
    assert "write these words" in error_info.value.do


def test_list_from_windows_is_read(tmp_path: Path) -> None:
    _write_files(tmp_path, "d/1.jpg", "d/2.jpg")
    table = _write_table(tmp_path, "d\\2.jpg\r\nd\\1.jpg\r\n".encode("utf-16"), "t.txt")
    catalog = sources.unlabelled_catalog(table)
    assert catalog.paths == ["d/2.jpg", "d/1.jpg"]
    assert catalog.sizes.min() > 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", b"\xef\xbb\xbfpath,labels\r\na b.jpg,cat\r\n\r\nb.jpg,dog\r\n"),
        ("t.CSV", b'other,Labels, Path \n"x\ny",cat,a b.jpg\n"",dog,b.jpg'),
        ("t.tsv", b"path\tlabels\na b.jpg\tcat\nb.jpg\tdog\n"),
    ],
)
def test_spreadsheet_dialects_are_read(tmp_path: Path, name: str, content: bytes) -> None:
    _write_files(tmp_path, "a b.jpg", "b.jpg")
    catalog = sources.labelled_catalog(_write_table(tmp_path, content, name))
    assert _rows_of(catalog) == [("a b.jpg", ("cat",), ""), ("b.jpg", ("dog",), "")]


@given(st.dictionaries(NAMES, st.sampled_from(["cat", "dog", "\U0001f98a fox"]), min_size=1))
@settings(max_examples=100, deadline=None)
def test_any_file_name_survives_a_table(labels: dict[bytes, str]) -> None:
    labels |= {b"first.jpg": "cat", b"second.jpg": "dog"}
    with tempfile.TemporaryDirectory() as folder:
        content = io.StringIO(newline="")
        rows = csv.writer(content)
        rows.writerow(["path", "labels"])
        for name, label in labels.items():
            rows.writerow([name.decode("utf-8", "surrogateescape"), label])
            handle = os.open(os.fsencode(folder) + b"/" + name, os.O_WRONLY | os.O_CREAT)
            os.write(handle, b"12345")
            os.close(handle)
        with tempfile.TemporaryDirectory() as elsewhere:
            encoded = content.getvalue().encode("utf-8", "surrogateescape")
            table = _write_table(Path(elsewhere), encoded)
            config = SourceConfig(images=folder, label_separator="")
            catalog = sources.labelled_catalog(table, config)
        assert {
            path_text.unescape_path(p): x
            for p, (x,) in zip(catalog.paths, catalog.labels, strict=True)
        } == labels
        assert catalog.paths == sorted(catalog.paths)
        assert set(catalog.sizes.tolist()) == {5}
        assert catalog.read_file(0, 9) == (b"12345", None)


def test_paths_are_relative_to_the_image_folder_and_take_a_suffix(tmp_path: Path) -> None:
    _write_files(tmp_path, "pics/1.jpg", "pics/2.jpg")
    table = _write_table(tmp_path / "tables", "path,labels\n1,cat\n2,dog\n")
    config = SourceConfig(images=str(tmp_path / "pics"), suffix=".jpg")
    catalog = sources.labelled_catalog(table, config)
    assert catalog.paths == ["1.jpg", "2.jpg"]
    assert catalog.root == path_text.resolve(tmp_path / "pics")
    assert sources.unlabelled_catalog(table, config).paths == catalog.paths


def test_paths_outside_the_folder_move_the_root_up(tmp_path: Path) -> None:
    _write_files(tmp_path, "here/1.jpg", "there/2.jpg", "here/sub/3.jpg")
    content = (
        f"path,labels\n./1.jpg,cat\n../there/2.jpg,dog\n{tmp_path}/here/sub/../sub//3.jpg,cat\n"
    )
    catalog = sources.labelled_catalog(_write_table(tmp_path / "here", content))
    assert catalog.root == path_text.resolve(tmp_path)
    assert catalog.paths == ["here/1.jpg", "here/sub/3.jpg", "there/2.jpg"]
    assert catalog.sizes.min() > 0
    inside = sources.labelled_catalog(
        _write_table(
            tmp_path / "here", f"path,labels\nsub/../1.jpg,a\n{tmp_path}/here/sub/3.jpg,b\n"
        )
    )
    assert (inside.root, inside.paths) == (
        path_text.resolve(tmp_path / "here"),
        ["1.jpg", "sub/3.jpg"],
    )


def test_missing_file_stays_a_row(tmp_path: Path) -> None:
    _write_files(tmp_path, "1.jpg")
    catalog = sources.labelled_catalog(
        _write_table(tmp_path, "path,labels\n1.jpg,cat\ngone.jpg,dog\nno/2.jpg,dog\n")
    )
    assert catalog.sizes.tolist() == [5, -1, -1]
    assert catalog.read_file(1, 99) == (b"", "unreadable: No such file or directory")


def test_table_may_name_hidden_and_unusual_files(tmp_path: Path) -> None:
    _write_files(tmp_path, ".a.jpg", "__MACOSX/b.jpg")
    catalog = sources.labelled_catalog(
        _write_table(tmp_path, "path,labels\n.a.jpg,cat\n__MACOSX/b.jpg,dog\n")
    )
    assert catalog.sizes.tolist() == [6, 14]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["(none)"]),
        ("path,labels\n", ["no images"]),
        ("what,why,who\n1,cat,me\n", ["what, why, who", "names the images"]),
        ("path,why,who\n1.jpg,cat,me\n", ["path, why, who", "holds the labels"]),
        ("path,labels,label\n1.jpg,cat,cat\n", ["path, labels, label", "both be meant"]),
        ("path,labels\n1.jpg,cat\n2.jpg,dog\n./1.jpg,dog\n", ["twice", "lines 2 and 4", "1.jpg"]),
        ('path,labels\n"1\n.jpg",cat\n2.jpg,dog\n2.jpg,dog\n', ["lines 4 and 5"]),
        ("path,labels\n1.jpg,cat\n,dog\n", ["line 3", "no path"]),
        ("path,labels\n1.jpg,cat\n2.jpg, \n", ["line 3", "no label"]),
        ("path,labels\n1.jpg,cat\n2.jpg\n", ["line 3", "1 cells"]),
        ("path,labels\n1.jpg,cat\n2,3.jpg,dog\n", ["line 3", "3 cells"]),
        ("path,labels,split\n1.jpg,cat,train\n2.jpg,dog,fold 2\n", ["line 3", "'fold 2'"]),
        ("path,labels,split\n1.jpg,cat,0\n2.jpg,dog,2\n", ["line 2", "'0'"]),
        (
            'path,labels\n1.jpg,cat\n"2.jpg,dog\n3.jpg,dog\n',
            ["line 3", "not valid CSV", "end of data"],
        ),
        ("path,labels\n1.jpg,cat\n2.jpg,cat\n", ["one class", "'cat'"]),
        ("path,labels\n1.jpg,cat\n2.jpg,Cat\n3.jpg,Cat\n", ["'cat' (line 2)", "'Cat' (line 3)"]),
        ("path,labels,split\n1.jpg,cat,train\n2.jpg,dog,valid\n", ["dog", "train"]),
        ("path,labels\n8.jpg,cat\n9.jpg,dog\n", ["none of the 2 files", "8.jpg"]),
        ("path,labels\n1.jpg,cat\ns3://b/2.jpg,dog\n", ["several places", "line 3", "line 2"]),
    ],
)
def test_invalid_table_is_refused_with_file_and_line(
    tmp_path: Path, content: str, words: list[str]
) -> None:
    _write_files(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    table = _write_table(tmp_path, content)
    with pytest.raises(ConfigError) as error_info:
        sources.labelled_catalog(table)
    for word in (*words, str(table)):
        assert word in error_info.value.found
    assert error_info.value.wanted
    assert error_info.value.do


def test_missing_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        sources.labelled_catalog(tmp_path / "no.csv")


def test_folder_with_a_table_like_name_is_a_folder(tmp_path: Path) -> None:
    _write_files(tmp_path / "set.csv", "cat/1.jpg", "dog/2.jpg")
    assert sources.labelled_catalog(tmp_path / "set.csv").classes == ["cat", "dog"]


# ------------------------------------------------------------------------- object stores


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """The address of a local S3 server."""
    yield from start_s3_server()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """An empty bucket as a boto3 resource, and environment variables that point to it."""
    return s3_bucket(s3_server, monkeypatch, request.node.name)


def _upload(bucket: Any, *keys: str) -> None:
    for key in keys:
        bucket.put_object(Key=key, Body=key.encode())


def test_class_folders_in_s3_give_classes(bucket: Any) -> None:
    _upload(bucket, "d/train/cat/1.jpg", "d/train/dog/deep/2.jpg", "d/valid/cat/3.jpg")
    _upload(
        bucket,
        "d/valid/dog/",
        "d/train/fox/",
        "d/loose.jpg",
        "d/.git/",
        "d/.git/x",
        "d/train/cat/._1",
    )
    _upload(bucket, "data/train/cat/other.jpg")
    root = f"s3://{bucket.name}/d"
    catalog = sources.labelled_catalog(f"{root}/")
    assert _rows_of(catalog) == [
        ("train/cat/1.jpg", ("cat",), "train"),
        ("train/dog/deep/2.jpg", ("dog",), "train"),
        ("valid/cat/3.jpg", ("cat",), "valid"),
    ]
    assert catalog.root == root
    assert catalog.sizes.tolist() == [17, 22, 17]
    assert (catalog.stamps > 0).all()
    assert (catalog.ignored, catalog.empty_folders) == (3, ("train/fox", "valid/dog"))
    assert catalog.read_file(1, 99) == (b"d/train/dog/deep/2.jpg", None)
    assert sources.labelled_catalog(root).stamps.tolist() == catalog.stamps.tolist()


def test_every_bucket_key_is_listed_once_and_read(bucket: Any) -> None:
    keys = [
        *UNUSUAL_KEYS,
        "a//b.jpg",
        "/top.jpg",
        "a/b/c/d/e.jpg",
        "a",
        *(f"many/{n}" for n in range(1100)),
    ]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: _upload(bucket, key), keys))
    catalog = sources.unlabelled_catalog(f"s3://{bucket.name}")
    assert catalog.paths == sorted(path_text.escape_path(key.encode()) for key in keys)
    rows = [row for row, path in enumerate(catalog.paths) if not path.startswith("many")]
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda row: catalog.read_file(row, 999), rows))
    assert read == [(path_text.unescape_path(catalog.paths[row]), None) for row in rows]


def test_overwritten_object_changes_its_timestamp_and_is_a_fault(bucket: Any) -> None:
    _upload(bucket, "1.jpg", "2.jpg", "3.jpg")
    before = sources.unlabelled_catalog(f"s3://{bucket.name}")
    bucket.put_object(Key="1.jpg", Body=b"other")
    bucket.put_object(Key="2.jpg", Body=b"longer than it was")
    bucket.Object("3.jpg").delete()
    assert before.read_file(0, 99) == (b"", "changed: it was written again after it was listed")
    assert before.read_file(1, 99)[1] == "changed: it had 5 bytes when it was listed, now it has 18"
    assert before.read_file(2, 99) == (b"", "unreadable: No such file or directory")
    after = sources.unlabelled_catalog(f"s3://{bucket.name}")
    assert after.sizes[0] == before.sizes[0]
    assert after.stamps[0] != before.stamps[0]
    assert chunks.shard_name(after, range(1), "r") != chunks.shard_name(before, range(1), "r")
    assert after.read_file(1, 4) == (b"", "too large: 18 bytes, more than 4")


def test_table_in_s3_names_objects_beside_it_or_anywhere_in_the_bucket(bucket: Any) -> None:
    _upload(bucket, "d/1.jpg", "d/a b.jpg", "e/3.jpg")
    base = f"s3://{bucket.name}"
    bucket.put_object(Key="d/t.csv", Body=b"path,labels\n1.jpg,cat\na b.jpg,dog\ngone.jpg,dog\n")
    catalog = sources.labelled_catalog(f"{base}/d/t.csv")
    assert (catalog.root, catalog.paths) == (f"{base}/d", ["1.jpg", "a b.jpg", "gone.jpg"])
    assert catalog.sizes.tolist() == [7, 9, -1]
    assert catalog.read_file(0, 99) == (b"d/1.jpg", None)
    assert catalog.stamps[0] == sources.unlabelled_catalog(f"{base}/d").stamps[0]
    distant = f"path,labels\n1.jpg,cat\n../e/3.jpg,dog\n{base}/d/a b.jpg,dog\n"
    bucket.put_object(Key="d/t.csv", Body=distant.encode())
    catalog = sources.labelled_catalog(f"{base}/d/t.csv")
    assert (catalog.root, catalog.paths) == (base, ["d/1.jpg", "d/a b.jpg", "e/3.jpg"])
    assert catalog.sizes.min() > 0


def test_s3_file_is_copied_to_disk_or_reported_missing(bucket: Any, tmp_path: Path) -> None:
    data = os.urandom(6 << 20)
    bucket.put_object(Key="shelf/bundle/weights", Body=data)
    root = f"s3://{bucket.name}/shelf/bundle"
    reading.download_file(root, "weights", tmp_path / "weights")
    assert (tmp_path / "weights").read_bytes() == data
    for folder in (root, f"{root}/weights", "s3://no-such-bucket/d"):
        with pytest.raises(FileNotFoundError):
            reading.download_file(folder, "bundle.json", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_local_table_may_name_objects_in_s3(bucket: Any, tmp_path: Path) -> None:
    _upload(bucket, "d/1.jpg", "d/2.jpg")
    table = _write_table(tmp_path, "path,labels\n1.jpg,cat\n2.jpg,dog\n")
    catalog = sources.labelled_catalog(table, SourceConfig(images=f"s3://{bucket.name}/d"))
    assert catalog.sizes.tolist() == [7, 7]
    uris = "".join(f"s3://{bucket.name}/d/{n}.jpg,{label}\n" for n, label in ((1, "a"), (2, "b")))
    catalog = sources.labelled_catalog(_write_table(tmp_path, f"path,labels\n{uris}"))
    assert (catalog.root, catalog.paths) == (f"s3://{bucket.name}/d", ["1.jpg", "2.jpg"])


def test_unlistable_store_is_refused_quickly_and_without_secrets(
    bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = time.monotonic()
    for uri, word in (
        ("s3://no-such-bucket/d", "does not exist"),
        (f"s3://{bucket.name}/no/such", "holds nothing"),
        ("s3://name:secret@bucket/d", "password"),
        ("nostore://x/y", "not known"),
    ):
        with pytest.raises(ConfigError, match=word) as error_info:
            sources.unlabelled_catalog(uri)
        assert "secret" not in str(error_info.value)
    with pytest.raises(ConfigError, match="No such file"):
        sources.labelled_catalog(f"s3://{bucket.name}/no.csv")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="Could not connect"):
        sources.unlabelled_catalog(f"s3://{bucket.name}")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(ConfigError, match="credentials"):
        sources.unlabelled_catalog(f"s3://{bucket.name}")
    assert time.monotonic() - start < 60


def test_store_with_a_missing_library_is_refused_with_the_extra_to_install() -> None:
    code = (
        "import sys; sys.modules['s3fs'] = None; from arrowhead import ConfigError; "
        "from arrowhead.data import sources\n"
        "try: sources.unlabelled_catalog('s3://bucket/d')\n"
        "except ConfigError as refusal: print(refusal.do)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert "pip install 'arrowhead[s3]'" in output.stdout


def test_other_fsspec_stores_are_listed_and_read() -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    store = MemoryFileSystem()
    keys = [f"cat/{name}" for name in (*UNUSUAL_KEYS, "new\nline.jpg", ".hidden")] + ["dog/1.jpg"]
    store.pipe({f"/here/{key}": key.encode() for key in keys})
    try:
        catalog = sources.labelled_catalog("memory://here")
        assert catalog.paths == sorted(
            path_text.escape_path(k.encode()) for k in keys if ".hidden" not in k
        )
        assert catalog.ignored == 1
        assert catalog.classes == ["cat", "dog"]
        for row, path in enumerate(catalog.paths):
            assert catalog.read_file(row, 99) == (path_text.unescape_path(path), None)
        assert catalog.read_file(0, 2)[1] == f"too large: {catalog.sizes[0]} bytes, more than 2"
        store.pipe({"/here/dog/1.jpg": b"longer than it was"})
        assert catalog.read_file(len(catalog) - 1, 99)[1].startswith("changed: it had 9 bytes")
        store.rm("/here/dog/1.jpg")
        assert catalog.read_file(len(catalog) - 1, 99)[1] == "unreadable: No such file or directory"
    finally:
        store.rm("/here", recursive=True)
    with pytest.raises(ConfigError, match="holds nothing"):
        sources.unlabelled_catalog("memory://nowhere")


def test_other_stores_detect_same_size_changes_and_are_retried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    store, cat = MemoryFileSystem(), MemoryFileSystem.cat_file
    store.pipe({"/there/1.jpg": b"first", "/there/2.jpg": b"other"})
    broken = [True]

    def once_broken(self: Any, *args: Any, **more: Any) -> bytes:
        if broken.pop() if broken else False:
            raise OSError("connection reset")
        return bytes(cat(self, *args, **more))

    try:
        catalog = sources.unlabelled_catalog("memory://there")
        monkeypatch.setattr(object_store, "RETRY_DELAYS_SECONDS", (0.0, None))
        monkeypatch.setattr(MemoryFileSystem, "cat_file", once_broken)
        assert catalog.read_file(0, 99) == (b"first", None)
        assert broken == []
        store.pipe({"/there/2.jpg": b"again"})
        assert catalog.read_file(1, 99)[1] == "changed: it was written again after it was listed"
    finally:
        store.rm("/there", recursive=True)


def test_sidecars_and_arrowhead_output_in_a_store_are_skipped(
    bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _upload(
        bucket, *(f"d/{name}" for name in ("cat/1.jpg", "dog/2.jpg", "cat/1.txt", "dog/2.json"))
    )
    bucket.put_object(Key="d/dog/photo.txt", Body=b"\xff\xd8\xff\xe0 a JPEG")
    bucket.put_object(Key="d/dog/empty.xml", Body=b"")
    bucket.put_object(Key="d/out/store/store.json", Body=b'{"seal": "0"}')
    _upload(bucket, "d/out/store/shards/1.arrow", "d/mlruns/1/x.png", "d/out/store/golden/1.jpg")
    catalog = sources.labelled_catalog(f"s3://{bucket.name}/d")
    assert catalog.paths == ["cat/1.jpg", "dog/2.jpg", "dog/photo.txt"]
    assert catalog.ignored == 3
    output = " ".join(catalog.notes)
    assert "1 .json, 1 .txt, 1 .xml" in output
    assert "mlruns, out/store" in output
    monkeypatch.setattr(listing, "MAX_HEADER_READS", 1)  # more than are checked one by one
    _upload(bucket, *(f"d/cat/{n}.txt" for n in range(9)))
    catalog = sources.labelled_catalog(f"s3://{bucket.name}/d")
    assert catalog.ignored >= 11


def test_local_sources_do_not_import_the_store_library(tmp_path: Path) -> None:
    _write_files(tmp_path, "cat/1.jpg", "dog/2.jpg")
    code = (
        "import sys; from arrowhead.data import sources; "
        "c = sources.labelled_catalog(sys.argv[1]); c.read_file(0, 99);"
        " assert not {'fsspec', 's3fs', 'botocore'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


@pytest.mark.slow
def test_images_and_a_bundle_in_s3_are_scored_like_local_ones(
    bucket: Any, make_bundle: Any, image_folder: Path, tmp_path: Path, command: Any
) -> None:
    result, images = make_bundle(), sorted((image_folder / "new").iterdir())[:6]
    for file in images:
        bucket.put_object(Key=f"photos/{file.name}", Body=file.read_bytes())
    bucket.put_object(Key="photos/page.jpg", Body=b"<html>not here</html>")
    for file in result.rglob("*"):
        if file.is_file():
            key = f"models/one/{file.relative_to(result)}"
            bucket.put_object(Key=key, Body=file.read_bytes())
    (tmp_path / "here").mkdir()
    for file in images:
        (tmp_path / "here" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "here" / "page.jpg").write_text("<html>not here</html>")
    flags = ["--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    local = command("score", result, tmp_path / "here", tmp_path / "near", *flags, code=3)
    address, photos = f"s3://{bucket.name}/models/one", f"s3://{bucket.name}/photos"
    remote = command("score", address, photos, tmp_path / "far", *flags, code=3)
    assert remote["counts"] == local["counts"] and remote["counts"]["faults"] == 1
    name = "parts/part-000000.parquet"
    assert (tmp_path / "far" / name).read_bytes() == (tmp_path / "near" / name).read_bytes()
    assert not (tmp_path / "far" / ".bundle").exists()
    bundle_info = command("bundle", "info", address)
    assert bundle_info["fingerprint"] == remote["bundle_fingerprint"] == local["bundle_fingerprint"]


@pytest.mark.parametrize(
    "head", ["# photos of 2024\npath,label\n", "# a, b\n#c\npath;label\n", "#path,label\n"]
)
def test_comment_lines_above_a_header_are_skipped(tmp_path: Path, head: str) -> None:
    cut = ";" if ";" in head else ","
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "t.csv").write_text(f"{head}1.jpg{cut}cat\n2.jpg{cut}dog\n")
    catalog = sources.labelled_catalog(tmp_path / "t.csv")
    assert (catalog.paths, catalog.labels) == (["1.jpg", "2.jpg"], [("cat",), ("dog",)])


@pytest.mark.parametrize("code", ["utf-32", "utf-32-le", "utf-32-be"])
def test_utf_32_table_is_refused_as_such(tmp_path: Path, code: str) -> None:
    (tmp_path / "t.csv").write_bytes("path,label\n1.jpg,cat\n".encode(code))
    with pytest.raises(ConfigError, match="UTF-32"):
        sources.labelled_catalog(tmp_path / "t.csv")


def test_eval_and_holdout_mean_validation(tmp_path: Path) -> None:
    for name in ("1.jpg", "2.jpg", "3.jpg"):
        (tmp_path / name).touch()
    for word in ("eval", "holdout"):
        rows = f"1.jpg,a,train\n2.jpg,a,{word}\n3.jpg,b,train\n"
        (tmp_path / "t.csv").write_text(f"path,label,split\n{rows}")
        catalog = sources.labelled_catalog(tmp_path / "t.csv")
        assert catalog.splits == ["train", "valid", "train"]
        assert f"column split: {word} validates" in catalog.notes
    rows = "1.jpg,a,train\n2.jpg,a,val\n3.jpg,b,holdout\n"
    (tmp_path / "t.csv").write_text(f"path,label,split\n{rows}")
    with pytest.raises(ConfigError, match="'holdout' beside 'val' as split: it may mean test"):
        sources.labelled_catalog(tmp_path / "t.csv")
