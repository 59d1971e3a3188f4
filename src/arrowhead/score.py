"""Images and a bundle to score files.

    unlabelled catalog     one row per file, in input order; kept in inputs.arrow
      -> extract.Pump      features, by the recipe of the bundle
      -> head              calibrated probabilities; the labels they give; novelty
      -> part              one Parquet file per chunk, whole or absent
      -> score.json        counts, lineage, seconds by stage; written last

A part that is there is done: a stopped run goes on with the others. Nobody holds more than a chunk
or two of rows at a time: workers read theirs off the memory map of inputs.arrow.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead import ConfigError, DataError, __version__, extract, fileio, plan, shards
from arrowhead import bundle as bundles
from arrowhead.bundle import Bundle
from arrowhead.launch import Worker
from arrowhead.plan import Catalog
from arrowhead.shards import Scores, Store

PASSING = ("changed", "unreadable")  # faults that may be gone when the same command runs again
BINS = np.linspace(0, 1, 21)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreConfig:
    """What is written for each image."""

    top_k: int = 5
    """Labels listed per image, best first (at most the number of classes)."""
    probabilities: bool = False
    """Also write the probability of every class."""
    features: bool = False
    """Also write the body's features: for search, clustering, plots."""
    raw: bool = False
    """Uncalibrated probabilities: the bundle's temperature is not used."""
    flag_novel: bool = False
    """Also write `novel`: whether the image's novelty is above the threshold of --false-alarms."""
    false_alarms: float = 0.05
    """Share of images like the training images that --flag-novel may mark by mistake, 0 to 1."""
    csv: bool = False
    """Also write OUT/scores.csv: path, image_id, label, probability, novelty, fault."""
    store: Path | None = None
    """Feature store of the same recipe: images whose features it holds are not decoded."""
    base: str | None = None
    """Folder or address that the paths in a list or table start from; its own folder if not
    given."""
    suffix: str = ""
    """Added to every path in a list or table that names images without it, such as .jpg."""
    max_drift: float = 0.005
    """Refuse to score when a golden image's feature is further than this cosine distance from what
    it was where the bundle was made. Another decoder is 0.003 away at most, another resize rule or
    deviation 0.1 and more (bench/drift.py)."""
    max_pixels: int = 100_000_000
    """Images whose header claims more pixels are refused before they are decoded."""
    max_scans: int = 100
    """JPEGs with more scans are refused before they are decoded (usual progressive ones: 10)."""

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ConfigError(f"--top-k is {self.top_k}.", "1 or more.", "give e.g. 5.")
        if not 0 < self.false_alarms < 1:
            raise ConfigError(
                f"--false-alarms is {self.false_alarms}.",
                "a share of the images, more than 0 and less than 1.",
                "give e.g. 0.05.",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """Scores that are asked for, settled: where they go, and what each part is of."""

    out: Path
    bundle: Path
    config: ScoreConfig
    runs: list[range]
    """Rows of inputs.arrow by part."""

    def part(self, number: int) -> Path:
        """Where a chunk's scores lie."""
        return part(self.out, number)

    def rows(self, number: int) -> Catalog:
        """The files that a part is of."""
        return Catalog(**shards.read_catalog(inputs(self.out), self.runs[number]))

    def missing(self) -> list[int]:
        """The parts to be made: not there, or with a fault that may have passed."""
        return [number for number in range(len(self.runs)) if not self._settled(number)]

    def _settled(self, number: int) -> bool:
        if not self.part(number).is_file():
            return False
        faults = shards.read_parquet(self.part(number), ["fault"])["fault"]
        return not any(fault and fault.startswith(PASSING) for fault in faults)


def part(out: Path, number: int) -> Path:
    """Where the scores of one chunk lie; names sort in input order."""
    return out / f"part-{number:06d}.parquet"


def inputs(out: Path) -> Path:
    """The list of files that `out` holds the scores of."""
    return out / "inputs.arrow"


# ------------------------------------------------------------------------------- a stage


def score(worker: Worker, request: Request, how: extract.ExtractConfig) -> None:
    """Score every chunk this worker claims; the golden images' drift is reported before the first.

    Raises DataError when they come out differently here.
    """
    config, bundle = request.config, bundles.load(request.bundle)
    body, head = bundle.make_body(worker.device), bundle.make_head(worker.device)
    if bundle.novelty:
        bundle = replace(bundle, novelty=bundle.novelty.to(worker.device))
    drift = bundles.replay(bundle, body, head, worker.device, worker.threads)
    worker.report({"drift": asdict(drift)})
    bundles.must_agree(drift, config.max_drift)
    mark = {
        "arrowhead.recipe": bundle.recipe.json(),
        "arrowhead.bundle": bundles.fingerprint(request.bundle),
        "arrowhead.run_id": str(bundle.lineage.get("run_id")),
        "arrowhead.version": __version__,
    }
    recipe = one_view(bundle.recipe)
    clean = replace(
        extract.pixels_of(recipe), max_pixels=config.max_pixels, max_scans=config.max_scans
    )
    known = extract.Known.of(Store(config.store)) if config.store else extract.Known()
    claimed = ((number, request.rows(number)) for number in iter(worker.claim, None))
    with extract.Pump(worker, body, recipe, clean, how) as pump:
        for chunk in pump(claimed, known):
            with pump.clock.stage("write"):
                heat = 1.0 if config.raw else bundle.temperature
                chance_NC = bundles.probabilities(
                    head, chunk.features[:, 0], heat, multi=bundle.multi
                )
                rows = judged(bundle, chunk, chance_NC, config)
                shards.write_scores(request.part(chunk.number), rows, mark)
            extract.tell(worker, chunk, pump.clock.read(), "scores_written")


def one_view(recipe: shards.Recipe) -> shards.Recipe:
    """The recipe for scoring: images are seen once, clean, however many views trained the head."""
    return replace(recipe, views=1, augment="none", augment_seed=0)


def judged(
    bundle: Bundle, chunk: extract.Chunk, chance_NC: NDArray[np.float32], config: ScoreConfig
) -> Scores:
    """The rows of one part.

    Where an image may have several labels, `given` are those it is given (see `Bundle.given`), and
    its best label is the most probable one, given or not. Thresholds were tuned on calibrated
    probabilities: with --raw they are applied to uncalibrated ones all the same.
    """
    count = min(config.top_k, len(bundle.classes))
    novelty_N = novel_N = None
    if bundle.novelty:
        with bundles.one_thread():
            novelty_N = bundle.novelty(chunk.features[:, 0])
        if config.flag_novel:
            novel_N = novelty_N > bundle.novelty.threshold(config.false_alarms)
    return Scores(
        classes=bundle.classes,
        paths=chunk.paths,
        image_ids=chunk.image_ids,
        faults=chunk.faults,
        top=np.argsort(-chance_NC, axis=1, kind="stable")[:, :count],
        chance=chance_NC,
        every=config.probabilities,
        given=bundle.given(chance_NC) if bundle.multi else None,
        novelty=novelty_N,
        novel=novel_N,
        feature=chunk.features[:, 0] if config.features else None,
    )


# ----------------------------------------------------------------------- before and after


def prepare(
    out: Path, path: Path, bundle: Bundle, catalog: Catalog, config: ScoreConfig, chunk_size: int
) -> Request:
    """Make `out` ready for these inputs and settings.

    Raises ConfigError if `out` holds other scores, if the bundle knows no novelty to flag, or if
    the store is of another recipe; DataError if something in the store has changed.
    """
    if config.flag_novel and not bundle.novelty:
        raise ConfigError(
            f"{path} does not know its training images: it was saved without them.",
            "a bundle that `fit` or `train` made, for --flag-novel.",
            "leave --flag-novel out, or train again.",
        )
    if config.store:
        known = Store(config.store)
        one_view(known.recipe).must_equal(one_view(bundle.recipe), str(config.store), str(path))
        known.intact()
    asked = {
        "bundle": bundles.fingerprint(path),
        "images": catalog.root,
        "inputs": catalog.digest(),
        "top_k": config.top_k,
        "probabilities": config.probabilities,
        "features": config.features,
        "raw": config.raw,
        "flag_novel": config.flag_novel,
        "false_alarms": config.false_alarms if config.flag_novel else None,
        "chunk_size": chunk_size,
    }
    note, new = out / "request.json", True
    if note.is_file():
        found = fileio.read_json(note)
        if differing := [key for key in asked if found.get(key) != asked[key]]:
            raise ConfigError(
                f"{out} holds scores of another request: its {differing[0]} differs.",
                "the same bundle, images and settings, to go on; or a new folder.",
                "give another OUT, or delete that folder.",
            )
        runs, new = [range(*ends) for ends in found["runs"]], False
        before = shards.read_stamps(inputs(out))
        for number, run in enumerate(runs):  # a file of the same size may hold another image now
            here = slice(run.start, run.stop)
            if not np.array_equal(before[here], catalog.stamps[here]):
                part(out, number).unlink(missing_ok=True)
    else:
        if out.is_dir() and any(one.name not in STRANGERS for one in out.iterdir()):
            raise ConfigError(
                f"{out} holds files that are not scores.",
                "a new or empty folder.",
                "give another OUT.",
            )
        runs = plan.chunks(catalog.paths, chunk_size)
    shards.write_catalog(inputs(out), catalog.columns())
    if new:
        fileio.write_json(note, asked | {"runs": [[run.start, run.stop] for run in runs]})
    # Workers start in a directory of their own.
    store = config.store and config.store.absolute()
    config = replace(config, store=store)
    return Request(out=out.absolute(), bundle=path.absolute(), config=config, runs=runs)


STRANGERS = {".lock", ".bundle", "inputs.arrow"}  # what may lie in OUT before there is a request


@dataclass(kw_only=True, slots=True)
class Held:
    """What the parts of `out` hold. faults: by kind; labels: images by label (one that may have
    several counts under each it is given); chances, novelties: histograms, in twenty steps from 0
    to 1 (novelty: 0 to 2).
    """

    faults: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    chances: NDArray[np.int64] = field(default_factory=lambda: np.zeros(20, np.int64))
    novelties: NDArray[np.int64] = field(default_factory=lambda: np.zeros(20, np.int64))
    novel: int = 0


def held(request: Request, bundle: Bundle) -> Held:
    """Count what the parts hold, one part at a time.

    Raises DataError unless they hold every input once, in order.
    """
    made = Held(labels=Counter(dict.fromkeys(bundle.classes, 0)))
    for number in range(len(request.runs)):
        names = ["path", "labels" if bundle.multi else "label", "probability", "fault"]
        names += ["novelty"] if bundle.novelty else []
        names += ["novel"] if request.config.flag_novel else []
        columns = shards.read_parquet(request.part(number), names)
        if columns["path"] != request.rows(number).paths:
            raise DataError(
                f"{request.part(number)} does not hold the files it should.",
                "one row per file, in the order of the files.",
                "delete that file and run the same command again.",
            )
        made.faults.update(fault.partition(":")[0] for fault in columns["fault"] if fault)
        if bundle.multi:
            made.labels.update(label for given in columns["labels"] for label in given or ())
        else:
            made.labels.update(label for label in columns["label"] if label is not None)
        made.chances += np.histogram(_there(columns["probability"]), BINS)[0]
        made.novelties += np.histogram(_there(columns.get("novelty", [])), 2 * BINS)[0]
        made.novel += sum(map(bool, columns.get("novel", [])))
    return made


def _there(values: list[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def write_csv(request: Request, bundle: Bundle) -> Path:
    """The parts as one CSV for people and programs without Parquet, whole or absent."""
    target = request.out / "scores.csv"
    names = ["path", "image_id", "label", "probability"]
    names += ["labels"] if bundle.multi else []
    names += ["novelty"] if bundle.novelty else []
    names += ["novel"] if request.config.flag_novel else []
    names += ["fault"]
    with fileio.draft(target) as sketch, sketch.open("w", newline="", encoding="utf-8") as file:
        sheet = csv.writer(file)
        sheet.writerow(names)
        for number in range(len(request.runs)):
            sheet.writerows(_cells(shards.read_parquet(request.part(number), names)))
    return target


def _cells(columns: dict[str, list[Any]]) -> Iterator[tuple[Any, ...]]:
    columns["image_id"] = [one.hex() for one in columns["image_id"]]
    if "labels" in columns:
        columns["labels"] = [given and " ".join(given) for given in columns["labels"]]
    if "novel" in columns:
        columns["novel"] = [None if one is None else int(one) for one in columns["novel"]]
    return zip(*columns.values(), strict=True)
