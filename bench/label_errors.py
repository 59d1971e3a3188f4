"""Find planted label errors, with Arrowhead, cleanlab and plain scikit-learn, on the same features.

    .venv/bin/python bench/label_errors.py --data PHOTOS --body mobilenet_v2 --weights FILE
    .venv/bin/python bench/label_errors.py --store STORE --digits
    .venv/bin/python bench/label_errors.py --features FEATURES.npz --body efficientnet_lite0

For each of 20 seeds, the labels of 5 % of the images are replaced by another class, drawn at
random. Each method ranks all labels; its precision is the share of replaced labels among the first
k, where k is the number of replaced labels. The photos have a few wrong labels of their own, which
count as mistakes here. The neighbours' settings were chosen on the seeds 100 to 119; seeds 0 to 19
are reported. That the prior of label_noise falls beyond MODE_SHARPNESS was compared with a flat one
on the seeds 100 to 107: the same precision, slightly better estimates. Other settings were chosen
on small synthetic data.

--digits also measures scikit-learn's 1,797 handwritten digits (8 x 8 pixels, enlarged to 128 x
128 JPEGs): ten classes that the body has never seen.

--features takes what another program computed: arrays `feature` (N, D), `label` and `path` (N,) of
text. --body only names it.

--cost N measures time and memory instead, on the features of the photos repeated until there are N,
each with some noise, so that none is a copy. A class is the side of a random plane, or of seven (up
to 100 of 128 classes, of different sizes); 5 % of the labels are replaced.

The results are written after every seed, so that a run that is cut short keeps what it measured.
--without-c1 leaves out the regressions with scikit-learn's default C 1 and what cleanlab makes of
them: on features of 1,280 numbers they take most of the time.

cleanlab is installed into an environment of its own below --cache, so it needs a package index the
first time; without it, its rankers are left out. It is given the held-out probabilities of the
same scikit-learn models as "margin, held out". In-sample: the images were trained on themselves.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import venv
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from arrowhead.commands import precompute
from arrowhead.examine import label_errors
from arrowhead.features.backbone import BodyConfig
from arrowhead.features.feature_config import FeatureConfig
from arrowhead.features.store import Store
from arrowhead.training import run
from arrowhead.training.dataset import Data, InMemoryFeatures

OURS = "Arrowhead"
HELD_OUT = {
    "scikit-learn margin, held out, C 1": 1.0,
    "scikit-learn margin, held out, C 0.001": 1e-3,
}
IN_SAMPLE = {
    "scikit-learn margin, in-sample, C 0.001": 1e-3,
    "scikit-learn margin, in-sample, C 0.0001": 1e-4,
}
CLEANLAB = ("normalized_margin", "self_confidence")
CLEANLAB_PROGRAM = """
import sys
import numpy as np
from cleanlab.count import num_label_issues
from cleanlab.rank import get_label_quality_scores
for line in sys.stdin:
    given, answer = line.rstrip().split("|")
    with np.load(given) as arrays:
        case = arrays["label"], arrays["prob"]
    result = {"count": num_label_issues(*case)}
    for name in ("normalized_margin", "self_confidence"):
        result[name] = get_label_quality_scores(*case, method=name)
    np.savez(answer, **result)
    print("done", flush=True)
"""
Scores = NDArray[np.float64]  # of each image: the lowest is the most suspicious


def main() -> None:
    """Extract features unless a store is given, measure, print, and write JSON with --out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", help="labelled photos, as `arrowhead precompute` takes them")
    source.add_argument("--store", type=Path, help="a feature store, instead of --data")
    source.add_argument("--features", type=Path, help="an .npz file of features, instead of --data")
    parser.add_argument("--digits", action="store_true", help="measure digits, too")
    parser.add_argument("--body", default="resnet34")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--mean", type=float, nargs=3, help="of the weights' own training")
    parser.add_argument("--std", type=float, nargs=3, help="of the weights' own training")
    parser.add_argument("--seeds", type=int, nargs=2, default=(0, 20), metavar=("FIRST", "END"))
    parser.add_argument("--share", type=float, default=0.05, help="of the labels to replace")
    parser.add_argument("--cost", type=int, help="only measure the cost for this many images")
    parser.add_argument("--without-c1", action="store_true", help="leave out the slow peers")
    parser.add_argument("--cache", type=Path, default=Path(".cache/cleanlab"))
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    args = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    if args.without_c1:
        HELD_OUT.pop("scikit-learn margin, held out, C 1")
    peer = None if args.cost else Cleanlab.install(args.cache)
    norm = {name: tuple(v) for name in ("mean", "std") if (v := getattr(args, name))}
    config = FeatureConfig(body=BodyConfig(body=args.body, weights=args.weights, **norm))
    about = environment(args.body, list(args.seeds), args.share, peer)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        stores = {} if args.features else {"photos": args.store or scratch / "photos"}
        if args.data:
            precompute.precompute(args.data, stores["photos"], config)
        if args.digits:
            draw_digits(scratch / "images")
            stores["digits"] = scratch / "digits"
            precompute.precompute(str(scratch / "images"), stores["digits"], config)
        if args.cost:
            results["cost"] = [
                measure_cost(Store(stores["photos"]), args.cost, classes) for classes in (2, 100)
            ]
            write(args.out, about, results)
            stores = {}
        sets = {name: read_store(path) for name, path in stores.items()}
        if args.features:
            sets["photos"] = read_features(args.features)
        for name, (data, paths) in sets.items():
            for result in measure(data, paths, range(*args.seeds), args.share, peer):
                results[name] = result
                write(args.out, about, results)
            show(name, results[name])


def write(path: Path | None, about: dict[str, Any], results: dict[str, Any]) -> None:
    """Write the results so far."""
    if path:
        path.write_text(json.dumps({"about": about} | results, indent=1) + "\n")


class Cleanlab:
    """cleanlab in a process of its own, which answers one case after the other."""

    def __init__(self, python: Path) -> None:
        """python: The interpreter of its environment."""
        query = "from importlib.metadata import version; print(version('cleanlab'))"
        completed = subprocess.run(
            [python, "-c", query], capture_output=True, text=True, check=True
        )
        self.version = completed.stdout.strip()
        self._process = subprocess.Popen(
            [python, "-c", CLEANLAB_PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @classmethod
    def install(cls, folder: Path) -> Cleanlab | None:
        """Install it into an environment in a folder; None, with a message, if that fails."""
        python = folder.absolute() / "bin" / "python"
        try:
            if not python.is_file():
                venv.create(folder, with_pip=True)
            install = [python, "-m", "pip", "install", "--quiet", "cleanlab"]
            check = [python, "-c", "import cleanlab"]
            if subprocess.run(check, capture_output=True).returncode:
                subprocess.run(install, check=True, capture_output=True, text=True)
                subprocess.run(check, check=True, capture_output=True, text=True)
            return cls(python)
        except (OSError, subprocess.CalledProcessError) as error:
            detail = str(getattr(error, "stderr", "") or error).strip().splitlines()[-1:]
            print("cleanlab is left out, it cannot be installed:", *detail, file=sys.stderr)
            return None

    def judge(
        self, label: NDArray[np.int64], prob: NDArray[np.float64]
    ) -> tuple[dict[str, Scores], int]:
        """Its scores, by ranker, and how many label errors it estimates."""
        with tempfile.TemporaryDirectory() as folder:
            given, answer = Path(folder) / "given.npz", Path(folder) / "answer.npz"
            np.savez(given, prob=prob, label=label)
            pipes = self._process.stdin, self._process.stdout
            assert pipes[0] and pipes[1]
            print(f"{given}|{answer}", file=pipes[0], flush=True)
            if pipes[1].readline() != "done\n":
                raise RuntimeError("cleanlab failed; its message is above")
            with np.load(answer) as arrays:
                return {kind: arrays[kind] for kind in CLEANLAB}, int(arrays["count"])


def environment(body: str, seeds: list[int], share: float, peer: Cleanlab | None) -> dict[str, Any]:
    """The settings and versions that the results depend on."""
    versions = {name: version(name) for name in ("numpy", "scikit-learn", "torch")}
    if peer:
        versions["cleanlab"] = peer.version
    return {
        "date": datetime.date.today().isoformat(),
        "body": body,
        "seeds": seeds,
        "share": share,
        "cpus": len(os.sched_getaffinity(0)),
        "versions": versions,
    }


def draw_digits(folder: Path) -> None:
    """Write scikit-learn's digits as JPEGs, one folder for each digit."""
    digits = load_digits()
    for number, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / str(digit) / f"{number:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * 255 / 16).astype(np.uint8)).resize((128, 128))
        image.convert("RGB").save(path, quality=92)


def read_store(path: Path) -> tuple[Data, list[str]]:
    """The data of a store, and the path of each image."""
    store = Store(path)
    data, row = run.read_data(store, "cpu")
    paths = store.read_catalog()["paths"]
    return data, [paths[one] for one in row.tolist()]


def read_features(path: Path) -> tuple[Data, list[str]]:
    """The same from an .npz file; features are rounded to float16, as in a store."""
    with np.load(path) as arrays:
        feature, label, paths = (arrays[name] for name in ("feature", "label", "path"))
    classes, number = np.unique(label, return_inverse=True)
    rows = np.arange(len(paths))
    data = Data(
        feature=InMemoryFeatures(torch.from_numpy(feature.astype(np.float16))[:, None]),
        label=torch.from_numpy(number.astype(np.int64)),
        key=np.random.default_rng(0).permutation(rows).astype(np.uint64),
        train=rows,
        valid=rows[:0],
        classes=classes.tolist(),
    )
    return data, paths.tolist()


def measure(
    data: Data, paths: list[str], seeds: range, share: float, peer: Cleanlab | None
) -> Iterator[dict[str, Any]]:
    """Yield after each seed: the precision of all rankers so far, and Arrowhead's estimates."""
    feature = data.feature.take(torch.arange(len(paths)) * data.feature.shape[1]).double().numpy()
    unchanged = unchanged_labels(data, paths)
    precision: dict[str, list[float]] = {}
    counts: dict[str, list[float]] = {}
    estimates, seconds = [], []
    for seed in seeds:
        label, replaced = replace_labels(data.label.numpy(), len(data.classes), share, seed)
        started = time.perf_counter()
        changed = dataclasses.replace(data, label=torch.from_numpy(label))
        found = label_errors.rank_labels(changed, np.arange(len(paths)))
        seconds.append(time.perf_counter() - started)
        scores = {OURS: np.full(len(paths), np.inf)}
        scores[OURS][found.row] = np.arange(len(found.row))
        for name, prob in scikit_learn(feature, label, seed).items():
            scores[name] = margin(prob, label)
            if peer and name in HELD_OUT:
                strength = f"C {HELD_OUT[name]:g}"
                by_ranker, count = peer.judge(label, prob)
                for kind, score in by_ranker.items():
                    scores[f"cleanlab {kind.replace('_', ' ')}, {strength}"] = score
                counts.setdefault(strength, []).append(count)
        for name, score in scores.items():
            precision.setdefault(name, []).append(precision_at_k(score, replaced))
        estimates.append(
            {
                "estimate": found.estimated_errors,
                "interval": found.interval,
                "flagged": found.flagged,
                "flagged_replaced": int(replaced[found.row[: found.flagged]].sum()),
            }
        )
        yield {
            "images": len(paths),
            "classes": len(data.classes),
            "replaced": int(replaced.sum()),
            "seeds": len(estimates),
            "precision": {name: summarize(values) for name, values in precision.items()},
            "precision_by_seed": {
                name: [round(value, 4) for value in values] for name, values in precision.items()
            },
            "behind_best_peer": behind_best_peer(precision, int(replaced.sum())),
            "estimates": summarize_estimates(estimates, int(replaced.sum())),
            "cleanlab_estimates": {name: summarize(values) for name, values in counts.items()},
            "seconds": summarize(seconds),
            "unchanged_labels": unchanged,
        }


def unchanged_labels(data: Data, paths: list[str]) -> dict[str, Any]:
    """What Arrowhead says about the labels as they are; the first 12 labels at least."""
    found = label_errors.rank_labels(data, np.arange(len(paths)))
    first = slice(max(found.flagged, 12))
    ranked = zip(found.row[first].tolist(), found.score[first].tolist(), strict=True)
    return {
        "flagged": found.flagged,
        "estimate": round(found.estimated_errors, 2),
        "interval": [round(bound, 2) for bound in found.interval],
        "paths": [[paths[one], round(score, 3)] for one, score in ranked],
    }


def replace_labels(
    label: NDArray[np.int64], classes: int, share: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Labels of which a share was replaced by another class, and which ones."""
    rng = np.random.default_rng(seed)
    rows = rng.choice(len(label), round(share * len(label)), replace=False)
    changed = label.copy()
    changed[rows] = (label[rows] + rng.integers(1, classes, len(rows))) % classes
    return changed, changed != label


def scikit_learn(
    feature: NDArray[np.float64], label: NDArray[np.int64], seed: int
) -> dict[str, NDArray[np.float64]]:
    """The probabilities of logistic regressions, held out or in-sample, (N, C) each."""
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    result = {}
    for name, strength in (HELD_OUT | IN_SAMPLE).items():
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
        if name in HELD_OUT:
            prob = cross_val_predict(model, feature, label, cv=folds, method="predict_proba")
        else:
            prob = model.fit(feature, label).predict_proba(feature)
        result[name] = prob
    return result


def margin(prob: NDArray[np.float64], label: NDArray[np.int64]) -> Scores:
    """The logarithm of the label's probability over that of the most likely other class."""
    log = np.log(np.maximum(prob, 1e-300))
    given = log[np.arange(len(label)), label].copy()
    log[np.arange(len(label)), label] = -np.inf
    result: Scores = given - log.max(1)
    return result


def precision_at_k(score: Scores, replaced: NDArray[np.bool_]) -> float:
    """The share of replaced labels among the most suspicious ones, as many as were replaced."""
    return float(replaced[np.argsort(score, kind="stable")[: replaced.sum()]].mean())


def behind_best_peer(precision: dict[str, list[float]], replaced: int) -> dict[str, Any]:
    """How far Arrowhead is behind other rankers: the best on average, and the best of each seed."""
    peers = {name: values for name, values in precision.items() if name != OURS}
    best = max(peers, key=lambda name: float(np.mean(peers[name])))
    ours = np.array(precision[OURS])
    images = {  # by how many images of the first k
        "best_on_average": np.rint((np.array(peers[best]) - ours) * replaced).astype(int),
        "best_of_each_seed": np.rint((np.max([*peers.values()], 0) - ours) * replaced).astype(int),
    }
    result: dict[str, Any] = {
        "best_on_average": best,
        "mean_of_best": round(float(np.mean(peers[best])), 4),
        "mean": round(float(ours.mean()), 4),
    }
    for name, behind in images.items():
        result[f"images_behind_{name}"] = behind.tolist()
        result[f"seeds_more_than_one_image_behind_{name}"] = int((behind > 1).sum())
    return result


def summarize(values: list[float]) -> dict[str, float]:
    """Mean, standard error and range over seeds."""
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
    result = {"mean": np.mean(values), "standard_error": error, "min": min(values)}
    return {name: round(float(value), 4) for name, value in (result | {"max": max(values)}).items()}


def summarize_estimates(estimates: list[dict[str, Any]], replaced: int) -> dict[str, Any]:
    """How good the estimates are over seeds."""
    ratio = [one["estimate"] / replaced for one in estimates]
    return {
        "estimate_over_replaced": summarize(ratio),
        "seeds_within_25_percent": sum(abs(one - 1) <= 0.25 for one in ratio),
        "seeds_in_interval": sum(
            one["interval"][0] <= replaced <= one["interval"][1] for one in estimates
        ),
        "mean_interval": np.round(np.mean([one["interval"] for one in estimates], 0), 1).tolist(),
        "flagged": summarize([one["flagged"] for one in estimates]),
        "flagged_replaced": summarize([one["flagged_replaced"] for one in estimates]),
    }


def measure_cost(store: Store, images: int, classes: int) -> dict[str, Any]:
    """Seconds, and the highest memory beyond features and labels, for repeated features."""
    data, _ = run.read_data(store, "cpu")
    rng = np.random.default_rng(0)
    flat = torch.from_numpy(np.arange(images) % len(data.key) * data.feature.shape[1])
    feature = data.feature.take(flat).numpy()
    deviation = feature[: len(data.key)].std(0)
    for part in np.array_split(feature, max(1, images // 1000)):  # in place
        part += (rng.standard_normal(part.shape) * deviation / 2).astype(np.float16)
    planes = rng.standard_normal((feature.shape[1], 1 if classes == 2 else 7)) / deviation.mean()
    centred = feature - feature.mean(0, dtype=np.float32)
    label = ((centred @ planes > 0) @ (1 << np.arange(planes.shape[1]))) % classes
    del centred
    label, _ = replace_labels(label, classes, 0.05, 0)
    rows = np.arange(images)
    tiled = Data(
        feature=InMemoryFeatures(torch.from_numpy(feature)[:, None]),
        label=torch.from_numpy(label),
        key=rng.permutation(images).astype(np.uint64),
        train=rows,
        valid=rows[:0],
        classes=[str(number) for number in range(classes)],
    )
    before = resident_mib()
    peak = PeakMemory()
    started = time.perf_counter()
    found = label_errors.rank_labels(tiled, rows)
    result = {
        "images": images,
        "classes": classes,
        "features": int(feature.shape[1]),
        "seconds": round(time.perf_counter() - started, 1),
        "more_memory_mib": round(peak.stop() - before),
        "accuracy": round(found.accuracy, 3),
        "estimate": round(found.estimated_errors),
    }
    print(result, flush=True)
    return result


def resident_mib() -> float:
    """The memory of this process, MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class PeakMemory:
    """Looks at the memory of this process every 50 ms."""

    def __init__(self) -> None:
        self._peak, self._stop = resident_mib(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self._peak = max(self._peak, resident_mib())

    def stop(self) -> float:
        """The highest memory so far, MiB."""
        self._stop.set()
        self._thread.join()
        return self._peak


def show(name: str, result: dict[str, Any]) -> None:
    """Print the results on one data set."""
    print(f"{name}: {result['images']} images, {result['replaced']} labels replaced")
    for ranker, one in sorted(result["precision"].items(), key=lambda item: -item[1]["mean"]):
        print(f"  {ranker:42} {one['mean']:.3f} ± {one['standard_error']:.3f} (min {one['min']})")
    for key in ("behind_best_peer", "estimates", "cleanlab_estimates", "seconds"):
        print(f"  {key}: {result[key]}")
    print(f"  unchanged labels: {result['unchanged_labels']}", flush=True)


if __name__ == "__main__":
    main()
