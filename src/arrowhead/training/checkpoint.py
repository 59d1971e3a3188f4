"""Checkpoints of a training, below one directory.

    tensors, facts         weights and optimizer state; epoch, MLflow run id and the like
      -> write             state.safetensors and checkpoint.json, into a draft directory
      -> save_checkpoint   (`runtime.worker`) gives the draft its final name
      -> newest            the last complete checkpoint of this training
      -> prune             keeps the last two complete ones

    checkpoint.json        format, facts, sha256 of the other file; sealed, written last

A file cut at any length, a flipped bit or a missing file is detected; then the checkpoint before it
is used. That includes what a library or a lost machine did to a directory after it got its name, so
nothing here trusts a name, a date or a pointer: neither torch.save nor Ray Train's checkpoint
manager checks the contents. One training at a time writes to a directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arrowhead import fileio
from arrowhead.errors import DataError

if TYPE_CHECKING:
    import torch

FORMAT_VERSION, SEALED_VERSION = 1, 2  # of a checkpoint; of the sealed file with its metadata
METADATA_SCHEMA = {
    "checkpoint": int,
    "facts": {"key": str, "number": int},
    "sha256": re.compile("[0-9a-f]{64}"),
}
METADATA_FILE, TENSORS_FILE = "checkpoint.json", "state.safetensors"
MAX_DEPTH = 3  # Ray Train puts a directory of its own above the checkpoint


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint: its number, facts and tensors (on the CPU).

    The facts went through JSON: tuples have become lists, and keys text.
    """

    number: int
    facts: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def draft_path(checkpoint_dir: Path) -> Path:
    """Return where to `write` the next checkpoint: on the same disk, and not yet a checkpoint.

    If the process is killed, `prune` removes what it left there.
    """
    return fileio.draft_path(checkpoint_dir / "checkpoint")


def write(folder: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
    """Write a checkpoint into `folder`, flushed to the disk.

    Args:
        folder: See `draft_path`.
        tensors: Any tensors, by name.
        facts: Values for JSON: `key` (text) identifies the configuration and the data, `number`
            (int) says how far the training is.

    Raises:
        ConfigError: The disk is full.
    """
    import safetensors.torch
    import torch

    if not isinstance(facts.get("key"), str) or type(facts.get("number")) is not int:
        raise TypeError("facts need a key (text) and a number (int)")
    contiguous = torch.contiguous_format
    # Copies: safetensors takes no views and no two tensors that share memory.
    copies = {
        name: tensor.detach().to("cpu", copy=True, memory_format=contiguous)
        for name, tensor in tensors.items()
    }
    data = safetensors.torch.save(copies)
    (folder / METADATA_FILE).unlink(missing_ok=True)
    with fileio.atomic_write(folder / TENSORS_FILE) as draft_file:
        draft_file.write_bytes(data)
    metadata = {
        "format": SEALED_VERSION,
        "checkpoint": FORMAT_VERSION,
        # As it will be read: the seal is a hash of this, and JSON changes tuples and keys.
        "facts": json.loads(json.dumps(dict(facts))),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    fileio.write_sealed(folder / METADATA_FILE, metadata)


def newest(checkpoint_dir: Path, key: str, warn: Callable[[str], None]) -> Checkpoint | None:
    """Return the complete checkpoint of this key with the highest number; None without one.

    Args:
        checkpoint_dir: The directory that checkpoints are below.
        key: Identifies the configuration and the data; checkpoints of other keys are ignored.
        warn: Gets one sentence for each corrupt checkpoint that was skipped.
    """
    import safetensors.torch
    from safetensors import SafetensorError

    entries, corrupt = _find(checkpoint_dir, key)
    result = None
    for entry in entries:
        data = _verified_bytes(entry)
        if data is not None:
            with suppress(SafetensorError):  # the metadata's hash may be that of anything
                result = Checkpoint(entry.number, entry.facts, safetensors.torch.load(data))
                break
        corrupt.append(entry.folder)
    instead = f"Using the one before it, {entry.folder}" if result else "There is no complete one"
    for folder in filter(Path.is_dir, corrupt):  # rank 0 may be pruning while other ranks look
        warn(f"The checkpoint {folder} is incomplete or has changed. {instead}.")
    return result


def prune(checkpoint_dir: Path, key: str, keep: int = 2) -> None:
    """Remove old and corrupt checkpoints of this key, and drafts.

    The `keep` newest complete ones stay. This can be stopped at any moment. While no checkpoint is
    complete, only drafts are removed: a disk that cannot be read today may be readable tomorrow.
    """
    entries, corrupt = _find(checkpoint_dir, key)
    complete, unneeded = 0, list(corrupt)
    for entry in entries:
        if complete < keep and _verified_bytes(entry) is not None:
            complete += 1
        else:
            unneeded.append(entry.folder)
    for folder in unneeded if complete else []:
        # Renamed first: a half-removed directory under its own name would be a corrupt checkpoint.
        folder.rename(fileio.draft_path(folder))
    for folder in list(_folders(checkpoint_dir)):
        if _is_draft(folder):
            shutil.rmtree(folder, ignore_errors=True)


def remove_finished(checkpoint_dir: Path, key: str) -> None:
    """Remove the checkpoints of a finished training: those of this key, and of its parts (`key:…`).

    Those of other keys stay: they belong to trainings that are not finished.
    """
    for folder in list(_folders(checkpoint_dir)):
        with suppress(DataError, OSError):
            if _is_draft(folder):
                shutil.rmtree(folder, ignore_errors=True)
            elif _read_metadata(folder)["facts"]["key"].partition(":")[0] == key:
                fileio.remove_path(folder)
    remaining = {folder.relative_to(checkpoint_dir).parts[0] for folder in _folders(checkpoint_dir)}
    folders = checkpoint_dir.iterdir() if checkpoint_dir.is_dir() else ()
    for folder in [one for one in folders if one.is_dir()]:
        if folder.name not in remaining:  # Ray Train's own records of the checkpoints
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A checkpoint by its metadata; its tensors have not been read."""

    folder: Path
    number: int
    facts: dict[str, Any]
    sha256: str
    written_ns: int  # decides between equal numbers of two attempts


def _find(checkpoint_dir: Path, key: str) -> tuple[list[_Entry], list[Path]]:
    """Return the checkpoints of this key, newest first, and those with unreadable metadata."""
    entries, corrupt = [], []
    for folder in _folders(checkpoint_dir):
        if _is_draft(folder):
            continue
        try:
            content = _read_metadata(folder)
            facts = content["facts"]
            if facts["key"] == key and content["checkpoint"] != FORMAT_VERSION:
                corrupt.append(folder)
            elif facts["key"] == key:
                written_ns = (folder / METADATA_FILE).stat().st_mtime_ns
                number, digest = facts["number"], content["sha256"]
                entries.append(_Entry(folder, number, facts, digest, written_ns))
        except (DataError, LookupError, OSError, TypeError, ValueError):
            corrupt.append(folder)
    entries.sort(key=lambda one: (one.number, one.written_ns), reverse=True)
    return entries, corrupt


def _read_metadata(folder: Path) -> dict[str, Any]:
    """Read checkpoint.json; DataError if it is corrupt."""
    repair = "train again."
    file = folder / METADATA_FILE
    content = fileio.read_sealed(file, SEALED_VERSION, upgrade="train again", repair=repair)
    fileio.check_schema(content, METADATA_SCHEMA, str(file), repair)
    return content


def _folders(checkpoint_dir: Path) -> Iterator[Path]:
    """Yield the directories of checkpoints and drafts, without looking below them."""
    for path, names, files in os.walk(checkpoint_dir):
        folder = Path(path)
        is_checkpoint = METADATA_FILE in files or TENSORS_FILE in files or _is_draft(folder)
        if folder != checkpoint_dir and is_checkpoint:
            names.clear()
            yield folder
        elif len(folder.relative_to(checkpoint_dir).parts) == MAX_DEPTH:
            names.clear()


def _is_draft(folder: Path) -> bool:
    return folder.name.startswith(".") and folder.name.endswith(".draft")


def _verified_bytes(entry: _Entry) -> bytes | None:
    """Read the file of the tensors; None if its hash is not that of the metadata."""
    try:
        data = (entry.folder / TENSORS_FILE).read_bytes()
    except OSError:
        return None
    return data if hashlib.sha256(data).hexdigest() == entry.sha256 else None
