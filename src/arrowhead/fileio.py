"""Files and folders that are whole or absent, and what vouches for them.

draft            a file gets its own name only when it is whole
write_sealed     JSON with a hash of its content inside
must_hash_to     a file's bytes against the sha256 that somebody else keeps
locked           one writer of a folder at a time
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from arrowhead import ConfigError, DataError

# ------------------------------------------------------------------------- whole files


@contextmanager
def draft(path: Path) -> Iterator[Path]:
    """A path to write to; what is there becomes `path` at the end, or nothing does.

    The draft's name is drawn: process ids repeat on machines that share a disk.
    Raises ConfigError when the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sketch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.draft")
    try:
        yield sketch
        _sync(sketch)
        os.replace(sketch, path)
        _sync(path.parent)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise ConfigError(
            f"{path} cannot be written: {os.strerror(error.errno)}.",
            "room on the disk; what was written before is whole and stays.",
            "free some space and run the same command again: it goes on where it stopped.",
        ) from error
    finally:
        sketch.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -------------------------------------------------------------------------------- JSON


def write_json(path: Path, content: Any) -> None:
    """One JSON file, whole or absent."""
    with draft(path) as sketch:
        sketch.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file; DataError if it is missing or torn."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {error}.",
            "a JSON file written by Arrowhead.",
            "check the path; if the folder was copied, copy it again.",
        ) from error


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """One JSON file, whole or absent, with a hash of its content inside."""
    write_json(path, {**content, "seal": _seal(content)})


def read_sealed(
    path: Path, number: int, *, upgrade: str, repair: str, name: str | None = None
) -> dict[str, Any]:
    """What `write_sealed` wrote; DataError if it is missing, changed, or not of format `number`.

    upgrade, repair: what to do about another format and about a change. name: what a person knows
    the file as, if not by its path.
    """
    content, name = read_json(path), name or str(path)
    if not isinstance(content, dict) or content.get("format") != number:
        found = content.get("format") if isinstance(content, dict) else None
        raise DataError(
            f"{name} is of format {found}.",
            f"format {number}, which this version writes.",
            f"use the Arrowhead version that wrote it, or {upgrade}.",
        )
    if content.pop("seal", None) != _seal(content):
        raise DataError(
            f"{name} has changed since it was written: its seal does not fit.",
            "the bytes that Arrowhead wrote.",
            repair,
        )
    return content


def _seal(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# ------------------------------------------------------------------------------ hashes


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def must_hash_to(
    path: Path, digest: str, *, witness: str, repair: str, name: str | None = None
) -> None:
    """DataError if a file is missing or its bytes are not those of this sha256.

    witness: what names the digest, such as "the manifest". repair: what to do. name: what a person
    knows the file as, if not by its path.
    """
    name = name or str(path)
    wanted = f"the bytes whose sha256 is {digest}."
    if not path.is_file():
        raise DataError(f"{name} is missing, but {witness} names it.", wanted, repair)
    if sha256(path) != digest:
        raise DataError(
            f"{name} differs from {witness}: its bytes have changed since they were written.",
            wanted,
            repair,
        )


# ------------------------------------------------------------------------------- locks


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One writer of a folder at a time; ConfigError if another process is writing there."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{folder} is being written by another Arrowhead command.",
                "one writer at a time.",
                "wait for it to end, or stop it; then run this again.",
            ) from None
        except OSError as error:  # some network disks know no locks
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                raise
        yield


@contextmanager
def occupied(folder: Path) -> Iterator[None]:
    """A folder that is made if need be, and locked; if nothing was put into it, it goes again, and
    so do the folders above it that were made for it.
    """
    new = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder):
            yield
    finally:
        if [one.name for one in folder.iterdir()] == [".lock"]:
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # not empty: something else was written there
                for one in new[1:]:
                    one.rmdir()
