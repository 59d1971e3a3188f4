"""A store and a bundle that version 0.1.0 wrote (features of format 2, bundle of format 3) open.

They were made once, with a random `shufflenet_v2_x0_5` at 64 pixels and the images beside them, and
must not be regenerated: `scores.json` holds that version's predictions.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from arrowhead.features.store import Store

FIXTURE_FOLDER = Path(__file__).parent / "written_before"
FEATURE_SUM = 0.06552159786224365  # of all features, as float64


@pytest.fixture
def old_files(tmp_path: Path) -> Path:
    """A writable copy of the old store and bundle."""
    return Path(shutil.copytree(FIXTURE_FOLDER, tmp_path / "before"))


def test_old_store_is_intact_and_gives_its_features(old_files, command):
    held = command("features", "info", old_files / "store")
    assert (held["images"], held["features"]) == (24, 24)
    assert command("features", "verify", old_files / "store")["findings"] == []
    features = Store(old_files / "store").features()
    assert features.feature.shape == (24, 1, 1024)
    assert float(features.feature.astype(np.float64).sum()) == pytest.approx(FEATURE_SUM, rel=1e-9)
    assert np.bincount(features.label).tolist() == [8, 8, 8]
    assert {name: int((features.split == name).sum()) for name in ("train", "valid")} == {
        "train": 18,
        "valid": 6,
    }


def test_old_store_is_extended_without_decoding_again(
    old_files, command, add_mlflow_db, monkeypatch
):
    monkeypatch.chdir(add_mlflow_db(old_files))
    flags = ["--body", "shufflenet_v2_x0_5", "--weights", "random", "--size", 64]
    counts = command("precompute", old_files / "images", old_files / "store", *flags)["counts"]
    assert (counts["decoded"], counts["reused"], counts["faults"]) == (0, 24, 0)


def test_old_bundle_scores_as_before(old_files, command, add_mlflow_db, monkeypatch):
    import pyarrow.parquet as pq

    monkeypatch.chdir(add_mlflow_db(old_files))
    result = command(
        "score", old_files / "bundle", old_files / "images", old_files / "scores", "--probabilities"
    )
    assert result["counts"]["scored"] == 24
    assert result["drift"]["changed"] == 0
    (part,) = (old_files / "scores").rglob("*.parquet")
    rows = pq.read_table(part).to_pylist()
    expected = json.loads((FIXTURE_FOLDER / "scores.json").read_text())
    assert [row["path"] for row in rows] == sorted(expected)
    for row in rows:
        given = row["probabilities"]
        values = list(given.values()) if isinstance(given, dict) else given
        assert values == pytest.approx(expected[row["path"]]["probabilities"], abs=1e-3)


def test_old_store_can_be_trained_on(old_files, command, add_mlflow_db, monkeypatch):
    monkeypatch.chdir(add_mlflow_db(old_files))
    shutil.rmtree(old_files / "images")
    result = command("train", old_files / "store", old_files / "new", "--epochs", 3, "--rate", 0.01)
    assert result["metrics"]["images"] == 6
