"""A published folder is complete, true and without private data; a push sends exactly that."""

from __future__ import annotations

import base64
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import timm
import timm.data
import torch
import torchvision
from conftest import Command

from arrowhead import ConfigError
from arrowhead.bundle import export, hub, model_card, publish, replay
from arrowhead.bundle import format as bundle_format
from arrowhead.bundle.format import Bundle
from arrowhead.bundle.known_images import KnownImages
from arrowhead.bundle.publish import PublishConfig
from arrowhead.cli.main import main
from arrowhead.evaluation import metrics
from arrowhead.inference.predictor import Predictor

SECRET = "hf_" + "thisIsATokenThatNobodyMaySee"
IDS = KnownImages(np.array([3, 5, 8], np.uint64), np.array([13], np.uint64))
LINEAGE = {
    "arrowhead": "0.1.0",
    "data": "0a900f478b6b6adb",
    "run_id": "a-run-id-of-mlflow",
    "corrections": [{"who": "somebody", "why": "a private note"}],
    "training": {"head": "logistic", "l2": 10.0},
}


def evaluated(classes: list[str]) -> dict[str, Any]:
    """Metrics of a head that is right about nearly all of 60 images."""
    label_N = np.arange(60) % len(classes)
    logit_NC = np.eye(len(classes), dtype=np.float32)[label_N] * 4
    logit_NC[:3] = np.roll(logit_NC[:3], 1, axis=1)
    return metrics.evaluate(logit_NC, label_N, classes, temperature=0.5)


@pytest.fixture(scope="module")
def small(make_bundle: Callable[..., Path]) -> Path:
    """A bundle of a small network, with results, image hashes, corrections and a run id."""
    return make_bundle(
        name="shufflenet_v2_x0_5",
        temperature=0.01,  # the features of random weights differ little
        lineage=LINEAGE,
        known_images=IDS,
        metrics=evaluated(["baskets", "beads", "leaves"]),
    )


@pytest.fixture(scope="module")
def published(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that bundle; no test changes it."""
    out = tmp_path_factory.mktemp("published") / "three-things"
    publish.publish(small, out, PublishConfig(license="cc-by-4.0", dataset="drawings | mine"))
    return out


@pytest.fixture(scope="module")
def photo(image_folder: Path) -> Path:
    """A real JPEG."""
    return sorted((image_folder / "new").glob("*.jpg"))[0]


def run_card_code(
    folder: Path, photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[list[str]]:
    """Run the Python code of the model card in its folder; the words of each line it prints."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert "arrowhead" not in code.lower()
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(code.replace("photo.jpg", str(photo)), {})
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_the_code_of_the_card_gives_the_probabilities_of_the_bundle(
    published: Path,
    small: Path,
    photo: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = run_card_code(published, photo, monkeypatch, capsys)
    predictor = Predictor(small)
    (expected,) = predictor([photo.read_bytes()]).probabilities
    predictor.close()
    assert [name for name, _ in lines] == ["baskets", "beads", "leaves"]
    # Pillow's pixels differ a little from the decoder's.
    assert np.ptp(expected) > 0.2
    np.testing.assert_allclose([float(p) for _, p in lines], expected, atol=0.05)


def test_torchvision_gives_the_logits_of_the_bundle_with_the_published_files_alone(
    published: Path, small: Path, photo: Path
) -> None:
    loaded = bundle_format.load(small)
    with replay.clean_decoder(loaded.recipe, "cpu", 1, 16) as decode:
        pixels = torch.from_numpy(
            decode([photo.read_bytes()], [bytes(16)]).views[0][:1].transpose(0, 3, 1, 2).copy()
        )
    config = json.loads((published / "config.json").read_text())
    processor = json.loads((published / "preprocessor_config.json").read_text())
    net = torchvision.models.get_model(
        config["architecture"], weights=None, num_classes=config["num_classes"]
    ).eval()
    net.load_state_dict(safetensors.torch.load_file(published / "model.safetensors"))
    normalize = torchvision.transforms.Normalize(processor["image_mean"], processor["image_std"])
    with torch.inference_mode():
        logits = net(normalize(pixels * processor["rescale_factor"]))
        feature = loaded.make_body()(pixels)
        expected = loaded.make_head()(feature) / loaded.temperature
    assert expected.abs().max() > 0.3
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


def test_the_card_has_the_numbers_of_the_bundle(published: Path, small: Path) -> None:
    numbers = bundle_format.load(small).metrics
    card = huggingface_hub.ModelCard.load(published / "README.md")
    assert card.data.license == "cc-by-4.0"
    assert card.data.pipeline_tag == "image-classification"
    results = {one.metric_type: one.metric_value for one in card.data.eval_results}
    assert results["accuracy"] == numbers["accuracy"] == 0.95
    assert results["roc_auc"] == numbers["auroc"]
    low, high = numbers["accuracy_interval"]
    text = card.content
    assert f"| accuracy | 0.9500 | {low:.4f} to {high:.4f} |" in text
    assert f"| expected calibration error | {numbers['ece']:.4f} |" in text
    for name, row in numbers["per_class"].items():
        values = " | ".join(f"{row[key]:.4f}" for key in ("precision", "recall", "f1"))
        assert f"| {name} | {values} | {row['images']} |" in text
    for fact in (
        "drawings \\| mine",
        "3 different training images, 1 different validation image",
        "`0a900f478b6b6adb`",
        "temperature 0.0100",
        bundle_format.fingerprint(small),
        bundle_format.fingerprint(published / "bundle"),
        "Pretrained weights of the shufflenet\\_v2\\_x0\\_5: not recorded",
    ):
        assert fact in text
    assert json.loads((published / "arrowhead.json").read_text())["metrics"] == numbers


def test_a_published_folder_has_no_photo_no_image_hash_and_no_name_of_a_person(
    published: Path, small: Path
) -> None:
    files = [item for item in published.rglob("*") if item.is_file()]
    assert sorted(str(item.relative_to(published)) for item in files) == [
        "README.md",
        "arrowhead.json",
        "bundle/bundle.json",
        "bundle/golden/golden.json",
        "bundle/weights.safetensors",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    everything = b"".join(item.read_bytes() for item in files)
    for private in (b"somebody", b"a private note", b"a-run-id-of-mlflow", b"\xff\xd8\xff\xe0"):
        assert private not in everything
    with pytest.raises(AssertionError):  # the bundle itself has them
        assert b"somebody" not in (small / "bundle.json").read_bytes()


def test_arrowhead_scores_with_the_published_bundle_as_with_the_original(
    published: Path, small: Path, photo: Path
) -> None:
    with pytest.warns(UserWarning, match="no golden images"):
        public = Predictor(published / "bundle")
    original = Predictor(small)
    results = [one([photo.read_bytes()]).probabilities for one in (public, original)]
    public.close()
    original.close()
    assert (results[0] == results[1]).all()


def test_with_photos_the_golden_images_are_published_too(small: Path, tmp_path: Path) -> None:
    result = publish.publish(small, tmp_path / "out", PublishConfig(photos=True))
    loaded = bundle_format.load(tmp_path / "out" / "bundle")
    assert result["photos"] == len(loaded.golden) == 3
    assert loaded.known_images is not None
    assert "`bundle/golden` has 3 photos" in (tmp_path / "out" / "README.md").read_text()
    assert "corrections" not in loaded.lineage and "run_id" not in loaded.lineage


def test_timm_loads_a_published_folder_with_its_settings(
    make_bundle: Callable[..., Path],
    photo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = make_bundle(
        name="timm/resnet10t",
        temperature=0.01,
        lineage={"weights": {"source": "hf-hub:x", "license": "cc0"}},
    )
    publish.publish(path, tmp_path / "out", PublishConfig())
    net = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    settings = timm.data.resolve_model_data_config(net)
    recipe = bundle_format.load(path).recipe
    assert (settings["mean"], settings["std"]) == (list(recipe.mean), list(recipe.std))
    assert settings["input_size"] == [3, 64, 64]
    lines = run_card_code(tmp_path / "out", photo, monkeypatch, capsys)
    predictor = Predictor(path)
    (expected,) = predictor([photo.read_bytes()]).probabilities
    predictor.close()
    np.testing.assert_allclose([float(p) for _, p in lines], expected, atol=0.05)
    assert "(from hf-hub:x): `cc0`" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_other_heads_are_published_as_onnx_with_the_reason(
    make_bundle: Callable[..., Path],
    photo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = make_bundle("lesson", name="shufflenet_v2_x0_5", multi=True, thresholds=[0.2, 0.5, 0.7])
    result = publish.publish(path, tmp_path / "out", PublishConfig())
    assert "its head is lesson" in result["why_onnx"]
    assert (tmp_path / "out" / "model.onnx").is_file()
    lines = run_card_code(tmp_path / "out", photo, monkeypatch, capsys)
    predictor = Predictor(path)
    (expected,) = predictor([photo.read_bytes()]).probabilities
    predictor.close()
    np.testing.assert_allclose([float(line[1]) for line in lines], expected, atol=0.05)
    given = [line[0] for line in lines if line[2] == "True"]
    reached = expected >= np.array([0.2, 0.5, 0.7])
    assert given == [line[0] for line, one in zip(lines, reached, strict=True) if one]


def test_names_of_classes_cannot_break_the_card_and_keep_their_order() -> None:
    classes = ["a|b", "`x`", "<b>", "two\nlines", *[f"class {i}" for i in range(10)]]
    template = Bundle(
        recipe=None,  # type: ignore[arg-type]
        classes=classes,
        head="linear",
        temperature=1.0,
        body_state={},
        head_state={},
        metrics=evaluated(classes),
        lineage={},
    )
    table = "\n\n".join(model_card._results(template))
    assert "| a\\|b |" in table and "| \\`x\\` |" in table and "| two lines |" in table
    assert "<b>" not in table
    rows = table[table.index("| class |") :].splitlines()
    cells = {len(re.findall(r"(?<!\\)\|", line)) for line in rows if line.startswith("| ")}
    assert cells == {6}  # five cells in every row of the table of classes
    written = json.dumps(
        publish.model_config(
            replace(template, recipe=_AnyRecipe()),  # type: ignore[arg-type]
            {},
            "torchvision",
        ),
        sort_keys=True,
    )
    assert json.loads(written)["label_names"] == classes


class _AnyRecipe:
    body, width = "resnet18", 512


# ------------------------------------------------------------------------------ refusals


def test_folders_of_others_are_not_replaced(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(bundle: Path, out: Path, reason: str) -> None:
        with pytest.raises(SystemExit) as exit_info:
            main(["publish", str(bundle), str(out)])
        assert exit_info.value.code == 2
        assert reason in capsys.readouterr().err

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    refused(small, tmp_path / "mine", "holds files that are not of a published model")
    assert (tmp_path / "mine" / "config.json").read_text() == "{}"
    (tmp_path / "clone" / ".git").mkdir(parents=True)
    (tmp_path / "clone" / "arrowhead.json").write_text("{}")
    refused(small, tmp_path / "clone", "is a git repository")
    assert (tmp_path / "clone" / ".git").is_dir()


def test_weights_that_differ_leave_the_folder_as_it_was(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export.library_weights, "LOGIT_TOLERANCE", 0)
    with pytest.raises(Exception, match="other logits"):
        publish.publish(small, tmp_path / "out", PublishConfig())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("repo", ["cats", "me/", "../x/y", "me/a b"])
def test_names_that_are_no_repository_are_refused_before_any_work(repo: str) -> None:
    with pytest.raises(ConfigError, match="not the name of a repository"):
        PublishConfig(push=repo)


# ---------------------------------------------------------------------------------- push


class Hub(BaseHTTPRequestHandler):
    """The answers of the Hugging Face hub that a push needs; keeps what it was sent."""

    protocol_version = "HTTP/1.1"
    requests: list[tuple[str, str | None, bytes]]

    def do_POST(self) -> None:
        """Create a repository, say how to upload files, take a commit."""
        if self.headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
        self.requests.append((self.path, self.headers.get("authorization"), body))
        address = f"http://127.0.0.1:{self.server.server_address[1]}/me/things"
        answer: Any = {"url": address, "id": "me/things"}
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": n, "uploadMode": "regular"} for n in names]}
            for file in answer["files"]:
                file["shouldIgnore"] = False
        elif "/commit/" in self.path:
            answer = {"commitUrl": f"{address}/commit/{'0' * 40}", "commitOid": "0" * 40}
        elif "/tree/" in self.path:
            answer = []
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_HEAD = do_POST

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub on this machine, and a token for it."""
    handler = type("Handler", (Hub,), {"requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    huggingface_hub.close_session()  # it keeps the proxies of the time when it was made
    yield handler
    server.shutdown()
    server.server_close()


def test_a_push_sends_every_file_of_the_folder_in_one_commit_and_shows_no_token(
    small: Path, tmp_path: Path, fake_hub: type[Hub], command: Command
) -> None:
    result = command("publish", small, tmp_path / "things", "--push", "me/things")
    assert result["pushed"].endswith("/me/things")
    assert SECRET not in command.stderr + json.dumps(result)
    by_path = {path.partition("?")[0]: body for path, _, body in fake_hub.requests}
    assert json.loads(by_path["/api/repos/create"])["visibility"] == "private"
    commits = [body for path, _, body in fake_hub.requests if "/commit/" in path]
    assert len(commits) == 1
    entries = [json.loads(line) for line in commits[0].splitlines()]
    sent = {
        one["value"]["path"]: base64.b64decode(one["value"]["content"])
        for one in entries
        if one["key"] == "file"
    }
    files = [item for item in (tmp_path / "things").rglob("*") if item.is_file()]
    assert sent == {str(item.relative_to(tmp_path / "things")): item.read_bytes() for item in files}
    assert "things" in (tmp_path / "things" / "README.md").read_text()


def test_a_failed_push_keeps_the_folder_and_says_what_to_do(
    published: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = {item: item.read_bytes() for item in published.rglob("*") if item.is_file()}
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with pytest.raises(ConfigError, match="is written, but could not be pushed") as offline:
        hub.push(published, "me/things", public=False)
    assert SECRET not in str(offline.value) and offline.value.__cause__ is None

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    assert os.environ.get("HUGGING_FACE_HUB_TOKEN") is None
    with pytest.raises(ConfigError, match=r"you are not logged in[^$]*hf auth login"):
        hub.push(published, "me/things", public=False)

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"pip install 'arrowhead\[hub\]'"):
        hub.push(published, "me/things", public=False)
    assert before == {item: item.read_bytes() for item in published.rglob("*") if item.is_file()}
