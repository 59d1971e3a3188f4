"""Compare the similarity that `arrowhead search` uses with the alternatives.

    .venv/bin/python bench/search.py --store STORE

STORE is a store of labelled photos that are still where they were. Two measures: of the ten images
most similar to each image, how many have its label (precision); and how often an altered copy of
one of --copies images finds its original first (recall). Before that, time and memory of one query
are measured in a store as large as --rows images, made of copies of the features.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import resource
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from arrowhead.bundle import replay
from arrowhead.data.catalog import Catalog
from arrowhead.examine import search
from arrowhead.features import extract
from arrowhead.features.store import Features, Store

Rows = NDArray[Any]
NEAREST = 10


def main() -> None:
    """Measure, print, and write JSON with --out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--copies", type=int, default=100)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    store = Store(args.store)
    known = store.features()
    feature_ND = known.feature[:, 0].astype(np.float32)
    result: dict[str, Any] = {"about": environment(store, known, args)}
    result["scale"] = measure_scale(store, args.rows)  # first, while little memory is in use
    print(result["scale"])
    altered = alter(store, known, args.copies)
    for name, prepare in preparations(feature_ND).items():
        unit_ND = prepare(feature_ND)
        result[name] = {"precision": precision(unit_ND, known.label)}
        for change, (rows, changed) in altered.items():
            first = (prepare(changed) @ unit_ND.T).argmax(1)
            result[name][f"recall: {change}"] = float((first == rows).mean())
        print(f"{name:<24}", "  ".join(f"{k} {v:.3f}" for k, v in result[name].items()))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def environment(store: Store, known: Features, args: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "date": datetime.date.today().isoformat(),
        "body": store.recipe.body,
        "images": len(known.row),
        "copies": args.copies,
        "cores": len(os.sched_getaffinity(0)),
        "numpy": version("numpy"),
    }


def unit(rows: Rows) -> Rows:
    """Rows of length 1."""
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))


def preparations(feature_ND: Rows) -> dict[str, Callable[[Rows], Rows]]:
    """What is done to features before the dot product, by name."""
    mean, std = feature_ND.mean(0), feature_ND.std(0)
    std[std < search.MIN_STD] = 1
    _, strength, axes = np.linalg.svd(feature_ND - mean, full_matrices=False)
    keep = min(128, len(strength))
    whiten = axes[:keep].T / (strength[:keep] / np.sqrt(len(feature_ND)))
    return {
        "cosine": unit,
        "centred": lambda rows: unit(rows - mean),
        "standardized (ours)": lambda rows: unit((rows - mean) / std),
        "whitened, 128 axes": lambda rows: unit((rows - mean) @ whiten),
    }


def precision(unit_ND: Rows, label_N: Rows) -> float:
    """Share of the nearest images that have the label of the query."""
    similarity_NN = unit_ND @ unit_ND.T
    np.fill_diagonal(similarity_NN, -2)
    nearest = np.argsort(-similarity_NN, axis=1)[:, :NEAREST]
    return float((label_N[nearest] == label_N[:, None]).mean())


def alter(store: Store, known: Features, count: int) -> dict[str, tuple[Rows, Rows]]:
    """Positions of the originals and features of their altered copies, by kind of change."""
    catalog = Catalog(**store.read_catalog())
    rng = np.random.default_rng(0)
    positions = np.sort(rng.permutation(len(known.row))[:count])
    photos = []
    for position in positions:
        data, fault = catalog.read_file(int(known.row[position]), 2**28)
        assert fault is None, fault
        photos.append(Image.open(io.BytesIO(data)).convert("RGB"))
    changes: dict[str, Callable[[Image.Image], Image.Image]] = {
        "half size": lambda one: one.resize((max(8, one.width // 2), max(8, one.height // 2))),
        "JPEG 30": lambda one: one,
        "crop 20 %": lambda one: ImageOps.crop(one, min(one.size) // 10),
        "mirrored": ImageOps.mirror,
        "grey": lambda one: ImageOps.grayscale(one).convert("RGB"),
        "brighter": lambda one: ImageEnhance.Brightness(one).enhance(1.5),
        "rotated 90": lambda one: one.rotate(90, expand=True),
    }
    body = extract.load_body(store.recipe, store.weights_path, "cpu")
    result = {}
    for name, change in changes.items():
        files = [encode(change(one), 30 if name == "JPEG 30" else 90) for one in photos]
        parts = [files[at : at + 32] for at in range(0, len(files), 32)]
        features = [replay.clean_features(store.recipe, body, part, "cpu", 2) for part in parts]
        result[name] = positions, np.concatenate(features)
    return result


def encode(image: Image.Image, quality: int) -> bytes:
    """The image as JPEG."""
    output = io.BytesIO()
    image.save(output, "JPEG", quality=quality)
    return output.getvalue()


class TiledStore:
    """A store whose shards are repeated: `most_similar` reads as much as from a large one."""

    def __init__(self, store: Store, rows: int) -> None:
        self.path, self.recipe = store.path, store.recipe
        shards = store.mapped_features()
        self._shards: list[Rows] = []
        count = 0
        while count < rows:
            self._shards.append(shards[len(self._shards) % len(shards)])
            count += len(self._shards[-1])
        self.rows = count

    def mapped_features(self) -> list[Rows]:
        """The repeated shards."""
        return self._shards


def measure_scale(store: Store, rows: int) -> dict[str, Any]:
    """Seconds and memory of one query in a large store."""
    large = TiledStore(store, rows)
    known = Features(
        feature=np.empty((large.rows, 1, 0), np.float16),
        label=np.zeros(large.rows, np.int64),
        row=np.arange(large.rows),
        image_id=np.zeros(large.rows, np.uint64),
        split=np.full(large.rows, "train"),
    )
    query_QD = store.clean_features(np.array([0]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    search.most_similar(large, query_QD, 20, known)  # type: ignore[arg-type]
    return {
        "images": large.rows,
        "width": store.recipe.width,
        "seconds": time.perf_counter() - start,
        "additional_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    }


if __name__ == "__main__":
    main()
