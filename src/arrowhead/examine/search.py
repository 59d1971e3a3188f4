"""Find the images of a store that are most similar to given images.

    a file, or a path of the catalog     -> read_queries    features of the queries
    the features of the store, in blocks -> most_similar    rows and similarities, best first

Similarity is the cosine of standardized features, as in `evaluation.novelty`: each number minus its
mean over the store, divided by its standard deviation there. bench/search.py compares this with
plain, centred and whitened features, which differ little.

The store is read once for the means and once for the similarities, one shard at a time, so memory
holds a few numbers per image.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead import spreadsheet
from arrowhead.bundle import replay
from arrowhead.data import path_text, reading
from arrowhead.data.catalog import Catalog
from arrowhead.errors import ConfigError
from arrowhead.evaluation.novelty import MIN_STD
from arrowhead.features import extract
from arrowhead.features.extract import ExtractConfig
from arrowhead.features.store import Features, Store
from arrowhead.output_paths import expand_user

DECIMALS = 5  # of a similarity
BATCH_SIZE = 32  # query files that are decoded together
NOT_FOUND = "unreadable: No such file or directory"
CSV_HEADER = ("query", "rank", "similarity", "path", "labels", "split", "exact_copy")


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """How many images to find, and where to write them."""

    top: int = 20
    """Number of images to find for each query."""
    csv: Path | None = None
    """File or URI for the result as CSV."""
    out: Path | None = None
    """File or URI for the result as a page with pictures (.html)."""

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ConfigError(f"--top is {self.top}.", "1 or more.", "raise it.")
        if self.out and self.out.suffix.lower() not in (".html", ".htm"):
            raise ConfigError(
                f"--out is {self.out}.", "a file ending in .html.", "give e.g. similar.html."
            )


@dataclass(kw_only=True, slots=True)
class Query:
    """An image to find similar ones for.

    Attributes:
        name: As the user gave it.
        row: Its row, if it is an image of the store; it is not among its own results.
        twin: The row of an image of the same content, whose feature is used; -1 if there is none.
        image_id: The first 8 bytes of its image id, big endian; -1 if unknown.
        feature: float32 (D,); None until it is known, or at a fault.
        fault: Why it cannot be used.
        note: A remark for the user.
    """

    name: str
    row: int = -1
    twin: int = -1
    image_id: int = -1
    feature: NDArray[np.float32] | None = None
    fault: str | None = None
    note: str = ""
    data: bytes = field(default=b"", repr=False)


def search(path: Path, images: Sequence[str], config: SearchConfig) -> dict[str, Any]:
    """Find the most similar images of a store for each of some images.

    Args:
        path: The store.
        images: Files, or paths in the store's catalog, which need not exist any more.
        config: How many, and where to write them.

    Returns:
        For JSON: store, root (the folder of its images), counts {inputs, answered, faults} of the
        queries, notes, and queries: each {query, path (in the store, or None), fault, similar}.
        similar has, best first, {rank, similarity (-1 to 1), path, labels, split, exact_copy}.

    Raises:
        ConfigError: There is no query, or no image in the store.
        DataError: The store is damaged.
    """
    if not images:
        raise ConfigError(
            "No image is given to search for.",
            "one or more files, or paths of images in the store.",
            f"run e.g. `arrowhead search {path} photo.jpg`.",
        )
    store = Store(path)
    known = store.features(rows_only=True)
    queries = read_queries(store, known, images)
    similar = _answer(store, known, queries, config.top)
    rows = np.array([one.row for one in queries if one.row >= 0], np.int64)
    own = Catalog(**store.read_catalog(rows))
    path_by_row = dict(zip(rows.tolist(), own.paths, strict=True))
    faults = sum(one.fault is not None for one in queries)
    counts = {"inputs": len(queries), "answered": len(queries) - faults, "faults": faults}
    result = {
        "store": str(path),
        "root": own.root,
        "counts": counts,
        "notes": [one.note for one in queries if one.note],
        "queries": [
            {
                "query": query.name,
                "path": path_by_row.get(query.row),
                "fault": query.fault,
                "similar": found,
            }
            for query, found in zip(queries, similar, strict=True)
        ],
    }
    if config.csv:
        write_csv(config.csv, result)
    return result


def _answer(
    store: Store, known: Features, queries: Sequence[Query], top: int
) -> list[list[dict[str, Any]]]:
    """The images found for each query, as JSON; none for a query with a fault."""
    features = [one.feature for one in queries if one.feature is not None]
    if not features:
        return [[] for _ in queries]
    # One more than asked for: an image of the store is not among its own results.
    found = zip(*most_similar(store, np.stack(features), top + 1, known), strict=True)
    return [
        [] if query.feature is None else _describe(store, known, query, *next(found), top)
        for query in queries
    ]


def _describe(
    store: Store,
    known: Features,
    query: Query,
    row_T: NDArray[np.int64],
    similarity_T: NDArray[np.float32],
    top: int,
) -> list[dict[str, Any]]:
    """The results of one query as JSON, without the query itself."""
    other_T = row_T != query.row
    row_T, similarity_T = row_T[other_T][:top], similarity_T[other_T][:top]
    id_T = known.image_id[np.searchsorted(known.row, row_T)]
    images = Catalog(**store.read_catalog(row_T))
    return [
        {
            "rank": at + 1,
            "similarity": float(similarity_T[at]),
            "path": images.paths[at],
            "labels": list(images.labels[at]),
            "split": images.splits[at],
            "exact_copy": int(id_T[at]) == query.image_id,
        }
        for at in range(len(images))
    ]


def write_csv(path: Path, result: Mapping[str, Any]) -> None:
    """Write the result of `search`, one row per image found; several labels are joined by |."""
    with spreadsheet.open_csv(path, CSV_HEADER) as sheet:
        for query in result["queries"]:
            for one in query["similar"]:
                labels, copy = "|".join(one["labels"]), int(one["exact_copy"])
                cells = [one["rank"], one["similarity"], one["path"], labels, one["split"], copy]
                sheet.row([query["query"], *cells])


# ------------------------------------------------------------------------------- nearest


@dataclass(frozen=True, slots=True)
class Standardizer:
    """Centres and scales features by a store's, and gives them length 1.

    mean, scale: float32 (D,); a number that hardly varies keeps its scale.
    """

    mean: NDArray[np.float32]
    scale: NDArray[np.float32]

    @staticmethod
    def fit(store: Store, known: Features) -> Standardizer:
        """Read the means and standard deviations of view 0 of the images without a fault."""
        total_D, square_D = np.zeros(store.recipe.width), np.zeros(store.recipe.width)
        for first, shard in _clean_shards(store):
            row = known.row[slice(*np.searchsorted(known.row, [first, first + len(shard)]))]
            feature_RD = shard[row - first].astype(np.float64)
            total_D += feature_RD.sum(0)
            square_D += (feature_RD**2).sum(0)
        mean_D = total_D / len(known.row)
        scale_D = np.sqrt(np.maximum(square_D / len(known.row) - mean_D**2, 0))
        scale_D[scale_D < MIN_STD] = 1
        return Standardizer(mean_D.astype(np.float32), scale_D.astype(np.float32))

    def __call__(self, feature_ND: NDArray[Any]) -> NDArray[np.float32]:
        """Standardized unit vectors, float32 (N, D)."""
        unit_ND: NDArray[np.float32] = (feature_ND.astype(np.float32) - self.mean) / self.scale
        unit_ND /= np.maximum(np.linalg.norm(unit_ND, axis=1, keepdims=True), 1e-12)
        return unit_ND


def _clean_shards(store: Store) -> Any:
    """Yield the first row and view 0 of every shard, float16 (R, D)."""
    first = 0
    for shard in store.mapped_features():
        yield first, shard[:, 0]
        first += len(shard)


def most_similar(
    store: Store, feature_QD: NDArray[Any], top: int, known: Features | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The images of a store whose features are most similar to some features.

    Args:
        store: The store; view 0 of its images is compared, those with a fault are left out.
        feature_QD: Features of the same recipe.
        top: How many images to find.
        known: `store.features(rows_only=True)`, if the caller has it already.

    Returns:
        Rows of the catalog, int64 (Q, T), and cosine similarities, float32 (Q, T), best first;
        equally similar images in catalog order. T is `top`, or less in a smaller store.

    Raises:
        ConfigError: The store has no image without a fault.
    """
    known = store.features(rows_only=True) if known is None else known
    if not len(known.row):
        raise ConfigError(
            f"{store.path} has no image that could be read.",
            "a store with features.",
            f"run `arrowhead features info {store.path}`: it shows the faults.",
        )
    standardize = Standardizer.fit(store, known)
    query_QD = standardize(np.asarray(feature_QD))
    row_QT = np.zeros((len(query_QD), 0), np.int64)
    similarity_QT = np.zeros((len(query_QD), 0), np.float32)
    for first, shard in _clean_shards(store):
        row = known.row[slice(*np.searchsorted(known.row, [first, first + len(shard)]))]
        # Rounded, so that equal features are equally similar whatever the size of their shard.
        similarity_QR = np.round(query_QD @ standardize(shard[row - first]).T, DECIMALS)
        row_QT = np.hstack([row_QT, np.broadcast_to(row, similarity_QR.shape)])
        similarity_QT = np.hstack([similarity_QT, similarity_QR])
        best_QT = np.argsort(-similarity_QT, axis=1, kind="stable")[:, :top]
        row_QT = np.take_along_axis(row_QT, best_QT, 1)
        similarity_QT = np.take_along_axis(similarity_QT, best_QT, 1)
    return row_QT, similarity_QT.clip(-1, 1)


# ------------------------------------------------------------------------------- queries


def read_queries(store: Store, known: Features, images: Sequence[str]) -> list[Query]:
    """The features of query images; one that cannot be read has a fault.

    A file is read; if the store has an image of the same content, its feature is used, else the
    file is decoded with the store's recipe. A path without a file is looked up in the catalog.

    Args:
        store: The store.
        known: `store.features(rows_only=True)`.
        images: As the user gave them.
    """
    places = [locate(name) for name in images]
    root = store.read_catalog(np.zeros(0, np.int64))["root"]
    below_root = f"{root.rstrip('/')}/"
    spellings = [
        [place.removeprefix(below_root)] * place.startswith(below_root)
        + [path_text.escape_path(os.fsencode(name)), name]
        for name, place in zip(images, places, strict=True)
    ]
    rows = store.find_paths([_as_text(one) for names in spellings for one in names])
    by_id = np.argsort(known.image_id, kind="stable")
    queries = []
    for name, place, names in zip(images, places, spellings, strict=True):
        row = next((rows[one] for one in names if one in rows), -1)
        data, fault = read_located(place)
        if fault and row >= 0:
            queries.append(_query_of_row(store, known, name, row))
        elif fault == NOT_FOUND:
            words = "neither a file nor the path of an image in the store"
            queries.append(Query(name=name, fault=f"unreadable: {words}"))
        elif fault:
            queries.append(Query(name=name, fault=fault))
        else:
            is_own = place.startswith(below_root)
            queries.append(_query_of_file(store, known, by_id, (name, data), row, is_own))
    stored = [one for one in queries if one.twin >= 0]
    twins = np.unique(np.array([one.twin for one in stored], np.int64))
    feature_by_row = dict(zip(twins.tolist(), store.clean_features(twins), strict=True))
    for query in stored:
        query.feature = feature_by_row[query.twin].astype(np.float32)
    _decode(store, [one for one in queries if one.feature is None and one.fault is None])
    return queries


def _as_text(name: str) -> str:
    """The text without surrogates, which Arrow cannot hold; no catalog has such a path."""
    return name.encode("utf-8", "replace").decode()


def locate(name: str) -> str:
    """The escaped absolute path or address of a query."""
    return path_text.resolve(os.fspath(expand_user(Path(name))) if name[:1] == "~" else name)


def read_located(place: str) -> tuple[bytes, str | None]:
    """The bytes of a query and None, or no bytes and the fault. place: from `locate`."""
    folder, _, leaf = place.rpartition("/")
    return reading.read_file(folder or "/", leaf, ExtractConfig().max_bytes)


def _query_of_row(store: Store, known: Features, name: str, row: int) -> Query:
    """A query for an image of the store, from its row."""
    position = int(np.searchsorted(known.row, row))
    if position == len(known.row) or known.row[position] != row:
        return Query(name=name, row=row, fault=f"in the store it has a fault: {store.fault(row)}")
    return Query(name=name, row=row, twin=row, image_id=int(known.image_id[position]))


def _query_of_file(
    store: Store,
    known: Features,
    by_id: NDArray[np.int64],
    file: tuple[str, bytes],
    row: int,
    is_own: bool,
) -> Query:
    """A query for a file that was read: with a twin if the store has an image of its content.

    Args:
        store: The store.
        known: Its images.
        by_id: The order of their ids.
        file: The query's name and content.
        row: Row of the catalog that has the query's path, or -1.
        is_own: Whether the file is the one that the row was made from.
    """
    name, data = file
    digest = hashlib.blake2b(data, digest_size=16).digest()
    image_id = int.from_bytes(digest[:8], "big")
    first, last = (
        int(np.searchsorted(known.image_id, np.uint64(image_id), side, sorter=by_id))
        for side in ("left", "right")
    )
    copies = known.row[by_id[first:last]].tolist()
    if not copies:
        note = ""
        if row >= 0 and (fault := store.fault(row)):
            note = f"{name}: in the store it has a fault ({fault}); the file is used"
        elif row >= 0:
            changed = "the file has changed since" if is_own else "it is another image than"
            note = f"{name}: {changed} the one in the store; the file is used"
        return Query(name=name, image_id=image_id, data=data, note=note)
    if row in copies:
        return _query_of_row(store, known, name, row)
    return Query(name=name, twin=copies[0], image_id=image_id)


def _decode(store: Store, queries: Sequence[Query]) -> None:
    """Fill in the feature or the fault of query files, computed with the store's recipe."""
    import torch

    if not queries:
        return
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    body = extract.load_body(store.recipe, store.weights_path, device)
    threads = len(os.sched_getaffinity(0))
    with replay.clean_decoder(store.recipe, device, threads, BATCH_SIZE) as decode:
        for start in range(0, len(queries), BATCH_SIZE):
            batch = queries[start : start + BATCH_SIZE]
            pixels = decode([one.data for one in batch], [bytes(16)] * len(batch))
            feature_QD = replay.features_of_pixels(body, pixels)
            for query, fault, feature_D in zip(batch, pixels.faults, feature_QD, strict=True):
                if fault is None and not np.isfinite(feature_D).all():
                    fault = "not finite: the body gave a number beyond float16"
                query.fault, query.data = fault, b""
                query.feature = feature_D if fault is None else None
