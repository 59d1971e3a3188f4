"""Backbones give torchvision's features, the same in any batch, and verify their weights."""

from __future__ import annotations

import gc
import hashlib
import subprocess
import sys
import threading
import urllib.error
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torchvision import models

from arrowhead import ConfigError, DataError
from arrowhead.features.backbone import Body, BodyConfig, Weights, load
from arrowhead.features.networks import IMAGENET_MEAN, IMAGENET_STD

BACKBONES = {"resnet18": "fc", "mobilenet_v2": "classifier"}


@pytest.fixture(scope="module")
def random_weights() -> dict[str, Weights]:
    return {body: load(BodyConfig(body=body, weights="random")) for body in BACKBONES}


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    small = torch.randint(0, 256, (32, 3, 8, 8), generator=rng).float()
    return nn.functional.interpolate(small, size=64, mode="bilinear").to(torch.uint8)


def _load(weights: Weights, name: str, pool: str = "avg") -> Body:
    return Body(name, weights.state, pool=pool, mean=weights.mean, std=weights.std, size=64)


def test_a_body_that_is_no_longer_used_is_freed_without_a_garbage_collection(
    random_weights: dict[str, Weights],
) -> None:
    weights = random_weights["mobilenet_v2"]
    shapes = {tensor.shape for tensor in weights.state.values() if tensor.numel() > 100_000}

    def count() -> int:
        tensors = (one for one in gc.get_objects() if type(one) in (torch.Tensor, nn.Parameter))
        return sum(tensor.shape in shapes for tensor in tensors)

    gc.collect()
    before = count()
    gc.disable()
    try:
        _load(weights, "mobilenet_v2")
        after = count()
    finally:
        gc.enable()
    assert after == before


@pytest.mark.parametrize("name", BACKBONES)
def test_features_equal_the_torchvision_network_without_its_last_layer(
    name: str, random_weights: dict[str, Weights], pixels: torch.Tensor
) -> None:
    plain = models.get_model(name, weights=None)
    setattr(plain, BACKBONES[name], nn.Identity())
    weights = random_weights[name]
    plain.load_state_dict(weights.state)
    mean, std = (torch.tensor(triple).view(1, 3, 1, 1) for triple in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.inference_mode():
        expected = plain.eval()((pixels.float() / 255 - mean) / std)
    result = _load(weights, name)(pixels)
    assert result.dtype == torch.float32
    assert nn.functional.cosine_similarity(result, expected).min() > 0.9999
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)
    others = nn.functional.cosine_similarity(result, expected.roll(1, 0))
    assert others.max() < 0.9999  # otherwise the comparison above could not fail


@pytest.mark.parametrize(("name", "width"), [("resnet18", 512), ("mobilenet_v2", 1280)])
def test_pools_have_the_documented_widths_and_concat_is_avg_then_max(
    name: str, width: int, random_weights: dict[str, Weights], pixels: torch.Tensor
) -> None:
    result = {}
    for pool, columns in (("avg", width), ("max", width), ("concat", 2 * width)):
        body = _load(random_weights[name], name, pool)
        result[pool] = body(pixels)
        assert body.width == columns
        assert result[pool].shape == (32, columns)
    torch.testing.assert_close(
        result["concat"], torch.cat([result["avg"], result["max"]], 1), rtol=1e-4, atol=1e-5
    )
    assert (result["max"] >= result["avg"] - 1e-4).all()


def test_features_are_the_same_in_any_batch_of_16_or_more(
    random_weights: dict[str, Weights], pixels: torch.Tensor
) -> None:
    body = _load(random_weights["resnet18"], "resnet18")
    alone = body(pixels[:16])
    assert torch.equal(body(pixels)[:16], alone)
    assert torch.equal(body(pixels.flip(0)).flip(0)[:16], alone)


def test_weights_hash_depends_on_the_tensors_not_on_the_file(
    random_weights: dict[str, Weights], tmp_path: Path
) -> None:
    result = random_weights["resnet18"]
    safetensors.torch.save_file(result.state, tmp_path / "a.safetensors")
    full = models.resnet18(weights=None).state_dict() | result.state  # with its final layer
    torch.save(full, tmp_path / "b.pth")
    for name in ("a.safetensors", "b.pth"):
        again = load(BodyConfig(body="resnet18", weights=str(tmp_path / name)))
        assert again.sha256 == result.sha256
    changed = {name: tensor + (name == "bn1.bias") for name, tensor in result.state.items()}
    assert Weights(state=changed, mean=result.mean, std=result.std).sha256 != result.sha256


@pytest.mark.parametrize("name", ["mnasnet0_5", "mnasnet1_0"])
def test_bodies_with_version_numbers_load_tensors_without_them(name: str, tmp_path: Path) -> None:
    weights = load(BodyConfig(body=name, weights="random"))
    safetensors.torch.save_file(weights.state, tmp_path / "body.safetensors")
    again = load(BodyConfig(body=name, weights=str(tmp_path / "body.safetensors")))
    assert again.sha256 == weights.sha256
    body = Body(name, again.state, pool="avg", mean=again.mean, std=again.std, size=32)
    assert body.width == 1280


def test_a_size_that_the_network_does_not_take_is_refused() -> None:
    weights = load(BodyConfig(body="inception_v3", weights="random"))
    with pytest.raises(ConfigError, match="64 x 64 pixels") as refusal:
        Body("inception_v3", weights.state, pool="avg", mean=weights.mean, std=weights.std, size=64)
    assert "--size 299" in refusal.value.do


def test_random_weights_are_reproducible(random_weights: dict[str, Weights]) -> None:
    torch.manual_seed(5)
    again = load(BodyConfig(body="resnet18", weights="random"))
    assert again.sha256 == random_weights["resnet18"].sha256


def test_loading_does_not_change_the_callers_random_state() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load(BodyConfig(body="resnet18", weights="random"))
    assert torch.equal(torch.rand(3), expected)


def test_mean_and_std_default_to_imagenet(random_weights: dict[str, Weights]) -> None:
    assert random_weights["resnet18"].mean == IMAGENET_MEAN
    half = (0.5, 0.5, 0.5)
    given = load(BodyConfig(body="resnet18", weights="random", mean=half, std=half))
    assert (given.mean, given.std) == (half, half)


# ----------------------------------------------------------------------------- refusals


def test_unknown_backbone_suggests_the_closest_name() -> None:
    with pytest.raises(ConfigError) as error_info:
        load(BodyConfig(body="resnet43"))
    assert "resnet34" in error_info.value.do
    assert "'resnet43'" in error_info.value.found


def test_backbone_without_linear_layer_and_pool_without_feature_map_are_refused() -> None:
    with pytest.raises(ConfigError, match="no linear layer"):
        load(BodyConfig(body="squeezenet1_0", weights="random"))
    weights = load(BodyConfig(body="shufflenet_v2_x0_5", weights="random"))
    with pytest.raises(ConfigError, match="--pool"):
        _load(weights, "shufflenet_v2_x0_5", "max")


def test_mismatched_weights_file_is_a_data_error_that_names_a_tensor(
    random_weights: dict[str, Weights], tmp_path: Path
) -> None:
    path = tmp_path / "weights.safetensors"
    state = random_weights["resnet18"].state
    without = {name: t for name, t in state.items() if name != "layer3.0.conv1.weight"}
    for wrong, body, tensor in (
        (without, "resnet18", "layer3.0.conv1.weight"),
        (state | {"surplus.weight": torch.ones(1)}, "resnet18", "surplus.weight"),
        (state | {"conv1.weight": torch.ones(2, 2)}, "resnet18", "conv1.weight"),
        (state, "mobilenet_v2", "features.0.0.weight"),
    ):
        safetensors.torch.save_file(wrong, path)
        with pytest.raises(ConfigError) as error_info:
            load(BodyConfig(body=body, weights=str(path)))
        assert tensor in error_info.value.found


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_truncated_or_missing_weights_file_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    with pytest.raises(ConfigError, match="does not exist"):
        load(BodyConfig(body="resnet18", weights=str(path)))
    for content in (b"", b"\x80\x02garbage", b"<html>404</html>"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot be read"):
            load(BodyConfig(body="resnet18", weights=str(path)))


class _Exploit:
    """An object whose unpickling creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_weights_file_cannot_run_code(tmp_path: Path) -> None:
    torch.save({"conv1.weight": _Exploit(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(DataError):
        load(BodyConfig(body="resnet18", weights=str(tmp_path / "evil.pth")))
    assert not (tmp_path / "ran").exists()


def test_unknown_weights_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError) as error_info:
        load(BodyConfig(body="resnet18", weights="IMAGENET1K_V7"))
    assert "IMAGENET1K_V1" in error_info.value.wanted


@pytest.mark.parametrize("std", [(0.0, 1.0, 1.0), (1.0, -1.0, 1.0), (float("nan"), 1.0, 1.0)])
def test_std_that_cannot_be_divided_by_is_refused(std: tuple[float, float, float]) -> None:
    with pytest.raises(ConfigError) as error_info:
        BodyConfig(std=std)
    assert all((error_info.value.found, error_info.value.wanted, error_info.value.do))


# ------------------------------------------------------------------------------- download


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch cache; returns the folder where weights arrive."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def http_site(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the loopback address that serves it."""
    folder = tmp_path / "site"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def published(http_site: tuple[Path, str], cache: Path) -> Iterator[tuple[Path, str]]:
    """A resnet18 file that torchvision's weights entry points to; the hash of its tensors."""
    folder, address = http_site
    torch.manual_seed(1)
    state = models.resnet18(weights=None).state_dict()
    torch.save(state, folder / "draft")
    digest = hashlib.sha256((folder / "draft").read_bytes()).hexdigest()
    path = (folder / "draft").rename(folder / f"resnet18-{digest[:8]}.pth")
    body = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    entry = models.ResNet18_Weights.IMAGENET1K_V1.value
    before = entry.url
    # A frozen dataclass that the whole process shares.
    object.__setattr__(entry, "url", f"{address}/{path.name}")
    yield path, Weights(state=body, mean=IMAGENET_MEAN, std=IMAGENET_STD).sha256
    object.__setattr__(entry, "url", before)


def test_auto_weights_are_downloaded_once_and_then_need_no_network(
    published: tuple[Path, str], cache: Path
) -> None:
    path, digest = published
    assert load(BodyConfig(body="resnet18")).sha256 == digest
    assert [file.name for file in cache.iterdir()] == [path.name]
    path.unlink()
    assert load(BodyConfig(body="resnet18")).sha256 == digest


def test_download_with_a_wrong_hash_is_refused_and_not_cached(
    published: tuple[Path, str], cache: Path
) -> None:
    path, _ = published
    full = path.read_bytes()
    path.write_bytes(full[:-1] + bytes([full[-1] ^ 1]))
    with pytest.raises(ConfigError, match="hash"):
        load(BodyConfig(body="resnet18"))
    assert list(cache.iterdir()) == []


def test_truncated_cached_file_is_refused_by_name(published: tuple[Path, str], cache: Path) -> None:
    path, _ = published
    cache.mkdir(parents=True)
    for content in (b"", path.read_bytes()[:5000], b"<html>sign in first</html>"):
        (cache / path.name).write_bytes(content)
        with pytest.raises((ConfigError, DataError)) as error_info:
            load(BodyConfig(body="resnet18"))
        assert str(cache / path.name) in str(error_info.value)


@pytest.mark.parametrize(
    "failure",
    [
        urllib.error.URLError("no route to host"),
        urllib.error.HTTPError("http://x", 503, "Unavailable", None, None),
        TimeoutError("timed out"),
    ],
)
def test_auto_weights_without_cache_or_network_suggest_three_alternatives(
    failure: Exception, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise failure

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(ConfigError) as error_info:
        load(BodyConfig(body="resnet34"))
    assert "resnet34" in error_info.value.found
    assert "--weights random" in error_info.value.do
    assert ".safetensors" in error_info.value.do
    assert "--weights bundled" in error_info.value.do


def test_proxy_with_an_invalid_response_counts_as_no_network(
    published: tuple[Path, str], cache: Path
) -> None:
    import socket

    entry = models.ResNet18_Weights.IMAGENET1K_V1.value
    with socket.create_server(("127.0.0.1", 0)) as server:
        object.__setattr__(
            entry, "url", f"http://127.0.0.1:{server.getsockname()[1]}/{published[0].name}"
        )

        def answer() -> None:
            client, _ = server.accept()
            with client:
                client.recv(4096)
                client.sendall(b"nonsense\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ConfigError, match="--weights random"):
            load(BodyConfig(body="resnet18"))
        thread.join()


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_torchvision_weights_load_into_backbones_with_auxiliary_heads(
    name: str, tmp_path: Path
) -> None:
    # The published files hold trained auxiliary heads, which torchvision drops on loading.
    full = models.get_model(name, weights=None, aux_logits=True, init_weights=False)
    torch.save(full.state_dict(), tmp_path / "full.pth")
    result = load(BodyConfig(body=name, weights=str(tmp_path / "full.pth")))
    assert not any(tensor.startswith(("aux", "Aux", "fc.")) for tensor in result.state)


def test_building_a_backbone_does_not_import_torchs_compiler():
    """Importing it takes longer than all other imports of a command together."""
    code = (
        "import sys\n"
        "from arrowhead.features.backbone import Body, BodyConfig, load\n"
        "made = load(BodyConfig(body='resnet18', weights='random'))\n"
        "body = Body('resnet18', made.state, pool='avg', mean=made.mean, std=made.std, size=32)\n"
        "assert body.width == 512\n"
        "assert 'torchvision.models' in sys.modules\n"
        "print([name for name in sys.modules if name.startswith('torch._dynamo')])\n"
        "import torch._dynamo.utils\n"  # a later import still gets the real module
        "print(torch._dynamo.utils.is_compile_supported('cpu'))\n"
    )
    completed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert completed.stdout.splitlines() == ["[]", "True"], completed.stdout
