"""Heat maps: they add up to the logit, and they lie where the network looked."""

from __future__ import annotations

import dataclasses
import functools
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import slow_params
from PIL import Image
from torch import nn

from arrowhead import ConfigError
from arrowhead.bundle import format as bundle_format
from arrowhead.bundle import replay
from arrowhead.bundle.format import Bundle
from arrowhead.decode import geometry
from arrowhead.decode.headers import read_header
from arrowhead.decode.pixels import Header, PixelConfig
from arrowhead.decode.worker_process import SubprocessDecoder
from arrowhead.examine import heatmaps
from arrowhead.features import backbone, extract
from arrowhead.features.backbone import Body, BodyConfig
from arrowhead.features.feature_maps import FeatureMaps, feature_maps
from arrowhead.training import heads

AVERAGING_BODIES = ["resnet18", "densenet121", "regnet_y_400mf", "swin_t"]
OTHER_BODIES = ["mobilenet_v3_small", "convnext_tiny", "vit_b_32"]
AVERAGING_BODIES_OF_TIMM = ["timm/resnet10t", "timm/swinv2_cr_tiny_ns_224"]
OTHER_BODIES_OF_TIMM = ["timm/convnext_atto", "timm/vit_tiny_patch16_224", "timm/test_vit3"]
LARGE_BODIES = {"densenet121", "swin_t", "convnext_tiny", "vit_b_32"}
LARGE_BODIES |= {"timm/swinv2_cr_tiny_ns_224", "timm/vit_tiny_patch16_224"}
ORIENTATIONS = range(1, 9)

load = functools.cache(backbone.load)


def bodies(*names: str) -> list[Any]:
    """Parameters of a test: networks that take seconds are tested by `make test-slow`."""
    small = [name for name in names if name not in LARGE_BODIES]
    return [*small, *slow_params(*(name for name in names if name in LARGE_BODIES))]


@functools.cache
def width_of(config: BodyConfig, size: int) -> int:
    """The number of features."""
    weights = load(config)
    norm = {"mean": weights.mean, "std": weights.std}
    return Body(config.body, weights.state, pool=config.pool, size=size, **norm).width


def make_body(
    body: str,
    *,
    head: str = "linear",
    pool: str = "avg",
    weights: str = "random",
    mean: tuple[float, float, float] | None = None,
    **pixels: object,
) -> Bundle:
    """A bundle of three classes with a random head, and a random body by default."""
    config = BodyConfig(body=body, weights=weights, pool=pool, mean=mean, std=mean)
    loaded, pixel_config = load(config), PixelConfig(**{"size": 96} | pixels)
    width = width_of(config, pixel_config.size)
    state = heads.build_head(head, width, 3, seed=4).state_dict()
    generator = torch.Generator().manual_seed(1)
    for name, tensor in state.items():  # as after training: not the identity
        if tensor.dim() == 1 and tensor.is_floating_point():
            state[name] = torch.rand(tensor.shape, generator=generator) + 0.5
    return Bundle(
        recipe=extract.make_recipe(pixel_config, config, loaded, width),
        classes=["baskets", "beads", "leaves"],
        head=head,
        temperature=0.5,
        body_state=loaded.state,
        head_state=state,
        metrics={},
        lineage={},
    )


def scored_logits(bundle: Bundle, photos: list[bytes]) -> np.ndarray:
    """The logits that scoring computes."""
    feature_ND = replay.clean_features(bundle.recipe, bundle.make_body(), photos, "cpu", 1)
    with torch.no_grad():
        return bundle.make_head()(torch.from_numpy(feature_ND)).numpy()


@pytest.fixture(scope="module")
def photos(image_folder: Path) -> list[bytes]:
    """Five synthetic JPEGs."""
    return [path.read_bytes() for path in sorted((image_folder / "valid").rglob("*.jpg"))[::4]][:5]


# ------------------------------------------------------------------------- what they say


def assert_maps_add_up(bundle: Bundle, photos: list[bytes]) -> None:
    logit_NC = scored_logits(bundle, photos)
    bias_C = bundle.head_state["2.bias"].numpy()
    for wanted in (None, [2, 0, 1, 1, 2]):
        maps = heatmaps.explain(bundle, photos, wanted)
        for row, heatmap in enumerate(maps):
            assert heatmap is not None
            assert heatmap.method == "CAM"
            assert heatmap.map.dtype == np.float32
            assert heatmap.class_index == (wanted[row] if wanted else logit_NC[row].argmax())
            logit = logit_NC[row, heatmap.class_index]
            assert heatmap.logit == pytest.approx(logit, abs=1e-4)
            total = heatmap.map.mean() + bias_C[heatmap.class_index]
            assert total == pytest.approx(logit, abs=1e-4)
            assert np.ptp(heatmap.map) > 1e-3, "the same everywhere"


@pytest.mark.parametrize("body", bodies(*AVERAGING_BODIES))
def test_mean_of_a_cam_plus_bias_is_the_logit_that_scoring_computes(body, photos):
    assert_maps_add_up(make_body(body), photos)


def test_mean_of_a_cam_plus_bias_is_the_logit_with_pretrained_weights(mobilenet, dogscats):
    weights = mobilenet[mobilenet.index("--weights") + 1]
    bundle = make_body("mobilenet_v2", weights=weights, mean=(0.5, 0.5, 0.5))
    paths = sorted((dogscats / "valid").rglob("*.jpg"))[::40]
    assert_maps_add_up(bundle, [path.read_bytes() for path in paths])


@pytest.mark.parametrize("body", bodies(*AVERAGING_BODIES, *OTHER_BODIES))
def test_features_beside_a_map_are_those_of_the_body(body):
    config = BodyConfig(body=body, weights="random")
    loaded = load(config)
    net = Body(body, loaded.state, pool="avg", mean=loaded.mean, std=loaded.std, size=224)
    generator = torch.Generator().manual_seed(2)
    pixels_BCHW = torch.randint(0, 256, (16, 3, 224, 224), dtype=torch.uint8, generator=generator)
    maps = FeatureMaps(net)
    map_BKhw, feature_BD = maps(pixels_BCHW)
    assert torch.allclose(feature_BD, net(pixels_BCHW), rtol=1e-5, atol=1e-5)
    assert map_BKhw.dim() == 4
    assert maps.averaged == (body in AVERAGING_BODIES)
    if maps.averaged:
        assert torch.allclose(map_BKhw.mean((2, 3)), feature_BD, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("body", bodies(*AVERAGING_BODIES_OF_TIMM, *OTHER_BODIES_OF_TIMM))
def test_features_beside_a_map_are_those_of_the_body_of_timm(body):
    loaded = load(BodyConfig(body=body, weights="random"))
    size = loaded.pixels.side
    net = Body(body, loaded.state, pool="auto", mean=loaded.mean, std=loaded.std, size=size)
    generator = torch.Generator().manual_seed(2)
    pixels_BCHW = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=generator)
    maps = feature_maps(net)
    map_BKhw, feature_BD = maps(pixels_BCHW)
    assert torch.allclose(feature_BD, net(pixels_BCHW), rtol=1e-4, atol=1e-4)
    assert map_BKhw.dim() == 4
    assert maps.averaged == (body in AVERAGING_BODIES_OF_TIMM)
    (grad,) = torch.autograd.grad(feature_BD.square().sum(), map_BKhw)
    assert (grad.abs().amax((0, 1)) > 0).all(), "every position changes the features"


def test_maps_of_a_network_of_timm_add_up_to_the_logit(photos):
    assert_maps_add_up(make_body("timm/resnet10t"), photos)


def test_a_network_of_timm_without_map_or_grid_of_tokens_is_refused():
    loaded = load(BodyConfig(body="timm/levit_128s", weights="random"))
    net = Body("timm/levit_128s", loaded.state, pool="auto", mean=loaded.mean, std=loaded.std)
    with pytest.raises(ConfigError, match="No feature map was found in timm/levit_128s"):
        feature_maps(net)


@pytest.mark.parametrize("pool", ["max", "concat"])
def test_grad_cam_of_max_pooling_weights_channels_by_the_head(pool, photos):
    bundle = make_body("resnet18", pool=pool)
    state, width = bundle.head_state, 512
    # The gradient of a maximum, summed over positions, is 1; so is that of the average.
    weight_CD = state["2.weight"] / state["0.deviation"]
    weight_CK = weight_CD[:, :width] + (weight_CD[:, width:] if pool == "concat" else 0)
    assert_grad_cam(bundle, photos, lambda _: weight_CK)


def test_grad_cam_of_the_lesson_head_weights_channels_by_its_gradient(photos):
    bundle = make_body("resnet18", head="lesson")
    head = bundle.make_head()

    def gradient(feature_D: torch.Tensor) -> torch.Tensor:
        return torch.autograd.functional.jacobian(lambda x: head(x[None])[0], feature_D)

    assert_grad_cam(bundle, photos, gradient)


def assert_grad_cam(bundle: Bundle, photos: list[bytes], channel_weights: object) -> None:
    """Compare with the formula of the paper; channel_weights: from a feature (D,) to (C, K)."""
    body = bundle.make_body()
    with replay.clean_decoder(bundle.recipe, "cpu", 1, 16) as decode:
        view_NHWC = decode(photos, [bytes(16)] * len(photos)).views[0]
    map_NKhw, feature_ND = FeatureMaps(body)(torch.from_numpy(view_NHWC).permute(0, 3, 1, 2))
    wanted, positive = [2, 0, 1, 1, 2], 0
    for row, heatmap in enumerate(heatmaps.explain(bundle, photos, wanted)):
        assert heatmap is not None
        assert heatmap.method == "Grad-CAM"
        weight_K = channel_weights(feature_ND[row].detach())[wanted[row]]
        total_hw = (weight_K[:, None, None] * map_NKhw[row].detach()).sum(0).numpy()
        scale = float(np.abs(total_hw).max())
        assert heatmap.map == pytest.approx(np.maximum(total_hw, 0), abs=1e-3 * scale)
        positive += (heatmap.map > 0.01 * scale).any()
    assert positive


@pytest.mark.parametrize("body", bodies(*OTHER_BODIES))
def test_networks_that_do_more_than_average_get_grad_cam(body, photos):
    bundle = make_body(body, size=224)
    for heatmap in heatmaps.explain(bundle, photos * 3, [0] * 5 + [1] * 5 + [2] * 5):
        assert heatmap is not None
        assert (heatmap.method, heatmap.map.shape) == ("Grad-CAM", (7, 7))
        assert heatmap.map.min() >= 0
        assert np.isfinite(heatmap.map).all()


def test_an_image_can_be_explained_for_several_classes_in_any_order(photos):
    bundle = make_body("resnet18", head="lesson")
    a, b, broken = photos[0], photos[1], photos[2][:500]
    results = heatmaps.explain(bundle, [a, broken, b, a, a], [0, 0, 1, 2, 1])
    assert [one and one.class_index for one in results] == [0, None, 1, 2, 1]
    alone = [heatmaps.explain(bundle, [data], [c])[0] for data, c in ((a, 2), (b, 1))]
    for batched, single in zip([results[3], results[2]], alone, strict=True):
        assert batched is not None and single is not None
        assert batched.map == pytest.approx(single.map, rel=1e-4, abs=1e-4)
        assert batched.logit == pytest.approx(single.logit, abs=1e-4)


def test_no_images_give_no_maps():
    assert heatmaps.explain(make_body("resnet18"), []) == []


def test_more_images_than_a_batch_keep_their_order(photos):
    bundle = make_body("resnet18", size=32)
    numbered = [photos[n % 5] + bytes([n]) for n in range(20)]
    results = heatmaps.explain(bundle, numbered)
    logit_NC = scored_logits(bundle, numbered)
    assert [one and one.logit for one in results] == pytest.approx(list(logit_NC.max(1)), abs=1e-4)


def test_a_network_without_a_feature_map_is_refused():
    body = make_body("resnet18").make_body()
    body.module.net = nn.Flatten()
    with pytest.raises(ConfigError, match="No feature map was found in resnet18"):
        FeatureMaps(body)


# ----------------------------------------------------------------------- where they lie


def encode(upright: Image.Image, orientation: int, kind: str = "JPEG") -> bytes:
    """The file of a photo that EXIF turns upright."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright if orientation == 1 else upright.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    options = {"quality": 95} if kind == "JPEG" else {}
    stored.save(file, kind, exif=exif, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def photo(image_folder: Path) -> Image.Image:
    """A detailed photo of 403 x 301 pixels."""
    path = max((image_folder / "valid").rglob("*.jpg"), key=lambda path: path.stat().st_size)
    return Image.open(path).convert("RGB").resize((403, 301))


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
def test_the_box_of_a_map_holds_the_pixels_that_the_network_saw(resize, photo):
    config = PixelConfig(size=64, resize=resize)
    kinds = [(kind, turn) for kind in ("JPEG", "PNG", "TIFF") for turn in ORIENTATIONS]
    files = [encode(photo, turn, kind) for kind, turn in kinds]
    with SubprocessDecoder(config, batch_size=24, threads=1) as decode:
        pixels = decode(files, [bytes(16)] * 24)
    assert pixels.faults == [None] * 24
    for data, view, name in zip(files, pixels.views[0], kinds, strict=True):
        header = read_header(data, config)
        assert isinstance(header, Header)
        left, top, right, bottom = geometry.upright_box(config, header)
        corners = (left * 403, top * 301, right * 403, bottom * 301)
        margin = 100  # what lies beyond the photo is black
        canvas = Image.new("RGB", (403 + 2 * margin, 301 + 2 * margin))
        canvas.paste(photo, (margin, margin))
        box = tuple(corner + margin for corner in corners)
        seen = canvas.resize((64, 64), Image.Resampling.BILINEAR, box=box)
        difference = np.abs(np.asarray(seen, int) - view).mean()
        assert difference < 3, (name, difference)


@pytest.mark.parametrize("resize", ["crop", *slow_params("squash", "pad")])
def test_an_overlay_is_strongest_over_the_bright_square(resize):
    squares = [(0.68, 0.12), (0.25, 0.12), (0.25, 0.62), (0.68, 0.62)]
    cases = [(x, y, turn) for x, y in squares for turn in (1, 3, 6, 8)]
    files = []
    for x, y, turn in cases:
        left, top = int(x * 480), int(y * 360)
        upright = Image.new("RGB", (480, 360), (40, 40, 40))
        upright.paste((255, 255, 255), (left, top, left + 90, top + 90))
        files.append(encode(upright, turn))
    found = heatmaps.explain(bright_detector(resize), files, [0] * len(files))
    for (x, y, _), heatmap in zip(cases, found, strict=True):
        assert heatmap is not None
        alpha = drawn_overlay(heatmap)[..., 3]
        row, column = np.argwhere(alpha == alpha.max()).mean(0)
        left, top, right, bottom = heatmap.box
        peak_x = left + (right - left) * (column + 0.5) / 64
        peak_y = top + (bottom - top) * (row + 0.5) / 64
        assert peak_x == pytest.approx(x + 90 / 480 / 2, abs=0.08)
        assert peak_y == pytest.approx(y + 90 / 360 / 2, abs=0.1)


@pytest.mark.parametrize(
    ("body", "first_center", "distance"),
    [
        ("resnet18", 0.5, 32),  # every layer with a stride is centered on its first pixel
        ("timm/resnet18", 0.5, 32),
        ("timm/convnext_atto", 16, 32),
        *slow_params(
            ("mobilenet_v2", 0.5, 32),
            ("densenet121", 14.5, 32),  # three poolings of 2 x 2: 2 + 4 + 8 pixels further
            ("convnext_tiny", 16, 32),
            ("vit_b_32", 16, 32),
            ("swin_t", 16, 32),
        ),
    ],
)
def test_positions_of_a_map_lie_at_the_centers_of_their_receptive_fields(
    body, first_center, distance
):
    maps = feature_maps(make_body(body, size=224).make_body())
    first, last = maps.extent(7, 224)
    assert (last - first) * 224 / 7 == pytest.approx(distance)
    assert first * 224 + distance / 2 == pytest.approx(first_center)


def bright_detector(resize: str) -> Bundle:
    """A random ResNet18 whose first class is the difference of white from dark gray."""
    bundle = make_body("resnet18", size=224, resize=resize)
    levels = torch.tensor([255, 40], dtype=torch.uint8).repeat(8)
    plain = levels[:, None, None, None].expand(16, 3, 224, 224)
    white_D, gray_D = bundle.make_body()(plain)[:2]
    weight_CD = torch.stack([white_D - gray_D, gray_D - white_D, 0 * gray_D])
    state = {"2.weight": weight_CD, "2.bias": torch.zeros(3)}
    state |= {"0.mean": gray_D, "0.deviation": torch.ones(512)}
    return dataclasses.replace(bundle, head_state=state)


# -------------------------------------------------------------------------- as pictures


def drawn_overlay(heatmap: heatmaps.Heatmap) -> np.ndarray:
    """The overlay's pixels, (64, 64, RGBA)."""
    data = heatmaps.overlay_png(heatmap)
    assert len(data) < 4000
    image = Image.open(io.BytesIO(data))
    assert image.format == "PNG"
    return np.asarray(image.convert("RGBA"), int)


def overlay(map_hw: np.ndarray) -> np.ndarray:
    """The overlay's pixels of a map that divides its box into equal cells."""
    box, extent = (0.0, 0.0, 1.0, 1.0), (0.0, 1.0)
    return drawn_overlay(
        heatmaps.Heatmap(map_hw.astype(np.float32), box, extent, "CAM", class_index=0, logit=1.0)
    )


def test_an_overlay_is_opaque_where_the_map_is_strong_and_shows_its_sign():
    map_hw = np.zeros((7, 7))
    map_hw[1, 5], map_hw[5, 1] = 3, -1.5
    red, _, blue, alpha = overlay(map_hw).transpose(2, 0, 1)
    assert alpha[13, 50] > 150
    assert red[13, 50] > blue[13, 50]
    assert 40 < alpha[50, 13] < 0.7 * alpha[13, 50]
    assert blue[50, 13] > red[50, 13]
    assert alpha[13, 13] == alpha[32, 32] == alpha[50, 50] == 0


@pytest.mark.parametrize("value", [0.0, 2.0, -2.0])
def test_an_overlay_of_a_constant_map_can_be_drawn(value):
    alpha = overlay(np.full((7, 7), value))[..., 3]
    assert (alpha == alpha[0, 0]).all()
    assert (alpha[0, 0] > 0) == (value != 0)


def test_a_saved_bundle_is_explained_the_same(make_bundle, photos):
    path = make_bundle("linear")
    results = heatmaps.explain(bundle_format.load(path), photos)
    assert [one and one.method for one in results] == ["CAM"] * 5
