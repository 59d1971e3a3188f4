"""Scores images with a bundle and writes the score files.

    catalog                      one row per image, in input order; saved as inputs.arrow
      -> extract.FeaturePipeline features with the recipe of the bundle
      -> head                    calibrated probabilities, labels, novelty
      -> part                    one Parquet file per chunk, and its sha256 in a journal
      -> score.json              counts, lineage, seconds by stage, every part; written last

A part that is in the journal and has that sha256 is done; a stopped run continues with the others.
Memory does not grow with the number of images: workers read their rows from the memory-mapped
inputs.arrow, one chunk at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead import __version__, fileio, spreadsheet
from arrowhead.bundle import format as bundle_format
from arrowhead.bundle import replay, resolve, tta
from arrowhead.bundle.format import Bundle
from arrowhead.features import extract
from arrowhead.features.extract import Chunk, ExtractConfig, FeatureCache, FeaturePipeline
from arrowhead.features.store import Store
from arrowhead.inference import layout, score_request, scores_io
from arrowhead.inference.score_request import ScoreConfig, ScoreRequest
from arrowhead.inference.scores_io import Journal, Scores
from arrowhead.runtime.worker import Worker


def score(worker: Worker, request: ScoreRequest, extract_config: ExtractConfig) -> None:
    """Score every chunk that this worker takes.

    The bundle's golden images are replayed first and their drift is reported. Raises DataError if
    this machine computes other features or labels for them.
    """
    request = request.here()
    config, bundle_dir = request.config, resolve.folder_here(request.bundle)
    bundle = bundle_format.load(bundle_dir)
    body, head = bundle.make_body(worker.device), bundle.make_head(worker.device)
    if bundle.novelty:
        bundle = replace(bundle, novelty=bundle.novelty.to(worker.device))
    drift = replay.replay(bundle, body, head, worker.device, worker.threads)
    worker.report({"drift": asdict(drift)})
    replay.check_drift(drift, config.max_drift)
    metadata = {
        "arrowhead.recipe": bundle.recipe.to_json(),
        "arrowhead.bundle": bundle_format.fingerprint(bundle_dir),
        "arrowhead.run_id": str(bundle.lineage.get("run_id")),
        "arrowhead.version": __version__,
    }
    bundle = tta.with_views(bundle, config.tta, request.bundle)
    recipe = tta.scoring_recipe(bundle.recipe, config.tta)
    pixels = replace(
        extract.make_pixel_config(recipe), max_pixels=config.max_pixels, max_scans=config.max_scans
    )
    cache = FeatureCache.from_store(Store(config.store)) if config.store else FeatureCache()
    journal = Journal(layout.journal_dir(request.output_dir))
    chunks = ((number, request.part_files(number)) for number in iter(worker.next_task, None))
    with FeaturePipeline(worker, body, recipe, pixels, extract_config) as pipeline:
        for chunk in pipeline(chunks, cache):
            with pipeline.timer.stage("write"):
                views = chunk.features
                temperature = 1.0 if config.raw else bundle.temperature
                prob_NC = bundle_format.probabilities(
                    head, views if config.tta else views[:, 0], temperature, multi=bundle.multi
                )
                path = request.part_path(chunk.number)
                scores_io.write_scores(path, make_scores(bundle, chunk, prob_NC, config), metadata)
                part = scores_io.describe_part(
                    path,
                    chunk.number,
                    inputs=layout.hash_inputs(request.part_files(chunk.number)),
                    rows=len(chunk.paths),
                    faults=chunk.counts()["faults"],
                )
                request.files.upload(path)
                journal.append(part)
                request.files.upload(journal.path)
            extract.report_chunk(worker, chunk, pipeline.timer.take(), "scores_written")


def make_scores(
    bundle: Bundle, chunk: Chunk, prob_NC: NDArray[np.float32], config: ScoreConfig
) -> Scores:
    """Make the scores of one part from the probabilities of its images.

    Where an image may have several labels, `labels` are those that reach their threshold, and
    `label` is the most probable one even if it does not. The thresholds were fitted to calibrated
    probabilities, but with --raw they are applied to uncalibrated ones.
    """
    k = min(config.top_k, len(bundle.classes))
    novelty_N = novel_N = None
    if bundle.novelty:
        with bundle_format.single_thread():
            novelty_N = bundle.novelty.distances(chunk.features[:, 0])
        if config.flag_novel:
            novel_N = novelty_N > bundle.novelty.threshold(config.false_alarms)
    return Scores(
        classes=bundle.classes,
        paths=chunk.paths,
        image_ids=chunk.image_ids,
        faults=chunk.faults,
        top_index=np.argsort(-prob_NC, axis=1, kind="stable")[:, :k],
        probability=prob_NC,
        all_probabilities=config.probabilities,
        labels=bundle.predict_labels(prob_NC) if bundle.multi else None,
        novelty=novelty_N,
        novel=novel_N,
        feature=chunk.features[:, 0] if config.features else None,
    )


def write_csv(request: ScoreRequest, bundle: Bundle) -> Path:
    """Write all parts as one CSV file, complete or not at all; returns its path."""
    path = layout.csv_path(request.output_dir)
    names = ["image_id", "label", "probability"]
    names += ["labels"] if bundle.multi else []
    names += ["novelty"] if bundle.novelty else []
    names += ["novel"] if request.config.flag_novel else []
    names += ["fault"]
    classes = bundle.classes if request.config.probabilities else []
    header = ["path", *names, *(f"probability.{name}" for name in classes)]
    with spreadsheet.open_csv(path, header) as sheet:
        for columns in request.read_columns([*names, *(["probabilities"] if classes else [])]):
            for row in _csv_rows(columns, names, classes):
                sheet.row(row)
    return path


def _csv_rows(
    columns: dict[str, list[Any]], names: Sequence[str], classes: Sequence[str]
) -> Iterator[list[Any]]:
    """Rows with the columns `names`, then the probability of each of `classes`."""
    columns["image_id"] = [image_id.hex() for image_id in columns["image_id"]]
    if "labels" in columns:
        # A JSON list, which `data.tables` can read: class names may contain any character.
        columns["labels"] = [
            None if labels is None else json.dumps(labels, ensure_ascii=False)
            for labels in columns["labels"]
        ]
    if "novel" in columns:
        columns["novel"] = [None if flag is None else int(flag) for flag in columns["novel"]]
    for i, cells in enumerate(zip(*(columns[name] for name in ["path", *names]), strict=True)):
        by_class = columns["probabilities"][i] if classes else None
        yield [*cells, *(by_class[name] if by_class else None for name in classes)]


def write_summary(request: ScoreRequest, result: Mapping[str, Any], bundle: Bundle) -> None:
    """Write score.json: the result, and the hashes of every part, the inputs and scores.csv."""
    finished = request.finished_parts()
    parts = [finished[number] for number in range(len(request.part_rows))]
    content = dict(result) | {
        "format": scores_io.FORMAT,
        "classes": bundle.classes,
        "inputs_sha256": fileio.sha256(layout.inputs_path(request.output_dir)),
        "csv_sha256": score_request.csv_digest(request.output_dir),
        "parts": [
            {"name": part.name, "rows": part.rows, "bytes": part.bytes, "sha256": part.sha256}
            for part in parts
        ],
    }
    fileio.write_sealed(request.output_dir / "score.json", content)
