"""Arrow files: written whole, looked at before Arrow opens them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from arrowhead import fileio
from arrowhead.errors import DataError


def write_arrow(path: Path, table: Any) -> None:
    """A pyarrow table as one record batch in one Arrow IPC file, whole or absent."""
    import pyarrow as pa

    with (
        fileio.draft(path) as draft_file,
        pa.OSFile(str(draft_file), "wb") as file,
        pa.ipc.new_file(file, table.schema) as sink,
    ):
        sink.write_table(table.combine_chunks())


def read_arrow(path: Path) -> Any:
    """The memory-mapped pyarrow table of an Arrow IPC file; DataError if it is not one.

    Arrow can end the process over a flipped bit: compare the file's hash first.
    """
    import pyarrow as pa

    try:
        must_be_plain(path, _footer(path))
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        table.validate(full=True)  # offsets and text: a hash vouches for nonsense, too
        return table
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path} cannot be read: {error}.",
            "an Arrow file written by Arrowhead.",
            "delete the file and run precompute again: only its images are decoded again.",
        ) from error


def _footer(path: Path) -> bytes:
    """The end of an Arrow file, where its schema is; b"" if that is no such file."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 10))
        size = int.from_bytes(file.read(4), "little")
        if not 0 < size <= end - 10:
            return b""
        file.seek(end - 10 - size)
        return file.read(size)


def must_be_plain(path: Path, schema: bytes) -> None:
    """DataError for a file with extension types, before Arrow looks at it.

    Who registers such a type says what runs when it is opened or read. Ray Train brings Ray Data's,
    and those unpickle: a column `path` of theirs would run whatever the file's maker likes.
    """
    if b"ARROW:extension" in schema:
        raise DataError(
            f"{path} holds columns of an extension type.",
            "plain Arrow types, as Arrowhead writes them: reading others can run code.",
            "do not use it; ask where it comes from.",
        )


def whole(column: Any) -> Any:
    """A column as one array; what Arrowhead writes is one already, and combining would copy it."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
