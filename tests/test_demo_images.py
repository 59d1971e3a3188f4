"""The demo's images: reproducible, complete, varied, and not classifiable by colour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from arrowhead.demo import CLASSES, NEW_IMAGES, draw

PER_CLASS = 12


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    draw(folder, per_class=PER_CLASS, seed=0)
    return folder


@pytest.fixture(scope="module")
def other_seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    draw(folder, per_class=1, seed=1)
    return folder


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.jpg")}


def _mean_colours(folder: Path, name: str) -> NDArray[np.float64]:
    """Mean RGB of every picture of a class, float64 [images, 3]."""
    paths = sorted(folder.glob(f"*/{name}/*.jpg"))
    return np.array([np.asarray(Image.open(path)).mean((0, 1)) for path in paths])


def test_the_same_seed_writes_the_same_bytes_and_counts_the_files(
    other_seed: Path, tmp_path: Path
) -> None:
    count = draw(tmp_path, per_class=1, seed=1)
    assert count == len(_contents(tmp_path))
    assert _contents(tmp_path) == _contents(other_seed)


def test_another_seed_writes_other_pictures(pictures: Path, other_seed: Path) -> None:
    assert not set(_contents(pictures).values()) & set(_contents(other_seed).values())


def test_no_picture_is_written_twice(pictures: Path) -> None:
    contents = _contents(pictures)
    assert len(set(contents.values())) == len(contents)


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
    assert any(width > height for width, height in sizes)
    assert any(width < height for width, height in sizes)


def test_mean_colour_does_not_reveal_the_class(pictures: Path) -> None:
    colours = np.stack([_mean_colours(pictures, name) for name in CLASSES])
    hits = []
    # Each picture meets centroids that it did not help to form: even and odd ones swap roles.
    for half in (0, 1):
        centroids = colours[:, 1 - half :: 2].mean(1)
        away = np.linalg.norm(colours[:, half::2, None] - centroids, axis=-1)
        hits.append(away.argmin(-1) == np.arange(len(CLASSES))[:, None])
    assert np.mean(hits) < 0.55
