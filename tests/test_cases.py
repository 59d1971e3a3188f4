"""Typical data sets: the files of each source are extracted, reported and counted correctly.

The data sets have the layouts of `../shared/cases` and consist of synthetic images. `precompute`
runs as a user runs it, with a small random backbone. All use one store, so that an image is decoded
once.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from arrowhead import ConfigError
from arrowhead.data import sources
from arrowhead.data.catalog import Catalog
from arrowhead.features.store import Store

Extracted = Callable[..., tuple[dict[str, Any], Catalog, str]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that all tests of this file extract to."""
    return tmp_path_factory.mktemp("cases") / "store"


@pytest.fixture
def extract_source(store: Path, command: Any, add_mlflow_db: Any, tmp_path: Path) -> Extracted:
    """A function that extracts a source and returns the result, the catalog and standard error."""
    folder = add_mlflow_db(tmp_path)

    def extract(source: Path, *flags: str, code: int = 0) -> tuple[dict[str, Any], Catalog, str]:
        body = ["--body", "shufflenet_v2_x0_5", "--weights", "random", "--size", "64"]
        uri = ["--tracking-uri", f"sqlite:///{folder}/mlflow.db"]
        result = command("precompute", source, store, *body, *uri, *flags, code=code)
        return result, Catalog(**Store(store).read_catalog()), command.stderr

    return extract


def _photos(image_folder: Path, label: str) -> list[Path]:
    return sorted((image_folder / "train" / label).iterdir())


def _tree(root: Path, image_folder: Path, *splits: str, count: int = 6) -> Path:
    """ROOT/<split>/<class>/… of different images; without splits ROOT/<class>/…"""
    for at, split in enumerate(splits or ("",)):
        for label in ("baskets", "beads"):
            target = root / split / label
            target.mkdir(parents=True)
            for photo in _photos(image_folder, label)[at * count : (at + 1) * count]:
                shutil.copy(photo, target)
    return root


def _table(path: Path, header: str, rows: Iterable[tuple[object, ...]], **options: Any) -> Path:
    encoding = options.pop("encoding", "utf-8")
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.writer(file, **options)
        writer.writerow(header.split(","))
        writer.writerows(rows)
    return path


def _rows(image_folder: Path, count: int = 10) -> list[tuple[str, str]]:
    class_names = {"baskets": "American Basket", "beads": "Saint Bead"}
    photos = [photo for label in class_names for photo in _photos(image_folder, label)[:count]]
    return [
        (str(photo.relative_to(image_folder)), class_names[photo.parent.name]) for photo in photos
    ]


@pytest.mark.parametrize(
    "splits",
    [("train", "val"), ("Train", "Validation"), ("Training", "Validation", "test_set")],
)
def test_split_folders_are_recognized_by_their_usual_names(
    image_folder: Path, tmp_path: Path, extract_source: Extracted, splits: tuple[str, ...]
) -> None:
    result, catalog, output = extract_source(
        _tree(tmp_path / "data", image_folder, *splits, count=5)
    )
    assert result["classes"] == ["baskets", "beads"]
    names = ("train", "valid", "test")
    counts = {name: 10 for name, _ in zip(names, splits, strict=False)}
    assert {name: catalog.splits.count(name) for name in set(catalog.splits)} == counts
    assert f"{splits[0]}/ trains (10 files), {splits[1]}/ validates (10 files)" in output


def test_train_and_test_folders_are_splits_and_a_share_of_train_validates(
    image_folder: Path, tmp_path: Path, extract_source: Extracted
) -> None:
    data = _tree(tmp_path / "data", image_folder, "train_set", "test_set", count=9)
    result, catalog, output = extract_source(data)
    assert result["classes"] == ["baskets", "beads"]
    counts = [catalog.splits.count(name) for name in ("train", "valid", "test")]
    assert counts == [14, 4, 18]
    assert "a share of train_set/ is held out" in output


def test_a_table_may_have_labels_with_spaces_and_ids_of_nested_files(
    image_folder: Path, tmp_path: Path, extract_source: Extracted
) -> None:
    rows = [(Path(path).stem, label) for path, label in _rows(image_folder)]
    table = _table(tmp_path / "labels.csv", "id,breed", rows)
    result, catalog, output = extract_source(
        table, "--images", str(image_folder), "--suffix", ".jpg"
    )
    assert result["classes"] == ["American Basket", "Saint Bead"]
    assert "task: one label for each image, 2 classes: American Basket, Saint Bead" in output
    assert "column id names the images, column breed the labels" in output
    assert "20 of 20 images found by name in folders below" in output
    assert result["counts"]["features"] == 20
    assert catalog.splits.count("valid") == 4  # two of each ten


@pytest.mark.parametrize(
    ("column", "words"),
    [("split", ("train", "val")), ("is_valid", ("False", "True")), ("is_valid", ("0", "1"))],
)
def test_a_column_of_split_names_or_booleans_selects_the_validation_images(
    image_folder: Path,
    tmp_path: Path,
    extract_source: Extracted,
    column: str,
    words: tuple[str, str],
) -> None:
    rows = [(*row, words[at % 5 == 0]) for at, row in enumerate(_rows(image_folder))]
    table = _table(tmp_path / "labels.csv", f"path,label,{column}", rows)
    _, catalog, _ = extract_source(table, "--images", str(image_folder))
    held_out = {rows[at][0].rpartition("/")[2] for at in range(0, 20, 5)}
    split_of = {p.rpartition("/")[2]: s for p, s in zip(catalog.paths, catalog.splits, strict=True)}
    assert {name for name, split in split_of.items() if split == "valid"} == held_out


@pytest.mark.parametrize(
    "how",
    [
        {"delimiter": ";"},
        {"delimiter": "\t", "encoding": "utf-16"},
        {"encoding": "utf-8-sig"},
        {"encoding": "cp1252"},
    ],
)
def test_a_table_is_read_in_any_common_delimiter_and_encoding(
    image_folder: Path, tmp_path: Path, extract_source: Extracted, how: dict[str, Any]
) -> None:
    rows = [
        (path.replace("/", "\\"), label.replace("e", "\u00e9"))
        for path, label in _rows(image_folder)
    ]
    table = _table(tmp_path / "labels.csv", "path,label", rows, **how)
    result, _, _ = extract_source(table, "--images", str(image_folder))
    assert result["classes"] == ["Am\u00e9rican Bask\u00e9t", "Saint B\u00e9ad"]
    assert (result["counts"]["features"], result["counts"]["faults"]) == (20, 0)


def test_a_folder_without_class_folders_is_refused_and_score_is_suggested(
    image_folder: Path,
) -> None:
    with pytest.raises(ConfigError, match="24 images without a class folder") as refusal:
        sources.labelled_catalog(image_folder / "new")
    assert "score" in refusal.value.do


def test_sidecar_files_are_ignored_and_counted_not_faults(
    image_folder: Path, tmp_path: Path, extract_source: Extracted
) -> None:
    data = _tree(tmp_path / "data", image_folder, "train", "valid")
    for photo in list(data.rglob("*.jpg")):
        photo.with_suffix(".json").write_text('{"label": "x"}')
        photo.with_suffix(".txt").write_text("0 0.5 0.5 1 1")
    (data / "train" / "beads" / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (data / "train" / "beads" / "README").write_text("Beads.")
    result, _, output = extract_source(data)
    counts = {name: result["counts"][name] for name in ("inputs", "features", "faults", "ignored")}
    assert counts == {"inputs": 74, "features": 24, "faults": 0, "ignored": 50}
    assert "24 .json, 24 .txt, 1 README: not images by name and content, ignored" in output


def test_a_class_of_one_image_is_trained_on_and_reported(
    image_folder: Path, tmp_path: Path, extract_source: Extracted
) -> None:
    data = _tree(tmp_path / "data", image_folder, count=15)
    for number, photo in enumerate(_photos(image_folder, "leaves")[:8]):
        (data / f"rare{number}").mkdir()
        shutil.copy(photo, data / f"rare{number}")
    _, catalog, output = extract_source(data)
    pairs = list(zip(catalog.labels, catalog.splits, strict=True))
    assert [pairs.count(((f"rare{n}",), "train")) for n in range(8)] == [1] * 8
    assert [pairs.count(((label,), "valid")) for label in ("baskets", "beads")] == [3, 3]
    assert "no image validates rare0, rare1" in output


def test_output_written_into_the_image_folder_does_not_change_the_counts(
    image_folder: Path,
    tmp_path: Path,
    add_mlflow_db: Any,
    command: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = add_mlflow_db(_tree(tmp_path / "data", image_folder, count=15))
    monkeypatch.chdir(data)
    body = ["--body", "shufflenet_v2_x0_5", "--weights", "random", "--size", "64"]
    overrides = ["--epochs", "2", "--rate", "0.01"]
    first = command("fit", ".", "out", *body, *overrides)
    again = command("fit", ".", "out", *body, *overrides)
    assert "ignored, written by Arrowhead or MLflow" in command.stderr
    for name in ("inputs", "features", "faults", "ignored"):
        assert first["counts"][name] == again["counts"][name]
    assert again["classes"] == ["baskets", "beads"]
    assert again["metrics"]["accuracy"] == first["metrics"]["accuracy"]
    one, two = (command("score", "out/bundle", ".", "scores") for _ in range(2))
    assert one["counts"]["inputs"] == two["counts"]["inputs"] == 30
    assert json.loads((data / "scores" / "score.json").read_text())["counts"]["ignored"] == 0


def test_rare_classes_are_reported_with_their_recall(
    image_folder: Path, tmp_path: Path, add_mlflow_db: Any, command: Any
) -> None:
    data = _tree(tmp_path / "data", image_folder, "train", "valid")
    for photo in sorted((data / "train" / "beads").iterdir())[2:]:
        photo.unlink()
    body = ["--body", "shufflenet_v2_x0_5", "--weights", "random", "--size", "64"]
    uri = ["--tracking-uri", f"sqlite:///{add_mlflow_db(tmp_path)}/mlflow.db"]
    result = command("fit", data, tmp_path / "out", *body, *uri, "--epochs", "2", "--rate", "0.01")
    assert "unbalanced: 6 training images of baskets, few of beads (2: recall" in command.stderr
    assert f"balanced {result['metrics']['balanced_accuracy']:.4f}" in command.stderr
