"""Settings for where labels and splits come from."""

from __future__ import annotations

from dataclasses import dataclass

from arrowhead.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """Where labels and splits come from when folders do not say, and how a table is read."""

    valid_share: float = 0.2
    """Share of each class held out for validation, 0 to 1, if DATA has no validation split.
    Chosen by content, so copies of one image are never in both splits."""
    images: str | None = None
    """Folder or address that the paths in a table are relative to. Default: the table's folder."""
    suffix: str = ""
    """Suffix to add to the paths in a table if they lack it, such as .jpg."""
    path_column: str | None = None
    """Column of a table with the images' paths. Default: path, image, filename, id … Of a Parquet
    or Arrow file: the column with the images."""
    label_column: str | None = None
    """Column of a table or Parquet file, or key of the .json files in a tar, with the labels.
    Default: label, class, category, breed …"""
    split_column: str | None = None
    """Column of a table with the split: train, val or test, or yes and no. Default: split,
    is_valid …"""
    multi_label: bool = False
    """Allow several labels per image in a table, separated by --label-separator. A column called
    tags, or one with lists (["sun", "sea"]), always has several."""
    label_separator: str | None = None
    """Separator between several labels of an image, such as "|"; implies --multi-label. Default:
    the first of | ; , that occurs, else a space. An empty separator means one label per image."""
    drop: str | None = None
    """Text file with images to leave out, such as copies: one path per line, relative to the folder
    of the images or absolute. Lines that start with # are comments. Later runs into the same store
    leave out the same images, until --drop none or another list is given."""

    def __post_init__(self) -> None:
        if not 0 < self.valid_share < 1:
            raise ConfigError(
                f"--valid-share is {self.valid_share}.",
                "a share of the images, more than 0 and less than 1.",
                "give a share such as 0.2.",
            )
        if self.multi_label and self.label_separator == "":
            raise ConfigError(
                "--multi-label is given with an empty --label-separator, which means one label.",
                "several labels and their separator, or one label.",
                "remove one of the two flags.",
            )
