"""The command race: several backbones on a sample of the images, side by side."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arrowhead.commands import precompute
from arrowhead.commands.race_config import Entry
from arrowhead.data import remote_folder
from arrowhead.data.catalog import Catalog
from arrowhead.features.feature_config import FeatureConfig, resolve_weights
from arrowhead.features.store import Store
from arrowhead.reporting import run_context
from arrowhead.reporting.run_context import RunContext
from arrowhead.training import body_comparison, run
from arrowhead.training.body_comparison import Difference, HeldOut

RESULT = "race.json"


def race(
    sample: Catalog, bodies: Sequence[Entry], out: Path, images: FeatureConfig, context: RunContext
) -> dict[str, Any]:
    """Extract the features of a sample with each body, and test heads on images they have not seen.

    Args:
        sample: The images.
        bodies: The bodies, see `race_config.entries`.
        out: The folder of the race; `race.json` is written there.
        images: How labels, pixels and features are made, apart from the body.
        context: Where to run, show and record.

    Returns:
        `bodies`: for each, from the most to the least accurate, {body, accuracy, half_width,
        images, images_per_second (None if it was never measured), width, parameters, license,
        store, behind_points, behind_half_width, p}; `verdict`; `images`.
    """
    for entry in bodies:  # a body that cannot be built is named before an hour with the others
        resolve_weights(entry.store, entry.config)
    measured = _earlier_speeds(out)
    lines: list[dict[str, Any]] = []
    results: list[HeldOut] = []
    for entry in bodies:
        context.screen.print(f"{entry.config.body}:")
        with run_context.child_context(context, entry.config.body) as child:
            if not _has_sample(entry.store, sample):
                settings = dataclasses.replace(images, body=entry.config)
                extracted = precompute.precompute(sample, entry.store, settings, child)
                measured |= _speed(entry, extracted)
            result = _test_heads(Store(entry.store), sample)
            line = _line(entry, result, measured)
            if child.run:
                numbers = ("accuracy", "images_per_second", "width", "parameters")
                child.run.record({k: line[k] for k in numbers if line[k] is not None})
        lines.append(line)
        results.append(result)
    order = sorted(range(len(lines)), key=lambda i: (-lines[i]["accuracy"], i))
    first = order[0]
    differences = body_comparison.compare(results[first], [results[i] for i in order[1:]])
    for i, one in zip(order[1:], differences, strict=True):
        lines[i] |= {"behind_points": one.points, "behind_half_width": one.half_width, "p": one.p}
    ranked = [lines[i] for i in order]
    summary = {"images": len(sample), "bodies": ranked, "verdict": verdict(ranked, differences)}
    with remote_folder.of(out).atomic_write(out / RESULT) as draft:
        draft.write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def _has_sample(path: Path, sample: Catalog) -> bool:
    """Whether a finished store has all images of the sample, unchanged.

    It may have more, from a `fit` of all images; to write the sample there would drop them.
    """
    if not (path / "manifest.json").is_file():
        return False
    stored = Catalog(**Store(path).read_catalog())
    facts = zip(stored.paths, stored.sizes.tolist(), stored.stamps.tolist(), strict=True)
    return set(facts).issuperset(
        zip(sample.paths, sample.sizes.tolist(), sample.stamps.tolist(), strict=True)
    )


def _test_heads(store: Store, sample: Catalog) -> HeldOut:
    """Test heads on the images of the sample."""
    store.verify()
    data, row = run.read_data(store, "cpu")
    paths, drawn = store.read_catalog()["paths"], set(sample.paths)
    return body_comparison.held_out_accuracy(
        data, np.flatnonzero([paths[one] in drawn for one in row])
    )


def _speed(entry: Entry, extracted: Mapping[str, Any]) -> dict[str, float]:
    """Images per second by body, if all images were decoded now."""
    counts, seconds = extracted["counts"], extracted["seconds"]
    if not counts["decoded"] or counts["reused"]:
        return {}
    return {entry.config.body: counts["decoded"] / max(seconds["workers"], 1e-9)}


def _line(entry: Entry, result: HeldOut, measured: Mapping[str, float]) -> dict[str, Any]:
    """What the race says about a body."""
    store = Store(entry.store)
    return {
        "body": entry.config.body,
        "accuracy": result.accuracy,
        "half_width": result.half_width,
        "images": len(result.key),
        "images_per_second": measured.get(entry.config.body),
        "width": store.recipe.width,
        "parameters": _parameters(store.weights_path),
        "license": ""
        if entry.config.weights == "random"
        else (store.weights_origin or {}).get("license", "unknown"),
        "store": str(entry.store),
        "behind_points": 0.0,
        "behind_half_width": 0.0,
        "p": None,
    }


def _parameters(weights: Path) -> int:
    """Number of values in a safetensors file."""
    import safetensors

    with safetensors.safe_open(weights, "numpy") as file:
        sizes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    total = 0
    for shape in sizes:
        count = 1
        for side in shape:
            count *= side
        total += count
    return total


def _earlier_speeds(out: Path) -> dict[str, float]:
    """Images per second by body, from the last race in this folder: features that are in a store
    already say nothing about speed.
    """
    try:
        bodies = json.loads((out / RESULT).read_text())["bodies"]
        return {one["body"]: one["images_per_second"] for one in bodies if one["images_per_second"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def verdict(ranked: Sequence[Mapping[str, Any]], differences: Sequence[Difference]) -> str:
    """One or two sentences: whether the first body is better than the others, and what it costs.

    Args:
        ranked: The lines of `race`, most accurate first.
        differences: The first body compared with each of the others.
    """
    best = ranked[0]
    rivals = list(zip(ranked[1:], differences, strict=True))
    equal = [line for line, one in rivals if not one.is_certain]
    if not equal:
        line, one = rivals[0]
        return (
            f"{best['body']} is better than {line['body']} by {one.points:.1f} ±"
            f" {one.half_width:.1f} points{_cost(best, line)}."
        )
    names = " and ".join(line["body"] for line in equal)
    text = f"{best['body']} is not certainly better than {names}"
    fastest = max([best, *equal], key=lambda line: line["images_per_second"] or 0.0)
    if fastest is best or not fastest["images_per_second"]:
        return f"{text}; more images (--share) would tell more."
    return f"{text}. Of these, {fastest['body']} is the fastest{_gain(fastest, best)}."


def _cost(best: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    if not (best["images_per_second"] and other["images_per_second"]):
        return ""
    ratio = other["images_per_second"] / best["images_per_second"]
    if ratio > 1:
        return f" and takes {ratio:.1f} times as long"
    return f" and is {1 / ratio:.1f} times as fast"


def _gain(fast: Mapping[str, Any], slow: Mapping[str, Any]) -> str:
    if not slow["images_per_second"]:
        return ""
    ratio = fast["images_per_second"] / slow["images_per_second"]
    return f": {ratio:.1f} times as fast as {slow['body']}"
