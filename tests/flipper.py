"""Read files with one flipped bit each and print what happens; test_flips runs this program."""

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


def digest_store(path: Path) -> str:
    """SHA-256 of everything that precompute, train and score read from a store."""
    store = Store(path)
    digest = hashlib.sha256(repr(store.recipe).encode())
    cache = FeatureCache.from_store(store)
    if (path / "manifest.json").is_file():
        features = store.features()
        for array in (features.feature, features.label, features.row, features.image_id):
            digest.update(np.ascontiguousarray(array).tobytes())
        digest.update("".join(features.split).encode())
        digest.update(
            repr(
                {
                    k: list(v) if k != "root" and k != "ignored" else v
                    for k, v in store.read_catalog().items()
                }
            ).encode()
        )
        for array in store.mapped_features():
            digest.update(np.ascontiguousarray(array).tobytes())
        ids = [image_id for rows in store.shards() for image_id in rows.image_ids]
    else:
        digest.update(repr(store.read_pending()["paths"]).encode())
        ids = [
            image_id
            for name in store.shard_names()
            for image_id in store.read_shard(name).image_ids
        ]
    for image_id in ids:
        feature = cache.get(image_id)
        digest.update(b"" if feature is None else feature.tobytes())
    extract.load_weights(store.recipe, store.weights_path)
    return digest.hexdigest()


def digest_bundle(path: Path) -> str:
    """SHA-256 of everything in a bundle."""
    bundle = bundle_format.load(path)
    digest = hashlib.sha256(
        repr((bundle.recipe, bundle.classes, bundle.head, bundle.temperature)).encode()
    )
    digest.update(repr((bundle.metrics, bundle.lineage, bundle.multi, bundle.thresholds)).encode())
    for state in (bundle.body_state, bundle.head_state):
        for name in sorted(state):
            digest.update(name.encode() + state[name].numpy().tobytes())
    assert bundle.known_images
    digest.update(bundle.known_images.train.tobytes() + bundle.known_images.valid.tobytes())
    for image in bundle.golden:
        digest.update(image.data + image.feature.tobytes() + image.probabilities.tobytes())
    return digest.hexdigest()


def digest_checkpoint(path: Path) -> str:
    """SHA-256 of the newest checkpoint.

    Raises:
        DataError: no checkpoint is complete.
    """
    newest = checkpoint.newest(path, "key", lambda message: None)
    if newest is None:
        raise DataError("none is whole", "", "")
    tensors = {name: tensor.numpy().tobytes() for name, tensor in sorted(newest.tensors.items())}
    return hashlib.sha256(repr((newest.number, newest.facts, tensors)).encode()).hexdigest()


READERS: dict[str, Callable[[Path], str]] = {
    "store": digest_store,
    "bundle": digest_bundle,
    "checkpoint": digest_checkpoint,
}


def main(kind: str, folder: Path) -> None:
    """Read flips (file, bit) as JSON lines from standard input; print the outcome of each.

    An outcome is "same", "other" (wrong data!), the name of the refusal, or any other exception.
    """
    read_digest = READERS[kind]
    expected = read_digest(folder)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        name, bit = json.loads(line)
        file = folder / name
        original = file.read_bytes()
        flipped = bytearray(original)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        try:
            output = "same" if read_digest(folder) == expected else "other"
        except (DataError, ConfigError) as error:
            output = type(error).__name__
        except BaseException as error:
            output = repr(error)
        file.write_bytes(original)
        print(json.dumps(output), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
