"""Where a command writes: looked at before it does any work.

check_folder   a folder for a store, a bundle or scores: new, empty, or one that we wrote
check_file     a file that will be replaced as a whole
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from arrowhead.errors import ConfigError

# What others leave in a folder without anybody's asking, and what MLflow and we ourselves keep in
# the working directory, which may be the output folder. Drafts are of a command that was killed.
UNASKED = {".DS_Store", "Thumbs.db", "desktop.ini", ".arrowhead", ".bundle", ".lock", "mlruns"}


@dataclass(frozen=True, slots=True)
class Kind:
    """What a folder is for: in words, the entries that show that it is ours, whether the whole
    folder is replaced at the end.
    """

    words: str
    marks: tuple[str, ...]
    replaced: bool = False


KINDS = {
    "store": Kind("a feature store", ("store.json", "shards")),
    "bundle": Kind("a bundle", ("bundle.json",), replaced=True),
    "scores": Kind("scores", ("request.json", "score.json", "inputs.arrow")),
    "results": Kind("results", ()),
}


def check_folder(path: Path, kind: str) -> Path:
    """The folder that will be written, as it is to be used: ~ expanded; where its name says
    nothing (`..`) or is a link, the folder that it stands for.

    kind: a key of KINDS; "results" may hold anything, since only folders below it are written.
    Raises ConfigError for a file, for a folder that holds something else, and where nothing can be
    written: it is tried, and nothing of the trial stays.
    """
    what = KINDS[kind]
    path = expanded(path)
    _must_be_local(path)
    must_be_text(path)
    try:
        if path.is_symlink() or path.name in ("", ".."):
            path = _resolved(path)
        if path.exists() and not path.is_dir():
            raise ConfigError(
                f"{path} is a file.", f"a folder for {what.words}.", "give the path of a folder."
            )
        if path.is_dir() and what.marks and not any((path / mark).exists() for mark in what.marks):
            _must_be_empty(path, what)
        if what.replaced:
            _must_be_replaceable(path, what)
            _try(path.parent, suffix=path.name)  # its draft has a name that is longer
        _try(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def check_file(path: Path) -> Path:
    """The file that will be written, ~ expanded. Raises ConfigError for what is there and no file
    (a folder, a device), and where nothing can be written.
    """
    path = expanded(path)
    _must_be_local(path)
    must_be_text(path)
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(
                f"{path} is {'a folder' if path.is_dir() else 'no ordinary file'}.",
                "the path of a file, new or to be replaced.",
                "give another path.",
            )
        _try(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def expanded(path: Path) -> Path:
    """~ and ~NAME expanded. Raises ConfigError where nobody of that name, or no home, is known."""
    try:
        return path.expanduser()
    except RuntimeError as error:  # pathlib's word for it
        raise ConfigError(
            f"{path.parts[0]} in {path} stands for no home directory of this machine.",
            "~ alone where HOME is set, or the name of a user.",
            "write the path in full, or ./~ for a folder of that name.",
        ) from error


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except RuntimeError as error:  # pathlib's word for links that lead to themselves
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from error


def must_be_text(path: Path) -> None:
    """Arrow, Parquet and MLflow take paths as UTF-8 only; ConfigError for one of other bytes."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{path} cannot be used: the bytes of its path are not UTF-8.",
            "a path of UTF-8 text; images may have any names.",
            "give another path, or rename the folder.",
        ) from error


def _must_be_local(path: Path) -> None:
    """`Path` has made one slash of the two of s3://bucket: it must not become a folder here."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)) and not os.path.lexists(path.parts[0]):
        raise ConfigError(
            f"{path} is an address; what is made here is written to a disk.",
            "the path of a folder or file.",
            "give such a path, and copy it to the address afterwards.",
        )


def _must_be_empty(path: Path, what: Kind) -> None:
    held = sorted(os.listdir(path))
    if not what.replaced or path.samefile(os.curdir):
        held = [name for name in held if not unasked(name)]
    if held:
        raise ConfigError(
            f"{path} holds files that are not of {what.words}, such as {held[0]}.",
            f"a new or empty folder, or {what.words} that Arrowhead wrote.",
            "give another folder.",
        )


def unasked(name: str) -> bool:
    """Whether nobody put an entry of this name there: it does not count in an output folder."""
    return name in UNASKED or name.startswith("mlflow.db") or name.endswith(".draft")


def _must_be_replaceable(path: Path, what: Kind) -> None:
    """A folder that is replaced as a whole can be neither a mount point nor hold where we stand;
    where we stand it can be filled, once.
    """
    here = Path.cwd().resolve()
    if path.resolve() == here and not any((path / mark).exists() for mark in what.marks):
        return
    inside = path.resolve() in (here, *here.parents)
    if inside or (path.is_dir() and os.path.ismount(path)):
        kind = "is, or holds, the folder you stand in" if inside else "is a mount point"
        raise ConfigError(
            f"{path} {kind}: {what.words} takes the place of its folder as a whole.",
            "a folder of its own.",
            f"give a folder inside, such as {path / 'bundle'}"
            + (", or stand elsewhere and name this one." if inside else "."),
        )


def _try(folder: Path, suffix: str = "") -> None:
    """Make and remove an empty folder in `folder`, or in the nearest one above that is there.

    suffix: part of its name.
    """
    while not folder.exists():
        folder = folder.parent
    made = tempfile.mkdtemp(prefix=".arrowhead-", suffix=f"{suffix}.draft", dir=folder)
    Path(made).rmdir()


def _unwritable(path: Path, error: OSError) -> ConfigError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    return ConfigError(
        f"{path} cannot be written: {reason}.",
        "a path in a folder where files can be made.",
        "give another path, or let this user write there.",
    )
