"""Where the files of a scoring lie."""

from __future__ import annotations

from pathlib import Path

from arrowhead.data import chunks
from arrowhead.data.catalog import Catalog
from arrowhead.errors import ConfigError


def parts(out: Path) -> Path:
    """The folder of the Parquet parts; nothing else lies in it, so readers take it as it is."""
    return out / "parts"


def journal(out: Path) -> Path:
    """The folder of the workers' journals of finished parts."""
    return out / "journal"


def inputs(out: Path) -> Path:
    """The list of files that `out` holds the scores of."""
    return out / "inputs.arrow"


def csv_file(out: Path) -> Path:
    """The scores as one CSV, which lies there where it was asked for."""
    return out / "scores.csv"


def must_be_of_this_layout(out: Path) -> None:
    """ConfigError if an older version wrote what is there."""
    if any(out.glob("part-*.parquet")):
        raise ConfigError(
            f"{out} holds scores of an older Arrowhead: their parts lie beside score.json and have"
            " no hashes.",
            f"parts in {parts(out)}, each with its sha256.",
            "give another OUT; what is in that folder can still be read as Parquet.",
        )


def inputs_of(files: Catalog) -> str:
    """A hash of files' paths, sizes and stamps: a file of the same size may hold another image."""
    return chunks.chunk_name(files, range(len(files)), "")
