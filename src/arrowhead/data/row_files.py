"""Images in Parquet files and in Arrow files, such as Hugging Face `datasets` writes.

    image: struct<bytes: binary, path: string>      as `datasets` has it
    image: binary                                   or plain bytes

Neither needs `datasets`. A Parquet file is read row group by row group, some rows at a time; an
Arrow file is memory-mapped, or read batch by batch from an object store.
"""

from __future__ import annotations

import bisect
import io
import itertools
import json
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from arrowhead import arrow_io
from arrowhead.data import path_text, reading
from arrowhead.data.containers import (
    BlockReader,
    Container,
    ContainerError,
    kind_of,
    row_stamp,
    stat_container,
)

BUFFER_BYTES = 2**20  # of a column of a Parquet file
BATCH_BYTES, MAX_BATCH_ROWS = 8 * 2**20, 64  # of images that are taken from one at a time
CELL_ROWS = 2**16  # of other columns
MAX_IDLE_READERS = 8  # open files between two reads
MAX_CACHED_BATCHES = 4  # of an Arrow file; on a disk they take no memory of their own


class Column(NamedTuple):
    """A column of images in a container: root, escaped path and stamp of its rows, name."""

    root: str
    path: str
    stamp: int
    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RowFile:
    """What is known of a Parquet or Arrow file without reading its images.

    Attributes:
        rows: Number of rows.
        columns: Names of its columns.
        image_columns: Those that can hold images: binary, or a struct with a field `bytes`.
        path_columns: The fields of these structs that hold the names of the images, by column.
        class_names: Names of the classes by column, where `datasets` recorded them.
        damage: Why its end is missing, "" for a complete file.
    """

    rows: int
    columns: list[str]
    image_columns: list[str]
    path_columns: dict[str, str] = field(default_factory=dict)
    class_names: dict[str, list[str]] = field(default_factory=dict)
    damage: str = ""


# ------------------------------------------------------------------------------ describing


def describe(container: Container) -> RowFile:
    """What is in a file, from its footer or its headers.

    Raises:
        ContainerError: It cannot be read, or has changed.
        DataError: It has columns of an extension type.
    """
    with _opened(container) as reader:
        schema = reader.schema
        images = [one.name for one in schema if _is_image_type(one.type)]
        hugging_face = _features(schema)
        marked = [
            name
            for name in images
            if isinstance(hugging_face.get(name), dict)
            and hugging_face[name].get("_type") == "Image"
        ]
        return RowFile(
            rows=reader.rows,
            columns=schema.names,
            image_columns=marked or images,
            path_columns={
                name: f"{name}.path" for name in images if _has_path(schema.field(name).type)
            },
            class_names=_class_names(hugging_face),
            damage=reader.damage,
        )


def _is_image_type(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(one.name == "bytes" and _is_image_type(one.type) for one in kind)
    return bool(
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    )


def _has_path(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_struct(kind) and any(
        one.name == "path" and pa.types.is_string(one.type) for one in kind
    )


def _features(schema: Any) -> dict[str, Any]:
    """The types of the columns as `datasets` recorded them in a schema; {} if it did not."""
    try:
        content = json.loads((schema.metadata or {})[b"huggingface"])
        features = content["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _class_names(features: dict[str, Any]) -> dict[str, list[str]]:
    """The names of the classes by column, also of columns with lists of classes."""
    names = {}
    for column, feature in features.items():
        inner = feature
        if isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
            inner = feature["feature"]
        elif isinstance(feature, list) and len(feature) == 1:
            inner = feature[0]
        if isinstance(inner, dict) and inner.get("_type") == "ClassLabel":
            listed = inner.get("names")
            if isinstance(listed, list) and all(isinstance(name, str) for name in listed):
                names[column] = listed
    return names


def read_cells(container: Container, columns: list[str]) -> Iterator[dict[str, list[Any]]]:
    """Read columns that hold no images, some rows at a time, as Python values.

    columns: their names; "image.path" is the field of a struct.

    Raises:
        ContainerError: The file cannot be read, or has changed.
    """
    with _opened(container) as reader:
        try:
            yield from reader.cells(columns)
        except _arrow_errors() as error:
            raise ContainerError(f"corrupt: {_summary(error)}") from error


# -------------------------------------------------------------------------------- reading


def read_row(column: Column, row: int, max_bytes: int) -> tuple[bytes, str | None]:
    """Read the image of a row. Thread-safe.

    Rows are read fastest in their order by one thread: files stay open between two calls.

    Args:
        column: Where the images are, with their stamp as listed; another stamp is a fault.
        row: Number of the row in the file.
        max_bytes: A larger image is a fault.

    Returns:
        As `reading.read_file`.
    """
    try:
        reader = _READERS.take(column, row)
        try:
            reader.check()
            value = reader.image(column.name, row)
        except BaseException:
            reader.close()
            raise
        _READERS.give_back(column, reader)
    except ContainerError as error:
        return b"", str(error)
    except _arrow_errors() as error:
        return b"", f"corrupt: {_summary(error)}"
    if value is None:
        return b"", "empty: the row holds no image"
    if isinstance(value, str):
        return b"", "unreadable: the row holds the path of a file in place of the image"
    if len(value) > max_bytes:
        return b"", reading.too_large_fault(len(value), max_bytes)
    return value, None


def _arrow_errors() -> tuple[type[BaseException], ...]:
    import pyarrow as pa

    return (pa.ArrowException, OSError, KeyError, IndexError, ValueError)


def _summary(error: BaseException) -> str:
    text = " ".join(str(error).split())[:200].rstrip(".")
    return "".join(char if char.isprintable() else "?" for char in text)


def _opened(container: Container) -> _Reader:
    try:
        return _open(container.root, container.path, container.row_stamp)
    except _arrow_errors() as error:
        raise ContainerError(f"corrupt: {_summary(error)}") from error


def _open(root: str, path: str, stamp: int) -> _Reader:
    """Open a file whose rows have this stamp."""
    now = stat_container(root, path)
    if now.row_stamp != stamp:
        name = path.rpartition("/")[2]
        raise ContainerError(f"changed: {name} was written again after it was listed")
    kind = _ParquetReader if kind_of(path) == "parquet" else _ArrowReader
    return kind(now)


def _value(array: Any, index: int) -> bytes | str | None:
    """The image in a row of a column; the path if there is only that."""
    scalar = array[index]
    if not scalar.is_valid:
        return None
    if hasattr(scalar, "items"):  # a struct
        data = scalar["bytes"].as_py()
        path = scalar["path"].as_py() if data is None and "path" in scalar else None
        return path if data is None else bytes(data)
    return bytes(scalar.as_py())


class _Reader(ABC):
    """An open file.

    Attributes:
        schema: Its pyarrow schema.
        rows: Number of rows.
        damage: Why its end is missing.
    """

    schema: Any
    rows: int
    damage = ""

    def __init__(self, container: Container) -> None:
        self.container = container
        self.location = Path(os.fsdecode(path_text.unescape_path(container.location)))
        self.in_store = path_text.is_store_uri(container.root)

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def check(self) -> None:
        """Raise ContainerError if the file on the disk has changed (a store checks each read)."""
        if not self.in_store:
            status = os.stat(self.location)
            if row_stamp(status.st_size, status.st_mtime_ns) != self.container.row_stamp:
                name = self.container.path.rpartition("/")[2]
                raise ContainerError(f"changed: {name} was written again after it was listed")

    @abstractmethod
    def distance(self, row: int) -> float:
        """How many rows have to be read to reach a row."""

    @abstractmethod
    def image(self, column: str, row: int) -> bytes | str | None:
        """The image in a row."""

    @abstractmethod
    def cells(self, columns: list[str]) -> Iterator[dict[str, list[Any]]]:
        """Values of columns, some rows at a time."""

    @abstractmethod
    def close(self) -> None:
        """Close the file."""


class _ParquetReader(_Reader):
    """Reads a Parquet file forward, some rows of a row group at a time."""

    def __init__(self, container: Container) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        super().__init__(container)
        source = (
            pa.PythonFile(_StoreFile(container), mode="r")
            if self.in_store
            else pa.OSFile(os.fsencode(self.location))
        )
        self._source = source
        try:
            arrow_io.refuse_parquet_extension_types(self.location, source)
            metadata = pq.read_metadata(source)
            self._file = pq.ParquetFile(
                source, metadata=metadata, buffer_size=BUFFER_BYTES, pre_buffer=False
            )
            self.schema, self.rows = self._file.schema_arrow, metadata.num_rows
        except BaseException:
            source.close()
            raise
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._starts: list[int] = list(itertools.accumulate(sizes, initial=0))[:-1]
        self._batches: Iterator[Any] = iter(())
        self._group, self._first = -1, 0
        self._array: Any = None

    def _group_of(self, row: int) -> int:
        return bisect.bisect_right(self._starts, row) - 1

    def distance(self, row: int) -> float:
        group = self._group_of(row)
        if group == self._group and row >= self._first:
            return row - self._first
        return row - self._starts[group] + 0.5  # a reader that is there already is preferred

    def image(self, column: str, row: int) -> bytes | str | None:
        group = self._group_of(row)
        if group != self._group or row < self._first:
            self._group, self._first, self._array = group, self._starts[group], None
            self._batches = self._file.iter_batches(
                batch_size=self._batch_rows(group, column),
                row_groups=[group],
                columns=[column],
                use_threads=False,
            )
        while self._array is None or row >= self._first + len(self._array):
            self._first += len(self._array or ())
            batch = next(self._batches, None)
            if batch is None:
                self._group = -1
                raise ContainerError("corrupt: the row group has fewer rows than its header says")
            self._array = batch.column(0)
        return _value(self._array, row - self._first)

    def _batch_rows(self, group: int, column: str) -> int:
        """How many rows to take at once from a row group, so that they fit in memory."""
        metadata = self._file.metadata.row_group(group)
        size = sum(
            part.total_uncompressed_size
            for part in map(metadata.column, range(metadata.num_columns))
            if part.path_in_schema.split(".")[0] == column
        )
        per_row = max(1, size // max(1, metadata.num_rows))
        return int(min(MAX_BATCH_ROWS, max(1, BATCH_BYTES // per_row)))

    def cells(self, columns: list[str]) -> Iterator[dict[str, list[Any]]]:
        for batch in self._file.iter_batches(
            batch_size=CELL_ROWS, columns=columns, use_threads=False
        ):
            yield {name: _cell_column(batch, name) for name in columns}

    def close(self) -> None:
        self._batches, self._array = iter(()), None
        self._file.close()
        self._source.close()


class _ArrowReader(_Reader):
    """Reads the record batches of an Arrow file or stream, in any order."""

    def __init__(self, container: Container) -> None:
        import pyarrow as pa

        super().__init__(container)
        if self.in_store:
            self._source = pa.PythonFile(_StoreFile(container), mode="r")
        else:
            self._source = pa.memory_map(os.fsencode(self.location))
        self._cached: dict[int, Any] = {}
        self._starts: list[int] = []  # first row of each batch
        self._places: list[int] = []  # its place in the file
        self.rows = 0
        try:
            self._read_headers()
        except BaseException:
            self._source.close()
            raise

    def _read_headers(self) -> None:
        """Read the schema, and where the record batches are."""
        import pyarrow as pa

        if self._source.read(8) != b"ARROW1\0\0":  # else a file, which is a stream with a footer
            self._source.seek(0)
        message = pa.ipc.read_message(self._source)
        if message.type != "schema":
            raise pa.ArrowInvalid("it begins without a schema")
        arrow_io.refuse_extension_types(self.location, message.metadata.to_pybytes())
        self.schema = pa.ipc.read_schema(message)
        while True:
            place = self._source.tell()
            try:
                message = pa.ipc.read_message(self._source)
                if message.type != "record batch":
                    raise pa.ArrowInvalid("it has dictionaries, which are not read")
                batch = pa.ipc.read_record_batch(message, self.schema)
            except EOFError:
                return
            except (pa.ArrowException, OSError) as error:
                self.damage = f"{_summary(error)} (at byte {place:,} of {self.container.size:,})"
                return
            self._starts.append(self.rows)
            self._places.append(place)
            self.rows += batch.num_rows

    def distance(self, row: int) -> float:
        return 0.0

    def _batch(self, number: int) -> Any:
        import pyarrow as pa

        if number not in self._cached:
            while len(self._cached) >= MAX_CACHED_BATCHES:
                self._cached.pop(next(iter(self._cached)))
            self._source.seek(self._places[number])
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(self._source), self.schema)
            batch.validate(full=True)  # offsets that lead out of the file would end the process
            self._cached[number] = batch
        return self._cached[number]

    def image(self, column: str, row: int) -> bytes | str | None:
        number = bisect.bisect_right(self._starts, row) - 1
        return _value(self._batch(number).column(column), row - self._starts[number])

    def cells(self, columns: list[str]) -> Iterator[dict[str, list[Any]]]:
        for number in range(len(self._starts)):
            batch = self._batch(number)
            yield {name: _cell_column(batch, name) for name in columns}

    def close(self) -> None:
        self._cached.clear()
        self._source.close()


def _cell_column(batch: Any, name: str) -> list[Any]:
    """A column, or a field "struct.field" of one, as Python values."""
    if name in batch.schema.names:
        return list(batch.column(name).to_pylist())
    column, _, inner = name.rpartition(".")
    return list(batch.column(column).field(inner).to_pylist())


class _StoreFile(io.RawIOBase):
    """A container in an object store as a file for pyarrow, read some megabytes at a time."""

    def __init__(self, container: Container) -> None:
        super().__init__()
        self._reader, self._at = BlockReader(container), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._reader.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._reader.read_at(self._at, len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class _IdleReaders:
    """Files that stay open between two reads, those that were used last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[tuple[tuple[str, str, int, str], _Reader]] = []

    def take(self, column: Column, row: int) -> _Reader:
        """The reader of a column that is nearest before a row; a new one if there is none."""
        with self._lock:
            matching = [reader for key, reader in self._idle if key == column]
            if matching:
                best = min(matching, key=lambda reader: reader.distance(row))
                self._idle = [pair for pair in self._idle if pair[1] is not best]
                return best
        return _open(column.root, column.path, column.stamp)

    def give_back(self, column: Column, reader: _Reader) -> None:
        """Keep a reader for the next read."""
        with self._lock:
            self._idle.append((column, reader))
            surplus = self._idle[:-MAX_IDLE_READERS]
            self._idle = self._idle[-MAX_IDLE_READERS:]
        for _, old in surplus:
            old.close()


_READERS = _IdleReaders()
