"""Check the output folder or file of a command before it does any work."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from arrowhead.errors import ConfigError

# Files of the operating system, and what MLflow and Arrowhead keep in the working directory, which
# may be the output folder. They do not count as the user's files.
IGNORED_ENTRIES = {
    ".DS_Store",
    "Thumbs.db",
    "desktop.ini",
    ".arrowhead",
    ".bundle",
    ".lock",
    "mlruns",
}


@dataclass(frozen=True, slots=True)
class OutputKind:
    """A kind of output folder.

    description: for messages. markers: entries that show that Arrowhead wrote the folder.
    is_replaced: whether the folder is replaced as a whole at the end.
    """

    description: str
    markers: tuple[str, ...]
    is_replaced: bool = False


OUTPUT_KINDS = {
    "store": OutputKind("a feature store", ("store.json", "shards")),
    "bundle": OutputKind("a bundle", ("bundle.json",), is_replaced=True),
    "scores": OutputKind("scores", ("request.json", "score.json", "inputs.arrow")),
    "report": OutputKind("a report", ("report.json",), is_replaced=True),
    "publication": OutputKind("a published model", ("arrowhead.json",), is_replaced=True),
    "results": OutputKind("results", ()),
    "data": OutputKind("a fetched data set", ("fetched.json",), is_replaced=True),
}


def check_output_folder(path: Path, kind: str) -> Path:
    """Check a folder that a command will write to.

    A trial folder is created and removed again to see whether the path is writable.

    Args:
        path: The folder as the user gave it.
        kind: A key of OUTPUT_KINDS; "results" may hold anything, since only folders below it are
            written.

    Returns:
        The path to use: ~ expanded, and `..` or a link resolved.

    Raises:
        ConfigError: It is a file, holds something else, or is not writable.
    """
    output_kind = OUTPUT_KINDS[kind]
    path = expand_user(path)
    _refuse_address(path)
    check_utf8(path)
    try:
        if path.is_symlink() or path.name in ("", ".."):
            path = _resolve(path)
        if path.exists() and not path.is_dir():
            raise ConfigError(
                f"{path} is a file.",
                f"a folder for {output_kind.description}.",
                "give the path of a folder.",
            )
        if path.is_dir() and output_kind.markers and not _has_marker(path, output_kind):
            _check_only_ignored(path, output_kind)
        if output_kind.is_replaced:
            _check_replaceable(path, output_kind)
            _try_to_write(path.parent, suffix=path.name)  # the name of its draft is longer
        _try_to_write(path)
    except OSError as error:
        raise _unwritable_error(path, error) from error
    return path


def check_output_file(path: Path) -> Path:
    """Check a file that a command will write; returns its path with ~ expanded.

    Raises:
        ConfigError: A folder or device has that path, or it is not writable.
    """
    path = expand_user(path)
    _refuse_address(path)
    check_utf8(path)
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(
                f"{path} is {'a folder' if path.is_dir() else 'not a regular file'}.",
                "the path of a file, new or to be replaced.",
                "give another path.",
            )
        _try_to_write(path.parent)
    except OSError as error:
        raise _unwritable_error(path, error) from error
    return path


def expand_user(path: Path) -> Path:
    """Expand ~ and ~NAME; ConfigError if there is no such user or home directory."""
    try:
        return path.expanduser()
    except RuntimeError as error:  # what pathlib raises for it
        raise ConfigError(
            f"{path.parts[0]} in {path} stands for no home directory of this machine.",
            "~ alone where HOME is set, or the name of a user.",
            "write the path in full, or ./~ for a folder of that name.",
        ) from error


def _resolve(path: Path) -> Path:
    try:
        return path.resolve()
    except RuntimeError as error:  # what pathlib raises for a loop of links
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from error


def check_utf8(path: Path) -> None:
    """Raise ConfigError for a path that is not UTF-8: Arrow, Parquet and MLflow need that."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{path} cannot be used: the bytes of its path are not UTF-8.",
            "a path of UTF-8 text; images may have any names.",
            "give another path, or rename the folder.",
        ) from error


def _refuse_address(path: Path) -> None:
    """Raise ConfigError for s3://bucket, of which `Path` makes a relative folder s3:/bucket."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)) and not os.path.lexists(path.parts[0]):
        address = str(path).replace(":/", "://", 1)
        raise ConfigError(
            f"{address} is an address; this command writes it to a disk only.",
            "the path of a folder or file.",
            "give a path on a disk, and copy the result to the address afterwards.",
        )


def _has_marker(path: Path, output_kind: OutputKind) -> bool:
    return any((path / marker).exists() for marker in output_kind.markers)


def _check_only_ignored(path: Path, output_kind: OutputKind) -> None:
    names = sorted(os.listdir(path))
    if not output_kind.is_replaced or path.samefile(os.curdir):
        names = [name for name in names if not is_ignored_entry(name)]
    if names:
        description = output_kind.description
        raise ConfigError(
            f"{path} holds files that are not of {description}, such as {names[0]}.",
            f"a new or empty folder, or {description} that Arrowhead wrote.",
            "give another folder.",
        )


def is_ignored_entry(name: str) -> bool:
    """Whether an entry of this name does not count as the user's file in an output folder."""
    return name in IGNORED_ENTRIES or name.startswith("mlflow.db") or name.endswith(".draft")


def _check_replaceable(path: Path, output_kind: OutputKind) -> None:
    """Raise ConfigError if a folder that is replaced as a whole is a mount point, or is or contains
    the working directory. The working directory itself can be filled once, while it has no marker.
    """
    working_directory = Path.cwd().resolve()
    if path.resolve() == working_directory and not _has_marker(path, output_kind):
        return
    contains_cwd = path.resolve() in (working_directory, *working_directory.parents)
    if contains_cwd or (path.is_dir() and os.path.ismount(path)):
        reason = "is or contains your working directory" if contains_cwd else "is a mount point"
        raise ConfigError(
            f"{path} {reason}: {output_kind.description} replaces its folder as a whole.",
            "a folder of its own.",
            f"give a folder inside, such as {path / 'bundle'}"
            + (", or change to another directory and give this path." if contains_cwd else "."),
        )


def _try_to_write(folder: Path, suffix: str = "") -> None:
    """Create and remove an empty folder in `folder` or its nearest existing parent.

    suffix: part of its name.
    """
    while not folder.exists():
        folder = folder.parent
    trial = tempfile.mkdtemp(prefix=".arrowhead-", suffix=f"{suffix}.draft", dir=folder)
    Path(trial).rmdir()


def _unwritable_error(path: Path, error: OSError) -> ConfigError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    return ConfigError(
        f"{path} cannot be written: {reason}.",
        "a path in a folder where you can create files.",
        "give another path, or give this user permission to write there.",
    )
