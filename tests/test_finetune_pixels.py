"""The pixel cache and its batches: what is stored, refused and drawn."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from arrowhead import ConfigError, DataError
from arrowhead.commands.pixel_cache import build_pixel_cache
from arrowhead.decode.decoder import Decoder
from arrowhead.decode.pixels import PixelConfig
from arrowhead.features.extract import ExtractConfig
from arrowhead.features.feature_config import FeatureConfig
from arrowhead.features.store import Store
from arrowhead.finetuning import augmentation
from arrowhead.finetuning.augmentation import AugmentConfig
from arrowhead.finetuning.pixel_batches import PixelBatches
from arrowhead.finetuning.pixel_cache import PixelCache, PixelCacheConfig, PixelStore
from arrowhead.reporting.run_context import RunContext
from arrowhead.runtime.ray_cluster import LaunchConfig

IMAGES = FeatureConfig(
    pixels=PixelConfig(size=64), extract=ExtractConfig(batch_size=16, max_faults=5)
)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def folder(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 wide photos of two classes, one of them rotated by EXIF, and a broken one."""
    result = tmp_path_factory.mktemp("pixels") / "images"
    for number, path in enumerate(sorted(image_folder.glob("train/*/*.jpg"))[:36]):
        target = result / "ab"[number % 2] / f"{number:02}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[0x0112] = 6 if number == 3 else 1
        Image.open(path).resize((150, 100)).save(target, exif=exif, quality=95)
    (result / "a" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    return result


@pytest.fixture(scope="module")
def cache_path(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "pixels"
    build_pixel_cache(folder, path, IMAGES)
    return path


@pytest.fixture(scope="module")
def cache(cache_path: Path) -> PixelCache:
    return PixelCache(cache_path)


def test_the_cache_holds_each_readable_image_upright_with_its_size(
    cache: PixelCache, folder: Path
) -> None:
    paths = sorted(folder.rglob("*.jpg"))
    assert len(cache) == 36
    assert [paths[row].name for row in cache.rows] == [p.name for p in paths if len(p.name) == 6]
    assert cache.side == 80
    rotated = [paths[row].name for row in cache.rows].index("03.jpg")
    assert cache.size[rotated].tolist() == [150, 100]
    assert (np.delete(cache.size, rotated, 0) == [100, 150]).all()
    upright = Image.open(folder / "b" / "03.jpg").rotate(-90, expand=True).resize((80, 80))
    assert np.abs(cache.image(rotated) - np.asarray(upright, np.float32)).mean() < 3


def test_a_changed_folder_costs_only_its_new_images_and_drops_the_others(
    cache_path: Path, folder: Path, tmp_path: Path
) -> None:
    images, path = tmp_path / "images", tmp_path / "pixels"
    shutil.copytree(folder, images)
    shutil.copytree(cache_path, path)
    (images / "a" / "00.jpg").rename(images / "a" / "renamed.jpg")
    shutil.copy(images / "b" / "01.jpg", images / "b" / "copy.jpg")
    (images / "b" / "05.jpg").unlink()
    Image.open(images / "a" / "02.jpg").rotate(180).save(images / "b" / "new.jpg")
    counts = build_pixel_cache(images, path, IMAGES)["counts"]
    assert (counts["decoded"], counts["features"], counts["faults"]) == (1, 37, 1)
    listed = [shard["name"] for shard in PixelStore(path).manifest()["shards"]]
    assert sorted(listed) == sorted(file.stem for file in (path / "shards").glob("*.arrow"))
    assert (PixelCache(path).size > 0).all()


def test_a_cache_that_does_not_fit_is_refused_before_decoding(
    cache_path: Path, folder: Path, tmp_path: Path
) -> None:
    too_small = PixelCacheConfig(cache_bytes=300_000)
    with pytest.raises(ConfigError, match=r"(?s)37 images of 80 x 80 pixels.*--cache-bytes 710400"):
        build_pixel_cache(folder, tmp_path / "pixels", IMAGES, too_small)
    assert not (tmp_path / "pixels").exists()
    with pytest.raises(ConfigError, match="--cache-size 80"):
        build_pixel_cache(folder, cache_path, IMAGES, PixelCacheConfig(cache_size=96))
    with pytest.raises(ConfigError, match="pixel cache"):
        Store(cache_path)


def test_a_flipped_bit_in_a_shard_is_refused(cache_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "pixels"
    shutil.copytree(cache_path, path)
    shard = next((path / "shards").glob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=shard.name):
        PixelCache(path)


@pytest.mark.slow
def test_two_workers_write_the_same_cache_as_one(
    folder: Path, cache_path: Path, tmp_path: Path
) -> None:
    context = RunContext(launch=LaunchConfig(workers=2))
    build_pixel_cache(folder, tmp_path / "pixels", IMAGES, context=context)
    for shard in (cache_path / "shards").glob("*.arrow"):
        assert (tmp_path / "pixels" / "shards" / shard.name).read_bytes() == shard.read_bytes()


def batches(cache: PixelCache, config: AugmentConfig, pixels: PixelConfig) -> PixelBatches:
    return PixelBatches(cache, config, pixels, MEAN, STD, batch_size=16)


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
def test_the_clean_view_is_that_of_the_decoder_within_three_levels(
    cache: PixelCache, folder: Path, resize: str
) -> None:
    pixels = PixelConfig(size=64, resize=resize)  # type: ignore[arg-type]
    paths = sorted(folder.rglob("*.jpg"))
    encoded = [paths[row].read_bytes() for row in cache.rows[:16]]
    expected = Decoder(pixels, batch_size=16, threads=2)(encoded, [bytes(16)] * 16).views[0]
    (clean,) = batches(cache, AugmentConfig(), pixels).clean([np.arange(16)])
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))
    levels = (clean * std + mean) * 255
    difference = (levels - torch.from_numpy(expected).permute(0, 3, 1, 2)).abs()
    assert clean.is_contiguous(memory_format=torch.channels_last)
    assert difference.mean() < 3  # 1.3 of 255 on photos at 224 pixels
    assert difference.mean((1, 2, 3)).max() < 8


@pytest.mark.parametrize(
    "config",
    [
        AugmentConfig(augment="top-down", seed=3),
        AugmentConfig(augment="none", auto_augment="trivial"),
        AugmentConfig(auto_augment="rand", rand_operations=1),
    ],
    ids=["top-down", "trivial", "rand"],
)
def test_an_augmented_image_depends_only_on_seed_epoch_and_image(
    cache: PixelCache, config: AugmentConfig
) -> None:
    maker = batches(cache, config, IMAGES.pixels)
    first, second = maker.augmented(1, [np.arange(16), np.arange(16, 28)])
    shuffled = np.array([20, 3, 17, 9, 0])
    (again,) = batches(cache, config, IMAGES.pixels).augmented(1, [shuffled])
    assert torch.equal(again, torch.cat([first, second])[shuffled])
    (later,) = maker.augmented(2, [shuffled])
    differ = (later != again).flatten(1).any(1)
    assert differ.sum() >= 3  # TrivialAugment may draw the identity
    other = batches(cache, dataclasses.replace(config, seed=9), IMAGES.pixels)
    assert not torch.equal(next(other.augmented(1, [shuffled])), again)


def test_a_random_crop_keeps_the_aspect_ratio_of_the_photo_within_bounds() -> None:
    for aspect in (0.2, 1.0, 1.5, 8.0):
        for epoch in range(50):
            one = augmentation.draw_augmentation(AugmentConfig(), epoch, 7, aspect)
            height, width = one.end - one.start
            assert one.start.min() >= 0
            assert one.end.max() <= 1 + 1e-6
            assert 0.74 < width * aspect / height < 1.34
            if 0.5 < aspect < 2:
                assert height * width > 0.34


def test_mixing_is_the_same_for_one_worker_and_for_two() -> None:
    images = torch.rand(10, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    target = augmentation.soft_targets(torch.arange(10) % 3, 3, smoothing=0.1)
    config = AugmentConfig(mixup=0.4, cutmix=1.0, seed=5)
    mixed, mixed_target = augmentation.mix(images, target, config, step=4)
    parts = [
        augmentation.mix(images[a:b], target[a:b], config, 4, first=a) for a, b in ((0, 6), (6, 10))
    ]
    assert torch.equal(mixed, torch.cat([part[0] for part in parts]))
    assert torch.equal(mixed_target, torch.cat([part[1] for part in parts]))
    assert torch.allclose(mixed_target.sum(1), torch.ones(10))
    assert not torch.equal(mixed, augmentation.mix(images, target, config, step=5)[0])
    pasted, share = augmentation.mix(
        images, torch.eye(10), AugmentConfig(cutmix=1.0, seed=1), step=0
    )
    kept = (pasted == images).all(1).float().mean((1, 2))
    assert torch.allclose(kept, share.diagonal(), atol=1e-6)
