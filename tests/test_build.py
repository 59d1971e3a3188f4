"""A bundle is built from a store and a trained head, and from nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np

from arrowhead.bundle import build
from arrowhead.bundle import format as bundle_format
from arrowhead.features.store import Store
from arrowhead.training import heads
from arrowhead.training.config import TrainConfig
from arrowhead.training.trainer import TrainedHead


def test_a_store_and_a_head_give_a_complete_bundle_without_the_photos(
    image_folder, tmp_path, monkeypatch, add_mlflow_db, command
):
    monkeypatch.chdir(add_mlflow_db(tmp_path))
    shutil.copytree(image_folder, "photos")
    command("precompute", "photos", "store", "--body", "resnet18", "--weights", "random")
    shutil.rmtree("photos")
    store = Store(tmp_path / "store")
    head = heads.build_head("linear", store.recipe.width, 3, seed=4).state_dict()
    state = {name: tensor.numpy() for name, tensor in head.items()}
    state |= {"2.weight": 0 * state["2.weight"], "2.bias": np.array([0, 1, 0], np.float32)}
    bundle = build.build(
        store,
        TrainConfig(head="linear"),
        TrainedHead(state=state, epochs=[], epoch=4),
        candidates=store.load_golden() or {},
        lineage={"run_id": "abc"},
    )
    valid = store.features("valid")
    assert bundle.metrics["images"] == len(valid.label)
    assert bundle.metrics["accuracy"] == (valid.label == 1).mean()
    assert bundle.metrics["temperature"] == bundle.temperature
    assert bundle.lineage["run_id"] == "abc" and bundle.lineage["epoch"] == 4
    assert len(bundle.golden) == 8 and bundle.novelty is not None
    assert bundle.known_images.lookup([bytes(16)])[0] == 0
    bundle_format.save(bundle, tmp_path / "bundle")
    assert bundle_format.load(tmp_path / "bundle").metrics == bundle.metrics


def test_building_a_bundle_imports_neither_mlflow_nor_ray():
    code = "import sys, arrowhead.bundle.build; sys.exit(bool({'mlflow', 'ray'} & {*sys.modules}))"
    subprocess.run([sys.executable, "-c", code], check=True)
