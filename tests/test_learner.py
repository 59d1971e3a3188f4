"""The Python interface: Images and Learner, as in the first lesson of fast.ai."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from arrowhead import ConfigError, Images, Learner
from arrowhead.decode.pixels import PixelConfig
from arrowhead.features.backbone import BodyConfig
from arrowhead.training.lr_finder import Curve


@pytest.fixture(scope="module")
def images(image_folder: Path) -> Images:
    return Images.from_folder(image_folder)


@pytest.fixture(scope="module")
def learn(images: Images, tmp_path_factory: pytest.TempPathFactory) -> Learner:
    body = BodyConfig(body="resnet18", weights="random")
    store = tmp_path_factory.mktemp("learner") / "store"
    return Learner(body, images, store=store, pixels=PixelConfig(size=64, views=2))


def test_images_have_classes_labels_and_paths_before_decoding(images, image_folder):
    assert images.classes == ["baskets", "beads", "leaves"]
    names = [images.classes[label] for label in images.valid_labels]
    assert names == [path.parent.name for path in images.valid_paths]
    assert set(images.valid_paths) == set((image_folder / "valid").glob("*/*.jpg"))


def test_fit_prints_losses_and_accuracy_of_each_epoch(learn, capsys):
    lines = learn.fit(0.01, 3)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["epoch", "train", "loss", "valid", "loss", "accuracy"]
    assert [line.split()[0] for line in shown[1:4]] == ["0", "1", "2"]
    assert float(shown[3].split()[3]) == pytest.approx(lines[-1]["accuracy"], abs=1e-6)


def test_predict_gives_log_probabilities_in_the_order_of_the_labels(learn, images):
    lines = learn.fit(0.01, 3)
    log_preds = learn.predict()
    assert log_preds.shape == (len(images.valid_labels), 3)
    assert log_preds.dtype == np.float32
    np.testing.assert_allclose(np.exp(log_preds).sum(1), 1, atol=1e-5)
    right = (log_preds.argmax(1) == images.valid_labels).mean()
    assert right == pytest.approx(lines[-1]["accuracy"])


def test_a_second_learner_on_the_same_store_decodes_nothing(learn, images, capsys):
    pixels = PixelConfig(size=64, views=2)
    body = BodyConfig(body="resnet18", weights="random")
    Learner(body, images, store=learn.store.path, pixels=pixels)
    assert "\n0 decoded" in capsys.readouterr().out


def test_lr_find_returns_the_curve_and_its_suggestions(learn):
    curve = learn.lr_find(steps=40, seeds=2)
    assert isinstance(curve, Curve)
    assert curve.losses.shape == (2, 40)
    assert curve.rate == curve.suggestions[curve.chosen]
    shown = repr(curve)  # what a prompt answers
    assert "\n" not in shown
    assert f"rate {curve.rate:.2g} ({curve.chosen})" in shown
    assert curve.verdict in shown


def test_a_trained_head_can_be_saved_for_scoring(learn, tmp_path):
    learn.fit(0.01, 2)
    metrics = learn.save(tmp_path / "bundle")
    assert (tmp_path / "bundle" / "bundle.json").is_file()
    assert 0 <= metrics["accuracy"] <= 1


def test_fit_continues_with_the_current_weights_unless_fresh_is_given(learn):
    first = learn.fit(0.001, 2, fresh=True)
    more = learn.fit(0.001, 1)
    assert more[0]["train_loss"] < first[0]["train_loss"]
    again = learn.fit(0.001, 2, fresh=True)
    assert [line["valid_loss"] for line in again] == [line["valid_loss"] for line in first]


def test_files_are_predicted_with_faults_as_none(learn, image_folder, tmp_path):
    learn.fit(0.01, 2, fresh=True)
    good = sorted((image_folder / "valid").glob("*/*.jpg"))[:3]
    bad = tmp_path / "page.jpg"
    bad.write_text("<html>")
    result = learn.predict([*good, bad, tmp_path / "missing.jpg"])
    assert [one.path for one in result] == [
        *map(str, good),
        str(bad),
        str(tmp_path / "missing.jpg"),
    ]
    assert all(one.label in learn.images.classes and one.fault is None for one in result[:3])
    assert sum(result[0].probabilities.values()) == pytest.approx(1, abs=1e-5)
    assert [one.label for one in result[3:]] == [None, None]
    assert result[3].fault.startswith("not an image")
    assert result[4].fault.startswith("unreadable")
    learn.save(tmp_path / "bundle")
    loaded = Learner.load(tmp_path / "bundle")
    assert [one.label for one in loaded.predict(good)] == [one.label for one in result[:3]]
    assert "3 classes" in repr(loaded)
    loaded.close()


def test_a_table_is_a_source_and_its_settings_are_kept(image_folder, tmp_path):
    files = sorted((image_folder / "train").glob("*/*.jpg"))[::3]
    lines = [f"{one.parent.name}/{one.stem},{one.parent.name}" for one in files]
    (tmp_path / "labels.csv").write_text("\n".join(["path,labels", *lines]))
    source = {"images": str(image_folder / "train"), "suffix": ".jpg", "valid_share": 0.4}
    images = Images.from_table(tmp_path / "labels.csv", **source)
    assert "beads" in repr(images) and f"{len(files)} images" in repr(images)
    body, pixels = BodyConfig(body="shufflenet_v2_x0_5", weights="random"), PixelConfig(size=64)
    learner = Learner(body, images, store=tmp_path / "store", pixels=pixels)
    assert len(images.valid_labels) > 0.25 * len(files)
    assert "shufflenet_v2_x0_5" in repr(learner) and "not fitted" in repr(learner)


def test_a_refusal_names_python_keywords_not_flags(images, learn):
    with pytest.raises(ConfigError) as refusal:
        learn.fit(-1, 1)
    assert "rate=" in refusal.value.found and "--" not in str(refusal.value)
    with pytest.raises(ConfigError, match="valid_share="):
        Images.from_folder(images.path, valid_share=1.5)


def test_the_lr_finder_curve_can_be_plotted(learn):
    assert learn.lr_find(steps=20, seeds=1).plot().get_axes()


def test_a_fit_is_recorded_in_mlflow_when_asked(images, add_mlflow_db, tmp_path):
    from mlflow import MlflowClient

    uri = f"sqlite:///{add_mlflow_db(tmp_path)}/mlflow.db"
    body, pixels = BodyConfig(body="shufflenet_v2_x0_5", weights="random"), PixelConfig(size=64)
    learner = Learner(body, images, store=tmp_path / "s", pixels=pixels, tracking_uri=uri)
    lines = learner.fit(0.01, 2)
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("arrowhead").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.info.status == "FINISHED" and run.data.params["train.epochs"] == "2"
    assert run.data.metrics["valid_loss"] == pytest.approx(lines[-1]["valid_loss"])


def test_settings_are_keywords_of_the_learner(images, tmp_path):
    small = {"weights": "random", "size": 64, "batch_size": 8}
    learner = Learner("shufflenet_v2_x0_5", images, store=tmp_path / "store", **small)
    assert (learner.store.recipe.body, learner.store.recipe.size) == ("shufflenet_v2_x0_5", 64)


def test_omitted_settings_are_taken_from_the_existing_store(learn, images, capsys):
    again = Learner("resnet18", images, store=learn.store.path)
    assert "\n0 decoded" in capsys.readouterr().out
    assert again.store.recipe == learn.store.recipe
    for request in ({"size": 128}, {"pixels": PixelConfig(size=224)}):
        with pytest.raises(ConfigError, match="size = 64"):
            Learner("resnet18", images, store=learn.store.path, **request)
    with pytest.raises(ConfigError, match="body = resnet18"):
        Learner("resnet34", images, store=learn.store.path)


@pytest.mark.parametrize("weights", ["nowhere.safetensors", "IMAGENET1K_V9"])
def test_settings_that_a_refusal_names_are_known_keywords(images, tmp_path, weights):
    with pytest.raises(ConfigError) as refusal:
        Learner("resnet18", images, store=tmp_path / "store", weights=weights)
    assert refusal.value.__cause__ is None and refusal.value.__suppress_context__
    assert "--" not in str(refusal.value)
    for name in re.findall(r"(\w+)=", str(refusal.value)):
        with pytest.raises(ConfigError):
            Learner("resnet18", images, **{name: object()})  # known, but of no use


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ({"rate": "x", "epochs": 3}, "rate='x'"),
        ({"rate": 0.1, "epochs": 3.5}, "epochs=3.5"),
        ({"rate": 0.1, "epochs": True}, "epochs=True"),
        ({"rate": 0.1, "epochs": 3, "dropuot": 0.5}, "dropuot="),
        ({"rate": 0.1, "epochs": 3, "schedule": "cosin"}, "schedule='cosin'"),
    ],
)
def test_a_setting_of_another_kind_is_refused_in_plain_words(learn, words, named):
    with pytest.raises(ConfigError) as refusal:
        learn.fit(**words)
    assert named in refusal.value.found
    assert refusal.value._render_traceback_() == [f"ConfigError: {refusal.value}"]


def test_fit_accepts_numpy_numbers(learn):
    assert len(learn.fit(np.float32(0.01), np.int64(2))) == 2


def test_of_many_epochs_the_first_best_last_and_some_others_are_printed(images, capsys, tmp_path):
    small = {"weights": "random", "size": 32}
    learner = Learner("shufflenet_v2_x0_5", images, store=tmp_path / "s", head="linear", **small)
    capsys.readouterr()
    lines = learner.fit(0.05, 100, best="valid_loss")
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = [line for line in shown if line[0].isdigit()]
    epochs = [int(row[0]) for row in rows]
    best = min(range(100), key=lambda epoch: lines[epoch]["valid_loss"])
    assert len(lines) == 100 and 20 <= len(rows) <= 40
    assert {0, best, 99} <= set(epochs) and len(set(epochs)) == len(epochs)
    for row in rows:
        assert float(row[2]) == pytest.approx(lines[int(row[0])]["valid_loss"], abs=1e-6)
