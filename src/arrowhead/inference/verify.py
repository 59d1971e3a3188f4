"""Verifies finished scores: compares every file with the hashes in score.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from arrowhead import fileio, output_paths
from arrowhead.errors import ConfigError, DataError
from arrowhead.features import catalog_file
from arrowhead.inference import layout, score_request, scores_io


def _require_finished(out: Path) -> None:
    """Raise ConfigError unless `out` holds scores of a scoring that has finished."""
    layout.check_layout(out)
    if not (out / "request.json").is_file():
        raise ConfigError(
            f"{out} holds no scores: it has no request.json.",
            "a folder that `arrowhead score` wrote.",
            "check the path.",
        )
    output_paths.check_utf8(out)
    if not (out / "score.json").is_file():
        raise ConfigError(
            f"{out} has no score.json: its scoring never finished.",
            "finished scores.",
            "run the same score command again: it continues where it stopped.",
        )


def verify(out: Path) -> dict[str, Any]:
    """Compare all files in `out` with score.json.

    Returns:
        {scores, parts, rows, bytes, problems}. problems: one line each, empty if all scores can be
        trusted.

    Raises:
        ConfigError: there are no scores, or the scoring has not finished.
        DataError: score.json has changed.
    """
    _require_finished(out)
    content = score_request.read_score(out / "score.json")
    parts, problems = content["parts"], []
    try:
        score_request.read_request(out / "request.json")
    except DataError as error:
        problems.append(error.found)
    csv_digest = content.get("csv_sha256")  # earlier versions did not write it
    if csv_digest and score_request.csv_digest(out) != csv_digest:
        problems.append(f"{layout.csv_path(out)} is missing or has changed")
    inputs, paths = layout.inputs_path(out), None
    if inputs.is_file() and fileio.sha256(inputs) == content["inputs_sha256"]:
        paths = catalog_file.read_catalog(inputs)["paths"]
    else:
        problems.append(f"{inputs} is missing or has changed")
    rows = 0
    for part in parts:
        path = layout.parts_dir(out) / part["name"]
        try:
            part_paths = scores_io.read_columns(path, ["path"], part["sha256"])["path"]
        except DataError as error:
            problems.append(error.found)
        else:
            if paths is not None and part_paths != paths[rows : rows + part["rows"]]:
                problems.append(f"{path} does not hold the files it should")
        rows += part["rows"]
    listed = {part["name"] for part in parts}
    unlisted = sorted({file.name for file in layout.parts_dir(out).glob("*")} - listed)
    problems += [f"{layout.parts_dir(out) / name} is not listed in score.json" for name in unlisted]
    if rows != content["counts"]["inputs"]:
        problems.append(f"the parts hold {rows} rows, but score.json counts another number")
    return {
        "scores": str(out),
        "parts": len(parts),
        "rows": rows,
        "bytes": sum(part["bytes"] for part in parts),
        "problems": problems,
    }
