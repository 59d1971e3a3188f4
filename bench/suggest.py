"""Compare ways to choose which images to label next.

    .venv/bin/python bench/suggest.py --store STORE

For each seed, half of the images of STORE (and of scikit-learn's digits, whose pixels serve as
features) are the pool, the others the test. Some random images of the pool are labelled, with at
least one of each class. Then each method chooses --picks images per round, which are labelled and
added. A logistic regression on standardized features is trained after each round; its balanced
accuracy on the test is what is compared. In "10:1" the pool has a tenth as many images of every
class but the first. In "cold start" nothing is labelled before the first round.

Printed: the mean accuracy after each round, the mean difference to random picks over the rounds
with its standard error over seeds, and for a cold start how often every class was among the picks.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from arrowhead.examine import suggest
from arrowhead.features.store import Store

Rows = NDArray[Any]
C = 0.1  # of the logistic regression
NEIGHBOURS = 20  # whose mean similarity is how typical TypiClust finds an image


@dataclass(frozen=True, slots=True)
class Task:
    """Features and labels. start: labelled images at first. ratio: images of the first class per
    image of another in the pool.
    """

    feature: Rows
    label: Rows
    start: int
    picks: int
    rounds: int
    ratio: int = 1


@dataclass(frozen=True, slots=True)
class Round:
    """What a method may choose from: standardized unit features and probabilities of M images, unit
    features of the labelled ones, and how many to choose.
    """

    unit: Rows
    probability: Rows | None
    labelled: Rows
    count: int
    seed: int

    @property
    def uncertainty(self) -> Rows:
        """1 minus the margin between the two most probable classes."""
        assert self.probability is not None
        best = np.sort(self.probability, 1)[:, -2:]
        return np.asarray(1 - (best[:, 1] - best[:, 0]))


# --------------------------------------------------------------------------------- methods


def at_random(task: Round) -> Rows:
    """Images drawn at random."""
    return np.random.default_rng(task.seed).permutation(len(task.unit))[: task.count]


def most_uncertain(task: Round) -> Rows:
    """The images with the smallest margin."""
    return np.argsort(-task.uncertainty, kind="stable")[: task.count]


def clusters(task: Round) -> Rows:
    """Arrowhead without a bundle: k-means of all images."""
    return suggest.spread(task.unit, task.count)[0]


def weighted_clusters(shortlist: int) -> Callable[[Round], Rows]:
    """k-means of the most uncertain images, weighted by uncertainty."""

    def choose(task: Round) -> Rows:
        order = np.argsort(-task.uncertainty, kind="stable")[: shortlist * task.count]
        weight = task.uncertainty[order]
        return np.asarray(order[suggest.spread(task.unit[order], task.count, weight)[0]])

    return choose


def uncertain_clusters(shortlist: int) -> Callable[[Round], Rows]:
    """k-means of the most uncertain images."""

    def choose(task: Round) -> Rows:
        order = np.argsort(-task.uncertainty, kind="stable")[: shortlist * task.count]
        return np.asarray(order[suggest.spread(task.unit[order], task.count)[0]])

    return choose


def farthest(task: Round) -> Rows:
    """Core-set (Sener and Savarese, arXiv:1708.00489): the farthest from all labelled images."""
    unit, picked = task.unit, []
    if len(task.labelled):
        distance = (2 - 2 * unit @ task.labelled.T).min(1)
    else:
        distance = 2 - 2 * unit @ unit[np.argmax(unit @ unit.mean(0))]
    while len(picked) < task.count:
        picked.append(int(np.argmax(distance)))
        distance = np.minimum(distance, 2 - 2 * unit @ unit[picked[-1]])
    return np.array(picked)


def badge(task: Round) -> Rows:
    """BADGE (Ash et al., arXiv:1906.03671): k-means++ on the gradients of the last layer."""
    assert task.probability is not None
    rng = np.random.default_rng(task.seed)
    error = task.probability.copy()
    error[np.arange(len(error)), error.argmax(1)] -= 1
    square = (error**2).sum(1) * (task.unit**2).sum(1)

    def distance_to(at: int) -> Rows:
        product = (error @ error[at]) * (task.unit @ task.unit[at])
        return np.maximum(square + square[at] - 2 * product, 0)

    picked = [int(np.argmax(square))]
    distance = distance_to(picked[0])
    while len(picked) < task.count:
        distance[picked] = 0
        picked.append(int(rng.choice(len(distance), p=distance / distance.sum())))
        distance = np.minimum(distance, distance_to(picked[-1]))
    return np.array(picked)


def typiclust(task: Round) -> Rows:
    """TypiClust (Hacohen et al., arXiv:2202.02794): the densest image of each large cluster without
    a labelled one.
    """
    count = min(len(task.labelled) + task.count, len(task.unit) // 2)
    everything = np.concatenate([task.unit, task.labelled])
    cluster = KMeans(count, n_init=1, random_state=task.seed).fit(everything).labels_
    free, taken = cluster[: len(task.unit)], cluster[len(task.unit) :]
    covered, size = np.bincount(taken, minlength=count), np.bincount(free, minlength=count)
    picked = []
    for one in np.lexsort((-size, covered)):
        member = np.flatnonzero(free == one)
        if len(member) and len(picked) < task.count:
            near = np.sort(task.unit[member] @ task.unit[member].T, 1)[:, ::-1]
            picked.append(int(member[near[:, : NEIGHBOURS + 1].mean(1).argmax()]))
    return np.array(picked)


METHODS: dict[str, Callable[[Round], Rows]] = {
    "random": at_random,
    "most uncertain": most_uncertain,
    "k-means of all": clusters,
    "k-means of 10x uncertain": uncertain_clusters(10),
    "weighted, 10x uncertain": weighted_clusters(10),
    "weighted, 25x uncertain": weighted_clusters(25),
    "core-set": farthest,
    "BADGE": badge,
    "TypiClust": typiclust,
}
COLD = ("random", "k-means of all", "core-set", "TypiClust")


# ------------------------------------------------------------------------------- measuring


def main() -> None:
    """Measure, print, and write JSON with --out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")  # few iterations of the solver
    store = Store(args.store)
    known = store.features()
    photos = standardized(known.feature[:, 0].astype(np.float32)), known.label
    digits = load_digits()
    numbers = standardized(digits.data.astype(np.float32)), digits.target
    tasks = {
        "photos, 10 + 10 a round": Task(*photos, start=10, picks=10, rounds=4),
        "photos, 20 + 20 a round": Task(*photos, start=20, picks=20, rounds=3),
        "photos 10:1, 20 + 20 a round": Task(*photos, start=20, picks=20, rounds=3, ratio=10),
        "digits, 20 + 20 a round": Task(*numbers, start=20, picks=20, rounds=4),
        "photos, cold start, 10": Task(*photos, start=0, picks=10, rounds=1),
        "photos, cold start, 20": Task(*photos, start=0, picks=20, rounds=1),
        "digits, cold start, 20": Task(*numbers, start=0, picks=20, rounds=1),
    }
    about = {
        "date": datetime.date.today().isoformat(),
        "body": store.recipe.body,
        "images": len(known.row),
        "seeds": args.seeds,
        "C": C,
        "cores": len(os.sched_getaffinity(0)),
        "scikit-learn": version("scikit-learn"),
    }
    results: dict[str, Any] = {"about": about}
    for name, task in tasks.items():
        results[name] = compare(name, task, args.seeds, args.methods)
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")


def standardized(rows: Rows) -> Rows:
    """Rows with mean 0 and standard deviation 1 in every column that varies."""
    std = rows.std(0)
    return np.asarray((rows - rows.mean(0)) / np.where(std < 1e-6, 1, std))


def compare(name: str, task: Task, seeds: int, methods: list[str]) -> dict[str, Any]:
    """Run all methods from the same start on every seed."""
    methods = [one for one in methods if task.start or one in COLD]
    runs: dict[str, list[Any]] = {one: [] for one in methods}
    for seed in range(seeds):
        pool, test, start = draw(task, seed)
        for one in methods:
            runs[one].append(run(task, METHODS[one], pool, test, start, seed))
    print(name)
    base = np.array([accuracy for accuracy, _ in runs["random"]])
    result = {}
    for one, pairs in runs.items():
        accuracy = np.array([accuracy for accuracy, _ in pairs])
        first = 1 if task.start else 0  # before the first round all are equal
        gain = (accuracy - base)[:, first:].mean(1)
        result[one] = {
            "accuracy": accuracy.mean(0).tolist(),
            "gain": float(gain.mean()),
            "gain_error": float(gain.std(ddof=1) / np.sqrt(seeds)) if seeds > 1 else None,
            "all_classes": float(np.mean([complete for _, complete in pairs])),
        }
        words = " ".join(f"{100 * one:6.2f}" for one in accuracy.mean(0))
        words += f"   {100 * gain.mean():+6.2f} ± {100 * (result[one]['gain_error'] or 0):.2f}"
        if not task.start:
            words += f"   every class in {100 * result[one]['all_classes']:.0f} %"
        print(f"  {one:<26} {words}", flush=True)
    return result


def draw(task: Task, seed: int) -> tuple[Rows, Rows, Rows]:
    """Rows of the pool, of the test, and of the images that are labelled at first."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(task.label))
    pool, test = order[: len(order) // 2], order[len(order) // 2 :]
    if task.ratio > 1:
        common, rare = (pool[(task.label[pool] == 0) == wanted] for wanted in (True, False))
        pool = rng.permutation(np.concatenate([common, rare[: len(common) // task.ratio]]))
    if not task.start:
        return pool, test, pool[:0]
    labels = task.label[pool]
    firsts = [int(np.flatnonzero(labels == one)[0]) for one in np.unique(labels)]
    rest = [at for at in range(len(pool)) if at not in firsts]
    return pool, test, pool[[*firsts, *rest[: max(0, task.start - len(firsts))]]]


def run(
    task: Task,
    method: Callable[[Round], Rows],
    pool: Rows,
    test: Rows,
    start: Rows,
    seed: int,
) -> tuple[list[float], bool]:
    """Balanced accuracy before and after each round (from a cold start only after), and whether
    every class is labelled at the end.
    """
    norm = np.linalg.norm(task.feature, axis=1, keepdims=True)
    unit, labelled = task.feature / np.maximum(norm, 1e-12), start
    accuracies = [score(task, labelled, test)] if len(start) else []
    for number in range(task.rounds):
        free = np.setdiff1d(pool, labelled)
        probability = predict(task, labelled, free) if len(labelled) else None
        picked = method(
            Round(unit[free], probability, unit[labelled], task.picks, 1000 * seed + number)
        )
        labelled = np.concatenate([labelled, free[picked]])
        accuracies.append(score(task, labelled, test))
    return accuracies, len(np.unique(task.label[labelled])) == task.label.max() + 1


def predict(task: Task, labelled: Rows, rows: Rows) -> Rows:
    """Probabilities of all classes, those without a labelled image being 0."""
    probability = np.zeros((len(rows), int(task.label.max()) + 1))
    classes = np.unique(task.label[labelled])
    if len(classes) == 1:
        probability[:, classes[0]] = 1
        return probability
    model = LogisticRegression(C=C, max_iter=200)
    model.fit(task.feature[labelled], task.label[labelled])
    probability[:, classes] = model.predict_proba(task.feature[rows])
    return probability


def score(task: Task, labelled: Rows, test: Rows) -> float:
    """Mean recall of the classes."""
    right = predict(task, labelled, test).argmax(1) == task.label[test]
    recalls = [right[task.label[test] == one].mean() for one in np.unique(task.label)]
    return float(np.mean(recalls))


if __name__ == "__main__":
    main()
