"""The precision of the backbone: chosen by the hardware, kept by store and bundle."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import AddMlflowDb, Command

from arrowhead.bundle import format as bundle_format
from arrowhead.cli.main import main
from arrowhead.features import precision
from arrowhead.features.store import Store

SMALL = ["--body", "shufflenet_v2_x0_5", "--weights", "random", "--size", "64"]
AUTO = [*SMALL, "--body-precision", "auto"]


def machine(patch: pytest.MonkeyPatch, *, bf16: bool) -> None:
    """Let this machine seem to have bf16 units, or not; torch computes in bf16 on both."""
    patch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": bf16})


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as exit_info:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    return int(exit_info.value.code or 0), captured.out + captured.err


@pytest.fixture(scope="module")
def bf16_results(
    image_folder: Path, tmp_path_factory: pytest.TempPathFactory, add_mlflow_db: AddMlflowDb
) -> Path:
    """A folder with out/store and out/bundle in bf16, fitted with --body-precision auto."""
    folder = add_mlflow_db(tmp_path_factory.mktemp("bf16"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        machine(patch, bf16=True)
        with pytest.raises(SystemExit) as exit_info:
            main(["fit", str(image_folder), "out", *AUTO])
        assert exit_info.value.code == 0
    return folder


@pytest.fixture
def folder(bf16_results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `bf16_results`, the working directory."""
    shutil.copytree(bf16_results, tmp_path / "results")
    monkeypatch.chdir(tmp_path / "results")
    return tmp_path / "results"


def test_auto_is_bf16_only_where_the_machine_has_units_for_it(
    image_folder, tmp_path, monkeypatch, capsys
):
    fingerprints = []
    for bf16 in (True, False):
        machine(monkeypatch, bf16=bf16)
        store = tmp_path / f"store-{bf16}"
        code, output = run(capsys, "precompute", image_folder / "valid", store, *AUTO)
        assert code == 0
        assert ("body precision bf16" in output) == bf16
        recipe = Store(store).recipe
        assert recipe.body_precision == ("bf16" if bf16 else "fp32")
        assert ("body_precision" in recipe.to_dict()) == bf16  # fp32 reads as before the field
        fingerprints.append(recipe.fingerprint)
    assert fingerprints[0] != fingerprints[1]
    ours, exact = (
        Store(tmp_path / f"store-{bf16}").features().feature.astype(np.float64)[:, 0]
        for bf16 in (True, False)
    )
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(exact, axis=1)
    cosine = (ours * exact).sum(1) / norms
    assert cosine.min() >= precision.MIN_COSINE
    assert not np.array_equal(ours, exact)


def test_auto_is_fp32_if_bf16_would_change_the_features(
    image_folder, tmp_path, monkeypatch, capsys
):
    machine(monkeypatch, bf16=True)
    monkeypatch.setattr(precision, "MIN_COSINE", 1.1)
    code, output = run(capsys, "precompute", image_folder / "valid", tmp_path / "s", *AUTO)
    assert code == 0
    assert "body precision fp32: in bf16" in output
    assert Store(tmp_path / "s").recipe.body_precision == "fp32"


def test_a_store_keeps_its_precision_on_every_machine(folder, image_folder, monkeypatch, capsys):
    machine(monkeypatch, bf16=False)
    command = "precompute", image_folder, "out/store", *SMALL
    for flags in ([], ["--body-precision", "auto"], ["--body-precision", "bf16"]):
        code, output = run(capsys, *command, *flags)
        assert code == 0
        assert "nothing decoded" in output
        assert "this machine has no bf16 units" in output
    assert Store(Path("out/store")).recipe.body_precision == "bf16"
    code, output = run(capsys, *command, "--body-precision", "fp32")
    assert code == 2
    assert "was made with body_precision = bf16, and --body-precision asks for fp32" in output


def test_a_bundle_in_bf16_scores_the_same_labels_on_machines_without_units(
    folder, image_folder, command: Command, monkeypatch
):
    assert bundle_format.load(Path("out/bundle")).recipe.body_precision == "bf16"
    labels = {}
    for bf16 in (True, False):
        machine(monkeypatch, bf16=bf16)
        out = Path(f"scores-{bf16}")
        result = command("score", "out/bundle", image_folder / "new", out)
        assert result["drift"]["feature"] <= (1e-4 if bf16 else 1e-3)
        assert result["drift"]["changed"] == 0
        assert result["drift"]["emulated"] == ("" if bf16 else "bf16")
        rows = [row for part in out.rglob("*.parquet") for row in pq.read_table(part).to_pylist()]
        labels[bf16] = {row["path"]: row["label"] for row in rows}
    assert labels[True] == labels[False] != {}


def test_from_a_bundle_a_store_has_the_bundles_precision(folder, image_folder, monkeypatch, capsys):
    machine(monkeypatch, bf16=False)
    code, _ = run(capsys, "precompute", image_folder / "valid", "new", "--from", "out/bundle")
    assert code == 0
    assert Store(Path("new")).recipe == Store(Path("out/store")).recipe
