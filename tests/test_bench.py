"""The programs in bench/ work with the current code: each runs on little data."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


def load(name: str) -> ModuleType:
    """Import a program as a module."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", sorted(file.stem for file in BENCH.glob("*.py")))
def test_every_benchmark_prints_its_help(name):
    program = [sys.executable, str(BENCH / f"{name}.py"), "--help"]
    completed = subprocess.run(program, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    assert "usage:" in completed.stdout


def test_bench_extract_measures_each_stage(image_folder):
    seconds, stages = load("extract").pump(image_folder / "train", "shufflenet_v2_x0_5", 8)
    assert seconds > 0
    assert stages.keys() >= {"read", "decode", "forward", "workers"}


def test_bench_head_compares_loops_and_stacks():
    import torch

    head = load("head")
    args = argparse.Namespace(classes=[2], batches=[8], rounds=1, seconds=0.001)
    feature_ND = torch.randn(80, 4).half()
    assert head.compare_loops(feature_ND, args)[0]["rows_per_second"].keys() > {"sgd", "adamw"}
    assert len(head.compare_stacks(feature_ND, args)) == 2  # optimizers


def test_bench_listing_counts_files_with_every_alternative(tmp_path, capsys, monkeypatch):
    listing = load("listing")
    monkeypatch.setattr(listing, "FILES_PER_FOLDER", 2)
    listing.create_tree(tmp_path, 30)
    for name in listing.ALTERNATIVES:
        listing.measure(name, str(tmp_path))
        assert json.loads(capsys.readouterr().out)["files"] == 30


def test_bench_suggest_compares_methods_from_the_same_start(capsys):
    import numpy as np

    suggest = load("suggest")
    rng = np.random.default_rng(0)
    label = np.repeat([0, 1, 2], 20)
    feature = (np.eye(3)[label] + rng.normal(0, 0.3, (60, 3))).astype(np.float32)
    task = suggest.Task(feature, label, start=4, picks=3, rounds=2)
    result = suggest.compare("points", task, 2, list(suggest.METHODS))
    assert result.keys() == suggest.METHODS.keys()
    assert len({one["accuracy"][0] for one in result.values()}) == 1
    assert all(len(one["accuracy"]) == 3 for one in result.values())
    cold = suggest.Task(feature, label, start=0, picks=6, rounds=1)
    assert suggest.compare("cold", cold, 2, ["random", "core-set"])["core-set"]["all_classes"] == 1


def test_bench_search_compares_similarities():
    import numpy as np

    search = load("search")
    label = np.repeat([0, 1], 30)
    feature = np.random.default_rng(0).normal(0, 0.1, (60, 8)) + 5 + np.eye(8)[label]
    for name, prepare in search.preparations(feature.astype(np.float32)).items():
        assert search.precision(prepare(feature), label) > 0.6, name
