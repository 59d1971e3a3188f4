"""Properties by which images are divided into slices: labels, split, folder, measurements.

A property has one value per image: a number, or one of a few levels (names). `table_columns` adds
the columns of a table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arrowhead.data.catalog import Catalog
from arrowhead.examine.image_properties import ImageProperties
from arrowhead.wording import pluralize

MAX_LEVELS = 100  # the most frequent ones are examined
MAX_FOLDER_DEPTH = 8
# Name, field of `ImageProperties`, and factor to the unit in the name.
IMAGE_NUMBERS = (
    ("brightness", "brightness", 1.0),
    ("contrast", "contrast", 1.0),
    ("sharpness", "sharpness", 1.0),
    ("colourfulness", "colourfulness", 1.0),
    ("width (pixels)", "width", 1.0),
    ("height (pixels)", "height", 1.0),
    ("aspect (width / height)", "aspect", 1.0),
    ("file size (KB)", "file_size", 1e-3),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Property:
    """A property of N images.

    Attributes:
        name: Its name in a report.
        value: float64 (N,) numbers, NaN where unknown; or, with levels, int64 (N,) indices of
            them, -1 for an image without a level.
        levels: Names; empty for numbers.
        sampled: Whether an unknown value means that the image was not measured. Such images are
            left out of the comparison, instead of counting among the other images.
        tested: Whether its slices are tested, rather than only listed.
    """

    name: str
    value: NDArray[np.float64] | NDArray[np.int64]
    levels: tuple[str, ...] = ()
    sampled: bool = False
    tested: bool = True

    @property
    def known(self) -> NDArray[np.bool_]:
        """Whether an image has a value, bool (N,)."""
        known_N: NDArray[np.bool_] = self.value >= 0 if self.levels else np.isfinite(self.value)
        return known_N


def level_property(name: str, values: Sequence[str], *, sampled: bool = False) -> Property:
    """A property from one text per image; the MAX_LEVELS most frequent texts become levels.

    sampled: whether an empty text means that the image was not measured.
    """
    counts = Counter(values)
    if sampled:
        del counts[""]
    frequent = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:MAX_LEVELS]
    levels = sorted(level for level, _ in frequent)
    index = {level: number for number, level in enumerate(levels)}
    value_N = np.fromiter((index.get(value, -1) for value in values), np.int64, len(values))
    return Property(name=name, value=value_N, levels=tuple(levels), sampled=sampled)


def label_properties(
    name: str, labels: Sequence[tuple[str, ...]], *, tested: bool = True
) -> list[Property]:
    """Properties from the labels of each image.

    With one label per image that is one property. With several it is one for each of the MAX_LEVELS
    most frequent labels, whose only slice is the images that have it.
    """
    if all(len(names) == 1 for names in set(labels)):
        one = level_property(name, [names[0] for names in labels])
        return [Property(name=name, value=one.value, levels=one.levels, tested=tested)]
    counts: Counter[str] = Counter()
    for names, count in Counter(labels).items():
        counts.update(dict.fromkeys(names, count))
    frequent = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:MAX_LEVELS]
    properties = []
    for label, _ in frequent:
        has_label = {names: label in names for names in set(labels)}
        value_N = np.fromiter((has_label[names] - 1 for names in labels), np.int64, len(labels))
        properties.append(Property(name=name, value=value_N, levels=(label,), tested=tested))
    return properties


def catalog_properties(catalog: Catalog, row_N: NDArray[np.int64]) -> list[Property]:
    """Label, split and folders of some rows of a catalog. Folders are examined at every depth."""
    rows = row_N.tolist()
    properties = label_properties("label", [catalog.labels[row] for row in rows])
    properties.append(level_property("split", [catalog.splits[row] for row in rows]))
    folders = [catalog.paths[row].split("/")[:-1] for row in rows]
    deepest = max(map(len, folders), default=0)
    for depth in range(1, min(deepest, MAX_FOLDER_DEPTH) + 1):
        names = ["/".join(parts[:depth]) or "." for parts in folders]
        properties.append(level_property("folder", names))
    return properties


def measured_properties(
    images: ImageProperties, row_N: NDArray[np.int64]
) -> tuple[list[Property], list[str]]:
    """The measured properties of N images, and notes on images that have none.

    row_N: rows of the catalog in ascending order, among them those of `images`.
    """
    position_M = np.searchsorted(row_N, images.row)

    def spread(value_M: NDArray[np.float64]) -> NDArray[np.float64]:
        value_N = np.full(len(row_N), np.nan)
        value_N[position_M] = value_M
        return value_N

    def spread_text(values: Iterable[str]) -> list[str]:
        texts = [""] * len(row_N)
        for position, value in zip(position_M.tolist(), values, strict=True):
            texts[position] = value
        return texts

    properties = [
        Property(name=name, value=spread(getattr(images, field) * factor), sampled=True)
        for name, field, factor in IMAGE_NUMBERS
    ]
    properties.append(level_property("colors", spread_text(images.color), sampled=True))
    properties.append(level_property("format", spread_text(images.format), sampled=True))
    notes = []
    if len(images.row) < len(row_N):
        notes.append(
            f"size, brightness and the like were measured on a sample of {len(images.row)} of"
            f" {len(row_N)} images"
        )
    if images.unreadable:
        notes.append(
            f"{pluralize(images.unreadable, 'original')} could not be read again: moved, changed"
            " or damaged"
        )
    return properties, notes
