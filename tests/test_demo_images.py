"""The demo pictures keep their promises: repeatable, complete, varied, and not told by colour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arrowhead.demo import CLASSES, NEW_IMAGES, draw

PER_CLASS = 16


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    draw(folder, per_class=PER_CLASS, seed=0)
    return folder


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.jpg")}


def _mean_colours(folder: Path) -> dict[str, np.ndarray]:
    """Mean RGB of every picture of a class, float64 [images, 3]."""
    return {
        name: np.array(
            [
                np.asarray(Image.open(path)).mean((0, 1))
                for path in sorted(folder.glob(f"*/{name}/*.jpg"))
            ]
        )
        for name in CLASSES
    }


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    draw(tmp_path / "once", per_class=2, seed=5)
    draw(tmp_path / "again", per_class=2, seed=5)
    assert _contents(tmp_path / "once") == _contents(tmp_path / "again")


def test_another_seed_writes_other_pictures(pictures: Path, tmp_path: Path) -> None:
    draw(tmp_path, per_class=1, seed=1)
    assert not set(_contents(pictures).values()) & set(_contents(tmp_path).values())


def test_no_picture_is_written_twice(pictures: Path) -> None:
    contents = _contents(pictures)
    assert len(set(contents.values())) == len(contents)


def test_the_number_of_files_is_returned(tmp_path: Path) -> None:
    assert draw(tmp_path, per_class=1) == len(list(tmp_path.rglob("*.*")))


def test_every_class_has_its_share_in_train_and_valid(pictures: Path) -> None:
    for name in CLASSES:
        assert len(list((pictures / "train" / name).iterdir())) == PER_CLASS * 3 // 4
        assert len(list((pictures / "valid" / name).iterdir())) == PER_CLASS // 4


def test_new_pictures_lie_flat_and_their_names_tell_no_class(pictures: Path) -> None:
    names = [path.name for path in (pictures / "new").iterdir() if path.is_file()]
    assert len(names) == NEW_IMAGES
    assert not any(label in name for label in CLASSES for name in names)


def test_file_sizes_vary_and_every_file_opens(pictures: Path) -> None:
    sizes = set()
    for path in pictures.rglob("*.jpg"):
        with Image.open(path) as image:
            image.load()
            assert (image.format, image.mode) == ("JPEG", "RGB")
            sizes.add(image.size)
    assert len(sizes) >= 6
    assert {width > height for width, height in sizes} == {True, False}


def test_mean_colour_does_not_give_the_class_away(pictures: Path) -> None:
    colours = _mean_colours(pictures)
    # Each picture meets centroids that it did not help to form: even and odd ones swap roles.
    hits = [
        CLASSES[int(np.argmin(distances))] == name
        for half in (0, 1)
        for name in CLASSES
        for colour in colours[name][half::2]
        for distances in [
            [np.linalg.norm(colour - colours[c][1 - half :: 2].mean(0)) for c in CLASSES]
        ]
    ]
    assert np.mean(hits) < 0.55
