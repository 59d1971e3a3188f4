"""Compare the accuracy of the heads with scikit-learn's LogisticRegression, on few and many images.

    .venv/bin/python bench/heads_accuracy.py --data PHOTOS --body mobilenet_v2 --weights FILE
    .venv/bin/python bench/heads_accuracy.py --store STORE

For each of ten seeds, a number of images per class is drawn for training, from all of PHOTOS or
STORE, whatever their split; a quarter as many (at most 25) for validation; all others are for the
test. They become the splits of a copy of the store, and each head is trained on it as `arrowhead
train STORE BUNDLE --head HEAD` does (`auto`: without --head), with its own choice of learning rate
or strength.

scikit-learn gets the same images and standardized features with four values of C. The best value is
the one with the highest mean test accuracy over seeds, which is chosen on the test labels and so
cannot be reached in practice. For each head this prints how far its mean is behind that best, with
the standard error of the difference over seeds. The aim is at most 0.5 points behind.

Accuracy is the weighted mean of the recalls of the classes. 10:1: every class but the first has a
tenth of its training images, and in "validated as trained" also a tenth of its validation images;
in the test the classes are weighted 10:1 or equally. Shuffled: the labels are random, so the
accuracy is that of chance.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from arrowhead.commands import precompute
from arrowhead.commands import train as commands_train
from arrowhead.data.catalog import Catalog
from arrowhead.features.backbone import BodyConfig
from arrowhead.features.feature_config import FeatureConfig, complete_from_store
from arrowhead.features.store import Features, Store
from arrowhead.training import heads
from arrowhead.training.config import TrainConfig
from arrowhead.training.study import Study

STRENGTHS = (0.01, 0.1, 1.0, 10.0)
RATIO = 10  # in 10:1, images of the first class per image of another class


@dataclass(frozen=True, slots=True)
class Case:
    """How images are drawn. train: images per class. rare: where classes are RATIO:1. tests: the
    weightings of the test.
    """

    train: int
    rare: Literal["", "train", "train and valid"] = ""
    shuffled: bool = False
    tests: tuple[str, ...] = ("even",)


CASES = {
    "20 per class": Case(20),
    "60 per class": Case(60),
    "300 per class": Case(300),
    "10:1, validated as trained": Case(300, "train and valid", tests=("as trained", "even")),
    "10:1, validated evenly": Case(300, "train"),
    "60 per class, shuffled": Case(60, shuffled=True),
}


def main() -> None:
    """Extract features unless a store is given, measure, print, and write JSON with --out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", help="labelled photos, as `arrowhead precompute` takes them")
    source.add_argument("--store", type=Path, help="a feature store, instead of --data")
    parser.add_argument("--body", default="resnet34")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--mean", type=float, nargs=3, help="of the weights' own training")
    parser.add_argument("--std", type=float, nargs=3, help="of the weights' own training")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--heads", nargs="+", default=["auto", "logistic", "linear"])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    args = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "store"
        if args.store:
            shutil.copytree(args.store, copy)
        else:
            norm = {name: tuple(v) for name in ("mean", "std") if (v := getattr(args, name))}
            body = BodyConfig(body=args.body, weights=args.weights, **norm)
            precompute.precompute(args.data, copy, FeatureConfig(body=body))
        store = Store(copy)
        catalog = Catalog(**store.read_catalog())
        results = []
        for name in args.cases:
            results += measure(store, catalog, name, args.seeds, args.heads)
    if args.out:
        about = environment(store.recipe.body, len(catalog), args.seeds)
        args.out.write_text(json.dumps({"about": about, "cases": results}, indent=1) + "\n")


def environment(body: str, images: int, seeds: int) -> dict[str, Any]:
    """The settings and versions that the results depend on."""
    names = ("numpy", "scikit-learn", "torch")
    return {
        "date": datetime.date.today().isoformat(),
        "body": body,
        "images": images,
        "seeds": seeds,
        "cpus": len(os.sched_getaffinity(0)),
        "versions": {name: version(name) for name in names},
    }


def measure(
    store: Store, catalog: Catalog, name: str, seeds: int, head_kinds: list[str]
) -> list[dict[str, Any]]:
    """Accuracy in percent and seconds of each model in one case: one result for each test."""
    case = CASES[name]
    measured: dict[str, dict[str, list[float]]] = {test: {} for test in case.tests}
    seconds: dict[str, list[float]] = {}
    trained_as: set[tuple[str, str]] = set()
    for seed in range(seeds):
        images = complete_from_store(store.path, FeatureConfig(), ())
        precompute.precompute(
            draw_splits(catalog, case, seed), store.path, images
        )  # decodes nothing
        test = store.features("test")
        for model, predicted, duration, head in predictions(store, test, head_kinds):
            seconds.setdefault(model, []).append(duration)
            if head:
                trained_as.add((model, head))
            for weights in case.tests:
                value = accuracy(predicted, test.label, RATIO if weights == "as trained" else 1)
                measured[weights].setdefault(model, []).append(value)
    results = []
    for weights, accuracies in measured.items():
        mean = {model: float(np.mean(values)) for model, values in accuracies.items()}
        best = max((model for model in mean if model.startswith("C ")), key=mean.__getitem__)
        behind = {}
        for kind in head_kinds:
            difference = np.subtract(accuracies[best], accuracies[kind])
            error = float(difference.std(ddof=1) / np.sqrt(seeds)) if seeds > 1 else None
            behind[kind] = {"mean": float(difference.mean()), "standard_error": error}
        result = {
            "case": name if len(case.tests) == 1 else f"{name}, tested {weights}",
            "trained_as": dict(sorted(trained_as)),
            "accuracy": mean,
            "best_c": best,
            "behind_best_c": behind,
            "seconds": {model: float(np.mean(each)) for model, each in seconds.items()},
        }
        results.append(round_numbers(result))
        show(results[-1])
    return results


def draw_splits(catalog: Catalog, case: Case, seed: int) -> Catalog:
    """The catalog with new random splits, and in a shuffled case with shuffled labels."""
    rng = np.random.default_rng(seed)
    labels = list(catalog.labels)
    if case.shuffled:
        labels = [labels[row] for row in rng.permutation(len(labels))]
    splits = np.full(len(labels), "test", dtype="U5")
    for number, class_name in enumerate(catalog.classes):
        rows = rng.permutation([row for row, names in enumerate(labels) if names == (class_name,)])
        valid = min(case.train // 4, 25)
        train = case.train // RATIO if number and case.rare else case.train
        if number and case.rare == "train and valid":
            valid = max(1, valid // RATIO)
        splits[rows[:train]] = "train"
        splits[rows[train : train + valid]] = "valid"
    return dataclasses.replace(catalog, labels=labels, splits=splits.tolist())


def predictions(
    store: Store, test: Features, head_kinds: list[str]
) -> Iterator[tuple[str, NDArray[np.int64], float, str]]:
    """For each model: its name, predicted labels of the test images, seconds, and the kind of head
    (empty for scikit-learn).
    """
    train = store.features("train")
    scaler = StandardScaler().fit(train.feature[:, 0].astype(np.float64))
    train_feature = scaler.transform(train.feature[:, 0].astype(np.float64))
    test_feature = scaler.transform(test.feature[:, 0].astype(np.float64))
    for strength in STRENGTHS:
        start = time.perf_counter()
        model = LogisticRegression(C=strength, max_iter=5000).fit(train_feature, train.label)
        seconds = time.perf_counter() - start
        yield f"C {strength:g}", model.predict(test_feature), seconds, ""
    for kind in head_kinds:
        start = time.perf_counter()
        learned = commands_train.run_study(store.path, Study(head=TrainConfig(head=kind)))  # type: ignore[arg-type]
        seconds = time.perf_counter() - start
        assert learned.config is not None
        state = {name: torch.from_numpy(value) for name, value in learned.winner.state.items()}
        classes = store.manifest()["classes"]
        head = heads.restore_head(
            learned.config.architecture, store.recipe.width, len(classes), state
        )
        with torch.inference_mode():
            predicted = head(torch.from_numpy(test.feature[:, 0].astype(np.float32))).argmax(1)
        yield kind, predicted.numpy(), seconds, learned.config.head


def accuracy(predicted: NDArray[np.int64], label: NDArray[np.int64], first: int) -> float:
    """Accuracy in percent, with the first class weighted `first` times as much as the others."""
    recall = [float((predicted[label == number] == number).mean()) for number in np.unique(label)]
    return 100 * float(np.average(recall, weights=[first] + [1] * (len(recall) - 1)))


def round_numbers(value: Any) -> Any:
    """Round all numbers to two decimal places."""
    if isinstance(value, dict):
        return {name: round_numbers(one) for name, one in value.items()}
    return round(value, 2) if isinstance(value, float) else value


def show(result: dict[str, Any]) -> None:
    """Print the result of one case."""
    print(f"{result['case']} ({result['best_c']} is the best of four)", flush=True)
    for model, value in result["accuracy"].items():
        line = f"  {model:10} {value:6.2f}  {result['seconds'][model]:5.2f} s"
        if model in result["behind_best_c"]:
            behind = result["behind_best_c"][model]
            line += f"  behind by {behind['mean']:5.2f} ± {behind['standard_error'] or 0:.2f}"
            line += f"  ({result['trained_as'][model]})"
        print(line, flush=True)


if __name__ == "__main__":
    main()
