"""Measure how well copies of photos are found: 15 alterations, planted leaks, a million features.

    .venv/bin/python bench/duplicates.py --data PHOTOS --body mobilenet_v2 --weights FILE

Three parts; --parts names those to run:

    copies    Each photo is altered in 15 ways, ten mild and five hard. Thresholds for the pixels
              are suggested by the first half of the photos (every second one); recall and
              precision are measured on the other half, with the thresholds of the code. One
              alteration at a time: the photos and their altered copies, of which any pair may be
              found.
    leaks     A head is trained on half of the photos and on copies of a tenth of the validation
              photos. The truth is the accuracy of the head trained without the copies.
    million   Mixtures of the photos' features with planted close pairs: time and memory for all
              close pairs of a million rows, and recall against a full comparison of 50,000.

--work keeps the altered photos and their features. Copies among PHOTOS themselves are listed, and
not counted as mistakes: look at them.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from arrowhead.commands import precompute
from arrowhead.examine import image_matching, neighbours
from arrowhead.examine.near_copies import Components, DuplicateConfig, find_near_copies
from arrowhead.examine.neighbours import UnitVectors, close_pairs
from arrowhead.features.backbone import BodyConfig
from arrowhead.features.feature_config import FeatureConfig
from arrowhead.features.golden_images import GoldenConfig
from arrowhead.features.store import Store

PARTS = ("copies", "leaks", "million")
LEAK_SEEDS = 5
EXACT_SAMPLE = 50_000


# ------------------------------------------------------------------------- alterations


def jpeg(image: Image.Image, quality: int = 92) -> bytes:
    """The image as a JPEG file."""
    return _file(image, "JPEG", quality=quality)


def _file(image: Image.Image, kind: str, **options: int) -> bytes:
    output = io.BytesIO()
    image.save(output, kind, **options)
    return output.getvalue()


def _resized(image: Image.Image, factor: float) -> bytes:
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return jpeg(image.resize(size, Image.Resampling.BICUBIC))


def _cropped(image: Image.Image, share: float, corner: tuple[float, float] = (0.5, 0.5)) -> bytes:
    """Cut off this share of the width and of the height; corner (0, 0) keeps the upper left."""
    width, height = round(image.width * (1 - share)), round(image.height * (1 - share))
    left, top = (
        round((image.width - width) * corner[0]),
        round((image.height - height) * corner[1]),
    )
    return jpeg(image.crop((left, top, left + width, top + height)))


def _bordered(image: Image.Image, share: float, colour: str) -> bytes:
    return jpeg(ImageOps.expand(image, round(share * max(image.size)), colour))


def _brighter(image: Image.Image, factor: float) -> bytes:
    return jpeg(ImageEnhance.Brightness(image).enhance(factor))


def _watermarked(image: Image.Image) -> bytes:
    layer = Image.new("RGBA", image.size)
    draw = ImageDraw.Draw(layer)
    size = max(12, image.width // 10)
    place = (image.width * 0.1, image.height * 0.45)
    draw.text(place, "© SAMPLE PHOTO", (255, 255, 255, 140), font_size=size)
    return jpeg(Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB"))


Alteration = Callable[[Image.Image], bytes]
MILD: dict[str, Alteration] = {
    "resize 50 %": lambda image: _resized(image, 0.5),
    "JPEG 30": lambda image: jpeg(image, 30),
    "JPEG 75": lambda image: jpeg(image, 75),
    "JPEG 95": lambda image: jpeg(image, 95),
    "crop 5 %": lambda image: _cropped(image, 0.05),
    "grey": lambda image: jpeg(image.convert("L")),
    "brightness +20 %": lambda image: _brighter(image, 1.2),
    "border 3 %": lambda image: _bordered(image, 0.03, "black"),
    "watermark": _watermarked,
    "PNG": lambda image: _file(image, "PNG"),
}
HARD: dict[str, Alteration] = {
    "crop 20 %": lambda image: _cropped(image, 0.2),
    "flip": lambda image: jpeg(ImageOps.mirror(image)),
    "rotate 90": lambda image: jpeg(image.transpose(Image.Transpose.ROTATE_90)),
    "border 15 %": lambda image: _bordered(image, 0.15, "white"),
    "brightness x 1.8": lambda image: _brighter(image, 1.8),
}


# ------------------------------------------------------------------ photos and features


class Photos:
    """The photos and their alterations: files, features and thumbnails.

    Attributes:
        names: Paths of the P photos.
        labels: Their class folders.
        feature: float16 (1 + A, P, D); the first are the photos themselves.
        thumbnails: The same as nested lists of thumbnails.
    """

    def __init__(self, data: Path, work: Path, body: BodyConfig) -> None:
        files = sorted(data.rglob("*.jpg"))
        self.names = [str(file.relative_to(data)) for file in files]
        self.labels = np.array([file.parent.name for file in files])
        alterations = {"original": None} | MILD | HARD
        folder = work / "altered"
        for number, alter in enumerate(alterations.values()):
            target = folder / f"a{number:02d}"
            if target.is_dir():
                continue
            target.mkdir(parents=True)
            for k, file in enumerate(files):
                data_bytes = file.read_bytes()
                if alter is not None:
                    data_bytes = alter(Image.open(io.BytesIO(data_bytes)).convert("RGB"))
                (target / f"{k:04d}.jpg").write_bytes(data_bytes)
        if not (work / "store" / "manifest.json").is_file():
            settings = FeatureConfig(body=body, golden=GoldenConfig(golden_images=False))
            precompute.precompute(str(folder), work / "store", settings)
        store = Store(work / "store")
        features = store.features()
        paths = np.array(store.read_catalog()["paths"])[features.row]
        self.feature = np.zeros((len(alterations), len(files), store.recipe.width), np.float16)
        for path, row in zip(paths, features.feature[:, 0], strict=True):
            self.feature[int(path[1:3]), int(path[4:8])] = row
        self.thumbnails = [
            [
                image_matching.decode_thumbnail((folder / f"a{a:02d}/{k:04d}.jpg").read_bytes())
                for k in range(len(files))
            ]
            for a in range(len(alterations))
        ]


def pairs_of(features: NDArray[Any], thumbnails: list[Any]) -> tuple[list[tuple[int, int]], int]:
    """Confirmed pairs of rows, and the number of comparisons."""
    vectors = UnitVectors(shards=[features[:, None]], row_M=np.arange(len(features)))
    result = find_near_copies(vectors, thumbnails.__getitem__, DuplicateConfig())
    return [(pair.one, pair.other) for pair in result.pairs], result.compared


# ------------------------------------------------------------------------------- copies


def measure_copies(photos: Photos) -> dict[str, Any]:
    """Recall and precision of each alteration on the second half of the photos."""
    rows = np.arange(1, len(photos.names), 2)
    originals = [photos.thumbnails[0][k] for k in rows]
    native, _ = pairs_of(photos.feature[0, rows], originals)
    known = {frozenset(pair) for pair in native}
    result: dict[str, Any] = {
        "copies_in_source": [[photos.names[rows[k]] for k in pair] for pair in native],
        "suggested_thresholds": suggest_thresholds(photos),
        "thresholds": {"whole": image_matching.MIN_WHOLE, "part": image_matching.MIN_PART},
    }
    table = {}
    for number, name in enumerate(MILD | HARD, 1):
        start = perf_counter()
        feature = np.concatenate([photos.feature[0, rows], photos.feature[number, rows]])
        thumbnails = originals + [photos.thumbnails[number][k] for k in rows]
        pairs, compared = pairs_of(feature, thumbnails)
        components = Components()
        for pair in pairs:
            components.connect(*pair)
        count = len(rows)
        hits = sum(components.root(k) == components.root(k + count) for k in range(count))
        false = [
            pair
            for pair in pairs
            if pair[0] % count != pair[1] % count
            and frozenset(k % count for k in pair) not in known
        ]
        table[name] = {
            "recall": hits / count,
            "precision": 1 - len(false) / max(1, len(pairs)),
            "compared": compared,
            "seconds": round(perf_counter() - start, 2),
        }
        print(f"{name:<20} {json.dumps(table[name])}", flush=True)
    for kind, names in (("mild", MILD), ("hard", HARD)):
        for figure in ("recall", "precision"):
            values = [table[name][figure] for name in names]
            result[f"{kind} {figure}"] = {"mean": float(np.mean(values)), "lowest": min(values)}
    return result | {"photos": len(rows), "alterations": table}


def suggest_thresholds(photos: Photos) -> dict[str, Any]:
    """The similarities of copies and of different photos, on the first half of the photos.

    Different: for each photo the three with the closest features. Copies: every fifth photo.
    """
    rows = np.arange(0, len(photos.names), 2)
    vectors = UnitVectors(shards=[photos.feature[0, rows][:, None]], row_M=np.arange(len(rows)))
    cosine = vectors.read(slice(None))
    cosine = cosine @ cosine.T
    np.fill_diagonal(cosine, -1)
    near = {frozenset((i, int(j))) for i, row in enumerate(cosine) for j in np.argsort(-row)[:3]}
    thumbnail = [photos.thumbnails[0][k] for k in rows]
    different = np.array([image_matching.similarity(*(thumbnail[k] for k in p)) for p in near])
    copies = [
        image_matching.similarity(thumbnail[i], photos.thumbnails[number][rows[i]])
        for number in range(1, len(photos.thumbnails))
        for i in range(0, len(rows), 5)
    ]
    part = [score[1] for score in copies if score[0] < image_matching.MIN_WHOLE]
    highest = np.sort(different, axis=0)[-3:].round(3).tolist()
    return {
        "pairs_of_different_photos": len(near),
        "highest_of_different [whole, part]": highest,
        "copies": len(copies),
        "copies_matched_as_a_whole": len(copies) - len(part),
        "lowest_part_of_the_others": np.sort(part)[:3].round(3).tolist(),
    }


# -------------------------------------------------------------------------------- leaks


def measure_leaks(photos: Photos) -> dict[str, Any]:
    """Accuracy with leaks, adjusted, and in truth, in percent, for each seed."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    def accuracy(train: tuple[Any, Any], valid: tuple[Any, Any]) -> float:
        scaler = StandardScaler().fit(train[0])
        head = LogisticRegression(C=0.01, max_iter=300).fit(scaler.transform(train[0]), train[1])
        return 100 * float(head.score(scaler.transform(valid[0]), valid[1]))

    feature = photos.feature.astype(np.float32)
    seeds = []
    for seed in range(LEAK_SEEDS):
        generator = np.random.default_rng(seed)
        order = generator.permutation(len(photos.names))
        train, valid = np.split(order, 2)
        leaked = generator.choice(valid, len(valid) // 10, replace=False)
        kinds = generator.integers(1, len(feature), len(leaked))
        copies = feature[kinds, leaked]
        thumbnails = [photos.thumbnails[0][k] for k in order]
        thumbnails += [photos.thumbnails[a][k] for a, k in zip(kinds, leaked, strict=True)]
        every = np.concatenate([photos.feature[0, order], photos.feature[kinds, leaked]])
        components = Components()
        for pair in pairs_of(every, thumbnails)[0]:
            components.connect(*pair)
        roots = np.array([components.root(row) for row in range(len(every))])
        in_train = np.r_[: len(train), len(order) : len(every)]
        clean = ~np.isin(roots[len(train) : len(order)], roots[in_train])
        label = photos.labels
        plain = feature[0, train], label[train]
        mixed = np.concatenate([plain[0], copies]), np.concatenate([plain[1], label[leaked]])
        seeds.append(
            {
                "found": int(np.isin(leaked, valid[~clean]).sum()) / len(leaked),
                "truth": accuracy(plain, (feature[0, valid], label[valid])),
                "with leaks": accuracy(mixed, (feature[0, valid], label[valid])),
                "adjusted": accuracy(mixed, (feature[0, valid[clean]], label[valid[clean]])),
            }
        )
        print(f"leaks, seed {seed}: {json.dumps(seeds[-1])}", flush=True)
    off = [abs(one["adjusted"] - one["truth"]) for one in seeds]
    mean = {key: float(np.mean([one[key] for one in seeds])) for key in seeds[0]}
    return {
        "mean": mean,
        "mean_difference": mean["adjusted"] - mean["truth"],
        "mean_absolute_difference": float(np.mean(off)),
        "largest_absolute_difference": max(off),
        "seeds": seeds,
    }


# ------------------------------------------------------------------------------ million


def write_mixtures(photos: Photos, rows: int, path: Path) -> None:
    """Write float16 (rows, 512): mixtures of two photos each, a tenth of them in close pairs.

    Rows 2 i and 2 i + 1 are a planted pair for i < rows / 20; their similarity is 0.7 to 0.99.
    """
    generator = np.random.default_rng(0)
    columns = generator.permutation(photos.feature.shape[2])[:512]
    base = photos.feature[0][:, columns].astype(np.float32)
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    out = np.lib.format.open_memmap(path, "w+", np.float16, (rows, 512))
    for start in range(0, rows, 10_000):
        stop = min(start + 10_000, rows)
        one, other = generator.integers(0, len(base), (2, stop - start))
        share = generator.uniform(0.2, 0.8, (stop - start, 1)).astype(np.float32)
        block = share * base[one] + (1 - share) * base[other]
        block += generator.normal(0, 0.02, block.shape).astype(np.float32)
        pairs = max(0, min(rows // 10, stop) - start) // 2
        similarity = generator.uniform(0.7, 0.99, (pairs, 1))
        first = block[0 : 2 * pairs : 2]
        noise = generator.normal(size=first.shape) / np.sqrt(512)
        size = np.linalg.norm(first, axis=1, keepdims=True)
        block[1 : 2 * pairs : 2] = first + noise * size * np.sqrt(similarity**-2 - 1)
        out[start:stop] = block


def search(path: Path, rows: int) -> None:
    """Find the close pairs of a file in this process; print figures as one line of JSON."""
    feature = np.load(path, mmap_mode="r")[:rows]
    shards = [feature[at : at + 4096, None] for at in range(0, rows, 4096)]
    vectors = UnitVectors(shards=shards, row_M=np.arange(rows))
    start, cpu_start = perf_counter(), process_time()
    pairs = close_pairs(vectors, DuplicateConfig().min_feature_similarity)
    seconds, cpu_seconds = perf_counter() - start, process_time() - cpu_start
    keys = np.sort(pairs.one * rows + pairs.other)
    planted = np.arange(0, rows // 10 - 1, 2)
    figures: dict[str, Any] = {
        "rows": rows,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),  # of all threads
        "gigabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "pairs": len(pairs),
        "recall_of_planted_pairs": float(np.isin(planted * rows + planted + 1, keys).mean()),
    }
    if rows <= EXACT_SAMPLE:
        figures["recall_of_full_comparison"] = recall_of_nearest(vectors, keys)
    print(json.dumps(figures), flush=True)


def recall_of_nearest(vectors: UnitVectors, keys: NDArray[np.int64]) -> dict[str, float]:
    """The share of each row's nearest neighbour that was found, by its similarity."""
    rows = len(vectors)
    unit = vectors.read(slice(None))
    nearest, similarity = np.empty(rows, np.int64), np.empty(rows, np.float32)
    for start in range(0, rows, 2048):
        cosine = unit[start : start + 2048] @ unit.T
        index = np.arange(len(cosine))
        cosine[index, start + index] = -1
        nearest[start : start + 2048] = cosine.argmax(1)
        similarity[start : start + 2048] = cosine.max(1)
    row = np.arange(rows)
    key = np.minimum(row, nearest) * rows + np.maximum(row, nearest)
    found = np.isin(key, keys)
    return {
        f"at least {least}": float(found[similarity >= least].mean())
        for least in (0.66, 0.7, 0.8, 0.9)
    }


def measure_million(photos: Photos, rows: int) -> list[dict[str, Any]]:
    """The figures of `search` in processes of their own: 50,000 rows, then all."""
    results = []
    for count in sorted({min(EXACT_SAMPLE, rows), rows}):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "features.npy"
            write_mixtures(photos, count, path)
            command = [sys.executable, __file__, "--search", str(path), "--rows", str(count)]
            completed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(completed.stdout.splitlines()[-1]))
        print(f"close pairs: {json.dumps(results[-1])}", flush=True)
    return results


def main() -> None:
    """Run the parts, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--body", default="resnet34")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--mean", type=float, nargs=3)
    parser.add_argument("--std", type=float, nargs=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--work", type=Path, help="folder for altered photos and their features")
    parser.add_argument("--out", type=Path, default=Path("bench/results/duplicates.json"))
    parser.add_argument("--search", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.search:
        search(args.search, args.rows)
        return
    norm = {name: tuple(v) for name in ("mean", "std") if (v := getattr(args, name))}
    body = BodyConfig(body=args.body, weights=args.weights, **norm)
    results = json.loads(args.out.read_text()) if args.out.is_file() else {}
    cores = len(os.sched_getaffinity(0))
    results["machine"] = f"{platform.machine()}, {cores} cores, Python {platform.python_version()}"
    results["body"], results["neighbours"] = args.body, neighbours.NEIGHBOURS
    with ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        photos = Photos(args.data, work, body)
        measures: dict[str, Callable[[], Any]] = {
            "copies": lambda: measure_copies(photos),
            "leaks": lambda: measure_leaks(photos),
            "million": lambda: measure_million(photos, args.rows),
        }
        for part in args.parts:
            results[part] = measures[part]()
            results[f"{part} measured"] = date.today().isoformat()
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
