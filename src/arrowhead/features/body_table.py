"""What is known of every body without importing torchvision or timm, and without building it.

The table `body_table.json` is written by bench/body_table.py, which builds each network once
without memory for its weights.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from arrowhead.features import networks

TABLE = Path(__file__).with_name("body_table.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class BodyRow:
    """A body with one of its published weights.

    Attributes:
        body: As --body takes it.
        weights: As --weights takes it; "" if none are published.
        size: Side of the input that the weights were made for, in pixels.
        width: Numbers per feature, with the default pooling.
        parameters: Without the final layer.
        license: Of the weights.
        images_per_second: Forward pass on the CPU of `machine`, where it was measured.
    """

    body: str
    weights: str
    size: int
    width: int
    parameters: int
    license: str
    images_per_second: float | None = None


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text("utf-8"))
    return table


def versions() -> dict[str, str]:
    """Versions of the libraries whose networks the table lists."""
    return {name: _table()[name] for name in ("torchvision", "timm")}


def machine() -> str:
    """What the images per second were measured with."""
    return str(_table()["machine"])


def has(body: str) -> bool:
    """Whether the table has a body, and the published weights in its name."""
    name, entry = _entry(body)
    tag = body[len(name) + 1 :]
    return entry is not None and (not tag or tag in entry["weights"])


def _entry(body: str) -> tuple[str, dict[str, Any] | None]:
    name = body.partition(".")[0]
    return name, _table()["bodies"].get(name)


def license_of(body: str, weights: str) -> str | None:
    """The license of the weights that a request loads; None if the table does not know them.

    A file counts as the published weights of the body in timm's name.
    """
    name, entry = _entry(body)
    is_timm = body.startswith(networks.TIMM_PREFIX)
    is_file = networks.is_weights_file(weights)
    if entry is None or weights in ("random", "bundled") or (is_file and not is_timm):
        return None
    tags = entry["weights"]
    tag = body[len(name) + 1 :] if is_timm else {"auto": ""}.get(weights, weights)
    found = tags.get(tag or next(iter(tags), ""))
    return str(found[1]) if found else None


def rows(pattern: str = "*") -> Iterator[BodyRow]:
    """Bodies whose name matches a pattern with * and ?, or contains it; torchvision's first."""
    wanted = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
    speeds = _table()["images_per_second"]
    for name, entry in _table()["bodies"].items():
        is_timm = name.startswith(networks.TIMM_PREFIX)
        for tag, (size, license) in (entry["weights"] or {"": (entry["size"], "")}).items():
            body = f"{name}.{tag}" if is_timm and tag else name
            if fnmatch.fnmatchcase(body, wanted) or fnmatch.fnmatchcase(name, wanted):
                yield BodyRow(
                    body=body,
                    weights=("auto" if tag else "") if is_timm else tag,
                    size=size,
                    width=entry["width"],
                    parameters=entry["parameters"],
                    license=license,
                    images_per_second=speeds.get(name),
                )
