"""Heatmaps to lay over the pictures of a report."""

from __future__ import annotations

import base64
from collections.abc import Sequence

from arrowhead.bundle.format import Bundle
from arrowhead.data.catalog import Catalog
from arrowhead.errors import ConfigError
from arrowhead.examine import heatmaps
from arrowhead.examine.cards import Heat
from arrowhead.features.extract import ExtractConfig

SENTENCES = {
    "CAM": '"Where it looked" colors what speaks for the prediction (yellow to red) and against it'
    " (blue), by class activation maps: their mean is the logit (arXiv:1512.04150).",
    "Grad-CAM": '"Where it looked" colors what speaks for the prediction, by Grad-CAM'
    " (arXiv:1610.02391).",
}


def explain_rows(
    bundle: Bundle, catalog: Catalog, rows: Sequence[int]
) -> tuple[dict[int, Heat], str]:
    """Compute the heatmaps of some images, each for its predicted class.

    Returns:
        The heatmaps by row, without images that cannot be read; and a sentence that explains them,
        "" if the backbone has no feature map.
    """
    files = {}
    for row in rows:
        data, fault = catalog.read_file(row, ExtractConfig().max_bytes)
        if not fault:
            files[row] = data
    try:
        found = heatmaps.explain(bundle, list(files.values()))
    except ConfigError:  # the backbone has no feature map
        return {}, ""
    heats, method = {}, ""
    for row, heatmap in zip(files, found, strict=True):
        if heatmap is not None:
            png = base64.b64encode(heatmaps.overlay_png(heatmap)).decode()
            left, top, right, bottom = (round(100 * edge, 2) for edge in heatmap.box)
            heats[row] = Heat(f"data:image/png;base64,{png}", left, top, right - left, bottom - top)
            method = heatmap.method
    return heats, SENTENCES.get(method, "")
