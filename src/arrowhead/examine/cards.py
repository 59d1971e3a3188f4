"""Cards: the pictures of a page with what is known of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from arrowhead.data.catalog import Catalog
from arrowhead.examine.predictions import Predictions
from arrowhead.examine.thumbnails import Thumbnail


@dataclass(frozen=True, slots=True)
class Heat:
    """A heatmap to lay over a thumbnail.

    Attributes:
        uri: The picture as a data: URI.
        left, top, width, height: Where it lies, in percent of the thumbnail.
    """

    uri: str
    left: float
    top: float
    width: float
    height: float


@dataclass(kw_only=True, slots=True)
class Card:
    """One picture.

    Attributes:
        path: Of the file, relative to the root of the images.
        thumbnail: None if the original cannot be read.
        heat: Where the model looked, if that was computed.
        label, predicted: Class names.
        wrong: Whether they differ.
        probability: Of the prediction.
        label_probability, loss, margin: See `Predictions`.
        split: train, valid or test.
        galleries: NAME:POSITION of each gallery that shows the picture.
        note, suggested, score: What a section says of it.
    """

    path: str
    thumbnail: Thumbnail | None
    heat: Heat | None = None
    label: list[str] = field(default_factory=list)
    predicted: list[str] = field(default_factory=list)
    wrong: bool = False
    probability: float = 0.0
    label_probability: float = 0.0
    loss: float = 0.0
    margin: float = 0.0
    split: str = ""
    galleries: list[str] = field(default_factory=list)
    note: str = ""
    suggested: str = ""
    score: float = 0.0

    @property
    def label_text(self) -> str:
        """The labels as a cell of a table."""
        return "|".join(self.label)


class CardMaker:
    """Makes cards for rows of a catalog.

    Args:
        catalog: The images.
        predictions: What a bundle predicts for them.
        thumbnails: Thumbnails by row.
        heats: Heatmaps by row.
    """

    def __init__(
        self,
        catalog: Catalog,
        predictions: Predictions,
        thumbnails: Mapping[int, Thumbnail | None],
        heats: Mapping[int, Heat],
    ) -> None:
        self._catalog, self._predictions = catalog, predictions
        self._thumbnails, self._heats = thumbnails, heats

    def __call__(self, row: int, **facts: Any) -> Card:
        """The card of a catalog row; facts: further fields of it."""
        predictions = self._predictions
        card = Card(
            path=self._catalog.paths[row],
            thumbnail=self._thumbnails.get(row),
            heat=self._heats.get(row),
            label=list(self._catalog.labels[row]),
            split=self._catalog.splits[row],
            **facts,
        )
        index = int(np.searchsorted(predictions.row, row))
        if index < len(predictions) and predictions.row[index] == row:
            card.predicted = predictions.names(predictions.predicted[index])
            card.wrong = not predictions.correct[index]
            card.probability = float(predictions.confidence[index])
            card.label_probability = float(predictions.label_probability[index])
            card.loss = float(predictions.loss[index])
            card.margin = float(predictions.margin[index])
        return card
