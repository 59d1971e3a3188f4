"""What `finetune` and `fit --finetune` share: one run, one result, nothing done twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from arrowhead.cli.app import (
    bundles,
    finish,
    local_bundle,
    open_command,
    program,
    run_context,
    show_next_commands,
    show_written,
    ui_command,
)
from arrowhead.cli.options import Output
from arrowhead.cli.screen import Screen
from arrowhead.cli.stage_options import RunFlags
from arrowhead.data.catalog import Catalog
from arrowhead.examine.config import ReportConfig
from arrowhead.features.feature_config import FeatureConfig
from arrowhead.output_paths import check_output_folder

FAULTS_FLAG = "--extract.max-faults"


def check_out(out: Path) -> Path:
    """Check every folder that a fine-tuning writes."""
    out = check_output_folder(out, "results")
    for store in (out / "store", out / "pixels", out / "frozen" / "store"):
        check_output_folder(store, "store")
    for name in ("bundle", "bundle.previous", "bundle.tuned"):
        check_output_folder(out / name, "bundle")
    return out


class Done:
    """A request, and what is remembered of it if it has finished.

    Args:
        out: The folder of the results.
        catalog: The images.
        base: The bundle to start from, if there is one.
        request: The settings of images and body, as they were given.
        settings: A `FinetuneSettings`.
    """

    def __init__(
        self, out: Path, catalog: Catalog, base: str | None, request: FeatureConfig, settings: Any
    ) -> None:
        from arrowhead.bundle import format as bundle_format
        from arrowhead.commands import finetune as commands_finetune

        folder = Path(base) if base and (Path(base) / "bundle.json").is_file() else None
        self.out, self.catalog, self.base, self.settings = out, catalog, base, settings
        self._fingerprint = bundle_format.fingerprint(folder) if folder else base
        self._key = commands_finetune.request_key(catalog, out, folder, request, settings)

    @property
    def result(self) -> dict[str, Any] | None:
        """The result, if the same request has finished."""
        from arrowhead.commands import finetune as commands_finetune

        return commands_finetune.finished(self.out, self._key, self._fingerprint)

    def remember(self, result: dict[str, Any]) -> None:
        """Note that the request has finished."""
        from arrowhead.commands import finetune as commands_finetune

        commands_finetune.remember(self.out, self._key, self._fingerprint, result)


def fine_tune(
    name: str,
    done: Done,
    images: FeatureConfig,
    run_file: Path,
    run: RunFlags,
    report: ReportConfig,
    output: Output,
) -> int:
    """Fine-tune, unless the same request has finished; the exit code.

    Args:
        name: The command, which names the run.
        done: The request.
        images: Its settings of images and body, completed.
        run_file: See `run_context`.
        run: Where to run and record.
        report: Whether a report is written.
        output: How to print the result.
    """
    from arrowhead.commands import finetune as commands_finetune

    out, tracking = done.out, run.tracking
    if not run.again and (result := done.result):
        return _show_done(result, out, output)
    work = done.catalog, out
    with run_context(name, run.launch, tracking, output, run_file, run.registry) as context:
        if done.base is None:
            result = commands_finetune.finetune(*work, None, images, done.settings, context)
        else:
            with local_bundle(done.base, tracking) as folder:
                result = commands_finetune.finetune(*work, folder, images, done.settings, context)
        _show_tuned(result, out, report, context, ui_command(tracking))
    done.remember(result)
    return finish(result, output, faults_flag=FAULTS_FLAG)


def _show_done(result: dict[str, Any], out: Path, output: Output) -> int:
    """Say that the same request has finished, and what it gave; the exit code."""
    screen = Screen(to_stderr=output.json)
    which = "the fine-tuned network" if result["better"] == "tuned" else "the frozen head"
    screen.print(
        f"done before, with the same images and settings: {out / 'bundle'} is {which}, the better"
        " one of the two (finetune --again trains again)"
    )
    result["files"] = show_written(screen, result["files"])
    return finish(result | {"done_before": True}, output, faults_flag=FAULTS_FLAG)


def _show_tuned(
    result: dict[str, Any], out: Path, report: ReportConfig, context: Any, ui: str
) -> None:
    """Write the report if it is wanted, and show what was written and what to do next."""
    page = _add_report(result, report, context)
    tuned = [] if result["better"] == "tuned" else [out / "bundle.tuned"]
    written = [out / "pixels", result["body"], result["tuned_store"], *bundles(out / "bundle")]
    result["files"] = show_written(context.screen, [*written, *tuned, *page])
    score_command = [program(), "score", result["bundle"], "IMAGES", "SCORES"]
    show_next_commands(context.screen, [*map(open_command, page), score_command, ui])


def _add_report(result: dict[str, Any], report: ReportConfig, context: Any) -> list[Path]:
    """Write the report of the better bundle if it is wanted; the page, or nothing."""
    from arrowhead.commands import examine as commands_examine

    result["report"] = None
    if report.report and result["store"]:
        result["report"] = commands_examine.report_of_training(
            Path(result["store"]), Path(result["bundle"]), context
        )
    return [Path(result["report"])] if result["report"] else []
