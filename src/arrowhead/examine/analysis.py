"""What a report finds in the data: wrong labels, duplicates, slices, outliers, faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from arrowhead import fileio
from arrowhead.bundle import format as bundle_format
from arrowhead.data.catalog import Catalog
from arrowhead.errors import ConfigError
from arrowhead.examine import duplicates as examine_duplicates
from arrowhead.examine import faults, outliers, sections, slices, tables
from arrowhead.examine import label_errors as examine_label_errors
from arrowhead.examine.config import ExamineConfig
from arrowhead.examine.duplicates import Duplicates
from arrowhead.examine.faults import FaultKind
from arrowhead.examine.image_properties import (
    ImagePropertiesConfig,
    properties_of,
    sample_rows,
)
from arrowhead.examine.label_errors import LabelErrors
from arrowhead.examine.originals import Pixels
from arrowhead.examine.outliers import Outliers
from arrowhead.examine.poor_images import PoorImages, find_poor_images
from arrowhead.examine.predictions import Predictions
from arrowhead.examine.report_cache import ReportCache
from arrowhead.examine.slices import HeldOutImages, SliceReport
from arrowhead.features.store import Store

MAX_SINGLE_THREAD_IMAGES = 5_000


@dataclass(kw_only=True, slots=True)
class Analysis:
    """The results; None for what was not wanted or not possible."""

    label_errors: LabelErrors | None = None
    duplicates: Duplicates | None = None
    slices: SliceReport | None = None
    outliers: Outliers | None = None
    poor_images: PoorImages | None = None
    faults: list[FaultKind] = field(default_factory=list)

    def rows_to_show(self, catalog: Catalog, predictions: Predictions) -> list[int]:
        """The rows of the catalog whose pictures the sections show."""
        rows: list[int] = []
        if self.label_errors:
            shown = sections.shown_label_errors(self.label_errors)
            rows += self.label_errors.row[shown].tolist()
        if self.duplicates:
            for group in sections.shown_groups(self.duplicates, catalog):
                rows += group.rows[: sections.MAX_GROUP_CARDS].tolist()
        if self.slices:
            rows += sections.shown_slice_rows(self.slices, predictions)
        if self.outliers:
            rows += sections.shown_outliers(self.outliers)
        if self.poor_images:
            rows += [row for row, _ in sections.shown_poor_images(self.poor_images)]
        return rows


def analyze_features(
    result: Analysis, store: Store, config: ExamineConfig, on_step: Callable[[str], None]
) -> None:
    """Add the analyses that need no original; on_step: called when one begins."""
    on_step("looking for unusual images")
    if (store.features(rows_only=True).split == "train").any():
        result.outliers = outliers.find_outliers(store)
    result.faults = faults.find_faults(store)


def rows_to_measure(
    predictions: Predictions, mask: NDArray[np.bool_] | None = None
) -> NDArray[np.int64]:
    """The rows of the catalog whose properties are measured: a sample of (some of) the images."""
    chosen = slice(None) if mask is None else mask
    return sample_rows(
        predictions.row[chosen], predictions.image_id[chosen], ImagePropertiesConfig().max_images
    )


def analyze_pixels(
    result: Analysis,
    store: Store,
    catalog: Catalog,
    predictions: Predictions,
    config: ExamineConfig,
    pixels: Pixels,
    cache: ReportCache,
    on_step: Callable[[str], None],
) -> None:
    """Add the analyses that need originals, or what these say; pixels: what was read of them."""
    if config.duplicates:
        on_step("looking for duplicates")
        read = pixels.grey.__getitem__ if pixels.grey else None
        with _few_threads(store):
            result.duplicates = examine_duplicates.find_duplicates(
                store, catalog, read=read, near=cache.near_copies()
            )
    if config.label_errors:  # after the duplicates: near copies must not judge each other
        on_step("looking for wrong labels")
        groups = result.duplicates.groups if result.duplicates else []
        near = [group.rows for group in groups if group.kind == "near"]
        with _few_threads(store), suppress(ConfigError):  # too few classes or images to judge
            result.label_errors = examine_label_errors.find_label_errors(store, near)
    if config.slices and predictions.held_out.any():
        on_step("comparing slices")
        images = HeldOutImages.from_predictions(predictions)
        rows = rows_to_measure(predictions, predictions.held_out)
        measured = properties_of(catalog, rows, pixels.measured)
        result.slices = slices.examine_slices(catalog, images, measured=measured)
    measured = properties_of(catalog, rows_to_measure(predictions), pixels.measured)
    result.poor_images = find_poor_images(measured)
    # Of a file that could not be read, turned copies were not found.
    complete = all(grey is not None for grey in pixels.grey.values())
    cache.write(pixels.measured, result.duplicates if complete else None)


@contextmanager
def _few_threads(store: Store) -> Iterator[None]:
    """Compute with one thread if there are few images: threads would wait more than they work."""
    from threadpoolctl import threadpool_limits

    if len(store.image_ids()) > MAX_SINGLE_THREAD_IMAGES:
        yield
        return
    with bundle_format.single_thread(), threadpool_limits(1):
        yield


def write_tables(
    result: Analysis, folder: Path, store: Store, catalog: Catalog, previous: Path
) -> None:
    """Write the results as tables; lists to edit or to pass to a command directly in `folder`.

    previous: the report that this one replaces. Its drop.txt goes on: files that were left out by
    it are no longer found.
    """
    if result.label_errors:
        examine_label_errors.write_csv(result.label_errors, catalog, folder / "label_errors.csv")
        rows = examine_label_errors.table(result.label_errors, catalog)
        tables.write_parquet(folder / "label_errors.parquet", rows)
    if result.duplicates and result.duplicates.groups:
        examine_duplicates.write_csv(result.duplicates, catalog, folder / "duplicates.csv")
        rows = examine_duplicates.table(result.duplicates, catalog)
        tables.write_parquet(folder / "duplicates.parquet", rows)
        examine_duplicates.write_drop_list(result.duplicates, catalog, folder / "drop.txt")
    _keep_drop_list(previous / "drop.txt", folder / "drop.txt")
    if result.slices:
        tables.write_table(folder / "tables", "slices", result.slices.table())
    if result.outliers:
        tables.write_table(folder / "tables", "outliers", result.outliers.table(catalog))
    tables.write_table(folder / "tables", "faults", faults.fault_table(store))


def _keep_drop_list(old: Path, new: Path) -> None:
    """Put the lines of an earlier drop list before those of a new one, which may not exist."""
    if not old.is_file():
        return
    lines = old.read_text("utf-8").splitlines()
    found = new.read_text("utf-8").splitlines() if new.is_file() else []
    with fileio.atomic_write(new) as draft:
        draft.write_text("\n".join(dict.fromkeys([*lines, *found])) + "\n", "utf-8")
