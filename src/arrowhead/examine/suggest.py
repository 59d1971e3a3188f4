"""Choose which images of a store to label next.

    images without a label     minus those that the bundle was made from, and minus copies
      -> uncertainty           from the bundle's probabilities: the most uncertain are a shortlist
      -> k-means               of the shortlist, weighted by uncertainty: a cluster for each image
                               that is wanted
      -> suggestions           the image nearest the centre of each cluster

Uncertainty finds the images that the bundle would learn most from, and the clusters keep it from
choosing the same kind of image many times (Zhdanov, "Diverse mini-batch Active Learning",
arXiv:1901.05954). Without a bundle, all images are clustered: the suggestions then stand for what
the store holds. bench/suggest.py compares this with alternatives and with random images.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead import spreadsheet
from arrowhead.bundle import format as bundle_format
from arrowhead.bundle.format import Bundle
from arrowhead.data import table_parser
from arrowhead.errors import ConfigError
from arrowhead.examine.search import Standardizer
from arrowhead.features.store import Features, Store
from arrowhead.wording import join_first, pluralize

SHORTLIST = 25  # most uncertain images per image that is wanted
MAX_CLUSTERED = 20_000  # images at most; 100 MB with 1,280 numbers each
KMEANS_STARTS = 3
MIN_WEIGHT = 1e-6  # of an image in k-means, which cannot start from weights of 0
COLUMNS = ("path", "predicted", "probability", "why", "new_label")


@dataclass(frozen=True, kw_only=True, slots=True)
class SuggestConfig:
    """How many images to suggest, and where to write them."""

    count: int = 20
    """Number of images to suggest."""
    out: Path = Path("suggest.csv")
    """File or URI for the table of suggestions (path, predicted, probability, why, new_label). If
    it exists, the rows in which you have filled in new_label are kept, and their images count as
    labelled."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"--count is {self.count}.", "1 or more.", "raise it.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Suggestion:
    """An image to label. predicted, probability: the bundle's, None without one."""

    path: str
    predicted: str | None
    probability: float | None
    why: str


# ------------------------------------------------------------------------------ the command


def suggest(path: Path, bundle_path: Path | None, config: SuggestConfig) -> dict[str, Any]:
    """Suggest images to label, and write them to a table.

    Args:
        path: The store; images with a label are not suggested.
        bundle_path: The bundle of the labelled images; None before there is one.
        config: How many, and where to write them.

    Returns:
        For JSON: store, bundle, multi_label (of the bundle), root (the folder of the images),
        counts {unlabelled, candidates, suggested, kept}, notes, suggestions, and out.

    Raises:
        ConfigError: The store has no unlabelled image, the bundle has another recipe, or the file
            that would be replaced is not a table of suggestions.
        DataError: The store or the bundle is damaged.
    """
    kept = read_labelled_rows(config.out)
    store = Store(path)
    bundle = bundle_format.load(bundle_path) if bundle_path else None
    if bundle:
        ours, theirs = store.recipe.single_view(), bundle.recipe.single_view()
        ours.require_equal(theirs, str(path), str(bundle_path))
    known = store.features(rows_only=True)
    unlabelled = int((~_has_label(known)).sum())
    labelled_rows = store.find_paths([row["path"] for row in kept])
    candidate_M, notes = candidates(path, known, bundle, list(labelled_rows.values()))
    if strangers := [row["path"] for row in kept if row["path"] not in labelled_rows]:
        notes += _check_strangers(config.out, path, strangers, len(kept))
    if len(candidate_M) < config.count:
        notes.append(f"there is no more to suggest than {pluralize(len(candidate_M), 'image')}")
    suggestions = choose(store, known, candidate_M, bundle, config.count)
    if suggestions:
        _write(config.out, kept, suggestions)
    return {
        "store": str(path),
        "bundle": str(bundle_path) if bundle_path else None,
        "multi_label": bool(bundle and bundle.multi),
        "root": store.read_catalog(np.zeros(0, np.int64))["root"],
        "counts": {
            "unlabelled": unlabelled,
            "candidates": len(candidate_M),
            "suggested": len(suggestions),
            "kept": len(kept),
        },
        "notes": notes,
        "suggestions": [{name: getattr(one, name) for name in COLUMNS[:-1]} for one in suggestions],
        "out": str(config.out),
    }


def read_labelled_rows(path: Path) -> list[dict[str, str]]:
    """The rows of an earlier table of suggestions in which new_label is filled in.

    A spreadsheet may have saved it with other separators. Raises ConfigError for another file,
    which is not replaced; [] if there is none.
    """
    if not path.exists():
        return []
    text = table_parser.decode_text(str(path), path.read_bytes())
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    columns = [name.strip() for name in reader.fieldnames or []]
    if sorted(columns) != sorted(COLUMNS):  # other columns would be lost
        raise ConfigError(
            f"{path} exists and is not a table of suggestions: its columns are"
            f" {', '.join(columns)[:200] or 'none'}.",
            f"a new file, or one that `arrowhead suggest` wrote: {', '.join(COLUMNS)}.",
            "give another file with --out.",
        )
    reader.fieldnames = columns
    cells = [{name: (row.get(name) or "") for name in COLUMNS} for row in reader]
    return [
        {name: spreadsheet.original_text(cell) for name, cell in row.items()}
        for row in cells
        if row["path"] and row["new_label"].strip()
    ]


def _check_strangers(out: Path, store: Path, strangers: Sequence[str], kept: int) -> list[str]:
    """A note on the rows with a label whose images the store does not hold.

    Raises ConfigError if that is all of the rows: the table belongs to another store.
    """
    if len(strangers) == kept:
        raise ConfigError(
            f"{out} has {pluralize(kept, 'image')} with a new_label, and {store} holds none of"
            f" them, such as {strangers[0]}.",
            "the table of suggestions from this store.",
            "give another file with --out; nothing was changed.",
        )
    return [
        f"{pluralize(len(strangers), 'row')} of {out} with a new_label"
        f" {'name images' if len(strangers) > 1 else 'names an image'} that {store} does not hold:"
        f" {join_first(strangers)}. They are kept; remove them if these images are gone."
    ]


def _write(
    path: Path, kept: Sequence[Mapping[str, str]], suggestions: Sequence[Suggestion]
) -> None:
    with spreadsheet.open_csv(path, COLUMNS) as sheet:
        for row in kept:
            sheet.row([row[name] for name in COLUMNS])
        for one in suggestions:
            sheet.row([*(getattr(one, name) for name in COLUMNS[:-1]), None])


# ------------------------------------------------------------------------------- candidates


def _has_label(known: Features) -> NDArray[np.bool_]:
    """Whether each image of a store has a label, bool (n,)."""
    if not known.multi:
        return np.ones(len(known.row), bool)
    return np.asarray(known.label.any(axis=1), bool)


def candidates(
    path: Path, known: Features, bundle: Bundle | None, labelled_rows: Sequence[int] = ()
) -> tuple[NDArray[np.int64], list[str]]:
    """The images that may be suggested.

    Not those with a label, those that the bundle was trained or validated with, or copies of them;
    of several copies only the first.

    Args:
        path: The store, for messages.
        known: Its images, `store.features(rows_only=True)`.
        bundle: The bundle of the labelled images, if there is one.
        labelled_rows: Rows of the catalog that have been labelled elsewhere.

    Returns:
        Positions in `known`, ascending, and notes for the user.

    Raises:
        ConfigError: No image is without a label.
    """
    notes = []
    labelled_n = _has_label(known)
    if labelled_n.all():
        raise ConfigError(
            f"Every image of {path} has a label already.",
            "a store with images without a label.",
            "make one of the photos that nobody has labelled: `arrowhead precompute PHOTOS POOL"
            " --unlabelled`, with the same --body and --weights.",
        )
    labelled_n |= np.isin(known.row, np.array(labelled_rows, np.int64))
    used = [known.image_id[labelled_n]]
    if bundle and bundle.known_images:
        used += [bundle.known_images.train, bundle.known_images.valid]
    elif bundle:
        notes.append(
            "the bundle does not record its training images (version 0.1.0), so some of them may be"
            " suggested"
        )
    free_M = np.flatnonzero(~np.isin(known.image_id, np.concatenate(used)))
    _, first = np.unique(known.image_id[free_M], return_index=True)
    return free_M[np.sort(first)], notes


# ---------------------------------------------------------------------------------- choice


def choose(
    store: Store,
    known: Features,
    candidate_M: NDArray[np.int64],
    bundle: Bundle | None,
    count: int,
) -> list[Suggestion]:
    """Choose images to label: the most uncertain first, or without a bundle the most typical.

    Args:
        store: The store.
        known: Its images, `store.features(rows_only=True)`.
        candidate_M: Positions in `known` of the images to choose from, ascending.
        bundle: Gives the probabilities; None: the images are chosen by their features alone.
        count: How many; fewer if there are not as many candidates.
    """
    uncertainty_S = None
    if bundle:
        uncertainty_M = uncertainty(store, known.row[candidate_M], bundle)
        shortlist = max(count, min(SHORTLIST * count, MAX_CLUSTERED))
        order = np.sort(np.argsort(-uncertainty_M, kind="stable")[:shortlist])
        uncertainty_S = uncertainty_M[order]
    else:
        # A sample by content, if there are too many to cluster.
        order = np.sort(np.argsort(known.image_id[candidate_M], kind="stable")[:MAX_CLUSTERED])
    row_S = known.row[candidate_M[order]]
    feature_SD = store.clean_features(row_S)
    unit_SD = Standardizer.fit(store, known)(feature_SD)
    picked, size = spread(unit_SD, count, uncertainty_S)
    ranked = np.argsort(-(size if uncertainty_S is None else uncertainty_S[picked]), kind="stable")
    picked, size = picked[ranked], size[ranked]
    paths = store.read_catalog(row_S[picked])["paths"]
    if bundle is None:
        share = size / len(row_S)
        return [
            Suggestion(
                path=path,
                predicted=None,
                probability=None,
                why=f"typical of {100 * part:.0f} % of the images",
            )
            for path, part in zip(paths, share, strict=True)
        ]
    head = bundle.make_head()
    prob_PC = bundle_format.probabilities(
        head, feature_SD[picked], bundle.temperature, multi=bundle.multi
    )
    return [
        Suggestion(path=path, **_explain(bundle, prob_C))
        for path, prob_C in zip(paths, prob_PC, strict=True)
    ]


def uncertainty(store: Store, row_M: NDArray[np.int64], bundle: Bundle) -> NDArray[np.float64]:
    """How near the bundle is to another decision about each image, float64 (M,), 0 to 1.

    1 minus the bundle's margin: between the two most probable classes, or with several labels per
    image to the nearest threshold. Reads the store one shard at a time.
    """
    head = bundle.make_head()
    parts, first = [np.zeros(0)], 0
    for shard in store.mapped_features():
        row = row_M[slice(*np.searchsorted(row_M, [first, first + len(shard)]))]
        prob_RC = bundle_format.probabilities(
            head, shard[row - first, 0], bundle.temperature, multi=bundle.multi
        )
        parts.append(1 - bundle.margin(prob_RC))
        first += len(shard)
    return np.concatenate(parts)


def spread(
    unit_SD: NDArray[np.float32], count: int, weight_S: NDArray[Any] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose images that are unlike each other: those nearest the centres of k-means clusters.

    Args:
        unit_SD: Standardized unit features.
        count: Number of images; fewer if there are not as many.
        weight_S: How much each image counts for the centres, 0 or more; None: all the same.

    Returns:
        Positions of the images, and how many images are in the cluster of each.
    """
    if len(unit_SD) <= count:
        return np.arange(len(unit_SD)), np.ones(len(unit_SD), np.int64)
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    if weight_S is not None:
        weight_S = np.maximum(weight_S, MIN_WEIGHT)
    with threadpool_limits(1):  # sums in a fixed order: the same choice on every run
        model = KMeans(count, n_init=KMEANS_STARTS, random_state=0)
        distance_SK = model.fit(unit_SD, sample_weight=weight_S).transform(unit_SD)
    distance_S = distance_SK[np.arange(len(unit_SD)), model.labels_]
    order = np.lexsort((distance_S, model.labels_))
    _, first, size = np.unique(model.labels_[order], return_index=True, return_counts=True)
    return order[first], size


def _explain(bundle: Bundle, prob_C: NDArray[np.float32]) -> dict[str, Any]:
    """predicted, probability and why of one image, from its calibrated probabilities."""
    if bundle.multi:
        chosen_C = bundle.predict_labels(prob_C[None])[0]
        names = [name for name, chosen in zip(bundle.classes, chosen_C, strict=True) if chosen]
        threshold_C = np.array(bundle.thresholds or [0.5] * len(prob_C))
        nearest = int(np.abs(prob_C - threshold_C).argmin())
        why = (
            f"{bundle.classes[nearest]} {prob_C[nearest]:.2f} is near its threshold"
            f" {threshold_C[nearest]:.2f}"
        )
        return {"predicted": "|".join(names), "probability": float(prob_C[nearest]), "why": why}
    best = np.argsort(-prob_C, kind="stable")[:2]
    why = " or ".join(f"{bundle.classes[at]} {prob_C[at]:.2f}" for at in best)
    return {
        "predicted": bundle.classes[best[0]],
        "probability": float(prob_C[best[0]]),
        "why": why,
    }
