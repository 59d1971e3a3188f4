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
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    draw(folder, per_class=PER_CLASS, seed=0)
    return folder


@pytest.fixture(scope="module")
def other_seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    draw(folder, per_class=1, seed=1)
    return folder


def _read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.jpg")}


def _mean_colours(folder: Path, name: str) -> NDArray[np.float64]:
    """Mean RGB of every image of a class, float64 (N, 3)."""
    paths = sorted(folder.glob(f"*/{name}/*.jpg"))
    return np.array([np.asarray(Image.open(path)).mean((0, 1)) for path in paths])


def test_the_same_seed_writes_the_same_bytes_and_counts_the_files(
    other_seed: Path, tmp_path: Path
) -> None:
    count = draw(tmp_path, per_class=1, seed=1)
    assert count == len(_read_files(tmp_path))
    assert _read_files(tmp_path) == _read_files(other_seed)


def test_another_seed_writes_different_images(demo_folder: Path, other_seed: Path) -> None:
    assert not set(_read_files(demo_folder).values()) & set(_read_files(other_seed).values())


def test_no_two_images_are_equal(demo_folder: Path) -> None:
    contents = _read_files(demo_folder)
    assert len(set(contents.values())) == len(contents)


def test_three_quarters_of_each_class_train_and_a_quarter_validates(demo_folder: Path) -> None:
    for name in CLASSES:
        assert len(list((demo_folder / "train" / name).iterdir())) == PER_CLASS * 3 // 4
        assert len(list((demo_folder / "valid" / name).iterdir())) == PER_CLASS // 4


def test_new_images_are_in_one_folder_and_their_names_do_not_reveal_the_class(
    demo_folder: Path,
) -> None:
    names = [path.name for path in (demo_folder / "new").iterdir() if path.is_file()]
    assert len(names) == NEW_IMAGES
    assert not any(label in name for label in CLASSES for name in names)


def test_image_sizes_vary_and_every_file_opens(demo_folder: Path) -> None:
    sizes = set()
    for path in demo_folder.rglob("*.jpg"):
        with Image.open(path) as image:
            image.load()
            assert (image.format, image.mode) == ("JPEG", "RGB")
            sizes.add(image.size)
    assert len(sizes) >= 6
    assert any(width > height for width, height in sizes)
    assert any(width < height for width, height in sizes)


def test_mean_colour_does_not_reveal_the_class(demo_folder: Path) -> None:
    colours = np.stack([_mean_colours(demo_folder, name) for name in CLASSES])
    accuracy_by_half = []
    # Even images are classified by the centroids of odd ones, and the other way round.
    for half in (0, 1):
        centroids = colours[:, 1 - half :: 2].mean(1)
        distance = np.linalg.norm(colours[:, half::2, None] - centroids, axis=-1)
        accuracy_by_half.append(distance.argmin(-1) == np.arange(len(CLASSES))[:, None])
    assert np.mean(accuracy_by_half) < 0.55
