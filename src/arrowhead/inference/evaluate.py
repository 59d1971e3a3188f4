"""A bundle on labelled images: how good is it there?

    a folder or table, labelled   -> labelled   catalog, its labels among the bundle's classes
    score parts                   -> figures    every figure of `metrics.evaluate`
    figures                       -> write      evaluation.json, per_class.csv

The images are scored as `score` does it, with the probability of every class; the labels are
joined to the rows afterwards, so nothing about a label can reach a score.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
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
from arrowhead.inference.score_request import Request, ScoreConfig
from arrowhead.wording import counted

MAX_NAMES = 10  # in a refusal


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """What is evaluated, and how its images are scored."""

    split: Literal["train", "valid", "test"] | None = None
    """Only the images of this split; without, all of them."""
    ignore_unknown_classes: bool = False
    """Leave images out whose class the bundle does not know; without, they are refused."""
    store: Path | None = None
    """Feature store of the same recipe: images whose features it holds are not decoded."""
    max_drift: float = 0.005
    """Refuse when a golden image's feature is further than this cosine distance from what it was
    where the bundle was made."""
    max_pixels: int = 100_000_000
    """Images whose header claims more pixels are refused before they are decoded."""
    max_scans: int = 100
    """JPEGs with more scans are refused before they are decoded (usual progressive ones: 10)."""

    @property
    def scores(self) -> ScoreConfig:
        """The same as settings of a scoring."""
        return ScoreConfig(
            probabilities=True,
            store=self.store,
            max_drift=self.max_drift,
            max_pixels=self.max_pixels,
            max_scans=self.max_scans,
        )


# ------------------------------------------------------------------------------- labels


def listed(data: str | Path, source: SourceConfig) -> Catalog:
    """The files of `data`: CLASS/… or SPLIT/CLASS/…, or a table as `fit` takes it, whose labels are
    in the catalog already. Raises ConfigError for a source that is missing, empty or torn.
    """
    if tables.is_table(data):
        return sources.labelled(data, source, teaches=False)
    return sources.unlabelled(data, source)


def labelled(
    data: str | Path, catalog: Catalog, source: SourceConfig, config: EvaluateConfig, bundle: Bundle
) -> tuple[Catalog, list[str]]:
    """The images to evaluate with their labels, and sentences about what is left out.

    catalog: as `listed` gave it. Raises ConfigError where no image has a label or is of the split,
    where a label is unknown to the bundle, or where an image has several labels, or none, and the
    bundle gives one.
    """
    notes: list[str] = []
    if not tables.is_table(data):
        catalog, notes = _by_folder(catalog, bundle.classes)
    elif bundle.multi:
        catalog = _with_several_labels(data, catalog, source, bundle)
    if config.split:
        catalog = _kept(catalog, [split == config.split for split in catalog.splits])
        if not len(catalog):
            raise ConfigError(
                f"{data} has no image in the split {config.split}.",
                "images in train/, valid/ or test/, or a column split in a table.",
                "leave --split out to evaluate all images.",
            )
    if not bundle.multi:
        _must_have_one_label_each(str(data), catalog)
    catalog, unknown = _of_known_classes(str(data), catalog, config, bundle)
    if bundle.multi and not any(len(names) > 1 for names in catalog.labels):
        notes.append(
            "every image has one label at most, and the bundle gives several: a class that an image"
            " is not labelled with counts as absent from it"
        )
    return catalog, notes + unknown


def _with_several_labels(
    data: str | Path, catalog: Catalog, source: SourceConfig, bundle: Bundle
) -> Catalog:
    """The catalog of a table, its cells split into several labels where the bundle knows more of
    them then.
    """
    known = set(bundle.classes)
    if source.label_separator is not None or known.issuperset(catalog.classes):
        return catalog
    try:
        split = sources.labelled(data, replace(source, multi_label=True), teaches=False)
    except ConfigError:  # there is nothing to split
        return catalog
    one, several = (
        sum(name in known for names in found.labels for name in names) for found in (catalog, split)
    )
    return split if several > one else catalog


def _must_have_one_label_each(data: str, catalog: Catalog) -> None:
    for path, names in zip(catalog.paths, catalog.labels, strict=True):
        if len(names) != 1:
            raise ConfigError(
                f"{data} gives {path} "
                + (f"several labels: {_some(names)}." if names else "no label."),
                "one label for each image: the bundle gives one.",
                "evaluate a multi-label bundle, or correct the table.",
            )


def _by_folder(catalog: Catalog, classes: Sequence[str]) -> tuple[Catalog, list[str]]:
    """Labels and splits by the folders that images lie in: CLASS/… or SPLIT/CLASS/…

    Of the two the one that more images fit is taken.
    """
    known = set(classes)
    folders = [path.split("/")[:-1] for path in catalog.paths]
    roles = [(layouts.role(parts[0]) or "") if parts else "" for parts in folders]
    flat = sum(bool(parts) and parts[0] in known for parts in folders)
    deep = sum(
        len(parts) > 1 and bool(role) and parts[1] in known
        for parts, role in zip(folders, roles, strict=True)
    )
    if flat == deep == 0:
        tops = sorted({"/".join(parts[:2]) for parts in folders if parts})
        raise ConfigError(
            f"no folder in {catalog.root} is named after a class of the bundle: it has"
            f" {_some(tops) or 'none'}.",
            f"folders named {_some(sorted(known))}; or train/, valid/, test/ with such folders.",
            "rename the folders, or name images and labels in a table (.csv: path, label).",
        )
    depth = int(deep > flat)
    inside = [
        len(parts) > depth and (not depth or bool(role))
        for parts, role in zip(folders, roles, strict=True)
    ]
    labels: list[tuple[str, ...]] = [
        (parts[depth],) if fits else () for parts, fits in zip(folders, inside, strict=True)
    ]
    splits = roles if depth else [""] * len(catalog)
    out = len(inside) - sum(inside)
    notes = [f"left out: {counted(out, 'file')} outside of class folders"] if out else []
    return _kept(replace(catalog, labels=labels, splits=splits), inside), notes


def _of_known_classes(
    data: str, catalog: Catalog, config: EvaluateConfig, bundle: Bundle
) -> tuple[Catalog, list[str]]:
    known = set(bundle.classes)
    strange = Counter(name for names in catalog.labels for name in names if name not in known)
    if not strange:
        return catalog, []
    if not config.ignore_unknown_classes:
        raise ConfigError(
            f"{data} has {counted(strange.total(), 'image')} of classes that the bundle does not"
            " know:"
            f" {_some(sorted(strange))}.",
            f"its {len(known)} classes: {_some(bundle.classes)}.",
            "--ignore-unknown-classes leaves them out.",
        )
    note = f"left out: {counted(strange.total(), 'image')} of classes unknown to the bundle"
    if bundle.multi:  # only that label: what else the image shows is known
        labels = [tuple(name for name in names if name in known) for names in catalog.labels]
        note = (
            f"left out: {counted(strange.total(), 'label')} unknown to the bundle:"
            f" {_some(sorted(strange))}"
        )
        return replace(catalog, labels=labels), [note]
    kept = _kept(catalog, [known.issuperset(names) for names in catalog.labels])
    if not len(kept):
        raise ConfigError(
            f"{data} has no image of a class that the bundle knows.",
            f"its {len(known)} classes: {_some(bundle.classes)}.",
            "evaluate on images of these, or another bundle.",
        )
    return kept, [f"{note}: {_some(sorted(strange))}"]


def _kept(catalog: Catalog, mask: Sequence[bool]) -> Catalog:
    """Some of its rows."""
    if all(mask):
        return catalog
    mask_N = np.array(mask, bool)
    return replace(
        catalog,
        paths=list(compress(catalog.paths, mask)),
        labels=list(compress(catalog.labels, mask)),
        splits=list(compress(catalog.splits, mask)),
        sizes=catalog.sizes[mask_N],
        stamps=catalog.stamps[mask_N],
        tries=catalog.tries[mask_N],
        ignored=catalog.ignored + int((~mask_N).sum()),
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


def default_folder(bundle: str, data: str, catalog: Catalog) -> Path:
    """Where an evaluation goes when nobody says: the same for the same bundle, images and labels,
    so that a stopped one goes on.
    """
    note = Path(bundle) / "bundle.json"
    mark = fileio.sha256(note) if note.is_file() else bundle
    word = hashlib.blake2b(f"{mark} {catalog.digest()}".encode(), digest_size=3).hexdigest()
    stem = (
        Path(data.rstrip("/")).resolve().stem
        if "://" not in data
        else data.rstrip("/").rpartition("/")[2]
    )
    return Path(f"evaluation-{stem}-{word}")


# ------------------------------------------------------------------------------- figures


def figures(request: Request, bundle: Bundle) -> dict[str, Any]:
    """All that `metrics.evaluate` gives, of the scored images whose labels inputs.arrow holds;
    faults: images that could not be read, which are in no other figure.

    images_used: {trained_on, validated}, how many of the images the bundle was made of; None where
    it does not say. trusted: the same figures without the images that it was trained on, nor those
    it was validated with where others are left; None where all are left, or none. trusted_images:
    all, new (neither), validation (validated with), none, or unknown. tables_show: trusted, where
    there are such figures, else all: which of them per_class.csv and confusion.png have.

    Takes the memory of N x C float32. Raises DataError as `Request.tables` does.
    """
    index = {name: number for number, name in enumerate(bundle.classes)}
    probability_counts: list[NDArray[np.float32]] = []
    labels: list[NDArray[Any]] = []
    uses: list[NDArray[np.uint8]] = []
    faults = 0
    for table, files in request.tables(["probabilities", "fault", "image_id"]):
        well_N = table["fault"].is_null().to_numpy()
        probability_counts.append(scores_io.probabilities(table, bundle.classes)[well_N])
        label_NC = np.zeros((len(files), len(index)), np.uint8)
        for row, names in enumerate(files.labels):
            label_NC[row, [index[name] for name in names]] = 1
        labels.append(label_NC[well_N] if bundle.multi else label_NC[well_N].argmax(1))
        faults += int((~well_N).sum())
        if bundle.images:
            uses.append(bundle.images.use(table["image_id"].to_pylist())[well_N])
    prob_NC, label = np.concatenate(probability_counts), np.concatenate(labels)
    if not len(prob_NC):
        raise ConfigError(
            f"none of {counted(faults, 'image')} could be read.",
            "images with labels.",
            f"look at the faults in {request.out / 'parts'}.",
        )
    found = _judged(prob_NC, label, bundle) | {"faults": faults}
    if not bundle.images:
        none = {"images_used": None, "trusted": None, "tables_show": "all"}
        return found | none | {"trusted_images": "unknown"}
    use_N = np.concatenate(uses)
    counts = np.bincount(use_N, minlength=3)
    said = {"trained_on": int(counts[TRAINED]), "validated": int(counts[VALIDATED])}
    kind, keep_N = "all", np.ones(len(use_N), bool)
    if counts[NEW] < len(use_N):
        kind = "new" if counts[NEW] else "validation" if counts[VALIDATED] else "none"
        keep_N = use_N == (NEW if counts[NEW] else VALIDATED)
    some = keep_N.any() and not keep_N.all()
    trusted = _judged(prob_NC[keep_N], label[keep_N], bundle) if some else None
    shown = "trusted" if trusted else "all"
    return found | {
        "images_used": said,
        "trusted": trusted,
        "trusted_images": kind,
        "tables_show": shown,
    }


def for_tables(figures: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of the figures that `figures` gave those that tables and pictures have."""
    trusted: Mapping[str, Any] | None = figures["trusted"]
    return trusted or figures


def _judged(prob_NC: NDArray[np.float32], label: NDArray[Any], bundle: Bundle) -> dict[str, Any]:
    return metrics.evaluate(
        _logits(prob_NC, bundle),
        label,
        bundle.classes,
        temperature=bundle.temperature,
        thresholds=None if bundle.thresholds is None else np.array(bundle.thresholds),
    )


def _logits(prob_NC: NDArray[np.float32], bundle: Bundle) -> NDArray[np.float64]:
    """Logits that have these calibrated probabilities: the head's, up to a constant for each row.

    Probabilities are float32: what is 0 or 1 in them counts as the smallest or largest other value.
    """
    tiny, below_one = np.finfo(np.float32).tiny, float(np.nextafter(np.float32(1), np.float32(0)))
    wide_NC = np.clip(prob_NC.astype(np.float64), tiny, below_one if bundle.multi else 1.0)
    logit_NC: NDArray[np.float64] = np.log(wide_NC)
    if bundle.multi:
        logit_NC -= np.log1p(-wide_NC)
    return logit_NC * bundle.temperature


# ------------------------------------------------------------------------------- written


def write(out: Path, result: Mapping[str, Any]) -> None:
    """Write evaluation.json (`result`, see `evaluate`) and per_class.csv (of the images
    that the bundle was not made of, where there are such).
    """
    note, table = out / "evaluation.json", out / "per_class.csv"
    fileio.write_json(note, result)
    by_class = for_tables(result["metrics"])["per_class"]
    columns = list(next(iter(by_class.values())))
    with spreadsheet.writing(table, ["class", *columns]) as sheet:
        for name, line in by_class.items():
            sheet.row([name, *line.values()])
