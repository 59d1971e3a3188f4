"""How right the heads are beside scikit-learn's LogisticRegression, on few and on many images.

    .venv/bin/python bench/heads_accuracy.py --data PHOTOS --body mobilenet_v2 --weights FILE
    .venv/bin/python bench/heads_accuracy.py --store STORE

For each of ten seeds, so many images per class are drawn for training, of all of PHOTOS or STORE
whatever their split; a quarter as many (25 at most) for validation; all others are the test. They
become the splits of a copy of the store, and each head is trained on it as `arrowhead train STORE
BUNDLE --head HEAD` trains it (`auto`: no --head), its rate or strength chosen by itself.

scikit-learn gets the same images and standardized features at four values of C, and the best of
the four is the one with the highest mean over seeds, picked with the test labels in hand: nobody
can choose that well. Printed beside each mean: how far it is behind that best, and the standard
error of this difference, seed by seed. Bar: 0.5 points behind at most.

Accuracy is the mean of the classes' recalls, weighted. 10:1: every class but the first has a tenth
of its training images, and so has validation, where it is "as trained"; the classes weigh 10:1 in
the test, or the same. Shuffled: labels that mean nothing; right is chance.
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
RARE = 10  # in 10:1, how many images of the first class there are for one of another


@dataclass(frozen=True, slots=True)
class Case:
    """One way to draw images. train: per class. rare: RARE:1. tests: names of the test weights."""

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
    """Extract unless there is a store, measure, print; JSON if asked to."""
    asked = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    source = asked.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", help="labelled photos, as `arrowhead precompute` takes them")
    source.add_argument("--store", type=Path, help="a feature store, instead of --data")
    asked.add_argument("--body", default="resnet34")
    asked.add_argument("--weights", default="auto")
    asked.add_argument("--mean", type=float, nargs=3, help="of the weights' own training")
    asked.add_argument("--std", type=float, nargs=3, help="of the weights' own training")
    asked.add_argument("--seeds", type=int, default=10)
    asked.add_argument("--heads", nargs="+", default=["auto", "logistic", "linear"])
    asked.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    asked.add_argument("--out", type=Path, help="write the figures there, as JSON")
    settings = asked.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "store"
        if settings.store:
            shutil.copytree(settings.store, place)
        else:
            norm = {name: tuple(v) for name in ("mean", "std") if (v := getattr(settings, name))}
            body = BodyConfig(body=settings.body, weights=settings.weights, **norm)
            precompute.precompute(settings.data, place, FeatureConfig(body=body))
        store = Store(place)
        whole = Catalog(**store.read_catalog())
        found = []
        for name in settings.cases:
            found += measure(store, whole, name, settings.seeds, settings.heads)
    if settings.out:
        about = about_this(store.recipe.body, len(whole), settings.seeds)
        settings.out.write_text(json.dumps({"about": about, "cases": found}, indent=1) + "\n")


def about_this(body: str, images: int, seeds: int) -> dict[str, Any]:
    """What the figures depend on."""
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
    store: Store, whole: Catalog, name: str, seeds: int, ours: list[str]
) -> list[dict[str, Any]]:
    """Of one case: accuracy in percent and seconds of each way, one line for each test."""
    case = CASES[name]
    right: dict[str, dict[str, list[float]]] = {test: {} for test in case.tests}
    seconds: dict[str, list[float]] = {}
    trained_as: set[tuple[str, str]] = set()
    for seed in range(seeds):
        images = complete_from_store(store.path, FeatureConfig(), ())
        precompute.precompute(drawn(whole, case, seed), store.path, images)  # decodes nothing
        test = store.features("test")
        for way, given, took, head in ways(store, test, ours):
            seconds.setdefault(way, []).append(took)
            if head:
                trained_as.add((way, head))
            for weights in case.tests:
                value = accuracy(given, test.label, RARE if weights == "as trained" else 1)
                right[weights].setdefault(way, []).append(value)
    made = []
    for weights, accuracies in right.items():
        context = {way: float(np.mean(values)) for way, values in accuracies.items()}
        best = max((way for way in context if way.startswith("C ")), key=context.__getitem__)
        behind = {}
        for way in ours:
            apart = np.subtract(accuracies[best], accuracies[way])
            error = float(apart.std(ddof=1) / np.sqrt(seeds)) if seeds > 1 else None
            behind[way] = {"mean": float(apart.mean()), "standard_error": error}
        line = {
            "case": name if len(case.tests) == 1 else f"{name}, tested {weights}",
            "trained_as": dict(sorted(trained_as)),
            "accuracy": context,
            "best_c": best,
            "behind_best_c": behind,
            "seconds": {way: float(np.mean(each)) for way, each in seconds.items()},
        }
        made.append(rounded(line))
        show(made[-1])
    return made


def drawn(whole: Catalog, case: Case, seed: int) -> Catalog:
    """The catalog with the splits, and where they are shuffled the labels, of one draw."""
    rng = np.random.default_rng(seed)
    labels = list(whole.labels)
    if case.shuffled:
        labels = [labels[row] for row in rng.permutation(len(labels))]
    splits = np.full(len(labels), "test", dtype="U5")
    for number, class_name in enumerate(whole.classes):
        rows = rng.permutation([row for row, names in enumerate(labels) if names == (class_name,)])
        valid = min(case.train // 4, 25)
        train = case.train // RARE if number and case.rare else case.train
        if number and case.rare == "train and valid":
            valid = max(1, valid // RARE)
        splits[rows[:train]] = "train"
        splits[rows[train : train + valid]] = "valid"
    return dataclasses.replace(whole, labels=labels, splits=splits.tolist())


def ways(
    store: Store, test: Features, ours: list[str]
) -> Iterator[tuple[str, NDArray[np.int64], float, str]]:
    """Each way's labels of the test images, its seconds, and of ours the head that it took."""
    train = store.features("train")
    scaler = StandardScaler().fit(train.feature[:, 0].astype(np.float64))
    wide = scaler.transform(train.feature[:, 0].astype(np.float64))
    tested = scaler.transform(test.feature[:, 0].astype(np.float64))
    for strength in STRENGTHS:
        began = time.perf_counter()
        model = LogisticRegression(C=strength, max_iter=5000).fit(wide, train.label)
        took = time.perf_counter() - began
        yield f"C {strength:g}", model.predict(tested), took, ""
    for asked in ours:
        began = time.perf_counter()
        made = commands_train.learn(store.path, Study(head=TrainConfig(head=asked)))  # type: ignore[arg-type]
        took = time.perf_counter() - began
        assert made.config is not None
        state = {name: torch.from_numpy(value) for name, value in made.winner.state.items()}
        classes = store.manifest()["classes"]
        ready = heads.restore(made.config.architecture, store.recipe.width, len(classes), state)
        with torch.inference_mode():
            given = ready(torch.from_numpy(test.feature[:, 0].astype(np.float32))).argmax(1)
        yield asked, given.numpy(), took, made.config.head


def accuracy(given: NDArray[np.int64], label: NDArray[np.int64], first: int) -> float:
    """Percent right, where the first class weighs `first` times as much as each other one."""
    recall = [float((given[label == number] == number).mean()) for number in np.unique(label)]
    return 100 * float(np.average(recall, weights=[first] + [1] * (len(recall) - 1)))


def rounded(value: Any) -> Any:
    """Numbers to two places, all through."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    return round(value, 2) if isinstance(value, float) else value


def show(line: dict[str, Any]) -> None:
    """One case in a few lines."""
    print(f"{line['case']} ({line['best_c']} is the best of four)", flush=True)
    for way, value in line["accuracy"].items():
        words = f"  {way:10} {value:6.2f}  {line['seconds'][way]:5.2f} s"
        if way in line["behind_best_c"]:
            apart = line["behind_best_c"][way]
            words += f"  behind by {apart['mean']:5.2f} ± {apart['standard_error'] or 0:.2f}"
            words += f"  ({line['trained_as'][way]})"
        print(words, flush=True)


if __name__ == "__main__":
    main()
