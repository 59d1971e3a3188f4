"""How well novelty tells pictures of other things: our detector beside those it was chosen from.

    .venv/bin/python bench/novelty.py --data PHOTOS --body mobilenet_v2 --weights FILE

PHOTOS has train/ and valid/. The strangers are textures drawn by `arrowhead demo`, and squares cut
from the photographs that matplotlib and scikit-learn bring (a portrait, a flower, a palace), so the
command needs nothing else. Printed per detector and kind of stranger: AUROC against the validation
photos, and the share that is flagged at 5 % false alarms.
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
    """Extract, measure, print; JSON if asked to."""
    asked = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    asked.add_argument("--data", required=True)
    asked.add_argument("--body", default="resnet34")
    asked.add_argument("--weights", default="auto")
    asked.add_argument("--mean", type=float, nargs=3)
    asked.add_argument("--std", type=float, nargs=3)
    asked.add_argument("--out", type=Path)
    settings = asked.parse_args()
    norm = {name: tuple(v) for name in ("mean", "std") if (v := getattr(settings, name))}
    config = BodyConfig(body=settings.body, weights=settings.weights, **norm)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        images = FeatureConfig(body=config)
        precompute.precompute(settings.data, place / "store", images)
        store = Store(place / "store")
        demo.draw(place / "drawn", per_class=24)
        drawn = [file.read_bytes() for file in sorted((place / "drawn").glob("*/*/*.jpg"))]
        strangers = {
            "drawn textures": features(store, drawn),
            "cut from photographs": features(store, cuttings(24)),
        }
        learned, held_out = store.features("train"), store.features("valid")
    train, label, valid = learned.feature[:, 0], learned.label, held_out.feature[:, 0]
    table: dict[str, Any] = {}
    for name, detector in detectors(train, label, valid).items():
        known = np.sort(detector(valid))
        cut = known[int(np.ceil(0.95 * (len(known) + 1))) - 1]
        table[name] = {}
        for kind, rows in strangers.items():
            far = detector(rows)
            truth = np.repeat([0, 1], [len(known), len(far)])
            score = roc_auc_score(truth, np.concatenate([known, far]))
            table[name][kind] = {"auroc": float(score), "flagged": float((far > cut).mean())}
        words = "   ".join(
            f"{kind}: AUROC {one['auroc']:.3f}, flagged {one['flagged']:.2f}"
            for kind, one in table[name].items()
        )
        print(f"{name:<34} {words}")
    if settings.out:
        about = {"body": settings.body, "train": len(train), "valid": len(valid)}
        about |= {kind: len(rows) for kind, rows in strangers.items()}
        settings.out.write_text(json.dumps(about | {"detectors": table}, indent=1) + "\n")


def features(store: Store, files: list[bytes]) -> Rows:
    """Features of files by the store's recipe."""
    body = extract.load_body(store.recipe, store.weights_path, "cpu")
    parts = [files[at : at + 32] for at in range(0, len(files), 32)]
    return np.concatenate([replay.clean_features(store.recipe, body, p, "cpu", 2) for p in parts])


def cuttings(each: int) -> list[bytes]:
    """Squares of any size and place from each photograph."""
    draw, made = np.random.default_rng(0), []
    for name in PHOTOS:
        package, _, inside = name.partition("/")
        spec = importlib.util.find_spec(package)
        assert spec and spec.submodule_search_locations
        image = Image.open(Path(spec.submodule_search_locations[0]) / inside).convert("RGB")
        for _ in range(each):
            side = int(min(image.size) * draw.uniform(0.4, 1))
            left, top = (int(draw.integers(0, most - side + 1)) for most in image.size)
            sheet = io.BytesIO()
            image.crop((left, top, left + side, top + side)).save(sheet, "JPEG", quality=92)
            made.append(sheet.getvalue())
    return made


def detectors(train: Rows, label: Rows, valid: Rows) -> dict[str, Detector]:
    """Ours, and the others it was chosen from."""
    wide = train.astype(np.float64)

    def neighbours(k: int) -> Detector:
        def unit(rows: Rows) -> Rows:
            return rows / np.linalg.norm(rows, axis=1, keepdims=True)

        bank = unit(wide)
        return lambda rows: -np.sort(unit(rows.astype(np.float64)) @ bank.T, axis=1)[:, -k]

    def mahalanobis(relative: bool) -> Detector:
        middle = np.stack([wide[label == one].mean(0) for one in np.unique(label)])
        within = precision(wide - middle[label])
        among = precision(wide - wide.mean(0))

        def distance(rows: Rows, centre: Rows, shape: Rows) -> Rows:
            apart = rows - centre
            return np.einsum("nd,de,ne->n", apart, shape, apart, optimize=True)

        def detect(rows: Rows) -> Rows:
            rows = rows.astype(np.float64)
            near = np.min([distance(rows, one, within) for one in middle], axis=0)
            return near - relative * distance(rows, wide.mean(0), among)

        return detect

    return {
        "ours: k = 5, standardized": NoveltyDetector.fit(train, valid).distances,
        "k = 5 (Sun et al. 2022)": neighbours(5),
        "k = 50": neighbours(50),
        "Mahalanobis (Lee et al. 2018)": mahalanobis(False),
        "relative (Ren et al. 2021)": mahalanobis(True),
    }


def precision(rows: Rows) -> Rows:
    """Inverse covariance, shrunk by a hundredth towards a sphere."""
    spread = rows.T @ rows / len(rows)
    inverse: Rows = np.linalg.inv(
        spread + 0.01 * np.trace(spread) / len(spread) * np.eye(len(spread))
    )
    return inverse


if __name__ == "__main__":
    main()
