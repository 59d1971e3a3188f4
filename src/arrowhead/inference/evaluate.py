"""Evaluates a bundle on labelled images.

    a folder or table with labels   -> attach_labels     catalog with labels and splits
    score parts                     -> compute_metrics   every metric of `metrics.evaluate`
    metrics                         -> write_results     evaluation.json, per_class.csv

The images are scored as `score` does it, with the probability of every class. Labels are joined to
the scores afterwards, so they cannot affect a score.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from arrowhead import fileio, spreadsheet
from arrowhead.bundle.format import Bundle
from arrowhead.bundle.known_images import NEW, TRAINED, VALIDATED
from arrowhead.data import layouts, sources, tables
from arrowhead.data.catalog import Catalog
from arrowhead.data.source_config import SourceConfig
from arrowhead.errors import ConfigError
from arrowhead.evaluation import metrics
from arrowhead.inference import scores_io
from arrowhead.inference.score_request import ScoreConfig, ScoreRequest
from arrowhead.wording import pluralize

MAX_NAMES = 10  # listed in a message


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Which images are evaluated, and how they are scored."""

    split: Literal["train", "valid", "test"] | None = None
    """Evaluate only the images of this split. Default: all."""
    ignore_unknown_classes: bool = False
    """Leave out images of classes that the bundle does not know, instead of an error."""
    tta: int = 0
    """Test-time augmentation: average the clean view of an image and this many augmented ones (see
    `score --tta`)."""
    store: Path | None = None
    """Feature store of the same recipe: images whose features it holds are not decoded."""
    max_drift: float = 0.005
    """Refuse to score if a golden image's feature here differs by more than this cosine distance
    from the one on the machine that made the bundle."""
    max_pixels: int = 100_000_000
    """Images whose header claims more pixels are refused before they are decoded."""
    max_scans: int = 100
    """JPEGs with more scans are refused before they are decoded (a progressive JPEG usually has
    10)."""

    @property
    def scores(self) -> ScoreConfig:
        """The corresponding settings of `score`."""
        return ScoreConfig(
            probabilities=True,
            tta=self.tta,
            store=self.store,
            max_drift=self.max_drift,
            max_pixels=self.max_pixels,
            max_scans=self.max_scans,
        )


# ------------------------------------------------------------------------------- labels


def list_images(data: str | Path, source: SourceConfig) -> Catalog:
    """List the images of a source; those of a table or of shards already with labels.

    data: a folder CLASS/… or SPLIT/CLASS/…, or a table or shards as `fit` takes them. Raises
    ConfigError for a source that is missing, empty or damaged.
    """
    if not tables.is_table(data):
        catalog = sources.unlabelled_catalog(data, source)
        if not catalog.containers:
            return catalog
    return sources.labelled_catalog(data, source, for_training=False)


def attach_labels(
    data: str | Path, catalog: Catalog, source: SourceConfig, config: EvaluateConfig, bundle: Bundle
) -> tuple[Catalog, list[str]]:
    """Select the images to evaluate, with their labels.

    Args:
        data: the folder or table.
        catalog: its images, from `list_images`.
        source: how to read a table.
        config: which images to select.
        bundle: the bundle to evaluate.

    Returns:
        The catalog, and messages about what is left out.

    Raises:
        ConfigError: no image has a label or is in the split, the bundle does not know a label, or
            an image has several labels or none while the bundle assigns exactly one.
    """
    notes: list[str] = []
    if not (tables.is_table(data) or catalog.containers):
        catalog, notes = _label_by_folder(catalog, bundle.classes)
    elif bundle.multi:
        catalog = _split_labels_if_better(data, catalog, source, bundle)
    if config.split:
        catalog = catalog.select([split == config.split for split in catalog.splits])
        if not len(catalog):
            raise ConfigError(
                f"{data} has no image in the split {config.split}.",
                "images in train/, valid/ or test/, or a column split in a table.",
                "leave --split out to evaluate all images.",
            )
    if not bundle.multi:
        _require_one_label_each(str(data), catalog)
    catalog, unknown_notes = _select_known_classes(str(data), catalog, config, bundle)
    if bundle.multi and not any(len(names) > 1 for names in catalog.labels):
        notes.append(
            "no image has more than one label, but the bundle assigns several: a class that is not"
            " among an image's labels counts as absent from the image"
        )
    return catalog, notes + unknown_notes


def _split_labels_if_better(
    data: str | Path, catalog: Catalog, source: SourceConfig, bundle: Bundle
) -> Catalog:
    """Read a table's label cells as lists of labels if the bundle then knows more of the labels."""
    known = set(bundle.classes)
    if source.label_separator is not None or known.issuperset(catalog.classes):
        return catalog
    try:
        split = sources.labelled_catalog(
            data, replace(source, multi_label=True), for_training=False
        )
    except ConfigError:  # the cells cannot be split
        return catalog
    known_unsplit, known_split = (
        sum(name in known for names in candidate.labels for name in names)
        for candidate in (catalog, split)
    )
    return split if known_split > known_unsplit else catalog


def _require_one_label_each(data: str, catalog: Catalog) -> None:
    for path, names in zip(catalog.paths, catalog.labels, strict=True):
        if len(names) != 1:
            raise ConfigError(
                f"{data} gives {path} "
                + (f"several labels: {_abbreviate(names)}." if names else "no label."),
                "one label for each image: the bundle assigns exactly one.",
                "evaluate a multi-label bundle, or correct the table.",
            )


def _label_by_folder(catalog: Catalog, classes: Sequence[str]) -> tuple[Catalog, list[str]]:
    """Take labels and splits from the images' folders: CLASS/… or SPLIT/CLASS/…

    The layout that more images fit is used. Returns the catalog and messages about what is left
    out.
    """
    known = set(classes)
    folders = [path.split("/")[:-1] for path in catalog.paths]
    splits = [(layouts.split_role(parts[0]) or "") if parts else "" for parts in folders]
    without_split = sum(bool(parts) and parts[0] in known for parts in folders)
    with_split = sum(
        len(parts) > 1 and bool(split) and parts[1] in known
        for parts, split in zip(folders, splits, strict=True)
    )
    if without_split == with_split == 0:
        names = sorted({"/".join(parts[:2]) for parts in folders if parts})
        raise ConfigError(
            f"no folder in {catalog.root} is named after a class of the bundle: it has"
            f" {_abbreviate(names) or 'none'}.",
            f"folders named {_abbreviate(sorted(known))}; or train/, valid/, test/ with such"
            " folders.",
            "rename the folders, or name images and labels in a table (.csv: path, label).",
        )
    depth = int(with_split > without_split)
    has_label = [
        len(parts) > depth and (not depth or bool(split))
        for parts, split in zip(folders, splits, strict=True)
    ]
    labels: list[tuple[str, ...]] = [
        (parts[depth],) if labelled else ()
        for parts, labelled in zip(folders, has_label, strict=True)
    ]
    if not depth:
        splits = [""] * len(catalog)
    left_out = len(has_label) - sum(has_label)
    notes = (
        [f"left out: {pluralize(left_out, 'file')} outside of class folders"] if left_out else []
    )
    return replace(catalog, labels=labels, splits=splits).select(has_label), notes


def _select_known_classes(
    data: str, catalog: Catalog, config: EvaluateConfig, bundle: Bundle
) -> tuple[Catalog, list[str]]:
    """Leave out images, or with several labels only labels, that the bundle does not know."""
    known = set(bundle.classes)
    unknown = Counter(name for names in catalog.labels for name in names if name not in known)
    if not unknown:
        return catalog, []
    names = _abbreviate(sorted(unknown))
    known_names = f"its {len(known)} classes: {_abbreviate(bundle.classes)}."
    images = pluralize(unknown.total(), "image")
    if not config.ignore_unknown_classes:
        raise ConfigError(
            f"{data} has {images} of classes that the bundle does not know: {names}.",
            known_names,
            "use --ignore-unknown-classes to leave them out.",
        )
    if bundle.multi:  # the image's other labels are still valid
        labels = [tuple(label for label in row if label in known) for row in catalog.labels]
        unknown_labels = pluralize(unknown.total(), "label")
        note = f"left out: {unknown_labels} unknown to the bundle: {names}"
        return replace(catalog, labels=labels), [note]
    selected = catalog.select([known.issuperset(names) for names in catalog.labels])
    if not len(selected):
        raise ConfigError(
            f"{data} has no image of a class that the bundle knows.",
            known_names,
            "evaluate on images of these classes, or use another bundle.",
        )
    return selected, [f"left out: {images} of classes unknown to the bundle: {names}"]


def _abbreviate(names: Sequence[str]) -> str:
    """The first names as a list in words, and how many more there are."""
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


def default_output_dir(bundle: str, data: str, catalog: Catalog, tta: int = 0) -> Path:
    """The folder of an evaluation for which none was given.

    It is the same for the same bundle, images, labels and --tta, so that a stopped evaluation
    continues.
    """
    bundle_json = Path(bundle) / "bundle.json"
    bundle_id = fileio.sha256(bundle_json) if bundle_json.is_file() else bundle
    key = f"{bundle_id} {catalog.digest()}" + (f" {tta}" if tta else "")
    suffix = hashlib.blake2b(key.encode(), digest_size=3).hexdigest()
    stem = (
        Path(data.rstrip("/")).resolve().stem
        if "://" not in data
        else data.rstrip("/").rpartition("/")[2]
    )
    return Path(f"evaluation-{stem}-{suffix}")


# ------------------------------------------------------------------------------- metrics


def compute_metrics(request: ScoreRequest, bundle: Bundle) -> dict[str, Any]:
    """Compute every metric of the scored images, whose labels are in inputs.arrow.

    Needs memory for N x C float32.

    Returns:
        All that `metrics.evaluate` returns, and
        faults: images that could not be read, which are in no other metric;
        images_used: {trained_on, validated}, how many of the images the bundle was made from; None
            if the bundle does not record that;
        trusted: the same metrics without images that the bundle was trained on, nor those that
            validated it if others are left; None if all images are left, or none;
        trusted_images: which those are: all, new (neither trained on nor validated with),
            validation, none, or unknown;
        tables_show: trusted, if there are such metrics, else all: what per_class.csv and
            confusion.png show.

    Raises:
        ConfigError: no image could be read.
        DataError: see `ScoreRequest.read_tables`.
    """
    prob_NC, label, use_N, faults = _join_labels(request, bundle)
    if not len(prob_NC):
        raise ConfigError(
            f"none of {pluralize(faults, 'image')} could be read.",
            "images with labels.",
            f"look at the faults in {request.output_dir / 'parts'}.",
        )
    result = _evaluate(prob_NC, label, bundle) | {"faults": faults}
    if use_N is None:
        unknown = {"images_used": None, "trusted": None, "tables_show": "all"}
        return result | unknown | {"trusted_images": "unknown"}
    counts = np.bincount(use_N, minlength=3)
    kind, trusted_N = "all", np.ones(len(use_N), bool)
    if counts[NEW] < len(use_N):
        kind = "new" if counts[NEW] else "validation" if counts[VALIDATED] else "none"
        trusted_N = use_N == (NEW if counts[NEW] else VALIDATED)
    is_proper_subset = trusted_N.any() and not trusted_N.all()
    trusted = _evaluate(prob_NC[trusted_N], label[trusted_N], bundle) if is_proper_subset else None
    return result | {
        "images_used": {
            "trained_on": int(counts[TRAINED]),
            "validated": int(counts[VALIDATED]),
        },
        "trusted": trusted,
        "trusted_images": kind,
        "tables_show": "trusted" if trusted else "all",
    }


def _join_labels(
    request: ScoreRequest, bundle: Bundle
) -> tuple[NDArray[np.float32], NDArray[Any], NDArray[np.uint8] | None, int]:
    """Probabilities (N, C), labels (N,) or (N, C), and use by the bundle (N,) of all scored images.

    The use (see `KnownImages.use`) is None if the bundle does not record it. The last value is the
    number of images with a fault, which are left out.
    """
    class_index = {name: index for index, name in enumerate(bundle.classes)}
    probabilities: list[NDArray[np.float32]] = []
    labels: list[NDArray[Any]] = []
    uses: list[NDArray[np.uint8]] = []
    faults = 0
    for table, files in request.read_tables(["probabilities", "fault", "image_id"]):
        ok_N = table["fault"].is_null().to_numpy()
        probabilities.append(scores_io.probabilities(table, bundle.classes)[ok_N])
        label_NC = np.zeros((len(files), len(class_index)), np.uint8)
        for row, names in enumerate(files.labels):
            label_NC[row, [class_index[name] for name in names]] = 1
        labels.append(label_NC[ok_N] if bundle.multi else label_NC[ok_N].argmax(1))
        faults += int((~ok_N).sum())
        if bundle.known_images:
            uses.append(bundle.known_images.lookup(table["image_id"].to_pylist())[ok_N])
    use_N = np.concatenate(uses) if bundle.known_images else None
    return np.concatenate(probabilities), np.concatenate(labels), use_N, faults


def reported_metrics(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of the result of `compute_metrics`, the metrics that tables and figures show."""
    trusted: Mapping[str, Any] | None = metrics["trusted"]
    return trusted or metrics


def _evaluate(prob_NC: NDArray[np.float32], label: NDArray[Any], bundle: Bundle) -> dict[str, Any]:
    return metrics.evaluate(
        _logits(prob_NC, bundle),
        label,
        bundle.classes,
        temperature=bundle.temperature,
        thresholds=None if bundle.thresholds is None else np.array(bundle.thresholds),
    )


def _logits(prob_NC: NDArray[np.float32], bundle: Bundle) -> NDArray[np.float64]:
    """Logits that give these calibrated probabilities: the head's, up to a constant per row.

    A probability of 0 or 1 is replaced by the nearest float32 inside that range.
    """
    tiny, below_one = np.finfo(np.float32).tiny, float(np.nextafter(np.float32(1), np.float32(0)))
    clipped_NC = np.clip(prob_NC.astype(np.float64), tiny, below_one if bundle.multi else 1.0)
    logit_NC: NDArray[np.float64] = np.log(clipped_NC)
    if bundle.multi:
        logit_NC -= np.log1p(-clipped_NC)
    return logit_NC * bundle.temperature


# ------------------------------------------------------------------------------- results


def write_results(out: Path, result: Mapping[str, Any]) -> None:
    """Write evaluation.json and per_class.csv.

    result: see `commands.score.evaluate`. The CSV shows the `reported_metrics`.
    """
    fileio.write_json(out / "evaluation.json", result)
    by_class = reported_metrics(result["metrics"])["per_class"]
    columns = list(next(iter(by_class.values())))
    with spreadsheet.open_csv(out / "per_class.csv", ["class", *columns]) as sheet:
        for name, values in by_class.items():
            sheet.row([name, *values.values()])
