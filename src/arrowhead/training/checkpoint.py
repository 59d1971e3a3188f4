"""Where a training can go on: its checkpoints below one folder, the `place`.

    tensors, facts         weights, optimizer, schedule; epoch, run id and the like
      -> write             state.safetensors and checkpoint.json, into a draft
      -> launch's keep     the draft gets its own name somewhere below the place
      -> newest            the last whole one of this training, after a stop at any moment
      -> prune             two whole ones stay

    checkpoint.json        format, facts, sha256 of the other file; sealed, written last

A file cut at any length, a flipped bit or a missing file is found out: then the checkpoint before
it is used. That includes what a library or a lost machine did to a folder after we named it, so
nothing here trusts a name, a date or a pointer. One training writes to a place at a time.
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

FORMAT, SEALED = 1, 2  # of a checkpoint; of the sealed file its label is
LABEL_SHAPE = {
    "checkpoint": int,
    "facts": {"key": str, "number": int},
    "sha256": re.compile("[0-9a-f]{64}"),
}
LABEL, STATE = "checkpoint.json", "state.safetensors"
DEPTH = 3  # Ray Train puts a folder of its own between the place and the checkpoint


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole checkpoint: its number, the facts and the tensors (on the CPU) it was written with.

    Tuples among the facts have become lists, and keys text: they went through JSON.
    """

    number: int
    facts: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def draft(place: Path) -> Path:
    """Where to `write` the next one: on the place's disk, and not yet a checkpoint.

    What a kill leaves of it, `prune` removes.
    """
    return fileio.draft_path(place / "checkpoint")


def write(folder: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
    """Write a checkpoint into `folder`, flushed to the disk.

    facts: plain JSON; `key` (text) says of which configuration and data this is, `number` (int)
    how far it is. Raises ConfigError when the disk is full.
    """
    import safetensors.torch
    import torch

    if not isinstance(facts.get("key"), str) or type(facts.get("number")) is not int:
        raise TypeError("facts need a key (text) and a number (int)")
    whole = torch.contiguous_format
    # Copies: safetensors takes no views and no two tensors that share memory.
    plain = {
        name: tensor.detach().to("cpu", copy=True, memory_format=whole)
        for name, tensor in tensors.items()
    }
    data = safetensors.torch.save(plain)
    (folder / LABEL).unlink(missing_ok=True)
    with fileio.draft(folder / STATE) as draft_file:
        draft_file.write_bytes(data)
    label = {
        "format": SEALED,
        "checkpoint": FORMAT,
        # As it will be read: the seal is a hash of that, and JSON turns tuples and keys.
        "facts": json.loads(json.dumps(dict(facts))),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    fileio.write_sealed(folder / LABEL, label)


def newest(place: Path, key: str, warn: Callable[[str], None]) -> Checkpoint | None:
    """The whole checkpoint of this key with the highest number below `place`, None without one.

    warn: gets one sentence for each torn one that was passed over. Those of other keys are not
    ours to speak of.
    """
    import safetensors.torch
    from safetensors import SafetensorError

    found, torn = _look(place, key)
    used = None
    for one in found:
        data = _state(one)
        if data is not None:
            with suppress(SafetensorError):  # bytes that the label vouches for can be anything
                used = Checkpoint(one.number, one.facts, safetensors.torch.load(data))
                break
        torn.append(one.folder)
    before = f"the whole one before it, {one.folder}, is used" if used else "none is whole"
    for folder in filter(Path.is_dir, torn):  # rank 0 may be pruning while other ranks look
        warn(f"The checkpoint {folder} is torn or has changed: {before}.")
    return used


def prune(place: Path, key: str, keep: int = 2) -> None:
    """Remove all but the `keep` newest whole checkpoints of this key, torn ones, and old drafts.

    May be stopped at any moment. While nothing is whole, nothing but drafts is removed: a disk
    that cannot be read today may be readable tomorrow.
    """
    found, torn = _look(place, key)
    whole, useless = 0, list(torn)
    for one in found:
        if whole < keep and _state(one) is not None:
            whole += 1
        else:
            useless.append(one.folder)
    for folder in useless if whole else []:
        # Renamed first: half a folder under its own name would be one more torn checkpoint.
        folder.rename(fileio.draft_path(folder))
    for folder in list(_folders(place)):
        if _is_draft(folder):
            shutil.rmtree(folder, ignore_errors=True)


def forget(place: Path, key: str) -> None:
    """Remove the checkpoints of a training that is done: those of this key, and of its parts
    (`key:…`). Others stay: they belong to trainings that are not.
    """
    for folder in list(_folders(place)):
        with suppress(DataError, OSError):
            if _is_draft(folder):
                shutil.rmtree(folder, ignore_errors=True)
            elif _label(folder)["facts"]["key"].partition(":")[0] == key:
                fileio.remove(folder)
    left = {folder.relative_to(place).parts[0] for folder in _folders(place)}
    for folder in [one for one in place.iterdir() if one.is_dir()] if place.is_dir() else []:
        if folder.name not in left:  # Ray Train's notes on what was there
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class _Label:
    """What a checkpoint's label says; the tensors' file has not been looked at."""

    folder: Path
    number: int
    facts: dict[str, Any]
    sha256: str
    written: int  # ns; decides between equal numbers of two attempts


def _look(place: Path, key: str) -> tuple[list[_Label], list[Path]]:
    """Labels of this key, newest first; and the folders whose label cannot be read."""
    found, torn = [], []
    for folder in _folders(place):
        if _is_draft(folder):
            continue
        try:
            content = _label(folder)
            facts = content["facts"]
            if facts["key"] == key and content["checkpoint"] != FORMAT:
                torn.append(folder)
            elif facts["key"] == key:
                written = (folder / LABEL).stat().st_mtime_ns
                number, digest = facts["number"], content["sha256"]
                found.append(_Label(folder, number, facts, digest, written))
        except (DataError, LookupError, OSError, TypeError, ValueError):
            torn.append(folder)
    found.sort(key=lambda one: (one.number, one.written), reverse=True)
    return found, torn


def _label(folder: Path) -> dict[str, Any]:
    """What a checkpoint's label says; DataError if it cannot be read."""
    repair = "train again."
    content = fileio.read_sealed(folder / LABEL, SEALED, upgrade="train again", repair=repair)
    fileio.must_fit(content, LABEL_SHAPE, str(folder / LABEL), repair)
    return content


def _folders(place: Path) -> Iterator[Path]:
    """Checkpoints and drafts below the place; what lies inside them is not looked at."""
    for here, names, files in os.walk(place):
        folder = Path(here)
        if folder != place and (LABEL in files or STATE in files or _is_draft(folder)):
            names.clear()
            yield folder
        elif len(folder.relative_to(place).parts) == DEPTH:
            names.clear()


def _is_draft(folder: Path) -> bool:
    return folder.name.startswith(".") and folder.name.endswith(".draft")


def _state(one: _Label) -> bytes | None:
    """The bytes of the tensors' file if they are those that the label vouches for."""
    try:
        data = (one.folder / STATE).read_bytes()
    except OSError:
        return None
    return data if hashlib.sha256(data).hexdigest() == one.sha256 else None
