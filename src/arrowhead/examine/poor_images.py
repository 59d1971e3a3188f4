"""Images with little to see: nearly black or white, without contrast, very blurred.

They need no statistics and no labels: a single one is worth a look. The limits lie outside the
range of 800 photos of cats and dogs (brightness 41 to 222, contrast from 20, sharpness from 9).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from arrowhead.examine.image_properties import ImageProperties

MIN_BRIGHTNESS, MAX_BRIGHTNESS = 25.0, 235.0  # mean luminance, 0 to 255
MIN_CONTRAST = 10.0  # standard deviation of the luminance
MIN_SHARPNESS = 5.0  # variance of the Laplacian


@dataclass(frozen=True, slots=True)
class PoorImages:
    """Images with little to see, by reason.

    Attributes:
        rows: Rows of the catalog by reason, such as "nearly black"; an image has one reason.
        measured: How many images were measured.
    """

    rows: dict[str, list[int]]
    measured: int

    @property
    def count(self) -> int:
        """How many images have a reason."""
        return sum(map(len, self.rows.values()))


def find_poor_images(found: ImageProperties) -> PoorImages:
    """Find the poor images among those that were measured."""
    return PoorImages(by_reason(found), int(np.isfinite(found.brightness).sum()))


def by_reason(found: ImageProperties) -> dict[str, list[int]]:
    """The rows of the catalog by reason, from the properties of some images."""
    with np.errstate(invalid="ignore"):  # nan, which is no reason, where an original is gone
        reasons = (
            ("nearly black", found.brightness < MIN_BRIGHTNESS),
            ("nearly white", found.brightness > MAX_BRIGHTNESS),
            ("hardly any contrast", found.contrast < MIN_CONTRAST),
            ("very blurred", found.sharpness < MIN_SHARPNESS),
        )
    rows: dict[str, list[int]] = {}
    taken = np.zeros(len(found.row), bool)
    for reason, mask in reasons:
        chosen = mask & ~taken
        taken |= chosen
        if chosen.any():
            rows[reason] = [int(row) for row in found.row[chosen]]
    return rows
