"""Several labels per image: from a table to features, to thresholds and to scores."""

from __future__ import annotations

import csv
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from arrowhead import DataError, fileio
from arrowhead.bundle import format as bundle_format
from arrowhead.bundle import replay
from arrowhead.bundle.format import Bundle, GoldenImage
from arrowhead.data import sources
from arrowhead.data.catalog import Catalog
from arrowhead.data.source_config import SourceConfig
from arrowhead.decode.pixels import PixelConfig
from arrowhead.evaluation import metrics
from arrowhead.features import catalog_file, extract
from arrowhead.features.backbone import BodyConfig
from arrowhead.features.extract import Chunk, ExtractConfig
from arrowhead.features.feature_config import FeatureConfig
from arrowhead.features.recipe import Recipe
from arrowhead.features.shard_file import ShardRows
from arrowhead.features.store import Store
from arrowhead.inference import layout, score, score_request, scores_io, summary
from arrowhead.inference.score_request import ScoreConfig, ScoreRequest
from arrowhead.runtime.task_queue import TaskQueue
from arrowhead.runtime.worker import Worker

RECIPE = Recipe(
    body="resnet18",
    weights="0" * 64,
    pool="avg",
    width=3,
    size=64,
    resize="crop",
    mean=(0.1, 0.2, 0.3),
    std=(0.4, 0.5, 0.6),
)


def _random_store(
    path: Path,
    labels: list[tuple[str, ...]],
    splits: list[str],
    *,
    views: int = 1,
    faulty_share: float = 0,
    seed: int = 0,
) -> Store:
    """A store of random features in shards of one to four files, some of them faulty."""
    rng = np.random.default_rng(seed)
    recipe = dataclasses.replace(RECIPE, views=views, augment="none" if views == 1 else "side-on")
    result = Store.create(path, recipe, 3)
    paths, names = [f"{number:04}.jpg" for number in range(len(labels))], []
    while (first := sum(len(result.read_shard(name).paths) for name in names)) < len(paths):
        here = paths[first : first + int(rng.integers(1, 5))]
        faults = ["empty" if value < faulty_share else None for value in rng.random(len(here))]
        features = rng.normal(size=(len(here), views, 3)).astype(np.float16)
        features[[fault is not None for fault in faults]] = 0
        ids = [rng.bytes(16) for _ in here]
        names.append(f"shard{len(names)}")
        rows = ShardRows(paths=here, image_ids=ids, features=features, faults=faults)
        result.write_shard(names[-1], rows)
    columns = {
        "root": "/data",
        "paths": paths,
        "sizes": np.zeros(len(paths), np.int64),
        "stamps": np.zeros(len(paths), np.int64),
        "labels": labels,
        "splits": splits,
        "tries": np.zeros(len(paths), np.uint8),
        "ignored": 0,
    }
    result.commit(names, columns, {})
    return result


# ------------------------------------------------------------------------------ features


@given(
    st.lists(
        st.tuples(
            st.sets(st.sampled_from(["sun", "haze", "sea"])),
            st.sampled_from(["train", "valid", "test"]),
        ),
        min_size=1,
        max_size=20,
    ),
    st.integers(1, 2),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=60)
def test_features_equal_shards_and_catalog_row_by_row(
    images: list[tuple[set[str], str]], views: int, seed: int
) -> None:
    labels = [tuple(sorted(names)) for names, _ in images]
    splits = [split for _, split in images]
    with tempfile.TemporaryDirectory() as folder:
        store = _random_store(
            Path(folder) / "store", labels, splits, views=views, faulty_share=0.3, seed=seed
        )
        classes = store.manifest()["classes"]
        rows = [
            row
            for part in store.shards()
            for row in zip(part.image_ids, part.features.copy(), part.faults, strict=True)
        ]
        several = any(len(names) != 1 for names in labels)
        for split in ("train", "valid", "test", None):
            result = store.features(split)
            well = [
                row
                for row, (_, _, fault) in enumerate(rows)
                if fault is None and split in (None, splits[row])
            ]
            assert result.row.tolist() == well
            lean = store.features(split, rows_only=True)
            assert lean.feature.shape == (len(well), views, 0)
            assert np.array_equal(np.concatenate(store.mapped_features())[lean.row], result.feature)
            assert np.array_equal(lean.label, result.label)
            assert result.multi == several
            assert result.feature.shape == (len(well), views, 3)
            assert result.split.tolist() == [splits[row] for row in well]
            assert result.image_id.tolist() == [int.from_bytes(rows[row][0][:8]) for row in well]
            for at, row in enumerate(well):
                assert np.array_equal(result.feature[at], rows[row][1])
                if several:
                    hot = [int(name in labels[row]) for name in classes]
                    assert result.label[at].tolist() == hot
                else:
                    assert classes[result.label[at]] == labels[row][0]


def test_unlabelled_image_is_a_row_of_zeros_in_a_multi_label_store(
    tmp_path: Path,
) -> None:
    result = _random_store(tmp_path / "s", [("a", "b"), (), ("b",)], ["train"] * 3).features()
    assert result.multi
    assert result.label.dtype == np.uint8
    assert result.label.tolist() == [[1, 1], [0, 0], [0, 1]]


def test_split_keeps_the_label_shape_of_its_store(tmp_path: Path) -> None:
    """The store is multi-label even if every validation row has exactly one label."""
    labels = [("a", "b"), ("a",), ("b",)]
    store = _random_store(tmp_path / "s", labels, ["train", "valid", "valid"])
    assert store.features("valid").label.tolist() == [[1, 0], [0, 1]]
    plain = _random_store(tmp_path / "p", [("a",), ("b",)], ["train", "valid"]).features()
    assert (plain.label.dtype, plain.label.tolist(), plain.multi) == (np.int64, [0, 1], False)
    assert plain.image_id.dtype == np.uint64


def test_shard_rows_are_views_of_the_mapped_file_and_features_are_copies(
    tmp_path: Path,
) -> None:
    store = _random_store(tmp_path / "s", [("a",), ("b",)], ["train", "train"])
    (part, *_), result = store.shards(), store.features("train")
    address, inside = part.features.ctypes.data, []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(".arrow"):
            low, high = (int(edge, 16) for edge in line.split()[0].split("-"))
            inside.append(low <= address < high)
    assert any(inside)
    for name in store.shard_names():
        store.shard_path(name).write_bytes(b"")  # the copy does not depend on the file
    assert result.feature.flags.writeable
    assert np.isfinite(result.feature).all()


# --------------------------------------------------------------------- real files, decoded


LABELS = {"baskets": "woven brown", "beads": "round", "leaves": "green round"}


@pytest.fixture(scope="module")
def label_table(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TSV of the synthetic images with one to three labels each, and one broken file."""
    folder = tmp_path_factory.mktemp("several")
    (folder / "torn.jpg").write_bytes(b"\xff\xd8\xff no image")
    with (folder / "labels.tsv").open("w", newline="") as file:
        out = csv.writer(file, delimiter="\t")
        out.writerow(["path", "labels", "split"])
        for split in ("train", "valid"):
            for number, image in enumerate(sorted((image_folder / split).glob("*/*"))):
                extra = " even" if number % 2 else ""
                out.writerow([str(image), LABELS[image.parent.name] + extra, split])
        out.writerow([str(folder / "torn.jpg"), "brown even", "train"])
    return folder / "labels.tsv"


@pytest.fixture(scope="module")
def store(label_table: Path) -> Store:
    """Features of the table's images from a random backbone."""
    from arrowhead.commands import precompute

    images = FeatureConfig(
        source=SourceConfig(multi_label=True),
        body=BodyConfig(body="resnet18", weights="random"),
        pixels=PixelConfig(size=64),
        extract=ExtractConfig(chunk_size=16),
    )
    result = precompute.precompute(label_table, label_table.parent / "store", images)
    assert result["counts"]["faults"] == 1
    return Store(label_table.parent / "store")


@pytest.fixture(scope="module")
def bundle(store: Store) -> Bundle:
    """A bundle whose head is a least-squares fit to the training features."""
    train, valid = store.features("train"), store.features("valid")
    classes = store.manifest()["classes"]
    feature = train.feature[:, 0].astype(np.float64)
    mean, deviation = feature.mean(0), feature.std(0) + 1e-3
    x = (feature - mean) / deviation
    weight = np.linalg.solve(x.T @ x + 100 * np.eye(x.shape[1]), x.T @ (8.0 * train.label - 4))
    head = {
        "0.mean": torch.from_numpy(mean.astype(np.float32)),
        "0.deviation": torch.from_numpy(deviation.astype(np.float32)),
        "2.weight": torch.from_numpy(weight.T.astype(np.float32)),
        "2.bias": torch.zeros(len(classes)),
    }
    bare = Bundle(
        recipe=store.recipe,
        classes=classes,
        head="linear",
        temperature=1.0,
        multi=True,
        body_state=extract.load_weights(store.recipe, store.weights_path),
        head_state=head,
        metrics={},
        lineage={"run_id": "none"},
    )
    feature_ND = valid.feature[:, 0].astype(np.float32)
    with torch.inference_mode():
        logit = bare.make_head()(torch.from_numpy(feature_ND))
    fitted = metrics.fit_temperature(logit, torch.from_numpy(valid.label))
    prob = bundle_format.probabilities(bare.make_head(), feature_ND, fitted, multi=True)
    cut = metrics.fit_thresholds(prob, valid.label)
    figures = metrics.evaluate(
        logit.numpy(), valid.label, classes, temperature=fitted, thresholds=cut
    )
    catalog = Catalog(**store.read_catalog())
    golden = [
        GoldenImage(
            name=f"{at}.img",
            data=catalog.read_file(int(valid.row[at]), 2**20)[0],
            feature=feature_ND[at],
            probabilities=prob[at],
        )
        for at in (0, 5, 10)
    ]
    return dataclasses.replace(
        bare, temperature=fitted, thresholds=cut.tolist(), metrics=figures, golden=golden
    )


@pytest.fixture(scope="module")
def bundle_path(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of that bundle."""
    path = tmp_path_factory.mktemp("bundle") / "bundle"
    bundle_format.save(bundle, path)
    return path


def _score_directly(
    path: Path, images: Path, out: Path, **overrides: Any
) -> tuple[Bundle, ScoreRequest]:
    """What the score command does, in this process."""
    config, how = ScoreConfig(**overrides), ExtractConfig(chunk_size=16)
    loaded, catalog = bundle_format.load(path), sources.unlabelled_catalog(images)
    request = score_request.prepare(out, path, loaded, catalog, config, how.chunk_size)
    worker = Worker(
        0, 1, "cpu", 2, TaskQueue(request.unfinished_parts()).next_task, lambda report: None
    )
    score.score(worker, request, how)
    return loaded, request


def test_table_labels_match_the_rows_of_the_features(store: Store, label_table: Path) -> None:
    with label_table.open(newline="") as file:
        output = {Path(row["path"]).name: row for row in csv.DictReader(file, delimiter="\t")}
    classes, catalog = store.manifest()["classes"], Catalog(**store.read_catalog())
    assert classes == ["brown", "even", "green", "round", "woven"]
    for split in ("train", "valid"):
        result = store.features(split)
        assert result.multi
        names = [Path(catalog.paths[row]).name for row in result.row]
        expected = [name for name, row in output.items() if row["split"] == split]
        assert sorted(names) == sorted(set(expected) - {"torn.jpg"})
        for name, hot in zip(names, result.label, strict=True):
            given = [label for label, one in zip(classes, hot, strict=True) if one]
            assert given == sorted(output[name]["labels"].split())


def test_bundle_round_trips_and_describes_its_decision_rule(
    bundle: Bundle, bundle_path: Path
) -> None:
    back = bundle_format.load(bundle_path)
    for field in ("classes", "head", "temperature", "multi", "thresholds", "metrics", "recipe"):
        assert getattr(back, field) == getattr(bundle, field)
    content = json.loads((bundle_path / "bundle.json").read_text())
    assert (content["format"], content["task"]) == (3, "multi-label")
    assert "threshold" in content["decision"]
    assert content["thresholds"] == dict(zip(bundle.classes, bundle.thresholds or [], strict=True))


def test_single_label_bundle_says_so_and_has_no_thresholds(bundle: Bundle, tmp_path: Path) -> None:
    one = dataclasses.replace(bundle, multi=False, thresholds=None, golden=())
    bundle_format.save(one, tmp_path / "one")
    content = json.loads((tmp_path / "one" / "bundle.json").read_text())
    assert (content["task"], content["thresholds"]) == ("single-label", None)
    back = bundle_format.load(tmp_path / "one")
    assert (back.multi, back.thresholds) == (False, None)
    prob = bundle_format.probabilities(back.make_head(), np.ones((2, 512), np.float16), 1.0)
    np.testing.assert_allclose(prob.sum(1), 1, rtol=1e-5)


def test_untuned_thresholds_are_one_half(bundle: Bundle, tmp_path: Path) -> None:
    bundle_format.save(dataclasses.replace(bundle, thresholds=None, golden=()), tmp_path / "half")
    back = bundle_format.load(tmp_path / "half")
    assert back.thresholds == [0.5] * 5
    prob = np.array([[0.5, 0.4999, 1, 0, np.nan]], np.float32)
    assert back.predict_labels(prob).tolist() == [[True, False, True, False, False]]


def test_bundle_of_format_1_is_refused_with_advice_to_retrain(
    bundle_path: Path, tmp_path: Path
) -> None:
    content = json.loads((bundle_path / "bundle.json").read_text())
    fileio.write_json(tmp_path / "bundle.json", content | {"format": 1})
    with pytest.raises(DataError, match="format 1") as error_info:
        bundle_format.load(tmp_path)
    assert "train again" in error_info.value.do


@pytest.fixture(scope="module")
def scored(
    bundle_path: Path,
    image_folder: Path,
    label_table: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Bundle, ScoreRequest, polars.DataFrame]]:
    """Bundle, request and rows: all validation images and one file that is not an image."""
    images = tmp_path_factory.mktemp("images")
    for image in (image_folder / "valid").glob("*/*"):
        (images / image.name).write_bytes(image.read_bytes())
    (images / "torn.jpg").write_bytes((label_table.parent / "torn.jpg").read_bytes())
    out = tmp_path_factory.mktemp("out") / "scores"
    loaded, request = _score_directly(bundle_path, images, out, probabilities=True, top_k=2)
    yield loaded, request, polars.read_parquet(out / "parts")


def test_predicted_labels_are_those_that_reach_their_thresholds(
    scored: tuple[Bundle, ScoreRequest, polars.DataFrame], store: Store, label_table: Path
) -> None:
    loaded, request, rows = scored
    paths = [
        path for part in range(len(request.part_rows)) for path in request.part_files(part).paths
    ]
    assert rows["path"].to_list() == paths == sorted(paths)
    cut = dict(zip(loaded.classes, loaded.thresholds or [], strict=True))
    for row in rows.iter_rows(named=True):
        if row["path"] == "torn.jpg":
            assert row["fault"]
            assert {row[name] for name in ("label", "labels", "probability", "top_k")} == {None}
            continue
        prob = row["probabilities"]
        assert list(prob) == loaded.classes
        assert row["labels"] == [name for name in loaded.classes if prob[name] >= cut[name]]
        best = sorted(loaded.classes, key=lambda name: -prob[name])[:2]
        assert [one["label"] for one in row["top_k"]] == best
        assert (row["label"], row["probability"]) == (best[0], prob[best[0]])
    # Sigmoids do not add up to 1, and the head has learnt the table's labels.
    sums = rows["probabilities"].drop_nulls().struct.unnest().sum_horizontal().to_numpy()
    assert np.ptp(sums) > 0.1
    output = {
        Path(store.read_catalog()["paths"][row]).name: hot
        for part in [store.features("valid")]
        for row, hot in zip(part.row, part.label, strict=True)
    }
    well = rows.filter(polars.col("fault").is_null())
    given = np.array([[name in labels for name in loaded.classes] for labels in well["labels"]])
    truth = np.array([output[path] for path in well["path"]])
    best = metrics.evaluate(np.where(given, 9.0, -9.0), truth, loaded.classes)
    assert best["f2_samples"] > 0.6


def test_scored_probabilities_equal_those_of_the_stored_features(
    scored: tuple[Bundle, ScoreRequest, polars.DataFrame], store: Store
) -> None:
    loaded, _, rows = scored
    valid, paths = store.features("valid"), store.read_catalog()["paths"]
    feature = valid.feature[:, 0]
    there = bundle_format.probabilities(loaded.make_head(), feature, loaded.temperature, multi=True)
    by_name = dict(zip([Path(paths[row]).name for row in valid.row], there, strict=True))
    for path, prob in zip(rows["path"], rows["probabilities"], strict=True):
        if prob is not None:
            np.testing.assert_allclose(list(prob.values()), by_name[path], atol=2e-3)


def test_score_summary_counts_every_predicted_label(
    scored: tuple[Bundle, ScoreRequest, polars.DataFrame],
) -> None:
    loaded, request, rows = scored
    held = summary.summarize(request, loaded)
    assert list(held.faults.values()) == [1]
    counted = {
        name: sum(name in labels for labels in rows["labels"] if labels is not None)
        for name in loaded.classes
    }
    assert held.labels == counted


def _chunk(faults: list[str | None]) -> Chunk:
    paths, ids = [f"{n}.jpg" for n in range(len(faults))], [bytes([n]) * 16 for n in range(9)]
    blank = np.zeros((len(faults), 1, 512), np.float16)
    sizes = np.zeros((len(paths), 2), np.int32)
    return Chunk(0, paths, blank, faults, sizes, ids[: len(faults)])


def test_image_without_a_predicted_label_is_not_a_fault(bundle: Bundle, tmp_path: Path) -> None:
    one = dataclasses.replace(bundle, thresholds=[0.5, 0.25, 0.5, 0.5, 0.5])
    prob = np.full((3, 5), 0.2, np.float32)
    prob[0, :2] = 0.3, 0.25
    config, chunk = ScoreConfig(top_k=1), _chunk([None, None, "empty"])
    judged = score.make_scores(one, chunk, prob, config)
    path = layout.parts_dir(tmp_path) / "part-000000.parquet"
    scores_io.write_scores(path, judged, {})
    scores_io.replace_journal(
        layout.journal_dir(tmp_path),
        [scores_io.describe_part(path, 0, rows=3, inputs="", faults={"empty": 1})],
    )
    rows = polars.read_parquet(path)
    assert rows["labels"].dtype == polars.List(polars.String)
    assert rows["labels"].to_list() == [["even"], [], None]
    assert rows["label"].to_list() == ["brown", "brown", None]
    catalog = Catalog(
        root="/",
        paths=["0.jpg", "1.jpg", "2.jpg"],
        sizes=np.zeros(3, np.int64),
        stamps=np.zeros(3, np.int64),
        labels=[()] * 3,
        splits=[""] * 3,
    )
    catalog_file.write_catalog(layout.inputs_path(tmp_path), catalog.columns())
    request = ScoreRequest(
        output_dir=tmp_path, bundle=tmp_path, config=config, part_rows=[range(3)]
    )
    held = summary.summarize(request, one)
    assert held.faults == {"empty": 1}
    assert held.labels == dict.fromkeys(one.classes, 0) | {"even": 1}


def test_single_label_scores_keep_their_columns(bundle: Bundle, tmp_path: Path) -> None:
    one = dataclasses.replace(bundle, multi=False, thresholds=None)
    prob = np.array([[0.1, 0.2, 0.4, 0.2, 0.1]], np.float32)
    judged = score.make_scores(one, _chunk([None]), prob, ScoreConfig(probabilities=True))
    scores_io.write_scores(tmp_path / "one.parquet", judged, {})
    rows = polars.read_parquet(tmp_path / "one.parquet")
    names = ["path", "image_id", "label", "probability", "top_k", "probabilities", "fault"]
    assert rows.columns == names
    assert rows["label"].to_list() == ["green"]
    np.testing.assert_allclose(list(rows["probabilities"][0].values()), prob[0])


def _with_shifted_golden_probability(bundle: Bundle, shift: NDArray[np.float32]) -> Bundle:
    """The bundle with changed stored probabilities of its first golden image."""
    first, *others = bundle.golden
    moved = dataclasses.replace(first, probabilities=shift)
    return dataclasses.replace(bundle, golden=[moved, *others])


def test_golden_image_that_gains_or_loses_a_label_stops_scoring(
    bundle: Bundle, image_folder: Path, tmp_path: Path
) -> None:
    """Even if its most probable label stays the same."""
    cut, prob = np.array(bundle.thresholds), bundle.golden[0].probabilities
    other = int(np.argsort(prob)[0])
    moved = prob.copy()
    moved[other] = cut[other] + 0.01 if prob[other] < cut[other] else cut[other] - 0.01
    path = tmp_path / "bundle"
    bundle_format.save(_with_shifted_golden_probability(bundle, moved), path)
    with pytest.raises(DataError, match="1 of 3 labels changed"):
        _score_directly(path, image_folder / "new", tmp_path / "out")
    assert not list((tmp_path / "out").rglob("part-*"))
    near = np.clip(prob + np.where(prob < cut, -1e-3, 1e-3), 0, 1).astype(np.float32)
    bundle_format.save(_with_shifted_golden_probability(bundle, near), path)
    _score_directly(path, image_folder / "new", tmp_path / "again")


@pytest.mark.parametrize("multi", [True, False])
def test_golden_image_that_fails_to_decode_counts_as_drift(multi: bool, bundle: Bundle) -> None:
    thresholds = bundle.thresholds if multi else None
    truncated = dataclasses.replace(
        bundle.golden[0], data=bundle.golden[0].data[:200], probabilities=np.zeros(5, np.float32)
    )
    here = dataclasses.replace(bundle, multi=multi, thresholds=thresholds, golden=[truncated])
    drift = replay.replay(here, here.make_body(), here.make_head(), "cpu", 1)
    assert (drift.images, drift.changed, drift.feature) == (1, 1, 2.0)
