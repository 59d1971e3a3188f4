"""The commands score and evaluate: run a bundle on images.

score        bundle, images          -> Parquet parts, score.json
evaluate     bundle, labelled images -> the same, and every metric
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
from arrowhead.bundle import resolve, tta
from arrowhead.bundle.format import Bundle
from arrowhead.commands import chunks
from arrowhead.data import mirrors, remote_folder, sources
from arrowhead.data.catalog import Catalog
from arrowhead.data.remote_folder import LocalFolder
from arrowhead.data.source_config import SourceConfig
from arrowhead.features import extract
from arrowhead.features.extract import ExtractConfig
from arrowhead.inference import evaluate as inference_evaluate
from arrowhead.inference import layout, score_request, summary
from arrowhead.inference import score as inference_score
from arrowhead.inference.evaluate import EvaluateConfig
from arrowhead.inference.score_request import ScoreConfig, ScoreRequest
from arrowhead.inference.summary import ScoreSummary
from arrowhead.output_paths import check_output_folder
from arrowhead.reporting import evaluation, extraction, recording, scoring
from arrowhead.reporting.progress import WorkTotals
from arrowhead.reporting.run_context import RunContext
from arrowhead.tracking.client import TrackingConfig


def score(
    address: str | Path,
    images: str | Path,
    out: Path,
    config: ScoreConfig,
    extract_config: ExtractConfig,
    context: RunContext,
    tracking: TrackingConfig = TrackingConfig(),
) -> dict[str, Any]:
    """Score images with a bundle.

    Args:
        address: The bundle (see `resolve.bundle_folder`).
        images: The images (see `sources.unlabelled_catalog`).
        out: The folder for the scores.
        config: What is written for each image.
        extract_config: How images are read and decoded.
        context: Where to run, show and record.
        tracking: The tracking store of a bundle in MLflow.

    Returns:
        counts {inputs, scored, decoded, looked_up, skipped, reused, fallback, repaired, faults,
        novel (None without --flag-novel), ignored} with inputs = scored + faults, faults by kind,
        labels, drift, seconds by stage.
    """
    with (
        _output_folder(out, context) as files,
        _local_bundle(str(address), tracking, out) as path,
    ):
        bundle = bundle_format.load(path)
        source = SourceConfig(
            images=config.base, suffix=config.suffix, path_column=config.path_column
        )
        catalog = sources.unlabelled_catalog(images, source, base_flag="--base")
        extraction.show_source(catalog, context.screen)
        scores = _score_catalog(
            path, bundle, catalog, out, config, extract_config, context, "scoring"
        )
        scoring.show_label_trust(scores.summary, context.screen)
        # A CSV of an earlier command is written again: it would not agree with the parts.
        wants_csv = config.csv or layout.csv_path(out).is_file()
        csv = inference_score.write_csv(scores.request, bundle) if wants_csv else None
        result = scores.result | {"bundle": str(address), "csv": str(csv) if csv else None}
        if scores.changed:
            inference_score.write_summary(scores.request, result, bundle)
        elif csv:
            score_request.update_csv_digest(scores.request.output_dir)
        if context.run:
            scoring.record_scores(result, scores.summary, out, context.run)
        files.publish("score.json")
    return result


def evaluate(
    address: str | Path,
    data: str | Path,
    out: Path | None,
    source: SourceConfig,
    config: EvaluateConfig,
    extract_config: ExtractConfig,
    context: RunContext,
    tracking: TrackingConfig = TrackingConfig(),
) -> dict[str, Any]:
    """Score labelled images with a bundle and compute its metrics on them.

    Args:
        address: The bundle (see `resolve.bundle_folder`).
        data: The labelled images (see `sources.labelled`).
        out: The folder for scores and metrics; None for one in the working directory (see
            `inference.evaluate.default_output_dir`).
        source: How labels are read.
        config: The split, and what is written for each image.
        extract_config: How images are read and decoded.
        context: Where to run, show and record.
        tracking: The tracking store of a bundle in MLflow.

    Returns:
        What `score` returns, and metrics (see `inference.evaluate.compute_metrics`).
    """
    catalog = inference_evaluate.list_images(data, source)
    out = out or check_output_folder(
        inference_evaluate.default_output_dir(str(address), str(data), catalog, config.tta),
        "scores",
    )
    with (
        _output_folder(out, context) as files,
        _local_bundle(str(address), tracking, out) as path,
    ):
        bundle = bundle_format.load(path)
        catalog, notes = inference_evaluate.attach_labels(data, catalog, source, config, bundle)
        for note in (*catalog.notes, *notes):
            context.screen.print(note)
        bundle = tta.with_views(bundle, config.tta, str(address))
        scores = _score_catalog(
            path, bundle, catalog, out, config.scores, extract_config, context, "evaluation"
        )
        score_result = scores.result | {"bundle": str(address)}
        result = score_result | {
            "data": str(data),
            "split": config.split,
            "metrics": inference_evaluate.compute_metrics(scores.request, bundle),
        }
        if scores.changed:
            inference_score.write_summary(scores.request, score_result, bundle)
        inference_evaluate.write_results(out, result)
        evaluation.report_evaluation(result, bundle, out, context)
        files.publish("score.json")
    return result


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scores:
    """Finished scores. changed: whether score.json has to be written."""

    request: ScoreRequest
    summary: ScoreSummary
    result: dict[str, Any]
    changed: bool


def _score_catalog(
    bundle_dir: Path,
    bundle: Bundle,
    catalog: Catalog,
    out: Path,
    config: ScoreConfig,
    extract_config: ExtractConfig,
    context: RunContext,
    purpose: str,
) -> _Scores:
    """Score every file of a catalog into `out`, and show the counts.

    purpose: what MLflow calls the use of the data set.
    """
    start = perf_counter()
    request = score_request.prepare(
        out, bundle_dir, bundle, catalog, config, extract_config.chunk_size
    )
    fingerprint = bundle_format.fingerprint(bundle_dir)
    if context.run:
        name = recording.dataset_name(catalog)
        context.run.dataset(name, catalog.digest(), catalog.source or catalog.root, purpose)
        context.run.tags({"dataset": name, "body": bundle.recipe.body})
        params = {f"score.{k}": v for k, v in asdict(config).items()}
        params |= {f"extract.{k}": v for k, v in asdict(extract_config).items()}
        context.run.params(params | {"bundle": fingerprint, "recipe": bundle.recipe.to_json()})
    extraction.show_damaged_parts(request.damaged_parts, context.screen)
    request.files.publish()
    unfinished = request.unfinished_parts()
    total = sum(len(request.part_rows[part]) for part in unfinished)
    skipped = len(catalog) - total
    work = chunks.run_chunks(
        inference_score.score,
        (request, extract_config),
        unfinished,
        total,
        skipped,
        "score",
        context,
    )
    request.files.fetch_all()
    totals = summary.summarize(request, bundle)
    work.seconds["wall"] = perf_counter() - start
    counts = _counts(catalog, totals, work, skipped)
    scoring.show_scoring(context.screen, counts, work, bundle, config)
    extraction.show_faults(totals.faults, totals.unreadable, out / "parts", context.screen)
    result = _result(bundle, totals, work, counts) | {
        "bundle_fingerprint": fingerprint,
        "novelty_threshold": scoring.novelty_threshold(bundle, config),
        "out": str(out),
        "run_id": context.run.run_id if context.run else None,
        "too_many_faults": extract_config.too_many(counts["faults"], len(catalog)),
    }
    changed = bool(unfinished) or not (out / "score.json").is_file()
    return _Scores(request=request, summary=totals, result=result, changed=changed)


def _counts(
    catalog: Catalog, totals: ScoreSummary, work: WorkTotals, skipped: int
) -> dict[str, Any]:
    faults = totals.faults.total()
    return {
        "inputs": len(catalog),
        "scored": len(catalog) - faults,
        "decoded": work.decoded,
        "looked_up": work.looked_up,
        "skipped": skipped,
        "reused": skipped + work.looked_up,
        "fallback": work.fallback,
        "repaired": work.repaired,
        "faults": faults,
        "novel": totals.novel,
        "ignored": catalog.ignored,
    }


def _result(
    bundle: Bundle, totals: ScoreSummary, work: WorkTotals, counts: dict[str, Any]
) -> dict[str, Any]:
    """The part of the result that comes from the scores."""
    return {
        "counts": counts,
        "faults": dict(totals.faults),
        "fault_kinds": dict(totals.faults),
        "labels": dict(totals.labels),
        "seconds": dict(work.seconds),
        "roofline": extract.roofline(work.seconds, work.decoded, work.workers),
        "recipe_fingerprint": bundle.recipe.fingerprint,
        "drift": work.drift,
        "folders": totals.folders and totals.folders.to_dict(),
        "images_used": totals.images_used,
        "arrowhead": __version__,
        "trained_by": bundle.lineage.get("run_id"),
    }


@contextmanager
def _output_folder(out: Path, context: RunContext) -> Iterator[LocalFolder]:
    """Lock the folder of the scores; of one in an object store, fetch what is done already."""
    files = remote_folder.of(out)
    with fileio.locked_output_folder(out, context.screen.print), files.lock_objects():
        files.fetch_all()
        files.note_version("score.json")
        yield files


@contextmanager
def _local_bundle(address: str, tracking: TrackingConfig, out: Path) -> Iterator[Path]:
    """The bundle's folder. A remote bundle is downloaded into `out`, which every worker can read,
    and removed at the end.
    """
    is_stored = mirrors.is_address(address) and not address.startswith(("models:/", "runs:/"))
    if remote_folder.of(out).is_remote and is_stored:
        folder = mirrors.mirror_of(address)  # which workers that share no disk have, too
        resolve.refresh_mirror(folder)
        yield folder
        return
    scratch = out / ".bundle"
    try:
        yield resolve.bundle_folder(address, tracking, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
