"""Reads and writes shards: the features of one chunk of images as an Arrow file."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead import arrow_io
from arrowhead.errors import DataError
from arrowhead.features.recipe import Recipe
from arrowhead.features.store_format import EXTRACT_AGAIN

PIXEL_DTYPE = "uint8"
"""The `dtype` of a recipe whose features are pixels; its shards also hold the images' sizes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRows:
    """The features of one chunk: R images with V views each, in catalog order.

    Attributes:
        paths: R, relative to the catalog's root.
        image_ids: R hashes of 16 bytes of the files' contents.
        features: float16 (R, V, D), or uint8 if they are pixels; zeros for an image with a fault.
        faults: R; None for an image without a fault.
        sizes: int32 (R, 2), height and width of the upright images; only written beside pixels.
    """

    paths: Sequence[str]
    image_ids: Sequence[bytes]
    features: NDArray[Any]
    faults: Sequence[str | None]
    sizes: NDArray[np.int32] | None = None


def write_shard(path: Path, rows: ShardRows, recipe: Recipe) -> None:
    """Write one Arrow IPC file with a row per image and view, complete or not at all.

    `feature` is null for an image with a fault. The recipe and a hash of the content are in the
    metadata.
    """
    import pyarrow as pa

    images, views, width = rows.features.shape
    faults = [fault for fault in rows.faults for _ in range(views)]
    has_fault = pa.array([fault is not None for fault in faults], pa.bool_())
    columns = {
        "path": pa.array([path for path in rows.paths for _ in range(views)], pa.string()),
        "image_id": pa.array([i for i in rows.image_ids for _ in range(views)], pa.binary(16)),
        "view": pa.array(np.tile(np.arange(views, dtype=np.uint8), images)),
        "feature": pa.FixedSizeListArray.from_arrays(
            pa.array(rows.features.reshape(-1)), width, mask=has_fault
        ),
        "fault": pa.array(faults, pa.string()),
    }
    if recipe.dtype == PIXEL_DTYPE:
        assert rows.sizes is not None
        size = pa.array(rows.sizes.repeat(views, axis=0).reshape(-1), pa.int32())
        columns["size"] = pa.FixedSizeListArray.from_arrays(size, 2)
    table = pa.table(columns)
    metadata = {
        "arrowhead.recipe": recipe.to_json(),
        "arrowhead.digest": _content_hash(rows, recipe),
    }
    arrow_io.write_arrow(path, table.replace_schema_metadata(metadata))


def _content_hash(rows: ShardRows, recipe: Recipe) -> str:
    """Hash of a shard's content, by which a shard can be checked that is in no manifest yet."""
    digest = hashlib.blake2b(recipe.to_json().encode(), digest_size=16)
    digest.update(json.dumps([list(rows.paths), list(rows.faults)]).encode())
    digest.update(b"".join(rows.image_ids))
    if recipe.dtype == PIXEL_DTYPE and rows.sizes is not None:
        digest.update(rows.sizes.astype("<i4").tobytes())
    for feature, fault in zip(rows.features, rows.faults, strict=True):
        if fault is None:
            digest.update(feature.tobytes())
    return digest.hexdigest()


def read_shard(path: Path, recipe: Recipe, *, check: bool = False) -> ShardRows:
    """Read a shard; the features are a view of the memory-mapped file, without a copy.

    Args:
        path: the shard.
        recipe: the recipe it must have been made with.
        check: also compare the content with the hash in its metadata.

    Raises:
        ConfigError: the shard was made with another recipe.
        DataError: it cannot be read, or its content has changed.
    """
    table = shard_table(path, recipe)
    views = recipe.views
    rows = ShardRows(
        paths=table["path"].to_pylist()[::views],
        image_ids=table["image_id"].to_pylist()[::views],
        features=feature_column(table, recipe),
        faults=table["fault"].to_pylist()[::views],
        sizes=size_column(table, recipe) if recipe.dtype == PIXEL_DTYPE else None,
    )
    stored_hash = table.schema.metadata.get(b"arrowhead.digest", b"").decode()
    if check and stored_hash != _content_hash(rows, recipe):
        raise DataError(
            f"{path} differs from the digest inside it: its bytes have changed since they were"
            " written.",
            "the bytes that Arrowhead wrote.",
            EXTRACT_AGAIN,
        )
    return rows


def shard_table(path: Path, recipe: Recipe) -> Any:
    """The memory-mapped pyarrow table of a shard, its recipe and columns checked."""
    import pyarrow as pa

    table = arrow_io.read_arrow(path)
    shard_recipe = Recipe.from_dict(_stored_recipe(table), str(path))
    shard_recipe.require_equal(recipe, str(path), "the store")
    pixels = recipe.dtype == PIXEL_DTYPE
    expected = {
        "path": pa.string(),
        "image_id": pa.binary(16),
        "view": pa.uint8(),
        "feature": pa.list_(pa.uint8() if pixels else pa.float16(), recipe.width),
        "fault": pa.string(),
    } | ({"size": pa.list_(pa.int32(), 2)} if pixels else {})
    if list(zip(table.column_names, table.schema.types, strict=True)) != [*expected.items()]:
        columns = ", ".join(f"{field.name} {field.type}" for field in table.schema)
        raise DataError(
            f"{path} has the columns {columns}.",
            f"{', '.join(expected)}, with the types that Arrowhead writes.",
            "delete the file and run precompute again: only its images are decoded again.",
        )
    return table


def _stored_recipe(table: Any) -> dict[str, Any]:
    try:
        fields = json.loads((table.schema.metadata or {}).get(b"arrowhead.recipe", b"{}"))
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def feature_column(table: Any, recipe: Recipe) -> NDArray[Any]:
    """The features, (R, V, D) of the recipe's dtype, as a view of the memory map; zero where there
    is a fault.
    """
    flat = arrow_io.single_array(table["feature"]).values.to_numpy(zero_copy_only=True)
    feature: NDArray[Any] = flat.reshape(-1, recipe.views, recipe.width)
    return feature


def size_column(table: Any, recipe: Recipe) -> NDArray[np.int32]:
    """Height and width of the upright images beside pixels, int32 (R, 2)."""
    flat = arrow_io.single_array(table["size"]).values.to_numpy(zero_copy_only=True)
    size: NDArray[np.int32] = flat.reshape(-1, recipe.views, 2)[:, 0]
    return size


def id_column(table: Any) -> NDArray[np.uint64]:
    """The first 8 bytes of every image id as a big-endian number, uint64 (rows of the table,)."""
    return whole_id_column(table)[:, 0]


def whole_id_column(table: Any) -> NDArray[np.uint64]:
    """Every image id as two big-endian numbers, uint64 (rows of the table, 2)."""
    ids = arrow_io.single_array(table["image_id"])
    halves = np.frombuffer(ids.buffers()[1], ">u8").reshape(-1, 2)
    return halves[ids.offset : ids.offset + len(ids)].astype(np.uint64)


def check_content(paths: Sequence[Path]) -> None:
    """Raise DataError for the first shard whose content differs from the hash in its metadata.

    This runs in a subprocess, because a flipped bit can crash Arrow. It is needed only for shards
    whose sha256 is recorded nowhere: those that older versions left when they were stopped.
    """
    if not paths:
        return
    code = (
        "import os, sys; from pathlib import Path; from arrowhead import arrow_io; "
        "from arrowhead.features.recipe import Recipe; "
        "from arrowhead.features import shard_file\n"
        "for name in sys.stdin.buffer.read().split(bytes(1)):\n"
        "    path = Path(os.fsdecode(name))\n"
        "    fields = shard_file._stored_recipe(arrow_io.read_arrow(path))\n"
        "    recipe = Recipe.from_dict(fields, str(path))\n"
        "    shard_file.read_shard(path, recipe, check=True)\n"
        "    print(flush=True)\n"
    )
    process = subprocess.run(  # noqa: S603 - runs this Python
        [sys.executable, "-P", "-c", code],
        input=bytes(1).join(map(os.fsencode, paths)),
        capture_output=True,
        check=False,
    )
    if process.returncode:
        bad = paths[len(process.stdout.splitlines())]  # one line of output per intact shard
        raise DataError(
            f"{bad} has changed since it was written: reading it exits with {process.returncode}.",
            "the bytes that Arrowhead wrote.",
            EXTRACT_AGAIN,
        )
