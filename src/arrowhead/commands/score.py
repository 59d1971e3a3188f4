"""A bundle on images: scored, or evaluated where they have labels; launched, shown and recorded.

score        bundle, images          -> Parquet parts, score.json
evaluate     bundle, labelled images -> the same, and every figure
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from arrowhead import __version__, fileio
from arrowhead.bundle import format as bundle_format
from arrowhead.bundle import resolve
from arrowhead.bundle.format import Bundle
from arrowhead.commands import chunks
from arrowhead.data import sources
from arrowhead.data.catalog import Catalog
from arrowhead.data.source_config import SourceConfig
from arrowhead.features import extract
from arrowhead.features.extract import ExtractConfig
from arrowhead.inference import evaluate as inference_evaluate
from arrowhead.inference import layout, score_request, summary
from arrowhead.inference import score as inference_score
from arrowhead.inference.evaluate import EvaluateConfig
from arrowhead.inference.score_request import ScoreConfig, ScoreRequest
from arrowhead.inference.summary import ScoreSummary
from arrowhead.output_paths import check_folder
from arrowhead.reporting import evaluation, extraction, recording, scoring
from arrowhead.reporting.run_context import RunContext
from arrowhead.tracking.client import TrackingConfig


def score(
    address: str | Path,
    images: str | Path,
    out: Path,
    config: ScoreConfig,
    how: ExtractConfig,
    context: RunContext,
    tracking: TrackingConfig = TrackingConfig(),
) -> dict[str, Any]:
    """Score every file of `images` (see `sources.unlabelled`) with a bundle (see
    `resolve.bundle_folder`).

    Returns counts {inputs, scored, decoded, looked_up, skipped, reused, fallback, faults, novel
    (None without --flag-novel), ignored} with inputs = scored + faults, faults by kind, labels,
    drift, seconds by stage.
    """
    with fileio.occupied(out, context.screen.say), _at_hand(str(address), tracking, out) as path:
        loaded = bundle_format.load(path)
        source = SourceConfig(
            images=config.base, suffix=config.suffix, path_column=config.path_column
        )
        catalog = sources.unlabelled(images, source, base_flag="--base")
        extraction.say_source(catalog, context.screen)
        made = _scored(path, loaded, catalog, out, config, how, context, "scoring")
        scoring.say_folders(made.held, context.screen)
        # One of an earlier command would else say what the parts no longer say.
        asked = config.csv or layout.csv_path(out).is_file()
        table = inference_score.write_csv(made.request, loaded) if asked else None
        result = made.result | {"bundle": str(address), "csv": str(table) if table else None}
        if made.fresh:
            inference_score.write_summary(made.request, result, loaded)
        elif table:
            score_request.update_csv_digest(made.request.output_dir)
    if context.run:
        scoring.show_scores(result, made.held, out, context.run)
    return result


def evaluate(
    address: str | Path,
    data: str | Path,
    out: Path | None,
    source: SourceConfig,
    config: EvaluateConfig,
    how: ExtractConfig,
    context: RunContext,
    tracking: TrackingConfig = TrackingConfig(),
) -> dict[str, Any]:
    """Score labelled images with a bundle and tell how good the scores are.

    Returns what `score` does and `metrics` (see `compute_metrics`). out: None for a folder in the
    working directory (see `inference.evaluate.default_output_dir`).
    """
    catalog = inference_evaluate.list_images(data, source)
    out = out or check_folder(
        inference_evaluate.default_output_dir(str(address), str(data), catalog), "scores"
    )
    with fileio.occupied(out, context.screen.say), _at_hand(str(address), tracking, out) as path:
        loaded = bundle_format.load(path)
        catalog, notes = inference_evaluate.attach_labels(data, catalog, source, config, loaded)
        for note in (*catalog.notes, *notes):
            context.screen.say(note)
        made = _scored(path, loaded, catalog, out, config.scores, how, context, "evaluation")
        found = inference_evaluate.compute_metrics(made.request, loaded)
        result = made.result | {
            "bundle": str(address),
            "data": str(data),
            "split": config.split,
            "metrics": found,
        }
        if made.fresh:
            inference_score.write_summary(
                made.request, made.result | {"bundle": str(address)}, loaded
            )
        inference_evaluate.write_results(out, result)
    evaluation.show_figures(result, loaded, out, context)
    return result


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scored:
    """What a scoring came to. fresh: whether score.json has to be written."""

    request: ScoreRequest
    held: ScoreSummary
    result: dict[str, Any]
    fresh: bool


def _scored(
    path: Path,
    loaded: Bundle,
    catalog: Catalog,
    out: Path,
    config: ScoreConfig,
    how: ExtractConfig,
    context: RunContext,
    use: str,
) -> _Scored:
    """Score every file of a catalog into `out`; its account, shown. use: what for, for MLflow."""
    began = perf_counter()
    mark, ignored, files = bundle_format.fingerprint(path), catalog.ignored, len(catalog)
    request = score_request.prepare(out, path, loaded, catalog, config, how.chunk_size)
    if context.run:
        name = recording.dataset_name(catalog)
        context.run.dataset(name, catalog.digest(), catalog.source or catalog.root, use)
        context.run.tags({"dataset": name, "body": loaded.recipe.body})
        asked = {f"score.{k}": v for k, v in asdict(config).items()}
        asked |= {f"extract.{k}": v for k, v in asdict(how).items()}
        context.run.params(asked | {"bundle": mark, "recipe": loaded.recipe.to_json()})
    del catalog  # of a million files; from here on nobody needs more than some chunks of it
    extraction.say_damaged(request.damaged_parts, context.screen)
    missing = request.unfinished_parts()
    total = sum(len(request.part_rows[number]) for number in missing)
    args = request, how
    done = chunks.run_chunks(
        inference_score.score, args, missing, total, files - total, "score", context
    )
    found = summary.summarize(request, loaded)
    faults = found.faults.total()
    done.seconds["wall"] = perf_counter() - began
    counts = {
        "inputs": files,
        "scored": files - faults,
        "decoded": done.decoded,
        "looked_up": done.looked_up,
        "skipped": files - total,
        "reused": files - total + done.looked_up,
        "fallback": done.fallback,
        "faults": faults,
        "novel": found.novel,
        "ignored": ignored,
    }
    scoring.say_scores(context, counts, done, loaded, config)
    extraction.say_faults(found.faults, found.unreadable, out / "parts", context.screen)
    result = {
        "counts": counts,
        "faults": dict(found.faults),
        "fault_kinds": dict(found.faults),
        "labels": dict(found.labels),
        "seconds": dict(done.seconds),
        "roofline": extract.roofline(done.seconds, done.decoded, done.workers),
        "bundle_fingerprint": mark,
        "recipe_fingerprint": loaded.recipe.fingerprint,
        "drift": done.drift,
        "novelty_threshold": scoring.novelty_threshold(loaded, config),
        "folders": found.folders and found.folders.to_dict(),
        "images_used": found.images_used,
        "out": str(out),
        "arrowhead": __version__,
        "trained_by": loaded.lineage.get("run_id"),
        "run_id": context.run.run_id if context.run else None,
        "too_many_faults": how.too_many(faults, files),
    }
    fresh = bool(missing) or not (out / "score.json").is_file()
    return _Scored(request=request, held=found, result=result, fresh=fresh)


@contextmanager
def _at_hand(address: str, tracking: TrackingConfig, out: Path) -> Iterator[Path]:
    """The bundle's folder. One that had to be fetched lies in `out` meanwhile: wherever a worker
    runs, it sees that.
    """
    scratch = out / ".bundle"
    try:
        yield resolve.bundle_folder(address, tracking, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
