"""A shard: the rows of one chunk as an Arrow file."""

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

COLUMNS = ("path", "image_id", "view", "feature", "fault")  # of a shard


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """The rows of one chunk: R files x V views, in catalog order, views of a file together.

    paths: R; image_ids: R of 16 bytes; features: float16 (R, V, D), zero where faulty;
    faults: R, None when the image is well.
    """

    paths: Sequence[str]
    image_ids: Sequence[bytes]
    features: NDArray[np.float16]
    faults: Sequence[str | None]


def write_shard(path: Path, rows: Rows, recipe: Recipe) -> None:
    """One Arrow IPC file; columns path, image_id, view, feature, fault."""
    import pyarrow as pa

    files, views, width = rows.features.shape
    faults = [fault for fault in rows.faults for _ in range(views)]
    absent = pa.array([fault is not None for fault in faults], pa.bool_())
    table = pa.table(
        {
            "path": pa.array([path for path in rows.paths for _ in range(views)], pa.string()),
            "image_id": pa.array([i for i in rows.image_ids for _ in range(views)], pa.binary(16)),
            "view": pa.array(np.tile(np.arange(views, dtype=np.uint8), files)),
            "feature": pa.FixedSizeListArray.from_arrays(
                pa.array(rows.features.reshape(-1)), width, mask=absent
            ),
            "fault": pa.array(faults, pa.string()),
        }
    )
    notes = {"arrowhead.recipe": recipe.json(), "arrowhead.digest": _digest(rows, recipe)}
    arrow_io.write_arrow(path, table.replace_schema_metadata(notes))


def _digest(rows: Rows, recipe: Recipe) -> str:
    """Hash of a shard's content: vouches for a shard that no manifest names yet."""
    total = hashlib.blake2b(recipe.json().encode(), digest_size=16)
    total.update(json.dumps([list(rows.paths), list(rows.faults)]).encode())
    total.update(b"".join(rows.image_ids))
    for row, fault in zip(rows.features, rows.faults, strict=True):
        if fault is None:
            total.update(row.tobytes())
    return total.hexdigest()


def read_shard(path: Path, recipe: Recipe, *, check: bool = False) -> Rows:
    """The rows of a shard; its features are a view of the memory map, nothing is copied.

    check: compare the content with the digest inside. DataError if they differ.
    """
    table = shard_table(path, recipe)
    views = recipe.views
    rows = Rows(
        paths=table["path"].to_pylist()[::views],
        image_ids=table["image_id"].to_pylist()[::views],
        features=feature_column(table, recipe),
        faults=table["fault"].to_pylist()[::views],
    )
    digest = table.schema.metadata.get(b"arrowhead.digest", b"").decode()
    if check and digest != _digest(rows, recipe):
        raise DataError(
            f"{path} differs from the digest inside it: its bytes have changed since they were"
            " written.",
            "the bytes that Arrowhead wrote.",
            EXTRACT_AGAIN,
        )
    return rows


def shard_table(path: Path, recipe: Recipe) -> Any:
    """The memory-mapped pyarrow table of a shard made by this recipe."""
    import pyarrow as pa

    table = arrow_io.read_arrow(path)
    made = Recipe.from_dict(_recipe_note(table), str(path))
    made.must_equal(recipe, str(path), "the store")
    kinds = [
        pa.string(),
        pa.binary(16),
        pa.uint8(),
        pa.list_(pa.float16(), made.width),
        pa.string(),
    ]
    if (tuple(table.column_names), table.schema.types) != (COLUMNS, kinds):
        found = ", ".join(f"{one.name} {one.type}" for one in table.schema)
        raise DataError(
            f"{path} has the columns {found}.",
            f"{', '.join(COLUMNS)}, of the types that precompute writes.",
            "delete the file and run precompute again: only its images are decoded again.",
        )
    return table


def _recipe_note(table: Any) -> dict[str, Any]:
    try:
        fields = json.loads((table.schema.metadata or {}).get(b"arrowhead.recipe", b"{}"))
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def feature_column(table: Any, recipe: Recipe) -> NDArray[np.float16]:
    """float16 (R, V, D): a view of the memory map, zero where faulty."""
    flat = arrow_io.whole(table["feature"]).values.to_numpy(zero_copy_only=True)
    feature: NDArray[np.float16] = flat.reshape(-1, recipe.views, recipe.width)
    return feature


def id_column(table: Any) -> NDArray[np.uint64]:
    """uint64 (rows of the shard,): the first 8 bytes of every image id, big endian."""
    ids = arrow_io.whole(table["image_id"])
    words = np.frombuffer(ids.buffers()[1], ">u8").reshape(-1, 2)
    return words[ids.offset : ids.offset + len(ids), 0].astype(np.uint64)


def examine(paths: Sequence[Path]) -> None:
    """DataError for the first shard whose content is not what its digest inside was made of.

    In a process of its own, since Arrow can end one over a flipped bit. Shards that older versions
    left when they were stopped are the only ones that nothing else vouches for.
    """
    if not paths:
        return
    code = (
        "import os, sys; from pathlib import Path; from arrowhead import arrow_io; "
        "from arrowhead.features.recipe import Recipe; "
        "from arrowhead.features import shard_file\n"
        "for name in sys.stdin.buffer.read().split(bytes(1)):\n"
        "    path = Path(os.fsdecode(name))\n"
        "    made = shard_file._recipe_note(arrow_io.read_arrow(path))\n"
        "    recipe = Recipe.from_dict(made, str(path))\n"
        "    shard_file.read_shard(path, recipe, check=True)\n"
        "    print(flush=True)\n"
    )
    ended = subprocess.run(  # noqa: S603 - ourselves
        [sys.executable, "-P", "-c", code],
        input=bytes(1).join(map(os.fsencode, paths)),
        capture_output=True,
        check=False,
    )
    if ended.returncode:
        bad = paths[len(ended.stdout.splitlines())]
        raise DataError(
            f"{bad} has changed since it was written: reading it ends with {ended.returncode}.",
            "the bytes that Arrowhead wrote.",
            EXTRACT_AGAIN,
        )
