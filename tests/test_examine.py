"""`arrowhead examine`, and the report that `fit` and `train` end with."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import polars
import pytest
from conftest import AddMlflowDb, Command

from arrowhead import ConfigError, Learner
from arrowhead.bundle import format as bundle_format
from arrowhead.cli.main import main
from arrowhead.data.catalog import Catalog
from arrowhead.examine import predictions, thumbnails
from arrowhead.examine.config import ExamineConfig
from arrowhead.examine.galleries import ImageRanking, choose_galleries
from arrowhead.examine.originals import Originals, Wanted, read_pixels
from arrowhead.examine.predictions import Predictions
from arrowhead.examine.report import Report
from arrowhead.examine.report_cache import ReportCache
from arrowhead.features.store import Store

SMALL = ["--body", "shufflenet_v2_x0_5", "--weights", "random", "--size", "64"]
HOSTILE = "a<script>alert(1)<&script>\"'.jpg"  # a name cannot contain /


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory, add_mlflow_db: AddMlflowDb) -> Path:
    """A working directory with a bundle, its store and its report."""
    return add_mlflow_db(tmp_path_factory.mktemp("examine"))


@pytest.fixture(autouse=True)
def _run_in_workdir(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workdir)


@pytest.fixture
def fitted(workdir: Path, image_folder: Path, command: Command, with_reports: None) -> Path:
    """OUT of `fit` on synthetic images, one with a hostile name and one that cannot be read."""
    if not (workdir / "out").exists():
        shutil.copytree(image_folder, workdir / "data", ignore=shutil.ignore_patterns("new"))
        first = min((workdir / "data" / "valid" / "beads").iterdir())
        first.rename(first.with_name(HOSTILE))
        (workdir / "data" / "train" / "beads" / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
        flags = ["--head", "linear", "--epochs", "3", "--extract.max-faults", "0.1"]
        result = command("fit", "data", "out", *SMALL, *flags)
        (workdir / "result.json").write_text(json.dumps(result))
    return workdir / "out"


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What a command says that is refused with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        main([*map(str, words)])
    assert exit_info.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def predicted(fitted: Path) -> Predictions:
    store, bundle = Store(fitted / "store"), bundle_format.load(fitted / "bundle")
    return predictions.predict(store, bundle)


def test_fit_ends_with_a_report_beside_the_bundle(fitted, workdir):
    result = json.loads((workdir / "result.json").read_text())
    assert result["report"] == "out/bundle.report/report.html"
    assert result["report"] in result["files"]
    folder = fitted / "bundle.report"
    expected = {"report.html", "report.json", "figures", "tables"}
    expected |= {"label_errors.csv", "label_errors.parquet"}
    copies = {"duplicates.csv", "duplicates.parquet", "drop.txt"}
    assert {path.name for path in folder.iterdir()} - copies == expected
    rows = polars.read_parquet(folder / "label_errors.parquet")
    csv = polars.read_csv(folder / "label_errors.csv", infer_schema=False)
    assert rows["path"].to_list() == csv["path"].to_list()
    assert rows["score"].is_sorted(descending=True)
    figures = {path.name for path in (folder / "figures").iterdir()}
    names = ("confusion", "reliability", "roc_and_precision_recall", "training", "lr_finder")
    assert {f"{name}.{suffix}" for name in names for suffix in ("png", "svg")} <= figures


def test_no_report_leaves_the_report_out(fitted, command, with_reports):
    result = command("train", "out/store", "plain", "--head", "linear", "--no-report")
    assert result["report"] is None
    assert not Path("plain.report").exists()


def test_report_is_attached_to_the_run_that_trained_the_bundle(fitted, workdir, command):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri="sqlite:///mlflow.db")
    trained = json.loads((workdir / "result.json").read_text())["run_id"]
    assert "report/report.html" in {f.path for f in client.list_artifacts(trained, "report")}
    result = command("examine", "out/store", "out/bundle", "again")
    assert result["attached_to"] == trained != result["run_id"]


def test_predictions_have_the_metrics_of_the_bundle(fitted, predicted):
    metrics = bundle_format.load(fitted / "bundle").metrics
    assert predicted.correct[predicted.held_out].mean() == pytest.approx(metrics["accuracy"])
    assert predicted.held_out.sum() == metrics["images"]


def test_tables_hold_one_row_per_readable_image(fitted, predicted):
    rows = polars.read_parquet(fitted / "bundle.report" / "tables" / "predictions.parquet")
    assert len(rows) == len(predicted) == 72
    assert rows["correct"].to_list() == predicted.correct.tolist()
    assert sorted(rows["path"])[:1] == ["train/baskets/" + min(rows["path"]).rpartition("/")[2]]
    csv = polars.read_csv(fitted / "bundle.report" / "tables" / "predictions.csv")
    assert csv["path"].to_list() == rows["path"].to_list()


def test_galleries_show_held_out_images_in_their_order(predicted):
    for gallery in choose_galleries(predicted):
        assert predicted.held_out[gallery.index].all()
        assert len(set(gallery.index.tolist())) == len(gallery.index)
    ranking = ImageRanking(predicted)
    held_out = np.flatnonzero(predicted.held_out)
    losses = ranking.top_losses()
    assert (np.diff(predicted.loss[losses]) <= 0).all()
    assert set(losses.tolist()) == set(held_out.tolist())
    assert (np.diff(predicted.margin[ranking.most_uncertain()]) >= 0).all()
    for index, _ in enumerate(predicted.classes):
        right, wrong = ranking.most_correct(index), ranking.most_incorrect(index)
        assert predicted.correct[right].all()
        assert not predicted.correct[wrong].any()
        assert (np.diff(predicted.label_probability[right]) <= 0).all()
        assert (np.diff(predicted.label_probability[wrong]) >= 0).all()
        assert len(right) + len(wrong) == (predicted.label[held_out] == index).sum()


def test_report_names_unreadable_files(fitted):
    summary = json.loads((fitted / "bundle.report" / "report.json").read_text())
    assert any(re.search(r"1 file could not be read", text) for text in summary["first"])


def test_page_has_no_unescaped_name(fitted):
    page = (fitted / "bundle.report" / "report.html").read_text()
    assert "a<script>alert" not in page
    assert "a&lt;script&gt;alert(1)" in page


def test_report_of_a_store_whose_originals_are_gone_says_so(fitted, workdir, command):
    shutil.move(workdir / "data", workdir / "elsewhere")
    try:
        command("examine", "out/store", "out/bundle", "gone")
    finally:
        shutil.move(workdir / "elsewhere", workdir / "data")
    assert "The original cannot be read." in Path("gone/report.html").read_text()


def test_examine_replaces_only_its_own_folder(fitted, capsys):
    Path("mine").mkdir(exist_ok=True)
    Path("mine/notes.txt").write_text("mine")
    assert "notes.txt" in refusal(capsys, "examine", "out/store", "out/bundle", "mine")
    assert Path("mine/notes.txt").read_text() == "mine"


def test_a_store_of_another_recipe_is_refused(fitted, command, capsys, image_folder):
    command(
        "precompute", image_folder / "train", "other", *SMALL[:-1], "80", "--valid-share", "0.3"
    )
    assert "size = 80" in refusal(capsys, "examine", "other", "out/bundle", "never")
    assert not Path("never").exists()


def test_a_store_with_classes_that_the_bundle_does_not_know_is_refused(
    fitted, command, capsys, image_folder
):
    shutil.copytree(image_folder / "train" / "beads", "two/pearls", dirs_exist_ok=True)
    shutil.copytree(image_folder / "train" / "leaves", "two/leaves", dirs_exist_ok=True)
    command("precompute", "two", "two-store", *SMALL)
    assert "pearls" in refusal(capsys, "examine", "two-store", "out/bundle", "never")


def test_several_labels_have_galleries_and_a_report(workdir, command, image_folder, with_reports):
    rows = ["path,label"]
    for path in sorted((image_folder / "train").glob("*/*.jpg")):
        labels = path.parent.name + ("|even" if path.stem[-1] in "02468" else "")
        rows.append(f"{path},{labels}")
    Path("tags.csv").write_text("\n".join(rows))
    flags = ["--multi-label", "--head", "linear", "--epochs", "2", "--rate", "0.01"]
    command("fit", "tags.csv", "tags", *SMALL, *flags)
    page = Path("tags/bundle.report/report.html").read_text()
    assert "(missing)" in page or "(not labelled)" in page
    summary = json.loads(Path("tags/bundle.report/report.json").read_text())
    assert 0 <= summary["metrics"]["f2_samples"] <= 1


def test_thumbnails_are_upright_and_small(tmp_path):
    from PIL import Image

    image = Image.new("RGB", (400, 200), "white")
    image.paste("red", (0, 0, 200, 200))  # red on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees clockwise: red on top
    image.save(tmp_path / "turned.jpg", exif=exif)
    data = (tmp_path / "turned.jpg").read_bytes()
    made = thumbnails.make_thumbnail(data, 100)
    assert (made.width, made.height) == (50, 100)
    pixels = np.asarray(thumbnails.decode_small(data, 100))
    assert pixels[:40, :, 1].mean() < 60 < 200 < pixels[60:, :, 1].mean()
    assert thumbnails.make_thumbnail(b"not an image", 100) is None


@pytest.mark.parametrize("side", [90, 1500])
def test_thumbnails_of_16_bit_images_are_neither_black_nor_missing(tmp_path, side):
    from PIL import Image

    ramp = np.linspace(0, 65535, side * side, dtype=np.uint16).reshape(side, side)
    Image.fromarray(ramp).save(tmp_path / "x.png")
    pixels = np.asarray(thumbnails.decode_small((tmp_path / "x.png").read_bytes(), 64))
    assert pixels.shape == (64, 64, 3)
    assert pixels[:8].mean() < 40 < 100 < pixels[24:40].mean() < 160 < 220 < pixels[-8:].mean()


def test_learner_shows_pictures_and_writes_the_report(fitted, workdir):
    from arrowhead import Images

    learn = Learner("shufflenet_v2_x0_5", Images.from_folder("data"), store="out/store")
    learn.fit(0.01, 2)
    classes = learn.images.classes
    shown = [
        learn.show_correct(),
        learn.show_incorrect(),
        learn.show_most_correct(classes[0]),
        learn.show_most_incorrect(classes[0]),
        learn.show_most_correct(),
        learn.show_most_incorrect(),
        learn.show_most_uncertain(4),
        learn.show_top_losses(),
        learn.plot_confusion(),
    ]
    assert all(figure.axes for figure in shown)
    assert len([axes for axes in shown[6].axes if axes.images]) == 4
    mistakes = sum(count for _, _, count in learn.most_confused(100))
    log_prob = learn.predict()
    assert mistakes == (log_prob.argmax(1) != learn.images.valid_labels).sum()
    assert learn.report("learner-report").is_file()
    with pytest.raises(ConfigError, match="is not a class"):
        learn.show_most_correct("zebras")


def test_a_file_that_was_replaced_with_the_same_size_and_time_is_not_shown(fitted, tmp_path):
    catalog = Catalog(**Store(fitted / "store").read_catalog())
    originals = Originals.of(Store(fitted / "store"), catalog)
    path = Path("data") / catalog.paths[0]
    before, stat = path.read_bytes(), path.stat()
    assert originals.read(0) == before
    try:
        path.write_bytes(before[:-3] + bytes([before[-3] ^ 1]) + before[-2:])
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert catalog.read_file(0, 2**20)[1] is None  # nothing but the content tells
        assert originals.read(0) is None
        assert originals.map([0], len) == {0: None}
    finally:
        path.write_bytes(before)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_each_original_is_read_once_before_the_analyses(fitted):
    catalog = Catalog(**Store(fitted / "store").read_catalog())
    originals = Originals.of(Store(fitted / "store"), catalog)
    reads = []
    read = originals.read
    originals.read = lambda row: reads.append(row) or read(row)
    wanted = Wanted(measured=[0, 1, 2], grey=[1, 2, 3], thumbnails=[2, 3], tiles=[3, 5])
    pixels = read_pixels(originals, wanted, 64, 16)
    assert sorted(reads) == [0, 1, 2, 3, 5]
    assert [*pixels.measured] == [0, 1, 2]
    assert pixels.measured[0].format == "JPEG"
    assert [max(pixels.grey[row].shape) for row in (1, 2, 3)] == [64] * 3
    assert max(pixels.thumbnails[2].width, pixels.thumbnails[2].height) == 64
    assert max(pixels.tiles[5].size) == 16


def test_the_next_report_reads_only_the_originals_that_it_shows(fitted, tmp_path, monkeypatch):
    cache = fitted / "store" / "report_cache.json"
    cache.unlink(missing_ok=True)
    reads, read = [], Originals.read
    monkeypatch.setattr(Originals, "read", lambda self, row: reads.append(row) or read(self, row))
    config = ExamineConfig(pictures=1, map=False, heatmaps=False, label_errors=False)
    counts, pages = [], []
    for name in ("first", "again"):
        before = len(reads)
        (tmp_path / name).mkdir()
        Report(fitted / "store", fitted / "bundle", config).write(tmp_path / name)
        counts.append(len(reads) - before)
        page = (tmp_path / name / "report.html").read_text()
        pages.append(re.sub(r"\d\d:\d\d UTC", "", page))
    assert counts[1] < counts[0]
    assert pages[0] == pages[1]
    assert len(ReportCache(Store(fitted / "store")).properties([0, 1])) == 2
    cache.write_bytes(cache.read_bytes().replace(b"JPEG", b"jpeg"))
    assert ReportCache(Store(fitted / "store")).properties([0, 1]) == {}


def test_originals_that_cannot_be_read_give_no_thumbnail(fitted):
    catalog = Catalog(**Store(fitted / "store").read_catalog())
    broken = catalog.paths.index("train/beads/broken.jpg")
    originals = Originals.of(Store(fitted / "store"), catalog)
    made = originals.map([0, broken], lambda data: thumbnails.make_thumbnail(data, 64))
    assert made[broken] is None
    assert made[0].webp.startswith(b"RIFF")
