"""Reads and writes score files: one Parquet part per chunk, and the journal of finished parts.

    OUT/
      parts/part-NNNNNN.parquet  the scores; nothing else is in this folder, so Parquet readers can
                                 open it as it is
      journal/*.jsonl            a line for each finished part: rows, bytes, sha256; one file per
                                 worker
      inputs.arrow               the catalog of the inputs, in their order
      request.json               what was asked for; sealed
      score.json                 counts, seconds, every part with its sha256; sealed, written last

The sha256 of a part is compared before Parquet parses it: Parquet can read damaged files without an
error but with wrong rows, or crash.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead import arrow_io, fileio
from arrowhead.errors import DataError
from arrowhead.features import store_format

FORMAT = 2  # of request.json and score.json; in 1 the parts were beside score.json, without hashes
PART_NAME = re.compile(r"part-\d{6,}\.parquet")  # without /, so a name cannot leave the folder


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


REQUEST_SCHEMA = {
    "runs": [lambda ends: isinstance(ends, list) and len(ends) == 2 and all(map(_count, ends))]
}
SCORE_SCHEMA = {
    "counts": {"inputs": _count},
    "classes": [str],
    "inputs_sha256": store_format.SHA256,
    "csv_sha256?": (store_format.SHA256, None),
    "parts": [{"name": PART_NAME, "rows": _count, "bytes": _count, "sha256": store_format.SHA256}],
}
PART_SCHEMA = {
    "number": _count,
    "rows": _count,
    "bytes": _count,
    "sha256": store_format.SHA256,
    "inputs": str,
    "faults": {str: int},
    "seal": str,
}


# ------------------------------------------------------------------------------- rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """The scores of one chunk: N images, C classes, K labels listed per image.

    Attributes:
        classes: C names.
        paths: N.
        image_ids: N hashes of 16 bytes.
        faults: N; None for an image without a fault.
        top_index: int64 (N, K), the most probable classes in descending order.
        probability: float32 (N, C).
        all_probabilities: Whether to write the probability of every class.
        labels: bool (N, C), the labels of each image where it may have several. This and the
            following are not written if they are None.
        novelty: float32 (N,), distances from the training images.
        novel: bool (N,), whether they exceed the threshold.
        feature: float16 (N, D).
    """

    classes: Sequence[str]
    paths: Sequence[str]
    image_ids: Sequence[bytes]
    faults: Sequence[str | None]
    top_index: NDArray[np.int64]
    probability: NDArray[np.float32]
    all_probabilities: bool = False
    labels: NDArray[np.bool_] | None = None
    novelty: NDArray[np.float32] | None = None
    novel: NDArray[np.bool_] | None = None
    feature: NDArray[np.float16] | None = None


def write_scores(path: Path, scores: Scores, metadata: Mapping[str, str]) -> None:
    """Write one Parquet file (zstd, page checksums), complete or not at all.

    Columns: path, image_id, label and probability (of the most probable class), labels (list),
    top_k (list of label and probability), probabilities (a struct with a float32 for each class),
    novelty, novel, feature (list of float32), fault. Where there is a fault, all but path and
    image_id are null. The metadata also has the class names: arrowhead.classes, a JSON list.
    """
    import pyarrow.parquet as pq

    metadata = {"arrowhead.classes": json.dumps(list(scores.classes))} | dict(metadata)
    table = _score_table(scores).replace_schema_metadata(metadata)
    # Dictionary encoding only where values repeat, unlike probabilities and features.
    repeated = ["label", "labels.list.element", "top_k.list.element.label", "fault"]
    with fileio.atomic_write(path) as draft:
        pq.write_table(
            table, draft, compression="zstd", use_dictionary=repeated, write_page_checksum=True
        )


def _score_table(scores: Scores) -> Any:
    """The pyarrow table of a part, without metadata."""
    import pyarrow as pa

    ok_N = np.array([fault is None for fault in scores.faults], bool)
    classes = pa.array(scores.classes, pa.string())
    top_prob_NK = np.take_along_axis(scores.probability, scores.top_index, 1)
    columns = {
        "path": pa.array(scores.paths, pa.string()),
        "image_id": pa.array(scores.image_ids, pa.binary(16)),
        "label": classes.take(pa.array(scores.top_index[:, 0], pa.int64(), mask=~ok_N)),
        "probability": pa.array(top_prob_NK[:, 0], pa.float32(), mask=~ok_N),
    }
    if scores.labels is not None:
        label_NC = scores.labels & ok_N[:, None]
        names = classes.take(pa.array(np.nonzero(label_NC)[1]))
        columns["labels"] = _list_column(names, label_NC.sum(1), ok_N)
    top_k = pa.StructArray.from_arrays(
        [
            classes.take(pa.array(scores.top_index[ok_N].ravel())),
            pa.array(top_prob_NK[ok_N].ravel(), pa.float32()),
        ],
        ["label", "probability"],
    )
    columns["top_k"] = _list_column(top_k, ok_N * scores.top_index.shape[1], ok_N)
    if scores.all_probabilities:
        by_class = [
            pa.array(np.ascontiguousarray(prob_N), pa.float32(), mask=~ok_N)
            for prob_N in scores.probability.T
        ]
        columns["probabilities"] = pa.StructArray.from_arrays(
            by_class, list(scores.classes), mask=pa.array(~ok_N)
        )
    if scores.novelty is not None:
        columns["novelty"] = pa.array(scores.novelty, pa.float32(), mask=~ok_N)
    if scores.novel is not None:
        columns["novel"] = pa.array(scores.novel, pa.bool_(), mask=~ok_N)
    if scores.feature is not None:
        values = pa.array(scores.feature[ok_N].astype(np.float32).ravel())
        columns["feature"] = _list_column(values, ok_N * scores.feature.shape[1], ok_N)
    columns["fault"] = pa.array(scores.faults, pa.string())
    return pa.table(columns)


def _list_column(values: Any, length_N: NDArray[np.int64], ok_N: NDArray[np.bool_]) -> Any:
    """An Arrow list for each image, null at a fault; `values` holds all of them one after another.

    length_N: of each list, 0 at a fault.
    """
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum(length_N)]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, values, mask=pa.array(~ok_N))


def read_columns(
    path: Path, columns: Sequence[str], digest: str | None = None
) -> dict[str, list[Any]]:
    """Read some columns of a part as lists (see `read_table`), structs as dicts by name."""
    return dict(read_table(path, columns, digest).to_pydict())


def probabilities(table: Any, classes: Sequence[str]) -> NDArray[np.float32]:
    """The column `probabilities` of a part's table as float32 (N, C); NaN at a fault."""
    column = table["probabilities"].combine_chunks()
    by_class = [column.field(name).to_numpy(zero_copy_only=False) for name in classes]
    prob_NC: NDArray[np.float32] = np.stack(by_class, 1).astype(np.float32, copy=False)
    prob_NC[column.is_null().to_numpy(zero_copy_only=False)] = np.nan
    return prob_NC


def read_table(path: Path, columns: Sequence[str], digest: str | None = None) -> Any:
    """Read some columns of a part as a pyarrow table.

    Args:
        path: the part.
        columns: their names.
        digest: the sha256 that the file must have, compared before it is parsed.

    Raises:
        DataError: the file has another sha256, or is not a Parquet file of Arrowhead.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        content = path.read_bytes()
        if digest is not None and hashlib.sha256(content).hexdigest() != digest:
            raise _changed_part_error(path)
        source = pa.BufferReader(content)
        arrow_io.refuse_parquet_extension_types(path, source)
        return pq.read_table(source, columns=list(columns), page_checksum_verification=True)
    except (OSError, ValueError, KeyError, pa.ArrowInvalid) as error:
        raise DataError(
            f"{path} cannot be read: {error}.",
            "a Parquet file written by `arrowhead score`.",
            "delete the file and run the same score command again.",
        ) from error


def _changed_part_error(path: Path) -> DataError:
    return DataError(
        f"{path} has changed since it was written: its sha256 differs.",
        "the bytes that Arrowhead wrote.",
        "run the same score command again: only that part is scored again.",
    )


# ------------------------------------------------------------------------------- journal


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A finished part, as the journal records it.

    Attributes:
        number: Its position among the parts.
        rows: One per image.
        bytes: The size of the file.
        sha256: Of the file.
        inputs: A hash of its images' paths, sizes and stamps (`layout.hash_inputs`). It shows that
            a part is out of date if images were replaced.
        faults: Their number by kind.
    """

    number: int
    rows: int
    bytes: int
    sha256: str
    inputs: str
    faults: dict[str, int]

    @property
    def name(self) -> str:
        """The name of the part's file."""
        return part_name(self.number)

    def is_intact(self, folder: Path) -> bool:
        """Whether the file exists in `folder` (OUT/parts) with this size and sha256."""
        path = folder / self.name
        return (
            path.is_file()
            and path.stat().st_size == self.bytes
            and fileio.sha256(path) == self.sha256
        )


def part_name(number: int) -> str:
    """The name of a part's file; names sort in the order of the inputs."""
    return f"part-{number:06d}.parquet"


def describe_part(path: Path, number: int, rows: int, inputs: str, faults: dict[str, int]) -> Part:
    """The journal's record of a part that was just written to `path`."""
    size, digest = path.stat().st_size, fileio.sha256(path)
    return Part(number=number, rows=rows, bytes=size, sha256=digest, inputs=inputs, faults=faults)


class Journal:
    """One worker's file of finished parts, in a folder that all workers share.

    Each line contains a hash of itself. A damaged line is ignored, and its part is scored again.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"{secrets.token_hex(8)}.jsonl"

    def append(self, part: Part) -> None:
        """Append a line and flush it to the disk."""
        line = _format_line(part)
        with self.path.open("a") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def read_journal(folder: Path) -> dict[int, list[Part]]:
    """Read the journals of all workers: by number, the records of each part.

    A part has several records if it was written more than once.
    """
    records: dict[int, list[Part]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_bytes().splitlines():
            if part := _parse_line(line):
                records.setdefault(part.number, []).append(part)
    return records


def replace_journal(folder: Path, parts: Sequence[Part]) -> None:
    """Replace all journals by one with these parts."""
    folder.mkdir(parents=True, exist_ok=True)
    old = list(folder.glob("*.jsonl"))
    if parts:
        with fileio.atomic_write(folder / f"{secrets.token_hex(8)}.jsonl") as draft:
            draft.write_text("".join(map(_format_line, parts)))
    for path in old:
        path.unlink(missing_ok=True)


def _format_line(part: Part) -> str:
    content = asdict(part)
    return json.dumps(content | {"seal": _seal(content)}, sort_keys=True) + "\n"


def _parse_line(line: bytes) -> Part | None:
    try:
        content = json.loads(line)
        fileio.check_schema(content, PART_SCHEMA, "the line", "")
    except (ValueError, RecursionError, DataError):
        return None
    seal = content.pop("seal")
    has_extra_keys = len(content) >= len(PART_SCHEMA)
    return None if has_extra_keys or seal != _seal(content) else Part(**content)


def _seal(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
