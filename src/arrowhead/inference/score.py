"""Images and a bundle to score files.

    unlabelled catalog     one row per file, in input order; kept in inputs.arrow
      -> extract.Pump      features, by the recipe of the bundle
      -> head              calibrated probabilities; the labels they give; novelty
      -> part              one Parquet file per chunk, whole or absent, its sha256 in a journal
      -> score.json        counts, lineage, seconds by stage, every part; written last

A part that is in the journal, with those bytes, is done: a stopped run goes on with the others.
Nobody holds more than a chunk or two of rows at a time: workers read theirs off the memory map of
inputs.arrow.
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
from arrowhead.bundle import replay
from arrowhead.bundle.format import Bundle
from arrowhead.features import extract
from arrowhead.features.extract import Chunk, ExtractConfig, Known, Pump
from arrowhead.features.store import Store
from arrowhead.inference import layout, score_request, scores_io
from arrowhead.inference.score_request import Request, ScoreConfig
from arrowhead.inference.scores_io import Journal, Scores
from arrowhead.runtime.worker import Worker


def score(worker: Worker, request: Request, how: ExtractConfig) -> None:
    """Score every chunk this worker claims; the golden images' drift is reported before the first.

    Raises DataError when they come out differently here.
    """
    config, bundle = request.config, bundle_format.load(request.bundle)
    body, head = bundle.make_body(worker.device), bundle.make_head(worker.device)
    if bundle.novelty:
        bundle = replace(bundle, novelty=bundle.novelty.to(worker.device))
    drift = replay.replay(bundle, body, head, worker.device, worker.threads)
    worker.report({"drift": asdict(drift)})
    replay.must_agree(drift, config.max_drift)
    mark = {
        "arrowhead.recipe": bundle.recipe.json(),
        "arrowhead.bundle": bundle_format.fingerprint(request.bundle),
        "arrowhead.run_id": str(bundle.lineage.get("run_id")),
        "arrowhead.version": __version__,
    }
    recipe = score_request.one_view(bundle.recipe)
    clean = replace(
        extract.pixels_of(recipe), max_pixels=config.max_pixels, max_scans=config.max_scans
    )
    known = Known.of(Store(config.store)) if config.store else Known()
    finished = Journal(layout.journal(request.out))
    claimed = ((number, request.files(number)) for number in iter(worker.next_task, None))
    with Pump(worker, body, recipe, clean, how) as pump:
        for chunk in pump(claimed, known):
            with pump.clock.stage("write"):
                temperature = 1.0 if config.raw else bundle.temperature
                prob_NC = bundle_format.probabilities(
                    head, chunk.features[:, 0], temperature, multi=bundle.multi
                )
                rows = judged(bundle, chunk, prob_NC, config)
                scores_io.write_scores(request.part(chunk.number), rows, mark)
                part = scores_io.finished(
                    request.part(chunk.number),
                    chunk.number,
                    inputs=layout.inputs_of(request.files(chunk.number)),
                    rows=len(chunk.paths),
                    faults=chunk.counts()["faults"],
                )
                finished.write(part)
            extract.tell(worker, chunk, pump.clock.read(), "scores_written")


def judged(
    bundle: Bundle, chunk: Chunk, prob_NC: NDArray[np.float32], config: ScoreConfig
) -> Scores:
    """The rows of one part.

    Where an image may have several labels, `given` are those it is given (see `Bundle.given`), and
    its best label is the most probable one, given or not. Thresholds were tuned on calibrated
    probabilities: with --raw they are applied to uncalibrated ones all the same.
    """
    count = min(config.top_k, len(bundle.classes))
    novelty_N = novel_N = None
    if bundle.novelty:
        with bundle_format.one_thread():
            novelty_N = bundle.novelty.distances(chunk.features[:, 0])
        if config.flag_novel:
            novel_N = novelty_N > bundle.novelty.threshold(config.false_alarms)
    return Scores(
        classes=bundle.classes,
        paths=chunk.paths,
        image_ids=chunk.image_ids,
        faults=chunk.faults,
        top=np.argsort(-prob_NC, axis=1, kind="stable")[:, :count],
        probability=prob_NC,
        every=config.probabilities,
        given=bundle.given(prob_NC) if bundle.multi else None,
        novelty=novelty_N,
        novel=novel_N,
        feature=chunk.features[:, 0] if config.features else None,
    )


def write_csv(request: Request, bundle: Bundle) -> Path:
    """The parts as one CSV for people and programs without Parquet, whole or absent."""
    target = layout.csv_file(request.out)
    names = ["image_id", "label", "probability"]
    names += ["labels"] if bundle.multi else []
    names += ["novelty"] if bundle.novelty else []
    names += ["novel"] if request.config.flag_novel else []
    names += ["fault"]
    every = bundle.classes if request.config.probabilities else []
    header = ["path", *names, *(f"probability.{name}" for name in every)]
    with spreadsheet.writing(target, header) as sheet:
        for columns in request.read([*names, *(["probabilities"] if every else [])]):
            for row in _cells(columns, names, every):
                sheet.row(row)
    return target


def _cells(
    columns: dict[str, list[Any]], names: Sequence[str], every: Sequence[str]
) -> Iterator[list[Any]]:
    columns["image_id"] = [one.hex() for one in columns["image_id"]]
    if "labels" in columns:
        # As a list, which `tables` reads back: names may hold spaces, commas, anything.
        columns["labels"] = [
            None if given is None else json.dumps(given, ensure_ascii=False)
            for given in columns["labels"]
        ]
    if "novel" in columns:
        columns["novel"] = [None if one is None else int(one) for one in columns["novel"]]
    for at, plain in enumerate(zip(*(columns[name] for name in ["path", *names]), strict=True)):
        by_class = columns["probabilities"][at] if every else None
        yield [*plain, *(by_class[name] if by_class else None for name in every)]


def record(request: Request, result: Mapping[str, Any], loaded: Bundle) -> None:
    """Write score.json: the result, and every part with its rows, bytes and sha256; scores.csv,
    where there is one, with its sha256.
    """
    there = request.journal()
    listed = [there[number] for number in range(len(request.runs))]
    content = dict(result) | {
        "format": scores_io.FORMAT,
        "classes": loaded.classes,
        "inputs_sha256": fileio.sha256(layout.inputs(request.out)),
        "csv_sha256": score_request.csv_digest(request.out),
        "parts": [
            {"name": one.name, "rows": one.rows, "bytes": one.bytes, "sha256": one.sha256}
            for one in listed
        ],
    }
    fileio.write_sealed(request.out / "score.json", content)
