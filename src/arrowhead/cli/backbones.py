"""The command backbones: the networks that --body takes."""

from __future__ import annotations

import difflib
from dataclasses import asdict
from importlib.metadata import version
from typing import Annotated

from cyclopts import Parameter

from arrowhead.cli.app import print_result
from arrowhead.cli.options import Out, Output
from arrowhead.cli.screen import Screen
from arrowhead.errors import ConfigError
from arrowhead.features import body_table
from arrowhead.features.body_table import BodyRow
from arrowhead.wording import pluralize


def backbones(
    pattern: Annotated[
        str, Parameter(help="Part of a name, or a pattern such as 'timm/vit_small*'.")
    ] = "*",
    *,
    output: Out = Output(),
) -> int:
    """List the networks that --body takes, with their published weights.

    Shows width (numbers per feature), input size, parameters, the license of the weights, and
    images per second where they were measured. The first weights of a network are its default.

    Example: arrowhead backbones dinov2
    """
    rows = list(body_table.rows(pattern))
    if not rows:
        names = sorted({row.body for row in body_table.rows()})
        close = difflib.get_close_matches(pattern.strip("*"), names, 3)
        raise ConfigError(
            f"No body matches {pattern!r}.",
            f"a part of one of {len(names)} names, or a pattern with * and ?.",
            f"try {' or '.join(close)}." if close else "run `arrowhead backbones` to see all.",
        )
    versions = body_table.versions()
    if output.json:
        print_result(
            {"backbones": [asdict(row) for row in rows]}
            | {"libraries": versions, "machine": body_table.machine()}
        )
        return 0
    screen = Screen(to_stderr=False)
    for line in _table(rows):
        screen.print(line)
    known = " and ".join(f"{name} {number}" for name, number in versions.items())
    screen.print(f"{pluralize(len(rows), 'row')}, of {known}")
    if any(row.images_per_second for row in rows):
        screen.print(f"img/s: {body_table.machine()}")
    if newer := [one for one, number in versions.items() if version(one).split("+")[0] != number]:
        screen.print(f"other networks of your version of {' and '.join(newer)} can be used, too")
    return 0


def _table(rows: list[BodyRow]) -> list[str]:
    """The rows under a header, in columns."""
    cells = [("body", "weights", "width", "pixels", "params", "img/s", "license")]
    cells += [
        (
            row.body,
            row.weights or "none",
            str(row.width),
            str(row.size),
            f"{row.parameters / 1e6:.1f}M",
            "" if row.images_per_second is None else f"{row.images_per_second:g}",
            row.license,
        )
        for row in rows
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(7)]
    aligned = "<<>>>><"
    return [
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(row, aligned, widths, strict=True)
        ).rstrip()
        for row in cells
    ]
