"""Slices: properties of originals, columns of a table, and which slices are named."""

from __future__ import annotations

import csv
import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy import stats

from arrowhead.data import sources
from arrowhead.data.catalog import Catalog
from arrowhead.data.source_config import SourceConfig
from arrowhead.errors import ConfigError
from arrowhead.examine import image_properties, properties, sections, slices, table_columns, tables
from arrowhead.examine.image_properties import ImagePropertiesConfig, measure_image
from arrowhead.examine.properties import Property
from arrowhead.examine.slices import HeldOutImages, SliceConfig

FEW = SliceConfig(permutations=500)


def encoded(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def measured(image: Image.Image, form: str = "JPEG", **options: Any) -> dict[str, float]:
    result = measure_image(encoded(image, form, **options))
    assert result is not None
    return dict(zip(image_properties.PIXEL_PROPERTIES, result.values, strict=True))


def photo(folder: Path) -> Image.Image:
    return Image.open(min(folder.rglob("*.jpg"))).convert("RGB")


def ids(count: int) -> np.ndarray:
    return np.random.default_rng(5).permutation(count).astype(np.uint64)


# ------------------------------------------------------------------------- image properties


def test_properties_of_a_flat_color_are_exact():
    values = measured(Image.new("RGB", (300, 200), (100, 50, 200)), "PNG")
    assert (values["width"], values["height"], values["aspect"]) == (300, 200, 1.5)
    assert values["brightness"] == pytest.approx(0.299 * 100 + 0.587 * 50 + 0.114 * 200, abs=1e-3)
    assert values["contrast"] == pytest.approx(0, abs=1e-3)
    assert values["sharpness"] == pytest.approx(0, abs=1e-3)
    # Hasler and Süsstrunk, for rg = 50 and yb = 75 - 200, without deviation
    assert values["colourfulness"] == pytest.approx(0.3 * np.hypot(50, -125), abs=1e-3)


def test_a_blurred_photo_is_less_sharp_and_a_dark_one_less_bright(image_folder):
    original = photo(image_folder)
    blurred = measured(original.filter(ImageFilter.GaussianBlur(4)))
    dark = measured(original.point(lambda value: value // 3))
    plain = measured(original)
    assert blurred["sharpness"] < plain["sharpness"] / 2
    assert dark["brightness"] == pytest.approx(plain["brightness"] / 3, rel=0.05)
    assert dark["contrast"] == pytest.approx(plain["contrast"] / 3, rel=0.05)


def test_jpeg_decoded_small_measures_like_the_whole_image(image_folder):
    large = photo(image_folder).resize((2048, 1536), Image.Resampling.BICUBIC)
    reduced, whole = measured(large, quality=95), measured(large, "PNG")
    for name in ("brightness", "contrast", "colourfulness"):
        assert reduced[name] == pytest.approx(whole[name], rel=0.03)


def test_exif_orientation_makes_width_and_height_upright(image_folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = photo(image_folder).resize((320, 200))
    rotated = measured(image, exif=exif)
    assert (rotated["width"], rotated["height"]) == (200, 320)
    assert rotated["brightness"] == measured(image)["brightness"]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "I;16", "1"])
def test_every_kind_of_png_is_measured(mode, image_folder):
    source = photo(image_folder)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(source.convert("L")).astype(np.uint16) * 257)
    else:
        image = source.convert(mode)
    values = measured(image, "PNG")
    assert values["brightness"] == pytest.approx(measured(source)["brightness"], abs=25)
    assert (values["colourfulness"] < 1) == (mode not in ("P", "RGBA"))


def test_a_bad_file_has_no_pixel_properties_and_raises_nothing(image_folder, tmp_path):
    data = next((image_folder / "valid").rglob("*.jpg")).read_bytes()
    folder = tmp_path / "data"
    files = {
        "a/good.jpg": data,
        "a/cut.jpg": data[: len(data) // 3],
        "a/text.jpg": b"not an image",
        "a/empty.jpg": b"",
        "b/changed.jpg": data,
        "b/gone.jpg": data,
        "b/large.png": encoded(Image.new("RGB", (200, 200)), "PNG"),
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    catalog = sources.labelled_catalog(folder)
    (folder / "b/changed.jpg").write_bytes(data + b"x")
    (folder / "b/gone.jpg").unlink()
    row = np.arange(len(catalog))
    config = ImagePropertiesConfig(max_pixels=30_000)
    small = image_properties.measure_images(catalog, row, ids(len(row)), config)
    result = image_properties.measure_images(catalog, row, ids(len(row)))
    names = [path.rpartition("/")[2] for path in catalog.paths]
    readable = {name for name, width in zip(names, result.width, strict=True) if width > 0}
    assert readable == {"good.jpg", "large.png"}
    assert result.unreadable == 5 and result.file_size[names.index("gone.jpg")] == len(data)
    assert np.isnan(small.width[names.index("large.png")])
    assert dict(zip(names, result.color, strict=True))["large.png"] == "grey"
    assert dict(zip(names, result.format, strict=True))["good.jpg"] == "JPEG"


def test_sample_is_drawn_by_content_and_measured_alike(image_folder):
    catalog = sources.labelled_catalog(image_folder / "train")
    row, image_id = np.arange(len(catalog)), ids(len(catalog))
    config = ImagePropertiesConfig(max_images=10)
    result = image_properties.measure_images(catalog, row, image_id, config)
    assert sorted(image_id[result.row]) == list(range(10))
    backwards = image_properties.measure_images(catalog, row[::-1], image_id[::-1], config)
    np.testing.assert_array_equal(backwards.row, result.row)
    np.testing.assert_array_equal(backwards.sharpness, result.sharpness)


def test_originals_in_an_object_store_are_measured(image_folder):
    import fsspec

    files = fsspec.filesystem("memory")
    for number, path in enumerate(sorted((image_folder / "valid").rglob("*.jpg"))[:4]):
        files.pipe(f"/slices/{'ab'[number % 2]}/{number}.jpg", path.read_bytes())
    catalog = sources.labelled_catalog("memory://slices")
    result = image_properties.measure_images(catalog, np.arange(4), ids(4))
    assert result.unreadable == 0 and (result.brightness > 0).all()


# -------------------------------------------------------------------------------- statistics


def random_properties(size: int, rng: np.random.Generator) -> list[Property]:
    level = rng.integers(0, 5, size)
    numbers = rng.normal(size=(3, size))
    noisy = numbers[0] + 0.2 * rng.normal(size=size)
    given = [Property(name="camera", value=level, levels=tuple("abcde"))]
    return given + [
        Property(name=name, value=value)
        for name, value in zip(("x", "y", "z", "like x"), (*numbers, noisy), strict=True)
    ]


def test_data_without_slices_names_one_in_at_most_5_of_100_runs():
    named = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        given, correct = random_properties(300, rng), rng.random(300) < 0.95
        named += bool(slices.find_slices(correct, np.arange(300), given, FEW).worse)
    assert named <= 5


def test_planted_slice_is_named_first_in_95_of_100_runs():
    first = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        given = random_properties(400, rng)
        planted = np.argsort(given[1].value)[:60]
        accuracy = np.full(400, 0.97)
        accuracy[planted] = 0.75
        report = slices.find_slices(rng.random(400) < accuracy, np.arange(400), given, FEW)
        if report.worse:
            hit = np.isin(report.worse[0].row, planted).mean()
            first += report.worse[0].property in ("x", "like x") and hit > 0.5
    assert first >= 95


def test_p_values_equal_those_of_fishers_exact_test():
    rng = np.random.default_rng(3)
    given, correct = random_properties(200, rng), rng.random(200) < 0.8
    report = slices.find_slices(correct, np.arange(200), given, FEW)
    for one in report.slices:
        right, rest = round(one.accuracy * one.images), round(one.rest_accuracy * one.rest_images)
        table = [[one.images - right, right], [one.rest_images - rest, rest]]
        assert one.p == pytest.approx(stats.fisher_exact(table, alternative="greater").pvalue)
        assert one.p <= one.adjusted_p <= 1
        assert one.images + one.rest_images == 200 == report.images
        assert one.difference_low < one.difference < one.difference_high


def test_adjusted_p_value_is_the_share_of_shuffles_with_a_smaller_one():
    rng = np.random.default_rng(4)
    value = rng.integers(0, 2, 60)
    given = [Property(name="side", value=value, levels=("left", "right"))]
    correct = rng.random(60) < np.where(value == 0, 0.5, 0.9)
    config = SliceConfig(permutations=20000)
    report = slices.find_slices(correct, np.arange(60), given, config)
    left, right = sorted(report.slices, key=lambda one: one.name)
    # Of the two sides one or the other is worse: twice the tail of Fisher's test.
    errors, images = int((~correct).sum()), int((value == 0).sum())
    observed = int((~correct & (value == 0)).sum())
    count = np.arange(0, errors + 1)
    weight = stats.hypergeom.pmf(count, 60, errors, images)
    tails = stats.hypergeom.sf(count - 1, 60, errors, images)
    other = stats.hypergeom.cdf(count, 60, errors, images)
    exact = weight[np.minimum(tails, other) <= tails[observed] * (1 + 1e-9)].sum()
    assert left.adjusted_p == pytest.approx(exact, abs=4 * np.sqrt(exact / 20000))
    assert right.adjusted_p > 0.9


def test_the_same_call_gives_the_same_report():
    rng = np.random.default_rng(0)
    given, correct = random_properties(300, rng), rng.random(300) < 0.9
    one, two = (slices.find_slices(correct, np.arange(300), given, FEW) for _ in range(2))
    assert [(s.name, s.adjusted_p) for s in one.slices] == [
        (s.name, s.adjusted_p) for s in two.slices
    ]


def test_the_worst_slice_is_told_with_the_column_that_has_much_the_same_images():
    size = 400
    blurred_N = np.arange(size) < 60
    other_N = np.roll(~blurred_N, 2).astype(np.int64)  # all but two of the phone's are blurred
    camera = Property(name="camera", value=other_N, levels=("phone", "sony"))
    sharpness = Property(name="sharpness", value=np.arange(size) + 100.0)
    correct_N = np.where(blurred_N, np.arange(size) % 2, 1.0)
    worst = slices.find_slices(correct_N, np.arange(size), [sharpness, camera]).worse[0]
    assert "camera: phone" in sections.slice_sentence(worst)


def test_properties_that_select_the_same_images_are_named_once():
    rng = np.random.default_rng(1)
    width = rng.permutation(400).astype(float)
    given = [
        Property(name="width", value=width),
        Property(name="file size", value=width * 3.5),
        Property(name="height", value=width + rng.normal(0, 8, 400)),
        Property(name="camera", value=(width >= 60).astype(np.int64), levels=("old", "new")),
    ]
    correct = rng.random(400) < np.where(width < 60, 0.6, 0.98)
    report = slices.find_slices(correct, np.arange(400), given, FEW)
    assert len(report.worse) == 1
    assert report.worse[0].name == "width below 60"
    assert any(name.startswith("height") for name in report.worse[0].same_images)
    assert not any(one.property == "file size" for one in report.slices)
    assert sorted(report.worse[0].row) == np.flatnonzero(width < 60).tolist()


def test_two_different_slices_are_both_named_the_worse_first():
    rng = np.random.default_rng(2)
    given = random_properties(1000, rng)
    dark, camera = given[2].value < np.quantile(given[2].value, 0.1), given[0].value == 3
    accuracy = np.where(dark, 0.5, np.where(camera, 0.75, 0.99))
    report = slices.find_slices(rng.random(1000) < accuracy, np.arange(1000), given, FEW)
    assert [one.property for one in report.worse] == ["y", "camera"]
    assert report.worse[1].name == "camera: d"
    assert report.worse[0].p <= report.worse[1].p


def test_a_large_bad_slice_hides_no_smaller_one():
    rng = np.random.default_rng(13)
    given = random_properties(600, rng)
    camera, dark = given[0].value == 3, given[2].value < np.quantile(given[2].value, 0.08)
    accuracy = np.where(camera, 0.2, np.where(dark, 0.72, 0.98))
    correct = rng.random(600) < accuracy
    report = slices.find_slices(correct, np.arange(600), given, FEW)
    at_first = min(one.adjusted_p for one in report.slices if one.property == "y")
    assert at_first > FEW.max_p  # among the other images are all errors of the camera
    assert [one.property for one in report.worse] == ["camera", "y"]
    first, second = report.worse
    assert (first.without, second.without) == ((), ("camera: d",))
    assert not set(first.row) & set(second.row)
    assert first.images + second.images + second.rest_images == 600
    assert second.accuracy == correct[second.row].mean()


def test_with_one_bad_slice_another_is_named_in_at_most_5_of_100_runs():
    others = 0
    for seed in range(100):
        rng = np.random.default_rng(1000 + seed)
        given = random_properties(300, rng)
        accuracy = np.where(given[0].value == 3, 0.4, 0.95)
        report = slices.find_slices(rng.random(300) < accuracy, np.arange(300), given, FEW)
        assert report.worse[0].name == "camera: d"
        others += len(report.worse) > 1
    assert others <= 5


def test_images_that_were_not_measured_are_left_out_of_the_comparison():
    rng = np.random.default_rng(6)
    value = rng.normal(size=600)
    value[200:] = np.nan
    label = rng.integers(0, 2, 600)
    given = [
        Property(name="brightness", value=value, sampled=True),
        Property(name="label", value=label, levels=("a", "b")),
    ]
    dark = value < np.nanquantile(value, 0.2)
    correct = rng.random(600) < np.where(dark, 0.4, 0.97)
    report = slices.find_slices(correct, np.arange(600), given, FEW)
    by_property = {one.property: one for one in reversed(report.slices)}
    assert by_property["brightness"].images + by_property["brightness"].rest_images == 200
    assert by_property["label"].images + by_property["label"].rest_images == 600
    assert report.worse[0].property == "brightness"


def test_shares_of_right_labels_are_compared_like_right_images():
    rng = np.random.default_rng(7)
    given = random_properties(400, rng)
    bad = given[0].value == 2
    correct = (rng.random((400, 12)) < np.where(bad, 0.8, 0.95)[:, None]).mean(1)
    report = slices.find_slices(correct, np.arange(400), given, FEW)
    assert report.worse[0].name == "camera: c"
    assert report.worse[0].accuracy == pytest.approx(correct[bad].mean())
    shuffled = slices.find_slices(rng.permutation(correct), np.arange(400), given, FEW)
    assert not shuffled.worse


@pytest.mark.parametrize("correct", [np.ones(100, bool), np.zeros(100, bool), np.zeros(0, bool)])
def test_a_model_that_is_always_right_or_always_wrong_has_no_worse_slice(correct):
    given = random_properties(len(correct), np.random.default_rng(0))
    report = slices.find_slices(correct, np.arange(len(correct)), given, FEW)
    assert report.worse == ()
    assert all(one.p == 1 for one in report.slices)


def test_no_slice_is_smaller_than_the_minimum():
    rng = np.random.default_rng(8)
    given, correct = random_properties(150, rng), rng.random(150) < 0.9
    report = slices.find_slices(correct, np.arange(150), given, replace(FEW, min_images=40))
    assert report.slices
    assert all(min(one.images, one.rest_images) >= 40 for one in report.slices)


def test_equal_numbers_are_never_divided():
    value = np.repeat([1.0, 2.0, 3.0], [30, 200, 70])
    given = [Property(name="x", value=value)]
    report = slices.find_slices(np.arange(300) % 7 > 0, np.arange(300), given, FEW)
    assert {one.images for one in report.slices} <= {30, 200, 70, 230, 270}


def test_predicted_labels_are_listed_but_not_tested():
    names = [("cats",)] * 90 + [("dogs",)] * 60
    given = properties.label_properties("predicted label", names, tested=False)
    report = slices.find_slices(np.arange(150) < 90, np.arange(150), given, FEW)
    assert [one.accuracy for one in report.slices] == [0, 1]
    assert all(one.p is None for one in report.slices)
    assert report.worse == () and report.tested == 0


@pytest.mark.parametrize("change", [{"min_images": 0}, {"max_p": 1.5}, {"permutations": 10}])
def test_settings_that_make_no_sense_are_refused(change):
    with pytest.raises(ConfigError, match="--"):
        SliceConfig(**change)


def test_csv_has_the_worse_slices_first_and_no_formula(tmp_path):
    rng = np.random.default_rng(9)
    camera = rng.integers(0, 4, 400)
    given = [Property(name="=camera", value=camera, levels=("=1+1", "b", "c", "d"))]
    correct = rng.random(400) < np.where(camera == 0, 0.7, 0.97)
    report = slices.find_slices(correct, np.arange(400), given, FEW)
    tables.write_table(tmp_path, "slices", report.table())
    with (tmp_path / "slices.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["slice"] == "'=camera: =1+1" and rows[0]["worse"] == "yes"
    assert [row["worse"] for row in rows[1:]] == ["no"] * 3
    assert float(rows[0]["accuracy"]) == report.worse[0].accuracy
    assert float(rows[0]["low"]) < float(rows[0]["accuracy"]) < float(rows[0]["high"])


# --------------------------------------------------------------------------- table columns


HEADER = ("image", "breed", "camera", "age", "patient", "stars", "note")


def write_table(
    path: Path, image_folder: Path, separator: str = ",", prefix: str = "", strip: bool = False
) -> int:
    lines = [separator.join(HEADER)]
    files = sorted((image_folder / "train").rglob("*.jpg"))
    for number, file in enumerate(files):
        name = prefix + file.relative_to(image_folder / "train").as_posix()
        cells = [name.removesuffix(".jpg") if strip else name, file.parent.name]
        cells += [("Canon", "Nikon")[number % 2], str(20 + number / 2) if number % 9 else ""]
        cells += [str(1000 + number), str(number % 5), f"text {number}"]
        lines.append(separator.join(cells))
    path.write_text("\n".join(lines) + "\n")
    return len(files)


@pytest.mark.parametrize(
    ("separator", "prefix", "strip", "config"),
    [
        (",", "", False, {"images": "train"}),
        (";", "train/", False, {}),
        ("\t", "", True, {"images": "train", "suffix": ".jpg"}),
        (",", ".\\train\\", False, {}),
    ],
)
def test_columns_of_a_table_are_joined_without_its_flags(
    image_folder, tmp_path, separator, prefix, strip, config
):
    shutil.copytree(image_folder / "train", tmp_path / "train")
    table = tmp_path / "labels.csv"
    count = write_table(table, image_folder, separator, prefix, strip)
    flags = {name: str(tmp_path / v) if name == "images" else v for name, v in config.items()}
    source = SourceConfig(**flags, path_column="image", label_column="breed")
    catalog = sources.labelled_catalog(table, source)
    row = np.arange(0, count, 3)
    found, notes = table_columns.read_table_columns(catalog, row)
    by_name = {one.name: one for one in found if one.levels != (table_columns.EMPTY,)}
    assert set(by_name) == {"breed", "camera", "age", "stars"}
    assert notes == ["left out: 2 columns of identifiers (patient, note)"]
    expected = {line.split(separator)[0]: line for line in table.read_text().splitlines()}
    for position, number in enumerate(row.tolist()):
        stem = catalog.paths[number].removeprefix("train/").removesuffix(".jpg")
        line = next(v for k, v in expected.items() if stem in k.replace("\\", "/"))
        cells = dict(zip(HEADER, line.split(separator), strict=True))
        camera = by_name["camera"]
        assert camera.levels[camera.value[position]] == cells["camera"]
        age = by_name["age"].value[position]
        assert age == float(cells["age"]) if cells["age"] else np.isnan(age)
        stars = by_name["stars"]
        assert stars.levels[stars.value[position]] == cells["stars"]
    empty = next(one for one in found if one.levels == (table_columns.EMPTY,))
    np.testing.assert_array_equal(empty.value == 0, np.isnan(by_name["age"].value))


def test_a_table_that_is_gone_or_has_changed_is_reported(image_folder, tmp_path):
    shutil.copytree(image_folder / "train", tmp_path / "train")
    table = tmp_path / "labels.csv"
    count = write_table(table, image_folder, ",", "train/")
    catalog = sources.labelled_catalog(table, SourceConfig(label_column="breed"))
    lines = table.read_text().splitlines()
    table.write_text("\n".join(lines[:-10]) + "\n")
    found, notes = table_columns.read_table_columns(catalog, np.arange(count))
    camera = next(one for one in found if one.name == "camera")
    assert (camera.value == camera.levels.index(table_columns.EMPTY)).sum() == 10
    assert f"names {count - 10} of these {count} images" in notes[0]
    table.write_text("image,camera\nother.jpg,Canon\n")
    found, notes = table_columns.read_table_columns(catalog, np.arange(count))
    assert found == [] and "it has changed, and no column names the images" in notes[0]
    table.write_text("image,camera\nother.jpg\n")
    found, notes = table_columns.read_table_columns(catalog, np.arange(count))
    assert found == [] and "line 2" in notes[0]
    table.unlink()
    found, notes = table_columns.read_table_columns(catalog, np.arange(count))
    assert found == [] and "cannot be read" in notes[0]


def test_files_of_one_name_in_two_folders_are_not_mixed_up(image_folder, tmp_path):
    files = sorted((image_folder / "train").rglob("*.jpg"))[:8]
    for number, file in enumerate(files):
        target = tmp_path / "photos" / "ab"[number % 2] / f"{number // 2}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    table = tmp_path / "labels.csv"
    rows = [f"photos/{'ab'[n % 2]}/{n // 2}.jpg,{'xy'[n % 2]},camera {n % 2}" for n in range(8)]
    table.write_text("\n".join(["path,label,camera", *rows]) + "\n")
    catalog = sources.labelled_catalog(table)
    found, _ = table_columns.read_table_columns(catalog, np.arange(8))
    camera = next(one for one in found if one.name == "camera")
    levels = [camera.levels[value] for value in camera.value.tolist()]
    assert levels == [f"camera {int('/b/' in path)}" for path in catalog.paths]
    table.write_text("path,label,camera\n" + "".join(f"{n}.jpg,x,one\n" for n in range(4)))
    found, notes = table_columns.read_table_columns(catalog, np.arange(8))
    assert found == [] and "has changed" in notes[0]


def test_folders_are_slices_at_every_depth():
    paths = [f"valid/{site}/{label}/{n}.jpg" for site in "pq" for label in "xy" for n in range(30)]
    catalog = Catalog(
        root="/nowhere",
        paths=sorted(paths),
        sizes=np.zeros(120, np.int64),
        stamps=np.zeros(120, np.int64),
        labels=[(path.split("/")[2],) for path in sorted(paths)],
        splits=["valid"] * 120,
    )
    given = properties.catalog_properties(catalog, np.arange(120))
    report = slices.find_slices(np.arange(120) >= 30, np.arange(120), given, FEW)
    names = {one.name for one in report.slices}
    assert {"label: x", "folder: valid/p", "folder: valid/q", "folder: valid/p/x"} <= names
    assert report.worse[0].name == "folder: valid/p/x"


# ------------------------------------------------------------------------------ end to end


@pytest.mark.usefixtures("one_thread")
def test_darkened_photos_and_a_bad_camera_are_found_on_real_photos(dogscats, mobilenet, tmp_path):
    """A table source: 40 validation photos are darkened, and another camera's labels are wrong."""
    import torch

    from arrowhead.commands import precompute
    from arrowhead.commands import train as commands_train
    from arrowhead.features.backbone import BodyConfig
    from arrowhead.features.feature_config import FeatureConfig
    from arrowhead.features.store import Store
    from arrowhead.training import heads
    from arrowhead.training.config import TrainConfig
    from arrowhead.training.study import Study

    rng = np.random.default_rng(0)
    lines = ["file,label,split,camera,serial"]
    for split, per_class in (("train", 30), ("valid", 100)):
        for label in ("cats", "dogs"):
            for number, path in enumerate(sorted((dogscats / split / label).iterdir())[:per_class]):
                target = tmp_path / "photos" / f"{split}-{label}-{number}.jpg"
                target.parent.mkdir(exist_ok=True)
                image = Image.open(path).convert("RGB")
                if split == "valid" and number < 20:
                    image = image.point(
                        lambda value: value // 100
                    )  # hardly anything is left to see
                image.save(target, quality=90)
                camera = "ABC"[int(rng.integers(3))]
                wrong = split == "valid" and number >= 75
                if wrong:
                    camera = "D"
                shown = label if not wrong else {"cats": "dogs", "dogs": "cats"}[label]
                serial = f"{split}{label}{number}"
                lines.append(f"photos/{target.name},{shown},{split},{camera},{serial}")
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(lines) + "\n")
    body = BodyConfig(
        body="mobilenet_v2", weights=mobilenet[3], mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    )
    images = FeatureConfig(body=body, source=SourceConfig(path_column="file"))
    precompute.precompute(table, tmp_path / "store", images)
    store = Store(tmp_path / "store")
    catalog, valid = Catalog(**store.read_catalog()), store.features("valid")
    trained = commands_train.run_study(store.path, Study(head=TrainConfig(head="logistic")))
    names = store.manifest()["classes"]
    state = {name: torch.from_numpy(value) for name, value in trained.winner.state.items()}
    head = heads.restore_head(trained.config.architecture, store.recipe.width, len(names), state)
    with torch.inference_mode():
        logit = head(torch.from_numpy(valid.feature[:, 0].astype(np.float32)))
    predicted = logit.argmax(1).numpy()
    held_out = HeldOutImages(
        row=valid.row,
        image_id=valid.image_id,
        correct=predicted == valid.label,
        predicted=[(names[index],) for index in predicted],
    )
    report = slices.examine_slices(catalog, held_out)
    assert report.notes == ("left out: 1 column of identifiers (serial)",)
    # A bad slice as large as this hides the smaller one, which is found without it.
    assert report.worse[0].name == "camera: D"
    dark = report.worse[1]
    assert dark.without == ("camera: D",)
    assert dark.property in (
        "brightness",
        "contrast",
        "sharpness",
        "colourfulness",
        "colors",
        "file size (KB)",
    )
    darkened = [int(catalog.paths[r].split("-")[-1][:-4]) < 20 for r in dark.row.tolist()]
    assert np.mean(darkened) > 0.9
