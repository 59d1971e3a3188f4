"""Copies of images are found, listed and left out."""

from __future__ import annotations

import csv
import io
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from test_bench import load

from arrowhead import ConfigError
from arrowhead.commands import precompute
from arrowhead.data import sources
from arrowhead.data.catalog import Catalog
from arrowhead.data.source_config import SourceConfig
from arrowhead.decode.pixels import PixelConfig
from arrowhead.examine import duplicates, image_matching, near_copies, neighbours
from arrowhead.examine.duplicates import Duplicates, find_duplicates
from arrowhead.examine.near_copies import DuplicateConfig, find_near_copies
from arrowhead.examine.neighbours import UnitVectors, close_pairs
from arrowhead.features.backbone import BodyConfig
from arrowhead.features.feature_config import FeatureConfig
from arrowhead.features.store import Store

SMALL = FeatureConfig(
    body=BodyConfig(body="shufflenet_v2_x0_5", weights="random"), pixels=PixelConfig(size=64)
)


def extract(data: Path, folder: Path) -> tuple[Store, Catalog]:
    """The store of some images, and its catalog."""
    precompute.precompute(str(data), folder, SMALL)
    store = Store(folder)
    return store, Catalog(**store.read_catalog())


def jpeg(image: Image.Image, quality: int = 85) -> bytes:
    """An image as a JPEG file."""
    output = io.BytesIO()
    image.convert("RGB").save(output, "JPEG", quality=quality)
    return output.getvalue()


def group_names(found: Duplicates, catalog: Catalog) -> list[tuple[str, set[str]]]:
    """Kind and file names of each group."""
    return [
        (group.kind, {Path(catalog.paths[row]).name for row in group.rows})
        for group in found.groups
    ]


@pytest.fixture(scope="module")
def planted(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and valid/ of different images, and copies of four of them."""
    root = tmp_path_factory.mktemp("planted") / "data"
    for split, label in (("train", "a"), ("train", "b"), ("valid", "a"), ("valid", "b")):
        (root / split / label).mkdir(parents=True)
    photos = sorted((image_folder / "train").rglob("*.jpg"))[::3]
    for number, photo in enumerate(photos[:16]):
        split = "valid" if number % 4 == 3 else "train"
        shutil.copy(photo, root / split / "ab"[number % 2] / f"{number:02}.jpg")
    shutil.copy(root / "train/a/00.jpg", root / "train/a/exact.jpg")
    shutil.copy(root / "train/b/01.jpg", root / "valid/b/leak.jpg")
    image = Image.open(root / "train/a/02.jpg")
    turned = image.transpose(Image.Transpose.ROTATE_90).resize((90, 120))
    (root / "valid/a/turned.jpg").write_bytes(jpeg(turned))
    image = Image.open(root / "train/b/05.jpg")
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).convert("L")
    (root / "train/a/other_label.jpg").write_bytes(jpeg(mirrored, 50))
    return root


@pytest.fixture(scope="module")
def found(
    planted: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Store, Catalog, Duplicates]:
    """The store of the planted images, its catalog, and the copies."""
    store, catalog = extract(planted, tmp_path_factory.mktemp("found") / "store")
    return store, catalog, find_duplicates(store, catalog)


def test_exact_and_altered_copies_are_found_and_nothing_else(found):
    _, catalog, result = found
    assert sorted(group_names(result, catalog), key=str) == sorted(
        [
            ("exact", {"00.jpg", "exact.jpg"}),
            ("exact", {"01.jpg", "leak.jpg"}),
            ("near", {"02.jpg", "turned.jpg"}),
            ("near", {"05.jpg", "other_label.jpg"}),
        ],
        key=str,
    )
    assert all(group.similarity > 0.75 for group in result.groups)
    assert result.unverified == []
    assert len(result.pairs) == 2  # exact copies need no pair


def test_validation_images_with_a_copy_in_training_are_leaked(found):
    _, catalog, result = found
    leaked = duplicates.leaked_rows(result, np.array(catalog.splits))
    names = {catalog.paths[row] for row in np.flatnonzero(leaked)}
    assert names == {"valid/a/turned.jpg", "valid/b/leak.jpg"}
    assert len(duplicates.groups_across_splits(result, catalog)) == 2


def test_copies_with_different_labels_are_named(found):
    _, catalog, result = found
    (group,) = duplicates.groups_with_different_labels(result, catalog)
    names = {catalog.paths[row] for row in group.rows}
    assert names == {"train/a/other_label.jpg", "train/b/05.jpg"}
    text = "\n".join(duplicates.summarize(result, catalog))
    assert "leaks: 2 of 6 validation and test images" in text
    assert "labels of copies differ: train/a/other_label.jpg (a), train/b/05.jpg (b)" in text


def test_csv_keeps_one_file_of_each_group_and_the_validation_copy_of_a_leak(found, tmp_path):
    _, catalog, result = found
    with duplicates.write_csv(result, catalog, tmp_path / "duplicates.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == duplicates.CSV_COLUMNS
    assert len(rows) == 8
    assert sum(row["keep"] == "yes" for row in rows) == 4
    kept = {row["path"] for row in rows if row["keep"] == "yes"}
    assert {"valid/b/leak.jpg", "valid/a/turned.jpg", "train/a/00.jpg"} <= kept
    sizes = dict(zip(catalog.paths, catalog.sizes, strict=True))
    differ = [row for row in rows if row["labels_differ"] == "yes"]
    largest = max(differ, key=lambda row: sizes[row["path"]])
    assert [row["path"] for row in differ if row["keep"] == "yes"] == [largest["path"]]


def test_drop_leaves_out_copies_without_decoding_again(
    found, planted, tmp_path, command, add_mlflow_db
):
    store, catalog, result = found
    shutil.copytree(store.path, tmp_path / "store")
    drop = duplicates.write_drop_list(result, catalog, tmp_path / "drop.txt")
    with drop.open("a") as file:
        file.write("train/a/never_there.jpg\n")
    uri = f"sqlite:///{add_mlflow_db(tmp_path)}/mlflow.db"
    reply = command(
        "precompute", planted, tmp_path / "store", "--drop", drop, "--tracking-uri", uri
    )
    assert reply["counts"]["decoded"] == 0
    assert reply["counts"]["inputs"] == len(catalog)
    assert reply["counts"]["ignored"] == 4
    assert "--drop drop.txt: 4 images left out" in command.stderr
    assert "1 path is not among the images, such as train/a/never_there.jpg" in command.stderr
    assert "never_there.jpg (below" in command.stderr
    smaller = Store(tmp_path / "store")
    again = find_duplicates(smaller, Catalog(**smaller.read_catalog()))
    assert again.groups == []


def test_a_store_goes_on_without_the_dropped_images_until_they_are_taken_back(
    found, planted, tmp_path, command, add_mlflow_db
):
    store, catalog, _ = found
    shutil.copytree(store.path, tmp_path / "store")
    drop = tmp_path / "drop.txt"
    drop.write_text("train/a/00.jpg\ntrain/b/05.jpg\n")
    uri = f"sqlite:///{add_mlflow_db(tmp_path)}/mlflow.db"
    run = ["precompute", planted, tmp_path / "store", "--tracking-uri", uri]

    def ignored(*flags: object) -> int:
        reply = command(*run, *flags)
        assert reply["counts"]["decoded"] == 0
        return reply["counts"]["ignored"] - catalog.ignored

    assert ignored("--drop", drop) == 2
    assert ignored() == 2
    assert "2 images left out as before" in command.stderr and "dropped.txt" in command.stderr
    drop.write_text("train/a/00.jpg\n")
    assert ignored("--drop", drop) == 1  # another list replaces the first
    assert "1 image left out by an earlier --drop: back again" in command.stderr
    assert ignored("--drop", "none") == 0
    assert "1 image left out by an earlier --drop: back again" in command.stderr
    assert ignored() == 0
    assert "left out" not in command.stderr


def test_a_drop_list_may_have_absolute_paths_also_through_a_link(planted, tmp_path):
    (tmp_path / "link").symlink_to(planted)
    lines = [planted / "train/a/00.jpg", tmp_path / "link/train/a/02.jpg", "/elsewhere/a.jpg"]
    (tmp_path / "drop.txt").write_text("\n".join(map(str, lines)))
    config = SourceConfig(drop=str(tmp_path / "drop.txt"))
    every = sources.labelled_catalog(planted)
    left = sources.labelled_catalog(planted, config)
    assert sorted(set(every.paths) - set(left.paths)) == ["train/a/00.jpg", "train/a/02.jpg"]
    assert "1 path is not among the images, such as /elsewhere/a.jpg" in left.notes[-1]
    plain = sources.unlabelled_catalog(planted, config, distinct=True)
    assert plain.paths == left.paths


def test_a_drop_list_names_files_with_strange_names(tmp_path, image_folder):
    photos = sorted((image_folder / "train").rglob("*.jpg"))
    names = [b"#one.jpg", b"back\\slash.jpg", b"caf\xe9.jpg", b" space.jpg", "ü.jpg".encode()]
    for label in (b"a", b"b"):
        folder = bytes(tmp_path) + b"/data/" + label
        Path(folder.decode()).mkdir(parents=True)
        for photo, name in zip(photos, [*names, b"keep1.jpg", b"keep2.jpg"], strict=False):
            Path((folder + b"/" + name).decode("utf-8", "surrogateescape")).write_bytes(
                photo.read_bytes()
            )
    catalog = sources.labelled_catalog(tmp_path / "data")
    (tmp_path / "raw.txt").write_bytes(b"\r\n".join(b"a/" + name for name in names))
    escaped = [path for path in catalog.paths if path.startswith("a/") and "keep" not in path]
    (tmp_path / "escaped.txt").write_text("# comment\n\n" + "\n".join(escaped))
    for file in ("raw.txt", "escaped.txt"):
        config = SourceConfig(drop=str(tmp_path / file))
        left = sources.labelled_catalog(tmp_path / "data", config)
        assert [path for path in left.paths if path.startswith("a/")] == [
            "a/keep1.jpg",
            "a/keep2.jpg",
        ]
        assert left.ignored == catalog.ignored + 5


def test_a_missing_drop_list_and_one_that_drops_a_class_are_refused(planted, tmp_path):
    with pytest.raises(ConfigError, match=r"--drop .* cannot be read"):
        sources.labelled_catalog(planted, SourceConfig(drop=str(tmp_path / "none.txt")))
    paths = [path for path in sources.labelled_catalog(planted).paths if "/a/" in path]
    (tmp_path / "drop.txt").write_text("\n".join(paths))
    with pytest.raises(ConfigError, match="one class, 'b'"):
        sources.labelled_catalog(planted, SourceConfig(drop=str(tmp_path / "drop.txt")))


def test_pairs_of_missing_files_stay_unverified(found, tmp_path):
    store, _, _ = found
    moved = Catalog(**{**store.read_catalog(), "root": str(tmp_path / "gone")})
    result = find_duplicates(store, moved)
    assert {group.kind for group in result.groups} == {"exact"}
    assert result.unverified
    assert "not verified" in "\n".join(duplicates.summarize(result, moved))


def test_a_file_that_has_changed_is_not_compared_though_size_and_time_are_the_same(found):
    store, catalog, _ = found
    path = Path(catalog.root, "train/b/05.jpg")
    before, stat = path.read_bytes(), path.stat()
    try:
        path.write_bytes(before[:-3] + bytes([before[-3] ^ 1]) + before[-2:])
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        result = find_duplicates(store, catalog)
    finally:
        path.write_bytes(before)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert ("near", {"05.jpg", "other_label.jpg"}) not in group_names(result, catalog)
    assert ("near", {"02.jpg", "turned.jpg"}) in group_names(result, catalog)


def test_without_thumbnails_of_all_only_candidates_are_read(found):
    store, catalog, _ = found
    result = find_duplicates(store, catalog, DuplicateConfig(max_thumbnails=0))
    assert ("exact", {"01.jpg", "leak.jpg"}) in group_names(result, catalog)
    none = find_duplicates(store, catalog, DuplicateConfig(max_rejected_pairs=0))
    assert {group.kind for group in none.groups} == {"exact"}


def test_the_settings_are_checked():
    with pytest.raises(ConfigError, match="min_feature_similarity"):
        DuplicateConfig(min_feature_similarity=0)
    with pytest.raises(ConfigError, match="max_thumbnails"):
        DuplicateConfig(max_thumbnails=-1)


# --------------------------------------------------------------------------- edge cases


def test_black_tiny_and_corrupt_images_do_not_stop_the_search(image_folder, tmp_path):
    root = tmp_path / "data"
    for label in ("a", "b"):
        (root / label).mkdir(parents=True)
    photos = sorted((image_folder / "train").rglob("*.jpg"))
    for number in range(8):
        shutil.copy(photos[5 * number], root / "ab"[number % 2])
    for side in (1, 40, 300):
        Image.new("RGB", (side, side)).save(root / f"a/black{side}.png")
    Image.new("RGB", (50, 40), "white").save(root / "b/white.png")
    (root / "b/corrupt.jpg").write_bytes(photos[0].read_bytes()[:300])
    (root / "b/again.jpg").write_bytes(photos[0].read_bytes()[:300])
    store, catalog = extract(root, tmp_path / "store")
    groups = group_names(find_duplicates(store, catalog), catalog)
    assert groups == [("near", {"black1.png", "black40.png", "black300.png"})]


def test_two_images_are_enough(image_folder, tmp_path):
    photo = min((image_folder / "train").rglob("*.jpg"))
    for label in ("a", "b"):
        (tmp_path / "data" / label).mkdir(parents=True)
    shutil.copy(photo, tmp_path / "data/a/one.jpg")
    (tmp_path / "data/b/two.jpg").write_bytes(jpeg(Image.open(photo), 50))
    (tmp_path / "data.csv").write_text(
        "path,tags,split\ndata/a/one.jpg,sun sea,train\ndata/b/two.jpg,sea,valid\n"
    )
    precompute.precompute(str(tmp_path / "data.csv"), tmp_path / "store", SMALL)
    store = Store(tmp_path / "store")
    catalog = Catalog(**store.read_catalog())
    result = find_duplicates(store, catalog)
    assert group_names(result, catalog) == [("near", {"one.jpg", "two.jpg"})]
    assert len(duplicates.groups_with_different_labels(result, catalog)) == 1
    duplicates.write_csv(result, catalog, tmp_path / "duplicates.csv")
    assert "sea|sun" in (tmp_path / "duplicates.csv").read_text()


def test_a_crowd_of_copies_is_one_group_after_few_comparisons():
    generator = np.random.default_rng(0)
    rows = 2000
    feature = np.ones((rows, 1, 16)) + generator.normal(0, 0.01, (rows, 1, 16))
    grey = image_matching.thumbnail(generator.integers(0, 255, (48, 64)))
    vectors = UnitVectors(shards=[feature.astype(np.float16)], row_M=np.arange(rows))
    result = find_near_copies(vectors, lambda row: grey, DuplicateConfig(max_thumbnails=0))
    components = near_copies.Components()
    for pair in result.pairs:
        components.connect(pair.one, pair.other)
    assert {components.root(row) for row in range(rows)} == {0}
    assert result.compared < 2 * rows


def test_features_of_zeros_have_no_neighbours():
    vectors = UnitVectors(shards=[np.zeros((9, 1, 4), np.float16)], row_M=np.arange(9))
    assert len(close_pairs(vectors, 0.5)) == 0
    empty = UnitVectors(shards=[np.zeros((9, 1, 4), np.float16)], row_M=np.arange(0))
    assert len(close_pairs(empty, 0.5)) == 0


# --------------------------------------------------------------------------- neighbours


def planted_vectors(rows: int, pairs: int, width: int = 48) -> UnitVectors:
    """Random rows in two shards; row 2 i + 1 is close to row 2 i for the first pairs."""
    generator = np.random.default_rng(1)
    feature = generator.normal(size=(rows, 1, width))
    noise = generator.normal(0, 0.3, (pairs, 1, width))
    feature[1 : 2 * pairs : 2] = feature[0 : 2 * pairs : 2] + noise
    shards = np.split(feature.astype(np.float16), [rows // 3])
    return UnitVectors(shards=shards, row_M=np.arange(rows))


def test_close_pairs_are_those_of_a_full_comparison():
    vectors = planted_vectors(300, 40)
    unit = vectors.read(slice(None))
    cosine = np.triu(unit @ unit.T, 1)
    result = close_pairs(vectors, 0.8)
    one, other = np.nonzero(cosine >= 0.8)
    assert set(zip(result.one, result.other, strict=True)) == set(zip(one, other, strict=True))
    assert len(result) >= 40
    np.testing.assert_allclose(result.similarity, cosine[result.one, result.other], atol=1e-5)
    assert (np.diff(result.similarity) <= 0).all()


def test_cells_lose_almost_no_close_pair(monkeypatch):
    monkeypatch.setattr(neighbours, "EXACT_ROWS", 1000)
    monkeypatch.setattr(neighbours, "ROWS_PER_CELL", 100)
    vectors = planted_vectors(8000, 1000)
    result = close_pairs(vectors, 0.8)
    found = set(zip(result.one.tolist(), result.other.tolist(), strict=True))
    unit = vectors.read(slice(0, 2000))
    close = (unit[::2] * unit[1::2]).sum(1) >= 0.8
    wanted = {(2 * i, 2 * i + 1) for i in np.flatnonzero(close).tolist()}
    assert len(wanted) > 900
    assert len(wanted & found) >= 0.99 * len(wanted)


def test_a_crowd_in_one_cell_stays_connected(monkeypatch):
    monkeypatch.setattr(neighbours, "EXACT_ROWS", 100)
    monkeypatch.setattr(neighbours, "ROWS_PER_CELL", 50)
    monkeypatch.setattr(neighbours, "MAX_CELL_ROWS", 200)
    vectors = planted_vectors(3000, 0)
    vectors.shards[1][:, 0] = np.arange(1, 49)  # 2,000 equal rows
    result = close_pairs(vectors, 0.9)
    components = near_copies.Components()
    for one, other in zip(result.one.tolist(), result.other.tolist(), strict=True):
        components.connect(one, other)
    assert {components.root(row) for row in range(1000, 3000)} == {1000}
    assert len(result) <= 3000 * (neighbours.NEIGHBOURS + 1)


# ------------------------------------------------------------------------------- pixels


def thumbnail(data: bytes) -> Any:
    """The thumbnail of a file that can be decoded."""
    result = image_matching.decode_thumbnail(data)
    assert not isinstance(result, str)
    return result


def test_altered_photos_are_the_same_photo_and_others_are_not(dogscats):
    bench = load("duplicates")
    photos = [Image.open(file).convert("RGB") for file in sorted(dogscats.rglob("*.jpg"))[::80]]
    originals = [thumbnail(jpeg(photo, 92)) for photo in photos]
    missed = []
    for name, alter in (bench.MILD | bench.HARD).items():
        for number, (photo, original) in enumerate(zip(photos, originals, strict=True)):
            scores = image_matching.similarity(original, thumbnail(alter(photo)))
            if not image_matching.is_same_photo(*scores):
                missed.append((name, number, scores))
    assert len(missed) <= 1, missed
    for number, original in enumerate(originals):
        for other in originals[:number]:
            assert not image_matching.is_same_photo(*image_matching.similarity(original, other))


def test_turned_and_mirrored_squares_become_equal():
    generator = np.random.default_rng(0)
    square = image_matching.square_details(
        image_matching.thumbnail(generator.integers(0, 255, (64, 48)))
    )
    forms = np.stack(list(image_matching.orientations(square)))
    turned = image_matching.turn_alike(forms, image_matching.smooth_pattern(generator))
    assert len(np.unique(forms, axis=0)) == 8
    assert (turned == turned[0]).all()


def test_two_photos_in_the_same_frame_are_different(image_folder):
    photos = [Image.open(file) for file in sorted((image_folder / "train").rglob("*.jpg"))[::18]]
    framed = [thumbnail(load("duplicates").HARD["border 15 %"](photo)) for photo in photos]
    for number, one in enumerate(framed):
        for other in framed[:number]:
            whole, _ = image_matching.similarity(one, other)
            assert whole < image_matching.MIN_WHOLE


def test_a_file_that_is_no_image_gives_a_fault():
    assert "corrupt" in str(image_matching.decode_thumbnail(b"not an image"))


def weave(period: float, angle: float, seed: int, things: float = 0) -> NDArray[Any]:
    """Grey pixels of a woven cloth; things: how bright or dark the nine things on it are."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:240, :240]
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    threads = np.sin(2 * np.pi * along / period) * np.sin(2 * np.pi * across / period)
    pixels = 128 + 80 * threads + rng.normal(0, 8, (240, 240))
    for left, top in rng.uniform(40, 200, (9, 2)):
        blob = np.exp(-((x - left) ** 2 + (y - top) ** 2) / 200)
        pixels += things * blob * rng.choice((-1, 1))
    return pixels.clip(0, 255)


def test_patterns_that_repeat_are_not_copies_of_each_other():
    one, other = weave(20, 0.1, 1), weave(23, 0.15, 2)
    small = [image_matching.thumbnail(pixels) for pixels in (one, other)]
    assert not image_matching.is_same_photo(*image_matching.similarity(*small))
    brighter = image_matching.thumbnail((one * 0.9 + 20).clip(0, 255))
    assert image_matching.is_same_photo(*image_matching.similarity(small[0], brighter))


def test_a_cropped_copy_of_things_on_a_pattern_is_found_and_other_things_are_not():
    one, other = weave(20, 0.1, 1, 80), weave(21, 0.12, 51, 80)
    small, cropped, different = map(image_matching.thumbnail, (one, one[12:-12, 12:-12], other))
    assert image_matching.repetition(small) > image_matching.MIN_REPETITION
    scores = image_matching.similarity(small, cropped)
    assert image_matching.is_same_photo(*scores) and max(scores) < 0.9
    assert not image_matching.is_same_photo(*image_matching.similarity(small, different))
