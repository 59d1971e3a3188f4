"""Compare Arrowhead's novelty detector with the alternatives that it was chosen from.

    .venv/bin/python bench/novelty.py --data PHOTOS --body mobilenet_v2 --weights FILE

PHOTOS has train/ and valid/. The novel images are textures drawn by `arrowhead demo`, and crops of
the photographs that matplotlib and scikit-learn contain (a portrait, a flower, a palace). For each
detector and kind of novel image this prints the AUROC against the validation photos and the share
that is flagged at 5 % false alarms.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import roc_auc_score

from arrowhead import demo
from arrowhead.bundle import replay
from arrowhead.commands import precompute
from arrowhead.evaluation.novelty import NoveltyDetector
from arrowhead.features import extract
from arrowhead.features.backbone import BodyConfig
from arrowhead.features.feature_config import FeatureConfig
from arrowhead.features.store import Store

PHOTOS = ("matplotlib/mpl-data/sample_data/grace_hopper.jpg",)
PHOTOS += ("sklearn/datasets/images/flower.jpg", "sklearn/datasets/images/china.jpg")
Rows = NDArray[Any]
Detector = Callable[[Rows], Rows]


def main() -> None:
    """Extract features, measure, print, and write JSON with --out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--body", default="resnet34")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--mean", type=float, nargs=3)
    parser.add_argument("--std", type=float, nargs=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    norm = {name: tuple(v) for name in ("mean", "std") if (v := getattr(args, name))}
    config = BodyConfig(body=args.body, weights=args.weights, **norm)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        images = FeatureConfig(body=config)
        precompute.precompute(args.data, scratch / "store", images)
        store = Store(scratch / "store")
        demo.draw(scratch / "drawn", per_class=24)
        drawn = [file.read_bytes() for file in sorted((scratch / "drawn").glob("*/*/*.jpg"))]
        novel = {
            "drawn textures": features(store, drawn),
            "cut from photographs": features(store, crops(24)),
        }
        train_set, valid_set = store.features("train"), store.features("valid")
    train, label, valid = train_set.feature[:, 0], train_set.label, valid_set.feature[:, 0]
    table: dict[str, Any] = {}
    for name, detector in detectors(train, label, valid).items():
        known = np.sort(detector(valid))
        threshold = known[int(np.ceil(0.95 * (len(known) + 1))) - 1]
        table[name] = {}
        for kind, rows in novel.items():
            distance = detector(rows)
            truth = np.repeat([0, 1], [len(known), len(distance)])
            auroc = roc_auc_score(truth, np.concatenate([known, distance]))
            flagged = float((distance > threshold).mean())
            table[name][kind] = {"auroc": float(auroc), "flagged": flagged}
        words = "   ".join(
            f"{kind}: AUROC {one['auroc']:.3f}, flagged {one['flagged']:.2f}"
            for kind, one in table[name].items()
        )
        print(f"{name:<34} {words}")
    if args.out:
        about = {"body": args.body, "train": len(train), "valid": len(valid)}
        about |= {kind: len(rows) for kind, rows in novel.items()}
        args.out.write_text(json.dumps(about | {"detectors": table}, indent=1) + "\n")


def features(store: Store, files: list[bytes]) -> Rows:
    """Features of files with the store's recipe."""
    body = extract.load_body(store.recipe, store.weights_path, "cpu")
    parts = [files[at : at + 32] for at in range(0, len(files), 32)]
    return np.concatenate([replay.clean_features(store.recipe, body, p, "cpu", 2) for p in parts])


def crops(count: int) -> list[bytes]:
    """`count` random square crops of each photograph."""
    rng, files = np.random.default_rng(0), []
    for name in PHOTOS:
        package, _, inside = name.partition("/")
        spec = importlib.util.find_spec(package)
        assert spec and spec.submodule_search_locations
        image = Image.open(Path(spec.submodule_search_locations[0]) / inside).convert("RGB")
        for _ in range(count):
            side = int(min(image.size) * rng.uniform(0.4, 1))
            left, top = (int(rng.integers(0, extent - side + 1)) for extent in image.size)
            output = io.BytesIO()
            image.crop((left, top, left + side, top + side)).save(output, "JPEG", quality=92)
            files.append(output.getvalue())
    return files


def detectors(train: Rows, label: Rows, valid: Rows) -> dict[str, Detector]:
    """Arrowhead's detector and the alternatives, by name."""
    feature = train.astype(np.float64)

    def nearest_neighbour(k: int) -> Detector:
        def unit(rows: Rows) -> Rows:
            return rows / np.linalg.norm(rows, axis=1, keepdims=True)

        bank = unit(feature)
        return lambda rows: -np.sort(unit(rows.astype(np.float64)) @ bank.T, axis=1)[:, -k]

    def mahalanobis(relative: bool) -> Detector:
        means = np.stack([feature[label == one].mean(0) for one in np.unique(label)])
        within_class = precision(feature - means[label])
        overall = precision(feature - feature.mean(0))

        def distance(rows: Rows, mean: Rows, inverse: Rows) -> Rows:
            difference = rows - mean
            return np.einsum("nd,de,ne->n", difference, inverse, difference, optimize=True)

        def detect(rows: Rows) -> Rows:
            rows = rows.astype(np.float64)
            nearest = np.min([distance(rows, mean, within_class) for mean in means], axis=0)
            return nearest - relative * distance(rows, feature.mean(0), overall)

        return detect

    return {
        "ours: k = 5, standardized": NoveltyDetector.fit(train, valid).distances,
        "k = 5 (Sun et al. 2022)": nearest_neighbour(5),
        "k = 50": nearest_neighbour(50),
        "Mahalanobis (Lee et al. 2018)": mahalanobis(False),
        "relative (Ren et al. 2021)": mahalanobis(True),
    }


def precision(rows: Rows) -> Rows:
    """Inverse covariance, shrunk by one percent towards a multiple of the identity."""
    covariance = rows.T @ rows / len(rows)
    width = len(covariance)
    inverse: Rows = np.linalg.inv(covariance + 0.01 * np.trace(covariance) / width * np.eye(width))
    return inverse


if __name__ == "__main__":
    main()
