"""`precompute --from`: a store made by the body of a bundle has that bundle's features."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Command

from arrowhead.bundle import format as bundle_format
from arrowhead.cli.main import main
from arrowhead.features.store import Store


@pytest.fixture(scope="module")
def bundle(make_bundle: Callable[..., Path]) -> Path:
    """A bundle that says where its weights come from."""
    return make_bundle(lineage={"weights": {"source": "a file of mine", "license": "mit"}})


def test_precompute_from_a_bundle_gives_its_features_and_names_its_weights(
    bundle: Path, image_folder: Path, tmp_path: Path, command: Command
) -> None:
    valid, store_path = image_folder / "valid", tmp_path / "store"
    arguments = ("precompute", valid, store_path, "--from", bundle)
    command(*arguments)
    loaded, store = bundle_format.load(bundle), Store(store_path)
    assert store.recipe.weights == loaded.recipe.weights
    assert store.recipe.size == loaded.recipe.size
    assert store.weights_origin == {"source": "a file of mine", "license": "mit"}
    found = {
        image_id: rows.features[i, 0]
        for rows in store.shards()
        for i, image_id in enumerate(rows.image_ids)
    }
    for golden in loaded.golden:
        np.testing.assert_allclose(
            found[hashlib.blake2b(golden.data, digest_size=16).digest()], golden.feature, atol=1e-2
        )
    again = command(*arguments)
    assert again["counts"]["decoded"] == 0


def test_precompute_from_a_bundle_refuses_what_the_bundle_decides_and_stores_of_other_bodies(
    bundle: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*flags: object) -> str:
        with pytest.raises(SystemExit) as exit_info:
            main(["precompute", str(image_folder / "valid"), str(tmp_path / "s"), *map(str, flags)])
        assert exit_info.value.code == 2
        return capsys.readouterr().err

    assert "--size has no effect with --from" in refused("--from", bundle, "--size", 96)
    assert not (tmp_path / "s").exists()
    other = ["--body", "shufflenet_v2_x0_5", "--weights", "random", "--size", "96"]
    with pytest.raises(SystemExit) as exit_info:
        main(["precompute", str(image_folder / "valid"), str(tmp_path / "s"), *other])
    assert exit_info.value.code == 0
    assert "was made with size = 96" in refused("--from", bundle)
