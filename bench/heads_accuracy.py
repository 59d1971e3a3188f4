"""How right the heads are beside scikit-learn's LogisticRegression, on few and on many images.

    .venv/bin/python bench/heads_accuracy.py --data PHOTOS --body mobilenet_v2 --weights FILE
    .venv/bin/python bench/heads_accuracy.py --store STORE

PHOTOS has train/ and valid/. For each of ten seeds, so many images per class are drawn from train/;
of valid/, a quarter of that number per class (half of valid/ at most) is the validation split and
the rest is the test. scikit-learn gets the same standardized features at four values of C, and the
best of the four is picked with the test labels in hand: nobody can choose that well. Ours choose
their rate or strength themselves. Bar: on average no more than 0.5 points below that best.

Imbalance: every class but the first has a tenth of its images; tested as it was trained, and on as
many of each class. Shuffled: labels that mean nothing; right is chance.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from arrowhead import heads, logistic, lr_finder, pipeline, train
from arrowhead.features import FeatureConfig
from arrowhead.lr_finder import FinderConfig
from arrowhead.model import BodyConfig
from arrowhead.shards import Store
from arrowhead.train import Data, Member, TrainConfig, Trained

STRENGTHS = (0.01, 0.1, 1.0, 10.0)
CASES = (
    ("20 per class", 20, ""),
    ("60 per class", 60, ""),
    ("300 per class", 300, ""),
    ("10:1, tested as trained", 300, "rare"),
    ("10:1, tested half and half", 300, "rare, even test"),
    ("60 per class, shuffled", 60, "shuffled"),
)
Rows = NDArray[Any]


def main() -> None:
    """Extract unless there is a store, measure, print; JSON if asked to."""
    asked = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    asked.add_argument("--data")
    asked.add_argument("--store", type=Path)
    asked.add_argument("--body", default="resnet34")
    asked.add_argument("--weights", default="auto")
    asked.add_argument("--mean", type=float, nargs=3)
    asked.add_argument("--std", type=float, nargs=3)
    asked.add_argument("--seeds", type=int, default=10)
    asked.add_argument("--heads", nargs="+", default=["logistic", "linear"])
    asked.add_argument("--out", type=Path)
    settings = asked.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        place = settings.store or Path(folder) / "store"
        if not settings.store:
            norm = {name: tuple(v) for name in ("mean", "std") if (v := getattr(settings, name))}
            body = BodyConfig(body=settings.body, weights=settings.weights, **norm)
            pipeline.precompute(settings.data, place, FeatureConfig(body=body))
        found = measure(Store(place), settings.seeds, settings.heads)
    show(found)
    if settings.out:
        settings.out.write_text(json.dumps(found, indent=1) + "\n")


def measure(store: Store, seeds: int, ours: list[str]) -> list[dict[str, Any]]:
    """Per case: accuracy in percent and seconds of each way, means over seeds."""
    parts = [store.features(split) for split in ("train", "valid")]
    pool, other = ((one.feature, one.label) for one in parts)
    classes = store.manifest()["classes"]
    made = []
    for name, count, how in CASES:
        right: dict[str, list[float]] = {}
        seconds: dict[str, list[float]] = {}
        for seed in range(seeds):
            data, test = draw(pool, other, count, how, seed, classes)
            for way, label in ways(data, test, ours, seconds):
                right.setdefault(way, []).append(100 * float(np.mean(label == test[1])))
        means = {way: round(float(np.mean(values)), 2) for way, values in right.items()}
        best = max(value for way, value in means.items() if way.startswith("C "))
        made.append(
            {
                "case": name,
                "accuracy": means,
                "behind the best C": {way: round(best - means[way], 2) for way in ours},
                "seconds": {way: round(float(np.mean(each)), 2) for way, each in seconds.items()},
            }
        )
        show(made[-1:])
    return made


def draw(
    pool: tuple[Rows, Rows],
    other: tuple[Rows, Rows],
    count: int,
    how: str,
    seed: int,
    classes: list[str],
) -> tuple[Data, tuple[Rows, Rows]]:
    """Images to train and validate on, and to test with."""
    rng = np.random.default_rng(seed)
    labels = [one[1] if how != "shuffled" else rng.permutation(one[1]) for one in (pool, other)]
    train_rows, valid_rows, test_rows = [], [], []
    for number in range(len(classes)):
        rare = number > 0 and how.startswith("rare")
        mine = rng.permutation(np.flatnonzero(labels[0] == number))
        train_rows.append(mine[: max(2, min(count, len(mine)) // (10 if rare else 1))])
        rest = rng.permutation(np.flatnonzero(labels[1] == number))
        held = max(1, min(count // 4, len(rest) // 2) // (10 if rare and how == "rare" else 1))
        valid_rows.append(rest[:held])
        few = max(1, (len(rest) - len(rest) // 2) // 10) if how == "rare" and rare else None
        test_rows.append(rest[len(rest) // 2 :][:few] if how.startswith("rare") else rest[held:])
    train_at, valid_at, test_at = map(np.concatenate, (train_rows, valid_rows, test_rows))
    data = Data.of(
        (pool[0][train_at], labels[0][train_at]), (other[0][valid_at], labels[1][valid_at]), classes
    )
    return data, (other[0][test_at][:, 0], labels[1][test_at])


def ways(
    data: Data, test: tuple[Rows, Rows], ours: list[str], seconds: dict[str, list[float]]
) -> Iterator[tuple[str, Rows]]:
    """Each way's labels of the test images."""
    rows = torch.from_numpy(data.train * data.feature.shape[1])
    feature, label = data.feature.take(rows).double().numpy(), data.label[data.train].numpy()
    scaler = StandardScaler().fit(feature)
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=5000)
        model.fit(scaler.transform(feature), label)
        yield f"C {strength:g}", model.predict(scaler.transform(test[0].astype(np.float64)))
    for head in ours:
        began = time.perf_counter()
        made = MAKERS[head](data)
        seconds.setdefault(head, []).append(time.perf_counter() - began)
        state = {name: torch.from_numpy(value) for name, value in made.state.items()}
        ready = heads.restore("linear", test[0].shape[1], len(data.classes), state)
        with torch.inference_mode():
            yield head, ready(torch.from_numpy(test[0].astype(np.float32))).argmax(1).numpy()


def exact(data: Data) -> Trained:
    """--head logistic, the default."""
    config = TrainConfig(head="logistic")
    member = Member(config=config, rate=0.0, train=data.train, valid=data.valid)
    return logistic.train(data, [member])[0]


def by_descent(data: Data) -> Trained:
    """--head linear at its defaults: --epochs auto, --rate auto."""
    config = train.resolve(TrainConfig(head="linear"), len(data.train))
    return train.train(data, config, lr_finder.find(data, config, FinderConfig()).rate)


def five_epochs(data: Data) -> Trained:
    """--epochs 5: as short a schedule as it is asked for."""
    config = TrainConfig(head="linear", epochs=5)
    return train.train(data, config, lr_finder.find(data, config, FinderConfig()).rate)


MAKERS: dict[str, Callable[[Data], Trained]] = {
    "logistic": exact,
    "linear": by_descent,
    "linear, 5 epochs": five_epochs,
}


def show(found: list[dict[str, Any]]) -> None:
    """One line per case."""
    for one in found:
        each = " | ".join(f"{way} {value:.2f}" for way, value in one["accuracy"].items())
        print(f"{one['case']:28} {each} | behind {one['behind the best C']} | {one['seconds']} s")


if __name__ == "__main__":
    main()
