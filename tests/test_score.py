"""Scoring: every input has a row, in order, with the same numbers as in training."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forks
import numpy as np
import polars
import pyarrow.parquet as pq
import pytest
from conftest import AddMlflowDb

from arrowhead import ConfigError, DataError, fileio
from arrowhead.bundle import format as bundle_format
from arrowhead.bundle import replay
from arrowhead.cli.main import main
from arrowhead.data import sources
from arrowhead.data.catalog import Catalog
from arrowhead.features.store import Store
from arrowhead.inference.score_request import ScoreConfig

FLAGS = ["--body", "resnet18", "--weights", "random", "--size", "64"]


@pytest.fixture(scope="module")
def workdir(
    tmp_path_factory: pytest.TempPathFactory, image_folder: Path, add_mlflow_db: AddMlflowDb
) -> Path:
    """A folder with a fitted bundle, its store, and images to score."""
    folder = add_mlflow_db(tmp_path_factory.mktemp("score"))
    shutil.copytree(image_folder, folder / "photos", ignore=shutil.ignore_patterns("new"))
    shutil.copytree(image_folder / "new", folder / "new")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        with pytest.raises(SystemExit) as exit_info:
            main(["fit", "photos", "out", *FLAGS, "--epochs", "4", "--rate", "0.01"])
    assert exit_info.value.code == 0
    return folder


@pytest.fixture(autouse=True)
def _change_directory(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workdir)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "scores"


def read_rows(out: Path) -> polars.DataFrame:
    return polars.read_parquet(out / "parts")


def read_probabilities(out: Path) -> Any:
    """float32 (N, C)."""
    return read_rows(out)["probabilities"].struct.unnest().to_numpy()


def exit_code(*words: object) -> int:
    with pytest.raises(SystemExit) as exit_info:
        main([*map(str, words)])
    return int(exit_info.value.code or 0)


# ------------------------------------------------------------------------- inputs, in order


def test_list_is_scored_in_order_including_repeated_files(command, out, tmp_path, workdir):
    names = [file.name for file in sorted((workdir / "new").iterdir())][:5]
    listed = [
        names[3],
        names[0],
        "gone.jpg",
        str(workdir / "new" / names[1]),
        names[0],
        "./" + names[2],
    ]
    (tmp_path / "some.txt").write_text("\n".join(listed) + "\n\n")
    result = command(
        "score", "out/bundle", tmp_path / "some.txt", out, "--base", workdir / "new", code=3
    )
    assert (
        result["counts"]["inputs"] == 6 == result["counts"]["scored"] + result["counts"]["faults"]
    )
    table = read_rows(out)
    assert table["path"].to_list() == [names[3], names[0], "gone.jpg", names[1], names[0], names[2]]
    assert table["fault"].is_null().to_list() == [True, True, False, True, True, True]
    alone = command("score", "out/bundle", workdir / "new", tmp_path / "all")
    assert alone["counts"]["faults"] == 0
    known = {row["path"]: row["probability"] for row in read_rows(tmp_path / "all").to_dicts()}
    for row in table.to_dicts():
        if row["fault"] is None:
            # A matrix product of another shape may differ in its last bit.
            assert row["probability"] == pytest.approx(known[row["path"]], rel=1e-6)


def test_table_with_other_columns_is_scored_in_order(command, out, tmp_path, workdir):
    names = [file.stem for file in sorted((workdir / "new").iterdir())][:4][::-1]
    with (tmp_path / "t.csv").open("w", newline="") as file:
        sheet = csv.writer(file)
        sheet.writerow(["shop", "path"])
        sheet.writerows([["a, b", name] for name in names])
    flags = ["--base", workdir / "new", "--suffix", ".jpg"]
    command("score", "out/bundle", tmp_path / "t.csv", out, *flags)
    assert read_rows(out)["path"].to_list() == [f"{name}.jpg" for name in names]


def test_list_of_missing_files_only_is_refused(out, tmp_path, capsys):
    (tmp_path / "none.txt").write_text("a.jpg\nb.jpg\n")
    assert exit_code("score", "out/bundle", tmp_path / "none.txt", out) == 2
    assert "a.jpg" in capsys.readouterr().err


def test_list_without_labels_is_refused_for_training(out, tmp_path, capsys):
    (tmp_path / "some.txt").write_text("a.jpg\n")
    assert exit_code("precompute", tmp_path / "some.txt", out, *FLAGS) == 2
    assert "no labels" in capsys.readouterr().err


# --------------------------------------------------------------------------- what is written


def test_parts_record_their_origin_and_counts_add_up(command, out):
    actual = command("score", "out/bundle", "new", out, "--chunk-size", "8")
    result, counts = json.loads(Path("out/bundle/bundle.json").read_text()), actual["counts"]
    assert counts["inputs"] == counts["scored"] + counts["faults"] == 24
    assert json.loads((out / "score.json").read_text())["counts"] == counts
    assert actual["roofline"] and actual["seconds"]["forward"] > 0
    parts = sorted((out / "parts").glob("part-*.parquet"))
    assert len(parts) > 1
    for part in parts:
        notes = pq.read_schema(part).metadata
        assert json.loads(notes[b"arrowhead.recipe"]) == result["recipe"]
        assert notes[b"arrowhead.bundle"].decode() == bundle_format.fingerprint(Path("out/bundle"))
        assert notes[b"arrowhead.run_id"].decode() == result["lineage"]["run_id"]
        assert notes[b"arrowhead.version"].decode() == result["lineage"]["arrowhead"]
        codecs = {pq.read_metadata(part).row_group(0).column(i).compression for i in range(3)}
        assert codecs == {"ZSTD"}


def test_scored_features_equal_the_store_and_a_store_saves_decoding(command, out, tmp_path):
    """`precompute` and `score` extract identical features, to the last bit."""
    plain = command("score", "out/bundle", "photos", out, "--features", "--chunk-size", "20")
    flags = ["--features", "--chunk-size", "20", "--store", "out/store"]
    lean = command("score", "out/bundle", "photos", tmp_path / "lean", *flags)
    assert plain["counts"]["decoded"] == 72
    assert lean["counts"]["decoded"] == 0 and lean["counts"]["looked_up"] == 72
    parts = sorted((out / "parts").glob("part-*.parquet"))
    assert len(parts) > 2
    for part in parts:
        assert (tmp_path / "lean" / "parts" / part.name).read_bytes() == part.read_bytes()
    held = {
        path: feature[0]
        for shard in Store(Path("out/store")).shards()
        for path, feature in zip(shard.paths, shard.features, strict=True)
    }
    for row in read_rows(out).to_dicts():
        assert np.array_equal(np.array(row["feature"], np.float32), held[row["path"]])


def test_store_of_another_recipe_is_refused_with_the_differing_field(out, command, capsys):
    command("precompute", "photos", "squashed", *FLAGS, "--resize", "squash")
    assert exit_code("score", "out/bundle", "new", out, "--store", "squashed") == 2
    assert "resize" in capsys.readouterr().err


def test_raw_probabilities_ignore_the_temperature(command, out, tmp_path, make_bundle):
    calibrated = make_bundle(name="resnet18", temperature=0.5)
    command("score", calibrated, "new", out, "--probabilities")
    command("score", calibrated, "new", tmp_path / "raw", "--probabilities", "--raw")
    raw = np.log(read_probabilities(tmp_path / "raw")) / 0.5
    assert np.abs(read_probabilities(out) - read_probabilities(tmp_path / "raw")).max() > 0.01
    rescaled = np.exp(raw) / np.exp(raw).sum(1, keepdims=True)
    np.testing.assert_allclose(read_probabilities(out), rescaled, atol=1e-5)


def test_csv_equals_the_parquet_parts(command, out):
    (Path("new") / "torn, and odd.jpg").write_bytes(b"\xff\xd8\xff nothing")
    result = command("score", "out/bundle", "new", out, "--csv", "--chunk-size", "8", code=3)
    (Path("new") / "torn, and odd.jpg").unlink()
    with Path(result["csv"]).open(newline="") as file:
        lines = list(csv.DictReader(file))
    table = read_rows(out).to_dicts()
    assert len(lines) == len(table) == 25
    for line, row in zip(lines, table, strict=True):
        assert (line["path"], line["image_id"]) == (row["path"], row["image_id"].hex())
        assert (line["label"] or None, line["fault"] or None) == (row["label"], row["fault"])
        if row["fault"] is None:
            assert float(line["probability"]) == row["probability"]
            assert float(line["novelty"]) == row["novelty"]
    assert [row["fault"] is None for row in table].count(False) == 1


def test_scoring_run_logs_inputs_counts_and_a_figure(command, out, workdir):
    from mlflow import MlflowClient

    result = command("score", "out/bundle", "new", out)
    client = MlflowClient(tracking_uri=f"sqlite:///{workdir}/mlflow.db")
    run = client.get_run(result["run_id"])
    (data,) = run.inputs.dataset_inputs
    assert data.dataset.name == "new" and data.tags[0].value == "scoring"
    assert run.data.metrics["scored"] == 24
    labels = {k: v for k, v in run.data.metrics.items() if k.startswith("labels.")}
    assert labels == {f"labels.{name}": count for name, count in result["labels"].items()}
    (picture,) = client.list_artifacts(result["run_id"], "scores")
    assert picture.path == "scores/scores.png"


def test_predictions_equal_plain_torchvision_with_the_bundles_weights(command, out, workdir):
    """An independent computation: Pillow, torchvision's transforms and network, and our weights."""
    import safetensors.torch
    import torch
    from PIL import Image
    from torchvision import models
    from torchvision.transforms import v2

    command("score", "out/bundle", "new", out, "--probabilities")
    tensors = safetensors.torch.load_file("out/bundle/weights.safetensors")
    about = json.loads(Path("out/bundle/bundle.json").read_text())
    net = models.resnet18(weights=None)
    net.fc = torch.nn.Identity()
    state = {k.removeprefix("body."): v for k, v in tensors.items() if k.startswith("body.")}
    net.load_state_dict(state)
    recipe = about["recipe"]
    steps = v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize(round(recipe["size"] * 8 / 7), antialias=True),
            v2.CenterCrop(recipe["size"]),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(recipe["mean"], recipe["std"]),
        ]
    )
    table = read_rows(out).to_dicts()
    pixels = torch.stack(
        [steps(Image.open(workdir / "new" / r["path"]).convert("RGB")) for r in table]
    )
    with torch.inference_mode():
        feature = net.eval()(pixels)
        feature = (feature - tensors["head.0.mean"]) / tensors["head.0.deviation"]
        logit = feature @ tensors["head.2.weight"].T + tensors["head.2.bias"]
        prob = (logit / about["temperature"]).softmax(1).numpy()
    predicted_labels = read_probabilities(out)
    assert np.abs(predicted_labels - prob).max() < 0.05
    confidence = np.sort(prob, 1)[:, -1] - np.sort(prob, 1)[:, -2] > 0.1
    assert confidence.sum() > 12
    for row, predicted, fine in zip(table, prob.argmax(1), confidence, strict=True):
        assert not fine or row["label"] == about["classes"][predicted]


# ------------------------------------------------------------------------- resuming, refusing


@pytest.mark.parametrize("flags", [["--raw"], ["--top-k", "2"], ["--flag-novel"], ["--features"]])
def test_scores_of_different_requests_are_not_mixed(
    command, tmp_path_factory, flags, capsys, workdir
):
    out = workdir / "asked"
    if not out.exists():
        command("score", "out/bundle", "new", out)
    assert exit_code("score", "out/bundle", "new", out, *flags) == 2
    assert f"another setting of {flags[0]}." in capsys.readouterr().err


def test_finished_scoring_is_not_repeated_but_can_be_written_as_csv(command, out):
    first = command("score", "out/bundle", "new", out)
    again = command("score", "out/bundle", "new", out, "--csv")
    assert first["counts"]["decoded"] == 24
    assert again["counts"]["decoded"] == 0 and again["counts"]["skipped"] == 24
    assert len(Path(again["csv"]).read_text().splitlines()) == 25
    # -P: a pandas.py in this folder is not imported.
    assert 'python -P -c "import pandas' in command.stderr
    assert json.loads((out / "score.json").read_text())["counts"] == first["counts"]


def test_transient_fault_disappears_on_the_next_run(command, out):
    """Simulates a file that was written to between listing and reading."""
    list_images = sources.unlabelled_catalog

    def catalog_with_old_timestamp(source: Any, config: Any, **more: Any) -> Catalog:
        catalog = list_images(source, config, **more)
        stamps = catalog.stamps.copy()
        stamps[7] -= 10**9
        return dataclasses.replace(catalog, stamps=stamps)

    arguments = ["score", "out/bundle", "new", out, "--chunk-size", "8"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sources, "unlabelled_catalog", catalog_with_old_timestamp)
        first = command(*arguments, "--csv", code=3)
    assert first["faults"] == {"changed": 1}
    again = command(*arguments)
    assert again["faults"] == {} and again["counts"]["scored"] == 24
    assert "changed" not in Path(again["csv"]).read_text()  # the older table is gone
    assert 0 < again["counts"]["decoded"] < 24
    assert read_rows(out)["fault"].is_null().all()


def test_only_the_part_of_a_replaced_file_is_scored_again(command, out, tmp_path):
    """The new image has the same size, so only its timestamp differs."""
    shutil.copytree("new", tmp_path / "images")
    files = sorted((tmp_path / "images").iterdir())
    size = max(files[3].stat().st_size, files[9].stat().st_size)
    for file in (files[3], files[9]):  # decoders ignore bytes after the end of an image
        file.write_bytes(file.read_bytes().ljust(size, b"\0"))
    arguments = ["score", "out/bundle", tmp_path / "images", out, "--chunk-size", "8"]
    first = command(*arguments)
    before = read_rows(out)
    files[3].write_bytes(files[9].read_bytes())
    again = command(*arguments)
    after = read_rows(out)
    assert 0 < again["counts"]["decoded"] < first["counts"]["decoded"]
    assert after["probability"][3] == after["probability"][9] == before["probability"][9]
    assert after["probability"].to_list()[4:] == before["probability"].to_list()[4:]


def test_images_in_another_folder_are_another_request(command, out, tmp_path, capsys):
    shutil.copytree("new", tmp_path / "copy")
    command("score", "out/bundle", "new", out)
    assert exit_code("score", "out/bundle", tmp_path / "copy", out) == 2
    assert "of images in another folder" in capsys.readouterr().err


def test_concurrent_commands_cannot_write_the_same_scores(out, capsys):
    out.mkdir()
    with fileio.folder_lock(out):
        assert exit_code("score", "out/bundle", "new", out) == 2
    assert "being written" in capsys.readouterr().err


def make_mixed_folder(folder: Path, photos: Path) -> int:
    """Fill a folder with photos, copies, odd names and broken files; return the number of files."""
    from PIL import Image

    shutil.copytree(photos, folder / "deep" / "er")
    images = sorted((folder / "deep" / "er").iterdir())
    full = images[0].read_bytes()
    for copy in range(12):
        (folder / f"copy {copy}.jpg").write_bytes(images[copy % 3].read_bytes() + bytes([copy]))
    (folder / "same.jpg").write_bytes(full)
    (folder / "page.jpg").write_text("<html>not here</html>")
    (folder / "empty.png").touch()
    (folder / "cut.jpg").write_bytes(full[: len(full) // 2])
    (folder / "noise.webp").write_bytes(b"RIFF\x10\x00\x00\x00WEBP" + bytes(64))
    Image.new("L", (40, 30), 90).save(folder / "grey.png")
    Image.new("P", (40, 30)).save(folder / "moving.gif")
    (folder / "new\nline \N{CAT FACE}.jpg").write_bytes(full)
    Path(os.fsdecode(os.fsencode(folder) + b"/latin-\xe9.jpg")).write_bytes(full)
    (folder / "dangling.jpg").symlink_to("nowhere")
    return sum(1 for file in folder.rglob("*") if not file.is_dir() or file.is_symlink())


@pytest.mark.slow
def test_killed_scoring_resumes_to_the_same_bytes(command, tmp_path, workdir):
    count = make_mixed_folder(tmp_path / "salted", workdir / "new")
    flags = ["--chunk-size", "4", "--batch-size", "4", "--features", "--flag-novel"]
    reference = command(
        "score", "out/bundle", tmp_path / "salted", tmp_path / "calm", *flags, code=3
    )
    assert (
        reference["counts"]["inputs"]
        == count
        == reference["counts"]["scored"] + reference["counts"]["faults"]
    )
    assert reference["counts"]["faults"] == 5
    out, rng = tmp_path / "killed", random.Random(0)
    arguments = ["score", workdir / "out/bundle", tmp_path / "salted", out, *flags]
    program = [sys.executable, "-m", "arrowhead", *map(str, arguments)]
    process = forks.Popen(program, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=-3)
    while len(list((out / "parts").glob("part-*.parquet"))) < 3:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.005)
    time.sleep(rng.random() / 20)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {file.name: file.read_bytes() for file in (out / "parts").glob("part-*.parquet")}
    resumed = command(*arguments, code=3)
    assert 0 < resumed["counts"]["skipped"] < count
    parts = {file.name: file.read_bytes() for file in (out / "parts").glob("part-*.parquet")}
    assert before.items() <= parts.items()
    reference_parts = (tmp_path / "calm" / "parts").glob("part-*.parquet")
    assert parts == {file.name: file.read_bytes() for file in reference_parts}
    assert {file.name for file in (out / "parts").iterdir()} == parts.keys()
    original = read_rows(tmp_path / "calm").filter(polars.col("path").is_in(["same.jpg"]))
    copies = read_rows(tmp_path / "calm").filter(polars.col("image_id") == original["image_id"][0])
    assert len(copies) == 4 and copies["probability"].n_unique() == 1


# ---------------------------------------------------------------------------------- novelty


def test_novelty_threshold_keeps_its_false_alarm_rate():
    """Training, validation and new rows of one distribution, 60 times."""
    from arrowhead.evaluation.novelty import NoveltyDetector

    rng, false_alarm_rates = np.random.default_rng(0), []
    for _ in range(60):
        train, valid, new = (rng.normal(size=(n, 8)).astype(np.float16) for n in (80, 60, 200))
        detector = NoveltyDetector.fit(train, valid)
        false_alarm_rates.append((detector.distances(new) > detector.threshold(0.1)).mean())
    assert 0.06 < np.mean(false_alarm_rates) < 0.105


def test_too_few_validation_images_give_an_infinite_novelty_threshold():
    from arrowhead.evaluation.novelty import NoveltyDetector

    train = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float16)
    detector = NoveltyDetector.fit(train[:20], train[20:])
    assert np.isinf(detector.threshold(0.05))
    assert detector.summary()["threshold_at_5_percent_false_alarms"] is None
    assert np.isfinite(detector.threshold(0.2))


def test_novelty_is_the_distance_to_the_fifth_neighbour_of_normalized_features():
    from arrowhead.evaluation.novelty import NoveltyDetector

    rng = np.random.default_rng(1)
    train, valid = (rng.normal(size=(n, 6)).astype(np.float16) for n in (50, 9))
    features64, new = train.astype(np.float64), valid.astype(np.float64)
    mean, deviation = features64.mean(0), features64.std(0)

    def normalized(read_rows: Any) -> Any:
        moved = (read_rows - mean) / deviation
        return moved / np.linalg.norm(moved, axis=1, keepdims=True)

    distance = np.linalg.norm(normalized(new)[:, None] - normalized(features64)[None], axis=2)
    expected = np.sort(distance, axis=1)[:, 4]
    np.testing.assert_allclose(
        NoveltyDetector.fit(train, valid).distances(valid), expected, atol=2e-3
    )


def test_novelty_reference_set_does_not_depend_on_image_order(monkeypatch):
    from arrowhead.evaluation import novelty as evaluation_novelty

    monkeypatch.setattr(evaluation_novelty, "MAX_BANK_ROWS", 50)
    ids = np.random.default_rng(0).integers(0, 2**63, 400).astype(np.uint64)
    order = np.random.default_rng(1).permutation(400)
    kept, others = (
        evaluation_novelty.sample_bank_rows(ids),
        evaluation_novelty.sample_bank_rows(ids[order]),
    )
    assert len(kept) == 50
    assert set(ids[kept]) == set(ids[order][others])


def test_novel_images_are_detected_among_cats_and_dogs(
    dogscats, photo_store, image_folder, command, tmp_path
):
    """AUROC above 0.95 between photos and synthetic textures; the false alarm rate holds."""
    from sklearn.metrics import roc_auc_score

    command("train", photo_store, tmp_path / "bundle", "--epochs", "5", "--rate", "0.003")
    table = {}
    for name, images in (("pets", dogscats / "valid"), ("others", image_folder)):
        flags = ["--flag-novel", "--store", photo_store]
        command("score", tmp_path / "bundle", images, tmp_path / name, *flags)
        table[name] = read_rows(tmp_path / name)
    novelty = np.concatenate([table["pets"]["novelty"], table["others"]["novelty"]])
    is_novel = np.arange(len(novelty)) >= len(table["pets"])
    assert roc_auc_score(is_novel, novelty) > 0.95
    assert table["pets"]["novel"].mean() <= 0.05
    assert table["others"]["novel"].mean() > 0.8


def test_bundle_without_training_features_cannot_flag_novelty(out, tmp_path, capsys, workdir):
    plain = dataclasses.replace(bundle_format.load(Path("out/bundle")), novelty=None)
    bundle_format.save(plain, tmp_path / "plain")
    assert exit_code("score", tmp_path / "plain", "new", out, "--flag-novel") == 2
    assert "does not know its training images" in capsys.readouterr().err
    assert not out.exists()
    assert exit_code("score", tmp_path / "plain", "new", out) == 0
    assert "novelty" not in read_rows(out).columns


# ----------------------------------------------------------------------------------- parity


def reseal(folder: Path, **changes: Any) -> None:
    """Update the checksums in a changed bundle's bundle.json as its author could."""
    content = json.loads((folder / "bundle.json").read_text())
    del content["seal"]
    for name, value in changes.items():
        content[name] = content[name] | value if isinstance(value, dict) else value
    fileio.write_sealed(folder / "bundle.json", content)


@pytest.mark.parametrize(
    "other", [{"resize": "squash"}, {"mean": [0.1, 0.9, 0.5]}, {"std": [0.5, 0.5, 0.5]}], ids=str
)
def test_machine_with_different_golden_predictions_does_not_score(tmp_path, out, capsys, other):
    """The recipe of a bundle's copy is changed, so its pixels differ."""
    shutil.copytree("out/bundle", tmp_path / "b")
    reseal(tmp_path / "b", recipe=other)
    assert exit_code("score", tmp_path / "b", "new", out) == 4
    output = capsys.readouterr().err
    assert "golden images come out differently" in output and "drift" in output
    assert not list(out.glob("part-*"))
    assert exit_code("bundle", "verify", tmp_path / "b") == 4


def test_drift_is_reported_before_the_first_image_is_scored(out, capsys):
    assert exit_code("score", "out/bundle", "new", out) == 0
    output = capsys.readouterr().out
    assert output.index("golden images: 8 replayed") < output.index("score 24/24")
    assert "0 labels changed" in output


def test_all_zero_features_count_as_no_drift(workdir):
    """As a random backbone with a small input may give in half precision."""
    result = bundle_format.load(Path("out/bundle"))
    blank = [dataclasses.replace(one, feature=np.zeros(512, np.float32)) for one in result.golden]
    head = result.make_head()
    prob = bundle_format.probabilities(head, np.zeros((8, 512), np.float32), result.temperature)
    blank = [dataclasses.replace(b, probabilities=c) for b, c in zip(blank, prob, strict=True)]

    class ConstantFeatures:
        is_native = True

        def __call__(self, pixels: Any) -> Any:
            return pixels.new_zeros((len(pixels), 512)).float()

    drift = replay.replay(
        dataclasses.replace(result, golden=blank), ConstantFeatures(), head, "cpu", 1
    )
    assert (drift.feature, drift.changed) == (0, 0)


def test_golden_images_prefer_clearly_decided_ones():
    result = bundle_format.load(Path("out/bundle"))
    one = dataclasses.replace(result, classes=["a", "b"], multi=False)
    several = dataclasses.replace(one, multi=True, thresholds=[0.5, 0.4])
    prob = np.array([[0.5, 0.5], [0.9, 0.1], [0.3, 0.7]])
    np.testing.assert_allclose(one.margin(prob), [0, 0.8, 0.4])
    np.testing.assert_allclose(several.margin(prob), [0, 0.3, 0.2])


@pytest.fixture
def bundle_copy(tmp_path: Path) -> Iterator[Path]:
    shutil.copytree("out/bundle", tmp_path / "worn")
    yield tmp_path / "worn"


def test_bundle_info_and_verify_succeed(command):
    about = command("bundle", "info", "out/bundle")
    assert about["classes"] == ["baskets", "beads", "leaves"]
    assert about["golden_images"] == 8 and about["novelty"]["k"] == 5
    assert about["fingerprint"] == bundle_format.fingerprint(Path("out/bundle"))
    drift = command("bundle", "verify", "out/bundle")["drift"]
    assert drift["images"] == 8 and drift["changed"] == 0 and drift["feature"] < 1e-5


@pytest.mark.parametrize("file", ["bundle.json", "weights.safetensors", "golden/3.img"])
def test_flipped_bit_in_any_bundle_file_is_detected(bundle_copy, file, capsys):
    content = bytearray((bundle_copy / file).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle_copy / file).write_bytes(bytes(content))
    assert exit_code("bundle", "verify", bundle_copy) == 4
    assert Path(file).name in capsys.readouterr().err


def test_bundle_cannot_reference_files_outside_itself(bundle_copy, tmp_path):
    (tmp_path / "secret").write_text("s")
    golden = json.loads((bundle_copy / "golden/golden.json").read_text())
    golden[0]["name"] = "../../secret"
    fileio.write_json(bundle_copy / "golden/golden.json", golden)
    digests = json.loads((bundle_copy / "bundle.json").read_text())["sha256"]
    digests |= {"golden/golden.json": fileio.sha256(bundle_copy / "golden/golden.json")}
    reseal(bundle_copy, sha256=digests)
    with pytest.raises(DataError, match="not one of its images"):
        bundle_format.load(bundle_copy)
    reseal(bundle_copy, sha256={"../secret": fileio.sha256(tmp_path / "secret")})
    with pytest.raises(DataError, match="outside its folder"):
        bundle_format.load(bundle_copy)


def test_mismatched_tensors_are_refused(bundle_copy):
    import safetensors.torch

    tensors = safetensors.torch.load_file(bundle_copy / "weights.safetensors")
    tensors["head.2.weight"] = tensors["head.2.weight"][:, :7].contiguous()
    safetensors.torch.save_file(tensors, bundle_copy / "weights.safetensors")
    reseal(
        bundle_copy,
        sha256={"weights.safetensors": fileio.sha256(bundle_copy / "weights.safetensors")},
    )
    with pytest.raises(DataError, match="head do not fit"):
        bundle_format.load(bundle_copy).make_head()


def test_bundle_loads_without_ray_and_mlflow(workdir):
    code = (
        "import sys\n"
        "sys.modules.update(ray=None, mlflow=None)\n"  # importing either raises
        "from pathlib import Path\n"
        "from arrowhead.bundle import format as bundle_format; "
        "from arrowhead.bundle import replay\n"
        "made = bundle_format.load(Path('out/bundle'))\n"
        "print(made.make_head(), replay.verify(Path('out/bundle')).changed)\n"
    )
    completed = subprocess.run(
        [sys.executable, "-c", code], cwd=workdir, capture_output=True, text=True, check=True
    )
    assert completed.stdout.endswith(" 0\n")


def test_bundle_files_contain_no_pickle():
    import pickletools

    for file in Path("out/bundle").rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert not content.startswith((b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05"))
            with pytest.raises(Exception):  # noqa: B017 - each pickle reader raises its own errors
                list(pickletools.genops(content))


def test_invalid_settings_are_refused():
    with pytest.raises(ConfigError, match="top-k"):
        ScoreConfig(top_k=0)
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="false-alarms"):
            ScoreConfig(false_alarms=share)
