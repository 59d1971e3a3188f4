"""Scores compared with what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from arrowhead import fileio, output_paths
from arrowhead.errors import ConfigError, DataError
from arrowhead.features import catalog_file
from arrowhead.inference import layout, score_request, scores_io


def _must_be_finished(out: Path) -> None:
    """ConfigError unless the scoring in `out` has ended."""
    layout.must_be_of_this_layout(out)
    if not (out / "request.json").is_file():
        raise ConfigError(
            f"{out} holds no scores: it has no request.json.",
            "a folder that `arrowhead score` wrote.",
            "check the path.",
        )
    output_paths.must_be_text(out)
    if not (out / "score.json").is_file():
        raise ConfigError(
            f"{out} has no score.json: its scoring never finished.",
            "finished scores.",
            "run the same score command again: it goes on where it stopped.",
        )


def verify(out: Path) -> dict[str, Any]:
    """Compare everything that `out` holds with score.json: {parts, rows, bytes, problems}.

    problems: a line for each, empty if all of it can be trusted. Raises ConfigError where there are
    no scores, or only a part of them yet, DataError where score.json has changed.
    """
    _must_be_finished(out)
    content = score_request.score(out / "score.json")
    named, problems = content["parts"], []
    try:
        score_request.request(out / "request.json")
    except DataError as error:
        problems.append(error.found)
    digest = content.get("csv_sha256")  # earlier versions wrote none
    if digest and score_request.csv_digest(out) != digest:
        problems.append(f"{layout.csv_file(out)} is missing or has changed")
    paths: list[str] | None = None
    if (
        layout.inputs(out).is_file()
        and fileio.sha256(layout.inputs(out)) == content["inputs_sha256"]
    ):
        paths = catalog_file.read_catalog(layout.inputs(out))["paths"]
    else:
        problems.append(f"{layout.inputs(out)} is missing or has changed")
    first = 0
    for one in named:
        try:
            rows = scores_io.read_parquet(layout.parts(out) / one["name"], ["path"], one["sha256"])[
                "path"
            ]
        except DataError as error:
            problems.append(error.found)
        else:
            if paths is not None and rows != paths[first : first + one["rows"]]:
                problems.append(
                    f"{layout.parts(out) / one['name']} is not of the files it should be"
                )
        first += one["rows"]
    known = {one["name"] for one in named}
    strange = sorted({file.name for file in layout.parts(out).glob("*")} - known)
    problems += [f"{layout.parts(out) / name} is not named in score.json" for name in strange]
    if first != content["counts"]["inputs"]:
        problems.append(f"the parts hold {first} rows, score.json counts other inputs")
    return {
        "scores": str(out),
        "parts": len(named),
        "rows": first,
        "bytes": sum(one["bytes"] for one in named),
        "problems": problems,
    }
