"""Compare fine-tuning with the frozen head, on images that neither has seen.

    .venv/bin/python bench/finetune.py FOLDER --data PHOTOS --body mobilenet_v2 --weights FILE \\
        --size 128 --train 100 --seeds 3 --json bench/results/finetune.json \\
        --settings "" "rates=1e-5,1e-4,1e-3 epochs=3"

Features and pixels of all PHOTOS are computed once, in FOLDER. For each seed, a number of images
per class is drawn for training from all of them, whatever their split; the others, at most --test,
are for the test. The frozen head is the logistic regression that `fit` trains, on the features of
the drawn images, its L2 strength chosen by cross-validation. Fine-tuning starts from it, with each
of the given settings (fields of FinetuneConfig and AugmentConfig, NAME=VALUE; "" for the defaults),
and sees no test image. Both are then tested on the same clean pixels.

It prints accuracy and loss of each, the mean of the differences and their standard error over the
seeds, and how long a training took.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from arrowhead.commands import pixel_cache as commands_pixel_cache
from arrowhead.commands import precompute
from arrowhead.decode.pixels import PixelConfig
from arrowhead.features import extract
from arrowhead.features.backbone import BodyConfig
from arrowhead.features.feature_config import FeatureConfig, complete_from_store
from arrowhead.features.store import Store
from arrowhead.finetuning import run as finetuning_run
from arrowhead.finetuning.augmentation import AugmentConfig
from arrowhead.finetuning.config import FinetuneConfig, resolve_epochs
from arrowhead.finetuning.network import BODY, HEAD, FinetuneNetwork
from arrowhead.finetuning.pixel_cache import PixelCache
from arrowhead.finetuning.run import Request
from arrowhead.finetuning.trainer import Samples
from arrowhead.runtime.worker import Worker
from arrowhead.training import logistic
from arrowhead.training.config import TrainConfig
from arrowhead.training.dataset import Data, InMemoryFeatures, Trial


def main() -> None:
    """Parse the arguments, run, print."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("folder", type=Path)
    flags.add_argument("--data", required=True)
    flags.add_argument("--body", default="resnet34")
    flags.add_argument("--weights", default="auto")
    flags.add_argument("--mean", type=float, nargs=3)
    flags.add_argument("--std", type=float, nargs=3)
    flags.add_argument("--size", type=int)
    flags.add_argument("--train", type=int, default=100, help="images per class")
    flags.add_argument("--test", type=int, default=400, help="most test images")
    flags.add_argument("--seeds", type=int, default=3)
    flags.add_argument("--settings", nargs="+", default=[""])
    flags.add_argument("--json", type=Path)
    args = flags.parse_args()
    store, cache = prepare(args)
    rows = []
    for seed in range(args.seeds):
        for words in args.settings:
            rows.append(run(store, cache, args, seed, words))
            shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}
            print(json.dumps(shown), flush=True)
    summary = [
        summarize(words, [r for r in rows if r["settings"] == words]) for words in args.settings
    ]
    for one in summary:
        print(
            f"{one['settings'] or 'defaults':<60} frozen {one['frozen_accuracy']:.4f}"
            f"  tuned {one['tuned_accuracy']:.4f}  difference {one['points']:+.2f} ±"
            f" {one['standard_error']:.2f} points  loss {one['frozen_loss']:.4f} →"
            f" {one['tuned_loss']:.4f}  {one['seconds']:.0f} s"
        )
    if args.json:
        write(args, rows, summary)


def prepare(args: argparse.Namespace) -> tuple[Store, PixelCache]:
    """The features and the pixels of all images."""
    body = {"body": args.body, "weights": args.weights}
    body |= {name: tuple(getattr(args, name)) for name in ("mean", "std") if getattr(args, name)}
    images = FeatureConfig(body=BodyConfig(**body), pixels=PixelConfig(size=args.size))
    path = args.folder / "frozen" / "store"
    images = complete_from_store(path, images, {*body, "size"} if args.size else body)
    precompute.precompute(args.data, path, images)
    store = Store(path)
    pixels = extract.make_pixel_config(store.recipe)
    images = dataclasses.replace(images, pixels=pixels)
    commands_pixel_cache.build_pixel_cache(args.data, args.folder / "pixels", images)
    return store, PixelCache(args.folder / "pixels")


def draw(label: NDArray[np.int64], args: argparse.Namespace, seed: int) -> list[NDArray[np.int64]]:
    """Rows for training and for the test."""
    order = np.random.default_rng(seed).permutation(len(label))
    chosen = np.concatenate([order[label[order] == c][: args.train] for c in np.unique(label)])
    rest = order[~np.isin(order, chosen)]
    return [np.sort(chosen), np.sort(rest[: args.test])]


def run(
    store: Store, cache: PixelCache, args: argparse.Namespace, seed: int, words: str
) -> dict[str, Any]:
    """Train the frozen head and fine-tune it, with one seed and one setting."""
    part = store.features()
    assert np.array_equal(part.row, cache.rows)
    label = torch.from_numpy(part.label)
    train, test = draw(part.label, args, seed)
    data = Data(
        feature=InMemoryFeatures(torch.from_numpy(part.feature)),
        label=label,
        key=part.image_id,
        train=train,
        valid=test,
        classes=list(cache.classes),
    )
    trial = Trial(config=TrainConfig(head="logistic"), lr=0.0, train=train, valid=test)
    head = logistic.train(data, [trial])[0].state
    state = extract.load_weights(store.recipe, store.weights_path)
    tensors = {f"{BODY}{name}": t for name, t in state.items()}
    tensors |= {f"{HEAD}{name}": torch.tensor(value) for name, value in head.items()}
    config, augment = settings_of(words, seed)
    request = Request(
        recipe=store.recipe,
        architecture="linear",
        classes=tuple(cache.classes),
        config=resolve_epochs(config, len(train)),
        augment=augment,
        start="",
    )
    worker = Worker(0, 1, device(), os.cpu_count() or 1, lambda: None, lambda report: None)
    tuned = FinetuneNetwork(
        store.recipe.to_dict(), "linear", len(cache.classes), tensors, worker.device
    )
    samples = Samples(label=label, train=train, valid=test, classes=list(cache.classes))
    training = finetuning_run.make_training(worker, cache, samples, tuned, request)
    frozen = training.validate()
    start = time.perf_counter()
    while not training.finished:
        training.train(lambda one: None)
    tuned_metrics = training.history[-1]
    return {
        "settings": words,
        "seed": seed,
        "frozen_accuracy": frozen["accuracy"],
        "tuned_accuracy": tuned_metrics["accuracy"],
        "frozen_loss": frozen["valid_loss"],
        "tuned_loss": tuned_metrics["valid_loss"],
        "epochs": [round(one["accuracy"], 4) for one in training.history],
        "seconds": time.perf_counter() - start,
        "test_images": len(test),
    }


def device() -> str:
    """The first GPU, if there is one."""
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def settings_of(words: str, seed: int) -> tuple[FinetuneConfig, AugmentConfig]:
    """Settings from text such as "epochs=3 augment=none"."""
    given: dict[str, Any] = {}
    for word in words.split():
        name, _, value = word.partition("=")
        try:
            given[name] = json.loads(value)
        except ValueError:
            given[name] = value
    ours = {field.name for field in dataclasses.fields(FinetuneConfig)} - {"seed"}
    tuning = {name: value for name, value in given.items() if name in ours}
    augment = {name: value for name, value in given.items() if name not in ours}
    return FinetuneConfig(**tuning, seed=seed), AugmentConfig(**augment, seed=seed)


def summarize(words: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, and the difference in percentage points with its standard error."""
    names = ("frozen_accuracy", "tuned_accuracy", "frozen_loss", "tuned_loss", "seconds")
    difference = np.array([100 * (r["tuned_accuracy"] - r["frozen_accuracy"]) for r in rows])
    error = difference.std(ddof=1) / np.sqrt(len(rows)) if len(rows) > 1 else float("nan")
    means = {name: float(np.mean([r[name] for r in rows])) for name in names}
    return (
        {"settings": words}
        | means
        | {
            "points": float(difference.mean()),
            "standard_error": float(error),
        }
    )


def write(args: argparse.Namespace, rows: list[dict[str, Any]], summary: Any) -> None:
    """Write the result, with how it was made."""
    made = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "body": args.body,
        "weights": Path(args.weights).name,
        "size": args.size,
        "data": Path(args.data).name,
        "train_per_class": args.train,
        "cpus": os.cpu_count(),
        "device": device(),
        "torch": torch.__version__,
    }
    content = {"made": made, "summary": summary, "runs": rows}
    args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
