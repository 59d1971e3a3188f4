"""Pictures in a notebook: images of a store with their labels and predictions, as a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from arrowhead.data.catalog import Catalog
from arrowhead.examine import thumbnails
from arrowhead.examine.figures import text_style
from arrowhead.examine.originals import Originals
from arrowhead.examine.predictions import Predictions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 3
SIDE = 320  # pixels, of the longer side of a picture


def gallery_figure(
    catalog: Catalog, predictions: Predictions, index: NDArray[np.int64], title: str
) -> Figure:
    """Draw images with path, label, prediction and probability.

    Args:
        catalog: The images.
        predictions: What is predicted for them.
        index: Positions in `predictions`.
        title: The title of the figure.
    """
    from matplotlib.figure import Figure

    rows = predictions.row[index]
    image_id_N = np.zeros(len(catalog), np.uint64)
    image_id_N[rows] = predictions.image_id[index]
    shown = Originals(catalog, image_id_N).map(
        rows.tolist(), lambda data: thumbnails.decode_small(data, SIDE)
    )
    lines = max(1, -(-len(index) // COLUMNS))
    figure = Figure(figsize=(3 * COLUMNS, 3.2 * lines + 0.5), layout="constrained")
    figure.suptitle(title if len(index) else f"{title}: no image", parse_math=False)
    for axes, k, row in zip(
        figure.subplots(lines, COLUMNS, squeeze=False).flat, index, rows, strict=False
    ):
        if (pixels := shown[int(row)]) is not None:
            axes.imshow(pixels)
        label, predicted = (
            ", ".join(predictions.names(one[k])) or "none"
            for one in (predictions.label, predictions.predicted)
        )
        (path, label, predicted), text = text_style([catalog.paths[row], label, predicted])
        words = f"label {label}, predicted {predicted}" if label != predicted else label
        axes.set_title(
            f"{words}  {predictions.confidence[k]:.3f}\n{path}", fontsize="small", **text
        )
    for axes in figure.axes:
        axes.axis("off")
    return figure
