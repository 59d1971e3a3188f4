"""Where images and their labels come from: the flags."""

from __future__ import annotations

from dataclasses import dataclass

from arrowhead.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """Where labels and splits come from when folders do not say, and how a table is read."""

    valid_share: float = 0.2
    """Share of each class held out for validation, 0 to 1, when DATA does not say which images
    validate. Chosen by content, so copies of one image never fall on both sides."""
    images: str | None = None
    """Folder or address that the paths in a CSV or TSV start from; its own folder if not given."""
    suffix: str = ""
    """Added to every path in a CSV or TSV that names images without it, such as .jpg."""
    path_column: str | None = None
    """Column of a CSV or TSV with the images' paths; if not given, path, image, filename, id …"""
    label_column: str | None = None
    """Column with the labels; if not given, label, class, category, breed …"""
    split_column: str | None = None
    """Column that says which images train, validate and test, in words (train, val, test) or as
    yes and no; if not given, split, is_valid …"""
    multi_label: bool = False
    """Images of a CSV or TSV may have several labels each: they are split at --label-separator.
    A column called tags, or one of lists (["sun", "sea"]), always has several."""
    label_separator: str | None = None
    """Stands between several labels of one image, such as "|"; asks for several labels, too. If not
    given: the first of | ; , that occurs, else a space. An empty one means one label each."""

    def __post_init__(self) -> None:
        if not 0 < self.valid_share < 1:
            raise ConfigError(
                f"--valid-share is {self.valid_share}.",
                "a share of the images, more than 0 and less than 1.",
                "give a share such as 0.2.",
            )
        if self.multi_label and self.label_separator == "":
            raise ConfigError(
                "--multi-label is given, and an empty --label-separator, which means one label.",
                "several labels and what stands between them, or one label.",
                "leave one of the two out.",
            )
