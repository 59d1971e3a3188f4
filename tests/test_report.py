"""Figures and tables show any class name unchanged."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from arrowhead.examine import figures

# Markup for matplotlib, formulas, HTML; then scripts missing from common fonts, and control bytes.
MARKUP_NAMES = ["$10_", "a_b$", "$\\frac{", "=1+1", "<b>x", "{}^_", "plain"]
UNUSUAL_NAMES = [
    *MARKUP_NAMES,
    "two\nlines",
    "\x1b[31mred",
    "חתול",
    "قطة",
    "猫",
    "🐈 cat",
    "x" * 200,
    "\udc80",
]


def tick_labels(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


@pytest.fixture(autouse=True)
def _warnings_as_errors() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_names_with_markup_are_plotted_literally(tmp_path: Path) -> None:
    counts = np.eye(len(MARKUP_NAMES), dtype=np.int64)
    figure = figures.confusion_figure(counts, MARKUP_NAMES)
    figures.save(figure, tmp_path / "confusion.png")
    (axes,) = figure.axes
    assert tick_labels(axes.xaxis) == tick_labels(axes.yaxis) == MARKUP_NAMES
    assert not any(label.get_parse_math() for label in axes.get_xticklabels())
    figure = figures.scores_figure(dict.fromkeys(MARKUP_NAMES, 3), np.arange(20), np.arange(20))
    figures.save(figure, tmp_path / "scores.png")
    assert tick_labels(figure.axes[0].yaxis) == MARKUP_NAMES


@pytest.mark.parametrize("count", [2, 12, 31, 200, 900])
def test_any_number_of_classes_is_plotted_with_distinguishable_labels(
    count: int, tmp_path: Path
) -> None:
    classes = [f"{number} {UNUSUAL_NAMES[number % len(UNUSUAL_NAMES)]}" for number in range(count)]
    figure = figures.confusion_figure(np.eye(count, dtype=np.int64), classes)
    (axes,) = figure.axes
    shown = tick_labels(axes.yaxis)
    assert len(set(shown)) == len(shown) == min(count, 180 if count == 900 else count)
    assert all(name.isprintable() and len(name) < 100 for name in shown)
    if count < 200:
        with Image.open(figures.save(figure, tmp_path / "confusion.png")) as image:
            assert max(image.size) < 4000
        assert [file.name for file in tmp_path.iterdir()] == ["confusion.png"]


def test_characters_without_a_glyph_stay_distinguishable() -> None:
    figure = figures.confusion_figure(np.eye(3, dtype=np.int64), ["\U000e0100a", "\U000f0000", "b"])
    assert tick_labels(figure.axes[0].yaxis) == ["\\U000e0100a", "\\U000f0000", "b"]


def test_tables_hold_numbers_and_escaped_names(tmp_path: Path) -> None:
    setting = {"seeds": [0, 1], "mean": 0.5, "spread": None, "valid_loss": 1.5}
    setting |= {"epochs": 4, "p": None}
    ranked = {"settings": [setting | {"knobs": {"rate": 1e-3, "class_weights": "=x"}}]}
    figures.grid_csv(ranked | {"figure": "accuracy"}, tmp_path / "grid.csv")
    header, line = (tmp_path / "grid.csv").read_text().splitlines()
    assert header == "rate,class_weights,seeds,accuracy,spread,valid_loss,epochs,p"
    assert line == "0.001,'=x,0 1,0.5,,1.5,4,"


def test_learning_curve_is_a_table_even_if_the_full_share_has_one_head(tmp_path: Path) -> None:
    points = [
        {"share": 0.5, "images": 10, "mean": 0.5, "spread": 0.1, "values": [0.4, 0.6]},
        {"share": 1.0, "images": 20, "mean": 0.7, "spread": None, "values": [0.7]},
    ]
    curve = {"points": points, "figure": "accuracy"}
    lines = figures.learning_csv(curve, tmp_path / "curve.csv").read_text().splitlines()
    assert lines[0] == "share,images,accuracy,spread,head_0,head_1"
    assert lines[1:] == ["0.5,10,0.5,0.1,0.4,0.6", "1.0,20,0.7,,0.7,"]


@pytest.mark.parametrize(("heads", "words"), [(1, "mean of 1 head"), (3, "mean of 3 heads")])
def test_learning_curve_states_its_number_of_heads(heads, words):
    points = [
        {"images": images, "mean": 0.5, "spread": None, "values": [0.5] * heads}
        for images in (10, 20)
    ]
    figure = figures.learning_figure({"points": points, "figure": "accuracy", "words": "better"})
    assert figure.axes[0].get_legend_handles_labels()[1] == [words]
