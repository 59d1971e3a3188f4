"""What is asked of a scoring, where it lies, and what of it is done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from arrowhead import fileio, output_paths
from arrowhead.bundle import format as bundle_format
from arrowhead.bundle.format import Bundle
from arrowhead.data import chunks
from arrowhead.data.catalog import Catalog
from arrowhead.errors import ConfigError, DataError
from arrowhead.features import catalog_file
from arrowhead.features.recipe import Recipe
from arrowhead.features.store import Store
from arrowhead.inference import layout, scores_io
from arrowhead.inference.scores_io import Part

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
        return layout.parts(self.out) / scores_io.part_name(number)

    def files(self, number: int) -> Catalog:
        """The files that a part is of."""
        return Catalog(**catalog_file.read_catalog(layout.inputs(self.out), self.runs[number]))

    def journal(self) -> dict[int, Part]:
        """The finished parts."""
        return _on_disk(self.out, scores_io.read_journal(layout.journal(self.out)))

    def missing(self) -> list[int]:
        """The parts to be made: not there (see `prepare`), or with a fault that may have passed."""
        there = scores_io.read_journal(layout.journal(self.out))
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
        for part in (
            said[:1] if len(said) == 1 else [one for one in said if one.is_at(layout.parts(out))]
        ):
            found[number] = part
    return found


def _not_those_files(path: Path) -> DataError:
    return DataError(
        f"{path} does not hold the files it should.",
        "one row per file, in the order of the files.",
        "delete that file and run the same command again.",
    )


def one_view(recipe: Recipe) -> Recipe:
    """The recipe for scoring: images are seen once, clean, however many views trained the head."""
    return replace(recipe, views=1, augment="none", augment_seed=0)


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
        "bundle": bundle_format.fingerprint(path),
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
    layout.must_be_of_this_layout(out)
    if note.is_file():
        found = request(note)
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
        output_paths.check_folder(out, "scores")
        runs = chunks.chunks(catalog.paths, chunk_size)
    # Other files that were seen change nothing about the scores, nor may they change this file.
    catalog_file.write_catalog(layout.inputs(out), replace(catalog, ignored=0).columns())
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


def request(note: Path) -> dict[str, Any]:
    """What request.json says."""
    content = fileio.read_sealed(
        note, scores_io.FORMAT, upgrade="score into a new folder", repair=SCORE_ANEW
    )
    fileio.must_fit(content, scores_io.REQUEST, str(note), SCORE_ANEW)
    return content


def _go_on(out: Path, catalog: Catalog, runs: list[range]) -> list[str]:
    """Leave in the journal what is there and whole, of these files; names of damaged parts.

    The other parts are removed, and so are the drafts of a run that was killed.
    """
    said = scores_io.read_journal(layout.journal(out))
    kept, damaged = [], []
    for number, run in enumerate(runs):
        path = layout.parts(out) / scores_io.part_name(number)
        now = layout.inputs_of(catalog.part(run)) if number in said else ""
        current = [one for one in said.get(number, []) if one.inputs == now]
        if whole := next((one for one in current if one.is_at(layout.parts(out))), None):
            kept.append(whole)
            continue
        if current and path.is_file():
            damaged.append(path.name)
        path.unlink(missing_ok=True)
    for draft in layout.parts(out).glob(".part-*.draft"):
        draft.unlink(missing_ok=True)
    scores_io.replace_journal(layout.journal(out), kept)
    return damaged


def record_csv(out: Path) -> None:
    """Write into score.json, which is there, that scores.csv was written anew."""
    note, digest = out / "score.json", csv_digest(out)
    content = score(note)
    if content.get("csv_sha256") != digest:
        fileio.write_sealed(note, content | {"csv_sha256": digest})


def csv_digest(out: Path) -> str | None:
    """The sha256 of the CSV, None without one."""
    return fileio.sha256(layout.csv_file(out)) if layout.csv_file(out).is_file() else None


def score(note: Path) -> dict[str, Any]:
    """What score.json says."""
    repair = "delete it and run the same score command again: parts stay."
    content = fileio.read_sealed(
        note, scores_io.FORMAT, upgrade="score again into a new folder", repair=repair
    )
    fileio.must_fit(content, scores_io.SCORE, str(note), repair)
    return content
