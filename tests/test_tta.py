"""Test-time augmentation: averaged views are calibrated; scores are the same with a store."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Command, MakeBundle

from arrowhead import ConfigError
from arrowhead.bundle import format as bundle_format
from arrowhead.bundle import tta
from arrowhead.features.store import Store


@pytest.fixture(scope="module")
def fitted(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The OUT of a training on 2 classes with a clean and two augmented views per image."""
    from arrowhead.cli.main import main

    folder = tmp_path_factory.mktemp("tta")
    for split in ("train", "valid"):
        for label in ("baskets", "beads"):
            shutil.copytree(image_folder / split / label, folder / "images" / split / label)
    flags = ["--body", "resnet18", "--weights", "random", "--size", "64", "--views", "3"]
    flags += ["--epochs", "3", "--rate", "1e-2"]
    with pytest.raises(SystemExit) as ended:
        main(["fit", str(folder / "images"), str(folder / "out"), *flags, "--json"])
    assert ended.value.code == 0
    return folder


def test_each_number_of_views_has_its_own_calibration(fitted: Path) -> None:
    path = fitted / "out" / "bundle"
    bundle = bundle_format.load(path)
    entries = bundle.lineage["tta"]
    assert [entry["views"] for entry in entries] == [1, 2]
    valid = Store(fitted / "out" / "store").features("valid")
    logit_NC = tta.view_logits(bundle.make_head(), valid.feature).mean(1)
    assert entries[1]["metrics"]["accuracy"] == np.mean(logit_NC.argmax(1) == valid.label)
    chosen = tta.with_views(bundle, 2, path)
    assert chosen.temperature == entries[1]["temperature"]
    loss = torch.nn.functional.cross_entropy(
        torch.from_numpy(logit_NC) / chosen.temperature, torch.from_numpy(valid.label)
    )
    assert entries[1]["metrics"]["loss"] == pytest.approx(float(loss), abs=1e-5)


def test_views_of_a_store_and_decoded_views_give_the_same_scores(
    fitted: Path, tmp_path: Path, command: Command
) -> None:
    bundle, images = fitted / "out" / "bundle", fitted / "images" / "valid"
    flags = ["--tta", 2, "--probabilities", "--workers", 0]
    decoded = command("score", bundle, images, tmp_path / "a", *flags)
    store = fitted / "out" / "store"
    looked_up = command("score", bundle, images, tmp_path / "b", *flags, "--store", store)
    assert (decoded["counts"]["looked_up"], looked_up["counts"]["decoded"]) == (0, 0)
    clean = command("score", bundle, images, tmp_path / "c", "--probabilities")
    assert clean["counts"] == decoded["counts"]
    a, b, c = (pq.read_table(tmp_path / name / "parts")["probability"].to_numpy() for name in "abc")
    np.testing.assert_allclose(a, b, atol=1e-4)
    assert not np.allclose(a, c, atol=1e-4)
    evaluated = command(
        "evaluate",
        bundle,
        fitted / "images",
        tmp_path / "e",
        "--tta",
        2,
        "--split",
        "valid",
        "--store",
        store,
    )
    entry = json.loads((bundle / "bundle.json").read_text())["lineage"]["tta"][1]
    assert evaluated["metrics"]["accuracy"] == entry["metrics"]["accuracy"]
    assert evaluated["metrics"]["loss"] == pytest.approx(entry["metrics"]["loss"], abs=1e-3)


def test_a_number_of_views_that_is_not_calibrated_is_refused(
    fitted: Path, make_bundle: MakeBundle
) -> None:
    path = fitted / "out" / "bundle"
    with pytest.raises(ConfigError, match=r"(?s)up to 2 augmented views.*--tta 2.*--views 5"):
        tta.with_views(bundle_format.load(path), 4, path)
    with pytest.raises(ConfigError, match="the clean view alone"):
        tta.with_views(bundle_format.load(make_bundle()), 1, path)
