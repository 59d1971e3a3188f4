"""An exported bundle gives the same results as `score`, or it is not written."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import polars
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from numpy.typing import NDArray

from arrowhead import ConfigError, DataError
from arrowhead.bundle import export, export_graph, library_weights, replay
from arrowhead.bundle import format as bundle_format
from arrowhead.bundle.export import ExportConfig
from arrowhead.bundle.format import Bundle
from arrowhead.cli.main import main
from arrowhead.data import sources
from arrowhead.decode.pixels import PixelConfig
from arrowhead.features import backbone, extract
from arrowhead.features.backbone import BodyConfig
from arrowhead.features.extract import ExtractConfig
from arrowhead.inference import score, score_request
from arrowhead.inference.predictor import Predictor
from arrowhead.inference.score_request import ScoreConfig
from arrowhead.runtime.task_queue import TaskQueue
from arrowhead.runtime.worker import Worker
from arrowhead.training import heads

KINDS: dict[str, dict[str, Any]] = {
    "linear": {"name": "resnet18"},
    "lesson on concat": {"name": "resnet18", "head": "lesson", "pool": "concat"},
    "several labels": {
        "name": "resnet18",
        "multi": True,
        "thresholds": [0.2, 0.5, 0.7],
        "temperature": 0.8,
    },
}
FORMATS = ["onnx", "pt2"]


@pytest.fixture(scope="module")
def images(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty synthetic images."""
    folder = tmp_path_factory.mktemp("twenty")
    for path in sorted((image_folder / "new").iterdir())[:20]:
        shutil.copy(path, folder)
    assert len(list(folder.iterdir())) == 20
    return folder


@pytest.fixture(scope="module")
def plain_bundle(make_bundle: Callable[..., Path]) -> Path:
    """A bundle that no test changes."""
    return make_bundle(name="resnet18")


@pytest.fixture(scope="module", params=KINDS)
def bundle(request: pytest.FixtureRequest, make_bundle: Callable[..., Path]) -> Path:
    """A bundle of each kind."""
    return make_bundle(**KINDS[request.param])


@pytest.fixture(scope="module", params=FORMATS)
def exported(
    request: pytest.FixtureRequest, bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Export `bundle` and return the JSON result, the only line on standard output."""
    out = tmp_path_factory.mktemp("exported") / "new" / "folder"
    args = ["export", str(bundle), str(out), "--format", request.param, "--json"]
    stdout = io.StringIO()
    with redirect_stdout(stdout), pytest.raises(SystemExit) as exit_info:
        main(args)
    assert exit_info.value.code == 0
    return dict(json.loads(stdout.getvalue()))


@pytest.fixture(scope="module")
def expected_probabilities(
    bundle: Path, images: Path, tmp_path_factory: pytest.TempPathFactory
) -> NDArray[np.float32]:
    """The probabilities that `score` writes for the twenty images, (20, 3)."""
    out = tmp_path_factory.mktemp("scored") / "scores"
    config, extract_config = ScoreConfig(probabilities=True), ExtractConfig(chunk_size=100)
    loaded, catalog = bundle_format.load(bundle), sources.unlabelled_catalog(images)
    request = score_request.prepare(out, bundle, loaded, catalog, config, extract_config.chunk_size)
    worker = Worker(
        0, 1, "cpu", 2, TaskQueue(request.unfinished_parts()).next_task, lambda report: None
    )
    score.score(worker, request, extract_config)
    column = polars.read_parquet(out / "parts").sort("path")["probabilities"]
    return column.struct.unnest().to_numpy()


@pytest.fixture(scope="module")
def pixels(images: Path, plain_bundle: Path) -> NDArray[np.uint8]:
    """The twenty images, decoded by Arrowhead, (20, 3, 64, 64)."""
    files = [path.read_bytes() for path in sorted(images.iterdir())]
    recipe = bundle_format.load(plain_bundle).recipe
    with replay.clean_decoder(recipe, "cpu", 2, 20) as decode:
        return decode(files, [bytes(16)] * 20).views[0].transpose(0, 3, 1, 2).copy()


def load_exported(file: Path) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    """Load the exported file without Arrowhead, as a user does."""
    if file.suffix == ".onnx":
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return lambda batch: np.asarray(session.run(None, {"pixels": batch})[0])
    module = torch.export.load(file).module()
    return lambda batch: np.asarray(module(torch.from_numpy(batch)).detach().numpy())


def test_the_exported_file_gives_the_probabilities_of_score_for_any_batch_size(
    exported: dict[str, Any], expected_probabilities: NDArray[np.float32], pixels: NDArray[np.uint8]
) -> None:
    run = load_exported(Path(exported["file"]))
    assert (
        np.ptp(expected_probabilities, axis=0).max() > 10 * export.TOLERANCE
    )  # images differ by more than the tolerance
    for size in (1, 3, 20):
        batches = [run(pixels[at : at + size]) for at in range(0, 20, size)]
        assert all(item.dtype == np.float32 for item in batches)
        np.testing.assert_allclose(
            np.concatenate(batches),
            expected_probabilities,
            rtol=0,
            atol=export.TOLERANCE,
            err_msg=f"by {size}",
        )


def test_the_export_is_one_file_that_contains_all_metadata(
    exported: dict[str, Any], bundle: Path
) -> None:
    file, loaded = Path(exported["file"]), bundle_format.load(bundle)
    assert [item.name for item in file.parent.iterdir()] == [f"model.{exported['format']}"]
    assert exported["bytes"] == file.stat().st_size > 40e6  # ResNet18's weights are inside
    if file.suffix == ".onnx":
        model = onnx.load(file)
        (text,) = [item.value for item in model.metadata_props if item.key == "arrowhead"]
        assert [item.version for item in model.opset_import if not item.domain] == [
            export_graph.OPSET
        ]
    else:
        extra = {"arrowhead.json": ""}
        torch.export.load(file, extra_files=extra)
        text = extra["arrowhead.json"]
    metadata = json.loads(text)
    assert metadata["classes"] == loaded.classes
    assert metadata["task"] == ("multi-label" if loaded.multi else "single-label")
    assert metadata["decision"] == bundle_format.TASKS[metadata["task"]]
    assert metadata["temperature"] == loaded.temperature
    thresholds = loaded.thresholds
    assert metadata["thresholds"] == (
        dict(zip(loaded.classes, thresholds, strict=True)) if thresholds else None
    )
    assert metadata["recipe_fingerprint"] == loaded.recipe.fingerprint
    assert metadata["bundle"] == bundle_format.fingerprint(bundle)
    assert metadata["arrowhead"] == export.__version__
    assert metadata["recipe"]["mean"] == list(loaded.recipe.mean)
    preprocessing = metadata["preprocessing"]
    assert (preprocessing["size"], preprocessing["resize"], preprocessing["antialias"]) == (
        64,
        "crop",
        True,
    )
    assert {"pixels", "rule", "interpolation", "orientation", "transparency"} < preprocessing.keys()


def test_the_file_contains_no_path_of_this_machine(exported: dict[str, Any]) -> None:
    data = Path(exported["file"]).read_bytes()
    for folder in (Path(export.__file__).parents[1], Path(torch.__file__).parents[1]):
        assert str(folder).encode() not in data


def test_the_graph_rounds_features_to_float16(exported: dict[str, Any]) -> None:
    file = Path(exported["file"])
    if file.suffix == ".onnx":
        casts = [node for node in onnx.load(file).graph.node if node.op_type == "Cast"]
        assert onnx.TensorProto.FLOAT16 in [node.attribute[0].i for node in casts]
    else:
        assert "torch.float16" in str(torch.export.load(file).graph)


def test_the_result_says_what_was_verified(exported: dict[str, Any]) -> None:
    assert exported["batch_sizes"] == [1, 3]
    assert export_graph.TRACE_BATCH_SIZE not in exported["batch_sizes"]
    assert exported["images"] == 3
    assert 0 <= exported["largest_difference"] <= exported["tolerance"] == export.TOLERANCE
    assert exported["inputs"] == {"pixels": ["uint8", "batch", 3, 64, 64]}
    assert exported["outputs"] == {"probabilities": ["float32", "batch", 3]}


# ------------------------------------------------------------ float16, OpenVINO, torchvision


@pytest.fixture(scope="module")
def score_probabilities(plain_bundle: Path, images: Path) -> NDArray[np.float32]:
    """The probabilities that a server or `score` gives the twenty images with `plain_bundle`."""
    predictor = Predictor(plain_bundle)
    result = predictor([path.read_bytes() for path in sorted(images.iterdir())])
    predictor.close()
    return result.probabilities


def test_float16_onnx_is_half_the_size_and_gives_the_results_of_score(
    plain_bundle: Path,
    pixels: NDArray[np.uint8],
    score_probabilities: NDArray[np.float32],
    tmp_path: Path,
) -> None:
    result = export.export(plain_bundle, tmp_path / "half.onnx", ExportConfig(precision="fp16"))
    weights = sum(one.nbytes for one in bundle_format.load(plain_bundle).body_state.values())
    assert result["bytes"] == (tmp_path / "half.onnx").stat().st_size < 0.52 * weights
    model = onnx.load(tmp_path / "half.onnx")
    types = {item.data_type for item in model.graph.initializer if np.prod(item.dims) > 2000}
    assert types == {onnx.TensorProto.FLOAT16}
    prob = load_exported(tmp_path / "half.onnx")(pixels)
    assert prob.dtype == np.float32
    np.testing.assert_allclose(prob, score_probabilities, rtol=0, atol=export.FLOAT16_TOLERANCE)
    assert (prob.argmax(1) == score_probabilities.argmax(1)).all()
    assert np.abs(prob - score_probabilities).max() > 0  # float16 was really used


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_openvino_gives_the_results_of_score(
    precision: str,
    plain_bundle: Path,
    pixels: NDArray[np.uint8],
    score_probabilities: NDArray[np.float32],
    tmp_path: Path,
) -> None:
    import openvino

    config = ExportConfig(format="openvino", precision=precision)
    result = export.export(plain_bundle, tmp_path, config)
    files = sorted(item.name for item in tmp_path.iterdir())
    assert files == ["model.bin", "model.xml"]
    assert result["bytes"] == sum(item.stat().st_size for item in tmp_path.iterdir())
    weights = sum(one.nbytes for one in bundle_format.load(plain_bundle).body_state.values())
    size = (tmp_path / "model.bin").stat().st_size / weights
    assert 0.48 < size < 0.52 if precision == "fp16" else 0.98 < size < 1.02
    model = openvino.Core().read_model(tmp_path / "model.xml")
    metadata = json.loads(model.get_rt_info(["arrowhead"]).astype(str))
    assert metadata["classes"] == bundle_format.load(plain_bundle).classes
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    tolerance = export.TOLERANCE if precision == "fp32" else export.FLOAT16_TOLERANCE
    for size in (1, 20):
        batches = [compiled({"pixels": pixels[at : at + size]})[0] for at in range(0, 20, size)]
        np.testing.assert_allclose(
            np.concatenate(batches), score_probabilities, rtol=0, atol=tolerance
        )


@pytest.mark.parametrize("kind", ["linear", "several labels"])
def test_torchvision_loads_the_weights_and_gives_the_logits_of_the_bundle(
    kind: str, make_bundle: Callable[..., Path], pixels: NDArray[np.uint8], tmp_path: Path
) -> None:
    path = make_bundle(**KINDS[kind])
    loaded = bundle_format.load(path)
    result = export.export(path, tmp_path, ExportConfig(format="torchvision"))
    assert result["build"] == "torchvision.models.resnet18(num_classes=3)"
    assert [item.name for item in tmp_path.iterdir()] == ["model.safetensors"]

    # From here on, what a user without Arrowhead writes.
    net = torchvision.models.resnet18(num_classes=3)
    net.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    normalize = torchvision.transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.inference_mode():
        logits = net.eval()(normalize(torch.from_numpy(pixels) / 255))

    with torch.inference_mode():
        features = loaded.make_body()(torch.from_numpy(pixels))
        expected = loaded.make_head()(features) / loaded.temperature
    assert expected.abs().max() > 0.3
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["arrowhead"])
    assert (metadata["classes"], metadata["thresholds"] is None) == (
        loaded.classes,
        not loaded.multi,
    )


def test_timm_loads_the_weights_and_gives_the_logits_of_the_bundle(
    make_bundle: Callable[..., Path], pixels: NDArray[np.uint8], tmp_path: Path
) -> None:
    path = make_bundle(name="timm/resnet18", temperature=0.1)
    loaded = bundle_format.load(path)
    result = export.export(path, tmp_path, ExportConfig(format="timm"))
    assert result["build"] == "timm.create_model('resnet18', num_classes=3)"
    net = timm.create_model(
        "resnet18", num_classes=3, checkpoint_path=tmp_path / "model.safetensors"
    )
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (loaded.recipe.mean, loaded.recipe.std))
    with torch.inference_mode():
        logits = net.eval()((torch.from_numpy(pixels) / 255 - mean) / std)
        expected = loaded.make_head()(loaded.make_body()(torch.from_numpy(pixels)))
        expected /= loaded.temperature
    assert expected.abs().max() > 0.3
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


def test_the_other_librarys_format_is_refused_with_the_right_one(
    make_bundle: Callable[..., Path], plain_bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="is of torchvision, not of timm"):
        export.export(plain_bundle, tmp_path / "out", ExportConfig(format="timm"))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("one_thread")
def test_the_folded_layer_equals_standardization_linear_layer_and_temperature() -> None:
    generator = torch.Generator().manual_seed(0)
    state = heads.build_head("linear", 64, 5, seed=1).state_dict()
    state["0.mean"] = torch.randn(64, generator=generator) * 3
    state["0.deviation"] = torch.rand(64, generator=generator) + 0.1
    features = torch.randn((10, 64), generator=generator) * 3
    weight, bias = library_weights.fold_head(state, 0.3)
    expected = heads.restore_head("linear", 64, 5, state)(features) / 0.3
    torch.testing.assert_close(features @ weight.T + bias, expected, rtol=1e-5, atol=1e-4)
    assert expected.std() > 5


FAMILIES = [
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "mobilenet_v3_small",
    "shufflenet_v2_x0_5",
    "swin_t",
    "timm/convnext_atto",
    "timm/mobilenetv3_small_050",
    "timm/tf_efficientnet_lite0",
    "timm/vit_tiny_patch16_224",
    "vgg11",
    "vit_b_16",
]


@pytest.mark.slow
@pytest.mark.parametrize("body", FAMILIES)
def test_the_head_folds_into_the_last_layer_of_every_family(body: str, tmp_path: Path) -> None:
    size = 224 if body == "swin_t" or "vit_" in body else 96
    weights = backbone.load(BodyConfig(body=body, weights="random"), size)
    net = backbone.Body(
        body, weights.state, pool="auto", mean=weights.mean, std=weights.std, size=size
    )
    state = heads.build_head("linear", net.width, 3, seed=4).state_dict()
    generator = torch.Generator().manual_seed(0)
    state["0.mean"] = torch.randn(net.width, generator=generator)
    state["0.deviation"] = torch.rand(net.width, generator=generator) + 0.5
    config = BodyConfig(body=body, weights="random", pool=net.pool)  # type: ignore[arg-type]
    bundle = Bundle(
        recipe=extract.make_recipe(
            PixelConfig(size=size).complete(weights.pixels), config, weights, net.width
        ),
        classes=["a", "b", "c"],
        head="linear",
        temperature=0.7,
        body_state=weights.state,
        head_state=state,
        metrics={},
        lineage={},
    )
    bundle_format.save(bundle, tmp_path / "bundle")
    library = "timm" if body.startswith("timm/") else "torchvision"
    result = export.export(tmp_path / "bundle", tmp_path / "out", ExportConfig(format=library))
    assert result["largest_difference"] < 1e-4
    network = eval(result["build"])  # the expression that users are shown
    network.load_state_dict(safetensors.torch.load_file(result["file"]))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ({"head": "lesson"}, "its head is lesson"),
        ({"name": "mobilenet_v3_small", "pool": "concat"}, "pooled with concat"),
    ],
)
def test_a_bundle_that_torchvision_cannot_express_is_refused_with_the_reason(
    kind: dict[str, Any], reason: str, make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=reason):
        export.export(make_bundle(**kind), tmp_path / "out", ExportConfig(format="torchvision"))
    assert not (tmp_path / "out").exists()


def test_weights_that_give_other_logits_are_refused(
    plain_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fold = library_weights.fold_head
    monkeypatch.setattr(library_weights, "fold_head", lambda state, t: fold(state, t * 1.01))
    with pytest.raises(DataError, match="torchvision gives the golden images other logits"):
        export.export(plain_bundle, tmp_path, ExportConfig(format="torchvision"))
    assert not list(tmp_path.iterdir())


def test_float16_is_refused_for_formats_that_do_not_have_it() -> None:
    with pytest.raises(ConfigError, match=r"--precision fp16 is not for --format pt2"):
        ExportConfig(format="pt2", precision="fp16")


def test_missing_openvino_is_refused_with_the_install_command(
    plain_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ConfigError, match=r"pip install 'arrowhead\[openvino\]'"):
        export.export(plain_bundle, tmp_path / "model.xml", ExportConfig(format="openvino"))


# ----------------------------------------------------------------------------------- refusals


def export_other_bundle(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> None:
    """Export a bundle with other fields than the one that the file is verified against."""
    inference_module = export.inference_module
    monkeypatch.setattr(
        export,
        "inference_module",
        lambda loaded, *parts: inference_module(dataclasses.replace(loaded, **fields), *parts),
    )


def test_an_export_with_other_probabilities_is_refused_and_the_previous_file_kept(
    plain_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_other_bundle(monkeypatch, temperature=0.6)
    (tmp_path / "model.onnx").write_bytes(b"the one before")
    with pytest.raises(DataError, match=r"largest difference 0\.0\d+, 0 of 3 labels changed"):
        export.export(plain_bundle, tmp_path, ExportConfig())
    assert [item.name for item in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_bytes() == b"the one before"


def test_an_export_that_changes_a_label_is_refused_however_small_the_difference(
    make_bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = make_bundle(name="resnet18", multi=True, thresholds=[0.5] * 3), tmp_path / "out"
    loaded = bundle_format.load(path)
    prob_C = loaded.golden[0].probabilities.astype(float)
    label = int(np.abs(prob_C - 0.5).argmax())
    # A higher temperature moves the probability towards 0.5 and so across the threshold.
    offset = 2e-5 if prob_C[label] < 0.5 else -2e-5
    thresholds = [float(prob + offset) if i == label else 0.01 for i, prob in enumerate(prob_C)]
    bundle_format.save(dataclasses.replace(loaded, thresholds=thresholds), path)
    export_other_bundle(monkeypatch, temperature=loaded.temperature * 1.001)
    with pytest.raises(DataError, match=r"largest difference 0\.000\d+, 1 of 3 labels changed"):
        export.export(path, out, ExportConfig(format="pt2"))
    assert not list(out.iterdir())


def test_a_bundle_without_golden_images_is_verified_on_random_pixels(
    plain_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = tmp_path / "bundle", tmp_path / "out"
    bundle_format.save(dataclasses.replace(bundle_format.load(plain_bundle), golden=()), path)
    with monkeypatch.context() as patch:
        export_other_bundle(patch, temperature=0.1)
        with pytest.raises(DataError, match="gives the drawn pixels other probabilities"):
            export.export(path, out, ExportConfig(format="pt2"))
        assert not list(out.iterdir())
    result = export.export(path, out, ExportConfig(format="pt2"))
    assert (result["images"], result["checked_on"]) == (6, "drawn pixels")
    assert result["largest_difference"] < 1e-3


def test_missing_onnx_packages_are_refused_with_the_install_command(
    plain_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"pip install 'arrowhead\[onnx\]'"):
        export.export(plain_bundle, tmp_path / "model.onnx", ExportConfig())


def test_weights_over_the_onnx_size_limit_are_refused_before_tracing(
    plain_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_graph, "MAX_ONNX_BYTES", 40_000_000)
    monkeypatch.setattr(torch.export, "export", None)
    with pytest.raises(ConfigError, match=r"0\.0 GB, .* ends at 2 GB"):
        export.export(plain_bundle, tmp_path / "model.onnx", ExportConfig())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model.pt2", "model.txt", "notes"])
def test_an_output_name_of_another_format_is_refused(
    name: str, plain_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ConfigError, match=r"ends in \.onnx"):
        export.export(plain_bundle, tmp_path / name, ExportConfig())
    assert (tmp_path / "notes").read_text() == "mine"
