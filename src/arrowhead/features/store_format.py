"""The JSON files of a feature store: their keys and types, and refusals of damaged ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from arrowhead import fileio

FORMAT = 2
REPAIR = (
    "restore the file from a copy, or delete it and run the same precompute again: features that"
    " are there are not decoded again."
)
EXTRACT_AGAIN = (
    "delete the file and run the same precompute again: only its images are decoded again."
)


def _positive(value: Any) -> bool:
    return type(value) is int and value > 0


def _triple(value: Any) -> bool:
    fits = isinstance(value, list | tuple) and len(value) == 3
    return fits and {type(one) for one in value} <= {int, float}


DIGEST = re.compile("[0-9a-f]{64}")
NAME = re.compile("[0-9a-z]+")  # of a shard: no way out of its folder
RECIPE = {
    **dict.fromkeys(("body", "weights", "pool", "resize", "interpolation", "augment"), str),
    **dict.fromkeys(("dtype", "decoder"), str),
    **dict.fromkeys(("width", "size", "views"), _positive),
    **dict.fromkeys(("format", "augment_seed"), int),
    **dict.fromkeys(("mean", "std"), _triple),
    "antialias": bool,
}
GOLDEN = re.compile("[0-9a-f]{32}")  # an image id
HEAD = {"recipe": dict, "chunk_size": _positive}
MANIFEST = {
    "classes": [str],
    "catalog": {
        "name": re.compile(r"catalog-[0-9a-f]+\.arrow"),
        "sha256": DIGEST,
        "tries": int,
    },
    "shards": [
        {"name": NAME, "files": _positive, "faults": int, "kinds": {str: int}, "bytes": int}
        | {"sha256": DIGEST}
    ],
    "golden?": [GOLDEN],  # absent in what version 0.1.0 wrote
}


def must_be_intact(path: Path, digest: str) -> None:
    """DataError if a file of a store is missing or its bytes are not those of this sha256."""
    fileio.must_hash_to(path, digest, witness="the manifest", repair=EXTRACT_AGAIN)


def read_sealed(path: Path) -> dict[str, Any]:
    """A sealed JSON file of a store."""
    return fileio.read_sealed(
        path,
        FORMAT,
        upgrade="extract again into a new store",
        repair=REPAIR,
    )
