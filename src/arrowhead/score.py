"""Images and a bundle to score files.

    unlabelled catalog     one row per file, in path order
      -> extract.Pump      features, by the recipe of the bundle
      -> head              calibrated probabilities; the labels they give
      -> part              one Parquet file per chunk, whole or absent
      -> score.json        counts, lineage, seconds by stage; written last

A part that is there is done: a stopped run goes on with the others.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead import ConfigError, DataError, __version__, extract, plan, shards
from arrowhead import bundle as bundles
from arrowhead.bundle import Bundle, Drift
from arrowhead.launch import Worker
from arrowhead.plan import Catalog


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreConfig:
    """What is written for each image."""

    top_k: int = 5
    """Labels listed per image, best first (at most the number of classes)."""
    probabilities: bool = False
    """Also write the probability of every class."""
    max_drift: float = 0.01
    """Refuse to score when a golden image's feature is further than this cosine distance from
    what it was where the bundle was made."""
    max_pixels: int = 100_000_000
    """Images whose header claims more pixels are refused before they are decoded."""
    max_scans: int = 100
    """JPEGs with more scans are refused before they are decoded (usual progressive ones: 10)."""

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ConfigError(f"--top-k is {self.top_k}.", "1 or more.", "give e.g. 5.")


def part(out: Path, number: int) -> Path:
    """Where the scores of one chunk lie; names sort in input order."""
    return out / f"part-{number:06d}.parquet"


def inputs(out: Path) -> Path:
    """The list of files that `out` holds the scores of."""
    return out / "inputs.arrow"


def score(
    worker: Worker, path: Path, out: Path, config: ScoreConfig, how: extract.ExtractConfig
) -> Drift:
    """Score every chunk this worker claims; the drift found before the first one.

    Raises DataError when the golden images come out differently here.
    """
    bundle = bundles.load(path)
    body, head = bundle.make_body(worker.device), bundle.make_head(worker.device)
    drift = bundles.replay(bundle, body, head, worker.device, worker.threads)
    _must_agree(drift, config)
    catalog = Catalog(**shards.read_catalog(inputs(out)))
    runs = plan.chunks(catalog.paths, how.chunk_size)
    mark = {
        "arrowhead.recipe": bundle.recipe.json(),
        "arrowhead.bundle": bundles.fingerprint(path),
        "arrowhead.run_id": str(bundle.lineage.get("run_id")),
        "arrowhead.version": __version__,
    }
    recipe = one_view(bundle.recipe)
    clean = replace(
        extract.pixels_of(recipe), max_pixels=config.max_pixels, max_scans=config.max_scans
    )
    claimed = ((number, runs[number]) for number in iter(worker.claim, None))
    with extract.Pump(worker, body, recipe, clean, how) as pump:
        for chunk in pump(catalog, claimed, extract.Known()):
            with pump.clock.stage("write"):
                scores = bundles.probabilities(
                    head, chunk.features[:, 0], bundle.temperature, multi=bundle.multi
                )
                columns = table(bundle, chunk, scores, config)
                shards.write_parquet(part(out, chunk.number), columns, mark)
            worker.report(chunk.counts() | {"seconds": pump.clock.read()})
    return drift


def one_view(recipe: shards.Recipe) -> shards.Recipe:
    """The recipe for scoring: images are seen once, clean, however many views trained the head."""
    return replace(recipe, views=1, augment="none", augment_seed=0)


def _must_agree(drift: Drift, config: ScoreConfig) -> None:
    if drift.changed or not drift.feature <= config.max_drift:
        raise DataError(
            f"The bundle's golden images come out differently on this machine: largest feature"
            f" drift {drift.feature:.2g}, {drift.changed} of {drift.images} labels changed.",
            f"a drift of at most {config.max_drift:g} and the same labels.",
            "check that decoder, weights and recipe are the bundle's. --max-drift allows more"
            " drift, but never other labels.",
        )


def table(
    bundle: Bundle, chunk: extract.Chunk, scores_NC: NDArray[np.float32], config: ScoreConfig
) -> dict[str, list[Any]]:
    """The columns of one part, with the types of `shards.write_parquet`.

    At a fault all but path, image_id and fault are None. Where an image may have several labels,
    `labels` are those it is given (see `Bundle.given`), and `label` is the most probable one, given
    or not. `probabilities`, on request, are in the order of the bundle's classes.
    """
    count = min(config.top_k, len(bundle.classes))
    order_NK = np.argsort(-scores_NC, axis=1, kind="stable")[:, :count]
    best_NK = np.take_along_axis(scores_NC, order_NK, 1).tolist()
    well = [fault is None for fault in chunk.faults]
    top = [
        [{"label": bundle.classes[i], "probability": p} for i, p in zip(*row, strict=True)]
        for row in zip(order_NK.tolist(), best_NK, strict=True)
    ]
    columns: dict[str, list[Any]] = {
        "label": [row[0]["label"] for row in top],
        "probability": [row[0]["probability"] for row in top],
    }
    if bundle.multi:
        columns["labels"] = [
            list(compress(bundle.classes, row)) for row in bundle.given(scores_NC).tolist()
        ]
    columns["top_k"] = top
    if config.probabilities:
        columns["probabilities"] = scores_NC.tolist()
    shown = {
        name: [value if fine else None for value, fine in zip(column, well, strict=True)]
        for name, column in columns.items()
    }
    return {"path": chunk.paths, "image_id": chunk.image_ids, **shown, "fault": chunk.faults}


def prepare(
    out: Path, path: Path, catalog: Catalog, config: ScoreConfig, chunk_size: int
) -> list[int]:
    """Make `out` ready for these inputs and settings; numbers of the parts that are missing.

    Raises ConfigError if `out` holds other scores.
    """
    asked = {
        "bundle": bundles.fingerprint(path),
        "inputs": catalog.digest(),
        "top_k": config.top_k,
        "probabilities": config.probabilities,
        "chunk_size": chunk_size,
    }
    note = out / "request.json"
    if note.is_file() and (found := shards.read_json(note)) != asked:
        differing = next(key for key in asked if found.get(key) != asked[key])
        raise ConfigError(
            f"{out} holds scores of another request: its {differing} differs.",
            "the same bundle, images and settings, to go on; or a new folder.",
            "give another OUT, or delete that folder.",
        )
    if not note.is_file():
        if out.is_dir() and any(out.iterdir()):
            raise ConfigError(
                f"{out} holds files that are not scores.",
                "a new or empty folder.",
                "give another OUT.",
            )
        out.mkdir(parents=True, exist_ok=True)
        shards.write_catalog(inputs(out), catalog.columns())
        shards.write_json(note, asked)
    count = len(plan.chunks(catalog.paths, chunk_size))
    return [number for number in range(count) if not part(out, number).is_file()]


def count_parts(
    out: Path, classes: list[str], catalog: Catalog, *, multi: bool = False
) -> dict[str, Any]:
    """What the parts of `out` hold: faults by kind, images by label.

    multi: an image counts under each label it is given; of a single-label bundle under its one.
    Raises DataError unless they hold every file of the catalog once, in its order.
    """
    paths, kinds, labels = [], Counter[str](), Counter[str](dict.fromkeys(classes, 0))
    for file in sorted(out.glob("part-*.parquet")):
        columns = shards.read_parquet(file, ["path", "labels" if multi else "label", "fault"])
        paths += columns["path"]
        kinds.update(fault.partition(":")[0] for fault in columns["fault"] if fault)
        if multi:
            labels.update(label for given in columns["labels"] for label in given or ())
        else:
            labels.update(label for label in columns["label"] if label is not None)
    if paths != catalog.paths:
        raise DataError(
            f"{out} holds {len(paths)} rows for {len(catalog)} files.",
            "one row per file, in the order of the files.",
            "run the same command again: it scores what is missing.",
        )
    return {"faults": dict(kinds), "labels": dict(labels)}
