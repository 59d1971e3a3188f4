"""Read and write Arrow IPC files: atomic writes, and checks before Arrow opens a file."""

from __future__ import annotations

import base64
import os
import re
from pathlib import Path
from typing import Any

from arrowhead import fileio
from arrowhead.errors import DataError


def write_arrow(path: Path, table: Any) -> None:
    """Write a pyarrow table atomically, as one record batch in one Arrow IPC file."""
    import pyarrow as pa

    with (
        fileio.atomic_write(path) as draft_file,
        pa.OSFile(str(draft_file), "wb") as file,
        pa.ipc.new_file(file, table.schema) as sink,
    ):
        sink.write_table(table.combine_chunks())


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
    if b"ARROW:extension" in schema:
        raise DataError(
            f"{path} holds columns of an extension type.",
            "plain Arrow types, as Arrowhead writes them: reading others can run code.",
            "do not use it; find out where it comes from.",
        )


def arrow_schema_of_parquet(source: Any) -> bytes:
    """The Arrow schema in a Parquet file's footer, b"" if none, without Arrow reading the footer:
    that already makes registered extension types. source: an open pyarrow file, left at its start.
    """
    size = source.size()
    source.seek(max(size - 8, 0))
    tail = source.read(8)
    length = int.from_bytes(tail[:4], "little")
    footer = b""
    if tail[4:] == b"PAR1" and length <= size - 8:
        source.seek(size - 8 - length)
        footer = source.read(length)
    source.seek(0)
    # Thrift: the key, the header of the next string, its length as a varint, the string.
    found = re.search(rb"ARROW:schema\x18[\x80-\xff]*[\x00-\x7f]([A-Za-z0-9+/=]+)", footer)
    return base64.b64decode(found[1] + b"==") if found else b""


def single_array(column: Any) -> Any:
    """A column as one array, copied only if it has several chunks (Arrowhead writes one)."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
