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

MakeBundle = Callable[..., Path]
AddMlflowDb = Callable[[Path], Path]
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

# These are set before anything imports torch, MLflow or Ray, which read them on import.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Two test processes share the cores. OpenMP threads that spin while they wait make tests five times
# slower; threads that sleep give the same results.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Likewise, the threads of OpenBLAS make fits of small matrices by SciPy four times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


# The files that take longest, in this order. They start first, so that both test processes finish
# at about the same time.
SLOW_FILES = [
    f"test_{name}.py"
    for name in (
        "kills",
        "submit",
        "mlflow_server",
        "study",
        "launch",
        "scoring",
        "readme",
        "label_errors",  # builds the store of photos
        "train",
        "fit",
        "tracking",
        "export",
        "relabel",
        "score",
        "race",
        "heatmaps",
        "registry",
        "search",
    )
]


def slow_params(*values: Any) -> list[Any]:
    """Values of a parametrized test, tuples if it has several parameters, for `make test-slow`."""
    rows = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*row, marks=pytest.mark.slow) for row in rows]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run slow files first and keep the order of the others."""
    position = {name: at for at, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: position.get(item.path.name, len(SLOW_FILES)))


@pytest.fixture(scope="session", autouse=True)
def _fork_decoder_processes() -> Iterator[None]:
    """Fork decoder processes from a server with the imports done, when tests run in parallel.

    A file that is run alone starts them as the product does.
    """
    from arrowhead.decode import worker_process

    with pytest.MonkeyPatch.context() as patch:
        if "PYTEST_XDIST_WORKER" in os.environ:
            patch.setattr(worker_process, "subprocess", forks.Decoders)
        yield


@pytest.fixture(autouse=True)
def _forget_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget each test's passwords: in later tests' messages, the word "two" would be redacted."""
    monkeypatch.setattr("arrowhead.tracking.address._secrets", set())


@pytest.fixture(scope="session", autouse=True)
def _trainings_without_reports() -> Iterator[Callable[..., Any]]:
    """Leave out the reports of `fit` and `train` in this process: seconds in hundreds of tests.

    Tests of reports ask for `with_reports`. Commands in processes of their own write theirs.
    """
    from arrowhead.commands import examine

    with pytest.MonkeyPatch.context() as patch:
        original = examine.report_of_training
        patch.setattr(examine, "report_of_training", lambda *_: None)
        yield original


@pytest.fixture
def with_reports(
    monkeypatch: pytest.MonkeyPatch, _trainings_without_reports: Callable[..., Any]
) -> None:
    """Let `fit` and `train` in this process write their reports, as users get them."""
    from arrowhead.commands import examine

    monkeypatch.setattr(examine, "report_of_training", _trainings_without_reports)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/, valid/ and new/ of synthetic JPEGs: 3 classes, 24 images each."""
    from arrowhead import demo

    folder = tmp_path_factory.mktemp("images")
    demo.draw(folder, per_class=24)
    return folder


@pytest.fixture(scope="session")
def folder_of_192(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """192 different images of two classes: enough to interrupt a command halfway."""
    folder = tmp_path_factory.mktemp("folder_of_192") / "data"
    photos = sorted(image_folder.rglob("*.jpg"))
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
    for number in range(192):
        photo = photos[number % len(photos)].read_bytes()
        target = folder / "ab"[number % 2] / f"{number:03}.jpg"
        target.write_bytes(photo + number.to_bytes(2, "big"))
    return folder


@pytest.fixture(scope="session")
def add_mlflow_db(tmp_path_factory: pytest.TempPathFactory) -> AddMlflowDb:
    """A function that copies an empty mlflow.db into a folder; creating one takes seconds."""
    from mlflow import MlflowClient

    database = tmp_path_factory.mktemp("schema") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{database}").search_experiments()

    def add_database(folder: Path) -> Path:
        shutil.copy(database, folder)
        return folder

    return add_database


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread: for matrices this small, threads spend more time on waiting than working."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def dogscats() -> Path:
    """600 + 200 real photos of cats and dogs."""
    folder = SHARED / "dogscats"
    if not folder.is_dir():
        pytest.skip("the real photos (../shared/data/dogscats) are not on this machine")
    return folder


@pytest.fixture(scope="session")
def mobilenet() -> list[str]:
    """Flags that select a pretrained MobileNetV2."""
    weights = SHARED / "weights" / "mobilenet_v2-coral.safetensors"
    if not weights.is_file():
        pytest.skip("the pretrained weights (../shared/data/weights) are not on this machine")
    half = ["0.5", "0.5", "0.5"]
    flags = ["--body", "mobilenet_v2", "--weights", str(weights)]
    return [*flags, "--mean", *half, "--std", *half]


@pytest.fixture(scope="session")
def photo_store(
    tmp_path_factory: pytest.TempPathFactory,
    dogscats: Path,
    mobilenet: list[str],
    add_mlflow_db: AddMlflowDb,
) -> Path:
    """The feature store of the real photos, read-only; one test process builds it for all."""
    from arrowhead.cli.main import main

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with (folder / "photo_store.lock").open("w") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "photo_store" / "manifest.json").is_file():
            patch.chdir(add_mlflow_db(tmp_path_factory.mktemp("photo_store")))
            with pytest.raises(SystemExit) as exit_info:
                main(["precompute", str(dogscats), str(folder / "photo_store"), *mobilenet])
            assert exit_info.value.code == 0
    return folder / "photo_store"


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> MakeBundle:
    """A function that saves a random network, a random head and 3 golden images as a bundle.

    Each call gives a folder of its own; what was computed for the same arguments is copied.
    """

    def save(
        head: str = "linear", *, pool: str = "avg", name: str = "shufflenet_v2_x0_5", **fields: Any
    ) -> Path:
        path = tmp_path_factory.mktemp("bundles") / "bundle"
        key = repr((head, pool, name, sorted(fields.items())))
        if key not in originals:
            originals[key] = tmp_path_factory.mktemp("bundles") / "bundle"
            save_bundle(originals[key], head, pool, name, fields)
        shutil.copytree(originals[key], path)
        return path

    originals: dict[str, Path] = {}

    def save_bundle(path: Path, head: str, pool: str, name: str, fields: dict[str, Any]) -> None:
        import torch

        from arrowhead.bundle import format as bundle_format
        from arrowhead.bundle import replay
        from arrowhead.bundle.format import Bundle, GoldenImage
        from arrowhead.decode.pixels import PixelConfig
        from arrowhead.features import backbone, extract
        from arrowhead.features.backbone import BodyConfig
        from arrowhead.training import heads

        body = BodyConfig(body=name, weights="random", pool=pool)
        weights = backbone.load(body)
        network = backbone.Body(
            name, weights.state, pool=pool, mean=weights.mean, std=weights.std, size=64
        )
        width = network.width
        state = heads.build_head(head, width, 3, seed=4).state_dict()
        if head == "lesson":  # batch norms that change their input, as after training
            generator = torch.Generator().manual_seed(1)
            for tensor in state.values():
                if tensor.dim() == 1 and tensor.is_floating_point():
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        result = Bundle(
            recipe=extract.make_recipe(PixelConfig(size=64), body, weights, width),
            classes=["baskets", "beads", "leaves"],
            head=head,
            body_state=weights.state,
            head_state=state,
            **{"temperature": 0.5, "metrics": {}, "lineage": {}} | fields,
        )
        images = [
            next((image_folder / "valid" / name).glob("*")).read_bytes() for name in result.classes
        ]
        feature_ND = replay.clean_features(result.recipe, result.make_body(), images, "cpu", 1)
        prob_NC = bundle_format.probabilities(
            result.make_head(), feature_ND, result.temperature, multi=result.multi
        )
        golden = [
            GoldenImage(name=f"{i}.img", data=data, feature=feature, probabilities=prob)
            for i, (data, feature, prob) in enumerate(zip(images, feature_ND, prob_NC, strict=True))
        ]
        bundle_format.save(replace(result, golden=golden), path)

    return save


class Command:
    """Runs an arrowhead command with --json and returns its result."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.stderr = ""  # standard error of the last command

    def __call__(self, *args: object, code: int = 0) -> dict[str, Any]:
        from arrowhead.cli.main import main

        self._capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main([*map(str, args), "--json"])
        output = self._capsys.readouterr()
        self.stderr = output.err
        assert exit_info.value.code == code, output.err
        return dict(json.loads(output.out.splitlines()[-1]))


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """A function that runs an arrowhead command with --json in this process."""
    return Command(capsys)
