"""Score files: one Parquet part per chunk of inputs, and the journal that vouches for each.

    OUT/
      parts/part-NNNNNN.parquet  the scores, and nothing else: Parquet readers take the folder
      journal/*.jsonl            a sealed line per finished part: rows, bytes, sha256; one file per
                                 worker
      inputs.arrow               the catalog of the inputs, in their order
      request.json               what the scores are of; sealed
      score.json                 counts, seconds, every part with its sha256; sealed, written last

A part's bytes are compared with its sha256 before Parquet parses them: damaged Parquet can give
other rows without an error, or end the process.
"""

from __future__ import annotations

import base64
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

FORMAT = 2  # of request.json and score.json; 1 had its parts beside score.json, without hashes
HERE = re.compile(r"part-\d{6,}\.parquet")  # names of parts: no way out of their folder


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


REQUEST = {
    "runs": [lambda ends: isinstance(ends, list) and len(ends) == 2 and all(map(_count, ends))]
}
SCORE = {
    "counts": {"inputs": _count},
    "classes": [str],
    "inputs_sha256": store_format.DIGEST,
    "csv_sha256?": (store_format.DIGEST, None),
    "parts": [{"name": HERE, "rows": _count, "bytes": _count, "sha256": store_format.DIGEST}],
}
PART = {
    "number": _count,
    "rows": _count,
    "bytes": _count,
    "sha256": store_format.DIGEST,
    "inputs": str,
}
PART |= {"faults": {str: int}, "seal": str}


# ------------------------------------------------------------------------------- rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """The scores of one chunk: N files, C classes.

    classes: C names; paths: N; image_ids: N of 16 bytes; faults: N, None when the image is well;
    top: int64 (N, K), the best classes, best first; probability: float32 (N, C). The rest is not
    written where it is None. given: bool (N, C), the labels an image is given; novelty: float32
    (N,); novel: bool (N,); feature: float16 (N, D). every: write all of `probability`.
    """

    classes: Sequence[str]
    paths: Sequence[str]
    image_ids: Sequence[bytes]
    faults: Sequence[str | None]
    top: NDArray[np.int64]
    probability: NDArray[np.float32]
    every: bool = False
    given: NDArray[np.bool_] | None = None
    novelty: NDArray[np.float32] | None = None
    novel: NDArray[np.bool_] | None = None
    feature: NDArray[np.float16] | None = None


def write_scores(path: Path, scores: Scores, metadata: Mapping[str, str]) -> None:
    """One Parquet file (zstd, page checksums), whole or absent; at a fault all but path and
    image_id are null.

    Columns: path, image_id, label and probability (the best ones), labels (list, with `given`),
    top_k (list of label and probability), probabilities (a struct with a float32 for every class,
    with `every`), novelty, novel, feature (list of float32), fault. The class names are in the
    metadata, too: arrowhead.classes, a JSON list.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    well_N = np.array([fault is None for fault in scores.faults], bool)
    count, classes = len(well_N), pa.array(scores.classes, pa.string())

    def plain(value_N: NDArray[Any], kind: Any) -> Any:
        return pa.array(value_N, kind, mask=~well_N)

    def lists(value: Any, length_N: NDArray[np.int64]) -> Any:
        """Lists of these lengths, 0 at a fault, filled from the flat `value`."""
        ends = np.concatenate([[0], np.cumsum(length_N)]).astype(np.int32)
        return pa.ListArray.from_arrays(ends, value, mask=pa.array(~well_N))

    best_NK = np.take_along_axis(scores.probability, scores.top, 1)
    pairs = [
        classes.take(pa.array(scores.top[well_N].ravel())),
        pa.array(best_NK[well_N].ravel(), pa.float32()),
    ]
    columns = {
        "path": pa.array(scores.paths, pa.string()),
        "image_id": pa.array(scores.image_ids, pa.binary(16)),
        "label": classes.take(plain(scores.top[:, 0], pa.int64())),
        "probability": plain(best_NK[:, 0], pa.float32()),
    }
    if scores.given is not None:
        given_NC = scores.given & well_N[:, None]
        names = classes.take(pa.array(np.nonzero(given_NC)[1]))
        columns["labels"] = lists(names, given_NC.sum(1))
    top_k = pa.StructArray.from_arrays(pairs, ["label", "probability"])
    columns["top_k"] = lists(top_k, well_N * scores.top.shape[1])
    if scores.every:
        by_class = [
            plain(np.ascontiguousarray(one_N), pa.float32()) for one_N in scores.probability.T
        ]
        columns["probabilities"] = pa.StructArray.from_arrays(
            by_class, list(scores.classes), mask=pa.array(~well_N)
        )
    if scores.novelty is not None:
        columns["novelty"] = plain(scores.novelty, pa.float32())
    if scores.novel is not None:
        columns["novel"] = plain(scores.novel, pa.bool_())
    if scores.feature is not None:
        flat = pa.array(scores.feature[well_N].astype(np.float32).ravel())
        columns["feature"] = lists(flat, well_N * scores.feature.shape[1])
    columns["fault"] = pa.array(scores.faults, pa.string())
    assert all(len(column) == count for column in columns.values())
    notes = {"arrowhead.classes": json.dumps(list(scores.classes))} | dict(metadata)
    table = pa.table(columns).replace_schema_metadata(notes)
    # Dictionaries for what repeats only: among probabilities and features nothing does.
    repeated = ["label", "labels.list.element", "top_k.list.element.label", "fault"]
    with fileio.draft(path) as draft:
        pq.write_table(
            table, draft, compression="zstd", use_dictionary=repeated, write_page_checksum=True
        )


def read_parquet(
    path: Path, columns: Sequence[str], digest: str | None = None
) -> dict[str, list[Any]]:
    """Some columns of a part as lists (see `read_table`), structs as dicts by name."""
    return dict(read_table(path, columns, digest).to_pydict())


def probabilities(table: Any, classes: Sequence[str]) -> NDArray[np.float32]:
    """The column `probabilities` of a table as float32 (N, C); NaN at a fault."""
    column = table["probabilities"].combine_chunks()
    parts = [column.field(name).to_numpy(zero_copy_only=False) for name in classes]
    prob_NC: NDArray[np.float32] = np.stack(parts, 1).astype(np.float32, copy=False)
    prob_NC[column.is_null().to_numpy(zero_copy_only=False)] = np.nan
    return prob_NC


def read_table(path: Path, columns: Sequence[str], digest: str | None = None) -> Any:
    """Some columns of a part as a pyarrow table.

    digest: the sha256 its bytes must have; compared before they are parsed. Raises DataError where
    they have not, or are no Parquet.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        content = path.read_bytes()
        if digest is not None and hashlib.sha256(content).hexdigest() != digest:
            raise _changed(path)
        source = pa.BufferReader(content)
        schema = (pq.read_metadata(source).metadata or {}).get(b"ARROW:schema", b"")
        arrow_io.must_be_plain(path, base64.b64decode(schema))
        source.seek(0)
        return pq.read_table(source, columns=list(columns), page_checksum_verification=True)
    except (OSError, ValueError, KeyError, pa.ArrowInvalid) as error:
        raise DataError(
            f"{path} cannot be read: {error}.",
            "a Parquet file written by `arrowhead score`.",
            "delete the file and run the same score command again.",
        ) from error


def _changed(path: Path) -> DataError:
    return DataError(
        f"{path} has changed since it was written: its sha256 differs.",
        "the bytes that Arrowhead wrote.",
        "run the same score command again: that part alone is scored again.",
    )


# ------------------------------------------------------------------------------- journal


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A finished part: its number, rows and bytes, the sha256 of its bytes.

    inputs: a hash of the files it is of (`chunks.chunk_name`), so that a part of files that were
    replaced meanwhile is known to be out of date. faults: their number by kind.
    """

    number: int
    rows: int
    bytes: int
    sha256: str
    inputs: str
    faults: dict[str, int]

    @property
    def name(self) -> str:
        """The file's name; names sort in input order."""
        return part_name(self.number)

    def is_at(self, folder: Path) -> bool:
        """Whether the file in `folder` (OUT/parts) is there with these bytes."""
        path = folder / self.name
        return (
            path.is_file()
            and path.stat().st_size == self.bytes
            and fileio.sha256(path) == self.sha256
        )


def part_name(number: int) -> str:
    """The file's name of a part; names sort in input order."""
    return f"part-{number:06d}.parquet"


def finished(path: Path, number: int, rows: int, inputs: str, faults: dict[str, int]) -> Part:
    """The part that was just written to `path`."""
    size, digest = path.stat().st_size, fileio.sha256(path)
    return Part(number=number, rows=rows, bytes=size, sha256=digest, inputs=inputs, faults=faults)


class Journal:
    """A worker's own file of finished parts, one line each, in a folder that all workers share.

    A line holds a hash of itself: a torn or damaged one is passed over, and its part made again.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / f"{secrets.token_hex(8)}.jsonl"

    def write(self, part: Part) -> None:
        """Append a line, on the disk before this returns."""
        line = _line(part)
        with self._path.open("a") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def read_journal(folder: Path) -> dict[int, list[Part]]:
    """By number, what the journals of all workers say; several where a part was written again."""
    found: dict[int, list[Part]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_bytes().splitlines():
            if part := _parsed(line):
                found.setdefault(part.number, []).append(part)
    return found


def replace_journal(folder: Path, parts: Sequence[Part]) -> None:
    """Put one journal of these parts in the place of all that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    old = list(folder.glob("*.jsonl"))
    if parts:
        with fileio.draft(folder / f"{secrets.token_hex(8)}.jsonl") as draft:
            draft.write_text("".join(map(_line, parts)))
    for path in old:
        path.unlink(missing_ok=True)


def _line(part: Part) -> str:
    content = asdict(part)
    return json.dumps(content | {"seal": _seal(content)}, sort_keys=True) + "\n"


def _parsed(line: bytes) -> Part | None:
    try:
        content = json.loads(line)
        fileio.must_fit(content, PART, "the line", "")
    except (ValueError, RecursionError, DataError):
        return None
    seal = content.pop("seal")
    return Part(**content) if seal == _seal(content) and len(content) == len(PART) - 1 else None


def _seal(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
