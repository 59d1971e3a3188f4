"""The section of a report with the map of the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from arrowhead.data.catalog import Catalog
from arrowhead.examine import feature_map, thumbnails
from arrowhead.examine.predictions import Predictions
from arrowhead.features.store import Store

WIDTH, HEIGHT = 800, 520
TILE_SIDE = 56  # pixels, of the pictures that appear under the pointer
TILE_COLUMNS = 20  # of the sheet that holds them
MAX_TILES = 400
COLORS = ("#2a6fb0", "#c8590b", "#2f8f5b", "#a03a8c", "#8a6d00", "#1c9aa8", "#b03050", "#6652b8")
OTHER_COLOR = "#8b949e"


def pictured_rows(predictions: Predictions) -> list[int]:
    """The rows of the catalog that the map shows with a picture: its mistakes first."""
    index = feature_map.choose(predictions)
    wrong = predictions.held_out[index] & ~predictions.correct[index]
    rows: list[int] = predictions.row[index[np.argsort(~wrong, kind="stable")[:MAX_TILES]]].tolist()
    return rows


def map_section(
    store: Store, catalog: Catalog, predictions: Predictions, pictures: Mapping[int, Any]
) -> dict[str, Any] | None:
    """What the template shows of the map; None if there are too few images for one.

    pictures: Pillow images of `pictured_rows`, of TILE_SIDE pixels, None where one is missing.
    """
    found = feature_map.project(store, predictions)
    if found is None:
        return None
    rows = predictions.row[found.index]
    wrong = predictions.held_out[found.index] & ~predictions.correct[found.index]
    sheet, tiles = thumbnails.sprite_sheet(pictures, TILE_SIDE, TILE_COLUMNS)
    labels = [predictions.names(predictions.label[k]) for k in found.index]
    names = [predictions.names(predictions.predicted[k]) for k in found.index]
    colors = colors_of([name for one in labels for name in one[:1]])
    points = [
        {
            "x": round(10 + float(x) * (WIDTH - 20), 1),
            "y": round(10 + float(y) * (HEIGHT - 20), 1),
            "label": ", ".join(label) or "none",
            "predicted": ", ".join(name) or "none",
            "path": catalog.paths[row],
            "wrong": bool(is_wrong),
            "tile": tiles.get(int(row)),
        }
        for (x, y), label, name, row, is_wrong in zip(
            found.xy, labels, names, rows.tolist(), wrong, strict=True
        )
    ]
    is_other = any(point[key] not in colors for point in points for key in ("label", "predicted"))
    return {
        "sentence": f"Each point is one of {len(rows)} images; neighbors look alike to the"
        " backbone. Points with a dark ring are predicted wrong. Distances between far groups mean"
        " nothing.",
        "legend": [*colors.items(), *([("other", OTHER_COLOR)] if is_other else [])],
        "data": {
            "width": WIDTH,
            "height": HEIGHT,
            "side": TILE_SIDE,
            "columns": TILE_COLUMNS,
            "sheet": sheet.uri if sheet else "",
            "colors": colors,
            "other": OTHER_COLOR,
            "points": points,
        },
    }


def colors_of(labels: Sequence[str]) -> dict[str, str]:
    """A color for each of the most frequent labels, in the order of names."""
    names, counts = np.unique(np.array(labels, object).astype(str), return_counts=True)
    frequent = sorted(names[np.argsort(-counts, kind="stable")[: len(COLORS)]].tolist())
    return dict(zip(frequent, COLORS, strict=False))
