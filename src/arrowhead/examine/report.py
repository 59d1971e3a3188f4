"""The report of a bundle on a store: one page, its charts and tables in a folder.

    store, bundle -> predictions -> galleries, mistakes, curves, a map
                  -> the rows to show -> thumbnails and heatmaps of those rows only
                  -> report.html, figures/, tables/, report.json

Predictions, labels, outliers and the map come from the stored features. Originals are read small
and once: those that the page shows, up to 2,000 for the slices and as many for poor images, and up
to 20,000 for the search for copies. Two kinds are read again: the copies, poor images and slices
that are found, to show them, and up to 96 pictures in full, for their heatmaps.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from arrowhead import __version__, fileio
from arrowhead.bundle import format as bundle_format
from arrowhead.data.catalog import Catalog
from arrowhead.examine import (
    charts,
    curves,
    figures,
    findings,
    galleries,
    mistakes,
    page,
    predictions,
    sections,
    tables,
)
from arrowhead.examine.analysis import (
    Analysis,
    analyze_features,
    analyze_pixels,
    rows_to_measure,
    write_tables,
)
from arrowhead.examine.before_after import compare_with_previous
from arrowhead.examine.cards import CardMaker, Heat
from arrowhead.examine.config import ExamineConfig
from arrowhead.examine.content import Content
from arrowhead.examine.duplicates import rows_to_compare
from arrowhead.examine.findings import Finding
from arrowhead.examine.galleries import Gallery
from arrowhead.examine.header import make_header
from arrowhead.examine.heats import explain_rows
from arrowhead.examine.map_section import TILE_SIDE, map_section, pictured_rows
from arrowhead.examine.mistakes import ConfusedPair
from arrowhead.examine.originals import Originals, Pixels, Wanted, read_pixels
from arrowhead.examine.predictions import Predictions
from arrowhead.examine.report_cache import ReportCache
from arrowhead.features.store import Store

THUMBNAIL_SIDE = 320  # pixels, of the longer side
MAX_HEATMAPS = 96


class Report:
    """Builds the report of a bundle on a store.

    Args:
        store: The store.
        bundle: The bundle's folder.
        config: What the report contains.
        address: What the user calls the bundle; None for its folder.
        out: Where the report will be, for the commands that it shows.
        on_step: Called with a few words when a step begins.
    """

    def __init__(
        self,
        store: Path,
        bundle: Path,
        config: ExamineConfig = ExamineConfig(),
        address: str | None = None,
        out: Path = Path("REPORT"),
        on_step: Callable[[str], None] = lambda words: None,
    ) -> None:
        self.store, self.bundle_path, self.config = Store(store), bundle, config
        self.bundle = bundle_format.load(bundle)
        self.catalog = Catalog(**self.store.read_catalog())
        self.originals = Originals.of(self.store, self.catalog)
        self._on_step, self.address = on_step, address or str(bundle)
        self.out = out
        on_step("predicting from the stored features")
        self.predictions: Predictions = predictions.predict(self.store, self.bundle)
        self.metrics: dict[str, Any] = mistakes.evaluate(self.predictions)

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the report into an empty folder.

        Returns:
            Its summary, which is also written as report.json.
        """
        content = self._content(folder)
        self._on_step("writing the page")
        tables.write_predictions(folder / "tables", self.catalog, self.predictions)
        page.write(folder / "report.html", "report.html.j2", {"report": content})
        summary = self._summary(content)
        fileio.write_json(folder / "report.json", summary)
        return summary

    def _content(self, folder: Path) -> Content:
        predicted = self.predictions
        content = make_header(
            self.catalog,
            predicted,
            self.metrics,
            self.store.path,
            self.bundle_path,
            self.address,
            self.out,
        )
        confused = self._add_mistakes(content, folder)
        content.before_after = compare_with_previous(
            self.store, self.catalog, self.bundle_path, predicted
        )
        found = galleries.choose_galleries(predicted, self.config.pictures)
        in_galleries = dict.fromkeys(
            int(predicted.row[k]) for gallery in found for k in gallery.index
        )
        analysis = Analysis()
        analyze_features(analysis, self.store, self.config, self._on_step)
        cache = ReportCache(self.store)
        pixels = self._read_pixels(analysis, [*in_galleries], cache)
        analyze_pixels(
            analysis, self.store, self.catalog, predicted, self.config, pixels, cache, self._on_step
        )
        write_tables(analysis, folder, self.store, self.catalog, self.out)
        card_of = self._make_cards(content, [*in_galleries], analysis, pixels)
        self._add_galleries(content, found, card_of)
        said = self._add_sections(content, analysis, card_of)
        if self.config.map:
            self._on_step("drawing the map")
            content.map = map_section(self.store, self.catalog, predicted, pixels.tiles)
        self._on_step("drawing the curves")
        self._add_curves(content, folder)
        content.left_out = self._left_out()
        about_model = findings.model_findings(
            predicted, self.metrics, confused, len(self.catalog) - len(predicted)
        )
        content.first, content.also = findings.rank([*about_model, *said])
        return content

    def _read_pixels(
        self, analysis: Analysis, in_galleries: list[int], cache: ReportCache
    ) -> Pixels:
        """Read the originals once, for all that needs them and that no earlier report kept."""
        self._on_step("reading the originals")
        config, predicted = self.config, self.predictions
        measured = set(rows_to_measure(predicted).tolist())
        if config.slices:
            measured |= set(rows_to_measure(predicted, predicted.held_out).tolist())
        known = cache.properties(sorted(measured))
        compared = config.duplicates and cache.near_copies() is None
        wanted = Wanted(
            measured=sorted(measured - known.keys()),
            grey=rows_to_compare(self.store) if compared else (),
            thumbnails=[*in_galleries, *analysis.rows_to_show(self.catalog, predicted)],
            tiles=pictured_rows(predicted) if config.map else (),
        )
        pixels = read_pixels(self.originals, wanted, THUMBNAIL_SIDE, TILE_SIDE)
        pixels.measured |= known
        return pixels

    def _make_cards(
        self, content: Content, in_galleries: list[int], analysis: Analysis, pixels: Pixels
    ) -> CardMaker:
        """Read the pictures that the analyses found, and compute heatmaps for the galleries."""
        self._on_step("reading the pictures")
        shown = pixels.thumbnails
        in_sections = analysis.rows_to_show(self.catalog, self.predictions)
        wanted = Wanted(thumbnails=[row for row in in_sections if row not in shown])
        shown |= read_pixels(self.originals, wanted, THUMBNAIL_SIDE, TILE_SIDE).thumbnails
        heats: dict[int, Heat] = {}
        if self.config.heatmaps:
            self._on_step("computing where the model looked")
            explained = in_galleries[:MAX_HEATMAPS]
            heats, content.heat_sentence = explain_rows(self.bundle, self.originals, explained)
        content.has_heat = bool(heats)
        return CardMaker(self.catalog, self.predictions, shown, heats)

    def _add_sections(
        self, content: Content, analysis: Analysis, card_of: CardMaker
    ) -> list[Finding]:
        """Add the sections about the data; what they add to the findings."""
        catalog, predicted = self.catalog, self.predictions
        made = []
        if analysis.label_errors:
            classes = self.store.manifest()["classes"]
            section = sections.label_errors_section(
                analysis.label_errors, catalog, classes, str(self.store.path), card_of
            )
            content.label_errors = section.content
            made.append(section)
        if analysis.duplicates:
            section = sections.duplicates_section(
                analysis.duplicates, catalog, predicted, card_of, self._drop_command()
            )
            content.duplicates = section.content
            made.append(section)
        if analysis.slices:
            section = sections.slices_section(analysis.slices, predicted, card_of)
            content.slices = section.content
            made.append(section)
        if analysis.outliers:
            content.outliers = sections.outliers_section(
                analysis.outliers, catalog, card_of
            ).content
        if analysis.poor_images and analysis.poor_images.count:
            section = sections.poor_images_section(analysis.poor_images, catalog, card_of)
            content.poor_images = section.content
            made.append(section)
        section = sections.faults_section(analysis.faults, len(catalog))
        content.faults = section.content
        return [finding for one in (*made, section) for finding in one.findings]

    # -------------------------------------------------------------------------- sections

    def _add_mistakes(self, content: Content, folder: Path) -> list[ConfusedPair]:
        """Add the confusion matrix and the classes; the most confused pairs."""
        if not self.predictions.held_out.any():
            return []
        classes = self.bundle.classes
        if self.bundle.multi:
            pairs = mistakes.label_confusion(self.predictions)
            content.confusion = {"rows": None, "svg": None, "pairs": pairs}
        else:
            counts_CC = np.array(self.metrics["confusion"])
            pairs = mistakes.most_confused(counts_CC, classes)
            content.confusion = {"rows": None, "svg": None, "pairs": pairs, "classes": classes}
            if len(classes) <= mistakes.MAX_TABLE_CLASSES:
                content.confusion["rows"] = mistakes.confusion_rows(counts_CC, classes)
                chart = figures.confusion_figure(counts_CC, classes, "Held-out images")
            else:
                chart = charts.confusion_chart(counts_CC, classes)
                content.confusion["svg"] = charts.inline_svg(
                    chart, "confusion", "Confusion matrix; the table beside it names the worst."
                )
            _save(chart, folder, "confusion")
        tables.write_table(folder / "tables", "most_confused", [asdict(pair) for pair in pairs])
        lines = [{"name": name} | line for name, line in self.metrics["per_class"].items()]
        lines.sort(key=lambda line: (not line["images"], line["f1"]))
        tables.write_table(folder / "tables", "per_class", lines)
        content.per_class = lines[:200]
        content.per_class_caption = "The lowest F1 first" + (
            f"; 200 of {len(lines)} classes" if len(lines) > 200 else ""
        )
        return pairs

    def _add_galleries(self, content: Content, found: list[Gallery], card_of: CardMaker) -> None:
        shown_in: dict[int, list[str]] = {}
        for gallery in found:
            for position, index in enumerate(gallery.index.tolist()):
                shown_in.setdefault(index, []).append(f"{gallery.name}:{position}")
        content.galleries = found
        content.cards = [
            card_of(int(self.predictions.row[index]), galleries=names)
            for index, names in shown_in.items()
        ]

    def _drop_command(self) -> str:
        """The command that extracts and trains without copies."""
        source = self.catalog.source or self.catalog.root
        is_fit = self.store.path.name == "store"  # in the OUT of fit
        verb, out = ("fit", self.store.path.parent) if is_fit else ("precompute", self.store.path)
        return shlex.join(
            ["arrowhead", verb, source, str(out), "--drop", str(self.out / "drop.txt")]
        )

    def _left_out(self) -> str:
        """Which analyses were not wanted, in words."""
        wanted = self.config
        names = [
            name
            for name, done in (
                ("wrong labels", wanted.label_errors),
                ("duplicates", wanted.duplicates),
                ("slices", wanted.slices),
            )
            if not done
        ]
        return f"Not looked for: {', '.join(names)}." if names else ""

    def _add_curves(self, content: Content, folder: Path) -> None:
        for chart in curves.draw(self.predictions, self.metrics, self.bundle_path):
            svg = charts.inline_svg(chart.figure, chart.name, chart.caption)
            content.charts.append({"svg": svg, "caption": chart.caption})
            _save(chart.figure, folder, chart.name)

    def _summary(self, content: Content) -> dict[str, Any]:
        names = ("accuracy", "balanced_accuracy", "f2_samples", "ece", "auroc", "loss")
        return {
            "arrowhead": __version__,
            "store": str(self.store.path),
            "bundle": self.address,
            "bundle_fingerprint": bundle_format.fingerprint(self.bundle_path),
            "images": len(self.catalog),
            "held_out": int(self.predictions.held_out.sum()),
            "metrics": {name: self.metrics[name] for name in names if name in self.metrics},
            "first": [finding.text for finding in content.first],
            "also": [finding.text for finding in content.also],
        }


def _save(figure: Any, folder: Path, name: str) -> None:
    """Write a chart as figures/NAME.png and NAME.svg."""
    (folder / "figures").mkdir(exist_ok=True)
    for suffix in ("png", "svg"):
        figures.save(figure, folder / "figures" / f"{name}.{suffix}")
