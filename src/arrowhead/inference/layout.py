"""The paths of the files in a scores folder."""

from __future__ import annotations

from pathlib import Path

from arrowhead.data import chunks
from arrowhead.data.catalog import Catalog
from arrowhead.errors import ConfigError


def parts_dir(out: Path) -> Path:
    """The folder of the Parquet parts, and of nothing else: readers can open it as it is."""
    return out / "parts"


def journal_dir(out: Path) -> Path:
    """The folder of the workers' journals of finished parts."""
    return out / "journal"


def inputs_path(out: Path) -> Path:
    """The catalog of the scored images."""
    return out / "inputs.arrow"


def csv_path(out: Path) -> Path:
    """The scores as one CSV file, which exists only if --csv was given."""
    return out / "scores.csv"


def check_layout(out: Path) -> None:
    """Raise ConfigError if an older version wrote the scores in `out`."""
    if any(out.glob("part-*.parquet")):
        raise ConfigError(
            f"{out} holds scores of an older Arrowhead version: the parts are beside score.json and"
            " have no hashes.",
            f"parts in {parts_dir(out)}, each with its sha256.",
            "give another OUT; the old parts can still be read as Parquet.",
        )


def hash_inputs(files: Catalog) -> str:
    """A hash of the images' paths, sizes and stamps; it changes when one of them is replaced."""
    return chunks.shard_name(files, range(len(files)), "")
