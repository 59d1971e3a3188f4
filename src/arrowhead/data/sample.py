"""Draw a share of a catalog's images, the same ones each time."""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from dataclasses import replace

from arrowhead.data import sources
from arrowhead.data.catalog import Catalog


def draw_sample(catalog: Catalog, share: float, per_class: int) -> Catalog:
    """Draw images class by class; a larger share contains a smaller one.

    Paths decide, not the images' contents, which nobody has read yet.

    Args:
        catalog: All images.
        share: The share of every class, above 0 and up to 1.
        per_class: The number of images that a class keeps at the least, if it has them.

    Returns:
        A catalog of the drawn images, in the same order. With several labels per image, an image
        belongs to the class of its rarest label.
    """
    rows_by_class: dict[str, list[int]] = defaultdict(list)
    for row, name in enumerate(sources.rarest_labels(catalog.labels)):
        rows_by_class[name].append(row)
    drawn: set[int] = set()
    for rows in rows_by_class.values():
        count = max(math.ceil(share * len(rows)), per_class)
        drawn.update(sorted(rows, key=lambda row: (_hash(catalog.paths[row]), row))[:count])
    sample = catalog.select([row in drawn for row in range(len(catalog))])
    return replace(sample, ignored=0, notes=())


def _hash(path: str) -> int:
    return zlib.crc32(path.encode("utf-8", "surrogatepass"))
