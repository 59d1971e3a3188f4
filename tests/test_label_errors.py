"""Label errors: planted ones are found, clean and random labels are left alone."""

from __future__ import annotations

import csv
import dataclasses
import shutil

import numpy as np
import pytest
import torch

from arrowhead.data.catalog import Catalog
from arrowhead.errors import ConfigError
from arrowhead.evaluation import label_noise
from arrowhead.examine import label_errors
from arrowhead.features.store import Store
from arrowhead.training import run
from arrowhead.training.dataset import Data, InMemoryFeatures

pytestmark = pytest.mark.usefixtures("one_thread")


def make_data(feature_ND, label, classes, key=None):
    """Data of images in memory, with content keys in random order."""
    rows = np.arange(len(label))
    key = np.random.default_rng(9).permutation(rows).astype(np.uint64) if key is None else key
    return Data(
        feature=InMemoryFeatures(torch.from_numpy(feature_ND.astype(np.float16))[:, None]),
        label=torch.from_numpy(label),
        key=key,
        train=rows,
        valid=rows[:0],
        classes=[f"class {number:03}" for number in range(classes)],
    )


def clouds(per_class, classes, width=24, distance=2.0, seed=0):
    """Normal clouds around random centres: features and labels."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(0, distance, (classes, width))
    label = np.repeat(np.arange(classes), per_class)
    return centre[label] + rng.normal(0, 1, (len(label), width)), label


def rank(data):
    return label_errors.rank_labels(data, np.arange(len(data.key)))


def flip(label, classes, share, seed=1):
    """Labels of which a share is replaced, and which rows."""
    rng = np.random.default_rng(seed)
    rows = rng.choice(len(label), round(share * len(label)), replace=False)
    changed = label.copy()
    changed[rows] = (label[rows] + rng.integers(1, classes, len(rows))) % classes
    return changed, rows


@pytest.fixture(scope="module")
def photos(photo_store):
    return run.read_data(Store(photo_store), "cpu")[0]


def test_flipped_labels_of_photos_come_first_and_are_counted(photos):
    precision = []
    for seed in (200, 201):
        label, rows = flip(photos.label.numpy(), 2, 0.05, seed)
        found = rank(dataclasses.replace(photos, label=torch.from_numpy(label)))
        precision.append(np.isin(found.row[: len(rows)], rows).mean())
        assert found.estimated_errors == pytest.approx(len(rows), rel=0.25)
        assert found.interval[0] <= len(rows) + 1 <= found.interval[1]  # one is wrong by itself
    assert np.mean(precision) >= 0.88


def test_photos_with_their_own_labels_have_few_flags_and_the_dog_among_the_cats_is_first(
    photo_store,
):
    store = Store(photo_store)
    found = label_errors.find_label_errors(store)
    paths, classes = store.read_catalog()["paths"], store.manifest()["classes"]
    assert found.flagged <= 0.03 * 800
    assert paths[found.row[0]] == "valid/cats/cat.4085.jpg"  # it shows a dog
    assert (classes[found.label[0]], classes[found.suggested[0]]) == ("cats", "dogs")
    assert found.learnable and found.accuracy > 0.96


def test_random_labels_of_photos_are_not_flagged_but_said_to_be_hardly_learnable(photos):
    label = np.random.default_rng(0).permutation(photos.label.numpy())
    found = rank(dataclasses.replace(photos, label=torch.from_numpy(label)))
    assert not found.learnable
    assert found.flagged == 0


@pytest.mark.parametrize("classes", [2, 10])
def test_planted_errors_among_several_classes_are_found_with_the_right_suggestion(classes):
    feature, label = clouds(600 // classes, classes)
    changed, rows = flip(label, classes, 0.05)
    found = rank(make_data(feature, changed, classes))
    first = found.row[: len(rows)]
    assert np.isin(first, rows).mean() >= 0.95
    assert (found.suggested[: len(rows)] == label[first]).mean() >= 0.9
    assert (found.label == changed[found.row]).all()
    assert found.estimated_errors == pytest.approx(len(rows), rel=0.25)
    assert abs(found.flagged - len(rows)) <= 0.25 * len(rows)


def test_clean_clouds_have_hardly_a_flag():
    feature, label = clouds(150, 4)
    found = rank(make_data(feature, label, 4))
    assert found.flagged <= 2
    assert found.estimated_errors <= 4


def test_order_of_the_files_does_not_matter():
    feature, label = clouds(60, 3, distance=0.6)
    changed, _ = flip(label, 3, 0.1)
    data = make_data(feature, changed, 3)
    order = np.random.default_rng(4).permutation(len(label))
    mixed = make_data(feature[order], changed[order], 3, data.key[order])
    one, other = rank(data), rank(mixed)
    assert one.flagged == other.flagged
    np.testing.assert_array_equal(one.row, order[other.row])
    np.testing.assert_allclose(one.score, other.score, atol=1e-3)


def test_of_copies_with_different_labels_only_the_wrong_one_is_flagged():
    feature, label = clouds(50, 2)
    feature = np.concatenate([feature, feature[[0, 0, 60]]])
    label = np.concatenate([label, [0, 1, 0]])
    key = np.concatenate([np.arange(100), [0, 0, 60]]).astype(np.uint64)
    found = rank(make_data(feature, label, 2, key))
    # Of three copies two say 0; of two copies of image 60 the class 1 has more neighbours.
    assert set(found.row[:2].tolist()) == {101, 102}
    assert found.score[:2].min() > 0.9
    suggested = dict(zip(found.row.tolist(), found.suggested.tolist(), strict=True))
    assert (suggested[101], suggested[102]) == (0, 1)
    score = dict(zip(found.row.tolist(), found.score.tolist(), strict=True))
    assert score[60] == pytest.approx(1 - score[102])  # one of the two is right
    assert found.conflicts == 2
    assert found.flagged == 2
    assert 2 <= found.estimated_errors <= 4


def test_copies_whose_labels_are_equally_likely_are_flagged_without_a_suggestion(tmp_path):
    label = np.tile([0, 1], 20)
    feature, key = np.ones((40, 4)), np.arange(40).astype(np.uint64)
    key[1] = key[0]
    found = rank(make_data(feature, label, 2, key))
    assert set(found.row[: found.flagged].tolist()) == {0, 1}
    assert found.suggested[:2].tolist() == [-1, -1]
    assert found.conflicts == 1
    catalog = Catalog(
        root="/photos",
        paths=[f"{number}.jpg" for number in range(40)],
        sizes=np.ones(40, np.int64),
        stamps=np.ones(40, np.int64),
        labels=[(f"class {number:03}",) for number in label],
        splits=["train"] * 40,
    )
    label_errors.write_csv(found, catalog, tmp_path / "label_errors.csv")
    with (tmp_path / "label_errors.csv").open(newline="") as file:
        assert {row["suggested"] for row in csv.DictReader(file)} == {""}


def test_of_near_copies_with_different_labels_only_the_wrong_one_is_flagged():
    feature, label = clouds(40, 3)
    copied = np.repeat(np.arange(0, 120, 12), 3)  # 10 photos, three more copies of each
    rng = np.random.default_rng(3)
    feature = np.concatenate([feature, feature[copied] + rng.normal(0, 0.02, (30, 24))])
    wrong = np.concatenate([label, (label[copied] + 1) % 3])  # by themselves they would outvote it
    groups = [np.append(one, 120 + np.flatnonzero(copied == one)) for one in np.unique(copied)]
    found = label_errors.rank_labels(make_data(feature, wrong, 3), np.arange(150), groups)
    assert set(found.row[: found.flagged].tolist()) == set(range(120, 150))
    suggested = dict(zip(found.row.tolist(), found.suggested.tolist(), strict=True))
    assert [suggested[120 + n] for n in range(30)] == label[copied].tolist()


def test_conflicting_copies_are_found_when_every_image_is_the_same():
    feature, label = np.ones((6, 8)), np.array([0, 0, 0, 0, 1, 2])
    found = rank(make_data(feature, label, 3, np.zeros(6, np.uint64)))
    assert sorted(found.row.tolist()) == [4, 5]
    assert (found.flagged, found.conflicts, found.estimated_errors) == (2, 2, 2.0)
    assert found.suggested.tolist() == [0, 0]


def test_class_with_one_image_is_not_judged():
    feature, label = clouds(40, 2)
    feature = np.concatenate([feature, np.full((1, feature.shape[1]), 9.0)])
    found = rank(make_data(feature, np.append(label, 2), 3))
    assert found.not_judged == 1
    assert 80 not in found.row


@pytest.mark.parametrize(("per_class", "classes"), [(2, 2), (2, 5), (2, 60)])
def test_few_images_per_class_are_ranked_and_not_all_flagged(per_class, classes):
    feature, label = clouds(per_class, classes)
    found = rank(make_data(feature, label, classes))
    assert len(found.row) == len(label)
    assert found.flagged <= max(1, 0.1 * len(label))


def test_one_class_is_refused():
    feature, _ = clouds(5, 2)
    with pytest.raises(ConfigError, match="same label"):
        rank(make_data(feature, np.zeros(10, np.int64), 1))


def test_missing_and_surplus_labels_are_found_label_by_label():
    rng = np.random.default_rng(0)
    truth = (rng.random((500, 4)) < 0.3).astype(np.uint8)
    feature = truth @ rng.normal(0, 2, (4, 24)) + rng.normal(0, 1, (500, 24))
    label = truth.copy()
    wrong = rng.choice(2000, 60, replace=False)
    label.reshape(-1)[wrong] ^= 1
    found = rank(make_data(feature, label, 4))
    assert found.multi
    column = np.maximum(found.label, found.suggested)
    entry = found.row * 4 + column
    assert np.isin(entry[:60], wrong).mean() >= 0.9
    missing = found.label == -1
    assert (label.reshape(-1)[entry[missing]] == 0).all()
    assert (label.reshape(-1)[entry[~missing]] == 1).all()
    assert ((found.label == -1) != (found.suggested == -1)).all()
    assert found.estimated_errors == pytest.approx(60, rel=0.25)


def test_table_of_label_errors_has_the_fields_that_relabel_reads(tmp_path):
    catalog = Catalog(
        root="/photos",
        paths=["=cat.jpg", "dog.jpg", "fox.jpg"],
        sizes=np.ones(3, np.int64),
        stamps=np.ones(3, np.int64),
        labels=[("cats",), ("cats",), ("dogs",)],
        splits=["train"] * 3,
    )
    errors = label_errors.LabelErrors(
        row=np.array([1, 0, 2]),
        label=np.array([0, 0, 1]),
        suggested=np.array([1, 1, 0]),
        score=np.array([0.98765, 0.2, 0.1]),
        flagged=1,
        estimated_errors=1.2,
        interval=(0.5, 2.5),
        conflicts=0,
        accuracy=0.9,
        learnable=True,
        not_judged=0,
        multi=False,
    )
    label_errors.write_csv(errors, catalog, tmp_path / "label_errors.csv", images=2)
    with (tmp_path / "label_errors.csv").open(newline="") as file:
        table = list(csv.reader(file))
    assert table == [
        ["path", "label", "suggested", "score", "new_label"],
        ["dog.jpg", "cats", "dogs", "0.9877", ""],
        ["'=cat.jpg", "cats", "", "0.2", ""],  # more likely right than wrong: no suggestion
    ]


def test_table_joins_the_labels_of_an_image(tmp_path):
    catalog = Catalog(
        root="/photos",
        paths=["a.jpg", "b.jpg"],
        sizes=np.ones(2, np.int64),
        stamps=np.ones(2, np.int64),
        labels=[("cat", "dog"), ("fox",)],
        splits=["train"] * 2,
    )
    errors = label_errors.LabelErrors(
        row=np.array([0, 0, 1, 0]),
        label=np.array([1, -1, 2, 0]),
        suggested=np.array([-1, 2, -1, -1]),
        score=np.array([0.9, 0.8, 0.4, 0.1]),
        flagged=2,
        estimated_errors=2.0,
        interval=(1.0, 3.0),
        conflicts=0,
        accuracy=0.9,
        learnable=True,
        not_judged=0,
        multi=True,
    )
    label_errors.write_csv(errors, catalog, tmp_path / "label_errors.csv")
    with (tmp_path / "label_errors.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["label"], row["suggested"], row["score"]) for row in rows] == [
        ("cat|dog", "cat|fox", "0.9"),
        ("fox", "", "0.4"),
    ]


def test_store_with_a_photo_in_two_classes_reports_both_copies(image_folder, tmp_path, command):
    data = tmp_path / "data"
    shutil.copytree(image_folder / "train", data)
    (copied,) = sorted((data / "beads").iterdir())[:1]
    shutil.copy(copied, data / "leaves" / "copy.jpg")
    body = ["--body", "shufflenet_v2_x0_5", "--weights", "random", "--size", "64"]
    command("precompute", data, tmp_path / "store", *body)
    store = Store(tmp_path / "store")
    found = label_errors.find_label_errors(store)
    paths = store.read_catalog()["paths"]
    copies = {f"beads/{copied.name}", "leaves/copy.jpg"}
    assert {paths[row] for row in found.row[: found.flagged]} & copies
    score = dict(zip((paths[row] for row in found.row), found.score.tolist(), strict=True))
    assert sum(score[path] for path in copies) == pytest.approx(1)
    assert found.conflicts == 1


def test_mixture_tells_wrong_labels_from_unsure_predictions():
    rng = np.random.default_rng(0)
    logit = rng.normal(0, 2, 4000)
    right = np.where(rng.random(4000) < 1 / (1 + np.exp(-logit)), logit, -logit)
    unsure = label_noise.fit(right[:, None])
    assert unsure.wrong.sum() < 60  # a third of the predictions contradict their label
    flipped = right.copy()
    flipped[:200] *= -1
    noisy = label_noise.fit(flipped[:, None])
    assert noisy.interval[0] <= 200 <= noisy.interval[1]
    assert noisy.wrong[:200].mean() > 3 * noisy.wrong[200:].mean()


@pytest.mark.parametrize(("cost", "expected"), [(9.0, [0.0, 0.1, 0.6]), (11.0, [0.0, 0.1, 0.9])])
def test_a_second_fit_that_finds_fewer_errors_and_explains_the_labels_worse_gives_the_order_alone(
    cost, expected
):
    def noise(cost, wrong):
        wrong = np.array(wrong)
        number = {"scale": np.ones(2), "rate": np.ones(1) / 20, "interval": (0.0, 2.0)}
        return label_noise.LabelNoise(margin=-wrong, wrong=wrong, cost=cost, **number)

    first, again = noise(10.0, [0.9, 0.1, 0.0]), noise(cost, [0.0, 0.1, 0.6])
    chosen = label_errors._choose_number(first, again)
    assert chosen.wrong.tolist() == expected


def test_labels_that_are_hard_to_predict_do_not_pass_for_wrong():
    feature, label = clouds(40, 8, distance=0.35)
    found = rank(make_data(feature, label, 8))
    assert found.learnable and not found.reliable
    assert found.flagged == 0


def test_surely_right_labels_keep_the_order_of_their_margins():
    margin = np.append(np.linspace(0.5, 8, 50), -6.0)
    wrong = label_noise.fit(margin[:, None]).wrong
    assert (np.diff(wrong[:50]) < 0).all()  # none is 0 by rounding
