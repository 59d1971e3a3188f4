"""The lesson's three lines, as the lesson's reader types them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from arrowhead import Images, Learner
from arrowhead.decode import PixelConfig
from arrowhead.lr_finder import Curve
from arrowhead.model import BodyConfig


@pytest.fixture(scope="module")
def images(drawn: Path) -> Images:
    return Images.from_folder(drawn)


@pytest.fixture(scope="module")
def learn(images: Images, tmp_path_factory: pytest.TempPathFactory) -> Learner:
    body = BodyConfig(body="resnet18", weights="random")
    store = tmp_path_factory.mktemp("learner") / "store"
    return Learner(body, images, store=store, pixels=PixelConfig(size=64, views=2))


def test_images_know_their_classes_labels_and_files_before_anything_is_decoded(images, drawn):
    assert images.classes == ["baskets", "beads", "leaves"]
    names = [images.classes[label] for label in images.valid_labels]
    assert names == [path.parent.name for path in images.valid_paths]
    assert set(images.valid_paths) == set((drawn / "valid").glob("*/*.jpg"))


def test_fit_prints_epoch_train_loss_valid_loss_accuracy(learn, capsys):
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
    assert curve.rate == curve.suggestions["held-out"]


def test_what_was_learned_can_be_saved_for_scoring(learn, tmp_path):
    learn.fit(0.01, 2)
    metrics = learn.save(tmp_path / "bundle")
    assert (tmp_path / "bundle" / "bundle.json").is_file()
    assert 0 <= metrics["accuracy"] <= 1
