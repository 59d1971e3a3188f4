"""The report of a bundle on a store: one page, its charts and tables in a folder.

    store, bundle -> predictions -> galleries, mistakes, curves, a map
                  -> the rows to show -> thumbnails and heatmaps of those rows only
                  -> report.html, figures/, tables/, report.json

Predictions, labels, outliers and the map come from the stored features. Originals are read small:
those that the page shows, up to 2,000 for the slices, and up to 20,000 for the search for copies.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import gmtime, strftime
from typing import Any

import numpy as np

from arrowhead import __version__, fileio
from arrowhead.bundle import format as bundle_format
from arrowhead.data.catalog import Catalog
from arrowhead.evaluation import metrics as evaluation_metrics
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
    thumbnails,
)
from arrowhead.examine.analysis import Analysis, analyze, write_tables
from arrowhead.examine.before_after import compare_with_previous
from arrowhead.examine.cards import CardMaker, Heat
from arrowhead.examine.config import ExamineConfig
from arrowhead.examine.findings import Finding
from arrowhead.examine.galleries import Gallery
from arrowhead.examine.heats import explain_rows
from arrowhead.examine.map_section import map_section
from arrowhead.examine.predictions import Predictions
from arrowhead.features.store import Store
from arrowhead.wording import pluralize

THUMBNAIL_SIDE = 320  # pixels, of the longer side
MAX_HEATMAPS = 96


@dataclass(kw_only=True, slots=True)
class Content:
    """What the template report.html.j2 shows; a section whose value is None is left out."""

    title: str
    subtitle: str
    classes: list[str]
    multi: bool
    command: str
    about: list[tuple[str, str]]
    version: str = __version__
    first: list[Finding] = field(default_factory=list)
    also: list[Finding] = field(default_factory=list)
    left_out: str = ""
    tiles: list[dict[str, str]] = field(default_factory=list)
    held_out_sentence: str = ""
    galleries: list[Gallery] = field(default_factory=list)
    cards: list[Any] = field(default_factory=list)
    has_heat: bool = False
    heat_sentence: str = ""
    confusion: dict[str, Any] | None = None
    per_class: list[dict[str, Any]] = field(default_factory=list)
    per_class_caption: str = ""
    label_errors: dict[str, Any] | None = None
    before_after: dict[str, Any] | None = None
    duplicates: dict[str, Any] | None = None
    slices: dict[str, Any] | None = None
    outliers: dict[str, Any] | None = None
    poor_images: dict[str, Any] | None = None
    faults: dict[str, Any] | None = None
    map: dict[str, Any] | None = None
    charts: list[dict[str, str]] = field(default_factory=list)

    @property
    def sections(self) -> list[tuple[str, str]]:
        """Anchor and name of each section that is there."""
        named = [
            ("pictures", "Pictures", self.cards),
            ("mistakes", "Mistakes", self.confusion),
            ("before", "Before and after", self.before_after),
            ("labels", "Labels", self.label_errors),
            ("duplicates", "Duplicates", self.duplicates),
            ("slices", "Slices", self.slices),
            ("unusual", "Unusual", self.outliers or self.faults),
            ("map-section", "Map", self.map),
            ("charts", "Curves", self.charts),
        ]
        return [(anchor, name) for anchor, name, shown in named if shown] + [("about", "About")]


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
        content = self._header()
        self._add_mistakes(content, folder)
        content.before_after = compare_with_previous(
            self.store, self.catalog, self.bundle_path, self.predictions
        )
        analysis = analyze(self.store, self.catalog, self.predictions, self.config, self._on_step)
        write_tables(analysis, folder, self.store, self.catalog, self.out)
        found = galleries.choose_galleries(self.predictions, self.config.pictures)
        card_of = self._make_cards(content, found, analysis)
        self._add_galleries(content, found, card_of)
        said = self._add_sections(content, analysis, card_of)
        if self.config.map:
            self._on_step("drawing the map")
            content.map = map_section(self.store, self.catalog, self.predictions)
        self._on_step("drawing the curves")
        self._add_curves(content, folder)
        content.left_out = self._left_out()
        content.first, content.also = findings.rank([*self._findings(content), *said])
        return content

    def _make_cards(self, content: Content, found: list[Gallery], analysis: Analysis) -> CardMaker:
        """Read the pictures that the report shows, and compute the heatmaps of some of them."""
        self._on_step("reading the pictures")
        in_galleries = dict.fromkeys(
            int(self.predictions.row[k]) for gallery in found for k in gallery.index
        )
        in_sections = analysis.rows_to_show(self.catalog, self.predictions)
        rows = sorted({*in_galleries, *in_sections})
        shown = thumbnails.read_thumbnails(self.catalog, rows, THUMBNAIL_SIDE)
        heats: dict[int, Heat] = {}
        if self.config.heatmaps:
            self._on_step("computing where the model looked")
            explained = [*in_galleries][:MAX_HEATMAPS]
            heats, content.heat_sentence = explain_rows(self.bundle, self.catalog, explained)
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

    # ---------------------------------------------------------------------------- header

    def _header(self) -> Content:
        catalog, recipe = self.catalog, self.bundle.recipe
        held_out = int(self.predictions.held_out.sum())
        source = catalog.source or catalog.root
        name = source.rstrip("/").rpartition("/")[2] or source
        content = Content(
            title=f"{name}: what the model got wrong, and what the data got wrong",
            subtitle=f"{pluralize(len(catalog), 'image')}, {len(self.bundle.classes)} classes ·"
            f" {recipe.body}, {self.bundle.head} head · {strftime('%Y-%m-%d %H:%M', gmtime())} UTC",
            classes=self.bundle.classes,
            multi=self.bundle.multi,
            command=shlex.join(
                ["arrowhead", "examine", str(self.store.path), self.address, str(self.out)]
            ),
            about=[
                ("images", source),
                ("store", str(self.store.path.absolute())),
                ("bundle", self.address),
                ("fingerprint", bundle_format.fingerprint(self.bundle_path)),
                ("MLflow run", str(self.bundle.lineage.get("run_id") or "not recorded")),
                ("backbone", f"{recipe.body}, {recipe.size} pixels, {recipe.resize}"),
                ("classes", str(len(self.bundle.classes))),
            ],
        )
        train = int((self.predictions.split == "train").sum())
        content.held_out_sentence = (
            f"All pictures are of the {pluralize(held_out, 'held-out image')}: the model was not"
            f" trained on them, but on {pluralize(train, 'other image')}."
        )
        copies = int((self.predictions.split != "train").sum()) - held_out
        if copies:
            content.held_out_sentence += (
                f" {pluralize(copies, 'further validation or test image')}"
                f" {'are exact copies' if copies > 1 else 'is an exact copy'} of training images"
                " and not shown."
            )
        content.tiles = self._tiles(held_out)
        return content

    def _tiles(self, held_out: int) -> list[dict[str, str]]:
        found = self.metrics
        tiles = []
        if held_out and not self.bundle.multi:
            correct = round(found["accuracy"] * held_out)
            low, high = evaluation_metrics.wilson_interval(correct, held_out)
            note = f"{correct} of {held_out}, 95 % interval {low:.3f} to {high:.3f}"
            tiles.append(_tile("Accuracy", f"{found['accuracy']:.4f}", note))
            note = "mean recall of the classes"
            tiles.append(_tile("Balanced accuracy", f"{found['balanced_accuracy']:.4f}", note))
        elif held_out:
            note = f"mean over {held_out} held-out images"
            tiles.append(_tile("F2", f"{found['f2_samples']:.4f}", note))
        ece = self.bundle.metrics.get("ece")
        if ece is not None:
            note = f"temperature {self.bundle.temperature:.2f}"
            tiles.append(_tile("Calibration error", f"{ece:.3f}", note))
        faults = len(self.catalog) - len(self.predictions)
        tiles.append(
            _tile(
                "Images",
                f"{len(self.predictions):,}",
                f"and {pluralize(faults, 'unreadable file')}",
            )
        )
        return tiles

    # -------------------------------------------------------------------------- sections

    def _add_mistakes(self, content: Content, folder: Path) -> None:
        if not self.predictions.held_out.any():
            return
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

    # -------------------------------------------------------------------------- findings

    def _findings(self, content: Content) -> list[Finding]:
        predicted = self.predictions
        held_out = int(predicted.held_out.sum())
        if not held_out:
            text = (
                "The bundle was trained on all of these images: nothing here says how good it is."
            )
            return [Finding(1.0, text, "about", "About this report")]
        correct = int(predicted.correct[predicted.held_out].sum())
        wrong = held_out - correct
        text = f"{correct} of {pluralize(held_out, 'held-out image')} are right"
        pairs = content.confusion["pairs"] if content.confusion else []
        if wrong and pairs and not predicted.multi:
            text += (
                f"; the most frequent mistake: {pairs[0].label} taken for {pairs[0].predicted}"
                f" ({pluralize(pairs[0].images, 'image')})"
            )
        if faults := len(self.catalog) - len(predicted):
            text += f"; {pluralize(faults, 'file')} could not be read"
        found = [Finding(1.0, f"{text}.", "pictures", "Look at the mistakes")]
        weak = [line for line in self.metrics["per_class"].items() if line[1]["images"] >= 10]
        if weak and not predicted.multi:
            name, line = min(weak, key=lambda one: one[1]["recall"])
            if line["recall"] < 0.9:
                text = f"Of the images of {name} only {100 * line['recall']:.0f} % are recognized."
                found.append(Finding(0.35, text, "mistakes", "See the classes"))
        return found

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


def _tile(label: str, value: str, note: str) -> dict[str, str]:
    return {"label": label, "value": value, "note": note}


def _save(figure: Any, folder: Path, name: str) -> None:
    """Write a chart as figures/NAME.png and NAME.svg."""
    (folder / "figures").mkdir(exist_ok=True)
    for suffix in ("png", "svg"):
        figures.save(figure, folder / "figures" / f"{name}.{suffix}")
