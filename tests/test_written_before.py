"""A store and a bundle that version 0.1.0 wrote (features of format 2, bundle of format 3) open.

They were made once, with a random `shufflenet_v2_x0_5` at 64 pixels and the images beside them, and
are never written anew: `scores.json` holds what that version answered.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from arrowhead.features.store import Store

BEFORE = Path(__file__).parent / "written_before"
SUM = 0.06552159786224365  # of all features, as float64


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """A copy that may be written to."""
    return Path(shutil.copytree(BEFORE, tmp_path / "before"))


def test_an_old_store_is_whole_and_gives_its_features(before, command):
    held = command("features", "info", before / "store")
    assert (held["images"], held["features"]) == (24, 24)
    assert command("features", "verify", before / "store")["findings"] == []
    features = Store(before / "store").features()
    assert features.feature.shape == (24, 1, 1024)
    assert float(features.feature.astype(np.float64).sum()) == pytest.approx(SUM, rel=1e-9)
    assert np.bincount(features.label).tolist() == [8, 8, 8]
    assert {name: int((features.split == name).sum()) for name in ("train", "valid")} == {
        "train": 18,
        "valid": 6,
    }


def test_an_old_store_is_added_to_without_decoding_again(before, command, tracked, monkeypatch):
    monkeypatch.chdir(tracked(before))
    flags = ["--body", "shufflenet_v2_x0_5", "--weights", "random", "--size", 64]
    counts = command("precompute", before / "images", before / "store", *flags)["counts"]
    assert (counts["decoded"], counts["reused"], counts["faults"]) == (0, 24, 0)


def test_an_old_bundle_scores_as_it_did(before, command, tracked, monkeypatch):
    import pyarrow.parquet as pq

    monkeypatch.chdir(tracked(before))
    result = command(
        "score", before / "bundle", before / "images", before / "scores", "--probabilities"
    )
    assert result["counts"]["scored"] == 24
    assert result["drift"]["changed"] == 0
    (part,) = (before / "scores").rglob("*.parquet")
    rows = pq.read_table(part).to_pylist()
    expected = json.loads((BEFORE / "scores.json").read_text())
    assert [row["path"] for row in rows] == sorted(expected)
    for row in rows:
        given = row["probabilities"]
        values = list(given.values()) if isinstance(given, dict) else given
        assert values == pytest.approx(expected[row["path"]]["probabilities"], abs=1e-3)


def test_an_old_store_trains(before, command, tracked, monkeypatch):
    monkeypatch.chdir(tracked(before))
    shutil.rmtree(before / "images")
    result = command("train", before / "store", before / "new", "--epochs", 3, "--rate", 0.01)
    assert result["metrics"]["images"] == 6
