"""Writes that a tracking store has not confirmed yet, on the disk and in memory.

    unsent/<run id>/run.json       tracking store (without password), experiment, run
                    writes.jsonl   one write per line; a line that was cut off is left out
                    files/N/…      copies of files to be sent
                    lock           held by the process that sends them

Each write may be sent twice with one result, so the file only grows, until all has been sent.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from arrowhead import fileio
from arrowhead.errors import ConfigError
from arrowhead.tracking.writes import Write, for_another_process, is_write

MAX_COPIED_BYTES = 64 << 20  # a larger file is not copied: its size and time are noted instead


class Outbox:
    """The unsent writes of one run, in order. Not safe to use from two threads at once."""

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        """Open the outbox of a run.

        Args:
            folder: the folder of this run; made with the first write.
            header: what run.json holds.
        """
        self.folder, self._header = folder, header
        self._lines = folder / "writes.jsonl"
        self._lock: int | None = None
        self._pending: dict[int, Write] = {}  # by number, in order
        self._unsaved: set[int] = set()
        self.added = 0
        """Number of writes added so far, those found on the disk included."""
        self.damaged = 0
        """Number of lines on the disk that are no writes and are left out."""
        self.problem: str | None = None
        """Why the disk did not take a write."""

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def unsaved(self) -> int:
        """How many writes are in memory only."""
        return len(self._unsaved)

    def lock(self) -> bool:
        """Take the folder for this process and read what it holds; whether it is ours.

        Raises OSError if the folder is not there or cannot be written.
        """
        if self._lock is not None:
            return True
        handle = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(handle).st_nlink == 0:  # its last owner has just removed the folder
                raise BlockingIOError
        except BlockingIOError:
            os.close(handle)
            return False
        self._lock = handle
        for write in self._read():
            self._pending[self.added] = write
            self.added += 1
        return True

    def release(self) -> None:
        """Let other processes take the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def add(self, *writes: Write, ids: Mapping[str, str]) -> bool:
        """Keep writes; those that the disk does not take, in memory.

        Args:
            writes: in order, as this process sends them.
            ids: local run ids to MLflow's, for the process that may have to send them instead.
        """
        try:
            self._open()
        except (OSError, ConfigError) as error:
            self.problem = str(error)
        numbers = range(self.added, self.added + len(writes))
        self.added = numbers.stop
        self._pending |= zip(numbers, writes, strict=True)
        self._unsaved.update(numbers)
        if self._lock is None:
            return False
        try:
            lines = []
            for number, write in zip(numbers, writes, strict=True):
                self._pending[number] = kept = self._with_copy(write)
                # The line break comes first: a line that a full disk cut off spoils no other.
                lines.append(b"\n" + _json(for_another_process(kept, ids)))
            with self._lines.open("ab") as sink:
                sink.write(b"".join(lines))
                sink.flush()
                os.fsync(sink.fileno())
            self._unsaved.difference_update(numbers)
        except OSError as error:
            self.problem = str(error)
            return False
        return not any("stamp" in self._pending[number] for number in numbers)

    def _open(self) -> None:
        if self._lock is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self.lock():
                raise BlockingIOError(f"another command is sending what {self.folder} holds")
            fileio.write_json(self.folder / "run.json", self._header)

    def _with_copy(self, write: Write) -> Write:
        """The write with a copy of its file or, if that is large, with its stamp."""
        if write["do"] != "file" or not Path(write["path"]).is_absolute() or "stamp" in write:
            return write
        source = Path(write["path"])
        now = stamp(source)
        if now[0] > MAX_COPIED_BYTES:
            return write | {"stamp": now}
        target = self.folder / "files" / uuid4().hex[:12] / source.name
        target.parent.mkdir(parents=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy2(source, target)
        return write | {"path": str(target.relative_to(self.folder))}

    def _read(self) -> list[Write]:
        """The writes on the disk, without a line that was cut off."""
        writes: list[Write] = []
        with contextlib.suppress(FileNotFoundError):
            for line in self._lines.read_bytes().splitlines():
                with contextlib.suppress(ValueError):
                    if is_write(write := json.loads(line)):
                        writes.append(write)
                    else:
                        self.damaged += 1
        return writes

    def pending(self, since: int = 0) -> list[tuple[list[int], Write]]:
        """What is to be sent, with the numbers to `remove` then; neighbouring metrics are joined.

        Args:
            since: leave out the writes before this number.
        """
        joined: list[tuple[list[int], Write]] = []
        rows = ((number, write) for number, write in self._pending.items() if number >= since)
        for run, group in itertools.groupby(rows, key=lambda row: _run_of_metrics(row[1])):
            batch = list(group)
            if run is None:
                joined += [([number], write) for number, write in batch]
            else:
                metrics = [point for _, write in batch for point in write["metrics"]]
                joined.append(([number for number, _ in batch], batch[0][1] | {"metrics": metrics}))
        return joined

    def remove(self, numbers: Sequence[int]) -> None:
        """Forget writes that were sent."""
        for number in numbers:
            del self._pending[number]
        self._unsaved.difference_update(numbers)
        if not self._pending and self._lock is not None:
            with contextlib.suppress(OSError):
                self._lines.unlink()
            shutil.rmtree(self.folder / "files", ignore_errors=True)

    def separate(self, numbers: Sequence[int]) -> list[tuple[list[int], Write]]:
        """Writes that `pending` joined, one by one."""
        return [([number], self._pending[number]) for number in numbers]

    def keep(self, numbers: Sequence[int], ids: Mapping[str, str]) -> None:
        """Note that writes may have been sent, though nothing confirmed it."""
        for number in numbers:
            self._pending[number] = for_another_process(self._pending[number], ids)

    def close(self, ids: Mapping[str, str]) -> None:
        """Leave on the disk what is still to be sent; with nothing left the folder goes."""
        if self._lock is None:
            return
        if self._pending:
            lines = [_json(for_another_process(one, ids)) for one in self._pending.values()]
            # Where the disk is full, what it took before is still in its file.
            with contextlib.suppress(OSError, ConfigError):
                with fileio.atomic_write(self._lines) as draft:
                    draft.write_bytes(b"\n".join(lines))
                self._unsaved.clear()
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # other runs have outboxes there
                self.folder.parent.rmdir()
                if self.folder.parents[1].name == ".arrowhead":
                    self.folder.parents[1].rmdir()
        self.release()


def _run_of_metrics(write: Write) -> str | None:
    """The run of a write that is metrics and nothing else; None for any other write."""
    if write["do"] != "batch" or write["params"] or write["tags"]:
        return None
    return None if "model" in write or "dataset" in write else str(write["run"])


def stamp(path: Path) -> list[int]:
    """Size in bytes and newest change (ns) of a file, or of all files of a folder."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    facts = [file.stat() for file in files if file.exists()]
    return [sum(one.st_size for one in facts), max((one.st_mtime_ns for one in facts), default=0)]


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode(errors="surrogatepass")
