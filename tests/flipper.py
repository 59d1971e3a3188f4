"""Run by test_flips: reads files with one flipped bit each; prints a line before and after each."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from arrowhead import ConfigError, DataError
from arrowhead.bundle import format as bundle_format
from arrowhead.features import extract
from arrowhead.features.extract import FeatureCache
from arrowhead.features.store import Store
from arrowhead.training import checkpoint


def of_store(path: Path) -> str:
    """Everything that precompute, train and score take from a store."""
    store = Store(path)
    total = hashlib.sha256(repr(store.recipe).encode())
    known = FeatureCache.from_store(store)
    if (path / "manifest.json").is_file():
        features = store.features()
        for array in (features.feature, features.label, features.row, features.image_id):
            total.update(np.ascontiguousarray(array).tobytes())
        total.update("".join(features.split).encode())
        total.update(
            repr(
                {
                    k: list(v) if k != "root" and k != "ignored" else v
                    for k, v in store.read_catalog().items()
                }
            ).encode()
        )
        for one in store.mapped_features():
            total.update(np.ascontiguousarray(one).tobytes())
        ids = [image_id for rows in store.shards() for image_id in rows.image_ids]
    else:
        total.update(repr(store.read_pending()["paths"]).encode())
        ids = [
            image_id
            for name in store.shard_names()
            for image_id in store.read_shard(name).image_ids
        ]
    for image_id in ids:
        result = known.get(image_id)
        total.update(b"" if result is None else result.tobytes())
    extract.load_weights(store.recipe, store.weights_path)
    return total.hexdigest()


def of_bundle(path: Path) -> str:
    """All of a bundle."""
    result = bundle_format.load(path)
    total = hashlib.sha256(
        repr((result.recipe, result.classes, result.head, result.temperature)).encode()
    )
    total.update(repr((result.metrics, result.lineage, result.multi, result.thresholds)).encode())
    for state in (result.body_state, result.head_state):
        for name in sorted(state):
            total.update(name.encode() + state[name].numpy().tobytes())
    assert result.known_images
    total.update(result.known_images.train.tobytes() + result.known_images.valid.tobytes())
    for one in result.golden:
        total.update(one.data + one.feature.tobytes() + one.probabilities.tobytes())
    return total.hexdigest()


def of_checkpoint(path: Path) -> str:
    """The newest checkpoint, None when it is passed over."""
    result = checkpoint.newest(path, "key", lambda words: None)
    if result is None:
        raise DataError("none is whole", "", "")
    tensors = {name: tensor.numpy().tobytes() for name, tensor in sorted(result.tensors.items())}
    return hashlib.sha256(repr((result.number, result.facts, tensors)).encode()).hexdigest()


READERS: dict[str, Callable[[Path], str]] = {
    "store": of_store,
    "bundle": of_bundle,
    "checkpoint": of_checkpoint,
}


def main(kind: str, folder: Path) -> None:
    """Read flips (file, bit) as JSON from standard input; say what comes of each."""
    read = READERS[kind]
    right = read(folder)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        name, bit = json.loads(line)
        file = folder / name
        full = file.read_bytes()
        flipped = bytearray(full)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        try:
            output = "same" if read(folder) == right else "other"
        except (DataError, ConfigError) as error:
            output = type(error).__name__
        except BaseException as error:
            output = repr(error)
        file.write_bytes(full)
        print(json.dumps(output), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
