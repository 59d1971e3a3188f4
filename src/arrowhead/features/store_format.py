"""The JSON files of a feature store: their schemas, and errors for damaged files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from arrowhead import fileio

FORMAT = 2
REPAIR = (
    "restore the file from a copy, or delete it and run the same precompute again: images whose"
    " features exist are not decoded again."
)
EXTRACT_AGAIN = (
    "delete the file and run the same precompute again: only its images are decoded again."
)

RESTORE_CORRECTIONS = (
    "restore the file from a copy. Without one, delete it and manifest.json and run the same"
    " precompute again: the store then has the corrections that an older corrections-*.arrow in it"
    " holds."
)


def _positive(value: Any) -> bool:
    return type(value) is int and value > 0


def _three_numbers(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 3
        and {type(item) for item in value} <= {int, float}
    )


SHA256 = re.compile("[0-9a-f]{64}")
SHARD_NAME = re.compile("[0-9a-z]+")  # without / and dots, so a name cannot leave the folder
RECIPE_SCHEMA = {
    **dict.fromkeys(("body", "weights", "pool", "resize", "interpolation", "augment"), str),
    **dict.fromkeys(("dtype", "decoder"), str),
    **dict.fromkeys(("width", "size", "views"), _positive),
    **dict.fromkeys(("format", "augment_seed"), int),
    **dict.fromkeys(("mean", "std"), _three_numbers),
    "antialias": bool,
    "crop_pct?": float,  # absent: 7/8
    "body_precision?": re.compile("bf16|fp16"),  # absent: fp32
}
CORRECTIONS_NAME = re.compile(r"corrections-([0-9a-f]{16})\.arrow")  # the start of its sha256
IMAGE_ID = re.compile("[0-9a-f]{32}")
STORE_SCHEMA = {
    "recipe": dict,
    "chunk_size": _positive,
    "weights?": {"source": str, "license": str},  # absent in older stores
}
MANIFEST_SCHEMA = {
    "classes": [str],
    "catalog": {
        "name": re.compile(r"catalog-[0-9a-f]+\.arrow"),
        "sha256": SHA256,
        "tries": int,
    },
    "shards": [
        {"name": SHARD_NAME, "files": _positive, "faults": int, "kinds": {str: int}, "bytes": int}
        | {"sha256": SHA256}
    ],
    "golden?": [IMAGE_ID],  # absent in what version 0.1.0 wrote
    "corrections?": {"name": CORRECTIONS_NAME, "sha256": SHA256},
}


def suggest_store(path: Path) -> str:
    """What to do about a folder that is not a store."""
    is_bundle = (path / "bundle.json").is_file()
    store = (path.parent if is_bundle else path) / "store"  # beside the bundle, in the OUT of fit
    if (store / "store.json").is_file():
        return f"give {store}."
    if is_bundle:
        return f"{path} is a bundle: give the store that it was trained on."
    return f"run `arrowhead precompute DATA {path}` first."


def check_sha256(path: Path, digest: str) -> None:
    """Raise DataError if a file of a store is missing or its sha256 is not `digest`."""
    fileio.check_sha256(path, digest, recorded_in="the manifest", repair=EXTRACT_AGAIN)


def read_sealed(path: Path) -> dict[str, Any]:
    """Read a sealed JSON file of a store."""
    return fileio.read_sealed(
        path,
        FORMAT,
        upgrade="extract again into a new store",
        repair=REPAIR,
    )
