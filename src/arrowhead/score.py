"""Images and a bundle to score files.

    unlabelled catalog     one row per file, in input order; kept in inputs.arrow
      -> extract.Pump      features, by the recipe of the bundle
      -> head              calibrated probabilities; the labels they give; novelty
      -> part              one Parquet file per chunk, whole or absent, its sha256 in a journal
      -> score.json        counts, lineage, seconds by stage, every part; written last

A part that is in the journal, with those bytes, is done: a stopped run goes on with the others.
Nobody holds more than a chunk or two of rows at a time: workers read theirs off the memory map of
inputs.arrow.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead import (
    ConfigError,
    DataError,
    __version__,
    extract,
    fileio,
    metrics,
    plan,
    scores_io,
    shards,
    spreadsheet,
    targets,
)
from arrowhead import bundle as bundles
from arrowhead.bundle import Bundle
from arrowhead.known_images import TRAINED, VALIDATED
from arrowhead.launch import Worker
from arrowhead.plan import Catalog
from arrowhead.scores_io import Part, Scores
from arrowhead.shards import Store

PASSING = (
    "changed",
    "unreadable",
    "decoder_crash",
)  # faults that may be gone when the same command runs again
REQUESTED = {
    "bundle": "of another bundle",
    "images": "of images in another folder",
    "inputs": "of other images (by their names, sizes or times)",
}  # what a request is made of, in words; the rest are flags
BINS = np.linspace(0, 1, 21)
NAMED = 5  # files with faults, by path


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreConfig:
    """What is written for each image."""

    top_k: int = 5
    """Labels listed per image, best first (at most the number of classes)."""
    probabilities: bool = False
    """Also write the probability of every class: a struct with a field for each."""
    features: bool = False
    """Also write the body's features: for search, clustering, plots."""
    raw: bool = False
    """Uncalibrated probabilities: the bundle's temperature is not used."""
    flag_novel: bool = False
    """Also write `novel`: whether the image's novelty is above the threshold of --false-alarms."""
    false_alarms: float = 0.05
    """Share of images like the training images that --flag-novel may mark by mistake, 0 to 1."""
    csv: bool = False
    """Also write OUT/scores.csv: path, image_id, label, probability, novelty, fault, and with
    --probabilities a column for every class. A text that a spreadsheet would run as a formula has
    a ' in front."""
    store: Path | None = None
    """Feature store of the same recipe: images whose features it holds are not decoded."""
    path_column: str | None = None
    """Column of a table with the images' paths; if not given, path, image, filename, id …"""
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
        if self.false_alarms != 0.05 and not self.flag_novel:
            raise ConfigError(
                f"--false-alarms {self.false_alarms:g} has no --flag-novel.",
                "images to be marked with so many false alarms.",
                "add --flag-novel, or leave --false-alarms out.",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """Scores that are asked for, settled: where they go, and what each part is of."""

    out: Path
    bundle: Path
    config: ScoreConfig
    runs: list[range]
    """Rows of inputs.arrow by part."""
    damaged: list[str] = field(default_factory=list)
    """Names of parts whose bytes have changed since they were written; they are made again."""

    def part(self, number: int) -> Path:
        """Where a chunk's scores lie."""
        return parts(self.out) / scores_io.part_name(number)

    def files(self, number: int) -> Catalog:
        """The files that a part is of."""
        return Catalog(**shards.read_catalog(inputs(self.out), self.runs[number]))

    def journal(self) -> dict[int, Part]:
        """The finished parts."""
        return _on_disk(self.out, scores_io.read_journal(journal(self.out)))

    def missing(self) -> list[int]:
        """The parts to be made: not there (see `prepare`), or with a fault that may have passed."""
        there = scores_io.read_journal(journal(self.out))
        return [
            number
            for number in range(len(self.runs))
            if not any(_settled(one) for one in there.get(number, []))
        ]

    def read(self, columns: Sequence[str]) -> Iterator[dict[str, list[Any]]]:
        """Some columns of every part as lists (see `tables`)."""
        return (table.to_pydict() for table, _ in self.tables(columns))

    def tables(self, columns: Sequence[str]) -> Iterator[tuple[Any, Catalog]]:
        """Some columns of every part as a pyarrow table, and the files that it is of; in input
        order, its bytes checked first.

        Raises DataError unless the parts hold every input once, in order.
        """
        there = self.journal()
        for number in range(len(self.runs)):
            path, part = self.part(number), there.get(number)
            if part is None:
                raise _not_those_files(path)
            files = self.files(number)
            table = scores_io.read_table(path, ["path", *columns], part.sha256)
            if table["path"].to_pylist() != files.paths:
                raise _not_those_files(path)
            yield table, files


def _settled(part: Part) -> bool:
    return not any(part.faults.get(kind) for kind in PASSING)


def _on_disk(out: Path, journal: Mapping[int, Sequence[Part]]) -> dict[int, Part]:
    """Of what the journal says of each part, that which its bytes are."""
    found = {}
    for number, said in journal.items():
        for part in said[:1] if len(said) == 1 else [one for one in said if one.is_at(parts(out))]:
            found[number] = part
    return found


def _not_those_files(path: Path) -> DataError:
    return DataError(
        f"{path} does not hold the files it should.",
        "one row per file, in the order of the files.",
        "delete that file and run the same command again.",
    )


def parts(out: Path) -> Path:
    """The folder of the Parquet parts; nothing else lies in it, so readers take it as it is."""
    return out / "parts"


def journal(out: Path) -> Path:
    """The folder of the workers' journals of finished parts."""
    return out / "journal"


def inputs(out: Path) -> Path:
    """The list of files that `out` holds the scores of."""
    return out / "inputs.arrow"


def csv_file(out: Path) -> Path:
    """The scores as one CSV, which lies there where it was asked for."""
    return out / "scores.csv"


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
    finished = scores_io.Journal(journal(request.out))
    claimed = ((number, request.files(number)) for number in iter(worker.claim, None))
    with extract.Pump(worker, body, recipe, clean, how) as pump:
        for chunk in pump(claimed, known):
            with pump.clock.stage("write"):
                heat = 1.0 if config.raw else bundle.temperature
                chance_NC = bundles.probabilities(
                    head, chunk.features[:, 0], heat, multi=bundle.multi
                )
                rows = judged(bundle, chunk, chance_NC, config)
                scores_io.write_scores(request.part(chunk.number), rows, mark)
                part = scores_io.finished(
                    request.part(chunk.number),
                    chunk.number,
                    inputs=inputs_of(request.files(chunk.number)),
                    rows=len(chunk.paths),
                    faults=chunk.counts()["faults"],
                )
                finished.write(part)
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
        probability=chance_NC,
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
    _must_be_of_this_layout(out)
    if note.is_file():
        found = _request(note)
        if differing := [key for key in asked if found.get(key) != asked[key]]:
            first = differing[0]
            flag = f"with another setting of --{first.replace('_', '-')}"
            raise ConfigError(
                f"{out} holds scores of another request: {REQUESTED.get(first, flag)}.",
                "the same bundle, images and settings, to go on; or a new folder.",
                "give another OUT, or delete that folder.",
            )
        runs, new = [range(*ends) for ends in found["runs"]], False
        ends = [0, *(run.stop for run in runs)]
        if [run.start for run in runs] != ends[:-1] or ends[-1] != len(catalog):
            raise DataError(f"{note} divides the inputs otherwise.", "each input once.", SCORE_ANEW)
    else:
        targets.check_folder(out, "scores")
        runs = plan.chunks(catalog.paths, chunk_size)
    # Other files that were seen change nothing about the scores, nor may they change this file.
    shards.write_catalog(inputs(out), replace(catalog, ignored=0).columns())
    if new:
        content = asked | {"runs": [[run.start, run.stop] for run in runs]}
        fileio.write_sealed(note, content | {"format": scores_io.FORMAT})
    damaged = _go_on(out, catalog, runs)
    # Workers start in a directory of their own.
    store = config.store and config.store.absolute()
    config = replace(config, store=store)
    return Request(
        out=out.absolute(), bundle=path.absolute(), config=config, runs=runs, damaged=damaged
    )


SCORE_ANEW = "delete that folder and score again, or give another OUT."


def _request(note: Path) -> dict[str, Any]:
    """What request.json says."""
    content = fileio.read_sealed(
        note, scores_io.FORMAT, upgrade="score into a new folder", repair=SCORE_ANEW
    )
    fileio.must_fit(content, scores_io.REQUEST, str(note), SCORE_ANEW)
    return content


def _must_be_finished(out: Path) -> None:
    _must_be_of_this_layout(out)
    if not (out / "request.json").is_file():
        raise ConfigError(
            f"{out} holds no scores: it has no request.json.",
            "a folder that `arrowhead score` wrote.",
            "check the path.",
        )
    targets.must_be_text(out)
    if not (out / "score.json").is_file():
        raise ConfigError(
            f"{out} has no score.json: its scoring never finished.",
            "finished scores.",
            "run the same score command again: it goes on where it stopped.",
        )


def _must_be_of_this_layout(out: Path) -> None:
    if any(out.glob("part-*.parquet")):
        raise ConfigError(
            f"{out} holds scores of an older Arrowhead: their parts lie beside score.json and have"
            " no hashes.",
            f"parts in {parts(out)}, each with its sha256.",
            "give another OUT; what is in that folder can still be read as Parquet.",
        )


def _go_on(out: Path, catalog: Catalog, runs: list[range]) -> list[str]:
    """Leave in the journal what is there and whole, of these files; names of damaged parts.

    The other parts are removed, and so are the drafts of a run that was killed.
    """
    said = scores_io.read_journal(journal(out))
    kept, damaged = [], []
    for number, run in enumerate(runs):
        path = parts(out) / scores_io.part_name(number)
        now = inputs_of(catalog.part(run)) if number in said else ""
        current = [one for one in said.get(number, []) if one.inputs == now]
        if whole := next((one for one in current if one.is_at(parts(out))), None):
            kept.append(whole)
            continue
        if current and path.is_file():
            damaged.append(path.name)
        path.unlink(missing_ok=True)
    for draft in parts(out).glob(".part-*.draft"):
        draft.unlink(missing_ok=True)
    scores_io.replace_journal(journal(out), kept)
    return damaged


def inputs_of(files: Catalog) -> str:
    """A hash of files' paths, sizes and stamps: a file of the same size may hold another image."""
    return plan.chunk_name(files, range(len(files)), "")


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
    folders: Agreement | None = None
    """How the labels agree with folders that are named after classes, if they are."""
    trained: int | None = None
    """How many of the images the bundle was trained on; None where it does not say."""
    validated: int | None = None
    """How many of the others it was validated with."""
    torn: list[str] = field(default_factory=list)
    """Paths of the first files that could not be read."""

    @property
    def used(self) -> dict[str, int] | None:
        """How many of the images the bundle was made of, as JSON takes it."""
        if self.trained is None or self.validated is None:
            return None
        return {"trained_on": self.trained, "validated": self.validated}


@dataclass(frozen=True, slots=True)
class Agreement:
    """How many of the images in folders that are named after classes are given that class."""

    images: int
    right: int

    def plain(self) -> dict[str, Any]:
        """As JSON takes it, with the accuracy and its 95 % interval."""
        return {
            "images": self.images,
            "right": self.right,
            "accuracy": self.right / self.images,
            "accuracy_interval": list(metrics.interval(self.right, self.images)),
        }


class _Folders:
    """Whether images lie in CLASS/… or in SPLIT/CLASS/…, and how their labels agree with that."""

    def __init__(self, classes: Sequence[str]) -> None:
        self._classes = set(classes)
        self._images, self._right = Counter[int](), Counter[int]()
        self._odd: set[int] = set()

    def add(self, path: str, label: str | None) -> None:
        """Count one image; label: None at a fault."""
        folders = path.split("/")[:-1]
        for depth in {0, 1} - self._odd:
            if len(folders) <= depth or folders[depth] not in self._classes:
                self._odd.add(depth)
            elif label is not None:
                self._images[depth] += 1
                self._right[depth] += label == folders[depth]

    def agreement(self) -> Agreement | None:
        """None where the folders are not named after classes."""
        for depth in sorted({0, 1} - self._odd):
            if self._images[depth]:
                return Agreement(self._images[depth], self._right[depth])
        return None


def held(request: Request, bundle: Bundle) -> Held:
    """Count what the parts hold, one part at a time.

    Raises DataError unless they hold every input once, in order.
    """
    made = Held(labels=Counter(dict.fromkeys(bundle.classes, 0)))
    folders = _Folders(bundle.classes)
    used = Counter[int]()
    names = ["image_id", "labels" if bundle.multi else "label", "probability", "fault"]
    names += ["novelty"] if bundle.novelty else []
    names += ["novel"] if request.config.flag_novel else []
    for columns in request.read(names):
        pairs = zip(columns["path"], columns["fault"], strict=True)
        torn = [(path, fault.partition(":")[0]) for path, fault in pairs if fault]
        made.faults.update(kind for _, kind in torn)
        made.torn += [path for path, _ in torn][: NAMED - len(made.torn)]
        if bundle.images:
            use_N = bundle.images.use(columns["image_id"])
            used.update(use_N[[fault is None for fault in columns["fault"]]].tolist())
        if bundle.multi:
            made.labels.update(label for given in columns["labels"] for label in given or ())
        else:
            made.labels.update(label for label in columns["label"] if label is not None)
            for path, label in zip(columns["path"], columns["label"], strict=True):
                folders.add(path, label)
        made.chances += np.histogram(_there(columns["probability"]), BINS)[0]
        made.novelties += np.histogram(_there(columns.get("novelty", [])), 2 * BINS)[0]
        made.novel += sum(map(bool, columns.get("novel", [])))
    made.folders = folders.agreement() if not bundle.multi else None
    if bundle.images:
        made.trained, made.validated = used[TRAINED], used[VALIDATED]
    return made


def _there(values: list[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def write_csv(request: Request, bundle: Bundle) -> Path:
    """The parts as one CSV for people and programs without Parquet, whole or absent."""
    target = csv_file(request.out)
    names = ["image_id", "label", "probability"]
    names += ["labels"] if bundle.multi else []
    names += ["novelty"] if bundle.novelty else []
    names += ["novel"] if request.config.flag_novel else []
    names += ["fault"]
    every = bundle.classes if request.config.probabilities else []
    header = ["path", *names, *(f"probability.{name}" for name in every)]
    with spreadsheet.writing(target, header) as sheet:
        for columns in request.read([*names, *(["probabilities"] if every else [])]):
            for row in _cells(columns, names, every):
                sheet.row(row)
    return target


def _cells(
    columns: dict[str, list[Any]], names: Sequence[str], every: Sequence[str]
) -> Iterator[list[Any]]:
    columns["image_id"] = [one.hex() for one in columns["image_id"]]
    if "labels" in columns:
        # As a list, which `tables` reads back: names may hold spaces, commas, anything.
        columns["labels"] = [
            None if given is None else json.dumps(given, ensure_ascii=False)
            for given in columns["labels"]
        ]
    if "novel" in columns:
        columns["novel"] = [None if one is None else int(one) for one in columns["novel"]]
    for at, plain in enumerate(zip(*(columns[name] for name in ["path", *names]), strict=True)):
        by_class = columns["probabilities"][at] if every else None
        yield [*plain, *(by_class[name] if by_class else None for name in every)]


# ------------------------------------------------------------------------------- afterwards


def record(request: Request, result: Mapping[str, Any], loaded: Bundle) -> None:
    """Write score.json: the result, and every part with its rows, bytes and sha256; scores.csv,
    where there is one, with its sha256.
    """
    there = request.journal()
    listed = [there[number] for number in range(len(request.runs))]
    content = dict(result) | {
        "format": scores_io.FORMAT,
        "classes": loaded.classes,
        "inputs_sha256": fileio.sha256(inputs(request.out)),
        "csv_sha256": _csv_digest(request.out),
        "parts": [
            {"name": one.name, "rows": one.rows, "bytes": one.bytes, "sha256": one.sha256}
            for one in listed
        ],
    }
    fileio.write_sealed(request.out / "score.json", content)


def record_csv(out: Path) -> None:
    """Write into score.json, which is there, that scores.csv was written anew."""
    note, digest = out / "score.json", _csv_digest(out)
    content = _score(note)
    if content.get("csv_sha256") != digest:
        fileio.write_sealed(note, content | {"csv_sha256": digest})


def _csv_digest(out: Path) -> str | None:
    return fileio.sha256(csv_file(out)) if csv_file(out).is_file() else None


def _score(note: Path) -> dict[str, Any]:
    """What score.json says."""
    repair = "delete it and run the same score command again: parts stay."
    content = fileio.read_sealed(
        note, scores_io.FORMAT, upgrade="score again into a new folder", repair=repair
    )
    fileio.must_fit(content, scores_io.SCORE, str(note), repair)
    return content


def verify(out: Path) -> dict[str, Any]:
    """Compare everything that `out` holds with score.json: {parts, rows, bytes, problems}.

    problems: a line for each, empty if all of it can be trusted. Raises ConfigError where there are
    no scores, or only a part of them yet, DataError where score.json has changed.
    """
    _must_be_finished(out)
    content = _score(out / "score.json")
    named, problems = content["parts"], []
    try:
        _request(out / "request.json")
    except DataError as error:
        problems.append(error.found)
    digest = content.get("csv_sha256")  # earlier versions wrote none
    if digest and _csv_digest(out) != digest:
        problems.append(f"{csv_file(out)} is missing or has changed")
    paths: list[str] | None = None
    if inputs(out).is_file() and fileio.sha256(inputs(out)) == content["inputs_sha256"]:
        paths = shards.read_catalog(inputs(out))["paths"]
    else:
        problems.append(f"{inputs(out)} is missing or has changed")
    first = 0
    for one in named:
        try:
            rows = scores_io.read_parquet(parts(out) / one["name"], ["path"], one["sha256"])["path"]
        except DataError as error:
            problems.append(error.found)
        else:
            if paths is not None and rows != paths[first : first + one["rows"]]:
                problems.append(f"{parts(out) / one['name']} is not of the files it should be")
        first += one["rows"]
    known = {one["name"] for one in named}
    strange = sorted({file.name for file in parts(out).glob("*")} - known)
    problems += [f"{parts(out) / name} is not named in score.json" for name in strange]
    if first != content["counts"]["inputs"]:
        problems.append(f"the parts hold {first} rows, score.json counts other inputs")
    return {
        "scores": str(out),
        "parts": len(named),
        "rows": first,
        "bytes": sum(one["bytes"] for one in named),
        "problems": problems,
    }
