"""The most novel images of a store, those unlike their class, and its faults."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arrowhead.commands import precompute
from arrowhead.data.catalog import Catalog
from arrowhead.evaluation import novelty
from arrowhead.examine import faults, outliers, tables
from arrowhead.features.backbone import BodyConfig
from arrowhead.features.feature_config import FeatureConfig
from arrowhead.features.store import Store

pytestmark = pytest.mark.usefixtures("one_thread")
K = novelty.K


def save_noise(path: Path, *, flip: bool = False) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    Image.fromarray(noise[::-1] if flip else noise).save(path)


@pytest.fixture(scope="module")
def drawn_store(image_folder, tmp_path_factory) -> Store:
    """Drawn images, ten copies of an odd one, and bad files."""
    folder = tmp_path_factory.mktemp("odd")
    photos = folder / "photos"
    for split in ("train", "valid"):
        shutil.copytree(image_folder / split, photos / split)
    for number in range(10):
        save_noise(photos / "train" / "beads" / f"copy{number}.png")
    data = min((photos / "train" / "leaves").iterdir()).read_bytes()
    for number in range(3):
        (photos / "train" / "beads" / f"cut{number}.jpg").write_bytes(data[: 900 + number])
    (photos / "valid" / "beads" / "=text.jpg").write_bytes(b"no image at all")
    body = BodyConfig(body="shufflenet_v2_x0_5", weights="random")
    precompute.precompute(photos, folder / "store", FeatureConfig(body=body))
    return Store(folder / "store")


@pytest.fixture(scope="module")
def altered_store(dogscats, mobilenet, tmp_path_factory) -> Store:
    """Real photos: ten copies of noise in train, other noise in valid, a dog among the cats."""
    folder = tmp_path_factory.mktemp("photos")
    for split, per_class in (("train", 30), ("valid", 20)):
        for label in ("cats", "dogs"):
            (folder / "photos" / split / label).mkdir(parents=True)
            for path in sorted((dogscats / split / label).iterdir())[:per_class]:
                shutil.copy(path, folder / "photos" / split / label)
    for number in range(10):
        save_noise(folder / "photos" / "train" / "cats" / f"copy{number}.png")
    save_noise(folder / "photos" / "valid" / "cats" / "noise.png", flip=True)
    dog = max((dogscats / "train" / "dogs").iterdir())
    shutil.copy(dog, folder / "photos" / "train" / "cats" / "wrong.jpg")
    half = (0.5, 0.5, 0.5)
    body = BodyConfig(body="mobilenet_v2", weights=mobilenet[3], mean=half, std=half)
    precompute.precompute(folder / "photos", folder / "store", FeatureConfig(body=body))
    return Store(folder / "store")


def reference_distances(store: Store) -> tuple[np.ndarray, np.ndarray]:
    """Distance and class gap of every readable image, one image at a time."""
    images = store.features()
    feature = images.feature[:, 0].astype(np.float32)
    train = images.split == "train"
    mean, std = feature[train].mean(0), feature[train].std(0)
    unit = (feature - mean) / np.where(std > novelty.MIN_STD, std, 1)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    bank = unit.astype(np.float16).astype(np.float32)
    distance, gap = np.zeros((2, len(images.row)))
    for i in range(len(images.row)):
        to_bank = np.sqrt(np.maximum(2 - 2 * bank @ unit[i], 0))
        others = train & (images.image_id != images.image_id[i])
        own = others & (images.label == images.label[i])
        foreign = others & (images.label != images.label[i])
        distance[i] = np.sort(to_bank[others])[K - 1]
        gap[i] = np.sort(to_bank[own])[K - 1] - np.sort(to_bank[foreign])[K - 1]
    return distance, gap


def test_distances_equal_those_to_other_training_images_one_by_one(drawn_store):
    result, row = outliers.find_outliers(drawn_store), drawn_store.features(rows_only=True).row
    distance, gap = reference_distances(drawn_store)
    np.testing.assert_allclose(result.distance[row], distance, atol=2e-3)
    np.testing.assert_allclose(result.class_gap[row], gap, atol=4e-3)
    missing = np.setdiff1d(np.arange(len(result.distance)), row)
    assert len(missing) == 4 and np.isnan(result.distance[missing]).all()


def test_copies_of_an_odd_image_do_not_hide_it(altered_store):
    catalog = Catalog(**altered_store.read_catalog())
    result = outliers.find_outliers(altered_store, top=10)
    assert all("copy" in catalog.paths[row] for row in result.novel["train"].tolist())
    assert result.novel["train"].tolist() == sorted(result.novel["train"].tolist())
    assert set(result.novel) == {"train", "valid"}
    assert result.threshold < result.distance[result.novel["train"]].min()


def test_lists_hold_the_largest_values_first_and_no_more_than_asked(drawn_store):
    result = outliers.find_outliers(drawn_store, top=4)
    catalog = Catalog(**drawn_store.read_catalog())
    for split, rows in result.novel.items():
        of_split = np.array([name == split for name in catalog.splits])
        largest = np.sort(result.distance[of_split & np.isfinite(result.distance)])[::-1][:4]
        np.testing.assert_array_equal(result.distance[rows], largest)
    gap = result.class_gap[result.unlike_class]
    assert (gap > 0).all() and (np.diff(gap) <= 0).all() and len(gap) <= 4
    assert len(outliers.find_outliers(drawn_store, top=0).unlike_class) == 0


def test_image_in_the_wrong_class_folder_is_unlike_its_class(altered_store):
    catalog = Catalog(**altered_store.read_catalog())
    result = outliers.find_outliers(altered_store, top=10)
    assert any(catalog.paths[row].endswith("wrong.jpg") for row in result.unlike_class.tolist())


def test_a_bank_smaller_than_the_training_split_gives_similar_distances(drawn_store, monkeypatch):
    whole = outliers.find_outliers(drawn_store)
    monkeypatch.setattr(novelty, "MAX_BANK_ROWS", 60)
    monkeypatch.setattr(novelty, "BATCH_ROWS", 7)
    part = outliers.find_outliers(drawn_store)
    known = np.isfinite(whole.distance)
    np.testing.assert_array_equal(np.isfinite(part.distance), known)
    assert np.corrcoef(part.distance[known], whole.distance[known])[0, 1] > 0.8


def test_distances_do_not_depend_on_the_size_of_blocks(drawn_store, monkeypatch):
    whole = outliers.find_outliers(drawn_store)
    monkeypatch.setattr(novelty, "BATCH_ROWS", 7)
    np.testing.assert_allclose(outliers.find_outliers(drawn_store).distance, whole.distance, 1e-4)


def test_outliers_csv_lists_every_row_with_its_numbers(drawn_store, tmp_path):
    catalog, result = (
        Catalog(**drawn_store.read_catalog()),
        outliers.find_outliers(drawn_store, top=3),
    )
    tables.write_table(tmp_path, "outliers", result.table(catalog))
    with (tmp_path / "outliers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["list"] for row in rows[:6]] == ["novel"] * 6
    assert rows[0]["path"] == catalog.paths[result.novel["train"][0]]
    assert float(rows[0]["distance"]) == pytest.approx(result.distance[result.novel["train"][0]])
    assert {row["list"] for row in rows[6:]} == {"unlike its class"}


# ---------------------------------------------------------------------------------- faults


def test_faults_are_counted_by_kind_with_examples(drawn_store):
    found = faults.find_faults(drawn_store, max_examples=2)
    assert [(one.kind, one.images) for one in found] == [("truncated", 3), ("not an image", 1)]
    assert [Path(path).name for path, _ in found[0].examples] == ["cut0.jpg", "cut1.jpg"]
    assert found[1].examples[0][1].startswith("not an image:")


def test_faults_csv_lists_every_bad_file_and_no_formula(drawn_store, tmp_path):
    tables.write_table(tmp_path, "faults", faults.fault_table(drawn_store))
    with (tmp_path / "faults.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    assert {row["kind"] for row in rows} == {"truncated", "not an image"}
    assert rows[-1]["path"] == "valid/beads/=text.jpg"


def test_a_store_without_faults_has_none(image_folder, tmp_path):
    body = BodyConfig(body="shufflenet_v2_x0_5", weights="random")
    precompute.precompute(image_folder / "valid", tmp_path / "store", FeatureConfig(body=body))
    store = Store(tmp_path / "store")
    assert faults.find_faults(store) == []
    assert faults.fault_table(store) == []


def test_black_white_flat_and_blurred_images_are_named_and_others_are_not(dogscats, tmp_path):
    from PIL import Image, ImageFilter

    from arrowhead.data import sources
    from arrowhead.data.source_config import SourceConfig
    from arrowhead.examine import image_properties, poor_images

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    photos = sorted((dogscats / "valid" / "cats").iterdir())[:8]
    image = Image.open(photos[0]).convert("RGB")
    altered = {
        "black": image.point(lambda value: value // 12),
        "white": image.point(lambda value: 245 + value // 30),
        "flat": image.point(lambda value: 120 + value // 40),
        "blurred": image.filter(ImageFilter.GaussianBlur(20)),
    }
    for name, one in altered.items():
        one.save(tmp_path / "a" / f"{name}.png")
    for photo in photos:
        shutil.copy(photo, tmp_path / "b")
    catalog = sources.labelled_catalog(tmp_path, SourceConfig())
    rows = np.arange(len(catalog))
    measured = image_properties.measure_images(catalog, rows, rows.astype(np.uint64))
    found = poor_images.by_reason(measured)
    named = {reason: [catalog.paths[row] for row in rows] for reason, rows in found.items()}
    assert named == {
        "nearly black": ["a/black.png"],
        "nearly white": ["a/white.png"],
        "hardly any contrast": ["a/flat.png"],
        "very blurred": ["a/blurred.png"],
    }
