"""Measure how often slices are named where there are none, and how often a planted one is found.

    .venv/bin/python bench/slices.py --store STORE

STORE is a feature store of real photos with two classes. Every run draws images from it with their
measured properties, and a table with 10 columns that have nothing to do with the errors. Errors
are drawn at random: everywhere alike, or more of them in one planted slice. For each case this
prints the share of the runs that name a slice, and that name the planted one first; also with
Holm's correction of the same p-values in place of the permutations. Two cases plant a large slice
(one camera) that hides the darkest images; for all that plant one, it is counted how often a slice
is named that has little to do with what was planted. Then it measures the time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.data.catalog import Catalog
from arrowhead.examine import image_properties, properties, slices
from arrowhead.examine.properties import Property
from arrowhead.examine.slices import SliceConfig
from arrowhead.features.store import Store

Mask = NDArray[np.bool_]
GOOD = 0.97  # accuracy outside of the planted slice


@dataclass(frozen=True)
class Case:
    """Images of a run, and what is planted among them."""

    name: str
    images: int = 400
    planted: int = 0
    accuracy: float = GOOD  # in the planted slice
    kind: str = ""  # dark: the darkest images; darkened: any, made darker; camera: a level
    good: float = GOOD
    first_class: float = 0.5  # share of the first class
    labels: int = 1
    camera: int = 0  # images of another bad slice, a level, right with probability 0.4


CASES = (
    Case("no slice, 200 images", images=200),
    Case("no slice, 400 images"),
    Case("no slice, 400 images, accuracy 0.85", good=0.85),
    Case("no slice, 2000 images", images=2000),
    Case("no slice, 400 images, classes 9 to 1, accuracy 0.9", good=0.9, first_class=0.9),
    Case("no slice, 400 images, 10 labels each", labels=10),
    Case("60 of 400, the darkest: 0.75", planted=60, accuracy=0.75, kind="dark"),
    Case("60 of 400, the darkest: 0.80", planted=60, accuracy=0.80, kind="dark"),
    Case("60 of 400, the darkest: 0.85", planted=60, accuracy=0.85, kind="dark"),
    Case("30 of 400, the darkest: 0.75", planted=30, accuracy=0.75, kind="dark"),
    Case("60 of 400, darkened: 0.75", planted=60, accuracy=0.75, kind="darkened"),
    Case("60 of 400, of one camera: 0.75", planted=60, accuracy=0.75, kind="camera"),
    Case("300 of 2000, the darkest: 0.90", 2000, planted=300, accuracy=0.90, kind="dark"),
    Case("60 of 400, the darkest: 0.75, 10 labels", 400, 60, 0.75, "dark", labels=10),
    Case(
        "100 of 400, of one camera: 0.4; 60, the darkest: 0.75", 400, 60, 0.75, "dark", camera=100
    ),
    Case(
        "150 of 600, of one camera: 0.4; 60, the darkest: 0.60", 600, 60, 0.60, "dark", camera=150
    ),
)


def main() -> None:
    """Measure, print, and write JSON with --out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument(
        "--cases", nargs="+", type=int, help="numbers of cases, from 0; default: all"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    store = Store(args.store)
    catalog, images = Catalog(**store.read_catalog()), store.features(rows_only=True)
    start = time.perf_counter()
    measured = image_properties.measure_images(catalog, images.row, images.image_id)
    ms = 1000 * (time.perf_counter() - start) / len(measured.row)
    print(f"reading and measuring an original: {ms:.1f} ms")
    base, _ = properties.measured_properties(measured, images.row)
    results = []
    for case in (CASES[k] for k in args.cases or range(len(CASES))):
        results.append(measure(case, base, args.runs))
        print(json.dumps(results[-1]), flush=True)
    seconds = {}
    for size, labels in ((400, 1), (20_000, 1), (200_000, 1), (20_000, 10), (200_000, 10)):
        rng = np.random.default_rng(0)
        case = Case("", images=size, labels=labels)
        given, _, correct_N, _ = draw(case, base, rng)
        start = time.perf_counter()
        slices.find_slices(correct_N, np.arange(size), given)
        seconds[f"{size} images, {labels} label(s)"] = round(time.perf_counter() - start, 2)
    print(json.dumps(seconds))
    if args.out:
        about = {
            "date": date.today().isoformat(),
            "command": "python bench/slices.py --store STORE",
            "photos": len(measured.row),
            "runs": args.runs,
            "cpus": os.cpu_count(),
            "config": {"min_images": 20, "max_p": 0.02, "permutations": 2000},
        }
        result = {"about": about, "ms_per_original": round(ms, 2), "cases": results}
        args.out.write_text(json.dumps(result | {"seconds": seconds}, indent=1) + "\n")


def measure(case: Case, base: list[Property], runs: int) -> dict[str, Any]:
    """Draw `runs` data sets of a case and count what is named."""
    counts = dict.fromkeys(("named_at_0.01", "named_at_0.02", "named_at_0.05", "holm_at_0.02"), 0)
    first, also, predicted = dict.fromkeys(counts, 0), 0, 0
    hidden, unrelated = 0, 0
    for seed in range(runs):
        given, planted_N, correct_N, camera_N = draw(case, base, np.random.default_rng(seed))
        row_N = np.arange(case.images)
        report = slices.find_slices(correct_N, row_N, given, SliceConfig(max_p=0.05))
        named = slices.find_slices(correct_N, row_N, given).worse
        hidden += any(matches(one.row, planted_N & ~camera_N) for one in named[1:])
        unrelated += any(2 * (planted_N | camera_N)[one.row].sum() < len(one.row) for one in named)
        is_named = {
            f"named_at_{level}": any(one.adjusted_p <= level for one in report.worse[:1])
            for level in (0.01, 0.02, 0.05)
        }
        is_named["holm_at_0.02"] = report.slices[0].p <= 0.02 / report.tested
        # Every rule names the slice with the smallest p-value first.
        is_first = bool(report.worse) and matches(report.worse[0].row, planted_N)
        for rule, flag in is_named.items():
            counts[rule] += flag
            first[rule] += flag and is_first
        also += len(named)
        if case.first_class != 0.5:
            tested = [dataclasses.replace(one, tested=True) for one in given]
            again = slices.find_slices(correct_N, row_N, tested)
            predicted += any(one.property == "predicted label" for one in again.worse)
    result: dict[str, Any] = {"case": case.name, "runs": runs, "tested": report.tested, **counts}
    if case.planted:
        result["planted_first"] = first
        result["slices_named_mean"] = round(also / runs, 2)
        result["runs_with_an_unrelated_slice"] = unrelated
    if case.camera:
        result["hidden_one_named_later"] = hidden
    if case.first_class != 0.5:
        result["predicted_label_named_if_tested"] = predicted
    return result


def matches(row_S: NDArray[np.int64], planted_N: Mask) -> bool:
    """Whether a slice is at least half of the planted one, and at least half of it is planted."""
    both = int(planted_N[row_S].sum())
    return both > 0 and 2 * both >= max(int(planted_N.sum()), len(row_S))


def draw(
    case: Case, base: list[Property], rng: np.random.Generator
) -> tuple[list[Property], Mask, NDArray[np.float64], Mask]:
    """Draw properties, the planted slice, which images are right, and a second planted slice."""
    size = case.images
    row_N = rng.integers(len(base[0].value), size=size)
    value = {one.name: one.value[row_N].copy() for one in base}
    table = draw_table(size, rng)
    planted_N = np.zeros(size, bool)
    if case.kind == "dark":
        planted_N[np.argsort(value["brightness"], kind="stable")[: case.planted]] = True
    elif case.planted:
        planted_N[rng.choice(size, case.planted, replace=False)] = True
    if case.kind == "darkened":
        for name, factor in (("brightness", 0.3), ("contrast", 0.3), ("sharpness", 0.09)):
            value[name][planted_N] *= factor
        value["colourfulness"][planted_N] *= 0.3
        value["file size (KB)"][planted_N] *= 0.7
    camera_N = np.zeros(size, bool)
    if case.camera:
        camera_N[rng.choice(size, case.camera, replace=False)] = True
    if case.kind == "camera" or case.camera:
        camera = next(one for one in table if one.name == "camera")
        is_first = camera_N if case.camera else planted_N
        camera.value[:] = np.where(is_first, 0, rng.integers(1, len(camera.levels), size))
    error_N = np.where(planted_N, 1 - case.accuracy, 1 - case.good)
    error_N[camera_N] = 0.6
    wrong_NL = rng.random((size, case.labels)) < error_N[:, None]
    label_N = (rng.random(size) >= case.first_class).astype(np.int64)
    wrong_N = wrong_NL[:, 0]
    names = ("cats", "dogs")
    given = [Property(name="label", value=label_N, levels=names)]
    if case.labels == 1:
        predicted_N = np.where(wrong_N, 1 - label_N, label_N)
        given.append(
            Property(name="predicted label", value=predicted_N, levels=names, tested=False)
        )
    given += table
    given += [
        Property(name=one.name, value=value[one.name], levels=one.levels, sampled=one.sampled)
        for one in base
    ]
    return given, planted_N, 1 - wrong_NL.mean(1), camera_N


def draw_table(size: int, rng: np.random.Generator) -> list[Property]:
    """Ten columns that have nothing to do with the errors: names and numbers."""
    columns = []
    for name, levels in (
        ("camera", 7),
        ("hospital", 12),
        ("operator", 30),
        ("weekday", 7),
        ("sex", 2),
    ):
        share = rng.dirichlet(np.full(levels, 2.0))
        value_N = rng.choice(levels, size, p=share).astype(np.int64)
        texts = tuple(f"{name} {number}" for number in range(levels))
        columns.append(Property(name=name, value=value_N, levels=texts))
    numbers = {
        "age": rng.normal(50, 15, size).round(),
        "exposure": rng.lognormal(0, 1, size),
        "temperature": rng.normal(20, 5, size).round(1),
        "distance": rng.gamma(2, 3, size),
        "iso": 100.0 * 2 ** rng.integers(0, 6, size),
    }
    return columns + [Property(name=name, value=value) for name, value in numbers.items()]


if __name__ == "__main__":
    main()
