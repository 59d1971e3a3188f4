"""Heatmaps to lay over the pictures of a report."""

from __future__ import annotations

import base64
from collections.abc import Sequence

from arrowhead.bundle.format import Bundle
from arrowhead.errors import ConfigError
from arrowhead.examine import heatmaps
from arrowhead.examine.cards import Heat
from arrowhead.examine.heatmaps import Heatmap
from arrowhead.examine.originals import Originals

SENTENCES = {
    "CAM": '"Where it looked" colors what speaks for the prediction (yellow to red) and against it'
    " (blue), by class activation maps: their mean is the logit (arXiv:1512.04150).",
    "Grad-CAM": '"Where it looked" colors what speaks for the prediction, by Grad-CAM'
    " (arXiv:1610.02391).",
}


def explain_rows(
    bundle: Bundle, originals: Originals, rows: Sequence[int]
) -> tuple[dict[int, Heat], str]:
    """Compute the heatmaps of some images, each for its predicted class.

    No more than a batch of files is in memory at a time.

    Returns:
        The heatmaps by row, without images that cannot be read; and a sentence that explains them,
        "" if the backbone has no feature map.
    """
    heats, method = {}, ""
    try:
        with heatmaps.open_explainer(bundle) as explain:
            for start in range(0, len(rows), heatmaps.BATCH_SIZE):
                batch = rows[start : start + heatmaps.BATCH_SIZE]
                files = {row: data for row in batch if (data := originals.read(row)) is not None}
                found = explain(list(files.values()), None)
                for row, heatmap in zip(files, found, strict=True):
                    if heatmap is not None:
                        heats[row] = _heat(heatmap)
                        method = heatmap.method
    except ConfigError:  # the backbone has no feature map
        return {}, ""
    return heats, SENTENCES.get(method, "")


def _heat(heatmap: Heatmap) -> Heat:
    """A heatmap as a picture, in percent of the thumbnail."""
    png = base64.b64encode(heatmaps.overlay_png(heatmap)).decode()
    left, top, right, bottom = (round(100 * edge, 2) for edge in heatmap.box)
    return Heat(f"data:image/png;base64,{png}", left, top, right - left, bottom - top)
