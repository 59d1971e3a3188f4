"""What could not be sent, kept on the disk until it can be.

    <folder>/run.json       whose writes these are
             writes.jsonl   one write per line, in order; a torn last line is left out
             files/         copies of small files, as they were when they were written

A write is a dict of plain values; what it means is `tracking`'s to know.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from arrowhead import fileio

COPIED = 64 << 20  # bytes: what is larger is not copied to the spool, its place is noted
Write = dict[str, Any]


class Outbox:
    """Writes of one run that are to be sent later, on the disk, in order."""

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        self.folder, self._header = folder, header
        self._lines = folder / "writes.jsonl"
        self._lock: int | None = None
        self._unkept: list[Write] = []

    def __len__(self) -> int:
        return len(self.read())

    @property
    def in_memory(self) -> int:
        """How many writes the disk did not take."""
        return len(self._unkept)

    def lock(self) -> bool:
        """Whether this process has the folder to itself."""
        if self._lock is None:
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.release()
                return False
        return True

    def release(self) -> None:
        """Let another process have it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def add(self, write: Write) -> str | None:
        """Keep a write; why it is only in memory, if the disk does not take it."""
        try:
            if not self._lines.exists():
                self.folder.mkdir(parents=True, exist_ok=True)
                self.lock()
                write_whole(self.folder / "run.json", self._header)
            # The break comes first: a line that a full disk cut does not spoil the next.
            line = b"\n" + _json(self._copied(write))
            with self._lines.open("ab") as sink:
                sink.write(line)
                sink.flush()
                os.fsync(sink.fileno())
        except OSError as error:
            self._unkept.append(write)
            return str(error)
        return None

    def _copied(self, write: Write) -> Write:
        """A write whose file lies in the spool, or, if it is large, is named with its stamp."""
        if write["do"] != "file" or not Path(write["path"]).is_absolute() or "stamp" in write:
            return write
        source = Path(write["path"])
        found = stamp(source)
        if found[0] > COPIED:
            return write | {"stamp": found}
        target = self.folder / "files" / uuid4().hex[:12] / source.name
        target.parent.mkdir(parents=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy2(source, target)
        return write | {"path": str(target.relative_to(self.folder))}

    def read(self) -> list[Write]:
        """What is kept; a torn line is left out, metrics that follow each other are one write."""
        writes: list[Write] = []
        with contextlib.suppress(FileNotFoundError):
            for line in self._lines.read_bytes().splitlines():
                with contextlib.suppress(ValueError):
                    writes.append(json.loads(line))
        joined: list[Write] = []
        for one in [*writes, *self._unkept]:
            last = joined[-1] if joined else None
            if last and _only_metrics(last) and _only_metrics(one) and last["run"] == one["run"]:
                joined[-1] = last | {"metrics": last["metrics"] + one["metrics"]}
            else:
                joined.append(one)
        return joined

    def replace(self, writes: Sequence[Write]) -> None:
        """Keep only these. With none the folder goes."""
        unkept, self._unkept = self._unkept, []
        if writes:
            try:
                _write_lines(self._lines, writes)
            except OSError:  # what is on the disk stays there: carried out twice, it counts once
                self._unkept = unkept if self._lines.exists() else list(writes)
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.release()


def _only_metrics(write: Write) -> bool:
    linked = "model" in write or "dataset" in write
    return write["do"] == "batch" and not (write["params"] or write["tags"] or linked)


def stamp(path: Path) -> list[int]:
    """Bytes and newest change of a file, or of all files of a folder."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    facts = [file.stat() for file in files if file.exists()]
    return [sum(one.st_size for one in facts), max((one.st_mtime_ns for one in facts), default=0)]


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


def write_whole(path: Path, content: Any) -> None:
    """A JSON file that is there whole or as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_lines(path, [content])


def _write_lines(path: Path, lines: Sequence[Any]) -> None:
    draft = fileio.draft_path(path)
    with draft.open("wb") as sink:
        sink.write(b"\n".join(map(_json, lines)))
        sink.flush()
        os.fsync(sink.fileno())
    os.replace(draft, path)
