"""Shared fixtures: small real JPEGs that the demo draws, and real photos if they are available."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import forks
import pytest

Bundled = Callable[..., Path]
Tracked = Callable[[Path], Path]
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

# Before anything imports torch: tests measure promises, not this machine's core count.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Two tests at a time share the cores: threads that wait for each other spinning cost five times
# what the work does. Asleep they change neither their number nor a result.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


# Files whose tests wait minutes, for Ray and for processes to be killed: begun first, or they would
# be what one of two workers still does when the other has long ended.
LONG = [
    f"test_{name}.py"
    for name in (
        "kills",
        "submit",
        "mlflow_server",
        "study",
        "launch",
        "scoring",
        "readme",
    )
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, the others in their order."""
    folder = {name: at for at, name in enumerate(LONG)}
    items.sort(key=lambda item: folder.get(item.path.name, len(LONG)))


@pytest.fixture(scope="session", autouse=True)
def _forked_decoders() -> Iterator[None]:
    """Where many tests run, decoders' processes come without their imports; test_guard.py, and a
    file that is run alone, have them as they are.
    """
    from arrowhead.decode import worker_process

    with pytest.MonkeyPatch.context() as patch:
        if "PYTEST_XDIST_WORKER" in os.environ:
            patch.setattr(worker_process, "subprocess", forks.Decoders)
        yield


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/, valid/ and new/ of drawn JPEGs: 3 classes, 24 images each."""
    from arrowhead import demo

    folder = tmp_path_factory.mktemp("drawn")
    demo.draw(folder, per_class=24)
    return folder


@pytest.fixture(scope="session")
def many(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """192 images of two classes, all with other bytes: enough to be disturbed in the middle."""
    folder = tmp_path_factory.mktemp("many") / "data"
    photos = sorted(drawn.rglob("*.jpg"))
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
    for number in range(192):
        photo = photos[number % len(photos)].read_bytes()
        target = folder / "ab"[number % 2] / f"{number:03}.jpg"
        target.write_bytes(photo + number.to_bytes(2, "big"))
    return folder


@pytest.fixture(scope="session")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    """Gives a folder an empty mlflow.db, and the folder back: MLflow takes seconds to make one."""
    from mlflow import MlflowClient

    result = tmp_path_factory.mktemp("schema") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{result}").search_experiments()

    def track(folder: Path) -> Path:
        shutil.copy(result, folder)
        return folder

    return track


@pytest.fixture(scope="session")
def dogscats() -> Path:
    """600 + 200 real photos of cats and dogs."""
    folder = SHARED / "dogscats"
    if not folder.is_dir():
        pytest.skip("the real photos (../shared/data/dogscats) are not on this machine")
    return folder


@pytest.fixture(scope="session")
def mobilenet() -> list[str]:
    """Flags of a pretrained body."""
    weights = SHARED / "weights" / "mobilenet_v2-coral.safetensors"
    if not weights.is_file():
        pytest.skip("the pretrained weights (../shared/data/weights) are not on this machine")
    half = ["0.5", "0.5", "0.5"]
    flags = ["--body", "mobilenet_v2", "--weights", str(weights)]
    return [*flags, "--mean", *half, "--std", *half]


@pytest.fixture(scope="session")
def pets(
    tmp_path_factory: pytest.TempPathFactory, dogscats: Path, mobilenet: list[str], tracked: Tracked
) -> Path:
    """The finished store of the real photos, to be read; of two test processes, one makes it."""
    from arrowhead.cli.main import main

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with (folder / "pets.lock").open("w") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "pets" / "manifest.json").is_file():
            patch.chdir(tracked(tmp_path_factory.mktemp("pets")))
            with pytest.raises(SystemExit) as ended:
                main(["precompute", str(dogscats), str(folder / "pets"), *mobilenet])
            assert ended.value.code == 0
    return folder / "pets"


@pytest.fixture(scope="session")
def bundled(tmp_path_factory: pytest.TempPathFactory, drawn: Path) -> Bundled:
    """Saves a bundle of a random ResNet18 and a drawn head with three golden images; its path."""

    def save(head: str = "linear", *, pool: str = "avg", **fields: Any) -> Path:
        import torch

        from arrowhead.bundle import format as bundle_format
        from arrowhead.bundle import replay
        from arrowhead.bundle.format import Bundle, GoldenImage
        from arrowhead.decode.pixels import PixelConfig
        from arrowhead.features import backbone, extract
        from arrowhead.features.backbone import BodyConfig
        from arrowhead.training import heads

        body = BodyConfig(body="resnet18", weights="random", pool=pool)
        weights, width = backbone.load(body), 1024 if pool == "concat" else 512
        state = heads.build_head(head, width, 3, seed=4).state_dict()
        if head == "lesson":  # as if it had been trained: norms that do something
            draw = torch.Generator().manual_seed(1)
            for tensor in state.values():
                if tensor.dim() == 1 and tensor.is_floating_point():
                    tensor.copy_(torch.rand(tensor.shape, generator=draw) + 0.5)
        result = Bundle(
            recipe=extract.make_recipe(PixelConfig(size=64), body, weights, width),
            classes=["baskets", "beads", "leaves"],
            head=head,
            body_state=weights.state,
            head_state=state,
            metrics={},
            lineage={},
            **{"temperature": 0.5} | fields,
        )
        images = [next((drawn / "valid" / name).glob("*")).read_bytes() for name in result.classes]
        feature_ND = replay.clean_features(result.recipe, result.make_body(), images, "cpu", 1)
        prob_NC = bundle_format.probabilities(
            result.make_head(), feature_ND, result.temperature, multi=result.multi
        )
        golden = [
            GoldenImage(name=f"{i}.img", data=data, feature=feature, probabilities=chance)
            for i, (data, feature, chance) in enumerate(
                zip(images, feature_ND, prob_NC, strict=True)
            )
        ]
        path = tmp_path_factory.mktemp("bundled") / "bundle"
        bundle_format.save(replace(result, golden=golden), path)
        return path

    return save


class Command:
    """Runs a verb with --json; its result."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.said = ""  # on standard error, by the last one

    def __call__(self, *words: object, code: int = 0) -> dict[str, Any]:
        from arrowhead.cli.main import main

        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([*map(str, words), "--json"])
        out = self._capsys.readouterr()
        self.said = out.err
        assert ended.value.code == code, out.err
        return dict(json.loads(out.out.splitlines()[-1]))


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a verb with --json, in this process; its result."""
    return Command(capsys)
