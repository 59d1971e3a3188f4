"""Read and write Arrow IPC files: atomic writes, and checks before Arrow opens a file."""

from __future__ import annotations

import base64
import os
import sys
import threading
from pathlib import Path
from typing import Any

from arrowhead import fileio
from arrowhead.errors import DataError

EXTENSION_MARK = b"ARROW:extension"  # begins the names of the metadata that make a type of it


def write_arrow(path: Path, table: Any) -> None:
    """Write a pyarrow table atomically, as one record batch in one Arrow IPC file."""
    import pyarrow as pa

    with (
        fileio.atomic_write(path) as draft_file,
        pa.OSFile(str(draft_file), "wb") as file,
        pa.ipc.new_file(file, table.schema) as sink,
    ):
        sink.write_table(table.combine_chunks())


class _NoPandas:
    """An import hook that says that there is no pandas."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        """Refuse pandas; leave the other modules to the other hooks."""
        if name == "pandas":
            raise ModuleNotFoundError("pandas is left out", name=name)


def leave_out_pandas() -> None:
    """Let pyarrow work without pandas, which its first array imports if it can (0.4 s).

    For a process that uses no pandas, or only after this: `to_pandas` imports it then.
    """
    if "pandas" in sys.modules or threading.active_count() > 1:
        return
    sys.meta_path.insert(0, _NoPandas)
    try:
        import pyarrow as pa

        pa.array([0])
    finally:
        sys.meta_path.remove(_NoPandas)


def read_arrow(path: Path) -> Any:
    """Memory-map an Arrow IPC file as a pyarrow table.

    A flipped bit can crash Arrow and the process with it: compare the file's hash first.

    Raises:
        DataError: The file is missing, corrupt, or holds extension types.
    """
    import pyarrow as pa

    try:
        refuse_extension_types(path, _read_footer(path))
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        table.validate(full=True)  # a matching hash does not prove that offsets and text are valid
        return table
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path} cannot be read: {error}.",
            "an Arrow file written by Arrowhead.",
            "delete the file and run precompute again: only its images are decoded again.",
        ) from error


def _read_footer(path: Path) -> bytes:
    """The footer of an Arrow file, which holds its schema; b"" if it is not an Arrow file."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 10))
        size = int.from_bytes(file.read(4), "little")
        if not 0 < size <= end - 10:
            return b""
        file.seek(end - 10 - size)
        return file.read(size)


def refuse_extension_types(path: Path, schema: bytes) -> None:
    """Raise DataError for a file with extension types, before Arrow opens it.

    A registered extension type runs its own code when a file is opened or read. Ray Train registers
    those of Ray Data, which unpickle: such a column could run any code of the file's author.
    """
    if EXTENSION_MARK in schema:
        raise DataError(
            f"{path} holds columns of an extension type.",
            "plain Arrow types, as Arrowhead writes them: reading others can run code.",
            "do not use it; find out where it comes from.",
        )


def refuse_parquet_extension_types(path: Path, source: Any) -> None:
    """As `refuse_extension_types`, for a Parquet file: reading its footer already makes registered
    types. The footer holds the Arrow schema in base64; the mark is looked for in any position, so
    it does not matter how a hostile file writes the fields around it.

    source: The file, opened with pyarrow; left at its start.
    """
    size = source.size()
    source.seek(max(size - 8, 0))
    length = int.from_bytes(source.read(8)[:4], "little")
    source.seek(max(size - 8 - length, 0))
    footer = source.read(length)
    source.seek(0)
    if any(mark in footer for mark in _base64_positions(EXTENSION_MARK)):
        refuse_extension_types(path, EXTENSION_MARK)


def _base64_positions(text: bytes) -> list[bytes]:
    """What base64 makes of a text inside a longer one, for each position in groups of 3 bytes;
    without the characters that its neighbours change.
    """
    encoded = [base64.b64encode(bytes(shift) + text) for shift in range(3)]
    ends = [(shift + len(text)) * 8 // 6 for shift in range(3)]
    return [
        one[-(-shift * 8 // 6) : end]
        for shift, (one, end) in enumerate(zip(encoded, ends, strict=True))
    ]


def single_array(column: Any) -> Any:
    """A column as one array, copied only if it has several chunks (Arrowhead writes one)."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
